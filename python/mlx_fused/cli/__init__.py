"""The ``mlx-fused`` command."""

import inspect
import os
import sys

import mlx_fused

try:
    import click
except ModuleNotFoundError:
    sys.exit("This needs more packages: pip install 'mlx-fused[lm]'")

from mlx_fused.cli import failures, output, passthrough, settings
from mlx_fused.cli.bench import bench
from mlx_fused.cli.demo import demo
from mlx_fused.cli.info import info
from mlx_fused.cli.tune import tune
from mlx_fused.cli.validate import validate


class _Group(click.Group):
    """Ends with one-line errors, and passes arguments on to mlx-lm's commands."""

    def main(self, args=None, *rest, **extra):
        args = sys.argv[1:] if args is None else list(args)
        if sys.stderr is None:  # closed: file descriptor 2 would go to the next file that is opened
            sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        with output.plain_ends():
            if sys.stdout is None:
                raise click.ClickException("stdout must be open but is closed.")
            if not args or args[0] not in passthrough.COMMANDS:
                sys.exit(super().main(args, *rest, standalone_mode=False, **extra))
            # Not through click, which would handle "--" and "--help" its own way.
            if not {"-h", "--help"} & set(args):
                settings.check()
            with failures.of_mlx_lm():
                status = passthrough.run(args[0], args[1:])
            sys.exit(status)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        cmd.short_help = inspect.cleandoc(cmd.help).partition("\n\n")[0]  # click's own is cut to a line
        super().add_command(cmd, name)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if reason := passthrough.UNPATCHED.get(args[0]):
            ctx.fail(f"Patching has nothing to do in {args[0]}: {reason}. Run mlx_lm.{args[0]} instead.")
        return super().resolve_command(ctx, args)

    def make_context(self, *args, **extra) -> click.Context:
        with failures.of_the_machine():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context):
        settings.check()
        with failures.of_the_machine():
            return super().invoke(ctx)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mlx_fused.__version__, prog_name="mlx-fused")
def main() -> None:
    """Fused operations of transformer layers for MLX."""


for command in (info, bench, tune, validate, demo):
    main.add_command(command)
for name, purpose in passthrough.COMMANDS.items():  # for the list of commands; see _Group.main
    main.add_command(click.Command(name, help=f"{purpose} with patched models (mlx_lm.{name})."))
