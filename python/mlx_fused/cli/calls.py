"""Calls of a transformer's layers, each as mlx-lm's modules compute it and fused."""

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
    """The sizes of a transformer; the defaults are Llama-3.2-1B's."""

    hidden: int = 2048
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 64
    intermediate: int = 8192
    vocabulary: int = 128256

    def __str__(self) -> str:
        heads = f"{self.num_heads} heads of {self.head_dim}, {self.num_kv_heads} of keys"
        return f"{self.hidden} wide, {heads}, MLP {self.intermediate} wide, {self.vocabulary} words"


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
    """What the routes of the operations depend on besides the rows, by name, and of their gradients."""
    q_dims, kv_dims = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    shapes = (
        ("QKV", sizes.hidden, (q_dims, kv_dims, kv_dims)),
        ("output + residual", q_dims, (sizes.hidden,)),
        ("gate * up", sizes.hidden, (sizes.intermediate,) * 2),
        ("down + residual", sizes.intermediate, (sizes.hidden,)),
        ("head", sizes.hidden, (sizes.vocabulary,)),
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
            ranks=(_RANK * (weights.endswith("LoRA") and name != "head"),) * len(features),
        )
        found |= {name: forward, f"{name}, gradient": forward._replace(gradient=True)}
    return found


def make_calls(sizes: Sizes, weights: str, rows: int) -> list[Call]:
    """The operations on ``rows`` tokens, with random weights of a kind from ``WEIGHTS``."""
    counts = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
    q_dims = sizes.num_heads * sizes.head_dim
    qkv = [_Projection(sizes.hidden, n * sizes.head_dim, weights) for n in counts]
    out = _Projection(q_dims, sizes.hidden, weights)
    gate, up = (_Projection(sizes.hidden, sizes.intermediate, weights) for _ in range(2))
    down = _Projection(sizes.intermediate, sizes.hidden, weights)
    head = _head(sizes, weights)

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
    layers = gate.operands, up.operands

    def added(name: str, width: int, layer: _Projection) -> Call:
        fused = partial(mlx_fused.fused_output_projection_residual, weight=layer.operands)
        inputs = [normal(width), x]
        return Call(name, inputs, lambda a, x: [x + layer(a)], lambda a, x: [fused(a, residual=x)])

    def normal(width: int) -> mx.array:
        return mx.random.normal((1, rows, width)).astype(WEIGHTS[weights])

    x = normal(sizes.hidden)
    return [
        Call("QKV", [x], stock_qkv, lambda x: list(fused_qkv(x))),
        added("output + residual", q_dims, out),
        Call(
            "gate * up",
            [x],
            lambda x: [nn.silu(gate(x)) * up(x)],
            lambda x: [mlx_fused.fused_gated_projection(x, layers)],
        ),
        added("down + residual", sizes.intermediate, down),
        Call("head", [x], lambda x: [head(x)], lambda x: [mlx_fused.fused_linear(x, head.operands)]),
    ]


def make_loss(sizes: Sizes, weights: str, rows: int) -> Call:
    """The loss of every token, of a head's input."""
    head, targets = _head(sizes, weights), mx.random.randint(0, sizes.vocabulary, (1, rows))
    return Call(
        "loss",
        [mx.random.normal((1, rows, sizes.hidden)).astype(WEIGHTS[weights])],
        lambda x: [nn.losses.cross_entropy(head(x), targets).astype(mx.float32)],
        lambda x: [mlx_fused.fused_linear_cross_entropy(x, head.operands, targets)],
    )


def make_embedding(sizes: Sizes, weights: str, rows: int) -> Call:
    """The embeddings of words. They have no gradient but that of the table."""
    table, words = _head(sizes, weights).operands, mx.random.randint(0, sizes.vocabulary, (1, rows))

    def stock() -> list[mx.array]:
        if table.scales is None:
            return [table.weight[words]]
        return [mx.dequantize(table.weight[words], table.scales[words], table.biases[words], **_QUANTIZATION)]

    return Call("embedding", [], stock, lambda: [mlx_fused.fused_embedding(words, table)])


def make_weightless(sizes: Sizes, weights: str, rows: int) -> list[Call]:
    """What a block has besides linear layers: a norm, positions and causal attention. They have no routes."""

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape).astype(WEIGHTS[weights])

    heads = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
    qkv = [normal(1, n, rows, sizes.head_dim) for n in heads]
    positions = {"traditional": False, "base": 10000.0, "scale": 1.0, "offset": 0}
    causal = {"scale": sizes.head_dim**-0.5, "mask": "causal"}
    return [
        Call(
            "norm",
            [normal(1, rows, sizes.hidden), normal(sizes.hidden)],
            lambda x, w: [mx.fast.rms_norm(x, w, 1e-5)],
            lambda x, w: [mlx_fused.fused_rms_norm(x, w, 1e-5)],
        ),
        Call(
            "rope",
            qkv[:1],
            lambda q: [mx.fast.rope(q, sizes.head_dim, **positions)],
            lambda q: [mlx_fused.fused_rope(q, sizes.head_dim, **positions)],
        ),
        Call(
            "attention",
            qkv,
            lambda *qkv: [mx.fast.scaled_dot_product_attention(*qkv, **causal)],
            lambda *qkv: [mlx_fused.fused_attention(*qkv, **causal)],
        ),
    ]


def make_block(sizes: Sizes, weights: str, rows: int) -> Call:
    """A transformer block of mlx-lm's Llama, stock and patched."""
    from mlx_lm.models.llama import ModelArgs, TransformerBlock
    from mlx_lm.tuner.lora import LoRALinear

    args = ModelArgs(
        model_type="llama",
        hidden_size=sizes.hidden,
        num_hidden_layers=1,
        intermediate_size=sizes.intermediate,
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
            for part in (block.self_attn, block.mlp):
                layers = {k: LoRALinear.from_base(m) for k, m in part.children().items() if "weight" in m}
                part.update_modules(layers)
        return block

    stock, patched = make(), make()
    mlx_fused.patch(patched)
    x = mx.random.normal((1, rows, sizes.hidden)).astype(WEIGHTS[weights])
    mx.eval(x, stock.parameters(), patched.parameters())
    return Call("block", [x], *(lambda x, b=block: [b(x, "causal")] for block in (stock, patched)))


def peak_memory(sizes: Sizes, weights: str, rows: int) -> int:
    """A lower bound of the bytes that the calls take. A block's gradient holds its scores three times."""
    q_dims, kv_dims = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    parameters = sizes.hidden * (2 * (q_dims + kv_dims) + 3 * sizes.intermediate)
    tokens = rows * (sizes.hidden + q_dims + sizes.intermediate)
    scores = sizes.num_heads * rows**2
    return WEIGHTS[weights].size * (parameters + tokens + 3 * scores)


def _head(sizes: Sizes, weights: str) -> "_Projection":
    """Without an adapter: mlx-lm adapts the layers of blocks alone."""
    return _Projection(sizes.hidden, sizes.vocabulary, weights.removesuffix(" + LoRA"))


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
