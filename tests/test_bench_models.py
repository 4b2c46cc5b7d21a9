"""What ``make bench`` says about whole models: it runs, adds up, and scales as it should."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PLACES = ("models", "turns", "memory", "limits", "parts", "layers", "graphs", "scaling")


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import models

    return models


@pytest.fixture
def run(models, tmp_path):
    """Runs the benchmark on a tiny model; gives its JSON, its document and what it printed."""

    def run(*options):
        docs = tmp_path / "docs"
        docs.mkdir()
        document, readme = docs / "benchmarks.md", tmp_path / "README.md"
        document.write_text("".join(f"before\n<!-- {name} -->\nold\n<!-- end -->\n" for name in PLACES))
        readme.write_text("before\n<!-- models -->\nold\n<!-- end -->\nafter\n")
        arguments = ["--quick", "--out", str(tmp_path), "--docs", str(docs), *options]
        done = CliRunner().invoke(models.main, arguments)
        assert done.exit_code == 0, done.output
        result = json.loads((tmp_path / "models.json").read_text())
        first = document.read_text().split("<!-- end -->\n")[0]
        assert readme.read_text() == f"{first}<!-- end -->\nafter\n"
        return result, document.read_text(), done.output

    return run


def test_quick_run_prints_and_writes_everything(models, run, monkeypatch):
    # Nothing is scaled, however long MLX takes to compile.
    monkeypatch.setattr(models, "QUICK", replace(models.QUICK, never=math.inf))
    result, document, output = run("--no-rivals")
    kinds = {(r["weights"], r["work"]): r for r in result["records"]}
    works = ("decode", "prefill", "LoRA step")
    assert list(kinds) == [(k, w) for k in ("4-bit bfloat16", "bfloat16", "float32") for w in works]
    for (weights, _), record in kinds.items():
        stock, patched = (record["seconds"][who] for who in ("stock", "patched"))
        assert record["ratio"] == pytest.approx(stock / patched)
        assert record["tokens_per_s"]["patched"] == pytest.approx(32 / patched)
        assert record["scaled"] == {} and record["memory"]["stock"] > 0
        # Another order of float32 sums; in 16 bits MLX's sums err by up to some per cent.
        assert record["difference"] < (1e-5 if weights == "float32" else 0.1)
        assert all(share >= 0 for share in record["parts"].values())
        assert record["layer_s"].keys() == {"ours", "MLX's"}
    for us in result["graph_us"].values():
        assert us["stock"] > 0 and us["patched"] > 0
    assert "old" not in document and document.count("before") == len(PLACES)
    # Five tables with a row for each, one for the graphs; a small model is too slow for --quick.
    assert document.count("\n| tiny | ") == 5 * len(kinds) + 1
    assert "Share of the machine's rates reached" in output


def test_decode_takes_turns_with_a_rival(models):
    import report_models

    rival = SimpleNamespace(prepare=lambda work: lambda: time.sleep(0.01))
    family, decode = models.Family(models.TINY, "float32"), models.works(32)[0]
    record = models.time_work(family, decode, models.QUICK, {"rival": rival})
    records = [{"model": "tiny", "weights": "float32"} | record]
    models.add_shares(records, {"read": 1e9})
    result = {"records": records, "graph_us": {}, "scaling": []}
    ((*names, calls, _, _, of_medians, _, _, of_quickest),) = report_models._tables(result)["turns"][1]
    assert names == ["tiny", "float32", "rival"]
    assert int(calls) == record["calls"]["patched"] == record["calls"]["rival"] > models.QUICK.min_rounds
    for ratio, seconds in ((of_medians, record["median_s"]), (of_quickest, record["seconds"])):
        assert ratio == f"{seconds['rival'] / seconds['patched']:.2f}"


def test_options_choose_the_models(run):
    result, _, _ = run("--no-rivals", "--weights", "float32")
    assert [r["weights"] for r in result["records"]] == ["float32"] * 3


def test_what_takes_long_is_scaled_and_marked(models, run, monkeypatch):
    monkeypatch.setattr(models, "QUICK", replace(models.QUICK, never=0))
    result, document, _ = run("--no-rivals", "--weights", "float32")
    for record in result["records"]:
        layers = record["scaled"]["stock"]["layers"]
        assert layers == 8
        assert (record["memory"]["stock"] is None) == (layers != record["tokens"])
        assert record["parts"] is None
    decode = next(line for line in document.splitlines() if "| decode of 32 |" in line)
    assert decode.count("~") == 2


@pytest.mark.parametrize("limit, layers", [(13, 64), (11, 8)])
def test_scaling_is_exact_for_what_is_linear(models, monkeypatch, limit, layers):
    """Of training whose cost is known, in place of a measured one."""
    import scaling
    from whole import Work

    def cost(call):
        model, tokens = call
        seconds = tokens * (len(model.layers) + model.args.vocab_size / 128) / 16
        return seconds, 1000 * seconds

    monkeypatch.setattr(scaling, "with_memory", cost)
    monkeypatch.setattr(scaling, "first_call", lambda call: (None, cost(call)[0]))
    family = models.Family(models.TINY, "float32")
    work = Work("known", 64, lambda model, tokens: (model, tokens), trains=True)
    found = scaling.scale(family, work, False, SimpleNamespace(never=limit))
    model = family.model(lora=True)
    seconds, allocated = cost((model, 64))
    assert found.tokens == {"layers": layers, "head": 8}
    assert found.seconds == pytest.approx(seconds)
    memory = allocated + scaling.size(model)
    assert found.memory == (pytest.approx(memory) if layers == 64 else None)


def test_models_have_the_sizes_of_their_names(models):
    # In layers and a tied embedding; as their authors count them.
    counted = {"Llama-3.2-1B": 1.236e9, "Qwen3-0.6B": 0.596e9}
    for name, config in models.MODELS.items():
        model = models.Family(config | {"vocab_size": 64}, "bfloat16").model(1)
        sizes = {k: v.size for k, v in tree_flatten(model.parameters())}
        layer = sum(n for k, n in sizes.items() if ".layers." in k)
        total = config["num_hidden_layers"] * layer + config["vocab_size"] * config["hidden_size"]
        assert total == pytest.approx(counted[name], rel=2e-3)


def test_memory_of_training(models, tmp_path):
    import memory

    (tmp_path / "benchmarks.md").write_text("<!-- training memory -->\nold\n<!-- end -->\n")
    arguments = ["--quick", "--out", str(tmp_path), "--docs", str(tmp_path)]
    done = CliRunner().invoke(memory.main, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "memory.json").read_text())
    # At least gate and up, of 2 bytes, less those of the MLP that it is compared with.
    kept, width = result["kept_bytes"], models.TINY["intermediate_size"] - 64
    assert 2 * 2 * width <= kept["patched"] <= kept["stock"] <= 8 * 2 * width
    assert list(result["peak_bytes"]) == ["16", "32"]
    text = (tmp_path / "benchmarks.md").read_text()
    assert "old" not in text and "kept by an MLP, per token and layer" in text


def test_memory_by_the_loss(models, tmp_path):
    import loss_memory

    (tmp_path / "memory.md").write_text(
        "<!-- measured -->\n<!-- end -->\n<!-- arithmetic -->\n<!-- end -->\n"
    )
    arguments = ["--quick", "--out", str(tmp_path), "--docs", str(tmp_path)]
    done = CliRunner().invoke(loss_memory.main, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "loss_memory.json").read_text())
    peaks, parts = result["peaks"]["tiny"]["128"], result["parts"]["tiny"]
    assert 0 < peaks["ours"] < peaks["loss"] and 0 < parts["mlp"] < parts["layer"]
    page = (tmp_path / "memory.md").read_text()
    assert page.count("| tiny | 128 |") == 1 and page.count("| tiny |") == 1 + len(loss_memory.TOKENS)
