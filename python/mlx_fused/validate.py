"""Holds a patched model against the stock one: numbers, greedy tokens, speed and memory.

An error is the distance to the same model computed in float32, as a share of its norm. A patched model
passes if its error is at most twice that of the stock model, which rounds as often; or if it is within
what two orders of the same float32 sums may differ by (:func:`sum_error`), which is all there is
between them when the stock model computes in float32 itself.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from math import inf, sqrt
from pathlib import Path
from statistics import median

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers

import mlx_fused
from mlx_fused.patching import LayerReport, PatchReport

PROMPT = (
    "A plugin adds one line to a program and is to change nothing that it prints. Whether that is so, "
    "two runs tell, one with it and one without it, on the same input: where numbers differ, the "
    "difference must be one that rounding explains."
)
_ROUNDS = 3  # of timing
STEPS = 2 * 3 + 2 * _ROUNDS
_FLOAT32_ROUNDOFF = 2.0**-24
_LORA_B_SPREAD = 1e-3  # mlx-lm starts B at zero, for which A has no gradient


class CannotValidate(Exception):
    """The model cannot be had, fails unpatched, is not fused, or never in float32; the message says which."""


def load(model: str, adapter_path: Path | None) -> tuple[nn.Module, TokenizerWrapper]:
    """``mlx_lm.load`` of a directory, or of a name on the hub.

    Raises:
        CannotValidate: If there is none, or it cannot be had.
    """
    try:
        return mlx_lm.load(model, adapter_path=str(adapter_path) if adapter_path else None)
    except HFValidationError as error:
        raise CannotValidate(f"There is no directory {model}.") from error
    except LocalEntryNotFoundError as error:
        raise CannotValidate(
            f"There is no directory {model} here, and the hub cannot be asked for a model of this name. "
            f"Where it can be, run: hf download {model} --local-dir DIR. Then give the path of DIR."
        ) from error
    except Exception as error:  # whatever mlx-lm and a model's code say to a checkpoint that is not theirs
        adapters = f" with the adapters of {adapter_path}" if adapter_path else ""
        raise CannotValidate(f"{model}{adapters} cannot be loaded: {_one_line(error)}") from error


def validate(
    model: nn.Module, prompt: list[int], num_tokens: int, on_step: Callable[[], None] = lambda: None
) -> dict:
    """Compare ``model`` as it is with ``model`` patched.

    Args:
        model (mlx.nn.Module): What :func:`load` gives. It is given adapters if it has none.
        prompt (list): The tokens to compute logits and gradients for, and to continue.
        num_tokens (int): How many tokens to generate, at least 2.
        on_step (callable): Called ``STEPS`` times.

    Returns:
        dict: What was measured; ``passed`` is the verdict.

    Raises:
        CannotValidate: If the model fails unpatched, nothing of it runs fused, or it does not compute in
            float32 when its embeddings are float32.
    """
    tokens = mx.array(prompt)
    with mlx_fused.patched(model) as report:
        terms = sum_terms(model, report)
    runner = _Runner(model, on_step)
    outputs = runner.run_all(lambda: {"logits": model(tokens[None])[0]})
    reference = outputs["float32"]["logits"]
    if reference.dtype != mx.float32:
        raise CannotValidate("The model does not compute in float32 when its embeddings are float32.")
    logits = _hold(outputs, sum_error(terms))["logits"]

    # Two logits of two models each have an error of this spread: 8 times that is out of reach.
    largest_gap = 8 * logits["tolerance"] * mx.sqrt(mx.mean(mx.square(reference))).item()
    dtype = str(outputs["stock"]["logits"].dtype).removeprefix("mlx.core.")
    del outputs, reference  # they are not to be seen in the peaks of memory
    runner.memory.clear()
    greedy, speed = _generate(runner, model, tokens, num_tokens, largest_gap)
    memory = {"generation": dict(runner.memory)}

    with _unpatched():
        _attach_adapters(model, tokens, report)
    runner.memory.clear()
    # Each product of the forward has two in the backward.
    gradients = _hold(runner.run_all(lambda: _adapter_gradients(model, tokens)), sum_error(3 * terms))
    memory["LoRA step"] = runner.memory
    if not any(calls["fused"] for calls in runner.calls.values()):
        raise CannotValidate(
            f"Nothing of it ran fused, so there is nothing to compare. Is MLX_FUSED=0 set?\n{report}"
        )
    return {
        "dtype": dtype,
        "layers": {x.name: {"qkv": str(x.qkv), "residual": str(x.residual)} for x in report.layers},
        "obstacles": sorted({p.obstacle for x in report.layers for p in (x.qkv, x.residual) if p.obstacle}),
        "calls": runner.calls,
        "logits": logits,
        "gradients": gradients,
        "greedy": greedy,
        "tokens_per_second": speed,
        "peak_memory": memory,
        "passed": all(check["passed"] for check in (logits, greedy, *gradients.values())),
    }


def sum_terms(model: nn.Module, report: PatchReport) -> int:
    """The terms of one number of each product in the fused layers: the additions patching reorders."""
    fused = [layer for layer in report.layers if layer.qkv.fused or layer.residual.fused]
    linears = _linears(model, fused)
    return sum(m["weight"].shape[-1] * (32 // m.bits if "scales" in m else 1) for m in linears)


def _linears(model: nn.Module, layers: Iterable[LayerReport]) -> list[nn.Module]:
    modules = dict(model.named_modules())
    inside = (module for layer in layers for module in modules[layer.name].modules())
    return [module for module in inside if isinstance(module, nn.Linear | nn.QuantizedLinear)]


def sum_error(terms: int) -> float:
    """How far two orders of float32 sums with so many terms in all may drive a result apart.

    The rounding errors of n additions being as good as independent, together they pass 8 sqrt(n)
    roundoffs with a probability below 3e-14 (Higham and Mary, 2019).
    """
    return 8 * sqrt(terms) * _FLOAT32_ROUNDOFF


class _Runner:
    """Runs functions with the model in float32, as it is, or patched.

    Keeps the peak memory of each, and how many calls of patched layers were fused.
    """

    def __init__(self, model: nn.Module, on_step: Callable[[], None]):
        self.on_step = on_step
        self.variants = {
            "float32": lambda: _in_float32(model),
            "stock": _unpatched,
            "patched": lambda: mlx_fused.patched(model),
        }
        self.memory: dict[str, int] = {}
        self.calls = {part: {"total": 0, "fused": 0} for part in ("qkv", "residual")}

    def run(self, variant: str, function: Callable):
        mx.clear_cache()
        mx.reset_peak_memory()
        with self.variants[variant]() as report:
            result = function()
            mx.eval(result)
        self.memory[variant] = max(self.memory.get(variant, 0), mx.get_peak_memory())
        for layer in report.layers if report else ():
            for part, calls in self.calls.items():
                calls["total"] += getattr(layer, part).calls.total
                calls["fused"] += getattr(layer, part).calls.fused
        self.on_step()
        return result

    def run_all(self, function: Callable) -> dict:
        return {variant: self.run(variant, function) for variant in self.variants}


@contextmanager
def _unpatched() -> Iterator[None]:
    """What fails here says nothing of patching."""
    try:
        yield
    except Exception as error:
        raise CannotValidate(f"The model fails unpatched: {_one_line(error)}") from error


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Let the embeddings be float32: by promotion all that follows is, and no weight is copied."""
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    embeddings = {id(m): (m, type(m)) for m in model.modules() if isinstance(m, kinds)}.values()
    for module, cls in embeddings:
        module.__class__ = _float32_class(cls)
    try:
        with _unpatched():
            yield
    finally:
        for module, cls in embeddings:
            module.__class__ = cls


@cache
def _float32_class(cls: type) -> type:
    return type(cls.__name__, (cls,), {"__call__": lambda self, x: cls.__call__(self, x).astype(mx.float32)})


def _hold(outputs: dict[str, dict[str, mx.array]], bound: float) -> dict[str, dict]:
    """The errors of the stock and the patched outputs, array by array, and whether they may be."""
    reference, held = outputs["float32"], {}
    for name in reference:
        stock, patched = (_error(outputs[variant][name], reference[name]) for variant in ("stock", "patched"))
        tolerance = max(bound, 2 * stock)
        held[name] = {
            "stock_error": stock,
            "patched_error": patched,
            "tolerance": tolerance,
            "passed": patched <= tolerance,  # False for NaN
        }
    return held


def _error(actual: mx.array, reference: mx.array) -> float:
    distance = mx.linalg.norm((actual.astype(mx.float32) - reference).flatten()).item()
    norm = mx.linalg.norm(reference.flatten()).item()
    return distance / norm if norm else inf if distance else 0.0


def _generate(
    runner: _Runner, model: nn.Module, tokens: mx.array, num_tokens: int, largest_gap: float
) -> tuple[dict, dict]:
    """Continue ``tokens`` greedily, stock and patched in turns: what comes out, and how fast."""
    runs = defaultdict(list)
    for _ in range(_ROUNDS):
        for variant in ("stock", "patched"):
            runs[variant].append(runner.run(variant, lambda: _continue(model, tokens, num_tokens)))
    speed = {
        "prefill": {name: len(tokens) / median(run["prefill_s"] for run in of) for name, of in runs.items()},
        "decode": {
            name: (num_tokens - 1) / median(run["decode_s"] for run in of) for name, of in runs.items()
        },
    }
    stock, patched = (runs[variant][0]["tokens"] for variant in ("stock", "patched"))
    at = next((i for i in range(num_tokens) if stock[i] != patched[i]), None)
    gap = (
        0.0 if at is None else _gap(model, mx.array([*tokens.tolist(), *stock[:at]]), stock[at], patched[at])
    )
    greedy = {
        "tokens": num_tokens,
        "diverges_at": at,
        "gap": gap,
        "tolerance": largest_gap,
        "passed": gap <= largest_gap,
    }
    return greedy, speed


def _gap(model: nn.Module, tokens: mx.array, first: int, second: int) -> float:
    """How much likelier, in logits, one token is than another after ``tokens``."""
    logits = model(tokens[None])[0, -1].astype(mx.float32)
    return (logits[first] - logits[second]).item()


def _continue(model: nn.Module, tokens: mx.array, num_tokens: int) -> dict:
    start = time.perf_counter()
    times, chosen = [], []
    for token, _ in generate_step(tokens, model, max_tokens=num_tokens):
        times.append(time.perf_counter())
        chosen.append(token)
    return {"tokens": chosen, "prefill_s": times[0] - start, "decode_s": times[-1] - times[0]}


def _attach_adapters(model: nn.Module, tokens: mx.array, report: PatchReport) -> None:
    """Make the adapters trainable; a model without any gets those that mlx-lm makes by default."""
    model.freeze()
    if not any("lora_a" in module for module in model.modules()):
        of_attention = {id(m) for m in _linears(model, report.layers)}
        num_layers = min(CONFIG_DEFAULTS["num_layers"], len(model.layers))
        config = CONFIG_DEFAULTS["lora_parameters"]
        mx.random.seed(0)
        linear_to_lora_layers(model, num_layers, config)
        try:
            model(tokens[None])
        except AttributeError:  # of code that reads a layer's weight, which an adapter hides
            remove_lora_layers(model)
            named = (pair for layer in model.layers for pair in layer.named_modules())
            keys = {name for name, module in named if id(module) in of_attention}
            linear_to_lora_layers(model, num_layers, {**config, "keys": keys})
        for module in model.modules():
            if "lora_b" in module:
                module.lora_b = tree_map(_spread, module.lora_b)
    model.unfreeze(keys=["lora_a", "lora_b"])
    mx.eval(model.parameters())


def _spread(lora_b: mx.array) -> mx.array:
    return _LORA_B_SPREAD * mx.random.normal(lora_b.shape)


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or repr(error)).split())


def _adapter_gradients(model: nn.Module, tokens: mx.array) -> dict[str, mx.array]:
    """The gradients of a step on ``tokens``, those of one kind of adapter in all layers as one array."""

    def loss(model: nn.Module) -> mx.array:
        logits = model(tokens[None, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens[None, 1:], reduction="mean")

    model.train()
    mx.random.seed(0)  # the same dropout in every variant
    _, gradients = nn.value_and_grad(model, loss)(model)
    model.eval()
    kinds = defaultdict(list)
    for name, gradient in tree_flatten(gradients):
        kinds[re.sub(r"\.\d+\.", ".*.", name)].append(gradient.flatten())
    return {kind: mx.concatenate(arrays) for kind, arrays in kinds.items()}
