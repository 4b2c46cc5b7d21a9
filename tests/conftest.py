import platform
import sys

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings

# The simulator runs on x86-64 Linux alone; elsewhere `make test-metal` has the real GPU.
SIMULATED = [
    "test_ledger",
    "test_metal_host",
    "test_metal_kernels",
    "test_metal_lora",
    "test_metal_quantized",
]
SIMULATED += ["test_metal_source", "test_msl_sim", "test_mutation"]
if sys.platform != "linux" or platform.machine() != "x86_64":
    collect_ignore = [f"{name}.py" for name in SIMULATED]

# Derandomised and without a deadline, so that a run depends on neither luck nor the machine's load.
settings.register_profile("mlx-fused", derandomize=True, deadline=None, max_examples=150, database=None)
settings.load_profile("mlx-fused")


@pytest.fixture(autouse=True)
def cpu():
    """Every test runs on the CPU device, float64 included, on any machine."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
