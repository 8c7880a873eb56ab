"""A whole model scored: any batch, any number of processes, from Python and from the command."""
import json, subprocess, sys
from dataclasses import replace

import pytest
from accelerate import Accelerator, PartialState

import risclip.evaluation as evaluation
from risclip.evaluation import (evaluate_model, open_refer, refer_of, risclip_evaluate,
                                shard_expressions, spread_expressions, table, training_refer)
from risclip.model import RISCLIP
from training_runs import ENV, data_root, finished, narrow, smoke   # noqa: F401  fixtures


# --- the data

def test_the_data_of_a_run(narrow):
    refer = refer_of(narrow)
    assert training_refer(narrow, refer) is refer
    both = training_refer(replace(narrow, also=('refmoji/unc', 'refmoji+')), refer)
    assert repr(both).startswith('JointRefer(refmojig umd, refmoji unc, refmoji+ unc)')
    alone = [open_refer(name, None, narrow.root) for name in ('refmojig', 'refmoji', 'refmoji+')]
    objects = sum(len(r.objects('train')) for r in alone)
    joined = {e.ref_id for e in both.expressions('train')}
    assert len(joined) + both.dropped == objects
    with pytest.raises(ValueError, match="no split 'testA'"):
        refer_of(replace(narrow, test='testA'))
    with pytest.raises(OSError, match='make data'): open_refer('refmojig', None, 'nowhere')


def test_a_limit_is_spread_over_the_split(narrow):
    refer = refer_of(narrow)
    every = refer.expressions('test')
    assert spread_expressions(refer, 'test') == spread_expressions(refer, 'test', 10**6) == every
    few = spread_expressions(refer, 'test', 5)
    assert len(few) == 5 and (few[0], few[-1]) == (every[0], every[-1])


# --- scores

def test_scoring_takes_so_many_phrases_at_a_time(finished, narrow, monkeypatch):
    "As its option says; the numbers stay as they are."
    sizes, maps_of = [], evaluation.maps_of
    def counting(model, batch):
        sizes.append(len(batch.index))
        return maps_of(model, batch)
    monkeypatch.setattr(evaluation, 'maps_of', counting)
    folder, metrics = finished
    found = evaluate_model(RISCLIP.from_pretrained(folder), refer_of(narrow), 'test', limit=12,
                           batch_size=5, thresholds=metrics['thresholds'], progress=False)
    assert sizes == [5, 5, 2] and abs(found['mask']['miou'] - metrics['mask']['miou']) < .1


@pytest.fixture
def as_process(monkeypatch):
    "Let this process play number `rank` of `n`; called, it gives the accelerator."
    accelerator = Accelerator(cpu=True)
    def play(rank, n):
        for name, value in ('process_index', rank), ('num_processes', n):
            monkeypatch.setattr(PartialState(), name, value)
        return accelerator
    return play


def test_the_pictures_are_shared_between_processes(narrow, as_process):
    "All phrases of a picture by the same one; each takes as many pictures as the others."
    expressions = refer_of(narrow).expressions('test')
    pictures = {e.image_id for e in expressions}
    for n in (1, 2, 3, 7, len(pictures) + 1):
        images = []
        for rank in range(n):
            shard = shard_expressions(expressions, as_process(rank, n))
            images.append({expressions[row].image_id for row in shard})
            assert shard == [i for i, e in enumerate(expressions) if e.image_id in images[-1]]
        assert set().union(*images) == pictures and len(images[0]) == -(-len(pictures)//n)
        twice = sum(map(len, images)) - len(pictures)
        assert 0 <= twice < n and min(map(len, images)) > 0


@pytest.mark.parametrize('limit', [1, 11])
def test_what_processes_have_scored_becomes_one_again(finished, narrow, monkeypatch, as_process,
                                                      limit):
    "Played in this one: both shards scored, then gathered, are the scores of the whole."
    folder, metrics = finished
    refer, model = refer_of(narrow), RISCLIP.from_pretrained(folder)
    options = dict(limit=limit, thresholds=metrics['thresholds'], progress=False, batch_size=64)
    whole, _ = evaluation.score_model(model, refer, 'test', **options)
    said = []
    monkeypatch.setattr(evaluation, 'gather_object', lambda rows: said.append(rows) or rows)
    for rank in (0, 1):
        evaluation.score_model(model, refer, 'test', accelerator=as_process(rank, 2), **options)
    for k, scores in enumerate(whole.values()):                      # of each map
        both = said[k + len(whole)] + said[k]                        # in whatever order
        monkeypatch.setattr(evaluation, 'gather_object', lambda _: both)
        found = evaluation.gather_metrics(scores, range(limit))
        assert found.rows == scores.rows and len(found.rows) == limit


# --- the command

def test_evaluate_command(finished, data_root, tmp_path):
    """As a process, from a folder, to a file. Nobody asks Accelerate whether it is one of several:
    processes that `notebook_launcher` starts later would take the answer for theirs."""
    folder, metrics = finished
    code = ('from accelerate import PartialState\n'
            'from risclip.evaluation import risclip_evaluate\n'
            'risclip_evaluate()\n'
            'assert PartialState._shared_state == {}')
    (tmp_path/'command.py').write_text(code)
    command = [sys.executable, tmp_path/'command.py', folder, '--root', data_root, '--limit', '12',
               '--out', tmp_path/'out.json', '--set', 'eval_batch_size=64', '--set', 'workers=0']
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path/'out.json').read_text()) == metrics
    assert table(metrics) in done.stdout


def test_evaluate_another_set_and_protocol(finished, data_root, capsys):
    given = dict(data='refmoji', root=str(data_root))
    risclip_evaluate(finished[0], split='testB', protocol='lavt', limit=4, **given)
    assert 'mask' in capsys.readouterr().out
    with pytest.raises(ValueError, match="no split 'test', but only testA and testB"):
        risclip_evaluate(finished[0], debug=True, **given)


def test_clip_alone_needs_no_training(narrow, data_root, capsys):
    changes = [f'clip={narrow.clip}', 'test_limit=6']
    risclip_evaluate(preset='smoke', rung='raw', root=str(data_root), set=changes)
    said = capsys.readouterr().out
    assert 'raw' in said and 'grounding' not in said and 'mask' not in said


@pytest.mark.parametrize('given, said', [
    (dict(), 'name the folder of a trained model, or --preset'),
    (dict(folder='x', rung='cfe'), '--rung cfe needs --preset'),
    (dict(folder='nowhere/at/all'), 'nowhere/at/all'),
    (dict(folder='risclip-refmojig', set=['stage1_lr=1']), 'stage1_lr is a setting of training'),
    (dict(folder='risclip-refmojig', set=['eval_batch=1']), "did you mean 'eval_batch_size'"),
    (dict(folder='risclip-refmojig', data='refcocq'), 'refcocq'),
    (dict(preset='smoke', rung='raw', out='/proc/no/out.json'), '/proc/no cannot be written')])
def test_the_command_says_errors_in_one_line(given, said, capsys):
    with pytest.raises(SystemExit) as e: risclip_evaluate(**given)
    error = capsys.readouterr().err
    assert e.value.code == 1 and error.count('\n') == 1
    assert error.startswith('risclip_evaluate: error: ') and said in error
