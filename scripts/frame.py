"""The frame of a page of the offline book (book.html, book.css): chapters, search, neighbours."""
from __future__ import annotations

import base64
import html
import json
import re
import string
from pathlib import Path

from project import notebooks, settings

HERE = Path(__file__).parent


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
            f'<li><a href="{c["page"]}"{current}><span class="number">{c["number"]}</span> '
            f'<span>{html.escape(c["title"])}</span></a>{inside}</li>')
    row = ([index] if index else []) + rest
    at = next((i for i, c in enumerate(row) if c is chapter), None)
    turn = []
    if at is not None and at > 0:
        turn.append(
            f'<a rel="prev" href="{row[at - 1]["page"]}">'
            f'← {html.escape(row[at - 1]["title"])}</a>')
    if at is not None and at + 1 < len(row):
        turn.append(
            f'<a rel="next" href="{row[at + 1]["page"]}">'
            f'{html.escape(row[at + 1]["title"])} →</a>')
    cfg = settings(root)
    name = cfg["title"] if "%" not in cfg["title"] else cfg["lib_name"]
    title = chapter["title"] if chapter is index else f"{chapter['title']} – {name}"
    file, source = chapter["notebook"], f"<p>{html.escape(name)} {cfg['version']}</p>"
    if file:
        source = (f'<p>{html.escape(name)} {cfg["version"]} · Executed notebook: '
                  f'<a href="notebooks/{file}">{file}</a></p>')
    icon = root / "nbs" / "images" / "favicon.svg"
    icon = base64.b64encode(icon.read_bytes()).decode() if icon.is_file() else ""
    page = string.Template((HERE / "book.html").read_text(encoding="utf-8"))
    return page.substitute(
        key=key, title=html.escape(title),
        description=html.escape(chapter["description"]),
        css=(HERE / "book.css").read_text(encoding="utf-8"),
        script=(HERE / "book.js").read_text(encoding="utf-8"),
        book=html.escape(name), chapters="\n".join(entries),
        heading=(f'<span class="number">{chapter["number"]}</span> ' if chapter["number"] else "")
        + html.escape(chapter["title"]),
        banner=banner, body=body, turn="".join(turn), source=source,
        icon=f"data:image/svg+xml;base64,{icon}" if icon else "data:,",
    )


def listing(chapters: list[dict]) -> str:
    rows = "".join(
        f'<li><a href="{c["page"]}"><span class="number">{c["number"]}</span> '
        f'{html.escape(c["title"])}</a><br>{html.escape(c["description"])}</li>'
        for c in chapters if c["stem"] != "index"
    )
    return f'<h2 id="chapters">Chapters</h2>\n<ul class="contents">{rows}</ul>'


def bare_index(root: Path, chapters: list[dict]) -> str:
    """A contents page for a book without nbs/index.ipynb."""
    cfg = settings(root)
    chapter = dict(stem="index", notebook="", page="index.html", number="", title=cfg["lib_name"],
                   description=cfg.get("description", ""))
    return frame(root, chapters, chapter, listing(chapters), [], "", "")
