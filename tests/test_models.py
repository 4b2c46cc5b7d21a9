"""Models of mlx-lm, patched, against the same models as they come."""

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_fused
from oracle import UNIT_ROUNDOFF
from tiny_models import CONFIGS, HIDDEN, LAYERS, PROJECTIONS, WIDEST, fused, loss, make, tokens

DTYPES = {"f32": mx.float32, "bf16": mx.bfloat16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# MLX's CPU backend has no mixture of experts in 16 bits.
CASES = [(name, id) for name in CONFIGS for id in DTYPES if (name, id) != ("mixtral", "bf16")]
every_case = pytest.mark.parametrize(
    "name, dtype", [(name, DTYPES[id]) for name, id in CASES], ids=map("-".join, CASES)
)


def assert_close(actual, expected, dtype):
    """The same trees of arrays, each up to rounding, in norm.

    A sum of K products in float32 is off by 8 sqrt(K) of its unit roundoff at most (see ``oracle``): that
    is what the two models do differently in every layer, in the QKV and in the output projection. What
    comes after is the same code, but its roundings fall differently too, some twelve one after another in
    a layer, there and back; being independent they add up as squares.
    """
    sums = LAYERS * 8 * (math.sqrt(HIDDEN) + math.sqrt(WIDEST)) * UNIT_ROUNDOFF[mx.float32]
    roundings = math.sqrt(2 * LAYERS * 12) * UNIT_ROUNDOFF[dtype]
    tolerance = 2 * (sums + roundings)  # either model may be off by as much
    actual, expected = exact(actual), exact(expected)
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        scale = np.linalg.norm(e)
        if name.endswith("k_proj.bias"):
            # Softmax all but cancels its gradient; what cancels is as large as in the weight's.
            weight = expected[name.replace("bias", "weight")]
            scale = max(scale, np.linalg.norm(weight) / math.sqrt(HIDDEN))
        assert np.linalg.norm(actual[name] - e) <= tolerance * scale, name


def exact(tree):
    return {name: np.array(a.astype(mx.float64, stream=mx.cpu)) for name, a in tree_flatten(tree)}


def both(run, model):
    """What ``run`` gives with the model as it comes, and patched."""
    stock = run()
    with mlx_fused.patched(model) as report:
        assert all(layer.qkv.fused for layer in report.layers) and len(report.layers) == LAYERS
        results = stock, run()
    for layer in report.layers:
        assert layer.qkv.calls.total > 0 == layer.qkv.calls.fallen_back
        assert layer.residual.calls.fused == (layer.qkv.calls.total if layer.residual.fused else 0)
    return results


@every_case
def test_logits(name, dtype):
    model = make(name, dtype)
    stock, patched = both(lambda: model(tokens(2, 9)), model)
    assert fused(stock) == (0, 0) and fused(patched) == (LAYERS, 0)
    assert_close(patched, stock, dtype)


@every_case
def test_gradients(name, dtype):
    model = make(name, dtype)

    def gradients():
        return nn.value_and_grad(model, loss)(model, tokens(2, 9))

    (stock_loss, stock), (patched_loss, patched) = both(gradients, model)
    assert fused(*(g for _, g in tree_flatten(patched))) == (LAYERS, LAYERS)
    assert_close([patched_loss, patched], [stock_loss, stock], dtype)


@every_case
def test_decoding_with_a_cache(name, dtype):
    model = make(name, dtype)
    prompt = tokens(1, 6)

    def decode():
        cache = make_prompt_cache(model)
        steps = [prompt, *mx.split(tokens(1, 5), 5, axis=1)]
        return [model(step, cache=cache) for step in steps]

    stock, patched = both(decode, model)
    assert fused(patched[0]) == (LAYERS, 0)
    assert_close(patched, stock, dtype)


@every_case
def test_a_training_step(name, dtype):
    model = make(name, dtype)
    start = tree_flatten(model.parameters())

    def step():
        model.load_weights(start)
        optimizer = optim.SGD(learning_rate=0.1)
        before, gradients = nn.value_and_grad(model, loss)(model, tokens(2, 9))
        optimizer.update(model, gradients)
        return before, loss(model, tokens(2, 9)), model.parameters()

    stock, patched = both(step, model)
    assert fused(patched[1]) != (0, 0)
    assert stock[1].item() < stock[0].item()
    assert_close(patched, stock, dtype)


# Stock quantized products of 16-bit activations add up in 16 bits on x86, which is no reference.
BASES = {
    "f32": {"dtype": mx.float32},
    "bf16": {"dtype": mx.bfloat16},
    "affine4": {"group_size": 32, "bits": 4},
    "mxfp8": {"mode": "mxfp8"},
}


def base(name, dtype=mx.float32, **quantization):
    model = make(name, dtype)
    if quantization:
        # Not the embedding, which makes 16-bit numbers of mxfp8 whatever the model's type.
        nn.quantize(model, **quantization, class_predicate=lambda _, module: isinstance(module, nn.Linear))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_quantized(name):
    model = base(name, group_size=32, bits=4)
    assert_close(*both(lambda: model(tokens(2, 9)), model)[::-1], mx.float32)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("order", ["lora first", "patch first"])
def test_lora(name, kind, dropout, order):
    model = base(name, **BASES[kind])
    if order == "patch first":
        mlx_fused.patch(model)
    model.freeze()
    linear_to_lora_layers(model, LAYERS, {"rank": 4, "scale": 2.0, "dropout": dropout})
    # The other half of the product, or else the adapters add nothing.
    for layer in model.layers:
        for projection in (*PROJECTIONS, "o_proj"):
            adapter = layer.self_attn[projection]
            adapter.lora_b = 0.3 * mx.random.normal(adapter.lora_b.shape)
    mlx_fused.unpatch(model)

    def gradients():
        mx.random.seed(3)  # the same dropout
        return nn.value_and_grad(model, loss)(model, tokens(2, 9))

    stock, patched = both(gradients, model)
    notes = {layer.qkv.note for layer in mlx_fused.patch(model).layers}
    assert notes == ({"adapters apart: q_proj has dropout"} if dropout else {None})
    assert all(name.endswith(("lora_a", "lora_b")) for name, _ in tree_flatten(patched[1]))
    assert_close(patched, stock, BASES[kind].get("dtype", mx.float32))


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_grad_checkpoint(name, monkeypatch):
    model = make(name)
    block = type(model.layers[0])
    monkeypatch.setattr(block, "__call__", block.__call__)  # grad_checkpoint edits the class

    def gradients():
        return nn.value_and_grad(model, loss)(model, tokens(2, 9))

    stock = gradients()
    grad_checkpoint(model.layers[0])
    _, patched = both(gradients, model)
    # Backward asks every layer again for what it did not keep.
    assert fused(*(g for _, g in tree_flatten(patched[1]))) == (2 * LAYERS, LAYERS)
    assert_close(patched, stock, mx.float32)


@pytest.mark.parametrize("name, kind", [("llama", "f32"), ("qwen2", "f32"), ("llama", "affine4")])
def test_a_compiled_training_step(name, kind):
    model = base(name, **BASES[kind])
    if kind != "f32":
        model.freeze()
        linear_to_lora_layers(model, LAYERS, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    start = tree_flatten(model.parameters())

    def train():
        model.load_weights(start)
        optimizer = optim.SGD(learning_rate=0.1)
        state = [model.state, optimizer.state]

        def step(inputs):
            value, gradients = nn.value_and_grad(model, loss)(model, inputs)
            optimizer.update(model, gradients)
            return value

        compiled = mx.compile(step, inputs=state, outputs=state)
        value = compiled(tokens(2, 9))
        mx.eval(value, state)
        return value, loss(model, tokens(2, 9)), model.parameters()

    stock, patched = both(train, model)
    assert stock[1].item() < stock[0].item()
    assert_close(patched, stock, mx.float32)
