"What all tests share. One thread each: `-n 2` on two cores is then about twice as fast."
import os, shutil, subprocess
from pathlib import Path
import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')  # to the last bit the same: only the CPU promises that
os.environ['JUPYTER_PREFER_ENV_PATH'] = '1'   # a notebook's kernel is that of the running environment
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test waits for a download

ROOT = Path(__file__).resolve().parents[1]
LONG = 'test_training', 'test_model', 'test_notebook['


def source_files():
    "The checkout's own files, committed or not, without what git ignores; relative to ROOT."
    out = subprocess.run(['git','ls-files','-z','--cached','--others','--exclude-standard'], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(Path(f) for f in set(out.split('\0')) if f and (ROOT/f).is_file())


@pytest.fixture(scope='session')
def root(): return ROOT


@pytest.fixture
def copy(tmp_path):
    "A copy of the checkout that a test may spoil."
    for f in source_files():
        (tmp_path/'copy'/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/f, tmp_path/'copy'/f)
    return tmp_path/'copy'


def pytest_collection_modifyitems(items):
    "The longest first, so that two workers end at about the same time."
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))
