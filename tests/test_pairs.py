"""Pairs: the laws on two lengths each, edges and cuts against their naive twins, and what is refused."""

import json
from pathlib import Path

import laws
import numpy as np
import pytest
import strategies
import twins
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from seqbatch import Bucketing, Chunking, Packing, Padding, Plan, Splicing
from seqbatch.cli import main
from seqbatch.compare import compare
from seqbatch.pair_edges import assign_pairs, find_pair_edges
from seqbatch.simulate import PAIR_STRATEGIES, simulate
from seqbatch.strategy import Strategy
from seqbatch.workload import Workload

PAIRS = st.sampled_from(list(strategies.PAIR_KINDS)).flatmap(strategies.PAIR_KINDS.get)


def corpus(count: int = 3000, seed: int = 0) -> np.ndarray:
    """Pairs whose lengths go together, as those of translations do."""
    rng = np.random.default_rng(seed)
    source = np.clip(rng.gamma(4, 4, count).astype(np.int64), 1, 60)
    return np.stack([source, np.maximum(1, (source * rng.normal(1.2, 0.25, count)).astype(np.int64))], axis=1)


@pytest.mark.parametrize("kind", strategies.PAIR_KINDS)
@settings(max_examples=200)
@given(data=st.data(), lengths=strategies.pair_lengths(), epoch=st.integers(0, 3))
def test_every_plan_of_pairs_obeys_the_laws(kind: str, data: st.DataObject, lengths: np.ndarray, epoch: int) -> None:
    """Exactly once on both sides, disjoint, within budget and tight."""
    strategy = data.draw(strategies.PAIR_KINDS[kind])
    plan = strategy.plan(lengths, seed=1, epoch=epoch)
    laws.law_exactly_once(lengths, plan)
    laws.law_disjoint(plan)
    laws.law_budget(plan, strategy)
    laws.law_tight(plan, strategy)


@given(strategies.pair_lengths(), PAIRS)
def test_a_plan_of_pairs_is_a_function_of_its_arguments(lengths: np.ndarray, strategy: Strategy) -> None:
    """Same arguments, same bits; other epochs and seeds, other batches."""
    laws.law_deterministic(strategy, lengths)


@given(strategies.pair_lengths(), PAIRS, strategies.histories(), st.integers(1, 9), st.sampled_from(["split", "drop"]))
def test_ranks_run_a_plan_of_pairs_once(
    lengths: np.ndarray, strategy: Strategy, phases: list[tuple[int, int]], ranks: int, tail: str
) -> None:
    """Any number of ranks, and any change of it."""
    plan = strategy.plan(lengths)
    laws.law_ranks(lengths, plan, ranks, tail)
    laws.law_resume(lengths, plan, phases, ranks)


@pytest.mark.parametrize("kind", strategies.PAIRS)
def test_pairs_like_a_corpus_obey_all_laws(kind: str, tmp_path: object) -> None:
    """Every kind of plan, with ranks going 8, 3, 5; and it comes back from a file."""
    lengths = corpus()
    strategy = strategies.PAIRS[kind](int(lengths.sum(axis=1).max()))
    plan = strategy.plan(lengths, seed=5)
    laws.law_exactly_once(lengths, plan)
    laws.law_disjoint(plan)
    laws.law_budget(plan, strategy)
    laws.law_tight(plan, strategy)
    laws.law_deterministic(strategy, lengths)
    laws.law_ranks(lengths, plan, 8)
    laws.law_resume(lengths, plan, [(8, 3), (3, 4)], last=5)
    plan.save(tmp_path / "plan.npz")
    again = Plan.load(tmp_path / "plan.npz")
    assert again.digest == plan.digest
    assert (again.dropped == plan.dropped).all()
    frame = plan.to_frame()
    assert (frame["cells"].sum(), frame["tokens"].sum()) == (plan.cells, plan.tokens)
    assert (frame["steps"] == frame["source_steps"] + frame["target_steps"]).all()


@given(strategies.pair_lengths(40), st.integers(1, 300), st.sampled_from([1, 2, 3]), st.sampled_from(["sum", "max"]))
def test_batches_are_cut_as_the_naive_twin_does(
    lengths: np.ndarray, max_tokens: int, multiple: int, budget: str
) -> None:
    """In one bucket, in the order of the data."""
    lengths = np.maximum(lengths, 1)
    edge = (int(lengths[:, 0].max()), int(lengths[:, 1].max()))
    strategy = Bucketing(
        max_tokens=max_tokens,
        bucket_edges=[edge],
        budget=budget,
        batch_size_multiple=multiple,
        overlong="drop",
        shuffle=False,
    )
    plan = strategy.plan(lengths)

    cost = {"sum": lambda s, t: s + t, "max": max}[budget]
    row = [pair for pair in map(tuple, lengths.tolist()) if cost(*pair) <= max_tokens]
    expected = twins.greedy_pair_batches(row, lambda s, t: max_tokens // cost(s, t), multiple)
    assert [list(map(tuple, part.length.tolist())) for part in plan] == expected


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12), st.integers(1, 4))
def test_edges_of_pairs_are_the_best_of_all_strips(pairs: list[tuple[int, int]], num_buckets: int) -> None:
    """Strips of sources or of targets, whichever needs fewer cells."""
    lengths = np.array(pairs)
    edges = find_pair_edges(lengths, num_buckets)
    bucket = assign_pairs(lengths, edges, edges.sum(axis=1))

    assert len(edges) <= num_buckets
    across = [(target, source) for source, target in pairs]
    fewest = min(twins.fewest_pair_cells(pairs, num_buckets), twins.fewest_pair_cells(across, num_buckets))
    # A pair may fit a cheaper edge of another strip, so what is assigned may need fewer cells still.
    assert edges[bucket].sum() <= fewest


@given(strategies.pair_lengths(), strategies.pair_lengths(8))
def test_a_pair_goes_to_the_cheapest_edge_that_holds_it(lengths: np.ndarray, edges: np.ndarray) -> None:
    """And to none if none does."""
    edges = np.unique(edges, axis=0)
    cost = edges.sum(axis=1)
    for pair, bucket in zip(lengths, assign_pairs(lengths, edges, cost), strict=True):
        holding = [cost[i] for i in range(len(edges)) if (edges[i] >= pair).all()]
        if holding:
            assert (edges[bucket] >= pair).all()
            assert cost[bucket] == min(holding)
        else:
            assert bucket == len(edges)


def test_many_lengths_are_planned_on_a_coarse_grid() -> None:
    """More than 64 lengths a side: edges hold all pairs, and more of them waste less."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5000, (2000, 1)) + rng.integers(0, 300, (2000, 2))
    plans = [Bucketing(max_tokens=100_000, num_buckets=k).plan(lengths) for k in (1, 4, 16, 64)]

    assert all(plan.tokens == lengths.sum() for plan in plans)
    assert sorted(plan.cells for plan in plans) == [plan.cells for plan in plans[::-1]]


def test_pairs_are_sorted_on_both_sides() -> None:
    """Pools and buckets waste less than half of what sorting by the sum of both lengths does."""
    lengths = corpus(20_000)
    budget, buckets = (Bucketing(max_tokens=2048, num_buckets=k).plan(lengths) for k in (None, 48))
    by_sum = Padding(36, shuffle=False).plan(lengths[np.argsort(lengths.sum(axis=1), kind="stable")])

    for plan in (budget, buckets):
        assert 1 - plan.padding_efficiency < 0.5 * (1 - by_sum.padding_efficiency)


def test_simulate_counts_pairs() -> None:
    """The same cells as the plans; only strategies that place pairs, unless another is asked for."""
    lengths = corpus(500)
    frame = simulate(lengths, batch_sizes=[8, 32])

    assert frame["strategy"].unique().tolist() == list(PAIR_STRATEGIES)
    assert (frame["tokens"] == lengths.sum()).all()
    assert (frame["over_budget"] == 0).all()
    assert frame["cells"][0] == Padding(8).plan(lengths).cells
    with pytest.raises(ValueError, match=r"a strategy for pairs must be one of 'padding'.*got 'splicing'"):
        simulate(lengths, strategies=["splicing"])
    with pytest.raises(ValueError, match="every sequence is empty"):
        simulate([[1, 0], [0, 3]])


def test_compare_measures_both_sides_of_pairs() -> None:
    """Rows are predicted and measured, and the advice shows how pairs are read."""
    found = compare(corpus(60), hidden=4, batch_sizes=[8], seconds=1, strategies=["padding", "token_budget"])

    assert found.frame["measured"].notna().all()
    assert "source, target = batch" in found.recommendation.code
    plan = Padding(8).plan(corpus(60))
    steps, cells, _ = Workload("sru", hidden=4).effort(plan)
    assert steps.tolist() == plan.steps.sum(axis=1).tolist()
    assert cells.sum() == plan.cells


def test_the_command_line_reads_two_columns(tmp_path: Path) -> None:
    """simulate and plan take pairs; stats and both options together are refused."""
    path = tmp_path / "pairs.csv"
    path.write_text("src,tgt\n" + "".join(f"{a},{b}\n" for a, b in corpus(50)))
    run = CliRunner().invoke
    counted = run(main, ["simulate", str(path), "--columns", "src,tgt", "--batch-sizes", "4", "--json"])
    planned = run(main, ["plan", str(path), "--columns", "src,tgt", "--strategy", "Bucketing(max_tokens=200)", "--csv"])

    assert [row["strategy"] for row in json.loads(counted.stdout)["rows"]] == list(PAIR_STRATEGIES)
    assert planned.stdout.startswith("batch,steps,source_steps,target_steps,lanes,cells,tokens,pieces\n")
    assert "these are pairs" in run(main, ["stats", str(path), "--columns", "src,tgt"]).output
    assert "give either --column" in run(main, ["simulate", str(path), "--columns", "a,b", "--column", "a"]).output
    assert "give that file" in run(main, ["simulate", "--gamma", "2,3", "--columns", "src,tgt"]).output
    assert "names of two columns" in run(main, ["simulate", str(path), "--columns", "src"]).output
    assert run(main, ["simulate", "--corpus", "tatoeba_en_zh", "--batch-sizes", "64"]).exit_code == 0


@given(strategies.pair_lengths(40), st.integers(1, 9), st.integers(0, 60), st.sampled_from(["sum", "max"]))
def test_static_shapes_hold_every_pair_that_fits_alone(
    lengths: np.ndarray, num_buckets: int, more: int, budget: str
) -> None:
    """However few edges are wanted: none of those found is over a budget that its pairs are within."""
    lengths = np.maximum(lengths, 1)
    most = int(getattr(lengths, "sum" if budget == "sum" else "max")(axis=1).max()) + more
    strategy = Bucketing(max_tokens=most, num_buckets=num_buckets, static_shapes=True, budget=budget)
    plan = strategy.plan(lengths)

    laws.law_budget(plan, strategy)
    assert plan.tokens == lengths.sum()


@pytest.mark.parametrize(
    "strategy", [Bucketing(max_tokens=2**60), Bucketing(max_tokens=2**60, num_buckets=3)], ids=repr
)
def test_huge_lengths_do_not_overflow(strategy: Bucketing) -> None:
    """Near 2**62 tokens on a side: planned within the budget, or refused."""
    for lengths in (
        [[1, 1]] * 7 + [[2**60 - 50, 1]] + [[1, 1]] * 20,
        [[1, 1], [2, 2], [3, 3]] * 300 + [[2**55, 2**55]],
    ):
        plan = strategy.plan(lengths)
        assert plan.tokens == sum(map(sum, lengths))
        assert all(sum(map(int, part.steps)) * int(part.lanes) <= 2**60 for part in plan)
    for padding in (Padding(1, pad_to_multiple_of=2**62), Bucketing(batch_size=2, pad_to_multiple_of=2**62)):
        with pytest.raises(ValueError, match=r"more than 2\*\*62 cells"):
            padding.plan([[3, 3]])
    with pytest.raises(ValueError, match="does not allow"):
        Bucketing(max_tokens=2**62, pad_to_multiple_of=2**62).plan([[3, 3]])


def test_edges_may_be_arrays() -> None:
    """As numpy makes them."""
    edges = np.array([[4, 4], [9, 9]])
    assert Bucketing(max_tokens=99, bucket_edges=edges) == Bucketing(max_tokens=99, bucket_edges=[(4, 4), (9, 9)])
    assert Bucketing(max_tokens=99, bucket_edges=list(edges)).bucket_edges == ((4, 4), (9, 9))


def test_a_pair_with_an_empty_side_is_listed() -> None:
    """With the tokens of its other side."""
    plan = Padding(2).plan([[3, 0], [2, 2], [0, 0], [0, 5]])

    assert plan.dropped["sequence"].tolist() == [0, 2, 3]
    assert plan.dropped["length"].tolist() == [[3, 0], [0, 0], [0, 5]]
    assert (plan.tokens, len(plan)) == (4, 1)


def test_only_empty_pairs_make_no_batch() -> None:
    """As only empty sequences do."""
    for strategy in (Padding(2), Bucketing(max_tokens=8), Bucketing(max_tokens=8, num_buckets=2)):
        plan = strategy.plan([[0, 3], [3, 0]])
        assert (len(plan), plan.tokens, plan.cells, len(plan.dropped)) == (0, 0, 0, 2)


def test_a_pair_over_budget_follows_the_policy() -> None:
    """An error that names it; dropped and listed; or alone."""
    lengths = [[3, 2], [5, 9], [1, 1]]
    with pytest.raises(
        ValueError, match=r"pair 1 has 5 \+ 9 tokens, which max_tokens=10 does not allow \(1 of 3 pairs"
    ):
        Bucketing(max_tokens=10).plan(lengths)
    with pytest.raises(
        ValueError, match=r"pair 0 has 1 \+ 1 tokens, which max_tokens=8, pad_to_multiple_of=8 does not"
    ):
        Bucketing(max_tokens=8, pad_to_multiple_of=8).plan([[1, 1]])
    with pytest.raises(ValueError, match=r"pair 1 has 5 \+ 9 tokens, which bucket_edges=\(\(5, 5\),\) does not allow"):
        Bucketing(batch_size=8, bucket_edges=[(5, 5)]).plan(lengths)
    assert Bucketing(max_tokens=10, overlong="drop").plan(lengths).dropped["length"].tolist() == [[5, 9]]
    alone = Bucketing(max_tokens=10, overlong="alone").plan(lengths)
    assert sorted((alone.steps.sum(axis=1) * alone.lanes).tolist()) == [10, 14]
    assert Bucketing(max_tokens=10, budget="max").plan(lengths).tokens == 21
    for policy in ("split", "truncate"):
        with pytest.raises(ValueError, match=f'overlong="{policy}" cuts a sequence'):
            Bucketing(max_tokens=10, overlong=policy).plan(lengths)


def test_wrong_pairs_are_refused() -> None:
    """Shapes, columns of different length, strategies of one length, and edges of the wrong kind."""
    with pytest.raises(
        ValueError, match=r"lengths of pairs must be \(N, 2\), one row a pair, got ndarray of shape \(2, 5\)"
    ):
        Padding(2).plan(np.ones((2, 5), int))
    with pytest.raises(ValueError, match="source and target of each pair"):
        Padding(2).plan([[1, 2], [3]])
    with pytest.raises(ValueError, match=r"shape \(4, 3\)"):
        Padding(2).plan(np.ones((4, 3), int))
    with pytest.raises(ValueError, match=r"got \[3, -1\] at index 1"):
        Padding(2).plan([[1, 2], [3, -1]])
    for strategy in (Packing(9), Splicing(2, 4), Chunking(2, 4)):
        with pytest.raises(ValueError, match="pairs go to Padding and Bucketing"):
            strategy.plan([[1, 2], [3, 4]])
    with pytest.raises(
        ValueError, match=r"each of bucket_edges is one length, but the lengths need \(source, target\)"
    ):
        Bucketing(max_tokens=9, bucket_edges=[4]).plan([[1, 2]])
    with pytest.raises(
        ValueError, match=r"each of bucket_edges is \(source, target\), but the lengths need one length"
    ):
        Bucketing(max_tokens=9, bucket_edges=[(4, 4)]).plan([1, 2])
    with pytest.raises(ValueError, match="bucket_edges must differ"):
        Bucketing(max_tokens=9, bucket_edges=[(4, 4), (4, 4)])
    with pytest.raises(ValueError, match="a side of bucket_edges must be at least 1, got 0"):
        Bucketing(max_tokens=9, bucket_edges=[(4, 0)])
    with pytest.raises(ValueError, match='pairs take edges="optimal"'):
        Bucketing(max_tokens=9, num_buckets=2, edges="quantile").plan([[1, 2]])
    with pytest.raises(ValueError, match="budget must be one of 'sum', 'max', got 'all'"):
        Bucketing(max_tokens=9, budget="all")
    with pytest.raises(ValueError, match="budget=max goes with max_tokens"):
        Bucketing(batch_size=9, budget="max")


def test_a_plan_of_pairs_by_hand_is_checked() -> None:
    """What a plan of pairs cannot have."""
    plan = Padding(2).plan([[3, 1], [2, 2]])
    columns = {
        name: getattr(plan, name)
        for name in ("sequence", "start", "length", "step", "lane", "batch_ptr", "steps", "lanes")
    }
    with pytest.raises(ValueError, match="one whole pair a lane"):
        Plan(**columns, carry=True)
    with pytest.raises(ValueError, match=r"column steps has shape \(1,\), expected \(1, 2\)"):
        Plan(**columns | {"steps": plan.steps[:, 0]})
