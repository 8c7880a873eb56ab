"""RefMoji: is every expression true of exactly one thing, to the eye? And is the data set what it
says it is?

The first part is a second judge. It shares no code with risclip's phrases. It opens a picture (the
JPEG on disk), masks with the names of what they show, and the words of a phrase, and says which
things the phrase is true of."""
import colorsys
import hashlib
import io
import itertools
import json
import re
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np
import pytest
from matplotlib.colors import XKCD_COLORS, to_rgb
from PIL import Image

import risclip.phrases as phrases
import risclip.refmoji as refmoji
import risclip.scenes as scenes
from risclip.refer import Refer
from risclip.refmoji import build_refmoji, make_picture, refmoji_folder
from risclip.scenes import random_scene
from risclip.writer import coco_categories

FOUR, THREE = ('train', 'val', 'testA', 'testB'), ('train', 'val', 'test')
SETS = {'refmoji': FOUR, 'refmoji+': FOUR, 'refmojig': THREE}


# ---- words ----

NOUNS = ('person human|bicycle bike|car|airplane plane|bus|truck|boat|bird|cat kitty|dog doggy|'
         'horse|sheep|cow|elephant|giraffe|umbrella|suitcase|sports_ball=ball|kite|bottle|cup|'
         'banana|apple|pizza slice_of_pizza|donut doughnut|cake|chair|potted_plant plant|laptop|'
         'book|clock|teddy_bear teddy')
CATEGORY = {}   # a word -> COCO's name of what it means
for entry in NOUNS.replace('_', '-').split('|'):
    name, _, words = entry.rpartition('=')
    for word in words.split():
        CATEGORY[word.replace('-', ' ')] = (name or words.split()[0]).replace('-', ' ')
NOUN = re.compile(r'\b(' + '|'.join(sorted(CATEGORY, key=len, reverse=True)) + r')\b')
COLOUR_WORDS = {'red', 'yellow', 'green', 'blue', 'purple', 'pink'}
SIZE_WORDS = dict(large='large', big='large', small='small', little='small')
PLACE_WORDS = dict(left='left', right='right', top='top', bottom='bottom', middle='middle',
                   center='middle')
BACKGROUNDS = dict(grass=(128, 168, 84), sand=(222, 196, 146), water=(118, 178, 204),
                   snow=(238, 242, 246), brick=(165, 95, 75), night=(40, 44, 72),
                   paper=(242, 236, 220), stone=(158, 158, 160), wood=(168, 124, 82),
                   carpet=(160, 142, 160))
FILLERS = set('the a an that which is can be seen on in at of this and color picture image scene '
              'side corner'.split())
RELATION = re.compile(r'\b(?:(?:(?:to|on) the )?(left|right)(?: side)? of|(above|over)|'
                      r'(below|under)|(next to|beside|close to))'
                      r' (?!the (?:picture|image|scene)\b)')


@lru_cache(maxsize=None)
def parse(phrase):
    """What a phrase means: dict(category, colour, size, place, side, background, relation, anchor);
    the anchor is the same again."""
    m = RELATION.search(phrase)
    head, anchor = (phrase[:m.start()], parse(phrase[m.end():])) if m else (phrase, None)
    relation = m and (m[1] or (m[2] and 'above') or (m[3] and 'below') or 'near')
    nouns, rest = NOUN.findall(head), NOUN.sub(' ', head).split()
    known = FILLERS | COLOUR_WORDS | set(SIZE_WORDS) | set(PLACE_WORDS) | set(BACKGROUNDS)
    unknown = set(rest) - known
    if len(nouns) != 1 or unknown:
        raise ValueError(f'{phrase!r}: nouns {nouns}, unknown words {unknown}')

    def only(words):
        found = {w for w in rest if w in words}
        if len(found) > 1: raise ValueError(f'{phrase!r}: both {" and ".join(found)}')
        return next(iter(found), None)
    place = frozenset(PLACE_WORDS[w] for w in rest if w in PLACE_WORDS)
    return dict(category=CATEGORY[nouns[0]], colour=only(COLOUR_WORDS),
                size=SIZE_WORDS.get(only(SIZE_WORDS)), background=only(BACKGROUNDS), place=place,
                side=bool(re.search(r' of the (picture|image|scene)$', phrase)),
                relation=relation, anchor=anchor)


# ---- pictures ----

def lab(rgb):
    "CIELAB (D65) of sRGB in 0..1: [..., 3]."
    rgb = np.asarray(rgb, float)
    linear = np.where(rgb <= .04045, rgb/12.92, ((rgb + .055)/1.055)**2.4)
    to_xyz = [[.4124, .2126, .0193], [.3576, .7152, .1192], [.1805, .0722, .9505]]
    xyz = linear @ np.array(to_xyz)/np.array([.9505, 1, 1.089])
    f = np.where(xyz > (6/29)**3, np.cbrt(xyz), xyz/(3*(6/29)**2) + 4/29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116*y - 16, 500*(x - y), 200*(y - z)], -1)


TERMS = ('red', 'yellow', 'green', 'blue', 'purple', 'pink',     # the basic colour terms
         'orange', 'brown', 'black', 'white', 'grey')


@lru_cache(maxsize=None)
def survey():
    """[32768, 11], [32768]: what people call a colour (5 bits a channel), as shares of TERMS; and
    whether it is more than an outline.

    Of xkcd's survey of 200,000 people (in matplotlib), the nine nearest names in CIELAB that end in
    a basic term. Dark pixels are mixed with black outlines and are named as if fully lit; greyish
    ones have no name."""
    names = [(n.split(':')[1].replace('gray', 'grey').split()[-1], to_rgb(c))
             for n, c in XKCD_COLORS.items()]
    names = [(TERMS.index(word), c) for word, c in names if word in TERMS]
    term, known = np.array([t for t, _ in names]), lab([c for _, c in names])
    rgb = np.stack(np.mgrid[:32, :32, :32], -1).reshape(-1, 3)/31
    brightest, perceived = rgb.max(1, keepdims=True), lab(rgb)
    named = lab(np.where(brightest < .63, rgb/np.maximum(brightest, 1/31), rgb))
    votes = np.zeros((len(rgb), len(TERMS)))
    for i in range(0, len(rgb), 2048):
        far = (known**2).sum(1) - 2*named[i:i+2048] @ known.T
        nearest = np.argpartition(far, 9, axis=1)[:, :9]
        votes[i:i+2048] = (term[nearest, None] == np.arange(len(TERMS))).mean(1)
    outline = perceived[:, 0] < 22
    votes[outline | (np.hypot(perceived[:, 1], perceived[:, 2]) < 16)] = 0
    return votes, ~outline


def edge(m):
    "The pixels of a mask with a neighbour outside it: [k, 2]."
    inner = m.copy()
    for axis in (0, 1):
        for step in (1, -1): inner &= np.roll(np.pad(m, 1), step, axis)[1:-1, 1:-1]
    return np.argwhere(m & ~inner)


class Look:
    "What can be measured on a picture uint8 [H, W, 3] with masks (bool [H, W]) of `categories`."
    def __init__(self, rgb, masks, categories):
        self.size, self.masks, self.categories = rgb.shape[:2], masks, categories
        H, W = self.size
        code = ((rgb.astype(int)*31 + 127)//255) @ [1024, 32, 1]
        votes, light = survey()
        pixels = [code[m] for m in masks]
        self.colour = np.array([votes[p].sum(0)/max(light[p].sum(), .2*len(p)) for p in pixels])
        spots = [np.argwhere(m) for m in masks]
        self.centre = np.array([s.mean(0)[::-1] + .5 for s in spots])       # [n, 2] x, y in pixels
        self.side = np.array([np.ptp(s, axis=0).max() + 1 for s in spots])/min(H, W)
        self.free = rgb[~np.any(masks, axis=0)]                             # [k, 3]

    @cached_property
    def background(self):
        "The name of what is behind the things."
        given = lab(np.array(list(BACKGROUNDS.values()))/255)
        far = np.square(given - np.median(lab(self.free/255), axis=0)).sum(1)
        return list(BACKGROUNDS)[far.argmin()]

    @cached_property
    def edges(self): return [edge(m) for m in self.masks]

    @lru_cache(maxsize=None)
    def gaps(self, i):
        "Pixels from the edge of thing i to that of each other thing: [n]."
        own = self.edges[i][:, None]
        return np.array([np.sqrt(np.square(own - other).sum(-1).min()) for other in self.edges])


# ---- both together ----

NAMED = .12          # the share of a thing that must have a colour's name
AS_NAMED = .3, .45   # ... of the best of its kind: if it is the thing's main colour, and if not
SIZE = .415          # large and small meet here: longer side of the thing, picture's shorter side


def true_of(look, phrase):
    """Which things a phrase (or what `parse` makes of it) is true of: a list of indices.
    Two values, no unclear: the cuts lie amid the generator's margins."""
    d = parse(phrase) if isinstance(phrase, str) else phrase
    if d['background'] and d['background'] != look.background: return []
    fits = [i for i, name in enumerate(look.categories) if name == d['category']]
    if d['colour']:
        term = TERMS.index(d['colour'])
        share, main = look.colour[:, term], look.colour.argmax(1) == term
        best = max((share[i] for i in fits), default=0)
        fits = [i for i in fits if share[i] >= max(NAMED, best*AS_NAMED[0 if main[i] else 1])]
    if d['size']: fits = [i for i in fits if (look.side[i] >= SIZE) == (d['size'] == 'large')]
    if d['place']: return at_place(look, d, fits)
    return in_relation(look, d, fits) if d['relation'] else fits


def at_place(look, d, fits):
    x, y = (look.centre/look.size[::-1]).T
    along = dict(left=x, right=1 - x, top=y, bottom=1 - y)
    if 'middle' in d['place']:
        return [i for i in fits if max(abs(x[i] - .5), abs(y[i] - .5)) < .185]
    if len(d['place']) == 2: return [i for i in fits if all(along[p][i] < .5 for p in d['place'])]
    v = along[next(iter(d['place']))]
    first = sorted(fits, key=lambda i: v[i])[:1]
    return [i for i in first if v[i] < (.5 if d['side'] else .53)]


def in_relation(look, d, fits):
    anchors = true_of(look, d['anchor'])
    if len(anchors) != 1: return []
    a = anchors[0]
    fits = [i for i in fits if i != a]
    if d['relation'] == 'near': return sorted(fits, key=lambda i: look.gaps(a)[i])[:1]
    dx, dy = (look.centre - look.centre[a]).T/np.mean(look.size)
    ahead, aside = dict(left=(-dx, dy), right=(dx, dy),
                        above=(-dy, dx), below=(dy, dx))[d['relation']]
    return [i for i in fits if ahead[i] > .08 and abs(aside[i]) < 1.6*ahead[i]]


# ---- the data ----

@pytest.fixture(scope='session')
def sets():
    root = refmoji_folder()
    return {name: Refer(name, root=root) for name in SETS}


LOOKS = {}


def looked(refer, image_id):
    """The Look of a picture. The three sets share their pictures: where file, names and masks are
    the same, a picture is looked at once."""
    ids = refer.things(image_id)
    names = [refer.category(a) for a in ids]
    masks = tuple(refer.annotations[a]['segmentation']['counts'] for a in ids)
    key = refer.images/refer.pictures[image_id]['file_name'], tuple(names), masks
    if key not in LOOKS:
        if len(LOOKS) > 1000: LOOKS.clear()
        rgb = np.asarray(refer.picture(image_id))
        LOOKS[key] = Look(rgb, [refer.mask(a) for a in ids], names)
    return LOOKS[key]


def some(refer, split, every=12):
    "All expressions of a split; of train those of every 12th picture."
    return [e for e in refer.expressions(split) if split != 'train' or e.image_id % every == 0]


def agrees(refer, e, text=None, ann_id=None):
    found = true_of(looked(refer, e.image_id), text or e.text)
    return [refer.things(e.image_id)[i] for i in found] == [ann_id or e.ann_id]


SMALL = dict(train=130, val=10, test=20, testA=20, testB=20)
FEW = dict(train=4, val=2, test=2, testA=2, testB=2)


@pytest.fixture(scope='session')
def small(tmp_path_factory):
    return build_refmoji(tmp_path_factory.mktemp('small'), SMALL, progress=False)


def contents(folder):
    "{file: checksum}, without what the reader keeps."
    files = [p for p in folder.rglob('*') if p.is_file() and p.name[0] != '.']
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in files if not p.match('refs(*).json')}


# ---- true of exactly one thing ----

@pytest.mark.parametrize('split', SETS['refmojig'])
def test_nothing_is_described_by_itself(sets, split):
    "No 'cup under the cup over the large cup', where the large cup is the one that is meant."
    refer, twice = sets['refmojig'], 0
    for e in some(refer, split):
        meant, at = [refer.things(e.image_id).index(e.ann_id)], parse(e.text)['anchor']
        twice += bool(at and at['anchor'])
        while at:
            assert true_of(looked(refer, e.image_id), at) != meant, e.text
            at = at['anchor']
    assert twice > 50


@pytest.mark.parametrize('split', ['train', 'val', 'test', 'testA', 'testB'])
def test_every_expression_is_true_of_one_thing(sets, split):
    "Of train a third of the pictures, for time; of the other splits all. All sets that have it."
    judged = {}
    for name, splits in SETS.items():
        if split not in splits: continue
        es = [e for e in sets[name].expressions(split) if split != 'train' or e.image_id % 3 == 0]
        assert len(es) > 900, name
        judged |= {(e.image_id, name, n): e for n, e in enumerate(es)}
    assert judged
    wrong = [f'{e.text!r}: thing {e.ann_id} in picture {e.image_id} of {name}'
             for (_, name, _), e in sorted(judged.items()) if not agrees(sets[name], e)]
    assert not wrong, f'{len(wrong)} of {len(judged)}: ' + '; '.join(wrong[:20])


def test_the_second_judge_finds_what_is_wrong(sets):
    "The test above can fail: a swapped referent, colour, size, place or relation is found out."
    refer = sets['refmojig']
    es = refer.expressions('test')[:1500]
    colours = dict(red='blue', yellow='purple', green='red', blue='pink', purple='green',
                   pink='yellow')
    opposites = dict(left='right', right='left', top='bottom', bottom='top', above='below',
                     over='under', below='above', under='over')
    sizes = dict(large='small', big='little', small='large', little='big')
    nouns = dict(cat='cow', person='cow', human='cow', clock='chair', ball='kite', car='boat')
    grounds = list(BACKGROUNDS)
    backgrounds = {g: grounds[i - 1] for i, g in enumerate(grounds)}

    def refuted(words, at_least):
        one = re.compile(r'\b(' + '|'.join(words) + r')\b')
        texts = [(e, one.sub(lambda m: words[m[1]], e.text)) for e in es]
        texts = [(e, t) for e, t in texts if t != e.text]
        found = np.mean([not agrees(refer, e, t) for e, t in texts])
        assert len(texts) > 100 and found >= at_least, f'{found:.1%} of {len(texts)}'
    refuted(colours, .97)
    refuted(sizes, .97)
    refuted(opposites, .97)
    refuted(backgrounds, 1)
    refuted(nouns, 1)
    for e in es:
        others = [a for a in refer.things(e.image_id) if a != e.ann_id]
        assert not any(agrees(refer, e, ann_id=a) for a in others)


def test_the_second_judge_looks_at_the_pixels(sets):
    """Paint another thing of its kind in the referent's colour, or the referent in another:
    a phrase that says the colour is no longer good."""
    refer, tried = sets['refmoji+'], 0
    for e in refer.expressions('val'):
        ids, d = refer.things(e.image_id), parse(e.text)
        i = ids.index(e.ann_id)
        twins = [j for j, a in enumerate(ids) if refer.category(a) == e.category and j != i]
        if not d['colour'] or d['size'] or not twins or e.marks: continue
        rgb, masks = np.asarray(refer.picture(e.image_id)), [refer.mask(a) for a in ids]
        names = [refer.category(a) for a in ids]
        for j, colour in ((i, 'grey'), (twins[0], 'xkcd:' + d['colour'])):
            painted = rgb.copy()
            painted[masks[j]] = np.array(to_rgb(colour))*255
            assert true_of(Look(painted, masks, names), d) != [i], f'{e.text} in {e.image_id}'
        tried += 1
    assert tried > 100


def test_the_sets_share_their_looks(sets, monkeypatch):
    "A picture is looked at once for all sets, unless one of them has other masks or names."
    refer, other = sets['refmoji'], sets['refmojig']
    image_id = next(e.image_id for e in refer.expressions('val'))
    look = looked(refer, image_id)
    assert look is looked(other, image_id)
    a, b = (other.annotations[i] for i in other.things(image_id)[:2])
    monkeypatch.setitem(a, 'segmentation', b['segmentation'])
    assert looked(other, image_id) is not look
    assert (looked(other, image_id).masks[0] == look.masks[1]).all()


def test_parse():
    d = parse('a big plane which is close to the slice of pizza '
              'that is under a little pink teddy bear')
    assert (d['category'], d['size'], d['colour']) == ('airplane', 'large', None)
    assert d['relation'] == 'near'
    assert (d['anchor']['category'], d['anchor']['relation']) == ('pizza', 'below')
    teddy = d['anchor']['anchor']
    assert (teddy['category'], teddy['colour']) == ('teddy bear', 'pink')
    d = parse('the apple on the left side of the picture')
    assert (d['category'], d['place'], d['side']) == ('apple', {'left'}, True)
    assert (d['relation'], d['colour']) == (None, None)
    assert parse('the apple on the left side of the pizza')['relation'] == 'left'
    assert parse('top right teddy on')['place'] == {'top', 'right'}
    assert parse('teddy in center')['place'] == {'middle'}
    assert parse('the dog that is small and red')['size'] == 'small'
    assert parse('the dog in this image of snow')['background'] == 'snow'
    for bad in ('the dragon', 'the red and blue dog', 'the dog and cat', 'the shiny dog',
                'the dog left of the'):
        with pytest.raises(ValueError): parse(bad)


HALF = [np.tile([True, False], (9, 1)).repeat(9, 1)]   # the left half of 9 x 18 pixels


def test_colours_have_their_names():
    "The survey names plain colours as everybody does, light, dark or mixed with black; greys not."
    for colour in sorted(COLOUR_WORDS):
        for light in (1, .85, .7):
            flat = np.full((9, 9, 3), np.array(to_rgb('xkcd:' + colour))*255*light, np.uint8)
            share = Look(np.concatenate([flat, flat*0], 1), HALF, ['dog']).colour[0]
            assert TERMS[share.argmax()] == colour and share.max() > .6, (colour, light, share)
    grey = np.full((9, 18, 3), 128, np.uint8)
    assert Look(grey, HALF, ['dog']).colour.max() == 0


# ---- what the sets are ----

def all_of(refer): return [e for split in refer.splits for e in refer.expressions(split)]


def test_lengths(sets):
    for name, published in {'refmoji': 3.61, 'refmoji+': 3.53, 'refmojig': 8.4}.items():
        assert abs(np.mean([e.length for e in all_of(sets[name])]) - published) < 1


def test_splits(sets):
    where = {}
    for name, refer in sets.items():
        assert tuple(refer.splits) == SETS[name]
        for split in refer.splits:
            es = refer.expressions(split)
            assert len({e.image_id for e in es}) > .75*refmoji.PICTURES[split]
            for e in es: where.setdefault(e.image_id, set()).add(split)
    assert all(len(splits) == 1 for splits in where.values())
    refer, first = sets['refmoji'], {}
    for image_id, picture in sorted(refer.pictures.items()):
        checksum = hashlib.sha256((refer.images/picture['file_name']).read_bytes()).digest()
        assert first.setdefault(checksum, image_id) == image_id   # no picture twice


def test_the_sets_say_how_they_were_drawn(sets):
    "The version, and the mean colour of each background, by which a model knows its own world."
    for refer in sets.values():
        assert refer.info['version'] == refmoji.VERSION
        colours = np.array(refer.info['edge_colours'])
        means = [scenes.background(name).reshape(-1, 3).mean(0) for name in scenes.BACKGROUNDS]
        assert colours.shape == (10, 3) and (colours == means).all()


def test_referents_are_large_enough(sets):
    for refer in sets.values():
        def covered(e): return refer.annotations[e.ann_id]['area']/np.prod(refer.size(e.image_id))
        share = {split: [covered(o[0]) for o in refer.objects(split)] for split in refer.splits}
        everywhere = np.concatenate(list(share.values()))
        assert .08 < everywhere.mean() < .12 and everywhere.min() > .003
        assert np.mean(share.pop('testA', [.1])) > .03        # people are thin
        for split, values in share.items():
            assert .08 < np.mean(values) < .12, (refer.name, split)


def test_categories(sets):
    coco = coco_categories()
    for refer in sets.values():
        used = {a['category_id'] for a in refer.annotations.values()}
        assert len(used) == 32
        assert all(coco[c] == refer.categories[c] for c in used)


def test_people(sets):
    for name in ('refmoji', 'refmoji+'):
        refer = sets[name]
        for e in refer.expressions('testA'):
            names = [refer.category(a) for a in refer.things(e.image_id)]
            assert e.category == 'person' and names.count('person') > 1
        for image_id in {e.image_id for e in refer.expressions('testB')}:
            names = Counter(refer.category(a) for a in refer.things(image_id))
            assert 'person' not in names and max(names.values()) > 1


def test_kinds_and_words(sets):
    of_place = {*PLACE_WORDS, 'above', 'over', 'below', 'under', 'next', 'beside', 'close', 'side',
                'corner'}
    for name, refer in sets.items():
        es = all_of(refer)
        kinds = {'appearance'} if name == 'refmoji+' else {'appearance', 'place', 'relation'}
        assert {e.kind for e in es} == kinds
        for e in some(refer, 'train') + refer.expressions('val'):
            d = parse(e.text)
            kind = 'relation' if d['relation'] else 'place' if d['place'] else 'appearance'
            assert e.kind == kind
        words = Counter()
        for e in es: words.update(e.text.split())
        if name == 'refmoji+': assert not set(words) & of_place
        else: assert sum(words[w] for w in PLACE_WORDS) > len(es)/10
    test = sets['refmojig'].expressions('test')
    long = [parse(e.text) for e in test]
    two_steps = [bool(d['relation'] and d['anchor']['relation']) for d in long]
    assert np.mean(two_steps) > .03
    for mark in ('hidden', 'cut', 'blurred'): assert sum(mark in e.marks for e in test) > 50


def test_scenes(sets):
    refer = sets['refmojig']
    ids = sorted({e.image_id for e in refer.expressions('test')})
    n = [len(refer.things(i)) for i in ids]
    assert min(n) >= 2 and max(n) <= 6 and np.mean(n) > 3
    groups = [Counter(refer.category(a) for a in refer.things(i)) for i in ids]
    assert np.mean([max(group.values()) > 1 for group in groups]) > .75
    assert len({refer.size(i) for i in ids}) > 15
    assert len({looked(refer, i).background for i in ids[:200]}) == 10


# ---- the parts, against loops ----

def test_a_tint_by_hand():
    "Pixel by pixel: black outlines stay, all else takes the colour and keeps some of its shading."
    def by_hand(r, g, b, a, tint):
        light = max(r, g, b)/255
        fill = min(max((light - .12)/.12, 0), 1)
        shade = .62 + .38*light
        return [round(fill*t*shade + (1 - fill)*c) for t, c in zip(tint, (r, g, b))] + [a]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4), dtype=np.uint8)
    black = np.uint8([[[0, 0, 0, 255]]])
    for colour, tint in scenes.TINTS.items():
        expected = [[by_hand(*map(int, p), tint) for p in row] for row in pixels]
        assert (scenes.tinted(pixels, colour) == np.array(expected)).all()
        assert (scenes.tinted(black, colour) == black).all()


def test_hues_of_single_pixels():
    "Against Python's own conversion to hue; and each tint has its own name."
    for rgb in [(232, 44, 44), (250, 216, 30), (44, 104, 236), (255, 112, 186), (165, 121, 57),
                (128, 128, 128), (20, 0, 0)]:
        hue, saturation, value = colorsys.rgb_to_hsv(*np.array(rgb)/255)
        strong, degrees = saturation > .3 and value*255 > 70, 360*hue
        def within(a, z): return a <= degrees <= z if a < z else degrees >= a or degrees <= z
        expected = [strong and within(*hues) for hues in phrases.CLEARLY.values()]
        assert phrases.colour_shares(np.uint8([rgb]))[0].tolist() == expected, rgb
    for i, colour in enumerate(scenes.COLOUR_NAMES):
        tint = np.uint8([scenes.TINTS[colour]])
        assert phrases.colour_shares(tint).argmax(1).tolist() == [i, i]


def test_gaps_and_edges_against_loops():
    def gap(a, b):
        pairs = itertools.product(np.argwhere(a), np.argwhere(b))
        return min(((y - v)**2 + (x - u)**2)**.5 for (y, x), (v, u) in pairs)
    p, q, r = np.zeros((3, 12, 16), bool)
    p[2:5, 1:4] = q[8:11, 9:12] = r[4:6, 4:9] = True
    by_loop = [[gap(a, b) for b in (p, q, r)] for a in (p, q, r)]
    assert np.allclose(phrases.gaps([p, q, r]), by_loop)

    def first(value, able, margin=.1):
        for i, v in enumerate(value):
            others = min([w for j, w in enumerate(value) if j != i and able[j]], default=1)
            yes = v <= others - margin and v <= (.4 if sum(able) == 1 else .46)
            no = v >= others + .04 or v > .62
            yield phrases.YES if yes else phrases.NO if no else phrases.UNCLEAR

    def nearest(distance, able, near, clear):
        for i, d in enumerate(distance):
            rival = min([e for j, e in enumerate(distance) if j != i and able[j]], default=np.inf)
            yes, no = d <= near and d + clear <= rival, d >= rival + clear/2 or d > 1.5*near
            yield phrases.YES if yes else phrases.NO if no else phrases.UNCLEAR
    rng = np.random.default_rng(0)
    for _ in range(200):
        value, able = rng.uniform(size=4), rng.random(4) < .7
        assert phrases._edge(value, able).tolist() == list(first(value, able))
        found = phrases._nearest(value, able, .5, .15)
        assert found.tolist() == list(nearest(value, able, .5, .15))


# ---- masks ----

def test_masks_are_disjoint(sets):
    refer = sets['refmoji']
    for image_id in sorted(refer.pictures)[::10]:
        ids = refer.things(image_id)
        masks = [refer.mask(a) for a in ids]
        assert sum(m.astype(int) for m in masks).max() == 1 and min(m.sum() for m in masks) >= 60
        for a, m in zip(ids, masks): assert refer.annotations[a]['area'] == m.sum()


def test_masks_are_exact(monkeypatch):
    """A thing taken away changes the picture on its mask (but where the background has its very
    colour), and nowhere beyond its outline."""
    calls, paint = [], scenes.draw

    def draw(*args):
        calls.append(args)
        return paint(*args)
    monkeypatch.setattr(scenes, 'draw', draw)
    rng = np.random.default_rng(0)
    for _ in range(40):
        scene = random_scene(rng)
        size, background, corner, things = calls[-1]
        masks = [t.mask for t in things]
        for k, mask in enumerate(masks):
            rest = [replace(t) for i, t in enumerate(things) if i != k]
            without = paint(size, background, corner, rest)
            changed = np.abs(without.picture.astype(int) - scene.picture).max(-1)
            single = replace(things[k])
            paint(size, background, corner, [single])
            beyond = changed[~spread(single.mask, 2)]
            if things[k].blurred:   # a blurred thin part is less than half opaque: not in the mask
                assert beyond.max() <= 130 and (beyond > 64).mean() < .01
            else: assert not beyond.any()
            assert not (mask & ~single.mask).any()
            hidden = single.mask & ~mask   # what hides a pixel is more than half opaque there
            assert changed[hidden].max(initial=0) <= 130
            for t, m in zip(rest, masks[:k] + masks[k+1:]):
                assert not (m & ~t.mask).any()   # the others show as much, or more


def spread(mask, by):
    for _ in range(by):
        padded = np.pad(mask, 1)
        moved = [np.roll(padded, step, axis)[1:-1, 1:-1] for axis in (0, 1) for step in (0, 1, -1)]
        mask = np.any(moved, axis=0)
    return mask


def test_disk_holds_what_was_drawn(small):
    "Read by Refer: the very pictures, masks, names, marks and words of make_picture."
    refers = {name: Refer(name, root=small) for name in SETS}
    numbers = [(split, number) for split, n in SMALL.items() for number in range(n)]
    for image_id, (split, number) in enumerate(numbers, 1):
        jpeg, things, spoken = make_picture(0, split, number)
        marks = [tuple(m for m in ('hidden', 'cut', 'blurred') if t[m]) for t in things]
        for name, objects in spoken.items():
            refer = refers[name]
            assert (refer.images/f'{image_id:012d}.jpg').read_bytes() == jpeg
            ids = refer.things(image_id)
            assert [refer.category(a) for a in ids] == [t['category'] for t in things]
            masks = [refer.annotations[a]['segmentation'] for a in ids]
            assert masks == [t['mask'] for t in things]
            read = {e.text: (e.ann_id, e.kind, e.marks)
                    for e in refer.expressions(split) if e.image_id == image_id}
            want = {s['sent']: (ids[i], s['kind'], marks[i]) for i, ss in objects for s in ss}
            assert read == want


# ---- building ----

def test_same_seed_same_bytes(small, tmp_path):
    one = contents(small)
    assert one == contents(build_refmoji(tmp_path/'again', SMALL, workers=1, progress=False))
    other = contents(build_refmoji(tmp_path/'other', SMALL, seed=1, workers=2, progress=False))
    assert other.keys() == one.keys()
    assert [k for k in one if one[k] == other[k]] == [f'images/refmoji/{refmoji.VERSION}.json']


def test_more_pictures_change_no_picture(tmp_path):
    few = contents(build_refmoji(tmp_path/'few', FEW, workers=1, progress=False))
    more = contents(build_refmoji(tmp_path/'more', FEW | dict(testB=5), workers=2, progress=False))
    pictures = {k: v for k, v in few.items() if k.endswith('.jpg')}
    assert len(pictures) == sum(FEW.values()) and pictures.items() <= more.items()


def test_the_full_set_begins_like_a_small_one(small, sets):
    few, refer = Refer('refmojig', root=small), sets['refmojig']
    begin = [e.text for e in refer.expressions('train') if e.image_id <= SMALL['train']]
    assert [e.text for e in few.expressions('train')] == begin, \
        f'{refer.folder} was drawn by another version: remove it, and it will be built anew'
    for i in range(1, SMALL['train'] + 1):
        file = f'{i:012d}.jpg'
        assert (few.images/file).read_bytes() == (refer.images/file).read_bytes()


def test_folder_is_built_once(tmp_path, monkeypatch):
    built, data = [], tmp_path/'data'

    def build(root, **kw):
        time.sleep(.5)
        built.append(root)
        return build_refmoji(root, FEW, workers=1, progress=False)
    monkeypatch.setattr(refmoji, 'build_refmoji', build)
    at_once = [threading.Thread(target=refmoji_folder, args=(data,)) for _ in range(3)]
    for t in at_once: t.start()
    for t in at_once: t.join()
    assert built == [data]
    before = contents(data)
    monkeypatch.setenv('RISCLIP_DATA', str(data))
    assert refmoji_folder() == data and len(built) == 1 and contents(data) == before
    (data/'refmojig'/'refs(umd).p').unlink()     # not whole: built again
    assert refmoji_folder() == data and len(built) == 2 and contents(data) == before
    mark = data/'images'/'refmoji'/f'{refmoji.VERSION}.json'
    mark.rename(mark.with_name('drawn-by-3.json'))   # of another version: built again
    assert refmoji_folder() == data and len(built) == 3 and contents(data) == before


def test_a_build_that_breaks_leaves_what_was_there(tmp_path, monkeypatch):
    root = build_refmoji(tmp_path, FEW, workers=1, progress=False)
    before, write = contents(root), refmoji.write_refer

    def full(root, name, *args, **more):
        if name == 'refmojig': raise OSError(28, 'No space left on device')
        return write(root, name, *args, **more)
    monkeypatch.setattr(refmoji, 'write_refer', full)
    with pytest.raises(OSError, match='No space'):
        build_refmoji(root, FEW, seed=3, workers=1, progress=False)
    assert contents(root) == before and not list(root.glob('.refmoji.*'))


def test_pictures_are_jpegs_of_their_size(small):
    "Any program opens them, and masks fit them."
    instances = json.loads((small/'refmoji'/'instances.json').read_text())
    for picture in instances['images']:
        content = (small/'images'/'refmoji'/picture['file_name']).read_bytes()
        jpeg = Image.open(io.BytesIO(content))
        assert jpeg.format == 'JPEG' and jpeg.mode == 'RGB'
        assert jpeg.size == (picture['width'], picture['height'])
        assert 96 <= min(jpeg.size) and max(jpeg.size) <= 144
