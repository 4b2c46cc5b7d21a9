"""What ``make bench`` and ``make crossover`` do on a GPU, as far as the CPU can run it."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from rich.console import Console

from graph import primitives

# (op, quantized, lora)
KINDS = [("qkv", False, False), ("output", False, False), ("qkv", True, False), ("output", True, False)]
KINDS += [("qkv", False, True), ("qkv", True, True)]


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
    names = ["fused", "routed", "composed"] + ["addmm"] * (op == "output" and not quantized)
    assert list(cell["contenders"]) == names
    assert all(c["median_s"] > 0 for c in cell["contenders"].values())


def test_the_contenders_take_the_routes_they_are_named_for(monkeypatch):
    import bench
    from cases import Case, operands
    from contenders import contenders

    monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")  # so that routed is not fused
    case = Case(bench.TINY, "output", "bfloat16", 3, False)
    found = contenders(case, operands(case), torch=False, gpu=True)
    graphs = {name: primitives(*c.function(*c.primals)) for name, c in found.items()}
    assert graphs["fused"]["FusedOutputProjection"] == 1
    assert not any(graphs[name]["FusedOutputProjection"] for name in ("routed", "composed", "addmm"))
    assert graphs["composed"]["Matmul"] == 1 and graphs["addmm"]["AddMM"] == 1


def test_a_chain_waits_for_all_of_every_call(monkeypatch):
    from contenders import chain

    given, evaluated = [], []

    def function(x, y):
        given.append(x)
        return [x + y, mx.exp(x)]  # the second of no use to the next call

    monkeypatch.setattr(mx, "eval", evaluated.append)
    chain(function, [mx.zeros((2, 2)), mx.ones((2, 2))], 5)
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
    from crossover import OPERATIONS

    said, cells = crossover(
        tmp_path, "--rows", "9", "--rows", "1", "--dtype", "float16", "--dtype", "float32"
    )
    found = [(c["operation"], c["dtype"], c["rows"]) for c in cells]
    assert found == [(o, d, m) for o in OPERATIONS for d in ("float16", "float32") for m in (1, 9)]
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
    from crossover import record, show

    cell = record("qkv", "float16", 8, {"fused": fused, "composed": composed}, choice)
    assert (cell["faster"], cell["routed_well"]) == (faster, well)
    console = Console(record=True, width=100)
    show(console, [cell])
    said = console.export_text()
    assert f"Routed to the slower: {int(not well)} of 1" in said
    assert (f"qkv float16 M = 8: {faster} is 2.00x as fast" in said) == (not well)
