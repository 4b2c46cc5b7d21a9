"""A linear layer's operands as one value."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn


class LinearOperands(NamedTuple):
    """What a linear layer computes with: ``x @ weight.T + bias``, and with LoRA
    ``+ lora_scale * (x @ lora_a) @ lora_b``.

    The operations take it in the place of a weight. It may hold the rows of several layers, packed, if it
    has no LoRA.

    Attributes:
        weight (array): ``[output_dims, input_dims]``, float32, float16 or bfloat16; or, if there are
            ``scales``, quantized as ``mx.quantize`` does it: uint32 ``[output_dims, input_dims * bits / 32]``.
        bias (array, optional): ``[output_dims]``.
        scales (array, optional): Those of the groups of a quantized weight,
            ``[output_dims, input_dims / group_size]``; uint8 unless ``mode`` is ``"affine"``.
        biases (array, optional): Those of the groups, as ``scales``; for mode ``"affine"`` alone.
        group_size (int, optional): 32, 64 or 128 for ``"affine"``. Default: the mode's own (affine 64, mxfp4
            and mxfp8 32, nvfp4 16).
        bits (int, optional): 2, 3, 4, 5, 6 or 8 for ``"affine"``. Default: the mode's own (4; mxfp8 8).
        mode (str): ``"affine"``, ``"mxfp4"``, ``"mxfp8"`` or ``"nvfp4"``; MLX computes other modes, sizes
            and bits that it knows.
        lora_a (array, optional): ``[input_dims, rank]``, computed with in float32.
        lora_b (array, optional): ``[rank, output_dims]``, given where ``lora_a`` is.
        lora_scale (float): What the low-rank product is multiplied by.
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
        """The operands of a layer, as they are now; none is copied.

        Args:
            layer (mlx.nn.Module): An ``mlx.nn.Linear``, an ``mlx.nn.QuantizedLinear``, or an mlx-lm
                ``LoRALinear`` around one of them that has no dropout to apply.

        Raises:
            TypeError: If ``layer`` is of any other type, for which the operations may not stand.
            ValueError: If ``layer`` has a dropout to apply, or a ``scale`` that is no number.
        """
        linear = layer["linear"] if is_lora(type(layer)) else layer
        if type(linear) not in (nn.Linear, nn.QuantizedLinear):
            raise TypeError(
                "[LinearOperands.of] layer must be an mlx.nn.Linear or QuantizedLinear, or a LoRALinear of one, "
                f"but got {type_name(layer)}."
            )
        operands = cls.of_base(linear)
        if linear is layer:
            return operands
        if reason := lora_obstacle(layer):
            raise ValueError(f"[LinearOperands.of] layer must be the sum of two products but {reason}.")
        return operands.with_lora(layer)

    @classmethod
    def of_base(cls, layer: nn.Module, prefix: str = "") -> LinearOperands:
        """Those of a layer that has its parameters as ``mlx.nn.Linear`` or ``QuantizedLinear`` have them.

        Args:
            layer (mlx.nn.Module): Of any type.
            prefix (str): What the parameters' names begin with. Default: ``""``.
        """
        weight, bias, scales, biases = (
            layer.get(prefix + name) for name in ("weight", "bias", "scales", "biases")
        )
        if scales is None:
            return cls(weight, bias)
        return cls(weight, bias, scales, biases, layer.group_size, layer.bits, layer.mode)

    def with_lora(self, layer: nn.Module) -> LinearOperands:
        """These, and the adapter of an mlx-lm ``LoRALinear``."""
        return self._replace(lora_a=layer["lora_a"], lora_b=layer["lora_b"], lora_scale=layer.scale)


def lora_obstacle(layer: nn.Module) -> str | None:
    """Why the operations cannot compute a ``LoRALinear``; None if they can."""
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
    """For messages, with what a ``LoRALinear`` is put around."""
    name = type(layer).__name__
    return f"LoRALinear of {type(layer['linear']).__name__}" if is_lora(type(layer)) else name
