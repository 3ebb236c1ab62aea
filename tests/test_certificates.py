"""Certificates: bounds that are never below the true value, against the explicit matrix."""

import copy
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close

from feedback_nb.certificates import conv_norm_bound, jacobian_norm, lipschitz_upper
from feedback_nb.fixed_points import lipschitz

F64 = torch.float64
seeds = st.integers(0, 2**31 - 1)


def true_norm(f, *shape):
    """The oracle: the matrix, column by column, and its largest singular value in float64."""
    n = math.prod(shape)
    with torch.no_grad():
        zero = f(torch.zeros(1, *shape, dtype=F64)).flatten()
        columns = [f(e.reshape(1, *shape)).flatten() - zero for e in torch.eye(n, dtype=F64)]
    return torch.linalg.svdvals(torch.stack(columns, 1)).max().item()


@st.composite
def convolutions(draw):
    "A random convolution, or its transpose, with every option, and the size of an image for it."
    d = draw(st.sampled_from([1, 1, 2, 2, 3]))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(d))
    groups, kind = draw(st.sampled_from([1, 1, 2,
                                         3])), draw(st.sampled_from(["Conv", "ConvTranspose"]))
    kernel, dilation, stride = each(1, 4 if d < 3 else 2), each(1, 3 if d < 3 else 2), each(1, 3)
    options = {
        "kernel_size": kernel, "dilation": dilation, "stride": stride, "groups": groups,
        "padding": each(0, 3)
    }
    if kind == "Conv" and draw(st.booleans()):
        options |= {
            "padding_mode": "circular", "padding": tuple(
                draw(st.integers(0, (k - 1) * m // 2)) for k, m in zip(kernel, dilation))
        }
    torch.manual_seed(draw(seeds))
    conv = getattr(nn, f"{kind}{d}d")(groups * draw(st.integers(1, 2)),
                                      groups * draw(st.integers(1, 2)), **options).double()
    if draw(st.booleans()):
        nn.init.ones_(conv.weight)  # the steepest for its size: all taps pull the same way
    return conv, each(*{1: (3, 12), 2: (3, 6), 3: (2, 4)}[d])


@settings(max_examples=150, deadline=None)
@given(convolutions(), st.sampled_from([2, 3, 16]))
def test_the_fourier_bound_is_never_below_the_norm(case, samples):
    conv, size = case
    try:
        empty = conv(torch.zeros(1, conv.in_channels, *size, dtype=F64)).numel() == 0
    except RuntimeError:  # no output at all, or a circle that is shorter than its padding
        assume(False)
    assume(not empty)
    assert conv_norm_bound(conv, samples=samples) >= true_norm(conv, conv.in_channels, *size)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"groups": 2},
                {"padding_mode": "circular"}, {"padding": "same"}, {"stride": 3, "padding": 0}, ])
def test_the_fourier_bound_is_near_the_norm_on_a_large_image(options):
    torch.manual_seed(0)
    conv = nn.Conv1d(2, 4, 3, **{"padding": 1, **options}).double()
    assert 1 <= conv_norm_bound(conv) / true_norm(conv, 2, 90) <= 1.01


def test_patches_are_their_reshaped_kernel_and_a_pixel_its_matrix():
    torch.manual_seed(0)
    for conv in (nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(3, 8,
                                                         1), nn.ConvTranspose2d(8, 3, 2, stride=2)):
        exact = torch.linalg.matrix_norm(conv.weight.double().flatten(1), 2).item()
        assert conv_norm_bound(conv) == pytest.approx(exact,
                                                      rel=1e-9) and conv_norm_bound(conv) >= exact


def test_the_box_filter_by_hand():
    box = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    nn.init.ones_(box.weight)
    assert 9 <= conv_norm_bound(
        box) <= 9.1  # 9 on the infinite grid, at the frequency 0, which is always tried
    assert jacobian_norm(box, torch.zeros(1, 1, 16, 16, dtype=F64)) == pytest.approx(
        (1 + 2 * math.cos(math.pi / 17))**2)
    normed = spectral_norm(copy.deepcopy(box), n_power_iterations=50).eval()
    assert 2.9 < lipschitz(normed, torch.zeros(1, 1, 16, 16, dtype=F64)) < conv_norm_bound(normed)


@pytest.mark.parametrize(
    ("conv", "says"),
    [
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "reflect"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="replicate"), "replicate"),
        (nn.Conv2d(1, 1, 1, padding=1,
                   padding_mode="circular"), "circular"),  # pixels at the edge are seen twice
    ])
def test_paddings_without_a_bound_are_refused(conv, says):
    with pytest.raises(ValueError, match=says):
        conv_norm_bound(conv)
    with pytest.raises(ValueError, match="1 samples"):
        conv_norm_bound(nn.Conv2d(1, 1, 3), samples=1)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 7), st.integers(1, 7))
def test_the_jacobian_written_out_is_the_matrix(seed, n, m):
    torch.manual_seed(seed)
    linear = nn.Linear(n, m).double()
    exact = torch.linalg.svdvals(linear.weight.detach()).max().item()
    assert exact <= jacobian_norm(linear, torch.randn(n, dtype=F64)) <= exact * (1 + 1e-9)
    h = torch.randn(2, n, dtype=F64)  # a batch is one example: the steepest row
    slopes = [
        torch.linalg.matrix_norm(torch.func.jacrev(lambda x: torch.sin(linear(x)))(row), 2)
        for row in h
    ]
    assert_close(jacobian_norm(lambda x: torch.sin(linear(x)), h), max(slopes).item())


def test_a_jacobian_too_large_to_write_out_is_refused():
    with pytest.raises(ValueError, match="4,096.*4097"):
        jacobian_norm(torch.sin, torch.zeros(4097))


@pytest.mark.parametrize(("layer", "shape"),
                         [(nn.AvgPool1d(3, 1, 1), (2, 7)), (nn.AvgPool2d(2), (2, 6, 6)),
                          (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (1, 6, 5)),
                          (nn.AvgPool2d(3, 1, 1, count_include_pad=False), (1, 5, 5)),
                          (nn.AvgPool2d(2, divisor_override=1), (1, 4, 4)),
                          (nn.AdaptiveAvgPool2d(1), (3, 5, 5)),
                          (nn.AdaptiveAvgPool2d((7, None)), (2, 3, 3)),
                          (nn.AdaptiveAvgPool1d(4), (1, 6)), (nn.BatchNorm1d(4), (4, )),
                          (nn.BatchNorm1d(4), (4, 5)), (nn.BatchNorm2d(3), (3, 4, 4)),
                          (nn.BatchNorm2d(3, affine=False), (3, 4, 4)), (nn.Linear(5, 3), (5, )),
                          (nn.Linear(5, 3), (2, 5)), (nn.Flatten(), (2, 3)), (nn.Identity(), (4, )),
                          (nn.Dropout(0.5), (4, )), ])
def test_linear_layers_are_exact(layer, shape):
    torch.manual_seed(0)
    layer = layer.double()
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer(torch.randn(8, *shape, dtype=F64))
        for p in layer.parameters():
            nn.init.normal_(p)
    layer.eval()
    exact = true_norm(layer, *shape)
    assert exact * (1 - 1e-12) <= lipschitz_upper(layer, shape) <= exact * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 2), st.integers(0, 1))
def test_max_pooling_stretches_by_no_more_than_its_windows_overlap(seed, kernel, stride, dilation,
                                                                   padding):
    pool = nn.MaxPool2d(kernel, stride, padding if 2 * padding <= kernel else 0, dilation)
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(20, 1, 9, 9, generator=g, dtype=F64)
    b = a + torch.randn(20, 1, 9, 9, generator=g, dtype=F64) * (torch.rand(
        20, 1, 9, 9, generator=g) < 0.05)
    moved = (b - a).flatten(1).norm(dim=1)
    bound = lipschitz_upper(pool.eval(), (1, 9, 9))
    assert ((pool(b) - pool(a)).flatten(1).norm(dim=1) <= bound * moved + 1e-12).all()


def test_max_pooling_attains_its_bound_with_one_bright_pixel():
    for kernel, stride, windows in ((3, 1, 9), (3, 2, 4), (2, 2, 1)):
        pool, a = nn.MaxPool2d(kernel, stride).eval(), torch.zeros(1, 1, 12, 12)
        b = a.clone()
        b[..., 6, 6] = 1
        assert lipschitz_upper(pool, (1, 12, 12)) == pytest.approx(math.sqrt(windows))
        assert (pool(b) - pool(a)).norm() == pytest.approx(math.sqrt(windows))


@pytest.mark.parametrize(
    "layer",
    [nn.ReLU(), nn.Tanh(),
     nn.Sigmoid(), nn.GELU(),
     nn.GELU("tanh"), nn.SiLU()])
def test_slopes_of_pointwise_layers(layer):
    x = torch.linspace(-20, 20, 400_001, dtype=F64)
    steepest = (layer(x).diff() / x.diff()).abs().max().item()
    assert steepest <= lipschitz_upper(layer.eval(), (1,)) * (1 + 1e-9) <= 1.01 * steepest


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(["ReLU", "Tanh", "Sigmoid", "GELU", "SiLU"]), st.booleans())
def test_a_network_is_never_steeper_than_its_bound(seed, slope, pool):
    torch.manual_seed(seed)
    act = getattr(nn, slope)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), act(),
        nn.Sequential(
            nn.MaxPool2d(3, 1, 1) if pool else nn.AvgPool2d(3, 1, 1), nn.Conv2d(3, 2, 2, stride=2),
            act()), nn.Flatten(), nn.Linear(8, 5), act()).double()
    net(3 * torch.randn(16, 1, 4, 4, dtype=F64))  # statistics of batch norm
    net.eval()
    bound = lipschitz_upper(net, (1, 4, 4))
    x = torch.randn(8, 1, 4, 4, dtype=F64)
    local = max(
        torch.linalg.matrix_norm(torch.func.jacrev(net)(row[None]).reshape(5, 16), 2).item()
        for row in x)
    assert local <= bound
    y = x.roll(1, 0)
    assert ((net(x) - net(y)).norm(dim=1) <= bound * (x - y).flatten(1).norm(dim=1)).all()


def test_a_layer_used_twice_counts_twice_and_nothing_is_changed():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    once, twice = lipschitz_upper(layer.eval(), (4, )), lipschitz_upper(
        nn.Sequential(layer, layer).eval(), (4, ))
    assert twice == pytest.approx(once**2) and layer.weight.dtype == torch.float32
    assert lipschitz_upper(nn.Sequential().eval(), (4,)) == 1
    normed = spectral_norm(nn.Linear(
        4, 4)).eval()  # a parametrised layer is the layer with the weight it has
    assert lipschitz_upper(normed, (4, )) == pytest.approx(
        torch.linalg.matrix_norm(normed.weight, 2).item())


class Louder(nn.Linear):
    def forward(self, x):
        return 100 * super().forward(x)


class Tenfold(nn.Conv1d):  # as a convolution that standardises its weight
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 10 * weight, bias)


class Skip(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize(("layer", "kind"),
                         [(nn.GRU(4, 4), "GRU"), (nn.LayerNorm(4), "LayerNorm"),
                          (Louder(4, 4), "Louder"), (Skip(nn.Linear(4, 4)), "Skip"),
                          (nn.BatchNorm1d(4, track_running_stats=False), "BatchNorm1d"),
                          (nn.InstanceNorm1d(4), "InstanceNorm1d"), (Tenfold(4, 4, 1), "Tenfold")])
def test_a_layer_that_is_not_known_is_refused_by_name(layer, kind):
    with pytest.raises(ValueError, match=f"'1.0'.*{kind}"):
        lipschitz_upper(nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer)).eval(), (4,))


@pytest.mark.parametrize("pool, shape", [
    (nn.MaxPool1d(3, 1), (8,)), (nn.MaxPool2d(3, 1), (8, 8)),
    (nn.AvgPool2d(3, 1, padding=1), (8, 8)), (nn.AdaptiveAvgPool1d(2), (8,))])
def test_a_picture_without_channels_is_not_pooled(pool, shape):
    with pytest.raises(ValueError, match=f"'0', {type(pool).__name__}.*channels"):
        lipschitz_upper(nn.Sequential(pool).eval(), shape)
    assert lipschitz_upper(nn.Sequential(pool).eval(), (1, *shape)) > 0.5


def test_a_network_that_is_being_trained_is_refused():
    with pytest.raises(ValueError, match="eval"):
        lipschitz_upper(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), (4,))


def test_hooks_are_no_part_of_a_bound():
    def plain():
        return nn.Linear(3, 3)

    hooked, early, replaced = plain(), plain(), plain()
    hooked.register_forward_hook(lambda layer, args, output: 10 * output)
    early.register_forward_pre_hook(lambda layer, args: (10 * args[0],))
    replaced.forward = lambda x: 10 * x
    box, other = nn.Sequential(plain()), nn.Sequential(plain())
    other.forward = lambda x: 10 * x
    box.register_forward_hook(lambda layer, args, output: 10 * output)
    for layer in (hooked, early, replaced, box, other):
        what = f"layer '0', {type(layer).__name__} with hooks"
        with pytest.raises(ValueError, match=what):
            lipschitz_upper(nn.Sequential(layer).eval(), (3,))


def test_a_convolution_is_asked_for_and_large_images_have_a_bound():
    with pytest.raises(TypeError, match="Linear"):
        conv_norm_bound(nn.Linear(3, 2))
    pool = nn.AvgPool2d(3, 2, 1).eval()
    small, large = (lipschitz_upper(pool, (3, n, n)) for n in (16, 130))
    assert small <= large < 1  # a window stands for three pixels a side, and shares the outer ones
    assert lipschitz_upper(nn.AvgPool2d(2).eval(), (3, 130, 130)) == pytest.approx(0.5)
    norm = nn.BatchNorm1d(5000).eval()
    norm.running_var[7] = 1e-2
    assert lipschitz_upper(norm, (5000,)) == pytest.approx((1e-2 + norm.eps) ** -0.5)
