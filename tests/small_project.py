"""A project of three tiny notebooks with everything a chapter may hold, for the tests of the
tools around the book."""
import base64
import io
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"


def pixel() -> str:
    "The smallest PNG, as a notebook stores it."
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), "teal").save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def shown(source: str, *outputs) -> nbformat.NotebookNode:
    return new_code_cell(source, outputs=list(outputs))


def text(value: str):
    return new_output("execute_result", {"text/plain": value}, execution_count=None)


INDEX = [
    new_markdown_cell("# mini\n> A small book."),
    new_markdown_cell(
        "![a teal square](images/square.png)\n\nSee [the first "
        "chapter](00_first.ipynb#a-formula), [the second](10_second.ipynb) and the "
        "[licence](../LICENSE)."),
    shown("#| hide\nsecret = 1"),
    shown("1 + 1", text("2")),
]
FIRST = [
    new_markdown_cell("# First <things>\n> What comes first & why.\n- order: 1"),
    new_markdown_cell(
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/x)"),
    shown("#| hide\nhidden_name = 1"),
    shown("#| default_exp shapes"),
    shown(
        "#| export\nfrom __future__ import annotations\n\nfrom typing import "
        "TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from decimal import Decimal"),
    shown("import matplotlib.pyplot as plt\nimport pandas as pd\nfrom IPython.display import HTML"),
    new_markdown_cell(
        "## A formula\n\nWith $a_t^2 \\le \\frac{1}{2}$ and the code `$HOME @fig-none`:\n\n$$ "
        "h_{t+1} = \\Phi(h_t, x) $$ {#eq-step}\n\nas @eq-step says, costs \\$5 and 10$ more. See "
        "@fig-line and @fig-move, "
                      "[the second chapter](10_second.ipynb), [a part of it](10_second.ipynb#here), and [what is exported](https://feedback-nb.github.io/feedback_nb/second.html#here).\n\n| symbol | name |\n|---|---|\n| $h$ | `h` |"),
    shown(
        "#| export\ndef area(\n    width: float,  # side in metres\n    cost: Decimal | None = "
        "None,  # price per square metre\n) -> Later:  # area in square metres\n    \"\"\"The "
        "area of a square.\"\"\"\n    return Later(width * width)"),
    shown(
        "#| export\nclass Later(float):\n    \"\"\"A number that is defined after it is "
        "used.\"\"\""),
    shown("assert area(2) == 4\narea(3)", text("9.0")),
    shown(
        "#| label: fig-line\n#| fig-cap: \"A line: $y = x$.\"\n#| fig-alt: \"A straight line & "
        "nothing else.\"\nimport math\nfig, ax = plt.subplots(figsize=(2, 1))\nax.plot([0, "
        "math.pi])\nplt.show()",
          new_output("display_data", {"image/png": pixel(), "text/plain": "<Figure>"})),
    shown(
        "#| label: fig-move\n#| fig-cap: \"Two figures that move.\"\n#| fig-alt: \"A line.\"\n#| "
        "echo: false\nfrom feedback_nb.plots import sliders\nsliders(lambda slope, ax: "
        "ax.plot([0, slope]), slope=[1, 2, 3], alt=\"A line.\")",
          new_output("execute_result", {"text/html": "<img alt='A line.' src='data:,'>",
                                        "text/plain": "<HTML>"}, execution_count=None)),
    shown(
        "from feedback_nb.plots import animate\nfig, ax = plt.subplots(figsize=(2, 1))\nanimate(fig, lambda t: ax.plot([0, t + 1]), 3, interval=20, alt=\"Growing.\")", text("<HTML>")),
    shown("#| tbl-cap: \"One seed & no more.\"\npd.DataFrame({\"p_holm\": [float(\"nan\")], "
          "\"accuracy\": [0.5]})",
          new_output("execute_result",
                     {"text/html": "<table class='dataframe'><tr><td>0.5</td></tr></table>",
                      "text/plain": "0.5"}, execution_count=None)),
    shown("#| gpu\nprint(1 / 0)", new_output("stream", name="stdout",
                                             text="recorded on a large machine\n")),
    new_markdown_cell("<details><summary>Answer</summary>\n\nIt is **four**.\n\n</details>"),
]
SECOND = [
    new_markdown_cell("# Second\n> What comes second."),
    shown("from mini.shapes import area"),
    new_markdown_cell("## Here\n\nBack to [the first](00_first.ipynb)."),
    shown("print(f\"area {area(2):.0f}\")", new_output("stream", name="stdout", text="area 4\n")),
]


def write(path: Path, cells: list) -> None:
    "The notebook, clean."
    from execnb.nbio import nb2str
    from fastcore.xtras import loads
    from nbdev.clean import clean_nb

    notebook = new_notebook(metadata={"kernelspec": {"name": "python3", "language": "python",
        "display_name": "python3"}})
    notebook.cells = [nbformat.from_dict({**cell, "id": f"cell{i}"})
                      for i, cell in enumerate(cells)]
    plain = loads(nbformat.writes(notebook))
    clean_nb(plain)
    path.write_text(nb2str(plain), encoding="utf-8")


def make(root: Path) -> Path:
    "The project in `root`: notebooks, exported package, README, sidebar."
    (root / "nbs" / "images").mkdir(parents=True)
    (root / "mini").mkdir()
    text = (ROOT / "settings.ini").read_text(encoding="utf-8").replace("lib_path = feedback_nb",
        "lib_path = mini").replace("lib_name = feedback_nb", "lib_name = mini")
    (root / "settings.ini").write_text(text, encoding="utf-8")
    (root / "LICENSE").write_text("free", encoding="utf-8")
    (root / "nbs" / "images" / "square.png").write_bytes(base64.b64decode(pixel()))
    for name, cells in {"index": INDEX, "00_first": FIRST, "10_second": SECOND}.items():
        write(root / "nbs" / f"{name}.ipynb", cells)
    (root / "_quarto.yml").write_text(
        "website:\n  sidebar:\n    contents:\n      - index.ipynb\n      - section: All\n        "
        "contents: [00_first.ipynb, 10_second.ipynb]\n", encoding="utf-8")
    subprocess.run([sys.executable, "-c",
                    "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"],
                    cwd=root, check=True, capture_output=True)
    subprocess.run([sys.executable, SCRIPTS / "readme.py", "--root", root], check=True,
                   capture_output=True)
    return root


def copy_of(project: Path, to: Path) -> Path:
    shutil.copytree(project, to)
    return to
