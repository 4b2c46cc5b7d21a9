"""Whole models of mlx-lm with random weights, and what is timed on them."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_fused
from cases import BITS, GROUP_SIZE, RANK, SCALE
from mlx_fused.losses import cross_entropy_loss

Config = dict[str, object]

# As in the config.json of each.
MODELS: dict[str, Config] = {
    "Llama-3.2-1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
}
KINDS = ("4-bit bfloat16", "bfloat16", "float32")
CONTEXT = 128
DECODED = 32  # tokens
LORA = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
# Sizes that cost next to nothing, to leave a part of a model out; a group of 4-bit weights is the least.
NO_HEAD = {"vocab_size": 4 * GROUP_SIZE}
NO_MLP = {"intermediate_size": GROUP_SIZE}
NO_ATTENTION = {"num_attention_heads": 1, "num_key_value_heads": 1}


class Family:
    """Models of one architecture and kind of weights, of any number of layers, which share their arrays."""

    def __init__(self, config: Config, kind: str) -> None:
        self.config, self.kind = config, kind
        self.dtype = getattr(mx, kind.split()[-1])
        self.layers: int = config["num_hidden_layers"]
        mx.random.seed(0)
        self._arrays = dict(tree_flatten(self._made(1).parameters()))
        mx.eval(self._arrays)

    def without(self, *parts: Config) -> "Family":
        """The same with parts that cost next to nothing."""
        config = self.config
        for part in parts:
            config = config | part
        return Family(config, self.kind)

    def model(
        self, layers: int | None = None, patched: bool = False, lora: bool = False, **options: object
    ) -> nn.Module:
        """A model of the first layers, all of them by default; the options are those of ``patch``."""
        model = self._made(layers or self.layers)
        model.load_weights([(name, self._array(name)) for name, _ in tree_flatten(model.parameters())])
        model.freeze()
        if patched:
            mlx_fused.patch(model, **options)
        if lora:
            mx.random.seed(2)
            linear_to_lora_layers(model, -1, LORA)
            model.train()
        mx.eval(model.parameters())
        return model

    def _made(self, layers: int) -> nn.Module:
        module = import_module(f"mlx_lm.models.{self.config['model_type']}")
        model = module.Model(module.ModelArgs.from_dict(self.config | {"num_hidden_layers": layers}))
        model.set_dtype(self.dtype)
        if self.kind.startswith(f"{BITS}-bit"):
            nn.quantize(model, GROUP_SIZE, BITS)
        return model

    def _array(self, name: str) -> mx.array:
        """Every layer has copies of the first one's: values do not matter, and memory of its own does."""
        if name not in self._arrays:
            parts = name.split(".")
            parts[parts.index("layers") + 1] = "0"
            first = self._arrays[".".join(parts)]
            self._arrays[name] = first + mx.zeros((), first.dtype)
        return self._arrays[name]

    def bytes(self) -> int:
        """Of all weights, each of which a token's products read once."""
        layer, rest = self._parts(lambda a: a.nbytes)
        return self.layers * layer + rest

    def flops(self, work: "Work") -> int:
        """Of the products with weights; to train, dX too."""
        dense = Family(self.config | {"num_hidden_layers": 1}, "float32") if "bit" in self.kind else self
        layer, head = dense._parts(lambda a: a.size)
        return (4 if work.trains else 2) * (work.tokens * self.layers * layer + work.logits * head)

    def _parts(self, measure: Callable[[mx.array], int]) -> tuple[int, int]:
        """What one layer has, and what the rest has."""
        total = {name: measure(a) for name, a in self._arrays.items() if ".layers." not in name}
        layer = {name: measure(a) for name, a in self._arrays.items() if ".layers.0." in name}
        return sum(layer.values()), sum(total.values())


class Work(NamedTuple):
    """Something that users wait for: ``prepare(model, tokens)`` gives a call that does it once."""

    name: str
    tokens: int
    prepare: Callable[[nn.Module, int], Callable[[], mx.array]]
    trains: bool = False

    @property
    def decodes(self) -> bool:
        return self.name == "decode"

    @property
    def logits(self) -> int:
        """Of how many tokens: generation needs those of a prompt's last one only."""
        return self.tokens if self.trains or self.decodes else 1


def works(tokens: int) -> list[Work]:
    return [
        Work("decode", DECODED, _decode),
        Work("prefill", tokens, _prefill),
        # Of a stock model it is mlx-lm's own loss.
        Work("LoRA step", tokens, partial(training_step, loss=cross_entropy_loss), trains=True),
    ]


def _decode(model: nn.Module, tokens: int) -> Callable[[], mx.array]:
    """So many tokens after ``CONTEXT`` others, of which the cache is made up.

    As mlx-lm generates them: the next one's graph is made while one is computed. Returns the first logits.
    """
    args, cache, dtype = model.args, make_prompt_cache(model), model.model.norm.weight.dtype
    mx.random.seed(1)
    for layer in cache:
        shape = (1, args.num_key_value_heads, CONTEXT, args.head_dim)
        mx.eval(layer.update_and_fetch(*(mx.random.normal(shape).astype(dtype) for _ in range(2))))

    def step(token: mx.array) -> tuple[mx.array, mx.array]:
        logits = model(token, cache=cache)
        following = mx.argmax(logits[:, -1:], axis=-1)
        mx.async_eval(following, logits)
        return following, logits

    def call() -> mx.array:
        token, logits = step(mx.ones((1, 1), mx.int32))
        for _ in range(tokens - 1):
            following, _ = step(token)
            token.item()
            token = following
        _finish(token)
        trim_prompt_cache(cache, tokens)
        return logits

    return call


def _prefill(model: nn.Module, tokens: int) -> Callable[[], mx.array]:
    """As mlx-lm's generation does it: the head, and the last layer but its keys and values, for one token."""
    prompt = random_tokens(model, tokens)

    def call() -> mx.array:
        cache = make_prompt_cache(model)
        model(prompt[:, :-1], cache=cache)
        mx.eval([layer.state for layer in cache])
        logits = model(prompt[:, -1:], cache=cache)
        _finish(logits)
        return logits

    return call


def training_step(
    model: nn.Module, tokens: int, sequences: int = 1, loss: Callable = default_loss
) -> Callable[[], mx.array]:
    """One step of mlx-lm's trainer, compiled as it does, on so many sequences of so many tokens."""
    optimizer = optim.Adam(learning_rate=1e-5)
    state = [model.state, optimizer.state, mx.random.state]
    value_and_grad = nn.value_and_grad(model, loss)
    batch, lengths = random_tokens(model, tokens + 1, sequences), mx.array([[0, tokens + 1]] * sequences)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array, lengths: mx.array) -> mx.array:
        (value, _), gradients = value_and_grad(model, batch, lengths)
        optimizer.update(model, gradients)
        return value

    def call() -> mx.array:
        value = step(batch, lengths)
        _finish(state, value)
        return value

    return call


def random_tokens(model: nn.Module, count: int, sequences: int = 1) -> mx.array:
    mx.random.seed(1)
    tokens = mx.random.randint(0, model.args.vocab_size, (sequences, count))
    mx.eval(tokens)
    return tokens


def _finish(*results: object) -> None:
    mx.eval(results)
    mx.synchronize()
