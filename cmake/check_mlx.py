"""Stops a build against an MLX that the extension would not work with.

An extension of another MLX version fails to load, and one whose nanobind differs from mlx.core's loads and
then refuses every array with `TypeError: incompatible function arguments`.
"""

import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

KEY = re.compile(rb"nanobind_[a-z0-9_]+_a\d+_v\d+[a-z_]*")


def nanobind_key(library: Path) -> str:
    """The ABI key that nanobind compiles into an extension; older versions have none of this form."""
    found = KEY.search(library.read_bytes())
    return found.group().decode() if found else "none"


def check_version(expected: str) -> None:
    installed = version("mlx")
    if installed != expected:
        raise SystemExit(
            f"mlx-fused builds with mlx {expected} only, but {installed} is installed. "
            f"Fix: pip install mlx=={expected}"
        )


def check_abi(extension: Path, core: Path) -> None:
    ours, theirs = nanobind_key(extension), nanobind_key(core)
    if ours != theirs:
        raise SystemExit(
            f"mlx-fused was compiled with nanobind key {ours}, but mlx.core has {theirs}. "
            "Fix: build with the nanobind pinned in pyproject.toml."
        )


if __name__ == "__main__":
    if sys.argv[1] == "version":
        check_version(sys.argv[2])
    else:
        # By path, for in a cross build it is of another platform.
        mlx = Path(find_spec("mlx").submodule_search_locations[0])
        check_abi(Path(sys.argv[2]), next(mlx.glob("core.*.so")))
