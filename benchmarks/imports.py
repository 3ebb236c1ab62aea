"""What `import feedback_nb` adds to `import torch`, one after the other in fresh processes.

The bound of the package is 0.3 s beyond torch; as a ratio to torch's own import it does not depend
on the machine as much. `feedback_nb` loads nothing; the modules that a user asks for do.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from _shared import record, show

WHAT = {"feedback_nb": 1.05, "feedback_nb.feedback": 1.15, "feedback_nb.cbl": 1.2,
        "feedback_nb.unet": 1.2, "feedback_nb.lrm": 1.2, "feedback_nb.training": 1.5}


def seconds(module):
    """CPU seconds of a new process until torch is imported, and until the module is too."""
    code = f"""import time, torch
before = time.process_time()
import {module}
print(before, time.process_time())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(t) for t in done.stdout.split()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path,
                        help="write the rows to this JSON file (results/bench_imports.json)")
    parser.add_argument("--device", default="cpu", help="of no meaning here")
    args = parser.parse_args(argv)
    seconds("feedback_nb.training")  # from disk, once
    found = {name: [] for name in WHAT}
    for _ in range(args.rounds):
        for name, times in found.items():
            times.append(seconds(name))
    rows = []
    for name, bound in WHAT.items():
        ratio = statistics.median(both / torch for torch, both in found[name])
        more = statistics.median(both - torch for torch, both in found[name])
        rows.append({"measured": f"import {name}", "times import torch": ratio,
                     "seconds beyond torch": more, "bound": bound})
        show(rows[-1])
    if args.record:
        record(args.record, args, ("rounds",), rows)


if __name__ == "__main__":
    main()
