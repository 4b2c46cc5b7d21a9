"""Attention as an operation of its own."""

import gc
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import oracle
from attention import MASKS, Attention, check, make
from graph import output_counts, primitives
from mlx_fused import fused_attention
from operands import DTYPES, normal
from test_threads import in_threads, same_with_any_threads

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Queries and keys: around panels of queries, blocks of vectors, few queries and parts of their keys.
LENGTHS = [
    (1, 1),
    (1, 7),
    (3, 1030),
    (8, 300),
    (9, 9),
    (20, 7),
    (47, 48),
    (48, 47),
    (49, 130),
    (51, 531),
    (150, 150),
]
# Query heads, key heads, and the sizes of queries and values.
HEADS = [(1, 1, 64, 64), (4, 2, 5, 33), (6, 1, 1, 1), (2, 2, 80, 7), (3, 3, 7, 130), (2, 1, 256, 256)]


@dtypes
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_and_masks(rng, lengths, mask, dtype):
    for has_sinks in (False, True):
        check(rng, make(rng, 2, (4, 2, 20, 12), lengths, mask, dtype, has_sinks))


@dtypes
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads(rng, heads, dtype):
    for lengths in ((2, 30), (50, 60)):
        check(rng, make(rng, 1, heads, lengths, "causal", dtype))


@pytest.mark.parametrize("mask", MASKS)
def test_the_formula_is_that_of_mlx(rng, mask):
    """Also of queries that see no key. MLX's float64 has the exponential function of float32."""
    for lengths in ((5, 7), (7, 5)):
        for has_sinks in (False, True):
            call = make(rng, 2, (4, 2, 4, 5), lengths, mask, mx.float64, has_sinks)
            out = call.of_mlx(*call.primals)
            cotangent = normal(rng, out.shape, mx.float64)
            grads = mx.vjp(lambda *a, c=call: [c.of_mlx(*a)], call.primals, [cotangent])[1]
            for ours, mlxs in zip(call.formula(cotangent), [out, *grads], strict=True):
                mlxs = oracle.exact(mlxs)
                is_number = np.isfinite(mlxs)  # not where all scores are -inf
                assert is_number.any()
                size = np.abs(mlxs[is_number]).max()
                np.testing.assert_allclose(ours[is_number], mlxs[is_number], 0, 2.0**-19 * size)


def test_the_gradients_are_differences(rng):
    call = make(rng, 1, (2, 1, 3, 2), (4, 5), "causal", mx.float64, has_sinks=True)
    cotangent = normal(rng, (1, 2, 4, 2), mx.float64)
    values = [np.array(a) for a in call.primals]
    for of, grad in zip(values, call.formula(cotangent)[1:], strict=True):
        for at in np.ndindex(of.shape):
            ends, value, step = [], of[at], 1e-6
            for end in (value - step, value + step):
                of[at] = end
                out = call.with_primals([mx.array(a, dtype=mx.float64) for a in values]).formula(cotangent)[0]
                ends.append((oracle.exact(cotangent) * out).sum())
            of[at] = value
            assert abs((ends[1] - ends[0]) / (2 * step) - grad[at]) < 1e-8


@pytest.mark.parametrize("mask", ["none", "causal", "boolean"])
@pytest.mark.parametrize("queries", [1, 20])
def test_of_nothing(rng, queries, mask):
    for batch, heads, lengths in (
        (0, (2, 1, 4, 4), (queries, 3)),
        (1, (2, 1, 4, 4), (0, 3)),
        (1, (2, 1, 4, 0), (queries, 3)),
        (1, (2, 1, 0, 4), (queries, 3)),
    ):
        check(rng, make(rng, batch, heads, lengths, mask, mx.float32, has_sinks=True))
    for has_sinks in (False, True):
        call = make(rng, 1, (2, 1, 4, 3), (queries, 0), mask, mx.float32, has_sinks)
        oracle.assert_equal(call(), mx.zeros((1, 2, queries, 3)))
        oracle.assert_equal(
            call.gradients(mx.ones((1, 2, queries, 3))), [mx.zeros_like(a) for a in call.primals]
        )


VIEWS = {
    "by place": lambda a: a.swapaxes(1, 2),
    "transposed": lambda a: a.swapaxes(2, 3),
    "turned": lambda a: a.transpose(3, 2, 1, 0),
    "a window": lambda a: a[:, :, 1:, 1:],
    "reversed": lambda a: a[:, ::-1, ::-1, ::-1],
    "every other": lambda a: a[:, :, ::2, ::2],
    "broadcast": lambda a: mx.broadcast_to(a[:1, :1, :1], a.shape),
    "broadcast columns": lambda a: mx.broadcast_to(a[..., :1], a.shape),
}


@dtypes
@pytest.mark.parametrize("queries", [4, 20], ids=["few", "many"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_layouts(rng, view, queries, dtype):
    """A layout makes no difference, to any bit."""
    q, k, v = (view(normal(rng, (20, 20, 20, 20), dtype)) for _ in range(3))
    q = q[:, :, :queries]
    g, mask = (view(normal(rng, (20, 20, 20, 20), dtype))[:, :, :queries] for _ in range(2))
    g, mask = g[..., : v.shape[3]], mask[..., : k.shape[2]]
    results = []
    for arrays in ([q, k, v, g, mask], [mx.contiguous(a) for a in (q, k, v, g, mask)]):
        *primals, cotangent, added = arrays
        for m in (added, added > 0):
            out, grads = mx.vjp(
                lambda *a, m=m: [fused_attention(*a, scale=0.3, mask=m)], primals, [cotangent]
            )
            results.append([*out, *grads])
    oracle.assert_equal(results[:2], results[2:])


def test_heads_of_the_result_lie_side_by_side(rng):
    for queries in (1, 4, 20):
        out = make(rng, 2, (4, 2, 8, 8), (queries, 30), "none", mx.float32)()
        mx.eval(out)
        before = held_now()
        line = out.transpose(0, 2, 1, 3).reshape(2, queries, 32)
        mx.eval(line)
        assert held_now() <= before
        oracle.assert_equal(line, mx.contiguous(out).transpose(0, 2, 1, 3).reshape(2, queries, 32))


@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
@pytest.mark.parametrize("queries", [3, 60])
def test_what_is_not_finite_stays_with_those_who_see_it(rng, queries, value):
    call = make(rng, 1, (2, 1, 8, 8), (queries, 70), "causal", mx.float32)
    wrong = mx.array(call.k)
    wrong[:, :, 68] = value  # the last two queries see it
    out, expected = call.with_primals([call.q, wrong, call.v])(), call()
    oracle.assert_equal(out[:, :, :-2], expected[:, :, :-2])
    assert mx.isnan(out[:, :, -2:]).all()  # a product of both signs


@dtypes
def test_a_key_that_nobody_sees_gets_no_gradient(rng, dtype):
    call = make(rng, 1, (2, 1, 8, 8), (61, 70), "boolean", dtype)
    call.mask[:, 33] = False
    wrong = mx.array(call.k)
    wrong[:, :, 33] = mx.nan
    cotangent = normal(rng, (1, 2, 61, 8), dtype)
    grads = [call.with_primals([call.q, k, call.v]).gradients(cotangent)[1:] for k in (call.k, wrong)]
    assert (grads[0][0][:, :, 33] == 0).all() and (grads[0][1][:, :, 33] == 0).all()
    oracle.assert_equal(*grads)


@pytest.mark.parametrize("queries", [3, 60])
def test_scores_of_minus_infinity_alone_give_zeros(rng, queries):
    call = make(rng, 1, (2, 1, 8, 8), (queries, 70), "added", mx.float32)
    call.mask[:, :, 1] = -mx.inf
    out, d_q = call(), call.gradients(mx.ones((1, 2, queries, 8)))[0]
    oracle.assert_equal([out[:, :, 1], d_q[:, :, 1]], [mx.zeros((1, 2, 8))] * 2)
    check(rng, call)


def test_large_scores(rng):
    """Powers neither overflow nor vanish."""
    for queries in (2, 60):
        call = make(rng, 1, (2, 1, 8, 8), (queries, 70), "causal", mx.float32, has_sinks=True)
        for factor in (100, -100):
            check(rng, call.with_primals([call.q * factor, *call.primals[1:]]))


@pytest.mark.parametrize("queries", [1, 8, 9, 60])
def test_shares_sum_to_one_in_the_gradient_of_large_scores(rng, queries):
    q, k, v = (normal(rng, (1, 2, n, 64)) for n in (queries, 40, 40))
    dv = mx.grad(lambda v: fused_attention(300 + q, 300 + k, v, scale=0.125).sum())(v)
    np.testing.assert_allclose(oracle.exact(dv).sum(2), queries, rtol=80 * oracle.UNIT_ROUNDOFF[mx.float32])


def loss(attention, mask, sinks):
    return lambda q, k, v: (attention(q, k, v, scale=0.3, mask=mask, sinks=sinks) ** 3).sum()


TRANSFORMS = {
    "grad": lambda f: mx.grad(f, (0, 1, 2)),
    "of the values alone": lambda f: mx.grad(f, 2),
    "compile of grad": lambda f: mx.compile(mx.grad(f, (0, 1, 2))),
    "grad of compile": lambda f: mx.grad(mx.compile(f), (0, 1, 2)),
    "grad of checkpoint": lambda f: mx.grad(mx.checkpoint(f), (0, 1, 2)),
    "grad of grad": lambda f: mx.grad(
        lambda *a: sum((g**2).sum() for g in mx.grad(f, (0, 1, 2))(*a)), (0, 1, 2)
    ),
    "jvp": lambda f: lambda *a: mx.jvp(f, list(a), [mx.sin(x) for x in a])[1],
    "jvp of grad": lambda f: lambda *a: mx.jvp(mx.grad(f), list(a), [mx.sin(x) for x in a])[1],
    "vmap": lambda f: lambda q, k, v: mx.vmap(f, (1, None, None))(mx.stack([q, 2 * q, q + 1], 1), k, v),
    "vmap of all": lambda f: lambda *a: mx.vmap(f)(*[mx.stack([x, x + 1]) for x in a]),
    "vmap of grad": lambda f: lambda *a: mx.vmap(mx.grad(f, (0, 1, 2)))(*[mx.stack([x, x + 1]) for x in a]),
    "grad of vmap": lambda f: (
        lambda q, k, v: mx.grad(lambda q: mx.vmap(f, (0, None, None))(mx.stack([q, 2 * q]), k, v).sum())(q)
    ),
}


@pytest.mark.parametrize("masked", ["causal", "boolean", "added"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_those_of_mlxs_attention(rng, transform, masked):
    call = make(rng, 1, (4, 2, 6, 5), (10, 12), masked, mx.float32, has_sinks=True)
    results = [
        oracle.leaves(transform(loss(attention, call.mask, call.sinks))(*call.primals[:3]))
        for attention in (fused_attention, mx.fast.scaled_dot_product_attention)
    ]
    for ours, mlxs in zip(*results, strict=True):
        size = float(mx.abs(mlxs).max())
        assert size > 0 and float(mx.abs(ours - mlxs).max()) < 2.0**-16 * size


def test_the_gradient_of_a_mask(rng):
    call = make(rng, 1, (4, 2, 6, 5), (10, 12), "per head", mx.float32)
    grads = [
        mx.grad(lambda m, f=f: (f(*call.primals, scale=0.3, mask=m) ** 3).sum())(call.mask)
        for f in (fused_attention, mx.fast.scaled_dot_product_attention)
    ]
    assert float(mx.abs(grads[0] - grads[1]).max()) < 2.0**-17 * float(mx.abs(grads[1]).max())


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [4, 12, 70])
def test_the_gradient_of_queries_that_large_numbers_hide_all_keys_from(rng, dtype, queries):
    """As padding does where a mask adds ``finfo.min``: all scores are that, and all powers alike."""
    call = make(rng, 2, (4, 2, 16, 24), (queries, queries), "none", dtype)
    lowest = mx.array(mx.finfo(dtype).min, dtype)
    mask = mx.where((mx.arange(queries) > queries // 3)[:, None], mx.array(0, dtype), lowest)
    check(rng, replace(call, mask=mx.broadcast_to(mask, (queries, queries))))


def test_a_checkpoint_of_a_mask_keeps_no_scores(rng):
    """It asks for the gradient of all arguments."""

    def attend(q, k, v, mask):
        return fused_attention(q, k, v, scale=0.3, mask=mask)

    def gradients(attend):
        return mx.grad(lambda *qkv: (attend(*qkv, call.mask) ** 3).sum(), argnums=(0, 1, 2))(
            *call.primals[:3]
        )

    for mask in ("boolean", "per head"):
        call = make(rng, 1, (4, 2, 6, 5), (10, 12), mask, mx.float32)
        found = gradients(mx.checkpoint(attend))
        nodes = primitives(*found)
        assert nodes["FusedAttentionGrad"] == 1 and nodes["Matmul"] == nodes["Softmax"] == 0
        assert all(mx.array_equal(a, b) for a, b in zip(found, gradients(attend), strict=True))


def test_a_shapeless_function_is_not_given_other_arrays(rng):
    call = make(rng, 1, (4, 2, 6, 5), (8, 8), "boolean", mx.float32)
    function = mx.compile(lambda q, k, v: fused_attention(q, k, v, scale=0.3, mask=call.mask), shapeless=True)
    q, k, v = call.primals[:3]
    mx.eval(function(q, k, v))
    for other, message in (
        ((mx.concatenate([q, q]), k, v), "k must have shape"),
        ((q, mx.concatenate([k, k], 1)[:, :3], mx.concatenate([v, v], 1)[:, :3]), "multiple of the 3 heads"),
        ((mx.concatenate([q, q], 2), k, v), "mask must broadcast|mask has another shape"),
    ):
        with pytest.raises(ValueError, match=message):
            mx.eval(function(*other))


def test_a_window_wider_than_any_array(rng):
    call = make(rng, 1, (4, 2, 6, 5), (10, 12), "causal", mx.float32)
    assert mx.array_equal(replace(call, window=2**40)(), call())


def test_operands_of_several_dtypes(rng):
    call = make(rng, 1, (4, 2, 6, 5), (10, 12), "added", mx.bfloat16, has_sinks=True)
    q, k, v, sinks = call.primals
    mixed = Attention(q.astype(mx.float32), k, v, 0.3, mask=call.mask, sinks=sinks)
    assert mixed().dtype == mx.float32
    cotangent = normal(rng, (1, 4, 10, 5))
    assert [g.dtype for g in mixed.gradients(cotangent)] == [a.dtype for a in mixed.primals]
    mixed.check(mixed(), mixed.gradients(cotangent), cotangent)


def test_one_node_each_way(rng):
    call = make(rng, 1, (4, 2, 8, 8), (10, 12), "causal", mx.float32, has_sinks=True)
    mx.eval(call.primals)
    assert primitives(call()) == {"FusedAttention": 1}
    grads = call.gradients(mx.ones((1, 4, 10, 8)))
    assert primitives(*grads)["FusedAttention"] == 1 and output_counts("FusedAttentionGrad", *grads) == [4]


def held_now():
    """Without garbage of other tests, and without buffers to reuse, which may be larger than needed."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


class Layer:
    """Attention in training, of so many tokens."""

    heads, kept_per_token = (8, 2, 16, 24), 8 * (24 + 2) * 4  # the result and two numbers per head

    def __init__(self, tokens):
        self.call = make(np.random.default_rng(0), 1, self.heads, (tokens, tokens), "causal", mx.float32)
        self.cotangent = mx.ones((1, 8, tokens, 24))
        mx.eval(self.call.primals, self.cotangent)

    def kept(self):
        before = held_now()
        outputs, gradients = mx.vjp(lambda *a: [self.call.of(*a)], self.call.primals, [self.cotangent])
        mx.eval(outputs)
        held = held_now() - before
        mx.eval(gradients)
        return held

    def peak(self):
        before = held_now()
        mx.reset_peak_memory()
        mx.eval(mx.vjp(lambda *a: [self.call.of(*a)], self.call.primals, [self.cotangent]))
        return mx.get_peak_memory() - before


def test_the_backward_pass_keeps_no_scores():
    few, many = Layer(64), Layer(128)
    assert (many.kept() - few.kept()) / 64 == Layer.kept_per_token
    assert many.peak() <= 2 * few.peak()


def test_any_number_of_threads_gives_the_same_bits():
    code = """
import hashlib, itertools, mlx.core as mx, numpy as np, mlx_fused
rng = np.random.default_rng(0)
call = lambda *a: [mlx_fused.fused_attention(*a[:3], scale=0.3, mask="causal", sinks=a[3])]
for dtype, queries, heads in itertools.product((mx.float32, mx.bfloat16), (2, 200), (1, 2, 8)):
    normal = lambda *shape: mx.array(rng.standard_normal(shape)).astype(dtype)
    primals = [normal(2, 8, queries, 16), normal(2, heads, 900, 16), normal(2, heads, 900, 24), normal(8)]
    (y,), grads = mx.vjp(call, primals, [normal(2, 8, queries, 24)])
    for a in (y, *grads):
        print(hashlib.sha256(np.array(a.astype(mx.float32)).tobytes()).hexdigest())
"""
    assert same_with_any_threads(code).count("\n") == 60


@dtypes
def test_in_threads(dtype):
    def work(rng):
        for lengths in ((1, 300), (60, 60)):
            check(rng, make(rng, 1, (4, 2, 16, 16), lengths, "causal", dtype))

    in_threads(work)


def test_other_dtypes_are_mlxs(rng):
    call = make(rng, 1, (2, 1, 4, 4), (5, 6), "window", mx.float64)
    assert "FusedAttention" not in primitives(call())
    np.testing.assert_allclose(oracle.exact(call()), call.formula(None)[0], 0, 2.0**-19)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": mx.ones((2, 3, 4))}, ValueError, r"q must have 4 dimensions"),
        (
            {"k": mx.ones((1, 2, 6, 4), mx.int32)},
            ValueError,
            "k must be float32, float16 or bfloat16 but got int32",
        ),
        ({"v": None}, TypeError, "v must be array but got NoneType"),
        ({"k": mx.ones((1, 2, 6, 5))}, ValueError, r"k must have shape \(1, 2, 6, 4\)"),
        ({"v": mx.ones((1, 1, 6, 4))}, ValueError, r"v must have shape \(1, 2, 6, 4\)"),
        ({"k": mx.ones((1, 0, 6, 4))}, ValueError, "the number of heads of k must be at least 1 but got 0"),
        ({"q": mx.ones((1, 3, 5, 4))}, ValueError, "q must have a multiple of the 2 heads of k but got 3"),
        ({"scale": mx.array(1.0)}, TypeError, "scale must be float or int but got array"),
        ({"mask": "none"}, ValueError, "mask must be 'causal' or an array but got 'none'"),
        ({"mask": 1}, TypeError, "mask must be str or array but got int"),
        ({"mask": mx.ones((2, 6))}, ValueError, r"mask must broadcast to \(1, 4, 5, 6\) but got \(2, 6\)"),
        ({"mask": mx.ones((1, 1, 1, 1, 6))}, ValueError, r"mask must broadcast to \(1, 4, 5, 6\) but got"),
        (
            {"mask": mx.ones(6, mx.complex64)},
            ValueError,
            "mask must be of a dtype that promotes to float32 but",
        ),
        ({"window": 3}, ValueError, "mask must be 'causal' where there is a window"),
        ({"mask": "causal", "window": 0}, ValueError, "window must be"),
        ({"window": 1.5}, TypeError, "window must be int but got float"),
        ({"mask": "causal", "window": True}, TypeError, "window must be int but got bool"),
        ({"sinks": mx.ones(3)}, ValueError, r"sinks must have shape \(4,\) but got \(3,\)"),
        ({"sinks": 1.0}, TypeError, "sinks must be array but got float"),
        ({"stream": "cpu"}, TypeError, "stream must be Stream or Device or DeviceType but got str"),
    ],
)
def test_errors(changes, error, message):
    given = {"q": mx.ones((1, 4, 5, 4)), "k": mx.ones((1, 2, 6, 4)), "v": mx.ones((1, 2, 6, 4)), "scale": 1.0}
    with pytest.raises(error, match=rf"\[fused_attention\] {message}"):
        fused_attention(**given | changes)
