"""A linear layer's operands as one value."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn


class LinearOperands(NamedTuple):
    """The operands of a linear layer as one value.

    The layer computes ``x @ weight.T + bias`` and, with LoRA, adds ``lora_scale * (x @ lora_a) @ lora_b``.
    The operations accept it in place of a weight, and check it then. It may pack the rows of several layers.
    ``mx.grad`` wants arrays as arguments: make it of them inside the function.

    Args:
        weight (array): ``[output_dims, input_dims]``, float32, float16 or bfloat16; or, if ``scales`` are
            given, the codes of ``mx.quantize``, uint32 ``[output_dims, input_dims * bits / 32]``.
        bias (array, optional): ``[output_dims]``.
        scales (array, optional): The group scales of a quantized weight,
            ``[output_dims, input_dims / group_size]``; uint8 unless ``mode`` is ``"affine"``.
        biases (array, optional): The group biases, of the shape of ``scales``; only in mode ``"affine"``.
        group_size (int, optional): 32, 64 or 128 for ``"affine"``. Default: the mode's own (affine 64, mxfp4
            and mxfp8 32, nvfp4 16).
        bits (int, optional): 2, 3, 4, 5, 6 or 8 for ``"affine"``. Default: the mode's own (4; mxfp8 8).
        mode (str): ``"affine"``, ``"mxfp4"``, ``"mxfp8"`` or ``"nvfp4"``. Other modes, group sizes and bits
            that MLX supports run on MLX's own operation.
        lora_a (array, optional): ``[input_dims, rank]``; cast to float32.
        lora_b (array, optional): ``[rank, output_dims]``; required if ``lora_a`` is given.
        lora_scale (float): The factor of the low-rank product.
    """

    weight: mx.array
    bias: mx.array | None = None
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int | None = None
    bits: int | None = None
    mode: str = "affine"
    lora_a: mx.array | None = None
    lora_b: mx.array | None = None
    lora_scale: float = 1.0

    @classmethod
    def of(cls, layer: nn.Module) -> LinearOperands:
        """The current operands of a layer; no array is copied.

        Args:
            layer (mlx.nn.Module): An ``mlx.nn.Linear``, an ``mlx.nn.QuantizedLinear``, or an mlx-lm
                ``LoRALinear`` around one of them, without active dropout.

        Returns:
            LinearOperands: Of the layer's arrays, as they are now.

        Raises:
            TypeError: If ``layer`` is of any other type, which may compute something else.
            ValueError: If ``layer`` has active dropout, or a ``scale`` that is not a number.
        """
        linear = layer["linear"] if is_lora(type(layer)) else layer
        if type(linear) not in (nn.Linear, nn.QuantizedLinear):
            is_embedding = isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding))
            hint = " LinearOperands.of_base takes an embedding, as a head." if is_embedding else ""
            raise TypeError(
                "[LinearOperands.of] layer must be an mlx.nn.Linear or QuantizedLinear, or a LoRALinear of "
                f"one, but got {type_name(layer)}.{hint}"
            )
        operands = cls.of_base(linear)
        if linear is layer:
            return operands
        if reason := lora_obstacle(layer):
            raise ValueError(f"[LinearOperands.of] layer must be the sum of two products but {reason}.")
        return operands.with_lora(layer)

    @classmethod
    def of_base(cls, layer: nn.Module) -> LinearOperands:
        """The operands of any layer with the parameter names of ``mlx.nn.Linear`` or ``QuantizedLinear``.

        Args:
            layer (mlx.nn.Module): The layer, of any type; also an embedding, as the head that it is tied to.

        Returns:
            LinearOperands: Of the layer's own weight, without an adapter.
        """
        weight, bias, scales, biases = map(layer.get, ("weight", "bias", "scales", "biases"))
        if scales is None:
            return cls(weight, bias)
        return cls(weight, bias, scales, biases, layer.group_size, layer.bits, layer.mode)

    def with_lora(self, layer: nn.Module) -> LinearOperands:
        """These operands with an adapter.

        Args:
            layer (mlx.nn.Module): An mlx-lm ``LoRALinear``, whose adapter it is.

        Returns:
            LinearOperands: With ``lora_a``, ``lora_b`` and ``lora_scale`` of ``layer``.
        """
        return self._replace(lora_a=layer["lora_a"], lora_b=layer["lora_b"], lora_scale=layer.scale)


def lora_obstacle(layer: nn.Module) -> str | None:
    """Why the operations cannot compute the ``LoRALinear`` ``layer``; None if they can."""
    dropout = getattr(layer, "dropout", None)
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"has a dropout of type {type(dropout).__name__}"
    if type(dropout) is nn.Dropout and dropout.training and dropout._p_1 != 1:
        return "has dropout"
    if not isinstance(layer.scale, (int, float)):
        return f"has a scale of type {type(layer.scale).__name__}"
    return None


@cache
def is_lora(cls: type) -> bool:
    """Whether ``cls`` is mlx-lm's ``LoRALinear``."""
    # By name, since importing mlx-lm takes seconds and not every user has it.
    return (cls.__module__, cls.__qualname__) == ("mlx_lm.tuner.lora", "LoRALinear")


def type_name(layer: object) -> str:
    """The name of a layer's type for messages; for a ``LoRALinear`` also the type of the layer it wraps."""
    name = type(layer).__name__
    return f"LoRALinear of {type(layer['linear']).__name__}" if is_lora(type(layer)) else name
