"""FFTNet: the released numbers, identities, invariances, gradients, masks, sizes, bad input."""

import copy
import functools
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from feedback_nb.fftnet import (
    SIZES,
    AttentionMixer,
    FFTNetBlock,
    FFTNetViT,
    FNetMixer,
    ModReLUMixer,
    SpectralMixer,
    WaveletMixer,
    WindowedMixer,
    _interpolate,
    _rfft,
    attention,
    haar,
    inverse_haar,
)

GOLDENS = Path(__file__).parent / "goldens"
anchored = functools.partial(SpectralMixer, anchors=5)
repaired = functools.partial(SpectralMixer, anchors=5, bias="magnitude")
MIXERS = {
    "released": SpectralMixer,
    "anchors": anchored,
    "magnitude": functools.partial(SpectralMixer, bias="magnitude"),
    "repaired": repaired,
    "modrelu": ModReLUMixer,
    "windowed": functools.partial(WindowedMixer, window=4),
    "wavelet": functools.partial(WaveletMixer, levels=3),
    "fnet": FNetMixer,
    "attention": attention,
    "core": functools.partial(attention, projections=False),
}
SPECTRAL = [name for name in MIXERS if name not in ("attention", "core")]
every = pytest.mark.parametrize("name", MIXERS)


def build(name, n=7, dim=6, heads=2, dtype=torch.float64, **options):
    """A mixer whose parameters are all away from where they start."""
    torch.manual_seed(0)
    mixer = MIXERS[name](dim, n, heads, **options).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.2 * torch.randn_like(p)
    return mixer


def tokens(n=7, dim=6, batch=2, dtype=torch.float64):
    return torch.randn(batch, n, dim, dtype=dtype, generator=torch.Generator().manual_seed(1))


def padded(n=7):
    padding = torch.zeros(2, n, dtype=torch.bool)
    padding[0, n // 2 + 1 :] = True
    return padding


def written_out(state, x, heads):
    """The released layer, from its equation and a Fourier matrix, without torch.fft."""
    B, N, D = x.shape
    k, j = torch.arange(N // 2 + 1, dtype=x.dtype), torch.arange(N, dtype=x.dtype)
    turn = torch.exp(-2j * torch.pi * k[:, None] * j / N) / N**0.5
    u = F.layer_norm(x, (D,), state["pre_norm.weight"], state["pre_norm.bias"])
    hidden = F.gelu(
        F.linear(u.mean(1), state["adaptive_mlp.0.weight"], state["adaptive_mlp.0.bias"])
    )
    made = F.linear(hidden, state["adaptive_mlp.2.weight"], state["adaptive_mlp.2.bias"])
    s, t = made.view(B, heads, len(k), 2).unbind(-1)
    z = torch.einsum("kn,bnhd->bhkd", turn, u.view(B, N, heads, -1).to(turn.dtype))
    z = z * (state["base_filter"] * (1 + s[..., None])) + (state["base_bias"] + t[..., None])
    size = z.abs()
    z = z * F.gelu(size) / (size + 1e-6)
    twice = torch.ones(len(k), dtype=x.dtype) * 2
    twice[0] = 1
    if N % 2 == 0:
        twice[-1] = 1
    y = torch.einsum("kn,bhkd->bnhd", turn.conj() * twice[:, None], z).real
    return x + y.flatten(2)


# ------------------------------------------------------------ the released code's numbers


def test_golden_output_and_gradients():
    g = load_file(GOLDENS / "fftnet_N64.safetensors")
    mixer = SpectralMixer(32, 64, 4)
    state = {k.removeprefix("weights."): v for k, v in g.items() if k.startswith("weights.")}
    assert mixer.load_state_dict(state).missing_keys == []
    x = g["input"].clone().requires_grad_()
    y = mixer(x)
    y.backward(g["cotangent"])
    assert_close(y, g["output"], atol=1e-5, rtol=1e-5)
    assert_close(x.grad, g["grad_input"], atol=1e-5, rtol=1e-5)
    grads = {f"grads.{name}": p.grad for name, p in mixer.named_parameters()}
    assert set(grads) == {key for key in g if key.startswith("grads.")}
    for name, grad in grads.items():
        assert_close(grad, g[name], atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_the_released_equation_at_every_size(n, heads, each, seed):
    torch.manual_seed(seed)
    mixer = SpectralMixer(heads * each, n, heads).double()
    for p in mixer.parameters():
        nn.init.normal_(p, std=0.5)
    a, b = (torch.randn(2, n, heads * each, dtype=torch.float64).requires_grad_() for _ in range(2))
    b.data.copy_(a.data)
    g = torch.randn_like(a)
    state = {name: p.detach().clone().requires_grad_() for name, p in mixer.named_parameters()}
    want, got = written_out(state, b, heads), mixer(a)
    assert_close(got, want)
    got.backward(g), want.backward(g)
    assert_close(a.grad, b.grad)
    for name, p in mixer.named_parameters():
        assert_close(p.grad, state[name].grad)


def test_a_state_dict_of_another_length_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for base_filter"):
        SpectralMixer(8, 6, 2).load_state_dict(SpectralMixer(8, 8, 2).state_dict())


# ------------------------------------------------------------ identities


@pytest.mark.parametrize("n", [1, 2, 8, 9, 33])
def test_a_unit_filter_doubles_its_input(n):
    x = tokens(n, dtype=torch.float32)
    for kind in (SpectralMixer, anchored, functools.partial(WindowedMixer, window=4), WaveletMixer):
        mixer = kind(6, n, 2, norm=False, adaptive=False, activation=None, bias="real")
        nn.init.zeros_(mixer.base_bias)
        assert_close(mixer(x), 2 * x, atol=1e-5, rtol=0)


def test_a_unit_filter_doubles_a_normalised_input_of_the_full_layer():
    x = F.layer_norm(tokens(64, 8, dtype=torch.float32), (8,))
    mixer = SpectralMixer(8, 64, 2, activation=None)
    for p in (mixer.base_bias, *mixer.adaptive_mlp[2].parameters()):
        nn.init.zeros_(p)
    assert_close(mixer(x), 2 * x, atol=1e-5, rtol=1e-4)  # LayerNorm's own eps


@pytest.mark.parametrize("n", [8, 9])
def test_the_filter_is_a_circular_convolution(n):
    mixer, x = (
        SpectralMixer(6, n, 2, norm=False, adaptive=False, activation=None).double(),
        tokens(n),
    )
    nn.init.normal_(mixer.base_filter)
    nn.init.zeros_(mixer.base_bias)
    kernel = torch.fft.irfft(mixer.base_filter[..., 0], n=n).repeat_interleave(3, 0).T  # (n, 6)
    direct = sum(kernel[s] * x.roll(s, 1) for s in range(n))
    assert_close(mixer(x), x + direct)


@pytest.mark.parametrize("n", [8, 9])
def test_the_bias_on_the_real_part_is_an_impulse_on_token_0(n):
    mixer = SpectralMixer(6, n, 2, adaptive=False, activation=None, norm=False).double()
    added = mixer(torch.zeros(1, n, 6, dtype=torch.float64))
    assert_close(added[:, 0], torch.full((1, 6), -0.1 * n**0.5, dtype=torch.float64))
    assert added[:, 1:].abs().max() < 1e-12
    quiet = SpectralMixer(6, n, 2, adaptive=False, norm=False, bias="magnitude").double()
    assert quiet(torch.zeros(1, n, 6, dtype=torch.float64)).abs().max() < 1e-30


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
def test_the_transform_and_its_gradient(n):
    x = tokens(n).transpose(1, 2).clone().requires_grad_()
    assert_close(_rfft(x), torch.fft.rfft(x, norm="ortho"))
    g = torch.randn(2, 6, n // 2 + 1, dtype=torch.complex128)
    ours, theirs = (
        torch.autograd.grad(f(x), x, g)[0]
        for f in (_rfft, functools.partial(torch.fft.rfft, norm="ortho"))
    )
    assert_close(ours, theirs)


def test_anchors_do_not_depend_on_the_default_dtype():
    values = torch.randn(3, 33, dtype=torch.float64)
    want = _interpolate(values, 4097)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_close(_interpolate(values, 4097), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_anchors_at_the_bins_are_the_bins():
    assert _interpolate(torch.ones(2, 1), 9).shape == (2, 5)
    values = torch.randn(3, 5, dtype=torch.float64)
    assert_close(_interpolate(values, 8), values)  # 5 anchors, 5 bins
    assert_close(_interpolate(values, 16)[..., ::2], values)
    assert_close(_interpolate(values, 16)[..., 1::2], (values[..., 1:] + values[..., :-1]) / 2)
    line = torch.linspace(0, 1, 5, dtype=torch.float64)  # the frequency times 2
    assert_close(_interpolate(line, 7), 2 * torch.arange(4, dtype=torch.float64) / 7)


@pytest.mark.parametrize(
    "name", ["repaired", "windowed", "wavelet", "fnet", "attention", "core", "anchors"]
)
def test_any_length_goes_through_one_set_of_parameters(name):
    mixer = build(name, 7)
    for n in (1, 2, 5, 64):
        assert mixer(tokens(n)).shape == (2, n, 6)


# ------------------------------------------------------------ wavelets and windows


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 7))
def test_haar_is_inverted_and_is_pywavelets(n, levels):
    pywt = pytest.importorskip("pywt")
    x = torch.randn(2, 3, n, dtype=torch.float64)
    bands = haar(x, levels)
    assert_close(inverse_haar(bands, n), x)
    theirs, low = [], x.numpy()
    for _ in range(levels):
        low, high = pywt.dwt(low, "haar", mode="periodization")
        theirs.append(torch.from_numpy(high))
    for ours, oracle in zip(bands, [torch.from_numpy(low), *reversed(theirs)], strict=True):
        assert_close(ours, oracle)


def test_haar_of_a_power_of_two_keeps_lengths_of_vectors():
    x = torch.randn(2, 32, dtype=torch.float64)
    assert_close(torch.cat(haar(x, 5), -1).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("n", [8, 16, 24])
def test_the_windows_are_those_of_torch_stft(n):
    mixer, u = WindowedMixer(1, None, 1, window=8).double(), tokens(n, 1).transpose(1, 2)
    ours = mixer.analyse(u)[:, 0]  # (B, windows, F)
    around = torch.cat([u[:, 0], u[:, 0, :4]], 1)  # the last window reaches over the end
    theirs = torch.stft(
        around,
        8,
        4,
        window=mixer.shape(u),
        center=False,
        normalized=True,
        return_complex=True,
    )
    assert_close(ours, theirs.transpose(1, 2))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.sampled_from([2, 4, 6, 16]))
def test_windows_overlap_to_the_sequence(n, window):
    mixer, u = (
        WindowedMixer(3, None, 1, window=window).double(),
        torch.randn(2, 3, n, dtype=torch.float64),
    )
    assert_close(mixer.synthesise(mixer.analyse(u), n), u)


def test_the_window_is_made_in_the_precision_of_the_call():
    x = tokens(40)
    for move, dtype, close in (
        (lambda m: m.bfloat16(), torch.bfloat16, 1e-5),  # the FFT itself runs in float32
        (lambda m: m.double(), torch.float64, 1e-12),
        (lambda m: m.to("meta").to_empty(device="cpu"), torch.float32, 1e-5),
    ):
        mixer = move(WindowedMixer(6, None, 2, window=8))
        u = x.to(dtype).transpose(1, 2)
        u = u.to(torch.promote_types(dtype, torch.float32))
        assert_close(mixer.synthesise(mixer.analyse(u), 40), u, atol=close, rtol=0)
        assert not list(mixer.buffers())


def test_windows_have_no_python_loop():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    mixer, calls = WindowedMixer(6, None, 2, window=4), []
    for n in (8, 512):
        with Count() as count, torch.no_grad():
            mixer(tokens(n, dtype=torch.float32))
        calls.append(count.calls)
    assert calls[0] == calls[1]


def test_a_window_does_not_reach_further_than_a_window():
    mixer = build("windowed", adaptive=False)
    x = tokens(16)
    moved = mixer(x + F.pad(torch.arange(6.0).expand(2, 1, 6), (0, 0, 7, 8))) - mixer(x)
    assert (
        moved[:, 5:10].abs().max() > 1e-3
        and moved[:, :4].abs().max() < 1e-12
        and moved[:, 12:].abs().max() < 1e-12
    )


# ------------------------------------------------------------ invariances


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(0, 30), st.booleans())
def test_cyclic_shift(n, by, adaptive):
    for name in ("magnitude", "repaired"):
        mixer, x = build(name, n, adaptive=adaptive), tokens(n)
        assert_close(mixer(x.roll(by, 1)), mixer(x).roll(by, 1))


def test_the_released_layer_is_not_equivariant_to_shift():
    mixer, x = build("released", 8), tokens(8)
    gap = mixer(x.roll(3, 1)) - mixer(x).roll(3, 1)
    assert gap.abs().max() > 0.01
    with torch.no_grad():  # without b and t nothing in it knows where token 0 is
        mixer.base_bias.zero_()
        for p in mixer.adaptive_mlp[2].parameters():
            p.view(2, 5, 2, -1)[:, :, 1] = 0
    assert_close(mixer(x.roll(3, 1)), mixer(x).roll(3, 1))


def test_attention_does_not_see_order_and_fnet_shifts_the_phase():
    x = tokens(8)
    order = torch.randperm(8)
    mixer = build("attention")
    assert_close(mixer(x[:, order]), mixer(x)[:, order])
    assert (build("fnet")(x.roll(1, 1)) - build("fnet")(x).roll(1, 1)).abs().max() > 0.01


def test_fnet_is_the_real_part_of_two_transforms():
    x = tokens(5)
    u = F.layer_norm(x, (6,))
    want = torch.fft.fft(torch.fft.fft(u, dim=2, norm="ortho"), dim=1, norm="ortho").real
    assert_close(FNetMixer(6, 5).double()(x) - x, want)


def test_attention_is_attention():
    mixer, x = build("attention", heads=2), tokens()
    u = mixer.pre_norm(x)
    q, k, v = (a.view(2, 7, 2, 3).transpose(1, 2) for a in mixer.qkv(u).chunk(3, -1))
    y = torch.softmax(q @ k.transpose(-1, -2) / 3**0.5, -1) @ v
    assert_close(mixer(x), x + mixer.out(y.transpose(1, 2).reshape(2, 7, 6)))
    assert not list(build("core", norm=False).parameters())


def test_the_older_layer_written_out():
    n, x = 9, tokens(9)
    mixer = build("modrelu", n)
    z = torch.fft.rfft(x.view(2, n, 2, 3).transpose(1, 2), dim=2, norm="ortho")
    made = torch.tanh(mixer.mlp(x.mean(1))).view(2, 2, 5, 1)
    z = z * (mixer.base_filter + made)
    z = z * F.relu(z.abs() + mixer.base_bias) / z.abs().clamp_min(1e-3)
    y = torch.fft.irfft(z, n=n, dim=2, norm="ortho").transpose(1, 2).reshape(2, n, 6)
    assert_close(mixer(x), mixer.post_norm(x + y))
    assert "pre_norm.weight" not in mixer.state_dict()


# ------------------------------------------------------------ gradients


@every
@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_gradcheck(name, n):
    mixer, x = build(name, n), tokens(n).requires_grad_()
    assert torch.autograd.gradcheck(mixer, (x,))
    assert torch.autograd.gradcheck(lambda x: mixer(x, padded(n)), (x,))
    names, values = (
        zip(*mixer.named_parameters(), strict=True) if list(mixer.parameters()) else ((), ())
    )
    call = lambda *values: torch.func.functional_call(
        mixer, dict(zip(names, values, strict=True)), (x.detach(),)
    )
    assert not values or torch.autograd.gradcheck(call, values)


@pytest.mark.parametrize("name", SPECTRAL)
def test_second_derivatives_and_forward_mode(name):
    mixer, x = build(name), tokens().requires_grad_()
    assert torch.autograd.gradgradcheck(mixer, (x,))
    t = torch.randn_like(x)
    _, forward = torch.func.jvp(mixer, (x.detach(),), (t,))
    reverse = torch.func.vjp(mixer, x.detach())[1](torch.ones_like(x))[0]
    assert_close(forward.sum(), (reverse * t).sum())
    assert_close(torch.func.vmap(lambda a: mixer(a[None])[0])(x), mixer(x))


@pytest.mark.parametrize("name", SPECTRAL)
def test_the_gradient_at_nothing_is_finite(name):
    """A constant sequence of zeros without a bias has only zeros among its frequencies."""
    mixer = MIXERS[name](6, 7, 2)
    if hasattr(mixer, "base_bias"):
        nn.init.zeros_(mixer.base_bias)
    x = torch.zeros(1, 7, 6, requires_grad=True)
    mixer(x).sum().backward()
    assert x.grad.isfinite().all() and all(
        p.grad is None or p.grad.isfinite().all() for p in mixer.parameters()
    )


@pytest.mark.parametrize("name", [name for name in SPECTRAL if name != "fnet"])
@pytest.mark.parametrize("noise", [0, 1e-5])
def test_the_gradient_at_nothing_is_small(name, noise):
    """As the layers start, with their bias of -0.1."""
    torch.manual_seed(0)
    mixer = MIXERS[name](6, 7, 2, norm=noise == 0)
    x = (bool(noise) + noise * tokens(batch=1).float()).requires_grad_()
    mixer(x).sum().backward()
    assert x.grad.abs().max() < 1000


@pytest.mark.parametrize("name", ["magnitude", "repaired", "windowed", "wavelet"])
def test_the_bias_on_the_magnitude_adds_nothing_to_nothing(name):
    """What it adds to small tokens is as small as they are."""
    torch.manual_seed(0)
    mixer = MIXERS[name](6, 7, 2, norm=False)
    x = 1e-5 * tokens(dtype=torch.float32)
    assert (mixer(x) - x).abs().max() < 10 * x.abs().max()


# ------------------------------------------------------------ masks


@every
def test_padding_is_not_read_and_not_written(name):
    mixer, x, padding = build(name), tokens(), padded()
    y = mixer(x, padding)
    other = torch.where(padding[..., None], torch.full_like(x, 9.0), x)
    assert torch.equal(y[padding], x[padding])
    assert_close(mixer(other, padding)[~padding], y[~padding])
    assert_close(mixer(x, torch.zeros_like(padding)), mixer(x))
    whole = torch.ones_like(padding)
    x.requires_grad_()
    mixer(x, whole).sum().backward()
    assert torch.equal(mixer(x, whole), x) and x.grad.isfinite().all()


@every
def test_nan_behind_the_end_reaches_no_gradient(name):
    padding, block = padded(), FFTNetBlock(6, 7, 2, mixer=MIXERS[name])
    x = tokens(dtype=torch.float32).masked_fill(padding[..., None], float("nan"))
    x.requires_grad_()
    block(x, padding)[~padding].sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())


def test_the_mean_token_is_that_of_the_tokens():
    mixer, x = build("released"), tokens()
    padding = padded()
    want = mixer.filter(
        torch.stack([mixer.pre_norm(x[0, :4]).mean(0), mixer.pre_norm(x[1]).mean(0)])
    )
    seen = []
    mixer.filter = lambda mean: seen.append(mean) or type(mixer).filter(mixer, mean)
    mixer(x, padding)
    assert_close(type(mixer).filter(mixer, seen[0]), want)


def test_attention_may_be_causal_with_and_without_padding():
    for mixer in (build("attention"), build("attention", causal=True)):
        x = tokens()
        later = x + F.pad(torch.arange(6.0).expand(2, 1, 6), (0, 0, 5, 1))
        for padding in (None, padded()):
            y, z = (mixer(a, padding, causal=True) for a in (x, later))
            assert_close(y[:, :5], z[:, :5])
            assert (y[1, 6] - z[1, 6]).abs().max() > 1e-6


# ------------------------------------------------------------ types, copies, compilation


@every
def test_bf16_and_odd_channels(name):
    mixer = build(name, 9, dim=5, heads=1, dtype=torch.bfloat16)
    x = tokens(9, 5, dtype=torch.bfloat16).requires_grad_()
    y = mixer(x, padded(9))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.isfinite().all()
    exact = mixer.double()(x.detach().double(), padded(9))
    assert_close(y.double(), exact, atol=0.1, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer.float()(x.detach().float()).isfinite().all()


@every
def test_copies_are_equal_and_keep_nothing(name):
    mixer, x = build(name), tokens().requires_grad_()
    attributes = lambda: [{k: v for k, v in vars(m).items() if k[0] != "_"}
                          for m in mixer.modules()]
    before = attributes()
    y = mixer(x, padded())
    y.sum().backward()
    assert attributes() == before and not list(mixer.buffers())
    gone = weakref.ref(x), weakref.ref(y)
    del x, y
    gc.collect()
    assert gone[0]() is None and gone[1]() is None
    x = tokens()
    y = mixer(x)
    assert torch.equal(copy.deepcopy(mixer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(mixer))(x), y)
    twin = build(name)
    twin.load_state_dict(mixer.state_dict())
    assert torch.equal(twin(x), y)


@every
def test_it_compiles_in_one_graph(name):
    torch._dynamo.reset()
    mixer, x = build(name), tokens().requires_grad_()
    compiled = torch.compile(copy.deepcopy(mixer), backend="aot_eager", fullgraph=True)
    y, z = mixer(x), compiled(x)
    assert_close(y, z)
    assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, z)))


def test_dropout_acts_on_what_is_added_in_training_only():
    torch.manual_seed(0)
    mixer, x = SpectralMixer(6, 7, 2, dropout=0.5), tokens(dtype=torch.float32)
    kept = mixer(x) - x
    assert 0.2 < (kept == 0).float().mean() < 0.8
    assert torch.equal(mixer.eval()(x), mixer(x))


# ------------------------------------------------------------ blocks and networks


def small(**options):
    torch.manual_seed(0)
    options = {
        "dim": 8,
        "depth": 2,
        "heads": 2,
        "image_size": 8,
        "patch_size": 2,
        "in_channels": 1,
    } | options
    return FFTNetViT("base", 3, **options).eval()


def test_a_block_adds_once():
    block, x = FFTNetBlock(6, 7, 2).double(), tokens()
    h = block.mixer(x)
    assert_close(block(x), h + block.mlp(h))
    for module in (block.mlp[4], block.mixer):  # with nothing to add, x comes out once
        for p in module.parameters():
            nn.init.zeros_(p)
    assert_close(block(x), x)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize(
    "kind", [SpectralMixer, repaired, attention, WindowedMixer, WaveletMixer, ModReLUMixer]
)
def test_activations_of_12_blocks_stay_within_a_factor_of_4(pool, kind):
    for scale in (0.1, 1.0, 10.0):
        net = small(depth=12, dim=64, heads=4, pool=pool, mixer=kind)
        sizes = []
        for block in net.blocks:
            block.register_forward_hook(
                lambda m, i, o, sizes=sizes: sizes.extend(
                    a.square().mean().sqrt().item() for a in (i[0], o)
                )
            )
        net(scale * torch.randn(4, 1, 8, 8))
        assert len(sizes) == 24 and max(sizes) / min(sizes) < 4


def test_pooling_and_token_counts():
    mean, cls = small(), small(pool="cls")
    assert mean.blocks[0].mixer.n_tokens == 16 and cls.blocks[0].mixer.n_tokens == 17
    x = torch.randn(2, 1, 8, 8)
    assert mean(x).shape == cls(x).shape == (2, 3)
    h = cls.norm(
        cls.blocks[1](
            cls.blocks[0](
                cls.enter(
                    torch.cat(
                        [cls.cls.expand(2, -1, -1), cls.patches(x).flatten(2).transpose(1, 2)], 1
                    )
                    + cls.position
                )
            )
        )
    )
    assert_close(cls(x), cls.head(h[:, 0]))


@pytest.mark.parametrize(
    "size, dim, depth, n",
    [("base", 768, 12, 196), ("large", 1024, 24, 196), ("huge", 1280, 32, 256)],
)
def test_sizes_are_those_of_vit(size, dim, depth, n):
    with torch.device("meta"):
        net = FFTNetViT(size)
    assert SIZES[size][:2] == (dim, depth) == (net.position.shape[2], len(net.blocks))
    assert net.position.shape[1] == n
    heads = SIZES[size][2]
    values = n // 2 + 1
    mixer = 2 * heads * values * (dim + 1) + dim * (dim + 1) + 2 * heads * values + 2 * dim
    assert sum(p.numel() for p in net.blocks[0].mixer.parameters()) == mixer


def test_training_moves_every_parameter():
    net = small(dropout=0.1).train()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0)
    F.cross_entropy(net(torch.randn(4, 1, 8, 8)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_a_feedback_loop_around_it():
    from feedback_nb.cbl import CBL

    torch.manual_seed(0)
    net, x = small(), torch.randn(2, 1, 8, 8)
    plain = net(x)
    model = CBL(net, ["blocks.0", "blocks.1"], example=x[:1], steps=2)
    outputs = model.trajectory(x).outputs
    assert len(outputs) == 3 and torch.equal(outputs[0], plain)
    sum(out.square().sum() for out in outputs).backward()
    assert all(p.grad is not None for p in model.adapters.parameters())


# ------------------------------------------------------------ bad input

wrong = lambda make, message: pytest.param(make, message, id=message[:40])
X = torch.zeros(2, 7, 6)


@pytest.mark.parametrize(
    "make, message",
    [
        wrong(lambda: SpectralMixer(6, 7, 4), "dim=6, n_tokens=7, heads=4"),
        wrong(lambda: SpectralMixer(6, 0, 2), "n_tokens=0"),
        wrong(lambda: SpectralMixer(0, 7, 1), "dim=0"),
        wrong(lambda: SpectralMixer(6, 7, 0), "heads=0"),
        wrong(lambda: SpectralMixer(6, 7, 2, bias="both"), "bias='both'"),
        wrong(lambda: SpectralMixer(6, 7, 2, anchors=0), "anchors=0"),
        wrong(
            lambda: SpectralMixer(6, 7, 2, bias="magnitude", activation=None),
            "bias='magnitude' acts in the activation, got None; use bias='real'",
        ),
        wrong(lambda: SpectralMixer(6, None, 2), "n_tokens=None, anchors=None"),
        wrong(
            lambda: SpectralMixer(6, 7, 2, causal=True),
            "causal: a frequency holds all tokens, later ones too; use attention",
        ),
        wrong(lambda: FNetMixer(6, causal=True), "causal: a frequency"),
        wrong(lambda: SpectralMixer(6, 7, 2)(X, causal=True), "causal: a frequency"),
        wrong(
            lambda: SpectralMixer(6, 7, 2)(X[:, :5]), "5 tokens, but a filter for 7; use anchors=32"
        ),
        wrong(
            lambda: SpectralMixer(6, 7, 2)(X[:, :0]),
            r"tokens are \(batch, 1 or more, 6\), got \(2, 0, 6\)",
        ),
        wrong(lambda: attention(6, heads=2)(X[:, :0]), r"got \(2, 0, 6\)"),
        wrong(lambda: SpectralMixer(6, 7, 2)(X[..., :5]), r"got \(2, 7, 5\)"),
        wrong(lambda: FNetMixer(6)(X[0]), r"got \(7, 6\)"),
        wrong(
            lambda: SpectralMixer(6, 7, 2)(X, torch.zeros(2, 6, dtype=torch.bool)),
            r"padding is bool \(2, 7\).*got torch.bool \(2, 6\)",
        ),
        wrong(
            lambda: attention(6, heads=2)(X, torch.zeros(2, 7)),
            r"padding is bool \(2, 7\).*got torch.float32",
        ),
        wrong(lambda: attention(6, 7, 4), "heads=4"),
        wrong(lambda: WindowedMixer(6, heads=2, window=5), "window=5: an even number"),
        wrong(lambda: WaveletMixer(6, heads=2, levels=0), "levels=0: at least 1"),
        wrong(lambda: small(pool="max"), "pool is 'mean' or 'cls', got 'max'"),
        wrong(lambda: FFTNetViT("tiny"), "size is one of base, large, huge, got 'tiny'"),
        wrong(lambda: small(patch_size=3), "image_size=8 is no multiple of patch_size=3"),
        wrong(lambda: small()(torch.zeros(1, 3, 8, 8)), r"\(C, H, W\) = \(1, 8, 8\)"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert len(str(caught.value)) <= 110


def test_attention_by_its_contract_name():
    assert attention is AttentionMixer
