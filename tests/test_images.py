"""Stored photos and their augmentation: pixels, kills, full disks, mismatches, bad photos; the same bits alone or in a batch."""
import errno
import json
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from test_features import photos

from caption_nb import features
from caption_nb.basics import sha256_file
from caption_nb.batches import CaptionBatches
from caption_nb.data import CaptionData
from caption_nb.encoders import Preprocess, make_encoder
from caption_nb.features import FeatureStore, StoreBusy, StoreError, extract
from caption_nb.images import Augment, ImageStore, default_image_store, store_images

SMALL = Preprocess((24, 20), crop_pct=0.9)


@pytest.fixture(scope='module')
def data(tmp_path_factory): return photos(tmp_path_factory.mktemp('data')/'photos', 150)   # three batches


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory): return store_images(data, SMALL, tmp_path_factory.mktemp('whole')/'a.h5', quiet=True)


class Stops(CaptionData):
    "Data that cannot be read beyond its 100th photo"
    def open(self, id):
        if self.images.index(id) >= 100: raise KeyboardInterrupt
        return super().open(id)


def interrupt(data, path):
    "Leave an unfinished store of 64 photos"
    with pytest.raises(KeyboardInterrupt):
        store_images(Stops(data.name, data.root, data.captions, data.splits, layout=data.layout), SMALL, path, quiet=True)


# ---- what is in it

def test_pixels_are_what_the_transform_gives(data, whole):
    exact = torch.stack([SMALL(data.open(id)) for id in data.images])
    assert torch.equal(whole.read(data.images), exact) and torch.equal(whole.read(data.images, 1), exact.flip(3))
    assert torch.equal(whole.read(data.images[::-7], 'flip'), exact.flip(0)[::7].flip(3))
    assert whole.views == ('plain', 'flip') and whole.size == (24, 20) and len(whole) == 150 and whole.ids == data.images
    assert whole.read([]).shape == (0, 3, 24, 20) and torch.equal(whole['im003.png'], exact[3]) and 'im003.png' in whole
    assert whole.read(data.images[:1]).dtype == torch.uint8 and '150 images, 24×20' in repr(whole)


def test_an_encoder_reads_its_own_photos(data, tmp_path):
    encoder = make_encoder('scene_cnn', image_size=32).freeze()
    store = store_images(data, encoder.preprocess, tmp_path/'s.h5', data.images[:5], quiet=True)
    assert torch.equal(encoder.encode_batch(store.read(store.ids)),
                       encoder.encode_batch(torch.stack([encoder.transform(data.open(id)) for id in store.ids])))


def test_any_hdf5_tool_can_read_it(whole, data):
    with h5py.File(whole.path) as f:
        assert f['images'].dtype == np.uint8 and f['images'].shape == (150, 3, 24, 20) and f['images'].compression is None
        assert np.array_equal(f['images'][7], whole['im007.png'].numpy()) and f.attrs['format'] == 'caption_nb images'
        assert json.loads(f.attrs['preprocess']) == dict(size=[24, 20], resize='crop', crop_pct=0.9, interpolation='bicubic')
        assert f.attrs['data_fingerprint'] == data.fingerprint


def test_each_photo_is_opened_once_by_several_threads(data, tmp_path, monkeypatch):
    opened, threads, open_ = [], set(), CaptionData.open
    monkeypatch.setattr(CaptionData, 'open', lambda self, id: (opened.append(id), threads.add(threading.get_ident()), open_(self, id))[2])
    for _ in range(2): store_images(data, SMALL, tmp_path/'s.h5', workers=3, quiet=True)
    assert sorted(opened) == data.images and len(threads) == 3 and threading.get_ident() not in threads


def test_threads_and_copies_share_it(whole):
    whole.close()
    expected = {id: whole[id] for id in whole.ids}
    for store in (whole, pickle.loads(pickle.dumps(whole))):
        store.close()
        open_files = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0
        with ThreadPoolExecutor(8) as pool: assert all(torch.equal(x, expected[id]) for id, x in zip(whole.ids, pool.map(store.__getitem__, whole.ids)))
        if open_files: assert len(os.listdir('/proc/self/fd')) <= open_files + 1   # threads that open it together leave one handle
        with store: store.read(store.ids[:1])
        assert store._fd is None


class Photos(torch.utils.data.Dataset):
    "A store, as PyTorch's own loader wants it"
    def __init__(self, store): self.store = store
    def __len__(self): return len(self.store)
    def __getitem__(self, i): return self.store[self.store.ids[i]]


@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_worker_processes_share_it(whole, start):
    whole.read(whole.ids[:1])   # the handle of this process is open: a forked worker inherits it, a spawned one opens its own
    loader = torch.utils.data.DataLoader(Photos(whole), batch_size=16, num_workers=2, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), whole.read(whole.ids))


@pytest.mark.parametrize('resize', ['crop', 'squash', 'pad'])
def test_every_way_to_the_size_has_its_own_store(data, tmp_path, resize):
    to_size = Preprocess((16, 24), resize)
    store = store_images(data, to_size, default_image_store(data, to_size, tmp_path), data.images[:4], quiet=True)
    assert torch.equal(store.read(store.ids), torch.stack([to_size(data.open(id)) for id in store.ids]))
    assert ('fill' in store.attrs['preprocess']) == (resize == 'pad')
    others = [Preprocess((16, 24), r) for r in ('crop', 'squash', 'pad')] + [Preprocess((16, 24), 'pad', fill=(0, 0, 0))]
    assert len({default_image_store(data, p, tmp_path) for p in others}) == 4
    for other in others:
        if other == to_size: continue
        with pytest.raises(StoreError, match='holds other images: preprocess'): store_images(data, other, store.path, store.ids)


def test_progress_says_images(data, tmp_path, capsys):
    store_images(data, SMALL, tmp_path/'s.h5')
    err = capsys.readouterr().err
    assert 'decoding' in err and 'images/s' in err


# ---- refusals

@pytest.mark.parametrize('other, says', [
    (Preprocess((24, 24), crop_pct=0.9), r'preprocess.size is \[24, 20\], expected \(24, 24\)'),
    (Preprocess((24, 20), 'squash', 0.9), "preprocess.resize is 'crop', expected 'squash'"),
    (Preprocess((24, 20)), 'preprocess.crop_pct is 0.9, expected 1.0'),
    (Preprocess((24, 20), crop_pct=0.9, interpolation='bilinear'), "preprocess.interpolation is 'bicubic'")])
def test_other_settings_are_refused(data, whole, tmp_path, other, says):
    with pytest.raises(StoreError, match=f'holds other images: {says}.*delete it to make it again'): store_images(data, other, whole.path)
    interrupt(data, tmp_path/'s.h5')
    with pytest.raises(StoreError, match=f'was begun otherwise: {says}.*same settings, or delete it'):
        store_images(data, other, tmp_path/'s.h5', quiet=True)


def test_settings_that_change_no_pixel_are_not(data, whole):
    assert len(store_images(data, Preprocess((24, 20), crop_pct=0.9, mean=(.1,)*3, std=(2,)*3), whole.path)) == 150


def test_other_photos_are_refused(tmp_path):
    data = photos(tmp_path/'p', 6)
    path = store_images(data, SMALL, tmp_path/'s.h5', data.images[:4], quiet=True).path
    with pytest.raises(StoreError, match='2 images are not in it, e.g. im004.png, im005.png'): store_images(data, SMALL, path)
    Image.new('RGB', (32, 32)).save(tmp_path/'p'/'im001.png')
    with pytest.raises(StoreError, match='1 images have changed since, e.g. im001.png'): store_images(data, SMALL, path, data.images[:4])


def test_names_and_views_that_there_are_not(data, whole, tmp_path):
    with pytest.raises(KeyError, match="lacks 1 of the images, e.g. 'im03.png'; did you mean"): whole.read(['im000.png', 'im03.png'])
    for view in ('filp', 2, -1):
        with pytest.raises(StoreError, match='holds plain, flip'): whole.read(whole.ids[:1], view)
    with pytest.raises(KeyError, match='did you mean'): store_images(data, SMALL, tmp_path/'s.h5', ['im03.png'])
    with pytest.raises(ValueError, match='no images'): store_images(data, SMALL, tmp_path/'s.h5', [])
    with pytest.raises(FileNotFoundError, match='an image store, which `store_images` makes'): ImageStore(tmp_path/'none.h5')
    assert not list(tmp_path.iterdir())


def test_stores_are_not_mistaken_for_each_other(data, whole, tmp_path):
    with pytest.raises(StoreError, match="is not a feature store: it lacks the mark 'caption_nb features'"): FeatureStore(whole.path)
    other = extract(data, make_encoder('scene_cnn', image_size=32).freeze(), tmp_path/'f.h5', data.images[:3], quiet=True)
    with pytest.raises(StoreError, match='is not an image store'): ImageStore(other.path)
    (tmp_path/'cut.h5').write_bytes(whole.path.read_bytes()[:5000])
    with pytest.raises(StoreError, match='cannot be read as an image store.*delete it and make it again'): ImageStore(tmp_path/'cut.h5')


def test_second_writer_is_refused(data, tmp_path):
    started, go, path = threading.Event(), threading.Event(), tmp_path/'s.h5'
    class Slow(CaptionData):
        def open(self, id): started.set(); go.wait(30); return super().open(id)
    slow = Slow(data.name, data.root, data.captions, data.splits, layout=data.layout)
    writer = threading.Thread(target=lambda: store_images(slow, SMALL, path, quiet=True)); writer.start()
    try:
        assert started.wait(30)
        with pytest.raises(StoreBusy, match=f'being written by process {os.getpid()}'): store_images(data, SMALL, path, quiet=True)
    finally: go.set(); writer.join()
    assert len(ImageStore(path)) == 150


@pytest.mark.parametrize('damage, error', [(lambda b: b[:len(b)//2], Exception), (lambda b: b'no photo', Exception), (None, FileNotFoundError)])
def test_unreadable_photo_is_named_and_what_is_done_is_kept(whole, tmp_path, damage, error):
    data = photos(tmp_path/'p', 150)
    bad = tmp_path/'p'/'im130.png'; good = bad.read_bytes()
    if damage: bad.write_bytes(damage(good) + bytes(len(good) - len(damage(good))))   # of the same size
    else: bad.unlink()
    with pytest.raises(error, match='im130.png'): store_images(data, SMALL, tmp_path/'s.h5', quiet=True)
    if not damage: return
    with pytest.raises(StoreError, match='not finished: 128 images are in s.h5.partial; run the same `store_images` again'): ImageStore(tmp_path/'s.h5')
    bad.write_bytes(good)
    assert torch.equal(store_images(data, SMALL, tmp_path/'s.h5', quiet=True).read(data.images), whole.read(data.images))


# ---- kills and full disks

def test_interrupted_then_the_same_bytes(data, whole, tmp_path):
    interrupt(data, tmp_path/'s.h5')
    with pytest.raises(StoreError, match='not finished: 64 images'): ImageStore(tmp_path/'s.h5')
    assert sha256_file(store_images(data, SMALL, tmp_path/'s.h5', quiet=True).path) == sha256_file(whole.path)
    assert [p.name for p in tmp_path.iterdir()] == ['s.h5']


def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')


def test_full_disk_is_told_before_decoding(data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'posix_fallocate', full, raising=False)
    monkeypatch.setattr(CaptionData, 'open', lambda *a: pytest.fail('decoded in vain'))
    with pytest.raises(OSError, match=r'the disk is full: .*s.h5 needs 0.00 GB, .* free.*make room'):
        store_images(data, SMALL, tmp_path/'s.h5', quiet=True)


@pytest.mark.parametrize('what', ['pwrite', 'fsync', 'replace'])
def test_full_disk_in_the_middle_loses_nothing(data, whole, tmp_path, monkeypatch, what):
    real, calls = getattr(os, what), []
    def failing(*args):
        calls.append(args)
        return full() if len(calls) > (100 if what == 'pwrite' else 1) else real(*args)
    monkeypatch.setattr(features, 'NOTE_EVERY', 0.)
    monkeypatch.setattr(os, what, failing)
    with pytest.raises(OSError, match='disk is full|No space left'): store_images(data, SMALL, tmp_path/'s.h5', quiet=True)
    monkeypatch.undo()
    assert not (tmp_path/'s.h5').exists()
    assert sha256_file(store_images(data, SMALL, tmp_path/'s.h5', quiet=True).path) == sha256_file(whole.path)


KILLED = '''
    import os, random, sys, time
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from test_images import *
    torch.set_num_threads(1)
    folder, rng = Path({folder!r}), random.Random({seed})
    names = sorted(p.name for p in (folder/'photos').iterdir())
    data, path = CaptionData('noise', folder/'photos', {{id: ['a'] for id in names}}, {{}}, layout='kaggle'), folder/'killed.h5'
    features.NOTE_EVERY = 0.
    def child():
        pid = os.fork()
        if pid: return pid
        try: store_images(data, SMALL, path, workers=2, quiet=True); os._exit(0)
        except BaseException:
            import traceback; traceback.print_exc(); os._exit(1)
    start = time.time(); assert os.waitpid(child(), 0)[1] == 0; length = time.time() - start
    want, kills, resumed = sha256_file(path), 0, 0
    path.unlink()
    while kills < 10:
        pid = child(); time.sleep(rng.uniform(0, 0.7*length))
        resumed += (folder/'killed.h5.journal').exists()
        os.kill(pid, 9); status = os.waitpid(pid, 0)[1]
        kills += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or status == 0, status
        if path.exists(): assert sha256_file(path) == want; path.unlink()
    assert os.waitpid(child(), 0)[1] == 0 and sha256_file(path) == want
    print(kills, resumed, sorted(p.name for p in folder.glob('*killed*')))
'''


def test_killed_at_ten_random_moments_gives_the_same_bytes(tmp_path):
    photos(tmp_path/'photos', 400)
    code = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), folder=str(tmp_path), seed=random.randrange(10**6))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, code[:400] + done.stderr[-3000:]
    assert done.stdout.startswith('10 ') and done.stdout.strip().endswith("['killed.h5']")


# ---- names

def test_store_name_follows_the_pixels(data, tmp_path):
    path = default_image_store(data, SMALL, tmp_path)
    assert path.parent == tmp_path and path.name.startswith('noise-images-24x20-') and path.suffix == '.h5'
    assert path == default_image_store(data, Preprocess((24, 20), crop_pct=0.9, mean=(.5,)*3), tmp_path)
    others = [default_image_store(data, p, tmp_path) for p in (Preprocess((24, 20)), Preprocess((24, 20), 'squash', 0.9), Preprocess((20, 24), crop_pct=.9))]
    assert len({path, *others, default_image_store(data.subset(10, 0), SMALL, tmp_path)}) == 5


# ---- augmentation

def pixels(n: int, h: int = 32, w: int = 32, seed: int = 0) -> torch.Tensor:
    "Smooth images with some noise"
    g = torch.Generator().manual_seed(seed)
    rough = torch.nn.functional.interpolate(torch.rand(n, 3, 4, 4, generator=g), size=(h, w), mode='bilinear')
    return (rough*220 + torch.rand(n, 3, h, w, generator=g)*35).to(torch.uint8)


def rngs(n: int, seed: int = 0) -> list: return [np.random.default_rng([seed, i]) for i in range(n)]


class Fixed:
    "A generator that says what it is told"
    def __init__(self, *numbers): self.numbers = np.array(numbers)
    def random(self, n): assert n == len(self.numbers); return self.numbers


def test_nothing_asked_nothing_changed():
    x = pixels(4)
    assert torch.equal(Augment()(x, rngs(4)), x)
    still = Augment(0.5, 0.5)(x, [Fixed(0, .3, .7, .5, .5, .5)]*4)   # the whole of it, every factor 1
    assert torch.equal(still, x)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.floats(0, 0.9), st.floats(0, 1), st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_an_image_comes_out_the_same_alone_or_in_a_batch(n, crop, colour, h, w, seed):
    x, augment = pixels(n, h, w, seed), Augment(crop, colour)
    before, out = x.clone(), augment(x, rngs(n, seed))
    assert out.shape == x.shape and out.dtype == torch.uint8 and torch.equal(x, before)
    for i in range(n): assert torch.equal(augment(x[i:i + 1], rngs(n, seed)[i:i + 1])[0], out[i])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(augment(x[order], [rngs(n, seed)[i] for i in order]), out[order])
    assert torch.equal(augment(x.contiguous(memory_format=torch.channels_last), rngs(n, seed)), out)


def test_the_number_of_threads_does_not_matter():
    x, augment, before = pixels(3, 224, 224), Augment(0.3, 0.4), torch.get_num_threads()
    out = []
    try:
        for threads in (1, 2, 3): torch.set_num_threads(threads); out.append(augment(x, rngs(3)))
    finally: torch.set_num_threads(before)
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    with ThreadPoolExecutor(3) as pool: assert torch.equal(torch.cat(list(pool.map(lambda i: augment(x[i:i + 1], rngs(3)[i:i + 1]), range(3)))), out[0])


@pytest.mark.parametrize('numbers, box', [((1, 0, 0), (0, 0, 20, 30)), ((1, .999, .999), (20, 30, 40, 60)), ((.5, .5, .999), (5, 15, 35, 60)),
                                          ((.25, 0, .5), (0, 4, 35, 56))])
def test_crop_is_the_part_that_was_drawn(numbers, box):
    x, (top, left, bottom, right) = pixels(1, 40, 60), box
    got = Augment(crop=0.5)(x, [Fixed(*numbers, .5, .5, .5)])[0].permute(1, 2, 0).int()
    photo = Image.fromarray(x[0].permute(1, 2, 0).contiguous().numpy()).crop((left, top, right, bottom))
    assert abs(photo.width/photo.height - 1.5) < 0.07   # the aspect is kept
    exact = torch.from_numpy(np.array(photo.resize((60, 40), Image.Resampling.BILINEAR))).int()
    assert (got - exact).abs().max() <= 1   # Pillow's own, but for rounding


def test_sides_and_places_are_uniform():
    h = w = 200
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
    place = torch.stack([y, x, torch.zeros_like(x)]).to(torch.uint8)   # says where each pixel was
    out = Augment(crop=0.4)(place.expand(400, 3, h, w), rngs(400)).float()
    top, left = out[:, 0, 0, 0], out[:, 1, 0, 0]
    side = (out[:, 0, -1, 0] - top + 1)/h
    assert torch.allclose(side, (out[:, 1, 0, -1] - left + 1)/w, atol=0.02)
    assert 0.59 < side.min() < 0.62 and 0.98 < side.max() <= 1 and abs(side.mean() - 0.8) < 0.02 and abs((side < 0.7).float().mean() - .25) < .06
    free = (h - side*h).clamp_min(1)
    for start in (top, left): assert abs((start/free).mean() - 0.5) < 0.05 and (start/free > 0.95).any() and (start/free < 0.05).any()
    assert abs(np.corrcoef(top/free, left/free)[0, 1]) < 0.12


@pytest.mark.parametrize('b, c, s', [(.8, 1, 1), (1.2, 1, 1), (1, .7, 1), (1, 1.3, 1), (1, 1, .6), (1, 1, 1.4), (.7, 1.2, .8), (1.3, 1.3, 1.3)])
def test_colours_are_pillows(b, c, s):
    x = pixels(1, 64, 48, 5)
    photo = Image.fromarray(x[0].permute(1, 2, 0).contiguous().numpy())
    for kind, factor in ((ImageEnhance.Brightness, b), (ImageEnhance.Contrast, c), (ImageEnhance.Color, s)): photo = kind(photo).enhance(factor)
    got = Augment(colour=0.5)(x, [Fixed(0, 0, 0, b - .5, c - .5, s - .5)])[0].permute(1, 2, 0).int()
    off = (got - torch.from_numpy(np.array(photo)).int()).abs()
    assert off.max() <= 5 and off.float().mean() < 2   # Pillow rounds down after each, and the mean and the grey too


def test_colours_follow_the_formula():
    x = pixels(1, 16, 16, 1)
    b, c, s = 1.25, 0.75, 1.5   # exact in binary, as are the numbers that draw them
    y = x[0].double()
    weights = torch.tensor([.299, .587, .114], dtype=torch.float64)
    def grey(v): return (v*weights[:, None, None]).sum(0)
    y = (b*y).clamp(0, 255).round()
    y = (c*y + (1 - c)*grey(y).mean()).clamp(0, 255).round()
    y = (s*y + (1 - s)*grey(y)).clamp(0, 255).round()
    got = Augment(colour=0.5)(x, [Fixed(0, 0, 0, b - .5, c - .5, s - .5)])[0]
    assert (got.double() - y).abs().max() <= 1 and (got == y).double().mean() > 0.98   # a half may round either way


def test_settings_do_not_disturb_each_other():
    x = pixels(5)
    def at(i, **kw): return Augment(**kw)(x[i:i + 1], rngs(5)[i:i + 1])
    for i in range(5): assert torch.equal(Augment(colour=.4)(at(i, crop=.4), rngs(5)[i:i + 1]), at(i, crop=.4, colour=.4))


def test_augmentation_keeps_the_global_generators():
    np.random.seed(0); torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    Augment(.5, .5)(pixels(2), rngs(2))
    assert np.array_equal(np.random.get_state()[1], before[0]) and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize('kw', [dict(crop=1), dict(crop=-.1), dict(colour=1.1), dict(colour=-1), dict(crop=float('nan'))])
def test_settings_out_of_range(kw):
    with pytest.raises(ValueError, match=r'crop must be in \[0, 1\) and colour in \[0, 1\]'): Augment(**kw)


def test_every_image_needs_a_generator():
    with pytest.raises(ValueError, match='3 images, but 2 generators'): Augment(.1)(pixels(3), rngs(2))
    assert Augment(.1, .1)(pixels(3)[:0], []).shape == (0, 3, 32, 32)


# ---- with batches

def test_batches_of_the_store_are_the_same_whatever_rank_and_thread(data, whole):
    from test_batches import VOCAB, rows_of
    def run(skip=0, **kw):
        batches = CaptionBatches(data, VOCAB, 'train', whole, images_per_batch=16, flip=True, augment=Augment(.3, .3), **kw)
        batches.load_state_dict({**batches.state_dict(), 'position': skip})
        return {id: x for b in batches for id, (_, x) in rows_of(b).items()}
    want = run()
    assert len(want) == 150 and want == run(workers=3) == {**run(rank=0, ranks=2), **run(rank=1, ranks=2, workers=2)}
    rest = run(skip=7)
    assert len(rest) < 150 and all(want[id] == x for id, x in rest.items())
