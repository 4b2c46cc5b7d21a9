"""mlx-lm's own commands, with every model patched as it loads."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType

import mlx_fused
from mlx_fused.cli.output import say
from mlx_fused.losses import cross_entropy_loss
from mlx_fused.patching import Calls, modules, registry
from mlx_fused.patching.report import TITLES, switched_off

# The variables in which launchers (mlx.launch, Open MPI, MPICH) tell a process its rank.
_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
COMMANDS = {
    "lora": "Fine-tune",
    "generate": "Generate text",
    "chat": "Chat",
    "server": "Serve",
    "evaluate": "Evaluate on the tasks of lm-eval",
    "perplexity": "Measure the perplexity",
    "benchmark": "Time generation",
    "cache_prompt": "Process a prompt ahead",
    "awq": "Quantize by AWQ",
    "dwq": "Quantize by distillation (DWQ)",
    "dynamic_quant": "Quantize by sensitivity",
}
_IN_QUANT = ("awq", "dwq", "dynamic_quant")
# mlx-lm's other commands, and why they would gain nothing.
UNPATCHED = {
    **dict.fromkeys(("convert", "fuse", "manage", "share", "upload"), "it does not run a model"),
    "gptq": "it records the input of every single projection, so none could be fused",
}


def module_of(name: str) -> ModuleType:
    """The module of the command ``mlx_lm.<name>``."""
    return import_module(f"mlx_lm.quant.{name}" if name in _IN_QUANT else f"mlx_lm.{name}")


def run(name: str, arguments: list[str]) -> int | str | None:
    """Run the command ``mlx_lm.<name>``; returns its exit status."""
    module = module_of(name)
    sys.argv = [f"mlx-fused {name}", *arguments]
    training = without_logits(module) if name == "lora" else nullcontext()
    with _patching_loader(name), _finding_models(module), training:
        try:
            module.main()
        except SystemExit as end:
            return end.code
        except KeyboardInterrupt:
            say("")  # ends the line on which the terminal shows ^C
            raise


@contextmanager
def without_logits(lora: ModuleType) -> Iterator[None]:
    """Let ``mlx_lm.lora`` train and evaluate through our loss; its functions take one, but it names none."""

    def through_ours(function: Callable) -> Callable:
        return partial(function, loss=cross_entropy_loss)

    with _replaced(lora, "train", through_ours), _replaced(lora, "evaluate", through_ours):
        yield


class _Tally(Calls):
    """The calls of all models of a command, and of copies that it makes of them."""

    def __deepcopy__(self, memo) -> "_Tally":
        return self


@contextmanager
def _patching_loader(command: str) -> Iterator[None]:
    """Patch every model that ``mlx_lm.utils.load_model`` returns; all of mlx-lm's loaders call it.

    One line says what is fused in each, and another, at the end, how often it ran fused.
    """
    tallies, loaded = {part: _Tally() for part in TITLES}, False

    def patching(load_model: Callable) -> Callable:
        def load_and_patch(*args, **kwargs):
            nonlocal loaded
            model, config = load_model(*args, **kwargs)
            report = mlx_fused.patch(model)
            for module in model.modules():
                if patch := registry.patch_of(module):
                    modules.set_patch(module, registry.roles_of(module), replace(patch, calls=tallies))
            loaded = True
            _say_once(report.summary)
            return model, config

        return load_and_patch

    try:
        with _replaced(import_module("mlx_lm.utils"), "load_model", patching):
            yield
    finally:
        if loaded and switched_off():
            _say_once(f"mlx-fused: nothing ran fused, since MLX_FUSED={os.environ['MLX_FUSED']}")
        elif called := [
            f"{TITLES[part]} in {_share(calls)}" for part, calls in tallies.items() if calls.total
        ]:
            # mlx-lm compiles nothing else that calls the model.
            compiled = "; a compiled training step counts when it is traced" * (command == "lora")
            _say_once(f"mlx-fused: ran fused: {', '.join(called)}{compiled}")


def _share(calls: Calls) -> str:
    reason = f" (last obstacle: {calls.reason})" if calls.fallen_back and calls.reason else ""
    return f"{calls.share}{reason}"


def _say_once(line: str) -> None:
    """Print to stderr in the first of several processes."""
    # Asking MLX for the rank would start communication between processes.
    if all(os.environ.get(name, "0") == "0" for name in _RANKS):
        say(line)


@contextmanager
def _finding_models(command: ModuleType) -> Iterator[None]:
    """Name a model that cannot be found; and end the server then, whose thread would only log it."""
    utils = import_module("mlx_lm.utils")

    def naming(download: Callable) -> Callable:
        def download_or_name(model, *args, **kwargs):
            from mlx_fused.validate.checkpoint import why_missing

            try:
                return download(model, *args, **kwargs)
            except Exception as error:
                if reason := why_missing(model, error):
                    raise FileNotFoundError(_with_default(model) + reason) from error
                raise

        return download_or_name

    def checking(serve: Callable) -> Callable:
        def check_and_serve(host, port, provider, *args, **kwargs):
            options = provider.cli_args
            for model in filter(None, (options.model, options.draft_model)):
                utils._download(model)
            if options.adapter_path and not Path(options.adapter_path).is_dir():
                raise FileNotFoundError(f"There is no directory {options.adapter_path}.")
            return serve(host, port, provider, *args, **kwargs)

        return check_and_serve

    with _replaced(utils, "snapshot_download", naming):
        if command.__name__ != "mlx_lm.server":
            yield
            return
        with _replaced(command, "run", checking):
            yield


def _with_default(model: str) -> str:
    """What to say first if mlx-lm chose the model."""
    options = ("--model", "-c", "--config")  # a configuration file may name a model too
    given = any(argument.partition("=")[0] in options for argument in sys.argv)
    return "" if given else f"Without --model mlx-lm takes {model}. "


@contextmanager
def _replaced(module: ModuleType, name: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, wraps(original)(wrap(original)))
    try:
        yield
    finally:
        setattr(module, name, original)
