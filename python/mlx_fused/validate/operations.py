"""Compares every fused operation of a patched model, and its gradients, with float64 where it runs.

Two things must stay within bounds: the error of each number, and the error of the whole result in the
direction of each of its components (projection, bias, ...), where rounding errors cancel out. The second
finds what the first cannot: in 16 bits each number is off by up to 0.4 %, which hides a small bias that is
off by 1 %.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, isnan

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

import mlx_fused
from mlx_fused.linear import LinearOperands
from mlx_fused.losses import cross_entropy_loss
from mlx_fused.patching.projections import watching
from mlx_fused.validate import attention, formulas
from mlx_fused.validate.activations import Activation
from mlx_fused.validate.attention import exact
from mlx_fused.validate.bounds import DTYPES, Comparison, compare
from mlx_fused.validate.checkpoint import batch_of, modules_of, two_rows
from mlx_fused.validate.formulas import Arithmetic, Call, Expected, Norm, Operand, Segment
from mlx_fused.validate.loss import Loss

_TF32_UNIT = 2.0**-11  # the matrix units of GPUs may round float32 operands to TF32
_INPUTS = ("input", "x")
_OPERANDS = (*_INPUTS, "residual", "q", "k", "v", "sinks")
_LABELS = {"weight": "weight", "bias": "bias", "lora_a": "A", "lora_b": "B"}


@dataclass
class Finding:
    """The result of all checks of one kind.

    Attributes:
        share: The largest error, as a share of its bound; above 1 it is not a rounding error.
        layer: The layer with that error.
        noticeable: By layer, whether the check would surely find an error of 1 %.
    """

    share: float = 0.0
    layer: str = ""
    noticeable: dict[str, bool] = field(default_factory=dict)

    def add(self, share: float, layer: str, noticeable: bool) -> None:
        if not self.layer or not share <= self.share:
            self.share, self.layer = inf if isnan(share) else share, layer
        self.noticeable[layer] = noticeable or self.noticeable.get(layer, False)

    @property
    def verdict(self) -> str:
        if self.share > 1:
            return "failed"
        return "passed" if all(self.noticeable.values()) else "inconclusive"


@dataclass
class OperationChecks:
    """A watcher of fused operations (``patching.projections.watching``) that checks each of them.

    Attributes:
        layers: The name of each patched module, by its ``id``.
        on_call: Called after each operation.
        count: How many operations were checked.
        findings: The findings by kind, for results, for gradients, and for the components of both.
    """

    layers: dict[int, str]
    on_call: Callable[[], None] = lambda: None
    count: int = 0
    findings: dict[str, dict[str, Finding]] = field(
        default_factory=lambda: {
            part: {} for part in ("results", "their components", "gradients", "components of gradients")
        }
    )

    def __call__(self, module: nn.Module, operation: Callable, arguments: dict, outputs) -> None:
        with np.errstate(invalid="ignore"):  # operands may hold NaN or infinities
            self._check(self.layers.get(id(module), "model"), operation, arguments, outputs)
        self.count += 1
        self.on_call()

    def _check(self, layer: str, operation: Callable, arguments: dict, outputs) -> None:
        # Evaluated arrays end a graph, so the graph of the outputs then holds this operation alone.
        mx.eval([a for _, a in tree_flatten(arguments) if isinstance(a, mx.array)])
        if "weight" not in arguments:
            self._check_attention(layer, operation, arguments, outputs)
            return
        if "targets" in arguments:
            self._check_loss(operation, arguments, outputs)
            return
        outputs = _listed(outputs)
        arithmetic = _arithmetic(outputs, arguments, "")
        call = read(arguments, arithmetic.composed and arguments.get("exact", False))
        given = call.x if call.residual is None else np.hstack([call.x, call.residual])
        # Equal rows have equal errors, which do not cancel out, so each row counts once.
        distinct = np.unique(given, axis=0, return_index=True)[1]
        for y, (name, expected) in zip(outputs, formulas.outputs(call, arithmetic).items(), strict=True):
            compared = compare(_rows(y), y.dtype, expected, arithmetic, distinct)
            self._add("results", "their components", name, layer, compared)

        cotangents, _, grads = _gradients(operation, arguments, outputs)
        cotangents = [_rows(g) for g in cotangents]
        segment_grads = formulas.segment_gradients(call, cotangents, arithmetic)
        arithmetic = _arithmetic(list(grads.values()), arguments, "Grad")
        self._check_gradients(layer, call, grads, segment_grads, arithmetic)
        if call.residual is not None:
            copied = formulas.copied(cotangents[0])
            self._check_gradient(layer, "residual", grads["residual", None], copied, arithmetic)

    def _check_gradients(
        self,
        layer: str,
        call: Call,
        grads: dict,
        segment_grads: list[Operand],
        arithmetic: Arithmetic,
        again: float = 0.0,
    ) -> None:
        """``again`` is the unit that the input's gradient is rounded with before it is rounded as it is."""
        named_grads = {}
        for (argument, place), grad in grads.items():
            if argument in _LABELS:
                segment = call.segments[place].name
                named_grads[argument, segment] = f"{_LABELS[argument]} of {segment}", grad
            else:
                named_grads["input" if argument in _INPUTS else argument, ""] = argument, grad
        for key, expected in formulas.gradients(call, segment_grads, arithmetic):
            if again and key[0] == "input":
                expected.add_errors(Operand(expected.value, expected.size, again * np.abs(expected.value)))
            if key in named_grads:  # a quantized weight has none, and a frozen one is not asked for
                self._check_gradient(layer, *named_grads[key], expected, arithmetic)

    def _check_attention(self, layer: str, operation: Callable, arguments: dict, output: mx.array) -> None:
        call, arithmetic = attention.read(arguments), Arithmetic(dtype=DTYPES[output.dtype])
        expected = attention.output(call)
        distinct = np.unique(expected.value, axis=0, return_index=True)[1]
        compared = compare(_rows(output), output.dtype, expected, arithmetic, distinct)
        self._add("results", "their components", "attention", layer, compared)
        # With a gradient the result of few queries may be rounded another way, and that is what is kept.
        (cotangent,), (kept,), grads = _gradients(operation, arguments, [output])
        for name, expected in attention.gradients(call, exact(cotangent), exact(kept)).items():
            self._check_gradient(layer, name, grads[name, None], expected, arithmetic)

    def _check_loss(self, operation: Callable, arguments: dict, losses: mx.array) -> None:
        arithmetic = _arithmetic([losses], arguments, "")
        call, loss = read(arguments, False), Loss.of(arguments)
        distinct = np.unique(np.hstack([call.x, loss.targets]), axis=0, return_index=True)[1]
        compared = compare(
            exact(losses).reshape(-1, 1), losses.dtype, loss.output(call, arithmetic), arithmetic, distinct
        )
        self._add("results", "their components", "loss", "the loss", compared)
        # The gradient of x alone, as of a frozen head, is made on the way, and any other by itself.
        operands, x = differentiable(arguments), ("x", None)
        for keys in {(x,), tuple(operands)}:
            function = function_of(operation, arguments, list(keys))
            # All of one size, so that rounding does not hide what few rows say.
            cotangent = mx.random.uniform(1, 2, losses.shape, losses.dtype, key=mx.random.key(0))
            _, grads = mx.vjp(function, [operands[key] for key in keys], [cotangent])
            is_frozen = not arithmetic.composed and keys == (x,) and call.segments[0].a is None
            of_logits = loss.gradient(exact(cotangent).reshape(-1, 1), call, arithmetic, is_frozen)
            found = dict(zip(keys, grads, strict=True))
            again = DTYPES[operands[x].dtype].unit if is_frozen else 0.0  # it is made before its cotangent
            self._check_gradients("the loss", call, found, [of_logits], arithmetic, again)

    def _check_gradient(
        self, layer: str, name: str, grad: mx.array, expected: Expected, arithmetic: Arithmetic
    ) -> None:
        actual = _rows(grad).reshape(expected.value.shape)
        compared = compare(actual, grad.dtype, expected, arithmetic)
        self._add("gradients", "components of gradients", name, layer, compared)

    def _add(self, whole: str, parts: str, name: str, layer: str, compared: Comparison) -> None:
        self.findings[whole].setdefault(name, Finding()).add(compared.share, layer, True)
        for component, (share, noticeable) in compared.components.items():
            kind = name if component == formulas.WHOLE else f"{component} in {name}"
            self.findings[parts].setdefault(kind, Finding()).add(share, layer, noticeable)


def check_operations(
    model: nn.Module, tokens: mx.array, on_call: Callable[[], None] = lambda: None
) -> OperationChecks:
    """Patch ``model`` and check its operations while it reads two prompts and continues one by one token, and
    its loss on the two."""
    with mlx_fused.patched(model) as report:
        modules = modules_of(model)
        checks = OperationChecks({id(modules[layer.name]): layer.name for layer in report.modules}, on_call)
        cache = make_prompt_cache(model)
        with watching(checks):
            mx.eval(model(two_rows(tokens[:-1]), cache=make_prompt_cache(model)))
        mx.eval(model(tokens[None, :-1], cache=cache))
        with watching(checks):
            mx.eval(model(tokens[None, -1:], cache=cache))

        def of_loss(module: nn.Module, operation: Callable, arguments: dict, outputs) -> None:
            if "targets" in arguments:
                checks(module, operation, arguments, outputs)

        with watching(of_loss):
            mx.eval(cross_entropy_loss(model, *batch_of(tokens)))
    return checks


def read(arguments: dict, as_mlx_lm: bool) -> Call:
    """The operands of a call, from an operation's keyword arguments; scales rounded as by mlx-lm, or not."""
    x, layers = input_of(arguments), layers_of(arguments)
    segments = []
    for name, layer in zip(segment_names(arguments), layers, strict=True):
        if layer.scales is None:
            weight = exact(layer.weight)
            magnitude = np.abs(weight)
        else:
            form = layer.group_size, layer.bits, layer.mode
            weight, magnitude = dequantized(layer.weight, layer.scales, layer.biases, *form)
        # mlx-lm's modules multiply by the scale in the dtype of x A.
        dtype = mx.result_type(x, layer.lora_a) if as_mlx_lm and layer.lora_a is not None else mx.float32
        b, a, low = (None if m is None else exact(m) for m in (layer.bias, layer.lora_a, layer.lora_b))
        scale = mx.array(layer.lora_scale, dtype).item()
        segments.append(Segment(name, weight, magnitude, b, a, low, scale))
    residual = arguments.get("residual")
    activation = _activation(arguments)
    alpha = 1.0 if activation else _float32(arguments.get("alpha", 1.0))
    norm = None
    if given := arguments.get("norm"):
        norm = Norm(None if given[0] is None else exact(given[0]), _float32(given[1]))
    residual = None if residual is None else _rows(residual)
    return Call(_rows(x), tuple(segments), residual, alpha, norm, activation)


def _activation(arguments: dict) -> Activation | None:
    name, gated, packed = arguments.get("activation"), is_gated(arguments), len(layers_of(arguments)) == 1
    if name is None:
        return None
    packing = arguments["packing"] if gated and packed else None
    numbers = (1.702, 7.0) if name == "clipped_swiglu" else (1.0, inf)
    alpha, limit = (arguments.get(n, d) for n, d in zip(("alpha", "limit"), numbers, strict=True))
    return Activation(name, gated, packing, _float32(alpha), _float32(limit))


def _float32(number: float) -> float:
    return float(np.float32(number))


def is_gated(arguments: dict) -> bool:
    return len(layers_of(arguments)) == 2 or "packing" in arguments


def segment_names(arguments: dict) -> tuple[str, ...]:
    """Of the layers among the arguments by name that an operation takes."""
    count = len(layers_of(arguments))
    if count > 1:
        return ("q", "k", "v") if count == 3 else ("gate", "up")
    if "targets" in arguments:
        return ("logits",)
    return ("o",) if "residual" in arguments else ("gate and up",) if is_gated(arguments) else ("y",)


def input_of(arguments: dict) -> mx.array:
    """The input among the arguments by name that an operation takes."""
    return next(arguments[name] for name in _INPUTS if name in arguments)


def layers_of(arguments: dict) -> tuple[LinearOperands, ...]:
    """The layers among the arguments by name that an operation takes."""
    weight = arguments.get("weight", ())
    return (weight,) if isinstance(weight, LinearOperands) else weight


def with_layers(arguments: dict, layers: list[LinearOperands]) -> dict:
    """The arguments with other layers, if they have any."""
    if not layers:
        return arguments
    return arguments | {"weight": tuple(layers) if len(layers) > 1 else layers[0]}


def dequantized(
    weight: mx.array, scales: mx.array, biases: mx.array | None, group_size: int, bits: int, mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """The exact values of a quantized weight, and the sums of the magnitudes of their terms."""
    if biases is None:
        values = exact(mx.dequantize(weight, scales, None, group_size, bits, mode, dtype=mx.float32))
        return values, np.abs(values)
    ones = mx.ones(scales.shape, mx.float32)
    codes = exact(mx.dequantize(weight, ones, mx.zeros_like(ones), group_size, bits, mode))
    scaled = codes * np.repeat(exact(scales), group_size, -1)
    shift = np.repeat(exact(biases), group_size, -1)
    return scaled + shift, np.abs(scaled) + np.abs(shift)


def _rows(array: mx.array) -> np.ndarray:
    """``array`` in float64; activations as a matrix of rows."""
    values = exact(array)
    return values.reshape(-1, values.shape[-1]) if values.ndim > 2 else values


def _listed(value) -> list:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _gradients(operation: Callable, arguments: dict, outputs: list[mx.array]):
    """Random cotangents of the outputs, these, and the gradients of the operands that may have one."""
    operands = differentiable(arguments)
    cotangents = [mx.random.normal(y.shape, y.dtype, key=mx.random.key(i)) for i, y in enumerate(outputs)]
    function = function_of(operation, arguments, list(operands))
    results, grads = mx.vjp(function, list(operands.values()), cotangents)
    return cotangents, results, dict(zip(operands, grads, strict=True))


def _arithmetic(results: list[mx.array], arguments: dict, primitive: str) -> Arithmetic:
    """The arithmetic of ``results``; their graph shows whether our primitive or MLX's own computes them."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *results)
    # The activation may be ours where the products are not.
    composed = re.search(rf'label ="Fused(?!Activation)\w+{primitive}"', dot.getvalue()) is None
    x, layers = input_of(arguments), layers_of(arguments)
    gpu, quantized = mx.default_device() == mx.gpu, layers[0].scales is not None
    unit = DTYPES[x.dtype].unit
    sum_unit = DTYPES[mx.float32].unit
    if composed and quantized and not gpu:
        sum_unit = unit  # MLX's quantized_matmul on CPUs sums in the activations' dtype
    elif composed and gpu:
        sum_unit = max(sum_unit, _TF32_UNIT if x.dtype == mx.float32 else 0.0)
    adapters = [layer.lora_a for layer in layers if layer.lora_a is not None]
    low_rank = max((DTYPES[mx.result_type(x, a)].unit for a in adapters), default=0.0)
    return Arithmetic(
        sum_unit,
        weight_unit=unit if gpu and quantized and x.dtype != mx.float32 else 0.0,
        low_rank_unit=low_rank if composed else 0.0,
        composed=composed,
        dtype=DTYPES[results[0].dtype],
    )


def differentiable(arguments: dict) -> dict[tuple[str, int | None], mx.array]:
    """The operands that may have a gradient, by name and, for a layer's operands, the layer's index."""
    found = {(n, None): arguments[n] for n in _OPERANDS if arguments.get(n) is not None}
    if arguments.get("norm") and arguments["norm"][0] is not None:
        found["norm", None] = arguments["norm"][0]
    for place, layer in enumerate(layers_of(arguments)):
        frozen = ("scales", "biases") if layer.scales is None else ("weight", "scales", "biases")
        for name, value in layer._asdict().items():
            if isinstance(value, mx.array) and name not in frozen:
                found[name, place] = value
    return found


def function_of(operation: Callable, arguments: dict, keys: list[tuple[str, int | None]]) -> Callable:
    """``operation`` as a function of the operands ``keys``."""

    def function(*values: mx.array):
        changed, layers = dict(arguments), list(layers_of(arguments))
        for (name, place), value in zip(keys, values, strict=True):
            if place is None:
                changed[name] = (value, arguments["norm"][1]) if name == "norm" else value
            else:
                layers[place] = layers[place]._replace(**{name: value})
        return operation(**with_layers(changed, layers))

    return function
