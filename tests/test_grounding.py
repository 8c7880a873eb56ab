"""Raw CLIP: the map against a loop, each reading against its own words, scale and bias; and on
RefMoji's test split what the chapter claims: more than chance, more than what knows nothing."""
import math
from functools import cache

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from risclip.clip import CLIPTowers, load_clip
from risclip.dataset import ReferDataset
from risclip.grounding import Calibration, attended, cosine_map, raw_grounding, raw_patches
from risclip.losses import patch_label
from risclip.pictures import resize_mask
from risclip.refer import Refer
from risclip.refmoji import refmoji_folder
from risclip.scoring import SegmentationMetrics, choose_threshold

quick = settings(max_examples=40, deadline=None)


@pytest.fixture(scope='module')
def small():
    "A CLIP of random weights, two pictures, two phrases."
    torch.manual_seed(0)
    vision = dict(image_size=32, patch_size=8, width=32, layers=3, head_width=16)
    text = dict(context_length=16, vocab_size=49408, width=24, heads=2, layers=2)
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)
    for p in model.parameters():
        # biases start at 0: a walk that forgets one would not show
        if p.ndim == 1: p.data += .1*torch.randn_like(p)
    model.visual.preprocess_cfg = dict(mean=(0., 0., 0.), std=(1., 1., 1.))
    clip = CLIPTowers(model, open_clip.SimpleTokenizer(context_length=16), 'small')
    return clip, torch.randn(2, 3, 32, 32), clip.tokenize(['a dog', 'the red umbrella on the left'])


# ---------------------------------------------------------------- the map

@quick
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6),
       st.integers(0, 99))
def test_cosine_map_is_the_loop(B, h, w, E, seed):
    g = torch.Generator().manual_seed(seed)
    patches, sentence = torch.randn(B, h*w, E, generator=g), torch.randn(B, E, generator=g)
    found = cosine_map(patches, sentence, (h, w))
    assert found.shape == (B, 1, h, w)
    for b in range(B):
        for r in range(h):
            for c in range(w):
                p, s = patches[b, r*w + c].double(), sentence[b].double()
                cosine = (p @ s/(p.norm()*s.norm())).item()
                assert found[b, 0, r, c].item() == pytest.approx(cosine, abs=1e-5)


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
    patches, sentence = torch.randn(*shape), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r'wanted \[B, 6, E\].*CLS'):
        cosine_map(patches, sentence, (2, 3))


# ---------------------------------------------------------------- the readings

def reading(clip, pixels, own, residual, mlp):
    """Patches after a walk in which the blocks `own` use values, over open_clip's own attention:
    by itself in a sequence, a token keeps its value."""
    v, blocks = clip.image.embed(pixels), [b.resblock for b in clip.image.blocks]
    for i, b in enumerate(blocks):
        u, last = b.ln_1(v), i == len(blocks) - 1
        x = u.flatten(0, 1)[:, None] if i in own else u                       # [B*N, 1, D]
        delta = b.attn(x, x, x, need_weights=False)[0].view_as(u)
        v = v + delta if residual or not last else delta
        if mlp or not last: v = v + b.mlp(b.ln_2(v))
    return clip.image.project(v)[:, 1:]


READINGS = [('plain', ()), ('value', (2,)), ('value_every', (0, 1, 2))]


@pytest.mark.parametrize('attention, own', READINGS)
@pytest.mark.parametrize('residual', [True, False])
@pytest.mark.parametrize('mlp', [True, False])
def test_each_reading_against_open_clips_attention(small, attention, own, residual, mlp):
    clip, pixels, tokens = small
    with torch.no_grad(): wanted = reading(clip, pixels, own, residual, mlp)
    found = raw_patches(clip, pixels, attention, residual, mlp)
    assert found.shape == (2, 16, 24)
    assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    maps = raw_grounding(clip, pixels, tokens, attention, residual, mlp)
    assert_close(maps, cosine_map(wanted, clip.encode_text(tokens), (4, 4)), atol=1e-5, rtol=1e-4)


def test_readings_differ(small):
    clip, pixels, tokens = small
    maps = []
    for attention, _ in READINGS:
        for residual, mlp in ((True, True), (True, False), (False, True), (False, False)):
            maps.append(raw_grounding(clip, pixels, tokens, attention, residual, mlp))
    for i, a in enumerate(maps):
        for b in maps[:i]: assert (a - b).abs().max() > 1e-3


def test_without_any_choice_it_is_open_clip(small):
    clip, pixels, _ = small
    assert torch.equal(raw_patches(clip, pixels, 'plain', True, True), clip.image(pixels)[:, 1:])


def test_the_default_is_values_in_the_last_block_alone(small):
    clip, pixels, tokens = small
    said = dict(attention='value', residual=False, mlp=False)
    assert torch.equal(raw_grounding(clip, pixels, tokens),
                       raw_grounding(clip, pixels, tokens, **said))


def test_many_phrases_of_one_picture(small):
    "With `image_index` a picture is walked once; the maps are those of the picture repeated."
    clip, pixels, tokens = small
    index, phrases = torch.tensor([1, 0, 1]), tokens[[0, 1, 1]]
    maps = raw_grounding(clip, pixels, phrases, image_index=index)
    assert_close(maps, raw_grounding(clip, pixels[index], phrases), atol=1e-5, rtol=1e-4)


def test_attended(small):
    clip, pixels, _ = small
    v, block = clip.image.embed(pixels), clip.image.blocks[1]
    for attention, own in (('plain', ()), ('value', (2,)), ('value_every', (0, 1, 2))):
        for number in range(3):
            wanted = block.values(v) if number in own else block.attend(v)
            assert torch.equal(attended(block, v, number, 3, attention), wanted)
    with pytest.raises(ValueError, match="attention='first'.*plain, value, value_every"):
        attended(block, v, 0, 3, 'first')


def test_with_values_in_every_block_no_patch_sees_another(small):
    clip, pixels, tokens = small
    changed = pixels.clone()
    changed[:, :, 8:16, 24:32] += 1                                         # row 1, column 3
    for attention in ('value_every', 'value'):
        before, after = (raw_grounding(clip, p, tokens, attention) for p in (pixels, changed))
        places = (before - after).abs()[:, 0] > 1e-6
        assert places[:, 1, 3].all()
        assert places.sum() == 2 if attention == 'value_every' else places.sum() > 20


def test_nothing_takes_a_gradient(small):
    clip, pixels, tokens = small
    assert not raw_grounding(clip, pixels.clone().requires_grad_(), tokens).requires_grad


def test_padding_changes_nothing(small):
    clip, pixels, tokens = small
    whole, short = (raw_grounding(clip, pixels, t) for t in (tokens, tokens[:, :10]))
    assert_close(whole, short, atol=1e-5, rtol=1e-4)


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


# ---------------------------------------------------------------- on RefMoji

def box_of(size, share):
    "A box in the middle of (H, W) that covers `share` of it."
    (H, W), box, k = size, np.zeros(size, bool), share**.5
    box[round(H*(1 - k)/2):round(H*(1 + k)/2), round(W*(1 - k)/2):round(W*(1 + k)/2)] = True
    return box


def ceiling_of(mask, grid):
    "The true mask [H, W] as the patches have it."
    coarse = patch_label(torch.tensor(mask)[None, None].float(), grid)
    return (F.interpolate(coarse - .5, mask.shape, mode='bilinear')[0, 0] >= 0).numpy()


def value_at(point, mask):
    "The mask's pixel under a point (row, column) in 0..1."
    (y, x), (H, W) = point, mask.shape
    return mask[int(y*H), int(x*W)]


@torch.no_grad()
def maps_of(clip, refer, split, pictures):
    "The raw maps of all expressions of so many pictures of a split, and the masks."
    rows = refer.expressions(split)
    ids = np.unique([e.image_id for e in rows])
    chosen = set(ids[np.linspace(0, len(ids) - 1, pictures).astype(int)])
    rows, maps = [e for e in rows if e.image_id in chosen], []
    data = ReferDataset(refer, split, clip, expressions=rows)
    for i in range(0, len(rows), 200):
        some = rows[i:i + 200]
        images, where = np.unique([e.image_id for e in some], return_inverse=True)
        pixels, tokens = torch.stack([data.pixels(p) for p in images]), [e.text for e in some]
        maps.append(raw_grounding(clip, pixels, clip.tokenize(tokens),
                                  image_index=torch.from_numpy(where)))
    return torch.cat(maps), rows, [refer.mask(e.ann_id) for e in rows]


@cache
def measured(pictures=300):
    """Raw CLIP and what knows nothing, or too much, on a part of the test split, with what was
    chosen on a part of train: mIoU and pointing in percent."""
    clip, refer = load_clip('tinyclip'), Refer('refmojig', root=refmoji_folder())
    maps, _, truths = maps_of(clip, refer, 'train', pictures)
    masks = torch.tensor(np.stack([resize_mask(m, clip.size) for m in truths]))[:, None]
    threshold, _ = choose_threshold(maps, masks)

    def box_worth(share):
        scores = SegmentationMetrics()
        for m in truths: scores.add(box_of(m.shape, share), m)
        return scores.compute()['miou']
    share = max(np.linspace(.1, 1, 10), key=box_worth)

    maps, rows, truths = maps_of(clip, refer, 'test', pictures)
    h, w = clip.grid
    centres = [((r + .5)/h, (c + .5)/w) for r, c in np.ndindex(h, w)]
    names = ('raw', 'everything', 'box', 'all things', 'ceiling')
    scores, hits, chance = {name: SegmentationMetrics() for name in names}, [], []
    for m, e, truth in zip(maps, rows, truths):
        raw = F.interpolate(m[None] - threshold, truth.shape, mode='bilinear')[0, 0].numpy() >= 0
        things = np.any([refer.mask(a) for a in refer.things(e.image_id)], axis=0)
        answers = (raw, np.ones_like(truth), box_of(truth.shape, share), things,
                   ceiling_of(truth, clip.grid))
        for name, answer in zip(names, answers): scores[name].add(answer, truth)
        hits.append(value_at(centres[m.argmax()], truth))
        chance.append(np.mean([value_at(p, truth) for p in centres]))
    miou = {name: s.compute()['miou'] for name, s in scores.items()}
    return miou, 100*np.mean(hits), 100*np.mean(chance), len(rows)


def test_raw_clip_beats_what_knows_nothing_of_the_picture():
    miou, *_ = measured()
    assert miou['raw'] > miou['everything'] and miou['raw'] > miou['box'], miou


def test_raw_clip_is_below_what_knows_too_much():
    miou, *_ = measured()
    assert miou['everything'] < miou['all things'], miou
    assert miou['raw'] < miou['ceiling'] and miou['ceiling'] > 50, miou


def test_the_highest_patch_is_no_accident():
    _, hits, chance, n = measured()
    assert n >= 1000
    assert hits >= 2*chance and hits >= chance + 15, (hits, chance)
