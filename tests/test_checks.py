"""Each rule of scripts/check_notebooks.py finds its fault, and names the notebook and the cell."""
import json
import subprocess
import sys

import pytest
import small_project
from small_project import ROOT, SCRIPTS, copy_of

sys.path.insert(0, str(SCRIPTS))

import budget
import check_notebooks as check
from readme import readme


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return small_project.make(tmp_path_factory.mktemp("sound") / "mini")


@pytest.fixture
def project(sound, tmp_path):
    return copy_of(sound, tmp_path / "mini")


def faults(root, export=False):
    """What is wrong, as the script prints it; comparing the export takes seconds."""
    found = [fault for path in check.notebooks(root) for fault in check.check_notebook(root, path)]
    return "\n".join(found + (check.check_export(root) if export else []) +
                     check.check_sidebar(root))


def script(root):
    return subprocess.run([sys.executable, SCRIPTS / "check_notebooks.py", "--root", root],
                          capture_output=True, text=True)


def change(root, name, edit):
    "Edit a notebook's JSON and leave it clean."
    path = root / "nbs" / f"{name}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    edit(notebook["cells"])
    path.write_text(
        json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_a_sound_project_passes_and_a_fault_fails(project):
    done = script(project)
    assert (done.returncode,
            done.stdout) == (0, "3 notebooks: exported, clean, described and run.\n"), done.stderr
    (project / "README.md").write_text("# mini\n", encoding="utf-8")
    change(project, "10_second", lambda cells: cells[3].update(execution_count=7))
    done = script(project)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "nbs/10_second.ipynb is not clean: run nbdev_clean --fname nbs/10_second.ipynb",
        "README.md is not what nbs/index.ipynb gives: run make readme"
    ]


def stream(text, name="stdout"):
    return {"name": name, "output_type": "stream", "text": text.splitlines(True)}


@pytest.mark.parametrize("output, said", [
    ({
        "output_type": "error", "ename": "ValueError", "evalue": "no",
        "traceback": ["Traceback (most recent call last)", "ValueError: no"]
    }, "ended with ValueError: no"),
    (stream("Traceback (most recent call last):\n  File x\n"), "shows a traceback"),
    (stream("a.py:3: UserWarning: mind this\n  warn()\n",
            "stderr"), "shows a warning: a.py:3: UserWarning: mind this"),
    (stream("DeprecationWarning: old\n"), "shows a warning"),
    (stream("50%|###  | 1/2\n", "stderr"), "writes to stderr"),
    (stream("saved to /home/ada/run/best.pt\n"),
     "shows a path of the machine it ran on: /home/ada/run/best.pt"),
    (stream("C:\\Users\\ada\\x\n"), "shows a path of the machine"),
    ({"output_type": "display_data", "metadata": {}, "data": {"text/html": ["<b>/tmp/x1/y</b>"]}
      }, "shows a path of the machine it ran on: /tmp/x1/y"),
    ({"output_type": "display_data", "metadata": {}, "data": {"image/png": "AAAA"}
      }, "has a figure without `#| fig-alt`"),
    ({"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": ["<svg></svg>"]}
      }, "has a figure without `#| fig-alt`"),
    ({"output_type": "display_data", "metadata": {}, "data": {"text/html": ["<img src='data:,'>"]}
      }, "has an <img> without alt"),
])
def test_outputs(project, output, said):
    change(project, "10_second", lambda cells: cells[3]["outputs"].append(output))
    assert f"nbs/10_second.ipynb cell 4 (print(f\"area {{area(2):.0f}}\")) {said}" in faults(
        project)


@pytest.mark.parametrize("harmless", [
    "https://example.org/home/ada/x", "ratio a/tmp/b", "no warning here",
    "data:image/png;base64," + "/tmp/" * 50
])
def test_what_only_looks_like_a_fault(project, harmless):
    change(project, "10_second", lambda cells: cells[3]["outputs"].append(stream(harmless)))
    assert faults(project) == ""


@pytest.mark.parametrize("markdown, said", [
    ("![](images/square.png)", "has the image images/square.png without a text"),
    ("![A caption.](images/square.png){#fig-x}", "has the image images/square.png without fig-alt"),
    ('<img src="images/square.png">', "has an <img> without alt"),
])
def test_images_in_the_text(project, markdown, said):
    change(project, "10_second", lambda cells: cells[2]["source"].append("\n\n" + markdown))
    assert said in faults(project)
    change(project, "10_second", lambda cells: cells[2]["source"].append("\n\n`" + "x`"))
    good = (
        '![A caption.](images/square.png){#fig-x fig-alt="A square."} '
        '![a square](images/square.png) `![](no)` <img alt="a square" src="images/square.png">'
    )
    change(project, "10_second", lambda cells: cells[2].update(source=[good]))
    assert faults(project) == ""


def test_an_empty_fig_alt_is_none(project):
    def empty(cells):
        cell = next(c for c in cells
                    if "fig-line" in "".join(c["source"]) and c["cell_type"] == "code")
        cell["source"] = [
            line if "fig-alt" not in line else '#| fig-alt: ""\n' for line in cell["source"]
        ]

    change(project, "00_first", empty)
    assert "has a figure without `#| fig-alt`" in faults(project)


def test_code_without_any_output(project):
    change(project, "10_second",
           lambda cells: [c.update(outputs=[]) for c in cells if c["cell_type"] == "code"])
    assert "nbs/10_second.ipynb has code and no output at all" in faults(project)


def test_a_notebook_that_is_not_clean(project):
    change(project, "10_second", lambda cells: cells[3].update(execution_count=7))
    assert "nbs/10_second.ipynb is not clean: run nbdev_clean" in faults(project)


def test_an_exported_cell_was_changed(project):
    change(
        project, "00_first", lambda cells:
        [c["source"].append("  # changed") for c in cells if "def area" in "".join(c["source"])])
    assert "mini/shapes.py is not what the notebooks export" in faults(project, export=True)


def test_the_package_was_changed_by_hand(project):
    path = project / "mini" / "shapes.py"
    path.write_text(
        path.read_text(encoding="utf-8").replace("width * width", "width ** 2"), encoding="utf-8")
    assert "mini/shapes.py is not what the notebooks export" in faults(project, export=True)


def test_modules_without_a_notebook_and_notebooks_without_a_module(project):
    (project / "mini" / "shapes.py").rename(project / "mini" / "forms.py")
    said = faults(project, export=True)
    assert "mini/forms.py comes from no notebook" in said and "mini/shapes.py is missing" in said


def test_the_version_is_part_of_the_export(project):
    path = project / "settings.ini"
    path.write_text(
        path.read_text(encoding="utf-8").replace("\nversion = ", "\nversion = 9."),
        encoding="utf-8")
    assert "mini/__init__.py is not what the notebooks export" in faults(project, export=True)


def test_a_chapter_that_is_not_in_the_sidebar(project):
    (project / "_quarto.yml").write_text(
        "website:\n  sidebar:\n    contents: [index.ipynb, 00_first.ipynb, 99_gone.ipynb]\n",
        encoding="utf-8")
    said = faults(project)
    assert "the sidebar lacks 10_second.ipynb" in said
    assert "99_gone.ipynb, which is not in nbs/" in said


def test_readme_links_work_from_the_root(project):
    text = readme(project / "nbs" / "index.ipynb")
    assert "![a teal square](nbs/images/square.png)" in text
    assert "(nbs/00_first.ipynb#a-formula)" in text and "[licence](LICENSE)" in text
    assert "secret" not in text and "# mini" in text and "> A small book." in text
    assert "```python\n1 + 1\n```" in text


def test_readme_refuses_a_figure_that_is_no_file(project):
    image = {
        "output_type": "display_data", "metadata": {}, "data": {"image/png": small_project.pixel()}
    }
    change(project, "index", lambda cells: cells[3]["outputs"].append(image))
    with pytest.raises(ValueError,
                       match=r"index.ipynb cell 4 shows an image: README.md needs a file"):
        readme(project / "nbs" / "index.ipynb")


@pytest.mark.parametrize("path", check.notebooks(ROOT), ids=lambda path: path.stem)
def test_this_book_keeps_the_rules(path):
    assert check.check_notebook(ROOT, path) == []


def test_this_book_is_exported():
    assert check.check_export(ROOT) == []


# ---------------------------------------------------------------- the reading budget

def module_of(project, text):
    """Make `text` a module of the small project; what the budget says about it."""
    (project / "mini" / "extra.py").write_text(text, encoding="utf-8")
    return "\n".join(budget.check_budget(project))


LONG = "x" * 101


@pytest.mark.parametrize("text, said", [
    ("x = 1\n" * 301, "301 code lines"),
    ("raise ValueError('a')\n" * 6, "6 raises, at most 25 per 1,000"),
    ("raise ValueError('a')\n" * 6 + "x = 1\n" * 194, "6 raises, at most 25 per 1,000"),
    (f"raise ValueError('{LONG}')", "1 error messages of more than 100"),
    (f"raise ValueError(f'{LONG[:50]}' f'{{x}}' + '{LONG[:43]}')", "1 error messages of more"),
    (f"raise ValueError('{LONG[:20]}' + ('{LONG}' if x else ''))", "1 error messages of more"),
    ("def f():\n    'What it does.'", "1 docstrings that are not"),
    ("x: 'int'", "1 types in quotes"),
    ("def f(x: Optional[int]) -> 'int': pass", "2 types in quotes"),
    (f"f = lambda x: '{LONG[:40]}'", "1 lambdas of more than 50"),
])
def test_the_budget_finds_what_is_too_much(project, text, said):
    assert f"mini/extra.py: {said}" in module_of(project, text)


@pytest.mark.parametrize("text", [
    "x = 1  # a comment\n\n# and one\n" * 300,
    "raise ValueError('a')\n" * 5 + "raise\n",
    "raise ValueError('a')\n" * 6 + "x = 1\n" * 195,
    f"raise ValueError(f'{LONG[:84]}{{x}}{{y}}')",
    '"""What it does."""\ndef f(x: Literal["a"], y: list[int] | None = None) -> dict: pass',
])
def test_what_is_within_the_budget(project, text):
    assert module_of(project, text) == ""


def test_columns_are_those_of_cells_summaries_and_scripts(project):
    change(project, "10_second", lambda cells: cells[1]["source"].append(f"\n{LONG} = 1"))
    change(project, "00_first", lambda cells: cells[0].update(source=["# First\n", f"> {LONG}"]))
    (project / "scripts").mkdir()
    (project / "scripts" / "tool.py").write_text(f"'''doc'''\n{LONG} = 1\n", encoding="utf-8")
    said = "\n".join(budget.check_budget(project))
    assert all(f"{name}: 1 lines of more than 100 columns" in said
               for name in ("nbs/10_second.ipynb", "nbs/00_first.ipynb", "scripts/tool.py"))
    assert "scripts/tool.py: 1 docstrings" in said
    change(project, "10_second", lambda cells: cells[1].update(source=[f"#| fig-cap: {LONG}"]))
    assert "10_second" not in "\n".join(budget.check_budget(project))


def test_a_known_exception_may_shrink_not_grow_and_goes_when_it_is_not_needed(project):
    (project / "scripts").mkdir()
    known = project / "scripts" / "budget.yml"
    known.write_text("exceptions:\n  docstrings: {mini/extra.py: 2}\n", encoding="utf-8")
    lines = [f"def f{i}():\n    'What it does.'\n" for i in range(3)]
    assert '3 docstrings that are not in """; 2 allowed' in module_of(project, "".join(lines))
    assert module_of(project, "".join(lines[:2])) == module_of(project, lines[0]) == ""
    assert "mini/extra.py needs no exception from docstrings" in module_of(project, "x = 1")
    module_of(project, "".join(lines))
    budget.write(project)
    assert budget.check_budget(project) == [] and "mini/extra.py: 3" in known.read_text("utf-8")


def test_arrows_point_down_and_no_module_stands_in_a_circle(project):
    (project / "scripts").mkdir()
    layers = "layers: [top other, middle, shapes]\nsideways: [top -> other]\n"
    (project / "scripts" / "budget.yml").write_text(layers, encoding="utf-8")
    for name, text in {
        "top": "from .shapes import area\nfrom .other import x\nimport mini.middle",
        "other": "def f():\n    from mini import top",  # inside a function counts as well
        "middle": "from .nowhere import x",
        "shapes": "from mini.middle import x",
        "nowhere": "import math",
    }.items():
        (project / "mini" / f"{name}.py").write_text(text, encoding="utf-8")
    said = budget.check_budget(project)
    wrong = [fault.split(":")[0] for fault in said if "do not point down" in fault]
    assert wrong == ["middle -> nowhere", "other -> top", "shapes -> middle"]
    assert "mini: 2 modules in a circle of imports; 0 allowed" in said


def test_this_book_keeps_its_budget():
    assert budget.check_budget(ROOT) == []


def test_this_book_has_its_readme_and_sidebar():
    assert check.check_readme(ROOT) + check.check_sidebar(ROOT) == []


def test_images_of_the_readme_exist():
    import re

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert targets and all((ROOT / target).exists()
                           for target in targets), [t for t in targets if not (ROOT / t).exists()]
