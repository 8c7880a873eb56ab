"""A run's folder: locked, compared, written whole or not at all, and read again as it was."""
import errno, shutil
from collections import namedtuple
from dataclasses import replace

import pytest, torch
from safetensors.torch import load_file

import risclip.files
import risclip.runs as runs
from risclip.clip import load_clip
from risclip.model import RISCLIP
from risclip.runs import HISTORY_COLUMNS, Run, bytes_needed, read_history, run_folder, with_defaults
from training_runs import data_root, names, narrow, short, smoke   # noqa: F401  fixtures


@pytest.fixture(scope='module')
def clip(narrow): return load_clip(narrow.clip)


def trained(s, clip, seed=0):
    "A model and its optimiser, after a step."
    torch.manual_seed(seed)
    model = RISCLIP(s, clip)
    optimiser = torch.optim.AdamW(model.train_stage(1), lr=.1)
    pixels, tokens = torch.randn(2, 3, clip.size, clip.size), clip.tokenize(['a cup', 'a dog'])
    model(pixels, tokens).grounding.square().mean().backward()
    optimiser.step()
    return model, optimiser


# --- locked and compared

def test_a_folder_has_one_run_at_a_time(short, clip, tmp_path):
    run = Run(tmp_path, short, clip)
    with pytest.raises(RuntimeError, match='in use by another process'): Run(tmp_path, short, clip)
    Run(tmp_path, short, clip, main=False)                 # the others of several processes read
    run.close()
    Run(tmp_path, short, clip).close()


def test_a_failed_start_gives_the_lock_back(short, clip, tmp_path):
    Run(tmp_path, short, clip).close()
    for _ in range(2):
        with pytest.raises(ValueError, match='seed') as e:
            Run(tmp_path, replace(short, seed=5), clip)
    held = e                     # as a notebook keeps the last error, and all that hangs on it
    Run(tmp_path, short, clip).close()


def test_other_settings_or_another_clip_are_named(short, clip, tmp_path):
    Run(tmp_path, short, clip).close()
    for name, value in dict(stage1_lr=1e-3, seed=1, rung='ske', also=('refmoji',)).items():
        message = fr'config.json says {name}=.* now it is .*: give another folder'
        with pytest.raises(ValueError, match=message):
            Run(tmp_path, replace(short, **{name: value}), clip)
    other = load_clip(short.clip)
    other.sha256 = 'f'*64
    message = f'CLIP sha256={clip.sha256!r}, now it is'
    with pytest.raises(ValueError, match=message): Run(tmp_path, short, other)
    changes = dict(keep=5, workers=1, save_every=3, eval_batch_size=3, recompute=True, root='x')
    Run(tmp_path, replace(short, **changes), clip).close()


def test_a_config_that_lacks_a_setting_has_its_default(short):
    assert with_defaults({})['stage1_lr'] == 5e-5 and with_defaults({})['features'] == [1, 2, 3, 4]
    assert with_defaults(dict(seed=7))['seed'] == 7


# --- room

def test_room_is_asked_for(short, clip, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='file/run cannot be written'):
        Run(tmp_path/'file'/'run', short, clip)
    usage = namedtuple('usage', 'total used free')(2**40, 2**40, bytes_needed(short, clip) - 1)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
    with pytest.raises(OSError, match='make room') as e: Run(tmp_path/'full', short, clip)
    assert e.value.errno == errno.ENOSPC
    (tmp_path/'done').mkdir()
    (tmp_path/'done'/'metrics.json').write_text('{}')      # a finished run needs no room
    Run(tmp_path/'done', short, clip).close()


def test_a_folder_without_the_right_to_write(short, clip, tmp_path, monkeypatch):
    def refuse(**_): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(risclip.files.tempfile, 'TemporaryFile', refuse)
    with pytest.raises(PermissionError, match='cannot be written'): Run(tmp_path/'run', short, clip)


def test_what_is_needed_grows_with_what_is_trained(narrow, clip):
    rungs = [bytes_needed(replace(narrow, rung=rung), clip) for rung in ('raw', 'cfe', 'decoder')]
    assert rungs[0] < rungs[1] < rungs[2]


def test_where_a_run_goes():
    assert run_folder('smoke').name == 'smoke' and run_folder('smoke', 'ske').name == 'smoke-ske'


# --- checkpoints

def test_a_checkpoint_is_read_as_it_was_written(short, clip, tmp_path):
    run = Run(tmp_path, short, clip)
    run.history.touch()
    model, optimiser = trained(short, clip)
    for step in (1, 2, 3): run.save(1, step, model, optimiser)
    assert names(tmp_path) == ['stage1-0000002', 'stage1-0000003'] and run.steps_done() == 3
    other, other_optimiser = trained(short, clip, seed=1)
    assert run.resume(1, other, other_optimiser) == 3
    assert run.resume(2, other, other_optimiser) == 0
    read = other.trained_state()
    assert all(torch.equal(v, read[k]) for k, v in model.trained_state().items())
    was, now = (o.state_dict()['state'] for o in (optimiser, other_optimiser))
    assert was.keys() == now.keys()
    assert all(torch.equal(v, now[i][k]) for i, state in was.items() for k, v in state.items())
    run.save(2, 4, model, optimiser)
    assert run.steps_done() == short.stage1_steps + 4
    run.close()


@pytest.mark.parametrize('where', ['weights', 'optimiser'])
def test_a_save_that_fails_leaves_those_before(short, clip, tmp_path, monkeypatch, where):
    run = Run(tmp_path, short, clip)
    run.history.touch()
    model, optimiser = trained(short, clip)
    for step in (1, 2): run.save(1, step, model, optimiser)
    owner, name = (runs, 'save_file') if where == 'weights' else (torch, 'save')
    function = getattr(owner, name)
    def fills(what, file, *a, **k):
        function(what, file, *a, **k)
        file.write_bytes(file.read_bytes()[:100])
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(owner, name, fills)
    message = 'stage1-0000003 could not be written .* make room, and repeat'
    with pytest.raises(OSError, match=message) as e: run.save(1, 3, model, optimiser)
    assert e.value.errno == errno.ENOSPC and names(tmp_path) == ['stage1-0000001', 'stage1-0000002']
    for checkpoint in run.checkpoints(): load_file(checkpoint/'weights.safetensors')
    run.close()


# --- the history

def test_a_cut_history_is_read(tmp_path):
    whole = 'stage,step,loss,dice,focal,lr,norm\n1,0,2.5,0.9,0.91,0.001,3.0\n'
    row = dict(stage=1, step=0, loss=2.5, dice=.9, focal=.91, lr=.001, norm=3.)
    cuts = ('', '1', '1,1,', '1,1,2.5,0.9,0.91,0.0', '1,1,2.5,0.9,0.91,0.001,3',
            '1,1,2.5,0.9,0.91,0.001,1.2e-')
    for cut in cuts:
        (tmp_path/'history.csv').write_text(whole + cut)
        assert read_history(tmp_path/'history.csv') == [row]


def test_the_history_goes_on_where_the_run_does(short, clip, tmp_path):
    run = Run(tmp_path, short, clip)
    run.start_history(1, 0)
    row = dict.fromkeys(HISTORY_COLUMNS, 1/3)
    for step in range(4): run.log(row | dict(stage=1, step=step))
    for step in range(3): run.log(row | dict(stage=2, step=step))
    run.start_history(2, 1)
    found = [(r['stage'], r['step']) for r in read_history(run.history)]
    assert found == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    run.start_history(1, 2)
    assert [r['step'] for r in read_history(run.history)] == [0, 1]
    assert read_history(run.history)[0]['loss'] == 1/3
    run.close()


def test_a_full_disk_while_logging_says_what_to_do(short, clip, tmp_path, monkeypatch):
    def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')
    run = Run(tmp_path, short, clip)
    run.start_history(1, 0)
    monkeypatch.setattr('builtins.open', full)
    with pytest.raises(OSError, match='history.csv could not be written .* make room, and repeat'):
        run.log(dict.fromkeys(HISTORY_COLUMNS, 1))
    monkeypatch.undo()
    run.close()


def test_the_first_number_that_is_not_finite_is_named(short, clip, tmp_path):
    run = Run(tmp_path, short, clip)
    row = dict.fromkeys(HISTORY_COLUMNS, 1)
    run.check_finite(row)
    for name, what in dict(loss='loss', norm='the gradient').items():
        for value in (float('nan'), float('inf')):
            message = f'{what} is {value} at step 1 of stage 1. The last good checkpoint is none'
            with pytest.raises(FloatingPointError, match=message):
                run.check_finite(row | {name: value})
    run.close()
