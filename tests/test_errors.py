"""Wrong operands: ValueError naming the operation, the argument, what was expected and what came."""

import re

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused
import oracle
import projections


def zeros(*shape, dtype=mx.float32):
    return mx.zeros(shape, dtype)


def tensors(*shapes):
    return tuple(zeros(*shape) for shape in shapes)


# 4 query heads and 2 of keys and values, of 8: Hq = 32, Hkv = 16, packed 64; H = 12.
QKV = {
    "input": zeros(2, 3, 12),
    "weight": zeros(64, 12),
    "bias": zeros(64),
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
}
QKV_BWD = {
    "dq": zeros(2, 4, 3, 8),
    "dk": zeros(2, 2, 3, 8),
    "dv": zeros(2, 2, 3, 8),
    "input": zeros(2, 3, 12),
    "weight": zeros(64, 12),
    "has_bias": True,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
}
OUTPUT = {
    "x": zeros(2, 3, 32),
    "weight": zeros(12, 32),
    "bias": zeros(12),
    "residual": zeros(2, 3, 12),
}
OUTPUT_BWD = {
    "d_output": zeros(2, 3, 12),
    "x": zeros(2, 3, 32),
    "weight": zeros(12, 32),
    "has_bias": True,
}
LINEAR = {"x": zeros(2, 3, 32), "weight": zeros(12, 32), "bias": zeros(12), "activation": "silu"}
GATED = {
    "x": zeros(2, 3, 32),
    "weight": tensors((12, 32), (12, 32)),
    "bias": tensors((12,), (12,)),
}
OPERATIONS = {
    "fused_qkv_projection": QKV,
    "fused_qkv_projection_bwd": QKV_BWD,
    "fused_output_projection_residual": OUTPUT,
    "fused_output_projection_residual_bwd": OUTPUT_BWD,
    "fused_linear": LINEAR,
    "fused_gated_projection": GATED,
}
SEPARATE = {"weight": tensors((32, 12), (16, 12), (16, 12)), "bias": tensors((32,), (16,), (16,))}

# The wrong arguments, and what the message must say of them.
HEAD_COUNTS = [
    ({"num_heads": 0}, ["num_heads", "1", "0"]),
    ({"num_heads": -4}, ["num_heads", "1", "-4"]),
    ({"num_kv_heads": 0}, ["num_kv_heads", "1", "0"]),
    ({"num_kv_heads": -1}, ["num_kv_heads", "1", "-1"]),
    ({"head_dim": 0}, ["head_dim", "1", "0"]),
    ({"head_dim": -8}, ["head_dim", "1", "-8"]),
    ({"num_heads": 3}, ["num_heads", "multiple", "3"]),
    ({"num_heads": 2, "num_kv_heads": 4}, ["num_heads", "multiple", "4"]),
]
WEIGHTS = [
    ({"weight": zeros(12, 64)}, ["weight", "(64, 12)", "(12, 64)"]),
    ({"weight": zeros(63, 12)}, ["weight", "(64, 12)", "(63, 12)"]),
    ({"weight": zeros(32, 12)}, ["weight", "(64, 12)", "(32, 12)"]),
    ({"weight": zeros(64, 11)}, ["weight", "(64, 12)", "(64, 11)"]),
    ({"weight": zeros(64)}, ["weight", "(64,)"]),
    ({"weight": zeros(1, 64, 12)}, ["weight", "(1, 64, 12)"]),
    ({"weight": zeros(0, 12)}, ["weight", "(64, 12)", "(0, 12)"]),
    ({"input": zeros(2, 3, 11)}, ["weight", "(64, 11)", "(64, 12)"]),
    ({"input": zeros(4, 12)}, ["input", "3", "2", "(4, 12)"]),
    ({"input": zeros(1, 2, 3, 12)}, ["input", "3", "4", "(1, 2, 3, 12)"]),
    ({"input": zeros()}, ["input", "3", "0", "()"]),
]
SEPARATE_WEIGHTS = [
    ({"weight": SEPARATE["weight"][:2]}, ["weight", "3", "2"]),
    ({"weight": SEPARATE["weight"] * 2}, ["weight", "3", "6"]),
    ({"weight": ()}, ["weight", "3", "0"]),
    ({"weight": tensors((31, 12), (16, 12), (16, 12))}, ["weight", "(32, 12)", "(31, 12)"]),
    ({"weight": tensors((32, 12), (32, 12), (16, 12))}, ["weight", "(16, 12)", "(32, 12)"]),
    ({"weight": tensors((32, 12), (16, 12), (16, 13))}, ["weight", "(16, 12)", "(16, 13)"]),
    ({"weight": tensors((32, 12), (16, 12), (16,))}, ["weight", "(16,)"]),
]
WITHOUT_BIAS = [({"bias": None} | changes, words) for changes, words in SEPARATE_WEIGHTS]
BIASES = [
    ({"bias": zeros(63)}, ["bias", "(64,)", "(63,)"]),
    ({"bias": zeros(1)}, ["bias", "(64,)", "(1,)"]),
    ({"bias": zeros(64, 1)}, ["bias", "(64, 1)"]),
    ({"bias": zeros()}, ["bias", "()"]),
    ({"bias": SEPARATE["bias"]}, ["bias"]),
    ({"weight": SEPARATE["weight"]}, ["bias"]),
    (SEPARATE | {"bias": SEPARATE["bias"][:2]}, ["bias", "three", "2"]),
    (SEPARATE | {"bias": tensors((32,), (16,), (15,))}, ["bias", "(16,)", "(15,)"]),
    (SEPARATE | {"bias": tensors((16,), (16,), (32,))}, ["bias", "(32,)", "(16,)"]),
]
COTANGENTS = [
    ({"dq": zeros(2, 3, 4, 8)}, ["dq", "(2, 4, 3, 8)", "(2, 3, 4, 8)"]),
    ({"dq": zeros(2, 3, 32)}, ["dq", "(2, 3, 32)"]),
    ({"dk": zeros(2, 4, 3, 8)}, ["dk", "(2, 2, 3, 8)", "(2, 4, 3, 8)"]),
    ({"dv": zeros(1, 2, 3, 8)}, ["dv", "(2, 2, 3, 8)", "(1, 2, 3, 8)"]),
    ({"dv": zeros(2, 2, 3, 1)}, ["dv", "(2, 2, 3, 8)", "(2, 2, 3, 1)"]),
]
OUTPUT_SHAPES = [
    ({"weight": zeros(12)}, ["weight", "(12,)"]),
    ({"weight": zeros(12, 31)}, ["weight", "32", "(12, 31)"]),
]
OUTPUT_FORWARD_SHAPES = [
    ({"bias": zeros(1)}, ["bias", "(12,)", "(1,)"]),
    ({"bias": zeros(1, 12)}, ["bias", "(1, 12)"]),
    ({"residual": zeros(2, 3, 1)}, ["residual", "(2, 3, 12)", "(2, 3, 1)"]),
    ({"residual": zeros(1, 3, 12)}, ["residual", "(2, 3, 12)", "(1, 3, 12)"]),
    ({"residual": zeros(3, 12)}, ["residual", "(3, 12)"]),
    ({"residual": zeros(12)}, ["residual", "(12,)"]),
    ({"x": zeros()}, ["x", "[..., K]", "()"]),
    ({"x": zeros(3, 32)}, ["residual", "(3, 12)", "(2, 3, 12)"]),
    ({"x": zeros(3, 32), "residual": zeros(1, 12)}, ["residual", "(3, 12)", "(1, 12)"]),
    ({"x": zeros(1, 2, 3, 32)}, ["residual", "(1, 2, 3, 12)", "(2, 3, 12)"]),
    ({"x": zeros(1, 2, 3, 32), "residual": zeros(2, 1, 3, 12)}, ["(1, 2, 3, 12)", "(2, 1, 3, 12)"]),
    ({"x": zeros(32), "residual": zeros()}, ["residual", "(12,)", "()"]),
    ({"x": zeros(32), "residual": zeros(11)}, ["residual", "(12,)", "(11,)"]),
]
OUTPUT_BACKWARD_SHAPES = [
    ({"x": zeros(3, 32)}, ["x", "3", "2", "(3, 32)"]),
    ({"x": zeros(1, 2, 3, 32)}, ["x", "3", "4", "(1, 2, 3, 32)"]),
    ({"d_output": zeros(2, 3, 11)}, ["d_output", "(2, 3, 12)", "(2, 3, 11)"]),
    ({"d_output": zeros(1, 3, 12)}, ["d_output", "(2, 3, 12)", "(1, 3, 12)"]),
    ({"d_output": zeros(3, 12)}, ["d_output", "(3, 12)"]),
]
LINEAR_SHAPES = [
    ({"x": zeros()}, ["x", "[..., K]", "()"]),
    ({"x": zeros(2, 3, 31)}, ["weight", "(12, 31)", "(12, 32)"]),
    ({"x": zeros(31)}, ["weight", "(12, 31)", "(12, 32)"]),
    ({"weight": zeros(12)}, ["weight", "(12,)"]),
    ({"bias": zeros(1)}, ["bias", "(12,)", "(1,)"]),
    ({"activation": "tanh"}, ["activation", "'silu'", "'relu2'", "'tanh'"]),
    ({"activation": ""}, ["activation", "''"]),
    ({"activation": "clipped_swiglu"}, ["activation", "'clipped_swiglu'"]),
]
PACKED = {"weight": zeros(24, 32), "bias": zeros(24)}
GATED_SHAPES = [
    ({"x": zeros()}, ["x", "[..., K]", "()"]),
    ({"weight": tensors((12, 32), (11, 32))}, ["weight[1]", "(12, 32)", "(11, 32)"]),
    ({"weight": tensors((11, 32), (12, 32)), "bias": None}, ["weight[1]", "(11, 32)", "(12, 32)"]),
    ({"weight": tensors((12, 32), (12, 31))}, ["weight[1]", "(12, 32)", "(12, 31)"]),
    ({"weight": tensors((0, 32), (0, 32))}, ["rows", "weight[0]", "1", "0"]),
    ({"weight": tensors((12, 32))}, ["weight", "2", "1"]),
    ({"bias": zeros(12)}, ["bias", "two", "gate, up"]),
    ({"bias": tensors((12,), (11,))}, ["bias[1]", "(12,)", "(11,)"]),
    (PACKED | {"weight": zeros(23, 32)}, ["weight", "even", "23"]),
    (PACKED | {"weight": zeros(0, 32)}, ["rows", "1", "0"]),
    (PACKED | {"weight": zeros(24)}, ["weight", "(24, 32)", "(24,)"]),
    (PACKED | {"bias": zeros(12)}, ["bias", "(24,)", "(12,)"]),
    (PACKED | {"packing": "up"}, ["packing", "'gate_up'", "'up_gate'", "'interleaved'", "'up'"]),
    (PACKED | {"packing": ["gate_up"]}, ["packing", "['gate_up']"]),
    ({"packing": "up_gate"}, ["packing", "tuple", "'up_gate'"]),
    ({"activation": None}, ["activation", "'clipped_swiglu'", "None"]),
    ({"activation": "clipped_swiglu", "limit": -1.0}, ["limit", "0", "-1.0"]),
    ({"activation": "clipped_swiglu", "limit": float("nan")}, ["limit", "0", "nan"]),
]
CASES = [
    ("fused_qkv_projection", HEAD_COUNTS + WEIGHTS + WITHOUT_BIAS + BIASES),
    ("fused_qkv_projection_bwd", HEAD_COUNTS + WEIGHTS + SEPARATE_WEIGHTS + COTANGENTS),
    ("fused_output_projection_residual", OUTPUT_SHAPES + OUTPUT_FORWARD_SHAPES),
    ("fused_output_projection_residual_bwd", OUTPUT_SHAPES + OUTPUT_BACKWARD_SHAPES),
    ("fused_linear", LINEAR_SHAPES),
    ("fused_gated_projection", GATED_SHAPES),
]


ANY_RANK = ("fused_linear", "fused_gated_projection", "fused_output_projection_residual")


def call(operation, **changes):
    return getattr(mlx_fused, operation)(**(OPERATIONS[operation] | changes))


def describe(value):
    if isinstance(value, tuple):
        return "/".join(map(describe, value))
    return "x".join(map(str, value.shape)) or "scalar" if isinstance(value, mx.array) else str(value)


def message(operation, words):
    """The operation in brackets, then each of the words, whole and in any order."""
    lookaheads = (rf"(?=.*(?<![\w-]){re.escape(word)}(?!\w))" for word in words)
    return rf"(?s)^\[{operation}\]" + "".join(lookaheads)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_arguments_that_the_cases_change_are_right(operation):
    mx.eval(call(operation))


def test_separate_arguments_that_the_cases_change_are_right():
    mx.eval(call("fused_qkv_projection", **SEPARATE))
    mx.eval(call("fused_qkv_projection", weight=SEPARATE["weight"], bias=None))
    mx.eval(call("fused_qkv_projection_bwd", weight=SEPARATE["weight"]))


@pytest.mark.parametrize(
    "operation,changes,words",
    [(operation, *case) for operation, cases in CASES for case in cases],
    ids=lambda value: (
        ",".join(f"{k}={describe(v)}" for k, v in value.items()) if isinstance(value, dict) else None
    ),
)
def test_wrong_shapes_and_counts(operation, changes, words):
    with pytest.raises(ValueError, match=message(operation, words)):
        call(operation, **changes)


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint8, mx.int64, mx.bool_, mx.complex64], ids=str)
@pytest.mark.parametrize(
    "operation,argument",
    [(op, arg) for op, args in OPERATIONS.items() for arg, v in args.items() if isinstance(v, mx.array)],
)
def test_dtypes_that_are_not_floating(operation, argument, dtype):
    wrong = OPERATIONS[operation][argument].astype(dtype)
    name = str(dtype).removeprefix("mlx.core.")
    with pytest.raises(ValueError, match=message(operation, [argument, "float32", name])):
        call(operation, **{argument: wrong})


@pytest.mark.parametrize("argument", ["weight", "bias"])
@pytest.mark.parametrize("segment", range(3))
def test_dtypes_that_are_not_floating_in_a_tuple(argument, segment):
    wrong = [a.astype(mx.int32) if i == segment else a for i, a in enumerate(SEPARATE[argument])]
    with pytest.raises(ValueError, match=message("fused_qkv_projection", [argument, "int32"])):
        call("fused_qkv_projection", **SEPARATE | {argument: tuple(wrong)})


def test_the_exact_messages():
    with pytest.raises(ValueError) as error:
        call("fused_qkv_projection", weight=zeros(12, 64))
    assert str(error.value) == ("[fused_qkv_projection] weight must have shape (64, 12) but got (12, 64).")
    with pytest.raises(ValueError) as error:
        call("fused_qkv_projection", input=zeros(4, 12))
    assert str(error.value) == (
        "[fused_qkv_projection] input must have 3 dimensions but got 2 with shape (4, 12)."
    )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_errors_are_raised_by_the_call_and_inside_transforms(operation):
    argument = "input" if "qkv" in operation else "x"
    a, any_rank = OPERATIONS[operation][argument], operation in ANY_RANK

    def wrong(a):
        return call(operation, **{argument: a[..., :-1] if any_rank else a[0]})

    words = ["weight", "(12, 31)"] if any_rank else [argument, "3", "2"]
    for transform in (lambda f: f, mx.compile, mx.checkpoint):
        with pytest.raises(ValueError, match=message(operation, words)):
            transform(wrong)(a)


WRONG_KINDS = [
    ({"input": None}, "input must be array but got NoneType"),
    ({"input": np.ones((2, 3, 12))}, "input must be array but got ndarray"),
    ({"weight": "text"}, "weight must be an array, LinearOperands or a tuple but got str"),
    ({"weight": (zeros(32, 12), None, zeros(16, 12)), "bias": None}, "but got NoneType"),
    ({"bias": 5}, "bias must be array but got int"),
    ({"exact": 1}, "exact must be bool but got int"),
    ({"route": 1}, "route must be str but got int"),
    ({"stream": "cpu"}, "stream must be Stream or Device or DeviceType but got str"),
    ({"num_heads": 4.0}, "num_heads must be int but got float."),
    ({"head_dim": "8"}, "head_dim must be int but got str."),
]


@pytest.mark.parametrize("changes,said", WRONG_KINDS, ids=[said for _, said in WRONG_KINDS])
def test_arguments_of_the_wrong_kind(changes, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        call("fused_qkv_projection", **changes)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("wrong", [None, "text", [[[1.0]]], np.ones((2, 3, 12))], ids=type)
def test_operands_that_are_no_arrays(operation, wrong):
    for argument, value in OPERATIONS[operation].items():
        if isinstance(value, mx.array) and not (argument == "bias" and wrong is None):
            with pytest.raises((TypeError, ValueError), match=rf"^\[{operation}\] (?=.*{argument})"):
                call(operation, **{argument: wrong})


def test_wrong_residuals_and_factors():
    for changes, said in (({"alpha": None}, "alpha must be float or int"), ({"residual": 1.0}, "residual")):
        with pytest.raises(TypeError, match=said):
            call("fused_output_projection_residual", **changes)
    with pytest.raises(TypeError, match="weight must be an array"):
        call("fused_output_projection_residual", weight=(zeros(12, 32),), bias=None)


@pytest.mark.parametrize("operation", ["fused_qkv_projection", "fused_qkv_projection_bwd"])
def test_heads_of_numpys_small_integers_do_not_overflow(operation):
    small = {
        name: np.uint8(OPERATIONS[operation][name]) for name in ("num_heads", "num_kv_heads", "head_dim")
    }
    mx.eval(call(operation, **small))
    wide = {name: np.uint8(64) for name in small}
    with pytest.raises(ValueError, match=message(operation, ["weight", "(12288, 12)", "(64, 12)"])):
        call(operation, **wide)
    huge = {name: np.int32(65536) for name in small}
    with pytest.raises(ValueError, match=message(operation, ["features", "2^31", "65536"])):
        call(operation, **huge)


def test_wrong_factors_of_a_clipped_gate():
    for name in ("alpha", "limit"):
        for wrong in (None, "7"):
            with pytest.raises(TypeError, match=rf"{name} must be float or int but got"):
                call("fused_gated_projection", activation="clipped_swiglu", **{name: wrong})


@pytest.mark.parametrize("operation", ["fused_linear", "fused_output_projection_residual"])
@pytest.mark.parametrize("wrong", [(zeros(12, 32),), None], ids=type)
def test_one_layer_is_asked_for_where_several_would_not_do(operation, wrong):
    got = type(wrong).__name__
    with pytest.raises(TypeError, match=rf"weight must be an array or LinearOperands but got {got}\."):
        call(operation, weight=wrong, bias=None)


def test_numbers_may_not_be_arrays_which_would_have_no_gradient():
    number, layer = mx.array(2.0), mlx_fused.LinearOperands(zeros(12, 32))
    adapted = layer._replace(lora_a=zeros(32, 1), lora_b=zeros(1, 12), lora_scale=number)
    clipped = {"activation": "clipped_swiglu"}
    for operation, changes, name in (
        ("fused_gated_projection", clipped | {"alpha": number}, "alpha"),
        ("fused_gated_projection", clipped | {"limit": number}, "limit"),
        ("fused_output_projection_residual", {"alpha": number}, "alpha"),
        ("fused_linear", {"norm": (zeros(32), number)}, r"norm\[1\]"),
        ("fused_linear", {"weight": adapted, "bias": None}, "lora_scale"),
    ):
        with pytest.raises(TypeError, match=rf"^\[{operation}\] {name} must be float or int but got array"):
            call(operation, **changes)


def test_layers_of_a_gate_that_differ():
    gate, up = (mlx_fused.LinearOperands(w) for w in GATED["weight"])
    codes, scales, biases = mx.quantize(up.weight, 32)
    for other in (up._replace(bias=zeros(12)), mlx_fused.LinearOperands(codes, None, scales, biases, 32)):
        with pytest.raises(ValueError, match=r"\[fused_gated_projection\] the layers .* must be alike"):
            call("fused_gated_projection", weight=(gate, other), bias=None)


def test_empty_batches_are_checked_as_well():
    with pytest.raises(ValueError, match=message("fused_qkv_projection", ["weight"])):
        call("fused_qkv_projection", input=zeros(0, 3, 12), weight=zeros(64, 13))
    with pytest.raises(ValueError, match=message("fused_output_projection_residual", ["residual"])):
        call("fused_output_projection_residual", x=zeros(0, 3, 32))


@pytest.mark.parametrize("form", [None, ("mxfp4", 32, 4)], ids=str)
@pytest.mark.parametrize("ranks", [None, (1, None, 1)], ids=["plain", "lora"])
def test_biases_may_be_left_out_and_others_not(rng, form, ranks):
    qkv = projections.qkv(rng, 1, 2, 32, (2, 1, 4), form, bias=False, ranks=ranks)
    output = projections.output(rng, 1, 2, 32, 4, form, bias=False, rank=ranks and 1)
    for call, needed, error in ((qkv, "head_dim", ValueError), (output, "residual", TypeError)):
        given = {name: value for name, value in call.arguments.items() if value is not None}
        for route in (None, "composed"):
            oracle.assert_equal(projections.Call(call.operation, given)(route=route), call(route=route))
            with pytest.raises(error, match=needed):
                getattr(mlx_fused, call.operation)(**call.spelled | {needed: None, "route": route})
