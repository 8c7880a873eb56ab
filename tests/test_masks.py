"Masks: polygons as a union, run lengths checked, and nothing vanishes at a smaller size."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from refcoco_files import a_ref, an_annotation, by_hand, counts_of
from risclip.pictures import (box_of, decode_mask, encode_mask, resize_mask, resize_picture,
                              run_lengths)

SIZE = (40, 50)
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
LEFT, RIGHT = [5, 5, 25, 5, 25, 25, 5, 25], [15, 10, 40, 10, 40, 30, 15, 30]


def drawn(polygon, size):
    "What a polygon covers, by a different implementation; true within a pixel of the border."
    picture = Image.new('1', size[::-1])
    ImageDraw.Draw(picture).polygon(list(zip(polygon[::2], polygon[1::2])), fill=1)
    return np.asarray(picture)


def test_polygons_are_a_union():
    both = decode_mask([LEFT, RIGHT], SIZE)
    one, other = decode_mask([LEFT], SIZE), decode_mask([RIGHT], SIZE)
    assert both.dtype == bool and both.shape == SIZE
    assert (one & other).sum() > 100  # they overlap, and the overlap belongs to the thing
    assert (both == (one | other)).all()
    assert one.sum() == 400 and (one & drawn(LEFT, SIZE)).sum() == 400


def test_disjoint_polygons_and_holes_all_count():
    small = [1, 1, 4, 1, 4, 4, 1, 4]
    apart = decode_mask([small], SIZE).sum() + decode_mask([SQUARE], SIZE).sum()
    assert decode_mask([small, SQUARE], SIZE).sum() == apart


DEGENERATE = [[[1, 2, 3, 4], SQUARE], [SQUARE, [1, 2, 3, 4]], [[5, 5], SQUARE], [[], SQUARE],
              [SQUARE + [1], SQUARE]]


@pytest.mark.parametrize('segmentation', DEGENERATE)
def test_degenerate_polygons_are_dropped_and_named(segmentation):
    with pytest.warns(UserWarning, match='annotation 17.*1 of 2 polygons'):
        mask = decode_mask(segmentation, SIZE, 'annotation 17')
    assert (mask == decode_mask([SQUARE], SIZE)).all()


@pytest.mark.parametrize('segmentation', [[[1, 2, 3, 4]], [[1, 1]], [[]], []])
def test_nothing_but_degenerate_polygons(segmentation):
    with pytest.raises(ValueError, match='annotation 17'):
        decode_mask(segmentation, SIZE, 'annotation 17')


def test_polygons_partly_outside_and_points_far_away():
    assert decode_mask([[-5, -5, 10, -5, 10, 10, -5, 10]], SIZE).sum() == 100
    for bad in (1e9, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='annotation 3'):
            decode_mask([[1, 1, bad, 1, 5, 5]], SIZE, 'annotation 3')


def some_mask(seed=0, size=SIZE):
    return np.random.default_rng(seed).random(size) < .3


def packed(mask):
    "By pycocotools."
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def test_run_lengths_compressed_and_not():
    mask = some_mask()
    text = packed(mask)['counts']
    for counts in (counts_of(mask), text, text.decode()):
        assert (decode_mask(dict(size=list(SIZE), counts=counts), SIZE) == mask).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(0, 1), st.integers(0, 10**6))
def test_run_lengths_agree_with_pycocotools(h, w, share, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((h, w)) < share if seed % 2 else np.repeat(rng.random((h, 1)) < share, w, 1)
    theirs, ours = packed(mask), encode_mask(mask)
    assert ours == dict(size=[h, w], counts=theirs['counts'].decode())
    assert run_lengths(theirs['counts']).tolist() == counts_of(mask)
    assert (decode_mask(ours, (h, w)) == mask).all()
    by_loop = dict(size=[h, w], counts=counts_of(mask))
    assert (decode_mask(by_loop, (h, w)) == coco_mask.decode(theirs).astype(bool)).all()
    if mask.any(): assert box_of(mask) == tuple(coco_mask.toBbox(theirs))
    else: assert box_of(mask) is None


def test_long_runs():
    mask = np.zeros((1500, 2000), bool)
    mask[3:1400, 5:1900] = True
    mask[700, 800] = False
    assert (decode_mask(encode_mask(mask), mask.shape) == mask).all()


BROKEN_COUNTS = ['zzzz', '\x00', '', '0'*50, '~~~~', 'é', 'PPPP', 'oooooooooooooooooo1',
                 '00000000001', [], [5, 3], [2000, 1], [2010, -10], [0.5, 3], ['a'], [[1, 2]],
                 None, 3, [10**30]]


@pytest.mark.parametrize('counts', BROKEN_COUNTS)
def test_runs_that_do_not_fill_the_picture_are_refused(counts):
    "pycocotools returns memory it never wrote for some of these."
    with pytest.raises(ValueError, match='annotation 9'):
        decode_mask(dict(size=list(SIZE), counts=counts), SIZE, 'annotation 9')


NO_MASKS = [None, 'text', 3, {}, dict(size=[1, 1], counts=[1]), dict(counts=[2000]),
            dict(size=[50, 40], counts=[2000])]


@pytest.mark.parametrize('segmentation', NO_MASKS)
def test_what_is_no_mask(segmentation):
    with pytest.raises(ValueError, match='annotation 9'):
        decode_mask(segmentation, SIZE, 'annotation 9')


def test_a_crowd_and_an_empty_mask(tmp_path):
    mask = some_mask(size=(10, 12))
    runs = dict(size=[10, 12], counts=counts_of(mask))
    crowd = an_annotation(2, 1, runs, category_id=1, iscrowd=1)
    refs = [a_ref(), a_ref(2, 2, category_id=1)]
    r = by_hand(tmp_path, refs, [an_annotation(), crowd])()
    assert (r.mask(2) == mask).all()
    assert r.category(2) == 'person' and r.things(1) == [1, 2]
    # some things of COCO are smaller than a pixel
    assert decode_mask(dict(size=[3, 2], counts=[6]), (3, 2)).sum() == 0


def test_a_bad_mask_names_annotation_and_file(tmp_path):
    r = by_hand(tmp_path, [a_ref()], [an_annotation(segmentation=[[1, 2, 3, 4]])])()
    with pytest.raises(ValueError, match='annotation 1 of .*instances.json'): r.mask(1)


# ---------------------------------------------------------------- at another size

def test_resize_mask():
    mask = np.zeros((40, 40), bool)
    mask[:20, :21] = True
    assert (resize_mask(mask, 4) == np.array([[1, 1, 0, 0]]*2 + [[0]*4]*2)).all()
    assert (resize_mask(mask, 40) == mask).all()
    assert (resize_mask(mask, 80) == mask.repeat(2, 0).repeat(2, 1)).all()
    thin = np.zeros((64, 64), bool)
    thin[10, 5:60] = True
    assert resize_mask(thin, 8).any() and resize_mask(thin, 8).sum() <= 8
    assert not resize_mask(np.zeros((9, 9), bool), 4).any()
    assert resize_mask(np.ones((9, 7), bool), 4).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**32))
def test_nothing_vanishes(h, w, size, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((h, w)) < rng.random()**3
    mask[rng.integers(h), rng.integers(w)] = True
    small = resize_mask(mask, size)
    assert small.any() and small.shape == (size, size)


def test_resize_picture():
    picture = Image.fromarray(np.full((10, 30, 3), (10, 20, 30), np.uint8))
    small = resize_picture(picture, 8)
    assert small.shape == (3, 8, 8) and small.dtype == np.uint8
    assert (small == np.array([10, 20, 30])[:, None, None]).all()
