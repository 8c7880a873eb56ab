"What a new user tries: any picture, any phrase, the command, and Ctrl-C in the middle."
import io, json, os, signal, subprocess, sys, warnings
import huggingface_hub, numpy as np, pytest, torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import nn
import risclip.predictor
from risclip.clip import load_clip
from risclip.model import RISCLIP, RUNGS, ModelSettings, load_risclip
from risclip.predictor import (LEAST_GROUND, Predictor, box_of, find_model, ground_share, outline, overlay, pick_device, read_picture,
                               risclip_segment, segment, slug, stored_threshold)
from risclip.refer import Refer, ReferDataset, decode_mask
from risclip.refmoji import GROUNDS, ground, refmoji_folder
from risclip.scoring import evaluate, intersection_and_union

SMALL = dict(shared=32, heads=4, ske_layers=1, ske_hidden=32, decoder_width=8)


@pytest.fixture(scope='module')
def shipped(): return load_risclip('risclip-refmojig')


@pytest.fixture(scope='module')
def refer(): return Refer('refmojig', root=refmoji_folder())


@pytest.fixture
def predictor(shipped): return Predictor(shipped, device='cpu').set_image(drawing())


def drawing(w=120, h=90):
    "A picture on a ground that the miniature knows."
    a = ground('grass')[:h, :w].copy()
    a[h//3:h//2, w//3:w//2] = (220, 30, 40)
    return Image.fromarray(a)


def build(clip, rung='decoder', **changes):
    torch.manual_seed(0)
    model = RISCLIP(ModelSettings(rung, **SMALL | changes), clip).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if not name.startswith('clip.') and p.abs().sum() == 0: nn.init.normal_(p, std=.1)
    return model


def quiet(f):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f()


# --- pictures

def saved(picture, kind, **kw):
    picture.save(out := io.BytesIO(), kind, **kw)
    return out.getvalue()


def test_kinds_of_pictures():
    rgb = drawing()
    a = np.asarray(rgb)
    grey = np.asarray(rgb.convert('L'))
    cmyk = saved(rgb.convert('CMYK'), 'JPEG', quality=100, subsampling=0)
    assert np.abs(np.asarray(read_picture(cmyk)).astype(int) - a).mean() < 3
    for given, wanted in [
        (rgb, a), (a, a), (a/255, a), (saved(rgb, 'PNG'), a), (saved(rgb, 'BMP'), a), (rgb.convert('RGBA'), a), (np.dstack([a, np.full(a.shape[:2], 255, np.uint8)]), a),
        (rgb.convert('L'), grey), (grey, grey), (saved(Image.fromarray(grey.astype(np.uint16)*257), 'PNG'), grey),
        (Image.fromarray(grey.astype(np.int32)*257), grey), (Image.fromarray((grey/255).astype(np.float32)), grey),
        (rgb.convert('P', palette=Image.Palette.ADAPTIVE), np.asarray(rgb.convert('P', palette=Image.Palette.ADAPTIVE).convert('RGB'))),
        (rgb.convert('1'), np.asarray(rgb.convert('1').convert('L')))]:
        found = read_picture(given)
        assert found.mode == 'RGB' and np.array_equal(np.asarray(found), wanted if wanted.ndim == 3 else np.dstack([wanted]*3))


def test_nothing_there_is_white():
    for mode in ('RGBA', 'LA'): assert read_picture(Image.new(mode, (2, 2))).getpixel((0, 0)) == (255, 255, 255)
    gif = Image.new('P', (2, 2), 0)
    assert read_picture(saved(gif, 'GIF', transparency=0)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_turns_the_picture(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    a = np.asarray(drawing())
    lying = {1: a, 2: a[:, ::-1], 3: a[::-1, ::-1], 4: a[::-1], 5: a.transpose(1, 0, 2), 6: np.rot90(a), 7: a[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(a, -1)}[orientation]
    assert np.array_equal(np.asarray(read_picture(saved(Image.fromarray(np.ascontiguousarray(lying)), 'PNG', exif=exif))), a)


@pytest.mark.parametrize('wrong', [np.zeros((3, 5, 6), np.uint8), np.zeros((0, 5, 3)), np.zeros(5), np.full((4, 4), 255.), np.full((4, 4), np.nan), np.zeros((4, 4), np.int64),
                                   np.zeros((4, 4), bool), np.zeros((1, 4, 4, 3), np.uint8), Image.fromarray(np.full((4, 4), 255, np.float32)), Image.new('RGB', (0, 4)), b'', b'GIF89a'])
def test_what_does_not_say_what_it_is(wrong):
    with pytest.raises(ValueError, match='the array|the picture'): read_picture(wrong)


def test_no_picture_at_all():
    for wrong in (None, 3, [1, 2], torch.zeros(3, 4, 4)):
        with pytest.raises(TypeError, match=f'not {type(wrong).__name__}'): read_picture(wrong)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path/'text.jpg').write_text('hello')
    (tmp_path/'half.jpg').write_bytes(saved(drawing(), 'JPEG')[:1500])
    (tmp_path/'empty.png').touch()
    for name, words in [('text.jpg', 'no picture that Pillow can read'), ('half.jpg', 'cut off or damaged'), ('empty.png', 'no picture'), ('', 'is a folder')]:
        with pytest.raises(ValueError, match=words) as e: read_picture(tmp_path/name)
        assert str(tmp_path/name) in str(e.value)
    with pytest.raises(FileNotFoundError, match='nowhere.png is not there'): read_picture(str(tmp_path/'nowhere.png'))
    drawing().save(tmp_path/'large.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ValueError, match='large.png has too many pixels'): read_picture(tmp_path/'large.png')


def test_a_broken_picture_leaves_the_one_before(predictor):
    before = predictor.predict('the dog').probability
    with pytest.raises(ValueError): predictor.set_image(b'not a picture')
    assert np.array_equal(before, predictor.predict('the dog').probability)


# --- answers

@pytest.mark.parametrize('rung', RUNGS)
def test_as_the_model_one_by_one(shipped, rung):
    phrases = ['the dog', 'a', 'the small red apple to the left of the large blue umbrella on the grass', 'the red ball', 'the big bus above the small red bus']
    for changes in (dict(), dict(cfe_layers='last half'), dict(values='raw')):
        model = build(shipped.clip, rung, **changes)
        predictor = Predictor(model, device='cpu', batch=2).set_image(drawing())
        for phrase, p in zip(phrases, predictor.predict(phrases), strict=True):
            with torch.no_grad(): output = model(predictor.pixels, model.clip.tokenize([phrase]))
            fine = (output.grounding if output.mask is None else output.mask).sigmoid()[0, 0].numpy()
            assert p.phrase == phrase
            for found, wanted in ((p.fine, fine), (p.grounding, output.grounding.sigmoid()[0, 0].numpy())):
                assert found.shape == wanted.shape and found.dtype == np.float32 and np.abs(found - wanted).max() <= 1e-5


def test_as_it_was_scored(shipped, refer):
    rows = refer.expressions('test')[:12]
    clip = shipped.clip
    dataset = ReferDataset(refer, 'test', clip.size, clip.tokenize, clip.mean, clip.std, expressions=rows)
    scores = evaluate(lambda b: dict(mask=shipped(b.pixels, b.tokens).mask.sigmoid()), dataset)['mask'].rows
    predictor = Predictor(shipped, device='cpu')
    for e, row in zip(rows, scores, strict=True):
        found = intersection_and_union(predictor.set_image(refer.picture(e.image_id)).predict(e.text).mask, refer.mask(e.ann_id))
        assert np.abs(np.subtract(found, row[:2])).max() <= 1        # a pixel on the threshold may fall to either side


def test_an_answer_fits_together(predictor):
    p = predictor.predict('the red ball')
    assert p.mask.dtype == bool and p.mask.shape == p.probability.shape == (90, 120) and p.probability.dtype == np.float32
    assert np.array_equal(p.mask, p.probability >= .5) and p.box == box_of(p.mask)
    assert p.score == (pytest.approx(p.probability[p.mask].mean(), abs=1e-4) if p.mask.any() else 0)
    assert np.array_equal(decode_mask(p.rle(), (90, 120)), p.mask)
    empty = Predictor(predictor.model, .9999, 'cpu').set_image(drawing()).predict('the red ball')
    assert (empty.box, empty.score, empty.mask.any()) == (None, 0., False)


def test_twenty_at_once(predictor, refer):
    phrases = [e.text for e in refer.expressions('test')[:20]]
    for together, alone in zip(predictor.predict(phrases), map(predictor.predict, phrases), strict=True):
        assert np.abs(together.probability - alone.probability).max() <= 1e-5


def test_no_gradient_and_nothing_changed(shipped):
    model = build(shipped.clip).requires_grad_(True).train()
    state = {n: v.clone() for n, v in model.state_dict().items()}
    p = Predictor(model, device='cpu').set_image(drawing()).predict('the dog')
    assert isinstance(p.fine, np.ndarray) and not model.training and all(q.grad is None for q in model.parameters())
    for n, v in model.state_dict().items(): assert torch.equal(v, state[n]), n


def test_phrases_that_are_none(predictor):
    for wrong, error in [('', ValueError), ('  \n', ValueError), (['the dog', ''], ValueError), ('\udcff', ValueError), (3, TypeError), (None, TypeError), (['the dog', None], TypeError), ({'a'}, TypeError)]:
        with pytest.raises(error, match='phrase'): predictor.predict(wrong)
    assert predictor.predict([]) == [] and predictor.predict(()) == []
    with pytest.raises(RuntimeError, match='call set_image'): Predictor(predictor.model, device='cpu').predict('the dog')


def test_unknown_words_and_long_phrases():
    predictor = Predictor(build(load_clip('tinyclip')), device='cpu').set_image(drawing())       # a tokenizer that has warned of nothing yet
    with pytest.warns(UserWarning, match='never met the word'): p = predictor.predict('왼쪽에 있는 빨간 공')
    assert p.phrase == '왼쪽에 있는 빨간 공' and p.mask.shape == (90, 120)
    with pytest.warns(UserWarning, match='its end is cut off'): assert predictor.predict(' '.join(['the dog left of']*125)).mask.shape == (90, 120)


@pytest.mark.parametrize('size', [(1, 1), (1, 700), (2000, 3)])
def test_small_and_thin(predictor, size):
    p = quiet(lambda: predictor.set_image(saved(Image.new('RGB', size, 'white'), 'PNG')).predict('the dog'))
    assert p.mask.shape == p.probability.shape == size[::-1] and np.isfinite(p.probability).all()
    assert overlay(Image.new('RGB', size), np.ones(size[::-1], bool)).size == size


def test_twelve_megapixels(predictor):
    large = saved(drawing(160, 120).resize((4000, 3000)), 'JPEG')
    found = list(predictor.set_image(large).each(['the dog', 'the red ball']))
    assert [p.probability.shape for p in found] == [(3000, 4000)]*2 and found[0].fine.nbytes < 100_000


# --- unlike what it knows

def test_silent_on_refmoji_and_not_on_a_photograph(shipped, refer):
    known = sorted({e.image_id for split in ('train', 'val', 'test') for e in refer.expressions(split)})
    for i in known[::len(known)//500][:500]: assert ground_share(refer.picture(i)) >= LEAST_GROUND, i
    photo = get_sample_data('grace_hopper.jpg', asfileobj=False)
    with pytest.warns(UserWarning, match='do not trust its masks.*ViT-B-16-quickgelu'): predictor = Predictor(shipped, device='cpu').set_image(photo)
    assert predictor.predict('the dog').mask.shape == Image.open(photo).size[::-1]
    for name in GROUNDS: assert ground_share(Image.fromarray(ground(name))) > .5, name
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        predictor.set_image(drawing())


# --- which model, which device

def test_where_the_map_is_cut(shipped, tmp_path):
    folder = build(shipped.clip, 'ske').save(tmp_path/'run'/'model')
    assert Predictor.from_pretrained(tmp_path/'run', 'cpu').threshold == .5
    (folder/'run.json').write_text('{"threshold": 0.4}')
    assert Predictor.from_pretrained(tmp_path/'run', 'cpu').threshold == .4
    (folder.parent/'metrics.json').write_text('{"thresholds": {"grounding": 0.3}}')
    (folder/'run.json').unlink()
    assert Predictor.from_pretrained(folder, 'cpu').threshold == .3 and Predictor.from_pretrained(folder, 'cpu', .6).threshold == .6
    raw = build(shipped.clip, 'raw', values='raw')
    (raw.save(tmp_path/'raw')/'run.json').write_text('{"threshold": 0.2}')
    assert stored_threshold(tmp_path/'raw', raw) == pytest.approx(1/(1 + np.exp(-(.2*raw.settings.scale + raw.settings.bias))))
    for wrong in (0, 1, -1, 2):
        with pytest.raises(ValueError, match='threshold'): Predictor(raw, wrong, 'cpu')
    with pytest.raises(ValueError, match='batch=0'): Predictor(raw, device='cpu', batch=0)


def test_names_of_models(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(risclip.predictor, 'snapshot_download', lambda name, **kw: asked.append(name) or str(find_model('risclip-refmojig')))
    assert Predictor.from_pretrained('someone/risclip', 'cpu').model.settings.rung == 'decoder' and asked == ['someone/risclip']
    (tmp_path/'file').touch()
    for wrong in ('nobody', 'a/b/c', '/no/where', '../x', str(tmp_path/'file')):
        with pytest.raises(FileNotFoundError, match="risclip-refmojig"): find_model(wrong)
    with pytest.raises(FileNotFoundError, match='config.json is not there'): Predictor.from_pretrained(tmp_path)
    assert asked == ['someone/risclip']


def test_without_a_net(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(FileNotFoundError, match="'someone/risclip' is neither a folder here, nor could it be fetched") as e: find_model('someone/risclip')
    assert '\n' not in str(e.value)


def test_devices():
    assert pick_device() == torch.device('cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu')
    for wrong in ('gpu', 'meta', 'cuda' if not torch.cuda.is_available() else 'mps'):
        with pytest.raises(ValueError, match='is not here: there is'): pick_device(wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA')
def test_cuda_says_the_same(shipped):
    model = build(load_clip('tinyclip'))
    alone = Predictor(model, device='cpu').set_image(drawing()).predict('the red ball').probability
    assert np.abs(Predictor(model, device='cuda').set_image(drawing()).predict('the red ball').probability - alone).max() < 1e-3


# --- the command

@pytest.mark.parametrize('phrase,name', [('The café, on the LEFT!', 'the-cafe-on-the-left'), ('빨간 공', 'phrase'), ('../../etc', 'etc'), ('a'*300, 'a'*40), ('-x-', 'x'), ('\n', 'phrase')])
def test_slug(phrase, name): assert slug(phrase) == name


def test_outline():
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8] = True
    assert outline(mask, 1).sum() == 7*7 - 5*5 and outline(mask, 2).sum() == 7*7 - 3*3 and outline(mask, 9).sum() == 7*7
    assert not outline(np.ones((3, 4), bool), 2).any() and not outline(np.zeros((3, 4), bool), 2).any()


def test_what_is_written(tmp_path, capsys):
    drawing().save(tmp_path/'a picture.png')
    file = quiet(lambda: segment(tmp_path/'a picture.png', ['the red ball', '빨간 공'], tmp_path/'new'/'out', device='cpu'))
    told = json.loads(file.read_text(encoding='utf-8'))
    names = [f'a picture-{n}-{kind}.png' for n in ('1-the-red-ball', '2-phrase') for kind in ('mask', 'overlay')]
    assert sorted(p.name for p in file.parent.iterdir()) == sorted([*names, 'a picture.json'])
    out = capsys.readouterr().out
    assert all(str(p) in out for p in file.parent.iterdir()) and told['size'] == [90, 120]
    for n, p in enumerate(told['phrases']):
        mask = decode_mask(p['segmentation'], (90, 120))
        assert np.array_equal(np.asarray(Image.open(file.parent/p['mask'])), 255*mask.astype(np.uint8)) and Image.open(file.parent/p['overlay']).size == (120, 90)
        assert p['box'] is None or tuple(p['box']) == box_of(mask)
    assert [p['phrase'] for p in told['phrases']] == ['the red ball', '빨간 공']
    quiet(lambda: segment(tmp_path/'a picture.png', ['the dog'], file.parent, device='cpu'))    # its own files are written anew


def refused(capsys, *args, **kw):
    with pytest.raises(SystemExit) as e: risclip_segment(*args, **kw)
    err = capsys.readouterr().err
    assert e.value.code == 1 and 'Traceback' not in err and err.startswith('risclip_segment: error: ') and err.count('\n') == 1
    return err


def test_errors_name_file_value_and_remedy(tmp_path, capsys):
    good = tmp_path/'good.png'
    drawing().save(good)
    (tmp_path/'text.jpg').write_text('hello')
    at = dict(out=str(tmp_path/'out'))
    assert 'text.jpg is no picture' in refused(capsys, str(tmp_path/'text.jpg'), ['the dog'], **at)
    assert 'is a folder' in refused(capsys, str(tmp_path), ['the dog'], **at)
    assert 'nowhere.png is not there' in refused(capsys, str(tmp_path/'nowhere.png'), ['the dog'], **at)
    assert 'phrase 2 is empty' in refused(capsys, str(good), ['the dog', ''], **at)
    assert not (tmp_path/'out').exists()
    assert "no model 'nobody'" in refused(capsys, str(good), ['the dog'], model='nobody', **at)
    assert "device='gpu'" in refused(capsys, str(good), ['the dog'], device='gpu', **at)
    assert 'config.json is not there' in refused(capsys, str(good), ['the dog'], model=str(tmp_path), **at)
    assert 'text.jpg cannot be written' in refused(capsys, str(good), ['the dog'], out=str(tmp_path/'text.jpg'))
    (tmp_path/'good.json').write_text('{"mine": 1}')
    assert 'good.json is there' in refused(capsys, str(good), ['the dog'], out=str(tmp_path))
    (tmp_path/'good.jpg').write_bytes(saved(drawing(), 'JPEG'))
    quiet(lambda: risclip_segment(str(tmp_path/'good.jpg'), ['the dog'], out=str(tmp_path/'other'), device='cpu'))
    assert 'wrote for good.png' in refused(capsys, str(good), ['the dog'], out=str(tmp_path/'other'))
    assert (tmp_path/'good.json').read_text() == '{"mine": 1}' and list((tmp_path/'out').iterdir()) == []


def test_a_folder_that_may_not_be_written(tmp_path, capsys):
    drawing().save(tmp_path/'good.png')
    locked = tmp_path/'locked'
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK): pytest.skip('chmod does not bind this user')
    assert 'locked cannot be written' in refused(capsys, str(tmp_path/'good.png'), ['the dog'], out=str(locked))


def command(*args): return [sys.executable, '-c', 'import sys\nfrom risclip.predictor import risclip_segment\nfrom fastcore.script import _run_cli\nsys.exit(_run_cli(risclip_segment, False))', *map(str, args)]


def test_the_installed_command(tmp_path):
    script = os.path.join(os.path.dirname(sys.executable), 'risclip_segment')
    if not os.path.exists(script): pytest.skip('risclip is not installed with its commands')
    drawing().save(tmp_path/'a.png')
    run = lambda *args: subprocess.run([script, *map(str, args)], capture_output=True, text=True, cwd=tmp_path)
    done = run('a.png', 'the red ball', 'a dog', '--device', 'cpu', '--show')
    assert done.returncode == 0 and (tmp_path/'a-2-a-dog-mask.png').exists() and 'a.json' in done.stdout and 'no window' in done.stderr, done.stderr
    done = run('a.png')
    assert done.returncode == 2 and 'phrase' in done.stderr


@pytest.mark.skipif(os.name == 'nt', reason='signals are another matter there')
def test_ctrl_c_in_the_middle(tmp_path):
    drawing().resize((2400, 1800)).save(tmp_path/'a.png')
    out = tmp_path/'out'
    with subprocess.Popen(command(tmp_path/'a.png', *[f'dog number {n}' for n in range(40)], '--out', out, '--device', 'cpu'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:    # else a shell's background job would pass on its deafness to Ctrl-C
        process.stdout.readline()                                # the first phrase is done
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'stopped' in err and 'Traceback' not in err, err
    files = sorted(out.iterdir())
    assert files and {f.suffix for f in files} == {'.png'} and len(files) < 80
    for f in files: Image.open(f).load()
