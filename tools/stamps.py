"""What a notebook's committed outputs were made with, as checksums in nbs/stamps.json.

A stamp has three parts: the notebook's own code, the modules of risclip that it imports (and that
those import), and the committed data that it read. Comments and docstrings do not count: they
change no output. Only tools/execute.py writes stamps, because only it runs a notebook and keeps
what comes out; `python tools/stamps.py` says which stamps do not fit any more."""
import ast, hashlib, json, re, subprocess, sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
FILE = NBS/'stamps.json'


def stamped() -> list:
    "The notebooks that are committed with outputs, by name: '05_clip', 'notation', 'engine/files'."
    patterns = '*.ipynb', 'engine/*.ipynb', 'exercises/source/*/*.ipynb'
    files = {f for pattern in patterns for f in NBS.glob(pattern)}
    return sorted(f.relative_to(NBS).with_suffix('').as_posix() for f in files)


def code_cells(name: str) -> list:
    "The sources of a notebook's code cells."
    nb = json.loads((NBS/f'{name}.ipynb').read_text(encoding='utf-8'))
    return [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']


def plain(source: str) -> str:
    "Code without its comments and docstrings, as text; what Python cannot parse stays as it is."
    try: tree = ast.parse(source)
    except SyntaxError: return source
    for node in ast.walk(tree):
        body = getattr(node, 'body', None)
        if not isinstance(body, list): continue
        node.body = [n for n in body if not is_text(n)]
    return ast.dump(tree)


def is_text(node) -> bool:
    "A string that is a statement: a docstring, or nothing that matters."
    return (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str))


def checksum(texts) -> str:
    "Of several texts, in order. Short: it guards against forgetting, not against malice."
    return hashlib.sha256('\0'.join(texts).encode()).hexdigest()[:16]


def imported(source: str) -> set:
    "The modules of risclip that some code imports, wherever in it."
    try: nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError: return set()
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            path = ('risclip.' if node.level else '') + (node.module or '')
            if path in ('risclip', 'risclip.'): found |= {alias.name for alias in node.names}
            elif path.startswith('risclip.'): found.add(path.split('.')[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split('.') for alias in node.names]
            found |= {name[1] for name in names if name[0] == 'risclip' and len(name) > 1}
    return found


def face() -> dict:
    "{name: module} of what `from risclip import ...` gives."
    text = (ROOT/'risclip'/'__init__.py').read_text(encoding='utf-8')
    return dict(re.findall(r"(\w+)='(\w+)'", text))


def modules_of(sources) -> list:
    "All modules of risclip under these sources, at any depth, by name."
    known, faces = {f.stem: f for f in (ROOT/'risclip').glob('*.py')}, face()
    found, waiting = set(), list(sources)
    while waiting:
        for name in imported(waiting.pop()):
            name = faces.get(name, name)
            if name in known and name not in found:
                found.add(name)
                waiting.append(known[name].read_text(encoding='utf-8'))
    return sorted(found)


def tracked(folder: str) -> list:
    "The files of data/<folder> itself that git knows, in order."
    kinds = ['--cached', '--others', '--exclude-standard']
    listed = ['git', 'ls-files', '-z', *kinds, f'data/{folder}']
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    files = {ROOT/f for f in done.stdout.split('\0') if f}
    return sorted(f for f in files if f.parent == ROOT/'data'/folder and f.is_file())


def data_checksum(folders) -> str:
    "Of the committed files in these folders of data/."
    files = [f for folder in sorted(folders) for f in tracked(folder)]
    return checksum(f'{f.name} {hashlib.sha256(f.read_bytes()).hexdigest()}' for f in files)


def stamp(name: str, folders) -> dict:
    "The stamp of a notebook as it is now; folders: those of data/ whose committed files it reads."
    cells = code_cells(name)
    modules = [(ROOT/'risclip'/f'{m}.py').read_text(encoding='utf-8') for m in modules_of(cells)]
    return dict(code=checksum(map(plain, cells)), modules=checksum(map(plain, modules)),
                data=data_checksum(folders), reads=sorted(folders))


def committed() -> dict:
    "{name: stamp} of nbs/stamps.json."
    return json.loads(FILE.read_text(encoding='utf-8')) if FILE.exists() else {}


def write(name: str, new: dict):
    "Put a notebook's stamp into nbs/stamps.json; those of notebooks that are gone go."
    with FileLock(ROOT/'nbs'/'.stamps.lock'):
        found = committed() | {name: new}
        known = {k: found[k] for k in sorted(found) if k in stamped()}
        FILE.write_text(json.dumps(known, indent=1) + '\n', encoding='utf-8')


def misfit(name: str) -> str:
    "Why a notebook's outputs may not be those of its code any more; empty if they are."
    have = committed().get(name)
    if have is None: return 'it was never executed by tools/execute.py'
    now = stamp(name, have['reads'])
    changed = [part for part in ('code', 'modules', 'data') if have[part] != now[part]]
    return f'its {" and ".join(changed)} changed since it was executed' if changed else ''


def main():
    "Say which stamps do not fit."
    found = {name: why for name in stamped() if (why := misfit(name))}
    for name, why in found.items(): print(f'nbs/{name}.ipynb: {why}: `make outputs`')
    return len(found)


if __name__ == '__main__': sys.exit(main() and 1)
