"""Adds the residual inside the output projection, without changing the layer's code.

A patched output projection returns a ``Projected``: a normal array whose class overloads ``+``. Adding the
residual to it runs one operation that projects and adds; any other use works on the array as usual. If a
layer used the array in other ways as well, the projection would be computed twice. So ``obstacle`` reads the
source of the layer's class beforehand, and only layers that just add the array are patched.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

import mlx.core as mx
import mlx.nn as nn

from mlx_fused import _ext
from mlx_fused._ext import of_class
from mlx_fused.operations import fused_output_projection_residual
from mlx_fused.operations.call import batched, unbatched
from mlx_fused.operations.residual import residual_operation
from mlx_fused.patching.derived import Derived
from mlx_fused.patching.projections import Operation, tell
from mlx_fused.patching.report import Calls

# By whether every step is rounded, and whether our kernels must run.
OPERATIONS = {
    (exact, forced): Operation(
        fused_output_projection_residual,
        residual_operation(exact, route),
        {"exact": exact, "route": route},
    )
    for exact in (False, True)
    for forced, route in ((False, None), (True, "fused"))
}


class Product:
    """A projection that is still to be added."""

    __slots__ = ("_arguments", "_array", "_calls", "_module", "_operation")

    def __init__(
        self, array: mx.array, operation: Operation, calls: Calls, module: nn.Module, arguments: dict
    ):
        self._array, self._operation, self._calls = array, operation, calls
        self._module, self._arguments = module, arguments  # for a watcher

    def plus(self, residual: mx.array, alpha: float) -> mx.array | None:
        """``residual + alpha * product``; None if that cannot be one operation."""
        function, made, _ = self._operation
        rows, leading = (residual, None) if residual.ndim == 3 else batched(made.name, residual)
        y = _ext.add_product(made, self._array, rows, alpha)
        if y is None:
            return None
        self._calls.add(0, 1)
        if self._arguments:
            tell(self._module, function, self._arguments | {"residual": rows, "alpha": alpha}, y)
        return y if leading is None else unbatched(y, leading)


class Projected(Derived):
    """The output of a projection. ``+`` computes the projection and the addition as one operation."""

    _origin: tuple[tuple[Product, float], ...] | None  # what it is the sum of, with factors
    _alpha = 1.0  # the factor of all of them

    @classmethod
    def of(cls, y: mx.array, origin: tuple[tuple[Product, float], ...], alpha: float = 1.0) -> Projected:
        self = of_class(cls, y)
        self._origin, self._alpha = origin, alpha
        return self

    def __add__(self, other):
        origin = self._origin
        if origin is None or not isinstance(other, mx.array) or not self._is_like(other):
            return super().__add__(other)
        if type(other) is Projected and other._origin is not None:
            return Projected.of(super().__add__(other), (*self._scaled(), *other._scaled()))
        y = other
        for product, factor in reversed(origin):
            y = product.plus(y, factor * self._alpha)
            if y is None:
                return super().__add__(other)
        return y

    __radd__ = __add__

    def __mul__(self, other):
        product = super().__mul__(other)
        if type(other) not in (int, float) or self._origin is None or self._alpha != 1:
            return product
        # MLX rounds a Python number to the array's dtype.
        return Projected.of(product, self._origin, mx.array(other, self.dtype).item())

    __rmul__ = __mul__

    def _is_like(self, other: mx.array) -> bool:
        """Whether the sum may be an operation. With three axes the extension compares the shapes."""
        ndim = self.ndim
        return other.ndim == ndim and (ndim == 3 or other.shape == self.shape)

    def _scaled(self) -> Iterator[tuple[Product, float]]:
        return ((product, factor * self._alpha) for product, factor in self._origin)


@cache
def obstacle(layer: type[nn.Module], name: str) -> str | None:
    """Why it is not certain that ``layer`` only adds the output of its module ``name``; None if it is."""
    owner, code = _find_call(layer)
    if code is None:
        return f"the code of {owner.__name__} cannot be read"
    flow = _Flow(code)
    called = f"{flow.owner}.{name}"
    calls = [n for n in ast.walk(code) if isinstance(n, ast.Call) and ast.unparse(n.func) == called]
    if not calls:
        return f"{owner.__name__} does not call it"
    return next((f"{owner.__name__} {use}" for call in calls if (use := flow.other_use(call))), None)


def _find_call(layer: type[nn.Module]) -> tuple[type, ast.FunctionDef | None]:
    """The class that defines ``__call__`` for ``layer``, and its code; None if the source cannot be read."""
    # Reads the source of the class rather than of the function: mlx-lm's grad_checkpoint replaces the
    # function, or adds one to a class that inherited it.
    for owner in layer.__mro__:
        if "__call__" not in vars(owner):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError, SyntaxError):
            return owner, None
        match [node for node in ast.walk(tree) if _binds_call(node)]:
            case []:
                continue
            case [ast.FunctionDef() as code]:
                return owner, code
            case _:
                return owner, None
    return layer, None


def _binds_call(node: ast.AST) -> bool:
    match node:
        case ast.FunctionDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
            return name == "__call__"
    return False


class _Flow:
    """Where the value of an expression goes in a function."""

    def __init__(self, code: ast.FunctionDef):
        self.owner = next((arg.arg for arg in (*code.args.posonlyargs, *code.args.args)), None)  # self
        self.parents = {child: node for node in ast.walk(code) for child in ast.iter_child_nodes(node)}
        self.names = [node for node in ast.walk(code) if isinstance(node, ast.Name)]

    def other_use(self, value: ast.expr) -> str | None:
        """What the function does with ``value`` other than adding it; None if nothing."""
        parent = self.parents[value]
        match parent:
            case ast.BinOp(op=ast.Add()):
                return None
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                factor = left if right is value else right
                if any(map(self._is_variable, ast.walk(factor))):
                    return f"multiplies its output by {ast.unparse(factor)}"
                return self.other_use(parent)
            case ast.IfExp():
                return self.other_use(parent)
            case ast.Assign(targets=[ast.Name(id=name)]):
                loads = list(self._loads(name, parent))
                if any(not self._exclusive(a, b) for a in loads for b in loads if a is not b):
                    return "uses its output more than once"
                return next(filter(None, map(self.other_use, loads)), None) if loads else "does not use it"
            case ast.Assign():
                return "takes more than one result from it"
            case ast.Call():
                return f"gives its output to {ast.unparse(parent.func)}"
            case _:
                return "does not add its output"

    def _loads(self, name: str, assignment: ast.Assign) -> Iterator[ast.Name]:
        """Where the function reads ``name`` while it holds the value from ``assignment``."""
        after = [
            n
            for n in self.names
            if n.id == name and _end(n) > _end(assignment) and not self._exclusive(n, assignment)
        ]
        stores = [_end(self.parents[n]) for n in after if isinstance(n.ctx, ast.Store)]
        return (n for n in after if isinstance(n.ctx, ast.Load) and _end(n) <= min(stores, default=_end(n)))

    def _is_variable(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id != self.owner

    def _exclusive(self, a: ast.AST, b: ast.AST) -> bool:
        """Whether ``a`` and ``b`` are in different branches of an ``if``."""
        branches = dict(self._branches(a))
        return any(branches.get(test, taken) is not taken for test, taken in self._branches(b))

    def _branches(self, node: ast.AST) -> Iterator[tuple[ast.If, bool]]:
        while (parent := self.parents.get(node)) is not None:
            if isinstance(parent, ast.If) and node is not parent.test:
                yield parent, node in parent.body
            node = parent


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset
