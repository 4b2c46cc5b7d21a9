"""Calls of the operations, on weights of any kind: random operands for them, and what they must give."""

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

import mlx_fused
import oracle
import quantized
from mlx_fused import LinearOperands
from operands import normal

HEADS = ("num_heads", "num_kv_heads", "head_dim", "v_head_dim")
# What is an array, in the order of the primitives' inputs.
INPUTS = ("input", "x")
NAMES = (*INPUTS, "weight", "scales", "biases", "bias", "lora_a", "lora_b", "residual")


def segments(heads):
    """q's, k's and v's heads and their size, of (num_heads, num_kv_heads, head_dim[, v_head_dim])."""
    num_heads, num_kv_heads, head_dim, *v_head_dim = heads
    return [(num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, *(v_head_dim or [head_dim]))]


@dataclass(frozen=True)
class Call:
    """One call of an operation.

    `arguments` are by name. Those of linear layers are named as in LinearOperands: a tuple with one for each
    layer, or one value if they are packed or share it.
    """

    operation: str
    arguments: dict

    def __call__(self, **changes):
        outputs = getattr(mlx_fused, self.operation)(**self.replace(**changes).spelled)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    @property
    def spelled(self):
        """The arguments as users write them: a weight and a bias as arrays, more than that as one value."""
        others, operands = self._split
        return others | operands if operands.keys() <= {"weight", "bias"} else self.keywords

    @property
    def keywords(self):
        """The arguments as patched models give them, each layer as one value."""
        others, operands = self._split
        if not isinstance(operands["weight"], tuple):
            return others | {"weight": LinearOperands(**operands)}
        columns = (v if isinstance(v, tuple) else (v,) * len(self.features) for v in operands.values())
        rows = (dict(zip(operands, row, strict=True)) for row in zip(*columns, strict=True))
        return others | {"weight": tuple(LinearOperands(**row) for row in rows)}

    @property
    def _split(self):
        """The arguments that are no layer's, and the layers' that are there."""
        names = LinearOperands._fields
        others = {name: value for name, value in self.arguments.items() if name not in names}
        given = {name: self.arguments.get(name) for name in names}
        return others, {name: value for name, value in given.items() if value is not None}

    def replace(self, **changes):
        return Call(self.operation, self.arguments | changes)

    @cached_property
    def leaves(self):
        """Every array of the arguments, by (name, place in its tuple or None)."""
        found = {}
        for name in NAMES:
            value = self.arguments.get(name)
            values = dict(enumerate(value)) if isinstance(value, tuple) else {None: value}
            found |= {(name, place): a for place, a in values.items() if a is not None}
        return found

    def with_leaves(self, leaves):
        changes = {}
        for (name, place), a in leaves.items():
            if place is None:
                changes[name] = a
            else:
                parts = list(changes.get(name, self.arguments[name]))
                parts[place] = a
                changes[name] = tuple(parts)
        return self.replace(**changes)

    def function(self, keys, **options):
        """The call as a function of some of its arrays."""
        return lambda *values: self.with_leaves(dict(zip(keys, values, strict=True)))(**options)

    @property
    def trainable(self):
        """The keys of the arrays that may have a gradient of ours."""
        frozen = ("weight", "scales", "biases") if self.quantization else ()
        return [key for key in self.leaves if key[0] not in frozen]

    @property
    def packed(self):
        """The keys of the arrays that hold the rows of all segments."""
        if self.segments is None or isinstance(self.arguments["weight"], tuple):
            return []
        return [key for key in self.leaves if key[0] in ("weight", "scales", "biases", "bias", "lora_b")]

    @property
    def has_bias(self):
        return any(name == "bias" for name, _ in self.leaves)

    @property
    def plain(self):
        """Whether every result is one sum of products, so that the formula counts the roundings itself."""
        adapted = any(name == "lora_a" for name, _ in self.leaves)
        return not (self.quantization or adapted) and self.arguments.get("alpha", 1.0) == 1.0

    @property
    def quantization(self):
        """(group_size, bits, mode), empty for a dense weight."""
        names = ("group_size", "bits", "mode")
        return tuple(self.arguments[n] for n in names) if self.arguments.get("scales") is not None else ()

    @property
    def x(self):
        return next(self.arguments[name] for name in INPUTS if name in self.arguments)

    @property
    def segments(self):
        """Each one's heads and their size, or None if there are no heads."""
        if HEADS[0] in self.arguments:
            return segments([self.arguments[name] for name in HEADS if name in self.arguments])

    @property
    def features(self):
        """Of each segment."""
        if self.segments is None:
            return (self.arguments["weight"].shape[0],)
        return tuple(n * dims for n, dims in self.segments)

    def parts(self, name):
        """Each segment's part of what is called ``name``, None where there is none."""
        packed = self.leaves.get((name, None))
        if self.segments is None:
            return [packed]
        if packed is None:
            return [self.leaves.get((name, i)) for i in range(len(self.features))]
        if name == "lora_a":
            return [packed] * len(self.features)
        return mx.split(packed, np.cumsum(self.features)[:-1].tolist(), -1 if name == "lora_b" else 0)

    # The formula takes NumPy's arrays in this order: x, weights, biases, A, B, scale, residual, alpha.

    @property
    def exact_operands(self):
        weight, scales, biases = map(self.parts, ("weight", "scales", "biases"))
        if self.quantization:
            parts = zip(weight, scales, biases, strict=True)
            terms = [oracle.quantized_terms(*part, *self.quantization) for part in parts]
        else:
            terms = [oracle.terms_of(w) for w in weight]
        others = (oracle.exact(self.parts(name)) for name in ("bias", "lora_a", "lora_b"))
        scale, alpha = (np.float64(np.float32(self.arguments.get(n, 1.0))) for n in ("lora_scale", "alpha"))
        scale = np.broadcast_to(scale, len(terms)).copy()
        residual = oracle.exact(self.leaves.get(("residual", None)))
        return oracle.exact(self.x), tuple(terms), *others, scale, residual, np.array(alpha)

    def formula(self, x, weights, biases, lora_a, lora_b, scale, residual, alpha):
        segments = oracle.projection(x, weights, biases, lora_a, lora_b, scale)
        return self._laid_out(segments, residual, alpha)

    def _laid_out(self, outputs, residual, alpha):
        if self.segments is None:
            y = alpha * outputs[0]
            return (y if residual is None else residual + y,)
        by_head = zip(outputs, self.segments, strict=True)
        return tuple(y.reshape(*y.shape[:2], *heads).transpose(0, 2, 1, 3) for y, heads in by_head)

    def rounded_formula(self, dtype):
        """What `exact` promises."""
        *operands, residual, alpha = self.exact_operands
        segments = oracle.exact_projection(*operands, dtype, bool(self.quantization))
        if self.segments:
            return self._laid_out(segments, residual, alpha)
        (y,) = segments
        y = y if alpha == 1 else oracle.rounded(alpha * y, dtype)
        return (y if residual is None else oracle.rounded(residual + y, dtype),)

    def gradient_formula(self, keys):
        """The function of the cotangents and the formula's operands that gives the gradients of ``keys``."""
        packed = len(self.features) > 1 and not isinstance(self.arguments["weight"], tuple)

        def formula(cotangents, x, weights, biases, lora_a, lora_b, scale, residual, alpha):
            if self.segments:
                by_token = (g.transpose(0, 2, 1, 3) for g in cotangents)
                shapes = ((*x.shape[:2], n) for n in self.features)
                grads = [g.reshape(shape) for g, shape in zip(by_token, shapes, strict=True)]
            else:
                grads = [alpha * cotangents[0]]
            d_x, d_weight, d_bias, d_a, d_b = oracle.projection_bwd(grads, x, weights, lora_a, lora_b, scale)
            if packed:
                d_weight, d_bias = [np.concatenate(d_weight)], [np.concatenate(d_bias)]
                if lora_a[0] is not None:
                    d_a, d_b = [sum(d_a)], [np.concatenate(d_b, -1)]
            every = {name: [d_x] for name in INPUTS} | {"residual": cotangents}
            every |= {"weight": d_weight, "bias": d_bias, "lora_a": d_a, "lora_b": d_b}
            return tuple(every[name][place or 0] for name, place in keys)

        return formula

    # The most roundings from a product to a result: every sum on the way, and scale, alpha and the decoding.

    @property
    def forward_terms(self):
        return (1 + len(self.quantization)) * self.x.shape[-1] + self._adapter_terms + 5

    @property
    def gradient_terms(self):
        rows = self.x.shape[0] * self.x.shape[1]
        return 2 * sum(self.features) + rows + self._adapter_terms + 5

    @property
    def _adapter_terms(self):
        ranks = [a.shape[1] for (name, _), a in self.leaves.items() if name == "lora_a"]
        return self.x.shape[-1] + sum(ranks) if ranks else 0


def check_outputs(call, outputs, roundings=1):
    """What the call gave, however it was made."""
    terms = None if call.plain else call.forward_terms
    oracle.assert_close(outputs, call.formula, *call.exact_operands, roundings=roundings, terms=terms)


def check_forward(call, roundings=1, **options):
    outputs = call(**options)
    check_outputs(call, outputs, roundings)
    return outputs


def cotangents(rng, call, draw=normal):
    batch, seq, _ = call.x.shape
    if call.segments is None:
        return (draw(rng, (batch, seq, *call.features), call.x.dtype),)
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
    formula, terms = call.gradient_formula(keys), None if call.plain else call.gradient_terms
    oracle.assert_close(grads, formula, given, *call.exact_operands, roundings=roundings, terms=terms)


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
        arrays = _integer_codes(rng, features, hidden, mode, group_size, bits, dtype)
    return dict(zip(("weight", "scales", "biases"), arrays, strict=True))


def _integer_codes(rng, features, hidden, mode, group_size, bits, dtype):
    """Weights whose products with small integers are exact in float32, and so are their sums."""
    words = rng.integers(0, 2**32, (features, hidden * bits // 32), np.uint32)
    groups = (features, hidden // group_size)
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
    parts = [sum(features)] if packed else features
    made = [weights(rng, n, hidden, form, dtype, draw) for n in parts]
    arguments = {"input": draw(rng, (batch, seq, hidden), dtype)}
    for name in made[0]:
        values = tuple(part[name] for part in made)
        missing = values[0] is None
        arguments[name] = None if missing else values[0] if packed else values
    biases = tuple(draw(rng, (n,), dtype) for n in parts) if bias else None
    arguments["bias"] = biases[0] if bias and packed else biases
    arguments |= zip(HEADS, heads, strict=False)
    if ranks:
        if packed:
            ranks = [rank for rank in ranks if rank is not None][:1]
        made = adapters(rng, hidden, parts, ranks, scale, adapter_dtype, draw)
        if packed:
            made |= {n: made[n][0] for n in ("lora_a", "lora_b")}
            made["lora_scale"] = scale[0] if isinstance(scale, tuple) else scale
        arguments |= made
    return _call("qkv_projection", arguments, form)


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
