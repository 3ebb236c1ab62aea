"""Every public name of the package with the page that explains it and its first sentence."""
from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from project import notebooks, settings


def pages_of(root: Path) -> dict[str, tuple[str, str]]:
    """module -> (page of the site, title of its chapter), in the order of the chapters."""
    found = {}
    for path in notebooks(root):
        sources = ["".join(c["source"]) for c in
                   json.loads(path.read_text(encoding="utf-8"))["cells"]]
        module = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(sources), flags=re.M)
        title = re.search(r"^#\s+(.+)$", sources[0], flags=re.M)
        if module:
            number = re.match(r"\d+", path.stem)
            stem = re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem)
            found[module[1]] = (f"{stem}.html", " ".join(
                filter(None, [number and number[0], title[1] if title else stem])))
    return found


def public(module: Path) -> list[tuple[str, str, str]]:
    """(name, first sentence, anchor or nothing) of what a module defines for others."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    listed, found = [], []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Name) and target.id == "__all__":
                listed = ast.literal_eval(node.value)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            line = (ast.get_docstring(node) or "").strip().partition("\n")[0]
            found.append((node.name, line, node.name.lower()))
        found += [(t.id, "A constant.", "") for t in targets if isinstance(t, ast.Name)]
    return [row for row in found if row[0] in listed]


def every_name(root: Path) -> list[tuple[str, str, str, list[tuple[str, str, str]]]]:
    """(module, page, title of the chapter, names) of every exported module."""
    package = root / settings(root)["lib_path"]
    return [(module, page, title, rows)
            for module, (page, title) in pages_of(root).items()
            if (package / f"{module}.py").is_file() and (rows := public(package / f"{module}.py"))]


def listing(root: Path) -> str:
    """The page as markdown that pandoc and Quarto read alike."""
    cfg = settings(root)
    parts = []
    for module, page, title, rows in every_name(root):
        parts.append(f"## `{cfg['lib_name']}.{module}`\n\n[{title}]({page})\n\n"
                     "| name | what it is |\n|---|---|")
        for name, line, anchor in rows:
            line = re.sub(r"(`[^`]*`)|([|$<>*_\[\]\\])",
                          lambda m: (m[1] or "\\" + m[2]).replace("\x00", ""), line)
            parts.append(f"| [`{name}`]({page}{'#' * bool(anchor)}{anchor}) | {line} |")
        parts.append("")
    return "\n".join(parts)
