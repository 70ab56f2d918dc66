"""`compare`: rows that are the plans', measured where they fit, and what is recommended."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import seqbatch
from seqbatch import Chunking, Packing, Padding, Splicing, compare, workload
from seqbatch.advice import recommend
from seqbatch.compare import Comparison, _Trial, grids
from seqbatch.rnn import lstm
from seqbatch.simulate import DEFAULT, simulate
from seqbatch.strategy import Strategy
from seqbatch.workload import Workload

LENGTHS = np.random.default_rng(0).integers(1, 20, 200)
SMALL: dict[str, Any] = {"hidden": 4, "batch_sizes": [4, 16], "seconds": 2, "chunk_size": 8}


def run(lengths: Any = LENGTHS, **settings: Any) -> Comparison:
    return compare.compare(lengths, **(SMALL | settings))


def test_rows_count_what_the_simulator_counts() -> None:
    """The same plans, in the same order, and every one is measured."""
    found = run(strategies=DEFAULT)
    expected = simulate(LENGTHS, batch_sizes=SMALL["batch_sizes"], chunk_size=SMALL["chunk_size"])

    names = ["strategy", "batch_size", "settings", "padding_efficiency", "batches", "steps", "cells"]
    pd.testing.assert_frame_equal(expected[names], found.frame[names])
    assert found.frame["measured"].notna().all()
    assert (found.frame["low"] <= found.frame["measured"]).all()
    assert (found.frame["measured"] <= found.frame["high"]).all()
    assert found.frame["loader_share"].between(0, 1).all()
    assert not found.interrupted


@pytest.mark.parametrize("strategy", [Padding(4), Splicing(4, 8), Chunking(4, 8), Packing(20, rows=2)], ids=repr)
def test_measured_batches_are_the_plans(strategy: Strategy) -> None:
    """A sample of all batches is the epoch: the same cells, the same tokens (law 8)."""
    plan = strategy.plan(LENGTHS)
    batches = list(_Trial(Workload(hidden=4), LENGTHS, [], 1, False)._batches(plan, np.arange(len(plan))))

    assert [tuple(batch.mask.shape) for batch in batches] == list(zip(plan.steps, plan.lanes, strict=True))  # type: ignore[union-attr]
    assert plan.tokens == sum(int(batch.mask.sum()) for batch in batches)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "strategy", [Padding(4), Splicing(4, 8), Chunking(4, 8, carry=True), Packing(20, rows=3)], ids=repr
)
@pytest.mark.parametrize("worth", [0, 40, 10**9])
def test_an_lstm_pays_for_what_its_layer_runs(worth: int, strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inserted steps, and only lanes that have not ended; an SRU for the grid."""
    plan, work, ran = strategy.plan(LENGTHS), Workload("lstm", hidden=4), []
    monkeypatch.setattr(lstm, "SAVED_AT_LEAST", worth)
    stock = lstm._stock
    monkeypatch.setattr(lstm, "_stock", lambda x, *rest: (ran.append(x.shape[:2]), stock(x, *rest))[1])
    expected = []
    for batch in _Trial(work, LENGTHS, [], 1, False)._batches(plan, np.arange(len(plan))):
        ran.clear()
        work.train(batch)
        expected.append([sum(steps for steps, _ in ran), sum(steps * lanes for steps, lanes in ran), len(ran)])

    assert expected == np.stack(work.effort(plan), axis=1).tolist()
    assert plan.steps.tolist() == Workload("sru", hidden=4).effort(plan)[0].tolist()


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (9, 4), (16, 1)])
def test_a_grid_to_calibrate_by_runs_as_many_steps_as_it_says(
    grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an LSTM's inserted step."""
    ran: list[tuple[int, int]] = []
    stock = lstm._stock
    monkeypatch.setattr(lstm, "_stock", lambda x, *rest: (ran.append(tuple(x.shape[:2])), stock(x, *rest))[1])
    Workload("lstm", hidden=4).grid(*grid)()
    Workload("sru", hidden=4).grid(*grid)()

    assert [grid] == ran


def test_torch_s_own_lstm_runs_only_what_it_can() -> None:
    """The other rows say why not."""
    found = run(cell="nn.LSTM", strategies=["padding", "splicing", "packing", "chunking", "chunking_carry"])
    notes = found.frame.groupby("strategy")["note"].first()

    assert "" == notes["padding"] == notes["chunking"]
    assert "inside a lane" in notes["splicing"] and "inside a lane" in notes["packing"]
    assert "carried state" in notes["chunking_carry"]
    assert (found.frame["measured"].isna() == (found.frame["note"] != "")).all()


@pytest.mark.parametrize("cell", workload.CELLS)
def test_every_cell_trains(cell: str) -> None:
    """Weights get gradients from a batch with padding."""
    work = Workload(cell, hidden=4, layers=2)
    trial = _Trial(work, LENGTHS, [], 1, False)
    work.train(next(trial._batches(Padding(4).plan(LENGTHS), np.arange(1))))

    for name, weight in work.module.named_parameters():
        shared = name.endswith("h0")  # batch statistics take away what all rows have in common
        assert weight.grad is not None and (shared or weight.grad.abs().sum() > 0), name


def test_weights_that_do_not_fit_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row says so, and there is no recommendation."""
    monkeypatch.setattr(compare, "calibrate", None)
    found = run(hidden=10_000_000)

    assert found.frame["note"].str.contains("the weights and their gradients need about .* GiB").all()
    assert found.recommendation is None and found.calibration is None


def test_a_batch_that_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of smaller batches go on."""
    weights = Workload(hidden=64).weight_bytes / 3
    cells: list[int] = []
    grid = Workload.grid
    monkeypatch.setattr(Workload, "grid", lambda self, *size: (cells.append(int(np.prod(size))), grid(self, *size))[1])
    monkeypatch.setattr(compare, "peak_memory", lambda job, device: (job(), weights + 1000 * cells[-1])[1])
    calls: list[int] = []

    def free(device: object) -> int:
        calls.append(1)
        return 2**62 if len(calls) <= 2 else int(weights + 1000 * 500)  # room for 500 cells

    monkeypatch.setattr(compare, "free_bytes", free)
    found = run(hidden=64, strategies=["padding"], batch_sizes=[1, 200])

    assert [note.split(" ")[0] for note in found.frame["note"]] == ["", "its"]
    assert "GiB are free" in found.frame["note"][1]
    assert found.frame["measured"].notna().tolist() == [True, False]


ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:20])
def test_running_out_of_memory_ends_a_row_and_no_other(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other errors are not hidden."""
    train = Workload.train

    def failing(self: Workload, batch: Any, state: Any = None) -> Any:
        if batch.mask.shape[1] == 16:
            raise error
        return train(self, batch, state)

    monkeypatch.setattr(Workload, "train", failing)
    found = run(strategies=["padding"])

    assert found.frame["note"].tolist() == ["", "out of memory"]
    assert found.recommendation.batch_size == 4  # type: ignore[union-attr]
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        run(strategies=["padding"])


def test_memory_that_runs_out_while_calibrating_or_measuring_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On all rows, or on the one that was measured: what was measured before stays."""
    measure, calls = _Trial._measure, []

    def failing(self: _Trial, row: Any) -> None:
        calls.append(row)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        measure(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(_Trial, "_measure", failing)
        found = run(strategies=["padding", "splicing"], batch_sizes=[4])
    assert found.frame["note"].tolist() == ["", "out of memory"]
    assert found.frame["measured"].notna().all()
    monkeypatch.setattr(Workload, "grid", lambda *_: (_ for _ in ()).throw(MemoryError()))
    found = run(strategies=["padding"])
    assert found.frame["note"].tolist() == ["out of memory"] * 2
    assert found.calibration is None


def test_strategies_ready_made_have_one_row_each() -> None:
    """Without a batch size; the advice names them."""
    found = run(strategies=[Padding(4), Splicing(8, 8)])

    assert found.frame["batch_size"].isna().all()
    assert found.recommendation is not None and found.recommendation.batch_size is None
    assert found.recommendation.settings in ("Padding(4)", "Splicing(8, 8)")


def test_the_measured_speed_is_of_all_batches_whatever_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is as predicted every sample says the same, though costs are skewed."""
    plan = Padding(1).plan(np.r_[np.full(90, 2), np.full(10, 500)])
    seconds = plan.steps * 1e-3
    for sample in ([0], [99], [3, 50, 97], list(range(100))):
        row = compare._Row("padding", 1, Padding(1), plan, seconds, np.array(sample))
        assert pytest.approx(plan.tokens / seconds.sum()) == row.speed(float(seconds[sample].sum()))


def test_ctrl_c_keeps_the_rows_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second turn all rows have one."""
    measure, calls = _Trial._measure, []

    def interrupted(self: _Trial, row: Any) -> None:
        calls.append(row)
        if len(calls) == 3:
            raise KeyboardInterrupt
        measure(self, row)

    monkeypatch.setattr(_Trial, "_measure", interrupted)
    found = run(strategies=["padding", "splicing"], batch_sizes=[4, 8])

    assert found.interrupted
    assert found.frame["measured"].notna().tolist() == [True, True, False, False]
    assert found.frame["predicted"].notna().all()
    assert found.recommendation is not None


def test_rows_too_slow_for_their_time_say_so() -> None:
    """With what a batch takes."""
    found = run(np.full(64, 400), hidden=128, strategies=["padding", "splicing"], batch_sizes=[64], seconds=0.05)

    assert "give more seconds" in found.frame["note"][0]
    assert np.isnan(found.frame["measured"][0])
    assert found.frame["predicted"][0] > 0


@pytest.mark.parametrize("lengths", [[7] * 30, [1], [0, 3, 0], [1] * 5, [50]], ids=str)
def test_few_and_equal_lengths(lengths: list[int]) -> None:
    """One value, one sequence, one token, fewer than a batch: nothing breaks."""
    found = run(lengths, seconds=1)

    assert found.frame["measured"].notna().all()
    assert found.recommendation is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:7"}, "is not there: torch .* sees"),
        ({"device": "tpu"}, "must be cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "meta"}, "must be cpu, cuda or cuda:N, got 'meta'"),
        ({"cell": "gru"}, "cell must be one of 'sru', 'lstm', 'bnlstm', 'nn.LSTM', got 'gru'"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"seconds": 0}, "seconds must be a number above 0, got 0"),
        ({"seconds": float("nan")}, "seconds must be a number above 0, got nan"),
        ({"batch_sizes": [0]}, "a batch size must be at least 1, got 0"),
        ({"strategies": "splice"}, "a strategy must be one of"),
        ({"strategies": []}, "nothing to compare: give at least one strategy"),
        ({"batch_sizes": []}, "nothing to compare: give at least one strategy and one batch size"),
    ],
)
def test_bad_settings_are_told_before_any_work(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is allowed."""
    monkeypatch.setattr(_Trial, "run", None)
    with pytest.raises(ValueError, match=message):
        run(**settings)


def test_empty_sequences_alone_are_an_error() -> None:
    """There is nothing to compare."""
    with pytest.raises(ValueError, match="every sequence is empty"):
        run([0, 0])


def test_grids_span_the_plans() -> None:
    """Those tested on are others than those fitted to, and none is larger than what is run."""
    plans = [strategy.plan(LENGTHS) for strategy in (Padding(2), Padding(32), Splicing(16, 8))]
    fitted, held_out = grids(plans)

    assert len(fitted) >= 3 and len(held_out) >= 1
    assert not set(fitted) & set(held_out)
    assert max(s * b for s, b in fitted + held_out) <= max(int((p.steps * p.lanes).max()) for p in plans)
    assert len(grids([Padding(1).plan([1])])[0]) >= 3
    alone = Padding(64).plan(np.full(200, 1000))
    assert max(s * b for s, b in grids([alone])[0]) <= 64_000


def rows(**columns: Any) -> pd.DataFrame:
    """A frame of as many rows as columns have values."""
    count = len(next(iter(columns.values())))
    defaults = {"strategy": ["splicing"] * count, "batch_size": [1.0] * count, "settings": ["Padding(2)"] * count,
                "padding_efficiency": [0.5] * count, "batches": [1] * count, "predicted": [np.nan] * count,
                "measured": [np.nan] * count, "note": [""] * count}  # fmt: skip
    return pd.DataFrame(defaults | columns)


PLANS = {
    "whole": Padding(4).plan(LENGTHS),
    "carried": Splicing(4, 8).plan(LENGTHS),
    "cut": Chunking(4, 8).plan(LENGTHS),
}


def test_of_rows_as_fast_the_one_with_more_updates_is_recommended() -> None:
    """3 % is as fast; 4 % is not."""
    frame = rows(measured=[100.0, 98.0, 96.0], batches=[10, 20, 30], batch_size=[3.0, 2.0, 1.0])

    assert recommend(frame, [PLANS["whole"]] * 3).batch_size == 2  # type: ignore[union-attr]


def test_chunks_that_cut_are_recommended_only_alone() -> None:
    """They are fast because they forget."""
    frame = rows(measured=[100.0, 50.0], strategy=["chunking", "padding"])

    assert recommend(frame, [PLANS["cut"], PLANS["whole"]]).strategy == "padding"  # type: ignore[union-attr]
    assert recommend(frame[:1], [PLANS["cut"]]).strategy == "chunking"  # type: ignore[union-attr]


def test_the_sentence_compares_with_padding_at_its_best() -> None:
    """And says where the gradient is cut."""
    frame = rows(measured=[100.0, 40.0, 50.0], strategy=["splicing", "padding", "padding"])
    advice = recommend(frame, [PLANS["carried"], PLANS["whole"], PLANS["whole"]])

    assert advice is not None
    assert "2.00 times zero padding at its best" in advice.sentence
    assert "there the gradient stops" in advice.sentence
    assert "carry_in" in advice.code


@pytest.mark.parametrize("cell", workload.CELLS)
@pytest.mark.parametrize("strategy", ["padding", "splicing"])
def test_the_code_runs(cell: str, strategy: str) -> None:
    """As it is printed, for every cell."""
    found = run(cell=cell, strategies=[strategy], batch_sizes=[4])
    if found.recommendation is None:
        assert (cell, strategy) == ("nn.LSTM", "splicing")
        return
    data = seqbatch.TokenArray.of_sequences([[1, 2, 3]] * 20)
    embed, rnn = torch.nn.Embedding(8, 4), Workload(cell, hidden=4).module
    names = {"seqbatch": seqbatch, "dataset": data, "embed": embed, "rnn": rnn}
    exec(found.recommendation.code, names)
    assert names["output"].shape[-1] == 4  # type: ignore[attr-defined]


def test_the_sentence_says_what_it_leaves_open() -> None:
    """Rows that were not measured, sequences that are cut, padding that is as fast."""
    half = recommend(rows(measured=[100.0, np.nan]), [PLANS["whole"]] * 2)
    cut = recommend(rows(measured=[100.0]), [PLANS["cut"]])
    even = recommend(
        rows(measured=[100.0, 98.0], strategy=["padding", "splicing"], batches=[1, 9]), [PLANS["whole"]] * 2
    )

    assert "Only 1 of 2 rows were measured" in half.sentence  # type: ignore[union-attr]
    assert "are cut, and no state is carried" in cut.sentence  # type: ignore[union-attr]
    assert "about as fast as zero padding" in even.sentence  # type: ignore[union-attr]


def test_without_measurements_the_prediction_decides() -> None:
    """And without either nothing."""
    assert "predicted" in recommend(rows(predicted=[1.0, 2.0]), [PLANS["whole"]] * 2).sentence  # type: ignore[union-attr]
    assert recommend(rows(predicted=[1.0], note=["out of memory"]), [PLANS["whole"]]) is None
