"""Hypothesis draws the shapes, dtypes and layouts; the oracle says what must come out."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_fused
import operands
import oracle
import projections
import quantized
from stacks import CODES, Stack
from test_layouts import VIEWS

sizes = st.integers(0, 5) | st.integers(0, 70)
widths = st.integers(1, 9) | st.integers(1, 140)
dtypes = st.sampled_from(operands.DTYPES)
layouts = st.sampled_from([lambda a: a, *VIEWS])


@st.composite
def heads(draw):
    kv_heads = draw(st.integers(1, 3))
    return kv_heads * draw(st.integers(1, 8)), kv_heads, draw(st.integers(1, 20)), draw(st.integers(1, 20))


def project(x, weight, bias, heads):
    *heads, v_head_dim = heads
    return mlx_fused.fused_qkv_projection(x, weight, bias, *heads, v_head_dim=v_head_dim)


@st.composite
def qkv_problems(draw):
    """The operands, laid out at random, and the cotangents of one call."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, seq, hidden = draw(st.integers(0, 3)), draw(sizes), draw(widths)
    dtype, shape = draw(dtypes), draw(heads())
    has_bias, packed = draw(st.booleans()), draw(st.booleans())
    x, weight, bias = operands.qkv(rng, batch, seq, hidden, shape, dtype, has_bias, packed)
    cotangents = operands.qkv_cotangents(rng, batch, seq, shape, dtype)

    def lay_out(tree):
        if tree is None:
            return None
        if isinstance(tree, tuple):
            return tuple(map(lay_out, tree))
        return draw(layouts)(tree) if tree.size else tree

    return lay_out(x), lay_out(weight), lay_out(bias), lay_out(cotangents), shape


@given(qkv_problems())
def test_qkv(problem):
    x, weight, bias, cotangents, shape = problem
    outputs = project(x, weight, bias, shape)
    oracle.assert_close(outputs, oracle.fused_qkv_projection, x, weight, bias, *shape)
    args = (*cotangents, x, weight, bias is not None)
    *heads, v_head_dim = shape
    grads = mlx_fused.fused_qkv_projection_bwd(*args, *heads, v_head_dim=v_head_dim)
    oracle.assert_close(grads, oracle.fused_qkv_projection_bwd, *args, *shape)


@given(st.data(), st.integers(0, 3), sizes, widths, widths, dtypes, st.booleans())
def test_output(data, batch, seq, hidden_in, hidden_out, dtype, bias):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    args = [
        data.draw(layouts)(a) if a is not None and a.size else a
        for a in operands.output(rng, batch, seq, hidden_in, hidden_out, dtype, bias)
    ]
    out = mlx_fused.fused_output_projection_residual(*args)
    oracle.assert_close(out, oracle.fused_output_projection_residual, *args)
    args = (args[3], *args[:2], bias)
    grads = mlx_fused.fused_output_projection_residual_bwd(*args)
    oracle.assert_close(grads, oracle.fused_output_projection_residual_bwd, *args)


@given(st.integers(0, 2**32 - 1), sizes, widths, heads())
def test_packed_and_separate_weights_mean_the_same(seed, seq, hidden, shape):
    rng = np.random.default_rng(seed)
    x, weight, bias = operands.qkv(rng, 1, seq, hidden, shape, draw=operands.integers)
    separate = project(x, weight, bias, shape)
    packed = project(x, mx.concatenate(weight), mx.concatenate(bias), shape)
    oracle.assert_equal(separate, packed)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9), widths, heads())
def test_each_row_depends_on_its_own_input_alone(seed, batch, seq, hidden, shape):
    rng = np.random.default_rng(seed)
    x, weight, bias = operands.qkv(rng, batch, seq, hidden, shape, draw=operands.integers)
    together = project(x, weight, bias, shape)
    b, s = int(rng.integers(batch)), int(rng.integers(seq))
    alone = project(x[b : b + 1, s : s + 1], weight, bias, shape)
    oracle.assert_equal([y[b : b + 1, :, s : s + 1] for y in together], alone)


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
    if draw(st.booleans()):
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
