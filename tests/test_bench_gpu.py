"""What ``make bench`` and ``make crossover`` do on a GPU, as far as the CPU can run it."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from graph import primitives

# (op, quantized, lora)
KINDS = [("qkv", False, False), ("output", False, False), ("qkv", True, False), ("output", True, False)]
KINDS += [(op, quantized, True) for op in ("qkv", "output", "gated") for quantized in (False, True)]
KINDS += [(op, quantized, False) for op in ("gated", "head") for quantized in (False, True)]
KINDS += [("norm", False, False)]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


@pytest.mark.parametrize("op,quantized,lora", KINDS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_contender_of_a_gpu_is_right_and_timed(op, quantized, lora, backward):
    import bench
    from cases import Case
    from machine import Ceilings

    case = Case(bench.TINY, op, "float32", 3, backward, quantized, lora)
    cell = bench.run(case, False, bench.QUICK, Ceilings(1e9, 1e9, 1e9), gpu=True)  # raises if one is wrong
    names = ["fused"] + ["routed"] * (op != "norm") + ["composed"]
    names += ["addmm"] * (op == "output" and not (quantized or lora))
    assert list(cell["contenders"]) == names
    assert all(c["median_s"] > 0 for c in cell["contenders"].values())


def test_the_contenders_take_the_routes_they_are_named_for(monkeypatch):
    import bench
    from cases import Case, operands
    from contenders import contenders

    monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")  # so that routed is not fused
    case = Case(bench.TINY, "output", "bfloat16", 3, False)
    found = contenders(case, operands(case), torch=False, rotated=2**15, gpu=True)
    graphs = {name: primitives(*c.function(c.x, *next(c.others))) for name, c in found.items()}
    assert graphs["fused"]["FusedOutputProjection"] == 1
    assert not any(graphs[name]["FusedOutputProjection"] for name in ("routed", "composed", "addmm"))
    assert graphs["composed"]["Matmul"] == 1 and graphs["addmm"]["AddMM"] == 1


def test_a_chain_waits_for_all_of_every_call(monkeypatch):
    from mlx_fused.tuning.measure import chain

    given, evaluated = [], []

    def function(x, y):
        given.append(x)
        return [x + y, mx.exp(x)]  # the second of no use to the next call

    monkeypatch.setattr(mx, "eval", evaluated.append)
    chain(function, mx.zeros((2, 2)), [[mx.ones((2, 2))]] * 5)
    assert primitives(*evaluated)["Exp"] == 5
    assert [x[0, 0].item() for x in given] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rows, length", [(1, 32), (128, 32), (512, 8), (2048, 2), (10000, 1)])
def test_chains_are_shorter_for_longer_calls(rows, length):
    from bench import chain_length

    assert chain_length(rows) == length


def crossover(tmp_path, *options):
    from crossover import main

    done = CliRunner().invoke(main, ["--quick", "--device", "cpu", "--out", str(tmp_path), *options])
    assert done.exit_code == 0, done.output
    return done.output, json.loads((tmp_path / "crossover.json").read_text())["cells"]


def test_crossover_covers_every_operation_dtype_and_row(tmp_path):
    from bench import TINY
    from crossover import kinds

    said, cells = crossover(
        tmp_path, "--rows", "9", "--rows", "1", "--dtype", "float16", "--dtype", "float32"
    )
    chosen = [kind for dtype in ("float16", "float32") for kind in kinds(TINY, dtype)]
    assert [(c["call"], c["rows"]) for c in cells] == [(str(kind), m) for kind in chosen for m in (1, 9)]
    # Five forms of two operations and of their gradients, two of the forms also by weights.
    assert len(set(chosen)) == len({c["call"] for c in cells}) == 2 * 2 * (5 + 5 + 2)
    assert all(c["routed"] == "fused" for c in cells)
    for c in cells:
        assert c["speedup"] == pytest.approx(c["seconds"]["composed"] / c["seconds"]["fused"])
    wrong = sum(not c["routed_well"] for c in cells)
    assert f"Routed to the slower: {wrong} of {len(cells)}" in said


def test_crossover_sees_the_route_that_a_user_gets(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")
    said, cells = crossover(tmp_path, "--rows", "2", "--dtype", "float32")
    assert all(c["routed"] == "composed" for c in cells)
    assert said.count("(c)") == len(cells) + 1  # and the legend


@pytest.mark.parametrize(
    "fused, composed, choice, faster, well",
    [
        (1.0, 2.0, "fused", "fused", True),
        (1.0, 2.0, "composed", "fused", False),
        (2.0, 1.0, "fused", "composed", False),
        (2.0, 1.0, "composed", "composed", True),
        (1.0, 1.02, "composed", "even", True),
        (1.02, 1.0, "fused", "even", True),
    ],
)
def test_crossover_judges_a_route(fused, composed, choice, faster, well):
    from bench import TINY
    from crossover import kinds, record, show
    from mlx_fused.tuning.table import Timing

    kind = kinds(TINY, "float16")[0]
    cell = record(kind, 8, Timing.of(fused, composed), choice)
    assert (cell["faster"], cell["routed_well"]) == (faster, well)
    console = Console(record=True, width=100)
    show(console, [cell])
    said = console.export_text()
    assert f"Routed to the slower: {int(not well)} of 1" in said
    assert (f"{kind}, M = 8: {faster} is 2.00x as fast" in said) == (not well)


@pytest.mark.parametrize("op", ["qkv", "output"])
def test_weights_take_turns_and_the_rest_stays(op):
    import bench
    from cases import Case, operands
    from contenders import contenders

    case = Case(bench.TINY, op, "float32", 3, True, quantized=True, lora=True)
    given = operands(case)
    size = 4 * sum(a.size for weight in given.frozen for a in weight)
    size += 4 * sum(a.size for a in given.primals[1 : 1 + 2 * len(case.out_features)])
    (contender, _) = contenders(case, given, torch=False, rotated=3 * size - 1).values()
    turns = [next(contender.others) for _ in range(4)]
    weights = [[a for arrays in frozen for a in arrays] for frozen, *_ in turns]
    places = [[np.asarray(memoryview(a)).ctypes.data for a in arrays] for arrays in weights]
    assert places[3] == places[0]
    assert len({place for arrays in places[:3] for place in arrays}) == 3 * len(places[0])
