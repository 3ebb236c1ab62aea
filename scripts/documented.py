"""nbdev's processing of a notebook for reading: the site and the offline book share it."""
from __future__ import annotations

import ast
import html
import re

import yaml
from execnb.nbio import mk_cell
from nbdev.processors import FilterDefaults

# nbdev's own steps for signature tables: here the source is shown, once
TABLES = ("add_show_docs", "exec_show_docs", "clean_show_doc", "add_fold", "mv_exports")
PLUMBING = {"use_style", "warnings.filterwarnings", "set_matplotlib_formats"}
HEADS = {
    "p_holm": "p (Holm)", "p_shared": "p (shared)", "p_shared_holm": "p (shared, Holm)",
    "welch_p": "p (Welch)", "wilcoxon_p": "p (Wilcoxon)", "std": "standard deviation",
    "diff_low": "difference from", "diff_high": "difference to", "d_z": "d<sub>z</sub>",
    "false_alarms": "false alarms", "a_prime": "A′", "above_biased": "above biased",
    "above_cut_biased": "above cut biased", "found_more": "found more",
    "mflops_ratio": "MFLOPs, ratio", "parameters_ratio": "parameters, ratio",
    "saved_mb_ratio": "saved MB, ratio", "saved_mb": "saved MB", "peak_mb": "peak MB",
    "peak_mb_ratio": "peak MB, ratio", "train_ms_ratio": "time of a training step, ratio",
    "forward_ms_ratio": "time forward, ratio", "train_loss": "training loss",
    "valid_loss": "validation loss", "train_accuracy": "training accuracy",
    "valid_accuracy": "validation accuracy",
    "accuracy_0": "accuracy, t = 0", "accuracy_1": "accuracy, t = 1",
    "accuracy_2": "accuracy, t = 2", "gaussian_blur": "Gaussian blur", "fgsm_area": "area, FGSM",
    "pgd_area": "area, PGD", "detectable": "smallest to be found",
    "smallest visible": "smallest to be found", "could see": "smallest to be found",
    "within": "surely less than", "r": "correlation of pairs", "ece": "calibration error",
    "brier": "Brier score", "pgd": "PGD", "fgsm": "FGSM", "bp": "backpropagation",
    "caps": "CAPs", "full": "CAPs-full", "mflops": "MFLOPs", "lr": "learning rate",
    "sigma": "σ", "epsilon": "ε", "crossed_interval": "seeds and examples", "iou": "IoU",
    "low": "95 % from", "high": "95 % to", "own_backward": "backward pass of its own",
    "any_size": "any size", "double_backward": "second derivatives", "fullgraph": "compiles whole",
    "f1@1": "F1, σ = 1", "f1@2": "F1, σ = 2", "collapsed@1": "collapsed, σ = 1",
    "collapsed@2": "collapsed, σ = 2", "f1@1 as in training": "F1, σ = 1, as in training",
    "f1@2 as in training": "F1, σ = 2, as in training", "dice@0": "Dice", "iou@0": "IoU",
    "boundary@0": "F1 of the boundary", "ece@0": "calibration error",
    "dice@0.1": "Dice, σ = 0.1", "picard": "plain steps", "anderson": "Anderson"}
LOW = re.compile(r"(diff_)?low(, .*)?$")  # a column that is followed by one with high
CELL = re.compile(r"<t[dh][^>]*>[^<]*</t[dh]>\s*")
CELLS = {"NaN": "–", "nan": "–", "None": "–", "NaT": "–", "&lt;NA&gt;": "–", "inf": "∞",
         "True": "yes", "False": "no"}


class ShowSource(FilterDefaults):
    """nbdev's processing, but exported code is shown: in this book the code is the point."""

    def __call__(self, nb):
        cells = []
        for cell in nb.cells:
            if cell.cell_type == "code":
                names = exported_names(cell.source)
                cell.source, caption = captioned(show_source(cell.source), cell.get("id", ""))
                for output in cell.get("outputs", []):
                    readable(output.get("data", {}), caption)
                if names and not re.search(r"^#\|\s*hide\b", cell.source, flags=re.M):
                    cells.append(mk_cell("".join(f"[]{{#{name.lower()} .exported}}"
                                                 for name in names), "markdown"))
            else:
                cell.source = badges(cell.source)
            cells.append(cell)
        nb.cells = folded(cells)
        return super().__call__(nb)

    def base_procs(self):
        return [proc for proc in super().base_procs() if proc.__name__ not in TABLES]


def show_source(source: str) -> str:
    """A cell flagged `export` is flagged `exports`: nbdev then shows its code."""
    return re.sub(r"^(\s*#\s*\|\s*)export(?=\s|$)", r"\1exports", source, flags=re.M)


def captioned(source: str, name: str) -> tuple[str, str]:
    """A cell with a caption for its table, `#| tbl-cap: …`, and the label that numbers it. Below a
    labelled figure, which Quarto counts, the table itself gets the caption, the second value."""
    caption = re.search(r"^#\|\s*tbl-cap:\s*(.+)\n?", source, flags=re.M)
    label = re.search(r"^#\|\s*label:\s*(\w+)", source, flags=re.M)
    if not caption or label and label[1] == "tbl":
        return source, ""
    if label:
        return source.replace(caption[0], ""), yaml.safe_load(caption[1])
    return f"#| label: tbl-{name}\n{source}", ""


def parsed(source: str) -> list[ast.stmt]:
    """The statements of a cell; none of a cell that is not plain Python."""
    try:
        return ast.parse(source).body
    except SyntaxError:
        return []


def exported_names(source: str) -> list[str]:
    """The public functions and classes of an exported cell: links lead to them."""
    if not re.search(r"^\s*#\s*\|\s*exports?\s*$", source, flags=re.M):
        return []
    return [s.name for s in parsed(source)
            if isinstance(s, (ast.FunctionDef, ast.ClassDef)) and s.name[0] != "_"]


# ---------------------------------------------------------------- what a reader need not see first

def plumbing(source: str) -> bool:
    """Is this cell nothing but imports, names that are handed on, and the style of the figures?"""
    statements = parsed(source)
    imports = any(isinstance(s, (ast.Import, ast.ImportFrom)) for s in statements)
    names = any(ast.unparse(s).startswith("_all_ =") for s in statements)
    return (imports or names) and all(
        isinstance(s, (ast.Import, ast.ImportFrom)) or ast.unparse(s).startswith("_all_ =")
        or isinstance(s, ast.If) and "TYPE_CHECKING" in ast.unparse(s.test)
        or isinstance(s, ast.Expr) and isinstance(s.value, ast.Call)
        and ast.unparse(s.value.func) in PLUMBING for s in statements)


def folded(cells: list) -> list:
    """Cells of imports fold, and what stands side by side folds into one."""
    out, before = [], None
    for cell in cells:
        code = cell.cell_type == "code" and cell.source
        if not code or "outputs" in cell and cell.outputs or not plumbing(cell.source) \
                or re.search(r"^#\|\s*(hide|include: false|echo: false)", cell.source, flags=re.M):
            out.append(cell)
            if not (code and re.search(r"^#\|\s*(hide\b|default_exp)", cell.source, flags=re.M)):
                before = None
            continue
        lines = [line for line in cell.source.splitlines()
                 if not re.match(r"#\|\s*code-(fold|summary)", line)]
        if before is None:
            cell.source = "\n".join(["#| code-fold: true", '#| code-summary: "Imports"', *lines])
            before = cell
            out.append(cell)
        else:
            before.source += "\n\n" + "\n".join(x for x in lines if not x.startswith("#|")).strip()
    return out


# ---------------------------------------------------------------- words and pictures

def badges(source: str) -> str:
    """A badge is a picture from another host: its words do."""
    return re.sub(r"!\[([^\]]*)\]\(https?://[^)\s]*badge[^)\s]*\)", r"\1", source)


def worded(head: str, otherwise: str = "") -> str:
    """The head of a column in words, also of one variable of several: `a_prime, gain 1`."""
    first, comma, rest = head.partition(", ")
    return HEADS.get(head) or (HEADS[first] + comma + rest if "_" in first and first in HEADS
                               else otherwise or head)


def joined(match: re.Match) -> str:
    """A table with every interval beside its value, `a (b, c)`: two columns less to scroll to."""
    table = match[0]
    words = lambda cell: html.unescape(re.sub("<[^>]+>", "", cell)).strip()
    heads = [words(cell) for cell in CELL.findall(table.partition("</tr>")[0])]
    at = [i - len(heads) for i in range(len(heads) - 2) if heads[i] and LOW.match(heads[i + 1])
          and heads[i + 2] == heads[i + 1].replace("low", "high")]
    if not at or "colspan" in table or len(CELL.findall(table)) != len(
            re.findall(r"<t[dh][\s>]", table)):
        return table

    def row(match: re.Match) -> str:
        cells = CELL.findall(match[2])  # counted from the right: a head may span rows
        for i in reversed([len(cells) + i for i in at]):
            value, low, high = map(words, cells[i:i + 3])
            if "<th" in cells[i]:
                value = f"{worded(value)} (95 % interval)" if value else ""
            elif "NaN" not in (low, high):
                value = f"{value} ({low},\u00a0{high})"
            start = cells[i].partition(">")[0]
            cells[i:i + 3] = [f"{start}>{html.escape(value)}</t{start[2]}>"]
        return match[1] + "".join(cells) + match[3]

    return re.sub(r"(<tr[^>]*>\s*)(.*?)(</tr>)", row, table, flags=re.S)


def readable(data: dict, caption: str = "") -> None:
    """Tables in words: no column named like a variable, a dash where there is no number."""
    if "text/html" not in data or "<table" not in (
            text := "".join(data["text/html"])) or "<script" in text and "dataframe" not in text:
        return
    text = re.sub(r"<table.*?</table>", joined, text, flags=re.S)
    text = re.sub(r"(<th[^>]*>)([^<]*)(</th>)",
                  lambda m: m[1] + worded(m[2].strip(), m[2]) + m[3], text)
    text = re.sub(r"<th>\s*</th>", "<td></td>", text)  # a head without words is none
    if caption:
        text = re.sub(r"(<table[^>]*>)", rf"\1<caption>{html.escape(caption)}</caption>", text,
                      count=1)
    data["text/html"] = re.sub(
        r"(<td[^>]*>)([^<]*)(</td>)",
        lambda m: m[1] + CELLS.get(m[2].strip(), m[2]) + m[3], text)
