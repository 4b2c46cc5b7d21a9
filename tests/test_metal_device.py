"""``make test-metal`` as far as it goes without Metal: its refusals, a rehearsal on the CPU, the report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_fused  # noqa: F401 (which metal_device/launches.py asks for its plans)

HERE = Path(__file__).parent / "metal_device"
KERNELS = HERE / "test_kernels.py"


def run(tmp_path, *args, before="pass", where=KERNELS):
    """pytest in a process of its own, after the statements ``before``."""
    program = f"import sys, pytest, mlx.core as mx, mlx_fused; {before}; sys.exit(pytest.main(sys.argv[1:]))"
    options = [where, "--metal-report", tmp_path / "report.json", "-q", "-p", "no:cacheprovider", *args]
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(mx.metal.is_available(), reason="has Metal")
def test_without_metal_it_says_so_and_fails(tmp_path):
    status, said = run(tmp_path)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: there is no Metal device here" in said
    assert not (tmp_path / "report.json").exists()


def test_without_the_validation_layers_it_says_so_and_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_DEBUG_LAYER", "1")
    monkeypatch.delenv("MTL_SHADER_VALIDATION", raising=False)
    status, said = run(tmp_path, before="mx.metal.is_available = lambda: True")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: run `make test-metal`, or set MTL_SHADER_VALIDATION=1" in said


def test_the_make_target_sets_all_that_is_asked_for(tmp_path, monkeypatch):
    for name in [n for n in os.environ if n.startswith(("MTL_", "MLX_"))]:
        monkeypatch.delenv(name)
    _, said = run(tmp_path, before="mx.metal.is_available = lambda: True")
    asked = re.search("or set (.+)", said)[1].split()
    dry = subprocess.run(["make", "-n", "test-metal"], cwd=HERE.parents[1], capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    assert set(asked) <= set(dry.stdout.split())


def test_the_rest_of_the_tests_leaves_it_alone(tmp_path):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    others = [f"--ignore-glob={HERE.parent}/test_*", HERE.parent]
    done = subprocess.run([*command, *others], capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr


def rehearse(tmp_path, choice, **options):
    status, said = run(tmp_path, "--rehearse", "-k", choice, **options)
    return status, said, json.loads((tmp_path / "report.json").read_text())


def test_a_rehearsal_reports_every_kernel(tmp_path):
    status, said, report = rehearse(tmp_path, "(every_instantiation or bfloat16-qkv) and not no_bias")
    assert status == 0, said
    assert report["device"] == "cpu, a rehearsal" and report["exit_status"] == 0
    assert report["suites"]["kernels"] == {"passed": 1, "failed": 0, "skipped": 0}
    assert "projection_64_dense_bfloat16" in report["kernels"]
    for name, counts in report["kernels"].items():
        of_suite = name.endswith("_bfloat16") and not re.search("_(affine_.|mxfp.|nvfp4)_", name)
        assert (counts["passed"] > 0) == of_suite, name
        assert counts["failed"] == counts["skipped"] == 0
    assert re.search(r"^weight_grad_float16 +0 +0 +0  not run$", said, re.M)


def test_a_wrong_result_is_a_failure_of_its_kernel(tmp_path):
    wrong = (
        "right = mlx_fused.fused_qkv_projection; "
        "mlx_fused.fused_qkv_projection = lambda **k: (*right(**k)[:2], right(**k)[2] + 1)"
    )
    status, said, report = rehearse(tmp_path, "projection_rows_1_dense_float32", before=wrong)
    assert status == pytest.ExitCode.TESTS_FAILED == report["exit_status"]
    # With a bias and without, with adapters and without: the other two, of the output, are right.
    assert report["kernels"]["projection_rows_1_dense_float32"] == {"passed": 2, "failed": 4, "skipped": 0}
    assert "elements are off" in said


def test_a_suite_is_run_under_its_name(tmp_path):
    choice = "forward_qkv_every_query_group_size or models_logits and llama"
    status, said, report = rehearse(tmp_path, choice, where=HERE / "test_suites.py")
    assert status == 0, said
    assert report["suites"]["forward"]["passed"] == 24 and report["suites"]["models"]["passed"] == 2


def test_the_worst_phase_is_a_tests_outcome(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    from metal_report import Outcomes, table

    outcomes = Outcomes(["tile", "rows"])
    for test, subject, phases in (
        ("a", "tile", ("passed", "passed", "passed")),
        ("b", "tile", ("passed", "failed", "passed")),
        ("c", "tile", ("passed", "passed", "failed")),
        ("d", "layouts", ("skipped", "passed")),
    ):
        for phase in phases:
            outcomes.add(test, subject, phase)
    report = outcomes.report({"device": "none"})
    assert report["kernels"]["tile"] == {"passed": 1, "failed": 2, "skipped": 0}
    assert report["suites"] == {"layouts": {"passed": 0, "failed": 0, "skipped": 1}}
    assert [line.split() for line in table(report)] == [
        ["passed", "failed", "skipped"],
        ["tile", "1", "2", "0"],
        ["rows", "0", "0", "0", "not", "run"],
        ["layouts", "0", "0", "1"],
    ]
