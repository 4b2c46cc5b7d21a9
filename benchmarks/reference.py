"""The float64 reference that every contender must match."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from cases import BITS, GROUP_SIZE, RANK, SCALE, Case, Operands

# Spacing of each dtype's numbers at 1, and at 0 (the smallest subnormal); rounding errs by half.
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TINY = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


class WrongResult(Exception):
    """A contender disagrees with the float64 reference."""


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
    if not case.backward:
        return outputs

    gradients = [g.astype(np.float64) for g in given.cotangents]
    flat = [_merge(case, g) for g in gradients]
    terms = [g @ w.values for g, w in zip(flat, weights, strict=True)]
    magnitude = sum(np.abs(g) @ w.magnitude for g, w in zip(flat, weights, strict=True))
    d_a, d_b = [], []
    rows = x[0]
    for g, (a, b) in zip(flat, pairs, strict=bool(pairs)):
        low, low_magnitude = SCALE * (g @ b.T), SCALE * (np.abs(g) @ np.abs(b.T))
        terms.append(low @ a.T)
        magnitude = magnitude + low_magnitude @ np.abs(a.T)
        k = case.rows + g.shape[-1]
        d_a.append(Expected([rows.T @ low[0]], np.abs(rows.T) @ low_magnitude[0], k))
        product = SCALE * ((rows @ a).T @ g[0])
        k = case.rows + case.in_features
        d_b.append(Expected([product], SCALE * ((np.abs(rows) @ np.abs(a)).T @ np.abs(g[0])), k))
    d_x = Expected(terms, magnitude, sum(case.out_features))
    d_weights = []
    if case.trains_weights:
        d_weights = [Expected([g[0].T @ rows], np.abs(g[0].T) @ np.abs(rows), case.rows) for g in flat]
    d_residual = [Expected([g], 0.0, 0) for g in gradients[: len(residual)]]
    return [*outputs, d_x, *d_weights, *d_a, *d_b, *d_residual]


def _split(case: Case, y: np.ndarray) -> np.ndarray:
    if case.op == "output":
        return y
    return y.reshape(1, case.rows, -1, case.model.head_dim).transpose(0, 2, 1, 3)


def _merge(case: Case, y: np.ndarray) -> np.ndarray:
    return y if case.op == "output" else y.transpose(0, 2, 1, 3).reshape(1, case.rows, -1)


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
