"""The contenders that run a case."""

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np

import mlx_fused
from cases import BITS, GROUP_SIZE, RANK, SCALE, Case, Operands
from machine import cores
from mlx_fused import LinearOperands

Frozen = list[tuple[mx.array, ...]]


def _fused(case: Case, frozen: Frozen, *primals: mx.array, **options: str) -> Sequence[mx.array]:
    x, *others = primals
    m = case.model
    if case.quantized:
        form = {"group_size": GROUP_SIZE, "bits": BITS}
        layers = [LinearOperands(w, None, scales, biases, **form) for w, scales, biases in frozen]
    else:
        weights = [w for (w,) in frozen] or others[: len(case.out_features)]
        layers = [LinearOperands(w) for w in weights]
    if case.lora:
        adapters = zip(layers, others[:3], others[3:], strict=True)
        layers = [of._replace(lora_a=a, lora_b=b, lora_scale=SCALE) for of, a, b in adapters]
    if case.op == "output":
        (layer,) = layers
        return [mlx_fused.fused_output_projection_residual(x, layer, residual=others[-1], **options)]
    heads = m.num_heads, m.num_kv_heads, m.head_dim
    return mlx_fused.fused_qkv_projection(x, tuple(layers), None, *heads, **options)


def _composed(case: Case, frozen: Frozen, *primals: mx.array) -> Sequence[mx.array]:
    x, *others = primals
    if case.lora:
        adapters = zip(frozen, others[:3], others[3:], strict=True)
        products = [_lora_linear(case, *arrays)(x) for arrays in adapters]
    elif case.quantized:
        products = [mx.quantized_matmul(x, *w, group_size=GROUP_SIZE, bits=BITS) for w in frozen]
    else:
        products = [x @ w.T for w in others[: len(case.out_features)]]
    if case.op == "output":
        return [products[0] + others[-1]]
    return [
        y.reshape(1, case.rows, heads, -1).transpose(0, 2, 1, 3)
        for y, heads in zip(products, case.model.heads, strict=True)
    ]


def _lora_linear(case: Case, arrays: tuple[mx.array, ...], a: mx.array, b: mx.array) -> Callable:
    """mlx-lm's own layer."""
    import mlx.nn as nn
    from mlx_lm.tuner.lora import LoRALinear

    layer = LoRALinear(1, 1, r=RANK, scale=SCALE)
    base = layer.linear
    if case.quantized:
        base = nn.QuantizedLinear(GROUP_SIZE, 1, bias=False, group_size=GROUP_SIZE, bits=BITS)
    for name, array in zip(("weight", "scales", "biases"), arrays, strict=False):
        base[name] = array
    layer.linear, layer.lora_a, layer.lora_b = base, a, b
    return layer


def _addmm(case: Case, frozen: Frozen, *primals: mx.array) -> Sequence[mx.array]:
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
    """Runs a function of MLX arrays, forward or with the gradients of all its primals."""

    def __init__(self, function: Callable, case: Case, given: Operands) -> None:
        dtype = getattr(mx, case.dtype)
        count = len(given.primals)
        # Adapters are float32 whatever the dtype, as mlx-lm has them.
        dtypes = [mx.float32 if case.lora and i > 0 else dtype for i in range(count)]
        self.primals = [mx.array(x).astype(t) for x, t in zip(given.primals, dtypes, strict=True)]
        self.cotangents = [mx.array(x).astype(dtype) for x in given.cotangents]
        frozen = [tuple(_array(a, dtype) for a in arrays) for arrays in given.frozen]
        mx.eval(self.primals, self.cotangents, frozen)
        self.function = partial(function, case, frozen)
        self.backward = case.backward
        # Adapters are what mlx-lm trains, and its training step is compiled.
        self._run = mx.compile(self._results) if case.lora else self._results

    def __call__(self) -> list[mx.array]:
        results = self._run(*self.primals)
        mx.eval(results)
        mx.synchronize()
        return results

    def chain(self, length: int) -> None:
        """Runs ``length`` calls one after another."""
        chain(self._run, self.primals, length)

    def _results(self, *primals: mx.array) -> list[mx.array]:
        if not self.backward:
            return list(self.function(*primals))
        # The gradients do not need the outputs: only evaluating both is forward + backward.
        outputs, gradients = mx.vjp(self.function, list(primals), self.cotangents)
        return [*outputs, *gradients]

    @staticmethod
    def to_numpy(result: mx.array) -> np.ndarray:
        return np.array(result.astype(mx.float32))


def _array(values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Codes stay integers."""
    a = mx.array(values)
    return a if a.dtype == mx.uint32 else a.astype(dtype)


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
        if case.op == "output" and case.trains_weights:
            functions["addmm"] = _addmm
    found: dict[str, MLX | Torch] = {name: MLX(f, case, given) for name, f in functions.items()}
    if torch and case.trains_weights:
        found["torch"] = Torch(case, given)
    return found
