"""Beam search and exhaustive search for one image, in plain Python: slow, and short enough to be believed.

`predict(prefix) -> list[float]` gives log p of every next word. A caption is a tuple of words; whether it may be is decided by looking
at all of it, and never by bookkeeping."""
from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf


@dataclass
class Slow:
    vocab: int
    width: int = 1
    max_len: int = 4
    length_norm: float = 1.
    n_best: int = 1
    penalty: str = 'power'
    banned: tuple = ()
    min_len: int = 0
    no_repeat: int = 0
    bad_endings: tuple = ()
    phrases: list = field(default_factory=list)     # of words
    groups: int = 1
    diversity: float = .5
    end: int = 2

    def score(self, logprob: float, length: int) -> float:
        return logprob/(((5 + length)/6)**self.length_norm if self.penalty == 'gnmt' else length**self.length_norm)

    # --- which captions may be
    def words(self) -> list[int]: return [w for w in range(self.vocab) if w not in (0, 1, self.end, *self.banned)]

    def possible(self, caption: tuple) -> bool:
        "Could `caption` go on? No words in a row come twice, and what must come still fits"
        runs = [caption[i:i + self.no_repeat] for i in range(len(caption) - self.no_repeat + 1)] if self.no_repeat else []
        return len(set(runs)) == len(runs) and missing(caption, tuple(self.phrases), self.bad_endings) <= self.max_len - len(caption)

    def may_end(self, caption: tuple) -> bool:
        "Could it be over after `caption`?"
        complete = all(contains(caption, p) for p in self.phrases)
        return complete and len(caption) >= self.min_len and not (caption and caption[-1] in self.bad_endings)

    def children(self, caption: tuple) -> list[int]:
        "The words that may follow `caption`"
        last = len(caption) + 1 == self.max_len
        after = [w for w in self.words() if self.possible((*caption, w)) and not (last and not self.may_be_cut((*caption, w)))]
        return after + [self.end]*(self.may_end(caption) and self.end not in self.banned)

    def may_be_cut(self, caption: tuple) -> bool: return caption[-1] not in self.bad_endings

    # --- the two searches
    def everything(self, predict) -> list[tuple]:
        "All captions that may be, best first, finished ones before the others: (words, score, logprob, finished)"
        found = []
        for n in range(self.max_len + 1):
            for caption in itertools.product(self.words(), repeat=n):
                if not all(self.possible(caption[:i]) for i in range(n + 1)): continue
                logprob = sum(predict(caption[:i])[w] for i, w in enumerate(caption))
                if n < self.max_len and self.may_end(caption) and self.end not in self.banned:
                    logprob += predict(caption)[self.end]
                    found.append((list(caption), self.score(logprob, n + 1), logprob, True))
                elif n == self.max_len and n >= self.min_len and self.may_be_cut(caption):
                    found.append((list(caption), self.score(logprob, n), logprob, False))
        return sorted(found, key=rank)

    def beam(self, predict) -> list[tuple]:
        "What the beam finds, in the same form"
        size, finished = self.width//self.groups, [[] for _ in range(self.groups)]
        living = [[((), 0., 0.)] for _ in range(self.groups)]               # prefix, logprob, what diversity has cost
        for length in range(1, self.max_len + 1):
            used = Counter()
            for g in range(self.groups):
                children = []
                for prefix, logprob, cost in living[g]:
                    for w in self.children(prefix):
                        children.append((prefix, w, logprob + predict(prefix)[w], cost + self.diversity*used[w]))
                living[g] = []
                for prefix, w, logprob, cost in self.survivors([c for c in children if c[2] > -inf], size):
                    if w == self.end: finished[g].append((list(prefix), self.score(logprob, length), logprob, True))
                    else: living[g].append(((*prefix, w), logprob, cost))
                used.update(c[0][-1] for c in living[g])
        cut = [[(list(p), self.score(l, self.max_len), l, False) for p, l, _ in group] for group in living]
        return self.take_turns([sorted(f + c, key=rank)[:self.n_best] for f, c in zip(finished, cut)])

    def survivors(self, children: list, size: int) -> list:
        "The best, but first from each bank of equally many forced words as many as its share"
        children = sorted(children, key=lambda c: -(c[2] - c[3]))
        banks, taken, early, late = sum(map(len, self.phrases)) + 1, Counter(), [], []
        for c in children:
            bank = sum(begun((*c[0], *([c[1]] if c[1] != self.end else [])), p) for p in self.phrases)
            (early if taken[bank] < max(1, size//banks) else late).append(c)
            taken[bank] += 1
        return (early + late)[:size]

    def take_turns(self, groups: list) -> list[tuple]:
        "The best of each group, the second best of each, …, without doubles"
        found = []
        for turn in itertools.zip_longest(*groups):
            for h in sorted((h for h in turn if h), key=rank):
                if not any(h[0] == f[0] and h[3] == f[3] for f in found): found.append(h)
        return sorted(found[:self.n_best], key=rank)


def rank(h): return not h[3], -h[1]


def contains(caption: tuple, phrase: tuple) -> bool:
    return any(caption[i:i + len(phrase)] == phrase for i in range(len(caption) - len(phrase) + 1))


def begun(caption: tuple, phrase: tuple) -> int:
    "How many words of `phrase` are there: all, or those that the caption ends with"
    if contains(caption, phrase): return len(phrase)
    return max(k for k in range(len(phrase) + 1) if caption[len(caption) - k:] == phrase[:k])


@lru_cache(None)
def missing(caption: tuple, phrases: tuple, bad_endings: tuple = ()) -> int:
    "The fewest words after which all phrases are there and the last word is no bad ending, by trying"
    words = [*sorted({w for p in phrases for w in p}), None]
    for n in itertools.count():
        for more in itertools.product(words, repeat=n):
            if all(contains(caption + more, p) for p in phrases) and not (n and more[-1] in bad_endings): return n
