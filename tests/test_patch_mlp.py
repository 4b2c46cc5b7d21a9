"""Patched MLPs: which code is known, what it runs as, and what keeps its own code."""

import copy
import pickle
import sys
from collections import Counter
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import activations
from mlx_lm.models.activations import SwigluOAI, swiglu
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.trainer import grad_checkpoint

import mlx_fused
from graph import primitives
from mlx_fused.operations import call
from oracle import UNIT_ROUNDOFF
from tiny_models import HIDDEN, assert_same, integers, sample
from tiny_models import make as make_model

K, N = 32, 48


class Layer(nn.Module):
    """Adds its MLP's output."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def __call__(self, x):
        return x + self.mlp(x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(K, N, bias=False), nn.Linear(K, N, bias=False)
        self.down_proj = nn.Linear(N, K, bias=False)

    def __call__(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(K, 2 * N), nn.Linear(N, K)

    def __call__(self, x):
        gate, x = mx.split(self.wi(x), 2, axis=-1)
        return self.wo(nn.gelu_approx(gate) * x)


class UpFirst(Packed):
    def __call__(self, x):
        halves = mx.split(self.wi(x), 2, axis=-1)
        return self.wo(halves[0] * nn.relu(halves[1]))


class TwoLayers(Packed):
    def __init__(self):
        super().__init__()
        self.wi = nn.Linear(K, N)
        self.act = nn.GELU()

    def __call__(self, x):
        x = self.wi(x)
        x = self.act(x)
        return self.wo(x)


class Squared(TwoLayers):
    def __call__(self, x):
        return self.wo(nn.relu(self.wi(x)).square())


class Clipped(Gated):
    def __init__(self):
        super().__init__()
        self.activation = SwigluOAI(alpha=1.5, limit=0.5)

    def __call__(self, x):
        return self.down_proj(self.activation(self.up_proj(x), self.gate_proj(x)))


class Normed(Gated):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(K)

    def __call__(self, x):
        x = self.norm(x)
        return self.down_proj(self.up_proj(x) * nn.silu(self.gate_proj(x)))


class Chosen(Gated):
    """By settings, as step3p5's, gear's and nemotron-nas's."""

    limit, kind = None, "gelu"

    def __init__(self):
        super().__init__()
        self.limit, self.kind = None, "gelu"

    def __call__(self, x):
        if self.limit is not None:
            return self.down_proj(mx.minimum(self.gate_proj(x), self.limit) * self.up_proj(x))
        act = _ACTIVATIONS[self.kind]
        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))


_ACTIVATIONS = {"gelu": nn.gelu, "silu": nn.silu}
KNOWN = {
    Gated: "silu",
    Packed: "gelu_approx",
    UpFirst: "relu",
    TwoLayers: "gelu",
    Squared: "relu2",
    Clipped: "clipped_swiglu",
    Normed: "silu",
    Chosen: "gelu",
}


def make(cls):
    mx.random.seed(0)
    return Layer(cls())


def close(actual, expected):
    """Sums of K products, and then of N, in another order."""
    bound = 8 * (K**0.5 + N**0.5) * UNIT_ROUNDOFF[mx.float32]
    return (mx.abs(actual - expected).max() <= bound * mx.abs(expected).max()).item()


def fused(*arrays):
    nodes = primitives(*arrays)
    hidden = nodes["FusedGatedProjection"] + nodes["FusedLinear"]
    return hidden, nodes["FusedOutputProjection"], nodes["Matmul"] + nodes["AddMM"]


@pytest.mark.parametrize("shape", [(2, 5, K), (3, K), (1, 1, K), (2, 0, K)])
@pytest.mark.parametrize("cls", KNOWN)
def test_two_operations(cls, shape):
    layer, x = make(cls), mx.random.normal(shape, key=mx.random.key(1))
    expected = layer(x)
    (report,) = mlx_fused.patch(layer).mlps
    assert (report.name, report.mlp.note) == ("mlp", KNOWN[cls])
    assert report.mlp.fused and report.residual.fused
    actual = layer(x)
    assert fused(actual) == (1, 1, 0) and actual.shape == expected.shape
    assert not x.size or close(actual, expected)
    assert str(report.mlp.calls) == str(report.residual.calls) == "1/0"


@pytest.mark.parametrize("cls", KNOWN)
def test_gradients(cls):
    layer, x = make(cls), mx.random.normal((2, 5, K), key=mx.random.key(1))

    def gradients():
        loss = nn.value_and_grad(layer, lambda layer, x: (layer(x) * mx.cos(x)).sum())
        return loss(layer, x)[1]["mlp"]

    expected = gradients()
    mlx_fused.patch(layer)
    for name, of in gradients().items():
        for parameter, gradient in of.items():
            assert close(gradient, expected[name][parameter]), (name, parameter)


def test_a_setting_that_changes_changes_what_runs():
    layer, x = make(Chosen), mx.random.normal((1, 3, K))
    mlx_fused.patch(layer)
    for kind, limit, nodes in (("gelu", None, 1), ("silu", None, 1), ("gelu", 0.3, 2)):
        layer.mlp.kind, layer.mlp.limit = kind, limit
        actual = layer(x)
        with mlx_fused.patched(layer, mlp=False, linear=False, o_residual=False):
            expected = layer(x)
        assert fused(actual)[0] == nodes and close(actual, expected)


class DoubledMLP(Gated):
    def __call__(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), 2 * self.up_proj(x)))


class DroppedMLP(Gated):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def __call__(self, x):
        return self.down_proj(self.dropout(swiglu(self.gate_proj(x), self.up_proj(x))))


class TwoMLP(Gated):
    def __call__(self, x, y=None):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x if y is None else y)))


class TanhMLP(TwoLayers):
    def __call__(self, x):
        return self.wo(mx.tanh(self.wi(x)))


@partial(mx.compile, shapeless=True)
def _swiglu(gate, x):
    return nn.silu(gate) * x + x


class SameNameMLP(Gated):
    """Its swiglu is another."""

    def __call__(self, x):
        return self.down_proj(_swiglu(self.gate_proj(x), self.up_proj(x)))


class ReadsMLP(Gated):
    def __call__(self, x):
        x = x.astype(self.gate_proj.weight.dtype)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class ByValueMLP(Gated):
    def __call__(self, x):
        if x.shape[0] > 1:
            return x
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class ByResultMLP(Gated):
    def __call__(self, x):
        up = self.up_proj(x)
        if up:
            return self.down_proj(nn.silu(self.gate_proj(x)) * up)
        return x


def _silu(x):
    return nn.silu(x)


_mapped = mx.vmap(_silu, in_axes=0, out_axes=1)  # looks like _silu


class MappedMLP(Gated):
    def __call__(self, x):
        return self.down_proj(_mapped(self.gate_proj(x)) * self.up_proj(x))


class MappedCompiledMLP(Gated):
    def __call__(self, x):
        return self.down_proj(_mapped_compiled(self.gate_proj(x), self.up_proj(x)))


_mapped_compiled = mx.vmap(swiglu, in_axes=(0, 0), out_axes=1)


class ScaledInputMLP(Gated):
    def __init__(self):
        super().__init__()
        self.scales = mx.ones(K), 2 * mx.ones(K)
        self.gate_scale, self.up_scale = self.scales

    def __call__(self, x):
        return self.down_proj(nn.silu(self.gate_proj(x * self.gate_scale)) * self.up_proj(x * self.up_scale))


class KeepsMLP(Packed):
    def __call__(self, x):
        self.gate, x = mx.split(self.wi(x), 2, axis=-1)
        return self.wo(nn.silu(self.gate) * x)


class ScaledNorm(nn.RMSNorm):
    def __call__(self, x, scale=1):
        return scale * super().__call__(x)


class ScaledNormMLP(Gated):
    def __init__(self):
        super().__init__()
        self.norm = ScaledNorm(K)

    def __call__(self, x):
        x = self.norm(x, scale=3)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class GivenMLP(Gated):
    def __init__(self):
        super().__init__()
        self.given = {}

    def __call__(self, x):
        return self.down_proj(nn.silu(self.gate_proj(x), **self.given) * self.up_proj(x))


class NegativeLimitMLP(Clipped):
    def __init__(self):
        super().__init__()
        self.activation = SwigluOAI(alpha=1.5, limit=-0.5)


class TrainedAlphaMLP(Gated):
    def __init__(self):
        super().__init__()
        self.alpha = mx.array(1.5)

    def __call__(self, x):
        gate = mx.minimum(self.gate_proj(x), 2)
        up = mx.clip(self.up_proj(x), -2, 2)
        return self.down_proj((up + 1) * (gate * mx.sigmoid(self.alpha * gate)))


class NoneMLP(Gated):
    def __init__(self):
        super().__init__()
        self.off = True

    def __call__(self, x):
        if self.off:
            return None
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


UNKNOWN = {
    MappedMLP: "calls _mapped, which may be more than its code",
    MappedCompiledMLP: "calls _mapped_compiled",
    ScaledInputMLP: "uses self.gate_scale, an array",
    KeepsMLP: "does more: self.gate, x = mx.split",
    ScaledNormMLP: "calls self.norm (ScaledNorm)",
    GivenMLP: "does more: nn.silu(self.gate_proj(x), **self.given)",
    NegativeLimitMLP: "computes something else than the MLPs that are known",
    TrainedAlphaMLP: "uses self.alpha, an array",
    DoubledMLP: "computes gate and up from different inputs",
    DroppedMLP: "does more: self._p_1 == 1",
    TwoMLP: "does more: x if y is None else y",
    TanhMLP: "calls mx.tanh",
    SameNameMLP: "computes something else than the MLPs that are known",
    ReadsMLP: "uses self.gate_proj.weight, an array",
    ByValueMLP: "takes parts of something",
    ByResultMLP: "decides by up",
    NoneMLP: "returns None",
}


@pytest.mark.parametrize("cls", UNKNOWN)
def test_other_code_runs_as_it_is(cls):
    layer, x = make(cls).eval(), mx.random.normal((3, 3, K))
    (report,) = mlx_fused.patch(layer, linear=False).mlps
    if cls in (ByResultMLP, NoneMLP):  # they fail
        assert report.mlp.obstacle == f"{cls.__name__} {UNKNOWN[cls]}"
        return
    with mlx_fused.patched(layer, mlp=False, linear=False, o_residual=False):
        expected = layer(x)
    assert report.mlp.obstacle.startswith(f"{cls.__name__} {UNKNOWN[cls]}")
    assert close(layer(x), expected) and report.mlp.calls.fused == 0
    mlx_fused.patch(layer)
    assert fused(layer(x))[2] == 0 and close(layer(x), expected)  # its layers, each by itself


class ClassSettingMLP(Gated):
    exact = False

    def __call__(self, x):
        if self.exact:
            return self.down_proj(nn.gelu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


class ListedMLP(ClassSettingMLP):
    def __init__(self):
        super().__init__()
        self.listed = []

    def __call__(self, x):
        if self.listed:
            return self.down_proj(nn.gelu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


class PropertyMLP(ListedMLP):
    @property
    def act(self):
        return nn.gelu if self.listed else nn.gelu_approx

    def __call__(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    "cls, change",
    [
        (ClassSettingMLP, lambda mlp, m: m.setattr(ClassSettingMLP, "exact", True)),
        (ListedMLP, lambda mlp, m: mlp.listed.append(1)),
        (PropertyMLP, lambda mlp, m: mlp.listed.append(1)),
    ],
)
def test_what_may_change_unseen_is_not_read(cls, change, monkeypatch):
    layer, x = make(cls), mx.random.normal((1, 3, K))
    mlx_fused.patch(layer)
    before = layer(x)
    change(layer.mlp, monkeypatch)
    actual = layer(x)
    mlx_fused.unpatch(layer)
    assert close(actual, layer(x)) and not close(actual, before)


def test_an_activation_that_was_replaced_is_seen(monkeypatch):
    layer, x = make(Gated), mx.random.normal((1, 3, K))
    mlx_fused.patch(layer)
    assert fused(layer(x))[:2] == (1, 1)
    monkeypatch.setitem(Gated.__call__.__globals__, "swiglu", lambda gate, up: gate - up)
    mlx_fused.patch(layer)  # what a function's globals hold is read once
    report = mlx_fused.patch(layer).mlps[0]
    assert report.mlp.obstacle == "Gated calls swiglu, whose code cannot be read"
    monkeypatch.undo()
    assert Gated.__call__.__globals__["swiglu"] is activations.swiglu


def test_checkpointing_the_class_is_kept(monkeypatch):
    layer, x = make(Gated), mx.random.normal((1, 3, K))
    expected = mx.grad(lambda x: layer(x).sum())(x)
    mlx_fused.patch(layer)
    monkeypatch.setattr(Gated, "__call__", Gated.__call__)
    original = copy.copy(layer.mlp)
    mlx_fused.unpatch(original)
    grad_checkpoint(original)  # edits the class
    assert close(mx.grad(lambda x: layer(x).sum())(x), expected)
    assert mlx_fused.patch(layer).mlps[0].mlp.obstacle == "Gated calls __call__"


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copy_of):
    layer, x = make(Gated), mx.random.normal((1, 3, K))
    mlx_fused.patch(layer)
    other = copy_of(layer)
    assert fused(other(x)) == (1, 1, 0) and mx.array_equal(other(x), layer(x))
    mlx_fused.unpatch(other)
    assert type(other.mlp) is Gated and fused(layer(x)) == (1, 1, 0)


def test_options(monkeypatch):
    layer, x = make(Gated), mx.random.normal((1, 3, K))
    for options, nodes in (
        ({}, (1, 1, 0)),
        ({"mlp": False}, (2, 1, 0)),
        ({"mlp": False, "linear": False}, (0, 1, 2)),
        ({"o_residual": False}, (2, 0, 0)),
        ({"o_residual": False, "linear": False}, (1, 0, 1)),
    ):
        mlx_fused.patch(layer, **options)
        assert fused(layer(x)) == nodes, options
    monkeypatch.setenv("MLX_FUSED", "0")
    mlx_fused.patch(layer)
    assert fused(layer(x)) == (0, 0, 3)


# What its layers are


def lora(layer, **kwargs):
    made = LoRALinear.from_base(layer, r=4, **kwargs)
    made.lora_b = 0.3 * mx.random.normal(made.lora_b.shape)
    return made


@pytest.mark.parametrize("first", ["patch", "convert"])
@pytest.mark.parametrize(
    "convert",
    [lambda layer: layer, partial(nn.Linear.to_quantized, group_size=32, bits=4)],
    ids=["f32", "q4"],
)
@pytest.mark.parametrize("adapted", [(), ("gate_proj",), ("gate_proj", "up_proj", "down_proj")], ids=str)
def test_any_order(first, convert, adapted):
    layer, x = make(Gated), mx.random.normal((1, 3, K))
    layer.mlp.down_proj = nn.Linear(64, K, bias=False)
    layer.mlp.gate_proj, layer.mlp.up_proj = nn.Linear(K, 64, bias=False), nn.Linear(K, 64, bias=False)
    if first == "patch":
        mlx_fused.patch(layer)
    for name in ("gate_proj", "up_proj", "down_proj"):
        made = convert(layer.mlp[name])
        layer.mlp[name] = lora(made) if name in adapted else made
    mlx_fused.unpatch(layer) if first == "convert" else None
    with mlx_fused.patched(layer, mlp=False, linear=False, o_residual=False):
        expected = layer(x)
    if first == "convert":
        mlx_fused.patch(layer)
    actual = layer(x)
    assert fused(actual) == (1, 1, 0) and close(actual, expected)


GROUP = mx.distributed.init()
OBSTACLES = {
    "gate_proj is DoRALinear": lambda mlp: {"gate_proj": DoRALinear.from_base(mlp.gate_proj)},
    "quantization differs: none, affine 4 bits by 32": lambda mlp: {
        "up_proj": mlp.up_proj.to_quantized(32, 4)
    },
    "up_proj has dropout": lambda mlp: {"up_proj": lora(mlp.up_proj, dropout=0.5)},
    "only some have a bias": lambda mlp: {"up_proj": nn.Linear(K, N)},
    "gate_proj is AllToShardedLinear": lambda mlp: {
        name: nn.layers.distributed.AllToShardedLinear(K, N, False, GROUP)
        for name in ("gate_proj", "up_proj")
    },
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_layers_that_do_not_go_together(obstacle):
    layer, x = make(Gated), mx.random.normal((1, 3, K))
    for name, other in OBSTACLES[obstacle](layer.mlp).items():
        layer.mlp[name] = other
    mx.random.seed(3)
    expected = layer(x)
    (report,) = mlx_fused.patch(layer).mlps
    assert report.mlp.obstacle == obstacle and report.residual.fused
    mx.random.seed(3)  # the same dropout
    actual = layer(x)
    assert fused(actual)[1] == 1 and close(actual, expected)
    assert report.mlp.calls.reason == obstacle


@pytest.mark.parametrize("dtype", [mx.float64, mx.int32])
def test_an_input_type_without_kernels(dtype):
    layer, x = make(Gated), mx.ones((1, 3, K), dtype)
    expected = layer(x)
    mlx_fused.patch(layer)
    assert fused(layer(x))[:2] == (0, 0)
    assert_same([layer(x)], [expected])


# Linear layers by themselves


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, K)
        self.embed_tokens.weight = integers((11, K))

    def __call__(self, x):
        return self.embed_tokens(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Head()

    def __call__(self, tokens):
        return self.model.embed_tokens.as_linear(self.model(tokens))


@pytest.mark.parametrize("quantized", [False, True])
def test_a_tied_head(quantized):
    model, tokens = Tied(), mx.array([[1, 2, 3]])
    if quantized:
        nn.quantize(model, 32, 8)
    expected = model(tokens)
    report = mlx_fused.patch(model)
    assert [module.name for module in report.modules] == ["model"]
    actual = model(tokens)
    assert primitives(actual)["FusedLinear"] == 1 and str(report.modules[0].linear.calls) == "1/0"
    assert mx.allclose(actual, expected, rtol=1e-6) if quantized else mx.array_equal(actual, expected)
    # Asked by others, it is itself.
    assert primitives(model.model.embed_tokens.as_linear(sample(1, K)))["FusedLinear"] == 0
    assert model.model.embed_tokens is model.model["embed_tokens"]


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.other = nn.Linear(K, 4), DoRALinear.from_base(nn.Linear(K, 4))

    def __call__(self, x):
        return self.gate(x) + self.other(x), self.gate.get("weight")


def test_any_other_layer():
    router, x = Router(), sample(3, K)
    expected, _ = router(x)
    report = mlx_fused.patch(router)
    actual, weight = router(x)
    assert report.modules[0].linear.fused and weight is router.gate["weight"]
    assert primitives(actual)["FusedLinear"] == 1 and mx.allclose(actual, expected)
    assert primitives(router.gate(x))["FusedLinear"] == 0


def test_nothing_is_touched_on_a_gpu_where_nothing_is_saved(monkeypatch):
    router, x = Router(), sample(3, K)
    mlx_fused.patch(router)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert mlx_fused.patch(router).modules[0].linear.obstacle == "gate is one launch on a GPU in MLX too"
    assert primitives(router(x)[0])["FusedLinear"] == 0
    router.gate = lora(router.gate)
    assert mlx_fused.patch(router).modules[0].linear.fused
    assert primitives(router(x)[0])["FusedLinear"] == 1


def test_one_call_of_the_extension_for_each_operation(monkeypatch):
    layer, x, made = make(Gated), mx.random.normal((1, 1, K)), []
    mlx_fused.patch(layer)
    layer(x)
    project = call._ext.project
    monkeypatch.setattr(call._ext, "project", lambda *given: made.append(given[0]) or project(*given))
    layer(x)
    assert made == ["fused_gated_projection", "fused_output_projection_residual"]


def test_python_of_a_layer_is_bounded():
    """Calls of functions, of Python and of C, which take the time in which a graph is built."""
    layer, x = make_model("llama").model.layers[0], mx.zeros((1, 1, HIDDEN))

    def calls():
        counts = Counter()
        layer(x)
        sys.setprofile(lambda frame, event, arg: counts.update([event]))
        try:
            layer(x)
        finally:
            sys.setprofile(None)
        return counts

    stock = calls()
    mlx_fused.patch(layer)
    patched = calls()
    assert patched["call"] - stock["call"] <= 115 and patched["c_call"] - stock["c_call"] <= 105


class SettingMLP(Gated):
    def __init__(self):
        super().__init__()
        self.mode, self.act = -1, lambda x: nn.silu(x)

    def __call__(self, x):
        gate = self.act(self.gate_proj(x)) if self.mode == -1 else nn.gelu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


def test_settings_that_python_takes_for_the_same():
    layer, x = make(SettingMLP), mx.random.normal((1, 3, K))
    mlx_fused.patch(layer)
    layer(x)
    layer.mlp.mode = -2  # whose hash is that of -1
    expected = layer.mlp.down_proj(nn.gelu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
    assert close(layer.mlp(x), expected)
    layer.mlp.mode = -1
    layer(x)
    layer.mlp.act = None
    layer.mlp.act = lambda x: nn.relu(x)  # which may be where the first one was
    expected = layer.mlp.down_proj(nn.relu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
    assert close(layer.mlp(x), expected)
