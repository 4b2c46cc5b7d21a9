"""mlx-lm's own commands, with every model patched as it loads."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module

import mlx_fused
from mlx_fused.cli.output import say

# The variables in which launchers (mlx.launch, Open MPI, MPICH) tell a process its rank.
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
    """Patch every model that ``mlx_lm.utils.load_model`` returns; all of mlx-lm's loaders call it."""
    utils = import_module("mlx_lm.utils")
    load_model = utils.load_model

    @wraps(load_model)
    def load_and_patch(*args, **kwargs):
        model, config = load_model(*args, **kwargs)
        report = mlx_fused.patch(model)
        # Only the first process prints. Asking MLX for the rank would start communication between processes.
        if all(os.environ.get(name, "0") == "0" for name in _RANKS):
            say(report.summary)
        return model, config

    utils.load_model = load_and_patch
    try:
        yield
    finally:
        utils.load_model = load_model
