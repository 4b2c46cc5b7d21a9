"""The code of MLPs, as patch reads it: what keeps its own code, and what may change after it was read."""

import copy
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import activations
from mlx_lm.models.activations import SwigluOAI, swiglu
from mlx_lm.tuner.trainer import grad_checkpoint

import mlx_fused
from mlps import Chosen, Clipped, Gated, K, Packed, TwoLayers, close, fused, make


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
