"""Wrong layers: ValueError naming the operand, what was expected and what came."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

import mlx_fused
from mlx_fused import LinearOperands
from projections import Call
from test_errors import describe, message, zeros


def words(rows, columns):
    return mx.zeros((rows, columns), mx.uint32)


# 4 query heads and 2 of keys and values, of 8: Hq = 32, Hkv = 16, packed 64; H = 128, 4 bits in groups of 64.
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
QUANTIZED = {"weight": words(64, 16), "scales": zeros(64, 2), "biases": zeros(64, 2), "bias": zeros(64)}
SEPARATE = {
    "weight": (words(32, 16), words(16, 16), words(16, 16)),
    "scales": (zeros(32, 2), zeros(16, 2), zeros(16, 2)),
    "biases": (zeros(32, 2), zeros(16, 2), zeros(16, 2)),
    "bias": (zeros(32), zeros(16), zeros(16)),
}
DENSE = {"scales": None, "biases": None}
ADAPTERS = {
    "lora_a": (zeros(128, 4), None, zeros(128, 3)),
    "lora_b": (zeros(4, 32), None, zeros(3, 16)),
    "lora_scale": 2.0,
}
ADAPTER = {"lora_a": zeros(128, 4), "lora_b": zeros(4, 64), "lora_scale": 2.0}
QKV = {"input": zeros(2, 3, 128), **HEADS}
OUTPUT = {"x": zeros(2, 3, 128), "residual": zeros(2, 3, 64)}
# What the cases change: an operation, and how its layers are made.
CALLS = {
    "packed": Call("fused_qkv_projection", QKV | QUANTIZED),
    "separate": Call("fused_qkv_projection", QKV | SEPARATE),
    "separate with LoRA": Call("fused_qkv_projection", QKV | SEPARATE | ADAPTERS),
    "output": Call("fused_output_projection_residual", OUTPUT | QUANTIZED),
    "output with LoRA": Call("fused_output_projection_residual", OUTPUT | QUANTIZED | ADAPTER),
}
calls = pytest.mark.parametrize("kind", CALLS)

# The wrong arguments, and what the message must say of them.
WEIGHTS = [
    ({"weight": words(64, 15)}, ["weight", "(64, 16)", "(64, 15)"]),
    ({"weight": words(64, 32)}, ["weight", "(64, 16)", "(64, 32)"]),
    ({"weight": words(1, 64)[0]}, ["weight", "(64,)"]),
    ({"weight": zeros(64, 16)}, ["weight", "uint32", "float32"]),
    ({"weight": mx.zeros((64, 16), mx.int32)}, ["weight", "uint32", "int32"]),
    ({"scales": zeros(64, 1)}, ["scales", "(64, 2)", "(64, 1)"]),
    ({"scales": zeros(63, 2)}, ["scales", "(64, 2)", "(63, 2)"]),
    ({"scales": zeros(64)}, ["scales", "(64, 2)", "(64,)"]),
    ({"scales": mx.zeros((64, 2), mx.uint8)}, ["scales", "float32", "uint8"]),
    ({"biases": zeros(64, 1)}, ["biases", "(64, 2)", "(64, 1)"]),
    ({"biases": mx.zeros((64, 2), mx.int32)}, ["biases", "float32", "int32"]),
    ({"biases": None}, ["biases", "affine", "None"]),
    ({"bias": zeros(63)}, ["bias", "(64,)", "(63,)"]),
    ({"bias": mx.zeros(64, mx.int32)}, ["bias", "float32", "int32"]),
    (DENSE, ["weight", "float32", "uint32"]),
    (DENSE | {"weight": zeros(64, 127), "mode": "affine"}, ["weight", "(64, 128)", "(64, 127)"]),
    (DENSE | {"weight": zeros(64, 128), "biases": zeros(64, 2)}, ["biases", "scales", "None"]),
    (DENSE | {"weight": zeros(64, 128), "bits": 4}, ["bits", "scales", "None"]),
    (DENSE | {"weight": zeros(64, 128), "group_size": 64}, ["group_size", "scales", "None"]),
    (DENSE | {"weight": zeros(64, 128), "mode": "mxfp4"}, ["mode", "scales", "None"]),
]
FORMATS = [
    ({"bits": 0}, ["bits", "1", "0"]),
    ({"bits": -4}, ["bits", "1", "-4"]),
    ({"group_size": 0}, ["group_size", "1", "0"]),
    ({"group_size": -64, "mode": "mxfp3"}, ["group_size", "1", "-64"]),
    ({"bits": 1, "weight": words(64, 4), "scales": zeros(63, 2)}, ["scales", "64", "(63, 2)"]),
    ({"bits": 1, "weight": words(1, 64)[0]}, ["weight", "2", "(64,)"]),
    ({"mode": "mxfp3", "scales": zeros(32, 2)}, ["scales", "64", "(32, 2)"]),
    ({"bits": 7, "biases": zeros(65, 2)}, ["biases", "64", "(65, 2)"]),
    ({"bits": 8}, ["weight", "(64, 32)", "(64, 16)"]),
    ({"group_size": 32}, ["scales", "(64, 4)", "(64, 2)"]),
    ({"mode": "mxfp4"}, ["biases", "None", "mxfp4"]),
    ({"mode": "mxfp4", "biases": None}, ["scales", "(64, 4)", "(64, 2)"]),
    ({"mode": "mxfp4", "biases": None, "scales": zeros(64, 4)}, ["scales", "uint8", "float32"]),
    ({"mode": "nvfp4", "biases": None}, ["scales", "(64, 8)", "(64, 2)"]),
    ({"mode": "mxfp8", "biases": None}, ["weight", "(64, 32)", "(64, 16)"]),
    ({"mode": "mxfp4", "bits": 8}, ["bits", "mxfp4", "4", "8"]),
    ({"mode": "mxfp8", "bits": 4}, ["bits", "mxfp8", "8", "4"]),
    ({"mode": "nvfp4", "group_size": 32}, ["group_size", "nvfp4", "16", "32"]),
    ({"mode": "mxfp4", "group_size": 64}, ["group_size", "mxfp4", "32", "64"]),
]
INPUT = [
    (zeros(2, 3, 64), ["weight", "(64, 8)", "(64, 16)"]),
    (zeros(2, 3, 100), ["group_size", "multiple", "100", "64"]),
    (mx.zeros((2, 3, 128), mx.int32), ["float32", "int32"]),
]
COUNTS = [
    ({"num_heads": 0}, ["num_heads", "1", "0"]),
    ({"num_kv_heads": -1}, ["num_kv_heads", "1", "-1"]),
    ({"head_dim": 0}, ["head_dim", "1", "0"]),
    ({"num_heads": 3}, ["num_heads", "multiple", "3"]),
    ({"num_heads": None}, ["num_heads", "None"]),
    ({"num_kv_heads": None}, ["num_kv_heads", "None"]),
    ({"head_dim": None, "split_heads": False}, ["head_dim", "None"]),
]
LAYERS = [
    ({"bias": (zeros(32), None, zeros(16))}, ["alike", "bias"]),
    ({"bits": (4, 8, 4)}, ["weight", "(16, 32)", "(16, 16)"]),
    ({"bits": (4, 8, 4), "weight": (words(32, 16), words(16, 32), words(16, 16))}, ["alike", "8 bits"]),
    (
        {
            "weight": (words(32, 16), zeros(16, 128), words(16, 16)),
            "scales": (zeros(32, 2), None, zeros(16, 2)),
            "biases": (zeros(32, 2), None, zeros(16, 2)),
        },
        ["alike", "quantization", "affine 4 bits by 64", "none"],
    ),
    ({"biases": (zeros(32, 2), zeros(16, 2), None)}, ["biases", "affine", "None"]),
    ({"scales": SEPARATE["scales"][::-1]}, ["scales", "(32, 2)", "(16, 2)"]),
    ({"weight": SEPARATE["weight"][::-1]}, ["weight", "(32, 16)", "(16, 16)"]),
    ({"scales": (zeros(32, 2), zeros(16, 2), words(16, 2))}, ["scales", "float32", "uint32"]),
    ({"bias": (zeros(32), zeros(16), zeros(15))}, ["bias", "(16,)", "(15,)"]),
    ({"head_dim": 16}, ["weight", "(64, 16)", "(32, 16)"]),
]
PAIRS = [
    ({"lora_a": (zeros(127, 4), None, zeros(128, 3))}, ["lora_a", "(128, 4)", "(127, 4)"]),
    ({"lora_a": (zeros(4, 128), None, zeros(128, 3))}, ["lora_a", "(128, 128)", "(4, 128)"]),
    ({"lora_a": (zeros(128), None, zeros(128, 3))}, ["lora_a", "2", "1", "(128,)"]),
    ({"lora_a": (zeros(128, 5), None, zeros(128, 3))}, ["lora_b", "(5, 32)", "(4, 32)"]),
    ({"lora_b": (zeros(4, 16), None, zeros(3, 16))}, ["lora_b", "(4, 32)", "(4, 16)"]),
    ({"lora_b": (zeros(4, 32), None, zeros(3, 16).T)}, ["lora_b", "(3, 16)", "(16, 3)"]),
    ({"lora_a": (None, None, zeros(128, 3))}, ["lora_a", "lora_b", "None"]),
    ({"lora_b": (zeros(4, 32), None, None)}, ["lora_a", "lora_b", "None"]),
    ({"lora_a": (words(128, 4), None, zeros(128, 3))}, ["lora_a", "float32", "uint32"]),
]
RESIDUALS = [
    ({"residual": zeros(2, 3, 63)}, ["residual", "(2, 3, 64)", "(2, 3, 63)"]),
    ({"residual": zeros(1, 3, 64)}, ["residual", "(2, 3, 64)", "(1, 3, 64)"]),
    ({"residual": words(2, 3)}, ["residual", "(2, 3)"]),
]
PAIR = [
    ({"lora_a": zeros(127, 4)}, ["lora_a", "(128, 4)", "(127, 4)"]),
    ({"lora_b": zeros(4, 63)}, ["lora_b", "(4, 64)", "(4, 63)"]),
    ({"lora_b": zeros(3, 64)}, ["lora_b", "(4, 64)", "(3, 64)"]),
    ({"lora_b": zeros(4)}, ["lora_b", "(4, 64)", "(4,)"]),
    ({"lora_b": None}, ["lora_a", "lora_b", "None"]),
    ({"lora_a": words(128, 4)}, ["lora_a", "float32", "uint32"]),
]
CASES = {
    "packed": [*WEIGHTS, *FORMATS, *COUNTS],
    "separate": [*LAYERS, *COUNTS],
    "separate with LoRA": [*LAYERS, *PAIRS],
    "output": [*WEIGHTS, *FORMATS, *RESIDUALS],
    "output with LoRA": [*WEIGHTS, *FORMATS, *RESIDUALS, *PAIR],
}
CASES["packed"] += [({"input": x}, said) for x, said in INPUT]
CASES["packed"] += [({"input": zeros(3, 128)}, ["3", "2", "(3, 128)"])]
CASES["output"] += [({"x": x}, said) for x, said in INPUT]
CASES["output"] += [({"x": zeros(3, 128)}, ["residual", "(3, 64)", "(2, 3, 64)"])]


@calls
def test_the_arguments_that_the_cases_change_are_right(kind):
    mx.eval(CALLS[kind]())


def test_dense_layers_with_lora_that_are_right():
    weight = zeros(32, 128), zeros(16, 128), zeros(16, 128)
    mx.eval(CALLS["separate with LoRA"](**DENSE, weight=weight))
    mx.eval(CALLS["output with LoRA"](**DENSE, weight=zeros(64, 128)))


@pytest.mark.parametrize(
    "kind,changes,said",
    [(kind, *case) for kind, cases in CASES.items() for case in cases],
    ids=lambda value: (
        ",".join(f"{k}={describe(v)}" for k, v in value.items()) if isinstance(value, dict) else None
    ),
)
def test_wrong_arguments(kind, changes, said):
    call = CALLS[kind]
    with pytest.raises(ValueError, match=message(call.operation, said)):
        call(**changes)
    mx.eval(call())  # what was right is as good as before


@calls
def test_errors_are_raised_inside_transforms(kind):
    call = CALLS[kind]
    name = call.input_name
    for transform in (mx.compile, mx.checkpoint, mx.grad):
        with pytest.raises(ValueError, match=message(call.operation, ["multiple", "127", "64"])):
            transform(lambda x: call(**{name: x[..., 1:]}))(call.x)


@calls
def test_arguments_of_the_wrong_kind(kind):
    wrong = [{"scales": 1.0}, {"mode": 4}, {"bits": "4"}, {"group_size": 64.5}, {"weight": "text"}]
    wrong += [{"lora_a": 1.0}, {"lora_scale": "2"}, {"lora_scale": mx.ones((2, 3))}]
    for changes in wrong:
        with pytest.raises(TypeError):
            CALLS[kind](**changes)


@calls
def test_a_route_that_there_is_not(kind):
    with pytest.raises(ValueError, match=r"route must be 'composed', 'fused' or None but got 'slow'\."):
        CALLS[kind](route="slow")


# Formats that MLX does not know either, or not with these shapes, or refuses when it computes.
FOREIGN = [
    {"mode": "mxfp3"},
    {"mode": "mxfp3", "bits": 3, "group_size": 48, "biases": None},
    {"mode": ""},
    {"bits": 7},
    {"bits": 7, "weight": words(64, 28)},
    {"bits": 1},
    {"bits": 1, "weight": words(64, 4), "biases": None},
    {"bits": 1, "weight": words(64, 4), "scales": mx.zeros((64, 2), mx.uint8), "biases": words(64, 2)},
    {"group_size": 48},
    {"group_size": 16, "scales": zeros(64, 8), "biases": zeros(64, 8)},
    {"group_size": 16, "scales": zeros(64, 8), "biases": zeros(64, 7)},
]


def check_foreign_formats(kind):
    rows = 32 if kind == "packed" else 64  # of the first product
    for changes in FOREIGN:
        a = QUANTIZED | {"group_size": None, "bits": None, "mode": "affine"} | changes
        x, weight, scales, biases = zeros(2, 3, 128), a["weight"], a["scales"], a["biases"]
        weight, scales, biases = (None if w is None else w[:rows] for w in (weight, scales, biases))
        with pytest.raises((ValueError, RuntimeError)) as expected:
            mx.eval(
                mx.quantized_matmul(x, weight, scales, biases, True, a["group_size"], a["bits"], a["mode"])
            )
        with pytest.raises(expected.type) as error:
            mx.eval(CALLS[kind](**changes))
        assert str(error.value) == str(expected.value), changes


@pytest.mark.parametrize("kind", ["packed", "output", "output with LoRA"])
def test_formats_that_only_mlx_may_know_have_its_own_errors(kind):
    """In a process of its own: MLX 0.32.4 counts some of what fails as under way, and may wait for it."""
    code = f"import test_quantized_errors; test_quantized_errors.check_foreign_formats({kind!r})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True
    )
    assert run.returncode == 0, run.stderr


QKV_MESSAGES = {
    "bits must be 4 for mode 'mxfp4' but got 8.": ("packed", {"mode": "mxfp4", "bits": 8}),
    "weight must have 64 rows but got shape (63, 4).": ("packed", {"bits": 1, "weight": words(63, 4)}),
    "bits must be left out if scales are None but got a value.": ("packed", DENSE | {"bits": 4}),
    "lora_a[2] and lora_b[2] must both be arrays or both None but got lora_a[2] alone.": (
        "separate with LoRA",
        {"lora_b": (zeros(4, 32), None, None)},
    ),
    "the layers in weight must be alike but only some have a bias.": (
        "separate",
        {"bias": (zeros(32), zeros(16), None)},
    ),
}


@pytest.mark.parametrize("said", QKV_MESSAGES)
def test_the_exact_messages(said):
    kind, changes = QKV_MESSAGES[said]
    with pytest.raises(ValueError) as error:
        CALLS[kind](**changes)
    assert str(error.value) == f"[fused_qkv_projection] {said}"


def test_a_bias_beside_the_one_of_the_layer():
    layer, x = LinearOperands(zeros(64, 128), zeros(64)), zeros(2, 3, 128)
    with pytest.raises(ValueError, match=r"^\[fused_qkv_projection\] bias must be left out"):
        mlx_fused.fused_qkv_projection(x, layer, zeros(64), **HEADS)
    with pytest.raises(ValueError, match=r"^\[fused_output_projection_residual\] bias must be left out"):
        mlx_fused.fused_output_projection_residual(x, layer, zeros(64), zeros(2, 3, 64))


def test_sizes_of_segments_come_from_separate_weights_or_from_heads():
    x, weight = zeros(2, 3, 128), (zeros(30, 128), zeros(7, 128), zeros(1, 128))
    q, k, v = mlx_fused.fused_qkv_projection(x, weight, split_heads=False)
    assert (q.shape, k.shape, v.shape) == ((2, 3, 30), (2, 3, 7), (2, 3, 1))
    for wrong, options, word in (
        (weight, {}, "num_heads"),
        (zeros(64, 128), {"split_heads": False}, "num_heads"),
        (weight, {"split_heads": False, "v_head_dim": 8}, "num_heads"),
        ((zeros(30, 128), zeros(0, 128), zeros(1, 128)), {"split_heads": False}, "weight[1]"),
        ((zeros(30, 128), zeros(7, 127), zeros(1, 128)), {"split_heads": False}, "(7, 127)"),
        ((zeros(30, 128), zeros(7), zeros(1, 128)), {"split_heads": False}, "weight[1]"),
    ):
        with pytest.raises(ValueError) as error:
            mlx_fused.fused_qkv_projection(x, wrong, **options)
        assert word in str(error.value)


class Wider(nn.Linear):
    """Not a layer whose code is known."""


@pytest.mark.parametrize(
    "layer,name",
    [
        (lambda: Wider(4, 4), "Wider"),
        (lambda: nn.Embedding(4, 4), "Embedding"),
        (lambda: nn.QuantizedEmbedding(4, 64), "QuantizedEmbedding"),
        (lambda: LoRALinear.from_base(Wider(4, 4)), "LoRALinear of Wider"),
        (lambda: DoRALinear.from_base(nn.Linear(4, 4)), "DoRALinear"),
    ],
)
def test_layers_that_are_not_linear(layer, name):
    layer = layer()
    with pytest.raises(TypeError, match=f"but got {name}\\.") as error:
        LinearOperands.of(layer)
    assert ("LinearOperands.of_base takes" in str(error.value)) == name.endswith("Embedding")


def test_adapters_that_are_more_than_a_product():
    layer = LoRALinear.from_base(nn.Linear(4, 4), dropout=0.5)
    with pytest.raises(ValueError, match="has dropout"):
        LinearOperands.of(layer)
    layer.eval()
    assert LinearOperands.of(layer).lora_scale == layer.scale
    layer.scale = mx.array(2.0)
    with pytest.raises(ValueError, match="has a scale of type array"):
        LinearOperands.of(layer)
