"""A notebook as Colab has it: alone in a folder, the package from its wheel, no repository.

Two by default, all of them with `pytest -m slow`. `pip` is not called: the wheel lies on the path,
and what the cell would have asked of pip is looked at instead.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import nbformat
import pytest
from nbclient import NotebookClient
from small_project import ROOT

NOTEBOOKS = sorted(p.name for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))
FEW = ["10_cbl.ipynb"]
NO_CELL = {"90_replay.ipynb", "95_layers.ipynb"}
COLAB = """import json, sys, types
import matplotlib
matplotlib.use("Agg")
sys.modules["google.colab"] = types.ModuleType("google.colab")
sys.modules.setdefault("google", types.ModuleType("google")).colab = sys.modules["google.colab"]
asked_of_pip = []
get_ipython().system = asked_of_pip.append"""


def cells(name: str) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(
        (ROOT / "nbs" / name).read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_one_cell_installs_the_package_and_never_torch(name):
    found = [source for source in cells(name) if "get_ipython().system" in source]
    assert len(found) == (name not in NO_CELL), "one cell, and only one, calls pip"
    for source in found:
        assert 'if "google.colab" in sys.modules:' in source and "#| hide" in source
        assert all("--no-deps" in line for line in source.splitlines() if "pip install" in line)
        assert not re.search(r"\btorch\b", source)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The wheel of this tree, unpacked: what a user has, and nothing else of the project."
    folder = tmp_path_factory.mktemp("colab")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE",
                 "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("feedback_nb", "results"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index",
                    "--no-build-isolation", "-w", folder, source], check=True)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site-packages")
    return folder / "site-packages"


def run_alone(name: str, installed, folder) -> None:
    "Execute a copy of the notebook in an empty folder, as in Colab."
    (folder / "content").mkdir()
    (folder / "data").mkdir()  # what would be downloaded, by name and checked, into the cache
    (folder / "data" / "samples").symlink_to(ROOT / "nbs" / "samples")
    notebook = nbformat.read(ROOT / "nbs" / name, as_version=4)
    skipped = re.compile(r"^#\|\s*(gpu|fulldata|slow|eval: false)", flags=re.M)
    notebook.cells = [c for c in notebook.cells if not skipped.search(c.source)]
    notebook.cells.insert(0, nbformat.v4.new_code_cell(COLAB))
    notebook.cells.append(nbformat.v4.new_code_cell(
        "import feedback_nb; print(feedback_nb.__file__); print(json.dumps(asked_of_pip))"))
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(installed), "FEEDBACK_NB_DATA": str(folder / "data"),
                   "IPYTHONDIR": str(folder / "ipython"), "OMP_NUM_THREADS": "1",
                   "FEEDBACK_NB_CACHE": str(folder / "cache")}
    try:
        NotebookClient(notebook, timeout=600, kernel_name="python3",
                       resources={"metadata": {"path": str(folder / "content")}}).execute()
    finally:
        os.environ.clear()
        os.environ |= before
    said = "".join(o.get("text", "") for o in notebook.cells[-1].outputs).splitlines()
    assert said[0].startswith(str(installed)), "the repository's package was imported"
    assert len(json.loads(said[1])) == 1 and "--no-deps" in said[1]


@pytest.mark.parametrize("name", FEW)
def test_a_notebook_runs_alone(name, installed, tmp_path):
    run_alone(name, installed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NOTEBOOKS if n not in {*NO_CELL, *FEW}])
def test_every_notebook_runs_alone(name, installed, tmp_path):
    run_alone(name, installed, tmp_path)
