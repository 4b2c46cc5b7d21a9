"""Patched attention modules: which attention their code gets."""

import copy
import gc
import pickle
import subprocess
import sys
import types
from pathlib import Path
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import base, llama
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

import mlx_fused
from graph import primitives
from mlx_fused.patching.attention import seeing_ours
from mlx_fused.patching.projections import watching
from mlx_fused.patching.registry import Active
from tiny_models import HIDDEN, LAYERS, loss, make, tokens

NAME = "scaled_dot_product_attention"


def attentions(*arrays):
    nodes = primitives(*arrays)
    return nodes["FusedAttention"], nodes["FusedAttentionGrad"]


def gradients(model):
    return nn.value_and_grad(model, loss)(model, tokens(2, 9))[1]


def test_every_attention_is_one_operation():
    model = make("llama")
    report = mlx_fused.patch(model)
    assert [layer.attention.fused for layer in report.layers] == [True] * LAYERS
    assert attentions(model(tokens(1, 3))) == (LAYERS, 0)
    assert {str(layer.attention.calls) for layer in report.layers} == {"1/0"}
    of = gradients(model)["model"]["layers"]
    assert attentions(*(layer["self_attn"]["q_proj"]["weight"] for layer in of)) == (LAYERS, LAYERS)
    assert f"attention {LAYERS} of {LAYERS}" in report.summary


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "cohere"])
def test_results_and_gradients_are_those_of_mlxs(name, dtype):
    model, x = make(name, dtype), tokens(2, 9)
    with mlx_fused.patched(model, attention=False):
        expected = [model(x), *(g for _, g in nn.utils.tree_flatten(gradients(model)))]
        mx.eval(expected)
    with mlx_fused.patched(model):
        actual = [model(x), *(g for _, g in nn.utils.tree_flatten(gradients(model)))]
    for a, e in zip(actual, expected, strict=True):
        # MLX rounds scores and the softmax of them; a layer has one more of each.
        distance = mx.linalg.norm((a - e).astype(mx.float32).flatten())
        size = mx.linalg.norm(e.astype(mx.float32).flatten())
        assert distance <= 16 * LAYERS * mx.finfo(dtype).eps * size


@pytest.mark.parametrize("cache", [KVCache, lambda: RotatingKVCache(max_size=6, keep=2)])
def test_decoding(cache):
    model, prompt = make("llama"), tokens(1, 5)

    def decode():
        caches = [cache() for _ in model.layers]
        return [model(prompt, caches), *(model(mx.array([[i]]), caches) for i in range(6))]

    expected = decode()
    report = mlx_fused.patch(model)
    for actual, e in zip(decode(), expected, strict=True):
        assert mx.allclose(actual, e, rtol=1e-4, atol=1e-5)
    assert {str(layer.attention.calls) for layer in report.layers} == {"7/0"}


def test_quantized_caches_get_what_they_had():
    model = llama.Model(llama.ModelArgs("llama", HIDDEN, LAYERS, 96, 2, 1e-5, 96))  # with heads of 32
    report = mlx_fused.patch(model)
    caches = [QuantizedKVCache(group_size=32) for _ in range(LAYERS)]
    assert attentions(model(tokens(1, 3), caches)) == (0, 0)
    assert report.layers[0].attention.calls.reason == "its cache is quantized"
    assert str(report.layers[0].attention.calls) == "0/1"


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"attention": False}, "attention=False"),
        ({"exact": True}, "exact=True, and MLX rounds scores"),
    ],
)
def test_off(options, reason):
    model, x = make("llama"), tokens(1, 3)
    report = mlx_fused.patch(model, **options)
    assert {layer.attention.obstacle for layer in report.layers} == {reason}
    assert attentions(model(x)) == (0, 0)
    assert {layer.attention.calls.reason for layer in report.layers} == {reason}
    mlx_fused.patch(model, attention=True)
    assert attentions(model(x)) == (LAYERS, 0)


def test_the_environment_switches_it_off(monkeypatch):
    model, x = make("llama"), tokens(1, 3)
    mlx_fused.patch(model)
    monkeypatch.setenv("MLX_FUSED", "0")
    assert attentions(model(x)) == (0, 0)


def test_on_a_gpu_it_is_mlxs(monkeypatch):
    model, x = make("llama"), tokens(1, 3)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    report = mlx_fused.patch(model, attention=True)
    assert {layer.attention.obstacle for layer in report.layers} == {"on a GPU it is MLX's"}
    assert attentions(model(x)) == (0, 0)


@pytest.mark.parametrize("name", ["gemma2", "mixtral"])
def test_code_without_it(name):
    (report, *_) = mlx_fused.patch(make(name)).layers
    by_itself = name == "gemma2"  # with a softcap
    assert report.attention.fused == (not by_itself)
    assert not by_itself or report.attention.obstacle == f"its code does not call {NAME}"


@pytest.mark.parametrize("before", [True, False])
def test_what_others_put_in_its_place_runs(monkeypatch, before):
    model, x, seen = make("llama"), tokens(1, 3), []

    def theirs(*args, **kwargs):
        seen.append(1)
        return base.scaled_dot_product_attention(*args, **kwargs)

    theirs.__module__, theirs.__name__ = base.__name__, NAME
    if before:
        monkeypatch.setattr(llama, NAME, theirs)
    report = mlx_fused.patch(model)
    monkeypatch.setattr(llama, NAME, theirs)
    assert attentions(model(x)) == (0, 0) and len(seen) == LAYERS
    assert report.layers[0].attention.fused == (not before)
    assert report.layers[0].attention.calls.reason == f"{NAME} was replaced"
    monkeypatch.undo()
    assert attentions(model(x)) == (LAYERS, 0)


def test_a_replaced_function_of_mlx_runs(monkeypatch):
    model, of_mlx, seen = make("llama"), mx.fast.scaled_dot_product_attention, []
    mlx_fused.patch(model)
    monkeypatch.setattr(mx.fast, NAME, lambda *args, **kwargs: (seen.append(1), of_mlx(*args, **kwargs))[1])
    assert attentions(model(tokens(1, 3))) == (0, 0) and len(seen) == LAYERS


def test_what_replaced_mlxs_function_before_the_import_runs():
    script = f"""
import mlx.core as mx
seen, of_mlx = [], mx.fast.{NAME}
mx.fast.{NAME} = lambda *args, **kwargs: (seen.append(1), of_mlx(*args, **kwargs))[1]
import mlx_fused
from tiny_models import make, tokens
mx.set_default_device(mx.cpu)
model = make("llama")
mlx_fused.patch(model)
model(tokens(1, 3))
assert len(seen) == {LAYERS}
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent)


def test_edits_of_the_code_are_seen(monkeypatch):
    module = module_of()
    layer, x = module.Attention(), mx.random.normal((1, 5, 32))
    mlx_fused.patch(layer)
    causal = layer(x)[0]
    module.Attention.__call__.__kwdefaults__ = {"mask": None}
    assert not mx.allclose(layer(x)[0], causal, rtol=1e-3, atol=1e-3)
    model, x = make("llama"), tokens(1, 3)
    mlx_fused.patch(model)
    assert attentions(model(x)) == (LAYERS, 0)
    other = lambda self, x, mask=None, cache=None: x  # noqa: E731
    monkeypatch.setattr(llama.Attention.__call__, "__code__", other.__code__)
    assert attentions(model(x)) == (0, 0)


def test_nothing_is_kept_of_what_was_replaced(monkeypatch):
    model, x, kept = make("llama"), tokens(1, 3), []
    mlx_fused.patch(model)
    stock = llama.Attention.__call__
    for _ in range(2):
        attachment = mx.ones(1)
        kept.append(ref(hook := hooked(stock, attachment)))
        monkeypatch.setattr(llama.Attention, "__call__", hook)
        model(x)
        del hook
    monkeypatch.undo()
    model(x)
    mlx_fused.unpatch(model)
    gc.collect()
    assert [of() for of in kept] == [None, None]


def hooked(method, attachment):
    def hook(self, *args, **kwargs):
        assert attachment.size and scaled_dot_product_attention
        return method(self, *args, **kwargs)

    return hook


def test_no_other_code_sees_ours():
    model, stock, x = make("llama"), make("llama"), tokens(1, 3)
    own = llama.Attention.__call__
    mlx_fused.patch(model)
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention
    assert llama.Attention.__call__ is own and own.__globals__ is vars(llama)
    inside = []
    with watching(lambda *_: inside.append(attentions(stock(x)))):
        model(x)
    assert inside and set(inside) == {(0, 0)}


# A module whose code does what a copy of a function could do otherwise.
CODE = """
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

factor, count = 1.0, 0

class Base(nn.Module):
    def scale(self):
        return factor

class Attention(Base):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))

    def __call__(self, x, cache=None, *, mask="causal"):
        from . import base
        {body}
        q, k, v = (p(x).reshape(1, -1, 2, 16).swapaxes(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        attend = lambda: scaled_dot_product_attention(q, k, v, cache, super(Attention, self).scale(), mask)
        return self.o_proj(attend().swapaxes(1, 2).reshape(1, -1, 32)), base, min(factor, 9)
"""


def module_of(body="pass"):
    """A module of mlx-lm, by its name, with one attention layer."""
    module = types.ModuleType("mlx_lm.models.of_tests")
    module.__package__ = "mlx_lm.models"
    exec(CODE.format(body=body), vars(module))
    return module


def test_code_runs_as_it_does_elsewhere():
    """Its closure, keywords, relative imports, builtins, functions inside, and globals as they are then."""
    module, x = module_of(), mx.random.normal((1, 5, 32))
    layer = module.Attention()
    for module.factor in (1.0, 0.25):
        expected = layer(x)
        (report,) = mlx_fused.patch(layer).layers
        y, of, factor = layer(x)
        assert attentions(y) == (1, 0) and report.attention.fused
        assert of is base and factor == module.factor
        assert mx.allclose(y, expected[0], rtol=1e-5, atol=1e-5)
        assert not mx.allclose(layer(x, mask=None)[0], expected[0], rtol=1e-3, atol=1e-3)
        mlx_fused.unpatch(layer)


COUNTING = "global count; count += 1"


@pytest.mark.parametrize("body", [COUNTING, f"def inner():\n            {COUNTING}\n        inner()"])
def test_code_that_changes_globals_runs_itself(body):
    module = module_of(body)
    layer = module.Attention()
    (report,) = mlx_fused.patch(layer).layers
    assert not report.attention.fused
    layer(mx.ones((1, 5, 32)))
    assert module.count > 0 and seeing_ours(Active(None), own := module.Attention.__call__) is own


def test_a_scale_that_is_an_array_stays_mlxs():
    module = module_of("scaled = self.scale")
    module.Base.scale = lambda self: mx.array(0.25)
    layer, x = module.Attention(), mx.random.normal((1, 5, 32))
    expected = layer(x)[0]
    report = mlx_fused.patch(layer)
    assert mx.allclose(layer(x)[0], expected, rtol=1e-5, atol=1e-6)
    assert report.layers[0].attention.calls.reason == "its scale is an array"


@pytest.mark.parametrize("given", ["float64", "list", "wrong"])
def test_unusual_arguments_get_what_they_had(given):
    module = module_of("mask, x = self.given(mask, x)")
    module.Attention.given = lambda self, mask, x: (
        mx.zeros((7, 7)) if given == "wrong" else [1] if given == "list" else mask,
        x,
    )
    layer, x = module.Attention(), mx.ones((1, 5, 32))
    if given == "float64":
        layer.set_dtype(mx.float64)
        x = x.astype(mx.float64)
    results = []
    for patch in (False, True):
        report = mlx_fused.patch(layer) if patch else None
        try:
            results.append(layer(x)[0].tolist())
        except (TypeError, ValueError) as error:
            results.append(type(error))
    assert results[0] == results[1]
    assert given != "float64" or report.layers[0].attention.calls.fused == 0


def test_compiled():
    model, x = make("llama"), tokens(2, 9)
    expected = model(x)
    mlx_fused.patch(model)
    assert mx.allclose(mx.compile(lambda x: model(x))(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copy_of):
    model = make("llama")
    mlx_fused.patch(model)
    other = copy_of(model)
    assert attentions(other(tokens(1, 3))) == (LAYERS, 0)
    mlx_fused.unpatch(other)
    assert attentions(other(tokens(1, 3))) == (0, 0)


def test_watched():
    model, seen = make("llama"), []
    mlx_fused.patch(model)
    with watching(lambda module, operation, arguments, outputs: seen.append((operation, arguments, outputs))):
        model(tokens(1, 4), make_prompt_cache(model))
    of = [(arguments, y) for operation, arguments, y in seen if operation is mlx_fused.fused_attention]
    assert len(of) == LAYERS
    assert all(arguments["q"].shape == y.shape and arguments["mask"] == "causal" for arguments, y in of)


@pytest.mark.parametrize("value", ["on", 1, None])
def test_an_unknown_value(value):
    with pytest.raises(ValueError, match=r"attention must be 'auto', True or False but got"):
        mlx_fused.patch(make("llama"), attention=value)
