"""The explorer in a real browser: Chromium, driven by Playwright, opens it in JupyterLab, types,
clicks, slides and uploads."""
import base64, io, os, shutil, socket, subprocess, sys, time, urllib.request
from functools import cache
import nbformat, numpy as np, pytest
from PIL import Image
from risclip.explorer import SHIPPED, Example, rung_predictors
from risclip.widget import masked

NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
WANTED = os.environ.get('RISCLIP_BROWSER') == '1'                # set where Chromium must be there
pytestmark = pytest.mark.skipif(
    not CHROMIUM and not WANTED, reason='there is no Chromium (Debian: apt install chromium): '
                                        'the explorer is not tried in a browser')
SEED = 3
EXAMPLE = Example.from_seed(SEED)
PHRASES = EXAMPLE.phrases
PICTURE = 'img.risclip-picture'


@cache
def predictors(): return rung_predictors()


def free_port():
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def answers(address):
    "Does a server answer there?"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try: return bool(opener.open(address, timeout=2))
    except OSError: return False


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "The address of a JupyterLab with a notebook that shows the explorer."
    folder, port = tmp_path_factory.mktemp('lab'), free_port()
    source = f'from risclip.explorer import Explorer\npage = Explorer(seed={SEED})\npage'
    kernel = dict(name='python3', display_name='python3', language='python')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)],
                                  metadata=dict(kernelspec=kernel))
    nbformat.write(nb, folder/'explore.ipynb')
    env = os.environ | dict(JUPYTER_PREFER_ENV_PATH='1', OMP_NUM_THREADS='2',
                            JUPYTER_CONFIG_DIR=str(folder/'config'),
                            JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'),
                            JUPYTERLAB_WORKSPACES_DIR=str(folder/'workspaces'))
    command = [sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--allow-root',
               f'--port={port}', '--ip=127.0.0.1', '--IdentityProvider.token=',
               f'--ServerApp.root_dir={folder}']
    with open(folder/'log', 'wb') as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    address = f'http://127.0.0.1:{port}'
    try:
        for _ in range(240):
            if server.poll() is not None: pytest.fail((folder/'log').read_text())
            if answers(f'{address}/api'): break
            time.sleep(.5)
        yield f'{address}/lab/tree/explore.ipynb'
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope='module')
def page(lab):
    "The notebook in the browser, run, with the explorer below its cell."
    from playwright.sync_api import sync_playwright              # only where there is a browser
    args = ['--no-sandbox', '--disable-dev-shm-usage', '--no-proxy-server']
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=args)
        page = browser.new_page(viewport=dict(width=1200, height=1400))
        page.set_default_timeout(120_000)
        page.goto(lab)
        page.locator('.jp-Notebook .jp-CodeCell').first.wait_for()
        page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
        page.get_by_role('menuitem', name='Run', exact=True).click()
        page.get_by_text('Run All Cells', exact=True).click()
        page.locator(f'{PICTURE}[alt^="scene {SEED}"]').wait_for()
        yield page
        if place := os.environ.get('RISCLIP_SCREENSHOT'): take_picture(page, place)
        browser.close()


def take_picture(page, place):
    "Makes the picture of chapter 19."
    page.get_by_label('scene').fill('99')
    page.get_by_label('scene').press('Enter')
    page.locator(f'{PICTURE}[alt^="scene 99"]').wait_for()
    ask(page, 'the suitcase below the green suitcase')
    page.locator('.jp-OutputArea-output').first.screenshot(path=place)


READ_PICTURE = '''async () => {
    const picture = document.querySelector("img.risclip-picture");
    const blob = await (await fetch(picture.src)).blob();
    return await new Promise(done => {
        const reader = new FileReader();
        reader.onload = () => done(reader.result.split(",")[1]);
        reader.readAsDataURL(blob);
    });
}'''


def pixels(page):
    "What the picture shows, as the browser has it: RGB."
    data = base64.b64decode(page.evaluate(READ_PICTURE))
    return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))


def expected(example, name, phrase):
    "The picture with the mask that the Predictor gives, computed here."
    answer = predictors()[name].set_image(example.picture).predict(phrase)
    return np.asarray(masked(example.picture, answer.mask))


def ask(page, phrase):
    "Type a phrase, and wait for its answer."
    page.get_by_placeholder('what to look for').fill(phrase)
    page.locator(f'{PICTURE}[alt*="{phrase}"]').wait_for()


def slide(page, key):
    "Press a key on the slider of the rungs."
    page.locator('.widget-hslider', has_text='rung').locator('.noUi-handle').press(key)


def test_a_phrase_is_typed(page):
    before = pixels(page)
    ask(page, PHRASES[-1])
    found = pixels(page)
    assert not np.array_equal(found, before)
    assert np.array_equal(found, expected(EXAMPLE, SHIPPED, PHRASES[-1]))


def test_the_slider_goes_down(page):
    ask(page, PHRASES[-1])
    slide(page, 'Home')
    page.get_by_text('raw CLIP: ').wait_for()
    assert np.array_equal(pixels(page), expected(EXAMPLE, 'raw CLIP', PHRASES[-1]))
    page.get_by_text('no part in which the picture reads the words').wait_for()
    slide(page, 'End')
    page.locator('.risclip-words').wait_for()
    words = [text.split()[0] for text in page.locator('.risclip-words span').all_inner_texts()]
    assert words == ['(start)', *PHRASES[-1].split(), '(end)']


def test_a_thing_is_clicked(page):
    mask, phrases = next((mask, phrases) for mask, phrases in EXAMPLE.things if phrases)
    (height, width), (ys, xs) = mask.shape, np.nonzero(mask)
    k, box = len(ys)//2, page.locator(PICTURE).bounding_box()
    x, y = (xs[k] + .5)/width*box['width'], (ys[k] + .5)/height*box['height']
    page.locator(PICTURE).click(position=dict(x=x, y=y))
    page.get_by_text('It is meant by:').wait_for()
    page.get_by_role('button', name=phrases[0], exact=True).click()
    page.locator(f'{PICTURE}[alt*="{phrases[0]}"]').wait_for()
    assert np.array_equal(pixels(page), expected(EXAMPLE, SHIPPED, phrases[0]))


def test_files_are_uploaded(page, tmp_path):
    def upload(file):
        with page.expect_file_chooser() as chooser:
            page.get_by_role('button', name='your own picture').click()
        chooser.value.set_files(file)
    (tmp_path/'notes.jpg').write_text('these are notes')
    before = pixels(page)
    upload(tmp_path/'notes.jpg')
    message = "'notes.jpg' is no picture that Pillow can read"
    page.locator('.risclip-message', has_text=message).wait_for()
    assert np.array_equal(pixels(page), before)                  # what was there is still there
    other = Example.from_seed(5)
    other.picture.save(tmp_path/'mine.png')
    upload(tmp_path/'mine.png')
    page.locator(f'{PICTURE}[alt^="mine.png"]').wait_for()
    phrase = page.get_by_placeholder('what to look for').input_value()
    assert np.array_equal(pixels(page), expected(other, SHIPPED, phrase))
