"""Long-range modulation: both motifs against the released code's numbers and a plain re-
computation, every kind of network, loading, bad input."""

import copy
import functools
import hashlib
import http.server
import io
import json
import pickle
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from feedback_nb import lrm
from feedback_nb.feedback import stepwise_loss, tap
from feedback_nb.lrm import LRM, Connection, Modulation, alexnet_lrm
from feedback_nb.lrm import fetch_weights, load_published, read_weights, released_keys
from feedback_nb.replay import Site
from feedback_nb.steering import Steer

GOLDENS = Path(__file__).parent / "goldens"
MOTIFS = ["paper", "per-channel", "published"]
every = pytest.mark.parametrize("motif", MOTIFS)


@functools.cache
def goldens():
    return json.loads(
        (GOLDENS / "lrm_tiny.json").read_text()), load_file(GOLDENS / "lrm_tiny.safetensors")


def tiny(inplace=False):
    """The network of the goldens: torchvision's AlexNet in small."""
    relu = functools.partial(nn.ReLU, inplace=inplace)
    features = [
        nn.Conv2d(3, 8, 3, padding=1),
        relu(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        relu(),
        nn.Conv2d(12, 16, 3, padding=1),
        relu()
    ]
    classifier = [nn.Linear(256, 32), relu(), nn.Linear(32, 10)]
    return nn.Sequential(
        OrderedDict(features=nn.Sequential(*features), pool=nn.AdaptiveAvgPool2d(4),
                    flatten=nn.Flatten(1), classifier=nn.Sequential(*classifier)))


CONNECTIONS = [("classifier.2", "features.3"), ("features.6", "features.0"),
               ("classifier.1", "features.5")]


def published(inplace=False):
    model = LRM(tiny(inplace), CONNECTIONS, example=torch.zeros(1, 3, 32, 32), motif="published")
    return load_published(
        model, {
            key.removeprefix("state."): value
            for key, value in goldens()[1].items() if key.startswith("state.")
        })


class Signal:
    """What the model asks of a steering, with nothing else in it."""

    def __init__(self, source, vector, gain=1.0, blend=1.0, from_first_pass=False):
        self.sources, self.vector, self.blend, self.from_first_pass = (
            source, ), vector, blend, from_first_pass
        self.gains = {source: tuple(gain) if isinstance(gain, (list, tuple)) else (gain, gain)}

    def replace(self, stored):
        source = self.sources[0]
        # nothing is stored before the first pass: then it is the vector itself
        mixed = source in stored and self.blend != 1
        return {
            source: self.blend * self.vector +
            (1 - self.blend) * stored[source] if mixed else self.vector
        }


# ------------------------------------------------------------ the released code's numbers


@pytest.mark.parametrize("inplace", [False, True])
def test_goldens_outputs_and_other_sizes(inplace):
    _, g = goldens()
    model = published(inplace)
    assert sum(p.numel() for p in model.parameters()) == goldens()[0]["nparams"]
    for name, where, passes in (("in.x", "out", 4), ("in.x48", "out48", 3), ("in.x40x24",
                                                                             "out40x24", 3)):
        outputs = model.trajectory(g[name], steps=passes - 1).outputs
        assert len(outputs) == passes
        for i, output in enumerate(outputs):
            assert_close(output, g[f"{where}.pass{i + 1}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_goldens_loss_and_gradients(inplace):
    _, g = goldens()
    model = published(inplace)
    loss = stepwise_loss(model.trajectory(g["in.x"]), g["in.y"])
    assert_close(loss, g["loss.mean_ce_2pass"], atol=1e-5, rtol=1e-5)
    loss.backward()
    parameters, names = dict(model.named_parameters()), released_keys(model)
    checked = [key for key in g if key.startswith("grad.")]
    assert len(checked) == len(parameters)
    for key in checked:
        assert_close(parameters[names[key.removeprefix("grad.")]].grad, g[key], atol=1e-5,
                     rtol=1e-5)


def test_goldens_fields_of_the_second_pass():
    _, g = goldens()
    model = published()
    for source, destination in CONNECTIONS:
        a, b = source.replace(".", "_"), destination.replace(".", "_")
        with tap(model,
                 [f"modulations.{destination.replace('.', '/')}.drives.{source.replace('.', '/')}"
                  ]) as seen:
            model(g["in.x"])
        assert_close(*seen.values(), g[f"inter.pass2.mod.from_{a}_to_{b}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["s1", "s3", "s3_full", "spair", "s3_vec", "s3_half"])
@pytest.mark.parametrize("first", [False, True])
def test_goldens_steering(name, first):
    meta, g = goldens()
    how, model = meta["steering"][name], published()
    vector = g[how["activation"].split()[0]]
    if "broadcast" in how["activation"]:
        vector = vector.expand(3, -1)
    plain = model(g["in.x"])
    steer = Signal(how["source"], vector, how["strength"], how["alpha"], first)
    outputs = model.trajectory(g["in.x"], steps=1 if first else 2, steer=steer).outputs
    for i, output in enumerate(outputs):
        assert_close(output, g[f"steer{'first' if first else ''}.{name}.pass{i + 1}"], atol=2e-5,
                     rtol=1e-5)
    assert not torch.allclose(outputs[1], plain)
    assert torch.equal(model(g["in.x"]), plain)  # nothing is left for the next call


# ------------------------------------------------------------ a plain re-computation

LAYERS = {
    "conv": lambda c, d: nn.Conv2d(c, d, 3, padding=1),
    "norm": lambda c, d: nn.BatchNorm2d(c),
    "relu": lambda c, d: nn.ReLU(inplace=True),
    "pool": lambda c, d: nn.MaxPool2d(2),
}


def network(kinds, seed):
    torch.manual_seed(seed)
    layers, c = [], 2
    for i, kind in enumerate(kinds):
        layers.append(LAYERS[kind](c, 3 + i % 3))
        c = 3 + i % 3 if kind == "conv" else c
    layers += [
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(c, 5),
        nn.ReLU(inplace=True),
        nn.Linear(5, 4)
    ]
    net = nn.Sequential(*layers).double().eval()
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
    return net


def four(a):
    return a if a.dim() == 4 else a[:, :, None, None]


def plain_drive(drive, motif, a, target, size_at_build):
    """One source's field, straight from the equations, at every position and with no shortcut."""
    a, (H, W) = four(a), four(target).shape[2:]
    up = functools.partial(F.interpolate, mode="bilinear", align_corners=motif == "published")
    if motif != "published":
        u, log_sigma = ((p[None].mean((2, 3), keepdim=True) if a.shape[2:] == (1, 1)
                         else up(p[None], size=a.shape[2:])) for p in (drive.u, drive.log_sigma))
        a = torch.tanh((a - u) / torch.exp(log_sigma))
        a = drive.pos * a.clamp(min=0) + drive.neg * a.clamp(max=0)
        a = torch.einsum("oc,bchw->bohw", drive.conv.weight[:, :, 0, 0], a)
        return a.mean((2, 3), keepdim=True) if (H, W) == (1, 1) else up(a, size=(H, W))
    if size_at_build == (1, 1):
        mean, var = a.mean(1, keepdim=True), a.var(1, unbiased=False, keepdim=True)
        weight, bias = drive.norm.weight[:, None, None], drive.norm.bias[:, None, None]
    else:
        mean, var = a.mean((1, 2, 3), keepdim=True), a.var((1, 2, 3), unbiased=False, keepdim=True)
        weight, bias = (up(p[None], size=a.shape[2:])[0]
                        for p in (drive.norm.weight, drive.norm.bias))
    a = torch.tanh((a - mean) / torch.sqrt(var + 1e-5) * weight + bias)
    a = up(a, size=(H, W))
    a = torch.where(a > 0, a * drive.pos, a * drive.neg)
    return torch.einsum("oc,bchw->bohw", drive.conv.weight[:, :, 0, 0],
                        a) + drive.conv.bias[:, None, None]


def plain_passes(model, net, x, steps):
    stored, outputs = {}, []
    for _ in range(steps + 1):
        now, h = dict(stored), x
        for i, layer in enumerate(net):
            h = layer(h.clone())  # a clone, so that nothing that is kept can be written into
            told = now if model.motif == "published" else stored
            mine = [c for c in model.connections if c.destination == str(i) and c.source in told]
            if mine:
                m = model.modulations[str(i)]
                total = sum(
                    plain_drive(m.drives[c.source], model.motif, told[c.source], h, model.sources[
                        c.source].size) for c in mine)
                total = total.expand_as(four(h)).reshape(h.shape)
                h = h + (h * total if model.mode == "multiply" else total)
                h = h.relu() if model.motif == "published" else h
            if str(i) in model.sources:
                now[str(i)] = h
        stored = now
        outputs.append(h)
    return outputs


@st.composite
def problems(draw):
    kinds = [
        "conv",
        *draw(st.lists(st.sampled_from(["conv", "norm", "relu", "pool"]), min_size=2, max_size=6))
    ]
    while kinds.count("pool") > 2:
        kinds.remove("pool")
    kinds = [kind for i, kind in enumerate(kinds) if (kind, kinds[i - 1]) != ("relu", "relu")
             ]  # torch itself cannot train two in-place ReLUs in a row
    n = len(kinds)
    layers = [str(i) for i in range(n)] + [str(n + i) for i in (2, 3, 4)]
    pairs = draw(
        st.lists(
            st.tuples(st.sampled_from(layers),
                      st.sampled_from(layers)).filter(lambda p: p[0] != p[1]), min_size=1,
            max_size=4, unique=True))
    return kinds, pairs, draw(st.sampled_from([(8, 8), (12, 8), (5, 9)])), draw(
        st.sampled_from(["multiply", "add"])), draw(st.integers(0, 99))


@settings(max_examples=60, deadline=None)
@given(problem=problems(), motif=st.sampled_from(MOTIFS), shuffle=st.randoms(use_true_random=False))
def test_any_network_and_connections_equal_a_plain_recomputation(problem, motif, shuffle):
    kinds, pairs, size, mode, seed = problem
    net = network(kinds, seed)
    build = lambda net, pairs: LRM(net, pairs, example=torch.zeros(1, 2, 8, 8, dtype=torch.float64),
                                   steps=2, motif=motif, mode=mode)
    torch.manual_seed(seed)
    model = build(copy.deepcopy(net), pairs)
    shuffled = list(pairs)
    shuffle.shuffle(shuffled)
    torch.manual_seed(seed)
    other = build(copy.deepcopy(net), shuffled)
    for p, q in zip(model.modulations.parameters(), other.modulations.parameters(), strict=True):
        assert torch.equal(p, q)  # built alike, whatever the order
        with torch.no_grad():
            q.copy_(p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype)))
    x = torch.randn(3, 2, *size, dtype=torch.float64)
    outputs, expected = model.trajectory(x).outputs, plain_passes(model, net, x, 2)
    for output, wanted in zip(outputs, expected, strict=True):
        assert_close(output, wanted, atol=1e-9, rtol=1e-9)
    assert torch.equal(other(x),
                       outputs[-1])  # the order of the list does not matter, to the last bit
    cotangent = torch.randn_like(outputs[-1])
    parameters = list(model.modulations.parameters())
    got = torch.autograd.grad((outputs[-1] * cotangent).sum(), parameters, allow_unused=True)
    want = torch.autograd.grad((expected[-1] * cotangent).sum(), parameters, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        zero = torch.zeros(())
        assert_close(zero if g is None else g, (zero if w is None else w).to(
            (zero if g is None else g).dtype).expand_as(zero if g is None else g), atol=1e-8,
                     rtol=1e-8)


# ------------------------------------------------------------ zero drive, zero steps


@pytest.mark.parametrize("mode", ["multiply", "add"])
def test_paper_motif_without_drive_is_the_backbone_exactly(mode):
    torch.manual_seed(0)
    net, x = tiny(inplace=True), torch.randn(4, 3, 32, 32)
    plain = copy.deepcopy(net)(x)
    model = LRM(net, [*CONNECTIONS, ("features.1", "features.5")], example=x, steps=3, mode=mode)
    assert torch.equal(model(x, steps=0), plain)
    assert not torch.allclose(model(x), plain)
    with torch.no_grad():
        for modulation in model.modulations.values():
            for drive in modulation.drives.values():
                drive.pos.zero_(), drive.neg.zero_()
    assert all(torch.equal(output, plain) for output in model.trajectory(x).outputs)


@pytest.mark.parametrize("motif", ["paper", "per-channel"])
@pytest.mark.parametrize("mode", ["multiply", "add"])
def test_a_silent_model_answers_as_its_backbone_and_can_learn(motif, mode):
    torch.manual_seed(0)
    net, x = tiny(), torch.randn(2, 3, 32, 32)
    model = LRM(net, CONNECTIONS, example=x, motif=motif, mode=mode, init="zero", steps=2)
    with torch.no_grad():
        assert all(torch.equal(y, net(x)) for y in model.trajectory(x).outputs)
    model(x).square().sum().backward()
    for modulation in model.modulations.values():
        for drive in modulation.drives.values():
            assert drive.conv.weight.grad.abs().max() > 0


def test_a_silent_published_drive_leaves_only_the_rectifier_of_its_destination():
    torch.manual_seed(0)
    net, x = tiny(), torch.randn(2, 3, 32, 32)
    pairs = [("classifier.2", "features.1")]  # a ReLU: rectified once more it is what it was
    with torch.no_grad():
        model = LRM(net, pairs, example=x, motif="published", init="zero")
        assert torch.equal(model(x), net(x))
        random = LRM(net, pairs, example=x, motif="published")
        assert not torch.equal(random(x), net(x))


def test_a_source_at_its_u_drives_nothing():
    torch.manual_seed(0)
    o = torch.randn(2, 5, 4, 4)
    site = lambda c, size: Site("l", "l", (1, c, *size), 1)
    modulation = Modulation(site(5, (4, 4)), {"s": site(3, (2, 2))})
    with torch.no_grad():
        modulation.drives["s"].u.copy_(torch.randn(3, 1, 1))
    silent = modulation.drives["s"].u.expand(2, 3, 2, 2)
    assert torch.equal(modulation(o, {"s": silent}), o)
    assert not torch.allclose(modulation(o, {"s": silent + 1}), o)
    assert modulation(o, {}) is o
    talkative = Modulation(site(5, (4, 4)), {"s": site(3, (2, 2))}, motif="published")
    assert not torch.allclose(talkative(o.relu(), {"s": torch.zeros(2, 3, 2, 2)}),
                              o.relu())  # its bias speaks for silence


def test_published_early_source_modulates_the_first_pass_and_the_papers_does_not():
    x, pairs = torch.randn(2, 3, 32, 32), [("features.1", "features.5")]
    for motif in MOTIFS:
        torch.manual_seed(0)
        net = tiny(inplace=True)
        plain = copy.deepcopy(net)(x)
        outputs = LRM(net, pairs, example=x, motif=motif, steps=2).trajectory(x).outputs
        assert torch.equal(outputs[0], plain) == (motif != "published")
        assert not torch.allclose(outputs[1], plain)
        assert_close(outputs[1],
                     outputs[2])  # what an early source says does not change from pass to pass


def test_published_vector_destination_hears_one_corner_and_the_papers_the_mean():
    torch.manual_seed(0)
    site, vector = Site("s", "s", (1, 3, 4, 4), 1), Site("v", "v", (1, 5), 1)
    a, o = torch.randn(2, 3, 4, 4), torch.rand(2, 5)
    for motif, reaches in {"published": (0, 0), "paper": None}.items():
        drive = Modulation(vector, {"s": site}, motif=motif).drives["s"]
        if motif == "published":
            drive.norm.forward = lambda a: a  # the norm mixes positions
        a.grad = None
        drive(a.requires_grad_(), (1, 1)).sum().backward()
        heard = a.grad.abs().sum((0, 1)) > 0
        assert heard.sum() == (1 if reaches else 16) and heard[0, 0]
        assert Modulation(vector, {"s": site}, motif=motif)(o, {"s": a}).shape == o.shape


# ------------------------------------------------------------ the paper's statistics


def paper_drive(motif="paper", size=(1, 2)):
    """One channel to one channel, W = 1, so that the drive is what the equation's tanh says."""
    source, destination = Site("s", "s", (1, 1, *size), 1), Site("d", "d", (1, 1, *size), 1)
    drive = Modulation(destination, {"s": source}, motif).drives["s"]
    nn.init.ones_(drive.conv.weight)
    return drive


def test_statistics_of_channel_and_place_worked_by_hand():
    """Appendix A.1: tanh((a - u_cxy) / σ_cxy), then σ⁺ above 0 and σ⁻ below."""
    drive = paper_drive()
    with torch.no_grad():
        drive.u.copy_(torch.tensor([[[1.0, 3.0]]]))
        drive.log_sigma.copy_(torch.tensor([[[2.0, 4.0]]]).log())
        drive.pos.fill_(10.0)
        drive.neg.fill_(100.0)
        got = drive(torch.tensor([[[[2.0, 1.0]]]]), (1, 2))
    # (2 - 1) / 2 = 0.5 and (1 - 3) / 4 = -0.5: both places by their own numbers
    assert_close(got, torch.tensor([[[[10.0, -100.0]]]]) * torch.tensor(0.5).tanh())
    assert not torch.allclose(got[..., 0].abs(), got[..., 1].abs())


def test_statistics_are_resized_for_another_image():
    drive = paper_drive(size=(2, 2))
    with torch.no_grad():
        drive.u.copy_(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]))
        a = torch.zeros(1, 1, 4, 4)
        # bilinear, corners not aligned: a quarter of the way to the edge the value is the edge's
        row = torch.tensor([0.0, 0.25, 0.75, 1.0])
        u = row[None, :] + 2 * row[:, None]
        assert_close(drive(a, (4, 4)), torch.tanh(-u)[None, None])
        assert_close(drive(torch.zeros(1, 1, 1, 1), (4, 4)), torch.tanh(torch.tensor(-1.5)).view(
            1, 1, 1, 1))  # a steering vector meets their mean over the places


def test_equal_statistics_at_all_places_are_one_per_channel():
    torch.manual_seed(0)
    x, pairs = torch.randn(2, 3, 32, 32), [*CONNECTIONS]
    per_channel = LRM(tiny(), pairs, example=x, motif="per-channel").eval()
    with torch.no_grad():
        for p in per_channel.modulations.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model = LRM(tiny(), pairs, example=x).eval()
    shape = lambda m: tuple(m.modulations["features.0"].drives["features.6"].u.shape)
    assert shape(per_channel) == (16, 1, 1) and shape(model) == (16, 16, 16)
    stored = per_channel.state_dict()  # what the files of earlier versions hold
    model.load_state_dict(stored)
    assert stored["modulations.features/0.drives.features/6.u"].shape == (16, 1, 1)  # as it was
    assert torch.equal(model(x), per_channel(x))  # to the last bit
    larger = torch.randn(2, 3, 48, 40)
    assert_close(model(larger), per_channel(larger))


def test_statistics_of_every_place_are_trained_stored_and_copied():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = LRM(tiny(), CONNECTIONS, example=x)
    model(x).square().sum().backward()
    u = model.modulations["features.0"].drives["features.6"].u
    assert (u.grad.flatten(1).std(1) > 0).any()  # the places learn different numbers
    with torch.no_grad():
        for p in model.modulations.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.eval()
    answer = model(x)
    copied = copy.deepcopy(model)
    other = LRM(tiny(), CONNECTIONS, example=x).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(copied(x), answer) and torch.equal(other(x), answer)
    with torch.no_grad():
        copied.modulations["features.0"].drives["features.6"].u.add_(1.0)
    assert torch.equal(model(x), answer) and not torch.equal(copied(x), answer)
    wrong = model.state_dict() | {"modulations.features/0.drives.features/6.u": torch.zeros(
        16, 8, 8)}
    with pytest.raises(RuntimeError, match="features/6.u"):
        other.load_state_dict(wrong)


# ------------------------------------------------------------ every network


class Residual(nn.Module):
    """Skip connections, one ReLU module that runs three times, in-place sums."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(
            8, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 3, padding=1)
        self.skip, self.norm, self.relu, self.head = nn.Conv2d(
            8, 8, 1, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x):
        h = self.relu(self.stem(x))
        out = self.relu(self.norm(self.a(h)))
        out = self.norm(self.b(out))
        out += self.skip(h)
        return self.head(self.relu(out).mean((2, 3)))


class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(
            6, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.conv2(self.conv1(x).relu_()).relu_().mean(2))


def vit():
    from torchvision.models import VisionTransformer

    net = VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16,
                            mlp_dim=32, num_classes=5)
    nn.init.normal_(net.heads.head.weight
                    )  # torchvision starts with zeros, so that nothing would reach the output
    return net


def resnet():
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes=5)


def convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1),
                     CNBlockConfig(16, 24, 2),
                     CNBlockConfig(24, None, 1)], layer_scale=1.0, num_classes=5)


NETS = {
    "tiny": (lambda: tiny(inplace=True), CONNECTIONS, (3, 32, 32)), "residual": (Residual, [
        ("b", "stem"), ("head", "a"), ("relu", "b"), ("stem", "norm")
    ], (3, 16, 16)), "resnet": (resnet, [("layer3", "layer1.0.conv1"), ("fc", "layer2.0"),
                                         ("layer1.0.relu", "layer2.1.conv2")], (3, 32, 32)),
    "convnext": (convnext, [("features.5.0", "features.1.0"),
                            ("classifier.2", "features.3.1")], (3, 32, 32)),
    "vit": (vit, [("encoder.layers.encoder_layer_2", "encoder.layers.encoder_layer_0"),
                  ("heads.head", "encoder.layers.encoder_layer_1")], (3, 32, 32)),
    "speech": (Speech, [("conv2", "conv1"), ("head", "conv2")], (4, 9)),
}
nets = pytest.mark.parametrize("kind", NETS)


def build(kind, motif, **options):
    torch.manual_seed(0)
    make, pairs, shape = NETS[kind]
    net, x = make(), torch.randn(4, *shape)
    return net, LRM(net, pairs, example=x[:2], motif=motif, **options), x


@every
@nets
def test_contract(kind, motif):
    """What holds for every network and both motifs."""
    net, model, x = build(kind, motif, steps=2)
    net.eval()
    plain = NETS[kind][0]().eval()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(net(x), plain(x))  # the network on its own is what it was
    if motif != "published" or kind not in ("residual",
                                        "resnet"):  # these have a source before its destination
        assert torch.equal(model(x, steps=0), plain(x))
    answer = model(x)
    assert not torch.allclose(answer, plain(x), atol=1e-4)
    assert torch.equal(model(x), answer)  # nothing is left behind
    assert_close(model(x[:1]), answer[:1], atol=1e-5, rtol=1e-4)  # another batch size
    assert_close(pickle.loads(pickle.dumps(model))(x), answer)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    _, twin, _ = build(kind, motif, steps=2)
    twin.eval().load_state_dict(torch.load(saved, weights_only=True))
    assert_close(twin(x), answer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(x).float()).all()
    twin.train()
    loss = stepwise_loss(twin.trajectory(x), torch.arange(4))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all()
                                   for p in twin.modulations.parameters())


@every
@nets
def test_what_is_answered_from_the_first_pass_would_have_come_out_the_same(kind, motif):
    _, model, x = build(kind, motif, steps=2)
    model.eval()
    slow = copy.deepcopy(model)
    slow.replay.reused, slow.replay.early = set(), set()  # nothing is answered from the first pass
    for a, b in zip(model.trajectory(x).outputs, slow.trajectory(x).outputs, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-5)
    for one in (model, slow):
        one.zero_grad()
        stepwise_loss(one.trajectory(x), torch.arange(4)).backward()
    for (name, p), (_, q) in zip(model.named_parameters(), slow.named_parameters(), strict=True):
        if p.grad is not None:
            assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4,
                         msg=lambda m, name=name: f"{name}: {m}")


@every
def test_what_comes_before_the_first_destination_runs_once(motif):
    torch.manual_seed(0)
    x, net, ran = torch.randn(2, 3, 32, 32), tiny(), []
    model = LRM(net, [("classifier.2", "features.3"), ("features.1", "features.5")], example=x,
                motif=motif, steps=3)
    for i in (0, 3, 5):  # the convolutions themselves, below any switch
        conv = net.features[i]
        conv._conv_forward = lambda *args, i=i, plain=conv._conv_forward: (ran.append(i),
                                                                           plain(*args))[1]
    model(x)
    assert [ran.count(i) for i in (0, 3, 5)] == [1, 1, 4]


@every
def test_no_in_place_relu_changes_a_result_or_a_gradient(motif):
    """Sources and destinations right before in-place operations, against the same network without
    them."""
    pairs = [("features.5", "features.0"), ("features.3", "features.5"),
             ("classifier.0", "features.3"), ("classifier.2", "classifier.0")]
    x, y, seen = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3]), []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = LRM(tiny(inplace), pairs, example=x, motif=motif, steps=2)
        trajectory = model.trajectory(x, states=True)
        stepwise_loss(trajectory, y).backward()
        seen.append((trajectory, [p.grad for p in model.parameters()]))
    (a, grads), (b, others) = seen
    for u, v in zip(a.outputs, b.outputs, strict=True):
        assert torch.equal(u, v)
    for u, v in zip(a.states, b.states, strict=True):
        assert all(torch.equal(u[name], v[name]) for name in u)
    assert motif == "published" or (b.states[0]["features.5"] < 0).any()  # stored before the ReLU
    for u, v in zip(grads, others, strict=True):
        assert_close(u, v)


@every
def test_sources_and_gradients_run_through_the_passes(motif):
    _, model, x = build("tiny", motif)
    trajectory = model.trajectory(x, states=True)
    assert list(trajectory.states[0]) == list(
        model.sources) == ["features.6", "classifier.1", "classifier.2"]
    weight = model.backbone.classifier[2].weight
    through = torch.autograd.grad(trajectory.outputs[1].sum(), weight, retain_graph=True)[0]
    trajectory = model.trajectory(x)
    frozen = model.step(
        x,
        type(model.start(x))({k: v.detach()
                              for k, v in model.start(x).h.items()}, None, model.start(x).memo), 0)
    direct = torch.autograd.grad(frozen.y.sum(), weight)[0]
    assert not torch.allclose(through,
                              direct)  # the first pass counts too: sources are not detached


@every
@pytest.mark.parametrize("size", [(8, 8), (20, 12), (33, 48)])
def test_other_image_sizes(motif, size):
    model = LRM(tiny(), CONNECTIONS, example=torch.zeros(1, 3, 32, 32), motif=motif)
    assert model(torch.randn(2, 3, *size)).shape == (2, 10)


@every
def test_one_by_one_source_maps_at_build_and_later(motif):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4),
                        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(6, 5))
    for built in (4, 16):
        torch.manual_seed(0)
        model = LRM(net, [("4", "0")], example=torch.zeros(1, 3, built, built), motif=motif)
        assert model.sources["4"].size == (built // 4, built // 4)
        for size in (4, 5, 8, 16):
            outputs = model.trajectory(torch.randn(2, 3, size, size)).outputs
            assert outputs[1].isfinite().all() and not torch.allclose(outputs[0], outputs[1])


@every
def test_deepcopy_is_independent(motif):
    _, model, x = build("tiny", motif)
    answer, twin = model(x), copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    assert torch.equal(model(x), answer) and not torch.allclose(twin(x), answer)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert_close(model(x), twin(x))


@every
@pytest.mark.parametrize("mode", [True, False])
def test_the_backbone_keeps_its_modes(motif, mode):
    net = Residual().train(mode)
    net.norm.eval()
    LRM(net, [("b", "stem")], example=torch.randn(2, 3, 8, 8), motif=motif)
    assert (net.training, net.a.training, net.norm.training) == (mode, mode, False)


def test_batch_statistics_are_the_backbones_own_and_building_leaves_them():
    net = Residual()
    before = net.norm.running_mean.clone()
    LRM(net, [("b", "stem")], example=torch.randn(2, 3, 8, 8) + 5)
    assert torch.equal(net.norm.running_mean, before)


@every
def test_parameters_stay_tied_to_the_optimizer_through_steering(motif):
    _, model, x = build("tiny", motif)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    drive = model.modulations["features.3"].drives["classifier.2"]
    before = drive.pos.clone()
    vector = F.one_hot(torch.arange(4), 10).float()
    stepwise_loss(model.trajectory(x, steer=Signal("classifier.2", vector, 3)),
                  torch.arange(4)).backward()
    assert drive.pos.grad.abs() > 0
    optimizer.step()
    assert not torch.equal(drive.pos, before)
    assert {id(p) for p in model.parameters()} == held


@every
def test_steering_without_effect_and_per_example(motif):
    _, model, x = build("tiny", motif, steps=2)
    plain = model(x)
    vectors = torch.randn(4, 10)
    assert torch.equal(model(x, steer=Signal("classifier.2", vectors, 1.0, 0.0)), plain)
    steered = model(x, steer=Signal("classifier.2", vectors, (0.5, 2.0)))
    for i in range(4):
        assert_close(model(x[i:i + 1], steer=Signal("classifier.2", vectors[i:i + 1], (0.5, 2.0))),
                     steered[i:i + 1], atol=1e-5, rtol=1e-4)
    everywhere = vectors[:, :, None, None].expand(-1, -1, 4, 4)
    assert_close(model(x, steer=Signal("classifier.2", everywhere, (0.5, 2.0))), steered, atol=1e-5,
                 rtol=1e-4)  # a map that is the same at all places
    half = everywhere * torch.tensor([1.0, 1, 0, 0])
    assert not torch.allclose(model(x, steer=Signal("classifier.2", half, (0.5, 2.0))), steered)
    first = model.trajectory(x, steer=Signal("classifier.2", vectors, 2.0,
                                             from_first_pass=True)).outputs[0]
    assert not torch.allclose(first, model(x, steps=0))
    assert torch.equal(model(x), plain)


@every
@pytest.mark.parametrize("kind", ["tiny", "residual", "vit"])
def test_compiles_without_a_graph_break(kind, motif):
    _, model, x = build(kind, motif)
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(x), model(x))


def test_double_and_channels_last_dims():
    class Last(nn.Module):  # (B, H, W, C), as in a Swin transformer
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(
                torch.tanh(self.b(torch.tanh(self.a(x.permute(0, 2, 3, 1))))).mean((1, 2)))

    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    model = LRM(Last().double(), [("b", "a")], example=x, channel_dims={"a": 3, "b": 3})
    assert model.modulations["a"].drives["b"].conv.weight.shape == (6, 8, 1, 1)
    assert model(x).dtype == torch.float64


# ------------------------------------------------------------ networks of residual blocks,
# connected from block to block


def blocks_resnet():
    from torchvision.models.resnet import BasicBlock

    stage = lambda a, b, stride: BasicBlock(
        a, b, stride, None
        if a == b else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)))
    stem = [("conv1", nn.Conv2d(3, 6, 3, 2, 1, bias=False)), ("bn1", nn.BatchNorm2d(6)),
            ("relu", nn.ReLU(inplace=True))]
    stages = [(f"layer{i + 1}", nn.Sequential(stage(a, b, s), stage(b, b, 1)))
              for i, (a, b, s) in enumerate([(6, 6, 1), (6, 8, 2), (8, 10, 2)])]
    return nn.Sequential(
        OrderedDict([
            *stem, *stages, ("avgpool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()),
            ("fc", nn.Linear(10, 5))
        ]))


BLOCKS = {
    "resnet-sum": (blocks_resnet, [
        ("layer3.1", "layer1.1"), ("fc", "layer2.1"), ("fc", "layer3.1")
    ]), "resnet-branch": (blocks_resnet, [("layer3.1", "layer1.1.bn2"), ("fc", "layer2.1.bn2"),
                                          ("fc", "layer3.1.bn2")]),
    "convnext-sum": (convnext, [("features.5.0", "features.1.0"), ("classifier.2", "features.3.0"),
                                ("classifier.2", "features.5.0")]),
    "convnext-branch": (convnext, [("features.5.0", "features.1.0.block"),
                                   ("classifier.2", "features.3.0.block"),
                                   ("classifier.2", "features.5.0.block")]),
    "vit-sum": (vit, [(f"encoder.layers.encoder_layer_{a}", f"encoder.layers.encoder_layer_{b}")
                      for a, b in ((1, 0),
                                   (2, 1))] + [("heads.head", "encoder.layers.encoder_layer_2")]),
    "vit-branch": (vit, [("encoder.layers.encoder_layer_2", "encoder.layers.encoder_layer_0.mlp"),
                         ("heads.head", "encoder.layers.encoder_layer_2.mlp")]),
}
residual_blocks = pytest.mark.parametrize("kind", BLOCKS)


def between_blocks(kind, **options):
    torch.manual_seed(0)
    make, pairs = BLOCKS[kind]
    net, x = make(), torch.randn(3, 3, 32, 32)
    return net, LRM(net, options.pop("pairs", pairs), example=x[:1], **options), x


@residual_blocks
@pytest.mark.parametrize("mode", ["multiply", "add"])
def test_between_blocks_no_drive_or_no_pass_is_the_backbone_exactly(kind, mode):
    net, model, x = between_blocks(kind, mode=mode, steps=2)
    for training in (False, True):
        model.train(training)
        before = copy.deepcopy(net)
        plain = copy.deepcopy(before)(x)
        assert torch.equal(model(x, steps=0), plain)
        net.load_state_dict(before.state_dict())  # batch norm's statistics of a training pass
    model.eval()
    plain, answer = net(x), model(x)
    assert not torch.allclose(answer, plain, atol=1e-4)
    with torch.no_grad():
        for name, p in model.modulations.named_parameters():
            if name.endswith((".pos", ".neg")):
                p.zero_()
    assert all(torch.equal(output, plain) for output in model.trajectory(x).outputs)


@residual_blocks
def test_between_blocks_order_copies_and_gradients(kind):
    _, model, x = between_blocks(kind)
    _, turned, _ = between_blocks(kind, pairs=BLOCKS[kind][1][::-1])
    model.eval(), turned.eval()
    answer = model(x)
    assert torch.equal(turned(x), answer)  # built alike and in one order, whatever the list's
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
        for name, p in model.modulations.named_parameters():
            if name.endswith(".u"):
                p.add_(0.1)  # so that a source behind a ReLU has values below its u
    answer = model(x)
    assert not torch.allclose(twin(x), answer) and torch.equal(model(x), answer)
    stepwise_loss(model.train().trajectory(x), torch.arange(3)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0
               for p in model.modulations.parameters())


@residual_blocks
def test_between_blocks_any_image_the_backbone_takes(kind):
    net, model, _ = between_blocks(kind)
    model.eval()
    other = torch.randn(2, 3, 48, 40)
    if kind.startswith("vit"):
        with pytest.raises(AssertionError, match=r"Wrong image height[\s\S]*\(2, 3, 48, 40\)"):
            model(other)
        return
    assert torch.equal(model(other, steps=0), net(other)) and model(other).shape == (2, 5)
    assert not torch.allclose(model(other), net(other), atol=1e-4)


def test_tokens_drive_tokens_and_the_output_drives_all_alike():
    _, model, _ = between_blocks("vit-sum")
    inner, outer = model.modulations["encoder.layers.encoder_layer_0"], model.modulations[
        "encoder.layers.encoder_layer_2"]
    tokens, said = torch.randn(2, 17, 16), torch.zeros(2, 17, 16)
    said[:, 0] = 1  # the class token alone speaks
    moved = (inner(tokens, {"encoder.layers.encoder_layer_1": said}) - tokens).abs().sum(2)
    assert (moved[:, 0] > 0).all() and (moved[:, 1:] == 0).all()
    assert outer.field(tokens, {"heads.head": torch.randn(2, 5)}).shape == (2, 1, 16)


# ------------------------------------------------------------ AlexNet and the released weights


@pytest.mark.parametrize("level, total", [(1, 62_924_348), (2, 63_605_200), (3, 65_186_642)])
def test_parameter_totals_are_the_released_ones(level, total):
    model = alexnet_lrm(level, device="meta")
    assert sum(p.numel() for p in model.parameters()) == total
    assert len(model.connections) == 2 * level - (level == 3)


@pytest.fixture
def narrow(monkeypatch):
    """AlexNet with torchvision's layer names and few channels."""

    def make(weights=None, num_classes=1000):
        relu, (a, b, c, d, e) = functools.partial(nn.ReLU, inplace=True), (4, 6, 8, 7, 5)
        convs = [
            nn.Conv2d(3, a, 11, 4, 2),
            relu(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(a, b, 5, padding=2),
            relu(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(b, c, 3, padding=1),
            relu()
        ]
        convs += [
            nn.Conv2d(c, d, 3, padding=1),
            relu(),
            nn.Conv2d(d, e, 3, padding=1),
            relu(),
            nn.MaxPool2d(3, 2)
        ]
        head = [
            nn.Dropout(),
            nn.Linear(36 * e, 12),
            relu(),
            nn.Dropout(),
            nn.Linear(12, 9),
            relu(),
            nn.Linear(9, num_classes)
        ]
        return nn.Sequential(
            OrderedDict(features=nn.Sequential(*convs), avgpool=nn.AdaptiveAvgPool2d(6),
                        flatten=nn.Flatten(), classifier=nn.Sequential(*head)))

    monkeypatch.setattr("torchvision.models.alexnet", make)


def release(model, spelling="newer"):
    """The state dict as a released file has it."""
    state = model.state_dict()
    state = {theirs: state[ours] for theirs, ours in released_keys(model).items()}
    if spelling == "older":
        glue = lambda key: key.replace("features_", "features").replace(
            "classifier_", "classifier").replace("feedforward.", "backbone.")
        state = {"module." + glue(key): value for key, value in state.items()}
    return state


@pytest.mark.parametrize("spelling", ["newer", "older"])
@pytest.mark.parametrize("under", [None, "model", "state_dict"])
def test_released_files_load_in_every_spelling(narrow, tmp_path, spelling, under):
    torch.manual_seed(0)
    model, x = alexnet_lrm(3, size=96, n_classes=7).eval(), torch.randn(2, 3, 96, 96)
    state = release(model, spelling)
    if spelling == "older":
        assert "module.lrm.features8_modulation.from_classifier6_to_features8.neg_scale" in state
        assert "module.backbone.features.0.weight" in state
    torch.save({under: state, "epoch": 3} if under else state, tmp_path / "weights.pth")
    twin = alexnet_lrm(3, tmp_path / "weights.pth", size=96, n_classes=7).eval()
    assert torch.equal(twin(x), model(x))


def test_wrong_weights_list_every_key_and_change_nothing(narrow):
    model = alexnet_lrm(1, size=96, n_classes=7)
    before = copy.deepcopy(model.state_dict())
    state = {key: torch.zeros_like(value) for key, value in release(model).items()}
    del state["feedforward.features.3.bias"]
    del state["lrm.features_8_modulation.from_classifier_6_to_features_8.pos_scale"]
    weight = "lrm.features_0_modulation.from_features_9_to_features_0.rescale.norm.weight"
    state[weight] = torch.zeros(7, 55, 55)
    state["lrm.features_9_modulation.from_classifier_6_to_features_9.neg_scale"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(2)
    state["module.feedforward.features.0.bias"] = torch.zeros(4)  # twice, in another spelling
    with pytest.raises(ValueError) as caught:
        load_published(model, state)
    missing, unexpected, shaped = str(caught.value).split("; ")
    assert "missing: " in missing and "features.3.bias" in missing and "pos_scale" in missing
    assert unexpected.startswith("unexpected: ") and "fc.weight" in unexpected
    assert "features_9_modulation" in unexpected
    assert "module.feedforward.features.0.bias" in unexpected
    assert "mis-shaped: " in shaped and "norm.weight (7, 55, 55), expected (7, 23, 23)" in shaped
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    with pytest.raises(ValueError, match="published motif"):
        load_published(LRM(tiny(), CONNECTIONS, example=torch.zeros(1, 3, 32, 32)), {})


@pytest.fixture
def server(tmp_path):
    """A web server on this machine, with a weights file whose name holds its checksum."""
    folder = tmp_path / "served"
    folder.mkdir()
    torch.save({"w": torch.arange(3.0)}, folder / "raw")
    name = f"small-{hashlib.sha256((folder / 'raw').read_bytes()).hexdigest()[:10]}.pth"
    (folder / "raw").rename(folder / name)
    (folder / "false-0123456789.pth").write_bytes(b"something else")

    class Handler(http.server.SimpleHTTPRequestHandler):
        asked = []

        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, *args):
            Handler.asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/", name, Handler.asked, folder
        httpd.shutdown()


def test_weights_are_fetched_once_and_checked(server, tmp_path):
    address, name, asked, folder = server
    path = fetch_weights(address + name, tmp_path / "cache")
    assert_close(read_weights(path)["w"], torch.arange(3.0))
    assert fetch_weights(address + name, tmp_path / "cache") == path and len(asked) == 1
    assert fetch_weights((folder / name).as_uri(),
                         tmp_path / "other").read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="small.*delete it"):
        fetch_weights(address + name, tmp_path / "cache")
    with pytest.raises(ValueError, match="false-0123456789.pth"):
        fetch_weights(address + "false-0123456789.pth", tmp_path / "cache")
    with pytest.raises(OSError, match=r"404[\s\S]*could not be fetched"):
        fetch_weights(address + "gone-0123456789.pth", tmp_path / "cache")
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [name]  # no rubble
    with pytest.raises(ValueError, match="weights.pth.*no checksum"):
        fetch_weights(address + "weights.pth", tmp_path)


def test_published_weights_come_through_the_cache(narrow, server, tmp_path, monkeypatch):
    address, _, asked, folder = server
    torch.manual_seed(0)
    model = alexnet_lrm(2, size=96, n_classes=7).eval()
    torch.save(release(model), folder / "raw")
    name = f"lrm2-{hashlib.sha256((folder / 'raw').read_bytes()).hexdigest()[:10]}.pth"
    (folder / "raw").rename(folder / name)
    monkeypatch.setattr(lrm, "RELEASED", address)
    monkeypatch.setitem(lrm.ALEXNET, 2, (lrm.ALEXNET[2][0], name))
    monkeypatch.setenv("FEEDBACK_NB_CACHE", str(tmp_path / "cache"))
    x = torch.randn(1, 3, 96, 96)
    for _ in range(2):
        assert torch.equal(alexnet_lrm(2, "published", size=96, n_classes=7).eval()(x), model(x))
    assert asked == [f"/{name}"] and (tmp_path / "cache" / "weights" / name).exists()


def test_the_released_files_are_named_with_their_checksums():
    assert {level: file[-14:-4]
            for level, (_, file) in lrm.ALEXNET.items()
            } == {1: "40b29a3427", 2: "17b4229a30", 3: "63ab1b3b06"}


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path):
    torch.save({"model": Evil(str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="no file of plain tensors; nothing was executed"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="no file of plain tensors"):
        read_weights(tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "none.pth")


# ------------------------------------------------------------ bad input


class Spare(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare, self.head = nn.Conv2d(3, 4, 3), nn.Linear(2, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.used(x).mean((2, 3)))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


class Mixed(nn.Module):
    """A map that becomes tokens."""

    def __init__(self):
        super().__init__()
        self.conv, self.block, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(self.conv(x).flatten(2).transpose(1, 2)).mean(1))


X = torch.zeros(1, 3, 32, 32)
wrong = lambda make, message, error=ValueError: pytest.param(make, message, error, id=message[:40])
small = lambda **options: LRM(tiny(), CONNECTIONS, example=X, **options)


@pytest.mark.parametrize("make, message, error", [
    wrong(lambda: LRM(tiny(), [("classifier.3", "features.0")], example=X),
          "'classifier.3'.*'classifier"),
    wrong(lambda: LRM(tiny(), [("features.3", "features.3")], example=X), "'features.3'"),
    wrong(lambda: LRM(tiny(), [CONNECTIONS[0], Connection(*CONNECTIONS[0])], example=X),
          "'features.3'.*twice"),
    wrong(lambda: LRM(tiny(), [], example=X), "at least one"),
    wrong(lambda: LRM(tiny(), Connection(*CONNECTIONS[0]), example=X), "must be a list"),
    wrong(lambda: LRM(tiny(), [("a", "b", "c")], example=X), r"\('a', 'b', 'c'\)"),
    wrong(lambda: LRM(tiny(), ["ab"], example=X), "'ab'"),
    wrong(lambda: LRM(Spare(), [("spare", "used")], example=X), "'spare'"),
    wrong(lambda: LRM(Spare(), [("head", "spare")], example=X), "'spare'"),
    wrong(lambda: LRM(Mixed(), [("block", "conv")], example=X), "'block' .*'conv'"),
    wrong(lambda: LRM(tiny(), CONNECTIONS, example=X[:, :1]), r"\(1, 1, 32, 32\)", RuntimeError),
    wrong(lambda: small(motif="papers"), "'papers'"),
    wrong(lambda: small(mode="sum"), "'sum'"),
    wrong(lambda: small(init="zeros"), "'zeros'.*'zero'"),
    wrong(lambda: small(steps=-1), "steps"),
    wrong(lambda: small()
          (torch.zeros(1, 3, 1, 1)), r"\(1, 3, 1, 1\).*\(1, 3, 32, 32\)", RuntimeError),
    wrong(lambda: small()(torch.zeros(1, 4, 32, 32)), r"\(1, 4, 32, 32\)", RuntimeError),
    wrong(lambda: small()
          (X, steer=Signal("features.0", torch.zeros(1, 10))), "'features.0'.*classifier.2"),
    wrong(
        lambda: small()
        (X, steer=Signal("classifier.2", torch.zeros(1, 9), blend=1, from_first_pass=True)),
        "channels.*10"),
    wrong(
        lambda: small()(X, steer=Signal("classifier.2", torch.zeros(3, 10), from_first_pass=True)),
        "3.*number of vectors"),
    wrong(lambda: alexnet_lrm(4), "level"),
    wrong(lambda: alexnet_lrm(1, "published", motif="paper"), "published"),
],
                         )
def test_bad_input_is_named(make, message, error):
    """An exception of the network itself comes through as it is, with a note; `match` reads
    both."""
    with pytest.raises(error, match=message):
        make()


def test_alexnet_says_when_an_image_is_too_small(narrow):
    with pytest.raises(RuntimeError, match=r"\(1, 3, 16, 16\)"):
        alexnet_lrm(1, size=16)
    with pytest.raises(RuntimeError, match=r"\(1, 3, 16, 16\).*\(1, 3, 96, 96\)"):
        alexnet_lrm(1, size=96)(torch.zeros(1, 3, 16, 16))


def test_a_source_may_return_a_tuple_whose_first_item_is_its_state():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3)
    model = LRM(Pair(), [("head", "rnn")], example=x).eval()
    assert torch.equal(model(x, steps=0),
                       model.backbone(x)) and not torch.allclose(model(x), model.backbone(x))


def test_an_example_that_is_not_a_tensor_is_named():
    with pytest.raises((TypeError, AttributeError), match="example, str"):
        LRM(tiny(), CONNECTIONS, example="image")


@every
def test_a_value_that_is_not_finite_names_layer_and_step(motif):
    _, model, x = build("tiny", motif)
    with torch.no_grad():
        model.modulations["features.5"].drives["classifier.1"].conv.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="layer 'features.6' is not finite at step 1 of 1"):
        model(x)


class Fickle(nn.Module):
    """A layer that only large images reach."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3,
                                              padding=1), nn.Conv2d(4, 4, 3,
                                                                    padding=1), nn.Linear(4, 5)

    def forward(self, x):
        h = self.a(x)
        return self.head((self.b(h) if x.shape[-1] > 8 else h).mean((2, 3)))


def test_a_source_that_is_silent_for_an_input_is_named():
    model = LRM(Fickle(), [("b", "a")], example=torch.zeros(1, 3, 12, 12))
    with pytest.raises(ValueError, match="'b' did not run"):
        model(torch.zeros(1, 3, 6, 6))
    model = LRM(Fickle(), [("head", "b")], example=torch.zeros(1, 3, 12, 12))
    with pytest.raises(ValueError, match="'b' did not run"):
        model(torch.zeros(1, 3, 6, 6))


def test_running_out_of_memory_is_not_blamed_on_the_image(monkeypatch):
    model = LRM(tiny(), CONNECTIONS, example=X)

    def full(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(model.backbone.features[3], "_conv_forward", full)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        model(torch.zeros(1, 3, 40, 40))


@pytest.mark.parametrize("under", ["model", "state_dict"])
def test_a_wrapped_state_dict_loads_without_a_file(under):
    torch.manual_seed(0)
    model, twin = published(), LRM(tiny(), CONNECTIONS, example=X, motif="published")
    load_published(twin, {under: release(model), "epoch": 3})
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(twin(x), model(x))


@every
def test_an_exception_in_the_middle_of_a_steered_pass_leaves_nothing(motif, monkeypatch):
    _, model, x = build("tiny", motif, steps=2)
    plain, runs, conv = model(x), [], model.backbone.features[5]
    whole = conv._conv_forward

    def breaks(*args):
        runs.append(1)
        if len(runs) == 2:
            raise KeyError("in the middle")
        return whole(*args)

    monkeypatch.setattr(conv, "_conv_forward", breaks)
    with pytest.raises(KeyError, match="in the middle"):
        model(x, steer=Steer("classifier.2", torch.ones(10), gain=4))
    monkeypatch.undo()
    assert torch.equal(model(x), plain) and torch.equal(model.backbone(x), model(x, steps=0))


def test_connections_may_come_from_a_zip():
    model = LRM(tiny(), zip(["classifier.2"], ["features.3"]), example=X)
    assert model.connections == [Connection("classifier.2", "features.3")]
    with pytest.raises(ValueError, match="at least one"):
        LRM(tiny(), iter(()), example=X)


def test_a_backbone_may_return_a_dictionary():
    class Named(Spare):
        def forward(self, x):
            return {"logits": super().forward(x)}

    model = LRM(Named(), [("head", "used")], example=X)
    assert model(X)["logits"].shape == (1, 2)


def test_building_under_autocast_keeps_the_backbones_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        model = LRM(tiny(), CONNECTIONS, example=X)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_source_written_into_in_training_only_is_named():
    class Drops(Spare):
        def forward(self, x):
            return self.head(F.dropout(self.used(x), 0.5, self.training, inplace=True).mean((2, 3)))

    for pair in (("head", "used"), ("used",
                                    "head")):  # kept as the first destination, stored as a source
        model = LRM(Drops(), [pair], example=X)
        model.eval()(X + 1)
        with pytest.raises(RuntimeError, match="wrote into the output of 'used'"):
            model.train()(X + 1)


def test_an_early_layer_may_return_several_tensors_that_are_written_into():
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            h = self.conv(x)
            return h, torch.tanh(h)

    class Forks(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.used, self.head = Stem(), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

        def forward(self, x):
            a, b = self.stem(x)
            return self.head(self.used(a + b.relu_()).mean((2, 3)))

    torch.manual_seed(0)
    x, net = torch.randn(2, 3, 8, 8), Forks()
    plain = copy.deepcopy(net)(x)
    model = LRM(net, [("head", "used")], example=x, steps=2)
    with torch.no_grad():
        model.modulations["used"].drives["head"].conv.weight.zero_()
    assert all(torch.equal(y, plain) for y in model.trajectory(x).outputs)


def test_data_parallel_is_refused_by_name():
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        LRM(tiny(), CONNECTIONS, example=X)._replicate_for_data_parallel()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_the_backbone_is_named_and_around_the_model_works(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Saves(Spare):
        def forward(self, x):
            return self.head(checkpoint(self.used, x, use_reentrant=reentrant).mean((2, 3)))

    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    model = LRM(Saves(), [("head", "used")], example=x.detach())
    with pytest.raises(RuntimeError, match="'used' is run again in the backward pass"):
        model(x).sum().backward()
    model.backbone(x).sum().backward()  # the network on its own may
    model = LRM(Spare(), [("head", "used")], example=x.detach())
    straight = torch.autograd.grad(model(x).square().sum(), x)[0]
    assert_close(
        torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)[0],
        straight)


def test_what_is_no_state_dict_is_named(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="Tensor"):
        read_weights(tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="str"):
        load_published(published(), "weights.pth")
    meta = published()
    with pytest.raises(ValueError, match="meta"):
        load_published(copy.deepcopy(meta).to("meta"), release(meta))


@every
def test_channels_are_steered_where_the_network_has_them(motif):
    """Sequences as long as they have channels, tokens, and maps with the channels last."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x):
            h = torch.tanh(self.b(torch.tanh(self.a(x))))
            return self.head(h.flatten(1, -2).mean(1))

    vector = torch.randn(8)
    for make, pair, x, dims in (
        (Speech, ("conv2", "conv1"), torch.randn(2, 4, 8), None),  # 8 channels, 8 positions
        (Last, ("b", "a"), torch.randn(2, 8, 3), None),  # 8 tokens of 8 numbers
        (Last, ("b", "a"), torch.randn(2, 8, 4, 3), {"a": 3, "b": 3}),
    ):
        model = LRM(make(), [pair], example=x, motif=motif, channel_dims=dims).eval()
        stored = model.trajectory(x, steps=0, states=True, steer=Steer(pair[0],
                                                                       vector)).states[0][pair[0]]
        assert_close(stored.movedim(model.sources[pair[0]].dim, -1),
                     vector.expand(*stored.movedim(model.sources[pair[0]].dim, -1).shape))
    with pytest.raises(ValueError, match="steering 'b'"):  # 4 is the number of rows
        model(x, steer=Steer("b", torch.randn(4)))
