"""Named layers: taps and edits, silent splices, what need not run again, what cannot be refined."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from feedback_nb.cbl import CBL
from feedback_nb.lrm import LRM
from feedback_nb.networks import cnn
from feedback_nb.replay import (
    Replay,
    Splice,
    closest_layers,
    edit,
    find_layers,
    layer_shapes,
    settled_before,
    tap,
    trace_calls,
    unrolled_view,
)
from feedback_nb.unet import FeedbackUNet


class Odd(nn.Module):
    """A layer used twice, a layer that returns a tuple, a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.twice, self.rnn, self.spare, self.out = (
            nn.Linear(6, 6),
            nn.LSTM(6, 4, batch_first=True),
            nn.Linear(1, 1),
            nn.Linear(4, 3),
        )

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


@pytest.mark.parametrize(
    "manager", [lambda net: tap(net, ["twice"]), lambda net: edit(net, {"twice": lambda h: h})]
)
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
        assert (
            len(seen.calls["twice"]) == n + 4
        )  # two for each net(x); the copies' own passes are not recorded
    assert hooks(net) == 0


def test_layer_shapes_leaves_mode_and_statistics_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    net[2].eval()
    before = copy.deepcopy(net.state_dict())
    assert layer_shapes(net, ["0", "1"], torch.randn(2, 3, 8, 8)) == {
        "0": (2, 4, 6, 6),
        "1": (2, 4, 6, 6),
    }
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
    assert settled_before(calls, "2") == [
        "0"
    ]  # the ReLU runs after layer 2 as well, so it is not settled


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
    torch.testing.assert_close(
        splice.run(net, x, lambda name, k, compute: compute(change)), 30 * (x + 1)
    )
    torch.testing.assert_close(
        splice.run(net, x, lambda name, k, compute: compute() + compute(change)),
        3 * x + 30 * (x + 1),
    )


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


def test_closest_layers():
    """Misspelt names, names of other libraries, names by which people call a layer."""
    from torchvision import models

    with torch.device("meta"):
        alexnet, resnet, vit = models.alexnet(), models.resnet18(), models.vit_b_16()
    assert closest_layers("fc", alexnet)[:3] == ["classifier.6", "classifier.4", "classifier.1"]
    assert "features" not in closest_layers("fc", alexnet)
    assert closest_layers("conv4", alexnet)[0] == "features.8"  # the fourth convolution
    assert closest_layers("relu1", alexnet)[0] == "features.1"
    assert (
        closest_layers("Layer4.1", resnet)[0] == closest_layers("layer4_1", resnet)[0] == "layer4.1"
    )
    assert set(closest_layers("layer5", resnet)) >= {"layer1", "layer2", "layer3", "layer4"}
    assert closest_layers("head", resnet)[0] == closest_layers("logits", resnet)[0] == "fc"
    assert closest_layers("fc", vit)[0] == "heads.head"
    assert "encoder.layers.encoder_layer_3" in closest_layers("blocks.3", vit)  # timm's name
    for name in ("zzz", ""):
        assert closest_layers(name, alexnet) == ["features", "avgpool", "classifier"]
    with pytest.raises(ValueError, match="'fc'.*'classifier.6'"):
        find_layers(alexnet, "fc")
    assert all(len(closest_layers(name, vit)) <= 5 for name in ("block", "norm", "linear", "attn"))


# ------------------------------------------------------------ the engine, and traps of importers


def mlp(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3), **options
    )


V = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))


def test_a_memo_is_constant_after_the_first_pass_and_spares_the_lower_layers():
    net, memo = mlp(), {}
    replay = Replay(net, ["1", "3"], V)
    replay(V, memo, {})
    before = dict(memo)
    assert list(memo) == [("0", 0), ("1", 0)]
    for _ in range(2):
        y = replay(V, memo, {"3": lambda o: 2 * o})
        assert memo.keys() == before.keys() and all(memo[k] is before[k] for k in memo)
    with edit(net, {"3": lambda o: 2 * o}):
        assert torch.equal(y, net(V))


def test_functions_of_layers_that_do_not_run_again_are_called_all_the_same():
    heard, memo = [], {}
    replay = Replay(mlp(), ["0", "2"], V, edited=lambda sites: sites[-1:])
    for _ in range(3):
        replay(V, memo, {"0": heard.append, "2": lambda o: o + 1})
    assert len(heard) == 3 and heard[0] is heard[1] is heard[2]


def test_exceptions_of_the_network_come_through_with_a_note():
    class Own(Exception):
        pass

    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            if len(x) == 3:
                raise Own("three")
            return self.a(x)

    replay = Replay(Picky(), ["a"], V)
    with pytest.raises(Own, match="three") as caught:
        replay(V[:3], {}, {})
    assert "(3, 4)" in caught.value.__notes__[0] and "(5, 4)" in caught.value.__notes__[0]
    with pytest.raises(Own, match="three") as caught:
        Replay(Picky(), ["a"], V[:3])
    assert "(3, 4)" in caught.value.__notes__[0]


def test_a_replaced_layer_is_an_error_by_name():
    for model, fix in (
        (CBL(mlp(), ["1", "3"], example=V), lambda model: model.net),
        (LRM(mlp(), [("3", "1")], example=V), lambda model: model.backbone),
    ):
        fix(model)[3] = nn.ReLU()
        with pytest.raises(ValueError, match="'3' was replaced"):
            model(V)
    model = CBL(mlp(), ["1", "3"], example=V)
    model.net = mlp()
    with pytest.raises(ValueError, match="'1' was replaced"):
        model(V)


def test_a_change_that_does_not_reach_the_output_is_refused_by_name():
    class ReadsLast(nn.Module):
        def __init__(self, detach=False):
            super().__init__()
            self.stem, self.rnn, self.head, self.detach = (
                nn.Linear(4, 4),
                nn.LSTM(4, 6, batch_first=True),
                nn.Linear(6, 3),
                detach,
            )

        def forward(self, x):
            h, (last, _) = self.rnn(self.stem(x))
            return self.head(h[:, -1].detach() if self.detach else last[-1])

    x = torch.randn(2, 5, 4)
    for flow in ("through", "literal"):
        with pytest.raises(ValueError, match="'rnn' does not reach the output"):
            CBL(ReadsLast(), ["stem", "rnn"], example=x, flow=flow)
    with pytest.raises(ValueError, match="'rnn' does not reach the output"):
        LRM(ReadsLast(), [("head", "rnn")], example=x)
    CBL(ReadsLast(), ["stem"], example=x)
    CBL(
        ReadsLast(detach=True), ["rnn"], example=x
    )  # the state reaches the output, if no gradient does
    state = torch.get_rng_state()
    CBL(mlp(), ["1"], example=V, learn_alpha=False)
    torch.set_rng_state(state)
    zero = mlp()
    nn.init.zeros_(zero[4].weight)  # nothing arrives today, but a path leads there
    CBL(zero, ["3"], example=V)


def test_a_head_that_is_heard_may_leave_the_output_alone():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.aside, self.head = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            h = self.b(self.a(x))
            self.aside(h)
            return self.head(h)

    LRM(
        Two(), [("aside", "a"), ("head", "aside")], example=V
    )  # aside is heard, and so may be changed
    with pytest.raises(ValueError, match="'aside'"):
        LRM(Two(), [("head", "aside")], example=V)


def test_a_nested_tensor_is_refused_with_the_remedy():
    class Padded(nn.Module):
        def __init__(self, **options):
            super().__init__()
            block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
            self.encoder, self.head = nn.TransformerEncoder(block, 2, **options), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.encoder(x, src_key_padding_mask=x[..., 0] == 0)[:, 0])

    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    x[0, 3:] = 0
    with pytest.raises(
        ValueError, match="'encoder.layers.1' returns a nested tensor.*enable_nested_tensor=False"
    ):
        CBL(Padded(), ["encoder.layers.0", "encoder.layers.1"][1:], example=x)
    for net, layers in (
        (Padded(), ["encoder"]),
        (Padded(enable_nested_tensor=False), ["encoder.layers.0", "encoder.layers.1"]),
    ):
        model = CBL(net, layers, example=x).eval()
        with torch.no_grad():
            assert_close(model(x, steps=0), net(x))
            assert not torch.allclose(model(x), net(x))


def test_channels_of_a_swin_transformer_are_last():
    from torchvision.models import SwinTransformer

    torch.manual_seed(0)
    net = SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=5)
    x = torch.randn(1, 3, 32, 32)
    model = CBL(net, ["features.1", "features.3"], example=x).eval()
    assert [(site.dim, site.channels) for site in model.sites.values()] == [(3, 8), (3, 16)]
    assert model(torch.randn(2, 3, 48, 64)).shape == (2, 5)  # another size, the same adapters

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6 * 64, 5)

        def forward(self, x):
            return self.head(self.norm(x.movedim(1, 3)).flatten(1))

    with pytest.raises(ValueError, match="'norm'.*channel_dims"):
        CBL(Fixed(), ["norm"], example=torch.randn(2, 6, 8, 8))
    assert (
        CBL(Fixed(), ["norm"], example=torch.randn(2, 6, 8, 8), channel_dims={"norm": 3})
        .sites["norm", 0]
        .channels
        == 6
    )


def test_new_parts_have_the_networks_dtype():
    for dtype in (torch.bfloat16, torch.float64):
        x = V.to(dtype)
        for model in (
            CBL(mlp().to(dtype), ["1", "3"], example=x),
            LRM(mlp().to(dtype), [("3", "1")], example=x),
        ):
            parts = [
                p
                for name, p in model.named_parameters()
                if not name.startswith(("net", "backbone", "alpha"))
            ]
            assert {p.dtype for p in parts} == {dtype} and model(x).dtype == dtype


class Both(nn.Module):
    """Two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, left, right, scale=1.0):
        return self.head(torch.tanh(self.a(left) + scale * self.b(right)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net, x: CBL(net, ["a", "b"], example=x),
        lambda net, x: LRM(net, [("head", "a")], example=x),
    ],
)
def test_networks_of_several_inputs(wrap):
    torch.manual_seed(0)
    net, x = Both(), (torch.randn(2, 4), torch.randn(2, 5))
    model = wrap(net, x).eval()
    assert torch.equal(model(x, steps=0), net(*x)) and not torch.allclose(model(x), net(*x))
    named = {"left": x[0], "right": x[1], "scale": 0.5}
    assert torch.equal(model(named, steps=0), net(*x, scale=0.5))
    assert_close(model((x[0][:1], x[1][:1])), model(x)[:1])
    with pytest.raises(FloatingPointError, match="input .*example 1"):
        model((x[0], x[1] * torch.tensor([[1.0], [float("nan")]])))


def test_a_network_may_be_wrapped_as_often_as_one_likes():
    norm = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    for net, layers in ((mlp(), ["1", "3"]), (norm, ["0", "1", "2"])):
        first = CBL(net, layers, example=V).eval()
        answer = first(V)
        for _ in range(400):
            last = CBL(net, layers, example=V, steps=1)
        last.eval()(V)
        assert torch.equal(first(V), answer)


def test_a_wrapped_model_is_not_wrapped_again():
    for inner in (CBL(mlp(), ["1", "3"], example=V), LRM(mlp(), [("3", "1")], example=V)):
        name = next(name for name, _ in inner.named_modules() if name.endswith(".3"))
        for wrap in (
            lambda net, layer: CBL(net, [layer], example=V),
            lambda net, layer: LRM(net, [(layer, layer.replace("3", "1"))], example=V),
        ):
            with pytest.raises(ValueError, match=f"{type(inner).__name__} is wrapped"):
                wrap(inner, name)
    inner = CBL(mlp(), ["1", "3"], example=V)
    outer = CBL(
        nn.Sequential(inner, nn.Linear(3, 3)), ["0"], example=V
    ).eval()  # its answer as a state
    assert torch.equal(outer(V, steps=0), outer.net[1](inner(V)))


def test_unrolled_view_gives_plain_hooks_every_pass():
    torch.manual_seed(0)
    x = torch.rand(3, 1, 12, 12)
    for model, layers in (
        (CBL(cnn(1, 10, width=4), example=x, steps=2), ["stage1", "stage2.0", "fc1"]),
        (LRM(cnn(1, 10, width=4), [("fc2", "stage2")], example=x, steps=2), ["stage2", "fc1.0"]),
        (FeedbackUNet(channels=(4, 8), steps=2), ["body", "head"]),
    ):
        model.eval()
        view, seen = unrolled_view(model), {}
        modules = dict(view.named_modules())
        for name in [f"{layer}@{t}" for layer in layers for t in range(3)]:
            modules[name].register_forward_hook(
                lambda m, args, output, name=name: seen.update({name: output})
            )
        assert torch.equal(view(x), model(x))
        assert f"{layers[-1]}@2" in seen and not any(m._forward_hooks for m in model.modules())
        for twin in (copy.deepcopy(view), pickle.loads(pickle.dumps(unrolled_view(model)))):
            assert torch.equal(twin(x), model(x))
    assert unrolled_view(model, 5)(x).shape == model(x).shape


def test_unrolled_view_serves_captum():
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    x = torch.rand(3, 1, 12, 12)
    model = CBL(cnn(1, 10, width=4), example=x, steps=2).eval()
    view, states = unrolled_view(model), model.trajectory(x, states=True).states
    for t in range(3):
        layer = dict(view.named_modules())[f"stage2@{t}"]
        assert_close(captum.LayerActivation(view, layer).attribute(x), states[t]["stage2"])
        cam = captum.LayerGradCam(view, layer).attribute(x, target=1)
        assert cam.shape == (3, 1, 3, 3) and cam.abs().sum() > 0
        by_hand = torch.autograd.grad(
            view(x)[:, 1].sum(), dict(view.named_parameters()).values(), allow_unused=True
        )
        assert any(g is not None for g in by_hand)


class InTheEncoder(nn.Module):
    """Torch runs this encoder layer in one piece where nobody wants gradients."""

    def __init__(self, nested=False):
        super().__init__()
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x, src_key_padding_mask=x[..., 0] == 0)[:, 0])


def test_the_fast_path_of_an_encoder_layer_is_named():
    x = torch.randn(3, 5, 8)
    model = CBL(InTheEncoder(), ["encoder.layers.0.linear1"], example=x).eval()
    expected = model(x).detach()
    with torch.no_grad(), pytest.raises(ValueError, match="linear1.*set_fastpath_enabled"):
        model(x)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            assert_close(model(x), expected)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_default_layers_refuse_nested_tensors_with_the_remedy():
    x = torch.randn(3, 5, 8)
    x[0, 3:] = 0
    with pytest.raises(ValueError, match="nested tensor.*enable_nested_tensor=False"):
        CBL(InTheEncoder(nested=True), example=x)


def test_an_unrolled_view_may_hold_layers_called_layers_and_steps():
    torch.manual_seed(0)
    net = nn.Sequential()
    for name in ("layers", "steps", "out"):
        net.add_module(name, nn.Linear(4, 4))
    x, seen = torch.randn(2, 4), []
    model = CBL(net, ["layers", "steps"], example=x, steps=1).eval()
    view = unrolled_view(model)
    view.get_submodule("steps@1").register_forward_hook(lambda m, args, out: seen.append(out))
    assert torch.equal(view(x), model(x)) and len(seen) == 1 and not view.training


def test_what_a_user_may_write_wrongly_is_told():
    x = torch.rand(3, 1, 12, 12)
    net = cnn(1, 10, width=4).eval()
    for dims in ({"stge1": 3}, {"stage1": 7}, {"stage1": 0}, {"stage1": -4}):
        with pytest.raises(ValueError, match="channel_dims"):
            CBL(net, ["stage1"], example=x, channel_dims=dims)
    assert CBL(net, ["stage1"], example=x, channel_dims={"stage1": -3}).sites["stage1", 0].dim == 1
    with pytest.raises(ValueError, match="given by their names, got Sequential"):
        CBL(net, [net.stage1], example=x)
    with pytest.raises(ValueError, match="at least 1"):
        Replay(net, [], x)
    replay = Replay(net, "stage1", x)
    with pytest.raises(ValueError, match="'stage2'"):
        replay(x, {}, {"stage2": lambda o: 0 * o})
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside inference_mode"):
        CBL(net, ["stage1"], example=x)


def test_another_number_of_classes_is_told():
    x = torch.rand(3, 1, 12, 12)
    model = CBL(cnn(1, 10, width=4), example=x)
    model.net.fc2 = nn.Linear(model.net.fc2.in_features, 7)
    with pytest.raises(ValueError, match=r"logits \(3, 7\).*10 classes"):
        model(x)


def test_later_passes_follow_a_network_trained_alone_after_restart():
    torch.manual_seed(0)
    x = torch.rand(8, 1, 12, 12) + 2
    model = CBL(cnn(1, 10, width=4), example=x, steps=2, alpha=0.0)
    model.net.train()(x)
    model.eval()
    for p in model.adapters.parameters():
        nn.init.zeros_(p)  # gates of exactly 1: every pass is the plain one
    model.statistics.restart()
    outputs = model.trajectory(x).outputs
    assert_close(outputs[2], outputs[0])


def test_an_output_that_is_kept_and_written_into_is_kept_as_it_was():
    for inplace in (False, True):
        net, heard, memo = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 3)), [], {}
        replay = Replay(net, ["0"], V)
        for _ in range(2):
            assert torch.equal(replay(V, memo, {"0": heard.append}), net(V))
        assert all(torch.equal(h, net[0](V)) for h in heard) and (heard[0] < 0).any()


def test_an_unrolled_view_has_a_whole_number_of_steps():
    model = CBL(mlp(), ["1", "3"], example=V)
    with pytest.raises(ValueError, match="steps"):
        unrolled_view(model, -1)
