"The ladder: verdicts are what they say; a small climb leaves whole results, once; a row comes out again from the kept weights, by other code."
import json, os, re, shutil, signal, subprocess, sys, time
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from filelock import FileLock, Timeout
from PIL import Image
from safetensors.torch import load_file
from conftest import ROOT
from risclip.clip import load_clip
from risclip.grounding import raw_grounding
from risclip.ladder import CHOICES, COLUMNS, LOST, SCORED, VERDICTS, Job, beyond_folder, carry_over, climb, gather, ladder, load_rungs, maps_at, pair_groups, read_csv, rung_costs, staircase, studies, study_jobs, thinned, told_of, towers_of, verdict
from risclip.model import RUNGS, load_risclip
from risclip.refer import Refer
from risclip.refmoji import COLOURS as TINTS, NOUNS, build_refmoji
from risclip.training import dataset_of, saved_bytes, settings_of

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
def root(tmp_path_factory): return build_refmoji(tmp_path_factory.mktemp('data'), dict(train=30, val=2, test=24, testA=4, testB=4), workers=1)


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
    with pytest.raises(ValueError, match='its limit differ'): climb(Job('cfe', 0, folder, runs, 'smoke', dict(root=str(root)) | FEW, limit=3))
    with pytest.raises(ValueError, match='its settings differ'): climb(Job('cfe', 0, folder, runs, 'smoke', dict(root=str(root)) | FEW | dict(lr1=1e-3)))


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


# --- what a rung costs

def test_saved_bytes_counts_what_the_backward_pass_needs():
    "x @ w needs x for w's gradient; exp needs its own result; w itself is there anyway, also as a view."
    layer = torch.nn.Linear(30, 50, bias=False)
    x = torch.randn(7, 30)
    assert saved_bytes(layer, lambda: layer(x)) == x.nbytes
    assert saved_bytes(layer, lambda: layer(x).exp()) == x.nbytes + 7*50*4
    assert saved_bytes(layer, lambda: (layer(x), layer(x))) == x.nbytes                # the same memory twice
    x.requires_grad_()
    assert saved_bytes(layer.requires_grad_(False), lambda: layer(x)) == 0
    assert saved_bytes(layer, lambda: x @ layer.weight.T) == 0


def test_costs_of_the_rungs(climbed, root):
    models = load_rungs(climbed[0], 5)
    assert list(models) == list(RUNGS) and all(models[r][0].settings.rung == r for r in RUNGS) and len({id(m.clip) for m, _ in models.values()}) == 1
    s = settings_of('smoke', root=str(root), **FEW)
    dataset = dataset_of(s, Refer('refmojig', root=root), 'train', models['raw'][0].clip, train=True)
    batch = torch.utils.data.default_collate([dataset[i] for i in range(4)])
    before = {r: {n: v.clone() for n, v in m.trained_state().items() if 'running' not in n and 'tracked' not in n} for r, (m, _) in models.items()}
    costs = rung_costs(models, s, batch, repeats=1)
    learnt = [costs[r]['learnt'] for r in RUNGS]
    assert learnt == [0, 2] + [sum(v.numel() for v in before[r].values()) for r in RUNGS[2:]] and learnt == sorted(learnt)
    memory = [costs[r]['memory'] for r in RUNGS]
    assert memory[0] == 0 < memory[1] < memory[2] < memory[3] < memory[4] > memory[5] > 0            # the decoder's stage keeps nothing of the towers
    assert all(c['forward'] > 0 and (c['step'] > 0 or r == 'raw') for r, c in costs.items())
    for r, (m, _) in models.items(): assert all(torch.equal(v, m.trained_state()[n]) for n, v in before[r].items()) and not any(p.grad is not None or p.requires_grad for p in m.parameters())


def test_load_rungs_names_what_is_missing(climbed, tmp_path):
    with pytest.raises(FileNotFoundError, match='calibrated-7'): load_rungs(climbed[0], 7)


def test_maps_at_are_those_that_were_scored(climbed, root):
    folder, models = climbed[0], load_rungs(climbed[0], 0)
    s = settings_of('smoke', root=str(root), **FEW)
    dataset = dataset_of(s, Refer('refmojig', root=root), 'test', models['raw'][0].clip)
    told = told_of(folder)
    assert list(told) == [('raw', 0)] + [(r, seed) for r in RUNGS[1:] for seed in (0, 5)]
    for row in (0, 7):
        for rung, (scores, prediction, iou) in maps_at(models, dataset, row).items():
            assert iou == pytest.approx(told[rung, 0][row]['iou'], abs=2e-3) and prediction.shape == dataset.refer.mask(dataset.expressions[row].ann_id).shape


# --- studies

def test_towers_of():
    clip = load_clip('tinyclip')
    with pytest.raises(ValueError, match="towers='shaken': one of aligned, rotated, random"): towers_of(clip, 'shaken')
    assert towers_of(clip, 'aligned') is clip
    for how in ('rotated', 'random'):
        a, b, c = towers_of(clip, how), towers_of(clip, how), towers_of(clip, how, seed=1)
        same = lambda x, y: [n for n, v in x.state_dict().items() if not torch.equal(v, y.state_dict()[n])]
        assert same(a, b) == [] and 'image.proj' in same(a, c) and a.name == f'tinyclip, {how}' and a.sha256 is None
        assert not any(p.requires_grad for p in a.parameters()) and a.grid == clip.grid and a.tokenize('a dog').tolist() == clip.tokenize('a dog').tolist()
        if how == 'rotated':
            assert same(a, clip) == ['image.proj']
            torch.testing.assert_close(a.image.proj @ a.image.proj.T, clip.image.proj @ clip.image.proj.T, atol=1e-4, rtol=1e-4)
        else: assert {'.'.join(n.split('.')[:2]) for n in same(a, clip)} >= {'image.conv1', 'image.blocks', 'image.proj', 'text.blocks', 'text.proj'}


def test_studies(climbed, root, tmp_path):
    folder, runs, rows = climbed
    changes = dict(root=str(root)) | FEW
    found = studies(tmp_path, tmp_path/'runs', preset='smoke', workers=1, progress=False, which=('ladder', 'scale and bias', 'stages', 'alignment'), **changes)
    assert [(r['study'], r['value'], r['rung']) for r in found if r['kind'] == 'all'] == [
        ('ladder', 'short', 'ske'), ('ladder', 'short', 'decoder'), ('scale and bias', 'fixed', 'ske'), ('stages', 'one', 'ske'), ('stages', 'one', 'decoder'),
        *(('alignment', how, rung) for how in ('rotated', 'random') for rung in ('ske', 'cfe', 'adapters', 'raw'))]
    assert {(r['set'], r['split'], r['seed']) for r in found} == {('refmojig', 'test', 0)}
    assert read_csv(tmp_path/'studies.csv') == found and not list(tmp_path.glob('studies/**/weights.safetensors')) and not list(tmp_path.glob('studies/**/expressions.csv'))
    told = lambda place: json.loads((tmp_path/'studies'/place/'run.json').read_text())
    assert told('scale-and-bias/fixed/ske-0')['settings']['learn_scale'] is False and told('alignment/random/cfe-0')['clip'] == dict(name='tinyclip, random', pretrained=None, sha256=None)
    one = told('stages/one/decoder-0')['settings']
    short = told('ladder/short/decoder-0')['settings']
    steps = ('stage1_steps', 'stage2_steps')
    assert [short[name] for name in steps] == [round(.6*FEW[name]) for name in steps]
    assert (one['stages'], one['stage1_steps']) == (1, sum(short[name] for name in steps))
    curves = [r['step'] for r in read_csv(tmp_path/'studies'/'stages/one/decoder-0'/'curve.csv')]
    assert curves == [one['stage1_steps']]
    raw = lambda rows: next(r['miou'] for r in rows if (r['rung'], r['kind'], r['set']) == ('raw', 'all', 'refmojig'))
    assert all(raw([r for r in found if r['value'] == how]) != raw(rows) for how in ('rotated', 'random'))


def test_each_study_changes_what_it_names():
    from dataclasses import asdict
    from pathlib import Path
    base = asdict(Job('decoder', 0, Path('a'), Path('b')).settings)
    jobs = study_jobs(Path('a'), Path('b'))
    assert {study for study, _ in jobs} == {*CHOICES, 'alignment', 'alignment of values', 'ladder'} and len({(j.folder, j.run) for found in jobs.values() for j in found}) == sum(map(len, jobs.values()))
    changed = {key: {k: v for k, v in asdict(found[0].settings).items() if v != base[k] and k != 'rung'} for key, found in jobs.items()}
    assert all(changed[key] == {} for key in changed if key[0] == 'alignment')         # as long as the ladder's
    short = changed.pop(('ladder', 'short'))
    assert short == {name: .6*base[name] for name in ('stage1_steps', 'stage2_steps')}
    assert changed['stages', 'one'] == dict(stages=1, stage1_steps=sum(short.values()))
    changed = {key: {k: v for k, v in of.items() if key[0] == 'stages' or short.get(k) != v} for key, of in changed.items()}
    assert changed == {('value path', 'last block'): dict(values='last'), ('value path', 'every block'): dict(values='every'), ('CFE', 'last half'): dict(cfe_layers='last half'),
        ('label', 'any overlap'): dict(label='any'), ('scale and bias', 'fixed'): dict(learn_scale=False), ('loss', 'Dice alone'): dict(focal_weight=0.), ('loss', 'focal alone'): dict(dice_weight=0.),
        ('v1 to v4', 'spread'): dict(features=(1, 2, 4, 5)), ('stages', 'one'): dict(stages=1, stage1_steps=sum(short.values())),
        ('alignment', 'rotated'): {}, ('alignment', 'random'): {}, ('alignment of values', 'aligned'): dict(values='raw'), ('alignment of values', 'rotated'): dict(values='raw')}
    assert all(j.towers == value for (study, value), found in jobs.items() for j in found if study.startswith('alignment'))


# --- what training never showed

def test_beyond_what_training_shows(root, tmp_path):
    "Chains of one, two and three relations for the same things; crowds of seven and more. Told by the words and the masks in the files."
    for what in ('chains', 'crowds'): beyond_folder(tmp_path, what, pictures=8)
    files = lambda: {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file() and not f.match('refs(*).json')}     # those are kept by the reader
    before = files()
    refer = Refer('chains', 'umd', root=tmp_path)
    words = ('left of', 'right of', 'left side of', 'right side of', 'above', 'over', 'below', 'under', 'next to', 'beside', 'close to')
    es = refer.expressions('test')
    for e in es: assert sum(f' {w} ' in f' {part} ' for part in [e.text] for w in words) >= 1
    count = lambda text: sum(f' {text} '.count(f' {w} ') for w in words)
    assert all(count(e.text) == int(e.kind[0]) for e in es) and {e.kind[0] for e in es} == {'1', '2', '3'}
    for ann in {e.ann_id for e in es}: assert {e.kind[0] for e in es if e.ann_id == ann} == {'1', '2', '3'}
    crowds = Refer('crowds', 'umd', root=tmp_path)
    for e in crowds.expressions('test'): assert (len(crowds.things(e.image_id)) >= 7) == (e.kind == '7 and more things')
    assert {e.kind for e in crowds.expressions('test')} == {'7 and more things', '2 to 6 things'}
    for what in ('chains', 'crowds'): beyond_folder(tmp_path, what, pictures=8)                # it is there
    assert before == files()


def test_carry_over(climbed, root, tmp_path):
    folder, runs, _ = climbed
    copy = shutil.copytree(folder, tmp_path/'results')
    rows = carry_over(copy, tmp_path/'runs', preset='smoke', pictures=6, workers=1, progress=False, root=str(root), **FEW)
    assert read_csv(copy/'carry_over.csv') == rows
    assert {(r['part'], r['kind']) for r in rows} == {*(('chains', f'{n} in a chain') for n in (1, 2, 3)), ('crowds', '7 and more things'), ('crowds', '2 to 6 things'), ('pairs', 'lost pair'), ('pairs', 'other colour')}
    assert {(r['model'], r['rung']) for r in rows if r['part'] == 'pairs'} == {(m, r) for m in ('ladder', 'without') for r in ('ske', 'decoder')}
    assert {r['rung'] for r in rows if r['part'] == 'chains'} == set(RUNGS)
    whole, less = Refer('refmojig', root=root), Refer('refmojig', root=tmp_path/'runs'/'without')
    images = lambda refer, split: {e.image_id for e in refer.expressions(split)}
    assert images(whole, 'test') == images(less, 'test') and images(less, 'train') < images(whole, 'train')
    # again by the words: no phrase of the train split that is left names a lost pair, of its referent or of another thing; phrases that went did
    pairs = [f'{colour} {noun}' for name, colour in LOST.items() for noun in NOUNS[name]]
    names_one = lambda refer: sum(f' {pair} ' in f' {e.text} ' for e in refer.expressions('train') for pair in pairs)
    assert names_one(less) == 0 < names_one(whole)
    told = read_csv(copy/'decoder-0'/'expressions.csv')
    groups = pair_groups(whole)
    for kind in ('lost pair', 'other colour'):
        row, = (r for r in rows if (r['part'], r['kind'], r['model'], r['rung']) == ('pairs', kind, 'ladder', 'decoder'))
        mine = [t['iou'] for t in told if groups.get(t['sent_id']) == kind]
        assert row['n'] == len(mine) > 0 and row['miou'] == pytest.approx(100*np.mean(mine), abs=1e-3)
    says = lambda e, colour: re.match(rf'(the |an? )?((large|big|small|little) )?{colour} ({"|".join(NOUNS[e.category])})', e.text)
    said = {e.sent_id: colour == LOST[e.category] for e in whole.expressions('test') for colour in TINTS if says(e, colour)}
    assert said and {s: groups[s] == 'lost pair' for s in said} == said


def test_workers_end_with_the_process_that_started_them(root, tmp_path):
    "After kill -9 of the ladder no worker is left that holds a run's folder; the next try goes on where it was."
    code = ("from risclip.ladder import ladder\n"
            f"if __name__ == '__main__': ladder({str(tmp_path/'results')!r}, {str(tmp_path/'runs')!r}, seeds=(0,), which=('adapters',), preset='smoke', workers=1, progress=False, root={str(root)!r}, stage1_steps=100_000, batch=2)\n")
    (tmp_path/'climb.py').write_text(code)
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    process, history = subprocess.Popen([sys.executable, tmp_path/'climb.py'], env=env), tmp_path/'runs'/'adapters-0'/'history.csv'
    until = lambda true, seconds=120: next((True for _ in range(seconds*5) if true() or time.sleep(.2)), False)
    assert until(lambda: history.exists() and history.read_text().count('\n') > 4)
    process.send_signal(signal.SIGKILL); process.wait()
    def free():
        try: FileLock(tmp_path/'runs'/'adapters-0'/'.lock').acquire(timeout=0).lock.release(); return True
        except Timeout: return False
    assert until(free, 30)
    size = history.stat().st_size
    time.sleep(1)
    assert history.stat().st_size == size
