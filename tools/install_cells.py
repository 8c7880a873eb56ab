"""A cell in each chapter that installs risclip where it is not there, as in Colab, and the button
that opens it there: python tools/install_cells.py [folder]

Both are made from settings.ini's `git_url`; while that is empty there is no button, and the cell
only says what to do. `make export` runs this."""
import configparser, json, sys
from pathlib import Path
from urllib.parse import urlsplit

root = Path(__file__).resolve().parents[1]
COLAB = 'https://colab.research.google.com'
CELL, BUTTON = 'a0000001', 'a0000002'                  # ids
INSTALL = '''#| hide
# Does nothing where risclip is installed. {elsewhere}
import importlib.util, subprocess, sys
if importlib.util.find_spec('risclip') is None:
'''
FETCH = '''    fetch = ['git', 'clone', '--depth', '1', '{url}', 'risclip-course']
    subprocess.run(fetch, check=True)
    install = [sys.executable, '-m', 'pip', 'install', '-q', '-e', 'risclip-course']
    subprocess.run(install, check=True)
    sys.path.insert(0, 'risclip-course')'''
TELL = '''    raise ModuleNotFoundError('risclip is not installed for this Python: '
                              'see "Two commands" in the README')'''


def cells_for(name, url, branch) -> list:
    "The cells that stand behind the title of the notebook nbs/<name>."
    elsewhere = 'Elsewhere it says what to do.'
    if url: elsewhere = 'Elsewhere, as in Colab, it fetches the course and installs it.'
    source = INSTALL.format(elsewhere=elsewhere) + (FETCH.format(url=url) if url else TELL)
    cells = [dict(cell_type='code', id=CELL, metadata={}, execution_count=None, outputs=[],
                  source=source.splitlines(True))]
    if urlsplit(url).netloc == 'github.com':            # Colab opens what is there
        repository = urlsplit(url).path.strip('/').removesuffix('.git')
        place = f'{COLAB}/github/{repository}/blob/{branch}/nbs/{name}'
        button = f'[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({place})'
        cells.insert(0, dict(cell_type='markdown', id=BUTTON, metadata={}, source=[button]))
    return cells


def with_cells(nb, name, url, branch):
    "The notebook with its cells renewed."
    kept = [c for c in nb['cells'] if c['id'] not in (CELL, BUTTON)]
    return dict(nb, cells=[kept[0], *cells_for(name, url, branch), *kept[1:]])


def main(folder=root):
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(folder/'settings.ini', encoding='utf-8')
    cfg = parser['DEFAULT']
    for file in sorted((folder/'nbs').glob('*.ipynb')):
        if file.name == 'index.ipynb': continue         # it becomes the README
        old = file.read_text(encoding='utf-8')
        nb = with_cells(json.loads(old), file.name, cfg['git_url'].strip(), cfg['branch'])
        new = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
        if new != old: file.write_text(new, encoding='utf-8')


if __name__ == '__main__': main(*map(Path, sys.argv[1:]))
