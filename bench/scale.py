"""Three million images: what reading, checking, the vocabulary, batches and a feature store's index need, and what that means on disk.

`python -m bench scale [--images 3000000] [--captions 1] [--layout jsonl|tokens]` writes an index of so many images that do not exist, with
captions of random words that are distributed as words are (Zipf), and works on it in a process of its own, whose peak memory is taken after
each part. The row says how many such images would fit into 4 GB, and the ratio is 4 GB to the peak: the bar is 1.

Then the costs of one image are measured on a few (opening a photo, two encoders, writing and reading rows of a store), and a table says
what COCO and three million images need: disk for each kind of store, CPU time to make it and to read it once."""
from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from bench.common import Result

LIMIT = 4e9        # bytes
COCO = 123_287     # images of train and val 2014, with 616,767 captions
MILLIONS = 3_000_000
KINDS = {'49×2048 fp16': ((49, 2048), 2), '7×7×1280 fp16': ((49, 1280), 2), '49×512 fp16 (PCA)': ((49, 512), 2), '1×512 fp16 (PCA, pooled)': ((1, 512), 2),
         '3×256×256 uint8': ((3, 256, 256), 1)}   # shape of a row, bytes of a number


def options(args: list[str]) -> dict:
    "What may follow the name of this benchmark"
    parser = argparse.ArgumentParser(prog='python -m bench scale')
    parser.add_argument('--images', type=int, default=MILLIONS)
    parser.add_argument('--captions', type=int, default=1, help='of each image')
    parser.add_argument('--layout', choices=('jsonl', 'tokens'), default='jsonl')
    return vars(parser.parse_args(args))


# ---- an index

def write_index(folder: Path, images: int, captions: int, layout: str, words: int = 30_000, block: int = 50_000) -> Path:
    "The file of captions of images such as 000/000123.jpg, the splits in it or beside it"
    rng = np.random.default_rng(0)
    lexicon = [''.join(letters[:length]) for letters, length in zip(rng.choice(list('etaoinshrdlucm'), (words, 9)), rng.integers(2, 10, words))]
    chances = 1/np.arange(3, words + 3)
    bounds = np.cumsum(chances/chances.sum())
    path, own = folder/{'jsonl': 'captions.jsonl', 'tokens': 'Some.token.txt'}[layout], images//100
    def split_of(i): return 'dev' if i < own else 'test' if i < 2*own else 'train'
    with open(path, 'w') as f:
        for start in range(0, images, block):
            n = min(block, images - start)
            lengths = np.maximum(4, rng.normal(10.5, 3.2, n*captions).round()).astype(int)
            drawn, at = np.searchsorted(bounds, rng.random(lengths.sum())).tolist(), 0
            for i in range(start, start + n):
                said = []
                for length in lengths[(i - start)*captions:(i - start + 1)*captions]:
                    said.append(' '.join([lexicon[min(w, words - 1)] for w in drawn[at:at + length]])); at += length
                id = f'{i//1000:04d}/{i:07d}.jpg'
                if layout == 'tokens': f.writelines(f'{id}#{k}\t{c}\n' for k, c in enumerate(said))
                else: f.write(f'{{"file_name": "{id}", "captions": {json.dumps(said)}, "split": "{split_of(i)}"}}\n')
    if layout == 'tokens':
        for split in ('train', 'dev', 'test'):
            with open(folder/f'Some.{split}Images.txt', 'w') as f:
                f.writelines(f'{i//1000:04d}/{i:07d}.jpg\n' for i in range(images) if split_of(i) == split)
    return path


# ---- the parts, each with its time and its peak, in a process of their own

class Stages:
    "Times of parts and the memory that they needed"
    def __init__(self): self.rows = []

    def __call__(self, name: str, work):
        try: Path('/proc/self/clear_refs').write_text('5')   # the peak starts anew; where that is not allowed it is that of all before
        except OSError: pass
        start = time.process_time()
        result = work()
        seconds, status = time.process_time() - start, Path('/proc/self/status').read_text()
        kept, peak = (int(status.split(f'{field}:')[1].split()[0])*1024 for field in ('VmRSS', 'VmHWM'))
        self.rows.append(dict(part=name, seconds=seconds, kept=kept, peak=peak))
        return result


class Zeros:
    "A source of views of nothing"
    views = ('plain', 'flip')
    def read(self, ids, view=0): return np.zeros((len(ids), 1, 1), np.float16)


def work_on_index(path: Path) -> list[dict]:
    "Everything that happens before the first step of training, and some hundred batches"
    import caption_nb.data as d
    from caption_nb.batches import CaptionBatches, plan_epoch
    from caption_nb.text import Vocab
    stage = Stages()
    stage('imports', lambda: None)
    data = stage('load_data', lambda: d.load_data(path, images=path.parent, strict=False))
    stage('refusing faults', lambda: d._refuse_faults(data, path, []))
    report = stage('check', lambda: d.check(data, photos=False))
    assert report.ok, report
    del report
    stage('fingerprint', lambda: data.fingerprint)
    vocab = stage('Vocab.build', lambda: Vocab.build(data.train_captions()))
    batches = stage('CaptionBatches', lambda: CaptionBatches(data, vocab, 'train', Zeros(), flip=True))
    plan = stage('plan_epoch', lambda: plan_epoch(batches, 0))
    few = min(300, len(batches)//2)
    rest = [[batches.ids[i] for i in rows] for rows in plan.order[few:few + 3]]
    del plan
    stage(f'{few} batches', lambda: list(islice(batches, few)))
    state = batches.state_dict()
    batches.set_epoch(9); batches.load_state_dict(state)
    assert stage('resumed: 3 batches', lambda: [b.ids for b in islice(batches, 3)]) == rest
    return stage.rows + [dict(part='words', seconds=0, kept=len(vocab), peak=0)]


def work_on_store(folder: Path, images: int) -> list[dict]:
    "The index of a feature store; the rows themselves do not count, so they hold one number"
    from caption_nb.features import FeatureStore, _create
    stage, path, ids = Stages(), folder/'store.h5', [f'{i//1000:04d}/{i:07d}.jpg' for i in range(images)]
    record = dict(grid=[1, 1], dim=1, views=['plain'], precision='fp32', encoder={'name': 'bench'})
    stage('imports and ids', lambda: None)
    stage('create', lambda: _create(path, FeatureStore, record, (1, 1), ids, [0]*images))
    del ids
    store = stage('open a FeatureStore', lambda: FeatureStore(path))
    stage('read 10,000', lambda: store.read(store.ids[::max(1, images//10_000)]))
    return stage.rows + [dict(part='bytes', seconds=0, kept=path.stat().st_size - 2*images, peak=0)]


def alone(work: str, *args) -> list[dict]:
    "What the function `work` of this module returns in a fresh process"
    code = f'import json, sys, bench.scale as s; from pathlib import Path; a = sys.argv; print(json.dumps(s.{work}(Path(a[1]), *map(int, a[2:]))))'
    done = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f'{work} failed:\n{done.stderr[-3000:]}')
    return json.loads(done.stdout)


def measured(folder: Path, images: int, captions: int, layout: str) -> tuple[Result, dict[str, dict]]:
    "Peak memory of an index of so many images, as a row; and of each part, printed, too"
    path = write_index(folder, images, captions, layout)
    rows = alone('work_on_index', path)
    words, size = rows.pop()['kept'], sum(p.stat().st_size for p in folder.iterdir())
    print(f'\n{images:,} images × {captions} captions as {layout} ({size/1e6:,.0f} MB), {words:,} words in the vocabulary')
    show(rows, images)
    base, peak = rows[0]['peak'], max(r['peak'] for r in rows)
    fit = images*(LIMIT - base)/max(1, peak - base)
    return Result(f'scale: {captions} captions, {layout}: fit 4 GB | had', fit, images, LIMIT/peak, 'images', [LIMIT/peak]*2,
                  dict(images=images, captions=captions, layout=layout, peak_gb=round(peak/1e9, 3), parts=rows)), {r['part']: r for r in rows}


def show(rows: list[dict], images: int):
    print(f'{"part":<24}{"CPU s":>10}{"µs/image":>10}{"peak GB":>10}{"kept GB":>10}')
    for r in rows: print(f'{r["part"]:<24}{r["seconds"]:>10.1f}{1e6*r["seconds"]/images:>10.1f}{r["peak"]/1e9:>10.2f}{r["kept"]/1e9:>10.2f}')


# ---- costs of an image, and what they add up to

def cpu(work, count: int, rounds: int = 3) -> float:
    "CPU seconds of `work`, for one of `count`; the fastest of some rounds after one that warms up"
    times = []
    for _ in range(rounds + 1):
        start = time.process_time(); work(); times.append(time.process_time() - start)
    return min(times[1:])/count


def photo_cost(folder: Path, n: int) -> float:
    "Seconds to open a photo of 500×375 pixels and scale it to 256×256"
    from PIL import Image
    from caption_nb.data import open_image
    rng, paths = np.random.default_rng(0), [folder/f'{i}.jpg' for i in range(n)]
    for path in paths: Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return cpu(lambda: [open_image(p).resize((256, 256), Image.Resampling.BICUBIC) for p in paths], n)


def encoder_cost(name: str, n: int) -> float:
    "Seconds to encode an image of 224×224 pixels"
    import torch
    from caption_nb.encoders import make_encoder
    encoder = make_encoder(name, weights='random').freeze()
    images = torch.zeros(n, 3, *encoder.image_size if isinstance(encoder.image_size, (tuple, list)) else [encoder.image_size]*2, dtype=torch.uint8)
    return cpu(lambda: encoder.encode_batch(images), n, rounds=2)


def store_costs(folder: Path, shape: tuple[int, ...], width: int, n: int) -> tuple[float, float]:
    "Seconds to write a row of a store, and to read one in random order from the operating system's cache"
    from caption_nb.features import Store, _create
    class Some(Store): FORMAT, ARRAY, DTYPE, NAME, MAKER = 'bench', 'rows', {1: 'u1', 2: '<f2'}[width], 'a store', 'bench'
    path, ids = folder/'some.h5', [f'{i:06d}.jpg' for i in range(n)]
    _create(path, Some, dict(views=['plain']), shape, ids, [0]*n)
    row = np.zeros(shape, Some.DTYPE)
    with Some(path) as store:
        def write():
            fd = os.open(path, os.O_RDWR)
            for offset in store._offsets.tolist(): os.pwrite(fd, row, offset)
            os.close(fd)
        order = np.random.default_rng(0).permutation(ids).tolist()
        return cpu(write, n), cpu(lambda: [store._rows(order[i:i + 32]) for i in range(0, n, 32)], n)


def extrapolate(per_row: float, quick: bool):
    "The table of COCO and three million images, from costs that are measured now"
    n = 32 if quick else 256
    with tempfile.TemporaryDirectory() as tmp:
        photo = photo_cost(Path(tmp), n//4)
        encoders = {name: encoder_cost(name, 4 if quick else 16) for name in (('mobilenetv2_100',) if quick else ('mobilenetv2_100', 'resnet101'))}
        stores = {kind: store_costs(Path(tmp), *form, n) for kind, form in KINDS.items()}
    print(f'\none image, ms of CPU: open and scale a photo {1000*photo:.2f}; encode ' + ', '.join(f'{k} {1000*c:.1f}' for k, c in encoders.items()))
    print(f'{"store":<26}{"kB/image":>9}{"write µs":>10}{"read µs":>9}' + ''.join(f'{head:>21}' for head in ('COCO: disk, epoch', '3 M: disk, epoch')))
    for kind, (shape, width) in KINDS.items():
        size, (write, read) = math.prod(shape)*width + per_row, stores[kind]
        needs = ''.join(f'{f"{images*size/1e9:,.1f} GB, {hours(images*read)}":>21}' for images in (COCO, MILLIONS))
        print(f'{kind:<26}{size/1e3:>9.1f}{1e6*write:>10.0f}{1e6*read:>9.0f}{needs}')
    print(f'\n{"CPU time to make them":<34}{"COCO":>12}{"3 M":>12}')
    for what, seconds in [('decoded photos', photo), *((f'features, {k}', photo + c) for k, c in encoders.items())]:
        print(f'{what:<34}{hours(COCO*seconds):>12}{hours(MILLIONS*seconds):>12}')


def hours(seconds: float) -> str: return f'{seconds/3600:.1f} h' if seconds >= 3600 else f'{seconds/60:.1f} min' if seconds >= 60 else f'{seconds:.0f} s'


def run(quick: bool = False, images: int = MILLIONS, captions: int = 1, layout: str = 'jsonl') -> list[Result]:
    "The index asked for, COCO's, a store's index, and the table"
    results, sizes = [], [(20_000, captions, layout)] if quick else [(images, captions, layout), (COCO, 5, 'tokens')]
    for size in sizes:
        with tempfile.TemporaryDirectory() as tmp: results.append(measured(Path(tmp), *size)[0])
    images = sizes[0][0]
    with tempfile.TemporaryDirectory() as tmp: rows = alone('work_on_store', tmp, images)
    extra = rows.pop()['kept']/images
    print(f'\na store of {images:,} images: {extra:.0f} bytes an image beside its numbers')
    show(rows, images)
    extrapolate(extra, quick)
    return results
