"""Named layers: taps and edits, silent splices, what need not run again, what cannot be refined."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from feedback_nb.replay import (
    Replay,
    Splice,
    check_reach,
    edit,
    find_layers,
    layer_shapes,
    plan_sites,
    settled_before,
    state_of,
    tap,
    trace_calls,
    with_state,
)


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
    with pytest.raises(ValueError, match="'twic'.*'twice'"):
        with tap(net, ["out", "twic"]):
            pass
    assert hooks(net) == 0
    with tap(net, ["out"]) as seen, pytest.raises(KeyError, match="has not run yet"):
        seen["out"]
    with pytest.raises(KeyError, match="rnn"):
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
    assert torch.equal(splice.run(net, x, lambda name, k, compute: compute()), net(x))


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
