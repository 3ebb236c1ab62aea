"""One contract for every model of the registry: copies, threads, compilation, gradients."""

import copy
import io
import pickle
import threading
import warnings
from itertools import islice

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from feedback_nb.feedback import FeedbackModel, State, stepwise_loss
from feedback_nb.fixed_points import NotConverged, iterate
from feedback_nb.networks import cnn
from feedback_nb.predictive import SparsePrior
from feedback_nb.registry import REGISTRY, Entry, capabilities, make
from feedback_nb.replay import Replay


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


def louder(example, n_classes, width, **options):
    return Louder(cnn(1, n_classes, width=width), "stage2", example=example, **options)


X = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(1))
OTHERS = {  # name: (entry, options): other ways through the same code
    "CBL, no names": ("CBL", {"layers": None, "adapter": "concat"}),
    "LRM, no names": ("LRM", {"connections": None}),
    "LRM, published": ("LRM", {"connections": [("stage1", "stage3")], "motif": "published"}),
    "feedback U-Net, batch norm": ("feedback U-Net", {"norm": "batch"}),
    "PC network, prior": ("PC network", {"prior": SparsePrior(0.5)}),
}
ENTRIES = {name: (entry, {}) for name, entry in REGISTRY.items()}
ENTRIES["local recurrence"][1]["areas"] = 1  # a picture needs a step per area to be heard
ENTRIES |= {name: (REGISTRY[of], options) for name, (of, options) in OTHERS.items()}
ENTRIES["a reader's own"] = Entry(louder, "01"), {}
every = pytest.mark.parametrize("kind", ENTRIES)
loops = pytest.mark.parametrize("kind", [k for k, (entry, _) in ENTRIES.items() if entry.loops])


def entry_of(kind):
    return ENTRIES[kind][0]


def build(kind, seed=0, **options):
    torch.manual_seed(seed)
    entry, own = ENTRIES[kind]
    own = {"steps": 2} | own if entry.loops else own
    return entry.build(X, 5 if entry.task == "images" else 3, 4, **own | options)


def one_step(kind):
    return build(kind, **{"steps": 1} if entry_of(kind).loops else {}).eval()


def target(y):
    return torch.arange(y[:, 0].numel()).view_as(y[:, 0]) % y.shape[1]


@loops
def test_outputs_are_those_of_the_loop(kind):
    model = build(kind).eval()
    found = model.trajectory(X, states=True)
    assert len(found.outputs) == len(found.states) == 3 and found.residuals.shape == (2, 4)
    assert torch.equal(model(X), found.output) and torch.equal(model(X, steps=0), found.outputs[0])
    for state, output in zip(islice(model.states(X), 3), found.outputs):
        assert torch.equal(state.y, output)
    if not kind.startswith("feedback U-Net"):  # its step depends on the clock
        outputs = iterate(*model.map(X), steps=2).outputs
        assert all(torch.equal(a, b) for (_, a), b in zip(outputs, found.outputs, strict=True))


@loops
def test_memo_is_constant_after_the_start(kind):
    states = list(islice(build(kind).eval().states(X), 4))
    assert all(state.memo is states[0].memo for state in states)


@every
def test_another_batch_and_another_size(kind):
    model = build(kind).eval()
    answer = model(X)
    for part in (slice(0, 1), slice(1, 3)):
        assert_close(model(X[part]), answer[part], atol=1e-5, rtol=1e-4)
    if entry_of(kind).any_size:
        assert len(model(torch.rand(2, 1, 16, 20))) == 2
    else:
        with pytest.raises((ValueError, RuntimeError)):
            model(torch.rand(2, 1, 16, 20))


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
    model = one_step(kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    if entry_of(kind).fullgraph:
        assert_close(compiled(X), model(X))
    else:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            compiled(X)


@pytest.mark.parametrize("kind", [kind for kind, entry in REGISTRY.items() if entry.loops])
def test_a_trajectory_is_one_graph_and_not_compiled_again_for_the_same_steps(kind):
    model = build(kind).eval()
    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(model.trajectory, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert_close(run(X, steps=2).output, model(X), atol=1e-5, rtol=1e-4)
        run(X, steps=2)  # the first call leaves its thread marked, which is one guard more
        first = counter.frame_count
        for x in (X.flip(0), X / 2):
            run(x, steps=2)
        assert counter.frame_count == first > 0
        run(X, steps=1)
    assert counter.frame_count > first  # another number of steps is another graph


@every
def test_runs_under_autocast(kind):
    model = one_step(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        low = model(X).float()
    assert entry_of(kind).bf16 and low.isfinite().all()
    answer = model(X).detach()
    assert float((low - answer).norm() / answer.norm()) < 0.05


@every
def test_gradients_of_gradients(kind):
    model, x = one_step(kind), X.clone().requires_grad_()
    first = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]
    if entry_of(kind).double_backward:
        second = torch.autograd.grad(first.square().sum(), x)[0]
        assert second.isfinite().all() and second.any()
    else:
        with pytest.raises(RuntimeError):
            torch.autograd.grad(first.square().sum(), x)


@every
def test_the_registry_says_what_is_built(kind):
    entry, model = entry_of(kind), build(kind)
    assert isinstance(model, FeedbackModel) == entry.loops == bool(entry.zero)
    assert hasattr(model, "local_backward") == entry.own_backward
    if entry.loops:  # a blank state has not looked at the picture
        first = model.eval()(X, steps=0)
        assert torch.equal(first, first[:1].expand_as(first)) == (entry.zero == "a blank state")


@every
def test_own_backward_leaves_gradients_and_a_loss(kind):
    model, labels = build(kind).train(), torch.arange(4) % 3
    y = labels if entry_of(kind).task == "images" else labels[:, None, None].expand(4, 12, 12)
    if entry_of(kind).own_backward:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConverged)  # untrained, and few steps
            loss = model.local_backward(X, y.contiguous())
        assert loss.isfinite() and not loss.requires_grad
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    else:
        assert not hasattr(model, "local_backward")


def test_a_name_that_is_unknown_and_the_table_of_all():
    with pytest.raises(ValueError, match="CBL"):
        make("CBl", X)
    assert list(capabilities().index) == list(REGISTRY)


@loops
def test_tol_and_check_finite_are_options_of_every_method(kind):
    model = build(kind, tol=1e9, check_finite=False).eval()
    blank = entry_of(kind).zero == "a blank state"  # from h = 0 any step is infinitely large
    assert model.trajectory(X).n_steps.tolist() == [2 if blank else 1] * 4
    assert model.trajectory(X, tol=False).n_steps.tolist() == [2] * 4
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    model(X)
    model.check_finite = True
    with pytest.raises(FloatingPointError):
        model(X)


@loops
def test_vmap_and_gradients_of_each_example(kind):
    model = one_step(kind)
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


@loops
def test_checkpointing_a_call_gives_the_same_gradient(kind):
    model = one_step(kind)
    x = X.clone().requires_grad_()
    straight = torch.autograd.grad(model(x).square().sum(), x)[0]
    if kind.startswith(("PC", "Predify")):  # each step is a gradient
        with pytest.raises(RuntimeError, match="saved tensor hooks"):  # PyTorch says so itself
            checkpoint(model, x, use_reentrant=False)
        return
    again = checkpoint(model, x, use_reentrant=False)
    assert_close(torch.autograd.grad(again.square().sum(), x)[0], straight)


@loops
def test_an_exception_in_the_middle_leaves_nothing(kind, monkeypatch):
    model = build(kind).eval()
    answer, runs = model(X), []
    where = [(m, "_conv_forward") for m in model.modules() if isinstance(m, nn.Conv2d)]
    where = [(m, name) for m, name in where if m.in_channels > 1]
    where = where or [(m, "forward") for m in model.modules() if isinstance(m, nn.LayerNorm)]
    layer, name = where[-1]
    whole = getattr(layer, name)

    def breaks(*args):
        runs.append(1)
        if len(runs) == 2:
            raise KeyError("in the middle")
        return whole(*args)

    monkeypatch.setattr(layer, name, breaks)
    try:
        model(X)
        model(X)
    except KeyError:
        pass
    assert len(runs) >= 2
    monkeypatch.undo()
    assert torch.equal(model(X), answer)


@loops
def test_data_parallel_is_refused(kind):
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        build(kind)._replicate_for_data_parallel()


@loops
def test_a_step_of_training_reaches_all_new_parts(kind):
    model = build(kind).train()
    trajectory = model.trajectory(X, states=True)
    stepwise_loss(trajectory, target(trajectory.output)).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert all(kind == "CBL, literal" and "adapters" in name for name in silent)
