"""The ladder that comes with risclip: its files agree with each other, are small enough, stand on
the CLIP that comes with risclip, and a row comes out again by other code."""
import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from risclip.clip import load_clip
from risclip.ladder import load_rungs
from risclip.model import RUNGS
from risclip.refer import Refer
from risclip.refmoji import VERSION, refmoji_folder

FOLDER = ROOT/'data'/'ladder'
PLACES = sorted(FOLDER.glob('*-*'))


def rows_in(file):
    with open(file, newline='') as f: return list(csv.DictReader(f))


def test_the_files_agree():
    """results.csv has the rows of the runs and no others; the expressions give the rows again;
    every rung has the same seeds."""
    results = rows_in(FOLDER/'results.csv')
    assert list(results[0]) == 'set split kind rung seed miou oiou p50 p70 p90'.split()
    of_runs = sum((rows_in(place/'rows.csv') for place in PLACES), [])
    assert sorted(map(str, results)) == sorted(map(str, of_runs))
    splits = {('refmojig', 'test')}
    for name in ('refmoji', 'refmoji+'): splits |= {(name, 'testA'), (name, 'testB')}
    for place in PLACES:
        rung, seed = place.name.split('-')
        expressions = rows_in(place/'expressions.csv')
        run = json.loads((place/'run.json').read_text())
        own = [r for r in results if (r['rung'], r['seed']) == (rung, seed)]
        assert {(r['set'], r['split']) for r in own} == splits
        assert run['settings']['seed'] == int(seed) and run['limit'] is None
        assert run['data_version'] == VERSION
        for r in own:
            if r['set'] != 'refmojig': continue
            of_kind = [e for e in expressions if r['kind'] in ('all', e['kind'])]
            ious = np.array([float(e['iou']) for e in of_kind])
            assert 100*ious.mean() == pytest.approx(float(r['miou']), abs=.05)
            for name, least in dict(p50=.5, p70=.7, p90=.9).items():
                assert 100*(ious >= least).mean() == pytest.approx(float(r[name]), abs=.3)
    seeds = {rung: {int(r['seed']) for r in results if r['rung'] == rung} for rung in RUNGS}
    assert seeds['raw'] == {0} and all(seeds[rung] == seeds['ske'] for rung in RUNGS[1:])


def test_the_staircase_stands():
    """On refmojig's test split each trained rung is above the one before by more than the larger of
    the two spreads, and SKE's gain shows on relations."""
    where = 'refmojig', 'test'
    rows = [r for r in rows_in(FOLDER/'results.csv') if (r['set'], r['split']) == where]

    def miou(rung, kind):
        own = [r for r in rows if (r['rung'], r['kind']) == (rung, kind)]
        return np.array([float(r['miou']) for r in own])

    def stands(low, high, kind):
        a, b = miou(low, kind), miou(high, kind)
        return b.mean() - a.mean() > max(np.ptp(a), np.ptp(b))
    assert len(miou('ske', 'all')) >= 2
    for low, high in zip(RUNGS[1:], RUNGS[2:]): assert stands(low, high, 'all'), (low, high)
    assert stands('cfe', 'ske', 'relation')


def test_it_is_small_and_stands_on_the_clip_that_ships():
    "The weights of seed 0 and no others; SKE's rung is in the decoder's."
    weights = sorted(FOLDER.rglob('*.safetensors'))
    names = sorted(f'{rung}-0' for rung in RUNGS if rung != 'ske')
    assert [file.parent.name for file in weights] == names
    assert sorted(file.parent.name for file in FOLDER.rglob('config.json')) == names
    assert sum(file.stat().st_size for file in FOLDER.rglob('*') if file.is_file()) <= 10e6
    models, clip = load_rungs(FOLDER), load_clip('tinyclip')
    assert [model.settings.rung for model, _ in models.values()] == list(models) == list(RUNGS)
    for model, _ in models.values(): assert model.trained_on['version'] == VERSION
    runs = [json.loads((place/'run.json').read_text()) for place in PLACES]
    assert all(run['clip']['sha256'] == clip.sha256 for run in runs)
    before = {place.name: run['threshold'] for place, run in zip(PLACES, runs)}
    assert all(threshold == before[f'{rung}-0'] for rung, (_, threshold) in models.items())


@pytest.mark.parametrize('rungs', [('adapters',), ('ske', 'decoder')], ids='-'.join)
def test_a_row_again_by_other_code(rungs):
    """refmoji+ testB: the picture by Pillow, the model, the mask by torch's interpolation, all
    added up here. SKE's map is the decoder's model's grounding."""
    torch.set_num_threads(1)
    models, refer = load_rungs(FOLDER), Refer('refmoji+', root=refmoji_folder())
    model, ious = models[rungs[-1]][0], {rung: [] for rung in rungs}
    mean, std = (np.float32(v) for v in (model.clip.mean, model.clip.std))
    side = (model.clip.size,)*2
    es = refer.expressions('testB')
    for i in range(0, len(es), 50):
        chunk, pixels = es[i:i + 50], []
        for e in chunk:
            picture = refer.picture(e.image_id).convert('RGB').resize(side, Image.BICUBIC)
            pixels.append((np.asarray(picture, np.float32)/255 - mean)/std)
        pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        with torch.no_grad(): out = model(pixels, model.clip.tokenize([e.text for e in chunk]))
        for rung in rungs:
            logits = out.mask if rung == 'decoder' else out.grounding
            above = torch.sigmoid(logits) - models[rung][1]
            for e, one in zip(chunk, above):
                truth = refer.mask(e.ann_id)
                full = torch.nn.functional.interpolate(one[None], truth.shape, mode='bilinear')
                found = full[0, 0].numpy() >= 0
                ious[rung].append((found & truth).sum()/(found | truth).sum())
    for rung in rungs:
        asked = 'refmoji+', 'testB', 'all', rung, '0'
        row, = (r for r in rows_in(FOLDER/'results.csv') if tuple(r.values())[:5] == asked)
        assert 100*np.mean(ious[rung]) == pytest.approx(float(row['miou']), abs=.05)
        assert float(row['miou']) > 5
