"""The ``mlx-fused`` command."""

import sys

import mlx.core as mx

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


def _check_settings() -> None:
    """Let a call, which is not evaluated, say what is wrong with the environment variables."""
    one = mx.ones((1, 1, 1))
    try:
        mlx_fused.fused_output_projection_residual(one, one[0], None, one, stream=mx.cpu)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


class _Group(click.Group):
    """Knows what to install, and leaves mlx-lm's commands alone with their arguments."""

    def main(self, args=None, *rest, **extra):
        args = sys.argv[1:] if args is None else list(args)
        if args and args[0] in passthrough.COMMANDS:
            # Outside click, which has its own ways with "--", an interrupt and the end of the input.
            try:
                _check_settings()
                command = passthrough.load(args[0])
            except click.UsageError as error:
                error.show()
                sys.exit(error.exit_code)
            except ModuleNotFoundError as error:
                sys.exit(f"Error: {error}. {_INSTALL}")
            return command(args[1:])
        return super().main(args, *rest, **extra)

    def invoke(self, ctx: click.Context):
        _check_settings()
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
