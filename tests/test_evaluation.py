"""What a user of feedback_nb.evaluation relies on: statistics, and runs that are compared."""

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
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

from feedback_nb.cbl import CBL
from feedback_nb.evaluation import (
    compare,
    crossed_interval,
    holm,
    paired,
    right_answers,
    significance,
    smallest_effect,
)
from feedback_nb.records import describe_data

scores = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=6)


pytestmark = pytest.mark.usefixtures("one_thread")


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
@example([(0.0, 0.0), (0.0, 7.6e-261)])  # whose square is 0
@example([(0.0, 0.0), (7.6e-261, 7.6e-261)])
def test_paired_never_returns_nan_and_turns_round_with_its_arguments(pairs):
    a, b = zip(*pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        one, other = paired(a, b), paired(b, a)
    assert not any(math.isnan(v) for v in one)
    assert (
        one.difference == pytest.approx(-other.difference)
        and one.t == pytest.approx(-other.t)
        and one.p == pytest.approx(other.p)
    )
    assert one.low <= one.difference <= one.high and 0 <= one.p <= 1 and 0 < one.wilcoxon_p <= 1
    assert one.d_z == pytest.approx(one.t / math.sqrt(one.n))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 10), st.integers(0, 10**6))
def test_paired_is_scipys_test(n, seed):
    from scipy import stats

    a, b = np.random.default_rng(seed).normal(50, 3, (2, n))
    oracle, found = stats.ttest_rel(a, b), paired(a, b)
    assert (found.t, found.p) == pytest.approx((oracle.statistic, oracle.pvalue), rel=1e-6)
    assert (found.low, found.high) == pytest.approx(
        tuple(oracle.confidence_interval(0.95)), rel=1e-6
    )


def test_paired_without_spread_says_so():
    with pytest.warns(RuntimeWarning, match="all 3 differences are 0.1"):
        same = paired([0.4, 0.5, 0.6], [0.3, 0.4, 0.5])  # equal but for rounding
    assert same.t == math.inf and same.p == 0 and (same.low, same.high) == pytest.approx((0.1, 0.1))
    assert paired([0.1 + 0.2, 1], [0.3, 1])[3:8] == (0, 0, 1, 1, 0)


@pytest.mark.parametrize(
    "a, b, words",
    [
        ([1], [2], "pairs.* 1"),
        ([], [], "pairs.* 0"),
        ([1, 2, 3], [1, 2], "scores.* 3.* 2"),
        ([1, math.nan], [1, 2], "a holds nan at position 1"),
        ([1, 2], [math.inf, 2], "b holds inf at position 0"),
    ],
)
def test_paired_refuses_what_it_cannot_test(a, b, words):
    with pytest.raises(ValueError, match=words):
        paired(a, b)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_lies_between_p_and_bonferroni(ps):
    adjusted = holm(ps)
    assert all(p <= q <= min(1, len(ps) * p) + 1e-12 for p, q in zip(ps, adjusted))
    order = np.argsort(ps, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all() and min(adjusted) == min(
        1, len(ps) * min(ps)
    )


def test_holm_by_hand_and_bad_p():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    with pytest.raises(ValueError, match=r"p-value 0.*1\.5"):
        holm([1.5])


def test_significance_pairs_by_seed_not_by_order():
    table = significance(
        {"base": {0: 1.0, 1: 2.0, 2: 4.0, 3: 9.0}, "new": {3: 10.0, 1: 2.5, 0: 1.75}}, "base"
    )
    expected = paired([1.75, 2.5, 10.0], [1.0, 2.0, 9.0])
    assert (
        table.loc["new", "pairs"] == 3
        and table.loc["new", "n"] == 3
        and table.loc["base", "n"] == 4
    )
    assert table.loc["new", "t"] == pytest.approx(expected.t) and table.loc[
        "new", "difference"
    ] == pytest.approx(0.75)
    assert "p_holm" not in table
    assert (
        significance(
            {"base": {0: 1.0, 1: 2.0, 2: 4.0}, "new": {1: 2.5, 2: 4.25, 3: 9.0}}, "base"
        ).loc["new", "pairs"]
        == 2
    )  # seeds that both have


def test_significance_corrects_for_several_models_and_shows_lone_runs():
    runs = {"base": [1.0, 2.0, 3.0], "a": [2.0, 3.1, 4.0], "b": [1.1, 1.9, 3.2], "once": [5.0]}
    table = significance(runs, "base", scale=100)
    assert table.loc[["a", "b"], "p_holm"].tolist() == pytest.approx(
        holm(table.loc[["a", "b"], "p"])
    )
    assert (
        table.loc["once", "mean"] == 500
        and pd.isna(table.loc["once", "std"])
        and pd.isna(table.loc["once", "p"])
    )
    assert table.loc["base", "std"] == pytest.approx(100)  # n - 1
    plain = significance(runs, "base")
    assert plain["p"].dropna().tolist() == pytest.approx(table["p"].dropna().tolist())
    with pytest.raises(ValueError, match="runs of empty"):
        significance({"base": [1.0], "empty": []})


def test_holm_is_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    ps = np.random.default_rng(0).uniform(size=(50, 7)) ** 3
    for row in ps:
        assert holm(row) == pytest.approx(multitest.multipletests(row, method="holm")[1])


@pytest.mark.parametrize("n", [3, 5, 10, 40])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
def test_smallest_effect_is_statsmodels(n, power):
    oracle = pytest.importorskip("statsmodels.stats.power").TTestPower()
    found = smallest_effect(n, power=power)
    assert oracle.power(found, n, 0.05) == pytest.approx(power, abs=1e-4)
    assert smallest_effect(n, power=power, shared=0.25) == pytest.approx(
        found * math.sqrt((1 / n + 0.25) * n)
    )


def test_bound_and_welch_are_statsmodels_and_scipys():
    from scipy import stats

    weightstats = pytest.importorskip("statsmodels.stats.weightstats")
    for seed in range(20):
        a, b = np.random.default_rng(seed).normal(80, 1, (2, 6))
        found = paired(a, b)
        p, *_ = weightstats.ttost_paired(a, b, -found.within, found.within)
        assert p == pytest.approx(0.05, abs=1e-8)  # at the bound the two one-sided tests say 5 %
        oracle = stats.ttest_ind(a, b, equal_var=False)
        assert found.welch_p == pytest.approx(oracle.pvalue)
        assert found.r == pytest.approx(stats.pearsonr(a, b).statistic)


@pytest.mark.parametrize("gain", [0.0, 0.7])
def test_intervals_and_bounds_hold_the_gain_as_often_as_they_say(gain):
    a, b = np.random.default_rng(3).normal(0, 1, (2, 1500, 6))
    said = [paired(x + gain, y) for x, y in zip(a, b)]
    assert np.mean([s.low <= gain <= s.high for s in said]) == pytest.approx(0.95, abs=0.02)
    bound = np.mean([s.within >= gain for s in said])
    assert bound == 1 if gain == 0 else 0.93 < bound < 1


def test_a_gain_of_the_smallest_effect_is_found_eight_times_in_ten():
    gain = smallest_effect(5)
    d = np.random.default_rng(4).normal(gain, 1, (1500, 5))
    assert np.mean([paired(row, np.zeros(5)).p < 0.05 for row in d]) == pytest.approx(0.8, abs=0.03)
    found = paired([11, 12, 13], [10, 10, 10])
    assert found.detectable == pytest.approx(smallest_effect(3))  # at a spread of 1


def test_splits_of_one_set_need_the_correction_of_nadeau_and_bengio():
    """The gain of predicting the mean of the training part over predicting 0 is known."""
    rng, truth, held = np.random.default_rng(0), 0.3**2 - 1 / 80, []
    for _ in range(300):
        x, scores = rng.normal(0.3, 1, 100), []
        for _ in range(10):
            order = rng.permutation(100)
            test, train = x[order[:20]], x[order[20:]]
            scores.append((test**2).mean() - ((test - train.mean()) ** 2).mean())
        said = [paired(scores, np.zeros(10), shared=shared) for shared in (0.0, 0.25)]
        held.append([s.low <= truth <= s.high for s in said])
    plain, corrected = np.mean(held, 0)
    assert plain < 0.8 < 0.88 < corrected
    by_hand = paired([11, 12, 13], [10, 10, 10], shared=0.5)
    assert by_hand.t == pytest.approx(2 / math.sqrt(1 / 3 + 0.5)) and by_hand.d_z == 2


def test_new_splits_widen_every_interval_and_every_test():
    """Scores 11, 12, 13 and 9, 10, 11 by hand: each model has a spread of 1."""
    from scipy import stats

    scores = {"base": [9, 10, 11], "new": [11, 12, 13]}
    scores["new"] = scores["new"][::-1]  # so that the differences are not all equal
    table, error = significance(scores, shared=0.5), math.sqrt(1 / 3 + 0.5)
    half = stats.t.ppf(0.975, 2) * error
    assert table.loc["new", ["low", "high"]].tolist() == pytest.approx([12 - half, 12 + half])
    # Welch: two equal spreads of three runs have 4 degrees of freedom
    welch = 2 * stats.t.sf(2 / (math.sqrt(2) * error), 4)
    assert table.loc["new", "welch_p"] == pytest.approx(welch)
    assert significance(scores).loc["base", "high"] == pytest.approx(
        10 + stats.t.ppf(0.975, 2) / math.sqrt(3))


@pytest.mark.parametrize("seeds, examples, residual", [(5, 100, 0.3), (20, 60, 0.3), (4, 80, 0.0)])
def test_the_crossed_interval_holds_the_gain_as_often_as_it_says(seeds, examples, residual):
    rng, held = np.random.default_rng(0), []
    for _ in range(600):
        d = 0.02 + rng.normal(0, 0.02, (seeds, 1)) + rng.normal(0, 0.1, (1, examples))
        low, high = crossed_interval(d + rng.normal(0, residual, (seeds, examples)))
        held.append(low <= 0.02 <= high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.03)


def test_the_crossed_interval_without_examples_noise_is_that_of_the_seeds():
    d = np.random.default_rng(0).normal(1, 2, (6, 1)).repeat(40, 1)
    said = paired(d[:, 0], np.zeros(6))
    assert crossed_interval(d) == pytest.approx((said.low, said.high))
    assert crossed_interval(np.ones((3, 4))) == (1, 1)
    with pytest.raises(ValueError, match="seeds"):
        crossed_interval(np.ones((1, 4)))


# runs


def digits_like(n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return TensorDataset(
        (torch.eye(3)[y].repeat(1, 4) * 0.5 + 0.5 * torch.rand(n, 12, generator=g)), y
    )


DATA = digits_like(60), digits_like(30, 1), digits_like(30, 2)
net = partial(nn.Linear, 12, 3)


def quick_fit(
    model, data, *, epochs=2, lr=0.1, seed=0, progress=True, device=None, checkpoint=None
):
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
        rows.append(
            {
                "epoch": epoch,
                "train_loss": loss.item(),
                "train_accuracy": 0.5,
                "valid_accuracy": quick_test(model, valid)["accuracy"],
                "seconds": 0.01,
            }
        )
    return types.SimpleNamespace(frame=pd.DataFrame(rows))


def quick_test(model, data):
    x, y = data.tensors
    out = model(x).detach()
    return {
        "loss": F.cross_entropy(out, y).item(),
        "accuracy": (out.argmax(1) == y).double().mean().item(),
        "n": len(y),
        "per_step": [{"step": 0, "accuracy": 1.0}],
    }


quick = partial(compare, fit=quick_fit, evaluate=quick_test, progress=False)


def without_times(comparison):
    return sorted(
        (row["model"], row["seed"], row["accuracy"], row["loss"], row["valid_accuracy"])
        for row in comparison.record["rows"]
    )


def test_compare_gives_each_model_the_same_seed_whatever_else_runs(tmp_path):
    state = torch.get_rng_state()
    both = quick({"a": net, "b": lambda: nn.Sequential(net())}, DATA, range(3))
    alone = quick({"b": lambda: nn.Sequential(net())}, DATA, [2, 1])
    assert torch.equal(torch.get_rng_state(), state)
    assert both.scores("a") == both.scores("b")  # the same network under two names
    assert alone.scores("b") == {s: both.scores("b")[s] for s in (1, 2)}
    assert (
        len({frame.train_loss.iloc[-1] for frame in both.histories["a"]}) == 3
    )  # and different seeds do differ
    assert list(both.histories["a"][0].columns) == [
        "epoch",
        "train_loss",
        "train_accuracy",
        "valid_accuracy",
        "seconds",
    ]


def test_runs_in_other_processes_are_the_same_runs(tmp_path):
    models = {
        "a": net,
        "b": lambda: nn.Sequential(net(), nn.Tanh()),
    }  # also functions that cannot be imported
    one, two = (
        quick(models, DATA, range(2)),
        quick(models, DATA, range(2), workers=2, results=tmp_path / "two.json"),
    )
    assert without_times(one) == without_times(two)


@pytest.mark.parametrize(
    "how, error, words",
    [
        (dict(factories={}), ValueError, "factories"),
        (dict(factories={"a": net()}, data=None), ValueError, "data"),
        (dict(factories={"a": lambda: 3}), TypeError, "'a'.*module.*int"),
        (dict(data=(1,)), ValueError, "train, test"),
        (dict(seeds=[1, 1]), ValueError, "seeds"),
        (dict(seeds=[]), ValueError, "seeds"),
        (dict(settings={"seed": 1}), ValueError, "seed"),
        (dict(per_model={"c": {}}), ValueError, "'c'.*model"),
    ],
)
def test_compare_refuses_before_anything_is_trained(how, error, words):
    with pytest.raises(error, match=words):
        compare(**{"factories": {"a": net}, "data": DATA, **how}, fit=None, evaluate=None)


@pytest.mark.parametrize("how", [{}, {"fit": quick_fit, "evaluate": quick_test}])
def test_measure_gets_the_network_in_eval_mode(how):
    """Batch norm in training mode would answer from the batch, and learn from the test data."""
    made, modes = (
        lambda: nn.Sequential(
            nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
        ),
        [],
    )
    compare(
        {"a": made},
        DATA,
        range(2),
        settings={"epochs": 1},
        progress=False,
        measure=lambda model, test: modes.append([m.training for m in model.modules()]) or {},
        **how,
    )
    assert len(modes) == 2 and not any(map(any, modes))


def test_columns_that_are_not_there_are_named():
    runs = quick(
        {"a": net},
        DATA,
        range(2),
        measure=lambda model, test: {"zeros": int((model.weight == 0).sum()), "broken": math.nan},
    )
    assert runs.scores("a", "zeros") == {0: 0, 1: 0}
    for metric in ("f1", "broken"):
        with pytest.raises(ValueError, match=f"'{metric}'.*accuracy.*zeros"):
            runs.table(metric=metric)
    with pytest.raises(ValueError, match="'b'.*model.*a"):
        runs.scores("b")
    with pytest.raises(ValueError, match="accuracy_per_step"):
        runs.per_step("a")


def test_compare_with_the_real_training(tmp_path):
    from feedback_nb.cbl import CBL

    def loop():
        return CBL(
            nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)),
            ["0"],
            example=torch.rand(2, 12),
            context_dim=4,
            steps=2,
        )

    runs = compare(
        {"net": net, "loop": loop},
        DATA,
        range(2),
        settings={"epochs": 2, "batch_size": 20},
        results=tmp_path / "r.json",
        checkpoints=tmp_path / "c",
        progress=False,
    )
    assert runs.per_step("loop").shape == (2, 3) and runs.per_step("loop")[
        2
    ].tolist() == pytest.approx(list(runs.scores("loop").values()), abs=1e-6)
    losses = runs.table("net", metric="loss")["mean"]
    assert losses.to_dict() == pytest.approx(
        {name: sum(runs.scores(name, "loss").values()) / 2 for name in ("net", "loop")}
    )  # every model by that column
    assert list(runs.table("net").index) == ["net", "loop"] and [
        len(f) for f in runs.histories["loop"]
    ] == [2, 2]
    folders = sorted(p.name for p in (tmp_path / "c").iterdir())
    assert [f.rpartition("-")[0] for f in folders] == ["loop-0", "loop-1", "net-0", "net-1"]
    plain = compare(
        {"net": net}, DATA, range(2), settings={"epochs": 2, "batch_size": 20}, progress=False
    )
    assert plain.scores("net") == runs.scores("net")


# reuse: a digest of what is iterated, or none


class Plain(Dataset):
    """A data set without tensors, of which only the class is known."""

    def __init__(self, n, shift=0, lost=None):
        self.items, self.lost = [(i + shift, i % 3) for i in range(n)], lost

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return torch.full((12,), float(self.items[i][0])), self.items[i][1]


def with_train(train):
    return train, DATA[1], DATA[2]


def steps_only(model, data, **how):
    """Training that looks at nothing, so that any data will do."""
    return types.SimpleNamespace(frame=pd.DataFrame([{"epoch": 0, "seconds": 0.0}]))


blind = partial(compare, fit=steps_only, evaluate=quick_test, progress=False)
SPLITS = [random_split(DATA[0], [40, 20], torch.Generator().manual_seed(s))[0] for s in (0, 1)]


@pytest.mark.parametrize(
    "one, other",
    [
        (Subset(DATA[0], range(40)), Subset(DATA[0], range(20, 60))),
        (SPLITS[0], SPLITS[1]),
        (SPLITS[0], DATA[0]),
        (DataLoader(DATA[0], 10), DataLoader(DATA[0], 20)),
        (DataLoader(DATA[0], 10), DataLoader(DATA[0], 10, drop_last=True)),
        (DataLoader(DATA[0], 10), DataLoader(DATA[0], 10, shuffle=True)),
        (DataLoader(SPLITS[0], 10), DataLoader(SPLITS[1], 10)),
        (Plain(30), Plain(30, shift=1)),
    ],
)
def test_a_row_is_not_reused_for_other_data(one, other, tmp_path):
    file = tmp_path / "runs.json"
    first = blind({"a": net}, with_train(one), [0], results=file)
    again = blind({"a": net}, with_train(one), [0], results=file, measure=None)
    assert again.record == first.record and len(again.frame) == 1
    with pytest.raises(ValueError, match="data.train"):
        blind({"a": net}, with_train(other), [0], results=file)


def test_data_that_cannot_be_told_apart_are_not_reused(tmp_path):
    unknown = with_train(Plain(30, lost=lambda: 1))  # a function without a name: no pickle
    file = tmp_path / "runs.json"
    blind({"a": net}, unknown, [0], results=file)
    with pytest.raises(ValueError, match="train"):
        blind({"a": net}, unknown, [0, 1], results=file)
    with pytest.raises(ValueError, match="train"):
        blind({"a": net}, unknown, [0], checkpoints=tmp_path)


def test_the_digest_is_of_the_content_and_the_same_in_another_process():
    assert describe_data(Plain(5)) == describe_data(Plain(5)) != describe_data(Plain(5, 1))
    assert describe_data(SPLITS[0]) != describe_data(SPLITS[1])
    code = (
        "from test_evaluation import *; print(describe_data(SPLITS[0]), describe_data(Plain(5)), "
        "describe_data(DataLoader(DATA[0], 7)))"
    )
    folder = Path(__file__).parent
    how = dict(capture_output=True, text=True, check=True, cwd=folder)
    out = subprocess.run([sys.executable, "-c", code], **how).stdout.strip()
    here = describe_data(SPLITS[0]), describe_data(DataLoader(DATA[0], 7))
    assert all(found["digest"] in out for found in here)


@pytest.mark.parametrize("other", ["data", "model"])
def test_checkpoints_of_other_data_or_another_model_are_not_taken(other, tmp_path):
    folders = []

    def watched(model, data, *, checkpoint, **how):
        folders.append(checkpoint)
        checkpoint.mkdir(parents=True)
        return steps_only(model, data)

    run = partial(compare, fit=watched, evaluate=quick_test, progress=False, seeds=[0])
    run({"a": net}, DATA, checkpoints=tmp_path / "c")
    data = with_train(digits_like(60, 5)) if other == "data" else DATA
    model = partial(nn.Linear, 12, 3, bias=False) if other == "model" else net
    run({"a": model}, data, checkpoints=tmp_path / "c")
    assert len(set(folders)) == 2


def wrapped_batch_norm():
    net = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    return CBL(net, ["0", "2"], example=torch.zeros(2, 12))


def test_runs_of_a_wrapped_batch_norm_are_found_again(tmp_path):
    trained = []

    def watched(model, data, *, checkpoint, **how):
        trained.append(checkpoint)
        return steps_only(model, data)

    run = partial(compare, {"a": wrapped_batch_norm}, DATA, [0], progress=False, fit=watched,
                  evaluate=quick_test, checkpoints=tmp_path / "c")
    run(results=tmp_path / "runs")
    run(results=tmp_path / "runs")  # which holds that run
    assert len(trained) == 1
    run()  # killed before the results were written: its checkpoints are found
    assert len(trained) == 2 and trained[0] == trained[1]


@pytest.mark.parametrize("name", ["../out", "..", "a/b", "/etc", "CNN, wider"])
def test_no_name_of_a_model_leads_out_of_the_checkpoints(name, tmp_path):
    inside = tmp_path / "c"
    how = dict(settings={"epochs": 1, "batch_size": 20}, progress=False)
    compare({name: net}, DATA, [0], checkpoints=inside, **how)
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and len(list(inside.iterdir())) == 1


def test_what_measure_returns_harms_no_row(tmp_path):
    def greedy(model, test):
        pair, table = torch.tensor([1.0, math.nan]), pd.DataFrame({"x": [1]})
        return {"accuracy": -1.0, "seed": 7, "model": "b", "pair": pair, "odd": table, "f1": 0.5}

    file = tmp_path / "runs.json"
    with pytest.warns(RuntimeWarning, match="accuracy, model, seed"):
        runs = quick({"a": net}, DATA, range(2), measure=greedy, results=file)
    plain = quick({"a": net}, DATA, range(2))
    assert runs.scores("a") == plain.scores("a") and runs.scores("a", "f1") == {0: 0.5, 1: 0.5}
    row = runs.record["rows"][0]
    assert row["measured_seed"] == 7 and row["measured_model"] == "b"
    assert row["pair"] == [1.0, None] and row["measured_accuracy"] == -1
    again = quick({"a": net}, DATA, range(2), measure=greedy, results=file)  # none is repeated
    assert again.record["rows"] == runs.record["rows"]
    one = quick({"a": net}, DATA, [0], measure=lambda model, test: torch.ones(2))
    assert one.record["rows"][0]["measured"] == [1.0, 1.0]


def new_split(seed):
    x, y = DATA[0].tensors
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    parts = order[:30], order[30:40], order[40:]
    return tuple(TensorDataset(x[i], y[i]) for i in parts)


def test_each_seed_has_its_own_split_and_the_table_knows(tmp_path):
    file = tmp_path / "runs.json"
    runs = quick({"a": net, "b": net}, new_split, range(3), results=file)
    for seed in range(3):
        alone = quick({"a": net}, new_split(seed), [seed])
        assert alone.scores("a")[seed] == runs.scores("a")[seed]
    assert runs.shared == pytest.approx(20 / 30)
    scores = {name: runs.scores(name, "loss") for name in ("a", "b")}
    scores["b"] = {seed: v + 0.1 * seed for seed, v in scores["b"].items()}
    expected = paired(scores["b"].values(), scores["a"].values(), shared=20 / 30)
    assert significance(scores, shared=runs.shared).loc["b", "p"] == pytest.approx(expected.p)
    assert quick({"a": net}, new_split, range(4), results=file).frame.seed.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="another split"):
        quick({"a": net}, lambda seed: new_split(seed + 9), range(3), results=file)
    with pytest.raises(ValueError, match="splits"):
        quick({"a": net}, new_split(0), range(3), results=file)


def test_right_answers_can_be_resampled():
    runs = quick({"a": net, "b": net}, DATA, range(3), measure=right_answers)
    right = runs.examples("a")
    assert right.shape == (3, 30)
    assert right.mean(1).tolist() == pytest.approx(list(runs.scores("a").values()))
    with pytest.raises(ValueError, match="right"):
        quick({"a": net}, DATA, [0]).examples("a")


def test_every_table_shows_what_it_could_have_seen():
    table = significance({"base": [1.0, 2.0, 3.5], "new": [1.5, 2.5, 4.5]})
    row = table.loc["new"]
    assert {"r", "welch_p", "within", "detectable"} <= set(table.columns)
    assert row.detectable == pytest.approx(smallest_effect(3) * abs(row.difference / row.d_z))
    assert row.within > abs(row.difference)


def test_importing_the_module_loads_nothing_heavy():
    code = (
        "import sys; import feedback_nb.evaluation; "
        "heavy = ('pandas', 'scipy', 'captum', 'torchmetrics', 'joblib', 'matplotlib'); "
        "print([m for m in (*heavy, 'feedback_nb.data') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert out.stdout.strip() == "[]"
