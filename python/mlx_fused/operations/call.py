"""What the operations share: their arguments as a call of the extension."""

from __future__ import annotations

from typing import Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mlx_fused import _ext
from mlx_fused.linear import LinearOperands

Route: TypeAlias = Literal["composed", "fused"] | None
Stream: TypeAlias = mx.Stream | mx.Device | mx.DeviceType | None
Norm: TypeAlias = tuple[mx.array | None, float] | None
_ARRAY = mx.array


def operation_of(
    name: str, node: str, input: str, segments, exact, route, activation=None, packing="in_order"
) -> _ext.Operation:
    """An operation without its arrays. ``segments`` are the features and heads of each output."""
    try:
        if activation and _ARRAY in map(type, activation[2:]):
            raise TypeError
        return _ext.Operation(name, node, input, segments, activation, packing, exact, route)
    except TypeError:
        alpha, limit = activation[2:] if activation else (1.0, 0.0)
        check_kinds(name, {"alpha": alpha, "limit": limit, "exact": exact, "route": route}, [])
        raise


def project(
    operation: _ext.Operation, x, layers, stream, residual=None, alpha=1.0, norm=None
) -> list[mx.array]:
    try:
        # The extension would take an array for a number, and its gradient would be lost.
        if type(alpha) is _ARRAY or (type(norm) in (tuple, list) and _ARRAY in map(type, norm[1:])):
            raise TypeError
        for layer in layers:
            if type(layer.lora_scale) is _ARRAY:
                raise TypeError
        return _ext.project(operation, x, norm, layers, residual, alpha, stream)
    except TypeError:
        name = operation.name
        if norm is not None and (type(norm) not in (tuple, list) or len(norm) != 2):
            got = type(norm).__name__ if type(norm) not in (tuple, list) else f"{len(norm)} values"
            raise TypeError(f"[{name}] norm must be a tuple (weight, eps) but got {got}.") from None
        weight, eps = norm or (None, 0.0)
        given = {"norm[0]": weight, "norm[1]": eps, "residual": residual, "alpha": alpha, "stream": stream}
        check_kinds(name, {operation.input: x} | given, layers)
        raise


def all_gradients(operation: _ext.Operation, names, cotangents, x, layers, has_bias, stream):
    try:
        return _ext.all_gradients(operation, names, cotangents, x, layers, has_bias, stream)
    except TypeError:
        given = dict(zip(names, cotangents, strict=True))
        given |= {operation.input: x, "has_bias": has_bias, "stream": stream}
        check_kinds(operation.name, given, layers)
        raise


_KINDS = {
    **dict.fromkeys(
        ("weight", "bias", "scales", "biases", "lora_a", "lora_b", "residual", "sinks", "freqs"), mx.array
    ),
    "mask": (str, mx.array),
    "norm[0]": mx.array,
    "offset": (int, mx.array),
    **dict.fromkeys(("group_size", "bits", "window", "dims", "ignore_index"), int),
    **dict.fromkeys(
        ("alpha", "limit", "lora_scale", "norm[1]", "eps", "scale", "base", "softcap", "label_smoothing"),
        (float, int),
    ),
    **dict.fromkeys(("exact", "has_bias", "traditional"), bool),
    **dict.fromkeys(("mode", "route"), str),
    "stream": (mx.Stream, mx.Device, mx.DeviceType),
}
_OPTIONAL = {
    "norm[0]",
    "bias",
    "scales",
    "biases",
    "lora_a",
    "lora_b",
    "group_size",
    "bits",
    "residual",
    "mask",
    "window",
    "sinks",
    "base",
    "freqs",
    "ignore_index",
    "softcap",
    "route",
    "stream",
}


def check_kinds(operation: str, given: dict[str, object], layers: list[LinearOperands]) -> None:
    """Say which argument is of the wrong type, if one is."""
    of_layers = [item for layer in layers for item in layer._asdict().items()]
    for name, value in [*of_layers, *given.items()]:
        kinds = _KINDS.get(name, mx.array)
        if not isinstance(value, kinds) and not (value is None and name in _OPTIONAL):
            expected = " or ".join(k.__name__ for k in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise TypeError(
                f"[{operation}] {name} must be {expected} but got {type(value).__name__}."
            ) from None


def check_sizes(owner: str, sizes: dict[str, int]) -> None:
    """Say which is no integer, or less than 1, if one is."""
    for name, size in sizes.items():
        if not hasattr(size, "__index__"):
            raise TypeError(f"[{owner}] {name} must be int but got {type(size).__name__}.") from None
        if size < 1:
            raise ValueError(f"[{owner}] {name} must be at least 1 but got {size}.")


def dense_layers(operation: str, weight: mx.array | tuple[mx.array, ...]) -> list[LinearOperands]:
    weights = weight if type(weight) in (list, tuple) else [weight]
    for w in weights:
        if not isinstance(w, mx.array):
            got = type(w).__name__
            raise TypeError(f"[{operation}] weight must be an array or a tuple of arrays but got {got}.")
    return [LinearOperands(w) for w in weights]


def layer_of(
    operation: str,
    weight: mx.array | LinearOperands,
    bias: mx.array | None,
    expected: str = "an array or LinearOperands",
) -> LinearOperands:
    if isinstance(weight, LinearOperands):
        if bias is None:
            return weight
        raise ValueError(f"[{operation}] bias must be left out where weight is LinearOperands but was given.")
    if isinstance(weight, mx.array):
        return LinearOperands(weight, bias)
    got = type(weight).__name__
    hint = ""
    if isinstance(weight, nn.Module):
        maker = "of_base" if isinstance(weight, (nn.Embedding, nn.QuantizedEmbedding)) else "of"
        hint = f" LinearOperands.{maker} makes one of it."
    raise TypeError(f"[{operation}] weight must be {expected} but got {got}.{hint}")


def layers_of(operation: str, weight, bias, names: tuple[str, ...]) -> list[LinearOperands]:
    """The layers of a call: one that packs all segments, or one for each of ``names``."""
    packed = isinstance(weight, LinearOperands) or not isinstance(weight, (list, tuple))
    count = len(names)
    if not packed and len(weight) != count:
        raise ValueError(
            f"[{operation}] weight must be one layer or a tuple of {count} but got {len(weight)}."
        )
    is_several = bias is not None and isinstance(bias, (list, tuple))
    if bias is not None and (is_several == packed or (is_several and len(bias) != count)):
        expected = "one array" if packed else f"a tuple of {_NUMBERS[count]} arrays ({', '.join(names)})"
        got = f"a tuple of {len(bias)}" if is_several else "one array"
        raise ValueError(f"[{operation}] bias must be {expected} as weight is but got {got}.")
    if packed:
        return [layer_of(operation, weight, bias, "an array, LinearOperands or a tuple")]
    if bias is None:
        return [w if type(w) is LinearOperands else layer_of(operation, w, None) for w in weight]
    return [layer_of(operation, w, b) for w, b in zip(weight, bias, strict=True)]


def batched(operation: str, x: mx.array) -> tuple[mx.array, list[int] | None]:
    """``x`` as ``[B, S, K]``, and the axes before ``K`` if they are others."""
    if not isinstance(x, mx.array) or x.ndim == 3:
        return x, None
    if x.ndim == 0:
        raise ValueError(f"[{operation}] x must have shape [..., K] but got {x.shape}.")
    leading = list(x.shape[:-1])
    # Nothing here may name the number of rows, which mx.compile(shapeless=True) changes.
    return mx.expand_dims(x, list(range(3 - x.ndim))) if x.ndim < 3 else mx.flatten(x, 0, -3), leading


def unbatched(y: mx.array, leading: list[int]) -> mx.array:
    if len(leading) < 2:
        return mx.squeeze(y, list(range(2 - len(leading))))
    return mx.unflatten(y, 0, leading[:-1])


_NUMBERS = {2: "two", 3: "three"}

# The features and heads of a segment that is as wide as its layer, and not split into heads.
OF_LAYER = (0, 0)
