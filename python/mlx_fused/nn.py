"""The fused projections as layers.

Their children are ordinary linear layers, so whatever converts those, converts these: ``mlx.nn.quantize``,
mlx-lm's LoRA conversion, adapter files and ``fuse``.
"""

from __future__ import annotations

from typing import get_args

import mlx.core as mx
import mlx.nn as nn
from mlx.nn import Linear, Module, QuantizedLinear

from mlx_fused._ext import difference
from mlx_fused.linear import LinearOperands, is_lora, type_name
from mlx_fused.operations import (
    fused_gated_projection,
    fused_linear,
    fused_output_projection_residual,
    fused_qkv_projection,
)
from mlx_fused.operations.call import check_sizes
from mlx_fused.operations.linear import Activation

__all__ = ["GatedMLP", "OutputProjection", "QKVProjection"]


class QKVProjection(Module):
    """Projects to queries, keys and values, split into heads, in one operation.

    Its children ``q``, ``k`` and ``v`` are linear layers. Each may become a ``QuantizedLinear``, or an mlx-lm
    ``LoRALinear`` around either. If one operation cannot compute them (DoRA, active dropout, or formats that
    differ), they are called one by one.

    Args:
        input_dims (int): The size of the input features.
        num_heads (int): The number of query heads.
        num_kv_heads (int, optional): The number of key and value heads, a divisor of ``num_heads``.
            Default: ``num_heads``.
        head_dim (int, optional): The size of a head. Default: ``input_dims // num_heads``.
        bias (bool, optional): Whether to add a bias to each projection. Default: ``False``.
        v_head_dim (int, optional): The size of a value head. Default: ``head_dim``.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If ``num_heads`` is not a multiple of ``num_kv_heads``, or a number is less than 1.
    """

    def __init__(
        self,
        input_dims: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        v_head_dim: int | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {"input_dims": input_dims, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        check_sizes("QKVProjection", sizes)
        if num_heads % num_kv_heads:
            raise ValueError(
                "[QKVProjection] num_heads must be a multiple of num_kv_heads "
                f"but got {num_heads} and {num_kv_heads}."
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = input_dims // num_heads if head_dim is None else head_dim
        self.v_head_dim = self.head_dim if v_head_dim is None else v_head_dim
        check_sizes("QKVProjection", {"head_dim": self.head_dim, "v_head_dim": self.v_head_dim})
        self.q = Linear(input_dims, num_heads * self.head_dim, bias)
        self.k = Linear(input_dims, num_kv_heads * self.head_dim, bias)
        self.v = Linear(input_dims, num_kv_heads * self.v_head_dim, bias)

    @classmethod
    def from_linear(
        cls, q: Module, k: Module, v: Module, num_heads: int, num_kv_heads: int | None = None
    ) -> QKVProjection:
        """Make a layer of three linear layers, which become its children; nothing is copied.

        Args:
            q (mlx.nn.Module): The query projection: an ``mlx.nn.Linear``, an ``mlx.nn.QuantizedLinear``, or
                an mlx-lm ``LoRALinear`` around one of them.
            k (mlx.nn.Module): The key projection.
            v (mlx.nn.Module): The value projection.
            num_heads (int): The number of query heads.
            num_kv_heads (int, optional): The number of key and value heads. Default: ``num_heads``.

        Raises:
            TypeError: If a layer is of another type, or a number no integer.
            ValueError: If the layers' sizes do not fit each other or the heads.
        """
        linears = {"q": q, "k": k, "v": v}
        sizes = {name: _sizes("QKVProjection", name, linear) for name, linear in linears.items()}
        q_dims, input_dims = sizes["q"]
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes("QKVProjection", {"num_heads": num_heads, "num_kv_heads": num_kv_heads})
        head_dim, v_head_dim = q_dims // num_heads, sizes["v"][0] // num_kv_heads
        layer = cls(input_dims, num_heads, num_kv_heads, head_dim, v_head_dim=v_head_dim)
        for name, size in sizes.items():
            _check_size("QKVProjection", name, layer[name], size)
            layer[name] = linears[name]
        return layer

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Project ``x`` of shape ``[B, S, input_dims]``.

        Returns:
            tuple(array, array, array): Queries ``[B, num_heads, S, head_dim]``, keys
            ``[B, num_kv_heads, S, head_dim]`` and values ``[B, num_kv_heads, S, v_head_dim]``.
        """
        if (layers := _operands(self.q, self.k, self.v)) is not None:
            return fused_qkv_projection(
                x,
                layers,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                v_head_dim=self.v_head_dim,
            )
        if x.ndim != 3:
            raise ValueError(f"[QKVProjection] x must have shape [B, S, input_dims] but got {x.shape}.")
        kv_heads = self.num_kv_heads
        heads = (self.num_heads, self.head_dim), (kv_heads, self.head_dim), (kv_heads, self.v_head_dim)
        outputs = self.q(x), self.k(x), self.v(x)
        return tuple(mx.unflatten(y, -1, n).swapaxes(1, 2) for y, n in zip(outputs, heads, strict=True))

    def _extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"v_head_dim={self.v_head_dim}"
        )


class OutputProjection(Module):
    """A projection and the residual that is added to it in one operation.

    Its child ``o`` is a linear layer. It may become a ``QuantizedLinear``, or an mlx-lm ``LoRALinear`` around
    either. If one operation cannot compute it with the addition (DoRA, active dropout), they are two.

    Args:
        input_dims (int): The size of the input, such as all heads of attention together.
        output_dims (int): The size of the residual.
        bias (bool, optional): Whether to add a bias. Default: ``False``.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is less than 1.
    """

    def __init__(self, input_dims: int, output_dims: int, bias: bool = False):
        super().__init__()
        check_sizes("OutputProjection", {"input_dims": input_dims, "output_dims": output_dims})
        self.o = Linear(input_dims, output_dims, bias)

    @classmethod
    def from_linear(cls, o: Module) -> OutputProjection:
        """Make a layer of a linear layer, which becomes its child; nothing is copied.

        Args:
            o (mlx.nn.Module): An ``mlx.nn.Linear``, an ``mlx.nn.QuantizedLinear``, or an mlx-lm
                ``LoRALinear`` around one of them.

        Raises:
            TypeError: If ``o`` is of another type.
        """
        output_dims, input_dims = _sizes("OutputProjection", "o", o)
        layer = cls(input_dims, output_dims)
        layer.o = o
        return layer

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        """Project ``x`` of shape ``[..., input_dims]`` and add ``residual``.

        Returns:
            array: Of the shape of ``residual``, ``[..., output_dims]``.
        """
        return _add_projection("OutputProjection", self.o, x, residual)


class GatedMLP(Module):
    """The feed-forward part of a transformer, ``down(activation(gate(x)) * up(x))``, in two operations.

    Its children ``gate``, ``up`` and ``down`` are linear layers. Each may become a ``QuantizedLinear``, or an
    mlx-lm ``LoRALinear`` around either. What one operation cannot compute (DoRA, active dropout, or formats
    of gate and up that differ) is computed layer by layer.

    Args:
        input_dims (int): The size of the input and of the output.
        hidden_dims (int): The size of what is between them.
        bias (bool, optional): Whether to add a bias in each layer. Default: ``False``.
        activation (str, optional): ``"silu"``, ``"gelu"``, ``"gelu_approx"``, ``"relu"`` or ``"relu2"``, as
            in ``mlx.nn``. Default: ``"silu"``.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If ``activation`` is another, or a number is less than 1.
    """

    def __init__(
        self, input_dims: int, hidden_dims: int, *, bias: bool = False, activation: Activation = "silu"
    ):
        super().__init__()
        check_sizes("GatedMLP", {"input_dims": input_dims, "hidden_dims": hidden_dims})
        self.activation = activation
        self.gate = Linear(input_dims, hidden_dims, bias)
        self.up = Linear(input_dims, hidden_dims, bias)
        self.down = Linear(hidden_dims, input_dims, bias)

    @classmethod
    def from_linear(
        cls, gate: Module, up: Module, down: Module, *, activation: Activation = "silu"
    ) -> GatedMLP:
        """Make a layer of three linear layers, which become its children; nothing is copied.

        Args:
            gate (mlx.nn.Module): What the activation is of: an ``mlx.nn.Linear``, an
                ``mlx.nn.QuantizedLinear``, or an mlx-lm ``LoRALinear`` around one of them.
            up (mlx.nn.Module): What the activation is multiplied with.
            down (mlx.nn.Module): The layer after that.
            activation (str, optional): As of the constructor.

        Raises:
            TypeError: If a layer is of another type.
            ValueError: If the layers' sizes do not fit each other, or ``activation`` is unknown.
        """
        linears = {"gate": gate, "up": up, "down": down}
        sizes = {name: _sizes("GatedMLP", name, linear) for name, linear in linears.items()}
        hidden_dims, input_dims = sizes["gate"]
        layer = cls(input_dims, hidden_dims, activation=activation)
        for name, size in sizes.items():
            _check_size("GatedMLP", name, layer[name], size)
            layer[name] = linears[name]
        return layer

    @property
    def activation(self) -> Activation:
        return self._activation

    @activation.setter
    def activation(self, name: Activation) -> None:
        if name not in get_args(Activation):
            expected = ", ".join(map(repr, get_args(Activation)))
            raise ValueError(f"[GatedMLP] activation must be one of {expected} but got {name!r}.")
        self._activation = name

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """Compute the layer of ``x`` of shape ``[..., input_dims]``, and add ``residual`` if it is given.

        Returns:
            array: Of the shape of ``x``.
        """
        if (layers := _operands(self.gate, self.up)) is not None:
            y = fused_gated_projection(x, tuple(layers), activation=self.activation)
        else:
            y = getattr(nn, self.activation)(self.gate(x)) * self.up(x)
        if residual is not None:
            return _add_projection("GatedMLP", self.down, y, residual)
        if (layers := _operands(self.down)) is not None:
            return fused_linear(y, layers[0])
        return self.down(y)

    def _extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def _add_projection(owner: str, linear: Module, x: mx.array, residual: mx.array) -> mx.array:
    """``residual + linear(x)``."""
    if (layers := _operands(linear)) is not None:
        return fused_output_projection_residual(x, layers[0], residual=residual)
    y = linear(x)
    if y.shape != residual.shape:
        raise ValueError(f"[{owner}] residual must have shape {y.shape} but got {residual.shape}.")
    return residual + y


def _check_size(owner: str, name: str, linear: Module, size: tuple[int, int]) -> None:
    if size != linear.weight.shape:
        raise ValueError(
            f"[{owner}] {name} must have a weight of shape {linear.weight.shape} but got {size}."
        )


def _operands(*linears: Module) -> list[LinearOperands] | None:
    """The present operands of ``linears``; None if one operation cannot compute them all."""
    try:
        layers = [LinearOperands.of(linear) for linear in linears]
    except (TypeError, ValueError):  # another type of layer, or active dropout
        return None
    return None if difference(layers) else layers


def _sizes(owner: str, name: str, linear: Module) -> tuple[int, int]:
    """The output and input size of a linear layer."""
    base = linear["linear"] if is_lora(type(linear)) else linear
    if type(base) not in (Linear, QuantizedLinear):
        raise TypeError(
            f"[{owner}] {name} must be an mlx.nn.Linear or QuantizedLinear, or a LoRALinear of one, "
            f"but got {type_name(linear)}."
        )
    output_dims, columns = base.weight.shape
    return output_dims, columns if type(base) is Linear else columns * 32 // base.bits
