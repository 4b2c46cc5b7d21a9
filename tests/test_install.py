"""The guards around the one MLX that a build fits, and what is installed."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_fused
from mlx_fused import _ext, _version

ROOT = Path(__file__).parent.parent


@pytest.fixture
def check_mlx_module():
    spec = importlib.util.spec_from_file_location("check_mlx", ROOT / "cmake" / "check_mlx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_version_is_the_package_version():
    assert mlx_fused.__version__ == version("mlx-fused")


def test_import_refuses_another_mlx_and_names_the_fix():
    _version.check_mlx(version("mlx"))
    with pytest.raises(
        ImportError, match=r"built for mlx .* but mlx 0\.32\.3 is installed.*pip install 'mlx=="
    ):
        _version.check_mlx("0.32.3")


def test_import_fails_before_the_extension_loads(tmp_path):
    # A fake distribution of mlx that is found first, as an upgrade behind our back would be.
    fake = tmp_path / "mlx-9.9.9.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx\nVersion: 9.9.9\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mlx_fused"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "mlx 9.9.9 is installed" in run.stderr
    assert "Fix: pip install" in run.stderr


def test_build_refuses_another_mlx(check_mlx_module):
    check_mlx_module.check_version(version("mlx"))
    with pytest.raises(SystemExit, match=r"Fix: pip install mlx==0\.32\.3"):
        check_mlx_module.check_version("0.32.3")


def test_build_refuses_another_nanobind(check_mlx_module, tmp_path):
    core, ours = Path(mx.__file__), Path(_ext.__file__)
    check_mlx_module.check_abi(ours, core)
    key = check_mlx_module.nanobind_key(core).encode()
    other = re.sub(rb"_v\d+$", b"_v19", key)
    assert len(other) == len(key)
    wrong = tmp_path / "wrong.so"
    wrong.write_bytes(ours.read_bytes().replace(key, other))
    stable = tmp_path / "stable.so"
    stable.write_bytes(key + b"_stable")
    none = tmp_path / "none.so"
    none.write_bytes(b"compiled with an older nanobind")
    for extension in (wrong, stable, none):
        with pytest.raises(SystemExit, match="Fix: build with the nanobind pinned"):
            check_mlx_module.check_abi(extension, core)


def test_pins_agree():
    pins = set(re.findall(r"mlx(?:\[cpu\])?==([0-9.]+)", (ROOT / "pyproject.toml").read_text()))
    cmake = re.search(r"MLX_FUSED_MLX_VERSION ([0-9.]+)", (ROOT / "mlx_fused" / "CMakeLists.txt").read_text())
    assert pins == {cmake[1]}


@pytest.fixture
def isolated_build(tmp_path):
    """Builds three objects as pip does: CMake starts afresh, packages are new copies elsewhere."""
    build = tmp_path / "build"

    def compiled(*options, changed=None):
        site = Path(tempfile.mkdtemp(dir=tmp_path))
        for package in ("mlx", "nanobind", "scipy_openblas32"):
            if spec := importlib.util.find_spec(package):
                installed = Path(spec.submodule_search_locations[0])
                ignored = shutil.ignore_patterns("*.so", "lib")
                shutil.copytree(installed, site / package, ignore=ignored, copy_function=shutil.copyfile)
                (site / package / "lib").symlink_to(installed / "lib")
        if changed:
            with (site / changed).open("a") as header:
                header.write("// changed")
        ninja = Path(sys.executable).with_name("ninja")
        settings = {"CMAKE_MAKE_PROGRAM": ninja, "Python_EXECUTABLE": sys.executable}
        cmake = [Path(sys.executable).with_name("cmake"), "--fresh", "-G", "Ninja", "-S", ROOT, "-B", build]
        environment = os.environ | {"PYTHONPATH": str(site)}
        command = [*cmake, *(f"-D{name}={value}" for name, value in settings.items()), *options]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        names = "(call|implicit|sgemm).cpp.o"
        targets = subprocess.run([ninja, "-C", build, "-t", "targets", "all"], capture_output=True, text=True)
        objects = [match[0] for match in re.finditer(rf"^\S*/{names}(?=:)", targets.stdout, re.MULTILINE)]
        done = subprocess.run([ninja, "-C", build, *objects], capture_output=True, text=True, check=True)
        return set(re.findall(rf"Building CXX object \S*/{names}", done.stdout))

    return compiled


def test_a_second_isolated_build_compiles_what_changed(isolated_build):
    everything = {"call", "implicit", "sgemm"}
    assert isolated_build() == everything
    assert isolated_build() == set()
    assert isolated_build(changed="mlx/include/mlx/array.h") == {"call"}
    assert isolated_build() == {"call"}
    assert isolated_build(changed="nanobind/include/nanobind/nanobind.h") == {"call", "implicit"}
    assert isolated_build("-DCMAKE_CXX_FLAGS=-O0") == everything


def test_sdist_has_the_sources_alone(tmp_path):
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.iterdir())) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    tops = {name.split("/")[0] for name in names}
    assert names >= {"CMakeLists.txt", "mlx_fused/call.cpp", "python/mlx_fused/__init__.py", "LICENSE"}
    assert not tops & {"build", "dist", ".venv", ".git", ".github"}
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


LACKING = 'case "$*" in *{word}*) exit 1 ;; esac; exec {real} "$@"'


@pytest.mark.parametrize(
    ("tool", "script", "named"),
    [
        ("python", "exit 1", r"Python 3\.10 to 3\.14 \(\S+ does not run; another: make PYTHON=\.\.\.\)"),
        ("python", "echo 3.9", r"Python 3\.10 to 3\.14 \(\S+ is 3\.9; another: make PYTHON=\.\.\.\)"),
        ("python", LACKING.format(word="ensurepip", real=sys.executable), r"the venv module of \S+"),
        ("python", LACKING.format(word="Python.h", real=sys.executable), r"the headers of \S+"),
        ("c++", "exit 1", r"a compiler of C\+\+20 .*\(\S+ is none; another: make CXX=\.\.\.\)"),
        ("c++", f'exec {shutil.which("c++")} "$@" -std=c++17', r"a compiler of C\+\+20 .*"),
        ("git", "exit 1", "git"),
    ],
)
def test_make_says_what_is_missing(tmp_path, tool, script, named):
    program = tmp_path / tool
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    python = program if tool == "python" else sys.executable
    compiler = program if tool == "c++" else shutil.which("c++")
    command = ["make", f"VENV={tmp_path}", f"PYTHON={python}", f"CXX={compiler}", tmp_path / "bin/python"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert re.match(rf"mlx-fused needs {named}\. Install: .+\n", run.stderr)


def test_this_machine_has_the_tools():
    check = ["sh", "cmake/check_tools.sh", sys.executable]
    run = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_stubs_are_those_of_the_bindings(tmp_path):
    stub = tmp_path / "_ext.pyi"
    stubgen = ["nanobind.stubgen", "-q", "-m", "mlx_fused._ext", "-o", str(stub)]
    subprocess.run([sys.executable, "-m", *stubgen], check=True)
    assert (ROOT / "python" / "mlx_fused" / "_ext.pyi").read_text() == stub.read_text()


def test_types_reach_a_caller(tmp_path):
    package = Path(mlx_fused.__file__).parent
    assert (package / "py.typed").exists()
    user = tmp_path / "user.py"
    user.write_text(
        "import mlx.core as mx\n"
        "import mlx_fused\n"
        "x = mx.ones((1, 2, 8))\n"
        "reveal_type(mlx_fused.fused_qkv_projection(x, (x, x, x), None, 2, 1, 4, stream=mx.cpu))\n"
        "reveal_type(mlx_fused.fused_qkv_projection(x, x, num_heads=2, num_kv_heads=1, head_dim=4))\n"
        "mlx_fused.fused_output_projection_residual(x, x, residual=x)\n"
        "mlx_fused.fused_qkv_projection(x, [1], None, 2, 1, 4)\n"
        "mlx_fused.fused_qkv_projection(x, x, num_heads=2)\n"
        "mlx_fused.fused_output_projection_residual(x, x)\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path), str(user)]
    env = {"MYPYPATH": str(package.parent)}
    run = subprocess.run(mypy, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert run.stdout.count('Revealed type is "tuple[mlx.core.array, mlx.core.array, mlx.core.array]"') == 2
    assert all(f"user.py:{line}: error: No overload variant" in run.stdout for line in (7, 8, 9))
    assert "Found 3 errors" in run.stdout


def test_import_is_light():
    code = (
        "import sys, mlx_fused; print([m for m in ('mlx_lm', 'rich', 'click', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
