"""One contract for every feedback model: copies, threads, compilation, other batches, gradients."""

import copy
import io
import pickle
import threading
from itertools import islice

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from feedback_nb.cbl import CBL
from feedback_nb.feedback import FeedbackModel, State, stepwise_loss
from feedback_nb.fixed_points import iterate
from feedback_nb.lrm import LRM
from feedback_nb.networks import cnn
from feedback_nb.predictive import PCClassifier, PCNet, SparsePrior
from feedback_nb.predictive_unet import PCUNet, SettlingUNet
from feedback_nb.replay import Replay
from feedback_nb.unet import FeedbackUNet


class Louder(FeedbackModel):
    """What a reader would write: the answer scales one layer of a network."""

    def __init__(self, net, layer, *, example, **options):
        super().__init__(**options)
        self.net, self.layer = net, layer
        self.replay = Replay(net, [layer], example)
        self.gate = nn.Linear(self.replay.shape[1], 1)

    def start(self, x, **_):
        h, memo = {}, {}
        y = self.replay(x, memo, {self.layer: lambda o: h.update({self.layer: o})})
        return State(h, y, memo)

    def step(self, x, state, t):
        h, gate = {}, 1 + 0.5 * torch.tanh(self.gate(state.y))

        def refine(o):
            h[self.layer] = o * gate.view(-1, *[1] * (o.dim() - 1))
            return h[self.layer]

        return State(h, self.replay(x, state.memo, {self.layer: refine}), state.memo)


def stack():
    """Three stages without batch norm, the last one to logits."""
    convs = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.Tanh()) for a, b in ((1, 4), (4, 6))]
    return [*convs, nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 5))]


X = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(1))
STAGES = ["stage1", "stage2", "stage3", "stage4"]
MODELS = {
    "CBL": lambda **o: CBL(cnn(1, 5, width=4), STAGES, example=X, **o),
    "CBL, no names": lambda **o: CBL(cnn(1, 5, width=4), example=X, adapter="concat", **o),
    "CBL literal": lambda **o: CBL(cnn(1, 5, width=4), STAGES, example=X, flow="literal", **o),
    "LRM": lambda **o: LRM(
        cnn(1, 5, width=4), [("fc2", "stage3"), ("stage3", "stage1")], example=X, **o
    ),
    "LRM, no names": lambda **o: LRM(cnn(1, 5, width=4), example=X, **o),
    "LRM published": lambda **o: LRM(
        cnn(1, 5, width=4), [("stage1", "stage3")], example=X, motif="published", **o
    ),
    "U-Net": lambda **o: FeedbackUNet(1, 3, channels=(4, 8), norm="batch", **o),
    "PCNet, prior": lambda **o: PCNet(stack(), example=X, prior=SparsePrior(0.5), **o),
    "PCClassifier": lambda **o: PCClassifier(
        stack(), [nn.ConvTranspose2d(4, 1, 2, 2), nn.ConvTranspose2d(6, 4, 2, 2)], example=X, **o
    ),
    "PC U-Net": lambda **o: PCUNet(1, 3, channels=(4, 6), step_size=0.02, **o),
    "settling U-Net": lambda **o: SettlingUNet(1, 3, channels=(4, 8), state=4, **o),
    "example": lambda **o: Louder(cnn(1, 5, width=4), "stage2", example=X, **o),
}
every = pytest.mark.parametrize("kind", MODELS)


def build(kind, seed=0, **options):
    torch.manual_seed(seed)
    return MODELS[kind](**{"steps": 2} | options)


def target(y):
    return torch.arange(y[:, 0].numel()).view_as(y[:, 0]) % y.shape[1]


@every
def test_outputs_are_those_of_the_loop(kind):
    model = build(kind).eval()
    found = model.trajectory(X, states=True)
    assert len(found.outputs) == len(found.states) == 3 and found.residuals.shape == (2, 4)
    assert torch.equal(model(X), found.output) and torch.equal(model(X, steps=0), found.outputs[0])
    for state, output in zip(islice(model.states(X), 3), found.outputs):
        assert torch.equal(state.y, output)
    if kind != "U-Net":  # its step depends on the clock
        outputs = iterate(*model.map(X), steps=2).outputs
        assert all(torch.equal(a, b) for (_, a), b in zip(outputs, found.outputs, strict=True))


@every
def test_memo_is_constant_after_the_start(kind):
    states = list(islice(build(kind).eval().states(X), 4))
    assert all(state.memo is states[0].memo for state in states)


@every
def test_another_batch_and_another_size(kind):
    model = build(kind).eval()
    answer = model(X)
    for part in (slice(0, 1), slice(1, 3)):
        assert_close(model(X[part]), answer[part], atol=1e-5, rtol=1e-4)
    assert len(model(torch.rand(2, 1, 16, 20))) == 2


@every
def test_copies_are_independent_and_state_dicts_load(kind):
    model = build(kind).eval()
    answer = model(X)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    twin = build(kind, seed=1).eval()
    assert not torch.equal(twin(X), answer)
    twin.load_state_dict(torch.load(saved, weights_only=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), twin):
        assert torch.equal(other(X), answer)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.1)
        assert torch.equal(model(X), answer) and not torch.equal(other(X), answer)


@every
def test_threads_share_a_model(kind):
    model, got = build(kind).eval(), {}
    parts = [X[: n + 1] for n in range(4)]
    with torch.no_grad():
        expected = [model(part) for part in parts]

    def work(i):
        with torch.no_grad():
            got[i] = [model(parts[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(got) == 4
    for i, answers in got.items():
        for answer in answers:
            assert_close(answer, expected[i], atol=1e-6, rtol=1e-5)


@every
def test_compiles_in_one_graph(kind):
    model = build(kind, steps=1).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(X), model(X))


@every
def test_tol_and_check_finite_are_options_of_every_method(kind):
    model = build(kind, tol=1e9, check_finite=False).eval()
    blank = kind in ("U-Net", "settling U-Net")  # from h = 0 any first step is infinitely large
    assert model.trajectory(X).n_steps.tolist() == [2 if blank else 1] * 4
    assert model.trajectory(X, tol=False).n_steps.tolist() == [2] * 4
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    model(X)
    model.check_finite = True
    with pytest.raises(FloatingPointError):
        model(X)


@every
def test_vmap_and_gradients_of_each_example(kind):
    model = build(kind, steps=1).eval()
    assert_close(vmap(lambda x: model(x[None])[0])(X), model(X), atol=1e-5, rtol=1e-4)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, x, y):
        return nn.functional.cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    y = target(model(X))
    each = vmap(grad(loss), (None, 0, 0))(weights, X, y)
    sum(nn.functional.cross_entropy(model(x[None]), c[None]) for x, c in zip(X, y)).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_close(
                each[name].sum(0),
                p.grad,
                atol=1e-4,
                rtol=1e-3,
                msg=lambda m, name=name: f"{name}: {m}",
            )


@every
def test_checkpointing_a_call_gives_the_same_gradient(kind):
    model = build(kind, steps=1).eval()
    x = X.clone().requires_grad_()
    straight = torch.autograd.grad(model(x).square().sum(), x)[0]
    if kind.startswith("PC"):  # each step is a gradient
        with pytest.raises(RuntimeError, match="saved tensor hooks"):  # PyTorch says so itself
            checkpoint(model, x, use_reentrant=False)
        return
    again = checkpoint(model, x, use_reentrant=False)
    assert_close(torch.autograd.grad(again.square().sum(), x)[0], straight)


@every
def test_an_exception_in_the_middle_leaves_nothing(kind, monkeypatch):
    model = build(kind).eval()
    answer, runs = model(X), []
    layer = next(
        m for m in reversed(list(model.modules())) if isinstance(m, nn.Conv2d) and m.in_channels > 1
    )
    whole = layer._conv_forward

    def breaks(*args):
        runs.append(1)
        if len(runs) == 2:
            raise KeyError("in the middle")
        return whole(*args)

    monkeypatch.setattr(layer, "_conv_forward", breaks)
    try:
        model(X)
        model(X)
    except KeyError:
        pass
    assert len(runs) >= 2
    monkeypatch.undo()
    assert torch.equal(model(X), answer)


@every
def test_data_parallel_is_refused(kind):
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        build(kind)._replicate_for_data_parallel()


@every
def test_a_step_of_training_reaches_all_new_parts(kind):
    model = build(kind).train()
    trajectory = model.trajectory(X, states=True)
    stepwise_loss(trajectory, target(trajectory.output)).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert all(kind == "CBL literal" and "adapters" in name for name in silent)
