"""
The C++ functions that mlx_fused.operations and mlx_fused.patching call.
"""

from collections.abc import Mapping, Sequence

import mlx.core


class Operation:
    """An operation without its arrays."""

    def __init__(self, name: str, node: str, input: str, segments: Sequence[tuple[int, int]], activation: tuple[str, bool, float, float] | None, packing: str, exact: bool, route: str | None) -> None: ...

    @property
    def name(self) -> str: ...

    @property
    def input(self) -> str:
        """What its input is called."""

def project(operation: Operation, input: mlx.core.array, norm: tuple[mlx.core.array | None, float] | None, layers: Sequence, residual: mlx.core.array | None, alpha: float, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> list[mlx.core.array]:
    """
    What an operation gives for these arrays. A layer is LinearOperands or a module, which is read as it is now.
    """

def add_product(operation: Operation, product: mlx.core.array, residual: mlx.core.array, alpha: float) -> mlx.core.array | None:
    """
    ``residual + alpha * product`` as one operation; None if ``product`` is not a linear layer's output that is still to be evaluated, or the residual is not like it.
    """

def all_gradients(operation: Operation, names: Sequence[str], cotangents: Sequence[mlx.core.array], input: mlx.core.array, layers: Sequence, has_bias: bool, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> list[mlx.core.array]: ...

def attention(q: mlx.core.array, k: mlx.core.array, v: mlx.core.array, scale: float, mask: str | mlx.core.array | None, window: int | None, sinks: mlx.core.array | None, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> mlx.core.array: ...

def cross_entropy(x: mlx.core.array, layer: Sequence, targets: mlx.core.array, mask: mlx.core.array | None, ignore_index: int | None, scale: float, softcap: float | None, label_smoothing: float, route: str | None, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None, blocks: tuple[int, int] | None = None) -> mlx.core.array: ...

def head_of(logits: mlx.core.array) -> tuple[mlx.core.array, tuple[mlx.core.array, mlx.core.array | None, mlx.core.array | None, mlx.core.array | None, int | None, int | None, str, mlx.core.array | None, mlx.core.array | None, float], float, float | None] | str:
    """
    What unevaluated logits are made from: the head's input, its LinearOperands as a tuple, the scale and the softcap; or why a model's loss cannot be made of that.
    """

def embedding(x: mlx.core.array, table: object, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> mlx.core.array: ...

def rms_norm(x: mlx.core.array, weight: mlx.core.array | None, eps: float, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> mlx.core.array: ...

def rope(x: mlx.core.array, dims: int, traditional: bool, base: float | None, scale: float, offset: int | mlx.core.array, freqs: mlx.core.array | None, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> mlx.core.array: ...

def difference(layers: Sequence) -> str | None:
    """
    Why one operation cannot compute these layers of the same input; None if it can.
    """

def has_quantized_kernels(group_size: int | None, bits: int | None, mode: str) -> bool:
    """
    Whether we have kernels for weights of this format; other formats run on MLX's own operation.
    """

def last_decision() -> tuple[str, str, str]:
    """Of this thread's latest call: its route, what decided that, and why."""

def set_tuned_routes(device: mlx.core.DeviceType, routes: Sequence[tuple[tuple[bool, bool, mlx.core.Dtype, tuple[str, int, int] | None, bool, int, Sequence[int], Sequence[int]], Mapping[int, str | None]]]) -> None:
    """
    Replaces the measured routes, by kind of call and rows; None where neither is clearly the faster.
    """

def tuned_route(kind: tuple[bool, bool, mlx.core.Dtype, tuple[str, int, int] | None, bool, int, Sequence[int], Sequence[int]], rows: int) -> str | None:
    """The measured route of such calls; None if the built-in table decides."""

class Kind:
    """
    What modules are, but for the values of their arrays: types, dtypes, shapes and settings.
    """

    def __init__(self, *modules) -> None: ...

    def is_of(self, *modules) -> bool:
        """Whether these modules are what those were."""

def alias(a: mlx.core.array) -> mlx.core.array:
    """
    A second Python object for the same MLX array. It keeps its value when ``a`` is changed in place.
    """

def of_class(cls: object, a: mlx.core.array, origin: object) -> object:
    """An alias of a subclass of Derived."""

def has_kernels(x: object | None) -> bool:
    """Whether it is an array with axes, of a type with kernels."""

def norm_of(norm: object, x: object | None) -> mlx.core.array | None:
    """
    What ``norm``, an mlx.nn.RMSNorm, makes of x; None if x, the weight or eps is of a type without kernels.
    """

def on_gpu() -> bool:
    """Whether the default device is a GPU."""

def add_to(object: object, name: object, count: int) -> None:
    """Adds to an attribute, a number that other threads count too."""

def count(calls: object, total: int, fused: int, reason: object | None = None, is_routed: bool = True) -> None:
    """
    Counts calls; and for fused ones, where routing sent this thread's latest operation. The reason is why a call was not fused.
    """

def switched_off() -> bool:
    """Whether ``MLX_FUSED`` makes patched models run their own code."""

def own_method(cls: object, name: object) -> object:
    """
    The method of an unpatched class as it is now: others may have replaced it (grad_checkpoint does).
    """

def can_norm(x: mlx.core.array) -> bool:
    """Whether a kernel for Metal that projects x may norm it as well."""

class StandIn:
    """
    Replaces a layer of a running module: its call is ``run(call, name, layer, x)`` and, if given, ``as_linear`` another one; all else is the layer's.
    """

    def __call__(self, /, *args, **kwargs):
        """Call self as a function."""

    def __getattribute__(self, name, /):
        """Return getattr(self, name)."""

    def __init__(self, layer: object, call: object, name: object, run: object | None, as_linear: object | None = None) -> None: ...

    def __contains__(self, *args): ...

    def __delattr__(self, *args): ...

    def __delitem__(self, *args): ...

    def __dir__(self, *args): ...

    def __eq__(self, *args): ...

    def __getitem__(self, *args): ...

    def __ior__(self, *args): ...

    def __iter__(self, *args): ...

    def __len__(self, *args): ...

    def __ne__(self, *args): ...

    def __or__(self, *args): ...

    def __repr__(self, *args): ...

    def __reversed__(self, *args): ...

    def __ror__(self, *args): ...

    def __setattr__(self, *args): ...

    def __setitem__(self, *args): ...

    def __sizeof__(self, *args): ...

    def __str__(self, *args): ...

    def __hash__(self): ...

class Slot:
    """
    The attribute of a layer in a patched class: outside of calls the layer. Inside it is a StandIn if the layer's type is one of ``types``, else what ``stand_in`` of the running call returns.
    """

    def __get__(self, instance, owner=None, /):
        """Return an attribute of instance, which is of type owner."""

    def __set__(self, instance, value, /):
        """Set an attribute of instance to value."""

    def __delete__(self, instance, /):
        """Delete an attribute of instance."""

    def __init__(self, name: object, run: object | None, types: object) -> None: ...

def run_as(call: object | None, module: object, function: object, args: tuple, kwargs: dict) -> object:
    """
    ``function(*args, **kwargs)``, during which ``call`` is this thread's running call, of ``module``.
    """

def running() -> object:
    """This thread's running call; None if there is none."""

def is_new_input(x: mlx.core.array) -> bool:
    """
    Whether the running call has not asked this of ``x`` last. Then nothing is shared any more.
    """

def share(names: tuple, outputs: list, own: object) -> object:
    """
    What stand-ins of these names return if they are called once with the latest new input, and their layers are what they are now: outputs, or functions of the layer and the input that return them. Returns that of the name ``own``.
    """

def layer_of(value: object | None) -> object:
    """The layer that a stand-in replaces; anything else is itself."""
