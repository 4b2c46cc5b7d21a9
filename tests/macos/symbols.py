"""Which library defines each symbol that an object file for macOS leaves undefined."""

import re
from collections.abc import Iterable
from pathlib import Path

import lief
import nanobind
import ziglang

LIBCXX = "/usr/lib/libc++.1.dylib"
LIBSYSTEM = "/usr/lib/libSystem.B.dylib"
PYTHON = "Python"
LINKER = "the linker"
lief.logging.disable()  # it reports zig's empty export tables
lief.disable_leak_warning()  # of its own enumerations, at the end of a process
Category = lief.MachO.Symbol.CATEGORY

# libc++'s names that MLX happens not to use; templates over the types of others are the caller's to define.
STANDARD = re.compile(
    r"__Z(NK?|T[IVT]N?)?St(?!.*(3mlx|9mlx_fused|8nanobind|B9ni))|__ZTVN10__cxxabiv1|__Z(n[wa]|d[la])|___cxa_|___dynamic_cast$|___gxx_personality_v0$"
)


def undefined(objects: Iterable[Path]) -> dict[str, Path]:
    """The symbols that the objects need and none of them defines, each with one object that needs it."""
    needed, defined = {}, set()
    for path in objects:
        parsed = lief.parse(path)
        for symbol in parsed.symbols:
            if symbol.category == Category.UNDEFINED:
                needed.setdefault(symbol.name, path)
            elif symbol.category == Category.EXTERNAL:
                defined.add(symbol.name)
    return {name: path for name, path in needed.items() if name not in defined}


def imports(library: Path) -> dict[str, str | None]:
    """The symbols a linked library binds, each with the library it names, None where dyld searches all."""
    found, parsed = {}, lief.parse(library)
    for symbol in parsed.imported_symbols:
        binding = symbol.binding_info
        found[symbol.name] = binding.library.name if binding and binding.has_library else None
    return found


class Libraries:
    """The libraries an extension links on macOS, as far as this system can know them.

    libmlx is the real one. What Apple's libraries export is taken from what MLX's own binaries bind in them
    and from zig's list of libSystem, and Python's API from nanobind's list for Apple's linker.

    Args:
        mlx: The folder of the unpacked `mlx` package for macOS.
    """

    def __init__(self, mlx: Path):
        libmlx, core = mlx / "lib/libmlx.dylib", next(mlx.glob("core.*.so"))
        self.origins = {"___dso_handle": LINKER}
        self.system: set[str] = set()
        for binary in libmlx, core:
            parsed = lief.parse(binary)
            self.system |= {library.name for library in parsed.libraries if library.name.startswith("/")}
            self.origins |= {name: library for name, library in imports(binary).items() if library}
        listed = (Path(nanobind.cmake_dir()) / "darwin-ld-cpython.sym").read_text()
        self.origins |= dict.fromkeys(re.findall(r"-U (\S+)", listed), PYTHON)
        libsystem = (Path(ziglang.__file__).parent / "lib/libc/darwin/libSystem.tbd").read_text()
        self.origins |= dict.fromkeys(re.findall(r"(?<![\w$])_[\w$.]+", libsystem), LIBSYSTEM)
        parsed = lief.parse(libmlx)
        self.origins |= dict.fromkeys(
            (symbol.name for symbol in parsed.exported_symbols), "@rpath/libmlx.dylib"
        )

    def origin(self, symbol: str) -> str | None:
        """The library that exports a symbol, or None."""
        return self.origins.get(symbol) or (LIBCXX if STANDARD.match(symbol) else None)

    def write_stubs(self, folder: Path, symbols: Iterable[str]) -> None:
        """Writes a stub per library of Apple's for the linker, with those of the symbols that it exports."""
        for library in self.system - {LIBSYSTEM}:
            name = Path(library).name
            parent = folder if name.endswith(".dylib") else folder / f"{name}.framework"
            parent.mkdir(parents=True, exist_ok=True)
            exported = ", ".join(f"'{symbol}'" for symbol in symbols if self.origin(symbol) == library)
            (parent / name).with_suffix(".tbd").write_text(
                "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\n"
                f"install-name: '{library}'\n"
                f"exports:\n  - targets: [ arm64-macos ]\n    symbols: [ {exported} ]\n...\n"
            )
