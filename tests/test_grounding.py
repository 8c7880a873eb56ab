"""Raw CLIP: the map against a loop, each reading against its own words, the threshold where it was planted, the baselines by hand,
and on RefMoji's test split what the chapter claims: more than chance, more than what knows nothing."""
import math
from functools import cache

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from risclip.clip import CLIPTowers, load_clip
from risclip.grounding import (Calibration, all_things, attended, centred_box, choose_threshold, cosine_map, everything, highest_patch,
                               mean_iou, miou_at, patch_ceiling, points_at, random_thing, raw_grounding, raw_patches)
from risclip.refer import Refer, ReferDataset, resize_mask, write_refer
from risclip.refmoji import refmoji_folder
from risclip.scoring import Scores, to_size

quick = settings(max_examples=40, deadline=None)


@pytest.fixture(scope='module')
def small():
    "A CLIP of random weights, two pictures, two phrases."
    torch.manual_seed(0)
    cfg = dict(embed_dim=24, vision_cfg=dict(image_size=32, patch_size=8, width=32, layers=3, head_width=16),
               text_cfg=dict(context_length=16, vocab_size=49408, width=24, heads=2, layers=2))
    model = open_clip.CLIP(**cfg)
    for p in model.parameters():
        if p.ndim == 1: p.data += .1*torch.randn_like(p)      # biases start at 0: a walk that forgets one would not show
    model.visual.preprocess_cfg = dict(mean=(0., 0., 0.), std=(1., 1., 1.))
    clip = CLIPTowers(model, open_clip.SimpleTokenizer(context_length=16), 'small')
    return clip, torch.randn(2, 3, 32, 32), clip.tokenize(['a dog', 'the red umbrella on the left'])


# ---------------------------------------------------------------- the map

@quick
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_cosine_map_is_the_loop(B, h, w, E, seed):
    g = torch.Generator().manual_seed(seed)
    patches, sentence = torch.randn(B, h*w, E, generator=g), torch.randn(B, E, generator=g)
    found = cosine_map(patches, sentence, (h, w))
    assert found.shape == (B, 1, h, w)
    for b in range(B):
        for r in range(h):
            for c in range(w):
                p, s = patches[b, r*w + c].double(), sentence[b].double()
                assert found[b, 0, r, c].item() == pytest.approx((p @ s/(p.norm()*s.norm())).item(), abs=1e-5)


def test_cosine_map_takes_one_sentence_for_many_and_many_for_one():
    patches, sentences = torch.randn(1, 6, 4), torch.randn(5, 4)
    found = cosine_map(patches.expand(5, -1, -1), sentences, (2, 3))
    for m, s in zip(found, sentences): assert_close(m[None], cosine_map(patches, s[None], (2, 3)))


def test_cosine_map_keeps_the_gradient_and_survives_zeros():
    patches = torch.randn(1, 6, 4, requires_grad=True)
    cosine_map(patches, torch.randn(1, 4), (2, 3)).sum().backward()
    assert patches.grad.abs().sum() > 0
    assert not cosine_map(torch.zeros(1, 6, 4), torch.zeros(1, 4), (2, 3)).isnan().any()


@pytest.mark.parametrize('shape', [(2, 7, 4), (2, 5, 4), (6, 4)])
def test_cosine_map_refuses_what_does_not_fill_the_grid(shape):
    with pytest.raises(ValueError, match=r'wanted \[B, 6, E\].*CLS'): cosine_map(torch.randn(*shape), torch.randn(2, 4), (2, 3))


# ---------------------------------------------------------------- the readings

def reading(clip, pixels, own, residual, mlp):
    "Patches after a walk in which the blocks `own` use values, over open_clip's own attention: alone in its sequence, a token keeps its value."
    v, blocks = clip.image.embed(pixels), [b.resblock for b in clip.image.blocks]
    for i, b in enumerate(blocks):
        u, last = b.ln_1(v), i == len(blocks) - 1
        if i in own:
            alone = u.flatten(0, 1)[:, None]                                     # [B*N, 1, D]
            delta = b.attn(alone, alone, alone, need_weights=False)[0].view_as(u)
        else: delta = b.attn(u, u, u, need_weights=False)[0]
        v = v + delta if residual or not last else delta
        if mlp or not last: v = v + b.mlp(b.ln_2(v))
    return clip.image.project(v)[:, 1:]


@pytest.mark.parametrize('values, own', [('none', ()), ('last', (2,)), ('every', (0, 1, 2))])
@pytest.mark.parametrize('residual', [True, False])
@pytest.mark.parametrize('mlp', [True, False])
def test_each_reading_against_open_clips_attention(small, values, own, residual, mlp):
    clip, pixels, tokens = small
    with torch.no_grad(): wanted = reading(clip, pixels, own, residual, mlp)
    found = raw_patches(clip, pixels, values, residual, mlp)
    assert found.shape == (2, 16, 24)
    assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert_close(raw_grounding(clip, pixels, tokens, values, residual, mlp), cosine_map(wanted, clip.encode_text(tokens), (4, 4)), atol=1e-5, rtol=1e-4)


def test_readings_differ(small):
    clip, pixels, tokens = small
    maps = [raw_grounding(clip, pixels, tokens, v, r, m) for v in ('none', 'last', 'every') for r in (True, False) for m in (True, False)]
    for i, a in enumerate(maps):
        for b in maps[:i]: assert (a - b).abs().max() > 1e-3


def test_without_any_choice_it_is_open_clip(small):
    clip, pixels, _ = small
    assert torch.equal(raw_patches(clip, pixels, 'none', True, True), clip.image(pixels)[:, 1:])


def test_the_default_is_values_in_the_last_block_alone(small):
    clip, pixels, tokens = small
    assert torch.equal(raw_grounding(clip, pixels, tokens), raw_grounding(clip, pixels, tokens, values='last', residual=False, mlp=False))


def test_attended(small):
    clip, pixels, _ = small
    v, block = clip.image.embed(pixels), clip.image.blocks[1]
    for values, number, own in [('none', 2, False), ('last', 2, True), ('last', 1, False), ('last', 0, False), ('every', 0, True), ('every', 2, True)]:
        wanted = block.values(v) if own else block.attend(v)
        assert torch.equal(attended(block, v, number, 3, values), wanted), (values, number)
    with pytest.raises(ValueError, match="values='first'.*none, last, every"): attended(block, v, 0, 3, 'first')


def test_with_values_in_every_block_no_patch_sees_another(small):
    clip, pixels, tokens = small
    changed = pixels.clone(); changed[:, :, 8:16, 24:32] += 1                     # row 1, column 3
    for values, alone in (('every', True), ('last', False)):
        places = (raw_grounding(clip, pixels, tokens, values) - raw_grounding(clip, changed, tokens, values)).abs()[:, 0] > 1e-6
        assert places[:, 1, 3].all()
        assert (places.sum() == 2) if alone else (places.sum() > 20)


def test_nothing_takes_a_gradient(small):
    clip, pixels, tokens = small
    assert not raw_grounding(clip, pixels.clone().requires_grad_(), tokens).requires_grad


def test_padding_changes_nothing(small):
    clip, pixels, tokens = small
    assert_close(raw_grounding(clip, pixels, tokens), raw_grounding(clip, pixels, tokens[:, :10]), atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- scale and bias

def test_calibration():
    c = Calibration()
    x = torch.linspace(-1, 1, 5).view(1, 1, 1, 5)
    assert_close(c(x), math.exp(2.7)*x - 1.5)
    assert_close(Calibration(scale=4., bias=.5)(x), 4*x + .5)
    assert sum(p.numel() for p in c.parameters()) == 2
    c(x).square().sum().backward()
    assert all(p.grad.abs() > 0 for p in c.parameters())
    for scale in (0, -1, math.nan):
        with pytest.raises(ValueError, match='scale'): Calibration(scale)


# ---------------------------------------------------------------- the threshold

def test_mean_iou_is_that_of_the_scores():
    g = np.random.default_rng(0)
    p, t = g.random((6, 5, 7)) > .5, g.random((6, 5, 7)) > .6
    p[0] = t[0] = False
    s = Scores()
    for a, b in zip(p, t): s.add(a, b)
    assert 100*mean_iou(torch.tensor(p), torch.tensor(t)) == pytest.approx(s.compute()['miou'])


@quick
@given(st.integers(1, 130), st.integers(0, 99))
def test_miou_at_is_the_loop(n, seed):
    "130 maps go through in three parts; thresholds that are values of the map itself test the >=."
    g = torch.Generator().manual_seed(seed)
    maps, masks = torch.randint(0, 5, (n, 1, 4, 5), generator=g)/4, torch.rand(n, 1, 4, 5, generator=g) > .6
    thresholds = torch.tensor([-1., 0, .1, .25, .5, .5, .75, 1, 1.01])
    assert_close(miou_at(maps, masks, thresholds), torch.tensor([mean_iou(maps[:, 0] >= t, masks[:, 0]) for t in thresholds], dtype=torch.float64))


def test_miou_at_resizes_as_the_evaluation_does():
    maps, masks = torch.rand(9, 1, 3, 3), torch.rand(9, 1, 13, 11) > .5
    thresholds = torch.linspace(0, 1, 21)
    large = to_size(maps, (13, 11))[:, 0]
    assert_close(miou_at(maps, masks, thresholds), torch.tensor([mean_iou(large >= t, masks[:, 0]) for t in thresholds], dtype=torch.float64))


@pytest.mark.parametrize('planted', [-.37, .123, .9])
def test_a_planted_threshold_is_found(planted):
    g = torch.Generator().manual_seed(1)
    masks = torch.rand(40, 1, 6, 6, generator=g) > .8
    maps = torch.where(masks, planted + .001 + torch.rand(40, 1, 6, 6, generator=g), planted - torch.rand(40, 1, 6, 6, generator=g))
    t, score = choose_threshold(maps, masks, torch.linspace(-2, 2, 4001))
    assert t == pytest.approx(planted, abs=.0025) and score > 99
    t, score = choose_threshold(maps, masks)                                          # the maps' own quantiles
    assert abs(t - planted) < .1 and score > 90
    assert choose_threshold(maps, masks, [9., planted + .0005, -9.])[0] == pytest.approx(planted + .0005)    # in any order


def test_the_chosen_threshold_is_never_worse_than_everything():
    masks = torch.rand(30, 1, 8, 8) > .1
    assert choose_threshold(torch.rand(30, 1, 4, 4), masks)[1] >= 100*mean_iou(torch.ones_like(masks)[:, 0], masks[:, 0]) - 1e-6


def test_choose_threshold_refuses():
    maps, masks = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 8, 8) > .5
    for bad_maps, bad_masks in ((maps, masks.float()), (maps[:2], masks), (maps, masks[:, 0]), (maps[:0], masks[:0])):
        with pytest.raises(ValueError, match='wanted'): choose_threshold(bad_maps, bad_masks)
    with pytest.raises(ValueError, match='NaN'): choose_threshold(maps*math.nan, masks)


# ---------------------------------------------------------------- pointing

def test_the_highest_patch():
    maps = torch.zeros(3, 1, 2, 4)
    maps[0, 0, 0, 0] = maps[1, 0, 1, 3] = 1; maps[2] -= 5; maps[2, 0, 0, 2] = -4
    assert_close(highest_patch(maps), torch.tensor([[.25, .125], [.75, .875], [.25, .625]]))


@quick
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.data())
def test_a_point_lies_on_the_patch_it_came_from(h, w, k, data):
    r, c = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    maps, mask = torch.zeros(1, 1, h, w), np.zeros((h*k, w*k), bool)
    maps[0, 0, r, c] = 1
    mask[r*k:(r + 1)*k, c*k:(c + 1)*k] = True
    point = highest_patch(maps)[0]
    assert points_at(point, mask) and not points_at(point, ~mask)


def test_points_at_the_border():
    mask = np.zeros((3, 4), bool); mask[2, 3] = True
    assert points_at((1., 1.), mask) and points_at((.999, .76), mask) and not points_at((0., 0.), mask) and not points_at((.5, .9), mask)


# ---------------------------------------------------------------- what knows nothing, what knows too much

def test_boxes_by_hand():
    assert everything((2, 3)).all() and everything((2, 3)).shape == (2, 3) and everything((2, 3)).dtype == bool
    box = np.zeros((4, 8), bool); box[1:3, 2:6] = True
    assert np.array_equal(centred_box((4, 8), .25), box)
    assert np.array_equal(centred_box((4, 8), 1), everything((4, 8)))
    for share in (.1, .3, .7):
        box = centred_box((100, 140), share)
        assert box.mean() == pytest.approx(share, abs=.02) and np.array_equal(box, box[::-1, ::-1])
    for share in (0, -1, 1.1):
        with pytest.raises(ValueError, match='share'): centred_box((4, 8), share)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "One picture of 4 x 8 with three things, two of which overlap; one is spoken of ten times."
    masks = np.zeros((3, 4, 8), bool)
    masks[0, :2, :2] = masks[1, :4, 4:] = masks[2, 3, 3:6] = True
    objects = [dict(mask=m, category='dog', expressions=[f'dog {i}' for i in range(10)] if k == 1 else []) for k, m in enumerate(masks)]
    root = tmp_path_factory.mktemp('made')
    write_refer(root, 'mine', 'unc', [dict(picture=np.zeros((4, 8, 3), np.uint8), split='val', objects=objects)], images=root/'pictures')
    return Refer('mine', root=root, images=root/'pictures'), masks


def test_things_by_hand(made):
    refer, masks = made
    said = refer.expressions('val')
    assert np.array_equal(all_things(refer, said[0]), masks.any(0))
    drawn = [next(k for k, m in enumerate(masks) if np.array_equal(random_thing(refer, e, seed), m)) for e in said for seed in range(30)]
    assert sorted(set(drawn)) == [0, 1, 2] and min(map(drawn.count, range(3))) > 60       # 300 draws
    assert len(set(drawn[::30])) > 1 and len(set(drawn[:30])) > 1                         # each expression its own, each seed its own
    assert drawn == [next(k for k, m in enumerate(masks) if np.array_equal(random_thing(refer, e, seed), m)) for e in said for seed in range(30)]


def test_the_ceiling_by_hand():
    mask = np.zeros((8, 8), bool); mask[:4, :4] = True
    assert np.array_equal(patch_ceiling(mask, (8, 8)), mask)
    round_ = mask.copy(); round_[3, 3] = False                     # the corner: .625**2 of the patch's value, below a half
    assert np.array_equal(patch_ceiling(mask, (2, 2)), round_)
    left = np.zeros((8, 8), bool); left[:, :4] = True
    assert np.array_equal(patch_ceiling(left, (2, 2)), left)       # an edge between patches stays
    dot = np.zeros((8, 8), bool); dot[0, 0] = True
    assert not patch_ceiling(dot, (2, 2)).any() and patch_ceiling(dot, (2, 2), 1/17).any()    # finer than a patch: lost at .5
    assert np.array_equal(patch_ceiling(everything((5, 7)), (2, 2)), everything((5, 7)))
    four = np.zeros((8, 8), bool); four[:4, :2] = True                                         # half of the first patch
    wide, narrow = patch_ceiling(four, (2, 2), .35), patch_ceiling(four, (2, 2), .5)
    assert (narrow <= wide).all() and 0 < narrow.sum() < wide.sum()                            # >=: a patch of exactly .5 is in
    thing = np.zeros((96, 96), bool); thing[10:50, 20:70] = True
    ious = [(thing & c).sum()/(thing | c).sum() for c in (patch_ceiling(thing, (n, n)) for n in (6, 12, 24, 96))]
    assert ious == sorted(ious) and ious[-1] == 1                                              # finer grids lose less


# ---------------------------------------------------------------- on RefMoji

def iou(a, b): return (a & b).sum()/(a | b).sum()


@cache
def measured(pictures=300):
    "Raw CLIP, and what knows nothing, on all of the test split, with what was chosen on some pictures of train: mIoU and pointing in percent."
    clip, refer = load_clip('tinyclip'), Refer('refmojig', root=refmoji_folder())
    @torch.no_grad()
    def maps(split, pictures=None):
        rows = refer.expressions(split)
        ids = np.unique([e.image_id for e in rows])
        kept = set(ids[np.linspace(0, len(ids) - 1, pictures or len(ids)).astype(int)])
        rows, found = [e for e in rows if e.image_id in kept], []
        data = ReferDataset(refer, split, clip.size, clip.tokenize, clip.mean, clip.std, expressions=rows)
        for i in range(0, len(rows), 200):                        # a picture is walked once, whatever is said of it
            ids, where = np.unique([e.image_id for e in rows[i:i + 200]], return_inverse=True)
            patches = raw_patches(clip, torch.stack([data.pixels(p) for p in ids]))
            found.append(cosine_map(patches[where], clip.encode_text(clip.tokenize([e.text for e in rows[i:i + 200]])), clip.grid))
        return rows, torch.cat(found)
    train, train_maps = maps('train', pictures)
    truths = [refer.mask(e.ann_id) for e in train]
    threshold, _ = choose_threshold(train_maps, torch.stack([torch.tensor(resize_mask(m, clip.size))[None] for m in truths]))
    share = max(np.linspace(.1, 1, 10), key=lambda s: np.mean([iou(centred_box(m.shape, s), m) for m in truths]))
    rows, found = maps('test')
    scores, hits, chance = {name: Scores() for name in ('raw', 'everything', 'box', 'random thing', 'all things', 'ceiling')}, [], []
    for e, m, point in zip(rows, found, highest_patch(found)):
        truth = refer.mask(e.ann_id)
        answers = dict(zip(scores, (to_size(m[None] - threshold, truth.shape)[0, 0].numpy() >= 0, everything(truth.shape), centred_box(truth.shape, share),
                                    random_thing(refer, e), all_things(refer, e), patch_ceiling(truth, clip.grid))))
        for name, answer in answers.items(): scores[name].add(answer, truth, e.kind)
        hits.append(points_at(point, truth))
        chance.append(truth[np.ix_(*(((np.arange(k) + .5)/k*K).astype(int) for k, K in zip(clip.grid, truth.shape)))].mean())   # all patch centres
    return {name: s.compute()['miou'] for name, s in scores.items()}, 100*np.mean(hits), 100*np.mean(chance), len(rows)


def test_raw_clip_beats_what_knows_nothing_of_the_picture():
    miou, *_ = measured()
    assert miou['raw'] > miou['everything'] and miou['raw'] > miou['box'], miou


def test_raw_clip_is_below_what_knows_too_much():
    miou, *_ = measured()
    assert miou['everything'] < miou['all things'] and miou['raw'] < miou['ceiling'] and miou['ceiling'] > 50, miou


def test_the_highest_patch_is_no_accident():
    _, hits, chance, n = measured()
    assert n >= 1000
    assert hits >= 2*chance and hits >= chance + 15, (hits, chance)
