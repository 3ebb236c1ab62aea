"""What a user of feedback_nb.evaluation relies on: statistics, recorded runs, curves, attacks, cost."""
import math
import subprocess
import sys
import types
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from feedback_nb.evaluation import (area, calibration, compare, corruption_curve, cost, fgsm_curve, holm, masking_check, noise_curve, paired, pgd_curve,
                                    predictions, reliability, significance)
from feedback_nb.feedback import FeedbackModel, State

scores = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=6)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# statistics

PAPER = [
    ([83.50, 82.97, 83.12, 83.67, 82.11], [80.39, 80.65, 80.72, 80.40, 80.75], 7.34, 0.0018),
    ([76.74, 76.90, 76.83, 76.70, 76.92], [75.15, 75.42, 75.09, 75.30, 75.27], 26.08, 1.3e-5),
    ([82.30, 82.10, 82.40, 82.50, 82.20], [81.20, 81.10, 81.30, 81.10, 81.00], 17.10, 6.9e-5),
]


@pytest.mark.parametrize("a, b, t, p", PAPER)
def test_the_statistics_that_follow_from_the_papers_own_runs(a, b, t, p):
    found = paired(a, b)
    assert found.t == pytest.approx(t, abs=0.005) and found.p == pytest.approx(p, rel=0.03)
    assert found.wilcoxon_p == 0.0625  # all five signs agree: 2 / 2⁵
    assert found.low < found.difference < found.high


@settings(max_examples=30, deadline=None)
@given(scores)
def test_paired_never_returns_nan_and_turns_round_with_its_arguments(pairs):
    a, b = zip(*pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        one, other = paired(a, b), paired(b, a)
    assert not any(math.isnan(v) for v in one)
    assert one.difference == pytest.approx(-other.difference) and one.t == pytest.approx(-other.t) and one.p == pytest.approx(other.p)
    assert one.low <= one.difference <= one.high and 0 <= one.p <= 1 and 0 < one.wilcoxon_p <= 1
    assert one.d_z == pytest.approx(one.t / math.sqrt(one.n))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 10), st.integers(0, 10**6))
def test_paired_is_scipys_test(n, seed):
    from scipy import stats

    a, b = np.random.default_rng(seed).normal(50, 3, (2, n))
    oracle, found = stats.ttest_rel(a, b), paired(a, b)
    assert (found.t, found.p) == pytest.approx((oracle.statistic, oracle.pvalue), rel=1e-6)
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval(0.95)), rel=1e-6)


def test_paired_without_spread_says_so():
    with pytest.warns(RuntimeWarning, match="all 3 differences are 0.1"):
        same = paired([0.4, 0.5, 0.6], [0.3, 0.4, 0.5])  # equal but for rounding
    assert same.t == math.inf and same.p == 0 and (same.low, same.high) == pytest.approx((0.1, 0.1))
    assert paired([0.1 + 0.2, 1], [0.3, 1])[3:] == (0, 0, 1, 1, 0)


@pytest.mark.parametrize("a, b, words", [([1], [2], "pairs.* 1"), ([], [], "pairs.* 0"), ([1, 2, 3], [1, 2], "scores.* 3.* 2"),
                                         ([1, math.nan], [1, 2], "a holds nan at position 1"), ([1, 2], [math.inf, 2], "b holds inf at position 0")])
def test_paired_refuses_what_it_cannot_test(a, b, words):
    with pytest.raises(ValueError, match=words):
        paired(a, b)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_lies_between_p_and_bonferroni(ps):
    adjusted = holm(ps)
    assert all(p <= q <= min(1, len(ps) * p) + 1e-12 for p, q in zip(ps, adjusted))
    order = np.argsort(ps, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all() and min(adjusted) == min(1, len(ps) * min(ps))


def test_holm_by_hand_and_bad_p():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    with pytest.raises(ValueError, match=r"p-value 0.*1\.5"):
        holm([1.5])


def test_significance_pairs_by_seed_not_by_order():
    table = significance({"base": {0: 1.0, 1: 2.0, 2: 4.0, 3: 9.0}, "new": {3: 10.0, 1: 2.5, 0: 1.75}}, "base")
    expected = paired([1.75, 2.5, 10.0], [1.0, 2.0, 9.0])
    assert table.loc["new", "pairs"] == 3 and table.loc["new", "n"] == 3 and table.loc["base", "n"] == 4
    assert table.loc["new", "t"] == pytest.approx(expected.t) and table.loc["new", "difference"] == pytest.approx(0.75)
    assert "p_holm" not in table
    assert significance({"base": {0: 1.0, 1: 2.0, 2: 4.0}, "new": {1: 2.5, 2: 4.25, 3: 9.0}}, "base").loc["new", "pairs"] == 2  # seeds that both have


def test_significance_corrects_for_several_models_and_shows_lone_runs():
    runs = {"base": [1.0, 2.0, 3.0], "a": [2.0, 3.1, 4.0], "b": [1.1, 1.9, 3.2], "once": [5.0]}
    table = significance(runs, "base", scale=100)
    assert table.loc[["a", "b"], "p_holm"].tolist() == pytest.approx(holm(table.loc[["a", "b"], "p"]))
    assert table.loc["once", "mean"] == 500 and pd.isna(table.loc["once", "std"]) and pd.isna(table.loc["once", "p"])
    assert table.loc["base", "std"] == pytest.approx(100)  # n - 1
    plain = significance(runs, "base")
    assert plain["p"].dropna().tolist() == pytest.approx(table["p"].dropna().tolist())
    with pytest.raises(ValueError, match="runs of empty"):
        significance({"base": [1.0], "empty": []})


# runs

def digits_like(n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return TensorDataset((torch.eye(3)[y].repeat(1, 4) * 0.5 + 0.5 * torch.rand(n, 12, generator=g)), y)


DATA = digits_like(60), digits_like(30, 1), digits_like(30, 2)
net = partial(nn.Linear, 12, 3)


def quick_fit(model, data, *, epochs=2, lr=0.1, seed=0, progress=True, device=None, checkpoint=None):
    train, valid = data
    x, y = train.tensors
    rows = []
    for epoch in range(epochs):
        for i in torch.randperm(len(x)).split(20):  # from the state that compare has seeded
            loss = F.cross_entropy(model(x[i]), y[i])
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= lr * p.grad
                    p.grad = None
        rows.append({"epoch": epoch, "train_loss": loss.item(), "train_accuracy": 0.5, "valid_accuracy": quick_test(model, valid)["accuracy"], "seconds": 0.01})
    return types.SimpleNamespace(frame=pd.DataFrame(rows))


def quick_test(model, data):
    x, y = data.tensors
    out = model(x).detach()
    return {"loss": F.cross_entropy(out, y).item(), "accuracy": (out.argmax(1) == y).double().mean().item(), "n": len(y), "per_step": [{"step": 0, "accuracy": 1.0}]}


quick = partial(compare, fit=quick_fit, evaluate=quick_test, progress=False)


def without_times(comparison):
    return sorted((row["model"], row["seed"], row["accuracy"], row["loss"], row["valid_accuracy"]) for row in comparison.record["rows"])


def test_compare_gives_each_model_the_same_seed_whatever_else_runs(tmp_path):
    state = torch.get_rng_state()
    both = quick({"a": net, "b": lambda: nn.Sequential(net())}, DATA, range(3))
    alone = quick({"b": lambda: nn.Sequential(net())}, DATA, [2, 1])
    assert torch.equal(torch.get_rng_state(), state)
    assert both.scores("a") == both.scores("b")  # the same network under two names
    assert alone.scores("b") == {s: both.scores("b")[s] for s in (1, 2)}
    assert len({frame.train_loss.iloc[-1] for frame in both.histories["a"]}) == 3  # and different seeds do differ
    assert list(both.histories["a"][0].columns) == ["epoch", "train_loss", "train_accuracy", "valid_accuracy", "seconds"]


def test_runs_in_other_processes_are_the_same_runs(tmp_path):
    models = {"a": net, "b": lambda: nn.Sequential(net(), nn.Tanh())}  # also functions that cannot be imported
    one, two = quick(models, DATA, range(2)), quick(models, DATA, range(2), workers=2, results=tmp_path / "two.json")
    assert without_times(one) == without_times(two)


@pytest.mark.parametrize("how, error, words", [
    (dict(factories={}), ValueError, "factories"),
    (dict(factories={"a": net()}, data=None), ValueError, "data"),
    (dict(factories={"a": lambda: 3}), TypeError, "'a'.*module.*int"),
    (dict(data=(1,)), ValueError, "train, test"),
    (dict(seeds=[1, 1]), ValueError, "seeds"),
    (dict(seeds=[]), ValueError, "seeds"),
    (dict(settings={"seed": 1}), ValueError, "seed"),
    (dict(per_model={"c": {}}), ValueError, "'c'.*model"),
])
def test_compare_refuses_before_anything_is_trained(how, error, words):
    with pytest.raises(error, match=words):
        compare(**{"factories": {"a": net}, "data": DATA, **how}, fit=None, evaluate=None)


@pytest.mark.parametrize("how", [{}, {"fit": quick_fit, "evaluate": quick_test}])
def test_measure_gets_the_network_in_eval_mode(how):
    """Batch norm in training mode would answer from the batch it is shown, and learn from the test data."""
    made, modes = lambda: nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)), []
    compare({"a": made}, DATA, range(2), settings={"epochs": 1}, progress=False, measure=lambda model, test: modes.append([m.training for m in model.modules()]) or {}, **how)
    assert len(modes) == 2 and not any(map(any, modes))


def test_columns_that_are_not_there_are_named():
    runs = quick({"a": net}, DATA, range(2), measure=lambda model, test: {"zeros": int((model.weight == 0).sum()), "broken": math.nan})
    assert runs.scores("a", "zeros") == {0: 0, 1: 0}
    for metric in ("f1", "broken"):
        with pytest.raises(ValueError, match=f"'{metric}'.*accuracy.*zeros"):
            runs.table(metric=metric)
    with pytest.raises(ValueError, match="'b'.*model.*a"):
        runs.scores("b")
    with pytest.raises(ValueError, match="accuracy per step"):
        runs.per_step("a")


def test_compare_with_the_real_training(tmp_path):
    from feedback_nb.cbl import CBL

    def loop():
        return CBL(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), ["0"], example=torch.rand(2, 12), context_dim=4, steps=2)

    runs = compare({"net": net, "loop": loop}, DATA, range(2), settings={"epochs": 2, "batch_size": 20}, results=tmp_path / "r.json", checkpoints=tmp_path / "c", progress=False)
    assert runs.per_step("loop").shape == (2, 3) and runs.per_step("loop")[2].tolist() == pytest.approx(list(runs.scores("loop").values()), abs=1e-6)
    losses = runs.table("net", metric="loss")["mean"]
    assert losses.to_dict() == pytest.approx({name: sum(runs.scores(name, "loss").values()) / 2 for name in ("net", "loop")})  # every model by that column
    assert list(runs.table("net").index) == ["net", "loop"] and [len(f) for f in runs.histories["loop"]] == [2, 2]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["loop-0", "loop-1", "net-0", "net-1"]
    plain = compare({"net": net}, DATA, range(2), settings={"epochs": 2, "batch_size": 20}, progress=False)
    assert plain.scores("net") == runs.scores("net")


# curves

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


@pytest.mark.parametrize("curve", [fgsm_curve, partial(pgd_curve, iterations=7), partial(fgsm_curve, rescale=True)])
def test_attacks_on_a_linear_network_are_exact(curve):
    pytest.importorskip("captum")
    x, y = line_data()
    margin = ((x - 0.5) * torch.tensor(WEIGHT)).sum(1).abs()
    epsilons = (0.0, 0.01, 0.03, 0.08, 0.2)
    exact = [(margin > e * sum(map(abs, WEIGHT))).double().mean().item() for e in epsilons]
    assert curve(Line(WEIGHT), (x, y), epsilons).accuracy.tolist() == pytest.approx(exact, abs=0.006)


def test_the_captum_threshold_that_hides_small_gradients_is_off():
    pytest.importorskip("captum")
    x, y = line_data()
    quiet = fgsm_curve(Line(WEIGHT, 1e-7), (x, y), (0.0, 0.08)).accuracy.tolist()  # gradients far below 1e-6
    assert quiet == fgsm_curve(Line(WEIGHT), (x, y), (0.0, 0.08)).accuracy.tolist() and quiet[1] < 0.5
    assert pgd_curve(Line(WEIGHT, 1e-7), (x, y), (0.08,)).accuracy[0] == pytest.approx(quiet[1], abs=0.006)


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
    for attack, curve in ((foolbox.attacks.LinfFastGradientAttack(), fgsm_curve), (foolbox.attacks.LinfPGD(rel_stepsize=0.125, steps=20), partial(pgd_curve, iterations=20))):
        *_, success = attack(theirs, x, y, epsilons=epsilons)
        assert curve(model, (x, y), epsilons).accuracy.tolist() == pytest.approx((1 - success.double().mean(1)).tolist(), abs=0.02)


def test_noise_on_a_linear_network_is_the_normal_distribution():
    x, y = line_data(8000)
    sigmas = (0.0, 0.1, 0.5)
    margin = ((x - 0.5) * torch.tensor(WEIGHT)).sum(1).abs().double()
    norm = torch.tensor(WEIGHT).norm().double()
    exact = [1.0] + [torch.special.ndtr(margin / (s * norm)).mean().item() for s in sigmas[1:]]
    found = noise_curve(Line(WEIGHT), (x, y), sigmas, bounds=None)
    assert found.accuracy.tolist() == pytest.approx(exact, abs=0.01) and found.n.tolist() == [8000] * 3


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
    assert model.training and model.weight.grad is None and model.weight.requires_grad and not x.requires_grad


def test_restarts_and_more_levels_only_lower_the_accuracy():
    pytest.importorskip("captum")
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), line_data(200)
    one, three = (pgd_curve(model, (x, y), (0.0, 0.02, 0.05, 0.1), restarts=r, iterations=3).accuracy for r in (1, 3))
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
    assert curve.accuracy[1] == pytest.approx((margin > 0.05 * sum(map(abs, WEIGHT))).double().mean().item(), abs=0.006)
    assert list(noise_curve(Echo(), (x, y), (0.0,), steps=1).columns[-2:]) == ["accuracy_0", "accuracy_1"]
    with pytest.raises(ValueError, match="no FeedbackModel"):
        noise_curve(Line(WEIGHT), (x, y), steps=2)


def test_examples_that_settle_early_keep_their_answer():
    x, y = line_data(300)
    early = noise_curve(Echo(steps=6, tol=10.0), (x, y), (0.0,), batch_size=128)
    assert early.filter(like="accuracy_").shape[1] == 7 and early.accuracy[0] == 1 == early.accuracy_6[0] and early.accuracy_0[0] == 0


@pytest.mark.parametrize("call, words", [
    (lambda d: noise_curve(Line(WEIGHT), (d[0] * 4 - 2, d[1])), "bounds 0 … 1"),
    (lambda d: noise_curve(Line(WEIGHT), d, (-1,)), "sigmas.*-1"),
    (lambda d: noise_curve(Line(WEIGHT), d, (math.nan,)), "sigmas.*nan"),
    (lambda d: noise_curve(Line(WEIGHT), d, ()), "sigma"),
    (lambda d: noise_curve(Line(WEIGHT), (d[0][:0], d[1][:0])), "data set"),
    (lambda d: corruption_curve(Line(WEIGHT), d, {}), "corruptions"),
    (lambda d: corruption_curve(Line(WEIGHT), d, {"hole": lambda x, s: x / 0}), "'hole' at severity 1"),
])
def test_curves_refuse_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(line_data(20))


def test_a_broken_model_is_no_zero_percent():
    model = Line([math.nan] * 4).train()
    with pytest.raises(FloatingPointError, match="not finite"):
        noise_curve(model, line_data(20), (0.1,))
    assert model.training  # put back all the same


def test_corruptions_start_at_the_clean_input():
    table = corruption_curve(Line(WEIGHT), line_data(), {"fade": lambda x, s: 0.5 + (x - 0.5) / s, "flip": lambda x, s: 1 - x}, (1, 3))
    assert table[["corruption", "severity"]].values.tolist() == [["fade", 0], ["fade", 1], ["fade", 3], ["flip", 0], ["flip", 1], ["flip", 3]]
    assert table.accuracy.tolist() == [1, 1, 1, 1, 0, 0]


def test_every_kind_of_data_and_batch_size_gives_the_same_numbers():
    x, y = line_data(100)
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    expected = noise_curve(model, (x, y), (0.0,))
    for data in (TensorDataset(x, y), DataLoader(TensorDataset(x, y), 7), torch.utils.data.Subset(TensorDataset(x, y), range(100))):
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
    for attack in (fgsm_curve, pgd_curve, partial(masking_check, epsilon=0.1)):
        with pytest.raises(ImportError, match="pip install captum"):
            attack(Line(WEIGHT), line_data(10))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(0.1, 5), st.floats(-2, 2))
def test_area_is_a_mean_height(heights, step, start):
    curve = pd.DataFrame({"x": [start + i * step for i in range(len(heights))], "accuracy": heights})
    assert min(heights) - 1e-9 <= area(curve) <= max(heights) + 1e-9
    assert area(curve.assign(accuracy=1 - curve.accuracy)) == pytest.approx(1 - area(curve))
    assert area(curve.assign(x=7 * curve.x)) == pytest.approx(area(curve))


@pytest.mark.parametrize("curve, words", [({"x": [0], "accuracy": [1]}, "two points"), ({"x": [1, 0], "accuracy": [1, 0]}, "ascending"),
                                          ({"x": [0, 1], "accuracy": [1, math.nan]}, "accuracy.*nan"), ({"x": [0, 1]}, "'accuracy'.*column")])
def test_area_refuses_what_has_none(curve, words):
    with pytest.raises(ValueError, match=words):
        area(pd.DataFrame(curve))


# calibration

@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_is_torchmetrics(bins):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    g = torch.Generator().manual_seed(0)
    logits, y = 2 * torch.randn(500, 4, generator=g), torch.randint(4, (500,), generator=g)
    theirs = functional.multiclass_calibration_error(logits.softmax(1), y, num_classes=4, n_bins=bins)
    found = calibration(nn.Identity(), (logits, y), bins=bins)
    assert found.ece[0] == pytest.approx(theirs.item(), abs=1e-5)
    assert found.accuracy[0] == pytest.approx((logits.argmax(1) == y).double().mean().item())
    assert reliability(logits, y, bins).n.sum() == 500


def test_calibration_of_sure_and_of_honest_networks():
    y = torch.tensor([0, 1] * 50)
    sure = torch.tensor([[100.0, 0.0]]).expand(100, 2)
    assert calibration(nn.Identity(), (sure, y)).ece[0] == pytest.approx(0.5)  # says 100 %, is right half the time
    assert calibration(nn.Identity(), (torch.zeros(100, 2), y)).ece[0] == pytest.approx(0)  # says 50 %
    assert len(calibration(Echo(), line_data(20))) == 3
    with pytest.raises(ValueError, match="not finite"):
        reliability(torch.full((2, 2), math.nan), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="bins.* 0"):
        reliability(torch.zeros(2, 2), torch.tensor([0, 1]), bins=0)


# cost

def test_cost_counts_what_fused_kernels_hide():
    d, n, b = 16, 6, 3
    layer = nn.TransformerEncoderLayer(d, 2, 32, batch_first=True)
    row = cost(layer, torch.rand(b, n, d), train=False, seconds=0.01, rounds=1).iloc[0]
    assert row.mflops * 1e6 == 2 * n * (4 * d * d + 2 * d * 32) + 2 * 2 * n * n * d  # projections and MLP; queries times keys, weights times values

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(d, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    row = cost(Last(), torch.rand(b, n, d), train=False, seconds=0.01, rounds=1).iloc[0]
    assert row.mflops * 1e6 == 2 * n * (d * 32 + 8 * 32) + 2 * 8 * 4

    class Halts(nn.Module):  # what it computes depends on the data, so that it cannot run without numbers
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) if x.sum() > -1 else x

    fast = torch.backends.mha.get_fastpath_enabled()
    assert cost(Halts(), torch.rand(b, n, d), train=False, seconds=0.01, rounds=1).mflops.iloc[0] == cost(layer, torch.rand(b, n, d), train=False, seconds=0.01, rounds=1).mflops.iloc[0]
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
    few, many = (cost(Chain(n), x, seconds=0.001, rounds=1, loss=lambda m, x: m(x).sum()).iloc[0] for n in (4, 12))
    each = 64 * 1000 * 4 / 1e6
    assert many.saved_mb - few.saved_mb == pytest.approx(2 * 8 * each - 8 * each, rel=0.01)  # a result is the next one's factor
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
    assert table.loc["loop", "mflops_ratio"] == 4 and table.loc["loop", "parameters_ratio"] == 1  # T + 1 passes of the same weights
    assert 3.5 < table.loc["loop", "saved_mb_ratio"] < 4.5
    beside = cost(models["net"], torch.rand(8, 12), base(), seconds=0.02, rounds=1)
    assert list(beside.index) == ["Sequential", "reference"] and beside.parameters_ratio.tolist() == [1, 1]
    assert "train_ms" not in cost(models["net"], torch.rand(8, 12), train=False, seconds=0.02)


def test_cost_leaves_the_model_and_the_random_state_as_they_were():
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).train()
    x = torch.rand(8, 12)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    cost(model, x, seconds=0.02, rounds=1)
    torch.testing.assert_close(dict(model.state_dict()), before)
    assert model.training and all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), state)


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


@pytest.mark.parametrize("call, error, words", [
    (lambda x: cost({"a": nn.Linear(4, 2)}, x, "b"), ValueError, "'b'.*model.*a"),
    (lambda x: cost(nn.Flatten(0), x), TypeError, "loss="),
    (lambda x: cost(nn.Linear(4, 2), x, rounds=0), ValueError, "rounds"),
])
def test_cost_refuses_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.rand(5, 4))


def test_importing_the_module_loads_nothing_heavy():
    code = ("import sys; import feedback_nb.evaluation; "
            "print([m for m in ('pandas', 'scipy', 'captum', 'torchmetrics', 'joblib', 'matplotlib', 'feedback_nb.training', 'feedback_nb.data') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert out.stdout.strip() == "[]"
