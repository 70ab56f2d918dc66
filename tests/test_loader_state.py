"""What trainers ask of a loader: its state without a batch, its length, and inputs that keep documents apart."""

import itertools

import numpy as np
import pytest
import torch

import seqbatch

DATA = seqbatch.TokenArray.of_sequences([np.arange(i % 7 + 1) for i in range(40)])
STRATEGY = seqbatch.Bucketing(max_tokens=20)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_state_without_a_batch(num_workers):
    """It is that after the last batch handed out, not the last one read; a move or a resume starts it anew."""
    loader = seqbatch.make_loader(DATA, STRATEGY, num_workers=num_workers)
    start, batches = loader.state_dict(), iter(loader)
    assert start["history"] == []
    for _ in range(3):
        batch = next(batches)
        assert loader.state_dict() == loader.state_dict(after=batch)
    state = loader.state_dict()
    loader.load_state_dict(start)
    assert loader.state_dict() == start
    loader.load_state_dict(state)
    assert loader.state_dict() == state
    loader.set_epoch(1)
    assert loader.state_dict() == start | {"epoch": 1, "plan": loader.plan.digest[:32]}


def test_state_of_all_ranks():
    """With rank="all" a state is that of whole steps."""
    loader = seqbatch.make_loader(DATA, STRATEGY, rank="all", num_replicas=2)
    steps = [loader.state_dict()["history"] for _ in loader]
    assert steps[:4] == [[], [[2, 1]], [[2, 1]], [[2, 2]]]


def test_len_counts_the_whole_epoch():
    """What ran before a resume counts in the loader's length; the sampler's is what is still to come."""
    loader = seqbatch.make_loader(DATA, STRATEGY)
    batches, count = iter(loader), len(loader)
    state = [loader.state_dict() for _, _ in zip(range(3), batches, strict=False)][-1]
    again = seqbatch.make_loader(DATA, STRATEGY)
    again.load_state_dict(state)
    assert (len(again), len(again.batch_sampler)) == (count, count - 3)
    assert len(list(again)) == count - 3
    assert len(again) == len(again.batch_sampler) == len(again.plan)


def test_packed_inputs_have_no_cache():
    """Models look for documents in position_ids only while they keep no cache; one a row needs no such care."""
    packed = next(iter(seqbatch.make_loader(DATA, seqbatch.Packing(20), as_dict=True)))
    padded = next(iter(seqbatch.make_loader(DATA, seqbatch.Padding(4), as_dict=True)))
    assert packed["use_cache"] is False
    assert "attention_mask" not in packed
    assert "use_cache" not in padded
    assert "attention_mask" in padded


def test_an_epoch_ends_with_its_last_batch():
    """However the loop counts; one that breaks off begins the same epoch anew."""
    loader = seqbatch.make_loader(DATA, STRATEGY)
    assert len(list(itertools.islice(loader, len(loader)))) == len(loader.plan)
    assert loader.epoch == 1
    for _ in zip(range(len(loader)), loader, strict=False):
        pass
    assert loader.epoch == 2
    for number, _ in enumerate(loader, 1):
        if number == len(loader):
            break
    assert loader.epoch == 3
    next(iter(loader))
    assert loader.epoch == 3


def test_a_peek_disturbs_nothing():
    """Another iterator that takes one batch neither moves the state of the running one nor its epoch."""
    loader = seqbatch.make_loader(DATA, STRATEGY)
    running = iter(loader)
    for _ in range(3):
        batch = next(running)
    next(iter(loader))
    batch = next(running)
    assert loader.state_dict() == loader.state_dict(after=batch)
    first, second = iter(loader), iter(loader)
    next(second)
    list(first)
    assert loader.epoch == 1
    list(second)
    assert loader.epoch == 1


def test_a_state_loaded_inside_a_loop_stays():
    """The iteration that was running does not move the epoch any more."""
    loader = seqbatch.make_loader(DATA, STRATEGY)
    running = iter(loader)
    batch = next(running)
    loader.load_state_dict(batch.position)
    list(running)
    assert loader.epoch == 0
    assert loader.state_dict()["history"] == [[1, 1]]
    count = len(loader.plan)
    assert len(list(loader)) == count - 1


def test_a_bare_sampler_runs_what_was_loaded_once():
    """Then its epoch is whole again, also without `set_epoch`."""
    sampler = seqbatch.PlanBatchSampler(STRATEGY, DATA.lengths)
    whole = [list(batch) for batch in sampler]
    sampler.load_state_dict(list(sampler)[1].placement.position)
    assert [list(batch) for batch in sampler] == whole[2:]
    assert [list(batch) for batch in sampler] == whole


def test_a_state_inside_an_optimizer_step_warns():
    """The gradients of the micro-steps before it are not in it."""
    loader = seqbatch.make_loader(DATA, STRATEGY, accumulation=2)
    first, second = itertools.islice(loader, 2)
    with pytest.warns(UserWarning, match="save after a batch with batch.update"):
        loader.state_dict(after=first)
    loader.state_dict(after=second)


def test_model_inputs_know_their_place():
    """A batch as a dict resumes like any other, and pads as it was told to in every layout."""
    loader = seqbatch.make_loader(DATA, seqbatch.Padding(4), as_dict=True, padding_value=99)
    inputs = next(iter(loader))
    assert loader.state_dict(after=inputs)["history"] == [[1, 1]]
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == 99).all()
    items = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = seqbatch.PadCollate(padding_value={"input_ids": 7})(items).to_layout("batch_first")
    assert batch.data["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert batch.data["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]


def test_a_tokenizers_own_mask_does_not_join_documents():
    """Its ones say that a row is one document, which packed rows are not."""
    items = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}] * 4
    packed = seqbatch.make_loader(items, seqbatch.Packing(6), lengths=[3] * 4, as_dict=True)
    padded = seqbatch.make_loader(items, seqbatch.Padding(2), lengths=[3] * 4, as_dict=True)
    assert "attention_mask" not in next(iter(packed))
    assert next(iter(padded))["attention_mask"].tolist() == [[1, 1, 1]] * 2


def test_lanes_of_one_rank_are_not_those_of_all():
    """A state that was not gathered is refused; one that is kept has no graph."""
    loader = seqbatch.make_loader(DATA, seqbatch.Splicing(4, 5))
    batch = next(iter(loader))
    lanes = torch.zeros(1, 4, 3, requires_grad=True) * 2
    state = loader.state_dict(after=batch, lanes=(lanes, lanes))
    assert not state["lanes"][0].requires_grad
    assert loader.load_state_dict(state)[1].shape == (1, 4, 3)
    with pytest.raises(ValueError, match="but the plan has 4 lanes"):
        loader.load_state_dict(loader.state_dict(after=batch, lanes=lanes[:, :2]))


def test_a_rank_without_a_piece_has_all_fields():
    """Labels of no rows, of any kind."""
    items = [{"x": [1, 2], "y": 3.0, "name": "a"}, {"x": [1], "y": 4.0, "name": "b"}]
    options = {"lengths": [2, 1], "per_sequence": ["y", "name"], "num_replicas": 3}
    for rank in range(3):
        batch = next(iter(seqbatch.make_loader(items, seqbatch.Padding(2), rank=rank, **options)))
        assert len(batch.per_sequence["y"]) == len(batch.per_sequence["name"]) == len(batch.placement.length)


def test_kinds_of_tokens():
    """Half floats are copied, empty lists say nothing of their tokens, and what has no numbers is refused."""
    halves = seqbatch.TokenArray(np.arange(6, dtype=np.float16), [0, 4, 6])
    assert next(iter(seqbatch.make_loader(halves, seqbatch.Padding(2)))).data.dtype == torch.float16
    assert seqbatch.TokenArray.of_sequences([[], [1, 2], []]).tokens.dtype == np.int64
    assert seqbatch.PadCollate()([[1, 2, 3], []]).data.dtype == torch.int64
    for tokens in (np.arange(3, dtype=">i4"), np.array(["a", "b", "c"]), torch.zeros(3, dtype=torch.bfloat16)):
        with pytest.raises(TypeError, match="tokens"):
            seqbatch.TokenArray(tokens, [0, 3])
    assert seqbatch.measuring.dataset_lengths([torch.zeros(2, dtype=torch.bfloat16)]).tolist() == [2]


def test_the_worst_batch_is_never_left_over():
    """It would run last, cut by lanes."""
    data = seqbatch.TokenArray.of_sequences([np.arange(10), [1], [2]])
    for seed in range(12):
        loader = seqbatch.make_loader(
            data, seqbatch.Padding(1), worst_first=True, seed=seed, rank="all", num_replicas=2
        )
        assert max(batch.placement.steps for batch in itertools.islice(loader, 2)) == 10


def test_no_targets_unless_asked_for():
    """None and numpy's False are no."""
    for no in (None, False, np.False_):
        assert next(iter(seqbatch.make_loader(DATA, STRATEGY, next_token=no))).targets is None


def test_more_that_is_refused():
    """Each with what came."""
    items = [{"a": [1]}, {"a": [1], "b": [2]}]
    with pytest.raises(ValueError, match="all must have the same"):
        list(seqbatch.make_loader(items, seqbatch.Padding(2), lengths=[1, 1]))
    with pytest.raises(ValueError, match="leaves nothing to serve"):
        seqbatch.PieceDataset(items, fields=[])
    with pytest.raises(ValueError, match="cannot pad integers"):
        seqbatch.PadCollate(padding_value=0.5)([[1, 2], [3]])
    with pytest.raises(ValueError, match="the strategy decides in_order"):
        seqbatch.make_loader(DATA, STRATEGY, in_order=False)
    with pytest.raises(ValueError, match="leave worst_first out"):
        seqbatch.make_loader(DATA, STRATEGY, train=False, worst_first=True)
    batch = seqbatch.PadCollate()([[1, 2], [3]])
    with pytest.raises(ValueError, match="values have 2 rows, but the batch has 3 tokens"):
        batch.flatten(torch.nn.utils.rnn.pack_sequence([torch.zeros(2)]))
    with pytest.raises(ValueError, match="cannot hold an empty sequence"):
        seqbatch.PadCollate()([[1, 2], []]).convert(torch.zeros(2, 2), "packed")


def test_an_empty_sequence_ends_no_lane():
    """The state of a lane is that of its last token."""
    batch = seqbatch.SpliceCollate(num_lanes=1)([[1, 2], []])
    assert batch.to_lanes(torch.tensor([[[7.0], [0.0]]])).flatten().tolist() == [7.0]
