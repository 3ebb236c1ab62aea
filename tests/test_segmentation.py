"""What a user of feedback_nb.segmentation relies on beside the U-Net: void, NaN, memory."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from feedback_nb.cost import _LiveBytes
from feedback_nb.data import TensorData, polygons
from feedback_nb.feedback import FeedbackModel, State
from feedback_nb.segmentation import (
    check_masks,
    class_weights,
    measure_segmentation,
    segmentation_loss,
    segmentation_scores,
)

VOID = 255


def pair(classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 6, 8, generator=g)
    return logits, torch.randint(classes, (2, 6, 8), generator=g)


class Loop(FeedbackModel):
    """Its answer changes at every step."""

    def __init__(self, steps=3):
        super().__init__(steps)
        self.layer = nn.Conv2d(1, 2, 3, padding=1)

    def start(self, x, *, states=False):
        y = self.layer(x)
        return State(y, y, x)

    def step(self, x, state, t):
        y = self.layer(x) * (t + 2) + state.y
        return State(y, y, x)


def test_void_pixels_count_nowhere():
    """The left half is void: everything is as if the images had only the right half."""
    logits, y = pair()
    void, right = y.clone(), (..., slice(4, 8))
    void[..., :4] = VOID
    how = dict(ignore_index=VOID)
    for dice in (0.0, 0.5, 1.0):
        weights = class_weights(void, 3, VOID)
        assert_close(weights, class_weights(y[right], 3))
        found = segmentation_loss(logits, void, dice=dice, weights=weights, **how)
        assert_close(found, segmentation_loss(logits[right], y[right], dice=dice, weights=weights))
    for average in ("pixels", "images"):
        found = segmentation_scores(logits, void, average=average, **how)
        assert_close(found, segmentation_scores(logits[right], y[right], average=average))


def test_void_of_torch_and_a_mask_of_nothing_else():
    logits, y = pair()
    y[0] = -100
    assert segmentation_scores(logits, y, ignore_index=-100)["true"].sum() == 1
    assert math.isfinite(segmentation_loss(logits, y, ignore_index=-100))
    y[:] = -100
    assert segmentation_loss(logits, y, dice=0, ignore_index=-100) == 0
    assert segmentation_scores(logits, y, ignore_index=-100)["f1"] == 1  # nothing to find


def test_void_has_no_gradient():
    logits, y = pair()
    logits.requires_grad_()
    y[:, :3] = VOID
    segmentation_loss(logits, y, ignore_index=VOID).backward()
    assert (logits.grad[:, :, :3] == 0).all() and (logits.grad[:, :, 3:] != 0).any()


def test_measuring_with_void_is_scoring_with_void():
    x, y = polygons(6, 16)
    y[:, :5] = VOID
    data, net = [(a, b) for a, b in zip(x.float(), y)], nn.Conv2d(1, 2, 3, padding=1)
    found = measure_segmentation(net, data, batch_size=4, ignore_index=VOID)
    with torch.no_grad():
        expected = segmentation_scores(net(x.float()), y, ignore_index=VOID)
    assert found["f1"] == float(expected["f1"]) and found["iou"] == float(expected["iou"])


@pytest.mark.parametrize("call", [check_masks, class_weights])
def test_void_that_is_not_announced_is_refused(call):
    _, y = pair()
    y[1, 2, 3] = VOID
    with pytest.raises(ValueError, match=r"255.*mask 1.*\(2, 3\).*ignore_index"):
        call(y, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_answers_that_are_not_finite_are_no_class(bad):
    logits, y = pair(2)
    logits[1, :, 0, 0] = bad
    with pytest.raises(FloatingPointError, match="finite"):
        segmentation_scores(logits, y)

    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 2, *x.shape[2:]), bad)

    with pytest.raises(FloatingPointError, match="finite"):
        measure_segmentation(Broken(), TensorData(*polygons(3, 16), ["background", "polygon"]))


def test_every_step_is_scored_as_the_trajectory_has_it():
    torch.manual_seed(0)
    data, model = TensorData(*polygons(5, 16), ["background", "polygon"]), Loop()
    x, y = data.__getitems__(range(5))
    for steps in (None, 0, 5):
        with torch.no_grad():
            outputs = model.eval().trajectory(x, steps=steps, tol=False).outputs
        expected = [float(segmentation_scores(output, y)["f1"]) for output in outputs]
        assert measure_segmentation(model, data, steps=steps)["f1_per_step"] == expected
    with pytest.raises(ValueError, match="steps"):
        measure_segmentation(model, data, steps=-1)


def peak(n, steps):
    data = TensorData(*polygons(n, 64), ["background", "polygon"])
    with _LiveBytes() as live:
        measure_segmentation(Loop(), data, batch_size=2, steps=steps)
    return live.peak


def test_memory_grows_neither_with_the_images_nor_with_the_steps():
    logits = 2 * 2 * 64 * 64 * 4  # bytes of the answer to one batch
    few = peak(4, 2)
    assert peak(24, 2) < few + logits / 2
    assert peak(4, 12) < few + logits / 2
