"""The claims agree with records and cells; planted faults are named; the page can be filtered."""
import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from scipy import stats
from small_project import ROOT, SCRIPTS

sys.path.insert(0, str(SCRIPTS))
import claims  # noqa: E402
import claims_numbers as numbers  # noqa: E402
import claims_page  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)
EFFECT = {"what": "CBL − plain", "record": "50_loop", "a": "CBL", "b": "plain", "scale": 100}
CLAIM = {"id": "one", "paper": "cbl", "kind": "claim", "section": "eq. 1", "words": "it helps",
         "paraphrase": True, "falsifier": "no gain", "verdict": "inconclusive", "scale": "toy",
         "expect": "more", "seal": "0" * 12, "effects": [EFFECT],
         "cell": {"notebook": "10_first.ipynb", "anchor": "fig-one"}}
GONE = {"id": "gone", "words": "it surely helps", "why": "one seed", "instead": "nothing",
        "cell": {"notebook": "10_first.ipynb", "anchor": "The question"}}
PAPER = {"short": "CBL", "full": "A paper.", "at": "https://arxiv.org/abs/2412.17737"}


@pytest.fixture
def project(tmp_path):
    """A project of one notebook, one record and one claim, its page made."""
    (tmp_path / "nbs").mkdir()
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for file in (ROOT / "results").glob("50_loop.json*"):
        shutil.copy(file, tmp_path / "results")
    cells = [new_markdown_cell("# First\n\n## The question\n\n## Twice\n\n## Twice"),
             new_code_cell("#| label: fig-one\n1 + 1")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "nbs" / "10_first.ipynb")
    write(tmp_path, CLAIM)
    assert run(tmp_path, "--seal") == (0, "1 claims agree with records and cells.")
    return tmp_path


def write(root, *listed, **parts):
    page = {"intro": "Text.", "withdrawn": "Text.", "reading": "Text."}
    data = {"page": page, "papers": {"cbl": PAPER}, "claims": list(listed), "withdrawn": [GONE]}
    (root / "nbs" / "claims.yaml").write_text(
        yaml.safe_dump({**data, **parts}, sort_keys=False, allow_unicode=True, width=99999))


def run(root, *args):
    """Return code and what scripts/claims.py printed, in this process."""
    import contextlib
    import io
    from unittest import mock

    numbers.record_of.cache_clear()
    numbers.anchors.cache_clear()
    claims.said.cache_clear()
    said = io.StringIO()
    with mock.patch.object(sys, "argv", ["claims.py", "--root", str(root), *args]):
        with contextlib.redirect_stdout(said):
            code = claims.main()
    return code, said.getvalue().strip()


def changed(root, **parts):
    """The claim of the project with some parts changed (None: left out), sealed as it stands."""
    data = yaml.safe_load((root / "nbs" / "claims.yaml").read_text())
    claim = {**data["claims"][0], **parts}
    write(root, {k: v for k, v in claim.items() if v is not None})
    return run(root, "--check")


def test_the_projects_own_claims_agree_with_records_and_cells():
    assert claims.check_claims(ROOT) == []


def test_every_paper_has_claims_and_every_verdict_is_in_use():
    data = claims.load(ROOT)
    assert len(data["claims"]) >= 34 and len(data["withdrawn"]) >= 4
    assert {claim["paper"] for claim in data["claims"]} == set(data["papers"])
    assert {claim["verdict"] for claim in data["claims"]} == set(claims.VERDICTS)


def test_an_effect_is_the_paired_difference_with_its_interval(project):
    found = numbers.effect_of(project, EFFECT)
    run_ = numbers.record_of(numbers.file_of(project, "50_loop"))
    a, b = (list(run_.scores(model).values()) for model in ("CBL", "plain"))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found["n"] == 5
    assert found["low"] == pytest.approx(100 * low) and found["high"] == pytest.approx(100 * high)
    power = 1 + stats.t.ppf(0.8, 4) / stats.t.ppf(0.975, 4)
    assert found["sees"] == pytest.approx(100 * (high - low) / 2 * power)


def test_places_means_and_histories(project):
    at = numbers.scores(project, "50_loop", ["CBL", "accuracy_per_step", 0], "accuracy")
    steps = numbers.record_of(numbers.file_of(project, "50_loop")).per_step("CBL")
    assert at == pytest.approx(steps[0].to_dict())
    both = numbers.scores(project, "50_loop", {"mean": ["CBL", "plain"]}, "accuracy")
    one, two = (numbers.scores(project, "50_loop", m, "accuracy") for m in ("CBL", "plain"))
    assert both[0] == pytest.approx((one[0] + two[0]) / 2)
    lead = numbers.scores(project, "50_loop", ["CBL", "history train_accuracy"], "accuracy")
    assert 0 < lead[0] < 1
    assert numbers.picked([1.0, None, -1e6, 3.0], "x", ["mean"]) == 2.0
    assert numbers.picked("110", "hits x", []) == pytest.approx(1 / 3)


@pytest.mark.parametrize("parts, words", [
    (dict(verdict="surely"), ["surely"]),
    (dict(verdict="holds"), ["cannot hold"]),
    (dict(verdict="fails"), ["does not fail"]),
    (dict(verdict="not measured"), ["not measured", "effects"]),
    (dict(effects=[{**EFFECT, "record": "no_such"}]), ["results/no_such is gone"]),
    (dict(effects=[{**EFFECT, "a": "no such model"}]), ["no such model"]),
    (dict(effects=[{**EFFECT, "column": "no such column"}]), ["no such column"]),
    (dict(effects=[{**EFFECT, "a": ["CBL", "accuracy_per_step", 99]}]), ["cannot be computed"]),
    (dict(cell={"notebook": "10_first.ipynb", "anchor": "fig-two"}), ["fig-two"]),
    (dict(cell={"notebook": "10_first.ipynb", "anchor": "Twice"}), ["Twice"]),
    (dict(cell={"notebook": "99_gone.ipynb", "anchor": "fig-one"}), ["99_gone.ipynb is gone"]),
    (dict(cell=None), ["one"]),
    (dict(no_cell="none"), ["one"]),
    (dict(falsifier=None), ["falsifier"]),
    (dict(seal=None), ["seal"]),
    (dict(id="gone"), ["twice"]),
    (dict(color="red"), ["color"]),
    (dict(scale="other"), ["run scripts/claims.py"]),
])
def test_a_planted_fault_is_named(project, parts, words):
    code, said = changed(project, **parts)
    assert code == 1
    assert all(word in said for word in words), said


def test_a_record_with_other_numbers_breaks_the_seal(project):
    (file,) = (project / "results").glob("50_loop.json*")
    text = file.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if '"model": "CBL"' in line
               and '"accuracy": ' in line)
    other = re.sub(r'"accuracy": [\d.]+', '"accuracy": 0.99', row)
    assert other != row
    file.write_text(text.replace(row, other), encoding="utf-8")
    code, said = run(project, "--check")
    assert code == 1 and "not those the verdict was made on" in said


def test_a_withdrawn_sentence_may_not_come_back(project):
    path = project / "nbs" / "10_first.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[0].source += "\n\nAnd it *surely*\nhelps."
    nbformat.write(notebook, path)
    code, said = run(project, "--check")
    assert code == 1 and "still stands in 10_first.ipynb" in said


def test_what_a_seal_ignores(project):
    (file,) = (project / "results").glob("50_loop.json*")
    text = file.read_text(encoding="utf-8")
    file.write_text(re.sub(r'"train_seconds": [\d.]+', '"train_seconds": 1.0', text))
    assert run(project, "--check")[0] == 0


def test_a_verdict_needs_five_seeds():
    few = {"n": 3, "low": 1.0, "high": 2.0}
    claim = {"verdict": "holds at toy scale", "expect": "more"}
    assert "3 seeds" in claims.disagreement(claim, [few])
    assert claims.disagreement(claim, [{**few, "n": 5}]) is None


@pytest.mark.parametrize("wanted, low, high, agrees", [
    ("more", 0.1, 1, "holds"), ("more", -1, -0.1, "fails"), ("more", -1, 1, "inconclusive"),
    ("less", -1, -0.1, "holds"), ("less", 0.1, 1, "fails"), ("less", -1, 1, "inconclusive"),
    ({"within": 1}, -0.5, 0.9, "holds"), ({"within": 1}, 2, 3, "fails"),
    ({"within": 1}, -3, -2, "fails"), ({"within": 1}, -2, 2, "inconclusive"),
    ({"within": 1}, 0.5, 2, "inconclusive"),
])
def test_one_verdict_fits_an_interval(wanted, low, high, agrees):
    fits = [verdict for verdict in ("holds", "fails", "inconclusive")
            if claims.disagreement({"verdict": verdict, "expect": wanted},
                                   [{"n": 5, "low": low, "high": high}]) is None]
    assert fits == [agrees]
    held = {"verdict": "inconclusive", "expect": wanted, "held_back": "why"}
    assert claims.disagreement(held, [{"n": 5, "low": low, "high": high}]) is None


@pytest.mark.parametrize("heading, anchor", [
    ("The question", "the-question"), ("What α does to the rate", "what-α-does-to-the-rate"),
    ("First, the paper's own numbers", "first-the-papers-own-numbers"),
    ("2. Does converging help?", "does-converging-help"),
    ("Looking first: `tap` and *edit*", "looking-first-tap-and-edit"),
])
def test_anchors_are_pandocs(heading, anchor):
    import pypandoc

    assert numbers.slug(heading) == anchor
    made = pypandoc.convert_text(f"## {heading}", "html5", format="markdown-smart")
    assert f'id="{anchor}"' in made


def test_quotation_marks_only_around_the_papers_own_words():
    assert claims_page.quoted({"words": "forward-only", "paraphrase": False}) == "“forward-only”"
    assert claims_page.quoted({"words": "a < b", "paraphrase": True}) == "a &lt; b"


def page_text(root):
    cells = json.loads((root / "nbs" / "claims.ipynb").read_text())["cells"]
    return "".join("".join(output["data"]["text/html"]) for cell in cells
                   for output in cell.get("outputs", []))


def test_the_page_has_a_row_for_every_claim_and_links_that_lead_somewhere():
    from bs4 import BeautifulSoup

    page, data = BeautifulSoup(page_text(ROOT), "html.parser"), claims.load(ROOT)
    rows = {row["id"]: row for row in page.select("tbody tr")}
    assert list(rows) == [c["id"] for c in data["claims"] + data["withdrawn"]]
    for link in page.select("td a"):
        target, _, _ = link["href"].partition("#")
        where = target.rpartition("/blob/main/")[2]
        assert (ROOT / ("nbs" if target.endswith(".ipynb") else "") / where).is_file(), target


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")
def test_the_table_is_filtered_and_sorted_in_a_browser(tmp_path):
    script = """<script>
    const form = document.querySelector("form"), said = [];
    const all = () => [...document.querySelectorAll(".claims-box tbody tr")];
    const shown = () => all().filter(row => !row.hidden);
    form.paper.value = "caps"; form.dispatchEvent(new Event("input"));
    said.push(shown().every(r => r.dataset.paper === "caps"), shown().length);
    form.words.value = "dropout"; form.dispatchEvent(new Event("input"));
    said.push(shown().length);
    form.reset(); form.dispatchEvent(new Event("input"));
    const head = document.querySelectorAll("th button")[2];
    head.click(); said.push(shown()[0].dataset.verdict);
    head.click(); said.push(shown()[0].dataset.verdict, head.parentNode.ariaSort);
    document.title = JSON.stringify(said);
    </script>"""
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><meta charset=utf-8>{page_text(ROOT)}{script}")
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           f"--user-data-dir={tmp_path}", page.as_uri()],
                          capture_output=True, text=True, timeout=120)
    said = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    data = claims.load(ROOT)["claims"]
    caps = sum(claim["paper"] == "caps" for claim in data)
    assert said[:2] == [True, caps] and 0 < said[2] < caps
    assert said[3:] == ["fails", "not measured", "descending"]


def test_references_that_cannot_be_found_are_named(project):
    import references

    assert references.check_references(ROOT) == []
    bib = project / "nbs" / "references.bib"
    bib.write_text("@misc{here, title = {A {T}itle}, url = {https://x.org}}\n"
                   "@misc{lost, title = {No address}}\n@misc{here, title = {Again}, doi = {1}}\n")
    text = ("## Of [@here; @gone, p. 3] and @fig-one, `@code`, a@b.org\n\n"
            "```bibtex\n@misc{inside}\n```\n")
    nbformat.write(new_notebook(cells=[new_markdown_cell(text)]), project / "nbs" / "20_two.ipynb")
    said = "\n".join(references.check_references(project))
    assert "here stands twice" in said and "lost has no doi" in said and "cites @gone" in said
    assert len(said.splitlines()) == 3


def test_the_bibliography_is_read_by_pandoc():
    import pypandoc
    import references

    path = ROOT / "nbs" / "references.bib"
    read = json.loads(pypandoc.convert_file(str(path), "csljson", format="bibtex"))
    known = references.entries(path.read_text(encoding="utf-8"))
    assert {entry["id"] for entry in read} == {key for key, _ in known} and len(known) >= 80
