"""Contextual Backpropagation Loops: the two flows, what need not run again, every kind of network,
bad input."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from feedback_nb.cbl import (
    Context,
    ADAPTERS,
    CBL,
    TokenAdapter,
    cnn,
    resnet18,
    rnn,
    text_encoder,
    torchvision_net,
    vit,
)
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
        self.block1, self.block2 = (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0,
                                                               batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.block2(self.block1(self.embed(x))).mean(1))


class Speech(nn.Module):
    """Conv1d (B, C, L), an LSTM that returns a tuple, a layer used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.rnn, self.mix, self.head = nn.Conv1d(4, 6, 3, padding=1), nn.LSTM(
            6, 8, batch_first=True), nn.Linear(8, 8), nn.Linear(8, 5)

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
    """Nothing that is answered from the first pass would have come out otherwise, nor would its
    gradient."""
    net, model, x = build(kind, flow, steps=3)
    model.eval()  # dropout and batch statistics aside, replaying is exact
    fast = model.trajectory(x)
    stepwise_loss(fast, torch.arange(4)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(model.replay, "reused",
                        set()), monkeypatch.setattr(model.replay, "early", set())
    slow = model.trajectory(x)
    for a, b in zip(fast.outputs, slow.outputs, strict=True):
        assert_close(a, b)
    stepwise_loss(slow, torch.arange(4)).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-4,
                         msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=20, deadline=None)
@given(alpha=st.floats(0, 1), steps=st.integers(0, 5), seed=st.integers(0, 10))
def test_literal_flow_is_equations_7_and_8(alpha, steps, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(),
                        nn.Linear(7, 3)).double()
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
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(),
                        nn.Linear(7, 3)).double()
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
def test_alpha_one_never_changes_the_literal_state_and_settles_nothing(kind):
    _, model, x = build(kind, "literal", alpha=1.0, steps=6)
    model.eval()
    trajectory = model.trajectory(x, states=True)
    for name, h in trajectory.states[0].items():
        assert torch.equal(h, trajectory.states[-1][name]), name
    assert all(torch.equal(y, trajectory.outputs[0]) for y in trajectory.outputs)
    assert (trajectory.residuals
            > 0).all()  # the undamped step would go somewhere: not settled, only stopped


def test_alpha_stays_in_the_unit_interval_and_comes_back():
    model = CBL(cnn(1, 3, width=2), example=torch.zeros(1, 1, 8, 8), alpha=0.01)
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
        with pytest.raises(ValueError, match="alpha must be"):
            model.alpha = wrong
        with pytest.raises(ValueError, match="alpha must be"):
            CBL(cnn(1), example=torch.zeros(1, 1, 8, 8), alpha=wrong)
    still = CBL(cnn(1, width=2), example=torch.zeros(1, 1, 8, 8), learn_alpha=False)
    assert not still.alpha_raw.requires_grad


def test_literal_flow_trains_the_last_adapter_only_and_through_trains_all():
    for flow in FLOWS:
        _, model, x = build("cnn", flow)
        stepwise_loss(model.trajectory(x, states=True), torch.arange(4)).backward()
        alive = {
            name
            for name, adapter in model.adapters.items()
            if any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
        }
        assert alive == (set(STAGES) if flow == "through" else {"stage4"})


def test_contracting_literal_flow_forgets_its_input_and_the_through_flow_does_not():
    class Shrink(nn.Module):
        def __init__(self, channels, context_dim):
            super().__init__()
            self.h, self.z = (nn.utils.parametrizations.orthogonal(nn.Linear(n, channels))
                              for n in (channels, context_dim))

        def forward(self, h, z):
            return 0.4 * torch.tanh(self.h(h) + 0.1 * self.z(z))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(),
                        nn.Linear(8, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    for flow in FLOWS:
        model = CBL(net, ["1", "3"], example=x, adapter=Shrink, flow=flow,
                    context_dim=8).double().eval()
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
            layer.register_forward_hook(
                lambda module, args, output, name=name, runs=runs: runs.append(name))
        model(x)
        assert [runs.count(name) for name in [*STAGES, "fc2"]] == expected


def test_a_step_is_a_map_of_the_state():
    """start and step are a functional core: state in, state out, as the theory chapters use
    them."""
    _, model, x = build("cnn", "through")
    model.eval()
    state = model.start(x)
    for t in range(model.steps):
        with model.passing(t + 1):
            state = model.step(x, State(dict(state.h), state.y, state.memo), t)
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
    model = CBL(cnn(3, 5, width=4), example=torch.zeros(1, 3, 8, 8)).eval()
    assert model(torch.randn(2, *shape)).shape == (2, 5)


def test_dense_outputs_give_a_pooled_context():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 1, 8, 8)
    model = CBL(net, ["1"], example=x)
    assert model(x).shape == (2, 2, 8, 8)


def test_channel_dims_can_be_given():
    net = nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(60, 3))
    x = torch.randn(2, 2, 10)
    assert CBL(net, ["0"],
               example=x).adapters["0"].gate.out_features == 6  # a convolution: channels first
    assert CBL(copy.deepcopy(net), ["1"], example=x,
               channel_dims={"1": 1}).adapters["1"].gate.out_features == 6


def bad(make, error, message):
    return pytest.param(make, error, message, id=message[:30])


X = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize("make, error, message", [
    bad(lambda: CBL(cnn(3), ["stage9"], example=X), ValueError, "'stage9'.*'stage4'"),
    bad(lambda: CBL(cnn(3), [], example=X), ValueError, "at least one layer name"),
    bad(lambda: CBL(cnn(3), "stage1", example=X), ValueError, "must be a list"),
    bad(lambda: CBL(cnn(3), ["stage1", "stage1"], example=X), ValueError, "named twice"),
    bad(lambda: CBL(cnn(1), ["stage1"], example=X), RuntimeError, r"the example, \(1, 3, 16, 16\)"),
    bad(lambda: CBL(cnn(3), ["stage1"], example=X[0, 0]), RuntimeError, r"the example, \(16, 16\)"),
    bad(lambda: CBL(Speech(), ["rnn", "head"], example=torch.zeros(1, 4, 9), flow="loop"),
        ValueError, "'loop'.*through, literal"),
    bad(lambda: CBL(cnn(), example=X, steps=-1), ValueError, "steps must be a whole number"),
    bad(lambda: CBL(cnn(), example=X, adapter="gates"), ValueError, "'gates'.*gate, concat"),
    bad(lambda: CBL(cnn(), example=X, adapter=lambda channels, context_dim: 3), ValueError,
        "int for 'stage1'"),
    bad(lambda: CBL(cnn(width=2), example=X, adapter=lambda c, d: Wrong())
        (X), ValueError, r"'stage1'.*\(1, 1\)"),
    bad(lambda: CBL(nn.Sequential(nn.Flatten(), Halves()), ["0"], example=X), ValueError, "logits"),
    bad(lambda: CBL(cnn(3), example=X, context=nn.Linear(10, 32)), ValueError,
        r"context.*\(1, 64\), got \(1, 32\)"),
],
                         )
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Halves(nn.Module):
    def forward(self, x):
        return x.chunk(2)


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


# Every named architecture, small

VIT = {
    "image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16,
    "mlp_dim": 32
}
TEXT = {"dim": 16, "depth": 2, "heads": 2, "max_len": 12}
IDS = torch.tensor([[5, 7, 9, 2, 8, 4], [3, 0, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0], [9, 9, 9, 9, 9, 0]])
ARCHITECTURES = {  # the network, options of its CBL, the shape of an example or a whole batch
    "cnn": (lambda: cnn(3, 5, width=4), {}, (3, 16, 16)),
    "cnn mel": (lambda: cnn(1, 5, width=4), {}, (1, 64, 31)),
    "resnet18": (lambda: resnet18(5), {}, (3, 32, 32)),
    "resnet18 small": (lambda: resnet18(5, small=True, in_channels=1),
                       {"layers": ["layer2", "layer4"]}, (1, 8, 8)),
    "vit": (lambda: vit(5, **VIT), {}, (3, 16, 16)),
    "vit grey": (lambda: vit(5, **VIT, in_channels=1), {"adapter": "attention"}, (1, 16, 16)),
    "vit token": (lambda: vit(5, **VIT), {"adapter": "token"}, (3, 16, 16)),
    "lstm": (lambda: rnn(6, 5, width=8), {}, (7, 6)),
    "gru": (lambda: rnn(6, 5, width=8, cell="gru", bidirectional=True), {}, (1, 6, 9)),
    "lstm token": (lambda: rnn(8, 5, width=8), {"adapter": "token"}, (7, 8)),
    "text": (lambda: text_encoder(10, 5, **TEXT), {}, IDS),
    "text token": (lambda: text_encoder(10, 5, **TEXT), {"adapter": "token"}, IDS),
}
architectures = pytest.mark.parametrize("kind", ARCHITECTURES)


def make(kind, seed=0, **options):
    """A small model in eval mode, four examples."""
    torch.manual_seed(seed)
    net, own, shape = ARCHITECTURES[kind]
    example = shape[:1] if torch.is_tensor(shape) else torch.zeros(1, *shape)
    model = CBL(net(), example=example, **{"steps": 3, "context_dim": 8} | own | options).eval()
    if kind.startswith("vit"):
        nn.init.normal_(model.net.heads.head.weight,
                        std=0.3)  # torchvision's starts at zero, where nothing reaches the output
    return model, shape if torch.is_tensor(shape) else torch.randn(4, *shape)


@architectures
def test_architecture_contract(kind):
    model, x = make(kind)
    with torch.no_grad():
        plain = copy.deepcopy(model.net)(x)
        assert torch.equal(model(x, steps=0), plain) and torch.equal(model.net(x), plain)
        answer = model(x)
        assert answer.shape == (
            4, 5) and (answer - plain).abs().max() > 1e-5  # feedback does something
        assert torch.equal(model(x), answer)  # eval is deterministic
        assert torch.equal(copy.deepcopy(model)(x), answer)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), answer)
        for i in range(4):
            assert_close(model(x[i : i + 1])[0], answer[i], atol=1e-5, rtol=1e-4)  # batch of one
        twin, _ = make(kind, seed=1)
        assert not torch.allclose(twin(x), answer)
        saved = io.BytesIO()
        torch.save(model.state_dict(), saved)
        saved.seek(0)
        twin.load_state_dict(torch.load(saved, weights_only=True))
        assert torch.equal(twin(x), answer)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
        assert half.dtype == torch.bfloat16
        assert_close(half.float(), answer, atol=0.05, rtol=0.05)


@architectures
def test_architecture_trains_every_adapter(kind):
    model, x = make(kind)
    model.train()
    stepwise_loss(model.trajectory(x), torch.arange(4)).backward()
    silent = [
        name for name, p in model.named_parameters()
        if name.startswith(("adapters", "context",
                            "alpha")) and not (p.grad is not None and p.grad.abs().sum() > 0)
    ]
    assert not silent


@architectures
def test_architecture_halting_ignores_the_rest_of_the_batch(kind):
    model, x = make(kind, alpha=0.3)
    with torch.no_grad():
        residuals = model.trajectory(x, steps=12).residuals
        tol = float(residuals[4].sort().values[1:3].mean()
                    )  # a tolerance that two of the four have met after five steps
        together = model.trajectory(x, steps=12, tol=tol)
        assert together.n_steps.max() > together.n_steps.min() or kind.startswith("cnn")
        for i in range(4):
            alone = model.trajectory(x[i : i + 1], steps=12, tol=tol)
            assert int(alone.n_steps) == int(together.n_steps[i])
            assert_close(alone.output[0], together.output[i], atol=1e-5, rtol=1e-4)


@architectures
def test_architecture_compiles(kind):
    """One graph without a break, equal outputs; recurrent layers are left to eager mode by dynamo
    itself."""
    model, x = make(kind, steps=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=kind not in ("lstm", "gru", "lstm token"),
                             backend="eager")
    with torch.no_grad():
        assert_close(compiled(x), model(x))


def test_training_compiles():
    """The graph of the backward pass too."""
    model, x = make("vit token", steps=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x), model(x)
    assert_close(got, expected)
    pairs = [
        torch.autograd.grad(y.square().sum(), list(model.adapters.parameters()))
        for y in (got, expected)
    ]
    for a, b in zip(*pairs, strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vit token", "lstm", "text"])
def test_mixed_precision_trains(kind):
    model, x = make(kind)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = stepwise_loss(model.trajectory(x), torch.arange(4))
    loss.backward()
    gradients = [p.grad for p in model.adapters.parameters()]
    assert all(torch.isfinite(g).all() for g in gradients) and all(g.abs().sum() > 0
                                                                   for g in gradients)


class Blocks(nn.Module):
    """Attention in other hands than torchvision's: masks by keyword, queries that differ from
    keys."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x, causal=True):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if causal else None
        return self.head(self.block(x, src_mask=mask, is_causal=causal)[:, 0])


def test_token_is_one_more_token_and_nothing_else():
    """By hand: torchvision's block run on [token; tokens], the first output dropped, blended,
    handed on."""
    model, x = make("vit token", alpha=0.25)
    net = copy.deepcopy(model.net)
    blocks = list(net.encoder.layers)
    tokens = torch.cat([net.class_token.expand(4, -1, -1),
                        net._process_input(x)], 1) + net.encoder.pos_embedding
    h = [blocks[0](tokens)]
    h.append(blocks[1](h[0]))
    read = lambda h: net.heads(net.encoder.ln(h)[:, 0])
    y = read(h[-1])
    trajectory = model.trajectory(x, states=True)
    for t in range(4):
        assert_close(trajectory.outputs[t], y, atol=1e-5, rtol=1e-4)
        z, below = model.context(y), tokens
        for i, block in enumerate(blocks):
            token = model.adapters[f"encoder.layers.encoder_layer_{i}"].token(z)[:, None]
            below = h[i] = 0.25 * h[i] + 0.75 * block(torch.cat([token, below], 1))[:, 1:]
        y = read(below)


def test_a_causal_mask_grows_with_the_token():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    model = CBL(Blocks(), ["block"], example=x, adapter="token", steps=2).eval()
    later = x.clone()
    later[:, 3:] += 1  # the first position may look at itself and at the token only
    assert_close(model(later), model(x))
    assert not torch.allclose(model(x), model.net(x))


@pytest.mark.parametrize("adapter", ["gate", "token"])
def test_padding_changes_neither_the_answer_nor_the_residual(adapter):
    model, _ = make("text", adapter=adapter)
    ids = torch.tensor([[3, 1, 4]])
    longer = torch.nn.functional.pad(ids, (0, 7))
    for inference in (True, False):  # torch has a fast path for inference
        with torch.inference_mode(inference):
            a, b = model.trajectory(ids), model.trajectory(longer)
            assert_close(a.output, b.output, atol=1e-5, rtol=1e-4)
            assert_close(a.residuals, b.residuals, atol=1e-5, rtol=1e-4)
            assert torch.isfinite(model(torch.zeros(
                1, 4, dtype=torch.long))).all()  # a text of nothing but padding


def test_a_classifier_that_packs_and_pads_inside_works():
    """Sequences of different lengths: the refined module is the one that hands padded states on."""

    class PackedLSTM(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 8, batch_first=True)

        def forward(self, x, lengths):
            packed, _ = self.lstm(
                pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
            return pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = PackedLSTM(), nn.Linear(8, 4)

        def forward(self, x):
            lengths = (x != 0).any(2).sum(1)
            return self.head(self.rnn(x, lengths).sum(1) / lengths[:, None])

    torch.manual_seed(0)
    x = torch.randn(3, 6, 3)
    x[0, 4:], x[2, 1:] = 0, 0
    model = CBL(Net(), ["rnn"], example=x).eval()
    answer = model(x)
    assert not torch.allclose(answer, model.net(x))
    assert_close(model(x[:1, :4]), answer[:1])  # without its padding
    with pytest.raises(ValueError, match="'rnn.lstm' returns a PackedSequence"):
        CBL(Net(), ["rnn.lstm"], example=x)


def test_weights_are_loaded_by_name(monkeypatch):
    """Pretrained weights without a network: the last layer is new when the classes are others."""
    from torchvision.models import ResNet18_Weights, ViT_B_16_Weights

    torch.manual_seed(1)
    trained = resnet18().state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda self, *args, **kwargs: trained)
    for weights in ("DEFAULT", "IMAGENET1K_V1", ResNet18_Weights.DEFAULT):
        net = resnet18(weights=weights)
        assert all(torch.equal(value, trained[key]) for key, value in net.state_dict().items())
    other = resnet18(7, weights="DEFAULT")
    assert other.fc.out_features == 7 and torch.equal(other.conv1.weight, trained["conv1.weight"])
    with pytest.raises(ValueError, match="'IMAGENET'.*resnet18.*IMAGENET1K_V1"):
        resnet18(weights="IMAGENET")
    with pytest.raises(ValueError, match="ResNet18_Weights.*vit_b_16"):
        torchvision_net("vit_b_16", weights=ResNet18_Weights.DEFAULT)
    with pytest.raises(ValueError, match="small=False"):
        resnet18(weights="DEFAULT", small=True)
    assert "IMAGENET1K_SWAG_E2E_V1" in ViT_B_16_Weights.__members__


SIZES = {  # torchvision's name: its parameter count, refined layers
    "resnet18": (11_689_512, 4),
    "vit_b_16": (86_567_656, 12),
    "vit_l_16": (304_326_632, 24),
    "vit_h_14": (632_045_800, 32),
}


@pytest.mark.parametrize("name", SIZES)
def test_full_size_networks_on_the_meta_device(name):
    """The networks as torchvision publishes them, without their memory."""
    parameters, blocks = SIZES[name]
    with torch.device("meta"):
        net, x = torchvision_net(name), torch.zeros(1, 3, 224, 224)
        model = CBL(net, example=x, steps=1).eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    widths = [site.channels for site in model.sites.values()]
    assert len(widths) == blocks
    gates = sum((64 + 1) * width
                for width in widths) + (1000 + 1) * 64 + 1  # W and b of each gate, of g, and α
    assert sum(p.numel() for p in model.parameters()) - parameters == gates
    assert model(x).shape == (1, 1000)
    if name == "vit_b_16":
        layer = "encoder.layers.encoder_layer_1"
        with torch.device("meta"):
            token = CBL(torchvision_net(name), [layer], example=x, steps=1, adapter="token").eval()
        assert isinstance(token.adapters[layer], TokenAdapter)
        assert token(x).shape == (1, 1000)


class Out(nn.Module):
    """A network with one inner layer that returns whatever it is told to."""

    def __init__(self, form):
        super().__init__()
        self.inner, self.head = Inner(form), nn.Linear(4, 3)

    def forward(self, x):
        self.inner(x)
        return self.head(x)


class Inner(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x)


V = torch.zeros(2, 4)


@pytest.mark.parametrize("make, error, message", [
    bad(lambda: CBL(resnet18(5), [], example=torch.zeros(1, 3, 32, 32)), ValueError,
        "at least one layer name"),
    bad(lambda: CBL(vit(5, **VIT), [], example=X), ValueError, "at least one layer name"),
    bad(lambda: CBL(nn.Linear(4, 3), example=V), ValueError, "no layer of Linear"),
    bad(lambda: CBL(Out(lambda x: {"h": x}), ["inner"], example=V), ValueError,
        "'inner' returns dict"),
    bad(lambda: CBL(Out(lambda x:
                        ("h", x)), ["inner"], example=V), ValueError, "'inner' returns tuple"),
    bad(lambda: CBL(Out(lambda x:
                        ()), ["inner"], example=V), ValueError, "'inner' returns tuple; refine"),
    bad(lambda: CBL(Out(lambda x: 3), ["inner"], example=V), ValueError,
        "'inner' returns int; refine"),
    bad(lambda: CBL(Out(lambda x: None), ["inner"], example=V), ValueError,
        "'inner' returns NoneType; refine"),
    bad(lambda: CBL(Out(lambda x: x.long()), ["inner"], example=V), ValueError,
        "'inner' returns torch.int64"),
    bad(lambda: CBL(Out(lambda x: x.sum()), ["inner"], example=V), ValueError,
        r"'inner' returns torch.float32 \(\)"),
    bad(lambda: CBL(Out(lambda x: x.T), ["inner"], example=V), ValueError,
        r"'inner' returns \(4, 2\) for a batch of 2"),
    bad(
        lambda: CBL(nn.Sequential(nn.LSTM(4, 4), Take(), nn.Linear(4, 3)), ["0"], example=torch.
                    zeros(2, 2, 4)), ValueError, "'0' has its batch in dimension 1"),
    bad(lambda: vit(5, image_size=30), ValueError, "image_size 30.* 32"),
    bad(lambda: torchvision_net("vit_b_16", image_size=100), ValueError, "image_size 100.* 96"),
    bad(lambda: torchvision_net("vit_h_14", image_size=8), ValueError, "image_size 8.* 14"),
    bad(lambda: CBL(vit(5, **VIT), ["encoder.ln"], example=torch.zeros(1, 3, 20, 20)),
        AssertionError, r"Expected 16 but got 20[\s\S]*\(1, 3, 20, 20\)"),
    bad(lambda: CBL(vit(5, **VIT), example=torch.zeros(1, 3, 16, 16))
        (torch.zeros(1, 3, 20, 20)), AssertionError, "Expected 16 but got 20"),
    bad(lambda: CBL(cnn(), example=X, adapter="token"), ValueError, "adapter='token'.*'stage1'"),
    bad(
        lambda: CBL(vit(5, **VIT), example=torch.zeros(1, 3, 16, 16), adapter="token", flow=
                    "literal"), ValueError, "adapter='token'.*literal"),
    bad(
        lambda: CBL(rnn(6, width=8), example=torch.zeros(1, 2, 6), adapter="token")
        (torch.zeros(1, 2, 6)), ValueError, r"\(B, N, 8\), got \(1, 2, 6\)"),
    bad(lambda: rnn(6, cell="elman"), ValueError, "'elman'.*cell.*lstm, gru"),
    bad(lambda: rnn(6)(torch.zeros(2, 6)), ValueError, r"\(B, N, 6\).*\(2, 6\)"),
    bad(lambda: rnn(6)(pack_padded_sequence(torch.zeros(2, 3, 6), [3, 2], batch_first=True)),
        ValueError, "PackedSequence"),
    bad(lambda: text_encoder(9, heads=3), ValueError, "dim=128, heads=3"),
    bad(lambda: text_encoder(9, pad=9), ValueError, "pad=9"),
    bad(lambda: text_encoder(10, **TEXT)
        (torch.zeros(1, 13, dtype=torch.long)), ValueError, r"max_len=12.*\(1, 13\)"),
    bad(lambda: text_encoder(10, **TEXT)(torch.zeros(1, 3)), ValueError, "float32"),
    bad(lambda: text_encoder(10, **TEXT)(torch.tensor([[3, 10]])), ValueError, "3 to 10"),
],
                         )
def test_bad_input_to_architectures_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Take(nn.Module):
    def forward(self, pair):
        return pair[0][:, 0]


def test_a_factory_may_know_of_another_size_of_the_context():
    class Other(nn.Module):
        def __init__(self, channels, context_dim):
            super().__init__()
            self.gate = nn.Linear(4, channels)

        def forward(self, h, z):
            return h * self.gate(z)[..., None, None]

    context = nn.Linear(10, 4)
    model = CBL(cnn(3, width=2), ["stage1"], example=X, adapter=Other, context=context)
    assert model(X).shape == (1, 10)


def test_a_step_of_ones_own_may_feed_the_context_something_else_than_the_logits():
    class OfFeatures(CBL):
        def step(self, x, state, t):
            features = state.h[next(reversed(self.sites.values())).key]
            return super().step(x, State(state.h, features, state.memo), t)

    model = OfFeatures(cnn(3, width=2), example=X, context=Context(16, 64), steps=2)
    assert model(X).shape == (len(X), 10)
