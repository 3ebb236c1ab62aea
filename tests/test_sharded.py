"""A network cut over processes: the same end as in data parallel, kills and other numbers."""
import json

import pytest
import torch
from safetensors.torch import load_file
from test_imagenet import make_photos, run

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from torchvision.models import VisionTransformer
from feedback_nb import imagenet, recipes, sharded
recipes.torchvision_net = lambda name, classes, image_size: VisionTransformer(
    image_size, 16, 2, 2, 32, 64, num_classes=classes)
kind, method, photos, folder = sys.argv[1:]
kill, rank = int(os.environ.get("KILL", 0)), os.environ["RANK"]
steps = {"steps": 2} if method == "cbl" else {}
r, _ = recipes.recipe("vit-h14", method=method, **steps, classes=3, size=32, batch=8, epochs=2,
                      precision=os.environ.get("PRECISION", "no"), ema=None, optimizer="sgd",
                      lr=float(os.environ.get("LR", 0.1)))
if kind == "whole":
    imagenet.train(r, photos, folder, 2)
else:
    steps = sharded.optimizer
    def killing(parameters, recipe):
        made, done = steps(parameters, recipe), []
        def count(*_):
            done.append(1)
            if rank == "1" and len(done) == kill:
                os.kill(os.getpid(), signal.SIGKILL)
        made.register_step_post_hook(count)
        return made
    sharded.optimizer = killing
    losses = sharded.train_sharded(r, photos, folder, 2 if os.environ["WORLD_SIZE"] == "2" else 4,
                                   every=2)
    if rank == "0":
        print(json.dumps(losses))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"), train=8)


@pytest.mark.parametrize("method", ["plain", "cbl"])
def test_cut_into_parts_it_ends_where_data_parallel_ends(photos, tmp_path, method):
    run(SCRIPT, "whole", method, photos, tmp_path / "whole", world=2)
    run(SCRIPT, "cut", method, photos, tmp_path / "cut", world=2)
    whole, cut = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "cut"))
    shared = whole.keys() & cut.keys()
    assert len(shared) > 20 and not [k for k in whole.keys() - cut.keys() if "weight" in k]
    for key in shared:
        torch.testing.assert_close(cut[key], whole[key], atol=2e-5, rtol=1e-3)


def test_in_half_width_the_loss_is_still_computed_in_whole_width(photos, tmp_path):
    done = run(SCRIPT, "cut", "cbl", photos, tmp_path / "cut", world=1, PRECISION="bf16")
    losses = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert losses.isfinite().all() and (losses != losses.bfloat16()).all()


def test_a_loss_that_is_not_finite_stops_the_run(photos, tmp_path):
    done = run(SCRIPT, "cut", "plain", photos, tmp_path, world=1, check=False, LR="1e30")
    assert done.returncode != 0 and "FloatingPointError" in done.stderr
    assert not (tmp_path / "weights.safetensors").exists()


def test_killed_and_cut_differently_it_goes_on(photos, tmp_path):
    whole = run(SCRIPT, "cut", "plain", photos, tmp_path / "whole", world=2)
    done = run(SCRIPT, "cut", "plain", photos, tmp_path / "cut", world=2, KILL=3, check=False)
    assert done.returncode != 0
    again = run(SCRIPT, "cut", "plain", photos, tmp_path / "cut", world=2)
    assert json.loads(again.stdout.splitlines()[-1]) == json.loads(
        whole.stdout.splitlines()[-1])[2:]
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    kept = sorted((tmp_path / "cut").glob("step-*"))
    assert [int(path.name[5:]) for path in kept] == [4, 6]
    (kept[-1] / ".metadata").unlink()  # as a kill in the middle of writing leaves it
    alone = run(SCRIPT, "cut", "plain", photos, tmp_path / "cut", world=1)
    assert len(json.loads(alone.stdout.splitlines()[-1])) == 2


def test_fewer_examples_than_pieces_give_the_gradients_of_the_whole_batch():
    script = """
import torch
from types import SimpleNamespace
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from feedback_nb import sharded
distributed.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Linear(6, 3)
x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
cross_entropy(net(x), y).backward()
right = net.weight.grad.clone()
net.zero_grad()
net = sharded.sharded(nn.Sequential(nn.Sequential(net)))
for cut in (1, 4, 8):
    net.zero_grad()
    sharded._step(net, x, y, 1.0, cut, cross_entropy, SimpleNamespace(clip=None))
    torch.testing.assert_close(net[0][0].weight.grad.full_tensor(), right)
distributed.destroy_process_group()
"""
    assert run(script, world=1).returncode == 0
