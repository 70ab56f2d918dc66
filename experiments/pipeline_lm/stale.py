"""Training with late gradients, as Chen+15 pipelined it: hidden layers and softmax on two processes, neither waiting.

python -m experiments.pipeline_lm.stale --emulate [--quick]
torchrun --standalone --nproc-per-node 2 -m experiments.pipeline_lm.stale [--quick]

While the second process trains the softmax on a bunch, the first runs the next bunch through the hidden layers. Their
weights then lack the update of the bunch before: every gradient of a hidden layer is applied one update late. In one
process the same numbers come from holding each gradient of the hidden layers back for one update.
"""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from experiments.common import write_rows
from experiments.pipeline_lm.model import LARGEST_NORM, Network, loaders, words
from experiments.pipeline_lm.train import connect
from seqbatch import SequenceBatch
from seqbatch.measure import environment

__all__ = ["in_one_process", "on_two_processes"]

HERE = Path(__file__).parent
RATES = (2.0, 16.0)  # of plain gradient descent, clipped


class Part:
    """Some parameters with an optimizer of their own: gradient descent, clipped at norm 1."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float) -> None:
        self.parameters = list(parameters)
        self._optimizer = torch.optim.SGD(self.parameters, lr=lr)

    def take(self) -> list[Tensor]:
        """The gradients that have gathered, which leaves none."""
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        self._optimizer.zero_grad()
        return found

    def update(self, gradients: Sequence[Tensor]) -> None:
        """A step."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(self.parameters, LARGEST_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()


def hidden_parameters(network: Network) -> list[nn.Parameter]:
    """All but the softmax's."""
    return [*network.embed.parameters(), *network.layers.parameters()]


def in_one_process(
    network: Network, batches: Sequence[SequenceBatch], lr: float, *, late: bool, progress: bool = False
) -> list[float]:
    """Train; the mean loss of each bunch before its update.

    Args:
        network: Is trained.
        batches: One update each, states are carried.
        lr: Of both parts.
        late: Whether gradients of the hidden layers are applied one update later.
        progress: Show a bar on standard error.
    """
    hidden, softmax = Part(hidden_parameters(network), lr), Part(list(network.head.parameters()), lr)
    states: list[Any] = [None] * len(network.layers)
    held: list[Tensor] | None = None
    found = []
    name = f"rate {lr:g}, {'late' if late else 'exact'}"
    for batch in tqdm(batches, desc=name, mininterval=1.0, leave=False, disable=not progress):
        x, states = network.hidden(batch, states)
        loss = network.score(x, batch) * batch.loss_scale
        loss.backward()
        found.append(float(loss.detach()))
        softmax.update(softmax.take())
        gradients = hidden.take()
        now = held if late else gradients
        if now is not None:
            hidden.update(now)
        held = gradients
    return found


def on_two_processes(network: Network, batches: Sequence[SequenceBatch], lr: float) -> list[float]:
    """The same with ``late=True``, each part on its own rank; both return the losses."""
    width = network.head.in_features
    if dist.get_rank() == 0:
        _train_hidden(network, batches, lr, width)
        losses = torch.empty(len(batches), dtype=torch.float64)
    else:
        losses = torch.tensor(_train_softmax(network, batches, lr, width), dtype=torch.float64)
    dist.broadcast(losses, src=1)
    return losses.tolist()


def _train_hidden(network: Network, batches: Sequence[SequenceBatch], lr: float, width: int) -> None:
    """Rank 0: a bunch forward and off to rank 1, then the bunch before it backward."""
    hidden = Part(hidden_parameters(network), lr)
    # Two bunches are under way, each with the weights it went forward with.
    copies = [copy.deepcopy(network) for _ in range(2)]
    parts = [Part(hidden_parameters(each), lr) for each in copies]
    states: list[Any] = [None] * len(network.layers)
    before: tuple[Part, Tensor, Tensor, list[Any]] | None = None
    for number, batch in enumerate([*batches, None]):
        now = None
        if batch is not None:
            part = parts[number % 2]
            with torch.no_grad():
                for mine, newest in zip(part.parameters, hidden.parameters, strict=True):
                    mine.copy_(newest)
            x, states = copies[number % 2].hidden(batch, states)
            sent, gradient = x.detach().contiguous(), torch.empty(*batch.data.shape[:2], width)
            works = [dist.isend(sent, 1, tag=2 * number), dist.irecv(gradient, 1, tag=2 * number + 1)]
            now = part, x, gradient, works
        if before is not None:
            part, x, gradient, works = before
            for work in works:
                work.wait()
            x.backward(gradient)
            hidden.update(part.take())
        before = now


def _train_softmax(network: Network, batches: Sequence[SequenceBatch], lr: float, width: int) -> list[float]:
    """Rank 1: what comes through the softmax and back, the next bunch being received meanwhile."""
    softmax = Part(list(network.head.parameters()), lr)
    shapes = [(*batch.data.shape[:2], width) for batch in batches]

    def receive(number: int) -> tuple[Tensor, Any]:
        buffer = torch.empty(shapes[number])
        return buffer, dist.irecv(buffer, 0, tag=2 * number)

    found, sends = [], []
    coming = receive(0)
    for number, batch in enumerate(batches):
        x, work = coming
        work.wait()
        if number + 1 < len(batches):
            coming = receive(number + 1)
        x.requires_grad_()
        loss = network.score(x, batch) * batch.loss_scale
        loss.backward()
        assert x.grad is not None
        sends = [*sends[-1:], (dist.isend(x.grad, 0, tag=2 * number + 1), x.grad)]  # alive until they are sent
        found.append(float(loss.detach()))
        softmax.update(softmax.take())
    for work, _ in sends:
        work.wait()
    return found


def bunches(lanes: int, window: int, updates: int) -> tuple[list[SequenceBatch], int]:
    """So many spliced windows of words of WikiText-2, epoch after epoch, and the size of the vocabulary."""
    loader, _ = loaders(words(), lanes, window)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    return list(itertools.islice(epochs, updates)), words().vocabulary


def draw(rows: Sequence[dict[str, Any]], path: Path, width: int = 10) -> None:
    """Losses over updates, each a mean of `width`, exact and late, one panel a rate."""
    from matplotlib.figure import Figure

    rates = list(dict.fromkeys(row["rate"] for row in rows))
    figure = Figure(figsize=(4.5 * len(rates), 3.6), layout="constrained")
    for ax, rate in zip(figure.subplots(1, len(rates), sharey=True, squeeze=False)[0], rates, strict=True):
        some = [row for row in rows if row["rate"] == rate]
        for name, colour, line in (("exact", "#1b1b1b", "-"), ("late", "#c44e00", "--")):
            values = [float(row[name]) for row in some]
            blocks = [values[i : i + width] for i in range(0, len(values) - width + 1, width)]
            updates = [width * (i + 0.5) for i in range(len(blocks))]
            ax.plot(updates, [sum(block) / width for block in blocks], line, color=colour, label=name)
        ax.set(xlabel="updates", title=f"learning rate {rate:g}")
        ax.legend(frameon=False)
    figure.axes[0].set_ylabel(f"nats per word (means of {width} bunches)")
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


@click.command()
@click.option("--emulate", is_flag=True, help="In one process, exact training beside; writes stale.csv and stale.png.")
@click.option("--hidden", default=128, show_default=True)
@click.option("--lanes", default=32, show_default=True)
@click.option("--window", default=16, show_default=True)
@click.option("--updates", default=400, show_default=True)
@click.option("--rate", "rates", type=float, multiple=True, default=RATES, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--quick", is_flag=True, help="20 updates; nothing is written.")
def main(
    emulate: bool, hidden: int, lanes: int, window: int, updates: int, rates: Sequence[float], threads: int, quick: bool
) -> None:
    """One LSTM layer and a softmax of 10,000 words, with gradients in time and late."""
    rank, ranks = connect(threads)
    if emulate != (ranks == 1) or ranks > 2:
        raise click.UsageError("--emulate is for one process; without it torchrun must start two")
    batches, vocabulary = bunches(lanes, window, 20 if quick else updates)
    rows = []
    for rate in rates:
        late = in_one_process(Network("lstm", 1, hidden, vocabulary), batches, rate, late=True, progress=rank == 0)
        if ranks > 1:
            found = on_two_processes(Network("lstm", 1, hidden, vocabulary), batches, rate)
            if rank == 0:
                difference = max(abs(a - b) for a, b in zip(found, late, strict=True))
                print(f"rate {rate:g}: last loss {found[-1]:.6f}, largest difference to one process {difference:.1e}")
            continue
        exact = in_one_process(Network("lstm", 1, hidden, vocabulary), batches, rate, late=False, progress=True)
        ends = [sum(curve[-20:]) / len(curve[-20:]) for curve in (exact, late)]
        print(f"rate {rate:g}: mean of the last 20 losses {ends[0]:.4f} exact, {ends[1]:.4f} late")
        pairs = zip(exact, late, strict=True)
        rows += [
            {"rate": rate, "update": n, "exact": round(a, 5), "late": round(b, 5), **environment()}
            for n, (a, b) in enumerate(pairs, start=1)
        ]
    if rows and not quick:
        write_rows(HERE / "stale.csv", rows)
        draw(rows, HERE / "stale.png")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
