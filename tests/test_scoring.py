"""Scores against torchmetrics and pycocotools, losses against plain loops in float64, and the evaluation loop on a data set with known scores."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask
from torch.testing import assert_close
from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex
from torchmetrics.segmentation import MeanIoU
from torchvision.ops import sigmoid_focal_loss

from risclip.refer import Refer, ReferDataset, write_refer
from risclip.scoring import (Row, Scores, dice_loss, evaluate, focal_loss, intersection_and_union, segmentation_loss, to_size,
                             truth_at)

quick = settings(max_examples=60, deadline=None)
masks = arrays(bool, (7, 5))
pairs = st.lists(st.tuples(masks, masks), min_size=1, max_size=8)


def mask(text):
    "A bool mask from rows of '.' and '#'."
    return np.array([[c == '#' for c in row] for row in text.split()])


def scored(examples, **kw):
    scores = Scores(**kw)
    for p, t in examples: scores.add(p, t)
    return scores


# ---------------------------------------------------------------- masks

def test_hand_made_masks():
    p, t = mask('##.. ##.. ....'), mask('.##. .##. ....')
    assert intersection_and_union(p, t) == (2, 6)
    assert intersection_and_union(t, p) == (2, 6)
    assert intersection_and_union(p, p) == (4, 4)
    assert intersection_and_union(p, ~p) == (0, 12)
    assert intersection_and_union(torch.tensor(p), torch.tensor(t)) == (2, 6)
    assert all(type(n) is int for n in intersection_and_union(p, t))     # no numpy number: sums never overflow


def test_numbers_by_hand():
    s = scored([(mask('##..'), mask('##..')), (mask('#...'), mask('##..')), (mask('..##'), mask('##..'))])
    assert s.n == 3 and [r.iou for r in s.rows] == [1, .5, 0]
    numbers = s.compute()
    assert numbers['n'] == 3 and list(numbers) == ['miou', 'oiou', 'p50', 'p60', 'p70', 'p80', 'p90', 'n']
    assert numbers['miou'] == pytest.approx(50) and numbers['oiou'] == pytest.approx(100*3/8)
    assert numbers['p50'] == pytest.approx(200/3) and numbers['p60'] == numbers['p90'] == pytest.approx(100/3)
    assert all(type(v) is float for k, v in numbers.items() if k != 'n')   # goes into a JSON file as it is


def test_empty_union_counts_zero():
    nothing = np.zeros((3, 4), bool)
    s = scored([(nothing, nothing)])
    assert s.compute() == dict(miou=0, oiou=0, p50=0, p60=0, p70=0, p80=0, p90=0, n=1)
    s.add(~nothing, ~nothing)
    assert s.compute()['miou'] == 50 and s.compute()['oiou'] == 100 and s.compute()['p90'] == 50


@pytest.mark.parametrize('k', range(5, 10))
def test_precision_takes_the_threshold_itself(k):
    exactly, below = Scores(rows=[(k, 10)]), Scores(rows=[(k*10**9 - 1, 10**10)])
    assert exactly.compute()[f'p{10*k}'] == 100 and below.compute()[f'p{10*k}'] == 0
    assert Scores(thresholds=(1.,), rows=[(3, 3), (2, 3)]).compute()['p100'] == 50


def test_threshold_names():
    assert list(Scores(thresholds=(.55, .625), rows=[(1, 1)]).compute()) == ['miou', 'oiou', 'p55', 'p62.5', 'n']


@pytest.mark.parametrize('p, t, words', [
    (np.zeros((2, 3)), np.zeros((2, 3), bool), 'prediction should be a bool mask'),
    (np.zeros((2, 3), bool), np.zeros((2, 3), np.uint8), 'truth should be a bool mask'),
    (np.zeros((1, 2, 3), bool), np.zeros((1, 2, 3), bool), 'leading axes'),
    (np.zeros((2, 3), bool), np.zeros((1, 3), bool), 'resize the map'),
    (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), 'float32')])
def test_refuses_what_is_no_mask(p, t, words):
    with pytest.raises(ValueError, match=words): Scores().add(p, t)


def test_refuses_bad_settings():
    with pytest.raises(ValueError, match='no expression'): Scores().compute()
    with pytest.raises(ValueError, match='at most 1'): Scores(thresholds=(50,))
    with pytest.raises(ValueError, match='at most 1'): Scores(thresholds=(0.,))
    with pytest.raises(ValueError, match='differ'): Scores().merge(Scores(thresholds=(.5,)))
    for edges in ((3, 1), (1, 1), ()):
        with pytest.raises(ValueError, match='rise'): Scores(rows=[(1, 1)]).by_length(edges)


# ---------------------------------------------------------------- against other libraries

@quick
@given(masks, masks)
def test_iou_is_pycocotools(p, t):
    rle = [coco_mask.encode(np.asfortranarray(m, np.uint8)) for m in (p, t)]
    i, u = intersection_and_union(p, t)
    assert i == coco_mask.area(coco_mask.merge(rle, intersect=True)) and u == coco_mask.area(coco_mask.merge(rle))
    if u: assert Row(i, u).iou == pytest.approx(coco_mask.iou(rle[:1], rle[1:], [0])[0, 0])


@quick
@given(pairs)
def test_miou_and_oiou_are_torchmetrics(examples):
    examples = [(p, t) for p, t in examples if (p | t).any()] or [(np.ones((7, 5), bool),)*2]   # an empty union is defined otherwise there
    p, t = (torch.tensor(np.stack(m)).long() for m in zip(*examples))
    numbers = scored(examples).compute()
    mean = MeanIoU(num_classes=2, include_background=False, input_format='index')
    assert numbers['miou'] == pytest.approx(100*mean(p, t).item(), abs=1e-3)
    assert numbers['oiou'] == pytest.approx(100*BinaryJaccardIndex()(p, t).item(), abs=1e-3)   # one confusion matrix for all pixels


@quick
@given(masks, masks)
def test_dice_of_hard_masks_is_f1(p, t):
    if not (p | t).any(): return
    logits, target = torch.tensor(p)[None, None].float()*200 - 100, torch.tensor(t)[None, None].float()
    f1 = BinaryF1Score()(torch.tensor(p).long(), torch.tensor(t).long()).item()
    assert 1 - dice_loss(logits, target).item() == pytest.approx(f1, abs=1e-5)


@quick
@given(arrays(np.float32, (2, 1, 4, 3), elements=st.floats(-30, 30, width=32)), arrays(bool, (2, 1, 4, 3)),
       st.floats(0, 1), st.sampled_from([0, .5, 1, 2, 3.5, 5]))
def test_focal_of_hard_targets_is_torchvision(x, t, alpha, gamma):
    logits, target = torch.tensor(x).double(), torch.tensor(t).double()
    assert_close(focal_loss(logits, target, alpha, gamma), sigmoid_focal_loss(logits, target, alpha, gamma, 'mean'), atol=1e-12, rtol=1e-7)


# ---------------------------------------------------------------- properties of the scores

@quick
@given(masks, masks)
def test_iou_properties(p, t):
    iou = lambda a, b: Row(*intersection_and_union(a, b)).iou
    assert iou(p, t) == iou(t, p) and 0 <= iou(p, t) <= 1
    assert (iou(p, t) == 1) == (p.any() and np.array_equal(p, t))
    assert iou(p & t, t) >= iou(p, t)                     # dropping what is wrong never hurts
    assert iou(p.T, t.T) == iou(p, t) == iou(p[::-1], t[::-1])


@quick
@given(pairs, st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_order_or_parts(examples, random):
    whole = scored(examples)
    cut = random.randint(0, len(examples))
    parts = scored(examples[:cut]).merge(scored(examples[cut:]))
    assert parts.compute() == whole.compute() and parts.n == len(examples)
    shuffled = random.sample(examples, len(examples))
    assert scored(shuffled).compute() == pytest.approx(whole.compute())
    again = Scores(whole.thresholds, [tuple(r) for r in whole.rows])          # rows travel as plain tuples
    assert again.compute() == whole.compute()


@quick
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(9, 30), st.sampled_from(['place', 'relation', 'all']),
                          st.none() | st.integers(1, 20)), min_size=1, max_size=20))
def test_groups_add_up(rows):
    s = Scores(rows=rows)
    numbers = s.compute()
    precisions = [numbers[f'p{x}'] for x in (50, 60, 70, 80, 90)]
    assert precisions == sorted(precisions, reverse=True)
    for groups in (s.by_kind(), s.by_length(), s.by_length(edges=(4, 5, 9))):
        assert sum(g['n'] for g in groups.values()) == s.n
        for name in ('miou', 'p50', 'p90'):
            assert sum(g['n']*g[name] for g in groups.values())/s.n == pytest.approx(numbers[name])


def test_length_bins():
    s = Scores(rows=[(1, 1, 'all', n) for n in (1, 2, 3, 4, 5, 7, 8, 11, 12, 40)] + [(0, 1)])
    assert {k: g['n'] for k, g in s.by_length().items()} == {'1-2': 2, '3-4': 2, '5-7': 2, '8-11': 2, '12+': 2, 'unknown': 1}
    assert {k: g['n'] for k, g in s.by_length(edges=(2, 3, 12)).items()} == {'under 2': 1, '2': 1, '3-11': 6, '12+': 2, 'unknown': 1}
    assert list(Scores(rows=[(1, 1, 'b'), (1, 1, 'a'), (1, 1, 'b')]).by_kind()) == ['b', 'a']


# ---------------------------------------------------------------- losses

def sigmoid(x): return 1/(1 + math.exp(-x)) if x > -700 else 0.

def by_loops(logits, target, alpha, gamma):
    "Dice and focal in float64, pixel by pixel."
    dices, focals = [], []
    for x_map, t_map in zip(logits.double().numpy(), target.double().numpy()):
        overlap = areas = 0
        for x, t in zip(x_map.ravel().tolist(), t_map.ravel().tolist()):
            p = sigmoid(x)
            overlap += p*t; areas += p*p + t*t
            log_p, log_not_p = -math.log1p(math.exp(-x)), -math.log1p(math.exp(x))
            focals.append((alpha*t + (1 - alpha)*(1 - t))*abs(t - p)**gamma*-(t*log_p + (1 - t)*log_not_p))
        dices.append(1 - 2*overlap/areas)
    return sum(dices)/len(dices), sum(focals)/len(focals)


@quick
@given(arrays(np.float32, (3, 1, 3, 4), elements=st.floats(-15, 15, width=32)),
       arrays(np.float32, (3, 1, 3, 4), elements=st.floats(0, 1, width=32).map(lambda v: 0 if v < 1e-3 else v)), st.floats(0, 1), st.sampled_from([0, 1, 2, 5]))
def test_losses_against_loops(x, t, alpha, gamma):
    t[:, :, 0, 0] = 1                                              # no empty map: 0/0 has no value by the formula
    logits, target = torch.tensor(x), torch.tensor(t)
    dice, focal = by_loops(logits, target, alpha, gamma)
    assert dice_loss(logits, target).item() == pytest.approx(dice, abs=2e-6)
    assert focal_loss(logits, target, alpha, gamma).item() == pytest.approx(focal, abs=1e-6, rel=1e-4)
    both = segmentation_loss(logits, target, 2., 3., alpha, gamma).item()
    assert both == pytest.approx(2*dice + 3*focal, abs=1e-5, rel=1e-4)


def test_known_values():
    zero = torch.zeros(1, 1, 4, 4)                                  # every score is one half
    one = torch.ones_like(zero)
    corner = zero.clone(); corner[..., :2, :2] = 1
    assert focal_loss(zero, one).item() == pytest.approx(.65*.25*math.log(2))
    assert focal_loss(zero, zero).item() == pytest.approx(.35*.25*math.log(2))
    assert focal_loss(zero, one, alpha=.25, gamma=0).item() == pytest.approx(.25*math.log(2))
    assert dice_loss(zero, corner).item() == pytest.approx(1 - 2*2/(16/4 + 4), abs=1e-6)
    assert dice_loss(zero, one).item() == pytest.approx(1 - 2*8/(4 + 16), abs=1e-6)
    assert segmentation_loss(zero, one).item() == pytest.approx(.2 + 1.75*.65*.25*math.log(2), abs=1e-6)
    for loss in (dice_loss, focal_loss, segmentation_loss): assert loss(zero, one).shape == ()


def test_dice_is_a_mean_over_maps():
    "A small referent weighs as much as a large one; focal's mean is over pixels."
    torch.manual_seed(0)
    logits, target = torch.randn(5, 1, 4, 6), torch.rand(5, 1, 4, 6)
    assert_close(dice_loss(logits, target), torch.stack([dice_loss(x[None], t[None]) for x, t in zip(logits, target)]).mean())
    assert_close(focal_loss(logits, target), torch.stack([focal_loss(x[None], t[None]) for x, t in zip(logits, target)]).mean())
    assert_close(segmentation_loss(logits.repeat(3, 1, 1, 1), target.repeat(3, 1, 1, 1)), segmentation_loss(logits, target))


@quick
@given(arrays(np.float64, (1, 1, 3, 3), elements=st.floats(.02, .98)), arrays(np.float64, (1, 1, 3, 3), elements=st.floats(-6, 6)))
def test_the_label_is_the_only_zero(t, x):
    target, other = torch.tensor(t), torch.tensor(x)
    for loss in (dice_loss, focal_loss, segmentation_loss):
        at_label = target.logit().requires_grad_()
        value = loss(at_label, target)
        assert abs(value.item()) < 1e-9
        slope, = torch.autograd.grad(value, at_label)
        assert slope.abs().max() < 1e-6
        assert loss(other, target) >= 0
        if (other.sigmoid() - target).abs().max() > .05: assert loss(other, target) > 1e-6


def test_perfect_and_worst():
    hard = (torch.arange(12).view(1, 1, 3, 4) % 3 == 0).float()
    assert dice_loss(hard*200 - 100, hard).item() == pytest.approx(0, abs=1e-6) and dice_loss(100 - hard*200, hard).item() == pytest.approx(1, abs=1e-6)
    assert focal_loss(hard*200 - 100, hard).item() == pytest.approx(0, abs=1e-6) and focal_loss(100 - hard*200, hard).item() > 10
    nothing = torch.zeros(1, 1, 3, 4)
    assert dice_loss(torch.full_like(nothing, -1e4), nothing).item() == 0      # rightly empty


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('gamma', [0, .5, 1, 2])
def test_extreme_logits_are_finite(dtype, gamma):
    for x in (-1e4, -100., -17., 0., 17., 100., 1e4):
        for t in (0., .3, 1.):
            logits = torch.full((2, 1, 40, 40), x, dtype=dtype, requires_grad=True)
            loss = segmentation_loss(logits, torch.full((2, 1, 40, 40), t), gamma=gamma)
            loss.backward()
            assert loss.isfinite() and logits.grad.isfinite().all(), (x, t)
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            if abs(x - (1e4 if t == 1 else -1e4)) > 1.5e4 and t in (0., 1.): assert logits.grad.abs().sum() > 0   # surely wrong: still pulled


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    for target in (torch.rand(2, 1, 3, 3, dtype=torch.float64), (torch.rand(2, 1, 3, 3) > .6).double()):
        for loss in (dice_loss, focal_loss, segmentation_loss): assert torch.autograd.gradcheck(lambda x: loss(x, target), logits)


@pytest.mark.parametrize('loss', [dice_loss, focal_loss, segmentation_loss])
def test_losses_refuse_what_does_not_fit(loss):
    x = torch.zeros(2, 1, 3, 4)
    with pytest.raises(ValueError, match=r'\[2, 1, 3, 4\] and \[2, 3, 4\]'): loss(x, x[:, 0])
    with pytest.raises(ValueError, match=r'both be \[B,1,h,w\]'): loss(x[0], x[0])
    with pytest.raises(ValueError, match='0 to 255'): loss(x, torch.eye(4)[:3].expand(2, 1, 3, 4)*255)
    with pytest.raises(ValueError, match='0..1'): loss(x, x - .1)
    with pytest.raises(ValueError, match='nan'): loss(x, x/0)
    assert_close(loss(x, torch.ones(2, 1, 3, 4, dtype=torch.bool)), loss(x, x + 1))


def test_focal_refuses_bad_settings():
    x = torch.zeros(1, 1, 2, 2)
    for bad in (dict(alpha=1.1), dict(alpha=-1), dict(gamma=-.1)):
        with pytest.raises(ValueError, match='alpha should'): focal_loss(x, x, **bad)


# ---------------------------------------------------------------- sizes

def test_to_size_keeps_place_and_mean():
    m = torch.zeros(1, 1, 6, 8); m[..., 2, 5] = 1.
    big = to_size(m, (60, 80))
    assert big.shape == (1, 1, 60, 80)
    row, col = np.unravel_index(big.argmax().item(), (60, 80))
    assert 24 <= row <= 25 and 54 <= col <= 55                      # the centre of that patch
    assert big.mean().item() == pytest.approx(m.mean().item(), rel=1e-3)
    assert_close(to_size(m, (6, 8)), m)


def test_truth_at_takes_the_pixel_at_the_centre():
    t = np.random.default_rng(0).random((48, 40)) > .5
    assert np.array_equal(truth_at(t, (48, 40)), t)
    assert np.array_equal(truth_at(t, (144, 200)), t.repeat(3, 0).repeat(5, 1))
    assert np.array_equal(truth_at(t, (16, 8)), t[1::3, 2::5])
    assert truth_at(torch.tensor(t), (480, 480)).shape == (480, 480)


# ---------------------------------------------------------------- the loop

SIZES, S = [(40, 56), (48, 48), (64, 36)], 24

def things(k):
    H, W = SIZES[k]
    a, b = np.zeros((H, W), bool), np.zeros((H, W), bool)
    a[4:4 + H//3, 3:3 + W//4] = True
    b[H//2:H - 5, W//2:W - 2 - 3*k] = True
    return a, b

@pytest.fixture(scope='module')
def refer(tmp_path_factory):
    "Three pictures of different shapes, five referents, eleven expressions."
    root = tmp_path_factory.mktemp('data')
    def example(k):
        a, b = things(k)
        picture = np.full((*SIZES[k], 3), 60*k + 40, np.uint8); picture[a], picture[b] = (200, 0, 0), (0, 0, 200)
        said = [dict(sent=f'thing {k}', kind='place'), dict(sent='the red one which is over there', kind='relation')]
        return dict(picture=picture, split='val', objects=[dict(mask=a, category='cup', expressions=said if k else said + [dict(sent='red', kind='appearance')]),
                                                           dict(mask=b, category='cup', expressions=said if k < 2 else [])])
    write_refer(root, 'boxes', 'umd', [example(k) for k in range(3)])
    return Refer('boxes', root=root)

def dataset(refer, **kw):
    tokenize = lambda texts: torch.zeros(len(texts), 4, dtype=torch.long)
    return ReferDataset(refer, 'val', S, tokenize, [.5]*3, [.5]*3, **kw)

@pytest.fixture(scope='module')
def data(refer): return dataset(refer)


def test_nothing_and_everything(data):
    ones = lambda b: torch.ones(len(b.index), 1, 3, 2)
    found = evaluate(lambda b: {'nothing': 0*ones(b), 'everything': ones(b)}, data, batch_size=4)
    assert len(data.expressions) == 11 and {s.n for s in found.values()} == {11}
    truths = [data.refer.mask(e.ann_id) for e in data.expressions]
    assert found['nothing'].compute()['miou'] == found['nothing'].compute()['oiou'] == 0
    numbers = found['everything'].compute()
    assert numbers['miou'] == pytest.approx(100*np.mean([t.mean() for t in truths]))
    assert numbers['oiou'] == pytest.approx(100*sum(t.sum() for t in truths)/sum(t.size for t in truths))


@pytest.mark.parametrize('k', range(3))
def test_truth_and_shifted_truth(refer, k):
    "Maps as large as the picture need no resizing: the numbers are exact."
    mine = [e for e in refer.expressions('val') if refer.size(e.image_id) == SIZES[k]]
    data = dataset(refer, expressions=mine)
    def predict(b):
        truth = torch.stack([torch.tensor(refer.mask(mine[i].ann_id)) for i in b.index.tolist()])[:, None].float()
        return {'truth': truth, 'shifted': truth.roll(3, dims=-1)}
    found = evaluate(predict, data, batch_size=2)
    assert found['truth'].compute() == dict(miou=100, oiou=100, p50=100, p60=100, p70=100, p80=100, p90=100, n=len(mine))
    by_hand = [intersection_and_union(np.roll(refer.mask(e.ann_id), 3, axis=1), refer.mask(e.ann_id)) for e in mine]
    assert [tuple(r)[:2] for r in found['shifted'].rows] == by_hand and 0 < found['shifted'].compute()['miou'] < 100


def test_every_sentence_is_scored_once_whatever_the_batch(data):
    for size in (1, 2, 3, 4, 5, 11, 64):                            # 11 is prime: the last batch is uneven
        seen = []
        def predict(b):
            seen.extend(b.index.tolist())
            assert len(b.index) <= size and b.pixels.shape == (len(b.index), 3, S, S)
            return {'mask': b.mask}
        rows = evaluate(predict, data, batch_size=size)['mask'].rows
        assert seen == list(range(11)) and len(rows) == 11
        if size > 1: assert rows == first
        else: first = rows
    assert [(r.kind, r.length) for r in first] == [(e.kind, e.length) for e in data.expressions]
    assert {r.kind for r in first} == {'place', 'relation', 'appearance'} and {r.length for r in first} == {1, 2, 7}


def test_the_phrases_of_a_picture_come_together(refer):
    "Whatever the order of the data set: each picture is met in one stretch, and the rows are in the data set's order."
    mixed = [refer.expressions('val')[i] for i in (10, 0, 6, 3, 9, 1, 7, 2, 8, 4, 5)]
    data, seen = dataset(refer, expressions=mixed), []
    def predict(b):
        seen.extend(b.image_id.tolist()); return {'mask': b.mask}
    rows = evaluate(predict, data, batch_size=4)['mask'].rows
    assert seen == sorted(e.image_id for e in mixed) and [(r.kind, r.length) for r in rows] == [(e.kind, e.length) for e in mixed]
    in_order = evaluate(predict, dataset(refer), batch_size=4)['mask'].rows
    assert rows == [in_order[i] for i in (10, 0, 6, 3, 9, 1, 7, 2, 8, 4, 5)]


def test_each_expression_meets_its_own_mask(data):
    "One map differs from row to row; only its own truth fits."
    found = evaluate(lambda b: {'mask': b.mask}, data, batch_size=3)['mask']
    assert found.compute()['miou'] > 85
    wrong = evaluate(lambda b: {'mask': b.mask.roll(1, dims=0)}, data, batch_size=11)['mask']
    assert wrong.compute()['miou'] < 75


def test_thresholds_take_the_value_itself(data):
    flat = lambda value, dtype=torch.float32: lambda b: {'m': torch.full((len(b.index), 1, 19, 4), value, dtype=dtype)}
    everything = evaluate(flat(1.), data)['m'].rows
    for value in (.35, .5, .1, 0., -2.5):
        for dtype in (torch.float32, torch.float64):
            assert evaluate(flat(value, dtype), data, thresholds=value)['m'].rows == everything
    assert evaluate(flat(.499), data)['m'].compute()['miou'] == 0
    assert evaluate(flat(.5, torch.bfloat16), data)['m'].rows == everything


def test_half_precision_maps_are_scored_in_full(data):
    torch.manual_seed(0)
    maps = torch.rand(11, 1, 5, 7).bfloat16()
    half, full = (evaluate(lambda b: {'m': m[b.index]}, data, thresholds=.35)['m'].rows for m in (maps, maps.float()))
    assert half == full


def test_a_threshold_for_each_name(data):
    predict = lambda b: {'low': torch.full((len(b.index), 1, 2, 2), .4), 'high': torch.full((len(b.index), 1, 2, 2), .4)}
    found = evaluate(predict, data, thresholds={'low': .3, 'high': .5, 'unused': .1})
    assert list(found) == ['low', 'high'] and found['high'].compute()['miou'] == 0 < found['low'].compute()['miou']
    with pytest.raises(ValueError, match=r"no threshold for 'high', only for \['low'\]"): evaluate(predict, data, thresholds={'low': .3})


def test_protocols_against_a_second_implementation(data):
    torch.manual_seed(0)
    maps = torch.rand(11, 1, 6, 5)
    predict = lambda b: {'m': maps[b.index]}
    from PIL import Image
    for protocol in ('own', 'lavt'):
        ious = []
        for m, e in zip(maps, data.expressions):
            truth = data.refer.mask(e.ann_id)
            H, W = truth.shape if protocol == 'own' else (480, 480)
            truth = np.asarray(Image.fromarray(truth.astype(np.uint8)).resize((W, H), Image.NEAREST)) > 0
            y, x = (np.clip((np.arange(n) + .5)*k/n - .5, 0, k - 1) for n, k in ((H, 6), (W, 5)))     # bilinear, by hand
            grid = m[0].double().numpy()
            rows = np.stack([np.interp(y, np.arange(6), grid[:, j]) for j in range(5)], 1)            # [H, 5]
            big = np.stack([np.interp(x, np.arange(5), r) for r in rows])                             # [H, W]
            ious.append(((big >= .5) & truth).sum()/((big >= .5) | truth).sum())
        assert evaluate(predict, data, 4, protocol=protocol)['m'].compute()['miou'] == pytest.approx(100*np.mean(ious), abs=.05)
    own, lavt = (evaluate(predict, data, 4, protocol=p)['m'].compute()['oiou'] for p in ('own', 'lavt'))
    assert own != pytest.approx(lavt, abs=1e-3)


def test_leaves_no_trace(data, refer):
    "Neither in the random stream nor in the graph."
    weight = torch.nn.Parameter(torch.ones(()))
    before = torch.get_rng_state()
    def predict(b):
        maps = b.mask*weight
        assert not maps.requires_grad
        return {'m': maps}
    evaluate(predict, data)
    assert torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled()


def test_workers_change_nothing(refer):
    "Worker processes need a data set that can be sent to them."
    data = dataset(refer)
    assert evaluate(lambda b: {'m': b.mask}, data, 4, workers=1)['m'].rows == evaluate(lambda b: {'m': b.mask}, data, 4)['m'].rows


def test_evaluate_refuses(data, refer):
    def bad(predict, words, data=data, **kw):
        with pytest.raises(ValueError, match=words): evaluate(predict, data, **kw)
    good = lambda b: {'m': b.mask}
    bad(good, 'train=False', data=dataset(refer, train=True))
    bad(good, 'no expression', data=dataset(refer, expressions=[]))
    bad(good, "'own' or 'lavt'", protocol='480')
    bad(lambda b: {'m': b.mask[:, 0]}, r"'m' as \[11, 24, 24\], wanted \[11, 1, h, w\]")
    bad(lambda b: {'m': b.mask[:1]}, r"'m' as \[1, 1, 24, 24\]")
    bad(lambda b: {'m': b.mask/0}, "NaN in 'm'")
    bad(lambda b: {'m': b.mask} | ({'n': b.mask} if b.index[0] == 0 else {}), "of 11 expressions only some have a map: {'n': 4}", batch_size=4)
