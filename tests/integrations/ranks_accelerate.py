"""What every rank runs for test_accelerate.py."""

import warnings

import torch
from integrations.text import DATA, ByteModel, gradients, pieces_of, relative_error, report

import seqbatch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

STRATEGIES = {"padding": seqbatch.Padding(16), "bucketing": seqbatch.Bucketing(max_tokens=300)}


def own(accelerator, strategy, **options):
    """Return a loader that knows its rank and is not prepared."""
    return seqbatch.make_loader(DATA, strategy, next_token=True, **options)


def prepared(accelerator, strategy, **options):
    """Return a loader of all ranks' batches, which Accelerate deals out."""
    size = accelerator.num_processes
    loader = seqbatch.make_loader(DATA, strategy, next_token=True, rank="all", num_replicas=size, **options)
    return accelerator.prepare(loader)


def evened(accelerator, strategy, **options):
    """Return the same under Accelerate's default, to repeat batches until all ranks have as many: there are none."""
    accelerator.dataloader_config.even_batches = True
    loader = prepared(accelerator, strategy, **options)
    accelerator.dataloader_config.even_batches = False
    return loader


def train(accelerator, make, strategy, num_workers):
    """Train two epochs; return the pieces of this rank's batches, and where the loop stood after the fifth batch."""
    torch.manual_seed(0)
    model = ByteModel()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loader = make(accelerator, strategy, num_workers=num_workers)
    epochs, states, error = [], [], None
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([])
        for batch in loader:
            epochs[-1].append(pieces_of(batch))
            accelerator.backward(model(batch)[0] * batch.loss_scale)
            if error is None:
                error = first_gradient_error(accelerator, strategy, gradients(model))
            optimizer.step()
            optimizer.zero_grad()
            if len(epochs[-1]) == 5:
                states.append(dict(batch.position))
    return {"epochs": epochs, "states": states, "error": error}


def first_gradient_error(accelerator, strategy, found):
    """Compare the first step with one process on the batches of all ranks."""
    size = accelerator.num_processes
    everything = seqbatch.make_loader(DATA, strategy, next_token=True, rank="all", num_replicas=size)
    torch.manual_seed(0)
    model = ByteModel()
    batches = [batch for _, batch in zip(range(size), everything, strict=False)]
    (sum(model(batch)[0] for batch in batches) / sum(int(b.loss_mask.sum()) for b in batches)).backward()
    return relative_error(found, gradients(model))


def resume(accelerator, make, strategy, state):
    """Return the pieces of the rest of the epoch."""
    size = accelerator.num_processes
    ranks = {} if make is own else {"rank": "all", "num_replicas": size}
    loader = seqbatch.make_loader(DATA, strategy, next_token=True, **ranks)
    loader.load_state_dict(state)
    if make is not own:
        loader = accelerator.prepare(loader)
    loader.set_epoch(state["epoch"])  # Accelerate would begin with epoch 0
    return [pieces_of(batch) for batch in loader]


def main():
    """Write what was seen, and seen after resuming."""
    torch.set_num_threads(1)
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False, dispatch_batches=False)
    )
    records = {}
    for name, strategy in STRATEGIES.items():
        for make, num_workers in ((own, 0), (prepared, 0), (prepared, 2), (evened, 0)):
            record = train(accelerator, make, strategy, num_workers)
            record["rest"] = [resume(accelerator, make, strategy, state) for state in record["states"]]
            records[f"{name} {make.__name__} {num_workers}"] = record
    report(accelerator.process_index, records)
    accelerator.end_training()


if __name__ == "__main__":
    main()
