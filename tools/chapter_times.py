"""How long each notebook takes from top to bottom: python tools/chapter_times.py [name ...]
[--threads 2]

Runs every chapter and engine room, or those that are named (`07_grounding`, `engine/files`), one
after the other, each in a process of its own, on the CPU, in a temporary folder; the notebooks stay
as they are. Writes data/chapter_times.json; of a run for some names, the other times are kept. Run
it on a machine that does nothing else. A notebook that fails is named, has no time, and makes the
exit code 1."""
import argparse, json, os, platform, re, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

root = Path(__file__).resolve().parents[1]
FILE = root/'data'/'chapter_times.json'


def seconds_of(path, timeout=3600) -> float:
    """The seconds that a copy of a notebook takes in a process of its own, its start included.
    CellExecutionError: a cell fails."""
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as place:
        begin = time.perf_counter()
        resources = dict(metadata=dict(path=place))
        NotebookClient(nb, timeout=timeout, kernel_name='python3', resources=resources).execute()
        return time.perf_counter() - begin


def quiet_environment(threads: int):
    """What the processes inherit: so many threads, no GPU, no network, the kernel of this very
    Python. Before anything loads torch."""
    os.environ.update(OMP_NUM_THREADS=str(threads), CUDA_VISIBLE_DEVICES='',
                      HF_HUB_OFFLINE='1', JUPYTER_PREFER_ENV_PATH='1')


def write(file, content):
    "As JSON, whole or not at all."
    new = file.with_name(f'{file.name}.new')
    new.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    new.replace(file)


def known(file, device) -> dict:
    "The times that a file has for a device, {} if it has none."
    stored = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}
    return stored['seconds'] if stored.get('device') == device else {}


def measure(paths, device, file=FILE) -> list:
    """Time the notebooks, one line of progress each, and write the file after each -> the names of
    those that failed."""
    versions = dict(python=platform.python_version())
    versions |= {name: version(name) for name in ('torch', 'risclip')}
    names, failed = {name_of(path) for path in paths}, []
    seconds = {k: v for k, v in known(file, device).items() if (root/'nbs'/f'{k}.ipynb').exists()}
    for k, path in enumerate(paths, 1):
        name = name_of(path)
        print(f'{k:2} of {len(names)}  {name:20} ', end='', flush=True)
        seconds.pop(name, None)
        try: seconds[name] = round(seconds_of(path), 1)
        except Exception as e:
            failed.append(name)
            without_colours = re.sub(r'\x1b\[[\d;]*m', '', str(e))
            print('failed:', without_colours.strip().splitlines()[-1], flush=True)
        else: print(f'{seconds[name]:7.1f} s', flush=True)
        write(file, dict(device=device, versions=versions, seconds=dict(sorted(seconds.items()))))
    return failed


def name_of(path) -> str:
    "As '05_clip' or 'engine/files'."
    return path.relative_to(root/'nbs').with_suffix('').as_posix()


def main():
    "Time what is named, or all."
    files = [*(root/'nbs').glob('*.ipynb'), *(root/'nbs'/'engine').glob('*.ipynb')]
    there = {name_of(path): path for path in sorted(files)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('name', nargs='*', help='as 05_clip or engine/files; none: all of them')
    parser.add_argument('--threads', type=int, default=2)
    args = parser.parse_args()
    unknown = [n for n in args.name if n not in there]
    if unknown: parser.error(f'nbs/ has no {", ".join(unknown)}; it has {", ".join(there)}')
    quiet_environment(args.threads)
    from risclip.refmoji import refmoji_folder
    refmoji_folder()                                 # drawn beforehand: it is no chapter's time
    failed = measure([there[n] for n in args.name or there], f'cpu{args.threads}')
    print(f'written to {FILE.relative_to(root)}')
    if failed: sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__': main()
