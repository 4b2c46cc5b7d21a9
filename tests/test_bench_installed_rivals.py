"""The contenders of ``make bench`` that are installed; conftest.py leaves this out where one is not."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


def test_torch_runs_every_work():
    import models
    from outside import Torch
    from whole import works

    rival = Torch(models.TINY, "float32")
    calls = [rival.prepare(work) for work in works(16)]
    decoded, prefilled, loss = (call() for call in calls)
    assert decoded.shape[-1] == prefilled.shape[-1] == models.TINY["vocab_size"]
    assert calls[2]().item() < loss.item()


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_llama_cpp_runs_what_it_can(model_type):
    import models
    from outside import LlamaCpp
    from whole import works

    rival = LlamaCpp(models.TINY | {"model_type": model_type}, "4-bit bfloat16")
    decode, prefill, step = (rival.prepare(work) for work in works(16))
    decode(), prefill()
    assert step is None
