"""Hypothesis draws the shapes, dtypes and layouts; the oracle says what must come out."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attention
import cross_entropy
import operands
import oracle
import projections
import quantized
from projections import check_backward, check_forward, cotangents
from stacks import CODES, Stack
from test_layouts import VIEWS, apart

sizes = st.integers(0, 5) | st.integers(0, 70)
widths = st.integers(1, 9) | st.integers(1, 140)
dtypes = st.sampled_from(operands.DTYPES)
layouts = st.sampled_from([lambda a: a, *VIEWS])


@st.composite
def heads(draw):
    kv_heads = draw(st.integers(1, 3))
    return kv_heads * draw(st.integers(1, 8)), kv_heads, draw(st.integers(1, 20)), draw(st.integers(1, 20))


def check_laid_out(data, rng, call):
    """Both ways, with the operands laid out at random, and the cotangents."""

    def lay_out(a):
        return data.draw(layouts)(a) if a.size else a

    call = call.with_leaves({key: lay_out(a) for key, a in call.leaves.items()})
    check_forward(call)
    check_backward(call, [lay_out(g) for g in cotangents(rng, call)])


seeds = st.integers(0, 2**32 - 1)


@given(st.data(), seeds, st.integers(0, 3), sizes, widths, heads(), dtypes, st.booleans(), st.booleans())
def test_qkv(data, seed, batch, seq, hidden, shape, dtype, bias, packed):
    rng = np.random.default_rng(seed)
    options = {"dtype": dtype, "bias": bias, "packed": packed}
    check_laid_out(data, rng, projections.qkv(rng, batch, seq, hidden, shape, **options))


@given(st.data(), seeds, st.integers(0, 3), sizes, widths, widths, dtypes, st.booleans())
def test_output(data, seed, batch, seq, hidden_in, hidden_out, dtype, bias):
    rng = np.random.default_rng(seed)
    options = {"dtype": dtype, "bias": bias}
    check_laid_out(data, rng, projections.output(rng, batch, seq, hidden_in, hidden_out, **options))


@given(
    st.data(),
    seeds,
    st.integers(0, 2),
    sizes,
    sizes,
    heads(),
    dtypes,
    st.sampled_from(attention.MASKS),
    st.booleans(),
)
def test_attention(data, seed, batch, queries, keys, shape, dtype, mask, has_sinks):
    rng = np.random.default_rng(seed)
    keys = max(keys, 1) if mask == "window" else keys
    call = attention.make(rng, batch, shape, (queries, keys), mask, dtype, has_sinks)
    primals = [data.draw(layouts)(a) if a.size else a for a in call.primals]
    attention.check(rng, call.with_primals(primals))


@given(
    st.data(),
    seeds,
    st.integers(0, 2),
    sizes,
    widths,
    st.integers(1, 9) | st.integers(1, 1100),
    dtypes,
    st.sampled_from([None, None, ("affine", 32, 4), ("affine", 32, 3), *quantized.FLOATS]),
    st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "rank": st.none() | st.integers(1, 5),
            "masked": st.sampled_from([None, "mask", "index", "both"]),
            "scale": st.sampled_from([1.0, -0.5, 3.0]),
            "softcap": st.none() | st.sampled_from([0.5, 4.0]),
            "smoothing": st.sampled_from([0.0, 0.3]),
        }
    ),
)
def test_cross_entropy(data, seed, batch, seq, hidden, words, dtype, form, options):
    rng = np.random.default_rng(seed)
    hidden = 32 * (1 + hidden % 3) if form else hidden
    loss = cross_entropy.make(rng, (batch, seq), hidden, words, form, dtype, **options)
    head = loss.head.with_leaves(
        {key: data.draw(layouts)(a) if a.size else a for key, a in loss.head.leaves.items() if key[0] != "x"}
    )
    keys = data.draw(st.lists(st.sampled_from(head.trainable), unique=True))
    cross_entropy.check(rng, cross_entropy.replace(loss, head=head), keys)


def of_integers(seed, batch, seq, hidden, shape, packed=False):
    rng = np.random.default_rng(seed)
    return rng, projections.qkv(rng, batch, seq, hidden, shape, packed=packed, draw=operands.integers)


@given(seeds, sizes, widths, heads())
def test_packed_and_separate_weights_mean_the_same(seed, seq, hidden, shape):
    _, call = of_integers(seed, 1, seq, hidden, shape, packed=True)
    oracle.assert_equal(apart(call)(), call())


@given(seeds, st.integers(1, 4), st.integers(1, 9), widths, heads())
def test_each_row_depends_on_its_own_input_alone(seed, batch, seq, hidden, shape):
    rng, call = of_integers(seed, batch, seq, hidden, shape)
    b, s = int(rng.integers(batch)), int(rng.integers(seq))
    alone = call(input=call.x[b : b + 1, s : s + 1])
    oracle.assert_equal([y[b : b + 1, :, s : s + 1] for y in call()], alone)


operations = ["qkv", "output", "linear", "gated"]


@st.composite
def calls(draw):
    """Any operation, with any options, of a few rows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([mx.float32, mx.float64]))
    forms = (
        [None]
        if dtype == mx.float64
        else [None, None, ("affine", 32, 4), ("affine", 32, 3), ("affine", 32, 1), *quantized.FLOATS]
    )
    form, batch, seq = draw(st.sampled_from(forms)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    hidden = 32 if form else draw(st.integers(1, 6))
    bias, adapted, exact = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    options = {"bias": bias, "adapter_dtype": dtype, "scale": draw(st.sampled_from([1.0, 0.5, -3.0]))}
    # MLX's exponential and error function are no better in float64.
    activations = projections.ACTIVATIONS if dtype == mx.float32 else ["relu", "relu2"]
    operation, activation = draw(st.sampled_from(operations)), draw(st.sampled_from(activations))
    if operation in ("linear", "gated"):
        ranks = draw(st.tuples(*[st.none() | st.integers(1, 3)] * 2).filter(any)) if adapted else None
        features = draw(st.integers(1, 5))
        if operation == "gated":
            packing = draw(st.none() | st.sampled_from(projections.PACKINGS))
            options |= {"packing": packing, "ranks": ranks, "activation": activation}
            call = projections.gated(rng, batch, seq, hidden, features, form, dtype, **options)
        else:
            options |= {
                "rank": ranks and next(filter(None, ranks)),
                "activation": None if activation == "clipped_swiglu" else activation,
            }
            call = projections.linear(rng, batch, seq, hidden, features, form, dtype, **options)
        return call, rng
    if operation == "output":
        rank, alpha = draw(st.integers(1, 3)) if adapted else None, draw(st.sampled_from([1.0, 0.25, -2.0]))
        call = projections.output(
            rng, batch, seq, hidden, draw(st.integers(1, 5)), form, dtype, rank=rank, alpha=alpha, **options
        )
        return call.replace(exact=exact), rng
    ranks = draw(st.tuples(*[st.none() | st.integers(1, 3)] * 3).filter(any)) if adapted else None
    shape = tuple(draw(st.integers(1, 2)) for _ in range(4))
    shape = (shape[0] * shape[1], *shape[1:])
    call = projections.qkv(
        rng, batch, seq, hidden, shape, form, dtype, packed=draw(st.booleans()), ranks=ranks, **options
    )
    call = call.replace(split_heads=draw(st.booleans()))
    return call.replace(exact=exact) if adapted else call, rng


@settings(max_examples=400)
@given(st.data(), calls(), st.sampled_from(["fused", "composed"]))
def test_any_two_transforms_of_any_call(data, problem, route):
    call, rng = problem
    steps = data.draw(
        st.tuples(*[st.sampled_from(["vmap", "vmap", "grad", "jvp", "compile", "checkpoint"])] * 2)
    )
    # mx.checkpoint differentiates by all arguments, which codes have no derivatives for.
    keys = [key for key, a in call.leaves.items() if a.dtype not in CODES or "checkpoint" not in steps]
    stack = Stack([call.leaves[key] for key in keys], rng)
    for step in steps:
        if step == "vmap":
            axes = [data.draw(st.none() | st.integers(0, a.ndim)) for a in stack.args]
            if any(axis is not None for axis in axes):
                stack.vmap(axes)
        elif step in ("grad", "jvp"):
            some = st.lists(st.sampled_from(stack.differentiable()), min_size=1, unique=True)
            getattr(stack, step)(sorted(data.draw(some)))
        else:
            getattr(stack, step)()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_FUSED_ROUTE", route)
        stack.check(call, keys)
