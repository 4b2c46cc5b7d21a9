"""The RMS norm of an operation's input."""

import mlx.core as mx
import numpy as np
import pytest

import graph
import mlx_fused
import oracle
import projections
from operands import normal

EPS = 1e-5


def operands(rng, dtype=mx.float32, batch=2, rows=3, hidden=16, features=8):
    x = normal(rng, (batch, rows, hidden), dtype)
    weights = tuple(normal(rng, (features, hidden), dtype) for _ in range(3))
    return x, normal(rng, (hidden,), dtype), weights


def operation(name, weights):
    """The operation as a function of x and its keywords, and its weights."""
    count = {"linear": 1, "gated_projection": 2, "qkv_projection": 3}[name]
    given = weights[0] if count == 1 else weights[:count]
    options = {"split_heads": False} if count == 3 else {}

    def call(x, **keywords):
        outputs = getattr(mlx_fused, f"fused_{name}")(x, given, **options, **keywords)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


def evaluated(x):
    mx.eval(x)
    return x


OPERATIONS = ("linear", "gated_projection", "qkv_projection")


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
def test_is_the_root_mean_square_norm(rng, dtype, scaled):
    x, weight, (w, *_) = operands(rng, dtype)
    (y,) = operation("linear", (w,))(x, norm=(weight if scaled else None, EPS))
    wide, factor = oracle.exact(x), oracle.exact(weight) if scaled else 1.0
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * factor
    expected = normed @ oracle.exact(w).T
    # The norm rounds twice, the product once.
    step = mx.finfo(dtype).eps
    bound = 3 * step * (np.abs(normed) @ np.abs(oracle.exact(w)).T) + step * np.abs(expected)
    assert y.dtype == dtype
    assert np.all(np.abs(oracle.exact(y) - expected) <= bound + 64 * 2.0**-23 * np.abs(expected))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("route", [None, "fused", "composed"])
def test_equals_the_norm_before(rng, name, route):
    x, weight, weights = operands(rng, mx.bfloat16)
    call = operation(name, weights)
    ours = call(x, norm=(weight, EPS), route=route)
    norm = mx.fast.rms_norm if route == "composed" else mlx_fused.fused_rms_norm
    oracle.assert_equal(ours, call(evaluated(norm(x, weight, EPS)), route=route))


KINDS = {
    "linear": lambda rng, *sizes, **o: projections.linear(rng, *sizes, 24, **o),
    "activation": lambda rng, *sizes, **o: projections.linear(rng, *sizes, 24, activation="gelu", **o),
    "gated": lambda rng, *sizes, **o: projections.gated(rng, *sizes, 24, **o),
    "qkv": lambda rng, *sizes, **o: projections.qkv(rng, *sizes, (4, 2, 8), **o),
    "residual": lambda rng, *sizes, **o: projections.output(rng, *sizes, 24, **o),
}
FORMS = {"dense": None, "quantized": ("affine", 64, 4)}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_few_rows_take_over_the_norm(rng, kind, form, dtype):
    """To the bit what it is of the norm itself; with adapters, and with every step rounded."""
    for (batch, rows), scaled, lora, exact in (
        ((1, 1), True, False, False),
        ((2, 4), False, True, False),
        ((8, 1), True, True, True),
        ((3, 3), True, False, False),
        ((0, 3), True, False, False),
    ):
        ranks = {"ranks": (2, None, 3)[: 2 if kind is KINDS["gated"] else 3]} if lora else {}
        if ranks and kind not in (KINDS["gated"], KINDS["qkv"]):
            ranks = {"rank": 2}
        call = kind(rng, batch, rows, 128, form=form, dtype=dtype, **ranks)
        weight = normal(rng, (128,), dtype) if scaled else None
        x = evaluated(call.x)
        normed = mlx_fused.fused_rms_norm(x, weight, EPS)
        ours = call.replace(**{call.input_name: normed})(exact=exact)
        assert graph.primitives(*ours)["FusedRMSNorm"] == (batch * rows > 8)
        before = evaluated(mlx_fused.fused_rms_norm(x, weight, EPS))
        oracle.assert_equal(ours, call.replace(**{call.input_name: before})(exact=exact))
        oracle.assert_equal(normed, before)


def test_takes_over_no_other_norm(rng):
    x, weight, (w, *_) = operands(rng)
    wide = mlx_fused.fused_rms_norm(x.astype(mx.bfloat16), weight, EPS)  # of another dtype than its input
    assert wide.dtype == mx.float32
    not_taken = [wide, mx.fast.rms_norm(x, weight, EPS), mlx_fused.fused_rms_norm(x, weight, EPS) + 0]
    for normed in not_taken:
        y = mlx_fused.fused_linear(normed, w)
        assert graph.primitives(y)["FusedRMSNorm"] == graph.primitives(normed)["FusedRMSNorm"]
        oracle.assert_equal(y, mlx_fused.fused_linear(evaluated(normed), w))


def test_a_transform_sees_the_norm(rng):
    x, weight, (w, *_) = operands(rng)

    def apply(x, weight, w):
        return mlx_fused.fused_linear(mlx_fused.fused_rms_norm(x, weight, EPS), w)

    assert graph.primitives(apply(x, weight, w))["FusedRMSNorm"] == 0
    assert graph.primitives(mx.compile(apply)(x, weight, w))["FusedRMSNorm"] == 1
    mapped = mx.vmap(apply, (0, None, None))(x[:, None], weight, w)[:, 0]
    assert float(mx.abs(mapped - apply(x, weight, w)).max()) < 1e-5
    for transform in (lambda f: f, mx.compile):
        ours = transform(mx.grad(lambda *a: (apply(*a) ** 3).sum(), (0, 1, 2)))(x, weight, w)
        theirs = mx.grad(lambda x, v, w: ((mx.fast.rms_norm(x, v, EPS) @ w.T) ** 3).sum(), (0, 1, 2))(
            x, weight, w
        )
        for a, b in zip(ours, theirs, strict=True):
            assert float(mx.abs(a - b).max()) < 1e-4 * float(mx.abs(b).max())


def test_a_graph_to_export_has_mlxs_own_operations_alone(rng):
    x, weight, (w, *_) = operands(rng, rows=5)
    for route, ours in ((None, {"FusedRMSNorm", "FusedLinear"}), ("composed", set())):
        nodes = graph.primitives(mlx_fused.fused_linear(x, w, norm=(weight, EPS), route=route))
        assert {node for node in nodes if node.startswith("Fused")} == ours


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_those_of_norm_and_projection(rng, name):
    x, weight, weights = operands(rng)
    call = operation(name, weights)

    def loss(x, weight, normed):
        given = {"norm": (weight, EPS)} if normed else {}
        outputs = call(x if normed else mlx_fused.fused_rms_norm(x, weight, EPS), **given)
        return sum((y**2).sum() for y in outputs)

    ours = mx.grad(loss, (0, 1))(x, weight, True)
    expected = mx.grad(loss, (0, 1))(x, weight, False)
    compiled = mx.compile(lambda x, w: mx.grad(loss, (0, 1))(x, w, True))(x, weight)
    for given in (ours, compiled):
        oracle.assert_equal(given, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_vmap_and_jvp(rng, name):
    x, weight, weights = operands(rng)
    call = operation(name, weights)

    def ours(x):
        return list(call(x, norm=(weight, EPS)))

    def before(x):
        return list(call(mx.fast.rms_norm(x, weight, EPS)))

    many = mx.stack([x, 2 * x])
    for a, b in zip(mx.vmap(ours)(many), mx.vmap(before)(many), strict=True):
        assert mx.allclose(a, b, rtol=1e-5, atol=1e-5)
    tangents = [mx.ones_like(x)]
    for a, b in zip(mx.jvp(ours, [x], tangents)[1], mx.jvp(before, [x], tangents)[1], strict=True):
        assert mx.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_dtype_is_the_promoted_one(rng):
    x, weight, (w, *_) = operands(rng, mx.bfloat16)
    assert mlx_fused.fused_linear(x, w, norm=(weight.astype(mx.float32), EPS)).dtype == mx.float32


@pytest.mark.parametrize(
    ("norm", "error", "message"),
    [
        (1e-5, TypeError, r"norm must be a tuple \(weight, eps\) but got float"),
        ((None, 1e-5, 1), TypeError, r"norm must be a tuple \(weight, eps\) but got 3 values"),
        ((1.0, 1e-5), TypeError, r"norm\[0\] must be array but got float"),
        ((None, "1e-5"), TypeError, r"norm\[1\] must be float or int but got str"),
        ((mx.ones(3), 1e-5), ValueError, r"norm\[0\] must have shape \(16,\) but got \(3,\)"),
        ((mx.ones(16, mx.int32), 1e-5), ValueError, r"norm\[0\] must be "),
    ],
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_errors(rng, name, norm, error, message):
    x, _, weights = operands(rng)
    with pytest.raises(error, match=rf"\[fused_{name}\] {message}"):
        operation(name, weights)(x, norm=norm)
