"""A LoRA step of a model with Gemma3-1B's head in a process that may allocate so much and no more.

``python limited_memory.py stock|loss|ours [MB]``: mlx-lm's own code, a patched model with mlx-lm's loss, or
with ours; and what may be allocated after the weights are there. Prints the loss and the peak.
"""

import re
import resource
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.models import gemma3_text
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_fused
from mlx_fused.losses import cross_entropy_loss

TOKENS, WORDS, WIDTH = 4096, 262_144, 1152


def model():
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "intermediate_size": 6912, "vocab_size": WORDS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
    sizes |= {"sliding_window_pattern": 1}
    mx.random.seed(0)
    made = gemma3_text.Model(gemma3_text.ModelArgs.from_dict({"model_type": "gemma3_text", **sizes}))
    made.pop("lm_head")
    made.tie_word_embeddings = True
    rows = mx.random.normal((WORDS // 64, WIDTH)) / WIDTH**0.5  # few, since a random number takes ten bytes
    made.model.embed_tokens.weight = mx.tile(rows.astype(mx.bfloat16), (64, 1))
    made.set_dtype(mx.bfloat16)
    made.freeze()
    linear_to_lora_layers(made, 1, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    made.train()
    mx.eval(made.parameters())
    mx.clear_cache()
    return made


def limit(megabytes):
    data = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (data + (megabytes << 20),) * 2)


def main(who, megabytes=None):
    trained = model()
    if who != "stock":
        mlx_fused.patch(trained)
    loss = cross_entropy_loss if who == "ours" else default_loss
    optimizer = optim.Adam(1e-5)
    optimizer.init(trained.trainable_parameters())
    tokens, lengths = mx.random.randint(0, WORDS, (1, TOKENS + 1)), mx.array([[0, TOKENS + 1]])
    state = [trained.state, optimizer.state]
    mx.eval(tokens, lengths, state)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens):
        (value, _), gradients = nn.value_and_grad(trained, loss)(trained, tokens, lengths)
        optimizer.update(trained, gradients)
        return value

    if megabytes is not None:
        limit(int(megabytes))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    value = step(tokens)
    mx.eval(value, state)
    print(f"loss {value.item():.4f}, weights {before >> 20} MB, peak {mx.get_peak_memory() >> 20} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
