"""Streams: every token once over ranks and workers, a bounded buffer, exact resume, ranks that end in step."""

import gc
import json
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

import seqbatch.stream_base
import seqbatch.stream_source
from seqbatch import BucketStream, PackStream, SpliceStream, StreamLoader
from seqbatch.stream_plans import Open, plan_windows

KINDS = {
    "bucket": partial(BucketStream, max_tokens=24, buffer_tokens=70),
    "pack": partial(PackStream, capacity=12, rows=2, buffer_tokens=60),
    "splice": partial(SpliceStream, num_lanes=4, chunk_size=5, buffer_tokens=30),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def lengths_of(count, seed=0):
    """Lengths from 0 to 12, two of them 0."""
    lengths = np.random.default_rng(seed).integers(1, 13, count)
    lengths[[3, count - 1]] = 0
    return lengths


def items_of(count, epoch=0, seed=0):
    """Item i: the tokens 100 * i, 100 * i + 1, ...: every token of the source is a number of its own."""
    return [torch.arange(length) + 100 * i for i, length in enumerate(lengths_of(count, seed).tolist())]


def generate(count, epoch=0):
    """The same as a one-shot generator."""
    yield from items_of(count)


def tokens_of(batches):
    """All real tokens, in the order of the batches."""
    return [token for batch in batches for token in batch.flatten(batch.data).tolist()]


def same(one, other):
    """Whether two batches are equal, flags and all."""
    return (
        torch.equal(one.data, other.data)
        and torch.equal(one.mask, other.mask)
        and torch.equal(one.reset, other.reset)
        and np.array_equal(one.placement.sequence, other.placement.sequence)
        and one.position == other.position
    )


@every_kind
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", [items_of(83), partial(generate, 83)], ids=["indexable", "callable"])
def test_every_token_once_over_ranks_and_workers(make, workers, source):
    """Three ranks, which know nothing of each other, give every token once together."""
    everything = []
    for rank in range(3):
        stream = make(source, rank=rank, num_replicas=3, seed=5)
        loader = StreamLoader(stream, num_workers=workers)
        mine = list(loader)
        assert {i % 3 for batch in mine for i in batch.placement.sequence.tolist()} == {rank}
        assert all(
            (b.placement.sequence == b.flatten(b.data)[b.cu_seqlens[:-1].long()].numpy() // 100).all() for b in mine
        )
        everything += tokens_of(mine)

    assert sorted(everything) == torch.cat(items_of(83)).tolist()


@every_kind
def test_empty_items_are_counted(make):
    """Two items hold nothing; the sum over ranks says so."""
    loaders = [StreamLoader(make(items_of(40), rank=rank, num_replicas=3)) for rank in range(3)]
    for loader in loaders:
        list(loader)

    assert sum(loader.dropped.get("empty", (0, 0))[0] for loader in loaders) == 2


def test_budget_and_shapes():
    """No batch is over its budget, and packed ones have one shape; pools are nearly full."""
    items = items_of(400)
    buckets = list(BucketStream(items, max_tokens=24, buffer_tokens=500))
    packs = list(PackStream(items, capacity=12, rows=2, buffer_tokens=500))

    assert all(batch.mask.numel() <= 24 for batch in buckets)
    assert {batch.data.shape for batch in packs} == {(12, 2)}
    for batches in (buckets, packs):
        assert sum(b.placement.tokens for b in batches) / sum(b.mask.numel() for b in batches) > 0.85


@pytest.mark.parametrize(
    ("policy", "kept", "dropped"),
    [("split", 40, {}), ("truncate", 14, {"overlong": (1, 20)}), ("drop", 4, {"overlong": (1, 30)})],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_overlong_items(policy, kept, dropped, workers):
    """An item of 30 tokens where 10 fit: the strategies' policies, and a count of what they leave out."""
    items = [torch.arange(4), torch.arange(30) + 100]
    if policy == "split":
        items = [torch.arange(10), items[1]]
    for stream in (
        BucketStream(items, max_tokens=10, overlong=policy, buffer_tokens=10),
        PackStream(items, capacity=10, overlong=policy, buffer_tokens=10),
    ):
        loader = StreamLoader(stream, num_workers=workers)

        assert len(tokens_of(loader)) == kept
        assert loader.dropped == dropped


def test_an_overlong_item_is_an_error_that_names_it():
    """By its number in the source, not in the buffer."""
    items = [torch.arange(8)] * 5 + [torch.arange(11)]
    with pytest.raises(ValueError, match=r"11 tokens, is number 5 of the source.*max_tokens=10"):
        list(BucketStream(items, max_tokens=10, buffer_tokens=16))


@every_kind
def test_the_same_again_and_another_epoch(make):
    """The same seed and epoch give the same batches; pools meet others in the next epoch."""
    items = items_of(60)
    first, again = list(make(items, seed=1)), list(make(items, seed=1))
    stream = make(items, seed=1)
    stream.set_epoch(1)
    other = list(stream)

    assert len(first) == len(again) and all(map(same, first, again))
    assert sorted(tokens_of(first)) == sorted(tokens_of(other))
    assert (tokens_of(first) == tokens_of(other)) == (make is KINDS["splice"])
    if make is not KINDS["splice"]:
        assert tokens_of(first) != tokens_of(make(items, seed=2))


@every_kind
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resume_after_every_batch(make, workers):
    """A new loader that gets the state of a batch, through JSON, goes on exactly, to the next epoch too."""
    source = partial(generate, 37)

    def loader():
        return StreamLoader(make(source, rank=1, num_replicas=2, seed=3), num_workers=workers)

    whole = list(loader())
    assert len(whole) >= 7
    for done, batch in enumerate(whole, start=1):
        resumed = loader()
        state = json.loads(json.dumps(resumed.state_dict(after=batch)))
        assert resumed.load_state_dict(state | {"lanes": done}) == done
        rest = list(resumed)
        assert len(rest) == len(whole) - done
        assert all(map(same, rest, whole[done:]))
        assert resumed.epoch == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_without_the_recurrent_state(workers):
    """All lanes begin anew in the first batch, and only there; its position stays exact."""
    whole = list(StreamLoader(KINDS["splice"](items_of(40)), num_workers=workers))
    loader = StreamLoader(KINDS["splice"](items_of(40)), num_workers=workers)
    with pytest.raises(ValueError, match="the recurrent state must come along"):
        loader.load_state_dict(whole[2].position)
    assert loader.load_state_dict(whole[2].position, reset_lanes=True) is None
    rest = list(loader)

    assert whole[3].placement.continues.any()
    assert rest[0].reset[0].all() and torch.equal(rest[0].data, whole[3].data)
    assert rest[0].position == whole[3].position
    assert all(map(same, rest[1:], whole[4:])) and len(rest) == len(whole) - 3


@every_kind
def test_resume_counts_what_was_dropped_once(make):
    """Empty items of a pool that is read again are not counted again."""
    options = {} if make is KINDS["splice"] else {"overlong": "truncate"}
    items = [torch.arange(n) for n in (5, 0, 6, 0, 7, 30, 0, 3, 9, 0, 0, 4) * 3]
    whole = StreamLoader(make(items, **options))
    batches = list(whole)
    assert whole.dropped["empty"] == (15, 0)
    for batch in batches:
        loader = StreamLoader(make(items, **options))
        loader.load_state_dict(batch.position | {"lanes": 0})
        list(loader)
        assert loader.dropped == whole.dropped


def naive_lanes(items, num_lanes, chunk_size):
    """Write tokens on lanes one by one; return (data, mask, reset) of each window."""
    lanes = [[] for _ in range(num_lanes)]
    for item in items:
        lane = min(lanes, key=len)
        lane += [(token, place == 0) for place, token in enumerate(item.tolist())]
    windows = []
    for begin in range(0, max(map(len, lanes)), chunk_size):
        steps = min(chunk_size, max(map(len, lanes)) - begin)
        cut = [lane[begin : begin + steps] for lane in lanes]
        cut = [lane + [None] * (steps - len(lane)) for lane in cut]
        rows = list(zip(*cut, strict=True))
        data, reset = ([[cell[k] if cell else 0 for cell in row] for row in rows] for k in (0, 1))
        windows.append((data, reset, [[cell is not None for cell in row] for row in rows]))
    return windows


@pytest.mark.parametrize("buffer_tokens", [20, 47, 10_000])
@pytest.mark.parametrize("seed", range(4))
def test_splicing_equals_a_loop_that_writes_tokens(buffer_tokens, seed):
    """Data, mask and reset, whatever the buffer."""
    items = items_of(70, seed=seed)
    items[20] = torch.arange(300) + 100_000
    expected = naive_lanes(items, 4, 5)
    batches = list(SpliceStream(items, num_lanes=4, chunk_size=5, buffer_tokens=buffer_tokens))

    assert [(b.data.tolist(), b.reset.tolist(), b.mask.tolist()) for b in batches] == expected
    assert all(batch.carry_in(torch.ones(1)) is not None for batch in batches)


def test_workers_of_a_spliced_stream_share_the_lanes():
    """Lanes 0 and 1 are those of worker 0, over all windows; tokens follow each other in their lane."""
    batches = list(StreamLoader(SpliceStream(items_of(61), num_lanes=4, chunk_size=5), num_workers=2))
    expected = [naive_lanes(items_of(61)[worker::2], 2, 5) for worker in range(2)]

    for number, batch in enumerate(batches):
        assert batch.loss_tokens == int(batch.mask.sum()) and batch.placement.lanes == 4
        for worker in range(2):
            lanes = slice(2 * worker, 2 * worker + 2)
            if number < len(expected[worker]):
                data, reset, mask = (torch.tensor(part) for part in expected[worker][number])
                steps = len(data)
                assert torch.equal(batch.data[:steps, lanes], data)
                assert torch.equal(batch.reset[:steps, lanes], reset.bool())
                assert torch.equal(batch.mask[:steps, lanes], mask)
            else:
                steps = 0
            assert not batch.mask[steps:, lanes].any()
    assert len(batches) == max(map(len, expected))


@pytest.mark.parametrize("seed", range(5))
def test_windows_do_not_depend_on_how_much_is_known(seed):
    """Dealing in portions of any size cuts the windows of dealing all at once."""
    rng = np.random.default_rng(seed)
    lengths, lanes, chunk = rng.integers(1, 40, 200), int(rng.integers(1, 9)), int(rng.integers(1, 12))
    expected = [(p.sequence, p.start, p.lane) for p in plan_windows(np.arange(200), lengths, lanes, chunk).placements()]
    found, opened, at, known = [], Open.nothing(), 0, 0
    while known < 200:
        known = min(known + int(rng.integers(1, 30)), 200)
        plan = plan_windows(np.arange(at, known), lengths[at:known], lanes, chunk, opened=opened, final=known == 200)
        found += [(p.sequence, p.start, p.lane) for p in plan.placements()]
        if len(plan.plan):
            at += int(np.searchsorted(plan.begin, chunk * len(plan.plan)))
            opened = plan.open_after(len(plan.plan) - 1)

    assert len(found) == len(expected)
    assert all(
        np.array_equal(a, b)
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one, other, strict=True)
    )


class Counted:
    """Items that count how many tokens of them are alive."""

    alive = most = 0

    def __init__(self, length):
        self.length = length
        Counted.alive += length
        Counted.most = max(Counted.most, Counted.alive)

    def __len__(self):
        return self.length

    def __del__(self):
        Counted.alive -= self.length

    def __array__(self, dtype=None, copy=None):
        return np.zeros(self.length, np.int64)


@every_kind
def test_the_buffer_is_bounded(make):
    """No more than `buffer_tokens` and one item are alive; of a spliced stream also the items open in lanes."""
    Counted.alive = Counted.most = 0
    rng = np.random.default_rng(0)
    stream = make(lambda epoch: (Counted(int(n)) for n in rng.integers(0, 12, 3000)), buffer_tokens=200)
    tokens = sum(batch.placement.tokens for batch in stream)

    longest, opened = 11, 4 if make is KINDS["splice"] else 0
    assert tokens > 15_000
    assert 200 <= Counted.most <= 200 + (1 + opened) * longest + longest


def test_fields_targets_and_labels():
    """Dict items: two per-token fields, a label, next tokens across windows; what bare DataLoaders give is the same."""
    items = [{"x": list(range(10 * i, 10 * i + 3 + i)), "y": [float(i)] * (3 + i), "id": i} for i in range(8)]
    options = {"per_sequence": ["id"], "next_token": "x", "padding_value": {"x": -1}, "layout": "batch_first"}
    for stream in (
        BucketStream(items, max_tokens=20, **options),
        SpliceStream(items, num_lanes=2, chunk_size=4, **options),
    ):
        for loader in (StreamLoader(stream), StreamLoader(stream, num_workers=2), DataLoader(stream, batch_size=None)):
            pairs = []
            for batch in loader:
                counted = batch.loss_mask
                assert torch.equal(batch.targets[counted], batch.data["x"][counted] + 1)
                assert (batch.data["x"][~batch.mask] == -1).all() and (batch.targets[~counted] == -100).all()
                assert batch.loss_tokens == int(counted.sum()) == batch.step_loss_tokens
                assert batch.per_sequence["id"].tolist() == batch.placement.sequence.tolist()
                pairs += batch.data["x"][counted].tolist()
            assert sorted(pairs) == [10 * i + t for i in range(8) for t in range(2 + i)]


# Ranks that come to their ends at different steps.


def run_rank(rank, folder):
    """One of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for ends in ("until_first", "until_last"):
        torch.save(run_ends(rank, ends), f"{folder}/{ends}{rank}.pt")
    dist.destroy_process_group()


def run_ends(rank, ends):
    """What a rank gives, of every kind; stopped and resumed; and while the other one fails."""
    out = {}
    for name, make in KINDS.items():
        loader = StreamLoader(make(uneven), ends=ends, sync_every=3)
        batches = list(loader)
        out[name] = {
            "tokens": tokens_of(batches),
            "loss": [batch.loss_tokens for batch in batches],
            "step_loss": [batch.step_loss_tokens for batch in batches],
            "scale": [batch.loss_scale for batch in batches],
            "shape": tuple(batches[-1].data.shape),
            "masked": not bool(batches[-1].mask.any()),
            "unused": tuple(loader.unused),
        }
        middle = batches[4]
        loader.load_state_dict(loader.state_dict(after=middle, lanes=torch.zeros(1)))
        rest = list(loader)
        out[name]["resumed"] = len(rest) == len(batches) - 5 and all(map(same, rest, batches[5:]))
        out[name]["resumed"] &= [b.step_loss_tokens for b in rest] == out[name]["step_loss"][5:]
    broken = StreamLoader(KINDS["pack"](breaking if rank else uneven), sync_every=3, ends=ends)
    try:
        list(broken)
    except (ValueError, RuntimeError) as error:
        out["error"] = f"{type(error).__name__}: {error}"
    return out


def uneven(epoch):
    """Odd items, those of rank 1, are shorter."""
    for i in range(90):
        yield torch.arange(10 if i % 2 == 0 else 4) + 100 * i


def breaking(epoch):
    """A source that fails in its third pool."""
    yield from list(uneven(epoch))[:70]
    raise ValueError("the disk is gone")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes gave, by how they end."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (str(folder),), nprocs=2)
    both = ("until_first", "until_last")
    return {ends: [torch.load(folder / f"{ends}{rank}.pt") for rank in range(2)] for ends in both}


@pytest.mark.parametrize("ends", ["until_first", "until_last"])
def test_uneven_ranks_stay_in_step(ends, ranks):
    """Both ranks take the same number of steps and agree on the loss tokens of each."""
    zero, one = ranks[ends]
    items = list(uneven(0))
    assert zero["error"].startswith("RuntimeError: 1 of the 2 ranks failed while reading")
    assert one["error"].startswith("ValueError: the disk is gone")
    for name in KINDS:
        a, b = zero[name], one[name]
        assert len(a["loss"]) == len(b["loss"])
        assert a["step_loss"] == b["step_loss"] == [x + y for x, y in zip(a["loss"], b["loss"], strict=True)]
        assert a["scale"] == [2 / tokens for tokens in a["step_loss"]]
        assert a["resumed"] and b["resumed"]
        assert len(set(a["tokens"])) == len(a["tokens"]) and set(b["tokens"]) <= set(torch.cat(items[1::2]).tolist())
        if ends == "until_last":
            assert Counter(a["tokens"] + b["tokens"]) == Counter(torch.cat(items).tolist())
            assert b["masked"] and b["shape"] == (1, {"bucket": 1, "pack": 2, "splice": 4}[name])
            assert a["unused"] == b["unused"] == (0, 0, True)
        else:
            assert sorted(b["tokens"]) == torch.cat(items[1::2]).tolist() and not b["masked"]
            batches, tokens, complete = a["unused"]
            assert batches > 0 and tokens > 0 and b["unused"] == (0, 0, True)
            assert not complete or len(a["tokens"]) + tokens == 450


def test_a_single_process_ends_with_its_data():
    """No process group: nothing is exchanged, nothing is unused."""
    loader = StreamLoader(PackStream(items_of(30), capacity=12), ends="until_last")
    assert sorted(tokens_of(loader)) == torch.cat(items_of(30)).tolist()
    assert loader.unused == (0, 0, True)


# What is refused, and how.


@pytest.mark.parametrize("item", [torch.tensor(3), 3, "abc", np.float64(2)], ids=["tensor", "int", "text", "numpy"])
def test_an_item_without_length(item):
    """The message names it."""
    with pytest.raises(ValueError, match=r"(item|sequence) 1 .*(fields|per_sequence)=\["):
        list(PackStream([torch.arange(3), item], capacity=4))


def test_an_error_of_the_source_in_a_worker_arrives():
    """With its type and text."""
    loader = StreamLoader(PackStream(breaking, capacity=12, buffer_tokens=60), num_workers=1)
    with pytest.raises(ValueError, match="the disk is gone"):
        list(loader)
    del loader
    gc.collect()  # torch waits five seconds for a worker that failed: here, not in a later test


def test_a_one_shot_iterator(monkeypatch):
    """It serves one epoch of one process; then the message says what to do. A callable serves all."""
    loader = StreamLoader(PackStream(generate(20), capacity=12))
    assert sorted(tokens_of(loader)) == torch.cat(items_of(20)).tolist()
    with pytest.raises(ValueError, match=r"one-shot iterator \(generator\) that was read before.*pass a callable"):
        list(loader)
    epochs = []
    loader = StreamLoader(PackStream(lambda epoch: epochs.append(epoch) or generate(20), capacity=12))
    assert len(list(loader)) == len(list(loader)) and epochs == [0, 1]
    monkeypatch.setattr(seqbatch.stream_source, "get_worker_info", lambda: SimpleNamespace(id=0, num_workers=1))
    with pytest.raises(ValueError, match=r"one-shot iterator .* which worker processes would share"):
        list(PackStream(iter(items_of(20)), capacity=12))


def test_workers_without_stream_loader(monkeypatch):
    """Windows of several workers in turn would mix the state of their lanes."""
    monkeypatch.setattr(seqbatch.stream_base, "get_worker_info", lambda: SimpleNamespace(id=0, num_workers=2))
    with pytest.raises(ValueError, match="use StreamLoader, which joins the workers' lanes"):
        list(SpliceStream([], num_lanes=4, chunk_size=2))


def test_no_targets_unless_asked_for():
    """None is no, as in a loader."""
    batch = next(iter(StreamLoader(KINDS["pack"](items_of(40), next_token=None))))
    assert batch.targets is None


def test_a_state_of_another_stream():
    """The message says what differs, and the loader stays as it was."""
    items = items_of(40)
    batch = next(iter(StreamLoader(KINDS["pack"](items, seed=1))))
    for make, difference in (
        (partial(KINDS["pack"], seed=2), "seed is 1, here 2"),
        (partial(KINDS["pack"], seed=1, num_replicas=2, rank=0), "num_replicas is 1, here 2"),
        (partial(KINDS["bucket"], seed=1), "PackStream.*here 'BucketStream"),
        (partial(PackStream, capacity=12, rows=2, buffer_tokens=61, seed=1), "buffer_tokens=60.*buffer_tokens=61"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another stream: .*{difference}"):
            StreamLoader(make(items)).load_state_dict(batch.position)
    loader = StreamLoader(KINDS["pack"](items, seed=1), num_workers=2)
    with pytest.raises(ValueError, match="num_workers=1, here it is 2"):
        loader.load_state_dict(batch.position)
    assert sorted(tokens_of(loader)) == torch.cat(items).tolist()
    with pytest.raises(ValueError, match="no state of a seqbatch stream"):
        loader.load_state_dict({"history": []})
    with pytest.raises(ValueError, match="several workers know theirs through StreamLoader"):
        loader.state_dict(after=next(iter(DataLoader(KINDS["pack"](items), batch_size=None, num_workers=2))))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (items_of(40)[:2], "which the source does not give: it must give the same"),
        ([item[:1] for item in items_of(40)], "shorter now: the source must give the same"),
    ],
    ids=["fewer", "shorter"],
)
def test_a_source_that_changed_is_noticed(changed, message):
    """The open items of a spliced stream must still be there."""
    batch = next(iter(SpliceStream(items_of(40), num_lanes=4, chunk_size=3)))
    stream = SpliceStream(lambda epoch: iter(changed), num_lanes=4, chunk_size=3)
    stream.load_state_dict(batch.position | {"lanes": 0})
    with pytest.raises(ValueError, match=message):
        list(stream)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PackStream({"a": [1]}, capacity=4), TypeError, "source must be an iterable .* got dict"),
        (lambda: PackStream(3, capacity=4), TypeError, "source must be an iterable .* got int"),
        (lambda: PackStream([], capacity=4, rows=8, buffer_tokens=31), ValueError, "buffer_tokens=31 holds less .* 32"),
        (lambda: BucketStream([], max_tokens=4, drop_last=True), ValueError, "drop_last would leave out"),
        (lambda: BucketStream([]), ValueError, "either max_tokens or batch_size"),
        (lambda: SpliceStream([], num_lanes=0, chunk_size=2), ValueError, "num_lanes must be at least 1"),
        (lambda: PackStream([], capacity=4, rank=1), ValueError, "rank and num_replicas go together"),
        (lambda: StreamLoader([1]), TypeError, "stream must be a BucketStream"),
        (lambda: StreamLoader(PackStream([], capacity=4), ends="never"), ValueError, "ends must be one of"),
        (lambda: StreamLoader(PackStream([], capacity=4), batch_size=4), ValueError, "stream decides batch_size"),
        (lambda: StreamLoader(PackStream([], capacity=4), persistent_workers=True), ValueError, "persistent_workers"),
        (
            lambda: StreamLoader(SpliceStream([], num_lanes=4, chunk_size=2), num_workers=3),
            ValueError,
            r"num_workers=3 does not divide the 4 lanes.*\[1, 2, 4\]",
        ),
    ],
)
def test_bad_settings(make, error, message):
    """Each says what came and what to do."""
    with pytest.raises(error, match=message):
        make()


@every_kind
def test_a_source_without_items(make):
    """No batch, no error."""
    assert list(StreamLoader(make([]))) == []
    assert list(StreamLoader(make([torch.arange(0)] * 5), num_workers=1)) == []
