"""Steering: what one call does and leaves, the released code's numbers, the vectors, composites,
scores, and priors from text."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from feedback_nb.evaluation import biased_answer, class_moments, from_digits, margins, to_digits
from feedback_nb.lrm import LRM, load_published
from feedback_nb.steering import (
    Prototypes,
    Steer,
    TextPrior,
    a_prime,
    composite_scores,
    composite_test,
    contrast,
    cosine_schedule,
    instance,
    one_hot,
    overlay,
    prototype,
    search,
    side_by_side,
    text_embeddings,
    triplets,
)

GOLDENS = Path(__file__).parent / "goldens"


def small(motif="paper", connections=(("head", "conv1"), ("conv2", "conv1")), seed=0, **options):
    torch.manual_seed(seed)
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(3, 6, 3, padding=1))
    net.add_module("relu1", nn.ReLU(inplace=True))
    net.add_module("pool", nn.MaxPool2d(2))
    net.add_module("conv2", nn.Conv2d(6, 8, 3, padding=1))
    net.add_module("relu2", nn.ReLU(inplace=True))
    net.add_module("gap", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(8, 5))
    return LRM(net, list(connections), example=torch.zeros(1, 3, 12, 12), motif=motif,
               **options).eval()


@pytest.fixture
def x():
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["s1", "s3", "s3_full", "spair", "s3_vec", "s3_half"])
@pytest.mark.parametrize("first", [False, True])
def test_steers_as_the_released_code_does(name, first):
    golden, about = load_file(GOLDENS / "lrm_tiny.safetensors"), json.loads(
        (GOLDENS / "lrm_tiny.json").read_text())
    sizes, net = [3, 8, 12, 16], nn.Sequential()
    conv = lambda i: nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1)
    net.add_module(
        "features",
        nn.Sequential(conv(0), nn.ReLU(), nn.MaxPool2d(2), conv(1), nn.ReLU(), conv(2), nn.ReLU()))
    net.add_module("pool", nn.AdaptiveAvgPool2d(4))
    net.add_module("flatten", nn.Flatten(1))
    net.add_module("classifier", nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10)))
    pairs = [(c["source"], c["destination"]) for c in about["connections"]]
    model = LRM(net, pairs, example=torch.zeros(1, 3, 32, 32), motif="published").eval()
    load_published(
        model, {k.removeprefix("state."): v
                for k, v in golden.items() if k.startswith("state.")})
    how = about["steering"][name]
    vector = golden[how["activation"].split()[0]]
    strength = tuple(how["strength"]) if isinstance(how["strength"], list) else how["strength"]
    key = f"steer{'first' if first else ''}.{name}.pass"
    passes = sorted(k for k in golden if k.startswith(key))
    steer = Steer(how["source"], vector, gain=strength, blend=how["alpha"], from_first_pass=first)
    with torch.no_grad():
        outputs = model.trajectory(golden["in.x"], steps=len(passes) - 1, steer=steer).outputs
    assert len(passes) >= 2
    for key, output in zip(passes, outputs):
        assert_close(output, golden[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("motif", ["paper", "published"])
@pytest.mark.parametrize("first", [False, True])
def test_no_gain_and_no_blend_is_no_steering(motif, first, x):
    model = small(motif, steps=2)
    with torch.no_grad():
        plain = model.trajectory(x)
        same = model.trajectory(
            x, steer=Steer("head", torch.randn(5), gain=(1, 1), blend=0, from_first_pass=first))
    assert all(torch.equal(a, b) for a, b in zip(plain.outputs, same.outputs))


@settings(max_examples=10, deadline=None)
@given(gain=st.floats(0, 5), blend=st.floats(0, 1), motif=st.sampled_from(["paper", "published"]),
       seed=st.integers(0, 99))
def test_a_steered_call_changes_nothing_for_the_next_one(gain, blend, motif, seed):
    x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    model, vector = small(motif), torch.randn(5, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        state, plain = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
        steered = model(x, steer=Steer("head", vector, gain=gain, blend=blend))
        assert torch.equal(model(x), plain)
        assert torch.equal(model(x, steer=Steer("head", vector, gain=gain, blend=blend)), steered)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_steering_is_what_the_formula_says(x):
    model = small(connections=[("head", "conv1")])
    vector = torch.randn(5)
    with torch.no_grad():
        first = model(x, steps=0)
        drive = model.modulations["conv1"].drives["head"]
        drive.neg.fill_(0.7), drive.pos.fill_(1.3)
        mixed = 0.25 * vector + 0.75 * first
        a = torch.tanh((mixed - drive.u.flatten()) / drive.log_sigma.exp().flatten())
        a = torch.where(a > 0, 1.3 * 2.0 * a, 0.7 * 0.5 * a)
        o = model.backbone.conv1(x)
        h = o + o * F.linear(a, drive.conv.weight.flatten(1))[:, :, None, None]
        for name in ("pool", "conv2"):
            h = getattr(model.backbone, name)(F.relu(h))
        expected = model.backbone.head(F.relu(h).mean((2, 3)))
        assert_close(model(x, steer=Steer("head", vector, gain=(0.5, 2.0), blend=0.25)), expected)


@pytest.mark.parametrize("motif", ["paper", "published"])
def test_every_example_has_its_own_vector(motif, x):
    model, vectors = small(motif), torch.randn(4, 5)
    with torch.no_grad():
        together = model(x, steer=Steer("head", vectors, gain=2))
        alone = torch.cat(
            [model(x[i:i + 1], steer=Steer("head", vectors[i], gain=2)) for i in range(4)])
        swapped = model(x, steer=Steer("head", vectors.flip(0), gain=2))
    assert_close(together, alone)
    assert not torch.allclose(together, swapped)


@pytest.mark.parametrize("motif", ["paper", "published"])
def test_map_sources_and_local_vectors(motif, x):
    model = small(motif)
    with torch.no_grad():
        everywhere = model(x, steer=Steer("conv2", torch.ones(8)))
        as_map = model(x, steer=Steer("conv2", torch.ones(1, 8, 6, 6)))
        assert_close(everywhere, as_map)
        half = torch.zeros(1, 5, 12, 12)
        half[..., :6] = 3.0
        local = model.trajectory(x, steer=Steer("head", half))
        assert local.output.shape == (4, 5) and not torch.allclose(local.output, model(x))
        uniform = model(x, steer=Steer("head", torch.full((1, 5, 12, 12), 3.0)))
        # the published motif normalises a map over its positions, so a map of one vector is no
        # vector to it
        if motif == "paper":
            assert_close(uniform, model(x, steer=Steer("head", torch.full((5,), 3.0))))


def test_gradients_reach_a_steering_vector(x):
    model, vector = small(), torch.zeros(5, requires_grad=True)
    model(x, steer=Steer("head", vector, gain=2)).sum().backward()
    assert vector.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "vector, options, words",
    [
        (torch.tensor([0, 1, 0, 0, 0]), {}, "vector.*int64"),
        ([0.0] * 5, {}, "vector.*0.0"),
        (torch.zeros(1, 5, 2), {}, "vector"),
        (torch.tensor([0.0, float("nan"), 0, 0, 0]), {}, "vector"),
        (torch.zeros(5), {"gain": -0.1}, "gain"),
        (torch.zeros(5), {"gain": float("nan")}, "gain"),
        (torch.zeros(5), {"gain": (1, float("inf"))}, "gain"),
        (torch.zeros(5), {"gain": (1, 1, 1)}, "gain"),
        (torch.zeros(5), {"blend": 1.5}, "blend"),
        (torch.zeros(5), {"blend": float("nan")}, "blend"),
    ],
)
def test_bad_descriptions_are_refused(vector, options, words):
    with pytest.raises(ValueError, match=words):
        Steer("head", vector, **options)


@pytest.mark.parametrize("first", [False, True])
def test_what_does_not_fit_the_model_is_refused(first, x):
    model = small()
    for steer, words in [
        (Steer("head", torch.zeros(7), from_first_pass=first), "head"),
        (Steer("nowhere", torch.zeros(5), from_first_pass=first), "nowhere.*head"),
        (Steer("head", torch.zeros(3, 5)), "head.*3, 5.*4, 5"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(x, steer=steer)


def test_one_hot_and_contrast():
    assert one_hot([2, 0], 3, scale=2.0).tolist() == [[0, 0, 2], [2, 0, 0]]
    assert one_hot(1, 3).dtype == torch.float32
    for bad in (3, -1, 1.0):
        with pytest.raises(ValueError, match="class_number.*2"):
            one_hot(bad, 3)
    assert contrast(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0])).tolist() == [1, 0]
    with pytest.raises(ValueError, match="shape"):
        contrast(torch.zeros(2), torch.zeros(3))


def test_instance_is_the_source_of_that_picture_and_keeps_the_modes(x):
    model = small().train()
    model.backbone.eval()
    with torch.no_grad():
        assert_close(instance(model, x, steps=0), model(x, steps=0))
        assert_close(instance(model, x), model(x))
    assert instance(model, x, "conv2").shape == (4, 8, 6, 6)
    assert model.training and not model.backbone.training
    with pytest.raises(ValueError, match="relu1.*conv2"):
        instance(model, x, "relu1")


@settings(max_examples=8, deadline=None)
@given(batch=st.integers(1, 40), seed=st.integers(0, 99), offset=st.sampled_from([0.0, 1e4]))
def test_prototypes_do_not_depend_on_the_batches(batch, seed, offset):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(40, 3, 12, 12, generator=g), torch.arange(40) % 4
    model = small()
    with torch.no_grad():
        model.backbone.head.bias += offset  # a large mean must not drown the spread
    said = instance(model, x).double()
    data = TensorDataset(x, y)
    for source in (data, DataLoader(data, batch)):
        found = prototype(model, source, batch_size=batch)
        assert isinstance(found, Prototypes) and found.count.tolist() == [10] * 4
        for c in range(4):
            own = said[y == c]
            assert_close(found.mean[c].double(), own.mean(0), rtol=1e-5, atol=1e-5)
            assert_close(found.stderr[c].double(),
                         own.std(0) / 10**0.5, rtol=1e-2, atol=2e-3 if offset else 1e-6)


def test_prototypes_leave_the_random_state_alone(x):
    model, state = small(), torch.get_rng_state()
    prototype(model, TensorDataset(x, torch.arange(4)))
    assert torch.equal(torch.get_rng_state(), state)


def test_prototypes_name_what_is_missing(x):
    model = small()
    data = TensorDataset(x, torch.tensor([0, 0, 2, 2]))
    with pytest.raises(ValueError, match="class 1"):
        prototype(model, data)
    with pytest.raises(ValueError, match="label.*at most 1"):
        prototype(model, data, n_classes=2)
    with pytest.raises(ValueError, match="example"):
        prototype(model, TensorDataset(x[:0], torch.zeros(0, dtype=torch.long)))
    one = prototype(model, TensorDataset(x, torch.arange(4)), "conv2")
    assert one.mean.shape == (4, 8, 6, 6) and one.stderr.isnan().all()


def test_composites():
    a, b = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    assert overlay(a, b).unique().item() == 0.5 and overlay(a, b, 0.25).unique().item() == 0.75
    wide = side_by_side(a, b)
    assert wide.shape == (2, 3, 8, 16) and wide[..., :8].max() == 0 and wide[..., 8:].min() == 1
    squeezed = side_by_side(a, b, fit="squeeze")
    assert squeezed.shape == a.shape and squeezed[..., :3].max() == 0 and squeezed[...,
                                                                                   5:].min() == 1
    assert side_by_side(a[0], b[0], fit="squeeze").shape == (3, 8, 8)
    for bad in (lambda: overlay(a, b[:1]), lambda: overlay(a.byte(), b.byte()),
                lambda: overlay(a, b, 2.0), lambda: side_by_side(a, b, fit="tall"),
                lambda: side_by_side(a, b[..., :4])):
        with pytest.raises(ValueError):
            bad()


@settings(max_examples=15, deadline=None)
@given(classes=st.integers(3, 6), members=st.integers(1, 7), per_pair=st.integers(1, 9),
       seed=st.integers(0, 9))
def test_triplets_are_balanced(classes, members, per_pair, seed):
    y = torch.arange(classes).repeat(members)
    three = triplets(y, per_pair, seed=seed)
    kinds = y[three]
    assert len(three) == per_pair * classes * (classes - 1) // 2
    assert all(len(set(row)) == 3 for row in kinds.tolist())
    pairs = kinds[:, :2].sort(1).values
    assert torch.unique(pairs, dim=0, return_counts=True)[1].unique().tolist() == [per_pair]
    assert torch.equal(three, triplets(y, per_pair, seed=seed))
    for pair in pairs.unique(dim=0):
        used = three[(pairs == pair).all(1)][:, :2].flatten().bincount(minlength=len(y))
        for c in pair:
            counts = used[y == c]
            assert counts.max() - counts.min() <= 1  # nobody twice before all had their turn


def test_triplets_need_three_classes():
    with pytest.raises(ValueError, match="number_of_classes"):
        triplets(torch.tensor([0, 1, 0]), 1)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_prime_is_bounded_and_antisymmetric(h, f):
    score = a_prime(h, f)
    assert 0 <= score <= 1
    assert score == pytest.approx(1 - a_prime(f, h), abs=1e-12)
    assert (score > 0.5) == (h > f) or abs(h - f) < 1e-9


def test_a_prime_by_hand():
    assert a_prime(1.0, 0.0) == 1 and a_prime(0.0, 0.0) == 0.5 and a_prime(1.0, 1.0) == 0.5
    assert a_prime(0.8, 0.4) == pytest.approx(0.5 + 0.4 * 1.4 / (4 * 0.8 * 0.6))
    assert_close(a_prime(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5])),
                 torch.tensor([1.0, 0.5], dtype=torch.float64))
    for bad in ((1.1, 0), (0, -0.1), (float("nan"), 0)):
        with pytest.raises(ValueError, match="rate"):
            a_prime(*bad)


def test_search_counts_what_single_calls_answer():
    model = small(steps=2)
    x, y = torch.randn(12, 3, 12, 12,
                       generator=torch.Generator().manual_seed(3)), torch.arange(12) % 4
    three, vectors = triplets(y,
                              2), 3 * torch.randn(4, 5, generator=torch.Generator().manual_seed(4))
    found = search(model, x, y, three, vectors, gain=2.0, batch_size=5)
    assert found.hits.shape == (12, 2, 3) and found.false_alarms.shape == (12, 3)
    for i, row in enumerate(three):
        shown = overlay(x[row[0]], x[row[1]])[None]
        with torch.no_grad():
            answers = [[
                int(o.argmax()) == int(y[k]) for o in model.trajectory(
                    shown, steer=Steer("head", vectors[y[k]], gain=2.0)).outputs
            ] for k in row]
        assert found.hits[i].tolist() == answers[:2] and found.false_alarms[i].tolist(
        ) == answers[2]
    rates = found.rates()
    assert rates["hits"] == pytest.approx(found.hits.double().mean((0, 1)).tolist())
    by_picture = search(model, x, y, three, vectors[y], by="picture", gain=2.0)
    assert torch.equal(by_picture.hits, found.hits)
    with pytest.raises(ValueError, match="number_of_vectors.*2"):
        search(model, x, y, three, vectors[:2])


def pairs(n=40, text_dim=6, out_dim=9, noise=0.0):
    g = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(n, text_dim, generator=g), dim=1)
    return text, 5 + 3 * text @ torch.randn(text_dim, out_dim, generator=g) + noise * torch.randn(
        n, out_dim, generator=g)


def test_the_ridge_prior_finds_a_linear_map():
    text, truth = pairs()
    prior = TextPrior(6, 9, "ridge")
    with pytest.raises(RuntimeError, match="fit"):
        prior(text)
    prior.fit(text[:30], truth[:30])
    assert_close(prior(text[30:]), truth[30:], rtol=1e-2, atol=1e-2)
    again = TextPrior(6, 9, "ridge")
    again.load_state_dict(prior.state_dict())
    assert torch.equal(again(text), prior(text))


def test_the_diffusion_prior_learns_and_is_reproducible():
    text, truth = pairs()
    state = torch.get_rng_state()
    make = lambda: (torch.manual_seed(0),
                    TextPrior(6, 9, depth=1, heads=2, head_dim=16, timesteps=20))[1]
    prior, twin = make(), make()
    torch.set_rng_state(state)
    losses = prior.fit(text[:32], truth[:32], steps=150, lr=3e-3)
    assert torch.equal(torch.get_rng_state(), state)
    twin.fit(text[:32], truth[:32], steps=150, lr=3e-3)
    said = prior(text[32:], samples=16)
    assert torch.equal(said, twin(text[32:], samples=16)) and torch.equal(
        torch.get_rng_state(), state)
    assert not torch.equal(said, prior(text[32:], samples=16, seed=1))
    mean = truth[:32].mean(0)
    assert sum(losses[-30:]) < 0.7 * sum(losses[:30])
    assert F.cosine_similarity(said - mean, truth[32:] - mean).mean() > 0.5
    error = lambda n: (prior(text[32:], samples=n) - prior(text[32:], samples=200, seed=9)).square(
    ).mean()
    assert error(64) < error(1)  # more samples, nearer to the conditional mean


def test_priors_refuse_what_does_not_fit():
    text, truth = pairs()
    prior = TextPrior(6, 9, "ridge")
    for bad, words in [((text[:, :5], truth), r"text.*, 6\)"),
                       ((text, truth[:, :8]), r"prototypes.*, 9\)"),
                       ((text[:3], truth[:4]), "prototypes"), ((text[:1], truth[:1]), "text"),
                       ((text * float("nan"), truth), "text"),
                       ((text.tolist(), truth), "text.*list")]:
        with pytest.raises(ValueError, match=words):
            prior.fit(*bad)
    with pytest.raises(ValueError, match="diffusion"):
        TextPrior(6, 9, "gan")
    done = TextPrior(6, 9, depth=1, heads=1, head_dim=8, timesteps=5)
    done.fit(text, truth, steps=1)
    with pytest.raises(ValueError, match="samples"):
        done(text, samples=0)


def test_text_embeddings_by_any_encoder_or_by_open_clip(monkeypatch):
    encode = lambda texts: torch.tensor([[float(len(t)), float(t.count("a"))] for t in texts])
    found = text_embeddings(["bag", "coat"], encode, template="a {}")
    assert_close(found, F.normalize(torch.tensor([[5.0, 2.0], [6.0, 2.0]]), dim=1))
    with pytest.raises(ValueError, match="embeddings"):
        text_embeddings(["bag"], lambda texts: torch.zeros(3, 2))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"feedback_nb\[text\]"):
        text_embeddings(["bag"])

    class Net(nn.Module):
        def encode_text(self, tokens):
            return tokens.float()

    seen = {}
    fake = types.ModuleType("open_clip")
    fake.create_model = lambda name, pretrained, device: (seen.update(name=name, pretrained=
                                                                      pretrained), Net())[1]
    fake.get_tokenizer = lambda name: lambda texts: torch.tensor([[len(t), 1] for t in texts])
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    found = text_embeddings(["bag"], "ViT-B-32", pretrained="openai")
    assert seen == {"name": "ViT-B-32", "pretrained": "openai"}
    assert_close(found, F.normalize(torch.tensor([[float(len("a photo of a bag")), 1.0]]), dim=1))


def test_a_blend_map_steers_inside_and_leaves_the_rest_alone(x):
    model, vector = small(), torch.randn(5)
    left = torch.zeros(1, 1, 12, 12)
    left[..., :6] = 1
    modulation, own = model.modulations["conv1"], {
        k: v
        for k, v in model.trajectory(x, steps=0, states=True).states[0].items()
    }
    o = torch.randn(4, 6, 12, 12)
    field = lambda steer: modulation.field(o,
                                           {**own, **({} if steer is None else steer.replace(own))})
    local, everywhere, nowhere = field(Steer("head", vector,
                                             blend=left)), field(Steer("head", vector)), field(None)
    assert_close(local[..., :6], everywhere.expand_as(local)[..., :6])
    assert_close(local[..., 6:], nowhere.expand_as(local)[..., 6:])
    assert not torch.allclose(everywhere, nowhere)
    masked = field(Steer(
        "head",
        vector[None, :, None, None] * left))  # 0 is a vector as any other: it is not "no steering"
    assert not torch.allclose(masked[..., 6:], nowhere.expand_as(masked)[..., 6:])
    assert_close(model(x, steer=Steer("head", vector, gain=2, blend=torch.ones(1, 1, 3, 4))),
                 model(x, steer=Steer("head", vector, gain=2)))
    assert_close(model(x, steer=Steer("head", vector, blend=torch.zeros(1, 1, 3, 4))), model(x))
    assert_close(model(x, steer=Steer("head", vector, blend=torch.full((1, 1, 2, 2), 0.3))),
                 model(x, steer=Steer("head", vector, blend=0.3)))
    assert_close(model(x, steer=Steer("conv2", torch.ones(8), blend=torch.full((1, 1, 2, 2), 0.3))),
                 model(x, steer=Steer("conv2", torch.ones(8), blend=0.3)))


def test_blend_maps_are_one_for_each_example(x):
    model, vectors, maps = small(), torch.randn(4, 5), torch.rand(4, 1, 4, 4)
    together = model(x, steer=Steer("head", vectors, blend=maps))
    for i in range(4):
        assert_close(together[i:i + 1],
                     model(x[i:i + 1], steer=Steer("head", vectors[i], blend=maps[i:i + 1])))
    assert "(4, 1, 4, 4)" in repr(Steer("head", vectors, blend=maps))


@pytest.mark.parametrize(
    ("blend", "options", "words"),
    [
        (torch.ones(4, 4), {}, r"blend.*\(4, 4\)"),
        (torch.ones(1, 3, 4, 4), {}, r"blend.*\(1, 3, 4, 4\)"),
        (torch.full((1, 1, 4, 4), 1.5), {}, "blend"),
        (torch.full((1, 1, 4, 4), torch.nan), {}, "blend"),
        (torch.ones(1, 1, 0, 4), {}, "blend"),
        (torch.ones(1, 1, 4, 4), {"from_first_pass": True}, "blend.*first pass"),
    ],
)
def test_bad_blend_maps_are_refused(blend, options, words):
    with pytest.raises(ValueError, match=words):
        Steer("head", torch.ones(5), blend=blend, **options)


def test_a_blend_map_for_another_batch_is_refused(x):
    with pytest.raises(ValueError, match="head.*3, 1, 2, 2"):
        small()(x, steer=Steer("head", torch.ones(5), blend=torch.ones(3, 1, 2, 2)))


def test_the_embedded_texts_have_a_finite_normalised_row_each():
    from safetensors import safe_open

    with safe_open(Path(__file__).parents[1] / "nbs" / "samples" / "texts.safetensors",
                   "pt") as file:
        rows, embedded = json.loads(file.metadata()["rows"]), file.get_tensor("embeddings")
    assert embedded.shape == (
        len(rows), 512) and embedded.dtype == torch.float16 and embedded.isfinite().all()
    assert_close(embedded.float().norm(dim=1), torch.ones(len(rows)), atol=1e-3, rtol=0)
    kinds = {(s, c): sorted(k for s2, c2, k, _ in rows if (s2, c2) == (s, c))
             for s in ("imagenette", "cifar10", "fashion-mnist", "mnist")
             for c in range(10)}
    assert all(
        k == ["bare", "description", "description", "photo", "picture", "synonym", "synonym"]
        for k in kinds.values()) and 7 * len(kinds) == len(rows)
    assert len({text for *_, text in rows}) == len(rows)  # no text stands for two classes
    photo = [i for i, row in enumerate(rows) if row[2] == "photo"]
    near = embedded.float() @ embedded[photo].float().T
    same = [
        rows[i][:2] == rows[photo[j]][:2] for i, j in enumerate(near.argmax(1).tolist())
        if rows[i][2] == "picture"
    ]
    assert sum(same) == 40  # the rows are of the texts that they are listed for


@pytest.mark.parametrize("motif", ["paper", "published"])
@pytest.mark.parametrize("first", [False, True])
def test_vectors_of_another_dtype_are_brought_to_the_models(motif, first, x):
    for model, images in ((small(motif), x), (small(motif).double(), x.double())):
        vector = torch.randn(5, dtype=torch.float64)
        said = [
            model(images, steer=Steer("head", vector.to(dtype), gain=2, from_first_pass=first))
            for dtype in (torch.float32, torch.float64)
        ]
        assert all(s.dtype == images.dtype for s in said)
        assert_close(*said, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_first_pass_takes_one_vector_or_one_for_each(n, batch, x):
    with pytest.raises(ValueError, match="head"):
        small()(x[:batch], steer=Steer("head", torch.randn(n, 5), from_first_pass=True))


def test_a_published_source_that_is_overheard_at_once_cannot_be_steered(x):
    pairs = [("relu1", "conv2"), ("head", "conv1")]
    with pytest.raises(ValueError, match="relu1"):
        small("published", pairs)(x, steer=Steer("relu1", torch.randn(6)))
    paper = small("paper", pairs)
    assert not torch.allclose(paper(x, steer=Steer("relu1", 5 * torch.randn(6))), paper(x))


@pytest.mark.parametrize("gain", [torch.tensor([1.0, 2.0]), "2", None])
def test_a_gain_that_is_no_number_is_refused(gain):
    with pytest.raises(ValueError, match="gain"):
        Steer("head", torch.zeros(5), gain=gain)


def test_a_prototype_may_be_of_any_pass(x):
    model, data = small(steps=2), TensorDataset(x, torch.arange(4))
    for steps in (0, 1, None):
        assert_close(prototype(model, data, steps=steps).mean, instance(model, x, steps=steps))
    assert not torch.allclose(instance(model, x, steps=0), instance(model, x))


def test_map_vectors_are_resized_smoothly(x):
    model, coarse = small(), torch.randn(1, 8, 2, 3)
    fine = F.interpolate(coarse, size=(6, 6), mode="bilinear")
    stored = model.trajectory(x, steps=0, states=True, steer=Steer("conv2",
                                                                   coarse)).states[0]["conv2"]
    assert_close(stored, fine.expand(4, -1, -1, -1))


def test_local_vectors_blend_too(x):
    model, vector = small(), torch.randn(1, 8, 6, 6)
    own = instance(model, x, "conv2", steps=0)
    stored = model.trajectory(x, steps=0, states=True, steer=Steer("conv2", vector,
                                                                   blend=0.3)).states[0]["conv2"]
    assert_close(stored, 0.3 * vector + 0.7 * own)


def test_squeezing_averages_instead_of_dropping_columns():
    stripes = torch.zeros(1, 1, 4, 16)
    stripes[..., ::2] = 1  # every second column
    squeezed = side_by_side(stripes, stripes, fit="squeeze")
    assert squeezed[..., 2:-2].sub(0.5).abs().max() < 0.15


def test_every_role_of_a_triplet_is_balanced():
    y = torch.arange(5).repeat_interleave(40)
    three = triplets(y, 60, seed=0)
    kinds = y[three]
    swapped = (kinds[:, 0] > kinds[:, 1]).float().mean()
    assert 0.4 < swapped < 0.6  # either class may be the first
    for pair in kinds[:, :2].sort(1).values.unique(dim=0):
        rows = (kinds[:, :2].sort(1).values == pair).all(1)
        absent = kinds[rows, 2].bincount(minlength=5)
        assert absent[[c for c in range(5) if c not in pair.tolist()
                       ]].unique().tolist() == [20]  # each of the others in turn
        assert len(
            three[rows, 2].unique()) == 60  # and no picture of them twice before all had their turn


def test_search_by_picture_in_eval_mode_with_every_modes_kept():
    model = small(steps=1)
    model.backbone.relu2 = nn.Dropout(0.5)
    model.train()
    model.backbone.pool.eval()
    x, y = torch.randn(12, 3, 12, 12,
                       generator=torch.Generator().manual_seed(3)), torch.arange(12) % 4
    three, vectors = triplets(y,
                              1), 6 * torch.randn(12, 5, generator=torch.Generator().manual_seed(4))
    found = search(model, x, y, three, vectors, by="picture", gain=3.0)
    assert model.training and model.backbone.relu2.training and not model.backbone.pool.training
    model.eval()
    shown = overlay(x[three[:, 0]], x[three[:, 1]])
    with torch.no_grad():
        right = [
            torch.stack([
                o.argmax(1) == y[three[:, k]] for o in model.trajectory(
                    shown, steer=Steer("head", vectors[three[:, k]], gain=3.0)).outputs
            ], 1) for k in range(3)
        ]
    assert torch.equal(found.hits, torch.stack(right[:2], 1)) and torch.equal(
        found.false_alarms, right[2])


def test_the_cosine_schedule_by_hand():
    kept, f = cosine_schedule(10), lambda t: math.cos((t / 10 + 0.008) / 1.008 * math.pi / 2) ** 2
    assert_close(kept[:-1], torch.tensor([f(t) / f(0) for t in range(1, 10)]), rtol=1e-5, atol=1e-6)
    assert 0 < kept[-1] <= 0.001 * kept[-2] * 1.001  # no single step takes more than 99.9 %


class Believes(nn.Module):
    """A denoiser whose belief is known in closed form: share(ᾱ_t) of what it sees, and a
    constant."""

    def __init__(self, kept, share, constant):
        super().__init__()
        self.kept, self.share, self.constant = kept, share, constant

    def forward(self, noisy, t, text, dropped=None):
        return self.share(self.kept[t])[:, None] * noisy + self.constant


def test_sampling_follows_the_reverse_process_in_closed_form():
    prior = TextPrior(2, 3, depth=1, heads=1, head_dim=8, timesteps=12)
    prior.fitted.fill_(True)
    prior.mean.copy_(torch.tensor([1.0, 2, 3]))
    prior.scale.fill_(2.0)
    prior.net = Believes(prior.kept, lambda kept: 0 * kept, 0.7)
    assert_close(prior(torch.zeros(4, 2), samples=5),
                 (0.7 * 2 + prior.mean).expand(4, -1))  # certain of x₀: that is what comes out
    prior.net = Believes(prior.kept, lambda kept: kept.sqrt(),
                         0.0)  # right for prototypes that are standard normal
    said = (prior(torch.zeros(20_000, 2), samples=1, seed=3) - prior.mean) / 2
    variance, kept = 1.0, [1.0, *prior.kept.double().tolist()]
    for t in range(
            12, 0, -1
    ):  # variance of x_{t-1} = (a √ᾱ_t + b)² x_t + noise, in the notation of Ho and others
        beta = 1 - kept[t] / kept[t - 1]
        a, b = kept[t - 1]**0.5 * beta / (1 - kept[t]), (1 - beta)**0.5 * (1 - kept[t - 1]) / (
            1 - kept[t])
        variance = (a * kept[t]**0.5 + b)**2 * variance + beta * (1 - kept[t - 1]) / (1 - kept[t])
    assert_close(said.var(0), torch.full((3,), variance), rtol=0.04, atol=0)
    assert_close(said.mean(0), torch.zeros(3), rtol=0, atol=0.04)


@pytest.mark.parametrize(("drop", "still"), [(1.0, "text.weight"), (0.0, "nothing")])
def test_the_text_is_withheld_as_often_as_said(drop, still):
    text, truth = pairs()
    prior = TextPrior(6, 9, depth=1, heads=1, head_dim=8, timesteps=5, drop=drop)
    before = {k: v.clone() for k, v in prior.net.state_dict().items()}
    prior.fit(text, truth, steps=3, lr=1e-2, weight_decay=0)
    after = prior.net.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert still not in moved and {"text.weight", "nothing"} - {still} <= moved


def test_a_diffusion_prior_survives_its_state_dict():
    text, truth = pairs()
    make = lambda: TextPrior(6, 9, depth=1, heads=1, head_dim=8, timesteps=5)
    prior, again = make(), make()
    prior.fit(text, truth, steps=2)
    again.load_state_dict(prior.state_dict())
    assert torch.equal(again(text, samples=3), prior(text, samples=3))


@pytest.mark.parametrize("how", [{}, {"gain": 3.0}, {"blend": 0.4}, {"from_first_pass": True}])
@pytest.mark.parametrize(("motif", "pairs"), [("paper", [("head", "conv1")]),
                                              ("published", [("head", "conv1")]),
                                              ("published", [("relu1", "conv2"),
                                                             ("head", "conv1")])])
def test_a_search_is_three_steered_calls_whatever_it_shares(motif, pairs, how):
    model = small(motif, pairs, steps=2).eval()
    x, y = 3 * torch.randn(15, 3, 12, 12, generator=torch.Generator().manual_seed(3)), [
        0, 1, 2, 3, 4
    ] * 3  # labels may be a list
    three, vectors = triplets(torch.tensor(y),
                              1), 6 * torch.randn(5, 5, generator=torch.Generator().manual_seed(4))
    found = search(model, x, y, three, vectors, batch_size=4, **how)
    y = torch.tensor(y)
    with torch.no_grad():
        shown = overlay(x[three[:, 0]], x[three[:, 1]])
        calls = [
            model.trajectory(shown, steer=Steer("head", vectors[y[three[:, k]]], **how)).outputs
            for k in range(3)
        ]
    right = [
        torch.stack([o.argmax(1) == y[three[:, k]] for o in outputs], 1)
        for k, outputs in enumerate(calls)
    ]
    assert torch.equal(found.hits, torch.stack(right[:2], 1)) and torch.equal(
        found.false_alarms, right[2])
    assert found.hits.any() and not found.hits.all()


def test_a_search_runs_the_plain_pass_once_and_names_what_is_not_finite():
    model = small(steps=1).eval()
    runs, conv = [], model.backbone.conv2
    conv.register_forward_hook(lambda *_: runs.append(1))
    x, y = torch.randn(12, 3, 12, 12), torch.arange(12) % 4
    search(model, x, y, triplets(y, 1), torch.randn(4, 5))
    assert len(runs) == 1 + 3
    with torch.no_grad():
        model.modulations["conv1"].drives["head"].conv.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        search(model, x, y, triplets(y, 1), torch.randn(4, 5))


@pytest.mark.parametrize(("labels", "said"), [(torch.tensor([0, 1, -1, 2]), "-1"),
                                              (torch.eye(4), "label.*2"),
                                              (torch.tensor([0.0, 1, 2, 3]), "label.*0.0")])
def test_labels_that_are_no_class_numbers_are_refused(x, labels, said):
    with pytest.raises(ValueError, match=said):
        prototype(small(), TensorDataset(x, labels))


def test_prototypes_keep_the_dtype_of_a_float64_model(x):
    found = prototype(small().double(), TensorDataset(x.double(), torch.arange(4)))
    assert found.mean.dtype == found.stderr.dtype == torch.float64
    assert prototype(small(), TensorDataset(x, torch.arange(4))).mean.dtype == torch.float32


# hits above a biased answer ---------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 30), k=st.integers(1, 3), seed=st.integers(0, 999), largest=st.booleans())
def test_a_biased_answer_is_what_adding_a_constant_to_a_logit_gives(n, k, seed, largest):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 6, generator=g, dtype=torch.float64)
    targets = torch.rand(n, 6, generator=g).argsort(1)[:, : 2 + k]
    margin = margins(logits, targets)

    def said(b):
        ask = lambda t: (logits + b * F.one_hot(t, 6).double()).argmax(1) == t
        return torch.stack([ask(t) for t in targets.T], 1)

    for alarms in range(n * k + 1):  # all biases between two neighbours give as many false alarms
        low, high = [-50, *margin[:, 2:].flatten().sort().values, 50][alarms : alarms + 2]
        inside = said(float(high) - 1e-11 if largest else float(low) + 1e-11)
        assert int(inside[:, 2:].sum()) == alarms
        hits = biased_answer(margin, alarms / (n * k), largest=largest)
        assert hits == pytest.approx(float(inside[:, :2].float().mean()))


def test_biased_answers_of_many_resamples_at_once():
    margin, rate = np.random.default_rng(0).normal(size=(4, 7, 20, 3)), np.full((4, 7), 0.3)
    together = biased_answer(margin, rate)
    assert together.shape == (4, 7)
    one = margin[2, 5]
    assert together[2, 5] == biased_answer(one, 0.3) == biased_answer(torch.tensor(one), 0.3)
    for rate, shown in ((1.1, 2), (float("nan"), 2), (0, 3), (0, 0)):
        with pytest.raises(ValueError, match="rate|shown"):
            biased_answer(one, rate, shown=shown)


def test_digits_keep_what_each_triplet_answered():
    hits, alarms = torch.rand(50, 2) < 0.5, torch.rand(50, 2) < 0.5
    found = from_digits(to_digits(hits, alarms), looks=2)
    for shares, answers in zip(found, (hits, alarms)):
        assert shares.tolist() == answers.float().mean(1).tolist()


@pytest.mark.parametrize("kind", ["tensors", "dataset", "loader"])
def test_a_composite_test_is_its_searches_beside_the_plain_pass_with_a_bias(kind):
    model = small(steps=1).train()
    g = torch.Generator().manual_seed(4)
    x, y = 3 * torch.randn(15, 3, 12, 12, generator=g), torch.arange(15) % 5
    pairs = TensorDataset(x, y)
    data = {"tensors": (x, y), "dataset": pairs, "loader": DataLoader(pairs, 4)}[kind]
    by_class, by_picture = (6 * torch.randn(n, 5, generator=g) for n in (5, 15))
    vectors = {"classes": by_class, "pictures": (by_picture, "picture")}
    state = torch.get_rng_state()
    table = composite_test(model, data, vectors, gains=(1, 3), per_pair=2, seed=5, batch_size=6)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    three = triplets(y, 2, seed=5)
    shown = overlay(x[three[:, 0]], x[three[:, 1]])
    with torch.no_grad():
        margin = margins(model.eval()(shown, steps=0), y[three])
    for (name, gain), row in table.iterrows():
        v, by = (vectors[name], "class") if name == "classes" else vectors[name]
        found = search(model, x, y, three, v, by=by, gain=gain)
        hits, alarms = (float(said.double().mean()) for said in found.last())
        assert row["hits"] == pytest.approx(hits) and row["false_alarms"] == pytest.approx(alarms)
        assert row["above_biased"] == pytest.approx(hits - biased_answer(margin, alarms))
        assert row["low"] <= row["above_biased"] <= row["high"]
        assert row["a_prime"] == pytest.approx(a_prime(hits, alarms))


def test_scores_over_several_networks_are_means_over_them():
    g = np.random.default_rng(0)
    h, f = g.integers(0, 3, (3, 40)) / 2, g.integers(0, 2, (3, 40))
    m = g.normal(size=(3, 40, 3))
    together, each = composite_scores(h, f, m), [composite_scores(*parts) for parts in zip(h, f, m)]
    for name in ("hits", "false_alarms", "a_prime", "above_biased"):
        assert together[name] == pytest.approx(np.mean([row[name] for row in each]))


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 50), seed=st.integers(0, 99), offset=st.sampled_from([0.0, 1e6]))
def test_class_moments_do_not_depend_on_the_batches(batch, seed, offset):
    g, sums = torch.Generator().manual_seed(seed), {}
    a, y = offset + torch.randn(50, 2, 3, generator=g, dtype=torch.float64), torch.arange(50) % 3
    for part, labels in zip(a.split(batch), y.split(batch)):
        class_moments(sums, part, labels)
    for c, (n, mean, squares) in sums.items():
        assert n == int((y == c).sum())
        assert_close(mean, a[y == c].mean(0), rtol=1e-12, atol=1e-12)
        assert_close(squares / (n - 1), a[y == c].var(0), rtol=1e-7, atol=1e-12)
