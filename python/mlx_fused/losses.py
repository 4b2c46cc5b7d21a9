"""Losses of language models, which are made without logits where the model is patched."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_fused._ext import count, head_of, switched_off
from mlx_fused.linear import LinearOperands
from mlx_fused.operations import fused_linear_cross_entropy
from mlx_fused.patching.projections import NotFused, tell, watcher_of_thread
from mlx_fused.patching.registry import Patch, patch_of
from mlx_fused.patching.report import Calls


def cross_entropy_loss(model: nn.Module, batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
    """mlx-lm's ``default_loss``, without the logits where ``model`` is patched.

    MLX computes nothing before it is asked for, so the logits that a model returns say what they would be
    computed from: the head's input, the head, and what the model does with its output, which may be a
    multiplication with a number and a softcap. Of these this loss makes a
    :func:`mlx_fused.fused_linear_cross_entropy`, and the logits are never computed. Where the model does
    anything else, or is not patched, or with ``exact=True`` or ``MLX_FUSED=0``, it is MLX's loss of the
    logits.

    Args:
        model (mlx.nn.Module): A model of mlx-lm.
        batch (array): ``[B, S]``, the tokens. All but the last are the model's input, all but the first the
            targets.
        lengths (array): ``[B, 2]``, integers: the first and the last target of each row that counts. Target
            ``i`` is ``batch[:, i]``, so ``[1, S - 1]`` are all of a row.

    Returns:
        tuple: The mean loss of the targets that count, float32, and their number.

    Raises:
        ValueError: If ``lengths`` has another shape, or the environment variable ``MLX_FUSED`` an unknown
            value.
        RuntimeError: At evaluation on the CPU, if a target that counts is no word and there are no logits.
    """
    if lengths.shape != (len(batch), 2):  # of fewer rows the number would be theirs
        raise ValueError(f"lengths must have shape {(len(batch), 2)} but got {lengths.shape}.")
    inputs, targets = batch[:, :-1], batch[:, 1:]
    steps = mx.arange(1, targets.shape[1] + 1)
    counts = mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:])
    number = counts.sum()
    return token_losses(model, inputs, targets, mask=counts).sum() / number, number


def token_losses(
    model: nn.Module,
    inputs: mx.array,
    targets: mx.array,
    *,
    mask: mx.array | None = None,
    label_smoothing: float = 0.0,
) -> mx.array:
    """The loss of every token, for losses of one's own: made as :func:`cross_entropy_loss` makes it.

    Args:
        model (mlx.nn.Module): A model of mlx-lm.
        inputs (array): ``[B, S]``, tokens.
        targets (array): ``[B, S]``, integers: the token that is to follow each.
        mask (array, optional): ``[B, S]``, bool: the targets that count. Default: ``None``, all of them.
        label_smoothing (float): How much of the target is spread over all words, at least 0 and less than 1.
            Default: ``0.0``.

    Returns:
        array: ``[B, S]``, float32: minus the logarithm of each target's probability, 0 where it does not
        count.

    Raises:
        ValueError: If a shape, dtype or value is wrong, or the environment variable ``MLX_FUSED`` has an
            unknown value.
        RuntimeError: At evaluation on the CPU, if a target that counts is no word and there are no logits.
    """
    for name, a in {"targets": targets, "mask": mask}.items():
        if a is not None and a.shape != inputs.shape:
            raise ValueError(f"[token_losses] {name} must have shape {inputs.shape} but got {a.shape}.")
    if mask is not None and mask.dtype != mx.bool_:
        raise ValueError(f"[token_losses] mask must be bool but got {mask.dtype}.")
    logits = model(inputs)
    losses = _without_logits(model, logits, targets, mask, label_smoothing)
    if losses is None:
        losses = nn.losses.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        losses = losses if mask is None else losses * mask
    return losses.astype(mx.float32)


def calls(model: nn.Module) -> Calls:
    """How often the loss of a patched model was made, and how often without logits.

    Args:
        model (mlx.nn.Module): A model that was given to :func:`mlx_fused.patch`; of any other it is never.

    Returns:
        Calls: A counter, which goes on as those of the report do: ``total`` losses, of which ``fused`` were
        made without logits. ``reason`` says why the latest of the others was not.

    Raises:
        TypeError: If ``model`` is not an ``mlx.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an mlx.nn.Module but got {type(model).__name__}.")
    patches = _patches(model)
    return patches[0].calls["loss"] if patches else Calls()


def _patches(model: nn.Module) -> list[Patch]:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [patch for module in modules if (patch := patch_of(module))]


def _without_logits(
    model: nn.Module,
    logits: mx.array,
    targets: mx.array,
    mask: mx.array | None,
    label_smoothing: float,
) -> mx.array | None:
    """The loss of every target, 0 where it does not count; None if it has to be made of the logits."""
    patches = _patches(model)
    if not patches or switched_off():
        return None
    counter = calls(model)
    try:
        x, layer, scale, softcap = _head(patches, logits, targets)
    except NotFused as reason:
        count(counter, 1, 0, str(reason))
        return None
    given = {
        "x": mx.flatten(x, 0, -2),
        "weight": layer,
        "targets": mx.flatten(targets),
        "mask": None if mask is None else mx.flatten(mask),
        "scale": scale,
        "softcap": softcap,
        "label_smoothing": label_smoothing,
    }
    losses = fused_linear_cross_entropy(**given)
    if watcher_of_thread() is not None:
        tell(model, fused_linear_cross_entropy, given, losses)
    count(counter, 1, 1)
    return losses.reshape(targets.shape)


def _head(
    patches: list[Patch], logits: mx.array, targets: mx.array
) -> tuple[mx.array, LinearOperands, float, float | None]:
    """The head's input, the head, and the scale and softcap of its outputs.

    Raises:
        NotFused: If the logits are something else, or are to be rounded.
    """
    if any(patch.options.exact for patch in patches):
        raise NotFused("exact=True, and MLX rounds logits")
    if logits.shape[:-1] != targets.shape:
        raise NotFused("it does not return logits of every token")
    if isinstance(found := head_of(logits), str):
        raise NotFused(found)
    x, layer, scale, softcap = found
    return x, LinearOperands(*layer), scale, softcap
