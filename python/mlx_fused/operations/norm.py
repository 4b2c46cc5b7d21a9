"""The norm of what no operation of ours reads."""

from __future__ import annotations

import mlx.core as mx

from mlx_fused import _ext
from mlx_fused.operations.call import Stream, check_kinds


def fused_rms_norm(x: mx.array, weight: mx.array | None, eps: float, *, stream: Stream = None) -> mx.array:
    """The RMS norm over the last axis as one operation on the CPU, where ``mx.fast.rms_norm`` is several.

    Equivalent to ``x / sqrt(mean(x**2) + eps) * weight``, computed in float32 and rounded before the weight
    and after it, as in MLX. The backward pass keeps ``x`` alone. On GPUs this is ``mx.fast.rms_norm`` itself.
    If another operation of ours reads the norm, pass it ``norm`` instead: on Metal it then norms few rows in
    its own kernel.

    Args:
        x (array): ``[..., K]``, float32, float16 or bfloat16. Any strides.
        weight (array, optional): ``[K]``, or ``None``.
        eps (float): What is added to the mean.
        stream (Stream or Device, optional): Where to run. Default: ``None``, the default stream of the
            default device.

    Returns:
        array: Of the shape of ``x``, and of the dtype that MLX promotes ``x`` and ``weight`` to.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a shape or dtype is wrong. The message names the argument, what it must be and what it
            is.
    """
    if isinstance(eps, mx.array):  # whose gradient would be lost
        raise TypeError("[fused_rms_norm] eps must be float or int but got array.")
    try:
        return _ext.rms_norm(x, weight, eps, stream)
    except TypeError:
        given = {"x": x, "eps": eps, "stream": stream}
        check_kinds("fused_rms_norm", given if weight is None else given | {"weight": weight}, [])
        raise
