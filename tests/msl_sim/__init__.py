"""Runs Metal Shading Language kernels on the CPU, and checks what they do."""

from .library import CheckerError, Finding, Launch, Library, Result, Traffic, sparse

__all__ = ["CheckerError", "Finding", "Launch", "Library", "Result", "Traffic", "sparse"]
