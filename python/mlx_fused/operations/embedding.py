"""Rows of a table."""

from __future__ import annotations

import mlx.core as mx

from mlx_fused import _ext
from mlx_fused.linear import LinearOperands
from mlx_fused.operations.call import Stream, check_kinds, layer_of


def fused_embedding(x: mx.array, weight: mx.array | LinearOperands, *, stream: Stream = None) -> mx.array:
    """The rows of a table, such as the embeddings of words, as one operation.

    Equivalent to ``weight[x]``, and of a quantized table to ``mx.dequantize`` of the rows of its codes,
    scales and biases, to the same bits. On a CPU MLX has some fifty operations for that. On GPUs, and of a
    table that is not quantized, this is MLX's own.

    Args:
        x (array): Integers of any shape and type, from ``-rows`` to ``rows - 1``. Negative ones count from
            the table's end.
        weight (array or LinearOperands): ``[rows, K]``; or its codes, scales and biases, without a bias or
            an adapter.
        stream (Stream or Device, optional): Where to run. Default: ``None``, the default stream of the
            default device.

    Returns:
        array: ``[*x.shape, K]``, of the dtype of ``weight``, or of its scales and biases; bfloat16 in the
        modes whose scales are bytes.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a shape or dtype is wrong. The message names the argument, what it must be and what it
            is.
        RuntimeError: At evaluation, if the table has no such row: of a quantized one, on a CPU. Gradients by
            scales and biases are MLX's, which checks nothing. After a failed evaluation of any operation MLX
            0.32.4 may wait for ever in a later one.
    """
    table = layer_of("fused_embedding", weight, None)
    try:
        return _ext.embedding(x, table, stream)
    except TypeError:
        check_kinds("fused_embedding", {"x": x, "stream": stream}, [table])
        raise
