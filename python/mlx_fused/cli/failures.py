"""Ends the user's and the machine's failures in one line. Bugs keep their traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

import click

INSTALL = "This needs more packages: pip install 'mlx-fused[lm]'"
# What mlx-lm's own extras install, and when it is needed.
_EXTRAS = {
    "datasets": ("If --data is left out or is no directory, the data is the hub's, which needs", "train"),
    "lm_eval": ("This needs", "evaluate"),
    "PIL": ("Images need", "vision"),
}
# Modules that run models; of ours all but the commands.
_RUNNING = ("mlx_lm.models.", "mlx.nn.utils", "mlx_fused.")
_OUR_COMMANDS = "mlx_fused.cli"
_NETWORK = ("httpx", "httpx2", "huggingface_hub")  # whose exceptions are not all an OSError


@contextmanager
def of_the_machine() -> Iterator[None]:
    """Missing packages, and files, streams and sockets that cannot be used, become errors of one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        what, extra = _EXTRAS.get((error.name or "").partition(".")[0], (None, None))
        cure = f"{what} another package: pip install 'mlx-lm[{extra}]'" if extra else INSTALL
        raise click.ClickException(f"{error}. {cure}") from error
    except OSError as error:  # click would end without a message on a broken pipe
        raise click.ClickException(_in_one_line(error)) from error


@contextmanager
def of_mlx_lm() -> Iterator[None]:
    """The same for mlx-lm's commands, and errors about their arguments, models and data."""
    try:
        with of_the_machine():
            yield
    except KeyboardInterrupt as error:
        raise click.Abort from error
    except EOFError as error:
        raise click.ClickException("The input has ended.") from error
    except Exception as error:
        if not _is_the_users(error):
            raise
        raise click.ClickException(_in_one_line(error)) from error


def _is_the_users(error: Exception) -> bool:
    from yaml import YAMLError

    if isinstance(error, ImportError | ValueError | NotImplementedError):
        # mlx-lm raises these for bad arguments, checkpoints and data; from a running model they are bugs.
        modules = {frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)}
        modules -= {"mlx_lm.models.cache"}  # also reads the file of a prompt cache
        return not any(name.startswith(_RUNNING) for name in modules if not name.startswith(_OUR_COMMANDS))
    if isinstance(error, RuntimeError):
        return str(error).startswith(("[load", "[save"))  # MLX cannot read or write a file
    return isinstance(error, YAMLError) or type(error).__module__.partition(".")[0] in _NETWORK


def _in_one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    kind = type(error)
    return message if message and kind.__module__ == "builtins" else f"{kind.__name__}: {message}"
