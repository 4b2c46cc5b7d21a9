"""Alters a kernel one step at a time, and asks whether a test notices.

    outcomes = run("metal", generate("metal/projection.metal"), test)

where `test(folder)` runs the kernels of a copy of the folder, and raises when something is wrong.
"""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile

from .library import CheckerError, Library
from .source import closing

BARRIER = re.compile(r"\b(?:metal::)?(threadgroup|simdgroup)_barrier\s*\(([^;]*)\)\s*;")
CONDITION = re.compile(r"\b(?:if|while)\s*\(")
COMPARISON = re.compile(r" (<=|>=|<|>|==) ")
WEAKER = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!="}
EXTREMUM = re.compile(r"\b(?:metal::)?(?:min|max)\s*\(")
OPERATOR = re.compile(r" ([-+*/%]) ")
ASSIGNMENT = re.compile(r" (\+=|-=) ")
STATEMENT = re.compile(r"(?<=[;{}])\s*([A-Za-z_][^;{}()=]*(?:\+=|-=)[^;{}]*;)")
# Where an operand ends: what binds less than * / %, and less than + -.
TERM_ENDS = re.compile(r" [-+<>=!&|?:]| [<>=!]= | && | \|\| |[,;)\]}{]")
FACTOR_ENDS = re.compile(r" [-+*/%<>=!&|?:]|[,;)\]}{]")
LOGIC_STARTS = re.compile(r"&&|\|\||[({,;?]|(?<![=<>!])=(?!=)|(?<!:):(?!:)|\breturn\b")
LOGIC_ENDS = re.compile(r"&&|\|\||[)},;?]")


@dataclass(frozen=True)
class Mutant:
    """`old` at `position` of the file `file` becomes `new`."""

    name: str
    file: str
    position: int
    old: str
    new: str

    @classmethod
    def replacing(cls, name, path, old, new, occurrence=0):
        """A mutant by hand: `old` is text, or a compiled regular expression."""
        path = Path(path)
        pattern = old if isinstance(old, re.Pattern) else re.compile(re.escape(old))
        found = list(pattern.finditer(path.read_text()))[occurrence]
        return cls(name, path.name, found.start(), found[0], found.expand(new) if old is pattern else new)

    def apply(self, folder):
        path = Path(folder) / self.file
        text = path.read_text()
        if not text.startswith(self.old, self.position):
            raise ValueError(f"{self.name}: the file has changed")
        end = self.position + len(self.old)
        path.write_text(text[: self.position] + self.new + text[end:])


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    killed: bool
    reason: str  # a kind of finding, "numbers", "same code", or why it survived


def _masked(text):
    """The text with comments, strings, preprocessor lines and template arguments' angle brackets blanked."""
    pattern = r"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*|\[\[.*?\]\]"
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.M | re.S)


def _end(text, start, ends):
    """Where the operand that begins at `start` ends."""
    i = start
    while i < len(text):
        if text[i] in "([{":
            i = closing(text, i) + 1
        elif ends.match(text, i):
            return i
        else:
            i += 1
    return i


def _start(text, end, starts):
    """Where the operand that ends at `end` begins: after the nearest of `starts` in no bracket."""
    depth, i = 0, end
    while i > 0:
        i -= 1
        if text[i] in ")]}":
            depth += 1
        elif text[i] in "([{":
            if not depth:
                return i + 1
            depth -= 1
        elif not depth and (found := starts.match(text, i)):
            return found.end()
    return 0


def generate(path):
    """All mutants of a file, in the order of its lines."""
    path = Path(path)
    text = path.read_text()
    code = _masked(text)
    mutants, edits = {}, set()

    def add(begin, end, new, what):
        while begin < end and text[begin].isspace():
            begin += 1
        line = text.count("\n", 0, begin) + 1
        edit = (begin, text[begin:end], new)
        if code[begin:end].strip() and text[begin:end].strip() != new and edit not in edits:
            edits.add(edit)
            shown = " ".join(text[begin:end].split())
            name = f"{path.name}:{line} {what.format(shown)}"
            same = sum(n == name or n.startswith(f"{name} #") for n in mutants)
            name += f" #{same + 1}" if same else ""
            mutants[name] = Mutant(name, path.name, begin, text[begin:end], new)

    for m in BARRIER.finditer(code):
        add(m.start(), m.end(), ";", "barrier deleted")
        for flag in re.finditer(r"mem_flags::mem_(?!none)\w+", m[2]):
            begin = m.start(2) + flag.start()
            add(begin, begin + len(flag[0]), "mem_flags::mem_none", "barrier orders no memory")
    for m in CONDITION.finditer(code):
        add(m.end(), closing(code, m.end() - 1), "true", "guard always true: {}")
    for m in re.finditer(r" \? ", code):
        begin = _start(code, m.start(), LOGIC_STARTS)
        add(begin, m.start(), "true", "choice always first: {}")
        add(begin, m.start(), "false", "choice always second: {}")
    for m in re.finditer(r"&&", code):
        add(_start(code, m.start(), LOGIC_STARTS), m.start() - 1, "true", "condition dropped: {}")
        add(m.end() + 1, _end(code, m.end() + 1, LOGIC_ENDS), "true", "condition dropped: {}")
    for m in EXTREMUM.finditer(code):
        end = closing(code, m.end() - 1)
        comma = _end(code, m.end(), re.compile(","))
        if comma < end:
            add(m.start(), end + 1, f"({text[m.end() : comma]})", "only the first of {}")
            add(m.start(), end + 1, f"({text[comma + 1 : end].strip()})", "only the second of {}")
    for m in COMPARISON.finditer(code):
        add(m.start(1), m.end(1), WEAKER[m[1]], f"{m[1]} to {WEAKER[m[1]]}")
    for m in OPERATOR.finditer(code):
        if code[: m.start()].rstrip()[-1:] in ",(=?:&|<>{":  # a sign, or a pointer's star
            continue
        end = _end(code, m.end(), TERM_ENDS if m[1] in "+-" else FACTOR_ENDS)
        add(m.start(1), end, "", "{} dropped")
    for m in ASSIGNMENT.finditer(code):
        add(m.start(1), m.end(1), "=", f"{m[1]} to =")
    for m in STATEMENT.finditer(code):
        add(m.start(1), m.end(1), ";", "{} dropped")
    return sorted(mutants.values(), key=lambda m: (text.count("\n", 0, m.position), m.name))


def _code(folder, file, names):
    """The machine code of the kernels so named that a file may be part of."""
    code = {}
    for path in sorted(Path(folder).glob(file if file.endswith(".metal") else "*.metal")):
        library = Library(path)
        for kernel in filter(names.match, library.kernels):
            with open(library.compile(kernel).path, "rb") as f:
                code[path.name, kernel] = ELFFile(f).get_section_by_name(".text").data()
    return code


def _copy(folder, mutant=None):
    copy = Path(tempfile.mkdtemp())
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    if mutant:
        mutant.apply(copy)
    return copy


def judge(folder, mutant, test):
    """Runs the test on a copy of the folder with one mutant in it."""
    copy = _copy(folder, mutant)
    try:
        test(copy)
    except CheckerError as error:
        return Outcome(mutant, True, error.findings[0].kind)
    except Exception as error:
        return Outcome(mutant, True, "numbers" if isinstance(error, AssertionError) else type(error).__name__)
    finally:
        shutil.rmtree(copy)
    return Outcome(mutant, False, "survived")


def run(folder, mutants, test, names=re.compile(""), progress=lambda outcome: None):
    """Judges every mutant. One with the machine code of the original neither is killed nor survives.

    The code that is compared is that of the kernels whose names match.
    """
    copy = _copy(folder)
    try:
        test(copy)  # without a mutant it must be green
    finally:
        shutil.rmtree(copy)
    outcomes = []
    for mutant in mutants:
        outcome = judge(folder, mutant, test)
        if not outcome.killed and _code_with(folder, mutant, names) == _code(folder, mutant.file, names):
            outcome = Outcome(mutant, False, "same code")
        outcomes.append(outcome)
        progress(outcome)
    return outcomes


def _code_with(folder, mutant, names):
    copy = _copy(folder, mutant)
    try:
        return _code(copy, mutant.file, names)
    finally:
        shutil.rmtree(copy)


def score(outcomes):
    """(killed, survived, same code)"""
    survived = sum(o.reason == "survived" for o in outcomes)
    same = sum(o.reason == "same code" for o in outcomes)
    return len(outcomes) - survived - same, survived, same
