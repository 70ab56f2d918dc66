"""What loaders refuse, and what they say: wrong data, wrong states, wrong ranks, files that cannot be written."""

import multiprocessing as mp
import os
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from loaders import DATA, LENGTHS, STRATEGIES, expected, load, seen, tokens_of
from torch.distributed.device_mesh import init_device_mesh

import seqbatch
from seqbatch import Bucketing, Packing, Padding, PieceDataset, PlanBatchSampler, TokenArray, make_loader
from seqbatch.measuring import dataset_lengths
from seqbatch.ranks import find_ranks

ROWS = [torch.arange(n) for n in (3, 1, 4, 2)]


def run(dataset: Any, strategy: Any = None, **options: Any) -> list[Any]:
    return list(make_loader(dataset, strategy or Padding(4), **{"lengths": [3, 1, 4, 2], **options}))


class Broken(list):
    """A dataset that fails at one item."""

    def __getitem__(self, index: Any) -> Any:
        if index == 2:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_lengths_that_disagree_with_the_data(num_workers: int) -> None:
    """The index and both numbers, from a list, from a flat array, and from a worker."""
    with pytest.raises(ValueError, match=r"sequence 2 has 4 rows .* but lengths\[2\] is 5"):
        run(ROWS, lengths=[3, 1, 5, 2], num_workers=num_workers)
    with pytest.raises(ValueError, match=r"sequence 0 has 3 tokens, but lengths\[0\] is 2"):
        run(TokenArray.of_sequences(ROWS), lengths=[2, 1, 4, 2], num_workers=num_workers)
    with pytest.raises(ValueError, match="3 lengths for a dataset of 4 sequences"):
        run(ROWS, lengths=[3, 1, 4])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_that_raises(num_workers: int) -> None:
    """Its own error comes through, from a worker too."""
    with pytest.raises(OSError, match="the disk is gone"):
        run(Broken(ROWS), num_workers=num_workers)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(4), r"the item of sequence 2 .*float32, but of sequence \d .*int64"),
        (torch.zeros(4, 2, dtype=torch.int64), r"rows of shape \(2,\)"),
        ("text", "not one row of numbers a token"),
        (torch.tensor(7), "declare it with per_sequence"),
    ],
)
def test_items_of_another_kind(item: Any, message: str) -> None:
    """Named with the index and what the others have."""
    with pytest.raises(ValueError, match=message):
        run([*ROWS[:2], item, ROWS[3]])


def test_fields_that_are_not_per_token() -> None:
    """An undeclared label, a field that is not there, and a name given as text."""
    rows = [{"x": row, "label": 1} for row in ROWS]
    with pytest.raises(ValueError, match=r"field 'label' of sequence \d is int 1"):
        run(rows)
    with pytest.raises(ValueError, match="but not 'y'"):
        run(rows, fields=["y"])
    with pytest.raises(ValueError, match=r"next_token must name the field .* \['x', 'y'\]"):
        run([{"x": row, "y": row} for row in ROWS], next_token=True)
    with pytest.raises(TypeError, match=r"write \['label'\]"):
        run(rows, per_sequence="label")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 4}, "the strategy decides batch_size"),
        ({"shuffle": True}, "the strategy decides shuffle"),
        ({"layout": "rows"}, "layout must be one of"),
        ({"rank": 1}, "rank and num_replicas go together"),
        ({"rank": 3, "num_replicas": 3}, r"rank must be in 0\.\.2"),
        ({"rank": "all"}, 'rank="all" needs num_replicas'),
        ({"tail": "keep"}, "tail must be one of"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"cost": (0, 0)}, "not both 0"),
        ({"train": False, "tail": "drop"}, "train=False leaves nothing out"),
        ({"as_dict": True, "next_token": True}, "leave next_token out"),
    ],
)
def test_settings(options: dict[str, Any], message: str) -> None:
    """What came, what is allowed."""
    with pytest.raises(ValueError, match=message):
        run(ROWS, **options)


def test_settings_that_drop_are_not_for_evaluation() -> None:
    """The message names the first sequence and the way out."""
    with pytest.raises(ValueError, match=r"drops 1 pieces, the first of sequence 2: choose overlong"):
        run(ROWS, Packing(3, overlong="drop"), train=False)
    assert len(run(ROWS, Padding(3, drop_last=True), train=False)) == 2
    with pytest.raises(TypeError, match="strategy must be one of seqbatch's"):
        run(ROWS, 32)


def test_plain_items_in_the_plans_collate() -> None:
    """The message names the wrapper and the collate functions for plain items."""
    sampler = PlanBatchSampler(Padding(2), [3, 1, 4, 2])
    with pytest.raises(TypeError, match="wrap the dataset in PieceDataset"):
        next(iter(torch.utils.data.DataLoader(ROWS, batch_sampler=sampler, collate_fn=seqbatch.collate)))
    with pytest.raises(ValueError, match="nothing to collate"):
        seqbatch.PadCollate()([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": LENGTHS + 1}, "lengths is"),
        ({"strategy": Padding(8)}, r"strategy is 'Padding\(7\)', here 'Padding\(8\)'"),
        ({"seed": 5}, "seed is 0, here 5"),
        ({"tail": "drop"}, "tail is 'split', here 'drop'"),
        ({"cost": (1.0, 0.5)}, "cost is"),
    ],
)
def test_states_of_another_run(change: dict[str, Any], message: str) -> None:
    """Refused with what differs; the sampler stays where it was."""
    state = load("padding").state_dict(after=next(iter(load("padding"))))
    settings: dict[str, Any] = {"strategy": STRATEGIES["padding"], "lengths": LENGTHS} | change
    sampler = PlanBatchSampler(**settings)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(state)
    assert len(sampler) == len(list(sampler))


def test_states_of_another_version() -> None:
    """A format of the future, another plan, and no state at all."""
    loader = load("padding")
    state = loader.state_dict(after=next(iter(loader)))
    with pytest.raises(ValueError, match="version is 99, here 1"):
        loader.load_state_dict(state | {"version": 99})
    with pytest.raises(ValueError, match="give another plan"):
        loader.load_state_dict(state | {"plan": "0" * 32})
    with pytest.raises(ValueError, match="this is no state"):
        loader.load_state_dict({"epoch": 1})
    with pytest.raises(ValueError, match="must be a batch of this loader"):
        loader.state_dict(after=torch.zeros(3))
    assert state == loader.state_dict(after=next(iter(load("padding")))), "loading must not change the state"


@pytest.mark.parametrize(
    ("tokens", "offsets", "message"),
    [
        ([1, 2, 3], [0, 2, 1, 3], "rising integers"),
        ([1, 2, 3], [0, 2], "from 0 to the number of tokens"),
        ([1, 2, 3], [1, 3], "from 0 to the number of tokens"),
        ([1, 2, 3], [], "rising integers"),
    ],
)
def test_offsets_of_another_array(tokens: list[int], offsets: list[int], message: str) -> None:
    """They must cut the tokens there are."""
    with pytest.raises(ValueError, match=message):
        TokenArray(tokens, offsets)


def test_a_mapped_array_travels_by_name(tmp_path: Path) -> None:
    """Saved, mapped, sent to spawned workers without its contents, and the same batches."""
    import pickle

    DATA.save(tmp_path / "data")
    mapped = TokenArray.load(tmp_path / "data")
    assert isinstance(mapped.tokens, np.memmap)
    assert len(pickle.dumps(mapped)) < len(pickle.dumps(DATA)) - DATA.tokens.nbytes // 2
    again = pickle.loads(pickle.dumps(mapped))
    assert isinstance(again.tokens, np.memmap) and np.array_equal(again.tokens, DATA.tokens)
    part = TokenArray(mapped.tokens[3:9], [0, 2, 6])  # a slice knows the file, but not where in it
    assert pickle.loads(pickle.dumps(part)).tokens.tolist() == DATA.tokens[3:9].tolist()
    loader = make_loader(mapped, STRATEGIES["packing"], num_workers=1, multiprocessing_context="spawn")
    assert all(torch.equal(a.data, b.data) for a, b in zip(loader, load("packing"), strict=True))


def test_measured_lengths_are_kept(tmp_path: Path) -> None:
    """Measured once, in parallel or not; read again; measured again when the data change."""
    rows, cache = [tokens_of(i, n) for i, n in enumerate(LENGTHS.tolist())], tmp_path / "lengths.npz"
    assert dataset_lengths(rows, num_workers=2, cache=cache).tolist() == LENGTHS.tolist()
    assert cache.exists()

    class Unread(list):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            Unread.reads += 1
            return super().__getitem__(index)

    many = [torch.arange(n % 7) for n in range(500)]
    first = dataset_lengths(Unread(many), cache=tmp_path / "many.npz")
    Unread.reads = 0
    assert np.array_equal(dataset_lengths(Unread(many), cache=tmp_path / "many.npz"), first)
    assert Unread.reads <= 64
    many[0] = torch.arange(5)
    assert dataset_lengths(Unread(many), cache=tmp_path / "many.npz")[0] == 5
    assert dataset_lengths(Unread(many[:-1]), cache=tmp_path / "many.npz").shape == (499,)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning, and the lengths all the same; a broken file is measured again."""
    with pytest.warns(UserWarning, match="could not be kept in"):
        assert dataset_lengths(ROWS, cache=tmp_path / "no folder" / "lengths.npz").tolist() == [3, 1, 4, 2]
    if Path("/dev/full").exists():
        full = tmp_path / "full"
        full.mkdir()
        disk = os.open("/dev/full", os.O_RDWR), str(full / "lengths.npz.partial")
        monkeypatch.setattr(tempfile, "mkstemp", lambda **_: disk)
        with pytest.warns(UserWarning, match="No space left"):
            assert dataset_lengths(ROWS, cache=full / "lengths.npz").tolist() == [3, 1, 4, 2]
        assert not (full / "lengths.npz").exists()
        monkeypatch.undo()
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a file")
    assert dataset_lengths(ROWS, cache=tmp_path / "broken.npz").tolist() == [3, 1, 4, 2]
    assert dataset_lengths(ROWS, cache=tmp_path / "broken.npz").tolist() == [3, 1, 4, 2]


def test_items_without_a_length() -> None:
    """The message says how to name what to count."""
    with pytest.raises(ValueError, match="pass lengths, or name the field"):
        dataset_lengths([1, 2])
    with pytest.raises(ValueError, match="but not 'z'"):
        dataset_lengths([{"x": [1]}], fields=["z"])


def test_a_launcher_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank would take all data: a warning."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(UserWarning, match="WORLD_SIZE is 4, but torch.distributed is not initialised"):
        assert find_ranks(None, None) == (0, 1, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_ranks(1, 2)[:2] == (1, 2)


def _rank(rank: int, store: str, queue: Any) -> None:
    """What one of two real ranks sees; results go to the parent."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name, options in {
        "seed": {"seed": rank},
        "lengths": {"lengths": LENGTHS if rank else LENGTHS[::-1].copy()},
        "strategy": {"strategy": Padding(5 + rank)},
        "epoch": {"epoch": rank},
        "accumulation": {"accumulation": 1 + rank},
    }.items():
        settings: dict[str, Any] = {"strategy": Bucketing(max_tokens=80), "lengths": LENGTHS} | options
        try:
            next(iter(PlanBatchSampler(**settings)))
        except ValueError as error:
            results[name] = str(error)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "dp"))
    sampler = PlanBatchSampler(Padding(7), LENGTHS, mesh=mesh)
    results["mesh"] = (sampler.ranks, sampler.num_replicas, [list(batch) for batch in sampler])
    results["own"] = [list(batch) for batch in PlanBatchSampler(Padding(7), LENGTHS)]
    try:
        PlanBatchSampler(Padding(7), LENGTHS, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "tp")))
    except ValueError as error:
        results["no dp"] = str(error)
    state = (torch.full((1, 3, 2), float(rank)), [torch.full((3, 2), float(rank))])
    whole = seqbatch.gather_lanes(state)
    results["lanes"] = whole[0][0, :, 0].tolist()
    results["back"] = seqbatch.scatter_lanes(whole, rank, 2)[1][0][:, 0].tolist()
    results["count"] = seqbatch.global_loss_tokens([torch.ones(2 + rank, dtype=torch.bool)])
    queue.put((rank, results))
    dist.destroy_process_group()


def test_ranks_that_do_not_agree(tmp_path: Path) -> None:
    """Two processes: what differs is an error on both, not a hang; a mesh, lanes and counts."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path / "store"), queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = dict(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    for own in results.values():
        assert "rank 1 (rank 0) has seed=1 (0)" in own["seed"]
        for name in ("lengths", "strategy", "epoch", "accumulation"):
            assert f"{name}=" in own[name], own[name]
        assert "none is named 'dp'" in own["no dp"]
        assert own["lanes"] == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
        assert own["count"] == 5
    for rank in range(2):
        wanted = [list(batch) for batch in PlanBatchSampler(Padding(7), LENGTHS, rank=rank, num_replicas=2)]
        assert results[rank]["mesh"] == ((rank,), 2, wanted)
        assert results[rank]["own"] == wanted
        assert results[rank]["back"] == [float(rank)] * 3


def test_scattering_lanes_to_ranks_that_do_not_divide_them() -> None:
    """Both numbers are named."""
    with pytest.raises(ValueError, match="6 lanes, which num_replicas=4 does not divide"):
        seqbatch.scatter_lanes(torch.zeros(1, 6, 2), 0, 4)


def test_a_group_and_a_rank_exclude_each_other() -> None:
    """One says it all."""
    with pytest.raises(ValueError, match="not both"):
        find_ranks(0, 1, mesh=object())


def test_pieces_of_plain_indices() -> None:
    """Without a plan's indices the wrapper is the dataset itself."""
    wrapped = PieceDataset(ROWS)
    assert len(wrapped) == 4 and wrapped[2] is ROWS[2] and wrapped.__getitems__([1, 3])[1] is ROWS[3]


class Deadly(list):
    """A dataset whose worker is killed at one item."""

    def __getitem__(self, index: Any) -> Any:
        if index == self.victim and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_is_killed() -> None:
    """The loop ends with torch's error; resumed after its last batch, nothing is lost and nothing comes twice."""
    rows = [tokens_of(i, n) for i, n in enumerate(LENGTHS.tolist())]
    deadly = Deadly(rows)
    deadly.victim = int(list(load("token budget").batch_sampler)[5][0])
    loader = make_loader(deadly, STRATEGIES["token budget"], lengths=LENGTHS, num_workers=2)
    done: list[Any] = []
    with pytest.raises(RuntimeError, match=r"is killed by signal|exited unexpectedly"):
        done.extend(batch for batch in loader)
    assert done
    again = make_loader(rows, STRATEGIES["token budget"], lengths=LENGTHS)
    again.load_state_dict(loader.state_dict(after=done[-1]))
    assert seen([*done, *again]) == expected(again.plan)
