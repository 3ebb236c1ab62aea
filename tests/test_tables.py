"""Tables that sort (nbs/05_plots.ipynb), in a real browser: by number, by name, back again."""
import json
import math

import pandas as pd
import pytest
from small_project import ROOT
from test_browser import MISSING, chromium, opened  # noqa: F401  the browser of all pages

from feedback_nb.plots import sortable

pytestmark = pytest.mark.skipif(bool(MISSING), reason="missing: " + ", ".join(MISSING))
FIRST = "table => [...table.tBodies[0].rows].map(row => row.cells[{}].textContent.trim())"


def column(page, i, table=0):
    return page.evaluate(f"({FIRST.format(i)})(document.querySelectorAll('table')[{table}])")


def test_a_click_sorts_by_number_and_by_name(chromium, tmp_path):  # noqa: F811
    made = pd.DataFrame({"points": ["9.5", "-10.0", "", "100"]}, index=["b", "d", "a", "c"])
    path = tmp_path / "table.html"
    path.write_text(f"<!doctype html>{sortable(made)}{sortable(made)}", encoding="utf-8")
    with opened(chromium, path.as_uri(), 1400) as (page, errors, asked):
        head = page.locator("th button", has_text="points").first
        head.click()
        assert column(page, 1) == ["", "-10.0", "9.5", "100"]
        head.press("Enter")  # by keyboard as well: the other way round
        assert column(page, 1) == ["100", "9.5", "-10.0", ""]
        assert page.get_attribute("thead th:nth-child(2)", "aria-sort") == "descending"
        assert column(page, 0, table=1) == list("bdac")  # the other table stays as it was
        page.locator("th button", has_text="row").first.click()
        assert column(page, 0) == list("abcd")
        assert not errors and not asked


def test_the_tables_of_chapter_60_sort(chromium, tmp_path):  # noqa: F811
    page = json.loads((ROOT / "nbs" / "60_side_by_side.ipynb").read_text(encoding="utf-8"))
    tables = ["".join(output["data"]["text/html"]) for cell in page["cells"]
              for output in cell.get("outputs", [])
              if "sortable" in "".join(output.get("data", {}).get("text/html", ""))]
    assert len(tables) == 7
    path = tmp_path / "tables.html"
    path.write_text("<!doctype html>" + "".join(tables), encoding="utf-8")
    with opened(chromium, path.as_uri(), 1400) as (shown, errors, _):
        for i in range(len(tables)):
            shown.locator("table").nth(i).locator("th button").nth(1).click()
            values = [float(v) for v in column(shown, 1, table=i)]
            assert values == sorted(values) and not any(map(math.isnan, values))
        assert not errors
