"""The figures that every chapter shares: what a page may hold, what it may cost, what is
refused."""
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
import torch
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from feedback_nb.fixed_points import iterate
from feedback_nb.plots import COLORS, LINES, MARKERS, animate, beside_paper, curves, image_grid
from feedback_nb.plots import learning_curves, pca_trajectory, sliders, use_style


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
        "heavy = 'matplotlib pandas IPython numpy PIL scipy torch'.split();"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "[]"


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
    Image.open(io.BytesIO(base64.b64decode(
        image["src"].removeprefix("data:image/png;base64,")))).verify()
    assert page.find(class_="controls").has_attr(
        "hidden"), "controls that cannot work are hidden until the script runs"
    assert page.find("label").get_text(" ", strip=True) == "a 2"
    assert not page.find_all(["link", "iframe"]) and not page.find_all(attrs={"id": True})
    assert all(not s.has_attr("src") for s in page.find_all("script"))


def test_text_cannot_end_the_script():
    page = sliders(lambda name, ax: ax.plot([0, len(name)]), name=["</script><b>", "x"],
                   alt="</script>")
    assert BeautifulSoup(page.data, "html.parser").find("b") is None
    assert held(page)["labels"] == [["</script><b>", "x"]]


def test_every_combination_is_stored_in_the_order_of_product():
    seen = []
    page = sliders(lambda a, b, ax: (seen.append((a, b)), ax.plot([a, b])), a=np.linspace(0, 1, 3),
                   b=["x", "y"], alt="two sliders")
    assert seen == [(a, b) for a in (0.0, 0.5, 1.0) for b in "xy"]
    assert held(page)["labels"] == [["0", "0.5", "1"], ["x", "y"]]
    assert held(page)["order"] == list(range(6))


def test_the_same_cell_gives_the_same_page():
    assert sliders(line, a=[1, 2], alt="a line").data == sliders(line, a=[1, 2], alt="a line").data
    assert held(sliders(line, a=[1, 2],
                        alt="a line"))["key"] != held(sliders(line, a=[1, 3], alt="a line"))["key"]


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
    page = animate(fig, lambda t: (drawn.append(t), ax.plot([0, t])), iter([2, 3, 5]), interval=50,
                   label="step", alt="growing")
    assert drawn == [2, 3, 5] and plt.get_fignums() == []
    assert held(page)["interval"] == 50 and held(page)["labels"] == [[
        "2", "3", "5"
    ]] and held(page)["names"] == ["step"]


def test_a_figure_that_grows_too_large_is_stopped_early():
    fig = plt.figure(figsize=(8, 6))
    drawn = []

    def noise(t):
        drawn.append(t)
        fig.clear()
        fig.add_axes([0, 0, 1, 1]).imshow(np.random.default_rng(t).random((600, 800)))

    with pytest.raises(ValueError, match=r"5000 frames .* 2 MB.* at most \d"):
        animate(fig, noise, 5000, alt="noise")
    assert len(drawn) < 12


@pytest.mark.parametrize(
    "call, message",
    [(lambda: sliders(line, a=[1], alt=""), "alt is empty"),
     (lambda: sliders(line, alt="none"), "sliders"),
     (lambda: sliders(line, a=[], alt="none"), "values of a"),
     (lambda: animate(plt.figure(), print, [], alt="none"), "frame"),
     (lambda: animate(plt.figure(), print, 3, interval=0, alt="none"), "interval"),
     (lambda: learning_curves({}), "runs"), (lambda: learning_curves({"cbl": []}), "runs of 'cbl'"),
     (lambda: learning_curves({"cbl": pd.DataFrame({"epoch": [1], "loss": [2.0]})}, y="los"),
      "'los'.*'loss'"),
     (lambda: learning_curves(
         {"cbl": [pd.DataFrame({"epoch": e, "l": [1.0, 2.0]})
                  for e in ([1, 2], [1, 3])]}, y="l"), "'epoch'"),
     (lambda: curves({}, x="sigma"), "runs"),
     (lambda: curves({"cbl": pd.DataFrame({"severity": [1, 1], "accuracy": [0.5, 0.6]})},
                     x="severity"), "twice"), (lambda: pca_trajectory([]), "states"),
     (lambda: pca_trajectory(torch.zeros(3, 4)), "states"),
     (lambda: pca_trajectory([torch.zeros(3, 4), torch.zeros(2, 4)]), r"\(2, 4\)"),
     (lambda: pca_trajectory(torch.zeros(3, 4, 5), labels=[0, 1]), "labels.* 4.* 2"),
     (lambda: pca_trajectory(torch.zeros(3, 4, 5), upto=3), "upto.* 2.* 3"),
     (lambda: image_grid([]), "images"),
     (lambda: image_grid(torch.zeros(2, 2, 8, 8)), r"\(2, 8, 8\)"),
     (lambda: image_grid(torch.full((2, 8, 8), 1.5)), "beyond limits 0 … 1"),
     (lambda: image_grid(torch.full((2, 8, 8), torch.nan)), "beyond limits"),
     (lambda: image_grid(torch.zeros(3, 8, 8), titles=["a"]), "titles.* 3.* 1"),
     (lambda: image_grid(torch.zeros(3, 8, 8), columns=2, rows=["a"]), "rows.* 2.* 1"),
     (lambda: image_grid(torch.zeros(3, 8, 8), columns=0), "columns"),
     (lambda: beside_paper({"a": {"paper": 1}}), "'a'.*source"),
     (lambda: beside_paper({"a": {"papers": 1}}), "'papers'.*key.*'a'"),
     (lambda: beside_paper({"a": {"here": []}}), "'a'"),
     (lambda: beside_paper({"a": {"here": [1.0, float("inf")]}}), "'a'.*inf"), ])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_learning_curves_draw_the_interval_of_student():
    from scipy.stats import ttest_1samp

    runs = [
        pd.DataFrame({"epoch": [1, 2], "valid_accuracy": [0.5 + 0.01 * s, 0.6 + 0.02 * s * s]})
        for s in range(4)
    ]
    ax = learning_curves({"cbl": runs})
    expected = ttest_1samp([100 * r.valid_accuracy[1] for r in runs], 0).confidence_interval(0.95)
    corners = ax.collections[0].get_paths()[0].vertices
    found = corners[corners[:, 0] == 2][:, 1]
    np.testing.assert_allclose([found.min(), found.max()], [expected.low, expected.high])
    np.testing.assert_allclose(ax.lines[0].get_ydata()[1],
                               np.mean([100 * r.valid_accuracy[1] for r in runs]))


def test_learning_curves_take_anything_with_a_frame():
    class History:
        frame = pd.DataFrame({"epoch": [1, 2], "train_loss": [2.0, 1.0]})

    ax = learning_curves({"one": History(), "list": [History(), History()]}, y="train_loss")
    assert [line.get_label() for line in ax.lines] == ["one (1 seed)", "list (2 seeds)"]
    assert len(ax.collections) == 1, "one seed has no interval"


def test_every_plotting_function_draws_on_the_axes_it_is_given():
    frame = pd.DataFrame({"epoch": [1, 2], "valid_accuracy": [0.1, 0.2]})
    drawn = {
        curves: ({"a": frame}, {"x": "epoch",
                                "y": "valid_accuracy"}), learning_curves: ({"a": frame}, {}),
        pca_trajectory: (torch.rand(3, 4, 5), {}), image_grid: (torch.rand(2, 8, 8), {}),
    }
    for function, (data, options) in drawn.items():
        fig, ax = plt.subplots()
        assert function(data, ax=ax, **options) is ax
        assert plt.get_fignums() == [fig.number], f"{function.__name__} opened a figure of its own"
        plt.close(fig)
        assert function(data, **options).figure.number in plt.get_fignums()
        plt.close("all")


def test_curves_read_the_tables_that_the_tools_return():
    from feedback_nb.evaluation import Comparison, noise_curve

    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    data = torch.rand(20, 1, 4, 4), torch.arange(20) % 3
    noisy = noise_curve(net, data, [0.0, 0.2])
    ax = curves({"net": [noisy, noisy]}, x="sigma")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 100 * noisy["accuracy"])
    assert ax.get_xlabel().startswith("noise σ") and ax.get_ylabel() == "accuracy (%)"

    rows = [{"model": "cbl", "seed": s, "accuracy": 0.5, "accuracy_per_step": [0.3, 0.5 + s / 10]}
            for s in (0, 1)]
    steps = Comparison({"rows": rows, "histories": []}, ["cbl"]).per_step("cbl")
    ax = curves({"cbl": steps}, x="step")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [30, 55])
    assert ax.lines[0].get_label() == "cbl (2 seeds)" and ax.get_xlabel() == "step t"
    assert curves({"a": pd.DataFrame({"sigma": [0, 1], "accuracy_2": [0, 1]})}, x="sigma",
                  y="accuracy_2").get_ylabel() == "accuracy at step 2 (%)"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(2, 6), batch=st.integers(2, 5),
       wide=st.integers(2, 20))
def test_the_plane_of_a_trajectory_does_not_depend_on_the_axes_of_the_space(
        seed, steps, batch, wide):
    torch.manual_seed(seed)
    h = torch.randn(steps, batch, wide, dtype=torch.float64) * torch.logspace(
        1, -1, wide, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(wide, wide, dtype=torch.float64)).Q
    distances = []
    for states in (h, h @ turn + 7):
        ax = pca_trajectory(states)
        ways = torch.tensor(np.stack([line.get_xydata() for line in ax.lines]))  # (B, T + 1, 2)
        distances.append(torch.cdist(ways.flatten(0, 1), ways.flatten(0, 1)))
        plt.close(ax.figure)
    torch.testing.assert_close(*distances, atol=1e-6, rtol=1e-6)
    full = h.transpose(0, 1).flatten(0, 1)
    assert (distances[0]
            <= torch.cdist(full, full) + 1e-6).all(), "a projection makes no distance longer"


def test_a_trajectory_in_a_plane_is_found_whole_and_shown_step_by_step_in_one_frame():
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    spiral = iterate(lambda h: torch.cat([h[:, :2] @ turn * 0.9, 0 * h[:, 2:]], 1),
                     torch.tensor([[2.0, 0, 0], [0, 1, 0]]), steps=4)
    ax = pca_trajectory(spiral, labels=torch.tensor([3, 1]))
    shares = [
        float(re.search(r"\((\d+) %", text).group(1)) for text in (ax.get_xlabel(), ax.get_ylabel())
    ]
    assert abs(sum(shares) - 100) <= 1
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["1", "3"]
    radii = np.linalg.norm(np.diff(ax.lines[1].get_xydata(), axis=0), axis=1)
    np.testing.assert_allclose(radii[1:] / radii[:-1], 0.9, rtol=1e-5)
    first = pca_trajectory(spiral, labels=[3, 1], upto=1)
    assert first.get_xlim() == ax.get_xlim() and first.get_ylim() == ax.get_ylim()
    np.testing.assert_allclose(first.lines[1].get_xydata(), ax.lines[1].get_xydata()[:2])


def test_a_trajectory_that_stands_still_is_drawn_without_a_warning():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = pca_trajectory(torch.ones(3, 2, 1))
    assert "0 %" in ax.get_xlabel() and np.isfinite(ax.lines[0].get_xydata()).all()


def test_pictures_share_one_range_and_keep_their_values():
    images = torch.stack([torch.full((1, 4, 6), v) for v in (0.0, 0.25, 1.0)])
    ax = image_grid(images, columns=2, titles=["a", "b", "c"], rows=["up", "down"])
    assert [np.asarray(tile.get_array()).mean() for tile in ax.images] == [0.0, 0.25, 1.0]
    assert {tile.get_clim() for tile in ax.images} == {(0, 1)}
    assert [text.get_text() for text in ax.texts] == ["a", "b", "c", "up", "down"]
    boxes = [tile.get_extent() for tile in ax.images]
    assert boxes[0][2:] == boxes[1][2:] and boxes[1][0] >= boxes[0][1] and boxes[2][3] >= boxes[0][
        2], "two beside each other, the third below"
    low, high = sorted(ax.get_ylim())
    assert all(
        ax.get_xlim()[0] <= b[0] and b[1] <= ax.get_xlim()[1] and low <= b[3] and b[2] <= high
        for b in boxes), "nothing is cut off"


def test_bytes_colours_and_signed_maps():
    colour = torch.zeros(3, 2, 2, dtype=torch.uint8)
    colour[0] = 255
    np.testing.assert_array_equal(image_grid([colour]).images[0].get_array()[0, 0], [1, 0, 0])
    signed = image_grid([torch.tensor([[-2.0, 0.0, 2.0]])], limits=(-2, 2), cmap="PuOr").images[0]
    np.testing.assert_allclose(signed.get_array(), [[0, 0.5, 1]])
    mixed = image_grid([torch.rand(3, 4, 4), torch.rand(6, 2)])
    assert [np.asarray(tile.get_array()).shape for tile in mixed.images] == [(4, 4, 3), (6, 2)]


def test_the_paper_beside_what_was_measured():
    from scipy.stats import ttest_1samp

    here = [81.0, 82.5, 83.1, 80.2]
    table = beside_paper(
        {
            "CNN (%)": {"paper": "80.60", "here": dict(enumerate(here)), "source": "Table 2"},
            "CBL": {"here": 1.25}, "ViT": {"paper": 82, "source": "Table 3"}
        }, digits=2)
    interval = ttest_1samp(here, 0).confidence_interval(0.95)
    assert table.columns.tolist() == ["paper", "here", "n seeds", "source"]
    assert table.loc["CNN (%)"].tolist() == [
        "80.60", f"{np.mean(here):.2f} ± {(interval.high - interval.low) / 2:.2f}", 4, "Table 2"
    ]
    assert table.loc["CBL"].tolist() == ["not given", "1.25", 1, ""]
    assert table.loc["ViT"].tolist() == ["82", "not measured", "–", "Table 3"]


@pytest.mark.parametrize("text", ["<!--<script>", "<!--", "<script>", "</script>", "</SCRIPT >"])
def test_no_text_swallows_the_page(text):
    """In a script, `<!--<script>` would make the parser wait for a second </script>."""
    sliders_of = lambda text: sliders(
        lambda name, ax: ax.plot([0, len(name)]), name=[text, "x"], alt=text
    )
    page = sliders_of(text).data
    script, _, after = page.partition("<script>")[2].partition("</script>")
    assert not re.search("<!--|<script|</script", script, re.IGNORECASE)
    assert after.strip() == "" and held(sliders_of(text))["labels"] == [[text, "x"]]


@pytest.mark.parametrize("name", [r"$\x$", "$5 and $6 {", r"cost in $", r"$\sigma$"])
def test_dollars_in_names_are_drawn(name):
    table = pd.DataFrame({"sigma": [0.0, 0.1], "accuracy": [0.9, 0.8]})
    ax = curves({name: [table]}, x="sigma")
    ax.figure.canvas.draw()
    grid = image_grid([torch.zeros(4, 4)], titles=[name], rows=[name])
    grid.figure.canvas.draw()
    ways = pca_trajectory(torch.randn(3, 4, 5), labels=[name] * 4)
    ways.figure.canvas.draw()
    label = ax.get_legend().get_texts()[0].get_text()
    assert label.replace(r"\$", "$").startswith(name)
    plt.close("all")
