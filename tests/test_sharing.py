"""A model is put on a hub and fetched again: a small hub of our own, which speaks as much of the
real one's protocol as that takes."""
import base64, hashlib, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from shutil import copytree
from urllib.parse import unquote

import huggingface_hub, pytest, torch
from conftest import narrow_clip_folder
from huggingface_hub import ModelCard
from torch.testing import assert_close

from risclip.files import tinyclip_folder
from risclip.hub import model_folder
from risclip.model import RISCLIP, ModelSettings
from risclip.predictor import Predictor
from risclip.settings import settings_of
from risclip.sharing import card_facts, run_facts
from risclip.training import train

SHIPPED = 'risclip-refmojig'
SMALL = dict(cfe_dim=32, num_heads=4, ske_layers=1, ske_mlp_dim=32, decoder_width=8)


def oid(name, revision): return hashlib.sha1(f'{name} {revision}'.encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    "Repositories as {name: {revision: {path: bytes}}}; whoever says the token `right` may write."
    repos, asked = {}, []

    def log_message(self, *args): pass

    def answer(self, value, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in dict({'Content-Length': str(len(body))}, **headers).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def body(self):
        length = self.headers.get('Content-Length')
        if length is not None: return self.rfile.read(int(length))
        body = b''                                           # a stream in chunks
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_POST(self):
        body, path = self.body(), self.path.split('?')[0]
        self.asked.append(path)
        if self.headers.get('Authorization') != 'Bearer right':
            return self.answer(dict(error='no'), 401)
        here = f'http://127.0.0.1:{self.server.server_port}'
        if path == '/api/repos/create':
            made = json.loads(body)
            name = '/'.join(filter(None, (made.get('organization'), made['name'])))
            self.repos.setdefault(name, dict(main={}))
            return self.answer(dict(url=f'{here}/{name}', id=name))
        if path == '/api/validate-yaml': return self.answer(dict(errors=[], warnings=[]))
        name, do, revision = path.removeprefix('/api/models/').rsplit('/', 2)
        if do == 'preupload':
            files = [dict(path=f['path'], uploadMode='regular', shouldIgnore=False)
                     for f in json.loads(body)['files']]
            return self.answer(dict(files=files))
        if do != 'commit': return self.answer(dict(error=f'unknown {path}'), 404)
        files = self.repos[name].setdefault(revision, {})
        for line in map(json.loads, body.splitlines()):
            if line['key'] != 'file': continue
            files[line['value']['path']] = base64.b64decode(line['value']['content'])
        commit = oid(name, revision)
        address = f'{here}/{name}/commit/{commit}'
        self.answer(dict(commitUrl=address, commitOid=commit, success=True))

    def files(self, name, wanted):
        "(revision, its files) of a branch or a commit; None, if there is no such thing."
        for revision, files in self.repos.get(name, {}).items():
            if wanted in (revision, oid(name, revision)): return revision, files

    def do_GET(self):
        path = unquote(self.path.split('?')[0])
        if path.startswith('/api/models/'):
            owner, name, *rest = path.removeprefix('/api/models/').split('/')
            name, what, wanted = f'{owner}/{name}', *(rest or ['revision', 'main'])[:2]
            found = self.files(name, wanted)
            if not found:
                code = 'RevisionNotFound' if name in self.repos else 'RepoNotFound'
                return self.answer(dict(error='not found'), 404, **{'X-Error-Code': code})
            if what == 'tree':
                return self.answer([dict(type='file', path=f, size=len(b), oid=oid(name, f))
                                    for f, b in found[1].items()])
            return self.answer(dict(id=name, modelId=name, sha=oid(name, found[0]), private=False,
                                    siblings=[dict(rfilename=f) for f in found[1]], tags=[]))
        name, rest = path.lstrip('/').split('/resolve/')
        wanted, file = rest.split('/', 1)
        revision, files = self.files(name, wanted) or (None, {})
        if file not in files:
            return self.answer(dict(error='no'), 404, **{'X-Error-Code': 'EntryNotFound'})
        tag = hashlib.sha1(files[file]).hexdigest()
        self.answer(files[file], ETag=f'"{tag}"', **{'X-Repo-Commit': oid(name, revision)})
    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    for name in ('NO_PROXY', 'no_proxy'): monkeypatch.setenv(name, '127.0.0.1')
    there = dict(HF_HUB_OFFLINE=False, ENDPOINT=address, HF_HUB_CACHE=str(tmp_path/'cache'),
                 HUGGINGFACE_CO_URL_TEMPLATE=address + '/{repo_id}/resolve/{revision}/{filename}')
    for name, value in there.items(): monkeypatch.setattr(huggingface_hub.constants, name, value)
    huggingface_hub.close_session()                          # the other tests go nowhere
    Hub.repos, Hub.asked = {}, []
    yield address
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def masks(model):
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    tokens = model.clip.tokenize(['the red dog', 'the car left of the cat'])
    with torch.no_grad(): return model(pixels, tokens).mask


def test_pushed_and_fetched_again(hub):
    model = RISCLIP.from_pretrained(SHIPPED)
    facts = card_facts(model_folder(SHIPPED))
    address = model.push_to_hub('someone/small', model_card_kwargs=facts, token='right')
    assert address == f'{hub}/someone/small/commit/{oid("someone/small", "main")}'
    pushed = Hub.repos['someone/small']['main']
    assert sorted(f for f in pushed if not f.startswith('.')) == [
        'README.md', 'config.json', 'metrics.json', 'model.safetensors', 'run.json']
    assert '# someone/small' in pushed['README.md'].decode()
    fetched = RISCLIP.from_pretrained('someone/small')
    assert torch.equal(masks(fetched), masks(model)) and fetched.trained_on == model.trained_on
    predictor = Predictor.from_pretrained('someone/small', device='cpu')
    assert predictor.threshold == Predictor.from_pretrained(SHIPPED, device='cpu').threshold


@pytest.mark.filterwarnings('ignore:this model stands on the CLIP')
def test_revision_and_cache(hub, narrow_clip, tmp_path):
    "Of two branches the one that was named; once fetched, no net is needed."
    for rung, branch in ('raw', None), ('calibrated', 'v2'):
        model = RISCLIP(ModelSettings(rung), narrow_clip)
        if branch: Hub.repos['someone/two'][branch] = {}
        model.push_to_hub('someone/two', token='right', branch=branch)
    cache = tmp_path/'mine'
    for revision, rung in (None, 'raw'), ('v2', 'calibrated'):
        for local in (False, True):
            fetched = RISCLIP.from_pretrained('someone/two', narrow_clip, revision=revision,
                                              cache_dir=cache, local_files_only=local)
            assert fetched.settings.rung == rung
    with pytest.raises(FileNotFoundError, match='someone/two'):
        RISCLIP.from_pretrained('someone/two', cache_dir=tmp_path/'empty', local_files_only=True)
    with pytest.raises(FileNotFoundError, match='RevisionNotFound'):
        RISCLIP.from_pretrained('someone/two', revision='v3')


def test_half_precision_is_said(hub, narrow_clip):
    model = RISCLIP(ModelSettings('adapters'), narrow_clip)
    facts = card_facts() | dict(half=True)
    with pytest.warns(UserWarning, match='send it along'):
        model.push_to_hub('someone/half', model_card_kwargs=facts, token='right')
    files = Hub.repos['someone/half']['main']
    assert 'in\nhalf precision' in files['README.md'].decode()
    parameters = sum(v.numel() for v in model.trained_state().values())
    assert len(files['model.safetensors']) < 3*parameters + 9000


def test_a_map_is_cut_where_its_run_cut_it(hub, tmp_path):
    "Below the decoder the threshold is the run's, also for whoever fetches the model."
    model = RISCLIP(ModelSettings('ske', **SMALL))
    scores = {k: 1. for k in ('miou', 'oiou', 'p50', 'p60', 'p70', 'p80', 'p90')}
    metrics = dict(grounding=scores, raw=scores, thresholds=dict(raw=.1, grounding=.37), kinds={},
                   expressions=3, data='refmojig', split='test', protocol='own')
    run = tmp_path/'run'
    run.mkdir()
    (run/'metrics.json').write_text(json.dumps(metrics))
    model.push_to_hub('someone/map', model_card_kwargs=card_facts(run), token='right')
    assert Predictor.from_pretrained('someone/map', device='cpu').threshold == .37


def test_the_hub_refuses(hub, narrow_clip):
    model = RISCLIP(ModelSettings('calibrated'), narrow_clip)
    with pytest.raises(ConnectionError, match='answered 401: log in'):
        model.push_to_hub('someone/small', token='wrong')
    assert Hub.repos == {}
    with pytest.raises(FileNotFoundError, match='someone/other'):
        RISCLIP.from_pretrained('someone/other')
    with pytest.raises(ValueError): model.push_to_hub('not a name', token='right')


def test_without_a_net(monkeypatch, narrow_clip):
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    huggingface_hub.close_session()
    model = RISCLIP(ModelSettings('raw'), narrow_clip)
    with pytest.raises(ConnectionError, match='is there a network'):
        model.push_to_hub('someone/small', token='none')
    huggingface_hub.close_session()


def test_the_card_of_a_run(tmp_path):
    "From a run's own files: its scores, settings and versions; nothing of where its data lay."
    clip = narrow_clip_folder(tmp_path/'clip')
    train(settings_of('smoke', root=None, clip=str(clip), features=(1, 2)), tmp_path/'run',
          progress=False)
    model = RISCLIP.from_pretrained(tmp_path/'run')
    with pytest.warns(UserWarning, match='send it along'):
        folder = model.save_pretrained(tmp_path/'mine', True, card_facts(tmp_path/'run'))
    metrics = json.loads((tmp_path/'run'/'metrics.json').read_text())
    card = ModelCard.load(folder/'README.md')
    written = {(r.metric_name.split()[-1], r.metric_type): r.metric_value
               for r in card.data.eval_results}
    for part in ('grounding', 'mask'):
        for key, value in metrics[part].items(): assert written[part, key] == value
    for text in (f"All {metrics['expressions']} expressions of `refmojig` test, at each picture's",
                 'half precision', '| stage1_steps | 6 |', '# mine',
                 f'torch {torch.__version__.split("+")[0]}'):
        assert text in card.text
    assert '| root |' not in card.text
    again = RISCLIP.from_pretrained(folder)
    for name, value in model.trained_state().items():        # half precision
        assert_close(again.trained_state()[name], value, atol=1e-3, rtol=1e-3)
    assert run_facts(folder)['metrics'] == metrics


def test_nothing_is_claimed_that_was_not_recorded(tmp_path):
    model = RISCLIP(ModelSettings('cfe', **SMALL))
    folder = model.save_pretrained(tmp_path/'bare', model_card_kwargs=card_facts())
    card = ModelCard.load(folder/'README.md')
    assert card.data.eval_results is None and 'No scores were recorded' in card.text
    assert 'What it was trained on is not recorded' in card.text
    names = sorted(f.name for f in folder.iterdir())
    assert names == ['README.md', 'config.json', 'model.safetensors']


def test_a_clip_that_nobody_else_has_is_named(tmp_path):
    copytree(tinyclip_folder(), tmp_path/'clip')
    model = RISCLIP(ModelSettings('adapters', clip=str(tmp_path/'clip'), **SMALL))
    with pytest.warns(UserWarning, match='send it along'):
        model.save_pretrained(tmp_path/'mine', model_card_kwargs=card_facts())
