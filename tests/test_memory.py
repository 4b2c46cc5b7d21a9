"""Peak memory: no weight, activation or cotangent is copied."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused
from active_memory import kept
from operands import normal
from projections import backward, cotangents, gated, gradients, linear, output, qkv
from test_forward import dtypes

# 512 x 512 and twice 128 x 512: a copy of the smallest is 15% of the sum of the weights.
HEADS, HIDDEN = (8, 2, 64), 512


def peak(function, arrays):
    """The most memory MLX held while this ran, these arrays included."""
    mx.eval(arrays)
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    outputs = function()
    mx.eval(outputs)
    return mx.get_peak_memory() - held + nbytes(arrays)


def nbytes(tree):
    if isinstance(tree, (tuple, list)):
        return sum(map(nbytes, tree))
    return 0 if tree is None else tree.nbytes


def arrays(call, *names):
    """All of the call's, or those of these names."""
    return [a for (name, _), a in call.leaves.items() if not names or name in names]


def concatenated(call):
    """The call with weights and biases packed when it is made."""
    names = ("weight", "bias")
    return call.replace(**{name: mx.concatenate(arrays(call, name)) for name in names})


def check_nothing_is_copied(call):
    assert peak(call, arrays(call)) <= 1.02 * (nbytes(arrays(call)) + nbytes(call()))


@dtypes
@pytest.mark.parametrize("seq", [1, 2, 8, 64])
def test_separate_weights_are_not_copied(rng, dtype, seq):
    call = qkv(rng, 1, seq, HIDDEN, HEADS, dtype=dtype)
    check_nothing_is_copied(call)
    needed = nbytes(arrays(call)) + nbytes(call())
    assert peak(lambda: concatenated(call)(), arrays(call)) > 1.02 * needed


@dtypes
@pytest.mark.parametrize("seq", [1, 2, 8, 64])
def test_gradients_copy_neither_weights_nor_cotangents(rng, dtype, seq):
    call = qkv(rng, 1, seq, HIDDEN, HEADS, dtype=dtype)
    given = cotangents(rng, call)
    read = [*given, *arrays(call, "input", "weight")]

    def input_only():
        return gradients(call.replace(bias=None), [("input", None)], given)

    needed = nbytes(read) + nbytes(backward(call, given))
    assert peak(lambda: backward(call, given), read) <= 1.02 * needed
    assert peak(lambda: backward(concatenated(call), given), read) > 1.02 * needed
    assert peak(input_only, read) <= 1.02 * (nbytes(read) + nbytes(input_only()))


@dtypes
@pytest.mark.parametrize("seq", [1, 64])
def test_output_projection_copies_nothing(rng, dtype, seq):
    call = output(rng, 1, seq, HIDDEN, 384, dtype=dtype)
    check_nothing_is_copied(call)
    given = arrays(call, "residual")
    read = [*given, *arrays(call, "x", "weight")]
    # The residual's gradient is the cotangent itself.
    needed = nbytes(read) + nbytes(backward(call, given)[:3])
    assert peak(lambda: backward(call, given), read) <= 1.02 * needed


@dtypes
@pytest.mark.parametrize("seq", [4, 64])
def test_strided_operands_are_read_in_place(rng, dtype, seq):
    # Windows of larger arrays, as a slice of a packed checkpoint or of a longer sequence is.
    call = qkv(rng, 2, 2 * seq, HIDDEN + 64, HEADS, dtype=dtype)
    mx.eval(arrays(call))
    weight = tuple(w[:, 64:] for w in arrays(call, "weight"))
    check_nothing_is_copied(call.replace(input=call.x[:, ::2, :HIDDEN], weight=weight))


@dtypes
@pytest.mark.parametrize("seq", [4, 64])
def test_transposed_cotangents_are_read_in_place(rng, dtype, seq):
    call = qkv(rng, 2, seq, HIDDEN, HEADS, dtype=dtype)
    given = cotangents(rng, call)
    views = [mx.contiguous(g.swapaxes(1, 2)).swapaxes(1, 2) for g in given]
    mx.eval(arrays(call))
    assert peak(lambda: backward(call, views), views) <= peak(lambda: backward(call, given), given)


# Weights of 64, 32 and 32 MB, and what one call adds to the most memory the process ever held, in MB.
RESIDENT = """
import resource, sys
import mlx.core as mx, mlx_fused

dtype, seq, backward = getattr(mx, sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "backward"
hidden = 4096
rows = 2**25 // hidden // dtype.size
weight = tuple(mx.ones((n * rows, hidden), dtype) for n in (2, 1, 1))
heads, kv_heads = 2 * rows // 64, rows // 64

def forward(x):
    return mlx_fused.fused_qkv_projection(x, weight, None, heads, kv_heads, 64)

def run(seq):
    x = mx.ones((1, seq, hidden), dtype)
    if backward:
        cotangents = [mx.ones((1, n, seq, 64), dtype) for n in (heads, kv_heads, kv_heads)]
        mx.eval(mx.vjp(forward, [x], cotangents)[1])
    else:
        mx.eval(forward(x))

def held():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

mx.eval(weight)
before = held()
run(seq)
print(held() - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seq", [1, 8, 64])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernels_keep_no_copy_of_a_weight_outside_mlx(dtype, seq, direction):
    command = [sys.executable, "-c", RESIDENT, dtype, str(seq), direction]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    # The smallest weight is 32 MB.
    assert float(run.stdout) < 24


def mlp(x, layers):
    """Gate, up and down with the residual."""
    gate, up, down = layers
    hidden = mlx_fused.fused_gated_projection(x, (gate, up))
    return mlx_fused.fused_output_projection_residual(hidden, down, residual=x)


class Mlps:
    """MLPs with LoRA on layers of an eighth of Llama-3.2-1B's sizes, one after the other."""

    hidden, between, rank, dtype = 256, 1024, 8, mx.bfloat16
    kept_per_token = 2 * (hidden + 2 * between)  # x, gate and up

    def __init__(self, count, tokens):
        rng = np.random.default_rng(0)
        shapes = [(self.between, self.hidden)] * 2 + [(self.hidden, self.between)]
        self.weights = [[normal(rng, s, self.dtype) / s[1] for s in shapes] for _ in range(count)]
        ranks = [[(k, self.rank), (self.rank, n)] for n, k in shapes]
        self.adapters = [normal(rng, s) / 16 for _ in range(count) for pair in ranks for s in pair]
        self.x = normal(rng, (1, tokens, self.hidden), self.dtype)
        mx.eval(self.weights, self.adapters, self.x)

    def loss(self, *adapters):
        x, adapters = self.x, iter(adapters)
        for weights in self.weights:
            pairs = [(next(adapters), next(adapters)) for _ in weights]
            layers = zip(weights, pairs, strict=True)
            x = mlp(x, [mlx_fused.LinearOperands(w, lora_a=a, lora_b=b) for w, (a, b) in layers])
        return x.astype(mx.float32).mean()

    def kept(self):
        return kept(self.loss, self.adapters)

    def peak(self):
        """Of a compiled step: the least of some, as they differ in what evaluation is ahead by."""
        step = mx.value_and_grad(self.loss, tuple(range(len(self.adapters))))
        return min(peak(lambda: mx.compile(step)(*self.adapters), []) for _ in range(4))


@pytest.mark.parametrize("route", ["fused", "composed"])
def test_the_gradient_of_an_mlp_keeps_its_input_gate_and_up(route, monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", route)
    short, long, more = Mlps(2, 64).kept(), Mlps(2, 128).kept(), Mlps(3, 128).kept() - Mlps(3, 64).kept()
    assert (more - (long - short)) / 64 == Mlps.kept_per_token


@pytest.mark.parametrize("route", ["fused", "composed"])
def test_a_compiled_step_keeps_no_activation(route):
    """The peak's other parts do not grow with the layers, but for some that evaluation is ahead by."""
    # Without memory to spare evaluation waits for what it began, whatever the machine's load. In a process of
    # its own: where an operation has failed before, MLX 0.32.4 waits for ever.
    code = "import mlx.core as mx; from test_memory import Mlps; mx.set_memory_limit(0)\n"
    code += "print(*((Mlps(n, 128).peak() - Mlps(n, 64).peak()) / 64 for n in (8, 16)))"
    run = [sys.executable, "-c", code]
    environment = os.environ | {"MLX_FUSED_ROUTE": route, "PYTHONPATH": str(Path(__file__).parent)}
    printed = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    few, many = map(float, printed.split())
    # mx.compile merges what the composed form does both ways: the adapters' input in float32.
    wide = 4 * Mlps.hidden if route == "composed" else 0
    assert (many - few) / 8 < Mlps.kept_per_token + wide + 2 * Mlps.between  # which the activation takes


@dtypes
@pytest.mark.parametrize("transform", [lambda f: f, mx.compile], ids=["eager", "compiled"])
def test_inference_keeps_neither_gate_nor_up(rng, transform, dtype):
    for seq in (1, 64):
        for call in (
            gated(rng, 1, seq, HIDDEN, 2048, dtype=dtype),
            linear(rng, 1, seq, HIDDEN, 2048, dtype=dtype, activation="gelu"),
        ):
            keys, given = list(call.leaves), cotangents(rng, call)
            mx.eval(gradients(call, keys, given))
            function = transform(call.function(keys))
            needed = nbytes(arrays(call)) + nbytes(call())
            assert peak(lambda f=function, c=call: f(*arrays(c)), arrays(call)) <= needed + 4096
            if seq > 1:  # one row is no larger than what an allocation is rounded to
                held = peak(lambda c=call, k=keys, g=given: gradients(c, k[:1], g), arrays(call))
                assert held > needed + 4096  # of a gradient, gate and up
