"""What a function of a model computes, read from its source.

A function becomes nested tuples, its operations by identity: ``self.down_proj(swiglu(self.gate_proj(x),
self.up_proj(x)))`` is ``("layer", "down_proj", ("*", ("silu", ("layer", "gate_proj", X)), ("layer",
"up_proj", X)))``. Only straight code is read, and whatever is not known exactly is an error.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from types import CodeType, FunctionType, ModuleType, NoneType

import mlx.core as mx
import mlx.nn as nn

X = ("x",)  # the function's argument
_KNOWN = {
    id(f): name
    for f, name in (
        (nn.silu, "silu"),
        (nn.gelu, "gelu"),
        (nn.gelu_approx, "gelu_approx"),
        (nn.relu, "relu"),
        (nn.relu2, "relu2"),
        (nn.sigmoid, "sigmoid"),
        (mx.sigmoid, "sigmoid"),
        (mx.square, "square"),
        (mx.minimum, "minimum"),
        (mx.clip, "clip"),
        (mx.split, "split"),
    )
}
_MODULES = {nn.SiLU: "silu", nn.ReLU: "relu", nn.ReLU2: "relu2"}
_TRANSFORMED = type(nn.silu)  # what mx.compile returns, but also mx.vmap and mx.grad
_COMPILE = ("mx.compile", "partial(mx.compile, shapeless=True)")
_OPERATORS = {ast.Mult: "*", ast.Add: "+"}
_TESTS = {
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
    ast.Gt: lambda a, b: a > b,
    ast.Eq: lambda a, b: a == b,
    ast.In: lambda a, b: a in b,
}


class Unknown(Exception):
    """The code does something that is not known; the message says what."""


def formula_of(module: nn.Module, method: Callable, is_leaf: Callable[[object], bool]) -> tuple:
    """What ``method`` returns for ``module``, as nested tuples in which layers that are leaves have names.

    Raises:
        Unknown: If that cannot be told.
    """
    return _Reader(module, is_leaf).call(method, [module, X], {}, "__call__")


class _Reader:
    def __init__(self, module: nn.Module, is_leaf: Callable[[object], bool]):
        # Layers are known by identity, wherever a helper reads them.
        self.names = {id(child): name for name, child in module.items() if isinstance(child, nn.Module)}
        self.is_leaf = is_leaf

    def call(self, function: object, args: list, kwargs: dict, name: str):
        if (known := _KNOWN.get(id(function))) is not None:
            return _applied(known, args, kwargs)
        if isinstance(function, nn.Module):
            if not kwargs and id(function) in self.names and self.is_leaf(function):
                return ("layer", self.names[id(function)], *args)
            if not kwargs and type(function) in _MODULES:
                return (_MODULES[type(function)], *args)
            method = getattr(type(function), "__call__", None)  # noqa: B004
            args, name, function = [function, *args], f"{name} ({type(function).__name__})", method
        # What MLX made of something else than a Python function has neither code nor closure.
        if type(function) not in (FunctionType, _TRANSFORMED) or getattr(function, "__closure__", True):
            raise Unknown(f"calls {name}")
        definition = _definition(function.__code__)
        if definition is None:
            raise Unknown(f"calls {name}, whose code cannot be read")
        if type(function) is _TRANSFORMED and not _is_compiled(function, definition):
            raise Unknown(f"calls {name}, which may be more than its code")
        env = _bound(definition, args, kwargs, function.__defaults__ or ())
        return self.run(definition.body, env, function.__globals__)

    def run(self, body: list[ast.stmt], env: dict, scope: dict):
        for statement in body:
            match statement:
                case ast.Expr(value=ast.Constant()):
                    continue
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    env[name] = self.value(value, env, scope)
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value) if all(
                    isinstance(target, ast.Name) for target in targets
                ):
                    parts = self.value(value, env, scope)
                    for i, target in enumerate(targets):
                        env[target.id] = _item(parts, i, len(targets))
                case ast.Return(value=value) if value is not None:
                    if (result := self.value(value, env, scope)) is None:
                        raise Unknown("returns None")
                    return result
                case ast.If(test=test, body=then, orelse=otherwise):
                    decision = self.value(test, env, scope)
                    if not isinstance(decision, (int, float, str, NoneType)):
                        raise Unknown(f"decides by {ast.unparse(test)}")
                    taken = then if decision else otherwise
                    if (result := self.run(taken, env, scope)) is not None:
                        return result
                case _:
                    raise Unknown(f"does more: {ast.unparse(statement).splitlines()[0]}")
        return None

    def value(self, node: ast.expr, env: dict, scope: dict):
        value = self._value(node, env, scope)
        if isinstance(value, mx.array):  # it may change, and may have a gradient
            raise Unknown(f"uses {ast.unparse(node)}, an array")
        return value

    def _value(self, node: ast.expr, env: dict, scope: dict):
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                for names in (env, scope, vars(builtins)):
                    if name in names:
                        return names[name]
            case ast.Attribute(value=of, attr=name):
                owner = self.value(of, env, scope)
                if isinstance(owner, tuple):
                    return ("attribute", name, owner)
                if isinstance(owner, ModuleType) and hasattr(owner, name):
                    return getattr(owner, name)
                if isinstance(owner, nn.Module) and _is_read_anew(owner, name):
                    return getattr(owner, name)
            case ast.Subscript(value=of, slice=ast.Constant(value=int(i))):
                return _item(self.value(of, env, scope), i, 2)
            case ast.Subscript(value=of, slice=key):
                table, chosen = self.value(of, env, scope), self.value(key, env, scope)
                if type(table) is dict and isinstance(chosen, str) and chosen in table:
                    return table[chosen]
            case ast.UnaryOp(op=ast.USub(), operand=of):
                operand = self.value(of, env, scope)
                if isinstance(operand, (int, float)):
                    return -operand
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _TESTS:
                sides = self.value(left, env, scope), self.value(right, env, scope)
                if not any(isinstance(side, tuple) for side in sides):
                    return _TESTS[type(op)](*sides)
            case ast.List(elts=items) | ast.Set(elts=items):
                return [self.value(item, env, scope) for item in items]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return (
                    _OPERATORS[type(op)],
                    self.value(left, env, scope),
                    self.value(right, env, scope),
                )
            case ast.Call(func=func, args=args, keywords=keywords) if all(k.arg for k in keywords):
                function = self.value(func, env, scope)
                args = [self.value(a, env, scope) for a in args]
                kwargs = {k.arg: self.value(k.value, env, scope) for k in keywords}
                if isinstance(function, tuple):  # a method of an array
                    if function[:2] == ("attribute", "square") and not args and not kwargs:
                        return ("square", function[2])
                    raise Unknown(f"does more: {ast.unparse(node)}")
                return self.call(function, args, kwargs, ast.unparse(func))
        raise Unknown(f"does more: {ast.unparse(node)}")


def _applied(known: str, args: list, kwargs: dict):
    if known == "split":
        axis = kwargs.pop("axis", None)
        if args[1:] == [2] and axis == -1 and not kwargs:
            return ("split", args[0])
        raise Unknown("splits otherwise than in halves of the last axis")
    if known == "clip":
        args = [*args, *(kwargs.pop(name) for name in ("a_min", "a_max") if name in kwargs)]
    if kwargs:
        raise Unknown(f"calls {known} with {', '.join(kwargs)}")
    return (known, *args)


def _item(parts, i: int, count: int):
    if isinstance(parts, tuple) and parts[0] == "split" and count == 2 and i in (0, 1):
        return ("half", i, parts[1])
    raise Unknown("takes parts of something")


def _bound(definition: ast.FunctionDef, args: list, kwargs: dict, defaults: tuple) -> dict:
    given = definition.args
    names = [a.arg for a in given.args]
    if given.vararg or given.kwarg or given.kwonlyargs or given.posonlyargs or len(args) > len(names):
        raise Unknown(f"calls {definition.name} in an unusual way")
    env = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) if defaults else {}
    env |= dict(zip(names, args, strict=False)) | kwargs
    if env.keys() != set(names):
        raise Unknown(f"calls {definition.name} in an unusual way")
    return env


def _is_read_anew(module: nn.Module, name: str) -> bool:
    """Whether a change of the attribute changes the kind of ``module``, unlike one of its class or in a list.

    Of the class only functions are read; ``training`` is a property of an attribute.
    """
    if name in module or name in vars(module) or name == "training":
        return type(getattr(module, name)) not in (list, dict, set)
    return type(getattr(type(module), name, None)) in (FunctionType, _TRANSFORMED)


def _is_compiled(function: Callable, definition: ast.FunctionDef) -> bool:
    """Whether ``function`` is what ``mx.compile`` made of its own definition, and nothing else since."""
    decorators = [ast.unparse(decorator) for decorator in definition.decorator_list]
    is_own = function.__globals__.get(definition.name) is function
    return is_own and len(decorators) == 1 and decorators[0] in _COMPILE


@cache
def _definition(code: CodeType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree.body[0] if len(tree.body) == 1 and isinstance(tree.body[0], ast.FunctionDef) else None
