"""The loss of a language model, without its logits."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from mlx_fused import _ext
from mlx_fused.linear import LinearOperands
from mlx_fused.operations.call import Route, Stream, batched, check_kinds, layer_of, unbatched


def fused_linear_cross_entropy(
    x: mx.array,
    weight: mx.array | LinearOperands,
    targets: mx.array,
    *,
    bias: mx.array | None = None,
    mask: mx.array | None = None,
    ignore_index: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    reduction: Literal["none", "mean", "sum"] = "none",
    route: Route = None,
    stream: Stream = None,
) -> mx.array:
    """The cross entropy of a head's logits, which are made block by block and are never all there.

    Equivalent to ``mlx.nn.losses.cross_entropy(logits, targets)`` of the logits ``scale * (x @ weight.T +
    bias)`` or, with a ``softcap``, ``softcap * tanh(logits / softcap)``. Sums are accumulated in float32,
    the logits are not rounded, and their exponentials are summed block by block with the largest so far
    (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867). The
    backward pass keeps the arguments and four bytes for each row, and computes the logits again (Wijmans et
    al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, arXiv:2411.09009); of bfloat16 ``x`` the
    gradients of the logits are rounded to bfloat16 before they are multiplied. Rows that do not count cost
    nothing: they are neither read nor multiplied, and their loss and gradient are 0. On GPUs the blocks are
    made by MLX's own operations, of all rows, and logits and their gradients are rounded to ``x``'s dtype.
    ``vmap``, ``jvp`` and second derivatives keep all logits, and ``mx.compile(shapeless=True)`` on a GPU
    needs ``route="composed"``, which does too. The loss of a model of mlx-lm is made of this by
    :func:`mlx_fused.losses.cross_entropy_loss`.

    Args:
        x (array): ``[..., K]``, float32, float16 or bfloat16. Any strides.
        weight (array or LinearOperands): ``[V, K]``, a head's; of a tied embedding, dense or quantized,
            ``LinearOperands.of_base(embedding)``. Quantized weights and LoRA as in
            :func:`fused_qkv_projection`.
        targets (array): ``[...]``, integers, from 0 to ``V - 1`` in rows that count.
        bias (array, optional): ``[V]``. Left out with :class:`LinearOperands`. Default: ``None``.
        mask (array, optional): ``[...]``, bool: the rows that count. For other weights, multiply the losses
            with them. Default: ``None``, all of them.
        ignore_index (int, optional): The target of rows that do not count, such as -100. Default: ``None``,
            all of them count.
        scale (float): What the logits are multiplied with. Default: ``1.0``.
        softcap (float, optional): What the logits stay within. Default: ``None``.
        label_smoothing (float): How much of the target is spread over all words, at least 0 and less than 1.
            Default: ``0.0``.
        reduction (str): ``"none"``, ``"sum"``, or ``"mean"``: the sum over the number of rows that count, NaN
            if none does. Default: ``"none"``.
        route (str, optional): As in :func:`fused_qkv_projection`.
        stream (Stream or Device, optional): Where to run. Default: ``None``, the default stream of the
            default device.

    Returns:
        array: ``[...]``, or a number if there is a reduction; float32, of float64 arguments float64.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a rank, shape, dtype, quantization or value is wrong. The message names the argument,
            what it must be and what it is. Also if the gradient of a quantized weight is asked for.
        RuntimeError: At evaluation on the CPU, if a target of a row that counts is no word. Where MLX's own
            operations run, the loss of such a row is NaN.
    """
    operation = "fused_linear_cross_entropy"
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"[{operation}] reduction must be 'none', 'mean' or 'sum' but got {reduction!r}.")
    layer = layer_of(operation, weight, bias)
    rows = [_as_rows(operation, *named, x) for named in (("targets", targets), ("mask", mask))]
    x, leading = batched(operation, x)
    numbers = (scale, softcap, label_smoothing)
    try:
        if mx.array in map(type, (*numbers, layer.lora_scale)):
            raise TypeError  # the extension would take it for a number, and its gradient would be lost
        losses = _ext.cross_entropy(x, [layer], *rows, ignore_index, *numbers, route, stream)
    except TypeError:
        given = {"x": x, "targets": targets, "ignore_index": ignore_index, "scale": scale}
        given |= {"softcap": softcap, "label_smoothing": label_smoothing, "route": route, "stream": stream}
        check_kinds(operation, given, [layer])
        raise
    if reduction == "none":
        return losses if leading is None else unbatched(losses, leading)
    total = losses.sum(stream=stream)
    if reduction == "sum":
        return total
    if ignore_index is None and mask is None:
        return losses.mean(stream=stream)
    counts = mask
    if ignore_index is not None:
        given = targets.astype(mx.int64, stream=stream)  # a narrower dtype might not hold the index
        counts = mx.not_equal(given, ignore_index, stream=stream)
        counts = counts if mask is None else mx.logical_and(mask, counts, stream=stream)
    return mx.divide(total, counts.sum(stream=stream), stream=stream)


def _as_rows(operation: str, name: str, a: mx.array | None, x: mx.array) -> mx.array | None:
    """What there is for each row of ``x``, as ``[B, S]``."""
    if a is None and name == "mask":
        return None
    if not isinstance(a, mx.array):
        raise TypeError(f"[{operation}] {name} must be array but got {type(a).__name__}.")
    if isinstance(x, mx.array) and x.ndim and a.shape != x.shape[:-1]:
        raise ValueError(f"[{operation}] {name} must have shape {x.shape[:-1]} but got {a.shape}.")
    return mx.squeeze(batched(operation, mx.expand_dims(a, -1))[0], -1)
