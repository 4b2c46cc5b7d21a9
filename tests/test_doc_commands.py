"""Every command in the documentation runs."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import mlx.nn as nn
import pytest
from mlx_lm.models import llama
from mlx_lm.utils import save_config, save_model

import doc_commands
import tiny_demo
from doc_commands import INSTEAD, PAGES, ROOT, blocks, find_instead
from mlx_fused.cli import main

# Models of the Hugging Face hub that pages name. In the tests a name leads to a Llama with so many
# layers and random weights, otherwise as small as the tiny demo's checkpoint, whose tokenizer it has.
HUB = {
    "mlx-community/Llama-3.2-1B-Instruct-4bit": {"num_hidden_layers": 16},
    "mlx-community/Qwen3-0.6B-4bit": {"num_hidden_layers": 28},
}
RUN = {"sh", "python"}
PAGES_THAT_RUN = [page for page in PAGES if any(block.language in RUN for block in blocks(page))]


def path_of(page):
    return str(page.relative_to(ROOT))


def commands():
    return [
        command
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh"
        for command in block.commands()
    ]


@pytest.fixture(scope="module")
def made(once, tmp_path_factory):
    """A folder with the demo's checkpoints, tiny, and a cache of the Hugging Face hub."""

    def make_pages_models():
        folder = tmp_path_factory.mktemp("docs")
        demo = folder / "mlx_fused_demo"
        tiny_demo.make(demo)
        (demo / "adapters").rename(demo / "adapters-patched")
        for name, sizes in HUB.items():
            repository = folder / "hub" / f"models--{name.replace('/', '--')}"
            (repository / "refs").mkdir(parents=True)
            (repository / "refs" / "main").write_text("0")
            stand_in(demo / "model-4bit", repository / "snapshots" / "0", sizes)
        return folder

    return once(make_pages_models)


def stand_in(model, path, sizes):
    shutil.copytree(model, path, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((path / "config.json").read_text()) | sizes
    made = llama.Model(llama.ModelArgs.from_dict(config))
    quantization = config["quantization"]
    nn.quantize(made, quantization["group_size"], quantization["bits"])
    save_model(path, made)
    save_config(config, path / "config.json")


def run(page, made, folder, python=sys.executable, programs=os.environ["PATH"]):
    """Run the commands of a page in ``folder``, with the models and data that they expect there."""
    shutil.copytree(made / "mlx_fused_demo", folder / "mlx_fused_demo")
    shutil.copytree(made / "mlx_fused_demo" / "data", folder / "data")  # "your own"
    if (ROOT / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "PATH": f"{Path(python).parent}{os.pathsep}{programs}",
        "HF_HOME": str(made),
        "HF_HUB_OFFLINE": "1",
        "ROOT": str(ROOT),
        "PORT": str(port),
    }
    with (folder / "log.txt").open("w+") as log:
        process = subprocess.Popen(
            [python, doc_commands.__file__, page],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=env,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=300)
        finally:
            with suppress(ProcessLookupError):  # if nothing is left
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        assert status == 0, log.read()


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=path_of)
def test_commands_of_a_page(page, made, tmp_path):
    run(page, made, tmp_path)


@pytest.mark.slow  # and needs a network
def test_tutorial_with_the_wheel_alone_and_no_compiler(made, tmp_path):
    build = ["wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}", ROOT]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    python = tmp_path / "fresh" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", f"{wheel}[lm]"], check=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "curl", "grep", "sh", "sleep"):
        (programs / name).symlink_to(shutil.which(name))
    run(ROOT / "docs" / "tutorial.md", made, tmp_path, python, programs)


def test_other_blocks_are_no_commands(monkeypatch):
    monkeypatch.setenv("PATH", os.fspath(Path(sys.executable).parent), prepend=os.pathsep)
    plain = [(path_of(page), block) for page in PAGES for block in blocks(page) if block.language not in RUN]
    assert {block.language for _, block in plain} == {"", "{include} ../README.md", "{toctree}"}
    for command in commands():  # `bash -e` overlooks a failure before `&&`
        assert not re.search(r"&&|\|\||;", command), command
    for page, block in plain:
        for line in block.text.splitlines():
            first, *_ = line.split() or [""]
            command = first in ("$", "%", ">>>") or shutil.which(first)
            assert not command, f"{page}:{block.line}: {line}"


def test_what_is_listed_occurs():
    found = [find_instead(command) for command in commands()]
    assert [entry.pattern for entry in INSTEAD if entry not in found] == []
    texts = "".join(block.text for page in PAGES_THAT_RUN for block in blocks(page))
    assert [name for name in HUB if name not in texts] == []


def test_what_sentences_name_exists():
    named = {name for page in PAGES for name in doc_commands.names(page)}

    def found(pattern):
        return {match[1] for name in named if (match := re.match(pattern, name))}

    targets, subcommands = found(r"make ([a-z]\S*)$"), found(r"mlx-fused ([a-z]\S*)")
    scripts = found(r"\S*python (\S+\.py)")
    assert targets and subcommands and scripts
    subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert subcommands <= set(main.commands)
    assert [script for script in scripts if not (ROOT / script).exists()] == []
