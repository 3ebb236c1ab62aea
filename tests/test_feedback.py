"""The shared idea: taps and edits of named layers, silent splices, the loop, the loss over
steps."""

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from feedback_nb.cbl import CBL, cnn
from feedback_nb.feedback import FeedbackModel, NotConverged, State, step_weights, stepwise_loss
from feedback_nb.fixed_points import fixed_point, iterate
from feedback_nb.lrm import LRM
from feedback_nb.training import recalibrate
from feedback_nb.unet import FeedbackUNet


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
    assert together.converged.all() and len(
        together.outputs) == int(together.n_steps.max()) + 1 < 301
    for i, rate in enumerate(rates):
        alone = Affine([rate], steps=300, tol=1e-6).eval().trajectory(x[i : i + 1])
        assert int(alone.n_steps) == int(together.n_steps[i])
        assert torch.equal(alone.output[0], together.output[i])
    with pytest.warns(NotConverged, match="1 of 3 examples"):
        few = Affine(rates, steps=20).eval().trajectory(x, tol=1e-6)
    assert few.converged.tolist() == [True, True, False]
    assert len(model.trajectory(x, tol=False).outputs) == 301 and model.trajectory(
        x, tol=False).converged is None


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


def test_one_number_per_example_that_is_not_finite_is_named_too():
    class Score(FeedbackModel):
        """A score (B,) that grows until float32 has no room for it."""

        def start(self, x, **_):
            return State({"h": x}, x[:, 0])

        def step(self, x, state, t):
            h = state.h["h"] * 1e30
            return State({"h": h}, h[:, 0])

    with pytest.raises(FloatingPointError, match="'h'.*step 2.*example 1"):
        Score(steps=3)(torch.tensor([[0.0], [1.0]]))


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
    with pytest.raises(FloatingPointError,
                       match=r"layer 'second' is not finite at step 2 of 5 \(example 1\)"):
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
    assert_close(
        before,
        model2.norm.running_mean)  # the search left the statistics as the pass itself had left them


def test_stepwise_loss_by_hand_and_its_errors():
    trajectory = Affine([0.5], steps=2).trajectory(torch.ones(1, 1,
                                                              dtype=torch.float64))  # 1, 1.5, 1.75
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


def test_a_tolerance_in_train_mode_says_that_it_has_no_effect():
    x = torch.ones(1, 1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="train mode"):
        assert len(Affine([0.1], steps=9).trajectory(x, tol=0.5).outputs) == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Affine([0.1], tol=0.5).trajectory(x)  # the model's own waits for eval mode
        Affine([0.1], tol=0.5).trajectory(x, tol=False)


# The loop is one generator; the map is its step


def images(n=4, channels=3, size=8, dtype=torch.float64):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(3),
                       dtype=dtype)


def methods(dtype=torch.float64):
    """One small model of each method, without batch norm where a map has to be the same in all
    passes."""
    torch.manual_seed(0)
    convs = [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Tanh(),
        nn.Flatten()
    ]
    plain = lambda: nn.Sequential(*copy.deepcopy(convs), nn.Linear(4 * 64, 5)).to(dtype)
    example = images(1, dtype=dtype)
    return {
        "cbl through": CBL(plain(), ["1", "3"], example=example, alpha=0.3).to(dtype),
        "cbl literal": CBL(plain(), ["1", "3"], example=example, alpha=0.3,
                           flow="literal").to(dtype),
        "lrm paper": LRM(plain(), [("5", "0"), ("2", "0")], example=example, steps=4),
        "lrm published": LRM(plain(), [("5", "0")], example=example, steps=4, motif="published",
                             mode="add"), "unet": FeedbackUNet(3, 2, channels=(4, 4), state=4,
                                                               steps=4, decay=None).to(dtype),
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


@pytest.mark.parametrize(
    "name", ["cbl through", "lrm paper", "lrm published"])  # those that settle at these weights
def test_the_gradient_at_the_fixed_point_is_that_of_a_long_unroll(name):
    model, x = methods()[name].train(), images()
    for weight in model.parameters():
        weight.data *= 0.7  # so that it settles quickly
    target = torch.tensor([0, 1, 2, 3])
    weights = [p for p in model.parameters() if p.requires_grad]
    phi, start = model.map(x)
    _, y = fixed_point(phi, start, steps=200, tol=1e-12, backward_tol=1e-12)
    implicit = torch.autograd.grad(nn.functional.cross_entropy(y, target), weights,
                                   allow_unused=True)
    unrolled = torch.autograd.grad(nn.functional.cross_entropy(model(x, steps=120), target),
                                   weights, allow_unused=True)
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
        assert_close(path.residuals[0],
                     (undamped - h0).flatten(1).norm(dim=1) / h0.flatten(1).norm(dim=1))
    with pytest.warns(NotConverged, match="CBL: 4 of 4 examples missed"):  # 99 % of the way is left
        assert not model.trajectory(x, steps=1, tol=1e-3).converged.any()


def test_a_decayed_loop_that_stopped_listening_is_not_converged():
    torch.manual_seed(0)
    model, x = FeedbackUNet(3, 2, channels=(4, 4), state=4, steps=30).double().eval(), images()
    with pytest.warns(NotConverged):
        path = model.trajectory(x, tol=1e-3, states=True)
    moved = path.states[-1]["u"] - path.states[-2]["u"]
    assert moved.abs().max() < 1e-9 and not path.converged.any()
    assert path.residuals[0].isinf().all() and (path.residuals[-1]
                                                > 1e-2).all()  # it starts from nothing


# Statistics of batch norm belong to a pass


def normed(steps=2, **options):
    torch.manual_seed(0)
    return CBL(cnn(3, 5, width=4, hidden=8), ["stage2", "stage4"],
               example=images(1, dtype=torch.float32), steps=steps, **options)


def photos(n=8):
    return images(n, dtype=torch.float32)


def test_every_pass_moves_its_own_statistics_and_the_network_alone_those_of_pass_0():
    model, x = normed().train(), photos()
    twin = copy.deepcopy(model.net)
    model(x)
    twin.train()(x)
    layer = model.net.stage3[1]
    assert torch.equal(layer.running_mean,
                       twin.stage3[1].running_mean) and layer.num_batches_tracked == 1
    sets = [model.statistics.of("net/stage3/1", t)[0] for t in range(4)]
    assert not torch.equal(sets[0], sets[1]) and not torch.equal(sets[1],
                                                                 sets[2]) and sets[2] is sets[3]
    assert [int(model.statistics.of("net/stage3/1", t)[2]) for t in range(3)] == [1, 1, 1]
    shared = normed().train()
    shared.statistics.shared = True
    shared(x)
    assert int(shared.net.stage3[1].num_batches_tracked) == 3


def test_in_train_mode_a_pass_is_what_it_was_and_in_eval_mode_it_has_its_own_set():
    model, x = normed().train(), photos(64)
    for adapter in model.adapters.values():
        adapter.gate.bias.data += 3 * torch.randn(adapter.gate.bias.shape,
                                                  generator=torch.Generator().manual_seed(0))
    apart = copy.deepcopy(model)
    apart.statistics.shared = True
    with torch.no_grad():
        wanted, same = model.trajectory(x).outputs, apart.trajectory(x).outputs
        assert all(torch.equal(a, b)
                   for a, b in zip(wanted, same, strict=True))  # batches normalise themselves
        for norm in [
                m for net in (model, apart) for m in net.modules() if isinstance(m, nn.BatchNorm2d)
        ]:
            norm.momentum = 0.5
        for _ in range(20):
            model(x), apart(x)
        far = [
            torch.stack([a - b for a, b in zip(m.eval().trajectory(x).outputs, wanted)]).norm()
            for m in (model, apart)
        ]
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
    assert all(
        torch.equal(new.statistics.of("net/stage3/1", t)[0], plain.stage3[1].running_mean)
        for t in range(3))
    longer = normed(steps=4)
    longer.load_state_dict(model.state_dict())
    for t, wanted in {1: 1, 2: 2, 3: 2, 4: 2}.items():
        assert torch.equal(
            longer.statistics.of("net/stage3/1", t)[0],
            model.statistics.of("net/stage3/1", wanted)[0])
    shorter = normed(steps=1)
    shorter.load_state_dict(longer.state_dict())
    assert torch.equal(
        shorter.statistics.of("net/stage3/1", 1)[0],
        model.statistics.of("net/stage3/1", 1)[0])


def test_statistics_of_copies_pickles_threads_and_compiled_models():
    model, x = normed().train(), photos()
    model(x)
    model.eval()
    wanted = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
                 torch.load(file, weights_only=False)):
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
    assert_close(
        torch.compile(model, fullgraph=True, backend="eager")(x), wanted, atol=1e-6, rtol=1e-5)


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
    body = lambda: nn.Sequential(nn.Conv2d(5, 6, 3, padding=1),
                                 nn.InstanceNorm2d(6, track_running_stats=True), nn.BatchNorm2d(6))
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


def test_a_module_assigned_later_leaves_the_trained_statistics_alone():
    model, x = normed().train(), photos()
    model(x)
    before = {name: value.clone() for name, value in model.statistics.state_dict().items()}
    model.context = copy.deepcopy(model.context)
    model.extra = nn.Sequential(nn.BatchNorm1d(3))
    model.net = model.net
    assert all(
        torch.equal(model.statistics.state_dict()[name], value) for name, value in before.items())
    assert "extra/0" in model.statistics.layers


def test_many_wraps_of_a_network_leave_one_hook_a_layer_and_keep_no_model_alive():
    net, x = cnn(3, 5, width=4, hidden=8), photos()
    wrap = lambda: CBL(net, ["stage2"], example=x[:1], steps=1)
    kept, gone = wrap(), [weakref.ref(wrap().statistics) for _ in range(3)]
    gc.collect()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(len(norm._load_state_dict_post_hooks) == 1 for norm in norms)
    assert not any(statistics() for statistics in gone)
    wrap()
    assert all(len(norm.forward.users) <= 2 for norm in norms)  # `kept`, and the last one
    net.load_state_dict(cnn(3, 5, width=4, hidden=8).state_dict())
    for model in (kept, copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        plain = copy.deepcopy(model.net).train()
        plain(x)
        model.net.load_state_dict(plain.state_dict())
        mean = model.net.stage3[1].running_mean
        assert torch.equal(model.statistics.of("net/stage3/1", 1)[0], mean) and mean.any()


def test_the_map_of_a_time_uses_the_statistics_of_its_pass():
    model, x = normed().train(), photos()
    model(x)
    with torch.no_grad():
        path = model.eval().trajectory(x)
        state = model.map(x)[1]
        for t in (0, 1):
            state = model.map(x, t)[0](state)
            assert torch.equal(state[1], path.outputs[t + 1])
