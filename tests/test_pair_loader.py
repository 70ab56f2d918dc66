"""Batches of pairs: what a loader yields of them, through workers, ranks and resume, and what is refused."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import StackDataset

from seqbatch import Bucketing, Padding, PairBatch, PieceDataset, PlanBatchSampler, TokenArray, make_loader, stitch

RNG = np.random.default_rng(0)
LENGTHS = np.stack([RNG.integers(1, 9, 60), RNG.integers(1, 14, 60)], axis=1)
SOURCES = [100 * i + np.arange(n) for i, n in enumerate(LENGTHS[:, 0])]
TARGETS = [-100 * i - np.arange(n) - 1 for i, n in enumerate(LENGTHS[:, 1])]
STRATEGIES = [Padding(7), Bucketing(max_tokens=90), Bucketing(max_tokens=90, num_buckets=5, static_shapes=True)]


def stacked() -> StackDataset:
    return StackDataset(source=TokenArray.of_sequences(SOURCES), target=TokenArray.of_sequences(TARGETS))


DATASETS = {
    "stacked arrays": stacked,
    "dicts": lambda: [{"source": s, "target": t} for s, t in zip(SOURCES, TARGETS, strict=True)],
    "tuples": lambda: [(torch.tensor(s), torch.tensor(t)) for s, t in zip(SOURCES, TARGETS, strict=True)],
    "stacked tuples": lambda: StackDataset(TokenArray.of_sequences(SOURCES), TokenArray.of_sequences(TARGETS)),
}


def rows(batch: PairBatch) -> dict[int, tuple[list[int], list[int]]]:
    """Index of each pair: its source and its target, as they lie in the batch."""
    sides = (batch.source.unbatch(), batch.target.unbatch())
    return {
        int(index): (source.tolist(), target.tolist())
        for index, source, target in zip(batch.placement.sequence, *sides, strict=True)
    }


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("layout", ["time_major", "batch_first", "flat"])
@pytest.mark.parametrize("kind", DATASETS)
def test_every_pair_comes_once_with_both_sides(kind: str, layout: str, strategy: Padding) -> None:
    """Data, masks and shapes are those of the plan, whatever the items are."""
    loader = make_loader(DATASETS[kind](), strategy, lengths=LENGTHS, layout=layout)
    plan, seen = loader.plan, {}
    order = loader.plan.assign(0, 1)[0]
    for number, batch in zip(order, loader, strict=True):
        keys = (0, 1) if "tuples" in kind else ("source", "target")
        assert batch.keys == keys
        source, target = batch
        assert batch[keys[0]] is source
        assert batch.data[keys[1]] is target.data
        for side in range(2):
            shape = (int(plan.steps[number, side]), int(plan.lanes[number]))
            wanted = {"time_major": shape, "batch_first": shape[::-1], "flat": (batch[keys[side]].placement.tokens,)}
            assert tuple(batch.data[keys[side]].shape) == wanted[layout]
        if layout != "flat":
            assert int(batch.mask[keys[0]].sum()) == source.placement.tokens
        assert (source.placement.sequence == target.placement.sequence).all()
        assert (source.placement.lane == target.placement.lane).all()
        seen |= rows(batch)
    assert seen == {i: (SOURCES[i].tolist(), TARGETS[i].tolist()) for i in range(len(LENGTHS))}


def test_loss_is_that_of_the_targets() -> None:
    """Next tokens of the second side; counts are of the whole step."""
    loader = make_loader(stacked(), Padding(6, shuffle=False), lengths=LENGTHS, next_token="target", accumulation=2)
    batches = list(loader)
    for batch in batches:
        assert batch.source.targets is None
        assert batch.loss_tokens == int(batch.target.loss_mask.sum()) == int((batch.target.targets != -100).sum())
        assert torch.equal(
            batch.target.targets[:-1][batch.target.loss_mask[:-1]], batch.target.data[1:][batch.target.mask[1:]]
        )
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert first.step_loss_tokens == first.loss_tokens + second.loss_tokens == second.step_loss_tokens
        assert (first.update, second.update) == (False, True)
    assert sum(batch.loss_tokens for batch in batches) == (LENGTHS[:, 1] - 1).sum()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_resume_on_other_ranks(num_workers: int) -> None:
    """Three steps on two ranks, then the rest on three: every pair once; a batch keeps its position on its way."""
    settings = {"lengths": LENGTHS, "seed": 3, "num_replicas": 2}
    seen, state = {}, None
    for rank in range(2):
        loader = make_loader(stacked(), Bucketing(max_tokens=60), rank=rank, num_workers=num_workers, **settings)
        for batch in itertools.islice(loader, 3):
            seen |= rows(batch)
            state = loader.state_dict(after=batch)
    for rank in range(3):
        loader = make_loader(stacked(), Bucketing(max_tokens=60), rank=rank, **settings | {"num_replicas": 3})
        loader.load_state_dict(state)
        for batch in loader:
            assert not set(rows(batch)) & set(seen)
            seen |= rows(batch)
    assert len(seen) == len(LENGTHS)


def test_a_rank_without_a_lane_gets_an_empty_one() -> None:
    """Shapes and dtypes as if there were a pair."""
    loaders = [
        make_loader(data(), Padding(60), lengths=LENGTHS, rank=2, num_replicas=61)
        for data in (DATASETS["stacked arrays"], DATASETS["dicts"])
    ]
    lanes = {
        make_loader(stacked(), Padding(60), lengths=LENGTHS, rank=r, num_replicas=61).plan.lanes[0] for r in (0, 60)
    }
    assert lanes == {60}
    for loader in loaders:
        (batch,) = loader
        assert batch.source.data.dtype == batch.target.data.dtype == torch.int64
    empty = [
        b for r in range(61) for b in make_loader(stacked(), Padding(60), lengths=LENGTHS, rank=r, num_replicas=61)
    ]
    assert sorted(len(b.placement.length) for b in empty) == [0] + [1] * 60


def test_labels_come_with_the_pair() -> None:
    """One value a pair, in the order of the lanes."""
    data = [{"source": s, "target": t, "id": i} for i, (s, t) in enumerate(zip(SOURCES, TARGETS, strict=True))]
    for batch in make_loader(data, Padding(7), lengths=LENGTHS, per_sequence=["id"], fields=["source", "target"]):
        assert batch.per_sequence["id"].tolist() == batch.placement.sequence.tolist()
    (swapped,) = make_loader(
        data, Padding(60), lengths=LENGTHS[:, ::-1], per_sequence=["id"], fields=["target", "source"]
    )
    assert swapped.keys == ("target", "source")


def test_a_batch_travels() -> None:
    """Through pickle and to a device, with both sides."""
    batch = next(iter(make_loader(stacked(), Padding(7), lengths=LENGTHS, padding_value={"source": 9})))
    again = pickle.loads(pickle.dumps(batch))

    assert torch.equal(again.to("cpu").source.data, batch.source.data)
    assert again.position == batch.position
    assert (batch.source.data[~batch.source.mask] == 9).all()
    assert (batch.target.data[~batch.target.mask] == 0).all()
    assert "PairBatch of 'source'" in repr(batch)
    with pytest.raises(KeyError, match="has no 'src'"):
        batch["src"]


def test_hugging_face_models_get_their_arguments() -> None:
    """Sources, their mask, and labels that ignore padding."""
    loader = make_loader(stacked(), Padding(7), lengths=LENGTHS, as_dict=True)
    for inputs in loader:
        assert set(inputs) == {"input_ids", "attention_mask", "labels"}
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape
        assert len(inputs["labels"]) == len(inputs["input_ids"])
        assert int((inputs["labels"] != -100).sum()) == LENGTHS[inputs.placement.sequence, 1].sum()
    with pytest.raises(ValueError, match="leave next_token and layout='flat' out"):
        next(iter(make_loader(stacked(), Padding(7), lengths=LENGTHS, as_dict=True, next_token=True)))


def test_a_rank_without_a_lane_learns_its_dtypes_from_a_whole_pair() -> None:
    """Not from one whose source is empty, a list that says nothing of its tokens."""
    data = [([], [1, 2]), *(([3, 4], [5]) for _ in range(5))]
    lengths = [(len(source), len(target)) for source, target in data]
    for rank in range(4):
        for batch in make_loader(data, Padding(1, shuffle=False), lengths=lengths, rank=rank, num_replicas=4):
            assert batch.source.data.dtype == batch.target.data.dtype == torch.int64


def test_sides_of_a_stack_have_one_field() -> None:
    """Which may be named; with several it is not clear which are the tokens."""
    stack = StackDataset([{"ids": s} for s in SOURCES], [{"ids": t} for t in TARGETS])
    seen = {}
    for batch in make_loader(stack, Padding(7), lengths=LENGTHS, next_token=True):
        seen |= rows(batch)
    assert len(seen) == len(LENGTHS)
    assert set(next(iter(make_loader(stack, Padding(7), lengths=LENGTHS, as_dict=True)))) == {
        "input_ids",
        "attention_mask",
        "labels",
    }
    two = StackDataset([{"ids": s, "more": s} for s in SOURCES], TokenArray.of_sequences(TARGETS))
    with pytest.raises(
        ValueError, match=r"side 0 of the pairs has the fields \['ids', 'more'\], and one is what a side is"
    ):
        next(iter(make_loader(two, Padding(7), lengths=LENGTHS)))


def test_what_takes_one_side_says_so() -> None:
    """Stitching and drawing."""
    loader = make_loader(stacked(), Padding(7), lengths=LENGTHS)
    with pytest.raises(TypeError, match=r"got PairBatch: of pairs stitch batch.target"):
        list(stitch((batch, batch.target.data) for batch in loader))
    plot_batches = pytest.importorskip("seqbatch.plots").plot_batches
    with pytest.raises(ValueError, match=r"draw one side, plan.sides\[0\]"):
        plot_batches(loader.plan)


def test_outputs_on_targets_are_stitched() -> None:
    """Evaluation keeps the dataset's order."""
    loader = make_loader(stacked(), Bucketing(max_tokens=90), lengths=LENGTHS, train=False)
    found = dict(stitch((batch.target, batch.target.data) for batch in loader))
    assert {i: row.tolist() for i, row in found.items()} == {i: row.tolist() for i, row in enumerate(TARGETS)}


def test_pairs_that_are_none_are_refused() -> None:
    """Other numbers of fields, other lengths, another field as the target, an empty side in evaluation."""
    three = [{"a": s, "b": t, "c": t} for s, t in zip(SOURCES, TARGETS, strict=True)]
    with pytest.raises(ValueError, match=r"pairs have two fields.*\['a', 'b', 'c'\]: name the two with fields="):
        next(iter(make_loader(three, Padding(7), lengths=LENGTHS)))
    with pytest.raises(ValueError, match="next_token must be of the second field of pairs, 'target', got 'source'"):
        next(iter(make_loader(stacked(), Padding(7), lengths=LENGTHS, next_token="source")))
    with pytest.raises(ValueError, match=r"but lengths\[\d+\] is"):
        list(make_loader(stacked(), Padding(7), lengths=LENGTHS[:, ::-1]))
    with pytest.raises(ValueError, match=r"pairs need lengths of both sides, \(N, 2\)"):
        list(make_loader(DATASETS["dicts"](), Padding(7), lengths=LENGTHS[:, 0]))
    with pytest.raises(ValueError, match="60 sequences"):
        make_loader(stacked(), Padding(7), lengths=LENGTHS[:5])
    data = StackDataset(TokenArray.of_sequences([[1], [2, 3]]), TokenArray.of_sequences([[1], []]))
    with pytest.raises(ValueError, match="1 pairs have an empty side, the first of them pair 1: fill both sides"):
        make_loader(data, Padding(2), lengths=[[1, 1], [2, 0]], train=False)
    (batch,) = make_loader(data, Padding(2), lengths=[[1, 1], [2, 0]])
    assert batch.placement.sequence.tolist() == [0]


def test_the_parts_can_be_put_together_by_hand() -> None:
    """The public sampler, dataset and collate function in one's own DataLoader."""
    from seqbatch import collate

    sampler = PlanBatchSampler(Padding(7), LENGTHS, next_token=True)
    own = torch.utils.data.DataLoader(PieceDataset(stacked()), batch_sampler=sampler, collate_fn=collate)
    ours = make_loader(stacked(), Padding(7), lengths=LENGTHS, next_token=True)
    for a, b in zip(own, ours, strict=True):
        assert torch.equal(a.target.targets, b.target.targets)
