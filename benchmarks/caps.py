"""What a step of co-activation patterns costs: time as a ratio to backpropagation of the same
VGG in the same run, memory as saved bytes.

VGG16 at a quarter of the paper's width, batch 128, 32 × 32 pixels, no dropout, channels last.
Bounds (issue of chapter 40): Algorithm 1 by autograd ≤ 0.95 × the time of a backpropagation step,
`local_backward` ≤ 1.30 ×, with kept graphs ≤ 1.15 ×; peak saved bytes of VGG19 ≤ 1.05 × VGG11's, of
VGG16 ≤ 0.17 × backpropagation's. The peer is `torch.utils.checkpoint` around every block of the
backpropagation network.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from _shared import record, show
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from feedback_nb.caps import STAGES, pooled, vgg

LAYOUT = {"memory_format": torch.channels_last}
BOUNDS = {"caps, autograd": 0.95, "caps, local_backward": 1.30, "caps, local_backward, keep": 1.15}


class Saved:
    """The largest number of bytes that autograd holds at one time, each storage once, without
    weights and input."""

    def __init__(self, model, x):
        self.own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(),
            x)}
        self.users, self.now, self.peak = {}, 0, 0

    def pack(self, tensor):
        # detached: the tensor itself would be a circle of graph and hook that is never freed
        return tensor.detach() if tensor.untyped_storage().data_ptr() in self.own else Held(self,
            tensor.detach())

    def of(self, step):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held:
            held.tensor if isinstance(held, Held) else held):
            step()
        return self.peak


class Held:
    def __init__(self, saved, tensor):
        self.saved, self.tensor, self.storage = saved, tensor, tensor.untyped_storage()
        users = saved.users.get(self.storage.data_ptr(), 0)
        saved.users[self.storage.data_ptr()] = users + 1
        saved.now += 0 if users else self.storage.nbytes()
        saved.peak = max(saved.peak, saved.now)

    def __del__(self):
        place = self.storage.data_ptr()
        self.saved.users[place] -= 1
        self.saved.now -= 0 if self.saved.users[place] else self.storage.nbytes()


def checkpointed(model, x, y):
    h = x
    for block in model.blocks:
        h = checkpoint(block, h, use_reentrant=False)
    loss = F.cross_entropy(model.head(pooled(h, model.widths[-1])), y)
    loss.backward()


def steps(depth, args):
    """{name: (model, step)} for one depth."""
    models = {}
    for rule in ("bp", "caps", "full", "local"):
        torch.manual_seed(0)
        models[rule] = vgg(depth, multiplier=args.multiplier, width=round(1024 * args.multiplier),
                           rule=rule).to(args.device, **LAYOUT)
    keep = len(models["caps"].blocks) - STAGES[depth][0]  # all but the blocks with the largest maps
    autograd = lambda model, x, y: model.loss(x, y).backward()
    local = lambda model, x, y: model.local_backward(x, y)
    return {
        "bp": (models["bp"], autograd),
        "bp, checkpoint each block": (models["bp"], checkpointed),
        "full": (models["full"], autograd),
        "caps, autograd": (models["caps"], autograd),
        "caps, local_backward": (models["caps"], local),
        "caps, local_backward, keep": (models["caps"],
                                       lambda model, x, y: model.local_backward(x, y, keep=keep)),
        "local": (models["local"], local),
    }


def seconds(model, step, x, y, device):
    """CPU seconds of this process on a CPU, so that other work counts less; wall clock on a GPU."""
    model.zero_grad(set_to_none=True)
    clock = time.process_time if device == "cpu" else time.perf_counter
    sync = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    sync()
    start = clock()
    step(model, x, y)
    sync()
    return clock() - start


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 11, 16, 19])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--multiplier", type=float, default=1 / 4)
    parser.add_argument("--rounds", type=int, default=7,
                        help="rounds of all steps in turn; the median counts")
    parser.add_argument("--record", type=Path,
                        help="write the rows to this JSON file (results/bench_caps.json)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(args.batch, 3, args.size, args.size,
                   generator=generator).to(args.device).contiguous(**LAYOUT)
    y = torch.randint(10, (args.batch,), generator=generator).to(args.device)
    rows = []
    for depth in args.depths:
        todo, times = steps(depth, args), {}
        for number in range(args.rounds + 1):
            for name, (model, step) in todo.items():
                t = seconds(model, step, x, y, args.device)
                times.setdefault(name, []).extend([t] * (number > 0))  # the first round warms up
        for name, (model, step) in todo.items():
            model.zero_grad(set_to_none=True)
            ratios = [t / floor for t, floor in zip(times[name], times["bp"])]
            saved = Saved(model, x).of(lambda model=model, step=step: step(model, x, y))
            row = {"depth": depth, "step": name, "times bp": statistics.median(ratios),
                   "lowest": min(ratios), "highest": max(ratios)}
            row |= {"ms": 1e3 * statistics.median(times[name]), "saved MiB": saved / 2**20}
            rows.append({**row, "bound": BOUNDS.get(name) if depth == 16 else None})
            show(rows[-1])
    memory = {(row["depth"], row["step"]): row["saved MiB"] for row in rows}
    local = "caps, local_backward"
    shares = {}
    if {11, 16, 19} <= set(args.depths):
        shares = {"VGG19 / VGG11, local_backward": memory[19, local] / memory[11, local],
                  "VGG16, local_backward / bp": memory[16, local] / memory[16, "bp"]}
        show(shares)
    if args.record:
        clock = "CPU time of the process" if args.device == "cpu" else "wall clock"
        record(args.record, args, ("depths", "batch", "size", "multiplier", "rounds"), rows,
               clock=clock, **shares)


if __name__ == "__main__":
    main()
