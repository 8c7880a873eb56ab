"""The graders are graded: a solution passes, an empty version fails, and a typical wrong answer
fails with the hint that fits it.

The cells run by exec in this process, which is much faster than a kernel for each wrong answer."""
import ast, contextlib, io, json, os, re, subprocess, sys
from pathlib import Path
import nbformat, pytest
from nbgrader.apps import NbGraderAPI
from nbgrader.api import Gradebook
from nbgrader.preprocessors import ClearSolutions
from traitlets.config import PyFileConfigLoader
from conftest import ROOT

SOURCE = ROOT/'nbs'/'exercises'/'source'
PATHS = {p.stem: p for p in sorted(SOURCE.glob('*/*.ipynb'))}

# For each exercise: a word of the hint, and what is replaced in the solution by what.
WRONG = {
    'refer-shapes': [
        ('aspect', '(8, 3, 224, 224)', '(8, 3, 224, 299)'),
        ('single channel', '(8, 1, 224, 224)', '(8, 224, 224)'),
        ('rows first', '(480, 640)', '(640, 480)'),
        ('comma', 'index = (8,)', 'index = (8, 1)')],
    'refer-split': [
        ('mixed', "ref['split'] == split", "ref['split'].startswith(split)",
         'if split not in splits:', "if not any(s.startswith(split) for s in splits):"),
        ('silently',
         "if split not in splits: raise ValueError(f'no split {split!r}, "
         "only {\", \".join(splits)}')",
         'pass'),
        ('name the splits', ', only {", ".join(splits)}', '')],
    'refer-draw': [
        ('generator', "random.Random(f'{seed} {epoch} {ref_id}').choice", 'random.choice'),
        ('everybody shares', "return random.Random(f'{seed} {epoch} {ref_id}').choice",
         "random.seed(f'{seed} {epoch} {ref_id}'); return random.choice"),
        ('every epoch', "'{seed} {epoch} {ref_id}'", "'{seed} {ref_id}'"),
        ('use ref_id', "'{seed} {epoch} {ref_id}'", "'{seed} {epoch}'"),
        ('their sum', "f'{seed} {epoch} {ref_id}'", 'seed + epoch + ref_id')],
    'scoring-shapes': [
        ('patches', '(5, 1, 12, 12)', '(5, 1, 96, 96)'),
        ('batch', '(5, 1, 12, 12)', '(1, 5, 12, 12)'),
        ('own size', '(100, 140)', '(96, 96)')],
    'scoring-iou': [
        ('twice', '(prediction | truth).sum().item()', '(prediction.sum() + truth.sum()).item()'),
        ('background', '(prediction & truth)', '(prediction == truth)',
         '(prediction | truth).sum().item()', 'truth.numel()'),
        ('Dice', 'intersection/union if',
         '2*intersection/(prediction.sum() + truth.sum()).item() if'),
        ('0/0', 'intersection/union if union else 0.',
         '(prediction & truth).sum()/(prediction | truth).sum()'),
        ('divide', 'intersection/union if union else 0.', 'intersection/union')],
    'scoring-numbers': [
        ('oIoU', '100*miou, 100*oiou', '100*oiou, 100*miou'),
        ('before you divide', 'sum(i for i, u in rows)/sum(u for i, u in rows)', 'miou'),
        ('exactly 0.5', 'iou >= .5', 'iou > .5'),
        ('percent', '100*miou, 100*oiou, 100*p50', 'miou, oiou, p50')],
    'scoring-winners': [
        ('mIoU', '[1., 1., .4, .4, .4]', '[.5, .5, .4, .4, .4]'),
        ('P@0.5', '[.6, .6, .6, .6, .6]', '[.5, .4, .4, .4, .4]'),
        ('percent', '[1., 1., .4, .4, .4]', '[100, 100, 40, 40, 40]')],
    'scoring-dice': [
        ('squares', 'p.square().sum(1) + t.square().sum(1)', 'p.sum(1) + t.sum(1)'),
        ('each map', '2*(p*t).sum(1)', '2*(p*t).sum()', 'p.square().sum(1) + t.square().sum(1)',
         'p.square().sum() + t.square().sum()'),
        ('one number', '(overlap/areas).mean()', '(overlap/areas)')],
    'clip-tokens': [
        ('CLS', '1 + 24*24', '24*24'),
        ('four times', '1 + 24*24', '1 + 2*12*12'),
        ('14', '1 + 34*34', '1 + 29*29')],
    'clip-eos': [
        ('rows too', 't[torch.arange(len(t)), tokens.argmax(1)]', 't[:, tokens.argmax(1)]'),
        ('a pad', 't[torch.arange(len(t)), tokens.argmax(1)]', 't[:, -1]'),
        ('start', 't[torch.arange(len(t)), tokens.argmax(1)]', 't[:, 0]'),
        ('highest', 'tokens.argmax(1)', 'tokens.argmax(1) - 1')],
    'clip-pads': [
        ('id 0', 'torch.arange(tokens.shape[1]) > tokens.argmax(1)[:, None]', 'tokens == 0'),
        ('EOS itself', ' > tokens', ' >= tokens'),
        ('one bool', 'torch.arange(tokens.shape[1]) > tokens.argmax(1)[:, None]',
         'tokens.argmax(1)')],
    'clip-walk': [
        ('MLPs', 'v = v + block.mlp(v)', 'pass'),
        ('residual', 'v = v + block.mlp(v)', 'v = block.mlp(v)'),
        ('changes nothing', 'block.values(v) if values and last else block.attend(v)',
         'block.attend(v)'),
        ('every block', 'values and last', 'values'),
        ('wanted', 'clip.image.project(v)', 'clip.image.project(v)[:, 1:]')],
    'pretraining-shapes': [
        ('a column', 'logits = (128, 128)', 'logits = (128, 96)'),
        ('one number a picture', 'answers = (128,)', 'answers = (128, 128)'),
        ('joint space', 'images = (128, 96)', 'images = (128, 3, 96, 96)')],
    'pretraining-contrastive': [
        ('length one', 'images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)',
         'pass'),
        ('changes nothing', 'scale*images', 'images'),
        ('alike', '(F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers))/2',
         'F.cross_entropy(logits, answers)'),
        ('not their sum',
         '(F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers))/2',
         'F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers)'),
        ('column i', 'torch.arange(len(images))', 'torch.zeros(len(images), dtype=torch.long)')],
    'pretraining-stands': [
        ('probability', '4.16', '1/64'),
        ('bits', '4.16', '6.'),
        ('equally probable', '4.16', '.69')],
    'grounding-shapes': [
        ('CLS', '(5, 900, 512)', '(5, 901, 512)'),
        ('squared', '(5, 900, 512)', '(5, 30, 512)'),
        ('one channel', '(5, 1, 30, 30)', '(5, 512, 30, 30)')],
    'grounding-cosine': [
        ('longer patch', 'F.normalize(patches, dim=-1), ', 'patches, '),
        ('longer sentence', ', F.normalize(sentence, dim=-1)', ', sentence'),
        ('columns', 'reshape(len(p), 1, *grid)',
         'reshape(len(p), 1, grid[1], grid[0]).transpose(2, 3)'),
        ('rows and 3', '.reshape(len(p), 1, *grid)', '')],
    'grounding-halfway': [
        ('shared', 'maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)',
         'maps.min(), maps.max()'),
        ('exactly', 'maps >= ', 'maps > '),
        ('lowest and highest', '(low + high)/2',
         'maps.flatten(1).median(1).values.view(-1, 1, 1, 1)'),
        ('mean', '(low + high)/2', 'maps.mean((1, 2, 3), keepdim=True) + .2*(high - low)')],
    'grounding-centre': [
        ('outside', 'top//w + .5', 'top//h + .5'),
        ('same point', '(top//w + .5)/h, (top % w + .5)/w', '(top//w + .5)/h, (top % h + .5)/w'),
        ('half a patch', '(top//w + .5)/h, (top % w + .5)/w', '(top//w)/h, (top % w)/w'),
        ('row first', '(top//w + .5)/h, (top % w + .5)/w', '(top % w + .5)/w, (top//w + .5)/h')],
    'adapters-shapes': [
        ('biases', '2*96*24 + 24 + 96', '2*96*24'),
        ('[out, in]', 'down = (24, 96)', 'down = (96, 24)'),
        ('shape stays', '(7, 145, 96)', '(7, 145, 24)')],
    'adapters-adapter': [
        ('at zero', 'nn.init.zeros_(self.up.weight)', 'pass'),
        ('dead', 'nn.init.zeros_(self.up.weight)', 'for p in self.parameters(): nn.init.zeros_(p)'),
        ('x + change', 'return self.up(', 'return x + self.up('),
        ('linear', '.relu()', '')],
    'adapters-walk': [
        ('cut', 'x = x + block(x)', 'with torch.no_grad(): x = x + block(x)'),
        ('not frozen', 'blocks.requires_grad_(False)', 'pass'),
        ('nothing can learn', 'blocks.requires_grad_(False)',
         'blocks.requires_grad_(False); adapters.requires_grad_(False)'),
        ('numbers changed', 'x = x + adapter(x)', 'x = adapter(x)')],
    'cfe-shapes': [
        ('shape', '(2, 577, 1024)', '(2, 577, 768)'),
        ('query', '(2, 577, 20)', '(2, 20, 577)', 'text_looks = (2, 20, 577)',
         'text_looks = (2, 577, 20)')],
    'cfe-attend': [
        ('sum to one', 'scores.softmax(-1)', 'scores.softmax(1)'),
        ('scaled', '/q.shape[-1]**.5', ''),
        ('minus infinity', "float('-inf')", '0.'),
        ('before the softmax', "scores = scores.masked_fill(pad[:, None], float('-inf'))", '',
         'scores.softmax(-1)@v', 'scores.softmax(-1).masked_fill(pad[:, None], 0.)@v')],
    'cfe-exchange': [
        ('already heard', 'return v + image(v, t), t + text(t, v)',
         'v = v + image(v, t); return v, t + text(t, v)'),
        ('already looked', 'return v + image(v, t), t + text(t, v)',
         't = t + text(t, v); return v + image(v, t), t'),
        ('changes added', 'v + image(v, t), t + text(t, v)', 'image(v, t), text(t, v)')],
    'cfe-meetings': [
        ('count from 1', 'int(k*n_image/n_text + .5) - 1, k - 1', 'int(k*n_image/n_text + .5), k',
         'range(1, n_text + 1)', 'range(n_text)'),
        ('cut off', ' + .5', ''),
        ('halves', 'int(k*n_image/n_text + .5)', 'round(k*n_image/n_text)'),
        ('one to one', 'k - 1)', 'k)')],
    'ske-shapes': [
        ('query', 'image_text = (4, 197, 20)', 'image_text = (4, 20, 197)'),
        ('heads', 'text_text = (4, 20, 20)', 'text_text = (4, 8, 20, 20)'),
        ('residual', '(4, 197, 512)', '(4, 196, 512)')],
    'ske-half': [
        ('lost', 'x = x + between(norm(x), other)', 'x = between(norm(x), other)',
         'x = x + within(n, n)', 'x = within(n, n)', 'return x + mlp', 'return mlp'),
        ('tokens themselves', 'x = x + between', 'x = norm(x); x = x + between'),
        ('normed tokens', 'between(norm(x), other)', 'between(x, other)'),
        ('between comes first', 'x = x + between(norm(x), other)', 'n = norm(x)',
         'n = norm(x)\n    x = x + within(n, n)',
         'x = x + within(n, n)\n    x = x + between(norm(x), other)'),
        ('mlp comes last', 'n = norm(x)', 'n = norm(x); x, m = x, mlp(norm(x))',
         'mlp(norm(x))\n    ### END', 'm\n    ### END')],
    'ske-pads': [
        ('still move', 'within(t, t, pad)', 'within(t, t)'),
        ('zeroed', 'return t + within(t, t, pad)',
         't = t.masked_fill(pad[..., None], 0.); return t + within(t, t)'),
        ('has no pads', 'between(t, v)', 'between(t, v, pad)'),
        ('both residual', 'return t + within', 'return within')],
    'decoder-shapes': [
        ('doubles', '(2, 64, 28, 28)', '(2, 64, 14, 14)'),
        ('third argument', '(2, 64, 56, 56)', '(2, 32, 56, 56)'),
        ('one channel more', 'into_d4 = 65', 'into_d4 = 769'),
        ('only once', 'into_d3 = 128', 'into_d3 = 129')],
    'decoder-twice': [
        ('corners', '((torch.arange(2*n) + .5)/2 - .5).clamp(0, n - 1)',
         'torch.arange(2*n)*(n - 1)/(2*n - 1)'),
        ('nearest', 'row[left] + (at - left)*(row[right] - row[left])', 'row.repeat_interleave(2)'),
        ('within 0', '.clamp(0, n - 1)', '', 'at.floor().long()',
         'at.floor().long().clamp(0, n - 2)')],
    'decoder-decode': [
        ('wrong order', 'reversed(features)', 'features'),
        ('never enters', 'reversed(features)', '[features[-1]]*4'),
        ('was changed', 'd = grounding', 'd = grounding; features.reverse()', 'reversed(features)',
         'features'),
        ('map is lost', 'd = grounding', "d = ''")],
    'training-shapes': [
        ('patch', '(64, 1, 12, 12)', '(64, 1, 96, 96)'),
        ('own size', '(64, 1, 96, 96)', '(64, 1, 12, 12)', 'label1 = (64, 1, 12, 12)',
         'label1 = (64, 1, 96, 96)'),
        ('not be full', 'steps = 15', 'steps = 16')],
    'training-label': [
        ('any overlap', 'mask.reshape(B, 1, H//patch, patch, W//patch, patch).mean((3, 5))',
         'F.max_pool2d(mask, patch)'),
        ('one pixel', 'mask.reshape(B, 1, H//patch, patch, W//patch, patch).mean((3, 5))',
         'mask[..., ::patch, ::patch]'),
        ('divide', '.mean((3, 5))', '.sum((3, 5))')],
    'training-save': [
        ('half written', "part = path.with_name(path.name + '.part')", 'part = path'),
        ('removed', 'part = path', 'path.unlink(missing_ok=True); part = path'),
        ('beside', 'part.replace(path)', 'path.write_bytes(part.read_bytes())'),
        ('rename the part', 'part.replace(path)', 'pass')],
    'training-rows': [
        ('that others use', 'np.random.default_rng([seed, epoch])', 'np.random'),
        ('same order', '[seed, epoch]', '[seed]'),
        ('mixes', '[seed, epoch]', 'seed + epoch'),
        ('twice within', '[seed, epoch]', '[seed, step]'),
        ('last of its epoch', 'n//size)', '-(-n//size))'),
        ('another seed', '[seed, epoch]', '[epoch]')],
}


def read(path): return nbformat.read(path, 4)


def of(cell): return cell.metadata.get('nbgrader', {})


def run(source, namespace):
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(source, '<cell>', 'exec'), namespace)


def exercises(path):
    """(id, number of the solution cell, number of its test cell) of each exercise; the test cell is
    the next one."""
    cells = read(path).cells
    return [(of(c).grade_id, i, i + 1) for i,c in enumerate(cells) if of(c).get('solution')]


EXERCISES = {grade_id: (path, i, k) for path in PATHS.values()
             for grade_id, i, k in exercises(path)}
before = {}   # the variables just before each solution


def variables_before(grade_id):
    "Run the notebook from the top up to the exercise, solutions included; each notebook only once."
    path = EXERCISES[grade_id][0]
    if grade_id not in before:
        namespace = {'__name__': 'exercise'}
        for cell in read(path).cells:
            if of(cell).get('solution'): before[of(cell).grade_id] = dict(namespace)
            if cell.cell_type == 'code': run(cell.source, namespace)
    return dict(before[grade_id])


def graded(grade_id, answer):
    "What the exercise's test cell raises after the answer was run; None if it passes."
    path, _, k = EXERCISES[grade_id]
    namespace = variables_before(grade_id)
    # as in grading: a cell that fails does not stop the next
    with contextlib.suppress(Exception): run(answer, namespace)
    try: run(read(path).cells[k].source, namespace)
    except Exception as e: return e


def solution(grade_id):
    path, i, _ = EXERCISES[grade_id]
    return read(path).cells[i].source


def replaced(source, *pairs):
    for old,new in zip(pairs[::2], pairs[1::2], strict=True):
        assert source.count(old) == 1, f'{old!r} stands {source.count(old)} times in the solution'
        source = source.replace(old, new)
    return source


each_exercise = pytest.mark.parametrize('grade_id', EXERCISES)


def test_metadata():
    assert len(EXERCISES) >= 14 and WRONG.keys() == EXERCISES.keys()
    ids = [of(c).grade_id for path in PATHS.values() for c in read(path).cells if of(c)]
    assert len(ids) == len(set(ids))
    for grade_id, (path, i, k) in EXERCISES.items():
        answer, test = (read(path).cells[n] for n in (i, k))
        assert dict(of(answer)) == dict(grade=False, grade_id=grade_id, locked=False,
                                        schema_version=3, solution=True, task=False)
        assert of(test).points > 0
        assert dict(of(test), points=1) == dict(grade=True, grade_id=f'{grade_id}-test',
                                                locked=True, points=1, schema_version=3,
                                                solution=False, task=False)
        assert all(node.msg for node in ast.walk(ast.parse(test.source))
                   if isinstance(node, ast.Assert)), f'{grade_id}: a check without a hint'
        begins, ends = (answer.source.count(f'### {word} SOLUTION') for word in ('BEGIN', 'END'))
        assert begins == ends > 0


@each_exercise
def test_solution_passes(grade_id): assert graded(grade_id, solution(grade_id)) is None


@each_exercise
def test_empty_version_fails(grade_id):
    path, i, _ = EXERCISES[grade_id]
    cell, _ = ClearSolutions().preprocess_cell(read(path).cells[i], dict(language='python'), i)
    assert 'NotImplementedError' in cell.source and 'SOLUTION' not in cell.source
    assert graded(grade_id, cell.source) is not None


@each_exercise
def test_wrong_answers_get_their_hint(grade_id):
    assert len(WRONG[grade_id]) >= 2
    for word, *pairs in WRONG[grade_id]:
        found = graded(grade_id, replaced(solution(grade_id), *pairs))
        wanted = f'{pairs}: expected a hint with {word!r}, got {found!r}'
        assert isinstance(found, AssertionError) and word in str(found), wanted


def test_links_lead_somewhere():
    for path in PATHS.values():
        text = '\n'.join(c.source for c in read(path).cells if c.cell_type == 'markdown')
        links = re.findall(r'\]\((?![a-z]+:|#)([^)\s#]+)', text)
        assert links
        for link in links: assert (path.parent/link).is_file(), link


@pytest.fixture
def not_activated(monkeypatch):
    "An environment's python called by its path, as make does: its other programs are on no PATH."
    monkeypatch.setenv('PATH', os.defpath)


def test_assignments(tmp_path, not_activated):
    """What `make assignments` makes: every notebook, without solutions and hidden tests; a second
    run leaves alone what is there."""
    def make():
        tool = [sys.executable, ROOT/'tools'/'assignments.py', tmp_path/'assignments']
        done = subprocess.run(tool, check=True, capture_output=True, text=True, cwd=tmp_path)
        return done.stdout

    make()
    made = {p.relative_to(tmp_path/'assignments'): p for p in (tmp_path/'assignments').rglob('*')
            if p.is_file()}
    assert sorted(made) == sorted(p.relative_to(SOURCE) for p in PATHS.values())
    for name, path in made.items():
        text, source = path.read_text(encoding='utf-8'), read(SOURCE/name)
        assert not re.search('BEGIN SOLUTION|END SOLUTION|HIDDEN TESTS', text)
        assert text.count('raise NotImplementedError()') >= sum(
            of(c).get('solution', False) for c in source.cells)
        for link in re.findall(r'\]\((\.\.[^)\s#]+)', text):
            assert (path.parent/link).resolve().is_file(), link
    assert [p.name for p in tmp_path.iterdir()] == ['assignments']
    mine = next(iter(made.values()))
    mine.write_text('half done', encoding='utf-8')
    assert str(mine) in make() and mine.read_text(encoding='utf-8') == 'half done'


@pytest.mark.filterwarnings('ignore::sqlalchemy.exc.SAWarning')
def test_autograding(tmp_path, not_activated):
    """nbgrader itself, from end to end: a release, a submission with one right and one wrong
    answer, its points in the gradebook."""
    name, notebook = '03_scores', 'scores'
    (tmp_path/'source'/name).mkdir(parents=True)
    original = SOURCE/name/f'{notebook}.ipynb'
    (tmp_path/'source'/name/original.name).write_bytes(original.read_bytes())
    config = PyFileConfigLoader('nbgrader_config.py', str(SOURCE.parent)).load_config()
    config.CourseDirectory.root = str(tmp_path)
    config.CourseDirectory.db_url = f'sqlite:///{tmp_path}/gradebook.db'
    config.CourseDirectory.source_directory = str(tmp_path/'source')
    api = NbGraderAPI(config=config)
    done = api.generate_assignment(name)
    assert done['success'], done

    nb = read(tmp_path/'release'/name/f'{notebook}.ipynb')
    word, *pairs = WRONG['scoring-numbers'][0]
    answers = {'scoring-iou': solution('scoring-iou'),
               'scoring-numbers': replaced(solution('scoring-numbers'), *pairs)}
    for cell in nb.cells:
        if of(cell).get('grade_id') in answers: cell.source = answers[of(cell).grade_id]
    handed_in = tmp_path/'submitted'/'ada'/name/f'{notebook}.ipynb'
    handed_in.parent.mkdir(parents=True)
    nbformat.write(nb, handed_in)
    done = api.autograde(name, 'ada')
    assert done['success'], done

    with Gradebook(config.CourseDirectory.db_url) as gradebook:
        submission = gradebook.find_submission_notebook(notebook, name, 'ada')
        points = {g.name: (g.score, g.max_score) for g in submission.grades}
    worth = {of(c).grade_id: of(c).points for c in read(SOURCE/name/f'{notebook}.ipynb').cells
             if of(c).get('grade')}
    assert points == {grade_id: (most if grade_id == 'scoring-iou-test' else 0, most)
                      for grade_id, most in worth.items()}
    autograded = read(tmp_path/'autograded'/'ada'/name/f'{notebook}.ipynb')
    outputs = json.dumps([c.get('outputs', []) for c in autograded.cells])
    assert word in outputs
