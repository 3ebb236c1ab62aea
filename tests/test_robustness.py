"""What a user of feedback_nb.robustness relies on: curves, attacks, their check, calibration."""

import math
import sys
from functools import partial

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from feedback_nb.feedback import FeedbackModel, State
from feedback_nb.robustness import (
    area,
    attack,
    calibration,
    corruption_curve,
    fgsm_curve,
    masking_check,
    noise_curve,
    pgd_curve,
    predictions,
    reliability,
)


pytestmark = pytest.mark.usefixtures("one_thread")


class Line(nn.Module):
    """Two classes, logits ±w·(x - 1/2) / 2: everything about it is known."""

    def __init__(self, weight, gain=1.0):
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.tensor(weight)), gain

    def forward(self, x):
        s = self.gain * ((x - 0.5) * self.weight).flatten(1).sum(1) / 2
        return torch.stack([-s, s], 1)


WEIGHT = [1.0, -2.0, 0.5, 0.25]


def line_data(n=400, seed=0):
    x = 0.3 + 0.4 * torch.rand(n, 4, generator=torch.Generator().manual_seed(seed))
    return x, (((x - 0.5) * torch.tensor(WEIGHT)).sum(1) > 0).long()


@pytest.mark.parametrize(
    "curve", [fgsm_curve, partial(pgd_curve, iterations=7), partial(fgsm_curve, rescale=True)]
)
def test_attacks_on_a_linear_network_are_exact(curve):
    pytest.importorskip("captum")
    x, y = line_data()
    margin = ((x - 0.5) * torch.tensor(WEIGHT)).sum(1).abs()
    epsilons = (0.0, 0.01, 0.03, 0.08, 0.2)
    exact = [(margin > e * sum(map(abs, WEIGHT))).double().mean().item() for e in epsilons]
    assert curve(Line(WEIGHT), (x, y), epsilons).accuracy.tolist() == pytest.approx(
        exact, abs=0.006
    )


def test_the_captum_threshold_that_hides_small_gradients_is_off():
    pytest.importorskip("captum")
    x, y = line_data()
    quiet = fgsm_curve(
        Line(WEIGHT, 1e-7), (x, y), (0.0, 0.08)
    ).accuracy.tolist()  # gradients far below 1e-6
    assert (
        quiet == fgsm_curve(Line(WEIGHT), (x, y), (0.0, 0.08)).accuracy.tolist() and quiet[1] < 0.5
    )
    assert pgd_curve(Line(WEIGHT, 1e-7), (x, y), (0.08,)).accuracy[0] == pytest.approx(
        quiet[1], abs=0.006
    )


def test_foolbox_agrees():
    foolbox, _ = pytest.importorskip("foolbox"), pytest.importorskip("captum")
    x, y = line_data(200)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    theirs = foolbox.PyTorchModel(model.eval(), bounds=(0, 1))
    epsilons = [0.01, 0.03, 0.06]
    for kind, curve in (
        (foolbox.attacks.LinfFastGradientAttack(), fgsm_curve),
        (foolbox.attacks.LinfPGD(rel_stepsize=0.125, steps=20), partial(pgd_curve, iterations=20)),
    ):
        *_, success = kind(theirs, x, y, epsilons=epsilons)
        assert curve(model, (x, y), epsilons).accuracy.tolist() == pytest.approx(
            (1 - success.double().mean(1)).tolist(), abs=0.02
        )


def test_noise_on_a_linear_network_is_the_normal_distribution():
    x, y = line_data(8000)
    sigmas = (0.0, 0.1, 0.5)
    margin = ((x - 0.5) * torch.tensor(WEIGHT)).sum(1).abs().double()
    norm = torch.tensor(WEIGHT).norm().double()
    exact = [1.0] + [torch.special.ndtr(margin / (s * norm)).mean().item() for s in sigmas[1:]]
    found = noise_curve(Line(WEIGHT), (x, y), sigmas, bounds=None)
    assert (
        found.accuracy.tolist() == pytest.approx(exact, abs=0.01) and found.n.tolist() == [8000] * 3
    )


def test_noise_is_the_same_for_every_model_and_call_and_leaves_the_random_state():
    x, y = line_data(64)
    seen = []

    class Watch(Line):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)

    state = torch.get_rng_state()
    noise_curve(Watch(WEIGHT), (x, y), (0.0, 0.1, 0.2), bounds=None)
    torch.rand(1)
    noise_curve(Watch(WEIGHT), (x, y), (0.0, 0.1, 0.2), bounds=None)
    torch.testing.assert_close(seen[:3], seen[3:])
    torch.testing.assert_close(seen[0], x)
    torch.testing.assert_close(2 * (seen[1] - x), seen[2] - x)  # one draw, scaled
    torch.set_rng_state(state)
    noise_curve(Watch(WEIGHT), (x, y), (0.3,))
    pytest.importorskip("captum")
    pgd_curve(Line(WEIGHT), (x, y), (0.1,))
    assert torch.equal(torch.get_rng_state(), state) and seen[-1].min() >= 0 and seen[-1].max() <= 1


def test_attacks_stay_in_the_ball_and_in_bounds_and_leave_the_model_alone():
    pytest.importorskip("captum")
    x, y = line_data(50)
    model = Line([30.0, -2.0, 0.5, 0.25]).train()
    seen = []
    handle = model.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    pgd_curve(model, (x, y), (0.05,), restarts=2, iterations=3, bounds=(0.25, 0.75))
    handle.remove()
    assert max((s - x).abs().max() for s in seen) <= 0.05 + 1e-6
    assert min(s.min() for s in seen) >= 0.25 and max(s.max() for s in seen) <= 0.75
    assert (
        model.training
        and model.weight.grad is None
        and model.weight.requires_grad
        and not x.requires_grad
    )


def test_restarts_and_more_levels_only_lower_the_accuracy():
    pytest.importorskip("captum")
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), line_data(200)
    one, three = (
        pgd_curve(model, (x, y), (0.0, 0.02, 0.05, 0.1), restarts=r, iterations=3).accuracy
        for r in (1, 3)
    )
    assert (three <= one + 0.01).all() and (one.diff().dropna() <= 0.01).all()


class Echo(FeedbackModel):
    """Its answer turns round at the last step, so an attack that looks at another step is wrong."""

    def __init__(self, steps=2, tol=None):
        super().__init__(steps, tol)
        self.line = Line(WEIGHT)

    def start(self, x, *, states=False):
        return State(torch.zeros_like(x), -self.line(x), x)

    def step(self, x, state, t):
        h = state.h + x
        return State(h, self.line(0.5 + h - h.detach()) + self.line(x).detach(), x)


def test_attacks_go_through_the_feedback_steps():
    pytest.importorskip("captum")
    x, y = line_data()
    curve = fgsm_curve(Echo(), (x, y), (0.0, 0.05))
    assert curve.accuracy_0[0] == 0 and curve.accuracy_1[0] == 1 == curve.accuracy_2[0]
    margin = ((x - 0.5) * torch.tensor(WEIGHT)).sum(1).abs()
    assert curve.accuracy[1] == pytest.approx(
        (margin > 0.05 * sum(map(abs, WEIGHT))).double().mean().item(), abs=0.006
    )
    assert list(noise_curve(Echo(), (x, y), (0.0,), steps=1).columns[-2:]) == [
        "accuracy_0",
        "accuracy_1",
    ]
    with pytest.raises(ValueError, match="no FeedbackModel"):
        noise_curve(Line(WEIGHT), (x, y), steps=2)


def test_examples_that_settle_early_keep_their_answer():
    x, y = line_data(300)
    early = noise_curve(Echo(steps=6, tol=10.0), (x, y), (0.0,), batch_size=128)
    assert (
        early.filter(like="accuracy_").shape[1] == 7
        and early.accuracy[0] == 1 == early.accuracy_6[0]
        and early.accuracy_0[0] == 0
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda d: noise_curve(Line(WEIGHT), (d[0] * 4 - 2, d[1])), "bounds 0 … 1"),
        (lambda d: noise_curve(Line(WEIGHT), d, (-1,)), "sigmas.*-1"),
        (lambda d: noise_curve(Line(WEIGHT), d, (math.nan,)), "sigmas.*nan"),
        (lambda d: noise_curve(Line(WEIGHT), d, ()), "sigma"),
        (lambda d: noise_curve(Line(WEIGHT), (d[0][:0], d[1][:0])), "data set"),
        (lambda d: corruption_curve(Line(WEIGHT), d, {}), "corruptions"),
        (
            lambda d: corruption_curve(Line(WEIGHT), d, {"hole": lambda x, s: x / 0}),
            "'hole' at severity 1",
        ),
    ],
)
def test_curves_refuse_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(line_data(20))


def test_a_broken_model_is_no_zero_percent():
    model = Line([math.nan] * 4).train()
    with pytest.raises(FloatingPointError, match="not finite"):
        noise_curve(model, line_data(20), (0.1,))
    assert model.training  # put back all the same


def test_corruptions_start_at_the_clean_input():
    table = corruption_curve(
        Line(WEIGHT),
        line_data(),
        {"fade": lambda x, s: 0.5 + (x - 0.5) / s, "flip": lambda x, s: 1 - x},
        (1, 3),
    )
    assert table[["corruption", "severity"]].values.tolist() == [
        ["fade", 0],
        ["fade", 1],
        ["fade", 3],
        ["flip", 0],
        ["flip", 1],
        ["flip", 3],
    ]
    assert table.accuracy.tolist() == [1, 1, 1, 1, 0, 0]


def test_every_kind_of_data_and_batch_size_gives_the_same_numbers():
    x, y = line_data(100)
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    expected = noise_curve(model, (x, y), (0.0,))
    for data in (
        TensorDataset(x, y),
        DataLoader(TensorDataset(x, y), 7),
        torch.utils.data.Subset(TensorDataset(x, y), range(100)),
    ):
        pd.testing.assert_frame_equal(noise_curve(model, data, (0.0,), batch_size=13), expected)
    logits, targets = predictions(model, (x, y), batch_size=33)
    torch.testing.assert_close(logits, model(x).detach()[None])
    assert torch.equal(targets, y)


def test_masks_are_scored_by_pixel():
    class Pixels(nn.Module):
        def forward(self, x):
            return torch.cat([0.5 - x, x - 0.5], 1)

    x = torch.rand(6, 1, 8, 8)
    y = (x[:, 0] > 0.5).long()
    y[:3] = 1 - y[:3]
    assert noise_curve(Pixels(), (x, y), (0.0,)).accuracy[0] == 0.5
    assert calibration(Pixels(), (x, y)).accuracy[0] == 0.5


def test_masked_gradients_are_found_out():
    pytest.importorskip("captum")
    x, y = line_data()
    honest = masking_check(Line(WEIGHT), (x, y), 0.05, other=Line([0.9, -2.1, 0.4, 0.3]))
    assert not honest.suspicious.any() and len(honest) == 7
    with pytest.warns(RuntimeWarning, match="no gradient to follow"):
        assert fgsm_curve(Line(WEIGHT, 1e6), (x, y), (0.05,)).accuracy[0] > 0.9
    with pytest.warns(RuntimeWarning, match="rescaled logits"):
        assert masking_check(Line(WEIGHT, 1e6), (x, y), 0.05).suspicious.any()

    class Stairs(Line):  # a staircase has no slope anywhere
        def forward(self, x):
            return super().forward((x * 50).round().detach() / 50 + 0 * x)

    with pytest.warns(RuntimeWarning, match="masked"):
        found = masking_check(Stairs(WEIGHT), (x, y), 0.05, other=Line(WEIGHT))
    assert found.suspicious["… made for the other model"]


def test_without_captum_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.robust", None)
    for kind in (fgsm_curve, pgd_curve, partial(masking_check, epsilon=0.1)):
        with pytest.raises(ImportError, match="pip install captum"):
            kind(Line(WEIGHT), line_data(10))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(0.1, 5), st.floats(-2, 2))
def test_area_is_a_mean_height(heights, step, start):
    curve = pd.DataFrame(
        {"x": [start + i * step for i in range(len(heights))], "accuracy": heights}
    )
    assert min(heights) - 1e-9 <= area(curve) <= max(heights) + 1e-9
    assert area(curve.assign(accuracy=1 - curve.accuracy)) == pytest.approx(1 - area(curve))
    assert area(curve.assign(x=7 * curve.x)) == pytest.approx(area(curve))


@pytest.mark.parametrize(
    "curve, words",
    [
        ({"x": [0], "accuracy": [1]}, "two points"),
        ({"x": [1, 0], "accuracy": [1, 0]}, "ascending"),
        ({"x": [0, 1], "accuracy": [1, math.nan]}, "accuracy"),
        ({"x": [0, 1]}, "'accuracy'.*column"),
    ],
)
def test_area_refuses_what_has_none(curve, words):
    with pytest.raises(ValueError, match=words):
        area(pd.DataFrame(curve))


# calibration


@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_is_torchmetrics(bins):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    g = torch.Generator().manual_seed(0)
    logits, y = 2 * torch.randn(500, 4, generator=g), torch.randint(4, (500,), generator=g)
    theirs = functional.multiclass_calibration_error(
        logits.softmax(1), y, num_classes=4, n_bins=bins
    )
    found = calibration(nn.Identity(), (logits, y), bins=bins)
    assert found.ece[0] == pytest.approx(theirs.item(), abs=1e-5)
    assert found.accuracy[0] == pytest.approx((logits.argmax(1) == y).double().mean().item())
    assert reliability(logits, y, bins).n.sum() == 500


def test_calibration_of_sure_and_of_honest_networks():
    y = torch.tensor([0, 1] * 50)
    sure = torch.tensor([[100.0, 0.0]]).expand(100, 2)
    assert calibration(nn.Identity(), (sure, y)).ece[0] == pytest.approx(
        0.5
    )  # says 100 %, is right half the time
    assert calibration(nn.Identity(), (torch.zeros(100, 2), y)).ece[0] == pytest.approx(
        0
    )  # says 50 %
    assert len(calibration(Echo(), line_data(20))) == 3
    with pytest.raises(ValueError, match="not finite"):
        reliability(torch.full((2, 2), math.nan), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="bins.* 0"):
        reliability(torch.zeros(2, 2), torch.tensor([0, 1]), bins=0)


# what is no answer


@pytest.mark.parametrize("call", [predictions, calibration, partial(noise_curve, sigmas=[0])])
def test_nan_logits_are_no_answer(call):
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), math.nan)

    zeros = torch.zeros(6, 4), torch.zeros(6, dtype=torch.long)  # class 0 would be right
    with pytest.raises((FloatingPointError, ValueError), match="finite"):
        call(Broken(), zeros)


def test_labels_that_are_left_out_count_neither_as_right_nor_as_wrong():
    x, y = line_data(60)
    void = y.clone()
    void[::3] = -100
    kept = [i for i in range(60) if i % 3]
    model = Line([1.0, -1.0, 0.3, 0.2])
    for tool in (partial(noise_curve, sigmas=[0.0]), calibration):
        found, expected = (tool(model, data) for data in ((x, void), (x[kept], y[kept])))
        pd.testing.assert_frame_equal(found, expected)
    assert reliability(model(x), void).n.sum() == 40
    pixels = nn.Conv2d(1, 2, 1)
    masks = torch.zeros(2, 3, 3, dtype=torch.long)
    masks[0, 0], masks[1] = -100, -100  # of the first image six pixels count, the second is void
    assert noise_curve(pixels, (torch.zeros(2, 1, 3, 3), masks), [0.0]).n[0] == 1


def test_attack_within_its_ball_and_stronger_than_chance():
    pytest.importorskip("captum")
    (x, y), model = line_data(200), Line(WEIGHT)
    torch.manual_seed(0)
    right = lambda x: (model(x).argmax(1) == y).float().mean().item()
    for iterations in (0, 5):
        bad = attack(model, x, y, 0.05, iterations=iterations)
        assert (bad - x).abs().max() <= 0.05 + 1e-6 and right(bad) < right(x) - 0.1
    torch.testing.assert_close(attack(model, x, y, 0.0), x)
    with pytest.raises(ValueError, match="iterations"):
        attack(model, x, y, 0.05, iterations=-1)
