"""BN-LSTM against a loop over the paper's equations, lane by lane and step by step."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqbatch.rnn import BNLSTM, estimate_population, norm_reference
from seqbatch.rnn.norm_ops import _bn_lstm, bn_lstm

EXACT = {"rtol": 1e-9, "atol": 1e-10}
F64 = torch.float64
Row = tuple[int, int]  # step and lane


def make(seed: int = 0, **settings: Any) -> BNLSTM:
    """A small layer in float64 with parameters that are all different."""
    torch.manual_seed(seed)
    rnn = BNLSTM(3, 4, **{"max_steps": 12, "dtype": F64} | settings)
    with torch.no_grad():
        for parameter in rnn.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.5)
    return rnn


def some_batch(seed: int = 0, steps: int = 9, lanes: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, resets and a mask with holes; NaN stands on padding."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, lanes, 3, generator=g, dtype=F64)
    reset, mask = torch.rand(steps, lanes, generator=g) < 0.2, torch.rand(steps, lanes, generator=g) < 0.85
    return torch.where(mask[..., None], x, float("nan")), reset, mask


class Loop:
    """One direction of one layer, from the equations: dictionaries of states, one group of rows after the other."""

    def __init__(self, rnn: BNLSTM, layer: int, direction: int) -> None:
        self.p, self.rnn = rnn.layers[layer][direction], rnn
        self.memory: dict[str, tuple[Tensor, Tensor]] = {}
        self.most = self.p.max_steps

    def norm(self, x: Tensor, module: Any, term: str, own: bool) -> Tensor:
        """Normalize rows with their statistics; too few rows take those of the group before."""
        if module is None:
            return x
        if own:
            self.memory[term] = x.mean(0), x.var(0, unbiased=False)
        mean, var = self.memory[term]
        return module.weight * (x - mean) / (var + self.rnn_eps).sqrt() + (0 if module.bias is None else module.bias)

    rnn_eps = 1e-5

    def run(self, x: Tensor, reset: Tensor, mask: Tensor, hx: Any, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The output (T, B, H) and the last h and c (B, H)."""
        p, (steps, lanes) = self.p, mask.shape
        order = list(range(steps))[::-1] if reverse else list(range(steps))
        start = (x.new_zeros(4), x.new_zeros(4)) if p.h0 is None else (p.h0, p.c0)
        chains: dict[int, list[tuple[Row, bool, int]]] = {b: [] for b in range(lanes)}  # row, begins, age
        pending = {}
        for b in range(lanes):
            begins, age = False, 0 if hx is None or len(hx) < 3 or reverse else int(hx[2][b])
            for t in order:
                clears = (t + 1 < steps and bool(reset[t + 1, b])) if reverse else bool(reset[t, b])
                begins, age = begins or clears, 0 if clears else age
                if mask[t, b]:
                    chains[b].append(((t, b), begins, age))
                    begins, age = False, age + 1
            pending[b] = begins
        wx = self.inputs(x, chains)
        groups: dict[int, list[tuple[int, int]]] = {}
        for b, chain in chains.items():
            for n, (_, _, age) in enumerate(chain):
                old = n + self.most - 1 if age >= self.most - 1 else age  # old rows go frame by frame
                groups.setdefault(n if self.rnn.statistics == "frame" else old, []).append((b, n))
        h: dict[tuple[int, int], Tensor] = {}
        c: dict[tuple[int, int], Tensor] = {}

        def before(table: dict[tuple[int, int], Tensor], k: int, b: int, n: int) -> Tensor:
            if chains[b][n][1] or (n == 0 and hx is None):
                return start[k]
            return hx[k][b] if n == 0 else table[b, n - 1]

        for _, members in sorted(groups.items()):
            own = len(members) >= 4
            a = torch.stack([before(h, 0, b, n) for b, n in members]) @ p.weight_hh.T
            rows = torch.stack([wx[chains[b][n][0]] for b, n in members])
            if self.rnn.variant == "bn1":
                z = self.norm(a + rows, p.norm_h, "h", own) + p.bias
            else:
                z = self.norm(a, p.norm_h, "h", own) + rows + p.bias
            i, f, g, o = z.chunk(4, -1)
            new_c = (
                torch.sigmoid(f) * torch.stack([before(c, 1, b, n) for b, n in members]) + torch.sigmoid(i) * g.tanh()
            )
            new_h = torch.sigmoid(o) * self.norm(new_c, p.norm_c, "c", own).tanh()
            for (b, n), one, two in zip(members, new_h, new_c, strict=True):
                h[b, n], c[b, n] = one, two
        output = {chains[b][n][0]: value for (b, n), value in h.items()}
        zero = x.new_zeros(4)
        out = torch.stack([torch.stack([output.get((t, b), zero) for b in range(lanes)]) for t in range(steps)])
        last = []
        for k, table in enumerate((h, c)):
            ends = []
            for b, chain in chains.items():
                empty = start[k] if hx is None else hx[k][b]
                ends.append(start[k] if pending[b] else table[b, len(chain) - 1] if chain else empty)
            last.append(torch.stack(ends))
        return out, last[0], last[1]

    def inputs(self, x: Tensor, chains: Any) -> dict[Row, Tensor]:
        """W_x x of every real row, normalized as its own statistics ask."""
        kind, groups = self.rnn.input_statistics, {}
        for chain in chains.values():
            for n, (row, _, age) in enumerate(chain):
                groups.setdefault({"frame": n, "age": min(age, self.most - 1), "sequence": 0}[kind], []).append(row)
        found = {}
        for _, rows in sorted(groups.items()):
            product = torch.stack([x[row] for row in rows]) @ self.p.weight_ih.T
            found |= dict(zip(rows, self.norm(product, self.p.norm_x, "x", len(rows) >= 4), strict=True))
        return found


def naive(rnn: BNLSTM, x: Tensor, hx: Any, reset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All layers and directions."""
    hs, cs = [], []
    for layer in range(rnn.num_layers):
        outputs = []
        for d in range(1 + rnn.bidirectional):
            state = None if hx is None else (hx[0][len(hs)], hx[1][len(hs)], *hx[2:])
            out, h, c = Loop(rnn, layer, d).run(x, reset, mask, state, bool(d))
            outputs.append(out)
            hs.append(h)
            cs.append(c)
        x = torch.cat(outputs, -1)
    return x, torch.stack(hs), torch.stack(cs)


def compare(rnn: BNLSTM, x: Tensor, hx: Any, reset: Tensor, mask: Tensor) -> None:
    """Outputs, states and all gradients equal the loop's."""
    x = x.clone().requires_grad_()
    output, state = rnn(x, hx, reset=reset, mask=mask)
    expected = naive(rnn, x, hx, reset, mask)
    found = (output, *state[:2])
    torch.testing.assert_close(found, expected, **EXACT)
    wanted = [x, *rnn.parameters(), *(hx or ())[:2]]
    weigh = [torch.randn_like(e) for e in expected]
    one, two = (
        torch.autograd.grad(out, wanted, weigh, materialize_grads=True, allow_unused=True) for out in (found, expected)
    )
    torch.testing.assert_close(one[1:], two[1:], **EXACT)
    torch.testing.assert_close(one[0][mask], two[0][mask], **EXACT)
    assert not one[0][~mask].any()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"statistics": "age"},
    {"input_statistics": "sequence"},
    {"statistics": "frame", "input_statistics": "age"},
    {"variant": "bn1"},
    {"variant": "bn2"},
    {"variant": "none"},
    {"variant": "bn1", "statistics": "age", "learn_state": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "statistics": "age", "input_statistics": "sequence"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_against_the_equations(settings: dict[str, Any], with_state: bool) -> None:
    """Resets, holes in the lanes, a lane of padding, late groups that borrow."""
    rnn, (x, reset, mask) = make(**settings), some_batch()
    mask[:, 5] = False
    if settings.get("statistics") != "age" and settings.get("input_statistics") != "age":
        reset[0, 0] = True
    else:
        mask[0, :5], reset[:, :4] = True, False  # enough rows of the first ages
        x = torch.where(mask[..., None], x.nan_to_num(0.3), float("nan"))
    hx = None
    if with_state:
        shape = (rnn.num_layers * (1 + rnn.bidirectional), 6, 4)
        hx = tuple(torch.randn(shape, dtype=F64, requires_grad=True) for _ in range(2))
    compare(rnn, x, hx, reset, mask)


def test_none_is_nn_lstm() -> None:
    rnn, stock = make(variant="none", max_steps=None), nn.LSTM(3, 4, dtype=F64)
    (p,) = rnn.layers[0]
    with torch.no_grad():
        stock.weight_ih_l0.copy_(p.weight_ih), stock.weight_hh_l0.copy_(p.weight_hh)
        stock.bias_ih_l0.copy_(p.bias), stock.bias_hh_l0.zero_()
    x, hx = torch.randn(7, 2, 3, dtype=F64), (torch.randn(1, 2, 4, dtype=F64), torch.randn(1, 2, 4, dtype=F64))
    torch.testing.assert_close(rnn(x, hx), stock(x, hx), **EXACT)


def test_age_walks_pieces_side_by_side() -> None:
    """Spliced lanes with "age" equal the pieces as lanes of their own with "frame": outputs and running statistics."""
    lengths = [3, 5, 1, 4, 5, 2, 3, 4, 5]
    pieces = [torch.randn(n, 3, dtype=F64) for n in lengths]
    lanes = [pieces[:3], pieces[3:5], pieces[5:7], pieces[7:]]
    x = torch.stack([torch.cat([*parts, torch.zeros(9 - sum(map(len, parts)), 3, dtype=F64)]) for parts in lanes], 1)
    reset, mask = torch.zeros(9, 4, dtype=torch.bool), torch.zeros(9, 4, dtype=torch.bool)
    for b, parts in enumerate(lanes):
        at = 0
        for part in parts:
            reset[at, b], at = True, at + len(part)
        mask[:at, b] = True
    spliced, alone = make(statistics="age"), make(statistics="frame")
    padded = nn.utils.rnn.pad_sequence(pieces)
    real = torch.arange(5)[:, None] < torch.tensor(lengths)
    one, two = spliced(x, reset=reset, mask=mask)[0], alone(padded, mask=real)[0]
    torch.testing.assert_close(one.transpose(0, 1)[mask.T], two.transpose(0, 1)[real.T], **EXACT)
    torch.testing.assert_close(list(spliced.buffers()), list(alone.buffers()), **EXACT)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**20), train=st.booleans(), statistics=st.sampled_from(["frame", "age"]))
def test_padding_and_the_order_of_lanes_change_nothing(seed: int, train: bool, statistics: str) -> None:
    """More padding anywhere and lanes of padding: to the bit. Other orders of lanes: to rounding."""
    x, reset, mask = some_batch(seed)
    mask[0], reset[:, :4] = True, False
    x[0] = x[0].nan_to_num(0.3)
    g = torch.Generator().manual_seed(seed)

    def run(x: Tensor, reset: Tensor, mask: Tensor) -> tuple[Any, ...]:
        rnn = make(statistics=statistics, bidirectional=True, num_layers=2)
        if not train:
            rnn(x, reset=reset, mask=mask)
            rnn.eval()
        leaf = x.clone().requires_grad_()
        y = rnn(leaf, reset=reset, mask=mask)[0].transpose(0, 1)[mask.T]
        weigh = torch.linspace(-1, 1, y.numel(), dtype=F64).view_as(y)
        grads = torch.autograd.grad((y * weigh).sum(), [leaf, *rnn.parameters()])
        return y, grads[0].transpose(0, 1)[mask.T], grads[1:], list(rnn.buffers())

    expected = run(x, reset, mask)
    wide = [torch.cat([t, torch.zeros_like(t[:, :1])], 1) for t in (x, reset, mask)]
    for at in torch.randint(0, 10, (3,), generator=g).sort(descending=True).values.tolist():
        rows = (
            torch.full_like(wide[0][:1], float("inf")),
            torch.zeros_like(wide[1][:1]),
            torch.zeros_like(wide[2][:1]),
        )
        wide = [torch.cat([t[:at], row, t[at:]]) for t, row in zip(wide, rows, strict=True)]
    torch.testing.assert_close(run(*wide), expected, rtol=0, atol=0)
    order = torch.randperm(6, generator=g)
    y, *_, buffers = run(x[:, order], reset[:, order], mask[:, order])
    torch.testing.assert_close(buffers, expected[3], **EXACT)
    whole, again = torch.zeros(6, 9, 8, dtype=F64), torch.zeros(6, 9, 8, dtype=F64)
    whole[mask.T], again[mask[:, order].T] = expected[0], y
    torch.testing.assert_close(again, whole[order], **EXACT)


@pytest.mark.parametrize("form", ["batch_first", "flat", "packed"])
@pytest.mark.parametrize("settings", [{}, {"bidirectional": True, "input_statistics": "sequence"}], ids=str)
def test_every_form_of_a_batch(form: str, settings: dict[str, Any]) -> None:
    lengths = torch.tensor([9, 3, 7, 7, 1, 8])
    mask, x = torch.arange(9)[:, None] < lengths, torch.randn(9, 6, 3, dtype=F64)
    expected, state = make(**settings)(x, mask=mask)
    if form == "batch_first":
        found, after = make(batch_first=True, **settings)(x.transpose(0, 1), mask=mask.T)
        found = found.transpose(0, 1)
    elif form == "flat":
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        rows, after = make(**settings)(x.transpose(0, 1)[mask.T], cu_seqlens=cu_seqlens)
        found = torch.zeros_like(expected).transpose(0, 1)
        found[mask.T] = rows
        found = found.transpose(0, 1)
    else:
        rows, after = make(**settings)(pack_padded_sequence(x, lengths, enforce_sorted=False))
        found, _ = pad_packed_sequence(rows)
    torch.testing.assert_close((found, *after), (expected, *state), **EXACT)


def test_population_of_one_batch_is_training() -> None:
    """Evaluation after an exact pass over a batch gives its output in training, ages and borrowed groups included."""
    for some in SETTINGS[:6] + SETTINGS[8:]:
        rnn, (x, reset, mask) = make(**some), some_batch()
        mask[0], reset[:, :4] = True, False
        x[0] = x[0].nan_to_num(0.3)

        def run(model: Any, batch: Any) -> Tensor:
            output: Tensor = model(batch[0], reset=batch[1], mask=batch[2])[0]
            return output

        estimate_population(rnn, [(x, reset, mask)], run)
        training, evaluation = run(rnn.train(), (x, reset, mask)), run(rnn.eval(), (x, reset, mask))
        torch.testing.assert_close(training, evaluation, **EXACT)


def test_in_evaluation_a_sequence_does_not_see_its_batch() -> None:
    rnn, x = make(bidirectional=True, input_statistics="sequence"), torch.randn(9, 6, 3, dtype=F64)
    rnn(x)
    rnn.eval()
    mask = torch.arange(9)[:, None] < torch.tensor([9, 3, 7, 7, 1, 8])
    together = rnn(x, mask=mask)[0]
    for b, n in enumerate(mask.sum(0).tolist()):
        torch.testing.assert_close(together[:n, b : b + 1], rnn(x[:n, b : b + 1])[0], **EXACT)


def test_chunks_with_carried_state_in_evaluation() -> None:
    """Ages go on with the state; with "age" the chunks are the whole, however it is cut."""
    rnn, (x, reset, mask) = make(statistics="age"), some_batch(3)
    rnn(torch.randn(12, 8, 3, dtype=F64))
    rnn.eval()
    whole, last = rnn(x, reset=reset, mask=mask)
    parts, state = [], None
    for t in (slice(0, 4), slice(4, 5), slice(5, 9)):
        part, state = rnn(x[t], state, reset=reset[t], mask=mask[t])
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), whole, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


def test_ages_beyond_max_steps_go_step_by_step() -> None:
    """Old rows share statistics per step of the batch, whatever their ages, after the young ones."""
    rnn, (x, _, mask) = make(statistics="age", max_steps=4), some_batch(lanes=9)
    mask[0], reset = True, torch.zeros_like(mask)
    reset[4, :4] = True
    x = torch.where(mask[..., None], x.nan_to_num(0.3), float("nan"))
    age = torch.tensor([0, 0, 0, 0, 7, 8, 2, 40, 50])
    h, c = (torch.randn(1, 9, 4, dtype=F64, requires_grad=True) for _ in range(2))
    compare(rnn, x, (h, c, age), reset, mask)
    _, _, after = rnn(x, (h, c, age), reset=reset, mask=mask)[1]
    assert torch.equal(after[4:], age[4:] + mask[:, 4:].sum(0))


@pytest.mark.parametrize("settings", [{}, {"variant": "bn1"}, {"statistics": "age", "bidirectional": True}], ids=str)
def test_batches_without_a_real_step(settings: dict[str, Any]) -> None:
    """Zeros, states as they came or learned after a reset, gradients of 0; no lanes at all likewise."""
    rnn, x = make(**settings), torch.full((3, 2, 3), float("nan"), dtype=F64, requires_grad=True)
    mask, reset = torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.bool)
    reset[1, 1] = True
    hx = tuple(torch.randn(1 + rnn.bidirectional, 2, 4, dtype=F64) for _ in range(2))
    output, (h, c, *_) = rnn(x, hx, reset=reset, mask=mask)
    assert not output.any()
    (p, *_) = rnn.layers[0]
    torch.testing.assert_close((h[0, 0], c[0, 0], h[0, 1]), (hx[0][0, 0], hx[1][0, 0], p.h0), rtol=0, atol=0)
    output.sum().backward()
    assert rnn(torch.zeros(3, 0, 3, dtype=F64))[0].shape == (3, 0, 4 * (1 + rnn.bidirectional))
    flat, (h, *_) = rnn(torch.zeros(0, 3, dtype=F64), cu_seqlens=torch.tensor([0]))
    assert flat.shape == (0, 4 * (1 + rnn.bidirectional)) and h.shape[1] == 0


def test_input_ages_are_carried_too() -> None:
    rnn = make(variant="bn2", input_statistics="age")
    x = torch.randn(10, 8, 3, dtype=F64)
    whole = rnn(x)[0]
    rnn.eval()
    whole, (first, state) = rnn(x)[0], rnn(x[:4])
    assert state[2].tolist() == [4] * 8
    torch.testing.assert_close(torch.cat([first, rnn(x[4:], state)[0]]), whole, **EXACT)


def test_terms_that_disagree_are_refused() -> None:
    rnn, x = make(), torch.randn(5, 6, 3, dtype=F64)
    rnn(x)
    before = [b.clone() for b in rnn.buffers()]
    rnn.layers[0][0].norm_h.eval()
    with pytest.raises(RuntimeError, match="the same mode"):
        rnn(x)
    assert all(map(torch.equal, before, rnn.buffers()))


def test_wrap_fills_statistics_with_the_lanes_own_data() -> None:
    """As if shorter lanes went on with their data from the start and a held state, in the statistics only."""
    x, lengths = torch.randn(5, 4, 3, dtype=F64), torch.tensor([5, 2, 3, 5])
    mask = torch.arange(5)[:, None] < lengths
    rnn = make(fill="wrap", learn_state=False)
    found = rnn(x, mask=mask)[0]
    (p,) = rnn.layers[0]
    h, c, outputs = torch.zeros(4, 4, dtype=F64), torch.zeros(4, 4, dtype=F64), []

    def norm(v: Tensor, module: Any) -> Tensor:
        scaled: Tensor = module.weight * (v - v.mean(0)) / (v.var(0, unbiased=False) + 1e-5).sqrt()
        return scaled if module.bias is None else scaled + module.bias

    for t in range(5):
        rows = torch.stack([x[t % n, b] for b, n in enumerate(lengths.tolist())])
        z = norm(h @ p.weight_hh.T, p.norm_h) + norm(rows @ p.weight_ih.T, p.norm_x) + p.bias
        i, f, g, o = z.chunk(4, -1)
        new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * g.tanh()
        new_h = torch.sigmoid(o) * norm(new_c, p.norm_c).tanh()
        h, c = torch.where(mask[t][:, None], new_h, h), torch.where(mask[t][:, None], new_c, c)
        outputs.append(torch.where(mask[t][:, None], new_h, 0.0))
    torch.testing.assert_close(found, torch.stack(outputs), **EXACT)


def op_inputs(inside: bool, of_h: bool, of_c: bool) -> tuple[Any, ...]:
    """Two given states, groups that own, borrow and are given; states that do and do not stand in line."""
    g = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64).requires_grad_()

    offsets, source = torch.tensor([0, 2, 5, 8, 9]), torch.tensor([-1, 1, 2, 2])
    previous = torch.tensor([0, 1, 3, 2, 1, 4, 5, 6, 9])
    runs = torch.tensor([0, -1, 4, 9])
    gammas = (normal(12) if of_h else None, normal(3) if of_c else None, normal(3) if of_c else None)
    moments = tuple(normal(4, n).square().detach() + 0.1 for n in (12, 12, 3, 3))
    states = (normal(2, 3), normal(2, 3))
    tensors = (normal(9, 12), normal(9, 12) if inside else None, normal(12, 3))
    return (*tensors, gammas, states, (previous, offsets, runs, source), moments)


CASES = [(False, True, True), (True, True, False), (False, False, False), (True, True, True), (False, False, True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(case: tuple[bool, bool, bool]) -> None:
    """Outputs and gradients against the reference; gradcheck; opcheck."""
    arguments = op_inputs(*case)
    outside, inside, weight, gammas, states, (previous, offsets, _, source), moments = arguments
    reference = norm_reference.bn_lstm(outside, inside, weight, *gammas, *states, previous, offsets, source, moments)
    h, c, used = bn_lstm(*arguments)
    torch.testing.assert_close((h, c), reference[:2], **EXACT)
    if case[1]:
        torch.testing.assert_close(used[:2], reference[2:4], **EXACT)
    if case[2]:
        torch.testing.assert_close(used[2:], reference[4:], **EXACT)
    leaves = [x for x in (outside, inside, weight, *gammas, *states) if x is not None]
    weigh = [torch.randn_like(h), torch.randn_like(c)]
    one, two = (torch.autograd.grad(out, leaves, weigh) for out in ((h, c), reference[:2]))
    torch.testing.assert_close(one, two, **EXACT)

    def run(*_: Tensor) -> tuple[Tensor, Tensor]:
        return bn_lstm(*arguments)[:2]

    assert torch.autograd.gradcheck(run, leaves)
    torch.library.opcheck(_bn_lstm, (*arguments[:3], *gammas, *states, *arguments[5], *moments, 1e-5))


def test_float32_and_half() -> None:
    """float32 is near float64; half precision comes and goes, state and statistics in float32."""
    x = torch.randn(20, 16, 3, dtype=F64)
    exact = make(3)(x)[0]
    assert (
        BNLSTM(3, 4, max_steps=5, init="identity", dtype=torch.bfloat16).layers[0][0].weight_hh[8:12].diagonal().all()
    )
    for dtype, near in ((torch.float32, 2e-4), (torch.bfloat16, 0.15)):
        rnn = make(3).to(dtype)
        found, (h_half, _) = rnn(x.to(dtype))
        assert found.dtype == dtype and h_half.dtype == torch.float32
        assert (found.double() - exact).abs().max() < near


def test_trained_with_zero_variance_at_first() -> None:
    """The trap of images in order: at first all rows are equal. Gradients are finite, with noise or without."""
    x = torch.zeros(30, 16, 3)
    x[20:] = torch.randn(10, 16, 3)
    for noise in (0.0, 0.1):
        torch.manual_seed(0)
        rnn = BNLSTM(3, 8, max_steps=30, noise=noise)
        rnn(x)[0][-1].square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in rnn.parameters() if p.grad is not None)
        rnn.eval()
        assert torch.equal(rnn(x)[0], rnn(x)[0])  # no noise in evaluation


def test_initialisation() -> None:
    rnn = BNLSTM(8, 16, max_steps=3, init="identity")
    (p,) = rnn.layers[0]
    assert torch.equal(p.weight_hh[32:48], torch.eye(16))
    three = torch.cat([p.weight_hh[:32], p.weight_hh[48:]])
    torch.testing.assert_close(three.T @ three, torch.eye(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(p.weight_ih.T @ p.weight_ih, torch.eye(8), rtol=0, atol=1e-5)
    assert p.bias.tolist() == [0.0] * 16 + [1.0] * 16 + [0.0] * 32
    assert p.norm_x.weight.eq(0.1).all() and p.norm_h.bias is None and p.norm_c.bias is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "bn3"}, "variant must be one of 'bn', 'bn1', 'bn2', 'none', got 'bn3'"),
        ({"statistics": "sequence"}, "would need the future"),
        ({"max_steps": None}, "max_steps must be given"),
        ({"max_steps": 0}, "max_steps must be an integer of 1 or more, got 0"),
        ({"fill": "wrap", "statistics": "age"}, "fill='wrap' continues lanes"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"noise": -1.0}, "noise must not be negative"),
        ({"dropout": 2.0}, "dropout must lie in 0..1"),
        ({"init": "zeros"}, "init must be one of 'orthogonal', 'identity'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BNLSTM(**{"input_size": 3, "hidden_size": 4, "max_steps": 5} | settings)


def test_calls_that_cannot_be() -> None:
    rnn, x = make(), torch.randn(5, 6, 3, dtype=F64)
    with pytest.raises(RuntimeError, match=r"got 1 in the first group.*more lanes"):
        rnn(x[:, :1])
    with pytest.raises(RuntimeError, match="no statistics to evaluate with"):
        rnn.eval()(x)
    with pytest.raises(TypeError, match=r"hx must be \(h, c\), got 3 parts"):
        rnn(x, (x, x, x))
    with pytest.raises(RuntimeError, match=r"hx\[0\] must have shape \(1, 6, 4\)"):
        rnn(x, (x, x))
    with pytest.raises(TypeError, match=r"\(h, c, age\), got Tensor"):
        make(statistics="age")(x, x)


def test_learns() -> None:
    """A few updates lower the loss of remembering the first step's sign."""
    torch.manual_seed(0)
    rnn, head = BNLSTM(1, 16, max_steps=12), nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], 0.02)
    losses = []
    for _ in range(40):
        x = torch.randn(12, 64, 1)
        loss = nn.functional.binary_cross_entropy_with_logits(head(rnn(x)[0][-1]), (x[0] > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert math.isfinite(losses[-1]) and losses[-1] < 0.5 * losses[0]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """What a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
