"The ladder: verdicts are what they say; a small climb leaves whole results, once; a row comes out again from the kept weights, by other code."
import json
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from safetensors.torch import load_file
from risclip.grounding import raw_grounding
from risclip.ladder import COLUMNS, SCORED, VERDICTS, climb, gather, ladder, read_csv, staircase, thinned, verdict
from risclip.model import RUNGS, load_risclip
from risclip.refer import Refer
from risclip.refmoji import build_refmoji

FEW = dict(stage1_steps=3, stage2_steps=2, batch=4, batch2=4, save_every=2, ske_layers=1, warmup=1)


# --- verdicts

masks = arrays(bool, (6, 8))

@settings(max_examples=200, deadline=None)
@given(masks, st.integers(0, 3), st.data())
def test_a_verdict_by_its_definition(prediction, n, data):
    "Things that do not overlap, as a picture has them; the verdict again, from sets of pixels."
    owner = data.draw(arrays(np.int64, (6, 8), elements=st.integers(-1, n)))
    owner[0, :n + 1] = range(n + 1)                                        # each has a pixel
    alike = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    found = verdict(prediction, owner == 0, [(owner == i + 1, a) for i, a in enumerate(alike)])
    pixels = lambda m: {tuple(p) for p in np.argwhere(m)}
    p, things = pixels(prediction), [pixels(owner == i) for i in range(n + 1)]
    marked = [i for i, t in enumerate(things) if len(p & t)/len(t) >= .25]
    if len(p & things[0])/len(p | things[0]) >= .5: wanted = 'right'
    elif len(marked) >= 2: wanted = 'two things'
    elif not marked: wanted = 'none'
    elif marked == [0]: wanted = 'poor mask'
    else: wanted = 'lookalike' if alike[marked[0] - 1] else 'other thing'
    assert found == wanted and found in VERDICTS


# --- a small climb

@pytest.fixture(scope='module')
def root(tmp_path_factory): return build_refmoji(tmp_path_factory.mktemp('data'), dict(train=30, val=2, test=8, testA=4, testB=4), workers=1)


@pytest.fixture(scope='module')
def climbed(root, tmp_path_factory):
    "(folder, runs, rows) of all runs with two seeds, one step or two each."
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp('ladder')
    rows = ladder(place/'results', place/'runs', seeds=(0, 5), preset='smoke', workers=1, progress=False, root=str(root), **FEW)
    return place/'results', place/'runs', rows


def test_results(climbed):
    folder, _, rows = climbed
    text = (folder/'results.csv').read_text()
    assert text.splitlines()[0] == 'set,split,kind,rung,seed,miou,oiou,p50,p70,p90'
    assert [dict(r) for r in read_csv(folder/'results.csv')] == rows
    keys = [tuple(r[c] for c in COLUMNS[:5]) for r in rows]
    assert len(set(keys)) == len(keys)
    assert {(k[3], k[4]) for k in keys} == {('raw', 0)} | {(rung, seed) for rung in RUNGS[1:] for seed in (0, 5)}
    assert {(k[0], k[1]) for k in keys} == {(name, split) for name, splits in SCORED.items() for split in splits}
    assert {k[2] for k in keys if k[0] == 'refmojig'} == {'all', 'appearance', 'place', 'relation'} and {k[2] for k in keys if k[0] == 'refmoji+'} == {'all', 'appearance'}
    for r in rows: assert all(0 <= r[c] <= 100 for c in COLUMNS[5:]) and r['p50'] >= r['p70'] >= r['p90']
    steps = staircase(rows)
    assert list(steps) == list(RUNGS) and steps['raw']['spread'] == 0
    for step in steps.values(): assert step['mean'] == pytest.approx(np.mean(list(step['seeds'].values()))) and step['spread'] == pytest.approx(np.ptp(list(step['seeds'].values())))


def test_verdicts_of_the_climb_go_with_its_scores(climbed, root):
    folder, _, rows = climbed
    es = Refer('refmojig', root=root).expressions('test')
    for r in rows:
        if (r['set'], r['kind']) != ('refmojig', 'all'): continue
        told = read_csv(folder/f'{r["rung"]}-{r["seed"]}'/'expressions.csv')
        assert [t['sent_id'] for t in told] == [e.sent_id for e in es] and [t['length'] for t in told] == [e.length for e in es]
        assert 100*np.mean([t['iou'] for t in told]) == pytest.approx(r['miou'], abs=.06)
        assert 100*np.mean([t['verdict'] == 'right' for t in told]) == pytest.approx(r['p50'], abs=1e-3)
        refer = Refer('refmojig', root=root)
        assert [t['alike'] for t in told] == [sum(refer.category(a) == e.category for a in refer.things(e.image_id)) for e in es]
        assert {t['chosen'] for t in told} == {0, 1} and all(t['chosen'] for t in told if t['alike'] == 1)


def test_ske_is_the_first_stage_of_the_decoders_run(climbed):
    folder, runs, _ = climbed
    low, high = (load_file(folder/f'{rung}-5'/'weights.safetensors') for rung in ('ske', 'decoder'))
    assert low.keys() == {k for k in high if not k.startswith('decoder.')} and all(torch.equal(low[k], high[k]) for k in low)
    assert all(v.dtype == torch.float16 for v in low.values() if v.is_floating_point())
    assert load_risclip(folder/'ske-5').settings.rung == 'ske'
    assert [{r['stage'] for r in read_csv(folder/f'{rung}-5'/'curve.csv')} for rung in ('ske', 'decoder')] == [{1}, {1, 2}]
    assert read_csv(folder/'raw-0'/'curve.csv') == []


def test_calibrated_is_the_raw_map_with_two_numbers(climbed):
    model = load_risclip(climbed[0]/'calibrated-0')
    assert set(model.trained_state()) == {'calibration.log_scale', 'calibration.bias'}
    pixels, tokens = torch.randn(2, 3, model.clip.size, model.clip.size), model.clip.tokenize(['the left dog', 'a red cup'])
    with torch.no_grad(): torch.testing.assert_close(model(pixels, tokens).grounding, model.calibration(raw_grounding(model.clip, pixels, tokens)), atol=1e-4, rtol=1e-4)


def test_a_row_again_by_other_code(climbed, root):
    folder, _, rows = climbed
    refer = Refer('refmoji', root=root)
    for rung in ('cfe', 'decoder'):
        model, ious = load_risclip(folder/f'{rung}-0'), []
        threshold = json.loads((folder/f'{rung}-0'/'run.json').read_text())['threshold']
        for e in refer.expressions('testB'):
            picture, truth = refer.picture(e.image_id), refer.mask(e.ann_id)
            x = np.asarray(picture.convert('RGB').resize((model.clip.size,)*2, Image.BICUBIC), np.float32)/255
            x = torch.from_numpy((x - np.float32(model.clip.mean))/np.float32(model.clip.std)).permute(2, 0, 1)[None]
            with torch.no_grad(): out = model(x, model.clip.tokenize([e.text]))
            p = torch.sigmoid(out.grounding if out.mask is None else out.mask)
            found = torch.nn.functional.interpolate(p - threshold, truth.shape, mode='bilinear', align_corners=False)[0, 0].numpy() >= 0
            ious.append((found & truth).sum()/max(1, (found | truth).sum()))
        row, = (r for r in rows if (r['set'], r['split'], r['kind'], r['rung'], r['seed']) == ('refmoji', 'testB', 'all', rung, 0))
        assert 100*np.mean(ious) == pytest.approx(row['miou'], abs=.05)


def test_done_once(climbed, root, capsys):
    folder, runs, rows = climbed
    stamp = lambda: {f: f.stat().st_mtime_ns for f in folder.rglob('*') if f.is_file() and f.name != 'results.csv'}
    before = stamp()
    assert ladder(folder, runs, seeds=(0, 5), preset='smoke', workers=1, progress=False, root=str(root), **FEW) == rows
    assert 'nothing is trained' in capsys.readouterr().out and stamp() == before


def test_another_run_of_the_same_name_is_refused(climbed, root):
    folder, runs, _ = climbed
    with pytest.raises(ValueError, match='cfe-0 is of another run .its settings differ'):
        ladder(folder, runs, seeds=(0,), which=('cfe',), preset='smoke', workers=1, progress=False, root=str(root), **FEW | dict(lr1=1e-3))
    with pytest.raises(ValueError, match='its limit differ'): climb('cfe', 0, folder, runs, 'smoke', limit=3, changes=dict(root=str(root)) | FEW)
    with pytest.raises(ValueError, match='its settings differ'): climb('cfe', 0, folder, runs, 'smoke', changes=dict(root=str(root)) | FEW | dict(lr1=1e-3))


def test_a_run_that_was_cut_short_is_done_again_and_one_that_fails_is_named(climbed, root, tmp_path):
    folder, runs, rows = climbed
    for name in ('ske-5', 'decoder-5'):                                     # killed between the two rungs of a run
        (folder/name/'rows.csv').rename(tmp_path/name)
        assert all(r['rung'] != name[:-2] or r['seed'] != 5 for r in gather(folder))
    assert ladder(folder, runs, seeds=(0, 5), preset='smoke', workers=1, progress=False, root=str(root), **FEW) == rows
    for name in ('ske-5', 'decoder-5'): assert (folder/name/'rows.csv').read_text() == (tmp_path/name).read_text()
    with pytest.raises(RuntimeError, match='the run adapters-0 failed: .*What is finished is kept'):
        ladder(tmp_path/'other', tmp_path/'runs', seeds=(0,), which=('adapters', 'raw'), preset='smoke', workers=1, progress=False, root=str(root), **FEW | dict(lr1=1e9, stage1_steps=9))


def test_thinned():
    history = [dict(stage=s, step=i, loss=float(i), dice=1., focal=2.) for s, n in ((1, 25), (2, 4)) for i in range(n)]
    rows = thinned(history)
    assert [(r['stage'], r['step'], r['loss']) for r in rows] == [(1, 10, 4.5), (1, 20, 14.5), (1, 25, 22.), (2, 4, 1.5)]
