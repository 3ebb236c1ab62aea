"""The peers of chapter 61 against their papers' equations and against torchdeq."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from feedback_nb.fixed_points import lipschitz
from feedback_nb.peers import DEQ, ForwardForward, LocalRecurrence


def contracting():
    """A block in double precision that settles quickly, and two pictures."""
    torch.manual_seed(0)
    model = DEQ(1, 3, width=4, steps=100).double()
    with torch.no_grad():
        for conv in (model.first, model.second):
            conv.weight.mul_(0.1)
    return model, torch.rand(2, 1, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_deq_agrees_with_torchdeq(solver):
    torchdeq = pytest.importorskip("torchdeq", reason="the oracle is not installed")
    model, x = contracting()
    names = {"picard": "fixed_point_iter", "anderson": "anderson"}
    oracle = torchdeq.get_deq(f_solver=names[solver], b_solver="fixed_point_iter", f_max_iter=200,
                              b_max_iter=200, f_tol=1e-12, b_tol=1e-12, ift=True)
    injected = model.enter(x)
    found, _ = oracle(lambda z: model.layer(z, injected), torch.zeros_like(injected))
    theirs = model.head(found[-1])
    ours = model.solve(x, solver=solver, steps=200, tol=1e-12)
    assert_close(ours, theirs, atol=1e-8, rtol=1e-8)
    weights = [model.first.weight, model.enter[0].weight, model.head[2].bias]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (ours, theirs))):
        assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_local_backward_of_a_deq_is_the_gradient_at_its_fixed_point():
    model, x = contracting()
    y = torch.tensor([0, 2])
    model.how |= {"steps": 100, "tol": 1e-11}
    loss = model.local_backward(x, y)
    unrolled = F.cross_entropy(model(x), y)
    assert_close(loss, unrolled.detach())
    exact = torch.autograd.grad(unrolled, list(model.parameters()))
    for p, g in zip(model.parameters(), exact):
        assert_close(p.grad, g, atol=1e-7, rtol=1e-5)


def test_a_deq_that_contracts_forgets_where_it_began():
    model, x = contracting()
    phi, (h, y) = model.map(x)
    far = {"z": torch.randn_like(h["z"])}
    for _ in range(100):
        h, far = phi((h, y))[0], phi((far, y))[0]
    assert_close(h["z"], far["z"], atol=1e-8, rtol=1e-8)
    assert float(lipschitz(lambda z: phi(({"z": z}, y))[0]["z"], h["z"]).max()) < 1


def test_areas_replace_their_states_all_at_once():
    torch.manual_seed(0)
    model, x = LocalRecurrence(1, 3, width=2, areas=3, steps=6).eval(), torch.rand(2, 1, 9, 12)
    states = model.trajectory(x, states=True).states
    for old, new in zip(states, states[1:]):
        below = [x, *old.values()]
        for area, received, own, found in zip(model.areas, below, old.values(), new.values()):
            assert_close(found, area(received, own))
    silent = [[not h.any() for h in state.values()] for state in states[:4]]
    assert silent == [[True] * 3, [False, True, True], [False, False, True], [False] * 3]


def test_a_picture_needs_a_step_for_each_area():
    torch.manual_seed(0)
    model = LocalRecurrence(1, 3, width=2, areas=3).eval()
    outputs = model.trajectory(torch.rand(5, 1, 8, 8), steps=4).outputs
    same = [bool((y == y[:1]).all()) for y in outputs]
    assert same == [True, True, True, False, False]


def small_forward():
    torch.manual_seed(0)
    return ForwardForward(12, 3, hidden=(7, 6, 5)).double(), torch.rand(4, 3, 4).double()


def test_goodness_is_worked_by_hand():
    model, x = small_forward()
    for c in range(3):
        h = x.flatten(1).clone()
        h[:, :3] = torch.eye(3, dtype=h.dtype)[c]
        total = 0
        for k, layer in enumerate(model.layers):
            h = h / (h.square().mean(1, keepdim=True).sqrt() + 1e-6)
            h = F.relu(h @ layer.weight.T + layer.bias)
            total = total + (h.square().sum(1) if k else 0)
        assert_close(model(x)[:, c], total)


def test_negative_labels_are_wrong_ones_and_the_loss_is_the_papers(monkeypatch):
    model, x = small_forward()
    y, asked = torch.tensor([0, 1, 2, 2]), []
    whole = model.labelled
    monkeypatch.setattr(model, "labelled", lambda x, y: asked.append(y) or whole(x, y))
    loss = model.local_backward(x, y)
    right, wrong = asked
    assert torch.equal(right, y) and (wrong != y).all() and set(wrong.tolist()) <= {0, 1, 2}
    total = 0
    for good, bad in zip(*(model.activities(whole(x, c)) for c in (right, wrong))):
        p, q = (torch.sigmoid(h.square().sum(1) - h.shape[1]) for h in (good, bad))
        total = total - p.log().mean() - (1 - q).log().mean()
    assert_close(loss, total.detach())


def test_no_layer_hears_of_the_loss_of_another():
    model, x = small_forward()
    h = x.flatten(1).requires_grad_()
    first, second, _ = model.activities(h, cut=True)
    assert torch.autograd.grad(first.sum(), h, retain_graph=True)[0].any()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(second.sum(), h)
    assert torch.autograd.grad(model(x.requires_grad_()).sum(), x)[0].any()  # an attack sees all


@pytest.mark.parametrize("options", [{"hidden": (5,)}, {"n_classes": 1}, {"n_classes": 13}])
def test_bad_sizes_are_refused(options):
    with pytest.raises(ValueError):
        ForwardForward(12, **{"n_classes": 3} | options)
