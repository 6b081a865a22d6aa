"""Finding photos that are there twice: our table look-ups against the distances of all pairs by one matrix product in blocks.

Hashes as photos have them, nearly independent signs, and every hundredth a copy with a few signs changed; both find the same pairs."""
from __future__ import annotations

import numpy as np

from bench.common import Result, compare
from caption_nb.lookalikes import BITS, LIMIT, WORDS, near_pairs


def make(n: int, seed: int = 0) -> np.ndarray: # (n, 8) uint16
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 1 << 16, (n, WORDS)).astype(np.uint16)
    copies = rng.choice(n, n//100, replace=False)
    hashes[copies] = hashes[rng.integers(n, size=len(copies))] ^ (np.uint16(1) << rng.integers(16, size=(len(copies), WORDS)).astype(np.uint16))
    return hashes


def all_pairs(hashes: np.ndarray, block: int = 2000) -> np.ndarray: # (m, 2)
    signs = np.where(np.unpackbits(hashes.view(np.uint8), axis=1) > 0, 1, -1).astype(np.float32)
    found = []
    for i in range(0, len(signs), block):
        rows, columns = np.nonzero(signs[i:i + block]@signs[i:].T >= BITS - 2*LIMIT)
        found.append(np.stack([rows, columns], 1)[columns > rows] + i)
    return np.concatenate(found)


def run(quick: bool = False) -> list[Result]:
    n, rounds = (4000, 2) if quick else (40_000, 5)
    hashes = make(n)
    assert np.array_equal(np.unique(near_pairs(hashes)[0], axis=0), np.unique(all_pairs(hashes), axis=0))
    return [compare('lookalikes: table look-up, against all pairs by matrix product', lambda: near_pairs(hashes), lambda: all_pairs(hashes), n, 'photos/s',
                    rounds=rounds, sizes=dict(photos=n, limit=LIMIT))]
