"""BLEU-1..4, ROUGE-L and CIDEr-D of 1,000 images with five references: ours against pycocoevalcap, on the same words.

Both get the same tokenised strings and split them themselves. Before anything is timed, the scores have to be equal."""
from __future__ import annotations

import random

from bench.common import Result, compare


def captions(images: int, seed: int = 0) -> tuple[dict, dict]:
    "Random captions like real ones: 10.5 words on average, few words frequent, the captions of an image share runs of words"
    rng = random.Random(seed)
    words = [f'w{i}' for i in range(4000)]
    weights = [1/(i + 5) for i in range(len(words))]
    references, hypotheses = {}, {}
    for i in range(images):
        base = rng.choices(words, weights, k=30)
        def caption():
            start, size = rng.randrange(12), max(3, round(rng.gauss(10.5, 3)))
            return ' '.join(w if rng.random() < .7 else rng.choices(words, weights)[0] for w in (base*2)[start:start + size])
        references[i], hypotheses[i] = [caption() for _ in range(5)], caption()
    return hypotheses, references


def run(quick: bool = False) -> list[Result]:
    "The whole scoring, once with each"
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    from caption_nb.metrics import score
    images = 200 if quick else 1000
    hypotheses, references = captions(images)
    lists = {i: [h] for i, h in hypotheses.items()}

    def ours(): return score(hypotheses, references, tokenizer='whitespace').corpus

    def peer():
        bleu, _ = Bleu(4).compute_score(references, lists, verbose=0)
        return {**{f'Bleu_{n}': b for n, b in enumerate(bleu, 1)}, 'ROUGE_L': Rouge().compute_score(references, lists)[0],
                'CIDEr': Cider().compute_score(references, lists)[0]}
    mine, theirs = ours(), peer()
    worst = max(abs(mine[k] - theirs[k]) for k in theirs)
    assert worst < 1e-9, f'the scores differ by {worst}: {mine} against {theirs}'
    return [compare('BLEU + ROUGE-L + CIDEr-D', ours, peer, images, 'images/s', rounds=3 if quick else 10,
                    sizes=dict(images=images, references=5, largest_difference=worst))]
