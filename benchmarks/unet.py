"""What a training step of the feedback U-Net costs at T steps.

Each time is a ratio to one plain forward-backward pass of the same U-Net in the same run. The floor
is T passes of the U-Net and its head on the image alone, with cross entropy. Bound (issue of
chapter 20): full backpropagation ≤ 1.15 × T passes at T = 5. Recomputation runs every forward pass
twice, truncation skips backward passes: they have no bound. Group norm, 2 classes.
"""

import argparse
from pathlib import Path

import torch
from _shared import looped, plain, record, show
from torch import nn
from torch.utils.benchmark import Timer

from feedback_nb.registry import make


def median(fn, *args, seconds):
    return (
        Timer("fn(*args)", globals={"fn": fn, "args": args}, num_threads=torch.get_num_threads())
        .blocked_autorange(min_run_time=seconds)
        .median
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--state", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=128, help="side of the images, pixels")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="rounds of all measurements in turn; the median round's ratio counts",
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="time per measurement")
    parser.add_argument(
        "--record", type=Path, help="write the rows to this JSON file (results/bench_unet.json)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    T, sizes = args.steps, {"channels": args.channels, "state": args.state}
    x = torch.randn(args.batch, 1, args.size, args.size, device=args.device)
    y = torch.randint(2, (args.batch, args.size, args.size), device=args.device)
    net = nn.Sequential(
        make("U-Net", x, args.state, channels=args.channels), nn.Conv2d(args.state, 2, 1)
    ).to(args.device)
    kinds = {
        "full, no decay": {"decay": None},
        "full, scalar decay": {},
        "full, matrix decay": {"decay": "matrix"},
        "recompute, scalar decay": {"backprop": "recompute"},
        "last 2 steps, scalar decay": {"backprop": 2},
    }
    models = {
        name: make("feedback U-Net", x, 2, steps=T, **sizes, **options).to(args.device)
        for name, options in kinds.items()
    }
    ratios, floors = {name: [] for name in models}, []
    for _ in range(args.rounds):
        floors.append(median(plain, net, x, y, seconds=args.seconds))
        for name, model in models.items():
            ratios[name].append(median(looped, model, x, y, seconds=args.seconds) / floors[-1])
    table = []
    for name, found in ratios.items():
        ratio = sorted(found)[len(found) // 2]
        table.append(
            {
                "training": name,
                "times one pass": ratio,
                "floor": T,
                "times its floor": ratio / T,
                "bound": 1.15 if name.startswith("full") else None,
            }
        )
    floor = sorted(floors)[len(floors) // 2]
    print(
        f"feedback U-Net training step, T = {T}, batch {args.batch}, {args.size}×{args.size}, "
        f"channels {args.channels}, {args.device}, {torch.get_num_threads()} threads; "
        f"plain pass {floor * 1e3:.0f} ms"
    )
    for row in table:
        show(row)
    if args.record:
        record(
            args.record,
            args,
            ("channels", "state", "batch", "size", "steps", "rounds", "seconds"),
            table,
            plain_pass_ms=round(floor * 1e3, 1),
        )


if __name__ == "__main__":
    main()
