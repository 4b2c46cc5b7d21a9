"""What an activation is of is there in the backward pass, however it comes about; without it, it is empty.

On integers, against MLX's differentiation of its own operations.
"""

import mlx.core as mx
import pytest

import mlx_fused
import oracle
from operands import few_integers, integers

GRADIENTS = {
    "grad": lambda f, argnums: mx.grad(f, argnums),
    "value_and_grad": lambda f, argnums: lambda *args: mx.value_and_grad(f, argnums)(*args)[1],
    "compile of grad": lambda f, argnums: mx.compile(mx.grad(f, argnums)),
    "grad of compile": lambda f, argnums: mx.grad(mx.compile(f), argnums),
    "grad of checkpoint": lambda f, argnums: mx.grad(mx.checkpoint(f), argnums),
    "compile of grad of checkpoint": lambda f, argnums: mx.compile(mx.grad(mx.checkpoint(f), argnums)),
    "grad of compile of checkpoint": lambda f, argnums: mx.grad(mx.compile(mx.checkpoint(f)), argnums),
}
FUNCTIONS = {
    "once": lambda h: h,
    "evaluated": lambda h: (mx.eval(h), h)[1],
    "stopped": mx.stop_gradient,
    "stopped in part": lambda h: h + mx.stop_gradient(h),
    "a view": lambda h: h[:, ::-1],
}
gradients = pytest.mark.parametrize("gradient", GRADIENTS)
routes = pytest.mark.parametrize("route", ["fused", "composed"])


def operands(rng):
    shapes = (2, 3, 6), (5, 6), (5, 6), (6, 5)
    return [few_integers(rng, s) for s in shapes]


def loss(route, function="once", linear=False, times=1):
    """Of an MLP; ``function`` is of what it has between."""

    def loss(x, gate, up, down):
        y = x
        for _ in range(times):
            if linear:
                h = mlx_fused.fused_linear(x, gate, activation="relu2", route=route)
            else:
                h = mlx_fused.fused_gated_projection(x, (gate, up), activation="relu", route=route)
            h = FUNCTIONS[function](h)
            y = mlx_fused.fused_output_projection_residual(h, down, residual=y, route=route)
        return (y * mx.arange(6)).sum()

    return loss


def check(monkeypatch, args, route, gradient, argnums=(0, 1, 2, 3), **options):
    expected = mx.grad(loss("composed", **options), argnums)(*args)
    monkeypatch.setenv("MLX_FUSED_ROUTE", route)
    transformed = GRADIENTS[gradient](loss(None, **options), argnums)
    for _ in range(2):
        oracle.assert_equal(transformed(*args), expected)


@routes
@pytest.mark.parametrize(
    ("function", "gradient"),
    # mx.compile evaluates nothing.
    [(f, g) for f in FUNCTIONS for g in GRADIENTS if not ("evaluated" in f and "compile" in g)],
)
@pytest.mark.parametrize("linear", [False, True], ids=["gated", "linear"])
def test_gradients(rng, linear, function, gradient, route, monkeypatch):
    check(monkeypatch, operands(rng), route, gradient, function=function, linear=linear)


@routes
@gradients
@pytest.mark.parametrize("argnums", [(0,), (1,), (2,), (3,), (1, 3)], ids=str)
def test_gradients_of_some(rng, argnums, gradient, route, monkeypatch):
    check(monkeypatch, operands(rng), route, gradient, argnums)


@routes
@gradients
@pytest.mark.parametrize("linear", [False, True], ids=["gated", "linear"])
def test_the_same_call_twice(rng, linear, gradient, route, monkeypatch):
    """Which mx.compile may merge."""
    check(monkeypatch, operands(rng), route, gradient, times=2, linear=linear)


@routes
def test_vmap_of_gradients(rng, route, monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", route)
    x, *weights = operands(rng)
    xs = integers(rng, (3, *x.shape))
    for transform in (lambda f: f, mx.compile):
        mapped = transform(mx.vmap(mx.grad(loss(None), (0, 1, 3)), (0, None, None, None)))(xs, *weights)
        each = [mx.grad(loss("composed"), (0, 1, 3))(x, *weights) for x in xs]
        oracle.assert_equal(mapped, [mx.stack(g) for g in zip(*each, strict=True)])


@routes
def test_inference_and_gradients_of_one_compiled_function(rng, route, monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", route)
    args = operands(rng)
    compiled, gradient = mx.compile(loss(None)), mx.grad(loss("composed"), (0, 1, 2, 3))(*args)
    value = loss("composed")(*args)
    for _ in range(2):
        oracle.assert_equal([compiled(*args)], [value])
        oracle.assert_equal(mx.grad(compiled, (0, 1, 2, 3))(*args), gradient)


@routes
def test_a_gradient_of_what_was_evaluated_before(rng, route, monkeypatch):
    """The result is evaluated, and then a backward operation is asked for by hand."""
    monkeypatch.setenv("MLX_FUSED_ROUTE", route)
    x, gate, up, down = operands(rng)
    for evaluate in (lambda h: None, mx.eval, mx.async_eval):
        h = mlx_fused.fused_gated_projection(x, (gate, up), activation="relu")
        evaluate(h)
        grads = mlx_fused.fused_output_projection_residual_bwd(x, h, down, False)
        expected = x @ down, mx.flatten(x, 0, 1).T @ mx.flatten(h, 0, 1)
        oracle.assert_equal(grads[:2], expected)
