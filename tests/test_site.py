"""The site: what is hidden stays hidden, links that lead nowhere are found. (`make site` builds it
and checks every link.)"""
import json, re, sys
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'tools'))
import site_pages as site


def test_directives_and_hidden_cells_do_not_show():
    def cell(source): return dict(cell_type='code', source=source, metadata={}, outputs=[])
    nb = dict(cells=[cell('#| default_exp cfe'), cell('#| hide\nsecret = 1'),
                     cell('#| export\nx = 1'), cell('#| echo: false\ny = 2'),
                     dict(cell_type='markdown', source=['# a\n', 'b'], metadata={})])
    cells = site.shown(nb)['cells']
    assert [c['source'] for c in cells] == ['x = 1', 'y = 2', '# a\nb']
    assert cells[1]['metadata']['tags'] == ['remove-input'] and 'tags' not in cells[0]['metadata']


def test_no_page_has_a_solution(tmp_path):
    pytest.importorskip('nbdev')
    toc = site.prepare(tmp_path)
    listed = {'index', *(c['file'] for part in toc['parts'] for c in part['chapters'])}
    there = {p.relative_to(tmp_path).with_suffix('').as_posix() for ext in ('ipynb', 'md')
             for p in tmp_path.rglob(f'*.{ext}')}
    assert listed == there                                       # every page can be reached
    assert not [p for p in there if p.startswith(('exercises', 'runs'))]
    assert {'engine/runs', 'api/runs'} <= there
    for page in tmp_path.rglob('*.ipynb'):
        for cell in json.loads(page.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] != 'code': continue
            assert '### BEGIN SOLUTION' not in ''.join(cell['source']), page
    assert {p.stem for p in (ROOT/'nbs').glob('[0-9]*.ipynb')} <= listed
    assert {f'engine/{p.stem}' for p in (ROOT/'nbs'/'engine').glob('*.ipynb')} <= listed


def test_links_between_notebooks_stay_on_the_site():
    "The templates of nbs/runs and the exercises are no pages: a link to them would lead nowhere."
    nbs = ROOT/'nbs'
    pages = {*site.chapters(), *site.engine(), nbs/'index.ipynb'}
    pages |= {nbs/f'{name}.ipynb' for name in site.PAGES}
    for page in pages:
        for cell in json.loads(page.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] != 'markdown': continue
            links = re.findall(r'\]\(([\w./-]+\.ipynb)', ''.join(cell['source']))
            for link in links: assert (page.parent/link).resolve() in pages, f'{page.name}: {link}'


def test_the_api_is_whole(tmp_path):
    text = site.api('cfe', '08_cfe.ipynb')
    for name in ('Attention', 'CFE', 'meeting_blocks'): assert f'## {name}' in text
    assert 'return_attention' in text
    assert '](../08_cfe.ipynb)' in text
    assert 'LNone' not in text
    assert '{target' not in text


@pytest.mark.parametrize('page, fault', [
    ('<a href="b.html#here">x</a>', None), ('<a href="c.html">x</a>', 'c.html is not there'),
    ('<a href="b.html#gone">x</a>', 'b.html#gone has no such place'),
    ('<img src="no.png">', 'no.png is not there'),
    ('<script src="https://example.org/x.js"></script>', 'fetches https://example.org/x.js'),
    ('<a href="https://example.org">x</a>', None), ('<a href="#top">x</a><p id="top">', None)])
def test_broken_links_are_found(tmp_path, page, fault):
    (tmp_path/'b.html').write_text('<h1 id="here">b</h1>')
    (tmp_path/'a.html').write_text(page)
    found = site.broken(tmp_path)
    assert found == [] if fault is None else len(found) == 1 and fault in found[0]
