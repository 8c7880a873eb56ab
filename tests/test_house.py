"""The house: who imports whom, and how long and wide a room, a cell, a function and a line may be.

The rules stand in CONTRIBUTING.md; here they are counted."""
import ast, io, re, sys, tokenize

import nbformat, pytest

from conftest import ROOT, source_files

NBS = ROOT/'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = sorted(p for p in (ROOT/'risclip').glob('*.py') if p.stem not in ('__init__', '_modidx'))
SCRIPTS = sorted(p for folder in ('tests', 'tools') for p in (ROOT/folder).glob('*.py'))
TAUGHT = [p for p in NOTEBOOKS if 'exercises' not in p.parts]
LIMITS = dict(WIDTH=100, CELLS=100, MODULE=350, FUNCTION=30, CLASS=150, CELL=40)
WIDTH, CELLS, MODULE, FUNCTION, CLASS, CELL = LIMITS.values()
STANDARD = set(sys.stdlib_module_names)
ENGINE = {                       # engine room: what it may stand on
    'files': '', 'errors': '', 'pictures': '', 'plots': 'files errors', 'archives': 'files',
    'hub': 'files', 'timing': 'files', 'widget': 'pictures plots',
    'writer': 'files pictures refer', 'scenes': 'files pictures', 'phrases': 'scenes',
    'captions': 'scenes phrases', 'dataset': 'refer clip pictures',
    'settings': 'model refer errors files', 'runs': 'files settings model clip',
    'evaluation': 'dataset scoring grounding model plots settings refer runs clip files errors',
    'costs': 'dataset model', 'sharing': 'model files evaluation',
    'results': 'dataset evaluation files ladder model refer scoring settings',
    'jobs': 'results ladder training runs settings model refer clip files errors',
    'download': 'archives refer pictures files errors'}


def name_of(path): return path.relative_to(ROOT).as_posix()


def code(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']


def is_exported(cell): return bool(re.match(r'#\|\s*export', cell.source))


def default_exp(path):
    found = [re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M) for c in code(path)]
    return next((m[1] for m in found if m), None)


def parsed(source): return ast.parse(re.sub(r'^[%!].*$', '', source, flags=re.M))


def without_list_of_names(text):
    "A module without nbdev's own `__all__`, which it wraps at 120."
    return re.sub(r'^__all__ = \[.*?\]\n', '', text, flags=re.S | re.M)


def imports_of(path):
    "The modules of risclip that a module imports, wherever in it."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            module = ('risclip.' if node.level else '') + (node.module or '')
            if module.startswith('risclip.') and len(module) > 8: found.add(module.split('.')[1])
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
            found |= {n.split('.')[1] for n in names if n.startswith('risclip.')}
    return found


GRAPH = {path.stem: imports_of(path) for path in MODULES}


def below(module):
    "All that stands under a module."
    found, waiting = set(), [module]
    while waiting:
        new = GRAPH[waiting.pop()] - found
        found |= new
        waiting += new
    return found


# --- who imports whom

def test_imports_run_one_way():
    for module in GRAPH: assert module not in below(module), f'{module} stands on itself'


def test_an_engine_room_stands_on_what_its_line_says():
    "The floors of the house; a chapter may stand on whatever is below it."
    for room, allowed in ENGINE.items():
        too_much = GRAPH[room] - set(allowed.split())
        assert not too_much, f'{room} imports {too_much}'
    rooms = {default_exp(p) for p in NBS.glob('engine/*.ipynb')}
    assert rooms == ENGINE.keys()


def test_the_floor_of_the_model():
    parts = {'adapters', 'cfe', 'ske', 'decoder', 'grounding', 'clip', 'hub', 'files', 'errors'}
    assert below('model') <= parts
    packages = {'torch', 'open_clip', 'safetensors', 'huggingface_hub', 'risclip'}
    for module in ('model', *below('model')):
        tree = ast.parse((ROOT/'risclip'/f'{module}.py').read_text(encoding='utf-8'))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import): names = [a.name.split('.')[0] for a in node.names]
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module.split('.')[0]]
            assert set(names) <= packages | STANDARD | {'numpy', 'PIL'}, f'{module} imports {names}'


# --- how long

@pytest.mark.parametrize('path', TAUGHT, ids=name_of)
def test_a_notebook_is_read_in_one_sitting(path):
    assert len(nbformat.read(path, 4).cells) <= CELLS


@pytest.mark.parametrize('path', MODULES, ids=name_of)
def test_a_module_is_one_idea_long(path):
    assert len(path.read_text(encoding='utf-8').splitlines()) <= MODULE


@pytest.mark.parametrize('path', TAUGHT, ids=name_of)
def test_what_is_exported_fits_on_a_screen(path):
    """A function has at most 30 lines, a class stands in one cell, of at most 150; other cells have
    40."""
    for cell in filter(is_exported, code(path)):
        tree = parsed(cell.source)
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert length(node) <= FUNCTION, f'{node.name} has {length(node)} lines'
                patched = [d for d in node.decorator_list if 'patch' in ast.unparse(d)]
                assert not patched, f'{node.name} is patched into its class: write it there'
        for node in classes: assert length(node) <= CLASS, f'{node.name} has {length(node)} lines'
        lines = [line for line in cell.source.strip().splitlines() if not line.startswith('#|')]
        assert classes or len(lines) <= CELL, f'{len(lines)} lines: {lines[0]}'


def length(node): return node.end_lineno - node.lineno + 1


# --- how wide, and one thing a line

def sources():
    "(where, code) of all that is exported, taught, or runs the project."
    for path in MODULES:
        yield name_of(path), without_list_of_names(path.read_text(encoding='utf-8'))
    for path in NOTEBOOKS:
        for cell in code(path): yield f'{name_of(path)} {cell.id}', cell.source
    for path in SCRIPTS: yield name_of(path), path.read_text(encoding='utf-8')
    for name in ('setup.py', 'nbs/exercises/nbgrader_config.py'):
        yield name, (ROOT/name).read_text(encoding='utf-8')


def test_lines_are_short():
    wide = [f'{where}: {line.strip()[:60]}' for where, source in sources()
            for line in source.splitlines() if len(line) > WIDTH]
    assert wide == []


def too_much(source):
    "What makes a line hard to read: (line number, what)."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    for token in tokens:
        ends = token.line.rstrip().endswith(';')          # a plot's last line keeps quiet with it
        if token.type == tokenize.OP and token.string == ';' and not ends: yield token.start[0], ';'
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple):
            yield node.lineno, 'a tuple as a statement'
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            yield node.lineno, 'a lambda with a name'


def test_one_statement_a_line():
    found = []
    for where, source in sources():
        plain = re.sub(r'^[%!].*$', '', source, flags=re.M)
        found += [f'{where}:{line}: {what}' for line, what in too_much(plain)]
    assert found == []


@pytest.mark.parametrize('bad, what', [
    ('a = 1; b = 2', ';'), ('f(x), g(x)', 'a tuple as a statement'),
    ('f = lambda x: x', 'a lambda with a name')])
def test_the_test_above_can_fail(bad, what): assert [w for _, w in too_much(bad)] == [what]


@pytest.mark.parametrize('path', TAUGHT, ids=name_of)
def test_a_taught_comprehension_has_one_for(path):
    for cell in code(path):
        for node in ast.walk(parsed(cell.source)):
            kinds = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
            if isinstance(node, kinds): assert len(node.generators) == 1, ast.unparse(node)[:80]


# --- names and hints

PRIVATE = '''told told_settings filled UNTOLD TOLD told_of lies lie_loss tells_lies alone together
clip_norm lr1 lr2 batch2 ske_aligned written_whole room_for Sight drawn_sight verdict VERDICTS climb
towers_of LOST carry_over doubtful levers stretched to_size load_risclip'''.split()


@pytest.mark.parametrize('path', MODULES, ids=name_of)
def test_names_are_the_fields(path):
    "Names, not words: a docstring may say that a thing stands alone."
    with open(path, 'rb') as f: tokens = list(tokenize.tokenize(f.readline))
    names = {token.string for token in tokens if token.type == tokenize.NAME}
    assert names & set(PRIVATE) == set()


def public(tree):
    "The public functions and methods of a module."
    for node in tree.body:
        seen = isinstance(node, ast.ClassDef) and not node.name.startswith('_')
        inner = node.body if seen else [node]
        for f in inner:
            known = isinstance(f, ast.FunctionDef) and (
                not f.name.startswith('_') or f.name == '__init__')
            if known: yield f


@pytest.mark.parametrize('path', MODULES, ids=name_of)
def test_public_signatures_have_types_and_docstrings(path):
    for f in public(ast.parse(path.read_text(encoding='utf-8'))):
        given = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        bare = [a.arg for a in given if a.annotation is None and a.arg not in ('self', 'cls')]
        assert not bare, f'{f.name}: {bare} have no type'
        assert f.name == '__init__' or ast.get_docstring(f), f'{f.name} says nothing of itself'


# --- what a clone weighs

def test_the_weight_of_the_checkout():
    sizes = {f: (ROOT/f).stat().st_size for f in source_files()}
    assert sum(sizes.values()) <= 34e6         # 12 of them are a table of tokens, mostly zeros
    assert sum(size for f, size in sizes.items() if f.parts[:2] == ('data', 'ladder')) <= 10e6
