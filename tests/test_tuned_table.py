"""The file that ``mlx-fused tune`` writes and importing reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_fused import _ext, tuning
from mlx_fused.tuning import table
from mlx_fused.tuning.measure import route_of
from tuned import CALLS, COMPOSED, FUSED, OUTPUT, PLAIN, ignored, write

pytestmark = pytest.mark.usefixtures("route_cache")


def test_what_is_written_is_read():
    path = write(CALLS)
    assert table.read(path) == (mx.cpu, CALLS)
    assert ignored() == []
    assert [_ext.tuned_route(PLAIN, m) for m in (1, 8, 32)] == ["composed", None, "fused"]
    assert [_ext.tuned_route(kind, 2) for kind in CALLS] == ["composed", "fused", "composed"]
    (first, *_) = json.loads(path.read_text())["calls"]
    assert first["rows"][0] == {"rows": 1, "route": "composed", "fused_s": 2.0, "composed_s": 1.0}


def test_measuring_again_replaces_what_was_measured_and_keeps_the_rest():
    write(CALLS)
    path = write({PLAIN: {2: FUSED}})
    assert table.read(path).calls == CALLS | {PLAIN: {2: FUSED}}


def test_routes_of_another_device_are_not_kept(monkeypatch):
    path = write(CALLS)
    monkeypatch.setattr(table, "read", lambda path: table.Table(mx.gpu, CALLS))
    write({PLAIN: {2: FUSED}})
    monkeypatch.undo()
    assert len(json.loads(path.read_text())["calls"]) == 1


def test_a_pipe_is_not_waited_for(route_cache):
    route_cache.mkdir()
    os.mkfifo(route_cache / "routes.json")
    (said,) = ignored()
    assert "it is no file" in said


def changed(**at):
    """A valid file with other values: of the first call or of its first row by name, or of the file."""

    def change(content):
        first = content["calls"][0]
        for name, value in at.items():
            of = next(d for d in (first["rows"][0], first, content["measured on"], content) if name in d)
            of[name] = value
        return content

    return lambda: json.dumps(change(json.loads(Path(tuning.path()).read_text())))


def twice():
    content = json.loads(Path(tuning.path()).read_text())
    return json.dumps(content | {"calls": content["calls"][:1] * 2})


UNUSABLE = {
    "empty": (lambda: "", "broken"),
    "no JSON": (lambda: "routes", "broken"),
    "cut": (lambda: Path(tuning.path()).read_text()[:-20], "broken"),
    "a list": (lambda: "[]", "broken"),
    "deep": (lambda: "[" * 100_000, "broken"),
    "null": (lambda: "null", "broken"),
    "not UTF-8": (lambda: b"\xff\xfe", "broken"),
    "nothing measured on": (lambda: "{}", "broken"),
    "calls of another type": (changed(calls=3), "broken"),
    "a call of another type": (changed(calls=[3]), "broken"),
    "the same calls twice": (twice, "the same calls twice"),
    "another GPU": (changed(**{"device name": "Apple M9"}), "device name Apple M9, but this is device name"),
    "a device that is not here": (changed(device="gpu"), "but this is"),
    "an unknown device": (changed(device="tpu"), "broken"),
    "another MLX": (changed(mlx="0.1.2"), "mlx 0.1.2, but this is mlx 0."),
    "another mlx-fused": (changed(**{"mlx-fused": "0.0.1"}), "mlx-fused 0.0.1"),
    "no rows": (changed(rows=[]), "broken"),
    "rows as text": (changed(route="fused", rows="1"), "broken"),
    "an unknown route": (changed(route="fast"), "unknown routes"),
    "a route as a list": (changed(route=[]), "broken"),
    "no time": (changed(fused_s=0.0), "no time"),
    "infinite time": (changed(composed_s=float("inf")), "no time"),
    "time as text": (changed(fused_s="1"), "no float"),
    "an unknown dtype": (changed(dtype="int8"), "broken"),
    "gradient as a number": (changed(gradient=1), "no bool"),
    "weights without a gradient": (changed(of_weights=True), "no such call"),
    "the other operation": (changed(operation="linear"), "no such call"),
    "two features": (changed(features=[64, 32]), "2 features"),
    "a feature as text": (changed(features=[64, "32", 32]), "no int"),
    "a feature too large": (changed(features=[64, 2**31, 32]), "no size"),
    "too few ranks": (changed(ranks=[0]), "1 ranks"),
    "a negative rank": (changed(ranks=[0, -1, 0]), "no size"),
    "no input": (changed(in_features=0), "no size"),
    "a format of two": (changed(format=["affine", 4]), "broken"),
    "half a character": (changed(format=["\ud800", 4, 64]), "UnicodeEncodeError"),
    "bits as text": (changed(format=["affine", "4", 64]), "no int"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_that_is_broken_foreign_or_stale_is_ignored_with_a_warning(name):
    make_content, reason = UNUSABLE[name]
    path = write({PLAIN: {1: COMPOSED}, OUTPUT: {1: COMPOSED}})
    content = make_content()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (said,) = ignored()
    assert said.startswith(f"The measured routes in {path} are not used: ") and reason in said
    assert "\n" not in said
    assert route_of(PLAIN, 1) == route_of(OUTPUT, 1) == "fused"  # never a part of it


def test_a_file_that_cannot_be_read_is_ignored_with_a_warning(route_cache):
    path = Path(tuning.path())
    path.mkdir(parents=True)
    (said,) = ignored()
    assert "it is no file" in said
    path.rmdir()
    path.symlink_to(route_cache / "nowhere")
    (said,) = ignored()
    assert "cannot be read (No such file or directory)" in said


def test_a_file_that_cannot_be_used_is_replaced():
    Path(tuning.path()).parent.mkdir()
    Path(tuning.path()).write_text("{")
    assert table.read(write(CALLS)).calls == CALLS


def test_importing_reads_it_and_says_once_if_it_cannot():
    code = "import mlx_fused, mlx_fused.nn; from mlx_fused import _ext; from mlx_fused.tuning import Kind\n"
    code += f"import mlx.core as mx; print(_ext.tuned_route({PLAIN!r}, 1))"
    code = code.replace("mlx.core.float32", "mx.float32")
    path = write(CALLS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("composed\n", "")
    path.write_text("{")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "None\n" and done.returncode == 0
    assert done.stderr.startswith("<string>:1: UserWarning: The measured routes in ")
    assert done.stderr.count("Warning") == 1


def test_importing_without_a_table_loads_nothing_for_it():
    modules = ("json", "fcntl", "mlx_fused.tuning.table", "rich", "click")
    code = f"import sys, mlx_fused; print([m for m in {modules} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_where_the_file_is(monkeypatch, route_cache):
    assert tuning.path() == str(route_cache / "routes.json")
    monkeypatch.delenv("MLX_FUSED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert tuning.path() == "/caches/mlx-fused/routes.json"
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MLX_FUSED_CACHE", "~/mine")
    assert tuning.path() == "/home/me/mine/routes.json"
    monkeypatch.delenv("MLX_FUSED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # which is to be ignored
    for platform, folder in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr(sys, "platform", platform)
        assert tuning.path() == f"/home/me/{folder}/mlx-fused/routes.json"


def test_a_write_that_fails_leaves_the_file_as_it_was(monkeypatch, route_cache):
    path = write(CALLS)
    before = path.read_bytes()

    def full(content, file, **options):
        file.write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space"):
        write({PLAIN: {2: FUSED}})
    assert path.read_bytes() == before
    assert sorted(p.name for p in route_cache.iterdir()) == ["routes.json", "routes.json.lock"]


WRITER = """
import sys, mlx.core as mx
from mlx_fused import tuning
from mlx_fused.tuning import Kind, table
mine = int(sys.argv[1])
for n in range(1, 21):
    kind = Kind(False, False, mx.float32, None, False, 1000 * mine + n, (64,), (0,))
    table.write(tuning.path(), {kind: {1: table.Timing.of(1.0, 2.0)}})
"""


def test_processes_that_write_at_once_lose_nothing_and_no_reader_sees_a_part():
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(n)]) for n in (1, 2)]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        if os.path.exists(tuning.path()):
            found = len(table.read(tuning.path()).calls)  # raises if it is a part
            assert found >= seen
            seen = found
    assert [writer.returncode for writer in writers] == [0, 0]
    expected = {1000 * mine + n for mine in (1, 2) for n in range(1, 21)}
    assert {kind.in_features for kind in table.read(tuning.path()).calls} == expected
