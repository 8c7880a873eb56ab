"""The trained model that comes with risclip: its numbers are those of its weights, computed again
by other code, and it climbs as it should."""
import json
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from risclip.clip import load_clip
from risclip.dataset import ReferDataset
from risclip.evaluation import maps_of
from risclip.model import RISCLIP
from risclip.refer import Refer
from risclip.refmoji import VERSION, refmoji_folder
from risclip.runs import NOT_IN_RESULT, read_history, with_defaults
from risclip.scoring import evaluate
from risclip.settings import settings_of

FOLDER = ROOT/'data'/'risclip-refmojig'
MAPS = 'raw', 'grounding', 'mask'


@pytest.fixture(scope='module')
def clip(): return load_clip('tinyclip')


@pytest.fixture(scope='module')
def shipped(): return json.loads((FOLDER/'metrics.json').read_text())


def test_it_climbs(shipped):
    raw, grounding, mask = (shipped[name]['miou'] for name in MAPS)
    assert grounding > raw + 10 and mask > grounding + 2 and mask >= 60
    for name in MAPS:
        kinds = shipped['kinds'][name].values()
        mean = sum(kind['miou']*kind['n'] for kind in kinds)/sum(kind['n'] for kind in kinds)
        assert abs(mean - shipped[name]['miou']) < .01


def test_it_is_the_run_that_it_says(clip):
    run = json.loads((FOLDER/'run.json').read_text())
    config = json.loads((FOLDER/'config.json').read_text())

    def deciding(settings): return {k: v for k, v in settings.items() if k not in NOT_IN_RESULT}
    preset = json.loads(json.dumps(asdict(settings_of('refmojig_long'))))
    assert deciding(with_defaults(run['settings'])) == deciding(preset)
    assert config['backbone']['sha256'] == run['clip']['sha256'] == clip.sha256
    assert config['trained_on']['version'] == run['data_version'] == VERSION
    steps = [row['stage'] for row in read_history(FOLDER/'history.csv')]
    wanted = [run['settings'][f'stage{stage}_steps'] for stage in (1, 2)]
    assert [steps.count(stage) for stage in (1, 2)] == wanted


def test_its_card_shows_its_numbers(shipped):
    card = (FOLDER/'README.md').read_text()
    for name in MAPS: assert f"{shipped[name]['miou']:.2f}" in card


def test_its_metrics_by_other_code(clip, shipped):
    """Every 20th expression: pictures, masks, maps and IoU by numpy and PIL alone, beside the
    library's own scoring and the file."""
    model = RISCLIP.from_pretrained('risclip-refmojig', clip)
    refer = Refer('refmojig', root=refmoji_folder())
    es = refer.expressions('test')[::20]
    ious = dict(grounding=[], mask=[])
    for e in es:
        picture, truth = refer.picture(e.image_id), refer.mask(e.ann_id)
        small = picture.convert('RGB').resize((clip.size,)*2, Image.BICUBIC)
        x = (np.asarray(small, np.float32)/255 - np.float32(clip.mean))/np.float32(clip.std)
        pixels = torch.from_numpy(x).permute(2, 0, 1)[None]
        with torch.no_grad(): out = model(pixels, clip.tokenize([e.text]))
        for name, logits in zip(ious, out):
            p = 1/(1 + np.exp(-logits[0, 0].double().numpy()))
            if p.shape != truth.shape:
                p = Image.fromarray(p.astype(np.float32)).resize(truth.shape[::-1], Image.BILINEAR)
            found = np.asarray(p) >= shipped['thresholds'][name]
            ious[name].append((found & truth).sum()/max(1, (found | truth).sum()))
    dataset = ReferDataset(refer, 'test', clip, expressions=es)
    ours = evaluate(partial(maps_of, model), dataset, thresholds=shipped['thresholds'])
    for name, values in ious.items():
        miou, error = 100*np.mean(values), 100*np.std(values)/len(values)**.5
        assert abs(miou - ours[name].compute()['miou']) < .1
        assert abs(miou - shipped[name]['miou']) < 3*error
