"""Stacks of MLX's transforms over a call, and over the same call written in elementwise MLX operations.

Those operations have no matrix products, whose transforms are what is in question. All of a call is a
polynomial with positive coefficients of its arrays (and alpha and scale), and so is what the transforms make
of it: at the arrays' absolute values it is the sum of its terms' sizes, which bounds the error. An activation
is bounded by a polynomial.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import oracle
import quantized


def reference(call, keys, magnitudes=False):
    """The call as a function of some of its arrays; for magnitudes everything else is made positive."""
    size = mx.abs if magnitudes else lambda a: a
    a = call.arguments

    def function(*values):
        leaves = {key: wide(leaf) for key, leaf in call.leaves.items()}
        if magnitudes:
            leaves = {key: positive(leaf) for key, leaf in leaves.items()}
        leaves |= dict(zip(keys, map(wide, values), strict=True))

        now = call.with_leaves(leaves)
        scales = np.broadcast_to(np.float32(a.get("lora_scale", 1.0)), len(call.features)).tolist()
        names = ("weight", "scales", "biases", "bias", "lora_a", "lora_b")
        rows = zip(scales, *map(now.parts, names), strict=True)
        outputs = []
        for scale, w, group_scales, group_biases, bias, lora_a, lora_b in rows:
            if call.quantization:
                w = size(dequantized(w, group_scales, group_biases, *call.quantization))
            y = times(now.x, w.T)
            y = y if bias is None else y + bias
            if lora_a is not None:
                y = y + size(mx.array(scale, mx.float64)) * times(times(now.x, lora_a), lora_b)
            outputs.append(y)
        if call.activation:
            return (activated(call.activation, outputs, magnitudes),)
        if call.segments is None:
            alpha = size(mx.array(float(np.float32(call.alpha)), mx.float64))
            y = alpha * outputs[0]
            return (leaves["residual", None] + y if ("residual", None) in leaves else y,)
        if not a.get("split_heads", True):
            return tuple(outputs)
        split = (y.reshape(*y.shape[:2], *heads) for y, heads in zip(outputs, call.segments, strict=True))
        return tuple(y.swapaxes(1, 2) for y in split)

    return function


CODES = (mx.uint32, mx.uint8)


def wide(a):
    return a if a.dtype in CODES else a.astype(mx.float64)


def positive(a):
    return a if a.dtype in CODES else mx.abs(wide(a))


def activated(activation, pre, magnitudes):
    """In MLX's own elementwise operations; or a polynomial whose every derivative is larger."""
    y, *up = pre
    if magnitudes:
        y = y + y * y + y * y * y
        return y * (up[0] + activation.clipped) if up else y
    if activation.clipped:
        alpha, limit = float(activation.alpha), float(activation.limit)
        y, up = mx.minimum(y, limit), [mx.clip(up[0], -limit, limit) + 1]
        y = y * mx.sigmoid(alpha * y)
    elif activation.name == "gelu_approx":  # with MLX's tanh, second derivatives are NaN far from 0
        y = y * mx.sigmoid(float((8 / np.pi) ** 0.5) * (y + 0.044715 * y * y * y))
    elif activation.name == "relu2":
        y = mx.square(mx.maximum(y, 0))
    else:
        y = getattr(nn, activation.name)(y)
    return y * up[0] if up else y


def times(a, b):
    return (a[..., None] * b).sum(-2)


def dequantized(words, scales, biases, group_size, bits, mode):
    """With slopes in scales and biases."""
    powers = mx.array(2 ** np.arange(32, dtype=np.uint32))
    stream = words[..., None] // powers % 2  # MLX maps these right, but not its bitwise operations
    codes = (stream.reshape(*words.shape[:-1], -1, bits) * powers[:bits]).sum(-1)
    if mode == "affine":
        values = codes.astype(mx.float64)
    else:
        values = take(quantized.e2m1 if bits == 4 else quantized.e4m3, codes)
        scales = take(quantized.e4m3 if mode == "nvfp4" else quantized.e8m0, scales)
    groups = values.reshape(*scales.shape, group_size) * scales[..., None]
    return (groups if biases is None else groups + biases[..., None]).reshape(codes.shape)


def take(decode, codes):
    return mx.array(decode(np.arange(256 if decode is not quantized.e2m1 else 16)), mx.float64)[codes]


class Stack:
    """A function and its arguments, transformed step by step; what it is of is said by name at the end."""

    def __init__(self, args, rng):
        self.args, self.rng, self.steps = list(args), rng, []

    def vmap(self, axes):
        """Over two examples of every argument that has an axis and not None."""
        self.args = [
            a if axis is None else mx.stack([a, self._other(a)], axis)
            for a, axis in zip(self.args, axes, strict=True)
        ]
        self.steps.append(lambda f, axes=tuple(axes): mx.vmap(f, in_axes=axes))

    def grad(self, argnums):
        """Of the outputs' sum of squares."""

        def step(f):
            gradient = mx.grad(lambda *a: sum((y * y).sum() for y in f(*a)), argnums=argnums)
            return lambda *a: tuple(gradient(*a))

        self.steps.append(step)

    def jvp(self, argnums):
        """The tangents are further arguments, behind all others."""
        count = len(self.args)

        def step(f):
            def tangents_out(*args):
                def g(*varied):
                    full = list(args[:count])
                    for i, a in zip(argnums, varied, strict=True):
                        full[i] = a
                    return f(*full)

                return tuple(mx.jvp(g, [args[i] for i in argnums], list(args[count:]))[1])

            return tangents_out

        self.args += [self._other(self.args[i]) for i in argnums]
        self.steps.append(step)

    def compile(self):
        self.steps.append(mx.compile)

    def checkpoint(self):
        self.steps.append(mx.checkpoint)

    def differentiable(self):
        return [i for i, a in enumerate(self.args) if a.dtype not in CODES]

    def of(self, function):
        for step in self.steps:
            function = step(function)
        return function

    def check(self, call, keys):
        """The stack over the call against the stack over its reference."""
        outputs = self.of(call.function(keys))(*self.args)
        expected = self.of(reference(call, keys))(*map(wide, self.args))
        magnitudes = self.magnitudes(call, keys, [positive(a) for a in self.args])
        oracle.assert_near(outputs, expected, magnitudes, self.terms(call))

    def magnitudes(self, call, keys, sizes):
        return self.of(reference(call, keys, magnitudes=True))(*sizes)

    def terms(self, call):
        """Each transform at most doubles the products on the way to a result; a square is one as well."""
        return 2 ** len(self.steps) * (call.forward_terms + call.gradient_terms)

    def _other(self, a):
        if a.dtype == mx.uint8:
            return a
        if a.dtype == mx.uint32:
            return a[::-1]
        return mx.array(self.rng.standard_normal(a.shape), dtype=mx.float64).astype(a.dtype, stream=mx.cpu)
