"""Prints results, progress and errors of the commands."""

import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TextIO

import click

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the results as JSON; all else goes to stderr."
)


def console(as_json: bool):
    """A ``rich`` console for people: on stdout, or on stderr if stdout is for JSON only."""
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> NoReturn:
            raise  # the exception it is called for; the base class would end the process silently

    # With an explicit file, redirecting stdout later does not redirect the console.
    return PlainConsole(file=sys.stderr if as_json else sys.stdout, highlight=False)


def say(line: str) -> None:
    """Print to stderr, after what stdout still holds; if that cannot be written, silently do nothing."""
    with suppress(OSError):  # reported as the process ends, when it is flushed again
        if sys.stdout:
            sys.stdout.flush()
    _print_if_possible(sys.stderr, lambda: print(line, file=sys.stderr))


@contextmanager
def plain_ends() -> Iterator[None]:
    """Usage errors, and a stdout that cannot be written, end the process with one line and an exit status."""
    try:
        try:
            yield
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except click.ClickException as error:
        _end(error.show, error.exit_code)
    except click.Abort:
        _end(lambda: print("Aborted!", file=sys.stderr), 128 + signal.SIGINT)
    except OSError as error:
        _end(click.ClickException(str(error)).show, 1)
    except Exception:
        if not _others_run():
            raise
        _end(traceback.print_exc, 1)


def _end(show: Callable[[], None], status: int) -> NoReturn:
    _print_if_possible(sys.stderr, show)
    if sys.stdout:
        _print_if_possible(sys.stdout, lambda: None)
    if _others_run():
        os._exit(status)
    sys.exit(status)


def _others_run() -> bool:
    """Whether the interpreter, as it ends, would wait for other threads: for the server's forever."""
    return any(not t.daemon for t in threading.enumerate() if t is not threading.main_thread())


def _print_if_possible(stream: TextIO, show: Callable[[], None]) -> None:
    try:
        show()
        stream.flush()
    except OSError:
        # The interpreter flushes the stream's buffer as it ends; on /dev/null that cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_json(results: dict) -> None:
    click.echo(to_json(results))


def to_json(results: dict) -> str:
    """``results`` as JSON. NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_finite(results), indent=2)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
