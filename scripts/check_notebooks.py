"""Fails, naming notebook and cell, when what is in the repository is not what its notebooks say.

    python scripts/check_notebooks.py [--root DIR] [notebook …]

Rules: feedback_nb/ is what the notebooks export · each notebook is clean · no traceback, warning
or machine path among the outputs · every figure has a text for those who cannot see it · a
notebook with code has outputs · README.md is what index.ipynb gives · every chapter is in the
site's sidebar · the reading budget is kept (scripts/budget.py) · the claims of nbs/claims.yaml
agree with their records and cells (scripts/claims.py) · every [@key] is in nbs/references.bib ·
the first screen is what scripts/cover.py makes of the claims · words are spelt as codespell
knows them, where it is installed.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from budget import check_budget
from claims import check_claims
from cover import check_cover
from project import directives, notebooks, settings
from references import check_references
from words import check_words

FOLDERS = "home|Users|root|tmp|work|mnt|opt|private|content|workspaces?|scratch"
MACHINE = re.compile(rf"(?<![\w./:+=-])(/(?:{FOLDERS})/[\w.-][^\s\"'<>)]*"
                     r"|[A-Z]:\\\\?Users\\[^\s\"'<>)]*)")
WARNING = re.compile(r"^\S*(?:[\w.-]+:\d+: )?\w*Warning: .*", re.M)
IMAGE = re.compile(r"!\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)]*)\)(\{[^}]*\})?")
BASE64 = re.compile(r"[A-Za-z0-9+/]{200,}={0,2}")


# ---------------------------------------------------------------- the rules of one notebook

def text_of(output: dict) -> list[tuple[str, str]]:
    """The readable parts of an output as (kind, text), pictures left out."""
    join = lambda t: t if isinstance(t, str) else "".join(t)
    if output["output_type"] == "stream":
        return [(output["name"], join(output["text"]))]
    if output["output_type"] == "error":
        return [("error", "\n".join(output["traceback"]))]
    return [(kind, BASE64.sub("", join(data))) for kind, data in output["data"].items()
            if kind.startswith(("text/", "image/svg")) and isinstance(data, (str, list))]


def faults_of_outputs(cell: dict) -> list[str]:
    faults = []
    for output in cell.get("outputs", []):
        if output["output_type"] == "error":
            faults.append(f"ended with {output['ename']}: {output['evalue']}")
            continue
        for kind, text in text_of(output):
            if "Traceback (most recent call last)" in text:
                faults.append("shows a traceback")
            if found := WARNING.search(text):
                faults.append(f"shows a warning: {found[0][:100]}")
            elif kind == "stderr":
                faults.append(f"writes to stderr: {text.strip().partition(chr(10))[0][:100]}")
            if found := MACHINE.search(text):
                faults.append(f"shows a path of the machine it ran on: {found[0][:100]}")
    return faults


def unquoted(value: str) -> str:
    try:
        return str(yaml.safe_load(value) or "").strip()
    except yaml.YAMLError:
        return value.strip()


def without_alt(page: str) -> list[str]:
    """One fault when any <img> of the page has no alt."""
    tags = re.findall(r"<img\b[^>]*>", page)
    return ["has an <img> without alt"] * any(not re.search(r'\balt="[^"]*\S', t) for t in tags)


def faults_of_figures(cell: dict) -> list[str]:
    """Figures without words: `#| fig-alt` of outputs, alt of an <img>, text of a markdown image."""
    source, faults = "".join(cell["source"]), []
    if cell["cell_type"] == "code":
        alt = unquoted(directives(source).get("fig-alt", ""))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if any(kind.startswith("image/") for kind in data) and not alt:
                faults.append("has a figure without `#| fig-alt`")
            page = dict(text_of(output)).get("text/html", "") if data else ""
            faults += [] if alt else without_alt(page)
    if cell["cell_type"] == "markdown":
        source = re.sub(r"^(`{3,}|~{3,}).*?^\1[ \t]*$|`[^`\n]+`", "", source, flags=re.M | re.S)
        for caption, target, attributes in IMAGE.findall(source):
            labelled = "#fig-" in attributes
            if not re.search(r'alt="[^"]*\S', attributes) and (labelled or not caption.strip()):
                faults.append(
                    f"has the image {target} without {'fig-alt' if labelled else 'a text'}")
        faults += without_alt(source)
    return faults


def is_clean(root: Path, path: Path) -> bool:
    """Would nbdev_clean leave the file as it is?"""
    from execnb.nbio import nb2str
    from fastcore.xtras import loads
    from nbdev.clean import clean_nb

    cfg, text = settings(root), path.read_text(encoding="utf-8")
    notebook = loads(text)
    clean_nb(notebook, False, cfg["allowed_metadata_keys"].split(),
             cfg["allowed_cell_metadata_keys"].split(), cfg["clean_ids"] == "True")
    return nb2str(notebook) == text


def check_notebook(root: Path, path: Path) -> list[str]:
    name = path.relative_to(root).as_posix()
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    faults = []
    for i, cell in enumerate(cells, 1):
        code = [line.strip() for line in "".join(cell["source"]).splitlines() if line.strip()
                and not line.lstrip().startswith("#|")]
        where = f"{name} cell {i} ({code[0][:50] if code else 'empty'})"
        faults += [f"{where} {fault}"
                   for fault in dict.fromkeys(faults_of_outputs(cell) + faults_of_figures(cell))]
    if any(c["cell_type"] == "code" and "".join(c["source"]).strip()
           for c in cells) and not any(c.get("outputs") for c in cells):
        faults.append(f"{name} has code and no output at all: run it and save it")
    if not is_clean(root, path):
        faults.append(f"{name} is not clean: run nbdev_clean --fname {name}")
    return faults


# ---------------------------------------------------------------- the rules of the whole

def check_export(root: Path) -> list[str]:
    """feedback_nb/ beside what the notebooks export into an empty copy."""
    package = root / settings(root)["lib_path"]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / root.name
        fresh = copy / package.name
        fresh.mkdir(parents=True)
        shutil.copy(root / "settings.ini", copy)
        (copy / "nbs").mkdir()
        for path in notebooks(root):
            shutil.copy(path, copy / "nbs")
        if (package / "__init__.py").is_file():
            shutil.copy(package / "__init__.py", fresh)  # written by hand but for its version
        done = subprocess.run(
            [sys.executable, "-c",
             "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"],
            cwd=copy, capture_output=True, text=True,
            env={k: v for k, v in os.environ.items() if k != "IN_TEST"},
        )
        if done.returncode:
            return ["the notebooks cannot be exported: "
                    + (done.stderr.strip().splitlines() or ["no reason given"])[-1]]
        here, there = ({p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8")
                        for p in folder.rglob("*.py")} for folder in (package, fresh))
    faults = [f"{package.name}/{name} comes from no notebook"
              for name in sorted(here.keys() - there.keys())]
    faults += [f"{package.name}/{name} is missing: run nbdev_export"
               for name in sorted(there.keys() - here.keys())]
    return faults + [f"{package.name}/{name} is not what the notebooks export: run nbdev_export"
                     for name in sorted(here.keys() & there.keys()) if here[name] != there[name]]


def check_readme(root: Path) -> list[str]:
    from readme import readme

    index, path = root / "nbs" / "index.ipynb", root / "README.md"
    if not index.is_file():
        return ["nbs/index.ipynb is missing: README.md is made from it"]
    try:
        text = readme(index)
    except ValueError as error:
        return [str(error)]
    return [] if path.is_file() and path.read_text(
        encoding
        ="utf-8") == text else ["README.md is not what nbs/index.ipynb gives: run make readme"]


def check_sidebar(root: Path) -> list[str]:
    if not (root / "_quarto.yml").is_file():
        return ["_quarto.yml is missing"]

    def listed(contents: list) -> list[str]:
        return [name for entry in contents
                for name in ([entry] if isinstance(entry, str)
                             else listed(entry.get("contents", [])))]

    quarto = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    names = listed(quarto["website"]["sidebar"]["contents"])
    there = {p.name for p in notebooks(root)}
    lacks, gone = sorted(there - set(names)), [n for n in names if n not in there]
    faults = [f"_quarto.yml: the sidebar lacks {n}" for n in lacks]
    return faults + [f"_quarto.yml: the sidebar lists {n}, which is not in nbs/" for n in gone]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent,
                        help="the project (default: this one)")
    parser.add_argument("notebooks", nargs="*", type=Path,
                        help="only these notebooks, and only the rules of one notebook")
    args = parser.parse_args()
    root = args.root.resolve()
    paths = [p.resolve() for p in args.notebooks] or notebooks(root)
    faults = [fault for path in paths for fault in check_notebook(root, path)]
    if not args.notebooks:
        faults += check_export(root) + check_readme(root) + check_sidebar(root) + check_budget(root)
        faults += check_claims(root) + check_references(root)
        faults += check_cover(root) + check_words(root)
    print("\n".join(faults)
          if faults else f"{len(paths)} notebooks: exported, clean, described and run.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
