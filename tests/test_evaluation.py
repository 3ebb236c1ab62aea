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
from torch.utils.data import TensorDataset

from feedback_nb.evaluation import compare, holm, paired, significance

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
    assert paired([0.1 + 0.2, 1], [0.3, 1])[3:] == (0, 0, 1, 1, 0)


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
    """Batch norm in training mode would answer from the batch it is shown, and learn from the test data."""
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
    with pytest.raises(ValueError, match="accuracy per step"):
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
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "loop-0",
        "loop-1",
        "net-0",
        "net-1",
    ]
    plain = compare(
        {"net": net}, DATA, range(2), settings={"epochs": 2, "batch_size": 20}, progress=False
    )
    assert plain.scores("net") == runs.scores("net")


def test_importing_the_module_loads_nothing_heavy():
    code = (
        "import sys; import feedback_nb.evaluation; "
        "print([m for m in ('pandas', 'scipy', 'captum', 'torchmetrics', 'joblib', 'matplotlib', 'feedback_nb.training', 'feedback_nb.data') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert out.stdout.strip() == "[]"
