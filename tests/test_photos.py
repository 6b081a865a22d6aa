"""Photos as a person sees them: every mode and every kind of damage."""
import io
import os
import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from caption_nb.data import CaptionData, check
from caption_nb.photos import ImageError, open_image


def noise(size=(24, 24), seed=0): return Image.frombytes('RGB', size, random.Random(seed).randbytes(3*size[0]*size[1]))


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'gif', 'bmp', 'tif'])
def test_every_cut_is_noticed_and_named(tmp_path, suffix):
    whole = tmp_path/f'w.{suffix}'
    noise().save(whole)
    data = whole.read_bytes()
    for share in (0.02, 0.2, 0.5, 0.9):
        (tmp_path/f'cut.{suffix}').write_bytes(data[:int(len(data)*share)])
        with pytest.raises(ImageError, match=rf'cut.{suffix}: truncated'): open_image(tmp_path/f'cut.{suffix}')


def damaged(draw, image, format, **kw):
    "The file of `image`, with some bytes of it changed"
    file = io.BytesIO()
    image.save(file, format, **kw)
    data = bytearray(file.getvalue())
    for _ in range(draw.draw(st.integers(1, 8))): data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    return bytes(data)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_photos_never_crash(tmp_path_factory, draw):
    folder = tmp_path_factory.mktemp('damaged')
    name = draw.draw(st.sampled_from(['a.jpg', 'a.png', 'a.gif', 'a.webp', 'a.tif']))
    (folder/name).write_bytes(damaged(draw, noise(), Image.registered_extensions()[name[1:]]))
    check(CaptionData('x', folder, {name: ['a']}, {'train': [name]}), quiet=True)
    try: assert open_image(folder/name).mode == 'RGB'
    except ImageError as e: assert name in str(e)


def test_modes_as_a_person_sees_them(tmp_path):
    size = (16, 8)
    exif = Image.Exif(); exif[0x0112] = 6
    turned = Image.new('RGB', size, 'white'); turned.paste((200, 0, 0), (0, 0, 8, 8))
    images = {'grey.jpg': Image.new('L', size, 90), 'cmyk.jpg': Image.new('CMYK', size, (0, 255, 255, 0)),
              'alpha.png': Image.new('RGBA', size, (0, 0, 0, 0)), 'la.png': Image.new('LA', size, (0, 128)),
              'one.png': Image.new('1', size, 1), 'palette.png': Image.new('RGB', size, (9, 90, 200)).quantize(4),
              'deep.png': Image.new('I;16', size, 257*90), 'deep.tif': Image.new('I;16', size, 257*90),
              'float.tif': Image.new('F', size, 0.5)}
    for name, img in images.items(): img.save(tmp_path/name)
    clear = Image.new('P', size, 0); clear.putpalette([10, 20, 30]); clear.save(tmp_path/'clear.gif', transparency=0)
    turned.save(tmp_path/'turned.jpg', exif=exif, quality=95)
    want = {'grey.jpg': (90,)*3, 'cmyk.jpg': (255, 0, 0), 'alpha.png': (255,)*3, 'la.png': (127,)*3,
            'one.png': (255,)*3, 'palette.png': (9, 90, 200), 'deep.png': (90,)*3, 'deep.tif': (90,)*3, 'float.tif': (128,)*3,
            'clear.gif': (255,)*3}
    for name, rgb in want.items():
        img = open_image(tmp_path/name)
        assert img.mode == 'RGB' and img.size == size, name
        assert all(abs(a - b) <= 3 for a, b in zip(img.getpixel((3, 3)), rgb)), (name, img.getpixel((3, 3)))
    img = open_image(tmp_path/'turned.jpg')
    assert img.size == (8, 16) and img.getpixel((4, 2))[1] < 60 and img.getpixel((4, 13))[1] > 200   # the left half is on top
    names = [*want, 'turned.jpg']
    report = check(CaptionData('modes', tmp_path, {n: ['a b'] for n in names}, {'train': names}), quiet=True)
    assert report.ok
    assert {'grey', 'CMYK', 'alpha', 'palette', 'EXIF rotation', '16 bit grey'} <= set(report.remarks)
    assert report.remarks['EXIF rotation'] == ['turned.jpg']


def test_unreadable_and_folder_named_jpg(tmp_path):
    (tmp_path/'folder.jpg').mkdir()
    with pytest.raises(ImageError, match='it is a folder'): open_image(tmp_path/'folder.jpg')
    with pytest.raises(ImageError, match='gone.jpg: missing: no such file'): open_image(tmp_path/'gone.jpg')
    if os.geteuid():
        (tmp_path/'closed.jpg').write_bytes(b'x'); (tmp_path/'closed.jpg').chmod(0)
        with pytest.raises(ImageError, match='unreadable: Permission denied'): open_image(tmp_path/'closed.jpg')


def test_image_errors_cross_processes(tmp_path):
    e = pickle.loads(pickle.dumps(ImageError(tmp_path/'a.jpg', 'truncated', 'cut')))
    assert (e.kind, e.path.name, str(e)) == ('truncated', 'a.jpg', f'{tmp_path}/a.jpg: truncated: cut')
