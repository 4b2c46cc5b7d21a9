"""From an address in a compiled kernel to source lines, through inlined calls."""

from functools import cached_property
from pathlib import Path

from elftools.elf.elffile import ELFFile


class Locator:
    def __init__(self, path, base):
        self.path, self.base = path, base

    def where(self, address):
        """Two "file:line", or "": the innermost in the kernel's own folder, and the innermost of all."""
        frames = self._frames(address - self.base - 1) if address else []  # it is one past the call
        own = [f for f in frames if "own" in Path(f[0]).parts]
        return tuple(f"{Path(f[0][0]).name}:{f[0][1]}" if f else "" for f in (own, frames))

    @cached_property
    def _dwarf(self):
        with open(self.path, "rb") as f:
            dwarf = ELFFile(f).get_dwarf_info()
            ranges = dwarf.range_lists()
            units, lines = [], []
            for unit in dwarf.iter_CUs():
                program = dwarf.line_program_for_CU(unit)
                files = _files(program)
                lines += _rows(program, files)
                units.append((files, _inlined(unit, ranges)))
            return sorted(lines), units

    def _frames(self, pc):
        lines, units = self._dwarf
        at = [row for row in lines if row[0] <= pc < row[1]]
        frames = [at[0][2:]] if at else []
        for files, calls in units:
            # The smallest range is the innermost call.
            for _, file, line in sorted((h - lo, f, n) for lo, h, f, n in calls if lo <= pc < h):
                frames.append((files[file], line))
        return frames


def _files(program):
    header = program.header
    folders = [d.decode() if isinstance(d, bytes) else d for d in header.include_directory]
    names = [] if header.version >= 5 else [""]  # numbered from 1 before DWARF 5
    for entry in header.file_entry:
        folder = folders[entry.dir_index - (header.version < 5)]
        names.append(str(Path(folder) / entry.name.decode()))
    return names


def _rows(program, files):
    rows, last = [], None
    for entry in program.get_entries():
        state = entry.state
        if state is None:
            continue
        if last is not None and state.address > last.address:
            rows.append((last.address, state.address, files[last.file], last.line))
        last = None if state.end_sequence else state
    return rows


def _inlined(unit, ranges):
    calls = []
    for die in unit.iter_DIEs():
        if die.tag != "DW_TAG_inlined_subroutine":
            continue
        file, line = die.attributes["DW_AT_call_file"].value, die.attributes["DW_AT_call_line"].value
        for low, high in _pieces(die, unit, ranges):
            calls.append((low, high, file, line))
    return calls


def _pieces(die, unit, ranges):
    if "DW_AT_ranges" in die.attributes:
        base = unit.get_top_DIE().attributes.get("DW_AT_low_pc")
        offset = die.attributes["DW_AT_ranges"]
        found = ranges.get_range_list_at_offset(offset.value, unit)
        start = base.value if base else 0
        for r in found:
            if hasattr(r, "begin_offset"):
                shift = 0 if r.is_absolute else start
                yield r.begin_offset + shift, r.end_offset + shift
            else:
                start = r.base_address
    elif "DW_AT_low_pc" in die.attributes:
        low = die.attributes["DW_AT_low_pc"].value
        yield low, low + die.attributes["DW_AT_high_pc"].value
