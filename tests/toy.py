"""A tiny decoder with strong opinions in double precision, and what it says of a prefix, for the tests of decoding."""
from functools import lru_cache

import torch
from torch import nn

from caption_nb.decoder import Decoder, rows_per_image

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
