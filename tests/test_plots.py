"""The figures that every chapter shares: what a page may hold, what it may cost, what is refused."""
import base64
import io
import json
import re
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from PIL import Image

from feedback_nb.plots import COLORS, LINES, MARKERS, animate, learning_curves, sliders, use_style


@pytest.fixture(autouse=True)
def as_found():
    "Every test leaves matplotlib as it found it, and no figure open."
    with matplotlib.rc_context():
        yield
    plt.close("all")


def line(a, ax):
    ax.plot([0, a])


def held(page):
    "The data that the page's script holds."
    return json.loads(re.search(r"const d = (\{.*?\});\n", page.data).group(1))


def test_import_takes_the_standard_library_alone():
    code = (
        "import sys; import feedback_nb.plots;"
        "print([m for m in ('matplotlib', 'pandas', 'IPython', 'numpy', 'PIL', 'scipy', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_style_sets_a_cycle_that_differs_in_colour_and_dash():
    use_style()
    cycle = plt.rcParams["axes.prop_cycle"].by_key()
    assert cycle["color"] == COLORS and cycle["linestyle"] == LINES
    assert len(COLORS) == len(LINES) == len(MARKERS) == len(set(COLORS)) == len(set(MARKERS))


def test_moving_figures_leave_settings_and_figures_as_they_were():
    before, other = dict(plt.rcParams), plt.figure()
    sliders(line, a=[1, 2], alt="a line")
    assert dict(plt.rcParams) == before
    assert plt.get_fignums() == [other.number]


def test_a_page_is_complete_without_scripts_and_without_a_network():
    page = BeautifulSoup(sliders(line, a=[1, 2, 3], alt="a <line> & \"more\"").data, "html.parser")
    image = page.find("img")
    assert image["alt"] == 'a <line> & "more"'
    Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/png;base64,")))).verify()
    assert page.find(class_="controls").has_attr("hidden"), "controls that cannot work are hidden until the script runs"
    assert page.find("label").get_text(" ", strip=True) == "a 2"
    assert not page.find_all(["link", "iframe"]) and not page.find_all(attrs={"id": True})
    assert all(not s.has_attr("src") for s in page.find_all("script"))


def test_text_cannot_end_the_script():
    page = sliders(lambda name, ax: ax.plot([0, len(name)]), name=["</script><b>", "x"], alt="</script>")
    assert BeautifulSoup(page.data, "html.parser").find("b") is None
    assert held(page)["labels"] == [["</script><b>", "x"]]


def test_every_combination_is_stored_in_the_order_of_product():
    seen = []
    page = sliders(lambda a, b, ax: (seen.append((a, b)), ax.plot([a, b])), a=np.linspace(0, 1, 3), b=["x", "y"], alt="two sliders")
    assert seen == [(a, b) for a in (0.0, 0.5, 1.0) for b in "xy"]
    assert held(page)["labels"] == [["0", "0.5", "1"], ["x", "y"]]
    assert held(page)["order"] == list(range(6))


def test_the_same_cell_gives_the_same_page():
    assert sliders(line, a=[1, 2], alt="a line").data == sliders(line, a=[1, 2], alt="a line").data
    assert held(sliders(line, a=[1, 2], alt="a line"))["key"] != held(sliders(line, a=[1, 3], alt="a line"))["key"]


def test_draw_may_return_a_figure_and_fail_without_leaving_one_open():
    def own(a):
        fig, ax = plt.subplots(figsize=(2, 1))
        ax.plot([0, a])
        return fig

    assert "width:192px" in sliders(own, a=[1], alt="a line").data
    with pytest.raises(ZeroDivisionError):
        sliders(lambda a, ax: 1 / a, a=[1, 0], alt="a line")
    assert plt.get_fignums() == []


def test_animation_draws_each_frame_once_and_closes_the_figure():
    fig, ax = plt.subplots()
    drawn = []
    page = animate(fig, lambda t: (drawn.append(t), ax.plot([0, t])), iter([2, 3, 5]), interval=50, label="step", alt="growing")
    assert drawn == [2, 3, 5] and plt.get_fignums() == []
    assert held(page)["interval"] == 50 and held(page)["labels"] == [["2", "3", "5"]] and held(page)["names"] == ["step"]


def test_a_figure_that_grows_too_large_is_stopped_early():
    fig = plt.figure(figsize=(8, 6))
    drawn = []

    def noise(t):
        drawn.append(t)
        fig.clear()
        fig.add_axes([0, 0, 1, 1]).imshow(np.random.default_rng(t).random((600, 800)))

    with pytest.raises(ValueError, match=r"2 MB: 5000 frames .* Use at most \d frames"):
        animate(fig, noise, 5000, alt="noise")
    assert len(drawn) < 12


@pytest.mark.parametrize("call, message", [
    (lambda: sliders(line, a=[1], alt=""), "alt is empty"),
    (lambda: sliders(line, alt="none"), "at least one value"),
    (lambda: sliders(line, a=[], alt="none"), "at least one value: a"),
    (lambda: animate(plt.figure(), print, [], alt="none"), "at least one frame"),
    (lambda: animate(plt.figure(), print, 3, interval=0, alt="none"), "positive interval"),
    (lambda: learning_curves({}), "histories is empty"),
    (lambda: learning_curves({"cbl": []}), "'cbl' has no runs"),
    (lambda: learning_curves({"cbl": pd.DataFrame({"epoch": [1], "loss": [2.0]})}, y="los"), "did you mean 'loss'"),
    (lambda: learning_curves({"cbl": [pd.DataFrame({"epoch": e, "l": [1.0, 2.0]}) for e in ([1, 2], [1, 3])]}, y="l"), "do not share 'epoch'"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_learning_curves_draw_the_interval_of_student():
    from scipy.stats import ttest_1samp

    runs = [pd.DataFrame({"epoch": [1, 2], "valid_accuracy": [0.5 + 0.01 * s, 0.6 + 0.02 * s * s]}) for s in range(4)]
    ax = learning_curves({"cbl": runs})
    expected = ttest_1samp([100 * r.valid_accuracy[1] for r in runs], 0).confidence_interval(0.95)
    corners = ax.collections[0].get_paths()[0].vertices
    found = corners[corners[:, 0] == 2][:, 1]
    np.testing.assert_allclose([found.min(), found.max()], [expected.low, expected.high])
    np.testing.assert_allclose(ax.lines[0].get_ydata()[1], np.mean([100 * r.valid_accuracy[1] for r in runs]))


def test_learning_curves_take_anything_with_a_frame():
    class History:
        frame = pd.DataFrame({"epoch": [1, 2], "train_loss": [2.0, 1.0]})

    ax = learning_curves({"one": History(), "list": [History(), History()]}, y="train_loss")
    assert [line.get_label() for line in ax.lines] == ["one (1 seed)", "list (2 seeds)"]
    assert len(ax.collections) == 1, "one seed has no interval"
