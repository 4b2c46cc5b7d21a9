"""Every alteration of the Metal kernels is noticed, but for those that change nothing."""

import pytest

import mutation
from msl_sim.library import KINDS

SLOW = ("projection", "input_grad", "activation.h", "weight.h", "common", "epilogue", "low_rank", "adapter")
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


def test_the_page_is_as_it_is_written():
    text = mutation.DOCUMENT.read_text()
    assert mutation.document(mutation.read_lines(text)) == text
