"""Training: killed at any moment it comes to the same end; troubles are named, and found early where they can be; and it learns.
Real processes are killed with SIGKILL. They run on a small RefMoji that is drawn for these tests."""
import ast, csv, json, math, os, shutil, signal, subprocess, sys, time
from collections import namedtuple
from dataclasses import fields, replace
from pathlib import Path
import nbformat, numpy as np, pytest, torch
from safetensors.torch import load_file
import risclip.training as training
from conftest import ROOT
from risclip.clip import load_clip
from risclip.model import RISCLIP, load_risclip
from risclip.pretraining import learning_rate
from risclip.refer import ReferDataset
from risclip.refmoji import build_refmoji
from risclip.training import PRESETS, Run, Settings, batches, dataset_of, given_names, read_history, refer_of, settings_in, settings_of, table, train

ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A RefMoji of some dozen pictures."
    return build_refmoji(tmp_path_factory.mktemp('data'), dict(train=40, val=4, test=12, testA=3, testB=3), workers=1)


@pytest.fixture(scope='module')
def smoke(root): return settings_of('smoke', root=str(root), stage1_steps=12, stage2_steps=8, batch=4, test_limit=12)


@pytest.fixture(scope='module')
def finished(smoke, tmp_path_factory):
    "(folder, metrics) of a run that nobody killed."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('runs')/'whole'
    return folder, train(smoke, folder, progress=False)


@pytest.fixture(scope='module')
def clip(): return load_clip('tinyclip')


@pytest.fixture
def short(smoke): return replace(smoke, rung='adapters', stage1_steps=4, save_every=1)


def names(folder): return sorted(p.name for p in (folder/'checkpoints').iterdir())


# --- killed

COMMAND = '''
import os, sys
import risclip.training as t
how = sys.argv.pop(1)
if how == 'evaluates': t.risclip_evaluate(); sys.exit()
if how == 'dies while it saves':
    held, calls = t.save_file, iter(range(99))
    def save_file(state, file, **k):
        held(state, file, **k)
        if next(calls) == 1:
            file.write_bytes(file.read_bytes()[:1000])     # half a file, and then
            os.kill(os.getpid(), 9)
    t.save_file = save_file
t.PRESETS['smoke'] |= dict(test_limit=int(os.environ.get('LIMIT', 12)))
t.risclip_train()
'''


def command(folder, *options):
    "One of the commands, as a process; a file like those that pip makes for console scripts."
    script = folder.parent/'command.py'
    script.write_text(COMMAND)
    return subprocess.Popen([sys.executable, script, *options], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train_command(root, folder, how='lives'):
    return command(folder, how, '--preset', 'smoke', '--folder', folder, '--root', root, '--stage1_steps', '12', '--stage2_steps', '8', '--batch', '4')


def wait_for(process, folder, stage, rows):
    "Until the history has so many rows of a stage."
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
        file = folder/'history.csv'
        if file.exists() and sum(line.startswith(f'{stage},') for line in file.read_text().splitlines()) >= rows: return
        time.sleep(.01)
    raise AssertionError(f'stage {stage} was not seen:\n{process.communicate()[1][-2000:]}')


def kill(process):
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


def test_killed_in_both_stages_and_while_saving(finished, smoke, root, tmp_path):
    whole, metrics = finished
    folder = tmp_path/'killed'

    process = train_command(root, folder)                                  # killed in stage 1
    wait_for(process, folder, 1, 3)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(RuntimeError, match='in use by another process'): train(smoke, folder, progress=False)
    kill(process)
    last = read_history(folder/'history.csv')[-1]
    assert last['stage'] == 1 and last['step'] < 11

    process = train_command(root, folder, 'dies while it saves')                 # killed in the middle of a file
    assert process.wait(300) == -signal.SIGKILL, process.stderr.read()[-2000:]
    assert names(folder)[0] == 'part' and len(names(folder)) > 1
    for checkpoint in names(folder)[1:]:
        assert all(v.isfinite().all() for v in load_file(folder/'checkpoints'/checkpoint/'weights.safetensors').values())

    process = train_command(root, folder)                                        # killed in stage 2
    wait_for(process, folder, 2, 2)
    kill(process)
    assert not (folder/'metrics.json').exists() and read_history(folder/'history.csv')[-1]['stage'] == 2

    process = train_command(root, folder)                                        # and on to the end
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    assert 'P@0.9' in out and str(folder) in out
    assert (folder/'history.csv').read_text() == (whole/'history.csv').read_text()
    ours, theirs = (load_file(f/'model'/'weights.safetensors') for f in (folder, whole))
    assert ours.keys() == theirs.keys() and [k for k, v in ours.items() if not torch.equal(v, theirs[k])] == []
    assert json.loads((folder/'metrics.json').read_text()) == metrics


def test_a_finished_run_is_only_reported(finished, smoke, capsys):
    folder, metrics = finished
    before = {f: f.stat().st_mtime_ns for f in folder.rglob('*') if f.is_file() and f.name != '.lock'}
    assert train(smoke, folder, progress=False) == metrics
    assert 'is finished' in capsys.readouterr().out
    assert before == {f: f.stat().st_mtime_ns for f in folder.rglob('*') if f.is_file() and f.name != '.lock'}


def test_what_a_run_writes(finished, smoke):
    folder, metrics = finished
    rows = list(csv.DictReader(open(folder/'history.csv')))
    assert [(int(r['stage']), int(r['step'])) for r in rows] == [(1, i) for i in range(12)] + [(2, i) for i in range(8)]
    for name in ('raw', 'grounding', 'mask'):
        assert set(metrics[name]) == {'miou', 'oiou', 'p50', 'p60', 'p70', 'p80', 'p90'}
        assert all(0 <= v <= 100 for v in metrics[name].values())
    assert metrics == json.loads((folder/'metrics.json').read_text())
    config = json.loads((folder/'config.json').read_text())
    assert config['settings']['seed'] == 0 and config['versions']['torch'] and len(config['clip']['sha256']) == 64
    assert names(folder) == ['stage2-0000006', 'stage2-0000008']
    assert list((folder/'tensorboard').glob('events*'))
    assert table(metrics).count('\n') == 3


# --- troubles

def test_other_settings_in_the_same_folder(finished, smoke):
    for name, value in dict(lr1=1e-3, seed=1, rung='ske').items():
        with pytest.raises(ValueError, match=fr'config.json says {name}=.* now it is {value!r}'): train(replace(smoke, **{name: value}), finished[0])


def test_what_changes_nothing_may_change_in_the_same_folder(finished, smoke):
    assert train(replace(smoke, keep=5, workers=1, save_every=3, batch_eval=3, recompute=True), finished[0]) == finished[1]


def test_scoring_takes_so_many_phrases_at_a_time(finished, smoke, monkeypatch):
    "As its setting says; the numbers stay as they are."
    sizes, maps = [], training.maps_of
    monkeypatch.setattr(training, 'maps_of', lambda model, batch: (sizes.append(len(batch.index)), maps(model, batch))[1])
    found = training.measure(load_risclip(finished[0]), replace(smoke, test_limit=12, batch_eval=5), refer_of(smoke), thresholds=finished[1]['thresholds'], progress=False)
    assert sizes == [5, 5, 2] and abs(found['mask']['miou'] - finished[1]['mask']['miou']) < .1


def test_another_clip_in_the_same_folder(finished, smoke, clip, monkeypatch):
    other = load_clip('tinyclip')
    other.sha256 = 'f'*64
    monkeypatch.setattr(training, 'load_clip', lambda *_: other)
    with pytest.raises(ValueError, match=f'CLIP sha256={clip.sha256!r}, now it is'): train(smoke, finished[0])


def no_training(monkeypatch):
    def fit(*_): raise AssertionError('it began to train')
    monkeypatch.setattr(training, 'fit', fit)


def test_found_before_training(smoke, tmp_path, monkeypatch):
    no_training(monkeypatch)
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='file/run cannot be written'): train(smoke, tmp_path/'file'/'run')
    with pytest.raises(ValueError, match="no split 'testA'"): train(replace(smoke, test='testA'), tmp_path/'a')
    with pytest.raises(ValueError, match='neither a folder nor an architecture'): train(replace(smoke, clip='tinyklip'), tmp_path/'b')
    usage = namedtuple('usage', 'total used free')(2**40, 2**40, 30*2**20)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
    with pytest.raises(OSError, match='has 30 MiB left on its disk, a run may need') as e: train(smoke, tmp_path/'c')
    assert e.value.errno == 28


def test_a_folder_without_the_right_to_write(smoke, tmp_path, monkeypatch):
    no_training(monkeypatch)
    (tmp_path/'run').mkdir(mode=0o500)
    if os.getuid() == 0:                                                   # root may write everywhere: the refusal is played
        def refuse(**_): raise PermissionError(13, 'Permission denied')
        monkeypatch.setattr(training.tempfile, 'TemporaryFile', refuse)
    with pytest.raises(PermissionError, match='cannot be written'): train(smoke, tmp_path/'run')


@pytest.mark.parametrize('where', ['weights', 'optimiser'])
def test_a_disk_that_fills_during_a_save_loses_nothing(short, tmp_path, monkeypatch, where):
    whole = train(short, tmp_path/'whole', progress=False)
    module, name = (training, 'save_file') if where == 'weights' else (torch, 'save')
    held, calls = getattr(module, name), iter(range(99))

    def fills(what, file, *a, **k):
        held(what, file, *a, **k)
        if next(calls) == 2: file.write_bytes(file.read_bytes()[:100]); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(module, name, fills)
    with pytest.raises(OSError, match='stage1-0000003 could not be written .* make room, and repeat') as e: train(short, tmp_path/'full', progress=False)
    assert e.value.errno == 28 and names(tmp_path/'full') == ['stage1-0000001', 'stage1-0000002']
    monkeypatch.undo()
    assert train(short, tmp_path/'full', progress=False) == whole
    assert (tmp_path/'full'/'history.csv').read_text() == (tmp_path/'whole'/'history.csv').read_text()


class Killed(BaseException): "What a process does not survive, played in this one: no `except Exception` sees it."

AT = {'between the stages': (Run, 'start_history', 1), 'weights of stage 2': (training, 'save_file', 3), 'optimiser of stage 2': (torch, 'save', 3),
      'old checkpoints go': (training.shutil, 'rmtree', 5), 'a checkpoint gets its name': (Path, 'rename', 3), 'while scoring': (training, 'score', 0),
      'the finished model': (training.RISCLIP, 'save', 0), 'metrics.json': (training, 'report', 0), 'a line of the history': (Run, 'log', 5)}

@pytest.mark.parametrize('error', [Killed(), OSError(28, 'No space left on device')], ids=['killed', 'full disk'])
@pytest.mark.parametrize('place', AT)
def test_whatever_happens_the_same_command_comes_to_the_same_end(two_stages, tmp_path, monkeypatch, place, error):
    s, whole, metrics = two_stages
    owner, name, nth = AT[place]
    held, calls = getattr(owner, name), iter(range(10**6))
    def dies(*a, **k):
        if next(calls) == nth: raise error
        return held(*a, **k)
    monkeypatch.setattr(owner, name, dies)
    with pytest.raises((Killed, OSError)): train(s, tmp_path/'run', progress=False)
    monkeypatch.undo()
    assert train(s, tmp_path/'run', progress=False) == metrics
    assert (tmp_path/'run'/'history.csv').read_text() == (whole/'history.csv').read_text()
    ours, theirs = (load_file(f/'model'/'weights.safetensors') for f in (tmp_path/'run', whole))
    assert [k for k, v in theirs.items() if not torch.equal(v, ours[k])] == []


@pytest.fixture(scope='module')
def two_stages(smoke, tmp_path_factory):
    "Settings of a very short run through both stages, its folder, its metrics."
    torch.set_num_threads(1)
    s = replace(smoke, stage1_steps=4, stage2_steps=4, save_every=2, batch=2, batch2=2, test_limit=4)
    folder = tmp_path_factory.mktemp('runs')/'short'
    return s, folder, train(s, folder, progress=False)


def test_one_stage_instead_of_two(two_stages, clip, tmp_path):
    "All parts learn at every step, from the sum of both losses; below the decoder's rung nothing changes."
    s = replace(two_stages[0], stages=1)
    train(s, tmp_path/'one', progress=False)
    assert {(r['stage'], r['step']) for r in read_history(tmp_path/'one'/'history.csv')} == {(1, i) for i in range(4)}
    torch.manual_seed(s.seed)
    start, end = RISCLIP(s, clip).trained_state(), load_file(tmp_path/'one'/'model'/'weights.safetensors')
    learnt = {n.split('.')[0] for n in start if n.split('.')[-1] not in ('running_mean', 'running_var', 'num_batches_tracked') and not torch.equal(start[n], end[n])}
    assert learnt == {'decoder', 'image_adapters', 'text_adapters', 'cfe', 'ske', 'calibration'}
    batch = next(batches(dataset_of(s, refer_of(s), 'train', clip, train=True), s, 0, 1, 1))
    with torch.no_grad(): output = RISCLIP(s, clip)(batch.pixels, batch.tokens)
    one, (a, b) = training.stage_losses(s, 1, output, batch, clip.grid), [training.stage_losses(two_stages[0], i, output, batch, clip.grid) for i in (1, 2)]
    for name in one: assert float(one[name]) == pytest.approx(float(a[name]) + float(b[name])) and a[name] != b[name]
    train(replace(s, rung='ske'), tmp_path/'ske', progress=False); train(replace(two_stages[0], rung='ske'), tmp_path/'other', progress=False)
    assert (tmp_path/'ske'/'history.csv').read_text() == (tmp_path/'other'/'history.csv').read_text()


def test_a_full_disk_while_logging_says_what_to_do(short, clip, tmp_path, monkeypatch):
    def full(*a, **k): raise OSError(28, 'No space left on device')
    run = Run(tmp_path, short, clip)
    run.start_history(1, 0)
    monkeypatch.setattr('builtins.open', full)
    with pytest.raises(OSError, match='history.csv could not be written .* make room, and repeat'): run.log(dict.fromkeys(training.COLUMNS, 1))
    monkeypatch.undo()
    run.close()


def test_what_is_not_finite_in_stage_2(two_stages, tmp_path, monkeypatch):
    s, held = two_stages[0], training.stage_losses
    def spoilt(s, stage, *args): return {name: v*(math.nan if stage == 2 else 1) for name, v in held(s, stage, *args).items()}
    monkeypatch.setattr(training, 'stage_losses', spoilt)
    with pytest.raises(FloatingPointError, match='loss is nan at step 0 of stage 2.*stage1-0000004. A lower lr2'): train(s, tmp_path/'run', progress=False)


@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_what_is_not_finite_stops_the_run(short, tmp_path, monkeypatch, what):
    held, calls = training.stage_losses, iter(range(99))

    def spoilt(*args):
        parts = held(*args)
        if next(calls) == 2:
            if what == 'loss': parts = {name: v*math.nan for name, v in parts.items()}
            else: parts['loss'].register_hook(lambda g: g*math.inf)
        return parts
    monkeypatch.setattr(training, 'stage_losses', spoilt)
    with pytest.raises(FloatingPointError, match=f'{what} is (nan|inf) at step 2 of stage 1.*stage1-0000002') as e: train(short, tmp_path/'run', progress=False)
    assert names(tmp_path/'run') == ['stage1-0000001', 'stage1-0000002']
    for value in load_file(tmp_path/'run'/'checkpoints'/'stage1-0000002'/'weights.safetensors').values(): assert value.isfinite().all()
    assert [r['step'] for r in read_history(tmp_path/'run'/'history.csv')] == [0, 1]
    monkeypatch.undo()
    train(short, tmp_path/'run', progress=False)                           # the lock was given back, and what is there is good


def test_a_failed_start_gives_the_lock_back(short, clip, tmp_path):
    Run(tmp_path, short, clip).close()
    for _ in range(2):
        with pytest.raises(ValueError, match='seed') as e: Run(tmp_path, replace(short, seed=5), clip)
    held = e                                                               # as a notebook keeps the last error, and all that hangs on it
    Run(tmp_path, short, clip).close()


# --- functions of the seed

def test_batches_are_a_function_of_seed_stage_and_step(smoke, clip):
    objects = dataset_of(smoke, refer_of(smoke), 'train', clip, train=True, limit=60)
    each = len(objects)//smoke.batch
    steps = 2*each + 3
    seen = lambda start, stage=1, **changes: [(b.index.tolist(), b.tokens.tolist(), b.pixels.sum().item()) for b in batches(objects, replace(smoke, **changes), start, steps, stage)]
    whole = seen(0)
    assert len(whole) == steps and each > 4
    for start in (1, each - 1, each, each + 1, steps - 1): assert seen(start) == whole[start:], start
    assert seen(steps) == []
    assert seen(0, stage=2) != whole and seen(0, seed=1) != whole
    for epoch in range(2):
        rows = [i for index, *_ in whole[epoch*each:(epoch + 1)*each] for i in index]
        assert len(set(rows)) == len(rows) == each*smoke.batch
    assert seen(3, workers=2)[:3] == whole[3:6]                            # whoever loads it


def test_rate():
    rates = [learning_rate(step, 100, 10) for step in range(100)]
    assert np.allclose(np.diff(rates[:10]), .1) and rates[9] == rates[10] == 1
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and 0 < rates[-1] < .001


def test_a_cut_history_is_read(tmp_path):
    whole = 'stage,step,loss,dice,focal,lr,norm\n1,0,2.5,0.9,0.91,0.001,3.0\n'
    for cut in ('', '1', '1,1,', '1,1,2.5,0.9,0.91,0.0', '1,1,2.5,0.9,0.91,0.001,3', '1,1,2.5,0.9,0.91,0.001,1.2e-'):
        (tmp_path/'history.csv').write_text(whole + cut)
        assert read_history(tmp_path/'history.csv') == [dict(stage=1, step=0, loss=2.5, dice=.9, focal=.91, lr=.001, norm=3.)]


# --- names

def test_names_are_checked():
    for wrong, near in dict(stage1_step='stage1_steps', lr_1='lr1', cfe_layer='cfe_layers').items():
        with pytest.raises(ValueError, match=f"no setting '{wrong}', did you mean '{near}'"): settings_of('smoke', **{wrong: 1})
    with pytest.raises(ValueError, match="no preset 'refmoji', did you mean 'refmojig'"): settings_of('refmoji')
    for preset in PRESETS: settings_of(preset)
    before = dict(a=1, table=table)
    assert given_names(before, before | dict(b=2, _i=3)) == dict(b=2)
    assert given_names(before, before | dict(table=5)) == dict(table=5)


@pytest.mark.parametrize('wrong', [dict(batch=0), dict(save_every=0), dict(stage1_steps=-1), dict(label='mean'), dict(stages=3), dict(precision='fp16'), dict(lr1='1e-3'), dict(seed=1.5), dict(also='refcoco'),
                                   dict(batch2=0), dict(test_limit=0), dict(test_limit=-3), dict(warmup=-1), dict(workers=-1), dict(features='[1, 2, 3, 4]'), dict(features=(1.5,))])
def test_values_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): settings_of('smoke', **wrong)


def parameters(notebook):
    cell, = (c for c in nbformat.read(ROOT/'nbs'/'runs'/notebook, 4).cells if 'parameters' in c.metadata.get('tags', []))
    return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}


def test_the_notebook_offers_every_setting():
    given = parameters('train.ipynb')
    assert list(given) == ['preset', 'folder', 'processes', *(f.name for f in fields(Settings))]
    assert given.pop('preset') == 'smoke' and given.pop('processes') == 1 and set(given.values()) == {None}


@pytest.mark.parametrize('notebook,wrong,near', [('train', 'stage1_stpes', 'stage1_steps'), ('evaluate', 'limt', 'limit'), ('pretrain', 'stpes', 'steps')])
def test_papermill_with_a_mistyped_name_stops_before_the_work(tmp_path, notebook, wrong, near):
    import papermill
    with pytest.raises(papermill.PapermillExecutionError, match=f"no setting '{wrong}', did you mean '{near}'"):
        papermill.execute_notebook(ROOT/'nbs'/'runs'/f'{notebook}.ipynb', tmp_path/'out.ipynb', {wrong: 3} | dict(folder=str(tmp_path/'run')),
                                   progress_bar=False, kernel_name='python3', cwd=str(tmp_path))
    assert not (tmp_path/'run').exists()


# --- the commands

def test_evaluate_command(finished, root, tmp_path):
    folder, metrics = finished
    process = command(tmp_path/'out', 'evaluates', folder, '--root', root, '--limit', '12', '--out', tmp_path/'out.json')
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    found = json.loads((tmp_path/'out.json').read_text())
    assert {k: found[k] for k in metrics} == metrics and (found['data'], found['split'], found['protocol']) == ('refmojig', 'test', 'own')
    assert table(metrics) in out


def test_evaluate_another_set_and_protocol(finished, root, capsys):
    training.risclip_evaluate(finished[0], data='refmoji', split='testB', root=str(root), protocol='lavt', limit=4)
    assert 'mask' in capsys.readouterr().out
    with pytest.raises(ValueError, match="no split 'test', but only testA and testB"): training.risclip_evaluate(finished[0], data='refmoji', root=str(root))


def test_options_of_the_train_command(root, tmp_path):
    process = command(tmp_path/'run', 'lives', '--preset', 'smoke', '--folder', tmp_path/'run', '--root', root, '--stage1_steps', '2', '--batch', '2', '--rung', 'calibrated', '--seed', '3')
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    settings = json.loads((tmp_path/'run'/'config.json').read_text())['settings']
    assert [settings[k] for k in ('rung', 'seed', 'stage1_steps', 'batch', 'root')] == ['calibrated', 3, 2, 2, str(root)]


def test_bf16(root, tmp_path):
    "In a process of its own: accelerate's precision is one for a process."
    code = f"""from risclip.training import *
train(settings_of('smoke', root={str(root)!r}, precision='bf16', stage1_steps=2, stage2_steps=2, batch=2, batch2=2, test_limit=4), {str(tmp_path/'run')!r}, progress=False)"""
    done = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(read_history(tmp_path/'run'/'history.csv')) == 4
    assert all(v.dtype == torch.float32 for v in load_file(tmp_path/'run'/'model'/'weights.safetensors').values() if v.is_floating_point())


# --- parts of a batch, and several processes

def losses_of(folder, stage): return [r['loss'] for r in read_history(folder/'history.csv') if r['stage'] == stage]

def test_parts_of_a_batch_are_the_batch(smoke, finished, tmp_path):
    "Stage 1 has no batch statistics: in parts it takes the same way. What recomputes takes it to the last bit."
    train(replace(smoke, accumulate=2, rung='ske', test_limit=2), tmp_path/'parts', progress=False)
    np.testing.assert_allclose(losses_of(tmp_path/'parts', 1), losses_of(finished[0], 1), atol=1e-5)
    train(replace(smoke, recompute=True), tmp_path/'again', progress=False)
    a, b = (load_file(folder/'model'/'weights.safetensors') for folder in (tmp_path/'again', finished[0]))
    assert all(torch.equal(a[k], b[k]) for k in b) and json.loads((tmp_path/'again'/'metrics.json').read_text()) == finished[1]
    with pytest.raises(ValueError, match='a batch of 4 cannot be shared by 1 process.es. with accumulate=3: it must be a multiple of 3'):
        train(replace(smoke, accumulate=3), tmp_path/'odd')
    assert not (tmp_path/'odd').exists()

def test_recompute_keeps_less(smoke, clip):
    model = RISCLIP(replace(smoke, rung='ske'), clip)
    parameters, bytes_kept = model.train_stage(1), {}
    for model.recompute in (False, True):
        bytes_kept[model.recompute] = training.saved_bytes(model, lambda: model(torch.randn(2, 3, 96, 96), clip.tokenize(['a cup', 'a dog'])).grounding.sum())
    assert bytes_kept[True] < .5*bytes_kept[False]

def test_keep(smoke, tmp_path):
    train(replace(smoke, rung='calibrated', stage1_steps=6, save_every=1, keep=3, test_limit=2), tmp_path/'run', progress=False)
    assert names(tmp_path/'run') == [f'stage1-{i:07d}' for i in (4, 5, 6)]

def two_processes(root, folder, *options, limit=12):
    "The train command in two processes, as a launcher starts them; its own session, so that nothing is left behind."
    script = folder.parent/'command.py'
    script.write_text(COMMAND)
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', script, 'lives', '--preset', 'smoke', '--folder', folder,
                             '--root', root, '--stage1_steps', '12', '--batch', '4', *options], env=ENV | dict(LIMIT=str(limit)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

def test_two_processes_are_one(smoke, finished, root, tmp_path):
    "Stage 1: the losses of one process to 1e-5. Scoring: every expression once, also where they cannot be shared evenly."
    process = two_processes(root, tmp_path/'two', '--rung', 'ske', limit=11)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out[-3000:]
    np.testing.assert_allclose(losses_of(tmp_path/'two', 1), losses_of(finished[0], 1), atol=1e-5)
    metrics, eleven = json.loads((tmp_path/'two'/'metrics.json').read_text()), replace(smoke, rung='ske', test_limit=11)
    alone = training.measure(load_risclip(tmp_path/'two'), eleven, refer_of(eleven), thresholds=metrics['thresholds'], progress=False)
    assert metrics['expressions'] == 11 and metrics == alone
    assert (tmp_path/'two'/'history.csv').read_text().count('\n') == 13

def test_shares_of_the_scoring(clip, smoke):
    "Every expression in one share, all phrases of a picture in the same one."
    expressions = refer_of(smoke).expressions('test')
    for n in (1, 2, 3, 7):
        rows = training.shared_out(expressions, n)
        assert sorted(row for mine in rows for row in mine) == list(range(len(expressions)))
        images = [{expressions[row].image_id for row in mine} for mine in rows]
        assert all(not (a & b) for i, a in enumerate(images) for b in images[:i])
    with pytest.raises(ValueError, match='1 pictures cannot be scored by 2 processes'): training.shared_out(expressions[:1], 2)

def test_several_sets(smoke, clip, tmp_path, capsys):
    "A run on two sets takes its objects from both, is scored on its own alone, and the command knows the option."
    both = replace(smoke, also=('refmoji/unc',), rung='calibrated', stage1_steps=2, test_limit=4)
    known = training.trained_on(both, refer_of(both))
    objects = training.dataset_of(both, known, 'train', clip, train=True)
    alone = [len(training.dataset_of(both, training.open_refer(name, None, both.root), 'train', clip, train=True)) for name in ('refmojig', 'refmoji')]
    assert len(objects) + known.dropped == sum(alone)
    assert train(both, tmp_path/'run', progress=False)['expressions'] == 4
    assert 'JointRefer(refmojig umd, refmoji unc)' in capsys.readouterr().out
    assert json.loads((tmp_path/'run'/'config.json').read_text())['settings']['also'] == ['refmoji/unc']
    training.risclip_train('smoke', also='refmoji/unc,refmoji+', dry_run=True)
    assert 'refmojig + refmoji/unc + refmoji+' in capsys.readouterr().out

def test_the_notebook_starts_two_processes(smoke, finished, root, tmp_path):
    "What papermill runs, with notebook_launcher: the losses of one process, and the notebook goes on to its end."
    import papermill
    given = dict(folder=str(tmp_path/'two'), processes=2, rung='ske', root=str(root), stage1_steps=12, batch=4, test_limit=12)
    papermill.execute_notebook(ROOT/'nbs'/'runs'/'train.ipynb', tmp_path/'out.ipynb', given, progress_bar=False, kernel_name='python3', cwd=str(tmp_path))
    np.testing.assert_allclose(losses_of(tmp_path/'two', 1), losses_of(finished[0], 1), atol=1e-5)
    said = ''.join(o.get('text', '') for c in nbformat.read(tmp_path/'out.ipynb', 4).cells for o in c.get('outputs', []))
    assert 'Launching training on 2' in said and 'is finished' in said and (tmp_path/'two'/'figures'/'predictions.png').exists()

def test_a_killed_process_ends_the_run(smoke, finished, root, tmp_path):
    "With an error, not a hang; and one process alone takes the run to its end."
    process = two_processes(root, tmp_path/'two')
    wait_for(process, tmp_path/'two', 1, 4)
    children = [int(c) for c in subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True).stdout.split()]
    os.kill(max(children), signal.SIGKILL)
    assert process.wait(120) != 0
    done = train(replace(smoke, stage2_steps=4), tmp_path/'two', progress=False)
    assert done['expressions'] == 12 and len(losses_of(tmp_path/'two', 1)) == 12


# --- it learns

@pytest.mark.parametrize('rung', ['raw', 'calibrated'])
def test_the_lowest_rungs_run_through(smoke, tmp_path, rung):
    metrics = train(replace(smoke, rung=rung, stage1_steps=2, test_limit=6), tmp_path/'run', progress=False)
    assert set(metrics) >= {'raw', 'grounding'} and 'mask' not in metrics
    assert load_risclip(tmp_path/'run').settings.rung == rung


def test_both_stages_learn(tmp_path):
    "Losses fall, and on the test split the map of stage 1 and the mask beat the raw map by clear margins."
    s = settings_of('smoke', stage1_steps=50, stage2_steps=40, batch=16, warmup=3, lr2=1e-2, decoder_width=12, save_every=1000, test_limit=80)
    metrics = train(s, tmp_path/'run', progress=False)
    rows = read_history(tmp_path/'run'/'history.csv')
    for stage in (1, 2):
        losses = [r['loss'] for r in rows if r['stage'] == stage]
        assert np.mean(losses[-8:]) < .92*np.mean(losses[:8]), (stage, losses)
    for name in ('grounding', 'mask'): assert metrics[name]['miou'] > metrics['raw']['miou'] + 4, metrics
