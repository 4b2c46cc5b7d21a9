"""Where results, what accompanies them and errors are printed."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

import click

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the results as JSON; all else goes to stderr."
)


def console(as_json: bool):
    """A ``rich`` console for people: on stdout, or on stderr if JSON is to have stdout to itself."""
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> NoReturn:
            raise  # what it is called for: the base class would end the process without a word

    # The file is given so that what redirects stdout later does not redirect the console.
    return PlainConsole(file=sys.stderr if as_json else sys.stdout, highlight=False)


def say(line: str) -> None:
    """Print to stderr, if that can be written: nobody is left to be told that it cannot."""
    _print_if_possible(sys.stderr, lambda: print(line, file=sys.stderr))


@contextmanager
def plain_ends() -> Iterator[None]:
    """Errors of use, and a stdout that cannot be written, end the process with a line and a status."""
    try:
        try:
            yield
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except click.ClickException as error:
        _end(error.show, error.exit_code)
    except click.Abort:
        _end(lambda: print("Aborted!", file=sys.stderr), 1)
    except OSError as error:
        _end(click.ClickException(str(error)).show, 1)


def _end(show: Callable[[], None], status: int) -> NoReturn:
    _print_if_possible(sys.stderr, show)
    if sys.stdout:
        _print_if_possible(sys.stdout, lambda: None)
    sys.exit(status)


def _print_if_possible(stream: TextIO, show: Callable[[], None]) -> None:
    try:
        show()
        stream.flush()
    except OSError:
        # What is left in the stream's buffer must go somewhere, or the interpreter complains as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_json(results: dict) -> None:
    click.echo(to_json(results))


def to_json(results: dict) -> str:
    """JSON has no NaN and no infinity: null stands for them."""
    return json.dumps(_finite(results), indent=2)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
