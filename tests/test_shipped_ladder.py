"The ladder that ships: its files agree with each other, are small enough, stand on the CLIP that ships, and a row comes out again by other code."
import csv, json
import numpy as np, pytest, torch
from PIL import Image
from conftest import ROOT
from risclip.clip import load_clip
from risclip.model import RUNGS, load_risclip
from risclip.refer import Refer
from risclip.refmoji import VERSION, refmoji_folder

FOLDER = ROOT/'data'/'ladder'
PLACES = sorted(FOLDER.glob('*-*'))
rows_in = lambda file: list(csv.DictReader(open(file, newline='')))


def test_the_files_agree():
    "results.csv has the rows of the runs and no others; the verdicts give the rows again; every rung has the same seeds."
    results = rows_in(FOLDER/'results.csv')
    assert results and list(results[0]) == 'set split kind rung seed miou oiou p50 p70 p90'.split()
    assert sorted(map(str, results)) == sorted(str(row) for place in PLACES for row in rows_in(place/'rows.csv'))
    for place in PLACES:
        rung, seed = place.name.split('-')
        told, run = rows_in(place/'expressions.csv'), json.loads((place/'run.json').read_text())
        mine = [r for r in results if (r['rung'], r['seed']) == (rung, seed)]
        assert {(r['set'], r['split']) for r in mine} == {('refmojig', 'test'), *((name, split) for name in ('refmoji', 'refmoji+') for split in ('testA', 'testB'))}
        assert run['settings']['seed'] == int(seed) and run['refmoji'] == VERSION and run['limit'] is None
        for r in mine:
            if r['set'] != 'refmojig': continue
            own = [t for t in told if r['kind'] in ('all', t['kind'])]
            assert 100*np.mean([float(t['iou']) for t in own]) == pytest.approx(float(r['miou']), abs=.05)
            for name, least in dict(p50=.5, p70=.7, p90=.9).items(): assert 100*np.mean([float(t['iou']) >= least for t in own]) == pytest.approx(float(r[name]), abs=.3)
    seeds = {rung: {int(r['seed']) for r in results if r['rung'] == rung} for rung in RUNGS}
    assert seeds['raw'] == {0} and all(seeds[rung] == seeds['ske'] for rung in RUNGS[1:])


def test_the_staircase_stands():
    "On refmojig's test split each trained rung is above the one before by more than the larger of the two spreads, and SKE's gain shows on relations."
    rows = [r for r in rows_in(FOLDER/'results.csv') if (r['set'], r['split']) == ('refmojig', 'test')]
    of = lambda rung, kind: np.array([float(r['miou']) for r in rows if (r['rung'], r['kind']) == (rung, kind)])
    def gain(low, high, kind):
        a, b = of(low, kind), of(high, kind)
        return b.mean() - a.mean(), max(np.ptp(a), np.ptp(b))
    assert len(of('ske', 'all')) >= 2
    for low, high in (('calibrated', 'adapters'), ('adapters', 'cfe'), ('cfe', 'ske'), ('ske', 'decoder')):
        step, spread = gain(low, high, 'all')
        assert step > spread, (low, high, step, spread)
    step, spread = gain('cfe', 'ske', 'relation')
    assert step > spread, (step, spread)


def test_it_is_small_and_stands_on_the_clip_that_ships():
    weights = [place/'weights.safetensors' for place in PLACES]
    assert sum(f.stat().st_size for f in weights) <= 25e6
    clip = load_clip('tinyclip')
    for place in PLACES: assert load_risclip(place, clip).settings.rung == place.name.split('-')[0] and json.loads((place/'run.json').read_text())['clip']['sha256'] == clip.sha256


@pytest.mark.parametrize('rung', ['adapters', 'decoder'])
def test_a_row_again_by_other_code(rung):
    "refmoji+ testB: the picture by Pillow, the model, the mask by torch's interpolation, all added up here."
    torch.set_num_threads(1)
    place = next(p for p in PLACES if p.name.startswith(rung))
    model, refer = load_risclip(place), Refer('refmoji+', root=refmoji_folder())
    threshold, ious, kinds = json.loads((place/'run.json').read_text())['threshold'], [], []
    mean, std = (np.float32(v) for v in (model.clip.mean, model.clip.std))
    side = (model.clip.size,)*2
    es = refer.expressions('testB')
    for i in range(0, len(es), 50):
        few = es[i:i + 50]
        pixels = np.stack([(np.asarray(refer.picture(e.image_id).convert('RGB').resize(side, Image.BICUBIC), np.float32)/255 - mean)/std for e in few])
        with torch.no_grad(): out = model(torch.from_numpy(pixels).permute(0, 3, 1, 2), model.clip.tokenize([e.text for e in few]))
        p = torch.sigmoid(out.grounding if rung == 'adapters' else out.mask) - threshold
        for e, one in zip(few, p):
            truth = refer.mask(e.ann_id)
            found = torch.nn.functional.interpolate(one[None], truth.shape, mode='bilinear', align_corners=False)[0, 0].numpy() >= 0
            ious.append((found & truth).sum()/(found | truth).sum())
    row, = (r for r in rows_in(FOLDER/'results.csv') if (r['set'], r['split'], r['kind'], r['rung'], r['seed']) == ('refmoji+', 'testB', 'all', rung, place.name.split('-')[1]))
    assert 100*np.mean(ious) == pytest.approx(float(row['miou']), abs=.05) and float(row['miou']) > 5
