"""mlx-lm's own commands, with every model patched as it loads."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module

import mlx_fused

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
        mlx_fused.patch(model)
        return model, config

    utils.load_model = load_and_patch
    try:
        yield
    finally:
        utils.load_model = load_model
