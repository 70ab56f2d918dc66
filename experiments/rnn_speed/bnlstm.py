"""How fast batch-normalized LSTM and masked statistics are; see README.md beside this file.

python -m experiments.rnn_speed.bnlstm [--device cpu|cuda] [--quick]
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from tqdm import tqdm

from experiments.common import write_rows
from experiments.rnn_speed.run import Job, Timer, inference, training
from seqbatch.measure import environment
from seqbatch.rnn import BNLSTM, SequenceBatchNorm

HERE = Path(__file__).parent
SHAPES = {"cpu": [(128, 32, 512), (196, 64, 100)], "cuda": [(128, 64, 512), (512, 32, 512), (180, 128, 2000)]}
WIDE = 512  # units from which the bars are meant
ROWS, FEATURES = (8_192, 16_384), 512  # of the batches for masked statistics; 64 % of their rows are real

# job, what it is measured against, the bar: at most, or if negative at least; None: reported only. For WIDE alone.
BARS: list[tuple[str, str, dict[str, float | None]]] = [
    ("BNLSTM {}", "nn.LSTM {}", {"cpu": 1.35, "cuda": 3.0}),
    ("loop {}", "BNLSTM {}", {"cpu": -1.5, "cuda": None}),
    ("loop, input product hoisted {}", "BNLSTM {}", {"cpu": -1.15, "cuda": None}),
    ("SequenceBatchNorm, masked {}", "nn.BatchNorm1d on the real rows {}", {"cpu": 1.5, "cuda": None}),
]


class StepLoop(nn.Module):
    """The equations of BN-LSTM as one writes them in PyTorch: a loop over time steps of its modules' operations."""

    def __init__(self, width: int, hoisted: bool, **factory: Any) -> None:
        super().__init__()
        self.hoisted, self.width = hoisted, width
        self.weight_ih = nn.Parameter(nn.init.orthogonal_(torch.empty(4 * width, width, **factory)))
        self.weight_hh = nn.Parameter(nn.init.orthogonal_(torch.empty(4 * width, width, **factory)))
        self.bias = nn.Parameter(torch.zeros(4 * width, **factory))
        self.gamma_x, self.gamma_h = (nn.Parameter(torch.full((4 * width,), 0.1, **factory)) for _ in range(2))
        self.gamma_c = nn.Parameter(torch.full((width,), 0.1, **factory))
        self.beta_c = nn.Parameter(torch.zeros(width, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, D) -> (T, B, D)."""
        batch_norm = nn.functional.batch_norm
        h = c = x.new_zeros(x.shape[1], self.width)
        products = linear(x, self.weight_ih).unbind() if self.hoisted else None
        outputs = []
        for t in range(len(x)):
            a = linear(x[t], self.weight_ih) if products is None else products[t]
            z = batch_norm(a, None, None, self.gamma_x, self.bias, training=True)
            z = z + batch_norm(linear(h, self.weight_hh), None, None, self.gamma_h, training=True)
            i, f, g, o = z.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(batch_norm(c, None, None, self.gamma_c, self.beta_c, training=True))
            outputs.append(h)
        return torch.stack(outputs)


def layers(shape: tuple[int, int, int], device: str) -> dict[str, Job]:
    """Forward in training and both, of each layer."""
    steps, _, width = shape
    torch.manual_seed(0)
    factory: dict[str, Any] = {"device": device}
    modules = {
        "nn.LSTM": nn.LSTM(width, width, **factory),
        "BNLSTM": BNLSTM(width, width, max_steps=steps, **factory),
        "loop": StepLoop(width, False, **factory),
        "loop, input product hoisted": StepLoop(width, True, **factory),
    }
    x = torch.randn(shape, **factory)
    jobs = {f"{name} forward": inference(module, x.clone()) for name, module in modules.items()}
    return jobs | {f"{name} both": training(module, x.clone()) for name, module in modules.items()}


def norms(rows: int, device: str) -> dict[str, Job]:
    """Statistics over the real steps of a padded batch, and torch's over as many rows without padding."""
    x = torch.randn(rows // 64, 64, FEATURES, device=device)
    mask = (
        torch.arange(len(x), device=device)[:, None] < torch.linspace(0.28, 1.0, 64, device=device).mul(len(x)).long()
    )
    ours, stock = SequenceBatchNorm(FEATURES, device=device), nn.BatchNorm1d(FEATURES, device=device)
    real = x[mask].clone()
    return {
        "SequenceBatchNorm, masked forward": inference(ours, x.clone(), mask=mask),
        "nn.BatchNorm1d on the real rows forward": inference(stock, real.clone()),
        "SequenceBatchNorm, masked both": training(ours, x.clone(), mask=mask),
        "nn.BatchNorm1d on the real rows both": training(stock, real.clone()),
    }


def rows_of(found: dict[str, list[float]], device: str, width: int) -> list[dict[str, object]]:
    """A row for each job, and one for each bar: the median of the ratios turn by turn."""
    rows: list[dict[str, object]] = []
    for name, seconds in found.items():
        ms = [round(1e3 * s, 3) for s in (statistics.median(seconds), min(seconds), max(seconds))]
        rows.append({"job": name} | dict(zip(("ms", "low", "high"), ms, strict=True)))
    for job, base, bars in BARS:
        for direction in ("forward", "both"):
            mine, theirs = found.get(job.format(direction)), found.get(base.format(direction))
            if mine is None or theirs is None:
                continue
            ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
            ratio, bar = statistics.median(ratios), bars[device] if direction == "both" and width >= WIDE else None
            row: dict[str, object] = {"job": job.format(direction), "against": base.format(direction)}
            row |= {"ratio": round(ratio, 3), "ratio_low": round(min(ratios), 3), "ratio_high": round(max(ratios), 3)}
            if bar is not None:
                row |= {"bar": f"{'at least' if bar < 0 else 'at most'} {abs(bar)}"}
                row |= {"reached": ratio >= -bar if bar < 0 else ratio <= bar}
            rows.append(row)
    return rows


def main() -> None:
    """Measure every shape and write a row for each job and each bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two turns, nothing written")
    arguments = parser.parse_args()
    device, turns = arguments.device, 2 if arguments.quick else 9
    torch.set_num_threads(1)
    record = environment() | {"torch": torch.__version__}
    if device == "cuda":
        record |= {"device": torch.cuda.get_device_name()}
    results: list[dict[str, object]] = []
    cases = [({"steps": s[0], "lanes": s[1], "width": s[2]}, layers(s, device)) for s in SHAPES[device]]
    cases += [({"steps": rows // 64, "lanes": 64, "width": FEATURES}, norms(rows, device)) for rows in ROWS]
    for setting, jobs in cases:
        timer, found = Timer(device), {name: [] for name in jobs}  # type: dict[str, list[float]]
        for turn in tqdm(range(turns + 1), desc=str(setting), disable=None):
            for name, job in jobs.items():
                seconds = timer(job)
                if turn:  # the first compiles and warms up
                    found[name].append(seconds)
        some = [setting | row for row in rows_of(found, device, setting["width"])]
        results += some
        for row in some:
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if not arguments.quick:
        name = "cpu" if device == "cpu" else record["device"].replace(" ", "-").lower()
        write_rows(HERE / f"bnlstm-{name}.csv", [record | row for row in results])


if __name__ == "__main__":
    main()
