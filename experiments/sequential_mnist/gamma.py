"""Does the initial gamma decide whether gradients reach the start of a sequence? See README.md beside this file.

python -m experiments.sequential_mnist.gamma [--quick]
"""

from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy
from tqdm import tqdm

from experiments.common import write_rows
from experiments.sequential_mnist.data import MNIST, ORDERS, load
from experiments.sequential_mnist.figure import draw_gradients
from experiments.sequential_mnist.run import machine

HERE = Path(__file__).parent
GAMMAS = (0.01, 0.1, 0.3, 0.5, 1.0)
FORMS = ("sum", "terms")
RECURRENT = ("identity", "orthogonal")
EVERY = 14  # steps between two rows: half a line of pixels


def gradient_norms(
    x: Tensor, y: Tensor, gamma: float, form: str, recurrent: str, noise: float = 0.1, hidden: int = 100
) -> Tensor:
    """Norm of dL/dh_t at initialisation, (T,), the mean over the batch of each image's.

    A plain tanh RNN, normalized over the batch at each step, with a linear layer on the last h; L is the batch's mean
    cross entropy. All in x's dtype.

    Args:
        x: Pixels (T, B, 1).
        y: Classes (B,).
        gamma: Of all normalizations.
        form: ``"sum"``, h' = tanh(BN(W_h h + W_x x)), or ``"terms"``, h' = tanh(BN(W_h h) + BN(W_x x)).
        recurrent: W_h, ``"identity"`` or ``"orthogonal"``; the other matrices are orthogonal.
        noise: Standard deviation of the first h.
        hidden: Its size.
    """
    w_h, w_x, w_y = (x.new_empty(size) for size in ((hidden, hidden), (hidden, 1), (10, hidden)))
    for weight in (w_h, w_x, w_y):
        nn.init.orthogonal_(weight)
    if recurrent == "identity":
        nn.init.eye_(w_h)
    scale = x.new_full((hidden,), gamma)

    def normalize(a: Tensor) -> Tensor:
        return batch_norm(a, None, None, scale, training=True)

    h = noise * torch.randn(x.shape[1], hidden, dtype=x.dtype)
    h.requires_grad_()
    states = []
    for pixel in x:
        inside, outside = h @ w_h.T, pixel @ w_x.T
        h = torch.tanh(normalize(inside + outside) if form == "sum" else normalize(inside) + normalize(outside))
        states.append(h)
    gradients = torch.autograd.grad(cross_entropy(h @ w_y.T, y), states)
    return torch.stack([g.norm(dim=1).mean() for g in gradients])


def rows_of(order: str, form: str, recurrent: str, side: int, batches: int) -> list[dict[str, Any]]:
    """Mean and range of the batches, each of 100 images and with weights of its own, the same for all gammas."""
    part, rows = load(MNIST, side, order, (100 * batches, 100, 100))[0], []
    for gamma in GAMMAS:
        norms = []
        for seed, (x, y) in enumerate(part.batches(100)):
            torch.manual_seed(seed)
            norms.append(gradient_norms(x.double(), y, gamma, form, recurrent))
        found = torch.stack(norms)
        for step in range(side**2 - 1, -1, -EVERY)[::-1]:
            one = found[:, step]
            values = {"norm": one.mean(), "low": one.min(), "high": one.max()}
            key = {"order": order, "form": form, "recurrent": recurrent, "gamma": gamma, "step": step}
            rows.append(key | {name: float(f"{float(value):.3g}") for name, value in values.items()})
    return rows


@click.command()
@click.option("--batches", default=3, show_default=True, help="Of 100 images, each with weights of its own.")
@click.option("--quick", is_flag=True, help="14 by 14 pixels, one batch; writes nothing.")
@click.option("--plot", is_flag=True, help="Only draw gamma.png again, from the rows.")
def main(batches: int, quick: bool, plot: bool) -> None:
    """Write gamma.csv and draw gamma.png."""
    torch.set_num_threads(1)
    side, batches = (14, 1) if quick else (28, batches)
    cases = [(order, form, recurrent) for order in ORDERS for form in FORMS for recurrent in RECURRENT]
    rows: list[dict[str, Any]] = []
    for case in tqdm([] if plot else cases, desc="gamma", disable=None):
        rows += rows_of(*case, side, batches)
    if not quick and not plot:
        record = machine("cpu")
        write_rows(HERE / "gamma.csv", [row | (record if i == 0 else {}) for i, row in enumerate(rows)])
    frame = pd.DataFrame(rows) if quick else pd.read_csv(HERE / "gamma.csv")
    steps = sorted(set(frame.step))
    shown = frame[frame.step.isin([steps[0], steps[len(steps) // 2], steps[-10], steps[-1]])]
    table = shown.pivot_table("norm", ["order", "form", "recurrent", "gamma"], "step", sort=False)
    print(table.map(lambda norm: f"{norm:.0e}").to_string())
    if not quick:
        draw_gradients(frame, HERE / "gamma.png")


if __name__ == "__main__":
    main()
