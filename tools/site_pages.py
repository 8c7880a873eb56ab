"""The course as web pages, built offline: python tools/site_pages.py [folder]   (default: site/)

The notebooks as they are committed, with their outputs; nothing is executed. What is `#| hide` is
left out, and so are nbs/exercises/ (solutions) and nbs/runs/ (papermill's). Every page links to its
neighbours, a page a module holds the API as nbdev's `show_doc` renders it, equations are MathML,
and the search works without a server. At the end every link inside the site is checked."""
import importlib, inspect, json, re, shutil, subprocess, sys, tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from install_cells import BUTTON

root = Path(__file__).resolve().parents[1]
PAGES = ('notation', 'slides_to_code', 'teaching')     # beside the chapters
EXTENSION = '''"Equations as MathML: no script and no network is needed to show them."
from docutils.nodes import SkipNode
from latex2mathml.converter import convert

def inline(self, node):
    self.body.append(convert(node.astext()))
    raise SkipNode

def block(self, node):
    self.body.append('<div class="math">' + convert(node.astext(), display='block') + '</div>')
    raise SkipNode

def setup(app):
    renderers = dict(inline_renderers=(inline, None), block_renderers=(block, None))
    app.add_html_math_renderer('mathml', **renderers)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
'''
STYLE = '''
.math { overflow-x: auto; }
table { display: block; overflow-x: auto; max-width: 100%; }
img { max-width: 100%; height: auto; }
'''


def chapters():
    "The chapters' notebooks, in order."
    return sorted((root/'nbs').glob('[0-9]*.ipynb'))


def engine():
    "The engine rooms' notebooks, by name."
    return sorted((root/'nbs'/'engine').glob('*.ipynb'))


def with_pages(markdown):
    "Links to notebooks as links to their pages."
    return re.sub(r'\]\(([\w./]+)\.ipynb', r'](\1.html', markdown)


def shown(nb):
    """A notebook for reading: no hidden cells, no directives; `#| echo: false` leaves only the
    output."""
    cells = []
    for cell in nb['cells']:
        # its picture would be fetched from elsewhere
        if cell.get('id') == BUTTON: continue
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            directives = set(re.findall(r'^#\|\s*(.+)$', source, re.M))
            unseen = [d for d in directives if d == 'hide' or d.startswith('default_exp')]
            if unseen: continue
            source = re.sub(r'^#\|.*\n?', '', source, flags=re.M)
            for out in cell['outputs']:
                data = out.get('data', {})
                if 'text/markdown' not in data: continue
                data['text/markdown'] = with_pages(''.join(data['text/markdown']))
            if 'echo: false' in directives:
                cell['metadata'] = dict(cell['metadata'], tags=['remove-input'])
        cells.append(dict(cell, source=source))
    return dict(nb, cells=cells)


def api(module, notebook):
    """Markdown of a module's public names, as nbdev's show_doc renders them; their source is the
    notebook."""
    from nbdev.showdoc import show_doc
    m = importlib.import_module(f'risclip.{module}')
    lines = [f'# risclip.{module}', '', (m.__doc__ or '').strip(), '']
    for name in m.__all__:
        symbol = getattr(m, name)
        if inspect.ismodule(symbol) or not callable(symbol):
            lines += [f'## {name}', '', f'`{name}`: a {type(symbol).__name__}', '']
            continue
        text = str(show_doc(symbol, renderer=None, title_level=2)._repr_markdown_())
        text = re.sub(r'\[source\]\([^)]*\)(\{[^}]*\})?', f'[source](../{notebook})', text)
        lines += [re.sub(r'^---\s*$', '', text, flags=re.M).strip(), '']
    return '\n'.join(lines)


def part(caption, files):
    "A part of the table of contents."
    return dict(caption=caption, chapters=[dict(file=f) for f in files])


def prepare(src):
    "The sources of the site in `src`; returns its table of contents."
    nbs = root/'nbs'
    pages = [p for p in PAGES if (nbs/f'{p}.ipynb').exists()]
    modules = {}
    for folder in ('api', 'engine'): (src/folder).mkdir()
    for file in (*chapters(), *engine(), *(nbs/f'{p}.ipynb' for p in pages), nbs/'index.ipynb'):
        name, text = file.relative_to(nbs).as_posix(), file.read_text(encoding='utf-8')
        (src/name).write_text(json.dumps(shown(json.loads(text))), encoding='utf-8')
        if exported := re.search(r'default_exp (\w+)', text): modules[exported[1]] = name
    if (nbs/'images').is_dir(): shutil.copytree(nbs/'images', src/'images')
    for module, name in modules.items():
        (src/'api'/f'{module}.md').write_text(api(module, name), encoding='utf-8')
    return dict(format='jb-book', root='index', parts=[
        part('The course', [p.stem for p in chapters()]),
        part('Beside it', pages),
        part('Engine rooms', [f'engine/{p.stem}' for p in engine()]),
        part('The library', [f'api/{m}' for m in modules])])


THEME = dict(use_download_button=False, use_fullscreen_button=False)
SPHINX = dict(html_math_renderer='mathml', html_css_files=['course.css'], html_theme_options=THEME,
              suppress_warnings=['myst.header', 'mystnb.unknown_mime_type',
                                 'misc.highlighting_failure'])
CONFIG = dict(
    title='risclip', author='The risclip authors', copyright='2026',
    execute=dict(execute_notebooks='off'), only_build_toc_files=True,
    launch_buttons=dict(colab_url=''),
    html=dict(use_issues_button=False, use_repository_button=False, use_edit_page_button=False),
    parse=dict(myst_enable_extensions=['dollarmath', 'amsmath', 'colon_fence']),
    sphinx=dict(local_extensions=dict(mathml_here='_ext/'), config=SPHINX))


def build(out):
    "Build the site into `out`; returns the warnings."
    import yaml
    with tempfile.TemporaryDirectory() as scratch:
        src = Path(scratch)/'src'
        for folder in ('', '_ext', '_static'): (src/folder).mkdir()
        (src/'_toc.yml').write_text(yaml.safe_dump(prepare(src)))
        (src/'_ext'/'mathml_here.py').write_text(EXTENSION)
        (src/'_static'/'course.css').write_text(STYLE)
        (src/'_config.yml').write_text(yaml.safe_dump(CONFIG))
        book = Path(sys.executable).parent/'jupyter-book'
        command = [str(book), 'build', '-q', str(src), '--path-output', scratch]
        done = subprocess.run(command, capture_output=True, text=True)
        html = Path(scratch)/'_build'/'html'
        if done.returncode or not (html/'index.html').exists(): sys.exit(done.stdout + done.stderr)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(html, out, ignore=shutil.ignore_patterns('_sources', '.buildinfo'))
    return [line for line in done.stderr.splitlines() if re.search('WARNING|ERROR', line)]


class Links(HTMLParser):
    "What a page links to, and the places in it that can be linked to."
    def __init__(self):
        super().__init__()
        self.links, self.places = [], {''}

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in ('href', 'src') and value is not None: self.links.append((tag, value))
            if key in ('id', 'name') and value: self.places.add(value)


def broken(out) -> list:
    """Every link inside the site that leads nowhere, and everything that is fetched from elsewhere:
    [text]."""
    pages = {}
    for file in out.rglob('*.html'):
        # the theme's own templates
        if '_static' in file.relative_to(out).parts: continue
        pages[file.resolve()] = found = Links()
        found.feed(file.read_text(encoding='utf-8'))
    wrong = {f'{file.relative_to(out)}{fault}' for file, found in pages.items()
             for fault in faults(file, found, pages)}
    return sorted(wrong)


def faults(file, found, pages):
    "What is wrong with the links of one page."
    for tag, link in found.links:
        url = urlsplit(link)
        if url.scheme or url.netloc:
            fetched = tag in ('script', 'img') or (tag == 'link' and 'fonts' in link)
            if fetched: yield f' fetches {link}'
            continue
        target = (file.parent/unquote(url.path)).resolve() if url.path else file
        if target.is_dir(): target /= 'index.html'
        if not target.exists(): yield f': {link} is not there'
        elif target in pages and unquote(url.fragment) not in pages[target].places:
            yield f': {link} has no such place'


if __name__ == '__main__':
    out = Path(sys.argv[1] if len(sys.argv) > 1 else root/'site').resolve()
    for line in build(out): print(line)
    if wrong := broken(out): sys.exit('\n'.join(wrong))
    print(f'{len(list(out.rglob("*.html")))} pages in {out}: open {out}/index.html')
