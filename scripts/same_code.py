"""Is the exported package, comments and the modules' own texts aside, that of a commit?

    python scripts/same_code.py [COMMIT]     after an export with another nbdev
"""
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def code(text: str) -> str:
    """The module as a tree, without its first text: nbdev 3 adds an address to that."""
    tree = ast.parse(text)
    if ast.get_docstring(tree, clean=False) is not None:
        tree.body = tree.body[1:]
    return ast.dump(tree)


def main() -> int:
    commit, other = (sys.argv[1:] or ["HEAD"])[0], []
    for path in sorted((ROOT / "feedback_nb").glob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        then = subprocess.run(["git", "show", f"{commit}:{name}"], cwd=ROOT, capture_output=True,
                              text=True)
        if path.name != "_modidx.py" and (
                then.returncode or code(path.read_text(encoding="utf-8")) != code(then.stdout)):
            other.append(name)
    print("\n".join(f"{name} is other code than at {commit}" for name in other)
          or f"The package is the code of {commit}.")
    return bool(other)


if __name__ == "__main__":
    sys.exit(main())
