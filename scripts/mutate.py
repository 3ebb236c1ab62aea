"""Single mutants of a module of the package, and which of them its tests do not notice.

    python scripts/mutate.py feedback --n 60 --seconds 400 tests/test_feedback.py

Flips comparisons, arithmetic, constants and branches, one at a time, and runs the tests on each in
a process of its own until one fails. Nothing is written; survivors are printed, one line each.
Survivors that were found, and what each of them is: tests/mutants.md.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import random
import resource
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLIPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
         ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
         ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
         ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}


def mutate(node: ast.AST) -> bool:
    """Change a node in place; False where there is nothing to change."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in FLIPS:
        node.ops[0] = FLIPS[type(node.ops[0])]()
    elif isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in FLIPS:
        node.op = FLIPS[type(node.op)]()
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert)):
        node.operand = ast.UnaryOp(type(node.op)(), node.operand)
    elif isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd()
    else:
        return False
    return True


def places(tree: ast.AST) -> list[int]:
    """Numbers, by ast.walk, of the nodes that can be changed: no types, no messages."""
    skipped = set()
    for node in ast.walk(tree):
        quiet = [getattr(node, name, None) for name in ("annotation", "returns")]
        quiet += [node] if isinstance(node, (ast.Raise, ast.JoinedStr)) else []
        skipped.update(id(part) for root in quiet if root for part in ast.walk(root))
    return [i for i, node in enumerate(ast.walk(tree))
            if id(node) not in skipped and mutate(copy.deepcopy(node))]


class Mutant(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Gives a changed tree where a module is imported."""

    def __init__(self, name: str, tree: ast.AST, path: Path):
        self.name, self.tree, self.path = name, tree, path

    def find_spec(self, name, path=None, target=None):
        found = name == self.name
        return importlib.util.spec_from_loader(name, self, origin=str(self.path)) if found else None

    def get_source(self, name):
        return self.path.read_text(encoding="utf-8")

    def get_code(self, name):
        return compile(self.tree, str(self.path), "exec")


def survives(finder: Mutant, arguments: list[str], limit: int) -> str:
    """Run the tests on a mutant in a process of its own: survived, killed or slow."""
    pid = os.fork()
    if not pid:
        for said in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), said)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        sys.meta_path.insert(0, finder)
        import pytest

        options = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-W", "ignore"]
        os._exit(int(pytest.main([*options, *arguments])))
    status = os.waitpid(pid, 0)[1]
    return "slow" if os.WIFSIGNALED(status) else "killed" if os.WEXITSTATUS(status) else "survived"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", help="its name, as feedback")
    parser.add_argument("tests", nargs="+", help="files with the tests")
    parser.add_argument("-k", default="", help="which of them, as for pytest")
    parser.add_argument("--n", type=int, default=60, help="mutants, drawn without replacement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=500, help="CPU time in all")
    parser.add_argument("--limit", type=int, default=90, help="CPU time of one mutant")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    importlib.import_module("torch")  # once, before the processes part
    path = ROOT / "feedback_nb" / f"{args.module}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    chosen = sorted(random.Random(args.seed).sample(there := places(tree), min(args.n, len(there))))
    found = []
    for i in chosen:
        if sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) > args.seconds:
            break
        node = list(ast.walk(mutant := copy.deepcopy(tree)))[i]
        before = ast.unparse(node).splitlines()[0]
        mutate(node)
        finder = Mutant(f"feedback_nb.{args.module}", ast.fix_missing_locations(mutant), path)
        found.append(survives(finder, [*args.tests, "-k", args.k], args.limit))
        if found[-1] != "killed":
            after = ast.unparse(node).splitlines()[0]
            print(f"{found[-1]}: line {node.lineno}: {before} -> {after}", flush=True)
    told = ", ".join(f"{found.count(kind)} {kind}" for kind in ("killed", "slow", "survived"))
    print(f"{args.module}: {len(found)} of {len(chosen)} mutants run, {told}")

