"The trained model that ships: its numbers are those of its weights, computed again by other code, and it climbs as it should."
import json
from dataclasses import asdict
from functools import partial
import numpy as np, pytest, torch
from PIL import Image
from conftest import ROOT
from risclip.clip import load_clip
from risclip.model import load_risclip
from risclip.refer import Refer, ReferDataset
from risclip.refmoji import refmoji_folder
from risclip.scoring import evaluate
from risclip.training import UNTOLD, filled, maps_of, read_history, settings_of

FOLDER = ROOT/'data'/'risclip-refmojig'


@pytest.fixture(scope='module')
def clip(): return load_clip('tinyclip')


@pytest.fixture(scope='module')
def shipped(): return json.loads((FOLDER/'metrics.json').read_text())


def test_it_climbs(shipped):
    raw, grounding, mask = (shipped[name]['miou'] for name in ('raw', 'grounding', 'mask'))
    assert grounding > raw + 10 and mask > grounding + 2 and mask >= 60
    for name in ('raw', 'grounding', 'mask'):
        kinds = shipped['kinds'][name]
        assert abs(sum(k['miou']*k['n'] for k in kinds.values())/sum(k['n'] for k in kinds.values()) - shipped[name]['miou']) < .01


def test_it_is_the_run_that_it_says(clip):
    run = json.loads((FOLDER/'run.json').read_text())
    told = lambda settings: {k: v for k, v in settings.items() if k not in UNTOLD}
    assert told(filled(run['settings'])) == told(json.loads(json.dumps(asdict(settings_of('refmojig_long')))))
    assert json.loads((FOLDER/'config.json').read_text())['clip']['sha256'] == run['clip']['sha256'] == clip.sha256
    rows = read_history(FOLDER/'history.csv')
    assert [sum(r['stage'] == stage for r in rows) for stage in (1, 2)] == [run['settings'][f'stage{stage}_steps'] for stage in (1, 2)]


def test_its_card_shows_its_numbers(shipped):
    card = (FOLDER/'README.md').read_text()
    for name in ('raw', 'grounding', 'mask'): assert f"{shipped[name]['miou']:.2f}" in card


def test_its_metrics_by_other_code(clip, shipped):
    "Every 20th expression: pictures, masks, maps and IoU by numpy and PIL alone, beside the library's own scoring and the file."
    model, refer = load_risclip('risclip-refmojig', clip), Refer('refmojig', root=refmoji_folder())
    es = refer.expressions('test')[::20]
    ious = dict(grounding=[], mask=[])
    for e in es:
        picture, truth = refer.picture(e.image_id), refer.mask(e.ann_id)
        x = np.asarray(picture.convert('RGB').resize((clip.size,)*2, Image.BICUBIC), np.float32)/255
        x = torch.from_numpy((x - np.float32(clip.mean))/np.float32(clip.std)).permute(2, 0, 1)[None]
        with torch.no_grad(): out = model(x, clip.tokenize([e.text]))
        for name, logits in zip(ious, out):
            p = 1/(1 + np.exp(-logits[0, 0].double().numpy()))
            p = np.asarray(Image.fromarray(p.astype(np.float32)).resize(truth.shape[::-1], Image.BILINEAR)) if p.shape != truth.shape else p
            found = p >= shipped['thresholds'][name]
            ious[name].append((found & truth).sum()/max(1, (found | truth).sum()))
    dataset = ReferDataset(refer, 'test', clip.size, clip.tokenize, clip.mean, clip.std, expressions=es)
    ours = evaluate(partial(maps_of, model), dataset, thresholds=shipped['thresholds'])
    for name, values in ious.items():
        assert abs(100*np.mean(values) - ours[name].compute()['miou']) < .1
        assert abs(100*np.mean(values) - shipped[name]['miou']) < 3*100*np.std(values)/len(values)**.5     # three standard errors
