"""Chapters 25 and 26: energies that fall, closed forms, local gradients, backpropagation."""
import copy
import pickle
import warnings
from itertools import islice

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from feedback_nb.predictive import (
    PCClassifier,
    PCNet,
    SparsePrior,
    StepTooLarge,
    half_square,
    incremental_step,
    shuffled_decoders,
)
from feedback_nb.predictive_unet import PCUNet
from feedback_nb.training import fit
from feedback_nb.unet import SettlingUNet

WIDE = torch.float64
FEW = {"deadline": None, "phases": [Phase.explicit, Phase.reuse, Phase.generate]}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def linear(*sizes, **options):
    layers = [nn.Linear(a, b, dtype=WIDE) for a, b in zip(sizes, sizes[1:], strict=False)]
    options.setdefault("check_step", False)
    return PCNet(layers, example=torch.zeros(1, sizes[0], dtype=WIDE), **options)


def batch(n, *sizes):
    return [torch.randn(n, size, dtype=WIDE) for size in sizes]


def energies(model, x, steps, **context):
    with torch.no_grad():
        return [model.energy(x, s).sum() for s in islice(model.states(x, **context), steps + 1)]


def hessian(model, x, state):
    """The Hessian of one example's energy, dense."""
    names, sizes = list(state.h), [v.numel() for v in state.h.values()]

    def energy(flat):
        parts = zip(names, flat.split(sizes), strict=True)
        h = {name: v.view_as(state.h[name]) for name, v in parts}
        return model.energy(x, state._replace(h=h)).sum()

    return torch.func.hessian(energy)(torch.cat([v.flatten() for v in state.h.values()]))


# Inference


@pytest.mark.parametrize("precision, prior", [(1.0, 0.5), ([0.5, 2.0, 3.0], 1.5)])
def test_the_settled_state_of_a_linear_chain_is_the_posterior_mean(precision, prior):
    model = linear(4, 6, 5, 3, precision=precision, prior=prior, steps=1500)
    x, y = batch(5, 4, 3)
    first = next(model.states(x, target=y))
    model.step_size = 0.9 * model.bound(x, first)
    found = model.settle(x, y)
    # h_0 ~ N(x, 1/π_0), h_l ~ N(W h + b, 1/π_l): Gaussian, so its mean solves a linear system
    mean, cov, cross = x, torch.eye(4, dtype=WIDE) / prior, torch.eye(4, dtype=WIDE) / prior
    for layer, weight in zip(model.layers, model.precision, strict=True):
        W, b = layer.weight, layer.bias
        mean, cross = mean @ W.T + b, cross @ W.T
        cov = W @ cov @ W.T + torch.eye(len(W), dtype=WIDE) / weight
    posterior = x + (y - mean) @ torch.linalg.solve(cov, cross.T)
    assert_close(found.h["h0"], posterior, atol=1e-6, rtol=0)
    gap = y - mean
    assert_close(model.energy(x, found), (gap * torch.linalg.solve(cov, gap.T).T).sum(1) / 2,
                 atol=1e-6, rtol=0)


def test_missing_entries_of_the_target_do_not_count():
    model, known = linear(4, 3, prior=0.7, steps=300), torch.tensor([1.0, 0.0, 1.0], dtype=WIDE)
    x, y = batch(5, 4, 3)
    W, b, part = model.layers[0].weight, model.layers[0].bias, [0, 2]
    cov = W[part] @ W[part].T / 0.7 + torch.eye(2, dtype=WIDE)
    gap = (y - x @ W.T - b)[:, part]
    wanted = x + torch.linalg.solve(cov, gap.T).T @ W[part] / 0.7
    for y2 in (y, torch.where(known > 0, y, 99.0)):
        assert_close(model.settle(x, y2, known=known).h["h0"], wanted, atol=1e-6, rtol=0)


@settings(max_examples=20, **FEW)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 6), min_size=3, max_size=5),
       st.floats(0.2, 4.0), st.floats(0.02, 0.98))
def test_below_the_bound_the_energy_of_a_linear_net_never_rises(seed, sizes, precision, share):
    torch.manual_seed(seed)
    model = linear(*sizes, precision=precision)
    x, y = batch(2, sizes[0], sizes[-1])
    state = next(model.states(x, target=y))
    with torch.no_grad():
        top = max(torch.linalg.eigvalsh(hessian(model, x[i:i + 1], part(state, i)))[-1]
                  for i in (0, 1))
    model.step_size = float(share * 2 / top)
    path = energies(model, x, 40, target=y)
    assert all(b <= a * (1 + 1e-12) for a, b in zip(path, path[1:], strict=False))


@settings(max_examples=8, **FEW)
@given(st.integers(0, 10**6), st.lists(st.integers(2, 6), min_size=3, max_size=5),
       st.floats(1.1, 2.0))
def test_above_the_bound_it_rises_and_the_bound_is_named(seed, sizes, share):
    torch.manual_seed(seed)
    model = linear(*sizes, check_step=True, steps=60)
    x, y = batch(2, sizes[0], sizes[-1])
    state = next(model.states(x, target=y))
    tops = [torch.linalg.eigvalsh(hessian(model, x[i:i + 1], part(state, i)))[-1].detach()
            for i in (0, 1)]
    bound = float(2 / max(tops))
    assert_close(model.bound(x, state, iters=1000), bound, rtol=1e-2, atol=0)
    model.step_size = share * bound
    path = energies(model, x, 60, target=y)
    assert path[-1] > path[0]
    with pytest.warns(StepTooLarge, match=f"{model.step_size:g}"):
        model.settle(x, y)


@settings(max_examples=15, **FEW)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=3, max_size=5))
def test_a_certified_step_lets_the_energy_of_a_tanh_net_fall(seed, sizes):
    """‖H‖ ≤ (1 + w)² + w² c √(2 E_0): errors stay below √(2 E_0), |tanh''| below 0.77."""
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(sizes, sizes[1:])]
    model = PCNet(layers, example=torch.zeros(1, sizes[0]), check_step=False).to(WIDE)
    x, y = batch(2, sizes[0], sizes[-1])
    start = float(energies(model, x, 0, target=y)[0])
    w = max(float(torch.linalg.matrix_norm(layer[0].weight, 2)) for layer in layers)
    model.step_size = 1 / ((1 + w) ** 2 + 0.77 * w ** 2 * (2 * start) ** 0.5)
    path = energies(model, x, 40, target=y)
    assert all(b <= a * (1 + 1e-12) for a, b in zip(path, path[1:], strict=False))


def part(state, i):
    """One example of a state."""
    memo = {k: None if v is None else v[i:i + 1] for k, v in state.memo.items()}
    h = {k: v[i:i + 1] for k, v in state.h.items()}
    return state._replace(h=h, y=state.y[i:i + 1], memo=memo)


def test_the_rate_is_that_of_the_spectrum():
    model, (x, y) = linear(4, 5, 5, 3), batch(1, 4, 3)
    state = next(model.states(x, target=y))
    spectrum = torch.linalg.eigvalsh(hessian(model, x, state))
    model.step_size = float(1.5 / spectrum[-1])
    rate = (1 - model.step_size * spectrum).abs().max()
    residuals = model.trajectory(x, target=y, steps=60).residuals
    with torch.no_grad():
        sizes = [torch.cat([g.flatten() for g in model.gradient(x, s).values()]).norm()
                 for s in islice(model.states(x, target=y), 42)]
    assert_close(sizes[41] / sizes[40], rate, rtol=1e-2, atol=0)
    assert residuals[-1] < 1e-8


def test_residuals_do_not_depend_on_the_step_size():
    model, (x, y) = linear(4, 5, 3), batch(3, 4, 3)
    first = []
    for model.step_size in (1e-3, 0.3):
        first.append(model.trajectory(x, target=y, steps=1).residuals)
    assert_close(*first)


def test_without_a_target_inference_changes_nothing():
    for inference in ("states", "errors"):
        model, (x,) = linear(4, 5, 6, 3, inference=inference), batch(5, 4)
        path = model.trajectory(x, steps=7)
        assert len(path.outputs) == 8 and path.residuals.eq(0).all()
        assert all(torch.equal(y, path.outputs[0]) for y in path.outputs)
        assert torch.equal(path.outputs[0], nn.Sequential(*model.layers)(x))


# Learning


def backprop(model, x, y):
    """Gradients of ½‖f(x) - y‖², mean over the examples."""
    loss = half_square(nn.Sequential(*model.layers)(x) - y).mean()
    return torch.autograd.grad(loss, list(model.parameters()))


def local(model, x, state, **options):
    model.zero_grad()
    model.learn(x, state, **options)
    return [p.grad for p in model.parameters()]


def apart(a, b):
    return max(float((p - q).norm() / q.norm()) for p, q in zip(a, b, strict=True))


def tanh_net(**options):
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in ((4, 6), (6, 5), (5, 3))]
    return PCNet(layers, example=torch.zeros(1, 4), check_step=False, **options).to(WIDE)


@pytest.mark.parametrize("make", [tanh_net, lambda **o: linear(4, 6, 5, 3, **o)])
def test_with_a_weak_output_the_updates_are_those_of_backpropagation(make):
    x, y = batch(6, 4, 3)
    gaps = []
    for weak in (1e-2, 1e-4, 1e-6):
        torch.manual_seed(0)
        model = make(precision=[1, 1, weak], steps=400, step_size=0.3)
        gaps.append(apart([g / weak for g in local(model, x, model.settle(x, y))],
                          backprop(model, x, y)))
    assert gaps[2] < 1e-5 and gaps[1] < gaps[0] / 50 and gaps[2] < gaps[1] / 50


def test_a_near_target_alone_does_not_make_it_backpropagation():
    model, (x, y) = linear(4, 6, 5, 3, steps=1000, step_size=0.3), batch(6, 4, 3)
    state = model.settle(x, y, nudge=1e-6)
    got = [g / 1e-6 for g in local(model, x, state)]
    assert apart(got, backprop(model, x, y)) > 0.1
    W = [layer.weight for layer in model.layers]
    S = torch.eye(3, dtype=WIDE) + W[2] @ W[2].T + W[2] @ W[1] @ W[1].T @ W[2].T
    with torch.no_grad():  # backpropagation of an error that was divided by S
        y0 = nn.Sequential(*model.layers)(x)
        divided = y0 + torch.linalg.solve(S, (y - y0).T).T
    assert apart(got, backprop(model, x, divided)) < 1e-5


def test_one_step_of_errors_has_the_errors_of_backpropagation_but_not_its_weights():
    x, y = batch(6, 4, 3)
    gaps = []
    for step in (1.0, 1e-3, 1e-6):
        torch.manual_seed(0)
        model = tanh_net(inference="errors", steps=1, step_size=step)
        state = model.settle(x, y)
        errors = model.errors(x, state.h)
        h1 = model.layers[0](x).detach().requires_grad_()
        h2 = model.layers[1](h1)
        loss = half_square(model.layers[2](h2) - y).sum()
        for e, delta in zip(errors.values(), torch.autograd.grad(loss, [h1, h2]), strict=True):
            assert_close(e, -step * delta, atol=1e-12, rtol=1e-6)
        got, want = local(model, x, state), backprop(model, x, y)
        assert apart([g / step for g in got[:2]], want[:2]) < 1e-6  # the first layer: exact
        gaps.append(apart([g / step for g in got[2:4]], want[2:4]))
    assert gaps[0] > 0.01 and gaps[1] < 1e-2 and gaps[2] < 1e-5


@pytest.mark.parametrize("prior", [None, 0.7, SparsePrior(0.4)])
def test_the_slopes_are_those_of_the_energy_in_the_errors(prior):
    model, (x, y) = tanh_net(prior=prior, precision=[0.5, 2.0, 3.0], steps=4), batch(6, 4, 3)
    state = model.settle(x, y, known=torch.tensor([1.0, 0.0, 1.0], dtype=WIDE))
    errors, slopes = model.slopes(x, state)
    names = list(errors)

    def energy(*values):
        free, h, below = dict(zip(names, values, strict=True)), {}, x
        for i, layer in enumerate(model.layers):
            if f"h{i}" in free:
                below = h[f"h{i}"] = below + free[f"h{i}"]
            below = layer(below)
        return model.energy(x, state._replace(h=h)).sum()

    leaves = [errors[name].detach().requires_grad_() for name in names]
    wanted = torch.autograd.grad(energy(*leaves), leaves)
    for name, slope in zip(names, wanted, strict=True):
        assert_close(slopes[name], slope, atol=1e-12, rtol=1e-9)


def test_the_bound_is_that_of_what_inference_moves():
    x, y = batch(1, 4, 3)
    for inference, wide in (("states", 0), ("errors", 1)):
        torch.manual_seed(0)
        model = linear(4, 6, 5, 3, inference=inference)
        state = next(model.states(x, target=y))
        W1, W2 = model.layers[1].weight, model.layers[2].weight
        if wide:  # E = ½‖ε_1‖² + ½‖ε_2‖² + ½‖y - W_3 (W_2 ε_1 + ε_2) - …‖²
            up = torch.cat([W2 @ W1, W2], 1)
            top = torch.linalg.eigvalsh(torch.eye(11, dtype=WIDE) + up.T @ up)[-1]
        else:
            top = torch.linalg.eigvalsh(hessian(model, x, state))[-1]
        assert_close(model.bound(x, state, iters=500), float(2 / top), rtol=1e-3, atol=0)


def test_both_ways_of_inference_settle_in_the_same_state():
    x, y = batch(6, 4, 3)
    found = []
    for inference, step in (("states", 0.3), ("errors", 0.3)):
        torch.manual_seed(0)
        model = tanh_net(inference=inference, steps=600, step_size=step)
        found.append(model.settle(x, y).h)
    assert_close(found[0], found[1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("only", ["layer 1", "layer 2", "layer 3"])
def test_an_error_reaches_its_own_layer_alone(only):
    model, (x, y) = tanh_net(), batch(6, 4, 3)
    local(model, x, model.settle(x, y), only=only)
    for i, layer in enumerate(model.layers, 1):
        assert all((p.grad is not None) == (only == f"layer {i}") for p in layer.parameters())


def test_the_local_update_is_the_gradient_of_the_settled_energy():
    model, (x, y) = tanh_net(steps=1000, step_size=0.3), batch(6, 4, 3)
    grads = local(model, x, model.settle(x, y))
    weight, eps = model.layers[1][0].weight, 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[2, 3] += sign * eps
            values.append(model.energy(x, model.settle(x, y)).mean())
            weight[2, 3] -= sign * eps
    assert_close((values[0] - values[1]) / (2 * eps), grads[2][2, 3], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"learning": "every step"}, {"inference": "errors"}])
def test_fit_trains(options):
    x = torch.randn(64, 6)
    data = TensorDataset(x, (x[:, 0] > 0).long())
    layers = [nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 2)]
    model = PCNet(layers, example=x[:1], steps=8, step_size=0.2, **options)
    history = fit(model, (data, data), epochs=15, lr=0.03, batch_size=16, progress=False)
    assert history.rows[-1]["valid_accuracy"] > 0.9
    assert history.rows[-1]["train_loss"] < history.rows[0]["train_loss"] / 2


def test_incremental_learning_steps_the_optimizer_with_every_step_of_inference():
    x = torch.randn(32, 6)
    y = (x[:, 0] > 0).long()
    layers = [nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 2)]
    model = PCNet(layers, example=x[:1], steps=5, step_size=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    values = [float(incremental_step(model, optimizer, x, y)) for _ in range(30)]
    assert values[-1] < values[0] / 2
    assert all(int(s["step"]) == 150 for s in optimizer.state.values())


# Contract


def contract():
    torch.manual_seed(0)
    net = [nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 4), nn.Linear(4, 3)]
    conv = [nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.Tanh()),
            nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.Tanh()),
            nn.Sequential(nn.Flatten(), nn.Linear(24, 3))]
    back = [nn.ConvTranspose2d(4, 1, 2, 2), nn.ConvTranspose2d(6, 4, 2, 2)]
    x, image = torch.randn(5, 6), torch.rand(5, 1, 8, 8)
    return {
        "pc": (PCNet(net, example=x, steps=3), x),
        "errors": (PCNet(net, example=x, steps=3, inference="errors"), x),
        "prior": (PCNet(net, example=x, steps=3, prior=SparsePrior(0.5)), x),
        "conv": (PCNet(conv, example=image, steps=3), image),
        "classifier": (PCClassifier(conv, back, example=image, steps=3), image),
        "unet": (PCUNet(1, 2, channels=(4, 6), steps=3, step_size=0.02), image),
        "settling": (SettlingUNet(1, 2, channels=(4, 6), state=4, steps=3), image),
    }


@pytest.mark.parametrize("name", list(contract()))
def test_contract(name):
    model, x = contract()[name]
    model.eval()
    with torch.no_grad():
        path, y = model.trajectory(x, states=True), model(x)
        assert len(path.outputs) == 4 and torch.equal(path.output, y)
        assert torch.equal(model(x, steps=0), path.outputs[0])
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), y)
        assert_close(model(x[1:2]), y[1:2])  # alone, and in another batch size
        assert_close(model(x.flip(0)), y.flip(0))
        phi, state = model.map(x)
        assert_close(phi(state)[1], path.outputs[1])
        torch._dynamo.reset()
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)
    assert model(x).requires_grad  # it can be unrolled


# Errors


@pytest.mark.parametrize("options, name", [
    ({"precision": 0}, "precision"), ({"precision": [1, -1]}, "precision"),
    ({"precision": [1, 1, 1]}, "precision"), ({"prior": -1.0}, "prior"),
    ({"step_size": 0}, "step_size"), ({"inference": "nodes"}, "inference"),
    ({"learning": "later"}, "learning")])
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        linear(4, 3, 2, **options)


@pytest.mark.parametrize("layers, name", [
    ([nn.Linear(4, 3), nn.Linear(5, 2)], "layer 1 .Linear."),
    ([nn.Linear(4, 3), nn.BatchNorm1d(3)], "BatchNorm1d"),
    ([nn.Linear(4, 3), nn.Dropout(0.5)], "Dropout"),
    ([nn.Linear(4, 3), nn.ReLU(inplace=True)], "inplace"),
    ([nn.Linear(4, 3)], "prior"), ([nn.Linear(4, 3), nn.LSTM(3, 2)], "tensor")])
def test_layers_that_do_not_fit_are_named(layers, name):
    with pytest.raises(ValueError, match=name):
        PCNet(layers, example=torch.zeros(2, 4))


@pytest.mark.parametrize("target", [torch.zeros(5, 4), torch.zeros(4, 3), "a"])
def test_a_target_of_another_shape_is_named(target):
    with pytest.raises(ValueError, match="target"):
        tanh_net().settle(torch.zeros(5, 4, dtype=WIDE), target)


def test_training_needs_a_target():
    model, (x,) = tanh_net(), batch(2, 4)
    for train in (model.local_backward, lambda x, y: incremental_step(model, None, x, y)):
        with pytest.raises(ValueError, match="target"):
            train(x, None)


def test_training_warns_once_of_a_step_above_the_bound():
    model, (x, y) = linear(4, 5, 3, step_size=1.99, check_step=True, steps=1), batch(3, 4, 3)
    with pytest.warns(StepTooLarge, match="1.99 is above") as caught:
        model.local_backward(x, y)
    assert len(caught) == 1
    model.step_size = 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.local_backward(x, y)


def test_settling_warns_once_of_a_step_above_the_bound():
    model, (x, y) = linear(4, 5, 3, step_size=3.0, check_step=True, steps=9), batch(3, 4, 3)
    with pytest.warns(StepTooLarge):
        model.settle(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the bound costs more than the steps do
        model.settle(x, y)


def test_decoders_that_do_not_fit_are_named():
    _, image = contract()["classifier"]
    layers = [nn.Conv2d(1, 4, 3, 2, 1), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))]
    with pytest.raises(ValueError, match="decoder 1"):
        PCClassifier(layers, [nn.ConvTranspose2d(4, 2, 2, 2)], example=image)
    with pytest.raises(ValueError, match="decoders"):
        PCClassifier(layers, [], example=image)
    with pytest.raises(ValueError, match="memory"):
        PCClassifier(layers, [nn.ConvTranspose2d(4, 1, 2, 2)], example=image, forward=0.8,
                     feedback=0.3)


# On top of a classifier, and the U-Net


def test_a_classifier_without_correction_stays_where_it_is_and_only_decoders_learn():
    model, x = contract()["classifier"]
    model.weights = (0.5, 0.0, 0.0)
    path = model.trajectory(x)
    assert all(torch.allclose(y, path.outputs[0], atol=1e-6) for y in path.outputs)
    model.local_backward(x)
    assert all(p.grad is None for p in model.layers.parameters())
    assert all(p.grad is not None for p in model.decoders.parameters())


def test_shuffled_decoders_hold_the_same_numbers_in_another_order():
    model, _ = contract()["classifier"]
    control = shuffled_decoders(model, seed=1)
    pairs = zip(model.decoders.parameters(), control.decoders.parameters(), strict=True)
    assert all(torch.equal(a.flatten().sort()[0], b.flatten().sort()[0]) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), control.parameters()))


def test_the_energy_of_the_unet_falls_and_its_modules_learn_apart():
    model, x = contract()["unet"]
    path = energies(model, x, 20)
    assert all(b <= a for a, b in zip(path, path[1:], strict=False)) and path[-1] < path[0]
    labels = torch.randint(0, 2, (5, 8, 8))
    with torch.no_grad():
        errors, h = model.errors(x, next(model.states(x)).h), next(model.states(x)).h
        assert set(errors) == {"encoder 1", "encoder 2", "decoder 1"}
        assert torch.equal(errors["encoder 1"], h["h1"] - model.down[0](x))
    model.learn(x, model.settle(x, labels), only="decoder 1")
    for name, p in model.named_parameters():
        assert (p.grad is not None) == name.startswith("up.0"), name
    with pytest.raises(ValueError, match="divisible by 2"):
        model(torch.zeros(1, 1, 7, 8))


@pytest.mark.parametrize("options, name", [
    ({"up_precision": 0}, "up_precision"), ({"label_precision": -1.0}, "label_precision"),
    ({"channels": (4,)}, "levels"), ({"channels": (0, 4)}, "channels"), ({"steps": -1}, "steps")])
def test_bad_options_of_the_unet_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        PCUNet(1, 2, **{"channels": (4, 6)} | options)


def test_the_settling_unet_is_found_where_it_was_first():
    from feedback_nb import predictive_unet

    assert predictive_unet.SettlingUNet is SettlingUNet
    with pytest.raises(AttributeError, match="Settled"):
        _ = predictive_unet.Settled
    old = pickle.dumps(contract()["settling"][0], protocol=0).replace(
        b"feedback_nb.unet\nSettlingUNet", b"feedback_nb.predictive_unet\nSettlingUNet")
    assert b"predictive_unet" in old and type(pickle.loads(old)) is SettlingUNet


def test_the_settling_unet_trains_at_its_fixed_point():
    _, x = contract()["unet"]
    labels = (x[:, 0] > 0.5).long()
    with pytest.raises(ValueError, match="blend"):
        SettlingUNet(1, 2, channels=(4, 6), state=4, blend=1.5)
    model = SettlingUNet(1, 2, channels=(4, 6), state=4, steps=40, solver_steps=60,
                         solver_tol=1e-6)
    path = model.eval().trajectory(x)
    assert path.residuals[-1].max() < 1e-3 * path.residuals[0].max()  # F - h, whatever the blend
    history = fit(model, (TensorDataset(x, labels), TensorDataset(x, labels)), epochs=20, lr=0.01,
                  batch_size=5, progress=False)
    assert history.rows[-1]["train_loss"] < history.rows[0]["train_loss"]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_call_and_ipc_warn_once_of_a_step_above_the_bound():
    torch.manual_seed(0)
    net, x = PCUNet(1, channels=(4, 6), steps=2, step_size=1.5), torch.rand(2, 1, 8, 8)
    with pytest.warns(StepTooLarge, match="1.5 is above"):
        net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x)
        net.step_size = 1e-3  # below the bound
        net(x)
    stack = PCNet([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)], example=torch.rand(1, 4),
                  steps=2, step_size=5.0)
    optimizer = torch.optim.SGD(stack.parameters(), lr=1e-6)
    with pytest.warns(StepTooLarge, match="PCNet: step_size 5 is above"):
        incremental_step(stack, optimizer, torch.rand(3, 4), torch.rand(3, 2))
