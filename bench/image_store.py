"""Photos for an encoder that learns: our store against torchvision's ImageFolder + DataLoader, which decodes the JPEGs in every epoch,
and against the HDF5 layout of the well-known tutorial: one `(N, 3, 256, 256)` dataset of bytes, read image by image.

The photos are 500×375 pixels, 4:2:0, quality 90, made of noise at several scales; all come out as 3×256×256 bytes, in random order.
Images per CPU-second count user and system time of one process; images per second give the peer a worker process a processor, and ours
none. 'building, cores in use' is the share of all processors that making the store uses; its peer is what loops that only count got on
them just before and after: the ratio is to be 0.85 or more. Decoders, where they are installed: 'ours' is `open_image`, the photo as
Pillow has it, the peer the library's bare pixels, which are checked to be the same."""
from __future__ import annotations

import io
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

from bench.common import Result, memory_at_ten_times
from caption_nb.data import CaptionData
from caption_nb.encoders import Preprocess, import_timm
from caption_nb.features import _create, processors
from caption_nb.images import ImageStore, store_images
from caption_nb.photos import open_image

TO_SIZE = Preprocess((256, 256), 'squash')


def make_photos(folder: Path, n: int, size: tuple[int, int] = (500, 375)) -> CaptionData:
    "`n` files, of 24 photos"
    rng, (w, h), different = np.random.default_rng(0), size, []
    for _ in range(min(n, 24)):
        photo = np.zeros((h, w, 3))
        for grain, strength in ((40, 1.), (6, 0.25)):
            small = rng.integers(0, 256, (h//grain, w//grain, 3), dtype=np.uint8)
            photo += strength*(np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)).astype(float) - 128)
        file = io.BytesIO()
        pixels = (photo + 128 + rng.normal(0, 4, photo.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, 'JPEG', quality=90, subsampling='4:2:0')
        different.append(file.getvalue())
    (folder/'all').mkdir(parents=True)
    for i in range(n): (folder/f'all/{i:06d}.jpg').write_bytes(different[i % 24])
    ids = [f'all/{i:06d}.jpg' for i in range(n)]
    return CaptionData('bench', folder, {i: [] for i in ids}, {'train': ids})


def image_folder(folder: Path, workers: int):
    "torchvision's loader of JPEGs"
    import_timm()   # puts right a torchvision that was built for another torch
    from torchvision import transforms as t
    from torchvision.datasets import ImageFolder
    to_size = t.Compose([t.Resize((256, 256), t.InterpolationMode.BICUBIC), t.PILToTensor()])
    return torch.utils.data.DataLoader(ImageFolder(folder, to_size), batch_size=32, shuffle=True, num_workers=workers)


def timed(work, n: int) -> tuple[float, float]:
    "(images per CPU-second, images per second) of `work`, which gives batches of `n` images in all"
    wall, cpu = time.perf_counter(), time.process_time()
    assert sum(map(len, work())) == n
    return n/max(time.process_time() - cpu, 1e-9), n/(time.perf_counter() - wall)


def versus(name: str, unit: str, which: int, ours, peer, rounds: int, sizes: dict) -> Result:
    "`ours()` and `peer()` in turn, each giving the two rates of `timed`"
    pairs = [(ours()[which], peer()[which]) for _ in range(rounds + 1)][1:]   # the first round warms up
    ratios = [a/b for a, b in pairs]
    mine, theirs = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    sizes = sizes | {'rounds': rounds}
    return Result(f'image_store: {name}', mine, theirs, statistics.median(ratios), unit, [min(ratios), max(ratios)], sizes)


def busy(seconds: float = 1.) -> float:
    "The share of all processors that as many loops, which only count, get now"
    code = (f'import time\nstart = time.perf_counter()\nwhile time.perf_counter() - start < {seconds}: pass\n'
            'print(time.process_time()/(time.perf_counter() - start))')
    loops = [subprocess.Popen([sys.executable, '-S', '-c', code], stdout=subprocess.PIPE, text=True) for _ in range(processors())]
    return min(1., sum(float(p.communicate()[0]) for p in loops)/len(loops))


def building(data: CaptionData, folder: Path, rounds: int) -> Result:
    "Cores in use while a store is made"
    pairs = []   # %
    for i in range(rounds):
        before, wall, cpu = busy(), time.perf_counter(), time.process_time()
        store_images(data, TO_SIZE, folder/f'{i}.h5', quiet=True)
        used = (time.process_time() - cpu)/(time.perf_counter() - wall)/processors()
        pairs.append((100*used, 50*(before + busy())))
        os.remove(folder/f'{i}.h5')
    ratios = [a/b for a, b in pairs]
    used, free = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    return Result('image_store: building, cores in use', used, free, statistics.median(ratios), '% of all', [min(ratios), max(ratios)],
                  dict(photos=len(data.captions), processors=processors(), rounds=rounds))


def build(folder: str, path: str):
    "A store of the photos in `folder`, for measuring memory"
    ids = sorted(f'all/{p.name}' for p in Path(folder, 'all').iterdir())
    store_images(CaptionData('bench', Path(folder), {i: [] for i in ids}, {}), TO_SIZE, path, quiet=True)
    os.remove(path)


def read_all(path: str, size: int = 32):
    "All photos of the store at `path`, in random order"
    with ImageStore(path) as store: batches(store, store.ids, size)


def batches(store, ids: list[str], size: int = 32) -> list[range]:
    order = random.Random(0).sample(ids, len(ids))
    for j in range(0, len(order), size): store.read(order[j:j + size])
    return [range(len(order))]


def decoders() -> dict:
    "Other libraries that decode JPEGs, of those installed: bytes → (H, W, 3) uint8"
    found = {}
    try: import simplejpeg; found['simplejpeg'] = lambda data: simplejpeg.decode_jpeg(data, 'RGB')
    except ImportError: pass
    try: import cv2; found['OpenCV'] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    except ImportError: pass
    import_timm()
    from torchvision.io import decode_jpeg
    def torchvisions(data): return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0).numpy()
    if hasattr(torch.ops.image, 'decode_jpeg'): found['torchvision'] = torchvisions
    return found


def run(quick: bool = False) -> list[Result]:
    n, rounds = (48, 2) if quick else (600, 5)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        data = make_photos(folder/'photos', n)
        sizes = dict(photos=n, batch=32)
        store = store_images(data, TO_SIZE, folder/'store.h5', quiet=True)
        ids = store.ids
        with h5py.File(folder/'tutorial.h5', 'w') as f: f.create_dataset('images', (n, 3, 256, 256), 'uint8', data=store.read(ids).numpy())
        theirs = h5py.File(folder/'tutorial.h5', 'r')['images']
        order = random.Random(1).sample(range(n), n)
        def ours(times=20): return timed(lambda: (r for _ in range(times) for r in batches(store, ids)), times*n)
        def tutorial(): return timed(lambda: (torch.stack([torch.from_numpy(theirs[i]) for i in order[j:j + 32]]) for j in range(0, n, 32)), n)
        def jpegs(workers): return timed(lambda: (images for images, _ in image_folder(folder/'photos', workers)), n)
        def built():
            result = timed(lambda: [store_images(data, TO_SIZE, folder/'again.h5', quiet=True)], n)
            os.remove(folder/'again.h5')
            return result
        results = [versus('ImageFolder + DataLoader', 'images/CPU-s', 0, ours, lambda: jpegs(0), rounds, sizes),
                   versus('ImageFolder, workers', 'images/s', 1, ours, lambda: jpegs(processors()), rounds, sizes),
                   versus("the tutorial's HDF5", 'images/CPU-s', 0, ours, tutorial, rounds, sizes),
                   versus('building, ImageFolder epoch', 'images/CPU-s', 0, built, lambda: jpegs(0), rounds, sizes),
                   building(data, folder, rounds)]
        results += decoding(data, rounds) + memory(folder, 100 if quick else 1000, 1 if quick else 3)
        theirs.file.close(); store.close()
    return results


def decoding(data: CaptionData, rounds: int) -> list[Result]:
    "`open_image` and other libraries on the same bytes"
    paths = [data.path(i) for i in data.images[:24]]
    files, results = [p.read_bytes() for p in paths], []
    for name, decode in decoders().items():
        assert all(np.array_equal(decode(file), np.asarray(open_image(path))) for file, path in zip(files, paths)), name
        def work(decode, them): return timed(lambda: ([decode(x)] for x in them*4), 4*len(them))
        results.append(versus(f'open_image against {name}', 'images/CPU-s', 0, lambda: work(open_image, paths), lambda: work(decode, files),
                              rounds, dict(photos=len(files))))
    return results


def memory(folder: Path, n: int, rounds: int) -> list[Result]:
    "Memory at 10 times the photos, for reading and for building"
    for k in (1, 10):
        make_photos(folder/f'photos{k}', k*n, (160, 120))
        record = dict(views=['plain'], preprocess={})
        _create(folder/f'empty{k}.h5', ImageStore, record, (3, 256, 256), [str(i) for i in range(k*n)], [0]*k*n)   # takes no room on the disk
    def reading(k): return f'read_all({str(folder/f"empty{k}.h5")!r})'
    def making(k): return f'build({str(folder/f"photos{k}")!r}, {str(folder/f"memory{k}.h5")!r})'
    return [memory_at_ten_times('image_store: memory, reading 10 times as many', 'image_store', reading, rounds, dict(photos=n)),
            memory_at_ten_times('image_store: memory, building 10 times as many', 'image_store', making, rounds, dict(photos=n))]
