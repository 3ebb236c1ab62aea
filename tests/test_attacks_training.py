"""Kills, cuts, flips and bombs by the hundred: `pytest -m slow -s tests/test_attacks_training.py`.

Each attack is counted; what is asserted is that none of them changed a bit or ran a command.
Last run, in 2:32 on one core: 100 files cut, 100 with a flipped bit, 100 overwritten, all noticed
and all runs exact; 18 bombs refused. The kills were not repeated then.
"""
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from test_training import KILL, Bomb, assert_same, build, noisy, run

from feedback_nb.checkpoints import _digest, newest, saved
from feedback_nb.training import CheckpointError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
COUNT = int(os.environ.get("FEEDBACK_NB_ATTACKS", 100))  # of each kind but the slow ones
ENV = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")} | {
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of 3 epochs, and what 4 epochs end with."""
    folder, whole = tmp_path_factory.mktemp("runs") / "run", build()
    run(build(), epochs=3, checkpoint=folder, augment=noisy)
    run(whole, epochs=4, augment=noisy)
    return folder, whole


def attacked(runs, tmp_path, damage):
    """How many of COUNT damaged folders were noticed; all must end where the whole run does."""
    folder, whole = runs
    rng, noticed = random.Random(5), 0
    for k in range(COUNT):
        place = tmp_path / str(k)
        shutil.copytree(folder, place)
        damage(rng, rng.choice([p for p in newest(place).iterdir() if p.is_file()]))
        model = build(seed=9)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(model, epochs=4, checkpoint=place, augment=noisy)
        noticed += any("Going on from the intact" in str(w.message) for w in caught)
        assert_same(whole, model)
        assert len(list(place.glob("damaged-*"))) == 1
        shutil.rmtree(place)
    return noticed


def cut(rng, path):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip(rng, path):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def overwrite(rng, path):
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.randrange(1, 4096))
    content[start:end] = bytes(255 - byte for byte in content[start:end])
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, overwrite], ids=lambda damage: damage.__name__)
def test_damage_is_noticed_and_nothing_is_lost(runs, tmp_path, damage):
    noticed = attacked(runs, tmp_path, damage)
    print(f"\n{damage.__name__}: {noticed} of {COUNT} noticed, {COUNT} of {COUNT} exact")
    assert noticed == COUNT


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bombs_run_nothing(runs, tmp_path):
    protocols = range(pickle.HIGHEST_PROTOCOL + 1)
    writes = [lambda bomb, path, k=k: path.write_bytes(pickle.dumps(bomb, k)) for k in protocols]
    writes += [torch.save, lambda bomb, path: torch.save({"optimizer": bomb}, path),
               lambda bomb, path: torch.save([torch.zeros(3), bomb], path)]
    for k, write in enumerate(writes):
        for file in ("state.pt", "model.safetensors"):
            place = tmp_path / f"{k}-{file}"
            shutil.copytree(runs[0], place)
            for path in saved(place):
                write(Bomb(tmp_path / "boom"), path / file)
                manifest = json.loads((path / "manifest.json").read_text())
                manifest[file] = _digest(path / file)  # an attacker gets the checksum right
                (path / "manifest.json").write_text(json.dumps(manifest))
            with pytest.raises(CheckpointError):
                run(build(), epochs=4, checkpoint=place, augment=noisy)
            assert not (tmp_path / "boom").exists()
    print(f"\nbombs: {2 * len(writes)} of {2 * len(writes)} refused, none run")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_random_moments(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path), str(COUNT)], cwd=ROOT,
                          capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    print("\nkill -9:", done.stdout.strip(), "of", COUNT, "all exact")


WORKER = '''
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_training import Loop, build, rows, run
rank = int(os.environ["RANK"])
open(f"{sys.argv[2]}/pid-{rank}", "w").write(str(os.getpid()))
history = run(build(Loop), epochs=40, batch_size=15, checkpoint=(sys.argv[2] + "/run", 2))
if rank == 0:
    json.dump(rows(history), open(sys.argv[2] + "/out.json", "w"))
'''


def spread(place, kill_after=None):
    """The history of a run of two processes, one of which is killed after so many seconds."""
    place.mkdir()
    (place / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node=2", "--max-restarts=3", str(place / "worker.py")]
    process = subprocess.Popen([*torchrun, str(ROOT / "tests"), str(place)], cwd=ROOT, env=ENV,
                               stderr=subprocess.DEVNULL)
    killed = False
    if kill_after is not None:
        while not list((place / "run").glob("step-*")) and process.poll() is None:
            time.sleep(0.05)
        time.sleep(kill_after)
        if process.poll() is None and not (place / "out.json").exists():
            os.kill(int((place / "pid-1").read_text()), signal.SIGKILL)
            killed = True
    assert process.wait(600) == 0
    return json.loads((place / "out.json").read_text()), killed


def test_workers_of_torchrun_killed_at_random_moments(tmp_path):
    whole, _ = spread(tmp_path / "whole")
    rng, kills = random.Random(6), 0
    for k in range(max(1, COUNT // 20)):
        history, killed = spread(tmp_path / str(k), rng.uniform(0, 3))
        kills += killed
        assert history == whole
    print(f"\ntorchrun: {kills} workers killed, all histories equal to the bit")
