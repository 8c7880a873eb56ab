"The reader of RefCOCO's files: formats as they are found, hostile files, faults, several sets."
import copyreg, io, json, os, pickle, subprocess, sys, warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

import risclip.files as files
import risclip.refer as refer_module
from refcoco_files import Unicode, a_ref, an_annotation, by_hand, pictures_and_sets, python2
from risclip.files import data_folder
from risclip.plots import show_expression
from risclip.refer import (PUBLISHED_COUNTS, Expression, JointRefer, Refer, images_folder,
                           read_refs)

ENV = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}


def in_a_fresh_process(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENV)


def test_the_reader_is_light():
    "Whoever asks a command for its help waits neither for torch nor for matplotlib."
    out = in_a_fresh_process('import sys, risclip.refer, risclip.writer; print(*sys.modules)')
    heavy = {'torch', 'torchvision', 'matplotlib', 'open_clip', 'pandas'}
    assert 'risclip.refer' in out.stdout, out.stderr
    assert not heavy & set(out.stdout.split())


# ---------------------------------------------------------------- pickles as Python 2 wrote them

@pytest.mark.parametrize('protocol', [0, 2])
def test_python2_pickle(tmp_path, protocol):
    refs = [a_ref(2, 2, 7, sents=('man on left', 'guy')),
            a_ref(1, 1, 5, 'val', sents=("dog's ear",), extra=2**40, some=[1.5, None, True])]
    r = by_hand(tmp_path, refs, pickled=python2(refs, protocol))()
    assert r.splits == ['train', 'val']
    assert [e.text for e in r.expressions('train')] == ['man on left', 'guy']
    e, = r.expressions('val')
    wanted = Expression(100, 1, 1, 5, 'val', "dog's ear", "dog's ear", 'sports ball', 'all', ())
    assert e == wanted and e.length == 2
    assert type(e.text) is str and read_refs(r.refs_file)[1]['extra'] == 2**40


@pytest.mark.parametrize('encoding, text', [
    ('utf-8', 'café naïve'), ('latin1', 'café naïve'), ('utf-8', '왼쪽 사람')])
@pytest.mark.parametrize('protocol', [0, 2])
def test_python2_bytes_that_are_not_ascii(tmp_path, encoding, text, protocol):
    refs = [a_ref(sents=(text, 'plain'))]
    content = python2(refs, protocol, lambda s: s.encode(encoding))
    r = by_hand(tmp_path, refs, pickled=content)()
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
    r = by_hand(tmp_path, refs, pickled=pickle.dumps(refs, protocol))()
    assert r.expressions('train')[0].text == 'red ball'


# ---------------------------------------------------------------- the copy as JSON

def test_a_copy_is_written_beside_the_pickle(tmp_path, monkeypatch):
    """The second time nothing is unpickled; a pickle that has changed is read again; a copy that
    is torn, of another file, or no refs at all is not believed."""
    path, copy = tmp_path/'refs(unc).p', tmp_path/'refs(unc).json'
    unpickled = []
    load = refer_module._PlainUnpickler.load
    def counted(self):
        unpickled.append(1)
        return load(self)
    monkeypatch.setattr(refer_module._PlainUnpickler, 'load', counted)
    path.write_bytes(python2([a_ref()]))
    first = read_refs(path)
    assert read_refs(path) == first and len(unpickled) == 1
    path.write_bytes(python2([a_ref(), a_ref(2, 2, 2)]))
    assert len(read_refs(path)) == 2 and len(unpickled) == 2
    whole = copy.read_text()
    checksum = json.loads(whole)['sha256']
    spoilt = [whole[:-9], '[]', '{}', whole.replace('ref_id', 'ref'),
              whole.replace(checksum, '0'*64), '{"sha256": 3, "refs": []}']
    for text in spoilt:
        copy.write_text(text)
        assert len(read_refs(path)) == 2 and copy.read_text() == whole
    assert len(unpickled) == 2 + len(spoilt)
    assert sorted(f.name for f in tmp_path.iterdir()) == [copy.name, path.name]


def test_what_json_cannot_say_is_not_copied(tmp_path):
    notes = [dict(note=b'bytes'), {3: 4}, dict(note=float('nan')), dict(note=(1, 2))]
    for n, note in enumerate(notes):
        path = tmp_path/f'refs({n}).p'
        path.write_bytes(pickle.dumps([a_ref() | note], 4))
        for _ in range(2): assert read_refs(path)[0]['ref_id'] == 1
    assert not list(tmp_path.glob('*.json'))


def test_a_folder_that_cannot_be_written_is_no_trouble(tmp_path, monkeypatch):
    path = tmp_path/'refs(unc).p'
    path.write_bytes(python2([a_ref()]))
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_text', full)
    assert read_refs(path) == read_refs(path)
    assert [f.name for f in tmp_path.iterdir()] == [path.name]


# ---------------------------------------------------------------- hostile pickles

RAN = []


def touch(*args): RAN.append(args)


class Runs:
    "Pickled, it asks for a function to be called."
    def __init__(self, function, *args): self.what = function, args
    def __reduce__(self): return self.what


ECHO = b"(S'echo ran > ran.txt'\n"


def hostile():
    "(name, bytes, what the message must name)"
    yield 'os.system by hand', b"cos\nsystem\n" + ECHO + b"tR.", 'os.system'
    yield 'posix', b"cposix\nsystem\n" + ECHO + b"tR.", 'posix.system'
    yield 'inst', ECHO + b"ios\nsystem\n.", 'os.system'
    python2_eval = b"\x80\x02c__builtin__\neval\nU\x13open('ran.txt','w')\x85R."
    yield 'python 2 eval', python2_eval, 'eval'
    yield 'obj', b"\x80\x02(cos\nsystem\nU\x12echo ran > ran.txto.", 'os.system'
    opens = Runs(exec, "open('ran.txt','w')")
    for protocol in range(6):
        yield f'reduce {protocol}', pickle.dumps([a_ref(), Runs(touch, 1)], protocol), 'touch'
        inside = pickle.dumps([a_ref(sents=('a',), more=opens)], protocol)
        yield f'in a sentence {protocol}', inside, 'exec'
    yield 'getattr', b"c__builtin__\ngetattr\n(cos\npath\nS'join'\ntR.", 'getattr'
    yield 'a class', pickle.dumps([Path('.')], 2), 'pathlib'
    yield 'numpy', pickle.dumps([np.float64(1)], 2), 'numpy'
    reconstruct = b"ccopy_reg\n_reconstructor\n(c__builtin__\nobject\nc__builtin__\nobject\nNtR."
    yield 'copyreg', reconstruct, 'copy_reg._reconstructor'
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
    for part in ('refs(unc).p', name, str(tmp_path)): assert part in str(e.value)


def test_the_hostile_pickles_do_run_elsewhere(tmp_path, monkeypatch):
    "Otherwise the test above could not fail."
    monkeypatch.chdir(tmp_path)
    that_run = 'os.system by hand', 'inst', 'obj', 'python 2 eval', 'in a sentence 2'
    contents = {i: content for i, content, _ in hostile()}
    for i in that_run:
        (tmp_path/'ran.txt').unlink(missing_ok=True)
        try: pickle.loads(contents[i])
        except Exception: pass
        assert (tmp_path/'ran.txt').exists(), i


def test_registered_extensions_and_persistent_ids_are_refused(tmp_path):
    copyreg.add_extension(__name__, 'touch', 240)
    try:
        RAN.clear()
        load = by_hand(tmp_path, [a_ref()], pickled=b'\x80\x02\x82\xf0)R.')
        with pytest.raises(ValueError, match='touch'): load()
        assert not RAN
    finally: copyreg.remove_extension(__name__, 'touch', 240)
    load = by_hand(tmp_path, [a_ref()], pickled=b"Pthing\n.")
    with pytest.raises(ValueError, match='persistent'): load()


BROKEN = [b'', b'\x80\x02', b'not a pickle', b'\x80\x63.', python2([a_ref()])[:-20], b'}.', b']',
          python2({'a': 1}), python2([1, 2]), python2([dict(ref_id=1)]),
          b'\x80\x02X\x02\x00\x00\x00\xff\xfe.', b'('*10 + b'.', b'0'*5,
          b'<html>404 Not Found</html>', b'version https://git-lfs.github.com/spec/v1\n']


@pytest.mark.parametrize('content', BROKEN)
def test_a_broken_pickle_is_named(tmp_path, content):
    load = by_hand(tmp_path, [a_ref()], pickled=content)
    with pytest.raises(ValueError, match=r'refs\(unc\)\.p'): load()


def test_truncated_anywhere(tmp_path):
    content = python2([a_ref(sents=('one', 'two'))])
    path = tmp_path/'refs(unc).p'
    for n in range(len(content)):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError): read_refs(path)
    path.write_bytes(content)
    assert len(read_refs(path)[0]['sentences']) == 2


UNDER_A_LIMIT = """
import resource, risclip.refer as r
now = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**30,)*2)
print(r.read_refs({path!r}))
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits its own memory')
def test_a_damaged_file_cannot_ask_for_all_memory(tmp_path):
    """pickle's reader in C makes room for 2**31 remembered things here, 16 GiB; so this runs under
    a limit."""
    path = tmp_path/'refs(unc).p'
    path.write_bytes(b'\x80\x02]r\x00\x00\x00\x40.')
    out = in_a_fresh_process(UNDER_A_LIMIT.format(path=str(path)))
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


# ---------------------------------------------------------------- reading

def four_splits(root, name='refcoco', **keys):
    splits = 'testB', 'train', 'val', 'testA', 'train'
    refs = [a_ref(i, i, i, s, (f'thing {i}', f'that {i}')) for i, s in enumerate(splits, 1)]
    return by_hand(root, refs, name=name, **keys)


def test_test_is_never_both(tmp_path):
    with pytest.warns(UserWarning): r = four_splits(tmp_path)()
    assert r.splits == ['train', 'val', 'testA', 'testB']
    for ask in (r.expressions, r.objects):
        with pytest.raises(ValueError, match='testA and testB'): ask('test')
        for near in ('tests', 'Val', 'testAB', 'traini'):
            with pytest.raises(ValueError, match='train, val, testA, testB'): ask(near)
    assert [e.text for e in r.expressions('testA')] == ['thing 4', 'that 4']


def test_order_and_grouping(tmp_path):
    refs = [a_ref(9, 1, 1, sents=('i', 'j')), a_ref(3, 2, 1, sents=('a', 'b', 'c'))]
    refs[1]['sentences'].reverse()
    r = by_hand(tmp_path, refs)()
    objects = r.objects('train')
    assert [[e.text for e in o] for o in objects] == [['a', 'b', 'c'], ['i', 'j']]
    assert r.expressions('train') == objects[0] + objects[1]
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
    assert (e.kind, e.marks) == ('appearance', ('cut', 'blurred'))
    assert (e.raw, e.text) == ('Red ball!', 'red ball')
    assert r.box(1) == (2., 1., 4., 3.) and r.size(1) == (10, 12)
    assert r.things(1) == [1, 5] and r.things(99) == []
    assert r.info == {}                                   # COCO's has one, this file has none
    assert hash(e) and pickle.loads(pickle.dumps(e)) == e
    with pytest.raises(AttributeError): e.text = 'other'


def test_published_counts_warn_with_both_numbers(tmp_path, monkeypatch):
    load = four_splits(tmp_path)
    both = r'train has \(2, 2, 4\) instead of \(16994, 42404, 120624\)'
    with pytest.warns(UserWarning, match=both) as w: load()
    assert 'refs(unc).p' in str(w[0].message)
    right = dict(train=(2, 2, 4), val=(1, 1, 2), testA=(1, 1, 2), testB=(1, 1, 2))
    monkeypatch.setitem(PUBLISHED_COUNTS, ('refcoco', 'unc'), right)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load()
    monkeypatch.setitem(PUBLISHED_COUNTS, ('refcoco', 'unc'), right | dict(val=(1, 1, 3)))
    with pytest.warns(UserWarning) as w: load()
    assert 'val' in str(w[0].message) and 'train' not in str(w[0].message)


def test_published_counts_sum_to_the_published_totals():
    def total(*key): return [sum(n) for n in zip(*PUBLISHED_COUNTS[key].values())]
    assert total('refcoco', 'unc') == [19994, 50000, 142210]
    assert total('refcoco+', 'unc') == [19992, 49856, 141564]
    assert total('refcocog', 'umd') == [25799, 49822, 95010]
    assert total('refcocog', 'google')[1:] == [49822, 95010]


def test_an_unknown_set_does_not_warn(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        four_splits(tmp_path, 'mine')()
    assert not [w for w in caught if issubclass(w.category, UserWarning)]


def test_which_split_by(tmp_path):
    by_hand(tmp_path, [a_ref()], split_by='umd')
    assert Refer('mine', root=tmp_path).split_by == 'umd'
    by_hand(tmp_path, [a_ref()], split_by='google')
    with pytest.raises(ValueError, match='google, umd'): Refer('mine', root=tmp_path)
    assert Refer('mine', 'google', tmp_path).split_by == 'google'
    with pytest.raises(FileNotFoundError, match=r'refs\(unc\)\.p'): Refer('mine', 'unc', tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='refcocog.*data/README.md'):
        Refer('refcocog', root=tmp_path)
    with pytest.raises(FileNotFoundError, match='make data'): Refer('refmoji+', root=tmp_path)
    load = by_hand(tmp_path, [a_ref()])
    r = load()
    file = r.images/'000001.png'
    file.unlink()
    with pytest.raises(FileNotFoundError, match='000001.png.*images='): r.picture(1)
    file.write_bytes(b'no picture')
    with pytest.raises(OSError, match='000001.png'): r.picture(1)
    noise = np.random.default_rng(0).integers(0, 255, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:150])
    with pytest.raises(OSError, match='000001.png'): r.picture(1)
    Image.new('RGB', (5, 5)).save(file)
    with pytest.raises(ValueError, match=r'000001.png is \(5, 5\).*\(10, 12\)'): r.picture(1)
    r.instances_file.unlink()
    with pytest.raises(FileNotFoundError, match='instances.json'): load()


NO_INSTANCES = [b'', b'{', b'[]', b'{}', b'{"images": 3, "annotations": [], "categories": []}',
                b'\xff\xfe', b'<html>']


@pytest.mark.parametrize('content', NO_INSTANCES)
def test_a_broken_instances_json_is_named(tmp_path, content):
    load = by_hand(tmp_path, [a_ref()])
    (tmp_path/'mine'/'instances.json').write_bytes(content)
    with pytest.raises(ValueError, match='instances.json'): load()


@pytest.mark.parametrize('ref, lost', [(a_ref(ann_id=4), 'annotation 4'),
                                       (a_ref(image_id=8), 'picture 8')])
def test_files_of_different_sets(tmp_path, ref, lost):
    by_hand(tmp_path, [a_ref()])
    (tmp_path/'mine'/'refs(unc).p').write_bytes(python2([ref]))
    with pytest.raises(ValueError, match=f'ref 1 needs {lost}.*instances.json'):
        Refer('mine', root=tmp_path)


def test_inconsistent_refs(tmp_path):
    by_hand(tmp_path, [a_ref(1, 1, 1), a_ref(2, 2, 2)])
    (tmp_path/'mine'/'refs(unc).p').write_bytes(python2([a_ref(1, 1, 2)]))
    with pytest.raises(ValueError, match='ref 1 is in picture 2'): Refer('mine', root=tmp_path)
    ref = a_ref()
    del ref['sentences'][0]['sent']
    (tmp_path/'mine'/'refs(unc).p').write_bytes(python2([ref]))
    with pytest.raises(ValueError, match='sentence of ref 1'): Refer('mine', root=tmp_path)


# ---------------------------------------------------------------- pictures

@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'CMYK'])
def test_pictures_come_as_rgb(tmp_path, mode):
    r = by_hand(tmp_path, [a_ref()])()
    kind = 'JPEG' if mode == 'CMYK' else 'PNG'
    Image.new(mode, (12, 10)).save(r.images/'000001.png', kind)
    assert r.picture(1).mode == 'RGB'


def test_colours_of_other_modes(tmp_path):
    """Sixteen bits of grey stay as many shades as eight bits have, four inks stay their colour,
    and what is transparent is white."""
    r = by_hand(tmp_path, [a_ref()], size=(2, 3))()
    file = r.images/'000001.png'
    shades = np.array([[0, 100, 200], [257*64, 257*128, 65535]], np.uint16)
    Image.fromarray(shades).save(file)
    assert np.asarray(r.picture(1))[..., 0].tolist() == [[0, 0, 1], [64, 128, 255]]
    Image.new('CMYK', (3, 2), (0, 255, 255, 0)).save(file, 'TIFF')
    assert r.picture(1).getpixel((1, 1)) == (255, 0, 0)
    Image.new('RGBA', (3, 2), (255, 0, 0, 0)).save(file)
    assert r.picture(1).getpixel((0, 0)) == (255, 255, 255)
    Image.new('F', (3, 2), 7.).save(file, 'TIFF')
    why = r'000001.png cannot be read as a picture: the array holds floats from 7 to 7'
    with pytest.raises(OSError, match=why): r.picture(1)


# Pillow's transpositions that undo those of the notes 1 to 8 (FLIP_LEFT_RIGHT is 0)
UNDO = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}


@pytest.mark.parametrize('note', range(1, 9))
def test_exif_rotation(tmp_path, note):
    """The stated size says on which way up the masks were drawn: a note to turn the picture is
    followed if it fits only then."""
    upright = np.zeros((10, 12, 3), np.uint8)
    upright[:4, :6] = 255, 0, 0
    exif = Image.Exif()
    exif[0x0112] = note
    stored = Image.fromarray(upright)
    if UNDO[note] is not None: stored = stored.transpose(Image.Transpose(UNDO[note]))
    r = by_hand(tmp_path, [a_ref()], size=(10, 12))()
    stored.save(r.images/'000001.png', exif=exif)
    wanted = upright if note >= 5 else np.asarray(stored)     # 2 to 4 leave the size: as stored
    assert (np.asarray(r.picture(1)) == wanted).all()
    # the masks were drawn on what is stored
    r = by_hand(tmp_path/'other', [a_ref()], size=stored.size[::-1])()
    stored.save(r.images/'000001.png', exif=exif)
    assert (np.asarray(r.picture(1)) == np.asarray(stored)).all()


def test_a_picture_of_another_size_is_refused_whatever_its_note(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    r = by_hand(tmp_path, [a_ref()], size=(10, 12))()
    for size in ((10, 11), (13, 12)):
        Image.new('RGB', size).save(r.images/'000001.png', exif=exif)
        with pytest.raises(ValueError, match='says .10, 12. .height, width.'): r.picture(1)


def test_an_expression_is_drawn(tmp_path):
    other = an_annotation(2, segmentation=[[7, 5, 11, 5, 11, 9, 7, 9]])
    r = by_hand(tmp_path, [a_ref()], [an_annotation(), other])()
    e, = r.expressions('train')
    ax = show_expression(r, e)
    assert ax.get_title() == 'red ball'
    both = show_expression(r, e, things=True)
    assert len(both.get_children()) > len(ax.get_children())


# ---------------------------------------------------------------- several sets as one

def test_joined_sets_drop_what_any_of_them_holds_back(tmp_path):
    joint = JointRefer(pictures_and_sets(tmp_path))
    expressions = joint.expressions()
    assert sorted({e.text[:3] for e in expressions}) == ['a 1', 'b 1', 'b 6', 'c 6', 'c 7']
    assert joint.dropped == 3                                   # a 2, a 3, b 4
    # an object each, though two sets have a ref 1 and a ref 6
    assert len({e.ref_id for e in expressions}) == 5
    for numbers in ('sent_id', 'ann_id'):
        count = len({getattr(e, numbers) for e in expressions})
        assert count == (10 if numbers == 'sent_id' else 5)
    for e in expressions:
        image = int(e.text.split()[1])
        assert joint.picture(e.image_id).getpixel((0, 0)) == (image, 90, 30)
        assert joint.mask(e.ann_id).sum() == 12
    with pytest.raises(ValueError, match="for training only: ask one of them for 'val'"):
        joint.expressions('val')


def test_what_cannot_be_joined(tmp_path):
    a, b, c = pictures_and_sets(tmp_path)
    with pytest.raises(ValueError, match='at least two, each once; got a .unc.$'): JointRefer([a])
    with pytest.raises(ValueError, match='each once; got a .unc., a .unc.'): JointRefer([a, a])
    refs = [a_ref(i, i, i, 'test') for i in (1, 2, 3)] + [a_ref(4, 4, 4)]
    everything = by_hand(tmp_path, refs, name='d', images=a.images)(images=a.images)
    with pytest.raises(ValueError, match='nothing is left to train on'): JointRefer([a, everything])


# ---------------------------------------------------------------- where things are

def test_folders(tmp_path, monkeypatch):
    photographs, drawings = tmp_path/'images/mscoco/images/train2014', tmp_path/'images/refmoji'
    for end in ('', '+', 'g'):
        assert images_folder(tmp_path, f'refcoco{end}') == photographs
        assert images_folder(tmp_path, f'refmoji{end}') == drawings
    assert images_folder(tmp_path, 'mine') == tmp_path/'images/mine'
    monkeypatch.setenv('RISCLIP_DATA', str(tmp_path))
    assert data_folder() == tmp_path
    by_hand(tmp_path, [a_ref()])
    assert Refer('mine').counts() == {'train': (1, 1, 1)}
    monkeypatch.delenv('RISCLIP_DATA')
    checkout = tmp_path/'checkout'
    (checkout/'risclip').mkdir(parents=True)
    monkeypatch.setattr(files.risclip, '__file__', str(checkout/'risclip'/'__init__.py'))
    assert data_folder() == Path('data')
    (checkout/'settings.ini').touch()
    assert data_folder() == checkout/'data'
