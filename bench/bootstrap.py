"""Bootstrap intervals of BLEU-4 and CIDEr: ours against two plain ways, and a paired test; and how much memory ours takes.

The first peer is scipy.stats.bootstrap on the same statistics of images, which gathers the rows of every resample. The second scores the
captions of every resample again with our own `score`; it is timed on few resamples, since its time is proportional to them."""
from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace

import numpy as np

from bench.common import Result, compare
from bench.metrics import captions


def _scipy(scores, resamples: int) -> dict[str, tuple[float, float]]:
    "The same percentile intervals by scipy"
    try: from scipy.stats import bootstrap
    except ImportError: raise SystemExit('this benchmark compares with scipy: pip install scipy') from None
    from caption_nb.metrics import corpus_scores
    rows, found = np.arange(len(scores.per_image)), {}
    for family, metric in (('BLEU', 'Bleu_4'), ('CIDEr', 'CIDEr')):
        def statistic(i, axis, s=scores.statistics[family], family=family, metric=metric):
            return corpus_scores({family: s[i].sum(axis=-2)})[metric]
        done = bootstrap((rows,), statistic, n_resamples=resamples, method='percentile', vectorized=True, batch=20,
                         rng=np.random.default_rng(0))
        found[metric] = tuple(map(float, done.confidence_interval))
    return found


def _peak_MB(work) -> float:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]/1e6
    tracemalloc.stop()
    return peak


def run(quick: bool = False) -> list[Result]:
    "1,000 resamples of 5,000 images; 40,000 images for the memory"
    from caption_nb.certainty import bootstrap, paired
    from caption_nb.metrics import score
    images, resamples, rounds = (500, 200, 3) if quick else (5000, 1000, 5)
    hypotheses, references = captions(images)
    scores = score(hypotheses, references, tokenizer='whitespace', metrics=('bleu', 'cider'))
    mine, theirs = bootstrap(scores, resamples), _scipy(scores, resamples)
    for m, (low, high) in theirs.items():   # other random numbers: the ends differ by a tenth of the width at most
        width = high - low
        assert max(abs(mine[m].low - low), abs(mine[m].high - high)) < (.3 if quick else .1)*width, (m, mine[m], low, high)

    def again(times=3):   # every resample's captions scored again
        rng = random.Random(0)
        for _ in range(times):
            drawn = dict(enumerate(rng.choices(list(references), k=images)))
            score({k: hypotheses[i] for k, i in drawn.items()}, {k: references[i] for k, i in drawn.items()}, tokenizer='whitespace',
                  metrics=('bleu', 'cider'))

    tiled = {f: np.tile(s, (8, 1)) for f, s in scores.statistics.items()}
    many = replace(scores, per_image=dict.fromkeys(range(8*images)), statistics=tiled)
    sizes = dict(images=images, resamples=resamples, peak_MB=round(_peak_MB(lambda: bootstrap(scores, resamples)), 1),
                 peak_MB_of_8_times_the_images=round(_peak_MB(lambda: bootstrap(many, resamples)), 1))
    shortened = {i: ' '.join(h.split()[:-1]) for i, h in hypotheses.items()}
    other = score(shortened, references, tokenizer='whitespace', metrics=('bleu', 'cider'))
    return [compare('bootstrap, scipy.stats.bootstrap', lambda: bootstrap(scores, resamples), lambda: _scipy(scores, resamples), resamples,
                    'resamples/s', rounds=rounds, sizes=sizes),
            compare('bootstrap, captions scored again', lambda: bootstrap(scores, resamples), again, resamples,
                    'resamples/s', rounds=rounds, sizes=sizes, peer_count=3),
            compare('interval and permutation test of a pair, again', lambda: paired(scores, other, resamples), lambda: again(4), resamples,
                    'resamples/s', rounds=rounds, sizes=sizes, peer_count=1)]   # two runs are drawn, and swapped: four scorings
