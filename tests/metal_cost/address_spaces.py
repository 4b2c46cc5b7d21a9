"""A compiler's word on address spaces: zig's clang parses the kernels as C++ for OpenCL, which has them."""

import re
import tempfile
from pathlib import Path

from msl_sim.toolchain import CompileError, zig

from .cells import HERE
from .translate import entry, translate

CLANG = ["clang", "-cc1", "-x", "clcpp", "-cl-std=clc++2021", "-triple", "spir64-unknown-unknown"]
FLAGS = ["-fsyntax-only", "-w", "-Wno-c++11-narrowing", "-ferror-limit", "100", "-I", HERE]
ERROR = re.compile(r"^(\S+?:\d+):\d+: error: (.*)$", re.M)


def errors(text, functions):
    """What a flattened source does wrong with these of its kernels: (file:line, what)."""
    entries = (entry(text, function, 32, "1", f"entry_{i}") for i, function in enumerate(functions))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernels.clcpp"
        source.write_text(translate(text) + "".join(entries))
        try:
            zig(*CLANG, *FLAGS, source)
        except CompileError as error:
            return ERROR.findall(str(error)) or [("", str(error)[-2000:])]
    return []
