"""From the cells of a notebook to pandoc's markdown: figures, tables and formulas with numbers."""
from __future__ import annotations

import base64
import html
import mimetypes
import re
from pathlib import Path
from urllib.parse import unquote

from project import split

KINDS = {"fig": "Figure", "tbl": "Table", "eq": "Equation", "sec": "Section"}


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
        marks = f' id="{label}"' * bool(label) + f' class="{classes}"' * bool(classes)
        name = self.number(label) + ": " if label else ""
        if text := name + caption:
            text = self.raw("<figcaption>") + text + self.raw("</figcaption>")
        return self.raw(f"<figure{marks}>") + inside + text + self.raw("</figure>")

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
        source = target if target.startswith("data:") else self.image(target)
        image = f'<img src="{source}" alt="{html.escape(alt[1] if alt else caption)}"{style}>'
        if not label:
            self.aside.append(image)
            return f"`<!--aside {len(self.aside) - 1}-->`{{=html}}"
        return self.figure(label[1], caption, self.raw(image))

    # -------- code cells

    def code(self, cell: dict) -> str:
        (options, source), out = split(cell.source), ""
        if options.get("include") is False:
            return out
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
            kinds = ("image/svg+xml", "image/png", "image/jpeg")
            if image := next((t for t in kinds if t in data), None):
                shown += self.raw(picture_of(image, joined(data[image]), alt, output))
            elif "text/html" in data:
                page = joined(data["text/html"])
                moving = "<script" in page or "<img" in page or "<svg" in page
                if options.get("tbl-cap") and "<table" in page:
                    text += self.table(options, self.raw(f'<div class="scroll">{page}</div>'))
                elif moving and (options.get("label") or options.get("fig-cap")):
                    shown += self.raw(page)
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
    return "".join(text)


def plain(text: str) -> str:
    """Terminal text without colours, with the last state of each line that was overwritten."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")).rstrip()


def fence(text: str, kind: str) -> str:
    if not text.strip():
        return ""
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"\n\n{ticks} {{.{kind}}}\n{text.strip(chr(10))}\n{ticks}\n\n"


def picture_of(kind: str, data: str, alt: str, output: dict) -> str:
    """An <img> of the size the notebook shows it in; SVG is an image too, so that no ids clash."""
    size = (output.get("metadata") or {}).get(kind) or {}
    width = f' width="{size["width"]}"' if isinstance(size, dict) and "width" in size else ""
    if kind == "image/svg+xml":
        data = base64.b64encode(data.encode()).decode()
    return f'<img src="data:{kind};base64,{"".join(data.split())}" alt="{html.escape(alt)}"{width}>'
