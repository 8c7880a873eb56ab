"Data sets as others write them, and as ours is given: for the tests of the reader and the writer."
import json, pickle, struct

import numpy as np
from PIL import Image

from risclip.refer import Refer, images_folder


class Unicode(str):
    "What `python2` writes as Python 2's unicode."


def python2(value, protocol=2, text=lambda s: s.encode('utf-8')):
    """Bytes that Python 2's cPickle would write: str becomes a byte string (Python 2's str),
    `bytes` stay as they are, a `Unicode` becomes unicode, ints beyond 32 bits become longs."""
    opcodes = _opcodes_0 if protocol == 0 else _opcodes_2
    return (b'\x80\x02' if protocol == 2 else b'') + opcodes(value, text) + b'.'


def _opcodes_2(v, text):
    "A value in protocol 2."
    if isinstance(v, Unicode):
        raw = str(v).encode('utf-8')
        return b'X' + struct.pack('<I', len(raw)) + raw
    if isinstance(v, (str, bytes)):
        raw = v if isinstance(v, bytes) else text(v)
        if len(raw) < 256: return b'U' + bytes([len(raw)]) + raw
        return b'T' + struct.pack('<i', len(raw)) + raw
    if v is None: return b'N'
    if isinstance(v, bool): return b'\x88' if v else b'\x89'
    if isinstance(v, int):
        if abs(v) < 2**31: return b'J' + struct.pack('<i', v)
        raw = pickle.encode_long(v)
        return b'\x8a' + bytes([len(raw)]) + raw
    if isinstance(v, float): return b'G' + struct.pack('>d', v)
    return _container(v, b']', b'}', lambda x: _opcodes_2(x, text))


def _opcodes_0(v, text):
    "A value in protocol 0, which is text."
    if isinstance(v, Unicode): return b'V' + str(v).encode('raw_unicode_escape') + b'\n'
    if isinstance(v, (str, bytes)):
        raw = v if isinstance(v, bytes) else text(v)
        return b'S' + repr(raw)[1:].encode('ascii') + b'\n'
    if v is None: return b'N'
    if isinstance(v, bool): return b'I01\n' if v else b'I00\n'
    if isinstance(v, int): return (f'I{v}\n' if abs(v) < 2**31 else f'L{v}L\n').encode()
    if isinstance(v, float): return f'F{v!r}\n'.encode()
    return _container(v, b'(l', b'(d', lambda x: _opcodes_0(x, text))


def _container(v, empty_list, empty_dict, opcodes):
    if isinstance(v, list): return empty_list + b''.join(opcodes(x) + b'a' for x in v)
    if not isinstance(v, dict): raise TypeError(v)
    return empty_dict + b''.join(opcodes(k) + opcodes(x) + b's' for k, x in v.items())


def a_ref(ref_id=1, ann_id=1, image_id=1, split='train', sents=('red ball',), category_id=37,
          **keys):
    "A ref as RefCOCO has it."
    sentences = [dict(sent_id=100*ref_id+i, raw=s, sent=s, tokens=s.split())
                 for i, s in enumerate(sents)]
    return dict(ref_id=ref_id, ann_id=ann_id, image_id=image_id, category_id=category_id,
                split=split, file_name=f'COCO_train2014_{image_id:012d}_{ann_id}.jpg',
                sent_ids=[s['sent_id'] for s in sentences], sentences=sentences, **keys)


def an_annotation(ann_id=1, image_id=1, segmentation=None, category_id=37, **keys):
    "An annotation as COCO has it."
    return dict(id=ann_id, image_id=image_id, category_id=category_id, bbox=[2., 1., 4., 3.],
                area=12., iscrowd=0,
                segmentation=segmentation or [[2, 1, 6, 1, 6, 4, 2, 4]]) | keys


def by_hand(root, refs, annotations=None, name='mine', split_by='unc', size=(10, 12), images=None,
            pickled=None):
    """A data set as others write it: pickled refs, instances.json, pictures. Returns what reads it.
    `pickled`: the bytes of the pickle, if not those of `refs`."""
    folder, where = root/name, images or images_folder(root, name)
    for f in (folder, where): f.mkdir(parents=True, exist_ok=True)
    ids = sorted({r['image_id'] for r in refs} if isinstance(refs, list) else {1})
    pictures = [dict(id=i, file_name=f'{i:06d}.png', height=size[0], width=size[1]) for i in ids]
    annotations = annotations or [an_annotation(r['ann_id'], r['image_id']) for r in refs]
    categories = [dict(id=1, name='person', supercategory='person'),
                  dict(id=37, name='sports ball', supercategory='sports')]
    instances = dict(images=pictures, annotations=annotations, categories=categories)
    (folder/'instances.json').write_text(json.dumps(instances))
    (folder/f'refs({split_by}).p').write_bytes(python2(refs) if pickled is None else pickled)
    for i in ids: Image.new('RGB', size[::-1], (i % 256, 90, 30)).save(where/f'{i:06d}.png')
    return lambda **keys: Refer(name, split_by, root, **keys)


SPLITS = dict(a=('unc', {1: 'train', 2: 'train', 3: 'train', 4: 'val', 5: 'testA'}),
              b=('unc', {1: 'train', 2: 'testB', 6: 'train', 4: 'train'}),
              c=('umd', {3: 'val', 6: 'train', 7: 'train', 8: 'test'}))


def pictures_and_sets(root):
    """Three sets over eight pictures of one folder, with the same ref_ids and other splits: as
    RefCOCO, + and g."""
    images, sets = root/'images', []
    for name, (split_by, pictures) in SPLITS.items():
        refs = [a_ref(i, i, i, split, sents=(f'{name} {i} one', f'{name} {i} two'))
                for i, split in pictures.items()]
        load = by_hand(root, refs, name=name, split_by=split_by, images=images)
        sets.append(load(images=images))
    return sets


def counts_of(mask):
    "Uncompressed run lengths, by a loop."
    runs, now = [0], False
    for v in mask.flatten(order='F').tolist():
        if v != now:
            runs.append(0)
            now = v
        runs[-1] += 1
    return runs


def scene(seed=0, size=(20, 30), n=2, **keys):
    "An example for the writer: a picture of noise and n things, one phrase each."
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, *size), bool)
    for m in masks:
        y, x = rng.integers(0, size[0]-5), rng.integers(0, size[1]-5)
        m[y:y+5, x:x+5] = rng.random((5, 5)) < .8
        m[y, x] = True
    objects = [dict(mask=m, category='dog', expressions=[f'dog {seed} {i}'])
               for i, m in enumerate(masks)]
    picture = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    return dict(picture=picture, split='train', objects=objects) | keys
