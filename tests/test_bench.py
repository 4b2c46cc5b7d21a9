"""``make bench`` runs end to end, and refuses to time a contender whose results are wrong."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

import mlx_fused

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from bench import main

    default_device = mx.default_device()
    yield main
    mx.set_default_device(default_device)


def test_quick_run_prints_and_writes_everything(tmp_path):
    command = [
        sys.executable,
        BENCHMARKS / "bench.py",
        "--quick",
        "--device",
        "cpu",
        "--out",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Speedup over composed MLX" in done.stdout

    result = json.loads((tmp_path / "bench.json").read_text())
    cells = {(c["op"], c["dtype"], c["rows"], c["backward"]): c for c in result["cells"]}
    assert len(cells) == len(result["cells"]) == 2 * 3 * 3
    for cell in cells.values():
        assert {"fused", "composed"} <= cell["contenders"].keys()
        for contender in cell["contenders"].values():
            assert contender["median_s"] > 0
            assert contender["error"] <= 1
        composed, fused = (cell["contenders"][name]["median_s"] for name in ("composed", "fused"))
        assert cell["ratios"]["composed"] == pytest.approx(composed / fused)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_options_choose_the_cells(main, tmp_path):
    options = ["--quick", "--no-torch", "--dtype", "float16", "--rows", "3", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "bench.json").read_text())
    found = [(c["op"], c["dtype"], c["rows"], c["backward"]) for c in result["cells"]]
    assert found == [("qkv", "float16", 3, False), ("output", "float16", 3, False)]
    assert all(c["contenders"].keys() == {"fused", "composed"} for c in result["cells"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_wrong_element_aborts(main, tmp_path, monkeypatch, dtype):
    right = mlx_fused.fused_output_projection_residual

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        out[0, -1, 5] += 128 * mx.finfo(out.dtype).eps
        return out

    monkeypatch.setattr(mlx_fused, "fused_output_projection_residual", wrong)
    done = CliRunner().invoke(main, ["--quick", "--no-torch", "--dtype", dtype, "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "fused is wrong" in done.output
    assert not list(tmp_path.iterdir())


def test_a_wrong_gradient_aborts(main, tmp_path, monkeypatch):
    right = mlx_fused.fused_qkv_projection

    def frozen_value_weight(x, weight, *args):
        wq, wk, wv = weight
        return right(x, (wq, wk, mx.stop_gradient(wv)), *args)

    monkeypatch.setattr(mlx_fused, "fused_qkv_projection", frozen_value_weight)
    done = CliRunner().invoke(main, ["--quick", "--no-torch", "--dtype", "float32", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "fused is wrong" in done.output and "backward=True" in done.output
