"""The lab of chapter 11: whose pictures a seed gets, and what other contexts and other statistics
of batch norm do to a trained network. The chapter exports nothing, so its own cells are tested."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from feedback_nb.data import TensorData

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "11_cbl_images.ipynb"
KEPT = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef


@pytest.fixture(scope="module")
def lab():
    """The imports, functions, classes and constants of the notebook, without what it runs."""
    space = {"__name__": "lab"}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "google.colab" not in source:
            constant = lambda node: isinstance(node, ast.Assign) and getattr(
                node.targets[0], "id", "").isupper()
            kept = [n for n in ast.parse(source).body if isinstance(n, KEPT) or constant(n)]
            exec(compile(ast.Module(kept, []), "11_cbl_images", "exec"), space)
    return SimpleNamespace(**space)


def pictures(n=64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 1, 16, 16), generator=draw).byte()
    return TensorData(x, torch.arange(n) % 10, name="noise")


def moved(lab, **options):
    """A CBL whose running statistics have seen data, with gates that are not all the same."""
    torch.manual_seed(0)
    model = lab.refined(1, 2, **options)
    for adapter in model.adapters.children():
        torch.nn.init.normal_(adapter.gate.weight)
    model.seen = pictures()
    return lab.recalibrate(model, model.seen, batch_size=64).eval()


@pytest.mark.parametrize(("n", "size"), [(100, 20), (100, 33), (7, 7)])
def test_no_two_seeds_share_a_picture_as_long_as_the_pool_lasts(lab, n, size):
    pool = TensorData(torch.arange(n)[:, None], torch.zeros(n, dtype=torch.long))
    drawn = [lab.drawn(pool, size, seed).x[:, 0].tolist() for seed in range(2 * (n // size))]
    assert all(len(set(part)) == size for part in drawn)
    first, second = drawn[: n // size], drawn[n // size :]
    for whole in (first, second):
        assert len(set(sum(whole, []))) == size * (n // size)
    assert [sorted(part) for part in first] != [sorted(part) for part in second] or size == n


def test_every_arm_builds_and_takes_its_recipe(lab):
    size = {**lab.SIZES["page"], "width": 2, "strong": ["CNN", "CBL"]}
    made = {name: make() for name, make in lab.arms(size).items()}
    epochs = {name: own["epochs"] for name, (_, own) in made.items()}
    assert epochs.pop("CNN, 5 times as long") == 5 * size["epochs"]
    assert set(epochs.values()) == {size["epochs"]}
    assert {name for name, (_, own) in made.items() if own["schedule"] == "one-cycle"} == {
        "CNN, strong recipe", "CBL, strong recipe"}
    count = lambda name: sum(p.numel() for p in made[name][0].parameters())
    assert count("CNN, equal parameters") >= count("CBL") > count("CNN")


def test_nothing_comes_back_in_the_loop_without_z(lab):
    model, data = moved(lab, context=lab.NoContext()), pictures(seed=1)
    own = lab.each_step(model, data)
    found = lab.measured(model, data)
    assert found["another context"] == found["mean context"] == own
    z = model.context(torch.randn(3, 10))
    assert z.shape == (3, 64) and not z.any()


def test_other_contexts_are_put_in_and_taken_out_again(lab):
    model, data = moved(lab), pictures(seed=1)
    x = data[:64][0]
    with torch.no_grad():
        own = model(x)
        hook = model.context.register_forward_hook(lambda g, y, z: lab.CONTEXTS["another"](z))
        other = model(x)
        hook.remove()
    assert not torch.allclose(own, other)  # the gates do listen
    assert list(lab.CONTEXTS["another"](torch.arange(3)[:, None])[:, 0]) == [2, 0, 1]
    torch.testing.assert_close(lab.CONTEXTS["mean"](x.flatten(1))[0], x.flatten(1).mean(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lab.measured(model, data)
    assert not model.context._forward_hooks and not model.statistics.shared
    for name, value in model.state_dict().items():  # only what is estimated anew has changed
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_shared_set_is_moved_by_every_pass_and_fits_none(lab):
    model = moved(lab)
    norm = next(m for m in model.net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    last = [m for m in model.net.modules() if isinstance(m, torch.nn.BatchNorm2d)][-1]
    seen, own = int(last.num_batches_tracked), last.running_mean.clone()
    with torch.no_grad():
        y = model(pictures(seed=1)[:64][0])
        lab.share_statistics(model)
        shared = model(pictures(seed=1)[:64][0])
    assert int(last.num_batches_tracked) - seen == 5  # T + 1 passes of one batch
    assert not torch.allclose(last.running_mean, own) and not torch.allclose(y, shared)
    assert not norm.training
