"""Patched rotary positions."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import rope_utils

import mlx_fused
from graph import primitives
from mlx_fused import _ext
from tiny_models import LAYERS, loss, make, tokens

DIMS = 16
LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 64, "rope_type": "llama3"}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "yarn", "mscale": 2.0}
LONG = {
    "original_max_position_embeddings": 64,
    "rope_type": "longrope",
    "short_factor": 1.0,
    "long_factor": 3.0,
}
KINDS = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "longrope": LONG,
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}


def rope_of(kind, traditional=False):
    return rope_utils.initialize_rope(DIMS, 10000.0, traditional, KINDS[kind], 128)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mlx_lm_gives_what_it_gave(kind, traditional):
    rope, x = rope_of(kind, traditional), mx.random.normal((2, 3, 5, 24), key=mx.random.key(1))
    report = mlx_fused.patch(rope)
    assert [part.fused for part in report.parts] == [True] and report.modules[0].rope is not None
    for offset in (0, 150, mx.array([3, 60])):
        if kind == "dynamic" and not isinstance(offset, int):
            continue  # whose code takes the maximum of it
        y = rope(x, offset=offset)
        with mlx_fused.patched(rope, rope=False):
            expected = rope(x, offset=offset)
        assert primitives(y)["FusedRope"] == 1 and primitives(expected)["FusedRope"] == 0
        # MLX's angles are float32: they are off by this much of the place.
        bound = 200 * mx.finfo(mx.float32).eps * float(mx.abs(expected).max())
        assert float(mx.abs(y - expected).max()) < bound


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("hunyuan", "DynamicNTKAlphaRoPE"),
        ("hunyuan_v1_dense", "DynamicNTKAlphaRoPE"),
        ("internlm3", "DynamicNTKScalingRoPE"),
    ],
)
def test_kinds_of_a_models_own(file, name):
    of = getattr(importlib.import_module(f"mlx_lm.models.{file}"), name)
    rope, x = of(DIMS), mx.random.normal((1, 2, 5, DIMS), key=mx.random.key(1))
    expected = rope(x, offset=3)
    mlx_fused.patch(rope)
    assert mx.allclose(rope(x, offset=3), expected, rtol=1e-5, atol=1e-5)
    assert primitives(rope(x, offset=3))["FusedRope"] == 1


def test_a_model_rotates_queries_and_keys_in_one_operation_each():
    model = make("llama")
    report = mlx_fused.patch(model)
    assert primitives(model(tokens(1, 3)))["FusedRope"] == 2 * LAYERS
    ropes = [module.rope for module in report.modules if module.rope]
    assert len(ropes) == LAYERS and {str(rope.calls) for rope in ropes} == {"2/0"}
    gradients = nn.value_and_grad(model, loss)(model, tokens(2, 5))[1]
    weight = gradients["model"]["layers"][0]["self_attn"]["q_proj"]["weight"]
    assert primitives(weight)["FusedRope"] >= 4


def test_report():
    model = make("llama")
    report = mlx_fused.patch(model)
    assert f"rope {LAYERS} of {LAYERS}" in report.summary and "rope" not in repr(report).splitlines()[1]
    report = mlx_fused.patch(model, rope=False)
    assert f"rope 0 of {LAYERS}" in report.summary
    assert "model.layers.0.self_attn.rope" in repr(report) and "not fused: rope=False" in repr(report)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"rope": False}, "rope=False"), ({"exact": True}, "exact=True, and MLX rounds sines")],
)
def test_options(options, reason):
    rope, x = rope_of("llama3"), mx.random.normal((1, 2, 5, DIMS))
    expected = rope(x)
    report = mlx_fused.patch(rope, **options)
    assert mx.array_equal(rope(x), expected)
    assert report.modules[0].rope.obstacle == report.modules[0].rope.calls.reason == reason


def test_off_by_environment(monkeypatch):
    rope, x = rope_of("plain"), mx.random.normal((1, 2, 5, DIMS))
    mlx_fused.patch(rope)
    monkeypatch.setenv("MLX_FUSED", "0")
    assert primitives(rope(x))["FusedRope"] == 0


def test_on_a_gpu_it_is_mlxs(monkeypatch):
    rope, x = rope_of("plain"), mx.random.normal((1, 2, 5, DIMS))
    report = mlx_fused.patch(rope)
    monkeypatch.setattr(_ext, "on_gpu", lambda: True)
    assert primitives(rope(x))["FusedRope"] == 0
    assert report.parts[0].calls.reason == "on a GPU it is MLX's"


def test_others_patches_stay(monkeypatch):
    rope, x = rope_of("plain"), mx.random.normal((1, 2, 5, DIMS))
    report = mlx_fused.patch(rope)
    monkeypatch.setattr(mx.fast, "rope", lambda x, *args, **kwargs: x + 1)
    assert mx.array_equal(rope(x), x + 1)
    assert report.parts[0].calls.reason == "mx.fast.rope was replaced"
    monkeypatch.undo()
    monkeypatch.setattr(nn.RoPE, "__call__", lambda self, x, offset=0: x + 2)
    assert mx.array_equal(rope(x), x + 2)


def test_wrong_arguments_are_mlxs_errors():
    rope = rope_of("plain")
    mlx_fused.patch(rope)
    for x in (mx.ones((3, DIMS)), mx.ones((1, 3, DIMS), mx.int32), mx.ones((1, 3, DIMS - 2))):
        with pytest.raises(ValueError, match=r"\[rope\]"):
            rope(x)


def test_code_with_a_class_in_it_runs_as_it_is():
    class Classy(nn.Module):
        def __call__(self, x):
            class Here:
                size = DIMS  # a global, which the body of a class looks up by itself

            return mx.fast.rope(x, Here.size, traditional=True, base=1e4, scale=1.0, offset=0)

    rope, x = Classy(), mx.random.normal((1, 2, 5, DIMS))
    expected = rope(x)
    mlx_fused.patch(rope)
    assert mx.array_equal(rope(x), expected)


@pytest.mark.parametrize("base", [0.0, -2.0, mx.inf, mx.nan])
def test_with_a_base_that_ours_refuses_it_is_mlxs(base):
    rope, x = rope_of("plain"), mx.random.normal((1, 2, 5, DIMS))
    rope.base = base
    expected = rope(x)
    report = mlx_fused.patch(rope)
    assert mx.array_equal(rope(x), expected, equal_nan=True)
    assert "base must be greater than 0" in report.parts[0].calls.reason


def test_without_base_and_frequencies_it_is_mlxs_error(monkeypatch):
    rope = rope_of("plain")
    mlx_fused.patch(rope)
    rope.base = None
    with pytest.raises(ValueError, match="Neither base nor freqs"):
        rope(mx.ones((1, 3, DIMS)))


def test_a_module_that_has_layers_is_none(monkeypatch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.LayerNorm(8)

        def __call__(self, x):
            return mx.fast.rope(self.inner(x), 8, traditional=False, base=1e4, scale=1.0, offset=0)

    report = mlx_fused.patch(Block())
    assert not report.modules


def test_numbers_are_those_of_the_formula():
    rope, x = rope_of("plain"), np.random.default_rng(0).standard_normal((1, 1, 3, DIMS))
    mlx_fused.patch(rope)
    angle = (np.arange(3) + 7)[:, None] * 10000.0 ** (-np.arange(DIMS // 2) / (DIMS // 2))
    a, b = np.split(x, 2, -1)
    expected = np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1
    )
    y = rope(mx.array(x, dtype=mx.float32), offset=7)
    np.testing.assert_allclose(np.array(y), expected, rtol=0, atol=1e-6)
