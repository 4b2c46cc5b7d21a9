"""What a run on the device leaves: a journal of its tests, written as it goes, and a report made of that."""

import json
from collections import Counter

OUTCOMES = ("passed", "failed", "skipped", "died", "not run")

# Read when a process makes its device. MLX's own matmuls must round as their dtype says: no TF32.
ENVIRONMENT = {
    "MTL_DEBUG_LAYER": "1",
    "MTL_SHADER_VALIDATION": "1",
    "MTL_SHADER_VALIDATION_REPORT_TO_STDERR": "1",
    "MTL_SHADER_VALIDATION_ABORT_ON_FAULT": "1",
    "MLX_ENABLE_TF32": "0",
}


class Journal:
    """A line per outcome of a test; the last one counts.

    A test's subject is a kernel's name, or the suite that it comes from. One that has begun has died, until
    a line says otherwise: no other process needs to tell.
    """

    def __init__(self, path):
        self.path = path

    def add(self, test, subject, outcome, why=""):
        with self.path.open("a") as file:
            file.write(json.dumps([test, subject, outcome, why]) + "\n")

    def read(self):
        """(subject, outcome, why it failed) of every test."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {test: tuple(what) for test, *what in map(json.loads, lines)}

    def died(self):
        """The subject of every test that died."""
        return {test: subject for test, (subject, outcome, _) in self.read().items() if outcome == "died"}


def summary(outcomes, kernels):
    """How many tests of each kernel, and of each suite, had which outcome, and what was wrong."""
    counts = {kernel: Counter() for kernel in kernels}
    for subject, outcome, _ in outcomes.values():
        counts.setdefault(subject, Counter())[outcome] += 1
    counts = {subject: {o: count[o] for o in OUTCOMES} for subject, count in counts.items()}
    return {
        "kernels": {k: counts[k] for k in kernels},
        "suites": {s: c for s, c in counts.items() if s not in kernels},
        "failures": {test: why for test, (_, _, why) in outcomes.items() if why},
    }


def table(report):
    """The lines of the short form."""
    rows = [*report["kernels"].items(), *report["suites"].items()]
    width = max(len(name) for name, _ in rows)
    yield f"{'':{width}}  " + "  ".join(f"{o:>7}" for o in OUTCOMES)
    for name, count in rows:
        verdict = "" if sum(count.values()) else "  no tests"
        yield f"{name:{width}}  " + "  ".join(f"{count[o]:7}" for o in OUTCOMES) + verdict
    for test, how in report["died"].items():
        yield f"Died ({how}): {test}"
    for file, how in report["broke_off"].items():
        yield f"Broke off ({how}): {file}"
