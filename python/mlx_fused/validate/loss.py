"""The loss of a head and its gradients in NumPy float64, with the rounding errors to expect.

A loss is a function of its row's logits, so their errors become its own by its slope. What is its own are the
errors of exponentials, their sum and its logarithm. From bfloat16 the gradients of logits are rounded to
bfloat16, for the products that take pairs of them.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_fused.validate.attention import lost
from mlx_fused.validate.bounds import DTYPES
from mlx_fused.validate.formulas import FLOAT32, Arithmetic, Call, Expected, Operand, outputs

_OWN = 8  # units of a float32 that an exponential, a logarithm, tanh and some products may be off


class Loss(NamedTuple):
    """What is asked of each row's logits, ``softcap * tanh(scale * y / softcap)``.

    Attributes:
        targets (numpy.ndarray): ``[rows, 1]``.
        counts (numpy.ndarray): ``[rows, 1]``, whether the row counts.
        scale (float): What a head's outputs are multiplied with.
        softcap (float, optional): What they stay within.
        unit (float): The unit roundoff that gradients of logits are rounded with, 0 if they are not.
    """

    targets: np.ndarray
    counts: np.ndarray
    scale: float
    softcap: float | None
    unit: float

    @classmethod
    def of(cls, arguments: dict) -> Loss:
        """From the operation's keyword arguments."""
        x, mask, softcap = (arguments[name] for name in ("x", "mask", "softcap"))
        unit = DTYPES[x.dtype].unit if x.dtype == mx.bfloat16 else 0.0
        softcap = None if softcap is None else float(np.float32(softcap))
        rows = (np.array(a).reshape(-1, 1) for a in (arguments["targets"], mask))
        return cls(*rows, float(np.float32(arguments["scale"])), softcap, unit)

    def output(self, call: Call, arithmetic: Arithmetic) -> Expected:
        """The loss of each row, ``[rows, 1]``."""
        at = _Softmax(self, call, arithmetic)
        slope = self.counts * at.slope

        def summed(values: np.ndarray) -> np.ndarray:
            return values.sum(-1, keepdims=True)

        found = at.y.through(
            lambda c: summed(slope * c), lambda m: summed(np.abs(slope) * m), lambda d: slope * d
        )
        # Of the components a loss is no sum: only whether each of them is right can be told by them.
        found.activated = self.counts * at.loss
        own = at.off + FLOAT32 * (_OWN * np.abs(at.total) + np.abs(at.of_target))
        found.steady = found.steady + self.counts * own
        if arithmetic.composed:
            found.add_errors(Operand(slope, np.abs(slope), arithmetic.unit * np.abs(slope * at.y.value)))
        return found

    def gradient(self, cotangent: np.ndarray, call: Call, arithmetic: Arithmetic, is_frozen: bool) -> Operand:
        """The gradients of the head's outputs, from those of the losses, ``[rows, 1]``.

        A frozen head adds the target's row of its weight itself, unrounded.
        """
        at = _Softmax(self, call, arithmetic)
        ct = np.abs(self.counts * cotangent)
        value = self.counts * cotangent * at.slope
        errors = at.y.spread(arithmetic)
        if arithmetic.composed:
            errors = np.hypot(errors, arithmetic.unit * np.abs(at.y.value))
        # Those of the logits are in every p of their row, and in the softcap's slope.
        of_logits = at.bend * errors
        of_p = at.p * (of_logits + np.sqrt((at.p**2 * of_logits**2).sum(-1, keepdims=True)))
        own = ct * (at.bend * of_p + np.abs(at.p - at.hot) * at.bend_slope * errors)
        rounded = max(self.unit, arithmetic.unit if arithmetic.composed else 0.0)
        multiplied = at.p if is_frozen else np.abs(at.p - at.hot)
        spread = np.hypot(own, rounded * ct * at.bend * multiplied)
        steady = ct * at.bend * (at.p * at.off + _OWN * FLOAT32 * (at.p + at.hot))
        return Operand(value, np.abs(value), spread, steady)


class _Softmax:
    """Of the rows' logits."""

    def __init__(self, loss: Loss, call: Call, arithmetic: Arithmetic):
        (self.y,) = outputs(call, arithmetic).values()
        z = loss.scale * self.y.value
        self.bend, self.bend_slope = np.full_like(z, abs(loss.scale)), 0.0
        if loss.softcap is not None:
            t = np.tanh(z / loss.softcap)
            z, self.bend = loss.softcap * t, self.bend * (1 - t**2)
            self.bend_slope = 2 * np.abs(t) * self.bend * abs(loss.scale) / loss.softcap
        top = z.max(-1, keepdims=True)
        powers = np.exp(z - top)
        total = powers.sum(-1, keepdims=True)
        self.p, self.total = powers / total, top + np.log(total)
        self.hot = np.zeros_like(z)
        # A row that does not count may have any target.
        targets = np.where(loss.counts, loss.targets, 0)
        np.put_along_axis(self.hot, targets, 1.0, -1)
        self.of_target = np.take_along_axis(z, targets, -1)
        self.loss = self.total - self.of_target
        self.slope = np.sign(loss.scale) * self.bend * (self.p - self.hot)
        # Of a sum of exponentials, relative to it: also what rounding its exponents does.
        exponents = np.abs(z) + np.abs(top)
        self.off = lost(z.shape[-1]) + FLOAT32 * (_OWN + (self.p * exponents).sum(-1, keepdims=True))
