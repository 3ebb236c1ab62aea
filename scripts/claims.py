"""The claims of nbs/claims.yaml: checked against their records and cells, and shown as a page.

    python scripts/claims.py            write nbs/claims.ipynb
    python scripts/claims.py --check    name what does not agree; write nothing
    python scripts/claims.py --seal     after a verdict was looked at again: note the numbers it
                                        was made on (`seal`), then write the page

No number of ours is typed in the file: an effect names a record, rows and columns, and is computed
here. A seal is a hash of just those numbers, so it does not depend on how results/ stores them.
"""
from __future__ import annotations

import argparse
import hashlib
import html
import json
import math
import re
import sys
from functools import cache
from pathlib import Path
from statistics import fmean

import jsonschema
import yaml
from project import directives, notebooks, settings

SCHEMA = json.loads(Path(__file__).with_name("claims_schema.json").read_text(encoding="utf-8"))
VERDICTS = SCHEMA["$defs"]["verdict"]["enum"]
FEW = 5  # seeds that a verdict needs


# ---------------------------------------------------------------- numbers

@cache
def record_of(path: Path):
    """A results file as the package reads it; one reader for every form it is stored in."""
    from feedback_nb.evaluation import recorded

    return recorded(path)


def file_of(root: Path, record: str) -> Path:
    """results/NAME.json or whatever form the record has."""
    found = sorted((root / "results").glob(f"{record}.json*"))
    if not found:
        raise ValueError(f"the record results/{record} is gone")
    return found[0]


def picked(value, column: str, path: list) -> float:
    """A number out of a column: rates from coded answers, a place in a list, a mean over it."""
    from feedback_nb.evaluation import from_digits

    if column.startswith(("hits ", "false alarms ")):
        hits, false_alarms = from_digits(value)
        return float((hits if column.startswith("hits ") else false_alarms).mean())
    for place in path:
        value = (fmean(v for v in value if v is not None and v > -9e5) if place == "mean"
                 else value[place])  # -1e6 stands for "no such unit" in chapter 37
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"column {column!r} with {path} is no number")
    return float(value)


def scores(root: Path, record: str, term, column: str) -> dict[int, float]:
    """{seed: number} of a term: a model, [model, column, place …] or {mean: [terms]}."""
    if isinstance(term, dict):
        parts = [scores(root, record, part, column) for part in term["mean"]]
        shared = set.intersection(*map(set, parts))
        return {seed: fmean(part[seed] for part in parts) for seed in sorted(shared)}
    model, column, *path = [term, column] if isinstance(term, str) else term
    run = record_of(file_of(root, record))
    lists = "histories" if column.startswith("history ") else "rows"
    name = column.removeprefix("history ").removeprefix("hits ").removeprefix("false alarms ")
    rows = [row for row in run.record[lists] if row["model"] == model]
    if not rows or any(name not in row for row in rows):
        raise ValueError(f"results/{record} has no {name!r} of {model!r}")
    path = path or (["mean"] if lists == "histories" else [])
    return {row["seed"]: picked(row[name], column, path)
            for row in sorted(rows, key=lambda row: row["seed"])}


def effect_of(root: Path, effect: dict) -> dict:
    """Difference of two terms, paired by seed (or the mean of one), with a 95 % interval."""
    from feedback_nb.evaluation import paired
    from scipy import stats

    column, scale = effect.get("column", "accuracy"), effect.get("scale", 1)
    if "runs" in effect:
        a, b = effect["runs"]
    else:
        of = {k: scores(root, effect.get(f"record_{k}", effect["record"]), effect[k], column)
              for k in "ab" if k in effect}
        seeds = sorted(set.intersection(*map(set, of.values())))
        a = [of["a"][seed] for seed in seeds]
        b = [of["b"][seed] for seed in seeds] if "b" in of else [0.0] * len(a)
    seal = hashlib.sha256(json.dumps([[float(f"{v:.7g}") for v in x] for x in (a, b)]).encode())
    found = paired([scale * v for v in a], [scale * v for v in b])
    power = 1 + stats.t.ppf(0.8, found.n - 1) / stats.t.ppf(0.975, found.n - 1)
    return {"n": found.n, "value": found.difference, "low": found.low, "high": found.high,
            "t": found.t, "p": found.p, "sees": (found.high - found.low) / 2 * power,
            "seal": seal.hexdigest()}


def seal_of(effects: list[dict]) -> str:
    return hashlib.sha256("".join(e["seal"] for e in effects).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- cells

def slug(heading: str) -> str:
    """The anchor that pandoc gives a heading."""
    text = re.sub(r"[^\w\s.-]", "", heading.replace("`", "").replace("*", "")).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text)) or "section"


@cache
def anchors(path: Path) -> dict[str, str]:
    """{label or heading: anchor} of a notebook; a heading that stands twice is none."""
    found, twice = {}, set()
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            if label := directives(source).get("label"):
                found[label] = label
        elif cell["cell_type"] == "markdown":
            prose = re.sub(r"^(`{3,}).*?^\1", "", source, flags=re.M | re.S)
            for heading in re.findall(r"^##+ +(.+?)\s*$", prose, re.M):
                twice |= {heading} & found.keys()
                found[heading] = slug(heading)
    return {name: anchor for name, anchor in found.items() if name not in twice}


def page_of(root: Path, cell: dict) -> str:
    """The link to a cell; ValueError when the notebook or the anchor is gone."""
    path = root / "nbs" / cell["notebook"]
    if not path.is_file():
        raise ValueError(f"the notebook {cell['notebook']} is gone")
    if cell["anchor"] not in anchors(path):
        raise ValueError(f"{cell['notebook']} has no figure or heading {cell['anchor']!r}")
    return f"{cell['notebook']}#{anchors(path)[cell['anchor']]}"


# ---------------------------------------------------------------- do they agree?

def disagreement(claim: dict, effects: list[dict]) -> str | None:
    """Why this verdict cannot stand on these numbers."""
    verdict, wanted = claim["verdict"], claim.get("expect")
    if verdict == "not measured":
        return "is not measured and has effects" if effects else None
    if not effects or wanted is None:
        return None
    first = effects[0]
    if first["n"] < FEW and verdict != "inconclusive":
        return f"stands on {first['n']} seeds: {FEW} at least"
    low, high = first["low"], first["high"]
    if isinstance(wanted, dict):
        shown, refuted = max(abs(low), abs(high)) <= wanted["within"], min(
            abs(low), abs(high)) > wanted["within"] and low * high > 0
    else:
        sign = 1 if wanted == "more" else -1
        shown, refuted = min(sign * low, sign * high) > 0, max(sign * low, sign * high) < 0
    if verdict.startswith("holds") and not shown:
        return f"cannot hold: the interval is {low:.4g} … {high:.4g}"
    if verdict == "fails" and not refuted:
        return f"does not fail: the interval is {low:.4g} … {high:.4g}"
    if verdict == "inconclusive" and (shown or refuted) and "held_back" not in claim:
        return f"is decided by the interval {low:.4g} … {high:.4g}; say why it is `held_back`"
    return None


def load(root: Path) -> dict:
    return yaml.safe_load((root / "nbs" / "claims.yaml").read_text(encoding="utf-8"))


def still_said(root: Path, claim: dict) -> list[str]:
    """Notebooks in which a withdrawn sentence stands, whatever its emphasis."""
    pieces = [piece.strip() for piece in claim["words"].replace("*", "").split("…")]
    return [path.name for path in notebooks(root) if path.name != "claims.ipynb"
            and all(piece in said(path) for piece in pieces)]


@cache
def said(path: Path) -> str:
    """The prose of a notebook, without emphasis, on one line."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = " ".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return " ".join(text.replace("*", "").split())


def faults_of(root: Path, claim: dict) -> list[str]:
    """What is wrong with one claim, its numbers, its cell and its seal."""
    faults = []
    try:
        if cell := claim.get("cell"):
            page_of(root, cell)
    except ValueError as error:
        faults.append(str(error))
    try:
        effects = [effect_of(root, effect) for effect in claim.get("effects", [])]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return [*faults, f"an effect cannot be computed: {error}"]
    if effects and claim.get("seal") != seal_of(effects):
        faults.append("the numbers are not those the verdict was made on: look again, then "
                      "run scripts/claims.py --seal")
    if "why" in claim and (back := still_said(root, claim)):
        faults.append(f"what is withdrawn still stands in {', '.join(back)}")
    if "verdict" in claim and (why := disagreement(claim, effects)):
        faults.append(f"the verdict {claim['verdict']!r} {why}")
    return faults


def check_claims(root: Path) -> list[str]:
    """Every disagreement of claims.yaml with its schema, records, cells and page."""
    if not (root / "nbs" / "claims.yaml").is_file():
        return []
    data = load(root)
    wrong = jsonschema.Draft202012Validator(SCHEMA).iter_errors(data)
    faults = []
    for error in wrong:
        at = list(error.absolute_path)
        claim = data.get(at[0], [])[at[1]] if len(at) > 1 else {}
        name = claim.get("id", at) if isinstance(claim, dict) else at
        faults.append(f"nbs/claims.yaml: {name}: {error.message[:160]}")
    if faults:
        return faults
    ids = [claim["id"] for claim in data["claims"] + data["withdrawn"]]
    faults += [f"nbs/claims.yaml: {i}: the id stands twice" for i in {*ids} if ids.count(i) > 1]
    faults += [f"nbs/claims.yaml: {claim['id']}: {fault}"
               for claim in data["claims"] + data["withdrawn"] for fault in faults_of(root, claim)]
    page = root / "nbs" / "claims.ipynb"
    same = lambda text: re.sub(r"(results/\w+)\.jsonl?", r"\1", text)
    if not faults and (not page.is_file()
                       or same(page.read_text(encoding="utf-8")) != same(notebook(root, data))):
        faults.append("nbs/claims.ipynb is not what nbs/claims.yaml gives: run scripts/claims.py")
    return faults


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


def notebook(root: Path, data: dict) -> str:
    """The page as notebook text, as nbdev_clean leaves it."""
    from execnb.nbio import nb2str
    from fastcore.xtras import loads

    papers, claims = data["papers"], data["claims"]
    counts = [f"{v} {sum(c['verdict'] == v for c in claims)}" for v in VERDICTS]
    template = Path(__file__).with_name("claims_page.html").read_text(encoding="utf-8")
    style, table, gone = template.split("<!-- part -->\n")
    option = lambda value, text: f'<option value="{value}">{text}</option>'
    fill = {"rows": "\n".join(row(root, claim, papers) for claim in claims),
            "papers": "".join(option(key, p["short"]) for key, p in papers.items()),
            "verdicts": "".join(option(v, v) for v in VERDICTS),
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


def sealed(root: Path, text: str) -> str:
    """The yaml with the seals of today's numbers."""
    data, seals = yaml.safe_load(text), {}
    for claim in data["claims"] + data["withdrawn"]:
        if claim.get("effects"):
            seals[claim["id"]] = seal_of([effect_of(root, e) for e in claim["effects"]])
    lines, out, here = text.splitlines(), [], None
    for line in lines:
        if match := re.match(r"- id: (\S+)", line):
            here = match[1]
        if re.match(r"  seal:", line):
            continue
        if re.match(r"  effects:", line):
            out.append(f"  seal: {seals[here]}")
        out.append(line)
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--seal", action="store_true")
    args = parser.parse_args()
    root = args.root.resolve()
    file = root / "nbs" / "claims.yaml"
    if args.seal:
        file.write_text(sealed(root, file.read_text(encoding="utf-8")), encoding="utf-8")
    faults = check_claims(root)
    stale = [f for f in faults if f.startswith("nbs/claims.ipynb is not")]
    if stale == faults and not args.check:
        (root / "nbs" / "claims.ipynb").write_text(notebook(root, load(root)), encoding="utf-8")
        faults = []
    print("\n".join(faults) or f"{len(load(root)['claims'])} claims agree with records and cells.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
