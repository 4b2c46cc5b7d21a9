"""The Metal backend's own host code: eval_gpu, with a recorder in place of MLX's encoder, on the simulator.

Elsewhere the tests build the plans' arguments; here the primitives do, from the arrays they are given.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
from importlib.machinery import ExtensionFileLoader
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused._ext
import operands
import oracle
import projections
import quantized
from metal_plan import InTiles, libraries
from mlx_fused import operations
from test_layouts import broadcast, sliced, strided

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "metal_host"
HEADS = [(4, 2, 20), (2, 1, 16, 7)]
FORMS = {"dense": None, "affine": ("affine", 32, 4), "nvfp4": ("nvfp4", 16, 4)}
dtypes = pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
adapters = pytest.mark.parametrize("ranks", [None, (4, None, 3)], ids=["plain", "lora"])
packings = pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])


def build():
    source, python = ROOT / "tests" / "metal_host", f"-DPython_EXECUTABLE={sys.executable}"
    configure = ["cmake", "-S", source, "-B", BUILD, python]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command in (configure, ["cmake", "--build", BUILD, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
        assert done.returncode == 0, done.stdout + done.stderr
    (file,) = BUILD.glob("metal_host.*.so")
    return file


@pytest.fixture(scope="session")
def built(once):
    file = once(build)
    extension = load("_ext", file)
    extension.Operation = mlx_fused._ext.Operation  # nanobind makes one class of a type, whoever asks again
    return load("metal_host", file), extension


def load(name, file):
    loader = ExtensionFileLoader(name, str(file))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def gpu(built, monkeypatch):
    """Lets the operations make nodes of that build, and returns what evaluates one."""
    host, extension = built
    monkeypatch.setattr(operations.call, "_ext", extension)
    return lambda array: host.eval_gpu(array, simulate)


@pytest.fixture
def metal(built, monkeypatch):
    """Lets routing know that it is one, and that its kernels are wanted."""
    monkeypatch.setenv("MLX_FUSED_ROUTE", "fused")
    built[0].set_on_metal(True)
    yield
    built[0].set_on_metal(False)


def simulate(described):
    """Runs a launch on the memory that the arrays have; what it is to write holds NaN before."""
    launch, memory = described
    written = {address for address, *_, is_output in memory if is_output}
    buffers = {}
    for address, size, item, _ in memory:
        type_ = ctypes.c_uint8 if item == 1 else ctypes.c_uint16
        array = np.ctypeslib.as_array((type_ * (size // ctypes.sizeof(type_))).from_address(address))
        if address in written:
            array[:] = 0xFFFF
        array.flags.writeable = address in written
        buffers[str(address)] = array
    libraries()[launch["kernel"]].run([launch], buffers)


def check(gpu, rng, call, keys=None, view=lambda a: a):
    """Forward, and the gradients of ``keys``, each by one eval_gpu."""
    call = call.with_leaves({key: view(a) for key, a in call.leaves.items()})
    adapted = "lora_a" in call.arguments
    outputs = call()
    assert gpu(outputs[0]) == (2 if adapted else 1)
    rows = call.x.shape[0] * call.x.shape[1]
    oracle.assert_close(outputs, call.formula, *as_held(call, rows > 8), terms=call.forward_terms)

    keys = gradient_keys(call) if keys is None else keys
    given = tuple(map(view, projections.cotangents(rng, call)))
    grads = projections.gradients(call, keys, given)
    names = {name for name, _ in keys}
    made = [g for g, (name, _) in zip(grads, keys, strict=True) if name != "residual"]
    launches = gpu(made[0])
    # The input's gradient may be split.
    assert launches <= (5 if adapted else 1) + ("weight" in names) + bool(names & {"input", "x"})
    oracle.assert_close(grads, call.gradient_formula(keys), given, *as_held(call), terms=call.gradient_terms)


def gradient_keys(call):
    """What a gradient of ours may be asked for on a GPU: of a bias only together with its weight's."""
    return [key for key in call.trainable if key[0] != "bias" or not call.quantization]


def as_held(call, in_tiles=True):
    """The operands as the kernels have them: tiles round quantized weights to their dtype."""
    in_tiles = in_tiles and call.quantization and call.x.dtype != mx.float32
    return quantized.in_tiles(call.exact_operands, call.x.dtype) if in_tiles else call.exact_operands


def broadcast_rows(a):
    return broadcast(a) if a.ndim > 1 else a


@dtypes
@forms
@adapters
@packings
def test_qkv(gpu, rng, packed, ranks, form, dtype):
    for heads, seq, bias in product(HEADS, (2, 17), (False, True)):
        check(gpu, rng, projections.qkv(rng, 2, seq, 64, heads, form, dtype, bias, packed, ranks))


@dtypes
@forms
@pytest.mark.parametrize("rank", [None, 4], ids=["plain", "lora"])
def test_output(gpu, rng, rank, form, dtype):
    for seq, bias, alpha in product((2, 17), (False, True), (1.0, 0.5)):
        check(gpu, rng, projections.output(rng, 2, seq, 64, 40, form, dtype, bias, rank, alpha=alpha))


@forms
@adapters
@packings
def test_every_subset_of_gradients(gpu, rng, packed, ranks, form):
    call = projections.qkv(rng, 2, 5, 64, HEADS[1], form, packed=packed, ranks=ranks)
    keys = gradient_keys(call)
    names = (("input",), ("weight",), ("lora_a",), ("lora_b",))
    groups = [[key for key in keys if key[0] in some] for some in names]
    groups += [groups[0] + groups[2], groups[0] + groups[1], keys[:2], keys[-1:], keys]
    for some in groups:
        if some and any(name != "bias" for name, _ in some):
            check(gpu, rng, call, [k for k in some if k[0] != "bias" or ("weight", k[1]) in some])


@forms
@adapters
@packings
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)  # of 16 bits, at odd offsets
@pytest.mark.parametrize("view", [sliced, broadcast_rows], ids=lambda f: f.__name__)
def test_views_are_read_in_place(gpu, rng, view, dtype, packed, ranks, form):
    call = projections.qkv(rng, 3, 5, 64, HEADS[0], form, dtype, packed=packed, ranks=ranks)
    check(gpu, rng, call, view=view)
    call = projections.output(rng, 3, 5, 64, 40, form, dtype, rank=ranks and 4)
    check(gpu, rng, call, view=view)


def test_what_cannot_be_read_in_place_is_copied(gpu, rng):
    for name in ("input", "weight", "bias"):
        call = projections.qkv(rng, 2, 5, 64, HEADS[0], packed=True)
        call = call.replace(**{name: strided(call.arguments[name])})
        # By MLX's own kernel, of which there is none here.
        with pytest.raises(RuntimeError, match="Contiguous"):
            gpu(call()[0])


def columns_first(a):
    return mx.contiguous(a.T).T if a.ndim == 2 else a


@packings
def test_weights_column_by_column_are_read_in_place(gpu, rng, packed):
    check(gpu, rng, projections.qkv(rng, 2, 5, 64, HEADS[0], packed=packed), view=columns_first)


@pytest.mark.parametrize("place", range(3))
def test_unless_only_some_are(gpu, rng, place):
    call = projections.qkv(rng, 2, 5, 64, HEADS[0])
    weights = list(call.arguments["weight"])
    weights[place] = columns_first(weights[place])
    with pytest.raises(RuntimeError, match="Contiguous"):
        gpu(call.replace(weight=tuple(weights))()[0])


@dtypes
@forms
def test_tiles_split_their_depth(gpu, rng, form, dtype):
    call = projections.output(rng, 1, 20, 320, 256, form, dtype)
    outputs = call()
    assert gpu(outputs[0]) == 2
    oracle.assert_close(outputs, call.formula, *as_held(call), terms=call.forward_terms)
    call = projections.qkv(rng, 1, 20, 64, HEADS[0], form, dtype)
    given, keys = projections.cotangents(rng, call), [("input", None)]
    grads = projections.gradients(call, keys, given)
    assert gpu(grads[0]) == 2
    oracle.assert_close(grads, call.gradient_formula(keys), given, *as_held(call), terms=call.gradient_terms)


@forms
@adapters
def test_outputs_token_by_token(gpu, rng, ranks, form):
    call = projections.qkv(rng, 2, 5, 64, HEADS[1], form, ranks=ranks, draw=operands.integers)
    by_head, by_token = call(), call(split_heads=False)
    gpu(by_head[0]), gpu(by_token[0])
    oracle.assert_equal(by_token, [y.transpose(0, 2, 1, 3).flatten(2) for y in by_head])
    given = projections.cotangents(rng, call, operands.integers)
    as_tokens = [g.transpose(0, 2, 1, 3).flatten(2) for g in given]
    results = [
        projections.gradients(call, gradient_keys(call), cotangents, split_heads=split)
        for split, cotangents in ((True, given), (False, as_tokens))
    ]
    for grads in results:
        gpu(grads[0])
    oracle.assert_equal(*results)


@dtypes
@forms
@pytest.mark.parametrize("ranks", [None, (4, None)], ids=["plain", "lora"])
def test_activations(gpu, rng, ranks, form, dtype):
    """Forward, and then the gradients, for which what the activation is of is kept."""
    for seq, packing in product((2, 17), (None, *projections.PACKINGS)):
        if packing == "interleaved" and ranks:
            continue  # B is copied
        bias = packing != "interleaved"  # which is copied too
        calls = [projections.gated(rng, 2, seq, 64, 40, form, dtype, bias, packing, ranks)]
        if packing is None:
            options = {"rank": ranks and 4, "activation": "gelu"}
            calls.append(projections.linear(rng, 2, seq, 64, 40, form, dtype, **options))
        for call in calls:
            held = as_held_call(call, 2 * seq > 8)
            outputs = call()
            assert gpu(outputs[0]) == 1 + bool(ranks)
            projections.check_outputs(held, outputs)

            keys = [key for key in gradient_keys(call) if key[0] in ("x", "lora_a", "lora_b")]
            given = projections.cotangents(rng, call)
            grads = projections.gradients(call, keys, given)
            for grad in grads:
                gpu(grad)
            projections.check_grads(held, given, keys, grads)


def as_held_call(call, in_tiles):
    in_tiles = in_tiles and call.quantization and call.x.dtype != mx.float32
    return InTiles(call.operation, call.arguments) if in_tiles else call


@forms
@pytest.mark.parametrize("weighted", [True, False])
def test_norm(gpu, metal, rng, weighted, form):
    """In the same launch; of rows whose root mean square is 1 the bits are known."""
    weight = operands.integers(rng, (64,)) if weighted else None
    draw = {"draw": operands.integers}
    for op in (
        projections.qkv(rng, 2, 3, 64, HEADS[0], form, packed=True, **draw),
        projections.linear(rng, 2, 3, 64, 40, form, **draw),
        projections.gated(rng, 2, 3, 64, 40, form, **draw),
    ):
        x = mx.array(rng.choice([-1.0, 1.0], op.x.shape)).astype(mx.float32)
        before = op.replace(**{op.input_name: x if weight is None else weight * x})()
        ours = op.replace(**{op.input_name: x}, norm=(weight, 0.0))()
        assert gpu(ours[0]) == gpu(before[0]) == 1
        oracle.assert_equal(ours, before)


@pytest.mark.parametrize("columns", [False, True])
def test_norm_before_what_cannot_norm(gpu, metal, rng, columns):
    """By MLX's own kernel, of which there is none here."""
    op = projections.linear(rng, 2, 3, 64, 40 if columns else 3)
    if columns:
        op = op.replace(weight=columns_first(op.arguments["weight"]))
    with pytest.raises(RuntimeError, match="has no GPU implementation"):
        gpu(op.replace(norm=(mx.ones(64), 1e-5))()[0])


def test_norm_of_many_rows(gpu, metal, rng):
    op = projections.linear(rng, 1, 20, 64, 40)
    (y,) = op.replace(norm=(mx.ones(64), 1e-5))()
    assert gpu(y) == 1  # beside MLX's
    before = op.replace(x=mx.fast.rms_norm(op.x, mx.ones(64), 1e-5))()
    gpu(before[0])
    oracle.assert_equal([y], before)


@pytest.mark.parametrize("name", ["linear", "gated"])
def test_gradients_of_norm(gpu, metal, rng, name):
    """Those of the norm and the projection."""
    op = getattr(projections, name)(rng, 1, 3, 64, 40)
    weight = operands.normal(rng, (64,))
    given = projections.cotangents(rng, op)

    def ours(x, weight):
        return op.replace(x=x, norm=(weight, 1e-5))()

    def before(x, weight):
        return op.replace(x=mx.fast.rms_norm(x, weight, 1e-5))()

    results = [mx.vjp(f, [op.x, weight], list(given))[1] for f in (ours, before)]
    for grads in results:
        for grad in grads:
            gpu(grad)
    for a, b in zip(*results, strict=True):
        assert mx.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch,seq,hidden", [(0, 3, 64), (2, 0, 64)])
@adapters
def test_empty_arrays(gpu, rng, ranks, batch, seq, hidden):
    call = projections.qkv(rng, batch, seq, hidden, HEADS[0], ranks=ranks)
    outputs = call()
    assert gpu(outputs[0]) == 0
    assert [y.size for y in outputs] == [0, 0, 0]
    keys = gradient_keys(call)
    grads = projections.gradients(call, keys, projections.cotangents(rng, call))
    gpu(grads[0])
    for key, grad in zip(keys, grads, strict=True):
        assert grad.shape == call.leaves[key].shape and not mx.any(grad)


def test_adapters_of_rank_0(gpu, rng):
    call = projections.qkv(rng, 2, 5, 64, HEADS[0], FORMS["affine"], ranks=(0, 0, 0))
    outputs = call()
    assert gpu(outputs[0]) == 1
    oracle.assert_close(outputs, call.formula, *call.exact_operands, terms=call.forward_terms)
    grads = projections.gradients(call, call.trainable[-2:], projections.cotangents(rng, call))
    assert gpu(grads[0]) == 0 and [g.size for g in grads] == [0, 0]
