"""Each notebook runs from top to bottom, in a process of its own, and leaves the checkout as it
was.

The processes are forked off one that has the large packages loaded, so that none waits seconds for
them. A notebook whose outputs are stamped as those of today's code and data is not run again,
unless ALL=1 is set; see tools/stamps.py."""
import ast, os, sys, traceback
from multiprocessing import get_context

import nbformat, pytest
from nbclient import NotebookClient

from conftest import ROOT, source_files

sys.path.insert(0, str(ROOT/'tools'))
import stamps

NBS = ROOT/'nbs'
EVERY = sorted(p.relative_to(NBS).with_suffix('').as_posix() for p in NBS.rglob('*.ipynb')
               if '.ipynb_checkpoints' not in p.parts)
STAMPED = stamps.stamped()
RUNS = [name for name in EVERY if name.startswith('runs/')]   # templates: committed without outputs
BY_KERNEL = 'notation'                                        # one by Jupyter's own way
LOADED = ['torch', 'open_clip', 'matplotlib.pyplot', 'accelerate', 'pandas', 'execnb.shell',
          'fastcore.test', 'ipywidgets', 'torch.utils.tensorboard']


def read(name): return nbformat.read(NBS/f'{name}.ipynb', 4)


def times(): return {f: (ROOT/f).stat().st_mtime_ns for f in source_files()}


def run_cells(sources, place, answer):
    "In a forked process: run the cells as nbdev_test does; what went wrong goes to `answer`."
    os.chdir(place)
    import torch
    from execnb.shell import CaptureShell
    torch.set_num_threads(1)
    shell = CaptureShell()
    for source in sources:
        shell.run_cell(source)
        if shell.exc:
            lines = traceback.format_exception(shell.exc)
            answer.put(source + '\n\n' + ''.join(lines))
            return
    answer.put('')


def run_forked(name, place):
    "Run a notebook's cells; raises AssertionError with the cell and its traceback."
    context = get_context('forkserver')
    context.set_forkserver_preload(LOADED)
    answer = context.Queue()
    sources = [c.source for c in read(name).cells if c.cell_type == 'code']
    process = context.Process(target=run_cells, args=(sources, str(place), answer))
    process.start()
    try: said = answer.get(timeout=900)
    finally:
        process.join(20)
        process.kill()
    assert not said, said


def in_scratch(name, tmp_path):
    "A folder where what a notebook writes beside itself may go."
    place = (tmp_path/'nbs'/name).parent
    place.mkdir(parents=True)
    return place


# an exercise is run by test_exercises, with its solutions
FORKED = [name for name in EVERY if not name.startswith('exercises/') and name != BY_KERNEL]


@pytest.mark.parametrize('name', FORKED)
def test_notebook(name, tmp_path):
    fits = name in STAMPED and not stamps.misfit(name)
    if fits and not os.environ.get('ALL'):
        pytest.skip('its stamp fits: these are the outputs of this code')
    before = times()
    run_forked(name, in_scratch(name, tmp_path))
    assert times() == before


def test_notebook_by_kernel(tmp_path):
    "As JupyterLab runs it."
    nb, place, before = read(BY_KERNEL), in_scratch(BY_KERNEL, tmp_path), times()
    resources = dict(metadata=dict(path=str(place)))
    NotebookClient(nb, timeout=900, kernel_name='python3', resources=resources).execute()
    assert times() == before


@pytest.mark.parametrize('name', STAMPED)
def test_outputs_are_those_of_this_code(name):
    "No chapter shows the output of code that is gone: `make outputs` runs it again."
    assert stamps.misfit(name) == ''


def test_a_stamp_notices(monkeypatch, tmp_path):
    "Code, a module two imports away, and data that it reads; not a comment."
    name = '05_clip'
    first = stamps.stamp(name, ['tinyclip'])
    held = {part: getattr(stamps, part) for part in ('code_cells', 'tracked')}

    monkeypatch.setattr(stamps, 'code_cells', lambda n: [*held['code_cells'](n), '# a comment'])
    assert stamps.stamp(name, ['tinyclip'])['modules'] == first['modules']
    monkeypatch.setattr(stamps, 'code_cells', lambda n: [*held['code_cells'](n), 'x = 1'])
    assert stamps.stamp(name, ['tinyclip'])['code'] != first['code']
    monkeypatch.undo()

    assert {'files', 'clip'} <= set(stamps.modules_of(stamps.code_cells('12_risclip')))
    commented, documented = 'def f(): return 1  # one', 'def f():\n    "One."\n    return 1'
    assert stamps.plain(commented) == stamps.plain(documented)
    assert stamps.plain('x = 1') != stamps.plain('x = 2')

    other = tmp_path/'weights'
    other.write_bytes(b'other')
    monkeypatch.setattr(stamps, 'ROOT', tmp_path)
    monkeypatch.setattr(stamps, 'tracked', lambda folder: [other])
    before = stamps.data_checksum(['tinyclip'])
    other.write_bytes(b'another')
    assert stamps.data_checksum(['tinyclip']) != before


@pytest.mark.parametrize('name', RUNS)
def test_parameters_are_the_smoke_size(name):
    """A run's notebook has one parameters cell of plain values, and `preset`, where it has one, is
    'smoke'."""
    cells = [c for c in read(name).cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(cells) == 1
    values = {}
    for line in ast.parse(cells[0].source).body:
        plain = isinstance(line, ast.Assign) and len(line.targets) == 1
        assert plain, f'line {line.lineno}: not a parameter'
        values[line.targets[0].id] = ast.literal_eval(line.value)
    assert values.get('preset', 'smoke') == 'smoke'


@pytest.mark.parametrize('name', RUNS)
def test_templates_have_no_outputs(name):
    "What papermill fills in comes out with outputs; the template itself has none to carry along."
    assert [c.outputs for c in read(name).cells if c.cell_type == 'code' and c.outputs] == []
