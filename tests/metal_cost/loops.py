"""A cheaper word on the loops over K: the branches that zig's clang leaves, before any GPU's compiler."""

import re
import tempfile
from pathlib import Path

from msl_sim.toolchain import zig

from .address_spaces import CLANG
from .cells import HERE
from .measure import Block, inner_loop
from .report import source_of

FLAGS = ["-O2", "-emit-llvm", "-w", "-Wno-c++11-narrowing", "-I", HERE]
FUNCTION = re.compile(r"^define .*?^\}", re.M | re.S)
LABEL = re.compile(r"^([\w.$-]+):")


def branches(kernel):
    """How many the loop of a kernel has, its jump back included."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.clcpp"), Path(folder, "kernel.ll")
        source.write_text(source_of(kernel))
        zig(*CLANG, *FLAGS, "-o", result, source)
        functions = FUNCTION.findall(result.read_text())
    function = next(f for f in functions if "spir_kernel" not in f and "__clang_ocl" not in f)
    return sum(len(block.successors) > 1 for block in inner_loop(blocks(function)))


def blocks(function):
    """Those of a function in LLVM's language, as measure.py has them of a GPU's."""
    found, labels = [], {}
    for line in function.split("\n")[1:-1]:
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
            found.append(Block(len(found)))
        elif text := line.strip():
            name = "ffma" if "@llvm.fmuladd" in text else re.sub(r"^%\S+ = ", "", text).split(" ")[0]
            found[-1].instructions.append((name, text))
    for block in found:
        jump = block.instructions[-1][1]
        names = re.findall(r"label %([\w.$-]+)", jump) if jump.startswith(("br ", "switch ")) else []
        block.successors = [labels[name] for name in names]
    return found
