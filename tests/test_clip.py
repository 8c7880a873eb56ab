"""The two towers against open_clip itself, on random weights: no network is needed."""
import hashlib, json, socket, warnings
from pathlib import Path

import numpy as np
import open_clip, pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torchvision import transforms as T

from risclip.clip import CLIPTowers, ImageTower, load_clip, resize_positions, why_not
from risclip.files import tinyclip_folder

VISION = dict(image_size=96, patch_size=8, width=96, layers=5, head_width=24, patch_dropout=.25)
TEXT = dict(context_length=32, vocab_size=49408, width=96, heads=4, layers=3)
TINY = dict(embed_dim=96, vision_cfg=VISION, text_cfg=TEXT)
MEAN, STD = (.5, .4, .3), (.2, .25, .3)
PHRASES = ['a dog', 'the small red chair to the left of the big blue umbrella', 'left']


def seeded(n): return torch.Generator().manual_seed(n)


def shake(model):
    "Fresh models have biases of 0 and LayerNorms of 1, which would hide a mistake."
    for p in model.parameters():
        if p.ndim == 1: p.data += .1*torch.randn(p.shape, generator=seeded(len(p)))
    return model.eval()


def write_tiny(folder, cfg=TINY, met=PHRASES):
    """A random CLIP in open_clip's local-dir layout: half precision, the rows of all words but
    those of `met` zero."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = shake(open_clip.CLIP(**cfg))
    tokens = open_clip.get_tokenizer('ViT-B-16')(met)
    rows = torch.zeros(49408, 1)
    rows[tokens[tokens > 0]] = 1
    model.token_embedding.weight.data *= 20*rows
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder/'open_clip_model.safetensors')
    config = dict(model_cfg=cfg, preprocess_cfg=dict(mean=MEAN, std=STD))
    (folder/'open_clip_config.json').write_text(json.dumps(config))
    return folder


@pytest.fixture(scope='session')
def tiny(tmp_path_factory): return write_tiny(tmp_path_factory.mktemp('clip')/'tiny')


def pictures(size, n=2): return torch.randn(n, 3, size, size, generator=seeded(1))


def both(name, layers=None):
    """open_clip's model and our towers over it, with random weights. layers: of each tower so many,
    at full width."""
    if Path(name).is_dir():
        return open_clip.create_model(f'local-dir:{name}').eval(), load_clip(name)
    cfg = open_clip.get_model_config(name)
    if layers:
        for part in ('vision_cfg', 'text_cfg'): cfg[part] = cfg[part] | dict(layers=layers)
    torch.manual_seed(0)
    model = shake(open_clip.CLIP(**cfg))
    model.visual.preprocess_cfg = dict(mean=MEAN, std=STD)
    return model, CLIPTowers(model, open_clip.get_tokenizer(name), name)


def check_parity(model, clip):
    pixels = pictures(clip.size, 1 if clip.width_image > 1000 else 2)
    tokens = clip.tokenize(PHRASES)
    with torch.no_grad():
        image, text = model.encode_image(pixels), model.encode_text(tokens)
        v, t = clip.image(pixels), clip.text(tokens)
        encoded = clip.encode_image(pixels), clip.encode_text(tokens)
    assert v.shape == (len(pixels), 1 + clip.grid[0]*clip.grid[1], clip.width_joint)
    assert t.shape == (3, clip.context, clip.width_joint)
    assert image.std() > .01 and text.std() > .01            # something to compare
    assert (text[0] - text[1]).abs().max() > .01
    for ours, theirs in ((v[:, 0], image), (encoded[0], image),
                         (clip.text.eos(t, tokens), text), (encoded[1], text)):
        assert_close(ours, theirs, rtol=0, atol=1e-5)


# L by two blocks of its width, and its 336 pixels: that depth changes nothing, the tiny one says


@pytest.mark.parametrize('name,layers', [('tiny', None), ('ViT-B-16', None),
                                         ('ViT-B-16-quickgelu', None), ('ViT-L-14', 2),
                                         ('ViT-L-14-336', 2)])
def test_parity_with_open_clip(name, layers, tiny):
    model, clip = both(tiny if name == 'tiny' else name, layers)
    if layers: assert len(clip.image.blocks) == len(clip.text.blocks) == layers
    check_parity(model, clip)


def test_parity_of_a_deep_tower(tmp_path):
    "24 and 12 blocks, as L has them, but narrow."
    deep = dict(embed_dim=32, vision_cfg=VISION | dict(width=48, layers=24),
                text_cfg=TEXT | dict(width=32, layers=12))
    check_parity(*both(write_tiny(tmp_path/'deep', deep)))


def test_parity_of_the_shipped_clip():
    try: folder = tinyclip_folder()
    except FileNotFoundError: pytest.skip('data/tinyclip is not there')
    check_parity(open_clip.create_model(f'local-dir:{folder}').eval(), load_clip('tinyclip'))


@pytest.mark.parametrize('settings', [
    dict(ls_init_value=.3), dict(no_ln_pre=True), dict(act_kwargs=dict(approximate='tanh')),
    dict(pos_embed_type='sin_cos_2d')])
def test_parity_with_other_settings(settings, tmp_path):
    cfg = json.loads(json.dumps(TINY))
    cfg['vision_cfg'] |= settings
    if 'ls_init_value' in settings: cfg['text_cfg'] |= settings
    check_parity(*both(write_tiny(tmp_path/'other', cfg)))


def test_each_block(tiny):
    "Ours against open_clip's own intermediate features, after every block of both towers."
    model, clip = both(tiny)
    pixels, tokens = pictures(clip.size), clip.tokenize(PHRASES)
    with torch.no_grad():
        theirs = model.visual.forward_intermediates(pixels, output_fmt='NLC',
                                                    output_extra_tokens=True)
        x = clip.image.embed(pixels)
        for i, block in enumerate(clip.image.blocks):
            x = x + block.attend(x)
            x = x + block.mlp(x)
            cls, patches = theirs['image_intermediates_prefix'][i], theirs['image_intermediates'][i]
            assert_close(x, torch.cat([cls, patches], 1), rtol=0, atol=1e-5)
        theirs = model.forward_intermediates(text=tokens)['text_intermediates']
        x, mask = clip.text.embed(tokens), clip.text.attn_mask(tokens.shape[1])
        for i, block in enumerate(clip.text.blocks):
            x = x + block.attend(x, mask)
            x = x + block.mlp(x)
            assert_close(x, theirs[i], rtol=0, atol=1e-5)
    assert len(clip.image.blocks) == 5 and len(clip.text.blocks) == len(theirs) == 3


def test_same_with_gradients_on(tiny):
    "torch takes another way through attention where a gradient is wanted: the same result."
    model, clip = both(tiny)
    pixels = pictures(clip.size)
    with torch.no_grad(): fast = clip.image(pixels)
    pixels.requires_grad_()
    slow = clip.image(pixels)
    assert slow.requires_grad
    assert_close(slow.detach(), fast, rtol=0, atol=1e-5)
    slow.sum().backward()
    assert pixels.grad.abs().sum() > 0 and all(p.grad is None for p in clip.parameters())


@pytest.mark.parametrize('ls_init_value', [None, .3])
def test_values_are_attention_to_oneself(ls_init_value, tmp_path):
    cfg = TINY | dict(vision_cfg=TINY['vision_cfg'] | dict(ls_init_value=ls_init_value))
    block = load_clip(write_tiny(tmp_path/'tiny', cfg)).image.blocks[-1]
    x = torch.randn(2, 145, 96)
    sequences = x.reshape(-1, 1, 96)                         # of one token, which attends to itself
    with torch.no_grad(): only_self = block.attend(sequences).reshape(x.shape)
    assert_close(block.values(x), only_self, rtol=0, atol=1e-5)
    assert (block.values(x) - block.attend(x)).abs().max() > 1e-3


def test_frozen(tiny):
    clip = load_clip(tiny)
    around = torch.nn.Sequential(clip, torch.nn.Dropout()).train()
    assert around.training and not any(m.training for m in clip.modules())
    assert not any(p.requires_grad for p in clip.parameters())
    once, twice = (clip.image.embed(pictures(96)) for _ in range(2))
    assert torch.equal(once, twice)                          # patch_dropout=.25 is off


def test_attributes(tiny):
    clip = load_clip(tiny)
    assert (clip.size, clip.patch, clip.grid) == (96, 8, (12, 12))
    assert (clip.width_image, clip.width_text, clip.width_joint, clip.context) == (96, 96, 96, 32)
    assert clip.mean == MEAN and clip.std == STD
    assert clip.name == str(tiny) and clip.pretrained is None
    weights = (tiny/'open_clip_model.safetensors').read_bytes()
    assert clip.sha256 == hashlib.sha256(weights).hexdigest()
    assert abs(clip.logit_scale.exp().item() - 1/.07) < .02
    names = [n for n, _ in clip.named_parameters()]
    assert set(names) == {k for k in clip.state_dict()}
    assert len({p.data_ptr() for p in clip.parameters()}) == len(names)      # nothing twice


def test_preprocess(tiny):
    "Like torchvision's own steps, and PIL's; a picture of the right size is only normalised."
    clip = load_clip(tiny)
    noise = np.random.default_rng(0).integers(0, 256, (150, 70, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    pixels = clip.preprocess(picture)
    assert pixels.shape == (3, 96, 96) and pixels.dtype == torch.float32
    small = np.asarray(picture.resize((96, 96), Image.BICUBIC), np.float32)/255
    by_hand = (small - np.float32(MEAN))/np.float32(STD)     # [H, W, 3]
    assert_close(pixels, torch.from_numpy(by_hand).permute(2, 0, 1), rtol=0, atol=1e-6)
    steps = T.Compose([T.Resize((96, 96), T.InterpolationMode.BICUBIC), T.ToTensor(),
                       T.Normalize(MEAN, STD)])
    assert_close(pixels, steps(picture), rtol=0, atol=1e-6)
    square = Image.fromarray(noise[:96].repeat(2, 1)[:, :96])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    back = clip.preprocess(square)*std + mean
    assert (255*back).round().byte().permute(1, 2, 0).tolist() == np.asarray(square).tolist()


def test_half_on_disk_float_in_memory(tiny):
    stored, clip = load_file(tiny/'open_clip_model.safetensors'), load_clip(tiny)
    assert {v.dtype for v in stored.values()} == {torch.float16}
    assert {p.dtype for p in clip.parameters()} == {torch.float32}
    assert clip.image(pictures(96)).dtype == torch.float32
    assert_close(clip.image.conv1.weight, stored['visual.conv1.weight'].float(), rtol=0, atol=0)


def test_no_network(tiny, monkeypatch):
    tried = []
    def refuse(*a, **k):
        tried.append(a)                                      # a library may catch it and go on
        raise OSError('no network')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    clip = load_clip(tiny)
    clip.encode_text(clip.tokenize(['a dog']))
    assert tried == []


# ---- sizes

@pytest.mark.parametrize('size', [48, 96, 128, 160])
def test_resized_like_open_clip(tiny, size, tmp_path):
    """open_clip resizes when it loads weights into a model of another size (single precision only):
    same values, same features."""
    stored = load_file(tiny/'open_clip_model.safetensors')
    single = {k: v.float() for k, v in stored.items()}
    save_file(single, tmp_path/'open_clip_model.safetensors')
    (tmp_path/'open_clip_config.json').write_bytes((tiny/'open_clip_config.json').read_bytes())
    model = open_clip.create_model(f'local-dir:{tmp_path}', force_image_size=size).eval()
    clip = load_clip(tiny, size=size)
    assert clip.grid == (size//8, size//8)
    theirs = model.visual.positional_embedding.detach()
    assert_close(clip.image.positions, theirs, rtol=0, atol=1e-6)
    check_parity(model, clip)


def test_resizing_keeps_cls(tiny):
    own, other = load_clip(tiny).image.positions, load_clip(tiny, size=160).image.positions
    assert other.shape == (1 + 20*20, 96)
    assert_close(other[0], own[0], rtol=0, atol=0)
    assert resize_positions(own, (12, 12)) is own
    flat = torch.cat([torch.randn(1, 4), torch.arange(4.).expand(9, 4)])     # all patches alike
    assert_close(resize_positions(flat, (5, 7))[1:], torch.arange(4.).expand(35, 4))


def test_480_is_30_patches():
    clip = load_clip('ViT-B-16', size=480)
    assert clip.grid == (30, 30)
    with torch.no_grad(): assert clip.image.embed(pictures(480, 1)).shape == (1, 901, 768)


@pytest.mark.parametrize('name,size,nearest', [
    ('ViT-L-14', 480, '476 and 490'), ('ViT-B-16', 475, '464 and 480'),
    ('ViT-B-16', 8, '16 and 32'), ('ViT-B-16', 0, '16 and 32'), ('ViT-B-16', -16, '16 and 32'),
    ('ViT-B-16', 224., '224 and 240')])
def test_wrong_size(name, size, nearest, monkeypatch):
    "It is said before a model is made, or downloaded."
    monkeypatch.setattr(open_clip, 'create_model', lambda *a, **k: pytest.fail('too late'))
    with pytest.raises(ValueError, match=f'{size!r} .*{nearest}'): load_clip(name, size=size)


def test_wrong_size_of_a_tower(tiny):
    with pytest.raises(ValueError, match='96 and 104'): ImageTower(both(tiny)[0].visual, 100)


def test_wrong_pictures(tiny):
    clip = load_clip(tiny)
    for shape in ((2, 3, 104, 104), (3, 96, 96), (2, 1, 96, 96), (2, 3, 96, 88)):
        with pytest.raises(ValueError, match=r'\[B, 3, 96, 96\]'): clip.image(torch.zeros(shape))


# ---- words

def test_short_context(tiny):
    "Tokens after EOS change nothing, so that a shorter row of tokens gives the same features."
    _, clip = both(tiny)
    tokens = clip.tokenize(PHRASES)
    pad = clip.text.pad_mask(tokens)
    T = int((~pad).sum(1).max())
    assert T < clip.context
    full, short = clip.text(tokens), clip.text(tokens[:, :T])
    assert short.shape[1] == T
    keep = ~pad[:, :T]
    assert_close(short[keep], full[:, :T][keep], rtol=0, atol=1e-5)
    assert_close(clip.encode_text(tokens[:, :T]), clip.encode_text(tokens), rtol=0, atol=1e-5)
    anything = torch.randint(1, 40000, tokens.shape, generator=seeded(0))
    other = torch.where(pad, anything, tokens)
    assert_close(clip.encode_text(other), clip.encode_text(tokens), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match='40 text tokens.* 32'):
        clip.text.embed(torch.zeros(1, 40, dtype=torch.long))


def test_pad_mask_and_eos(tiny):
    clip = load_clip(tiny)
    tokens = clip.tokenize(['a dog', 'left'])
    assert tokens.shape == (2, 32) and tokens.dtype == torch.long
    assert clip.text.pad_mask(tokens).tolist() == [[False]*4 + [True]*28, [False]*3 + [True]*29]
    t = torch.arange(2*32.).reshape(2, 32, 1)
    assert clip.text.eos(t, tokens).tolist() == [[3], [34]]
    mask = clip.text.attn_mask(3)
    assert mask.tolist() == [[0, float('-inf'), float('-inf')], [0, 0, float('-inf')], [0, 0, 0]]


def test_tokens_as_open_clip(tiny):
    clip = load_clip(tiny)
    theirs = open_clip.get_tokenizer('ViT-B-16')(PHRASES, context_length=32)
    assert torch.equal(clip.tokenize(PHRASES), theirs)
    assert clip.tokenize('left').shape == (1, 32)
    assert torch.equal(clip.tokenize(['  LEFT ']), clip.tokenize(['left']))


def test_long_phrase_is_cut_with_eos_kept(tiny):
    clip = load_clip(tiny)
    with pytest.warns(UserWarning, match="'left left.* has 52 tokens.* 32"):
        tokens = clip.tokenize(['left '*50])
    assert tokens[0, -1] == tokens.max() == 49407 and not clip.text.pad_mask(tokens).any()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        clip.tokenize(['left '*60])                 # once is enough
        load_clip(tiny).tokenize(['left '*30])      # fits exactly: nothing to say


def test_never_seen_words(tiny):
    clip = load_clip(tiny)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        clip.tokenize(PHRASES + ['the dog to the left', ''])     # padding is no word either
    with pytest.warns(UserWarning) as caught: clip.tokenize(['a dog', "the zebra's zebra"])
    first, second = (str(w.message) for w in caught)
    assert '"zebra\'s"' in first and "the zebra's zebra" in first and "'zebra'" in second
    with pytest.warns(UserWarning) as caught: clip.tokenize(['zebra or giraffe'])
    words = [str(w.message).split("'")[1] for w in caught]
    assert words == ['or', 'giraffe']                        # not the zebra again


# ---- refusals

@pytest.mark.parametrize('name,why', [
    ('RN50', 'ResNet'), ('RN101-quickgelu', 'ResNet'), ('convnext_base', "timm's 'convnext_base'"),
    ('EVA02-B-16', 'timm'), ('ViT-B-16-SigLIP', 'timm'), ('PE-Core-B-16', 'timm'),
    ('coca_ViT-B-32', 'CoCa'), ('roberta-ViT-B-32', 'Hugging Face'),
    ('ViT-L-14-CLIPA', 'Hugging Face')])
def test_refused_by_name(name, why):
    with pytest.raises(ValueError, match=f'{name!r} cannot be walked.*{why}'): load_clip(name)


def test_every_architecture_is_walked_or_refused():
    walked = [n for n in open_clip.list_models() if why_not(open_clip.get_model_config(n)) is None]
    known = ('ViT-B-16 ViT-B-16-quickgelu ViT-B-32 ViT-L-14 ViT-L-14-336 ViT-L-14-336-quickgelu '
             'ViT-H-14')
    assert set(known.split()) <= set(walked)
    for name in walked:                                      # shapes only: costs nothing
        with torch.device('meta'): model = open_clip.create_model(name, device='meta')
        assert type(model) is open_clip.CLIP
        pixels = torch.empty(1, 3, *model.visual.image_size, device='meta')
        assert ImageTower(model.visual)(pixels).shape[-1] == model.text_projection.shape[1]


@pytest.mark.parametrize('part,setting', [
    ('vision_cfg', dict(pool_type='avg')), ('vision_cfg', dict(attentional_pool=True)),
    ('vision_cfg', dict(final_ln_after_pool=True)), ('vision_cfg', dict(qk_norm=True)),
    ('vision_cfg', dict(image_size=[96, 128])), ('text_cfg', dict(no_causal_mask=True)),
    ('text_cfg', dict(embed_cls=True)), ('text_cfg', dict(pool_type='last')),
    ('text_cfg', dict(proj_bias=True))])
def test_settings_that_change_the_way_are_refused(part, setting, tmp_path, tiny):
    cfg = json.loads(json.dumps(TINY))
    cfg[part] |= setting
    (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=cfg)))
    weights = 'open_clip_model.safetensors'
    (tmp_path/weights).write_bytes((tiny/weights).read_bytes())
    with pytest.raises(ValueError, match=next(iter(setting))): load_clip(tmp_path)


def test_unknown_names(tmp_path):
    for name in ('ViT-B-61', 'ViT-B/16', str(tmp_path/'nothing')):
        with pytest.raises(ValueError, match='neither a folder nor an architecture'):
            load_clip(name)
    with pytest.raises(ValueError, match='did you mean.*ViT-B-16'): load_clip('ViT-B-61')
    with pytest.raises(ValueError, match="'ViT-B-16-quickgelu'"):
        load_clip('ViT-B-16', pretrained='openai')


def test_broken_folders(tmp_path, tiny):
    config = tmp_path/'open_clip_config.json'
    weights = tmp_path/'open_clip_model.safetensors'
    with pytest.raises(FileNotFoundError, match=f'{config} is missing'): load_clip(tmp_path)
    config.write_bytes((tiny/'open_clip_config.json').read_bytes())
    with pytest.raises(FileNotFoundError, match=f'{weights} is missing'): load_clip(tmp_path)
    whole = (tiny/'open_clip_model.safetensors').read_bytes()
    weights.write_bytes(whole[:len(whole)//2])
    with pytest.raises(RuntimeError, match=str(weights)): load_clip(tmp_path)
    stored = load_file(tiny/'open_clip_model.safetensors')
    save_file({k: v for k, v in stored.items() if k != 'visual.proj'}, weights)
    with pytest.raises(RuntimeError, match='visual.proj'): load_clip(tmp_path)
    weights.write_bytes(whole)
    for text in ('{', '[]', '{"embed_dim": 96}'):
        config.write_text(text)
        with pytest.raises(ValueError, match=str(config)): load_clip(tmp_path)
    with pytest.raises(ValueError, match='makes no sense'): load_clip(tiny, pretrained='openai')
