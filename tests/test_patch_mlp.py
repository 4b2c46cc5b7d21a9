"""Patched MLPs: what they and other linear layers run as, and the layers that they are made of."""

import copy
import pickle
import sys
from collections import Counter
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

import mlx_fused
from graph import primitives
from mlps import KNOWN, Gated, K, Layer, N, close, fused, make
from mlx_fused import _ext
from tiny_models import HIDDEN, LAYERS, integers, sample
from tiny_models import make as make_model


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
    actual = layer(x)
    nodes = primitives(actual)
    assert nodes["FusedGatedProjection"] == nodes["FusedOutputProjection"] == 0
    assert close(actual, expected)


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
    assert primitives(actual)["FusedLinear"] == 1
    assert str(report.modules[0].linear.calls) == ("2/0" if quantized else "1/0")  # with the embedding's rows
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
    assert report.modules[0].linear.obstacle == "other is DoRALinear" and weight is router.gate["weight"]
    assert primitives(actual)["FusedLinear"] == 1 and mx.allclose(actual, expected)
    assert primitives(router.gate(x))["FusedLinear"] == 0


def test_nothing_is_touched_on_a_gpu_where_nothing_is_saved(monkeypatch):
    router, x = Router(), sample(3, K)
    mlx_fused.patch(router)
    monkeypatch.setattr(_ext, "on_gpu", lambda: True)
    (report,) = mlx_fused.patch(router).modules
    assert report.linear.obstacle == "gate is one launch on a GPU in MLX too, and 1 more"
    assert primitives(router(x)[0])["FusedLinear"] == 0
    router.gate = lora(router.gate)
    assert mlx_fused.patch(router).modules[0].linear.obstacle == "other is DoRALinear"
    assert primitives(router(x)[0])["FusedLinear"] == 1


def test_one_call_of_the_extension_for_each_operation(monkeypatch):
    layer, x, made = make(Gated), mx.random.normal((1, 1, K)), []
    mlx_fused.patch(layer)
    layer(x)
    for name in ("project", "add_product"):
        run = getattr(_ext, name)
        monkeypatch.setattr(_ext, name, lambda of, *given, run=run: made.append(of.name) or run(of, *given))
    layer(x)
    assert made == ["fused_gated_projection", "fused_linear", "fused_output_projection_residual"]


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
    assert patched["call"] - stock["call"] <= 25 and patched["c_call"] - stock["c_call"] <= 32


def test_calls_by_name():
    layer, x = make(Gated), mx.random.normal((2, 5, K))
    report = mlx_fused.patch(layer.mlp)
    assert primitives(layer.mlp(x=x))["FusedGatedProjection"] == 1 and str(report.mlps[0].mlp.calls) == "1/0"
    with pytest.raises(TypeError):
        layer.mlp(y=x)


class LayerFirst(Gated):
    def __init__(self):
        super().__init__()
        self.into = nn.QuantizedLinear(K, K, group_size=32)

    def __call__(self, x):
        x = self.into(x)
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


def test_a_linear_layer_before_gate_and_up_is_one_too():
    layer, x = make(LayerFirst), mx.random.normal((2, 5, K))
    expected = layer(x)
    mlx_fused.patch(layer)
    actual = layer(x)
    assert primitives(actual)["FusedLinear"] == primitives(actual)["FusedGatedProjection"] == 1
    assert close(actual, expected)


def test_a_module_in_two_places_is_listed_once():
    class Twice(Layer):
        def __init__(self, mlp):
            super().__init__(mlp)
            self.other = mlp

    assert len(mlx_fused.patch(Twice(Gated())).mlps) == 1


def test_layers_whose_code_calls_itself_otherwise():
    class Renamed(Layer):
        def __call__(this, x):
            return x + this.mlp(x) * this.factor

    layer = Renamed(Gated())
    layer.factor = 2.0
    (report,) = mlx_fused.patch(layer).mlps
    assert report.residual.fused


def test_experts_are_reported():
    report = mlx_fused.patch(make_model("mixtral"))
    assert [module.name for module in report.modules if module.experts] == [
        f"model.layers.{i}.block_sparse_moe.switch_mlp" for i in range(LAYERS)
    ]
    assert "experts 0 of 2" in report.summary and "experts are MLX's gathered products" in str(report)
