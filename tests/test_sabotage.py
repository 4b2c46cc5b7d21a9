"""Whatever is 1 % wrong in a fused operation, validation fails; and only then."""

import re
from contextlib import nullcontext

import pytest
from click.testing import CliRunner
from mlx_lm.utils import load_tokenizer, save

import sabotage
import tiny_demo
from mlx_fused.cli import main
from sabotage import Target

# Biases and a scaled residual; no residual; experts: and every kind of weight.
SOME = [("granite", "bfloat16"), ("gemma3_text", "4-bit bfloat16"), ("mixtral", "float32")]
ALL = [(family, weights) for family in sabotage.FAMILIES for weights in sabotage.WEIGHTS]


@pytest.mark.parametrize(
    ("family", "weights"),
    [pytest.param(*case, marks=[] if case in SOME else pytest.mark.slow) for case in ALL],
)
def test_every_sabotage_is_noticed(family, weights):
    outcomes = sabotage.judge(family, weights)
    assert all(outcome.honest and not outcome.missed for outcome in outcomes)
    assert sabotage.table_row(*outcomes) in sabotage.DOCUMENT.read_text().splitlines()


def test_the_page_has_every_case():
    lines = sabotage.DOCUMENT.read_text().splitlines()
    assert [tuple(line.split(" | ")[:2]) for line in lines if "passes" in line] == [
        (f"| {family}", weights) for family, weights in ALL
    ]
    total = sum(int(n) for line in lines for n in line.split() if line.startswith("| ") and n.isdigit())
    noticed, of, inconclusive, missed = (int(n) for n in re.findall(r"\d+", lines[-1]))
    assert missed == 0 and noticed + inconclusive == of and inconclusive < 0.02 * of
    assert total == noticed + of  # "24 of 24"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Makes the checkpoint of a tiny model, with a tokenizer."""
    folder = tmp_path_factory.mktemp("sabotage")
    tiny_demo.make(folder)

    def make(family, weights):
        path = folder / f"{family} {weights}"
        if not path.exists():
            config = sabotage.config(family)
            if weights.startswith("4-bit"):
                config["quantization"] = dict(sabotage.QUANTIZATION)
            tokenizer = load_tokenizer(folder / "model")
            save(path, folder / "model", sabotage.make(family, weights), tokenizer, config)
        return path

    return make


def wrong_lora(operation):
    """A mistake that made no difference to a verdict by the stock model's own errors."""

    def run(**arguments):
        outputs = operation(**arguments)
        if "input" not in arguments or arguments["weight"][0].lora_a is None:
            return outputs
        q, k, v = outputs
        return 1.5 * q, k, 0.5 * v

    return run


MISTAKES = {
    "none": nullcontext,
    "q and v of the LoRA operation": lambda: sabotage.wrapped(wrong_lora),
    "q's weight": lambda: sabotage.sabotage(Target("weight", "q")),
    "k's bias": lambda: sabotage.sabotage(Target("bias", "k")),
    "the residual": lambda: sabotage.sabotage(Target("residual", "o")),
    "gate's weight": lambda: sabotage.sabotage(Target("weight", "gate")),
    "up's weight in the gradient of the input": lambda: sabotage.sabotage(Target("weight", "up", "x")),
    "the head": lambda: sabotage.sabotage(Target("weight", "y")),
    "the gradient of v's B": lambda: sabotage.sabotage(Target("lora_b", "v", "lora_b")),
    "q's adapter in the gradient of the input": lambda: sabotage.sabotage(Target("lora_a", "q", "input")),
}


@pytest.mark.parametrize(
    ("family", "weights", "mistake"),
    [
        ("gemma3_text", "4-bit bfloat16", "none"),
        ("gemma3_text", "4-bit bfloat16", "q and v of the LoRA operation"),
        ("gemma3_text", "4-bit bfloat16", "q's weight"),
        ("gemma3_text", "4-bit bfloat16", "q's adapter in the gradient of the input"),
        ("llama", "bfloat16", "none"),
        ("llama", "bfloat16", "k's bias"),
        ("llama", "bfloat16", "the residual"),
        ("llama", "bfloat16", "gate's weight"),
        ("llama", "bfloat16", "up's weight in the gradient of the input"),
        ("qwen3", "float32", "none"),
        ("qwen3", "float32", "the head"),
        ("qwen3", "float32", "the gradient of v's B"),
    ],
)
def test_the_command_fails_if_something_is_wrong(checkpoint, family, weights, mistake):
    with MISTAKES[mistake]():
        arguments = [str(checkpoint(family, weights)), "--tokens", "4", "--prompt", "Nothing but this."]
        result = CliRunner().invoke(main, ["validate", *arguments])
    assert result.exit_code == (mistake != "none"), result.output
    assert ("PASSED" if mistake == "none" else "FAILED") in result.output
