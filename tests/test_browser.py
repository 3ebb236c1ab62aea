"""The pages in a real browser: the small book by default, the whole book and the site when `slow`.

They want Chromium on the PATH and Playwright's Python package, which brings no browser; the names
of what is missing are in the reason of the skip. The site is looked at where `make docs` made it.
"""
import functools
import http.server
import json
import os
import re
import shutil
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_project import ROOT, SCRIPTS
from test_book import book, made  # noqa: F401  the small book, made once

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                               "chrome"))), None)
try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None
MISSING = [name for name, there in (("Chromium on the PATH", BROWSER),
                                    ("the package playwright", sync_playwright)) if not there]
pytestmark = pytest.mark.skipif(bool(MISSING), reason="missing: " + ", ".join(MISSING))
WIDTHS = (1400, 390)
LOOK = """() => {
  const shown = e => e.getClientRects().length > 0, all = q => [...document.querySelectorAll(q)];
  const levels = all("main h1, main h2, main h3, main h4, main h5").filter(shown)
    .map(h => +h.tagName[1]);
  return {
    over: document.documentElement.scrollWidth - innerWidth,
    code: all("pre.sourceCode, pre.python, pre.sh, pre.bibtex").filter(shown).filter(
      p => p.scrollWidth > p.clientWidth + 1).map(p => p.textContent.slice(0, 60)),
    images: all("img").filter(i => shown(i) && !(i.complete && i.naturalWidth)).map(
      i => i.src.slice(0, 80)),
    flat: all("math").filter(m => shown(m) && m.getBoundingClientRect().height < 4).length,
    jumps: levels.filter((level, i) => i && level > levels[i - 1] + 1).length,
    first: levels[0], h1: levels.filter(level => level === 1).length,
    ids: all("[id]").map(e => e.id),
    links: all("a[href]").map(a => a.getAttribute("href")),
  };
}"""
MOVE = """async () => {
  let stuck = [];
  for (const box of document.querySelectorAll("[data-feedback]")) {
    const input = box.querySelector("input[type=range]"), image = box.querySelector("img");
    if (!input || !image) continue;
    const before = image.src;
    input.value = input.value === input.min ? input.max : input.min;
    input.dispatchEvent(new Event("input"));
    const there = await image.decode().then(() => true, () => false);
    if (image.src === before || !there) stuck.push(box.textContent.slice(0, 60));
  }
  return stuck;
}"""


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def served(folder: Path):
    "The folder at an address of this machine, as a host of pages would show it."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0),
                                             functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


@contextmanager
def opened(browser, address: str, width: int, **options):
    "(page, what it complained of, what it asked other hosts for)"
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page, errors, requests = context.new_page(), [], []
    own = re.match(r"https?://[^/]+/|file://", address)[0]
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((own, "data:", "blob:"))
            else requests.append(r.url))
    page.goto(address)
    try:
        yield page, errors, requests
    finally:
        context.close()


def faults_of(browser, address: str, width: int, known: dict) -> list[str]:
    "What is wrong with one page at one width; `known` collects ids and links of every page."
    with opened(browser, address, width, reduced_motion="reduce") as (page, errors, requests):
        page.wait_for_timeout(50)
        seen, stuck = page.evaluate(LOOK), page.evaluate(MOVE)
    known[address.rpartition("/")[2]] = (set(seen["ids"]), seen["links"])
    rules = {"complains": errors, "asks other hosts for": requests, "lacks images": seen["images"],
             "has sliders that do not move": stuck,
             "has code that scrolls sideways": seen["code"] if width == WIDTHS[0] else [],
             "scrolls sideways by": [seen["over"]] * (seen["over"] > 0),
             "has formulas that are not drawn": [seen["flat"]] * bool(seen["flat"]),
             "has headings that skip a level": [seen["jumps"]] * bool(seen["jumps"]),
             "should have one h1, has": [seen["h1"]] * (seen["h1"] != 1)}
    name = address.rpartition("/")[2]
    return [f"{name} at {width}: {rule} {what[:3]}" for rule, what in rules.items() if what]


def broken_links(known: dict) -> list[str]:
    "Links to pages and parts of pages that are not there."
    broken = []
    for name, (_, links) in known.items():
        for link in links:
            target, _, anchor = link.partition("#")
            target = target.removeprefix("./") or name
            if re.match(r"[a-z]+:|/", target) or not target.endswith(".html"):
                continue
            if target not in known:
                broken.append(f"{name} links to {link}: no such page")
            elif anchor and anchor not in known[target][0]:
                broken.append(f"{name} links to {link}: no such part")
    return broken


def faults_of_all(browser, base: str, names: list[str]) -> list[str]:
    known, faults = {}, []
    for name in names:
        for width in WIDTHS:
            faults += faults_of(browser, base + name, width, known)
    return faults + broken_links(known)


def names_in(folder: Path) -> list[str]:
    "404.html is left out: it is shown at any address, so its links begin at the host."
    return sorted(p.name for p in folder.glob("*.html")
                  if not p.name.startswith(".") and p.name != "404.html")


def test_the_small_book(chromium, book):  # noqa: F811
    assert faults_of_all(chromium, book.resolve().as_uri() + "/", names_in(book)) == []


def test_the_book_is_searched_and_switched_to_dark(chromium, book):  # noqa: F811
    paper = "getComputedStyle(document.body).backgroundColor"
    with served(book) as base, opened(chromium, base + "index.html", 1400,
                                      color_scheme="light") as (page, errors, asked):
        page.fill("input[type=search]", "formula")
        page.wait_for_selector(".found a")
        links = page.eval_on_selector_all(".found a", "all => all.map(a => a.getAttribute('href'))")
        assert links[0] == "first.html#a-formula"
        page.fill("input[type=search]", "nothing like this")
        assert page.inner_text(".found") == "Nothing found."
        light = page.evaluate(paper)
        page.click("button.mode")
        assert page.get_attribute("button.mode", "aria-pressed") == "true"
        dark = page.evaluate(paper)
        assert dark != light
        page.goto(base + "second.html")  # it is remembered
        page.wait_for_function(f"{paper} === '{dark}'")
        assert not errors and not asked
    address = (book / "index.html").resolve().as_uri()  # and as a file
    with opened(chromium, address, 390, color_scheme="dark") as (page, _, _):
        page.fill("input[type=search]", "formula")
        page.wait_for_selector(".found a")
        assert page.evaluate(paper) == dark


def test_what_is_wrong_is_found(chromium, tmp_path):
    "Each rule is broken once."
    (tmp_path / "bad.html").write_text(
        "<!doctype html><main><h1>A</h1><h3>C</h3><a href='gone.html'>x</a><a href='#no'>y</a>"
        "<img src='gone.png' alt='x' width=9 height=9><pre class='sourceCode'>" + "x" * 500
        + "</pre><script>fetch('http://other.invalid/').catch(() => 0); fail()</script>"
        "<div data-feedback><input type=range min=0 max=2><img alt='' src='data:,'></div></main>",
        encoding="utf-8")
    with served(tmp_path) as base:
        text = "\n".join(faults_of_all(chromium, base, ["bad.html"]))
    for rule in ("complains", "asks other hosts", "lacks images", "do not move",
                 "code that scrolls", "scrolls sideways by", "skip a level", "no such page",
                 "no such part"):
        assert rule in text, rule


def test_the_first_screen_computes_what_the_script_does(chromium, tmp_path):
    "Push the strength: the page answers as scripts/cover.py does, at every step."
    sys.path.insert(0, str(SCRIPTS))
    import cover

    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    html = next("".join(o["data"]["text/html"]) for c in index["cells"]
                for o in c.get("outputs", []) if "data-cover" in "".join(
                    o["data"].get("text/html", "")))
    path = tmp_path / "cover.html"
    path.write_text(f"<!doctype html><main>{html}</main>", encoding="utf-8")
    net = json.loads(cover.WEIGHTS.read_text())
    with opened(chromium, path.as_uri(), 1400, reduced_motion="reduce") as (page, errors, asked):
        for strength in (0.5, 0.9, 1.5, 3.0):
            for step in (0, 7, cover.LAST):
                for name, value in (("strength", strength), ("step", step)):
                    page.eval_on_selector(f"input[name={name}]", "(e, v) => { e.value = v; "
                                          "e.dispatchEvent(new Event('input')); }", value)
                for flow in cover.READINGS:
                    answers = page.eval_on_selector_all(
                        f"[data-flow={flow}] .answer", "all => all.map(e => +e.textContent)")
                    expected = cover.run(net, flow, strength=strength)[1][step].argmax(1)
                    assert answers == expected.tolist(), (flow, strength, step)
        page.focus("input[name=strength]")
        before = page.input_value("input[name=strength]")
        page.keyboard.press("ArrowLeft")
        assert page.input_value("input[name=strength]") != before, "not reachable by keyboard"
        assert not errors and not asked
    with opened(chromium, path.as_uri(), 390) as (page, _, _):  # it moves by itself, then stops
        page.wait_for_function("document.querySelector('[name=step]').value > 0")
        page.click(".cover-set button")
        assert page.inner_text(".cover-set button") == "Play"


# ---------------------------------------------------------------- all pages: pytest -m slow

FOLDERS = {"book": ROOT / "_book", "site": ROOT / "_docs"}


@pytest.mark.slow
@pytest.mark.parametrize("which", FOLDERS)
def test_every_page(chromium, which):
    folder = FOLDERS[which]
    if not (folder / "index.html").is_file():
        pytest.skip(f"missing: {folder.name}/, which `make {dict(book='book', site='docs')[which]}`"
                    " makes")
    with served(folder) as base:
        assert faults_of_all(chromium, base, names_in(folder)) == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", FOLDERS)
def test_contrast(chromium, which, scheme):
    "AA by axe-core: `npm install --no-save axe-core` here, or the variable AXE names its file."
    there = ROOT / "node_modules" / "axe-core" / "axe.min.js"
    axe, folder = os.environ.get("AXE", str(there)), FOLDERS[which]
    if not Path(axe).is_file() or not (folder / "index.html").is_file():
        pytest.skip("missing: AXE=node_modules/axe-core/axe.min.js, or the pages")
    faults = []
    with served(folder) as base:
        for name in names_in(folder):
            with opened(chromium, base + name, 1400, color_scheme=scheme,
                        reduced_motion="reduce") as (page, _, _):
                page.add_script_tag(path=axe)
                found = page.evaluate("axe.run(document, {runOnly: ['color-contrast']})"
                                      ".then(r => r.violations.flatMap(v => v.nodes.map(n => "
                                      "n.target + ': ' + n.any[0].message.slice(0, 120))))")
            faults += [f"{name}: {fault}" for fault in found[:3]]
    assert faults == []


@pytest.mark.slow
def test_the_site_is_small():
    site = FOLDERS["site"]
    if not (site / "index.html").is_file():
        pytest.skip("missing: _docs/, which `make docs` makes")
    sys.path.insert(0, str(SCRIPTS))
    import small

    assert small.too_large(site) == []
