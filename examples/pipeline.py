import torch

import seqbatch.pipeline

layers = [seqbatch.rnn.LSTM(64, 64) for _ in range(4)]
embed, head = torch.nn.Embedding(128, 64), torch.nn.Linear(64, 128)
loss = torch.nn.CrossEntropyLoss(reduction="none")
pipe = seqbatch.pipeline.LayerPipeline(layers, embed=embed, head=head, loss=loss, chunk_size=8)
data = seqbatch.TokenArray.of_sequences([list(f"{i} squared is {i * i}".encode()) for i in range(400)])
loader = seqbatch.make_loader(data, seqbatch.Splicing(16, chunk_size=32), next_token=True, mesh=pipe.mesh)
optimizer = torch.optim.Adam(pipe.parameters(), lr=0.01)
for batch in [*loader] * 6:
    result = pipe.step(batch)  # forward and backward over all devices
    optimizer.step()
    optimizer.zero_grad()
pipe.save("checkpoint", optimizer)
