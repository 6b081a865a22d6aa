"""Fitting a PCA to more rows than memory holds: ours against scikit-learn's IncrementalPCA, and applying it to a store.

Both take the same rows in the same blocks, from memory, and end with the same axes within what IncrementalPCA can do: it forgets at
every block what its `n_components` do not hold, ours is exact. Also: what a fit on Flickr8k and COCO would take."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from bench.common import Result, compare
from caption_nb.pca import fit_pca


class Memory(SimpleNamespace):
    "A store in memory: `rows` (n, L, D)"
    def __contains__(self, id): return True
    def read(self, ids, view=0): return self.rows[int(ids[0]):int(ids[-1]) + 1]


def make(n: int, L: int, D: int) -> Memory:
    "Features after a ReLU, with some directions stronger than others"
    rng = np.random.default_rng(0)
    mix = (rng.standard_normal((64, D))*0.95**np.arange(64)[:, None]).astype('f4')
    rows = rng.standard_normal((n*L, 64), dtype='f4') @ mix + 0.3*rng.standard_normal((n*L, D), dtype='f4')
    return Memory(rows=np.maximum(rows, 0).astype('f2').reshape(n, L, D), grid=(1, L), dim=D, views=('plain',), path='memory')


def run(quick: bool = False) -> list[Result]:
    try: from sklearn.decomposition import IncrementalPCA
    except ImportError: print('pca: left out, it is compared with scikit-learn, which is not installed'); return []
    results = []
    for n, L, D, dim in ((60, 9, 256, 32),) if quick else ((200, 49, 1024, 256), (4000, 1, 1024, 256)):
        store = make(n, L, D)
        ids, block = [str(i) for i in range(n)], max(n//4, 1)*L*D
        flat, size = store.rows.reshape(-1, D), block//D
        def ours(): return fit_pca(store, ids, dim, block=block, quiet=True)
        def theirs():
            peer = IncrementalPCA(dim)
            for i in range(0, len(flat), size): peer.partial_fit(flat[i:i + size].astype('f4'))
            return peer
        mine, peer = ours(), theirs()
        assert np.abs((mine.components.numpy()[:8]*peer.components_[:8]).sum(1)).min() > 0.95
        sizes = dict(images=n, L=L, D=D, dim=dim, rows=n*L)
        results.append(compare(f'pca: fit {L}×{D} → {dim}', ours, theirs, n, 'images/s', rounds=2 if quick else 3, warmup=0, sizes=sizes))
        x = torch.from_numpy(flat[:4900])
        w, m = peer.components_, peer.mean_
        results.append(compare(f'pca: apply {D} → {dim}', lambda: mine(x), lambda: (x.numpy().astype('f4') - m) @ w.T, len(x), 'rows/s',
                               rounds=3, sizes=dict(sizes, rows=len(x))))
    return results
