"""The offline book: a small one is made here, every page of the real one is read where it has
been made, a real browser looks where there is one."""
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from urllib.parse import unquote

import pytest
import small_project
from bs4 import BeautifulSoup
from small_project import ROOT, SCRIPTS, copy_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                               "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")


def run(root, *args):
    # the project's own package must be importable in its notebooks
    return subprocess.run([sys.executable, SCRIPTS / "book.py", "--root", root, *args],
                          capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(root)})


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    "The small book, made once however many processes test it: (its project, what was printed)."
    from filelock import FileLock

    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    root, said = shared / "small book" / "mini", shared / "small book.json"
    with FileLock(str(shared / "small book.lock")):
        if not said.is_file():
            done = run(small_project.make(root))
            said.write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
    return root, json.loads(said.read_text())


@pytest.fixture
def book(made):
    code, out, err = made[1]
    assert code == 0, out + err
    return made[0] / "_book"


def page(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def real_pages():
    "The pages of this project's own book; none when it was not made, or is not whole because it is being made or was stopped."
    pages = sorted(p for p in (ROOT / "_book").glob("*.html") if not p.name.startswith("."))
    return pages if {re.sub(r"^\d+_", "", p.stem) for p in (ROOT / "nbs").glob("*.ipynb")} == {
        p.stem for p in pages} - {"api"} else []


@functools.cache
def ids_of(path):
    return set(re.findall(r' id="([^"]*)"', path.read_text(encoding="utf-8")))


# ---------------------------------------------------------------- rules for any page

def check_page(path):
    soup = page(path)
    # nothing that is needed to read it comes from elsewhere
    for tag, attribute in (("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"),
                           ("source", "src"), ("video", "src"), ("audio", "src"),
                           ("object", "data")):
        for found in soup.find_all(tag, **{attribute: True}):
            assert found[attribute].startswith(
                "data:"), f"{path.name} loads {found[attribute][:80]}"
    assert not re.search(r"@import|url\((?!['\"]?data:)", " ".join(s.get_text()
        for s in soup.find_all("style"))), "a style sheet loads something"
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(",
                         " ".join(s.get_text() for s in soup.find_all("script")))
    # what is seen is also said
    assert all(img.get("alt", "").strip()
               for img in soup.find_all("img")), f"{path.name} has an image without alt"
    assert soup.html["lang"] == "en" and soup.title.get_text().strip() and len(
        soup.find_all("h1")) == 1
    # formulas were understood: what pandoc cannot read stays as TeX in a span
    assert not soup.find_all("span", class_="math"), f"{path.name} has a formula that is not MathML"
    for math in soup.find_all("math"):
        assert math.get("display") in ("inline", "block")
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(
        set(ids)), f"{path.name} has two elements of one id: {[i for i in ids if ids.count(i) > 1]}"
    # every link within the book leads somewhere
    for a in soup.find_all("a", href=True):
        target, _, anchor = a["href"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = path.parent / unquote(target) if target else path
        assert there.is_file(), f"{path.name} links to {a['href']}, which does not exist"
        if anchor and there.suffix == ".html":
            assert unquote(anchor) in ids_of(
                there), f"{path.name} links to {a['href']}, where there is no such part"
    # code and prose do not carry what was meant for nbdev or Quarto
    assert not re.search(r"^#\| ", "\n".join(code.get_text() for code in soup.find_all("pre")),
                         flags=re.M), f"{path.name} shows a directive"
    for code in soup.find_all(["code", "script", "pre"]):
        code.decompose()
    assert not re.search(r"(?<!\w)@(fig|eq|sec|tbl)-\w",
                         soup.get_text()), f"{path.name} has a reference that was not resolved"


@pytest.mark.parametrize("name", ["index.html", "first.html", "second.html", "api.html"])
def test_small_pages_are_whole(book, name):
    check_page(book / name)


@pytest.mark.parametrize("path", real_pages(), ids=lambda path: path.stem)
def test_real_pages_are_whole(path):
    check_page(path)


# ---------------------------------------------------------------- what a page shows

def test_a_page_has_title_summary_and_neighbours(book):
    soup = page(book / "first.html")
    assert soup.h1.get_text(" ", strip=True) == "00 First <things>"
    assert soup.find(class_="lead").get_text() == "What comes first & why."
    assert [a["href"] for a in soup.footer.nav.find_all("a")] == ["index.html", "second.html"]
    side = soup.find("nav", class_="side")
    assert side.find("a", attrs={"aria-current": "page"})["href"] == "first.html"
    assert side.find("a", href="#a-formula").get_text() == "A formula"


def test_the_contents_have_each_chapter_with_its_sentence(book):
    entries = page(book / "index.html").find(class_="contents").find_all("li")
    assert [(e.a["href"], e.a.get_text(), e.contents[-1]) for e in entries] == [
        ("first.html", "00 First <things>", "What comes first & why."),
        ("second.html", "10 Second", "What comes second.")]


def test_hidden_cells_are_hidden_and_exported_ones_documented(book):
    soup = page(book / "first.html")
    text = soup.get_text()
    assert "hidden_name" not in text and "default_exp" not in text
    source = soup.find(id="area").find_next("pre")
    assert "width: float,  # side in metres" in source.get_text()
    assert len(re.findall(r"def area", text)) == 1, "the same function is shown twice"
    assert "return Later(width * width)" in source.get_text()
    assert "sliders(lambda" not in text, "echo: false hides the code"


def test_figures_have_caption_number_and_text(book):
    soup = page(book / "first.html")
    line, move = soup.find(id="fig-line"), soup.find(id="fig-move")
    assert line.img["alt"] == "A straight line & nothing else."
    assert line.figcaption.get_text(" ", strip=True).startswith(
        "Figure 1: A line:") and line.figcaption.find("math")
    assert move.figcaption.get_text(strip=True) == "Figure 2: Two figures that move." and move.find(
        attrs={"data-feedback": True})
    assert [soup.find("a", href=h, class_=False).get_text() for h in ("#fig-line", "#fig-move",
        "#eq-step")] == ["Figure\xa01", "Figure\xa02", "Equation\xa01"]
    assert soup.find(id="eq-step").get_text(strip=True).endswith("(1)")


def test_tables_have_caption_number_and_words(book):
    table = page(book / "first.html").find("figure", class_="table")
    assert table.figcaption.get_text(strip=True) == "Table 1: One seed & no more."
    text = table.table.get_text(" ", strip=True)
    assert "p (Holm)" in text and "–" in text and "NaN" not in text
    assert table["id"].startswith("tbl")


def test_formulas_are_mathml_and_code_and_prices_are_not(book):
    soup = page(book / "first.html")
    assert soup.find("mfrac") and soup.find("math", display="block")
    assert "$HOME @fig-none" in [code.get_text() for code in soup.find_all("code")]
    assert "costs $5 and 10$ more" in soup.get_text()


def test_links_lead_to_this_book(book):
    soup = page(book / "first.html")
    links = {a.get_text(): a["href"] for a in soup.main.find_all("a", href=True)}
    assert links["the second chapter"] == "second.html" and links["a part of it"] == links[
        "what is exported"] == "second.html#here"
    assert links["Open in Colab"].startswith("https://colab") and "colab-badge" not in str(soup)
    assert {a.get_text(): a["href"] for a in page(book / "index.html").main.find_all("a",
        href=True)}["licence"].endswith("/blob/main/LICENSE")


def test_outputs_are_those_of_this_run_but_for_recorded_ones(book):
    text = page(book / "first.html").get_text()
    assert "recorded on a large machine" in text and "Recorded output: this cell needs a GPU and was not run" in text
    stored, executed = ((json.loads((folder / "00_first.ipynb").read_text(encoding="utf-8")))
                        for folder in (book.parent / "nbs", book / "notebooks"))
    pictures = [next(o["data"]["image/png"] for c in nb["cells"] for o in c.get("outputs", [])
                     if "image/png" in o.get("data", {})) for nb in (stored, executed)]
    assert pictures[0] != pictures[1], "the picture was drawn anew"
    assert "".join(pictures[1]).replace("\n",
                                        "") in (book / "first.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- making it again

@pytest.fixture
def again(made, book, tmp_path):
    return copy_of(made[0], tmp_path / "mini")


def lines(done):
    "name -> `kept` or seconds, of the notebooks in the order of the printed lines."
    return {line.split()[0]: line.split()[3] for line in done.stdout.splitlines()
            if " cells " in line and line.startswith("  ")}


def source_of(root, name):
    path = root / "nbs" / f"{name}.ipynb"
    return path, path.read_text(encoding="utf-8")


def test_the_first_run_says_what_it_did(made):
    out = made[1][1]
    assert re.search(r"^  00_first +\d+ cells +[\d.]+ s   1 recorded$", out, re.M), out
    assert re.search(r"^The book is at .*_book/index\.html, made in \d+ min \d+ s\.$", out,
                     re.M), out
    assert "FAULT" not in out


def test_notebooks_are_never_written(made, tmp_path):
    fresh = small_project.make(tmp_path / "mini")
    for name in ("index", "00_first", "10_second"):
        assert source_of(made[0], name)[1] == source_of(fresh, name)[1]


def test_only_what_changed_is_executed_again(again):
    assert set(lines(run(again)).values()) == {"kept"}
    path, text = source_of(again, "index")  # text alone: the page changes, nothing runs
    path.write_text(text.replace("A small book.", "A tiny book."), encoding="utf-8")
    done = run(again)
    assert set(lines(done).values()) == {"kept"} and done.returncode == 0
    assert "A tiny book." in (again / "_book" / "index.html").read_text(encoding="utf-8")
    path.write_text(text.replace("1 + 1", "1 + 2"), encoding="utf-8")
    assert [name for name, state in lines(run(again)).items() if state != "kept"] == ["index"]
    module = again / "mini" / "shapes.py"  # only the second notebook imports it
    module.write_text(module.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    assert [name for name, state in lines(run(again)).items() if state != "kept"] == ["10_second"]


def test_what_was_cut_off_or_touched_is_not_trusted(again):
    copies = again / "_book" / "notebooks"
    whole = (copies / "index.ipynb").read_text(encoding="utf-8")
    (copies / "index.ipynb").write_text(whole[: len(whole) // 2], encoding="utf-8")
    second = (copies / "10_second.ipynb").read_text(encoding="utf-8")
    (copies / "10_second.ipynb").write_text(second.replace("area 4", "area 5"), encoding="utf-8")
    assert [name for name, state in lines(run(again)).items() if state != "kept"] == ["index",
        "10_second"]
    assert "area 4" in (copies / "10_second.ipynb").read_text(encoding="utf-8")


def test_a_notebook_that_fails_does_not_stop_the_others(again):
    path, text = source_of(again, "00_first")
    path.write_text(text.replace("assert area(2) == 4", "assert area(2) == 5, 'too small'"),
                    encoding="utf-8")
    path, text = source_of(again, "10_second")
    path.write_text(text.replace("area {", "surface {"), encoding="utf-8")
    for _ in range(2):  # and is not taken for done the next time
        done = run(again)
        assert done.returncode == 1
        assert re.search(
            r"FAILED in cell 10: AssertionError: too small\n      \| assert area\(2\) == 5",
            done.stdout), done.stdout
        assert "Did not run to the end: 00_first." in done.stdout
    assert "cell 10 raised AssertionError: too small" in page(again / "_book" / "first.html").find(
        class_="failed").get_text()
    assert "surface 4" in (again / "_book" / "second.html").read_text(encoding="utf-8")


def test_a_kernel_that_dies_is_reported(again):
    path, text = source_of(again, "10_second")
    path.write_text(text.replace('"print(f\\"area', '"import os; os._exit(3)\\n", "print(f\\"area'),
                    encoding="utf-8")
    done = run(again)
    assert done.returncode == 1 and "FAILED in cell 4: DeadKernel" in done.stdout, done.stdout


def test_faults_of_a_page_are_reported_every_time(again):
    path, text = source_of(again, "10_second")
    path.write_text(text.replace("Back to", "See @fig-gone and [nothing](99_gone.ipynb). Back to"),
                    encoding="utf-8")
    for _ in range(2):
        done = run(again)
        assert done.returncode == 1
        assert "FAULT in 10_second: nothing is labelled fig-gone" in done.stdout and "the link 99_gone.ipynb leads nowhere" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupted_run_is_made_up_for(again):
    path, text = source_of(again, "10_second")
    path.write_text(text.replace('"print(f\\"area',
                                 '"import time; open(\'started\', \'w\'); time.sleep(0 if open(\'fast\', \'a+\').seek(0, 2) else 60)\\n", "print(f\\"area'), encoding="utf-8")
    process = subprocess.Popen([sys.executable, SCRIPTS / "book.py", "--root", again],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"PYTHONPATH": str(again)})
    started = again / "nbs" / "started"
    for _ in range(600):
        if started.exists():
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    (again / "nbs" / "fast").write_text("x")
    done = run(again)
    assert done.returncode == 0, done.stdout
    assert {name: state == "kept" for name, state in lines(done).items()} == {"index": True,
        "00_first": True, "10_second": False}
    assert "area 4" in (again / "_book" / "second.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- in a browser

def look(path, tmp_path, script="", width=1280):
    "The page as headless Chromium leaves it after `script`, with nothing but this machine to be reached."
    copy = path.with_name(f".look-{os.getpid()}-{path.name}")
    probe = "<script>addEventListener('error', e => document.body.dataset.error = e.message, true);</script>"
    end = "<script>addEventListener('load', async () => { const $ = q => [...document.querySelectorAll(q)], out = document.body.dataset; const wait = ms => new Promise(r => setTimeout(r, ms)); " + script + " out.done = 1; });</script>"
    text = path.read_text(encoding="utf-8")
    copy.write_text(text.replace("<head>", "<head>" + probe.replace("document.body",
        "document.documentElement"), 1).replace("</body>", end + "</body>", 1), encoding="utf-8")
    try:
        done = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu",
             "--disable-background-networking", "--no-first-run", "--host-resolver-rules=MAP * "
             "~NOTFOUND",
             f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
             "--virtual-time-budget=8000", "--dump-dom", copy.resolve().as_uri()],
            capture_output=True, text=True, timeout=120,
        )
    finally:
        copy.unlink()
    soup = BeautifulSoup(done.stdout, "html.parser")
    assert soup.body and soup.body.get("data-done") == "1", done.stderr[-2000:]
    assert not soup.html.get("data-error"), soup.html.get("data-error")
    return soup


@needs_browser
def test_sliders_move_in_a_browser(book, tmp_path):
    soup = look(book / "first.html", tmp_path, """
        const [slider, film] = $('[data-feedback]'), img = slider.querySelector('img'), input = slider.querySelector('input');
        const before = img.src, other = film.querySelector('img').src;
        out.first = input.getAttribute('aria-valuetext');
        input.value = 0; input.dispatchEvent(new Event('input'));
        out.moved = img.src !== before; out.second = input.getAttribute('aria-valuetext'); out.alt = img.alt; out.alone = film.querySelector('img').src === other;
        out.shown = !slider.querySelector('.controls').hidden && slider.querySelector('.still').hidden;
        const button = film.querySelector('button'), seen = new Set();
        button.click(); out.says = button.textContent;
        for (let i = 0; i < 20; i++) { await wait(20); seen.add(film.querySelector('input').value); }
        button.click(); out.stops = button.textContent; out.frames = seen.size;""")
    found = {key.removeprefix("data-"): value for key, value in soup.body.attrs.items()}
    assert found["first"] == "2" and found["second"] == "1" and found["moved"] == found[
        "alone"] == found["shown"] == "true"
    assert found["alt"] == "A line. Shown: slope = 1."
    assert found["says"] == "Pause" and found["stops"] == "Play" and int(found["frames"]) == 3


@needs_browser
def test_formulas_are_drawn_by_a_browser(book, tmp_path):
    soup = look(book / "first.html", tmp_path,
                "const m = $('mfrac')[0].children; out.above = "
                "m[0].getBoundingClientRect().bottom <= m[1].getBoundingClientRect().top + 2;")
    assert soup.body["data-above"] == "true"


PAGES = [("small", name) for name in ("index.html", "first.html", "second.html")] + [
    ("real", path.name) for path in real_pages()]


@needs_browser
@pytest.mark.parametrize("which, name", PAGES, ids=lambda value: value.removesuffix(".html"))
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_the_screen(book, tmp_path, which, name, width):
    path = (book if which == "small" else ROOT / "_book") / name
    soup = look(path, tmp_path,
                "out.room = innerWidth; out.taken = document.documentElement.scrollWidth; out.images = $('img').every(i => i.complete && i.naturalWidth > 0);", width)
    assert int(soup.body["data-taken"]) <= int(soup.body["data-room"]), "the page scrolls sideways"
    assert soup.body["data-images"] == "true", "an image is not shown"
