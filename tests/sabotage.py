"""Makes one operand or one gradient of the fused operations 1 % wrong; the checks must notice each.

`python tests/sabotage.py` does it to every part of six families of models and writes docs/design/sabotage.md.
"""

import importlib
import math
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

import mlx_fused
import oracle
from mlx_fused import LinearOperands, losses
from mlx_fused._ext import count
from mlx_fused.operations.call import batched, unbatched
from mlx_fused.patching import attention, calls, projections, residual
from mlx_fused.validate import attention as formulas
from mlx_fused.validate import operations
from mlx_fused.validate.checkpoint import attach_adapters, batch_of
from mlx_fused.validate.operations import (
    OperationChecks,
    differentiable,
    function_of,
    layers_of,
    segment_names,
    with_layers,
)
from tiny_models import shake

DOCUMENT = Path(__file__).parent.parent / "docs" / "design" / "sabotage.md"
FACTOR = 1.01
TOKENS = 24

_SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,  # more than tiny_demo's tokenizer has
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 128,
}
_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 3}
# What is no size; biases where there is a choice.
FAMILIES = {
    "llama": {"attention_bias": True},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": False},
    "gemma3_text": {"head_dim": 32, "sliding_window": 8, "sliding_window_pattern": 2},
    "gpt_oss": {
        **_EXPERTS,
        "head_dim": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": _EXPERTS,
    "granite": {
        "attention_bias": True,
        "mlp_bias": False,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 0.22,
    },
}
QUANTIZATION = {"group_size": 32, "bits": 4}
WEIGHTS = ("float32", "bfloat16", "4-bit bfloat16")


class Target(NamedTuple):
    """What is sabotaged: the operand in the forward or, in the gradient of another, in the backward."""

    operand: str
    segment: str  # q, k, v, gate, up, o (with a residual), y (without); of what is a call's own, all of these
    gradient: str | None = None  # of which operand; its own is multiplied itself


class Float32Experts(SwitchLinear):
    """MLX's gather_mm on CPUs knows float32 only."""

    def __call__(self, x, indices, sorted_indices=False):
        inner = SwitchLinear(1, 1, 1, bias="bias" in self)
        inner.update({name: parameter.astype(mx.float32) for name, parameter in self.items()})
        return inner(x.astype(mx.float32), indices, sorted_indices).astype(x.dtype)


def config(family):
    return {**_SIZES, "model_type": family, **FAMILIES[family]}


def make(family, weights):
    """A tiny model of the family, with random parameters."""
    mx.random.seed(0)
    module = importlib.import_module(f"mlx_lm.models.{family}")
    model = module.Model(module.ModelArgs.from_dict(config(family)))
    shake(model)
    model.set_dtype(mx.float32 if weights == "float32" else mx.bfloat16)
    if weights.startswith("4-bit"):
        nn.quantize(model, **QUANTIZATION, class_predicate=_can_be_quantized)
    for experts in model.modules():
        if type(experts) is SwitchLinear:
            experts.__class__ = Float32Experts
    mx.eval(model.parameters())
    return model


def _can_be_quantized(_, module):
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


def prompt():
    return mx.random.randint(0, _SIZES["vocab_size"], (TOKENS,), key=mx.random.key(1))


def adapt(model):
    with mlx_fused.patched(model) as report:
        layers = report.modules
    attach_adapters(model, prompt(), layers)


@contextmanager
def wrapped(wrap):
    """Let patched models run ``wrap`` of each operation, as the function that users call."""

    def tell(module, function, arguments):
        outputs = (made := wrap(function))(**arguments)
        projections.tell(module, made, arguments, outputs)
        return outputs

    def run(operation, module, layers, x, norm=None):
        rows, leading = (x, None) if x.ndim == 3 else batched("", x)
        outputs = oracle.leaves(
            tell(module, operation.function, operation.arguments(rows, layers, norm=norm))
        )
        return outputs if leading is None else [unbatched(y, leading) for y in outputs]

    def plus(product, operation, calls, module, arguments, shape, residual, alpha):
        count(calls, 0, 1)
        return tell(module, operation.function, arguments | {"residual": residual, "alpha": alpha})

    with (
        mock.patch.object(projections.Operation, "__call__", run),
        mock.patch.object(residual, "plus", plus),
        mock.patch.object(attention, "fused_attention", wrap(mlx_fused.fused_attention)),
        mock.patch.object(formulas, "_FEW", 0),  # as wrapped, all results are those of `with_gradient`
        mock.patch.object(losses, "fused_linear_cross_entropy", wrap(mlx_fused.fused_linear_cross_entropy)),
        mock.patch.object(calls, "watcher_of_thread", lambda: True),
    ):
        yield


def targets(model):
    """Everything that the fused operations of the model have to be sabotaged."""
    found = []

    def note(operation):
        def run(**arguments):
            found.extend(targets_of(arguments))
            return operation(**arguments)

        return run

    with wrapped(note), mlx_fused.patched(model):
        mx.eval(model(prompt()[None]), losses.cross_entropy_loss(model, *batch_of(prompt())))
    return list(dict.fromkeys(found))


def targets_of(arguments):
    """Everything that a call has to be sabotaged."""
    for operand, segment in _named(arguments):
        if operand not in ("input", "x"):
            yield Target(operand, segment)
        if operand != "weight" or layers_of(arguments)[0].scales is None:  # frozen if quantized
            yield Target(operand, segment, operand)
        if operand in ("weight", "lora_a"):  # its part of what all parts add up to
            yield Target(operand, segment, _activations(arguments))


def sabotage(target, factor=FACTOR):
    """Make the target wrong in all operations that have it."""

    def wrap(operation):
        def run(**arguments):
            if (target.operand, target.segment) not in _named(arguments):
                return operation(**arguments)
            return sabotaged(operation, arguments, target, factor)

        return run

    return wrapped(wrap)


def is_noticed(model, target, factor=FACTOR):
    class Checks(OperationChecks):
        """Of the calls that have the target."""

        def __call__(self, module, operation, arguments, outputs):
            if (target.operand, target.segment) in _named(arguments):
                super().__call__(module, operation, arguments, outputs)

    with sabotage(target, factor), mock.patch.object(operations, "OperationChecks", Checks):
        return not passes(model)


def passes(model):
    return is_right(operations.check_operations(model, prompt()).findings)


def is_right(findings):
    return all(finding.verdict != "failed" for of in findings.values() for finding in of.values())


def with_gradient(operation, arguments):
    """What ``operation`` gives where its gradient is asked for: attention of few queries rounds otherwise."""
    if "q" not in arguments:
        return operation(**arguments)
    cotangent = mx.zeros_like(operation(**arguments))
    return mx.vjp(lambda q: [operation(**arguments | {"q": q})], [arguments["q"]], [cotangent])[0][0]


def sabotaged(operation, arguments, target, factor=FACTOR):
    operands = differentiable(arguments)
    keys = list(operands)
    honest = function_of(operation, arguments, keys)
    # Attention computes otherwise in float32, and its gradient reads its result.
    changed = _multiplied(_in_float32(arguments) if layers_of(arguments) else arguments, target, factor)

    @mx.custom_function
    def run(*values):
        if target.gradient:
            return with_gradient(operation, arguments) if "q" in arguments else honest(*values)
        outputs = with_gradient(operation, changed)
        # Losses are float32 whatever they are of.
        dtype = mx.float32 if "targets" in arguments else arguments[_activations(arguments)].dtype
        outputs = [y.astype(dtype) for y in oracle.leaves(outputs)]
        return outputs if len(outputs) > 1 else outputs[0]

    @run.vjp
    def run_vjp(values, cotangents, _):
        values, cotangents = oracle.leaves(values), oracle.leaves(cotangents)
        _, grads = mx.vjp(honest, values, cotangents)
        if target.gradient == target.operand:
            place = keys.index(_key(target, arguments))
            grads[place] = (factor * grads[place].astype(mx.float32)).astype(grads[place].dtype)
        elif target.gradient:
            place = keys.index((target.gradient, None))
            if "activation" in arguments and arguments["x"].dtype != mx.float32:
                wrong, cotangents = _linear(arguments, changed, cotangents)
            else:
                wrong = function_of(operation, changed, [keys[place]])
            wide = [g.astype(mx.float32) for g in cotangents]
            (grad,) = mx.vjp(wrong, [changed[target.gradient]], wide)[1]
            grads[place] = grad.astype(grads[place].dtype)
        return grads

    return run(*operands.values())


def _linear(arguments, changed, cotangents):
    """The changed call without its activation, and its cotangents, which are kept in the results' dtype."""

    def products(x, of):
        return [mlx_fused.fused_linear(x, layer) for layer in layers_of(of)]

    def activated(*pre):
        gate, *up = (y.astype(mx.float32) for y in pre)
        return math.prod([getattr(nn, arguments["activation"])(gate), *up])

    wide = [g.astype(mx.float32) for g in cotangents]
    grads = mx.vjp(activated, products(arguments["x"], arguments), wide)[1]
    return lambda x: products(x, changed), grads


def _in_float32(arguments):
    """A kernel's own mistake is made before it rounds."""

    def cast(value):
        if isinstance(value, tuple):  # a norm
            return tuple(map(cast, value))
        is_float = isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
        return value.astype(mx.float32) if is_float else value

    wide = {name: cast(value) for name, value in arguments.items()}
    return with_layers(wide, [LinearOperands(*map(cast, layer)) for layer in layers_of(arguments)])


def _multiplied(arguments, target, factor):
    name, place = _key(target, arguments)
    if name == "norm":
        weight, eps = arguments[name]
        return arguments | {name: (factor * weight, eps)}
    if place is None:
        return arguments | {name: factor * arguments[name]}
    layers = list(layers_of(arguments))
    names = ("scales", "biases") if name == "weight" and layers[place].scales is not None else (name,)
    values = {name: getattr(layers[place], name) for name in names}
    layers[place] = layers[place]._replace(**{n: factor * v for n, v in values.items() if v is not None})
    return with_layers(arguments, layers)


def _activations(arguments):
    return next(name for name in ("input", "x", "q") if name in arguments)


def _key(target, arguments):
    """Of the operand, as ``differentiable`` has it."""
    is_of_call = target.operand in _OF_CALL
    return target.operand, None if is_of_call else segment_names(arguments).index(target.segment)


_OF_CALL = ("input", "x", "norm", "residual", "q", "k", "v", "sinks")


def _named(arguments):
    """The operands of a call, and whose they are."""
    layers = layers_of(arguments)
    names = segment_names(arguments) if layers else ()
    of_call = " ".join(names) or "attention"
    found = [(name, of_call) for name, place in differentiable(arguments) if place is None]
    for segment, layer in zip(names, layers, strict=True):
        for name in ("weight", "bias", "lora_a", "lora_b"):
            if getattr(layer, name) is not None:
                found.append((name, segment))
    return found


_COMPONENTS = {"weight": "projection", "lora_a": "adapter", "lora_b": "adapter"}
_GRADIENTS = {"weight": "weight", "bias": "bias", "lora_a": "A", "lora_b": "B"}


def is_open(target, findings):
    """Whether validation says that it could not notice this."""
    if target.segment == "attention" and target.gradient is None and target.operand != "v":
        component = "scores"
    else:
        component = _COMPONENTS.get(target.operand, target.operand)
    kinds = {
        None: (f"{component} in {target.segment}", f"{component} of {target.segment} in gate * up"),
        target.operand: (f"{_GRADIENTS.get(target.operand)} of {target.segment}", target.operand),
    }.get(target.gradient, (f"{component} of {target.segment} in {target.gradient}",))
    return any(of[kind].verdict == "inconclusive" for of in findings.values() for kind in kinds if kind in of)


class Outcome(NamedTuple):
    family: str
    weights: str
    adapters: bool
    honest: bool  # whether it passes as it is, and with the targets multiplied by 1
    targets: list[Target]
    open: list[Target]  # not noticed, and said to be inconclusive
    missed: list[Target]


def judge(family, weights):
    """Sabotage one family with one kind of weights, without adapters and with them."""
    model = make(family, weights)
    outcomes = []
    for adapters in (False, True):
        if adapters:
            adapt(model)
        aims = targets(model)
        findings = operations.check_operations(model, prompt()).findings
        missed = [target for target in aims if not is_noticed(model, target)]
        open = [target for target in missed if is_open(target, findings)]
        honest = is_right(findings) and not any(is_noticed(model, target, 1.0) for target in aims)
        missed = [target for target in missed if target not in open]
        outcomes.append(Outcome(family, weights, adapters, honest, aims, open, missed))
    return outcomes


def table_row(without, with_adapters):
    cells = [without.family, without.weights]
    for outcome in (without, with_adapters):
        noticed = len(outcome.targets) - len(outcome.missed) - len(outcome.open)
        cells += ["passes" if outcome.honest else "FAILS", f"{noticed} of {len(outcome.targets)}"]
    return "| " + " | ".join(cells) + " |"


def document(outcomes):
    """docs/design/sabotage.md."""
    count = sum(len(o.targets) for pair in outcomes for o in pair)
    missed, open = (sum(len(getattr(o, of)) for pair in outcomes for o in pair) for of in ("missed", "open"))
    lines = [
        "# Sabotage of the fused operations",
        "",
        "Written by `python tests/sabotage.py`. In tiny random models of six families, patched, one thing",
        "at a time is made 1 % wrong: the weight of q, k, v, gate or up, of what is added to the residual,",
        "of any other linear layer, or as the loss reads it, a bias, the A or the B of an adapter, or the",
        "residual, as the forward reads it; the gradient of any of these, or of the activations; and the",
        "part of the activations' gradient that comes through one projection or one adapter. The checks in",
        "`mlx-fused validate` must fail then, and pass where nothing is wrong: on the model as it is, and",
        "with all the same things multiplied by 1 and not by 1.01. What they do not notice they must call",
        "inconclusive: the gradients of gate and up are kept in 16 bits, and those of logits are multiplied",
        "in 16 bits, and where these may round either way, a small part behind them is hidden.",
        "",
        "| model | weights | honest | sabotage noticed | honest, with adapters | sabotage noticed |",
        "|---|---|---|---|---|---|",
    ]
    lines += [table_row(*pair) for pair in outcomes]
    lines += ["", f"{count - missed - open} of {count} noticed, {open} inconclusive, {missed} missed."]
    return "\n".join(lines) + "\n"


def main():
    outcomes = []
    for family in FAMILIES:
        for weights in WEIGHTS:
            outcomes.append(judge(family, weights))
            print(table_row(*outcomes[-1]), *(t for o in outcomes[-1] for t in o.open + o.missed), flush=True)
    DOCUMENT.write_text(document(outcomes))


if __name__ == "__main__":
    main()
