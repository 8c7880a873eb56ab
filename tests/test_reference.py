"""The two reference pages: what notation.ipynb links to and names is there, and
slides_to_code.ipynb has an object and a test in every row."""
import ast, importlib, pkgutil, re
from collections import Counter
from functools import cache
import nbformat, pytest
import risclip
from conftest import ROOT

NBS = ROOT/'nbs'
CHAPTERS = sorted(p.name for p in NBS.glob('[0-9]*.ipynb'))
ROOMS = sorted(f'engine/{p.name}' for p in NBS.glob('engine/*.ipynb'))
PAGES = ('notation.ipynb', 'slides_to_code.ipynb')
PARTS = ('The idea', 'CLIP alone', 'Adapters', 'CFE', 'SKE', 'Decoder', 'Training', 'Measured')


@cache
def cells(name, kind=None):
    return [c.source for c in nbformat.read(NBS/name, 4).cells if kind in (None, c.cell_type)]
def text(name): return '\n'.join(cells(name))
def links(markdown): return re.findall(r'\]\((?![a-z]+:|#)([^)\s#{}]+)\)', markdown)


def glossary():
    "The rows of the glossary's tables: (words, meaning, names of the code, linked chapters)."
    rows = [line.strip('|').split('|') for source in cells('notation.ipynb', 'markdown')
            for line in source.splitlines() if line.startswith('| **')]
    return [(word.strip().strip('*').split(', '), meaning.strip(), re.findall(r'`([^`]+)`', code),
             links(chapter)) for word, meaning, code, chapter in rows]


def slides():
    "ROWS of slides_to_code.ipynb, as dicts, read from its source: nothing is run."
    rows, = (node.value for source in cells('slides_to_code.ipynb', 'code')
             if re.search('^ROWS =', source, re.M) for node in ast.parse(source).body)
    return [{k.arg: ast.literal_eval(k.value) for k in row.keywords} for row in rows.elts]


@cache
def public():
    "{name: object} of all that the modules of the library export."
    modules = [importlib.import_module(f'risclip.{m.name}')
               for m in pkgutil.iter_modules(risclip.__path__) if not m.name.startswith('_')]
    return {name: getattr(m, name) for m in modules for name in m.__all__}


def missing(dotted):
    "What is not there of a public name and what follows its dots; None if all of it is."
    first, *rest = dotted.split('.')
    if first not in public(): return first
    thing = public()[first]
    for part in rest:
        if not hasattr(thing, part): return part
        thing = getattr(thing, part)


TESTS = Counter(name for file in (ROOT/'tests').glob('test_*.py')
                for name in re.findall(r'^def (test_\w+)\(', file.read_text(), re.M))
each_page = pytest.mark.parametrize('page', PAGES)
each_word = pytest.mark.parametrize('words, meaning, names, chapters', glossary(),
                                    ids=[row[0][0] for row in glossary()])
each_row = pytest.mark.parametrize('row', slides(), ids=range(1, len(slides()) + 1))


# --- both pages

@each_page
def test_links_lead_to_notebooks(page):
    found = links(text(page))
    assert len(found) >= 5
    for link in found: assert (NBS/link).is_file(), link


@each_page
def test_a_reference_page_is_no_module(page):
    for source in cells(page, 'code'):
        assert not re.search(r'^#\|\s*(default_exp|export)', source, re.M)


# --- notation.ipynb

def test_every_word_stands_once():
    words = [word for row in glossary() for word in row[0]]
    assert len(glossary()) >= 25 and [word for word, n in Counter(words).items() if n > 1] == []


@each_word
def test_a_word_is_met_in_its_chapter(words, meaning, names, chapters):
    chapter, = chapters
    assert chapter in (*CHAPTERS, *ROOMS) and meaning
    for word in words:
        assert word.lower() in text(chapter).lower(), f'{chapter} does not say {word!r}'


@each_word
def test_names_of_the_glossary_are_in_the_library(words, meaning, names, chapters):
    for name in names: assert missing(name) is None, f'{name}: there is no {missing(name)}'


def test_a_wrong_name_is_found():
    assert (missing('CFE.forward'), missing('Expression.kind')) == (None, None)
    assert (missing('CFE.forwards'), missing('CFEE'), missing('torch')) == (
        'forwards', 'CFEE', 'torch')


def test_papers_are_linked_as_in_the_chapters():
    """An arXiv number or an ACL Anthology name of the reading list stands in a chapter, the index
    or the library too."""
    paper = r'arxiv\.org/abs/(\d{4}\.\d{5})|aclanthology\.org/([\w.-]+\w)'
    listed = {a or b for a, b in re.findall(paper, text('notation.ipynb'))}
    elsewhere = '\n'.join([*map(text, [*CHAPTERS, 'index.ipynb']),
                           *(p.read_text(encoding='utf-8') for p in (ROOT/'risclip').glob('*.py'))])
    assert len(listed) >= 10 and [paper for paper in sorted(listed) if paper not in elsewhere] == []


# --- slides_to_code.ipynb

@each_row
def test_a_row_names_objects_that_exist(row):
    assert row['objects']
    for name in row['objects']:
        package, module, rest = name.split('.', 2)
        assert package == 'risclip'
        exported = importlib.import_module(f'risclip.{module}').__all__
        assert rest.split('.')[0] in exported, name
        assert missing(rest) is None, name


@each_row
def test_a_row_names_tests_and_checks_that_exist(row):
    assert row['tests']
    for test in row['tests']: assert TESTS[test] == 1, f'{test}: {TESTS[test]} tests have this name'
    asserting = [source for source in cells(row['chapter'], 'code')
                 if re.search(r'\bassert|\btest_(eq|close|fail)\b', source)]
    for check in row.get('checks', []): assert any(check in source for source in asserting), check


@each_row
def test_the_chapter_of_a_row_speaks_of_it(row):
    assert row['chapter'] in CHAPTERS
    names = [name.split('.')[-1] for name in row['objects']]
    named = [name for name in names if re.search(rf'\b{name}\b', text(row['chapter']))]
    assert named, f'{row["chapter"]} names none of {names}'


def test_the_slides_are_covered():
    rows = slides()
    assert list(dict.fromkeys(row['part'] for row in rows)) == list(PARTS)
    assert len({row['says'] for row in rows}) == len(rows) >= 30
    assert {row['verdict'] for row in rows} == {'same', 'differs', 'other data'}
    assert [row['number'] for row in rows if row['verdict'] == 'other data'] == [
        'raw', 'adapters', 'cfe', 'ske', 'decoder']
