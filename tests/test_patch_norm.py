"""Patched RMS norms: what they run as, and what the operation after them gets on a GPU."""

import copy
import pickle

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.trainer import grad_checkpoint

import mlx_fused
from graph import primitives
from mlps import Gated, K, N, Packed
from mlx_fused import _ext
from mlx_fused.patching import norm
from mlx_fused.patching.norm import Normed, unnormed
from mlx_fused.patching.projections import watching
from tiny_models import LAYERS, assert_same, loss, make, tokens

NORMS = 2 * LAYERS + 1  # of a llama


@pytest.fixture
def on_a_gpu(monkeypatch):
    as_on_a_gpu(monkeypatch)


def as_on_a_gpu(monkeypatch):
    """As far as patching sees: our norm is MLX's there."""
    ours = norm.norm_of

    def mlxs(of, x):
        return None if ours(of, x) is None else nn.RMSNorm.__call__(of, x)

    monkeypatch.setattr(_ext, "on_gpu", lambda: True)
    monkeypatch.setattr(norm, "norm_of", mlxs)


def norms(*arrays):
    nodes = primitives(*arrays)
    return nodes["FusedRMSNorm"], nodes["FusedRMSNormGrad"]


def gradients(model):
    model.freeze(keys=["embed_tokens"])
    return nn.value_and_grad(model, loss)(model, tokens(2, 5))[1]


def norm_of(size=K):
    norm = nn.RMSNorm(size, eps=1e-3)
    norm.weight = mx.random.normal((size,), key=mx.random.key(3))
    return norm


def test_every_norm_is_one_operation():
    model = make("llama")
    report = mlx_fused.patch(model)
    assert [norm.name for norm in report.norms[:2]] == [
        f"model.layers.0.{name}_layernorm" for name in ("input", "post_attention")
    ]
    assert all(norm.norm.fused for norm in report.norms) and len(report.norms) == NORMS
    assert norms(model(tokens(2, 5))) == (NORMS, 0)
    assert norms(model(tokens(1, 3))) == (0, 0)  # operations of few rows take them over
    assert {str(norm.norm.calls) for norm in report.norms} == {"2/0"}
    of = gradients(model)["model"]
    weights = [of["norm"], *(layer["input_layernorm"] for layer in of["layers"])]
    assert norms(*(norm["weight"] for norm in weights))[1] == NORMS


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, K), (5, K), (K,), (2, 0, K)])
def test_results_are_those_of_the_norm(dtype, shape):
    norm, x = norm_of(), mx.random.normal(shape, key=mx.random.key(1)).astype(dtype)
    norm.set_dtype(dtype)
    expected = norm(x)
    mlx_fused.patch(norm)
    assert norm(x).dtype == dtype and norm(x).shape == shape
    # Rounded twice; and K squares are summed in another order, of which the square root halves the error.
    assert mx.allclose(
        norm(x), expected, rtol=2 * mx.finfo(dtype).eps + K / 2 * mx.finfo(mx.float32).eps, atol=0
    )


def test_gradients_are_those_of_the_norm():
    model = make("qwen3")  # which has norms of heads too
    expected = gradients(model)
    mlx_fused.patch(model)
    for (path, ours), (_, stock) in zip(
        nn.utils.tree_flatten(gradients(model)), nn.utils.tree_flatten(expected), strict=True
    ):
        assert mx.allclose(ours, stock, rtol=1e-4, atol=1e-6), path


def test_off():
    model, x = make("llama"), tokens(1, 3)
    report = mlx_fused.patch(model, norm=False)
    assert {norm.norm.obstacle for norm in report.norms} == {"norm=False"}
    assert norms(model(x)) == (0, 0)
    assert report.norms[0].norm.calls.reason == "norm=False"
    assert "RMS norm 0 of 5" in report.summary and "model.layers.0.input_layernorm" in str(report)


def test_other_code_runs_as_it_is(monkeypatch):
    class Shifted(nn.RMSNorm):
        def __call__(self, x):
            return super().__call__(x) + 1

    shifted, norm, x = Shifted(K), norm_of(), mx.ones((2, K))
    assert not mlx_fused.patch(nn.Sequential(shifted)).norms
    (report,) = mlx_fused.patch(norm).norms
    assert report.norm.fused
    monkeypatch.setattr(nn.RMSNorm, "__call__", lambda self, x: 2 * x)
    assert_same([norm(x)], [2 * x])
    assert report.norm.calls.reason == "its __call__ was replaced"
    monkeypatch.undo()
    assert norms(norm(x)) == (1, 0)
    assert norms(norm(mx.ones((2, K), mx.int32))) == (0, 0)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copy_of):
    norm, x = norm_of(), mx.ones((2, K))
    mlx_fused.patch(norm)
    other = copy_of(norm)
    assert norms(other(x)) == (1, 0)
    mlx_fused.unpatch(other)
    assert type(other) is nn.RMSNorm and norms(norm(x)) == (1, 0)


def seen_by(model, x):
    """The operations of a call with their arguments, and its result."""
    seen = []
    with watching(lambda module, operation, arguments, outputs: seen.append((operation, arguments))):
        y = model(x)
    return seen, y


def test_on_a_gpu_operations_get_it_unnormed(monkeypatch):
    model, x = make("llama"), tokens(1, 3)
    mlx_fused.patch(model)
    expected = model(x)
    as_on_a_gpu(monkeypatch)
    seen, y = seen_by(model, x)
    normed = [operation.__name__ for operation, arguments in seen if arguments.get("norm")]
    assert normed == ["fused_qkv_projection", "fused_gated_projection"] * LAYERS
    layer = model.layers[0]
    weight, eps = seen[0][1]["norm"]
    assert eps == layer.input_layernorm.eps and mx.array_equal(weight, layer.input_layernorm.weight)
    assert mx.array_equal(seen[0][1]["input"], model.model.embed_tokens(x))
    assert norms(y) == (0, 0)
    assert mx.allclose(y, expected, rtol=1e-5, atol=1e-5)  # the head is MLX's there


@pytest.mark.parametrize("transform", ["value_and_grad", "compile", "checkpoint"])
def test_transforms_on_a_gpu(on_a_gpu, monkeypatch, transform):
    model = make("llama")
    if transform == "checkpoint":
        cls = type(model.layers[0])
        monkeypatch.setattr(cls, "__call__", cls.__call__)  # grad_checkpoint edits the class
        grad_checkpoint(model.layers[0])
    stock = gradients(model)
    mlx_fused.patch(model)
    ours = mx.compile(lambda: gradients(model))() if transform == "compile" else gradients(model)
    for (path, a), (_, b) in zip(nn.utils.tree_flatten(ours), nn.utils.tree_flatten(stock), strict=True):
        assert mx.allclose(a, b, rtol=1e-4, atol=1e-6), path


def test_code_that_reads_the_norm_gets_it(on_a_gpu):
    norm, x = norm_of(), mx.random.normal((2, 3, K))
    expected = norm(x)
    mlx_fused.patch(norm)
    y = norm(x)
    assert type(y) is Normed and isinstance(y, mx.array)
    assert mx.array_equal(y, expected) and mx.array_equal(y * 2, expected * 2)
    assert type(y + y) is type(y.astype(mx.float16)) is type(mx.stop_gradient(y)) is mx.array


def test_what_changes_in_place_is_no_norm_any_more(on_a_gpu):
    norm, x = norm_of(), mx.random.normal((2, 3, K))
    mlx_fused.patch(norm)
    y = norm(x)
    y += 1
    assert unnormed(y)[1] is None
    y, before = norm(x), mx.array(x)
    x[0] = 0
    norm.weight[0] = 5
    source, (weight, _) = unnormed(y)
    assert mx.array_equal(source, before) and weight[0] != 5


class WithNorm(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.norm, self.mlp = norm_of(), make()

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


class Inside(Gated):
    def __init__(self):
        super().__init__()
        self.norm = norm_of()

    def __call__(self, x):
        x = self.norm(x)
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.QuantizedLinear(K, K, bias=True, group_size=32)  # with a bias, or MLX's own is as good

    def __call__(self, x):
        return self.proj(x)


@pytest.mark.parametrize("cls", [Gated, Packed, Inside, OneLayer])
def test_on_a_gpu_every_operation_norms(on_a_gpu, cls):
    model, x = WithNorm(cls) if cls is not Inside else Inside(), mx.random.normal((2, 3, K))
    expected = model(x)
    mlx_fused.patch(model)
    seen, y = seen_by(model, x)
    assert seen[0][1]["norm"] is not None
    assert mx.allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert N != K  # so that no two of the layers' sizes agree by chance


def test_a_call_by_name(on_a_gpu):
    norm, x = norm_of(), mx.ones((2, K))
    report = mlx_fused.patch(norm)
    assert type(norm(x=x)) is Normed
    with pytest.raises(TypeError):
        norm(y=x)
    assert str(report.norms[0].norm.calls) == "0/2"  # on a GPU it is MLX's


def test_many_rows_on_a_gpu_stay_mlxs(on_a_gpu):
    norm = norm_of()
    mlx_fused.patch(norm)
    assert type(norm(mx.ones((600, K)))) is mx.array and type(norm(mx.ones((4, K)))) is Normed


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"eps": mx.array(1e-5)},
        {"weight": mx.ones((K,), mx.int32)},
        {"weight": mx.ones((K,), mx.float16)},
    ],
    ids=["eps", "integers", "float16"],
)
def test_unusual_parameters(monkeypatch, change, on_gpu):
    if on_gpu:
        as_on_a_gpu(monkeypatch)
    model, x = WithNorm(Gated), mx.random.normal((2, 3, K))
    for name, value in change.items():
        setattr(model.norm, name, value)
    expected = model(x)
    mlx_fused.patch(model)
    assert mx.allclose(model(x), expected, rtol=1e-4, atol=1e-4)


def test_exact_reaches_every_operation():
    model = make("llama")
    mlx_fused.patch(model, exact=True)
    seen, _ = seen_by(model, tokens(1, 3))
    assert len(seen) == 4 * LAYERS + 1 and all(arguments["exact"] for _, arguments in seen)


def test_sharded_projections_get_it_normed(on_a_gpu):
    model = make("llama")
    model.shard(mx.distributed.init())
    mlx_fused.patch(model)
    seen, _ = seen_by(model, tokens(1, 3))
    # The norm's gradient is summed over the ranks, with that of the normed input.
    ours = [arguments["norm"] for operation, arguments in seen if operation is mlx_fused.fused_qkv_projection]
    assert ours == [None] * LAYERS
