"""The Makefile's set-up, with stand-ins for Python: what is missing is said, what was
interrupted is done again, nothing is done twice."""
import os
import shutil
import subprocess

import pytest
from small_project import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix" or shutil.which("make") is None,
                                reason="needs make and a POSIX shell")

# writes down each call; `-m venv` puts a copy of itself where Python would be
STAND_IN = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
  -V) echo "Python {version}" ;;
  *version_info*) [ {old} = 0 ] ;;
  "-m venv"*) rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"pip install"*) [ ! -e "{folder}/broken" ] ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "a folder with spaces"
    (folder / "scripts").mkdir(parents=True)
    for name in ("Makefile", "constraints.txt", "settings.ini", "setup.py"):
        shutil.copy(ROOT / name, folder)
    return folder


def python(folder, version="3.11.7", old=0):
    path = folder / "standin"
    path.write_text(STAND_IN.format(log=folder / "calls", version=version, old=old, folder=folder))
    path.chmod(0o755)
    return f"PYTHON={path}"


def make(folder, *args):
    return subprocess.run(["make", *args], cwd=folder, capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")})


def calls(folder):
    "The calls since the last look."
    path = folder / "calls"
    found = path.read_text().splitlines() if path.is_file() else []
    path.unlink(missing_ok=True)
    return [call for call in found if call != "-V" and not call.startswith("-c")]


def test_make_alone_lists_the_targets(project):
    done = make(project)
    assert done.returncode == 0 and not (project / ".venv").exists()
    for target in ("book", "test", "lab", "docs", "bench", "readme", "check", "dist", "clean"):
        assert any(line.split()[:1] == [target] and len(line.split()) > 2
                   for line in done.stdout.splitlines()), target


def test_a_python_that_is_missing_or_too_old_is_named(project):
    done = make(project, "setup", "PYTHON=python3.99")
    assert done.returncode != 0 and "There is no python3.99 on the PATH" in done.stdout
    done = make(project, "setup", python(project, "3.9.2", old=1))
    assert done.returncode != 0
    assert "needs Python 3.11 or later" in done.stdout and "is Python 3.9.2" in done.stdout
    assert not (project / ".venv").exists()


def test_a_set_up_happens_once_and_again_when_the_pins_change(project):
    name = python(project)
    assert make(project, "setup", name).returncode == 0
    first = calls(project)
    assert first[0] == "-m venv --clear .venv" and "pip install" in first[
        1] and "-c constraints.txt -e .[dev]" in first[1]
    assert make(project, "setup", name).returncode == 0 and calls(project) == []
    later = os.stat(project / ".venv/.ready").st_mtime + 10
    os.utime(project / "constraints.txt", (later, later))
    assert make(project, "setup", name).returncode == 0
    again = calls(project)
    assert not any("venv --clear" in call for call in again) and any("pip install" in call
        for call in again)


def test_an_interrupted_set_up_starts_again_from_nothing(project):
    name = python(project)
    (project / "broken").touch()
    assert make(project, "setup", name).returncode != 0
    assert not (project / ".venv/.ready").exists()
    (project / "broken").unlink()
    (project / ".venv" / "left over").touch()
    calls(project)
    assert make(project, "setup", name).returncode == 0
    assert calls(project)[0] == "-m venv --clear .venv" and not (project / ".venv"
        / "left over").exists()


def test_an_interrupted_update_is_not_trusted_either(project):
    name = python(project)
    assert make(project, "setup", name).returncode == 0
    (project / "broken").touch()
    later = os.stat(project / ".venv/.ready").st_mtime + 10
    os.utime(project / "constraints.txt", (later, later))
    assert make(project, "setup", name).returncode != 0
    assert not (project / ".venv/.ready").exists()
