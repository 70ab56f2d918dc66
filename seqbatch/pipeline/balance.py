"""How many layers each stage gets."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from seqbatch.strategy import check_integer

__all__ = ["balanced_split"]


def balanced_split(costs: Sequence[float], stages: int, *, tail: float = 0.0, head: float = 0.0) -> tuple[int, ...]:
    """Return how many consecutive layers each stage gets, so that the costliest stage costs least.

    Among such splits, the one with the least sum of squares, then the one whose earlier stages have more layers.
    The sums are exact, so that equal costs are equal in every split.

    Args:
        costs: Of each layer.
        stages: How many stages; each gets a layer, but the last may do without if it has a tail.
        tail: What the last stage has besides (softmax).
        head: What the first stage has besides (embedding).

    Raises:
        ValueError: more stages than can be filled, or costs are negative.

    >>> balanced_split([1, 1, 1, 1], 2), balanced_split([1, 1, 1, 1], 2, tail=2), balanced_split([1, 1], 3, tail=9)
    ((2, 2), (3, 1), (1, 1, 0))
    """
    check_integer("stages", stages, at_least=1)
    if not all(0 <= cost < math.inf for cost in (*costs, tail, head)):
        raise ValueError(f"costs must be finite and not negative, got {list(costs)}, head={head}, tail={tail}")
    most = len(costs) + (tail > 0 and len(costs) > 0)
    if stages > most:
        alone = " and a stage of its own for what is last" if most > len(costs) else ""
        raise ValueError(f"{stages} stages are too many for {len(costs)} layers{alone}: take at most {most} stages")
    first, *between, last = _exact([head, *costs, tail])
    sums = list(accumulate(between, initial=0))

    def cost(stage: int, begin: int, end: int) -> int:
        return sums[end] - sums[begin] + (stage == 0) * first + (stage == stages - 1) * last

    least = _best_tails(
        len(costs), stages, tail > 0, lambda stage, begin, end, rest: max(cost(stage, begin, end), rest)
    )
    top = least[0][0][0]
    squares = _best_tails(
        len(costs), stages, tail > 0,
        lambda stage, begin, end, rest: math.inf if (own := cost(stage, begin, end)) > top else own * own + rest,
    )  # fmt: skip
    cuts = [0]
    for stage in range(stages):
        cuts.append(squares[stage][cuts[-1]][1])
    return tuple(end - begin for begin, end in pairwise(cuts))


def _exact(costs: Sequence[float]) -> list[int]:
    """Floats as multiples of one unit, whose sums have no rounding."""
    ratios = [float(cost).as_integer_ratio() for cost in costs]
    unit = max(bottom for _, bottom in ratios)  # powers of two
    return [top * (unit // bottom) for top, bottom in ratios]


def _best_tails(
    layers: int, stages: int, empty: bool, value: Callable[[int, int, int, float], float]
) -> list[list[tuple[float, int]]]:
    """Dynamic programming from the last stage: [stage][begin] is the least value from there on, and its stage's end."""
    table = [[(math.inf, layers)] * (layers + 1) for _ in range(stages + 1)]
    table[stages][layers] = (0, layers)
    for stage in reversed(range(stages)):
        may_be_empty = empty and stage == stages - 1 and stages > 1
        for begin in range(layers + 1):
            ends = range(layers, begin - may_be_empty, -1)  # the most layers first, for ties
            choices = [(value(stage, begin, end, rest), end) for end in ends
                       if (rest := table[stage + 1][end][0]) != math.inf]  # fmt: skip
            table[stage][begin] = min(choices, key=lambda choice: choice[0], default=(math.inf, layers))
    return table
