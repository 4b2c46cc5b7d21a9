"""How large the demo is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes of the model, in a Llama's proportions, and of its two trainings: minutes on two CPU cores."""

    iters: int
    seed: int
    dense: bool = False  # LoRA on the float32 weights instead of QLoRA on 4-bit ones
    group_size: int = 64  # of the 4-bit weights
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    seq_length: int = 128
    batch_size: int = 4
    pretrain_steps: int = 30
    pretrain_learning_rate: float = 1.5e-4
    learning_rate: float = 2e-4
    max_new_tokens: int = 24
