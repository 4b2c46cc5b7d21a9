import json
import math
from contextlib import nullcontext

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.models import llama
from rich.console import Console

from mlx_fused import patching
from mlx_fused.cli import main
from mlx_fused.demo import Settings, comparison, corpus, run
from mlx_fused.demo.checkpoint import _start_from_bigrams

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "seq_length": 64,
    "batch_size": 2,
    "pretrain_steps": 2,
    "pretrain_learning_rate": 1e-2,  # two steps must make the attention matter
    "max_new_tokens": 4,
}


MODULES = dict(list(corpus.read_modules().items())[:20])


@pytest.fixture(scope="module", autouse=True)
def few_modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "read_modules", lambda: MODULES)
        yield


@pytest.fixture(scope="module")
def demo(few_modules, tmp_path_factory):
    """One run of the demo: its directory, its results and what it printed off a terminal."""
    out = tmp_path_factory.mktemp("demo")
    with (out.parent / "log.txt").open("w+") as log:
        results = run(out, Settings(iters=3, seed=0, **TINY), Console(file=log, width=100))
        log.seek(0)
        return out, results, log.read()


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr("mlx_fused.demo.Settings", lambda **options: Settings(**TINY, **options))


def test_stock_and_patched_losses_agree(demo):
    _, results, _ = demo
    stock, patched = results["runs"]["stock"], results["runs"]["patched"]
    assert results["passed"]
    assert results["largest_relative_difference"] <= results["tolerance"]
    assert list(stock["train_losses"]) == list(patched["train_losses"]) == [1, 2, 3]
    assert list(stock["val_losses"]) == list(patched["val_losses"]) == [0, 2]
    for measured in (stock, patched):
        assert all(math.isfinite(loss) for loss in measured["train_losses"].values())
        assert measured["tokens_per_second"] > 0
        assert measured["peak_memory"] > 0


def test_results_file_holds_what_was_returned(demo):
    out, results, _ = demo
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))


def test_qkv_share_is_that_of_the_sizes(demo):
    _, results, _ = demo
    hidden, q, kv = 32, 4 * 16, 2 * 16
    qkv = hidden * (q + 2 * kv)
    layer = qkv + q * hidden + 3 * hidden * TINY["intermediate_size"]
    assert results["qkv_share"] == 2 * qkv / (2 * layer + TINY["vocab_size"] * hidden)


def test_log_off_a_terminal_is_short_and_plain(demo):
    *_, log = demo
    assert "\x1b" not in log
    assert "\r" not in log
    assert len(log.splitlines()) < 60


def test_checkpoint_is_in_the_hugging_face_layout(demo):
    out, _, _ = demo
    names = {file.name for file in (out / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    config = json.loads((out / "model" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    _, tokenizer = mlx_lm.load(str(out / "model"))
    source = "def f(x):\n    return [x] * 2  # ünïcode\n"
    assert tokenizer.decode(tokenizer.encode(source)) == source


def test_patched_adapters_load_into_an_unpatched_model(demo):
    out, results, _ = demo
    model_path = str(out / "model")
    model, tokenizer = mlx_lm.load(model_path, adapter_path=str(out / "adapters-patched"))
    attention = model.layers[0].self_attn
    assert not isinstance(attention, patching._FusedProjections)
    assert attention.q_proj.lora_b.abs().max().item() > 0
    text = mlx_lm.generate(model, tokenizer, corpus.PROMPT, max_tokens=TINY["max_new_tokens"])
    assert results["texts"]["patched"] == corpus.PROMPT + text


def test_both_runs_write_the_same_adapters(demo):
    out, *_ = demo
    stock, patched = (
        mx.load(str(out / f"adapters-{name}" / "adapters.safetensors")) for name in ("stock", "patched")
    )
    shapes = [{name: array.shape for name, array in run.items()} for run in (stock, patched)]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == TINY["num_layers"] * 7 * 2  # every projection has an A and a B


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_wrong_numerics_fail(tiny, tmp_path, monkeypatch, factor):
    correct = patching.fused_qkv_projection

    def wrong(*args):
        q, k, v = correct(*args)
        return q, k, v * factor

    monkeypatch.setattr(patching, "fused_qkv_projection", wrong)
    # Not in the pretraining: the checkpoint that both runs start from is to be a good one.
    monkeypatch.setattr("mlx_fused.patched", lambda model: nullcontext())
    (tmp_path / ".mlx-fused-demo").touch()
    (tmp_path / "results.json").write_text("of an earlier demo")
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path), "--iters", "2"])
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert json.loads((tmp_path / "results.json").read_text())["passed"] is False


def test_a_layer_that_is_not_fused_fails(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(patching, "_obstacle", lambda attention: "a reason")
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "new"), "--iters", "1"])
    assert isinstance(result.exception, RuntimeError)
    assert "not fused: a reason" in str(result.exception)


def test_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "not the demo's" in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_bigram_start_predicts_the_next_token():
    args = llama.ModelArgs(
        model_type="llama",
        vocab_size=6,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = llama.Model(args)
    _start_from_bigrams(model, np.array([0, 3, 1, 4, 2, 5] * 50))
    assert model(mx.arange(6)[None])[0].argmax(axis=-1).tolist() == [3, 4, 5, 1, 2, 0]


def test_help_texts_follow_the_sources():
    source = 'class A:\n    def f(self, x=1):\n        """Do\n        it.\n\n        More."""\n'
    assert corpus.help_texts({"m": source}, seed=0) == [">>> help(m.A.f)\nf(self, x=1)\n    Do\n    it.\n"]
    texts = corpus.help_texts(MODULES, seed=0)
    assert len(texts) > 100
    assert texts == corpus.help_texts(MODULES, seed=0) != corpus.help_texts(MODULES, seed=1)


def test_largest_difference_sees_nan_anywhere():
    def run_of(*losses):
        made = comparison.Run(lambda *_: None)
        made.train_losses = dict(enumerate(losses))
        return made

    assert comparison._largest_difference(run_of(1.0, 2.0), run_of(1.0, 2.5)) == 0.25
    assert math.isnan(comparison._largest_difference(run_of(1.0, 2.0), run_of(1.0, math.nan)))
