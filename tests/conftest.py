"""Which tests start processes or open pages, and which are too long for `make quick`.

`process` and `page` are found by reading: a test that reaches `subprocess`, say, through the
helpers and fixtures of its file. tests/seconds.json holds what long tests take, in seconds of
processor time; `scripts/test.py --measure` writes it.
"""
import ast
import io
import json
import tarfile
import time
from functools import cache
from pathlib import Path

import pytest

from feedback_nb.sources import names, needed, statements

HERE = Path(__file__).parent
SECONDS = HERE / "seconds.json"
LONG = 0.5  # seconds of processor time: a longer test is none of `make quick`
MARKS = {
    "process": {"subprocess", "multiprocessing", "Popen", "fork", "spawn", "torchrun", "workers",
                "num_workers"},
    "page": {"playwright", "sync_playwright", "chromium", "make_book", "nbconvert", "pypandoc"},
}


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="no process, no page, nothing long")
    parser.addoption("--measure", action="store_true", help="write what long tests take")


@cache
def words(statement: ast.stmt) -> set[str]:
    """All names, attributes and keywords in a statement."""
    nodes = list(ast.walk(statement))
    return names(statement).takes | {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {
        n.arg for n in nodes if isinstance(n, ast.keyword)}


@cache
def module(path: Path) -> list[ast.stmt]:
    return statements(path.read_text(encoding="utf-8"))


def marks_of(item) -> set[str]:
    """The marks of a test, by the words of all that it needs from its file."""
    wanted = ast.parse("; ".join([item.originalname or item.name, *item.fixturenames])).body
    found = set().union(*map(words, needed(module(item.path), wanted)))
    marks = {mark for mark, those in MARKS.items() if those & found}
    return marks | ({"page"} if item.path.stem == "test_book" else set())


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark in marks_of(item):
            item.add_marker(mark)
    if config.getoption("--quick"):
        long = json.loads(SECONDS.read_text()) if SECONDS.is_file() else {}
        left = [item for item in items if item.nodeid in long
                or {"process", "page", "slow"} & {mark.name for mark in item.iter_markers()}]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def write_tar(path, files, mode="w:gz"):
    """An archive of {name: bytes}; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def one_thread():
    """Sums are then added in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TOOK = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    began = time.process_time()
    yield
    TOOK[item.nodeid] = time.process_time() - began


def pytest_sessionfinish(session):
    if session.config.getoption("--measure") and not hasattr(session.config, "workerinput"):
        known = json.loads(SECONDS.read_text()) if SECONDS.is_file() else {}
        known = {k: v for k, v in {**known, **TOOK}.items() if v >= LONG}
        text = json.dumps({k: round(v, 1) for k, v in sorted(known.items())}, indent=0,
                          ensure_ascii=False)
        SECONDS.write_text(text + "\n")
