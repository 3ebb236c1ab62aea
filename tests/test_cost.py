"""What a user of feedback_nb.cost relies on: FLOPs, bytes and times that can be checked by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from feedback_nb.predictive import PCNet
from feedback_nb.feedback import FeedbackModel, State
from feedback_nb.cost import cost, multiply_adds


pytestmark = pytest.mark.usefixtures("one_thread")


def test_cost_counts_what_fused_kernels_hide():
    d, n, b = 16, 6, 3
    layer = nn.TransformerEncoderLayer(d, 2, 32, batch_first=True)
    row = cost(layer, torch.rand(b, n, d), train=False, seconds=0.01, rounds=1).iloc[0]
    assert (
        row.mflops * 1e6 == 2 * n * (4 * d * d + 2 * d * 32) + 2 * 2 * n * n * d
    )  # projections and MLP; queries times keys, weights times values

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(d, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    row = cost(Last(), torch.rand(b, n, d), train=False, seconds=0.01, rounds=1).iloc[0]
    assert row.mflops * 1e6 == 2 * n * (d * 32 + 8 * 32) + 2 * 8 * 4

    class Halts(
        nn.Module
    ):  # what it computes depends on the data, so that it cannot run without numbers
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) if x.sum() > -1 else x

    fast = torch.backends.mha.get_fastpath_enabled()
    assert (
        cost(Halts(), torch.rand(b, n, d), train=False, seconds=0.01, rounds=1).mflops.iloc[0]
        == cost(layer, torch.rand(b, n, d), train=False, seconds=0.01, rounds=1).mflops.iloc[0]
    )
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_cost_by_hand():
    layer = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    row = cost(layer, torch.rand(4, 10), seconds=0.02, rounds=1).loc["Sequential"]
    assert row.parameters == 10 * 20 + 20 + 20 * 5 + 5
    assert row.mflops * 1e6 == pytest.approx(2 * (10 * 20 + 20 * 5))
    assert row.saved_mb * 1e6 == pytest.approx(4 * (4 * 20 + 4 * 5) + 8 * 4 + 4)
    assert row.peak_mb * 1e6 >= 4 * row.parameters and row.forward_ms > 0 and row.train_ms > 0


def test_peak_memory_counts_what_is_alive_at_once():
    class Chain(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.n = n
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            for _ in range(self.n):
                x = (x * self.weight).tanh()  # keeps two tensors: the factor, and the result
            return x

    x = torch.rand(64, 1000)
    few, many = (
        cost(Chain(n), x, seconds=0.001, rounds=1, loss=lambda m, x: m(x).sum()).iloc[0]
        for n in (4, 12)
    )
    each = 64 * 1000 * 4 / 1e6
    assert many.saved_mb - few.saved_mb == pytest.approx(
        2 * 8 * each - 8 * each, rel=0.01
    )  # a result is the next one's factor
    assert many.peak_mb - few.peak_mb == pytest.approx(8 * each, rel=0.01)


def test_cost_ratios_and_passes():
    def base():
        return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 3))

    class Loop(FeedbackModel):
        def __init__(self, net, steps):
            super().__init__(steps)
            self.net = net

        def start(self, x, *, states=False):
            y = self.net(x)
            return State(y, y)

        def step(self, x, state, t):
            y = self.net(x + state.y.mean())
            return State(y, y)

    models = {"net": base(), "loop": Loop(base(), 3)}
    table = cost(models, torch.rand(8, 12), "net", seconds=0.02, rounds=1)
    assert (table.loc["net"].filter(like="_ratio") == 1).all()
    assert (
        table.loc["loop", "mflops_ratio"] == 4 and table.loc["loop", "parameters_ratio"] == 1
    )  # T + 1 passes of the same weights
    assert 3.5 < table.loc["loop", "saved_mb_ratio"] < 4.5
    beside = cost(models["net"], torch.rand(8, 12), base(), seconds=0.02, rounds=1)
    assert list(beside.index) == [
        "Sequential",
        "reference",
    ] and beside.parameters_ratio.tolist() == [1, 1]
    assert "train_ms" not in cost(models["net"], torch.rand(8, 12), train=False, seconds=0.02)


def test_cost_leaves_the_model_and_the_random_state_as_they_were():
    model = nn.Sequential(
        nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)
    ).train()
    x = torch.rand(8, 12)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    cost(model, x, seconds=0.02, rounds=1)
    torch.testing.assert_close(dict(model.state_dict()), before)
    assert (
        model.training
        and all(p.grad is None for p in model.parameters())
        and torch.equal(torch.get_rng_state(), state)
    )


def test_cost_uses_a_models_own_backward():
    class Local(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x)

        def local_backward(self, x, y):
            Local.calls += 1
            loss = F.cross_entropy(self(x), y)
            loss.backward()
            return loss

    cost(Local(), torch.rand(5, 4), seconds=0.001, rounds=1)
    assert Local.calls > 2


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda x: cost({"a": nn.Linear(4, 2)}, x, "b"), ValueError, "'b'.*model.*a"),
        (lambda x: cost(nn.Flatten(0), x), TypeError, "loss="),
        (lambda x: cost(nn.Linear(4, 2), x, rounds=0), ValueError, "rounds"),
    ],
)
def test_cost_refuses_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.rand(5, 4))


class Product(nn.Module):
    """What its function makes of the input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda x: x @ x.new_ones(3), 4 * 3),  # a matrix times a vector
        (lambda x: x[0] @ x[1], 3),
        (lambda x: torch.addmv(x[:, 0], x, x[1]), 4 * 3),
        (lambda x: torch.addbmm(x @ x.T, x[None], x.T[None]), 2 * 4 * 3 * 4),
        (lambda x: F.bilinear(x, x[:, :2], x.new_ones(5, 3, 2)), 4 * 5 * 2 * (3 + 1)),
    ],
)
@pytest.mark.parametrize("halts", [False, True])
def test_products_that_torchs_counter_does_not_know_are_counted(function, expected, halts):
    def maybe(x):  # what depends on the data cannot run on the meta device
        return function(x) if not halts or x.sum() > -1 else x

    x = torch.rand(4, 3)
    assert multiply_adds(Product(maybe), x) == expected
    row = cost(Product(maybe), x, train=False, seconds=0.001, rounds=1).iloc[0]
    assert row.mflops * 1e6 == pytest.approx(2 * expected / 4)


def test_a_step_that_takes_a_gradient_is_counted():
    class Downhill(nn.Module):
        """One step down ½‖W h‖², as inference in predictive coding takes it."""

        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 3, bias=False)

        def forward(self, h):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                energy = self.lin(h).square().sum() / 2
            return h.detach() - torch.autograd.grad(energy, h)[0]

    assert multiply_adds(Downhill(), torch.randn(5, 4)) == 5 * (4 * 3 + 3 * 4)  # forth and back


def test_a_predictive_network_has_a_cost():
    net = PCNet([nn.Linear(6, 5), nn.Linear(5, 3)], example=torch.randn(2, 6), steps=2)
    with pytest.warns(UserWarning, match="saved_mb of PCNet"):
        table = cost({"one": net}, torch.randn(2, 6), seconds=0.01, rounds=1)
    assert table.mflops.item() > 0 and table.peak_mb.item() > 0
    assert table.saved_mb.isna().item()  # not measured, and not 0
