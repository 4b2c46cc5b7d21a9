"""The ``mlx-fused`` command."""

import os
import sys

import mlx_fused

_INSTALL = "This needs more packages: pip install 'mlx-fused[lm]'"

try:
    import click
except ModuleNotFoundError:
    sys.exit(_INSTALL)

from mlx_fused.cli import passthrough  # noqa: E402
from mlx_fused.cli.bench import bench  # noqa: E402
from mlx_fused.cli.demo import demo  # noqa: E402
from mlx_fused.cli.info import info  # noqa: E402
from mlx_fused.cli.validate import validate  # noqa: E402


class _Group(click.Group):
    """Knows what to install, and leaves mlx-lm's commands alone with their arguments."""

    def main(self, args=None, *rest, **extra):
        args = sys.argv[1:] if args is None else list(args)
        if args and args[0] in passthrough.COMMANDS:
            # Outside click, which has its own ways with "--", an interrupt and the end of the input.
            try:
                command = passthrough.load(args[0])
            except ModuleNotFoundError as error:
                sys.exit(f"Error: {error}. {_INSTALL}")
            return command(args[1:])
        return super().main(args, *rest, **extra)

    def invoke(self, ctx: click.Context):
        if (route := os.environ.get("MLX_FUSED_ROUTE", "")) not in ("", "composed", "fused"):
            raise click.UsageError(f"MLX_FUSED_ROUTE must be 'composed' or 'fused' but is '{route}'.")
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            raise click.ClickException(f"{error}. {_INSTALL}") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mlx_fused.__version__, prog_name="mlx-fused")
def main() -> None:
    """Fused attention projections for MLX."""


for command in (info, bench, validate, demo):
    main.add_command(command)
for name, purpose in passthrough.COMMANDS.items():  # for the list of commands; see _Group.main
    main.add_command(click.Command(name, help=f"{purpose} with patched models (mlx_lm.{name})."))
