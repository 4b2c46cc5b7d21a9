"""Every model of mlx-lm, patched and as it comes, against exact layers; and docs/models.md against both."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from zoo import configs, parity, table

# Python 3.10 gets an older mlx-lm, with fewer models and gradients of fewer.
DOCUMENTED = version("mlx-lm") == table.MLX_LM


@pytest.mark.parametrize("name", configs.names())
def test_parity(name):
    result, (rows, _) = parity.measure(name), table.read()
    if DOCUMENTED:
        assert (result is not None) == (name in rows)
    if result is None:
        return
    errors = {measure: both for measure, both in result.errors.items() if not isinstance(both, str)}
    assert all(patched <= parity.FACTOR * stock for patched, stock in errors.values()), errors
    if DOCUMENTED:
        assert table.coverage(table.row(result)) == table.coverage(rows[name])


def test_page_is_as_written():
    rows, versions = table.read()
    assert not DOCUMENTED or table.page(rows, versions) == table.DOCUMENT.read_text()


# In place of mlx-lm's own tests, which take minutes: one that never passes, one that always does and one that
# passes with the stock model alone.
_TESTS = """
import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.llama import Attention, Model

model = Model(llama.ModelArgs("llama", 64, 2, 96, 4, 1e-5, 32))

def test_failing():
    raise OSError

def test_passing():
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 32)

def test_stock():
    assert all(type(layer.self_attn) is Attention for layer in model.layers)
"""


def test_running_mlx_lms_own_tests(tmp_path):
    files = {"mlx_lm/_version.py": f'__version__ = "{version("mlx-lm")}"', "tests/test_x.py": _TESTS}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    script = Path(__file__).with_name("run_mlx_lm_tests.py")
    run = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    *_, stock, patched, qkv, attention, mlp, residual, linear, norm, rope, changed = run.stdout.splitlines()
    assert stock == "stock:   2 passed, 1 failed, 0 skipped"
    assert patched == "patched: 1 passed, 2 failed, 0 skipped"
    assert qkv == "qkv: 2 of 2 calls ran fused"
    assert attention == "attention: 2 of 2 calls ran fused"
    assert mlp == "mlp: 2 of 2 calls ran fused"
    assert residual == "residual: 4 of 4 calls ran fused"
    assert linear == "linear: 1 of 1 calls ran fused"
    assert norm == "norm: 5 of 5 calls ran fused"
    assert rope == "rope: 4 of 4 calls ran fused"
    assert changed.endswith("test_x.py::test_stock: passed, patched failed")
