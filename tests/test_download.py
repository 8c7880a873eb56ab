"""Getting the data, over real HTTP from a server on this machine: places that fail, torn files,
kills, a full disk, what lies elsewhere."""
import errno, io, os, re, shutil, stat, subprocess, sys, threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

import risclip.download as download
from conftest import ROOT
from risclip.archives import fetch, unpack
from risclip.download import (
    MIRRORS, get_annotations, get_data, install, picture_fault, picture_faults, report,
    risclip_data, take_pictures)
from risclip.files import require_free_space
from risclip.refer import images_folder
from risclip.writer import write_refer

pytestmark = pytest.mark.filterwarnings('ignore:.*differs from what was published')
N = 8
NAMES = [f'COCO_train2014_{i:012d}.jpg' for i in range(1, N+1)]
TRAIN2014 = 'images/mscoco/images/train2014'

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        s, start = self.server, int(self.headers.get('Range', 'bytes=0-')[6:-1])
        with s.lock:
            s.asked.append((self.path, start))
            cut = s.cut.pop(self.path, None)
        page = s.pages.get(self.path, 404)
        if isinstance(page, int):
            self.send_response(page)
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        if start and start >= len(page):
            self.send_response(416)
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        if not s.ranges: start = 0
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(page)-start))
        self.end_headers()
        self.wfile.write(page[start:][:cut])

@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    s.pages, s.cut, s.asked, s.ranges, s.lock = {}, {}, [], True, threading.Lock()
    s.url = f'http://127.0.0.1:{s.server_port}'
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    for name in MIRRORS:
        monkeypatch.setitem(MIRRORS, name, [f'{s.url}/{i}/{name}.zip' for i in range(3)])
    monkeypatch.setattr(download, 'PICTURES', f'{s.url}/train2014')
    monkeypatch.setattr(download, 'PICTURES_ZIP', f'{s.url}/train2014.zip')
    yield s
    s.shutdown()
    s.server_close()

def zipped(files):
    with ZipFile(out := io.BytesIO(), 'w', ZIP_DEFLATED) as z:
        for path, content in files.items(): z.writestr(path, content)
    return out.getvalue()

@pytest.fixture(scope='session')
def made(tmp_path_factory):
    "A folder as a user may have it: refcoco/ and train2014/, in RefCOCO's files."
    folder = tmp_path_factory.mktemp('made')
    photographs = folder/'train2014'
    photographs.mkdir()
    def example(i):
        noise = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photographs/NAMES[i])
        mask = np.zeros((30, 40), bool)
        mask[5:20, i:i+10] = True
        return dict(picture=photographs/NAMES[i], image_id=i+1,
                    split=('train', 'val', 'testA', 'testB')[i % 4],
                    objects=[dict(mask=mask, category='dog', expressions=['the dog', 'left one'])])
    write_refer(folder, 'refcoco', 'unc', map(example, range(N)), images=photographs)
    shutil.copy(folder/'refcoco'/'refs(unc).p', folder/'refcoco'/'refs(google).p')
    return folder

def annotations(made):
    return {f'refcoco/{p.name}': p.read_bytes() for p in (made/'refcoco').iterdir()}
def photographs(made): return {name: (made/'train2014'/name).read_bytes() for name in NAMES}

@pytest.fixture
def shelf(server, made):
    "All is well: the third place has the archive, and the pictures are there."
    server.pages |= {'/0/refcoco.zip': 404, '/1/refcoco.zip': b'<!DOCTYPE html><html>sorry</html>',
                     '/2/refcoco.zip': zipped(annotations(made))}
    server.pages |= {f'/train2014/{name}': content for name, content in photographs(made).items()}
    in_zip = {f'train2014/{name}': content for name, content in photographs(made).items()}
    server.pages['/train2014.zip'] = zipped(in_zip | {'train2014/other.jpg': b'x'})
    return server

def get(root, **keys): return get_data('refcoco', root, progress=False, **keys)
def asked(server, part): return sorted(path for path, _ in server.asked if part in path)

def whole(root, made):
    assert {p.name: p.read_bytes() for p in (root/TRAIN2014).iterdir()} == photographs(made)
    # those: kept by the reader
    assert {f'refcoco/{p.name}': p.read_bytes() for p in (root/'refcoco').iterdir()
            if not p.match('refs(*).json')} == annotations(made)
    return {p.name for p in root.iterdir()} == {'refcoco', 'images', '.risclip_data.lock'}

# ---------------------------------------------------------------- the network

def test_places_in_turn(shelf, made, tmp_path):
    refer, faults = get(tmp_path/'new'/'data')
    assert faults == {} and len(refer.pictures) == N and refer.split_by == 'unc'
    assert asked(shelf, 'refcoco') == ['/0/refcoco.zip', '/1/refcoco.zip', '/2/refcoco.zip']
    assert whole(tmp_path/'new'/'data', made)
    shelf.asked.clear()
    assert get(tmp_path/'new'/'data')[1] == {} and shelf.asked == []

def test_no_place_has_it(shelf, tmp_path):
    shelf.pages['/2/refcoco.zip'] = shelf.pages['/2/refcoco.zip'][:-30]
    with pytest.raises(ConnectionError) as e: get(tmp_path)
    for words in ('/0/refcoco.zip answers 404', '/1/refcoco.zip is a web page',
                  '/2/refcoco.zip is a torn zip', f'refcoco.zip into {tmp_path}', '--from FOLDER'):
        assert words in str(e.value)
    # nothing to trip over
    assert {p.name for p in tmp_path.iterdir()} == {'.risclip_data.lock'}
    shelf.pages['/0/refcoco.zip'] = b''
    with pytest.raises(ConnectionError, match='0/refcoco.zip is empty'): get(tmp_path)

def test_a_zip_with_other_bytes_is_found(shelf, made, tmp_path):
    torn = bytearray(shelf.pages['/2/refcoco.zip'])
    torn[len(torn)//2] ^= 255
    shelf.pages['/2/refcoco.zip'] = bytes(torn)
    with pytest.raises(ConnectionError, match='2/refcoco.zip is a damaged zip'): get(tmp_path)

@pytest.mark.parametrize('ranges', [True, False])
def test_goes_on_in_the_middle_of_an_archive(server, tmp_path, ranges):
    content = zipped({'a': np.random.default_rng(0).bytes(200_000)})
    server.pages['/a.zip'], server.cut['/a.zip'], server.ranges = content, 100_000, ranges
    with pytest.raises(ConnectionError, match='a.zip fails'):
        fetch([f'{server.url}/a.zip'], tmp_path/'a.zip', progress=False)
    there = (tmp_path/'a.zip.part').stat().st_size
    assert 50_000 < there < 200_000 and not (tmp_path/'a.zip').exists()
    assert fetch([f'{server.url}/a.zip'], tmp_path/'a.zip', progress=False).read_bytes() == content
    assert server.asked == [('/a.zip', 0), ('/a.zip', there)]
    assert [p.name for p in tmp_path.iterdir()] == ['a.zip']

@pytest.mark.parametrize('part, again', [(1.0, 0), (1.5, 2)])
def test_a_part_that_is_complete_or_too_long(server, tmp_path, part, again):
    content = server.pages['/a.zip'] = zipped({'a': bytes(1000)})
    (tmp_path/'a.zip.part').write_bytes((content + content)[:int(len(content)*part)] if part == 1
                                        else b'x'*int(len(content)*part))
    assert fetch([f'{server.url}/a.zip']*2, tmp_path/'a.zip',
                 progress=False).read_bytes() == content
    assert len(server.asked) == again

def offline(monkeypatch):
    for name in MIRRORS: monkeypatch.setitem(MIRRORS, name, ['http://127.0.0.1:9/x.zip'])
    monkeypatch.setattr(download, 'PICTURES', 'http://127.0.0.1:9')
    monkeypatch.setattr(download, 'PICTURES_ZIP', 'http://127.0.0.1:9/train2014.zip')

def test_offline(made, tmp_path, monkeypatch, server):
    offline(monkeypatch)
    with pytest.raises(ConnectionError) as e: get(tmp_path)
    said = str(e.value)
    assert f'refcoco.zip into {tmp_path}, from' in said and 'http://127.0.0.1:9/x.zip' in said
    assert f'train2014.zip (13 GB) into {tmp_path}/images/mscoco, from' in said
    assert str(tmp_path/TRAIN2014) in said
    # by hand, as it says
    (tmp_path/'refcoco.zip').write_bytes(zipped(annotations(made)))
    with pytest.raises(ConnectionError, match='no picture could be fetched') as e: get(tmp_path)
    assert 'By hand' in str(e.value) and (tmp_path/'refcoco'/'instances.json').exists()
    (tmp_path/'images'/'mscoco').mkdir(parents=True, exist_ok=True)
    (tmp_path/'images'/'mscoco'/'train2014.zip').write_bytes(zipped({
        f'train2014/{name}': content for name, content in photographs(made).items()}))
    assert get(tmp_path)[1] == {}

def test_gives_up_where_nothing_comes(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(download, 'GIVE_UP', 3)
    for name in NAMES: shelf.pages[f'/train2014/{name}'] = 404
    with pytest.raises(ConnectionError, match='the last answers 404'): get(tmp_path, workers=1)
    # three tries each; one or two were under way
    assert len(asked(shelf, 'train2014')) <= 5*3

# ---------------------------------------------------------------- the pictures

def test_goes_on_after_a_kill(shelf, made, tmp_path):
    script = tmp_path/'dies.py'
    script.write_text(f'''
import os, sys, risclip.download as d
d.MIRRORS['refcoco'], d.PICTURES = [{shelf.url!r} + '/2/refcoco.zip'], {shelf.url!r} + '/train2014'
held, calls = d.picture_fault, iter(range(99))
def dying(file, size):
    fetched = str(file).endswith('.new')                            # and not yet renamed
    if fetched and next(calls) == 3: os._exit(9)
    return held(file, size)
d.picture_fault = dying
d.get_data('refcoco', {str(tmp_path/'data')!r}, workers=1, progress=False)''')
    assert subprocess.run([sys.executable, '-W', 'ignore', script],
                          env=os.environ | {'PYTHONPATH': str(ROOT)}).returncode == 9
    images = tmp_path/'data'/TRAIN2014
    assert sorted(p.name for p in images.glob('*.jpg')) == NAMES[:3]
    assert len(list(images.glob('*.new'))) == 1
    (images/NAMES[0]).write_bytes(photographs(made)[NAMES[0]][:-200])
    (images/NAMES[4]).touch()
    (images/NAMES[5]).write_bytes(b'<html>sorry')
    before = {name: (images/name).stat().st_ino for name in NAMES[1:3]}
    shelf.asked.clear()
    assert get(tmp_path/'data')[1] == {} and whole(tmp_path/'data', made)
    assert asked(shelf, 'jpg') == [f'/train2014/{NAMES[i]}' for i in (0, 3, 4, 5, 6, 7)]
    assert asked(shelf, 'zip') == []
    assert {name: (images/name).stat().st_ino for name in before} == before

def test_some_pictures_do_not_come(shelf, made, tmp_path):
    good = dict(shelf.pages)
    shelf.pages |= {f'/train2014/{NAMES[1]}': 503, f'/train2014/{NAMES[2]}': b'<html>sorry',
                    f'/train2014/{NAMES[3]}': good[f'/train2014/{NAMES[3]}'][:300]}
    # once: the second try gets it
    shelf.cut[f'/train2014/{NAMES[4]}'] = 50
    refer, faults = get(tmp_path)
    assert list(faults) == NAMES[1:4]
    assert faults[NAMES[1]] == 'is not there (answers 503)'
    assert 'is a web page, not a picture)' in faults[NAMES[2]]
    assert 'pictures: 5 whole, 3 missing, 0 damaged' in report(refer, faults)
    assert NAMES[1] in report(refer, faults)
    shelf.pages |= good
    shelf.asked.clear()
    assert get(tmp_path)[1] == {} and whole(tmp_path, made)
    assert asked(shelf, '/') == [f'/train2014/{name}' for name in NAMES[1:4]]

def test_the_check(made, tmp_path):
    refer = get_annotations('refcoco', tmp_path, made, progress=False)
    shutil.copytree(made/'train2014', refer.images)
    assert picture_faults(refer, progress=False) == {}
    (refer.images/NAMES[0]).unlink()
    Image.new('RGB', (30, 40)).save(refer.images/NAMES[1])
    (refer.images/NAMES[2]).write_bytes(photographs(made)[NAMES[2]][:-100])
    (refer.images/NAMES[3]).write_bytes(b'')
    faults = picture_faults(refer, progress=False)
    assert list(faults) == NAMES[:4]
    assert faults[NAMES[1]] == 'is 40 x 30 instead of 30 x 40 (height x width)'
    assert 'torn' in faults[NAMES[2]] and 'empty' in faults[NAMES[3]]
    assert 'pictures: 4 whole, 1 missing, 3 damaged or of another size' in report(refer, faults)
    assert 'val: 2 images, 2 objects, 4 expressions' in report(refer, faults)

@pytest.mark.parametrize('mode', ['L', 'CMYK'])
def test_pictures_of_every_kind_pass(tmp_path, mode):
    Image.new(mode, (40, 30)).save(tmp_path/'a.jpg')
    assert picture_fault(tmp_path/'a.jpg', (30, 40)) is None

def test_a_picture_with_a_note_to_turn_it(tmp_path):
    note = Image.Exif()
    note[0x0112] = 8
    Image.new('RGB', (40, 30)).save(tmp_path/'a.jpg', exif=note)
    assert picture_fault(tmp_path/'a.jpg', (30, 40)) is None
    assert picture_fault(tmp_path/'a.jpg', (40, 30)) is None
    fault = 'is 30 x 40 instead of 41 x 30 (height x width)'
    assert picture_fault(tmp_path/'a.jpg', (41, 30)) == fault

def test_a_picture_name_that_leads_elsewhere(made, tmp_path):
    shutil.copytree(made/'refcoco', tmp_path/'refcoco')
    file = tmp_path/'refcoco'/'instances.json'
    file.write_text(file.read_text().replace(NAMES[0], '../../escape.jpg'))
    with pytest.raises(ValueError, match=r"instances.json names a picture '../../escape.jpg'"):
        get(tmp_path)

def test_counts_that_differ_warn(made, tmp_path):
    with pytest.warns(UserWarning,
                      match=r'train has \(2, 2, 4\) instead of \(16994, 42404, 120624\)'):
        get_annotations('refcoco', tmp_path, made)

# ---------------------------------------------------------------- archives

@pytest.mark.parametrize('entry', ['../out', 'refcoco/../../out', '/out', '//host/out', 'C:\\out',
                                   '..\\out', 'link'])
def test_an_entry_that_leads_out(shelf, made, tmp_path, entry):
    info = ZipInfo('x')
    info.filename = info.orig_filename = entry
    if entry == 'link': info.external_attr = (stat.S_IFLNK | 0o777) << 16
    root = tmp_path/'deep'/'data'
    shelf.pages['/2/refcoco.zip'] = zipped(annotations(made) | {info: b'/etc/passwd'})
    with pytest.raises(ValueError, match='refused: its entry ' + re.escape(repr(entry))): get(root)
    assert not (root/'refcoco').exists()
    assert not list(tmp_path.rglob('out*'))
    assert not list(tmp_path.rglob('link'))
    shelf.pages['/2/refcoco.zip'] = zipped(annotations(made))
    # the bad one is out of the way
    assert get(root)[1] == {}

def test_killed_while_it_unpacks(tmp_path):
    "What has its name is whole, and the next call goes on behind it."
    files = {f'{i}.jpg': np.random.default_rng(i).bytes(1000) for i in range(6)}
    (tmp_path/'some.zip').write_bytes(zipped({f'in/{name}': v for name, v in files.items()}))
    script = tmp_path/'dies.py'
    script.write_text('''
import os, shutil, risclip.archives as a
copy, calls = shutil.copyfileobj, iter(range(99))
def dying(inside, out, *length):
    copy(inside, out, *length)
    if next(calls) < 3: return
    out.truncate(500)
    os._exit(9)
shutil.copyfileobj = dying
a.unpack('some.zip', 'out', lambda path: path.name)''')
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    assert subprocess.run([sys.executable, script], cwd=tmp_path, env=env).returncode == 9
    there = {p.name: p.read_bytes() for p in (tmp_path/'out').glob('*.jpg')}
    assert there == {name: files[name] for name in list(files)[:3]}
    rest = unpack(tmp_path/'some.zip', tmp_path/'out',
                  lambda path: path.name if path.name not in there else None)
    assert rest == list(files)[3:]
    assert {p.name: p.read_bytes() for p in (tmp_path/'out').iterdir()} == files

@pytest.mark.parametrize('place, finds', [(0, 'zlib'), (1500, 'checksum')])
def test_a_damaged_entry_is_named(tmp_path, place, finds):
    "What was there under its name stays."
    archive, noise = tmp_path/'some.zip', np.random.default_rng(0).bytes(3000) + b'the dog '*1000
    archive.write_bytes(zipped({'a': b'new', 'b': noise}))
    with ZipFile(archive) as z: start = z.getinfo('b').header_offset + len('b') + 30
    content = bytearray(archive.read_bytes())
    for i in range(8): content[start + place + i] ^= 255
    archive.write_bytes(content)
    (tmp_path/'b').write_bytes(b'old')
    with pytest.raises(ValueError, match='some.zip: b in it is damaged .*Get it again') as e:
        unpack(archive, tmp_path, lambda path: path.name)
    assert ('CRC' in str(e.value)) == (finds == 'checksum')
    assert {p.name for p in tmp_path.iterdir()} == {'some.zip', 'a', 'b'}
    assert (tmp_path/'b').read_bytes() == b'old'

def test_an_archive_of_something_else(tmp_path, made):
    (tmp_path/'refcoco.zip').write_bytes(zipped({'refcoco/notes.txt': 'hello'}))
    with pytest.raises(ValueError, match='refcoco.zip is not what it should be'):
        get_annotations('refcoco', tmp_path/'data', tmp_path)
    assert list((tmp_path/'data').iterdir()) == []
    torn = annotations(made) | {'refcoco/instances.json': b'{"images": ['}
    (tmp_path/'refcoco.zip').write_bytes(zipped(torn))
    with pytest.raises(ValueError, match='instances.json is not whole'):
        install(tmp_path/'refcoco.zip', tmp_path/'data'/'refcoco')
    (tmp_path/'refcoco.zip').write_text('<html>')
    with pytest.raises(ValueError, match='refcoco.zip is a web page, not a zip'):
        install(tmp_path/'refcoco.zip', tmp_path/'data'/'refcoco')

def test_what_cannot_be_read_is_kept_aside(shelf, made, tmp_path, capsys):
    get(tmp_path)
    (tmp_path/'refcoco'/'instances.json').write_text('<html>')
    (tmp_path/'refcoco.zip').write_text('<html>by hand')
    assert get(tmp_path)[1] == {}
    assert (tmp_path/'refcoco.bad1'/'instances.json').read_text() == '<html>'
    assert (tmp_path/'refcoco.zip.bad1').exists()
    assert 'refcoco.zip is a web page, not a zip. It is now' in capsys.readouterr().out

# ---------------------------------------------------------------- room

def test_no_room(shelf, made, tmp_path, monkeypatch):
    def left(free):
        monkeypatch.setattr(shutil, 'disk_usage',
                            lambda path: namedtuple('usage', 'total used free')(10**12, 0, free))
    left(100)
    with pytest.raises(OSError, match=f'{re.escape(str(tmp_path))}.* make room') as e: get(tmp_path)
    assert e.value.errno == errno.ENOSPC and not isinstance(e.value, ConnectionError)
    # asked before the first byte
    assert not any(p.stat().st_size for p in tmp_path.iterdir())
    # enough for annotations, not for N pictures
    left(10**6)
    shelf.asked.clear()
    with pytest.raises(OSError, match='train2014 needs 1 MB') as e: get(tmp_path)
    assert e.value.errno == errno.ENOSPC
    assert (tmp_path/'refcoco').exists()
    assert asked(shelf, 'jpg') == []
    left(10**9)
    assert get(tmp_path)[1] == {}
    left(10)
    with pytest.raises(OSError, match='make room'): unpack_all(zipped({'a': bytes(1000)}), tmp_path)
    with pytest.raises(OSError, match='make room'): require_free_space(tmp_path/'not'/'yet', 11)

def unpack_all(content, folder):
    (folder/'some.zip').write_bytes(content)
    return unpack(folder/'some.zip', folder, lambda path: path.name)

# ---------------------------------------------------------------- what the user has

@pytest.mark.parametrize('zips', [False, True])
def test_from_a_folder(made, tmp_path, monkeypatch, server, zips):
    offline(monkeypatch)
    mine, before = made, photographs(made)
    if zips:
        mine = tmp_path/'mine'
        mine.mkdir()
        (mine/'refcoco.zip').write_bytes(zipped(annotations(made)))
        in_zip = {f'train2014/{name}': content for name, content in before.items()}
        (mine/'train2014.zip').write_bytes(zipped(in_zip | {'train2014/other.jpg': b'x'}))
    times = {p: p.stat().st_mtime_ns for p in mine.rglob('*') if p.is_file()}
    assert get(tmp_path/'data', from_=str(mine))[1] == {} and whole(tmp_path/'data', made)
    assert {p: p.stat().st_mtime_ns for p in mine.rglob('*') if p.is_file()} == times
    if not zips:
        assert os.path.samefile(made/'train2014'/NAMES[0], tmp_path/'data'/TRAIN2014/NAMES[0])

def test_from_another_disk(made, tmp_path, monkeypatch):
    def no(*args): raise OSError(errno.EXDEV, 'Invalid cross-device link')
    monkeypatch.setattr(os, 'link', no)
    refer = get_annotations('refcoco', tmp_path, made)
    take_pictures(refer, NAMES, made, progress=False)
    assert picture_faults(refer, progress=False) == {}
    assert not os.path.samefile(made/'train2014'/NAMES[0], refer.images/NAMES[0])

def test_from_has_only_a_part(shelf, made, tmp_path):
    mine = tmp_path/'mine'/'train2014'
    mine.mkdir(parents=True)
    for name in NAMES[:3]: shutil.copy(made/'train2014'/name, mine)
    (mine/NAMES[3]).write_bytes(b'torn')
    assert get(tmp_path/'data', from_=tmp_path/'mine')[1] == {} and whole(tmp_path/'data', made)
    assert asked(shelf, 'jpg') == [f'/train2014/{name}' for name in NAMES[3:]]
    assert (mine/NAMES[3]).read_bytes() == b'torn'

@pytest.mark.parametrize('name', ['refcoco.zip', 'train2014.zip'])
def test_a_bad_zip_of_the_user_is_named_and_stays(shelf, tmp_path, name):
    (tmp_path/name).write_bytes(b'<html>')
    with pytest.raises(ValueError,
                       match=f'{name} is a web page, not a zip. Get it again, or leave out --from'):
        get(tmp_path/'data', from_=tmp_path)
    assert (tmp_path/name).read_bytes() == b'<html>'

def test_the_whole_zip(shelf, made, tmp_path):
    assert get(tmp_path, whole_zip=True)[1] == {} and asked(shelf, 'jpg') == []
    assert {p.name for p in (tmp_path/TRAIN2014).iterdir()} == set(NAMES)
    assert (tmp_path/'images'/'mscoco'/'train2014.zip').exists()
    damaged = zipped({f'train2014/{NAMES[0]}': bytes(10**5)}).replace(
        NAMES[0].encode(), NAMES[1].encode(), 1)
    (tmp_path/'images'/'mscoco'/'train2014.zip').write_bytes(damaged)
    (tmp_path/TRAIN2014/NAMES[0]).unlink()
    # set aside; the picture came alone
    assert get(tmp_path)[1] == {} and (tmp_path/'images'/'mscoco'/'train2014.zip.bad1').exists()

# ---------------------------------------------------------------- the command

def test_command(shelf, made, tmp_path, capsys):
    risclip_data('refcoco', root=str(tmp_path))
    assert 'pictures: 8 whole, 0 missing' in capsys.readouterr().out
    (tmp_path/TRAIN2014/NAMES[0]).unlink()
    shelf.asked.clear()
    with pytest.raises(SystemExit): risclip_data('refcoco', root=str(tmp_path), check=True)
    said = capsys.readouterr()
    assert shelf.asked == [] and f'{NAMES[0]} is not there' in said.out
    assert '1 pictures are missing or not right: run it without --check' in said.err
    with FileLock(tmp_path/'.risclip_data.lock'), pytest.raises(SystemExit):
        risclip_data('refcoco', root=str(tmp_path))
    said = capsys.readouterr().err
    assert said.startswith('risclip_data: error: another risclip_data is at work')
    assert said.count('\n') == 1
    with pytest.raises(ValueError): risclip_data('refcocg', root=str(tmp_path), debug=True)

@pytest.mark.parametrize('name, remedy', [
    ('refcocg', "did you mean 'refcocog'"), ('RefCOCO+', "did you mean 'refcoco+'"),
    ('refmojig', 'make data'), ('', 'there are refcoco, refcoco+, refcocog')])
def test_wrong_names(tmp_path, name, remedy, capsys):
    with pytest.raises(SystemExit): risclip_data(name, root=str(tmp_path/'data'))
    assert remedy in capsys.readouterr().err
    assert not (tmp_path/'data').exists()

def run(tmp_path, *args, **env):
    "The console script, as pip writes it."
    script = tmp_path/'risclip_data'
    script.write_text('import sys\nfrom risclip.download import '
                      'risclip_data\nsys.exit(risclip_data())\n')
    return subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True,
                          cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(ROOT)} | env)

def test_console_script(made, tmp_path):
    settings = (ROOT/'settings.ini').read_text()
    assert 'risclip_data=risclip.download:risclip_data' in settings
    assert re.search(r'^requirements = .*\bpooch', settings, re.M)
    done = run(tmp_path, 'refcoco', '--from', made, '--root', 'data')
    assert done.returncode == 0 and 'pictures: 8 whole, 0 missing' in done.stdout
    assert 'instead of (16994, 42404, 120624)' in done.stderr, done.stderr
    away = run(tmp_path, 'refcocog', f'--from={made}', '--root', 'data',
               http_proxy='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9')
    assert away.returncode == 1 and 'Traceback' not in away.stderr
    assert 'refcocog.zip into data, from' in away.stderr
    assert all(url in away.stderr for url in MIRRORS['refcocog'])
