"""The reading budget: how wide, how long and how talkative code may be, and who may import whom.

    python scripts/budget.py [--root DIR] [--write]

Prints what there is; `make check` fails when a bound is broken that scripts/budget.yml does not
list as a known exception, when a known exception got worse, and when one is no longer needed.
--write lists what is broken today as the known exceptions.
"""
from __future__ import annotations

import argparse
import ast
import io
import json
import math
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import yaml
from project import notebooks, settings

COLUMNS, MESSAGE, LAMBDA, MODULE, RAISES = 100, 100, 50, 300, 25  # RAISES per 1,000 code lines
FEW = 5  # raises that any module may have: a rate says nothing of thirty lines
CELLS, WORDS = (40, 70), (700, 2500)
PLACEHOLDER = 8  # characters that a value in a message is counted with
RULES = {  # rule: what its number counts
    "columns": f"lines of more than {COLUMNS} columns (in cells: without directives)",
    "code": "code lines (without comments, docstrings and blank lines)",
    "raises": f"raises, at most {RAISES} per 1,000 code lines or {FEW} (a bare `raise` is none)",
    "messages": f"error messages of more than {MESSAGE} characters ({PLACEHOLDER} for a value)",
    "docstrings": 'docstrings that are not in """',
    "types": "types in quotes, or of `typing` where there are X | None, list and dict",
    "lambdas": f"lambdas of more than {LAMBDA} characters",
    "arrows": "imports that do not point down (DESIGN.md, who may import whom)",
    "circles": "modules in a circle of imports",
    "records": "recorded runs that are of other code, of no digest or of no commit",
}
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}
OLD = {"List", "Dict", "Tuple", "Set", "Type", "Optional", "Union"}


# ---------------------------------------------------------------- one file

def docstrings(tree: ast.AST) -> list[ast.Constant]:
    """The docstrings of a module, its classes and its functions."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    found = [line.value for line in first if isinstance(line, ast.Expr)]
    return [value for value in found if isinstance(value, ast.Constant)
            and isinstance(value.value, str)]


def code_lines(text: str, tree: ast.AST) -> int:
    """Lines that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SKIPPED:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in docstrings(tree):
        lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def length(node: ast.AST) -> int:
    """Characters of a message: its words, PLACEHOLDER for a value, the longer of two branches."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return len(node.value)
    if isinstance(node, ast.JoinedStr):
        return sum(map(length, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return length(node.left) + length(node.right)
    if isinstance(node, ast.IfExp):
        return max(length(node.body), length(node.orelse))
    return PLACEHOLDER


def old_types(tree: ast.AST) -> list[ast.AST]:
    """Parts of annotations in quotes or of `typing`; what stands in Literal[…] is a value."""
    found = []
    annotations = [getattr(node, field, None) for node in ast.walk(tree)
                   for field in ("annotation", "returns")]
    while annotations:
        part = annotations.pop()
        quoted = isinstance(part, ast.Constant) and isinstance(part.value, str)
        if quoted or getattr(part, "id", getattr(part, "attr", "")) in OLD:
            found.append(part)
        literal = isinstance(part, ast.Subscript) and getattr(part.value, "id", "") == "Literal"
        if part is not None and not literal:
            annotations += ast.iter_child_nodes(part)
    return found


def measure(text: str) -> dict[str, int]:
    """The numbers of one file, and `lines` for the report."""
    tree, lines = ast.parse(text), text.splitlines()
    nodes = list(ast.walk(tree))
    raised = [node.exc for node in nodes if isinstance(node, ast.Raise) and node.exc is not None]
    messages = [max(map(length, getattr(exc, "args", [])), default=0) for exc in raised]
    docs = [ast.get_source_segment(text, node) for node in docstrings(tree)]
    lambdas = [ast.get_source_segment(text, node) for node in nodes if isinstance(node, ast.Lambda)]
    return {
        "lines": len(lines),
        "columns": sum(len(line) > COLUMNS for line in lines),
        "code": code_lines(text, tree),
        "raises": len(raised),
        "messages": sum(n > MESSAGE for n in messages),
        "docstrings": sum(not doc.startswith('"""') for doc in docs),
        "types": len(old_types(tree)),
        "lambdas": sum(len(source) > LAMBDA for source in lambdas),
    }


def measure_notebook(path: Path) -> dict[str, int]:
    """Wide lines in cells and in the summary (a line of the package too), cells, words of prose."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = lambda kind: [line for cell in cells if cell["cell_type"] == kind
                          for line in "".join(cell["source"]).splitlines()]
    code, prose = lines("code"), lines("markdown")
    summary = [line[2:] + 6 * '"' for line in prose[:5] if line.startswith("> ")]
    wide = [line for line in code + summary if len(line) > COLUMNS]
    return {"columns": sum(not line.lstrip().startswith("#|") for line in wide),
            "cells": len(cells), "words": sum(len(line.split()) for line in prose)}


# ---------------------------------------------------------------- who imports whom

def imports(text: str, package: str, modules: set[str]) -> set[str]:
    """The `modules` that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix(package + ".") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            inside = name if node.level else name.removeprefix(package).removeprefix(".")
            found |= {inside} if inside else {alias.name for alias in node.names}
    return found & modules


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The names in a circle, empty when there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][1:]
    return []


def arrows(graph: dict[str, set[str]], layers: list[str], sideways: list[str]) -> list[str]:
    """Imports that run up or sideways, as "a -> b"; a module of no layer may import none."""
    level = {name: i for i, names in enumerate(layers) for name in names.split()}
    down = lambda a, b: a in level and level[a] < level.get(b, 0)
    found = [f"{a} -> {b}" for a in sorted(graph) for b in sorted(graph[a]) if not down(a, b)]
    return [arrow for arrow in found if arrow not in sideways]


# ---------------------------------------------------------------- the whole

def table(root: Path) -> dict:
    """What scripts/budget.yml says; empty where there is none."""
    path = root / "scripts" / "budget.yml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def sources(root: Path, folder: str) -> dict[str, str]:
    """The text of each module in a folder, but for what nbdev writes as an index."""
    return {path.stem: path.read_text(encoding="utf-8")
            for path in sorted((root / folder).glob("*.py")) if path.stem != "_modidx"}


def numbers(root: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """(rule, where) -> (what there is, bound)."""
    known, package, found = table(root), settings(root)["lib_path"], {}
    code = raises = 0
    for path in notebooks(root):
        found["columns", f"nbs/{path.name}"] = measure_notebook(path)["columns"], 0
    for folder in (package, "scripts", "tests", "benchmarks"):
        files = sources(root, folder)
        bounds = dict(columns=0, docstrings=0)
        if folder == package:  # its columns are those of the cells
            bounds = dict(code=MODULE, messages=0, docstrings=0, types=0, lambdas=0)
        if folder == "tests":
            bounds = dict(columns=0)
        for name, text in files.items():
            there, where = measure(text), f"{folder}/{name}.py"
            found |= {(rule, where): (there[rule], bound) for rule, bound in bounds.items()}
            if folder == package:
                bound = max(FEW, math.ceil(RAISES * there["code"] / 1000))
                found["raises", where] = there["raises"], bound
                code, raises = code + there["code"], raises + there["raises"]
        if folder == package:
            found["raises", package] = raises, max(FEW, math.ceil(RAISES * code / 1000))
        modules = files.keys() - {"__init__"}
        graph = {name: imports(files[name], package, modules - {name}) for name in sorted(modules)}
        found["circles", folder] = len(circle(graph)), 0
        if folder == package and "layers" in known:
            wrong = arrows(graph, known["layers"], known.get("sideways", []))
            found |= {("arrows", arrow): (1, 0) for arrow in wrong}
    if (root / "results").is_dir():
        from record import stale

        found |= {("records", where): (number, 0) for where, number in stale(root).items()}
    return found


def check_budget(root: Path) -> list[str]:
    """What breaks a bound and its known exception, and the exceptions that are not needed."""
    known, found, faults = table(root).get("exceptions", {}), numbers(root), []
    for (rule, where), (number, bound) in found.items():
        allowed = max(bound, known.get(rule, {}).get(where, 0))
        if number > allowed:
            faults.append(f"{where}: {number} {RULES[rule]}; {allowed} allowed")
    for rule, where in [(rule, where) for rule, listed in known.items() for where in listed]:
        number, bound = found.get((rule, where), (0, 0))
        if number <= bound:
            faults.append(f"scripts/budget.yml: {where} needs no exception from {rule} any more")
    return faults


def write(root: Path) -> None:
    """Make what is broken today the known exceptions."""
    path = root / "scripts" / "budget.yml"
    head = path.read_text(encoding="utf-8").partition("exceptions:")[0]
    found, lines = numbers(root), []
    for rule, words in RULES.items():
        broken = {where: n for (r, where), (n, bound) in found.items() if r == rule and n > bound}
        lines += [f"  {rule}:  # {words}"] if broken else []
        lines += [f"    {where}: {number}" for where, number in sorted(broken.items())]
    text = head + "\n".join(["exceptions:", *lines] if lines else ["exceptions: {}"]) + "\n"
    path.write_text(text, encoding="utf-8")


def report(root: Path) -> None:
    """Each module and each notebook with its numbers; a star marks a notebook of unusual size."""
    names, rows = ("lines", "code", "raises", "messages"), {}
    for name, text in sources(root, settings(root)["lib_path"]).items():
        rows[name] = measure(text)
    rows["in all"] = {name: sum(row[name] for row in rows.values()) for name in names}
    titles = ("lines", "code lines", "raises", "long messages", "raises per 1,000")
    print(f"{'module':<22}" + "".join(f"{title:>17}" for title in titles))
    for module, row in rows.items():
        rate = 1000 * row["raises"] / max(1, row["code"])
        print(f"{module:<22}" + "".join(f"{row[name]:>17,}" for name in names) + f"{rate:>17.0f}")
    print(f"\n{'notebook':<30}{'cells':>7}{'words':>7}{'wide lines':>12}")
    for path in notebooks(root):
        there = measure_notebook(path)
        cells, words, wide = (there[name] for name in ("cells", "words", "columns"))
        usual = CELLS[0] <= cells <= CELLS[1] and WORDS[0] <= words <= WORDS[1]
        print(f"{path.stem:<30}{cells:>7}{words:>7}{wide:>12}{'' if usual else '  *'}")
    print(f"* usual are {CELLS[0]} to {CELLS[1]} cells and {WORDS[0]} to {WORDS[1]:,} words")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--root", type=Path, default=here, help="the project (default: this one)")
    parser.add_argument("--write", action="store_true", help="list today's faults as exceptions")
    args = parser.parse_args()
    (write if args.write else report)(args.root)
