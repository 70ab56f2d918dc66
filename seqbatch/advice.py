"""One sentence out of a comparison: which strategy and batch size to train with, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from seqbatch.plan import Plan

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Recommendation", "recommend"]

_ABOUT_AS_FAST = 0.97
"""Rows within 3 % of the fastest are as fast; among them more updates an epoch are better."""


@dataclass(frozen=True)
class Recommendation:
    """What to train with.

    Attributes:
        strategy: Name of the row.
        batch_size: Lanes of mean length; None for a strategy that was given ready made.
        settings: The constructor call.
        sentence: The choice and its reason.
        code: Python lines that use it.
    """

    strategy: str
    batch_size: int | None
    settings: str
    sentence: str
    code: str


def recommend(frame: "pd.DataFrame", plans: Sequence[Plan], *, flags: bool = True) -> Recommendation | None:
    """Return the row to use: of those about as fast as the fastest the one with the most updates an epoch.

    Chunks without carried state are left out where any other row ran: they are fast because they cut dependencies.

    Args:
        frame: Rows of :func:`seqbatch.compare.compare`.
        plans: The plan of each row.
        flags: Whether the layers take resets and a mask.
    """
    column = "measured" if frame["measured"].notna().any() else "predicted"
    possible = frame[frame["note"] == ""]
    ran = possible[possible[column].notna()]
    whole = ran[[_keeps_dependencies(plans[i]) for i in ran.index]]
    rows = whole if len(whole) else ran
    if not len(rows):
        return None
    fast = rows[rows[column] >= _ABOUT_AS_FAST * rows[column].max()]
    best = fast.loc[fast["batches"].idxmax()]
    plan = plans[best.name]
    sentence = (
        f"Train with {best['settings']}: {_speed(best[column])} real tokens/s {column}{_against(ran, best, column)}"
    )
    sentence += f"; an epoch has {len(plan):,} updates of about {plan.tokens // max(len(plan), 1):,} tokens."
    cut = _share_cut(plan)
    if cut and plan.carry:
        sentence += f" {cut:.0%} of the sequences cross a window's edge: there the gradient stops, the state does not."
    elif cut:
        sentence += f" {cut:.0%} of the sequences are cut, and no state is carried over the cuts."
    if column == "measured" and len(ran) < len(possible):
        sentence += f" Only {len(ran)} of {len(possible)} rows were measured."
    size = None if np.isnan(best["batch_size"]) else int(best["batch_size"])
    return Recommendation(best["strategy"], size, best["settings"], sentence, _code(best["settings"], plan, flags))


def _against(ran: "pd.DataFrame", best: "pd.Series", column: str) -> str:
    """How much faster than zero padding at its best, and why."""
    padding = ran[ran["strategy"] == "padding"]
    if not len(padding) or best["strategy"] == "padding":
        return f", with {best['padding_efficiency']:.0%} of all cells real tokens"
    other = padding.loc[padding[column].idxmax()]
    ratio = best[column] / other[column]
    if ratio * _ABOUT_AS_FAST < 1:
        return f", about as fast as zero padding at its best ({_speed(other[column])} with {other['settings']})"
    return (
        f", {ratio:.2f} times zero padding at its best ({_speed(other[column])} with {other['settings']}): "
        f"{best['padding_efficiency']:.0%} of the cells it computes are real tokens, "
        f"there {other['padding_efficiency']:.0%}"
    )


def _keeps_dependencies(plan: Plan) -> bool:
    """Whether no sequence is cut without its state being carried on."""
    return plan.carry or not _share_cut(plan)


def _share_cut(plan: Plan) -> float:
    """The share of the sequences that lie in several pieces."""
    pieces = np.unique(plan.sequence, return_counts=True)[1]
    return float((pieces > 1).mean()) if len(pieces) else 0.0


def _code(settings: str, plan: Plan, flags: bool) -> str:
    if plan.pairs:
        told = ", mask=source.mask" if flags else ""
        return (
            f"loader = seqbatch.make_loader(dataset, seqbatch.{settings}, lengths=lengths, next_token=True)\n"
            f"for batch in loader:\n    source, target = batch\n    memory, state = encoder(embed(source.data){told})"
        )
    state = ", batch.carry_in(state)" if plan.carry else ""
    told = ", reset=batch.reset, mask=batch.mask" if flags else ""
    return (
        f"loader, state = seqbatch.make_loader(dataset, seqbatch.{settings}, next_token=True), None\n"
        f"for batch in loader:\n    output, state = rnn(embed(batch.data){state}{told})"
    )


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value < 1e5 else f"{value / 1e3:,.0f} thousand"
