"""From an executed notebook to an HTML page that needs no network: nbdev's processing, then pandoc.

nbdev hides what is to be hidden and documents what is exported, exactly as on the published site.
The rest is here: figures with captions and numbers, references to them, formulas as MathML, links
between the chapters, and the frame of the page.
"""
from __future__ import annotations

import html
import json
import os
import posixpath
import re
import subprocess
import warnings
from pathlib import Path
from urllib.parse import unquote

from cells import KINDS, Page
from frame import contents, frame, listing
from project import settings

PANDOC = ("markdown+lists_without_preceding_blankline+autolink_bare_uris-implicit_figures"
          "-fancy_lists-example_lists-citations")


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


def searched(chapter: dict, soup) -> str:
    """What the search finds on a page, as a script: a page opened as a file may not fetch. A row
    for each heading, with the text below it."""
    rows, title = [["", "", chapter["description"]]], f"{chapter['number']} {chapter['title']}"
    for part in soup.find_all(["h2", "h3", "p", "li", "pre", "td", "figcaption"]):
        text = " ".join(s.strip() for s in part.find_all(string=True)
                        if s.parent.name != "annotation")
        if part.name in ("h2", "h3"):
            rows.append([part.get("id", ""), text, ""])
        elif len(rows[-1][2]) < 4000:
            rows[-1][2] += " " + " ".join(text.split())
    return f"bookFound({json.dumps([chapter['page'], title.strip(), rows], ensure_ascii=False)});\n"


def make(root: Path, stem: str, out: Path, key: str) -> tuple[tuple[str, str, str], list[str]]:
    """The page of one chapter as ((file name, HTML, what the search finds), faults)."""
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
    found = searched(chapter, soup)
    body = re.sub(r"<!--aside (\d+)-->", lambda m: page.aside[int(m[1])],
                  soup.decode(formatter="minimal"))
    if stem == "index" and not {c["page"] for c in chapters if c["stem"] != "index"} <= {
        a["href"] for a in soup.find_all("a", href=True)}:
        body += listing(chapters)
    return (chapter["page"],
            frame(root, chapters, chapter, body, headings, banner, key), found), page.faults
