"""The published site: nbdev processes the notebooks into _proc/, Quarto renders them into _docs/.

    python scripts/docs.py [--only-process]
"""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nbdev.serve
from documented import ShowSource
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    quarto = shutil.which("quarto")
    if not quarto and "--only-process" not in sys.argv:
        print("make docs needs Quarto, which is not on the PATH: install it from "
              "https://quarto.org/docs/get-started/ and run make docs again "
              "(make book needs nothing more).")
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
