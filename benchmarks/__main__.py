"""All benchmarks, one after the other, and one table of every ratio beside its bound.

    make bench                     everything, as recorded in results/ (an hour on an idle machine)
    make bench CHECK=1             fails when a ratio is above its bound
    python benchmarks --only cbl unet -- --rounds 2     some, with options of their own

Figures of speed are worth something on an idle machine only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _shared import facts

HERE = Path(__file__).resolve().parent
PARTS = [path.stem for path in sorted(HERE.glob("[a-z]*.py")) if path.stem != "predictive_jpc"]
NAMES = ("network", "grows with", "motif", "training", "method", "measured", "what", "step", "flow",
         "adapter", "inference")


def bounded(part: str, row: dict) -> dict | None:
    """What is measured, the ratio and its bound, of a row that has one."""
    if row.get("bound") is None:
        return None
    ratios = [key for key in row if key.startswith("times ")]
    key = next((key for key in ratios if key != "times one pass"), None)
    if key is None:
        raise KeyError(f"{part}.py: a row with a bound has no column 'times …': {list(row)}")
    names = [str(row[name]) for name in NAMES if name in row]
    return {"benchmark": part, "what": ", ".join(names), "ratio of": key.removeprefix("times "),
            "ratio": row[key], "bound": row["bound"]}


def run(part: str, options: list[str]) -> list[dict]:
    """The rows with a bound of one benchmark, which prints its own table meanwhile."""
    print(f"== benchmarks/{part}.py", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / f"{part}.py"), "--record", str(record), *options]
        subprocess.run(command, check=True)
        rows = json.loads(record.read_text())["rows"]
    busy = os.getloadavg()[0]  # 1 is this benchmark alone
    return [row | {"load": busy} for row in (bounded(part, row) for row in rows) if row]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="NAME")
    parser.add_argument("--check", action="store_true", help="fail when a bound is broken")
    parser.add_argument("--json", type=Path,
                        help="write the table to this file: results/bench.json is page 73's")
    parser.add_argument("options", nargs="*", help="after --: for every benchmark that is run")
    args = parser.parse_args(argv)
    rows = [row for part in args.only for row in run(part, args.options)]
    wide = max((len(row["what"]) for row in rows), default=0)
    print(f"\n{'benchmark':<11}{'what':<{wide + 2}}{'ratio':>7}{'bound':>7}  of")
    broken = 0
    for row in rows:
        over = row["ratio"] > row["bound"]
        broken += over
        print(f"{row['benchmark']:<11}{row['what']:<{wide + 2}}{row['ratio']:>7.2f}"
              f"{row['bound']:>7.2f}  {row['ratio of']}{'   ABOVE ITS BOUND' * over}")
    print(f"{len(rows)} ratios, {broken} above their bound")
    if args.json:
        where = "cuda" if torch.cuda.is_available() else "cpu"
        args.json.write_text(json.dumps(facts(where) | {"rows": rows}, indent=1) + "\n")
    return int(args.check and broken > 0)


if __name__ == "__main__":
    sys.exit(main())
