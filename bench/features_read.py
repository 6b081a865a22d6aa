"""Reading features in random order: our store against one .npz an image, and against `chunks=True` with gzip.

Rates are images per CPU-second (user and system), with the files in the operating system's cache: what is compared is the work of
reading, not the disk. The last row is the memory that reading 10 times as
many images takes: what grows is the index, some 270 bytes an image of 200 kB."""
from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from bench.common import Result, memory_at_ten_times
from caption_nb.features import FeatureStore, _create


def make(folder: Path, n: int, L: int, D: int) -> tuple[FeatureStore, list[str]]:
    "The same features, after a ReLU as of a real network, in all three forms"
    rng, ids = np.random.default_rng(0), [f'{i:06d}.jpg' for i in range(n)]
    side = int(L**0.5)
    _create(folder/'store.h5', FeatureStore, dict(grid=[side, L//side], dim=D, views=['plain'], precision='fp32', encoder={'name': 'bench'}), (L, D),
            ids, [0]*n)
    with h5py.File(folder/'store.h5', 'r+') as store, h5py.File(folder/'gzip.h5', 'w') as packed:
        other = packed.create_dataset('features', (n, L, D), 'f2', chunks=True, compression='gzip')
        for i, id in enumerate(ids):
            grid = np.maximum(rng.standard_normal((L, D), dtype='f4'), 0).astype('f2')
            store['features'][i] = grid; other[i] = grid
            np.savez(folder/f'{id}.npz', features=grid)
    return FeatureStore(folder/'store.h5'), ids


def cpu_rate(read, batches: list[list[str]]) -> float:
    start = time.process_time()
    for batch in batches: read(batch)
    return sum(map(len, batches))/max(time.process_time() - start, 1e-9)


def empty(path: Path, n: int, L: int, D: int):
    "A store of `n` images of which nobody has written the numbers: it takes no room on the disk"
    _create(path, FeatureStore, dict(grid=[7, L//7], dim=D, views=['plain'], precision='fp32', encoder={'name': 'bench'}), (L, D),
            [f'{i:06d}.jpg' for i in range(n)], [0]*n)


def read_all(path: str, size: int):
    "All images of the store at `path`, in random order"
    with FeatureStore(path) as store:
        order = random.Random(0).sample(store.ids, len(store))
        for j in range(0, len(order), size): store.read(order[j:j + size])


def run(quick: bool = False) -> list[Result]:
    n, L, D, size, rounds = (64, 49, 2048, 16, 3) if quick else (400, 49, 2048, 32, 10)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        store, ids = make(folder, n, L, D)
        packed = h5py.File(folder/'gzip.h5', 'r')
        row = {id: i for i, id in enumerate(ids)}
        def npz(batch):
            out = []
            for id in batch:
                with np.load(folder/f'{id}.npz') as f: out.append(f['features'])
            return np.stack(out)
        def gzipped(batch): return np.stack([packed['features'][row[id]] for id in batch])
        assert all(np.array_equal(store.read(ids[:3]), peer(ids[:3])) for peer in (npz, gzipped))
        rng, results = random.Random(0), []
        for name, peer, share in (('one .npz an image', npz, 2), ('chunks=True, gzip', gzipped, 8)):   # the slow ones read fewer
            ours, theirs = [], []
            for i in range(rounds + 1):   # the first round warms up
                order = rng.sample(ids, len(ids))
                batches = [order[j:j + size] for j in range(0, len(ids), size)]
                ours.append(cpu_rate(store.read, batches*(4 if quick else 8)))
                theirs.append(cpu_rate(peer, batches[:max(1, len(batches)//share)]))
            ratios = [a/b for a, b in zip(ours[1:], theirs[1:])]
            mine, peers, ratio = (statistics.median(x) for x in (ours[1:], theirs[1:], ratios))
            results.append(Result(f'features_read: {name}', mine, peers, ratio, 'images/CPU-s', [min(ratios), max(ratios)],
                                  dict(images=n, L=L, D=D, batch=size, rounds=rounds)))
        packed.close(); store.close()
        for k in (1, 10): empty(folder/f'{k}.h5', k*n*5, L, D)
        results.append(memory_at_ten_times('features_read: memory at 10 times the images', 'features_read',
                                           lambda k: f'read_all({str(folder/f"{k}.h5")!r}, {size})', 1 if quick else 3, dict(images=5*n, L=L, D=D)))
    return results
