"""The claims of nbs/claims.yaml: checked against their records and cells, and shown as a page.

    python scripts/claims.py            write nbs/claims.ipynb
    python scripts/claims.py --check    name what does not agree; write nothing
    python scripts/claims.py --seal     after a verdict was looked at again: note the numbers it
                                        was made on (`seal`), then write the page

No effect is typed in the file: it names a record, rows and columns, and is computed here. A seal is
a hash of just those numbers, so it does not depend on how results/ stores them.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from functools import cache
from pathlib import Path

import jsonschema
import yaml
from claims_numbers import effect_of, page_of, seal_of
from claims_page import notebook
from project import notebooks

SCHEMA = json.loads(Path(__file__).with_name("claims_schema.json").read_text(encoding="utf-8"))
VERDICTS = SCHEMA["$defs"]["verdict"]["enum"]
FEW = 5  # seeds that a verdict needs


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
    there = page.read_text(encoding="utf-8") if page.is_file() else ""
    if not faults and same(there) != same(notebook(root, data, VERDICTS)):
        faults.append("nbs/claims.ipynb is not what nbs/claims.yaml gives: run scripts/claims.py")
    return faults


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
        (root / "nbs" / "claims.ipynb").write_text(notebook(root, load(root), VERDICTS),
                                                 encoding="utf-8")
        faults = []
    print("\n".join(faults) or f"{len(load(root)['claims'])} claims agree with records and cells.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
