"""A small Llama checkpoint in the Hugging Face layout, trained just enough to be fine-tuned."""

import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.convert import convert
from mlx_lm.models import llama
from mlx_lm.utils import save_config, save_model
from transformers import PreTrainedTokenizerFast

import mlx_fused

from .settings import Settings


def build(
    path: Path,
    texts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    on_step: Callable[[int, float], None],
) -> nn.Module:
    """Create a model, train it on ``texts`` and write the checkpoint to ``path``.

    ``on_step`` receives the number of each step done and its loss.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads,
        "head_dim": settings.head_dim,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }
    ids = tokenizer([text + tokenizer.eos_token for text in texts])["input_ids"]
    tokens = np.concatenate(ids)
    mx.random.seed(settings.seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    _start_from_bigrams(model, tokens)
    with mlx_fused.patched(model):
        _train(model, tokens, settings, on_step)
    save_model(path, model)
    save_config(config, path / "config.json")
    tokenizer.save_pretrained(path)
    return model


def quantize(dense: Path, path: Path, settings: Settings) -> None:
    """Write the 4-bit version of the checkpoint ``dense`` to ``path``, which is replaced."""
    shutil.rmtree(path, ignore_errors=True)
    with redirect_stdout(io.StringIO()):
        convert(str(dense), str(path), quantize=True, q_group_size=settings.group_size, q_bits=4)


def _start_from_bigrams(model: llama.Model, tokens: np.ndarray) -> None:
    """Make the embedding and the head predict the next token from the previous one, without the layers.

    Counting bigrams takes a second; gradient steps would need many minutes for the same.
    """
    vocab_size, hidden_size = model.model.embed_tokens.weight.shape
    counts = np.zeros((vocab_size, vocab_size))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    seen = counts.sum(axis=1, keepdims=True)
    frequency = (counts.sum(axis=0) + 1) / (counts.sum() + vocab_size)
    # How much likelier than on average one token is after another: smoothed, and at least 1/8.
    lift = np.log(np.maximum((counts / frequency + 5) / (seen + 5), 1 / 8))
    lift -= (lift @ frequency)[:, None]
    _, basis = np.linalg.eigh(lift.T @ (lift * seen))
    basis = basis[:, 2 - hidden_size :]
    codes = lift @ basis
    # Two more columns: one gives every row the same length, so that RMSNorm changes nothing, and
    # one carries the logits of the plain frequencies.
    lengths = np.linalg.norm(codes, axis=1)
    radius = lengths.max()
    rest = np.sqrt(radius**2 - lengths**2)
    embedding = np.column_stack([codes, rest, np.full(vocab_size, radius)])
    head = np.column_stack([basis, np.zeros(vocab_size), np.log(frequency) / radius])
    scale = radius * np.sqrt(2 / hidden_size)
    model.model.embed_tokens.weight = mx.array((embedding / scale).astype(np.float32))
    model.lm_head.weight = mx.array((head * scale).astype(np.float32))
    for layer in model.layers:  # at first the layers add nothing
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight = mx.zeros_like(projection.weight)


def _train(
    model: llama.Model,
    tokens: np.ndarray,
    settings: Settings,
    on_step: Callable[[int, float], None],
) -> None:
    """Train the layers on random windows of ``tokens``."""
    rng = np.random.default_rng(settings.seed)
    steps, length = settings.pretrain_steps, settings.seq_length
    schedule = optim.cosine_decay(settings.pretrain_learning_rate, steps)
    optimizer = optim.AdamW(schedule, bias_correction=True)
    model.freeze()
    for layer in model.layers:
        layer.unfreeze()
    state = [model.state, optimizer.state]

    def loss_fn(windows: mx.array) -> mx.array:
        logits = model(windows[:, :-1])
        return nn.losses.cross_entropy(logits, windows[:, 1:], reduction="mean")

    @partial(mx.compile, inputs=state, outputs=state)
    def step(windows: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, loss_fn)(windows)
        optimizer.update(model, gradients)
        return loss

    for it in range(1, steps + 1):
        starts = rng.integers(len(tokens) - length, size=settings.batch_size)
        windows = mx.array(np.stack([tokens[s : s + length + 1] for s in starts]))
        loss = step(windows)
        mx.eval(state, loss)
        on_step(it, loss.item())
