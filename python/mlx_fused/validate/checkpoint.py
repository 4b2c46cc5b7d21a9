"""Loads the model to validate, makes it compute in float32, and gives it adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from mlx.utils import tree_map
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers

from mlx_fused.linear import is_lora
from mlx_fused.patching import LayerReport

# The standard deviation of a new B. mlx-lm starts B at zero, where A has no gradient; with this value an
# adapter's output is about as large as its layer's.
_LORA_B_SPREAD = 1e-2


class CannotValidate(Exception):
    """The model cannot be loaded or compared; the message says why."""


def load(model: str, adapter_path: Path | None, lazy: bool = False) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a directory, or a name on the hub, by ``mlx_lm.load``; if ``lazy``, weights when they are used.

    Raises:
        CannotValidate: If it does not exist or cannot be loaded.
    """
    try:
        return mlx_lm.load(model, adapter_path=str(adapter_path) if adapter_path else None, lazy=lazy)
    except Exception as error:  # mlx-lm and the models' code raise all kinds of errors for an unsuitable one
        adapters = f" with the adapters of {adapter_path}" if adapter_path else ""
        reason = why_missing(model, error) or f"{model}{adapters} cannot be loaded: {_one_line(error)}"
        raise CannotValidate(reason) from error


def why_missing(model: str, error: Exception) -> str | None:
    """Why there is no ``model``, and what to do, if ``error`` is the hub's about that."""
    match error:
        case HFValidationError():
            return f"There is no directory {model}."
        case GatedRepoError():
            return f"{model} is gated: accept its terms on the hub, and run: hf auth login."
        case RepositoryNotFoundError():
            return (
                f"There is no directory {model} here, and the hub shows no model of this name. "
                "If it is private, run: hf auth login."
            )
        case LocalEntryNotFoundError():
            return (
                f"There is no directory {model} here, and the hub cannot be asked for a model of this name. "
                f"Where it can be, run: hf download {model} --local-dir DIR. Then give the path of DIR."
            )
    return None


@contextmanager
def unpatched() -> Iterator[None]:
    """Turns errors of the unpatched model, which are not patching's, into ``CannotValidate``."""
    try:
        yield
    except Exception as error:
        raise CannotValidate(f"The model fails unpatched: {_one_line(error)}") from error


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Make the embeddings return float32. By promotion all later results are float32; no weight is copied."""
    embeddings = [(module, type(module)) for module in _embeddings(model)]
    for module, cls in embeddings:
        module.__class__ = _float32_class(cls)
    try:
        yield
    finally:
        for module, cls in embeddings:
            module.__class__ = cls


def dtype_of(model: nn.Module) -> mx.Dtype:
    """The dtype that ``model`` computes in, which by promotion is that of its embeddings' output."""
    dtypes = {module(mx.array([0])).dtype for module in _embeddings(model)}
    return next((dtype for dtype in dtypes if dtype != mx.float32), mx.float32)


def _embeddings(model: nn.Module) -> Iterable[nn.Module]:
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    return {id(m): m for m in model.modules() if isinstance(m, kinds)}.values()


@cache
def _float32_class(cls: type) -> type:
    return type(cls.__name__, (cls,), {"__call__": lambda self, x: cls.__call__(self, x).astype(mx.float32)})


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by the names that a report has for them."""
    return {name or type(model).__name__: module for name, module in model.named_modules()}


def linears(model: nn.Module, layers: Iterable[LayerReport]) -> list[nn.Module]:
    """The linear layers of the given modules, without their adapters."""
    modules = modules_of(model)
    children = (child for layer in layers for child in modules[layer.name].values())
    bases = (child["linear"] if is_lora(type(child)) else child for child in children)
    return [module for module in bases if isinstance(module, nn.Linear | nn.QuantizedLinear)]


def two_rows(tokens: mx.array) -> mx.array:
    """A batch of two rows: ``tokens``, and the same shifted by one."""
    return mx.stack([tokens, mx.roll(tokens, 1)])


def batch_of(tokens: mx.array) -> tuple[mx.array, mx.array]:
    """Two rows as a batch of mlx-lm's, with their lengths: of the second only the latter half counts."""
    count = len(tokens) - 1
    return two_rows(tokens), mx.array([[1, count], [1 + count // 2, count]])


def attach_adapters(model: nn.Module, tokens: mx.array, layers: Iterable[LayerReport]) -> None:
    """Make the adapters trainable; a model without any gets those that mlx-lm makes by default.

    An adapter whose B is zero, where A has no gradient, gets a random B. The dense parameters of the last
    fused layer become trainable too.
    """
    model.freeze()
    mx.random.seed(0)
    add_adapters(model, tokens, layers)
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = tree_map(_spread, module.lora_b)
    model.unfreeze(keys=["lora_a", "lora_b"])
    last = {part: x for x in layers for part in x.parts if x.parts[part].fused}
    for module in linears(model, last.values()):
        # Not module.unfreeze: quantized layers override it and freeze themselves again.
        keys = ["bias"] if "scales" in module else ["weight", "bias"]
        nn.Module.unfreeze(module, recurse=False, keys=keys)
    mx.eval(model.parameters())


def add_adapters(model: nn.Module, tokens: mx.array, layers: Iterable[LayerReport]) -> None:
    """Give a model without any adapters those that mlx-lm makes by default."""
    if any("lora_a" in module for module in model.modules()):
        return
    of_attention = {id(m) for m in linears(model, [x for x in layers if x.qkv])}
    num_layers = min(CONFIG_DEFAULTS["num_layers"], len(model.layers))
    config = CONFIG_DEFAULTS["lora_parameters"]
    linear_to_lora_layers(model, num_layers, config)
    try:
        model(tokens[None])
    except AttributeError:  # some code reads a layer's weight, which an adapter around it hides
        remove_lora_layers(model)
        named = (pair for layer in model.layers for pair in layer.named_modules())
        keys = {name for name, module in named if id(module) in of_attention}
        linear_to_lora_layers(model, num_layers, {**config, "keys": keys})


def _spread(lora_b: mx.array) -> mx.array:
    return lora_b if lora_b.any() else _LORA_B_SPREAD * mx.random.normal(lora_b.shape, lora_b.dtype)


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or repr(error)).split())
