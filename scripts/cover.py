"""Takes the figure that the README shows out of chapter 10, as that chapter's code drew it.

    python scripts/cover.py
"""
from __future__ import annotations

import base64
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {"10_cbl.ipynb": {"fig-forget": "forget.png"}}


def figure(notebook: Path, label: str) -> bytes:
    """The PNG that the cell with this label has stored."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if f"#| label: {label}" in "".join(cell["source"]):
            for output in cell.get("outputs", []):
                if png := output.get("data", {}).get("image/png"):
                    return base64.b64decode("".join(png))
    raise SystemExit(f"{notebook.name} has no figure {label!r} with a stored PNG; execute it first")


if __name__ == "__main__":
    for notebook, figures in FIGURES.items():
        for label, name in figures.items():
            (ROOT / "nbs" / "images" / name).write_bytes(figure(ROOT / "nbs" / notebook, label))
            print("wrote nbs/images/" + name)
