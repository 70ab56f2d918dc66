"""Accelerate in two processes: a loader that knows its rank, and one whose batches Accelerate deals out."""

from integrations.text import assert_ranks, run_ranks

WAYS = ("own 0", "prepared 0", "prepared 2", "evened 0")


def test_two_processes(tmp_path):
    """Each token comes once an epoch, one way and the other; a state after the fifth batch is gone on from exactly."""
    ranks = run_ranks("ranks_accelerate.py", tmp_path, 2)
    for name in ranks[0]:
        assert_ranks([rank[name]["epochs"] for rank in ranks])
        assert ranks[0][name]["states"] == ranks[1][name]["states"]
        for rank in ranks:
            assert rank[name]["error"] < 1e-5
            for epoch in range(2):
                assert rank[name]["states"][epoch]["epoch"] == epoch
                assert rank[name]["rest"][epoch] == rank[name]["epochs"][epoch][5:]
    for strategy in ("padding", "bucketing"):
        alike = [ranks[0][f"{strategy} {way}"]["epochs"] for way in WAYS]
        assert all(other == alike[0] for other in alike)
