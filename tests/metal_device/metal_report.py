"""What passed on the device, by kernel and by suite: a JSON file and a table."""

import json
from collections import Counter

OUTCOMES = ("passed", "failed", "skipped")


class Outcomes:
    """Collects the outcome of every test under its subject: a kernel's name, or the suite it comes from."""

    def __init__(self, kernels):
        self._kernels = kernels
        self._tests = {}

    def add(self, test, subject, outcome):
        """A test fails if any of its phases does, and is skipped if none runs."""
        _, before = self._tests.get(test, (subject, "passed"))
        worst = max(before, outcome, key=("passed", "skipped", "failed").index)
        self._tests[test] = subject, worst

    def report(self, about):
        counts = {kernel: Counter() for kernel in self._kernels}
        for subject, outcome in self._tests.values():
            counts.setdefault(subject, Counter())[outcome] += 1
        counts = {subject: {o: count[o] for o in OUTCOMES} for subject, count in counts.items()}
        return {
            **about,
            "kernels": {k: counts[k] for k in self._kernels},
            "suites": {s: c for s, c in counts.items() if s not in self._kernels},
        }


def write(report, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def table(report):
    """The lines of the short form."""
    rows = [*report["kernels"].items(), *report["suites"].items()]
    width = max(len(name) for name, _ in rows)
    yield f"{'':{width}}  " + "  ".join(f"{o:>7}" for o in OUTCOMES)
    for name, count in rows:
        verdict = "" if sum(count.values()) else "  not run"
        yield f"{name:{width}}  " + "  ".join(f"{count[o]:7}" for o in OUTCOMES) + verdict
