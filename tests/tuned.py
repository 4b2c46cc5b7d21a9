"""A table of measured routes for tests."""

import warnings
from pathlib import Path

import mlx.core as mx

from mlx_fused import tuning
from mlx_fused.tuning import Kind, table
from mlx_fused.tuning.table import Timing

PLAIN = Kind(False, False, mx.float32, None, False, 64, (64, 32, 32), (0, 0, 0))
OUTPUT = PLAIN._replace(features=(64,), ranks=(0,))
GATED = PLAIN._replace(features=(64, 64), ranks=(0, 0))
FUSED, COMPOSED, EVEN = Timing.of(1.0, 2.0), Timing.of(2.0, 1.0), Timing.of(1.0, 1.01)
CALLS = {
    PLAIN: {1: COMPOSED, 8: EVEN, 32: FUSED},
    OUTPUT._replace(gradient=True, of_weights=True, dtype=mx.bfloat16): {1: FUSED},
    PLAIN._replace(format=("affine", 4, 64), bias=True, ranks=(8, 0, 8)): {2: COMPOSED},
}


def write(calls):
    table.write(tuning.path(), calls)
    return Path(tuning.path())


def ignored():
    """The warnings of reading the table."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tuning.use_table()
    return [str(w.message) for w in said]
