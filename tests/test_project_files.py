"""The files around the code: what CI runs, how to cite, what changed, how to contribute, and the
tool that times the chapters."""
import configparser, importlib.util, json, re
from datetime import date
import nbformat, pytest, yaml
from conftest import ROOT, source_files


def read(name): return (ROOT/name).read_text(encoding='utf-8')


def settings():
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read_string(read('settings.ini'))
    return parser['DEFAULT']


@pytest.fixture(scope='module')
def workflow(): return yaml.safe_load(read('.github/workflows/ci.yml'))


def test_workflow_runs_what_ci_runs(workflow):
    job, = workflow['jobs'].values()
    commands = [line.strip() for step in job['steps'] for line in step.get('run', '').splitlines()]
    assert 'bash .ci/run' in commands
    assert (ROOT/'.ci'/'run').is_file() and 'make test ALL=1' in read('.ci/run').splitlines()
    assert any('chromium' in c for c in commands)
    assert commands.index('bash .ci/run') == len(commands) - 1
    assert job['runs-on'] == 'ubuntu-latest' and job['timeout-minutes'] == 40


def test_workflow_runs_on_push_and_pull_request(workflow):
    # YAML 1.1 reads the key `on` as true
    assert set(workflow[True]) == {'push', 'pull_request'}


def test_workflow_takes_the_least_python_and_caches_pip(workflow):
    job, = workflow['jobs'].values()
    steps = [step for step in job['steps']
             if step.get('uses', '').startswith('actions/setup-python@')]
    python, = [step['with'] for step in steps]
    # quoted: 3.10 without quotes would be 3.1
    assert python['python-version'] == settings()['min_python']
    assert python['cache'] == 'pip'
    for file in python['cache-dependency-path'].split(): assert (ROOT/file).is_file(), file


@pytest.fixture(scope='module')
def citation(): return yaml.safe_load(read('CITATION.cff'))


def test_citation_names_this_software(citation):
    assert citation['cff-version'] == '1.2.0' and citation['type'] == 'software'
    assert citation['version'] == settings()['version']
    assert citation['title'].startswith(settings()['lib_name'])
    assert [a['name'] for a in citation['authors']] == [settings()['author']]
    assert citation['message']
    assert citation['license'] == 'Apache-2.0'
    assert 'Apache License' in read('LICENSE')


def test_citation_names_the_paper(citation):
    paper, index = citation['preferred-citation'], read('README.md')
    assert paper['type'] == 'conference-paper' and isinstance(paper['year'], int)
    assert paper['url'].startswith('https://')
    assert all(a.keys() == {'family-names', 'given-names'} for a in paper['authors'])
    surnames = [a['family-names'] for a in paper['authors']]
    # as the README says it
    assert ', '.join(surnames[:-1]) + f' and {surnames[-1]}' in index
    for fact in (paper['title'], paper['url'], f"{paper['collection-title']}"): assert fact in index


def test_changelog_names_the_version():
    heads = re.findall(r'^## \[(.+?)\] - (\S+)$', read('CHANGELOG.md'), re.M)
    assert settings()['version'] == heads[0][0]
    assert len({version for version, _ in heads}) == len(heads)
    for version, day in heads:
        assert re.fullmatch(r'\d+\.\d+\.\d+', version)
        assert day == 'unreleased' or date.fromisoformat(day)


def test_changelog_names_every_command():
    changelog = read('CHANGELOG.md')
    for entry in settings()['console_scripts'].split():
        assert f"`{entry.split('=')[0]}`" in changelog


def make_targets(): return set(re.findall(r'^([a-z]+):', read('Makefile'), re.M))


@pytest.mark.parametrize('name', ['CONTRIBUTING.md', 'CHANGELOG.md'])
def test_links_lead_somewhere(name):
    files = {f.as_posix() for f in source_files()}
    there = files | {p.as_posix() for f in source_files() for p in f.parents}
    links = re.findall(r'\]\((?![a-z]+:|#)([^)\s#]+)', read(name))
    assert links or name == 'CHANGELOG.md'
    assert [link for link in links if link.rstrip('/') not in there] == []


@pytest.mark.parametrize('name', ['CONTRIBUTING.md', 'CHANGELOG.md'])
def test_make_targets_exist(name):
    named = set(re.findall(r'`make ([a-z]+)', read(name)))
    assert named and named <= make_targets(), named - make_targets()


def test_contributing_says_what_is_tested():
    "Its numbers and names are those of the tests and of the settings."
    text = read('CONTRIBUTING.md')
    limits = dict(re.findall(r'(\w+)=(\d+)', re.search(
        r'LIMITS = dict\((.+?)\)', read('tests/test_house.py'), re.S)[1]))
    assert len(limits) == 6
    for what, limit in limits.items(): assert re.search(rf'\b{limit}\b', text), what
    for key in settings()['allowed_cell_metadata_keys'].split(): assert f'`{key}`' in text
    for file in re.findall(r'`python (tools/\w+\.py)`', text): assert (ROOT/file).is_file(), file


@pytest.fixture
def times():
    spec = importlib.util.spec_from_file_location('chapter_times', ROOT/'tools'/'chapter_times.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook(path, source):
    kernel = dict(kernelspec=dict(name='python3', display_name='python3'))
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=kernel)
    nbformat.write(nb, path)
    return path


def test_chapter_times(times, tmp_path, capsys, monkeypatch):
    """A notebook is timed and left as it is, one that fails is named and has no time, and what was
    measured before is kept."""
    monkeypatch.setattr(times, 'root', tmp_path)
    (tmp_path/'nbs').mkdir()
    for name in ('earlier', 'bad'): (tmp_path/'nbs'/f'{name}.ipynb').write_text('')
    wait = 'import time\ntime.sleep(.5)\nopen("mark", "w").close()'
    slow, bad = notebook(tmp_path/'nbs'/'slow.ipynb', wait), notebook(
        tmp_path/'nbs'/'bad.ipynb', '1/0')
    before, file = {p: p.read_bytes() for p in (slow, bad)}, tmp_path/'times.json'
    times.write(file, dict(device='cpu2', seconds=dict(earlier=3.0, bad=1.0, gone=2.0)))
    assert times.measure([slow, bad], 'cpu2', file) == ['bad']
    found = json.loads(file.read_text())
    assert found['device'] == 'cpu2' and found['seconds'].keys() == {'earlier', 'slow'}
    assert .5 <= found['seconds']['slow'] < 300
    assert {p: p.read_bytes() for p in before} == before and not (tmp_path/'mark').exists()
    assert 'ZeroDivisionError' in capsys.readouterr().out
    # another machine's times are not mixed in
    assert times.known(file, 'cpu4') == {}
