import torch

import seqbatch.rnn

data = seqbatch.TokenArray.of_sequences([list(f"{i} squared is {i * i}".encode()) for i in range(400)])
loader = seqbatch.make_loader(data, seqbatch.Splicing(num_lanes=16, chunk_size=20), next_token=True)
embed, rnn, head = torch.nn.Embedding(128, 32), seqbatch.rnn.LSTM(32, 32), torch.nn.Linear(32, 128)
optimizer, state = torch.optim.Adam([*embed.parameters(), *rnn.parameters(), *head.parameters()], lr=0.01), None
for _ in range(3):
    for batch in loader:
        output, state = rnn(embed(batch.data), batch.carry_in(state), reset=batch.reset, mask=batch.mask)
        losses = torch.nn.functional.cross_entropy(head(output).mT, batch.targets, reduction="sum")
        (losses * batch.loss_scale).backward()
        optimizer.step()
        optimizer.zero_grad()
