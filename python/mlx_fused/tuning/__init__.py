"""Routes measured on this machine: ``mlx-fused tune`` writes them, importing ``mlx_fused`` reads them."""

from __future__ import annotations

import os
import sys
import warnings
from typing import NamedTuple

import mlx.core as mx

from mlx_fused import _ext

OPERATIONS = {1: "linear", 2: "gated", 3: "qkv"}  # by the number of segments


class Kind(NamedTuple):
    """All that calls must share to share a measured route, but for their rows.

    Attributes:
        gradient (bool): Whether it is the gradient of such calls: of the input, and of the adapters.
        of_weights (bool): Whether it is the gradient of weights and biases too.
        dtype (mlx.core.Dtype): The dtype of the results.
        format (tuple, optional): Mode, bits and group size of quantized weights.
        bias (bool): Whether there are biases.
        in_features (int): The length of the sums.
        features (tuple): The output features of each segment: three for QKV, two for gate and up of an MLP,
            one for any other layer, with a residual or without.
        ranks (tuple): The rank of each segment's adapter; 0 without one.
    """

    gradient: bool
    of_weights: bool
    dtype: mx.Dtype
    format: tuple[str, int, int] | None
    bias: bool
    in_features: int
    features: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def operation(self) -> str:
        return OPERATIONS[len(self.features)]

    def __str__(self) -> str:
        mode, bits, group_size = self.format or ("", 0, 0)
        parts = [
            f"{self.operation} {self.in_features} -> {' + '.join(map(str, self.features))}",
            str(self.dtype).removeprefix("mlx.core."),
            f"{mode} {bits} bits by {group_size}" * bool(self.format),
            "bias" * self.bias,
            f"LoRA rank {max(self.ranks)}" * any(self.ranks),
            ("gradients, of weights too" if self.of_weights else "gradients") * self.gradient,
        ]
        return ", ".join(filter(None, parts))


def path() -> str:
    """Where the table is, if there is one: in ``MLX_FUSED_CACHE``, or else in the user's cache folder."""
    folder = os.path.expanduser(os.environ.get("MLX_FUSED_CACHE", ""))
    if not folder:
        # Not by platformdirs: importing it at every import of mlx_fused takes longer than all of this.
        caches = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
        chosen = os.environ.get("XDG_CACHE_HOME", "")
        caches = chosen if os.path.isabs(chosen) else os.path.expanduser(caches)
        folder = os.path.join(caches, "mlx-fused")
    return os.path.join(folder, "routes.json")


in_use: str | None = None  # what is, of the table of this machine


def use_table() -> None:
    """Route by the table of this machine, if there is one; warn if it cannot be used."""
    global in_use
    if not os.path.lexists(path()):
        return
    from mlx_fused.tuning import table

    try:
        found = table.read(path())
    except table.Unusable as reason:
        warnings.warn(
            f"The measured routes in {path()} are not used: {reason}. "
            "`mlx-fused tune` measures anew, `mlx-fused tune --remove` removes them.",
            stacklevel=3,
        )
        return
    routes = [(kind, {m: timing.route for m, timing in rows.items()}) for kind, rows in found.calls.items()]
    _ext.set_tuned_routes(found.device, routes)
    in_use = f"{len(routes)} kinds of calls, {path()}"
