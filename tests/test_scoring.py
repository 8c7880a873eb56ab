"""SegmentationMetrics against torchmetrics and pycocotools, the threshold where it was planted, and
the evaluation loop on a data set with known scores."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask
from torch.testing import assert_close
from torchmetrics.classification import BinaryJaccardIndex
from torchmetrics.segmentation import MeanIoU

from risclip.dataset import ReferDataset
from risclip.refer import Refer
from risclip.scoring import (ScoredMask, SegmentationMetrics, choose_threshold, evaluate,
                             intersection_and_union, miou_at, truth_at)
from risclip.writer import write_refer

quick = settings(max_examples=60, deadline=None)
masks = arrays(bool, (7, 5))
pairs = st.lists(st.tuples(masks, masks), min_size=1, max_size=8)


def mask(text):
    "A bool mask from rows of '.' and '#'."
    return np.array([[c == '#' for c in row] for row in text.split()])


def scored(examples, **kw):
    "SegmentationMetrics of pairs (prediction, truth)."
    scores = SegmentationMetrics(**kw)
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
    # no numpy numbers: sums never overflow
    assert all(type(n) is int for n in intersection_and_union(p, t))


def test_numbers_by_hand():
    s = scored([(mask(p), mask('##..')) for p in ('##..', '#...', '..##')])
    assert s.n == 3 and [r.iou for r in s.rows] == [1, .5, 0]
    numbers = s.compute()
    assert numbers['n'] == 3
    assert list(numbers) == ['miou', 'oiou', 'p50', 'p60', 'p70', 'p80', 'p90', 'n']
    assert numbers['miou'] == pytest.approx(50) and numbers['oiou'] == pytest.approx(100*3/8)
    assert numbers['p50'] == pytest.approx(200/3)
    assert numbers['p60'] == numbers['p90'] == pytest.approx(100/3)
    # goes into a JSON file as it is
    assert all(type(v) is float for k, v in numbers.items() if k != 'n')


def test_empty_union_counts_zero():
    nothing = np.zeros((3, 4), bool)
    s = scored([(nothing, nothing)])
    assert s.compute() == dict(miou=0, oiou=0, p50=0, p60=0, p70=0, p80=0, p90=0, n=1)
    s.add(~nothing, ~nothing)
    numbers = s.compute()
    assert (numbers['miou'], numbers['oiou'], numbers['p90']) == (50, 100, 50)


@pytest.mark.parametrize('k', range(5, 10))
def test_precision_takes_the_threshold_itself(k):
    exactly = SegmentationMetrics(rows=[(k, 10)])
    below = SegmentationMetrics(rows=[(k*10**9 - 1, 10**10)])
    assert exactly.compute()[f'p{10*k}'] == 100 and below.compute()[f'p{10*k}'] == 0
    perfect = SegmentationMetrics(thresholds=(1.,), rows=[(3, 3), (2, 3)])
    assert perfect.compute()['p100'] == 50


def test_threshold_names():
    numbers = SegmentationMetrics(thresholds=(.55, .625), rows=[(1, 1)]).compute()
    assert list(numbers) == ['miou', 'oiou', 'p55', 'p62.5', 'n']


@pytest.mark.parametrize('p, t, words', [
    (np.zeros((2, 3)), np.zeros((2, 3), bool), 'prediction should be a bool mask'),
    (np.zeros((2, 3), bool), np.zeros((2, 3), np.uint8), 'truth should be a bool mask'),
    (np.zeros((1, 2, 3), bool), np.zeros((1, 2, 3), bool), 'leading axes'),
    (np.zeros((2, 3), bool), np.zeros((1, 3), bool), 'resize the map'),
    (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), 'float32')])
def test_refuses_what_is_no_mask(p, t, words):
    with pytest.raises(ValueError, match=words): SegmentationMetrics().add(p, t)


def test_refuses_bad_settings():
    metrics = SegmentationMetrics
    with pytest.raises(ValueError, match='no expression'): metrics().compute()
    for bad in (50, 0.):
        with pytest.raises(ValueError, match='at most 1'): metrics(thresholds=(bad,))
    with pytest.raises(ValueError, match='differ'): metrics().merge(metrics(thresholds=(.5,)))
    for edges in ((3, 1), (1, 1), ()):
        with pytest.raises(ValueError, match='rise'): metrics(rows=[(1, 1)]).by_length(edges)


# ---------------------------------------------------------------- against other libraries

@quick
@given(masks, masks)
def test_iou_is_pycocotools(p, t):
    rle = [coco_mask.encode(np.asfortranarray(m, np.uint8)) for m in (p, t)]
    i, u = intersection_and_union(p, t)
    assert i == coco_mask.area(coco_mask.merge(rle, intersect=True))
    assert u == coco_mask.area(coco_mask.merge(rle))
    if u: assert ScoredMask(i, u).iou == pytest.approx(coco_mask.iou(rle[:1], rle[1:], [0])[0, 0])


@quick
@given(pairs)
def test_miou_and_oiou_are_torchmetrics(examples):
    # an empty union is defined otherwise there
    examples = [(p, t) for p, t in examples if (p | t).any()] or [(np.ones((7, 5), bool),)*2]
    p, t = (torch.tensor(np.stack(m)).long() for m in zip(*examples))
    numbers = scored(examples).compute()
    mean = MeanIoU(num_classes=2, include_background=False, input_format='index')
    assert numbers['miou'] == pytest.approx(100*mean(p, t).item(), abs=1e-3)
    one_matrix = BinaryJaccardIndex()(p, t).item()                    # of all pixels
    assert numbers['oiou'] == pytest.approx(100*one_matrix, abs=1e-3)


# ---------------------------------------------------------------- properties of the scores

@quick
@given(masks, masks)
def test_iou_properties(p, t):
    def iou(a, b): return ScoredMask(*intersection_and_union(a, b)).iou
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
    # rows travel as plain tuples
    again = SegmentationMetrics(whole.thresholds, [tuple(r) for r in whole.rows])
    assert again.compute() == whole.compute()


@quick
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(9, 30),
                          st.sampled_from(['place', 'relation', 'all']),
                          st.none() | st.integers(1, 20)), min_size=1, max_size=20))
def test_groups_add_up(rows):
    s = SegmentationMetrics(rows=rows)
    numbers = s.compute()
    precisions = [numbers[f'p{x}'] for x in (50, 60, 70, 80, 90)]
    assert precisions == sorted(precisions, reverse=True)
    for groups in (s.by_kind(), s.by_length(), s.by_length(edges=(4, 5, 9))):
        assert sum(g['n'] for g in groups.values()) == s.n
        for name in ('miou', 'p50', 'p90'):
            assert sum(g['n']*g[name] for g in groups.values())/s.n == pytest.approx(numbers[name])


def test_length_bins():
    lengths = (1, 2, 3, 4, 5, 7, 8, 11, 12, 40)
    s = SegmentationMetrics(rows=[(1, 1, 'all', n) for n in lengths] + [(0, 1)])
    def counts(**kw): return {name: group['n'] for name, group in s.by_length(**kw).items()}
    assert counts() == {'1-2': 2, '3-4': 2, '5-7': 2, '8-11': 2, '12+': 2, 'unknown': 1}
    assert counts(edges=(2, 3, 12)) == {'under 2': 1, '2': 1, '3-11': 6, '12+': 2, 'unknown': 1}
    kinds = SegmentationMetrics(rows=[(1, 1, 'b'), (1, 1, 'a'), (1, 1, 'b')]).by_kind()
    assert list(kinds) == ['b', 'a']


# ---------------------------------------------------------------- the threshold

def mious(maps, masks, thresholds):
    "mIoU in 0..1 at each threshold, mask by mask."
    found = []
    for threshold in thresholds:
        scores = scored(zip(maps[:, 0] >= threshold, masks[:, 0]))
        found.append(scores.compute()['miou']/100)
    return torch.tensor(found, dtype=torch.float64)


@quick
@given(st.integers(1, 130), st.integers(0, 99))
def test_miou_at_is_the_loop(n, seed):
    "130 maps go through in three parts; thresholds that are values of the map test the >=."
    g = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, 5, (n, 1, 4, 5), generator=g)/4
    masks = torch.rand(n, 1, 4, 5, generator=g) > .6
    thresholds = torch.tensor([-1., 0, .1, .25, .5, .5, .75, 1, 1.01])
    assert_close(miou_at(maps, masks, thresholds), mious(maps, masks, thresholds))


def test_miou_at_resizes_as_the_evaluation_does():
    maps, masks = torch.rand(9, 1, 3, 3), torch.rand(9, 1, 13, 11) > .5
    thresholds = torch.linspace(0, 1, 21)
    large = F.interpolate(maps, (13, 11), mode='bilinear')
    assert_close(miou_at(maps, masks, thresholds), mious(large, masks, thresholds))


@pytest.mark.parametrize('planted', [-.37, .123, .9])
def test_a_planted_threshold_is_found(planted):
    g = torch.Generator().manual_seed(1)
    masks = torch.rand(40, 1, 6, 6, generator=g) > .8
    above = planted + .001 + torch.rand(40, 1, 6, 6, generator=g)
    below = planted - torch.rand(40, 1, 6, 6, generator=g)
    maps = torch.where(masks, above, below)
    t, score = choose_threshold(maps, masks, torch.linspace(-2, 2, 4001))
    assert t == pytest.approx(planted, abs=.0025) and score > 99
    t, score = choose_threshold(maps, masks)                           # the maps' own quantiles
    assert abs(t - planted) < .1 and score > 90
    t, _ = choose_threshold(maps, masks, [9., planted + .0005, -9.])   # in any order
    assert t == pytest.approx(planted + .0005)


def test_the_chosen_threshold_is_never_worse_than_everything():
    masks = torch.rand(30, 1, 8, 8) > .1
    everything = mious(torch.ones_like(masks), masks, [1])
    assert choose_threshold(torch.rand(30, 1, 4, 4), masks)[1] >= 100*everything.item() - 1e-6


def test_choose_threshold_refuses():
    maps, masks = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 8, 8) > .5
    for bad_maps, bad_masks in ((maps, masks.float()), (maps[:2], masks), (maps, masks[:, 0]),
                                (maps[:0], masks[:0])):
        with pytest.raises(ValueError, match='wanted'): choose_threshold(bad_maps, bad_masks)
    with pytest.raises(ValueError, match='NaN'): choose_threshold(maps*math.nan, masks)


# ---------------------------------------------------------------- sizes

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
        picture = np.full((*SIZES[k], 3), 60*k + 40, np.uint8)
        picture[a], picture[b] = (200, 0, 0), (0, 0, 200)
        said = [dict(sent=f'thing {k}', kind='place'),
                dict(sent='the red one which is over there', kind='relation')]
        red = [] if k else [dict(sent='red', kind='appearance')]
        objects = [dict(mask=a, category='cup', expressions=said + red),
                   dict(mask=b, category='cup', expressions=said if k < 2 else [])]
        return dict(picture=picture, split='val', objects=objects)
    write_refer(root, 'boxes', 'umd', [example(k) for k in range(3)])
    return Refer('boxes', root=root)

def tokenize(texts): return torch.zeros(len(texts), 4, dtype=torch.long)

def dataset(refer, **kw):
    clip = SimpleNamespace(size=S, tokenize=tokenize, mean=[.5]*3, std=[.5]*3)
    return ReferDataset(refer, 'val', clip, **kw)

@pytest.fixture(scope='module')
def data(refer): return dataset(refer)


def truth_of(batch): return {'m': batch.mask}


def constant(value, dtype=torch.float32):
    "A predict that answers every phrase with one number."
    return lambda batch: {'m': torch.full((len(batch.index), 1, 19, 4), value, dtype=dtype)}


def test_nothing_and_everything(data):
    def predict(batch):
        ones = torch.ones(len(batch.index), 1, 3, 2)
        return {'nothing': 0*ones, 'everything': ones}
    found = evaluate(predict, data, batch_size=4)
    assert len(data.expressions) == 11 and {s.n for s in found.values()} == {11}
    truths = [data.refer.mask(e.ann_id) for e in data.expressions]
    nothing, numbers = found['nothing'].compute(), found['everything'].compute()
    assert nothing['miou'] == nothing['oiou'] == 0
    assert numbers['miou'] == pytest.approx(100*np.mean([t.mean() for t in truths]))
    pixels = sum(t.size for t in truths)
    assert numbers['oiou'] == pytest.approx(100*sum(t.sum() for t in truths)/pixels)


@pytest.mark.parametrize('k', range(3))
def test_truth_and_shifted_truth(refer, k):
    "Maps as large as the picture need no resizing: the numbers are exact."
    chosen = [e for e in refer.expressions('val') if refer.size(e.image_id) == SIZES[k]]
    def predict(batch):
        truth = [torch.tensor(refer.mask(chosen[i].ann_id)) for i in batch.index.tolist()]
        truth = torch.stack(truth)[:, None].float()
        return {'truth': truth, 'shifted': truth.roll(3, dims=-1)}
    found = evaluate(predict, dataset(refer, expressions=chosen), batch_size=2)
    perfect = dict(miou=100, oiou=100, p50=100, p60=100, p70=100, p80=100, p90=100)
    assert found['truth'].compute() == dict(perfect, n=len(chosen))
    truths = [refer.mask(e.ann_id) for e in chosen]
    by_hand = [intersection_and_union(np.roll(t, 3, axis=1), t) for t in truths]
    assert [tuple(r)[:2] for r in found['shifted'].rows] == by_hand
    assert 0 < found['shifted'].compute()['miou'] < 100


def test_every_sentence_is_scored_once_whatever_the_batch(data):
    every = []
    for size in (1, 2, 3, 4, 5, 11, 64):                  # 11 is prime: the last batch is uneven
        asked = []
        def predict(batch):
            asked.extend(batch.index.tolist())
            assert len(batch.index) <= size
            assert batch.pixels.shape == (len(batch.index), 3, S, S)
            return truth_of(batch)
        every.append(evaluate(predict, data, batch_size=size)['m'].rows)
        assert asked == list(range(11)) and len(every[-1]) == 11
    first = every[0]
    assert all(rows == first for rows in every)
    assert [(r.kind, r.length) for r in first] == [(e.kind, e.length) for e in data.expressions]
    assert {r.kind for r in first} == {'place', 'relation', 'appearance'}
    assert {r.length for r in first} == {1, 2, 7}


def test_the_phrases_of_a_picture_come_together(refer):
    "Each picture is met in one stretch, and the rows are in the data set's order."
    order = (10, 0, 6, 3, 9, 1, 7, 2, 8, 4, 5)
    mixed, asked = [refer.expressions('val')[i] for i in order], []
    def predict(batch):
        asked.extend(batch.image_id.tolist())
        return truth_of(batch)
    rows = evaluate(predict, dataset(refer, expressions=mixed), batch_size=4)['m'].rows
    assert asked == sorted(e.image_id for e in mixed)
    assert [(r.kind, r.length) for r in rows] == [(e.kind, e.length) for e in mixed]
    in_order = evaluate(predict, dataset(refer), batch_size=4)['m'].rows
    assert rows == [in_order[i] for i in order]


def test_each_expression_meets_its_own_mask(data):
    "One map differs from row to row; only its own truth fits."
    right = evaluate(truth_of, data, batch_size=3)['m']
    assert right.compute()['miou'] > 85
    wrong = evaluate(lambda batch: {'m': batch.mask.roll(1, dims=0)}, data, batch_size=11)['m']
    assert wrong.compute()['miou'] < 75


def test_on_map_gets_what_is_scored(data):
    "Each map once, less its threshold, at the size of the truth: what is not below 0 is predicted."
    maps = {}
    def keep(name, above, e): maps[name, e.sent_id] = above
    def predict(batch): return {'m': batch.mask, 'half': .5*batch.mask}
    found = evaluate(predict, data, 4, thresholds={'m': .5, 'half': .3}, on_map=keep)
    assert len(maps) == 22
    for name, scores in found.items():
        for e, row in zip(data.expressions, scores.rows):
            counts = intersection_and_union(maps[name, e.sent_id] >= 0, data.refer.mask(e.ann_id))
            assert counts == tuple(row)[:2]


def test_thresholds_take_the_value_itself(data):
    everything = evaluate(constant(1.), data)['m'].rows
    for value in (.35, .5, .1, 0., -2.5):
        for dtype in (torch.float32, torch.float64):
            found = evaluate(constant(value, dtype), data, thresholds=value)
            assert found['m'].rows == everything
    assert evaluate(constant(.499), data)['m'].compute()['miou'] == 0
    assert evaluate(constant(.5, torch.bfloat16), data)['m'].rows == everything


def test_half_precision_maps_are_scored_in_full(data):
    torch.manual_seed(0)
    maps = torch.rand(11, 1, 5, 7).bfloat16()
    half, full = (evaluate(lambda batch: {'m': m[batch.index]}, data, thresholds=.35)['m'].rows
                  for m in (maps, maps.float()))
    assert half == full


def test_a_threshold_for_each_name(data):
    def predict(batch):
        maps = torch.full((len(batch.index), 1, 2, 2), .4)
        return {'low': maps, 'high': maps}
    found = evaluate(predict, data, thresholds={'low': .3, 'high': .5, 'unused': .1})
    assert list(found) == ['low', 'high']
    assert found['high'].compute()['miou'] == 0 < found['low'].compute()['miou']
    with pytest.raises(ValueError, match=r"no threshold for 'high', only for \['low'\]"):
        evaluate(predict, data, thresholds={'low': .3})


def bilinear(grid, H, W):
    "A map [h, w] at another size, by numpy."
    h, w = grid.shape
    y, x = (np.clip((np.arange(n) + .5)*k/n - .5, 0, k - 1) for n, k in ((H, h), (W, w)))
    rows = np.stack([np.interp(y, np.arange(h), grid[:, j]) for j in range(w)], 1)   # [H, w]
    return np.stack([np.interp(x, np.arange(w), r) for r in rows])                   # [H, W]


def test_protocols_against_a_second_implementation(data):
    torch.manual_seed(0)
    maps = torch.rand(11, 1, 6, 5)
    def predict(batch): return {'m': maps[batch.index]}
    numbers = {}
    for protocol in ('own', 'lavt'):
        ious = []
        for m, e in zip(maps, data.expressions):
            truth = data.refer.mask(e.ann_id)
            H, W = truth.shape if protocol == 'own' else (480, 480)
            small = Image.fromarray(truth.astype(np.uint8))
            truth = np.asarray(small.resize((W, H), Image.Resampling.NEAREST)) > 0
            predicted = bilinear(m[0].double().numpy(), H, W) >= .5
            ious.append((predicted & truth).sum()/(predicted | truth).sum())
        numbers[protocol] = evaluate(predict, data, 4, protocol=protocol)['m'].compute()
        assert numbers[protocol]['miou'] == pytest.approx(100*np.mean(ious), abs=.05)
    assert numbers['own']['oiou'] != pytest.approx(numbers['lavt']['oiou'], abs=1e-3)


def test_leaves_no_trace(data):
    "Neither in the random stream nor in the graph."
    weight = torch.nn.Parameter(torch.ones(()))
    before = torch.get_rng_state()
    def predict(batch):
        maps = batch.mask*weight
        assert not maps.requires_grad
        return {'m': maps}
    evaluate(predict, data)
    assert torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled()


def test_workers_change_nothing(refer):
    "Worker processes need a data set that can be sent to them."
    data = dataset(refer)
    worker, none = (evaluate(truth_of, data, 4, workers=n)['m'].rows for n in (1, 0))
    assert worker == none


def test_evaluate_refuses(data, refer):
    def bad(predict, words, data=data, **kw):
        with pytest.raises(ValueError, match=words): evaluate(predict, data, **kw)
    def sometimes(batch):
        return truth_of(batch) | ({'n': batch.mask} if batch.index[0] == 0 else {})
    bad(truth_of, 'train=False', data=dataset(refer, train=True))
    bad(truth_of, 'no expression', data=dataset(refer, expressions=[]))
    bad(truth_of, "'own' or 'lavt'", protocol='480')
    bad(lambda batch: {'m': batch.mask[:, 0]}, r"'m' as \[11, 24, 24\], wanted \[11, 1, h, w\]")
    bad(lambda batch: {'m': batch.mask[:1]}, r"'m' as \[1, 1, 24, 24\]")
    bad(lambda batch: {'m': batch.mask/0}, "NaN in 'm'")
    bad(sometimes, "of 11 expressions only some have a map: {'n': 4}", batch_size=4)
