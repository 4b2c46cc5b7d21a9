"""The macOS build, cross-compiled and linked against the real libmlx.dylib of the pinned MLX; never run."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import lief
import pytest
from packaging.metadata import Metadata

from macos import link, symbols, wheel

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="a Mac builds and runs the extension itself")

BACKEND = ROOT / "mlx_fused" / "backend"
OTHER_PLATFORMS = {BACKEND / "no_metal/eval.cpp"} | {
    BACKEND / "cpu" / name for name in ("bfloat16_attention_loops.cpp", "bfloat16_loops.cpp")
}


@pytest.fixture(scope="module")
def built_wheel(once):
    try:
        return once(wheel.build)
    except wheel.NoNetworkError:
        if "CI" in os.environ:
            raise
        pytest.skip("needs the macOS wheels of MLX, and the package index cannot be reached")


@pytest.fixture(scope="module")
def extension(built_wheel, tmp_path_factory):
    with zipfile.ZipFile(built_wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        return Path(archive.extract(name, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def libraries(built_wheel):
    return symbols.Libraries(wheel.MLX)


@pytest.fixture
def commands(built_wheel):
    listed = json.loads((wheel.OBJECTS / "compile_commands.json").read_text())
    return {source: command["command"] for command in listed for source in compiled_in(Path(command["file"]))}


def compiled_in(path):
    """The source itself, or those that one of CMake's own includes."""
    included = re.findall(r'#include "(.*)"', path.read_text()) if path.parent.name == "Unity" else [path]
    return map(Path, included)


@pytest.fixture
def probe(commands, tmp_path, monkeypatch):
    """Makes the current folder a build of one source with the flags of eval.cpp, and returns its linker."""

    def compile_source(source):
        Path("source.cpp").write_text(source)
        words = shlex.split(commands[BACKEND / "cpu/eval.cpp"])
        subprocess.run([*words[: words.index("-o")], "-c", "source.cpp", "-o", "source.o"], check=True)
        Path("compile_commands.json").write_text(json.dumps([{"output": "source.o"}]))
        compiler = words[: words.index("-target") + 2]
        return lambda *inputs: link.main(wheel.MLX, Path("probe.so"), [*compiler, "source.o", *inputs])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(wheel.BUILD / "zig"))
    return compile_source


HIDDEN = """
#include "mlx/backend/gpu/copy.h"
void copy(const mlx::core::array& from, mlx::core::array& to, const mlx::core::Stream& stream) {
  mlx::core::copy_gpu(from, to, mlx::core::CopyType::General, stream);
}
"""
EXPORTED = """
#include "mlx/backend/metal/device.h"
void label(mlx::core::metal::CommandEncoder& encoder, const mlx::core::array& a) {
  mlx::core::metal::device(mlx::core::Device::gpu);
  encoder.set_input_array(a, 0);
}
"""
PRODUCT = """
#include <Accelerate/Accelerate.h>
void product(const float* a, float* c) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, 1, 1, 1, 1, a, 1, a, 1, 0, c, 1);
}
"""


def test_every_source_is_compiled_for_macos(commands):
    sources = {*ROOT.glob("mlx_fused/**/*.cpp"), *ROOT.glob("python/src/*.cpp")}
    assert sources - commands.keys() == OTHER_PLATFORMS
    assert all("-D_METAL_" in commands[path] for path in sources & commands.keys() if "cpu" not in path.parts)


def test_every_undefined_symbol_is_exported_by_a_library(libraries):
    needed = symbols.undefined(link.compiled(wheel.OBJECTS))
    origins = {name: libraries.origin(name) for name in needed}
    assert [name for name, origin in origins.items() if origin is None] == []
    used = {Path(origin).name for origin in origins.values()}
    assert used >= {"Python", "libmlx.dylib", "libc++.1.dylib", "libSystem.B.dylib", "Accelerate"}


def test_a_hidden_internal_stops_the_link(probe, libraries):
    link_probe = probe(HIDDEN)
    hidden = [name for name in symbols.undefined([Path("source.o")]) if not libraries.origin(name)]
    assert len(hidden) == 1 and "copy_gpu" in hidden[0]
    with pytest.raises(SystemExit, match=r"copy_gpu.*, needed by .*source\.o, is not exported"):
        link_probe()


def test_metal_device_is_exported(probe, libraries):
    probe(EXPORTED)
    metal = [name for name in symbols.undefined([Path("source.o")]) if "metal" in name]
    assert metal and {libraries.origin(name) for name in metal} == {"@rpath/libmlx.dylib"}


def test_a_missing_framework_stops_the_link(probe):
    link_probe = probe(PRODUCT)
    with pytest.raises(SystemExit, match=r"cblas_sgemm\$NEWLAPACK is of .*Accelerate, which is not linked"):
        link_probe()
    link_probe("-framework", "Accelerate")
    assert "Accelerate.framework" in symbols.imports(Path("probe.so"))["_cblas_sgemm$NEWLAPACK"]


def test_extension_is_for_macos_14_on_arm64(extension):
    parsed = lief.parse(extension)
    assert parsed.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64
    assert parsed.build_version.platform == lief.MachO.BuildVersion.PLATFORMS.MACOS
    assert parsed.build_version.minos == [14, 0, 0]
    assert parsed.has_code_signature  # arm64 macOS loads nothing unsigned
    assert "_PyInit__ext" in [symbol.name for symbol in parsed.exported_symbols]


def test_extension_links_each_library_once_and_finds_mlx_beside_itself(extension):
    parsed = lief.parse(extension)
    needed = [library.name for library in parsed.libraries]
    assert len(needed) == len(set(needed))
    assert needed[0] == f"@rpath/{extension.name}"
    assert {"@rpath/libmlx.dylib", symbols.LIBCXX, symbols.LIBSYSTEM} <= set(needed)
    assert all(name.startswith(("/usr/lib/", "/System/Library/", "@rpath/")) for name in needed)
    rpaths = [path.path for path in parsed.rpaths]
    assert "@loader_path/../mlx/lib" in rpaths and len(rpaths) == len(set(rpaths))


def test_extension_names_the_library_of_every_import_but_pythons(extension, libraries):
    imports = symbols.imports(extension)
    unnamed = {name for name, library in imports.items() if library is None}
    assert {libraries.origin(name) for name in unnamed} == {symbols.PYTHON}
    # A libc++ of its own inside would not catch MLX's exceptions.
    assert {imports[name] for name in ("___cxa_throw", "__Znwm", "__ZTISt13runtime_error")} == {
        symbols.LIBCXX
    }


def test_extension_has_the_nanobind_key_of_mlx(extension):
    spec = importlib.util.spec_from_file_location("check_mlx", ROOT / "cmake" / "check_mlx.py")
    check_mlx = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_mlx)
    assert check_mlx.nanobind_key(extension).startswith("nanobind_system_libcpp_abi1_")
    check_mlx.check_abi(extension, next(wheel.MLX.glob("core.*.so")))


def test_wheel_is_tagged_and_its_metadata_valid(built_wheel):
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert built_wheel.stem.endswith(f"-0untested-{python}-{python}-macosx_14_0_arm64")
    with zipfile.ZipFile(built_wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Metadata.from_email(archive.read(path), validate=True)
        tags = archive.read(path.replace("METADATA", "WHEEL")).decode()
    version = wheel.mlx_version()
    assert f'mlx=={version}; sys_platform == "darwin"' in [
        str(required) for required in metadata.requires_dist
    ]
    assert f"Tag: {python}-{python}-macosx_14_0_arm64" in tags and "Root-Is-Purelib: false" in tags


def test_wheel_has_the_package_and_the_kernels(built_wheel):
    with zipfile.ZipFile(built_wheel) as archive:
        names = set(archive.namelist())
        kernels = archive.read("mlx_fused/kernels.metal").decode("ascii")
    package = ROOT / "python"
    files = {
        str(path.relative_to(package))
        for path in package.glob("mlx_fused/**/*.py*")
        if path.suffix in (".py", ".pyi")
    }
    assert names >= files | {"mlx_fused/py.typed", "mlx_fused/_build.py"}
    # MLX's device compiles them without an include path.
    assert '#include "' not in kernels and "kernel" in kernels
