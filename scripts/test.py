"""All tests: each notebook's own in a process of its own (nbdev_test), two at a time, then pytest.

    python scripts/test.py [pytest's arguments]
    python scripts/test.py --quick      pytest alone: no process, no page, nothing long
    python scripts/test.py --measure    pytest alone, in one process; writes tests/seconds.json
"""
from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from book import in_turn
from project import notebooks

ROOT = Path(__file__).resolve().parent.parent


def one(path: Path) -> tuple[Path, int, str, float]:
    """A process for each notebook: nbdev_test re-uses its workers with what they leave."""
    start = time.perf_counter()
    code = ("import sys; from nbdev.test import nbdev_test; "
            "nbdev_test.__wrapped__(path=sys.argv[1], n_workers=0)")
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True,
                          text=True)
    return path, done.returncode, done.stdout + done.stderr, time.perf_counter() - start


def main() -> int:
    start = time.perf_counter()
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "Agg"}
    if data := os.environ.get("FEEDBACK_NB_DATA"):
        os.environ["FEEDBACK_NB_DATA"] = os.path.abspath(data)  # notebooks run in nbs/
    jobs, failed = min(2, os.cpu_count() or 1), []
    if {"--quick", "--measure"} & set(sys.argv):
        del os.environ["TQDM_DISABLE"]
        jobs = jobs if "--quick" in sys.argv else 0
        return subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", str(jobs),
                               *sys.argv[1:]], cwd=ROOT).returncode
    paths = notebooks(ROOT)
    print(f"Testing {len(paths)} notebooks, {jobs} at a time.", flush=True)
    with in_turn(jobs) as pool:
        for path, code, said, seconds in pool.map(one, paths):
            print(f"  {path.stem:<28}{'ok' if code == 0 else 'FAILED':>7} {seconds:>7.1f} s",
                  flush=True)
            if code:
                failed.append(path.name)
                print("".join(f"    | {line}\n" for line in said.strip().splitlines()), end="",
                      flush=True)
    passed, seconds = len(paths) - len(failed), time.perf_counter() - start
    more = f" Failed: {', '.join(failed)}." if failed else ""
    counts = f"{passed} passed, {len(failed)} failed"
    print(f"Notebooks: {counts} in {seconds:.0f} s.{more}", flush=True)
    del os.environ["TQDM_DISABLE"]  # a test looks at the progress bar
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", str(jobs), *sys.argv[1:]],
                           cwd=ROOT)
    return 1 if failed else tests.returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
