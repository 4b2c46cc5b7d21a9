"""Runs a script in several processes of this machine that are one group of ``mx.distributed``."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx

RANKS = 2
BUILD = Path(__file__).resolve().parent.parent / "build" / "ring"


def run(folder, script, *arguments):
    """Each process's stdout and stderr; ``folder`` is for the file with their addresses."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(RANKS)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]))
    processes = []
    for rank in range(RANKS):
        # MLX compiles to files there; both at once would read what the other is still writing.
        temporary = BUILD / str(rank)
        temporary.mkdir(parents=True, exist_ok=True)
        changes = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "TMPDIR": str(temporary)}
        changes["MLX_FUSED_NUM_THREADS"] = "1"  # what waits for the other spins, and takes its CPU
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, script, *arguments]
        processes.append(subprocess.Popen(command, env=os.environ | changes, **pipes))
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:  # one that waits for another that failed
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, outputs
    return outputs


def group():
    """Of the process that this is called in, on the CPU; an error if it is alone."""
    mx.set_default_device(mx.cpu)
    return mx.distributed.init(strict=True, backend="ring")
