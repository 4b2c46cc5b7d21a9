"""The projections as layers."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_fused
import projections
from graph import output_counts, primitives
from mlx_fused.nn import OutputProjection, QKVProjection
from operands import normal


def parameters(layer):
    return dict(tree_flatten(layer.parameters()))


def linears(bias, dtype=mx.float32):
    q, k, v = nn.Linear(24, 32, bias), nn.Linear(24, 16, bias), nn.Linear(24, 16, bias)
    for linear in (q, k, v):
        linear.set_dtype(dtype)
    return q, k, v


def check_layer(rng, layer, dtype=mx.float32):
    """One node of ours, whose outputs are those of the formula."""
    bias = any("bias" in name for name in layer)
    if isinstance(layer, QKVProjection):
        call = projections.qkv(rng, 2, 5, 24, (4, 2, 8), dtype=dtype, bias=bias)
        own = {key: layer[f"{'qkv'[key[1]]}_{key[0]}"] for key in call.leaves if key[0] != "input"}
        outputs, node = layer(call.x), "FusedQKVProjection"
    else:
        call = projections.output(rng, 2, 5, 32, 24, dtype=dtype, bias=bias)
        own = {key: layer[key[0]] for key in call.leaves if key[0] in ("weight", "bias")}
        outputs, node = (layer(call.x, call.arguments["residual"]),), "FusedOutputProjection"
    assert primitives(*outputs)[node] == 1
    projections.check_outputs(call.with_leaves(own), outputs)
    assert all(y.dtype == dtype for y in outputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_qkv_projection(rng, bias, dtype):
    layer = QKVProjection(24, 4, 2, 8, bias)
    layer.set_dtype(dtype)
    check_layer(rng, layer, dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_output_projection(rng, bias, dtype):
    layer = OutputProjection(32, 24, bias)
    layer.set_dtype(dtype)
    check_layer(rng, layer, dtype)


def test_default_sizes():
    layer = QKVProjection(24, 4)
    shapes = {name: array.shape for name, array in parameters(layer).items()}
    assert shapes == {"q_weight": (24, 24), "k_weight": (24, 24), "v_weight": (24, 24)}
    q, k, _ = layer(mx.zeros((1, 2, 24)))
    assert q.shape == k.shape == (1, 4, 2, 6)


def test_starts_as_linear_does():
    mx.random.seed(0)
    for layer in (QKVProjection(400, 8, bias=True), OutputProjection(400, 400, bias=True)):
        for array in parameters(layer).values():
            assert 0.045 < mx.abs(array).max().item() <= 0.05  # 1 / sqrt(400)
            assert abs(array.mean().item()) < 0.01


@pytest.mark.parametrize("bias", [False, True])
def test_from_linear_shares_the_arrays(rng, bias):
    q, k, v = linears(bias)
    o = nn.Linear(32, 24, bias)
    qkv, output = QKVProjection.from_linear(q, k, v, 4, 2), OutputProjection.from_linear(o)
    assert (qkv.num_heads, qkv.num_kv_heads, qkv.head_dim) == (4, 2, 8)
    for name, linear in (("q", q), ("k", k), ("v", v)):
        assert qkv[f"{name}_weight"] is linear.weight
        assert not bias or qkv[f"{name}_bias"] is linear.bias
    assert output.weight is o.weight and (not bias or output.bias is o.bias)
    assert len(parameters(qkv)) == (6 if bias else 3)
    assert len(parameters(output)) == (2 if bias else 1)
    for layer in (qkv, output):
        check_layer(rng, layer)


def test_training(rng):
    layer = QKVProjection(24, 4, 2, 8, bias=True)
    x = normal(rng, (2, 5, 24))

    def loss(layer):
        return sum(y.square().mean() for y in layer(x))

    layer.freeze(keys=["q_weight", "q_bias"])
    before = parameters(layer)
    value, gradients = nn.value_and_grad(layer, loss)(layer)
    assert sorted(gradients) == ["k_bias", "k_weight", "v_bias", "v_weight"]
    assert output_counts("FusedQKVProjectionGrad", *gradients.values()) == [4]
    optimizer = optim.Adam(0.01)
    optimizer.update(layer, gradients)
    assert loss(layer).item() < value.item()
    changed = {name for name, array in parameters(layer).items() if array is not before[name]}
    assert changed == {"k_bias", "k_weight", "v_bias", "v_weight"}


@pytest.mark.parametrize(
    "make", [lambda: QKVProjection(24, 4, 2, bias=True), lambda: OutputProjection(8, 24)]
)
def test_save_and_load(make, tmp_path):
    layer, other = make(), make()
    layer.save_weights(str(tmp_path / "weights.safetensors"))
    other.load_weights(str(tmp_path / "weights.safetensors"))
    assert parameters(layer).keys() == parameters(other).keys()
    for name, array in parameters(layer).items():
        assert np.array_equal(array, parameters(other)[name])


def test_values_of_another_size():
    layer, x = QKVProjection(24, 4, 2, 8, bias=True, v_head_dim=3), mx.random.normal((2, 5, 24))
    assert [y.shape for y in layer(x)] == [(2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 3)]
    assert "head_dim=8, v_head_dim=3" in repr(layer)


def test_repr():
    assert repr(QKVProjection(24, 4, 2, bias=True)) == (
        "QKVProjection(input_dims=24, num_heads=4, num_kv_heads=2, head_dim=6, v_head_dim=6, bias=True)"
    )
    assert repr(OutputProjection(32, 24)) == ("OutputProjection(input_dims=32, output_dims=24, bias=False)")


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize("bias", [True, False])
def test_quantize(mode, bias):
    q, k, v, o = (nn.Linear(64, n, bias=bias) for n in (64, 32, 64, 64))
    x = mx.random.normal((2, 3, 64))
    model = nn.Sequential(QKVProjection.from_linear(q, k, v, 4, 2), OutputProjection.from_linear(o))
    linears = nn.Sequential(q, k, v, o)
    for module in (model, linears):
        nn.quantize(module, 32, mode=mode)
    fused_qkv, fused_o = model.layers
    *qkv, o = linears.layers
    for actual, linear, heads in zip(fused_qkv(x), qkv, (4, 2, 2), strict=True):
        expected = linear(x).reshape(2, 3, heads, -1).transpose(0, 2, 1, 3)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fused_o(x, x), x + o(x), rtol=1e-5, atol=1e-5)
    assert model.trainable_parameters()["layers"] == [{}, {}]
    kinds = {"weight", "scales"} | ({"biases"} if mode == "affine" else set()) | ({"bias"} if bias else set())
    assert set(fused_o.parameters()) == kinds
    assert set(fused_qkv.parameters()) == {f"{name}_{kind}" for name in "qkv" for kind in kinds}
    assert f"mode={mode}" in repr(fused_qkv) and f"bias={bias}" in repr(fused_o)


def test_errors():
    q, k, v = linears(bias=False)
    with pytest.raises(ValueError, match=r"num_heads must be a multiple of num_kv_heads but got 4 and 3\."):
        QKVProjection(24, 4, 3)
    with pytest.raises(TypeError, match=r"k must be an mlx\.nn\.Linear but got QuantizedLinear\."):
        QKVProjection.from_linear(q, nn.QuantizedLinear(64, 32), v, 4, 2)
    with pytest.raises(TypeError, match=r"o must be an mlx\.nn\.Linear but got Linear4\."):
        OutputProjection.from_linear(type("Linear4", (nn.Linear,), {})(4, 4))
    with pytest.raises(ValueError, match=r"q, k and v must all have a bias, or none, but got one for v\."):
        QKVProjection.from_linear(q, k, nn.Linear(24, 16, bias=True), 4, 2)
    with pytest.raises(ValueError, match=r"weight of v must have shape \(16, 24\) but got \(17, 24\)\."):
        QKVProjection.from_linear(q, k, nn.Linear(24, 17, bias=False), 4, 2)
    with pytest.raises(ValueError, match=r"weight of q must have shape \(30, 24\) but got \(32, 24\)\."):
        QKVProjection.from_linear(q, k, v, 3, 3)
    assert mlx_fused.nn.QKVProjection is QKVProjection
