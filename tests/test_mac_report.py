"""``make mac-report`` as far as it goes without a Mac."""

import json
import os
import select
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "no-report"


@pytest.fixture
def mac_report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "metal_device")
    import mac_report

    return mac_report


def python(code):
    return [sys.executable, "-c", code]


def test_every_step_is_in_the_archive_however_it_ends(mac_report, tmp_path, capsys):
    some = {
        "writes": python("import os; open(os.environ['MLX_FUSED_CACHE'] + '.json', 'w').write('1')"),
        "fails": python("import sys; sys.exit('why')"),
        "dies": python("import os; os.abort()"),
        "is not there": ["no such program"],
        "goes on": python("print('here')"),
    }
    ends = {name: step["end"] for name, step in mac_report.make(some, tmp_path / "report").items()}
    assert ends == {
        "writes": "exit status 0",
        "fails": "exit status 1",
        "dies": "SIGABRT",
        "is not there": "[Errno 2] No such file or directory: 'no such program'",
        "goes on": "exit status 0",
    }
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        found = json.loads(archive.read("steps.json"))
        assert {name: step["end"] for name, step in found.items()} == ends
        assert archive.read("writes.json") == b"1"
        assert archive.read("fails.stderr") == b"why\n" and archive.read("goes on.stdout") == b"here\n"
    assert "3 of 5: dies ... SIGABRT" in capsys.readouterr().out


def test_a_step_that_hangs_is_ended_with_all_that_it_started(mac_report, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    started = "import subprocess, time; subprocess.Popen(['sleep', '600'], stdout=open('fifo', 'w'))"
    command = python(f"import os; os.chdir({str(tmp_path)!r}); {started}; time.sleep(600)")
    assert mac_report.run(command, tmp_path, "hangs", 5) == "no end after 5 s"
    assert select.select([reader], [], [], 60)[0], "a process is left that could write"
    os.close(reader)


def test_an_interrupted_report_has_what_there_is(mac_report, tmp_path, monkeypatch):
    def interrupted(command, *_):
        if command == ["second"]:
            raise KeyboardInterrupt
        return "exit status 0"

    monkeypatch.setattr(mac_report, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mac_report.make({name: [name] for name in ("first", "second", "third")}, tmp_path / "report")
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        assert list(json.loads(archive.read("steps.json"))) == ["first"]


def test_no_user_and_no_path_is_named(mac_report, tmp_path, monkeypatch):
    home = tmp_path / "Jürgen Müller"
    monkeypatch.setattr(mac_report, "ROOT", home / "clone")
    monkeypatch.setattr(mac_report.Path, "home", lambda: home)
    texts = f"{home}/clone/x {home}/y", json.dumps(f"{home}/z"), "/tmp/pytest-of-j.m/pytest-1"
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "log").write_text("\n".join(texts))
    mac_report.without_names(folder)
    assert (folder / "log").read_text() == 'CLONE/x HOME/y\n"HOME/z"\n/tmp/pytest-of-USER/pytest-1'


@pytest.mark.parametrize("rehearse", [False, True], ids=["mac", "rehearsal"])
def test_there_are_such_commands_and_options(mac_report, rehearse):
    """A parser sees what is wrong with the options before it shows its help."""
    for name, command in mac_report.steps(FOLDER, rehearse).items():
        done = subprocess.run(
            [*command, "-h" if name == "source" else "--help"], capture_output=True, text=True
        )
        assert "usage" in done.stdout.lower(), f"{name}: {done.stderr}"
