"""Files that are whole or not there, locks, checksums, and the three checks of arguments."""
import os
import signal
import subprocess
import sys
import time

import pytest

from feedback_nb.checks import need_equal, need_known, need_number
from feedback_nb.files import checksum, locked, remove_leftovers, written_whole


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with written_whole(path) as made:
        made.write_text("one")
        assert not path.exists()
    with pytest.raises(RuntimeError, match="stop"):
        with written_whole(path, durable=True) as made:
            made.write_text("tw")
            raise RuntimeError("stop")
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_written_whole_and_replaces_none(tmp_path):
    path = tmp_path / "step"
    for _ in range(2):
        try:
            with written_whole(path, durable=True) as made:
                made.mkdir()
                (made / "a").write_text("a")
        except OSError:
            pass
    assert [p.name for p in tmp_path.rglob("*")] == ["step", "a"]


@pytest.mark.skipif(os.name == "nt", reason="modes of files are POSIX")
def test_a_file_has_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        with written_whole(tmp_path / "a") as made:
            made.touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from feedback_nb.files import written_whole\n"
            "with written_whole(Path(sys.argv[1])) as made:\n"
            "    made.write_text('half'); time.sleep(60)")
    path = tmp_path / "a.txt"
    child = subprocess.Popen([sys.executable, "-c", code, str(path)])
    while not list(tmp_path.glob(".a.txt.*.tmp/a.txt")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    child.wait()
    assert list(tmp_path.iterdir()) and not path.exists()
    remove_leftovers(tmp_path / "b.txt")
    assert list(tmp_path.iterdir())
    remove_leftovers(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="a folder cannot be locked there")
@pytest.mark.parametrize("name", ["", ".lock"])
def test_a_lock_is_held_by_one_and_dies_with_its_process(tmp_path, name):
    path = tmp_path / name
    code = ("import sys, time; from pathlib import Path; from feedback_nb.files import locked\n"
            "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(TimeoutError, match="another process"):
        with locked(path, wait=False):
            pass
    child.kill()
    child.wait()
    with locked(path):
        pass


def test_checksums(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(b"a" * 3_000_000)
    import hashlib

    assert checksum(path) == hashlib.sha256(b"a" * 3_000_000).hexdigest()
    assert checksum(path, "md5") == hashlib.md5(b"a" * 3_000_000).hexdigest()


@pytest.mark.parametrize("call, message", [
    (lambda: need_known("cosin", ["step", "cosine"], "schedule"), "'cosin' .*schedule.*'cosine'"),
    (lambda: need_known(3, [], "key"), "3 .*key.*none"),
    (lambda: need_equal(2, 3, "titles"), "titles.* 3.* 2"),
    (lambda: need_number(1, n=0), "n .*at least 1.* 0"),
    (lambda: need_number(0, 1, strict=True, n=1.0), "n .*above 0 and below 1"),
    (lambda: need_number(n=float("nan")), "n .*nan"),
    (lambda: need_number(n=True), "n .*True"),
    (lambda: need_number(n="3"), "n .*'3'"),
    (lambda: need_number(whole=True, n=2.0), "n .*whole"),
    (lambda: need_number(0, 4, a=4, n=5), "n .*at most 4.* 5"),
])
def test_checks_name_the_thing_and_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_checks_let_pass_what_is_right():
    import numpy as np

    need_known("step", ["step"], "schedule")
    need_equal(3, 3, "titles")
    need_number(0, 1, a=0, b=1, c=0.5, d=np.float32(0.5))
    need_number(0, whole=True, a=np.int64(3))
    need_number(0, strict=True, a=1e-300)
