"""Mesa's compiler for the Apple GPUs M1 and M2, built from Debian's source package, and clang before it."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "metal_cost"
MESA = "25.0.7"
TARBALL = f"mesa_{MESA}.orig.tar.xz"
SHA256 = "592272df3cf01e85e7db300c449df5061092574d099da275d19e97ef0510f8a6"
LLVM = "15"  # the newest whose SPIR-V translator still names the types of pointers
# Of Debian 12.
PACKAGES = [
    *(f"{name}-{LLVM}" for name in ("clang", "llvm-spirv")),
    *(f"{name}-{LLVM}-dev" for name in ("llvm", "libclang", "libllvmspirvlib", "libclc")),
    *(f"libclang-cpp{LLVM}-dev", "spirv-tools", "libdrm-dev", "zlib1g-dev"),
    *("bison", "flex", "g++", "pkg-config", "xz-utils"),
]
TOOLS = ["meson==1.12.1", "ninja==1.13.2", "mako==1.4.3", "pyyaml==6.0.3", "packaging==26.3"]
NEEDED = ("llvm", "mesa-clc", "precomp-compiler")
UNNEEDED = ("glx", "egl", "gbm", "expat", "shader-cache", "valgrind", "libunwind", "zstd")
OPTIONS = [
    *("-Dtools=asahi", "-Dvulkan-drivers=asahi", "-Dgallium-drivers=", "-Dplatforms=", "-Dvideo-codecs="),
    *("-Dopengl=false", "-Dbuildtype=release"),
    *(f"-D{name}=enabled" for name in NEEDED),
    *(f"-D{name}=disabled" for name in UNNEEDED),
]
# Without it a kernel that reads four 16-bit words at once stops the compiler.
OPTION = ".lower_pack_64_2x32 = true,"
MISSING_OPTION = ".lower_pack_64_4x16 = true,"
CLANG = [
    *(f"clang-{LLVM}", "-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64-unknown-unknown"),
    *("-cl-no-stdinc", "-I", str(HERE), "-Wno-everything", "-ferror-limit=5", "-emit-llvm", "-S"),
    *("-O2", "-fno-vectorize", "-fno-slp-vectorize", "-fno-discard-value-names", "-cl-kernel-arg-info"),
]


class Missing(Exception):
    """What has to be installed or fetched, in one line."""


@cache
def compiler():
    """The path of asahi_clc, built if it is not there."""
    _check_packages()
    target = BUILD / f"asahi_clc-{MESA}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            built = _build(Path(folder))
            built.replace(target)  # whole or not at all
    return target


def _check_packages():
    if not shutil.which("dpkg-query"):
        raise Missing(f"make metal-cost needs Debian 12 and its packages {' '.join(PACKAGES)}")
    query = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *PACKAGES]
    found = subprocess.run(query, capture_output=True, text=True).stdout
    if missing := [name for name in PACKAGES if f"{name} installed\n" not in found]:
        raise Missing(f"make metal-cost needs packages of Debian 12: apt install {' '.join(missing)}")


def _tarball():
    """Of Debian's mirror that this machine uses."""
    path = BUILD / TARBALL
    if not path.exists():
        query = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian"]
        mirrors = sorted(set(subprocess.run(query, capture_output=True, text=True).stdout.split()), key=len)
        url = f"{mirrors[0] if mirrors else ''}pool/main/m/mesa/{TARBALL}"
        try:
            path.write_bytes(urllib.request.urlopen(url, timeout=300).read())
        except (OSError, ValueError) as error:
            raise Missing(f"{url}: {error}; put {TARBALL} of Debian 13 into {BUILD}") from None
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise Missing(f"{path} is not the source of Mesa {MESA}: remove it")
    return path


def _build(folder):
    run(["tar", "-xJf", _tarball(), "--strip-components=1"], cwd=folder)
    header = folder / "src/asahi/compiler/agx_compile.h"
    text = header.read_text()
    assert text.count(OPTION) == 1, header
    header.write_text(text.replace(OPTION, f"{OPTION} {MISSING_OPTION}"))
    python = folder / "venv" / "bin" / "python"
    run([sys.executable, "-m", "venv", folder / "venv"])
    run([python, "-m", "pip", "install", "--quiet", *TOOLS])
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "LLVM_CONFIG": f"llvm-config-{LLVM}"}
    run([python.parent / "meson", "setup", "b", *OPTIONS], cwd=folder, env=env)
    run([python.parent / "ninja", "-C", "b", "src/asahi/clc/asahi_clc"], cwd=folder, env=env)
    return folder / "b/src/asahi/clc/asahi_clc"


def run(command, **options):
    """Runs a command; when it fails, its last lines are the error."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).split("\n")
        raise RuntimeError(f"{Path(command[0]).name}: " + "\n".join(said[-20:]))
    return done


def compile_kernel(source):
    """What asahi_clc prints about a source's kernel: its code and its statistics; and the kernel's hint."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "k.cpp").write_text(source)
        run([*CLANG, "k.cpp", "-o", "k.ll"], cwd=folder)
        ir = (Path(folder) / "k.ll").read_text()
        # The translator does not know `freeze`.
        (Path(folder) / "k.ll").write_text(re.sub(r"= freeze (i\d+) (.*)", r"= or \1 \2, 0", ir))
        run([f"llvm-as-{LLVM}", "k.ll", "-o", "k.bc"], cwd=folder)
        run([f"llvm-spirv-{LLVM}", "--spirv-max-version=1.2", "k.bc", "-o", "k.spv"], cwd=folder)
        env = os.environ | {"AGX_MESA_DEBUG": "shaders,shaderdb,internal"}
        command = [str(compiler()), "k.spv", "k.h", "k.c"]
        # It refuses kernels that spill, but only after it has said all about them.
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if "SHADER-DB" not in done.stderr:
            raise RuntimeError(f"asahi_clc: {done.stderr.strip()[-2000:]}")
        hint = re.search(r"!work_group_size_hint !(\d+)", ir)[1]
        return done.stdout, done.stderr, int(re.search(rf"^!{hint} = !{{i32 (\d+)", ir, re.M)[1])
