"""Attention itself, between the projections."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from mlx_fused import _ext
from mlx_fused.operations.call import Stream, check_kinds

_MANY = 2**31 - 1  # keys, more than any array has


def fused_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: Literal["causal"] | mx.array | None = None,
    window: int | None = None,
    sinks: mx.array | None = None,
    stream: Stream = None,
) -> mx.array:
    """``softmax(scale * q @ k.T + mask) @ v`` as one operation on the CPU, where MLX's is several.

    Equivalent to ``mx.fast.scaled_dot_product_attention``. Scores are never rounded: they are computed and
    summed in float32, and the result is rounded once. Of the scores nothing is kept: the backward pass keeps
    ``q``, ``k``, ``v``, the result, and eight bytes for each query of each head, and computes them again. On
    GPUs this is MLX's own.

    A query whose keys are all hidden, by a boolean mask or by its place, gets the mean of all values or, with
    ``sinks``, zeros, as in MLX; one whose scores are all minus infinity gets zeros. Other than in MLX, values
    that are infinite or NaN may or may not reach queries that do not see their key. A function that is to be
    exported has to call MLX's.

    Args:
        q (array): ``[B, N, T, D]``, float32, float16 or bfloat16. Any strides.
        k (array): ``[B, N_kv, T_kv, D]``, where ``N`` is a multiple of ``N_kv``.
        v (array): ``[B, N_kv, T_kv, D_v]``.
        scale (float): What the products are multiplied with.
        mask (str or array, optional): ``"causal"``, where the last query is at the place of the last key and
            a query sees the keys up to its own place; a boolean array, true where a key is seen; or an array
            that is added to the scores. It is broadcast to ``[B, N, T, T_kv]``. Default: ``None``.
        window (int, optional): Of causal attention the number of keys that a query sees at most, its own
            included. Default: ``None``, all of them.
        sinks (array, optional): ``[N]``: for each head a score without a value. Default: ``None``.
        stream (Stream or Device, optional): Where to run. Default: ``None``, the default stream of the
            default device.

    Returns:
        array: ``[B, N, T, D_v]``, of the dtype that MLX promotes ``q``, ``k`` and ``v`` to. On the CPU heads
        lie next to each other in memory: ``transpose(0, 2, 1, 3)`` and a reshape to ``[B, T, N * D_v]`` copy
        nothing.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a shape or dtype is wrong. The message names the argument, what it must be and what it
            is.
    """
    try:
        if type(scale) is mx.array:
            raise TypeError  # the extension would take it for a number, and its gradient would be lost
        if type(window) is bool:
            raise TypeError("[fused_attention] window must be int but got bool.")
        if type(window) is int:
            window = min(window, _MANY)
        return _ext.attention(q, k, v, scale, mask, window, sinks, stream)
    except TypeError:
        given = {"q": q, "k": k, "v": v, "scale": scale, "mask": mask, "window": window, "sinks": sinks}
        check_kinds("fused_attention", given | {"stream": stream}, [])
        raise
