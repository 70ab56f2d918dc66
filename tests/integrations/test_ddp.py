"""DistributedDataParallel in several processes: each token once, and the gradient of one process."""

import pytest
from integrations.text import SENTENCES, assert_ranks, run_ranks


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_ddp(tmp_path, num_replicas):
    """Two epochs over all ranks hold each token once; every optimizer step has one process's gradient.

    A loader that was made too early, when there was one process, is refused.
    """
    assert len(SENTENCES) >= 150
    ranks = run_ranks("ranks_ddp.py", tmp_path, num_replicas)
    for name in ranks[0]:
        assert max(rank[name]["error"] for rank in ranks) < 1e-10, name
        if ranks[0][name]["epochs"] is not None:
            assert_ranks([rank[name]["epochs"] for rank in ranks])
