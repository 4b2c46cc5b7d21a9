"""Scales whole models from one and two layers, and the head, where they would take long.

In layers that is exact. In tokens it is exact but for attention itself, which grows faster and so is left too small.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from timing import Effort, first_call
from whole import NO_HEAD, Family, Work

PROBE = 16  # tokens


@dataclass(frozen=True)
class Scaled:
    """Seconds of a whole model, the most memory in use, and the tokens with which its parts were timed.

    The memory is None if the layers had fewer tokens than the work: attention's grows with their square.
    """

    seconds: float
    memory: int | None
    tokens: dict[str, int]


def scale(family: Family, work: Work, patched: bool, effort: Effort) -> Scaled:
    """Scales from models of one and two layers without a head, and one layer with it.

    A part takes as many tokens as make its call about as long as that of a whole which is still timed.
    """
    headless = family.without(NO_HEAD)

    def costs(family: Family, layers: int, tokens: int) -> np.ndarray:
        """Of one call: seconds, bytes that it allocates, and bytes of the model."""
        model = family.model(layers, patched, work.trains)
        call = work.prepare(model, tokens)
        seconds, allocated = with_memory(call)
        if seconds < 5:  # else what the first call compiles does not matter
            seconds = min(seconds, first_call(call)[1])
        return np.array([seconds, allocated, size(model)])

    def affordable(family: Family) -> int:
        probe = min(PROBE, work.tokens)
        pace = costs(family, 1, probe)[0] / probe
        return next((n for n in _halves(work.tokens) if n * pace <= effort.never), probe)

    tokens = affordable(headless)
    one, two = (costs(headless, layers, tokens) for layers in (1, 2))
    # Generation needs the logits of one token, whatever the length of the prompt.
    head_tokens = affordable(family) if work.trains else min(PROBE, work.tokens)
    with_head, without = (costs(f, 1, head_tokens) for f in (family, headless))
    head_factor = work.tokens / head_tokens if work.trains else 1
    factor = work.tokens / tokens
    layers = (one + (family.layers - 1) * (two - one)) * (factor, factor, 1)
    head = np.maximum(0, with_head - without) * (head_factor, head_factor, 1)
    seconds, allocated, weights = layers + head
    memory = int(allocated + weights) if tokens == work.tokens else None
    return Scaled(float(seconds), memory, {"layers": tokens, "head": head_tokens})


def _halves(tokens: int) -> list[int]:
    """The tokens, and half as often as leaves no less than the probe has."""
    return [tokens >> i for i in range(tokens.bit_length()) if tokens >> i >= PROBE] or [tokens]


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
