"""Builds the wheel for arm64 macOS on Linux, in dist/: `python tests/macos/wheel.py`.

It is linked against the real libmlx.dylib of the pinned MLX, and link.py accounts for its every symbol.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

import ziglang

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/macos" / sys.implementation.cache_tag
MLX = BUILD / "site-packages/mlx"
OBJECTS = BUILD / "cmake"
ZIG = Path(ziglang.__file__).with_name("zig")


class NoNetworkError(Exception):
    """The package index cannot be reached."""


def mlx_version() -> str:
    """The pinned version."""
    return re.search(r"MLX_FUSED_MLX_VERSION (\S+)\)", (ROOT / "mlx_fused/CMakeLists.txt").read_text())[1]


def unpack_mlx() -> None:
    """Puts the pinned MLX for macOS into `MLX`."""
    version, site = mlx_version(), MLX.parent
    if (site / f"mlx-{version}.dist-info").exists():
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=BUILD) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1"]
        command += ["--platform=macosx_14_0_arm64", f"mlx=={version}", f"mlx-metal=={version}"]
        done = subprocess.run([*command, f"--dest={folder}"], capture_output=True, text=True)
        if done.returncode:
            error = NoNetworkError if "connection broken" in done.stderr else RuntimeError
            raise error(f"pip could not download MLX {version} for macOS:\n{done.stdout}{done.stderr}")
        for wheel in Path(folder).glob("*.whl"):
            shutil.unpack_archive(wheel, Path(folder, "site"), "zip")
        shutil.rmtree(site, ignore_errors=True)
        Path(folder, "site").rename(site)


def python_headers() -> Path:
    """This Python's headers. Debian's pyconfig.h includes one per architecture, and knows Linux's alone."""
    installed, folder = Path(sysconfig.get_path("include")), BUILD / "python"
    shutil.copytree(installed, folder, dirs_exist_ok=True)
    config = installed.parent / str(sysconfig.get_config_var("MULTIARCH")) / installed.name / "pyconfig.h"
    if config.exists():
        shutil.copy2(config, folder)
    return folder


def build() -> Path:
    """Builds the wheel and returns its path."""
    unpack_mlx()
    shutil.rmtree(BUILD / "dist", ignore_errors=True)
    core = next(MLX.glob("core.*.so"))
    environment = os.environ | {
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()),
        "CMAKE_TOOLCHAIN_FILE": str(Path(__file__).with_name("toolchain.cmake")),
        "MACOS_MLX": str(MLX),
        "PYTHON": sys.executable,
        # `python -m mlx` tells CMake where MLX is, and `python -m macos.link` links.
        "PYTHONPATH": os.pathsep.join([str(MLX.parent), str(ROOT / "tests")]),
        "SETUPTOOLS_EXT_SUFFIX": core.name.removeprefix("core"),
        "ZIG": str(ZIG),
        "ZIG_GLOBAL_CACHE_DIR": str(BUILD / "zig"),
        "_PYTHON_HOST_PLATFORM": "macosx-14.0-arm64",
    }
    settings = [
        "wheel.build-tag=0untested",
        f"build-dir={OBJECTS}",
        f"cmake.define.Python_INCLUDE_DIR={python_headers()}",
    ]
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", str(ROOT)]
    command += [f"--wheel-dir={BUILD / 'dist'}", *(f"--config-settings={setting}" for setting in settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The macOS build failed:\n{done.stdout}{done.stderr}")
    return next((BUILD / "dist").iterdir())


if __name__ == "__main__":
    dist = ROOT / "dist"
    dist.mkdir(exist_ok=True)
    print(shutil.copy2(build(), dist), "\nCompiled and linked for macOS 14 on arm64; it has not been run.")
