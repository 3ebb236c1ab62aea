"""Our networks and solver beside the libraries that others would take for the same work.

The vision transformer against timm's of the same sizes; the U-Net, at the width with the same
multiply-adds, and T steps of the feedback U-Net against segmentation_models_pytorch's U-Net on
ResNet-18; the implicit fixed point against torchdeq's, both with Anderson's method, on one map and
to one tolerance. The two sides take turns in one process, on `--threads` threads. What differs in
its multiply-adds is compared in time per multiply-add. A library that is missing has a row that
says so.
"""

import argparse
import importlib
import importlib.metadata
import os
import warnings
from functools import partial
from pathlib import Path

import torch
from _shared import record, show
from methods import in_turn
from torch.nn import functional as F

from feedback_nb.cost import multiply_adds
from feedback_nb.feedback import FeedbackModel, stepwise_loss
from feedback_nb.fixed_points import fixed_point
from feedback_nb.networks import match_compute, torchvision_net, vit
from feedback_nb.peers import DEQ
from feedback_nb.unet import FeedbackUNet, UNet

BOUND = 1.15  # of all but a solver that costs more per step, so that each example halts by itself


def transformers(timm, args):
    """The book's transformer for small images, and torchvision's for large ones."""
    small = {"patch_size": 4, "depth": 6, "num_heads": 4, "embed_dim": 128, "mlp_ratio": 2}
    for name, build, classes, side, batch, sizes in [
            ("vit", vit, 10, 32, args.batch, small),
            ("ViT-B/16", partial(torchvision_net, "vit_b_16"), 1000, 224, args.large_batch, {})]:
        peer = timm.models.VisionTransformer(img_size=side, num_classes=classes, **sizes)
        x, y = torch.randn(batch, 3, side, side), torch.randint(classes, (batch, ))
        yield name, build(classes), peer, x, y


def unets(smp, args):
    """A plain U-Net with the peer's norm and with the book's, and the loop around the second."""
    peer = smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=2)
    x = torch.randn(args.large_batch, 1, args.size, args.size)
    y = torch.randint(2, (len(x), args.size, args.size))
    channels = lambda width: [width << level for level in range(4)]
    ours = lambda width, norm: UNet(1, 2, channels=channels(width), norm=norm)
    for norm in ("batch", "group"):
        net = match_compute(partial(ours, norm=norm), peer, x[:1])
        yield f"U-Net, {norm} norm", net, peer, x, y
    loop = FeedbackUNet(1, 2, channels=channels(net.last.in_channels), steps=args.steps)
    yield f"feedback U-Net, T = {args.steps}", loop, peer, x, y


class Solved(torch.nn.Module):
    """A DEQ whose fixed point `solve` finds; it counts calls of its block and of the gradient."""

    def __init__(self, body, solve, scale):
        super().__init__()
        self.body, self.solve, self.scale, self.calls, self.gradients = body, solve, scale, 0, 0

    def forward(self, x):
        injected = self.body.enter(x)

        def block(z):
            self.calls += 1
            new = self.body.layer(z, injected)
            if new.requires_grad:
                new.register_hook(self.passed)
            return new

        return self.body.head(self.solve(block, torch.zeros_like(injected)))

    def passed(self, gradient):
        self.gradients += 1


def solvers(torchdeq, args):
    """The block of chapter 61, untrained; torchdeq's steps depend on the size of the gradient."""
    how = {"stop_mode": "rel", "max_iter": 100, "solver": "anderson", "tol": args.tol}
    peer = torchdeq.get_deq(ift=True, **{f"{way}_{k}": v for k, v in how.items() for way in "fb"})
    ours = partial(fixed_point, steps=100, tol=args.tol)
    body, x = DEQ(3, 10), torch.randn(args.batch, 3, 32, 32)
    theirs, y = lambda f, z: peer(f, z)[0][-1], torch.randint(10, (args.batch, ))
    for scale, name in ((1, "fixed point"), (1e4, "fixed point, loss × 10⁴")):
        yield name, Solved(body, ours, scale), Solved(body, theirs, scale), x, y


PEERS = {"timm": transformers, "segmentation_models_pytorch": unets, "torchdeq": solvers}


def forward(model, x, y):
    """The answer alone."""
    with torch.no_grad():
        model(x)


def training(model, x, y):
    """One step without the optimiser."""
    model.zero_grad(set_to_none=True)
    if isinstance(model, FeedbackModel):
        stepwise_loss(model.trajectory(x), y).backward()
    else:
        (getattr(model, "scale", 1) * F.cross_entropy(model(x), y)).backward()


def calls(step):
    """How often a step calls its block, and the block's gradient."""
    model = step.args[0]
    model.calls = model.gradients = 0
    step()
    return [model.calls, model.gradients]


def rows(package, args):
    """Forward and training step of everything that has this package for a peer."""
    try:
        peer = importlib.import_module(package)
    except ImportError:
        missing = f"not installed: pip install {package.replace('_', '-')}"
        yield {"network": PEERS[package].__name__, "peer": package, "missing": missing}
        return
    named = f"{package} {importlib.metadata.version(package)}"
    torch.manual_seed(0)
    for name, ours, theirs, x, y in PEERS[package](peer, args):
        solved = isinstance(ours, Solved)
        work = [1, 1] if solved else [multiply_adds(net, x) for net in (theirs, ours)]
        for step in (forward, training) if not solved or ours.scale == 1 else (training, ):
            sides = [partial(step, net.train(step is training), x, y) for net in (theirs, ours)]
            row = {"network": name, "step": step.__name__, "peer": named, "batch": len(x)}
            if solved:
                theirs_called, row["calls"] = map(calls, sides)
                row["calls of the peer"] = theirs_called
            else:
                row |= {"GMAC": work[1] / 1e9, "GMAC of the peer": work[0] / 1e9}
            of = ", per multiply-add" if work[0] != work[1] else ""
            ratio = in_turn(sides, args.rounds, args.device)[1] * work[0] / work[1]
            bound = None if solved and (step is forward or ours.scale > 1) else BOUND
            yield row | {f"times the peer{of}": ratio, "bound": bound}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="of images of 32×32 pixels")
    parser.add_argument("--large-batch", type=int, default=2, help="of larger images")
    parser.add_argument("--size", type=int, default=128, help="of the U-Nets' images, pixels")
    parser.add_argument("--steps", type=int, default=5, help="T of the feedback U-Net")
    parser.add_argument("--tol", type=float, default=1e-3, help="residual of the fixed points")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="both in turn; medians count")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[*PEERS])
    parser.add_argument("--record", type=Path,
                        help="write the rows to this JSON file (results/bench_peers.json)")
    args = parser.parse_args(argv)
    args.device = "cpu"
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # torchdeq's own
    table = []
    for package in args.peers:
        for row in rows(package, args):
            table.append(row)
            show(row)
    if args.record:
        chosen = ("batch", "large_batch", "size", "steps", "tol", "rounds")
        record(args.record, args, chosen, table, clock="CPU time of the process",
               load=round(os.getloadavg()[0], 1))


if __name__ == "__main__":
    main()
