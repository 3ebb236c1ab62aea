"""The words: spelling (codespell, where it is installed) and how long the sentences are.

    python scripts/words.py        prints, notebook by notebook, the median and the longest sentence
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from project import notebooks

ROOT = Path(__file__).resolve().parent.parent
# names of people, of Python and of CSS, and a word of the field
KNOWN = "numer,notin,fro,trian,bu,mane,re-uses"


def prose(notebook: Path) -> str:
    """The text of a notebook without code, formulas, tables and addresses."""
    text = "\n\n".join("".join(c["source"]) for c in
                       json.loads(notebook.read_text(encoding="utf-8"))["cells"]
                       if c["cell_type"] == "markdown")
    text = re.sub(r"^(`{3,}).*?^\1|\$\$.*?\$\$|<[^>]+>", " ", text, flags=re.M | re.S)
    text = re.sub(r"^\s*(\||#|- \w+:).*$", "", text, flags=re.M)
    return re.sub(r"\]\([^)]*\)|`[^`]*`|\$[^$]*\$|https?://\S+", " x ", text)


def sentences(text: str) -> list[str]:
    """Sentences of three words and more."""
    parts = re.split(r"(?<=[.!?:])\s+(?=[A-Z*\"“(])|\n\s*\n|\n\s*[-*\d]+\.?\s", text)
    return [" ".join(p.split()) for p in parts if len(p.split()) > 2]


def check_words(root: Path) -> list[str]:
    """What codespell calls misspelt in the prose, the package and the scripts."""
    if not find_spec("codespell_lib"):
        return []
    with tempfile.TemporaryDirectory() as folder:
        for path in notebooks(root):
            (Path(folder) / f"{path.stem}.md").write_text(prose(path), encoding="utf-8")
        others = [root / name for name in ("scripts", "tests", "CONTRIBUTING.md", "CHANGELOG.md",
                                           "nbs/claims.yaml", "README.md")]
        done = subprocess.run([sys.executable, "-m", "codespell_lib", "-L", KNOWN, folder,
                               *[str(p) for p in others if p.exists()]],
                              cwd=root, capture_output=True, text=True)
        said = done.stdout.replace(folder, "nbs").replace(str(root) + "/", "")
    return [f"spelling: {line}" for line in said.splitlines() if "==>" in line]


def main() -> int:
    for path in notebooks(ROOT):
        words = sorted((len(s.split()), s) for s in sentences(prose(path)))
        if words:
            length = median(n for n, _ in words)
            print(f"{path.stem:<24} {len(words):>4} sentences, median {length:>4.0f} words, "
                  f"longest {words[-1][0]:>3}: {words[-1][1][:60]}…")
    faults = check_words(ROOT)
    print(*faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
