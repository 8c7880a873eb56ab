"""Adapters, CFE, SKE and the decoder: shapes, the start at CLIP, gradients, padding, parameter
counts; each by itself, and all of them in the model's walk."""
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from risclip.adapters import Adapter, BlockAdapters, count_parameters, without_gradient
from risclip.cfe import CFE, Attention, meeting_blocks
from risclip.clip import CLIPTowers, load_clip
from risclip.decoder import Decoder, Level, resize
from risclip.grounding import cosine_map
from risclip.model import RISCLIP, ModelSettings
from risclip.ske import SKE


def narrow(image_blocks, text_blocks, patch=8):
    """A random CLIP that is narrow, but as deep as asked, with three different widths; words have
    all been seen."""
    torch.manual_seed(0)
    vision = dict(image_size=32, patch_size=patch, width=48, layers=image_blocks, head_width=16)
    text = dict(context_length=24, vocab_size=49408, width=40, heads=4, layers=text_blocks)
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
    model.visual.preprocess_cfg = dict(mean=(.5, .5, .5), std=(.25, .25, .25))
    return CLIPTowers(model, open_clip.get_tokenizer('ViT-B-16', context_length=24), 'narrow')

def widths(name):
    "(Dv, Dt, E, image blocks, text blocks) of an architecture."
    if name == 'tiny':
        clip = load_clip('tinyclip')
        blocks = len(clip.image.blocks), len(clip.text.blocks)
        return clip.width_image, clip.width_text, clip.width_joint, *blocks
    cfg = open_clip.get_model_config(name)
    vision, text = cfg['vision_cfg'], cfg['text_cfg']
    return vision['width'], text['width'], cfg['embed_dim'], vision['layers'], text['layers']

NAMES = 'ViT-B-16', 'ViT-L-14', 'tiny'
PHRASES = ['a dog', 'the small red chair to the left of the big blue umbrella', 'left']


def rungs(clip, num_heads=4):
    "The model up to SKE: adapters, a CFE at each meeting, two layers of SKE."
    settings = ModelSettings('ske', num_heads=num_heads, cfe_dim=clip.width_joint, ske_layers=2,
                             ske_mlp_dim=None, ske_identity_init=True)
    return RISCLIP(settings, clip)

def parts(model):
    "What is added to CLIP, without scale and bias."
    return nn.ModuleList([model.image_adapters, model.text_adapters, model.cfe, model.ske])

def all_tokens(model, pixels, tokens):
    "Every token in the joint space, pads too, after SKE: v [B, N, E], t [B, T, E]."
    _, v, t = model.encode(pixels, tokens)
    for ske in model.ske: v, t = ske(v, t, model.clip.text.pad_mask(tokens))
    return v, t

def awake(module, seed=0):
    "No parameter at zero any more, so that every path carries something."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters(): p.add_(.05*torch.randn(p.shape, generator=generator))
    return module

def awake_rungs(clip):
    "The model with all its parts awake."
    model = rungs(clip)
    awake(parts(model))
    return model

def random_batch(clip, n=3):
    "Pixels [n, 3, S, S] and tokens [n, T]."
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(n, 3, clip.size, clip.size, generator=generator)
    return pixels, clip.tokenize(PHRASES[:n])


# ---- shapes, and the start

@pytest.mark.parametrize('name', NAMES)
def test_shapes_and_start(name):
    Dv, Dt, E, *_ = widths(name)
    v, t = torch.randn(2, 9, Dv), torch.randn(2, 7, Dt)
    pad = torch.arange(7)[None] >= torch.tensor([[7], [4]])
    for D, x in ((Dv, v), (Dt, t)):
        both = BlockAdapters(D)
        for adapter in (both.attention, both.mlp):
            assert torch.equal(adapter(x), torch.zeros_like(x))
    dv, dt = CFE(Dv, Dt, E)(v, t, pad)
    assert torch.equal(dv, torch.zeros_like(v)) and torch.equal(dt, torch.zeros_like(t))
    v, t = torch.randn(2, 9, E), torch.randn(2, 7, E)
    out_v, out_t = SKE(E)(v, t, pad)
    assert torch.equal(out_v, v) and torch.equal(out_t, t)

@pytest.mark.parametrize('name', NAMES)
def test_awake_modules_change_tokens_and_keep_shapes(name):
    Dv, Dt, E, *_ = widths(name)
    v, t = torch.randn(2, 9, Dv), torch.randn(2, 7, Dt)
    change = awake(Adapter(Dv))(v)
    assert change.shape == v.shape and change.abs().max() > 0
    dv, dt, weights = awake(CFE(Dv, Dt, E))(v, t, return_attention=True)
    assert (dv.shape, dt.shape) == (v.shape, t.shape)
    assert dv.abs().max() > 0 and dt.abs().max() > 0
    assert weights['image'].shape == (2, 9, 7) and weights['text'].shape == (2, 7, 9)
    v, t = torch.randn(2, 9, E), torch.randn(2, 7, E)
    out_v, out_t, weights = awake(SKE(E))(v, t, return_attention=True)
    assert (out_v.shape, out_t.shape) == (v.shape, t.shape)
    assert not torch.equal(out_v, v) and not torch.equal(out_t, t)
    assert {name: tuple(a.shape) for name, a in weights.items()} == {
        'image->text': (2, 9, 7), 'text->image': (2, 7, 9),
        'image->image': (2, 9, 9), 'text->text': (2, 7, 7)}

@pytest.mark.parametrize('depths', [(5, 3), (24, 12), (3, 5), (4, 4)])
def test_untrained_walk_is_clip(depths):
    clip = narrow(*depths)
    pixels, tokens = random_batch(clip)
    with torch.no_grad():
        v, t = all_tokens(rungs(clip), pixels, tokens)
        assert torch.equal(v, clip.image(pixels)) and torch.equal(t, clip.text(tokens))

def test_untrained_walk_is_clip_b16():
    torch.manual_seed(0)
    clip = load_clip('ViT-B-16', size=64)
    pixels, tokens = random_batch(clip, 2)
    with torch.no_grad():
        v, t = all_tokens(rungs(clip, num_heads=8), pixels, tokens)
        assert torch.equal(v[:, 0], clip.encode_image(pixels))
        assert torch.equal(clip.text.eos(t, tokens), clip.encode_text(tokens))

def test_untrained_walk_is_tinyclip():
    clip = load_clip('tinyclip')
    model, (pixels, tokens) = rungs(clip), random_batch(clip)
    tokens = tokens[:, :int(tokens.argmax(1).max()) + 1]    # the model reads to the last EOS
    with torch.no_grad():
        plain = cosine_map(clip.image(pixels)[:, 1:], clip.encode_text(tokens), clip.grid)
        assert torch.equal(model(pixels, tokens).grounding, model.calibration(plain))


# ---- gradients

def small_steps(clip, model, steps=4):
    "Some steps on random labels -> for each step, the parameters without a gradient."
    pixels, tokens = random_batch(clip)
    generator = torch.Generator().manual_seed(2)
    target = (torch.rand(len(pixels), 1, *clip.grid, generator=generator) > .5).float()
    optimiser, silent = torch.optim.SGD(parts(model).parameters(), .5), []
    for _ in range(steps):
        logits = model(pixels, tokens).grounding
        loss = F.binary_cross_entropy_with_logits(logits, target)
        optimiser.zero_grad()
        loss.backward()
        silent.append(without_gradient(parts(model)))
        optimiser.step()
    return silent

@pytest.mark.parametrize('depths', [(5, 3), (24, 12)])
def test_every_parameter_learns_and_clip_never(depths):
    clip = narrow(*depths)
    before = {n: p.clone() for n, p in clip.state_dict().items()}
    silent = small_steps(clip, rungs(clip))
    assert silent[0] and not silent[1] and not silent[-1], silent[1]    # from the second step on
    last = 'up.', 's2v.', 's2t.', 'between.mhca.out_proj.', 'within.mhca.out_proj.', 'mlp.2.'
    for name in silent[0]:                                              # the last learn at once
        assert not any(part in name for part in last)
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())
    for n, p in clip.state_dict().items(): assert torch.equal(p, before[n]), n

def make_part(part, dead):
    "One module, at its own start, or (`dead`) with its first projections at zero as well."
    torch.manual_seed(0)
    if part == 'adapter':
        module = Adapter(16)
        first = [module.down]
    if part == 'cfe':
        module = CFE(16, 12, 8, 2)
        first = [module.v2s, module.t2s]
    if part == 'ske':
        module = SKE(16, 2)
        first = [module.image.mlp[0], module.text.mlp[0]]
    if not dead: return module
    for layer in first:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    if part == 'ske':
        for half in (module.image, module.text):
            for a in (half.between, half.within): nn.init.zeros_(a.mhca.in_proj_weight)
    return module

def change_tokens(part, module, v, t):
    "The tokens after a module, as the walk uses it."
    if part == 'adapter': return v + module(v), t*0
    if part == 'ske': return module(v, t)
    dv, dt = module(v, t)
    return v + dv, t + dt

def weights_alive(part, module, steps=5):
    "The names of the matrices that have a gradient after some steps."
    v, t = torch.randn(2, 6, 16), torch.randn(2, 5, 12 if part == 'cfe' else 16)
    goal, optimiser = torch.randn(2, 6, 16), torch.optim.SGD(module.parameters(), .1)
    for _ in range(steps):
        out_v, out_t = change_tokens(part, module, v, t)
        loss = ((out_v - goal)**2).mean() + ((out_t - 1)**2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    silent = without_gradient(module)
    return {n for n, p in module.named_parameters() if p.ndim > 1 and n not in silent}

@pytest.mark.parametrize('part', ['adapter', 'cfe', 'ske'])
def test_zero_at_both_ends_is_dead(part):
    """All but the biases of the last projections stay without a gradient, however long one trains;
    and ours does not."""
    everything = {n for n, p in make_part(part, False).named_parameters() if p.ndim > 1}
    assert weights_alive(part, make_part(part, False)) == everything
    assert weights_alive(part, make_part(part, True)) == set()


# ---- padding

@pytest.mark.parametrize('pads', [0, 1, 10])
def test_padding_changes_nothing_in_the_modules(pads):
    torch.manual_seed(0)
    v, t, junk = torch.randn(2, 6, 16), torch.randn(2, 5, 16), 10*torch.randn(2, pads, 16)
    longer, pad = torch.cat([t, junk], 1), (torch.arange(5 + pads) >= 5).expand(2, -1)
    read = {awake(CFE(16, 16, 8, 2)): ['image'], awake(SKE(16, 2)): ['image->text', 'text->text']}
    for module, names in read.items():
        for a, b in zip(module(v, longer, pad), module(v, t)):
            assert_close(a[:, :b.shape[1]], b, atol=1e-6, rtol=1e-5)
        weights = module(v, longer, pad, return_attention=True)[2]
        for name in names:
            assert (weights[name][..., 5:] == 0).all()
            assert_close(weights[name].sum(-1), torch.ones(weights[name].shape[:-1]))
        if pads == 10:                                              # the mask is what does it
            assert (module(v, longer)[0] - module(v, t)[0]).abs().max() > 1e-3

def test_padding_changes_nothing_in_the_walk():
    clip = narrow(5, 3)
    model, (pixels, tokens) = awake_rungs(clip), random_batch(clip)
    for i in range(len(PHRASES)):
        length, picture = int(tokens[i].argmax()) + 1, pixels[i:i + 1]
        short = tokens[i:i + 1, :length]
        longer = F.pad(short, (0, 10))[:, :clip.context]
        with torch.no_grad():
            v, t = all_tokens(model, picture, short)
            padded_v, padded_t = all_tokens(model, picture, longer)
        assert_close(padded_v, v, atol=1e-5, rtol=1e-4)
        assert_close(padded_t[:, :length], t, atol=1e-5, rtol=1e-4)

def test_phrases_of_a_batch_do_not_mix():
    clip = narrow(5, 3)
    model, (pixels, tokens) = awake_rungs(clip), random_batch(clip)
    with torch.no_grad():
        batched = model(pixels, tokens).grounding
        single = [model(pixels[i:i + 1], tokens[i:i + 1]).grounding for i in range(3)]
    assert_close(batched, torch.cat(single), atol=1e-4, rtol=1e-4)

def test_the_phrase_reaches_the_patches_only_through_cfe_and_ske():
    clip = narrow(5, 3)
    model, (pixels, tokens) = awake_rungs(clip), random_batch(clip)
    same = pixels[:1].expand(3, -1, -1, -1)
    with torch.no_grad():
        v = all_tokens(model, same, tokens)[0]
        assert (v[0] - v[1]).abs().max() > 1e-3
        for part in (model.cfe, model.ske):
            for p in part.parameters(): p.zero_()
        v = all_tokens(model, same, tokens)[0]
    assert_close(v[0], v[1], atol=1e-6, rtol=1e-5)


# ---- CFE and SKE against their definitions

def multi_head(attention, q, c, heads=2):
    "Multi-head attention in plain products: q [B, Q, D] reads c [B, K, D] -> [B, Q, D]."
    mhca, inputs = attention.mhca, (q, c, c)
    weights, biases = mhca.in_proj_weight.chunk(3), mhca.in_proj_bias.chunk(3)
    width = q.shape[-1]//heads
    projected = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases)]
    q, k, v = (x.unflatten(-1, (heads, width)).transpose(1, 2) for x in projected)
    mixed = (q@k.mT/width**.5).softmax(-1)@v
    return mhca.out_proj(mixed.transpose(1, 2).flatten(2))

def test_cfe_reads_the_incoming_tokens_both_ways():
    cfe = awake(CFE(16, 12, 8, 2))
    v, t = torch.randn(2, 6, 16), torch.randn(2, 5, 12)
    vs, ts = cfe.v2s(cfe.norm_v(v)), cfe.t2s(cfe.norm_t(t))
    dv, dt = cfe(v, t)
    assert_close(dv, cfe.s2v(multi_head(cfe.image, vs, ts)), atol=1e-5, rtol=1e-4)
    assert_close(dt, cfe.s2t(multi_head(cfe.text, ts, vs)), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('identity_init', [True, False])
def test_ske_starts_as_a_comparison(identity_init):
    """Untrained, the attention of a token is the softmax of its dot products with the others, head
    by head; and with identity_init=False it is not."""
    v, t = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    def heads(x):
        "[B, n, E], normed -> [B, heads, n, E/heads]."
        return F.layer_norm(x, (16,)).unflatten(-1, (2, 8)).transpose(1, 2)
    pairs = {'image->text': (v, t), 'text->image': (t, v), 'image->image': (v, v),
             'text->text': (t, t)}
    *_, weights = SKE(16, 2, identity_init=identity_init)(v, t, return_attention=True)
    for name, (q, k) in pairs.items():
        expected = (1.5**2*heads(q)@heads(k).mT/8**.5).softmax(-1).mean(1)
        assert torch.allclose(weights[name], expected, atol=1e-5) == identity_init, name

def test_ske_places():
    """With `side` it starts at plain CLIP all the same, two equal patches at two places look
    elsewhere, and the places learn."""
    ske = SKE(16, 2, side=3)
    v, t = torch.randn(1, 1, 16).expand(1, 10, 16), torch.randn(1, 4, 16)
    out_v, out_t, weights = ske(v, t, return_attention=True)
    assert torch.equal(out_v, v) and torch.equal(out_t, t)
    placed = weights['image->text'][0]
    assert (placed[1] - placed[9]).abs().max() > 1e-3
    plain = SKE(16, 2)(v, t, return_attention=True)[2]['image->text'][0]
    assert_close(plain[1], plain[9])
    awake(ske)(v, t)[0].square().sum().backward()
    assert ske.positions.grad.abs().sum() > 0 and ske.positions.shape == (10, 16)

def test_ske_is_between_then_within_then_mlp():
    ske = awake(SKE(16, 2))
    v, t = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    i, x = ske.image, ske.text
    vn, tn = i.norm_between(v), x.norm_between(t)
    v1, t1 = v + i.between(vn, tn), t + x.between(tn, vn)
    for out, half, a in zip(ske(v, t), (i, x), (v1, t1)):
        normed = half.norm_within(a)
        a = a + half.within(normed, normed)
        assert_close(out, a + half.mlp(half.norm_mlp(a)), atol=1e-6, rtol=1e-5)

def test_return_attention_changes_nothing():
    v, t = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    pad = torch.arange(5)[None] >= torch.tensor([[5], [3]])
    for module in (awake(CFE(16, 16, 8, 2)), awake(SKE(16, 2))):
        for a, b in zip(module(v, t, pad), module(v, t, pad, return_attention=True)):
            assert_close(a, b, atol=1e-6, rtol=1e-5)

def test_heads_must_divide():
    for make in (lambda: Attention(20, 8), lambda: SKE(20, 8), lambda: CFE(16, 16, 20, 8)):
        with pytest.raises(ValueError, match='20 cannot be split over 8'): make()

def test_meetings():
    assert meeting_blocks(12, 12) == [(k, k) for k in range(12)]
    assert meeting_blocks(24, 12) == [(2*k - 1, k - 1) for k in range(1, 13)]
    assert meeting_blocks(12, 12, 'last half') == [(k, k) for k in range(6, 12)]
    last_half = meeting_blocks(24, 12)[-6:]
    assert meeting_blocks(24, 12, 6) == meeting_blocks(24, 12, 'last half') == last_half
    for layers in (0, -1, 13, 'half', 1.5):
        with pytest.raises(ValueError, match='use 1 to 12'): meeting_blocks(24, 12, layers)


# ---- parameters, as the sizes of a re-implementation give them: 20.5 M, 20.5 M, 28.4 M for B/16

def test_parameter_counts_b16():
    Dv, Dt, E, n_image, n_text = widths('ViT-B-16')
    image, text = count_parameters(BlockAdapters(Dv)), count_parameters(BlockAdapters(Dt))
    with torch.device('meta'):
        cfe, ske = count_parameters(CFE(Dv, Dt, E)), count_parameters(SKE(E))
        decoders = [count_parameters(Decoder(Dv, 16, h)) for h in (128, 256, 512)]
    assert round((n_image*image + n_text*text)/1e6, 1) == 20.5
    assert round(6*cfe/1e6, 1) == 20.5
    assert round(6*ske/1e6, 1) == 28.4
    assert [round(n/1e6, 1) for n in decoders] == [2.0, 7.3, 27.5]


# ---- the decoder

def decoder_inputs(n=1, width=6, grid=3):
    "Four features [n, width, grid, grid] and a map [n, 1, grid, grid], random."
    v = [torch.randn(n, width, grid, grid) for _ in range(4)]
    return v, torch.randn(n, 1, grid, grid)

@pytest.mark.parametrize('S', [96, 224, 336, 476, 480])
@pytest.mark.parametrize('patch', [8, 14, 16])
def test_mask_has_the_size_of_the_picture(S, patch):
    grid = round(S/patch)                       # 96, 480 are no multiples of 14: exact all the same
    decoder, (v, map) = Decoder(6, patch, hidden=2).eval(), decoder_inputs(grid=grid)
    with torch.no_grad(): assert decoder(v, map, S).shape == (1, 1, S, S)

@pytest.mark.parametrize('patch, doubles', [(4, 2), (8, 3), (14, 4), (16, 4), (32, 4)])
def test_levels_double_until_the_patch_is_undone(patch, doubles):
    levels = Decoder(6, patch, hidden=2).levels
    assert [level.upsample for level in levels] == [i >= 4 - doubles for i in range(4)]

def test_decoder_is_the_two_equations():
    torch.manual_seed(0)
    decoder, (v, map) = Decoder(6, 16, hidden=4).eval(), decoder_inputs(2)
    def ready(lateral, vi):
        "LayerNorm over the channels and a 1x1 convolution, in plain products."
        x = vi.permute(0, 2, 3, 1)
        var = x.var(-1, unbiased=False, keepdim=True)
        x = (x - x.mean(-1, keepdim=True))/(var + 1e-5).sqrt()
        kernel, bias = lateral.conv.weight[:, :, 0, 0], lateral.conv.bias
        return (x @ kernel.T + bias).permute(0, 3, 1, 2)
    (D4, D3, D2, D1), (u4, u3, u2, u1) = decoder.levels, decoder.laterals
    d = D4(torch.cat([map, ready(u4, v[3])], 1))
    for D, lateral, vi, size in ((D3, u3, v[2], 6), (D2, u2, v[1], 12), (D1, u1, v[0], 24)):
        u = F.interpolate(ready(lateral, vi), size=size, mode='bilinear', align_corners=False)
        d = D(torch.cat([d, u], 1))
    assert d.shape == (2, 4, 48, 48)
    assert_close(decoder(v, map, 48), decoder.head(d))

def test_every_input_reaches_the_mask_and_every_parameter_learns():
    torch.manual_seed(0)
    decoder, (v, map) = Decoder(6, 8, hidden=4), decoder_inputs(2)
    for x in (*v, map): x.requires_grad_()
    decoder(v, map, 24).square().mean().backward()
    assert without_gradient(decoder) == []
    for x in (*v, map): assert x.grad.abs().sum() > 0

def test_the_size_of_features_does_not_matter():
    "Each feature is normalised before a convolution reads it."
    torch.manual_seed(0)
    decoder, (v, map) = Decoder(6, 8, hidden=4).eval(), decoder_inputs()
    with torch.no_grad(): plain, scaled = decoder(v, map, 24), decoder([100*x for x in v], map, 24)
    assert_close(scaled, plain, atol=1e-3, rtol=1e-3)

def test_relu_stands_before_batch_norm():
    convs = Level(3, 4).convs
    assert [type(m) for m in convs] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d]*2
    assert all(m.bias is not None for m in convs if isinstance(m, nn.Conv2d))

def test_batch_norm_in_training_and_evaluation():
    torch.manual_seed(0)
    decoder, (v, map) = Decoder(6, 8, hidden=4), decoder_inputs(4)
    def first():
        "The first picture without its company."
        return decoder([x[:1] for x in v], map[:1], 24)
    assert (first() - decoder(v, map, 24)[:1]).abs().max() > 1e-3       # in training it counts
    decoder.eval()
    assert_close(first(), decoder(v, map, 24)[:1], atol=1e-6, rtol=1e-5)
    again = Decoder(6, 8, hidden=4).eval()
    again.load_state_dict(decoder.state_dict())
    assert_close(again(v, map, 24), decoder(v, map, 24))
    parameters_only = Decoder(6, 8, hidden=4).eval()                     # its averages count, too
    parameters_only.load_state_dict(dict(decoder.named_parameters()), strict=False)
    assert (parameters_only(v, map, 24) - decoder(v, map, 24)).abs().max() > 1e-3

def test_decoder_refuses_what_does_not_fit():
    decoder, (v, map) = Decoder(6, 8, hidden=4), decoder_inputs()
    with pytest.raises(ValueError, match='expected 4 features'): decoder(v[:3], map, 24)
    with pytest.raises(ValueError, match='on one grid'): decoder(v, torch.randn(1, 1, 6, 6), 24)
    assert resize(map, (5, 9)).shape == (1, 1, 5, 9)
