"""The plan itself: columns, counts, files, and what it refuses."""

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import strategies
from hypothesis import given

import seqbatch
from seqbatch import Bucketing, Chunking, Packing, Padding, Plan, Splicing
from seqbatch.pieces import DROPPED
from seqbatch.strategy import Strategy

LENGTHS = np.array([5, 0, 3, 8, 1, 8, 2, 2])


def test_columns_are_read_only_int64() -> None:
    """Nobody changes a plan by accident."""
    plan = Bucketing(max_tokens=16).plan(LENGTHS)
    for name in ("sequence", "start", "length", "step", "lane", "batch_ptr", "steps", "lanes"):
        column = getattr(plan, name)
        assert np.int64 == column.dtype
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


def test_the_lengths_given_are_left_alone() -> None:
    """Planning changes no input, and no plan changes with one."""
    for make in strategies.ALL.values():
        lengths = np.array(LENGTHS)
        plan = make(8).plan(lengths)
        digest = plan.digest
        assert (lengths == LENGTHS).all()
        lengths[:] = 1
        assert replace(plan).digest == digest


def test_a_batch_is_views_of_the_columns() -> None:
    """Index, negative index, iteration and length agree; beyond the end is an IndexError."""
    plan = Padding(3).plan(LENGTHS)
    assert [len(part.sequence) for part in plan] == [3, 3, 1]
    assert plan[-1].sequence.tolist() == plan[2].sequence.tolist()
    assert np.shares_memory(plan[1].lane, plan.lane)
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"batch {index} of a plan of 3 batches"):
            plan[index]
    with pytest.raises(TypeError, match=r"indexed by the number of a batch, got slice\(0, 1, None\)"):
        plan[0:1]


def test_counts_add_up() -> None:
    """tokens, cells and padding_efficiency are the frame's columns, total over total."""
    for make in strategies.ALL.values():
        plan = make(8).plan(LENGTHS)
        frame = plan.to_frame()
        assert frame["tokens"].sum() == plan.tokens
        assert frame["cells"].sum() == plan.cells
        assert (frame["steps"] * frame["lanes"] == frame["cells"]).all()
        assert not plan.cells or plan.tokens / plan.cells == plan.padding_efficiency
        assert len(plan) == len(frame)


def test_costs_count_padding_where_there_is_and_pieces_where_lanes_hold_several() -> None:
    """Padded lanes cost the square of their steps, packed ones the squares of their pieces."""
    padded = Padding(2, shuffle=False).plan([3, 1, 2])
    packed = Packing(8, shuffle=False).plan([3, 3, 2])

    assert padded.costs((1.0, 1.0)).tolist() == [6 + 2 * 9, 2 + 4]
    assert packed.costs((1.0, 1.0)).tolist() == [8 + 9 + 9 + 4]


def test_empty_sequences_take_no_cell_and_are_listed() -> None:
    """Also when there is nothing else."""
    for name, make in strategies.ALL.items():
        plan = make(8).plan([0, 0, 0])
        assert (len(plan), plan.tokens, plan.cells) == (0, 0, 0), name
        assert [(i, 0, 0, "empty") for i in range(3)] == plan.dropped.tolist()
        assert np.isnan(plan.padding_efficiency)
        assert [len(plan.shard(rank, 2)) for rank in range(2)] == [0, 0]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_lengths_in_a_small_dtype_do_not_overflow(dtype: type) -> None:
    """Sums are of int64, whatever the lengths are."""
    lengths = np.full(5000, 120, dtype)
    for make in strategies.ALL.values():
        plan = make(120).plan(lengths)
        assert plan.tokens + plan.dropped["length"].sum() == 120 * 5000


def test_more_than_two_to_the_31_tokens() -> None:
    """int32 lengths that add up to more than int32 holds."""
    plan = Bucketing(max_tokens=2**30, static_shapes=True).plan(np.full(5, 2**29, np.int32))
    assert plan.tokens == 5 * 2**29


BAD_LENGTHS = [
    ([], ValueError, "at least one sequence"),
    ([3, -1], ValueError, "negative.*-1.*1"),
    ([1.0, 2.0], TypeError, "integers.*float64"),
    ([1.0, float("nan")], TypeError, "NaN|nan"),
    ([[1, 2, 3], [3, 4, 5]], ValueError, r"\(2, 3\)"),
    (["3"], TypeError, "integers"),
    ([True, False], TypeError, "bool"),
    (7, ValueError, r"dimension|\(\)"),
]


@pytest.mark.parametrize("strategy", [Padding(2), Bucketing(max_tokens=8), Splicing(2, 4), Chunking(2, 4), Packing(8)])
@pytest.mark.parametrize(("lengths", "error", "message"), BAD_LENGTHS, ids=str)
def test_lengths_that_are_none_are_refused(strategy: Strategy, lengths: object, error: type, message: str) -> None:
    """By every strategy alike, saying what came."""
    with pytest.raises(error, match=message):
        strategy.plan(lengths)


@pytest.mark.parametrize("name", ["seed", "epoch"])
@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError), (True, TypeError)])
def test_seed_and_epoch_are_integers_from_zero_up(name: str, value: object, error: type) -> None:
    """Whether they are used or not."""
    for make in strategies.ALL.values():
        with pytest.raises(error, match=f"{name} must be"):
            make(8).plan(LENGTHS, **{name: value})


def test_numpy_integers_are_as_good_as_python_ones() -> None:
    """The same plan, and a repr that can be read back."""
    strategy = Padding(np.int64(4))
    assert repr(strategy) == "Padding(4)"
    assert strategy.plan(LENGTHS, seed=np.int32(3)).digest == Padding(4).plan(LENGTHS, seed=3).digest


@given(strategies.any_strategy())
def test_a_repr_makes_the_same_strategy(strategy: Strategy) -> None:
    """The settings are printed as the call that makes them."""
    assert strategy == eval(repr(strategy), vars(seqbatch) | {n: getattr(seqbatch, n) for n in seqbatch.__all__})


# What each kind of plan was for LENGTHS when this was written. A change means that the same seed now trains on
# other batches: only on purpose, with a line in the CHANGELOG.
DIGESTS = json.loads((Path(__file__).parent / "digests.json").read_text())


@pytest.mark.parametrize("kind", strategies.ALL)
def test_the_same_seed_gives_the_same_batches_as_ever(kind: str) -> None:
    """Plans do not change from one version, platform or NumPy release to another."""
    lengths = 1 + np.arange(500) * 37 % 101
    plan = strategies.ALL[kind](int(lengths.max())).plan(lengths, seed=7, epoch=2)
    assert DIGESTS[kind] == plan.digest[:16]


@given(strategies.lengths(), strategies.any_strategy())
def test_a_saved_plan_comes_back_whole(
    tmp_path_factory: pytest.TempPathFactory, lengths: np.ndarray, strategy: Strategy
) -> None:
    """Columns, counts, settings and digest."""
    path = tmp_path_factory.mktemp("plan") / "plan.npz"
    plan = strategy.plan(lengths, seed=2**70, epoch=3)
    plan.save(path)
    back = Plan.load(path)

    assert plan.digest == back.digest
    for name in ("carry", "strategy", "seed", "epoch", "shuffle", "tokens", "cells"):
        assert getattr(plan, name) == getattr(back, name)
    assert plan.shard(0, 1).digest == back.shard(0, 1).digest
    assert [p.name for p in path.parent.iterdir()] == ["plan.npz"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.npz"
    Splicing(4, 8).plan(np.arange(1, 50)).save(path)
    return path


def test_a_truncated_plan_is_refused(saved: Path) -> None:
    """Wherever it was cut."""
    whole = saved.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a plan file, or is truncated or changed; make it again"):
            Plan.load(saved)


def test_a_changed_plan_is_refused(saved: Path, tmp_path: Path) -> None:
    """A column edited in the file does not pass for the plan that was saved."""
    arrays = dict(np.load(saved))
    for name in ("sequence", "steps"):
        changed = tmp_path / f"{name}.npz"
        np.savez(changed, **(arrays | {name: arrays[name] + 1}))
        with pytest.raises(ValueError, match="was changed after it was saved"):
            Plan.load(changed)
    np.savez(tmp_path / "lane.npz", **(arrays | {"lane": arrays["lane"] + 4}))
    with pytest.raises(ValueError, match="lies outside the grid"):
        Plan.load(tmp_path / "lane.npz")


def test_a_plan_of_another_version_is_refused(saved: Path) -> None:
    """Naming both versions."""
    arrays = dict(np.load(saved))
    header = json.loads(str(arrays["header"])) | {"version": 1}
    np.savez(saved, **(arrays | {"header": np.array(json.dumps(header))}))
    with pytest.raises(ValueError, match="plan format version 1, this seqbatch reads version 2"):
        Plan.load(saved)


@pytest.mark.parametrize("content", ["npy", "npz", "zip", "text"])
def test_files_of_another_kind_are_refused(content: str, tmp_path: Path) -> None:
    """With the advice to make the plan again, and no pickle is ever opened."""
    path = tmp_path / "plan.npz"
    if content == "npy":
        with path.open("wb") as file:
            np.save(file, np.array([{"a": 1}]), allow_pickle=True)
    elif content == "npz":
        np.savez(path, sequence=np.arange(3))
    elif content == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.txt", "b")
    else:
        path.write_text("1\n2\n3\n")
    with pytest.raises(ValueError, match="not a plan file"):
        Plan.load(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    """The operating system's own errors, which name the path."""
    with pytest.raises(FileNotFoundError, match=r"nothing.npz"):
        Plan.load(tmp_path / "nothing.npz")
    with pytest.raises(IsADirectoryError):
        Plan.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is no folder to write plan\.npz to"):
        Padding(2).plan(LENGTHS).save(tmp_path / "nowhere" / "plan.npz")


def test_ranks_may_save_the_same_plan_at_once(tmp_path: Path) -> None:
    """Each writes a file of its own and puts it in place; a broken one is never seen."""
    plan, path = Packing(64).plan(np.arange(1, 50)), tmp_path / "plan.npz"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: plan.save(path), range(40)))

    assert Plan.load(path).digest == plan.digest
    assert [p.name for p in tmp_path.iterdir()] == ["plan.npz"]


def test_settings_changed_in_a_file_are_noticed(saved: Path) -> None:
    """The seed decides the order of ranks, though not which sequences meet."""
    arrays = dict(np.load(saved))
    header = json.loads(str(arrays["header"]))
    header["settings"]["seed"] = 5
    np.savez(saved, **(arrays | {"header": np.array(json.dumps(header))}))
    with pytest.raises(ValueError, match="is truncated or changed"):
        Plan.load(saved)


def test_counts_beyond_int64_are_refused() -> None:
    """Not wrapped around."""
    with pytest.raises(ValueError, match=r"more than 2\*\*62 cells"):
        Padding(1024, shuffle=False).plan([2**55] + [1] * 1023)
    with pytest.raises(ValueError, match=r"batch_size must be at most 2\*\*62"):
        Padding(2**70)
    assert (Splicing(1, 2**40).plan([4 * 10**9, 2]).costs((0.0, 1.0)) > 1.5e19).all()


def test_columns_that_do_not_fit_together_are_refused() -> None:
    """Naming the column and the shape it should have."""
    plan = Padding(2).plan(LENGTHS)
    with pytest.raises(ValueError, match=r"column lane has shape \(3,\), expected \(7,\)"):
        replace(plan, lane=np.arange(3))
    with pytest.raises(ValueError, match="batch_ptr must rise from 0 to the 7 pieces"):
        replace(plan, batch_ptr=plan.batch_ptr + 1)
    assert plan.dropped.dtype == DROPPED
