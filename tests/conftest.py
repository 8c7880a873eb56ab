"What all tests share. One thread each: `-n 2` on two cores is then about twice as fast."
import json, os, shutil, subprocess
from pathlib import Path

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')  # only the CPU promises the same last bit
# a notebook's kernel is that of the running environment
os.environ['JUPYTER_PREFER_ENV_PATH'] = '1'
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test waits for a download

ROOT = Path(__file__).resolve().parents[1]


def source_files():
    "The checkout's own files, committed or not, without what git ignores; relative to ROOT."
    listed = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    out = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(Path(f) for f in set(out.split('\0')) if f and (ROOT/f).is_file())


def narrow_clip_folder(folder, image_blocks=2, text_blocks=2, seed=0):
    """A real CLIP with random weights, in open_clip's local-dir layout: 32 pixels, patches of 8, 16
    wide. It stands under tests that do not depend on the size of the model; a step takes
    milliseconds."""
    import open_clip
    import torch
    from safetensors.torch import save_file
    vision = dict(image_size=32, patch_size=8, width=16, layers=image_blocks, head_width=8)
    text = dict(context_length=32, vocab_size=49408, width=16, heads=2, layers=text_blocks)
    config = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    preprocess = dict(mean=[.5]*3, std=[.25]*3, interpolation='bicubic', resize_mode='squash')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = json.dumps(dict(model_cfg=config, preprocess_cfg=preprocess))
    (folder/'open_clip_config.json').write_text(written)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = open_clip.CLIP(**config).state_dict()
    save_file(state, folder/'open_clip_model.safetensors')
    return folder


@pytest.fixture(scope='session')
def narrow_clip(tmp_path_factory):
    "`narrow_clip_folder` as CLIPTowers."
    from risclip.clip import load_clip
    return load_clip(narrow_clip_folder(tmp_path_factory.mktemp('narrow')/'clip'))


@pytest.fixture(scope='session')
def root(): return ROOT


@pytest.fixture
def copy(tmp_path):
    "A copy of the checkout that a test may spoil."
    for f in source_files():
        (tmp_path/'copy'/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/f, tmp_path/'copy'/f)
    return tmp_path/'copy'


# Longest first: two workers then end at about the same time.
LONG = ('test_training', 'test_runs', 'test_settings', 'test_evaluation', 'test_notebooks',
        'test_refmoji', 'test_paper_scale', 'test_ladder', 'test_studies', 'test_predictor',
        'test_browser', 'test_exercises', 'test_shipped_ladder', 'test_benchmark')
# What a file builds once its tests share, so they stay in one worker; four files share one run.
SHARED = dict.fromkeys(LONG[:4], 'training')
FREE = 'test_notebooks', 'test_house', 'test_reference', 'test_repository'


def pytest_collection_modifyitems(items):
    "The longest files first; each file in one worker, but for those whose tests are independent."
    def place(item): return LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)
    items.sort(key=place)
    for item in items:
        file = item.path.stem
        if file not in FREE: item.add_marker(pytest.mark.xdist_group(SHARED.get(file, file)))
