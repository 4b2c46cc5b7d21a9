"""A transformer of one's own made of ``mlx_fused.nn``: trained, quantized, and fine-tuned with QLoRA.

python examples/transformer.py
"""

import json
import string
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_fused
from mlx_fused.nn import GatedMLP, OutputProjection, QKVProjection

DIMS, HEADS, KV_HEADS, HEAD_DIM, LAYERS, LENGTH = 64, 4, 2, 16, 2, 64  # sizes: multiples of 32, to quantize


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(DIMS), nn.RMSNorm(DIMS)
        self.qkv = QKVProjection(DIMS, HEADS, KV_HEADS, HEAD_DIM)
        self.output = OutputProjection(HEADS * HEAD_DIM, DIMS)
        self.mlp = GatedMLP(DIMS, 2 * DIMS)

    def __call__(self, x):
        q, k, v = self.qkv(self.attention_norm(x))  # one operation; heads are split
        q, k = (mlx_fused.fused_rope(a, HEAD_DIM) for a in (q, k))
        y = mlx_fused.fused_attention(q, k, v, scale=HEAD_DIM**-0.5, mask="causal")  # or window=32 with it
        x = self.output(y.swapaxes(1, 2).flatten(2), residual=x)  # one operation, x + ... included
        return self.mlp(self.mlp_norm(x), residual=x)  # two operations


class Transformer(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, DIMS), nn.Linear(DIMS, vocabulary)
        self.layers = [Block() for _ in range(LAYERS)]  # the name that mlx-lm's tools expect

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def train(model, text, steps, learning_rate):
    tokens = np.array([string.printable.index(c) for c in text])
    starts = np.random.default_rng(0).integers(len(tokens) - LENGTH, size=(steps, 4, 1))
    batches = mx.array(tokens[starts + np.arange(LENGTH)])
    optimizer = optim.Adam(learning_rate)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def loss_fn(batch):
        return nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:], reduction="mean")

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch):
        loss, gradients = nn.value_and_grad(model, loss_fn)(batch)
        optimizer.update(model, gradients)
        return loss

    losses = []
    for batch in batches:
        losses.append(step(batch))
        mx.eval(state, losses[-1])
    print(f"  loss {losses[0].item():.2f} -> {losses[-1].item():.2f} in {steps} steps")


mx.random.seed(0)
model = Transformer(len(string.printable))
print("training on code")
train(model, Path(json.__file__).read_text(), steps=60, learning_rate=4e-3)

print("quantizing to 4 bits: mlx.nn.quantize")
nn.quantize(model, group_size=32)
model.freeze()  # after quantizing, which makes new layers

print("adding adapters: mlx-lm's linear_to_lora_layers")
linear_to_lora_layers(model, LAYERS, {"rank": 8, "scale": 2.0, "dropout": 0.0})
print("training the adapters on prose")
train(model, mlx_fused.patch.__doc__, steps=60, learning_rate=4e-3)
print(model.layers[0].qkv)

adapters = dict(tree_flatten(model.trainable_parameters()))
mx.save_safetensors("transformer-adapters.safetensors", adapters)
# Later, once a model has gone through the same steps:
model.load_weights("transformer-adapters.safetensors", strict=False)
print(f"saved and loaded {len(adapters)} arrays")
