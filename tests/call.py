"""A call of an operation, as plain data, and its formula in float64."""

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

import mlx_fused
import oracle
from mlx_fused import LinearOperands

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
        if len(self.features) == 1 or isinstance(self.arguments["weight"], tuple):
            return []
        return [key for key in self.leaves if key[0] in ("weight", "scales", "biases", "bias", "lora_b")]

    @property
    def has_bias(self):
        return any(name == "bias" for name, _ in self.leaves)

    @property
    def plain(self):
        """Whether every result is one sum of products, so that the formula counts the roundings itself."""
        adapted = any(name == "lora_a" for name, _ in self.leaves)
        return not (self.quantization or adapted or self.activation) and self.alpha == 1.0

    @property
    def gated(self):
        return self.operation == "fused_gated_projection"

    @property
    def activation(self):
        """As the oracle has it, None where there is none."""
        named = {n: self.arguments[n] for n in ("alpha", "limit") if n in self.arguments}
        name = self.arguments.get("activation")
        return oracle.Activation(name, self.gated, **named) if name else None

    @property
    def alpha(self):
        """The factor of the sums."""
        return 1.0 if self.activation else self.arguments.get("alpha", 1.0)

    @property
    def quantization(self):
        """(group_size, bits, mode), empty for a dense weight."""
        names = ("group_size", "bits", "mode")
        return tuple(self.arguments[n] for n in names) if self.arguments.get("scales") is not None else ()

    @property
    def input_name(self):
        return next(name for name in INPUTS if name in self.arguments)

    @property
    def x(self):
        return self.arguments[self.input_name]

    @property
    def segments(self):
        """Each one's heads and their size, or None if there are no heads."""
        if HEADS[0] in self.arguments:
            return segments([self.arguments[name] for name in HEADS if name in self.arguments])

    @property
    def features(self):
        """Of each segment."""
        if self.segments:
            return tuple(n * dims for n, dims in self.segments)
        weight = self.arguments["weight"]
        if isinstance(weight, tuple):
            return tuple(w.shape[0] for w in weight)
        return (weight.shape[0] // 2,) * 2 if self.gated else (weight.shape[0],)

    @property
    def rows(self):
        """(batch, rows) of the input, whose other axes are one."""
        *leading, _ = self.x.shape
        return tuple(leading) if len(leading) == 2 else (1, int(np.prod(leading, dtype=int)))

    def parts(self, name):
        """Each segment's part of what is called ``name``, None where there is none."""
        packed = self.leaves.get((name, None))
        if len(self.features) == 1:
            return [packed]
        if packed is None:
            return [self.leaves.get((name, i)) for i in range(len(self.features))]
        if name == "lora_a":
            return [packed] * len(self.features)
        axis = 1 if name == "lora_b" else 0
        if self._packing == "interleaved":
            return [packed[:, i::2] if axis else packed[i::2] for i in range(2)]
        return self._ordered(mx.split(packed, np.cumsum(self.features)[:-1].tolist(), axis))

    def _joined(self, parts, axis=0):
        """NumPy's arrays of the segments as one packed array."""
        if self._packing == "interleaved":
            shape = [2 * n if i == axis else n for i, n in enumerate(parts[0].shape)]
            return np.stack(parts, axis + 1).reshape(shape)
        return np.concatenate(self._ordered(parts), axis)

    def _ordered(self, parts):
        return parts[::-1] if self._packing == "up_gate" else parts

    @property
    def _packing(self):
        return self.arguments.get("packing", "gate_up")

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
        numbers = self.arguments.get("lora_scale", 1.0), self.alpha
        scale, alpha = (np.float64(np.float32(number)) for number in numbers)
        scale = np.broadcast_to(scale, len(terms)).copy()
        residual = oracle.exact(self.leaves.get(("residual", None)))
        x = oracle.exact(self.x).reshape(*self.rows, self.x.shape[-1])
        return x, tuple(terms), *others, scale, residual, np.array(alpha)

    def formula(self, x, weights, biases, lora_a, lora_b, scale, residual, alpha):
        segments = oracle.projection(x, weights, biases, lora_a, lora_b, scale)
        return self.laid_out([self.activation(segments)] if self.activation else segments, residual, alpha)

    def laid_out(self, outputs, residual=None, alpha=1):
        if self.segments is None:
            y = alpha * outputs[0]
            y = y if residual is None else residual.reshape(y.shape) + y
            return (y.reshape(*self.x.shape[:-1], y.shape[-1]),)
        by_head = zip(outputs, self.segments, strict=True)
        return tuple(y.reshape(*y.shape[:2], *heads).transpose(0, 2, 1, 3) for y, heads in by_head)

    def by_token(self, outputs):
        """The other way: what is laid out as the outputs are, as ``[batch, rows, features]``."""
        if self.segments is None:
            return [y.reshape(*self.rows, y.shape[-1]) for y in outputs]
        by_token = (y.transpose(0, 2, 1, 3) for y in outputs)
        return [y.reshape(*y.shape[:2], n) for y, n in zip(by_token, self.features, strict=True)]

    def rounded_formula(self, dtype):
        """What `exact` promises."""
        *operands, residual, alpha = self.exact_operands
        segments = oracle.exact_projection(*operands, dtype, bool(self.quantization))
        if self.segments:
            return self.laid_out(segments)
        (y,) = segments
        y = y if alpha == 1 else oracle.rounded(alpha * y, dtype)
        return (y if residual is None else oracle.rounded(residual + y, dtype),)

    def rounded_activation(self, dtype):
        """What `exact` promises of an activation: the least and the largest, for its own steps are not."""
        pre = oracle.exact_projection(*self.exact_operands[:6], dtype, bool(self.quantization))
        return self.activation.rounded(pre, dtype)

    def gradient_formula(self, keys):
        """The function of the cotangents and the formula's operands that gives the gradients of ``keys``."""
        linear = self.linear_gradients(keys)

        def formula(cotangents, x, weights, biases, lora_a, lora_b, scale, residual, alpha):
            grads = self.by_token(cotangents)
            if self.activation:
                pre = oracle.projection(x, weights, biases, lora_a, lora_b, scale)
                grads = self.activation.gradients(grads[0], pre)
            return linear(grads, x, weights, biases, lora_a, lora_b, scale, residual, alpha)

        return formula

    def linear_gradients(self, keys):
        """The same of the cotangents of the segments' sums, ``[batch, rows, features]``."""

        def formula(cotangents, x, weights, biases, lora_a, lora_b, scale, residual, alpha):
            grads = [alpha * g for g in cotangents]
            d_x, d_weight, d_bias, d_a, d_b = oracle.projection_bwd(grads, x, weights, lora_a, lora_b, scale)
            if self.packed:
                d_weight, d_bias = [self._joined(d_weight)], [self._joined(d_bias)]
                if lora_a[0] is not None:
                    d_a, d_b = [sum(d_a)], [self._joined(d_b, 1)]
            every = {name: [d_x.reshape(self.x.shape)] for name in INPUTS}
            every["residual"] = [g.reshape(*self.x.shape[:-1], g.shape[-1]) for g in cotangents]
            every |= {"weight": d_weight, "bias": d_bias, "lora_a": d_a, "lora_b": d_b}
            return tuple(every[name][place or 0] for name, place in keys)

        return formula

    def pre(self, dtype, roundings):
        """What the activation is of, rounded so often, and its errors."""
        operands = self.exact_operands[:6]
        values = oracle.projection(*operands)
        errors = []
        for value, size in zip(values, oracle.projection(*oracle.magnitudes(operands)), strict=True):
            error = oracle.sum_error(size, self.forward_terms, dtype)
            errors.append(error + oracle.rounding_error(value, error, dtype, roundings))
        return values, errors

    # The most roundings from a product to a result: every sum on the way, and scale, alpha and the decoding.

    @property
    def forward_terms(self):
        return (1 + len(self.quantization)) * self.x.shape[-1] + self._adapter_terms + 5

    @property
    def gradient_terms(self):
        return 2 * sum(self.features) + self.rows[0] * self.rows[1] + self._adapter_terms + 5

    @property
    def _adapter_terms(self):
        ranks = [a.shape[1] for (name, _), a in self.leaves.items() if name == "lora_a"]
        return self.x.shape[-1] + sum(ranks) if ranks else 0
