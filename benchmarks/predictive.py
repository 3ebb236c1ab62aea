"""A training step of predictive coding beside T + 1 forward-backward passes of its network.

    python benchmarks/predictive.py [--record results/bench_predictive.json]

Both take turns in one process; the median of the rounds' ratios counts. Bound: 1.15.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from _shared import record, show
from torch import nn

from feedback_nb.predictive import half_square
from feedback_nb.registry import make

BOUND = 1.15


def mlp():
    """Three layers of width 512 on 784 inputs."""
    layers = [nn.Sequential(nn.Linear(784, 512), nn.Tanh()),
              nn.Sequential(nn.Linear(512, 512), nn.Tanh()), nn.Linear(512, 10)]
    return layers, torch.randn(128, 784)


def vgg5():
    """Four convolutions and a linear layer on 32 × 32 colour images, a quarter of the width."""
    def conv(a, b):
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GELU(), nn.MaxPool2d(2))

    layers = [conv(3, 32), conv(32, 64), conv(64, 128), conv(128, 128),
              nn.Sequential(nn.Flatten(), nn.Linear(512, 10))]
    return layers, torch.randn(32, 3, 32, 32)


def seconds(fn, device):
    """CPU time of this process on a CPU, whatever else runs there; wall clock on a GPU."""
    if device.type == "cpu":
        begun = time.process_time()
        fn()
        return time.process_time() - begun
    torch.cuda.synchronize()
    begun = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def ratios(parts, steps, rounds, device, inference):
    """Step of the PC network / (T + 1) passes of the plain one, for each round."""
    layers, x = parts()
    options = {"steps": steps, "step_size": 0.01, "inference": inference}
    model = make("PC network", x, net=layers, **options)
    model, x = model.to(device), x.to(device)
    net = nn.Sequential(*model.layers)
    goal = torch.randn(len(x), 10, device=device)

    def plain():
        net.zero_grad(set_to_none=True)
        half_square(net(x) - goal).mean().backward()

    def coded():
        net.zero_grad(set_to_none=True)
        model.local_backward(x, goal)

    found, one = [], []
    for number in range(rounds + 1):
        a, b = seconds(coded, device), seconds(lambda: [plain() for _ in range(steps + 1)], device)
        if number:  # the first round warms up
            found.append(a / b)
            one.append(1e3 * b / (steps + 1))
    return found, statistics.median(one)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="T, steps of inference")
    parser.add_argument("--record", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    rows = []
    for name, parts in (("mlp", mlp), ("vgg5", vgg5)):
        for inference in ("states", "errors"):
            found, ms = ratios(parts, args.steps, args.rounds, torch.device(args.device), inference)
            row = {"network": name, "inference": inference, "T": args.steps,
                   "times T + 1 passes": statistics.median(found), "lowest": min(found),
                   "highest": max(found), "pass_ms": ms, "bound": BOUND}
            rows.append(row)
            show(row)
    if args.record:
        record(args.record, args, ("rounds", "steps"), rows)


if __name__ == "__main__":
    main()
