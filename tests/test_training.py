"""Training: killed at any moment it comes to the same end; troubles are named, and found early
where they can be; and it learns. Real processes are killed with SIGKILL, over the CLIP that comes
with risclip; most of the rest is over a narrow one."""
import csv, errno, json, math, os, shutil, signal, subprocess, sys
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path

import nbformat, numpy as np, pytest, torch
from accelerate import PartialState
from safetensors.torch import load_file

import risclip.runs as runs
import risclip.training as training
from conftest import ROOT
from risclip.clip import load_clip
from risclip.costs import saved_bytes
from risclip.dataset import ReferDataset
from risclip.evaluation import evaluate_model, refer_of, spread_expressions, table
from risclip.model import RISCLIP
from risclip.runs import Run, read_history
from risclip.settings import Settings, settings_of
from risclip.training import Objective, batches, cosine_rate, risclip_train, train
from training_runs import (ENV, data_root, finished, finished_tinyclip, kill,   # noqa: F401
                           losses_of, names, narrow, short, smoke, train_command, two_processes,
                           two_stages, wait_for, whole_run)

WEIGHTS = 'model/model.safetensors'


@pytest.fixture(scope='module')
def clip(narrow): return load_clip(narrow.clip)


@pytest.fixture(scope='module')
def whole(two_stages, tmp_path_factory):
    "(folder, metrics) of the very short run."
    return whole_run('two stages', two_stages, tmp_path_factory)


def assert_same_end(folder, whole):
    "Metrics, history and weights, to the last bit."
    for name in ('metrics.json', 'history.csv', WEIGHTS):
        assert (folder/name).read_bytes() == (whole/name).read_bytes(), name


# --- killed

def test_killed_in_both_stages_and_while_saving(finished_tinyclip, smoke, tmp_path):
    whole, metrics = finished_tinyclip
    folder = tmp_path/'killed'

    process = train_command(smoke, folder)                               # killed in stage 1
    wait_for(process, folder, 1, 3)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(RuntimeError, match='in use by another process'):
        train(smoke, folder, progress=False)
    kill(process)
    last = read_history(folder/'history.csv')[-1]
    assert last['stage'] == 1 and last['step'] < 11

    process = train_command(smoke, folder, dies='while it saves')        # in the middle of a file
    assert process.wait(300) == -signal.SIGKILL, process.stdout.read()[-2000:]
    assert names(folder)[0] == 'part' and len(names(folder)) > 1
    for checkpoint in names(folder)[1:]:
        weights = load_file(folder/'checkpoints'/checkpoint/'weights.safetensors')
        assert all(v.isfinite().all() for v in weights.values())

    process = train_command(smoke, folder)                               # killed in stage 2
    wait_for(process, folder, 2, 2)
    kill(process)
    assert not (folder/'metrics.json').exists()
    assert read_history(folder/'history.csv')[-1]['stage'] == 2

    process = train_command(smoke, folder)                               # and on to the end
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-2000:]
    assert table(metrics) in said and str(folder) in said
    assert_same_end(folder, whole)


class Killed(BaseException):
    "What a process does not survive, played in this one: no `except Exception` sees it."


FULL = OSError(errno.ENOSPC, 'No space left on device')
AT = {'between the stages': (Run, 'start_history', 1),
      'weights of stage 2': (runs, 'save_file', 3),
      'optimiser of stage 2': (torch, 'save', 3),
      'old checkpoints go': (runs.shutil, 'rmtree', 5),
      'a checkpoint gets its name': (Path, 'rename', 3),
      'while scoring': (training, 'evaluate_model', 0),
      'the finished model': (RISCLIP, 'save_pretrained', 0),
      'metrics.json': (training, 'write_json', 0),
      'a line of the history': (Run, 'log', 5)}
ENDS = [(place, Killed()) for place in AT]
ENDS += [(place, FULL) for place in ('weights of stage 2', 'metrics.json', 'a line of the history')]


@pytest.mark.parametrize('place, error', ENDS, ids=lambda value: str(value) or 'killed')
def test_whatever_happens_the_same_command_comes_to_the_same_end(two_stages, whole, tmp_path,
                                                                 monkeypatch, place, error):
    owner, name, nth = AT[place]
    function, calls = getattr(owner, name), iter(range(10**6))
    def dies(*a, **k):
        if next(calls) == nth: raise error
        return function(*a, **k)
    monkeypatch.setattr(owner, name, dies)
    with pytest.raises((Killed, OSError)): train(two_stages, tmp_path/'run', progress=False)
    monkeypatch.undo()
    assert train(two_stages, tmp_path/'run', progress=False) == whole[1]
    assert_same_end(tmp_path/'run', whole[0])


def test_a_disk_that_fills_during_a_save_loses_nothing(smoke, tmp_path, monkeypatch):
    "Over the CLIP that comes with risclip."
    s = replace(smoke, rung='adapters', stage1_steps=4, save_every=1, test_limit=4)
    metrics = train(s, tmp_path/'whole', progress=False)
    save, calls = torch.save, iter(range(99))
    def fills(what, file, *a, **k):
        save(what, file, *a, **k)
        if next(calls) < 2: return
        file.write_bytes(file.read_bytes()[:100])
        raise FULL
    monkeypatch.setattr(torch, 'save', fills)
    message = 'stage1-0000003 could not be written .* make room, and repeat'
    with pytest.raises(OSError, match=message) as e: train(s, tmp_path/'full', progress=False)
    assert e.value.errno == errno.ENOSPC
    assert names(tmp_path/'full') == ['stage1-0000001', 'stage1-0000002']
    monkeypatch.undo()
    assert train(s, tmp_path/'full', progress=False) == metrics
    assert_same_end(tmp_path/'full', tmp_path/'whole')


# --- finished

def stamps(folder):
    files = [f for f in folder.rglob('*') if f.is_file() and f.name != '.lock']
    return {f: f.stat().st_mtime_ns for f in files}


def test_a_finished_run_is_only_reported(finished, narrow, capsys):
    folder, metrics = finished
    before = stamps(folder)
    assert train(narrow, folder, progress=False) == metrics
    assert 'is finished' in capsys.readouterr().out
    changes = dict(keep=5, workers=1, save_every=3, eval_batch_size=3, recompute=True)
    assert train(replace(narrow, **changes), folder) == metrics          # they change nothing
    with pytest.raises(ValueError, match='config.json says seed=0, now it is 1'):
        train(replace(narrow, seed=1), folder)
    assert before == stamps(folder)


def test_what_a_run_writes(finished, narrow):
    folder, metrics = finished
    rows = list(csv.DictReader(open(folder/'history.csv')))
    steps = [(int(r['stage']), int(r['step'])) for r in rows]
    assert steps == [(1, i) for i in range(12)] + [(2, i) for i in range(8)]
    for name in ('raw', 'grounding', 'mask'):
        assert set(metrics[name]) == {'miou', 'oiou', 'p50', 'p60', 'p70', 'p80', 'p90'}
        assert all(0 <= v <= 100 for v in metrics[name].values())
    assert metrics == json.loads((folder/'metrics.json').read_text())
    config = json.loads((folder/'config.json').read_text())
    assert Settings(**config['settings']) == narrow and config['versions']['torch']
    refer = refer_of(narrow)
    assert config['data_version'] == refer.info['version'] and len(config['clip']['sha256']) == 64
    assert RISCLIP.from_pretrained(folder).trained_on == json.loads(json.dumps(refer.info))
    assert names(folder) == ['stage2-0000006', 'stage2-0000008']
    assert table(metrics).count('\n') == 3


def test_tensorboard_has_every_step_once(two_stages, tmp_path, monkeypatch):
    "Also where a run was killed behind its last checkpoint, and went on."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log, calls = Run.log, iter(range(99))
    def dies(run, row):
        log(run, row)
        if next(calls) == 2: raise Killed
    monkeypatch.setattr(Run, 'log', dies)
    with pytest.raises(Killed): train(two_stages, tmp_path/'run', progress=False)
    monkeypatch.undo()
    train(two_stages, tmp_path/'run', progress=False)
    events = EventAccumulator(str(tmp_path/'run'/'tensorboard')).Reload()
    rows = read_history(tmp_path/'run'/'history.csv')
    for stage, first in (1, 0), (2, two_stages.stage1_steps):
        of_stage = [r for r in rows if r['stage'] == stage]
        for name in ('loss', 'dice', 'focal', 'lr'):
            found = events.Scalars(f'stage{stage}/{name}')
            assert [e.step for e in found] == [first + r['step'] for r in of_stage]
            np.testing.assert_allclose([e.value for e in found], [r[name] for r in of_stage],
                                       rtol=1e-6)


# --- troubles

def test_found_before_training(narrow, tmp_path, monkeypatch):
    def fit(*_): raise AssertionError('it began to train')
    monkeypatch.setattr(training, 'fit', fit)
    (tmp_path/'file').write_text('')
    wrong = [('file/run cannot be written', narrow, 'file/run'),
             ("no split 'testA'", replace(narrow, test='testA'), 'a'),
             ('neither a folder nor an architecture', replace(narrow, clip='tinyklip'), 'b'),
             ('must be a multiple of 3', replace(narrow, accumulate=3), 'c'),
             ('make data', replace(narrow, root=str(tmp_path)), 'd')]
    for message, s, folder in wrong:
        with pytest.raises((ValueError, OSError), match=message): train(s, tmp_path/folder)
        assert not (tmp_path/folder).exists()
    usage = namedtuple('usage', 'total used free')(2**40, 2**40, 2**20)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
    with pytest.raises(OSError, match='make room') as e: train(narrow, tmp_path/'e')
    assert e.value.errno == errno.ENOSPC


@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_what_is_not_finite_stops_the_run(short, tmp_path, monkeypatch, what):
    call, calls = Objective.__call__, iter(range(99))
    def spoilt(self, *args):
        losses = call(self, *args)
        if next(calls) == 2:
            if what == 'loss': losses = {name: v*math.nan for name, v in losses.items()}
            else: losses['loss'].register_hook(lambda g: g*math.inf)
        return losses
    monkeypatch.setattr(Objective, '__call__', spoilt)
    message = f'{what} is (nan|inf) at step 2 of stage 1.*stage1-0000002'
    with pytest.raises(FloatingPointError, match=message):
        train(short, tmp_path/'run', progress=False)
    assert names(tmp_path/'run') == ['stage1-0000001', 'stage1-0000002']
    weights = load_file(tmp_path/'run'/'checkpoints'/'stage1-0000002'/'weights.safetensors')
    assert all(value.isfinite().all() for value in weights.values())
    assert [r['step'] for r in read_history(tmp_path/'run'/'history.csv')] == [0, 1]
    monkeypatch.undo()
    train(short, tmp_path/'run', progress=False)   # the lock was given back; what is there is good


def test_what_is_not_finite_in_stage_2(two_stages, tmp_path, monkeypatch):
    call = Objective.__call__
    def spoilt(self, *args):
        factor = math.nan if self.stage == 2 else 1
        return {name: v*factor for name, v in call(self, *args).items()}
    monkeypatch.setattr(Objective, '__call__', spoilt)
    message = 'loss is nan at step 0 of stage 2.*stage1-0000004. A lower stage2_lr'
    with pytest.raises(FloatingPointError, match=message):
        train(two_stages, tmp_path/'run', progress=False)


# --- functions of the seed

def test_batches_are_a_function_of_seed_stage_and_step(narrow, clip):
    refer = refer_of(narrow)
    objects = ReferDataset(refer, 'train', clip, train=True,
                           expressions=refer.expressions('train')[:120])
    size = 4
    each = len(objects)//size
    steps = 2*each + 3
    def given(start, stage=1, **changes):
        "What each step gets."
        stream = batches(objects, size, stage, start, steps, **changes)
        return [(b.index.tolist(), b.tokens.tolist(), b.pixels.sum().item()) for b, in stream]
    whole = given(0)
    assert len(whole) == steps and each > 4
    for start in (1, each - 1, each, each + 1, steps - 1):
        assert given(start) == whole[start:], start
    assert given(steps) == []
    assert given(0, stage=2) != whole and given(0, seed=1) != whole
    for epoch in range(2):
        rows = sum((index for index, *_ in whole[epoch*each:(epoch + 1)*each]), [])
        assert len(set(rows)) == len(rows) == each*size
    spoken = [dict(zip(sum((index for index, *_ in epoch), []), sum((t for _, t, _ in epoch), [])))
              for epoch in (whole[:each], whole[each:2*each])]
    assert any(spoken[0][row] != spoken[1][row] for row in spoken[0].keys() & spoken[1].keys())
    assert given(3, workers=2)[:3] == whole[3:6]                         # whoever loads it
    for accumulate, world_size in (1, 2), (2, 1), (2, 2):                # and whoever trains on it
        shards = [batches(objects, size, 1, 3, steps, accumulate=accumulate, rank=rank,
                          world_size=world_size) for rank in range(world_size)]
        for (index, tokens, _), *parts in zip(whole[3:], *shards, strict=True):
            assert all(len(own) == accumulate for own in parts)
            of_all = [part for own in parts for part in own]
            assert {len(part.index) for part in of_all} == {size//accumulate//world_size}
            rows = [(i, t) for part in of_all for i, t in zip(part.index.tolist(),
                                                              part.tokens.tolist())]
            assert sorted(rows) == sorted(zip(index, tokens))
    few = ReferDataset(refer, 'train', clip, train=True, expressions=objects.expressions[:6])
    for rank in (0, 1):                                                  # fewer than a batch: all
        own, = next(batches(few, 8, 1, 0, 2, rank=rank, world_size=2))
        assert len(own.index) == 3


def test_a_batch_asks_nobody_for_its_process(narrow, clip, monkeypatch):
    """Accelerate keeps its first answer: once a notebook had asked, processes that
    `notebook_launcher` starts would each take themselves for the only one."""
    monkeypatch.setattr(PartialState, '_shared_state', {})
    next(batches(ReferDataset(refer_of(narrow), 'train', clip, train=True), 4, 1, 0, 1))
    assert PartialState._shared_state == {}


def test_the_rate_rises_and_falls():
    optimiser = torch.optim.SGD([torch.zeros(1)])
    rate = cosine_rate(optimiser, 2., 10, 100)
    rates = [rate(step) for step in range(100)]
    assert np.allclose(np.diff(rates[:10]), .2) and rates[9] == rates[10] == 2
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and 0 < rates[-1] < .002
    assert optimiser.param_groups[0]['lr'] == rates[-1]
    for step, share in (8, 9/50), (49, 1.):           # to the bit as the ladder's runs had it
        assert cosine_rate(optimiser, 2e-3, 50, 1000)(step) == 2e-3*share


# --- one stage, parts, precision

def test_one_stage_instead_of_two(two_stages, clip, tmp_path):
    "All parts learn at every step, from the sum of both losses."
    s = replace(two_stages, stages=1)
    train(s, tmp_path/'one', progress=False)
    steps = {(r['stage'], r['step']) for r in read_history(tmp_path/'one'/'history.csv')}
    assert steps == {(1, i) for i in range(4)}
    torch.manual_seed(s.seed)
    start, end = RISCLIP(s, clip).trained_state(), load_file(tmp_path/'one'/WEIGHTS)
    statistics = 'running_mean', 'running_var', 'num_batches_tracked'
    changed = [n for n in start if not torch.equal(start[n], end[n])]
    learnt = {n.split('.')[0] for n in changed if n.split('.')[-1] not in statistics}
    assert learnt == {'decoder', 'image_adapters', 'text_adapters', 'cfe', 'ske', 'calibration'}
    objects = ReferDataset(refer_of(s), 'train', clip, train=True)
    batch, = next(batches(objects, 2, 1, 0, 1))
    with torch.no_grad(): output = RISCLIP(s, clip)(batch.pixels, batch.tokens)
    one = Objective(s, 1)(output, batch)
    a, b = (Objective(two_stages, stage)(output, batch) for stage in (1, 2))
    for name in one:
        assert float(one[name]) == pytest.approx(float(a[name]) + float(b[name]))
        assert a[name] != b[name]


def test_below_the_decoder_one_stage_is_the_first_of_two(two_stages, tmp_path):
    for stages in (1, 2):
        train(replace(two_stages, rung='ske', stages=stages), tmp_path/str(stages), progress=False)
    assert_same_end(tmp_path/'1', tmp_path/'2')


def test_parts_of_a_batch_are_the_batch(narrow, finished, tmp_path):
    "Stage 1 has no batch statistics: in parts it takes the same way. What recomputes, to the bit."
    train(replace(narrow, accumulate=2, rung='ske', test_limit=2), tmp_path/'parts', progress=False)
    np.testing.assert_allclose(losses_of(tmp_path/'parts', 1), losses_of(finished[0], 1), atol=1e-5)
    train(replace(narrow, recompute=True), tmp_path/'again', progress=False)
    assert_same_end(tmp_path/'again', finished[0])
    message = (r'a batch of 4 cannot be shared by 1 process\(es\) with accumulate=3: '
               'it must be a multiple of 3')
    with pytest.raises(ValueError, match=message):
        train(replace(narrow, accumulate=3), tmp_path/'odd')
    assert not (tmp_path/'odd').exists()


def test_recompute_keeps_less(smoke):
    s = replace(smoke, rung='ske')
    clip = load_clip(s.clip)
    model = RISCLIP(s, clip)
    model.train_stage(1)
    pixels, tokens = torch.randn(2, 3, 96, 96), clip.tokenize(['a cup', 'a dog'])
    sizes = {}
    for model.recompute in (False, True):
        sizes[model.recompute] = saved_bytes(model, lambda: model(pixels, tokens).grounding.sum())
    assert sizes[True] < .5*sizes[False]


def test_keep(narrow, tmp_path):
    s = replace(narrow, rung='calibrated', stage1_steps=6, save_every=1, keep=3, test_limit=2)
    train(s, tmp_path/'run', progress=False)
    assert names(tmp_path/'run') == [f'stage1-{i:07d}' for i in (4, 5, 6)]


def test_bf16(two_stages, tmp_path):
    "In a process of its own: accelerate's precision is one for a process."
    given = asdict(replace(two_stages, precision='bf16', stage1_steps=2, stage2_steps=2))
    code = ('from risclip.training import Settings, train\n'
            f'train(Settings(**{given!r}), {str(tmp_path/"run")!r}, progress=False)')
    done = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(read_history(tmp_path/'run'/'history.csv')) == 4
    weights = load_file(tmp_path/'run'/WEIGHTS).values()
    assert all(v.dtype == torch.float32 for v in weights if v.is_floating_point())


# --- several sets, several processes

def test_several_sets(narrow, tmp_path, capsys):
    "A run on two sets is scored on its own alone, and its config names the other."
    both = replace(narrow, also=('refmoji/unc',), rung='calibrated', stage1_steps=2, test_limit=4)
    assert train(both, tmp_path/'run', progress=False)['expressions'] == 4
    assert 'JointRefer(refmojig umd, refmoji unc)' in capsys.readouterr().out
    config = json.loads((tmp_path/'run'/'config.json').read_text())
    assert config['settings']['also'] == ['refmoji/unc']


def test_two_processes_are_one(finished_tinyclip, smoke, tmp_path):
    """Stage 1: the losses of one process to 1e-5. Scoring: every expression once, also where they
    cannot be divided evenly."""
    s = replace(smoke, rung='ske', test_limit=11)
    process = two_processes(s, tmp_path/'two')
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    two, one = losses_of(tmp_path/'two', 1), losses_of(finished_tinyclip[0], 1)
    np.testing.assert_allclose(two, one, atol=1e-5)
    metrics = json.loads((tmp_path/'two'/'metrics.json').read_text())
    model = RISCLIP.from_pretrained(tmp_path/'two')
    alone = evaluate_model(model, refer_of(s), 'test', limit=11, batch_size=s.eval_batch_size,
                           thresholds=metrics['thresholds'], progress=False)
    assert metrics['expressions'] == 11 and metrics == alone
    assert (tmp_path/'two'/'history.csv').read_text().count('\n') == 13


def test_a_killed_process_ends_the_run(narrow, tmp_path):
    "With an error, not a hang; and one process by itself takes the run to its end."
    s = replace(narrow, stage1_steps=150, save_every=10, stage2_steps=4)
    process = two_processes(s, tmp_path/'two')
    wait_for(process, tmp_path/'two', 1, 12)
    listed = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], text=True,
                            capture_output=True)
    os.kill(max(map(int, listed.stdout.split())), signal.SIGKILL)
    assert process.wait(120) != 0
    assert not (tmp_path/'two'/'metrics.json').exists()
    done = train(s, tmp_path/'two', progress=False)
    assert done['expressions'] == 12 and len(losses_of(tmp_path/'two', 1)) == 150


def test_the_notebook_starts_two_processes(narrow, finished, tmp_path):
    "What papermill runs, with notebook_launcher: one process's losses, and on to its end."
    import papermill
    given = {k: v for k, v in asdict(replace(narrow, rung='ske')).items() if v is not None}
    given |= dict(folder=str(tmp_path/'two'), processes=2, features=[1, 2], also=[])
    papermill.execute_notebook(ROOT/'nbs'/'runs'/'train.ipynb', tmp_path/'out.ipynb', given,
                               progress_bar=False, kernel_name='python3', cwd=str(tmp_path))
    two, one = losses_of(tmp_path/'two', 1), losses_of(finished[0], 1)
    np.testing.assert_allclose(two, one, atol=1e-5)
    cells = nbformat.read(tmp_path/'out.ipynb', 4).cells
    said = ''.join(o.get('text', '') for c in cells for o in c.get('outputs', []))
    assert 'Launching training on 2' in said and 'is finished' in said
    assert (tmp_path/'two'/'figures'/'predictions.png').exists()


def test_the_train_command_in_this_process(narrow, tmp_path, capsys):
    given = [f'clip={narrow.clip}', 'stage1_steps=2', 'stage1_batch_size=2', 'test_limit=2']
    risclip_train('smoke', folder=str(tmp_path/'run'), rung='calibrated', seed=3, root=narrow.root,
                  set=given)
    said = capsys.readouterr().out
    assert 'P@0.9' in said and f'written to {tmp_path/"run"}' in said
    settings = json.loads((tmp_path/'run'/'config.json').read_text())['settings']
    found = [settings[k] for k in ('rung', 'seed', 'stage1_steps', 'stage1_batch_size', 'root')]
    assert found == ['calibrated', 3, 2, 2, narrow.root]


# --- it learns

@pytest.mark.parametrize('rung', ['raw', 'calibrated'])
def test_the_lowest_rungs_run_through(narrow, tmp_path, rung):
    s = replace(narrow, rung=rung, stage1_steps=2, test_limit=6)
    metrics = train(s, tmp_path/'run', progress=False)
    assert set(metrics) >= {'raw', 'grounding'} and 'mask' not in metrics
    assert RISCLIP.from_pretrained(tmp_path/'run').settings.rung == rung


def test_both_stages_learn(tmp_path):
    """Losses fall, and on the test split the map of stage 1 and the mask beat the raw map by clear
    margins."""
    s = settings_of('smoke', stage1_steps=50, stage2_steps=40, stage1_batch_size=16, warmup=3,
                    stage2_lr=1e-2, decoder_width=12, save_every=1000, test_limit=80)
    metrics = train(s, tmp_path/'run', progress=False)
    for stage in (1, 2):
        losses = losses_of(tmp_path/'run', stage)
        assert np.mean(losses[-8:]) < .92*np.mean(losses[:8]), (stage, losses)
    for name in ('grounding', 'mask'):
        assert metrics[name]['miou'] > metrics['raw']['miou'] + 4, metrics
