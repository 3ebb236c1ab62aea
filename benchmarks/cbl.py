"""What a CBL training step costs, as a ratio to plain forward-backward passes of the same network
in the same run.

The floor of the through flow is T+1 plain passes, that of the literal flow one. Bounds at T = 4:
for the standard CNN (batch 128, 32×32 colour images) through ≤ 1.25 × (T+1), literal ≤ 1.35 × 1;
for ResNet-18 and ViT-B/16 (224×224) through ≤ 1.10 × (T+1).
"""

import argparse
import time
from pathlib import Path

import torch
from _shared import looped, plain, record, show
from torch.utils.benchmark import Timer

from feedback_nb.networks import cnn, resnet18, torchvision_net
from feedback_nb.registry import make

BOUNDS = {("CNN", "through"): 1.25, ("CNN", "literal"): 1.35, ("ResNet-18", "through"): 1.10,
          ("ViT-B/16", "through"): 1.10}

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time
          }  # the second is not disturbed by what else the machine does


def median(fn, *args, seconds, clock):
    timer = Timer("fn(*args)", globals={"fn": fn, "args": args}, timer=CLOCKS[clock],
                  num_threads=torch.get_num_threads())
    once = timer.timeit(1).median
    return once if once >= seconds else timer.blocked_autorange(min_run_time=seconds).median


def networks(args):
    """name -> (makes the network, batch, image size, classes, [(flow, adapter)])"""
    vit_b = lambda: torchvision_net("vit_b_16")
    both = [(flow, adapter) for flow in ("through", "literal") for adapter in ("gate", "concat")]
    return {
        "CNN": (lambda: cnn(width=args.width), args.batch, 32, 10, both),
        "ResNet-18": (resnet18, args.large_batch, 224, 1000, [("through", "gate"),
                                                              ("through", "concat")]),
        "ViT-B/16": (vit_b, args.large_batch, 224, 1000, [("through", "gate"),
                                                          ("through", "token")]),
    }


def measure(name, build, batch, size, classes, kinds, args):
    """One row for each flow and adapter; all models share one network, whose plain pass is timed
    beside each of them."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, size, size,
                       device=args.device), torch.randint(classes, (batch, ), device=args.device)
    rows = {kind: [] for kind in kinds}
    floors = []
    for flow, adapter in kinds:
        options = {"flow": flow, "adapter": adapter, "steps": args.steps}
        model = make("CBL", x[:1].cpu(), net=build(), **options).to(args.device)
        plain(model.net, x, y), looped(model, x, y)
        for _ in range(args.rounds):
            floors.append(median(plain, model.net, x, y, seconds=args.seconds, clock=args.clock))
            rows[flow, adapter].append(
                median(looped, model, x, y, seconds=args.seconds, clock=args.clock) / floors[-1])
    for (flow, adapter), ratios in rows.items():
        ratio, passes = sorted(ratios)[len(ratios) // 2], args.steps + 1 if flow == "through" else 1
        row = {
            "network": name, "flow": flow, "adapter": adapter, "batch": batch,
            "times one pass": ratio, "floor": passes
        }
        yield row | {
            "times its floor": ratio / passes, "bound": BOUNDS[name, flow], "plain pass ms": round(
                1000 * sorted(floors)[len(floors) // 2], 1)
        }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32, help="of the CNN")
    parser.add_argument("--batch", type=int, default=128, help="of the CNN")
    parser.add_argument("--large-batch", type=int, default=4, help="of ResNet-18 and ViT-B/16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3,
                        help="plain pass and loop in turn; the median of the ratios counts")
    parser.add_argument("--seconds", type=float, default=3.0,
                        help="time per measurement, at least one step")
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="processor: seconds of computing, for a CPU that is shared")
    parser.add_argument("--networks", nargs="+", default=["CNN", "ResNet-18", "ViT-B/16"])
    parser.add_argument(
        "--record", type=Path, help=
        "write the rows to this JSON file: results/bench_cbl.json holds --networks CNN, "
        "bench_cbl_large.json the others"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    rows = []
    for name in args.networks:
        for row in measure(name, *networks(args)[name], args):
            rows.append(row)
            show(row)
    print(f"training steps, T = {args.steps}, {args.device}, {torch.get_num_threads()} threads")
    if args.record:
        record(args.record, args,
               ("width", "batch", "large_batch", "steps", "rounds", "seconds", "clock"), rows)


if __name__ == "__main__":
    main()
