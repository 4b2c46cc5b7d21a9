"""The guards around the one MLX that a build fits, and what is installed."""

import importlib.util
import re
import subprocess
import sys
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
    none = tmp_path / "none.so"
    none.write_bytes(b"compiled with an older nanobind")
    for extension in (wrong, none):
        with pytest.raises(SystemExit, match="Fix: build with the nanobind pinned"):
            check_mlx_module.check_abi(extension, core)


def test_pins_agree():
    pins = set(re.findall(r"mlx(?:\[cpu\])?==([0-9.]+)", (ROOT / "pyproject.toml").read_text()))
    cmake = re.search(r"MLX_FUSED_MLX_VERSION ([0-9.]+)", (ROOT / "mlx_fused" / "CMakeLists.txt").read_text())
    assert pins == {cmake[1]}


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
