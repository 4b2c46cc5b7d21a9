"""Calls on quantized weights, with adapters and with both, against float64: what must hold for every kind."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import operands
import oracle
import projections
import quantized
from projections import check, cotangents, gradients
from test_forward import dtypes
from test_layouts import VIEWS, check_views, views

HEADS = (4, 2, 8)
# One of each way to store a weight.
FORMS = [("affine", 64, 4), ("affine", 32, 3), ("affine", 128, 8), *quantized.FLOATS]
# (form, adapted)
KINDS = [(form, False) for form in FORMS] + [(form, True) for form in (None, *FORMS)]
SOME = [(FORMS[0], False), (None, True), (FORMS[0], True)]


def named(form):
    return "-".join(map(str, form)) if form else "dense"


kinds = pytest.mark.parametrize("form,adapted", KINDS, ids=lambda v: "lora" if v is True else v and named(v))
forms = pytest.mark.parametrize("form", [None, *quantized.FORMATS], ids=named)
adapted = pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
routes = pytest.mark.parametrize("route", ["fused", "composed"])


def calls(
    rng, form, adapted, batch=2, seq=5, hidden=128, heads=HEADS, hidden_out=40, ranks=(8, None, 3), rank=8,
    packed=False, activation="silu", **options,
):  # fmt: skip
    """The operations, with adapters of these ranks or without."""
    ranks, rank = (ranks, rank) if adapted else (None, None)
    pair, packing = ranks and ranks[:2], "gate_up" if packed else None
    return [
        projections.qkv(rng, batch, seq, hidden, heads, form, packed=packed, ranks=ranks, **options),
        projections.output(rng, batch, seq, hidden, hidden_out, form, rank=rank, **options),
        projections.linear(
            rng, batch, seq, hidden, hidden_out, form, rank=rank, activation=activation, **options
        ),
        projections.gated(
            rng,
            batch,
            seq,
            hidden,
            hidden_out,
            form,
            packing=packing,
            ranks=pair,
            activation=activation,
            **options,
        ),
    ]


@dtypes
@kinds
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65])
def test_row_boundaries(rng, rows, form, adapted, dtype):
    for batch, seq in ((1, rows), (rows, 1)) if rows else ((1, 0), (0, 3)):
        for call in calls(rng, form, adapted, batch, seq, 128, (3, 1, 5), 33, (8, 8, 8), dtype=dtype):
            check(rng, call)


@dtypes
@pytest.mark.parametrize("ratio", range(1, 9))
def test_every_query_group_size(rng, dtype, ratio):
    for (form, adapted), packed in product(SOME, (False, True)):
        ranks = (4, 4, None) if adapted else None
        heads, options = (2 * ratio, 2, 6), {"packed": packed, "ranks": ranks}
        check(rng, projections.qkv(rng, 2, 3, 64, heads, form, dtype, **options))


@dtypes
@pytest.mark.parametrize("head_dim", [1, 7, 32, 64, 80, 96, 128, 256])
def test_head_dims(rng, dtype, head_dim):
    for (form, adapted), (batch, seq) in product(SOME, ((3, 1), (2, 9))):
        ranks = (8, 8, 8) if adapted else None
        check(rng, projections.qkv(rng, batch, seq, 64, (4, 2, head_dim), form, dtype, ranks=ranks))


@dtypes
def test_decode_and_prefill_of_a_wide_layer(rng, dtype):
    for (form, adapted), seq in product(SOME, (1, 40)):
        sizes, options = (1, seq, 1024, (4, 2, 64), 300, (8, 8, 8), 16), {"dtype": dtype, "bias": False}
        for call in calls(rng, form, adapted, *sizes, **options):
            check(rng, call)


@dtypes
@pytest.mark.parametrize("alpha", [0.22, -1.5, 0.0])
def test_output_projection_with_alpha(rng, dtype, alpha):
    for (form, adapted), bias in product([(None, False), *KINDS], (False, True)):
        rank = 8 if adapted else None
        check(rng, projections.output(rng, 2, 5, 128, 24, form, dtype, bias, rank, alpha=alpha))


@forms
@adapted
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_composed_means_the_same(rng, packed, form, adapted):
    for call in calls(rng, form, adapted, hidden=256, packed=packed):
        check(rng, call, roundings=6 if adapted else 4, route="composed")


@forms
@adapted
@routes
def test_integers_give_the_same_bits_however_they_are_computed(rng, form, adapted, route):
    several = []
    for options in ({"seq": 1, "packed": True}, {"seq": 9}):
        several += calls(rng, form, adapted, draw=operands.integers, **options)[:2]
        several += calls(rng, form, adapted, draw=operands.few_integers, activation="relu", **options)[2:]
    for call in several:
        oracle.assert_equal(call(route=route), call.formula(*call.exact_operands))
        given, keys = cotangents(rng, call, operands.integers), call.trainable
        expected = call.gradient_formula(keys)(oracle.exact(given), *call.exact_operands)
        oracle.assert_equal(gradients(call, keys, given, route=route), expected)


@dtypes
@views
def test_views(rng, view, dtype):
    for form, adapted in [(("affine", 32, 4), False), (("mxfp8", 32, 8), False), *SOME[1:]]:
        packed = calls(rng, form, adapted, seq=1, hidden=64, packed=True, dtype=dtype)
        for call in (packed[0], packed[-1], *calls(rng, form, adapted, hidden=64, dtype=dtype)):
            check_views(rng, call, view)


activations = st.sampled_from(projections.ACTIVATIONS)
packings = st.sampled_from(projections.PACKINGS)


@settings(max_examples=300)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([None, *quantized.FORMATS]),
    st.sampled_from(operands.DTYPES),
    st.tuples(st.integers(0, 3), st.integers(0, 5) | st.integers(0, 40)),
    st.integers(1, 4),
    st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 20)),
    st.none() | st.tuples(*[st.none() | st.integers(1, 20)] * 3).filter(any),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_any_call(seed, form, dtype, rows, groups, shape, ranks, bias, packed, data):
    rng = np.random.default_rng(seed)
    ratio, kv_heads, head_dim = shape
    heads = (ratio * kv_heads, kv_heads, head_dim)
    hidden = groups * (max(form[1], 32) if form else 16)  # mx.quantize refuses one row of 16
    layouts = st.sampled_from([lambda a: a, *VIEWS])
    rank = next(filter(None, ranks)) if ranks else None
    activation, packing = data.draw(activations), data.draw(packings) if packed else None
    pair, single = ranks and ranks[:2], None if activation == "clipped_swiglu" else activation
    for call in (
        projections.qkv(rng, *rows, hidden, heads, form, dtype, bias, packed, ranks),
        projections.output(rng, *rows, hidden, head_dim, form, dtype, bias, rank, alpha=0.5),
        projections.linear(rng, *rows, hidden, head_dim, form, dtype, bias, rank, activation=single),
        projections.gated(
            rng, *rows, hidden, head_dim, form, dtype, bias, packing, pair, activation=activation
        ),
    ):
        laid_out = {key: data.draw(layouts)(a) if a.size else a for key, a in call.leaves.items()}
        check(rng, call.with_leaves(laid_out))
