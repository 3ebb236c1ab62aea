"""Contextual Backpropagation Loops: the two flows, what need not run again, every kind of network, bad input."""

import copy
import io
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from feedback_nb.cbl import ADAPTERS, CBL, cbl_cnn, cnn
from feedback_nb.feedback import State, stepwise_loss, tap

STAGES = ["stage1", "stage2", "stage3", "stage4"]
FLOWS = ["through", "literal"]


class Residual(nn.Module):
    """Skip connections, an in-place ReLU, an in-place sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.norm, self.head = nn.ReLU(inplace=True), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        h = self.relu(self.stem(x))
        out = self.norm(self.a(h))
        out += h
        out = self.norm(self.b(self.relu(out)))
        out += h
        out = self.relu(out)
        return self.head(out.mean((2, 3)))


class Tokens(nn.Module):
    """A small transformer on (B, N, D)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.block1, self.block2 = (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.block2(self.block1(self.embed(x))).mean(1))


class Speech(nn.Module):
    """Conv1d (B, C, L), an LSTM that returns a tuple, a layer used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.rnn, self.mix, self.head = nn.Conv1d(4, 6, 3, padding=1), nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        h, _ = self.rnn(self.conv(x).transpose(1, 2))
        return self.head(torch.tanh(self.mix(torch.tanh(self.mix(h)))).mean(1))


NETS = {
    "cnn": (lambda: cnn(3, 5, width=4), STAGES, (3, 16, 16)),
    "inner": (lambda: cnn(3, 5, width=4), ["stage2.0", "stage2", "fc1"], (3, 16, 16)),
    "residual": (Residual, ["a", "b"], (3, 8, 8)),
    "tokens": (Tokens, ["block1", "block2"], (7, 6)),
    "speech": (Speech, ["conv", "rnn", "mix"], (4, 9)),
}
every = pytest.mark.parametrize("flow", FLOWS)
nets = pytest.mark.parametrize("kind", NETS)


def build(kind, flow, **options):
    torch.manual_seed(0)
    make, layers, shape = NETS[kind]
    net = make()
    x = torch.randn(4, *shape)
    return net, CBL(net, layers, example=x[:2], flow=flow, **options), x


@every
@nets
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_contract(kind, flow, adapter):
    """What holds for every network, flow and adapter."""
    net, model, x = build(kind, flow, adapter=adapter, steps=3)
    net.eval(), model.eval()
    plain = copy.deepcopy(NETS[kind][0]()).eval()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(model(x, steps=0), plain(x))  # steps=0 is the wrapped network, exactly
    assert torch.equal(net(x), plain(x))  # and the network on its own is what it was
    answer = model(x)
    assert not torch.allclose(answer, plain(x))  # feedback does something
    assert torch.equal(model(x), answer)  # and leaves nothing behind
    assert_close(model(x[:1]), answer[:1], atol=1e-5, rtol=1e-5)  # batch of one, another batch size
    assert_close(copy.deepcopy(model)(x), answer)
    assert_close(pickle.loads(pickle.dumps(model))(x), answer)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    _, twin, _ = build(kind, flow, adapter=adapter, steps=3)
    twin.eval().load_state_dict(torch.load(saved, weights_only=True))
    assert_close(twin(x), answer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(x).float()).all()


@every
@nets
def test_equals_a_pass_without_shortcuts(kind, flow, monkeypatch):
    """Nothing that is answered from the first pass would have come out otherwise, nor would its gradient."""
    net, model, x = build(kind, flow, steps=3)
    model.eval()  # dropout and batch statistics aside, replaying is exact
    fast = model.trajectory(x)
    stepwise_loss(fast, torch.arange(4)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(CBL, "recall", lambda self, memo, name, k, compute: compute())
    slow = model.trajectory(x)
    for a, b in zip(fast.outputs, slow.outputs, strict=True):
        assert_close(a, b)
    stepwise_loss(slow, torch.arange(4)).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=20, deadline=None)
@given(alpha=st.floats(0, 1), steps=st.integers(0, 5), seed=st.integers(0, 10))
def test_literal_flow_is_equations_7_and_8(alpha, steps, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    model = CBL(net, ["1", "3"], example=x, alpha=alpha, flow="literal", adapter="concat").double()
    trajectory = model.trajectory(x, steps=steps, states=True)
    h = {"1": net[:2](x), "3": net[:4](x)}
    for t in range(steps + 1):
        y = net[4](h["3"])
        assert_close(trajectory.outputs[t], y)
        for name in h:
            assert_close(trajectory.states[t][name], h[name])
        z = model.context(y)
        h = {name: alpha * v + (1 - alpha) * model.adapters[name](v, z) for name, v in h.items()}


@settings(max_examples=20, deadline=None)
@given(alpha=st.floats(0, 1), steps=st.integers(0, 5), seed=st.integers(0, 10))
def test_through_flow_is_section_3_9(alpha, steps, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    model = CBL(net, ["1", "3"], example=x, alpha=alpha, adapter="concat").double()
    trajectory = model.trajectory(x, steps=steps, states=True)
    h1, h3 = net[:2](x), net[:4](x)
    for t in range(steps + 1):
        y = net[4](h3)
        assert_close(trajectory.outputs[t], y)
        assert_close(trajectory.states[t]["3"], h3)
        z = model.context(y)
        h1 = alpha * h1 + (1 - alpha) * model.adapters["1"](net[:2](x), z)
        h3 = alpha * h3 + (1 - alpha) * model.adapters["3"](net[2:4](h1), z)


@nets
def test_alpha_one_never_changes_the_literal_state(kind):
    _, model, x = build(kind, "literal", alpha=1.0, steps=6)
    model.eval()
    trajectory = model.trajectory(x, states=True)
    for name, h in trajectory.states[0].items():
        assert torch.equal(h, trajectory.states[-1][name]), name
    assert all(torch.equal(y, trajectory.outputs[0]) for y in trajectory.outputs)
    assert not trajectory.residuals.any()


def test_alpha_stays_in_the_unit_interval_and_comes_back():
    model = cbl_cnn(1, 3, width=2, alpha=0.01)
    optimizer = torch.optim.SGD([model.alpha_raw], lr=0.1)
    for push in (1, 1, -1, -1, -1):  # two steps below 0, then back
        optimizer.zero_grad()
        (push * model.alpha).backward()
        optimizer.step()
        assert 0 <= model.alpha.item() <= 1
    assert model.alpha.item() == pytest.approx(0.11, abs=1e-6)
    model.alpha = 1
    assert model.alpha.item() == 1.0
    for wrong in (-0.001, 1.001, float("nan")):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
            model.alpha = wrong
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
            cbl_cnn(1, alpha=wrong)
    assert not cbl_cnn(1, width=2, learn_alpha=False).alpha_raw.requires_grad


def test_literal_flow_trains_the_last_adapter_only_and_through_trains_all():
    for flow in FLOWS:
        _, model, x = build("cnn", flow)
        stepwise_loss(model.trajectory(x, states=True), torch.arange(4)).backward()
        alive = {name for name, adapter in model.adapters.items() if any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())}
        assert alive == (set(STAGES) if flow == "through" else {"stage4"})


def test_contracting_literal_flow_forgets_its_input_and_the_through_flow_does_not():
    class Shrink(nn.Module):
        def __init__(self, channels, context_dim):
            super().__init__()
            self.h, self.z = (nn.utils.parametrizations.orthogonal(nn.Linear(n, channels)) for n in (channels, context_dim))

        def forward(self, h, z):
            return 0.4 * torch.tanh(self.h(h) + 0.1 * self.z(z))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    for flow in FLOWS:
        model = CBL(net, ["1", "3"], example=x, adapter=Shrink, flow=flow, context_dim=8).double().eval()
        y = model(x, steps=120)
        gap = (y - y[:1]).abs().max()
        assert gap < 1e-12 if flow == "literal" else gap > 1e-3


@every
def test_compiles_without_a_graph_break(flow):
    _, model, x = build("residual", flow, steps=2)
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(x), model(x))


@every
def test_two_threads_share_a_model(flow):
    _, model, _ = build("cnn", flow)
    model.eval()
    inputs = [torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3, 4)]
    with torch.no_grad():
        expected, got = [model(x) for x in inputs], {}

        def work(i):
            with torch.no_grad():
                got[i] = [model(inputs[i]) for _ in range(5)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    for i, answers in got.items():
        for answer in answers:
            assert_close(answer, expected[i])
    assert len(got) == 4


@every
def test_halting_is_per_example_and_ignores_the_rest_of_the_batch(flow):
    _, model, x = build("cnn", flow, adapter="concat")
    model.eval()
    for adapter in model.adapters.values():
        adapter.state.weight.data *= 0.5  # a contraction
    x = x * torch.tensor([0.1, 1, 10, 100]).view(4, 1, 1, 1)
    together = model.trajectory(x, steps=60, tol=3e-3)
    assert together.converged.all() and 1 < together.n_steps.min() and together.n_steps.max() < 60
    assert flow == "literal" or together.n_steps.max() > together.n_steps.min()
    for i in range(len(x)):
        alone = model.trajectory(x[i : i + 1], steps=60, tol=3e-3)
        assert int(alone.n_steps) == int(together.n_steps[i])
        assert_close(alone.output[0], together.output[i], atol=1e-5, rtol=1e-5)


def test_lower_layers_run_once(monkeypatch):
    for flow, expected in {"literal": [1, 1, 1, 1, 5], "through": [1, 5, 5, 5, 5]}.items():
        _, model, x = build("cnn", flow, steps=4)
        runs = []
        for name in [*STAGES, "fc2"]:
            layer = model.net.get_submodule(name)
            layer = layer[0] if isinstance(layer, nn.Sequential) else layer
            layer.register_forward_hook(lambda module, args, output, name=name, runs=runs: runs.append(name))
        model(x)
        assert [runs.count(name) for name in [*STAGES, "fc2"]] == expected


def test_a_step_is_a_map_of_the_state():
    """start and step are a functional core: state in, state out, as the theory chapters use them."""
    _, model, x = build("cnn", "through")
    model.eval()
    state = model.start(x)
    for _ in range(model.steps):
        state = model.step(x, State(dict(state.h), state.y, state.memo))
    assert_close(state.y, model(x))


def test_two_models_share_a_network():
    net = cnn(3, 5, width=4).eval()
    x = torch.randn(2, 3, 16, 16)
    a = CBL(net, ["stage2"], example=x).eval()
    first = a(x)
    b = CBL(net, ["stage2", "stage3"], example=x, flow="literal").eval()
    b(x)
    assert torch.equal(a(x), first)


def test_taps_see_the_refined_states():
    _, model, x = build("cnn", "through", steps=2)
    model.eval()
    with tap(model.net, ["stage3"]) as seen:
        states = model.trajectory(x, states=True).states
    assert len(seen.calls["stage3"]) == 3
    for call, state in zip(seen.calls["stage3"], states, strict=True):
        assert_close(call, state["stage3"])


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 20, 13), (3, 32, 32)])
def test_other_image_sizes_than_the_example(shape):
    model = cbl_cnn(3, 5, width=4).eval()
    assert model(torch.randn(2, *shape)).shape == (2, 5)


def test_dense_outputs_give_a_pooled_context():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 1, 8, 8)
    model = CBL(net, ["1"], example=x)
    assert model(x).shape == (2, 2, 8, 8)


def test_channel_dims_can_be_given():
    net = nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(60, 3))
    x = torch.randn(2, 2, 10)
    assert CBL(net, ["0"], example=x).adapters["0"].gate.out_features == 6  # a convolution: channels first
    assert CBL(copy.deepcopy(net), ["1"], example=x, channel_dims={"1": 1}).adapters["1"].gate.out_features == 6


def bad(make, error, message):
    return pytest.param(make, error, message, id=message[:30])


X = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize(
    "make, error, message",
    [
        bad(lambda: CBL(cnn(3), ["stage9"], example=X), ValueError, r"no layer 'stage9' in the network \(Sequential\); closest: 'stage4'"),
        bad(lambda: CBL(cnn(3), [], example=X), ValueError, "at least one layer name"),
        bad(lambda: CBL(cnn(3), "stage1", example=X), ValueError, "must be a list"),
        bad(lambda: CBL(cnn(3), ["stage1", "stage1"], example=X), ValueError, "named twice"),
        bad(lambda: CBL(cnn(1), ["stage1"], example=X), ValueError, r"does not take the example of shape \(1, 3, 16, 16\)"),
        bad(lambda: CBL(cnn(3), ["stage1"], example=X[0, 0]), ValueError, r"does not take the example of shape \(16, 16\)"),
        bad(lambda: CBL(Speech(), ["rnn", "head"], example=torch.zeros(1, 4, 9), flow="loop"), ValueError, "flow must be 'through' or 'literal', got 'loop'"),
        bad(lambda: cbl_cnn(steps=-1), ValueError, "steps must be a whole number"),
        bad(lambda: cbl_cnn(adapter="gates"), ValueError, "no adapter 'gates'"),
        bad(lambda: cbl_cnn(adapter=lambda channels, context_dim: 3), ValueError, "factory returned int for layer 'stage1'"),
        bad(lambda: cbl_cnn(width=2, adapter=lambda c, d: Wrong())(X), ValueError, r"adapter of layer 'stage1' returned shape \(1, 1\), expected"),
        bad(lambda: CBL(nn.Sequential(nn.Flatten(0)), ["0"], example=X), ValueError, "logits"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Wrong(nn.Module):
    def forward(self, h, z):
        return h.new_zeros(1, 1)


def test_a_layer_that_never_runs_is_named():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="'spare' never runs"):
        CBL(Spare(), ["spare"], example=torch.zeros(1, 2))


@every
def test_nan_in_a_state_names_layer_and_step(flow):
    _, model, x = build("cnn", flow)
    model.eval()
    layer = "stage2" if flow == "through" else "stage4"
    with torch.no_grad():
        next(model.adapters[layer].parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=f"layer '{layer}' is not finite at step 1 of 4"):
        model(x)
    x[2, 0, 0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"input .* \(example 2\)"):
        model(x)
