"""Each example runs on a tiny checkpoint, and what it prints is right."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_demo

EXAMPLES = Path(__file__).parents[1] / "examples"
CHECKPOINT = "mlx_fused_demo/model-4bit"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    (folder / "mlx_fused_demo").mkdir()
    tiny_demo.make(folder / "mlx_fused_demo")
    return folder


def run(name, folder, *arguments):
    command = [sys.executable, EXAMPLES / f"{name}.py", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern, text)]


def test_every_example_is_tested_and_in_the_readme():
    readme = (EXAMPLES / "README.md").read_text()
    tested = Path(__file__).read_text()
    for script in EXAMPLES.glob("*.py"):
        assert f"[{script.name}]({script.name})" in readme and f"python examples/{script.name}" in readme
        assert f"python examples/{script.name}" in script.read_text()
        assert f'run("{script.stem}"' in tested


def test_qlora(folder):
    printed = run("qlora", folder)
    losses = numbers(r"  loss (\S+)", printed)
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.3
    # QKV, attention and the two last projections of each layer, the head and the embedding; MLPs name their
    # activation.
    assert (
        len(re.findall(r" fused +1/0", printed)) == 2 * 4 + 2 and len(re.findall(r"silu +1/0", printed)) == 2
    )
    assert "the loss without logits: 1 of 1 calls" in printed
    (difference,) = numbers(r"differs by (\S+)", printed)
    assert difference < 1e-4
    assert (folder / "qlora-adapters" / "adapters.safetensors").exists()


def test_generate(folder):
    printed = run("generate", folder, CHECKPOINT, "import os")
    assert (
        printed.count("import os") == 2 and "fused QKV 2 of 2" in printed and printed.endswith("same text\n")
    )
    assert len(numbers(r"(\d+) tokens/s", printed)) == 4


def test_transformer(folder):
    printed = run("transformer", folder)
    losses = numbers(r"(?:loss|->) (\S+)", printed)
    assert len(losses) == 4 and losses[1] < losses[0] - 1 and losses[3] < losses[2] - 0.5
    assert printed.count("LoRALinear") == printed.count("QuantizedLinear") == 3
    assert "saved and loaded 28 arrays" in printed  # A and B of seven linear layers, in two layers


def test_operations(folder):
    differences = numbers(r"differs from MLX's own operations by (\S+)", run("operations", folder))
    assert len(differences) == 7 and max(differences) < 1e-5


def test_check_model(folder):
    printed = run("check_model", folder, CHECKPOINT)
    (difference,) = numbers(r"logits differ by (\S+)", printed)
    assert difference < 1e-5
    assert printed.count(" fused ") >= 4 and len(numbers(r"([\d.]+) x", printed)) == 2
