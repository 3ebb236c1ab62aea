"""The first screen: its network does what the text beside it says, its cards are the claims'."""
import json
import sys

import numpy as np
import pytest
import torch
import yaml
from small_project import ROOT, SCRIPTS

from feedback_nb.cbl import CBL

sys.path.insert(0, str(SCRIPTS))
import cover  # noqa: E402
import names  # noqa: E402

NET = json.loads(cover.WEIGHTS.read_text())


def test_the_index_is_what_the_script_makes():
    assert cover.check_cover(ROOT) == []


def test_below_the_bound_one_reading_forgets_and_the_other_remembers():
    norm = lambda name: np.linalg.norm(NET[name], 2)
    assert NET["bound"] >= norm("w") + norm("v") * norm("context") * norm("head")
    for strength in (0.5, 0.75, 0.9):
        states, logits = cover.run(NET, "literal", strength=strength)
        assert np.ptp(logits[-1].argmax(1)) == 0 and np.ptp(states[-1], axis=0).max() < 0.1
        states, logits = cover.run(NET, "through", strength=strength)
        assert (logits[-1].argmax(1) == np.arange(10)).all()
        assert np.abs(states[-1] - states[-2]).max() < 1e-9  # it has settled
    assert len(set(cover.run(NET, "literal", strength=3.0)[1][-1].argmax(1))) >= 8


def test_a_contraction_never_stretches_below_the_bound():
    "The distance of any two digits falls in every step, as the theorem says, from any start."
    states, _ = cover.run(NET, "literal", strength=0.99)
    gaps = np.linalg.norm(states[:, 1:] - states[:, :1], axis=2)
    assert (gaps[1:] < gaps[:-1]).all()


@pytest.mark.parametrize("flow", ["literal", "through"])
def test_the_network_of_the_page_is_a_cbl(flow):
    "The same weights in the package's own class: states and answers agree in every step."
    weight = lambda name: torch.tensor(NET[name], dtype=torch.float64)

    class Adapter(torch.nn.Module):
        def forward(self, h, z):
            gain = cover.STRENGTH / NET["bound"]
            return torch.tanh(gain * (h @ weight("w").T + z @ weight("v").T + weight("v_b")))

    net = torch.nn.Sequential()
    net.add_module("hidden", torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh()))
    net.add_module("head", torch.nn.Linear(16, 10))
    net = net.double()
    x = torch.tensor(NET["digits"], dtype=torch.float64)
    model = CBL(net, ["hidden"], example=x, context_dim=8, flow=flow, alpha=0.5,
                adapter=lambda channels, dim: Adapter()).double().eval()
    with torch.no_grad():
        for layer, name in ((net.hidden[0], "f"), (net.head, "head")):
            layer.weight.copy_(weight(name))
            layer.bias.copy_(weight(name + "_b"))
        linear = next(m for m in model.context.modules() if isinstance(m, torch.nn.Linear))
        linear.weight.copy_(weight("context"))
        linear.bias.copy_(weight("context_b"))
        path = model.trajectory(x, steps=cover.LAST, tol=False)
    theirs = cover.run(NET, flow)[1]
    outputs = torch.stack(list(path.outputs))
    torch.testing.assert_close(outputs, torch.tensor(theirs), rtol=0, atol=1e-9)


def test_cards_say_what_the_claims_say():
    data = yaml.safe_load((ROOT / "nbs" / "claims.yaml").read_text(encoding="utf-8"))
    claims = {claim["id"]: claim for claim in data["claims"]}
    assert set(cover.CARDS) == set(data["papers"])
    text = cover.cards(ROOT)["text/markdown"]
    for paper, (claim, *_) in cover.CARDS.items():
        assert claims[claim]["paper"] == paper
        assert f"*{claims[claim]['verdict']}* (scale: {claims[claim]['scale']})" in text
        assert data["papers"][paper]["at"] in text


def test_pictures_are_small_and_there():
    images = ROOT / "nbs" / "images"
    assert (images / "cover.gif").stat().st_size < 200_000
    assert (images / "share.png").stat().st_size < 60_000
    assert (images / "favicon.svg").is_file()


def test_every_public_name_has_its_page_and_its_sentence():
    listed = {(module, name): line for module, _, _, rows in names.every_name(ROOT)
              for name, line, _ in rows}
    assert listed["cbl", "CBL"] and listed["fixed_points", "iterate"] and len(listed) > 300
    assert not [key for key, line in listed.items() if not line]
