"""The ImageNet command: recipes, estimates, kills, restarts and errors, all on small photos."""
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from processes import LIMIT, once, torchrun
from torch import nn
from torchvision.io import encode_jpeg

from feedback_nb import registry
from feedback_nb.checkpoints import read_weights
from feedback_nb.imagenet import (
    Average,
    Sizes,
    _parser,
    main,
    open_split,
    optimizer,
    rate,
    train,
)
from feedback_nb.recipes import RECIPES, Recipe, build, recipe
from feedback_nb.scaling import GPUS, all_reduce, estimate, loss_of, pieces, saved_bytes, scaled
from feedback_nb.training import History, evaluate

CLASSES = ("ant", "bee", "cat")
SMALL = ["--classes", "3", "--size", "64", "--batch", "8", "--workers", "0", "--precision", "no"]


def make_photos(root, train=7, val=3, classes=CLASSES, size=72):
    chance = torch.Generator().manual_seed(0)
    for split, n in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                photo = torch.randint(0, 256, (3, size, size + i), generator=chance)
                data = bytes(encode_jpeg(photo.to(torch.uint8)).numpy())
                (root / split / name / f"{name}_{i}.JPEG").write_bytes(data)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def run(script, *args, world=0, restarts=0, check=True, limit=LIMIT, **environ):
    """Run Python code, with torchrun where `world` processes are asked for."""
    words = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in environ.items()}
    if world:
        done = torchrun("--no-python", *words, world=world, restarts=restarts, limit=limit,
                        env=environ)
    else:
        done = subprocess.run(words, capture_output=True, text=True, timeout=900, env=environ)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


# ------------------------------------------------------------------ recipes

@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_source_for_every_setting(name):
    made, sources = recipe(name)
    assert set(sources) == set(asdict(made))
    assert "asked for" not in sources.values()


def test_papers_say_what_they_say_and_the_rest_is_marked():
    made, sources = recipe("cbl-resnet18")
    assert (made.optimizer, made.lr, made.milestones, made.batch, made.epochs, made.steps) == (
        "sgd", 0.1, (30, 60, 80), 256, 90, 4)
    assert sources["lr"].startswith("CBL paper") and sources["augment"].startswith("ours")
    made, sources = recipe("cbl-vit-b16")
    assert (made.optimizer, made.lr, made.batch, made.epochs) == ("adamw", 1e-4, 1024, 90)
    made, sources = recipe("lrm-alexnet")
    assert (made.level, made.batch, made.epochs, made.weight_decay) == (3, 2048, 100, 5e-5)
    assert sources["warmup"].startswith("LRM paper") and sources["lr"].startswith("ours")
    assert not any("paper" in s for s in recipe("fftnet-vit-b16")[1].values())


def test_torchvisions_recipes_are_torchvisions():
    made, sources = recipe("convnext-t")  # --train-crop-size 176 --val-resize-size 232
    assert (made.sizes, made.size, made.resize) == ((176,), 224, 232)
    assert sources["sizes"] == sources["resize"] == "torchvision's reference recipe"
    sgd = optimizer(list(nn.Linear(2, 2).parameters()), recipe("resnet50")[0])
    assert all(g["momentum"] == 0.9 and not g["nesterov"] for g in sgd.param_groups)


def test_a_short_run_forgets_its_first_weights():
    long, short = recipe("vit-b16")[0], recipe("vit-b16", epochs=9)[0]
    steps = 1_281_167 // long.batch
    for made in (long, short):
        assert made.ema ** (made.epochs * steps) < 1e-6
    assert recipe("vit-b16", epochs=9, ema=0.9)[0].ema == 0.9
    assert recipe("vit-b16", epochs=9, ema=None)[0].ema is None


def test_the_size_before_the_crop_follows_the_size_or_is_as_asked_for(photos):
    for changes, resize in (({}, 73), ({"resize": 70}, 70)):
        made, _ = recipe("resnet18", classes=3, size=64, **changes)
        assert made.resize == resize
        assert open_split(photos, "val", made).transform.transforms[0].size == [resize]
    assert recipe("resnet18", sizes=32, milestones=5)[0].sizes == (32,)


def test_settings_change_and_the_schedule_follows_the_epochs():
    made, sources = recipe("cbl-resnet18", epochs=9, lr=0.5)
    assert made.milestones == (3, 6, 8) and sources["lr"] == "asked for"
    made, _ = recipe("cbl-resnet18", epochs=9, milestones=(5,))
    assert made.milestones == (5,)
    twin, _ = recipe("cbl-resnet18", method="plain")
    assert replaced(twin) == replaced(recipe("cbl-resnet18")[0])


def replaced(made):
    return {k: v for k, v in asdict(made).items() if k not in ("method", "steps")}


@pytest.mark.parametrize("name,changes,named", [
    ("cbl-resnet-18", {}, "cbl-resnet18"), ("resnet18", {"epoch": 3}, "epochs"),
    ("resnet18", {"method": "cpl"}, "cbl"), ("resnet18", {"optimizer": "adamx"}, "adamw"),
    ("resnet18", {"epochs": 0}, "epochs"), ("vit-b16", {"sizes": (32, 64)}, "vit-b16"),
    ("resnet18", {"epochs": "ten"}, "epochs"), ("resnet18", {"lr": None}, "lr"),
    ("resnet18", {"weight_decay": "1e-4x"}, "weight_decay"), ("resnet18", {"seed": -1}, "seed"),
    ("resnet18", {"sizes": (32, None)}, "sizes"), ("cbl-resnet18", {"steps": 2.5}, "steps"),
    ("resnet18", {"resize": 200}, "resize"), ("resnet18", {"warmup": 91}, "warmup"),
    # what the network or the schedule would not look at
    ("resnet18", {"steps": 4}, "steps"), ("vit-b16", {"milestones": (30, 60)}, "milestones"),
    ("resnet18", {"method": "fftnet"}, "fftnet"), ("vit-b16", {"method": "caps"}, "caps"),
    ("lrm3-alexnet", {"net": "resnet18"}, "lrm")])
def test_what_does_not_exist_is_refused_with_what_does(name, changes, named):
    with pytest.raises(ValueError, match=named):
        recipe(name, **changes)


# ------------------------------------------------------------------ estimates

@pytest.mark.parametrize("name", [name for name in RECIPES if "h14" not in name])
def test_every_recipe_can_be_estimated(name):
    made, _ = recipe(name)
    found = estimate(made, 8)
    assert found.steps == made.epochs * -(-1_281_167 // made.batch)
    assert found.memory < 0.9 * GPUS["h100"][1] and made.batch % (8 * found.micro) == 0
    assert all(len(row) == 3 and all(row) for row in found.rows)


def test_a_dry_run_of_the_largest_recipe_needs_less_than_four_gigabytes():
    script = """
        import resource
        from feedback_nb.imagenet import main
        assert main(["--recipe", "cbl-vit-h14", "--dry-run", "--devices", "64"]) == 0
        print("KB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    out = run(script).stdout
    assert "parameters" in out and int(out.split()[-1]) < 4 * 2**20


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["resnet18", "cbl-resnet18", "lrm-resnet18", "convnext-t"])
def test_memory_is_within_fifteen_percent_of_the_measured(name, precision):
    batch = 8
    options = {"classes": 10, "size": 64, "sizes": (), "precision": precision, "ema": None}
    made, _ = recipe(name, batch=batch, **options)
    torch.manual_seed(0)
    model, x, y = build(made), torch.rand(batch, 3, 64, 64), torch.zeros(batch).long()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        saved = saved_bytes(model, x, y)  # of real tensors
        loss_of(model, x, y).backward()
    steps = optimizer(list(model.parameters()), made)
    steps.step()
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    tensors += [v for state in steps.state.values() for v in state.values() if torch.is_tensor(v)]
    measured = saved + sum(t.numel() * t.element_size() for t in tensors)
    assert estimate(made, 1, micro=batch).memory == pytest.approx(measured, rel=0.15)


def test_smaller_training_photos_cost_less_and_larger_ones_take_more_memory():
    whole, small, large = (estimate(recipe("resnet18", sizes=sizes)[0], micro=256)
                           for sizes in ((), (112, 224), (320,)))
    assert small.work == pytest.approx(whole.work * 0.625, rel=0.02)
    assert small.memory == whole.memory < large.memory / 1.5


def dry(*args):
    return main(["--dry-run", "--recipe", "resnet18", "--classes", "3", "--size", "64", *args])


def test_a_dry_run_tells_of_the_run_it_is_asked_about(photos, capsys):
    assert dry("--data", str(photos), "--batch", "8") == 0
    assert "⌈21 / 8⌉" in capsys.readouterr().out
    assert dry("--batch", "65536", "--gpu", "l4") == 0
    out = capsys.readouterr().out
    at_once = int(re.search(r"at once +(\d+) photos", out)[1])
    assert at_once < 65536 and f"--micro {at_once}" in out  # else the run would take all of them
    assert dry("--batch", "65536", "--gpu", "l4", "--micro", str(at_once)) == 0
    assert "--micro" not in capsys.readouterr().out
    for option in ("--devices", "--micro"):
        assert dry(option, "0") == 1
        assert option.strip("-") in capsys.readouterr().err


def test_none_is_a_value(capsys):
    assert main(["--dry-run", "--recipe", "vit-b16", "--ema", "none", "--clip", "none"]) == 0
    assert "clip None, ema None" in capsys.readouterr().out
    assert dry("--lr", "none") == 1 and "lr" in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    assert pieces(256, 8, None) == 1 and pieces(256, 8, 8) == 4
    for batch, devices, micro in ((256, 3, None), (256, 8, 12), (4, 8, None)):
        with pytest.raises(ValueError, match="--batch"):
            pieces(batch, devices, micro)


def test_rings_and_hours_by_hand():
    assert all_reduce(1000, 1)[0] == 0 and all_reduce(1000, 2)[0] == 4000
    row, = scaled(recipe("resnet18", epochs=1, batch=8)[0], [1], utilisation=0.5, photos=8000,
                  readers=80.0)
    assert row["reading"] == pytest.approx(100 / 3600) and row["hours"] == row["reading"]
    work = 2 * 3 * 1_814_073_344 * 8000 / (989e12 * 0.5) / 3600
    assert row["computing"] == pytest.approx(work, rel=1e-3)


def test_float32_is_timed_at_the_float32_peak_and_bf16_at_the_other():
    # a T4 has no bf16
    for precision, gpu, peak in (("no", "l4", 30.3e12), ("bf16", "l4", 121e12),
                                 ("no", "t4", 8.1e12), ("bf16", "t4", 8.1e12)):
        made, _ = recipe("resnet18", epochs=1, batch=8, precision=precision)
        how = {"gpu": gpu, "utilisation": 0.5, "photos": 8000}
        row, = scaled(made, [1], readers=1e9, **how)
        work = 2 * 3 * 1_814_073_344 * 8000 / (peak * 0.5) / 3600
        assert row["computing"] == pytest.approx(work, rel=1e-3)
        assert estimate(made, readers=1e9, **how).hours == pytest.approx(work, rel=1e-3)


# ------------------------------------------------------------------ parts of a run

def test_rates_are_those_of_the_papers():
    made, _ = recipe("lrm-alexnet")
    points = [rate(epoch * 7, made, 7) for epoch in (0, 15, 57.5, 100)]
    assert points == pytest.approx([1e-4, 1, 0.5, 0], abs=1e-9)
    made, _ = recipe("vit-b16")
    assert rate(15, made, 1) == pytest.approx(0.5, abs=1e-3) and rate(30, made, 1) == 1


def test_norms_and_biases_do_not_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for name, kind in {"sgd": torch.optim.SGD, "adam": torch.optim.Adam,
                       "adamw": torch.optim.AdamW}.items():
        made = optimizer(list(net.parameters()), Recipe(optimizer=name, weight_decay=0.1))
        assert type(made) is kind
        assert [(g["weight_decay"], len(g["params"])) for g in made.param_groups] == [
            (0.1, 1), (0.0, 3)]


def test_an_average_survives_its_state_dict():
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    kept, back = Average(net, 0.5), Average(other, 0.5)
    kept.after_step(net)
    back.load_state_dict(kept.state_dict())
    nn.init.ones_(net.weight)
    for average in (kept, back):
        average.after_step(net)
    torch.testing.assert_close(kept.average.module.weight, back.average.module.weight)


def test_splits_are_shown_as_the_recipe_says(photos):
    made, _ = recipe("resnet18", classes=3, size=56, epochs=4, sizes=(32, 48), mixup=0.2)
    split = open_split(photos, "train", made)
    x, y = split.__getitems__([0, 9])
    assert x.shape == (2, 3, 32, 32) and y.shape == (2, 3)
    split.set_epoch(3)
    assert split.__getitems__([0, 9])[0].shape == (2, 3, 48, 48)
    x, y = open_split(photos, "val", made).__getitems__([0, 8])
    assert x.shape == (2, 3, 56, 56) and y.tolist() == [0, 2]


# ------------------------------------------------------------------ whole runs

def test_the_average_is_tested_by_the_loss_of_the_run(photos, tmp_path):
    made, _ = recipe("resnet18", classes=3, size=32, batch=8, epochs=1, precision="no", ema=0.9,
                     smoothing=0.5)
    model, history = train(made, photos, tmp_path / "run")
    loss = nn.CrossEntropyLoss(label_smoothing=0.5)
    told = evaluate(model, open_split(photos, "val", made), loss=loss)
    assert history.rows[-1]["average_loss"] == pytest.approx(told["loss"])


def test_a_loss_that_is_not_finite_and_an_interruption_are_told(photos, tmp_path, capsys,
                                                                monkeypatch):
    how = ["--recipe", "resnet18", "--epochs", "1", *SMALL, "--data", str(photos), "--checkpoint"]
    assert main([*how, str(tmp_path / "a"), "--lr", "1e30"]) == 1
    assert "the loss is" in capsys.readouterr().err

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Sizes, "after_step", stop, raising=False)
    assert main([*how, str(tmp_path / "b")]) == 130
    assert str(tmp_path / "b") in capsys.readouterr().err  # how to go on


def test_a_damaged_photo_in_a_reading_process_is_told_in_one_line(tmp_path, capsys):
    make_photos(tmp_path / "photos", train=8, classes=("ant", "bee"))
    (tmp_path / "photos" / "train" / "bee" / "bee_1.JPEG").write_bytes(b"no photo")
    where = ["--data", str(tmp_path / "photos"), "--checkpoint", str(tmp_path / "run")]
    assert main(["--recipe", "resnet18", *SMALL, "--classes", "2", "--workers", "1", *where]) == 1
    err = capsys.readouterr().err
    assert "bee_1.JPEG" in err and "Traceback" not in err


def test_photos_that_are_not_packed_to_their_end_are_told_and_have_no_cache(tmp_path):
    made, _ = recipe("resnet18", classes=3, size=32)
    make_photos(tmp_path)
    assert len(open_split(tmp_path, "train", made, cache=None)) == 21
    with pytest.raises(ValueError, match="cache"):
        open_split(tmp_path, "train", made, cache=tmp_path / "fast")
    (tmp_path / "train" / "plan.json").write_text("{}")  # what a killed pack leaves
    with pytest.raises(ValueError, match="pack"):
        open_split(tmp_path, "train", made)


def test_both_splits_are_looked_at_before_one_is_packed(tmp_path, capsys):
    make_photos(tmp_path / "photos")
    shutil.rmtree(tmp_path / "photos" / "val")
    how = ["--classes", "3", "--data", str(tmp_path / "photos"), "--pack", str(tmp_path / "packed")]
    assert main(how) == 1 and "val" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_the_script_for_a_cluster_starts_the_command_and_goes_back_into_the_queue(tmp_path):
    script = Path(__file__).parents[1] / "examples" / "imagenet.slurm"
    out = re.search(r"--output=(\S+)", script.read_text())[1]
    assert "/" not in out  # a folder that is not there ends a job before its first line
    fake = {"scontrol": 'echo "$@" >> told; test "$1" = requeue || echo node-1',
            "srun": 'echo "$@" > started; exec sleep 60'}
    for name, lines in fake.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                            "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node-[1-4]",
                            "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "128"}
    job = subprocess.Popen(["bash", script, "cbl-vit-b16", "/photos", "--micro", "64"],
                           cwd=tmp_path, env=environ)
    for _ in range(600):
        if (tmp_path / "started").exists() and (tmp_path / "started").read_text():
            break
        time.sleep(0.1)
    words = (tmp_path / "started").read_text().split()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) != 0
    assert (tmp_path / "told").read_text().splitlines()[-1] == "requeue 7"
    assert words[:2] == ["--cpus-per-task", "128"]  # srun does not take it from sbatch
    start = words.index("feedback-nb-imagenet")
    asked = _parser().parse_args(words[start + 1:])
    assert (asked.recipe, asked.data, asked.micro) == ("cbl-vit-b16", "/photos", 64)
    assert "7" in asked.checkpoint and "node-1:29500" in words


def weights(folder):
    return (Path(folder) / "weights.safetensors").read_bytes()


def test_a_run_and_its_packed_twin_and_a_second_call(photos, tmp_path, capsys):
    where = ["--data", str(photos), "--checkpoint", str(tmp_path / "run")]
    how = ["--recipe", "cbl-resnet18", "--epochs", "2", "--ema", "0.9", "--clip", "1", *SMALL]
    assert main([*how, *where]) == 0
    first, history = weights(tmp_path / "run"), History.read(tmp_path / "run")
    assert len(history) == 2 and history.frame["train_loss"].notna().all()
    made, _ = recipe("cbl-resnet18", classes=3, size=64, batch=8, epochs=2, precision="no", ema=0.9,
                     clip=1)
    model, _ = train(made, photos, tmp_path / "run", workers=0)  # it is finished: the average
    told = evaluate(model, open_split(photos, "val", made))
    last = history.rows[-1]
    assert [last[f"average_{k}"] for k in ("loss", "accuracy")] == pytest.approx(
        [told["loss"], told["accuracy"]])
    assert last["average_loss"] != last["valid_loss"]
    assert main([*how, *where]) == 0 and weights(tmp_path / "run") == first
    for key, value in (("--lr", "0.2"), ("--method", "plain"), ("--size", "48")):
        assert main([*how, *where, key, value]) == 1
        assert key.strip("-") in capsys.readouterr().err
    assert main(["--classes", "3", "--data", str(photos), "--pack", str(tmp_path / "packed")]) == 0
    packed = ["--data", str(tmp_path / "packed"), "--checkpoint", str(tmp_path / "packed_run")]
    assert main([*how, *packed]) == 0
    assert len(History.read(tmp_path / "packed_run")) == 2


@pytest.mark.parametrize("compile,micro", [("eager", None), (False, 4)])
def test_compiled_and_in_pieces_the_losses_are_the_same(photos, tmp_path, monkeypatch, compile,
                                                        micro):
    small = functools.partial(registry.FFTNetViT, dim=32, depth=2, heads=2)  # no batch norm
    monkeypatch.setattr(registry, "FFTNetViT", small)
    made, _ = recipe("fftnet-vit-b16", classes=3, size=32, batch=8, epochs=2, precision="no",
                     mixup=0.0, cutmix=0.0)
    _, plain = train(made, photos, tmp_path / "a")
    _, other = train(made, photos, tmp_path / "b", micro, compile)
    for key in ("train_loss", "valid_loss"):
        assert plain.frame[key].tolist() == pytest.approx(other.frame[key].tolist(), rel=1e-4)


ERRORS = {
    "class folder": (["--classes", "4"], "4"), "imagenet": (["--classes", "1000"], "n01440764"),
    "batch": (["--micro", "3"], "--batch"), "recipe": (["--recipe", "resnet19"], "resnet18"),
    "data": (["--data", "/nowhere"], "nowhere"), "setting": (["--augment", "crops"], "crop")}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_named_before_the_first_step(photos, tmp_path, capsys, case):
    more, named = ERRORS[case]
    where = ["--data", str(photos), "--checkpoint", str(tmp_path / "run")]
    assert main(["--recipe", "resnet18", *SMALL, *where, *more]) == 1
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_classes_that_differ_between_the_splits_are_refused(tmp_path, capsys):
    make_photos(tmp_path / "photos")
    (tmp_path / "photos" / "val" / "cat").rename(tmp_path / "photos" / "val" / "cow")
    where = ["--data", str(tmp_path / "photos"), "--checkpoint", str(tmp_path / "run")]
    assert main(["--recipe", "resnet18", *SMALL, *where]) == 1
    assert "cow" in capsys.readouterr().err


def test_a_damaged_photo_stops_or_is_skipped_and_counted(tmp_path, capsys):
    make_photos(tmp_path / "photos")
    path = tmp_path / "photos" / "train" / "bee" / "bee_1.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    where = ["--data", str(tmp_path / "photos"), "--checkpoint", str(tmp_path / "run")]
    how = ["--recipe", "resnet18", "--epochs", "1", *SMALL, *where]
    assert main(how) == 1 and "bee_1.JPEG" in capsys.readouterr().err
    assert main([*how, "--corrupt", "skip"]) == 0
    out = capsys.readouterr().out
    assert "1 damaged" in out and "bee_1.JPEG" in out


KILLED = """
import os, signal, sys
from feedback_nb import imagenet
at, rank = [int(n) for n in os.environ.get("KILL", "").split()], os.environ.get("RANK", "0")
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", os.environ.get("ATTEMPT", 0)))
steps = 0
def after_step(self, model):
    global steps
    steps += 1
    mine = rank == os.environ.get("WHO", "0")
    if mine and attempt < len(at) and steps == at[attempt]:
        os.kill(os.getpid(), signal.SIGKILL)
imagenet.Sizes.after_step = after_step
evaluate = imagenet.evaluate
def telling(*args, **options):
    found = evaluate(*args, **options)
    print("tested", found["n"])
    return found
imagenet.evaluate = telling
sys.exit(imagenet.main(sys.argv[1:]))
"""


def killable(photos, folder):
    return ["--recipe", "lrm-resnet18", "--epochs", "2", "--sizes", "32,48", "--ema", "0.9", *SMALL,
            "--batch", "7", "--every", "1", "--data", str(photos), "--checkpoint", str(folder)]


def test_killed_three_times_it_ends_with_the_same_weights(photos, tmp_path):
    run(KILLED, *killable(photos, tmp_path / "whole"))
    for attempt in range(3):
        done = run(KILLED, *killable(photos, tmp_path / "cut"), check=False, KILL="2 1 2",
                   ATTEMPT=attempt)
        assert done.returncode == -9 and not (tmp_path / "cut" / "weights.safetensors").exists()
    run(KILLED, *killable(photos, tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_a_rank_that_dies_is_started_again_and_the_end_is_the_same(photos, tmp_path):
    # 21 photos in batches of 7 over two processes: shares of four and three
    how = [w if w != "7" else "8" for w in killable(photos, tmp_path / "whole")]
    run(KILLED, *how, world=2)
    how = [w if w != "7" else "8" for w in killable(photos, tmp_path / "cut")]
    run(KILLED, *how, world=2, restarts=3, KILL="2 3", WHO=1)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert len(list((tmp_path / "cut").glob("recipe.json"))) == 1


@pytest.mark.slow
@pytest.mark.skipif("FEEDBACK_NB_DATA" not in os.environ, reason="needs imagenette-128")
@pytest.mark.parametrize("world", [0, 2])
def test_a_hundredth_of_an_epoch_of_imagenet_killed_three_times(tmp_path, world):
    archives = Path(os.environ["FEEDBACK_NB_DATA"], "imagenette-128")
    for split in ("train", "val"):
        with tarfile.open(archives / f"{split}.tar.gz") as photos:
            photos.extractall(tmp_path / "photos", filter="data")
    how = ["--recipe", "lrm-resnet18", "--epochs", "3", "--size", "32", "--classes", "10",
           "--batch", "32", "--workers", "1", "--precision", "no", "--every", "40", "--data",
           str(tmp_path / "photos"), "--checkpoint"]  # 12,000 photos in 375 steps
    options = {"world": world, "limit": 1500}
    run(KILLED, *how, tmp_path / "whole", **options)
    kills = {"KILL": "90 130 60"}
    if world:
        run(KILLED, *how, tmp_path / "cut", restarts=3, WHO=1, **kills, **options)
    for attempt in range(0 if world else 4):
        done = run(KILLED, *how, tmp_path / "cut", check=False, ATTEMPT=attempt, **kills)
        assert done.returncode == (0 if attempt == 3 else -9)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_processes_that_hang_are_ended_and_tell_where_they_stood():
    waits = [sys.executable, "-c", "import time\ndef stuck():\n    time.sleep(100)\nstuck()"]
    begin = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done, hung = once([*begin, "--no-python", *waits], limit=15)
    assert hung and done.returncode != 0 and "in stuck" in done.stderr


def test_a_run_goes_on_with_another_number_of_processes(photos, tmp_path):
    how = [w if w != "7" else "8" for w in killable(photos, tmp_path / "run")]
    assert run(KILLED, *how, check=False, KILL="4").returncode == -9
    told = re.findall(r"tested (\d+)", run(KILLED, *how, world=2).stdout)
    history = History.read(tmp_path / "run").frame
    assert len(history) == 2 and history["train_loss"].notna().all()
    assert sorted(told) == ["4", "5"]  # of nine photos each once, and not all by each process
    made, _ = recipe("lrm-resnet18", classes=3, size=64)
    read_weights(model := build(made), tmp_path / "run" / "weights.safetensors")
    average = evaluate(model, open_split(photos, "val", made))
    assert history["average_loss"].iloc[-1] == pytest.approx(average["loss"], rel=1e-4)


def test_a_full_disk_loses_no_more_than_a_checkpoint(photos, tmp_path, monkeypatch, capsys):
    how = killable(photos, tmp_path / "run")
    assert main(killable(photos, tmp_path / "whole")) == 0
    calls, torch_save = [], torch.save

    def full(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return torch_save(*args, **options)

    monkeypatch.setattr(torch, "save", full)
    assert main(how) == 1 and "No space left" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(how) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


EVERY = """
import functools, json, sys
from pathlib import Path
from torchvision.models import VisionTransformer
from feedback_nb import imagenet, recipes, registry
from feedback_nb.fftnet import FFTNetViT
torchvision_net = recipes.torchvision_net
def small(name, classes, **options):
    if name.startswith("vit"):
        return VisionTransformer(options["image_size"], 16, 2, 2, 32, 64, num_classes=classes)
    return torchvision_net(name, classes, **options)
recipes.torchvision_net = small
registry.FFTNetViT = functools.partial(FFTNetViT, dim=32, depth=2, heads=2)
photos, folder, *names = sys.argv[1:]
for name in names:
    r, _ = recipes.recipe(name, classes=3, size=96, batch=10, epochs=1, lr=1e-3)
    _, history = imagenet.train(r, photos, Path(folder) / name, 5)
    print(json.dumps([name, history.rows[-1]["valid_loss"], history.rows[-1]["valid_accuracy"]]))
"""
WIDE = [name for name in RECIPES if "alexnet" in name]  # 60 million weights each


SOME = ["cbl-alexnet", "lrm3-alexnet", "caps-alexnet"]


@pytest.mark.slow
@pytest.mark.parametrize("names", [[name for name in RECIPES if name not in WIDE], SOME],
                         ids=["most", "alexnet"])
def test_every_recipe_takes_some_steps_on_two_processes(photos, tmp_path, names):
    out = run(EVERY, photos, tmp_path, *names, world=2, limit=900).stdout
    rows = [json.loads(line) for line in out.splitlines() if line.startswith('["')]
    assert {row[0] for row in rows} == set(names)
    assert all(loss < 50 and 0 <= hits <= 1 for _, loss, hits in rows)
