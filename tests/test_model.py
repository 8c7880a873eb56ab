"The whole model: every untrained rung is CLIP, padding changes nothing, what was trained is saved, what does not fit is refused."
import json
from types import SimpleNamespace
import open_clip, pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
import risclip.model
from risclip.clip import eos_position, load_clip, tinyclip_folder
from risclip.grounding import raw_grounding
from risclip.model import RISCLIP, RUNGS, ModelSettings, check_clip, identity, load_risclip, model_folder, stage_of
from risclip.scoring import segmentation_loss

SMALL = dict(shared=32, heads=4, ske_layers=2, ske_hidden=32, decoder_width=8)
PHRASES = ['the dog', 'the small red apple to the left of the large blue umbrella on the grass']


@pytest.fixture(scope='module')
def clip(): return load_clip('tinyclip')


def inputs(clip, n=2):
    torch.manual_seed(0)
    return torch.randn(n, 3, clip.size, clip.size), clip.tokenize(PHRASES[:n])


def build(clip, rung='decoder', awake=False, **changes):
    torch.manual_seed(0)
    model = RISCLIP(ModelSettings(rung, **SMALL | changes), clip).eval()
    for name, p in model.named_parameters():
        if awake and stage_of(name) and p.detach().abs().sum() == 0: nn.init.normal_(p, std=.1)
    return model


def architecture(folder, image_blocks, text_blocks, patch, size):
    "A CLIP with random weights, in open_clip's local-dir layout."
    cfg = dict(embed_dim=16, vision_cfg=dict(image_size=size, patch_size=patch, width=32, layers=image_blocks, head_width=16),
               text_cfg=dict(context_length=24, vocab_size=49408, width=16, heads=2, layers=text_blocks))
    folder.mkdir()
    (folder/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=cfg, preprocess_cfg=dict(mean=[.5]*3, std=[.5]*3))))
    torch.manual_seed(1)
    save_file(open_clip.CLIP(**cfg).state_dict(), folder/'open_clip_model.safetensors')
    return load_clip(folder)


# --- what is on

def test_rungs_are_a_ladder():
    for n, rung in enumerate(RUNGS): assert [r for r in RUNGS if ModelSettings(rung).has(r)] == list(RUNGS[:n + 1])


@pytest.mark.parametrize('wrong', [dict(rung='SKE'), dict(rung=None), dict(heads=4.), dict(size='96'), dict(scale='15'), dict(cfe_layers=1.5), dict(clip=None)])
def test_settings_refuse_what_makes_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): ModelSettings(**wrong)


def test_whole_numbers_are_taken_for_fractions(): assert ModelSettings(bias=-2, scale=10).bias == -2


@pytest.mark.parametrize('rung', RUNGS)
@pytest.mark.parametrize('cfe_layers', [None, 'last half'])
def test_a_picture_is_seen_once_for_all_its_phrases(clip, rung, cfe_layers):
    "The same answers as one picture a phrase, and fewer blocks computed: none of those that no phrase can reach is computed twice."
    model, (pixels, tokens), of = build(clip, rung, awake=True, cfe_layers=cfe_layers), inputs(clip), torch.tensor([1, 0, 1, 1])
    tokens, count = tokens[[0, 1, 1, 0]], []
    hooks = [b.resblock.ln_2.register_forward_hook(lambda m, x, y: count.append(len(y))) for b in clip.image.blocks]
    with torch.no_grad(): shared = model(pixels, tokens, of)
    n, blocks = sum(count), len(clip.image.blocks)
    with torch.no_grad(): seen = model.see(pixels); kept = model(None, tokens, of, seen); plain = model(pixels[of], tokens)
    for h in hooks: h.remove()
    for out in (shared, kept):
        torch.testing.assert_close(out.grounding, plain.grounding, atol=1e-5, rtol=1e-5)
        if plain.mask is not None: torch.testing.assert_close(out.mask, plain.mask, atol=1e-5, rtol=1e-5)
    free = blocks if RUNGS.index(rung) < RUNGS.index('cfe') else 2 if cfe_layers else 0
    assert n == 2*free + 4*(blocks - free) and len(seen) == 1 + free


@pytest.mark.parametrize('rung', RUNGS)
@pytest.mark.parametrize('values', ['none', 'last', 'every', 'raw'])
def test_untrained_is_raw_clip(clip, rung, values):
    pixels, tokens = inputs(clip)
    model = build(clip, rung, values=values)
    reading = {} if values == 'raw' else dict(values=values, residual=True, mlp=True)
    cosine = raw_grounding(clip, pixels, tokens, **reading)
    with torch.no_grad(): out = model(pixels, tokens)
    assert out.grounding.shape == (2, 1, *clip.grid)
    torch.testing.assert_close(out.grounding, model.settings.scale*cosine + model.settings.bias, atol=1e-5, rtol=1e-5)
    assert (out.mask is None) == (rung != 'decoder')
    if rung == 'decoder': assert out.mask.shape == (2, 1, clip.size, clip.size)


def test_each_rung_does_something_when_awake(clip):
    pixels, tokens = inputs(clip)
    with torch.no_grad(): maps = [build(clip, rung, awake=True)(pixels, tokens).grounding for rung in RUNGS[1:5]]
    for lower, higher in zip(maps, maps[1:]): assert (lower - higher).abs().max() > 1e-2


@pytest.mark.parametrize('image_blocks,text_blocks,patch,size', [(4, 2, 16, 32), (2, 4, 14, 28), (4, 4, 16, 48), (5, 3, 8, 40)])
def test_other_architectures(tmp_path, image_blocks, text_blocks, patch, size):
    clip = architecture(tmp_path/'clip', image_blocks, text_blocks, patch, size)
    pixels, tokens = inputs(clip)
    settings = dict(features=(1, 2), cfe_layers='last half')
    model = build(clip, **settings)
    with torch.no_grad(): out = model(pixels, tokens)
    cosine = raw_grounding(clip, pixels, tokens, values='none', residual=True, mlp=True)
    torch.testing.assert_close(out.grounding, model.settings.scale*cosine + model.settings.bias, atol=1e-5, rtol=1e-5)
    assert out.mask.shape == (2, 1, size, size)
    loaded = load_risclip(build(clip, awake=True, **settings).save(tmp_path/'saved'))       # finds its CLIP by the folder's name
    with torch.no_grad(): assert torch.equal(loaded(pixels, tokens).mask, build(clip, awake=True, **settings).requires_grad_(False)(pixels, tokens).mask)


def test_features_must_be_there(clip):
    with pytest.raises(ValueError, match=r'features=\(0, 1, 2, 3\): the image tower has blocks 1 to 5'): build(clip, features=(0, 1, 2, 3))
    build(clip, 'ske', features=(7, 8, 9, 10))                                              # no decoder, no features


# --- who learns

@pytest.mark.parametrize('rung,stage', [('calibrated', 1), ('adapters', 1), ('cfe', 1), ('ske', 1), ('decoder', 1), ('decoder', 2)])
def test_gradients_reach_the_stage_and_nothing_else(clip, rung, stage):
    pixels, tokens = inputs(clip)
    model = build(clip, rung)
    clips = {n: p.clone() for n, p in model.clip.state_dict().items()}
    others = {n: p.clone() for n, p in model.named_parameters() if stage_of(n) not in (0, stage)}
    optimiser = torch.optim.SGD(model.train_stage(stage), .1)
    target = (torch.rand(2, 1, clip.size, clip.size) > .5).float()
    for _ in range(2):                                             # what ends in zeros passes nothing back at the first step
        out = model.train()(pixels, tokens)
        logits = out.grounding if stage == 1 else out.mask
        optimiser.zero_grad()
        segmentation_loss(logits, nn.functional.adaptive_avg_pool2d(target, logits.shape[-2:])).backward()
        optimiser.step()
    for name, p in model.named_parameters():
        if stage_of(name) == stage: assert p.grad is not None and p.grad.abs().sum() > 0, name
        else: assert p.grad is None, name
    for name, p in model.clip.state_dict().items(): assert torch.equal(p, clips[name]), name
    for name, p in others.items(): assert torch.equal(p, model.get_parameter(name)), name


def test_a_fixed_scale_is_not_learnt(clip):
    calibration = lambda model: {n for n, p in model.named_parameters() if p.requires_grad and n.startswith('calibration.')}
    for learn in (True, False):
        model = build(clip, 'adapters', learn_scale=learn)
        learnt = model.train_stage(1)
        assert calibration(model) == ({'calibration.log_scale', 'calibration.bias'} if learn else set())
        assert sum(p.numel() for p in learnt) == sum(v.numel() for v in model.trained_state().values()) - (0 if learn else 2)
    with pytest.raises(ValueError, match='rung=calibrated with learn_scale=False learns nothing'): ModelSettings('calibrated', learn_scale=False)


def test_raw_learns_nothing(clip): assert build(clip, 'raw').train_stage(1) == []


def test_stage_2_keeps_nothing_of_the_towers(clip):
    model = build(clip)
    model.train_stage(2)
    out = model(*inputs(clip))
    assert out.mask.requires_grad and not out.grounding.requires_grad


def test_higher_rungs_start_with_the_parts_of_lower_ones(clip):
    high = build(clip).trained_state()
    for rung in RUNGS[:-1]:
        for name, value in build(clip, rung).trained_state().items(): assert torch.equal(value, high[name]), (rung, name)


# --- padding

def test_padding_changes_nothing(clip):
    pixels, tokens = inputs(clip)
    model = build(clip, awake=True)
    with torch.no_grad():
        together = model(pixels, tokens)
        for i in range(2):
            own = tokens[i:i + 1, :int(eos_position(tokens)[i]) + 1]
            assert own.shape[1] < clip.context
            for t in (own, tokens[i:i + 1]):
                alone = model(pixels[i:i + 1], t)
                torch.testing.assert_close(alone.grounding, together.grounding[i:i + 1], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(alone.mask, together.mask[i:i + 1], atol=1e-4, rtol=1e-4)


# --- files

def test_save_and_load(clip, tmp_path):
    model, (pixels, tokens) = build(clip, awake=True), inputs(clip)
    model.train_stage(2)
    model.train()(pixels, tokens)                                  # moves the batch statistics
    folder = model.eval().requires_grad_(False).save(tmp_path/'a'/'model')
    stored = load_file(folder/'weights.safetensors')
    assert stored.keys() == model.trained_state().keys() and not [n for n in stored if n.startswith('clip')]
    assert (folder/'weights.safetensors').stat().st_size < 1.1*sum(v.numel()*4 for v in stored.values()) + 50_000
    config = json.loads((folder/'config.json').read_text())
    assert config['clip'] == dict(name='tinyclip', pretrained=None, sha256=clip.sha256) and config['settings']['features'] == [1, 2, 3, 4]
    for other in (None, clip):
        loaded = load_risclip(folder, other)
        assert not loaded.training and loaded.settings == model.settings and not [p for p in loaded.parameters() if p.requires_grad]
        with torch.no_grad(): assert torch.equal(loaded(pixels, tokens).mask, model(pixels, tokens).mask)
    half = load_risclip(model.save(tmp_path/'half', half=True), clip)
    assert load_file(tmp_path/'half'/'weights.safetensors')['calibration.bias'].dtype == torch.float16
    assert next(half.decoder.parameters()).dtype == torch.float32
    with torch.no_grad(): torch.testing.assert_close(half(pixels, tokens).mask, model(pixels, tokens).mask, atol=.05, rtol=.05)


def test_save_keeps_what_else_lies_there(clip, tmp_path):
    (tmp_path/'metrics.json').write_text('{}')
    build(clip, 'calibrated').save(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ['config.json', 'metrics.json', 'weights.safetensors']


def test_a_full_disk_leaves_the_old_model(clip, tmp_path, monkeypatch):
    folder = build(clip, 'adapters', awake=True).save(tmp_path/'model')
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def half_a_file(state, file, **_):
        file.write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(risclip.model, 'save_file', half_a_file)
    with pytest.raises(OSError, match='No space'): build(clip, 'adapters').save(folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_states_that_do_not_fit_are_refused_by_key(clip):
    state, model = build(clip, 'cfe').trained_state(), build(clip, 'cfe')
    untouched = {n: v.clone() for n, v in model.trained_state().items()}
    changed = state | {'calibration.bias': torch.zeros(3), 'ske.0.nothing': torch.zeros(1)}
    del changed['cfe.0.v2s.weight']
    with pytest.raises(ValueError) as e: model.load_trained(changed, 'here.safetensors')
    for part in ('here.safetensors', 'rung cfe', 'missing: cfe.0.v2s.weight', 'unknown: ske.0.nothing', 'of another shape: calibration.bias [3] for []'):
        assert part in str(e.value), part
    for name, value in model.trained_state().items(): assert torch.equal(value, untouched[name])
    with pytest.raises(ValueError, match=r'unknown: image_adapters.0.* and \d+ more'): build(clip, 'raw').load_trained(state)


def test_another_clip_is_refused(clip, tmp_path):
    folder = build(clip, 'adapters').save(tmp_path/'model')
    other = architecture(tmp_path/'other', 5, 3, 8, 96)
    with pytest.raises(ValueError) as e: load_risclip(folder, other)
    for part in (str(folder), "'tinyclip'", clip.sha256, str(tmp_path/'other'), other.sha256): assert part in str(e.value), part
    (tmp_path/'same').symlink_to(tinyclip_folder(), target_is_directory=True)               # the same weights under another name
    load_risclip(folder, load_clip(tmp_path/'same'))


def test_clips_without_a_file_are_told_by_name():
    make = lambda name, tag: SimpleNamespace(name=name, pretrained=tag, sha256=None)
    wanted = identity(make('ViT-B-16-quickgelu', 'openai'))
    check_clip(make('ViT-B-16-quickgelu', 'openai'), wanted, 'model')
    for other in (make('ViT-B-16', 'laion2b_s34b_b88k'), make('ViT-B-16-quickgelu', None)):
        with pytest.raises(ValueError, match=r"'ViT-B-16-quickgelu' \(openai\)"): check_clip(other, wanted, 'model')


def test_broken_files_are_named(clip, tmp_path):
    folder = build(clip, 'calibrated').save(tmp_path/'model')
    config, weights = (folder/n for n in ('config.json', 'weights.safetensors'))
    whole, good = weights.read_bytes(), config.read_text()
    for wrong in ('{', '[]', '{"settings": {}}', json.dumps(json.loads(good) | dict(clip={})), good.replace('"heads"', '"head"'), good.replace('calibrated', 'calibration')):
        config.write_text(wrong)
        with pytest.raises(ValueError, match='config.json is not'): load_risclip(folder, clip)
    config.write_text(good)
    for cut in (0, 5, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match='weights.safetensors is not whole'): load_risclip(folder, clip)
    config.unlink()
    with pytest.raises(FileNotFoundError, match='config.json is not there'): load_risclip(folder, clip)
    with pytest.raises(FileNotFoundError, match='config.json is not there'): load_risclip(tmp_path/'nowhere', clip)


def test_where_a_model_is_looked_for(clip, tmp_path, monkeypatch):
    inner = build(clip, 'calibrated').save(tmp_path/'run'/'model')
    assert model_folder(tmp_path/'run') == inner and model_folder(inner) == inner
    monkeypatch.setattr(risclip, '__file__', str(tmp_path/'site'/'risclip'/'__init__.py'))
    for place in (tmp_path/'site'/'risclip'/'shipped', tmp_path/'site'/'data'/'shipped'):    # a wheel's; a checkout's
        build(clip, 'calibrated').save(place)
        assert model_folder('shipped') == place
