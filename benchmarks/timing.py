"""Times calls that take turns."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from mlx_fused.tuning.measure import ROTATED


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds per cell (``decode``: of decoding) and turn, and the pause between turns.

    A call that takes longer than ``once`` is made as rarely as a benchmark allows, and one expected to take
    longer than ``never`` not at all. ``rotated`` bytes of weights take turns, so that no cache holds them.
    """

    cell: float
    decode: float
    turn: float
    # Idle workers spin before they sleep: OpenBLAS for some 50 ms, OpenMP for 5 ms.
    pause: float
    ceiling_size: int
    min_rounds: int = 12
    once: float = 2
    never: float = 45
    rotated: int = ROTATED


# Decode reads memory, which the machine shares with others: calls differ by a third.
FULL = Effort(cell=4, decode=100, turn=0.15, pause=0.06, ceiling_size=2048)
QUICK = Effort(cell=0.02, decode=0.02, turn=0.002, pause=0.001, ceiling_size=256, min_rounds=3, rotated=2**15)


def measure(calls: dict[str, Callable], effort: Effort) -> dict[str, list[float]]:
    """Lets the contenders take turns, so that drift hits all alike; returns seconds per call."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + effort.cell
    rounds = 0
    while rounds < effort.min_rounds or time.perf_counter() < deadline:
        for name, call in calls.items():
            time.sleep(effort.pause)
            samples[name] += _turn(call, effort.turn)
        rounds += 1
    return samples


def _turn(call: Callable, seconds: float) -> list[float]:
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    # The first of several calls wakes the thread pool and refills the caches.
    return times[1:] or times


def quickest(calls: dict[str, Callable], effort: Effort) -> dict[str, float]:
    """The fewest seconds of warm calls, which other processes disturbed least; slow ones are called twice."""
    return {name: min(seconds) for name, seconds in take_turns(calls, effort).items()}


def take_turns(calls: dict[str, Callable], effort: Effort) -> dict[str, list[float]]:
    """The seconds of every call, the first among them; slow ones are called twice."""
    first = {name: first_call(call)[1] for name, call in calls.items()}
    fast = {name: call for name, call in calls.items() if first[name] <= effort.once}
    samples = {name: [first_call(call)[1]] for name, call in calls.items() if name not in fast}
    samples |= measure(fast, effort) if fast else {}
    return {name: [first[name], *samples[name]] for name in calls}


def first_call(call: Callable) -> tuple[object, float]:
    """Returns the result of ``call`` and its seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start
