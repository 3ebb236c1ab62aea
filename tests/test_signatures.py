"""Signatures: responses pass by pass against a plain re-computation, the localizer's t-tests
against scipy, planted and null data, Brain-Score's contract."""

import re
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from feedback_nb.cbl import CBL
from feedback_nb.data import PhotoFolder, TensorData, load
from feedback_nb.lrm import LRM
from feedback_nb.signatures import Moments, brainscore, localize, moments, named_responses
from feedback_nb.signatures import responses, signature
from feedback_nb.steering import Steer

LAYERS = ["conv1", "relu1", "block", "conv2", "relu2", "head"]


def small(seed=0, connections=(("head", "conv2"), ("relu2", "conv2")), **options):
    """Two convolutions; the first destination is the second one, so that what stands before it does
    not run again."""
    torch.manual_seed(seed)
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(3, 6, 3, padding=1))
    net.add_module("relu1", nn.ReLU(inplace=True))
    net.add_module("block", nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(6, 6, 1)))
    net.add_module("conv2", nn.Conv2d(6, 8, 3, padding=1))
    net.add_module("relu2", nn.ReLU(inplace=True))
    net.add_module("gap", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(8, 5))
    return LRM(net, list(connections), example=torch.zeros(1, 3, 12, 12), **options).eval()


@pytest.fixture
def x():
    return torch.randn(7, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Values(nn.Module):
    """A network whose one layer holds the input as it is: units can be planted."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x):
        return self.layer(x)


def planted(n=40, units=200, classes=4, seed=0, shift=0.0, which=()):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(n)
    values = torch.randn(len(y), units, generator=g)
    values[:, list(which)] += shift * (y == 0)[:, None]
    return TensorDataset(values, y)


# what layers hold ---------------------------------------------------------------------------------
# ------------------------------


def unrolled(model, x, T, vector=None, gain=1.0):
    """The network of `small` pass by pass, written out; destinations are modulated before they go
    on."""
    net, drives, rows, before = model.backbone, model.modulations["conv2"].drives, [], {}
    for _ in range(T + 1):
        held = {"conv1": net.conv1(x)}
        held["relu1"] = held["conv1"].clamp_min(0)
        held["block"] = net.block(held["relu1"])
        o, total = net.conv2(held["block"]), 0
        for source, a in before.items():
            d, a = drives[source], a[:, :, None, None] if a.dim() == 2 else a
            a = torch.tanh((a - d.u) / d.log_sigma.exp())
            factor = gain if source == "head" and vector is not None else 1.0
            a = a.clamp_min(0) * d.pos * factor + a.clamp_max(0) * d.neg * factor
            total = total + F.interpolate(F.conv2d(a, d.conv.weight), size=o.shape[2:],
                                          mode="bilinear", align_corners=False)
        held["conv2"] = o + o * total
        held["relu2"] = held["conv2"].clamp_min(0)
        held["head"] = net.head(held["relu2"].mean((2, 3)))
        rows.append(held)
        before = {
            "head": held["head"] if vector is None else vector.expand(len(x), -1),
            "relu2": held["relu2"]
        }
    return {name: torch.stack([held[name] for held in rows]) for name in rows[0]}


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("T", [0, 1, 3])
def test_responses_equal_a_plain_recomputation_in_every_pass(x, T, steered):
    model, vector = small(), torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    with torch.no_grad():
        for p in model.modulations.parameters():
            p.add_(0.3 * torch.randn_like(p))
        expected = unrolled(model, x, T, vector if steered else None, 2.0)
    held = responses(model, x, LAYERS, steps=T,
                     steer=Steer("head", vector, gain=2.0) if steered else None)
    assert list(held) == LAYERS and all(a.shape[0] == T + 1 for a in held.values())
    for name in LAYERS:
        assert_close(held[name], expected[name], rtol=1e-4, atol=1e-5,
                     msg=lambda m, name=name: f"{name}: {m}")
    if T:  # the modulated layer did change, so the comparison says something about after and before
        assert (held["conv2"][1] - held["conv2"][0]).abs().max() > 0.01


def test_layers_before_the_first_destination_are_the_same_in_every_pass_to_the_last_bit(x):
    held = responses(small(), x, ["conv1", "relu1", "block", "block.1"], steps=3,
                     steer=Steer("head", torch.ones(5), gain=4))
    for name, a in held.items():
        assert all(torch.equal(a[t], a[0]) for t in range(4)), name


def test_every_layer_runs_once_in_the_plain_pass_and_early_ones_never_again(x):
    model, calls = small(), {name: 0 for name in ("conv1", "conv2")}
    # the class's forward does the work; hooks also fire for a layer that is answered from memory
    for name in calls:
        layer = model.backbone.get_submodule(name)
        layer._conv_forward = lambda *a, name=name, f=layer._conv_forward: (calls.__setitem__(
            name, calls[name] + 1), f(*a))[1]
    responses(model, x, LAYERS, steps=3)
    assert calls == {
        "conv1": 1, "conv2": 1
    }  # conv2 is the first destination: its own output is computed once and modulated anew


def test_a_layer_holds_what_it_returned_though_a_later_one_writes_into_it(x):
    model = small()
    held = responses(model, x, ["conv1", "relu1"], steps=0)
    assert held["conv1"].min() < 0 <= held["relu1"].min()
    assert_close(held["conv1"][0],
                 F.conv2d(x, model.backbone.conv1.weight, model.backbone.conv1.bias, padding=1))


def test_a_refined_layer_of_a_cbl_holds_its_state(x):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = CBL(net, ["1", "3"], example=x, steps=2).eval()
    with torch.no_grad():
        states = model.trajectory(x, states=True).states
    held = responses(model, x, ["0", "1", "3"])
    for key, layer in zip(states[0], ("1", "3")):
        assert_close(held[layer], torch.stack([h[key] for h in states]))
    assert (held["1"][2] - held["1"][0]).abs().max() > 1e-4 and torch.equal(
        held["0"][0], held["0"][2])


def test_a_plain_module_has_one_pass_and_keeps_its_mode(x):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    held = responses(net, x, "2")
    assert_close(held["2"], net.eval()(x)[None])
    assert responses(net.train(), x, "2")["2"].shape[0] == 1 and net.training and int(
        net[1].num_batches_tracked) == 0
    assert not held["2"].requires_grad and not net[2]._forward_hooks


@pytest.mark.parametrize(
    "call, words", [(lambda m, x: responses(m, x, "relu9"), "'relu9'.*'relu"),
                    (lambda m, x: responses(m, x, ["relu1", "relu1"]), "twice"),
                    (lambda m, x: responses(m, x, "relu1", steps=-1), "steps.*-1"),
                    (lambda m, x: responses(m.backbone, x, "relu1", steps=2), "Sequential.*LRM"),
                    (lambda m, x: responses(CBL(small().backbone, ["relu2"], example=x), x, "relu2",
                                            steer=Steer("head", torch.ones(5))), "CBL.*steer"), ],
)
def test_errors_of_responses_name_the_thing(x, call, words):
    with pytest.raises(ValueError, match=words):
        call(small(), x)


def test_a_layer_that_does_not_run_or_returns_no_tensor_is_an_error(x):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.pair = nn.ReLU(), nn.LSTM(3, 2, batch_first=True)

        def forward(self, x):
            return self.pair(x)[0]

    with pytest.raises(ValueError, match="'idle'"):
        responses(Odd(), torch.randn(2, 4, 3), "idle")
    with pytest.raises(ValueError, match="'pair'.*tuple"):
        responses(Odd(), torch.randn(2, 4, 3), "pair")


# the localizer ------------------------------------------------------------------------------------
# ------------------------------


def test_t_values_by_hand():
    # Welch: target 1, 3 (mean 2, variance 2), other 0, 0, 3 (mean 1, variance 3): t = 1 / sqrt(2/2
    # + 3/3) = 0.7071
    data = TensorDataset(torch.tensor([[1.0], [3.0], [0.0], [0.0], [3.0]]),
                         torch.tensor([0, 0, 1, 1, 1]))
    m = moments(Values(), data, "layer")
    assert m.count.tolist() == [2, 3] and m.mean["layer"].flatten().tolist() == [
        2, 1
    ] and m.var["layer"].flatten().tolist() == [2, 3]
    assert float(localize(m, 0).t["layer"]) == pytest.approx(2**-0.5)
    # Student: one variance, (1·2 + 2·3) / 3 = 8/3; t = 1 / sqrt(8/3 · (1/2 + 1/3)) = 0.6708
    assert float(localize(m, 0, equal_var=True).t["layer"]) == pytest.approx((8 / 3 * 5 / 6)**-0.5)
    # all images: 1 3 0 0 3, mean 1.4, mean square 3.8
    assert m.scale()["layer"] == pytest.approx((3.8 - 1.4**2) ** 0.5)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), batch_size=st.integers(1, 60), classes=st.integers(2, 4),
       equal_var=st.booleans(), method=st.sampled_from(["bh", "by"]))
def test_streamed_equals_scipy_on_the_raw_data(seed, batch_size, classes, equal_var, method):
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(classes).repeat(2), torch.randint(classes, (40,), generator=g)])
    values = 100 + torch.randn(len(y), 2, 3, generator=g) * torch.tensor([0.1, 1, 10]) + (
        y % 2 == 0)[:, None, None]  # a large mean: naive sums of squares would lose digits
    found = localize(moments(Values(), TensorDataset(values, y), "layer", batch_size=batch_size), 0,
                     equal_var=equal_var, method=method)
    raw = [
        scipy.stats.ttest_ind(values[y == 0].double(), values[y == k].double(), equal_var=equal_var,
                              alternative="greater") for k in range(1, classes)
    ]
    assert_close(found.t["layer"][:, 0], torch.tensor(np.stack([r.statistic for r in raw])),
                 rtol=1e-8, atol=1e-8)
    p = np.stack(
        [scipy.stats.false_discovery_control(r.pvalue, axis=None, method=method) for r in raw])
    assert_close(found.p["layer"].flatten(1), torch.tensor(p), rtol=1e-7, atol=1e-12)
    assert torch.equal(found.selective["layer"][0], torch.tensor((p <= 0.05).all(0)).view(2, 3))


def test_passes_layers_and_comparisons_are_corrected_each_on_its_own(x):
    model = small(seed=3)
    data = TensorDataset(torch.randn(60, 3, 12, 12, generator=torch.Generator().manual_seed(2)),
                         torch.arange(60) % 3)
    together = localize(moments(model, data, ["relu1", "relu2"], steps=2), 1)
    for layer in ("relu1", "relu2"):
        for T in range(3):
            alone = localize(moments(model, data, layer, steps=T), 1)
            assert_close(alone.p[layer][:, T], together.p[layer][:, T], rtol=1e-4, atol=1e-6)
    assert together.others == (0, 2) and together.units(1)["relu2"].shape == (8, 6, 6)


def test_planted_units_are_found_and_little_else():
    which = range(0, 200, 10)
    found = localize(moments(Values(), planted(shift=2.0, which=which), "layer"),
                     0).units()["layer"]
    assert set(which) <= set(found.nonzero().flatten().tolist()) and int(
        found.sum()) <= len(which) + 2
    lower = localize(moments(Values(), planted(shift=-2.0, which=which), "layer"),
                     0)  # a response that is lower is not selective
    assert not lower.units()["layer"].any() and (lower.t["layer"][:, 0, ::10] < -3).all()
    one_rival = planted(shift=2.0, which=which)
    one_rival.tensors[0][one_rival.tensors[1] ==
                         2] += 2.0  # as high for one other category: not selective
    assert not localize(moments(Values(), one_rival, "layer"), 0).units()["layer"].any()


def test_false_discoveries_stay_at_q_over_repeated_draws():
    q, shares, any_found = 0.2, [], []
    for seed in range(
            150):  # two categories, so that each unit has one test; 20 of 100 units are real
        found = localize(
            moments(Values(),
                    planted(n=12, units=100, classes=2, seed=seed, shift=1.5, which=range(20)),
                    "layer"), 0, q=q).units()["layer"]
        shares.append(float(found[20:].sum()) / max(1, int(found.sum())))
        null = localize(
            moments(Values(), planted(n=12, units=100, classes=2, seed=1000 + seed), "layer"), 0,
            q=q).units()["layer"]
        any_found.append(bool(null.any()))
    error = lambda v: 2.6 * np.std(v) / len(v) ** 0.5
    assert np.mean(shares) <= q + error(shares) and np.mean(any_found) <= q + error(any_found)
    assert np.mean(shares) > 0.02  # the level is used, not undershot by construction


def test_order_of_categories_and_images_plays_no_part():
    data, g = planted(shift=1.0, which=range(30)), torch.Generator().manual_seed(5)
    values, y = data.tensors
    order, rename = torch.randperm(len(y), generator=g), torch.tensor([2, 0, 3, 1])
    found = localize(moments(Values(), data, "layer"), 0)
    mixed = localize(moments(Values(), TensorDataset(values[order], rename[y[order]]), "layer"), 2)
    assert torch.equal(found.selective["layer"], mixed.selective["layer"])
    back = [mixed.others.index(int(rename[k])) for k in found.others]
    assert_close(found.t["layer"], mixed.t["layer"][back])


def test_dead_units_are_never_selective():
    values, y = planted(units=6).tensors
    values[:, 0], values[:, 1] = 0.0, 0.1  # constant; 0.1 is not exact in binary
    values[:, 2] = 1 + 3e-8 * torch.randn(len(y), generator=torch.Generator().manual_seed(
        0)).sign() + 6e-8 * (y == 0)  # rounding that goes with the category
    values[:, 3] = (y == 0).float(
    )  # the same within each category, and different between them: that is selective
    found = localize(moments(Values(), TensorDataset(values, y), "layer", batch_size=7), 0)
    assert found.units()["layer"].tolist()[:4] == [False, False, False, True]
    assert found.p["layer"].isfinite().all() and (found.p["layer"][:, 0, :3]
                                                  == 1).all() and (found.t["layer"][:, 0, :3]
                                                                   == 0).all()


def test_a_channel_can_be_a_unit(x):
    data = TensorDataset(torch.randn(20, 3, 12, 12), torch.arange(20) % 2)
    place, channel = (moments(small(), data, ["relu2", "head"], units=u)
                      for u in ("place", "channel"))
    assert place.mean["relu2"].shape == (2, 2, 8, 6, 6) and channel.mean["relu2"].shape == (
        2, 2, 8) and channel.mean["head"].shape == (2, 2, 5)
    assert_close(channel.mean["relu2"], place.mean["relu2"].mean((3, 4)), rtol=1e-6, atol=1e-7)


def test_loaders_names_and_random_state():
    values, y = planted(shift=2.0, which=range(5)).tensors
    before = torch.get_rng_state()
    named = moments(Values(), DataLoader(TensorDataset(values, y), batch_size=9), "layer",
                    classes=["a", "b", "c", "d"], prepare=lambda x: 2 * x)
    assert torch.equal(before, torch.get_rng_state())
    assert localize(named, "a").others == ("b", "c", "d")
    assert_close(named.mean["layer"],
                 2 * moments(Values(), TensorDataset(values, y), "layer").mean["layer"])
    images = TensorData((values[:, :, None, None].clamp(0, 2) * 100).byte(), y,
                        classes=["p", "q", "r", "s"])
    assert moments(nn.Sequential(nn.Flatten()), images, "0").classes == ("p", "q", "r", "s")


@pytest.mark.parametrize(
    "values, y, options, words",
    [
        (torch.randn(4, 2), [0, 0, 0, 0], {}, r"two.*\[0\]"),
        (torch.randn(4, 2), [0, 0, 0, 1], {}, "two.*1 has 1"),
        (torch.randn(4, 2), [0, 0, 1, 1], {"classes": ["a", "b", "c"]}, "'c' has 0"),
        (torch.randn(4, 2), [0, 0, 1, 2], {"classes": ["a", "b"]}, "category 2"),
        (torch.randn(4, 2), [0.0, 0.0, 1.0, 1.0], {}, "label.*0.0"),
        (torch.tensor([[1.0], [2], [3], [float("nan")]]), [0, 0, 1, 1], {}, "'layer'.*finite"),
        (torch.randn(4, 2), [0, 0, 1, 1], {"units": "pixel"}, "'pixel'.*units"),
    ],
)
def test_errors_of_moments_name_the_thing(values, y, options, words):
    with pytest.raises(ValueError, match=words):
        moments(Values(), TensorDataset(values, torch.tensor(y)), "layer", **options)


def test_errors_of_localize_name_the_thing():
    m = moments(Values(), planted(), "layer", classes=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="'face'.*a, b, c, d"):
        localize(m, "face")
    for q in (0, 1, -0.1, 2, float("nan")):
        with pytest.raises(ValueError, match="^q "):
            localize(m, "a", q=q)


# signatures ---------------------------------------------------------------------------------------
# ------------------------------


def test_a_signature_is_the_mean_of_the_responses(x):
    model, masks = small(), {
        "conv2": torch.rand(8, 6, 6) > 0.5, "head": torch.tensor([True, False, True, False, False])
    }
    vectors = torch.randn(7, 5)
    groups = {
        "some": masks, "rest": {name: ~mask
                                for name, mask in masks.items()},
        "none": {name: torch.zeros_like(mask)
                 for name, mask in masks.items()}
    }
    thoughts = {
        "nothing": None, "fixed": Steer("head", torch.ones(5), gain=3),
        "own": lambda rows: Steer("head", vectors[rows])
    }
    found = signature(model, x, groups, thoughts, steps=2, batch_size=3)
    for i, steer in enumerate((None, thoughts["fixed"], Steer("head", vectors))):
        held = responses(model, x, list(masks), steps=2, steer=steer)
        for layer, mask in masks.items():
            for g, chosen in enumerate((mask, ~mask)):
                assert_close(found[layer][i, g], held[layer][..., chosen].mean(-1), rtol=1e-5,
                             atol=1e-6)
    assert found["conv2"].shape == (3, 3, 3, 7) and found["conv2"][:, 2].isnan().all()
    by_channel = signature(model, x, {"a": {"conv2": torch.arange(8) < 4}}, {"nothing": None},
                           units="channel")
    assert_close(by_channel["conv2"][0, 0],
                 responses(model, x, "conv2")["conv2"][:, :, :4].mean((2, 3, 4)), rtol=1e-5,
                 atol=1e-6)


def test_errors_of_signature_name_the_thing(x):
    with pytest.raises(ValueError, match=r"'conv2'.*\(8, 6, 6\).*\(8,\)"):
        signature(small(), x, {"a": {"conv2": torch.ones(8, dtype=torch.bool)}}, {"nothing": None})
    with pytest.raises(ValueError, match=r"'conv2'.*\(\)"):
        signature(small(), x,
                  {"a": {"conv2": torch.ones(8, 6, 6) > 0}, "b": {"head": torch.ones(5) > 0}},
                  {"nothing": None})


def test_from_samples_to_a_signature():
    data, unseen = load("fashion-mnist-sample").subset(300), load("fashion-mnist-sample",
                                                                  "test").subset(50)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                        nn.Linear(128, 10))
    model = LRM(net, [("4", "0")], example=torch.zeros(1, 1, 28, 28))
    m = moments(model, data, ["1", "4"])
    trouser = localize(m, "Trouser")
    assert isinstance(m, Moments) and trouser.share(
    )["1"][0] > 0.01  # pictures of trousers differ from others in their very pixels
    shuffled = moments(
        model,
        replace(data, y=data.y[torch.randperm(300, generator=torch.Generator().manual_seed(0))]),
        ["1", "4"])
    assert sum(max(localize(shuffled, c).share()["1"]) for c in shuffled.classes) < 0.01
    x = unseen.x.float() / 255
    values = signature(model, x, {"own": trouser.units()},
                       {"nothing": None, "trouser": Steer("4",
                                                          torch.eye(10)[1])})["1"]
    here = unseen.y == unseen.classes.index("Trouser")
    assert values[0, 0, 0,
                  here].mean() > 1.5 * values[0, 0, 0,
                                              ~here].mean()  # the units were chosen on other images
    assert torch.equal(values[0, 0, 0], values[1, 0, 0])  # the plain pass is not steered


def test_a_localizer_from_a_folder_of_photos(tmp_path):
    from PIL import Image

    g = np.random.default_rng(0)
    for name, level in (("faces", 200), ("scenes", 60), ("objects", 60)):
        (tmp_path / "localizer" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(g.normal(level, 20, (30, 40, 3)).clip(0, 255).astype(np.uint8)).save(
                tmp_path / "localizer" / name / f"{i}.jpg")
    photos = PhotoFolder(tmp_path / "localizer", size=12)
    m = moments(small(), photos, ["conv1", "head"])
    assert m.classes == ("faces", "objects", "scenes") and m.count.tolist() == [6, 6, 6]
    assert localize(m, "faces").share()["conv1"][0] > 0.05 > localize(m,
                                                                      "scenes").share()["conv1"][0]


# Brain-Score --------------------------------------------------------------------------------------
# ------------------------------


def test_names_of_layers_in_single_passes(x):
    model = small()
    held, outputs = responses(model, x, ["relu1", "relu2"],
                              steps=2), model.trajectory(x, steps=2).outputs
    found = named_responses(model, x, ["relu2@1", "relu1", "logits", "relu2@0", "logits@0"],
                            steps=2)
    assert list(found) == ["relu2@1", "relu1", "logits", "relu2@0", "logits@0"]
    expected = [held["relu2"][1], held["relu1"][2], outputs[2], held["relu2"][0], outputs[0]]
    for got, want in zip(found.values(), expected):
        assert_close(torch.as_tensor(got), want.detach())
    for wrong, words in (("relu2@3", "relu2@3.*at most 2"), ("relu2@x", "relu2@x.*'x'"),
                         ("relu2@", "relu2@.*''"), ("relu7@0", "'relu7'")):
        with pytest.raises(ValueError, match=words):
            named_responses(model, x, [wrong], steps=2)


def test_responses_in_bfloat16_are_arrays_too(x):
    model, x = small().bfloat16(), x.bfloat16()
    found = named_responses(model, x, ["relu2@1"], steps=1)["relu2@1"]
    held = responses(model, x, "relu2", steps=1)["relu2"][1]
    assert held.dtype == torch.bfloat16 and torch.equal(torch.as_tensor(found), held.float())


def stand_in(monkeypatch):
    """As little of Brain-Score's PytorchWrapper as the adapter rests on: what it is built with, and
    what it calls."""

    class PytorchWrapper:
        def __init__(self, model, preprocessing, identifier=None, forward_kwargs=None, *args,
                     **kwargs):
            self._model, self.preprocessing = model, preprocessing
            self.identifier, self.options = identifier, kwargs

        def __call__(self, paths, layers):
            return self.get_activations(list(self.preprocessing(paths)), layers)

    names = [
        "brainscore_vision", "brainscore_vision.model_helpers",
        "brainscore_vision.model_helpers.activations",
        "brainscore_vision.model_helpers.activations.pytorch"
    ]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].PytorchWrapper = PytorchWrapper


def test_the_brainscore_adapter_gives_layers_per_pass(x, monkeypatch):
    stand_in(monkeypatch)
    model, steer = small(), Steer("head", torch.ones(5), gain=2)
    wrapped = brainscore(model, lambda paths: x[:len(paths)].double().numpy(), "small-lrm", steps=2,
                         steer=steer, batch_size=4)
    assert wrapped.identifier == "small-lrm" and wrapped.options == {"batch_size": 4}
    found = wrapped(["a.png", "b.png", "c.png"], ["relu2@0", "relu2@2"])
    held = responses(model, x[:3], "relu2", steps=2, steer=steer)["relu2"]
    assert_close(torch.as_tensor(found["relu2@0"]), held[0])
    assert_close(torch.as_tensor(found["relu2@2"]), held[2])
    assert list(found) == ["relu2@0", "relu2@2"] and all(
        type(v) is np.ndarray for v in found.values())


def test_without_brainscore_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "brainscore_vision", None)
    with pytest.raises(ImportError, match=re.escape('pip install "feedback_nb[brainscore]"')):
        brainscore(small(), lambda paths: paths, "small-lrm")
