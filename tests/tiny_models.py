"""mlx-lm's own models, tiny, with random parameters, and one attention module."""

import importlib

import mlx.core as mx
import mlx.nn as nn

from graph import primitives

LAYERS, HIDDEN, VOCABULARY = 2, 64, 96
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
WIDEST = 96  # of the sums of an attention layer: its heads together

_SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}
_GEMMA3 = {**_SIZES, "head_dim": 24, "sliding_window": 4, "sliding_window_pattern": 2}

CONFIGS = {
    "llama": {**_SIZES, "rms_norm_eps": 1e-5},
    "qwen2": {**_SIZES, "rms_norm_eps": 1e-6},
    "qwen3": {
        **_SIZES,
        "rms_norm_eps": 1e-6,
        "head_dim": 24,
        "max_position_embeddings": 128,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
    "gemma2": {**_SIZES, "rms_norm_eps": 1e-6, "head_dim": 24},
    "gemma3_text": _GEMMA3,
    "gemma3": {"text_config": {"model_type": "gemma3_text", **_GEMMA3}, "vocab_size": VOCABULARY},
    # Every expert for every token: a choice among them could turn on the last bit.
    "mixtral": {**_SIZES, "num_local_experts": 3, "num_experts_per_tok": 3},
    "cohere": {**_SIZES, "use_qk_norm": True, "logit_scale": 1.0},
}


def make(name, dtype=mx.float32, **sizes):
    mx.random.seed(0)
    module = importlib.import_module(f"mlx_lm.models.{name}")
    config = {"model_type": name, **CONFIGS[name], **sizes}
    model = module.Model(module.ModelArgs.from_dict(config))
    shake(model)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def shake(model):
    """Move every parameter, for some start as zeros or ones, which hide what they multiply."""
    model.apply(lambda p: p + 0.1 * mx.random.normal(p.shape))


def tokens(batch, seq):
    return mx.random.randint(0, VOCABULARY, (batch, seq), key=mx.random.key(1))


def loss(model, inputs):
    logits = model(inputs[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, inputs[:, 1:], reduction="mean")


def fused(*arrays):
    """How many fused projections the graph of these arrays has, forward and backward."""
    nodes = primitives(*arrays)
    return nodes["FusedQKVProjection"], nodes["FusedQKVProjectionGrad"]


class Attention(nn.Module):
    """As little of an attention module as patching can tell from a real one."""

    def __init__(self, dims=64, q_dims=64, kv_dims=32, bias=False):
        super().__init__()
        self.q_proj = nn.Linear(dims, q_dims, bias=bias)
        self.k_proj = nn.Linear(dims, kv_dims, bias=bias)
        self.v_proj = nn.Linear(dims, kv_dims, bias=bias)
        self.apply(lambda p: integers(p.shape))

    def __call__(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def integers(shape):
    """Small enough for every sum of their products to be exact, in whatever order."""
    return mx.random.randint(-2, 3, shape).astype(mx.float32)


def sample(*shape):
    mx.random.seed(2)
    return integers(shape)


def calls(arrays):
    """How many products of each kind the graph of these arrays has: of three layers, and of one."""
    nodes = primitives(*arrays)
    return nodes["FusedQKVProjection"], nodes["Matmul"] + nodes["AddMM"] + nodes["FusedLinear"]


def assert_same(actual, expected):
    assert all(mx.array_equal(a, e) for a, e in zip(actual, expected, strict=True))
