"""What every rank runs for test_lightning.py."""

import warnings

import torch
from integrations.lightning_module import OPTIONS, Module, Trainer
from integrations.text import DATA, report

import seqbatch

STRATEGIES = {"padding": seqbatch.Padding(16), "bucketing": seqbatch.Bucketing(max_tokens=300)}


def main():
    """Train with Lightning's DDP; write what was seen."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    records = {}
    for name, strategy in STRATEGIES.items():
        module = Module(lambda strategy=strategy: seqbatch.make_loader(DATA, strategy, next_token=True))
        trainer = Trainer(max_epochs=2, strategy="ddp", devices=2, reload_dataloaders_every_n_epochs=1, **OPTIONS)
        trainer.fit(module)
        weights = torch.cat([p.detach().flatten() for p in module.parameters()])
        records[name] = {"epochs": module.epochs, "weights": weights.tolist()}
    report(trainer.global_rank, records)


if __name__ == "__main__":
    main()
