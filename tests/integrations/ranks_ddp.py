"""What every rank runs for test_ddp.py."""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from integrations.text import DATA, FEW, ByteModel, gradients, pieces_of, relative_error, report
from torch.nn.parallel import DistributedDataParallel

import seqbatch

# Every sequence of FEW fills a batch of Padding(1), so that the last step has one lane for all ranks.
STRATEGIES = {
    "bucketing": seqbatch.Bucketing(max_tokens=600),
    "alone": seqbatch.Padding(1),
    "packing": seqbatch.Packing(400, rows=2),
    "splicing": seqbatch.Splicing(6, chunk_size=40),
}
SEEN = [("bucketing", 2), ("packing", 1), ("splicing", 1)]


def epochs_seen(strategy, accumulation):
    """Train two epochs on all data; return the pieces of this rank's batches."""
    torch.manual_seed(0)
    model = DistributedDataParallel(ByteModel())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = seqbatch.make_loader(DATA, strategy, next_token=True, accumulation=accumulation)
    epochs = []
    for _ in range(2):
        epochs.append([])
        state = None
        for batch in loader:
            epochs[-1].append(pieces_of(batch))
            with nullcontext() if batch.update else model.no_sync():
                losses, state = model(batch, state)
                (losses * batch.loss_scale).backward()
            if batch.update:
                optimizer.step()
                optimizer.zero_grad()
    return epochs


def worst_gradient(strategy, accumulation):
    """Return the largest error of all optimizer steps of an epoch against one process with all ranks' batches."""
    torch.manual_seed(0)
    alone, size = ByteModel().double(), dist.get_world_size()
    model = DistributedDataParallel(ByteModel().double())
    model.module.load_state_dict(alone.state_dict())
    options = {"next_token": True, "accumulation": accumulation}
    everything = list(seqbatch.make_loader(FEW, strategy, rank="all", num_replicas=size, **options))
    worst, state, states, micro = 0.0, None, [None] * size, []
    for number, batch in enumerate(seqbatch.make_loader(FEW, strategy, **options)):
        with nullcontext() if batch.update else model.no_sync():
            losses, state = model(batch, state)
            (losses.sum() * batch.loss_scale).backward()
        micro += [(rank, everything[number * size + rank]) for rank in range(size)]
        if batch.update:
            total = 0.0
            for rank, part in micro:
                part_losses, states[rank] = alone(part, states[rank])
                total = total + part_losses
            (total / sum(int(part.loss_mask.sum()) for _, part in micro)).backward()
            worst = max(worst, relative_error(gradients(model.module), gradients(alone)))
            model.zero_grad()
            alone.zero_grad()
            micro = []
    return worst


def main():
    """Write what was seen and how wrong the gradients were."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of what is checked here
    early = seqbatch.make_loader(FEW, seqbatch.Padding(4))
    dist.init_process_group("gloo")
    with pytest.raises(ValueError, match="now there are"):
        next(iter(early))
    records = {
        f"{name} {accumulation}": {
            "epochs": epochs_seen(strategy, accumulation) if (name, accumulation) in SEEN else None,
            "error": worst_gradient(strategy, accumulation),
        }
        for name, strategy in STRATEGIES.items()
        for accumulation in (1, 2)
    }
    report(dist.get_rank(), records)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
