import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version
from unittest.mock import Mock

import mlx.core as mx
import pytest
from click.testing import CliRunner

import mlx_fused
from mlx_fused.cli import calls, main
from mlx_fused.cli.info import routes
from mlx_fused.cli.output import to_json
from mlx_fused.validate import sum_error

ENDS = ("", ", gradient")
WEIGHTLESS = ("norm", "rope", "attention")
WITHOUT_ROUTES = {f"bfloat16: {name}{end}" for name in WEIGHTLESS for end in ENDS}
EXTRA = ("mlx_lm", "click", "rich", "tokenizers", "transformers")


COMMAND = [sys.executable, "-c", "from mlx_fused.cli import main; main()"]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def without(package, arguments):
    """Runs the command in a process where ``package`` cannot be imported."""
    code = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['mlx-fused', *{arguments}]\n"
    return python(code + "from mlx_fused.cli import main; main()")


def test_version():
    result = CliRunner().invoke(main, ["--version"])
    assert result.output == f"mlx-fused, version {mlx_fused.__version__}\n"


def test_help_has_the_whole_sentence_of_every_command():
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["--help"]).output
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join(shown.split())
    for name, command in main.commands.items():
        sentence, _, _ = command.help.partition("\n\n")
        assert f" {name} {' '.join(sentence.split())}" in words


def test_info():
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 0
    facts, table, reasons = result.output.split("\n\n")
    rows = dict(line.split(maxsplit=1) for line in facts.splitlines() if "de" not in line.split()[0])
    assert rows["mlx"] == version("mlx")
    assert rows["mlx-lm"] == version("mlx-lm")
    assert rows["mlx-fused"] == mlx_fused.__version__
    assert str(mx.default_device()) in facts
    assert "4-bit + LoRA: QKV, gradient" in table and "bfloat16: gate * up, gradient" in table
    assert "4-bit: down + residual" in table and "4-bit: head" in table
    assert "bfloat16: norm" in table and "bfloat16: rope, gradient" in table
    assert set(re.findall(r"\[\d+\]", table)) == set(re.findall(r"^\[\d+\]", reasons, re.MULTILINE))


@pytest.mark.parametrize("command", ["info", "generate"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLX_FUSED", "offf"),
        ("MLX_FUSED_ROUTE", "fast"),
        ("MLX_FUSED_MAX_ISA", "AVX2"),
        ("MLX_FUSED_NUM_THREADS", "4abc"),
        ("MLX_FUSED_NUM_THREADS", "0"),
    ],
)
def test_settings_that_are_none_are_errors_of_usage(command, name, value):
    result = subprocess.run(
        [sys.executable, "-c", f"from mlx_fused.cli import main; main(['{command}'])"],
        capture_output=True,
        text=True,
        env=os.environ | {name: value},
    )
    assert result.returncode == 2
    assert f"{name} must be " in result.stderr and f"but got '{value}'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_demo_does_not_start_in_vain(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "file" / "demo")])
    assert result.exit_code == 1 and "file" in result.output and isinstance(result.exception, SystemExit)
    monkeypatch.setenv("MLX_FUSED", "off")
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "demo")])
    assert (
        result.exit_code == 2 and "MLX_FUSED must be unset or on for the demo but is 'off'" in result.output
    )


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        '{"text_config": null}',
        '{"hidden_size": "x", "num_attention_heads": 2, "head_dim": 64}',
        '{"hidden_size": 64, "num_attention_heads": 0}',
        '{"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 3}',
        '{"hidden_size": 64, "num_attention_heads": 4, "head_dim": 5}',
        '{"hidden_size": 64, "num_attention_heads": 4, "head_dim": true}',
        '{"hidden_size": 64000000000, "num_attention_heads": 4}',
        '{"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 1.5}',
    ],
)
def test_bench_of_a_model_without_sizes(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    result = CliRunner().invoke(main, ["bench", "--model", str(tmp_path)])
    assert result.exit_code == 2 and "must have the sizes of a transformer block" in result.output


def test_bench_of_a_model_too_narrow_to_quantize(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 32, "num_attention_heads": 2}')
    result = CliRunner().invoke(main, ["bench", "--model", str(tmp_path), "--weights", "4-bit"])
    assert result.exit_code == 2 and "divisible by 64" in result.output


@pytest.mark.parametrize("rows", [2**31 - 1, 2**31, 10**30])
def test_bench_of_more_tokens_than_memory_holds(rows):
    result = CliRunner().invoke(main, ["bench", "--rows", "1", "--rows", str(rows)])
    assert result.exit_code == 2 and str(rows) in result.output


def test_bench_of_a_model_larger_than_memory(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 2000000000, "num_attention_heads": 50000000}')
    result = CliRunner().invoke(main, ["bench", "--model", str(tmp_path), "--weights", "float32"])
    assert result.exit_code == 2 and "must fit in this machine's" in result.output


@pytest.mark.parametrize("weights", calls.WEIGHTS)
def test_the_memory_of_a_call_is_not_overestimated(weights):
    for rows in (1, 100, 400):
        mx.clear_cache()
        mx.reset_peak_memory()
        gradient = calls.make_block(SMALL, weights, rows).gradient()
        mx.eval(gradient.stock(*gradient.inputs))
        assert calls.peak_memory(SMALL, weights, rows) <= mx.get_peak_memory()


def test_json_has_no_nan():
    assert json.loads(to_json({"a": [math.nan, 1.5], "b": math.inf})) == {"a": [None, 1.5], "b": None}


def test_info_as_json_tells_what_the_environment_sets(monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")
    results = json.loads(CliRunner().invoke(main, ["info", "--json"]).stdout)
    assert results["mlx"] == version("mlx")
    assert results["settings"] == {"MLX_FUSED_ROUTE": "composed", "MLX_FUSED_CACHE": os.devnull}
    routed = {name: row for name, row in results["routes"].items() if name not in WITHOUT_ROUTES}
    decisions = [decision for row in routed.values() for decision in row.values()]
    assert len(routed) == len(results["routes"]) - len(WITHOUT_ROUTES)
    assert {(d["route"], d["source"]) for d in decisions} == {("composed", "MLX_FUSED_ROUTE")}


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="the table of the CPU")
def test_all_calls_are_fused_on_the_cpu(monkeypatch):
    monkeypatch.delenv("MLX_FUSED_ROUTE", raising=False)
    for name, row in routes():
        source = "no route" if name in WITHOUT_ROUTES else "built-in"
        assert {(d.route, d.source) for d in row} == {("fused", source)}


def test_what_is_mlxs_own_without_a_route_is_told(monkeypatch):
    monkeypatch.setattr(mlx_fused, "fused_rms_norm", mx.fast.rms_norm)  # as on a GPU
    found = dict(routes())
    for end in ENDS:
        assert {(d.route, d.source) for d in found[f"bfloat16: norm{end}"]} == {("composed", "no kernel")}
        assert {d.route for d in found[f"bfloat16: attention{end}"]} == {"fused"}


def test_importing_the_package_needs_none_of_the_extra():
    loaded = python(f"import sys, mlx_fused; print(sorted(set({EXTRA}) & set(sys.modules)))")
    assert loaded.stdout == "[]\n", loaded.stderr


@pytest.mark.parametrize("package", EXTRA)
def test_missing_package_is_named_with_its_cure(package):
    result = without(package, ["demo"])
    assert result.returncode == 1
    assert "pip install 'mlx-fused[lm]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("package", "command", "cure"),
    [
        ("mlx_lm", "generate", "mlx-fused[lm]"),
        ("lm_eval", "evaluate", "mlx-lm[evaluate]"),
    ],
)
def test_mlx_lms_commands_say_what_they_need(package, command, cure):
    result = without(package, [command, "--model", "any"])
    assert result.returncode == 1
    assert f"pip install '{cure}'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_info_works_without_mlx_lm():
    result = without("mlx_lm", ["info"])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("option", [["--iters", "0"], ["--seed", "-1"], ["--out", __file__]])
def test_bad_options_are_refused(option):
    result = CliRunner().invoke(main, ["demo", *option])
    assert result.exit_code == 2
    assert option[0] in result.output


# Streams that cannot be written.


def pipe_without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


BROKEN = {"pipe": pipe_without_reader, "closed": lambda: None}
if os.path.exists("/dev/full"):
    BROKEN["full disk"] = lambda: os.open("/dev/full", os.O_WRONLY)


@pytest.fixture(params=BROKEN)
def broken(request):
    """Runs a command whose stdout or stderr cannot be written."""

    def run(number, arguments):
        # The shell alone can close a stream of what it starts.
        file, closing = BROKEN[request.param](), f"{number}>&-" if request.param == "closed" else ""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | (
            {} if file is None else {("stdout", "stderr")[number - 1]: file}
        )
        shell = ["sh", "-c", f'"$@" {closing}', "sh"]
        done = subprocess.run([*shell, *COMMAND, *map(str, arguments)], text=True, **streams)
        if file is not None:
            os.close(file)
        return done

    return run


@pytest.mark.parametrize(
    "command", ["info", "info --json", "--help", "demo --help", "bench", "validate", "demo"]
)
def test_every_command_ends_in_one_line_where_stdout_is_broken(broken, checkpoint, tmp_path, command):
    more = {
        "bench": ["--model", checkpoint / "model", "--rows", "1", "--weights", "float32"],
        "validate": [checkpoint / "model", "--tokens", "2"],
        "demo": ["--out", tmp_path],
    }
    done = broken(1, command.split() + more.get(command, []))
    assert done.returncode == 1
    *others, last = done.stderr.splitlines()
    assert last.startswith("Error: ") and all(line.startswith("mlx-fused: ") for line in others)


@pytest.mark.parametrize("command", ["info --nosuch", "bench --rows 0", "generate --nosuch"])
def test_errors_of_use_keep_their_status_where_stderr_is_broken(broken, command):
    done = broken(2, command.split())
    assert (done.returncode, done.stdout) == (2, "")


def test_json_is_alone_on_stdout_where_stderr_is_broken(broken, checkpoint):
    sizes = ["--model", checkpoint / "model", "--rows", "1", "--weights", "float32"]
    done = broken(2, ["bench", *sizes, "--json"])
    assert done.returncode in (0, 1)  # closed on purpose, or not
    assert done.returncode or "cells" in json.loads(done.stdout)


@pytest.mark.parametrize("command", ["validate", "demo"])
def test_an_interrupt_ends_a_command_as_a_shell_expects(monkeypatch, tmp_path, capsys, command):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_fused.validate.load", interrupt)
    monkeypatch.setattr("mlx_fused.demo.run", interrupt)
    with pytest.raises(SystemExit) as end:
        main.main([command, *(["--out", str(tmp_path)] if command == "demo" else ["a-model"])])
    assert end.value.code == 130
    assert capsys.readouterr().err.split() == ["Aborted!"]


# The benchmark.

SMALL = calls.Sizes(
    hidden=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,  # twice as wide inside
    intermediate=192,
    vocabulary=96,
)


@pytest.mark.parametrize("weights", calls.WEIGHTS)
def test_what_is_timed_computes_the_same(monkeypatch, weights):
    # MLX sums 16-bit products in 16 bits on some devices.
    monkeypatch.setitem(calls.WEIGHTS, weights, mx.float32)
    made = [make(SMALL, weights, 3) for make in (calls.make_loss, calls.make_block)]
    made += calls.make_calls(SMALL, weights, 3) + calls.make_weightless(SMALL, weights, 3)
    embedding = calls.make_embedding(SMALL, weights, 3)
    for call in [embedding, *made, *(call.gradient() for call in made)]:
        for stock, fused in zip(call.stock(*call.inputs), call.fused(*call.inputs), strict=True):
            assert stock.shape == fused.shape and stock.dtype == fused.dtype
            bound = sum_error(1000) * mx.abs(stock).max().item()  # no longer chain of sums in a block
            assert mx.abs(stock - fused).max().item() <= bound, call.name


def test_bench_uses_the_sizes_of_a_model(tmp_path):
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    sizes |= {"intermediate_size": 192, "vocab_size": 96}
    model = tmp_path / "[bold]model"  # what is markup to rich
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"text_config": sizes}))
    result = CliRunner().invoke(
        main, ["bench", "--model", str(model), "--rows", "2", "--weights", "float32", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert "[bold]model" in "".join(result.stderr.split())
    results = json.loads(result.stdout)
    assert results["sizes"] == vars(SMALL)
    assert results["machine"]["mlx"] == version("mlx")
    linear = ["QKV", "output + residual", "gate * up", "down + residual", "head", "loss", "block"]
    names = [name + end for some in (linear, WEIGHTLESS) for end in ENDS for name in some]
    names.insert(0, "embedding")
    assert [cell["operation"] for cell in results["cells"]] == names
    assert all(cell["stock_s"] > 0 and cell["fused_s"] > 0 for cell in results["cells"])
    assert "speedup" in result.stderr


def test_every_operation_is_timed(monkeypatch):
    names = {name for name in mlx_fused.__all__ if name.startswith("fused_") and not name.endswith("_bwd")}
    noted = {name: Mock(wraps=getattr(mlx_fused, name)) for name in names}
    for name, operation in noted.items():
        monkeypatch.setattr(mlx_fused, name, operation)
    given = SMALL, "float32", 1
    alone = calls.make_embedding(*given), calls.make_loss(*given)
    for call in [*alone, *calls.make_calls(*given), *calls.make_weightless(*given)]:
        call.fused(*call.inputs)
    assert {name for name, operation in noted.items() if operation.called} == names


def test_the_table_of_bench_fits_a_terminal_of_80_columns(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_attention_heads": 1}')
    monkeypatch.setattr(sys.modules["mlx_fused.cli.bench"], "side_by_side", lambda call: (3600.0, 0.0125))
    runner = CliRunner(env={"COLUMNS": "80"})
    shown = runner.invoke(main, ["bench", "--model", str(tmp_path), "--rows", "1000"]).output
    rows = [line for line in shown.splitlines() if line.startswith(tuple(calls.WEIGHTS))]
    assert len(rows) == len(calls.WEIGHTS) * (1 + 2 * 7) + 2 * 3 * len(WEIGHTLESS)
    for row in rows:
        assert row.split()[-4:] == ["1000", "3600000", "12.500", "288000"] and len(row) <= 80
    assert "1 of keys, MLP 64 wide, 8192 words" in " ".join(shown.split())


def test_bench_says_what_a_config_lacks(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    result = CliRunner().invoke(main, ["bench", "--model", str(tmp_path)])
    assert result.exit_code == 2
    assert "hidden_size" in result.output
