"""What the benchmarks share: the plain and the looped training step, the machine they ran on, and
the table and record at the end."""

import json
import platform
import subprocess

import torch
from torch.nn import functional as F

from feedback_nb.feedback import stepwise_loss


def plain(net, x, y):
    net.zero_grad(set_to_none=True)
    F.cross_entropy(net(x), y).backward()


def looped(model, x, y):
    model.zero_grad(set_to_none=True)
    stepwise_loss(model.trajectory(x), y).backward()


def show(row):
    print(
        "  ".join(f"{k}: {v:.2f}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items()),
        flush=True)


def facts(device):
    """Commit, versions and machine."""
    named = torch.cuda.get_device_name() if device.startswith(
        "cuda") else f"CPU ({platform.machine()})"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                            text=True).stdout.strip()
    return {"commit": commit, "torch": torch.__version__, "python": platform.python_version(),
            "device": named, "threads": torch.get_num_threads(), "seed": 0}


def record(path, args, settings, rows, **more):
    """Write the rows with the facts and the named settings of `args`."""
    chosen = {key: getattr(args, key) for key in settings}
    path.write_text(
        json.dumps({**facts(args.device), **chosen, **more, "rows": rows}, indent=1) + "\n")
