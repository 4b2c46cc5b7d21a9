"""The loss of a head's logits, without the logits."""

import re
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import oracle
from cross_entropy import Loss, check, make
from graph import primitives
from mlx_fused import LinearOperands, fused_linear_cross_entropy
from operands import DTYPES, normal
from test_kinds import FORMS, named
from test_layouts import VIEWS
from test_threads import in_threads, same_with_any_threads

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OPTIONS = {
    "plain": {},
    "masked": {"masked": "mask"},
    "ignored": {"masked": "index", "scale": -0.5},
    "capped": {"masked": "both", "softcap": 3.0, "scale": 1.5, "bias": False},
    "smoothed": {"smoothing": 0.1},
    "capped and smoothed": {"smoothing": 0.6, "softcap": 2.0, "masked": "mask", "rank": 3},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@dtypes
@options
@pytest.mark.parametrize("rows", [1, 2, 5, 25, 49, 65, 130])
def test_rows(rng, rows, options, dtype):
    for words in (1, 2, 31, 97, 130):
        check(rng, make(rng, (1, rows), 37, words, dtype=dtype, **options))


@dtypes
@pytest.mark.parametrize("hidden", [1, 2, 15, 33, 64, 513])
def test_widths(rng, hidden, dtype):
    for rows in (1, 70):
        check(rng, make(rng, (1, rows), hidden, 70, dtype=dtype, masked="mask", rank=2))


@dtypes
@options
@pytest.mark.parametrize("rows", [3, 511, 513, 1030])
def test_chunks_of_rows_and_blocks_of_words(rng, rows, options, dtype):
    """A chunk has 512 rows, a block of a gradient 1024 words."""
    for words in (1023, 1024, 1025, 2060) if rows < 1030 else (1030,):
        check(rng, make(rng, (1, rows), 6, words, dtype=dtype, **options))


@dtypes
@pytest.mark.parametrize("words", [8191, 8192, 8193, 16390])
def test_blocks_of_words_in_a_sum(rng, words, dtype):
    for options in ({}, {"smoothing": 0.1, "softcap": 4.0}):
        check(rng, make(rng, (1, 40), 5, words, dtype=dtype, **options))


@dtypes
@options
@pytest.mark.parametrize("form", [None, *FORMS], ids=lambda f: named(f))
def test_quantized_heads_and_adapters(rng, form, options, dtype):
    rank = options.get("rank")
    others = {name: value for name, value in options.items() if name != "rank"}
    for some in {None, 4, rank}:
        for rows in ((1, 1), (2, 6), (1, 70)):
            check(rng, make(rng, rows, 128, 90, form, dtype, rank=some, **others))
    check(rng, make(rng, (1, 20), 128, 1100, form, dtype, rank=4, **others))


@pytest.mark.parametrize("form", [None, ("affine", 32, 4)], ids=lambda f: named(f))
def test_any_of_the_gradients(rng, form):
    loss = make(rng, (2, 7), 64, 1030, form, rank=3, masked="mask")
    keys = loss.head.trainable
    for wanted in ([key] for key in keys):
        check(rng, loss, wanted)
    for wanted in (keys[:2], keys[1:], keys[::-1]):
        check(rng, loss, wanted)


@options
def test_the_composed_form(rng, options):
    for form in (None, ("affine", 32, 4)):
        check(rng, make(rng, (2, 9), 64, 90, form, **options), route="composed")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_formula_is_that_of_mlx(rng, softcap, smoothing):
    loss = make(rng, (2, 9), 12, 90, softcap=softcap, smoothing=smoothing, scale=1.3)

    def of_mlx(x, weight, bias):
        logits = 1.3 * (x @ weight.T + bias)
        logits = logits if softcap is None else softcap * mx.tanh(logits / softcap)
        return [nn.losses.cross_entropy(logits, loss.targets, label_smoothing=smoothing)]

    keys = loss.head.trainable
    cotangent = normal(rng, (2, 9))
    (losses,), grads = mx.vjp(of_mlx, [loss.head.leaves[key] for key in keys], [cotangent])
    expected, gradients = loss.formula(cotangent, keys)
    for ours, mlxs in zip([expected, *gradients], [losses, *grads], strict=True):
        np.testing.assert_allclose(oracle.exact(mlxs), ours, 0, 2.0**-19 * np.abs(ours).max())


def test_the_gradients_are_differences(rng):
    loss = make(rng, (2, 3), 4, 7, dtype=mx.float64, masked="mask", softcap=2.0, smoothing=0.2, scale=1.3)
    keys = loss.head.trainable
    cotangent = normal(rng, (2, 3), mx.float64)
    _, gradients = loss.formula(cotangent, keys)
    for (name, _), grad in zip(keys, gradients, strict=True):
        values = np.array(loss.head.leaves[name, None])
        for at in np.ndindex(values.shape):
            ends, value, step = [], values[at], 1e-6
            for end in (value - step, value + step):
                values[at] = end
                losses, _ = loss.with_head(**{name: mx.array(values, dtype=mx.float64)}).formula(
                    cotangent, []
                )
                ends.append((oracle.exact(cotangent) * losses).sum())
            values[at] = value
            assert abs((ends[1] - ends[0]) / (2 * step) - grad[at]) < 1e-8


@dtypes
@pytest.mark.parametrize("view", VIEWS, ids=lambda v: v.__name__)
def test_layouts(rng, view, dtype):
    for form in (None, ("affine", 32, 4)):
        loss, mask = make(rng, (3, 12), 64, 70, form, dtype, rank=3), mx.array(rng.random((3, 12)) < 0.6)
        head = loss.head.with_leaves({key: view(a) for key, a in loss.head.leaves.items()})
        check(rng, Loss(head, view(loss.targets), view(mask)), cotangent=view(normal(rng, (3, 12))))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (2, 1, 3, 2)], ids=str)
def test_any_axes(rng, shape):
    rows = int(np.prod(shape, dtype=int))
    loss = make(rng, (1, rows), 16, 40, masked="both")
    expected, cotangent = loss(), normal(rng, (1, rows))
    d_x, *_ = loss.gradients(cotangent)
    spread = loss.with_head(x=loss.head.x.reshape(*shape, 16))
    spread = Loss(spread.head, *(a.reshape(shape) for a in (loss.targets, loss.mask)), loss.ignore_index)
    oracle.assert_equal(spread(), expected.reshape(shape))
    oracle.assert_equal(spread.gradients(cotangent.reshape(shape))[0], d_x.reshape(*shape, 16))


@pytest.mark.parametrize("bits", [None, 4])
def test_tied_embeddings(rng, bits):
    embedding = nn.Embedding(40, 32)
    layer = embedding if bits is None else embedding.to_quantized(32, bits)
    given, targets = (mx.array(rng.integers(0, 40, (2, 9))) for _ in range(2))
    others = layer.parameters()

    def ours(parameters):
        layer.update(parameters)
        return fused_linear_cross_entropy(mx.sin(layer(given)), LinearOperands.of_base(layer), targets).sum()

    def stock(parameters):
        layer.update(parameters)
        return nn.losses.cross_entropy(layer.as_linear(mx.sin(layer(given))), targets, reduction="sum")

    trained = others if bits is None else {name: others[name] for name in ("scales", "biases")}
    results = [mx.value_and_grad(f)(trained) for f in (ours, stock)]
    for (_, a), (_, b) in zip(*map(tree_flatten, results), strict=True):
        assert float(mx.abs(a - b).max()) < 2.0**-16 * float(mx.abs(b).max())


def test_reductions(rng):
    for masked in (None, "mask", "index", "both"):
        loss = make(rng, (3, 5), 16, 40, masked=masked)
        losses, counts = np.array(loss()), loss.counts
        assert (losses[~counts] == 0).all()
        np.testing.assert_allclose(float(loss(reduction="sum")), losses.sum(), 1e-6)
        np.testing.assert_allclose(float(loss(reduction="mean")), losses[counts].mean(), 1e-6)


def test_an_index_that_the_targets_cannot_hold_ignores_none(rng):
    loss = make(rng, (2, 5), 16, 200)
    targets = mx.full((2, 5), 156, mx.uint8)  # -100 modulo 256
    expected = float(Loss(loss.head, targets)().mean())
    assert abs(float(Loss(loss.head, targets, ignore_index=-100)(reduction="mean")) - expected) < 1e-5


@pytest.mark.parametrize("dtype", [mx.int8, mx.uint8, mx.int32, mx.uint32, mx.int64, mx.uint64], ids=str)
def test_targets_of_every_integer_dtype(rng, dtype):
    loss = make(rng, (2, 5), 16, 40)
    oracle.assert_equal(Loss(loss.head, loss.targets.astype(dtype))(), loss())


def test_of_nothing(rng):
    for rows in ((0, 3), (2, 0)):
        check(rng, make(rng, rows, 16, 40, rank=2))
    check(rng, make(rng, (2, 3), 0, 40, rank=2))
    check(rng, make(rng, (2, 3), 16, 40, rank=0))
    for rows in ((1, 3), (2, 300)):
        loss = make(rng, rows, 16, 1100, masked="mask")
        for none in (
            Loss(loss.head, loss.targets, mx.zeros(rows, mx.bool_)),
            Loss(loss.head, mx.full(rows, 7), ignore_index=7),
        ):
            oracle.assert_equal(none(), mx.zeros(rows))
            # The mean of no rows is NaN, and its cotangents infinite.
            for keys in (none.head.trainable, [("x", None)]):
                grads = none.gradients(mx.full(rows, mx.inf), keys)
                oracle.assert_equal(grads, [mx.zeros_like(none.head.leaves[key]) for key in keys])
            assert np.isnan(float(none(reduction="mean"))) and float(none(reduction="sum")) == 0


@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
@pytest.mark.parametrize("rows", [3, 60])
def test_what_is_not_finite_stays_in_its_row(rng, rows, value):
    loss = make(rng, (1, rows), 16, 1100)
    x = mx.array(loss.head.x)
    x[:, 1] = value
    wrong, cotangent = loss.with_head(x=x), mx.ones((1, rows))
    losses, d_x = wrong(), wrong.gradients(cotangent)[0]
    assert mx.isnan(losses[:, 1]).all() and mx.isnan(d_x[:, 1]).all()  # infinities of both signs
    others = mx.array([i for i in range(rows) if i != 1])
    oracle.assert_equal(losses[:, others], loss()[:, others])
    oracle.assert_equal(d_x[:, others], loss.gradients(cotangent)[0][:, others])


def test_infinite_logits(rng):
    """As in MLX: a word at minus infinity has no share, and is infinitely wrong."""
    loss = make(rng, (1, 40), 16, 1100)
    bias = mx.array(loss.head.leaves["bias", None])
    bias[100:1050] = -mx.inf
    low = loss.with_head(bias=bias)
    chosen = Loss(low.head, mx.arange(40)[None])
    check_same_as_composed(chosen, normal(rng, (1, 40)))
    unlikely = Loss(low.head, mx.full((1, 40), 200))
    oracle.assert_equal(unlikely(), mx.full((1, 40), mx.inf))
    bias[3] = mx.inf
    oracle.assert_equal(
        Loss(low.with_head(bias=bias).head, chosen.targets)()[:, 5:], mx.full((1, 35), mx.inf)
    )


def check_same_as_composed(loss, cotangent):
    for keys in ([], [("x", None)]):
        results = [
            [loss(route=route), *loss.gradients(cotangent, keys, route=route)] for route in (None, "composed")
        ]
        for ours, mlxs in zip(*results, strict=True):
            assert mx.isfinite(ours).all() and float(mx.abs(ours - mlxs).max()) < 2.0**-16


@pytest.mark.parametrize("rows", [3, 60])
def test_large_logits(rng, rows):
    """Powers neither overflow nor vanish."""
    for scale in (300.0, -300.0):
        check(rng, make(rng, (1, rows), 16, 1100, scale=scale))
        check(rng, make(rng, (1, rows), 16, 1100, scale=scale, softcap=30.0))


def test_a_certain_target_has_an_exact_gradient(rng):
    """p - 1 does not cancel: p is not rounded before."""
    for dtype in DTYPES:
        loss = make(rng, (1, 60), 16, 200, dtype=dtype)
        weight = mx.array(loss.head.leaves["weight", None])
        best = mx.argmax(loss.head.x @ weight.T + loss.head.leaves["bias", None], -1)
        check(rng, Loss(loss.head.replace(alpha=4.0), best))


def test_operands_of_several_dtypes(rng):
    loss = make(rng, (2, 30), 16, 70, dtype=mx.bfloat16, rank=2)
    for changes in (
        {"x": loss.head.x.astype(mx.float32)},
        {"weight": loss.head.leaves["weight", None].astype(mx.float16)},
    ):
        check(rng, loss.with_head(**changes))
    quantized = make(rng, (2, 30), 64, 70, ("affine", 32, 4), mx.bfloat16)
    biases = quantized.head.leaves["biases", None].astype(mx.float32)
    check(rng, quantized.with_head(biases=biases), [("x", None), ("bias", None)])
    other = normal(rng, (2, 30), mx.bfloat16)
    assert loss.gradients(other)[0].dtype == mx.bfloat16  # of a custom function that returns such a cotangent


def test_float64_is_mlxs(rng):
    loss = make(rng, (2, 9), 12, 40, dtype=mx.float64, masked="mask")
    assert "FusedLinearCrossEntropy" not in primitives(loss()) and loss().dtype == mx.float64
    losses, _ = loss.formula(mx.zeros((2, 9)), [])
    np.testing.assert_allclose(oracle.exact(loss()), losses, 0, 2.0**-18)


def test_any_number_of_threads_gives_the_same_bits():
    code = """
import hashlib, mlx.core as mx, numpy as np, mlx_fused
rng = np.random.default_rng(0)
normal = lambda *shape: mx.array(rng.standard_normal(shape), dtype=mx.float32)
for rows in (2, 600):
    targets = mx.array(rng.integers(0, 9000, rows))
    call = lambda *a: [mlx_fused.fused_linear_cross_entropy(a[0], a[1], targets, bias=a[2])]
    (y,), grads = mx.vjp(call, [normal(rows, 16), normal(9000, 16), normal(9000)], [normal(rows)])
    for a in (y, *grads):
        print(hashlib.sha256(np.array(a).tobytes()).hexdigest())
"""
    assert same_with_any_threads(code).count("\n") == 8


@dtypes
def test_in_threads(dtype):
    def work(rng):
        for rows in (2, 70):
            check(rng, make(rng, (1, rows), 16, 1100, dtype=dtype, masked="mask"))

    in_threads(work)


NO_WORD = """
import mlx.core as mx
from mlx_fused import fused_linear_cross_entropy

x, weight = mx.ones((2, 5, 16)), mx.ones((40, 16))

def loss(x, targets, reduction="sum"):
    return fused_linear_cross_entropy(x, weight, targets, reduction=reduction)

for target in (-1, 40, 2**40):
    targets = mx.zeros((2, 5), mx.int64)
    targets[1, 2] = target
    losses = (lambda: loss(x, targets, "none"), lambda: loss(x, targets), lambda: mx.grad(loss)(x, targets))
    for evaluate in losses:
        try:
            mx.eval(evaluate())
        except RuntimeError as error:
            print(error)
print(loss(x, mx.zeros((2, 5), mx.int64)).item() > 0)  # evaluation goes on
"""


def test_a_target_that_is_no_word():
    """In a process of its own: MLX 0.32.4 counts some of what fails as under way, and may wait for it."""
    run = subprocess.run([sys.executable, "-c", NO_WORD], capture_output=True, text=True, check=True)
    *errors, goes_on = run.stdout.splitlines()
    assert goes_on == "True" and len(errors) == 9
    for i, error in enumerate(errors):
        target = (-1, 40, 2**40)[i // 3]
        assert re.search(rf"targets must be from 0 to 39, or left out by mask .*, but got {target}\.", error)


@pytest.mark.parametrize("target", [-1, 40, 2**40])
def test_a_target_that_is_no_word_elsewhere(rng, target):
    """NaN in MLX's own operations; nothing where the row does not count."""
    loss = make(rng, (2, 5), 16, 40)
    targets = mx.array(loss.targets)
    targets[1, 2] = target
    losses = Loss(loss.head, targets)(route="composed")
    assert mx.isnan(losses[1, 2]) and mx.isnan(losses).sum() == 1
    mask = mx.ones((2, 5), mx.bool_)
    mask[1, 2] = False
    assert Loss(loss.head, targets, mask)()[1, 2] == 0


LAYER = LinearOperands(mx.ones((6, 4)), lora_a=mx.ones((4, 2)), lora_b=mx.ones((2, 6)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": mx.ones((2, 3, 5))}, ValueError, r"weight must have shape \(6, 5\) but got \(6, 4\)"),
        ({"x": mx.ones((2, 3, 4), mx.int32)}, ValueError, "x must be float32, float16 or bfloat16"),
        ({"x": mx.array(1.0)}, ValueError, r"x must have shape \[..., K\] but got \(\)"),
        ({"x": None}, TypeError, "x must be array but got NoneType"),
        ({"weight": mx.ones((0, 4))}, ValueError, "the rows of weight must be at least 1 but got 0"),
        ({"weight": mx.ones(4)}, ValueError, "weight must have 2 dimensions"),
        ({"weight": nn.Linear(4, 6)}, TypeError, r".* but got Linear\. LinearOperands\.of makes one of it"),
        ({"weight": nn.Embedding(6, 4)}, TypeError, r".* but got Embedding\. LinearOperands\.of_base makes"),
        ({"targets": mx.zeros((2, 4), mx.int32)}, ValueError, r"targets must have shape \(2, 3\) but got"),
        ({"targets": mx.zeros((2, 3))}, ValueError, "targets must be integers but got float32"),
        ({"targets": [1]}, TypeError, "targets must be array but got list"),
        ({"bias": mx.ones(5)}, ValueError, r"bias must have shape \(6,\) but got \(5,\)"),
        ({"weight": LAYER, "bias": mx.ones(6)}, ValueError, "bias must be left out where weight is"),
        ({"weight": LAYER._replace(lora_scale=mx.array(1.0))}, TypeError, "lora_scale must be float or int"),
        ({"mask": mx.ones((2, 3))}, ValueError, "mask must be bool but got float32"),
        ({"mask": mx.ones((3,), mx.bool_)}, ValueError, r"mask must have shape \(2, 3\) but got \(3,\)"),
        ({"mask": "causal"}, TypeError, "mask must be array but got str"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be int but got float"),
        ({"scale": mx.array(1.0)}, TypeError, "scale must be float or int but got array"),
        ({"softcap": 0.0}, ValueError, "softcap must be greater than 0 and finite but got 0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be greater than 0 and finite but got inf"),
        ({"softcap": "3"}, TypeError, "softcap must be float or int but got str"),
        (
            {"label_smoothing": 1.0},
            ValueError,
            "label_smoothing must be at least 0 and less than 1 but got 1",
        ),
        ({"label_smoothing": None}, TypeError, "label_smoothing must be float or int but got NoneType"),
        ({"reduction": "max"}, ValueError, "reduction must be 'none', 'mean' or 'sum' but got 'max'"),
        ({"route": "fast"}, ValueError, "route must be 'composed', 'fused' or None but got 'fast'"),
        ({"stream": "cpu"}, TypeError, "stream must be Stream or Device or DeviceType but got str"),
    ],
)
def test_errors(changes, error, message):
    given = {"x": mx.ones((2, 3, 4)), "weight": mx.ones((6, 4)), "targets": mx.zeros((2, 3), mx.int32)}
    with pytest.raises(error, match=rf"\[fused_linear_cross_entropy\] {message}"):
        fused_linear_cross_entropy(**given | changes)


def test_a_quantized_weight_has_no_gradient(rng):
    loss = make(rng, (2, 5), 32, 40, ("affine", 32, 4))
    with pytest.raises(ValueError, match="quantized weights have no gradient"):
        loss.gradients(mx.ones((2, 5)), [("weight", None)])
    mxfp4 = make(rng, (2, 5), 32, 40, ("mxfp4", 32, 4))
    with pytest.raises(ValueError, match="scales of mode 'mxfp4' have no gradient"):
        mxfp4.gradients(mx.ones((2, 5)), [("scales", None)])
