"""The feedback U-Net: its iteration, bound, gradients, losses and scores, and bad input."""

import copy
import gc
import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from feedback_nb.data import TensorData, gaussian_noise, polygons
from feedback_nb.feedback import NotConverged, stepwise_loss
from feedback_nb.training import evaluate, fit
from feedback_nb.unet import (
    ExponentialDecay,
    FeedbackLoop,
    FeedbackUNet,
    FeedForward,
    Padded,
    UNet,
    check_masks,
    class_weights,
    feedforward_unet,
    measure_segmentation,
    segmentation_loss,
    segmentation_scores,
    tail_bound,
    widened,
)

SMALL = dict(channels=(4, 8, 8), state=5)
quick = settings(deadline=None, max_examples=15)


def small(seed=0, **options):
    torch.manual_seed(seed)
    return FeedbackUNet(**{**SMALL, **options})


def images(n=2, h=12, w=15, channels=1, seed=0):
    return torch.rand(n, channels, h, w, generator=torch.Generator().manual_seed(seed))


def masks(n=2, h=12, w=15, classes=2, seed=0):
    return torch.randint(classes, (n, h, w), generator=torch.Generator().manual_seed(seed))


def flat(h):
    return torch.cat([h["u"], h["v"]], 1).flatten(1)


def constant_body(channels, value):
    """A body that answers the same number whatever it sees."""
    body = nn.Conv2d(channels, channels, 1)
    nn.init.zeros_(body.weight)
    nn.init.constant_(body.bias, value)
    return body


# the iteration


@pytest.mark.parametrize("decay", ["scalar", "matrix", None])
@pytest.mark.parametrize("softmax", [True, False])
def test_the_first_output_is_that_of_the_blank_state(decay, softmax):
    model, x = small(decay=decay, softmax=softmax), images()
    path = model.trajectory(x, states=True)
    assert not path.states[0]["u"].any() and not path.states[0]["v"].any()
    assert_close(path.outputs[0], model.head.bias[None, :, None, None].expand(2, 2, 12, 15))
    assert_close(model(x, steps=0), path.outputs[0])
    assert len(path.outputs) == 6 and path.residuals.shape == (5, 2)


@quick
@given(
    seed=st.integers(0, 99),
    classes=st.integers(2, 4),
    steps=st.integers(1, 6),
    scale=st.floats(0.1, 30),
    tau=st.floats(0.2, 5),
    decay=st.sampled_from(["scalar", "matrix", None]),
    h=st.integers(4, 14),
    w=st.integers(4, 14),
)
def test_what_is_fed_back_is_on_the_simplex_at_every_step(
    seed, classes, steps, scale, tau, decay, h, w
):
    model, seen = small(seed, n_classes=classes, tau=tau, decay=decay), []
    model.body.register_forward_pre_hook(
        lambda module, args: seen.append(args[0][:, 1:])
    )  # what the body is really given
    with torch.no_grad():
        model.trajectory(scale * images(2, h, w, seed=seed), steps=steps)
    assert len(seen) == steps
    for fed in seen:
        assert (fed >= 0).all()
        assert_close(fed.sum(1), torch.ones(2, h, w))


def test_a_constant_body_worked_by_hand():
    body = nn.Sequential(nn.Conv2d(3, 4, 1), constant_body(4, 3.0))
    model = FeedbackLoop(body, nn.Conv2d(2, 2, 1), state=2, feedback=2, tau=2.0)
    states = model.trajectory(images(1, 4, 4), steps=3, states=True).states
    for h, factor in zip(states, (0, 1, 1 + math.exp(-0.5), 1 + math.exp(-0.5) + math.exp(-1))):
        assert_close(flat(h), torch.full((1, 64), 3.0 * factor))


def test_restarting_the_clock_worked_by_hand():
    model = FeedbackLoop(
        nn.Sequential(nn.Conv2d(3, 4, 1), constant_body(4, 1.0)),
        nn.Conv2d(2, 2, 1),
        state=2,
        feedback=2,
    )
    e = math.exp(-1)
    h = lambda **kw: (
        model.trajectory(images(1, 4, 4), states=True, **kw).states[-1]["u"][0, 0, 0, 0].item()
    )
    assert h(steps=4, restart=2) == pytest.approx(2 * (1 + e))
    assert h(steps=3, restart=[1, 2]) == pytest.approx(3)
    assert h(steps=2, restart=5) == h(steps=2) == pytest.approx(1 + e)
    with pytest.raises(ValueError, match="restart"):
        model(images(1, 4, 4), restart=-1)


def test_a_longer_trajectory_begins_like_a_shorter_one():
    model, x = small(), images()
    with torch.no_grad():
        long, short = model.trajectory(x, steps=7), model.trajectory(x, steps=3)
    assert_close(long.outputs[:4], short.outputs)
    assert_close(long.residuals[:3], short.residuals)


def test_the_feedback_reaches_the_answer():
    """With the feedback channels cut off in the body, step 2 adds the same change again."""
    model, x = small(decay=None), images()
    with torch.no_grad():
        u = [h["u"] for h in model.trajectory(x, steps=2, states=True).states]
        assert not torch.allclose(u[2], 2 * u[1], atol=1e-3)
        model.body.down[0][0].weight[:, 1:] = 0
        u = [h["u"] for h in model.trajectory(x, steps=2, states=True).states]
    assert_close(u[2], 2 * u[1])


@quick
@given(
    seed=st.integers(0, 99), tau=st.floats(0.3, 4), softmax=st.booleans(), scale=st.floats(0.1, 20)
)
def test_the_distance_to_the_limit_stays_below_the_bound(seed, tau, softmax, scale):
    model, x = (
        small(seed, tau=tau, softmax=softmax).double().eval(),
        scale * images(seed=seed).double(),
    )
    with torch.no_grad():
        states = model.trajectory(
            x, steps=math.ceil(36 * tau), states=True
        ).states  # e^-36 is nothing in float64
        sizes = torch.stack([model.change(x, h["v"]).flatten(1).norm(dim=1) for h in states]).amax(
            0
        )
    for t, h in enumerate(states[: math.ceil(20 * tau)]):
        assert ((flat(states[-1]) - flat(h)).norm(dim=1) <= tail_bound(sizes, t, tau)).all()


def test_without_decay_it_does_not_stop_and_with_it_it_does_but_is_nowhere_near_settled():
    x = images()
    with torch.no_grad():
        paths = {
            decay: small(decay=decay).eval().trajectory(x, steps=30, states=True)
            for decay in ("scalar", None)
        }
    moved = {
        decay: (flat(path.states[-1]) - flat(path.states[-2])).norm()
        for decay, path in paths.items()
    }
    assert moved["scalar"] < 1e-6 < 1e-3 < moved[None]
    assert (paths["scalar"].residuals[-1] > 1e-3).all()  # the residual is of the undecayed map


def test_scores_of_every_step_though_the_model_has_a_tolerance():
    model = small(tol=0.5, decay=None, steps=6).eval()  # some examples would stop early
    data = [(image, mask) for image, mask in zip(images(), masks())]
    assert len(measure_segmentation(model, data)["f1_per_step"]) == 7


def test_a_decayed_loop_is_never_converged():
    model, x = small().eval(), images()
    with torch.no_grad(), pytest.warns(NotConverged, match="2 of 2"):
        path = model.trajectory(x, steps=30, tol=0.1, states=True)
    assert not path.converged.any() and path.residuals[0].isinf().all()
    assert (flat(path.states[-1]) == flat(path.states[-2])).all()  # though it no longer moves


def test_an_example_stops_at_its_tolerance_in_eval_mode_only():
    model, x = (
        small(tol=0.5, decay=None),
        images(),
    )  # an accumulator grows, so its relative residual falls
    with torch.no_grad():
        assert len(model.eval().trajectory(x, steps=20).outputs) < 10
        assert len(model.train().trajectory(x, steps=20).outputs) == 21


# the decay


def test_decays_by_hand():
    delta = torch.ones(1, 3, 2, 2)
    assert_close(ExponentialDecay(3, tau=0.5)(delta, 2), delta * math.exp(-4))
    assert_close(ExponentialDecay(3, tau=0.5, printed=True)(delta, 2), delta * math.exp(4))
    matrix = ExponentialDecay(3, kind="matrix")
    with torch.no_grad():
        matrix.Q.copy_(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
        matrix.P.copy_(torch.diag(torch.tensor([1.0, 3.0, 1.0])))
    mixed = torch.tensor([7.0, 3.0, 0.0])[None, :, None, None].expand(1, 3, 2, 2)  # QP (1, 1, 1)
    assert_close(matrix(delta, 0), mixed)  # the mix is there at t = 0 too
    assert_close(matrix(delta, 3), mixed * math.exp(-3))


@quick
@given(seed=st.integers(0, 999), tau=st.floats(0.5, 3))
def test_learned_apart_q_and_p_mix_channels_and_still_decay(seed, tau):
    """Q e^{tΣ/τ} P, not the exponential of -t QP/τ: whatever Q and P are, its size falls."""
    torch.manual_seed(seed)
    matrix = ExponentialDecay(4, tau, "matrix").double()
    with torch.no_grad():
        for p in matrix.parameters():
            p.normal_()
    sizes = [float(torch.linalg.matrix_norm(matrix.factor(t).detach(), 2)) for t in range(6)]
    for t, size in enumerate(sizes):
        assert size == pytest.approx(sizes[0] * math.exp(-t / tau))


def test_the_residual_of_a_matrix_decay_is_that_of_the_mixed_step():
    model = small(decay="matrix").eval()
    with torch.no_grad():
        model.decay.Q.normal_()
        path = model.trajectory(images(), steps=3, states=True)
        (phi, (h, y)) = model.map(images())
        h, y = path.states[3], path.outputs[3]
        new, _ = phi((h, y))
    change = torch.cat([(new[k] - h[k]).flatten(1) for k in "uv"], 1).norm(dim=1)
    size = torch.cat([h[k].flatten(1) for k in "uv"], 1).norm(dim=1)
    assert len(path.residuals) == 3  # of h_0 … h_2; the next is that of the map at clock 0
    longer = model.trajectory(images(), steps=4).residuals[3]
    assert_close(longer, change / size)


@quick
@given(seed=st.integers(0, 999), t=st.integers(0, 6), tau=st.floats(0.5, 3))
def test_with_its_true_inverse_every_q_gives_the_plain_decay(seed, t, tau):
    torch.manual_seed(seed)
    matrix = ExponentialDecay(4, tau, "matrix").double()
    with torch.no_grad():
        matrix.Q.copy_(torch.eye(4) + 0.2 * torch.randn(4, 4))
        matrix.P.copy_(torch.linalg.inv(matrix.Q))
    delta = torch.randn(2, 4, 3, 3).double()
    assert_close(matrix(delta, t), delta * math.exp(-t / tau))


def test_the_printed_sign_grows_and_is_there_to_be_tried():
    x = images()
    with torch.no_grad():
        for kind in ("scalar", "matrix"):
            right, printed = (
                small(decay=ExponentialDecay(7, kind=kind, printed=p))
                .trajectory(x, steps=12, states=True)
                .states[-1]["u"]
                .norm()
                for p in (False, True)
            )
            assert printed > 1000 * right


def test_both_matrices_learn():
    model = small(decay="matrix")
    stepwise_loss(model.trajectory(images()), masks()).backward()
    assert model.decay.Q.grad.abs().sum() > 0 and model.decay.P.grad.abs().sum() > 0


# the body


@quick
@given(h=st.integers(4, 40), w=st.integers(4, 40), norm=st.sampled_from(["group", "batch", None]))
def test_any_height_and_width(h, w, norm):
    torch.manual_seed(0)
    net = UNet(2, 3, channels=(4, 8, 8), norm=norm).eval()
    x = images(1, h, w, 2)
    with torch.no_grad():
        y = net(x)
        left, top = -w % 4 // 2, -h % 4 // 2
        padded = nn.functional.pad(x, (left, -w % 4 - left, top, -h % 4 - top), mode="replicate")
        assert y.shape == (1, 3, h, w)
        assert_close(y, net(padded)[..., top : top + h, left : left + w], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["group", "instance", "batch", None])
def test_an_answer_does_not_depend_on_the_other_images_of_the_batch(norm):
    model, x = small(norm=norm), images(5)
    with torch.no_grad():
        model.train()(images(5, seed=1))  # so that batch norm has statistics
        model.eval()
        together = model.trajectory(x).outputs
        for i in range(5):
            for a, b in zip(model.trajectory(x[i : i + 1]).outputs, together):
                assert_close(a[0], b[i], atol=1e-5, rtol=1e-4)
        louder = torch.cat([x[:1], 100 * x[1:]])
        assert_close(model(louder)[0], together[-1][0], atol=1e-5, rtol=1e-4)


def test_the_dtype_is_that_of_the_input():
    path = small().double().trajectory(images().double(), states=True)
    assert {y.dtype for y in path.outputs} == {torch.float64} and path.states[-1][
        "v"
    ].dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        half = small()(images())
    assert half.isfinite().all()


class Borrowed(nn.Module):
    """The interface of segmentation_models_pytorch: sizes in multiples of 32."""

    def __init__(self, in_channels, classes):
        super().__init__()
        self.encoder, self.decoder = (
            nn.Conv2d(in_channels, 8, 32, stride=32),
            nn.ConvTranspose2d(8, classes, 32, stride=32),
        )

    def forward(self, x):
        if any(size % 32 for size in x.shape[-2:]):
            raise RuntimeError("Wrong input shape")
        return self.decoder(self.encoder(x).relu())


def test_a_borrowed_network_as_the_body():
    model = FeedbackLoop(
        Padded(Borrowed(3 + 3, 4 + 3), 32),
        nn.Conv2d(4, 3, 1),
        state=4,
        feedback=3,
        backprop="recompute",
    )
    path = model.trajectory(images(2, 40, 70, 3))
    assert path.output.shape == (2, 3, 40, 70)
    stepwise_loss(path, masks(2, 40, 70, 3), segmentation_loss).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_real_borrowed_network():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = FeedbackLoop(
        Padded(smp.Unet("resnet18", encoder_weights=None, in_channels=3 + 2, classes=4 + 2), 32),
        nn.Conv2d(4, 2, 1),
        state=4,
        feedback=2,
        steps=2,
    )
    assert model.eval()(images(1, 50, 70, 3)).shape == (1, 2, 50, 70)


# gradients


def gradient(model, x, y, loss=None):
    model.zero_grad()
    torch.manual_seed(5)
    stepwise_loss(model.trajectory(x), y, *([loss] if loss else [])).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "options", [{}, {"decay": "matrix"}, {"decay": None}, {"softmax": False}, {"norm": "batch"}]
)
def test_recomputation_has_the_gradient_of_full_backpropagation(options):
    full, again = small(backprop="full", **options), small(backprop="recompute", **options)
    a, b = gradient(full, images(), masks()), gradient(again, images(), masks())
    assert a.norm() > 1e-3
    assert_close(a, b, atol=1e-5, rtol=1e-5)
    for (name, p), q in zip(full.named_buffers(), again.buffers()):
        assert_close(
            p, q, msg=lambda text, name=name: f"{name}: {text}"
        )  # the passes that ran twice were counted once


def test_recomputation_draws_the_same_dropout():
    models = [small(backprop=backprop) for backprop in ("full", "recompute")]
    for model in models:
        model.body = nn.Sequential(model.body, nn.Dropout2d(0.5))
    a, b = (gradient(model, images(), masks()) for model in models)
    assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(a, gradient(small(), images(), masks()), atol=1e-3)


def test_truncation_is_the_gradient_through_the_last_steps():
    x, y, n, T = images(), masks(), 2, 5
    model = small(backprop=n)
    found = gradient(model, x, y)
    model.zero_grad()
    state, losses = model.start(x), []
    for t in range(T + 1):
        losses.append(nn.functional.cross_entropy(state.y, y))
        if t < T:
            state = model.step(x, state, t)
            if t < T - n:
                state = state._replace(
                    h={k: h.detach() for k, h in state.h.items()},
                    y=model.head(state.h["u"].detach()),
                )
    (sum(losses) / (T + 1)).backward()
    assert_close(
        found, torch.cat([p.grad.flatten() for p in model.parameters()]), atol=1e-6, rtol=1e-5
    )
    assert_close(gradient(small(backprop=7), x, y), gradient(small(), x, y))
    assert not torch.allclose(found, gradient(small(), x, y), atol=1e-3)


def live_bytes(backprop, T):
    from feedback_nb.cost import _LiveBytes

    model, x, y = (
        small(backprop=backprop, steps=T, channels=(8, 16)),
        images(2, 16, 16),
        masks(2, 16, 16),
    )
    with _LiveBytes() as live:
        stepwise_loss(model.trajectory(x), y).backward()
    return live.peak


def test_the_memory_of_recomputation_grows_with_the_states_alone():
    growth = {
        backprop: (live_bytes(backprop, 12) - live_bytes(backprop, 6)) / 6
        for backprop in ("full", "recompute", 2)
    }
    states = 2 * 16 * 16 * 4 * (5 + 2)  # bytes of one u and v
    assert (
        growth["recompute"] < 4 * states
    )  # those, and the logits with what the loss keeps of them
    assert growth["full"] > 4 * growth["recompute"]
    assert growth[2] < 4 * states


def test_a_trajectory_without_gradients_keeps_none():
    with torch.no_grad():
        for backprop in ("full", "recompute", 1):
            path = small(backprop=backprop).trajectory(images())
            assert not path.output.requires_grad
            assert_close(path.output, small()(images()).detach())


# the twins


def test_the_twin_is_one_step_of_the_feedback_network():
    model, x = small(), images()
    twin = FeedForward(model)
    assert_close(twin(x), model(x, steps=1))
    built = feedforward_unet(**SMALL)
    assert sum(p.numel() for p in built.parameters()) == sum(p.numel() for p in model.parameters())
    built.loop.load_state_dict(model.state_dict())
    assert_close(built(x), twin(x))


def test_the_static_twin_shrinks_the_logits_by_one_factor():
    for decay in ("scalar", "matrix"):
        model, x = small(decay=decay, tau=2.0), images()
        with torch.no_grad():
            bias = model(x, steps=0)
            assert_close(
                FeedForward(model, static=5)(x) - bias,
                (FeedForward(model)(x) - bias) * math.exp(-2.5),
                atol=1e-5,
                rtol=1e-3,
            )
    with pytest.raises(ValueError, match="static.*decay"):
        feedforward_unet(static=5, decay=None)


# a model like others


def test_it_copies_pickles_and_compiles():
    model, x = small().eval(), images()
    with torch.no_grad():
        expected = model(x)
        for other in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.compile(model, backend="eager", fullgraph=True),
        ):
            assert_close(other(x), expected)


def test_training_finds_clean_polygons():
    train, test = (
        TensorData(*polygons(n, 24, stream=stream), ["background", "polygon"])
        for n, stream in ((60, 0), (30, 1))
    )
    model = small(channels=(8, 16), backprop="recompute", steps=3)
    before = measure_segmentation(model, test)["f1"]
    history = fit(
        model, train, epochs=3, batch_size=5, lr=1e-2, loss=segmentation_loss, progress=False
    ).frame
    scores = measure_segmentation(model, test)
    assert scores["f1"] > 0.95 > before and scores["collapsed"] == 0
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    again = evaluate(
        model,
        test,
        loss=segmentation_loss,
        metrics={"f1": lambda o, y: segmentation_scores(o, y)["f1"]},
        batch_size=30,
    )
    assert again["f1"] == pytest.approx(scores["f1"], abs=1e-5)


# losses and scores


def test_losses_by_hand():
    y = torch.tensor([[[0, 1], [1, 1]]])
    even = torch.zeros(1, 2, 2, 2)
    assert float(segmentation_loss(even, y, dice=0)) == pytest.approx(math.log(2))
    assert float(segmentation_loss(even, y, dice=1)) == pytest.approx(
        1 - (2 * 1.5 + 1) / (2 + 3 + 1)
    )
    weights = class_weights(y, 3)
    assert_close(weights, torch.tensor([1 / (3 * 0.25), 1 / (3 * 0.75), 1.0]))
    assert float(segmentation_loss(even, y, dice=0, weights=weights[:2])) == pytest.approx(
        math.log(2) * (0.25 * weights[0] + 0.75 * weights[1])
    )
    sure = 50 * (2 * nn.functional.one_hot(y, 2).movedim(-1, 1) - 1.0)
    assert float(segmentation_loss(sure, y)) == pytest.approx(0, abs=1e-6)


@quick
@given(
    seed=st.integers(0, 99), n=st.integers(2, 5), classes=st.integers(2, 4), dice=st.floats(0, 1)
)
def test_the_loss_of_a_batch_is_the_mean_over_its_images(seed, n, classes, dice):
    torch.manual_seed(seed)
    logits, y, weights = (
        torch.randn(n, classes, 5, 6),
        masks(n, 5, 6, classes, seed),
        torch.rand(classes),
    )
    each = [
        segmentation_loss(a[None], b[None], dice=dice, weights=weights) for a, b in zip(logits, y)
    ]
    assert_close(segmentation_loss(logits, y, dice=dice, weights=weights), torch.stack(each).mean())


def test_a_batch_of_empty_masks_has_a_loss_a_gradient_and_a_score():
    y, logits = torch.zeros(3, 6, 6, dtype=torch.long), torch.randn(3, 2, 6, 6, requires_grad=True)
    loss = segmentation_loss(logits, y)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
    assert segmentation_scores(y, y, n_classes=2)["f1"] == 1
    assert segmentation_scores(y, y, n_classes=2, empty=0.0)["f1"] == 0
    assert segmentation_scores(y, y, n_classes=2, empty=math.nan)[
        "f1"
    ].isnan()  # because it was asked for
    assert segmentation_scores(1 - y, y, n_classes=2)["f1"] == 0
    one = y.clone()
    one[0, 2:4, 2:4] = 1
    assert segmentation_scores(one, one, n_classes=2, average="images")["f1"] == 1
    assert segmentation_scores(y, one, n_classes=2, average="images")["f1"] == pytest.approx(
        2 / 3
    )  # two empty ones right, one missed
    assert segmentation_scores(y, one, n_classes=2)["f1"] == 0


@quick
@given(seed=st.integers(0, 999), classes=st.integers(2, 4))
def test_scores_are_those_of_torchmetrics(seed, classes):
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_jaccard_index

    torch.manual_seed(seed)
    logits, y = torch.randn(4, classes, 12, 12), masks(4, 12, 12, classes, seed)
    scores = segmentation_scores(logits, y)
    assert_close(
        scores["f1_per_class"].float(), multiclass_f1_score(logits, y, classes, average=None)
    )
    assert_close(
        scores["iou_per_class"].float(), multiclass_jaccard_index(logits, y, classes, average=None)
    )
    assert_close(scores["f1"], scores["f1_per_class"][1:].mean())
    each = multiclass_f1_score(
        logits, y, classes, average=None, multidim_average="samplewise"
    ).mean(0)
    assert_close(segmentation_scores(logits, y, average="images")["f1_per_class"].float(), each)
    assert_close(scores["true"], torch.bincount(y.flatten(), minlength=classes) / y.numel())


def test_measuring_a_data_set():
    data, model = TensorData(*polygons(7, 16), ["background", "polygon"]), small().train()
    state = torch.get_rng_state()
    rows = [measure_segmentation(model, data, batch_size=n) for n in (1, 3, 7)]
    assert torch.equal(torch.get_rng_state(), state)
    for row in rows[1:]:
        assert all(row[key] == pytest.approx(rows[0][key]) for key in row)
    assert model.training and len(rows[0]["f1_per_step"]) == 6
    x, y = data.__getitems__(range(7))
    assert rows[0]["f1"] == pytest.approx(float(segmentation_scores(model.eval()(x), y)["f1"]))
    background = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        background.bias.copy_(torch.tensor([99.0, -99.0]))
    row = measure_segmentation(
        background, [(a, b) for a, b in zip(x, y)]
    )  # a list of pairs, a plain network
    assert row["collapsed"] == 1 and row["f1"] == 0 and len(row["f1_per_step"]) == 1
    with pytest.raises(ValueError, match="number of images.*0"):
        measure_segmentation(model, data.subset(0))


def test_images_of_different_sizes_are_measured_as_one():
    net, sizes = nn.Conv2d(1, 2, 1), ((8, 8), (12, 20), (9, 5))
    data = [(images(1, *size)[0], masks(1, *size)[0]) for size in sizes]
    found = measure_segmentation(net, data, batch_size=1)
    with torch.no_grad():
        answers = torch.cat([net(x[None]).argmax(1).flatten() for x, _ in data])
    target = torch.cat([y.flatten() for _, y in data])
    whole = segmentation_scores(answers[None], target[None], n_classes=2)
    assert found["f1"] == float(whole["f1"]) and found["iou"] == float(whole["iou"])


def test_measuring_keeps_no_predictions():
    """What is alive of whole numbers when the network runs does not grow with the data set."""

    def tensors():
        return [t for t in gc.get_objects() if type(t) is torch.Tensor]

    class Watched(nn.Conv2d):
        def forward(self, x):
            new = (t for t in tensors() if id(t) not in known)
            held.append(sum(t.numel() for t in new if t.dtype == torch.int64))
            return super().forward(x)

    x, y = polygons(12, 32)
    data, held = TensorData(x, y), []
    before = tensors()  # also what other tests left; held, so that no id is given away anew
    known = {id(t) for t in before}
    net = Watched(1, 2, 1)
    measure_segmentation(net, data, batch_size=2)
    assert len(held) == 6 and max(held[1:]) - min(held[1:]) < 2 * 32 * 32

# bad input


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: small()(images(2, 3, 16)), ["3, 16)", "4×4"]),
        (lambda: Padded(nn.Conv2d(1, 1, 1), 32)(images(1, 31, 64)), ["(1, 1, 31, 64)", "32×32"]),
        (lambda: small()(images(2, channels=3)), ["(B, 1, H, W)", "(2, 3, 12, 15)"]),
        (lambda: small()(images()[0]), ["(1, 12, 15)"]),
        (lambda: small()(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)), ["uint8", "255"]),
        (lambda: UNet(2, 3)(images(1, 16, 16)), ["(B, 2, H, W)", "(1, 1, 16, 16)"]),
        (lambda: UNet(1, 2, channels=()), ["channels"]),
        (lambda: UNet(1, 2, channels=(4, 0)), ["channels[1]", "0"]),
        (lambda: UNet(1, 2, norm="layer"), ["'layer'", "group"]),
        (lambda: small(n_classes=1), ["softmax"]),
        (lambda: small(tau=-1.0), ["tau", "-1.0"]),
        (lambda: small(decay="linear"), ["'linear'", "matrix"]),
        (lambda: small(decay=0.5), ["decay", "0.5"]),
        (lambda: small(backprop=0), ["backprop", "0"]),
        (lambda: small(backprop=True), ["backprop", "True"]),
        (lambda: small(steps=-1), ["steps"]),
        (lambda: small()(images(), steps=1.5), ["steps", "1.5"]),
        (
            lambda: FeedbackLoop(nn.Conv2d(3, 6, 1), nn.Identity(), state=3, feedback=2)(images()),
            ["(2, 5, 12, 15)", "(2, 6, 12, 15)"],
        ),
        (
            lambda: FeedbackLoop(nn.Conv2d(3, 5, 3), nn.Identity(), state=3, feedback=2)(images()),
            ["(2, 5, 10, 13)"],
        ),
        (lambda: tail_bound(1.0, -1), ["t must", "-1"]),
        (lambda: check_masks(masks(), 2, (2, 12, 16)), ["(2, 12, 15)", "(2, 12, 16)"]),
        (lambda: check_masks(masks().float(), 2), ["float32", "int64"]),
        (lambda: check_masks(masks() > 0, 2), ["bool"]),
        (lambda: check_masks(masks()[:0], 2), ["(0, 12, 15)"]),
        (lambda: segmentation_loss(torch.zeros(2, 2, 12, 15), masks(), dice=1.5), ["dice", "1.5"]),
        (lambda: segmentation_scores(masks(), masks()), ["n_classes"]),
        (lambda: segmentation_scores(masks(), masks(), n_classes=2, average="all"), ["'all'"]),
        (
            lambda: segmentation_scores(torch.zeros(2, 2, 12, 14), masks()),
            ["(2, 12, 15)", "(2, 12, 14)"],
        ),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("value", [2, -1, 255])
@pytest.mark.parametrize(
    "use",
    [
        lambda o, y: segmentation_loss(o, y),
        lambda o, y: segmentation_scores(o, y),
        lambda o, y: class_weights(y, 2),
    ],
)
def test_a_label_that_is_no_class_is_named_with_its_place(value, use):
    y = masks()
    y[1, 4, 9] = value
    with pytest.raises(ValueError, match=rf"label {value} in mask 1 at \(4, 9\).*0…1"):
        use(torch.zeros(2, 2, 12, 15), y)


def test_values_that_are_not_finite_are_named():
    x = images()
    x[1, 0, 3, 3] = math.nan
    with pytest.raises(FloatingPointError, match="input.*example 1"):
        small()(x)
    model = small()
    with torch.no_grad():
        model.body.last.bias[0] = math.inf
    with pytest.raises(FloatingPointError, match="'u'.*step 1"):
        model(images())


def test_a_wrong_mask_in_training_is_named():
    x, y = polygons(6, 16)
    y[4, 2, 3] = 7
    with pytest.raises(ValueError, match="label 7"):
        fit(
            small(),
            TensorData(x, y),
            epochs=1,
            batch_size=6,
            loss=partial(segmentation_loss, dice=0.2),
            progress=False,
        )


# polygons, as this chapter uses them


@pytest.mark.parametrize("size, classes", [(20, 1), (33, 3), (128, 5)])
def test_polygons_of_any_size_and_number_of_classes(size, classes):
    x, y = polygons(60, size, classes, seed=3)
    assert x.shape == (60, 1, size, size) and y.shape == (60, size, size)
    assert set(y.unique().tolist()) == set(range(classes + 1))
    assert torch.equal(x[:, 0] == 255, y > 0)
    assert torch.equal(polygons(10, size, classes, seed=3)[0], x[:10])
    assert not torch.equal(polygons(60, size, classes, seed=4)[0], x)


def test_the_noise_of_the_authors_code_and_ours():
    x = polygons(8, 32)[0].expand(-1, 3, -1, -1)
    draw = lambda rescale: gaussian_noise(
        x, 2.0, rescale=rescale, generator=torch.Generator().manual_seed(0)
    )
    theirs, plain = draw("image"), draw(None)
    assert_close(theirs.amin((1, 2, 3)), torch.zeros(8))
    assert_close(theirs.amax((1, 2, 3)), torch.ones(8))
    assert not torch.equal(theirs[:, 0], theirs[:, 1])  # drawn for each channel
    low, high = plain.amin((1, 2, 3), keepdim=True), plain.amax((1, 2, 3), keepdim=True)
    assert_close(theirs, (plain - low) / (high - low))
    assert float((plain - x / 255).std()) == pytest.approx(2.0, rel=0.02)
    assert torch.equal(draw("image"), theirs)


def test_the_lowest_level_of_the_smallest_image_is_not_dead():
    """A norm over a single value is zero: at 1×1 pixels a group must hold several channels."""
    net = UNet(1, 2, channels=(4, 8, 8)).eval()
    with torch.no_grad():
        h = nn.functional.max_pool2d(
            net.down[1](nn.functional.max_pool2d(net.down[0](images(3, 4, 4)), 2)), 2
        )
        assert h.shape[2:] == (1, 1) and net.down[2](h).std(0).max() > 1e-2


def test_steps_may_be_numbers_of_numpy():
    import numpy as np

    model, x = small(backprop=1, steps=3), images()
    one = gradient(model, x, (x[:, 0] > 0).long())
    model.steps = np.int64(3)
    assert_close(gradient(model, x, (x[:, 0] > 0).long()), one)
    with pytest.raises(ValueError, match="steps"):
        model.trajectory(x, steps=-1)


def test_a_widened_network_answers_as_before_and_learns_the_new_channels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 6, 1))
    before = copy.deepcopy(net.state_dict())
    wide, x, new = widened(net, 2), images(2, 9, 9, channels=3), torch.randn(2, 2, 9, 9)
    assert_close(wide(torch.cat([x, new], 1)), net(x))
    wide(torch.cat([x, new], 1)).square().sum().backward()
    assert wide[0].weight.grad[:, 3:].abs().min() > 0 and net[0].weight.grad is None
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert net[0].in_channels == 3 and wide[0].in_channels == 5
    assert widened(net, 1, "2")[2].weight.shape == (6, 5, 1, 1)  # another one, by its name


@pytest.mark.parametrize("net, options, name", [
    (nn.Linear(3, 3), {}, "convolution"), (nn.Conv2d(3, 3, 1, groups=3), {}, "convolution"),
    (nn.Conv2d(3, 3, 1), {"name": "stem"}, "stem"), (nn.Conv2d(3, 3, 1), {"more": 0}, "more")])
def test_what_cannot_be_widened_is_named(net, options, name):
    with pytest.raises(ValueError, match=name):
        widened(net, **{"more": 1} | options)
