"""Makes the offline book: executes notebooks that changed, writes an HTML page for each to _book/.

    python scripts/book.py [--root DIR] [--jobs N]

Notebooks in nbs/ are read, never written. Executed copies go to _book/notebooks/ by a rename at the
very end, each with the key of everything it was made from, so an interrupted run leaves nothing
that a later run would trust.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

import pages
from frame import bare_index
from project import notebooks, settings
from running import copy_live, execute, kept, key_of, replace, skipped


# ---------------------------------------------------------------- all of them

def child(*args: object, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, __file__, *map(str, args)], env=env, capture_output=True,
                          text=True)


@contextmanager
def in_turn(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that starts nothing new once something was raised, Ctrl-C included."""
    pool = ThreadPoolExecutor(jobs)
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def run_all(root: Path, paths: list[Path], out: Path, jobs: int,
            env: dict[str, str]) -> dict[str, dict]:
    """Execute what changed, `jobs` at a time -> {name: what is known of its copy}."""
    environment = sys.version + "\n".join(sorted(f"{d.metadata['Name']}=={d.version}"
                                                 for d in distributions()
                                                 if d.metadata["Name"] != settings(
                                                     root)["lib_name"]))
    state = {}

    def one(path: Path) -> tuple[Path, dict | None, str, bool]:
        copy, key = out / "notebooks" / path.name, key_of(root, path, environment)
        if book := kept(path, copy, key):
            return path, book, "", True
        copy.unlink(missing_ok=True)
        done = child("--root", root, "--execute", path, copy, key, env=env)
        book = json.loads(
            copy.read_text(encoding="utf-8"))["metadata"]["book"] if copy.is_file() else None
        return path, book, done.stderr, False

    with in_turn(jobs) as pool:
        for path, book, error, same in pool.map(one, paths):
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            recorded = sum(1 for c in cells if [f for f in skipped(root, c) if f != "eval"])
            took = "kept" if same else f"{book['seconds']:.1f} s" if book else "-"
            count = sum(c["cell_type"] == "code" for c in cells)
            more = f"   {recorded} recorded" if recorded else ""
            print(f"  {path.stem:<28}{count:>4} cells {took:>9}{more}", flush=True)
            if book is None:
                book = {
                    "failed": {"cell": 0,
                               "error": ["NotExecuted",
                                         error.strip()[-2000:] or "the run was cut off"],
                               "source": ""}, "sum": ""}
            if fault := book["failed"]:
                print(f"    FAILED in cell {fault['cell']}: {': '.join(fault['error'])}")
                print("".join(f"      | {line}\n" for line in fault["source"].splitlines()), end="",
                      flush=True)
            state[path.stem] = book
    return state


def write_pages(root: Path, out: Path, state: dict[str, dict], jobs: int,
                env: dict[str, str]) -> list[str]:
    """Write the HTML pages that changed; returns what is wrong with them."""
    chapters = [c for c in pages.contents(root)
                if c["stem"] in state]  # one may have come while the others ran
    package = root / settings(root)["lib_path"]
    common = hashlib.sha256(json.dumps(chapters).encode())
    for path in [*sorted(p for p in Path(__file__).parent.iterdir() if p.is_file()),
                 *sorted(package.glob("*.py"))]:
        common.update(path.read_bytes())

    def one(chapter: dict) -> tuple[str, list[str], bool]:
        page = out / chapter["page"]
        source = (root / "nbs" / chapter["notebook"]).read_bytes()
        key = hashlib.sha256(common.digest() + source + state[chapter["stem"]]["sum"].encode()
                             + json.dumps(state[chapter["stem"]]["failed"]).encode()).hexdigest()
        if page.is_file() and pages.key_in(page) == key:
            return chapter["stem"], [], True
        page.unlink(missing_ok=True)
        done = child("--root", root, "--page", chapter["stem"], out, key, env=env)
        faults = [line for line in done.stdout.splitlines() if line]
        if done.returncode or not page.is_file():
            faults.append("no page was written: "
                          + (done.stderr.strip().splitlines() or ["no reason given"])[-1])
        return chapter["stem"], faults, False

    with in_turn(jobs) as pool:
        results = list(pool.map(one, chapters))
    wanted = {c["page"] for c in chapters} | {"index.html", "api.html"}
    for page in out.glob("*.html"):
        if page.name not in wanted:
            page.unlink()
            (out / "search" / f"{page.name}.js").unlink(missing_ok=True)
    if not any(c["stem"] == "index" for c in chapters):
        replace(out / "index.html", bare_index(root, chapters))
    replace(out / "api.html", pages.names_page(root, chapters))
    for folder in ("images",):
        for path in (root / "nbs" / folder).glob("*"):
            if path.is_file():
                (out / "notebooks" / folder).mkdir(parents=True, exist_ok=True)
                (out / "notebooks" / folder / path.name).write_bytes(path.read_bytes())
    copy_live(root / "nbs" / "live", out / "live")
    same = sum(unchanged for _, _, unchanged in results)
    print(f"  pages: {len(results) - same} written, {same} kept", flush=True)
    return [f"{stem}: {fault}" for stem, faults, _ in results for fault in faults]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent,
                        help="the project (default: this one)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1),
                        help="notebooks that run at the same time (default: 2)")
    parser.add_argument("--execute", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--page", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    root = args.root.resolve()
    if args.execute:
        execute(root, Path(args.execute[0]), Path(args.execute[1]), args.execute[2])
        return 0
    if args.page:
        stem, out, key = args.page
        (name, text, found), faults = pages.make(root, stem, Path(out), key)
        replace(Path(out) / "search" / f"{name}.js", found)
        replace(Path(out) / name, text.replace(f"<!-- key {key} -->", "<!-- with faults -->", 1)
                if faults else text)  # so that the next run tries again
        print("\n".join(faults))
        return 0
    start, out = time.perf_counter(), root / "_book"
    paths = notebooks(root)
    if not paths:
        print(f"no notebook in {root / 'nbs'}: nothing to make a book of", file=sys.stderr)
        return 1
    env = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "IN_TEST")} | {
        "TQDM_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if args.jobs > 1:
        env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    if data := os.environ.get("FEEDBACK_NB_DATA"):
        env["FEEDBACK_NB_DATA"] = os.environ["FEEDBACK_NB_DATA"] = os.path.abspath(
            data)  # kernels run in nbs/
    flags = settings(root).get("tst_flags", "")
    print(f"Executing {len(paths)} notebooks, {args.jobs} at a time; "
          f"cells flagged {flags} keep their recorded outputs.", flush=True)
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    for stale in (out / "notebooks").glob("*.ipynb"):
        if not (root / "nbs" / stale.name).is_file():
            stale.unlink()
    state = run_all(root, paths, out, args.jobs, env)
    faults = write_pages(root, out, state, args.jobs, env)
    for fault in faults:
        print(f"    FAULT in {fault}")
    broken = [stem for stem, book in state.items() if book["failed"]]
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    place, more = os.path.relpath(out / "index.html", Path.cwd()), ""
    if broken:
        more = f" Did not run to the end: {', '.join(broken)}."
    print(f"The book is at {place}, made in {minutes} min {seconds} s." + more)
    return 1 if broken or faults else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; what was finished is kept, the next run does the rest")
