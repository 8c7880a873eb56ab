"""Adapters, CFE, SKE and the decoder: shapes, the start at CLIP, gradients, padding, parameter counts."""
import open_clip, pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from risclip.adapters import Adapter, BlockAdapters, count_parameters, without_gradient
from risclip.cfe import CFE, Attention, meeting_blocks
from risclip.clip import CLIPTowers, load_clip
from risclip.decoder import Decoder, Level, resize
from risclip.grounding import cosine_map
from risclip.ske import SKE


def narrow(image_blocks, text_blocks, patch=8):
    "A random CLIP that is narrow, but as deep as asked; words have all been seen."
    torch.manual_seed(0)
    cfg = dict(embed_dim=32, vision_cfg=dict(image_size=32, patch_size=patch, width=48, layers=image_blocks, head_width=16),
               text_cfg=dict(context_length=24, vocab_size=49408, width=40, heads=4, layers=text_blocks))
    model = open_clip.CLIP(**cfg)
    model.visual.preprocess_cfg = dict(mean=(.5, .5, .5), std=(.25, .25, .25))
    return CLIPTowers(model, open_clip.get_tokenizer('ViT-B-16', context_length=24), 'narrow')

def widths(name):
    "(Dv, Dt, E, image blocks, text blocks) of an architecture."
    if name == 'tiny':
        clip = load_clip('tinyclip')
        return clip.width_image, clip.width_text, clip.width_joint, len(clip.image.blocks), len(clip.text.blocks)
    cfg = open_clip.get_model_config(name)
    return (cfg['vision_cfg']['width'], cfg['text_cfg']['width'], cfg['embed_dim'], cfg['vision_cfg']['layers'], cfg['text_cfg']['layers'])

NAMES = 'ViT-B-16', 'ViT-L-14', 'tiny'
PHRASES = ['a dog', 'the small red chair to the left of the big blue umbrella', 'left']


class Rungs(nn.Module):
    "All modules over a CLIP, walked as the chapters do it."
    def __init__(self, clip, heads=4, layers=None):
        super().__init__()
        self.clip, self.meetings = clip, meeting_blocks(len(clip.image.blocks), len(clip.text.blocks), layers)
        self.image = nn.ModuleList(BlockAdapters(clip.width_image) for _ in clip.image.blocks)
        self.text = nn.ModuleList(BlockAdapters(clip.width_text) for _ in clip.text.blocks)
        self.cfe = nn.ModuleList(CFE(clip.width_image, clip.width_text, clip.width_joint, heads) for _ in self.meetings)
        self.ske = nn.ModuleList(SKE(clip.width_joint, heads) for _ in range(2))

    def tokens(self, pixels, tokens):
        clip, pad, mask = self.clip, self.clip.text.pad_mask(tokens), self.clip.text.attn_mask(tokens.shape[1])
        v, t, i, k = clip.image.embed(pixels), clip.text.embed(tokens), 0, 0
        def step(block, adapters, x, *mask):
            x = x + block.attend(x, *mask); x = x + adapters.attention(x)
            x = x + block.mlp(x); return x + adapters.mlp(x)
        for (l, m), cfe in [*zip(self.meetings, self.cfe), ((len(self.image), len(self.text)), None)]:
            for i in range(i, l): v = step(clip.image.blocks[i], self.image[i], v)
            for k in range(k, m): t = step(clip.text.blocks[k], self.text[k], t, mask)
            i, k = l, m
            if cfe is not None: dv, dt = cfe(v, t, pad); v, t = v + dv, t + dt
        v, t = clip.image.project(v), clip.text.project(t)
        for ske in self.ske: v, t = ske(v, t, pad)
        return v, t

    def forward(self, pixels, tokens):
        v, t = self.tokens(pixels, tokens)
        return cosine_map(v[:, 1:], self.clip.text.eos(t, tokens), self.clip.grid)

    def parts(self): return nn.ModuleList([self.image, self.text, self.cfe, self.ske])


def awake(module, seed=0):
    "No parameter at zero any more, so that every path carries something."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters(): p.add_(.05*torch.randn(p.shape, generator=generator))
    return module

def random_batch(clip, n=3):
    return torch.randn(n, 3, clip.size, clip.size, generator=torch.Generator().manual_seed(1)), clip.tokenize(PHRASES[:n])


# ---- shapes, and the start

@pytest.mark.parametrize('name', NAMES)
def test_shapes_and_start(name):
    Dv, Dt, E, *_ = widths(name)
    v, t, pad = torch.randn(2, 9, Dv), torch.randn(2, 7, Dt), torch.arange(7)[None] >= torch.tensor([[7], [4]])
    for D, x in ((Dv, v), (Dt, t)):
        both = BlockAdapters(D)
        for adapter in (both.attention, both.mlp): assert torch.equal(adapter(x), torch.zeros_like(x))
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
    dv, dt, seen = awake(CFE(Dv, Dt, E))(v, t, return_attention=True)
    assert (dv.shape, dt.shape) == (v.shape, t.shape) and dv.abs().max() > 0 and dt.abs().max() > 0
    assert seen['image'].shape == (2, 9, 7) and seen['text'].shape == (2, 7, 9)
    v, t = torch.randn(2, 9, E), torch.randn(2, 7, E)
    out_v, out_t, seen = awake(SKE(E))(v, t, return_attention=True)
    assert (out_v.shape, out_t.shape) == (v.shape, t.shape) and not torch.equal(out_v, v) and not torch.equal(out_t, t)
    assert {k: tuple(a.shape) for k, a in seen.items()} == {'image->text': (2, 9, 7), 'text->image': (2, 7, 9), 'image->image': (2, 9, 9), 'text->text': (2, 7, 7)}

@pytest.mark.parametrize('depths', [(5, 3), (24, 12), (3, 5), (4, 4)])
def test_untrained_walk_is_clip(depths):
    clip = narrow(*depths)
    model = Rungs(clip)
    pixels, tokens = random_batch(clip)
    with torch.no_grad():
        v, t = model.tokens(pixels, tokens)
        assert torch.equal(v, clip.image(pixels)) and torch.equal(t, clip.text(tokens))

def test_untrained_walk_is_clip_b16():
    torch.manual_seed(0)
    clip = load_clip('ViT-B-16', size=64)
    pixels, tokens = random_batch(clip, 2)
    with torch.no_grad():
        v, t = Rungs(clip, heads=8).tokens(pixels, tokens)
        assert torch.equal(v[:, 0], clip.encode_image(pixels)) and torch.equal(clip.text.eos(t, tokens), clip.encode_text(tokens))

def test_untrained_walk_is_tinyclip():
    clip = load_clip('tinyclip')
    pixels, tokens = random_batch(clip)
    with torch.no_grad():
        plain = cosine_map(clip.image(pixels)[:, 1:], clip.encode_text(tokens), clip.grid)
        assert torch.equal(Rungs(clip)(pixels, tokens), plain)


# ---- gradients

def small_steps(clip, model, steps=4):
    "Some steps on random labels -> for each step, the parameters without a gradient."
    pixels, tokens = random_batch(clip)
    target = (torch.rand(len(pixels), 1, *clip.grid, generator=torch.Generator().manual_seed(2)) > .5).float()
    optimiser, silent = torch.optim.SGD(model.parts().parameters(), 1.), []
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(10*model(pixels, tokens), target)
        optimiser.zero_grad(); loss.backward(); silent.append(without_gradient(model.parts())); optimiser.step()
    return silent

@pytest.mark.parametrize('depths', [(5, 3), (24, 12)])
def test_every_parameter_learns_and_clip_never(depths):
    clip = narrow(*depths)
    before = {n: p.clone() for n, p in clip.state_dict().items()}
    silent = small_steps(clip, Rungs(clip))
    assert silent[0] and not silent[1] and not silent[-1], silent[1]             # the others from the second step on
    last = 'up.', 's2v.', 's2t.', 'between.mhca.out_proj.', 'within.mhca.out_proj.', 'mlp.2.'
    assert all(not any(part in name for part in last) for name in silent[0])     # the last projections learn at once
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())
    for n, p in clip.state_dict().items(): assert torch.equal(p, before[n]), n

@pytest.mark.parametrize('part', ['adapter', 'cfe', 'ske'])
def test_zero_at_both_ends_is_dead(part):
    "All but the biases of the last projections stay without a gradient, however long one trains; and ours does not."
    def make(dead):
        torch.manual_seed(0)
        module = dict(adapter=lambda: Adapter(16), cfe=lambda: CFE(16, 12, 8, 2), ske=lambda: SKE(16, 2))[part]()
        first = dict(adapter=lambda m: [m.down], cfe=lambda m: [m.v2s, m.t2s],
                     ske=lambda m: [h.mlp[0] for h in (m.image, m.text)])[part](module)
        for layer in first if dead else (): nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        if part == 'ske' and dead:
            for half in (module.image, module.text):
                for a in (half.between, half.within): nn.init.zeros_(a.mhca.in_proj_weight)
        return module
    def weights_alive(module):
        v, t = torch.randn(2, 6, 16), torch.randn(2, 5, 12 if part == 'cfe' else 16)
        goal, optimiser = torch.randn(2, 6, 16), torch.optim.SGD(module.parameters(), .1)
        for _ in range(5):
            out = dict(adapter=lambda: (v + module(v), t*0), cfe=lambda: [x + d for x, d in zip((v, t), module(v, t))],
                       ske=lambda: module(v, t))[part]()
            optimiser.zero_grad(); (((out[0] - goal)**2).mean() + ((out[1] - 1)**2).mean()).backward(); optimiser.step()
        silent = without_gradient(module)
        return {n for n, p in module.named_parameters() if p.ndim > 1 and n not in silent}
    everything = {n for n, p in make(False).named_parameters() if p.ndim > 1}
    assert weights_alive(make(False)) == everything
    assert weights_alive(make(True)) == set()


# ---- padding

@pytest.mark.parametrize('pads', [0, 1, 10])
def test_padding_changes_nothing_in_the_modules(pads):
    torch.manual_seed(0)
    v, t, junk = torch.randn(2, 6, 16), torch.randn(2, 5, 16), 10*torch.randn(2, pads, 16)
    longer, pad = torch.cat([t, junk], 1), (torch.arange(5 + pads) >= 5).expand(2, -1)
    for module in (awake(CFE(16, 16, 8, 2)), awake(SKE(16, 2))):
        for (a, b) in zip(module(v, longer, pad), module(v, t)): assert_close(a[:, :b.shape[1]], b, atol=1e-6, rtol=1e-5)
        seen = module(v, longer, pad, return_attention=True)[2]
        for name in ('image',) if isinstance(module, CFE) else ('image->text', 'text->text'):
            assert (seen[name][..., 5:] == 0).all()
            assert_close(seen[name].sum(-1), torch.ones(seen[name].shape[:-1]))
        if pads == 10: assert (module(v, longer)[0] - module(v, t)[0]).abs().max() > 1e-3      # the mask is what does it

def test_padding_changes_nothing_in_the_walk():
    clip = narrow(5, 3)
    model = Rungs(clip); awake(model.parts())
    pixels, tokens = random_batch(clip)
    for i in range(len(PHRASES)):
        length = int(tokens[i].argmax()) + 1
        short, longer = tokens[i:i + 1, :length], F.pad(tokens[i:i + 1, :length], (0, 10))[:, :clip.context]
        with torch.no_grad(): (v, t), (pv, pt) = model.tokens(pixels[i:i + 1], short), model.tokens(pixels[i:i + 1], longer)
        assert_close(pv, v, atol=1e-5, rtol=1e-4); assert_close(pt[:, :length], t, atol=1e-5, rtol=1e-4)

def test_phrases_of_a_batch_do_not_mix():
    clip = narrow(5, 3)
    model = Rungs(clip); awake(model.parts())
    pixels, tokens = random_batch(clip)
    with torch.no_grad(): together, alone = model(pixels, tokens), torch.cat([model(pixels[i:i + 1], tokens[i:i + 1]) for i in range(3)])
    assert_close(together, alone, atol=1e-5, rtol=1e-4)

def test_the_phrase_reaches_the_patches_only_through_cfe_and_ske():
    clip = narrow(5, 3)
    pixels, tokens = random_batch(clip)
    model = Rungs(clip); awake(model.parts())
    same = pixels[:1].expand(3, -1, -1, -1)
    with torch.no_grad():
        v = model.tokens(same, tokens)[0]
        assert (v[0] - v[1]).abs().max() > 1e-3
        for part in (model.cfe, model.ske):
            for p in part.parameters(): p.zero_()
        v = model.tokens(same, tokens)[0]
    assert_close(v[0], v[1], atol=1e-6, rtol=1e-5)


# ---- CFE and SKE against their definitions

def test_cfe_reads_the_incoming_tokens_both_ways():
    cfe = awake(CFE(16, 12, 8, 2))
    v, t = torch.randn(2, 6, 16), torch.randn(2, 5, 12)
    vs, ts = cfe.v2s(cfe.norm_v(v)), cfe.t2s(cfe.norm_t(t))
    heads = lambda x: x.unflatten(-1, (2, 4)).transpose(1, 2)
    def mhca(attention, q, c):
        w, b = attention.mhca.in_proj_weight.chunk(3), attention.mhca.in_proj_bias.chunk(3)
        q, k, x = (heads(F.linear(y, w_, b_)) for y, w_, b_ in zip((q, c, c), w, b))
        return attention.mhca.out_proj(((q@k.mT/2).softmax(-1)@x).transpose(1, 2).flatten(2))
    dv, dt = cfe(v, t)
    assert_close(dv, cfe.s2v(mhca(cfe.image, vs, ts)), atol=1e-5, rtol=1e-4)
    assert_close(dt, cfe.s2t(mhca(cfe.text, ts, vs)), atol=1e-5, rtol=1e-4)

def test_ske_starts_as_a_comparison():
    "Untrained, the attention of a token is the softmax of its dot products with the others, head by head; and with aligned=False it is not."
    v, t = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    def heads(x): return x.unflatten(-1, (2, 8)).transpose(1, 2)                       # [B, heads, n, width/heads]
    for ske, same in (SKE(16, 2), True), (SKE(16, 2, aligned=False), False):
        seen = ske(v, t, return_attention=True)[2]
        norm = lambda x: F.layer_norm(x, (16,))
        for name, q, k in ('image->text', v, t), ('text->image', t, v), ('image->image', v, v), ('text->text', t, t):
            expected = (1.5**2*heads(norm(q))@heads(norm(k)).mT/8**.5).softmax(-1).mean(1)
            assert torch.allclose(seen[name], expected, atol=1e-5) == same, name


def test_ske_places():
    "With `side` it starts at plain CLIP all the same, two equal patches at two places look elsewhere, and the places learn."
    ske = SKE(16, 2, side=3)
    v, t = torch.randn(1, 1, 16).expand(1, 10, 16), torch.randn(1, 4, 16)
    out_v, out_t, seen = ske(v, t, return_attention=True)
    assert torch.equal(out_v, v) and torch.equal(out_t, t)
    assert (seen['image->text'][0, 1] - seen['image->text'][0, 9]).abs().max() > 1e-3
    without = SKE(16, 2)(v, t, return_attention=True)[2]['image->text']
    assert_close(without[0, 1], without[0, 9])
    awake(ske)(v, t)[0].square().sum().backward()
    assert ske.positions.grad.abs().sum() > 0 and ske.positions.shape == (10, 16)


def test_ske_is_between_then_within_then_mlp():
    ske = awake(SKE(16, 2))
    v, t = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    i, x = ske.image, ske.text
    v1, t1 = v + i.between(i.norm_between(v), x.norm_between(t)), t + x.between(x.norm_between(t), i.norm_between(v))
    v2, t2 = (a + h.within(h.norm_within(a), h.norm_within(a)) for h, a in ((i, v1), (x, t1)))
    for out, h, a in zip(ske(v, t), (i, x), (v2, t2)): assert_close(out, a + h.mlp(h.norm_mlp(a)), atol=1e-6, rtol=1e-5)

def test_return_attention_changes_nothing():
    v, t, pad = torch.randn(2, 6, 16), torch.randn(2, 5, 16), torch.arange(5)[None] >= torch.tensor([[5], [3]])
    for module in (awake(CFE(16, 16, 8, 2)), awake(SKE(16, 2))):
        for a, b in zip(module(v, t, pad), module(v, t, pad, return_attention=True)): assert_close(a, b, atol=1e-6, rtol=1e-5)

def test_heads_must_divide():
    for make in (lambda: Attention(20, 8), lambda: SKE(20, 8), lambda: CFE(16, 16, 20, 8)):
        with pytest.raises(ValueError, match='20 cannot be split over 8'): make()

def test_meetings():
    assert meeting_blocks(12, 12) == [(k, k) for k in range(12)]
    assert meeting_blocks(24, 12) == [(2*k - 1, k - 1) for k in range(1, 13)]
    assert meeting_blocks(12, 12, 'last half') == [(k, k) for k in range(6, 12)]
    assert meeting_blocks(24, 12, 6) == meeting_blocks(24, 12, 'last half') == meeting_blocks(24, 12)[-6:]
    for layers in (0, -1, 13, 'half', 1.5):
        with pytest.raises(ValueError, match='use 1 to 12'): meeting_blocks(24, 12, layers)


# ---- parameters, as facts about the sizes of a re-implementation give them: 20.5 M, 20.5 M, 28.4 M for B/16

def test_parameter_counts_b16():
    Dv, Dt, E, n_image, n_text = widths('ViT-B-16')
    adapters = n_image*count_parameters(BlockAdapters(Dv)) + n_text*count_parameters(BlockAdapters(Dt))
    assert round(adapters/1e6, 1) == 20.5
    assert round(6*count_parameters(CFE(Dv, Dt, E))/1e6, 1) == 20.5
    assert round(6*count_parameters(SKE(E))/1e6, 1) == 28.4
    assert [round(count_parameters(Decoder(Dv, 16, h))/1e6, 1) for h in (128, 256, 512)] == [2.0, 7.3, 27.5]


# ---- the decoder

@pytest.mark.parametrize('S', [96, 224, 336, 476, 480])
@pytest.mark.parametrize('patch', [8, 14, 16])
def test_mask_has_the_size_of_the_picture(S, patch):
    decoder, grid = Decoder(6, patch, hidden=2).eval(), round(S/patch)      # 96 and 480 are no multiples of 14: exact all the same
    with torch.no_grad(): mask = decoder([torch.randn(1, 6, grid, grid) for _ in range(4)], torch.randn(1, 1, grid, grid), S)
    assert mask.shape == (1, 1, S, S)

@pytest.mark.parametrize('patch, doubles', [(4, 2), (8, 3), (14, 4), (16, 4), (32, 4)])
def test_levels_double_until_the_patch_is_undone(patch, doubles):
    assert [level.upsample for level in Decoder(6, patch, hidden=2).levels] == [i >= 4 - doubles for i in range(4)]

def test_decoder_is_the_two_equations():
    torch.manual_seed(0)
    decoder, v, map = Decoder(6, 16, hidden=4).eval(), [torch.randn(2, 6, 3, 3) for _ in range(4)], torch.randn(2, 1, 3, 3)
    def ready(lateral, vi):
        x = vi.permute(0, 2, 3, 1)
        x = (x - x.mean(-1, keepdim=True))/(x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return (x @ lateral.conv.weight[:, :, 0, 0].T + lateral.conv.bias).permute(0, 3, 1, 2)
    (D4, D3, D2, D1), (u4, u3, u2, u1) = decoder.levels, decoder.laterals
    d = D4(torch.cat([map, ready(u4, v[3])], 1))
    for D, lateral, vi, size in ((D3, u3, v[2], 6), (D2, u2, v[1], 12), (D1, u1, v[0], 24)):
        d = D(torch.cat([d, F.interpolate(ready(lateral, vi), size=size, mode='bilinear', align_corners=False)], 1))
    assert d.shape == (2, 4, 48, 48)
    assert_close(decoder(v, map, 48), decoder.head(d))

def test_every_input_reaches_the_mask_and_every_parameter_learns():
    torch.manual_seed(0)
    decoder, v, map = Decoder(6, 8, hidden=4), [torch.randn(2, 6, 3, 3, requires_grad=True) for _ in range(4)], torch.randn(2, 1, 3, 3, requires_grad=True)
    decoder(v, map, 24).square().mean().backward()
    assert without_gradient(decoder) == []
    for x in (*v, map): assert x.grad.abs().sum() > 0

def test_the_size_of_features_does_not_matter():
    "Each feature is normalised before a convolution reads it."
    torch.manual_seed(0)
    decoder, v, map = Decoder(6, 8, hidden=4).eval(), torch.randn(1, 6, 3, 3), torch.randn(1, 1, 3, 3)
    with torch.no_grad(): assert_close(decoder([x*100 for x in [v]*4], map, 24), decoder([v]*4, map, 24), atol=1e-3, rtol=1e-3)

def test_relu_stands_before_batch_norm():
    kinds = [type(m) for m in Level(3, 4).convs]
    assert kinds == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d]*2 and all(m.bias is not None for m in Level(3, 4).convs if isinstance(m, nn.Conv2d))

def test_batch_norm_in_training_and_evaluation():
    torch.manual_seed(0)
    decoder, v, map = Decoder(6, 8, hidden=4), [torch.randn(4, 6, 3, 3) for _ in range(4)], torch.randn(4, 1, 3, 3)
    one = lambda: decoder([x[:1] for x in v], map[:1], 24)
    assert (one() - decoder(v, map, 24)[:1]).abs().max() > 1e-3          # in training the company counts
    decoder.eval()
    assert_close(one(), decoder(v, map, 24)[:1], atol=1e-6, rtol=1e-5)
    again = Decoder(6, 8, hidden=4).eval(); again.load_state_dict(decoder.state_dict())
    assert_close(again(v, map, 24), decoder(v, map, 24))
    parameters_only = Decoder(6, 8, hidden=4).eval()
    parameters_only.load_state_dict(dict(decoder.named_parameters()), strict=False)
    assert (parameters_only(v, map, 24) - decoder(v, map, 24)).abs().max() > 1e-3      # its averages must be saved too

def test_decoder_refuses_what_does_not_fit():
    decoder, v, map = Decoder(6, 8, hidden=4), [torch.randn(1, 6, 3, 3)]*4, torch.randn(1, 1, 3, 3)
    with pytest.raises(ValueError, match='expected 4 features'): decoder(v[:3], map, 24)
    with pytest.raises(ValueError, match='on one grid'): decoder(v, torch.randn(1, 1, 6, 6), 24)
    assert resize(map, (5, 9)).shape == (1, 1, 5, 9)
