"""The page "Claims checked": nbs/claims.ipynb made from nbs/claims.yaml (scripts/claims.py)."""
from __future__ import annotations

import hashlib
import html
import json
import re
from pathlib import Path

from claims_numbers import effect_of, file_of, page_of
from project import settings


# ---------------------------------------------------------------- the page

def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def in_words(effect: dict, found: dict) -> str:
    """+1.1 points (−0.5 … 2.7), 5 seeds"""
    digits, unit = effect.get("digits", 1), effect.get("unit", "")
    sign = "+" if found["value"] > 0 and ("b" in effect or "runs" in effect) else ""
    value = f"{sign}{number(found['value'], digits)} {unit}".strip()
    kind = "runs" if "runs" in effect else "seeds"
    return (f"{value} ({number(found['low'], digits)} … {number(found['high'], digits)}), "
            f"{found['n']} {kind}")


def prose(text: str) -> str:
    """Escaped text with `code` and *emphasis*."""
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)


def quoted(claim: dict) -> str:
    """The claim's words: in quotation marks only where they are the paper's own."""
    words = prose(claim["words"])
    return words if claim["paraphrase"] else f"“{words}”"


def where(root: Path, claim: dict) -> str:
    """Links to the cell and to the records."""
    links = []
    if cell := claim.get("cell"):
        chapter = re.match(r"\d*", cell["notebook"])[0] or "index"
        links.append(f'<a href="{html.escape(page_of(root, cell))}">chapter {chapter}</a>')
    else:
        links.append(f"<span>no cell: {prose(claim['no_cell'])}</span>")
    cfg = settings(root)
    for record in dict.fromkeys(e[k] for e in claim.get("effects", [])
                                for k in ("record", "record_b") if k in e):
        file = f"results/{file_of(root, record).name}"
        links.append(f'<a href="{cfg["git_url"]}/blob/{cfg["branch"]}/{file}">{record}</a>')
    return "<br>".join(links)


def row(root: Path, claim: dict, papers: dict) -> str:
    """One claim as a row; `data-head` names each cell where the table becomes a list."""
    found = [effect_of(root, effect) for effect in claim.get("effects", [])]
    here = "<br>".join(f"{prose(e['what'])}: {in_words(e, f)}"
                       for e, f in zip(claim.get("effects", []), found))
    sees = (f"{number(found[0]['sees'], claim['effects'][0].get('digits', 1))} "
            f"{claim['effects'][0].get('unit', '')}").strip() if found else "–"
    note = " ".join(claim[k] for k in ("note", "held_back") if k in claim)
    theirs = prose(claim.get("paper_says", "")) or "–"
    if runs := claim.get("paper_runs"):
        again = effect_of(root, {"runs": runs, **claim.get("paper_unit", {})})
        theirs += "<br>from its runs: " + in_words({"runs": runs, "digits": 2, "unit": "points"},
                                                   again)
        theirs += f", t = {again['t']:.2f}, p = {again['p']:.2g}"
    cells = [("Paper", f"{papers[claim['paper']]['short']}<br><small>{prose(claim['section'])}"
                       "</small>"),
             ("Claim", f"{quoted(claim)}<br><small>Would be refuted by: "
                       f"{prose(claim['falsifier'])}</small>"),
             ("Verdict", f"<strong>{claim['verdict']}</strong><br><small>"
                         f"{prose(claim['scale'])}</small>"),
             ("Here", (here + "<br>" if here and note else here)
              + (f"<small>{prose(note)}</small>" if note else "") or "–"),
             ("The paper's number", theirs),
             ("Smallest visible effect", sees),
             ("Where", where(root, claim))]
    none = lambda text: " data-none" * (text == "–")
    tds = "".join(f'<td data-head="{head}"{none(text)}>{text}</td>' for head, text in cells)
    return (f'<tr id="{claim["id"]}" data-paper="{claim["paper"]}" '
            f'data-verdict="{claim["verdict"]}">{tds}</tr>')


def taken_back(root: Path, claim: dict) -> str:
    """One withdrawn claim as a row."""
    here = "".join(f"<br>{prose(e['what'])}: {in_words(e, effect_of(root, e))}"
                   for e in claim.get("effects", []))
    cells = [("Chapter", where(root, claim)),
             ("What this book said", f"“{prose(claim['words'])}”"),
             ("Why it is withdrawn", prose(claim["why"])),
             ("What stands", prose(claim["instead"]) + here)]
    tds = "".join(f'<td data-head="{head}">{text}</td>' for head, text in cells)
    return f'<tr id="{claim["id"]}">{tds}</tr>'


def notebook(root: Path, data: dict, verdicts: list[str]) -> str:
    """The page as notebook text, as nbdev_clean leaves it."""
    from execnb.nbio import nb2str
    from fastcore.xtras import loads

    from feedback_nb.plots import SORTER

    papers, claims = data["papers"], data["claims"]
    counts = [f"{v} {sum(c['verdict'] == v for c in claims)}" for v in verdicts]
    template = Path(__file__).with_name("claims_page.html").read_text(encoding="utf-8")
    style, table, gone = template.split("<!-- part -->\n")
    option = lambda value, text: f'<option value="{value}">{text}</option>'
    fill = {"rows": "\n".join(row(root, claim, papers) for claim in claims),
            "papers": "".join(option(key, p["short"]) for key, p in papers.items()),
            "verdicts": "".join(option(v, v) for v in verdicts), "sorter": SORTER,
            "gone": "\n".join(taken_back(root, claim) for claim in data["withdrawn"])}
    for key, text in fill.items():
        table, gone = (part.replace(f"${key}", text) for part in (table, gone))
    sources = "\n".join(f"- **{p['short']}**: {p['full']} [{p['at'].split('//')[1]}]({p['at']})"
                        for p in papers.values())
    head = data["page"]["intro"].strip() + (
        f"\n\n{len(claims)} claims and faults: {', '.join(counts)}. "
        f"{len(data['withdrawn'])} claims of our own are [withdrawn](#withdrawn).")
    cells = [_markdown("title", "# Claims checked\n\n> What five papers claim, what would refute "
                                "it, what we found; and what we take back."),
             _markdown("intro", head), _html("claims", style + table),
             _markdown("withdrawn", "## Withdrawn\n\n" + data["page"]["withdrawn"].strip()),
             _html("gone", gone),
             _markdown("reading",
                       f"{data['page']['reading'].strip()}\n\n## The papers\n\n{sources}")]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    made = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return nb2str(loads(json.dumps(made)))


def _id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _markdown(name: str, text: str) -> dict:
    return {"cell_type": "markdown", "id": _id(name), "metadata": {},
            "source": text.splitlines(keepends=True)}


def _html(name: str, text: str) -> dict:
    """A cell that is not run: its output is the table that this script made."""
    source = ["#| echo: false\n", "#| eval: false\n",
              "# this output is made from nbs/claims.yaml by scripts/claims.py"]
    output = {"data": {"text/html": text.splitlines(keepends=True),
                       "text/plain": ["the table of the page"]},
              "execution_count": None, "metadata": {}, "output_type": "execute_result"}
    return {"cell_type": "code", "execution_count": None, "id": _id(name), "metadata": {},
            "outputs": [output], "source": source}
