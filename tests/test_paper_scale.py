"The paper's scale without its files: every preset is whole, a dry run says what the architecture truly is, and CLIP alone is scored on files of RefCOCO's format."
import json
from dataclasses import replace
import numpy as np, open_clip, pytest
import risclip.training as training
from risclip.model import RUNGS
from risclip.refer import PUBLISHED_COUNTS, write_refer
from risclip.training import PRESETS, describe_run, settings_of

PAPER = sorted(name for name, p in PRESETS.items() if p.get('pretrained') == 'openai')


def test_presets_of_the_paper():
    assert PAPER == sorted(f'{name}_{by}_{short}' for name, by in PUBLISHED_COUNTS for short in ('b16', 'l14'))
    for preset in PAPER:
        s = settings_of(preset)
        cfg = open_clip.get_model_config(s.clip)
        assert cfg['quick_gelu'] and 'openai' in open_clip.list_pretrained_tags_by_model(s.clip) and s.size % cfg['vision_cfg']['patch_size'] == 0
        objects = PUBLISHED_COUNTS[s.data, s.split_by]['train'][1]
        assert 59.9 < s.stage1_steps*s.batch/objects <= 60 and 9.9 < s.stage2_steps*s.batch2/objects <= 10
        for rung in RUNGS: assert settings_of(preset, rung=rung).rung == rung


@pytest.mark.parametrize('preset, size', [('refcocog_umd_b16', 480), ('refcoco+_unc_l14', 56)])      # the large one on a small picture, for time
def test_dry_run(preset, size):
    s = replace(settings_of(preset), size=size)
    text = describe_run(s)
    lines = {line[:14].strip(): line[14:].strip() for line in text.splitlines()}
    bare = open_clip.create_model(s.clip, pretrained=None)
    number = lambda key: int(lines[key].split()[0].replace(',', ''))
    assert abs(number('frozen') - sum(p.numel() for p in bare.parameters())) < 2e6                   # but for the positions of another grid
    side = size//bare.visual.patch_size[0]
    width, joint = bare.visual.proj.shape
    assert lines['image_tokens'] == str([32, side*side + 1, width]) and lines['joint_image'] == str([32, side*side + 1, joint])
    assert lines['grounding'] == str([32, 1, side, side]) and lines['mask'] == str([32, 1, size, size])
    assert number('stage 2 trains') > 5e5 and (number('stage 1 trains') > 150e6 if width > 768 else number('stage 1 trains') == pytest.approx(20.5e6 + 41.0e6 + 28.4e6, abs=1e5))  # adapters, CFE in each of 12 blocks, six SKE
    assert f'stage 1: {s.stage1_steps:,} steps of 32' in text and 'GiB a step' in text


def test_dry_run_leaves_out_what_the_rung_does_not_have():
    text = describe_run(settings_of('refmojig', rung='raw'))
    assert 'stage 1:' not in text and 'mask' not in text and 'stage 1 trains             0' in text
    text = describe_run(settings_of('refmojig', rung='ske'))
    assert 'stage 1:' in text and 'stage 2:' not in text


def test_dry_run_knows_how_memory_is_saved():
    gib = lambda **k: float(next(line for line in describe_run(settings_of('refmojig', batch=320, **k)).splitlines() if line.startswith('stage 1:')).split(', ')[-1].split()[0])
    assert gib(accumulate=4) < .5*gib() and gib(recompute=True) < .5*gib()


def test_stage_1_is_counted_without_the_decoder():
    line = lambda rung: next(l for l in describe_run(settings_of('refmojig', batch=3200, rung=rung)).splitlines() if l.startswith('stage 1:'))
    assert line('decoder') == line('ske') != line('cfe')


def test_clip_alone_on_files_of_refcocog(tmp_path, monkeypatch, capsys):
    "The command that gives the number to hold against the slides' first, with random weights and pictures: B/16 itself, no training."
    rng = np.random.default_rng(0)
    def example(split):
        mask = np.zeros((40, 60), bool); mask[10:30, 20:50] = True
        return dict(picture=rng.integers(0, 255, (40, 60, 3), np.uint8), split=split, objects=[dict(mask=mask, category='dog', expressions=['the dog', 'a dog on the left'])])
    write_refer(tmp_path, 'refcocog', 'umd', [example(split) for split in ('train', 'train', 'val', 'test', 'test')])
    monkeypatch.setitem(PRESETS, 'refcocog_umd_b16', PRESETS['refcocog_umd_b16'] | dict(pretrained=None, size=64, workers=0))
    with pytest.warns(UserWarning, match='differs from what was published'):
        training.risclip_evaluate(preset='refcocog_umd_b16', rung='raw', root=str(tmp_path), out=str(tmp_path/'out.json'))
    metrics = json.loads((tmp_path/'out.json').read_text())
    assert metrics['expressions'] == 4 and (metrics['data'], metrics['split'], metrics['protocol']) == ('refcocog', 'test', 'own')
    assert 0 <= metrics['raw']['miou'] <= 100 and 'grounding' not in metrics and 'raw' in capsys.readouterr().out


def test_evaluate_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match='name the folder of a trained model, or --preset'): training.risclip_evaluate()
    with pytest.raises(ValueError, match='--rung cfe needs --preset'): training.risclip_evaluate(str(tmp_path), rung='cfe')
    with pytest.raises(FileNotFoundError, match='refcocog_umd_b16-cfe'): training.risclip_evaluate(preset='refcocog_umd_b16', rung='cfe')
    with pytest.raises(FileNotFoundError, match='refs'): training.risclip_evaluate(preset='refcocog_umd_b16', rung='raw', root=str(tmp_path))
