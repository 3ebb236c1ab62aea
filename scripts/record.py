"""What is recorded, what is stale, and the recorder that makes it again (nbs/97_records.ipynb).

    make record                              what there is, what is stale, hours per chapter
    make record CHAPTER=31 DRY_RUN=1         the queue of a chapter, with estimated minutes
    make record CHAPTER=31 HOURS=2 JOBS=2    work it off, in processes with THREADS=1 threads
    make record ONLY='31_*/LRM/0'            chosen runs, FILE/MODEL/SEED; what is of today's
                                             code already is made again and compared
    make record CHAPTER=31 ACCEPT=1          the cheapest stale run again: do the numbers agree?
    make record TIER=gpu MINUTES=9 JOBS=8    the cells flagged gpu, in the order of their `queue`;
                                             TIER=page: the same cells in miniature, kept nowhere
"""
from __future__ import annotations

import __future__

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from fnmatch import fnmatchcase
from pathlib import Path

from project import notebooks

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, RESULTS = ROOT / "feedback_nb", ROOT / "results"
sys.path.insert(0, str(ROOT))  # the package of this checkout, whatever is installed
from feedback_nb import records  # noqa: E402
from feedback_nb.files import locked  # noqa: E402
from feedback_nb.sources import Cell, names, recording_cells  # noqa: E402

STATES = "missing", "of other code", "recorded before digests", "done"
TIMES = "train_seconds", "test_seconds", "wall_seconds"


# ---------------------------------------------------------------- what there is

def cells_of(chapter: str, tier: str) -> list[Cell]:
    """The cells to run, those of the smallest `#| queue` first; sized ones run in every tier."""
    found = [cell for path in notebooks(ROOT) for cell in recording_cells(path, PACKAGE)
             if path.stem.startswith(chapter)]
    sized = lambda cell: any("at_tier" in names(s).takes for s in cell.above + cell.code)
    return sorted((cell for cell in found if cell.tier == tier or sized(cell) and tier != "cpu"),
                  key=lambda cell: cell.queue)


def show() -> None:
    """A line for each file, hours per chapter, and the cells that have recorded nothing yet."""
    hours, seen = defaultdict(float), set()
    print(f"{'record':<24}{'runs':>5}{'in order':>9}{'hours':>7}{'min/run':>8}  what is not")
    for path in records.record_files(RESULTS):
        lines = records.read_lines(path)
        record = records.as_record(lines, lines[-1])
        cost = [line["row"]["wall_seconds"] * line["made"]["threads"] / 3600 for line in lines]
        hours[path.stem.partition("_")[0]] += sum(cost)
        seen |= {line["made"].get("digest") for line in lines}
        fine = sum(not records.against(record["made"][row["made"]]) for row in record["rows"])
        print(f"{path.stem:<24}{len(record['rows']):>5}{fine:>9}{sum(cost):>7.2f}"
              f"{60 * statistics.median(cost):>8.1f}  {records.mark(record).partition(': ')[2]}")
    print("\ncore-hours per chapter: " + ", ".join(f"{k} {v:.2f}" for k, v in hours.items())
          + f"; in all {sum(hours.values()):.2f}")
    never = [f"{cell.notebook} cell {cell.number} ({cell.tier})" for tier in ("cpu", "gpu")
             for cell in cells_of("", tier) if cell.tier == tier and cell.digest not in seen]
    print(f"cells without a run of today's code: {len(never)}\n  " + "\n  ".join(never))


def stale(root: Path) -> dict[str, int]:
    """{file: runs that something speaks against}, for the budget of `make check`."""
    found = {}
    for path in records.record_files(root / "results"):
        lines = records.read_lines(path)
        record = records.as_record(lines, lines[-1])
        found[f"results/{path.name}"] = sum(
            bool(records.against(record["made"][row["made"]])) for row in record["rows"])
    return found


# ---------------------------------------------------------------- in the process of one cell

def seconds_of(lines: list[dict], model: str) -> float | None:
    """What a run of a model takes, from those that are recorded; None if nothing is known."""
    cost = {line["model"]: [] for line in lines}
    for line in lines:  # of a run that was resumed, wall_seconds is the last part alone
        cost[line["model"]].append(max(line["row"]["wall_seconds"], line["row"]["train_seconds"]))
    known = cost.get(model) or [s for several in cost.values() for s in several]
    return statistics.median(known) if known else None


def name_of(file: str, line: dict) -> str:
    """FILE/MODEL/SEED, as ONLY= has it."""
    return f"{file}/{line['model']}/{line['seed']}"


def runs_named(folder: Path, name: str) -> list[dict]:
    """The lines of one run, the latest last."""
    file = name.partition("/")[0]
    return [line for line in records.read_lines(folder / file) if name_of(file, line) == name]


def differences(old: dict, new: dict) -> list[str]:
    """Where the numbers of two lines differ; times may."""
    plain = lambda line: {**{k: v for k, v in line["row"].items() if k not in TIMES},
                          **{f"history {k}": v for k, v in line["history"].items()
                             if k != "seconds"}}
    a, b = plain(old), plain(new)
    return [f"{k} was {a.get(k)!r}, is {b.get(k)!r}"[:200] for k in {**a, **b}
            if a.get(k) != b.get(k)]


def tell(what) -> None:
    """A line for the recorder, which reads what this process prints."""
    print("\n" + json.dumps({"job": what}), flush=True)


class Job:
    """One cell in this process: plans its runs, or makes those that are asked for."""

    def __init__(self, cell: Cell, only, plan=False, share=(0, 1), deadline=float("inf"),
                 folder=None):
        self.cell, self.only, self.plan, self.share = cell, only, plan, share
        self.deadline, self.began, self.called = deadline, time.time(), False
        self.before = {}  # the runs that are made again, as they are recorded
        dirty = subprocess.run(["git", "status", "--porcelain", "--", "feedback_nb",
                                f"nbs/{cell.notebook}.ipynb"], cwd=ROOT, capture_output=True)
        stamp = {"notebook": cell.notebook, "digest": cell.digest}
        stamp |= {"dirty": True} if dirty.stdout else {}
        folder = folder and Path(folder)
        records.recorder = records.Recorder(lambda *_: [], stamp, self.after, folder)
        parts = [part for s in [*cell.above, *cell.code] for part in ast.walk(s)]
        self.resumes = any(getattr(part, "arg", "") == "checkpoints" for part in parts)

    def choose(self, path: Path, record: dict, runs: list) -> list:
        """Which of the runs that the cell wants are made; a plan prints them and makes none."""
        file, self.called = records.results_file(path), True
        lines = records.read_lines(file)
        same = {(line["model"], line["seed"]): line for line in lines
                if all(line[k] == record[k] for k in ("data", "settings"))}
        other = {(line["model"], line["seed"]) for line in lines}
        todo = []
        for model, seed in runs:
            name, line = f"{file.stem}/{model}/{seed}", same.get((model, seed))
            made = line["made"] if line else {"digest": None}
            state = STATES[0] if not line else STATES[2] if "digest" not in made else (
                STATES[3] if made["digest"] == self.cell.digest else STATES[1])
            if not any(fnmatchcase(name, pattern) or name == pattern for pattern in self.only):
                continue
            guess = self.cell.minutes and 60 * self.cell.minutes
            seconds = seconds_of(lines, model) or guess
            run = {"name": name, "state": state, "seconds": seconds, "net": record["models"][model]}
            run["guess"] = not lines
            if self.plan:
                if not line and (model, seed) in other:
                    run["note"] = "other data or settings"
                tell({"run": run})
            elif records.recorder.folder or state != "done":
                todo.append((STATES.index(state), (model, seed), seconds or 0))
                self.before[model, seed] = line
        todo = sorted(todo, key=lambda item: item[0])[self.share[0]::self.share[1]]
        fit = [run for _, run, seconds in todo if time.time() + seconds < self.deadline]
        # what is too long for any piece is made in several, from checkpoint to checkpoint
        return fit or [run for _, run, _ in todo[:1] if self.resumes]

    def after(self) -> None:
        """Called when a run is written: says so, and ends when there is no time for another."""
        now, self.began = self.began, time.time()
        tell(f"a run of {self.began - now:.0f} s")
        if self.began + (self.began - now) > self.deadline:
            raise SystemExit(0)

    def run(self) -> None:
        """The statements that the cell needs, then the cell, a statement at a time."""
        space = {"__name__": "__main__", "display": lambda *shown, **options: None}
        flags, file = __future__.annotations.compiler_flag, f"{self.cell.notebook}.ipynb"
        for statement in [*self.cell.above, None, *self.cell.code]:
            if statement is None:
                records.recorder.choose = self.choose
                continue
            code = compile(ast.Module([statement], []), file, "exec", flags)
            try:
                exec(code, space)
            except Exception as error:
                if not self.called:  # what shows all runs may fail as long as some are missing
                    raise
                if not self.plan:
                    tell(f"{type(error).__name__}: {error}"[:200])


def child(job: dict) -> None:
    """A cell in a fresh process that ends when the recorder does, however that ends."""
    def leave(parent: int):
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=leave, args=(os.getppid(),), daemon=True).start()
    import matplotlib
    import torch

    matplotlib.use("Agg")
    torch.set_num_threads(job.pop("threads"))
    os.chdir(ROOT / "nbs")
    path, number = ROOT / "nbs" / f"{job.pop('notebook')}.ipynb", job.pop("number")
    cell = next(cell for cell in recording_cells(path, PACKAGE) if cell.number == number)
    Job(cell, **job).run()


# ---------------------------------------------------------------- the recorder

def start(cell: Cell, args, **job) -> subprocess.Popen:
    """A process for one cell."""
    job |= {"notebook": cell.notebook, "number": cell.number, "threads": args.threads}
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "FEEDBACK_NB_TIER": args.tier}
    return subprocess.Popen([sys.executable, __file__, "--job", json.dumps(job)], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def listen(process: subprocess.Popen) -> list[dict]:
    """What a process says of its runs, as JSON; the rest is shown when it fails."""
    said, rest = [], []
    for line in process.stdout:
        try:
            said.append(json.loads(line)["job"])
            if isinstance(said[-1], str):
                print(f"    {said[-1]}", flush=True)
        except (ValueError, KeyError, TypeError):
            rest.append(line)
    if process.wait() > 0:
        print("".join(rest[-40:]), flush=True)
    return said


def plan(cell: Cell, args) -> list[dict] | None:
    """The runs of a cell that are asked for, with their state and what they take; or None."""
    process = start(cell, args, only=args.only, plan=True)
    runs = [said["run"] for said in listen(process) if isinstance(said, dict)]
    if process.returncode:
        print(f"{cell.notebook}, cell {cell.number}, cannot be planned here", flush=True)
        return None
    return runs


def work(cell: Cell, args, deadline: float, **job) -> None:
    """Make the runs of a cell in several processes, until they are made or the time is over."""
    shares = [start(cell, args, share=(i, args.jobs), deadline=deadline, **job)
              for i in range(args.jobs)]
    watch = threading.Timer(max(0, deadline - time.time()), lambda: [p.kill() for p in shares])
    listeners = [threading.Thread(target=listen, args=(process,)) for process in shares]
    try:
        for part in (*listeners, *([watch] if deadline < float("inf") else [])):
            part.daemon = True
            part.start()
        for listener in listeners:
            listener.join()
    finally:
        watch.cancel()
        for process in shares:
            process.kill()


def again(cell: Cell, args, runs: list[dict], deadline: float) -> dict[str, list[str] | None]:
    """{run: how it differs from the recorded one}, made once more and kept nowhere."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        work(cell, args, deadline, only=[run["name"] for run in runs], folder=folder)
        for run in runs:
            mine, there = (runs_named(at, run["name"]) for at in (Path(folder), RESULTS))
            fresh = mine and (args.tier == "page" or not there)  # there is nothing to compare
            found[run["name"]] = (["made"] if fresh else differences(there[-1], mine[-1])
                                  ) if mine else None
    for name, differs in found.items():
        print(f"  {name}: " + ("was not made" if differs is None else "; ".join(differs)
                               or "all numbers as recorded, to the last digit"))
    return found


def made_now(cell: Cell, name: str) -> bool:
    """Is the last recorded run of this name of today's code?"""
    lines = runs_named(RESULTS, name)
    return bool(lines) and lines[-1]["made"].get("digest") == cell.digest


def accept(cell: Cell, runs: list[dict], by: str) -> None:
    """Take stale runs to be of today's code, since one of them gave the same numbers again."""
    stamp = {"notebook": cell.notebook, "digest": cell.digest,
             "checked": f"{by} made again at {records.code_state()['commit']}"}
    named = {run["name"]: run for run in runs}
    for file in {name.split("/", 1)[0] for name in named}:
        with locked(RESULTS):
            lines = records.read_lines(RESULTS / file)
            for line in lines:
                if run := named.get(name_of(file, line)):
                    line |= {"made": {**line["made"], **stamp}, "net": run["net"]}
            records.write_lines(records.results_file(RESULTS / file), lines)


def handle(cell: Cell, args, deadline: float) -> bool:
    """Plan a cell, and do with its runs what is asked for."""
    runs = plan(cell, args)
    if runs is None:
        return args.dry_run
    open_ = [run for run in runs if run["state"] != "done"]
    known = [run["seconds"] for run in open_ if run["seconds"]]
    states = ", ".join(f"{n} {state}" for state, n in Counter(r["state"] for r in runs).items())
    if not runs:
        return True
    print(f"{cell.notebook}, cell {cell.number}: {states}; about {sum(known) / 60:.0f} min"
          + f" and {len(open_) - len(known)} of unknown length" * (len(open_) > len(known)),
          flush=True)
    if args.dry_run:
        for run in open_:
            minutes = f"{run['seconds'] / 60:.1f}" if run["seconds"] else "?"
            minutes = f"~{minutes}" if run["guess"] and run["seconds"] else minutes
            print(f"  {minutes:>6} min  {run['name']}  ({run.get('note', run['state'])})")
        return True
    if args.accept:
        old = [run for run in open_ if run["state"] != "missing"]
        for file in sorted({run["name"].split("/", 1)[0] for run in old}):
            mine = [run for run in old if run["name"].startswith(f"{file}/")]
            first = min(mine, key=lambda run: run["seconds"])
            if again(cell, args, [first], deadline)[first["name"]] != []:
                return False
            accept(cell, mine, first["name"])
        return True
    if args.tier == "page" or (args.only != ["*"] and not open_):
        found = again(cell, args, runs, deadline)
        return all(differs == [] or args.tier == "page" and differs for differs in found.values())
    if not open_:
        return True
    work(cell, args, deadline, only=args.only)
    left = [run["name"] for run in open_ if not made_now(cell, run["name"])]
    print(f"  {len(open_) - len(left)} of {len(open_)} runs made", flush=True)
    return not left or time.time() > deadline - max(known, default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    env = os.environ.get
    parser.add_argument("--chapter", default=env("CHAPTER", ""))
    parser.add_argument("--only", action="append", default=None)
    parser.add_argument("--tier", choices=("page", "cpu", "gpu"), default=env("TIER", ""))
    parser.add_argument("--hours", type=float, default=float(env("HOURS") or 0))
    parser.add_argument("--minutes", type=float, default=float(env("MINUTES") or 0))
    parser.add_argument("--threads", type=int, default=int(env("THREADS") or 1))
    parser.add_argument("--jobs", type=int, default=int(env("JOBS") or 1))
    parser.add_argument("--accept", action="store_true", default=bool(env("ACCEPT")))
    parser.add_argument("--dry-run", action="store_true", default=bool(env("DRY_RUN")))
    parser.add_argument("--dirty", action="store_true", default=bool(env("DIRTY")))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        child(json.loads(args.job))
        return 0
    args.only = args.only or ([env("ONLY")] if env("ONLY") else ["*"])
    if not (args.chapter or args.tier or args.dry_run or args.only != ["*"]):
        show()
        return 0
    if data := env("FEEDBACK_NB_DATA"):
        os.environ["FEEDBACK_NB_DATA"] = os.path.abspath(data)  # cells run in nbs/
    code = records.code_state()
    kept = not (args.dry_run or args.tier == "page")
    if kept and not args.dirty and (code["dirty"] or not code["commit"]):
        sys.exit("feedback_nb/ holds changes that are in no commit: commit them first, or DIRTY=1")
    if args.tier == "gpu" and not args.dry_run:
        import torch
        if not torch.cuda.is_available():
            sys.exit("there is no GPU here: DRY_RUN=1 shows the queue, TIER=page tries it small")
    limit = args.hours * 3600 + args.minutes * 60
    deadline = time.time() + limit if limit else float("inf")
    args.tier, fine = args.tier or "cpu", True
    for cell in cells_of(args.chapter, args.tier):
        if time.time() < deadline:
            fine &= handle(cell, args, deadline)
    return 0 if fine else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
