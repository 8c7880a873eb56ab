"The explorer in a real browser: Chromium, driven by Playwright, opens it in JupyterLab, types, clicks, slides and uploads."
import base64, io, os, shutil, socket, subprocess, sys, time, urllib.request
import nbformat, numpy as np, pytest
from PIL import Image
from risclip.explorer import SHIPPED, drawn_sight, rung_predictors, shown
from risclip.predictor import overlay

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
WANTED = os.environ.get('RISCLIP_BROWSER') == '1'                     # set where Chromium must be there
pytestmark = pytest.mark.skipif(not CHROMIUM and not WANTED, reason='there is no Chromium (Debian: apt install chromium): the explorer is not tried in a browser')
SEED = 3


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "The address of a JupyterLab with a notebook that shows the explorer."
    folder = tmp_path_factory.mktemp('lab')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f'from risclip.explorer import Explorer\npage = Explorer(seed={SEED})\npage')],
                                  metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    nbformat.write(nb, folder/'explore.ipynb')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = os.environ | dict(JUPYTER_PREFER_ENV_PATH='1', OMP_NUM_THREADS='2', JUPYTER_CONFIG_DIR=str(folder/'config'), JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'), JUPYTERLAB_WORKSPACES_DIR=str(folder/'workspaces'))
    with open(folder/'log', 'wb') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--allow-root', f'--port={port}', '--ip=127.0.0.1', '--IdentityProvider.token=', f'--ServerApp.root_dir={folder}'], stdout=log, stderr=log, env=env)
    address = f'http://127.0.0.1:{port}'
    try:
        for _ in range(240):
            if server.poll() is not None: pytest.fail((folder/'log').read_text())
            try: urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f'{address}/api', timeout=2); break
            except OSError: time.sleep(.5)
        yield f'{address}/lab/tree/explore.ipynb'
    finally: server.terminate(); server.wait(20)


@pytest.fixture(scope='module')
def page(lab):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-dev-shm-usage', '--no-proxy-server'])
        page = browser.new_page(viewport=dict(width=1200, height=1400))
        page.set_default_timeout(120_000)
        page.goto(lab)
        page.locator('.jp-Notebook .jp-CodeCell').first.wait_for()
        page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
        page.get_by_role('menuitem', name='Run', exact=True).click()
        page.get_by_text('Run All Cells', exact=True).click()
        page.locator(f'img.risclip-picture[alt^="scene {SEED}"]').wait_for()
        yield page
        if place := os.environ.get('RISCLIP_SCREENSHOT'):            # makes the picture of chapter 15
            page.get_by_label('scene').fill('99'); page.get_by_label('scene').press('Enter')
            page.locator('img.risclip-picture[alt^="scene 99"]').wait_for()
            ask(page, 'the suitcase below the green suitcase')
            page.locator('.jp-OutputArea-output').first.screenshot(path=place)
        browser.close()


def pixels(page):
    "What the picture shows, as the browser has it: RGB."
    data = page.evaluate('''async () => { const blob = await (await fetch(document.querySelector("img.risclip-picture").src)).blob();
        return await new Promise(done => { const r = new FileReader(); r.onload = () => done(r.result.split(",")[1]); r.readAsDataURL(blob); }); }''')
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert('RGB'))


def expected(sight, name, phrase):
    "The picture with the mask that the Predictor gives, computed here."
    mask = PREDICTORS[name].set_image(sight.picture).predict(phrase).mask
    picture = shown(sight.picture)
    return np.asarray(overlay(picture, np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))))


PREDICTORS, SIGHT = (rung_predictors(), drawn_sight(SEED)) if CHROMIUM else ({}, None)
PHRASES = [phrase for _, phrases in SIGHT.things for phrase in phrases] if SIGHT else []


def ask(page, phrase):
    page.get_by_placeholder('what to look for').fill(phrase)
    page.locator('img.risclip-picture[alt*="' + phrase + '"]').wait_for()


def test_a_phrase_is_typed(page):
    before = pixels(page)
    ask(page, PHRASES[-1])
    found = pixels(page)
    assert not np.array_equal(found, before)
    assert np.array_equal(found, expected(SIGHT, SHIPPED, PHRASES[-1]))


def test_the_slider_climbs_down(page):
    ask(page, PHRASES[-1])
    page.locator('.widget-hslider', has_text='rung').locator('.noUi-handle').press('Home')
    page.get_by_text('raw CLIP: ').wait_for()
    assert np.array_equal(pixels(page), expected(SIGHT, 'raw CLIP', PHRASES[-1]))
    page.get_by_text('no part in which the picture reads the words').wait_for()
    page.locator('.widget-hslider', has_text='rung').locator('.noUi-handle').press('End')
    page.locator('.risclip-words').wait_for()
    assert [text.split()[0] for text in page.locator('.risclip-words span').all_inner_texts()] == ['(start)', *PHRASES[-1].split(), '(end)']


def test_a_thing_is_clicked(page):
    mask, phrases = next((mask, phrases) for mask, phrases in SIGHT.things if phrases)
    ys, xs = np.nonzero(mask)
    k, box = len(ys)//2, page.locator('img.risclip-picture').bounding_box()
    page.locator('img.risclip-picture').click(position=dict(x=(xs[k] + .5)/mask.shape[1]*box['width'], y=(ys[k] + .5)/mask.shape[0]*box['height']))
    page.get_by_text('It is meant by:').wait_for()
    page.get_by_role('button', name=phrases[0], exact=True).click()
    page.locator('img.risclip-picture[alt*="' + phrases[0] + '"]').wait_for()
    assert np.array_equal(pixels(page), expected(SIGHT, SHIPPED, phrases[0]))


def test_files_are_brought(page, tmp_path):
    def bring(file):
        with page.expect_file_chooser() as chooser: page.get_by_role('button', name='your own picture').click()
        chooser.value.set_files(file)
    (tmp_path/'notes.jpg').write_text('these are notes')
    before = pixels(page)
    bring(tmp_path/'notes.jpg')
    page.locator('.risclip-message', has_text="'notes.jpg' is no picture that Pillow can read").wait_for()
    assert np.array_equal(pixels(page), before)                       # what was there is still there
    drawn_sight(5).picture.save(tmp_path/'mine.png')
    bring(tmp_path/'mine.png')
    page.locator('img.risclip-picture[alt^="mine.png"]').wait_for()
    phrase = page.get_by_placeholder('what to look for').input_value()
    assert np.array_equal(pixels(page), expected(drawn_sight(5), SHIPPED, phrase))
