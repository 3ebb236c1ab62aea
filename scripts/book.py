"""Makes the offline book: executes notebooks that changed, writes an HTML page for each to _book/.

    python scripts/book.py [--root DIR] [--jobs N]

Notebooks in nbs/ are read, never written. Executed copies go to _book/notebooks/ by a rename at the
very end, each with the key of everything it was made from, so an interrupted run leaves nothing
that a later run would trust.
"""
from __future__ import annotations

import argparse
import ast
import base64
import filecmp
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

import pages
from project import directives, notebooks, settings

EXECUTION = "1"  # raise it when a change of this script changes what execution gives
NEEDS = {"gpu": "a GPU", "fulldata": "a full data set", "slow": "more time than the book takes"}


# ---------------------------------------------------------------- what there is

def imported(package: Path, text: str, tree: ast.AST | None = None) -> set[str]:
    """Names of the modules of `package` that this code imports directly, by tree or text."""
    modules = {p.stem for p in package.glob("*.py")}
    if tree is not None:
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.level
                                                     or (node.module or "").split(".")[0]
                                                     == package.name):
                inside = (node.module or "").removeprefix(package.name).strip(".")
                names |= {inside} if inside else {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {a.name.split(".")[1] for a in node.names
                          if a.name.startswith(package.name + ".")}
        return names & modules
    names = set(re.findall(rf"\b{package.name}\.(\w+)", text)) & modules
    for plain in re.findall(rf"from\s+{package.name}\s+import\s+(\([^)]*\)|[^\n]*)", text):
        names |= set(re.findall(r"\w+", plain)) & modules
    return names


def key_of(root: Path, notebook: Path, environment: str) -> str:
    """Hash of what decides a notebook's outputs: cells, modules, samples, records, versions."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    digest = hashlib.sha256(
        f"{EXECUTION}\0{environment}\0{os.environ.get('FEEDBACK_NB_DATA', '')}".encode())
    # a recorded cell is not executed: what it shows is part of the input
    digest.update(json.dumps([["".join(c["source"]), c["outputs"] if skipped(root, c) else 0]
                              for c in cells if c["cell_type"] == "code"]).encode())
    package = root / settings(root)["lib_path"]
    reached, waiting, everything = {}, {"__init__"} | imported(package, code), code
    while waiting:
        module = waiting.pop()
        path = package / f"{module}.py"
        reached[module] = path.read_text(encoding="utf-8") if path.is_file() else ""
        waiting |= imported(package, reached[module], ast.parse(reached[module])) - reached.keys()
    for module, text in sorted(reached.items()):
        digest.update(f"{module}\0{text}\0".encode())
        everything += text
    for folder in ("nbs/samples", "nbs/images", "results"):
        if Path(
            folder).name not in everything:  # neither the notebook nor what it imports speaks of it
            continue
        for path in sorted((root / folder).rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(root)).encode()
                              + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def skipped(root: Path, cell: dict) -> list[str]:
    """The flags for which a cell is not executed here; `eval` stands for `#| eval: false`."""
    if cell["cell_type"] != "code":
        return []
    found = directives("".join(cell["source"]))
    return [f for f in settings(root).get("tst_flags", "").split()
            if f in found] + ["eval"] * (found.get("eval") == "false")


def checksum(cells: list) -> str:
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()


def kept(source: Path, copy: Path, key: str) -> dict | None:
    """What is known of an executed copy if whole and of the same code; its text is renewed."""
    try:
        notebook = json.loads(copy.read_text(encoding="utf-8"))
        book = notebook["metadata"]["book"]
        if book["key"] != key or book["sum"] != checksum(notebook["cells"]) or book["failed"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    executed = iter([c for c in notebook["cells"] if c["cell_type"] == "code"])
    cells = [next(executed) if c["cell_type"] == "code" else c
             for c in json.loads(source.read_text(encoding="utf-8"))["cells"]]
    if cells != notebook["cells"]:
        notebook["cells"], book["sum"] = cells, checksum(cells)
        replace(copy, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    return book


# ---------------------------------------------------------------- one notebook (its own process)

def execute(root: Path, source: Path, copy: Path, key: str) -> None:
    """Run `source` in a fresh kernel of this Python and put the result at `copy`, or nothing."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    start, current, failed = time.perf_counter(), [0], None
    notebook = nbformat.read(source, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if flags := skipped(root, cell):
            cell.metadata["tags"] = ["not-run"]
            cell.metadata["recorded"] = [NEEDS.get(f, f) for f in flags if f != "eval"]
    with tempfile.TemporaryDirectory() as folder:
        # nothing of the user's own set-up takes part: no start-up files, no kernel from elsewhere
        os.environ["IPYTHONDIR"] = os.environ["JUPYTER_RUNTIME_DIR"] = folder
        manager = AsyncKernelManager(kernel_name="python3",
                                     connection_file=str(Path(folder) / "k.json"))
        manager._kernel_spec = KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f",
                                                "{connection_file}"], display_name="Python",
                                          language="python")
        if os.name == "posix":
            manager.transport = "ipc"  # two kernels that start together then share no port
        client = NotebookClient(
            notebook, km=manager, timeout=1200, skip_cells_with_tag="not-run", record_timing=False,
            resources={"metadata": {"path": str(root / "nbs")}},
            on_cell_execute=lambda cell, cell_index: current.__setitem__(0, cell_index),
        )
        try:
            client.execute(stderr=subprocess.DEVNULL)
        except CellExecutionError as error:
            failed = [error.ename, error.evalue]
        except CellTimeoutError:
            failed = ["Timeout", "the cell ran for more than 20 minutes"]
        except DeadKernelError:
            failed = ["DeadKernel", "the kernel died; perhaps there was too little memory"]
    for cell in notebook.cells:
        cell.metadata.pop("tags", None)
    plain = json.loads(nbformat.writes(notebook))
    plain["metadata"]["book"] = {
        "key": key, "sum": checksum(plain["cells"]),
        "seconds": round(time.perf_counter() - start, 1),
        "failed": failed and {"cell": current[0] + 1, "error": failed,
                              "source": notebook.cells[current[0]].source},
    }
    replace(copy, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def replace(path: Path, text: str) -> None:
    """Write aside, then rename: a reader finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


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
    for path in [*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).with_name("book.css"),
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
    if not any(c["stem"] == "index" for c in chapters):
        replace(out / "index.html", pages.bare_index(root, chapters))
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


def copy_live(source: Path, out: Path) -> None:
    """What live networks load, and beside each file a script with it: a page that was opened as a
    file may not fetch."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        name = path.relative_to(source).as_posix()
        copy = out / name
        if path.suffix == ".safetensors" or copy.is_file() and filecmp.cmp(path, copy, False):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".gz", ".json", ".mjs", ".onnx"):
            text = base64.b64encode(path.read_bytes()).decode()
            replace(out / f"{name}.js", f"feedbackLive.hand({json.dumps(name)}, \"{text}\");\n")
        copy.write_bytes(path.read_bytes())


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
        (name, text), faults = pages.make(root, stem, Path(out), key)
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
