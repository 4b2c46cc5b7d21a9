"""A call of the cross entropy of a head's logits, its formula in float64, and the error that it may have."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar
from unittest.mock import patch

import mlx.core as mx
import numpy as np

import oracle
import projections
from attention import LARGEST_POWER, OWN_ROUNDINGS, SMALLEST, UNIT, lost
from call import Call
from mlx_fused import LinearOperands, _ext, fused_linear_cross_entropy
from operands import normal


@dataclass(frozen=True)
class Loss:
    head: Call  # of fused_linear; its alpha is the scale
    targets: mx.array
    mask: mx.array | None = None
    ignore_index: int | None = None
    softcap: float | None = None
    smoothing: float = 0.0

    # Blocks of logits are made by MLX's operations, which round to 16 bits the head's product, its sums with
    # the bias and an adapter's, and these times the scale; and of gradients those of each block.
    by_blocks: ClassVar[bool] = False
    roundings: ClassVar[int] = 4

    def __call__(self, **options):
        return self.of([], [], **options)

    def of(self, keys, values, **options):
        """With these values of some of the head's arrays."""
        arguments = self.head.with_leaves(dict(zip(keys, values, strict=True))).arguments
        layer = LinearOperands(**{n: arguments[n] for n in LinearOperands._fields if n in arguments})
        given = {"mask": self.mask, "ignore_index": self.ignore_index, "softcap": self.softcap}
        given |= {"scale": self.head.alpha, "label_smoothing": self.smoothing}
        return fused_linear_cross_entropy(arguments["x"], layer, self.targets, **given | options)

    def with_head(self, **changes):
        return replace(self, head=self.head.replace(**changes))

    def gradients(self, cotangent, keys=None, **options):
        """Of the head's arrays ``keys``, or of all that have one."""
        keys = self.head.trainable if keys is None else keys
        primals = [self.head.leaves[key] for key in keys]
        return mx.vjp(lambda *values: [self.of(keys, values, **options)], primals, [cotangent])[1]

    @property
    def counts(self):
        """Which rows count."""
        counts = np.ones(self.targets.shape, bool) if self.mask is None else np.array(self.mask)
        return counts if self.ignore_index is None else counts & (np.array(self.targets) != self.ignore_index)

    def formula(self, cotangent, keys):
        """The losses and the gradients of ``keys``."""
        (losses, _), (of_logits, _) = self._losses(mx.float64), self._of_sums(cotangent)
        return losses, self.head.linear_gradients(keys)((of_logits,), *self._operands)

    def check(self, losses, cotangent=None, keys=(), gradients=()):
        oracle.assert_rounded(losses, *self._losses(mx.float32))
        assert [g.dtype for g in gradients] == [self.head.leaves[key].dtype for key in keys]
        if not keys:
            return
        grads, errors = self._of_sums(cotangent)
        linear, operands = self.head.linear_gradients(keys), self._operands
        errors = linear((errors,), *oracle.magnitudes(operands))
        # That of x alone is rounded, and again when it is multiplied with the cotangent.
        options = {"terms": self.head.gradient_terms, "roundings": 2 if keys == [("x", None)] else 1}
        oracle.assert_close(gradients, linear, (grads,), *operands, errors=errors, **options)

    @cached_property
    def _operands(self):
        """The head's; of rows that do not count zeros, whatever they hold."""
        x, *others = self.head.exact_operands
        return np.where(self.counts.reshape(*x.shape[:2], 1), x, 0), *others

    @cached_property
    def _logits(self):
        """[rows, words], the sums' factors, and the errors of float32."""
        *operands, _, alpha = self._operands
        (sums,), (sizes,) = (oracle.projection(*of) for of in (operands, oracle.magnitudes(operands)))
        sums, sizes = alpha * sums, np.abs(alpha) * sizes
        error = oracle.sum_error(sizes, self.head.forward_terms, mx.float32) + 2 * UNIT * sizes
        if self.by_blocks and self.head.x.dtype.size == 2:
            error = error + oracle.rounding_error(sizes, error, self.head.x.dtype, self.roundings)
        slope, of_slope = np.ones_like(sums), np.zeros_like(sums)
        if self.softcap is not None:
            cap = np.float64(np.float32(self.softcap))
            sums = cap * np.tanh(sums / cap)
            error = error + 8 * UNIT * cap
            slope, of_slope = 1 - (sums / cap) ** 2, 2 * np.abs(sums) / cap**2 * error + 8 * UNIT
        return [a.reshape(-1, a.shape[-1]) for a in (sums, error, slope, of_slope)]

    @property
    def _places(self):
        """Of every row the target's word, of one that does not count any."""
        return np.where(self.counts, np.array(self.targets).astype(int), 0).reshape(-1, 1)

    @cached_property
    def _log_sums(self):
        logits, error, *_ = self._logits
        top = logits.max(-1, keepdims=True)
        log_sums = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
        farthest = np.minimum(top - logits.min(-1, keepdims=True), LARGEST_POWER)
        words = logits.shape[1]
        error = error.max(-1, keepdims=True) + lost(words) + UNIT * (2 * farthest + OWN_ROUNDINGS)
        return log_sums, error + UNIT * OWN_ROUNDINGS * (np.abs(top) + np.log(words))

    def _losses(self, dtype):
        logits, error, *_ = self._logits
        (log_sums, of_log_sums), smoothing = self._log_sums, self._smoothing
        losses = log_sums - (1 - smoothing) * np.take_along_axis(logits, self._places, -1)
        losses -= smoothing * logits.mean(-1, keepdims=True)
        errors = of_log_sums + error.max(-1, keepdims=True)
        errors += UNIT * OWN_ROUNDINGS * np.abs(logits).max(-1, keepdims=True)
        errors += smoothing * lost(logits.shape[1]) * np.abs(logits).mean(-1, keepdims=True)
        shape = self.targets.shape
        return [np.where(self.counts, a.reshape(shape), 0) for a in (losses, errors)]

    @property
    def _smoothing(self):
        return np.float64(np.float32(self.smoothing))

    def _of_sums(self, cotangent):
        """The gradients by the head's sums, without their scale, and their errors."""
        logits, error, slope, of_slope = self._logits
        log_sums, of_log_sums = self._log_sums
        g = np.where(self.counts, oracle.exact(cotangent), 0).reshape(-1, 1)
        p = np.exp(logits - log_sums)
        distance = np.minimum(np.abs(logits - log_sums), LARGEST_POWER)
        of_p = p * (error + of_log_sums + UNIT * (2 * distance + OWN_ROUNDINGS)) + SMALLEST
        at = np.zeros_like(p)
        np.put_along_axis(at, self._places, 1 - self._smoothing, -1)
        taken = at + self._smoothing / p.shape[1]
        d = g * (p - taken) * slope
        of_d = np.abs(g) * (of_p + 2 * UNIT * taken) * (np.abs(slope) + of_slope)
        of_d += np.abs(g * (p - taken)) * of_slope + 4 * UNIT * np.abs(d)
        if self.by_blocks and self.head.x.dtype.size == 2:
            of_d += oracle.rounding_error(d, of_d, self.head.x.dtype, self.roundings)
        elif self.head.x.dtype == mx.bfloat16:
            of_d += oracle.rounding_error(d, of_d, mx.bfloat16)
        return [a.reshape(*self.head.rows, a.shape[-1]) for a in (d, of_d)]


@contextmanager
def by_blocks(rows, words):
    """Within it losses are made as on a GPU, by blocks of so many rows and words."""
    call = partial(_ext.cross_entropy, blocks=(rows, rows * words))
    with patch.object(_ext, "cross_entropy", call), patch.object(Loss, "by_blocks", True):
        yield


def make(
    rng, rows, hidden, words, form=None, dtype=mx.float32, bias=True, rank=None, masked=None,
    scale=1.0, softcap=None, smoothing=0.0,
):  # fmt: skip
    """A call with random operands. What does not count, by "mask", "index" or both, is NaN."""
    head = projections.linear(rng, *rows, hidden, words, form, dtype, bias=bias, rank=rank)
    targets, mask, ignore_index = mx.array(rng.integers(0, words, rows)), None, None
    if masked in ("mask", "both"):
        mask = mx.array(rng.random(rows) < 0.6)
    if masked in ("index", "both"):
        ignore_index = -100
        targets = mx.where(mx.array(rng.random(rows) < 0.4), ignore_index, targets)
    loss = Loss(head.replace(alpha=scale), targets, mask, ignore_index, softcap, smoothing)
    x = mx.where(mx.array(loss.counts)[..., None], head.x, mx.array(mx.nan, dtype))
    return loss.with_head(x=x)


def check(rng, loss, keys=None, cotangent=None, **options):
    """Forward and gradients; if none are named, all of them, and x's alone, which is made another way."""
    losses = loss(**options)
    assert losses.dtype == mx.float32
    cotangent = normal(rng, losses.shape) if cotangent is None else cotangent
    for some in [loss.head.trainable, [("x", None)]] if keys is None else [keys]:
        loss.check(losses, cotangent, some, loss.gradients(cotangent, some, **options))
