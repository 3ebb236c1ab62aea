"""How a training step grows with T, batch, pixels, tokens and depth: time and bytes, fitted.

One more step of a loop should cost one more plain pass of what it runs again, and one pass's bytes.
The slope of each line is told in plain passes of the same network in the same run: (time of T) ≈
a + b·T gives b / (time of one plain pass), and so for the bytes that autograd keeps.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from _shared import looped, plain, record, show
from torch import nn

from feedback_nb.caps import vgg
from feedback_nb.cost import _default_loss, _training_step, saved_bytes
from feedback_nb.networks import cnn
from feedback_nb.registry import make

TIMES = (1, 2, 4, 8)  # T
BOUNDS = {"time": 1.15, "bytes": 1.10}  # of a slope, in plain passes; and of an exponent
SWEPT = "CBL", "LRM", "feedback U-Net", "CAPs", "PC network", "FFTNet"


def models(args):
    """name -> (plain network, T -> model, input, labels)"""
    photos = torch.randn(args.batch, 3, 32, 32, device=args.device)
    kinds = torch.randint(10, (args.batch,), device=args.device)
    shapes = torch.randn(args.batch // 8 or 1, 1, 64, 64, device=args.device)
    masks = torch.randint(2, (len(shapes), 64, 64), device=args.device)
    net, example = cnn(width=args.width), photos[:1].cpu()
    channels, state = (8, 16, 32), 8
    unet = nn.Sequential(make("U-Net", shapes, state, channels=channels), nn.Conv2d(state, 2, 1))
    loop = {"channels": channels, "state": state, "decay": None}
    layers = [name for name, m in net.named_modules() if isinstance(m, nn.ReLU)]
    back = [(layers[-1], layers[0])]

    def wrapped(kind, **options):
        return lambda t: make(kind, example, net=cnn(width=args.width), steps=t, **options)

    return {
        "CBL, through": (net, wrapped("CBL"), photos, kinds),
        "LRM": (net, wrapped("LRM", connections=back), photos, kinds),
        "feedback U-Net": (unet, lambda t: make("feedback U-Net", shapes, 2, steps=t, **loop),
                           shapes, masks),
    }


def seconds(fn, device):
    """CPU time of this process on a CPU, wall clock on a GPU."""
    cuda = device.startswith("cuda")
    clock = time.perf_counter if cuda else time.process_time
    sync = torch.cuda.synchronize if cuda else int
    sync()
    begun = clock()
    fn()
    sync()
    return clock() - begun


def grow(name, net, build, x, y, args):
    """A row: slopes of time and of bytes, in plain passes."""
    net = net.to(args.device)
    loops = {t: build(t).to(args.device) for t in TIMES}
    times = {t: [] for t in ("plain", *TIMES)}
    for number in range(args.rounds + 1):
        for t in times:
            run = (plain, net) if t == "plain" else (looped, loops[t])
            spent = seconds(lambda run=run: run[0](run[1], x, y), args.device)
            if number:  # the first round warms up
                times[t].append(spent)
    middle = {t: statistics.median(found) for t, found in times.items()}
    kept = {t: saved_bytes(model, x, _default_loss) for t, model in loops.items()}
    one = saved_bytes(net, x, _default_loss)
    slope = lambda values: float(np.polyfit(TIMES, [values[t] for t in TIMES], 1)[0])
    shared = {"network": name, "batch": len(x), "T": list(TIMES)}
    yield {**shared, "measured": "time", "times a plain pass, per step": slope(middle)
           / middle["plain"], "plain ms": 1e3 * middle["plain"], "bound": BOUNDS["time"]}
    yield {**shared, "measured": "bytes", "times a plain pass, per step": slope(kept) / one,
           "plain MiB": one / 2**20, "bound": BOUNDS["bytes"]}


def sweeps(args):
    """(network, what grows, {size: (model, training step, input)})"""
    def case(name, n, side, **options):
        x = torch.rand(n, 3, side, side, device=args.device)
        model = make(name, x, width=args.width, **options).to(args.device)
        return model, _training_step(model.train(), x, _default_loss), x

    for name in SWEPT:
        yield name, "batch", {n: case(name, n, 32) for n in (8, 16, 32, 64)}
        grows = "tokens" if name == "FFTNet" else "pixels"
        sides = (16, 32, 64) if name == "FFTNet" else (16, 32, 48)
        yield name, grows, {side**2: case(name, 16, side) for side in sides}
    yield "FFTNet", "depth", {d: case("FFTNet", 16, 32, depth=d) for d in (2, 4, 8)}
    x, made = torch.rand(16, 3, 32, 32, device=args.device), {}
    for depth in (8, 11, 16, 19):
        model = vgg(depth, multiplier=1 / 8, width=128).to(args.device)
        made[depth] = model, _training_step(model.train(), x, _default_loss), x
    yield "CAPs, VGG", "depth", made


def exponents(name, grows, made, args):
    """Two rows: the exponents of time and of the bytes that autograd keeps."""
    times = {size: [] for size in made}
    for number in range(args.rounds + 1):
        for size, (_, step, _) in made.items():
            times[size] += [seconds(step, args.device)] * (number > 0)
    kept = {size: saved_bytes(model, x, _default_loss) for size, (model, _, x) in made.items()}
    middle = {size: statistics.median(found) for size, found in times.items()}
    for measured, values in (("time", middle), ("bytes", kept)):
        if not all(value > 0 for value in values.values()):
            continue  # the step of a PC network takes a gradient: autograd cannot say what it keeps
        fitted = np.polyfit(np.log(list(made)), np.log([values[size] for size in made]), 1)
        yield {"network": name, "grows with": grows, "measured": measured,
               "times linear growth, as exponent": float(fitted[0]), "sizes": list(made),
               "bound": None if name == "CAPs, VGG" else BOUNDS[measured]}  # its blocks differ


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="of the CNN")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path,
                        help="write the rows to this JSON file (results/bench_growth.json)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    rows = [row for name, kit in models(args).items() for row in grow(name, *kit, args)]
    rows += [row for case in sweeps(args) for row in exponents(*case, args)]
    for row in rows:
        show(row)
    if args.record:
        clock = "CPU time of the process" if args.device == "cpu" else "wall clock"
        record(args.record, args, ("batch", "width", "rounds"), rows, clock=clock)


if __name__ == "__main__":
    main()
