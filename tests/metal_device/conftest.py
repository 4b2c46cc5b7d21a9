"""Runs on a GPU, with Metal's validation layers on: ``make test-metal``."""

import os
import platform
from pathlib import Path

import mlx.core as mx
import pytest
from launches import instantiations, quantized_instantiations
from metal_report import Outcomes, table, write

import mlx_fused

ROOT = Path(__file__).parents[2]
# Read when the process makes its device. MLX's own matmuls must round as their dtype says: no TF32.
ENVIRONMENT = {
    "MTL_DEBUG_LAYER": "1",
    "MTL_SHADER_VALIDATION": "1",
    "MTL_SHADER_VALIDATION_REPORT_TO_STDERR": "1",
    "MTL_SHADER_VALIDATION_ABORT_ON_FAULT": "1",
    "MLX_ENABLE_TF32": "0",
}


def pytest_addoption(parser):
    parser.addoption("--rehearse", action="store_true", help="Run on the CPU device, on any machine.")
    parser.addoption(
        "--metal-report",
        type=Path,
        default=ROOT / "build/metal-report.json",
        help="Where to write the report.",
    )


def chosen(config):
    """Whether this folder, or a part of it, was asked for by name."""
    paths = [Path(arg.partition("::")[0]).resolve() for arg in config.args]
    return any(path.is_relative_to(Path(__file__).parent) for path in paths)


def pytest_configure(config):
    if not chosen(config):
        return
    if not config.option.rehearse:
        if not mx.metal.is_available():
            raise pytest.UsageError("there is no Metal device here (--rehearse runs the tests on the CPU)")
        unset = [f"{name}={value}" for name, value in ENVIRONMENT.items() if os.environ.get(name) != value]
        if unset:
            raise pytest.UsageError(f"run `make test-metal`, or set {' '.join(unset)}")
    config.option.metal_report.unlink(missing_ok=True)  # a run that dies leaves none
    config.pluginmanager.register(Reporter(config), "metal-report")


def pytest_ignore_collect(config):
    return None if chosen(config) else True


def pytest_itemcollected(item):
    callspec = getattr(item, "callspec", None)
    suite = item.function.__module__.rpartition(".")[2].removeprefix("test_")
    subject = callspec.params.get("kernel", suite) if callspec else suite
    item.user_properties.append(("subject", subject))


class Reporter:
    """Writes the report when the session ends."""

    def __init__(self, config):
        self.config = config
        self.outcomes = Outcomes(instantiations() + quantized_instantiations())

    def pytest_runtest_logreport(self, report):
        self.outcomes.add(report.nodeid, dict(report.user_properties)["subject"], report.outcome)

    def pytest_terminal_summary(self, terminalreporter, exitstatus):
        package = Path(mlx_fused._ext.__file__).parent
        rehearsal = self.config.option.rehearse
        about = {
            "device": "cpu, a rehearsal" if rehearsal else mx.device_info()["device_name"],
            "system": platform.platform(),
            "mlx": mx.__version__,
            "library": "metallib" if (package / "mlx_fused.metallib").exists() else "source",
            "exit_status": int(exitstatus),
        }
        report = self.outcomes.report(about)
        write(report, self.config.option.metal_report)
        terminalreporter.section(f"Metal kernels on: {about['device']}")
        for line in table(report):
            terminalreporter.line(line)
        terminalreporter.line(f"Written: {self.config.option.metal_report}")


@pytest.fixture(scope="session")
def device(pytestconfig):
    return mx.cpu if pytestconfig.option.rehearse else mx.gpu


@pytest.fixture(autouse=True)
def cpu(device, monkeypatch):
    """In the place of the suites' own fixture: the device under test, and our kernels where there are any."""
    monkeypatch.setenv("MLX_FUSED_ROUTE", "fused")
    before = mx.default_device()
    mx.set_default_device(device)
    yield
    mx.set_default_device(before)
