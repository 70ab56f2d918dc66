"""What all strategies share: frozen settings checked at construction, one method, one repr."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from operator import index
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from seqbatch.ordering import IntArray, random_bits, random_order

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from seqbatch.plan import Plan

__all__ = ["MOST", "Strategy", "check_choice", "check_cost", "check_integer"]


MOST = 2**62
"""The largest number of tokens or cells that is counted; int64 holds twice as many."""


class Strategy(ABC):
    """The settings of one way to batch sequences; `plan` turns them and the lengths into data.

    A strategy is a frozen dataclass of this base, with a field `shuffle`.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    at_least: ClassVar[dict[str, int]]
    """The integer settings and the smallest value of each; None passes where it is the default."""
    shuffle: bool

    def __post_init__(self) -> None:
        defaults = {f.name: f.default for f in fields(self)}
        for name, default in defaults.items():
            value = getattr(self, name)
            if name in self.at_least and (value is not None or default is not None):
                object.__setattr__(self, name, check_integer(name, value, at_least=self.at_least[name]))
            elif isinstance(default, bool) and not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")

    @abstractmethod
    def plan(self, lengths: "ArrayLike", *, seed: int = 0, epoch: int = 0) -> "Plan":
        """Place every token of the sequences on grids of steps by lanes.

        Args:
            lengths: (N,) tokens of each sequence, any integer dtype. A sequence of length 0 takes no
                cell and is listed in ``plan.dropped``. ``Padding`` and ``Bucketing`` take (N, 2) too,
                source and target of pairs, and list pairs with an empty side.
            seed: Together with `epoch` decides every random choice; an integer from 0 up.
            epoch: A new epoch meets new batch mates.

        Returns:
            The :class:`~seqbatch.plan.Plan`: the same bits for the same arguments, anywhere.

        Raises:
            TypeError: `lengths` are not integers.
            ValueError: no lengths, a negative one, another shape, or a sequence that these settings
                cannot place.
        """

    def _order(self, count: int, seed: int, epoch: int) -> IntArray:
        """The order in which `count` pieces are taken: at random, or as they came."""
        check_integer("seed", seed, at_least=0)
        check_integer("epoch", epoch, at_least=0)
        return random_order(count, int(seed), int(epoch), "order") if self.shuffle else np.arange(count)

    def _words(self, count: int, seed: int, epoch: int) -> "NDArray[np.uint64] | None":
        """A random word for each of `count` pieces; None where they keep their order."""
        check_integer("seed", seed, at_least=0)
        check_integer("epoch", epoch, at_least=0)
        return random_bits(count, int(seed), int(epoch), "order") if self.shuffle else None

    def _provenance(self, seed: int, epoch: int) -> dict[str, Any]:
        """The columns of a plan that say where it comes from."""
        return {"strategy": repr(self), "seed": int(seed), "epoch": int(epoch), "shuffle": self.shuffle}

    def __repr__(self) -> str:
        """The shortest constructor call that makes these settings, without those that change no plan."""
        parts = [
            repr(getattr(self, f.name)) if f.default is MISSING else f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.repr and (f.default is MISSING or getattr(self, f.name) != f.default)
        ]
        return f"{type(self).__name__}({', '.join(parts)})"


def check_integer(name: str, value: object, *, at_least: int) -> int:
    """Return `value` as an int, or say what it should have been.

    >>> check_integer("batch_size", 0, at_least=1)
    Traceback (most recent call last):
    ValueError: batch_size must be at least 1, got 0
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer of at least {at_least}, got {value!r}")
    number = index(value)
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {number}")
    if name not in ("seed", "epoch") and number > MOST:
        raise ValueError(f"{name} must be at most 2**62, got {number}")
    return number


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless `value` is one of `allowed`.

    >>> check_choice("tail", "keep", ("split", "drop"))
    Traceback (most recent call last):
    ValueError: tail must be one of 'split', 'drop', got 'keep'
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_cost(cost: tuple[float, float]) -> tuple[float, float]:
    """Return ``(a, b)`` of the cost ``a * l + b * l**2`` as floats, or say what it should have been."""
    try:
        a, b = (float(part) for part in cost)
    except (TypeError, ValueError):
        raise ValueError(f"cost must be two numbers (a, b) of a*l + b*l**2, got {cost!r}") from None
    if not (0 <= a < float("inf") and 0 <= b < float("inf") and a + b > 0):
        raise ValueError(f"cost (a, b) must be finite, not negative and not both 0, got {cost!r}")
    return a, b
