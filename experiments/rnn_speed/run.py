"""How fast the recurrent layers are, against what they must do at least; see README.md beside this file.

python -m experiments.rnn_speed.run [--device cpu|cuda] [--quick]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from experiments.common import write_rows
from seqbatch.measure import environment
from seqbatch.rnn import LSTM, SRU
from seqbatch.rnn.ops import sru_scan

HERE = Path(__file__).parent
Job = Callable[[], object]
SHAPES = {"cpu": [(128, 32, 512)], "cuda": [(512, 32, 512), (2048, 8, 1024)]}
TOKENS, LANES = 131_072, 64  # of the flat stream, and of the same tokens as a batch
AHEAD_OF_NOTHING = {"forward": (1, 1), "backward": (1, 1), "combine": (8, 8)}

# (job, what it is measured against, most or least ratio): the bars; "+" adds medians.
BARS = {
    "cpu": [
        ("sru v1 {}", "gemm {}", {"forward": 1.3, "both": 1.25}),
        ("sru v2 {}", "gemm {}", {"forward": 1.3, "both": 1.25}),
        ("nn.LSTM {}", "sru v1 {}", -2.7),
        ("nn.LSTM {}", "sru v2 {}", -2.7),
        ("sru v2 flags {}", "sru v2 {}", 1.05),
        ("lstm resets {}", "nn.LSTM with as many steps {}", 1.15),
        ("nn.LSTM packed {}", "lstm ragged {}", {"both": -3.0}),
    ],
    "cuda": [
        ("scan v1 {}", "bytes of scan {}", 1.4),
        ("scan v2 {}", "bytes of scan {}", 1.4),
        ("one step at a time {}", "scan v2 {}", -1.0),
        ("nn.LSTM {}", "sru v2 {}", -10.0),
        ("sru v2 {}", "gemm {}+bytes of scan {}", 1.35),
        ("sru v2 {}", "conv1d {}", 1.0),
        ("sru v2 resets {}", "sru v2 {}", 1.03),
        ("lstm resets {}", "nn.LSTM with as many steps {}", 1.05),
        ("stream of one {}", "stream of batch {}", 1.3),
        ("stream of many {}", "stream of batch {}", 1.3),
    ],
}


class Timer:
    """Seconds of a job: CPU time of the process on one thread, or between two events of a stream."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __call__(self, job: Job) -> float:
        if not self.cuda:
            begin = time.process_time()
            job()
            return time.process_time() - begin
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        job()  # keeps the queue filled, so that launches are not measured
        begin.record()
        for _ in range(5):
            job()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 5e3


def training(module: nn.Module, x: Any, **flags: Any) -> Job:
    """Forward and backward with gradients for the input and the parameters, made anew each time."""
    leaf = x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x
    leaf.requires_grad_()
    grad: list[Tensor] = []

    def job() -> None:
        module.zero_grad(set_to_none=True)
        leaf.grad = None
        out = module(x, **flags)
        out = out[0] if isinstance(out, tuple) and not isinstance(out, nn.utils.rnn.PackedSequence) else out
        out = out.data if isinstance(out, nn.utils.rnn.PackedSequence) else out
        if not grad:
            grad.append(torch.randn_like(out))
        out.backward(grad[0])

    return job


def inference(module: nn.Module, x: Any, **flags: Any) -> Job:
    """Forward alone, without gradients."""

    def job() -> None:
        with torch.no_grad():
            module(x, **flags)

    return job


def gemms(x: Tensor, columns: int) -> dict[str, Job]:
    """The layer's bare matrix products, outputs allocated before: one forward, two more backward."""
    rows, weight = x.detach().flatten(0, 1), torch.randn(columns, x.shape[-1], device=x.device, dtype=x.dtype)
    u, d_weight, d_rows = rows.new_empty(len(rows), columns), torch.empty_like(weight), torch.empty_like(rows)

    def forward() -> None:
        torch.mm(rows, weight.T, out=u)

    def both() -> None:
        forward()
        torch.mm(u.T, rows, out=d_weight)
        torch.mm(u, weight, out=d_rows)

    return {"gemm forward": forward, "gemm both": both}


class Conv(nn.Module):
    """A convolution over time of width 3 with as many channels, the weights in the layout it likes best."""

    def __init__(self, width: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1, **factory)

    def forward(self, x: Tensor) -> Tensor:  # x: (B, D, T)
        out: Tensor = self.conv(x)
        return out


def layer_jobs(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> dict[str, Job]:
    """Every layer of one shape: forward and both."""
    steps, lanes, width = shape
    torch.manual_seed(0)
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    x = torch.randn(shape, **factory)
    reset = torch.rand(steps, lanes, device=device) < 0.03
    inserted = int(reset[1:].sum(0).max())
    mask = torch.arange(steps, device=device)[:, None] < torch.randint(steps - 8, steps + 1, (lanes,), device=device)
    # lengths of 64 % of the longest in the mean, as in many sorted-in-pools batches
    lengths = torch.linspace(0.28, 1.0, lanes).mul(steps).round().long()[torch.randperm(lanes)]
    ragged = torch.arange(steps, device=device)[:, None] < lengths.to(device)
    stock, ours = nn.LSTM(width, width, **factory), LSTM(width, width, **factory)
    v1, v2 = SRU(width, width, version="v1", **factory), SRU(width, width, **factory)
    longer = torch.randn(steps + inserted, lanes, width, **factory)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    calls: dict[str, tuple[nn.Module, Any, dict[str, Any]]] = {
        "nn.LSTM": (stock, x, {}),
        "sru v1": (v1, x, {}),
        "sru v2": (v2, x, {}),
        "sru v2 resets": (v2, x, {"reset": reset}),
        "sru v2 flags": (v2, x, {"reset": reset, "mask": mask}),
        "conv1d": (Conv(width, **factory), torch.randn(lanes, width, steps, **factory), {}),
        "nn.LSTM with as many steps": (stock, longer, {}),
        "lstm resets": (ours, x, {"reset": reset}),
        "lstm ragged": (ours, x, {"mask": ragged}),
        "nn.LSTM packed": (stock, packed, {}),
    }
    jobs = gemms(x, 3 * width)
    for name, (module, given, flags) in calls.items():
        own = given if isinstance(given, nn.utils.rnn.PackedSequence) else given.clone()
        jobs[f"{name} forward"] = inference(module, own, **flags)
        jobs[f"{name} both"] = training(module, own, **flags)
    return jobs


def scan_jobs(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> dict[str, Job]:
    """The recurrence alone, and a copy of as many bytes as it must move."""
    steps, lanes, width = shape
    u = torch.randn(steps, lanes, 3, width, device=device, dtype=dtype)
    x = torch.randn(shape, device=device, dtype=dtype)
    weight_c, bias = (torch.randn(2, width, device=device) for _ in range(2))
    initial, grad = torch.zeros(lanes, width, device=device), torch.randn_like(x)
    jobs: dict[str, Job] = {}
    for version, v in (("v1", None), ("v2", weight_c)):

        def run(v: Tensor | None = v) -> Tensor:
            return sru_scan(u, x, v, bias, initial, activation="identity")[0]

        leaves = [t.requires_grad_() for t in (u, x)]
        kept = run()

        def again(kept: Tensor = kept, leaves: list[Tensor] = leaves) -> object:
            return torch.autograd.grad(kept, leaves, grad, retain_graph=True)

        def forward(run: Job = run) -> object:
            with torch.no_grad():
                return run()

        jobs |= {f"scan {version} forward": forward, f"scan {version} backward": again}
        if device == "cuda" and version == "v2":
            jobs["one step at a time forward"] = one_step_at_a_time(forward)
            jobs["one step at a time backward"] = one_step_at_a_time(again)
    size = dtype.itemsize
    for direction, moved in (("forward", 5 * size + 4), ("backward", 9 * size + 4)):
        source = torch.empty(x.numel() * moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        jobs[f"bytes of scan {direction}"] = lambda source=source, target=target: target.copy_(source)  # type: ignore[misc]
    return jobs


def one_step_at_a_time(job: Job) -> Job:
    """The same kernel without loads ahead: a thread walks its column as the published kernel does."""
    from seqbatch.rnn import cuda

    def slowly() -> object:
        ahead, cuda.AHEAD = cuda.AHEAD, AHEAD_OF_NOTHING  # type: ignore[assignment]
        try:
            return job()
        finally:
            cuda.AHEAD = ahead

    return slowly


def stream_jobs(width: int, device: str, dtype: torch.dtype) -> dict[str, Job]:
    """One flat stream of many tokens, in one sequence and in many, against the same tokens as a batch."""
    jobs: dict[str, Job] = {}
    module = SRU(width, width, version="v1", device=device, dtype=dtype)
    flat, batch = (torch.randn(*s, device=device, dtype=dtype) for s in ((TOKENS,), (TOKENS // LANES, LANES)))
    flat, batch = (x[..., None].expand(*x.shape, width).contiguous() for x in (flat, batch))
    whole = torch.tensor([0, TOKENS], device=device, dtype=torch.int32)
    cut = torch.arange(0, TOKENS + 1, 512, device=device, dtype=torch.int32)
    for name, x, flags in (("one", flat, whole), ("many", flat, cut), ("batch", batch, None)):
        jobs[f"stream of {name} both"] = training(module, x, **({} if flags is None else {"cu_seqlens": flags}))
    return jobs


def measure(jobs: dict[str, Job], device: str, turns: int) -> dict[str, list[float]]:
    """Seconds of each job, in turns; the first turn, which compiles and warms up, is not counted."""
    timer, found = Timer(device), {name: [] for name in jobs}  # type: dict[str, list[float]]
    for turn in range(turns + 1):
        for name, job in jobs.items():
            seconds = timer(job)
            if turn:
                found[name].append(seconds)
    return found


def judged(found: dict[str, list[float]], device: str) -> list[dict[str, object]]:
    """A row for each job, and one for each bar: the median of the ratios turn by turn."""
    rows: list[dict[str, object]] = []
    for name, seconds in found.items():
        ms = [1e3 * s for s in (statistics.median(seconds), min(seconds), max(seconds))]
        rows.append({"job": name} | dict(zip(("ms", "low", "high"), (round(m, 4) for m in ms), strict=True)))
    for job, base, bar in BARS[device]:
        for direction in ("forward", "backward", "both"):
            parts = [part.format(direction) for part in base.split("+")]
            if "gemm" in base and "+" in base and direction == "both":
                parts = ["gemm both", "bytes of scan forward", "bytes of scan backward"]
            limit = bar.get(direction) if isinstance(bar, dict) else bar
            if limit is None or any(part not in found for part in (job.format(direction), *parts)):
                continue
            turns = zip(found[job.format(direction)], *(found[part] for part in parts), strict=True)
            ratios = [mine / sum(theirs) for mine, *theirs in turns]
            ratio = statistics.median(ratios)
            rows.append(
                {
                    "job": job.format(direction),
                    "against": " + ".join(parts),
                    "ratio": round(ratio, 3),
                    "ratio_low": round(min(ratios), 3),
                    "ratio_high": round(max(ratios), 3),
                    "bar": f"{'at least' if limit < 0 else 'at most'} {abs(limit)}",
                    "reached": ratio >= -limit if limit < 0 else ratio <= limit,
                }
            )
    return rows


def main() -> None:
    """Measure every shape and write a row for each job and each bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="three turns, nothing written")
    arguments = parser.parse_args()
    device, turns = arguments.device, 3 if arguments.quick else 15
    torch.set_num_threads(1)
    record = environment() | {"torch": torch.__version__}
    if device == "cuda":
        import triton

        record |= {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
    rows: list[dict[str, object]] = []
    for shape in SHAPES[device]:
        for dtype in (torch.float32,) if device == "cpu" else (torch.bfloat16, torch.float32):
            jobs = scan_jobs(shape, device, dtype)
            if device == "cpu" or dtype == torch.bfloat16:
                jobs |= layer_jobs(shape, device, dtype)
            setting = {"steps": shape[0], "lanes": shape[1], "width": shape[2], "dtype": str(dtype).split(".")[1]}
            rows += [setting | row for row in judged(measure(jobs, device, turns), device)]
    if device == "cuda":
        found = measure(stream_jobs(512, device, torch.bfloat16), device, turns)
        rows += [{"steps": TOKENS, "width": 512, "dtype": "bfloat16"} | row for row in judged(found, device)]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    if not arguments.quick:
        name = "cpu" if device == "cpu" else record["device"].replace(" ", "-").lower()
        write_rows(HERE / f"results-{name}.csv", [record | row for row in rows])


if __name__ == "__main__":
    main()
