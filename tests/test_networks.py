"""The plain networks: what they stay, equal parameters and compute, proposed layers."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from feedback_nb.cbl import CBL
from feedback_nb.evaluation import cost
from feedback_nb.lrm import LRM
from feedback_nb.networks import (
    SmallAlexNet,
    cnn,
    count_parameters,
    default_layers,
    match_compute,
    match_parameters,
    multiply_adds,
    resnet18,
    rnn,
    suggest_connections,
    text_encoder,
    torchvision_net,
    vit,
)

STAGES = ["stage1", "stage2", "stage3", "stage4"]
LAYERS = ["layer1", "layer2", "layer3", "layer4"]
row = lambda prefix, numbers: [f"{prefix}{i}" for i in numbers]

TORCHVISION = {  # name: (default layers, the ladder's rungs from below and the output's layer)
    "resnet18": (LAYERS, "layer1.1 layer2.1 layer3.1 layer4.1 fc"),
    "resnet50": (LAYERS, "layer2.0 layer3.0 layer3.4 layer4.2 fc"),
    "vgg11": (
        row("features.", (0, 3, 6, 8, 11, 13, 16, 18)),
        "features.3 features.8 features.13 features.18 classifier.6",
    ),
    "alexnet": (
        row("features.", (0, 3, 6, 8, 10)),
        "features.0 features.3 features.6 features.10 classifier.6",
    ),
    "convnext_tiny": (
        row("features.", (1, 3, 5, 7)),
        "features.3.0 features.5.2 features.5.6 features.7.2 classifier.2",
    ),
    "mobilenet_v3_small": (
        row("features.", range(1, 12)),
        "features.2 features.5 features.8 features.11 classifier.3",
    ),
    "efficientnet_b0": (row("features.", range(1, 8)), None),
    "efficientnet_v2_s": (row("features.", range(1, 7)), None),
    "densenet121": (row("features.denseblock", range(1, 5)), None),
    "swin_t": (row("features.", (1, 3, 5, 7)), None),
    "vit_b_16": (row("encoder.layers.encoder_layer_", range(12)), None),
    "shufflenet_v2_x1_0": (["stage2", "stage3", "stage4"], None),
    "squeezenet1_1": (row("features.", (3, 4, 6, 7, 9, 10, 11, 12)), None),
    "mnasnet0_5": (row("layers.", range(8, 14)), None),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_layers_of_torchvision(name):
    layers, ladder = TORCHVISION[name]
    with torch.device("meta"):
        net, x = torchvision.models.get_model(name), torch.zeros(2, 3, 224, 224)
    assert default_layers(net, x) == layers
    pairs = suggest_connections(net, x)
    assert len(pairs) == 4 and all(net.get_submodule(n) is not None for pair in pairs for n in pair)
    if ladder:
        *rungs, output = ladder.split()
        assert pairs == list(zip([*rungs[2:], output, output], rungs))


def test_layers_of_regnet():  # torchvision cannot build it on the meta device
    net, x = torchvision.models.regnet_y_400mf(), torch.zeros(2, 3, 32, 32)
    assert default_layers(net, x) == row("trunk_output.block", range(1, 5))
    sources = [a for a, _ in suggest_connections(net, x)]
    assert sources[2:] == ["fc", "fc"] and all(s.startswith("trunk_output") for s in sources[:2])


class Bare(nn.Module):
    """An LSTM and a read-out with a softmax behind it."""

    def __init__(self, **options):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(4, 8, **options), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.lstm(x)[0].mean(1)).log_softmax(1)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.a(self.a(x)))


SEQUENCES, PHOTOS = torch.zeros(2, 5, 4), torch.zeros(2, 3, 32, 32)
WORDS = torch.ones(2, 3, dtype=torch.long)
BLOCKS = row("encoder.layers.encoder_layer_", range(2))
OURS = {
    "cnn": (lambda: cnn(1, width=4), torch.zeros(2, 1, 28, 28), STAGES),
    "resnet18": (lambda: resnet18(5, small=True), torch.zeros(2, 3, 16, 16), LAYERS),
    "vit": (lambda: vit(num_layers=2), PHOTOS, BLOCKS),
    "vit, one block": (lambda: vit(num_layers=1), PHOTOS, BLOCKS[:1]),
    "rnn": (lambda: rnn(6, width=8), torch.zeros(2, 5, 6), ["layers.0", "layers.1"]),
    "rnn, one layer": (lambda: rnn(6, width=8, depth=1), torch.zeros(2, 5, 6), ["layers.0"]),
    "text": (lambda: text_encoder(9, dim=16, depth=2), WORDS, ["blocks.0", "blocks.1"]),
    "text, one block": (lambda: text_encoder(9, dim=16, depth=1), WORDS, ["blocks.0"]),
    "small AlexNet": (SmallAlexNet, torch.zeros(2, 3, 48, 48), row("conv", range(1, 6))),
    "MLP": (
        lambda: nn.Sequential(*(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8), nn.Linear(8, 3)),
        torch.zeros(2, 8),
        ["0", "2"],
    ),
    "wrapped": (lambda: nn.Sequential(nn.Identity(), resnet18(5)), PHOTOS, row("1.", LAYERS)),
}


@pytest.mark.parametrize("name", OURS)
def test_first_try_in_one_line(name):
    """What is proposed builds a CBL and an LRM, whatever the network."""
    make, x, layers = OURS[name]
    net = make()
    before = copy.deepcopy(net.state_dict())
    assert default_layers(net, x) == layers
    pairs = suggest_connections(net, x)
    assert net.training and all(map(torch.equal, net.state_dict().values(), before.values()))
    assert CBL(copy.deepcopy(net), layers, example=x).eval()(x).shape == net.eval()(x).shape
    assert LRM(copy.deepcopy(net), pairs, example=x).eval()(x).shape == net(x).shape


@pytest.mark.parametrize("rungs", [1, 2, 3, 5, 8, 20])
def test_ladder(rungs):
    """A rung hears the one half the ladder above, or the output; never more rungs than blocks."""
    net, x = resnet18(), torch.zeros(1, 3, 64, 64)
    pairs = suggest_connections(net, x, rungs)
    n = min(rungs, 8)
    assert len(pairs) == len({b for _, b in pairs}) == n and pairs[-1] == ("fc", "layer4.1")
    order = [*(f"layer{i}.{k}" for i in range(1, 5) for k in range(2)), "fc"]
    assert all(order.index(a) > order.index(b) for a, b in pairs)
    assert sum(a == "fc" for a, _ in pairs) == -(-n // 2)


def test_an_lstm_returns_a_pair():
    """CBL refines its first tensor; an LRM wants a layer that returns a tensor alone."""
    net, x = Bare(batch_first=True), SEQUENCES
    assert default_layers(net, x) == ["lstm"]
    assert CBL(net, ["lstm"], example=x)(x).shape == (2, 3)
    with pytest.raises(ValueError, match="Bare"):
        suggest_connections(net, x)


@pytest.mark.parametrize(
    "net, x",
    [(nn.Linear(3, 3), torch.zeros(2, 3)), (Twice(), torch.zeros(2, 8)), (Bare(), SEQUENCES)],
    ids=["no layers", "runs twice", "time first"],
)
def test_no_layer_to_propose(net, x):
    for propose in (default_layers, suggest_connections):
        with pytest.raises(ValueError, match=type(net).__name__):
            propose(net, x)


def test_equal_parameters():
    small, big = cnn(1, width=4), CBL(cnn(1, width=4), STAGES, example=torch.zeros(1, 1, 8, 8))
    make = lambda hidden: cnn(1, width=4, hidden=hidden)
    twin = match_parameters(make, big, start=128)
    hidden = twin.fc2.in_features
    assert count_parameters(make(hidden - 1)) < count_parameters(big) <= count_parameters(twin)
    assert match_parameters(make, count_parameters(small), start=1).fc2.in_features == 128


def test_equal_compute():
    x = torch.zeros(1, 1, 28, 28)
    big = CBL(cnn(1, width=4), STAGES, example=x)
    make = lambda width: cnn(1, width=width)
    assert match_compute(make, big, x).fc1[0].in_features == 8 * 8
    torch.manual_seed(0)
    found = match_compute(make, big, x, start=7)
    torch.manual_seed(0)  # the search draws no random numbers: the network is the one of this width
    assert all(map(torch.equal, found.state_dict().values(), make(8).state_dict().values()))
    wider = match_compute(make, cnn(1, width=4), x, start=6)
    assert wider.fc1[0].in_features == 8 * 6  # never below start


def test_an_answer_in_a_dictionary_is_the_output():
    class Named(nn.Sequential):
        def forward(self, x):
            return {"logits": super().forward(x)}

    column, x = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)], torch.zeros(2, 4)
    assert default_layers(Named(*column), x) == default_layers(nn.Sequential(*column), x)
    assert suggest_connections(Named(*column), x) == suggest_connections(nn.Sequential(*column), x)


def test_multiply_adds_by_hand():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(3 * 16, 5)).train()
    x = torch.zeros(2, 2, 4, 4)
    assert multiply_adds(net, x) == 2 * (3 * 2 * 9 * 16 + 48 * 5)
    assert net.training and next(net.parameters()).device.type == "cpu"
    looped = CBL(cnn(1, width=2), example=torch.zeros(1, 1, 8, 8), steps=3)
    x = torch.zeros(1, 1, 16, 16)
    table = cost({"net": looped.net, "loop": looped}, x, train=False, seconds=1e-3, rounds=1)
    for name, count in [("net", multiply_adds(looped.net, x)), ("loop", multiply_adds(looped, x))]:
        assert table.loc[name, "mflops"] * 1e6 == pytest.approx(2 * count)  # as the table of costs
    assert multiply_adds(looped, x, steps=0) == multiply_adds(looped.net, x)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # torch would fuse it
    assert multiply_adds(block, torch.zeros(1, 5, 8)) == 5 * (4 * 64 + 2 * 8 * 16) + 2 * 25 * 8
    cells = nn.LSTM(4, 6, batch_first=True)
    assert multiply_adds(cells, torch.zeros(1, 5, 4)) == 5 * 4 * 6 * (4 + 6)


def test_networks_keep_their_weights():
    """Made from a seed, they are what every recorded run was made of."""
    sums = {}
    for name, make in {
        "cnn": lambda: cnn(1, width=4),
        "resnet18": lambda: resnet18(5, small=True, in_channels=1),
        "rnn": lambda: rnn(6, width=8),
        "text": lambda: text_encoder(9, dim=16, depth=2),
        "alexnet": SmallAlexNet,
    }.items():
        torch.manual_seed(0)
        sums[name] = sum(float(p.detach().abs().sum()) for p in make().parameters())
    wanted = {"cnn": 1252.493, "resnet18": 224509.393, "rnn": 211.061, "text": 1027.316}
    wanted["alexnet"] = 4005.859
    assert sums == pytest.approx(wanted, rel=1e-5)


def test_any_classifier_of_torchvision(monkeypatch):
    from torchvision.models import MobileNet_V3_Small_Weights as Weights

    torch.manual_seed(1)
    trained = torchvision.models.mobilenet_v3_small().state_dict()
    monkeypatch.setattr(Weights, "get_state_dict", lambda self, *args, **kwargs: trained)
    net = torchvision_net("mobilenet_v3_small", 7, weights="DEFAULT")
    assert net.classifier[3].out_features == 7
    assert torch.equal(net.features[0][0].weight, trained["features.0.0.weight"])
    assert torchvision_net("vit_b_16", 5, image_size=32).image_size == 32
    with pytest.raises(ValueError, match="image_size 100.*96"):
        torchvision_net("vit_b_16", image_size=100)


def test_a_make_that_ignores_its_width_is_refused():
    still = lambda width: torch.nn.Linear(4, 2)
    with pytest.raises(ValueError, match="width"):
        match_parameters(still, 1000)
    with pytest.raises(ValueError, match="width"):
        match_compute(still, torch.nn.Linear(4, 200), torch.zeros(1, 4))
