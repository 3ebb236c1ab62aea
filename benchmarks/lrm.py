"""What AlexNet with long-range modulation (LRM3, two passes) costs, as a ratio to two plain passes
of AlexNet in the same run.

Images of 128 pixels, batch 32. Bounds: paper motif forward ≤ 1.10 and training step ≤ 1.10,
published motif ≤ 1.40 and ≤ 1.30; the released code needs 1.66 and 1.32. The plain training step
is two passes, the mean of their two losses, one backward pass: what the modulated step does too.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from _shared import record, show
from torch.nn import functional as F

from feedback_nb.lrm import alexnet_lrm

BOUNDS = {("paper", "forward"): 1.10, ("paper", "training"): 1.10, ("published", "forward"): 1.40,
          ("published", "training"): 1.30}
RELEASED = {"forward": 1.66, "training": 1.32}  # of the released code, measured elsewhere


def forward(model, x, y):
    with torch.no_grad():
        outputs(model, x)


def training(model, x, y):
    model.zero_grad(set_to_none=True)
    (sum(F.cross_entropy(output, y) for output in outputs(model, x)) / 2).backward()


def outputs(model, x):
    return model.trajectory(x).outputs if hasattr(model, "trajectory") else [model(x), model(x)]


def seconds(fn, args, device, repeats):
    """CPU seconds of this process on a CPU, so that other work on the machine counts less; wall-
    clock seconds on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    sync = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    sync()
    start = clock()
    for _ in range(repeats):
        fn(*args)
    sync()
    return (clock() - start) / repeats


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--level", type=int, default=3)
    parser.add_argument(
        "--rounds", type=int, default=9,
        help="rounds of all measurements in turn; the median of the rounds' ratios counts")
    parser.add_argument("--repeats", type=int, default=2, help="passes or steps per measurement")
    parser.add_argument("--record", type=Path,
                        help="write the rows to this JSON file (results/bench_lrm.json)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    y = torch.randint(1000, (args.batch,), device=args.device)
    models = {
        motif: alexnet_lrm(args.level, motif=motif, size=args.size, device=args.device)
        for motif in ("paper", "published")
    }
    plain = models["paper"].backbone  # the wrapped network still works on its own
    ratios, floors = {key: [] for key in BOUNDS}, {"forward": [], "training": []}
    for number in range(args.rounds + 1):
        for fn in (forward, training):
            floor = seconds(fn, (plain, x, y), args.device, args.repeats)
            times = {
                motif: seconds(fn, (model, x, y), args.device, args.repeats)
                for motif, model in models.items()
            }
            floor = (floor + seconds(fn, (plain, x, y), args.device,
                                     args.repeats)) / 2  # before and after, against drift
            if number:  # the first round warms up
                floors[fn.__name__].append(floor)
                for motif, t in times.items():
                    ratios[motif, fn.__name__].append(t / floor)
    table = []
    for (motif, what), values in ratios.items():
        row = {
            "motif": motif, "measured": what, "times two plain passes": statistics.median(values),
            "lowest round": min(values), "highest round": max(values)
        }
        table.append({
            **row, "bound": BOUNDS[motif, what],
            "released code": RELEASED[what] if motif == "published" else None
        })
    milliseconds = {
        f"two_plain_{what}_ms": round(1e3 * statistics.median(values), 1)
        for what, values in floors.items()
    }
    print(
        f"AlexNet LRM{args.level}, two passes, {args.size} pixels, batch {args.batch}, "
        f"{args.device}, {torch.get_num_threads()} threads; {milliseconds}"
    )
    for row in table:
        show(row)
    if args.record:
        clock = "CPU time of the process" if args.device == "cpu" else "wall clock"
        record(args.record, args, ("size", "batch", "level", "rounds", "repeats"), table,
               clock=clock, **milliseconds)


if __name__ == "__main__":
    main()
