"""The feature store: kills, full disks, second writers, mismatches, bad photos; and that reading gives what was encoded."""
import errno
import json
import multiprocessing
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
from PIL import Image

from caption_nb import features
from caption_nb.basics import sha256_file
from caption_nb.data import CaptionData
from caption_nb.encoders import make_encoder
from caption_nb.features import (CROP_SIDES, FeatureStore, StoreBusy, StoreError, crop_box, cut, default_store_path, extract, load_images,
                                 view_names)


def photos(folder: Path, n: int, size: tuple[int, int] = (32, 32)) -> CaptionData: # (height, width)
    "`n` small photos of noise"
    folder.mkdir(parents=True, exist_ok=True)
    rng, captions = np.random.default_rng(0), {f'im{i:03d}.png': [f'caption {i}'] for i in range(n)}
    for id in captions: Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder/id)
    return CaptionData('noise', folder, captions, {'train': list(captions)}, layout='kaggle')


def small_encoder(seed: int = 0):
    torch.manual_seed(seed)
    return make_encoder('scene_cnn', 'random', image_size=32).freeze()


@pytest.fixture(scope='module')
def data(tmp_path_factory): return photos(tmp_path_factory.mktemp('data')/'photos', 30)


@pytest.fixture(scope='module')
def encoder(): return small_encoder()


@pytest.fixture(scope='module')
def whole(data, encoder, tmp_path_factory):
    "An uninterrupted store, both views, batches of 4"
    return extract(data, encoder, tmp_path_factory.mktemp('whole')/'a.h5', views=('plain', 'flip'), batch_size=4, quiet=True)


def again(data, encoder, path, **kw):
    "Extract as `whole` was"
    return extract(data, encoder, path, **{**dict(views=('plain', 'flip'), batch_size=4, quiet=True), **kw})


# ---- what is in it

def test_every_row_is_the_encoders_own_output(data, encoder, whole):
    images = load_images(data, data.images, encoder, quiet=True)
    for v, view in enumerate((images, images.flip(3))):
        exact = torch.cat([encoder.encode_batch(view[i:i + 4]) for i in range(0, 30, 4)]).numpy().astype('<f2')
        assert np.array_equal(whole.read(data.images, v), exact)
    assert whole.read([]).shape == (0, 4, 128) and len(whole) == 30 and 'im003.png' in whole and 'x' not in whole


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 29), min_size=1, max_size=40), st.integers(0, 1))
def test_any_order_reads_as_hdf5_does(whole, rows, v):
    with h5py.File(whole.path) as f: everything = f['features'][:]
    assert np.array_equal(whole.read([whole.ids[r] for r in rows], v), everything[[r*2 + v for r in rows]])
    assert np.array_equal(whole.read([whole.ids[rows[0]]], ('plain', 'flip')[v])[0], everything[rows[0]*2 + v])


def test_any_hdf5_tool_can_read_it(whole, data, encoder):
    with h5py.File(whole.path) as f:
        assert f['features'].dtype == np.float16 and f['features'].chunks == (1, 4, 128) and f['features'].compression is None
        assert [s.decode() for s in f['ids']] == data.images and f.attrs['format_version'] == 1
        assert json.loads(f.attrs['encoder']) == encoder.spec and f.attrs['data_fingerprint'] == data.fingerprint
        assert json.loads(f.attrs['views']) == ['plain', 'flip'] and f.attrs['precision'] == 'fp32'


def test_each_photo_is_encoded_once_per_view(data, encoder, tmp_path, monkeypatch):
    seen, opened = [], []
    encode, open_ = type(encoder).encode_batch, CaptionData.open
    monkeypatch.setattr(type(encoder), 'encode_batch', lambda self, x, p='auto': (seen.append(len(x)), encode(self, x, p))[1])
    monkeypatch.setattr(CaptionData, 'open', lambda self, id: (opened.append(id), open_(self, id))[1])
    again(data, encoder, tmp_path/'s.h5')
    assert sum(seen) == 60 and sorted(opened) == data.images
    again(data, encoder, tmp_path/'s.h5')
    assert sum(seen) == 60   # it was there


def test_bf16_error_is_recorded(data, encoder, tmp_path):
    store = extract(data, encoder, tmp_path/'s.h5', precision='bf16', quiet=True)
    assert 0 < store.attrs['bf16_relative_error'] < 0.1
    with pytest.raises(StoreError, match="precision is 'bf16', expected 'fp32'"): extract(data, encoder, tmp_path/'s.h5', quiet=True)


def test_progress_says_images_and_time(data, encoder, tmp_path, capsys):
    extract(data, encoder, tmp_path/'s.h5')
    assert 'images/s' in capsys.readouterr().err


# ---- handles

def _sum(store, ids, queue): queue.put(float(store.read(ids).astype('f4').sum()))


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_other_processes_read_the_same(whole, method):
    expected = float(whole.read(whole.ids[:5]).astype('f4').sum())   # its handle is open when the process forks
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_sum, args=(whole, whole.ids[:5], queue)); process.start()
    assert queue.get(timeout=60) == expected
    process.join()


def test_pickles_closes_and_reopens(whole):
    other = pickle.loads(pickle.dumps(whole))
    assert np.array_equal(other[whole.ids[3]], whole[whole.ids[3]])
    other.close(); other.close()
    assert np.array_equal(other[whole.ids[3]], whole[whole.ids[3]])
    with FeatureStore(whole.path) as store: store.read(store.ids[:1]); fd = store._fd
    assert store._fd is None and fd is not None


def test_threads_may_share_it(whole):
    expected = [whole[id] for id in whole.ids]
    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(a, b) for _ in range(5) for a, b in zip(pool.map(whole.__getitem__, whole.ids), expected))


def test_memory_stays_flat(tmp_path):
    psutil = pytest.importorskip('psutil')
    ids = [f'{i}' for i in range(1000)]
    record = dict(grid=[7, 7], dim=1024, views=['plain'], encoder={'name': 'x'})
    features._create(tmp_path/'big.h5', FeatureStore, record, (49, 1024), ids, [0]*1000)   # 100 MB
    store, process = FeatureStore(tmp_path/'big.h5'), psutil.Process()
    store.read(ids[:32]); before = process.memory_info().rss
    for i in range(0, 1000, 32): store.read(ids[i:i + 32])
    assert process.memory_info().rss - before < 20e6


# ---- refusals

def test_unknown_ids_and_views_are_named(whole, data, encoder, tmp_path):
    with pytest.raises(KeyError, match="lacks 2 of the images, e.g. 'im03.png', 'x'; did you mean 'im0"):
        whole.read(['im000.png', 'im03.png', 'x'])
    for view in ('filp', 2, -1):
        with pytest.raises(StoreError, match='holds plain, flip'): whole.read(whole.ids[:1], view)
    with pytest.raises(KeyError, match='did you mean'): extract(data, encoder, tmp_path/'s.h5', ids=['im03.png'])
    with pytest.raises(ValueError, match="did you mean 'flip'"): extract(data, encoder, tmp_path/'s.h5', views=('plain', 'filp'))
    with pytest.raises(ValueError, match='no images'): extract(data, encoder, tmp_path/'s.h5', ids=[])
    with pytest.raises(ValueError, match='twice'): extract(data, encoder, tmp_path/'s.h5', ids=['im003.png']*2)
    assert not list(tmp_path.iterdir())


def test_mismatching_store_is_refused_field_by_field(data, encoder, whole):
    other = small_encoder(1)
    with pytest.raises(StoreError, match="encoder.weights_sha256 is '[0-9a-f]{64}', expected .*delete it to make it again"):
        again(data, other, whole.path)
    with pytest.raises(StoreError, match='encoder.stage is -1, expected -2; encoder.dim is 128, expected 64'):
        FeatureStore(whole.path, {'encoder': {**encoder.spec, 'stage': -2, 'dim': 64}})
    assert FeatureStore(whole.path, {'encoder': {**encoder.spec, 'weights': 'renamed.safetensors'}}).dim == 128   # the content counts
    plain = extract(data, encoder, whole.path.parent/'plain.h5', quiet=True)
    with pytest.raises(StoreError, match='view flip is not in it'): again(data, encoder, plain.path)
    assert again(data, encoder, whole.path, views='flip', ids=data.images[3:5]).ids == data.images   # a part of it may be asked for


def test_other_photos_are_refused(encoder, tmp_path):
    data = photos(tmp_path/'p', 6)
    store = extract(data, encoder, tmp_path/'s.h5', ids=data.images[:4], quiet=True)
    with pytest.raises(StoreError, match='2 images are not in it, e.g. im004.png, im005.png'):
        extract(data, encoder, store.path, quiet=True)
    Image.new('RGB', (32, 32)).save(tmp_path/'p'/'im001.png')
    with pytest.raises(StoreError, match='1 images have changed since, e.g. im001.png'):
        extract(data, encoder, store.path, data.images[:4], quiet=True)


def interrupt(data, encoder, path, at: int = 13, **kw):
    "Leave an unfinished store"
    class Stops(CaptionData):
        def open(self, id):
            if self.images.index(id) >= at: raise KeyboardInterrupt
            return super().open(id)
    with pytest.raises(KeyboardInterrupt): again(_as(Stops, data), encoder, path, **kw)


def _as(cls, data): return cls(data.name, data.root, data.captions, data.splits, layout=data.layout)


def test_interrupted_is_unfinished_then_the_same(data, encoder, whole, tmp_path):
    path = tmp_path/'s.h5'
    interrupt(data, encoder, path)
    with pytest.raises(StoreError, match='not finished: 12 images .*run the same `extract` again'): FeatureStore(path)
    assert sha256_file(again(data, encoder, path, batch_size=32).path) == sha256_file(whole.path)   # keeps the batches that it began with
    assert [p.name for p in tmp_path.iterdir()] == ['s.h5']


def test_partial_store_of_something_else_is_refused(data, encoder, tmp_path):
    interrupt(data, encoder, tmp_path/'s.h5')
    with pytest.raises(StoreError, match='was begun otherwise: encoder.weights_sha256.*Continue it with the same settings, or delete'):
        again(data, small_encoder(1), tmp_path/'s.h5')
    with pytest.raises(StoreError, match='begun otherwise: other images, or another order'):
        again(data, encoder, tmp_path/'s.h5', ids=data.images[::-1])
    with pytest.raises(StoreError, match='begun otherwise: other images'): again(data, encoder, tmp_path/'s.h5', ids=data.images[:20])


def test_stale_journal_does_not_speak_for_a_new_store(data, encoder, whole, tmp_path):
    interrupt(data, encoder, tmp_path/'s.h5')
    (tmp_path/'s.h5.partial').unlink()
    assert sha256_file(again(data, encoder, tmp_path/'s.h5').path) == sha256_file(whole.path)


@pytest.mark.parametrize('content', ['', '{"done": ', '[]', '{"done": 99999}', '{"done": -5}', '{"done": 3}'])
def test_damaged_journal_costs_time_not_truth(data, encoder, whole, tmp_path, content):
    interrupt(data, encoder, tmp_path/'s.h5')
    (tmp_path/'s.h5.journal').write_text(content)
    assert sha256_file(again(data, encoder, tmp_path/'s.h5').path) == sha256_file(whole.path)


def test_second_writer_is_refused(data, encoder, tmp_path):
    started, go, path = threading.Event(), threading.Event(), tmp_path/'s.h5'
    class Slow(CaptionData):
        def open(self, id): started.set(); go.wait(30); return super().open(id)
    writer = threading.Thread(target=lambda: extract(_as(Slow, data), encoder, path, quiet=True)); writer.start()
    try:
        assert started.wait(30)
        with pytest.raises(StoreBusy, match=f'being written by process {os.getpid()} on .* since'): extract(data, encoder, path, quiet=True)
    finally: go.set(); writer.join()
    assert len(FeatureStore(path)) == 30 and not (tmp_path/'s.h5.lock').exists()


def test_lock_of_a_dead_writer_is_no_lock(data, encoder, tmp_path):
    (tmp_path/'s.h5.lock').write_text('process 1 on elsewhere')
    assert len(extract(data, encoder, tmp_path/'s.h5', quiet=True)) == 30


@pytest.mark.parametrize('damage, says', [
    (lambda b: b[:len(b)//2], 'cannot be read as a feature store'), (lambda b: b'hello', 'cannot be read'),
    (lambda b: b'', 'cannot be read')])
def test_damaged_store_is_refused(whole, tmp_path, damage, says):
    (tmp_path/'s.h5').write_bytes(damage(whole.path.read_bytes()))
    with pytest.raises(StoreError, match=says): FeatureStore(tmp_path/'s.h5')


def test_foreign_files(whole, tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist: it should be a feature store, which `extract` makes'): FeatureStore(tmp_path/'none.h5')
    with h5py.File(tmp_path/'other.h5', 'w') as f: f['features'] = np.zeros(3)
    with pytest.raises(StoreError, match='is not a feature store'): FeatureStore(tmp_path/'other.h5')
    (tmp_path/'new.h5').write_bytes(whole.path.read_bytes())
    with h5py.File(tmp_path/'new.h5', 'r+') as f: f.attrs['format_version'] = 9
    with pytest.raises(StoreError, match='format version 9, this program reads 1'): FeatureStore(tmp_path/'new.h5')


def test_cut_off_while_open(whole, tmp_path):
    (tmp_path/'s.h5').write_bytes(whole.path.read_bytes())
    store = FeatureStore(tmp_path/'s.h5')
    os.truncate(tmp_path/'s.h5', 5000)
    with pytest.raises(StoreError, match='ends too early'): store.read(store.ids)


# ---- bad photos and bad numbers

def test_bad_photo_is_named_and_what_is_done_is_kept(encoder, whole, tmp_path):
    data = photos(tmp_path/'p', 30)
    good = (tmp_path/'p'/'im017.png').read_bytes()
    (tmp_path/'p'/'im017.png').write_bytes(good[:len(good)//2] + bytes(len(good) - len(good)//2))
    with pytest.raises(Exception, match='im017.png'): again(data, encoder, tmp_path/'s.h5')
    with pytest.raises(StoreError, match='16 images'): FeatureStore(tmp_path/'s.h5')
    (tmp_path/'p'/'im017.png').write_bytes(good)
    assert np.array_equal(again(data, encoder, tmp_path/'s.h5').read(data.images), whole.read(data.images))


def test_missing_photo_is_named(encoder, tmp_path):
    data = photos(tmp_path/'p', 3); (tmp_path/'p'/'im001.png').unlink()
    with pytest.raises(FileNotFoundError, match='im001.png'): extract(data, encoder, tmp_path/'s.h5', quiet=True)
    with pytest.raises(Exception, match='im001.png'): load_images(data, data.images, encoder, quiet=True)


def test_features_beyond_half_precision_are_refused(data, tmp_path):
    encoder = small_encoder(2)
    with torch.no_grad(): encoder.model.last[1].weight.mul_(1e7)
    with pytest.raises(ValueError, match='im000.png.* not finite in half precision'): extract(data, encoder, tmp_path/'s.h5', quiet=True)
    assert not (tmp_path/'s.h5').exists()


# ---- full disks

def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')


def test_full_disk_is_told_before_encoding(data, encoder, whole, tmp_path, monkeypatch):
    (tmp_path/'old.h5').write_bytes(whole.path.read_bytes())
    monkeypatch.setattr(os, 'posix_fallocate', full)
    monkeypatch.setattr(type(encoder), 'encode_batch', lambda *a: pytest.fail('encoded in vain'))
    with pytest.raises(OSError, match='the disk is full: .*s.h5 needs .* GB, .* free.*make room') as e:
        again(data, encoder, tmp_path/'s.h5')
    assert e.value.errno == errno.ENOSPC and sha256_file(tmp_path/'old.h5') == sha256_file(whole.path)
    monkeypatch.undo()
    assert sha256_file(again(data, encoder, tmp_path/'s.h5').path) == sha256_file(whole.path)


@pytest.mark.parametrize('what', ['pwrite', 'fsync', 'replace'])
def test_full_disk_in_the_middle_loses_nothing(data, encoder, whole, tmp_path, monkeypatch, what):
    real, calls = getattr(os, what), []
    def failing(*args):
        calls.append(args)
        return full() if len(calls) > 1 else real(*args)
    monkeypatch.setattr(features, 'NOTE_EVERY', 0.)
    monkeypatch.setattr(os, what, failing)
    with pytest.raises(OSError, match='disk is full|No space left'): again(data, encoder, tmp_path/'s.h5')
    monkeypatch.undo()
    assert sha256_file(again(data, encoder, tmp_path/'s.h5').path) == sha256_file(whole.path)


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() != 0, reason='mounting a small file system takes root')
def test_really_full_disk(data, encoder, whole, tmp_path):
    small = tmp_path/'small'; small.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=88k', 'none', str(small)]
    if subprocess.run(mount, capture_output=True).returncode: pytest.skip('mounting is not allowed here')
    try:
        ids = data.images[:10]   # 20 kB
        before = sha256_file(extract(data, encoder, small/'old.h5', ids=ids, batch_size=4, quiet=True).path)
        with pytest.raises(OSError, match='the disk is full'): again(data, encoder, small/'s.h5')
        assert sha256_file(small/'old.h5') == before and not (small/'s.h5').exists()
        subprocess.run(['mount', '-o', 'remount,size=1m', str(small)], check=True)
        assert sha256_file(again(data, encoder, small/'s.h5').path) == sha256_file(whole.path)
    finally: subprocess.run(['umount', str(small)], check=True)


# ---- kill -9

KILLED = '''
    import os, random, signal, sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch; torch.set_num_threads(1)
    from test_features import again, photos, small_encoder
    from caption_nb import features
    from caption_nb.basics import sha256_file
    from caption_nb.data import CaptionData
    folder, seed = Path({folder!r}), {seed}
    data = CaptionData('noise', folder/'photos', {{p.name: ['a'] for p in sorted((folder/'photos').iterdir())}}, {{}}, layout='kaggle')
    path, rng, kills, rounds, resumed = folder/'killed.h5', random.Random(seed), 0, 0, 0
    features.NOTE_EVERY = 0.

    def child(at=None):
        "Extract in a forked process that dies by itself at its `at`-th call of the operating system"
        pid = os.fork()
        if pid: return pid
        try:
            if at is not None:
                count = 0
                def dying(real):
                    def call(*args, **kw):
                        nonlocal count
                        count += 1
                        if count == at: os.kill(os.getpid(), 9)
                        return real(*args, **kw)
                    return call
                for name in ('pwrite', 'fsync', 'replace', 'open', 'posix_fallocate', 'ftruncate'):
                    setattr(os, name, dying(getattr(os, name)))
            again(data, small_encoder(), path); os._exit(0)
        except BaseException:
            import traceback; traceback.print_exc(); os._exit(1)
'''
RANDOM = KILLED + '''
    start = time.time(); os.waitpid(child(), 0); length = time.time() - start
    want = sha256_file(path); path.unlink()
    while kills < 10:
        pid = child(); time.sleep(rng.uniform(0, 0.6*length))
        resumed += (folder/'killed.h5.journal').exists()
        os.kill(pid, 9); status = os.waitpid(pid, 0)[1]
        kills += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or status == 0, status
        if path.exists():
            assert sha256_file(path) == want; path.unlink(); rounds += 1
    assert os.waitpid(child(), 0)[1] == 0 and sha256_file(path) == want
    print(kills, rounds, resumed, sorted(p.name for p in folder.glob('*killed*')))
'''
EVERY = KILLED + '''
    assert os.waitpid(child(), 0)[1] == 0; want = sha256_file(path); path.unlink()
    at = 0
    while True:
        at += 1
        status = os.waitpid(child(at), 0)[1]
        if status == 0: break
        assert os.WIFSIGNALED(status), (at, status)
        kills += 1
        assert os.waitpid(child(), 0)[1] == 0 and sha256_file(path) == want, at
        assert sorted(p.name for p in folder.glob('*killed*')) == ['killed.h5'], at; path.unlink()
    print(kills)
'''


def run(code: str, folder: Path, n: int) -> str:
    photos(folder/'photos', n)
    code = textwrap.dedent(code).format(tests=str(Path(__file__).parent), folder=str(folder), seed=random.randrange(10**6))
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, code[:600] + done.stderr[-3000:]
    return done.stdout


def test_killed_at_ten_random_moments_gives_the_same_bytes(tmp_path):
    out = run(RANDOM, tmp_path, 200)
    assert out.startswith('10 ') and out.strip().endswith("['killed.h5']")


def test_killed_at_every_call_of_the_operating_system_gives_the_same_bytes(tmp_path):
    assert int(run(EVERY, tmp_path, 6)) > 15


# ---- names, photos in memory, real photos

def test_store_path_follows_the_content(data, encoder, tmp_path):
    path = default_store_path(data, encoder, root=tmp_path)
    torch.manual_seed(0)
    assert path == default_store_path(data, make_encoder('scene_cnn', 'random', image_size=32), root=tmp_path)
    assert path.parent == tmp_path and path.name.startswith('noise-scene_cnn-') and path.suffix == '.h5'
    others = [default_store_path(data, small_encoder(1), root=tmp_path), default_store_path(data, encoder, ('plain', 'flip'), tmp_path),
              default_store_path(data, encoder, root=tmp_path, precision='bf16'),
              default_store_path(data.subset(10, 0), encoder, root=tmp_path)]
    assert len({path, *others}) == 5
    data2 = _as(CaptionData, data); data2.name = '../a b/ü'
    assert default_store_path(data2, encoder, root=tmp_path).parent == tmp_path


def test_load_images_keeps_the_order(data, encoder):
    ids = data.images[::-3]
    images = load_images(data, ids, encoder, quiet=True, workers=3)
    assert images.dtype == torch.uint8 and all(torch.equal(x, encoder.transform(data.open(id))) for x, id in zip(images, ids))


def test_real_photos(flickr8k, mobilenet, tmp_path):
    ids = sorted(p.name for p in (flickr8k/'Images').glob('*.jpg'))[:4]
    data = CaptionData('flickr8k', flickr8k/'Images', {id: ['a'] for id in ids}, {}, layout='kaggle')
    encoder = make_encoder('mobilenetv2_100', mobilenet, pad_type='same', mean=(.5,)*3, std=(.5,)*3).freeze()
    store = extract(data, encoder, tmp_path/'s.h5', quiet=True)
    grid = store.read(ids)
    assert grid.shape == (4, 49, 1280) and grid.min() == 0 and grid.max() <= 6
    assert store.attrs['encoder']['mean'] == [.5]*3 and store.attrs['encoder']['pad_type'] == 'same'


# ---- views

SIX = view_names(2, flip=True)


@pytest.fixture(scope='module')
def tall(tmp_path_factory): return photos(tmp_path_factory.mktemp('tall')/'photos', 20, (90, 61))


@pytest.fixture(scope='module')
def parts(tall, encoder, tmp_path_factory):
    return extract(tall, encoder, tmp_path_factory.mktemp('parts')/'a.h5', views=SIX, batch_size=4, quiet=True)


def pil_crop(photo: Image.Image, box) -> Image.Image:
    "The pixels of `photo` whose edges are nearest to `box`, by arithmetic of its own"
    pixels = np.asarray(photo)
    x0, x1 = (round(v*photo.width) for v in (box[0], box[2]))
    y0, y1 = (round(v*photo.height) for v in (box[1], box[3]))
    return Image.fromarray(pixels[y0:y1, x0:x1])


def middle(photo: Image.Image) -> tuple[float, ...]:
    "The largest square in the middle of `photo`"
    (w, h), side = photo.size, min(photo.size)
    return (w - side)/2, (h - side)/2, (w + side)/2, (h + side)/2


def test_names_of_views():
    assert SIX == ('plain', 'flip', 'crop-1', 'crop-1-flip', 'crop-2', 'crop-2-flip') and view_names(2) == ('plain', 'crop-1', 'crop-2')


@pytest.mark.parametrize('resize', ['crop', 'squash'])
def test_crops_are_cut_and_resized_as_pillow_does(tall, resize, tmp_path):
    torch.manual_seed(0)
    encoder = make_encoder('scene_cnn', 'random', image_size=32, resize=resize).freeze()
    store = extract(tall, encoder, tmp_path/'s.h5', views=SIX, batch_size=4, quiet=True)
    boxes = store.crop_boxes()
    for n, (crop, mirrored) in enumerate([('crop-1', False), ('crop-1-flip', True), ('crop-2', False), ('crop-2-flip', True)]):
        rows = []
        for i in range(0, 20, 4):
            cuts = [pil_crop(tall.open(id), boxes[j, n//2]) for j, id in enumerate(tall.images[i:i + 4], i)]
            pixels = np.stack([np.asarray(c.resize((32, 32), Image.Resampling.BICUBIC, box=middle(c) if resize == 'crop' else None)) for c in cuts])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            rows.append(encoder.encode_batch(images.flip(3) if mirrored else images).numpy().astype('<f2'))
        assert np.array_equal(store.read(tall.images, crop), np.concatenate(rows)), crop


def test_boxes_are_recorded_and_do_not_depend_on_the_company(tall, encoder, parts, tmp_path):
    boxes = parts.crop_boxes()
    assert boxes.shape == (20, 2, 4) and boxes[3, 1].tolist() == list(crop_box(tall.images[3], 2))
    sides = boxes[..., 2:] - boxes[..., :2]
    assert np.allclose(sides[..., 0], sides[..., 1]) and (boxes >= 0).all() and (boxes <= 1).all()
    assert sides.min() > CROP_SIDES[0] and sides.max() < CROP_SIDES[1] and sides.std() > 0.04 and parts.attrs['crop_sides'] == list(CROP_SIDES)
    few = extract(tall, encoder, tmp_path/'s.h5', tall.images[:1:-1], views=('plain', 'crop-2'), batch_size=1, quiet=True)
    assert np.array_equal(few.crop_boxes()[:, 0], boxes[:1:-1, 1])
    assert np.allclose(few.read(tall.images[4:6], 'crop-2').astype('f4'), parts.read(tall.images[4:6], 'crop-2').astype('f4'), atol=1e-2)


def test_boxes_of_many_photos_lie_everywhere():
    boxes = np.array([crop_box(f'{i}.jpg', 1) for i in range(2000)])
    side, free = boxes[:, 2] - boxes[:, 0], 1 - (boxes[:, 2:3] - boxes[:, :1])
    for values in ((side - CROP_SIDES[0])/(CROP_SIDES[1] - CROP_SIDES[0]), *(boxes[:, :2]/free).T):
        assert abs(values.mean() - 0.5) < 0.03 and abs(values.std() - 12**-0.5) < 0.02 and 0 <= values.min() and values.max() <= 1


def test_tiny_photos_have_parts():
    for size in ((1, 1), (1, 50), (2, 3)):
        for n in range(1, 30): assert min(cut(Image.new('RGB', size), crop_box('a', n)).size) >= 1


def test_interrupted_with_crops_is_the_same_then(tall, encoder, parts, tmp_path):
    interrupt(tall, encoder, tmp_path/'s.h5', at=9, views=SIX)
    with pytest.raises(StoreError, match='begun otherwise: views is'): again(tall, encoder, tmp_path/'s.h5', views=view_names(1, True))
    assert sha256_file(again(tall, encoder, tmp_path/'s.h5', views=SIX, batch_size=16).path) == sha256_file(parts.path)


def test_a_photo_is_opened_once_for_all_views(tall, encoder, tmp_path, monkeypatch):
    opened, open_ = [], CaptionData.open
    monkeypatch.setattr(CaptionData, 'open', lambda self, id: (opened.append(id), open_(self, id))[1])
    extract(tall, encoder, tmp_path/'s.h5', views=SIX, quiet=True)
    assert sorted(opened) == tall.images


def test_store_with_more_views_serves_those_who_want_fewer(tall, encoder, parts):
    assert extract(tall, encoder, parts.path, quiet=True).views == SIX
    with pytest.raises(StoreError, match='view crop-3 is not in it'): extract(tall, encoder, parts.path, views=('plain', 'crop-3'), quiet=True)
    for bad in ('crop-0', 'crop-01', 'crop', 'flip-crop-1', 'plain-flip'):
        with pytest.raises(ValueError, match=f'unknown view {bad!r}'): extract(tall, encoder, parts.path, views=(bad,), quiet=True)


def test_what_it_will_take_is_said_before(data, encoder, tmp_path, capsys):
    extract(data, encoder, tmp_path/'s.h5', views=SIX, batch_size=1)
    out = capsys.readouterr().out
    assert out.startswith(f'{tmp_path/"s.h5"}: features of 30 photos in 6 views (plain, flip, crop-1, …), 4 × 128 numbers each: 0.18 MB, about ')
    extract(data, encoder, tmp_path/'s.h5', views=SIX)
    extract(data, encoder, tmp_path/'few.h5', batch_size=4)
    assert capsys.readouterr().out == f'{tmp_path/"few.h5"}: features of 30 photos in 1 view (plain), 4 × 128 numbers each: 0.03 MB\n'
