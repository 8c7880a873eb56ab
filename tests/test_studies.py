"""The studies beside the ladder: each changes what it names, and what is said of data that training
never showed is so, by the words and the masks in the files."""
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import narrow_clip_folder
from risclip.clip import load_clip
from risclip.jobs import ladder, perturbed_clip, run_job
from risclip.ladder import run_settings
from risclip.model import RUNGS
from risclip.refer import Refer
from risclip.refmoji import build_refmoji
from risclip.scenes import COLOUR_NAMES, NOUNS
from risclip.studies import (CHOICES, HELD_OUT, generalisation, new_set_folder, pair_groups,
                             studies, study_jobs)
from test_ladder import FEW, SPLITS


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return build_refmoji(tmp_path_factory.mktemp('data'), SPLITS, workers=1)


@pytest.fixture(scope='module')
def options(root, tmp_path_factory):
    "How small the runs are here: over a narrow CLIP, in this process."
    torch.set_num_threads(1)
    clip = narrow_clip_folder(tmp_path_factory.mktemp('narrow')/'clip')
    where = dict(root=str(root), clip=str(clip))
    return dict(preset='smoke', workers=0, progress=False) | FEW | where


# --- a CLIP without its alignment

def test_a_perturbed_clip():
    clip = load_clip('tinyclip')
    with pytest.raises(ValueError, match="variant='shaken': one of aligned, rotated, random"):
        perturbed_clip(clip, 'shaken')
    assert perturbed_clip(clip, 'aligned') is clip

    def differing(x, y):
        y = y.state_dict()
        return [name for name, v in x.state_dict().items() if not torch.equal(v, y[name])]
    for how in ('rotated', 'random'):
        a, b, c = (perturbed_clip(clip, how, seed=seed) for seed in (0, 0, 1))
        assert differing(a, b) == [] and 'image.proj' in differing(a, c)
        assert a.name == f'tinyclip, {how}' and a.sha256 is None
        assert not any(p.requires_grad for p in a.parameters()) and a.grid == clip.grid
        assert a.tokenize('a dog').tolist() == clip.tokenize('a dog').tolist()
        changed = differing(a, clip)
        if how == 'rotated':
            assert changed == ['image.proj']
            turned, straight = (x.image.proj @ x.image.proj.T for x in (a, clip))
            torch.testing.assert_close(turned, straight, atol=1e-4, rtol=1e-4)
        else:
            parts = {'.'.join(name.split('.')[:2]) for name in changed}
            assert parts >= {'image.conv1', 'image.blocks', 'image.proj'}
            assert parts >= {'text.blocks', 'text.proj'}


# --- studies

def test_each_study_changes_what_it_names():
    base = asdict(run_settings('decoder', 0))
    jobs = study_jobs(Path('a'), Path('b'))
    assert {study for study, _ in jobs} == {*CHOICES, 'alignment', 'alignment of values', 'ladder'}
    every = sum(jobs.values(), [])
    assert len({(job.folder, str(job)) for job in every}) == len(every)
    assert all(job.keep == () and job.sets == ('refmojig',) for job in every)

    def changed(job):
        own = asdict(job.settings)
        return {name: v for name, v in own.items() if v != base[name] and name != 'rung'}
    found = {key: changed(of_study[0]) for key, of_study in jobs.items()}
    assert found.pop(('alignment', 'rotated')) == found.pop(('alignment', 'random')) == {}
    short = {name: .6*base[name] for name in ('stage1_steps', 'stage2_steps')}
    wanted = {
        ('ladder', 'short'): {},
        ('value path', 'last block'): dict(attention='value'),
        ('value path', 'every block'): dict(attention='value_every'),
        ('CFE', 'last half'): dict(cfe_layers='last half'),
        ('label', 'any overlap'): dict(label='any'),
        ('scale and bias', 'fixed'): dict(learn_scale=False),
        ('loss', 'Dice alone'): dict(focal_weight=0.),
        ('loss', 'focal alone'): dict(dice_weight=0.),
        ('v1 to v4', 'spread'): dict(features=(1, 2, 4, 5)),
        ('alignment of values', 'aligned'): dict(attention='value_only'),
        ('alignment of values', 'rotated'): dict(attention='value_only')}
    wanted = {key: short | of_study for key, of_study in wanted.items()}
    wanted['stages', 'one'] = dict(stages=1, stage1_steps=sum(short.values()))
    assert found == wanted
    for (study, value), of_study in jobs.items():
        variant = value if study.startswith('alignment') else 'aligned'
        assert all(job.variant == variant for job in of_study)
    runs = [job.settings.rung for job in jobs['alignment', 'random']]
    assert runs == ['ske', 'cfe', 'adapters', 'raw']


def test_three_studies(options, tmp_path):
    "One stage, a short run, and raw CLIP over rotated towers; studies.csv has what is done."
    folder, runs = tmp_path/'results', tmp_path/'runs'
    changes = {name: v for name, v in options.items() if name not in ('workers', 'progress')}
    jobs = study_jobs(folder, runs, **changes)
    run_job(jobs['alignment', 'rotated'][-1])
    found = studies(folder, runs, which=('ladder', 'stages'), **options)
    every = found[found.kind == 'all']
    assert list(zip(every.study, every.value, every.rung)) == [
        ('ladder', 'short', 'ske'), ('ladder', 'short', 'decoder'),
        ('stages', 'one', 'ske'), ('stages', 'one', 'decoder'), ('alignment', 'rotated', 'raw')]
    assert (found.set == 'refmojig').all() and (found.split == 'test').all()
    pd.testing.assert_frame_equal(pd.read_csv(folder/'studies.csv'), found)
    lines = (folder/'studies.csv').read_text().splitlines()
    assert lines[0] == 'study,value,set,split,kind,rung,seed,miou,oiou,p50,p70,p90'
    own = (folder/'studies'/'ladder'/'short'/'ske-0'/'rows.csv').read_text().splitlines()[1:]
    assert lines[1:1 + len(own)] == [f'ladder,short,{line}' for line in own]
    left = {file.name for file in (folder/'studies').rglob('*') if file.is_file()}
    assert left == {'run.json', 'curve.csv', 'rows.csv'}                # no weights

    def stored(place): return json.loads((folder/'studies'/place/'run.json').read_text())
    one = stored('stages/one/decoder-0')['settings']
    short = stored('ladder/short/decoder-0')['settings']
    steps = ('stage1_steps', 'stage2_steps')
    assert [short[name] for name in steps] == [round(.6*FEW[name]) for name in steps]
    assert (one['stages'], one['stage1_steps']) == (1, sum(short[name] for name in steps))
    curve = pd.read_csv(folder/'studies'/'stages'/'one'/'decoder-0'/'curve.csv')
    assert list(curve.step) == [one['stage1_steps']]
    rotated = stored('alignment/rotated/raw-0')
    assert rotated['clip'] == dict(name=f'{options["clip"]}, rotated', pretrained=None, sha256=None)


# --- what training never showed

RELATIONS = ('left of', 'right of', 'left side of', 'right side of', 'above', 'over', 'below',
             'under', 'next to', 'beside', 'close to')


def test_beyond_what_training_shows(tmp_path):
    "Chains of one, two and three relations for the same things; crowds of seven and more."
    for what in ('chains', 'crowds'): new_set_folder(tmp_path, what, pictures=8)

    def files():        # but for the refs that the reader keeps
        found = [f for f in tmp_path.rglob('*') if f.is_file() and not f.match('refs(*).json')]
        return {f: f.read_bytes() for f in found}
    before = files()
    es = Refer('chains', 'umd', root=tmp_path).expressions('test')
    for e in es:
        assert sum(f' {e.text} '.count(f' {words} ') for words in RELATIONS) == int(e.kind[0])
    assert {e.kind for e in es} == {f'{n} in a chain' for n in (1, 2, 3)}
    for thing in {e.ann_id for e in es}:
        assert {e.kind[0] for e in es if e.ann_id == thing} == {'1', '2', '3'}
    crowds = Refer('crowds', 'umd', root=tmp_path)
    for e in crowds.expressions('test'):
        assert (len(crowds.things(e.image_id)) >= 7) == (e.kind == '7 and more things')
    assert {e.kind for e in crowds.expressions('test')} == {'7 and more things', '2 to 6 things'}
    for what in ('chains', 'crowds'): new_set_folder(tmp_path, what, pictures=8)      # it is there
    assert before == files()


@pytest.fixture(scope='module')
def beyond(options, tmp_path_factory):
    "(folder, runs, rows of generalisation.csv) of a small ladder of one seed."
    place = tmp_path_factory.mktemp('beyond')
    folder, runs = place/'results', place/'runs'
    ladder(folder, runs, seeds=(0,), **options)
    return folder, runs, generalisation(folder, runs, pictures=6, **options)


def test_generalisation(beyond):
    folder, runs, rows = beyond
    pd.testing.assert_frame_equal(pd.read_csv(folder/'generalisation.csv'), rows)
    assert list(rows) == ['part', 'kind', 'model', 'rung', 'seed', 'n', 'miou']
    kinds = {('chains', f'{n} in a chain') for n in (1, 2, 3)}
    kinds |= {('crowds', '7 and more things'), ('crowds', '2 to 6 things')}
    kinds |= {('pairs', 'lost pair'), ('pairs', 'other colour')}
    assert set(zip(rows.part, rows.kind)) == kinds
    assert set(rows.rung[rows.part == 'chains']) == set(RUNGS)
    pairs = rows[rows.part == 'pairs']
    both = {(model, rung) for model in ('ladder', 'without') for rung in ('ske', 'decoder')}
    assert set(zip(pairs.model, pairs.rung)) == both
    left = {file.name for file in (folder/'studies'/'without').rglob('*') if file.is_file()}
    assert left == {'run.json', 'curve.csv', 'rows.csv', 'expressions.csv'}


def test_no_lost_pair_is_trained_on(beyond, root):
    """By the words: no phrase of the train split that is left names a lost pair, of its referent or
    of another thing; phrases that went did."""
    whole, less = (Refer('refmojig', root=place) for place in (root, beyond[1]/'without'))

    def images(refer, split): return {e.image_id for e in refer.expressions(split)}
    assert images(whole, 'test') == images(less, 'test')
    assert images(less, 'train') < images(whole, 'train')
    pairs = []
    for name, colour in HELD_OUT.items(): pairs += [f' {colour} {noun} ' for noun in NOUNS[name]]

    def names_one(refer):
        texts = [f' {e.text} ' for e in refer.expressions('train')]
        return sum(any(pair in text for pair in pairs) for text in texts)
    assert names_one(less) == 0 < names_one(whole)
    assert less.info == whole.info


def test_the_groups_of_pairs(beyond, root):
    folder, _, rows = beyond
    whole = Refer('refmojig', root=root)
    groups = pair_groups(whole)
    expressions = pd.read_csv(folder/'decoder-0'/'expressions.csv')
    asked = 'part == "pairs" and model == "ladder" and rung == "decoder"'
    for row in rows.query(asked).itertuples():
        own = [r.iou for r in expressions.itertuples() if groups.get(r.sent_id) == row.kind]
        assert row.n == len(own) > 0 and row.miou == pytest.approx(100*np.mean(own), abs=1e-3)
    said = {}
    for e in whole.expressions('test'):
        nouns = '|'.join(NOUNS[e.category])
        for colour in COLOUR_NAMES:
            phrase = rf'(the |an? )?((large|big|small|little) )?{colour} ({nouns})'
            if re.match(phrase, e.text): said[e.sent_id] = colour == HELD_OUT[e.category]
    assert said and {s: groups[s] == 'lost pair' for s in said} == said
