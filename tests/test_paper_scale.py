"""The paper's scale without its files: every preset is whole, a dry run says what the architecture
truly is, and CLIP alone is scored on files of RefCOCO's format."""
import json
from dataclasses import replace

import numpy as np, open_clip, pytest

from risclip.evaluation import risclip_evaluate
from risclip.model import RUNGS
from risclip.refer import PUBLISHED_COUNTS
from risclip.settings import PRESETS, settings_of
from risclip.training import describe_run
from risclip.writer import write_refer

PAPER = sorted(name for name, p in PRESETS.items() if p.get('pretrained') == 'openai')


def test_presets_of_the_paper():
    sets = [f'{name}_{by}' for name, by in PUBLISHED_COUNTS]
    assert PAPER == sorted(f'{name}_{short}' for name in sets for short in ('b16', 'l14'))
    for preset in PAPER:
        s = settings_of(preset)
        cfg = open_clip.get_model_config(s.clip)
        assert cfg['quick_gelu'] and 'openai' in open_clip.list_pretrained_tags_by_model(s.clip)
        assert s.size % cfg['vision_cfg']['patch_size'] == 0
        objects = PUBLISHED_COUNTS[s.data, s.split_by]['train'][1]
        assert 59.9 < s.stage1_steps*s.stage1_batch_size/objects <= 60
        assert 9.9 < s.stage2_steps*s.stage2_batch_size/objects <= 10
        for rung in RUNGS: assert settings_of(preset, rung=rung).rung == rung


# the large one on a small picture, for time
@pytest.mark.parametrize('preset, size', [('refcocog_umd_b16', 480), ('refcoco+_unc_l14', 56)])
def test_dry_run(preset, size):
    s = replace(settings_of(preset), size=size)
    text = describe_run(s)
    lines = {line[:14].strip(): line[14:].strip() for line in text.splitlines()}
    def number(key): return int(lines[key].split()[0].replace(',', ''))
    bare = open_clip.create_model(s.clip, pretrained=None)
    # but for the positions of another grid
    assert abs(number('frozen') - sum(p.numel() for p in bare.parameters())) < 2e6
    side = size//bare.visual.patch_size[0]
    width, joint = bare.visual.proj.shape
    shapes = dict(image_tokens=[32, side*side + 1, width], joint_image=[32, side*side + 1, joint],
                  grounding=[32, 1, side, side], mask=[32, 1, size, size])
    for name, shape in shapes.items(): assert lines[name] == str(shape)
    assert number('stage 2 trains') > 5e5
    if width > 768: assert number('stage 1 trains') > 150e6
    # adapters, CFE in each of 12 blocks, six SKE
    else: assert number('stage 1 trains') == pytest.approx(20.5e6 + 41.0e6 + 28.4e6, abs=1e5)
    assert f'stage 1: {s.stage1_steps:,} steps of 32' in text and 'GiB a step' in text


def test_dry_run_leaves_out_what_the_rung_does_not_have():
    text = describe_run(settings_of('refmojig', rung='raw'))
    assert 'stage 1:' not in text and 'mask' not in text
    assert 'stage 1 trains             0' in text
    text = describe_run(settings_of('refmojig', rung='ske'))
    assert 'stage 1:' in text and 'stage 2:' not in text


def stage1_line(**changes):
    "What a dry run of refmojig says of stage 1."
    lines = describe_run(settings_of('refmojig', **changes)).splitlines()
    return next(line for line in lines if line.startswith('stage 1:'))


def test_dry_run_knows_how_memory_is_saved():
    def gib(**changes):
        line = stage1_line(stage1_batch_size=320, **changes)
        return float(line.split(', ')[-1].split()[0])
    assert gib(accumulate=4) < .5*gib() and gib(recompute=True) < .5*gib()


def test_stage_1_is_counted_without_the_decoder():
    lines = [stage1_line(stage1_batch_size=3200, rung=rung) for rung in ('decoder', 'ske', 'cfe')]
    assert lines[0] == lines[1] != lines[2]


def example(rng, split):
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:50] = True
    dog = dict(mask=mask, category='dog', expressions=['the dog', 'a dog on the left'])
    return dict(picture=rng.integers(0, 255, (40, 60, 3), np.uint8), split=split, objects=[dog])


def test_clip_alone_on_files_of_refcocog(tmp_path, monkeypatch, capsys):
    """The command that gives the number to hold against the slides' first, with random weights and
    pictures: B/16 itself, no training."""
    rng, preset = np.random.default_rng(0), 'refcocog_umd_b16'
    splits = ('train', 'train', 'val', 'test', 'test')
    write_refer(tmp_path, 'refcocog', 'umd', [example(rng, split) for split in splits])
    small = dict(pretrained=None, size=64, workers=0)
    monkeypatch.setitem(PRESETS, preset, PRESETS[preset] | small)
    out = tmp_path/'out.json'
    risclip_evaluate(preset=preset, rung='raw', root=str(tmp_path), out=str(out))
    said = capsys.readouterr()
    assert 'warning' in said.err and 'differs from what was published' in said.err
    metrics = json.loads(out.read_text())
    assert metrics['expressions'] == 4
    how = [metrics[k] for k in ('data', 'split', 'protocol')]
    assert how == ['refcocog', 'test', 'own']
    assert 0 <= metrics['raw']['miou'] <= 100 and 'grounding' not in metrics and 'raw' in said.out


def test_evaluate_says_what_is_missing(tmp_path, capsys):
    preset, root = 'refcocog_umd_b16', str(tmp_path)
    for given, said in [
        (dict(), 'name the folder of a trained model, or --preset'),
        (dict(folder=root, rung='cfe'), '--rung cfe needs --preset'),
        (dict(preset=preset, rung='cfe'), 'refcocog_umd_b16-cfe'),
        (dict(preset=preset, rung='raw', root=root), 'refs')]:
        with pytest.raises(SystemExit): risclip_evaluate(**given)
        error = capsys.readouterr().err
        assert error.startswith('risclip_evaluate: error: ') and said in error
        assert error.count('\n') == 1
