"""A pytest plugin that patches every model of mlx-lm as it is made.

For mlx-lm's own tests: ``pytest -p mlx_lm_plugin --outcomes=FILE --patch-models``. Without the last, the
models stay as they are; FILE gets what passed, what did not, and how many calls ran fused.
"""

import json
from functools import wraps
from pathlib import Path

import mlx.nn as nn
import pytest

import mlx_fused
from mlx_fused.patching.report import TITLES

_OUTCOMES = pytest.StashKey[dict[str, str]]()
# The counters of every patched layer, by identity; experts are never fused.
_calls = {part: {} for part in TITLES if part not in ("experts", "loss")}  # that of a loss no test calls


def pytest_addoption(parser):
    parser.addoption("--patch-models", action="store_true", help="patch every model of mlx-lm")
    parser.addoption("--outcomes", type=Path, required=True, help="a JSON file to write")


def pytest_configure(config):
    config.stash[_OUTCOMES] = {}
    config.pluginmanager.register(_Recorder(config.stash[_OUTCOMES]))
    if config.getoption("patch_models"):
        nn.Module.__init_subclass__ = classmethod(_patch_instances)


def pytest_unconfigure(config):
    calls = {
        part: {kind: sum(getattr(c, kind) for c in counters.values()) for kind in ("fused", "total")}
        for part, counters in _calls.items()
    }
    outcomes = {"tests": config.stash[_OUTCOMES], "calls": calls}
    config.getoption("outcomes").write_text(json.dumps(outcomes))


class _Recorder:
    def __init__(self, outcomes):
        self._outcomes = outcomes

    def pytest_runtest_logreport(self, report):
        # A test that fails in any phase, or in one of its subtests, fails.
        if report.when == "call" or not report.passed:
            worst = max(self._outcomes.get(report.nodeid, "passed"), report.outcome, key=_ORDER.index)
            self._outcomes[report.nodeid] = worst


_ORDER = ("passed", "skipped", "failed")


def _patch_instances(cls):
    """Called for every class of modules as it is defined; the models are those called Model."""
    if cls.__name__ != "Model" or not cls.__module__.startswith("mlx_lm.models."):
        return
    init = cls.__init__

    @wraps(init)
    def init_and_patch(self, *args, **kwargs):
        init(self, *args, **kwargs)
        for module in mlx_fused.patch(self).modules:
            for part in _calls.keys() & module.parts.keys():
                calls = module.parts[part].calls
                _calls[part][id(calls)] = calls

    cls.__init__ = init_and_patch
