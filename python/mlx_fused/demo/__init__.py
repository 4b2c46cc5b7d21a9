"""Fine-tunes a small model with mlx-lm twice, stock and patched, and compares."""

import os

# Everything is made on this machine. Hugging Face's libraries read this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

from .comparison import run
from .settings import Settings

__all__ = ["Settings", "run"]
