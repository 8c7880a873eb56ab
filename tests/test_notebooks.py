"Each notebook runs from top to bottom, in a process of its own, and leaves the checkout as it was."
import ast
import nbformat, pytest
from nbclient import NotebookClient
from conftest import ROOT, source_files

NOTEBOOKS = sorted(p.relative_to(ROOT/'nbs').as_posix() for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def read(name): return nbformat.read(ROOT/'nbs'/name, 4)


def skipped(nb): return any('skip_exec: true' in c.source for c in nb.cells[:1])


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebook(name, tmp_path):
    nb = read(name)
    if skipped(nb): pytest.skip('its title cell says skip_exec')
    place = (tmp_path/'nbs'/name).parent   # what it writes beside itself lands here
    place.mkdir(parents=True)
    stamp = lambda: {f: (ROOT/f).stat().st_mtime_ns for f in source_files()}
    before = stamp()
    NotebookClient(nb, timeout=900, kernel_name='python3', resources=dict(metadata=dict(path=str(place)))).execute()
    assert stamp() == before


@pytest.mark.parametrize('name', [n for n in NOTEBOOKS if n.startswith('runs/')])
def test_parameters_are_the_smoke_size(name):
    "A run's notebook has one parameters cell of plain values, and `preset`, where it has one, is 'smoke'."
    cells = [c for c in read(name).cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(cells) == 1
    values = {}
    for line in ast.parse(cells[0].source).body:
        assert isinstance(line, ast.Assign) and len(line.targets) == 1, f'line {line.lineno}: not a parameter'
        values[line.targets[0].id] = ast.literal_eval(line.value)
    assert values.get('preset', 'smoke') == 'smoke'
