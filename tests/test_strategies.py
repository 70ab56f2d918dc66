"""The laws, applied to every strategy: on generated lengths with generated settings, and on real corpora."""

import os
from pathlib import Path

import laws
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from seqbatch.lengths import corpus_names, load_corpus, read_lengths
from seqbatch.strategy import Strategy

EXTRA = os.environ.get("SEQBATCH_EXTRA_LENGTHS", "")
FILES = sorted(Path(EXTRA).glob("*.txt.gz")) if EXTRA else []
CORPORA = {name: lambda name=name: load_corpus(name) for name in corpus_names()}
MORE = {path.name.removesuffix(".txt.gz"): lambda path=path: read_lengths(path) for path in FILES}
MORE = {name: read for name, read in MORE.items() if name not in CORPORA}


@pytest.mark.parametrize("kind", strategies.KINDS)
@settings(max_examples=500)
@given(data=st.data(), lengths=strategies.lengths(), epoch=st.integers(0, 3))
def test_every_plan_obeys_the_laws_of_one_plan(kind: str, data: st.DataObject, lengths: np.ndarray, epoch: int) -> None:
    """Exactly once, disjoint, within budget and tight, for any lengths and any settings."""
    strategy = data.draw(strategies.KINDS[kind])
    plan = strategy.plan(lengths, seed=1, epoch=epoch)
    laws.law_exactly_once(lengths, plan)
    laws.law_disjoint(plan)
    laws.law_budget(plan, strategy)
    laws.law_tight(plan, strategy)


@given(strategies.lengths(), strategies.any_strategy())
def test_a_plan_is_a_function_of_its_arguments(lengths: np.ndarray, strategy: Strategy) -> None:
    """Same arguments, same bits; other epochs and seeds, other batches."""
    laws.law_deterministic(strategy, lengths)


@given(strategies.lengths(), strategies.any_strategy(), st.integers(1, 9), st.sampled_from(["split", "drop"]))
def test_ranks_run_the_plan_once(lengths: np.ndarray, strategy: Strategy, num_replicas: int, tail: str) -> None:
    """Any number of ranks: as many steps each, together the plan, costs of a step side by side."""
    plan = strategy.plan(lengths)
    if plan.carry and len(plan):
        divisors = [d for d in range(1, plan.lanes[0] + 1) if plan.lanes[0] % d == 0]
        num_replicas = divisors[num_replicas % len(divisors)]
    laws.law_ranks(lengths, plan, num_replicas, tail)


@given(strategies.lengths(), strategies.any_strategy(), strategies.histories(), st.integers(1, 9))
def test_an_epoch_survives_any_change_of_ranks(
    lengths: np.ndarray, strategy: Strategy, phases: list[tuple[int, int]], last: int
) -> None:
    """Whatever ranks took whatever steps, the rest comes exactly once."""
    plan = strategy.plan(lengths)
    if plan.carry and len(plan):
        divisors = [d for d in range(1, plan.lanes[0] + 1) if plan.lanes[0] % d == 0]
        phases = [(divisors[ranks % len(divisors)], steps) for ranks, steps in phases]
        last = divisors[last % len(divisors)]
    laws.law_resume(lengths, plan, phases, last)


@pytest.mark.parametrize("kind", strategies.ALL)
@pytest.mark.parametrize("corpus", [*CORPORA, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_real_lengths_obey_all_laws(corpus: str, kind: str) -> None:
    """Every kind of plan over every corpus: all laws, with ranks going 8, 3, 5 (carried: 8, 3, 6)."""
    lengths = (CORPORA | MORE)[corpus]()
    strategy = strategies.ALL[kind](int(lengths.max()))
    plan = strategy.plan(lengths, seed=5)
    laws.law_exactly_once(lengths, plan)
    laws.law_disjoint(plan)
    laws.law_budget(plan, strategy)
    laws.law_tight(plan, strategy)
    laws.law_deterministic(strategy, lengths)
    laws.law_ranks(lengths, plan, 8)
    laws.law_resume(lengths, plan, [(8, 3), (3, 4)], last=6 if plan.carry else 5)
