"""The course as web pages, built offline: python tools/site_pages.py [folder]   (default: site/)

The notebooks as they are committed, with their outputs; nothing is executed. What is `#| hide` is left out, and so are nbs/exercises/ (solutions)
and nbs/runs/ (papermill's). Every page links to its neighbours, a page a module holds the API as nbdev's `show_doc` renders it, equations are
MathML, and the search works without a server. At the end every link inside the site is checked."""
import importlib, inspect, json, re, shutil, subprocess, sys, tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from install_cells import BUTTON

root = Path(__file__).resolve().parents[1]
PAGES = ('notation', 'slides_to_code', 'teaching')     # beside the chapters
EXTENSION = '''"Equations as MathML: no script and no network is needed to show them."
from latex2mathml.converter import convert

def inline(self, node):
    self.body.append(convert(node.astext())); raise __import__('docutils.nodes').nodes.SkipNode

def block(self, node):
    self.body.append('<div class="math">' + convert(node.astext(), display='block') + '</div>'); raise __import__('docutils.nodes').nodes.SkipNode

def setup(app):
    app.add_html_math_renderer('mathml', inline_renderers=(inline, None), block_renderers=(block, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
'''
STYLE = '''
.math { overflow-x: auto; }
table { display: block; overflow-x: auto; max-width: 100%; }
img { max-width: 100%; height: auto; }
'''


def chapters():
    "The chapters' notebooks, in order."
    return sorted(p for p in (root/'nbs').glob('[0-9]*.ipynb'))


def shown(nb):
    "A notebook for reading: no hidden cells, no directives; `#| echo: false` leaves only the output."
    cells = []
    for cell in nb['cells']:
        if cell.get('id') == BUTTON: continue             # its picture would be fetched from elsewhere
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            directives = set(re.findall(r'^#\|\s*(.+)$', source, re.M))
            if directives & {'hide'} or any(d.startswith('default_exp') for d in directives): continue
            source = re.sub(r'^#\|.*\n?', '', source, flags=re.M)
            for out in cell['outputs']:                       # links in outputs stay as they are: to the pages, then
                if 'text/markdown' in out.get('data', {}): out['data']['text/markdown'] = re.sub(r'\]\((\w+)\.ipynb', r'](\1.html', ''.join(out['data']['text/markdown']))
            if 'echo: false' in directives: cell['metadata'] = dict(cell['metadata'], tags=['remove-input'])
        cells.append(dict(cell, source=source))
    return dict(nb, cells=cells)


def api(module, chapter):
    "Markdown of a module's public names, as nbdev's show_doc renders them; their source is the chapter."
    from nbdev.showdoc import show_doc
    m = importlib.import_module(f'risclip.{module}')
    lines = [f'# risclip.{module}', '', (m.__doc__ or '').strip(), '']
    for name in m.__all__:
        symbol = getattr(m, name)
        if inspect.ismodule(symbol) or not callable(symbol): lines += [f'## {name}', '', f'`{name}`: a {type(symbol).__name__}', '']; continue
        text = str(show_doc(symbol, renderer=None, title_level=2)._repr_markdown_())
        text = re.sub(r'\[source\]\([^)]*\)(\{[^}]*\})?', f'[source](../{chapter})', text)
        lines += [re.sub(r'^---\s*$', '', text, flags=re.M).strip(), '']
    return '\n'.join(lines)


def prepare(src):
    "The sources of the site in `src`; returns its table of contents."
    for nb in (*chapters(), *(root/'nbs'/f'{p}.ipynb' for p in PAGES), root/'nbs'/'index.ipynb'):
        if nb.exists(): (src/nb.name).write_text(json.dumps(shown(json.loads(nb.read_text(encoding='utf-8')))), encoding='utf-8')
    if (root/'nbs'/'images').is_dir(): shutil.copytree(root/'nbs'/'images', src/'images')
    (src/'api').mkdir()
    modules = {m[1]: nb.name for nb in chapters() if (m := re.search(r'default_exp (\w+)', nb.read_text(encoding='utf-8')))}
    for module, chapter in modules.items(): (src/'api'/f'{module}.md').write_text(api(module, chapter), encoding='utf-8')
    part = lambda caption, files: dict(caption=caption, chapters=[dict(file=f) for f in files])
    return dict(format='jb-book', root='index', parts=[
        part('The course', [p.stem for p in chapters()]),
        part('Beside it', [p for p in PAGES if (src/f'{p}.ipynb').exists()]),
        part('The library', [f'api/{m}' for m in modules])])


def build(out):
    "Build the site into `out`."
    import yaml
    with tempfile.TemporaryDirectory() as scratch:
        src = Path(scratch)/'src'; src.mkdir()
        (src/'_toc.yml').write_text(yaml.safe_dump(prepare(src)))
        (src/'_ext').mkdir(); (src/'_ext'/'mathml_here.py').write_text(EXTENSION)
        (src/'_static').mkdir(); (src/'_static'/'course.css').write_text(STYLE)
        config = dict(title='risclip', author='The risclip authors', copyright='2026', execute=dict(execute_notebooks='off'), only_build_toc_files=True,
                      html=dict(use_issues_button=False, use_repository_button=False, use_edit_page_button=False), launch_buttons=dict(colab_url=''),
                      parse=dict(myst_enable_extensions=['dollarmath', 'amsmath', 'colon_fence']),
                      sphinx=dict(local_extensions=dict(mathml_here='_ext/'), config=dict(html_math_renderer='mathml', html_css_files=['course.css'],
                                  html_theme_options=dict(use_download_button=False, use_fullscreen_button=False), suppress_warnings=['myst.header', 'mystnb.unknown_mime_type', 'misc.highlighting_failure'])))
        (src/'_config.yml').write_text(yaml.safe_dump(config))
        done = subprocess.run([str(Path(sys.executable).parent/'jupyter-book'), 'build', '-q', str(src), '--path-output', scratch], capture_output=True, text=True)
        html = Path(scratch)/'_build'/'html'
        if done.returncode or not (html/'index.html').exists(): sys.exit(done.stdout + done.stderr)
        told = [line for line in done.stderr.splitlines() if re.search('WARNING|ERROR', line)]
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(html, out, ignore=shutil.ignore_patterns('_sources', '.buildinfo'))
    return told


class Links(HTMLParser):
    "What a page links to, and the places in it that can be linked to."
    def __init__(self): super().__init__(); self.links, self.places = [], {''}
    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in ('href', 'src') and value is not None: self.links.append((tag, value))
            if key in ('id', 'name') and value: self.places.add(value)


def broken(out) -> list:
    "Every link inside the site that leads nowhere, and everything that is fetched from elsewhere: [text]."
    pages = {}
    for file in out.rglob('*.html'):
        if '_static' in file.relative_to(out).parts: continue                # the theme's own templates
        pages[file.resolve()] = found = Links()
        found.feed(file.read_text(encoding='utf-8'))
    wrong = []
    for file, found in pages.items():
        for tag, link in found.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if tag in ('script', 'img') or (tag == 'link' and 'fonts' in link): wrong.append(f'{file.relative_to(out)} fetches {link}')
                continue
            target = (file.parent/unquote(url.path)).resolve() if url.path else file
            if target.is_dir(): target /= 'index.html'
            if not target.exists(): wrong.append(f'{file.relative_to(out)}: {link} is not there')
            elif target in pages and unquote(url.fragment) not in pages[target].places: wrong.append(f'{file.relative_to(out)}: {link} has no such place')
    return sorted(set(wrong))


if __name__ == '__main__':
    out = Path(sys.argv[1] if len(sys.argv) > 1 else root/'site').resolve()
    for line in build(out): print(line)
    if wrong := broken(out): sys.exit('\n'.join(wrong))
    print(f'{len(list(out.rglob("*.html")))} pages in {out}: open {out}/index.html')
