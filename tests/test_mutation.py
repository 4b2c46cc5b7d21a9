"""Every alteration of the Metal kernels is noticed, but for those that change nothing."""

import pytest

import mutation
from msl_sim.library import KINDS

QUANTIZED = [file for file in mutation.TESTS if file.startswith("quantized")]
LOW_RANK = [file for file in mutation.TESTS if file.startswith(("low_rank", "adapter"))]
OTHERS = [file for file in mutation.TESTS if file not in QUANTIZED + LOW_RANK]


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(OTHERS, id="dense"),
        pytest.param(LOW_RANK, id="low-rank", marks=pytest.mark.slow),
        pytest.param(QUANTIZED, id="quantized", marks=pytest.mark.slow),
    ],
)
def test_every_mutant_is_killed_or_harmless(files):
    outcomes = mutation.judge_all(files)
    everything = [o for found in outcomes.values() for o in found]
    assert not [o.mutant.name for o in everything if not o.killed and not mutation.excuse(o)]
    # None is killed by a mistake of the tests' own, or for not being a program.
    assert {o.reason for o in everything if o.killed} <= {*KINDS, "numbers"}
    said = [mutation.table_row(*item) for item in outcomes.items()] + mutation.described(everything)
    of_files = tuple(begin for file in files for begin in (f"| {file} |", f"- `{file}:"))
    assert said == [line for line in mutation.DOCUMENT.read_text().splitlines() if line.startswith(of_files)]
