"""What is measured: models, cells, and operands for them."""

from dataclasses import dataclass, field
from math import sqrt

import mlx.core as mx
import numpy as np

BITS, GROUP_SIZE = 4, 64
NORM_EPS = 1e-5
RANK, SCALE = 8, 20.0  # as mlx-lm's defaults


@dataclass(frozen=True)
class Model:
    """The sizes of a transformer's layers."""

    name: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.num_heads, self.num_kv_heads, self.num_kv_heads


@dataclass(frozen=True)
class Case:
    """One measured cell: an operation, a key of ``report.TITLES``, at one dtype and rows M.

    Backward is with the gradients of all that is trained: x and, of a dense weight without adapters, the
    weight; x and the adapters; x alone if the weight is quantized; and the residual.
    """

    model: Model
    op: str
    dtype: str
    rows: int
    backward: bool
    quantized: bool = False
    lora: bool = False

    @property
    def name(self) -> str:
        return self.op + f" {BITS}-bit" * self.quantized + " LoRA" * self.lora

    @property
    def trains_weights(self) -> bool:
        return not (self.quantized or self.lora)

    @property
    def out_features(self) -> tuple[int, ...]:
        m = self.model
        return {
            "qkv": tuple(h * m.head_dim for h in m.heads),
            "output": (m.hidden,),
            "gated": (m.intermediate,) * 2,
            "head": (m.vocabulary,),
            "norm": (m.hidden,),
        }[self.op]

    @property
    def in_features(self) -> int:
        return self.model.num_heads * self.model.head_dim if self.op == "output" else self.model.hidden

    @property
    def flops(self) -> int:
        if self.op == "norm":
            return (10 if self.backward else 4) * self.rows * self.in_features
        base = 2 * self.rows * self.in_features * sum(self.out_features)
        ranks = RANK * len(self.out_features) * self.in_features + RANK * sum(self.out_features)
        adapters = 2 * self.rows * ranks * self.lora
        if not self.backward:
            return base + adapters
        return (3 if self.trains_weights else 2) * base + 3 * adapters

    @property
    def bytes(self) -> int:
        """Bytes that must move: y = x Wᵀ and both gradients each touch a matrix of each shape.

        Of quantized weights, theirs alone, since their share of the bandwidth is what a kernel is judged by.
        """
        k, n = self.in_features, sum(self.out_features)
        item = 4 if self.dtype == "float32" else 2
        if self.op == "norm":
            return item * (5 if self.backward else 2) * self.rows * k
        if self.quantized:
            return (n * k * BITS // 8 + 2 * item * n * (k // GROUP_SIZE)) * (1 + self.backward)
        elements = self.rows * k + n * k + self.rows * n // (1 + (self.op == "gated"))
        if self.op == "output":
            elements += self.rows * n
        return item * elements * ((3 if self.trains_weights else 2) if self.backward else 1)


@dataclass(frozen=True)
class Operands:
    """NumPy float32 arrays whose values the case's dtype represents exactly.

    ``primals`` are what backward differentiates by: x, then the weights or the adapters' A and B, then the
    residual. ``frozen`` are the other weights, each as its arrays: one, or codes, scales and biases.
    ``cotangents`` has one array per output.
    """

    primals: list[np.ndarray]
    cotangents: list[np.ndarray]
    frozen: list[tuple[np.ndarray, ...]] = field(default_factory=list)


def operands(case: Case) -> Operands:
    """Draws the operands, scaled so that every output has a variance of about one."""
    rng = np.random.default_rng(0)
    dtype = getattr(mx, case.dtype)

    def draw(*shape: int, scale: float = 1.0, dtype: mx.Dtype = dtype) -> np.ndarray:
        values = mx.array(rng.standard_normal(shape, dtype=np.float32) * np.float32(scale))
        return np.array(values.astype(dtype).astype(mx.float32))

    k = case.in_features
    x = draw(1, case.rows, k)
    if case.op == "norm":
        return Operands([x, draw(k)], [draw(1, case.rows, k)])
    weights = [draw(n, k, scale=1 / sqrt(k)) for n in case.out_features]
    frozen, primals = [], [x]
    if case.trains_weights:
        primals += weights
    elif case.quantized:
        frozen = [_quantize(w, dtype) for w in weights]
    else:
        frozen = [(w,) for w in weights]
    if case.lora:
        primals += [draw(k, RANK, scale=1 / sqrt(k), dtype=mx.float32) for _ in weights]
        primals += [draw(RANK, n, scale=1 / SCALE, dtype=mx.float32) for n in case.out_features]
    shapes = [(1, case.rows, case.out_features[0])]
    if case.op == "output":
        primals.append(draw(*shapes[0]))
    elif case.op == "qkv":
        shapes = [(1, h, case.rows, case.model.head_dim) for h in case.model.heads]
    return Operands(primals, [draw(*shape) for shape in shapes], frozen)


def _quantize(weight: np.ndarray, dtype: mx.Dtype) -> tuple[np.ndarray, ...]:
    words, scales, biases = mx.quantize(mx.array(weight).astype(dtype), GROUP_SIZE, BITS)
    return np.array(words), np.array(scales.astype(mx.float32)), np.array(biases.astype(mx.float32))
