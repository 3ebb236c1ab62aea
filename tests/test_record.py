"""What whoever records runs relies on: no run is lost, none is mixed up, each says where it is from."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from test_evaluation import DATA, digits_like, net, quick, quick_fit, quick_test, without_times
from torch import nn

from feedback_nb import records as rec
from feedback_nb.evaluation import compare, recorded


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)




def test_a_crash_loses_only_the_running_run(tmp_path):
    file, runs = tmp_path / "runs.json", []

    def flaky(model, data, **how):
        runs.append(how["seed"])
        if len(runs) == 4:
            raise KeyboardInterrupt
        return quick_fit(model, data, **how)

    models = {"a": net, "b": lambda: (nn.Sequential(net()), {"lr": 0.05})}
    with pytest.raises(KeyboardInterrupt):
        compare(models, DATA, range(3), results=file, fit=flaky, evaluate=quick_test, progress=False)
    assert len(json.loads(file.read_text())["rows"]) == 3 and os.listdir(tmp_path) == ["runs.json"]
    resumed = compare(models, DATA, range(3), results=file, fit=flaky, evaluate=quick_test, progress=False)
    assert runs == [0, 0, 1, 1, 1, 2, 2]  # the fourth again, the first three not
    assert without_times(resumed) == without_times(quick(models, DATA, range(3)))
    assert resumed.record["models"]["b"]["settings"] == {"lr": 0.05}


CHILD = """
import sys, torch
sys.path.insert(0, {here!r})
torch.set_num_threads(1)
from test_record import *
import time
def slow(model, data, **how):
    time.sleep(0.05)
    return quick_fit(model, data, **how)
compare({models}, DATA, range({n}), results={file!r}, fit=slow, evaluate=quick_test, progress=False)
"""


def child(file, models="{'a': net}", n=20):
    code = CHILD.format(here=str(Path(__file__).parent), models=models, file=str(file), n=n)
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parent.parent)


def test_two_writers_and_a_kill_9_leave_a_whole_file(tmp_path):
    file = tmp_path / "runs.json"
    first, second = child(file, n=500), child(file, "{'b': net}")
    while not file.exists() or sum(row["model"] == "a" for row in json.loads(file.read_text())["rows"]) < 3:  # every read sees a whole file
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    assert first.wait(120) == -signal.SIGKILL and second.wait(120) == 0
    record = json.loads(file.read_text())
    assert sum(row["model"] == "b" for row in record["rows"]) == 20
    done = sum(row["model"] == "a" for row in record["rows"])
    assert 3 <= done < 500 and len(record["histories"]) == 20 + done
    resumed = quick({"a": net, "b": net}, DATA, range(20), results=file)
    assert len(resumed.frame) == 40 and resumed.scores("a") == resumed.scores("b")


def test_a_second_writer_waits_until_the_first_has_written(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    file, write, reading = tmp_path / "runs.json", rec._write, threading.Event()

    def slow(path, record):
        if not reading.is_set():
            reading.set()
            time.sleep(0.5)  # whoever does not wait reads the old file now, and loses a row
        write(path, record)

    monkeypatch.setattr(rec, "_write", slow)
    record = {"format": rec.FORMAT, "made": [], "data": {}, "settings": {}, "models": {}, "rows": [], "histories": []}
    run = lambda model: rec.merge_record(file, record, {"model": model, "seed": 0}, {"model": model, "seed": 0}, {"date": "today"})
    first = threading.Thread(target=run, args=("a",))
    first.start()
    assert reading.wait(60)
    run("b")
    first.join()
    assert sorted(row["model"] for row in json.loads(file.read_text())["rows"]) == ["a", "b"]


def test_other_runs_are_refused_and_the_difference_is_named(tmp_path):
    file = tmp_path / "runs.json"
    quick({"a": net}, DATA, [0], settings={"lr": 0.1, "device": "cpu"}, results=file)
    quick({"a": net}, DATA, [0, 1], settings={"lr": 0.1}, results=file)  # where it runs is no setting
    quick({"b": partial(nn.Linear, 12, 3, bias=False)}, DATA, [0], settings={"lr": 0.1}, results=file)  # another model beside it is welcome
    for words, call in {
        "settings.lr was 0.1, is 0.2": partial(quick, {"a": net}, DATA, settings={"lr": 0.2}),
        "settings.epochs was 'not given', is 3": partial(quick, {"a": net}, DATA, settings={"lr": 0.1, "epochs": 3}),
        "models.a.parameters was 39, is 36": partial(quick, {"a": partial(nn.Linear, 12, 3, bias=False)}, DATA, settings={"lr": 0.1}),
        "models.a.settings.lr was 'not given', is 1": partial(quick, {"a": net}, DATA, settings={"lr": 0.1}, per_model={"a": {"lr": 1}}),
        "data.test.digest": partial(quick, {"a": net}, (*DATA[:2], digits_like(30, 9)), settings={"lr": 0.1}),
        "data.valid.name was 'TensorDataset', is 'not given'": partial(quick, {"a": net}, (DATA[0], DATA[2]), settings={"lr": 0.1}),
    }.items():
        with pytest.raises(ValueError, match=words):
            call(results=file)
    assert len(recorded(file).frame) == 3


def test_a_results_file_is_readable_and_says_nothing_of_the_machine(tmp_path):
    file = tmp_path / "deep" / "runs.json"
    quick({"a": net, "b": net}, DATA, range(2), results=file, settings={"lr": 0.1})
    text = file.read_text()
    assert sum(line.startswith('  {"model": "a", "seed": ') for line in text.splitlines()) == 4  # two rows, two histories, a line each
    assert str(tmp_path) not in text and str(Path(rec.__file__).parent) not in text and (len(socket.gethostname()) < 4 or socket.gethostname() not in text)
    made = json.loads(text)["made"]
    assert len(made) == 1 and made[0]["torch"] == torch.__version__ and made[0]["threads"] == 1
    assert {"model", "seed", "accuracy", "loss", "parameters", "epochs", "train_seconds", "wall_seconds", "made"} <= set(recorded(file).frame.columns)
    file.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="runs.json.*results file"):
        quick({"a": net}, DATA, results=file)
    file.write_text('{"accuracy": 1}')
    with pytest.raises(ValueError, match="other.json|runs.json"):
        recorded(file)


def test_a_run_names_the_commit_of_its_own_code_and_says_when_the_code_differs(tmp_path, monkeypatch):
    if not shutil.which("git"):
        pytest.skip("needs git")
    package = tmp_path / "checkout" / "feedback_nb"
    package.mkdir(parents=True)
    (package / "evaluation.py").write_text("1")

    def git(*words):
        named = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *named, *words], cwd=package.parent, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(rec, "package_folder", lambda: package)
    assert rec.code_state() == {"commit": None, "dirty": None}  # no repository
    git("init")
    (package.parent / "README").write_text("r")
    git("add", "README")
    git("commit", "-m", "first")
    assert rec.code_state() == {"commit": git("rev-parse", "HEAD"), "dirty": True}  # the package is not in it yet
    git("add", ".")
    git("commit", "-m", "second")
    (package.parent / "notes").write_text("outside the package")
    assert rec.code_state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}

    def commits_meanwhile(model, data, **options):
        (package / "evaluation.py").write_text("2")
        git("commit", "-am", "third")
        return quick_fit(model, data, **options)

    before = git("rev-parse", "HEAD")
    made = compare({"a": net}, DATA, [0], progress=False, fit=commits_meanwhile, evaluate=quick_test).record["made"]
    assert git("rev-parse", "HEAD") != before and [m["commit"] for m in made] == [before]

    inside = package.parent / "venv" / "site-packages" / "feedback_nb"  # installed in an environment inside another project
    inside.mkdir(parents=True)
    monkeypatch.setattr(rec, "package_folder", lambda: inside)
    assert rec.code_state() == {"commit": None, "dirty": None}


def test_recorded_finds_results_above_and_says_what_there_is(tmp_path, monkeypatch):
    quick({"a": net}, DATA, [0], results=tmp_path / "results" / "mine.json")
    (tmp_path / "nbs").mkdir()
    (tmp_path / "results" / "other.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "nbs")
    assert recorded("mine").models == ["a"]
    with pytest.raises(FileNotFoundError, match="no recorded run 'yours'.*mine.*compare") as error:
        recorded("yours")
    assert "other" not in str(error.value)
