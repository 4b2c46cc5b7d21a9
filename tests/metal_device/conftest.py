"""The tests of this folder, on a GPU with Metal's validation layers on: ``make test-metal`` runs them."""

import os
from pathlib import Path

import mlx.core as mx
import pytest
from metal_report import ENVIRONMENT, Journal


def pytest_addoption(parser):
    parser.addoption("--rehearse", action="store_true", help="Run on the CPU device, on any machine.")
    parser.addoption("--journal", type=Path, help="Continue the run that wrote this, and write on.")


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
    if config.option.journal:
        config.pluginmanager.register(Recorder(Journal(config.option.journal)))


def pytest_ignore_collect(config):
    return None if chosen(config) else True


def subject(item):
    callspec = getattr(item, "callspec", None)
    suite = item.function.__module__.rpartition(".")[2].removeprefix("test_")
    return callspec.params.get("kernel", suite) if callspec else suite


class Recorder:
    """Leaves out tests that have run, and those of a subject that died; writes down what becomes of all."""

    def __init__(self, journal):
        self.journal = journal
        self.outcome, self.why = None, ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        known, dead = self.journal.read(), set(self.journal.died().values())
        left = [item for item in items if item.nodeid not in known]
        items[:] = [item for item in left if subject(item) not in dead]
        for item in left:
            if subject(item) in dead:
                self.journal.add(item.nodeid, subject(item), "not run")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.outcome, self.why = "passed", ""
        self.journal.add(item.nodeid, subject(item), "died")
        result = yield
        self.journal.add(item.nodeid, subject(item), self.outcome, self.why)
        return result

    def pytest_runtest_logreport(self, report):
        """A test fails if any of its phases does, and is skipped if none runs."""
        self.outcome = max(self.outcome, report.outcome, key=("passed", "skipped", "failed").index)
        self.why += report.longreprtext if report.failed or hasattr(report, "wasxfail") else ""


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
