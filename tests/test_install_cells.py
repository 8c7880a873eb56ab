"""A chapter also runs by itself: its first cell does nothing where risclip is installed, and
fetches it elsewhere; the buttons come from git_url."""
import importlib.util, json, subprocess, sys
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'tools'))
import install_cells
CHAPTERS = [p for p in sorted((ROOT/'nbs').glob('*.ipynb')) if p.name != 'index.ipynb']
URL = 'https://github.com/someone/risclip'


def source(cells, id): return next((''.join(c['source']) for c in cells if c['id'] == id), None)


@pytest.fixture
def ran(monkeypatch):
    "The commands that are run, none of them truly."
    commands = []
    monkeypatch.setattr(subprocess, 'run', lambda command, **k: commands.append(command))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    return commands


def test_the_chapters_have_the_cells_of_these_settings(copy):
    before = {p.name: (copy/'nbs'/p.name).read_bytes() for p in CHAPTERS}
    install_cells.main(copy)
    now = {p.name: (copy/'nbs'/p.name).read_bytes() for p in CHAPTERS}
    assert now == before, 'run `make export`'


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_it_does_nothing_where_risclip_is(path, ran):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    assert cells[0]['cell_type'] == 'markdown' and ''.join(cells[0]['source']).startswith('# ')
    exec(source(cells, install_cells.CELL), {})
    assert ran == []


def test_it_installs_where_risclip_is_not(ran, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    exec(source(install_cells.cells_for('04_clip.ipynb', URL, 'main'), install_cells.CELL), {})
    assert ran == [['git', 'clone', '--depth', '1', URL, 'risclip-course'],
                   [sys.executable, '-m', 'pip', 'install', '-q', '-e', 'risclip-course']]
    with pytest.raises(ModuleNotFoundError, match='README'):
        exec(source(install_cells.cells_for('04_clip.ipynb', '', 'main'), install_cells.CELL), {})


def test_buttons_only_where_there_is_somewhere_to_open(copy):
    ini = copy/'settings.ini'
    ini.write_text(ini.read_text().replace('git_url =', f'git_url = {URL}', 1))
    install_cells.main(copy)
    for path in CHAPTERS:
        cells = json.loads((copy/'nbs'/path.name).read_text(encoding='utf-8'))['cells']
        place = f'{install_cells.COLAB}/github/someone/risclip/blob/main/nbs/{path.name}'
        assert place in source(cells, install_cells.BUTTON)
        assert URL in source(cells, install_cells.CELL)
    assert source(install_cells.cells_for('x.ipynb', '', 'main'), install_cells.BUTTON) is None
    assert source(install_cells.cells_for('x.ipynb', 'https://gitlab.com/a/b', 'main'),
                  install_cells.BUTTON) is None
