from torch import nn, optim, utils

import seqbatch.rnn

words = seqbatch.TokenArray.of_sequences([list(f"{i} squared".encode()) for i in range(400)])
squares = seqbatch.TokenArray.of_sequences([list(f"<{i * i}>".encode()) for i in range(400)])
data, lengths = utils.data.StackDataset(words, squares), [*zip(words.lengths, squares.lengths, strict=True)]
loader = seqbatch.make_loader(data, seqbatch.Bucketing(max_tokens=512), lengths=lengths, next_token=True)
encoder, decoder = seqbatch.rnn.LSTM(32, 32), seqbatch.rnn.LSTM(32, 32)
embed, head, *_ = model = nn.ModuleList([nn.Embedding(128, 32), nn.Linear(32, 128), encoder, decoder])
optimizer = optim.Adam(model.parameters(), lr=0.01)
for source, target in [*loader] * 4:
    output, _ = decoder(embed(target.data), encoder(embed(source.data), mask=source.mask)[1], mask=target.mask)
    losses = nn.functional.cross_entropy(head(output).mT, target.targets, reduction="sum")
    (losses * target.loss_scale).backward()
    optimizer.step()
    optimizer.zero_grad()
