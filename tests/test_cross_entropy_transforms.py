"""The transforms of the loss of a head's logits, and what it holds in memory."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import oracle
from active_memory import kept
from cross_entropy import Loss, make
from graph import primitives
from mlx_fused import fused_linear_cross_entropy
from operands import normal
from test_forward import dtypes
from test_memory import nbytes, peak


def of_sum(route, smoothing, targets, mask):
    def loss(x, weight, bias):
        return (
            fused_linear_cross_entropy(
                x, weight, targets, bias=bias, mask=mask, softcap=3.0, label_smoothing=smoothing, route=route
            )
            ** 2
        ).sum()

    return loss


TRANSFORMS = {
    "grad": lambda f: mx.grad(f, (0, 1, 2)),
    "of x alone": lambda f: mx.grad(f),
    "compile of grad": lambda f: mx.compile(mx.grad(f, (0, 1, 2))),
    "grad of compile": lambda f: mx.grad(mx.compile(f), (0, 1, 2)),
    "compile of grad of x": lambda f: mx.compile(mx.grad(f)),
    "grad of checkpoint": lambda f: mx.grad(mx.checkpoint(f), (0, 1, 2)),
    "grad of grad": lambda f: mx.grad(
        lambda *a: sum((g**2).sum() for g in mx.grad(f, (0, 1, 2))(*a)), (0, 1, 2)
    ),
    "grad of grad of x": lambda f: mx.grad(lambda *a: (mx.grad(f)(*a) ** 2).sum(), (0, 1, 2)),
    "vmap of grad of x": lambda f: (
        lambda x, *a: mx.vmap(mx.grad(f), (0, None, None))(mx.stack([x, 2 * x]), *a)
    ),
    "jvp": lambda f: lambda *a: mx.jvp(f, list(a), [mx.sin(x) for x in a])[1],
    "jvp of grad": lambda f: lambda *a: mx.jvp(mx.grad(f), list(a), [mx.sin(x) for x in a])[1],
    "vmap": lambda f: lambda x, *a: mx.vmap(f, (1, None, None))(mx.stack([x, 2 * x, x + 1], 1), *a),
    "vmap of all": lambda f: lambda *a: mx.vmap(f)(*[mx.stack([x, x + 1]) for x in a]),
    "vmap of grad": lambda f: lambda *a: mx.vmap(mx.grad(f, (0, 1, 2)))(*[mx.stack([x, x + 1]) for x in a]),
    "grad of vmap": lambda f: (
        lambda x, *a: mx.grad(lambda x: mx.vmap(f, (0, None, None))(mx.stack([x, 2 * x]), *a).sum())(x)
    ),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_those_of_the_composed_form(rng, transform, smoothing):
    loss = make(rng, (2, 9), 12, 70)
    arrays = [loss.head.leaves[key] for key in loss.head.trainable]
    mask = mx.array(rng.random((2, 9)) < 0.6)
    results = [
        oracle.leaves(transform(of_sum(route, smoothing, loss.targets, mask))(*arrays))
        for route in (None, "composed")
    ]
    for ours, mlxs in zip(*results, strict=True):
        size = float(mx.abs(mlxs).max())
        assert size > 0 and float(mx.abs(ours - mlxs).max()) < 2.0**-16 * size


def test_transforms_of_a_quantized_head(rng):
    loss = make(rng, (2, 9), 64, 70, ("affine", 32, 4), rank=2)
    x, scales = loss.head.x, loss.head.leaves["scales", None]
    stack = mx.stack([x, 2 * x])

    def f(x, scales, route=None):
        return Loss(loss.head.replace(x=x, scales=scales), loss.targets)(route=route).sum()

    def apart(f):
        return mx.stack([f(x, scales) for x in stack])

    def composed(x, scales):
        return f(x, scales, "composed")

    for ours, mlxs in (
        (mx.vmap(f, (0, None))(stack, scales), apart(composed)),
        (mx.vmap(mx.grad(f), (0, None))(stack, scales), apart(mx.grad(composed))),
        (mx.grad(f, (0, 1))(x, scales), mx.grad(composed, (0, 1))(x, scales)),
        (mx.jvp(lambda x: f(x, scales), [x], [mx.sin(x)])[1], apart(lambda *a: mx.grad(composed)(*a))[0]),
    ):
        for a, b in zip(oracle.leaves(ours), oracle.leaves(mlxs), strict=True):
            b = (b * mx.sin(x)).sum() if a.ndim < b.ndim else b
            assert float(mx.abs(a - b).max()) < 2.0**-16 * float(mx.abs(b).max())


def test_a_mapped_gradient_of_a_frozen_quantized_head(rng):
    loss = make(rng, (2, 9), 64, 70, ("affine", 32, 4))
    f = mx.grad(lambda x: loss.of([("x", None)], [x], reduction="sum"))
    x = mx.stack([loss.head.x, 2 * loss.head.x])
    ours, each = mx.vmap(f)(x), mx.stack([f(one) for one in x])
    assert float(mx.abs(ours - each).max()) < 2.0**-16 * float(mx.abs(each).max())


def test_the_targets_may_be_mapped(rng):
    loss = make(rng, (2, 9), 12, 70)
    ours = mx.vmap(lambda t: Loss(loss.head, t)())(mx.stack([loss.targets, 69 - loss.targets]))
    assert float(mx.abs(ours[0] - loss()).max()) < 2.0**-16


def test_without_row_count_in_a_compiled_function(rng):
    """mx.compile(shapeless=True) runs with another number of rows."""
    few, many = make(rng, (1, 7), 12, 40), make(rng, (1, 90), 12, 40)
    for reduction in ("none", "mean"):

        def f(x, t, reduction=reduction):
            return Loss(few.head.replace(x=x), t)(reduction=reduction)

        step = mx.compile(f, shapeless=True)
        for loss in (few, many):
            expected = f(loss.head.x, loss.targets)
            assert float(mx.abs(step(loss.head.x, loss.targets) - expected).max()) < 2.0**-16


@pytest.mark.parametrize(
    "shape, message", [((9, 12), "targets must have shape"), ((4, 8), "must have size 12")]
)
def test_a_compiled_function_checks_other_shapes(shape, message):
    weight = mx.ones((40, 12))
    compiled = mx.compile(lambda x, t: fused_linear_cross_entropy(x, weight, t), shapeless=True)
    mx.eval(compiled(mx.ones((4, 12)), mx.zeros(4, mx.int32)))
    with pytest.raises(ValueError, match=message):
        compiled(mx.ones(shape), mx.zeros(4, mx.int32))


class Head:
    """A head in training, of so many tokens and words."""

    hidden = 32

    def __init__(self, tokens, words, dtype=mx.float32):
        rng = np.random.default_rng(0)
        self.x, self.weight = (normal(rng, (n, self.hidden), dtype) for n in (tokens, words))
        self.targets = mx.array(rng.integers(0, words, tokens))
        mx.eval(self.x, self.weight, self.targets)

    def loss(self, x, weight):
        return fused_linear_cross_entropy(x, weight, self.targets, reduction="sum")

    def of_x(self, x):
        return self.loss(x, self.weight)

    def peak(self, argnums):
        step = mx.value_and_grad(self.loss, argnums)
        mx.eval(step(self.x, self.weight))
        return peak(lambda: step(self.x, self.weight), [])


@dtypes
def test_logits_are_never_there(dtype):
    """Neither in MLX's memory nor in the process's. With 8192 tokens and 262,144 words they were 8 GB."""
    head = Head(2048, 8192, dtype)
    logits = 2048 * 8192 * dtype.size
    # x's alone is scaled, in place only if evaluation is not ahead of the forward pass.
    for argnums, grads in ((0, [head.x, head.x]), ((0, 1), [head.x, head.weight])):
        assert head.peak(argnums) <= nbytes(grads) + 2**16 < logits / 8
    assert kept(head.of_x, [head.x]) <= nbytes(head.x) + 2**16  # x's gradient
    assert kept(head.loss, [head.x, head.weight]) <= 2**16


RESIDENT = """
import resource, sys
import mlx.core as mx, mlx_fused

tokens, words, hidden, dtype = 2048, 32768, 256, getattr(mx, sys.argv[1])
x, weight = mx.ones((tokens, hidden), dtype), mx.ones((words, hidden), dtype)
targets = mx.zeros(tokens, mx.int32)
step = mx.value_and_grad(
    lambda x, w, t: mlx_fused.fused_linear_cross_entropy(x, w, t, reduction="sum"), eval(sys.argv[2])
)

def held():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

mx.eval(x, weight, targets)
mx.eval(step(x[:2], weight[:64], targets[:2]))
before = held()
gradients = step(x, weight, targets)[1]
mx.eval(gradients)
given = gradients if isinstance(gradients, tuple) else [gradients]
print(held() - before - sum(g.nbytes for g in given) / 2**20)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("argnums", ["0", "(0, 1)"], ids=["frozen", "trained"])
def test_the_process_holds_no_logits(dtype, argnums):
    """They are 256 MB in float32."""
    command = [sys.executable, "-c", RESIDENT, dtype, argnums]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 32


GRADIENTS = {
    "once": lambda f, x: mx.grad(f)(x),
    "compile of grad": lambda f, x: mx.compile(mx.grad(f))(x),
    "grad of compile": lambda f, x: mx.grad(mx.compile(f))(x),
    "grad of checkpoint": lambda f, x: mx.grad(mx.checkpoint(f))(x),
    "evaluated before": lambda f, x: mx.grad(lambda x: [y := f(x), mx.eval(y), y][0])(x),
    "twice": lambda f, x: mx.grad(lambda x: f(x) + f(x))(x) / 2,
    "of a product": lambda f, x: mx.grad(lambda x: f(x) ** 2)(x) / (2 * f(x)),
}


@pytest.fixture
def many():
    """Rows and words of several chunks."""
    return 300, 2100


@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_gradient_of_a_frozen_head_however_it_comes_about(rng, many, gradient, dtype):
    rows, words = many
    loss = make(rng, (2, rows), 12, words, dtype=dtype, masked="both", softcap=4.0)
    expected = loss.gradients(mx.ones((2, rows)), loss.head.trainable)[0]  # made again, with the weight's
    actual = gradient(lambda x: loss.of([("x", None)], [x], reduction="sum"), loss.head.x)
    bound = 2.0 ** (-15 if dtype == mx.float32 else -6) * float(mx.abs(expected).max())
    assert float(mx.abs(actual - expected).max()) < bound


def test_a_frozen_head_makes_its_logits_once(rng):
    loss = make(rng, (2, 9), 12, 40)
    for wanted, makes_again in (([("x", None)], 0), ([("x", None), ("weight", None)], 1)):
        grads = primitives(*loss.gradients(mx.ones((2, 9)), wanted))
        assert grads["FusedLinearCrossEntropy"] == 1 and grads["FusedLinearCrossEntropyGrad"] == makes_again


def test_inference_makes_no_gradient(rng):
    head = Head(2048, 64)
    for transform in (lambda f: f, mx.compile):
        f = transform(head.of_x)
        mx.eval(f(head.x))
        assert peak(lambda f=f: f(head.x), []) < nbytes(head.x) / 2
