"The writer of RefCOCO's files: a round trip of anything, faults, and the same bytes again."
import io, pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from refcoco_files import counts_of, scene
from risclip.pictures import encode_mask
from risclip.refer import MARKS, Refer, images_folder, read_refs
from risclip.writer import coco_categories, write_refer


def test_categories_are_cocos():
    meta = pytest.importorskip('torchvision.models._meta')
    theirs = {i: name for i, name in enumerate(meta._COCO_CATEGORIES)
              if name not in ('__background__', 'N/A')}
    assert coco_categories() == theirs and len(theirs) == 80
    some = {1: 'person', 18: 'dog', 37: 'sports ball', 90: 'toothbrush'}
    assert some.items() <= theirs.items()


def test_round_trip(tmp_path):
    ours = [scene(1), scene(2, size=(31, 17), split='val'), scene(3, n=3)]
    small_dog = dict(sent='small dog', kind='appearance', hidden='half', note=[1, {'a': 2.5}])
    ours[0]['objects'][0]['expressions'] = ['The Left dog, please!', small_dog]
    ours[0]['objects'][1] |= dict(category='unicorn', hidden=True, blurred=False)
    ours[2]['objects'][1].pop('expressions')
    assert write_refer(tmp_path, 'mine', 'unc', iter(ours)) == tmp_path/'mine'
    r = Refer('mine', root=tmp_path)
    assert r.counts() == {'train': (2, 4, 5), 'val': (1, 2, 2)}
    a, b = r.objects('train')[0]
    assert (a.text, a.raw, a.kind) == ('the left dog please', 'The Left dog, please!', 'all')
    assert (b.text, b.raw, b.kind) == ('small dog', 'small dog', 'appearance')
    assert b.marks == ('hidden',)
    assert read_refs(r.refs_file)[0]['sentences'][1]['note'] == [1, {'a': 2.5}]
    c, = r.objects('train')[1]
    assert (c.category, c.marks) == ('unicorn', ('hidden',))
    assert r.annotations[c.ann_id]['category_id'] > 1000
    assert r.annotations[a.ann_id]['category_id'] == 18
    assert len(r.things(3)) == 3
    assert len({e.ann_id for e in r.expressions('train') if e.image_id == 3}) == 2
    for example, image_id in zip(ours, (1, 2, 3)):
        assert (np.asarray(r.picture(image_id)) == example['picture']).all()
        for ann_id, thing in zip(r.things(image_id), example['objects'], strict=True):
            as_written(r, ann_id, thing['mask'])
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []


def as_written(r, ann_id, mask):
    "Mask, box and area of an annotation are those of the mask."
    assert (r.mask(ann_id) == mask).all()
    ys, xs = np.nonzero(mask)
    assert r.box(ann_id) == (xs.min(), ys.min(), np.ptp(xs)+1, np.ptp(ys)+1)
    assert r.annotations[ann_id]['area'] == mask.sum()
    assert isinstance(r.annotations[ann_id]['segmentation']['counts'], str)


words = st.text(st.characters(codec='utf-8', exclude_categories=('Cs',)), min_size=1, max_size=30)
kinds = st.sampled_from(['appearance', 'place', 'relation'])
sentences = st.fixed_dictionaries(dict(sent=words.filter(lambda s: s.strip())),
                                  optional=dict(kind=kinds, raw=words,
                                                note=st.integers() | st.none()))


@st.composite
def objects(draw, size, rng):
    mask = rng.random(size) < draw(st.floats(0, 1))
    mask[rng.integers(size[0]), rng.integers(size[1])] = True
    category = draw(st.sampled_from(['dog', 'cat', 'moon', 'our own']))
    marks = {m: True for m in draw(st.sets(st.sampled_from(MARKS)))}
    expressions = draw(st.lists(sentences, max_size=3))
    return dict(mask=mask, category=category, expressions=expressions) | marks


@st.composite
def data_sets(draw):
    examples = []
    for n in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 25)), draw(st.integers(1, 25))
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        # tiny pictures may be equal, and equal pictures may not be in two splits
        splits = ['train', 'val', 'testA'] if size[0]*size[1] > 8 else ['train']
        things = [draw(objects(size, rng)) for _ in range(draw(st.integers(0, 3)))]
        split = draw(st.sampled_from(splits))
        examples.append(dict(picture=picture, split=split, objects=things))
    return examples


@settings(max_examples=60, deadline=None)
@given(data_sets())
def test_any_round_trip(tmp_path_factory, examples):
    root = tmp_path_factory.mktemp('any')
    if not any(t['expressions'] for e in examples for t in e['objects']):
        with pytest.raises(ValueError, match='no example has an expression'):
            write_refer(root, 'mine', 'unc', examples)
        return
    write_refer(root, 'mine', 'unc', examples)
    r = Refer('mine', root=root)
    ann_id, written = 0, {s: [] for s in r.splits}
    for image_id, example in enumerate(examples, 1):
        assert (np.asarray(r.picture(image_id)) == example['picture']).all()
        for thing in example['objects']:
            ann_id += 1
            assert (r.mask(ann_id) == thing['mask']).all()
            assert r.category(ann_id) == thing['category']
            marks = tuple(m for m in MARKS if thing.get(m))
            for s in thing['expressions']:
                written[example['split']].append((
                    s['sent'], s.get('raw') or s['sent'], s.get('kind', 'all'), ann_id, image_id,
                    thing['category'], marks))
    for split in r.splits:
        read = [(e.text, e.raw, e.kind, e.ann_id, e.image_id, e.category, e.marks)
                for e in r.expressions(split)]
        assert read == written[split]
    numbers = {e.sent_id for s in r.splits for e in r.expressions(s)}
    assert len(numbers) == sum(map(len, written.values()))


def test_info_goes_from_the_writer_to_the_reader(tmp_path):
    write_refer(tmp_path, 'mine', 'unc', [scene(1)], info=dict(version=3, colours=((1, 2, 3),)))
    r = Refer('mine', root=tmp_path)
    assert r.info == dict(description='mine', version=3, colours=[[1, 2, 3]])
    write_refer(tmp_path, 'plain', 'unc', [scene(1)])
    assert Refer('plain', root=tmp_path).info == dict(description='plain')


# ---------------------------------------------------------------- what may be given

def png(seed=0, size=(20, 30), format='PNG'):
    "The bytes of a picture of noise."
    noise = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, format)
    return out.getvalue()


def opened(content): return Image.open(io.BytesIO(content))


def test_pictures_given_in_every_way(tmp_path):
    inside, outside = tmp_path/'shared', tmp_path/'elsewhere'
    for folder in (inside/'deep', outside): folder.mkdir(parents=True)
    (inside/'deep'/'a.png').write_bytes(png(1))
    (outside/'b.jpg').write_bytes(png(2, format='JPEG'))
    given = [png(3), png(4, format='JPEG'), inside/'deep'/'a.png', str(outside/'b.jpg'),
             opened(png(5)), np.asarray(opened(png(6))), opened(png(7)).convert('RGBA')]
    examples = (scene(i, picture=p) for i, p in enumerate(given))
    write_refer(tmp_path, 'mine', 'unc', examples, images=inside)
    r = Refer('mine', root=tmp_path, images=inside)
    names = [r.pictures[i]['file_name'] for i in range(1, 8)]
    assert names[:2] == ['000000000001.png', '000000000002.jpeg']
    assert names[2:4] == ['deep/a.png', '000000000004.jpg']
    as_given = {0: given[0], 1: given[1], 3: png(2, format='JPEG')}
    for i, content in as_given.items(): assert (inside/names[i]).read_bytes() == content
    files = sorted(p.name for p in inside.rglob('*.*'))
    assert files == sorted(n.split('/')[-1] for n in names)      # nothing was copied twice
    for i in (5, 6, 7): assert (np.asarray(r.picture(i)) == np.asarray(opened(png(i)))).all()
    write_refer(tmp_path, 'other', 'unc', [scene(1, picture=png(3), suffix='.bild')])
    assert (images_folder(tmp_path, 'other')/'000000000001.bild').exists()


def test_masks_given_in_every_way(tmp_path):
    mask = scene(1)['objects'][0]['mask']
    packed = encode_mask(mask)
    polygon = [[2, 3, 12, 3, 12, 9, 2, 9]]
    ways = [mask, mask.astype(np.uint8), mask.astype(float), packed,
            packed | dict(counts=packed['counts'].encode()),
            dict(size=[20, 30], counts=counts_of(mask)), polygon]
    objects = [dict(mask=w, category='cat', expressions=['it']) for w in ways]
    write_refer(tmp_path, 'mine', 'unc', [scene(1, objects=objects)])
    r = Refer('mine', root=tmp_path)
    for i in range(1, 7):
        assert (r.mask(i) == mask).all() and r.annotations[i]['area'] == mask.sum()
    assert r.annotations[7]['segmentation'] == polygon
    assert r.mask(7).sum() == 60 and r.box(7) == (2, 3, 10, 6)


def test_sets_that_share_their_pictures(tmp_path):
    write_refer(tmp_path, 'refmoji', 'unc', [scene(i, image_id=100+i) for i in range(3)])
    shared = tmp_path/'images'/'refmoji'
    before = {p: p.stat().st_mtime_ns for p in shared.iterdir()}
    examples = (scene(i, image_id=np.int64(100+i), picture=shared/f'{100+i:012d}.png', split='test')
                for i in (2, 0))
    write_refer(tmp_path, 'refmojig', 'umd', examples)
    assert {p: p.stat().st_mtime_ns for p in shared.iterdir()} == before
    a, b = Refer('refmoji', root=tmp_path), Refer('refmojig', root=tmp_path)
    assert list(b.pictures) == [102, 100] and b.splits == ['test']
    assert (np.asarray(a.picture(102)) == np.asarray(b.picture(102))).all()
    # the same pictures again are the same files
    write_refer(tmp_path, 'refmoji+', 'unc', [scene(i, image_id=100+i) for i in range(3)])
    with pytest.raises(ValueError, match='000000000100.png.*another picture'):
        write_refer(tmp_path, 'again', 'unc', [scene(9, image_id=100)], images=shared)
    assert {p: p.stat().st_mtime_ns for p in shared.iterdir()} == before


def test_same_input_same_bytes(tmp_path):
    def examples(fresh):
        for i in range(4):
            e = scene(i)
            phrase = 'the left dog'              # one object twice, or two equal ones
            again = ''.join(list(phrase)) if fresh else phrase
            e['objects'][0]['expressions'] = [phrase, again]
            yield e
    files = []
    for fresh in (True, False):
        root = tmp_path/str(fresh)
        folder = write_refer(root, 'mine', 'unc', examples(fresh))
        written = [*folder.iterdir(), *(root/'images'/'mine').iterdir()]
        files.append({p.name: p.read_bytes() for p in written})
    assert files[0] == files[1] and len(files[0]) == 6


def test_others_can_read_what_we_write(tmp_path, capsys):
    "The refer API reads with plain pickle; pycocotools reads instances.json."
    from pycocotools.coco import COCO
    write_refer(tmp_path, 'mine', 'unc', [scene(1), scene(2, split='val')])
    content = (tmp_path/'mine'/'refs(unc).p').read_bytes()
    refs = pickle.loads(content)
    assert set(refs[0]) == {'ref_id', 'ann_id', 'category_id', 'image_id', 'file_name', 'split',
                            'sent_ids', 'sentences'}
    assert set(refs[0]['sentences'][0]) == {'sent_id', 'raw', 'sent', 'tokens'}
    assert content[:2] == b'\x80\x02'
    coco, r = COCO(str(tmp_path/'mine'/'instances.json')), Refer('mine', root=tmp_path)
    for ref in refs:
        theirs = coco.annToMask(coco.loadAnns(ref['ann_id'])[0]).astype(bool)
        assert (theirs == r.mask(ref['ann_id'])).all()
        assert coco.loadCats(ref['category_id'])[0]['name'] == 'dog'


# ---------------------------------------------------------------- what is refused

def wrong(**change):
    "An example whose first object is changed."
    e = scene(1)
    e['objects'][0] |= change
    return e


@pytest.mark.parametrize('example, why', [
    (wrong(mask=np.zeros((20, 30), bool)), 'empty'),
    (wrong(mask=np.ones((30, 20), bool)), r'\(30, 20\)'),
    (wrong(mask=np.full((20, 30), 255)), 'mask > 0'),
    (wrong(mask=np.full((20, 30), .5)), 'mask > 0'),
    (wrong(mask=np.ones((1, 20, 30), bool)), r'\(1, 20, 30\)'),
    (wrong(mask=[[1, 2, 3, 4]]), 'polygon'),
    (wrong(mask=[[100, 100, 120, 100, 120, 120]]), 'empty'),
    (wrong(mask=dict(size=[20, 30], counts='zz')), 'runs'),
    (wrong(mask=None), r'\(\)'),
    (wrong(category=''), 'category'),
    (wrong(category=7), 'category'),
    (wrong(expressions=['']), 'no words'),
    (wrong(expressions=['  ?! ']), 'no words'),
    (wrong(expressions=[dict(sent=' ')]), 'no words'),
    (wrong(expressions=[dict(kind='place')]), 'no words'),
    (wrong(expressions=[dict(sent='a', note=np.zeros(2))]), 'ndarray'),
    (wrong(expresions=['a dog']), 'expresions'),
    (scene(1, picture=b'no picture'), 'Pillow'),
    (scene(1, picture=np.full((20, 30, 3), 255.)), 'floats from 255'),
    (scene(1, picture=np.zeros((20, 30, 3), int)), 'give uint8'),
    (scene(1, split=''), 'split'),
    (scene(1, split=None), 'split'),
    (scene(1, spilt='train'), 'spilt'),
    (scene(1, image_id='one'), 'str'),
    (scene(1, image_id=1), 'image_id 1'),
    ({k: v for k, v in scene(1).items() if k != 'split'}, "'split' is missing"),
    (scene(1, objects=[dict(category='dog')]), "'mask' is missing"),
])
def test_a_wrong_example_is_named_and_nothing_is_left(tmp_path, example, why):
    with pytest.raises(ValueError, match=rf'example 1 of mine: .*{why}'):
        write_refer(tmp_path, 'mine', 'unc', [scene(0), example])
    assert not (tmp_path/'mine').exists() and not list(tmp_path.glob('.*'))


def test_splits_share_no_picture(tmp_path):
    with pytest.raises(ValueError, match='example 1.*is in val.*in train'):
        write_refer(tmp_path, 'mine', 'unc', [scene(1), scene(1, split='val')])
    # twice in one split: two pictures that look the same
    write_refer(tmp_path, 'mine', 'unc', [scene(1), scene(1)])
    assert Refer('mine', root=tmp_path).counts()['train'] == (2, 4, 4)


def test_a_missing_picture_stays_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError, match='example 0.*none.png'):
        write_refer(tmp_path, 'mine', 'unc', [scene(1, picture=tmp_path/'none.png')])


def test_overwrite(tmp_path):
    write_refer(tmp_path, 'mine', 'unc', [scene(1), scene(2)])
    with pytest.raises(FileExistsError, match='overwrite=True'):
        write_refer(tmp_path, 'mine', 'unc', [scene(3)])
    with pytest.raises(ValueError):
        write_refer(tmp_path, 'mine', 'unc', [scene(3), wrong(category='')], overwrite=True)
    assert Refer('mine', root=tmp_path).counts()['train'][0] == 2
    write_refer(tmp_path, 'mine', 'umd', [scene(3)], overwrite=True)
    r = Refer('mine', root=tmp_path)
    assert r.split_by == 'umd' and (np.asarray(r.picture(1)) == scene(3)['picture']).all()


def test_examples_stream(tmp_path):
    "A picture is on disk before the next example is asked for."
    def examples():
        for i in range(3):
            yield scene(i)
            assert (tmp_path/'images'/'mine'/f'{i+1:012d}.png').exists()
    write_refer(tmp_path, 'mine', 'unc', examples())
    def breaks():
        yield scene(0)
        raise RuntimeError('the generator broke')
    with pytest.raises(RuntimeError, match='the generator broke'):
        write_refer(tmp_path, 'second', 'unc', breaks())
    assert not (tmp_path/'second').exists()
