"""What a claim of nbs/claims.yaml points at: numbers out of records, anchors of cells."""
from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from statistics import fmean

from project import directives


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
