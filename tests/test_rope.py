"""Rotary positions."""

import mlx.core as mx
import numpy as np
import pytest

import oracle
from graph import primitives
from mlx_fused import _ext, fused_rope
from operands import DTYPES, normal
from test_threads import in_threads, same_with_any_threads

BASE = 10000.0
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ways = pytest.mark.parametrize("traditional", [False, True], ids=["halves", "neighbours"])
# Heads or none, one place and more than are worked on at once, all of a head and less, one pair.
SHAPES = [
    ((2, 3, 5, 64), 64),
    ((2, 3, 5, 64), 22),
    ((1, 32, 1, 128), 128),
    ((2, 2, 300, 32), 32),
    ((3, 7, 10), 6),
    ((1, 1, 4, 2), 2),
    ((2, 1, 3, 256), 256),
]
FAR = [0, 7, 1_000_000, -3]


def angles(places, dims, base=BASE, scale=1.0, freqs=None):
    """[..., dims / 2]"""
    half = dims // 2
    frequency = base ** (-np.arange(half) / half) if freqs is None else 1 / freqs
    return scale * places[..., None] * frequency


def formula(x, dims, traditional, angle):
    """``angle`` is [batch or 1, places, dims / 2]; x is [batch, (heads,) places, head_dim]."""
    if x.ndim == 4:
        angle = angle[:, None]
    x, half = x.copy(), dims // 2
    first, second = np.s_[..., 0:dims:2], np.s_[..., 1:dims:2]
    if not traditional:
        first, second = np.s_[..., :half], np.s_[..., half:dims]
    a, b, c, s = x[first], x[second], np.cos(angle), np.sin(angle)
    x[first], x[second] = a * c - b * s, a * s + b * c
    return x


def places_of(x, offset=0):
    return (np.reshape(offset, (-1, 1)) + np.arange(x.shape[-2])).astype(np.float64)


def check(x, dims, traditional, offset=0, **options):
    """Rounded once, from what float32 makes of two products with a sine that is off by two roundings."""
    y = fused_rope(x, dims, traditional=traditional, offset=offset, **options)
    freqs = options.pop("freqs", None)
    given = {k: float(np.float32(v)) for k, v in options.items()}  # scale and base, as float32
    angle = angles(places_of(x, oracle.exact(offset)), dims, freqs=oracle.exact(freqs), **given)
    wide = oracle.exact(x)
    size = formula(np.abs(wide), dims, traditional, 0 * angle)
    partner = formula(np.abs(wide), dims, traditional, 0 * angle + np.pi / 2)
    assert y.shape == x.shape and y.dtype == x.dtype
    error = 4 * oracle.UNIT_ROUNDOFF[mx.float32] * (size + np.abs(partner))
    oracle.assert_rounded(y, formula(wide, dims, traditional, angle), error)


@dtypes
@ways
@pytest.mark.parametrize("offset", FAR)
@pytest.mark.parametrize(("shape", "dims"), SHAPES, ids=str)
def test_values(rng, shape, dims, offset, traditional, dtype):
    check(normal(rng, shape, dtype), dims, traditional, offset)


@ways
@pytest.mark.parametrize(
    "options", [{"base": 500000.0}, {"scale": 0.125}, {"base": 7.5, "scale": -3.0}], ids=str
)
def test_base_and_scale(rng, options, traditional):
    check(normal(rng, (2, 3, 9, 64)), 64, traditional, 1234, **options)


@dtypes
@ways
def test_frequencies(rng, traditional, dtype):
    freqs = mx.array(rng.uniform(0.5, 1e4, 32), dtype=dtype)
    for given in (freqs, mx.repeat(freqs, 2)[::-2]):
        check(normal(rng, (2, 3, 9, 64)), 64, traditional, 77, freqs=given)


def test_infinite_frequencies_do_not_rotate(rng):
    x = normal(rng, (1, 2, 5, 8))
    y = fused_rope(x, 8, freqs=mx.array([1.0, mx.inf, 2.0, mx.inf]))
    oracle.assert_equal(y[..., [1, 3, 5, 7]], x[..., [1, 3, 5, 7]])
    assert not mx.array_equal(y, x)


@ways
@pytest.mark.parametrize("kind", [mx.int32, mx.int64, mx.uint8], ids=str)
def test_offsets_of_a_batch(rng, kind, traditional):
    x = normal(rng, (3, 2, 4, 16))
    offsets = mx.array([5, 0, 200], kind)
    for given in (offsets, offsets[:1], offsets[2], mx.array([5, 9, 0, 9, 200, 9], kind)[::2]):
        check(x, 16, traditional, given)


VIEWS = {
    "heads apart": lambda x: x.swapaxes(1, 2),
    "turned": lambda x: x.transpose(3, 2, 1, 0),
    "a window": lambda x: x[:, 1:, :, 2:],
    "reversed": lambda x: x[:, ::-1, ::-1, ::-1],
    "every other": lambda x: x[:, ::2, :, ::2],
    "broadcast": lambda x: mx.broadcast_to(x[:1, :, :1], x.shape),
}


@dtypes
@ways
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_layouts(rng, view, traditional, dtype):
    """A layout makes no difference, to any bit."""
    x = view(normal(rng, (8, 6, 6, 8), dtype))
    dims = x.shape[-1] // 2 * 2
    call = [fused_rope(a, dims, traditional=traditional, offset=3) for a in (x, mx.contiguous(x))]
    oracle.assert_equal(*call)
    check(x, dims, traditional, 3)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (1, 0, 3, 8), (1, 2, 0, 8), (2, 0, 8)], ids=str)
def test_of_nothing(shape):
    x = mx.ones(shape)
    assert fused_rope(x, 8).shape == shape
    assert mx.grad(lambda x: fused_rope(x, 8).sum())(x).shape == shape


def test_not_a_number_stays_in_its_pair(rng):
    x = normal(rng, (1, 2, 5, 8))
    expected = fused_rope(x, 6)
    for value in (mx.nan, mx.inf, -mx.inf):
        wrong = mx.array(x)
        wrong[0, 1, 2, 4] = value
        y, pair = np.array(fused_rope(wrong, 6)), np.zeros(x.shape, bool)
        pair[0, 1, 2, [1, 4]] = True
        assert not np.isfinite(y[pair]).any()
        np.testing.assert_array_equal(y[~pair], np.array(expected)[~pair])


@dtypes
@ways
@pytest.mark.parametrize("dims", [64, 22])
def test_gradient_is_the_cotangent_rotated_back(rng, dims, traditional, dtype):
    x, g = normal(rng, (2, 3, 5, 64), dtype), normal(rng, (2, 3, 5, 64), dtype)
    offsets = mx.array([4, 90])
    (d_x,) = mx.vjp(lambda x: [fused_rope(x, dims, traditional=traditional, offset=offsets)], [x], [g])[1]
    angle = angles(places_of(x, np.array(offsets)), dims)
    wide = oracle.exact(g)
    size = 4 * oracle.UNIT_ROUNDOFF[mx.float32] * 2 * np.abs(wide).max()
    assert d_x.dtype == dtype
    oracle.assert_rounded(d_x, formula(wide, dims, traditional, -angle), size)
    # What the formula rotates back is what it rotated.
    back = formula(formula(wide, dims, traditional, angle), dims, traditional, -angle)
    np.testing.assert_allclose(back, wide, rtol=0, atol=1e-12)


def test_the_formula_of_the_gradient(rng):
    """By differences of the rotation's."""
    x, g = rng.standard_normal((1, 1, 2, 6)), rng.standard_normal((1, 1, 2, 6))
    angle = angles(places_of(x, 3), 6)
    expected, step = formula(g, 6, True, -angle), 1e-6
    for at in np.ndindex(x.shape):
        ends = []
        for moved in (-step, step):
            other = x.copy()
            other[at] += moved
            ends.append((g * formula(other, 6, True, angle)).sum())
        assert abs((ends[1] - ends[0]) / (2 * step) - expected[at]) < 1e-8


def loss(rope, x, freqs, offset):
    return (rope(x, freqs, offset) ** 3 * mx.arange(x.shape[-1])).sum()


def ours(x, freqs, offset):
    return fused_rope(x, 8, freqs=freqs, offset=offset)


def mlxs(x, freqs, offset):
    return mx.fast.rope(x, 8, traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs)


TRANSFORMS = {
    "grad": lambda f, o: lambda x, w: mx.grad(f)(x, w, o),
    "compile of grad": lambda f, o: lambda x, w: mx.compile(mx.grad(f))(x, w, o),
    "grad of compile": lambda f, o: lambda x, w: mx.grad(mx.compile(f))(x, w, o),
    "grad of checkpoint": lambda f, o: lambda x, w: mx.grad(mx.checkpoint(f))(x, w, o),
    "of the frequencies": lambda f, o: lambda x, w: mx.grad(f, 1)(x, w, o),
    "of both": lambda f, o: lambda x, w: mx.grad(f, (0, 1))(x, w, o),
    "grad of grad": lambda f, o: mx.grad(lambda x, w: (mx.grad(f)(x, w, o) ** 2).sum()),
    "jvp": lambda f, o: lambda x, w: mx.jvp(lambda x, w: f(x, w, o), [x, w], [2 * x, w])[1],
    "jvp of grad": lambda f, o: lambda x, w: mx.jvp(lambda x: mx.grad(f)(x, w, o), [x], [x + 1])[1],
    "vmap": lambda f, o: lambda x, w: mx.vmap(lambda x: f(x, w, o), 1)(mx.stack([x, 2 * x], 1)),
    "vmap of grad": lambda f, o: lambda x, w: mx.vmap(mx.grad(lambda x: f(x, w, o)))(mx.stack([x, 2 * x])),
    "vmap of frequencies": lambda f, o: lambda x, w: mx.vmap(lambda w: f(x, w, o))(mx.stack([w, 2 * w])),
}


@pytest.mark.parametrize("offset", [3, mx.array(3), mx.array([3, 40])], ids=["int", "array", "batch"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_those_of_mlxs(rng, transform, offset):
    x, freqs = normal(rng, (2, 3, 5, 10)), mx.array(rng.uniform(0.5, 100, 4), dtype=mx.float32)
    results = []
    for rope in (ours, mlxs):
        results.append(oracle.leaves(transform(lambda *a, f=rope: loss(f, *a), offset)(x, freqs)))
    for a, b in zip(*results, strict=True):
        size = float(mx.abs(b).max())
        assert size > 0 and float(mx.abs(a - b).max()) < 2.0**-16 * size


def test_compiled_without_shapes_takes_other_lengths(rng):
    """MLX's own cannot be compiled so."""

    def both(x):
        return mx.value_and_grad(lambda x: (fused_rope(x, 8, offset=2) ** 2 * x).sum())(x)

    compiled = mx.compile(both, shapeless=True)
    for length in (3, 1, 70):
        x = normal(rng, (1, 2, length, 8))
        oracle.assert_equal(compiled(x)[1], both(x)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, o, f: (mx.ones((6, 2, 3, 8)), o, f), "offset must have shape"),
        (lambda x, o, f: (x[..., :4], o, f), "dims must be even, greater than 0 and at most 4 but got 8"),
        (lambda x, o, f: (x, o, f[:2]), r"freqs must have shape \(4,\)"),
    ],
)
def test_compiled_without_shapes_checks_them(change, message):
    compiled = mx.compile(lambda x, o, f: fused_rope(x, 8, offset=o, freqs=f), shapeless=True)
    given = mx.ones((2, 2, 3, 8)), mx.array([1, 2]), mx.ones(4)
    mx.eval(compiled(*given))
    with pytest.raises(ValueError, match=message):
        compiled(*change(*given))


def split(x, heads, weight=None, norm=None, seen=lambda x: x):
    """Queries as models make them of a projection; ``norm`` tells whether they are normed before or after the
    heads are the second axis. ``seen`` is called with every array on the way."""
    x = seen(x.reshape(*x.shape[:2], heads, x.shape[2] // heads))
    x = seen(_ext.rms_norm(x, weight, 1e-3, None)) if norm == "before" else x
    x = seen(x.transpose(0, 2, 1, 3))
    return seen(_ext.rms_norm(x, weight, 1e-3, None)) if norm == "after" else x


def evaluated(x):
    mx.eval(x)
    return x


norms = pytest.mark.parametrize("norm", [None, "before", "after"])
PROJECTIONS = [
    (1, 1, 4, 64),
    (2, 5, 3, 32),
    (1, 300, 8, 128),
    (3, 1, 2, 18),
    (2, 3, 1, 8),
    (0, 3, 2, 8),
    (2, 0, 2, 8),
]


@dtypes
@ways
@norms
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", PROJECTIONS, ids=str)
def test_takes_over_what_splits_and_norms_a_projection(rng, shape, weighted, norm, traditional, dtype):
    """To the bit what it is of the array itself."""
    *rows, heads, size = shape
    x, weight = normal(rng, (*rows, heads * size), dtype), normal(rng, (size,), dtype) if weighted else None
    mx.eval(x, weight)
    options = {"dims": size // 4 * 2, "traditional": traditional, "offset": mx.array([7])}
    options["freqs"] = mx.array(rng.uniform(0.5, 100, size // 4), dtype=mx.float32) if weighted else None
    mx.eval(*(o for o in options.values() if isinstance(o, mx.array)))
    y = fused_rope(split(x, heads, weight, norm), **options)
    assert {k: n for k, n in primitives(y).items() if k != "AsType"} == {"FusedRope": 1}
    oracle.assert_equal(y, fused_rope(split(x, heads, weight, norm, evaluated), **options))


@norms
def test_takes_over_a_projection_of_any_layout(rng, norm):
    whole, weight = normal(rng, (4, 6, 2 * 3 * 16)), normal(rng, (16,))
    for x in (whole[:, :, :48], whole[::2, ::-1, 48:], whole.swapaxes(0, 1)[..., ::2]):
        mx.eval(x, weight)
        y = fused_rope(split(x, 3, weight, norm), 16, offset=3)
        assert primitives(y) == {"FusedRope": 1}
        oracle.assert_equal(y, fused_rope(split(x, 3, weight, norm, evaluated), 16, offset=3))


def test_what_it_took_over_stays_what_it_was(rng):
    x, weight = normal(rng, (2, 5, 48)), normal(rng, (16,))
    q = split(x, 3, weight, "before")
    y = fused_rope(q, 16)
    expected = split(x, 3, weight, "before", evaluated)
    oracle.assert_equal(y, fused_rope(expected, 16))
    oracle.assert_equal(q, expected)


NOT_TAKEN = {
    "evaluated": lambda x, w: evaluated(split(x, 3, w, "before")),
    "other axes": lambda x, w: x.reshape(2, 5, 3, 16).transpose(0, 2, 3, 1),
    "other axes twice": lambda x, w: x.reshape(2, 5, 3, 16).transpose(0, 2, 1, 3).transpose(1, 0, 2, 3),
    "not a split": lambda x, w: x.reshape(2, 3, 5, 16).transpose(0, 2, 1, 3),
    "of four axes": lambda x, w: x.reshape(2, 5, 6, 8).reshape(2, 5, 3, 16).transpose(0, 2, 1, 3),
    "not transposed": lambda x, w: x.reshape(2, 5, 3, 16),
    "no heads": lambda x, w: _ext.rms_norm(x, None, 1e-5, None),
    "another dtype": lambda x, w: split(x.astype(mx.bfloat16), 3, w, "before"),
    "converted": lambda x, w: split(x, 3, w).astype(mx.bfloat16),
    "normed twice": lambda x, w: _ext.rms_norm(split(x, 3, w, "before"), w, 1e-5, None),
    "changed": lambda x, w: split(x, 3, w, "before", lambda x: x + 1),
}


@pytest.mark.parametrize("make", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_takes_over_nothing_else(rng, make):
    x, weight = normal(rng, (2, 5, 48)), normal(rng, (16,))
    oracle.assert_equal(fused_rope(make(x, weight), 4), fused_rope(evaluated(make(x, weight)), 4))


@pytest.mark.parametrize("shape", [(0, 3, 5), (0, 3, 48), (2, 0, 7)], ids=str)
def test_takes_over_no_empty_array_of_another_size(shape):
    """Which may be reshaped to anything."""
    heads = mx.zeros(shape).reshape(*shape[:2], 2, 8).transpose(0, 2, 1, 3)
    assert fused_rope(heads, 4).shape == heads.shape


@norms
def test_a_transform_sees_every_operation(rng, norm):
    x, weight, offset = normal(rng, (2, 5, 48)), normal(rng, (16,)), mx.array([3, 9])

    def ours(x, weight, offset):
        return (fused_rope(split(x, 3, weight, norm), 16, offset=offset) ** 3).sum()

    def apart(x, weight, offset):
        y = mx.contiguous(split(x, 3, weight, norm))
        return (mx.fast.rope(y, 16, traditional=False, base=BASE, scale=1.0, offset=offset) ** 3).sum()

    argnums = (0, 1) if norm else 0
    for transform in (lambda f: mx.grad(f, argnums), lambda f: mx.compile(mx.grad(f, argnums)), mx.compile):
        results = [oracle.leaves(transform(f)(x, weight, offset)) for f in (ours, apart)]
        for a, b in zip(*results, strict=True):
            assert float(mx.abs(a - b).max()) < 2.0**-16 * float(mx.abs(b).max())
    compiled = mx.compile(lambda x: fused_rope(split(x, 3, weight, norm), 16))
    assert primitives(compiled(x))["Transpose"] == 1
    mapped = mx.vmap(lambda o: fused_rope(split(x, 3, weight, norm), 16, offset=o))(mx.array([1, 8]))
    for i, o in enumerate((1, 8)):
        one = fused_rope(split(x, 3, weight, norm, evaluated), 16, offset=o)
        assert float(mx.abs(mapped[i] - one).max()) < 2.0**-16 * float(mx.abs(one).max())


@norms
def test_transforms_of_what_took_over(rng, norm):
    """By the frequencies and the offsets, while x is a constant."""
    x, weight, freqs = (
        normal(rng, (2, 5, 48)),
        normal(rng, (16,)),
        mx.array(rng.uniform(0.5, 9, 8), mx.float32),
    )
    mx.eval(x, weight, freqs)

    def both(transform):
        ways = (lambda x: x, evaluated)
        return [
            transform(lambda f, o=3, s=s: fused_rope(split(x, 3, weight, norm, s), 16, freqs=f, offset=o))
            for s in ways
        ]

    for transform in (
        lambda f: mx.jvp(f, [freqs], [2 * freqs])[1][0],
        lambda f: mx.vjp(f, [freqs], [mx.ones((2, 3, 5, 16))])[1][0],
        lambda f: mx.grad(lambda w: (f(w) ** 3).sum())(freqs),
        lambda f: mx.compile(mx.grad(lambda w: (f(w) ** 3).sum()))(freqs),
        lambda f: mx.compile(f)(freqs),
        lambda f: mx.vmap(f)(mx.stack([freqs, 2 * freqs])),
        lambda f: mx.vmap(mx.vmap(f, (0, None)), (None, 0))(mx.stack([freqs, 2 * freqs]), mx.array([1, 8])),
    ):
        ours, apart = both(transform)
        assert mx.any(apart)
        oracle.assert_equal(ours, apart)


def test_offsets_beyond_32_bits(rng):
    x, offset = normal(rng, (1, 2, 3, 8)), 3_000_000_000
    expected = formula(oracle.exact(x), 8, False, angles(places_of(x, offset), 8))
    for kind in (mx.uint32, mx.int64):
        # In double precision a radian of this place has nine digits left.
        y = fused_rope(x, 8, offset=mx.array([offset], kind))
        np.testing.assert_allclose(oracle.exact(y), expected, rtol=0, atol=1e-5)


def test_equal_rotations_merge_and_others_do_not(rng):
    x = normal(rng, (1, 2, 3, 8))
    kinds = [{}, {}, {"offset": 1}, {"base": 5.0}, {"scale": 2.0}, {"traditional": True}]

    def rotations(x):
        return sum(fused_rope(x, 8, **kind) for kind in kinds) + fused_rope(x, 6)

    compiled = mx.compile(rotations)(x)
    assert primitives(compiled)["FusedRope"] == 6
    oracle.assert_equal(compiled, rotations(x))


def test_one_node_each_way(rng):
    x = normal(rng, (1, 2, 3, 8))
    mx.eval(x)
    assert primitives(fused_rope(x, 8)) == {"FusedRope": 1}
    gradient = mx.grad(lambda x: (2 * fused_rope(x, 8)).sum())(x)
    assert primitives(gradient)["FusedRope"] == 1


@dtypes
def test_in_threads(dtype):
    def work(rng):
        for shape in ((1, 8, 1, 64), (2, 4, 300, 32)):
            check(normal(rng, shape, dtype), 32, False, 9)

    in_threads(work)


def test_any_number_of_threads_gives_the_same_bits():
    code = """
import hashlib, mlx.core as mx, numpy as np, mlx_fused
x = mx.array(np.random.default_rng(0).standard_normal((2, 4, 300, 64)), dtype=mx.float32)
print(hashlib.sha256(np.array(mlx_fused.fused_rope(x, 64, offset=5)).tobytes()).hexdigest())
"""
    assert same_with_any_threads(code).count("\n") == 1


def test_what_is_mlxs(rng):
    with mx.stream(mx.cpu):
        for x in (normal(rng, (1, 2, 3, 8), mx.float64), normal(rng, (1, 2, 2, 3, 8))):
            assert "FusedRope" not in primitives(fused_rope(x, 8))
            expected = mx.fast.rope(x, 8, traditional=False, base=BASE, scale=1.0, offset=0)
            oracle.assert_equal(fused_rope(x, 8), expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": mx.ones((3, 8))}, ValueError, "x must have at least 3 dimensions but got 2"),
        ({"x": mx.ones((1, 3, 8), mx.int32)}, ValueError, "x must be float32, float16 or bfloat16 but got"),
        ({"x": None}, TypeError, "x must be array but got NoneType"),
        ({"dims": 7}, ValueError, "dims must be even, greater than 0 and at most 8 but got 7"),
        ({"dims": 0}, ValueError, "dims must be even, greater than 0 and at most 8 but got 0"),
        ({"dims": 10}, ValueError, "dims must be even, greater than 0 and at most 8 but got 10"),
        ({"dims": 8.0}, TypeError, "dims must be int but got float"),
        ({"base": 0}, ValueError, "base must be greater than 0 and finite but got 0"),
        ({"base": -2.0}, ValueError, "base must be greater than 0 and finite but got -2"),
        ({"base": mx.inf}, ValueError, "base must be greater than 0 and finite but got inf"),
        ({"base": mx.nan}, ValueError, "base must be greater than 0 and finite but got nan"),
        ({"base": mx.array(2.0)}, TypeError, "base must be float or int but got array"),
        (
            {"base": 2.0, "freqs": mx.ones(4)},
            ValueError,
            "base must be left out where freqs is given but got 2",
        ),
        ({"freqs": mx.ones(3)}, ValueError, r"freqs must have shape \(4,\) but got \(3,\)"),
        ({"freqs": mx.ones(4, mx.int32)}, ValueError, "freqs must be float32"),
        ({"freqs": [1.0]}, TypeError, "freqs must be array but got list"),
        ({"offset": 1.0}, TypeError, "offset must be int or array but got float"),
        ({"offset": mx.array(1.0)}, ValueError, "offset must be integers but got float32"),
        ({"offset": mx.array([1, 2])}, ValueError, r"offset must have shape \(\) or \(1,\) but got \(2\)"),
        ({"offset": mx.array([[1]])}, ValueError, r"offset must have shape \(\) or \(1,\) but got \(1,1\)"),
        ({"scale": "1"}, TypeError, "scale must be float or int but got str"),
        ({"traditional": 1}, TypeError, "traditional must be bool but got int"),
        ({"stream": "cpu"}, TypeError, "stream must be Stream or Device or DeviceType but got str"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=rf"\[fused_rope\] {message}"):
        fused_rope(**{"x": mx.ones((1, 3, 8)), "dims": 8} | changes)
