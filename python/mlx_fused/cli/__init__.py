"""The ``mlx-fused`` command."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

import mlx_fused

_INSTALL = "This needs more packages: pip install 'mlx-fused[lm]'"

try:
    import click
except ModuleNotFoundError:
    sys.exit(_INSTALL)

from mlx_fused.cli import output, passthrough  # noqa: E402
from mlx_fused.cli.bench import bench  # noqa: E402
from mlx_fused.cli.demo import demo  # noqa: E402
from mlx_fused.cli.info import info  # noqa: E402
from mlx_fused.cli.validate import validate  # noqa: E402
from mlx_fused.patching.report import switched_off  # noqa: E402


def _check_settings() -> None:
    """Report invalid environment variables, which making a call (without evaluating it) finds."""
    one = mx.ones((1, 1, 1))
    try:
        switched_off()
        mlx_fused.fused_output_projection_residual(one, one[0], None, one, stream=mx.cpu)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@contextmanager
def _click_errors() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}. {_INSTALL}") from error
    except OSError as error:  # click would end without a message on a broken pipe
        raise click.ClickException(str(error)) from error


class _Group(click.Group):
    """Names missing packages, ends with one-line errors, and passes arguments on to mlx-lm's commands."""

    def main(self, args=None, *rest, **extra):
        args = sys.argv[1:] if args is None else list(args)
        if sys.stderr is None:  # closed: file descriptor 2 would go to the next file that is opened
            sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        with output.plain_ends():
            if not args or args[0] not in passthrough.COMMANDS:
                if sys.stdout is None:
                    raise click.ClickException("stdout must be open but is closed.")
                sys.exit(super().main(args, *rest, standalone_mode=False, **extra))
            # Not through click, which would handle "--", an interrupt and the end of the input its own way.
            _check_settings()
            with _click_errors():
                command = passthrough.load(args[0])
        try:
            status = command(args[1:])
        except SystemExit as end:
            status = end.code
        with output.plain_ends():
            sys.exit(status)

    def make_context(self, *args, **extra) -> click.Context:
        with _click_errors():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context):
        _check_settings()
        with _click_errors():
            return super().invoke(ctx)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mlx_fused.__version__, prog_name="mlx-fused")
def main() -> None:
    """Fused attention projections for MLX."""


for command in (info, bench, validate, demo):
    main.add_command(command)
for name, purpose in passthrough.COMMANDS.items():  # for the list of commands; see _Group.main
    main.add_command(click.Command(name, help=f"{purpose} with patched models (mlx_lm.{name})."))
