"""Programs that start warm (scripts/warm.py) end as those that start cold, and leave nothing."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import small_project
from small_project import SCRIPTS

sys.path.append(str(SCRIPTS))
import book  # noqa: E402
import warm  # noqa: E402

pytestmark = [pytest.mark.process,
              pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all start cold")]
ENV = dict(os.environ) | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(monkeypatch):
    monkeypatch.setattr(warm, "COLD", 0)
    with warm.Starter("html", "no_such_module", env=ENV) as starter:
        yield starter
    assert starter.server.poll() == 0, "the process that forks stays"


PROGRAM = """
import html, os, sys, tempfile
folder = tempfile.TemporaryDirectory()
print(sys.argv, sys.path, __name__, os.getcwd(), sys.stdin.read(), html.__dict__.get("mark"))
html.mark = os.environ["MARK"] = "left"
os.chdir("/")
print(folder.name, file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def test_it_ends_as_when_it_starts_cold(start, monkeypatch):
    ends = [start(PROGRAM, 3, "a b") for _ in range(2)]
    monkeypatch.setattr(warm, "COLD", 9)
    ends.append(start(PROGRAM, 3, "a b"))
    folders = [re.search(r"\S*tmp\w+$", end.stdout.strip())[0] for end in ends]
    said = [end.stdout.replace(folder, "") for end, folder in zip(ends, folders)]
    assert said[0] == said[1] == said[2] and "'3', 'a b'" in said[0] and "None" in said[0]
    assert [end.returncode for end in ends] == [3, 3, 3]
    assert not any(os.path.exists(folder) for folder in folders), "what ends, cleans up"


def test_one_that_fails_or_is_killed_leaves_the_others_alone(start):
    programs = ("raise ValueError('why')", "import os; os.kill(os.getpid(), 9)", "print('whole')",
                "import os; os._exit(4)")
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(start, programs))
    assert [end.returncode for end in ends] == [1, -signal.SIGKILL, 0, 4]
    assert "ValueError: why" in ends[0].stdout and ends[2].stdout == "whole\n"


def test_without_the_process_that_forks_it_starts_cold(monkeypatch):
    monkeypatch.setattr(warm, "COLD", 0)
    with warm.Starter(env=ENV) as start:
        assert start("print(1)").stdout == "1\n"
        start.server.kill()
        start.server.wait()
        assert start("print(2)").stdout == "2\n"


def test_an_interrupt_reaches_the_program(tmp_path):
    code = (f"import sys; sys.path.append({str(SCRIPTS)!r}); import os, warm; warm.COLD = 0\n"
            "with warm.Starter(env=dict(os.environ)) as start:\n"
            "    start(\"open('started', 'w'); import time\\ntry: time.sleep(100)\\n\"\n"
            "          \"except KeyboardInterrupt: open('stopped', 'w')\")")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True,
                               stderr=subprocess.DEVNULL)
    for name in ("started", "stopped"):
        for _ in range(300):
            if (tmp_path / name).exists():
                break
            time.sleep(0.1)
        assert (tmp_path / name).exists()
        if name == "started":
            os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) != 0


def cells(path):
    copy = json.loads(path.read_text(encoding="utf-8"))
    return [c.get("outputs") for c in copy["cells"]], copy["metadata"]["book"]["failed"]


def test_a_notebook_is_executed_as_when_it_starts_cold(tmp_path, monkeypatch):
    root = small_project.make(tmp_path / "mini")
    wide = root / "nbs" / "00_first.ipynb"  # pandas asks at its import where tables are shown
    wide.write_text(wide.read_text(encoding="utf-8").replace(
        '[0.5]})', '[0.5]} | {c * 30: [0] for c in \\"abcdefgh\\"})'), encoding="utf-8")
    dies = root / "nbs" / "10_second.ipynb"
    dies.write_text(dies.read_text(encoding="utf-8").replace(
        '"print(f\\"area', '"import os; os._exit(3)\\n", "print(f\\"area'), encoding="utf-8")
    env = ENV | {"PYTHONPATH": str(root), "MPLBACKEND": book.BACKEND, "TQDM_DISABLE": "1"}
    found = {}
    with warm.Starter(*book.KERNEL, env=env) as start:
        for way, number in (("cold", 9), ("warm", 0)):
            monkeypatch.setattr(warm, "COLD", number)
            for path in (wide, dies):
                end = start(book.EXECUTE, root, path, tmp_path / way / path.name, "key")
                assert end.returncode == 0, end.stdout
                found[way, path.stem] = cells(tmp_path / way / path.name)
    assert found["warm", "00_first"] == found["cold", "00_first"]
    assert "h" * 30 in str(found["warm", "00_first"])
    assert found["warm", "00_first"][1] is None and "image/png" in str(found["warm", "00_first"])
    for way in ("cold", "warm"):
        assert found[way, "10_second"][1]["error"][0] == "DeadKernel"


def test_what_fails_in_a_fork_alone_is_executed_cold(tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "COLD", 0)
    root = small_project.make(tmp_path / "mini")
    path = root / "nbs" / "10_second.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace(
        '"print(f\\"area', '"import sys; assert \'warm\' not in sys.modules\\n", "print(f\\"area'),
        encoding="utf-8")
    env = ENV | {"PYTHONPATH": str(root), "MPLBACKEND": book.BACKEND, "TQDM_DISABLE": "1"}
    with warm.Starter("ipykernel.kernelapp", env=env) as start:
        state = book.run_all(root, [path], tmp_path / "out", 1, start)
        assert start.door, "it was tried in a fork"
    assert state["10_second"]["failed"] is None
