"""What a CBL training step costs, as a ratio to plain forward-backward passes of the same CNN in the same run.

The floor of the through flow is T+1 plain passes, that of the literal flow one. Bounds (issue of chapter 10):
through ≤ 1.25 × (T+1), literal ≤ 1.35 × 1 at T = 4. Batch 128, 32×32 colour images, the standard CNN.
"""

import argparse
import json
import platform
import subprocess
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from feedback_nb.cbl import CBL, cnn
from feedback_nb.feedback import stepwise_loss

LAYERS = ["stage1", "stage2", "stage3", "stage4"]


def plain(net, x, y):
    net.zero_grad(set_to_none=True)
    F.cross_entropy(net(x), y).backward()


def looped(model, x, y):
    model.zero_grad(set_to_none=True)
    stepwise_loss(model.trajectory(x), y).backward()


def median(fn, *args, seconds):
    return Timer("fn(*args)", globals={"fn": fn, "args": args}, num_threads=torch.get_num_threads()).blocked_autorange(min_run_time=seconds)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all measurements in turn; the smallest ratio's round is not picked, the median is")
    parser.add_argument("--seconds", type=float, default=6.0, help="time per measurement")
    parser.add_argument("--record", type=Path, help="write the rows to this JSON file (results/bench_cbl.json)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    y = torch.randint(10, (args.batch,), device=args.device)
    make = lambda **kw: CBL(cnn(width=args.width).to(args.device), LAYERS, example=x[:1], steps=args.steps, **kw)
    T, net = args.steps, cnn(width=args.width).to(args.device)
    models = {(f, a): make(flow=f, adapter=a) for f in ("through", "literal") for a in ("gate", "concat")}
    rows = {key: [] for key in models}
    for _ in range(args.rounds):
        floor = median(plain, net, x, y, seconds=args.seconds).median
        for key, model in models.items():
            rows[key].append(median(looped, model, x, y, seconds=args.seconds).median / floor)
    table = []
    for (flow, adapter), ratios in rows.items():
        ratio = sorted(ratios)[len(ratios) // 2]
        passes, bound = (T + 1, 1.25) if flow == "through" else (1, 1.35)
        table.append({"flow": flow, "adapter": adapter, "times one pass": ratio, "floor": passes, "times its floor": ratio / passes, "bound": bound})
    print(f"CBL training step, T = {T}, batch {args.batch}, width {args.width}, {args.device}, {torch.get_num_threads()} threads; plain pass {floor * 1e3:.0f} ms")
    for row in table:
        print("  ".join(f"{k}: {v:.2f}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items()))
    if args.record:
        device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU ({platform.machine()})"
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        settings = {key: getattr(args, key) for key in ("width", "batch", "steps", "rounds", "seconds")}
        facts = {"commit": commit, "torch": torch.__version__, "python": platform.python_version(), "device": device, "threads": torch.get_num_threads(), "seed": 0}
        args.record.write_text(json.dumps({**facts, **settings, "plain_pass_ms": round(floor * 1e3, 1), "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
