import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings

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
