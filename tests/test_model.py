"""The whole model: every untrained rung is CLIP, padding changes nothing, what was trained is
saved, what does not fit is refused."""
import copy, json
from types import SimpleNamespace

import open_clip, pytest, torch
from conftest import narrow_clip_folder
from safetensors.torch import load_file, save_file
from torch import nn

import risclip.hub
import risclip.model
from risclip.clip import eos_position, load_clip
from risclip.files import tinyclip_folder
from risclip.grounding import raw_grounding
from risclip.hub import model_folder
from risclip.losses import segmentation_losses
from risclip.model import RISCLIP, RUNGS, ModelSettings, check_clip, fingerprint, stage_of

SMALL = dict(cfe_dim=32, num_heads=4, ske_layers=2, ske_mlp_dim=32, decoder_width=8)
PHRASES = ['the dog', 'the small red apple to the left of the large blue umbrella on the grass']


@pytest.fixture(scope='module')
def clip(): return load_clip('tinyclip')


def inputs(clip, n=2):
    torch.manual_seed(0)
    return torch.randn(n, 3, clip.size, clip.size), clip.tokenize(PHRASES[:n])


def build(clip, rung='decoder', awake=False, **changes):
    torch.manual_seed(0)
    features = tuple(range(1, min(4, len(clip.image.blocks)) + 1))
    settings = ModelSettings(rung, **dict(SMALL, features=features) | changes)
    model = RISCLIP(settings, clip).eval()
    for name, p in model.named_parameters():
        if awake and stage_of(name) and p.detach().abs().sum() == 0: nn.init.normal_(p, std=.1)
    return model


def architecture(folder, image_blocks, text_blocks, patch, size):
    "A CLIP with random weights, in open_clip's local-dir layout."
    vision = dict(image_size=size, patch_size=patch, width=32, layers=image_blocks, head_width=16)
    text = dict(context_length=24, vocab_size=49408, width=16, heads=2, layers=text_blocks)
    cfg = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    folder.mkdir()
    preprocess = dict(mean=[.5]*3, std=[.5]*3)
    written = json.dumps(dict(model_cfg=cfg, preprocess_cfg=preprocess))
    (folder/'open_clip_config.json').write_text(written)
    torch.manual_seed(1)
    save_file(open_clip.CLIP(**cfg).state_dict(), folder/'open_clip_model.safetensors')
    return load_clip(folder)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- what is on

def test_rungs_are_a_ladder():
    for n, rung in enumerate(RUNGS):
        assert [r for r in RUNGS if ModelSettings(rung).has(r)] == list(RUNGS[:n + 1])


@pytest.mark.parametrize('wrong', [
    dict(rung='SKE'), dict(rung=None), dict(num_heads=4.), dict(size='96'), dict(scale='15'),
    dict(cfe_layers=1.5), dict(clip=None), dict(attention='raw'), dict(features=(1., 2.))])
def test_settings_refuse_what_makes_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): ModelSettings(**wrong)


def test_whole_numbers_are_taken_for_fractions(): assert ModelSettings(bias=-2, scale=10).bias == -2


@pytest.mark.parametrize('rung', RUNGS)
@pytest.mark.parametrize('cfe_layers', [None, 'last half'])
def test_a_picture_is_encoded_once_for_all_its_phrases(clip, rung, cfe_layers):
    """The same answers as one picture a phrase, and fewer blocks computed: none of those that no
    phrase can reach is computed twice."""
    model = build(clip, rung, awake=True, cfe_layers=cfe_layers)
    pixels, tokens = inputs(clip)
    tokens, image_index, count = tokens[[0, 1, 1, 0]], torch.tensor([1, 0, 1, 1]), []
    hooks = [b.resblock.ln_2.register_forward_hook(lambda m, x, y: count.append(len(y)))
             for b in clip.image.blocks]
    with torch.no_grad(): shared = model(pixels, tokens, image_index)
    n, blocks = sum(count), len(clip.image.blocks)
    with torch.no_grad():
        cache = model.encode_image(pixels)
        lengths = len(cache)
        cached = model(None, tokens, image_index, cache)
        plain = model(pixels[image_index], tokens)
    for h in hooks: h.remove()
    for out in (shared, cached):
        close(out.grounding, plain.grounding)
        if plain.mask is not None: close(out.mask, plain.mask)
    free = blocks if RUNGS.index(rung) < RUNGS.index('cfe') else 2 if cfe_layers else 0
    assert n == 2*free + 4*(blocks - free)
    assert len(cache) == lengths == 1 + free, 'the cache is read, not changed'


@pytest.mark.parametrize('rung', RUNGS)
@pytest.mark.parametrize('attention', ['plain', 'value', 'value_every', 'value_only'])
def test_untrained_is_raw_clip(clip, rung, attention):
    pixels, tokens = inputs(clip)
    model = build(clip, rung, attention=attention)
    whole = dict(attention=attention, residual=True, mlp=True)
    cosine = raw_grounding(clip, pixels, tokens, **({} if attention == 'value_only' else whole))
    with torch.no_grad(): out = model(pixels, tokens)
    assert out.grounding.shape == (2, 1, *clip.grid)
    close(out.grounding, model.settings.scale*cosine + model.settings.bias)
    assert (out.mask is None) == (rung != 'decoder')
    if rung == 'decoder': assert out.mask.shape == (2, 1, clip.size, clip.size)


def test_each_rung_does_something_when_awake(clip):
    pixels, tokens = inputs(clip)
    with torch.no_grad():
        maps = [build(clip, rung, awake=True)(pixels, tokens).grounding for rung in RUNGS[1:5]]
    for lower, higher in zip(maps, maps[1:]): assert (lower - higher).abs().max() > 1e-2


@pytest.mark.parametrize('image_blocks,text_blocks,patch,size',
                         [(4, 2, 16, 32), (2, 4, 14, 28), (4, 4, 16, 48), (5, 3, 8, 40)])
def test_other_architectures(tmp_path, image_blocks, text_blocks, patch, size):
    clip = architecture(tmp_path/'clip', image_blocks, text_blocks, patch, size)
    pixels, tokens = inputs(clip)
    settings = dict(features=(1, 2), cfe_layers='last half')
    model = build(clip, **settings)
    with torch.no_grad(): out = model(pixels, tokens)
    cosine = raw_grounding(clip, pixels, tokens, attention='plain', residual=True, mlp=True)
    close(out.grounding, model.settings.scale*cosine + model.settings.bias)
    assert out.mask.shape == (2, 1, size, size)
    awake = build(clip, awake=True, **settings).requires_grad_(False)
    loaded = RISCLIP.from_pretrained(awake.save_pretrained(tmp_path/'saved'))   # its CLIP: by name
    with torch.no_grad():
        assert torch.equal(loaded(pixels, tokens).mask, awake(pixels, tokens).mask)


def test_features_must_be_there(clip):
    with pytest.raises(ValueError, match=r'features=\(0, 1, 2, 3\): .* has blocks 1 to 5'):
        build(clip, features=(0, 1, 2, 3))
    build(clip, 'ske', features=(7, 8, 9, 10))               # no decoder, no features


def test_parts_that_were_replaced_are_walked(narrow_clip):
    "The stretches are made of the parts that the model has now, in copies too."
    model, given = build(narrow_clip, 'cfe', awake=True), inputs(narrow_clip)
    with torch.no_grad(): before = model(*given).grounding
    other = copy.deepcopy(model)
    other.cfe = build(narrow_clip, 'cfe').cfe                # untrained
    other.image_adapters[0] = build(narrow_clip, 'cfe').image_adapters[0]
    with torch.no_grad():
        assert torch.equal(model(*given).grounding, before)
        assert (other(*given).grounding - before).abs().max() > 1e-3


# --- who learns

@pytest.mark.parametrize('rung,stage', [('calibrated', 1), ('adapters', 1), ('cfe', 1), ('ske', 1),
                                        ('decoder', 1), ('decoder', 2)])
def test_gradients_reach_the_stage_and_nothing_else(clip, rung, stage):
    pixels, tokens = inputs(clip)
    model = build(clip, rung)
    clips = {n: p.clone() for n, p in model.clip.state_dict().items()}
    others = {n: p.clone() for n, p in model.named_parameters() if stage_of(n) not in (0, stage)}
    optimiser = torch.optim.SGD(model.train_stage(stage), .1)
    target = (torch.rand(2, 1, clip.size, clip.size) > .5).float()
    for _ in range(2):                     # what ends in zeros passes nothing back at first
        out = model.train()(pixels, tokens)
        logits = out.grounding if stage == 1 else out.mask
        label = nn.functional.adaptive_avg_pool2d(target, logits.shape[-2:])
        optimiser.zero_grad()
        segmentation_losses(logits, label)['loss'].backward()
        optimiser.step()
    for name, p in model.named_parameters():
        if stage_of(name) == stage: assert p.grad is not None and p.grad.abs().sum() > 0, name
        else: assert p.grad is None, name
    for name, p in model.clip.state_dict().items(): assert torch.equal(p, clips[name]), name
    for name, p in others.items(): assert torch.equal(p, model.get_parameter(name)), name


def test_a_fixed_scale_is_not_learnt(narrow_clip):
    for learn in (True, False):
        model = build(narrow_clip, 'adapters', learn_scale=learn)
        learnt = model.train_stage(1)
        names = {n for n, p in model.named_parameters() if p.requires_grad and 'calibration' in n}
        assert names == ({'calibration.log_scale', 'calibration.bias'} if learn else set())
        parts = sum(v.numel() for v in model.trained_state().values())
        assert sum(p.numel() for p in learnt) == parts - (0 if learn else 2)
    with pytest.raises(ValueError, match='rung=calibrated with learn_scale=False learns nothing'):
        ModelSettings('calibrated', learn_scale=False)


def test_raw_learns_nothing(narrow_clip): assert build(narrow_clip, 'raw').train_stage(1) == []


def test_stage_2_keeps_nothing_of_the_towers(narrow_clip):
    model = build(narrow_clip)
    model.train_stage(2)
    out = model(*inputs(narrow_clip))
    assert out.mask.requires_grad and not out.grounding.requires_grad


def test_recomputed_gradients_are_the_same(narrow_clip):
    grads = []
    for recompute in (False, True):
        model = build(narrow_clip, 'ske', awake=True)
        model.recompute = recompute
        model.train_stage(1)
        model(*inputs(narrow_clip)).grounding.square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items(): assert torch.equal(grad, grads[1][name]), name


def test_higher_rungs_start_with_the_parts_of_lower_ones(narrow_clip):
    high = build(narrow_clip).trained_state()
    for rung in RUNGS[:-1]:
        for name, value in build(narrow_clip, rung).trained_state().items():
            assert torch.equal(value, high[name]), (rung, name)


# --- padding

def test_padding_changes_nothing(clip):
    pixels, tokens = inputs(clip)
    model = build(clip, awake=True)
    with torch.no_grad():
        both = model(pixels, tokens)
        for i in range(2):
            own = tokens[i:i + 1, :int(eos_position(tokens)[i]) + 1]
            assert own.shape[1] < clip.context
            for t in (own, tokens[i:i + 1]):
                single = model(pixels[i:i + 1], t)
                close(single.grounding, both.grounding[i:i + 1], 1e-4)
                close(single.mask, both.mask[i:i + 1], 1e-4)


# --- files

def test_save_and_load(clip, tmp_path):
    model, (pixels, tokens) = build(clip, awake=True), inputs(clip)
    model.train_stage(2)
    model.train()(pixels, tokens)                            # moves the batch statistics
    model.eval().requires_grad_(False).trained_on = dict(data='refmojig', version='drawn')
    folder = model.save_pretrained(tmp_path/'a'/'model')
    assert sorted(f.name for f in folder.iterdir()) == ['config.json', 'model.safetensors']
    stored = load_file(folder/'model.safetensors')
    assert stored.keys() == model.trained_state().keys()
    assert not [n for n in stored if n.startswith('clip')]
    size = sum(v.numel()*4 for v in stored.values())
    assert (folder/'model.safetensors').stat().st_size < 1.1*size + 50_000
    config = json.loads((folder/'config.json').read_text())
    assert config['backbone'] == dict(name='tinyclip', pretrained=None, sha256=clip.sha256)
    assert config['model_settings']['features'] == [1, 2, 3, 4]
    with torch.no_grad(): mask = model(pixels, tokens).mask
    for other in (None, clip):
        loaded = RISCLIP.from_pretrained(folder, other)
        assert not loaded.training and loaded.settings == model.settings
        assert loaded.trained_on == model.trained_on
        assert not [p for p in loaded.parameters() if p.requires_grad]
        with torch.no_grad(): assert torch.equal(loaded(pixels, tokens).mask, mask)
    half = RISCLIP.from_pretrained(model.save_pretrained(tmp_path/'half', half=True), clip)
    stored = load_file(tmp_path/'half'/'model.safetensors')
    assert stored['calibration.bias'].dtype == torch.float16
    assert next(half.decoder.parameters()).dtype == torch.float32
    with torch.no_grad(): close(half(pixels, tokens).mask, mask, .05)


def test_no_key_of_the_configuration_is_an_argument(narrow_clip, tmp_path):
    "The mixin hands such keys to `__init__`, as they stand in the file."
    folder = build(narrow_clip, 'raw').save_pretrained(tmp_path/'model')
    keys = json.loads((folder/'config.json').read_text()).keys()
    assert set(keys) == {'model_settings', 'backbone', 'trained_on'}
    assert not set(keys) & set(RISCLIP._hub_mixin_init_parameters)


def test_a_lower_rung_is_in_a_higher_one(narrow_clip):
    model, given = build(narrow_clip, awake=True).requires_grad_(False), inputs(narrow_clip)
    model.trained_on = dict(data='refmojig')
    for rung in RUNGS:
        lower = model.at_rung(rung)
        assert lower.settings.rung == rung and lower.trained_on == model.trained_on
        own = lower.trained_state()
        for name, value in own.items(): assert torch.equal(value, model.state_dict()[name])
    assert lower is model
    with torch.no_grad():
        grounding = model.at_rung('ske')(*given).grounding
        assert torch.equal(grounding, model(*given).grounding)
    lower = model.at_rung('ske')
    with pytest.raises(ValueError, match='missing: decoder'): lower.at_rung('decoder')


def test_save_keeps_what_else_is_there(narrow_clip, tmp_path):
    (tmp_path/'metrics.json').write_text('{}')
    (tmp_path/'.new').mkdir()                                # of a process that was killed
    (tmp_path/'.new'/'config.json').write_text('half')
    build(narrow_clip, 'calibrated').save_pretrained(tmp_path)
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == ['config.json', 'metrics.json', 'model.safetensors']


@pytest.mark.filterwarnings('ignore:this model stands on the CLIP')
@pytest.mark.parametrize('crash', ['save_file', 'write_json', 'model_card'])
def test_a_crash_leaves_the_old_model(narrow_clip, tmp_path, monkeypatch, crash):
    "Wherever it happens: in the weights, between the two files, in the card."
    folder = build(narrow_clip, 'adapters', awake=True).save_pretrained(tmp_path/'model')
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def half_a_file(*args, **kwargs):
        for file in args:
            if hasattr(file, 'write_bytes'): file.write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(risclip.model, crash, half_a_file)
    with pytest.raises(OSError, match='No space'):
        build(narrow_clip, 'raw').save_pretrained(folder, model_card_kwargs=dict(name='mine'))
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    RISCLIP.from_pretrained(folder, narrow_clip)


def test_states_that_do_not_fit_are_refused_by_key(narrow_clip):
    model = build(narrow_clip, 'cfe')
    state = model.trained_state()
    untouched = {n: v.clone() for n, v in state.items()}
    changed = state | {'calibration.bias': torch.zeros(3), 'ske.0.nothing': torch.zeros(1)}
    del changed['cfe.0.v2s.weight']
    with pytest.raises(ValueError) as e: model.load_trained(changed, 'here.safetensors')
    for part in ('here.safetensors', 'rung cfe', 'missing: cfe.0.v2s.weight',
                 'unknown: ske.0.nothing', 'of another shape: calibration.bias [3] for []'):
        assert part in str(e.value), part
    for name, value in model.trained_state().items(): assert torch.equal(value, untouched[name])
    with pytest.raises(ValueError, match=r'unknown: image_adapters.0.* and \d+ more'):
        build(narrow_clip, 'raw').load_trained(state)


def test_another_clip_is_refused(clip, tmp_path):
    folder = build(clip, 'adapters').save_pretrained(tmp_path/'model')
    other = architecture(tmp_path/'other', 5, 3, 8, 96)
    with pytest.raises(ValueError) as e: RISCLIP.from_pretrained(folder, other)
    for part in (str(folder), "'tinyclip'", clip.sha256, str(tmp_path/'other'), other.sha256):
        assert part in str(e.value), part
    (tmp_path/'same').symlink_to(tinyclip_folder(), target_is_directory=True)    # the same weights
    RISCLIP.from_pretrained(folder, load_clip(tmp_path/'same'))


def test_clips_without_a_file_are_known_by_name():
    def make(name, tag): return SimpleNamespace(name=name, pretrained=tag, sha256=None)
    wanted = fingerprint(make('ViT-B-16-quickgelu', 'openai'))
    check_clip(make('ViT-B-16-quickgelu', 'openai'), wanted, 'model')
    for other in (make('ViT-B-16', 'laion2b_s34b_b88k'), make('ViT-B-16-quickgelu', None)):
        with pytest.raises(ValueError, match=r"'ViT-B-16-quickgelu' \(openai\)"):
            check_clip(other, wanted, 'model')


def test_broken_files_are_named(narrow_clip, tmp_path):
    folder = build(narrow_clip, 'calibrated').save_pretrained(tmp_path/'model')
    config, weights = (folder/n for n in ('config.json', 'model.safetensors'))
    whole, good = weights.read_bytes(), config.read_text()
    no_backbone = json.dumps(json.loads(good) | dict(backbone={}))
    for wrong in ('{', '[]', '{"model_settings": {}}', no_backbone,
                  good.replace('"num_heads"', '"heads"'), good.replace('calibrated', 'cal')):
        config.write_text(wrong)
        with pytest.raises(ValueError, match='config.json is not'):
            RISCLIP.from_pretrained(folder, narrow_clip)
    config.write_text(good)
    for cut in (0, 5, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match='model.safetensors is not whole'):
            RISCLIP.from_pretrained(folder, narrow_clip)
    config.unlink()
    with pytest.raises(FileNotFoundError, match='config.json is not there'):
        RISCLIP.from_pretrained(folder, narrow_clip)
    with pytest.raises(FileNotFoundError, match='there is no model .*nowhere'):
        RISCLIP.from_pretrained(tmp_path/'nowhere', narrow_clip)


def test_an_older_form_is_refused_with_a_remedy(narrow_clip, tmp_path):
    "Other names of files, other keys: nothing of it is read."
    folder = build(narrow_clip, 'calibrated').save_pretrained(tmp_path/'model')
    config = json.loads((folder/'config.json').read_text())
    older = dict(settings=config['model_settings'], clip=config['backbone'])
    (folder/'config.json').write_text(json.dumps(older))
    remedy = 'train it again, or fetch it again'
    with pytest.raises(ValueError, match=f"config.json is not .*'model_settings'.*{remedy}"):
        RISCLIP.from_pretrained(folder, narrow_clip)
    (folder/'model.safetensors').rename(folder/'weights.safetensors')
    with pytest.raises(ValueError, match=f'has the files of an older risclip: {remedy}'):
        RISCLIP.from_pretrained(folder, narrow_clip)


def test_where_a_model_is_looked_for(narrow_clip, tmp_path, monkeypatch):
    inner = build(narrow_clip, 'calibrated').save_pretrained(tmp_path/'run'/'model')
    assert model_folder(tmp_path/'run') == inner and model_folder(inner) == inner
    init = tmp_path/'site'/'risclip'/'__init__.py'
    monkeypatch.setattr(risclip, '__file__', str(init))
    for place in (init.parents[1]/'data'/'shipped', init.parent/'shipped'):  # checkout's, a wheel's
        build(narrow_clip, 'calibrated').save_pretrained(place)
        assert model_folder('shipped') == place


def test_what_is_here_resolves_before_the_hub(narrow_clip, tmp_path, monkeypatch):
    "A folder called owner/name, a shipped name: the hub is not asked; else with all it was given."
    asked = []

    def fetch(name, **options):
        asked.append((name, options))
        return tmp_path/'here'/'mine'
    monkeypatch.setattr(risclip.hub, 'snapshot_download', fetch)
    monkeypatch.chdir(tmp_path)
    build(narrow_clip, 'raw').save_pretrained('here/mine')
    RISCLIP.from_pretrained('here/mine')
    RISCLIP.from_pretrained('risclip-refmojig')
    assert asked == []
    options = dict(revision='v2', cache_dir=tmp_path, local_files_only=True, token='mine')
    RISCLIP.from_pretrained('someone/else', **options)
    assert len(asked) == 1 and asked[0][0] == 'someone/else'
    assert {key: asked[0][1][key] for key in options} == options
    for wrong in ('nobody', 'a/b/c', '/no/where', '../x'):
        with pytest.raises(FileNotFoundError, match='risclip-refmojig'): model_folder(wrong)
    assert len(asked) == 1


def test_a_model_names_its_own_clip(tmp_path):
    "What was saved over a CLIP in a folder finds it there again."
    clip = load_clip(narrow_clip_folder(tmp_path/'clip'))
    folder = build(clip, 'adapters', awake=True).save_pretrained(tmp_path/'model')
    assert RISCLIP.from_pretrained(folder).clip.sha256 == clip.sha256
