"""What ``make bench`` asks of llama.cpp and torch, by stand-ins that note it and compute next to nothing."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import gguf
import numpy as np
import pytest
from mlx.utils import tree_flatten


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


# torch


class Tensor(np.ndarray):
    def float(self):
        return self

    def to(self, dtype):
        return self.astype(dtype)


class Module:
    def __call__(self, x):
        return self.forward(x)

    def named_children(self):
        return [(name, child) for name, child in vars(self).items() if isinstance(child, Module)]


class Linear(Module):
    """Gives ones."""

    def __init__(self, in_features, out_features):
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x):
        return np.ones((*x.shape[:-1], self.out_features)).view(Tensor)


class Llama:
    """A model of transformers, which gives zeros."""

    def __init__(self, config, dtype):
        self.config, self.dtype = config, dtype
        self.requires_grad_, self.cache, self.calls = MagicMock(), MagicMock(), []
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.model = SimpleNamespace(layers=[])
        for _ in range(config.num_hidden_layers):
            attention, mlp = Module(), Module()
            attention.q_proj, attention.o_proj = Linear(hidden, hidden), Linear(hidden, hidden)
            mlp.up_proj, mlp.act_fn = Linear(hidden, intermediate), Module()
            self.model.layers.append(SimpleNamespace(self_attn=attention, mlp=mlp))

    def __call__(self, tokens, **options):
        self.calls.append((tokens, options))
        return SimpleNamespace(
            logits=np.zeros((*tokens.shape, self.config.vocab_size)), past_key_values=self.cache
        )


@pytest.fixture
def torch(monkeypatch, benchmarks):
    rng, torch = np.random.default_rng(0), MagicMock()
    torch.nn.Module, torch.nn.Linear, torch.nn.Parameter = Module, Linear, lambda a: a
    torch.randint = lambda limit, shape: rng.integers(0, limit, shape)
    torch.randn = lambda *shape: rng.normal(size=shape).view(Tensor)
    torch.zeros = lambda *shape: np.zeros(shape).view(Tensor)
    transformers = MagicMock()
    transformers.AutoConfig.for_model = lambda **config: SimpleNamespace(**config)
    transformers.AutoModelForCausalLM.from_config = Llama
    importlib.import_module("models")  # mlx-lm needs the real one
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    return torch


@pytest.fixture
def rival(torch):
    import models
    from outside import Torch

    rival = Torch(models.TINY, "bfloat16")
    rival.model = rival._model
    return rival


def test_torch_has_the_model_that_is_timed(rival, torch):
    import machine
    import models

    assert vars(rival.model.config) == models.TINY and rival.model.dtype is torch.bfloat16
    assert torch.set_num_threads.mock_calls == [call(machine.cores())]
    assert rival.model.requires_grad_.mock_calls == [call(False)]


def test_torch_decodes_after_a_context_that_stays(rival, torch):
    from whole import CONTEXT, DECODED, works

    decode = rival.prepare(works(16)[0])
    decode(), decode()
    (context, options), *steps = rival.model.calls
    assert context.shape == (1, CONTEXT) and options["use_cache"]
    assert [tokens.shape for tokens, _ in steps] == [(1, 1)] * 2 * DECODED
    assert all(options == {"past_key_values": rival.model.cache, "use_cache": True} for _, options in steps)
    assert rival.model.cache.crop.mock_calls == [call(-DECODED), call(-DECODED)]
    assert torch.inference_mode.call_count == 3


def test_torch_prefills_with_the_head_for_one_token(rival, torch):
    from whole import works

    rival.prepare(works(16)[1])()
    ((tokens, options),) = rival.model.calls
    assert tokens.shape == (1, 16) and options == {"use_cache": True, "logits_to_keep": 1}
    assert torch.inference_mode.call_count == 1


def test_torch_trains_adapters_on_every_linear_layer(rival, torch):
    import models
    from whole import LORA, works

    step = rival.prepare(works(16)[2])
    (adapters,), options = torch.optim.Adam.call_args
    assert options == {"lr": 1e-5}
    assert len(adapters) == 2 * 3 * models.TINY["num_hidden_layers"]
    optimizer = torch.optim.Adam.return_value
    loss = step()
    ((tokens, _),) = rival.model.calls
    (logits, labels), _ = torch.nn.functional.cross_entropy.call_args
    assert tokens.shape == (1, 16) and logits.shape == (16, models.TINY["vocab_size"])
    assert np.array_equal(labels[:-1], tokens[0, 1:])
    assert optimizer.mock_calls == [call.zero_grad(), call.step()] and loss.backward.call_count == 1

    layer = rival.model.model.layers[0]
    assert type(layer.mlp.act_fn) is Module
    adapted, x = layer.mlp.up_proj, np.ones((2, models.TINY["hidden_size"])).view(Tensor)
    adapted.b[:] = 0.5
    expected = 1 + LORA["scale"] * (x @ adapted.a @ adapted.b)
    assert np.allclose(adapted(x), expected) and adapted.a.shape[1] == LORA["rank"]


# llama.cpp


class LlamaCpp:
    """Reads the file, and counts tokens as llama.cpp does."""

    def __init__(self, path, **options):
        self.options, self.n_tokens, self.evaluated, self.generated = options, 0, [], []
        self.file = gguf.GGUFReader(path)

    def reset(self):
        self.n_tokens = 0

    def eval(self, tokens):
        self.evaluated.append((self.n_tokens, len(tokens)))
        self.n_tokens += len(tokens)

    def generate(self, tokens, **options):
        self.generated.append(options)
        while True:
            self.eval(tokens)
            yield 1


@pytest.fixture
def llama_cpp(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=LlamaCpp))


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_llama_cpp_gets_the_model_that_is_timed(llama_cpp, model_type):
    import models
    from outside import LlamaCpp

    config = models.TINY | {"model_type": model_type}
    file = LlamaCpp(config, "4-bit bfloat16")._llama.file
    fields = {name.removeprefix(f"{model_type}."): field for name, field in file.fields.items()}
    assert fields["general.architecture"].contents() == model_type
    for field, name in {
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "vocab_size": "vocab_size",
        "rope.freq_base": "rope_theta",
    }.items():
        assert fields[field].contents() == config[name], field
    ours = sorted(
        array.shape for _, array in tree_flatten(models.Family(config, "float32").model().parameters())
    )
    assert sorted(tuple(map(int, tensor.shape[::-1])) for tensor in file.tensors) == ours
    kinds = {tensor.tensor_type.name: len(tensor.shape) for tensor in file.tensors}
    assert kinds == {"Q4_0": 2, "F32": 1}


def test_llama_cpp_decodes_after_a_context_that_stays_and_does_not_train(llama_cpp):
    import machine
    import models
    from outside import LlamaCpp
    from whole import CONTEXT, DECODED, works

    rival = LlamaCpp(models.TINY, "4-bit bfloat16")
    llama = rival._llama
    assert llama.options["n_threads"] == llama.options["n_threads_batch"] == machine.cores()
    decode, prefill, step = works(16)
    run = rival.prepare(decode)
    run(), run()
    decoded = [(CONTEXT + i, 1) for i in range(DECODED)]
    assert llama.evaluated == [(0, CONTEXT), *decoded, *decoded]
    assert llama.generated == [{"temp": 0.0, "reset": False}] * 2
    run = rival.prepare(prefill)
    run(), run()
    assert llama.evaluated[-2:] == [(0, 16), (0, 16)]
    assert rival.prepare(step) is None
