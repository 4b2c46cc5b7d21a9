"""Calls of the operations, on weights of any kind: random operands for them, and what they must give."""

import mlx.core as mx
import numpy as np

import mlx_fused
import oracle
import quantized
from call import HEADS, INPUTS, Call, segments
from operands import few_integers, integers, normal

ACTIVATIONS = [*oracle.PARTS, "clipped_swiglu"]  # the last one is a gate's alone
PACKINGS = ["gate_up", "up_gate", "interleaved"]


def check_outputs(call, outputs, roundings=1):
    """What the call gave, however it was made."""
    if activation := call.activation:
        (y,) = outputs
        pre, errors = call.pre(y.dtype, roundings - 1)
        error = activation.errors(pre, errors)
        expected, error = (call.laid_out([a])[0] for a in (activation(pre), error))
        return oracle.assert_rounded(y, expected, error, roundings)
    terms = None if call.plain else call.forward_terms
    oracle.assert_close(outputs, call.formula, *call.exact_operands, roundings=roundings, terms=terms)


def check_forward(call, roundings=1, **options):
    outputs = call(**options)
    check_outputs(call, outputs, roundings)
    return outputs


def cotangents(rng, call, draw=normal):
    *leading, _ = call.x.shape
    if call.segments is None:
        return (draw(rng, (*leading, call.features[0]), call.x.dtype),)
    batch, seq = leading
    return tuple(draw(rng, (batch, n, seq, dims), call.x.dtype) for n, dims in call.segments)


def gradients(call, keys, given, **options):
    """mx.vjp's of the arrays ``keys``."""
    primals = [call.leaves[key] for key in keys]
    return tuple(mx.vjp(call.function(keys, **options), primals, list(given))[1])


def backward(call, given, **options):
    """The results of the backward operation, which dense calls have."""
    names = ("dq", "dk", "dv") if call.segments else ("d_output",)
    arguments = {n: call.arguments[n] for n in (*INPUTS, "weight", *HEADS) if n in call.arguments}
    arguments |= dict(zip(names, given, strict=True)) | {"has_bias": call.has_bias}
    return getattr(mlx_fused, f"{call.operation}_bwd")(**arguments | options)


def check_grads(call, given, keys, grads, roundings=1):
    """The gradients of ``keys``, however they were made."""
    assert [g.dtype for g in grads] == [call.leaves[key].dtype for key in keys]
    operands, terms = call.exact_operands, None if call.plain else call.gradient_terms
    options = {"roundings": roundings, "terms": terms}
    linear, cotangents = call.linear_gradients(keys), call.by_token(oracle.exact(given))
    if activation := call.activation:
        # What it is of is kept in the dtype, and so are the gradients of that.
        dtype, (cotangent,) = given[0].dtype, cotangents
        pre, errors = call.pre(dtype, roundings)
        cotangents = activation.gradients(cotangent, pre)
        errors = activation.gradient_errors(cotangent, pre, errors)
        rounded = (
            oracle.rounding_error(g, e, dtype, roundings) for g, e in zip(cotangents, errors, strict=True)
        )
        errors = [e + r for e, r in zip(errors, rounded, strict=True)]
        options["errors"] = linear(errors, *oracle.magnitudes(operands))
    oracle.assert_close(grads, linear, tuple(cotangents), *operands, **options)


def check_gradients(call, given, keys=None, roundings=1, **options):
    keys = call.trainable if keys is None else keys
    grads = gradients(call, keys, given, **options)
    check_grads(call, given, keys, grads, roundings)
    return grads


def check_backward(call, given, roundings=1, **options):
    _, d_weight, d_bias, *d_residual = results = backward(call, given, **options)
    form = tuple if call.segments and not call.packed else mx.array
    assert isinstance(d_weight, form) and isinstance(d_bias, form if call.has_bias else type(None))
    assert not d_residual or mx.array_equal(*d_residual, *given, equal_nan=True)
    check_grads(call, given, list(call.leaves), oracle.leaves(results), roundings)


def check(rng, call, **options):
    """Forward and gradients."""
    outputs = check_forward(call, **options)
    assert all(y.dtype == call.x.dtype for y in outputs)
    check_gradients(call, cotangents(rng, call), **options)


# Operands


def weights(rng, features, hidden, form, dtype, draw):
    """One weight's arguments: of ``form`` (mode, group_size, bits), or dense where that is None."""
    if form is None:
        return {"weight": draw(rng, (features, hidden), dtype)}
    mode, group_size, bits = form
    if draw is normal and features:  # mx.quantize refuses a matrix of no rows
        arrays = quantized.quantize(normal(rng, (features, hidden), dtype), group_size, bits, mode)
    else:
        small = draw is few_integers
        arrays = _integer_codes(rng, features, hidden, mode, group_size, bits, dtype, small)
    return dict(zip(("weight", "scales", "biases"), arrays, strict=True))


def _integer_codes(rng, features, hidden, mode, group_size, bits, dtype, small):
    """Weights whose products with small integers are exact in float32, and so are their sums."""
    words = rng.integers(0, 2**32, (features, hidden * bits // 32), np.uint32)
    groups = (features, hidden // group_size)
    if small and bits in (4, 8):
        words &= np.uint32(0x11111111 if bits == 4 else 0x01010101)  # the smallest codes
    if mode == "affine" and small:
        return mx.array(words), mx.ones(groups, dtype), mx.array(-rng.integers(0, 2, groups)).astype(dtype)
    if mode == "affine":
        # Dyadic fractions for the wider codes: weights below 32 for all.
        scales = mx.array(rng.integers(1, 3, groups) * 2.0 ** min(0, 4 - bits)).astype(dtype)
        return mx.array(words), scales, mx.array(rng.integers(-8, 1, groups)).astype(dtype)
    if bits == 8:
        words &= np.uint32(0xBFBFBFBF)  # below 2, and never NaN
    one = 0x38 if mode == "nvfp4" else 127
    return mx.array(words), mx.full(groups, one, mx.uint8), None


def qkv(
    rng, batch, seq, hidden, heads, form=None, dtype=mx.float32, bias=True, packed=False, ranks=None,
    scale=2.0, adapter_dtype=mx.float32, draw=normal,
):  # fmt: skip
    """A call for q, k and v: quantized if it has a form, with adapters where ``ranks`` has a number.

    What is packed has one adapter, of the first of these ranks.
    """
    features = [n * dims for n, dims in segments(heads)]
    arguments = several(
        rng,
        "input",
        (batch, seq, hidden),
        features,
        form,
        dtype,
        bias,
        packed,
        ranks,
        scale,
        adapter_dtype,
        draw,
    )
    return _call("qkv_projection", arguments | dict(zip(HEADS, heads, strict=False)), form)


def several(rng, name, shape, features, form, dtype, bias, packed, ranks, scale, adapter_dtype, draw):
    """The arguments of layers that read one input of this name and shape."""
    *_, hidden = shape
    parts = [sum(features)] if packed else features
    made = [weights(rng, n, hidden, form, dtype, draw) for n in parts]
    arguments = {name: draw(rng, shape, dtype)}
    for name in made[0]:
        values = tuple(part[name] for part in made)
        missing = values[0] is None
        arguments[name] = None if missing else values[0] if packed else values
    biases = tuple(draw(rng, (n,), dtype) for n in parts) if bias else None
    arguments["bias"] = biases[0] if bias and packed else biases
    if ranks:
        if packed:
            ranks = [rank for rank in ranks if rank is not None][:1]
        made = adapters(rng, hidden, parts, ranks, scale, adapter_dtype, draw)
        if packed:
            made |= {n: made[n][0] for n in ("lora_a", "lora_b")}
            made["lora_scale"] = scale[0] if isinstance(scale, tuple) else scale
        arguments |= made
    return arguments


def output(
    rng, batch, seq, hidden, hidden_out, form=None, dtype=mx.float32, bias=True, rank=None,
    scale=2.0, adapter_dtype=mx.float32, alpha=1.0, draw=normal,
):  # fmt: skip
    """A call for the output projection and residual."""
    arguments = {"x": draw(rng, (batch, seq, hidden), dtype)}
    arguments |= weights(rng, hidden_out, hidden, form, dtype, draw)
    arguments["bias"] = draw(rng, (hidden_out,), dtype) if bias else None
    arguments |= {"residual": draw(rng, (batch, seq, hidden_out), dtype), "alpha": alpha}
    if rank is not None:
        made = adapters(rng, hidden, (hidden_out,), (rank,), scale, adapter_dtype, draw)
        arguments |= made | {"lora_a": made["lora_a"][0], "lora_b": made["lora_b"][0]}
    return _call("output_projection_residual", arguments, form)


def linear(*args, activation=None, draw=normal, **options):
    """A call for a linear layer, with an activation or none, of what `output` takes."""
    arguments = output(*args, draw=draw, **options).arguments
    arguments = {n: a for n, a in arguments.items() if n not in ("residual", "alpha")}
    return Call("fused_linear", _narrowed(arguments, draw) | {"activation": activation})


def gated(
    rng, batch, seq, hidden, features, form=None, dtype=mx.float32, bias=True, packing=None, ranks=None,
    scale=2.0, adapter_dtype=mx.float32, activation="silu", draw=normal,
):  # fmt: skip
    """A call for gate and up: packed if that has a name."""
    shape, packed = (batch, seq, hidden), packing is not None
    arguments = several(
        rng, "x", shape, (features,) * 2, form, dtype, bias, packed, ranks, scale, adapter_dtype, draw
    )
    others = {"activation": activation} | ({"packing": packing} if packed else {})
    return _call("gated_projection", _narrowed(arguments, draw) | others, form)


def _narrowed(arguments, draw):
    """With sums where activations bend: of about 2, not of the square root of their number."""
    if draw is normal and (x := arguments["x"]).size:
        arguments["x"] = (x * (2 / x.shape[-1] ** 0.5)).astype(x.dtype)
    return arguments


def with_norm(rng, call, weighted=True):
    """It norms rows whose root mean square is a power of two; and the call of what these are normed."""
    normed = mx.array(rng.choice([-1.0, 1.0], call.x.shape)).astype(call.x.dtype)
    scale = mx.array(2.0 ** rng.integers(-2, 3, (*call.x.shape[:2], 1))).astype(call.x.dtype)
    weight = integers(rng, call.x.shape[-1:], call.x.dtype) if weighted else None
    before = call.replace(**{call.input_name: normed if weight is None else weight * normed})
    return call.replace(**{call.input_name: scale * normed}, norm=(weight, 0.0)), before


def check_norm(rng, call):
    for weighted in (True, False):
        of_rows, before = with_norm(rng, call, weighted)
        oracle.assert_close(of_rows(), before.formula, *before.exact_operands, terms=before.forward_terms)


def every_byte(mode, of_scales, rows, dtype, as_columns=False):
    """A call whose outputs, or with ``as_columns`` gradients by x, are half of each byte's value."""
    weight, scales, group_size, bits = quantized.every_byte(mode, of_scales)
    if as_columns:
        weight, scales = weight.reshape(1, -1), scales.reshape(1, -1)
    features, hidden = weight.shape[0], scales.shape[1] * group_size
    arguments = {"x": mx.full((1, rows, hidden), 0.25 / group_size, dtype), "weight": weight}
    arguments |= {"scales": scales, "biases": None, "bias": None}
    arguments |= {"residual": mx.zeros((1, rows, features), dtype), "alpha": 1.0}
    return _call("output_projection_residual", arguments, (mode, group_size, bits))


def adapters(rng, hidden, features, ranks, scale, dtype, draw):
    sizes = list(zip(features, ranks, strict=True))
    return {
        "lora_a": tuple(None if r is None else draw(rng, (hidden, r), dtype) for _, r in sizes),
        "lora_b": tuple(None if r is None else draw(rng, (r, n), dtype) for n, r in sizes),
        "lora_scale": scale,
    }


def _call(operation, arguments, form):
    if form:
        arguments |= dict(zip(("mode", "group_size", "bits"), form, strict=True))
    return Call(f"fused_{operation}", arguments)
