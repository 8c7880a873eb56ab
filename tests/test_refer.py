"The reader and the writer of RefCOCO's files: formats as they are found, faults, and a round trip of anything."
import builtins, copyreg, io, json, os, pickle, random, struct, subprocess, sys, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

import risclip.refer as refer_module
from risclip.refer import (COCO_CATEGORIES, PUBLISHED_COUNTS, Batch, Expression, JointRefer, Refer, ReferDataset, data_folder, decode_mask,
                           images_folder, read_refs, resize_mask, resize_picture, run_lengths, write_refer)

# ---------------------------------------------------------------- pickles as Python 2 wrote them

def python2(value, protocol=2, text=lambda s: s.encode('utf-8')):
    """Bytes that Python 2's cPickle would write: str becomes a byte string (Python 2's str), `bytes` are kept as they are,
    a `Unicode` becomes unicode, ints beyond 32 bits become longs."""
    out = bytearray(b'\x80\x02' if protocol == 2 else b'')
    def put(v):
        if isinstance(v, Unicode):
            raw = str(v).encode('utf-8')
            out.extend(b'X' + struct.pack('<I', len(raw)) + raw if protocol == 2 else b'V' + str(v).encode('raw_unicode_escape') + b'\n')
        elif isinstance(v, (str, bytes)):
            raw = v if isinstance(v, bytes) else text(v)
            if protocol == 0: out.extend(b'S' + repr(raw)[1:].encode('ascii') + b'\n')
            elif len(raw) < 256: out.extend(b'U' + bytes([len(raw)]) + raw)
            else: out.extend(b'T' + struct.pack('<i', len(raw)) + raw)
        elif v is None: out.extend(b'N')
        elif isinstance(v, bool): out.extend((b'\x88' if v else b'\x89') if protocol == 2 else (b'I01\n' if v else b'I00\n'))
        elif isinstance(v, int):
            if protocol == 0: out.extend(f'I{v}\n'.encode() if abs(v) < 2**31 else f'L{v}L\n'.encode())
            elif abs(v) < 2**31: out.extend(b'J' + struct.pack('<i', v))
            else: raw = pickle.encode_long(v); out.extend(b'\x8a' + bytes([len(raw)]) + raw)
        elif isinstance(v, float): out.extend(b'G' + struct.pack('>d', v) if protocol == 2 else f'F{v!r}\n'.encode())
        elif isinstance(v, list):
            out.extend(b']' if protocol == 2 else b'(l')
            for x in v: put(x); out.extend(b'a')
        elif isinstance(v, dict):
            out.extend(b'}' if protocol == 2 else b'(d')
            for k, x in v.items(): put(k); put(x); out.extend(b's')
        else: raise TypeError(v)
    put(value)
    return bytes(out) + b'.'

class Unicode(str): pass

def a_ref(ref_id=1, ann_id=1, image_id=1, split='train', sents=('red ball',), category_id=37, **keys):
    return dict(ref_id=ref_id, ann_id=ann_id, image_id=image_id, category_id=category_id, split=split,
                file_name=f'COCO_train2014_{image_id:012d}_{ann_id}.jpg', sent_ids=[100*ref_id+i for i in range(len(sents))],
                sentences=[dict(sent_id=100*ref_id+i, raw=s, sent=s, tokens=s.split()) for i, s in enumerate(sents)], **keys)

def an_annotation(ann_id=1, image_id=1, segmentation=None, category_id=37, **keys):
    return dict(id=ann_id, image_id=image_id, category_id=category_id, bbox=[2., 1., 4., 3.], area=12., iscrowd=0,
                segmentation=segmentation or [[2, 1, 6, 1, 6, 4, 2, 4]]) | keys

def by_hand(root, refs, annotations=None, name='mine', split_by='unc', size=(10, 12), images=None, pickled=None):
    "A data set as others write it: pickled refs, instances.json, pictures."
    folder = root/name
    folder.mkdir(parents=True, exist_ok=True)
    ids = sorted({r['image_id'] for r in refs} if isinstance(refs, list) else {1})
    instances = dict(images=[dict(id=i, file_name=f'{i:06d}.png', height=size[0], width=size[1]) for i in ids],
                     annotations=annotations or [an_annotation(r['ann_id'], r['image_id']) for r in refs],
                     categories=[dict(id=1, name='person', supercategory='person'), dict(id=37, name='sports ball', supercategory='sports')])
    (folder/'instances.json').write_text(json.dumps(instances))
    (folder/f'refs({split_by}).p').write_bytes(pickled if pickled is not None else python2(refs))
    where = images or images_folder(root, name)
    where.mkdir(parents=True, exist_ok=True)
    for i in ids: Image.new('RGB', size[::-1], (i % 256, 90, 30)).save(where/f'{i:06d}.png')
    return lambda **keys: Refer(name, split_by, root, **keys)

@pytest.mark.parametrize('protocol', [0, 2])
def test_python2_pickle(tmp_path, protocol):
    refs = [a_ref(2, 2, 7, sents=('man on left', 'guy')), a_ref(1, 1, 5, 'val', sents=("dog's ear",), extra=2**40, some=[1.5, None, True])]
    r = by_hand(tmp_path, refs, pickled=python2(refs, protocol))()
    assert r.splits == ['train', 'val']
    assert [e.text for e in r.expressions('train')] == ['man on left', 'guy']
    e, = r.expressions('val')
    assert e == Expression(100, 1, 1, 5, 'val', "dog's ear", "dog's ear", 'sports ball', 'all', ()) and e.length == 2
    assert type(e.text) is str and read_refs(r.refs_file)[1]['extra'] == 2**40

@pytest.mark.parametrize('encode, text', [(lambda s: s.encode('utf-8'), 'café naïve'), (lambda s: s.encode('latin1'), 'café naïve'),
                                          (lambda s: s.encode('utf-8'), '왼쪽 사람')])
@pytest.mark.parametrize('protocol', [0, 2])
def test_python2_bytes_that_are_not_ascii(tmp_path, encode, text, protocol):
    refs = [a_ref(sents=(text, 'plain'))]
    r = by_hand(tmp_path, refs, pickled=python2(refs, protocol, encode))()
    assert [e.text for e in r.expressions('train')] == [text, 'plain']

def test_python2_unicode_and_long_strings(tmp_path):
    refs = [a_ref(sents=('x '*400, 'short'))]
    refs[0]['sentences'][1]['raw'] = Unicode('l’été')
    r = by_hand(tmp_path, refs)()
    long, short = r.expressions('train')
    assert long.length == 400 and short.raw == 'l’été'

@pytest.mark.parametrize('protocol', range(6))
def test_python3_pickles_too(tmp_path, protocol):
    refs = [a_ref(note=b'bytes' if protocol > 2 else 'text')]
    assert by_hand(tmp_path, refs, pickled=pickle.dumps(refs, protocol))().expressions('train')[0].text == 'red ball'

def test_what_was_read_is_kept_beside_the_pickle(tmp_path, monkeypatch):
    "The second time nothing is unpickled; a pickle that has changed is read again; what is torn, of another file, or no refs at all is not believed."
    path, kept = tmp_path/'refs(unc).p', tmp_path/'refs(unc).json'
    unpickled = []
    load = refer_module._PlainUnpickler.load
    monkeypatch.setattr(refer_module._PlainUnpickler, 'load', lambda self: unpickled.append(1) or load(self))
    path.write_bytes(python2([a_ref()]))
    first = read_refs(path)
    assert read_refs(path) == first and len(unpickled) == 1
    path.write_bytes(python2([a_ref(), a_ref(2, 2, 2)]))
    assert len(read_refs(path)) == 2 and len(unpickled) == 2
    whole = kept.read_text()
    for spoilt in (whole[:-9], '[]', '{}', whole.replace('ref_id', 'ref'), whole.replace(json.loads(whole)['sha256'], '0'*64), '{"sha256": 3, "refs": []}'):
        kept.write_text(spoilt)
        assert len(read_refs(path)) == 2 and kept.read_text() == whole
    assert len(unpickled) == 8 and sorted(f.name for f in tmp_path.iterdir()) == [kept.name, path.name]


def test_what_json_cannot_say_is_not_kept(tmp_path):
    for n, more in enumerate((dict(note=b'bytes'), {3: 4}, dict(note=float('nan')), dict(note=(1, 2)))):
        path = tmp_path/f'refs({n}).p'
        path.write_bytes(pickle.dumps([a_ref(**more) if 'note' in more else a_ref() | more], 4))
        read_refs(path); assert read_refs(path)[0]['ref_id'] == 1
    assert not list(tmp_path.glob('*.json'))


def test_a_folder_that_cannot_be_written_is_no_trouble(tmp_path, monkeypatch):
    path = tmp_path/'refs(unc).p'
    path.write_bytes(python2([a_ref()]))
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_text', full)
    assert read_refs(path) == read_refs(path) and [f.name for f in tmp_path.iterdir()] == [path.name]

# ---------------------------------------------------------------- hostile pickles

RAN = []
def touch(*args): RAN.append(args)

class Runs:
    def __init__(self, function, *args): self.what = function, args
    def __reduce__(self): return self.what

def hostile():
    yield 'os.system by hand', b"cos\nsystem\n(S'echo ran > ran.txt'\ntR.", 'os.system'
    yield 'posix', b"cposix\nsystem\n(S'echo ran > ran.txt'\ntR.", 'posix.system'
    yield 'inst', b"(S'echo ran > ran.txt'\nios\nsystem\n.", 'os.system'
    yield 'python 2 eval', b"\x80\x02c__builtin__\neval\nU\x13open('ran.txt','w')\x85R.", 'eval'
    yield 'obj', b"\x80\x02(cos\nsystem\nU\x12echo ran > ran.txto.", 'os.system'
    for protocol in range(6):
        yield f'reduce {protocol}', pickle.dumps([a_ref(), Runs(touch, 1)], protocol), 'touch'
        yield f'in a sentence {protocol}', pickle.dumps([a_ref(sents=('a',), more=Runs(exec, "open('ran.txt','w')"))], protocol), 'exec'
    yield 'getattr', b"c__builtin__\ngetattr\n(cos\npath\nS'join'\ntR.", 'getattr'
    yield 'a class', pickle.dumps([Path('.')], 2), 'pathlib'
    yield 'numpy', pickle.dumps([np.float64(1)], 2), 'numpy'
    yield 'copyreg', b"ccopy_reg\n_reconstructor\n(c__builtin__\nobject\nc__builtin__\nobject\nNtR.", 'copy_reg._reconstructor'
    yield 'build', b"cos\nenviron\n}S'A'\nS'b'\nsb.", 'os.environ'
    yield 'codecs', pickle.dumps([b'bytes of python 3'], 2), '_codecs.encode'
    yield 'set', pickle.dumps([{1, 2}], 2), 'set'

@pytest.mark.parametrize('content, name', [pytest.param(c, n, id=i) for i, c, n in hostile()])
def test_a_hostile_pickle_runs_nothing(tmp_path, monkeypatch, content, name):
    monkeypatch.chdir(tmp_path)
    RAN.clear()
    load = by_hand(tmp_path, [a_ref()], pickled=content)
    with pytest.raises(ValueError) as e: load()
    assert not RAN and not (tmp_path/'ran.txt').exists()
    assert 'refs(unc).p' in str(e.value) and name in str(e.value) and str(tmp_path) in str(e.value)

def test_the_hostile_pickles_do_run_elsewhere(tmp_path, monkeypatch):
    "Otherwise the test above could not fail."
    monkeypatch.chdir(tmp_path)
    for i, content, name in hostile():
        if i in ('os.system by hand', 'inst', 'obj', 'python 2 eval', 'in a sentence 2'):
            (tmp_path/'ran.txt').unlink(missing_ok=True)
            try: pickle.loads(content)
            except Exception: pass
            assert (tmp_path/'ran.txt').exists(), i

def test_registered_extensions_and_persistent_ids_are_refused(tmp_path):
    copyreg.add_extension(__name__, 'touch', 240)
    try:
        RAN.clear()
        with pytest.raises(ValueError, match='touch'): by_hand(tmp_path, [a_ref()], pickled=b'\x80\x02\x82\xf0)R.')()
        assert not RAN
    finally: copyreg.remove_extension(__name__, 'touch', 240)
    with pytest.raises(ValueError, match='persistent'): by_hand(tmp_path, [a_ref()], pickled=b"Pthing\n.")()

@pytest.mark.parametrize('content', [b'', b'\x80\x02', b'not a pickle', b'\x80\x63.', python2([a_ref()])[:-20], b'}.', b'(lp0\n.' + b'x', b'].'[:1],
                                     python2({'a': 1}), python2([1, 2]), python2([dict(ref_id=1)]), b'\x80\x02X\x02\x00\x00\x00\xff\xfe.',
                                     b'(' * 10 + b'.', b'0' * 5, b'<html>404 Not Found</html>', b'version https://git-lfs.github.com/spec/v1\n'])
def test_a_broken_pickle_is_named(tmp_path, content):
    load = by_hand(tmp_path, [a_ref()], pickled=content)
    if content == b'(lp0\n.x': return  # an empty list with something after it
    with pytest.raises(ValueError, match=r'refs\(unc\)\.p'): load()

def test_truncated_anywhere(tmp_path):
    content = python2([a_ref(sents=('one', 'two'))])
    path = tmp_path/'refs(unc).p'
    for n in range(len(content)):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError): read_refs(path)
    path.write_bytes(content)
    assert len(read_refs(path)[0]['sentences']) == 2

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits its own memory')
def test_a_damaged_file_cannot_ask_for_all_memory(tmp_path):
    "pickle's reader in C makes room for 2**31 remembered things here, 16 GiB; so this runs under a limit."
    path = tmp_path/'refs(unc).p'
    path.write_bytes(b'\x80\x02]r\x00\x00\x00\x40.')
    code = ("import resource, risclip.refer as r; now = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize();"
            f"resource.setrlimit(resource.RLIMIT_AS, (now + 2**30,)*2); print(r.read_refs({str(path)!r}))")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)})
    assert out.stdout.strip() == '[]', out.stderr

@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 300))
def test_random_damage_never_runs_anything(tmp_path_factory, noise, at):
    content = bytearray(python2([a_ref()]))
    at %= len(content)
    content[at:at+len(noise)] = noise
    path = tmp_path_factory.getbasetemp()/'damaged.p'
    path.write_bytes(bytes(content))
    try: assert all(isinstance(ref, dict) for ref in read_refs(path))
    except ValueError: pass

# ---------------------------------------------------------------- masks

def drawn(polygon, size):
    "What a polygon covers, by a different implementation; true inside, within a pixel of the border."
    picture = Image.new('1', size[::-1])
    ImageDraw.Draw(picture).polygon(list(zip(polygon[::2], polygon[1::2])), fill=1)
    return np.asarray(picture)

SIZE = (40, 50)
SQUARE, LEFT, RIGHT = [10, 10, 30, 10, 30, 30, 10, 30], [5, 5, 25, 5, 25, 25, 5, 25], [15, 10, 40, 10, 40, 30, 15, 30]

def test_polygons_are_a_union():
    both, one, other = decode_mask([LEFT, RIGHT], SIZE), decode_mask([LEFT], SIZE), decode_mask([RIGHT], SIZE)
    assert both.dtype == bool and both.shape == SIZE
    assert (one & other).sum() > 100  # they overlap, and the overlap belongs to the thing
    assert (both == (one | other)).all()
    assert one.sum() == 400 and (one & drawn(LEFT, SIZE)).sum() == 400

def test_disjoint_polygons_and_holes_are_all_kept():
    small = [1, 1, 4, 1, 4, 4, 1, 4]
    assert decode_mask([small, SQUARE], SIZE).sum() == decode_mask([small], SIZE).sum() + decode_mask([SQUARE], SIZE).sum()

@pytest.mark.parametrize('segmentation', [[[1, 2, 3, 4], SQUARE], [SQUARE, [1, 2, 3, 4]], [[5, 5], SQUARE], [[], SQUARE], [SQUARE + [1], SQUARE]])
def test_degenerate_polygons_are_dropped_and_named(segmentation):
    with pytest.warns(UserWarning, match='annotation 17.*1 of 2 polygons'): mask = decode_mask(segmentation, SIZE, 'annotation 17')
    assert (mask == decode_mask([SQUARE], SIZE)).all()

@pytest.mark.parametrize('segmentation', [[[1, 2, 3, 4]], [[1, 1]], [[]], []])
def test_nothing_but_degenerate_polygons(segmentation):
    with pytest.raises(ValueError, match='annotation 17'): decode_mask(segmentation, SIZE, 'annotation 17')

def test_polygons_partly_outside_and_points_far_away():
    assert decode_mask([[-5, -5, 10, -5, 10, 10, -5, 10]], SIZE).sum() == 100
    for bad in (1e9, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='annotation 3'): decode_mask([[1, 1, bad, 1, 5, 5]], SIZE, 'annotation 3')

def some_mask(seed=0, size=SIZE):
    return np.random.default_rng(seed).random(size) < .3

def counts_of(mask):
    "Uncompressed run lengths, by a loop."
    flat, runs, now = mask.flatten(order='F').tolist(), [0], False
    for v in flat:
        if v != now: runs.append(0); now = v
        runs[-1] += 1
    return runs

def test_run_lengths_compressed_and_not():
    mask = some_mask()
    packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    for counts in (counts_of(mask), packed['counts'], packed['counts'].decode()):
        assert (decode_mask(dict(size=list(SIZE), counts=counts), SIZE) == mask).all()

@settings(max_examples=100, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(0, 1), st.integers(0, 10**6))
def test_run_lengths_agree_with_pycocotools(h, w, share, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((h, w)) < share if seed % 2 else np.repeat(rng.random((h, 1)) < share, w, 1)
    packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert run_lengths(packed['counts']).tolist() == counts_of(mask)
    assert (decode_mask(dict(size=[h, w], counts=packed['counts'].decode()), (h, w)) == mask).all()
    assert (decode_mask(dict(size=[h, w], counts=counts_of(mask)), (h, w)) == coco_mask.decode(packed).astype(bool)).all()

def test_long_runs():
    mask = np.zeros((1500, 2000), bool); mask[3:1400, 5:1900] = True; mask[700, 800] = False
    packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert (decode_mask(dict(size=[1500, 2000], counts=packed['counts'].decode()), (1500, 2000)) == mask).all()

@pytest.mark.parametrize('counts', ['zzzz', '\x00', '', '0'*50, '~~~~', 'é', 'PPPP', 'oooooooooooooooooo1', '00000000001', [], [5, 3], [2000, 1],
                                    [2010, -10], [0.5, 3], ['a'], [[1, 2]], None, 3, [10**30]])
def test_runs_that_do_not_fill_the_picture_are_refused(counts):
    "pycocotools returns memory it never wrote for some of these."
    with pytest.raises(ValueError, match='annotation 9'): decode_mask(dict(size=list(SIZE), counts=counts), SIZE, 'annotation 9')

@pytest.mark.parametrize('segmentation', [None, 'text', 3, {}, dict(size=[1, 1], counts=[1]), dict(counts=[2000]), dict(size=[50, 40], counts=[2000])])
def test_what_is_no_mask(segmentation):
    with pytest.raises(ValueError, match='annotation 9'): decode_mask(segmentation, SIZE, 'annotation 9')

def test_a_crowd_and_an_empty_mask(tmp_path):
    mask = some_mask(size=(10, 12))
    crowd = an_annotation(2, 1, dict(size=[10, 12], counts=counts_of(mask)), category_id=1, iscrowd=1)
    r = by_hand(tmp_path, [a_ref(), a_ref(2, 2, category_id=1)], [an_annotation(), crowd])()
    assert (r.mask(2) == mask).all() and r.category(2) == 'person' and r.things(1) == [1, 2]
    assert decode_mask(dict(size=[3, 2], counts=[6]), (3, 2)).sum() == 0  # some things of COCO are smaller than a pixel

def test_a_bad_mask_names_annotation_and_file(tmp_path):
    r = by_hand(tmp_path, [a_ref()], [an_annotation(segmentation=[[1, 2, 3, 4]])])()
    with pytest.raises(ValueError, match='annotation 1 of .*instances.json'): r.mask(1)

# ---------------------------------------------------------------- reading

def four_splits(root, name='refcoco', **keys):
    refs = [a_ref(i, i, i, s, (f'thing {i}', f'that {i}')) for i, s in enumerate(('testB', 'train', 'val', 'testA', 'train'), 1)]
    return by_hand(root, refs, name=name, **keys)

def test_test_is_never_both(tmp_path):
    with pytest.warns(UserWarning): r = four_splits(tmp_path)()
    assert r.splits == ['train', 'val', 'testA', 'testB']
    for ask in (r.expressions, r.objects):
        with pytest.raises(ValueError, match='testA and testB'): ask('test')
        for near in ('tests', 'Val', 'testAB', 'traini'):
            with pytest.raises(ValueError, match='train, val, testA, testB'): ask(near)
    assert [e.text for e in r.expressions('testA')] == ['thing 4', 'that 4']
    with pytest.raises(ValueError, match='testA and testB'): ReferDataset(r, 'test', 8, None, (0,)*3, (1,)*3)

def test_order_and_grouping(tmp_path):
    refs = [a_ref(9, 1, 1, sents=('i', 'j')), a_ref(3, 2, 1, sents=('a', 'b', 'c'))]
    refs[1]['sentences'].reverse()
    r = by_hand(tmp_path, refs)()
    assert [[e.text for e in o] for o in r.objects('train')] == [['a', 'b', 'c'], ['i', 'j']]
    assert r.expressions('train') == [e for o in r.objects('train') for e in o]
    assert r.counts() == {'train': (1, 2, 5)}

def test_the_file_name_of_a_ref_is_ignored(tmp_path):
    r = by_hand(tmp_path, [a_ref(image_id=3)])()
    assert read_refs(r.refs_file)[0]['file_name'] == 'COCO_train2014_000000000003_1.jpg'
    assert np.asarray(r.picture(3))[0, 0].tolist() == [3, 90, 30]

def test_kind_marks_box_size_raw(tmp_path):
    ref = a_ref(sents=('red ball',))
    ref['sentences'][0] |= dict(kind='appearance', raw='Red ball!', blurred=True, hidden=False)
    r = by_hand(tmp_path, [ref], [an_annotation(cut=1), an_annotation(5)])()
    e, = r.expressions('train')
    assert (e.kind, e.marks, e.raw, e.text) == ('appearance', ('cut', 'blurred'), 'Red ball!', 'red ball')
    assert r.box(1) == (2., 1., 4., 3.) and r.size(1) == (10, 12) and r.things(1) == [1, 5] and r.things(99) == []
    assert hash(e) and pickle.loads(pickle.dumps(e)) == e
    with pytest.raises(AttributeError): e.text = 'other'

def test_published_counts_warn_with_both_numbers(tmp_path, monkeypatch):
    load = four_splits(tmp_path)
    with pytest.warns(UserWarning, match=r'train has \(2, 2, 4\) instead of \(16994, 42404, 120624\)') as w: load()
    assert 'refs(unc).p' in str(w[0].message)
    right = dict(train=(2, 2, 4), val=(1, 1, 2), testA=(1, 1, 2), testB=(1, 1, 2))
    monkeypatch.setitem(PUBLISHED_COUNTS, ('refcoco', 'unc'), right)
    with warnings.catch_warnings(): warnings.simplefilter('error'); load()
    monkeypatch.setitem(PUBLISHED_COUNTS, ('refcoco', 'unc'), right | dict(val=(1, 1, 3)))
    with pytest.warns(UserWarning) as w: load()
    assert 'val' in str(w[0].message) and 'train' not in str(w[0].message)

def test_published_counts_sum_to_the_published_totals():
    total = lambda key: [sum(n) for n in zip(*PUBLISHED_COUNTS[key].values())]
    assert total(('refcoco', 'unc')) == [19994, 50000, 142210]
    assert total(('refcoco+', 'unc')) == [19992, 49856, 141564]
    assert total(('refcocog', 'umd')) == [25799, 49822, 95010]
    assert total(('refcocog', 'google'))[1:] == [49822, 95010]

def test_an_unknown_set_does_not_warn(tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        four_splits(tmp_path, 'mine')()
    assert not [w for w in seen if issubclass(w.category, UserWarning)]

def test_which_split_by(tmp_path):
    by_hand(tmp_path, [a_ref()], split_by='umd')
    assert Refer('mine', root=tmp_path).split_by == 'umd'
    by_hand(tmp_path, [a_ref()], split_by='google')
    with pytest.raises(ValueError, match='google, umd'): Refer('mine', root=tmp_path)
    assert Refer('mine', 'google', tmp_path).split_by == 'google'
    with pytest.raises(FileNotFoundError, match=r'refs\(unc\)\.p'): Refer('mine', 'unc', tmp_path)

def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='refcocog.*data/README.md'): Refer('refcocog', root=tmp_path)
    with pytest.raises(FileNotFoundError, match='make data'): Refer('refmoji+', root=tmp_path)
    load = by_hand(tmp_path, [a_ref()])
    r = load()
    (r.images/'000001.png').unlink()
    with pytest.raises(FileNotFoundError, match='000001.png.*images='): r.picture(1)
    (r.images/'000001.png').write_bytes(b'no picture')
    with pytest.raises(OSError, match='000001.png'): r.picture(1)
    whole = io.BytesIO(); Image.fromarray(np.random.default_rng(0).integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(whole, 'PNG')
    (r.images/'000001.png').write_bytes(whole.getvalue()[:150])
    with pytest.raises(OSError, match='000001.png'): r.picture(1)
    Image.new('RGB', (5, 5)).save(r.images/'000001.png')
    with pytest.raises(ValueError, match=r'000001.png is \(5, 5\).*\(10, 12\)'): r.picture(1)
    r.instances_file.unlink()
    with pytest.raises(FileNotFoundError, match='instances.json'): load()

@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'{}', b'{"images": 3, "annotations": [], "categories": []}', b'\xff\xfe', b'<html>'])
def test_a_broken_instances_json_is_named(tmp_path, content):
    load = by_hand(tmp_path, [a_ref()])
    (tmp_path/'mine'/'instances.json').write_bytes(content)
    with pytest.raises(ValueError, match='instances.json'): load()

@pytest.mark.parametrize('ref, lost', [(a_ref(ann_id=4), 'annotation 4'), (a_ref(image_id=8), 'picture 8')])
def test_files_of_different_sets(tmp_path, ref, lost):
    by_hand(tmp_path, [a_ref()])
    (tmp_path/'mine'/'refs(unc).p').write_bytes(python2([ref]))
    with pytest.raises(ValueError, match=f'ref 1 needs {lost}.*instances.json'): Refer('mine', root=tmp_path)

def test_inconsistent_refs(tmp_path):
    by_hand(tmp_path, [a_ref(1, 1, 1), a_ref(2, 2, 2)])
    (tmp_path/'mine'/'refs(unc).p').write_bytes(python2([a_ref(1, 1, 2)]))
    with pytest.raises(ValueError, match='ref 1 is in picture 2'): Refer('mine', root=tmp_path)
    ref = a_ref(); del ref['sentences'][0]['sent']
    (tmp_path/'mine'/'refs(unc).p').write_bytes(python2([ref]))
    with pytest.raises(ValueError, match='sentence of ref 1'): Refer('mine', root=tmp_path)

@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'CMYK'])
def test_pictures_come_as_rgb(tmp_path, mode):
    r = by_hand(tmp_path, [a_ref()])()
    Image.new(mode, (12, 10)).save(r.images/'000001.png', 'JPEG' if mode == 'CMYK' else 'PNG')
    assert r.picture(1).mode == 'RGB'

def test_colours_of_other_modes(tmp_path):
    "Sixteen bits of grey keep their shades, four inks their colour, and what is transparent is white."
    r = by_hand(tmp_path, [a_ref()], size=(2, 3))()
    file, shades = r.images/'000001.png', np.array([[0, 100, 200], [257*64, 257*128, 65535]], np.uint16)
    Image.fromarray(shades).save(file)
    assert np.asarray(r.picture(1))[..., 0].tolist() == [[0, 0, 1], [64, 128, 255]]
    Image.new('CMYK', (3, 2), (0, 255, 255, 0)).save(file, 'TIFF')
    assert r.picture(1).getpixel((1, 1)) == (255, 0, 0)
    Image.new('RGBA', (3, 2), (255, 0, 0, 0)).save(file)
    assert r.picture(1).getpixel((0, 0)) == (255, 255, 255)
    Image.new('F', (3, 2), 7.).save(file, 'TIFF')
    with pytest.raises(OSError, match=r'000001.png cannot be read as a picture: the array holds floats from 7 to 7'): r.picture(1)

@pytest.mark.parametrize('note', range(1, 9))
def test_exif_rotation(tmp_path, note):
    "The stated size says on which way up the masks were drawn: a note to turn the picture is followed if it fits only then."
    upright = np.zeros((10, 12, 3), np.uint8); upright[:4, :6] = 255, 0, 0
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[note]         # Pillow's transpositions that undo the note's (FLIP_LEFT_RIGHT is 0)
    exif = Image.Exif(); exif[0x0112] = note
    stored = Image.fromarray(upright) if back is None else Image.fromarray(upright).transpose(Image.Transpose(back))
    r = by_hand(tmp_path, [a_ref()], size=(10, 12))()
    stored.save(r.images/'000001.png', exif=exif)
    found = np.asarray(r.picture(1))
    assert (found == (upright if note >= 5 else np.asarray(stored))).all()   # notes 2 to 4 keep the size: as stored
    r = by_hand(tmp_path/'other', [a_ref()], size=stored.size[::-1])()       # the masks were drawn on what is stored
    stored.save(r.images/'000001.png', exif=exif)
    assert (np.asarray(r.picture(1)) == np.asarray(stored)).all()

def test_a_picture_of_another_size_is_refused_whatever_its_note(tmp_path):
    exif = Image.Exif(); exif[0x0112] = 6
    r = by_hand(tmp_path, [a_ref()], size=(10, 12))()
    for size in ((10, 11), (13, 12)):
        Image.new('RGB', size).save(r.images/'000001.png', exif=exif)
        with pytest.raises(ValueError, match='says .10, 12. .height, width.'): r.picture(1)

# ---------------------------------------------------------------- several sets as one

def pictures_and_sets(root):
    "Three sets over eight pictures of one folder, with the same ref_ids and other splits: as RefCOCO, + and g."
    where = root/'images'
    splits = dict(a=('unc', {1: 'train', 2: 'train', 3: 'train', 4: 'val', 5: 'testA'}),
                  b=('unc', {1: 'train', 2: 'testB', 6: 'train', 4: 'train'}), c=('umd', {3: 'val', 6: 'train', 7: 'train', 8: 'test'}))
    sets = []
    for name, (split_by, of) in splits.items():
        refs = [a_ref(i, i, i, split, sents=(f'{name} {i} one', f'{name} {i} two')) for i, split in of.items()]
        sets.append(by_hand(root, refs, name=name, split_by=split_by, images=where)(images=where))
    return sets

def test_joined_sets_drop_what_any_of_them_holds_back(tmp_path):
    joint = JointRefer(pictures_and_sets(tmp_path))
    assert sorted({e.text[:3] for e in joint.expressions()}) == ['a 1', 'b 1', 'b 6', 'c 6', 'c 7'] and joint.dropped == 3   # a 2, a 3, b 4
    rows = ReferDataset(joint, 'train', 8, lambda texts: torch.zeros(len(texts), 4, dtype=torch.long), MEAN, STD, train=True)
    assert len(rows) == 5                                       # an object each, though two sets have a ref 1 and a ref 6
    for row in range(5):
        e, image = rows.expressions[row], int(rows.expressions[row].text.split()[1])
        assert joint.picture(e.image_id).getpixel((0, 0)) == (image, 90, 30) and joint.mask(e.ann_id).sum() == 12
        assert rows[row].image_id == e.image_id
    with pytest.raises(ValueError, match="for training only: ask one of them for 'val'"): joint.expressions('val')

def test_what_cannot_be_joined(tmp_path):
    a, b, c = pictures_and_sets(tmp_path)
    with pytest.raises(ValueError, match='at least two, each once; got a .unc.$'): JointRefer([a])
    with pytest.raises(ValueError, match='each once; got a .unc., a .unc.'): JointRefer([a, a])
    refs = [a_ref(i, i, i, 'test') for i in (1, 2, 3)] + [a_ref(4, 4, 4)]
    everything = by_hand(tmp_path, refs, name='d', images=a.images)(images=a.images)
    with pytest.raises(ValueError, match='nothing is left to train on'): JointRefer([a, everything])

def test_folders(tmp_path, monkeypatch):
    for name in ('refcoco', 'refcoco+', 'refcocog'): assert images_folder(tmp_path, name) == tmp_path/'images/mscoco/images/train2014'
    for name in ('refmoji', 'refmoji+', 'refmojig'): assert images_folder(tmp_path, name) == tmp_path/'images/refmoji'
    assert images_folder(tmp_path, 'mine') == tmp_path/'images/mine'
    monkeypatch.setenv('RISCLIP_DATA', str(tmp_path))
    assert data_folder() == tmp_path
    by_hand(tmp_path, [a_ref()])
    assert Refer('mine').counts() == {'train': (1, 1, 1)}
    monkeypatch.delenv('RISCLIP_DATA')
    checkout = tmp_path/'checkout'
    (checkout/'risclip').mkdir(parents=True)
    monkeypatch.setattr(refer_module.risclip, '__file__', str(checkout/'risclip'/'__init__.py'))
    assert data_folder() == Path('data')
    (checkout/'settings.ini').touch()
    assert data_folder() == checkout/'data'

def test_categories_are_cocos():
    meta = pytest.importorskip('torchvision.models._meta')
    theirs = {i: name for i, name in enumerate(meta._COCO_CATEGORIES) if name not in ('__background__', 'N/A')}
    assert COCO_CATEGORIES == theirs and len(COCO_CATEGORIES) == 80

def test_show(tmp_path):
    import matplotlib; matplotlib.use('Agg')
    r = by_hand(tmp_path, [a_ref()], [an_annotation(), an_annotation(2, segmentation=[[7, 5, 11, 5, 11, 9, 7, 9]])])()
    e, = r.expressions('train')
    ax = r.show(e)
    assert ax.get_title() == 'red ball'
    assert len(r.show(e, things=True).get_children()) > len(ax.get_children())

# ---------------------------------------------------------------- the writer

def scene(seed=0, size=(20, 30), n=2, **keys):
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, *size), bool)
    for m in masks:
        y, x = rng.integers(0, size[0]-5), rng.integers(0, size[1]-5)
        m[y:y+5, x:x+5] = rng.random((5, 5)) < .8
        m[y, x] = True
    return dict(picture=rng.integers(0, 255, (*size, 3), dtype=np.uint8), split='train',
                objects=[dict(mask=m, category='dog', expressions=[f'dog {seed} {i}']) for i, m in enumerate(masks)]) | keys

def test_round_trip(tmp_path):
    ours = [scene(1), scene(2, size=(31, 17), split='val'), scene(3, n=3)]
    ours[0]['objects'][0]['expressions'] = ['The Left dog, please!', dict(sent='small dog', kind='appearance', hidden='half', note=[1, {'a': 2.5}])]
    ours[0]['objects'][1] |= dict(category='unicorn', hidden=True, blurred=False)
    ours[2]['objects'][1].pop('expressions')
    assert write_refer(tmp_path, 'mine', 'unc', iter(ours)) == tmp_path/'mine'
    r = Refer('mine', root=tmp_path)
    assert r.counts() == {'train': (2, 4, 5), 'val': (1, 2, 2)}
    a, b = r.objects('train')[0]
    assert (a.text, a.raw, a.kind) == ('the left dog please', 'The Left dog, please!', 'all')
    assert (b.text, b.raw, b.kind, b.marks) == ('small dog', 'small dog', 'appearance', ('hidden',))
    assert read_refs(r.refs_file)[0]['sentences'][1]['note'] == [1, {'a': 2.5}]
    c, = r.objects('train')[1]
    assert (c.category, c.marks) == ('unicorn', ('hidden',))
    assert r.annotations[c.ann_id]['category_id'] > 1000 and r.annotations[a.ann_id]['category_id'] == 18
    assert len(r.things(3)) == 3 and len({e.ann_id for e in r.expressions('train') if e.image_id == 3}) == 2
    for example, image_id in zip(ours, (1, 2, 3)):
        assert (np.asarray(r.picture(image_id)) == example['picture']).all()
        for ann_id, thing in zip(r.things(image_id), example['objects'], strict=True):
            assert (r.mask(ann_id) == thing['mask']).all()
            ys, xs = np.nonzero(thing['mask'])
            assert r.box(ann_id) == (xs.min(), ys.min(), np.ptp(xs)+1, np.ptp(ys)+1)
            assert r.annotations[ann_id]['area'] == thing['mask'].sum()
            assert isinstance(r.annotations[ann_id]['segmentation']['counts'], str)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []

words = st.text(st.characters(codec='utf-8', exclude_categories=('Cs',)), min_size=1, max_size=30)
@st.composite
def data_sets(draw):
    examples = []
    for n in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 25)), draw(st.integers(1, 25))
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        things = []
        for _ in range(draw(st.integers(0, 3))):
            mask = rng.random(size) < draw(st.floats(0, 1))
            mask[rng.integers(size[0]), rng.integers(size[1])] = True
            phrase = words.filter(lambda s: s.strip())
            said = draw(st.lists(st.fixed_dictionaries(dict(sent=phrase), optional=dict(kind=st.sampled_from(['appearance', 'place', 'relation']),
                                                       raw=words, note=st.integers() | st.none())), max_size=3))
            things.append(dict(mask=mask, category=draw(st.sampled_from(['dog', 'cat', 'moon', 'our own'])), expressions=said)
                          | {m: True for m in draw(st.sets(st.sampled_from(['hidden', 'cut', 'blurred'])))})
        examples.append(dict(picture=picture, split=draw(st.sampled_from(['train', 'val', 'testA'])) if size[0]*size[1] > 8 else 'train', objects=things))
    return examples

@settings(max_examples=60, deadline=None)
@given(data_sets())
def test_any_round_trip(tmp_path_factory, examples):
    root = tmp_path_factory.mktemp('any')
    if not any(t['expressions'] for e in examples for t in e['objects']):
        with pytest.raises(ValueError, match='no example has an expression'): write_refer(root, 'mine', 'unc', examples)
        return
    write_refer(root, 'mine', 'unc', examples)
    r = Refer('mine', root=root)
    ann_id, said = 0, {s: [] for s in r.splits}
    for image_id, example in enumerate(examples, 1):
        assert (np.asarray(r.picture(image_id)) == example['picture']).all()
        for thing in example['objects']:
            ann_id += 1
            assert (r.mask(ann_id) == thing['mask']).all() and r.category(ann_id) == thing['category']
            for s in thing['expressions']:
                said[example['split']].append((s['sent'], s.get('raw') or s['sent'], s.get('kind', 'all'), ann_id, image_id, thing['category'],
                                               tuple(m for m in ('hidden', 'cut', 'blurred') if thing.get(m))))
    for split in r.splits:
        assert [(e.text, e.raw, e.kind, e.ann_id, e.image_id, e.category, e.marks) for e in r.expressions(split)] == said[split]
    assert len({e.sent_id for s in r.splits for e in r.expressions(s)}) == sum(map(len, said.values()))

def png(seed=0, size=(20, 30), format='PNG'):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(out, format)
    return out.getvalue()

def test_pictures_given_in_every_way(tmp_path):
    inside, outside = tmp_path/'shared', tmp_path/'elsewhere'
    (inside/'deep').mkdir(parents=True); outside.mkdir()
    (inside/'deep'/'a.png').write_bytes(png(1)); (outside/'b.jpg').write_bytes(png(2, format='JPEG'))
    given = [png(3), png(4, format='JPEG'), inside/'deep'/'a.png', str(outside/'b.jpg'), Image.open(io.BytesIO(png(5))),
             np.asarray(Image.open(io.BytesIO(png(6)))), Image.open(io.BytesIO(png(7))).convert('RGBA')]
    write_refer(tmp_path, 'mine', 'unc', (scene(i, picture=p) for i, p in enumerate(given)), images=inside)
    r = Refer('mine', root=tmp_path, images=inside)
    names = [r.pictures[i]['file_name'] for i in range(1, 8)]
    assert names[:4] == ['000000000001.png', '000000000002.jpeg', 'deep/a.png', '000000000004.jpg']
    assert (inside/names[0]).read_bytes() == given[0] and (inside/names[1]).read_bytes() == given[1] and (inside/names[3]).read_bytes() == png(2, format='JPEG')
    assert sorted(p.name for p in inside.rglob('*.*')) == sorted(n.split('/')[-1] for n in names)  # nothing was copied twice
    for i in (5, 6, 7): assert (np.asarray(r.picture(i)) == np.asarray(Image.open(io.BytesIO(png(i))))).all()
    write_refer(tmp_path, 'other', 'unc', [scene(1, picture=png(3), suffix='.bild')])
    assert (images_folder(tmp_path, 'other')/'000000000001.bild').exists()

def test_sets_that_share_their_pictures(tmp_path):
    write_refer(tmp_path, 'refmoji', 'unc', [scene(i, image_id=100+i) for i in range(3)])
    shared = tmp_path/'images'/'refmoji'
    before = {p: p.stat().st_mtime_ns for p in shared.iterdir()}
    write_refer(tmp_path, 'refmojig', 'umd', (scene(i, image_id=np.int64(100+i), picture=shared/f'{100+i:012d}.png', split='test') for i in (2, 0)))
    assert {p: p.stat().st_mtime_ns for p in shared.iterdir()} == before
    a, b = Refer('refmoji', root=tmp_path), Refer('refmojig', root=tmp_path)
    assert list(b.pictures) == [102, 100] and b.splits == ['test']
    assert (np.asarray(a.picture(102)) == np.asarray(b.picture(102))).all()
    write_refer(tmp_path, 'refmoji+', 'unc', [scene(i, image_id=100+i) for i in range(3)])  # the same pictures again are the same files
    with pytest.raises(ValueError, match='000000000100.png.*another picture'): write_refer(tmp_path, 'again', 'unc', [scene(9, image_id=100)], images=shared)
    assert {p: p.stat().st_mtime_ns for p in shared.iterdir()} == before

def test_same_input_same_bytes(tmp_path):
    def examples(fresh):
        for i in range(4):
            e = scene(i)
            words = ['the left dog', 'the left dog']  # one object twice, or two equal ones
            e['objects'][0]['expressions'] = [''.join(list(w)) for w in words] if fresh else [words[0]]*2
            yield e
    files = []
    for fresh in (True, False):
        folder = write_refer(tmp_path/str(fresh), 'mine', 'unc', examples(fresh))
        files.append({p.name: p.read_bytes() for p in [*folder.iterdir(), *(tmp_path/str(fresh)/'images'/'mine').iterdir()]})
    assert files[0] == files[1] and len(files[0]) == 6

def test_others_can_read_what_we_write(tmp_path, capsys):
    "The refer API reads with plain pickle; pycocotools reads instances.json."
    from pycocotools.coco import COCO
    write_refer(tmp_path, 'mine', 'unc', [scene(1), scene(2, split='val')])
    refs = pickle.loads((tmp_path/'mine'/'refs(unc).p').read_bytes())
    assert set(refs[0]) == {'ref_id', 'ann_id', 'category_id', 'image_id', 'file_name', 'split', 'sent_ids', 'sentences'}
    assert set(refs[0]['sentences'][0]) == {'sent_id', 'raw', 'sent', 'tokens'}
    assert (tmp_path/'mine'/'refs(unc).p').read_bytes()[:2] == b'\x80\x02'
    coco, r = COCO(str(tmp_path/'mine'/'instances.json')), Refer('mine', root=tmp_path)
    for ref in refs:
        assert (coco.annToMask(coco.loadAnns(ref['ann_id'])[0]).astype(bool) == r.mask(ref['ann_id'])).all()
        assert coco.loadCats(ref['category_id'])[0]['name'] == 'dog'

def test_masks_given_in_every_way(tmp_path):
    mask = scene(1)['objects'][0]['mask']
    packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    ways = [mask, mask.astype(np.uint8), mask.astype(float), packed, packed | dict(counts=packed['counts'].decode()), dict(size=[20, 30], counts=counts_of(mask)),
            [[2, 3, 12, 3, 12, 9, 2, 9]]]
    write_refer(tmp_path, 'mine', 'unc', [scene(1, objects=[dict(mask=w, category='cat', expressions=['it']) for w in ways])])
    r = Refer('mine', root=tmp_path)
    for i in range(1, 7): assert (r.mask(i) == mask).all() and r.annotations[i]['area'] == mask.sum()
    assert r.annotations[7]['segmentation'] == ways[-1] and r.mask(7).sum() == 60 and r.box(7) == (2, 3, 10, 6)

def wrong(**change):
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
    (wrong(category=''), 'category'), (wrong(category=7), 'category'),
    (wrong(expressions=['']), 'no words'), (wrong(expressions=['  ?! ']), 'no words'), (wrong(expressions=[dict(sent=' ')]), 'no words'),
    (wrong(expressions=[dict(kind='place')]), 'no words'),
    (wrong(expressions=[dict(sent='a', note=np.zeros(2))]), 'ndarray'),
    (wrong(expresions=['a dog']), 'expresions'),
    (scene(1, picture=b'no picture'), 'Pillow'),
    (scene(1, picture=np.full((20, 30, 3), 255.)), 'floats from 255'), (scene(1, picture=np.zeros((20, 30, 3), int)), 'give uint8'),
    (scene(1, split=''), 'split'), (scene(1, split=None), 'split'), (scene(1, spilt='train'), 'spilt'),
    (scene(1, image_id='one'), 'str'), (scene(1, image_id=1), 'image_id 1'),
    ({k: v for k, v in scene(1).items() if k != 'split'}, "'split' is missing"),
    (scene(1, objects=[dict(category='dog')]), "'mask' is missing"),
])
def test_a_wrong_example_is_named_and_nothing_is_left(tmp_path, example, why):
    with pytest.raises(ValueError, match=rf'example 1 of mine: .*{why}'): write_refer(tmp_path, 'mine', 'unc', [scene(0), example])
    assert not (tmp_path/'mine').exists() and not list(tmp_path.glob('.*'))

def test_splits_share_no_picture(tmp_path):
    with pytest.raises(ValueError, match='example 1.*is in val.*in train'): write_refer(tmp_path, 'mine', 'unc', [scene(1), scene(1, split='val')])
    write_refer(tmp_path, 'mine', 'unc', [scene(1), scene(1)])  # twice in one split: two pictures that look the same
    assert Refer('mine', root=tmp_path).counts()['train'] == (2, 4, 4)

def test_a_missing_picture_stays_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError, match='example 0.*none.png'): write_refer(tmp_path, 'mine', 'unc', [scene(1, picture=tmp_path/'none.png')])

def test_overwrite(tmp_path):
    write_refer(tmp_path, 'mine', 'unc', [scene(1), scene(2)])
    with pytest.raises(FileExistsError, match='overwrite=True'): write_refer(tmp_path, 'mine', 'unc', [scene(3)])
    with pytest.raises(ValueError): write_refer(tmp_path, 'mine', 'unc', [scene(3), wrong(category='')], overwrite=True)
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
    with pytest.raises(RuntimeError, match='the generator broke'): write_refer(tmp_path, 'second', 'unc', breaks())
    assert not (tmp_path/'second').exists()

# ---------------------------------------------------------------- items and batches

def tokenize(phrases):
    assert isinstance(phrases, list)
    ids = torch.zeros(len(phrases), 6, dtype=torch.long)
    for row, phrase in zip(ids, phrases):
        for i, word in enumerate(phrase.split()[:6]): row[i] = sum(map(ord, word))
    return ids

@pytest.fixture
def small(tmp_path):
    ours = [scene(i, size=(20+i, 30-i)) for i in range(6)] + [scene(9, split='val')]
    for e in ours: e['objects'][0]['expressions'] = [f'dog number {k}' for k in range(5)]
    write_refer(tmp_path, 'mine', 'unc', ours)
    return Refer('mine', root=tmp_path)

MEAN, STD = (.48, .46, .41), (.27, .26, .28)

def test_evaluation_has_every_expression(small):
    d = ReferDataset(small, 'val', 16, tokenize, MEAN, STD)
    assert d.expressions == small.expressions('val') and len(d) == 6
    item = d[2]
    assert isinstance(item, Batch)
    assert [tuple(x.shape) for x in item] == [(3, 16, 16), (6,), (1, 16, 16), (), ()]
    assert [x.dtype for x in item] == [torch.float32, torch.int64, torch.float32, torch.int64, torch.int64]
    assert set(item.mask.unique().tolist()) <= {0., 1.} and item.index == 2 and item.image_id == 7
    torch.testing.assert_close(item.tokens, tokenize([d.expressions[2].text])[0])
    picture = np.asarray(small.picture(7).resize((16, 16), Image.Resampling.BICUBIC))
    expected = (torch.tensor(picture).permute(2, 0, 1)/255 - torch.tensor(MEAN)[:, None, None])/torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(item.pixels, expected)

def test_training_has_every_object_once_an_epoch(small):
    d = ReferDataset(small, 'train', 16, tokenize, MEAN, STD, train=True)
    assert len(d) == len(small.objects('train')) == 12
    seen = []
    for epoch in range(30):
        d.set_epoch(epoch)
        assert [e.ref_id for e in d.expressions] == [o[0].ref_id for o in small.objects('train')]
        seen.append(tuple(e.sent_id for e in d.expressions))
        assert d.expressions[3] == d.expression(3)
    assert {s[0] for s in seen} == {e.sent_id for e in small.objects('train')[0]}  # every sentence has its turn
    d.set_epoch(4)
    assert tuple(e.sent_id for e in d.expressions) == seen[4]
    other = ReferDataset(small, 'train', 16, tokenize, MEAN, STD, train=True, seed=1)
    other.set_epoch(4)
    assert tuple(e.sent_id for e in other.expressions) != seen[4]

def test_the_draw_does_not_depend_on_the_rest_of_the_split(small):
    whole, part = (ReferDataset(small, 'train', 16, tokenize, MEAN, STD, train=True, expressions=e)
                   for e in (None, small.expressions('train')[12:]))
    drawn = {e.ref_id: e for e in whole.expressions}
    assert part.expressions and all(drawn[e.ref_id] == e for e in part.expressions)

def test_the_draw_is_the_same_in_another_process(small):
    d = ReferDataset(small, 'train', 16, tokenize, MEAN, STD, train=True, seed=3)
    d.set_epoch(2)
    code = (f"from risclip.refer import *; d = ReferDataset(Refer('mine', root={str(small.folder.parent)!r}), 'train', 16, None, (0,)*3, (1,)*3, train=True, seed=3);"
            "d.set_epoch(2); print([e.sent_id for e in d.expressions])")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'PYTHONHASHSEED': '7', 'PYTHONPATH': os.pathsep.join(sys.path)})
    assert out.stdout.strip() == str([e.sent_id for e in d.expressions]), out.stderr

@pytest.mark.parametrize('workers, persistent', [(0, False), (2, False), (2, True)])
def test_batches_from_workers(small, workers, persistent):
    d = ReferDataset(small, 'train', 16, tokenize, MEAN, STD, train=True)
    loader = DataLoader(d, batch_size=5, num_workers=workers, persistent_workers=persistent)
    for epoch in (0, 3):
        d.set_epoch(epoch)
        batches = list(loader)
        assert isinstance(batches[0], Batch)
        assert [tuple(b.pixels.shape) for b in batches] == [(5, 3, 16, 16), (5, 3, 16, 16), (2, 3, 16, 16)]
        assert batches[0].mask.shape == (5, 1, 16, 16) and batches[0].tokens.shape == (5, 6)
        assert torch.cat([b.index for b in batches]).tolist() == list(range(12))
        torch.testing.assert_close(torch.cat([b.tokens for b in batches]), tokenize([e.text for e in d.expressions]))

def test_cache_changes_nothing_but_the_reading(small, monkeypatch):
    read = []
    picture = Refer.picture
    monkeypatch.setattr(Refer, 'picture', lambda self, i: (read.append(i), picture(self, i))[1])
    expressions = small.expressions('train')                     # five for each of six pictures
    all_kept, last_kept = (ReferDataset(small, 'train', 16, tokenize, MEAN, STD, cache=c) for c in (None, 2))
    for _ in range(2):
        for row in range(len(expressions)): torch.testing.assert_close(all_kept[row].pixels, last_kept[row].pixels)
    assert len(read) == 6 + 2*6 and len(last_kept._cache) == 2   # phrases of a picture that come together read it once
    first = all_kept[0].pixels.clone(); all_kept[0].pixels.zero_()
    torch.testing.assert_close(all_kept[0].pixels, first)  # who writes into an item does not write into the cache

def test_pictures_once(small):
    rows = ReferDataset(small, 'train', 16, tokenize, MEAN, STD)
    batch = next(iter(DataLoader(rows, batch_sampler=[[7, 0, 6, 1, 29]])))
    pixels, of = batch.pictures_once()
    assert len(pixels) == 3 and torch.equal(pixels[of], batch.pixels)

def test_resize_mask():
    mask = np.zeros((40, 40), bool); mask[:20, :21] = True
    assert (resize_mask(mask, 4) == np.array([[1, 1, 0, 0]]*2 + [[0]*4]*2)).all()
    assert (resize_mask(mask, 40) == mask).all()
    assert (resize_mask(mask, 80) == mask.repeat(2, 0).repeat(2, 1)).all()
    thin = np.zeros((64, 64), bool); thin[10, 5:60] = True
    assert resize_mask(thin, 8).any() and resize_mask(thin, 8).sum() <= 8
    assert not resize_mask(np.zeros((9, 9), bool), 4).any()
    assert resize_mask(np.ones((9, 7), bool), 4).all()

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**32))
def test_nothing_vanishes(h, w, size, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((h, w)) < rng.random()**3
    mask[rng.integers(h), rng.integers(w)] = True
    assert resize_mask(mask, size).any() and resize_mask(mask, size).shape == (size, size)

def test_resize_picture():
    picture = Image.fromarray(np.full((10, 30, 3), (10, 20, 30), np.uint8))
    small = resize_picture(picture, 8)
    assert small.shape == (3, 8, 8) and small.dtype == np.uint8 and (small == np.array([10, 20, 30])[:, None, None]).all()
