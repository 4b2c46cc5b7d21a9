"""The cases, the contenders that run them, and the float64 reference each contender must match."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt

import mlx.core as mx
import numpy as np

import mlx_fused
from machine import cores

# Spacing of each dtype's numbers at 1, and at 0 (the smallest subnormal); rounding errs by half.
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TINY = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


@dataclass(frozen=True)
class Model:
    """The sizes of one attention block."""

    name: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.num_heads, self.num_kv_heads, self.num_kv_heads


@dataclass(frozen=True)
class Case:
    """One measured cell: an operation, ``"qkv"`` or ``"output"``, at one dtype and rows M."""

    model: Model
    op: str
    dtype: str
    rows: int
    backward: bool

    @property
    def out_features(self) -> tuple[int, ...]:
        if self.op == "output":
            return (self.model.hidden,)
        return tuple(h * self.model.head_dim for h in self.model.heads)

    @property
    def in_features(self) -> int:
        return self.model.num_heads * self.model.head_dim if self.op == "output" else self.model.hidden

    @property
    def flops(self) -> int:
        forward = 2 * self.rows * self.in_features * sum(self.out_features)
        return 3 * forward if self.backward else forward

    @property
    def bytes(self) -> int:
        """Bytes that must move: y = x Wᵀ and both gradients each touch a matrix of each shape."""
        k, n = self.in_features, sum(self.out_features)
        elements = self.rows * k + n * k + self.rows * n
        if self.op == "output":
            elements += self.rows * n
        item = 4 if self.dtype == "float32" else 2
        return item * elements * (3 if self.backward else 1)


@dataclass(frozen=True)
class Operands:
    """NumPy float32 arrays whose values the case's dtype represents exactly.

    ``primals`` are (x, wq, wk, wv) or (x, w, residual); ``cotangents`` has one array per output.
    """

    primals: list[np.ndarray]
    cotangents: list[np.ndarray]


def operands(case: Case) -> Operands:
    """Draws the operands, scaled so that every output has a variance of about one."""
    rng = np.random.default_rng(0)

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        values = mx.array(rng.standard_normal(shape, dtype=np.float32) * np.float32(scale))
        return np.array(values.astype(getattr(mx, case.dtype)).astype(mx.float32))

    k = case.in_features
    primals = [draw(1, case.rows, k)] + [draw(n, k, scale=1 / sqrt(k)) for n in case.out_features]
    if case.op == "output":
        shapes = [(1, case.rows, case.model.hidden)]
        primals.append(draw(*shapes[0]))
    else:
        shapes = [(1, h, case.rows, case.model.head_dim) for h in case.model.heads]
    return Operands(primals, [draw(*shape) for shape in shapes])


def _fused(case: Case, *primals: mx.array, **options: str) -> Sequence[mx.array]:
    if case.op == "output":
        x, w, residual = primals
        return [mlx_fused.fused_output_projection_residual(x, w, None, residual, **options)]
    x, *weights = primals
    m = case.model
    heads = m.num_heads, m.num_kv_heads, m.head_dim
    return mlx_fused.fused_qkv_projection(x, tuple(weights), None, *heads, **options)


def _composed(case: Case, *primals: mx.array) -> Sequence[mx.array]:
    if case.op == "output":
        x, w, residual = primals
        return [x @ w.T + residual]
    x, *weights = primals
    return [
        (x @ w.T).reshape(1, case.rows, heads, -1).transpose(0, 2, 1, 3)
        for w, heads in zip(weights, case.model.heads, strict=True)
    ]


def _addmm(case: Case, *primals: mx.array) -> Sequence[mx.array]:
    x, w, residual = primals
    return [mx.addmm(residual, x, w.T)]


def chain(function: Callable, primals: Sequence[mx.array], length: int) -> None:
    """Evaluates ``length`` calls, each waiting for all of the one before, as a model's layers do.

    One evaluation of many calls, so that its own cost is shared; from one to the next leads a maximum
    of the first operand and a number, the same for every contender.
    """
    first, *rest = primals
    link = first
    for _ in range(length):
        results = list(function(link, *rest))
        (done,) = mx.depends(results[:1], results[1:])
        link = mx.maximum(first, done[(0,) * done.ndim])
    mx.eval(link)
    mx.synchronize()


class MLX:
    """Runs a function of MLX arrays, forward or with the gradients of all its arguments."""

    def __init__(self, function: Callable, case: Case, given: Operands) -> None:
        dtype = getattr(mx, case.dtype)
        self.case, self.function = case, function
        self.primals = [mx.array(x).astype(dtype) for x in given.primals]
        self.cotangents = [mx.array(x).astype(dtype) for x in given.cotangents]
        mx.eval(self.primals, self.cotangents)

    def __call__(self) -> list[mx.array]:
        results = self._results(*self.primals)
        mx.eval(results)
        mx.synchronize()
        return results

    def chain(self, length: int) -> None:
        """Runs ``length`` calls one after another."""
        chain(self._results, self.primals, length)

    def _results(self, *primals: mx.array) -> list[mx.array]:
        if not self.case.backward:
            return list(self.function(self.case, *primals))
        # The gradients do not need the outputs: only evaluating both is forward + backward.
        outputs, gradients = mx.vjp(lambda *p: self.function(self.case, *p), list(primals), self.cotangents)
        return [*outputs, *gradients]

    @staticmethod
    def to_numpy(result: mx.array) -> np.ndarray:
        return np.array(result.astype(mx.float32))


class Torch:
    """The composed form in torch, on all cores."""

    def __init__(self, case: Case, given: Operands) -> None:
        import torch

        torch.set_num_threads(cores())
        dtype = getattr(torch, case.dtype)
        self.case, self.torch = case, torch
        self.primals = [torch.from_numpy(x).to(dtype).requires_grad_(case.backward) for x in given.primals]
        self.cotangents = [torch.from_numpy(x).to(dtype) for x in given.cotangents]

    def _forward(self) -> list:
        linear = self.torch.nn.functional.linear
        if self.case.op == "output":
            x, w, residual = self.primals
            return [linear(x, w) + residual]
        x, *weights = self.primals
        return [
            linear(x, w).view(1, self.case.rows, heads, -1).transpose(1, 2)
            for w, heads in zip(weights, self.case.model.heads, strict=True)
        ]

    def __call__(self) -> list:
        outputs = self._forward()
        if not self.case.backward:
            return outputs
        return [*outputs, *self.torch.autograd.grad(outputs, self.primals, self.cotangents)]

    @staticmethod
    def to_numpy(result) -> np.ndarray:
        return result.detach().float().numpy()


def contenders(case: Case, given: Operands, torch: bool, gpu: bool = False) -> dict[str, MLX | Torch]:
    """Returns the contenders of one case by name, in the order in which they take turns.

    On a GPU ``fused`` is what our kernels do, and ``routed`` what a user gets.
    """
    functions: dict[str, Callable] = {"fused": _fused, "composed": _composed}
    if gpu:
        functions = {"fused": partial(_fused, route="fused"), "routed": _fused, "composed": _composed}
        if case.op == "output":
            functions["addmm"] = _addmm
    found: dict[str, MLX | Torch] = {name: MLX(f, case, given) for name, f in functions.items()}
    if torch:
        found["torch"] = Torch(case, given)
    return found


@dataclass(frozen=True)
class Expected:
    """A float64 result as the sum of its ``terms``: products that reduce over ``k``, and residuals.

    ``magnitude`` sums the products of the absolute values.
    """

    terms: list[np.ndarray]
    magnitude: np.ndarray | float
    k: int

    def worst(self, result: np.ndarray, dtype: str) -> float:
        """Returns the largest error as a fraction of the bound: a result above 1, or NaN, is wrong.

        Each term and each partial sum of terms may be rounded to ``dtype``. Within the products
        float32 accumulation errs by the probabilistic bound of Higham and Mary (2019) with their
        factor at 2, ``eps * sqrt(k) * magnitude``, in any order of summation.
        """
        steps = len(self.terms)
        rounding = steps * (EPS[dtype] * sum(np.abs(t) for t in self.terms) + TINY[dtype]) / 2
        accumulation = EPS["float32"] * sqrt(self.k) * self.magnitude
        return float(np.max(np.abs(result - sum(self.terms)) / (rounding + accumulation)))


def reference(case: Case, given: Operands) -> list[Expected]:
    """Returns the outputs and, for forward + backward, the gradient of each primal."""
    primals = [x.astype(np.float64) for x in given.primals]
    gradients = [g.astype(np.float64) for g in given.cotangents]
    x, weights = primals[0], primals[1 : 1 + len(case.out_features)]
    residual = primals[1 + len(weights) :]
    outputs = [
        Expected(
            [_split(case, x @ w.T), *residual],
            _split(case, np.abs(x) @ np.abs(w.T)),
            case.in_features,
        )
        for w in weights
    ]
    if not case.backward:
        return outputs
    flat = [_merge(case, g) for g in gradients]
    pairs = list(zip(flat, weights, strict=True))
    d_x = Expected(
        [g @ w for g, w in pairs],
        sum(np.abs(g) @ np.abs(w) for g, w in pairs),
        sum(case.out_features),
    )
    d_weights = [Expected([g[0].T @ x[0]], np.abs(g[0].T) @ np.abs(x[0]), case.rows) for g in flat]
    d_residual = [Expected([g], 0.0, 0) for g in gradients[: len(residual)]]
    return [*outputs, d_x, *d_weights, *d_residual]


def _split(case: Case, y: np.ndarray) -> np.ndarray:
    if case.op == "output":
        return y
    return y.reshape(1, case.rows, -1, case.model.head_dim).transpose(0, 2, 1, 3)


def _merge(case: Case, y: np.ndarray) -> np.ndarray:
    return y if case.op == "output" else y.transpose(0, 2, 1, 3).reshape(1, case.rows, -1)


class WrongResult(Exception):
    """A contender disagrees with the float64 reference."""


def verify(case: Case, name: str, contender: MLX | Torch, expected: list[Expected]) -> float:
    """Runs a contender once and returns its largest error as a fraction of the bound.

    Raises:
        WrongResult: If any output or gradient has the wrong shape or exceeds the bound.
    """
    results = [contender.to_numpy(r) for r in contender()]
    if [r.shape for r in results] != [e.terms[0].shape for e in expected]:
        raise WrongResult(f"{name} returns the wrong shapes for {case}: {[r.shape for r in results]}")
    worst = max(e.worst(r, case.dtype) for e, r in zip(expected, results, strict=True))
    if not worst <= 1:
        raise WrongResult(f"{name} is wrong for {case}: its error is {worst:.3g} times the bound")
    return worst
