"""``make bench`` runs end to end, and refuses to time a contender whose results are wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

import mlx_fused

OPERATIONS = [op + form for form in ("", " 4-bit") for op in ("qkv", "output", "gated")]
OPERATIONS += ["head", "head 4-bit", "norm"]
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from bench import main

    default_device = mx.default_device()
    yield main
    mx.set_default_device(default_device)


def test_make_passes_arguments_on():
    root = BENCHMARKS.parent
    for target, count in (("bench", 4), ("crossover", 1)):
        command = ["make", "--dry-run", "-C", root, target, "ARGS=--quick --rows 3"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert sum(line.endswith(".py --quick --rows 3") for line in said) == count


def test_quick_run_prints_and_writes_everything(tmp_path):
    command = [sys.executable, BENCHMARKS / "bench.py", "--quick", "--device", "cpu"]
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "benchmarks.md").write_text("before\n<!-- measured -->\nold\n<!-- end -->\nafter\n")
    done = subprocess.run([*command, "--out", tmp_path, "--docs", docs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Speedup over composed MLX" in done.stdout

    result = json.loads((tmp_path / "bench.json").read_text())
    cells = {(c["op"], c["dtype"], c["rows"], c["backward"]): c for c in result["cells"]}
    # Three operations, dense and quantized, in three dtypes, at two numbers of rows and backward; with LoRA
    # in two, at one. Heads without backward; norms, which are of no kind.
    expected = 3 * (2 * 3 * 3) + 3 * (2 * 2 * 2) + 2 * 3 * 2 + 3 * 3
    assert len(cells) == len(result["cells"]) == expected
    for (op, dtype, _, _), cell in cells.items():
        assert {"fused", "composed"} <= cell["contenders"].keys()
        for name, contender in cell["contenders"].items():
            assert contender["median_s"] > 0
            assert contender["error"] <= 1 or (name == "composed" and "4-bit" in op and dtype != "float32")
        composed, fused = (cell["contenders"][name]["median_s"] for name in ("composed", "fused"))
        assert cell["ratios"]["composed"] == pytest.approx(composed / fused)
    png = (tmp_path / "bench.png").read_bytes()
    assert png.startswith(b"\x89PNG") and (docs / "benchmarks.png").read_bytes() == png
    text = (docs / "benchmarks.md").read_text()
    assert text.startswith("before\n<!-- measured -->\n") and text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text and text.count("\n| ") == 1 + len(cells)


def test_options_choose_the_cells(main, tmp_path):
    options = ["--quick", "--no-torch", "--dtype", "float16", "--rows", "3", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "bench.json").read_text())
    found = [(c["op"], c["dtype"], c["rows"], c["backward"]) for c in result["cells"]]
    assert found == [(op, "float16", 3, False) for op in OPERATIONS]
    assert all(c["contenders"].keys() == {"fused", "composed"} for c in result["cells"])


OUTPUT, GATED = "fused_output_projection_residual", "fused_gated_projection"
NAMES = [(OUTPUT, "float32"), (OUTPUT, "bfloat16")]
NAMES += [(name, "float16") for name in (OUTPUT, GATED, "fused_linear")]
ELEMENTS = [(name, quantized, dtype) for name, dtype in NAMES for quantized in (False, True)]


@pytest.mark.parametrize("name, quantized, dtype", [*ELEMENTS, ("fused_rms_norm", False, "bfloat16")])
def test_one_wrong_element_aborts(main, tmp_path, monkeypatch, name, quantized, dtype):
    right = getattr(mlx_fused, name)

    def wrong(x, weight, *args, **kwargs):
        out = right(x, weight, *args, **kwargs)
        first = weight[0] if type(weight) is tuple else weight
        if (getattr(first, "scales", None) is not None) == quantized:
            out[0, -1, 5] += 256 * mx.finfo(out.dtype).eps
        return out

    monkeypatch.setattr(mlx_fused, name, wrong)
    done = CliRunner().invoke(main, ["--quick", "--no-torch", "--dtype", dtype, "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "fused is wrong" in done.output and f"quantized={quantized}" in done.output
    assert not list(tmp_path.iterdir())


def aborts(main, tmp_path, said):
    done = CliRunner().invoke(main, ["--quick", "--no-torch", "--dtype", "float32", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "fused is wrong" in done.output and "backward=True" in done.output and said in done.output


def test_a_wrong_gradient_aborts(main, tmp_path, monkeypatch):
    right = mlx_fused.fused_qkv_projection

    def frozen_value_weight(x, weight, *args):
        q, k, v = weight
        v = v._replace(weight=mx.stop_gradient(v.weight)) if v.scales is None else v
        return right(x, (q, k, v), *args)

    monkeypatch.setattr(mlx_fused, "fused_qkv_projection", frozen_value_weight)
    aborts(main, tmp_path, "lora=False")


def test_a_wrong_gradient_through_an_activation_aborts(main, tmp_path, monkeypatch):
    right = mlx_fused.fused_gated_projection

    def frozen_gate(x, weight):
        gate, up = weight
        return right(x, (gate._replace(weight=mx.stop_gradient(gate.weight)), up))

    monkeypatch.setattr(mlx_fused, "fused_gated_projection", frozen_gate)
    aborts(main, tmp_path, "op='gated'")


def test_a_wrong_gradient_of_a_norm_aborts(main, tmp_path, monkeypatch):
    right = mlx_fused.fused_rms_norm
    monkeypatch.setattr(mlx_fused, "fused_rms_norm", lambda x, w, eps: right(x, mx.stop_gradient(w), eps))
    aborts(main, tmp_path, "op='norm'")


def test_a_wrong_gradient_of_an_adapter_aborts(main, tmp_path, monkeypatch):
    right = mlx_fused.fused_qkv_projection

    def frozen_adapter(x, weight, *args, **kwargs):
        q, *others = weight
        if q.lora_a is not None:
            q = q._replace(lora_a=mx.stop_gradient(q.lora_a))
        return right(x, (q, *others), *args, **kwargs)

    monkeypatch.setattr(mlx_fused, "fused_qkv_projection", frozen_adapter)
    aborts(main, tmp_path, "lora=True")


def test_slow_calls_are_made_once_and_slower_ones_estimated(main, tmp_path, monkeypatch):
    import bench

    impatient = replace(bench.QUICK, once=0, never=1e-9)
    monkeypatch.setattr(bench, "QUICK", impatient)
    options = ["--quick", "--no-torch", "--dtype", "float32", "--rows", "4", "--rows", "1"]
    done = CliRunner().invoke(main, [*options, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for c in json.loads((tmp_path / "bench.json").read_text())["cells"]:
        assert all(contender["calls"] == 1 for contender in c["contenders"].values())
        first = c["rows"] == 1 or (c["op"].endswith("LoRA") and not c["backward"])
        assert ("composed" in c["contenders"]) == first
        assert first or c["composed_estimate_s"] > 0
    assert "≈" in done.output
