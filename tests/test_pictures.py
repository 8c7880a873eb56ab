"Whatever people call a picture: its kinds, its files, its way up, and what is drawn on it."
import io, subprocess, sys
import numpy as np, pytest, torch
from PIL import Image
from risclip.pictures import outline, overlay, read_picture
from risclip.scenes import background


def drawing(w=120, h=90):
    "A red box on grass."
    a = background('grass')[:h, :w].copy()
    a[h//3:h//2, w//3:w//2] = (220, 30, 40)
    return Image.fromarray(a)


def saved(picture, kind, **kw):
    "The bytes of a file."
    picture.save(out := io.BytesIO(), kind, **kw)
    return out.getvalue()


RGB = drawing()
A = np.asarray(RGB)
GREY = np.asarray(RGB.convert('L'))
PALETTE = RGB.convert('P', palette=Image.Palette.ADAPTIVE)
KINDS = dict(                                # (what is given, what should be read)
    picture=(RGB, A),
    array=(A, A),
    floats=(A/255, A),
    png=(saved(RGB, 'PNG'), A),
    bmp=(saved(RGB, 'BMP'), A),
    opacity=(RGB.convert('RGBA'), A),
    array_opacity=(np.dstack([A, np.full(A.shape[:2], 255, np.uint8)]), A),
    grey=(RGB.convert('L'), GREY),
    array_grey=(GREY, GREY),
    grey16=(saved(Image.fromarray(GREY.astype(np.uint16)*257), 'PNG'), GREY),
    grey32=(Image.fromarray(GREY.astype(np.int32)*257), GREY),
    float_grey=(Image.fromarray((GREY/255).astype(np.float32)), GREY),
    palette=(PALETTE, np.asarray(PALETTE.convert('RGB'))),
    bits=(RGB.convert('1'), np.asarray(RGB.convert('1').convert('L'))))


@pytest.mark.parametrize('kind', KINDS)
def test_kinds_of_pictures(kind):
    given, wanted = KINDS[kind]
    found = read_picture(given)
    if wanted.ndim == 2: wanted = np.dstack([wanted]*3)
    assert found.mode == 'RGB' and np.array_equal(np.asarray(found), wanted)


def test_four_inks():
    cmyk = saved(RGB.convert('CMYK'), 'JPEG', quality=100, subsampling=0)
    assert np.abs(np.asarray(read_picture(cmyk)).astype(int) - A).mean() < 3


def test_nothing_there_is_white():
    for mode in ('RGBA', 'LA'):
        assert read_picture(Image.new(mode, (2, 2))).getpixel((0, 0)) == (255, 255, 255)
    gif = saved(Image.new('P', (2, 2), 0), 'GIF', transparency=0)
    assert read_picture(gif).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_turns_the_picture(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {1: A, 2: A[:, ::-1], 3: A[::-1, ::-1], 4: A[::-1], 5: A.transpose(1, 0, 2),
              6: np.rot90(A), 7: A[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(A, -1)}[orientation]
    file = saved(Image.fromarray(np.ascontiguousarray(stored)), 'PNG', exif=exif)
    assert np.array_equal(np.asarray(read_picture(file)), A)


UNCLEAR = [
    np.zeros((3, 5, 6), np.uint8), np.zeros((0, 5, 3)), np.zeros(5), np.full((4, 4), 255.),
    np.full((4, 4), np.nan), np.zeros((4, 4), np.int64), np.zeros((4, 4), bool),
    np.zeros((1, 4, 4, 3), np.uint8), Image.fromarray(np.full((4, 4), 255, np.float32)),
    Image.new('RGB', (0, 4)), b'', b'GIF89a']


@pytest.mark.parametrize('wrong', UNCLEAR)
def test_what_does_not_say_what_it_is(wrong):
    with pytest.raises(ValueError, match='the array|the picture'): read_picture(wrong)


def test_no_picture_at_all():
    for wrong in (None, 3, [1, 2], torch.zeros(3, 4, 4)):
        with pytest.raises(TypeError, match=f'not {type(wrong).__name__}'): read_picture(wrong)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path/'text.jpg').write_text('hello')
    (tmp_path/'half.jpg').write_bytes(saved(RGB, 'JPEG')[:1500])
    (tmp_path/'empty.png').touch()
    words = {'text.jpg': 'no picture that Pillow can read', 'half.jpg': 'cut off or damaged',
             'empty.png': 'no picture', '': 'is a folder'}
    for name, why in words.items():
        with pytest.raises(ValueError, match=why) as e: read_picture(tmp_path/name)
        assert str(tmp_path/name) in str(e.value)
    with pytest.raises(FileNotFoundError, match='nowhere.png is not there'):
        read_picture(str(tmp_path/'nowhere.png'))
    RGB.save(tmp_path/'large.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ValueError, match='large.png has too many pixels'):
        read_picture(tmp_path/'large.png')


def test_outline():
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8] = True
    assert outline(mask, 1).sum() == 7*7 - 5*5
    assert outline(mask, 2).sum() == 7*7 - 3*3
    assert outline(mask, 9).sum() == 7*7
    assert not outline(np.ones((3, 4), bool), 2).any()
    assert not outline(np.zeros((3, 4), bool), 2).any()


@pytest.mark.parametrize('size', [(1, 1), (1, 700), (2000, 3)])
def test_an_overlay_has_the_size_of_its_picture(size):
    assert overlay(Image.new('RGB', size), np.ones(size[::-1], bool)).size == size


@pytest.mark.parametrize('colour, paint', [('#0072B2', (0, 114, 178)), ('red', (255, 0, 0))])
@pytest.mark.parametrize('alpha', [0, .1, .45, .77, 1])
def test_the_colours_of_an_overlay(colour, paint, alpha):
    "Inside a mixture, on the rim the colour, outside exactly the picture: each with every grey."
    grey = np.dstack([np.tile(np.arange(256, dtype=np.uint8), (12, 1))]*3)       # [12,256,3]
    mask = np.zeros((12, 256), bool)
    mask[4:] = True                                      # down to the border, which is no rim
    mask.flags.writeable = False
    drawn = np.asarray(overlay(Image.fromarray(grey), mask, colour, alpha))
    assert np.array_equal(drawn[:4], grey[:4])
    assert (drawn[4] == paint).all()
    mixed = (1 - alpha)*grey[5:] + alpha*np.array(paint)
    assert np.abs(drawn[5:] - mixed).max() <= 1
    assert np.array_equal(drawn[5:], grey[5:]) == (alpha == 0)


def test_a_mask_in_any_layout_can_be_drawn():
    wanted = overlay(RGB, A[..., 0] > 100)
    for mask in ((A[..., 0] > 100)[::-1].copy()[::-1], np.asfortranarray(A[..., 0] > 100)):
        assert np.array_equal(np.asarray(overlay(RGB, mask)), np.asarray(wanted))


def test_reading_pictures_needs_no_torch():
    code = 'import sys, risclip.pictures; print(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert not {'torch', 'torchvision'} & set(done.stdout.split())
