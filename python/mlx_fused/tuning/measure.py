"""Times both routes of calls: our kernels, and MLX's own operations."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from math import ceil
from statistics import median

import mlx.core as mx

import mlx_fused
from mlx_fused.linear import LinearOperands
from mlx_fused.tuning import Kind
from mlx_fused.tuning.table import Timing

# With those at which our kernels change: a number between two takes the route of the smaller.
ROWS = (1, 2, 4, 5, 8, 9, 16, 32, 33, 64, 128, 512, 2048)
ROUTES = ("fused", "composed")
ROTATED = 257 * 2**20  # bytes of weights in turn; reasoned: more than the last-level cache of any Mac
_LONGEST = 64  # calls in a chain
_MOST_COPIES = 1024  # as many as the calls of a cell
_LORA_SCALE = 20.0  # mlx-lm's default

Layers = Sequence[LinearOperands]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Effort:
    """How long to measure. The values are reasoned, not measured.

    Attributes:
        rounds: In each, every route has a turn.
        turn: Seconds of a turn, if one call does not take longer.
        limit: Seconds of a cell, after which no further round begins.
        never: Seconds. A call that takes longer, as the time of fewer rows predicts, is not made.
        rotated: Bytes of weights that take turns, so that no cache holds them.
    """

    rounds: int = 7
    turn: float = 0.02
    limit: float = 4
    never: float = 4
    rotated: int = ROTATED


QUICK = Effort(rounds=1, turn=0, rotated=2**15)


def with_gradients(forward: Kind) -> list[Kind]:
    """A kind of calls and their gradients; by weights too where these can be trained and nothing else is."""
    gradient = forward._replace(gradient=True)
    is_frozen = forward.format is not None or any(forward.ranks)
    return [forward, gradient] if is_frozen else [forward, gradient, gradient._replace(of_weights=True)]


def route_of(kind: Kind, rows: int) -> str:
    """The route of such calls, told from the graph of one, which is not evaluated."""
    function, first = _function(kind, rows)
    graph = io.StringIO()
    mx.export_to_dot(graph, *function(first, *_layers(kind)))
    # The activation may be ours where the products are MLX's.
    ours = r'"Fused(?!Activation)\w+' + ("Grad" if kind.gradient else "")
    return "fused" if re.search(ours, graph.getvalue()) else "composed"


def has_choice(kind: Kind) -> bool:
    """Whether this device has kernels of ours for such calls."""
    with _routed("fused"):
        return route_of(kind, rows=1) == "fused"


def measure(
    kind: Kind,
    rows: Iterable[int],
    effort: Effort,
    on_rows: Callable[[], None] = lambda: None,
    clock: Clock = time.perf_counter,
) -> dict[int, Timing]:
    """Times such calls with rows that ascend, on the default device, until they would take too long.

    Args:
        kind (Kind): What the calls share.
        rows (list): How many rows they have, ascending.
        effort (Effort): How long to measure.
        on_rows (callable): Called after each number of rows, also after those that are not measured.
        clock (callable): Seconds. Default: ``time.perf_counter``.

    Returns:
        dict: What was measured, by rows.
    """
    copies = ceil(effort.rotated / sum(a.nbytes for layer in _layers(kind) for a in _arrays(layer)))
    layers = cycle(_copies(_layers(kind), min(max(2, copies), _MOST_COPIES)))
    timings: dict[int, Timing] = {}
    pace = 0.0
    for m in rows:
        if pace * m <= effort.never:
            function, first = _function(kind, m, forward_route="fused")
            runs = {r: partial(_run, r, function, first, layers) for r in ROUTES}
            seconds = compare(runs, effort, clock)
            timings[m] = Timing.of(**seconds)
            pace = max(seconds.values()) / m
        on_rows()
    return timings


def compare(runs: dict[str, Callable[[int], None]], effort: Effort, clock: Clock) -> dict[str, float]:
    """Lets functions that make a number of calls take turns; returns the medians of seconds per call."""

    def seconds(name: str, count: int) -> float:
        start = clock()
        runs[name](count)
        return (clock() - start) / count

    begin = clock()
    for name in runs:
        runs[name](1)  # makes the operands, compiles kernels, and wakes threads
    counts = {name: max(1, min(_LONGEST, int(effort.turn / seconds(name, 1)))) for name in runs}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(effort.rounds):
        for name, count in counts.items():
            samples[name].append(seconds(name, count))
        if clock() - begin > effort.limit:
            break
    return {name: median(times) for name, times in samples.items()}


def chain(function: Callable, first: mx.array, rests: Iterable[Sequence]) -> None:
    """Evaluates ``function(first, *rest)`` for all ``rests``, each waiting for all of the call before.

    One evaluation of many calls, as of a model's layers, so that its own cost is shared; from one to the next
    leads a maximum of the first operand and a number, the same for every route.
    """
    link = first
    for rest in rests:
        results = list(function(link, *rest))
        (done,) = mx.depends(results[:1], results[1:])
        link = mx.maximum(first, done[(0,) * done.ndim])
    mx.eval(link)
    mx.synchronize()


def _run(route: str, function: Callable, first: mx.array, layers: Iterator[Layers], count: int) -> None:
    with _routed(route):
        chain(function, first, islice(layers, count))


@contextmanager
def _routed(route: str) -> Iterator[None]:
    """As routing chooses it, which the keyword ``route`` does not: its composed form can be exported."""
    before = os.environ.get("MLX_FUSED_ROUTE")
    os.environ["MLX_FUSED_ROUTE"] = route
    try:
        yield
    finally:
        del os.environ["MLX_FUSED_ROUTE"]
        if before is not None:
            os.environ["MLX_FUSED_ROUTE"] = before


def _function(kind: Kind, rows: int, forward_route: str | None = None) -> tuple[Callable, mx.array]:
    """Such a call as a function of one array and the layers, and that array."""
    x = mx.random.normal((1, rows, kind.in_features)).astype(kind.dtype)
    # As large as the results: for a layer by itself the residual too.
    others = [mx.random.normal((1, rows, n)).astype(kind.dtype) for n in kind.features]

    def forward(x: mx.array, *layers: LinearOperands, route: str | None = None) -> Sequence[mx.array]:
        if kind.operation == "qkv":
            return mlx_fused.fused_qkv_projection(x, layers, split_heads=False, route=route)
        if kind.operation == "gated":
            return [mlx_fused.fused_gated_projection(x, layers, route=route)]
        return [mlx_fused.fused_output_projection_residual(x, *layers, residual=others[0], route=route)]

    def gradients(cotangent: mx.array, *layers: LinearOperands) -> Sequence[mx.array]:
        keys = [(i, name) for i, layer in enumerate(layers) for name in _trained(kind, layer)]

        def of(x: mx.array, *values: mx.array) -> Sequence[mx.array]:
            changed = list(layers)
            for (i, name), value in zip(keys, values, strict=True):
                changed[i] = changed[i]._replace(**{name: value})
            return forward(x, *changed, route=forward_route)

        primals = [x, *(getattr(layers[i], name) for i, name in keys)]
        # That of gate and up needs them, so it is timed with what makes them, the same for every route.
        return mx.vjp(of, primals, [cotangent, *(others[1:] if kind.operation == "qkv" else [])])[1]

    return (gradients, others[0]) if kind.gradient else (forward, x)


def _trained(kind: Kind, layer: LinearOperands) -> list[str]:
    adapter = ["lora_a", "lora_b"] if layer.lora_a is not None else []
    return adapter + (["weight"] + ["bias"] * kind.bias if kind.of_weights else [])


def _layers(kind: Kind) -> Layers:
    """Random layers of this kind, not evaluated."""
    return [_layer(kind, *of) for of in zip(kind.features, kind.ranks, strict=True)]


def _layer(kind: Kind, features: int, rank: int) -> LinearOperands:
    def draw(*shape: int, dtype: mx.Dtype = kind.dtype) -> mx.array:
        return (mx.random.normal(shape) * kind.in_features**-0.5).astype(dtype)

    weight = draw(features, kind.in_features)
    layer = LinearOperands(weight, draw(features) if kind.bias else None)
    if kind.format:
        mode, bits, group_size = kind.format
        codes, scales, *biases = mx.quantize(weight, group_size, bits, mode)
        layer = layer._replace(weight=codes, scales=scales, biases=biases[0] if biases else None)
        layer = layer._replace(group_size=group_size, bits=bits, mode=mode)
    if rank:
        a, b = (draw(*shape, dtype=mx.float32) for shape in ((kind.in_features, rank), (rank, features)))
        layer = layer._replace(lora_a=a, lora_b=b, lora_scale=_LORA_SCALE)
    return layer


def _copies(layers: Layers, count: int) -> list[Layers]:
    def copied(layer: LinearOperands) -> LinearOperands:
        # A sum is a new array, of whatever dtype.
        return layer._replace(**{k: a + mx.zeros((), a.dtype) for k, a in _named(layer)})

    made: list[Layers] = [[copied(layer) for layer in layers] for _ in range(count)]
    mx.eval([a for layers in made for layer in layers for a in _arrays(layer)])
    return made


def _named(layer: LinearOperands) -> list[tuple[str, mx.array]]:
    return [(k, a) for k, a in layer._asdict().items() if isinstance(a, mx.array)]


def _arrays(layer: LinearOperands) -> list[mx.array]:
    return [a for _, a in _named(layer)]
