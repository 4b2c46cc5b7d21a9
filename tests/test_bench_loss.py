"""What ``benchmarks/loss.py`` says of the loss by itself."""

import json
from pathlib import Path

from click.testing import CliRunner


def test_a_quick_run_prints_and_writes_everything(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import loss

    document = tmp_path / "benchmarks.md"
    document.write_text("before\n<!-- loss -->\nold\n<!-- end -->\n")
    done = CliRunner().invoke(loss.main, ["--quick", "--out", str(tmp_path), "--docs", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for record in json.loads((tmp_path / "loss.json").read_text())["records"]:
        assert list(record["seconds"]) == ["stock", "ours", "ours, half of the rows"]
        assert min(record["seconds"].values()) > 0
        assert max(record["difference"]) < (1e-5 if record["dtype"] == "float32" else 0.02)
    text = document.read_text()
    assert "old" not in text and text.startswith("before")
    assert "| float32 |" in text and "| bfloat16 |" in text and "Loss of a frozen head" in done.output
