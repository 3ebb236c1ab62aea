"""The published site: nbdev processes the notebooks into _proc/, Quarto renders them into _docs/.

    python scripts/docs.py [--only-process]
"""
from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbdev.serve
from nbdev.config import get_config
from nbdev.processors import FilterDefaults, exec_show_docs
from nbdev.quarto import refresh_quarto_yml

ROOT = Path(__file__).resolve().parent.parent


class OnlyImports(exec_show_docs):
    "Runs what is exported, and of other cells the imports alone: a figure's cell is not drawn again for its import."

    def __call__(self, cell):
        exported = any(re.match(r"export|exec_doc", name) for name in cell.directives_)
        trees = (cell.parsed_() or []) if cell.cell_type == "code" and not exported and "show_doc" not in cell.source else []
        imports = [tree for tree in trees if isinstance(tree, (ast.Import, ast.ImportFrom))]
        if not trees or len(imports) == len(trees):
            return super().__call__(cell)
        if self.nb.has_docs_ and imports:
            self.k.run_cell("\n".join(map(ast.unparse, imports)))
        return None


class ShowSource(FilterDefaults):
    "nbdev's processing, but exported code is shown: in this book the code is the point."

    def __call__(self, nb):
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.source = show_source(cell.source)
        return super().__call__(nb)

    def base_procs(self):
        return [OnlyImports if proc is exec_show_docs else proc for proc in super().base_procs() if proc.__name__ != "add_fold"]


def show_source(source: str) -> str:
    "A cell flagged `export` is flagged `exports`: nbdev then prints its code below the documentation table."
    return re.sub(r"^(\s*#\s*\|\s*)export(?=\s|$)", r"\1exports", source, flags=re.M)


def main() -> int:
    quarto = shutil.which("quarto")
    if not quarto and "--only-process" not in sys.argv:
        print("make docs needs Quarto, which is not on the PATH: install it from https://quarto.org/docs/get-started/ and run make docs again (make book needs nothing more).")
        return 1
    refresh_quarto_yml()
    nbdev.serve.FilterDefaults = ShowSource
    processed = nbdev.serve.proc_nbs(n_workers=2, force=True)
    if "--only-process" in sys.argv:
        return 0
    done = subprocess.run([quarto, "render", "--no-cache"], cwd=processed)
    if done.returncode:
        return done.returncode
    made, docs = processed / get_config().doc_path.name, ROOT / get_config().doc_path.name
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(made, docs)
    print(f"The site is in {docs.relative_to(ROOT)}/index.html.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
