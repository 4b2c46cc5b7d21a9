"""mlx-lm's own commands, patched: what they print, and that they run fused."""

import json
import os
import sys
from copy import deepcopy
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace

import mlx.core as mx
import mlx_lm.utils
import pytest

import mlx_fused
from commands import TOKENS, all_fused, counts, train
from mlx_fused.cli import main, passthrough
from mlx_fused.patching import Options, _patch
from mlx_fused.patching.modules import FusedModule


def theirs(arguments):
    sys.argv = [f"mlx-fused {arguments[0]}", *arguments[1:]]
    passthrough.module_of(arguments[0]).main()


@pytest.fixture
def packages(monkeypatch):
    """Stands in for packages that mlx-lm needs for some commands only."""

    def evaluate(model, **_):
        (score, _), *_ = model.loglikelihood([SimpleNamespace(args=("def", " f"))])
        return {"results": {"task": {"score": score}}}

    def load_dataset(path, split, **_):
        lines = Path(path, "train.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines[: 1 if split.endswith("[:1]") else None]]

    contents = {
        "datasets": {"load_dataset": load_dataset},
        "lm_eval": {"simple_evaluate": evaluate},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": object},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: cls},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    monkeypatch.setattr(passthrough.module_of("evaluate"), "version", lambda name: "0")
    yield
    del sys.modules["mlx_lm.evaluate"]


def test_every_command_of_mlx_lm_is_passed_through_or_explained():
    scripts = {entry.name for entry in entry_points(group="console_scripts")}
    names = {name.removeprefix("mlx_lm.") for name in scripts if name.startswith("mlx_lm.")}
    assert names == passthrough.COMMANDS.keys() | passthrough.UNPATCHED.keys()


@pytest.mark.parametrize("name", passthrough.UNPATCHED)
def test_commands_that_gain_nothing_name_mlx_lms(run, name):
    code, out, err = run(main.main, [name, "--model", "any"])
    assert (code, out) == (2, "")
    assert f"Run mlx_lm.{name} instead." in err.splitlines()[-1]


@pytest.mark.parametrize("name", ["fuse", "convert"])
def test_fuse_and_convert_do_not_run_the_model(run, checkpoint, tmp_path, monkeypatch, name):
    monkeypatch.setattr("mlx_lm.models.llama.Attention.__call__", lambda *_: pytest.fail("it runs"))
    options = {
        "fuse": ["model-4bit", "--adapter-path", str(checkpoint / "adapters"), "--save-path"],
        "convert": ["model", "-q", "--q-group-size", "32", "--mlx-path"],
    }
    model, *more = options[name]
    assert run(theirs, [name, "--model", str(checkpoint / model), *more, str(tmp_path / "made")])[0] == 0
    assert (tmp_path / "made" / "model.safetensors").exists()


@pytest.mark.parametrize("name", passthrough.COMMANDS)
@pytest.mark.parametrize("option", ["--help", "--no-such-option"])
def test_help_errors_and_exit_codes_are_mlx_lms(run, packages, name, option):
    ours = run(main.main, [name, option])
    assert ours == run(theirs, [name, option])
    assert ours[0] == (0 if option == "--help" else 2)
    prog = "Evaluate an MLX model" if name == "evaluate" else f"mlx-fused {name}"
    assert f"usage: {prog} " in ours[1] + ours[2]


@pytest.mark.parametrize("adapters", [False, True])
def test_generate_prints_what_mlx_lm_prints_and_patches(run, checkpoint, adapters):
    options = ["--adapter-path", str(checkpoint / "adapters")] if adapters else []
    options += ["--max-tokens", "4", "--verbose", "False", "--prompt=-- -x"]
    arguments = ["generate", "--model", str(checkpoint / "model-4bit"), *options]
    code, out, err = run(main.main, arguments)
    assert (code, out) == run(theirs, arguments)[:2]
    assert code == 0
    first, _ = (line for line in err.splitlines() if line.startswith("mlx-fused:"))
    assert "fused QKV 2 of 2" in first
    found, more = counts(err)
    assert all_fused(found) and found["qkv"][1] >= 2 * 4 and more == ""


def test_lora_trains_what_mlx_lm_trains(run, checkpoint, tmp_path):
    adapters = {}
    for name, command in (("ours", main.main), ("theirs", theirs)):
        code, _, err = run(command, train(checkpoint, tmp_path / name))
        assert code == 0
        assert ("mlx-fused: " in err) == (name == "ours")
        adapters[name] = mx.load(str(tmp_path / name / "adapters.safetensors"))
        if name == "ours":
            found, more = counts(err)
            assert all_fused(found, of_training=True)
            assert more == "; a compiled training step counts when it is traced"
    assert adapters["ours"].keys() == adapters["theirs"].keys()
    for key, array in adapters["ours"].items():
        assert mx.allclose(array, adapters["theirs"][key], rtol=1e-3, atol=1e-6), key


def test_the_closing_line_tells_that_dora_is_not_fused(run, checkpoint, tmp_path):
    generate = ["generate", "--model", str(checkpoint / "model-4bit"), "--max-tokens", "2"]
    trained = run(main.main, train(checkpoint, tmp_path, "--fine-tune-type", "dora"))
    used = run(main.main, [*generate, "--adapter-path", str(tmp_path)])
    for code, _, err in (trained, used):
        assert code == 0 and "fused QKV 2 of 2" in err  # before the adapters are there
        found, more = counts(err)
        # What has no adapters: the head, with its loss, norms, rotary positions and attention itself.
        without = {"linear", "norm", "rope", "attention", "loss"} & found.keys()
        assert all(found.pop(part)[0] > 0 for part in without) and len(found) == 3
        assert all(fused == 0 < total for fused, total in found.values())
        assert "(last obstacle: gate_proj is DoRALinear)" in more
        assert "(last obstacle: q_proj is DoRALinear)" in more
        assert "(last obstacle: down_proj is DoRALinear)" in more


def test_models_whose_switch_is_off_say_so_at_the_end(run, checkpoint, monkeypatch):
    monkeypatch.setenv("MLX_FUSED", "off")
    code, _, err = run(main.main, ["generate", "--model", str(checkpoint / "model"), "--max-tokens", "2"])
    assert code == 0
    assert err.splitlines()[-1] == "mlx-fused: nothing ran fused, since MLX_FUSED=off"


def test_the_closing_line_tells_what_was_routed_to_mlx(run, checkpoint, monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")
    code, _, err = run(main.main, ["generate", "--model", str(checkpoint / "model"), "--max-tokens", "2"])
    found, more = counts(err)
    assert code == 0 and all_fused(found)
    for part in ("norm", "rope", "attention"):  # which no routing decides
        found.pop(part)
    by_mlx = [f"{fused} of these by MLX's own operations" for fused, _ in found.values()]
    assert [text for text in more.split(", ") if text] == by_mlx


def test_a_draft_model_is_patched_and_counted(run, checkpoint):
    drafted = ["--draft-model", str(checkpoint / "model-4bit"), "--num-draft-tokens", "1"]
    arguments = ["generate", "--model", str(checkpoint / "model"), "--max-tokens", "5"]
    _, _, alone = run(main.main, arguments)
    code, _, err = run(main.main, [*arguments, *drafted])
    assert code == 0 and err.count("fused QKV 2 of 2") == 2 and err.count("ran fused") == 1
    assert counts(err)[0]["qkv"][1] > counts(alone)[0]["qkv"][1]


# The other commands.


@pytest.fixture
def calibration(checkpoint, tmp_path, monkeypatch):
    """The text with which mlx-lm quantizes, which it would download."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / ".cache" / "mlx-lm" / "calibration_v5.txt"
    file.parent.mkdir(parents=True)
    file.write_text((checkpoint / "data" / "train.jsonl").read_text()[:3000])


QUANTIZE = ["--mlx-path", "made"]
OTHERS = {
    "evaluate": ["--tasks", "task", "--output-dir", "made"],
    "perplexity": ["--data-path", "data", "--num-samples", "4", "--sequence-length", "32"],
    "benchmark": ["-p", "8", "-g", "2", "-n", "1"],
    "benchmark of a batch": ["-p", "8", "-g", "2", "-n", "1", "-b", "2"],
    "cache_prompt": ["--prompt", "def", "--prompt-cache-file", "made.safetensors"],
    "chat": ["--max-tokens", "2"],
    "dwq": [*QUANTIZE, "--num-samples=4", "--max-seq-length=33", "--data-path=data", "--group-size=32"],
    "dynamic_quant": [*QUANTIZE, "--low-group-size=32", "--high-group-size=32"],
}


@pytest.mark.parametrize("command", OTHERS)
def test_other_commands_run_the_patched_model(run, checkpoint, packages, calibration, monkeypatch, command):
    (Path.cwd() / "data").symlink_to(checkpoint / "data")
    queries = iter(["def", "q"])
    monkeypatch.setattr("builtins.input", lambda *_: next(queries))
    monkeypatch.setattr(
        mlx_lm.tokenizer_utils.TokenizerWrapper, "apply_chat_template", lambda *_, **__: [1, 2], raising=False
    )
    name, model = command.split()[0], str(checkpoint / "model")
    code, _, err = run(main.main, [name, "--model", model, *OTHERS[command]])
    assert code == 0, err
    found, more = counts(err)
    assert all_fused(found) and more == ""


def test_awq_runs_fused_what_it_does_not_record(run, checkpoint, calibration):
    options = [*QUANTIZE, "--group-size=32", "--num-samples=2", "--sequence-length=32", "--n-grid=3"]
    code, _, err = run(main.main, ["awq", "--model", str(checkpoint / "model"), *options])
    assert code == 0, err
    found, more = counts(err)
    fused, total = found["qkv"]
    assert (fused, total) == (total - 2, total)  # each of the two layers runs once with hooks
    assert "q_proj is Catcher" in more


@pytest.fixture
def loads_a_model(checkpoint, monkeypatch):
    """Makes mlx-lm's chat load a model, call it and end; patching by itself prints nothing."""
    loaded = []

    def chat():
        loaded.append(mlx_lm.utils.load(str(checkpoint / "model"))[0])
        loaded[0](TOKENS)

    monkeypatch.setattr(
        mlx_fused,
        "patch",
        lambda model: _patch(model, Options(True, "auto", True, True, True, True, "auto", True, False)),
    )
    monkeypatch.setattr("mlx_lm.chat.main", chat)
    return loaded


@pytest.mark.parametrize(
    ("environment", "lines"),
    [
        ({}, 1),
        ({"MLX_RANK": "0"}, 1),
        ({"MLX_RANK": "1"}, 0),
        ({"OMPI_COMM_WORLD_RANK": "1"}, 0),
        ({"PMI_RANK": "3"}, 0),
    ],
    ids=str,
)
def test_one_rank_says_what_is_fused_and_communication_is_not_started(
    run, loads_a_model, monkeypatch, environment, lines
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mx.distributed, "init", lambda *_: pytest.fail("communication was started"))
    code, _, err = run(main.main, ["chat"])
    assert code == 0
    assert err.count("mlx-fused: fused QKV 2 of 2") == err.count("mlx-fused: ran fused") == lines


def test_models_are_patched_where_stderr_is_broken(loads_a_model, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        with pytest.raises(SystemExit) as end:
            main.main(["chat"])
    assert end.value.code is None
    assert isinstance(loads_a_model[0].layers[0].self_attn, FusedModule)


def test_copies_of_a_model_count(run, checkpoint, monkeypatch):
    def chat():
        deepcopy(mlx_lm.utils.load(str(checkpoint / "model"))[0])(TOKENS)

    monkeypatch.setattr("mlx_lm.chat.main", chat)
    _, _, err = run(main.main, ["chat"])
    assert counts(err)[0]["qkv"] == (2, 2)
