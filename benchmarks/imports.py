"""What `import feedback_nb` adds to `import torch`, in fresh processes, in turn.

The bound of the package is 0.3 s beyond torch; as a ratio to torch's own import it does not depend
on the machine as much. `feedback_nb` loads nothing; the modules that a user asks for do.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from _shared import record, show

WHAT = {"feedback_nb": 1.05, "feedback_nb.feedback": 1.15, "feedback_nb.cbl": 1.2,
        "feedback_nb.unet": 1.2, "feedback_nb.lrm": 1.2, "feedback_nb.training": 1.5}


def seconds(*modules):
    """CPU seconds of a new process that imports these."""
    code = "import time, {}; print(time.process_time())".format(", ".join(modules))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path,
                        help="write the rows to this JSON file (results/bench_imports.json)")
    parser.add_argument("--device", default="cpu", help="of no meaning here")
    args = parser.parse_args(argv)
    seconds("torch")  # from disk, once
    times = {name: [] for name in ("torch", *WHAT)}
    for _ in range(args.rounds):
        for name, found in times.items():
            found.append(seconds(*dict.fromkeys(["torch", name])))
    floor, rows = statistics.median(times["torch"]), []
    for name, bound in WHAT.items():
        value = statistics.median(times[name])
        rows.append({"measured": f"import {name}", "times import torch": value / floor,
                     "seconds beyond torch": value - floor, "bound": bound})
        show(rows[-1])
    print(f"import torch: {floor:.2f} s of CPU time, torch {torch.__version__}")
    if args.record:
        record(args.record, args, ("rounds",), rows)


if __name__ == "__main__":
    main()
