"""The same whole models in llama.cpp and torch, where these are installed."""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np

from machine import best, cores
from whole import CONTEXT, LORA, Config, Work


def contenders(config: Config, kind: str) -> dict[str, type]:
    """Those that can run such a model; the second argument of each is the kind."""
    if kind == "4-bit bfloat16":
        installed = find_spec("llama_cpp") and find_spec("gguf")
        return {"llama.cpp": LlamaCpp} if installed else {}
    installed = find_spec("torch") and find_spec("transformers")
    return {"torch": Torch} if installed else {}


class LlamaCpp:
    """llama.cpp with Q4_0 weights, on all cores."""

    def __init__(self, config: Config, kind: str) -> None:
        from llama_cpp import Llama

        self._vocabulary = config["vocab_size"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            _write_gguf(path, config)
            sizes = {"n_ctx": 1024, "n_batch": 512, "n_ubatch": 512}
            self._llama = Llama(
                str(path), n_threads=cores(), n_threads_batch=cores(), use_mmap=False, verbose=False, **sizes
            )

    def prepare(self, work: Work) -> Callable[[], object] | None:
        if work.trains:
            return None
        count = CONTEXT if work.decodes else work.tokens
        tokens = np.random.default_rng(1).integers(0, self._vocabulary, count).tolist()
        return self._decode(tokens, work.tokens) if work.decodes else self._prefill(tokens)

    def _decode(self, context: list[int], new: int) -> Callable[[], object]:
        self._llama.reset()
        self._llama.eval(context)

        def call() -> list[int]:
            self._llama.n_tokens = CONTEXT  # what comes after is forgotten
            return list(islice(self._llama.generate(context[-1:], temp=0.0, reset=False), new))

        return call

    def _prefill(self, tokens: list[int]) -> Callable[[], object]:
        def call() -> None:
            self._llama.n_tokens = 0
            self._llama.eval(tokens)

        return call


def _write_gguf(path: Path, config: Config) -> None:
    """Random weights in the order in which llama.cpp's own converter names them."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_0
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, config["model_type"])

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.integers(0, 256, (rows, columns // block, size), np.uint8)
        values[..., :2] = np.frombuffer(np.float16(0.005).tobytes(), np.uint8)  # the scale
        writer.add_tensor(name, values.reshape(rows, -1), raw_dtype=kind)

    def norm(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, head_dim = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    matrix("token_embd.weight", config["vocab_size"], hidden)  # the head too
    norm("output_norm.weight", hidden)
    for i in range(config["num_hidden_layers"]):
        norm(f"blk.{i}.attn_norm.weight", hidden)
        matrix(f"blk.{i}.attn_q.weight", heads * head_dim, hidden)
        matrix(f"blk.{i}.attn_k.weight", kv_heads * head_dim, hidden)
        matrix(f"blk.{i}.attn_v.weight", kv_heads * head_dim, hidden)
        matrix(f"blk.{i}.attn_output.weight", hidden, heads * head_dim)
        if config["model_type"] == "qwen3":
            norm(f"blk.{i}.attn_q_norm.weight", head_dim)
            norm(f"blk.{i}.attn_k_norm.weight", head_dim)
        norm(f"blk.{i}.ffn_norm.weight", hidden)
        matrix(f"blk.{i}.ffn_gate.weight", intermediate, hidden)
        matrix(f"blk.{i}.ffn_up.weight", intermediate, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, intermediate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Torch:
    """Hugging Face's transformers, on all cores."""

    def __init__(self, config: Config, kind: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(cores())
        torch.manual_seed(0)
        self._torch, self._vocabulary = torch, config["vocab_size"]
        dtype = getattr(torch, kind)
        self._model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
        self._model.requires_grad_(False)

    def prepare(self, work: Work) -> Callable[[], object]:
        """Like the work of the same name on MLX; to train, adapters are added, and stay."""
        shape = (1, CONTEXT if work.decodes else work.tokens + work.trains)
        tokens = self._torch.randint(self._vocabulary, shape)
        if work.trains:
            return self._step(tokens)
        return self._decode(tokens, work.tokens) if work.decodes else self._prefill(tokens)

    def _decode(self, context, new: int) -> Callable[[], object]:
        with self._torch.inference_mode():
            cache = self._model(context, use_cache=True, logits_to_keep=1).past_key_values

        def call() -> object:
            token = context[:, -1:]
            with self._torch.inference_mode():
                for _ in range(new):
                    logits = self._model(token, past_key_values=cache, use_cache=True).logits
                    token = logits.argmax(-1)
                cache.crop(-new)
            return logits

        return call

    def _prefill(self, tokens) -> Callable[[], object]:
        def call() -> object:
            with self._torch.inference_mode():
                return self._model(tokens, use_cache=True, logits_to_keep=1).logits

        return call

    def _step(self, tokens) -> Callable[[], object]:
        torch = self._torch
        adapters = [
            adapter
            for layer in self._model.model.layers
            for block in (layer.self_attn, layer.mlp)
            for name, linear in list(block.named_children())
            if isinstance(linear, torch.nn.Linear)
            for adapter in _adapt(torch, block, name, linear)
        ]
        optimizer = torch.optim.Adam(adapters, lr=1e-5)

        def call() -> object:
            optimizer.zero_grad()
            logits = self._model(tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
            loss.backward()
            optimizer.step()
            return loss

        return call


def _adapt(torch, block, name: str, linear) -> list:
    """Gives a linear layer a float32 adapter, computed as mlx-lm does, and returns its parameters."""

    class LoRALinear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rank, out = LORA["rank"], linear.out_features
            self.linear = linear
            self.a = torch.nn.Parameter(torch.randn(linear.in_features, rank) * linear.in_features**-0.5)
            self.b = torch.nn.Parameter(torch.zeros(rank, out))

        def forward(self, x):
            return self.linear(x) + (LORA["scale"] * (x.float() @ self.a @ self.b)).to(x.dtype)

    adapted = LoRALinear()
    setattr(block, name, adapted)
    return [adapted.a, adapted.b]


def matrix_rate(kind: str, size: int) -> float | None:
    """Torch's flop/s in a matrix product of the kind's dtype: its 16-bit ones use what NumPy's do not."""
    if not find_spec("torch"):
        return None
    import torch

    torch.set_num_threads(cores())
    a = torch.randn(size, size).to(getattr(torch, kind.split()[-1]))
    return 2 * size**3 / best(lambda: a @ a)
