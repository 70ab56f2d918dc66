"""Run element-wise programs over rows on CPU: one numba loop for all programs, so none has to be compiled.

An instruction ``(code, d, a, b)`` works on registers, some columns of a row or of several lanes' rows of a step, which
stay in the first-level cache: its cost is that of a vector operation, and its decoding is spread over the elements.
Buffers are given by address: row r of group g of buffer k begins at ``table[k] = (address, bytes a row, bytes a
group)``; 0 bytes a row repeat one row for all.
"""

from typing import Any

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic
from numpy.typing import NDArray

from seqbatch.rnn.activations import compiled_fast, sigmoid, tanh
from seqbatch.rnn.programs import WIDTH, Code

__all__ = ["run"]

Array = NDArray[Any]


@intrinsic
def _pointer(typing: Any, address: Any, like: Any) -> Any:
    """An address as a pointer to what `like` is an array of."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), build  # type: ignore[no-untyped-call]


@compiled_fast
def _at(address: int, width: int, like: Array) -> Array:
    return carray(_pointer(address, like), width)  # type: ignore[call-arg]


@compiled_fast
def _compute(code: int, to_at: int, x_at: int, y_at: int, width: int, like: Array) -> None:
    """One vector operation; `to` overlaps neither x nor y."""
    to, x, y = _at(to_at, width, like), _at(x_at, width, like), _at(y_at, width, like)
    zero, one = to.dtype.type(0), to.dtype.type(1)
    if code == Code.COPY:
        for j in range(width):
            to[j] = x[j]
    elif code == Code.ADD:
        for j in range(width):
            to[j] = x[j] + y[j]
    elif code == Code.SUB:
        for j in range(width):
            to[j] = x[j] - y[j]
    elif code == Code.MUL:
        for j in range(width):
            to[j] = x[j] * y[j]
    elif code == Code.DIV:
        for j in range(width):
            to[j] = x[j] / y[j]
    elif code == Code.NEG:
        for j in range(width):
            to[j] = -x[j]
    elif code == Code.SIGMOID:
        for j in range(width):
            to[j] = sigmoid(x[j])
    elif code == Code.TANH:
        for j in range(width):
            to[j] = tanh(x[j])
    elif code == Code.RELU:
        for j in range(width):
            to[j] = zero if x[j] < 0 else x[j]  # NaN stays
    elif code == Code.EXP:
        for j in range(width):
            to[j] = np.exp(x[j])
    elif code == Code.LOG:
        for j in range(width):
            to[j] = np.log(x[j])
    elif code == Code.SQRT:
        for j in range(width):
            to[j] = np.sqrt(x[j])
    elif code == Code.ABS:
        for j in range(width):
            to[j] = abs(x[j])
    elif code == Code.SOFTPLUS:
        for j in range(width):
            to[j] = x[j] if x[j] > 20 else np.log1p(np.exp(x[j]))  # as in torch
    elif code == Code.D_SIGMOID:
        for j in range(width):
            to[j] = x[j] * (y[j] * (one - y[j]))
    elif code == Code.D_TANH:
        for j in range(width):
            to[j] = x[j] * (one - y[j] * y[j])
    elif code == Code.D_RELU:
        for j in range(width):
            to[j] = zero if y[j] <= 0 else x[j]
    elif code == Code.D_ABS:
        for j in range(width):
            to[j] = x[j] if y[j] > 0 else -x[j] if y[j] < 0 else zero
    elif code == Code.D_SOFTPLUS:
        for j in range(width):
            to[j] = x[j] if y[j] > 20 else x[j] * sigmoid(y[j])


@compiled_fast
def _move(code: int, here_at: int, after_at: int, x_at: int, width: int, like: Array, real: bool, cut: bool) -> None:
    """From a step to the next, or back: a reset clears what comes after, padding holds what was before."""
    here, after, x = _at(here_at, width, like), _at(after_at, width, like), _at(x_at, width, like)
    if code == Code.ACCUMULATE:
        for j in range(width):
            here[j] += x[j]
    elif code == Code.NEXT:
        if cut:
            after[:] = 0
        elif real:
            for j in range(width):
                after[j] = x[j]
        else:
            for j in range(width):
                after[j] = here[j]
    elif real and not cut:
        for j in range(width):
            x[j] = after[j]
    else:
        x[:] = 0
        if not cut:
            for j in range(width):
                here[j] += after[j]


@compiled_fast
def run(
    once: NDArray[np.int32],
    each: NDArray[np.int32],
    space: Array,
    slots: int,
    numbers: Array,
    table: NDArray[np.int64],
    reset: NDArray[np.bool_],
    mask: NDArray[np.bool_],
    grid: tuple[int, int, int],
    times: tuple[int, int],
    span: tuple[int, int],
    columns: tuple[int, int],
) -> None:
    """Run `once` for each block of columns and `each` for each row of it.

    Rows are t * lanes + n. ``next`` writes the state that enters the next step, ``back`` reads that state's gradient
    and passes on what belongs to the step before; both know resets and padding.

    Args:
        once: (K, 4), instructions whose registers keep their values.
        each: (M, 4), instructions for each row.
        space: The registers, (registers, WIDTH); the caller keeps it alive, since what is read by address is not seen.
        slots: Number of registers and rows.
        numbers: The constants; its dtype is that of all buffers.
        table: (buffers, 3), see above.
        reset: (T * B,) or without elements.
        mask: (T * B,) or without elements.
        grid: T, B, and lanes of a group: those that add to one sum.
        times: First and last step + 1; backwards where the first is larger: from first - 1 down to last.
        span: Lanes from, to.
        columns: Columns from, to.
    """
    steps, lanes, share = grid
    first, last = times
    size = numbers.itemsize
    place, stride = np.empty(slots, np.int64), np.empty(slots, np.int64)
    for lo in range(columns[0], columns[1], WIDTH):
        width = min(WIDTH, columns[1] - lo)
        tile, packed = max(WIDTH // width, 1), width * size  # rows of a register, bytes of one
        for i in range(len(space)):
            place[i], stride[i] = space.ctypes.data + i * WIDTH * size, packed
        for i in range(len(once)):
            code, d, a, b = once[i]
            if code == Code.NUMBER:
                _at(place[d], WIDTH, numbers)[:] = numbers[a]
            else:
                place[d], stride[d] = table[a, 0] + (b + lo) * size, 0
        for k in range(abs(last - first)):
            t = first + k if last > first else first - 1 - k
            for n in range(span[0], span[1], tile):
                rows = min(tile, span[1] - n)
                for i in range(len(each)):
                    code, d, a, b = each[i]
                    if code == Code.ROW:
                        begin = (t * lanes + n) * table[a, 1] + n // share * table[a, 2] + (b + lo) * size
                        place[d], stride[d] = table[a, 0] + begin, table[a, 1]
                    elif code >= Code.COPY:
                        if stride[d] == packed and stride[a] == packed and stride[b] == packed:
                            _compute(code, place[d], place[a], place[b], rows * width, numbers)
                            continue
                        for r in range(rows):
                            to, x, y = place[d] + r * stride[d], place[a] + r * stride[a], place[b] + r * stride[b]
                            _compute(code, to, x, y, width, numbers)
                    else:  # d is a row of buffer b
                        for r in range(rows):
                            row, shift = t * lanes + n + r, ((n + r) // share - n // share) * table[b, 2]
                            real = len(mask) == 0 or mask[row]
                            cut = t + 1 < steps and len(reset) > 0 and reset[row + lanes]
                            here = place[d] + r * stride[d] + shift
                            after, x = here + lanes * table[b, 1], place[a] + r * stride[a]
                            _move(code, here, after, x, width, numbers, real, cut)
