"""The published site: nbdev processes the notebooks into _proc/, Quarto renders them into _docs/.

    python scripts/docs.py [--only-process]
"""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import nbdev.serve
import names
import small
import yaml
from documented import ShowSource
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from project import settings

ROOT = Path(__file__).resolve().parent.parent
GONE = """---
title: No such page
search: false
---

There is nothing at this address. Perhaps a chapter was renamed: [the
contents](/index.html#chapters) list them all, [all names](/api.html) every function and class.
"""
# Quarto adds both for any output with a script; nothing here uses them
REQUIRE = re.compile(r'<script src="https://cdn\.jsdelivr\.net/npm/(?:requirejs|jquery)[^>]*>'
                     r"</script>\s*"
                     r"|<script type=\"application/javascript\">define\('jquery'[^<]*</script>\s*")


# ---------------------------------------------------------------- before Quarto

def finish(path: Path, site: str) -> None:
    """A processed notebook: its number in its title, links within the site, small pictures."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        number = re.match(r"\d+", path.stem)
        if cell["cell_type"] == "raw" and number:
            front = yaml.safe_load(source.strip().strip("-")) or {}
            if "title" in front:
                front["title"] = f"{number[0]} {front['title']}"
                source = f"---\n{yaml.dump(front, allow_unicode=True)}---\n\n"
        if cell["cell_type"] == "markdown":  # private names have no place, methods their class's
            source = re.sub(rf"\[(`_[^`]*`)\]\({site}[^)]*\)", r"\1", source)
            source = re.sub(rf"\({site}(\w+\.html)(#[^).]*)?[^)]*\)", r"(\1\2)", source)
        cell["source"] = source.splitlines(keepends=True)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/html" in data:
                text = re.sub(r"data:image/png;base64,([A-Za-z0-9+/=]{1000,})", small.inline,
                              "".join(data["text/html"]))
                data["text/html"] = text.splitlines(keepends=True)
    path.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")


def more_pages(processed: Path) -> None:
    """The pages that are no notebooks, and what stands below every page."""
    cfg = settings(ROOT)
    head = ("---\ntitle: All names\ndescription: Every public function and class, by module, with "
            "the page that explains it.\nformat: {html: {toc-depth: 2}}\n---\n\n")
    (processed / "api.qmd").write_text(head + names.listing(ROOT), encoding="utf-8")
    (processed / "404.qmd").write_text(GONE, encoding="utf-8")
    commit = subprocess.run(["git", "log", "-1", "--format=%cs"], cwd=ROOT, capture_output=True,
                            text=True).stdout.strip() or str(date.today())
    url = cfg["git_url"]
    footer = {"left": f"{cfg['lib_name']} {cfg['version']}, {commit}",
              "right": f"[Changes]({url}/blob/{cfg['branch']}/CHANGELOG.md) · "
                       f"[Licence]({url}/blob/{cfg['branch']}/LICENSE) · [Source]({url})"}
    (processed / "site.yml").write_text(yaml.dump({"website": {"page-footer": footer}},
                                                  allow_unicode=True), encoding="utf-8")


# ---------------------------------------------------------------- after Quarto

def mend(page: Path, cfg: dict[str, str], figures: dict[str, str]) -> None:
    """No other host; `Edit` opens an editor that shows a notebook as one; small."""
    text = REQUIRE.sub("", page.read_text(encoding="utf-8"))
    text = text.replace(f"{cfg['git_url']}/edit/{cfg['branch']}/",
                        cfg["git_url"].replace("//github.com", "//github.dev")
                        + f"/blob/{cfg['branch']}/")
    text = re.sub(r'(?<=src=")[^"]+', lambda m: figures.get(m[0], m[0]), small.slim(page, text))
    page.write_text(text, encoding="utf-8")


def main() -> int:
    quarto = shutil.which("quarto")
    if not quarto and "--only-process" not in sys.argv:
        print("make docs needs Quarto, which is not on the PATH: install it from "
              "https://quarto.org/docs/get-started/ or by `pip install quarto-cli`, and run make "
              "docs again (make book needs nothing more).")
        return 1
    refresh_quarto_yml()
    nbdev.serve.FilterDefaults = ShowSource
    processed, cfg = nbdev.serve.proc_nbs(n_workers=2, force=True), settings(ROOT)
    site = re.escape(cfg["doc_host"].rstrip("/") + "/" + cfg["doc_baseurl"].strip("/") + "/")
    for path in processed.glob("*.ipynb"):
        finish(path, site)
    more_pages(processed)
    if "--only-process" in sys.argv:
        return 0
    done = subprocess.run([quarto, "render", "--no-cache"], cwd=processed)
    if done.returncode:
        return done.returncode
    made, docs = processed / get_config().doc_path.name, ROOT / get_config().doc_path.name
    figures = small.figures(made)
    for page in made.glob("*.html"):
        mend(page, cfg, figures)
    small.shorter_search(made)
    faults = small.too_large(made)
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(made, docs)
    print(f"The site is in {docs.relative_to(ROOT)}/index.html.")
    for fault in faults:
        print(f"FAULT: {fault}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
