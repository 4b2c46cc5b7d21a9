"""Every alteration of the Metal kernels is noticed, but for those that change nothing."""

import mutation
from msl_sim.library import KINDS


def test_every_mutant_is_killed_or_harmless():
    outcomes = mutation.judge_all()
    survivors = [
        o.mutant.name for found in outcomes.values() for o in found if not o.killed and not mutation.excuse(o)
    ]
    assert not survivors
    # None is killed by a mistake of the tests' own, or for not being a program.
    reasons = {o.reason for found in outcomes.values() for o in found if o.killed}
    assert reasons <= {*KINDS, "numbers"}
    print(mutation.document(outcomes))
    assert mutation.DOCUMENT.read_text() == mutation.document(outcomes)
