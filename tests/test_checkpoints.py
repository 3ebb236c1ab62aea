"""What a run that goes on may not be silent about, and what may lie in its folder."""
import hashlib
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_training import TRAIN, VALID, Loop, assert_same, build, rows, run, toy, weights
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from feedback_nb import checkpoints
from feedback_nb.cbl import CBL
from feedback_nb.training import CheckpointError, History, evaluate, load_checkpoint

ROOT = Path(__file__).parent.parent


# ── another run is refused ──────────────────────────────────────────────────────────────────────


class Active(nn.Module):
    """A network whose activation is a function, not a module."""

    def __init__(self, activation=torch.tanh, dropout=0.1):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(6, 8), nn.Linear(8, 3), nn.Dropout(dropout)
        self.activation = activation

    def forward(self, x):
        return self.b(self.drop(self.activation(self.a(x))))


class Other(Active):
    def forward(self, x):
        return self.b(self.drop(torch.sin(self.a(x))))


def other_forward():
    """A class of the same name with other code."""
    return type("Active", (Active,), {"forward": Other.forward, "__qualname__": "Active"})()


def cbl(**options):
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return CBL(net, ["0", "1"], example=TRAIN.tensors[0][:2], context_dim=3, **options)


def weighted(last):
    return partial(F.cross_entropy, weight=torch.tensor([1.0, 1.0, last]))


def scaled(factor):
    return lambda x: x * factor


def frozen(model):
    model.a.requires_grad_(False)
    return model


X, Y = TRAIN.tensors
DOUBLE = tuple(TensorDataset(p.tensors[0].double(), p.tensors[1]) for p in (TRAIN, VALID))
STEP = partial(torch.optim.lr_scheduler.StepLR, step_size=2)
FIRST = dict(model=Active, data=(TRAIN, VALID), augment=scaled(1.0), loss=weighted(2.0),
             schedule=lambda optimizer: STEP(optimizer, gamma=0.5))
OTHERS = {
    "data of equal length": (dict(data=(TensorDataset(X + 0.1, Y), VALID)), "training data"),
    "labels": (dict(data=(TensorDataset(X, Y.flip(0)), VALID)), "training data"),
    "order of the examples": (dict(data=(Subset(TRAIN, list(range(61))[::-1]), VALID)), "data"),
    "validation data": (dict(data=(TRAIN, toy(30, 3))), "validation data"),
    "no validation data": (dict(data=TRAIN), "validation data"),
    "activation": (dict(model=lambda: Active(torch.relu)), "model.activation"),
    "forward": (dict(model=other_forward), "model: "),
    "dropout": (dict(model=lambda: Active(dropout=0.2)), "model.drop.p: 0.1 then, 0.2 now"),
    "dtype": (dict(model=lambda: Active().double(), data=DOUBLE), "types of numbers"),
    "frozen": (dict(model=lambda: frozen(Active())), "not trained"),
    "another function": (dict(augment=lambda x: x + 1.0), "augment"),
    "a closure's number": (dict(augment=scaled(2.0)), "augment"),
    "a loss": (dict(loss=lambda o, y: 2 * F.cross_entropy(o, y)), "loss"),
    "class weights": (dict(loss=weighted(3.0)), "loss"),
    "schedule": (dict(schedule=lambda optimizer: STEP(optimizer, gamma=0.3)), "schedule"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_run_is_refused_by_name(tmp_path, what):
    changed, named = OTHERS[what]

    def go(model, data, **options):
        return run(build(model), data, checkpoint=tmp_path, epochs=1, **options)

    go(**FIRST)
    go(**FIRST)  # the same one is not
    with pytest.raises(CheckpointError, match=named):
        go(**FIRST | changed)


def test_two_lambdas_are_two_functions(tmp_path):
    for name, first, second in [
        ("augment", lambda x: x * 1.0, lambda x: x * 1.5),
        ("loss", lambda o, y: F.cross_entropy(o, y), lambda o, y: 2 * F.cross_entropy(o, y))]:
        run(build(), epochs=1, checkpoint=tmp_path / name, **{name: first})
        with pytest.raises(CheckpointError, match=f"{name}:.*<lambda>"):
            run(build(), epochs=1, checkpoint=tmp_path / name, **{name: second})


@pytest.mark.parametrize("one", [
    "lambda b: sum(r['left'] for r in b)", "lambda b: sum(r['right'] for r in b)",
    "lambda b: sum(r * A for r in b)", "lambda b: [lambda: r * B for r in b]"])
def test_functions_that_differ_inside_are_told_apart(one):
    known = {"A": 1, "B": 1, "__name__": "users"}
    made = eval(one, known)
    described, same = checkpoints.describe(made), checkpoints.describe(eval(one, known))
    assert described == same
    others = [eval(other, known | new) for other, new in [
        (one.replace("left", "right"), {}), (one.replace("right", "left"), {}),
        (one, {"A": 2}), (one, {"B": 2})]]
    assert sum(checkpoints.describe(other) != described for other in others) == 1


def test_a_users_file_in_a_folder_of_the_packages_name_is_the_users():
    described = []
    for factor in (1, 2):
        known = {"__name__": "users"}
        exec(compile(f"def f(x): return {factor} * x", "/feedback_nb/mine.py", "exec"), known)
        described.append(checkpoints.describe(known["f"]))
    assert described[0] != described[1]
    assert checkpoints.describe(evaluate) == "feedback_nb.metrics.evaluate"  # the package's own


@pytest.mark.parametrize(("options", "named"), [
    (dict(steps=3), "model.steps: 2 then, 3 now"), (dict(steps=2, flow="literal"), "model.flow")],
    ids=str)
def test_a_model_with_other_feedback_is_refused(tmp_path, options, named):
    run(build(cbl, steps=2), epochs=1, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match=named):
        run(build(cbl, **options), epochs=1, checkpoint=tmp_path)


def test_tensor_weights_of_the_steps_are_told_apart(tmp_path):
    first, second = torch.tensor([1.0, 0, 2]), torch.tensor([1.0, 2, 0])
    run(build(Loop), epochs=1, checkpoint=tmp_path, weights=first)
    with pytest.raises(CheckpointError, match="weights"):
        run(build(Loop), epochs=1, checkpoint=tmp_path, weights=second)


def test_what_a_model_counts_and_what_a_callback_switches_is_no_other_run(tmp_path):
    def switch(history, model):
        model.steps = 3

    model, whole = build(Loop), build(Loop)
    run(model, epochs=2, checkpoint=tmp_path, callbacks=[switch])
    evaluate(model, VALID)  # counts its passes
    assert model.steps == 3
    run(model, epochs=3, checkpoint=tmp_path, callbacks=[switch])  # the same object goes on
    run(whole, epochs=3, callbacks=[switch])
    assert_same(model, whole)


def test_a_description_is_the_same_in_every_process():
    code = """if True:
        import torch, torch.nn.functional as F
        from functools import partial
        from feedback_nb.checkpoints import describe, describe_model
        SCALE = 3
        def loss(output, target, kinds={"a", "b"}):
            return F.cross_entropy(output, target) * SCALE if "a" in {"a", "b", "c"} else kinds
        print(describe(loss), describe(partial(loss, kinds={"x", "y", "z"})),
              describe_model(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())))
    """
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                           env=os.environ | {"PYTHONHASHSEED": str(k)}, check=True).stdout
            for k in range(3)}
    assert len(said) == 1 and "loss" in said.pop()


def test_the_earlier_format_is_refused_by_name_and_its_weights_can_be_read(tmp_path):
    model = build()
    run(model, epochs=1, checkpoint=tmp_path)
    for path in tmp_path.glob("step-*"):
        about = json.loads((path / "run.json").read_text())
        about.pop("format"), about.pop("changed")
        (path / "run.json").write_text(json.dumps(about))
        manifest = json.loads((path / "manifest.json").read_text())
        text = (path / "run.json").read_bytes()
        digest = hashlib.sha256(text).hexdigest()
        manifest["run.json"] = {"bytes": len(text), "sha256": digest}
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format 1.*load_checkpoint"):
        run(build(), epochs=2, checkpoint=tmp_path)
    other = build(seed=3)
    load_checkpoint(other, tmp_path)
    assert_same(model, other)


# ── random numbers that no checkpoint holds ─────────────────────────────────────────────────────


class Drawing(Dataset):
    """Reads with a generator of its own."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return torch.full((6,), float(self.generator.random())), i % 3


class Noise:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x):
        return x + torch.randn(x.shape, generator=self.generator)


def persistent():
    return DataLoader(TRAIN, batch_size=9, num_workers=1, persistent_workers=True)


@pytest.mark.parametrize("options", [
    dict(augment=Noise()), dict(augment=partial(lambda x, g: x, g=np.random.default_rng(0))),
    dict(data=Drawing()), dict(data=persistent())], ids=["object", "partial", "data", "persistent"])
def test_a_generator_that_no_checkpoint_holds_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="generator of its own"):
        run(build(), checkpoint=tmp_path, **options)


def test_the_global_generators_are_nobodys_own(tmp_path):
    draw = partial(lambda x, g: x + torch.randn(x.shape, generator=g), g=torch.default_generator)
    whole, again = build(), build()
    run(whole, augment=draw, epochs=2)
    run(again, augment=draw, epochs=1, checkpoint=tmp_path)
    run(again, augment=draw, epochs=2, checkpoint=tmp_path)
    assert_same(whole, again)


# ── what lies in the folder ─────────────────────────────────────────────────────────────────────


def test_an_interruption_before_the_first_checkpoint_starts_at_the_start(tmp_path):
    class Stop:
        def after_step(self, model):
            raise KeyboardInterrupt

    whole, model = build(), build()
    history = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(model, checkpoint=tmp_path, callbacks=[Stop()])
    again = run(model, checkpoint=tmp_path)  # the same cell, with the half-trained model
    assert rows(again) == rows(history)
    assert_same(whole, model)


def test_a_users_own_copy_is_kept(tmp_path):
    run(build(), epochs=1, checkpoint=tmp_path)
    copies = [tmp_path / "step-000000002-keep", tmp_path / "step-000000004-keep"]
    for copy in copies:
        copy.mkdir()
        (copy / "mine").touch()
    run(build(), epochs=6, checkpoint=tmp_path)
    assert all((copy / "mine").exists() for copy in copies)


def test_a_validation_loss_that_is_nan_is_not_the_best(tmp_path):
    class Late(nn.Linear):
        epoch = 0

        def forward(self, x):
            return super().forward(x) * (float("nan") if self.epoch < 1 > self.training else 1)

    def count(history, model):
        model.epoch = len(history)

    data = TensorDataset(X, X[:, :1])
    history = run(build(Late, in_features=6, out_features=1), (data, data), epochs=3,
                  loss=F.mse_loss, callbacks=[count], checkpoint=tmp_path)
    losses = [row["valid_loss"] for row in history.rows]
    model = build(Late, in_features=6, out_features=1)
    about = load_checkpoint(model, tmp_path, which="best")
    assert np.isnan(losses[0]) and about["history"][-1]["epoch"] == int(np.nanargmin(losses))


def test_a_model_without_a_safe_form_is_refused_before_training(tmp_path):
    class Shared(nn.Linear):
        def __init__(self):
            super().__init__(6, 3)
            whole = torch.rand(4)
            self.register_buffer("first", whole[:3])
            self.register_buffer("last", whole[1:])

    model = Shared()
    before = weights(model)
    with pytest.raises(CheckpointError, match="Shared.*safetensors"):
        run(model, checkpoint=tmp_path)
    assert_same(before, model)


def test_home_is_not_a_folder_called_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model, other = build(), build(seed=3)
    history = run(model, epochs=1, checkpoint="~/run")
    assert (tmp_path / "run").is_dir() and not (tmp_path / "~").exists()
    load_checkpoint(other, "~/run")
    assert_same(model, other)
    assert rows(History.read("~/run")) == rows(history)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_orphaned_reader_does_not_hold_the_folder(tmp_path):
    code = f"""if True:
        import os, signal, sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import torch
        from torch.utils.data import Dataset
        from test_training import build, run
        class Slow(Dataset):
            workers = 1
            def __len__(self): return 24
            def __getitem__(self, i):
                if torch.utils.data.get_worker_info():
                    import time
                    print(os.getpid(), flush=True); time.sleep(60)
                return torch.zeros(6), i % 3
        run(build(), Slow(), checkpoint={str(tmp_path)!r})
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    orphan = int(process.stdout.readline())
    process.kill()
    process.wait()
    os.kill(orphan, 0)  # it is still there
    try:
        run(build(), TRAIN, checkpoint=tmp_path / "other")
        from feedback_nb.files import locked

        with locked(tmp_path / ".lock", wait=False):
            pass
    finally:
        os.kill(orphan, 9)


def test_two_threads_do_not_train_at_once():
    errors, inside = [], threading.Event()

    def hold(history, model):
        inside.set()
        done.wait(20)

    done = threading.Event()
    first = threading.Thread(target=lambda: run(build(), epochs=1, callbacks=[hold]))
    first.start()
    assert inside.wait(20)
    try:
        run(build(), epochs=1)
    except RuntimeError as error:
        errors.append(error)
    done.set()
    first.join()
    assert len(errors) == 1 and "thread" in str(errors[0])
    nested = lambda history, model: run(build(), epochs=1) and None
    assert len(run(build(), epochs=1, callbacks=[nested])) == 1  # one inside the other is fine


# ── what mutants have shown to be untested (tests/mutants.md) ───────────────────────────────────


@pytest.mark.parametrize("held", ["tensors", "an array", "a list", "indices"])
def test_every_example_counts_in_a_description_and_not_only_those_that_are_read(held):
    def data(changed):
        x = torch.arange(400.0)
        x[1] += changed  # not among the 64 examples that are read, which end at 0 and 399
        if held == "indices":
            return Subset(TensorDataset(torch.arange(500), torch.zeros(500)), x.long().tolist())
        if held == "tensors":
            return TensorDataset(x, torch.zeros(400))
        return Plain(x, held)

    first, second, other = (checkpoints.describe_data(data(changed)) for changed in (0, 0, 1))
    assert first == second != other


class Plain(Dataset):
    """Examples in an array or a list, and attributes that are none."""

    def __init__(self, x, held):
        self.x = x.numpy() if held == "an array" else x.tolist()
        self.scale, self.name = torch.tensor(1.0), "n" * 400  # no entries of examples

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return float(self.x[i]) // 2, 0  # what is read hides the change


def test_a_docstring_is_no_part_of_what_a_function_does():
    made = []
    for doc in ("first", "another", None):
        space = {"__name__": "mine"}
        line = f"    {doc!r}\n" if doc else ""
        exec(f"def f(x):\n{line}    return 2 * x + 7", space)
        made.append(checkpoints.describe(space["f"]))
    assert made[0] == made[1]
    space = {"__name__": "mine"}
    exec("def f(x):\n    'first'\n    return 2 * x + 8", space)
    assert checkpoints.describe(space["f"]) != made[0]


def test_classes_and_modules_are_described_by_their_full_names():
    class Inner:
        pass

    assert checkpoints.describe(Inner).endswith(".<locals>.Inner")
    assert checkpoints.describe(os) == "os"


def test_what_is_frozen_is_named():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    found = checkpoints.describe_model(net)["parameters not trained"]
    assert found == "0.weight, 0.bias"


def test_pruning_keeps_the_newest_two_and_what_they_call_the_best(tmp_path):
    for best in ({"name": "step-000000002"}, None):
        folder = tmp_path / str(best is None)
        for step in range(1, 6):
            text = json.dumps({"best": best})
            checkpoints.write_checkpoint(folder / f"step-{step:09d}",
                                         {"run.json": lambda path: path.write_text(text)})
        checkpoints.prune(folder)
        kept = [int(path.name[5:]) for path in checkpoints.saved(folder)]
        assert kept == ([5, 4, 2] if best else [5, 4])


def test_weights_of_another_shape_are_refused_by_key_though_there_are_aliases(tmp_path):
    class Tied(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.a = self.b = nn.Linear(2, size)

    checkpoints.write_weights(Tied(2), tmp_path / "weights")
    checkpoints.read_weights(Tied(2), tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"weight.*\(2, 2\).*\(3, 2\)"):
        checkpoints.read_weights(Tied(3), tmp_path / "weights")


def test_a_state_with_code_in_it_is_refused_and_not_run(tmp_path):
    (tmp_path / "ran").write_text("no")
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.unlink, (str(tmp_path / "ran"),))})
    torch.save({"optimizer": bomb()}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="state.pt"):
        checkpoints.read_state(tmp_path)
    assert (tmp_path / "ran").exists()
