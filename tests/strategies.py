"""Hypothesis generators of lengths and settings, and the strategies that every law is applied to."""

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from seqbatch import Bucketing, Chunking, Packing, Padding, Splicing

LONGEST = 60

# Each kind of plan once: what every law is applied to on real lengths (scaled by the longest, see `scaled`).
ALL = {
    "padding": lambda longest: Padding(16),
    "padding in order": lambda longest: Padding(16, shuffle=False, pad_to_multiple_of=8),
    "padding, drop last": lambda longest: Padding(16, drop_last=True),
    "token budget": lambda longest: Bucketing(max_tokens=8 * longest),
    "token budget, multiples": lambda longest: Bucketing(
        max_tokens=8 * longest, batch_size_multiple=4, max_sequences=50, pad_to_multiple_of=8, overlong="alone"
    ),
    "quadratic budget": lambda longest: Bucketing(max_tokens=16 * longest, cost=(1.0, 1.0 / longest)),
    "pool sort": lambda longest: Bucketing(batch_size=16, window=320),
    "buckets": lambda longest: Bucketing(max_tokens=8 * longest, num_buckets=6, edges="equal_tokens"),
    "static shapes": lambda longest: Bucketing(max_tokens=8 * longest, static_shapes=True),
    "static shapes, split": lambda longest: Bucketing(
        max_tokens=4 * longest, static_shapes=True, bucket_edges=[1 + longest // 8, 1 + longest // 4], overlong="split"
    ),
    "splicing": lambda longest: Splicing(24, 35),
    "splicing, round robin": lambda longest: Splicing(24, 35, assign="round_robin"),
    "chunking": lambda longest: Chunking(16, 20),
    "chunking with context": lambda longest: Chunking(16, 20, left_context=7, right_context=3, drop_last=True),
    "chunking, carried": lambda longest: Chunking(24, 20, carry=True),
    "packing": lambda longest: Packing(longest, rows=3),
    "packing, next fit": lambda longest: Packing(longest + 7, algorithm="next_fit", max_sequences=5),
    "packing, optimal": lambda longest: Packing(5 * longest // 2, algorithm="optimal", time_limit=600),
    "packing, truncated": lambda longest: Packing(1 + longest // 2, overlong="truncate"),
}

# The same of pairs; scaled by the longest sum.
PAIRS = {
    "padding": lambda longest: Padding(16),
    "token budget": lambda longest: Bucketing(max_tokens=8 * longest),
    "budget of the longer side": lambda longest: Bucketing(max_tokens=4 * longest, budget="max", batch_size_multiple=4),
    "quadratic budget": lambda longest: Bucketing(max_tokens=16 * longest, cost=(1.0, 1.0 / longest)),
    "pool sort": lambda longest: Bucketing(batch_size=16, window=320),
    "buckets": lambda longest: Bucketing(max_tokens=8 * longest, num_buckets=12, pad_to_multiple_of=4),
    "static shapes": lambda longest: Bucketing(max_tokens=8 * longest, static_shapes=True, overlong="drop"),
    "edges": lambda longest: Bucketing(
        max_tokens=2 * longest,
        bucket_edges=[(longest // 4, longest // 4), (longest // 8, longest // 3)],
        overlong="alone",
        drop_last=True,
    ),
}


def lengths(min_size: int = 1, max_size: int = 120) -> st.SearchStrategy[np.ndarray]:
    """Lengths with empty, equal and very different ones."""
    each = st.one_of(st.integers(0, 3), st.integers(1, 12), st.integers(0, LONGEST))
    equal = st.tuples(st.integers(1, LONGEST), st.integers(min_size, max_size)).map(lambda t: [t[0]] * t[1])
    return st.one_of(st.lists(each, min_size=min_size, max_size=max_size), equal).map(lambda x: np.array(x, np.int64))


def pair_lengths(max_size: int = 120) -> st.SearchStrategy[np.ndarray]:
    """Pairs of lengths with empty sides, equal pairs, and sides that go together."""
    side = st.integers(0, 3) | st.integers(1, 12) | st.integers(0, LONGEST)
    near = st.tuples(st.integers(1, LONGEST), st.integers(0, 5)).map(lambda t: (t[0], t[0] + t[1]))
    rows = st.lists(st.tuples(side, side) | near, min_size=1, max_size=max_size)
    equal = st.tuples(st.tuples(side, side), st.integers(1, max_size)).map(lambda t: [t[0]] * t[1])
    return st.one_of(rows, equal).map(lambda x: np.array(x, np.int64))


@st.composite
def pair_bucketings(draw: st.DrawFn) -> Bucketing:
    """Every combination that pairs allow, over budgets that some pairs break."""
    settings: dict[str, object] = {
        "shuffle": draw(st.booleans()),
        "drop_last": draw(st.booleans()),
        "pad_to_multiple_of": draw(st.sampled_from([1, 1, 4])),
        "overlong": draw(st.sampled_from(["drop", "alone"])),
    }
    if draw(st.booleans()):
        settings["batch_size"] = draw(st.integers(1, 12))
    else:
        settings["max_tokens"] = draw(st.integers(8, LONGEST) | st.integers(8, 8 * LONGEST))
        settings["max_sequences"] = draw(st.none() | st.integers(1, 9))
        settings["batch_size_multiple"] = draw(st.sampled_from([1, 1, 2, 4]))
        settings["budget"] = draw(st.sampled_from(["sum", "max"]))
        if draw(st.booleans()):
            settings["max_tokens"] = draw(st.integers(200, 4000))
            settings["cost"] = draw(st.sampled_from([(1.0, 0.1), (1.0, 0.02), (0.0, 1.0), (0.5, 0.0)]))
    match draw(st.sampled_from(["pool", "window", "buckets", "edges"])):
        case "window":
            settings["window"] = draw(st.integers(1, 150))
        case "buckets":
            settings |= {"num_buckets": draw(st.integers(1, 9)), "static_shapes": draw(st.booleans())}
        case "edges":
            side = st.integers(1, LONGEST + 5)
            edges = st.lists(st.tuples(side, side), min_size=1, max_size=6, unique=True)
            settings |= {"bucket_edges": draw(edges), "static_shapes": draw(st.booleans())}
    try:
        return Bucketing(**settings)
    except ValueError as refused:  # the one combination that depends on numbers
        assume("has no room" not in str(refused))
        raise


@st.composite
def paddings(draw: st.DrawFn) -> Padding:
    return Padding(
        draw(st.integers(1, 20)),
        shuffle=draw(st.booleans()),
        drop_last=draw(st.booleans()),
        pad_to_multiple_of=draw(st.integers(1, 9)),
    )


@st.composite
def bucketings(draw: st.DrawFn) -> Bucketing:
    """Every combination that the constructor allows, over budgets that some sequences break."""
    settings: dict[str, object] = {
        "shuffle": draw(st.booleans()),
        "drop_last": draw(st.booleans()),
        "pad_to_multiple_of": draw(st.sampled_from([1, 1, 4, 8])),
        "overlong": draw(st.sampled_from(["split", "truncate", "drop", "alone"])),
    }
    if draw(st.booleans()):
        settings["batch_size"] = draw(st.integers(1, 12))
    else:
        settings["max_tokens"] = draw(st.integers(8, LONGEST) | st.integers(8, 4 * LONGEST))
        settings["max_sequences"] = draw(st.none() | st.integers(1, 9))
        settings["batch_size_multiple"] = draw(st.sampled_from([1, 1, 2, 4]))
        if draw(st.booleans()):
            settings["max_tokens"] = draw(st.integers(200, 4000))
            settings["cost"] = draw(st.sampled_from([(1.0, 0.1), (1.0, 0.02), (0.0, 1.0), (0.5, 0.0)]))
    match draw(st.sampled_from(["pool", "window", "buckets", "edges", "static", "static edges"])):
        case "window":
            settings["window"] = draw(st.integers(1, 150))
        case "buckets":
            settings |= {"num_buckets": draw(st.integers(1, 9)), "edges": draw(edge_rules())}
        case "edges":
            settings["bucket_edges"] = draw(bucket_edges())
        case "static":
            settings |= {
                "static_shapes": True,
                "num_buckets": draw(st.none() | st.integers(1, 9)),
                "edges": draw(edge_rules()),
            }
        case "static edges":
            settings |= {"static_shapes": True, "bucket_edges": draw(bucket_edges())}
    try:
        return Bucketing(**settings)
    except ValueError as refused:  # the one combination that depends on numbers
        assume("has no room" not in str(refused))
        raise


def edge_rules() -> st.SearchStrategy[str]:
    return st.sampled_from(["optimal", "quantile", "equal_tokens", "geometric"])


def bucket_edges() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, LONGEST + 5), min_size=1, max_size=6, unique=True).map(sorted)


@st.composite
def splicings(draw: st.DrawFn) -> Splicing:
    assign = draw(st.sampled_from(["first_free", "round_robin"]))
    return Splicing(draw(st.integers(1, 12)), draw(st.integers(1, 40)), assign=assign, shuffle=draw(st.booleans()))


@st.composite
def chunkings(draw: st.DrawFn) -> Chunking:
    carry = draw(st.booleans())
    context = {} if carry else {"left_context": draw(st.integers(0, 9)), "right_context": draw(st.integers(0, 9))}
    return Chunking(
        draw(st.integers(1, 12)),
        draw(st.integers(1, 40)),
        carry=carry,
        shuffle=draw(st.booleans()),
        drop_last=draw(st.booleans()),
        **context,
    )


@st.composite
def packings(draw: st.DrawFn) -> Packing:
    return Packing(
        draw(st.integers(1, 2 * LONGEST)),
        rows=draw(st.integers(1, 4)),
        algorithm=draw(st.sampled_from(["best_fit", "next_fit", "optimal"])),
        max_sequences=draw(st.none() | st.integers(1, 6)),
        overlong=draw(st.sampled_from(["split", "truncate", "drop"])),
        shuffle=draw(st.booleans()),
    )


def any_strategy() -> st.SearchStrategy:
    """Any strategy with any settings that can plan any lengths."""
    return st.one_of(*KINDS.values())


def histories(most_ranks: int = 9) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Numbers of ranks and of steps they try to take, to be cut to what there is."""
    return st.lists(st.tuples(st.integers(1, most_ranks), st.integers(0, 6)), max_size=4)


KINDS = {
    "padding": paddings(),
    "bucketing": bucketings(),
    "splicing": splicings(),
    "chunking": chunkings(),
    "packing": packings(),
}

PAIR_KINDS = {"padding": paddings(), "bucketing": pair_bucketings()}
