"""Runs mlx-lm's own LoRA training of a checkpoint, with the model stock or patched."""

import io
import json
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm import lora
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import load_dataset

import mlx_fused
from mlx_fused import losses
from mlx_fused.cli.passthrough import without_logits
from mlx_fused.validate import sum_terms

from .settings import Settings

_VAL_BATCHES = 4


@dataclass
class Run(TrainingCallback):
    """The reports of one training run; losses are by iteration."""

    on_report: Callable[[int, float], None]
    train_losses: dict[int, float] = field(default_factory=dict)
    val_losses: dict[int, float] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    peak_memory: int = 0
    terms: int = 0  # the number of terms in the sums that patching reorders

    @property
    def tokens_per_second(self) -> float:
        """The median of the reported speeds, which a pause of the machine does not change."""
        return median(self.speeds)

    def on_train_loss_report(self, train_info: dict) -> None:
        iteration, loss = train_info["iteration"], train_info["train_loss"]
        self.train_losses[iteration] = loss
        self.speeds.append(train_info["tokens_per_second"])
        self.on_report(iteration, loss)

    def on_val_loss_report(self, val_info: dict) -> None:
        self.val_losses[val_info["iteration"]] = val_info["val_loss"]


def write_dataset(path: Path, texts: list[str], settings: Settings) -> None:
    """Write ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` as mlx-lm reads them."""
    path.mkdir(exist_ok=True)
    split = _VAL_BATCHES * settings.batch_size
    parts = {"valid": texts[:split], "train": texts[split:-split], "test": texts[-split:]}
    for name, part in parts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in part)
        (path / f"{name}.jsonl").write_text("".join(lines))


def finetune(
    model_path: Path,
    data_path: Path,
    adapter_path: Path,
    settings: Settings,
    patch: bool,
    on_report: Callable[[int, float], None],
) -> Run:
    """Train LoRA adapters with mlx-lm and write them to ``adapter_path``.

    Raises:
        RuntimeError: If ``patch`` is asked for and a call of a layer, or of the loss, was not fused.
    """
    changes = {
        "model": str(model_path),
        "data": str(data_path),
        "adapter_path": str(adapter_path),
        "train": True,
        "seed": settings.seed,
        "num_layers": -1,
        "batch_size": settings.batch_size,
        "iters": settings.iters,
        "learning_rate": settings.learning_rate,
        "max_seq_length": settings.seq_length,
        "steps_per_report": max(1, settings.iters // 8),
        "steps_per_eval": settings.iters,
        "save_every": settings.iters + 1,
        "val_batches": _VAL_BATCHES,
    }
    args = SimpleNamespace(**lora.CONFIG_DEFAULTS | changes)
    run = Run(on_report)
    np.random.seed(args.seed)  # mlx-lm shuffles with it; its trainer seeds mlx.random itself
    model, tokenizer = mlx_lm.load(args.model)
    train_set, valid_set, _ = load_dataset(args, tokenizer)
    report = mlx_fused.patch(model) if patch else None
    mx.clear_cache()
    mx.reset_peak_memory()
    loss = without_logits(lora) if patch else nullcontext()
    with redirect_stdout(io.StringIO()), loss:  # its display would interleave with the demo's own
        lora.train_model(args, model, train_set, valid_set, run)
    run.peak_memory = mx.get_peak_memory()
    if report:
        run.terms = sum_terms(model, report)
        calls = [losses.calls(model), *(part.calls for part in report.parts)]
        if not all(0 < part.fused == part.total for part in calls):
            raise RuntimeError(f"Not every call ran fused.\n{report}")
    return run
