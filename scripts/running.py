"""One notebook of the offline book: what decides its outputs, and its run in a fresh kernel."""
from __future__ import annotations

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
from pathlib import Path

from project import directives, settings

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
