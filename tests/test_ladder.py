"""The ladder: kinds of error are what they say; small runs leave whole results, once; a row comes
out again from the kept weights, by other code; a pool of runs survives what may happen to it."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock, Timeout
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import default_collate

from conftest import ROOT, narrow_clip_folder
from risclip.costs import saved_bytes
from risclip.dataset import ReferDataset
from risclip.grounding import raw_grounding
from risclip.jobs import Job, gather, ladder, run_job
from risclip.results import thinned
from risclip.ladder import (RESULT_COLUMNS, SCORED, load_rungs, maps_at, read_expressions,
                            rung_costs, run_settings, staircase)
from risclip.model import RISCLIP, RUNGS
from risclip.refer import Refer
from risclip.refmoji import build_refmoji
from risclip.scoring import ERROR_TYPES, error_type
from risclip.settings import settings_of

FEW = dict(stage1_steps=3, stage2_steps=2, stage1_batch_size=4, stage2_batch_size=4, save_every=2,
           ske_layers=1, warmup=1, features=(1, 2))
SPLITS = dict(train=30, val=2, test=24, testA=4, testB=4)


# --- kinds of error

@settings(max_examples=200, deadline=None)
@given(arrays(bool, (6, 8)), st.integers(0, 3), st.data())
def test_an_error_type_by_its_definition(prediction, n, data):
    "Things that do not overlap, as a picture has them; the type again, from sets of pixels."
    owner = data.draw(arrays(np.int64, (6, 8), elements=st.integers(-1, n)))
    owner[0, :n + 1] = range(n + 1)                                        # each has a pixel
    alike = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    others = [(owner == i + 1, a) for i, a in enumerate(alike)]
    found = error_type(prediction, owner == 0, others)

    def pixels(mask): return {tuple(p) for p in np.argwhere(mask)}
    p, things = pixels(prediction), [pixels(owner == i) for i in range(n + 1)]
    marked = [i for i, t in enumerate(things) if len(p & t)/len(t) >= .25]
    if len(p & things[0])/len(p | things[0]) >= .5: wanted = 'right'
    elif len(marked) >= 2: wanted = 'two things'
    elif not marked: wanted = 'none'
    elif marked == [0]: wanted = 'poor mask'
    else: wanted = 'lookalike' if alike[marked[0] - 1] else 'other thing'
    assert found == wanted and found in ERROR_TYPES


# --- a small ladder

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return build_refmoji(tmp_path_factory.mktemp('data'), SPLITS, workers=1)


@pytest.fixture(scope='module')
def changes(root, tmp_path_factory):
    "What makes the preset `smoke` still smaller: a narrow CLIP, few steps, few pictures."
    clip = narrow_clip_folder(tmp_path_factory.mktemp('narrow')/'clip')
    return FEW | dict(root=str(root), clip=str(clip))


@pytest.fixture(scope='module')
def climbed(changes, tmp_path_factory):
    "(folder, runs, rows) of all runs with two seeds, one step or two each, in this process."
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp('ladder')
    folder, runs = place/'results', place/'runs'
    rows = ladder(folder, runs, (0, 5), 'smoke', workers=0, progress=False, **changes)
    return folder, runs, rows


def threshold_of(place): return json.loads((place/'run.json').read_text())['threshold']


def test_results(climbed):
    folder, _, rows = climbed
    text = (folder/'results.csv').read_text()
    assert text.splitlines()[0] == 'set,split,kind,rung,seed,miou,oiou,p50,p70,p90'
    pd.testing.assert_frame_equal(pd.read_csv(folder/'results.csv'), rows)
    assert not rows.duplicated(list(RESULT_COLUMNS[:5])).any()
    runs = {('raw', 0)} | {(rung, seed) for rung in RUNGS[1:] for seed in (0, 5)}
    assert set(zip(rows.rung, rows.seed)) == runs
    asked = {(name, split) for name, splits in SCORED.items() for split in splits}
    assert set(zip(rows.set, rows.split)) == asked
    assert set(rows.kind[rows.set == 'refmojig']) == {'all', 'appearance', 'place', 'relation'}
    assert set(rows.kind[rows.set == 'refmoji+']) == {'all', 'appearance'}
    scores = rows[list(RESULT_COLUMNS[5:])]
    assert scores.min(axis=None) >= 0 and scores.max(axis=None) <= 100
    assert (rows.p50 >= rows.p70).all() and (rows.p70 >= rows.p90).all()


def test_the_staircase_by_hand(climbed):
    rows = climbed[2]
    steps = staircase(rows)
    assert list(steps.index) == list(RUNGS) and steps.spread['raw'] == 0
    for rung, step in steps.iterrows():
        own = [r.miou for r in rows.itertuples()
               if (r.set, r.split, r.kind, r.rung) == ('refmojig', 'test', 'all', rung)]
        assert step['seeds'] == len(own) == (1 if rung == 'raw' else 2)
        assert (step['lowest'], step['highest']) == (min(own), max(own))
        assert step['mean'] == pytest.approx(np.mean(own))
        assert step['spread'] == pytest.approx(np.ptp(own))
    assert list(staircase(rows, metric='p50')['mean']) != list(steps['mean'])


def test_the_writers_change_no_digit(climbed, tmp_path):
    "results.csv is the rows of the runs, line by line; a number is written as Python writes it."
    folder, _, rows = climbed
    lines = (folder/'results.csv').read_text().splitlines()[1:]
    own = []
    for rung in RUNGS:
        for seed in (0, 5):
            place = folder/f'{rung}-{seed}'
            if place.exists(): own += (place/'rows.csv').read_text().splitlines()[1:]
    assert lines == own
    again = [','.join(map(str, row)) for row in rows.itertuples(index=False)]
    assert lines == again


def test_error_types_of_the_ladder_go_with_its_scores(climbed, root):
    folder, _, rows = climbed
    refer = Refer('refmojig', root=root)
    es = refer.expressions('test')
    things = [[refer.category(a) for a in refer.things(e.image_id)] for e in es]
    alike = [categories.count(e.category) for e, categories in zip(es, things)]
    for r in rows[(rows.set == 'refmojig') & (rows.kind == 'all')].itertuples():
        found = pd.read_csv(folder/f'{r.rung}-{r.seed}'/'expressions.csv')
        assert list(found.sent_id) == [e.sent_id for e in es]
        assert list(found.length) == [e.length for e in es] and list(found.alike) == alike
        assert 100*found.iou.mean() == pytest.approx(r.miou, abs=.06)
        assert 100*(found.error_type == 'right').mean() == pytest.approx(r.p50, abs=1e-3)
        assert set(found.chosen) == {0, 1} and found.chosen[found.alike == 1].all()


def test_ske_is_the_first_stage_of_the_decoders_run(climbed):
    folder, runs, _ = climbed
    models = load_rungs(folder)
    low, high = (models[rung][0].trained_state() for rung in ('ske', 'decoder'))
    assert low.keys() == {k for k in high if not k.startswith('decoder.')}
    assert all(torch.equal(low[k], high[k]) for k in low)
    stored = load_file(folder/'decoder-0'/'model.safetensors')
    assert all(v.dtype == torch.float16 for v in stored.values() if v.is_floating_point())
    curves = {rung: pd.read_csv(folder/f'{rung}-5'/'curve.csv') for rung in ('ske', 'decoder')}
    stages = {rung: set(curve.stage) for rung, curve in curves.items()}
    assert stages == dict(ske={1}, decoder={1, 2})
    assert (folder/'raw-0'/'curve.csv').read_text() == 'stage,step,loss,dice,focal\n'


def test_weights_are_kept_once(climbed):
    "Those of seed 0; SKE's are the decoder's. The other seeds have their numbers only."
    folder, runs, _ = climbed
    weights = {file.parent.name for file in folder.glob('*/model.safetensors')}
    assert weights == {f'{rung}-0' for rung in RUNGS if rung != 'ske'}
    assert {file.parent.name for file in folder.glob('*/config.json')} == weights
    with pytest.raises(FileNotFoundError, match='calibrated-5 has no model.safetensors'):
        load_rungs(folder, 5)


def test_calibrated_is_the_raw_map_with_two_numbers(climbed):
    model = RISCLIP.from_pretrained(climbed[0]/'calibrated-0')
    clip = model.clip
    assert set(model.trained_state()) == {'calibration.log_scale', 'calibration.bias'}
    tokens = clip.tokenize(['the left dog', 'a red cup'])
    pixels = torch.randn(2, 3, clip.size, clip.size)
    with torch.no_grad(): found = model(pixels, tokens).grounding
    wanted = model.calibration(raw_grounding(clip, pixels, tokens))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_row_again_by_other_code(climbed, root):
    folder, _, rows = climbed
    refer = Refer('refmoji', root=root)
    for rung in ('cfe', 'decoder'):
        model, ious = RISCLIP.from_pretrained(folder/f'{rung}-0'), []
        clip, threshold = model.clip, threshold_of(folder/f'{rung}-0')
        for e in refer.expressions('testB'):
            picture = refer.picture(e.image_id).convert('RGB').resize((clip.size,)*2, Image.BICUBIC)
            x = np.asarray(picture, np.float32)/255
            x = (x - np.float32(clip.mean))/np.float32(clip.std)
            pixels = torch.from_numpy(x).permute(2, 0, 1)[None]
            with torch.no_grad(): out = model(pixels, clip.tokenize([e.text]))
            above = torch.sigmoid(out.grounding if out.mask is None else out.mask) - threshold
            truth = refer.mask(e.ann_id)
            full = torch.nn.functional.interpolate(above, truth.shape, mode='bilinear')
            found = full[0, 0].numpy() >= 0
            ious.append((found & truth).sum()/max(1, (found | truth).sum()))
        asked = 'set == "refmoji" and split == "testB" and kind == "all" and seed == 0'
        row = rows[rows.rung == rung].query(asked)
        assert 100*np.mean(ious) == pytest.approx(row.miou.item(), abs=.05)


def test_done_once(climbed, changes, capsys):
    folder, runs, rows = climbed
    def times():
        files = [f for f in folder.rglob('*') if f.is_file() and f.name != 'results.csv']
        return {f: f.stat().st_mtime_ns for f in files}
    before = times()
    again = ladder(folder, runs, (0, 5), 'smoke', progress=False, **changes)
    pd.testing.assert_frame_equal(again, rows)
    assert 'nothing is trained' in capsys.readouterr().out and times() == before


def test_another_run_of_the_same_name_is_refused(climbed, changes):
    folder, runs, _ = climbed
    faster = changes | dict(stage1_lr=1e-3)
    with pytest.raises(ValueError, match='cfe-0 is of another run .its settings differ'):
        ladder(folder, runs, (0,), 'smoke', ('cfe',), progress=False, **faster)
    with pytest.raises(ValueError, match='its settings differ'):
        run_job(Job(run_settings('cfe', 0, 'smoke', **faster), folder, runs))
    same = run_settings('cfe', 0, 'smoke', **changes)
    with pytest.raises(ValueError, match='its limit differ'):
        run_job(Job(same, folder, runs, limit=3))
    with pytest.raises(ValueError, match='its clip differ'):
        run_job(Job(same, folder, runs, variant='rotated'))
    wider = run_settings('cfe', 0, 'smoke', **changes | dict(decoder_width=8, workers=2))
    assert Job(wider, folder, runs).is_done()                   # what CFE's rung does not have


def test_a_run_that_was_cut_short_is_done_again(climbed, changes, tmp_path):
    folder, runs, rows = climbed
    for name in ('ske-5', 'decoder-5'):                         # killed between the rungs of a run
        (folder/name/'rows.csv').rename(tmp_path/name)
        assert not ((gather(folder).rung == name[:-2]) & (gather(folder).seed == 5)).any()
    again = ladder(folder, runs, (0, 5), 'smoke', workers=0, progress=False, **changes)
    pd.testing.assert_frame_equal(again, rows)
    for name in ('ske-5', 'decoder-5'):
        assert (folder/name/'rows.csv').read_text() == (tmp_path/name).read_text()


def test_thinned():
    rows = []
    for stage, n in (1, 25), (2, 4):
        rows += [dict(stage=stage, step=i, loss=float(i), dice=1., focal=2.) for i in range(n)]
    found = thinned(pd.DataFrame(rows))
    wanted = [(1, 10, 4.5), (1, 20, 14.5), (1, 25, 22.), (2, 4, 1.5)]
    assert list(zip(found.stage, found.step, found.loss)) == wanted


# --- what a rung costs

def test_saved_bytes_counts_what_the_backward_pass_needs():
    "x @ w needs x for w's gradient; exp needs its own result; w itself is there anyway."
    layer = torch.nn.Linear(30, 50, bias=False)
    x = torch.randn(7, 30)
    assert saved_bytes(layer, lambda: layer(x)) == x.nbytes
    assert saved_bytes(layer, lambda: layer(x).exp()) == x.nbytes + 7*50*4
    assert saved_bytes(layer, lambda: (layer(x), layer(x))) == x.nbytes     # the same memory twice
    x.requires_grad_()
    assert saved_bytes(layer.requires_grad_(False), lambda: layer(x)) == 0
    assert saved_bytes(layer, lambda: x @ layer.weight.T) == 0


def test_costs_of_the_rungs(climbed, root):
    models = load_rungs(climbed[0])
    assert list(models) == list(RUNGS) and len({id(m.clip) for m, _ in models.values()}) == 1
    assert [m.settings.rung for m, _ in models.values()] == list(RUNGS)
    assert {r: t for r, (_, t) in models.items()} == {
        r: threshold_of(climbed[0]/f'{r}-0') for r in RUNGS}

    def parameters(model):
        return {name: v.clone() for name, v in model.trained_state().items()
                if 'running' not in name and 'tracked' not in name}
    before = {rung: parameters(model) for rung, (model, _) in models.items()}
    s, refer = settings_of('smoke', root=str(root), **FEW), Refer('refmojig', root=root)
    dataset = ReferDataset(refer, 'train', models['raw'][0].clip, train=True)
    batch = default_collate([dataset[i] for i in range(4)])
    costs = rung_costs(models, s, batch, repeats=1)

    numbers = [sum(v.numel() for v in before[rung].values()) for rung in RUNGS]
    assert list(costs.index) == list(RUNGS) and list(costs.parameters) == [0, 2] + numbers[2:]
    assert list(costs.parameters) == sorted(costs.parameters)
    raw, calibrated, adapters, cfe, ske, decoder = costs.memory
    assert raw == 0 < calibrated < adapters < cfe < ske
    assert 0 < decoder < ske                             # its stage keeps nothing of the towers
    assert (costs.forward > 0).all() and (costs.step.drop('raw') > 0).all()
    for rung, (model, _) in models.items():
        after = model.trained_state()
        assert all(torch.equal(v, after[name]) for name, v in before[rung].items())
        assert not any(p.grad is not None or p.requires_grad for p in model.parameters())


def test_load_rungs_names_what_is_missing(climbed, tmp_path):
    with pytest.raises(FileNotFoundError, match='calibrated-7'): load_rungs(climbed[0], 7)
    with pytest.raises(FileNotFoundError, match='raw-0'): load_rungs(tmp_path)


def test_maps_at_are_those_that_were_scored(climbed, root):
    folder, models = climbed[0], load_rungs(climbed[0])
    dataset = ReferDataset(Refer('refmojig', root=root), 'test', models['raw'][0].clip)
    expressions = read_expressions(folder)
    runs = list(expressions[['rung', 'seed']].drop_duplicates().itertuples(index=False, name=None))
    assert runs == [('raw', 0)] + [(rung, seed) for rung in RUNGS[1:] for seed in (0, 5)]
    first = expressions[expressions.seed == 0]
    for row in (0, 7):
        shape = dataset.refer.mask(dataset.expressions[row].ann_id).shape
        for rung, (scores, prediction, iou) in maps_at(models, dataset, row).items():
            wanted = first[first.rung == rung].iou.iloc[row]
            assert iou == pytest.approx(wanted, abs=2e-3) and prediction.shape == shape


# --- many runs

def test_a_run_that_fails_is_named_and_what_is_finished_stays(changes, tmp_path):
    "In this process, and in processes of their own, where the other run comes to its end."
    folder, runs, names = tmp_path/'results', tmp_path/'runs', ('adapters', 'raw')
    fails = changes | dict(stage1_lr=1e9, stage1_steps=9)
    why = 'the run adapters-0 failed: .* at step .*What is finished is kept'
    with pytest.raises(RuntimeError, match=why):
        ladder(folder, runs, (0,), 'smoke', names, workers=0, progress=False, **fails)
    assert not folder.exists()
    with pytest.raises(RuntimeError, match=why):
        ladder(folder, runs, (0,), 'smoke', names, workers=2, progress=False, **fails)
    assert {file.parent.name for file in folder.glob('*/rows.csv')} == {'raw-0'}
    assert list(pd.read_csv(folder/'results.csv').rung.unique()) == ['raw']
    assert 'Traceback' in (runs/'adapters-0.log').read_text()


def test_workers_end_with_the_process_that_started_them(changes, tmp_path):
    """After kill -9 of the ladder no worker is left that holds a run's folder; the next try goes on
    where it was."""
    places, steps = (str(tmp_path/'results'), str(tmp_path/'runs')), dict(stage1_steps=100_000)
    options = dict(seeds=(0,), preset='smoke', which=('adapters',), workers=1) | changes | steps
    code = f'from risclip.jobs import ladder\nladder(*{places!r}, **{options!r})\n'
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    process = subprocess.Popen([sys.executable, '-c', code], env=env, stderr=subprocess.PIPE)
    run = tmp_path/'runs'/'adapters-0'
    history = run/'history.csv'

    def until(true, seconds):
        for _ in range(seconds*5):
            if true(): return True
            time.sleep(.2)
        return False

    def free():
        try: FileLock(run/'.lock').acquire(timeout=0).lock.release()
        except Timeout: return False
        return True
    assert until(lambda: history.exists() and history.read_text().count('\n') > 4, 120)
    assert not free()
    process.send_signal(signal.SIGKILL)
    shown = process.stderr.read().decode()
    process.wait()
    assert f'1 runs -> {tmp_path/"results"}' in shown           # one bar, which says where it goes
    assert until(free, 30)
    size = history.stat().st_size
    time.sleep(1)
    assert history.stat().st_size == size and list((run/'checkpoints').glob('stage1-*'))
