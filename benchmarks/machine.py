"""What this machine is, and the two ceilings a kernel can reach on it."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil

PACKAGES = (
    "mlx",
    "mlx-lm",
    "mlx-fused",
    "scipy-openblas32",
    "numpy",
    "torch",
    "transformers",
    "llama-cpp-python",
)


def cores() -> int:
    """CPUs this process may run on, which a container can make fewer than the machine's."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


class Neighbours:
    """Watches how much CPU other processes use, since their work shows up in every timing."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float:
        """Returns the share of all CPU time since the start that went to other processes."""
        total, idle, own = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return max(0.0, total - idle - own) / total

    @staticmethod
    def _now() -> tuple[float, float, float]:
        everyone, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = everyone.idle + getattr(everyone, "iowait", 0.0)
        return sum(everyone), idle, own.user + own.system


@dataclass(frozen=True)
class Ceilings:
    """Measured float32 GEMM peak [flop/s], and bandwidth of copying and of reading alone [byte/s]."""

    flops: float
    bandwidth: float
    read: float


def describe(device: str) -> dict[str, object]:
    """Returns what a reader needs to place the numbers."""
    blas = np.show_config("dicts")["Build Dependencies"]["blas"]
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "numpy BLAS": f"{blas['name']} {blas['version']}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def measure(size: int) -> Ceilings:
    """Times a GEMM of side ``size``, and a copy and a reading of 16 such matrices, on the default device."""
    on_cpu = mx.default_device() == mx.cpu
    gemm, copy, read, size_in_bytes = (_numpy_work if on_cpu else _mlx_work)(size)
    return Ceilings(2 * size**3 / best(gemm), 2 * size_in_bytes / best(copy), size_in_bytes / best(read))


def _numpy_work(size: int) -> tuple[Callable, Callable, Callable, int]:
    a = np.random.default_rng(0).random((size, size), dtype=np.float32)
    product = np.empty_like(a)
    source = np.ones(16 * a.size, np.float32)
    target = np.empty_like(source)
    pool = ThreadPoolExecutor(cores())
    parts = [np.array_split(x, cores()) for x in (target, source)]
    return (
        lambda: np.matmul(a, a, out=product),
        lambda: list(pool.map(np.copyto, *parts)),
        lambda: np.dot(source, source),
        source.nbytes,
    )


def _mlx_work(size: int) -> tuple[Callable, Callable, Callable, int]:
    a = mx.random.normal((size, size))
    source = mx.ones((16 * a.size,))
    mx.eval(a, source)
    reading = lambda: mx.eval(source.max())  # noqa: E731
    return lambda: mx.eval(a @ a), lambda: mx.eval(-source), reading, source.nbytes


def best(work: Callable, repeats: int = 10) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(repeats))


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
