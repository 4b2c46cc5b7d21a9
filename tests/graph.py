"""What a lazy array's graph is made of."""

import io
import re
from collections import Counter

import mlx.core as mx


def primitives(*arrays):
    """How many nodes of each primitive the graph of these arrays has; a Composed one counts as MLX's own."""
    return Counter(re.findall(r'\[label ="(?:Composed)?(\w+)"', _dot(arrays)))


def output_counts(name, *arrays):
    """The number of outputs of every node of the primitive called ``name``."""
    dot = _dot(arrays)
    nodes = re.findall(rf'(\d+) \[label ="{name}"', dot)
    return [len(re.findall(rf'^{node} -> "', dot, re.MULTILINE)) for node in nodes]


def _dot(arrays):
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return text.getvalue()
