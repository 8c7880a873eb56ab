"The repository keeps its promises: notebooks, modules, README and wheel agree with each other."
import ast, os, re, shutil, subprocess, sys, sysconfig, zipfile
from pathlib import Path
import nbformat, pytest
from conftest import ROOT, source_files

BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
name_of = lambda p: p.relative_to(ROOT/'nbs').as_posix()
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)


def code(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']


def default_exp(path):
    return next((m[1] for c in code(path) if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M))), None)


def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def run(*cmd, **kw):
    done = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, **kw)
    assert done.returncode == 0, f'{cmd}\n{done.stdout}\n{done.stderr}'
    return done.stdout


@pytest.mark.parametrize('command', ['nbdev_clean', 'nbdev_export'])
def test_nbdev_changes_nothing(command, copy):
    before = contents(copy)
    run(BIN/command, cwd=copy)
    after = {k: v for k,v in contents(copy).items() if '__pycache__' not in k}
    assert sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k)) == []


def test_nbdev_export_would_repair(copy):
    "The test above can fail: a module edited by hand is written anew."
    module = copy/'risclip'/'plots.py'
    whole = module.read_bytes()
    module.write_bytes(whole+b'# by hand\n')
    run(BIN/'nbdev_export', cwd=copy)
    assert module.read_bytes() == whole


def test_modules_and_notebooks_agree():
    exported = [e for p in NOTEBOOKS if (e := default_exp(p))]
    modules = sorted(p.stem for p in (ROOT/'risclip').glob('*.py') if p.stem not in ('__init__', '_modidx'))
    assert sorted(exported) == modules


def test_imports_run_one_way():
    "A chapter uses earlier chapters only."
    order = [e for p in NOTEBOOKS if (e := default_exp(p))]
    for k,module in enumerate(order):
        for node in ast.walk(ast.parse((ROOT/'risclip'/f'{module}.py').read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom): names = [('risclip.' if node.level else '')+(node.module or '')]   # `from .refer` is risclip.refer
            else: names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for n in names:
                if n.startswith('risclip.'): assert n.split('.')[1] in order[:k], f'{module} imports {n}'


@each_notebook
def test_exported_cells_are_short(path):
    for c in code(path):
        if re.match(r'#\|\s*export', c.source):
            lines = [l for l in c.source.strip().splitlines() if not l.startswith('#|')]
            assert len(lines) <= 40, f'{len(lines)} lines: {lines[0]}'


@each_notebook
def test_outputs_are_committed(path):
    "Notebooks are read before they are run: there are outputs, no errors, and nothing that differs from run to run."
    outputs = [o for c in code(path) for o in c.outputs]
    assert outputs or not [c for c in code(path) if not re.match(r'#\|\s*(default_exp|hide|export)', c.source)], 'no cell has an output'
    assert [o.evalue for o in outputs if o.output_type == 'error'] == []
    for o in outputs:
        data = o.get('data', {})
        shown = o.get('text', '')+''.join(str(data.get(k, '')) for k in ('text/plain', 'text/html', 'text/markdown'))
        for bad in (r' at 0x[0-9a-f]{6,}', r'/home/\w', r'/root/', r'/Users/\w', r'/tmp/', re.escape(str(ROOT)), r'\d+%\|', r'\bit/s\b'):
            assert not re.search(bad, shown), f'{bad!r} in an output: {shown[:300]}'
        assert 'application/vnd.jupyter.widget-view+json' not in data, 'a widget (a progress bar?) is left in the outputs'


def test_cells_that_import_do_nothing_else():
    "nbdev's docs run the cells that export or import, and no others: what else stands in such a cell would miss what it needs."
    for path in sorted((ROOT/'nbs').glob('*.ipynb')):
        for cell in nbformat.read(path, 4).cells:
            alone = cell.id == 'a0000001' or path.stem == 'index'                # the cell that installs; the first page's own
            if cell.cell_type != 'code' or alone or '#| export' in cell.source: continue
            nodes = list(ast.walk(ast.parse(cell.source)))
            imports = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes)
            assert not imports or not any(isinstance(node, (ast.Expr, ast.Assign)) for node in nodes), f'{path.name}, cell {cell.id}'


def test_readme_is_fresh(tmp_path):
    run(sys.executable, ROOT/'tools'/'readme.py', tmp_path, cwd=ROOT)
    committed = {f.as_posix(): (ROOT/f).read_bytes() for f in source_files() if f.name == 'README.md' and len(f.parts) == 1 or f.parts[0] == 'README_files'}
    made = contents(tmp_path)
    assert committed.keys() == made.keys()
    assert [k for k in made if made[k] != committed[k]] == [], 'run `make export`'


def test_readme_links_lead_somewhere():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert text.count('](README_files/') >= 7 and '![png]' not in text                 # each picture in words (fig-alt)
    files = {f.as_posix() for f in source_files()}
    folders = {p.as_posix() for f in files for p in Path(f).parents}
    for link in re.findall(r'\]\((?![a-z]+:|#)([^)\s#]+)', text): assert link.rstrip('/') in files | folders, link


@pytest.mark.skipif(not shutil.which('make'), reason='there is no make')
@pytest.mark.parametrize('target', ['train', 'test', 'install'])
def test_readme_shows_the_lines_behind_make(target):
    "For those without make: what `make` runs after `.venv/bin/python -m` stands in the README, word for word."
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    lines = [line.split(' -m ', 1)[1] for line in run('make', '-n', '-B', target, cwd=ROOT).splitlines() if re.search(r'python -m (papermill|pytest|pip install)', line)]
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
from risclip.model import load_risclip
model = load_risclip('risclip-refmojig', clip)
assert model(torch.zeros(1, 3, clip.size, clip.size), tokens).mask.shape == (1, 1, clip.size, clip.size)
'''


def test_wheel_works_outside_the_checkout(copy, tmp_path):
    run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, copy)
    wheel, = tmp_path.glob('risclip-*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ('tinyclip', 'risclip-refmojig'):
        for f in source_files():
            if f.parts[:2] == ('data', folder): assert '/'.join(['risclip', *f.parts[1:]]) in names, f
    assert not [n for n in names if n.startswith(('tests/', 'nbs/', 'tools/', 'data/'))]

    run(sys.executable, '-m', 'venv', '--without-pip', tmp_path/'fresh')
    python = tmp_path/'fresh'/'bin'/'python'
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', wheel)
    site = Path(run(python, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site/'borrowed.pth').write_text('\n'.join({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')})+'\n')   # torch and the rest
    away = tmp_path/'away'
    away.mkdir()
    env = {k: v for k,v in os.environ.items() if k not in ('PYTHONPATH', 'RISCLIP_DATA')}
    run(python, '-c', INSIDE, cwd=away, env=env)
    for command in ('risclip_train', 'risclip_evaluate', 'risclip_data', 'risclip_segment'): assert 'usage' in run(python.parent/command, '--help', cwd=away, env=env)
    assert list(away.iterdir()) == []
