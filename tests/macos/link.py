"""CMake's link step of a macOS cross build: `python -m macos.link MLX TARGET COMPILER... INPUTS...`.

zig's linker leaves what it does not find to dyld, as Python's API must be, so the symbols are checked here.
"""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from macos.symbols import PYTHON, Libraries, imports, undefined


def compiled(build: Path) -> list[Path]:
    """The objects of all sources of a CMake build."""
    commands = json.loads((build / "compile_commands.json").read_text())
    return [build / command["output"] for command in commands]


def main(mlx: Path, target: Path, command: list[str]) -> None:
    libraries, needed = Libraries(mlx), undefined(compiled(Path.cwd()))
    unresolved = [name for name in needed if libraries.origin(name) is None]
    if unresolved:
        raise SystemExit(
            "\n".join(f"{name}, needed by {needed[name]}, is not exported." for name in unresolved)
        )

    stubs = Path("stubs")
    libraries.write_stubs(stubs, needed)
    # dyld refuses a library that is named twice.
    frameworks = dict.fromkeys(name for flag, name in pairwise(command) if flag == "-framework")
    words = [word for word in command if word != "-framework" and word not in frameworks]
    words += [f"-F{stubs}", *(word for name in frameworks for word in ("-framework", name))]
    # zig would embed libraries of its own: of a second libc++ MLX's exceptions would not be caught.
    words += ["-nostdlib", str(stubs / "libc++.1.tbd")]
    if "Foundation" in frameworks:  # which re-exports it
        words.append(str(stubs / "libobjc.A.tbd"))
    words += ["-shared", "-Wl,-undefined,dynamic_lookup", f"-Wl,-install_name,@rpath/{target.name}"]
    subprocess.run([*words, "-o", str(target)], check=True)

    for symbol, library in imports(target).items():
        if library is None and libraries.origin(symbol) != PYTHON:
            raise SystemExit(f"{symbol} is of {libraries.origin(symbol)}, which is not linked.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
