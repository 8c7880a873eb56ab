"""README.md and README_files/ from nbs/index.ipynb, by nbdev's processors and nbconvert.

    python tools/readme.py [folder to write to]"""
import posixpath, re, shutil, sys
from pathlib import Path
from execnb.nbio import read_nb
from nbconvert import MarkdownExporter
from nbdev.processors import FilterDefaults
from nbformat import from_dict
from nbformat.v4.rwbase import rejoin_lines

root = Path(__file__).resolve().parents[1]
# what a picture shows, in words (Quarto's own)
FIG_ALT = re.compile(r'^#\| fig-alt: (.+)\n', re.M)
LINK = re.compile(r'(\]\(|src=")(?![a-z]+:|#|/)([^)"\s]+)')
PICTURE = re.compile(r'!\[png\]\((README_files/README_(\d+)_\d+\.png)\)')


class ReadmeFilter(FilterDefaults):
    "nbdev's own, without its warning and its links to a documentation site."
    def base_procs(self):
        unwanted = 'add_links', 'insert_warning'
        return [p for p in super().base_procs() if p.__name__ not in unwanted]


def from_root(text):
    "Relative links of nbs/index.ipynb, as seen from the root of the repository."
    return LINK.sub(lambda m: m[1]+posixpath.normpath('nbs/'+m[2]), text)


def readme(folder):
    "Write both into `folder`."
    nb = read_nb(root/'nbs'/'index.ipynb')
    ReadmeFilter()(nb)
    front = nb.frontmatter_
    head = ['<!-- Made from nbs/index.ipynb by `make export`: edit that. -->',
            f"# {front['title']}", f"> {front['description']}"]
    cells, alts = [c for c in nb.cells if c.cell_type != 'raw'], {}
    for i, c in enumerate(cells):
        if c.cell_type == 'markdown': c.source = from_root(c.source)
        if c.cell_type != 'code': continue
        if alt := FIG_ALT.search(c.source): alts[str(i)] = alt[1]
        c.source = FIG_ALT.sub('', c.source)
        if '#| echo: false' in c.source: c.metadata['transient'] = dict(remove_source=True)
    whole = dict(cells=cells, metadata=dict(nb.metadata), nbformat=4, nbformat_minor=5)
    resources = dict(unique_key='README', output_files_dir='README_files')
    nb = rejoin_lines(from_dict(whole))
    body, extra = MarkdownExporter().from_notebook_node(nb, resources=resources)
    shutil.rmtree(folder/'README_files', ignore_errors=True)
    for name, data in extra.get('outputs', {}).items():
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).write_bytes(data)
    body = PICTURE.sub(lambda m: f'![{alts.get(m[2], "png")}]({m[1]})', body)
    body = re.sub(r'\n{3,}', '\n\n', body).strip()
    (folder/'README.md').write_text('\n\n'.join([*head, body])+'\n', encoding='utf-8')


if __name__ == '__main__': readme(Path(sys.argv[1]) if len(sys.argv) > 1 else root)
