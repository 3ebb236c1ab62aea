"""What a user of `fit`, `evaluate` and their checkpoints relies on."""
import contextlib
import gc
import inspect
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import torchrun
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from feedback_nb import checkpoints, gradients, training
from feedback_nb.feedback import FeedbackModel, State, stepwise_loss
from feedback_nb.training import (
    CheckpointError,
    Clip,
    History,
    accuracy,
    batch_order,
    batches,
    evaluate,
    fit,
    load_checkpoint,
)

ROOT = Path(__file__).parent.parent


def toy(n=60, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g)
    return TensorDataset(x, (x @ torch.randn(6, 3,
                                             generator=torch.Generator().manual_seed(7))).argmax(1))


TRAIN, VALID = toy(61), toy(30, 2)


class Net(nn.Module):
    """Small, but with everything that makes resuming hard: buffers, dropout."""

    def __init__(self, width=8):
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(6, width), nn.BatchNorm1d(
            width), nn.Dropout(0.3), nn.Linear(width, 3)

    def forward(self, x):
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


class Loop(FeedbackModel):
    def __init__(self, steps=2):
        super().__init__(steps=steps)
        self.a, self.b, self.c, self.passes = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(3, 8), 0

    def start(self, x, *, states=False):
        self.passes += 1
        h = torch.tanh(self.a(x))
        return State(h, self.b(h))

    def step(self, x, state, t):
        h = torch.tanh(self.a(x) + self.c(state.y))
        return State(h, self.b(h))


class Local(nn.Module):
    """Brings its own backward pass."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x):
        return self.net(x)

    def local_backward(self, x, y):
        loss = F.cross_entropy(self(x), y)
        loss.backward()
        return loss.detach()


def build(cls=Net, seed=0, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(**kwargs)


def noisy(x):
    """Draws from all three generators that `fit` looks after."""
    return x + 0.1 * torch.randn_like(x) + random.gauss(0, 0.01) + float(np.random.normal(0, 0.01))


def run(model, data=(TRAIN, VALID), **kwargs):
    kwargs = {"epochs": 2, "batch_size": 16, "lr": 1e-2, "device": "cpu", "progress": False,
              **kwargs}
    return fit(model, data, **kwargs)


def weights(model):
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def assert_same(a, b):
    """Bit for bit."""
    a, b = (weights(m) if isinstance(m, nn.Module) else m for m in (a, b))
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def rows(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]


class StopAt:
    """A callback that presses Ctrl-C in optimiser step `step`, after the weights have moved."""

    def __init__(self, step):
        self.step = step

    def after_step(self, model):
        self.step -= 1
        if self.step < 0:
            raise KeyboardInterrupt


class Average(torch.optim.swa_utils.AveragedModel):
    """The moving average of chapter 03."""

    def __init__(self, model, decay):
        mean = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
        super().__init__(model, multi_avg_fn=mean, use_buffers=True)

    def after_step(self, model):
        self.update_parameters(model)

    def __call__(self, history, model):
        scores = evaluate(self.module, VALID)
        history.rows[-1] |= {f"valid_{name}": scores[name] for name in ("loss", "accuracy")}


# ── seeds and order ───────────────────────────────────────────────────────────────────────────────


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    a, b, c = (build() for _ in range(3))
    first, second, third = run(a, augment=noisy), run(b, augment=noisy), run(c, augment=noisy,
        seed=1)
    assert_same(a, b)
    assert rows(first) == rows(second) != rows(third)
    assert not torch.equal(a.a.weight, c.a.weight)


def test_random_state_and_modes_are_put_back():
    model = build().eval()
    model.drop.train()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    run(model, augment=noisy)
    evaluate(model, VALID)
    with pytest.raises(KeyboardInterrupt):
        run(model, augment=noisy, callbacks=[StopAt(3)])
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert model.drop.training and not model.norm.training and not model.training
    assert all(p.grad is None for p in model.parameters())


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_has_every_example_once_in_even_batches(n, batch_size, seed, epoch):
    order = batch_order(n, batch_size, seed=seed, epoch=epoch)
    assert sorted(sum(order, [])) == list(range(n))
    sizes = [len(batch) for batch in order]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1 and len(order) == math.ceil(n
        / batch_size)
    assert order == batch_order(n, batch_size, seed=seed, epoch=epoch)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 4), st.integers(1, 4))
def test_processes_share_a_batch_and_a_start_in_the_middle_gives_the_rest(n, batch_size, start,
    world):
    data = TensorDataset(torch.arange(n), torch.arange(n))
    whole = [i for i, _, _ in batches(data, batch_size, seed=3, epoch=2)]
    assert [i for i, _, _ in batches(data, batch_size, seed=3, epoch=2, start=start)] == whole[
        start:]
    parts = [list(batches(data, batch_size, seed=3, epoch=2, rank=r, world=world))
             for r in range(world)]
    for k, batch in enumerate(whole):
        mine = [p[k][0] for p in parts if p[k][1] > 0]
        assert sorted(sum(mine, [])) == sorted(batch)
        assert sum(p[k][1] for p in parts) == pytest.approx(1)


# ── where the data come from


class Whole(Dataset):
    """Answers for a whole batch at once, as feedback_nb.data does."""

    def __init__(self, data):
        self.x, self.y, self.asked = *data.tensors, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])

    def __getitems__(self, indices):
        self.asked += 1
        return self.x[indices], self.y[indices]


class Single(Whole):
    __getitems__ = None

    def __getattribute__(self, name):
        if name == "__getitems__":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_all_kinds_of_data_sets_train_alike_and_a_batch_is_one_request():
    models = [build() for _ in range(4)]
    whole = Whole(TRAIN)
    for model, data in zip(models, (TRAIN, whole, Single(TRAIN), Subset(TRAIN, range(len(TRAIN))))):
        run(model, data)
    for other in models[1:]:
        assert_same(models[0], other)
    assert whole.asked == 2 * math.ceil(len(TRAIN) / 16)


class Noise(Dataset):
    """Random reading: what comes out must not depend on who reads."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return torch.randn(6) + random.random(), i % 3


def test_reading_ahead_in_other_processes_changes_nothing():
    a, b = build(), build()
    run(a, Noise(), epochs=1)
    ahead = Noise()
    ahead.workers = 1
    run(b, ahead, epochs=1)
    assert_same(a, b)


def test_a_dataloader_is_taken_as_it_is_and_resumes_too(tmp_path):
    def loader():
        return DataLoader(TRAIN, batch_size=9, shuffle=True,
                          generator=torch.Generator().manual_seed(5))

    whole, part, again = build(), build(), build()
    history = run(whole, loader(), augment=noisy)
    assert rows(history)[0]["train_loss"] > 0 and math.isnan(rows(history)[0]["valid_loss"])
    with pytest.raises(KeyboardInterrupt):
        run(part, loader(), augment=noisy, callbacks=[StopAt(11)], checkpoint=(tmp_path, 2))
    run(again, loader(), augment=noisy, checkpoint=(tmp_path, 2))
    assert_same(whole, again)


def test_data_that_cannot_be_trained_on_are_refused():
    x, y = TRAIN.tensors
    with pytest.raises(ValueError, match="TensorDataset"):
        run(build(), (x, y))
    with pytest.raises(ValueError, match="empty"):
        run(build(), TensorDataset(x[:0], y[:0]))
    with pytest.raises(ValueError, match="pair"):
        run(build(), TensorDataset(x))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from zip(x, y)

    with pytest.raises(ValueError, match="Dataset with a length"):
        run(build(), Stream())


# ── what is trained ───────────────────────────────────────────────────────────────────────────────


def test_one_step_is_the_step_one_would_write_by_hand():
    model, hand = build(nn.Linear, in_features=6, out_features=3), build(nn.Linear, in_features=6,
        out_features=3)
    x, y = TRAIN.tensors
    history = run(model, epochs=3, batch_size=100, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    opt = torch.optim.SGD(hand.parameters(), lr=0.5)
    for epoch in range(3):
        opt.zero_grad()
        loss = F.cross_entropy(hand(x), y)
        loss.backward()
        opt.step()
        assert history.rows[epoch]["train_loss"] == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(model.weight, hand.weight)
    assert history.rows[-1]["valid_accuracy"] == pytest.approx((hand(VALID.tensors[0]).argmax(1)
        == VALID.tensors[1]).float().mean().item())
    assert list(history.frame.columns) == ["epoch", "lr", "train_loss", "train_accuracy",
                                           "valid_loss", "valid_accuracy", "seconds"]
    assert history.frame.epoch.tolist() == [0, 1, 2] and (history.frame.lr == 0.5).all()


def test_a_feedback_model_learns_from_every_step():
    model, hand = build(Loop), build(Loop)
    x, y = TRAIN.tensors
    history = run(model, TRAIN, epochs=1, batch_size=100, weights=[1, 0, 2])
    opt = torch.optim.Adam(hand.parameters(), lr=1e-2)
    loss = stepwise_loss(hand.trajectory(x), y, weights=[1, 0, 2])
    loss.backward()
    opt.step()
    torch.testing.assert_close(weights(model), weights(hand))
    assert history.rows[0]["train_loss"] == pytest.approx(loss.item(), abs=1e-6)


@pytest.mark.parametrize("accumulate", [2, 3, 7, 100])
@pytest.mark.parametrize("cls", [Loop, Local])
def test_pieces_of_a_batch_add_up_to_the_batch(cls, accumulate):
    whole, pieces = build(cls), build(cls)
    a, b = run(whole), run(pieces, accumulate=accumulate)
    torch.testing.assert_close(weights(whole), weights(pieces), atol=1e-5, rtol=1e-4)
    assert b.rows[-1]["train_loss"] == pytest.approx(a.rows[-1]["train_loss"], abs=1e-5)


def test_a_models_own_backward_pass_is_used():
    own, plain = build(Local), build(Local)
    history = run(own)
    run(plain.net)
    assert_same(own.net, plain.net)
    assert math.isnan(history.rows[0]["train_accuracy"]) and 0 <= history.rows[0][
        "valid_accuracy"] <= 1


def test_averaged_weights_follow_the_definition_and_are_what_is_validated(tmp_path):
    seen, model = [], build()
    average = Average(model, 0.9)

    def look(history, model):
        seen.append(weights(model))

    how = dict(batch_size=100, checkpoint=tmp_path)
    history = run(model, epochs=3, callbacks=[look, average], **how)
    expected = seen[0]
    for after in seen[1:]:
        expected = {k: 0.9 * expected[k] + 0.1 * v if v.is_floating_point() else v
                    for k, v in after.items()}
    found = weights(average.module)
    for name in (key for key in found if "num" not in key):  # torch counts batches its own way
        torch.testing.assert_close(found[name], expected[name])
    loss = F.cross_entropy(average.module.eval()(VALID.tensors[0]), VALID.tensors[1]).item()
    assert history.rows[-1]["valid_loss"] == pytest.approx(loss, abs=1e-6)
    again = Average(build(seed=4), 0.9)
    run(build(seed=5), epochs=3, callbacks=[again], **how)
    assert_same(again.module, average.module)
    with pytest.raises(CheckpointError, match="callbacks"):
        run(build(), epochs=3, **how)


def test_bf16_trains_float32_weights_and_fp16_is_refused_on_a_cpu():
    model = build(Loop)
    history = run(model, precision="bf16", epochs=3)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert history.rows[-1]["train_loss"] < history.rows[0]["train_loss"]
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match="bf16"):
        run(build(), precision="fp16")
    with pytest.raises(ValueError, match="precision"):
        run(build(), precision="float8")


def test_a_compiled_model_takes_the_same_steps(tmp_path):
    plain, compiled = build(Loop), build(Loop)
    run(plain)
    run(torch.compile(compiled, backend="eager"), checkpoint=tmp_path)
    torch.testing.assert_close(weights(plain), weights(compiled))
    load_checkpoint(build(Loop), tmp_path)  # the keys are the model's own


@pytest.mark.parametrize("schedule, expected", [
    ("cosine", [1.0, 0.5, 0.0]), ("warmup-cosine", [0.2, None, 0.0]), ("step", [1.0, 0.1, 0.01]),
    ("one-cycle", [0.04, None, 0.0])])
def test_schedules_start_turn_and_end_where_they_should(schedule, expected):
    model = build()
    opt = training.make_optimizer(model, "adamw", 1.0)
    schedule = training.make_schedule(opt, schedule, 100)
    rates = []
    for _ in range(100):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        schedule.step()
    for rate, value in zip((rates[0], rates[50], rates[-1]), expected):
        assert value is None or rate == pytest.approx(value, abs=2e-3)
    assert max(rates) == pytest.approx(1.0, abs=2e-3)


def test_a_factory_brings_its_own_optimizer_and_schedule():
    history = run(build(), optimizer=partial(torch.optim.SGD, lr=0.25),
                  schedule=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 4, 0.5))
    assert history.frame.lr.tolist() == [0.25, 0.125]


def test_a_compiled_model_keeps_the_loss_of_every_step():
    histories, scores, found = [], [], []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager")):
        model = wrap(build(Loop))
        histories.append(run(model, weights=[0, 0, 1]).rows)
        scores.append(evaluate(model, VALID)["per_step"])
        found.append(weights(getattr(model, "_orig_mod", model)))
    assert len(scores[1]) == 3
    for rows in (histories, scores):
        for plain, compiled in zip(*rows):
            for name in plain.keys() - {"seconds"}:
                assert plain[name] == pytest.approx(compiled[name], rel=1e-5)
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])


@pytest.mark.parametrize(("options", "match"), [
    ({"optimizer": "adamm"}, "adamw"), ({"schedule": "cos"}, "cosine"), ({"lr": -1.0}, "lr"),
    ({"epochs": 0}, "epochs"), ({"batch_size": 0}, "batch_size"), ({"seed": 0.5}, "seed"),
    ({"accumulate": 0}, "accumulate"), ({"checkpoint": ("run", 0)}, "between checkpoints"),
    pytest.param({"loss": partial(F.cross_entropy, reduction="none")}, "reduction", id="loss")],
    ids=str)
def test_options_that_mean_nothing_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        run(build(), **options)


def test_models_that_cannot_be_trained_so_are_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        run(build().requires_grad_(False))
    with pytest.raises(ValueError, match="compile"):
        run(torch.compile(build(Local), backend="eager"))
    with pytest.raises(ValueError, match="norm"):
        Clip(0.0)


@pytest.mark.parametrize("name", training.INSTEAD)
def test_an_argument_that_is_gone_says_what_to_write(name):
    with pytest.raises(TypeError, match=f"{name}=.*write"):
        run(build(), **{name: 1})
    assert len(inspect.signature(fit).parameters) <= 18
    with pytest.raises(TypeError, match="nonsense"):
        run(build(), nonsense=1)


def test_label_smoothing_is_a_loss():
    x, y = TRAIN.tensors
    model = build(nn.Linear, in_features=6, out_features=3)
    before = F.cross_entropy(model(x), y, label_smoothing=0.2).item()
    smooth = nn.CrossEntropyLoss(label_smoothing=0.2)
    history = run(model, (TRAIN, TRAIN), batch_size=100, epochs=1, loss=smooth, lr=1e-9)
    assert history.rows[0]["train_loss"] == pytest.approx(before, abs=1e-6)


def test_clipping_bounds_the_step():
    model = build(nn.Linear, in_features=6, out_features=3)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    sgd = partial(torch.optim.SGD, lr=1.0)
    run(model, batch_size=100, epochs=1, callbacks=[Clip(1e-3)], optimizer=sgd)
    weight, bias = (model.weight - before[0]).norm().item(), (model.bias - before[1]).norm().item()
    assert math.hypot(weight, bias) == pytest.approx(1e-3, rel=1e-3)


def test_callbacks_see_the_history_and_can_end_the_run(tmp_path):
    seen = []

    def callback(history, model):
        seen.append(len(history))
        return len(history) == 2

    history = run(build(), epochs=5, callbacks=[callback], checkpoint=tmp_path)
    assert seen == [1, 2] and len(history) == 2
    # it stays ended
    assert len(run(build(), epochs=5, callbacks=[callback], checkpoint=tmp_path)) == 2
    assert seen == [1, 2]


def test_tensorboard_gets_the_rows(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    def log(history, model):
        writer.add_scalar("valid_loss", history.rows[-1]["valid_loss"], len(history))

    with SummaryWriter(str(tmp_path)) as writer:
        history = run(build(), callbacks=[log])
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("valid_loss")
    assert [event.value for event in found] == pytest.approx(history.frame.valid_loss.tolist())


class Painter(FeedbackModel):
    """(B, 1, H, W) -> a class for each pixel (B, 2, H, W), or with `whole` one for the picture
    (B, 2)."""

    def __init__(self, whole=False, steps=2):
        super().__init__(steps=steps)
        self.a, self.b, self.c, self.whole = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2,
            1), nn.Conv2d(2, 4, 1), whole

    def start(self, x, *, states=False):
        h = torch.relu(self.a(x))
        return State(h, self.b(h))

    def step(self, x, state, t):
        h = torch.relu(self.a(x) + self.c(state.y))
        return State(h, self.b(h))

    def trajectory(self, x, **options):
        found = super().trajectory(x, **options)
        if self.whole:
            found.outputs = [y.mean((2, 3)) for y in found.outputs]
        return found


def test_masks_and_spectrograms_train_with_a_loss_at_every_step():
    # a picture, or 8 bands of a sound at 10 times
    x = torch.rand(24, 1, 8, 10, generator=torch.Generator().manual_seed(0))
    masks, loud = (x[:, 0] > 0.5).long(), (x.mean((1, 2, 3)) > 0.5).long()
    share = lambda output, target: output.argmax(1).float().mean((1, 2))  # (B,)
    painter, listener = build(Painter), build(Painter, whole=True)
    data = TensorDataset(x, masks)
    with torch.no_grad():
        by_hand = torch.stack([F.cross_entropy(y, masks)
                               for y in painter.trajectory(x).outputs]).mean().item()
        right = (painter(x).argmax(1) == masks).float().mean().item()
    history = run(painter, (data, data), batch_size=24, epochs=30, lr=3e-2)
    assert history.rows[0]["train_loss"] == pytest.approx(by_hand, abs=1e-6) and history.rows[0][
        "train_accuracy"] == pytest.approx(right, abs=1e-6)
    assert history.rows[-1]["valid_accuracy"] > 0.9 > history.rows[0]["valid_accuracy"]
    scores = evaluate(painter, data, metrics={"share": share}, batch_size=7)
    assert [row["step"] for row in scores["per_step"]] == [0, 1, 2]
    assert scores["share"] == pytest.approx(painter(x).argmax(1).float().mean().item(), abs=1e-6)
    history = run(listener, (TensorDataset(x, loud), TensorDataset(x, loud)), batch_size=24,
                  epochs=2)
    assert history.rows[1]["train_loss"] < history.rows[0]["train_loss"] and len(evaluate(listener,
        TensorDataset(x, loud))["per_step"]) == 3


# ── evaluate ──────────────────────────────────────────────────────────────────────────────────────


def test_evaluate_scores_every_step_from_one_pass():
    model = build(Loop, steps=3).train()
    x, y = VALID.tensors
    model.passes = 0
    result = evaluate(model, VALID, batch_size=7)
    assert model.passes == math.ceil(30 / 7) and model.training
    for t, row in enumerate(result["per_step"]):
        output = model(x, steps=t)
        assert row["step"] == t
        assert row["loss"] == pytest.approx(F.cross_entropy(output, y).item(), abs=1e-6)
        assert row["accuracy"] == pytest.approx((output.argmax(1) == y).float().mean().item(),
                                                abs=1e-6)
    assert (result["loss"], result["n"],
            len(result["per_step"])) == (result["per_step"][-1]["loss"], 30, 4)
    assert len(evaluate(model, VALID, steps=1)["per_step"]) == 2
    with pytest.raises(ValueError, match="FeedbackModel"):
        evaluate(build(), VALID, steps=2)


def test_evaluate_counts_a_batch_that_settled_early_where_it_came_to_rest():
    model = build(Loop, steps=30)
    model.tol = 1e-3
    x, y = VALID.tensors
    result = evaluate(model, VALID, batch_size=1)
    assert len(result["per_step"]) < 31
    rest = model.eval().trajectory(x).output
    assert result["loss"] == pytest.approx(F.cross_entropy(rest, y).item(), abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40))
def test_the_batch_size_does_not_change_an_evaluation(batch_size):
    model = build(Loop)
    a, b = evaluate(model, VALID, batch_size=batch_size), evaluate(model, DataLoader(VALID, 30))
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-6) and a["accuracy"] == b["accuracy"]


def test_metrics_are_averaged_over_examples():
    def largest(output, target):  # one number per example
        return output.softmax(1).amax(1)

    result = evaluate(build(Loop), VALID, batch_size=7, metrics={"confidence": largest})
    expected = largest(build(Loop)(VALID.tensors[0]), None).mean().item()
    assert result["confidence"] == pytest.approx(expected, abs=1e-6)


def test_accuracy_of_classes_pixels_and_numbers():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1])).item() == pytest.approx(2 / 3)
    masks = torch.zeros(1, 2, 2, 2)
    masks[0, 1, 0, 0] = 1  # class 1 in one corner
    assert accuracy(masks, torch.tensor([[[1, 0], [0, 1]]])).item() == 0.75
    assert accuracy(torch.zeros(3, 1), torch.zeros(3, 1)).isnan()
    assert accuracy(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)).isnan()


def test_an_accuracy_counts_neither_ignored_labels_nor_answers_that_are_none():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [float("nan"), 0.0]])
    assert accuracy(logits, torch.tensor([0, 1, -100, -100])).item() == 1.0
    assert accuracy(logits, torch.tensor([0, 1, 1, 0])).item() == 0.5
    assert accuracy(torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([1, 0, 0])).item() == \
        pytest.approx(2 / 3)
    ignored = torch.tensor([0, 0, 1, 0])  # the label that does not count is a class number too
    assert accuracy(torch.tensor([[2.0, 0]] * 2 + [[0, 2.0]] * 2), ignored, 0).item() == 1.0
    data = TensorDataset(torch.eye(4), torch.tensor([0, 1, -100, 3]))
    for batch_size in (1, 3, 4):
        scores = evaluate(nn.Identity(), data, batch_size=batch_size)
        assert (scores["accuracy"], scores["n"]) == (1.0, 4)
        right = F.cross_entropy(torch.eye(4), data.tensors[1]).item()
        assert scores["loss"] == pytest.approx(right, abs=1e-6)


LOSSES = {"partial": partial(F.cross_entropy, weight=torch.tensor([1.0, 5.0, 0.2])),
          "module": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]), ignore_index=2),
          "plain": F.cross_entropy}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_batch_size_does_not_change_a_weighted_loss(loss):
    x, y = VALID.tensors
    y = y.clone()
    y[::7] = loss.ignore_index if isinstance(loss, nn.Module) else -100
    model = build(nn.Linear, in_features=6, out_features=3)
    whole = loss(model(x), y).item()
    for batch_size in (2, 7, 30):
        scores = evaluate(model, TensorDataset(x, y), batch_size=batch_size, loss=loss)
        assert scores["loss"] == pytest.approx(whole, abs=1e-6)
    trained = [build(nn.Linear, in_features=6, out_features=3) for _ in range(2)]
    for net, pieces in zip(trained, (1, 5)):
        run(net, TensorDataset(x, y), loss=loss, accumulate=pieces, epochs=1)
    torch.testing.assert_close(trained[0].weight, trained[1].weight)


class Weighted(nn.Module):
    """A weighted mean in a function of the user's own, which says what the mean was divided by."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, output, target):
        losses = F.cross_entropy(output, target, reduction="none") * self.weight[target]
        return losses.sum() / self.count(target)

    def count(self, target):
        return self.weight[target].sum()


@pytest.mark.parametrize("weight", [[1.0, 5.0, 0.2], [1.0, 0.0, 0.0]], ids=["all", "one"])
def test_a_loss_that_counts_is_the_same_in_batches_of_any_size(weight):
    x, y = VALID.tensors
    loss, model = Weighted(torch.tensor(weight)), build(nn.Linear, in_features=6, out_features=3)
    plain = lambda output, target: loss(output, target)
    scores = [evaluate(model, VALID, batch_size=n, loss=loss)["loss"] for n in (1, 2, 7, 30)]
    assert scores == pytest.approx([loss(model(x), y).item()] * 4, abs=1e-6)
    hidden = [evaluate(model, VALID, batch_size=n, loss=plain)["loss"] for n in (7, 30)]
    assert hidden[0] != pytest.approx(hidden[1], abs=1e-3)
    trained = [build(nn.Linear, in_features=6, out_features=3) for _ in range(2)]
    for net, pieces in zip(trained, (1, 5)):
        run(net, VALID, loss=loss, accumulate=pieces, epochs=1)
    torch.testing.assert_close(trained[0].weight, trained[1].weight)


class Ordered(TensorDataset):
    """Data with an order of their own, and epochs that they are told."""

    def set_epoch(self, epoch):
        self.told = [*getattr(self, "told", []), epoch]

    def order(self, seed, epoch):
        return list(range(len(self)))[:: -1 if epoch % 2 else 1]


def test_data_may_bring_their_own_order_and_are_told_the_epoch(tmp_path):
    data = Ordered(torch.rand(20, 6), torch.arange(20) % 3)
    seen = {epoch: [i for indices, _, _ in batches(data, 8, seed=1, epoch=epoch) for i in indices]
            for epoch in (0, 1, None)}
    assert seen == {0: [*range(20)], 1: [*range(19, -1, -1)], None: [*range(20)]}
    assert data.told == [0, 1]  # nothing is told for an evaluation
    run(build(), data, epochs=1, checkpoint=tmp_path)
    data.order = lambda seed, epoch: [*range(10, 20), *range(10)]
    with pytest.raises(CheckpointError, match="training data"):
        run(build(), data, epochs=2, checkpoint=tmp_path)


def test_without_a_seed_batches_are_full_and_no_random_number_is_drawn():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    plain = [indices for indices, _, _ in batches(VALID, 7, seed=None)]
    assert list(map(len, plain))[:-1] == [7] * (len(VALID) // 7)
    assert sum(plain, []) == list(range(len(VALID)))
    torch.testing.assert_close(torch.get_rng_state(), before[0], atol=0, rtol=0)
    assert np.random.get_state()[1].tolist() == before[1]


def test_a_seed_of_numpy_is_the_same_seed():
    a, b = build(), build()
    run(a, seed=3, augment=noisy)
    run(b, seed=np.int64(3), augment=noisy, epochs=np.int64(2))
    assert_same(a, b)
    assert batch_order(9, 2, seed=np.int64(3), epoch=1) == batch_order(9, 2, seed=3, epoch=1)


def test_an_error_leaves_the_statistics_of_batch_norm_as_they_were():
    x, y = (tensor.clone() for tensor in TRAIN.tensors)
    x[17, 2] = float("nan")
    model, seen = build(), []

    class Look:
        def after_step(self, model):
            seen.append(weights(model))

    before = weights(model)
    with pytest.raises(FloatingPointError):
        run(model, TensorDataset(x, y), callbacks=[Look()])
    assert_same(model, seen[-1] if seen else before)
    assert model.norm.running_mean.isfinite().all()


def test_a_batch_norm_that_the_user_froze_is_not_trained():
    model = build()
    model.norm.eval()
    before = model.norm.running_mean.clone()
    run(model, epochs=1)
    assert torch.equal(model.norm.running_mean, before) and not model.norm.training
    whole = build().eval()  # a model that was evaluated is trained as a whole
    run(whole, epochs=1)
    assert not torch.equal(whole.norm.running_mean, before)
    whole = build().eval()
    whole.norm.requires_grad_(False)
    run(whole, epochs=1)
    assert torch.equal(whole.norm.running_mean, before)


def test_what_is_kept_of_an_evaluation_does_not_grow_with_the_data():
    class Wide(nn.Module):
        def forward(self, x):
            sizes = [t.numel() for t in gc.get_objects() if type(t) is torch.Tensor]
            held.append(sum(size for size in sizes if size >= 3 * 64 * 64))
            return x[:, None, None, None].expand(-1, 3, 64, 64).clone()

    held = []
    data = TensorDataset(torch.rand(12), torch.zeros(12, 64, 64, dtype=torch.long))
    share = {"share": lambda output, target: output.argmax(1).float().mean((1, 2))}
    evaluate(Wide(), data, batch_size=1, metrics=share)
    run(nn.Sequential(Wide(), nn.Conv2d(3, 3, 1)), (data, data), epochs=1, batch_size=1)
    assert max(held[2:12]) <= max(held[:2])


def test_regression_has_a_loss_and_no_accuracy():
    x, _ = TRAIN.tensors
    data = TensorDataset(x, x[:, :1])
    model = nn.Linear(6, 1)
    history = run(model, (data, data), loss=F.mse_loss, epochs=1)
    assert math.isnan(history.rows[0]["valid_accuracy"]) and history.rows[0]["valid_loss"] > 0


# ── stopping and going on ─────────────────────────────────────────────────────────────────────────

OPTIONS = [
    {}, {"every": 1}, {"every": 3, "ema": True, "schedule": "one-cycle", "optimizer": "sgd"},
    {"every": 2, "schedule": "warmup-cosine", "clip": True, "accumulate": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("step", [0, 1, 4, 6, 11])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, options, step):
    how = {k: v for k, v in options.items() if k not in ("every", "ema", "clip")}
    how |= {"epochs": 3, "augment": noisy}
    folder = (tmp_path, options["every"]) if "every" in options else tmp_path

    def go(model, *more, **where):
        average = [Average(model, 0.9)] if "ema" in options else []
        clip = [Clip(1.0)] if "clip" in options else []
        return run(model, callbacks=[*average, *clip, *more], **how, **where)

    whole, part, again = build(), build(), build(seed=9)
    history = go(whole)
    with pytest.raises(KeyboardInterrupt, match="to go on") as caught:
        go(part, StopAt(step), checkpoint=folder)
    assert rows(caught.value.history) == rows(history)[: step // 4]
    resumed = go(again, checkpoint=folder)
    assert_same(whole, again)
    assert rows(resumed) == rows(history) == rows(History.read(tmp_path))


KILL = '''
import os, random, signal, sys, time
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset
torch.set_num_threads(1)
import safetensors.torch, tqdm.auto  # once, here: the children are forked
torch.optim.Adam([torch.zeros(1)])  # imports the compiler
from feedback_nb.training import fit, load_checkpoint
x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
data = TensorDataset(x, (x[:, 0] > 0).long())
class Average(AveragedModel):
    def after_step(self, model): self.update_parameters(model)
    def __call__(self, history, model):
        history.rows[-1]["mean"] = float(self.module[0].weight.mean())
def model(seed=0):
    torch.manual_seed(seed)
    norm = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2)]
    return nn.Sequential(*norm, nn.Linear(16, 2))
def train(folder):
    net = model()
    average = Average(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    fit(net, (data, data), epochs=6, batch_size=6, augment=lambda x: x + torch.randn_like(x),
        device="cpu", checkpoint=(folder, 3), callbacks=[average], progress=False)
def child(folder):
    pid = os.fork()
    if pid == 0:
        try:
            train(folder); os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True); os._exit(1)
    return pid
def finish(folder):
    assert os.waitpid(child(folder), 0)[1] == 0, folder
    m = model(1); about = load_checkpoint(m, folder)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in about["history"]]
    return m.state_dict(), rows
base, moments = sys.argv[1], int(sys.argv[2])
start = time.time(); weights, history = finish(base + "/whole"); length = time.time() - start
assert len(history) == 6
rng, killed, partial = random.Random(4), 0, 0
for k in range(moments):
    folder = f"{base}/{k}"
    pid = child(folder)
    time.sleep(rng.uniform(0.0, 1.0) * length)
    os.kill(pid, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    partial += any(name.startswith("step-") for name in os.listdir(folder)) \\
        if os.path.isdir(folder) else 0
    after, rows = finish(folder)
    assert rows == history, (k, rows)
    assert all(torch.equal(after[key], weights[key]) for key in weights), k
    assert not [name for name in os.listdir(folder) if name.endswith((".tmp", ".old"))]
print("killed", killed, "resumed", partial)
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_twenty_random_moments_loses_nothing_that_was_saved(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path), "20"], capture_output=True,
                          text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    killed, resumed = (int(word) for word in done.stdout.split()[1::2])
    assert killed >= 12 and resumed >= 6


def test_where_the_best_cannot_be_read_nothing_is_removed(tmp_path):
    for k in range(4):
        (tmp_path / f"step-{k:09d}").mkdir()
        (tmp_path / f"step-{k:09d}" / "run.json").write_text('{"best": null}')
    (tmp_path / "step-000000002" / "run.json").write_text('{"be')
    checkpoints.prune(tmp_path)
    assert len(checkpoints.saved(tmp_path)) == 4
    (tmp_path / "step-000000002" / "run.json").write_text('{"best": {"name": "step-000000000"}}')
    checkpoints.prune(tmp_path)
    assert [int(path.name[5:]) for path in checkpoints.saved(tmp_path)] == [3, 2, 0]


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    # lr 0: only the batch statistics move
    run(build(), epochs=6, checkpoint=tmp_path, optimizer=partial(torch.optim.SGD, lr=0.0))
    saved = sorted(path.name for path in tmp_path.glob("step-*"))
    best = json.loads((tmp_path / saved[-1] / "run.json").read_text())["best"]
    assert saved[-2:] == ["step-000000020", "step-000000024"] and len(saved) <= 3 and best[
        "name"] in saved


def test_best_is_the_best_epoch(tmp_path):
    seen = []

    def spoil(history, model):
        seen.append(weights(model))
        if len(history) == 2:
            with torch.no_grad():
                model.b.weight.mul_(-1)

    history = run(build(), epochs=4, checkpoint=tmp_path, callbacks=[spoil], lr=1e-3)
    model = build(seed=3)
    load_checkpoint(model, tmp_path, which="best")
    best = max(range(4), key=lambda k: (history.rows[k]["valid_accuracy"],
                                        -history.rows[k]["valid_loss"]))
    if best != 1:  # in epoch 1 the callback spoils what is saved afterwards
        assert_same(model, seen[best])
    with pytest.raises(ValueError, match="last"):
        load_checkpoint(model, tmp_path, which="first")


def test_more_epochs_go_on_and_a_finished_run_is_given_back(tmp_path):
    whole, model, again = build(), build(), build(seed=8)
    history = run(whole, epochs=4)
    run(model, epochs=2, checkpoint=tmp_path)
    longer = run(model, epochs=4, checkpoint=tmp_path)
    assert_same(whole, model)
    assert rows(longer) == rows(history)
    finished = run(again, epochs=4, checkpoint=tmp_path)
    assert_same(whole, again)
    assert rows(finished) == rows(history)
    with pytest.raises(CheckpointError, match="4 done already"):
        run(build(), epochs=3, checkpoint=tmp_path)


def test_a_run_with_other_settings_is_refused_by_name(tmp_path):
    run(build(), epochs=1, checkpoint=tmp_path / "a")
    for options, match in [({"lr":
        0.5}, "0.5"), ({"batch_size": 8}, "batch_size"), ({"seed": 4}, "seed"),
        ({"data": toy(50)}, "training data"),
                           ({"optimizer": "sgd"}, "SGD"), ({"callbacks": [Clip(1.0)]}, "Clip"),
                           ({"augment": noisy}, "augment")]:
        with pytest.raises(CheckpointError, match=match):
            run(build(), epochs=1, checkpoint=tmp_path / "a", **options)
    run(build(), epochs=1, checkpoint=tmp_path / "b", schedule="cosine")
    with pytest.raises(CheckpointError, match="laid out over all epochs"):
        run(build(), epochs=2, checkpoint=tmp_path / "b", schedule="cosine")


def test_nothing_trained_is_overwritten(tmp_path):
    run(build(), epochs=1, checkpoint=tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="resume=True"):
        run(build(), epochs=1, checkpoint=tmp_path, resume=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_two_runs_in_one_folder_are_refused(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process"):
            run(build(), checkpoint=tmp_path)
    run(build(), checkpoint=tmp_path)


def test_tied_weights_are_saved_and_loaded(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    model, other = build(Tied), build(Tied, seed=4)
    run(model, checkpoint=tmp_path)
    load_checkpoint(other, tmp_path)
    assert_same(model, other)
    assert other.a.weight is other.b.weight


# ── damage ────────────────────────────────────────────────────────────────────────────────────────


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "run.json", "manifest.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_named_and_an_earlier_one_taken(tmp_path, file, damage):
    whole, again = build(), build()
    history = run(whole, epochs=3, checkpoint=tmp_path)
    newest = sorted(tmp_path.glob("step-*"))[-1]
    damage(newest / file)
    with pytest.warns(UserWarning, match=f"{newest.name}.*(damaged|incomplete).*Going on"):
        resumed = run(again, epochs=3, checkpoint=tmp_path)
    assert_same(whole, again)
    assert rows(resumed) == rows(history)
    assert list(tmp_path.glob("damaged-*"))  # put aside, not thrown away
    for path in tmp_path.glob("step-*"):
        damage(path / file)
    # the list of checksums does not know that it is wrong
    named = "damaged" if (file, damage) == ("manifest.json", flip) else file.split(".")[0]
    with pytest.raises(CheckpointError, match=f"{named}.*(remove|new folder)"):
        run(build(), epochs=3, checkpoint=tmp_path)
    with pytest.raises(CheckpointError):
        load_checkpoint(build(), tmp_path)


def test_a_checkpoint_of_another_model_is_refused_by_key_and_shape(tmp_path):
    run(build(), epochs=1, checkpoint=tmp_path)
    for other, match in [(build(width=9), r"a.weight.*\(8, 6\).*\(9, 6\)"),
                         (nn.Linear(6, 3), "'weight'.*missing"),
                         (nn.Sequential(), "missing")]:
        before = weights(other)
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(other, tmp_path)
        assert_same(before, other)
    with pytest.raises(CheckpointError, match="out_features: 8 then, 9 now"):
        run(build(width=9), epochs=1, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(build(), tmp_path / "nowhere")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [lambda bomb, path: torch.save(bomb, path),
                                   lambda bomb, path: path.write_bytes(pickle.dumps(bomb))],
                                   ids=["torch", "pickle"])
def test_a_pickle_bomb_runs_nothing(tmp_path, write):
    run(build(), epochs=1, checkpoint=tmp_path)
    path = checkpoints.newest(tmp_path)
    write(Bomb(tmp_path / "boom"), path / "state.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    # an attacker gets the checksum right
    manifest["state.pt"] = checkpoints._digest(path / "state.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="none of it was run"):
        run(build(), epochs=2, checkpoint=tmp_path)
    assert not (tmp_path / "boom").exists()


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path, monkeypatch):
    run(build(), epochs=1, checkpoint=tmp_path)
    real = torch.save

    def full(obj, path):
        real(obj, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        run(build(), epochs=3, checkpoint=tmp_path)
    monkeypatch.undo()
    left = sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock")
    assert left == ["step-000000000", "step-000000004"]
    whole, again = build(), build()
    run(whole, epochs=3)
    run(again, epochs=3, checkpoint=tmp_path)
    assert_same(whole, again)


def test_state_that_could_not_be_read_back_is_known_at_once(tmp_path):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "odd": Bomb(tmp_path / "boom")}

    with pytest.raises(CheckpointError, match="more than tensors"):
        run(build(), optimizer=partial(Odd, lr=0.1), checkpoint=tmp_path / "run")


# ── numbers that are none, and memory


def test_a_bad_input_is_named_with_its_step_and_examples():
    x, y = TRAIN.tensors
    x = x.clone()
    x[17, 2] = float("nan")
    with pytest.raises(FloatingPointError,
                       match=r"epoch 0, step \d.*the input of example 17") as caught:
        run(build(), TensorDataset(x, y))
    assert 17 in caught.value.indices


def test_the_first_module_to_blow_up_is_named_and_the_weights_are_kept():
    class Blow(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x / 0 if self.training and self.calls > 4 else x

    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), Blow(), nn.Linear(4, 3))
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 4 .*module '2' \(Blow\)"):
        run(model)
    assert all(p.isfinite().all() and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_gradient_that_is_not_finite_is_found_before_it_is_used():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(6, 3))

        def forward(self, x):
            return x @ self.w.abs().sqrt()  # 0 has no slope there

    model = Root()
    with pytest.raises(FloatingPointError,
                       match="norm of its gradient is (nan|inf).*gradient of parameter 'w'"):
        run(model)
    assert torch.equal(model.w, torch.zeros(6, 3))


def test_a_loss_and_a_feedback_state_that_blow_up_are_named():
    with pytest.raises(FloatingPointError,
                       match="the loss is inf.*the output of every module is finite"):
        run(build(), loss=lambda output, target: F.cross_entropy(output, target) / 0)
    model = build(Loop)
    model.c.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"step 0 .*at step 1 of 2.*module 'c'") as caught:
        run(model)
    assert len(caught.value.indices) == 16


def test_an_exploding_run_stops():
    data = TensorDataset(TRAIN.tensors[0], TRAIN.tensors[0][:, :3] * 1e3)
    with pytest.raises(FloatingPointError, match="lr"):
        run(nn.Linear(6, 3), data, loss=F.mse_loss, optimizer=partial(torch.optim.SGD, lr=1e4),
            epochs=50)


def test_out_of_memory_says_what_to_try():
    class Hungry(nn.Linear):
        def forward(self, x):
            if len(x) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().forward(x)

    with pytest.raises(torch.OutOfMemoryError,
                       match=r"epoch 0, step 0, with batch_size=16.*accumulate=2 .*"
                             r"8 examples.*batch_size=8"):
        run(Hungry(6, 3), TRAIN)
    with pytest.raises(torch.OutOfMemoryError, match=r"in 2 pieces.*accumulate=4 .*4 examples"):
        run(Hungry(6, 3), TRAIN, accumulate=2)
    run(Hungry(6, 3), TRAIN, accumulate=4)
    with pytest.raises(RuntimeError, match="something else"):
        run(nn.Linear(6, 3), TRAIN,
            loss=lambda output, target: (_ for _ in ()).throw(RuntimeError("something else")))


# ── several processes ─────────────────────────────────────────────────────────────────────────────


def stubbed(model, others, **options):
    """A run as one of two processes sees it; the other one's part counts for `others`."""
    loss = partial(F.cross_entropy, label_smoothing=0.1, weight=torch.tensor([1.0, 1.0, 0.0]))
    parts = dict(model=model, called=model, local=False, world=2, rank=1, accumulate=2, loss=loss,
                 weights="mean", scaler=None, autocast=contextlib.nullcontext,
                 parameters=list(model.parameters()), summed=lambda v: [v[0] + others])
    return SimpleNamespace(**parts | options)


@pytest.mark.parametrize("cls", [partial(nn.Linear, 6, 3), Loop])
@pytest.mark.parametrize("label", [-100, 2], ids=["ignored", "of weight 0"])
def test_a_process_without_a_label_that_counts_takes_part_with_gradient_0(cls, label):
    model, (x, y) = build(cls), TRAIN[:6]
    (loss, _, norm), counts = gradients._gradients(
        stubbed(model, 4), x, torch.full_like(y, label), 0.5)
    assert (loss, norm) == (0.0, 0.0) and counts == (0, 0)
    assert all(p.grad.eq(0).all() for p in model.parameters() if p.grad is not None)
    # where no process has one, all of them know
    (loss, *_), _ = gradients._gradients(stubbed(model, 0), x, torch.full_like(y, label), 0.5)
    assert math.isnan(loss)


def test_a_piece_without_a_label_that_counts_adds_nothing():
    (x, y), grads = TRAIN[:6], []
    y = torch.cat([torch.zeros_like(y[:3]), torch.full_like(y[3:], -100)])
    for pieces in (1, 2):
        model = build(nn.Linear, in_features=6, out_features=3)
        (loss, hits, _), _ = gradients._gradients(stubbed(model, 0, accumulate=pieces), x, y, 0.5)
        grads.append(torch.cat([model.weight.grad.flatten(), torch.tensor([loss, hits])]))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("there", [0, 1])
def test_a_folder_that_only_some_processes_see_is_refused(tmp_path, there):
    for k in range(there):
        (tmp_path / f"step-{k:09d}").mkdir()
    seen = stubbed(build(), 1 - there, folder=tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        training._resume(seen, True, False)


TWO = '''
import json, os, sys
sys.path.insert(0, sys.argv[3])
import torch
torch.set_num_threads(1)
from test_training import Local, Loop, TRAIN, VALID, build, rows, run
rank, out = int(os.environ.get("RANK", 0)), {}
for name, cls, options in [("loop", Loop, {"accumulate": 2}), ("local", Local, {})]:
    # unlike weights: those of the first process count
    out[name] = rows(run(build(cls, seed=rank), batch_size=15, **options))
def die(history, model):  # one worker, once, after the second epoch
    if rank == 1 and len(history) == 2 and not os.path.exists(sys.argv[2] + "/dead"):
        open(sys.argv[2] + "/dead", "w").close(); os._exit(7)
out["died"] = rows(run(build(Loop), epochs=4, batch_size=15,
                       checkpoint=(sys.argv[2] + "/run", 2), callbacks=[die]))
if rank == 0:
    json.dump(out, open(sys.argv[1], "w"))
'''


def test_two_processes_do_what_one_does_and_survive_a_death(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    env = {**{k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC",
        "ACCELERATE"))}, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    args = [str(tmp_path / "two.py"), str(tmp_path / "two.json"), str(tmp_path),
            str(ROOT / "tests")]
    done = torchrun(*args, restarts=1, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "dead").exists()
    two = json.loads((tmp_path / "two.json").read_text())
    one = {
        "loop": rows(run(build(Loop), batch_size=15)),
        "local": rows(run(build(Local), batch_size=15)),
        "died": rows(run(build(Loop), epochs=4, batch_size=15)),
    }
    for name in one:
        assert [row["epoch"] for row in two[name]] == [row["epoch"] for row in one[name]]
        for mine, theirs in zip(one[name], two[name]):
            assert theirs == pytest.approx(mine, abs=2e-5, nan_ok=True), name


SPAWNED = '''
import json, os, socket, sys
sys.path.insert(0, sys.argv[2])
import torch
from test_training import Loop, build, rows, run
def train(rank, port):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    histories = [rows(run(build(Loop, seed=rank), batch_size=15)) for _ in range(2)]
    assert not torch.distributed.is_initialized() and histories[0] == histories[1]
    if rank == 0:
        json.dump(histories[0], open(sys.argv[1], "w"))
if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0)); port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(train, (port,), nprocs=2)
'''


def test_processes_of_any_launcher_train_twice_and_leave_nothing(tmp_path):
    (tmp_path / "script.py").write_text(SPAWNED)
    env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    args = [str(tmp_path / "script.py"), str(tmp_path / "out.json"), str(ROOT / "tests")]
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT,
                          env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((tmp_path / "out.json").read_text())
    for mine, theirs in zip(rows(run(build(Loop), batch_size=15)), history, strict=True):
        assert theirs == pytest.approx(mine, abs=2e-5, nan_ok=True)


SHARDED = '''
import datetime, json, os, sys
sys.path.insert(0, sys.argv[2])
import pytest, torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_training import StopAt, rows, run, sharded
torch.set_num_threads(1)
distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
mesh, folder = init_device_mesh("cpu", (2,)), sys.argv[1] + "/run"
def split(): return fully_shard(sharded(), mesh=mesh)
whole = rows(run(split(), batch_size=15))
try:
    run(split(), batch_size=15, checkpoint=(folder, 2), callbacks=[StopAt(5)])
except KeyboardInterrupt:
    pass
again = rows(run(split(), batch_size=15, checkpoint=(folder, 2)))
# shares of 9 and 8 and of 3 and 2: chunks would be 3 and 4, and the processes wait for each other
for size in (17, 5):
    pieces = rows(run(split(), batch_size=size, accumulate=4))
    assert pieces == [pytest.approx(row, abs=2e-5) for row in rows(run(split(), batch_size=size))]
if distributed.get_rank() == 0:
    json.dump([whole, again], open(sys.argv[1] + "/out.json", "w"))
distributed.destroy_process_group()
'''


def sharded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def test_a_sharded_model_trains_and_resumes_as_a_whole_one(tmp_path):
    (tmp_path / "script.py").write_text(SHARDED)
    env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    args = [str(tmp_path / "script.py"), str(tmp_path), str(ROOT / "tests")]
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = torchrun(*args, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    whole, again = json.loads((tmp_path / "out.json").read_text())
    assert whole == again
    model = sharded()
    for mine, theirs in zip(rows(run(model, batch_size=15)), whole, strict=True):
        assert theirs == pytest.approx(mine, abs=2e-5)
    other = sharded()
    load_checkpoint(other, tmp_path / "run")
    torch.testing.assert_close(weights(other), weights(model), atol=2e-5, rtol=1e-4)


# ── housekeeping ──────────────────────────────────────────────────────────────────────────────────


def test_importing_is_light():
    code = ("import sys, feedback_nb.training; slow = 'pandas', 'safetensors', 'matplotlib', "
            "'IPython'; print([m for m in slow if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_progress_bar_is_one_and_can_be_switched_off(capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    run(build(), progress=True)
    assert "8/8" in capfd.readouterr().err
    run(build(), progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_history_reads_as_a_table():
    history = run(build())
    assert "valid_accuracy" in repr(history) and "<table" in history._repr_html_()
    assert "no epochs" in repr(History([]))
