"""From an executed notebook to an HTML page that needs no network: nbdev's processing, then pandoc.

nbdev hides what is to be hidden and documents what is exported, exactly as on the published site.
The rest is here: figures with captions and numbers, references to them, formulas as MathML, links
between the chapters, and the frame of the page.
"""
from __future__ import annotations

import base64
import html
import json
import mimetypes
import os
import posixpath
import re
import string
import subprocess
import warnings
from pathlib import Path
from urllib.parse import unquote

import yaml
from project import notebooks, settings

PANDOC = ("markdown+lists_without_preceding_blankline+autolink_bare_uris-implicit_figures"
          "-fancy_lists-example_lists-citations")
KINDS = {"fig": "Figure", "tbl": "Table", "eq": "Equation", "sec": "Section"}


# ---------------------------------------------------------------- the chapters

def contents(root: Path) -> list[dict]:
    """Each chapter's number, title and one sentence, from its first cell; pages as on the site."""
    from nbdev.frontmatter import _fm2dict, _md2dict

    chapters = []
    for path in notebooks(root):
        front = {}
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"][:3]:
            source = "".join(cell["source"])
            if "title" not in front and cell["cell_type"] in ("raw", "markdown"):
                front |= (_fm2dict if cell["cell_type"] == "raw" else _md2dict)(source) or {}
        number = re.match(r"\d+", path.stem)
        stem = re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem)
        chapters.append(dict(
            stem=path.stem, notebook=path.name, page=f"{stem}.html",
            number=number[0] if number else "",
            title=str(front.get("title", stem)), description=str(front.get("description", "")),
        ))
    return chapters


def processed(root: Path, notebook: Path, path: Path):
    """The executed `notebook`, processed by nbdev as if it lay at `path`."""
    from documented import ShowSource
    from execnb.nbio import read_nb

    os.chdir(path.parent)
    os.environ["IN_TEST"] = "1"
    nb = read_nb(notebook)
    nb.path_ = path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ShowSource()(nb)
    return nb


# ---------------------------------------------------------------- notebook -> pandoc's markdown

class Page:
    """Collects a page's markdown; what is HTML already is set aside and put back after pandoc."""

    def __init__(self, source: Path):
        self.source, self.parts, self.aside, self.numbers, self.faults = source, [], [], {}, []

    def raw(self, text: str) -> str:
        self.aside.append(text)
        return f"\n\n```{{=html}}\n<!--aside {len(self.aside) - 1}-->\n```\n\n"

    def number(self, label: str) -> str:
        kind = label.split("-")[0]
        before = sum(known.startswith(kind + "-") for known in self.numbers)
        self.numbers[label] = f"{KINDS.get(kind, kind)} {1 + before}"
        return self.numbers[label]

    def image(self, target: str) -> str:
        """A local image as a data URI."""
        path = (self.source.parent / unquote(target.split("?")[0])).resolve()
        if not path.is_file():
            self.faults.append(f"there is no image {target}")
            return target
        kind = mimetypes.guess_type(path.name)[0] or "image/png"
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

    def figure(self, label: str, caption: str, inside: str, classes: str = "") -> str:
        start = f'<figure{f" id={chr(34)}{label}{chr(34)}" if label else ""}{f" class={chr(34)}{classes}{chr(34)}" if classes else ""}>'
        name = self.number(label) + ": " if label else ""
        text = self.raw("<figcaption>") + name + caption + self.raw(
            "</figcaption>") if caption or name else ""
        return self.raw(start) + inside + text + self.raw("</figure>")

    def table(self, options: dict, inside: str) -> str:
        """The tables of a cell; its caption and number stand with the first of them."""
        label = str(options.get("label", ""))
        if label in self.numbers:
            return inside
        return self.figure(label if label.startswith("tbl") else "", str(options["tbl-cap"]),
                           inside, "table")

    # -------- markdown cells

    def markdown(self, source: str) -> str:
        """A markdown cell: code and formulas untouched, images as figures, equations numbered."""
        kept: list[str] = []

        def keep(match: re.Match) -> str:
            kept.append(match[0])
            return f"\0{len(kept) - 1}\0"

        source = re.sub(r"^(`{3,}|~{3,}).*?^\1[ \t]*$|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)", keep,
                        source, flags=re.M | re.S)
        source = re.sub(r"\$\$(.+?)\$\$[ \t]*\{#(eq-[\w-]+)\}", lambda m: self.equation(m[1], m[2]),
                        source, flags=re.S)
        source = re.sub(r"\$\$.+?\$\$|(?<![\\$\w])\$(?=\S)[^$\n]+?(?<=\S)\$(?!\d)", keep, source,
                        flags=re.S)
        source = re.sub(
            r"!\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\s*(\S+?)(?:\s+\"[^\"]*\")?\s*\)(\{[^}]*\})?",
            self.picture, source)
        source = re.sub(r"^(#+ .*?)\s*\{#(sec-[\w-]+)\}\s*$", self.section, source, flags=re.M)
        while "\0" in source:
            source = re.sub(r"\0(\d+)\0", lambda m: kept[int(m[1])], source)
        return source

    def equation(self, formula: str, label: str) -> str:
        number = self.number(label).removeprefix("Equation ")
        return self.raw(f'<div class="equation" id="{label}"><div>') + f"$${formula}$$" + self.raw(
            f"</div><span>({number})</span></div>")

    def section(self, match: re.Match) -> str:
        self.numbers[match[2]] = "“" + match[1].lstrip("# ") + "”"
        return match[0]

    def picture(self, match: re.Match) -> str:
        caption, target, attributes = match[1], match[2], match[3] or ""
        if re.match(r"https?:|//", target):
            return caption  # a badge: its words do
        alt = re.search(r'(?:fig-)?alt="([^"]*)"', attributes)
        label = re.search(r"#(fig-[\w-]+)", attributes)
        width = re.search(r'width="?([\w%.]+)', attributes)
        style = f' style="width:{width[1]}{"px" if width[1].isdigit() else ""}"' if width else ""
        image = f'<img src="{target if target.startswith("data:") else self.image(target)}" alt="{html.escape(alt[1] if alt else caption)}"{style}>'
        if not label:
            self.aside.append(image)
            return f"`<!--aside {len(self.aside) - 1}-->`{{=html}}"
        return self.figure(label[1], caption, self.raw(image))

    # -------- code cells

    def code(self, cell: dict) -> str:
        options, source = split(cell.source)
        if options.get("include") is False:
            return ""
        out = ""
        if options.get("echo", True) is not False and source.strip():
            out += fence(source, "python")
            if options.get("code-fold") in (True, "true"):
                summary = html.escape(str(options.get("code-summary", "Code")))
                start = self.raw(f"<details><summary>{summary}</summary>")
                out = start + out + self.raw("</details>")
        if cell.metadata.get("recorded"):
            what = " and ".join(cell.metadata.recorded)
            kind = "Recorded output" if cell.get("outputs") else "No output"
            out += self.raw(f'<p class="recorded">{kind}: this cell needs {html.escape(what)} '
                            'and was not run when this page was made.</p>')
        return out if options.get("output") is False else out + self.outputs(cell, options)

    def outputs(self, cell: dict, options: dict) -> str:
        text, shown, alt = "", "", str(options.get("fig-alt", options.get("fig-cap", "")))
        stream = ""
        for output in cell.get("outputs", []):
            kind = output["output_type"]
            if kind == "stream":
                stream += joined(output["text"])
                continue
            text, stream = text + fence(plain(stream), "output"), ""
            if kind == "error":
                text += fence(plain("\n".join(output["traceback"])), "error")
                continue
            data = output.get("data", {})
            if image := next((t for t in ("image/svg+xml", "image/png", "image/jpeg") if t in data),
                             None):
                shown += self.raw(picture_of(image, joined(data[image]), alt, output))
            elif "text/html" in data:
                page = joined(data["text/html"])
                moving = "<script" in page or "<img" in page or "<svg" in page
                if moving and (options.get("label") or options.get("fig-cap")):
                    shown += self.raw(page)
                elif options.get("tbl-cap") and "<table" in page:
                    text += self.table(options, self.raw(f'<div class="scroll">{page}</div>'))
                else:
                    text += self.raw(f'<div class="scroll">{page}</div>')
            elif "text/markdown" in data:
                page = "\n\n" + self.markdown(joined(data["text/markdown"])) + "\n\n"
                text += self.table(options, page) if options.get("tbl-cap") else page
            elif "text/latex" in data:
                text += "\n\n" + joined(data["text/latex"]) + "\n\n"
            elif "text/plain" in data:
                text += fence(plain(joined(data["text/plain"])), "output")
        text += fence(plain(stream), "output")
        if shown:
            text += self.figure(str(options.get("label", "")), str(options.get("fig-cap", "")),
                                shown)
        return text


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def plain(text: str) -> str:
    """Terminal text without colours, with the last state of each line that was overwritten."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")).rstrip()


def fence(text: str, kind: str) -> str:
    if not text.strip():
        return ""
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"\n\n{ticks} {{.{kind}}}\n{text.strip(chr(10))}\n{ticks}\n\n"


def split(source: str) -> tuple[dict, str]:
    """Quarto's options at the top of a cell, and the code below them."""
    lines, options = source.splitlines(), []
    while lines and (not lines[0].strip() or re.match(r"\s*#\s*\|", lines[0])):
        line = re.sub(r"^\s*#\s*\|\s?", "", lines.pop(0))
        if re.match(r"[\w-]+\s*:", line):
            options.append(line)
    found = {}
    for line in options:
        try:
            found |= yaml.safe_load(line) or {}
        except yaml.YAMLError:
            name, _, value = line.partition(":")
            found[name.strip()] = value.strip()
    return found, "\n".join(lines)


def picture_of(kind: str, data: str, alt: str, output: dict) -> str:
    """An <img> of the size the notebook shows it in; SVG is an image too, so that no ids clash."""
    size = (output.get("metadata") or {}).get(kind) or {}
    width = f' width="{size["width"]}"' if isinstance(size, dict) and "width" in size else ""
    if kind == "image/svg+xml":
        data = base64.b64encode(data.encode()).decode()
    return f'<img src="data:{kind};base64,{"".join(data.split())}" alt="{html.escape(alt)}"{width}>'


# ---------------------------------------------------------------- markdown -> HTML

def pandoc(markdown: str, faults: list[str]) -> str:
    import pypandoc

    done = subprocess.run(
        [pypandoc.get_pandoc_path(), "-f", PANDOC, "-t", "html5", "--mathml", "--wrap=preserve",
         "--eol=lf"],
        input=markdown, capture_output=True, text=True, encoding="utf-8",
    )
    if done.returncode:
        raise RuntimeError("pandoc: " + done.stderr.strip())
    faults += [" ".join(w.split()) for w in re.split(r"(?=\[WARNING\])", done.stderr)
               if w.startswith("[WARNING] Could not convert")]
    return done.stdout


def references(page: Page, text: str) -> str:
    """`@fig-name` becomes a link that says Figure 3; code and what was set aside stay."""
    def link(match: re.Match) -> str:
        label = match[1].rstrip("-")
        if label not in page.numbers:
            page.faults.append(f"nothing is labelled {label}")
            return match[0]
        return f"[{page.numbers[label].replace(' ', chr(160))}](#{label})"

    parts = re.split(r"(^(?:`{3,}|~{3,})[^\n]*\n.*?^(?:`{3,}|~{3,})[ \t]*$|`[^`\n]+`)", text,
                     flags=re.M | re.S)
    return "".join(re.sub(rf"(?<![\w/.])@((?:{'|'.join(KINDS)})-[\w-]+)", link, part)
                   if i % 2 == 0 else part for i, part in enumerate(parts))


def relink(root: Path, chapters: list[dict], soup, faults: list[str]) -> None:
    """Links to notebooks and to the site lead to this book; links to files lead to the project."""
    cfg = settings(root)
    site = cfg["doc_host"].rstrip("/") + "/" + cfg["doc_baseurl"].strip("/") + "/"
    pages = {c["notebook"]: c["page"] for c in chapters}
    names = set(pages.values())
    for a in soup.find_all("a", href=True):
        target, _, anchor = a["href"].partition("#")
        anchor = "#" + anchor if anchor else ""
        if target.startswith(site) and (target.removeprefix(site) or "index.html") in names:
            # nbdev links every name it knows; private ones have no entry, methods their class's
            name = anchor.removeprefix("#").split(".")
            if name[0].startswith("_"):
                a.unwrap()
                continue
            a["href"] = (target.removeprefix(site)
                         or "index.html") + ("#" + name[0] if name[0] else "")
            a.attrs.pop("target", None)
        elif target in pages:
            a["href"] = pages[target] + anchor
        elif target and not re.match(r"[a-z]+:|//", target):
            path = posixpath.normpath(posixpath.join("nbs", unquote(target)))
            if (root / path).exists():
                a["href"] = f"{cfg['git_url']}/blob/{cfg['branch']}/{path}"
            elif target not in names:
                faults.append(f"the link {a['href']} leads nowhere")


FRAME = string.Template("""<!doctype html>
<!-- key $key -->
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="description" content="$description">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<link rel="icon" href="$icon">
<style>
$css
</style>
</head>
<body>
<a class="skip" href="#main">Skip to the text</a>
<nav aria-label="Chapters" class="side">
<details open>
<summary>Chapters</summary>
<p class="home"><a href="index.html">$book</a></p>
<ol>
$chapters
</ol>
<p class="home"><a href="api.html">All names</a></p>
</details>
</nav>
<main id="main">
<h1>$heading</h1>
<p class="lead">$description</p>
$banner
$body
<footer>
<nav aria-label="Previous and next">$turn</nav>
$source
</footer>
</main>
<script>if (matchMedia("(max-width: 70rem)").matches) document.querySelector(".side details").open = false;</script>
</body>
</html>
""")


def frame(root: Path, chapters: list[dict], chapter: dict, body: str, headings: list, banner: str,
          key: str) -> str:
    """The page around a chapter: chapters at the side, previous and next at the end."""
    index = next((c for c in chapters if c["stem"] == "index"), None)
    rest = [c for c in chapters if c["stem"] != "index"]
    entries = []
    for c in rest:
        inside = ""
        if c is chapter and headings:
            inside = "<ul>" + "".join(f'<li><a href="#{i}"><span>{t}</span></a></li>'
                                      for i, t in headings) + "</ul>"
        current = ' aria-current="page"' if c is chapter else ""
        entries.append(
            f'<li><a href="{c["page"]}"{current}><span class="number">{c["number"]}</span> <span>{html.escape(c["title"])}</span></a>{inside}</li>')
    row = ([index] if index else []) + rest
    at = next((i for i, c in enumerate(row) if c is chapter), None)
    turn = []
    if at is not None and at > 0:
        turn.append(
            f'<a rel="prev" href="{row[at - 1]["page"]}">← {html.escape(row[at - 1]["title"])}</a>')
    if at is not None and at + 1 < len(row):
        turn.append(
            f'<a rel="next" href="{row[at + 1]["page"]}">{html.escape(row[at + 1]["title"])} →</a>')
    cfg = settings(root)
    name = cfg["title"] if "%" not in cfg["title"] else cfg["lib_name"]
    title = chapter["title"] if chapter is index else f"{chapter['title']} – {name}"
    file, source = chapter["notebook"], f"<p>{html.escape(name)} {cfg['version']}</p>"
    if file:
        source = (f'<p>{html.escape(name)} {cfg["version"]} · Executed notebook: '
                  f'<a href="notebooks/{file}">{file}</a></p>')
    icon = root / "nbs" / "images" / "favicon.svg"
    icon = base64.b64encode(icon.read_bytes()).decode() if icon.is_file() else ""
    return FRAME.substitute(
        key=key, title=html.escape(title),
        description=html.escape(chapter["description"]),
        css=Path(__file__).with_name("book.css").read_text(encoding="utf-8"),
        book=html.escape(name), chapters="\n".join(entries),
        heading=(f'<span class="number">{chapter["number"]}</span> ' if chapter["number"] else "")
        + html.escape(chapter["title"]),
        banner=banner, body=body, turn="".join(turn), source=source,
        icon=f"data:image/svg+xml;base64,{icon}" if icon else "data:,",
    )


def listing(chapters: list[dict]) -> str:
    rows = "".join(
        f'<li><a href="{c["page"]}"><span class="number">{c["number"]}</span> {html.escape(c["title"])}</a><br>{html.escape(c["description"])}</li>'
        for c in chapters if c["stem"] != "index"
    )
    return f'<h2 id="chapters">Chapters</h2>\n<ul class="contents">{rows}</ul>'


def bare_index(root: Path, chapters: list[dict]) -> str:
    """A contents page for a book without nbs/index.ipynb."""
    cfg = settings(root)
    chapter = dict(stem="index", notebook="", page="index.html", number="", title=cfg["lib_name"],
                   description=cfg.get("description", ""))
    return frame(root, chapters, chapter, listing(chapters), [], "", "")


def names_page(root: Path, chapters: list[dict]) -> str:
    """The index of every public name, as on the site."""
    import names

    chapter = dict(stem="api", notebook="", page="api.html", number="", title="All names",
                   description="Every public function and class, by module, with its page.")
    body = re.sub(r"(<table.*?</table>)", r'<div class="scroll">\1</div>',
                  re.sub(r"<colgroup>.*?</colgroup>", "", pandoc(names.listing(root), []),
                         flags=re.S), flags=re.S)
    return frame(root, chapters, chapter, body, [], "", "")


def key_in(page: Path) -> str:
    with page.open(encoding="utf-8") as lines:
        next(lines, "")
        return next(lines, "").removeprefix("<!-- key ").removesuffix(" -->\n")


def make(root: Path, stem: str, out: Path, key: str) -> tuple[tuple[str, str], list[str]]:
    """The page of one chapter as ((file name, HTML), faults)."""
    from bs4 import BeautifulSoup

    chapters = contents(root)
    chapter = next(c for c in chapters if c["stem"] == stem)
    path = root / "nbs" / chapter["notebook"]
    copy = out / "notebooks" / chapter["notebook"]
    page, banner = Page(path), ""
    if copy.is_file():
        failed = json.loads(copy.read_text(encoding="utf-8"))["metadata"]["book"]["failed"]
    else:
        why = "the notebook could not be executed; what follows was recorded by its authors"
        copy, failed = path, {"cell": 0, "error": ["NotExecuted", why]}
    if failed:
        kind, why = map(html.escape, failed["error"])
        banner = ('<p class="failed" role="alert">This chapter did not run to the end: '
                  f'cell {failed["cell"]} raised {kind}: {why}</p>')
    try:
        nb = processed(root, copy, path)
    except Exception as error:  # what is exported cannot be imported: show it without its tables
        from execnb.nbio import read_nb

        if not failed:
            page.faults.append(f"nbdev could not document it: {error.__cause__ or error}")
        nb = read_nb(copy)
        nb.cells = [c for i, c in enumerate(nb.cells) if not (i == 0 and c.cell_type == "markdown")
                    and not re.search(r"^#\|\s*(hide|default_exp)\b", c.source, flags=re.M)]
    text = "\n\n".join(
        page.markdown(c.source) if c.cell_type == "markdown" else page.code(c)
        if c.cell_type == "code" else ""
        for c in nb.cells if not c.source.startswith("<!-- WARNING: THIS FILE WAS AUTOGENERATED")
    )
    soup = BeautifulSoup(pandoc(references(page, text), page.faults), "html.parser")
    relink(root, chapters, soup, page.faults)
    for i, aside in enumerate(page.aside):  # HTML that a cell has put out links to chapters as well
        if ".ipynb" in aside:
            part = BeautifulSoup(aside, "html.parser")
            relink(root, chapters, part, page.faults)
            page.aside[i] = part.decode(formatter="minimal")
    for table in soup.find_all("table"):
        for part in table.find_all("colgroup") + [head for head in table.find_all("thead")
                                                  if not head.get_text(strip=True)]:
            part.decompose()  # pandoc's widths come from the dashes of the source
        table.attrs.pop("style", None)
        table.wrap(soup.new_tag("div", attrs={"class": "scroll"}))
    for math in soup.find_all("math", display="block"):
        math.wrap(soup.new_tag("span", attrs={"class": "display"}))
    headings = [(h["id"], h.decode_contents()) for h in soup.find_all("h2") if h.get("id")]
    body = re.sub(r"<!--aside (\d+)-->", lambda m: page.aside[int(m[1])],
                  soup.decode(formatter="minimal"))
    if stem == "index" and not {c["page"] for c in chapters if c["stem"] != "index"} <= {
        a["href"] for a in soup.find_all("a", href=True)}:
        body += listing(chapters)
    return (chapter["page"],
            frame(root, chapters, chapter, body, headings, banner, key)), page.faults
