"""Wrong quantized weights and adapters: ValueError naming the argument, what was expected and what came."""

import mlx.core as mx
import pytest

import mlx_fused
from test_errors import describe, message, zeros


def words(rows, columns):
    return mx.zeros((rows, columns), mx.uint32)


# 4 query heads and 2 of keys and values, of 8: Hq = 32, Hkv = 16, packed 64; H = 128, 4 bits in groups of 64.
QUANTIZED = {"weight": words(64, 16), "scales": zeros(64, 2), "biases": zeros(64, 2)}
SEPARATE = {
    "weight": (words(32, 16), words(16, 16), words(16, 16)),
    "scales": (zeros(32, 2), zeros(16, 2), zeros(16, 2)),
    "biases": (zeros(32, 2), zeros(16, 2), zeros(16, 2)),
    "bias": (zeros(32), zeros(16), zeros(16)),
}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
ADAPTERS = {
    "lora_a": (zeros(128, 4), None, zeros(128, 3)),
    "lora_b": (zeros(4, 32), None, zeros(3, 16)),
    "scale": 2.0,
}
QKV = {"input": zeros(2, 3, 128), **QUANTIZED, "bias": zeros(64), **HEADS}
OUTPUT = {"attn_out": zeros(2, 3, 128), **QUANTIZED, "bias": zeros(64), "residual": zeros(2, 3, 64)}
ADAPTER = {"lora_a": zeros(128, 4), "lora_b": zeros(4, 64), "scale": 2.0}
DENSE = {"weight": zeros(64, 128), "scales": None, "biases": None}
OPERATIONS = {
    "fused_quantized_qkv_projection": QKV,
    "fused_quantized_output_projection_residual": OUTPUT,
    "fused_lora_qkv_projection": QKV | ADAPTERS,
    "fused_lora_output_projection_residual": OUTPUT | ADAPTER,
}

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
    (zeros(3, 128), ["3", "2", "(3, 128)"]),
    (mx.zeros((2, 3, 128), mx.int32), ["float32", "int32"]),
]
MIXED = [
    (SEPARATE | {"bias": zeros(64)}, ["bias", "three"]),
    (SEPARATE | {"scales": zeros(64, 2)}, ["scales", "three"]),
    (SEPARATE | {"biases": zeros(64, 2)}, ["biases", "three"]),
    (SEPARATE | {"weight": words(64, 16)}, ["scales", "packed"]),
    (SEPARATE | {"scales": SEPARATE["scales"][:2]}, ["scales", "three", "2"]),
    (SEPARATE | {"weight": SEPARATE["weight"][:2]}, ["weight", "three", "2"]),
    (SEPARATE | {"biases": ()}, ["biases", "three", "0"]),
    (SEPARATE | {"biases": None}, ["biases", "affine", "None"]),
    (SEPARATE | {"scales": SEPARATE["scales"][::-1]}, ["scales", "(32, 2)", "(16, 2)"]),
    (SEPARATE | {"weight": SEPARATE["weight"][::-1]}, ["weight", "(32, 16)", "(16, 16)"]),
    (SEPARATE | {"scales": (zeros(32, 2), zeros(16, 2), words(16, 2))}, ["scales", "float32", "uint32"]),
]
COUNTS = [
    ({"num_heads": 0}, ["num_heads", "1", "0"]),
    ({"num_kv_heads": -1}, ["num_kv_heads", "1", "-1"]),
    ({"head_dim": 0}, ["head_dim", "1", "0"]),
    ({"num_heads": 3}, ["num_heads", "multiple", "3"]),
    ({"head_dim": 16}, ["weight", "(128, 16)", "(64, 16)"]),
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
    ({"lora_a": (None,) * 3, "lora_b": (None,) * 3}, ["lora_a", "at least one", "None"]),
    ({"lora_a": ADAPTERS["lora_a"][:2]}, ["lora_a", "three", "2"]),
    ({"lora_b": ADAPTERS["lora_b"] * 2}, ["lora_b", "three", "6"]),
    ({"lora_a": (words(128, 4), None, zeros(128, 3))}, ["lora_a", "float32", "uint32"]),
    ({"scale": (1.0, 2.0)}, ["scale", "three", "2"]),
    ({"scale": ()}, ["scale", "three", "0"]),
    (DENSE | {"weight": zeros(64, 127)}, ["weight", "(64, 128)", "(64, 127)"]),
    (DENSE | {"weight": words(64, 128)}, ["weight", "float32", "uint32"]),
    ({"scales": None, "biases": None}, ["weight", "float32", "uint32"]),
    (DENSE | {"biases": zeros(64, 2)}, ["biases", "scales", "None"]),
    (DENSE | {"bits": 4}, ["bits", "scales", "None"]),
    (DENSE | {"mode": "mxfp4"}, ["mode", "scales", "None"]),
]
OUTPUT_SHAPES = [
    ({"residual": zeros(2, 3, 63)}, ["residual", "(2, 3, 64)", "(2, 3, 63)"]),
    ({"residual": zeros(1, 3, 64)}, ["residual", "(2, 3, 64)", "(1, 3, 64)"]),
    ({"residual": words(2, 3)}, ["residual", "(2, 3)"]),
]
OUTPUT_PAIR = [
    ({"lora_a": zeros(127, 4)}, ["lora_a", "(128, 4)", "(127, 4)"]),
    ({"lora_b": zeros(4, 63)}, ["lora_b", "(4, 64)", "(4, 63)"]),
    ({"lora_b": zeros(3, 64)}, ["lora_b", "(4, 64)", "(3, 64)"]),
    ({"lora_b": zeros(4)}, ["lora_b", "(4, 64)", "(4,)"]),
    ({"lora_a": words(128, 4)}, ["lora_a", "float32", "uint32"]),
]
CASES = {
    "fused_quantized_qkv_projection": [
        *WEIGHTS, *FORMATS, *MIXED, *COUNTS, *(({"input": x}, said) for x, said in INPUT)
    ],
    "fused_quantized_output_projection_residual": [
        *WEIGHTS, *FORMATS, *OUTPUT_SHAPES, *(({"attn_out": x}, said) for x, said in INPUT)
    ],
    "fused_lora_qkv_projection": [*WEIGHTS, *FORMATS, *MIXED, *COUNTS, *PAIRS],
    "fused_lora_output_projection_residual": [*WEIGHTS, *FORMATS, *OUTPUT_SHAPES, *OUTPUT_PAIR],
}  # fmt: skip


def call(operation, **changes):
    return getattr(mlx_fused, operation)(**(OPERATIONS[operation] | changes))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_arguments_that_the_cases_change_are_right(operation):
    mx.eval(call(operation))
    if "qkv" in operation:
        mx.eval(call(operation, **SEPARATE))
    if "lora" in operation:
        mx.eval(call(operation, **DENSE))


@pytest.mark.parametrize(
    "operation,changes,said",
    [(operation, *case) for operation, cases in CASES.items() for case in cases],
    ids=lambda value: (
        ",".join(f"{k}={describe(v)}" for k, v in value.items()) if isinstance(value, dict) else None
    ),
)
def test_wrong_arguments(operation, changes, said):
    with pytest.raises(ValueError, match=message(operation, said)):
        call(operation, **changes)
    mx.eval(call(operation))  # what was right is as good as before


@pytest.mark.parametrize("operation", OPERATIONS)
def test_errors_are_raised_inside_transforms(operation):
    name = "input" if "qkv" in operation else "attn_out"
    x = OPERATIONS[operation][name]
    for transform in (mx.compile, mx.checkpoint, mx.grad):
        with pytest.raises(ValueError, match=message(operation, [name, "3", "2"])):
            transform(lambda x: call(operation, **{name: x[0]}))(x)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_arguments_of_the_wrong_kind(operation):
    wrong = [{"scales": 1.0}, {"mode": 4}, {"bits": "4"}, {"group_size": 64.5}, {"weight": None}]
    if "lora" in operation:
        wrong += [{"lora_a": None}, {"scale": "2"}, {"scale": mx.ones((2, 3))}, {"lora_b": 1.0}]
    for changes in wrong:
        with pytest.raises(TypeError):
            call(operation, **changes)


def test_a_route_that_there_is_not():
    for operation in OPERATIONS:
        with pytest.raises(ValueError, match=r"route must be 'composed', 'fused' or None but got 'slow'\."):
            call(operation, route="slow")


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


@pytest.mark.parametrize("changes", FOREIGN, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_formats_that_only_mlx_may_know_have_its_own_errors(operation, changes):
    a = QUANTIZED | {"group_size": None, "bits": None, "mode": "affine"} | changes
    rows = 32 if "qkv" in operation else 64  # of the first product
    x, weight, scales, biases = zeros(2, 3, 128), a["weight"], a["scales"], a["biases"]
    weight, scales, biases = (None if w is None else w[:rows] for w in (weight, scales, biases))
    with pytest.raises((ValueError, RuntimeError)) as expected:
        mx.eval(mx.quantized_matmul(x, weight, scales, biases, True, a["group_size"], a["bits"], a["mode"]))
    with pytest.raises(expected.type) as error:
        mx.eval(call(operation, **changes))
    assert str(error.value) == str(expected.value)


def test_the_exact_messages():
    with pytest.raises(ValueError) as error:
        call("fused_quantized_qkv_projection", mode="mxfp4", bits=8)
    assert str(error.value) == "[fused_quantized_qkv_projection] bits must be 4 for mode 'mxfp4' but got 8."
    with pytest.raises(ValueError) as error:
        call("fused_quantized_qkv_projection", bits=1, weight=words(63, 4))
    assert (
        str(error.value) == "[fused_quantized_qkv_projection] weight must have 64 rows but got shape (63, 4)."
    )
    with pytest.raises(ValueError) as error:
        call("fused_lora_qkv_projection", **DENSE, bits=4)
    assert (
        str(error.value)
        == "[fused_lora_qkv_projection] bits must be left out if scales are None but got a value."
    )
    with pytest.raises(ValueError) as error:
        call("fused_lora_qkv_projection", lora_b=(zeros(4, 32), None, None))
    assert str(error.value) == (
        "[fused_lora_qkv_projection] lora_a[2] and lora_b[2] must both be arrays or both None "
        "but got lora_a[2] alone."
    )
