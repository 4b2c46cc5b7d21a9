"""Writes the Metal kernels as one source without includes, which a device can compile without Xcode.

python cmake/flatten_metal.py OUTPUT INCLUDE_DIR... -- SOURCE...
"""

import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')


def flatten(source: Path, include_dirs: list[Path], seen: set[Path]) -> str:
    """The text of `source` with what it includes in place, each file once; <system> includes stay."""
    seen.add(source.resolve())
    lines = []
    for line in source.read_text().splitlines():
        if match := INCLUDE.match(line):
            header = find(match[1], [source.parent, *include_dirs])
            if header.resolve() not in seen:
                lines.append(flatten(header, include_dirs, seen))
        elif line.strip() != "#pragma once":
            lines.append(line)
    return "\n".join(lines)


def find(name: str, folders: list[Path]) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise SystemExit(f"mlx-fused: {name} is in none of {', '.join(map(str, folders))}.")


def main(arguments: list[str]) -> None:
    split = arguments.index("--")
    output, *include_dirs = map(Path, arguments[:split])
    seen: set[Path] = set()
    text = "\n".join(flatten(Path(source), include_dirs, seen) for source in arguments[split + 1 :])
    # MLX hands the source to Metal as ASCII.
    output.write_text(text.encode("ascii", "replace").decode() + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
