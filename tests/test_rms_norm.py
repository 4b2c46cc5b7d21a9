"""The RMS norm as an operation of its own."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused
import oracle
from active_memory import kept
from graph import output_counts, primitives
from mlx_fused import fused_rms_norm
from operands import DTYPES, normal
from test_threads import in_threads, same_with_any_threads

EPS = 1e-5
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
weighted = pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "plain"])
# One number, less than a vector and more, several rows of any rank, more than are worked on at once, nothing.
SHAPES = [(1,), (5,), (3, 1), (2, 3, 16), (2, 5, 33), (1, 1, 16384), (3, 4, 5, 64), (300, 70), (4, 2200)]
EMPTY = [(0,), (0, 4), (3, 0), (2, 0, 3)]


def formula(x, weight):
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    return x if weight is None else x * weight


def gradients_formula(cotangent, x, weight):
    """The gradients of x and of the weight."""
    r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    g = cotangent if weight is None else cotangent * weight
    d_x = r * (g - r * x * (g * r * x).mean(-1, keepdims=True))
    return d_x, (cotangent * r * x).reshape(-1, x.shape[-1]).sum(0)


def root_error(n):
    """Relative, of 1 / sqrt(mean(x^2) + eps) and of some products with it."""
    return (min(n, 8 * np.sqrt(n)) + 16) * oracle.UNIT_ROUNDOFF[mx.float32]


def check_forward(x, weight):
    """Rounded before it is multiplied with the weight and after it, from a value that is nearly this."""
    y = fused_rms_norm(x, weight, EPS)
    assert y.dtype == (x.dtype if weight is None else mx.fast.rms_norm(x, weight, EPS).dtype)
    normed, error, factor = formula(oracle.exact(x), None), root_error(x.shape[-1]), oracle.exact(weight)
    ends = [oracle.rounded(normed * end, y.dtype) for end in (1 - error, 1 + error)]
    if weight is not None:
        ends = [oracle.rounded(end * factor, y.dtype) for end in ends]
    assert np.all((np.minimum(*ends) <= oracle.exact(y)) & (oracle.exact(y) <= np.maximum(*ends)))


def check_gradients(rng, x, weight):
    y = fused_rms_norm(x, weight, EPS)
    cotangent = normal(rng, y.shape, y.dtype)
    given = [x] if weight is None else [x, weight]
    grads = mx.vjp(lambda x, w=None: [fused_rms_norm(x, w, EPS)], given, [cotangent])[1]
    g, wide, factor = oracle.exact((cotangent, x, weight))
    d_x, d_weight = gradients_formula(g, wide, factor)
    r = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS)
    of_weight = np.abs(g * r * wide)
    size = np.abs(g * (1 if factor is None else factor))
    size = r * (size + np.abs(r * wide) * (size * np.abs(r * wide)).mean(-1, keepdims=True))
    assert [a.dtype for a in grads] == [a.dtype for a in given]
    oracle.assert_rounded(grads[0], d_x, 2 * root_error(x.shape[-1]) * size)
    if weight is not None:
        size = of_weight.reshape(-1, x.shape[-1]).sum(0)
        error = oracle.sum_error(size, len(of_weight), mx.float32) + root_error(x.shape[-1]) * size
        oracle.assert_rounded(grads[1], d_weight, error)


@dtypes
@weighted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(rng, shape, has_weight, dtype):
    x, weight = normal(rng, shape, dtype), normal(rng, shape[-1:], dtype) if has_weight else None
    check_forward(x, weight)
    check_gradients(rng, x, weight)


def test_the_formula_of_the_gradients(rng):
    """By differences of the norm's."""
    g, x, weight = rng.standard_normal((3, 5)), rng.standard_normal((3, 5)), rng.standard_normal(5)
    for given, expected in zip((x, weight), gradients_formula(g, x, weight), strict=True):
        for at in np.ndindex(given.shape):
            ends, value, step = [], given[at], 1e-6
            for end in (value - step, value + step):
                given[at] = end
                ends.append((g * formula(x, weight)).sum())
            given[at] = value
            assert abs((ends[1] - ends[0]) / (2 * step) - expected[at]) < 1e-8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_a_weight_of_another_dtype(rng, dtype, other):
    x, weight = normal(rng, (3, 20), dtype), normal(rng, (20,), other)
    check_forward(x, weight)
    check_gradients(rng, x, weight)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_of_nothing(shape):
    x, weight = mx.ones(shape), mx.ones(shape[-1:])
    assert fused_rms_norm(x, weight, EPS).shape == shape
    grads = mx.grad(lambda x, w: fused_rms_norm(x, w, EPS).sum(), (0, 1))(x, weight)
    oracle.assert_equal(grads, [mx.zeros(shape), mx.zeros(shape[-1:])])


@pytest.mark.parametrize("shape", [(2, 0, 32), (0, 3, 32)], ids=str)
def test_of_no_heads(shape):
    """Transposed, with strides that no copy changes."""
    x = mx.array(np.zeros(shape, np.float32)).reshape(*shape[:2], 2, 16).transpose(0, 2, 1, 3)
    weight = mx.ones(16)
    for given in (x, mx.contiguous(x)):
        assert fused_rms_norm(given, None, EPS).shape == x.shape
        grads = mx.grad(lambda x, w: fused_rms_norm(x, w, EPS).sum(), (0, 1))(given, weight)
        oracle.assert_equal(grads, [mx.zeros(x.shape), mx.zeros(16)])


VIEWS = {
    "transposed": lambda x: x.swapaxes(1, 2),
    "heads": lambda x: x.swapaxes(0, 2),
    "turned": lambda x: x.transpose(3, 2, 1, 0),
    "a window": lambda x: x[:, 1:, :, 2:],
    "half of the columns": lambda x: x[..., 16:],
    "reversed": lambda x: x[..., ::-1, ::-1],
    "every other": lambda x: x[:, ::2, :, ::2],
    "broadcast rows": lambda x: mx.broadcast_to(x[:1, :, :1], x.shape),
    "broadcast columns": lambda x: mx.broadcast_to(x[..., :1], x.shape),
}


@dtypes
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_layouts(rng, view, dtype):
    """A layout makes no difference, to any bit; of 16 or 32 columns rows in line are read together."""
    x, g = (view(normal(rng, (2, 5, 6, 32), dtype)) for _ in range(2))
    weight = normal(rng, (2 * x.shape[-1],), dtype)[::-2]
    plain = [mx.contiguous(a) for a in (x, weight)]
    for cotangent in (g, mx.contiguous(g)):
        results = [
            [a for part in mx.vjp(lambda x, w: [fused_rms_norm(x, w, EPS)], given, [cotangent]) for a in part]
            for given in ([x, weight], plain)
        ]
        oracle.assert_equal(*results)
    check_forward(x, weight)


def signs(x):
    """What of its values is NaN, infinite or 0, with signs."""
    x = oracle.exact(x)
    return np.where(np.isfinite(x), np.sign(x), x)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-20, 1e-18, 1e18, 1e20, 1e30])
@pytest.mark.parametrize("eps", [0.0, EPS])
def test_squares_that_over_and_underflow_do_as_mlxs(rng, eps, size, dtype):
    x = (normal(rng, (4, 100)) * size).astype(dtype)
    weight, g = normal(rng, (100,), dtype), normal(rng, (4, 100), dtype)
    ours, mlxs = (
        mx.vjp(lambda x, n=norm: [n(x, weight, eps)], [x], [g]) for norm in (fused_rms_norm, mx.fast.rms_norm)
    )
    np.testing.assert_array_equal(signs(ours[0][0]), signs(mlxs[0][0]))
    # Of gradients MLX makes NaN of infinity times 0, or not, by its order of operations.
    finite = np.isfinite(oracle.exact(mlxs[1][0]))
    assert np.isfinite(oracle.exact(ours[1][0])[finite]).all()
    assert finite.all() or eps == 0 or size > 1


def test_not_a_number_stays_in_its_row(rng):
    x = normal(rng, (5, 40))
    expected = fused_rms_norm(x, None, EPS)
    for value in (mx.nan, mx.inf, -mx.inf):
        wrong = mx.array(x)
        wrong[2, 7] = value
        ours, mlxs = (norm(wrong, None, EPS) for norm in (fused_rms_norm, mx.fast.rms_norm))
        np.testing.assert_array_equal(signs(ours), signs(mlxs))
        oracle.assert_equal(ours[mx.array([0, 1, 3, 4])], expected[mx.array([0, 1, 3, 4])])


def loss(norm):
    return lambda x, w, eps=EPS: (norm(x, w, eps) ** 3 * mx.arange(x.shape[-1])).sum()


TRANSFORMS = {
    "grad": lambda f: mx.grad(f, (0, 1)),
    "compile of grad": lambda f: mx.compile(mx.grad(f, (0, 1))),
    "grad of compile": lambda f: mx.grad(mx.compile(f), (0, 1)),
    "grad of checkpoint": lambda f: mx.grad(mx.checkpoint(f), (0, 1)),
    "of the weight alone": lambda f: mx.grad(f, 1),
    "grad of grad": lambda f: mx.grad(
        lambda x, w: sum((g**2).sum() for g in mx.grad(f, (0, 1))(x, w)), (0, 1)
    ),
    "jvp": lambda f: lambda x, w: mx.jvp(f, [x, w], [w + x, x[0] * w])[1],
    "jvp of grad": lambda f: lambda x, w: mx.jvp(mx.grad(f), [x, w], [w + x, x[0] * w])[1],
    "vmap": lambda f: lambda x, w: mx.vmap(f, (1, None))(mx.stack([x, 2 * x, w * x], 1), w),
    "vmap of both": lambda f: lambda x, w: mx.vmap(f, (0, 1))(mx.stack([x, w * x]), mx.stack([w, x[0]], 1)),
    "vmap of grad": lambda f: lambda x, w: mx.vmap(mx.grad(f, (0, 1)), (0, None))(mx.stack([x, w * x]), w),
    "compile without shapes": lambda f: mx.compile(mx.grad(f, (0, 1)), shapeless=True),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_those_of_mlxs_norm(rng, transform):
    x, weight = normal(rng, (3, 30)), normal(rng, (30,))
    results = [oracle.leaves(transform(loss(norm))(x, weight)) for norm in (fused_rms_norm, mx.fast.rms_norm)]
    for ours, mlxs in zip(*results, strict=True):
        size = float(mx.abs(mlxs).max())
        assert size > 0 and float(mx.abs(ours - mlxs).max()) < 2.0**-17 * size


def test_equal_norms_merge_and_others_do_not(rng):
    x, weight = normal(rng, (3, 30)), normal(rng, (30,))

    def norms(x, w):
        return sum(fused_rms_norm(x, *of) for of in ((w, EPS), (w, EPS), (w, 1.0), (None, 1.0)))

    compiled = mx.compile(norms)(x, weight)
    assert primitives(compiled)["FusedRMSNorm"] == 3
    oracle.assert_equal(compiled, norms(x, weight))


def test_equal_gradients_merge_and_others_do_not(rng):
    x, weight = normal(rng, (3, 30)), normal(rng, (30,))

    def gradients(x, w, g):
        """Of x, of the weight, and of both."""
        of_x, of_weight = mx.zeros_like(x), mx.zeros_like(w)
        for eps in (EPS, EPS, 1.0):

            def norm(x=x, w=w, eps=eps):
                return [fused_rms_norm(x, w, eps)]

            d_x, d_weight = mx.vjp(norm, [x, w], [g])[1]
            of_x += d_x + 2 * mx.vjp(norm, [x], [g])[1][0]
            of_weight += d_weight + 2 * mx.vjp(lambda w, f=norm: f(w=w), [w], [g])[1][0]
        return of_x, of_weight

    compiled = mx.compile(gradients)(x, weight, x)
    assert primitives(*compiled)["FusedRMSNormGrad"] == 2 + 2 * 3  # with several outputs none merges
    oracle.assert_equal(compiled, gradients(x, weight, x))


def test_one_node_each_way_and_no_gradient_that_is_not_wanted(rng):
    x, weight = normal(rng, (3, 30)), normal(rng, (30,))
    mx.eval(x, weight)
    assert primitives(fused_rms_norm(x, weight, EPS)) == {"FusedRMSNorm": 1}
    for argnums, count in ((0, 1), ((0, 1), 2)):
        grads = mx.grad(lambda x, w: (2 * fused_rms_norm(x, w, EPS)).sum(), argnums)(x, weight)
        assert output_counts("FusedRMSNormGrad", *oracle.leaves(grads)) == [count]


class Layers:
    """A norm and a projection after it, some times over, all of whose weights are trained."""

    size = 256
    kept_per_token = 4 * size  # what is normed

    def __init__(self, count, tokens):
        rng = np.random.default_rng(0)
        self.x, self.count = normal(rng, (1, tokens, self.size)), count
        self.weights = [normal(rng, s) for s in [(self.size,)] * count + [(self.size, self.size)] * count]
        mx.eval(self.x, self.weights)

    def loss(self, *weights):
        x = self.x
        for norm, weight in zip(weights[: self.count], weights[self.count :], strict=True):
            x = mlx_fused.fused_linear(x, weight, norm=(norm, EPS))
        return x.mean()

    def kept(self):
        return kept(self.loss, self.weights)


def test_the_backward_pass_keeps_what_is_normed_alone():
    few, many = (Layers(n, 128).kept() - Layers(n, 64).kept() for n in (3, 4))
    assert (many - few) / 64 == Layers.kept_per_token


def test_a_compiled_step_keeps_no_norm():
    """Or it would merge the forward's norms with those that are made again."""
    layers = Layers(3, 8)
    step = mx.compile(mx.value_and_grad(layers.loss, tuple(range(6))))
    assert primitives(*oracle.leaves(step(*layers.weights)))["FusedRMSNorm"] == 2 * 3


def test_any_number_of_threads_gives_the_same_bits():
    code = """
import hashlib, mlx.core as mx, numpy as np, mlx_fused
rng = np.random.default_rng(0)
x, w, g = (mx.array(rng.standard_normal(s), dtype=mx.float32) for s in ((900, 300), (300,), (900, 300)))
norm = lambda x, w: [mlx_fused.fused_rms_norm(x, w, 1e-5)]
(y,), grads = mx.vjp(norm, [x, w], [g])
for a in (y, *grads):
    print(hashlib.sha256(np.array(a).tobytes()).hexdigest())
"""
    assert same_with_any_threads(code).count("\n") == 3


@dtypes
def test_in_threads(dtype):
    def work(rng):
        for shape in ((1, 2048), (300, 64), (70, 1000)):
            x, weight = normal(rng, shape, dtype), normal(rng, shape[-1:], dtype)
            check_forward(x, weight)
            check_gradients(rng, x, weight)

    in_threads(work)


def test_an_unusable_number_of_threads_is_an_error_at_the_call():
    code = "import mlx.core as mx, mlx_fused; mlx_fused.fused_rms_norm(mx.ones(3), None, 1e-5)"
    environment = os.environ | {"MLX_FUSED_NUM_THREADS": "two"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert "MLX_FUSED_NUM_THREADS must be a number from 1 to 1024 but got 'two'." in run.stderr


def test_other_dtypes_are_mlxs(rng):
    x = normal(rng, (3, 30), mx.float64)
    with mx.stream(mx.cpu):
        assert primitives(fused_rms_norm(x, None, EPS)) == primitives(mx.fast.rms_norm(x, None, EPS))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": mx.array(1.0)}, ValueError, r"x must have shape \[..., K\] but got \(\)"),
        (
            {"x": mx.ones((2, 3), mx.int32)},
            ValueError,
            "x must be float32, float16 or bfloat16 but got int32",
        ),
        ({"x": None}, TypeError, "x must be array but got NoneType"),
        ({"weight": mx.ones(4)}, ValueError, r"weight must have shape \(3,\) but got \(4,\)"),
        ({"weight": mx.ones((1, 3))}, ValueError, r"weight must have shape \(3,\) but got \(1, 3\)"),
        ({"weight": mx.ones(3, mx.int32)}, ValueError, "weight must be float32, float16 or bfloat16 but"),
        ({"weight": 1.0}, TypeError, "weight must be array but got float"),
        ({"eps": "1"}, TypeError, "eps must be float or int but got str"),
        ({"eps": None}, TypeError, "eps must be float or int but got NoneType"),
        ({"stream": "cpu"}, TypeError, "stream must be Stream or Device or DeviceType but got str"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=rf"\[fused_rms_norm\] {message}"):
        fused_rms_norm(**{"x": mx.ones((2, 3)), "weight": mx.ones(3), "eps": EPS} | changes)
