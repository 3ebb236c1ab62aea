"""PCNet against JPC, an independent implementation in JAX (Innocenti and others, 2024).

    python benchmarks/predictive_jpc.py write /tmp/pc.npz
    JAX_ENABLE_X64=1 python benchmarks/predictive_jpc.py check /tmp/pc.npz results/oracle_jpc.json

The first command runs here. The second runs in an environment of its own, which needs JAX and
JPC's sources on its path: pip install "jax<0.6" equinox diffrax optimistix optax, and
https://github.com/thebuckleylab/jpc at the commit that the record names. The same weights, inputs,
step size and number of steps go into both; nodes, energies and gradients must agree.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np

SIZES, T, STEP, BATCH = (12, 16, 14, 10, 5), 25, 0.1, 8


def write(path):
    """Nodes, energy and gradients of PCNet after T steps, in nodes and in errors."""
    import torch
    from torch import nn

    from feedback_nb.predictive import PCNet

    torch.manual_seed(0)
    found = {}
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(SIZES, SIZES[1:])]
    layers = nn.ModuleList([*layers[:-1], layers[-1][0]]).double()  # the last one is linear
    x, y = torch.randn(BATCH, SIZES[0]).double(), torch.randn(BATCH, SIZES[-1]).double()
    for inference in ("states", "errors"):
        model = PCNet(layers, example=x, inference=inference, steps=T, step_size=STEP,
                      check_step=False)
        state = model.settle(x, y)
        model.zero_grad()
        energy = model.learn(x, state)
        found[f"{inference} energy"] = energy.numpy()
        for name, node in state.h.items():
            found[f"{inference} {name}"] = node.numpy()
        for i, p in enumerate(model.parameters()):
            found[f"{inference} gradient {i}"] = p.grad.numpy()
    weights = {f"weight {i}": p.detach().numpy() for i, p in enumerate(model.parameters())}
    np.savez(path, x=x.numpy(), y=y.numpy(), **weights, **found)


def settled(kind, params, x, y):
    """The same with JPC: activities, and gradients in the order of PyTorch's parameters."""
    import jax
    import jax.numpy as jnp
    import jpc

    rate = STEP * BATCH  # JPC's energy is a mean over the batch
    activities = jpc.init_activities_with_ffwd(params[0], x)
    if kind == "states":
        for _ in range(T):
            _, slope = jpc.compute_pc_activity_grad(params, activities, y, x=x, loss_id="mse",
                                                    param_type="sp")
            activities = jax.tree.map(lambda a, g: a - rate * g, activities, slope)
    else:
        errors = jpc.init_epc_errors(list(SIZES), BATCH, "supervised")
        errors = [jnp.zeros((BATCH, size)) for size in SIZES[1:]] if len(errors) < 4 else errors
        for _ in range(T):
            _, slope = jpc.compute_epc_error_grad(params, errors, y, x=x, loss_id="mse",
                                                  param_type="sp")
            errors = [e - rate * g for e, g in zip(errors[:-1], slope)] + errors[-1:]
        below, activities = x, []
        for layer, error in zip(params[0], errors):
            below = jax.vmap(layer)(below) + error
            activities.append(below)
    energy = jpc.pc_energy_fn(params, activities, y, x=x)
    model, _ = jpc.compute_pc_param_grads(params, activities, y, x=x, loss_id="mse",
                                          param_type="sp")
    return energy, activities[:-1], [g for layer in model for g in (layer.weight, layer.bias)]


def check(path, record):
    """The largest difference of each kind, relative to the largest value."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    class Layer(eqx.Module):
        weight: jax.Array
        bias: jax.Array
        last: bool = eqx.field(static=True)

        def __call__(self, h):
            out = self.weight @ h + self.bias
            return out if self.last else jnp.tanh(out)

    ours = np.load(path)
    n = len(SIZES) - 1
    model = [Layer(jnp.array(ours[f"weight {2 * i}"]), jnp.array(ours[f"weight {2 * i + 1}"]),
                   i + 1 == n) for i in range(n)]
    rows = []
    for kind in ("states", "errors"):
        energy, nodes, slopes = settled(kind, (model, None), jnp.array(ours["x"]),
                                        jnp.array(ours["y"]))
        apart = lambda a, name: float(np.abs(np.asarray(a) - ours[name]).max()
                                      / np.abs(ours[name]).max())
        row = {"inference": kind, "energy": apart(energy, f"{kind} energy"),
               "nodes": max(apart(h, f"{kind} h{i}") for i, h in enumerate(nodes, 1)),
               "gradients": max(apart(g, f"{kind} gradient {i}") for i, g in enumerate(slopes))}
        rows.append(row)
        print(row)
        assert max(row["energy"], row["nodes"], row["gradients"]) < 1e-6
    about = {"oracle": "JPC, github.com/thebuckleylab/jpc", "commit": os.environ.get("JPC_COMMIT"),
             "jax": jax.__version__, "sizes": SIZES, "T": T, "step_size": STEP,
             "relative differences": rows}
    Path(record).write_text(json.dumps(about, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "check"))
    parser.add_argument("path")
    parser.add_argument("record", nargs="?", default="results/oracle_jpc.json")
    args = parser.parse_args()
    if args.what == "write":
        write(args.path)
    else:
        check(args.path, args.record)


if __name__ == "__main__":
    main()
