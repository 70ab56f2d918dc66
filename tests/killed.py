"""A training process that checkpoints, writes down what it trained on, and can be killed at any step."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what optimizers and kernels import late is loaded once, before processes are forked
import torch.distributed as dist
from loaders import load
from torch import nn

import seqbatch
import seqbatch.fill_kernels
import seqbatch.rnn.cpu_kernels

EPOCHS, EVERY = 8, 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 6)
        self.rnn = seqbatch.rnn.SRU(6, 6)
        self.out = nn.Linear(6, 97)


def train(folder: str, name: str, rank: int, num_replicas: int, run: int, kill: tuple[int, int, str] | None) -> None:
    """Train to the end, or until step `kill[0]` of this run, where rank `kill[1]` gets a SIGKILL."""
    torch.set_num_threads(1)
    home, total = Path(folder), 0
    if num_replicas > 1:
        store = f"file://{home}/store{run}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_replicas)
    torch.manual_seed(0)
    model = Model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    loader = load(name, next_token=True, seed=1, rank=rank, num_replicas=num_replicas)
    state, checkpoint = None, home / "checkpoint.pt"
    history = open(home / f"seen{run}.{rank}", "w")  # noqa: SIM115 - open as long as the process lives
    losses: list[float] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state, losses = loader.load_state_dict(saved["loader"]), saved["losses"]
        print(json.dumps({"from": saved["label"]}), file=history, flush=True)
    while loader.epoch < EPOCHS:
        epoch = loader.epoch
        for batch in loader:
            total += 1
            stop = kill[2] if kill is not None and kill[:2] == (total, rank) else ""
            _die(stop == "before")
            output, state = model.rnn(
                model.embed(batch.data % 97), batch.carry_in(state), reset=batch.reset, mask=batch.mask
            )
            logits, target = model.out(output)[batch.loss_mask], batch.targets[batch.loss_mask] % 97
            loss = nn.functional.cross_entropy(logits, target, reduction="sum") * batch.loss_scale
            optimizer.zero_grad()
            loss.backward()
            losses.append(_average([loss.detach(), *(p.grad for p in model.parameters())], num_replicas))
            optimizer.step()
            print(
                json.dumps({"epoch": epoch, "step": total, "tokens": batch.data[batch.mask].tolist()}),
                file=history,
                flush=True,
            )
            _die(stop == "after")
            if total % EVERY == 0:
                lanes = seqbatch.gather_lanes(state) if batch.placement.carry else None
                if rank == 0:
                    _save(
                        checkpoint, model, optimizer, loader.state_dict(after=batch, lanes=lanes), losses, [run, total]
                    )
                _die(stop == "saved")
    if rank == 0:
        (home / "done.json").write_text(json.dumps(losses))


def _save(path: Path, model: Model, optimizer: Any, loader: Any, losses: list[float], label: list[int]) -> None:
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader, "losses": losses}
    torch.save(content | {"label": label}, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def _average(tensors: list[torch.Tensor], num_replicas: int) -> float:
    if num_replicas > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= num_replicas
    return float(tensors[0])


def _die(now: bool) -> None:
    if now:
        os.kill(os.getpid(), signal.SIGKILL)
