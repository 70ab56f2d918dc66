import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

import seqbatch

accelerator, strategy = Accelerator(), seqbatch.Bucketing(max_tokens=512)
data = seqbatch.TokenArray.of_sequences([list(f"{i} squared is {i * i}".encode()) for i in range(400)])
ranks = {"rank": "all", "num_replicas": accelerator.num_processes}  # Accelerate deals the batches out
loader = seqbatch.make_loader(data, strategy, layout="batch_first", next_token=True, **ranks)
model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2))
model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01), loader)
for batch in (batch for _ in range(3) for batch in loader):
    losses = torch.nn.functional.cross_entropy(model(batch.data).logits.mT, batch.targets, reduction="sum")
    accelerator.backward(losses * batch.loss_scale)
    optimizer.step()
    optimizer.zero_grad()
