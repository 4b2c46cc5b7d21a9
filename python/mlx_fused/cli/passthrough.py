"""mlx-lm's own commands, with every model patched as it loads."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module

import mlx_fused
from mlx_fused.cli.output import say

# Where launchers say which of several processes this is: mlx.launch, Open MPI, and MPICH and its kin.
_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
COMMANDS = {
    "lora": "Fine-tune",
    "generate": "Generate text",
    "chat": "Chat",
    "server": "Serve",
}


def load(name: str) -> Callable[[list[str]], None]:
    """The command ``mlx_lm.<name>`` as a function of its arguments."""
    module = import_module(f"mlx_lm.{name}")

    def run(arguments: list[str]) -> None:
        sys.argv = [f"mlx-fused {name}", *arguments]
        with _patching_loader():
            module.main()

    return run


@contextmanager
def _patching_loader() -> Iterator[None]:
    """Patch what ``mlx_lm.utils.load_model`` loads: all ways to load a model end there."""
    utils = import_module("mlx_lm.utils")
    load_model = utils.load_model

    @wraps(load_model)
    def load_and_patch(*args, **kwargs):
        model, config = load_model(*args, **kwargs)
        report = mlx_fused.patch(model)
        # Read off the environment, for asking MLX would start communication that mlx-lm may not want.
        if all(os.environ.get(name, "0") == "0" for name in _RANKS):
            say(report.summary)
        return model, config

    utils.load_model = load_and_patch
    try:
        yield
    finally:
        utils.load_model = load_model
