"""What chapter 13 calls a certificate: bounds on every part of a CBL's loop, and what follows from
them. The chapter exports nothing, so its own cells are tested."""

import ast
import copy
import json
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from feedback_nb.cbl import CBL, cnn
from feedback_nb.fixed_points import iterate, lipschitz

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "13_cbl_theorem.ipynb"


@pytest.fixture(scope="module")
def lab():
    """The imports, functions and classes of the notebook, without what it runs."""
    cells = [
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    space = {"__name__": "lab"}
    for source in cells:
        if re.match(r"(#\|.*\n)*import copy\n", source):
            exec(source.replace("use_style()", ""), space)
        elif re.match(r"(#.*\n)*(@torch|class |def |SIZES|TIMES)", source):
            constant = lambda node: isinstance(node, ast.Assign) and getattr(
                node.targets[0], "id", "").isupper()
            kept = [
                node for node in ast.parse(source).body
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) or constant(node)
            ]
            exec(compile(ast.Module(kept, []), "13_cbl_theorem", "exec"), space)
    return SimpleNamespace(**space)


def images(n=4, seed=0):
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def disturbed(model, seed, scale=0.3):
    """Weights, biases and running statistics moved at random, as training moves them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * p.abs().mean() * torch.randn(p.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.2, 2.0, generator=generator)
            elif name.endswith(("running_mean", ".mean")):
                buffer.normal_(0, 0.3, generator=generator)
    return model


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3, 5]), st.integers(3, 7),
       st.integers(0, 10**6))
def test_the_fourier_bound_is_a_bound_and_no_wild_one(lab, inputs, outputs, k, size, seed):
    kernel = torch.randn(outputs, inputs, k, k, generator=torch.Generator().manual_seed(seed),
                         dtype=torch.double)
    basis = torch.eye(inputs * size**2, dtype=torch.double).view(-1, inputs, size, size)
    exact = torch.linalg.matrix_norm(F.conv2d(basis, kernel, padding=k // 2).flatten(1), 2)
    bound = lab.fourier_norm(kernel, size)
    assert exact <= bound * (1 + 1e-9) and bound <= 2.5 * exact
    if k == 1:
        assert_close(bound, exact)  # without padding nothing is given away


def test_a_kernel_of_norm_one_is_a_convolution_of_norm_three(lab):
    box = torch.full((1, 1, 3, 3), 1 / 3)
    assert_close(torch.linalg.matrix_norm(box.flatten(1), 2),
                 torch.tensor(1.0))  # what spectral_norm looks at
    norm = lipschitz(lambda h: F.conv2d(h, box, padding=1), torch.zeros(1, 1, 20, 20))[0]
    assert_close(float(norm), (1 + 2 * math.cos(math.pi / 21))**2 / 3, atol=1e-3,
                 rtol=0)  # separable: the eigenvalues by hand
    assert 2.95 < norm <= lab.fourier_norm(box, 20) <= 3 + 1e-6


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 100), st.floats(0.001, 10), st.integers(0, 10**6))
def test_the_clipped_gate_is_jointly_lipschitz(lab, size, near, seed):
    torch.manual_seed(seed)
    gate = lab.ClippedGate(3, 4)
    nn.init.normal_(gate.gate.weight, std=1.0)
    h, z = size * torch.randn(16, 3, 5, 5), torch.randn(16, 4)
    h2, z2 = h + near * torch.randn_like(h), z + near * torch.randn_like(z)
    with torch.no_grad():
        moved = (gate(h, z) - gate(h2, z2)).flatten(1).norm(dim=1)
        c = 0.5 * 5 * torch.linalg.matrix_norm(gate.gate.weight, 2)
        assert (moved <= (h - h2).flatten(1).norm(dim=1) + c * (z - z2).norm(dim=1) + 1e-5).all()


def test_the_ordinary_gate_has_no_such_constant(lab):
    gate = CBL(cnn(1, width=4), example=images()).adapters["stage1"]
    z = torch.randn(2, 64)
    with torch.no_grad():
        moved = [
            float((gate(size * torch.ones(1, 4, 5, 5), z[:1]) -
                   gate(size * torch.ones(1, 4, 5, 5), z[1:])).norm()) for size in (1, 1000)
        ]
    assert moved[1] > 900 * moved[0] > 0


@pytest.mark.parametrize("name", ["contractive_cbl", "short_loop_cbl"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_pair_of_contexts_beats_the_certificate(lab, name, seed):
    torch.manual_seed(seed)
    model = lab.certify(disturbed(getattr(lab, name)(width=4), seed))
    gain = lab.certificate(model).gain
    assert gain <= 0.9
    R, generator = lab.loop(model, images()), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for near in (1.0, 1e-2):
            a = torch.rand(4, 32, generator=generator) * 2 - 1
            b = a + near * torch.randn(4, 32, generator=generator)
            assert ((R(a) - R(b)).norm(dim=1) <= gain * (a - b).norm(dim=1) + 1e-6).all()
        assert (lipschitz(R, a, iters=60, tol=1e-3) <= gain).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_certificate_also_bounds_networks_without_limits(lab, seed):
    torch.manual_seed(seed)
    model = disturbed(lab.clipped_cbl(cnn(1, width=4, hidden=16)), seed, scale=1.0).eval()
    a = torch.rand(4, 32) * 2 - 1
    with torch.no_grad():
        assert (lipschitz(lab.loop(model, images(seed=seed)), a, iters=60, tol=1e-3)
                <= lab.certificate(model).gain).all()


@pytest.mark.parametrize("layer", ["stage3", "stage4"])
def test_the_bound_is_reached_where_every_part_is_aligned(lab, layer):
    """One gate, one channel, one grey: the product of the bounds is then the true slope, also where
    nine positions share the gate."""
    net = nn.Sequential()
    for name in ("stage1", "stage2", "stage3"):
        net.add_module(name, nn.Sequential(nn.MaxPool2d(2)))
    net.add_module("stage4", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    net.add_module("fc1", nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU()))
    net.add_module("fc2", nn.Linear(1, 1, bias=False))
    model = lab.clipped_cbl(net, [layer])
    model.context = Tiny(1)
    model.adapters[layer].gate = nn.Linear(1, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.0) if p.dim() == 1 else p.fill_(0.7)
    x = torch.full((1, 1, 28, 28), 2.0)  # at the clip, with the gate at its steepest
    slope = lipschitz(lab.loop(model.eval(), x), torch.zeros(1, 1))[0]
    at = torch.tanh(torch.tensor(
        0.7 * 0.7 * 0.7 * 1.0))  # where g stands: the factor that |tanh'| ≤ 1 gives away
    assert_close(float(slope), lab.certificate(model).gain * float(1 - at**2), atol=1e-5, rtol=1e-4)


class Tiny(nn.Module):
    """g: z = tanh(W y), one number."""

    def __init__(self, n):
        super().__init__()
        self.linear = nn.Linear(n, n)

    def forward(self, y):
        return torch.tanh(self.linear(y))


@pytest.mark.parametrize("fault", ["gate", "convolution", "head", "context", "batch norm"])
def test_a_part_that_grows_is_seen_by_the_certificate(lab, fault):
    torch.manual_seed(0)
    model = lab.clipped_cbl(cnn(1, width=4, hidden=16)).eval()
    before = lab.certificate(model).gain
    with torch.no_grad():
        if fault == "batch norm":
            model.net.stage4[1].running_var.fill_(0.01)  # a tenfold scale
        else:
            {
                "gate": model.adapters["stage1"].gate, "convolution": model.net.stage3[0],
                "head": model.net.fc2, "context": model.context.linear
            }[fault].weight.mul_(10)
    after = lab.certificate(model).gain
    assert after > 1.05 * before
    if fault in ("head", "context"):
        assert_close(after / before, 10.0, rtol=1e-4, atol=0)  # every way round passes them


def test_the_first_stage_is_outside_the_loop(lab):
    torch.manual_seed(0)
    model = lab.clipped_cbl(cnn(1, width=4, hidden=16)).eval()
    before = lab.certificate(model)
    with torch.no_grad():
        model.net.stage1[0].weight.mul_(100)
    after = lab.certificate(model)
    assert after.stages["stage1"] > 50 * before.stages["stage1"] and after.gain == before.gain


def test_a_certified_loop_ends_in_one_point_that_depends_on_the_picture(lab):
    torch.manual_seed(0)
    model, x = lab.certify(disturbed(lab.short_loop_cbl(width=4), 0)).double(), images(2).double()
    starts = torch.rand(8, 32, dtype=torch.double) * 2 - 1
    with torch.no_grad():
        ends = [
            iterate(lab.loop(model, picture.expand(8, -1, -1, -1)), starts, steps=150).output
            for picture in x[:, None]
        ]
    for end in ends:
        assert_close(end, end[:1].expand_as(end), atol=1e-10, rtol=0)
    assert (ends[0][0] - ends[1][0]).norm() > 1e-7
    damped = copy.deepcopy(model)
    damped.alpha = 0.5  # another way to the same end
    with torch.no_grad():
        assert_close(damped.context(damped.trajectory(x, steps=150).output),
                     torch.stack([end[0] for end in ends]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_power_iteration_keeps_up_with_a_kernel_that_moves(lab, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 5, 3, padding=1)
    lab.limit_norm(conv, 2.0, size=7)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        (-conv(torch.randn(4, 3, 7, 7)).square().mean()).backward()  # pulls the norm up
        optimizer.step()
    maps = torch.zeros(1, 3, 7, 7)
    with torch.no_grad():
        norm = lambda weight: lipschitz(lambda h: F.conv2d(h, weight, padding=1), maps)[0]
        moving = norm(conv.weight)
        for _ in range(100):
            conv.weight  # noqa: B018 (each look is a step of the power iteration)
        settled = norm(conv.weight)
    assert moving < 2.6  # behind the kernel, which 30 large steps have pulled
    assert 1.99 < settled < 2.1


@pytest.mark.parametrize("flow", ["through", "literal"])
def test_the_maps_are_those_of_the_model(lab, flow):
    torch.manual_seed(0)
    x = images()
    model = lab.one_map(CBL(cnn(1, width=4, hidden=16), example=x, flow=flow))
    model = disturbed(model, 0).eval()
    with torch.no_grad():
        path = model.trajectory(x, steps=3, states=True)
        phi, states = lab.refinement(model, x)
        assert_close(phi(states(path.states[1])), states(path.states[2]))
        if flow == "through":
            model.alpha = 0.0
            path = model.trajectory(x, steps=3)
            assert_close(
                lab.loop(model, x)(model.context(path.outputs[1])), model.context(path.outputs[2]))
            assert_close(lab.answer(model, x, model.context(path.outputs[1])), path.outputs[2])


def test_the_literal_contraction_forgets_its_input(lab):
    torch.manual_seed(0)
    model = lab.contractive_literal(width=4).eval().double()
    with torch.no_grad():
        path = model.trajectory(images(6).double(), steps=300, states=True)
    spread = [
        float((h["stage4"] - h["stage4"][:1]).norm()) for h in (path.states[0], path.states[-1])
    ]
    assert spread[1] < 1e-6 * spread[0]
    assert_close(path.output, path.output[:1].expand_as(path.output), atol=1e-8, rtol=0)


def test_the_implicit_gradient_is_that_of_a_long_unroll(lab):
    torch.manual_seed(0)
    model, x, y = lab.certify(
        lab.short_loop_cbl(width=4)).double(), images(3).double(), torch.tensor([1, 2, 3])

    def gradients(forward):
        model.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    implicit, unrolled = gradients(lab.Equilibrium(
        model, tol=1e-11)), gradients(lambda x: model(x, steps=60))
    assert implicit.keys() == unrolled.keys() and {
        "context.linear.weight", "net.stage1.0.weight", "adapters.stage4.gate.weight"
    } <= implicit.keys()
    for name, gradient in implicit.items():
        assert_close(gradient, unrolled[name], atol=1e-8, rtol=1e-6)


def test_limited_parts_are_trained_by_the_implicit_gradient(lab):
    """The kernels are made once a pass and with their graph: every parameter of the loop must
    move."""
    torch.manual_seed(0)
    model = lab.Equilibrium(lab.contractive_cbl(width=4)).train()
    F.cross_entropy(model(images(8)), torch.arange(8)).backward()
    dead = [
        name for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum())
    ]
    assert dead == []


def test_the_implicit_memory_does_not_grow_with_the_steps(lab):
    torch.manual_seed(0)
    model, x = lab.certify(lab.contractive_cbl(width=4)), images(4)

    def saved(forward):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (found.append(t), t)[1],
                                                      lambda t: t):
            out = forward(x)
        del out
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for t in found}.values())

    implicit = [saved(lab.Equilibrium(model, steps=steps, tol=1e-3)) for steps in (10, 100)]
    unrolled = [saved(partial(model, steps=steps)) for steps in (2, 8)]
    assert implicit[0] == implicit[1] < unrolled[1] and unrolled[1] > 2 * unrolled[0]
