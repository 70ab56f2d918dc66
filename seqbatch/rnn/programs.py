"""Element-wise programs: expressions over rows, their derivative, and the instructions that compute them.

A program is a list of values, each an operation on earlier ones; the derivative is more of the same list. Equal values
are computed once. Instructions are for :mod:`seqbatch.rnn.program_kernels`.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["WIDTH", "Code", "Instructions", "Values"]

WIDTH = 512  # elements of a register
Value = int  # its place in the list
Leaf = tuple[int, int]  # buffer, column
LEAVES = ("number", "load", "once", "back")


class Code(IntEnum):
    """What an instruction (code, d, a, b) does; d, a and b are slots but for what is said here.

    NUMBER fills register d with constant a. ROW makes slot d the current row of buffer a, from column b on. ACCUMULATE
    adds a to row d. NEXT, with d a row of a state, gives a to the step after; BACK, with d a row of a state's
    gradient, gets a from there; b is the buffer. All others compute d from a and b; D_SIGMOID and the like are
    gradient a times a derivative, in terms of the result b or, for D_ABS and D_SOFTPLUS, the operand b.
    """

    NUMBER = 0
    ROW = 1
    ACCUMULATE = 2
    NEXT = 3
    BACK = 4
    COPY = 5
    ADD = 6
    SUB = 7
    MUL = 8
    DIV = 9
    NEG = 10
    SIGMOID = 11
    TANH = 12
    RELU = 13
    EXP = 14
    LOG = 15
    SQRT = 16
    ABS = 17
    SOFTPLUS = 18
    D_SIGMOID = 19
    D_TANH = 20
    D_RELU = 21
    D_ABS = 22
    D_SOFTPLUS = 23


@dataclass(frozen=True)
class Instructions:
    """What the kernel runs.

    Attributes:
        once: (K, 4) int32.
        each: (M, 4) int32.
        registers: How many they use.
        slots: Registers and rows of buffers.
        numbers: The constants, float64.
    """

    once: NDArray[np.int32]
    each: NDArray[np.int32]
    registers: int
    slots: int
    numbers: NDArray[np.float64]


class Values:
    """A list of values; `emit` gives the place of one, the same for the same operation on the same values.

    Operations on values: add, sub, mul, div, neg, sigmoid, tanh, relu, exp, log, sqrt, abs, softplus. Leaves:
    ``number`` x; ``load`` buffer, column; ``once`` buffer, column for a buffer that is the same in all rows; ``back``
    buffer, column for the gradient of a state that enters the next step.

    >>> values = Values()
    >>> x, y = values.emit("load", 0, 0), values.emit("load", 1, 0)
    >>> product = values.emit("mul", x, y)
    >>> values.emit("mul", x, y) == product
    True
    >>> one = values.emit("number", 1.0)
    >>> values.derivative({product: one}, [x])[x] == y
    True
    """

    def __init__(self) -> None:
        self.list: list[tuple[Any, ...]] = []
        self._place: dict[tuple[Any, ...], Value] = {}

    def copy(self) -> "Values":
        """A list that grows by itself."""
        other = Values()
        other.list, other._place = list(self.list), dict(self._place)
        return other

    def emit(self, name: str, *operands: Any) -> Value:
        """The place of a value."""
        if name == "mul":  # so that no derivative begins with products by 1
            for one, other in (operands, operands[::-1]):
                if self.list[one] == ("number", 1.0):
                    return int(other)
        entry = (name, *operands)
        if entry not in self._place:
            self._place[entry] = len(self.list)
            self.list.append(entry)
        return self._place[entry]

    def derivative(self, seeds: Mapping[Value, Value], leaves: Iterable[Value]) -> dict[Value, Value]:
        """The gradient for each leaf, given those for some values; leaves without one are left out."""
        wanted, end = set(leaves), len(self.list)
        active: set[Value] = set()
        for place, (name, *operands) in enumerate(self.list):
            if place in wanted or (name not in LEAVES and any(x in active for x in operands)):
                active.add(place)
        gradient = dict(seeds)
        for place in range(end - 1, -1, -1):
            name, *operands = self.list[place]
            if place not in gradient or name in LEAVES:
                continue
            parts = self._parts(name, place, operands, gradient[place], [x in active for x in operands])
            for operand, part in parts:
                gradient[operand] = self.emit("add", gradient[operand], part) if operand in gradient else part
        return {leaf: gradient[leaf] for leaf in wanted if leaf in gradient}

    def _parts(
        self, name: str, out: Value, operands: list[Value], g: Value, active: list[bool]
    ) -> list[tuple[Value, Value]]:
        """What a value passes on to each of its active operands."""
        emit, a = self.emit, operands[0]
        if len(operands) == 1:
            if not active[0]:
                return []
            one_operand = {
                "neg": lambda: emit("neg", g),
                "sigmoid": lambda: emit("d_sigmoid", g, out),
                "tanh": lambda: emit("d_tanh", g, out),
                "relu": lambda: emit("d_relu", g, out),
                "exp": lambda: emit("mul", g, out),
                "log": lambda: emit("div", g, a),
                "sqrt": lambda: emit("div", emit("mul", emit("number", 0.5), g), out),
                "abs": lambda: emit("d_abs", g, a),
                "softplus": lambda: emit("d_softplus", g, a),
            }
            return [(a, one_operand[name]())]
        b = operands[1]
        left = {"add": lambda: g, "sub": lambda: g, "mul": lambda: emit("mul", g, b), "div": lambda: emit("div", g, b)}
        right = {
            "add": lambda: g,
            "sub": lambda: emit("neg", g),
            "mul": lambda: emit("mul", g, a),
            "div": lambda: emit("neg", emit("mul", emit("div", g, b), out)),
        }
        found = [(a, left[name]())] if active[0] else []
        return found + ([(b, right[name]())] if active[1] else [])

    def instructions(self, effects: Iterable[tuple[str, int, Value, int]]) -> Instructions:
        """Instructions for what is to be written: (``store``, ``accumulate`` or ``next``, buffer, value, column)."""
        writer = _Writer(self.list, list(effects))
        writer.write()
        numbers = [entry[1] for entry in self.list if entry[0] == "number"]
        slots = writer.registers + writer.rows
        once, each = (writer.resolved(part) for part in (writer.once, writer.each))
        return Instructions(once, each, writer.registers, slots, np.array(numbers or [0.0]))


class _Writer:
    """Instructions for a list of values.

    Each value is in a slot: a register, which others use again later, or a row of a buffer, where it lies already or is
    to be stored. A result never lies where one of its operands does: the kernel's loops are vector loops only then.
    """

    def __init__(self, values: list[tuple[Any, ...]], effects: list[tuple[str, int, Value, int]]) -> None:
        self.values, self.effects = values, effects
        self.once: list[tuple[Any, ...]] = []
        self.each: list[tuple[Any, ...]] = []
        self.registers = self.rows = 0
        self._slot: dict[Value, int] = {}
        self._row: dict[Leaf, int] = {}
        self._free: list[int] = []
        self._uses: dict[Value, int] = defaultdict(int)

    def write(self) -> None:
        """Every value right after what it needs, and what is to be written right after its value."""
        needed = self._needed()
        stores = {value: (buffer, column) for what, buffer, value, column in reversed(self.effects) if what == "store"}
        count = 0
        for value, (name, *operands) in enumerate(self.values):
            count += name == "number"
            if value not in needed:
                continue
            target = None
            if name == "number":
                self.registers += 1  # never one that is written in each row
                self._slot[value] = self.registers - 1
                self.once.append((name, self._slot[value], count - 1, 0))
            elif name == "once":
                self._slot[value] = self._new_row()
                self.once.append(("row", self._slot[value], *operands))
            elif name == "load":
                self._slot[value] = self._at(*operands)
            elif name == "back":
                row, self._slot[value] = self._at(*operands), self._register()
                self.each.append((name, row, self._slot[value], operands[0]))
            else:
                target = stores.get(value)
                self._compute(value, name, operands, target)
            self._write_effects(value, target)

    def resolved(self, instructions: list[tuple[Any, ...]]) -> NDArray[np.int32]:
        """Instructions as numbers; rows have the slots after the registers."""
        found = []
        for name, *fields in instructions:
            slots = {"number": 1, "row": 1, "accumulate": 2, "next": 2, "back": 2}.get(name, 3)
            found.append(
                (
                    Code[name.upper()],
                    *[f if f >= 0 else self.registers - 1 - f for f in fields[:slots]],
                    *fields[slots:],
                )
            )
        return np.array(found, np.int32).reshape(-1, 4)

    def _needed(self) -> set[Value]:
        """The values that are written, what these need, and gradients that come back: they hold states over padding."""
        needed = {value for _, _, value, _ in self.effects}
        needed |= {value for value, (name, *_) in enumerate(self.values) if name == "back"}
        for value in range(len(self.values) - 1, -1, -1):
            name, *operands = self.values[value]
            if value in needed and name not in LEAVES:
                needed.update(operands)
                for x in operands:
                    self._uses[x] += 1
        for _, _, value, _ in self.effects:
            self._uses[value] += 1
        return needed

    def _compute(self, value: Value, name: str, operands: list[Value], target: Leaf | None) -> None:
        slots = [self._slot[x] for x in operands]
        self._slot[value] = self._register() if target is None else self._at(*target)
        self.each.append((name, self._slot[value], *slots, *[slots[0]] * (2 - len(slots))))
        for x in operands:
            self._used(x)

    def _write_effects(self, value: Value, done: Leaf | None) -> None:
        for what, buffer, other, column in self.effects:
            if other != value:
                continue
            if what != "store" or (buffer, column) != done:
                name = "copy" if what == "store" else what
                last = self._slot[value] if name == "copy" else buffer
                self.each.append((name, self._at(buffer, column), self._slot[value], last))
            self._used(value)

    def _used(self, value: Value) -> None:
        self._uses[value] -= 1
        name = self.values[value][0]
        if not self._uses[value] and name != "number" and self._slot[value] >= 0:
            self._free.append(self._slot[value])

    def _register(self) -> int:
        if self._free:
            return self._free.pop()
        self.registers += 1
        return self.registers - 1

    def _new_row(self) -> int:
        self.rows += 1
        return -self.rows

    def _at(self, buffer: int, column: int) -> int:
        if (buffer, column) not in self._row:
            self._row[buffer, column] = self._new_row()
            self.each.append(("row", self._row[buffer, column], buffer, column))
        return self._row[buffer, column]
