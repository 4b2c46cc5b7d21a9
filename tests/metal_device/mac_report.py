"""``make mac-report``: runs all that only a Mac can answer, and packs what came of it (docs/on_a_mac.md).

A step that fails, dies or hangs does not stop the next. Without Metal it is a rehearsal: the same steps on
the CPU, most of them small.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

import mlx_fused

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 3 * 60 * 60  # seconds that a step may take
MLX_FUSED = [sys.executable, "-c", "from mlx_fused.cli import main; main()"]


def steps(folder, rehearse):
    """The command of every step, by name; what is wanted most comes first."""
    demo, quick = ROOT / "build/mac-report-demo", ["--quick"] * rehearse
    test = [sys.executable, ROOT / "tests/metal_device", *["--rehearse"] * rehearse]
    found = {
        "source": ["git", "describe", "--always", "--dirty"],
        "info": [*MLX_FUSED, "info", "--json"],
        "test-metal": [*test, "--report", folder / "test-metal.json"],
        "demo": [*MLX_FUSED, "demo", "--json", "--out", demo, *["--iters=1"] * rehearse],
        "validate-4bit": [*MLX_FUSED, "validate", "--json", demo / "model-4bit"],
        "validate-dense": [*MLX_FUSED, "validate", "--json", demo / "model"],
        "models": [sys.executable, ROOT / "benchmarks/models.py", "--out", folder, *quick],
        "crossover": [sys.executable, ROOT / "benchmarks/crossover.py", "--out", folder, *quick],
        "bench": [sys.executable, ROOT / "benchmarks/bench.py", "--out", folder, *quick],
        "tune": [*MLX_FUSED, "tune", "--json", *[demo / "model-4bit"] * rehearse],
        "test-metal-from-source": [*test, "--from-source", "--report", folder / "from-source.json"],
    }
    if not Path(mlx_fused._ext.__file__).with_name("mlx_fused.metallib").exists():
        del found["test-metal-from-source"]  # test-metal is that already
    return found


def run(command, folder, name, limit):
    """Runs a step, its output in files; returns how it ended."""
    # What tune measures belongs to the report, and must change neither other steps nor this machine's routes.
    env = os.environ | {"MLX_FUSED_CACHE": str(folder / name)}
    with (folder / f"{name}.stdout").open("w") as out, (folder / f"{name}.stderr").open("w") as err:
        options = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, "env": env, "cwd": ROOT}
        try:
            process = subprocess.Popen(command, **options, start_new_session=True)
        except OSError as error:  # there may be no git
            return str(error)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"no end after {limit} s"
        finally:
            with suppress(ProcessLookupError):  # what it started ends with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def without_names(folder):
    """Replaces, in every file, the paths that name a user or say where the clone is."""
    names = {os.fspath(ROOT): "CLONE", os.fspath(Path.home()): "HOME"}
    names |= {json.dumps(name)[1:-1]: stand_in for name, stand_in in names.items()}
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for name, stand_in in names.items():
                content = content.replace(name.encode(), stand_in.encode())
            file.write_bytes(re.sub(rb"pytest-of-[^/\s]+", b"pytest-of-USER", content))


def make(commands, folder, limit=LIMIT):
    """Runs the steps, in this folder, and packs it: the path of the archive."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ends = {}
    try:
        for name, command in commands.items():
            print(f"{len(ends) + 1} of {len(commands)}: {name} ... ", end="", flush=True)
            begin = time.monotonic()
            how = run(list(map(os.fspath, command)), folder, name, limit)
            ends[name] = {"end": how, "seconds": round(time.monotonic() - begin)}
            print(f"{how}, {ends[name]['seconds']} s")
    finally:  # a report that is interrupted has what there is so far
        (folder / "steps.json").write_text(json.dumps(ends, indent=1) + "\n")
        without_names(folder)
        archive = shutil.make_archive(os.fspath(folder), "zip", folder)
        print(f"Written: {archive}")
    return ends


def main():
    rehearse = not mx.metal.is_available()
    if rehearse:
        print("There is no Metal device here: this is a rehearsal on the CPU.")
    folder = ROOT / "build/mac-report"
    ends = make(steps(folder, rehearse), folder)
    return 0 if all(step["end"] == "exit status 0" for step in ends.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
