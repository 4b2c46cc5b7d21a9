"""Counts the nodes of a compiled QLoRA step, stock and patched, and writes docs/design/graph.md's table."""

import os
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_fused
from graph import primitives

DOCUMENT = Path(__file__).parents[1] / "docs" / "design" / "graph.md"
HIDDEN, LORA = 64, {"rank": 8, "scale": 20.0, "dropout": 0.0}
VIEWS = (
    "Broadcast",
    "ExpandDims",
    "Flatten",
    "Projection",  # the composed form's, which only passes on
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unflatten",
    "Unpack",
)
KINDS = ("QuantizedMatmul", "Matmul", "mlx-fused's", "elementwise, reductions, copies", "views and reshapes")


def kind(primitive):
    if primitive in KINDS:
        return primitive
    if primitive == "AddMM":
        return "Matmul"
    if primitive.startswith("Fused"):
        return "mlx-fused's"
    return "views and reshapes" if primitive in VIEWS else "elementwise, reductions, copies"


def count(*arrays):
    kinds = Counter()
    for primitive, n in primitives(*arrays).items():
        kinds[kind(primitive)] += n
    return kinds


class Projections(nn.Module):
    """Of an attention module, its QKV projections alone, with mlx-lm's adapters."""

    def __init__(self):
        super().__init__()
        for name, size in (("q_proj", HIDDEN), ("k_proj", HIDDEN // 2), ("v_proj", HIDDEN // 2)):
            layer = nn.QuantizedLinear(HIDDEN, size, bias=False)
            self[name] = LoRALinear.from_base(layer, r=LORA["rank"], scale=LORA["scale"])

    def __call__(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def projections(patched):
    """The nodes of QKV's share of a step: its outputs, and the gradients of the input and the adapters."""
    model = Projections()
    for module in (model.q_proj, model.k_proj, model.v_proj):
        module.linear.set_dtype(mx.bfloat16)
    names, adapters = zip(
        *((n, a) for n, a in tree_flatten(model.parameters()) if ".lora_" in n), strict=True
    )
    if patched:
        mlx_fused.patch(model)

    def forward(x, *adapters):
        model.load_weights(list(zip(names, adapters, strict=True)), strict=False)
        return model(x)

    def step(x, cotangents, adapters):
        outputs, gradients = mx.vjp(forward, [x, *adapters], cotangents)
        return [*outputs, *gradients]

    x = mx.zeros((2, 8, HIDDEN), mx.bfloat16)
    given = [mx.zeros((2, 8, n), mx.bfloat16) for n in (HIDDEN, HIDDEN // 2, HIDDEN // 2)]
    mx.eval(model.parameters(), x, given)
    return count(*mx.compile(step)(x, given, list(adapters)))


def step(layers, patched):
    """The nodes of the loss and the gradients of a whole model, as mlx-lm's trainer makes them."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 128, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 128, "rms_norm_eps": 1e-5}
    model = llama.Model(llama.ModelArgs(model_type="llama", num_hidden_layers=layers, **sizes))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=64, bits=4)
    model.freeze()
    linear_to_lora_layers(model, layers, LORA)
    model.train()
    mx.eval(model.parameters())
    if patched:
        mlx_fused.patch(model)
    value_and_grad = nn.value_and_grad(model, default_loss)
    compiled = mx.compile(lambda *batch: value_and_grad(model, *batch), inputs=[model.state])
    batch = mx.zeros((2, 9), mx.int32), mx.array([[0, 8], [0, 8]])
    (loss, tokens), gradients = compiled(*batch)
    return count(loss, tokens, *(g for _, g in tree_flatten(gradients)))


def layer(patched):
    """The nodes that one more layer adds."""
    return step(3, patched) - step(2, patched)


def composed():
    """QKV's nodes, patched, where routing chooses MLX's own operations."""
    with patch.dict(os.environ, MLX_FUSED_ROUTE="composed"):
        return projections(True)


def table():
    columns = {
        "QKV, stock": projections(False),
        "QKV, patched": projections(True),
        "QKV, composed": composed(),
    }
    columns |= {"layer, stock": layer(False), "layer, patched": layer(True)}
    lines = [[name, *(c[name] for c in columns.values())] for name in KINDS]
    lines.append(["**in all**", *(f"**{c.total()}**" for c in columns.values())])
    header = f"| nodes | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}\n"
    return header + "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def with_table(text):
    """The document, its table the one counted now."""
    head, begin, tail = text.partition("<!-- nodes -->\n")
    _, end, tail = tail.partition("<!-- end -->\n")
    return head + begin + table() + end + tail


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
