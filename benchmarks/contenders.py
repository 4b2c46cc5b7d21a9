"""The contenders that run a case."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from math import ceil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

import mlx_fused
from cases import BITS, GROUP_SIZE, NORM_EPS, RANK, SCALE, Case, Operands
from machine import cores
from mlx_fused import LinearOperands
from mlx_fused.tuning.measure import chain

Frozen = list[tuple[mx.array, ...]]


def _fused(case: Case, x: mx.array, frozen: Frozen, *others: mx.array, **options: str) -> Sequence[mx.array]:
    if case.op == "norm":
        return [mlx_fused.fused_rms_norm(x, *others, NORM_EPS)]
    m, count = case.model, len(case.out_features)
    if case.quantized:
        form = {"group_size": GROUP_SIZE, "bits": BITS}
        layers = [LinearOperands(w, None, scales, biases, **form) for w, scales, biases in frozen]
    else:
        weights = [w for (w,) in frozen] or others[:count]
        layers = [LinearOperands(w) for w in weights]
    if case.lora:
        adapters = zip(layers, others[:count], others[count : 2 * count], strict=True)
        layers = [of._replace(lora_a=a, lora_b=b, lora_scale=SCALE) for of, a, b in adapters]
    if case.op == "output":
        (layer,) = layers
        return [mlx_fused.fused_output_projection_residual(x, layer, residual=others[-1], **options)]
    if case.op == "gated":
        return [mlx_fused.fused_gated_projection(x, tuple(layers), **options)]
    if case.op == "head":
        return [mlx_fused.fused_linear(x, *layers, **options)]
    heads = m.num_heads, m.num_kv_heads, m.head_dim
    return mlx_fused.fused_qkv_projection(x, tuple(layers), None, *heads, **options)


def _composed(case: Case, x: mx.array, frozen: Frozen, *others: mx.array) -> Sequence[mx.array]:
    if case.op == "norm":
        return [mx.fast.rms_norm(x, *others, NORM_EPS)]
    count = len(case.out_features)
    if case.lora:
        adapters = zip(frozen, others[:count], others[count : 2 * count], strict=True)
        products = [_lora_linear(case, *arrays)(x) for arrays in adapters]
    elif case.quantized:
        products = [mx.quantized_matmul(x, *w, group_size=GROUP_SIZE, bits=BITS) for w in frozen]
    else:
        products = [x @ w.T for w in others[:count]]
    if case.op == "output":
        return [products[0] + others[-1]]
    if case.op == "gated":
        return [nn.silu(products[0]) * products[1]]
    if case.op == "head":
        return products
    return [
        y.reshape(1, case.rows, heads, -1).transpose(0, 2, 1, 3)
        for y, heads in zip(products, case.model.heads, strict=True)
    ]


def _lora_linear(case: Case, arrays: tuple[mx.array, ...], a: mx.array, b: mx.array) -> Callable:
    """mlx-lm's own layer."""
    from mlx_lm.tuner.lora import LoRALinear

    layer = LoRALinear(1, 1, r=RANK, scale=SCALE)
    base = layer.linear
    if case.quantized:
        base = nn.QuantizedLinear(GROUP_SIZE, 1, bias=False, group_size=GROUP_SIZE, bits=BITS)
    for name, array in zip(("weight", "scales", "biases"), arrays, strict=False):
        base[name] = array
    layer.linear, layer.lora_a, layer.lora_b = base, a, b
    return layer


def _addmm(case: Case, x: mx.array, frozen: Frozen, *others: mx.array) -> Sequence[mx.array]:
    w, residual = others
    return [mx.addmm(residual, x, w.T)]


class MLX:
    """Runs a function of MLX arrays, forward or with the gradients of all its primals.

    Each call takes the next of several copies of the weights, so that no cache holds them.
    """

    def __init__(self, function: Callable, case: Case, given: Operands, rotated: int) -> None:
        dtype = getattr(mx, case.dtype)
        # Adapters are float32 whatever the dtype, as mlx-lm has them.
        trained = mx.float32 if case.lora else dtype
        weights, rest = _split(case, given.primals[1:])
        self.x = mx.array(given.primals[0]).astype(dtype)
        weights = [mx.array(w).astype(trained) for w in weights]
        rest = [mx.array(r).astype(dtype) for r in rest]
        self.cotangents = [mx.array(g).astype(dtype) for g in given.cotangents]
        frozen = [tuple(_array(a, dtype) for a in arrays) for arrays in given.frozen]
        copies = _copies(rotated, sum(a.nbytes for _, a in tree_flatten((frozen, weights))))
        # A sum is a new array, of whatever dtype.
        made = [tree_map(lambda a: a + mx.zeros((), a.dtype), (frozen, weights)) for _ in range(copies)]
        mx.eval(self.x, rest, self.cotangents, made)
        self.others = cycle([(frozen, *weights, *rest) for frozen, weights in made])
        self.function = partial(function, case)
        self.backward = case.backward
        # Adapters are what mlx-lm trains, and its training step is compiled.
        self._run = mx.compile(self._results) if case.lora else self._results

    def __call__(self) -> list[mx.array]:
        results = self._run(self.x, *next(self.others))
        mx.eval(results)
        mx.synchronize()
        return results

    def chain(self, length: int) -> None:
        """Runs ``length`` calls one after another."""
        chain(self._run, self.x, islice(self.others, length))

    def _results(self, x: mx.array, frozen: Frozen, *others: mx.array) -> list[mx.array]:
        if not self.backward:
            return list(self.function(x, frozen, *others))

        def function(x: mx.array, *others: mx.array) -> Sequence[mx.array]:
            return self.function(x, frozen, *others)

        # The gradients do not need the outputs: only evaluating both is forward + backward.
        outputs, gradients = mx.vjp(function, [x, *others], self.cotangents)
        return [*outputs, *gradients]

    @staticmethod
    def to_numpy(result: mx.array) -> np.ndarray:
        return np.array(result.astype(mx.float32))


def _array(values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Codes stay integers."""
    a = mx.array(values)
    return a if a.dtype == mx.uint32 else a.astype(dtype)


def _split(case: Case, others: list) -> tuple[list, list]:
    """The trained weights or adapters, and the residual."""
    count = len(others) - (case.op == "output")
    return others[:count], others[count:]


def _copies(rotated: int, size: int) -> int:
    return max(2, ceil(rotated / size))


class Torch:
    """The composed form in torch, on all cores; its weights rotate too."""

    def __init__(self, case: Case, given: Operands, rotated: int) -> None:
        import torch

        torch.set_num_threads(cores())
        dtype = getattr(torch, case.dtype)
        self.case, self.torch = case, torch

        def tensors(arrays: list[np.ndarray]) -> list:
            return [torch.from_numpy(a).to(dtype, copy=True).requires_grad_(case.backward) for a in arrays]

        weights, rest = _split(case, given.primals[1:])
        x, rest = tensors(given.primals[:1]), tensors(rest)
        size = sum(w.size for w in weights) * dtype.itemsize
        sets = [[*x, *tensors(weights), *rest] for _ in range(_copies(rotated, size))]
        self.primals, self._sets = sets[0], cycle(sets)
        self.cotangents = [torch.from_numpy(x).to(dtype) for x in given.cotangents]

    def _forward(self) -> list:
        functional = self.torch.nn.functional
        linear = functional.linear
        if self.case.op == "output":
            x, w, residual = self.primals
            return [linear(x, w) + residual]
        x, *weights = self.primals
        if self.case.op == "norm":
            return [functional.rms_norm(x, x.shape[-1:], *weights, NORM_EPS)]
        if self.case.op == "gated":
            gate, up = weights
            return [functional.silu(linear(x, gate)) * linear(x, up)]
        if self.case.op == "head":
            return [linear(x, *weights)]
        return [
            linear(x, w).view(1, self.case.rows, heads, -1).transpose(1, 2)
            for w, heads in zip(weights, self.case.model.heads, strict=True)
        ]

    def __call__(self) -> list:
        self.primals = next(self._sets)
        outputs = self._forward()
        if not self.case.backward:
            return outputs
        return [*outputs, *self.torch.autograd.grad(outputs, self.primals, self.cotangents)]

    @staticmethod
    def to_numpy(result) -> np.ndarray:
        return result.detach().float().numpy()


def contenders(
    case: Case, given: Operands, torch: bool, rotated: int, gpu: bool = False
) -> dict[str, MLX | Torch]:
    """Returns the contenders of one case by name, in the order in which they take turns.

    On a GPU ``fused`` is what our kernels do, and ``routed`` what a user gets. Each rotates weights of
    ``rotated`` bytes.
    """
    functions: dict[str, Callable] = {"fused": _fused, "composed": _composed}
    if case.op == "norm":
        rotated, gpu = 0, False  # its weight is small, and it has no route
    if gpu:
        functions = {"fused": partial(_fused, route="fused"), "routed": _fused, "composed": _composed}
        if case.op == "output" and case.trains_weights:
            functions["addmm"] = _addmm
    found: dict[str, MLX | Torch] = {name: MLX(f, case, given, rotated) for name, f in functions.items()}
    if torch and case.trains_weights:
        found["torch"] = Torch(case, given, rotated)
    return found
