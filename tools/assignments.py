"""The exercises without their solutions, by nbgrader's generate_assignment.

    python tools/assignments.py [folder to write to]

A notebook that is already there is left alone: it may be somebody's work. Remove it to get it
anew."""
import os, re, sys, tempfile
from pathlib import Path

import nbformat
from nbgrader.apps import NbGraderAPI
from traitlets.config import PyFileConfigLoader

root = Path(__file__).resolve().parents[1]
source = root/'nbs'/'exercises'/'source'
LINK = re.compile(r'\]\((?![a-z]+:|#)([^)\s#]+)\)')


def release(assignments, course):
    """The students' version of each assignment below `course`, which is thrown away with its
    gradebook."""
    config = PyFileConfigLoader('nbgrader_config.py', str(source.parent)).load_config()
    config.CourseDirectory.root = str(course)
    config.CourseDirectory.db_url = f'sqlite:///{course}/gradebook.db'
    api = NbGraderAPI(config=config)
    for name in assignments:
        done = api.generate_assignment(name)
        if not done['success']: sys.exit(f"{name}: {done.get('error') or done.get('log')}")
    return course/'release'


def linked_from(nb, old, new):
    """The notebook with the relative links of its text as seen from the folder `new` instead of
    `old`."""
    def there(link): return f"]({Path(os.path.relpath((old/link[1]).resolve(), new)).as_posix()})"
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = LINK.sub(there, cell.source)
    return nb


def write(folder):
    "Every notebook that is not in `folder` yet."
    names = sorted(p.relative_to(source) for p in source.glob('*/*.ipynb'))
    missing = [name for name in names if not (folder/name).exists()]
    for name in names:
        if name not in missing: print(f'{folder/name} is there and was left alone')
    with tempfile.TemporaryDirectory() as course:
        made = release(sorted({name.parts[0] for name in missing}), Path(course).resolve())
        for name in missing:
            (folder/name).parent.mkdir(parents=True, exist_ok=True)
            nb = nbformat.read(made/name, 4)
            nbformat.write(linked_from(nb, (source/name).parent, (folder/name).parent), folder/name)
            print(folder/name)


if __name__ == '__main__':
    write(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else root/'assignments')
