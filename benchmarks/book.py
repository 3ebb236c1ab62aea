"""How long the book takes: to find that nothing has changed, and to execute it.

A second `make book` has 10 seconds. The executed copies in _book/notebooks carry the seconds that
each of them took. Nothing is executed here: where there is no book, or a notebook has changed, a
row says so; `--build` makes the book first.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from _shared import record, show

ROOT, BOUND = Path(__file__).resolve().parent.parent, 10  # seconds
AGAIN = """import sys
sys.path[:0], sys.argv = [{scripts!r}], ["book.py", "--root", {root!r}]
import book
kept = book.kept
book.kept = lambda path, *rest: kept(path, *rest) or sys.exit(path.name + " changed: make book")
sys.exit(book.main())"""


def again(root):
    """Seconds of a build that may execute nothing, and what stopped it."""
    code = AGAIN.format(scripts=str(ROOT / "scripts"), root=str(root))
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return time.perf_counter() - begun, done.returncode and (done.stderr or done.stdout)


def executed(root):
    """{notebook: seconds} of the executed copies."""
    copies = sorted((root / "_book" / "notebooks").glob("*.ipynb"))
    notes = {path.stem: json.loads(path.read_text(encoding="utf-8"))["metadata"] for path in copies}
    return {name: about["book"]["seconds"] for name, about in notes.items() if "book" in about}


def rows(root):
    """The second build, and the seconds of all notebooks and of the slowest."""
    took = executed(root)
    if not took:
        yield {"measured": "the book", "missing": "no book: make book, or --build"}
        return
    again(root)  # pages that changed are written now
    seconds, stopped = again(root)
    if stopped:
        yield {"measured": "the book", "missing": stopped.strip().splitlines()[-1]}
    else:
        yield {"measured": "make book, nothing changed", "seconds": seconds,
               f"times {BOUND} seconds": seconds / BOUND, "bound": 1.0}
    slowest = max(took, key=took.get)
    yield {"measured": f"execution of {len(took)} notebooks, one after the other",
           "seconds": sum(took.values())}
    yield {"measured": f"execution of the slowest, {slowest}", "seconds": took[slowest]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="make the book first")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project (default: this one)")
    parser.add_argument("--record", type=Path,
                        help="write the rows to this JSON file (results/bench_book.json)")
    args = parser.parse_args(argv)
    args.device, args.root = "cpu", args.root.resolve()
    if args.build:
        make = [sys.executable, str(ROOT / "scripts" / "book.py"), "--root", str(args.root)]
        subprocess.run(make, check=True)
    table = list(rows(args.root))
    for row in table:
        show(row)
    if args.record:
        record(args.record, args, (), table)


if __name__ == "__main__":
    main()
