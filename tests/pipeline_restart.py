"""Training that saves after every step and goes on from the newest checkpoint, under torchrun; a rank dies once."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from pipelines import Network, assert_same_parameters, spliced
from torch import nn

AGENT_DIES = os.environ.get("AGENT_DIES")
DIES_AT = 3


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batches = spliced([5, 7, 3, 4, 6, 2, 8, 9], 2, 4)[:6]
    pipe = Network(nn.GRU).pipeline(chunk_size=2, virtual=2 // dist.get_world_size())
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.01)
    done, newest = 0, max(folder.glob("step-*"), default=None)
    if newest is not None and not newest.name.endswith((".partial", ".before")):
        done = pipe.load(newest, optimizer)["done"]
    log = folder / f"started-{dist.get_rank()}.txt"
    log.open("a").write(f"{dist.get_world_size()} {done}\n")
    for number, batch in enumerate(batches[done:], done + 1):
        first = not (folder / "died").exists()
        dist.barrier()
        dies = dist.get_rank() == 1 if AGENT_DIES is None else AGENT_DIES == "yes"
        if number == DIES_AT and first and dies:
            (folder / "died").touch()
            if AGENT_DIES == "yes":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        pipe.step(batch)
        optimizer.step()
        optimizer.zero_grad()
        pipe.save(folder / f"step-{number}", optimizer, done=number)
    network, states = Network(nn.GRU), None
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for batch in batches:
        loss, states = network(batch, states)
        (loss * batch.loss_scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_parameters(network, pipe)
    (folder / f"equal-{dist.get_rank()}").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
