"""SequenceBatchNorm, MaskedBatchNorm1d and the population's statistics, against plain loops over groups."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqbatch.rnn import MaskedBatchNorm1d, SequenceBatchNorm, estimate_population, norm_reference
from seqbatch.rnn.norm_ops import _normalize, batch_norm_groups

EXACT = {"rtol": 1e-10, "atol": 1e-10}
F64 = torch.float64


def some_batch(seed: int = 0, steps: int = 9, lanes: int = 6, width: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, resets and a mask with holes; NaN stands on padding."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, lanes, width, generator=g, dtype=F64) * 3 + 5
    reset, mask = torch.rand(steps, lanes, generator=g) < 0.25, torch.rand(steps, lanes, generator=g) < 0.8
    return torch.where(mask[..., None], x, float("nan")), reset, mask


def make(statistics: str, width: int = 3, **settings: Any) -> SequenceBatchNorm:
    norm = SequenceBatchNorm(width, 12, statistics, dtype=F64, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, width))
        if norm.bias is not None:
            norm.bias.copy_(torch.linspace(-1, 1, width))
    return norm


def naive_groups(statistics: str, reset: Tensor, mask: Tensor, max_steps: int = 12) -> dict[int, list[tuple[int, int]]]:
    """The rows of each group, by walking each lane."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for b in range(mask.shape[1]):
        count = age = 0
        for t in range(mask.shape[0]):
            age = 0 if reset[t, b] else age
            if mask[t, b]:
                key = {"frame": count, "sequence": 0, "age": min(age, max_steps - 1)}[statistics]
                groups.setdefault(key, []).append((t, b))
                count, age = count + 1, age + 1
    return dict(sorted(groups.items()))


def naive(norm: SequenceBatchNorm, x: Tensor, groups: dict[int, list[tuple[int, int]]]) -> Tensor:
    """Group by group; a small group takes the statistics of the last one that was not."""
    y, mean, var = torch.zeros_like(x), None, None
    for members in groups.values():
        t, b = (torch.tensor(i) for i in zip(*members, strict=True))
        rows = x[t, b]
        if len(members) >= norm.min_rows:
            mean, var = rows.mean(0), rows.var(0, unbiased=False)
        assert mean is not None and var is not None
        bias = 0 if norm.bias is None else norm.bias
        y = y.index_put((t, b), norm.weight * (rows - mean) / (var + norm.eps).sqrt() + bias)
    return y


@pytest.mark.parametrize("statistics", ["frame", "sequence", "age"])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients(statistics: str, bias: bool) -> None:
    """Against the loop, late groups of too few rows included; NaN on padding goes nowhere."""
    x, reset, mask = some_batch()
    norm = make(statistics, bias=bias)
    groups = naive_groups(statistics, reset, mask)
    assert statistics == "sequence" or min(map(len, groups.values())) < norm.min_rows
    x.requires_grad_()
    expected = naive(norm, x, groups)
    found = norm(x, reset=reset, mask=mask)
    torch.testing.assert_close(found, expected, **EXACT)
    weigh = torch.randn_like(x)
    wanted = [x, *norm.parameters()]
    one, two = (torch.autograd.grad(y, wanted, weigh) for y in (found, expected))
    torch.testing.assert_close(one[1:], two[1:], **EXACT)
    torch.testing.assert_close(one[0][mask], two[0][mask], **EXACT)
    assert not one[0][~mask].any()


@settings(max_examples=25)
@given(seed=st.integers(0, 2**20), statistics=st.sampled_from(["frame", "sequence", "age"]), train=st.booleans())
def test_padding_and_the_order_of_lanes_change_nothing(seed: int, statistics: str, train: bool) -> None:
    """More padding anywhere and lanes of padding: to the bit. Other orders of lanes: to rounding."""
    x, reset, mask = some_batch(seed)
    reset[:, :4] &= torch.arange(9)[:, None] == 0  # enough rows at the first ages
    mask[0] = True
    x[0] = x[0].nan_to_num(1.0)
    g = torch.Generator().manual_seed(seed)

    def run(x: Tensor, reset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        norm = make(statistics)
        norm(x, reset=reset, mask=mask)
        norm.train(train)
        x = x.clone().requires_grad_()
        y = norm(x, reset=reset, mask=mask)
        weigh = torch.linspace(-1, 1, int(mask.sum()) * x.shape[2], dtype=F64).view(-1, x.shape[2])
        # weights by lane and step, whatever padding there is: real rows in the order lane, step
        (y.transpose(0, 1)[mask.T] * weigh).sum().backward()
        assert x.grad is not None
        return y.transpose(0, 1)[mask.T], x.grad.transpose(0, 1)[mask.T], [b.clone() for b in norm.buffers()]

    rows = torch.randint(0, 10, (3,), generator=g).sort(descending=True).values.tolist()
    wide = [
        torch.cat([t, t[:, :1].to(t.dtype) * 0 if t.dtype == F64 else torch.zeros_like(t[:, :1])], 1)
        for t in (x, reset, mask)
    ]
    wide[0][:, -1] = 7.0
    for at in rows:
        filler = (
            torch.full_like(wide[0][:1], float("inf")),
            torch.zeros_like(wide[1][:1]),
            torch.zeros_like(wide[2][:1]),
        )
        wide = [torch.cat([t[:at], f, t[at:]]) for t, f in zip(wide, filler, strict=True)]
    torch.testing.assert_close(run(*wide), run(x, reset, mask), rtol=0, atol=0)
    order = torch.randperm(6, generator=g)
    y, _, buffers = run(x[:, order], reset[:, order], mask[:, order])
    whole, expected = torch.zeros(6, 9, 3, dtype=F64), run(x, reset, mask)
    again = whole.clone()
    whole[mask.T], again[mask[:, order].T] = expected[0], y
    torch.testing.assert_close(again, whole[order], **EXACT)
    torch.testing.assert_close(buffers, expected[2], **EXACT)


@pytest.mark.parametrize("form", ["batch_first", "flat", "packed", "unbatched"])
def test_every_form_of_a_batch(form: str) -> None:
    x, _, _ = some_batch()
    lengths = torch.tensor([9, 3, 7, 7, 1, 8])
    mask = torch.arange(9)[:, None] < lengths
    x = torch.where(mask[..., None], x.nan_to_num(0.5), 0.0)
    expected = make("frame")(x, mask=mask)
    if form == "batch_first":
        found = make("frame", batch_first=True)(x.transpose(0, 1), mask=mask.T).transpose(0, 1)
    elif form == "flat":
        flat = x.transpose(0, 1)[mask.T]
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        found = torch.zeros_like(expected).transpose(0, 1)
        found[mask.T] = make("frame")(flat, cu_seqlens=cu_seqlens)
        found = found.transpose(0, 1)
    elif form == "packed":
        found, _ = pad_packed_sequence(make("frame")(pack_padded_sequence(x, lengths, enforce_sorted=False)))
    else:
        expected, found = make("sequence")(x[:, :1]), make("sequence")(x[:, 0])[:, None]
    torch.testing.assert_close(found, expected, **EXACT)


def test_running_statistics() -> None:
    """The mean of the first batches, then exponential; each step its own; beyond the last step that was seen, its."""
    norm = make("frame", momentum=0.4)
    batches = [torch.randn(t, 5, 3, dtype=F64) for t in (4, 4, 2, 4)]
    mean, var, seen = torch.zeros(12, 3, dtype=F64), torch.ones(12, 3, dtype=F64), [0] * 12
    for x in batches:
        norm(x)
        for t in range(len(x)):
            rate = max(0.4, 1 / (seen[t] + 1))
            mean[t] += rate * (x[t].mean(0) - mean[t])
            var[t] += rate * (x[t].var(0, unbiased=False) - var[t])
            seen[t] += 1
    torch.testing.assert_close((norm.running_mean, norm.running_var), (mean, var), **EXACT)
    assert norm.num_batches_tracked.tolist() == seen
    x = torch.randn(20, 2, 3, dtype=F64)
    at = torch.arange(20).clamp(max=3)
    expected = norm.weight * (x - mean[at][:, None]) / (var[at][:, None] + norm.eps).sqrt() + norm.bias
    torch.testing.assert_close(norm.eval()(x), expected, **EXACT)


def test_longer_than_max_steps() -> None:
    """Every step has statistics of its own in training; the last running ones are the mean over what lies beyond."""
    norm = SequenceBatchNorm(2, 3, "frame", dtype=F64)
    x = torch.randn(6, 5, 2, dtype=F64)
    torch.testing.assert_close(norm(x)[5].std(0, unbiased=False), torch.full((2,), 0.1, dtype=F64), rtol=1e-4, atol=0)
    torch.testing.assert_close(norm.running_mean[2], x[2:].mean((0, 1)), **EXACT)


def test_too_few_rows_take_running_statistics_where_no_group_before_has_enough() -> None:
    norm = make("frame")
    full, thin = torch.randn(3, 4, 3, dtype=F64), torch.randn(3, 3, 3, dtype=F64)
    norm(full)
    before = norm.running_mean.clone()
    torch.testing.assert_close(norm(thin), norm.eval()(thin), **EXACT)
    assert torch.equal(norm.running_mean, before)


def test_estimate_population() -> None:
    """Training's output of a batch is evaluation's after a pass over it; passes weigh batches by rows."""
    x, reset, mask = some_batch()
    model = nn.Sequential(nn.Linear(3, 3, dtype=F64), nn.Dropout(0.5))
    norm = make("age")
    model.append(norm)
    model[1].train(False)

    def run(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
        return norm(model[1](model[0](batch[0].nan_to_num(0.0))), reset=batch[1], mask=batch[2])

    norm(torch.randn(12, 7, 3, dtype=F64))  # old statistics, which must not matter
    assert estimate_population(model, [(x, reset, mask)], run) == 1
    assert norm.training and not model[1].training
    expected = run(model.eval(), (x, reset, mask))
    small = min(map(len, naive_groups("age", reset, mask).values())) < norm.min_rows
    assert small  # the rows that borrow are equal too: evaluation's last step that was seen is training's last group
    norm.train()  # and the dropout not
    torch.testing.assert_close(run(model, (x, reset, mask)), expected, **EXACT)
    other = SequenceBatchNorm(3, dtype=F64)
    one, two = torch.randn(4, 5, 3, dtype=F64), torch.randn(2, 5, 3, dtype=F64)
    estimate_population(other, [one, two])
    torch.testing.assert_close(other.running_mean[0], torch.cat([one, two]).mean((0, 1)), **EXACT)
    assert other.num_batches_tracked.tolist() == [2]


def test_a_pass_that_fails_leaves_the_old_statistics() -> None:
    norm = make("frame")
    norm(torch.randn(3, 5, 3, dtype=F64))
    before = [b.clone() for b in norm.buffers()]

    def batches() -> Any:
        yield torch.randn(3, 5, 3, dtype=F64)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        estimate_population(norm, batches())
    assert all(map(torch.equal, before, norm.buffers())) and norm.training
    with pytest.raises(ValueError, match="no batch"):
        estimate_population(norm, [])
    with pytest.raises(ValueError, match="nothing to estimate"):
        estimate_population(nn.Linear(2, 2), [])


def test_a_pass_uses_the_old_statistics_until_it_ends() -> None:
    """The order of batches does not matter, also where one has too few rows."""
    few, many = torch.randn(3, 2, 3, dtype=F64), torch.randn(3, 8, 3, dtype=F64)
    found = []
    for batches in ([few, many], [many, few]):
        norm = make("frame")
        norm(many + 1)
        estimate_population(norm, batches)
        found.append([b.clone() for b in norm.buffers()])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    torch.testing.assert_close(found[0][0][:3], many.mean(1), **EXACT)

    def nested(norm: Any, batch: Tensor) -> None:
        estimate_population(norm, [batch])

    with pytest.raises(RuntimeError, match="being estimated already"):
        estimate_population(norm, [many], nested)


def test_gradients_of_equal_rows() -> None:
    """None with their own statistics; with others', the derivative of the formula."""
    x = torch.full((6, 2), 3.0, dtype=F64, requires_grad=True)
    zero, one = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64, requires_grad=True)
    given = torch.zeros(2, 2, dtype=F64)
    group, source = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, -1])
    y, *_ = batch_norm_groups(x, group, source, given, given, one, zero)
    expected, *_ = norm_reference.normalize(x, group, source, given, given, one, zero)
    for result in (y, expected):
        grad, slope = torch.autograd.grad(result.sum(), [x, one])
        assert not grad[:4].any()
        torch.testing.assert_close(grad[4:], torch.full((2, 2), 1e-5**-0.5, dtype=F64), **EXACT)
        torch.testing.assert_close(slope, torch.full((2,), 6 * 1e-5**-0.5, dtype=F64), **EXACT)


def test_running_statistics_stay_wide() -> None:
    norm = SequenceBatchNorm(2).half()
    norm(torch.randn(70_000, 1, 2).half())
    assert norm.running_mean.dtype == torch.float32 and norm.running_var.isfinite().all()


def test_zero_variance_has_finite_gradients() -> None:
    x = torch.zeros(4, 8, 3, requires_grad=True)
    norm = SequenceBatchNorm(3, 4, "frame")
    norm(x).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_only_padding() -> None:
    norm = make("frame")
    x = torch.full((3, 2, 3), float("nan"), dtype=F64, requires_grad=True)
    y = norm(x, mask=torch.zeros(3, 2, dtype=torch.bool))
    assert torch.equal(y, torch.zeros_like(y)) and not norm.num_batches_tracked.any()
    y.sum().backward()
    assert not x.grad.any()  # type: ignore[union-attr]
    assert make("sequence")(torch.zeros(3, 0, 3, dtype=F64)).shape == (3, 0, 3)
    masked = MaskedBatchNorm1d(3)
    masked(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.bool)).sum().backward()  # every parameter has a gradient
    assert masked.weight.grad is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statistics": "time"}, "statistics must be one of frame, sequence, age, got 'time'"),
        ({"statistics": "frame", "max_steps": 0}, "max_steps must be an integer of 1 or more"),
        ({"statistics": "frame"}, "'frame' statistics need max_steps"),
        ({"min_rows": 1}, "min_rows must be an integer of 2 or more"),
        ({"momentum": 0}, "momentum must lie above 0"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"num_features": True}, "num_features must be an integer"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceBatchNorm(**{"num_features": 3, **settings})


def test_calls_that_cannot_be() -> None:
    norm, x = make("frame"), torch.randn(3, 5, 3, dtype=F64)
    with pytest.raises(RuntimeError, match="train first, or call estimate_population"):
        norm.eval()(x)
    with pytest.raises(RuntimeError, match=r"need 4 rows, got 1 in the first group with 'frame'.*more lanes"):
        norm.train()(x[:, :1])
    with pytest.raises(RuntimeError, match="input_size, 3, got 2"):
        norm(x[..., :2])
    with pytest.raises(ValueError, match="mask must be bool"):
        norm(x, mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match="age is of no use to 'frame' statistics"):
        norm(x, age=torch.zeros(5, dtype=torch.int64))
    norm = make("age")
    with pytest.raises(RuntimeError, match=r"age must have shape \(5,\)"):
        norm(x, age=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="age must not be negative, got -1"):
        norm(x, age=torch.tensor([0, 0, 0, 0, -1]))
    with pytest.raises(ValueError, match=r"groups must lie in -1\.\.0, got 3"):
        norm.normalize(x[0], torch.tensor([0, 0, 0, 0, 3]), 1)


def op_inputs(dtype: torch.dtype = F64) -> list[Tensor]:
    """Rows of no group, groups that own, borrow and are given, and an empty one."""
    g = torch.Generator().manual_seed(1)
    group = torch.tensor([0, 1, 0, -1, 1, 2, 3, 0, 1, 3, 4, 5, 5, 0, 5])
    source = torch.tensor([0, 1, 1, -1, 1, 5, 6])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64).to(dtype)

    return [normal(15, 4), group, source, normal(7, 4), normal(7, 4).square() + 0.1, normal(4), normal(4)]


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("device", ["cpu", "cuda code"])
def test_operator_against_reference(dtype: torch.dtype, device: str) -> None:
    inputs = op_inputs(dtype)
    leaves = [inputs[i].requires_grad_() for i in (0, 5, 6)]
    expected = norm_reference.normalize(*inputs)  # type: ignore[arg-type]
    weigh = torch.randn_like(expected[0])
    wanted = torch.autograd.grad(expected[0], leaves, weigh)
    bare = [x.detach() for x in inputs]
    if device == "cpu":
        found = batch_norm_groups(*inputs)  # type: ignore[arg-type]
        grads = torch.autograd.grad(found[0], leaves, weigh)
    else:
        norm_cuda = pytest.importorskip("seqbatch.rnn.norm_cuda", reason="it needs Triton")
        found = norm_cuda.normalize(*bare, 1e-5)  # type: ignore[arg-type]
        mean, var = found[1:]
        grads = norm_cuda.normalize_backward(weigh, *bare[:3], mean, var, bare[5], 1e-5)  # type: ignore[arg-type]
    near = EXACT if dtype == F64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(found[0], expected[0], **near)
    used = torch.tensor([0, 1, 2, 3, 4, 5])  # the empty group's statistics are anyone's
    torch.testing.assert_close([m[used] for m in found[1:]], [m[used] for m in expected[1:]], **near)
    torch.testing.assert_close(grads, wanted, **near)


def test_gradcheck_and_opcheck() -> None:
    inputs = op_inputs()
    for i in (0, 5, 6):
        inputs[i].requires_grad_()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm_groups(x, *inputs[1:5], weight, bias)[0]  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(run, (inputs[0], inputs[5], inputs[6]))
    torch.library.opcheck(_normalize, (*inputs, 1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Statistics in float32, output in the input's dtype."""
    x = torch.randn(50, 40, 3).to(dtype)
    norm = SequenceBatchNorm(3).to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), SequenceBatchNorm(3)(x.float()), rtol=2e-2, atol=2e-3)


def test_masked_batch_norm_is_batch_norm_on_real_positions() -> None:
    g = torch.Generator().manual_seed(3)
    x, mask = torch.randn(5, 3, 7, generator=g, dtype=F64), torch.rand(5, 7, generator=g) < 0.6
    x = torch.where(mask[:, None], x, float("nan"))
    ours, stock = MaskedBatchNorm1d(3, dtype=F64), nn.BatchNorm1d(3, dtype=F64)
    ours.load_state_dict(stock.state_dict())
    for training in (True, False):
        ours.train(training), stock.train(training)
        rows = x.transpose(1, 2)[mask].requires_grad_()
        expected, leaf = stock(rows), x.clone().requires_grad_()
        found = ours(leaf, mask)
        torch.testing.assert_close(found.transpose(1, 2)[mask], expected, **EXACT)
        assert not found.transpose(1, 2)[~mask].any()
        weigh = torch.randn_like(expected)
        (grad,) = torch.autograd.grad(found.transpose(1, 2)[mask], leaf, weigh)
        torch.testing.assert_close(grad.transpose(1, 2)[mask], torch.autograd.grad(expected, rows, weigh)[0], **EXACT)
        torch.testing.assert_close(ours.state_dict(), stock.state_dict(), **EXACT)
    torch.testing.assert_close(ours(x[:, :, 0].nan_to_num(0.0)), stock(x[:, :, 0].nan_to_num(0.0)))


def test_masked_batch_norm_refuses_and_survives() -> None:
    norm, x = MaskedBatchNorm1d(3), torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match=r"mask must have shape \(2, 4\)"):
        norm(x, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be bool"):
        norm(x, torch.ones(2, 4))
    one = torch.zeros(2, 4, dtype=torch.bool)
    assert not norm(x, one).any() and norm.num_batches_tracked == 0
    one[0, 0] = True
    with pytest.raises(ValueError, match="more than 1 value"):
        norm(x, one)


def share_statistics(rank: int, world: int, folder: str) -> None:
    """Half of the lanes each; the third process has padding only, and fewer steps."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    x, reset, mask = some_batch()
    mine = [slice(0, 2), slice(2, 6), slice(0, 2)][rank]
    steps = 9 if rank < 2 else 4
    x, reset, mask = x[:steps, mine], reset[:steps, mine], mask[:steps, mine] & (rank < 2)
    results = {}
    for statistics in ("frame", "sequence", "age"):
        norm = make(statistics, synchronize=True)
        leaf = x.clone().requires_grad_()
        y = norm(leaf, reset=reset, mask=mask)
        weigh = torch.randn(9, 6, 3, generator=torch.Generator().manual_seed(5), dtype=F64)
        y.backward(weigh[:steps, mine] if rank < 2 else torch.zeros_like(y))
        assert leaf.grad is not None
        results[statistics] = (y.detach(), leaf.grad, list(norm.buffers()))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_statistics_of_several_processes_equal_those_of_one(tmp_path: Path) -> None:
    """Ranks with different numbers of real rows, and one with none."""
    mp.start_processes(share_statistics, (3, str(tmp_path)), nprocs=3, start_method="spawn")  # type: ignore[no-untyped-call]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    x, reset, mask = some_batch()
    for statistics in ("frame", "sequence", "age"):
        norm, leaf = make(statistics), x.clone().requires_grad_()
        y = norm(leaf, reset=reset, mask=mask)
        weigh = torch.randn(9, 6, 3, generator=torch.Generator().manual_seed(5), dtype=F64)
        y.backward(weigh)
        found = [torch.cat([parts[0][statistics][i], parts[1][statistics][i]], 1) for i in range(2)]
        torch.testing.assert_close(found[0], y, **EXACT)
        torch.testing.assert_close(found[1], leaf.grad, **EXACT)
        for part in parts:
            torch.testing.assert_close(part[statistics][2], list(norm.buffers()), **EXACT)
