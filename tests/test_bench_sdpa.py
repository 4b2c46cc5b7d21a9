"""What ``benchmarks/sdpa.py`` says of attention by itself."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

PLACES = ("attention", "attention memory")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import sdpa

    return sdpa


@pytest.fixture
def run(benchmark, tmp_path):
    """Runs it with tiny sizes; gives its JSON, its document and what it printed."""
    document = tmp_path / "benchmarks.md"
    document.write_text("".join(f"before\n<!-- {name} -->\nold\n<!-- end -->\n" for name in PLACES))
    arguments = ["--quick", "--no-torch", "--out", str(tmp_path), "--docs", str(tmp_path)]

    def run():
        done = CliRunner().invoke(benchmark.main, arguments)
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / "sdpa.json").read_text()), document.read_text(), done.output

    return run


def test_a_quick_run_prints_and_writes_everything(run):
    result, document, output = run()
    assert [(r["dtype"], r["work"]) for r in result["records"]] == [
        *[(d, f"16 tokens, {w}") for d in ("float32", "bfloat16") for w in ("forward", "with backward")],
        *[(d, "decode, 32 keys") for d in ("float32", "bfloat16")],
    ]
    for record in result["records"]:
        assert list(record["seconds"]) == ["stock", "ours"] and min(record["seconds"].values()) > 0
        assert record["difference"] < (1e-5 if record["dtype"] == "float32" else 0.02)
    assert result["memory"]["32"]["ours"] < result["memory"]["32"]["stock"]
    assert "old" not in document and document.count("before") == len(PLACES)
    assert document.count("| 16 tokens, forward |") == 2 and "| 32 |" in document
    assert "Peak memory of attention" in output


def test_amounts(benchmark):
    work = benchmark.Work(benchmark.Heads(4, 2, 16), "bfloat16", 3, 3)
    assert work.amount == 2 * 2 * 4 * 16 * (1 + 2 + 3)
    assert benchmark.Work(work.heads, "bfloat16", 1, 32).amount == 2 * 2 * 32 * 16 * 2


def test_what_does_not_fit_is_left_out(benchmark, run, monkeypatch):
    nothing = SimpleNamespace(available=1)
    monkeypatch.setattr(benchmark.psutil, "virtual_memory", lambda: nothing)
    result, document, _ = run()
    assert list(result["memory"]["32"]) == ["ours"]
    (row,) = (line for line in document.splitlines() if line.startswith("| 32 |"))
    assert row.split(" | ")[1] == "" and row.endswith("|  |")
