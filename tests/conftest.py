"""What all tests share: hypothesis profiles and a header that names the versions."""

import os

import numba
import numpy as np
import pandas as pd
import scipy
import torch
from hypothesis import HealthCheck, settings

# Triton kernels run in its interpreter where there is no GPU; the variable is read when they are defined.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

settings.register_profile("local", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_report_header() -> str:
    return f"numpy {np.__version__}, scipy {scipy.__version__}, pandas {pd.__version__}, numba {numba.__version__}"
