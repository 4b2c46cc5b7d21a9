"""``make test-metal`` as far as it goes without Metal: its refusals, a rehearsal on the CPU, the report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

HERE = Path(__file__).parent / "metal_device"
METAL = "import mlx.core as mx, mlx_fused, os, pytest; mx.metal.is_available = lambda: True"


def run(tmp_path, *options, preset="pass", plugin=""):
    """`make test-metal` after the statements ``preset``, and each pytest of it with a plugin."""
    (tmp_path / "plugin.py").write_text(plugin)
    program = f"import runpy; {preset}; runpy.run_path({str(HERE)!r}, run_name='__main__')"
    options = ["--report", tmp_path / "report.json", "-p", "plugin", *options]
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command, env = [sys.executable, "-c", program, *options], os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(mx.metal.is_available(), reason="has Metal")
def test_without_metal_it_says_so_and_fails(tmp_path):
    status, said = run(tmp_path)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert said.count("ERROR: there is no Metal device here") == 1
    assert not (tmp_path / "report.json").exists()


def test_without_kernels_for_the_device_there_is_nothing_to_test(tmp_path):
    none = "mlx_fused.fused_output_projection_residual = lambda *_, residual, route: int(route)"
    status, said = run(tmp_path, preset=f"{METAL}; {none}")
    assert status == 0 and "There is nothing to test: there are no kernels for" in said
    assert not (tmp_path / "report.json").exists()


def test_without_the_validation_layers_its_tests_refuse_to_run(monkeypatch):
    monkeypatch.setenv("MTL_DEBUG_LAYER", "1")
    monkeypatch.delenv("MTL_SHADER_VALIDATION", raising=False)
    command = [sys.executable, "-c", f"{METAL}; import sys; sys.exit(pytest.main(sys.argv[1:]))", HERE]
    done = subprocess.run([*command, "--collect-only"], capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: run `make test-metal`, or set MTL_SHADER_VALIDATION=1" in done.stderr


def test_it_switches_the_validation_layers_on(tmp_path):
    come_so_far = "def pytest_collection():\n    raise pytest.UsageError('collecting')\n"
    status, said = run(tmp_path, plugin=f"{METAL}\n\n\n{come_so_far}", preset=METAL)
    assert status == pytest.ExitCode.USAGE_ERROR and said.endswith("ERROR: collecting\n\n")


def test_the_rest_of_the_tests_leaves_it_alone(tmp_path):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    others = [f"--ignore-glob={HERE.parent}/test_*", HERE.parent]
    done = subprocess.run([*command, *others], capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr


def rehearse(tmp_path, choice, plugin=""):
    status, said = run(tmp_path, "--rehearse", "-k", choice, plugin=plugin)
    return status, said, json.loads((tmp_path / "report.json").read_text())


def counts(passed=0, failed=0, skipped=0, died=0, not_run=0):
    return {"passed": passed, "failed": failed, "skipped": skipped, "died": died, "not run": not_run}


def test_what_may_fail_counts_as_skipped_and_says_why(tmp_path):
    fails = "def pytest_collection_modifyitems(items):\n    for item in items:\n        "
    fails += "item.module.TRAINING = 'raise SystemExit(\"NYI\")'\n"
    status, said, report = rehearse(tmp_path, "own_attention_trains and default", fails)
    assert status == 0, said
    assert report["suites"]["device"] == counts(skipped=2)
    assert len(report["failures"]) == 2 and all("NYI" in why for why in report["failures"].values())


def test_a_rehearsal_reports_every_kernel(tmp_path):
    rows = " or ".join(f"-1-{m}-bias" for m in (1, 2, 3, 4, 9, 65)) + " or small_lora_grad-1-1025-bias"
    choice = f"bfloat16-qkv and ({rows} or splits_and) or activations and bfloat16-1-silu"
    choice += " or test_kernels and every or models_logits and llama"
    status, said, report = rehearse(tmp_path, choice)
    assert status == 0, said
    assert report["device"] == "cpu, a rehearsal" and report["exit_status"] == 0
    assert report["suites"] == {"kernels": counts(passed=1), "models": counts(passed=2)}
    assert "projection_64_dense_bfloat16" in report["kernels"]
    for name, found in report["kernels"].items():
        of_suite = name.endswith("_bfloat16") and not re.search("_(affine_.|mxfp.|nvfp4)_", name)
        assert found == counts(found["passed"]) and (found["passed"] > 0) == of_suite, name
    assert re.search(r"^weight_grad_float16( +0){5}  no tests$", said, re.M)


ALL_THAT_CAN_BEFALL_A_TEST = """
import os
import mlx_fused
import pytest

right = mlx_fused.fused_qkv_projection
begun = []

def wrong(**arguments):
    q, k, v = right(**arguments)
    return q, k, v + ("projection_rows" in os.environ["PYTEST_CURRENT_TEST"])

mlx_fused.fused_qkv_projection = wrong

def pytest_runtest_setup(item):
    if "group_size[1-" in item.name:
        pytest.skip()

def pytest_runtest_call(item):
    begun.append("weight_grad_float16" in item.name)
    if sum(begun) == 3:
        os.abort()

@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    assert "group_size[2-" not in item.name
"""


def test_what_is_wrong_and_what_dies_is_reported_and_the_rest_runs(tmp_path):
    choice = "projection_rows_1_dense_float32 or weight_grad_float16 or forward_qkv_every_query_group_size"
    status, said, report = rehearse(tmp_path, choice, ALL_THAT_CAN_BEFALL_A_TEST)
    assert status == report["exit_status"] == 1
    found = {name: found for name, found in report["kernels"].items() if any(found.values())}
    assert found == {
        # With a bias and without, with adapters and without: the other two, of the output, are right.
        "projection_rows_1_dense_float32": counts(passed=2, failed=6),
        "weight_grad_float16": counts(passed=2, died=1, not_run=47),
    }
    assert report["suites"] == {"forward": counts(passed=18, failed=3, skipped=3)}
    ((died, how),) = report["died"].items()
    assert "test_kernel[weight_grad_float16" in died and how == "SIGABRT" and not report["broke_off"]
    assert len(report["failures"]) == 9
    of_kernels = [why for test, why in report["failures"].items() if "test_kernel[" in test]
    assert len(of_kernels) == 6 and all("elements are off" in why for why in of_kernels)
    assert "Fatal Python error: Aborted" in said
    assert f"\nDied (SIGABRT): {died}\n" in said


def test_a_process_that_dies_outside_its_tests_loses_its_file_alone(tmp_path):
    dies = "def pytest_collectstart(collector):\n    if collector.name == 'test_kernels.py':\n"
    choice = "projection_rows_1_dense_float32 or forward_qkv_every_query_group_size"
    status, said, report = rehearse(tmp_path, choice, f"import os\n\n\n{dies}        os._exit(7)")
    assert status == report["exit_status"] == 1
    assert report["broke_off"] == {"test_kernels.py": "exit status 7"} and not report["died"]
    assert "\nBroke off (exit status 7): test_kernels.py\n" in said
    assert report["suites"] == {"forward": counts(passed=24)}


@pytest.mark.parametrize(
    "suffix, options, library",
    [(".aside", (), "metallib"), (".metallib", ("--from-source",), "source")],  # the former of a killed run
)
def test_the_metallib_is_aside_while_the_device_is_to_compile(tmp_path, suffix, options, library):
    metallib = tmp_path / "mlx_fused.metallib"
    metallib.with_suffix(suffix).write_text("kernels")
    there = library == "metallib"
    looks = (
        f"import os\n\nimport pytest\n\n\ndef pytest_collection():\n"
        f"    assert os.path.exists({str(metallib)!r}) == {there}\n"
        f"    pytest.exit('seen', {pytest.ExitCode.NO_TESTS_COLLECTED:d})"
    )
    elsewhere = f"import mlx_fused; mlx_fused._ext.__file__ = {str(tmp_path / '_ext.so')!r}"
    status, _ = run(tmp_path, "--rehearse", *options, preset=elsewhere, plugin=looks)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["library"] == library and not report["broke_off"]
    assert status == report["exit_status"] == 1  # no tests are no success
    assert metallib.read_text() == "kernels"
