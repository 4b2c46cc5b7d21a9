"""Rotary positions of queries and keys."""

from __future__ import annotations

import mlx.core as mx

from mlx_fused import _ext
from mlx_fused.operations.call import Stream, check_kinds

_ARRAY = mx.array


def fused_rope(
    x: mx.array,
    dims: int,
    *,
    traditional: bool = False,
    base: float | None = None,
    scale: float = 1.0,
    offset: int | mx.array = 0,
    freqs: mx.array | None = None,
    stream: Stream = None,
) -> mx.array:
    """Rotary positions as one operation on the CPU, where ``mx.fast.rope`` is some twenty.

    Rotates pairs of numbers of every head by their place (Su et al., "RoFormer: Enhanced Transformer with
    Rotary Position Embedding", 2021, arXiv:2104.09864): the meaning of ``mx.fast.rope``. Angles are computed
    in double precision, their sines and the rotation in float32, and the result is rounded once. The
    gradient of ``x`` is the same operation, backwards; it keeps ``offset`` and ``freqs`` alone. On GPUs, and
    of float64 or more than four dimensions, this is ``mx.fast.rope`` itself.

    Args:
        x (array): ``[B, heads, S, head_dim]``, or with any number of dimensions in place of the heads;
            float32, float16 or bfloat16. Any strides.
        dims (int): How many numbers of a head are rotated, the first ones. Even.
        traditional (bool): Whether a pair is two neighbours, or one number of the first half of ``dims`` and
            one of the second. Default: ``False``.
        base (float, optional): Pair ``i`` makes ``base ** (-2 * i / dims)`` radians from place to place.
            Greater than 0 and finite; left out where ``freqs`` is given. Default: ``None``, 10000.
        scale (float): What the places are multiplied with. Default: ``1.0``.
        offset (int or array): The first place, or one for each of the batch, ``[B]``. Default: ``0``.
        freqs (array, optional): ``[dims / 2]``, the reciprocals of the radians. Default: ``None``.
        stream (Stream or Device, optional): Where to run. Default: ``None``, the default stream of the
            default device.

    Returns:
        array: Of the shape and dtype of ``x``.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a shape, dtype or value is wrong. The message names the argument, what it must be and
            what it is.
    """
    try:
        if _ARRAY in (type(dims), type(base), type(scale)):  # whose gradient would be lost
            raise TypeError
        return _ext.rope(x, dims, traditional, base, scale, offset, freqs, stream)
    except TypeError:
        given = {"x": x, "dims": dims, "traditional": traditional, "base": base, "scale": scale}
        check_kinds("fused_rope", given | {"offset": offset, "freqs": freqs, "stream": stream}, [])
        raise
