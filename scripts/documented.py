"""nbdev's processing of a notebook for reading: the site and the offline book share it."""
from __future__ import annotations

import ast
import re

from execnb.nbio import mk_cell
from nbdev.processors import FilterDefaults, exec_show_docs


class Documented(exec_show_docs):
    """Runs what is exported, and of other cells the imports alone, before anything is documented.

    nbdev runs them as it goes, and whole: a figure's cell would be drawn for its import, and a type
    that is defined further down, or imported under TYPE_CHECKING, could not be looked up.
    """

    def begin(self):
        super().begin()
        if self.nb.has_docs_:
            for cell in self.nb.cells:
                if cell.cell_type == "code" and (code := needed(cell)):
                    self.k.run(code)
                    if self.k.exc:
                        raise RuntimeError(f"{self.k.exc!r} in the cell\n{code}") from self.k.exc

    def __call__(self, cell):
        if cell.cell_type == "code" and cell.source and "show_doc(" in cell.source:
            super().__call__(cell)


def needed(cell) -> str:
    """The part of a cell that documentation needs: all of it when exported, else its imports."""
    if cell.directives_.get("eval:",
                            [""])[0].lower() == "false" or "show_doc(" in (cell.source or ""):
        return ""
    trees = cell.parsed_() or []
    exported = any(re.match(r"export|exec_doc", name) for name in cell.directives_)
    types = [line for tree in trees if isinstance(tree, ast.If)
             and "TYPE_CHECKING" in ast.unparse(tree.test) for line in tree.body]
    if exported:
        return cell.source + "\n" + "\n".join(map(ast.unparse, types))
    return "\n".join(ast.unparse(tree) for tree in trees
                     if isinstance(tree, (ast.Import, ast.ImportFrom)))


class ShowSource(FilterDefaults):
    """nbdev's processing, but exported code is shown: in this book the code is the point."""

    def __call__(self, nb):
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.source = show_source(cell.source)
        nb.cells.append(mk_cell("<!-- the end -->",
                                "markdown"))  # nbdev looks one cell beyond each exported one
        return super().__call__(nb)

    def base_procs(self):
        return [Documented if proc is exec_show_docs else proc for proc in super().base_procs()
                if proc.__name__ != "add_fold"]


def show_source(source: str) -> str:
    """A cell flagged `export` is flagged `exports`: nbdev then prints its code below its table."""
    return re.sub(r"^(\s*#\s*\|\s*)export(?=\s|$)", r"\1exports", source, flags=re.M)
