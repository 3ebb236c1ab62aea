"""What the site's build does to rendered pages: small pictures, words in tables, captions."""
import base64
import io
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image
from small_project import SCRIPTS

sys.path.insert(0, str(SCRIPTS))
import documented  # noqa: E402
import small  # noqa: E402


def png(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def drawing(grey=0):
    pixels = np.full((60, 90, 3), 255, "uint8")
    pixels[20:30, 10:70] = grey
    pixels[::7, ::3] = (200, 30, 30)
    return pixels


def test_a_drawing_keeps_every_pixel():
    again = np.asarray(Image.open(io.BytesIO(small.webp(png(drawing())))).convert("RGB"))
    assert (again == drawing()).all()


def test_noise_loses_a_little_and_much_weight():
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), "uint8")
    again = np.asarray(Image.open(io.BytesIO(small.webp(png(noise)))), dtype=float)
    assert len(small.webp(png(noise))) < 0.7 * len(png(noise))
    assert abs(again.mean() - noise.mean()) < 5


def test_frames_become_files_and_the_script_still_finds_them(tmp_path):
    from feedback_nb.moving import sliders

    moved = sliders(lambda a, ax: ax.plot([0, a]), a=[1, 2, 3], alt="A line.").data
    assert small.FRAMES in moved, "the script of feedback_nb.moving has changed"
    text = small.slim(tmp_path / "page.html", moved)
    assert small.FRAMES not in text
    files = sorted((tmp_path / "frames").iterdir())
    assert len(files) == 2 and all(f"frames/{f.name}" in text for f in files)
    assert text.count("data:image/png") == 1  # the frame that is shown first


def test_what_all_pages_share_is_one_file(tmp_path):
    (tmp_path / "site_libs").mkdir()
    page = ('<script id="quarto-html-after-body" type="x">let a = 1;</script><span id="cb1-2">'
            '<a href="#cb1-2" aria-hidden="true" tabindex="-1"></a>x <span class="op">=</span> 1'
            "</span>")
    one, two = (small.slim(tmp_path / name, page) for name in ("a.html", "b.html"))
    assert one == two and len(list((tmp_path / "site_libs").iterdir())) == 1
    assert "let a" not in one and "<span>x = 1</span>" in one


def test_a_large_site_and_a_large_page_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.html").write_text("x" * 100)
    (tmp_path / "b.png").write_text("x" * 500)
    assert small.too_large(tmp_path) == []
    monkeypatch.setattr(small, "PAGE", 99)
    monkeypatch.setattr(small, "SITE", 400)
    faults = " ".join(small.too_large(tmp_path))
    assert "a.html" in faults and "the site" in faults and "b.png" not in faults


def test_the_search_finds_text_and_no_imports(tmp_path):
    entry = {"text": "The loop\n\nimport torch\nfrom a.b import (c,\nsettles  here." + "x" * 9000}
    (tmp_path / "search.json").write_text(json.dumps([entry]))
    small.shorter_search(tmp_path)
    text = json.loads((tmp_path / "search.json").read_text())[0]["text"]
    assert text.startswith("The loop\nsettles here.") and "import" not in text
    assert len(text) == 2000


@pytest.mark.parametrize("cell, shown", [
    ("<td>NaN</td>", "<td>–</td>"), ("<td>&lt;NA&gt;</td>", "<td>–</td>"),
    ("<td>True</td>", "<td>yes</td>"), ("<th>p_holm</th>", "<th>p (Holm)</th>"),
    ("<th></th>", "<td></td>"), ("<td>NaNs</td>", "<td>NaNs</td>")])
def test_tables_speak_in_words(cell, shown):
    data = {"text/html": f"<table><tr>{cell}</tr></table>"}
    documented.readable(data)
    assert data["text/html"] == f"<table><tr>{shown}</tr></table>"


def table_of(*rows):
    cells = lambda row: "".join(cell if "<" in cell else f"<td>{cell}</td>" for cell in row)
    return "<table>" + "".join(f"<tr>{cells(row)}</tr>\n" for row in rows) + "</table>"


def test_an_interval_stands_beside_its_value():
    heads = [f"<th>{h}</th>" for h in ("", "", "mean", "diff_low", "diff_high", "p_holm", "a_prime,"
                                       " gain 1", "low, gain 1", "high, gain 1")]
    two = "<th rowspan='2'>digits</th>"
    data = {"text/html": table_of(heads, [two, "<th>CBL</th>", "1", "-2", "3", "0.5", *"456"],
                                  ["<th>CNN</th>", "7", "NaN", "NaN", "NaN", "8", "9", "10"])}
    documented.readable(data)
    shown = re.findall(r"<t[dh][^>]*>([^<]*)<", data["text/html"])
    assert shown == ["", "", "mean (95 % interval)", "p (Holm)", "A′, gain 1 (95 % interval)",
                     "digits", "CBL", "1 (-2,\xa03)", "0.5", "4 (5,\xa06)",
                     "CNN", "7", "–", "8 (9,\xa010)"]


@pytest.mark.parametrize("heads", [("low", "high", "p"), ("", "low", "high"), ("a", "low", "p")])
def test_bounds_without_a_value_stay_columns(heads):
    data = {"text/html": table_of([f"<th>{h}</th>" for h in heads], ["1", "2", "3"])}
    documented.readable(data)
    assert data["text/html"].count("<td>") - ("" in heads) == 3 and "(2" not in data["text/html"]


def test_a_table_that_sorts_speaks_in_words_and_a_page_of_its_own_is_left_alone():
    table = "<table class='dataframe'><tr><td>NaN</td></tr></table><script>sort()</script>"
    for text, same in ((table, False), (table.replace("dataframe", "claims"), True)):
        data = {"text/html": text}
        documented.readable(data)
        assert (data["text/html"] == text) == same


def test_a_table_is_numbered_unless_it_stands_below_a_figure():
    source, caption = documented.captioned('#| tbl-cap: "A & B"\nx', "ab12")
    assert source.startswith("#| label: tbl-ab12\n#| tbl-cap") and not caption
    source, caption = documented.captioned('#| label: fig-x\n#| tbl-cap: "A & B"\nx', "ab12")
    assert source == "#| label: fig-x\nx" and caption == "A & B"
    data = {"text/html": "<table class='a'><tr></tr></table>"}
    documented.readable(data, caption)
    assert "<table class='a'><caption>A &amp; B</caption>" in data["text/html"]


def test_a_picture_inside_a_page_is_replaced_only_by_a_smaller_one():
    import re

    uri = "data:image/png;base64," + base64.b64encode(png(drawing())).decode()
    match = re.match(r"data:image/png;base64,(.*)", uri)
    assert len(small.inline(match)) <= len(uri)
