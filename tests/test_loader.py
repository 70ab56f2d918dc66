"""Loaders: every token once over ranks and resumes, exact positions, transparency, and what is refused."""

import json
import pickle
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from loaders import CARRIED, DATA, LENGTHS, STRATEGIES, expected, load, seen, tokens_of

import seqbatch
from seqbatch import Chunking, PlanBatchSampler, SequenceBatch, Splicing, stitch
from seqbatch.loader import PlanLoader
from seqbatch.tensors import detach_state


def same(ours: SequenceBatch, others: SequenceBatch) -> bool:
    """Whether two batches hold the same pieces at the same places, flags included."""
    tensors = ("data", "mask", "reset", "loss_mask")
    return all(torch.equal(getattr(ours, key), getattr(others, key)) for key in tensors)


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("name", STRATEGIES)
def test_ranks_share_an_epoch(name: str, num_replicas: int) -> None:
    """Equal numbers of steps, the length that was promised, every token once, the plan's cells, the same position."""
    loaders = [load(name, rank=rank, num_replicas=num_replicas, next_token=True) for rank in range(num_replicas)]
    steps = [len(loader) for loader in loaders]
    plan = loaders[0].plan
    batches = [list(loader) for loader in loaders]

    assert {len(own) for own in batches} == set(steps) == {steps[0]}
    assert sum((seen(own) for own in batches), Counter()) == expected(plan)
    for step in zip(*batches, strict=True):
        assert len({json.dumps(batch.position) for batch in step}) == 1
        assert sum(batch.loss_tokens for batch in step) == step[0].step_loss_tokens
        scales = [batch.loss_tokens * batch.loss_scale / num_replicas for batch in step]
        assert sum(scales) == pytest.approx(float(step[0].step_loss_tokens > 0))
    if num_replicas == 1:
        assert sum(batch.mask.numel() for batch in batches[0]) == plan.cells


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_flat_order_is_step_major(name: str) -> None:
    """Dealing batch i to rank i mod W gives each rank its own batches, as Accelerate does."""
    everything = list(load(name, rank="all", num_replicas=3))
    for rank in range(3):
        own = list(load(name, rank=rank, num_replicas=3))
        assert len(own) * 3 == len(everything)
        assert all(same(a, b) for a, b in zip(everything[rank::3], own, strict=True))
    assert all(a.position == b.position for a, b in zip(everything[::3], everything[2::3], strict=True))


def lanes_for(name: str) -> dict[str, object]:
    strategy = STRATEGIES[name]
    count = strategy.num_lanes if isinstance(strategy, Splicing) else getattr(strategy, "batch_size", 1)
    return {"lanes": torch.arange(count)[None, :, None]} if name in CARRIED else {}


@pytest.mark.parametrize("num_workers", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 3), (3, 8), (8, 1), (3, 3)])
@pytest.mark.parametrize("name", STRATEGIES)
def test_resume_at_every_step(name: str, before: int, after: int, num_workers: int) -> None:
    """Stopped after any batch, on any number of ranks and workers, what is left comes exactly once.

    On as many ranks as before in the very order, flags included. The workers read ahead; a rank in turn has them.
    """
    firsts = [
        list(load(name, rank=rank, num_replicas=before, num_workers=num_workers * (rank == 0)))
        for rank in range(before)
    ]
    plan = load(name).plan
    for step in range(len(firsts[0])):
        state = load(name).state_dict(after=firsts[step % before][step], **lanes_for(name))
        rest = []
        for rank in range(after):
            loader = load(name, rank=rank, num_replicas=after, num_workers=num_workers * (rank == step % after))
            lanes = loader.load_state_dict(pickle.loads(pickle.dumps(state)))
            assert len(loader.batch_sampler) == len(rest[0] if rest else list(loader.batch_sampler))
            assert len(loader) == step + 1 + len(loader.batch_sampler)
            if lanes is not None:
                share = lanes_for(name)["lanes"].shape[1] // after  # type: ignore[attr-defined]
                assert lanes.flatten().tolist() == list(range(rank * share, (rank + 1) * share))
            rest.append(list(loader))
        done = [batch for own in firsts for batch in own[: step + 1]]
        assert seen([*done, *(batch for own in rest for batch in own)]) == expected(plan)
        if before == after:
            for own, others in zip(firsts, rest, strict=True):
                assert len(own) == step + 1 + len(others)
                assert all(same(a, b) for a, b in zip(own[step + 1 :], others, strict=True))


def test_resume_twice_with_other_ranks() -> None:
    """One, then three, then two ranks inside one epoch."""
    for name in ("token budget", "splicing"):
        done: list[SequenceBatch] = []
        state = None
        for num_replicas, steps in ((1, 2), (3, 1), (2, None)):
            loaders = [load(name, rank=rank, num_replicas=num_replicas) for rank in range(num_replicas)]
            for loader in loaders:
                if state is not None:
                    loader.load_state_dict(state, reset_lanes=True)
                own = list(islice(loader, steps))
                done += own
                after = loader.state_dict(after=own[-1])
            state = after
        assert seen(done) == expected(load(name).plan)


def test_the_state_is_small_and_plain() -> None:
    """JSON of less than a kilobyte, also after many changes of ranks."""
    loader = load("token budget")
    state = loader.state_dict(after=next(iter(loader)))
    assert state == json.loads(json.dumps(state))
    assert len(json.dumps(state)) < 1024
    assert state["history"] == [[1, 1]]


def test_epochs_move_on_by_themselves() -> None:
    """A finished iteration goes to the next epoch, a broken one stays, `set_epoch` goes anywhere."""
    loader = load("token budget")
    first = [list(map(int, batch.placement.sequence)) for batch in loader]
    assert loader.epoch == 1
    second = [list(map(int, batch.placement.sequence)) for batch in loader]
    assert loader.epoch == 2
    assert sorted(map(sorted, first)) != sorted(map(sorted, second))
    next(iter(loader))
    assert loader.epoch == 2
    loader.set_epoch(0)
    assert [list(map(int, batch.placement.sequence)) for batch in loader] == first


def test_a_resumed_loop_may_set_its_epoch() -> None:
    """`set_epoch` to the epoch of the state is no move; to another one it is."""
    loader = load("padding", epoch=3)
    batches = list(loader)
    loader.load_state_dict(loader.state_dict(after=batches[1]))
    assert loader.epoch == 3
    loader.set_epoch(3)
    assert len(loader.batch_sampler) == len(batches) - 2
    assert len(loader) == len(batches)
    assert all(same(a, b) for a, b in zip(loader, batches[2:], strict=True))
    assert loader.epoch == 4 and len(loader) == len(batches)


def test_a_state_after_the_last_batch_goes_on_with_the_next_epoch() -> None:
    """Nothing is left of the epoch; then the next one is whole."""
    loader = load("padding")
    batches = list(loader)
    loader.load_state_dict(loader.state_dict(after=batches[-1]))
    assert len(loader.batch_sampler) == 0 and list(loader) == []
    assert loader.epoch == 1 and len(list(loader)) == len(batches)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_any_kind(method: str) -> None:
    """The same batches, through persistent workers over two epochs."""
    options = {"num_workers": 2, "multiprocessing_context": method, "persistent_workers": True}
    loader, plain = load("splicing", **options), load("splicing")
    for _ in range(2):
        assert all(same(a, b) for a, b in zip(loader, plain, strict=True))


@pytest.mark.parametrize("name", STRATEGIES)
def test_items_of_any_kind_give_the_same_batches(name: str) -> None:
    """Tensors, arrays, lists, dicts, tuples: as from the flat array."""
    rows = [tokens_of(i, n) for i, n in enumerate(LENGTHS.tolist())]
    kinds = {
        "tensors": [torch.from_numpy(row) for row in rows],
        "arrays": rows,
        "lists": [row.tolist() for row in rows],
        "dicts": [{"x": row, "y": -row, "label": i} for i, row in enumerate(rows)],
        "tuples": [(torch.from_numpy(row), torch.from_numpy(row).float()[:, None] * 2) for row in rows],
    }
    for kind, items in kinds.items():
        extra = {"dicts": {"per_sequence": ["label"], "next_token": "x"}, "tuples": {"next_token": 0}}.get(kind, {})
        loader = seqbatch.make_loader(items, STRATEGIES[name], **{"lengths": LENGTHS, "next_token": True, **extra})
        for batch, wanted in zip(loader, load(name, next_token=True), strict=True):
            data = {"dicts": lambda d: d["x"], "tuples": lambda d: d[0]}.get(kind, lambda d: d)(batch.data)
            assert torch.equal(data, wanted.data), kind
            assert torch.equal(batch.targets, wanted.targets), kind
            assert torch.equal(batch.loss_mask, wanted.loss_mask)
            if kind == "dicts":
                assert torch.equal(batch.data["y"], -wanted.data)
                assert batch.per_sequence["label"].tolist() == wanted.placement.sequence.tolist()
            if kind == "tuples":
                assert torch.equal(batch.data[1], 2.0 * wanted.data[..., None])


def test_a_plain_dataset_takes_the_indices() -> None:
    """DataLoader(dataset, batch_sampler=...) with an ordinary collate function: whole sequences, each once."""
    sampler = PlanBatchSampler(STRATEGIES["token budget"], LENGTHS)
    rows = [torch.from_numpy(tokens_of(i, n)) for i, n in enumerate(LENGTHS.tolist())]
    loader = torch.utils.data.DataLoader(rows, batch_sampler=sampler, collate_fn=seqbatch.PadCollate())
    assert sum((seen([batch]) for batch in loader), Counter()) == expected(sampler.plan)


def test_worst_first() -> None:
    """The most expensive batch is the first of the epoch, on any number of ranks, and resumed runs agree."""
    for num_replicas in (1, 2):
        loader = load("padding", worst_first=True, rank=0, num_replicas=num_replicas)
        both = [list(load("padding", worst_first=True, rank=r, num_replicas=num_replicas)) for r in range(num_replicas)]
        cells = [max(batch.mask.numel() for batch in step) for step in zip(*both, strict=True)]
        assert cells[0] == max(cells)
        assert sum((seen(own) for own in both), Counter()) == expected(loader.plan)
        again = load("padding", worst_first=True, rank=0, num_replicas=num_replicas)
        again.load_state_dict(loader.state_dict(after=both[0][1]))
        assert all(same(a, b) for a, b in zip(again, both[0][2:], strict=True))


@pytest.mark.parametrize(("num_replicas", "accumulation"), [(1, 3), (2, 2), (3, 4)])
def test_accumulation_weighs_every_token_alike(num_replicas: int, accumulation: int) -> None:
    """Scaled sums over micro-steps, averaged over ranks: one mean over the tokens of the whole step."""
    for name in ("token budget", "splicing", "chunking with context"):
        ranks = [
            list(load(name, rank=r, num_replicas=num_replicas, accumulation=accumulation, next_token=True))
            for r in range(num_replicas)
        ]
        assert [b.update for b in ranks[0]][:-1] == [(i + 1) % accumulation == 0 for i in range(len(ranks[0]) - 1)]
        assert ranks[0][-1].update
        for begin in range(0, len(ranks[0]), accumulation):
            group = [batch for own in ranks for batch in own[begin : begin + accumulation]]
            weights = torch.cat(
                [batch.loss_scale / num_replicas * batch.loss_mask.double().flatten() for batch in group]
            )
            count = int(sum(batch.loss_mask.sum() for batch in group))
            torch.testing.assert_close(weights[weights > 0], torch.full((count,), 1.0 / count).double())


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("cell", ["SRU", "LSTM"])
def test_transparency(name: str, cell: str) -> None:
    """Outputs and gradients through the loader equal those of every piece alone, started where the last one ended."""
    torch.manual_seed(0)
    rnn = getattr(seqbatch.rnn, cell)(4, 4, num_layers=2).double()
    embed = torch.nn.Embedding(60_000, 4).double()
    weight = torch.randn(4, dtype=torch.float64)
    parameters = [embed.weight, *rnn.parameters()]
    state, ends = None, {}
    for batch in load(name, next_token=True):
        output, state = rnn(embed(batch.data), batch.carry_in(state), reset=batch.reset, mask=batch.mask)
        got = torch.autograd.grad(((output @ weight) * batch.loss_mask).sum() * batch.loss_scale, parameters)
        outputs, loss = [], torch.zeros((), dtype=torch.float64)
        counted = batch.unbatch(batch.loss_mask)
        at = batch.placement
        for piece, count, sequence, goes_on in zip(batch.unbatch(), counted, at.sequence, at.continues, strict=True):
            alone, end = rnn(embed(piece)[:, None], ends.get(sequence) if goes_on else None)
            ends[sequence] = detach_state(end)
            outputs.append(alone[:, 0])
            loss = loss + ((alone[:, 0] @ weight) * count).sum() * batch.loss_scale
        wanted = torch.autograd.grad(loss, parameters)
        for ours, alone in zip(batch.unbatch(output), outputs, strict=True):
            torch.testing.assert_close(ours, alone, rtol=0, atol=1e-10)
        for ours, alone in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if "truncated" not in name])
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_evaluation_comes_whole(name: str, num_replicas: int) -> None:
    """Dataset order, nothing dropped or repeated; stitched outputs are whole sequences."""
    outputs: dict[int, list[int]] = {}
    whole = num_replicas == 1 or "chunking" not in name or name in CARRIED
    for rank in range(num_replicas):
        loader = load(name, train=False, rank=rank, num_replicas=num_replicas)
        pairs = ((batch, batch.data * 3) for batch in loader)
        if not whole:
            with pytest.raises(ValueError, match="sequences incomplete"):
                list(stitch(pairs))
            continue
        for sequence, output in stitch(pairs):
            assert sequence not in outputs
            outputs[sequence] = output.tolist()
    if whole:
        assert outputs == {i: (3 * tokens_of(i, n)).tolist() for i, n in enumerate(LENGTHS.tolist()) if n}


def test_evaluation_is_in_dataset_order() -> None:
    """Zero padding visits sequences as they come, and so do lanes that are filled in turn."""
    for strategy in (seqbatch.Padding(7), Splicing(1, 9)):
        loader = seqbatch.make_loader(DATA, strategy, train=False)
        order = [i for batch in loader for i in batch.placement.sequence.tolist()]
        assert all(a <= b for a, b in pairwise(order))


def test_truncated_backpropagation() -> None:
    """Carried chunks of long sequences equal a plain loop over each with detached state."""
    torch.manual_seed(0)
    lengths = [40, 33, 7, 21]
    data = seqbatch.TokenArray.of_sequences([tokens_of(i, n) for i, n in enumerate(lengths)])
    embed, rnn = torch.nn.Embedding(5000, 3).double(), torch.nn.LSTM(3, 3).double()
    ours = seqbatch.rnn.LSTM(3, 3).double()
    ours.load_state_dict(rnn.state_dict())
    total = [torch.zeros_like(p) for p in ours.parameters()]
    state = None
    for batch in seqbatch.make_loader(data, Chunking(2, 8, carry=True)):
        output, state = ours(embed(batch.data), batch.carry_in(state), reset=batch.reset, mask=batch.mask)
        for sum_, g in zip(total, torch.autograd.grad((output**2).sum(), list(ours.parameters())), strict=True):
            sum_ += g
    wanted = [torch.zeros_like(p) for p in rnn.parameters()]
    for i in range(len(lengths)):
        state = None
        for chunk in torch.from_numpy(data[i]).split(8):
            output, state = rnn(embed(chunk)[:, None], detach_state(state))
            for sum_, g in zip(wanted, torch.autograd.grad((output**2).sum(), list(rnn.parameters())), strict=True):
                sum_ += g
    for a, b in zip(total, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_rollouts_with_done_flags() -> None:
    """The recipe for recurrent policies: `done` of step t is `reset` of step t + 1, and the last one is handed on."""
    torch.manual_seed(0)
    done = torch.rand(30, 3) < 0.2
    observations = torch.randn(30, 3, 4, dtype=torch.float64)
    policy = seqbatch.rnn.LSTM(4, 5).double()
    state, last_done, outputs = None, torch.ones(3, dtype=torch.bool), []
    for begin in range(0, 30, 10):
        rollout = slice(begin, begin + 10)
        reset = torch.cat([last_done[None], done[rollout][:-1]])
        output, state = policy(observations[rollout], detach_state(state), reset=reset)
        outputs.append(output)
        last_done = done[rollout][-1]
    for lane in range(3):
        ends = (done[:, lane].nonzero().flatten() + 1).tolist()
        for a, b in pairwise(sorted({0, *ends, 30})):
            alone, _ = policy(observations[a:b, lane : lane + 1])
            torch.testing.assert_close(torch.cat(outputs)[a:b, lane], alone[:, 0], rtol=0, atol=1e-10)


def test_an_epoch_smaller_than_the_number_of_ranks() -> None:
    """Two sequences for five ranks: one step; who has none gets a masked lane of the data's shape."""
    features = [torch.randn(4, 3), torch.randn(2, 3)]
    batches = []
    for rank in range(5):
        loader = seqbatch.make_loader(features, seqbatch.Padding(4), rank=rank, num_replicas=5)
        batches += list(loader)
    assert [batch.data.shape[-1] for batch in batches] == [3] * 5
    assert sum(int(batch.mask.sum()) for batch in batches) == 6
    assert sorted(batch.loss_tokens for batch in batches) == [0, 0, 0, 2, 4]
    assert all(batch.loss_scale == 5 / 6 for batch in batches)


def test_the_parts_work_without_make_loader() -> None:
    """A sampler, a dataset, a collate function, and anyone's DataLoader."""
    loader = torch.utils.data.DataLoader(
        seqbatch.PieceDataset(DATA),
        batch_sampler=PlanBatchSampler(STRATEGIES["splicing"], LENGTHS),
        collate_fn=seqbatch.collate,
    )
    assert all(same(a, b) for a, b in zip(loader, load("splicing"), strict=True))
    assert isinstance(load("splicing"), PlanLoader)


@pytest.mark.parametrize("name", CARRIED)
def test_carried_plans_need_their_lanes(name: str) -> None:
    """Without them loading raises and changes nothing; told to reset, the first batch says so."""
    loader = load(name)
    batches = list(loader)
    state = loader.state_dict(after=batches[0])
    loader = load(name)
    with pytest.raises(ValueError, match="reset_lanes=True"):
        loader.load_state_dict(state)
    assert len(loader) == len(batches)
    assert loader.load_state_dict(state, reset_lanes=True) is None
    first = next(iter(loader))
    at = first.placement
    assert not at.continues.any()
    assert first.reset[0, at.lane[at.step == 0]].all()
    assert torch.equal(first.data, batches[1].data)
    assert batches[1].placement.continues.any()


def test_ranks_that_do_not_divide_the_lanes() -> None:
    """The error names the numbers that do."""
    with pytest.raises(ValueError, match="use one of 1, 2, 3, 4, 6, 8, 12, 24 ranks"):
        list(load("splicing", rank=0, num_replicas=5))


def test_a_random_history_is_refused_or_exact() -> None:
    """States of impossible histories are errors, not silence."""
    loader = load("padding")
    state = loader.state_dict(after=next(iter(loader)))
    with pytest.raises(ValueError, match="history says"):
        loader.load_state_dict(state | {"history": [[1, 99]]})
    assert len(loader) == len(list(loader))


def test_numpy_seeds_do_not_matter() -> None:
    """Global generators neither decide anything nor are used up."""
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1][:5].tolist(), torch.get_rng_state().tolist()[:20]
    a = list(load("pool sort"))
    assert (np.random.get_state()[1][:5].tolist(), torch.get_rng_state().tolist()[:20])[0] == before[0]
    np.random.seed(2)
    assert all(same(x, y) for x, y in zip(a, load("pool sort"), strict=True))


def test_stitching_takes_pieces_in_any_order() -> None:
    """Chunks with context from a shuffled epoch: whole sequences all the same."""
    loader = seqbatch.make_loader(DATA, Chunking(16, 6, left_context=3, right_context=2))
    outputs = dict(stitch((batch, batch.data) for batch in loader))
    assert {i: x.tolist() for i, x in outputs.items()} == {
        i: tokens_of(i, n).tolist() for i, n in enumerate(LENGTHS.tolist()) if n
    }
