"""What all tests share: hypothesis profiles and a header that names the versions."""

import os
from collections.abc import Iterator

import numba
import numpy as np
import pandas as pd
import pytest
import scipy
import torch
from hypothesis import HealthCheck, settings

from seqbatch.rnn import lstm

# Triton kernels run in its interpreter where there is no GPU; the variable is read when they are defined.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

settings.register_profile("local", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_report_header() -> str:
    return f"numpy {np.__version__}, scipy {scipy.__version__}, pandas {pd.__version__}, numba {numba.__version__}"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models that are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[0, lstm.SAVED_AT_LEAST], ids=["in pieces", "where it pays"])
def pieces_of_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small LSTMs take the path for ragged lanes too, which by itself only large ones do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lstm, "SAVED_AT_LEAST", request.param)
        yield
