"The data set: items and batches, the draw of sentences, and what stays in memory."
import os, subprocess, sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from refcoco_files import pictures_and_sets, scene
from risclip.dataset import Batch, ReferDataset
from risclip.refer import JointRefer, Refer
from risclip.writer import write_refer

MEAN, STD = (.48, .46, .41), (.27, .26, .28)
S = 16


def tokenize(phrases):
    "Words as numbers: [n, 6]."
    assert isinstance(phrases, list)
    ids = torch.zeros(len(phrases), 6, dtype=torch.long)
    for row, phrase in zip(ids, phrases):
        for i, word in enumerate(phrase.split()[:6]): row[i] = sum(map(ord, word))
    return ids


LIKE_CLIP = SimpleNamespace(size=S, tokenize=tokenize, mean=MEAN, std=STD)


@pytest.fixture
def small(tmp_path):
    "Six pictures to train on, one for val; six phrases a picture."
    ours = [scene(i, size=(20+i, 30-i)) for i in range(6)] + [scene(9, split='val')]
    for e in ours: e['objects'][0]['expressions'] = [f'dog number {k}' for k in range(5)]
    write_refer(tmp_path, 'mine', 'unc', ours)
    return Refer('mine', root=tmp_path)


def test_evaluation_has_every_expression(small):
    d = ReferDataset(small, 'val', LIKE_CLIP)
    assert d.expressions == small.expressions('val') and len(d) == 6
    item = d[2]
    assert isinstance(item, Batch)
    assert [tuple(x.shape) for x in item] == [(3, S, S), (6,), (1, S, S), (), ()]
    long = torch.int64
    assert [x.dtype for x in item] == [torch.float32, long, torch.float32, long, long]
    assert set(item.mask.unique().tolist()) <= {0., 1.}
    assert item.index == 2 and item.image_id == 7
    torch.testing.assert_close(item.tokens, tokenize([d.expressions[2].text])[0])
    picture = np.asarray(small.picture(7).resize((S, S), Image.Resampling.BICUBIC))
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    expected = (torch.tensor(picture).permute(2, 0, 1)/255 - mean)/std
    torch.testing.assert_close(item.pixels, expected)


def test_pixels_are_those_of_clip(small, narrow_clip):
    "Read, or from memory: bit for bit what CLIP makes of the picture itself."
    d = ReferDataset(small, 'val', narrow_clip)
    for _ in range(2): assert torch.equal(d[0].pixels, narrow_clip.preprocess(small.picture(7)))


def test_training_has_every_object_once_an_epoch(small):
    d = ReferDataset(small, 'train', LIKE_CLIP, train=True)
    objects = small.objects('train')
    assert len(d) == len(objects) == 12
    drawn = []
    for epoch in range(30):
        d.set_epoch(epoch)
        assert [e.ref_id for e in d.expressions] == [o[0].ref_id for o in objects]
        drawn.append(tuple(e.sent_id for e in d.expressions))
        assert d.expressions[3] == d.expression(3)
    # every sentence has its turn
    assert {s[0] for s in drawn} == {e.sent_id for e in objects[0]}
    d.set_epoch(4)
    assert tuple(e.sent_id for e in d.expressions) == drawn[4]
    other = ReferDataset(small, 'train', LIKE_CLIP, train=True, seed=1)
    other.set_epoch(4)
    assert tuple(e.sent_id for e in other.expressions) != drawn[4]


def test_the_draw_does_not_depend_on_the_rest_of_the_split(small):
    whole = ReferDataset(small, 'train', LIKE_CLIP, train=True)
    part = ReferDataset(small, 'train', LIKE_CLIP, train=True,
                        expressions=small.expressions('train')[12:])
    drawn = {e.ref_id: e for e in whole.expressions}
    assert part.expressions and all(drawn[e.ref_id] == e for e in part.expressions)


ELSEWHERE = """
from types import SimpleNamespace
from risclip.dataset import ReferDataset, Refer
clip = SimpleNamespace(size=16, tokenize=None, mean=(0, 0, 0), std=(1, 1, 1))
d = ReferDataset(Refer('mine', root={root!r}), 'train', clip, train=True, seed=3)
d.set_epoch(2)
print([e.sent_id for e in d.expressions])
"""


def test_the_draw_is_the_same_in_another_process(small):
    d = ReferDataset(small, 'train', LIKE_CLIP, train=True, seed=3)
    d.set_epoch(2)
    code = ELSEWHERE.format(root=str(small.folder.parent))
    env = os.environ | {'PYTHONHASHSEED': '7', 'PYTHONPATH': os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert out.stdout.strip() == str([e.sent_id for e in d.expressions]), out.stderr


@pytest.mark.parametrize('workers, persistent', [(0, False), (2, False), (2, True)])
def test_batches_from_workers(small, workers, persistent):
    d = ReferDataset(small, 'train', LIKE_CLIP, train=True)
    loader = DataLoader(d, batch_size=5, num_workers=workers, persistent_workers=persistent)
    for epoch in (0, 3):
        d.set_epoch(epoch)
        batches = list(loader)
        assert isinstance(batches[0], Batch)
        assert [tuple(b.pixels.shape) for b in batches] == [(n, 3, S, S) for n in (5, 5, 2)]
        assert batches[0].mask.shape == (5, 1, S, S) and batches[0].tokens.shape == (5, 6)
        assert torch.cat([b.index for b in batches]).tolist() == list(range(12))
        tokens = tokenize([e.text for e in d.expressions])
        torch.testing.assert_close(torch.cat([b.tokens for b in batches]), tokens)


def test_a_split_that_is_not_there_is_refused(small):
    with pytest.raises(ValueError, match='train, val'): ReferDataset(small, 'test', LIKE_CLIP)


def test_several_sets_as_one(tmp_path):
    joint = JointRefer(pictures_and_sets(tmp_path))
    rows = ReferDataset(joint, 'train', LIKE_CLIP, train=True)
    assert len(rows) == 5              # an object each, though two sets have a ref 1 and a ref 6
    for row, e in enumerate(rows.expressions):
        image = int(e.text.split()[1])
        assert joint.picture(e.image_id).getpixel((0, 0)) == (image, 90, 30)
        assert rows[row].image_id == e.image_id


def test_cache_changes_nothing_but_the_reading(small, monkeypatch):
    reads = []
    picture = Refer.picture
    monkeypatch.setattr(Refer, 'picture', lambda self, i: (reads.append(i), picture(self, i))[1])
    expressions = small.expressions('train')                     # five for each of six pictures
    whole = ReferDataset(small, 'train', LIKE_CLIP)
    last_two = ReferDataset(small, 'train', LIKE_CLIP, cache_bytes=2*3*S*S)
    assert last_two.max_cached == 2
    for _ in range(2):
        for row in range(len(expressions)):
            torch.testing.assert_close(whole[row].pixels, last_two[row].pixels)
    # phrases of a picture that come one after the other read it once
    assert len(reads) == 6 + 2*6 and len(last_two._cache) == 2
    first = whole[0].pixels.clone()
    whole[0].pixels.zero_()
    # who writes into an item does not write into the cache
    torch.testing.assert_close(whole[0].pixels, first)
    assert ReferDataset(small, 'train', LIKE_CLIP, cache_bytes=0).max_cached == 1


def test_pictures_once(small):
    rows = ReferDataset(small, 'train', LIKE_CLIP)
    batch = next(iter(DataLoader(rows, batch_sampler=[[7, 0, 6, 1, 29]])))
    pixels, image_index = batch.pictures_once()
    assert len(pixels) == 3 and torch.equal(pixels[image_index], batch.pixels)


def test_to_a_device():
    batch = Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4).long(), torch.zeros(1, 1, 2, 2),
                  torch.zeros(1).long())
    moved = batch.to('meta')
    assert {x.device.type for x in moved[:4]} == {'meta'} and moved.image_id is None
