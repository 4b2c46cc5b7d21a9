"""How mlx-lm's commands end, patched: failures of the user's in one line, bugs with their traceback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import mlx.core as mx
import mlx_lm.utils
import pytest

from commands import COMMAND, TOKENS, all_fused, counts, train
from mlx_fused.cli import main


@pytest.fixture
def chat(run, checkpoint, monkeypatch):
    """Runs ``chat``, in which ``function`` is called with a model that has been called."""

    def chat(function):
        def body():
            model, _ = mlx_lm.utils.load(str(checkpoint / "model"))
            model(TOKENS)
            function(model)

        monkeypatch.setattr("mlx_lm.chat.main", body)
        return run(main.main, ["chat"])

    return chat


def raising(error):
    def fail(_):
        raise error

    return fail


def test_an_interrupt_leaves_the_closing_line_and_one_more(chat):
    code, _, err = chat(raising(KeyboardInterrupt()))
    assert code == 130
    *lines, last = err.splitlines()
    assert last == "Aborted!" and counts("\n".join(lines))[0]["qkv"] == (2, 2)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EOFError(), "The input has ended."),
        (ValueError("two\nlines"), "two lines"),
        (json.JSONDecodeError("Expecting value", "", 0), "JSONDecodeError: Expecting value: line 1"),
        (NotImplementedError("AWQ support NYI."), "AWQ support NYI."),
        (ImportError("wandb is not installed."), "wandb is not installed."),
        (OSError(98, "Address already in use"), "Address already in use"),
        (RuntimeError("[load_safetensors] Failed to open file x"), "Failed to open file x"),
        (ModuleNotFoundError("No module named 'datasets'", name="datasets"), "pip install 'mlx-lm[train]'"),
        (ModuleNotFoundError("No module named 'PIL'", name="PIL"), "pip install 'mlx-lm[vision]'"),
        (ModuleNotFoundError("No module named 'jinja2'", name="jinja2"), "pip install 'mlx-fused[lm]'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_users_failures_end_in_one_line(chat, error, message):
    code, _, err = chat(raising(error))
    assert code == 1 and "Traceback" not in err
    *lines, last = err.splitlines()
    assert last.startswith("Error: ") and message in last
    assert counts("\n".join(lines))[0]["qkv"] == (2, 2)


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, RuntimeError, RecursionError])
def test_bugs_keep_their_traceback(chat, error):
    load_model = mlx_lm.utils.load_model
    with pytest.raises(error):
        chat(raising(error("a bug")))
    assert mlx_lm.utils.load_model is load_model


def test_errors_of_a_running_model_keep_their_traceback(chat):
    with pytest.raises(ValueError):
        chat(lambda model: model(mx.zeros((1, 2, 3, 4), mx.int32)))


@pytest.fixture
def spoiled(checkpoint, tmp_path, monkeypatch):
    """A folder with a checkpoint, and with what is missing something."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "data"):
        Path(name).symlink_to(checkpoint / name)
    for name in ("empty", "no-weights", "broken", "no-test"):
        Path(name).mkdir()
    for name in ("train", "valid"):
        Path(f"no-test/{name}.jsonl").symlink_to(checkpoint / "data" / f"{name}.jsonl")
    lora = {"rank": 8, "scale": 1.0, "dropout": 0.0}
    Path("no-weights/adapter_config.json").write_text(json.dumps({"num_layers": 2, "lora_parameters": lora}))
    Path("broken/config.json").write_text("{")
    Path("broken.yaml").write_text("a: [")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("mlx_lm.server.run", lambda *_: pytest.fail("the server starts"))


GENERATE = "generate --model model --max-tokens 2"
LORA = "lora --model model --data data --train --iters 1 --num-layers 2"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate --model /no/such", "There is no directory /no/such."),
        ("generate --model empty", "empty/config.json"),
        ("generate --model broken", "JSONDecodeError: "),
        (f"{GENERATE} --adapter-path nosuch", "nosuch"),
        (f"{GENERATE} --adapter-path no-weights", "no-weights/adapters.safetensors"),
        (f"{GENERATE} --prompt-cache-file nosuch", "[load]"),
        (f"{GENERATE} --prompt-cache-file nosuch.safetensors", "nosuch.safetensors"),
        (f"{GENERATE} --draft-model /no/such", "There is no directory /no/such."),
        (f"{LORA} --data nosuch", "pip install 'mlx-lm[train]'"),
        (f"{LORA} --data empty", "Training set not found or empty."),
        (f"{LORA} --test --data no-test", "Test set not found or empty."),
        (f"{LORA} --num-layers 16", "Requested to train 16 layers but the model only has 2 layers."),
        (f"{LORA} --batch-size 99999", "Dataset must have at least batch_size=99999 examples"),
        (f"{LORA} --resume-adapter-file nosuch", "[load]"),
        (f"{LORA} --resume-adapter-file nosuch.safetensors", "nosuch.safetensors"),
        ("lora --model model --data data", "Must provide at least one of --train or --test"),
        ("lora --config nosuch.yaml", "nosuch.yaml"),
        ("lora --config broken.yaml", "broken.yaml"),
        ("server --model /no/such", "There is no directory /no/such."),
        ("server --model model --draft-model /no/such", "There is no directory /no/such."),
        ("server --model model --adapter-path nosuch", "There is no directory nosuch."),
    ],
)
def test_what_is_missing_is_named_in_one_line(run, spoiled, command, message):
    code, _, err = run(main.main, command.split())
    assert code == 1 and "Traceback" not in err
    *_, last = err.splitlines()
    assert last.startswith("Error: ") and message in last


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hugging Face hub does about models that are not there, or not for everybody."""

    def do_GET(self):
        error = "GatedRepo" if "gated" in self.path else "RepoNotFound"
        self.send_response(403 if "gated" in self.path else 404)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_what_the_hub_says_ends_in_one_line(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    code = "from mlx_fused.cli import main\n"
    for model in ("an-owner/gated", "an-owner/missing"):
        code += f"try: main.main(['generate', '--model', '{model}'])\nexcept SystemExit as e: print(e.code)\n"
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    server.shutdown()
    server.server_close()
    assert done.stdout == "1\n1\n", done.stderr
    gated, missing = done.stderr.splitlines()
    assert gated.startswith("Error: an-owner/gated is gated")
    assert missing.startswith("Error: There is no directory an-owner/missing here, and the hub shows no ")


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


@pytest.fixture
def start():
    """Starts a command in a process of its own, which does not outlive the test."""
    started = []

    def start(*arguments, stdout=subprocess.PIPE):
        command = [*COMMAND, *map(str, arguments)]
        started.append(subprocess.Popen(command, text=True, stdout=stdout, stderr=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_closed_pipe_ends_in_one_line(start, checkpoint):
    reader, writer = os.pipe()
    os.close(reader)
    process = start("generate", "--model", checkpoint / "model", "--max-tokens", 2, stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.splitlines()[-1] == "Error: [Errno 32] Broken pipe"
    assert "Traceback" not in err


def test_interrupted_training_ends_in_one_line(start, checkpoint, tmp_path):
    process = start(*train(checkpoint, tmp_path, "--iters", 10**6, "--save-every", 1))
    wait_for((tmp_path / "adapters.safetensors").exists, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    *lines, last = err.splitlines()
    assert process.returncode == 130 and last == "Aborted!" and "Traceback" not in err
    assert counts("\n".join(lines))[0]["qkv"][0] > 0


def test_the_server_runs_the_patched_model_and_tells_when_it_is_stopped(start, checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start("server", "--model", checkpoint / "model", "--port", port)
    url = f"http://127.0.0.1:{port}"

    def listens():
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    wait_for(listens, process)
    body = json.dumps({"prompt": "def", "max_tokens": 2}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)  # MLX may abort as its threads end, patched or not
    (line,) = (line for line in err.splitlines() if "ran fused" in line)
    found, _ = counts(line)
    assert all_fused(found) and "Traceback" not in err


def test_a_port_in_use_ends_the_server(start, checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start("server", "--model", checkpoint / "model", "--port", taken.getsockname()[1])
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("Error: ") and "in use" in err.splitlines()[-1]
