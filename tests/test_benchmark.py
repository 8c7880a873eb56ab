"The benchmark measures what it says: real work beside open_clip's own towers, counted rightly; its files are whole."
import json, math
from dataclasses import replace
import open_clip, pytest, torch
from conftest import ROOT
from risclip.benchmark import WORK, Bench, beside, explorer_seconds, loader_rate, multiply_adds, read_benchmarks, table_of_benchmarks
from risclip.explorer import rung_predictors
from risclip.model import RISCLIP
from risclip.training import settings_of


@pytest.fixture(scope='module')
def bench():
    torch.manual_seed(0)
    return Bench(replace(settings_of('refcocog_umd_b16', size=64), batch=2), 'cpu')      # the real architecture on a small picture


def test_the_floor_is_open_clip_itself(bench):
    bare = open_clip.create_model('ViT-B-16-quickgelu', pretrained=None, force_image_size=64)
    assert type(bench.bare) is type(bare) and bench.bare.state_dict().keys() == bare.state_dict().keys()
    n, d = 17, 768
    image = 12*(12*d*d*n + 2*n*n*d) + 3*16*16*d*16 + d*512
    text = 12*(12*512*512*77 + 2*77*77*512) + 512*512
    assert multiply_adds(bench.floor(1)) == pytest.approx(image + text, rel=.01)
    assert multiply_adds(bench.floor(2)) == pytest.approx(2*(image + text), rel=.01)


def test_parts_cost_what_their_shapes_say(bench):
    "By hand, for B/16 with 17 image tokens and a phrase of 9: adapters, CFE and SKE by their matrices."
    count = {rung: multiply_adds(lambda: RISCLIP(replace(bench.s, rung=rung), bench.clip).eval()(bench.batch.pixels[:1], bench.batch.tokens[:1])) for rung in ('calibrated', 'adapters', 'cfe', 'ske')}
    n, t = 17, int(bench.batch.tokens[0].argmax()) + 1
    assert count['adapters'] - count['calibrated'] == 12*2*2*(n*768*384 + t*512*256)
    cfe = n*768*512 + t*512*512 + 2*(2*n*512*512 + 2*t*512*512) + 2*2*n*t*512 + n*512*768 + t*512*512
    assert count['cfe'] - count['adapters'] == pytest.approx(12*cfe, rel=.01)
    assert count['ske'] > count['cfe']


def test_work_is_real(bench):
    compute, _ = bench.work('inference')
    again, _ = bench.work('next_phrase_last_half')
    assert compute().mask.shape == again().mask.shape == (1, 1, 64, 64)
    for stage in (1, 2):
        step, _ = bench.work(f'stage{stage}_step')
        losses = [step()['loss'] for _ in range(2)]
        assert all(math.isfinite(x) for x in losses) and losses[0] != losses[1]      # the weights have moved
    counts = {name: multiply_adds(bench.work(name)[0]) for name in WORK}
    assert counts['next_phrase_last_half'] < counts['next_phrase'] < counts['inference'] < counts['stage2_step'] < counts['stage1_step']


def test_a_busy_moment_is_no_result():
    "Whatever the clock says of single calls, the middle of the pairs counts."
    clock = iter([1, 2, 1, 2, 1, 50, 1, 2, 30, 2])
    import risclip.benchmark as b
    held, b.seconds = b.seconds, lambda compute, device: next(clock)
    try: found = beside(lambda: None, lambda: None, 5, 'cpu')
    finally: b.seconds = held
    assert found == dict(ratio=2, floor=1, seconds=2)


def test_the_explorer_answers_within_half_a_second():
    "Each rung is asked here; how long it takes is what the benchmark has written, not what this busy moment says."
    asked = explorer_seconds(1)
    assert list(asked) == [*rung_predictors(), 'a new scene'] and all(took > 0 for took in asked.values())
    measured = [one['explorer'] for one in read_benchmarks() if one['settings']['clip'] == 'tinyclip' and one['device']['kind'] == 'cpu']
    assert measured and all(took <= .5 for one in measured for took in one.values())


def test_the_loader_is_measured_without_the_data(tmp_path):
    s = settings_of('refcocog_umd_b16', size=64, root=str(tmp_path/'nothing'))
    rate, of = loader_rate(s, Bench(replace(s, batch=1), 'cpu').clip)
    assert rate > 0 and of.startswith('noise')


def test_committed_files_are_whole():
    files = sorted((ROOT/'data'/'benchmarks').glob('*.json'))
    presets = {'refmojig', 'refcocog_umd_b16', 'refcocog_umd_l14'}
    assert {json.loads(f.read_text())['preset'] for f in files} >= presets
    for file, one in ((f, json.loads(f.read_text())) for f in files):
        assert file.stem == f"{one['device']['slug']}-{one['preset']}"
        assert one['ratios'].keys() >= {*WORK, 'peak_memory', 'loader'} and one['multiply_adds'].keys() == set(WORK)
        for name in WORK:
            row = one['work'][name]
            assert one['ratios'][name] == row['ratio'] and one['multiply_adds'][name] == pytest.approx(row['multiply_adds']/row['floor_multiply_adds'], rel=1e-3)
        s = settings_of(one['preset'])
        for name in ('clip', 'decoder_width'): assert one['settings'][name] == getattr(s, name), f'{file.name} was measured with another {name}: make benchmark'
    assert len(table_of_benchmarks(read_benchmarks(ROOT/'data'/'benchmarks')).splitlines()) == 4 + len(WORK)
