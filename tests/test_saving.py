"""A save is killed at every step: what loads afterwards is the whole old model or the whole new
one, and the next save goes through."""
import errno, os, shutil, subprocess, sys

import pytest

import risclip.hub
from risclip.model import RISCLIP, ModelSettings

KILLS = '''
import os, shutil, signal, sys
from itertools import count
from pathlib import Path

from risclip.model import RISCLIP

new, *starts = map(Path, sys.argv[1:])
model = RISCLIP.from_pretrained(new)

def save_until(step, folder):
    "Die by SIGKILL at this step: whatever Python is about to do with the folder counts as one."
    steps = iter(range(step))
    def watch(event, arguments):
        if str(folder) in str(arguments) and next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    model.save_pretrained(folder)
    os._exit(0)

for start in starts:
    for step in count():
        folder = start.parent/'killed'/f'step {step:02}'
        folder.parent.mkdir(exist_ok=True)
        if start.is_dir(): shutil.copytree(start, folder)
        if os.fork() == 0: save_until(step, folder)
        status = os.wait()[1]
        if status == 0: break
        if status != signal.SIGKILL: sys.exit('it was not the kill that ended it')
'''


STARTS = 'no model', 'a model', 'an unfinished save'


@pytest.fixture
def models(narrow_clip):
    "Three of one shape, so that a mixture loads: only where the bias starts tells them apart."
    def build(i):
        model = RISCLIP(ModelSettings('calibrated', bias=float(i), features=(1, 2)), narrow_clip)
        model.trained_on = dict(data=f'set {i}')
        return model.eval().requires_grad_(False)
    return dict(old=build(0), new=build(1), later=build(2))


def facts(model): return model.settings, model.trained_on, model.calibration.bias.item()


def loaded(folder, models, clip):
    "Which of the models is in the folder, as it loads; None: there is none."
    try: found = facts(RISCLIP.from_pretrained(folder, clip))
    except FileNotFoundError: return None
    names = [name for name, model in models.items() if facts(model) == found]
    assert names, f'{folder}: a mixture, {found}'
    return names[0]


def names(folder): return sorted(f.name for f in folder.iterdir())


def unfinished(folder, old, new):
    "A folder whose save of `new` was killed after the first move."
    old.save_pretrained(folder)
    new.save_pretrained(folder/'.saved')
    os.replace(folder/'.saved'/'config.json', folder/'config.json')
    return folder


def saves_again(folder, models, clip):
    models['later'].save_pretrained(folder)
    assert names(folder) == ['config.json', 'model.safetensors']
    assert loaded(folder, models, clip) == 'later'


@pytest.fixture
def killed(models, tmp_path):
    """Folders in which `new` was to be saved, one for each step at which that was killed, by what
    was there before."""
    models['new'].save_pretrained(tmp_path/'new')
    starts = {what: tmp_path/what/'before' for what in STARTS}
    for start in starts.values(): start.parent.mkdir()
    models['old'].save_pretrained(starts['a model'])
    unfinished(starts['an unfinished save'], models['later'], models['old'])
    command = [sys.executable, '-c', KILLS, tmp_path/'new', *starts.values()]
    subprocess.run(command, check=True, timeout=300)
    return {what: sorted((tmp_path/what/'killed').iterdir()) for what in STARTS}


def test_killed_at_any_step_a_save_is_whole_or_not_at_all(models, narrow_clip, killed):
    for what, folders in killed.items():
        found, left = [], set()
        for folder in folders:
            if (folder/'.saved').is_dir(): left.add(len(names(folder/'.saved')))
            again = folder.with_name('again')            # the next save, without a load before
            if folder.is_dir(): shutil.copytree(folder, again)
            saves_again(again, models, narrow_clip)
            shutil.rmtree(again)
            found.append(loaded(folder, models, narrow_clip))
            if found[-1]: assert not (folder/'.saved').exists()
            saves_again(folder, models, narrow_clip)
        first, turn = None if what == 'no model' else 'old', found.index('new')
        assert found[:turn] == [first]*turn and set(found[turn:]) == {'new'}, found
        assert turn > 5 and len(found) - turn > 3 and left == {0, 1, 2}    # all moments were met


def test_an_unfinished_save_that_cannot_be_finished_is_named(models, narrow_clip, tmp_path,
                                                             monkeypatch):
    folder = unfinished(tmp_path/'model', models['old'], models['new'])
    def read_only(*_): raise OSError(errno.EROFS, 'Read-only file system')
    monkeypatch.setattr(risclip.hub.os, 'replace', read_only)
    why = r'\.saved is an unfinished save.* \(Read-only file system\): make that folder writable'
    for use in (lambda: RISCLIP.from_pretrained(folder), lambda: RISCLIP.from_pretrained(tmp_path),
                lambda: models['later'].save_pretrained(folder)):
        with pytest.raises(OSError, match=why) as e: use()
        assert str(folder) in str(e.value) and e.value.errno == errno.EROFS
    monkeypatch.undo()
    shutil.copytree(folder, tmp_path/'copy')
    for place in (folder, tmp_path/'copy'): assert loaded(place, models, narrow_clip) == 'new'


@pytest.mark.parametrize('ahead', ['by one file', 'by all'])
def test_two_that_finish_a_save_together(models, narrow_clip, tmp_path, monkeypatch, ahead):
    "Processes that load the same model: the other is faster, and waits then, or finishes."
    models['old'].save_pretrained(tmp_path)
    models['new'].save_pretrained(tmp_path/'.saved')
    replace, seen = os.replace, []
    def other_first(*paths):
        if not seen:
            seen.append(paths)
            if ahead == 'by all': assert loaded(tmp_path, models, narrow_clip) == 'new'
            else: replace(*paths)
        replace(*paths)
    monkeypatch.setattr(risclip.hub.os, 'replace', other_first)
    assert loaded(tmp_path, models, narrow_clip) == 'new' and seen
    assert names(tmp_path) == ['config.json', 'model.safetensors']
