"""The layers on a CUDA device: numbers, no waits, graphs, streams, large tensors. ``make gpu`` runs these."""

from typing import Any

import pytest
import torch
from scans import gradients, learning, linear_gradients, some_linear, some_scan
from torch import nn

from seqbatch.rnn import BNLSTM, LSTM, SRU, SequenceBatchNorm, cells, parallelize, reference
from seqbatch.rnn.checks import Scan
from seqbatch.rnn.linear_scan import linear_scan, linear_scan_reference
from seqbatch.rnn.ops import sru_scan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def to_device(scan: Scan) -> Scan:
    moved: list[Any] = [x.cuda() if isinstance(x, torch.Tensor) else x for x in scan]
    return Scan(*moved)


def run(scan: Scan) -> tuple[torch.Tensor, torch.Tensor]:
    return sru_scan(*scan[:5], **dict(zip(Scan._fields[5:-1], scan[5:-1], strict=True)))


SETTINGS = [  # each is compiled anew: few, so that all tests end within minutes
    ("plain", "v1", 3, False),
    ("flags", "v1", 3, True),
    ("flags", "v2", 3, True),
    ("flags", "v1", 4, False),
    ("flat", "v1", 3, True),
    ("flat", "v2", 4, False),
]


@pytest.mark.parametrize(("form", "version", "planes", "bidirectional"), SETTINGS)
@pytest.mark.parametrize("steps", [1, 70, 300])
def test_kernels_equal_the_reference(steps: int, form: str, version: str, planes: int, bidirectional: bool) -> None:
    """In float64: outputs, last state and all gradients; few columns, so that time is cut into chunks."""
    scan = some_scan(form, planes, version, bidirectional=bidirectional, steps=steps, width=70)
    scan = learning(to_device(scan))
    h, last = run(scan)
    expected_h, _, expected_last = reference.sru_scan(*scan[:-1])
    exact = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close((h, last), (expected_h, expected_last), **exact)
    torch.testing.assert_close(gradients(scan, h, last), gradients(scan, expected_h, expected_last), **exact)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_columns_in_lower_precision(version: str, dtype: torch.dtype) -> None:
    """Whole lanes, against the reference on the same device."""
    scan = learning(to_device(some_scan("flags", 3, version, steps=50, lanes=40, width=256, dtype=dtype)))
    h, last = run(scan)
    expected_h, _, expected_last = reference.sru_scan(*scan[:-1])
    rounding = max(torch.finfo(dtype).eps, 1e-5) * 2
    near = {"rtol": rounding, "atol": rounding}
    torch.testing.assert_close((h, last), (expected_h, expected_last), **near)
    for one, two in zip(gradients(scan, h, last), gradients(scan, expected_h, expected_last), strict=True):
        assert (one - two).abs().max() <= 20 * rounding * two.abs().max()  # sums over steps and lanes


@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_form_of_a_batch(bidirectional: bool) -> None:
    """Padded, flat and spliced on the device equal each sequence alone."""
    rnn = SRU(32, 32, 2, bidirectional=bidirectional, device="cuda", dtype=torch.float64)
    lengths = [40, 1, 300, 7, 90]
    xs = [torch.randn(n, 32, device="cuda", dtype=torch.float64) for n in lengths]
    alone = [rnn(x)[0] for x in xs]
    exact = {"rtol": 1e-10, "atol": 1e-10}
    flat = rnn(torch.cat(xs), cu_seqlens=torch.tensor([0, *lengths], device="cuda").cumsum(0))[0]
    torch.testing.assert_close(flat, torch.cat(alone), **exact)
    reset = torch.zeros(sum(lengths), 1, dtype=torch.bool, device="cuda")
    reset[[0, 40, 41, 341, 348]] = True
    torch.testing.assert_close(rnn(torch.cat(xs)[:, None], reset=reset)[0][:, 0], torch.cat(alone), **exact)
    mask = torch.arange(300, device="cuda")[:, None] < torch.tensor(lengths, device="cuda")
    padded = rnn(nn.utils.rnn.pad_sequence(xs), mask=mask)[0]
    torch.testing.assert_close(torch.cat([padded[:n, i] for i, n in enumerate(lengths)]), torch.cat(alone), **exact)


def test_no_call_waits_for_the_device_and_results_repeat() -> None:
    """Forward and backward, padded and flat; two runs give the same bits."""
    rnn = SRU(256, 256, 2, device="cuda")
    offsets = torch.tensor([0, 40, 40, 600], device="cuda", dtype=torch.int32)
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = [
        (torch.randn(60, 40, 256, device="cuda"), {"reset": torch.rand(60, 40, device="cuda") < 0.1}),
        (torch.randn(600, 256, device="cuda"), {"cu_seqlens": offsets}),
    ]
    for x, flags in calls:
        x.requires_grad_()
        results = []
        for turn in range(3):
            torch.cuda.set_sync_debug_mode("error" if turn else "default")
            try:
                output = rnn(x, **flags)[0]
                results.append(torch.autograd.grad(output.sum(), [x, *rnn.parameters()]))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(one, two) for one, two in zip(results[1], results[2], strict=True))


def test_bad_offsets_are_refused_on_the_host_side_of_shapes() -> None:
    """What shapes show is refused at once; values are the device's own assertion."""
    with pytest.raises(RuntimeError, match=r"offsets, got shape \(1, 2\)"):
        sru_scan(
            torch.zeros(9, 3, 4, device="cuda"),
            None,
            None,
            None,
            torch.zeros(1, 4, device="cuda"),
            cu_seqlens=torch.tensor([[0, 9]], device="cuda"),
        )


def test_a_cuda_graph_captures_training() -> None:
    """On a side stream, replayed with new input."""
    rnn = SRU(128, 128, 2, device="cuda")
    x = torch.randn(64, 32, 128, device="cuda", requires_grad=True)
    reset = torch.rand(64, 32, device="cuda") < 0.1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            rnn(x, reset=reset)[0].sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    rnn.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = rnn(x, reset=reset)[0]
        output.sum().backward()
    x.data.normal_()
    graph.replay()
    torch.cuda.synchronize()
    again = x.detach().clone().requires_grad_()
    expected = rnn(again, reset=reset)[0]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(x.grad, torch.autograd.grad(expected.sum(), again)[0])


def test_compiles_as_one_graph() -> None:
    rnn = SRU(64, 64, 2, device="cuda")
    compiled = torch.compile(rnn, fullgraph=True)
    x = torch.randn(20, 8, 64, device="cuda", requires_grad=True)
    reset = torch.rand(20, 8, device="cuda") < 0.1
    results = [torch.autograd.grad(call(x, reset=reset)[0].sum(), [x, *rnn.parameters()]) for call in (rnn, compiled)]
    torch.testing.assert_close(*results)


def test_more_than_two_to_the_31_elements() -> None:
    """The last lane of a large tensor equals itself alone."""
    steps, lanes, width = 4096, 180, 1024
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB")
    u = torch.randn(steps, lanes, 3, width, device="cuda", dtype=torch.bfloat16)
    assert u.numel() > 1 << 31
    initial = torch.zeros(lanes, width, device="cuda")
    h, last = sru_scan(u, None, None, None, initial)
    h_one, last_one = sru_scan(u[:, -1:].contiguous(), None, None, None, initial[-1:])
    torch.testing.assert_close(h[:, -1:], h_one)
    torch.testing.assert_close(last[-1:], last_one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_flush_and_hold_are_exact_on_cudnn(dtype: torch.dtype, bidirectional: bool) -> None:
    """Changing one piece moves no bit of another; padding gives exactly 0; equal to the loop."""
    rnn = LSTM(64, 64, 2, bidirectional=bidirectional, device="cuda", dtype=dtype)
    reset = torch.zeros(20, 4, dtype=torch.bool, device="cuda")
    reset[8, :2] = reset[15, 2] = True
    mask = torch.arange(20, device="cuda")[:, None] < torch.tensor([20, 20, 18, 12], device="cuda")
    results = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        x = torch.randn(20, 4, 64, device="cuda", dtype=dtype)
        x[:8, 0] *= scale
        x.requires_grad_()
        output, _ = rnn(x, reset=reset, mask=mask)
        assert not output[~mask].any()
        grad = torch.autograd.grad(output.sum(), x)[0]
        results.append((output[8:, 0], output[:, 1:], grad[8:, 0], grad[:, 1:]))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    zero = x.new_zeros(2 * (1 + bidirectional), 4, 64)
    expected = rnn._run_reference(x, reset, mask, (zero, zero))[0]
    rounding = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(output, expected, rtol=rounding, atol=rounding)


def test_autocast() -> None:
    rnn = SRU(64, 64, 2, device="cuda")
    x = torch.randn(20, 8, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        output, state = rnn(x)
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    output.float().sum().backward()
    torch.testing.assert_close(output.float(), rnn(x)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("settings", [{}, {"statistics": "age", "bidirectional": True}, {"variant": "bn1"}], ids=str)
@pytest.mark.parametrize("hidden", [5, 70])
def test_bnlstm_equals_the_cpu(settings: dict[str, Any], hidden: int) -> None:
    """In float64, with resets and holes: outputs, states, gradients and running statistics; more rows than a tile."""
    torch.manual_seed(0)
    here = BNLSTM(6, hidden, max_steps=12, dtype=torch.float64, **settings)
    there = BNLSTM(6, hidden, max_steps=12, dtype=torch.float64, **settings)
    there.load_state_dict(here.state_dict())
    there.cuda()
    x, reset, mask = torch.randn(15, 80, 6, dtype=torch.float64), torch.rand(15, 80) < 0.1, torch.rand(15, 80) < 0.9
    results = []
    for rnn, device in ((here, "cpu"), (there, "cuda")):
        leaf = x.to(device).requires_grad_()
        output, (h, c, *_) = rnn(leaf, reset=reset.to(device), mask=mask.to(device))
        weigh = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=device).view_as(output)
        grads = torch.autograd.grad((output * weigh).sum() + h.sum() + c.sum(), [leaf, *rnn.parameters()])
        results.append([t.cpu() for t in (output, h, c, *grads, *rnn.buffers())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("statistics", ["frame", "sequence", "age"])
def test_sequence_batch_norm_equals_the_cpu(statistics: Any) -> None:
    x, mask = torch.randn(30, 50, 33, dtype=torch.float64), torch.rand(30, 50) < 0.7
    results = []
    for device in ("cpu", "cuda"):
        norm = SequenceBatchNorm(33, 20, statistics, dtype=torch.float64, device=device)
        leaf = x.to(device).requires_grad_()
        y = norm(leaf, mask=mask.to(device))
        weigh = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=device).view_as(y)
        grads = torch.autograd.grad((y * weigh).sum(), [leaf, *norm.parameters()])
        results.append([t.cpu() for t in (y, *grads, *norm.buffers())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(0, 2, 3), (3, 0, 2), (1, 1, 1), (70, 5, 70), (33, 40, 256)], ids=str)
def test_linear_scan_equals_the_reference(sizes: tuple[int, int, int], dtype: torch.dtype, flagged: bool) -> None:
    """Outputs and gradients, without a wait for the device."""
    tensors, flags = some_linear(*sizes, dtype, flagged, flagged)
    tensors = [x.detach().cuda().requires_grad_() for x in tensors]
    flags = {name: x.cuda() for name, x in flags.items()}
    expected = linear_scan_reference(*tensors, **flags)
    expected = (*expected, *linear_gradients(tensors, *expected))
    linear_scan(*tensors, **flags)[1].sum().backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = linear_scan(*tensors, **flags)
        sums = torch.autograd.grad(found[0].sum() + found[1].sum(), tensors, retain_graph=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in sums)
    for one, two in zip((*found, *linear_gradients(tensors, *found)), expected, strict=True):
        rounding = 1e-10 if dtype == torch.float64 else max(2 * torch.finfo(two.dtype).eps, 1e-5)
        torch.testing.assert_close(one, two, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("kind", [k for k in cells.__all__ if k != "Cell"])
def test_a_parallelized_cell_equals_the_cpu(kind: str) -> None:
    """In float64, with resets and padding: outputs, states and gradients; programs there, torch and scans here."""
    torch.manual_seed(0)
    cell = getattr(cells, kind)(5, 70).double()
    layer = parallelize(cell, example=cell.example())
    x, reset, mask = torch.randn(9, 33, 5, dtype=torch.float64), torch.rand(9, 33) < 0.2, torch.rand(9, 33) < 0.8
    results = []
    for device in ("cpu", "cuda"):
        layer.to(device)
        leaf = x.to(device).requires_grad_()
        output, states = layer(leaf, reset=reset.to(device), mask=mask.to(device))
        weigh = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=device).view_as(output)
        total = (output * weigh).sum() + sum(state.sum() for state in states)
        grads = torch.autograd.grad(total, [leaf, *layer.parameters()])
        results.append([t.detach().cpu() for t in (output, *states, *grads)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
