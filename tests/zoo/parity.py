"""Models as they come and patched, against the same models with exact layers."""

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

import mlx_fused
from graph import primitives
from mlx_fused import losses
from mlx_fused.losses import cross_entropy_loss
from mlx_fused.patching import Part
from zoo import configs, exact

# How many times the stock model's error the patched one's may be. Their roundings are independent and of one
# size, and the model amplifies both alike. Of 485 pairs on x86-64 the worst was 1.7, the median 0.7; other
# machines sum in other orders.
FACTOR = 4

# The parts, as the page calls them, and the node of each that no other has.
LABELS = {"qkv": "q, k, v", "attention": "attention", "mlp": "MLP", "residual": "output", "linear": "others"}
LABELS |= {"norm": "norms", "experts": "experts", "loss": "loss"}
_NODES = {"qkv": "FusedQKVProjection", "residual": "FusedOutputProjection", "norm": "FusedRMSNorm"}
_NODES |= {"attention": "FusedAttention"}

_EVALUATE = ("dbrx",)  # models whose own code evaluates arrays, which leaves no graph of them

BATCH, PROMPT, STEPS = 2, 9, 3
_LENGTHS = mx.array([[1, PROMPT + STEPS - 1]] * BATCH)  # every token counts
MEASURES = ("logits", "gradients", "QLoRA logits", "QLoRA gradients")


@dataclass
class Result:
    """What patching does to one model, and how far its results are from exact layers'."""

    name: str
    reason: str = ""  # why the model does not run
    # By part, of dense weights and of quantized ones with adapters
    counts: dict[str, list[str]] = field(default_factory=lambda: {part: [] for part in LABELS})
    obstacles: list[str] = field(default_factory=list)
    # The largest error as a part of the largest value, patched and stock; or how the stock model fails.
    errors: dict[str, tuple[float, float] | str] = field(default_factory=dict)


def measure(name):
    """The result for one file of mlx-lm's models; None if it holds no model."""
    try:
        model = configs.make(name)
    except SystemExit:
        return Result(name, "its import asks for a package that mlx-lm does not install")
    if model is None:
        return None
    try:
        mx.eval(model(tokens()))
    except (RuntimeError, ValueError) as error:
        if "[metal_kernel]" not in str(error):
            raise
        return Result(name, "it has a Metal kernel and nothing in its place elsewhere")
    result = Result(name)
    _compare(model, result, *MEASURES[:2])
    try:
        model = configs.make_qlora(name)
    except (AttributeError, TypeError) as error:
        result.errors |= dict.fromkeys(MEASURES[2:], _sentence(error))
    else:
        _compare(model, result, *MEASURES[2:])
    return result


def _compare(model, result, *measures):
    runs = dict(zip(measures, (_logits, _gradients), strict=True))
    stock = {measure: _stock(run, model) for measure, run in runs.items()}
    with exact.layers():
        expected = {m: run(model) for m, run in runs.items() if not isinstance(stock[m], str)}
        mx.eval(expected)
    with mlx_fused.patched(model) as report:
        patched = {m: runs[m](model) for m in expected}
        mx.eval(patched)
        nodes = primitives(*_logits(model))
        _count(report, model, result)
    result.errors |= stock  # what it says where it fails
    for m, e in expected.items():
        result.errors[m] = difference(patched[m], e), difference(stock[m], e)
    # Counters are the patch's own word; the graph tells for itself.
    for part, name in _NODES.items():
        ran = any(part in module.parts and module.parts[part].calls.fused for module in report.modules)
        assert ran == (name in nodes) or result.name in _EVALUATE, (result.name, part)


def _stock(run, model):
    """The stock model's results, or what it says if it cannot."""
    try:
        results = run(model)
        mx.eval(results)
    except (AttributeError, ValueError) as error:
        return _sentence(error)
    return results


def _sentence(error):
    return str(error).splitlines()[0].partition(". ")[0]


def _count(report, model, result):
    """In how many modules a part ran fused, always, and why not in the others; and the same of the loss."""
    of_loss = losses.calls(model)
    for part, label in LABELS.items():
        parts = [module.parts[part] for module in report.modules if part in module.parts]
        if part == "loss":
            parts = [Part(of_loss.reason, calls=of_loss)] if of_loss.total else []
        called = [p for p in parts if p.calls.total]
        fused = [p for p in called if p.calls.fused == p.calls.total]
        result.counts[part].append(f"{len(fused)} of {len(parts)}")
        for p in called:
            assert (p in fused) == p.fused, (result.name, part, p, p.calls)
        result.obstacles += [f"{label}: {p.obstacle}" for p in parts if p.obstacle]


def tokens():
    return mx.random.randint(0, configs.VOCABULARY, (BATCH, PROMPT + STEPS), key=mx.random.key(1))


def _logits(model):
    """For all tokens at once, and with a cache: a prompt, then token by token."""
    inputs, cache = tokens(), make_prompt_cache(model)
    steps = mx.split(inputs, range(PROMPT, PROMPT + STEPS), axis=1)
    return [model(inputs), *(model(step, cache=cache) for step in steps)]


def _gradients(model):
    model.train()
    # Where the model is not patched, this is MLX's own loss.
    _, gradients = nn.value_and_grad(model, cross_entropy_loss)(model, tokens(), _LENGTHS)
    model.eval()
    return gradients


def difference(actual, expected):
    """The largest in two equal trees of arrays, as a part of the largest expected value."""
    actual, expected = ({n: np.array(a) for n, a in tree_flatten(tree)} for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    largest = max(np.abs(e).max() for e in expected.values())
    return float(np.max([np.abs(actual[name] - e).max() for name, e in expected.items()]) / largest)
