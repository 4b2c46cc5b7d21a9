"""Every alteration of the Metal kernels is noticed, but for those that change nothing."""

import pytest

import mutation
from msl_sim.library import KINDS

SLOW = ("projection", "input_grad", "activation.h", "weight", "common", "epilogue", "low_rank", "adapter")
FILES = sorted(mutation.TESTS, key=lambda file: file.endswith(".metal"))  # a header is compiled many times


@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=[pytest.mark.slow] * f.startswith(SLOW)) for f in FILES]
)
def test_every_mutant_is_killed_or_harmless(file):
    found = mutation.judge_some(file)
    assert not [o.mutant.name for o in found if not o.killed and not mutation.excuse(o)]
    # None is killed by a mistake of the tests' own, or for not being a program.
    assert {o.reason for o in found if o.killed} <= {*KINDS, "numbers"}
    assert mutation.lines_of(file, found) == mutation.read_lines(mutation.DOCUMENT.read_text())[file]


def test_the_page_is_of_these_mutants():
    text = mutation.DOCUMENT.read_text()
    lines = mutation.read_lines(text)
    assert mutation.document(lines) == text
    for file, (row, *harmless) in lines.items():
        names = [mutant.name for mutant in mutation.mutants_of(file)]
        assert int(row.split("|")[2]) == len(names)
        assert {line.split("`")[1] for line in harmless} <= set(names)


def test_what_is_listed_occurs():
    text = mutation.DOCUMENT.read_text()
    assert [what for what in mutation.HARMLESS if what not in text] == []
    names = [m.name for file in mutation.TESTS for m in mutation.generate(mutation.KERNELS / file)]
    assert [start for start in mutation.NO_PROGRAM if not any(n.startswith(start) for n in names)] == []
