"""The projections as layers, and mlx-lm's tools on models made of them."""

import json
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters, remove_lora_layers

import mlx_fused
import projections
from graph import output_counts, primitives
from mlx_fused.nn import GatedMLP, OutputProjection, QKVProjection
from operands import normal
from test_autodiff import HEADS, kinds, make
from test_forward import dtypes
from test_stock_modules import layers, module

LORA = {"rank": 4, "scale": 2.0, "dropout": 0.0}


def parameters(layer):
    return dict(tree_flatten(layer.parameters()))


def linears(bias=False):
    return nn.Linear(64, 32, bias), nn.Linear(64, 16, bias), nn.Linear(64, 24, bias)


def fused(*outputs):
    """How many operations of ours these are."""
    found = primitives(*outputs)
    return found["FusedQKVProjection"], found["FusedOutputProjection"] - found["FusedGatedProjection"]


@kinds
@dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_the_layers_are_the_operations_on_their_children(rng, kind, dtype, bias):
    options = {"dtype": dtype, "bias": bias, "draw": normal}
    qkv, output = make(rng, "qkv", kind, **options), make(rng, "output", kind, **options).replace(alpha=1.0)
    q, k, v = map(module, layers(qkv))
    layer = QKVProjection.from_linear(q, k, v, *HEADS[:2])
    assert (layer.q, layer.k, layer.v) == (q, k, v)
    outputs = layer(qkv.x)
    assert fused(*outputs) == (1, 0)
    projections.check_outputs(qkv, outputs)

    layer = OutputProjection.from_linear(o := module(layers(output)[0]))
    assert layer.o is o
    y = layer(output.x, output.arguments["residual"])
    assert fused(y) == (0, 1)
    projections.check_outputs(output, (y,))

    gated = make(rng, "gated", kind, **options)
    gate, up = map(module, layers(gated))
    layer = GatedMLP.from_linear(gate, up, nn.Linear(4, gated.x.shape[-1], bias=False), activation="relu")
    assert (layer.gate, layer.up) == (gate, up)
    layer.down.weight = mx.eye(gated.x.shape[-1], 4, dtype=dtype)
    y = layer(gated.x)
    found = primitives(y)
    assert (found["FusedGatedProjection"], found["FusedLinear"]) == (1, 1)
    projections.check_outputs(gated, (y[..., :4],))


def test_default_sizes():
    layer = QKVProjection(24, 4)
    shapes = {name: array.shape for name, array in parameters(layer).items()}
    assert shapes == {"q.weight": (24, 24), "k.weight": (24, 24), "v.weight": (24, 24)}
    q, k, _ = layer(mx.zeros((1, 2, 24)))
    assert q.shape == k.shape == (1, 4, 2, 6)
    assert parameters(OutputProjection(32, 24, bias=True)).keys() == {"o.weight", "o.bias"}


def test_values_of_another_size():
    layer, x = QKVProjection(24, 4, 2, 8, bias=True, v_head_dim=3), mx.random.normal((2, 5, 24))
    shapes = [(2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 3)]
    assert [y.shape for y in layer(x)] == shapes
    layer.v = DoRALinear.from_base(layer.v)
    assert [y.shape for y in layer(x)] == shapes


ACTIVATIONS = ["silu", "gelu", "gelu_approx", "relu", "relu2"]


def plain(layer, x, residual=None):
    """What the children of a GatedMLP compute."""
    y = layer.down(getattr(nn, layer.activation)(layer.gate(x)) * layer.up(x))
    return y if residual is None else residual + y


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer,
        lambda layer: nn.QuantizedLinear.from_linear(layer, 32),
        LoRALinear.from_base,
        DoRALinear.from_base,
    ],
    ids=["dense", "affine", "LoRA", "DoRA"],
)
def test_gated_mlp(rng, change, activation):
    layer = GatedMLP(64, 96, bias=True, activation=activation)
    for name in ("gate", "up", "down"):
        layer[name] = change(layer[name])
        if "lora_b" in layer[name]:
            layer[name].lora_b = 0.1 * normal(rng, layer[name].lora_b.shape)
    x, residual = normal(rng, (2, 3, 64)), normal(rng, (2, 3, 64))
    nodes = primitives(layer(x, residual))
    count = int(change != DoRALinear.from_base)
    assert (nodes["FusedGatedProjection"], nodes["FusedOutputProjection"]) == (count, count)
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(layer(x, residual), plain(layer, x, residual), **close)
    for shape in ((64,), (5, 64), (2, 1, 3, 64)):
        x = normal(rng, shape)
        np.testing.assert_allclose(layer(x), plain(layer, x), **close)
        np.testing.assert_allclose(layer(x, 2 * x), plain(layer, x, 2 * x), **close)
    layer.freeze()
    for name in ("gate", "up", "down"):
        layer[name].unfreeze(keys=["lora_a", "lora_b", "bias"], strict=False)
    grads = [
        nn.value_and_grad(layer, lambda f=f: f(x).square().sum())()[1]
        for f in (layer, lambda x: plain(layer, x))
    ]
    for ours, theirs in zip(*(dict(tree_flatten(g)).values() for g in grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * mx.abs(theirs).max().item() + 1e-6)


def test_gated_mlp_whose_gate_and_up_differ(rng):
    layer, x = GatedMLP(64, 96), normal(rng, (2, 3, 64))
    layer.up = nn.QuantizedLinear.from_linear(layer.up, 32)
    nodes = primitives(layer(x, x))
    assert (nodes["FusedGatedProjection"], nodes["FusedOutputProjection"]) == (0, 1)
    np.testing.assert_allclose(layer(x, x), plain(layer, x, x), rtol=1e-4, atol=1e-4)


def test_errors_of_a_gated_mlp():
    with pytest.raises(
        ValueError, match=r"\[GatedMLP\] activation must be one of 'silu', .* but got 'tanh'\."
    ):
        GatedMLP(64, 96, activation="tanh")
    gate, up, down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
    with pytest.raises(ValueError, match=r"up must have a weight of shape \(96, 64\) but"):
        GatedMLP.from_linear(gate, nn.Linear(64, 95), down)
    with pytest.raises(ValueError, match=r"down must have a weight of shape \(64, 96\) but"):
        GatedMLP.from_linear(gate, up, up)
    with pytest.raises(
        TypeError, match=r"\[GatedMLP\] down must be an mlx\.nn\.Linear .* but got DoRALinear\."
    ):
        GatedMLP.from_linear(gate, up, DoRALinear.from_base(down))
    layer = GatedMLP.from_linear(gate, up, down, activation="gelu")
    assert repr(layer).startswith("GatedMLP(activation='gelu'\n  (gate): Linear(input_dims=64")
    for wrong in ("tanh", "clipped_swiglu", None):
        with pytest.raises(ValueError, match=r"\[GatedMLP\] activation must be one of 'silu'"):
            layer.activation = wrong
    assert layer.activation == "gelu"
    layer.down = DoRALinear.from_base(layer.down)
    with pytest.raises(ValueError, match=r"\[GatedMLP\] residual must have shape \(2, 3, 64\) but got"):
        layer(mx.zeros((2, 3, 64)), mx.zeros((64,)))


def test_training(rng):
    layer = QKVProjection(24, 4, 2, 8, bias=True)
    x = normal(rng, (2, 5, 24))

    def loss(layer):
        return sum(y.square().mean() for y in layer(x))

    layer.q.freeze()
    before = parameters(layer)
    value, gradients = nn.value_and_grad(layer, loss)(layer)
    trained = {"k.weight", "k.bias", "v.weight", "v.bias"}
    assert {name for name, _ in tree_flatten(gradients)} == trained
    assert output_counts("FusedQKVProjectionGrad", *dict(tree_flatten(gradients)).values()) == [4]
    optimizer = optim.Adam(0.01)
    optimizer.update(layer, gradients)
    assert loss(layer).item() < value.item()
    assert {name for name, array in parameters(layer).items() if array is not before[name]} == trained


def test_repr():
    assert repr(QKVProjection(24, 4, 2, bias=True)).startswith(
        "QKVProjection(num_heads=4, num_kv_heads=2, head_dim=6, v_head_dim=6\n  (q): Linear(input_dims=24"
    )


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (DoRALinear.from_base, "qkvo"),
        (lambda layer: LoRALinear.from_base(layer, dropout=0.5), "qkvo"),
        (nn.QuantizedLinear.from_linear, "qkv"),  # beside dense ones
    ],
    ids=["DoRA", "dropout", "formats that differ"],
)
def test_what_is_no_operation_runs_layer_by_layer(rng, change, names):
    x, residual = normal(rng, (2, 3, 64)), normal(rng, (2, 3, 32))
    for name in names:
        if name == "o":
            layer = OutputProjection.from_linear(nn.Linear(64, 32))
            layer.o = change(layer.o)
            mx.random.seed(1)
            outputs = [layer(x, residual)]
            mx.random.seed(1)
            expected = [residual + layer.o(x)]
        else:
            layer = QKVProjection.from_linear(*linears(), 4, 2)
            layer[name] = change(layer[name])
            mx.random.seed(1)
            outputs = layer(x)
            mx.random.seed(1)
            expected = [
                y.reshape(2, 3, n, -1).swapaxes(1, 2)
                for y, n in zip((layer.q(x), layer.k(x), layer.v(x)), (4, 2, 2), strict=True)
            ]
        assert fused(*outputs) == (0, 0)
        for actual, y in zip(outputs, expected, strict=True):
            assert np.array_equal(actual, y)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.qkv, self.out = QKVProjection(64, 4, 2, bias=True), OutputProjection(64, 64)
        self.mlp = GatedMLP(64, 96)

    def __call__(self, x):
        q, k, v = self.qkv(self.norm(x))
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask="causal")
        x = self.out(y.swapaxes(1, 2).flatten(2), x)
        return self.mlp(x, x)


class Model(nn.Module):
    """A transformer of one's own, with what mlx-lm's tools ask for: a list of layers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
        self.layers = [Block() for _ in range(2)]

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def tokens(rng):
    return mx.array(rng.integers(0, 96, (2, 7)))


def make_model(quantization=None):
    mx.random.seed(0)
    model = Model()
    if quantization:
        nn.quantize(model, **quantization)
    model.freeze()
    mx.eval(model.parameters())
    return model


def stock(model, tokens):
    """What the model's plain layers compute."""
    x = model.embedding(tokens)
    for block in model.layers:
        h = block.norm(x)
        q, k, v = (
            y.reshape(*x.shape[:2], n, 16).swapaxes(1, 2)
            for y, n in zip((block.qkv.q(h), block.qkv.k(h), block.qkv.v(h)), (4, 2, 2), strict=True)
        )
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask="causal")
        x = x + block.out.o(y.swapaxes(1, 2).flatten(2))
        x = plain(block.mlp, x, x)
    return model.head(x)


quantizations = pytest.mark.parametrize(
    "quantization", [None, {"group_size": 32}, {"mode": "mxfp8"}], ids=["dense", "affine", "mxfp8"]
)


@quantizations
@pytest.mark.parametrize(
    "keys", [None, ["qkv.q", "qkv.v"], ["out.o"], ["mlp.up"]], ids=["all", "q and v", "o", "up"]
)
def test_lora_conversion_of_mlx_lm(tokens, quantization, keys):
    model = make_model(quantization)
    linear_to_lora_layers(model, 1, LORA | {"keys": keys})  # of the last layer only
    adapted = {name for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    every = ("qkv.q", "qkv.k", "qkv.v", "out.o", "mlp.gate", "mlp.up", "mlp.down")
    assert {f"layers.1.{key}" for key in keys or every} == adapted
    model.apply_to_modules(lambda _, m: isinstance(m, LoRALinear) and m.update({"lora_b": m.lora_b + 0.2}))
    logits = model(tokens)
    assert fused(logits) == (2, 2)
    np.testing.assert_allclose(logits, stock(model, tokens), rtol=1e-4, atol=1e-4)
    before = mx.array(logits)
    remove_lora_layers(model)
    assert fused(model(tokens)) == (2, 2) and mx.abs(model(tokens) - before).max() > 0.01


def test_dora_conversion_of_mlx_lm(tokens):
    model = make_model()
    linear_to_lora_layers(model, 1, LORA, use_dora=True)
    logits = model(tokens)
    assert fused(logits) == (1, 1)
    np.testing.assert_allclose(logits, stock(model, tokens), rtol=1e-4, atol=1e-4)


class Data:
    """Endless sentences of one word, as mlx-lm's trainer wants them: lists of tokens and where to begin."""

    def __init__(self, rng):
        self.sentences = [(np.full(20, word).tolist(), 0) for word in rng.integers(0, 96, 8)]

    def __getitem__(self, i):
        return self.sentences[i]

    def __len__(self):
        return len(self.sentences)


class Losses(TrainingCallback):
    def __init__(self):
        self.values = []

    def on_train_loss_report(self, train_info):
        self.values.append(train_info["train_loss"])


@quantizations
def test_qlora_with_mlx_lm_from_training_to_fusing(rng, tokens, quantization, tmp_path):
    model = make_model(quantization)
    linear_to_lora_layers(model, -1, LORA)
    adapter = tmp_path / "adapters.safetensors"
    # Every report is of all the data once, in whatever order mlx-lm takes it.
    args = TrainingArgs(batch_size=2, iters=28, steps_per_report=4, adapter_file=adapter, max_seq_length=32)
    losses = Losses()
    np.random.seed(0)
    train(model, optim.Adam(5e-4), Data(rng), None, args, training_callback=losses)
    assert losses.values[-1] < losses.values[0] - 0.5
    trained = model(tokens)
    assert fused(trained) == (2, 2)

    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": LORA}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    other = load_adapters(make_model(quantization), str(tmp_path))
    np.testing.assert_array_equal(other(tokens), trained)

    fusible = [(name, m.fuse(dequantize=True)) for name, m in other.named_modules() if hasattr(m, "fuse")]
    other.update_modules(tree_unflatten(fusible))  # as mlx_lm.fuse does
    logits = other(tokens)
    assert fused(logits) == (2, 2)
    np.testing.assert_allclose(logits, stock(other, tokens), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits, trained, atol=0.05)  # mxfp8 weights become bfloat16 as they are fused


def test_patching_leaves_the_layers_alone(tokens):
    model = make_model()
    logits = model(tokens)
    report = mlx_fused.patch(model, mlp=False, linear=False, norm=False)
    assert not report.layers
    np.testing.assert_array_equal(model(tokens), logits)


@pytest.mark.parametrize(
    "kind, sizes",
    [
        (GatedMLP, {"input_dims": 64, "hidden_dims": 96}),
        (OutputProjection, {"input_dims": 64, "output_dims": 32}),
        (
            QKVProjection,
            {"input_dims": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "v_head_dim": 8},
        ),
        (partial(QKVProjection.from_linear, *linears()), {"num_heads": 4, "num_kv_heads": 2}),
    ],
)
def test_sizes_are_checked(kind, sizes):
    for name in sizes:
        for wrong, got in (("a", "str"), (1.5, "float")):
            with pytest.raises(TypeError, match=rf"^\[\w+\] {name} must be int but got {got}\.$"):
                kind(**sizes | {name: wrong})
        for wrong in (0, -1):
            with pytest.raises(ValueError, match=rf"^\[\w+\] {name} must be at least 1 but got {wrong}\.$"):
                kind(**sizes | {name: wrong})


def test_errors():
    q, k, v = linears()
    with pytest.raises(ValueError, match=r"num_heads must be a multiple of num_kv_heads but got 4 and 3\."):
        QKVProjection(24, 4, 3)
    for name, *heads in (("num_heads", 0), ("num_kv_heads", 4, 0), ("num_heads", -1)):
        with pytest.raises(ValueError, match=rf"{name} must be at least 1 but got {heads[-1]}\."):
            QKVProjection(24, *heads)
        with pytest.raises(ValueError, match=rf"{name} must be at least 1 but got {heads[-1]}\."):
            QKVProjection.from_linear(q, k, v, *heads)
    with pytest.raises(ValueError, match=r"head_dim must be at least 1 but got 0\."):
        QKVProjection(3, 4)
    expected = r"k must be an mlx\.nn\.Linear or QuantizedLinear, or a LoRALinear of one, but got {}\."
    with pytest.raises(TypeError, match=expected.format("DoRALinear")):
        QKVProjection.from_linear(q, DoRALinear.from_base(k), v, 4, 2)
    with pytest.raises(TypeError, match=expected.format("NoneType")):
        QKVProjection.from_linear(q, None, v, 4, 2)
    with pytest.raises(TypeError, match=r"\[OutputProjection\] o must be .* but got Linear4\."):
        OutputProjection.from_linear(type("Linear4", (nn.Linear,), {})(4, 4))
    with pytest.raises(ValueError, match=r"v must have a weight of shape \(24, 64\) but got \(25, 64\)\."):
        QKVProjection.from_linear(q, k, nn.Linear(64, 25), 4, 2)
    with pytest.raises(ValueError, match=r"q must have a weight of shape \(30, 64\) but got \(32, 64\)\."):
        QKVProjection.from_linear(q, k, v, 3, 3)
    with pytest.raises(ValueError, match=r"k must have a weight of shape \(16, 64\) but got \(16, 128\)\."):
        QKVProjection.from_linear(q, nn.QuantizedLinear(128, 16), v, 4, 2)
    assert mlx_fused.nn.QKVProjection is QKVProjection


@pytest.mark.parametrize("change", [lambda layer: layer, DoRALinear.from_base], ids=["fused", "DoRA"])
def test_shapes_are_checked_on_both_ways(change):
    layer = QKVProjection.from_linear(*linears(), 4, 2)
    layer.q = change(layer.q)
    for shape in ((3, 64), (2, 3, 4, 64), (64,)):
        with pytest.raises(ValueError, match=r"must have|must be|3 dimensions"):
            layer(mx.zeros(shape))
    layer.k = nn.Linear(64, 64, bias=False)
    with pytest.raises(ValueError):
        layer(mx.zeros((2, 3, 64)))
    layer = OutputProjection(64, 32)
    layer.o = change(layer.o)
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 3, 32\) but got"):
        layer(mx.zeros((2, 3, 64)), mx.zeros((32,)))
