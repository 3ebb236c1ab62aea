"""What the spectral mixer costs: beside its floor, beside attention, and as n grows.

Bounds (issue of chapter 50): forward and backward at most 2.0 times a plain rfft-multiply-irfft at
n = 4096; the crossover with the fused attention core, scaled_dot_product_attention alone, at
n <= 384 on a CPU. Width 256, 4 heads; batch 4, and 1 in the sweep.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from _shared import record, show
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from feedback_nb.cost import peak_bytes
from feedback_nb.fftnet import FNetMixer, SpectralMixer, attention

FLOOR, CROSSOVER = 2.0, 384  # the bounds
SHORT, LONG = (64, 96, 128, 192, 256, 384, 512), (256, 512, 1024, 2048, 4096, 8192, 16384)


class Floor(nn.Module):
    """irfft(w · rfft(x)), filters per head as in the mixer, by torch, in its fastest layout."""

    def __init__(self, n, heads):
        super().__init__()
        self.n, self.heads, self.w = n, heads, nn.Parameter(torch.ones(heads, 1, n // 2 + 1))

    def forward(self, x):
        z = torch.fft.rfft(x.transpose(1, 2).unflatten(1, (self.heads, -1)), norm="ortho")
        return torch.fft.irfft(z * self.w, n=self.n, norm="ortho").flatten(1, 2).transpose(1, 2)


class Written(nn.Module):
    """The released equation in plain torch: what the mixer's own gate and backward pass save."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x):
        m, (B, N, D), H = self.mixer, x.shape, self.mixer.heads
        u = m.pre_norm(x)
        s, t = m.adaptive_mlp(u.mean(1)).view(B, H, -1, 2).unbind(-1)
        z = torch.fft.rfft(u.view(B, N, H, -1).transpose(1, 2), dim=2, norm="ortho")
        z = z * (m.base_filter * (1 + s[..., None])) + (m.base_bias + t[..., None])
        z = z * (F.gelu(z.abs()) / (z.abs() + 1e-6))
        return x + torch.fft.irfft(z, n=N, dim=2, norm="ortho").transpose(1, 2).reshape(B, N, D)


class Core(nn.Module):
    """Softmax attention without norm, projections and residual; `fused=False`: its formula."""

    def __init__(self, heads, fused=True):
        super().__init__()
        self.heads, self.backend = heads, None if fused else SDPBackend.MATH

    def forward(self, x):
        q = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.backend is None:
            return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(-2)
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(-2)


def forward(model, x):
    with torch.no_grad():
        model(x)


def training(model, x):
    model.zero_grad(set_to_none=True)
    x.grad = None
    model(x).backward(x.detach())


def seconds(fn, model, x, repeats):
    """CPU seconds of this process on a CPU, whatever else runs there; wall clock on a GPU."""
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter
    sync = (lambda: None) if x.device.type == "cpu" else torch.cuda.synchronize
    sync()
    start = clock()
    for _ in range(repeats):
        fn(model, x)
    sync()
    return (clock() - start) / repeats


def in_turn(fn, models, x, rounds, repeats=1):
    """{name: seconds of each round}; all take turns, the first round warms up."""
    times = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            t = seconds(fn, model, x, repeats)
            if number:
                times[name].append(t)
    return times


def beside_floor(args):
    """Rows of forward and training at n = 4096."""
    n, rows = 4096, []
    mixer = SpectralMixer(args.dim, n, args.heads).to(args.device)
    models = {
        "floor": Floor(n, args.heads).to(args.device),
        "mixer": mixer,
        "written out in torch": Written(mixer),
    }
    x = torch.randn(args.batch, n, args.dim, device=args.device, requires_grad=True)
    for fn in (training, forward):
        times = in_turn(fn, models, x, args.rounds)
        for name in ("mixer", "written out in torch"):
            ratios = [t / f for t, f in zip(times[name], times["floor"], strict=True)]
            row = {
                "measured": fn.__name__,
                "n": n,
                "what": name,
                "times the floor": statistics.median(ratios),
                "lowest round": min(ratios),
                "highest round": max(ratios),
            }
            rows.append(
                {
                    **row,
                    "floor_ms": 1e3 * statistics.median(times["floor"]),
                    "bound": FLOOR if fn is training and name == "mixer" else None,
                }
            )
    return rows


def crossover(args):
    """Rows of time against the fused core at short n, and the n from which the mixer is faster."""
    rows, found = [], {}
    for fn in (forward, training):
        gaps = []
        for n in SHORT:
            x = torch.randn(args.batch, n, args.dim, device=args.device, requires_grad=True)
            models = {"mixer": SpectralMixer(args.dim, n, args.heads), "core": Core(args.heads)}
            times = in_turn(
                fn, {k: m.to(args.device) for k, m in models.items()}, x, args.rounds, args.repeats
            )
            ratio = statistics.median(
                a / b for a, b in zip(times["mixer"], times["core"], strict=True)
            )
            gaps.append((n, math.log(ratio)))
            rows.append(
                {
                    "measured": fn.__name__,
                    "n": n,
                    "mixer / fused core": ratio,
                    "core_ms": 1e3 * statistics.median(times["core"]),
                }
            )
        slower = [i for i, (_, gap) in enumerate(gaps) if gap > 0]
        last = slower[-1] if slower else None
        if last is None or last + 1 == len(gaps):
            found[fn.__name__] = SHORT[0] if last is None else None
        else:
            (a, high), (b, low) = gaps[last], gaps[last + 1]
            found[fn.__name__] = round(a * (b / a) ** (high / (high - low)))
    return rows, found


def sweep(args):
    """Rows of time, memory and parameters against n, one sequence at a time."""
    build = {
        "FFTNet, released": lambda n: SpectralMixer(args.dim, n, args.heads),
        "FFTNet, 33 anchors": lambda n: SpectralMixer(args.dim, None, args.heads, anchors=33),
        "FNet": lambda n: FNetMixer(args.dim),
        "attention, projections": lambda n: attention(args.dim, None, args.heads),
        "attention core, fused": lambda n: Core(args.heads),
        "attention core, plain formula": lambda n: Core(args.heads, fused=False),
    }
    rows = []
    for n in LONG:
        x = torch.randn(1, n, args.dim, device=args.device, requires_grad=True)
        models = {
            k: make(n).to(args.device) for k, make in build.items() if n <= 4096 or "plain" not in k
        }
        times = {
            fn.__name__: in_turn(fn, models, x, 3 if n < 8192 else 1) for fn in (forward, training)
        }
        for name, model in models.items():
            row = {"model": name, "n": n, "parameters": sum(p.numel() for p in model.parameters())}
            row |= {f"{what}_ms": 1e3 * statistics.median(t[name]) for what, t in times.items()}
            row["peak_mb"] = (
                peak_bytes(lambda model=model, x=x: training(model, x), x.device) / 1e6
            )
            rows.append(row)
    return rows


def slope(rows, model, column, start=1024):
    """Exponent p of column ~ n^p, by least squares on logarithms from n = start on."""
    points = [
        (math.log(r["n"]), math.log(r[column]))
        for r in rows
        if r["model"] == model and r["n"] >= start and r[column] > 0
    ]
    if len(points) < 3:
        return None
    mean = [sum(p[i] for p in points) / len(points) for i in (0, 1)]
    return sum((a - mean[0]) * (b - mean[1]) for a, b in points) / sum(
        (a - mean[0]) ** 2 for a, _ in points
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        help="rounds of all measurements in turn; the median ratio counts",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="passes per measurement of short sequences"
    )
    parser.add_argument("--no-sweep", action="store_true", help="leave out n = 256 … 16,384")
    parser.add_argument(
        "--record", type=Path, help="write the rows to this JSON file (results/bench_fftnet.json)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    floor = beside_floor(args)
    short, found = crossover(args)
    print(
        f"width {args.dim}, {args.heads} heads, batch {args.batch}, {args.device}, "
        f"{torch.get_num_threads()} threads"
    )
    for row in [*floor, *short]:
        show(row)
    print(f"the mixer overtakes the fused attention core at n = {found} (bound: {CROSSOVER})")
    rows, slopes = [] if args.no_sweep else sweep(args), {}
    for row in rows:
        show(row)
    for name in dict.fromkeys(row["model"] for row in rows):
        columns = [c for c in ("forward_ms", "training_ms", "peak_mb") if c in rows[0]]
        slopes[name] = {
            c: value and round(value, 3) for c in columns for value in [slope(rows, name, c)]
        }
        print(f"exponent of n from 1,024 on, {name}: {slopes[name]}")
    if args.record:
        clock = "CPU time of the process" if args.device == "cpu" else "wall clock"
        more = {
            "clock": clock,
            "crossover": found,
            "crossover_bound": CROSSOVER,
            "slopes": slopes,
            "short": short,
            "sweep": rows,
        }
        record(args.record, args, ("dim", "heads", "batch", "rounds", "repeats"), floor, **more)


if __name__ == "__main__":
    main()
