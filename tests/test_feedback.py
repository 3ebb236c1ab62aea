"""The shared idea: taps and edits of named layers, silent splices, the loop, the loss over steps."""

import copy
import io
import pickle
import threading
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from feedback_nb.cbl import CBL, cnn
from feedback_nb.feedback import FeedbackModel, NotConverged, Splice, State, edit, layer_shapes, settled_before, step_weights, stepwise_loss, tap, trace_calls
from feedback_nb.fixed_points import fixed_point, iterate
from feedback_nb.lrm import LRM
from feedback_nb.training import recalibrate
from feedback_nb.unet import FeedbackUNet


class Odd(nn.Module):
    """A layer used twice, a layer that returns a tuple, a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.twice, self.rnn, self.spare, self.out = nn.Linear(6, 6), nn.LSTM(6, 4, batch_first=True), nn.Linear(1, 1), nn.Linear(4, 3)

    def forward(self, x):
        h, _ = self.rnn(torch.tanh(self.twice(torch.tanh(self.twice(x)))))
        return self.out(h[:, -1])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Odd()


@pytest.fixture
def x():
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_tap_sees_every_call_and_tuples(net, x):
    with tap(net, ["twice", "rnn", "out"]) as seen:
        y = net(x)
    assert seen["out"] is y
    assert len(seen.calls["twice"]) == 2 and seen["twice"] is seen.calls["twice"][1]
    assert_close(seen.calls["twice"][0], net.twice(x))
    sequence, (h, c) = seen["rnn"]
    assert sequence.shape == (2, 5, 4) and h.shape == (1, 2, 4)
    assert hooks(net) == 0


def test_edit_changes_tuples_and_every_call(net, x):
    with edit(net, {"rnn": lambda out: (torch.zeros_like(out[0]), out[1])}):
        assert_close(net(x), net.out.bias.expand(2, 3))
    with edit(net, {"twice": torch.zeros_like}), tap(net, "twice") as seen:
        net(x)
    assert all(not call.any() for call in seen.calls["twice"])


@pytest.mark.parametrize("manager", [lambda net: tap(net, ["twice"]), lambda net: edit(net, {"twice": lambda h: h})])
def test_hooks_are_removed_when_the_pass_raises(net, manager):
    with pytest.raises(RuntimeError), manager(net):
        net(torch.randn(2, 5, 7))
    assert hooks(net) == 0


def test_unknown_names_list_close_ones_and_leave_nothing(net):
    with pytest.raises(ValueError, match=r"no layer 'twic'.*closest: 'twice'"):
        with tap(net, ["out", "twic"]):
            pass
    assert hooks(net) == 0
    with tap(net, ["out"]) as seen, pytest.raises(KeyError, match="has not run yet"):
        seen["out"]
    with pytest.raises(KeyError, match="not tapped"):
        seen["rnn"]


def test_no_grad_functional_call_deepcopy_and_pickle_inside_a_tap(net, x):
    with tap(net, ["twice"]) as seen:
        with torch.no_grad():
            net(x)
        assert not seen["twice"].requires_grad
        zeros = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        y = torch.func.functional_call(net, zeros, x)
        assert not seen["twice"].any() and not y.any()
        n = len(seen.calls["twice"])
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert_close(twin(x), net(x))
        assert len(seen.calls["twice"]) == n + 4  # two for each net(x); the copies' own passes are not recorded
    assert hooks(net) == 0


def test_layer_shapes_leaves_mode_and_statistics_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    net[2].eval()
    before = copy.deepcopy(net.state_dict())
    assert layer_shapes(net, ["0", "1"], torch.randn(2, 3, 8, 8)) == {"0": (2, 4, 6, 6), "1": (2, 4, 6, 6)}
    assert net.training and net[1].training and not net[2].training
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_layer_shapes_of_tuples_and_of_layers_that_never_run(net, x):
    shapes = layer_shapes(net, None, x)
    assert shapes["rnn"] == ((2, 5, 4), ((1, 2, 4), (1, 2, 4))) and "spare" not in shapes
    with pytest.raises(ValueError, match="'spare' did not run"):
        layer_shapes(net, ["spare"], x)


def test_trace_finds_in_place_writes_by_modules_functions_and_dropout():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.drop = nn.Dropout(inplace=True)

        def forward(self, x):
            a = self.a(x)
            a += 1  # a plain in-place operation
            return self.c(self.drop(self.b(a)))  # dropout writes in train mode only

    calls, output = trace_calls(Net(), torch.randn(2, 3))
    assert {call.name for call in calls if call.written} >= {"a", "b"}
    assert not next(call for call in calls if call.name == "c").written
    assert output.shape == (2, 3)


def test_settled_before_keeps_a_layer_that_runs_again_later():
    shared = nn.ReLU()
    net = nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared)
    calls, _ = trace_calls(net, torch.randn(1, 2))
    assert settled_before(calls, "2") == ["0"]  # the ReLU runs after layer 2 as well, so it is not settled


def test_splice_is_silent_and_survives_copies(net, x):
    plain = net(x)
    keys = list(net.state_dict())
    splice = Splice(net, ["twice", "rnn"])
    assert torch.equal(net(x), plain) and list(net.state_dict()) == keys
    seen = []

    def handler(name, k, compute):
        seen.append((name, k))
        return compute()

    assert torch.equal(splice.run(net, x, handler), plain)
    assert seen == [("twice", 0), ("twice", 1), ("rnn", 0)]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), plain)
        assert twin.twice.forward.layer is twin.twice


def test_a_handler_runs_the_layer_on_other_arguments():
    class Scaled(nn.Module):
        def forward(self, x, *, by=1.0):
            return by * x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaled = Scaled()

        def forward(self, x):
            return self.scaled(x, by=3.0)

    net, x = Net(), torch.randn(2, 4)
    splice = Splice(net, ["scaled"])
    change = lambda args, kwargs: ((args[0] + 1,), {"by": 10 * kwargs["by"]})
    torch.testing.assert_close(splice.run(net, x, lambda name, k, compute: compute(change)), 30 * (x + 1))
    torch.testing.assert_close(splice.run(net, x, lambda name, k, compute: compute() + compute(change)), 3 * x + 30 * (x + 1))


def test_splice_is_put_back_when_the_handler_raises(net, x):
    splice = Splice(net, ["twice"])
    with pytest.raises(ZeroDivisionError):
        splice.run(net, x, lambda name, k, compute: 1 / 0)
    assert splice.running() is None


def test_two_threads_do_not_see_each_others_pass():
    net = nn.Sequential(nn.Linear(2, 2))
    splice = Splice(net, ["0"])
    gate, seen = threading.Barrier(2, timeout=20), {}

    def work(value):
        def handler(name, k, compute):
            gate.wait()  # both threads are now inside a pass of the same network
            return torch.full((1, 2), value)

        seen[value] = splice.run(net, torch.zeros(1, 2), handler)

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(seen[value], torch.full((1, 2), value)) for value in (1.0, 2.0))


class Affine(FeedbackModel):
    """h ← a h + b x, each example with its own rate a."""

    def __init__(self, a, **kwargs):
        super().__init__(**kwargs)
        self.register_buffer("a", torch.as_tensor(a, dtype=torch.float64))

    def start(self, x, **_):
        return State({"h": x}, x)

    def step(self, x, state, t):
        h = self.a[: len(x)].view(-1, 1) * state.h["h"] + x
        return State({"h": h}, h)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-0.95, 0.95), min_size=1, max_size=5), st.integers(0, 30))
def test_loop_is_the_recursion(rates, steps):
    x = torch.ones(len(rates), 3, dtype=torch.float64)
    trajectory = Affine(rates, steps=steps).trajectory(x, states=True)
    a = torch.tensor(rates, dtype=torch.float64)
    expected = [sum(a**k for k in range(t + 1)) for t in range(steps + 1)]
    for y, e in zip(trajectory.outputs, expected, strict=True):
        assert_close(y, e.view(-1, 1).expand_as(y))
    assert trajectory.residuals.shape == (steps, len(rates)) and len(trajectory.states) == steps + 1
    assert trajectory.n_steps.tolist() == [steps] * len(rates) and trajectory.converged is None


def test_tolerance_halts_each_example_alone_and_only_in_eval_mode():
    rates, x = [0.1, 0.5, 0.9], torch.ones(3, 2, dtype=torch.float64)
    model = Affine(rates, steps=300, tol=1e-6)
    assert len(model.train().trajectory(x).outputs) == 301
    together = model.eval().trajectory(x)
    assert together.converged.all() and len(together.outputs) == int(together.n_steps.max()) + 1 < 301
    for i, rate in enumerate(rates):
        alone = Affine([rate], steps=300, tol=1e-6).eval().trajectory(x[i : i + 1])
        assert int(alone.n_steps) == int(together.n_steps[i])
        assert torch.equal(alone.output[0], together.output[i])
    with pytest.warns(NotConverged, match="1 of 3 examples"):
        few = Affine(rates, steps=20).eval().trajectory(x, tol=1e-6)
    assert few.converged.tolist() == [True, True, False]
    assert len(model.trajectory(x, tol=False).outputs) == 301 and model.trajectory(x, tol=False).converged is None


def test_steps_are_checked():
    import numpy as np

    assert Affine([0.5], steps=np.int64(3)).steps == 3
    late = Affine([0.5])
    late.steps = -1
    with pytest.raises(ValueError, match="whole number"):
        late(torch.ones(1, 1, dtype=torch.float64))
    for steps in (-1, 1.5, True, "4"):
        with pytest.raises(ValueError, match="whole number"):
            Affine([0.5], steps=steps)
        with pytest.raises(ValueError, match="whole number"):
            Affine([0.5]).trajectory(torch.ones(1, 1, dtype=torch.float64), steps=steps)


def test_a_model_without_start_says_what_to_write():
    with pytest.raises(TypeError, match="must define start"):
        FeedbackModel()(torch.ones(1, 1))


def test_non_finite_states_name_layer_step_and_example():
    class Blow(FeedbackModel):
        def __init__(self):
            super().__init__(steps=5)
            self.norm = nn.BatchNorm1d(2)

        def start(self, x, **_):
            return State({"first": x, "second": self.norm(x)}, x)

        def step(self, x, state, t):
            second = torch.where(x[:, :1] > 1, state.h["second"] * 1e20, state.h["second"])
            return State({"first": self.norm(x), "second": second}, second)

    model = Blow()
    x = torch.tensor([[0.0, 1], [2, 3], [1, 1]])
    model.norm.running_mean.fill_(7)
    with pytest.raises(FloatingPointError, match=r"layer 'second' is not finite at step 2 of 5 \(example 1\)"):
        model.eval()(x)
    with pytest.raises(FloatingPointError, match=r"input .* not finite \(example 2\)"):
        model(torch.tensor([[0.0, 1], [0, 3], [float("nan"), 1]]))
    model.train()
    with pytest.raises(FloatingPointError):
        model(x)
    before = model.norm.running_mean.clone()
    model2 = Blow()
    model2.norm.running_mean.fill_(7)
    model2.check_finite = False
    model2(x)
    assert_close(before, model2.norm.running_mean)  # the search left the statistics as the pass itself had left them


def test_stepwise_loss_by_hand_and_its_errors():
    trajectory = Affine([0.5], steps=2).trajectory(torch.ones(1, 1, dtype=torch.float64))  # 1, 1.5, 1.75
    loss = lambda y, target: (y - target).abs().mean()
    target = torch.tensor([[2.0]], dtype=torch.float64)
    assert float(stepwise_loss(trajectory, target, loss)) == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert float(stepwise_loss(trajectory, target, loss, "last")) == 0.25
    assert float(stepwise_loss(trajectory, target, loss, (0, 2, 0))) == 1.0
    for wrong in ("first", [1, 2], [1, -1, 1], [0, 0, 0], [1, float("nan"), 1]):
        with pytest.raises(ValueError, match="weights.* 3 "):
            stepwise_loss(trajectory, target, loss, wrong)


def test_mean_weights_sum_to_one():
    assert sum(step_weights("mean", 7)) == pytest.approx(1)


@pytest.mark.parametrize("tol", [-1.0, float("nan"), float("inf"), True])
def test_a_tolerance_is_a_number_or_false(tol):
    with pytest.raises(ValueError, match="tol"):
        Affine([0.5], tol=tol)
    with pytest.raises(ValueError, match="tol"):
        Affine([0.5]).eval().trajectory(torch.ones(1, 1, dtype=torch.float64), tol=tol)


# The loop is one generator; the map is its step


def images(n=4, channels=3, size=8, dtype=torch.float64):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(3), dtype=dtype)


def methods(dtype=torch.float64):
    """One small model of each method, without batch norm where a map has to be the same in all passes."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Flatten()]
    plain = lambda: nn.Sequential(*copy.deepcopy(convs), nn.Linear(4 * 64, 5)).to(dtype)
    example = images(1, dtype=dtype)
    return {
        "cbl through": CBL(plain(), ["1", "3"], example=example, alpha=0.3).to(dtype),
        "cbl literal": CBL(plain(), ["1", "3"], example=example, alpha=0.3, flow="literal").to(dtype),
        "lrm paper": LRM(plain(), [("5", "0"), ("2", "0")], example=example, steps=4),
        "lrm published": LRM(plain(), [("5", "0")], example=example, steps=4, motif="published", mode="add"),
        "unet": FeedbackUNet(3, 2, channels=(4, 4), state=4, steps=4, decay=None).to(dtype),
    }


@pytest.mark.parametrize("name", list(methods()))
def test_trajectory_is_a_slice_of_states_and_iterate_of_the_map_gives_the_same_bits(name):
    model, x = methods()[name].eval(), images()
    with torch.no_grad():
        path = model.trajectory(x, states=True)
        for state, y, h in zip(islice(model.states(x), 5), path.outputs, path.states, strict=True):
            assert torch.equal(state.y, y) and all(torch.equal(state.h[k], h[k]) for k in h)
        phi, start = model.map(x)
        found = iterate(phi, start, steps=4)
    for (h, y), wanted, states in zip(found.outputs, path.outputs, path.states, strict=True):
        assert torch.equal(y, wanted) and all(torch.equal(h[k], states[k]) for k in states)


@pytest.mark.parametrize("name", ["cbl through", "lrm paper", "lrm published"])  # those that settle at these weights
def test_the_gradient_at_the_fixed_point_is_that_of_a_long_unroll(name):
    model, x = methods()[name].train(), images()
    for weight in model.parameters():
        weight.data *= 0.7  # so that it settles quickly
    target = torch.tensor([0, 1, 2, 3])
    weights = [p for p in model.parameters() if p.requires_grad]
    phi, start = model.map(x)
    _, y = fixed_point(phi, start, steps=200, tol=1e-12, backward_tol=1e-12)
    implicit = torch.autograd.grad(nn.functional.cross_entropy(y, target), weights, allow_unused=True)
    unrolled = torch.autograd.grad(nn.functional.cross_entropy(model(x, steps=120), target), weights, allow_unused=True)
    for a, b in zip(implicit, unrolled, strict=True):
        if b is not None:
            assert_close(torch.zeros_like(b) if a is None else a, b, atol=1e-7, rtol=1e-7)


def test_residuals_are_those_of_the_undamped_map():
    x, model = images(), methods()["cbl literal"].eval()
    for alpha in (0.0, 0.5, 0.99):
        model.alpha = alpha
        path = model.trajectory(x, steps=1, states=True)
        with torch.no_grad():
            h0, z = path.states[0]["3"], model.context(path.outputs[0])
            undamped = model.adapters["3"](h0, z)
        assert_close(path.residuals[0], (undamped - h0).flatten(1).norm(dim=1) / h0.flatten(1).norm(dim=1))
    with pytest.warns(NotConverged, match="CBL: 4 of 4 examples missed"):  # 99 % of the way is left
        assert not model.trajectory(x, steps=1, tol=1e-3).converged.any()


def test_a_decayed_loop_that_stopped_listening_is_not_converged():
    torch.manual_seed(0)
    model, x = FeedbackUNet(3, 2, channels=(4, 4), state=4, steps=30).double().eval(), images()
    with pytest.warns(NotConverged):
        path = model.trajectory(x, tol=1e-3, states=True)
    moved = path.states[-1]["u"] - path.states[-2]["u"]
    assert moved.abs().max() < 1e-9 and not path.converged.any()
    assert path.residuals[0].isinf().all() and (path.residuals[-1] > 1e-2).all()  # it starts from nothing


# Statistics of batch norm belong to a pass


def normed(steps=2, **options):
    torch.manual_seed(0)
    return CBL(cnn(3, 5, width=4, hidden=8), ["stage2", "stage4"], example=images(1, dtype=torch.float32), steps=steps, **options)


def photos(n=8):
    return images(n, dtype=torch.float32)


def test_every_pass_moves_its_own_statistics_and_the_network_alone_those_of_pass_0():
    model, x = normed().train(), photos()
    twin = copy.deepcopy(model.net)
    model(x)
    twin.train()(x)
    layer = model.net.stage3[1]
    assert torch.equal(layer.running_mean, twin.stage3[1].running_mean) and layer.num_batches_tracked == 1
    sets = [model.statistics.of("net/stage3/1", t)[0] for t in range(4)]
    assert not torch.equal(sets[0], sets[1]) and not torch.equal(sets[1], sets[2]) and sets[2] is sets[3]
    assert [int(model.statistics.of("net/stage3/1", t)[2]) for t in range(3)] == [1, 1, 1]
    shared = normed().train()
    shared.statistics.shared = True
    shared(x)
    assert int(shared.net.stage3[1].num_batches_tracked) == 3


def test_in_train_mode_a_pass_is_what_it_was_and_in_eval_mode_it_has_its_own_set():
    model, x = normed().train(), photos(64)
    for adapter in model.adapters.values():
        adapter.gate.bias.data += 3 * torch.randn(adapter.gate.bias.shape, generator=torch.Generator().manual_seed(0))
    apart = copy.deepcopy(model)
    apart.statistics.shared = True
    with torch.no_grad():
        wanted, same = model.trajectory(x).outputs, apart.trajectory(x).outputs
        assert all(torch.equal(a, b) for a, b in zip(wanted, same, strict=True))  # batches normalise themselves
        for norm in [m for net in (model, apart) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.momentum = 0.5
        for _ in range(20):
            model(x), apart(x)
        far = [torch.stack([a - b for a, b in zip(m.eval().trajectory(x).outputs, wanted)]).norm() for m in (model, apart)]
    assert far[0] < 0.2 * far[1]


def test_old_state_dicts_plain_state_dicts_and_other_numbers_of_passes_load():
    model, x = normed().train(), photos()
    model(x)
    new = normed()
    new.load_state_dict(model.state_dict())
    assert torch.equal(new.eval()(x), model.eval()(x))
    old = {k: v for k, v in model.state_dict().items() if not k.startswith("statistics.")}
    new.load_state_dict(old)
    mean = model.net.stage3[1].running_mean
    assert all(torch.equal(new.statistics.of("net/stage3/1", t)[0], mean) for t in range(3))
    plain = cnn(3, 5, width=4, hidden=8).train()
    plain(x)
    new.net.load_state_dict(plain.state_dict())
    assert all(torch.equal(new.statistics.of("net/stage3/1", t)[0], plain.stage3[1].running_mean) for t in range(3))
    longer = normed(steps=4)
    longer.load_state_dict(model.state_dict())
    for t, wanted in {1: 1, 2: 2, 3: 2, 4: 2}.items():
        assert torch.equal(longer.statistics.of("net/stage3/1", t)[0], model.statistics.of("net/stage3/1", wanted)[0])


def test_statistics_of_copies_pickles_threads_and_compiled_models():
    model, x = normed().train(), photos()
    model(x)
    model.eval()
    wanted = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), wanted)
        twin.train()(x)
        assert torch.equal(model(x), wanted)
    found = [None] * 4

    def work(i):
        with torch.no_grad():
            found[i] = model(x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(y, wanted) for y in found)
    torch._dynamo.reset()
    assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), wanted, atol=1e-6, rtol=1e-5)


def test_recalibration_is_per_pass_and_puts_everything_back_when_it_fails():
    model, x = normed(), photos(64)
    data = torch.utils.data.TensorDataset(x, torch.zeros(64, dtype=torch.long))
    model.train()(x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        recalibrate(model, [(torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.long))])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    recalibrate(model, data, batch_size=64)
    path, trained = model.eval().trajectory(x), copy.deepcopy(model).train().trajectory(x)
    for a, b in zip(path.outputs, trained.outputs, strict=True):
        assert_close(a, b, atol=0.05, rtol=0.05)  # biased against unbiased variance


def test_another_kind_of_norm_and_recomputed_steps_count_once():
    torch.manual_seed(0)
    body = lambda: nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.InstanceNorm2d(6, track_running_stats=True), nn.BatchNorm2d(6))
    from feedback_nb.unet import FeedbackLoop

    full = FeedbackLoop(body(), nn.Conv2d(4, 2, 1), state=4, feedback=2, steps=3).train()
    again = copy.deepcopy(full)
    again.backprop = "recompute"
    for model in (full, again):
        model(photos()).square().mean().backward()
    for (name, a), b in zip(full.state_dict().items(), again.state_dict().values(), strict=True):
        assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    assert int(full.body[2].num_batches_tracked) == 1 == int(full.statistics.of("body/2", 2)[2])
    for p, q in zip(full.parameters(), again.parameters(), strict=True):
        assert p.grad is None and q.grad is None or torch.equal(p.grad, q.grad)
