import fcntl
import os
import platform
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

# The threads of NumPy's products would slow down the other workers. It is read when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings

# What this machine's user has measured must not decide about a test.
os.environ["MLX_FUSED_CACHE"] = os.devnull

# What a shell runs in the background ignores interrupts, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The simulator runs on x86-64 Linux alone; elsewhere `make test-metal` has the real GPU.
SIMULATED = [
    "test_ledger",
    "test_metal_cost",
    "test_metal_host",
    "test_metal_kernels",
    "test_metal_lora",
    "test_metal_quantized",
    "test_metal_splits",
]
SIMULATED += ["test_metal_address_spaces", "test_metal_source", "test_msl_sim", "test_mutation"]
is_simulated = sys.platform == "linux" and platform.machine() == "x86_64"
collect_ignore = [] if is_simulated else [f"{name}.py" for name in SIMULATED]

if sys.version_info < (3, 11):
    collect_ignore.append("test_docs.py")  # Sphinx asks for a later Python

# Of gigabytes, or compiled for minutes: test_bench_rivals.py has stand-ins for them.
if not all(map(find_spec, ("torch", "llama_cpp"))):
    collect_ignore.append("test_bench_installed_rivals.py")

# Derandomised and without a deadline, so that a run depends on neither luck nor the machine's load.
settings.register_profile("mlx-fused", derandomize=True, deadline=None, max_examples=150, database=None)
settings.load_profile("mlx-fused")


# They build a lot, or run their own processes: the last worker to end must not be waiting for one of them.
LONGEST = ("test_mutation", "test_macos", "test_metal_device", "test_metal_host")


def pytest_xdist_auto_num_workers():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """Calls a function that makes a file, once for all workers, and gives each its path."""

    def once(make):
        if worker_id == "master":  # there are no others
            return make()
        made = tmp_path_factory.getbasetemp().parent / f"{make.__module__}.{make.__name__}"
        with open(f"{made}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                made.write_text(str(make()))
        return Path(made.read_text())

    return once


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of ``tiny_demo``."""
    import tiny_demo  # needs mlx-lm

    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_demo.make(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a command, ours or mlx-lm's, in this process and gives its exit code, stdout and stderr."""

    def run(command, arguments):
        monkeypatch.setattr(sys, "argv", ["mlx-fused", *arguments])
        capfd.readouterr()
        try:
            code = command(arguments) or 0
        except SystemExit as exit:
            code = exit.code or 0
        return code, *capfd.readouterr()

    return run


@pytest.fixture(autouse=True)
def cpu():
    """Every test runs on the CPU device, float64 included, on any machine."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def route_cache(tmp_path, monkeypatch):
    """A folder of the test's own for measured routes, and none before and after."""
    from mlx_fused import _ext

    monkeypatch.setenv("MLX_FUSED_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLX_FUSED_ROUTE", raising=False)
    yield tmp_path / "cache"
    _ext.set_tuned_routes(mx.cpu, [])


@pytest.fixture
def rng():
    return np.random.default_rng(0)
