"""Run notebooks from top to bottom, keep their outputs, and stamp them: python tools/execute.py
[NAME ...]

NAME is as '05_clip' or 'engine/files'; without one, every notebook whose stamp does not fit
(`make outputs`). Each runs in a kernel and a scratch folder of its own. Figures are kept with a
palette of 256 colours, which takes 40% of the bytes."""
import base64, io, json, os, sys, tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import stamps
from stamps import NBS, ROOT

KEPT = 'tags', 'nbgrader', 'slideshow'     # metadata of cells, as nbdev_clean leaves it
WATCH = '''import sys as _sys
_opened = set()
def _note(event, args):
    if event == 'open' and isinstance(args[0], (str, bytes)): _opened.add(str(args[0]))
_sys.addaudithook(_note)'''
REPORT = '''import json as _json
with open({file!r}, 'w') as _f: _json.dump(sorted(_opened), _f)'''


def with_palette(png: str) -> str:
    "A figure (base64) in at most 256 colours, if that is smaller."
    data = base64.b64decode(png)
    picture = Image.open(io.BytesIO(data))
    if picture.mode == 'P': return png
    if picture.mode == 'RGBA' and picture.getextrema()[3] != (255, 255): return png   # see-through
    out = io.BytesIO()
    way = dict(method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few = picture.convert('RGB').quantize(256, **way)
    few.save(out, 'PNG', optimize=True)
    return base64.b64encode(out.getvalue()).decode() + '\n' if out.tell() < len(data) else png


def cleaned(nb):
    "What differs from run to run goes; figures get their palette."
    nb.metadata = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    for cell in nb.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in KEPT}
        if cell.cell_type != 'code': continue
        cell.execution_count = None
        for output in cell.outputs:
            if output.output_type == 'execute_result': output.execution_count = None
            data = output.get('data', {})
            if 'image/png' in data: data['image/png'] = with_palette(data['image/png'])
    return nb


def read_folders(opened) -> set:
    "The folders of data/ from which committed files were opened."
    paths = {Path(p) for p in opened if p.startswith(str(ROOT/'data'))}
    folders = {p.parent.relative_to(ROOT/'data').as_posix() for p in paths}
    return {f for f in folders if stamps.tracked(f)}


def execute(name: str):
    "Run one notebook, write its outputs, return the folders of data/ that it read."
    file = NBS/f'{name}.ipynb'
    nb = nbformat.read(file, 4)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)/'nbs'/name
        place.parent.mkdir(parents=True)
        said = Path(scratch)/'opened.json'
        report = REPORT.format(file=str(said))
        cells = [nbformat.v4.new_code_cell(WATCH), *nb.cells, nbformat.v4.new_code_cell(report)]
        run = nbformat.from_dict(dict(nb, cells=cells))
        resources = dict(metadata=dict(path=str(place.parent)))
        NotebookClient(run, timeout=900, kernel_name='python3', resources=resources,
                       coalesce_streams=True).execute()
        opened = json.loads(said.read_text())
    nb = cleaned(nbformat.from_dict(dict(nb, cells=run.cells[1:-1])))
    text = json.dumps(json.loads(nbformat.writes(nb)), indent=1, ensure_ascii=False, sort_keys=True)
    file.write_text(text + '\n', encoding='utf-8')
    return read_folders(opened)


def main(*names):
    "The notebooks by name, else all whose stamp does not fit."
    os.environ['JUPYTER_PREFER_ENV_PATH'] = '1'
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    failed = []
    for name in names or [name for name in stamps.stamped() if stamps.misfit(name)]:
        try: folders = execute(name)
        except CellExecutionError as e:
            failed.append(name)
            print(f'nbs/{name}.ipynb failed:\n{e}', file=sys.stderr, flush=True)
            continue
        stamps.write(name, stamps.stamp(name, folders))
        print(f'nbs/{name}.ipynb', flush=True)
    return failed


if __name__ == '__main__': sys.exit(bool(main(*sys.argv[1:])))
