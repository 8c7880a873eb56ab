"A model is put on a hub and fetched again: a small hub of our own, which speaks as much of the real one's protocol as that takes."
import base64, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote
import huggingface_hub, pytest, torch
from huggingface_hub import ModelCard
from torch.testing import assert_close
import risclip.predictor
from risclip.model import ModelSettings, load_risclip, model_folder
from risclip.predictor import Predictor
from risclip.sharing import RISCLIP, run_facts
from risclip.training import settings_of, train

SHIPPED = 'risclip-refmojig'
SMALL = dict(shared=32, heads=4, ske_layers=1, ske_hidden=32, decoder_width=8)
OID = 'c0ffee'*6 + 'abcd'


class Hub(BaseHTTPRequestHandler):
    "Repositories as {name: {path: bytes}}; whoever says the token `right` may write."
    repos, asked = {}, []

    def log_message(self, *args): pass

    def answer(self, value, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in dict({'Content-Length': str(len(body))}, **headers).items(): self.send_header(key, text)
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def do_POST(self):
        n = self.headers.get('Content-Length')
        if n is None:                                                   # a stream in chunks
            body = b''
            while size := int(self.rfile.readline(), 16): body += self.rfile.read(size); self.rfile.readline()
            self.rfile.readline()
        else: body = self.rfile.read(int(n))
        path = self.path.split('?')[0]
        self.asked.append(path)
        here = f'http://127.0.0.1:{self.server.server_port}'
        if self.headers.get('Authorization') != 'Bearer right': return self.answer(dict(error='no'), 401)
        if path == '/api/repos/create':
            told = json.loads(body); name = '/'.join(filter(None, (told.get('organization'), told['name'])))
            self.repos.setdefault(name, {}); return self.answer(dict(url=f'{here}/{name}', id=name))
        if path == '/api/validate-yaml': return self.answer(dict(errors=[], warnings=[]))
        name, do = path.removeprefix('/api/models/').split('/main')[0].rsplit('/', 1)
        if do == 'preupload': return self.answer(dict(files=[dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in json.loads(body)['files']]))
        if do == 'commit':
            for line in map(json.loads, body.splitlines()):
                if line['key'] == 'file': self.repos[name][line['value']['path']] = base64.b64decode(line['value']['content'])
            return self.answer(dict(commitUrl=f'{here}/{name}/commit/{OID}', commitOid=OID, success=True))
        self.answer(dict(error=f'unknown {path}'), 404)

    def do_GET(self):
        path = unquote(self.path.split('?')[0])
        if path.startswith('/api/models/'):
            name = '/'.join(path.removeprefix('/api/models/').split('/')[:2])
            if name not in self.repos: return self.answer(dict(error='Repository not found'), 404, **{'X-Error-Code': 'RepoNotFound'})
            if '/tree/' in path: return self.answer([dict(type='file', path=f, size=len(b), oid=OID) for f, b in self.repos[name].items()])
            return self.answer(dict(id=name, modelId=name, sha=OID, siblings=[dict(rfilename=f) for f in self.repos[name]], private=False, tags=[], downloads=0))
        name, file = path.lstrip('/').split('/resolve/')
        content = self.repos.get(name, {}).get(file.split('/', 1)[1])
        if content is None: return self.answer(dict(error='Entry not found'), 404, **{'X-Error-Code': 'EntryNotFound'})
        self.answer(content, ETag=f'"{hash(content) & 0xffffffff:08x}"', **{'X-Repo-Commit': OID})
    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    for name in ('NO_PROXY', 'no_proxy'): monkeypatch.setenv(name, '127.0.0.1')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)      # the other tests go nowhere
    huggingface_hub.close_session()
    monkeypatch.setattr(risclip.predictor, 'snapshot_download', lambda *a, **k: huggingface_hub.snapshot_download(*a, cache_dir=tmp_path/'cache', endpoint=address, **k))
    Hub.repos, Hub.asked = {}, []
    yield address
    server.shutdown(); server.server_close(); huggingface_hub.close_session()


def asked_of(model):
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): return model(pixels, model.clip.tokenize(['the red dog', 'the car left of the cat'])).mask


def test_pushed_and_fetched_again(hub):
    model = load_risclip(SHIPPED)
    address = model.push_to_hub('someone/small', run=model_folder(SHIPPED), token='right', endpoint=hub)
    assert address == f'{hub}/someone/small'
    assert sorted(f for f in Hub.repos['someone/small'] if not f.startswith('.')) == ['README.md', 'config.json', 'metrics.json', 'run.json', 'weights.safetensors']
    fetched = RISCLIP.from_pretrained('someone/small')
    assert torch.equal(asked_of(fetched), asked_of(model))
    predictor = Predictor.from_pretrained('someone/small', device='cpu')
    assert predictor.threshold == Predictor.from_pretrained(SHIPPED, device='cpu').threshold


def test_a_map_is_cut_where_its_run_cut_it(hub, tmp_path):
    "Below the decoder the threshold is the run's, also for whoever fetches the model."
    model = RISCLIP(ModelSettings('ske', **SMALL))
    metrics = dict(grounding={k: 1. for k in ('miou', 'oiou', 'p50', 'p60', 'p70', 'p80', 'p90')}, raw={}, thresholds=dict(raw=.1, grounding=.37), expressions=3, kinds={}, data='refmojig', split='test', protocol='own')
    metrics['raw'] = metrics['grounding']
    run = tmp_path/'run'; run.mkdir(); (run/'metrics.json').write_text(json.dumps(metrics))
    model.push_to_hub('someone/map', run=run, token='right', endpoint=hub)
    assert Predictor.from_pretrained('someone/map', device='cpu').threshold == .37


def test_the_hub_refuses(hub, tmp_path):
    model = RISCLIP(ModelSettings('adapters', **SMALL))
    with pytest.raises(ConnectionError, match='answered 401: log in'): model.push_to_hub('someone/small', token='wrong', endpoint=hub)
    assert Hub.repos == {}
    with pytest.raises(FileNotFoundError, match='someone/other'): RISCLIP.from_pretrained('someone/other')


def test_the_card_of_a_run(tmp_path):
    "From a run's own files: its scores, settings and versions; nothing of where its data lay."
    train(settings_of('smoke', root=None), tmp_path/'run', progress=False)
    model = RISCLIP.from_pretrained(tmp_path/'run')
    folder = model.save_pretrained(tmp_path/'mine', run=tmp_path/'run', name='me/mine', half=True)
    metrics, card = json.loads((tmp_path/'run'/'metrics.json').read_text()), ModelCard.load(folder/'README.md')
    told = {(r.metric_name.split()[-1], r.metric_type): r.metric_value for r in card.data.eval_results}
    for part in ('grounding', 'mask'):
        for key, value in metrics[part].items(): assert told[part, key] == value
    assert f"All {metrics['expressions']} expressions of `refmojig` test, at each picture's own size" in card.text and 'half precision' in card.text
    assert '| stage1_steps | 6 |' in card.text and '| root |' not in card.text and f'torch {torch.__version__.split("+")[0]}' in card.text
    assert_close(asked_of(RISCLIP.from_pretrained(folder)), asked_of(model), atol=.2, rtol=.05)        # half precision
    assert run_facts(folder)['metrics'] == metrics


def test_nothing_is_claimed_that_was_not_recorded(tmp_path):
    card = ModelCard.load(RISCLIP(ModelSettings('cfe', **SMALL)).save_pretrained(tmp_path/'bare')/'README.md')
    assert card.data.eval_results is None and 'No scores were recorded' in card.text and 'What it was trained on is not recorded' in card.text
    assert sorted(f.name for f in (tmp_path/'bare').iterdir()) == ['README.md', 'config.json', 'weights.safetensors']


def test_a_clip_that_nobody_else_has_is_named(tmp_path):
    from shutil import copytree
    from risclip.clip import tinyclip_folder
    copytree(tinyclip_folder(), tmp_path/'clip')
    model = RISCLIP(ModelSettings('adapters', clip=str(tmp_path/'clip'), **SMALL))
    with pytest.warns(UserWarning, match='send it along'): model.save_pretrained(tmp_path/'mine')
