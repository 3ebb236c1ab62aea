"""What whoever records runs relies on: none is lost, none is mixed up, each says what it is of."""
import json
import os
import random
import re
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
from feedback_nb import sources
from feedback_nb.evaluation import compare, recorded

ROOT = Path(__file__).resolve().parent.parent


pytestmark = pytest.mark.usefixtures("one_thread")


def ran(file):
    return [(line["model"], line["seed"]) for line in rec.read_lines(file)]


# the file

def test_a_crash_loses_only_the_running_run(tmp_path):
    file, runs = tmp_path / "runs.json", []

    def flaky(model, data, **how):
        runs.append(how["seed"])
        if len(runs) == 4:
            raise KeyboardInterrupt
        return quick_fit(model, data, **how)

    models = {"a": net, "b": lambda: (nn.Sequential(net()), {"lr": 0.05})}
    again = partial(quick, models, DATA, range(3), results=file, fit=flaky)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert len(ran(file)) == 3 and set(os.listdir(tmp_path)) <= {"runs.jsonl", ".lock"}
    resumed = again()
    assert runs == [0, 0, 1, 1, 1, 2, 2]  # the fourth again, the first three not
    assert without_times(resumed) == without_times(quick(models, DATA, range(3)))
    assert resumed.record["models"]["b"]["settings"] == {"lr": 0.05}


CHILD = """
import sys, torch
sys.path.insert(0, {here!r})
torch.set_num_threads(1)
from test_record import *
def slow(model, data, **how):
    time.sleep(0.05)
    return quick_fit(model, data, **how)
quick({models}, DATA, range({n}), results={file!r}, fit=slow)
"""


def child(file, models="{'a': net}", n=20):
    code = CHILD.format(here=str(Path(__file__).parent), models=models, file=str(file), n=n)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.process
def test_two_writers_and_a_kill_9_leave_a_whole_file(tmp_path):
    file = tmp_path / "runs.jsonl"
    first, second = child(file, n=500), child(file, "{'b': net}")
    while sum(model == "a" for model, _ in ran(file)) < 3:  # every read sees whole lines
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    assert first.wait(120) == -signal.SIGKILL and second.wait(120) == 0
    done = [model for model, _ in ran(file)]
    assert done.count("b") == 20 and 3 <= done.count("a") < 500
    resumed = quick({"a": net, "b": net}, DATA, range(20), results=file)
    assert len(resumed.frame) == 40 and resumed.scores("a") == resumed.scores("b")


EMPTY = {"format": rec.FORMAT, "made": [], "data": {}, "settings": {}, "models": {"a": {}, "b": {}},
         "rows": [], "histories": []}


def test_a_second_writer_waits_until_the_first_has_written(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    file, write, reading = tmp_path / "runs.jsonl", rec.append_line, threading.Event()

    def slow(path, line):
        if not reading.is_set():
            reading.set()
            time.sleep(0.5)  # whoever does not wait cuts off what is being written
        write(path, line)

    monkeypatch.setattr(rec, "append_line", slow)
    run = lambda model: rec.merge_record(file, EMPTY, {"model": model, "seed": 0},
                                         {"model": model, "seed": 0}, {"date": "today"})
    first = threading.Thread(target=run, args=("a",))
    first.start()
    assert reading.wait(60)
    run("b")
    first.join()
    assert ran(file) == [("a", 0), ("b", 0)]


def test_other_runs_are_refused_and_the_difference_is_named(tmp_path):
    file, thin = tmp_path / "runs.jsonl", partial(nn.Linear, 12, 3, bias=False)
    one = partial(quick, {"a": net}, DATA, settings={"lr": 0.1})
    one([0], settings={"lr": 0.1, "device": "cpu"}, results=file)
    one([0, 1], results=file)  # where it runs is no setting
    quick({"b": thin}, DATA, [0], settings={"lr": 0.1}, results=file)  # beside it is welcome
    for words, call in {
        "settings.lr was 0.1, is 0.2": partial(one, settings={"lr": 0.2}),
        "settings.epochs was 'not given', is 3": partial(one, settings={"lr": 0.1, "epochs": 3}),
        "models.a.parameters was 39, is 36": partial(quick, {"a": thin}, DATA,
                                                     settings={"lr": 0.1}),
        "models.a.settings.lr was 'not given', is 1": partial(one, per_model={"a": {"lr": 1}}),
        "data.test.digest": partial(quick, {"a": net}, (*DATA[:2], digits_like(30, 9)),
                                    settings={"lr": 0.1}),
        "data.valid.name was 'TensorDataset', is 'not given'": partial(
            quick, {"a": net}, (DATA[0], DATA[2]), settings={"lr": 0.1}),
    }.items():
        with pytest.raises(ValueError, match=words):
            call(results=file)
    assert len(recorded(file).frame) == 3


def test_a_results_file_is_readable_and_says_nothing_of_the_machine(tmp_path):
    file = tmp_path / "deep" / "runs.jsonl"
    quick({"a": net, "b": net}, DATA, range(2), results=file, settings={"lr": 0.1})
    text, host = file.read_text(), socket.gethostname()
    assert [line[:60].count('"model": "a"') for line in text.splitlines()].count(1) == 2
    assert str(tmp_path) not in text and str(ROOT) not in text
    assert len(host) < 4 or host not in text
    made = [json.loads(line)["made"] for line in text.splitlines()]
    assert all(m["torch"] == torch.__version__ and m["threads"] == 1 for m in made)
    columns = "model seed accuracy loss parameters epochs train_seconds wall_seconds made"
    assert set(columns.split()) <= set(recorded(file).frame.columns)


@pytest.mark.parametrize("cut", [1, 2, 300, "a line"])
def test_a_torn_line_is_no_run_and_is_replaced(tmp_path, cut):
    file = tmp_path / "runs.jsonl"
    whole = quick({"a": net}, DATA, range(3), results=file)
    text = file.read_text()
    file.write_text(text[:-(len(text.splitlines()[-1]) if cut == "a line" else cut)])
    assert ran(file) == [("a", 0), ("a", 1)] and len(recorded(file).frame) == 2
    assert without_times(quick({"a": net}, DATA, range(3), results=file)) == without_times(whole)
    assert ran(file) == [("a", 0), ("a", 1), ("a", 2)]


@pytest.mark.parametrize("damage", ["{}", '"text"', "[1", '{"format": "another"}', ""])
def test_a_damaged_line_is_named(tmp_path, damage):
    file = tmp_path / "runs.jsonl"
    quick({"a": net}, DATA, range(3), results=file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], damage, lines[2], ""]))
    for read in (recorded, partial(quick, {"a": net}, DATA, results=file)):
        with pytest.raises(ValueError, match="runs.jsonl, line 2"):
            read(file) if read is recorded else read()


def test_the_format_before_is_read_and_continued(tmp_path):
    old = json.loads((Path(__file__).parent / "goldens" / "old_results.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps(old))
    record = rec.find_record(tmp_path / "old")
    origin = lambda r: [{**row, "made": r["made"][row["made"]]} for row in r["rows"]]
    assert origin(record) == origin(old)  # every row, every value, where each is from
    assert all(record[k] == old[k] for k in ("data", "settings", "models", "histories"))
    assert list(record["models"]) == list(old["models"])
    run = {"model": "CNN", "seed": 77}
    merged = rec.merge_record(tmp_path / "old.json", {**old, "rows": [], "histories": []}, run,
                              run, old["made"][0])
    assert len(merged["rows"]) == len(old["rows"]) + 1 and len(ran(tmp_path / "old")) == 3
    assert [json.loads(line)["seed"] for line in (tmp_path / "old.jsonl").open()] == [77]
    (tmp_path / "old.json").write_text('{"accuracy": 1}')
    with pytest.raises(ValueError, match="old.json"):
        rec.find_record(tmp_path / "old")


def test_a_run_that_was_made_again_counts_and_nothing_is_overwritten(tmp_path, monkeypatch):
    file = tmp_path / "runs.jsonl"
    for seed in (0, 1):
        run = {"model": "a", "seed": seed}
        rec.merge_record(file, EMPTY, {**run, "accuracy": 1}, run, {"date": "today"})
    monkeypatch.setattr(rec, "recorder", rec.Recorder(lambda *_: [], {}))
    run = {"model": "a", "seed": 0}
    rec.merge_record(file, EMPTY, {**run, "accuracy": 2}, run, {"date": "today"})
    assert [r["accuracy"] for r in rec.find_record(file)["rows"]] == [2, 1] and len(ran(file)) == 3
    rec.merge_record(file, {**EMPTY, "settings": {"lr": 1}}, {**run, "accuracy": 3}, run, {})
    assert [r["accuracy"] for r in rec.find_record(file)["rows"]] == [3]  # of the new settings


def test_recorded_finds_results_above_and_says_what_there_is(tmp_path, monkeypatch):
    quick({"a": net}, DATA, [0], results=tmp_path / "results" / "mine.json")
    (tmp_path / "nbs").mkdir()
    (tmp_path / "results" / "other.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "nbs")
    assert recorded("mine").models == ["a"]
    with pytest.raises(FileNotFoundError, match="no recorded run 'yours'.*mine.*compare") as error:
        recorded("yours")
    assert "other" not in str(error.value)


# where a run is from

def git(at, *words):
    named = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *named, *words], cwd=at, check=True, capture_output=True,
                          text=True).stdout.strip()


def test_a_run_names_the_commit_of_its_own_code_and_says_when_it_differs(tmp_path, monkeypatch):
    if not shutil.which("git"):
        pytest.skip("needs git")
    package = tmp_path / "checkout" / "feedback_nb"
    package.mkdir(parents=True)
    (package / "evaluation.py").write_text("1")
    commit, head = partial(git, package.parent), lambda: git(package.parent, "rev-parse", "HEAD")
    monkeypatch.setattr(rec, "package_folder", lambda: package)
    assert rec.code_state() == {"commit": None, "dirty": None}  # no repository
    commit("init")
    (package.parent / "README").write_text("r")
    commit("add", "README")
    commit("commit", "-m", "first")
    assert rec.code_state() == {"commit": head(), "dirty": True}  # the package is not in it yet
    commit("add", ".")
    commit("commit", "-m", "second")
    (package.parent / "notes").write_text("outside the package")
    assert rec.code_state() == {"commit": head(), "dirty": False}

    def commits_meanwhile(model, data, **options):
        (package / "evaluation.py").write_text("2")
        commit("commit", "-am", "third")
        return quick_fit(model, data, **options)

    before = head()
    made = compare({"a": net}, DATA, [0], progress=False, fit=commits_meanwhile,
                   evaluate=quick_test).record["made"]
    assert head() != before and [m["commit"] for m in made] == [before]

    inside = package.parent / "venv" / "site-packages" / "feedback_nb"  # of another project
    inside.mkdir(parents=True)
    monkeypatch.setattr(rec, "package_folder", lambda: inside)
    assert rec.code_state() == {"commit": None, "dirty": None}


@pytest.mark.parametrize("made, words", [
    ({"commit": "c", "dirty": False}, ["recorded before digests"]),
    ({"commit": None, "dirty": None, "digest": "no", "notebook": "11_cbl_images"},
     ["of other code", "of no commit"]),
    ({"commit": "c", "dirty": True, "digest": "no", "notebook": "no such notebook"},
     ["of uncommitted code"]),
    ({"commit": "c", "dirty": True, "digest": "no", "notebook": "nowhere", "checked": "run"}, []),
])
def test_what_speaks_against_a_run(made, words):
    assert rec.against(made) == words


def test_a_page_says_once_how_many_runs_are_of_older_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.__IPYTHON__", True, raising=False)
    file, now = tmp_path / "runs.jsonl", rec.code_state()["commit"]
    for seed in (0, 1):
        run = {"model": "a", "seed": seed}
        rec.merge_record(file, EMPTY, run, run, {"commit": "c" if seed else now, "dirty": True})
    rec.find_record(file)
    said = capsys.readouterr().out
    assert said.startswith("† runs: 1 of 2 runs") and max(map(len, said.splitlines())) <= 100
    rec.find_record(file)
    assert capsys.readouterr().out == ""
    made = {"commit": "c", "dirty": True, "digest": "d", "notebook": "of nowhere"}
    rec.merge_record(tmp_path / "dirty.jsonl", EMPTY, run, run, made)
    rec.find_record(tmp_path / "dirty.jsonl")  # code that nobody committed is marked as well
    assert capsys.readouterr().out.startswith("† dirty: 1 of 1 runs")


# the code that a run depends on

def digests(folder, notebook="31_lrm_robustness"):
    sources.modules.cache_clear()
    sources.recording_cells.cache_clear()
    return [cell.digest for cell in sources.recording_cells(
        ROOT / "nbs" / f"{notebook}.ipynb", folder)]


@pytest.fixture
def package(tmp_path):
    shutil.copytree(ROOT / "feedback_nb", tmp_path / "feedback_nb")
    yield tmp_path / "feedback_nb"
    sources.modules.cache_clear()
    sources.recording_cells.cache_clear()


def test_a_digest_changes_with_the_code_that_is_called_and_with_no_other(package):
    before = digests(package)
    assert before and len(set(before)) == len(before)

    def after(module, function, line):
        """The digests with one more line at the start of a function."""
        file = package / f"{module}.py"
        text = file.read_text()
        at = re.search(rf"^( *)(?:def|class) {function}\b(?:.|\n)*?:(?: *#.*)?\n(?=( +)\"\"\")",
                       text, re.M)
        file.write_text(text[:at.end()] + f"{at[2]}{line}\n" + text[at.end():])
        found = digests(package)
        file.write_text(text)
        return found

    for module, function in [("training", "fit"), ("lrm", "LRM"), ("feedback", "FeedbackModel"),
                             ("evaluation", "_run"), ("networks", "SmallAlexNet")]:
        assert after(module, function, "# nothing") == before
        changed = after(module, function, "extra = 1")
        assert not set(changed) & set(before), (module, function)
    for module, function in [("caps", "CAPs"), ("statistics", "holm"), ("files", "locked"),
                             ("plots", "image_grid"), ("records", "mark")]:
        assert after(module, function, "extra = 1") == before, (module, function)


def test_a_digest_is_the_same_with_every_python():
    code = "def f(x, *, y=1.5):\n    'Doc.'\n    return [f'{x!r:>{y}} {{}}' for z in x if z]\n"
    found = sources.digest(sources.statements(code + "f(b'1', y=-2)"), ROOT / "none")
    assert found == "b974c59cda68"


@pytest.mark.parametrize("above, cell, needed", [
    ("a = 1\nb = 2\na = 3", "print(a)", "a = 3"),  # the last binding counts
    ("n = 1\ndef f(): return n\nn = 2", "f()", "n = 1\ndef f():\nn = 2"),  # when it is called
    ("n = 1\nm = n\nn = 2", "m", "n = 1\nm = n"),  # and not later
    ("d = {}\nd['a'] = 1\nprint(d)\nd |= {2: 3}", "d", "d = {}\nd['a'] = 1\nd |= {2: 3}"),
    ("net = make()\nrun = fit(net)\nprint(net)", "net", "net = make()\nrun = fit(net)"),
    ("x = 1\ny = [x for x in z]", "y", "y = [x for x in z]"),
    ("x = 1", "x = 2\nprint(x)", ""),  # the cell's own
    ("import torch\ntorch.manual_seed(0)\nx = 1", "torch.ones(3)", "import torch"),
    ("for k in range(3):\n    v = k\nw = v", "w", "for k in range(3):\nw = v"),
])
def test_the_statements_that_a_cell_needs(above, cell, needed):
    import ast

    found = sources.needed(*map(sources.statements, (above, cell)))
    assert [ast.unparse(s).partition("\n")[0] for s in found] == needed.splitlines()


def test_every_cell_that_records_is_found_and_can_be_planned_without_the_page():
    cells = [cell for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
             for cell in sources.recording_cells(path, ROOT / "feedback_nb")]
    assert {"11_cbl_images", "21_unet_noise", "31_lrm_robustness"} <= {c.notebook for c in cells}
    for cell in cells:  # no training on the page is needed
        calls = [s for s in cell.above if "fit" in sources.names(s).takes
                 and not sources.names(s).binds]
        assert not calls, cell.notebook


# the recorder

NOTEBOOK = {
    "import": "import time\nimport torch\nfrom torch import nn\n"
              "from feedback_nb.evaluation import compare, recorded",
    "page": "print('never run by the recorder')\nraise SystemExit('the page')",
    "make": "def make(size=3):\n    \"\"\"A net.\"\"\"\n    return nn.Linear(4, size)",
    "data": "data = [torch.utils.data.TensorDataset(torch.arange(24.0).reshape(6, 4) / 24,\n"
            "                                       torch.arange(6) % 3) for _ in range(2)]",
    "cell": "#| fulldata\ndef slow(model, test):\n    time.sleep(PAUSE)\n"
            "    return {'extra': 1}\n\n"
            "settings = {'epochs': 1, 'lr': 0.1}\n"
            "run = compare({'a': make, 'b, c/d': make}, data, range(3), settings=settings,\n"
            "              measure=slow, results='../results/90_toy.json')\n"
            "run.table('a')",
}


def project(folder, pause=0.01, **changes):
    """A project with one notebook that records six quick runs, and the package as it is."""
    for part in ("feedback_nb", "scripts"):
        shutil.copytree(ROOT / part, folder / part, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", folder)
    (folder / "nbs").mkdir(exist_ok=True)
    cells = {k: v.replace("PAUSE", str(pause)) for k, v in {**NOTEBOOK, **changes}.items()}
    cells = [{"cell_type": "code", "id": k, "metadata": {}, "outputs": [], "source": v,
              "execution_count": None} for k, v in cells.items()]
    text = json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    (folder / "nbs" / "90_toy.ipynb").write_text(text)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "all", "--allow-empty")
    return folder


def record(folder, *words, **options):
    command = [sys.executable, "scripts/record.py", "--chapter", "90", *words]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    how = dict(cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, **how, **options)


def said(folder, *words, code=0):
    process = record(folder, *words)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == code, text
    return text


def numbers(folder):
    """The lines of a file without times and dates."""
    lines = rec.read_lines(folder / "results" / "90_toy.jsonl")
    for line in lines:
        line["row"] = {k: v for k, v in line["row"].items() if "seconds" not in k}
        line["history"].pop("seconds", None)
        line["made"] = {k: v for k, v in line["made"].items() if k not in ("date", "commit")}
    return lines


@pytest.mark.process
def test_the_recorder_runs_what_the_cell_needs_and_says_where_a_run_is_from(tmp_path):
    home = project(tmp_path)
    assert "6 missing" in said(home, "--dry-run")
    assert not ran(home / "results" / "90_toy")
    said(home, "--only", "90_toy/b, c/d/1")
    assert ran(home / "results" / "90_toy") == [("b, c/d", 1)]
    said(home, "--jobs", "2")
    lines = rec.read_lines(home / "results" / "90_toy")
    assert len(lines) == 6 and {line["row"]["extra"] for line in lines} == {1}
    assert all(line["made"]["notebook"] == "90_toy" and line["made"]["dirty"] is False
               and line["made"]["commit"] == git(home, "rev-parse", "HEAD") for line in lines)
    assert "to the last digit" in said(home, "--only", "*/a/0")  # it is there: again, and compared
    assert len(ran(home / "results" / "90_toy")) == 6
    listed = subprocess.run([sys.executable, "scripts/record.py"], cwd=home, capture_output=True,
                            text=True, env={**os.environ, "PYTHONPATH": ""}).stdout
    assert re.search(r"^90_toy +6 +6 ", listed, re.M) and "core-hours per chapter: 90 " in listed


QUEUE = """#| gpu
#| queue: 2
#| minutes: 3
from feedback_nb.records import at_tier
size = at_tier(page=dict(seeds=1, device="cpu"), gpu=dict(seeds=3, device="cuda"))
data = [torch.utils.data.TensorDataset(x.to(size["device"]), y) for x, y in (d[:] for d in data)]
compare({"a": make}, data, range(size["seeds"]), results="../results/90_toy.json",
        settings={"epochs": 1, "device": size["device"]})"""


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_the_queue_of_a_gpu_is_planned_and_tried_where_there_is_none(tmp_path):
    broken = "#| gpu\n#| queue: 1\ncompare({'a': make}, open('none'), results='../results/b.json')"
    home = project(tmp_path, cell=QUEUE, broken=broken)
    told = said(home, "--tier", "gpu", "--dry-run")
    assert told.index("cell 5, cannot be planned") < told.index("cell 4: 3 missing; about 9 min")
    assert told.count("~3.0 min") == 3
    assert "GPU" in said(home, "--tier", "gpu", code=1)
    home = project(tmp_path, cell=QUEUE, broken="")
    assert "90_toy/a/0: made" in said(home, "--tier", "page")
    assert not ran(home / "results" / "90_toy")


RESUMED = NOTEBOOK["cell"].replace("epochs': 1", "epochs': 20").replace(
    "results=", "checkpoints='../runs', results=")


@pytest.mark.process
def test_a_run_that_is_too_long_for_a_piece_is_made_in_several(tmp_path):
    slow = RESUMED.replace("#| fulldata", "#| fulldata\n#| minutes: 9")
    home = project(tmp_path, cell=slow.replace("checkpoints='../runs', ", ""))
    one = "--only", "90_toy/a/0", "--minutes", "8"  # less than a run is said to take
    assert "0 of 1 runs made" in said(home, *one)
    project(home, cell=slow)
    assert "1 of 1 runs made" in said(home, *one)


@pytest.mark.process
def test_stale_runs_are_accepted_only_by_numbers(tmp_path):
    home = project(tmp_path)
    said(home)
    project(home, make=NOTEBOOK["make"].replace("A net.", "One layer."))
    assert "6 done" in said(home, "--dry-run")  # a docstring changes no number
    project(home, make="def make(size=1 + 2): return nn.Linear(4, size)")
    assert "6 of other code" in said(home, "--dry-run")
    assert "to the last digit" in said(home, "--accept") and "6 done" in said(home, "--dry-run")
    assert all("made again at" in n["made"]["checked"] for n in numbers(home))
    project(home, make="def make(size=3): return nn.Sequential(nn.Linear(4, size), nn.Tanh())")
    assert "loss was" in said(home, "--accept", code=1)
    assert "6 of other code" in said(home, "--dry-run")
    said(home)  # so they are made again; the old ones stay in the file, and do not count
    assert "6 done" in said(home, "--dry-run") and len(numbers(home)) == 12


@pytest.mark.process
def test_what_is_not_committed_is_not_recorded(tmp_path):
    home = project(tmp_path)
    with open(home / "feedback_nb" / "cbl.py", "a") as file:
        file.write("# changed\n")
    assert "commit" in said(home, code=1) and not (home / "results").exists()


@pytest.mark.slow
def test_a_recorder_that_is_killed_twenty_times_ends_with_the_same_file(tmp_path):
    whole, killed = project(tmp_path / "whole", 0.5), project(tmp_path / "killed", 0.5)
    said(whole)
    draw, kills = random.Random(0), 0
    while kills < 20:
        process = record(killed, start_new_session=True)
        time.sleep(draw.uniform(0, 25))
        if process.poll() is not None:
            shutil.rmtree(killed / "results")  # it got through: once more from the start
            continue
        process.kill()  # the recorder alone: its processes must notice
        process.communicate(timeout=60)
        kills += 1
    said(killed)
    key = lambda line: (line["model"], line["seed"])
    assert sorted(numbers(killed), key=key) == sorted(numbers(whole), key=key)
