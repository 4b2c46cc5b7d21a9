import json
import math
import shlex

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.models import llama
from rich.console import Console

import tiny_demo
from mlx_fused.cli import main
from mlx_fused.demo import Settings, comparison, corpus, run
from mlx_fused.demo.checkpoint import _start_from_bigrams
from mlx_fused.patching import calls
from mlx_fused.patching.modules import FusedModule
from mlx_fused.patching.projections import NotFused, Operation


@pytest.fixture(scope="module", autouse=True)
def few_modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "read_modules", lambda: tiny_demo.MODULES)
        yield


@pytest.fixture(scope="module", params=["4-bit", "dense"])
def demo(few_modules, tmp_path_factory, request):
    """One run of the demo: its directory, its results and what it printed off a terminal."""
    out = tmp_path_factory.mktemp("a demo")
    dense = request.param == "dense"
    with (out.parent / "log.txt").open("w+") as log:
        settings = Settings(iters=3, seed=0, dense=dense, **tiny_demo.SIZES)
        results = run(out, settings, Console(file=log, width=100))
        log.seek(0)
        return out, results, log.read()


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr("mlx_fused.demo.Settings", lambda **options: Settings(**tiny_demo.SIZES, **options))


def test_stock_and_patched_losses_agree(demo):
    _, results, _ = demo
    stock, patched = results["runs"]["stock"], results["runs"]["patched"]
    assert results["passed"]
    assert len(results["losses"]) == 5
    assert all(loss["difference"] <= loss["tolerance"] < 1e-4 for loss in results["losses"])
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
    layer = qkv + q * hidden + 3 * hidden * tiny_demo.SIZES["intermediate_size"]
    assert results["qkv_share"] == 2 * qkv / (2 * layer + tiny_demo.SIZES["vocab_size"] * hidden)


def test_log_off_a_terminal_is_short_and_plain(demo):
    *_, log = demo
    assert "\x1b" not in log
    assert "\r" not in log
    assert len(log.splitlines()) < 60


def test_the_command_that_follows_can_be_pasted(demo):
    _, results, log = demo
    assert shlex.split(log.splitlines()[-1])[-3:] == ["mlx-fused", "validate", results["model"]]


def test_checkpoint_is_in_the_hugging_face_layout(demo):
    out, _, _ = demo
    names = {file.name for file in (out / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    config = json.loads((out / "model" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    _, tokenizer = mlx_lm.load(str(out / "model"))
    source = "def f(x):\n    return [x] * 2  # ünïcode\n"
    assert tokenizer.decode(tokenizer.encode(source)) == source


def test_a_chat_is_what_the_fine_tuning_taught(demo):
    _, results, _ = demo
    _, tokenizer = mlx_lm.load(results["model"])
    (text,) = corpus.help_texts({"m": 'def f(x):\n    """Do it."""\n'}, seed=0)
    question, answer = (part + "\n" for part in text.rstrip().split("\n", 1))
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "help(m.f)"}]
    assert question == ">>> help(m.f)\n"
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == question
    chat += [{"role": "assistant", "content": answer}, chat[-1]]
    asked_again = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert asked_again == tokenizer.encode(text + tokenizer.eos_token + question)


def test_valid_and_test_texts_are_held_out(demo):
    out, _, _ = demo
    valid, train, test = (
        [json.loads(line)["text"] for line in (out / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("valid", "train", "test")
    )
    assert len(test) == len(valid) == 4 * tiny_demo.SIZES["batch_size"]
    assert valid + train + test == corpus.help_texts(tiny_demo.MODULES, seed=0)


def test_only_qlora_has_a_4bit_checkpoint(demo):
    out, results, _ = demo
    model, _ = mlx_lm.load(results["model"])
    quantized = "scales" in model.layers[0].self_attn.q_proj
    assert quantized == (out / "model-4bit").exists() == (results["weights"] == "4-bit")


def test_patched_adapters_load_into_an_unpatched_model(demo):
    out, results, _ = demo
    model, tokenizer = mlx_lm.load(results["model"], adapter_path=str(out / "adapters-patched"))
    module = model.layers[0].self_attn
    assert not isinstance(module, FusedModule)
    assert module.q_proj.lora_b.abs().max().item() > 0
    text = mlx_lm.generate(model, tokenizer, corpus.PROMPT, max_tokens=tiny_demo.SIZES["max_new_tokens"])
    assert results["texts"]["patched"] == corpus.PROMPT + text


def test_both_runs_write_the_same_adapters(demo):
    out, *_ = demo
    stock, patched = (
        mx.load(str(out / f"adapters-{name}" / "adapters.safetensors")) for name in ("stock", "patched")
    )
    shapes = [{name: array.shape for name, array in run.items()} for run in (stock, patched)]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == tiny_demo.SIZES["num_layers"] * 7 * 2  # every projection has an A and a B


@pytest.mark.parametrize("options", [[], ["--dense"]])
@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_wrong_numerics_fail(tiny, tmp_path, monkeypatch, factor, options):
    correct = Operation.__call__

    def wrong(operation, module, layers, *arguments):
        outputs = correct(operation, module, layers, *arguments)
        is_adapted = len(layers) == 3 and "lora_a" in layers[2]
        return [*outputs[:2], outputs[2] * factor] if is_adapted else outputs

    # Only the fine-tuning has adapters: the checkpoint that both runs start from is a good one.
    monkeypatch.setattr(Operation, "__call__", wrong)
    (tmp_path / ".mlx-fused-demo").touch()
    (tmp_path / "results.json").write_text("of an earlier demo")
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path), "--iters", "2", *options])
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert json.loads((tmp_path / "results.json").read_text())["passed"] is False


def test_json_is_alone_on_stdout(tiny, tmp_path):
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "new"), "--iters", "1", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tmp_path / "new" / "results.json").read_text())
    assert "PASSED" in result.stderr


def test_a_layer_that_is_not_fused_fails(tiny, tmp_path, monkeypatch):
    def no_qkv(*_):
        raise NotFused("a reason")

    monkeypatch.setattr(calls, "read_qkv", no_qkv)
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "new"), "--iters", "1"])
    assert isinstance(result.exception, RuntimeError)
    assert "not fused: a reason" in str(result.exception)


def test_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "must be new, empty or an earlier demo's" in result.output
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
    texts = corpus.help_texts(tiny_demo.MODULES, seed=0)
    assert len(texts) > 100
    assert (
        texts == corpus.help_texts(tiny_demo.MODULES, seed=0) != corpus.help_texts(tiny_demo.MODULES, seed=1)
    )


def test_losses_are_compared_one_by_one():
    def run_of(train, val):
        made = comparison.Run(lambda *_: None)
        made.train_losses, made.val_losses, made.terms = train, val, 64
        return made

    rows = comparison.compare(run_of({2: 1.0}, {0: 2.0}), run_of({2: math.nan}, {0: 2.5}))
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 2), ("val", 0)]
    assert math.isnan(rows[0]["difference"]) and rows[1]["difference"] == 0.25
    assert [row["tolerance"] for row in rows] == [8 * (7 * 64) ** 0.5 * 2**-24, 8 * 8 * 2**-24]
