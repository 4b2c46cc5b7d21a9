"""Scales whole models from a few layers, and the head, where they would take long.

In layers that is exact. In tokens it is exact but for attention itself, which grows faster, so it is left too
small.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from timing import Effort, first_call
from whole import NO_HEAD, Family, Work

PROBE = 8  # tokens


@dataclass(frozen=True)
class Scaled:
    """Seconds of a whole model, the most memory in use, and the tokens with which its parts were timed.

    The memory is None if the layers had fewer tokens than the work: attention's grows with their square.
    """

    seconds: float
    memory: int | None
    tokens: dict[str, int]


def scale(family: Family, work: Work, patched: bool, effort: Effort) -> Scaled:
    """Scales from models of few layers, with and without a head.

    The head has few tokens, and the layers too if one or two of them would take longer than a whole may.
    """
    headless, few = family.without(NO_HEAD), min(PROBE, work.tokens)
    # Of a prompt's tokens only the last one goes through the whole of the last layer.
    least = 1 if work.trains else 2

    def costs(family: Family, layers: int, tokens: int) -> np.ndarray:
        """Of one call: seconds, bytes that it allocates, and bytes of the model."""
        model = family.model(layers, patched, work.trains)
        call = work.prepare(model, tokens)
        seconds, allocated = with_memory(call)
        if seconds < 5:  # else what the first call compiles does not matter
            seconds = min(seconds, first_call(call)[1])
        return np.array([seconds, allocated, size(model)])

    with_head, without = (costs(f, least, few) for f in (family, headless))
    factor = work.logits / min(few, work.logits)
    head = np.maximum(0, with_head - without) * (factor, factor, 1)

    tokens = work.tokens if without[0] * work.tokens / few <= effort.never else few
    fewer, more = (costs(headless, layers, tokens) for layers in (least, least + 1))
    factor = work.tokens / tokens
    layers = (fewer + (family.layers - least) * (more - fewer)) * (factor, factor, 1)
    seconds, allocated, weights = layers + head
    memory = int(allocated + weights) if tokens == work.tokens else None
    return Scaled(float(seconds), memory, {"layers": tokens, "head": few})


def with_memory(call: Callable) -> tuple[float, int]:
    """Seconds of a call, and the most memory that it has allocated at a time."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    _, seconds = first_call(call)
    return seconds, mx.get_peak_memory() - before


def size(model: nn.Module) -> int:
    """Bytes of its parameters."""
    return sum(a.nbytes for _, a in tree_flatten(model.parameters()))
