"""MLPs in forms that mlx-lm's models write, and what they are patched to."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import SwigluOAI, swiglu

from graph import primitives
from oracle import UNIT_ROUNDOFF

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
