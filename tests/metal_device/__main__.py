"""``make test-metal``: the tests of this folder, each file in a process of its own, and a report of them.

Metal's validation ends a process at the first fault. Then the test that ran has died, the others of its
kernel, or suite, are left out, and a new process goes on with the rest.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import mlx.core as mx
import pytest
from metal_report import ENVIRONMENT, Journal, summary, table

import mlx_fused
from launches import instantiations, quantized_instantiations

HERE = Path(__file__).resolve().parent
METALLIB = Path(mlx_fused._ext.__file__).with_name("mlx_fused.metallib")
ASIDE = METALLIB.with_suffix(".aside")
# What the validation says of a fault is written by no Python, so pytest must not catch it: the process is
# about to end. A test that hangs ends its process too.
OPTIONS = ["--capture=sys", "-o", "faulthandler_timeout=900", "-o", "faulthandler_exit_on_timeout=true"]


def main():
    restore_metallib()  # of a run that was killed
    parser = argparse.ArgumentParser(prog="test-metal", epilog="Other options are for pytest.")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU device, on any machine")
    parser.add_argument("--from-source", action="store_true", help="let the device compile the kernels")
    parser.add_argument("--report", type=Path, default=HERE.parents[1] / "build/metal-report.json")
    options, for_pytest = parser.parse_known_args()
    on = "cpu, a rehearsal" if options.rehearse else mx.device_info()["device_name"]
    if options.rehearse:
        for_pytest.append("--rehearse")
    elif mx.metal.is_available() and not has_kernels():
        print(f"There is nothing to test: there are no kernels for {on}, MLX's own operations run on it.")
        return 0
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.unlink(missing_ok=True)
    journal = Journal(options.report.resolve().with_suffix(".jsonl"))
    journal.path.unlink(missing_ok=True)
    with no_metallib() if options.from_source else nullcontext():
        library = "metallib" if METALLIB.exists() else "source"
        report = {"device": on, "system": platform.platform(), "mlx": mx.__version__, "library": library}
        report |= {"exit_status": 1, "died": {}, "broke_off": {}}
        for file in sorted(HERE.glob("test_*.py")):
            status = run(file, for_pytest, journal, report)
            if status == pytest.ExitCode.USAGE_ERROR:
                return status
            outcomes = journal.read()
            report |= summary(outcomes, instantiations() + quantized_instantiations())
            all_well = {outcome for _, outcome, _ in outcomes.values()} <= {"passed", "skipped"}
            report["exit_status"] = 0 if outcomes and all_well and not report["broke_off"] else 1
            options.report.write_text(json.dumps(report, indent=1) + "\n")
    print(f"Metal kernels on: {on}", *table(report), f"Written: {options.report}", sep="\n")
    return report["exit_status"]


def has_kernels():
    """Whether we have kernels for this GPU: for older ones, and those of virtual machines, we have none."""
    x = mx.ones((1, 1, 64))
    try:
        mlx_fused.fused_output_projection_residual(x, mx.ones((64, 64)), residual=x, route="fused")
    except ValueError:
        return False
    return True


@contextmanager
def no_metallib():
    if METALLIB.exists():
        METALLIB.rename(ASIDE)
    try:
        yield
    finally:
        restore_metallib()


def restore_metallib():
    if ASIDE.exists():
        ASIDE.rename(METALLIB)


def run(file, for_pytest, journal, report):
    """Runs a file until no process of it dies in a test, and returns the last one's exit status."""
    command = [sys.executable, "-m", "pytest", file, "--journal", journal.path, *OPTIONS, *for_pytest]
    while True:
        before = journal.died()
        status = subprocess.run(command, env=os.environ | ENVIRONMENT).returncode
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        died = journal.died().keys() - before.keys()
        report["died"] |= dict.fromkeys(died, how)
        if not died:
            if status not in (
                pytest.ExitCode.OK,
                pytest.ExitCode.TESTS_FAILED,
                pytest.ExitCode.NO_TESTS_COLLECTED,
            ):
                report["broke_off"][file.name] = how
            return status


if __name__ == "__main__":
    sys.exit(main())
