"""Where a training step of every method of the registry spends its time.

A row for each method: its step as a multiple of a plain step of the book's CNN or U-Net of the same
width, in time and in multiply-adds; the quotient of the two, which is 1 where feedback adds work of
the network's own kind and nothing else; the share of each kind of operation and the largest one;
and the step with images and weights in channels-last memory order over the step without.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from _shared import looped, plain, record, show
from torch.profiler import ProfilerActivity, profile

from feedback_nb.cost import MultiplyAdds
from feedback_nb.registry import REGISTRY, make

# whose feedback is work of the network's own kind
BOUNDS = dict.fromkeys(("CBL", "LRM", "LRM, add", "feedback U-Net", "CBL U-Net"), 1.25)
KINDS = {  # by what the name of an operation holds; the first that fits
    "convolution": ("conv",), "matrix product": ("mm", "matmul", "dot", "linear"),
    "Fourier transform": ("fft",), "normalisation": ("norm",),
    "pooling, resizing": ("pool", "upsample"),
    "copies": ("copy", "cat", "clone", "contiguous", "zero", "fill", "empty", "pad", "index",
               "select", "slice", "roll"),
}


def kind_of(name):
    """The kind of an operation of ATen; what computes number by number is the rest."""
    found = (kind for kind, words in KINDS.items() if any(word in name for word in words))
    return next(found, "element by element")


def training(model, x, y):
    """One step without the optimiser, as `fit` takes it."""
    if hasattr(model, "local_backward"):
        model.zero_grad(set_to_none=True)
        model.local_backward(x, y)
    elif hasattr(model, "trajectory"):
        looped(model, x, y)
    else:
        plain(model, x, y)


def seconds(step, device):
    """CPU time of this process on a CPU, wall clock on a GPU."""
    cuda = device.startswith("cuda")
    clock, sync = (time.perf_counter, torch.cuda.synchronize) if cuda else (time.process_time, int)
    sync()
    begun = clock()
    step()
    sync()
    return clock() - begun


def in_turn(steps, rounds, device):
    """The median over rounds of each step's time over the first one's."""
    found = []
    for _ in range(rounds + 1):
        spent = [seconds(step, device) for step in steps]
        found.append([t / spent[0] for t in spent])
    return [statistics.median(values) for values in zip(*found[1:])]  # the first round warms up


def shares(step, device):
    """{kind of operation: share of the time}, and the largest operation with its share."""
    cuda = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as seen:
        step()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    spent, kinds = defaultdict(float), defaultdict(float)
    for event in seen.key_averages():
        if event.key.startswith("aten::"):
            spent[event.key.removeprefix("aten::")] += getattr(event, key)
    total = sum(spent.values())
    for name, t in spent.items():
        kinds[kind_of(name)] += t / total
    largest = max(spent, key=spent.get)
    return dict(kinds), largest, spent[largest] / total


def row(name, args):
    """What a step of one method costs, and where the time goes."""
    masks = REGISTRY[name].task == "masks"
    x = torch.rand(args.batch // 8 or 1, 1, 64, 64) if masks else torch.rand(args.batch, 3, 32, 32)
    y = torch.randint(2, (len(x), 64, 64)) if masks else torch.randint(10, (len(x),))
    x, y, n = x.to(args.device), y.to(args.device), 2 if masks else 10
    torch.manual_seed(0)
    nets = {kind: make(kind, x, n, width=args.width).to(args.device).train()
            for kind in ("U-Net" if masks else "feed-forward", name)}
    ordered = copy.deepcopy(nets[name]).to(memory_format=torch.channels_last)
    columns = x.to(memory_format=torch.channels_last)
    steps = [partial(training, model, x, y) for model in nets.values()]
    if len(steps) == 1:  # the plain network itself
        steps *= 2
    steps.append(partial(training, ordered, columns, y))
    try:
        steps[2]()
    except RuntimeError:  # a PC network's bound: PyTorch maps no convolution in this order
        del steps[2]
    found = in_turn(steps, args.rounds, args.device)
    made = []
    for step in steps[:2]:
        with MultiplyAdds() as counted:
            step()
        made.append(counted.total)
    kinds, largest, share = shares(steps[1], args.device)
    last = found[2] / found[1] if len(found) > 2 else None
    return {"method": name, "batch": len(x), "plain steps": found[1],
            "plain multiply-adds": made[1] / made[0],
            "times a plain multiply-add": found[1] * made[0] / made[1],
            "bound": BOUNDS.get(name), "in channels-last order": last, "largest operation": largest,
            "its share": share, "shares": kinds}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--rounds", type=int, default=5, help="all steps in turn; medians count")
    parser.add_argument("--models", nargs="+", choices=REGISTRY, default=[*REGISTRY])
    parser.add_argument("--record", type=Path,
                        help="write the rows to this JSON file (results/bench_methods.json)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # NotConverged: nothing here is trained
    rows = []
    for name in args.models:
        rows.append(row(name, args))
        show({key: value for key, value in rows[-1].items() if key != "shares"})
    if args.record:
        clock = "CPU time of the process" if args.device == "cpu" else "wall clock"
        record(args.record, args, ("batch", "width", "rounds"), rows, clock=clock)


if __name__ == "__main__":
    main()
