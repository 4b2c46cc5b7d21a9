"""Runs Metal Shading Language kernels on the CPU, and checks what they do.

    library = Library("metal/projection.metal")
    result = library.run([launch], {"x": x, "y": y})

A launch is a dict, as it would be encoded on a Mac:

    {
        "kernel": "projection_float32",
        "constants": {0: True},                  # function constants by index
        "buffers": [(0, "x", 0), (1, "y", 64)],  # index, name of the buffer, byte offset
        "bytes": [(2, b"...")],                  # index, parameter block
        "grid": (4, 2, 1),                       # in threadgroups
        "threadgroup": (32, 2, 2),
    }

Buffers are C-contiguous NumPy arrays, written in place; bfloat16 is np.uint16. Memory bound twice has one
name. Everything found wrong is a `Finding` with its file and line; a run that has any raises `CheckerError`.
"""

from .library import CheckerError, Finding, Launch, Library, Result, Traffic, sparse

__all__ = ["CheckerError", "Finding", "Launch", "Library", "Result", "Traffic", "sparse"]
