"""
The C++ functions that mlx_fused.operations and mlx_fused.patching call.
"""

from collections.abc import Mapping, Sequence

import mlx.core


def project(operation: str, node: str, input_name: str, input: mlx.core.array, norm: tuple[mlx.core.array | None, float] | None, layers: Sequence[tuple[mlx.core.array, mlx.core.array | None, mlx.core.array | None, mlx.core.array | None, int | None, int | None, str, mlx.core.array | None, mlx.core.array | None, float]], segments: Sequence[tuple[int, int]], residual: mlx.core.array | None, alpha: float, activation: tuple[str, bool, float, float] | None, packing: str, exact: bool, route: str | None, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> list[mlx.core.array]: ...

def all_gradients(operation: str, node: str, names: Sequence[str], cotangents: Sequence[mlx.core.array], input_name: str, input: mlx.core.array, layers: Sequence[tuple[mlx.core.array, mlx.core.array | None, mlx.core.array | None, mlx.core.array | None, int | None, int | None, str, mlx.core.array | None, mlx.core.array | None, float]], segments: Sequence[tuple[int, int]], has_bias: bool, route: str | None, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> list[mlx.core.array]: ...

def attention(q: mlx.core.array, k: mlx.core.array, v: mlx.core.array, scale: float, mask: str | mlx.core.array | None, window: int | None, sinks: mlx.core.array | None, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> mlx.core.array: ...

def cross_entropy(x: mlx.core.array, layer: Sequence[tuple[mlx.core.array, mlx.core.array | None, mlx.core.array | None, mlx.core.array | None, int | None, int | None, str, mlx.core.array | None, mlx.core.array | None, float]], targets: mlx.core.array, mask: mlx.core.array | None, ignore_index: int | None, scale: float, softcap: float | None, label_smoothing: float, route: str | None, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> mlx.core.array: ...

def rms_norm(x: mlx.core.array, weight: mlx.core.array | None, eps: float, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> mlx.core.array: ...

def difference(layers: Sequence[tuple[mlx.core.array, mlx.core.array | None, mlx.core.array | None, mlx.core.array | None, int | None, int | None, str, mlx.core.array | None, mlx.core.array | None, float]]) -> str | None:
    """
    Why one operation cannot compute these layers of the same input; None if it can.
    """

def has_quantized_kernels(group_size: int | None, bits: int | None, mode: str) -> bool:
    """
    Whether we have kernels for weights of this format; other formats run on MLX's own operation.
    """

def is_same(a: mlx.core.array, b: mlx.core.array) -> bool:
    """Whether two Python arrays are the same MLX array."""

def alias(a: mlx.core.array) -> mlx.core.array:
    """
    A second Python object for the same MLX array. It keeps its value when ``a`` is changed in place.
    """

def kind(*args) -> tuple:
    """
    What modules are, but for the values of their arrays: types, dtypes, shapes and settings, to compare.
    """

def identity(*args) -> tuple:
    """The kind of modules, and which MLX arrays they hold."""

def operands(layer: dict, adapter: dict | None) -> tuple:
    """
    The present operands of a linear layer and its adapter, as LinearOperands has them; arrays are aliases.
    """

def environment(name: str) -> str | None:
    """The value of an environment variable; faster than os.environ."""

def last_decision() -> tuple[str, str, str]:
    """Of this thread's latest call: its route, what decided that, and why."""

def can_norm(x: mlx.core.array) -> bool:
    """Whether a kernel for Metal that projects x may norm it as well."""

def was_composed() -> bool:
    """Whether MLX's own operations compute this thread's latest call."""

def set_tuned_routes(device: mlx.core.DeviceType, routes: Sequence[tuple[tuple[bool, bool, mlx.core.Dtype, tuple[str, int, int] | None, bool, int, Sequence[int], Sequence[int]], Mapping[int, str | None]]]) -> None:
    """
    Replaces the measured routes, by kind of call and rows; None where neither is clearly the faster.
    """

def tuned_route(kind: tuple[bool, bool, mlx.core.Dtype, tuple[str, int, int] | None, bool, int, Sequence[int], Sequence[int]], rows: int) -> str | None:
    """The measured route of such calls; None if the built-in table decides."""
