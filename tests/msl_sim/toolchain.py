"""The compiler (zig's clang, from PyPI), and a cache of what it made."""

import hashlib
import subprocess
import tempfile
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import ziglang

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "msl_sim"
ZIG = Path(ziglang.__file__).with_name("zig")
TARGET = [
    "-target",
    "x86_64-linux-gnu",
    "-mcpu=x86_64_v3",
    "-std=c++23",
    "-fPIC",
    "-O2",
    "-g1",
    "-fno-sanitize=undefined",
]
KERNEL_FLAGS = [
    *TARGET,
    "-fsanitize=thread",
    "-fsanitize=bounds,alignment,null,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fsanitize=implicit-signed-integer-truncation,implicit-unsigned-integer-truncation",
    "-fsanitize-recover=all",
    "-fno-sanitize-trap=local-bounds",  # a trap would end the process
    *("-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-instrument-atomics=0"),
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
    *("-Xclang", "-cl-single-precision-constant"),
    *("-Xclang", "-ffloat16-excess-precision=none"),
    "-ftrivial-auto-var-init=pattern",  # so that an uninitialised local spoils the numbers
    # A loop unrolled checks what the loop does, and takes three times as long to compile.
    *("-mllvm", "-unroll-threshold=0", "-mllvm", "-unroll-full-max-count=0"),
    *("-fno-vectorize", "-fno-slp-vectorize", "-ffp-contract=off", "-fno-strict-aliasing"),
    "-fno-optimize-sibling-calls",  # a return address says where a call was
    "-fno-delete-null-pointer-checks",  # nor may it conclude that a pointer is none
    "-fstrict-flex-arrays=3",  # a struct's last array ends where it says
    "-fno-finite-loops",  # a loop without end must stay one
    *("-fno-exceptions", "-fno-rtti", "-Wno-everything", "-fno-caret-diagnostics", "-ferror-limit=5"),
    *("-I", str(HERE)),
]
RUNTIME_FLAGS = [*TARGET, "-fno-exceptions", "-fno-rtti"]
# The linker alone: the compiler driver would add its own sanitizer runtime.
LINK = ["ld.lld", "-shared"]
METAL_HEADERS = ("stdlib", "simdgroup", "simdgroup_matrix", "math", "atomic", "integer", "logging")


class CompileError(Exception):
    """What the compiler says; its text begins with file:line."""


def zig(*args):
    """Runs the compiler and returns what it printed."""
    done = subprocess.run([ZIG, *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr.strip())
    return done.stdout


@cache
def mlx_include():
    return Path(next(iter(find_spec("mlx").submodule_search_locations))) / "include"


@cache
def _metal_headers():
    # The library comes with msl.h in one piece, after the source is flattened: its own headers are empty.
    folder = BUILD / "include"
    folder.mkdir(parents=True, exist_ok=True)
    for name in METAL_HEADERS:
        (folder / f"metal_{name}").touch()
    return folder


def flatten(path):
    """The source with everything it includes, without comments, with line markers.

    The markers name files of the source's own folder "own/...", so that equal sources compile once
    wherever they are.
    """
    flags = ["-E", "-x", "c++", "-std=c++23", "-nostdinc", "-D__METAL__", "-D__METAL_VERSION__=320"]
    text = zig("c++", *flags, "-I", _metal_headers(), "-I", mlx_include(), path)
    return text.replace(f' "{path.parent}/', ' "own/').replace(f' "{mlx_include()}/', ' "')


@cache
def _tools():
    digest = hashlib.sha256(version("ziglang").encode())
    for name in ("msl.h", "msl_types.h", "runtime.h", "state.h", "memory.h", "runtime.cpp"):
        digest.update((HERE / name).read_bytes())
    return digest


def _cached(content, flags, build):
    digest = _tools().copy()
    digest.update("\0".join([content, *flags]).encode())
    target = BUILD / f"{digest.hexdigest()[:24]}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            build(Path(folder) / "out.so", Path(folder))
            (Path(folder) / "out.so").replace(target)  # whole or not at all, whoever else builds it
    return target


@cache
def runtime():

    def build(out, folder):
        zig("c++", *RUNTIME_FLAGS, "-c", HERE / "runtime.cpp", "-o", folder / "runtime.o")
        zig(*LINK, "-soname", "libmsl_sim.so", folder / "runtime.o", "-o", out)

    return _cached("", RUNTIME_FLAGS, build)


def compile_kernel(source):
    """Compiles a rewritten source to a shared object."""

    def build(out, folder):
        text = folder / "kernel.cpp"
        text.write_text(source)
        zig("c++", *KERNEL_FLAGS, "-c", text, "-o", folder / "kernel.o")
        zig(*LINK, folder / "kernel.o", runtime(), "-o", out)

    return _cached(source, KERNEL_FLAGS, build)
