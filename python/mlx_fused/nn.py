"""The fused projections as layers."""

from __future__ import annotations

import math

import mlx.core as mx
from mlx.nn import Linear, Module

from mlx_fused.linear import LinearOperands
from mlx_fused.operations import fused_output_projection_residual, fused_qkv_projection


class _QKV(Module):
    """The call, which dense and quantized layers share."""

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Project ``x`` of shape ``[B, S, input_dims]``.

        Returns:
            tuple(array, array, array): Queries ``[B, num_heads, S, head_dim]``, keys
            ``[B, num_kv_heads, S, head_dim]`` and values ``[B, num_kv_heads, S, v_head_dim]``.
        """
        layers = tuple(LinearOperands.of_base(self, f"{name}_") for name in "qkv")
        return fused_qkv_projection(
            x,
            layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
        )


class QKVProjection(_QKV):
    """Projects to queries, keys and values, split into heads, in one operation.

    Its parameters are ``q_weight`` of shape ``[num_heads * head_dim, input_dims]``, ``k_weight`` of shape
    ``[num_kv_heads * head_dim, input_dims]``, ``v_weight`` of shape
    ``[num_kv_heads * v_head_dim, input_dims]`` and, with a bias, ``q_bias``, ``k_bias`` and ``v_bias``.

    Args:
        input_dims (int): The size of the input features.
        num_heads (int): The number of query heads.
        num_kv_heads (int, optional): The number of key and value heads, a divisor of ``num_heads``.
            Default: ``num_heads``.
        head_dim (int, optional): The size of a head. Default: ``input_dims // num_heads``.
        bias (bool, optional): Whether to add a bias to each projection. Default: ``False``.
        v_head_dim (int, optional): The size of a value head. Default: ``head_dim``.

    Raises:
        ValueError: If ``num_heads`` is not a multiple of ``num_kv_heads``.
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
        if num_heads < 1 or (num_kv_heads is not None and num_kv_heads < 1):
            raise ValueError(
                f"[QKVProjection] num_heads and num_kv_heads must be at least 1 "
                f"but got {num_heads} and {num_kv_heads}."
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = input_dims // num_heads if head_dim is None else head_dim
        self.v_head_dim = self.head_dim if v_head_dim is None else v_head_dim
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"[QKVProjection] num_heads must be a multiple of num_kv_heads "
                f"but got {self.num_heads} and {self.num_kv_heads}."
            )
        sizes = {
            "q": self.num_heads * self.head_dim,
            "k": self.num_kv_heads * self.head_dim,
            "v": self.num_kv_heads * self.v_head_dim,
        }
        for name, dims in sizes.items():
            self[f"{name}_weight"] = _uniform(input_dims, (dims, input_dims))
            if bias:
                self[f"{name}_bias"] = _uniform(input_dims, (dims,))

    @classmethod
    def from_linear(
        cls, q: Linear, k: Linear, v: Linear, num_heads: int, num_kv_heads: int | None = None
    ) -> QKVProjection:
        """Make a layer that shares the arrays of three linear layers; none is copied.

        Args:
            q (mlx.nn.Linear): The query projection.
            k (mlx.nn.Linear): The key projection.
            v (mlx.nn.Linear): The value projection.
            num_heads (int): The number of query heads.
            num_kv_heads (int, optional): The number of key and value heads. Default: ``num_heads``.

        Raises:
            TypeError: If a layer is not an ``mlx.nn.Linear``.
            ValueError: If the shapes do not match, or only some layers have a bias.
        """
        linears = {"q": q, "k": k, "v": v}
        for name, linear in linears.items():
            _check_linear("QKVProjection", name, linear)
        (q_dims, input_dims), v_dims = q.weight.shape, v.weight.shape[0]
        layer = cls(
            input_dims,
            num_heads,
            num_kv_heads,
            q_dims // num_heads,
            "bias" in q,
            v_dims // (num_kv_heads or num_heads),
        )
        for name, linear in linears.items():
            if linear.keys() != q.keys():
                given = ", ".join(n for n, linear in linears.items() if "bias" in linear)
                raise ValueError(
                    f"[QKVProjection] q, k and v must all have a bias, or none, but got one for {given}."
                )
            for parameter, array in linear.items():
                expected = layer[f"{name}_{parameter}"].shape
                if array.shape != expected:
                    raise ValueError(
                        f"[QKVProjection] the {parameter} of {name} must have shape {expected} "
                        f"but got {array.shape}."
                    )
                layer[f"{name}_{parameter}"] = array
        return layer

    def _extra_repr(self) -> str:
        return (
            f"input_dims={self.q_weight.shape[1]}, num_heads={self.num_heads}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, v_head_dim={self.v_head_dim}, "
            f"bias={'q_bias' in self}"
        )

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedQKVProjection:
        """Quantize the weights; called by ``mlx.nn.quantize``. The arguments are those of ``mx.quantize``."""
        return QuantizedQKVProjection(self, group_size, bits, mode)


class QuantizedQKVProjection(_QKV):
    """A :class:`QKVProjection` with quantized weights, frozen; made by its ``to_quantized``.

    Its parameters have the names of the dense layer's. Each weight now holds codes and comes with scales
    (``q_scales``) and, in mode ``"affine"``, with group biases (``q_biases``).
    """

    def __init__(self, layer: QKVProjection, group_size: int | None, bits: int | None, mode: str):
        super().__init__()
        self.num_heads = layer.num_heads
        self.num_kv_heads = layer.num_kv_heads
        self.head_dim = layer.head_dim
        self.v_head_dim = layer.v_head_dim
        self.group_size, self.bits, self.mode = group_size, bits, mode
        for name in "qkv":
            _quantize_into(self, f"{name}_", layer[f"{name}_weight"])
            if f"{name}_bias" in layer:
                self[f"{name}_bias"] = layer[f"{name}_bias"]
        self.freeze()

    def _extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"v_head_dim={self.v_head_dim}, bias={'q_bias' in self}, group_size={self.group_size}, "
            f"bits={self.bits}, mode={self.mode}"
        )


class _Output(Module):
    """The call, which dense and quantized layers share."""

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        """Project ``x`` of shape ``[B, S, input_dims]`` and add ``residual``.

        Returns:
            array: Of the shape of ``residual``, ``[B, S, output_dims]``.
        """
        return fused_output_projection_residual(x, LinearOperands.of_base(self), residual=residual)


class OutputProjection(_Output):
    """Projects the output of attention and adds the residual in one operation.

    Its parameters are ``weight`` of shape ``[output_dims, input_dims]`` and, with a bias, ``bias`` of
    shape ``[output_dims]``.

    Args:
        input_dims (int): The size of the attention output, all heads together.
        output_dims (int): The size of the residual.
        bias (bool, optional): Whether to add a bias. Default: ``False``.
    """

    def __init__(self, input_dims: int, output_dims: int, bias: bool = False):
        super().__init__()
        self.weight = _uniform(input_dims, (output_dims, input_dims))
        if bias:
            self.bias = _uniform(input_dims, (output_dims,))

    @classmethod
    def from_linear(cls, o: Linear) -> OutputProjection:
        """Make a layer that shares the arrays of a linear layer; none is copied.

        Args:
            o (mlx.nn.Linear): The output projection.

        Raises:
            TypeError: If ``o`` is not an ``mlx.nn.Linear``.
        """
        _check_linear("OutputProjection", "o", o)
        output_dims, input_dims = o.weight.shape
        layer = cls(input_dims, output_dims, "bias" in o)
        layer.update(o)
        return layer

    def _extra_repr(self) -> str:
        output_dims, input_dims = self.weight.shape
        return f"input_dims={input_dims}, output_dims={output_dims}, bias={'bias' in self}"

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedOutputProjection:
        """Quantize the weight; called by ``mlx.nn.quantize``. The arguments are those of ``mx.quantize``."""
        return QuantizedOutputProjection(self, group_size, bits, mode)


class QuantizedOutputProjection(_Output):
    """An :class:`OutputProjection` with a quantized weight, frozen; made by its ``to_quantized``.

    Its parameters are ``weight`` (codes), ``scales``, group ``biases`` in mode ``"affine"``, and ``bias`` if
    the dense layer has one.
    """

    def __init__(self, layer: OutputProjection, group_size: int | None, bits: int | None, mode: str):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        _quantize_into(self, "", layer.weight)
        if "bias" in layer:
            self.bias = layer.bias
        self.freeze()

    def _extra_repr(self) -> str:
        return f"bias={'bias' in self}, group_size={self.group_size}, bits={self.bits}, mode={self.mode}"


def _quantize_into(layer: Module, prefix: str, weight: mx.array) -> None:
    codes, scales, *biases = mx.quantize(weight, layer.group_size, layer.bits, mode=layer.mode)
    layer[f"{prefix}weight"], layer[f"{prefix}scales"] = codes, scales
    if biases:
        layer[f"{prefix}biases"] = biases[0]


def _uniform(input_dims: int, shape: tuple[int, ...]) -> mx.array:
    bound = 1 / math.sqrt(input_dims)  # the initial values of mlx.nn.Linear
    return mx.random.uniform(-bound, bound, shape)


def _check_linear(layer: str, name: str, linear: object) -> None:
    if type(linear) is not Linear:
        raise TypeError(f"[{layer}] {name} must be an mlx.nn.Linear but got {type(linear).__name__}.")
