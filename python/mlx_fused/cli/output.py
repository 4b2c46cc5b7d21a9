"""Where results and what accompanies them are printed."""

import json
import math
import sys

import click

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the results as JSON; all else goes to stderr."
)


def console(as_json: bool):
    """A ``rich`` console for people: on stdout, or on stderr if JSON is to have stdout to itself."""
    from rich.console import Console

    # The file is given so that what redirects stdout later does not redirect the console.
    return Console(file=sys.stderr if as_json else sys.stdout, highlight=False)


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
