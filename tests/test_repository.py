"The repository keeps its promises: notebooks, modules, README and wheel agree with each other."
import ast, os, re, shutil, subprocess, sys, sysconfig, zipfile
from pathlib import Path
import nbformat, pytest
from conftest import ROOT, source_files

BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def name_of(path): return path.relative_to(ROOT/'nbs').as_posix()


def code(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']


def default_exp(path):
    return next((m[1] for c in code(path)
                 if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M))), None)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*')
            if p.is_file()}


def run(*cmd, **kw):
    done = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, **kw)
    assert done.returncode == 0, f'{cmd}\n{done.stdout}\n{done.stderr}'
    return done.stdout


def test_nbdev_changes_nothing_and_repairs(copy):
    """Clean and export find everything as it is, but for a module that was edited by hand: it is
    written anew."""
    before = contents(copy)
    module = copy/'risclip'/'plots.py'
    module.write_bytes(module.read_bytes() + b'# by hand\n')
    run(BIN/'nbdev_clean', cwd=copy)
    run(BIN/'nbdev_export', cwd=copy)
    after = {k: v for k, v in contents(copy).items() if '__pycache__' not in k}
    assert sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k)) == []


def test_modules_and_notebooks_agree():
    exported = [e for p in NOTEBOOKS if (e := default_exp(p))]
    modules = sorted(p.stem for p in (ROOT/'risclip').glob('*.py')
                     if p.stem not in ('__init__', '_modidx'))
    assert sorted(exported) == modules


# papermill's templates have none
@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.parent.name != 'runs'], ids=name_of)
def test_outputs_are_committed(path):
    """Notebooks are read before they are run: there are outputs, no errors, and nothing that
    differs from run to run."""
    outputs = [o for c in code(path) for o in c.outputs]
    assert outputs or not [c for c in code(path) if not re.match(
        r'#\|\s*(default_exp|hide|export)', c.source)], 'no cell has an output'
    assert [o.evalue for o in outputs if o.output_type == 'error'] == []
    for o in outputs:
        data = o.get('data', {})
        shown = o.get('text', '')+''.join(str(data.get(k, ''))
                                          for k in ('text/plain', 'text/html', 'text/markdown'))
        for bad in (r' at 0x[0-9a-f]{6,}', r'/home/\w', r'/root/', r'/Users/\w', r'/tmp/',
                    re.escape(str(ROOT)), r'\d+%\|', r'\bit/s\b'):
            assert not re.search(bad, shown), f'{bad!r} in an output: {shown[:300]}'
        widget = 'application/vnd.jupyter.widget-view+json'
        assert widget not in data, 'a widget (a progress bar?) is left in the outputs'


def test_cells_that_import_do_nothing_else():
    """nbdev's docs run the cells that export or import, and no others: what else stands in such a
    cell would miss what it needs."""
    for path in sorted((ROOT/'nbs').glob('*.ipynb')):
        for cell in nbformat.read(path, 4).cells:
            # the cell that installs; the first page's own
            alone = cell.id == 'a0000001' or path.stem == 'index'
            if cell.cell_type != 'code' or alone or '#| export' in cell.source: continue
            nodes = list(ast.walk(ast.parse(cell.source)))
            imports = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes)
            assert not imports or not any(isinstance(node, (ast.Expr, ast.Assign))
                                          for node in nodes), f'{path.name}, cell {cell.id}'


def test_readme_is_fresh(tmp_path):
    run(sys.executable, ROOT/'tools'/'readme.py', tmp_path, cwd=ROOT)
    committed = {f.as_posix(): (ROOT/f).read_bytes() for f in source_files()
                 if f.name == 'README.md' and len(f.parts) == 1 or f.parts[0] == 'README_files'}
    made = contents(tmp_path)
    assert committed.keys() == made.keys()
    assert [k for k in made if made[k] != committed[k]] == [], 'run `make export`'


def test_readme_links_lead_somewhere():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    # each picture in words (fig-alt)
    assert text.count('](README_files/') >= 7 and '![png]' not in text
    files = {f.as_posix() for f in source_files()}
    folders = {p.as_posix() for f in files for p in Path(f).parents}
    for link in re.findall(r'\]\((?![a-z]+:|#)([^)\s#]+)', text):
        assert link.rstrip('/') in files | folders, link


@pytest.mark.skipif(not shutil.which('make'), reason='there is no make')
@pytest.mark.parametrize('target', ['train', 'test', 'install'])
def test_readme_shows_the_lines_behind_make(target):
    """For those without make: what `make` runs after `.venv/bin/python -m` stands in the README,
    word for word."""
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    lines = [line.split(' -m ', 1)[1]
             for line in run('make', '-n', '-B', target, cwd=ROOT).splitlines()
             if re.search(r'python -m (papermill|pytest|pip install)', line)]
    assert lines
    for line in lines: assert line.removesuffix(' --durations 15') in readme, line


INSIDE = r'''
import importlib, pkgutil, sys, torch, risclip
from importlib.metadata import entry_points, version
from pathlib import Path
here = Path(risclip.__file__).resolve()
assert Path(sys.prefix).resolve() in here.parents, here
assert version('risclip') == risclip.__version__
for m in pkgutil.iter_modules(risclip.__path__): importlib.import_module('risclip.'+m.name)
for e in entry_points(group='console_scripts'):
    if e.value.startswith('risclip.'): assert callable(e.load()), e
from risclip.clip import load_clip
clip = load_clip('tinyclip')
tokens = clip.tokenize(['the dog to the left of the umbrella'])
x = clip.image.embed(torch.zeros(1, 3, clip.size, clip.size))
for b in clip.image.blocks: x = x + b.attend(x); x = x + b.mlp(x)
h,w = clip.grid
assert clip.image.project(x).shape == (1, 1+h*w, clip.width_joint)
assert len(clip.sha256) == 64 and tokens.ndim == 2
from risclip.model import RISCLIP
model = RISCLIP.from_pretrained('risclip-refmojig', clip)
S = clip.size
assert model(torch.zeros(1, 3, S, S), tokens).mask.shape == (1, 1, S, S)
'''


def test_wheel_works_outside_the_checkout(copy, tmp_path):
    run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path,
        copy)
    wheel, = tmp_path.glob('risclip-*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ('tinyclip', 'risclip-refmojig'):
        for f in source_files():
            if f.parts[:2] == ('data', folder):
                assert '/'.join(['risclip', *f.parts[1:]]) in names, f
    assert not [n for n in names if n.startswith(('tests/', 'nbs/', 'tools/', 'data/'))]

    run(sys.executable, '-m', 'venv', '--without-pip', tmp_path/'fresh')
    python = tmp_path/'fresh'/'bin'/'python'
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index',
        wheel)
    site = Path(run(python, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # torch and the rest
    (site/'borrowed.pth').write_text('\n'.join({sysconfig.get_path('purelib'),
                                                sysconfig.get_path('platlib')})+'\n')
    away = tmp_path/'away'
    away.mkdir()
    env = {k: v for k,v in os.environ.items() if k not in ('PYTHONPATH', 'RISCLIP_DATA')}
    run(python, '-c', INSIDE, cwd=away, env=env)
    for command in ('risclip_train', 'risclip_evaluate', 'risclip_data', 'risclip_segment'):
        assert 'usage' in run(python.parent/command, '--help', cwd=away, env=env)
    assert list(away.iterdir()) == []
