"""What the operations cost, by their launch plans on the simulator; docs/design/ledger.md says so."""

import json
from math import ceil

import mlx.core as mx
import numpy as np
import pytest

import ledger
from mlx_kernels import Kernels
from mlx_on_simulator import library, mlx_launch

SIMULATED = [pytest.param(case, id="-".join(map(str, case))) for case in ledger.SIMULATED]
DECODING = [p for p in SIMULATED if p.values[0].rows <= 8]


PLAIN = [p for p in SIMULATED if p.values[0].operation not in ledger.ADAPTED]
# The low-rank product before the projection; two of them, dx, and the gradients of A and of B.
LAUNCHES = {"lora_qkv": 2, "lora_output": 2, "lora_qkv_grad": 5, "lora_output_grad": 5}


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


@pytest.mark.parametrize("case", [p for p in SIMULATED if "qkv" in p.values[0].operation])
def test_composed_projection_costs_what_models_pay(case):
    composed, model = (Kernels(ledger.graph(case, form)) for form in ledger.FORMS)
    assert (composed.names, composed.cost()) == (model.names, model.cost())


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
