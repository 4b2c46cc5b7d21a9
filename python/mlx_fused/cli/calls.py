"""Calls of an attention block's two projections, each as mlx-lm's modules compute it and fused."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn

import mlx_fused
from mlx_fused import LinearOperands
from mlx_fused.tuning import Kind

# The kinds of weights, with the dtype of the activations.
WEIGHTS = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "4-bit": mx.bfloat16,
    "4-bit + LoRA": mx.bfloat16,
}
GROUP_SIZE = 64
_QUANTIZATION = {"group_size": GROUP_SIZE, "bits": 4}
_RANK, _SCALE = 8, 20.0  # mlx-lm's defaults


@dataclass(frozen=True)
class Sizes:
    """The sizes of an attention block; the defaults are Llama-3.2-1B's."""

    hidden: int = 2048
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 64

    def __str__(self) -> str:
        return f"{self.hidden} wide, {self.num_heads} heads of {self.head_dim}, {self.num_kv_heads} of keys"


@dataclass(frozen=True)
class Call:
    """One operation and its inputs, as a stock and as a fused function."""

    name: str
    inputs: list[mx.array]
    stock: Callable[..., list[mx.array]]
    fused: Callable[..., list[mx.array]]

    def gradient(self) -> "Call":
        """The gradients of the inputs (the weights are frozen)."""
        cotangents = [mx.ones_like(y) for y in self.stock(*self.inputs)]

        def of(function: Callable[..., list[mx.array]]) -> Callable[..., list[mx.array]]:
            return lambda *inputs: mx.vjp(function, list(inputs), cotangents)[1]

        return Call(f"{self.name}, gradient", self.inputs, of(self.stock), of(self.fused))


def kinds(sizes: Sizes, weights: str) -> dict[str, Kind]:
    """What the routes of both operations depend on besides the rows, by name, and of their gradients."""
    q_dims, kv_dims = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    shapes = (
        ("QKV", sizes.hidden, (q_dims, kv_dims, kv_dims)),
        ("output + residual", q_dims, (sizes.hidden,)),
    )
    found = {}
    for name, in_features, features in shapes:
        forward = Kind(
            gradient=False,
            of_weights=False,
            dtype=WEIGHTS[weights],
            format=("affine", 4, GROUP_SIZE) if weights.startswith("4-bit") else None,
            bias=False,
            in_features=in_features,
            features=features,
            ranks=(_RANK * weights.endswith("LoRA"),) * len(features),
        )
        found |= {name: forward, f"{name}, gradient": forward._replace(gradient=True)}
    return found


def make_calls(sizes: Sizes, weights: str, rows: int) -> list[Call]:
    """Both operations on ``rows`` tokens, with random weights of a kind from ``WEIGHTS``."""
    counts = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
    q_dims = sizes.num_heads * sizes.head_dim
    qkv = [_Projection(sizes.hidden, n * sizes.head_dim, weights) for n in counts]
    out = _Projection(q_dims, sizes.hidden, weights)

    def stock_qkv(x: mx.array) -> list[mx.array]:
        outputs = zip(qkv, counts, strict=True)
        return [p(x).reshape(1, rows, n, sizes.head_dim).transpose(0, 2, 1, 3) for p, n in outputs]

    fused_qkv = partial(
        mlx_fused.fused_qkv_projection,
        weight=tuple(p.operands for p in qkv),
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
    )
    fused_output = partial(mlx_fused.fused_output_projection_residual, weight=out.operands)
    dtype = WEIGHTS[weights]
    x = mx.random.normal((1, rows, sizes.hidden)).astype(dtype)
    attended = mx.random.normal((1, rows, q_dims)).astype(dtype)
    return [
        Call("QKV", [x], stock_qkv, lambda x: list(fused_qkv(x))),
        Call(
            "output + residual",
            [attended, x],
            lambda attended, x: [x + out(attended)],
            lambda attended, x: [fused_output(attended, residual=x)],
        ),
    ]


def make_block(sizes: Sizes, weights: str, rows: int) -> Call:
    """A transformer block of mlx-lm's Llama with a tiny feed-forward part, stock and patched."""
    from mlx_lm.models.llama import ModelArgs, TransformerBlock
    from mlx_lm.tuner.lora import LoRALinear

    args = ModelArgs(
        model_type="llama",
        hidden_size=sizes.hidden,
        num_hidden_layers=1,
        intermediate_size=64,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        rms_norm_eps=1e-5,
        vocab_size=1,
    )

    def make() -> TransformerBlock:
        mx.random.seed(0)
        block = TransformerBlock(args)
        block.set_dtype(WEIGHTS[weights])
        if weights.startswith("4-bit"):
            nn.quantize(block, **_QUANTIZATION)
        if weights.endswith("LoRA"):
            attention = block.self_attn
            attention.update_modules(
                {k: LoRALinear.from_base(m) for k, m in attention.children().items() if "weight" in m}
            )
        return block

    stock, patched = make(), make()
    mlx_fused.patch(patched)
    x = mx.random.normal((1, rows, sizes.hidden)).astype(WEIGHTS[weights])
    mx.eval(x, stock.parameters(), patched.parameters())
    return Call("block", [x], *(lambda x, b=block: [b(x, "causal")] for block in (stock, patched)))


def peak_memory(sizes: Sizes, weights: str, rows: int) -> int:
    """A lower bound of the bytes that the calls take. A block's gradient holds its scores three times."""
    q_dims, kv_dims = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    parameters = 2 * sizes.hidden * (q_dims + kv_dims)
    tokens = rows * (sizes.hidden + q_dims)
    scores = sizes.num_heads * rows**2
    return WEIGHTS[weights].size * (parameters + tokens + 3 * scores)


class _Projection:
    """A linear layer without bias, with or without an adapter."""

    def __init__(self, in_features: int, out_features: int, weights: str):
        self.base = nn.Linear(in_features, out_features, bias=False)
        self.base.set_dtype(WEIGHTS[weights])
        if weights.startswith("4-bit"):
            self.base = nn.QuantizedLinear.from_linear(self.base, **_QUANTIZATION)
        self.operands = LinearOperands.of(self.base)
        if weights.endswith("LoRA"):
            self.operands = self.operands._replace(
                lora_a=mx.random.normal((in_features, _RANK)) * in_features**-0.5,
                lora_b=mx.random.normal((_RANK, out_features)) * 0.01,
                lora_scale=_SCALE,
            )

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        if self.operands.lora_a is None:
            return y
        update = (x @ self.operands.lora_a) @ self.operands.lora_b
        return y + (_SCALE * update).astype(x.dtype)
