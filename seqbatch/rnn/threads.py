"""Run the blocks of a CPU kernel side by side, on as many threads as torch is set to use.

numba's own threads are not used: its portable threading layer stops the process when two Python
threads enter it, and the OpenMP one stops forked children.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["GROUPS", "run_blocks"]

GROUPS = 16  # lanes are summed in this many groups at most, whatever the number of threads
COLUMNS = 512  # of one block: a carried row then stays in the first-level cache
_SMALL = 1 << 15  # elements below which a second thread costs more than it saves

Span = tuple[int, int]
Block = Callable[[Span, Span, int, bool], None]
_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # process, threads, pool


def run_blocks(block: Block, lanes: int, width: int, directions: int, elements: int, most: int = COLUMNS) -> None:
    """Call ``block(lanes, columns, group, reverse)`` for all lanes and columns.

    Args:
        block: The work. Two blocks share no output; those of one group share lanes.
        lanes: Number of lanes.
        width: Columns of one direction; the reverse direction has the columns from ``width`` on.
        directions: 1 or 2.
        elements: How much work there is in all, in elements.
        most: Columns of one block.

    >>> run_blocks(lambda *block: print(*block), 2, 600, 1, 0)
    (0, 1) (0, 512) 0 False
    (0, 1) (512, 600) 0 False
    (1, 2) (0, 512) 1 False
    (1, 2) (512, 600) 1 False
    """
    each = max(-(-lanes // GROUPS), 1)
    blocks = [
        ((n, min(n + each, lanes)), (start + j, start + min(j + most, width)), n // each, start > 0)
        for n in range(0, lanes, each)
        for start in range(0, directions * width, max(width, 1))
        for j in range(0, width, most)
    ]
    threads = min(torch.get_num_threads(), len(blocks))
    if threads <= 1 or elements < _SMALL:
        _run(block, blocks)
        return
    pool = _threads(threads - 1)
    waiting = [pool.submit(_run, block, blocks[i::threads]) for i in range(1, threads)]
    _run(block, blocks[::threads])
    for future in waiting:
        future.result()


def _run(block: Block, blocks: Iterable[tuple[Span, Span, int, bool]]) -> None:
    for arguments in blocks:
        block(*arguments)


def _threads(number: int) -> ThreadPoolExecutor:
    """A pool that lasts; a forked child, which inherits no threads, makes its own."""
    global _pool
    if _pool is None or _pool[0] != os.getpid() or _pool[1] < number:
        _pool = os.getpid(), number, ThreadPoolExecutor(number, "seqbatch")
    return _pool[2]
