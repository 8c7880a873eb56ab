"""Settings: every value is checked, every name told the nearest right one, from Python, a command
and a notebook."""
import ast, copy, json, pickle
from dataclasses import asdict, fields, replace

import nbformat, pytest

from conftest import ROOT
from risclip.evaluation import table
from risclip.settings import PRESETS, Settings, changes_of, given_names, settings_in, settings_of
from risclip.training import risclip_train

NEAR = dict(stage1_step='stage1_steps', stage1lr='stage1_lr', cfe_layer='cfe_layers')


def test_names_are_checked():
    for wrong, near in NEAR.items():
        message = f"no setting '{wrong}', did you mean '{near}'"
        with pytest.raises(ValueError, match=message): settings_of('smoke', **{wrong: 1})
        with pytest.raises(ValueError, match=message): changes_of([f'{wrong}=1'])
        with pytest.raises(ValueError, match=message): Settings(**{wrong: 1})
    with pytest.raises(ValueError, match="no preset 'refmoji', did you mean 'refmojig'"):
        settings_of('refmoji')
    for preset in PRESETS: settings_of(preset)
    before = dict(a=1, table=table)
    assert given_names(before, before | dict(b=2, _i=3)) == dict(b=2)
    assert given_names(before, before | dict(table=5)) == dict(table=5)


WRONG = [dict(stage1_batch_size=0), dict(save_every=0), dict(stage1_steps=-1), dict(label='mean'),
         dict(stages=3), dict(precision='fp16'), dict(stage1_lr='1e-3'), dict(seed=1.5),
         dict(also='refcoco'), dict(also=('refcoco', 3)), dict(stage2_batch_size=0),
         dict(test_limit=0), dict(test_limit=-3), dict(warmup=-1), dict(workers=-1),
         dict(recompute=1), dict(alpha=2.), dict(gamma=-1.), dict(features='[1, 2, 3, 4]'),
         dict(features=(1.5,)), dict(rung='sek'), dict(accumulate=True), dict(clip=5)]


@pytest.mark.parametrize('wrong', WRONG, ids=str)
def test_values_are_checked(wrong):
    "In one line that names the field and the value."
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=name) as e: settings_of('smoke', **wrong)
    assert '\n' not in str(e.value) and type(e.value) is ValueError
    with pytest.raises(ValueError, match=name): replace(settings_of('smoke'), **wrong)


def test_what_is_allowed_is_said():
    said = dict(stage1_batch_size="=0: it should be greater than 0", precision="'no' or 'bf16'",
                also='for papermill -y "also:', stage1_lr='it should be a valid number')
    for wrong in WRONG:
        (name, value), = wrong.items()
        if name not in said: continue
        with pytest.raises(ValueError) as e: settings_of('smoke', **wrong)
        if value != ('refcoco', 3): assert said.pop(name) in str(e.value)
    assert not said
    with pytest.raises(ValueError, match='stage1_steps=0.*warmup=-1'):
        settings_of('smoke', stage1_steps=0, warmup=-1)


def test_settings_are_a_dataclass():
    "Copied, replaced, compared, pickled, written to JSON and read again."
    s = settings_of('refcocog_umd_b16', also=['refcoco/unc'], cfe_layers=4)
    assert s.also == ('refcoco/unc',) and s.features == (1, 2, 3, 4)
    for other in (copy.deepcopy(s), pickle.loads(pickle.dumps(s)), replace(s),
                  Settings(**asdict(s)), Settings(**json.loads(json.dumps(asdict(s))))):
        assert other == s and type(other) is Settings
    assert replace(s, seed=1) != s
    assert [f.name for f in fields(Settings)][:3] == ['rung', 'clip', 'pretrained']


def test_every_setting_can_be_said_as_text():
    "As --set takes it: what is written is what is read."
    for preset in ('smoke', 'refcocog_umd_l14'):
        s = settings_of(preset, also=('refcoco/unc', 'refcoco+/unc'))
        for name, value in asdict(s).items():
            texts = [str(value)]
            if isinstance(value, tuple): texts.append(','.join(map(str, value)))
            for text in texts:
                found = changes_of([f'{name}={text}'])[name]
                assert found == value and type(found) is type(value), (name, text, found)
    with pytest.raises(ValueError, match='--set workers: it should be --set name=value'):
        changes_of(['workers'])
    assert changes_of(None) == {}
    assert changes_of(['root=/a=b', 'cfe_layers=last half']) == dict(root='/a=b',
                                                                     cfe_layers='last half')


def test_the_train_command_takes_every_setting(capsys):
    given = ['size=64', 'clip=ViT-B-32', 'stage1_steps=7', 'also=refcoco/unc,refcoco+/unc']
    risclip_train('smoke', rung='calibrated', set=given, dry_run=True)
    said = capsys.readouterr().out
    assert 'ViT-B-32 64 px, rung calibrated, refmojig + refcoco/unc + refcoco+/unc' in said
    assert 'stage 1: 7 steps' in said


@pytest.mark.parametrize('given', [dict(preset='smok'), dict(set=['stage1_step=5']),
                                   dict(set=['workers=-1']), dict(set=['seed=x']),
                                   dict(rung='sek'), dict(set=['clip=tinyklip'], dry_run=True)])
def test_the_train_command_says_errors_in_one_line(given, tmp_path, capsys):
    with pytest.raises(SystemExit) as e: risclip_train(**given, folder=str(tmp_path/'run'))
    said = capsys.readouterr().err
    assert e.value.code == 1 and said.count('\n') == 1
    assert said.startswith('risclip_train: error: ')
    with pytest.raises((ValueError, OSError)):
        risclip_train(**given, folder=str(tmp_path/'run'), debug=True)
    assert not (tmp_path/'run').exists()


# --- from a notebook

def parameters(notebook):
    "The names and values of its cell of parameters."
    cells = nbformat.read(ROOT/'nbs'/'runs'/notebook, 4).cells
    cell, = (c for c in cells if 'parameters' in c.metadata.get('tags', []))
    lines = ast.parse(cell.source).body
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def test_the_notebook_offers_every_setting():
    given = parameters('train.ipynb')
    settings = [f.name for f in fields(Settings)]
    assert list(given) == ['preset', 'folder', 'processes', *settings]
    assert given.pop('preset') == 'smoke' and given.pop('processes') == 1
    assert set(given.values()) == {None}


def test_papermill_with_a_mistyped_name_stops_before_the_work(tmp_path):
    import papermill
    given = dict(stage1_stpes=3, folder=str(tmp_path/'run'))
    message = "no setting 'stage1_stpes', did you mean 'stage1_steps'"
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        papermill.execute_notebook(ROOT/'nbs'/'runs'/'train.ipynb', tmp_path/'out.ipynb', given,
                                   progress_bar=False, kernel_name='python3', cwd=str(tmp_path))
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('notebook, wrong, near', [('evaluate', 'limt', 'limit'),
                                                   ('pretrain', 'stpes', 'steps')])
def test_a_mistyped_name_stops_the_other_notebooks(notebook, wrong, near):
    "The cells up to the check of the names, with a name too much, as papermill writes it."
    cells = [c for c in nbformat.read(ROOT/'nbs'/'runs'/f'{notebook}.ipynb', 4).cells
             if c.cell_type == 'code']
    spot = next(i for i, c in enumerate(cells) if 'parameters' in c.metadata.get('tags', []))
    sources = [c.source for c in cells]
    variables = {}
    for source in sources[:spot + 1] + [f'{wrong} = 3']: exec(source, variables)
    with pytest.raises(ValueError, match=f"no setting '{wrong}', did you mean '{near}'"):
        exec(sources[spot + 1], variables)


def test_the_settings_of_a_notebook():
    before = dict(table=table)
    given = before | dict(preset='smoke', folder='here', seed=7, rung=None, also=['refcoco/unc'])
    s = settings_of('smoke', seed=7, also=('refcoco/unc',))
    assert settings_in(before, given) == (s, 'here')
    with pytest.raises(ValueError, match="no setting 'presett', did you mean 'preset'"):
        settings_in(before, given | dict(presett='ladder'))
