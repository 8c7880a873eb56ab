"""Dice and focal against plain loops in float64, torchmetrics and torchvision; their zeros, their
slopes, extreme logits; the label on patches."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from torch.testing import assert_close
from torchmetrics.classification import BinaryF1Score
from torchvision.ops import sigmoid_focal_loss

from risclip.losses import dice_loss, focal_loss, patch_label, segmentation_losses

quick = settings(max_examples=60, deadline=None)
masks = arrays(bool, (7, 5))
GAMMAS = [0, .5, 1, 2, 3.5, 5]


def both(*args, **kw):
    "The sum alone."
    return segmentation_losses(*args, **kw)['loss']


LOSSES = [dice_loss, focal_loss, both]


# ---------------------------------------------------------------- against others

@quick
@given(masks, masks)
def test_dice_of_hard_masks_is_f1(p, t):
    if not (p | t).any(): return
    logits = torch.tensor(p)[None, None].float()*200 - 100
    target = torch.tensor(t)[None, None].float()
    f1 = BinaryF1Score()(torch.tensor(p).long(), torch.tensor(t).long()).item()
    assert 1 - dice_loss(logits, target).item() == pytest.approx(f1, abs=1e-5)


@quick
@given(arrays(np.float32, (2, 1, 4, 3), elements=st.floats(-30, 30, width=32)),
       arrays(bool, (2, 1, 4, 3)), st.floats(0, 1), st.sampled_from(GAMMAS))
def test_focal_of_hard_targets_is_torchvision(x, t, alpha, gamma):
    logits, target = torch.tensor(x).double(), torch.tensor(t).double()
    theirs = sigmoid_focal_loss(logits, target, alpha, gamma, 'mean')
    assert_close(focal_loss(logits, target, alpha, gamma), theirs, atol=1e-12, rtol=1e-7)


def sigmoid(x): return 1/(1 + math.exp(-x)) if x > -700 else 0.


def by_loops(logits, target, alpha, gamma):
    "Dice and focal in float64, pixel by pixel."
    dices, focals = [], []
    for x_map, t_map in zip(logits.double().numpy(), target.double().numpy()):
        overlap = areas = 0
        for x, t in zip(x_map.ravel().tolist(), t_map.ravel().tolist()):
            p = sigmoid(x)
            overlap += p*t
            areas += p*p + t*t
            cross_entropy = t*math.log1p(math.exp(-x)) + (1 - t)*math.log1p(math.exp(x))
            weight = alpha*t + (1 - alpha)*(1 - t)
            focals.append(weight*abs(t - p)**gamma*cross_entropy)
        dices.append(1 - 2*overlap/areas)
    return sum(dices)/len(dices), sum(focals)/len(focals)


soft = st.floats(0, 1, width=32).map(lambda v: 0 if v < 1e-3 else v)


@quick
@given(arrays(np.float32, (3, 1, 3, 4), elements=st.floats(-15, 15, width=32)),
       arrays(np.float32, (3, 1, 3, 4), elements=soft), st.floats(0, 1),
       st.sampled_from([0, 1, 2, 5]))
def test_losses_against_loops(x, t, alpha, gamma):
    t[:, :, 0, 0] = 1                                # no empty map: 0/0 has no value by the formula
    logits, target = torch.tensor(x), torch.tensor(t)
    dice, focal = by_loops(logits, target, alpha, gamma)
    assert dice_loss(logits, target).item() == pytest.approx(dice, abs=2e-6)
    ours = focal_loss(logits, target, alpha, gamma).item()
    assert ours == pytest.approx(focal, abs=1e-6, rel=1e-4)
    found = segmentation_losses(logits, target, 2., 3., alpha, gamma)
    assert found['loss'].item() == pytest.approx(2*dice + 3*focal, abs=1e-5, rel=1e-4)
    assert list(found) == ['loss', 'dice', 'focal']  # the parts come without their weights
    assert torch.equal(found['dice'], dice_loss(logits, target))
    assert torch.equal(found['focal'], focal_loss(logits, target, alpha, gamma))


def test_known_values():
    zero = torch.zeros(1, 1, 4, 4)                   # every score is one half
    one, corner = torch.ones_like(zero), zero.clone()
    corner[..., :2, :2] = 1
    assert focal_loss(zero, one).item() == pytest.approx(.65*.25*math.log(2))
    assert focal_loss(zero, zero).item() == pytest.approx(.35*.25*math.log(2))
    assert focal_loss(zero, one, alpha=.25, gamma=0).item() == pytest.approx(.25*math.log(2))
    assert dice_loss(zero, corner).item() == pytest.approx(1 - 2*2/(16/4 + 4), abs=1e-6)
    assert dice_loss(zero, one).item() == pytest.approx(1 - 2*8/(4 + 16), abs=1e-6)
    assert both(zero, one).item() == pytest.approx(.2 + 1.75*.65*.25*math.log(2), abs=1e-6)
    for loss in LOSSES: assert loss(zero, one).shape == ()


# ---------------------------------------------------------------- properties

def test_dice_is_a_mean_over_maps():
    "A small referent weighs as much as a large one; focal's mean is over pixels."
    torch.manual_seed(0)
    logits, target = torch.randn(5, 1, 4, 6), torch.rand(5, 1, 4, 6)
    for loss in (dice_loss, focal_loss):
        apart = [loss(x[None], t[None]) for x, t in zip(logits, target)]
        assert_close(loss(logits, target), torch.stack(apart).mean())
    three_times = both(logits.repeat(3, 1, 1, 1), target.repeat(3, 1, 1, 1))
    assert_close(three_times, both(logits, target))


@quick
@given(arrays(np.float64, (1, 1, 3, 3), elements=st.floats(.02, .98)),
       arrays(np.float64, (1, 1, 3, 3), elements=st.floats(-6, 6)))
def test_the_label_is_the_only_zero(t, x):
    target, other = torch.tensor(t), torch.tensor(x)
    for loss in LOSSES:
        at_label = target.logit().requires_grad_()
        value = loss(at_label, target)
        assert abs(value.item()) < 1e-9
        slope, = torch.autograd.grad(value, at_label)
        assert slope.abs().max() < 1e-6
        assert loss(other, target) >= 0
        if (other.sigmoid() - target).abs().max() > .05: assert loss(other, target) > 1e-6


def test_perfect_and_worst():
    hard = (torch.arange(12).view(1, 1, 3, 4) % 3 == 0).float()
    right, wrong = hard*200 - 100, 100 - hard*200
    assert dice_loss(right, hard).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(wrong, hard).item() == pytest.approx(1, abs=1e-6)
    assert focal_loss(right, hard).item() == pytest.approx(0, abs=1e-6)
    assert focal_loss(wrong, hard).item() > 10
    nothing = torch.zeros(1, 1, 3, 4)
    assert dice_loss(torch.full_like(nothing, -1e4), nothing).item() == 0      # rightly empty


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('gamma', [0, .5, 1, 2])
@pytest.mark.parametrize('t', [0., .3, 1.])
def test_extreme_logits_are_finite(dtype, gamma, t):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for x in (-1e4, -100., -17., 0., 17., 100., 1e4):
        logits = torch.full((2, 1, 40, 40), x, dtype=dtype, requires_grad=True)
        loss = both(logits, torch.full((2, 1, 40, 40), t), gamma=gamma)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all(), x
        assert loss.dtype == wide
        surely_wrong = (t, x) in ((1., -1e4), (0., 1e4))
        if surely_wrong: assert logits.grad.abs().sum() > 0           # still pulled


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    soft = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    for target in (soft, (soft > .6).double()):
        for loss in LOSSES: assert torch.autograd.gradcheck(lambda x: loss(x, target), logits)


@pytest.mark.parametrize('loss', LOSSES)
def test_losses_refuse_what_does_not_fit(loss):
    x = torch.zeros(2, 1, 3, 4)
    large = torch.eye(4)[:3].expand(2, 1, 3, 4)*255
    for logits, target, words in [(x, x[:, 0], r'\[2, 1, 3, 4\] and \[2, 3, 4\]'),
                                  (x[0], x[0], r'both be \[B,1,h,w\]'), (x, large, '0 to 255'),
                                  (x, x - .1, '0..1'), (x, x/0, 'nan')]:
        with pytest.raises(ValueError, match=words): loss(logits, target)
    assert_close(loss(x, torch.ones(2, 1, 3, 4, dtype=torch.bool)), loss(x, x + 1))


def test_focal_refuses_bad_settings():
    x = torch.zeros(1, 1, 2, 2)
    for bad in (dict(alpha=1.1), dict(alpha=-1), dict(gamma=-.1)):
        with pytest.raises(ValueError, match='alpha should'): focal_loss(x, x, **bad)


# ---------------------------------------------------------------- the label

@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_patch_label_is_the_loop(h, w, patch, seed):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(2, 1, h*patch, w*patch, generator=g) > .5).float()
    patches = mask.unfold(2, patch, patch).unfold(3, patch, patch).flatten(4)    # [2, 1, h, w, n]
    assert_close(patch_label(mask, (h, w)), patches.mean(-1))
    assert torch.equal(patch_label(mask, [h, w], 'any'), patches.amax(-1))
