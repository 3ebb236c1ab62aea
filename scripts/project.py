"""What the project consists of: its notebooks, its settings, the directives of a cell."""
from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

import yaml


def notebooks(root: Path) -> list[Path]:
    """The chapters in the order of their numbers, the index first."""
    found = [p for p in (root / "nbs").glob("*.ipynb") if p.name[0] not in "._"]
    return sorted(found, key=lambda p: (p.stem != "index", p.name))


def settings(root: Path) -> dict[str, str]:
    """The values of settings.ini."""
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def directives(source: str) -> dict[str, str]:
    """The `#| name value` lines that a cell begins with."""
    found = {}
    for line in source.splitlines():
        if match := re.match(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)", line):
            found[match[1]] = match[2].strip()
        elif line.strip():
            break
    return found


def split(source: str) -> tuple[dict, str]:
    """Quarto's options at the top of a cell, and the code below them."""
    lines, options = source.splitlines(), []
    while lines and (not lines[0].strip() or re.match(r"\s*#\s*\|", lines[0])):
        line = re.sub(r"^\s*#\s*\|\s?", "", lines.pop(0))
        if re.match(r"[\w-]+\s*:", line):
            options.append(line)
    found = {}
    for line in options:
        try:
            found |= yaml.safe_load(line) or {}
        except yaml.YAMLError:
            name, _, value = line.partition(":")
            found[name.strip()] = value.strip()
    return found, "\n".join(lines)
