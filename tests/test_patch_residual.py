"""The output projection and the residual as one operation: which layers, which additions, which results."""

import copy
import pickle

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import grad_checkpoint

import mlx_fused
from adding_layers import Direct, Layer, Mixer, Named, nodes, residual
from tiny_models import Attention, assert_same, sample


class Reused(Layer):
    def __call__(self, x):
        residual = x
        x = self.norm(x)
        x = self.attn(x)
        x = residual + x
        return x


class Scaled(Layer):
    def __call__(self, x):
        return x + self.alpha * self.attn(x)


class ScaledByARoot(Layer):
    """As minicpm's."""

    def __call__(self, x):
        return x + self.attn(x) * (2 * self.alpha / 4**0.5)


class GatedByAName(Layer):
    def __call__(self, x):
        gate = mx.sigmoid(x)
        return x + self.attn(x) * gate


class GatedByACall(Layer):
    """As the shared experts of qwen2_moe."""

    def __call__(self, x):
        return x + mx.sigmoid(self.alpha) * self.attn(x)


class Branches(Layer):
    def __call__(self, x):
        if self.parallel:
            r = self.norm(x)
            x = x + 1
        else:
            r = self.attn(x)
        if self.training:
            x = x + r
            r = self.norm(x)
        else:
            x = r + x
        return x


class Either(Layer):
    """As layers that are attention or something else."""

    def __call__(self, x):
        if not self.parallel:
            r = self.attn(x)
        else:
            r = x
            x = self.norm(r)
        return x + r


class Sum(Layer):
    """As layers with parallel branches."""

    def __call__(self, x):
        return self.attn(x) + self.norm(x) + x


class Wrapped(Layer):
    """As exaone, whose attention module is in another that is never called."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.attn = self.pop("attn")

    def __call__(self, x):
        return x + self.inner.attn(x)


class PostNorm(Layer):
    def __call__(self, x):
        return x + self.norm(self.attn(x))


class PostNormNamed(Layer):
    def __call__(self, x):
        r = self.attn(x)
        r = self.norm(r)
        return x + r


class PairMixer(Mixer):
    def __call__(self, x):
        return super().__call__(x), x


class Pair(Layer):
    def __init__(self):
        super().__init__()
        self.attn = PairMixer()

    def __call__(self, x):
        r, _ = self.attn(x)
        return x + r


class Twice(Layer):
    def __call__(self, x):
        r = self.attn(x)
        return x + r, x + r


class Unused(Layer):
    def __call__(self, x):
        r = self.attn(x)
        r = x
        return r


class Returned(Layer):
    def __call__(self, x):
        return self.attn(x)


class Elsewhere(Layer):
    def __call__(self, x):
        attn = self.attn
        return x + attn(x)


class Inherited(Named):
    pass


class Borrowed(PostNorm):
    __call__ = Named.__call__


Unreadable = type("Unreadable", (Layer,), {"__call__": lambda self, x: x + self.attn(x)})

FUSED = [Named, Direct, Reused, Scaled, ScaledByARoot, Branches, Either, Sum, Wrapped]
SKIPPED = {
    PostNorm: "PostNorm gives its output to self.norm",
    PostNormNamed: "PostNormNamed gives its output to self.norm",
    Pair: "Pair takes more than one result from it",
    Twice: "Twice uses its output more than once",
    Unused: "Unused does not use it",
    Returned: "Returned does not add its output",
    Elsewhere: "Elsewhere does not call it",
    GatedByAName: "GatedByAName multiplies its output by gate",
    GatedByACall: "GatedByACall multiplies its output by mx.sigmoid(self.alpha)",
    Borrowed: "the code of Borrowed cannot be read",
    Unreadable: "the code of Unreadable cannot be read",
}


@pytest.mark.parametrize("cls", FUSED)
def test_layers_that_add(cls):
    layer, x = cls(), sample(2, 3, 64)
    expected = layer(x)
    part = residual(layer)
    assert part.fused
    actual = layer(x)
    assert nodes(actual) == 1 and (part.calls.fused, part.calls.fallen_back) == (1, 0)
    assert_same([actual], [expected])


@pytest.mark.parametrize("cls", SKIPPED)
def test_layers_that_do_not(cls):
    layer, x = cls(), sample(2, 3, 64)
    expected = layer(x)
    part = residual(layer)
    assert part.obstacle == SKIPPED[cls]
    actual = layer(x)
    assert part.calls.fused == 0
    for a, e in zip(*([y] if isinstance(y, mx.array) else y for y in (actual, expected)), strict=True):
        assert nodes(a) == 0
        assert_same([a], [e])


def test_a_lone_attention_module():
    assert residual(Mixer()).obstacle == "no layer calls it"
    assert residual(Attention()).obstacle == (
        "none of o_proj, out_proj, dense, wo, c_proj, attn_resid is there"
    )


def test_a_part_is_patched_as_it_was_in_the_whole():
    layer = Named()
    assert residual(layer).fused
    assert residual(layer.attn).fused
    mlx_fused.unpatch(layer)
    assert not residual(layer.attn).fused
    assert residual(layer).fused


@pytest.mark.parametrize("cls", [Named, Inherited])
def test_a_layer_with_checkpointing(monkeypatch, cls):
    layer, x = cls(), sample(1, 3, 64)
    expected = mx.grad(lambda x: layer(x).sum())(x)
    monkeypatch.setattr(cls, "__call__", cls.__call__)  # grad_checkpoint edits the class
    grad_checkpoint(layer)
    part = residual(layer)
    assert part.fused  # as the class's source has it
    assert_same([mx.grad(lambda x: layer(x).sum())(x)], [expected])
    assert part.calls.fused == 2  # backward runs the layer again


# The array that adds itself


class Probe(Named):
    """Hands the attention's output to whoever asks."""

    def use(self, x, use):
        return use(x, self.attn(x))


USES = {
    "x + r": lambda x, r: x + r,
    "r + x": lambda x, r: r + x,
    "x + r * 0.5": lambda x, r: x + r * 0.5,
    "2 * r + x": lambda x, r: 2 * r + x,
}
OTHER_USES = {
    "x - r": lambda x, r: x - r,
    "mx.add(x, r)": lambda x, r: mx.add(x, r),
    "x + (4 * r) * 0.5": lambda x, r: x + (4 * r) * 0.5,
    "r + 1": lambda x, r: r + 1,
    "r + row": lambda x, r: r + x[:, :1],
    "r * x": lambda x, r: x + r * x,
    "x + r.astype": lambda x, r: x.astype(mx.float16) + r,
    "norm": lambda x, r: x + mx.fast.rms_norm(r, None, 1e-5),
    "reshape": lambda x, r: x + r.reshape(r.shape),
    "index": lambda x, r: x[0] + r[0],
    "True": lambda x, r: x + r * True,
    "copy": lambda x, r: x + copy.copy(r),
    "deepcopy": lambda x, r: x + copy.deepcopy(r),
    "pickle": lambda x, r: x + pickle.loads(pickle.dumps(r)),
    "evaluated": lambda x, r: (mx.eval(r), x + r)[1],
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_additions(use):
    layer, x = Probe(), sample(2, 3, 64)
    expected = layer.use(x, use)
    part = residual(layer)
    actual = layer.use(x, use)
    assert type(actual) is mx.array and nodes(actual) == 1 and part.calls.fused == 1
    assert_same([actual], [expected])


@pytest.mark.parametrize("use", OTHER_USES.values(), ids=OTHER_USES)
def test_anything_else_is_as_it_was(use):
    layer, x = Probe(), sample(2, 3, 64)
    expected = layer.use(x, use)
    part = residual(layer)
    actual = layer.use(x, use)
    assert nodes(actual) == 0 and (part.calls.fused, part.calls.fallen_back) == (0, 1)
    assert_same([actual], [expected])


IN_PLACE = ["+=", "-=", "*=", "/=", "//=", "%=", "**=", "[0] ="]


@pytest.mark.parametrize("operator", IN_PLACE)
def test_changed_in_place_it_is_an_array_like_any_other(operator):
    layer, x = Probe(), sample(2, 3, 64)

    def use(x, r):
        alias = r
        scope = {"r": r, "x": 2 * mx.ones_like(x) if operator != "[0] =" else 2}
        exec(f"r {operator} x" if operator != "[0] =" else "r[0] = x", scope)
        return mx.stack([x + scope["r"], x + alias])

    expected = layer.use(x, use)
    residual(layer)
    actual = layer.use(x, use)
    assert nodes(actual) == 0
    assert mx.array_equal(actual, expected, equal_nan=True)


def test_a_layer_of_tokens_without_a_batch():
    layer, x = Named(), sample(3, 64)
    expected = layer(x)
    part = residual(layer)
    actual = layer(x)
    assert nodes(actual) == 1 and (part.calls.fused, part.calls.fallen_back) == (1, 0)
    assert_same([actual], [expected])


def test_two_outputs_that_are_added_first():
    layer, x = Probe(), sample(2, 3, 64)

    def both(x, r):
        return [r + r, x + (r + 2 * r), 0.5 * (r + r) + x]

    expected = layer.use(x, both)
    part = residual(layer)
    actual = layer.use(x, both)
    assert [nodes(y) for y in actual] == [0, 2, 2] and part.calls.fused == 4
    assert_same(actual, expected)


def test_under_transformations():
    layer, x = Scaled(), sample(2, 3, 64)

    def results():
        loss = lambda x: (layer(x) * x).sum()  # noqa: E731
        return [
            mx.grad(loss)(x),
            mx.compile(lambda x: layer(x))(x),
            mx.vmap(layer)(x[:, None]),
            mx.vmap(mx.vmap(layer))(x[:, None, None]),
            mx.checkpoint(layer)(x),
            *mx.jvp(layer, [x], [x])[1],
            *mx.jvp(mx.grad(loss), [x], [x])[1],  # a Hessian-vector product
            *mx.vjp(lambda x: mx.jvp(layer, [x], [x])[1][0], [x], [x])[1],
            *(g for _, g in tree_flatten(nn.value_and_grad(layer, loss)(x)[1])),
        ]

    expected = results()
    part = residual(layer)
    assert_same(results(), expected)
    assert part.calls.fused >= 5 and part.calls.fallen_back == 0


def test_a_compiled_call_counts_when_traced():
    layer, x = Named(), sample(1, 3, 64)
    part = residual(layer)
    compiled = mx.compile(lambda x: layer(x))
    for _ in range(3):
        mx.eval(compiled(x))
    assert part.calls.total == 1


# Rounding


def test_one_rounding_or_where_the_layer_rounds():
    layer, x = Scaled(), mx.random.normal((2, 3, 64)).astype(mx.bfloat16)
    layer.alpha = 0.3
    layer.apply(lambda p: mx.random.normal(p.shape).astype(mx.bfloat16))
    stock = layer(x)
    with mlx_fused.patched(layer, exact=True):
        exact = layer(x)
    with mlx_fused.patched(layer):
        once = layer(x)
    assert_same([exact], [stock])
    assert not mx.array_equal(once, stock)
    bf16 = lambda a: mx.array(a, mx.bfloat16).astype(mx.float32)  # noqa: E731
    q = layer.attn.q_proj(x).astype(mx.float32)  # of attention, whose result is rounded
    product = q @ layer.attn.o_proj.weight.astype(mx.float32).T
    assert_same([once], [(x.astype(mx.float32) + bf16(0.3) * product).astype(mx.bfloat16)])
