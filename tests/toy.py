"""A tiny decoder with strong opinions in double precision, a strange one, and comparisons, for the tests of decoding."""
from functools import lru_cache

import pytest
import torch
from torch import nn

from caption_nb.decoder import Decoder, rows_per_image
from caption_nb.decoding import Hypothesis

PAD, START, END = 0, 1, 2


class Toy(Decoder):
    "A plain recurrent decoder; counts what it is asked for"
    def __init__(self, vocab_size=6, grid_dim=3, seed=0, sharp=2.5, holes=()):
        super().__init__(vocab_size, grid_dim, seed=seed, sharp=sharp, holes=holes)
        g, H = torch.Generator().manual_seed(seed), 5
        def weight(*shape): return nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64))
        self.word, self.recur, self.image, self.out = weight(vocab_size, H), weight(H, H), weight(grid_dim, H), weight(H, vocab_size)
        self.calls, self.rows, self.sizes = 0, [], set()

    def encode(self, grid):
        self.calls += 1
        return dict(image=grid.mean(1) @ self.image.to(grid.dtype), grid=grid)

    def project(self, h):
        logits = h @ self.out.to(h.dtype)*self.config['sharp']
        for word in self.config['holes']: logits[..., word] = -torch.inf
        return logits

    def _next(self, token, h, image): return torch.tanh(self.word[token].to(image.dtype) + h @ self.recur.to(image.dtype) + image)

    def hidden(self, memory, tokens, attention=True):
        image = memory['image'].repeat_interleave(rows_per_image(memory, len(tokens)), 0)
        h, out = torch.zeros_like(image), []
        for t in range(tokens.shape[1]): out.append(h := self._next(tokens[:, t], h, image))
        look = torch.stack(out, 1)[..., :4].softmax(-1) if attention else None
        return torch.stack(out, 1), look

    def step(self, token, state, memory, attention=True):
        self.rows.append(len(token)); self.sizes.add(len(memory['grid']))
        image = memory['image'].repeat_interleave(rows_per_image(memory, len(token)), 0)
        h = self._next(token, torch.zeros_like(image) if state is None else state['h'], image)
        return self.project(h), h[:, :4].softmax(-1) if attention else None, dict(h=h)


class Strange(Toy):
    "Image 0: NaN at once; 1: all -inf at once; 2: always <end>; 3: never <end>; 4: NaN from the third word; 5: +inf; 6: as it is"
    def step(self, token, state, memory, attention=True):
        logits, look, new = super().step(token, state, memory, attention)
        kind = memory['grid'][:, 0, 0].repeat_interleave(len(token)//len(memory['grid']))
        age = torch.zeros(len(token), 1) if state is None else state['age'] + 1
        logits[kind == 0], logits[kind == 1] = torch.nan, -torch.inf
        logits[kind == 2, END], logits[kind == 3, END] = 1e9, -torch.inf
        logits[(kind == 4) & (age[:, 0] >= 2)], logits[kind == 5, 4] = torch.nan, torch.inf
        return logits, look, new | dict(age=age)


def toy(seed, vocab=6, images=2, **options):
    "A decoder and a grid"
    decoder = Toy(vocab, seed=seed, **options).eval()
    return decoder, torch.randn(images, 4, 3, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


def predictor(decoder, grid):
    "prefix → log p of the next words for one image (L, D), by teacher forcing"
    memory = decoder.encode(grid[None])
    @lru_cache(None)
    @torch.no_grad()
    def predict(prefix: tuple) -> list[float]:
        return decoder(memory, torch.tensor([[START, *prefix]]), False)[0][0, -1].log_softmax(-1).tolist()
    return predict


def compare(hypotheses: list[Hypothesis], truth: list[tuple]):
    "Equal to what a slow search found: (words, score, logprob, finished)"
    if not truth:
        h, = hypotheses
        assert (h.tokens, h.finished, h.score, h.logprob, h.logprobs) == ([], False, -torch.inf, -torch.inf, [])
        return
    assert [(h.tokens, h.finished) for h in hypotheses] == [(t[0], t[3]) for t in truth]
    for h, t in zip(hypotheses, truth): assert (h.score, h.logprob) == (pytest.approx(t[1], abs=1e-9), pytest.approx(t[2], abs=1e-9))
