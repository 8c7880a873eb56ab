"""How long each notebook takes from top to bottom: python tools/chapter_times.py [name ...] [--threads 2]

Runs every notebook of nbs/ (not of its subfolders), or those that are named (`06_grounding`), one after the other, each in a process of its own,
on the CPU, in a temporary folder; the notebooks stay as they are. Writes data/chapter_times.json; of a run for some names, the other times are kept.
Run it on a machine that does nothing else. A notebook that fails is named, has no time, and makes the exit code 1."""
import argparse, json, os, platform, re, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

root = Path(__file__).resolve().parents[1]
FILE = root/'data'/'chapter_times.json'


def seconds_of(path, timeout=3600) -> float:
    "The seconds that a copy of a notebook takes in a process of its own, its start included. CellExecutionError: a cell fails."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as place:
        begin = time.perf_counter()
        NotebookClient(nb, timeout=timeout, kernel_name='python3', resources=dict(metadata=dict(path=place))).execute()
        return time.perf_counter() - begin


def quiet_environment(threads: int):
    "What the processes inherit: so many threads, no GPU, no network, the kernel of this very Python. Before anything loads torch."
    os.environ.update(OMP_NUM_THREADS=str(threads), CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1', JUPYTER_PREFER_ENV_PATH='1')


def write(file, told):
    "As JSON, whole or not at all."
    new = file.with_name(f'{file.name}.new')
    new.write_text(json.dumps(told, indent=1) + '\n', encoding='utf-8')
    new.replace(file)


def known(file, device) -> dict:
    "The times that a file has for a device, {} if it has none."
    told = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}
    return told['seconds'] if told.get('device') == device else {}


def measure(paths, device, file=FILE) -> list:
    "Time the notebooks, one line of progress each, and write the file after each -> the names of those that failed."
    told = dict(device=device, versions=dict(python=platform.python_version(), torch=version('torch'), risclip=version('risclip')), seconds=known(file, device))
    failed = []
    for k, path in enumerate(paths, 1):
        print(f'{k:2} of {len(paths)}  {path.stem:16} ', end='', flush=True)
        told['seconds'].pop(path.stem, None)
        try: told['seconds'][path.stem] = round(seconds_of(path), 1)
        except Exception as e: failed.append(path.stem); print('failed:', re.sub(r'\x1b\[[\d;]*m', '', str(e)).strip().splitlines()[-1], flush=True)     # without colours
        else: print(f'{told["seconds"][path.stem]:7.1f} s', flush=True)
        told['seconds'] = dict(sorted(told['seconds'].items()))
        write(file, told)
    return failed


def main():
    there = {p.stem: p for p in sorted((root/'nbs').glob('*.ipynb'))}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('name', nargs='*', help='notebooks of nbs/, without .ipynb; none: all of them')
    parser.add_argument('--threads', type=int, default=2)
    args = parser.parse_args()
    if unknown := [n for n in args.name if n not in there]: parser.error(f'nbs/ has no {", ".join(unknown)}; it has {", ".join(there)}')
    quiet_environment(args.threads)
    from risclip.refmoji import refmoji_folder
    refmoji_folder()                                         # drawn beforehand: it is no chapter's time
    failed = measure([there[n] for n in args.name or there], f'cpu{args.threads}')
    print(f'written to {FILE.relative_to(root)}')
    if failed: sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__': main()
