"""nbs/references.bib: every entry can be found by its reader, every key that is cited is there."""
from __future__ import annotations

import json
import re
from pathlib import Path

from project import notebooks

CROSS = ("fig-", "tbl-", "eq-", "sec-", "lst-")  # Quarto's own references to parts of a page


def entries(text: str) -> list[tuple[str, dict[str, str]]]:
    """(key, fields) of every entry of a .bib file."""
    found = []
    for entry in re.split(r"^@", text, flags=re.M)[1:]:
        key = re.match(r"\w+\{([^,\s]+),", entry)
        fields = re.findall(r"(?:^|,)\s*(\w+)\s*=\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}",
                            entry, flags=re.M)
        found.append((key[1] if key else entry[:40], dict(fields)))
    return found


def cited(source: str) -> list[str]:
    """The keys that a markdown cell cites; code, addresses and Quarto's labels are no citations."""
    source = re.sub(r"^(`{3,}|~{3,}).*?^\1|`[^`\n]*`", "", source, flags=re.M | re.S)
    keys = re.findall(r"(?<![\w`/@.\\])@([A-Za-z][\w:-]*\w)", source)
    return [key for key in keys if not key.startswith(CROSS)]


def check_references(root: Path) -> list[str]:
    """What cannot be found: entries without an address, keys that stand twice or nowhere."""
    path = root / "nbs" / "references.bib"
    known = entries(path.read_text(encoding="utf-8")) if path.is_file() else []
    keys = [key for key, _ in known]
    faults = [f"nbs/references.bib: {key} stands twice" for key in {*keys} if keys.count(key) > 1]
    faults += [f"nbs/references.bib: {key} has no title" for key, e in known if "title" not in e]
    faults += [f"nbs/references.bib: {key} has no doi, eprint or url"
               for key, fields in known if not {"doi", "eprint", "url"} & fields.keys()]
    for notebook in notebooks(root):
        for i, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"], 1):
            if cell["cell_type"] == "markdown":
                faults += [f"nbs/{notebook.name} cell {i} cites @{key}, which is not in "
                           "nbs/references.bib" for key in cited("".join(cell["source"]))
                           if key not in keys]
    return faults
