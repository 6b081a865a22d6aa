"""BLEU-1..4, ROUGE-L and CIDEr-D of images with five references: ours against pycocoevalcap, in one process.

'scores': both get the same tokenised strings and split them themselves. 'raw to scores': both get captions as people write them; the peer
takes its Stanford tokeniser through Java, once for the references and once for the hypotheses, as coco-caption does (left out, with the
reason, where there is no Java). Before anything is timed, the scores have to be equal.

'40,000 images' (COCO val) against 5,000: images per CPU-second, each from raw captions in a process of its own, where a ratio of 1 means
that time grows as the images do; and the peak of that process, everything in it, against 500 MB."""
from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.common import Result, compare


def words(count: int, rng: random.Random) -> list[str]:
    "The ten most frequent words of captions, then made-up ones of two and three syllables"
    syllables = [c + v for c in 'bdfgklmnprst' for v in 'aeiou']
    found = dict.fromkeys('a in the on of and with is to at'.split())
    while len(found) < count: found[''.join(rng.choices(syllables, k=2 + (rng.random() < len(found)/count)))] = None
    return list(found)


def captions(images: int, seed: int = 0) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Hypotheses and references: 10.5 words on average, few of them frequent, those of an image share runs of words. References have
    capitals, nine in ten a full stop, and commas, hyphens, quotes, numbers, apostrophes as often as those of Flickr8k"""
    rng = random.Random(seed)
    vocabulary = words(min(4000 + images//2, 20000), rng)
    weights = [1/(i + 5) for i in range(len(vocabulary))]
    stock, hypotheses, references = rng.choices(vocabulary, weights, k=1 << 16), {}, {}

    def caption(base: list[str], raw: bool) -> str:
        start, size = rng.randrange(12), max(3, round(rng.gauss(10.5, 3)))
        text = [w if rng.random() < .7 else stock[rng.randrange(len(stock))] for w in (base*2)[start:start + size]]
        if text[-1] == 'a': text[-1] = 'dog'    # after 'a.' the original looks into the next caption; ours does not
        if not raw: return ' '.join(text)
        if rng.random() < .06: text[size//2] += rng.choice((',', ' ,'))
        if rng.random() < .04: text[size//3] += rng.choice(('-' + text[0], '-' + text[0], "'s", ' 3', ' "' + text[0] + '"', " isn't"))
        return ' '.join(text).capitalize() + rng.choice((' .', '.'))*(rng.random() < .9)

    for i in range(images):
        at = rng.randrange(len(stock) - 30)
        base = stock[at:at + 30]
        hypotheses[f'{i:012}.jpg'], references[f'{i:012}.jpg'] = caption(base, False), [caption(base, True) for _ in range(5)]
    return hypotheses, references


def scorers(hypotheses: dict[str, list[str]], references: dict[str, list[str]]) -> dict[str, float]:
    "pycocoevalcap's three"
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    bleu, _ = Bleu(4).compute_score(references, hypotheses, verbose=0)
    return {**{f'Bleu_{n}': b for n, b in enumerate(bleu, 1)}, 'ROUGE_L': Rouge().compute_score(references, hypotheses)[0],
            'CIDEr': Cider().compute_score(references, hypotheses)[0]}


def peer(hypotheses: dict[str, str], references: dict[str, list[str]]) -> dict[str, float]:
    "From raw strings, as coco-caption goes"
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    tokenizer = PTBTokenizer()
    refs = tokenizer.tokenize({i: [{'caption': r} for r in rs] for i, rs in references.items()})
    return scorers(tokenizer.tokenize({i: [{'caption': h}] for i, h in hypotheses.items()}), refs)


def versus(images: int, rounds: int) -> list[Result]:
    "The two comparisons with the original at one size"
    from caption_nb.metrics import score
    from caption_nb.text import tokenize
    hypotheses, references = captions(images)
    def words(caption): return ' '.join(tokenize(caption))
    ready = {i: words(h) for i, h in hypotheses.items()}, {i: [*map(words, rs)] for i, rs in references.items()}
    lists = {i: [h] for i, h in ready[0].items()}
    pairs = [('scores', lambda: score(*ready, tokenizer='whitespace').corpus, lambda: scorers(lists, ready[1]))]
    raw = 'raw to scores', lambda: score(hypotheses, references).corpus, lambda: peer(hypotheses, references)
    if shutil.which('java'): pairs.append(raw)
    else: print(f'raw to scores, {images:,} images: left out, there is no java on PATH for the original tokeniser')
    results = []
    for name, ours, theirs in pairs:
        a, b = ours(), theirs()
        worst = max(abs(a[k] - b[k]) for k in b)
        if worst > 1e-9: raise AssertionError(f'{name}: the scores differ by {worst}: {a} against {b}')
        results.append(compare(f'{name}, {images:,} images × 5', ours, theirs, images, 'images/s', rounds=rounds,
                               sizes=dict(images=images, references=5, largest_difference=worst)))
    return results


def child(images: int, rounds: int):
    "Score raw captions, print images per CPU-second and the peak of the process in MB"
    from bench.memory_beam import peak
    from caption_nb.metrics import score
    given, seconds = captions(images), []
    for _ in range(rounds):
        start = time.process_time(); score(*given)
        seconds.append(time.process_time() - start)
    print(json.dumps([images/statistics.median(seconds), peak()]))


def alone(images: int, rounds: int) -> tuple[float, float]:
    "What `child` finds in a fresh process"
    code = f'from bench.metrics import child; child({images}, {rounds})'
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=root)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def growth(few: int, many: int, rounds: int) -> list[Result]:
    "Speed of many images against few, and the memory of many"
    found = [(alone(many, 1), alone(few, 3)) for _ in range(rounds)]
    ratios = [m[0]/f[0] for m, f in found]
    fast = [statistics.median(pair[i][0] for pair in found) for i in (0, 1)]
    most = max(m[1] for m, _ in found)
    sizes = dict(images=many, references=5)
    return [Result(f'raw to scores, {many:,} against {few:,} images', *fast, statistics.median(ratios), 'images/CPU-s',
                   [min(ratios), max(ratios)], sizes),
            Result(f'peak of a process, {many:,} images × 5', most, 500, 500/most, 'MB, less is better', [500/most]*2, sizes)]


def run(quick: bool = False) -> list[Result]:
    "Against the original at two sizes, then growth"
    rounds, sizes, far = (3, (200,), (200, 1000)) if quick else (7, (1000, 5000), (5000, 40000))
    return [r for images in sizes for r in versus(images, rounds)] + growth(*far, 1 if quick else 3)
