"""The float64 reference that every contender must match."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from cases import BITS, GROUP_SIZE, NORM_EPS, RANK, SCALE, Case, Operands

# Spacing of each dtype's numbers at 1, and at 0 (the smallest subnormal); rounding errs by half.
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TINY = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


class WrongResult(Exception):
    """A contender disagrees with the float64 reference."""


@dataclass(frozen=True)
class Expected:
    """A float64 result as the sum of its ``terms``: products that reduce over ``k``, and residuals.

    ``magnitude`` sums the products of the absolute values, ``inherited`` is what errors of operands come to,
    and ``steps`` counts the roundings to the dtype; 0: one for each term.
    """

    terms: list[np.ndarray]
    magnitude: np.ndarray | float
    k: int
    inherited: np.ndarray | float = 0.0
    steps: int = 0

    def worst(self, result: np.ndarray, dtype: str) -> float:
        """Returns the largest error as a fraction of the bound: a result above 1, or NaN, is wrong.

        Each term and each partial sum of terms may be rounded to ``dtype``. Within the products
        float32 accumulation errs by the probabilistic bound of Higham and Mary (2019) with their
        factor at 2, ``eps * sqrt(k) * magnitude``, in any order of summation.
        """
        return float(np.max(np.abs(result - sum(self.terms)) / self.bound(dtype)))

    def bound(self, dtype: str) -> np.ndarray:
        steps = self.steps or len(self.terms)
        rounding = steps * (EPS[dtype] * sum(np.abs(t) for t in self.terms) + TINY[dtype]) / 2
        return rounding + EPS["float32"] * sqrt(self.k) * self.magnitude + self.inherited


@dataclass(frozen=True)
class _Matrix:
    """A weight, and the absolute values of what it is the sum of."""

    values: np.ndarray
    magnitude: np.ndarray

    @classmethod
    def of(cls, arrays: tuple[np.ndarray, ...]) -> "_Matrix":
        if len(arrays) == 1:
            w = arrays[0].astype(np.float64)
            return cls(w, np.abs(w))
        words, scales, biases = arrays
        codes = words[..., None] >> np.arange(0, 32, BITS, dtype=np.uint32) & (1 << BITS) - 1
        codes = codes.reshape(len(words), -1, GROUP_SIZE).astype(np.float64)
        scaled, shift = codes * scales[..., None], biases[..., None].astype(np.float64)
        flat = (len(words), -1)
        return cls((scaled + shift).reshape(flat), (np.abs(scaled) + np.abs(shift)).reshape(flat))


def reference(case: Case, given: Operands) -> list[Expected]:
    """Returns the outputs and, for forward + backward, the gradient of each primal."""
    x, *others = (p.astype(np.float64) for p in given.primals)
    if case.op == "norm":
        return _norm(case, x, *others, given.cotangents[0].astype(np.float64))
    segments = len(case.out_features)
    arrays = given.frozen or [(w,) for w in others[:segments]]
    weights = [_Matrix.of(a) for a in arrays]
    a, b = others[:segments], others[segments : 2 * segments]
    pairs = list(zip(a, b, strict=True)) if case.lora else []
    residual = others[-1:] if case.op == "output" else []

    outputs = []
    for i, w in enumerate(weights):
        terms = [_split(case, x @ w.values.T)]
        magnitude, k = np.abs(x) @ w.magnitude.T, case.in_features
        if pairs:
            a, b = pairs[i]
            terms.append(_split(case, SCALE * ((x @ a) @ b)))
            magnitude = magnitude + SCALE * ((np.abs(x) @ np.abs(a)) @ np.abs(b))
            k += RANK
        outputs.append(Expected([*terms, *residual], _split(case, magnitude), k))
    gradients = [g.astype(np.float64) for g in given.cotangents]
    flat = [_merge(case, g) for g in gradients]
    wrong = [np.zeros_like(g) for g in flat]
    if case.op == "gated":
        outputs, of_pre = _silu_times(*outputs, gradients[0], case.dtype)
        flat, wrong = [sum(e.terms) for e in of_pre], [e.bound(case.dtype) for e in of_pre]
    if not case.backward:
        return outputs

    terms = [g @ w.values for g, w in zip(flat, weights, strict=True)]
    # What is linear in the sizes of the cotangents is so in those of their errors too.
    both = [np.stack([np.abs(g[0]), e[0]]) for g, e in zip(flat, wrong, strict=True)]
    of_x = sum(size @ w.magnitude for size, w in zip(both, weights, strict=True))
    d_a, d_b, d_weights, rows = [], [], [], x[0]
    for g, size, (a, b) in zip(flat, both, pairs, strict=False):
        low, low_size = SCALE * (g @ b.T), SCALE * (size @ np.abs(b.T))
        terms.append(low @ a.T)
        of_x = of_x + low_size @ np.abs(a.T)
        d_a.append(_of_sizes([rows.T @ low[0]], np.abs(rows.T) @ low_size, case.rows + g.shape[-1]))
        product = SCALE * ((rows @ a).T @ g[0])
        sizes = SCALE * ((np.abs(rows) @ np.abs(a)).T @ size)
        d_b.append(_of_sizes([product], sizes, case.rows + case.in_features))
    if case.trains_weights:
        sizes = (size.swapaxes(1, 2) @ np.abs(rows) for size in both)
        d_weights = [_of_sizes([g[0].T @ rows], s, case.rows) for g, s in zip(flat, sizes, strict=True)]
    d_x = _of_sizes(terms, of_x, sum(case.out_features))
    d_residual = [Expected([g], 0.0, 0) for g in gradients[: len(residual)]]
    return [*outputs, d_x, *d_weights, *d_a, *d_b, *d_residual]


def _of_sizes(terms: list[np.ndarray], sizes: np.ndarray, k: int) -> Expected:
    return Expected(terms, sizes[0], k, sizes[1])


def _silu_times(
    gate: Expected, up: Expected, dy: np.ndarray, dtype: str
) -> tuple[list[Expected], list[Expected]]:
    """``silu(gate) * up``, and the gradients of both."""
    (g, g_error), (u, u_error) = ((sum(e.terms), e.bound(dtype)) for e in (gate, up))
    s = 1 / (1 + np.exp(-g))
    y, slope = g * s, s + g * s * (1 - s)
    y_error = (np.abs(slope) + g_error / 2) * g_error  # silu'' is at most 1/2
    out = Expected([y * u], 0.0, 0, y_error * (np.abs(u) + u_error) + np.abs(y) * u_error, steps=4)
    inherited = np.abs(dy) * ((np.abs(u) + u_error) * g_error / 2 + np.abs(slope) * u_error)
    # 1 - s is as wrong as s. Rounded are s (by an ulp), 1 - s, dy u, four products and the sum.
    d_gate = Expected([dy * u * s, dy * u * y, -dy * u * y * s], 0.0, 0, inherited, steps=9)
    return [out], [d_gate, Expected([dy * y], 0.0, 0, np.abs(dy) * y_error, steps=4)]


def _norm(case: Case, x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> list[Expected]:
    scale = 1 / np.sqrt(np.mean(x**2, -1, keepdims=True) + NORM_EPS)
    n, k, half = x * scale, case.in_features, EPS[case.dtype] / 2
    out = Expected([n * w], np.abs(n * w), k, steps=2)
    if not case.backward:
        return [out]
    g = dy * w  # and rounded
    size = scale * (np.abs(g) + np.abs(n) * np.mean(np.abs(g * n), -1, keepdims=True))
    terms = [scale * g, -scale * n * np.mean(g * n, -1, keepdims=True)]
    products = np.abs(dy * n).sum((0, 1))  # of which n and they are rounded
    d_w = Expected([(dy * n).sum((0, 1))], products, k + case.rows, 2 * half * products)
    return [out, Expected(terms, size, k, half * size), d_w]


def _split(case: Case, y: np.ndarray) -> np.ndarray:
    if case.op != "qkv":
        return y
    return y.reshape(1, case.rows, -1, case.model.head_dim).transpose(0, 2, 1, 3)


def _merge(case: Case, y: np.ndarray) -> np.ndarray:
    return y if case.op != "qkv" else y.transpose(0, 2, 1, 3).reshape(1, case.rows, -1)


def verify(case: Case, name: str, results: list[np.ndarray], expected: list[Expected]) -> float:
    """Returns a contender's largest error as a fraction of the bound.

    Raises:
        WrongResult: If any output or gradient has the wrong shape or exceeds the bound, unless it is that
            of MLX's own quantized product in 16 bits, which sums in 16 bits and does exceed it.
    """
    if [r.shape for r in results] != [e.terms[0].shape for e in expected]:
        raise WrongResult(f"{name} returns the wrong shapes for {case}: {[r.shape for r in results]}")
    worst = max(e.worst(r, case.dtype) for e, r in zip(expected, results, strict=True))
    sums_in_16_bits = name == "composed" and case.quantized and case.dtype != "float32"
    if not (worst <= 1 or (sums_in_16_bits and np.isfinite(worst))):
        raise WrongResult(f"{name} is wrong for {case}: its error is {worst:.3g} times the bound")
    return worst
