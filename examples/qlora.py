"""Fine-tunes adapters in a training loop of one's own, and loads them into a stock model.

python examples/qlora.py [MODEL]
"""

import json
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_fused
from mlx_fused.losses import calls, cross_entropy_loss

TEXT = Path(json.__file__).read_text()  # what it learns: a module of Python
STEPS, BATCH_SIZE, LENGTH = 40, 4, 64  # of tokens, of which the text must have more
LENGTHS = mx.array([[1, LENGTH - 1]] * BATCH_SIZE)  # the first and the last target of each text: all count
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}
ADAPTERS = Path("qlora-adapters")

path = sys.argv[1] if len(sys.argv) > 1 else "mlx_fused_demo/model-4bit"
model, tokenizer = mlx_lm.load(path)
model.freeze()
mx.random.seed(0)
linear_to_lora_layers(model, len(model.layers), LORA)
report = mlx_fused.patch(model)  # before or after the adapters are added: both work
print(report.summary)

tokens = np.array(tokenizer.encode(TEXT))
starts = np.random.default_rng(0).integers(len(tokens) - LENGTH, size=(STEPS, BATCH_SIZE, 1))
batches = mx.array(tokens[starts + np.arange(LENGTH)])

optimizer = optim.Adam(learning_rate=1e-4)
optimizer.init(model.trainable_parameters())  # now, so that the step is traced only once
state = [model.state, optimizer.state]


@partial(mx.compile, inputs=state, outputs=state)
def step(batch):
    (loss, _), gradients = nn.value_and_grad(model, cross_entropy_loss)(model, batch, LENGTHS)
    optimizer.update(model, gradients)
    return loss


for i, batch in enumerate(batches, start=1):
    loss = step(batch)
    mx.eval(state, loss)
    if i == 1 or i % 10 == 0:
        print(f"step {i:3}  loss {loss.item():.4f}")

print(report)  # a compiled step counts once, when it is traced
print(f"the loss without logits: {calls(model).share}")

# The format of mlx_lm.lora: mlx_lm.generate, mlx_lm.fuse and mlx-fused find these adapters.
ADAPTERS.mkdir(parents=True, exist_ok=True)
mx.save_safetensors(str(ADAPTERS / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
config = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": LORA}
(ADAPTERS / "adapter_config.json").write_text(json.dumps(config))

stock, _ = mlx_lm.load(path, adapter_path=str(ADAPTERS))
difference = mx.abs(stock(batch) - model(batch)).max() / mx.abs(model(batch)).max()
print(f"saved to {ADAPTERS}; a stock model with them differs by {difference.item():.0e}")
