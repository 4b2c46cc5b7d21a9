"""What the operations cost, by their launch plans on the simulator; docs/design/ledger.md says so."""

import json
from math import ceil

import mlx.core as mx
import numpy as np
import pytest

import ledger
import metal_plan
import projections
from mlx_kernels import Kernels
from mlx_on_simulator import library, mlx_launch

SIMULATED = [pytest.param(case, id="-".join(map(str, case))) for case in ledger.SIMULATED]
DECODING = [p for p in SIMULATED if p.values[0].rows <= 8]


PLAIN = [p for p in SIMULATED if p.values[0].operation not in ledger.ADAPTED]
# The low-rank product before the projection; two of them, dx, and the gradients of A and of B.
LAUNCHES = {"lora_qkv": 2, "lora_output": 2, "lora_qkv_grad": 5, "lora_output_grad": 5}
LAUNCHES |= {"quantized_lora_qkv": 2, "quantized_lora_output": 2, "quantized_lora_qkv_grad": 5}
# At most, of the composed form; mlx-lm's has up to 25, 10, 44 and 14.
COMPOSED = {"lora_qkv": 18, "lora_output": 8, "lora_qkv_grad": 24, "lora_output_grad": 12}


@pytest.mark.parametrize("case", SIMULATED)
def test_each_launch_writes_once_and_reads_as_its_tiles_imply(case):
    call = ledger.run_plan(case)
    assert len(call.plan) == LAUNCHES.get(case.operation, 1)
    call.assert_written_once()
    for launch, result in zip(call.plan, call.results, strict=True):
        times = ledger.reads(launch, case)
        for name, t in result.traffic.items():
            size = call.buffers[name].nbytes if name in times else 0
            assert t.distinct_read == size, name
            assert t.total_read == size * times.get(name, 0), name


@pytest.mark.parametrize("case", DECODING)
def test_decoding_reads_every_weight_once_for_four_rows(case):
    call = ledger.run_plan(case)
    for name in ledger.bound(call.plan[-1])["weight"]:
        traffic, size = call.results[-1].traffic[name], call.buffers[name].nbytes
        assert traffic.distinct_read == size and traffic.total_read == ceil(case.rows / 4) * size


@pytest.mark.parametrize("case", PLAIN)
def test_grid_has_no_more_tiles_than_the_shapes_need(case):
    num_heads, num_kv_heads, head_dim = case.heads
    features = [n * head_dim for n in (num_heads, num_kv_heads, num_kv_heads)]
    call = ledger.run_plan(case, library_of=ledger.NotRun())
    rows, side = (ceil(case.rows / 4), 8) if case.rows <= 8 else (ceil(case.rows / 64), 64)
    columns = {
        "qkv": sum(ceil(n / side) for n in features),
        "output": ceil(case.hidden / side),
        "dx": ceil(case.hidden / 64),
        "dw": ceil(case.hidden / 64),
    }[case.operation]
    if case.operation == "dw":
        rows = (num_heads + 2 * num_kv_heads) * ceil(head_dim / 64)
    assert call.plan[0]["grid"] == (columns, rows, 1)


@pytest.mark.parametrize("case", SIMULATED)
def test_formula(case):
    assert ledger.planned(case) == ledger.simulated(case)


def names_and_costs(case):
    kernels = [Kernels(ledger.graph(case, form)) for form in ledger.FORMS]
    return [(k.names, k.cost()) for k in kernels]


@pytest.mark.parametrize("case", [p for p in PLAIN if p.values[0].operation == "qkv"])
def test_composed_projection_costs_what_models_pay(case):
    if case.packed:  # one product there, and one for each of the weight's parts here
        case = case._replace(packed=False)
    composed, model = names_and_costs(case)
    assert composed == model


@pytest.mark.parametrize("case", [c for c in ledger.SIMULATED + ledger.PLANNED if "lora" in c.operation])
def test_composed_adapters_launch_less_than_models(case):
    (_, composed), (_, model) = names_and_costs(case)
    assert composed.launches < model.launches
    assert composed.launches <= COMPOSED.get(case.operation, model.launches)


def test_golden_and_document_are_up_to_date():
    rows = ledger.count()
    assert ledger.to_json(rows) == ledger.GOLDEN.read_text(), "python tests/ledger.py writes it anew"
    document = ledger.DOCUMENT.read_text()
    assert ledger.with_tables(document, json.loads(ledger.GOLDEN.read_text())) == document


def stages_of(function, *arrays):
    nodes = []
    mx.export_function(nodes.append, function, *arrays)
    kernels = Kernels(nodes)
    return len(kernels.names), kernels.cost().stages


def test_stages_are_the_longest_chain():
    x, w = mx.zeros((1, 64)), mx.zeros((64, 64))
    assert stages_of(lambda x, w: (x @ w, x @ w.T, w @ x.T), x, w) == (3, 1)
    assert stages_of(lambda x, w: (x @ w) + (x @ w.T), x, w) == (3, 2)
    assert stages_of(lambda x, w: x @ w @ w @ w + x, x, w) == (4, 4)
    # Views hand on what they are of, and parts of a whole are written side by side.
    assert stages_of(lambda x, w: (x @ w).reshape(8, 8).T + 1, x, w) == (2, 2)
    assert stages_of(lambda x, w: mx.concatenate([x, x @ w]) @ w, x, w) == (4, 3)


# A launch that needs no other's result is no stage: in order, for the gradients of LoRA, dy B^T before dX and
# dA, x A before dB.
STAGES = {"lora_qkv": 2, "lora_output": 2, "lora_qkv_grad": 2, "lora_output_grad": 2}
STAGES |= {f"quantized_{operation}": stages for operation, stages in STAGES.items()}


@pytest.mark.parametrize("case", SIMULATED)
def test_stages_of_ours(case):
    call = ledger.run_plan(case, library_of=ledger.NotRun())
    assert ledger.stages(call, case) == STAGES.get(case.operation, 1)


def test_an_operation_without_a_rule_is_an_error():
    nodes = []
    mx.export_function(nodes.append, mx.sin, mx.zeros(3))
    with pytest.raises(NotImplementedError, match="Sin"):
        Kernels(nodes)


@pytest.fixture(scope="module")
def mlx_kernels():
    return library()


@pytest.mark.parametrize(
    ("m", "n", "k", "kernels"),
    [
        (1, 512, 256, ["gemv"]),
        (8, 128, 256, ["gemv_wide"]),
        (128, 512, 256, ["gemm"]),
        (33, 64, 128, ["split-K", "split-K sum"]),
    ],
)
def test_rules_are_what_mlx_kernels_read(mlx_kernels, m, n, k, kernels):
    """MLX's own kernels on the simulator read, launch by launch, what `Kernels` says."""
    x, w, c, out = (np.zeros(shape, np.uint16) for shape in ((m, k), (n, k), n, (m, n)))
    rules = Kernels([])
    rules.matmul(x, w.T, np.broadcast_to(c, (m, n)), out=out)
    assert rules.names == kernels
    buffers = {"x": x, "w": w, "c": c, "out": out, "partial": np.zeros((2, m, n), np.float32)}
    traffic = mlx_kernels.run([mlx_launch(kernel, m, n, k) for kernel in kernels], buffers).traffic
    assert sum(t.total_read for t in traffic.values()) == rules.cost().total_read
    assert sum(t.distinct_read for t in traffic.values()) == rules.cost().distinct_read
    assert sum(t.total_written for t in traffic.values()) == rules.cost().total_written
    names = {buffer.shape: name for name, buffer in buffers.items()}
    for array, times in rules.read:
        assert (
            traffic[names[(array if array.base is None else array.base).shape]].total_read
            == times * array.nbytes
        )


# A layer of Llama-3.2-1B's sizes, 4 bits; what is not ours: rope, the cache and attention.


def test_a_decode_token():
    """The norm is in the launch that reads what it norms."""
    rng, shape = np.random.default_rng(0), (1, 1, 2048)
    form = {"form": ledger.FORM, "dtype": ledger.DTYPE, "bias": False, "draw": ledger.zeros}
    norm = {"norm": (mx.ones(2048, ledger.DTYPE), 1e-5)}
    layer = [
        projections.qkv(rng, *shape, ledger.LLAMA_1B, **form).replace(**norm),
        projections.output(rng, *shape, 2048, **form),
        projections.gated(rng, *shape, 8192, **form).replace(**norm),
        projections.output(rng, 1, 1, 8192, 2048, **form),
    ]
    assert [len(metal_plan.forward(op, library_of=ledger.NotRun())[0].plan) for op in layer] == [1] * 4
    # One after the other; beside them rope of queries and of keys, their and the values' caches, attention.
    launches, stages = len(layer) + 2 + 2 + 1, len(layer) + 3
    assert (launches, stages) == (9, 7)


def test_a_qlora_step():
    """Of 512 rows: forward and backward, and activations by themselves: again, and the gradient."""
    rng, shape = np.random.default_rng(0), (1, 512, 2048)
    options = {"form": ledger.FORM, "dtype": ledger.DTYPE, "bias": False, "draw": ledger.zeros}
    layer = [
        (projections.qkv(rng, *shape, ledger.LLAMA_1B, ranks=(8,) * 3, **options), 3),
        (projections.output(rng, *shape, 2048, rank=8, **options), 1),
        (projections.gated(rng, *shape, 8192, ranks=(8, 8), **options), 2),
        (projections.output(rng, 1, 512, 8192, 2048, rank=8, **options), 1),
    ]
    launches = 2
    for op, segments in layer:
        keys = [key for key in op.leaves if key[0] in ("input", "x", "lora_a", "lora_b")]
        given = projections.cotangents(rng, op, ledger.zeros)
        given = given if len(given) == segments else given * segments  # of gate and of up
        forward, _ = metal_plan.forward(op, library_of=ledger.NotRun(), keeps=op.gated)
        backward, _ = metal_plan.backward(op, given, keys, library_of=ledger.NotRun())
        launches += len(forward.plan) + len(backward.plan)
    assert launches == 30
