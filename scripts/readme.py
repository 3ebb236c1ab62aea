"""Writes README.md from nbs/index.ipynb (nbconvert's markdown, with links that work from the root).

    python scripts/readme.py [--check]
"""
from __future__ import annotations

import argparse
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = "<!-- Made from nbs/index.ipynb by `make readme`; edit the notebook. -->\n\n"


def from_root(match: re.Match) -> str:
    """A link as seen from nbs/, as it is seen from the root."""
    before, target, after = match.groups()
    if re.match(r"[a-z][a-z0-9+.-]*:|//|#", target):
        return match[0]
    return before + posixpath.normpath(posixpath.join("nbs", target)) + after


def plain_cells(notebook) -> None:
    """As nbdev does for the site: the first cell's settings, hidden cells and directives go."""
    shown = []
    for i, cell in enumerate(notebook.cells):
        source = cell.source
        lines = source.splitlines()
        if cell.cell_type == "raw":
            continue
        if cell.cell_type == "markdown":
            if i == 0:
                lines = [line for line in lines if not re.match(r"- [\w-]+:", line)]
            cell.source = "\n".join(lines).strip()
            # Quarto's attributes mean nothing on a plain page; its alt text does
            cell.source = re.sub(r"!\[[^\]]*\](\([^)]*\))\{[^}]*fig-alt=\"([^\"]*)\"[^}]*\}",
                                 r"![\2]\1", cell.source)
            cell.source = re.sub(r"(!\[[^\]]*\]\([^)]*\))\{[^}]*\}", r"\1", cell.source)
        if cell.cell_type == "code":
            flags = [line for line in lines if re.match(r"\s*#\s*\|", line)]
            names = {m[1]: m[2] for line in flags
                     if (m := re.match(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)", line))}
            if {"hide", "default_exp"} & names.keys() or names.get("include") == "false":
                continue
            cell.source = "\n".join(line for line in lines if line not in flags).strip()
            for output in cell.outputs:
                if "text/markdown" in output.get("data", {}):  # what moves on the site, as text
                    output.data.pop("text/html", None)
                if any(kind.startswith("image/") for kind in output.get("data", {})):
                    where = f"nbs/index.ipynb cell {i + 1} shows an image"
                    remedy = "README.md needs a file; use ![what it shows](images/name.png)"
                    raise ValueError(f"{where}: {remedy}")
            if names.get("echo") == "false":
                cell.source = ""
        shown.append(cell)
    notebook.cells = shown


def readme(index: Path) -> str:
    """The text of README.md for this index notebook."""
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(index, as_version=4)
    plain_cells(notebook)
    notebook.metadata.language_info = {
        "name": "python"}  # nbdev_clean drops it; the fences of the README name it
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r"^```python\n\s*```\n", "", text, flags=re.M)  # cells of which only outputs show
    parts = re.split(r"(^```.*?^```[ \t]*$)", text, flags=re.M | re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(\]\()([^)\s]+)([^)]*\))", from_root, parts[i])
        parts[i] = re.sub(r'((?:src|href)=")([^"]+)(")', from_root, parts[i])
    return FIRST + re.sub(r"\n{3,}", "\n\n",
                          "".join(line.rstrip() + "\n"
                                  for line in "".join(parts).strip().splitlines()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the project (default: this one)")
    parser.add_argument("--check", action="store_true",
                        help="change nothing; fail when README.md is not what the notebook gives")
    args = parser.parse_args()
    text, path = readme(args.root / "nbs" / "index.ipynb"), args.root / "README.md"
    if args.check:
        same = path.is_file() and path.read_text(encoding="utf-8") == text
        print("README.md is what nbs/index.ipynb gives."
              if same else "README.md is not what nbs/index.ipynb gives: run make readme")
        return not same
    path.write_text(text, encoding="utf-8")
    print("wrote README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
