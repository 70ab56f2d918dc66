"""Small strategies and data for tests of the loader, and the naive twin of a batch."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch

import seqbatch
from seqbatch import Bucketing, Chunking, Packing, Padding, Plan, SequenceBatch, Splicing, TokenArray
from seqbatch.loader import PlanLoader

LONGEST = 20
LENGTHS = np.random.default_rng(5).integers(0, LONGEST + 1, 57)

# Every class, with the settings that change what a loader has to do; epochs of 4 to 12 batches.
STRATEGIES = {
    "padding": Padding(7),
    "padding, multiples": Padding(7, pad_to_multiple_of=8, drop_last=True),
    "token budget": Bucketing(max_tokens=80),
    "static shapes": Bucketing(max_tokens=90, static_shapes=True, num_buckets=3, overlong="split"),
    "pool sort": Bucketing(batch_size=6, window=30),
    "splicing": Splicing(24, 4),
    "splicing, round robin": Splicing(24, 7, assign="round_robin"),
    "chunking": Chunking(16, 6),
    "chunking with context": Chunking(16, 6, left_context=3, right_context=2, drop_last=True),
    "chunking, carried": Chunking(24, 4, carry=True),
    "packing": Packing(LONGEST + 3, rows=3),
    "packing, truncated": Packing(12, rows=4, overlong="truncate"),
}

CARRIED = [name for name, strategy in STRATEGIES.items() if strategy.plan(LENGTHS).carry]


def tokens_of(index: int, count: int) -> np.ndarray:
    """Tokens that say whose they are: sequence and position can be read off each."""
    return 1 + index * 1000 + np.arange(count)


DATA = TokenArray.of_sequences([tokens_of(i, n) for i, n in enumerate(LENGTHS.tolist())])


def seen(batches: Iterable[SequenceBatch]) -> Counter[int]:
    """How often each token came outside context."""
    count: Counter[int] = Counter()
    for batch in batches:
        at = batch.placement
        for piece, left, right in zip(batch.unbatch(), at.left_context, at.right_context, strict=True):
            count.update(piece[left : len(piece) - right].tolist())
    return count


def expected(plan: Plan) -> Counter[int]:
    """Every token once, but those that the plan says it dropped."""
    count = Counter(np.concatenate([tokens_of(i, n) for i, n in enumerate(LENGTHS.tolist())]).tolist())
    for sequence, start, length, _ in plan.dropped.tolist():
        count.subtract(tokens_of(sequence, LENGTHS[sequence])[start : start + length].tolist())
    return +count


def naive(plan: Plan, number: int) -> dict[str, torch.Tensor]:
    """Batch `number` of a plan of one rank, cell by cell: (T, B) data, mask, reset, targets, loss_mask, ids."""
    batch = plan[number]
    shape = batch.steps, batch.lanes
    data, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
    mask, reset, loss_mask = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    sequence_ids, position_ids = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int64)
    held: dict[int, tuple[int, int]] = {}
    if plan.carry and number:
        previous = plan[number - 1]
        for p in np.argsort(previous.step):
            held[int(previous.lane[p])] = int(previous.sequence[p]), int(previous.start[p] + previous.length[p])
    for p in range(len(batch.sequence)):
        sequence, start, length = int(batch.sequence[p]), int(batch.start[p]), int(batch.length[p])
        step, lane = int(batch.step[p]), int(batch.lane[p])
        left = 0 if batch.left_context is None else int(batch.left_context[p])
        right = 0 if batch.right_context is None else int(batch.right_context[p])
        goes_on = step == 0 and held.get(lane) == (sequence, start)
        reset[step, lane] = not goes_on
        for i in range(length):
            at = step + i, lane
            data[at] = 1 + sequence * 1000 + start + i
            mask[at] = True
            sequence_ids[at] = sequence
            position_ids[at] = i + (start if goes_on else 0)
            if left <= i < length - right and start + i + 1 < LENGTHS[sequence]:
                targets[at], loss_mask[at] = data[at] + 1, True
    return {
        "data": data,
        "mask": mask,
        "reset": reset,
        "targets": targets,
        "loss_mask": loss_mask,
        "sequence_ids": sequence_ids,
        "position_ids": position_ids,
    }


def load(name: str, **options: object) -> PlanLoader:
    """A loader of a strategy of the list over DATA."""
    return seqbatch.make_loader(DATA, STRATEGIES[name], **options)
