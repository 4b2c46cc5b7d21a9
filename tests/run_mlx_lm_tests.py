"""Runs mlx-lm's own tests twice, with its models as they are and patched: the same ones must pass."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

_QUIETLY = ["-q", "--tb=no", "--no-summary", "--continue-on-collection-errors"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="mlx-lm's source, of the version that is installed")
    checkout = parser.parse_args().checkout.resolve()
    installed = version("mlx-lm")
    if (found := _version(checkout)) != installed:
        parser.error(f"{checkout} holds mlx-lm {found}, installed is {installed}")

    with tempfile.TemporaryDirectory() as directory:
        stock = _run(checkout / "tests", Path(directory), "stock")
        patched = _run(checkout / "tests", Path(directory), "patched", "--patch-models")

    print()
    for name, run in (("stock", stock), ("patched", patched)):
        outcomes = list(run["tests"].values())
        counts = ", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "skipped"))
        print(f"{name + ':':9}{counts}")
    for part, calls in patched["calls"].items():
        print(f"{part}: {calls['fused']} of {calls['total']} calls ran fused")
    names = stock["tests"] | patched["tests"]
    changed = [n for n in names if stock["tests"].get(n) != patched["tests"].get(n)]
    for name in changed:
        print(f"{name}: {stock['tests'].get(name)}, patched {patched['tests'].get(name)}")
    fused = all(calls["fused"] for calls in patched["calls"].values())
    sys.exit(bool(changed) or not fused)


def _version(checkout):
    file = checkout / "mlx_lm" / "_version.py"
    match = re.search(r"""__version__ = ["'](.*)["']""", file.read_text()) if file.exists() else None
    return match and match[1]


def _run(tests, directory, name, *options):
    print(f"{name} models:", flush=True)
    outcomes = directory / f"{name}.json"
    plugins = ["-p", "mlx_lm_plugin", f"--outcomes={outcomes}", *options, "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", tests, *plugins, *_QUIETLY]
    # From elsewhere, for python -m takes the folder it runs in for a place of modules, and the checkout's
    # mlx_lm for the one to test. Its tests that download something fail at once, with and without.
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run(command, cwd=directory, env=environment)
    return json.loads(outcomes.read_text())


if __name__ == "__main__":
    main()
