import subprocess
import sys
from importlib.metadata import version

import mlx.core as mx
import pytest
from click.testing import CliRunner

import mlx_fused
from mlx_fused.cli import main

EXTRA = ("mlx_lm", "click", "rich", "tokenizers", "transformers")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def without(package, arguments):
    """Runs the command in a process where ``package`` cannot be imported."""
    code = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['mlx-fused', *{arguments}]\n"
    return python(code + "from mlx_fused.cli import main; main()")


def test_version():
    result = CliRunner().invoke(main, ["--version"])
    assert result.output == f"mlx-fused, version {mlx_fused.__version__}\n"


def test_info():
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 0
    rows = dict(line.split(maxsplit=1) for line in result.output.splitlines() if "device" not in line)
    assert rows["mlx"] == version("mlx")
    assert rows["mlx-lm"] == version("mlx-lm")
    assert rows["mlx-fused"] == mlx_fused.__version__
    assert str(mx.default_device()) in result.output


def test_importing_the_package_needs_none_of_the_extra():
    loaded = python(f"import sys, mlx_fused; print(sorted(set({EXTRA}) & set(sys.modules)))")
    assert loaded.stdout == "[]\n", loaded.stderr


@pytest.mark.parametrize("package", EXTRA)
def test_missing_package_is_named_with_its_cure(package):
    result = without(package, ["demo"])
    assert result.returncode == 1
    assert "pip install 'mlx-fused[lm]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_info_works_without_mlx_lm():
    result = without("mlx_lm", ["info"])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("option", [["--iters", "0"], ["--seed", "-1"], ["--out", __file__]])
def test_bad_options_are_refused(option):
    result = CliRunner().invoke(main, ["demo", *option])
    assert result.exit_code == 2
    assert option[0] in result.output
