"""What the tests of training share: a small RefMoji, settings over a narrow CLIP, runs that nobody
killed, and the command as a process of its own."""
import os, signal, subprocess, sys, time
from dataclasses import replace

import pytest, torch

from conftest import ROOT, narrow_clip_folder
from risclip.refmoji import build_refmoji
from risclip.runs import read_history
from risclip.settings import settings_of
from risclip.training import train

ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
MADE = {}                                        # one of each for all files of a test process


@pytest.fixture(scope='session')
def data_root(tmp_path_factory):
    "A RefMoji of some dozen pictures."
    if 'data' not in MADE:
        pictures = dict(train=40, val=4, test=12, testA=3, testB=3)
        MADE['data'] = build_refmoji(tmp_path_factory.mktemp('data'), pictures, workers=1,
                                     progress=False)
    return MADE['data']


@pytest.fixture(scope='session')
def smoke(data_root):
    "A short run through both stages, over the CLIP that comes with risclip."
    return settings_of('smoke', root=str(data_root), stage1_steps=12, stage2_steps=8,
                       stage1_batch_size=4, test_limit=12)


@pytest.fixture(scope='session')
def narrow(smoke, tmp_path_factory):
    "The same over a CLIP so narrow that a run takes a second."
    if 'narrow' not in MADE:
        MADE['narrow'] = narrow_clip_folder(tmp_path_factory.mktemp('narrow')/'clip')
    return replace(smoke, clip=str(MADE['narrow']), features=(1, 2), cfe_dim=16, num_heads=2,
                   ske_mlp_dim=16, decoder_width=8)


@pytest.fixture(scope='session')
def two_stages(narrow):
    "A very short run through both stages."
    return replace(narrow, stage1_steps=4, stage2_steps=4, save_every=2, stage1_batch_size=2,
                   stage2_batch_size=2, test_limit=4)


@pytest.fixture(scope='session')
def short(narrow):
    "Four steps of stage 1, each saved."
    return replace(narrow, rung='adapters', stage1_steps=4, save_every=1)


def whole_run(name, s, tmp_path_factory):
    "(folder, metrics) of a run that nobody killed."
    if name not in MADE:
        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp('runs')/name
        MADE[name] = folder, train(s, folder, progress=False)
    return MADE[name]


@pytest.fixture(scope='session')
def finished(narrow, tmp_path_factory): return whole_run('finished', narrow, tmp_path_factory)


@pytest.fixture(scope='session')
def finished_tinyclip(smoke, tmp_path_factory): return whole_run('tiny', smoke, tmp_path_factory)


def names(folder): return sorted(p.name for p in (folder/'checkpoints').iterdir())


def losses_of(folder, stage):
    return [r['loss'] for r in read_history(folder/'history.csv') if r['stage'] == stage]


# --- the command, as a process

COMMAND = '''
import os
import risclip.runs as runs
from risclip.training import risclip_train
if os.environ.get('DIES') == 'while it saves':
    save_file, calls = runs.save_file, iter(range(99))
    def dying(state, file, **k):
        save_file(state, file, **k)
        if next(calls) == 1:
            file.write_bytes(file.read_bytes()[:1000])     # half a file, and then
            os.kill(os.getpid(), 9)
    runs.save_file = dying
risclip_train()
'''


def train_command(s, folder, *options, dies='', launcher=()):
    """`risclip_train` with these settings, as a process; a file like those that pip makes for
    console scripts."""
    script = folder.parent/'command.py'
    script.write_text(COMMAND)
    given = [f'clip={s.clip}', f'root={s.root}', f'features={",".join(map(str, s.features))}']
    for name in ('stage1_steps', 'stage2_steps', 'stage1_batch_size', 'test_limit', 'cfe_dim',
                 'num_heads', 'ske_mlp_dim', 'decoder_width', 'rung'):
        given.append(f'{name}={getattr(s, name)}')
    sets = [word for option in given for word in ('--set', option)]
    command = [sys.executable, *launcher, script, '--preset', 'smoke', '--folder', folder]
    return subprocess.Popen([*command, *sets, *options], env=ENV | dict(DIES=dies), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)       # so that nothing is left behind


def two_processes(s, folder):
    "The command in two processes, as a launcher starts them."
    launcher = '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'
    return train_command(s, folder, launcher=launcher)


def wait_for(process, folder, stage, rows):
    "Until the history has so many rows of a stage."
    end, file = time.monotonic() + 300, folder/'history.csv'
    while process.poll() is None and time.monotonic() < end:
        lines = file.read_text().splitlines() if file.exists() else []
        if sum(line.startswith(f'{stage},') for line in lines) >= rows: return
        time.sleep(.01)
    raise AssertionError(f'stage {stage} was not reached:\n{process.communicate()[0][-2000:]}')


def kill(process):
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
