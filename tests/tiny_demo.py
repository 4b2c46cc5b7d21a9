"""The demo's checkpoint, tiny."""

from pathlib import Path

from mlx_fused.demo import Settings, corpus
from mlx_fused.demo.checkpoint import build, quantize
from mlx_fused.demo.finetune import finetune, write_dataset

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "group_size": 32,
    "seq_length": 64,
    "batch_size": 2,
    "pretrain_steps": 2,
    "pretrain_learning_rate": 1e-2,  # two steps must make the attention matter
    "max_new_tokens": 4,
}
MODULES = dict(list(corpus.read_modules().items())[:20])


def make(folder: Path) -> None:
    """Write to ``folder`` what the demo writes: ``model``, ``model-4bit``, ``data`` and ``adapters``."""
    settings = Settings(iters=1, seed=0, **SIZES)
    texts = list(MODULES.values())
    tokenizer = corpus.train_tokenizer(texts, settings.vocab_size)
    build(folder / "model", texts, tokenizer, settings, lambda step, loss: None)
    quantize(folder / "model", folder / "model-4bit", settings)
    write_dataset(folder / "data", corpus.help_texts(MODULES, seed=0), settings)
    finetune(
        folder / "model-4bit", folder / "data", folder / "adapters", settings, False, lambda step, loss: None
    )
