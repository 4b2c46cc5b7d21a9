"""The file of measured routes: JSON, for one device, one MLX and one mlx-fused."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from math import isfinite, log, log1p
from typing import NamedTuple

import mlx.core as mx

from mlx_fused._version import __version__
from mlx_fused.tuning import OPERATIONS, Kind

EVEN = 0.03  # closer than this, neither route is the faster
_LARGEST = 2**31 - 1  # the largest size that an MLX shape can have
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_DEVICES = {"cpu": mx.cpu, "gpu": mx.gpu}


class Unusable(Exception):
    """A file of measured routes cannot be used here; the message says why."""


class Timing(NamedTuple):
    """What was measured of a kind of calls at some rows.

    Attributes:
        route (str, optional): The faster one, ``"fused"`` or ``"composed"``; None if they are even.
        fused (float): Seconds a call with ours.
        composed (float): Seconds a call with MLX's own operations.
    """

    route: str | None
    fused: float
    composed: float

    @classmethod
    def of(cls, fused: float, composed: float) -> Timing:
        speedup = log(composed / fused)
        faster = "fused" if speedup > 0 else "composed"
        return cls(faster if abs(speedup) >= log1p(EVEN) else None, fused, composed)


Calls = dict[Kind, dict[int, Timing]]


class Table(NamedTuple):
    """Measured routes and the device they are for."""

    device: mx.DeviceType
    calls: Calls


def read(path: str) -> Table:
    """The table in the file at ``path``, all of it.

    Raises:
        Unusable: If it cannot be read, is broken, or is of another device, MLX or mlx-fused.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait
            raise Unusable("it is no file")
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        where = content["measured on"]
        device = _DEVICES[where["device"]]
        here = _here(device)
        if other := [name for name, value in here.items() if where.get(name) != value]:
            pairs = (", ".join(f"{name} {at.get(name)}" for name in other) for at in (where, here))
            raise Unusable("they were measured with {}, but this is {}".format(*pairs))
        calls = [(_kind(call), _timings(call["rows"])) for call in content["calls"]]
    except OSError as error:
        raise Unusable(f"the file cannot be read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Unusable(f"the file is broken ({type(error).__name__}: {error})") from error
    if len(dict(calls)) < len(calls):
        raise Unusable("the file is broken (it has the same calls twice)")
    return Table(device, dict(calls))


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Be the only process that writes the file at ``path``, in a folder that is made if it is missing."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        yield


def write(path: str, calls: Calls) -> None:
    """Put ``calls``, measured on the default device, into the file at ``path``, which keeps its others."""
    device = mx.default_device().type
    with locked(path):
        with suppress(Unusable):
            earlier = read(path)
            calls = {**earlier.calls, **calls} if earlier.device == device else calls
        content = {
            "measured on": _here(device),
            "last measured": time.strftime("%Y-%m-%d %H:%M:%S"),
            "calls": to_json(calls),
        }
        folder = os.path.dirname(path)
        with tempfile.NamedTemporaryFile("w", dir=folder, encoding="utf-8", delete=False) as file:
            try:
                json.dump(content, file, indent=1)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def _here(device: mx.DeviceType) -> dict[str, str]:
    name = next(name for name, known in _DEVICES.items() if known == device)
    about = mx.device_info(device) if mx.is_available(device) else {}
    return {
        "device": name,
        "device name": about.get("device_name", "none"),
        "architecture": about.get("architecture", "none"),
        "macOS": platform.mac_ver()[0],  # on which it depends what MLX's kernels can use
        "mlx": version("mlx"),
        "mlx-fused": __version__,
    }


def to_json(calls: Calls) -> list[dict]:
    return [
        {
            "operation": kind.operation,
            **kind._asdict(),
            "dtype": str(kind.dtype).removeprefix("mlx.core."),
            "rows": [
                {"rows": m, "route": t.route, "fused_s": t.fused, "composed_s": t.composed}
                for m, t in timings.items()
            ],
        }
        for kind, timings in calls.items()
    ]


def _kind(call: dict) -> Kind:
    gradient, of_weights, bias = (_is(bool, call[name]) for name in ("gradient", "of_weights", "bias"))
    kind = Kind(
        gradient,
        of_weights,
        _DTYPES[call["dtype"]],
        None if call["format"] is None else _format(*call["format"]),
        bias,
        _size(call["in_features"]),
        tuple(map(_size, _is(list, call["features"]))),
        tuple(_size(rank, least=0) for rank in _is(list, call["ranks"])),
    )
    if len(kind.features) not in OPERATIONS or len(kind.ranks) != len(kind.features):
        raise ValueError(f"{len(kind.features)} features and {len(kind.ranks)} ranks")
    if call["operation"] != kind.operation or (of_weights and not gradient):
        raise ValueError(f"no such call: {call['operation']}, {kind}")
    return kind


def _format(mode, bits, group_size) -> tuple[str, int, int]:
    _is(str, mode).encode()  # JSON may have halves of characters, which C++ cannot take
    return mode, _size(bits), _size(group_size)


def _timings(rows: list) -> dict[int, Timing]:
    timings = {}
    for row in _is(list, rows):
        timings[_size(row["rows"])] = Timing(row["route"], _time(row["fused_s"]), _time(row["composed_s"]))
    if not rows or len(timings) < len(rows):
        raise ValueError(f"{len(timings)} different numbers of rows among {len(rows)}")
    if unknown := {t.route for t in timings.values()} - {"fused", "composed", None}:
        raise ValueError(f"unknown routes {unknown}")
    return timings


def _is(kind: type, value):
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _size(value, least: int = 1) -> int:
    if not least <= _is(int, value) <= _LARGEST:
        raise ValueError(f"{value} is no size")
    return value


def _time(value) -> float:
    if not (isfinite(_is(float, value)) and value > 0):
        raise ValueError(f"{value} is no time")
    return value
