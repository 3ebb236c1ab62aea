"""A rendered site made small: pictures as WebP, frames of sliders as files of their own, what all
pages share in one file. And the check that it is small."""
from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from pathlib import Path

SITE, PAGE = 25e6, 1e6  # bytes: the whole site, one page
# the only line of feedback_nb.moving that knows how a frame is stored
FRAMES = 'd.frames.map(f => f ? "data:image/png;base64," + f : img.src);'
FILES = """d.frames.map(f => f || img.src);
    const ahead = () => frames.forEach(f => { new Image().src = f; });
    for (const e of ["pointerenter", "focusin"]) root.addEventListener(e, ahead, {once: true});"""


def webp(png: bytes) -> bytes:
    """The picture as WebP: without loss, but with a little where that saves much (noise)."""
    from PIL import Image

    def saved(**how) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", method=4, **how)
        return buffer.getvalue()

    image = Image.open(io.BytesIO(png))
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    exact, near = saved(lossless=True), saved(quality=88)
    return near if len(near) < 0.7 * len(exact) else exact


def inline(match: re.Match) -> str:
    """A PNG inside a page as WebP, where that is smaller."""
    png = base64.b64decode(match[1])
    small = webp(png)
    return match[0] if len(small) >= len(png) else (
        "data:image/webp;base64," + base64.b64encode(small).decode())


def stored(folder: Path, data: bytes, suffix: str) -> str:
    """The name of a file in `folder` with this content: one file, however many pages want it."""
    folder.mkdir(exist_ok=True)
    name = hashlib.sha256(data).hexdigest()[:16] + suffix
    (folder / name).write_bytes(data)
    return f"{folder.name}/{name}"


def slim(page: Path, text: str) -> str:
    """A page without what weighs and is not read: its frames and scripts become files."""
    site = page.parent
    text = re.sub(r'"(iVBORw0KGgo[A-Za-z0-9+/=]{300,})"', lambda m: json.dumps(
        stored(site / "frames", webp(base64.b64decode(m[1])), ".webp")), text)
    text = text.replace(FRAMES, FILES)
    # Quarto's own scripts are the same in all pages
    text = re.sub(r'<script id="(quarto-html-(?:before|after)-body)"[^>]*>(.*?)</script>',
                  lambda m: f'<script id="{m[1]}" src="'
                            f'{stored(site / "site_libs", m[2].encode(), ".js")}"></script>',
                  text, flags=re.S)
    # its anchor for each line of code leads nowhere, and an operator needs no colour
    text = re.sub(r'<a href="#cb\d+-\d+" aria-hidden="true" tabindex="-1"></a>', "", text)
    text = re.sub(r'<span class="op">([^<]*)</span>', r"\1", text)
    return re.sub(r'<span id="cb\d+-\d+">', "<span>", text)


def figures(site: Path) -> dict[str, str]:
    """Every figure as WebP, where that is smaller: the old name in pages and the new one."""
    renamed = {}
    for path in sorted(site.glob("*_files/figure-html/*.png")):
        small = webp(path.read_bytes())
        if len(small) < path.stat().st_size:
            path.with_suffix(".webp").write_bytes(small)
            path.unlink()
            name = path.relative_to(site).as_posix()
            renamed[name] = name.removesuffix("png") + "webp"
    return renamed


def shorter_search(site: Path) -> None:
    """The search's index: no imports, and of each section the first 2,000 characters."""
    path = site / "search.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    for entry in entries:
        lines = (re.sub(r"\s+", " ", line) for line in entry["text"].splitlines())
        entry["text"] = "\n".join(
            line for line in lines if line.strip()
            and not re.match(r" ?(import [\w. ]+$|from [\w.]+ import )", line))[:2000]
    path.write_text(json.dumps(entries, ensure_ascii=False, separators=(",", ":")),
                    encoding="utf-8")


def too_large(site: Path) -> list[str]:
    """What is above the bounds."""
    sizes = {p.relative_to(site).as_posix(): p.stat().st_size
             for p in site.rglob("*") if p.is_file()}
    faults = [f"{name} has {size / 1e6:.2f} MB, more than {PAGE / 1e6:.0f} MB"
              for name, size in sizes.items() if name.endswith(".html") and size > PAGE]
    total = sum(sizes.values())
    return faults + [f"the site has {total / 1e6:.1f} MB, more than {SITE / 1e6:.0f} MB"] * (
        total > SITE)
