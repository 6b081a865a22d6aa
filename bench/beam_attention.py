"""Beam search of width 5 with the attention LSTM: captions per second, at forced lengths of 11 and 20 words.

The peer is beam search as most public code has it: one image at a time, keys projected and features copied for each beam at every
step, prefixes kept in Python lists, fp32. It has the same weights; before anything is timed both must find the same captions."""
from __future__ import annotations

import torch

from bench.common import Result, compare
from bench.train_attention import PlainAttentionLSTM
from caption_nb.attention import AttentionDecoder
from caption_nb.decoding import generate

END = 2


@torch.no_grad()
def plain_beam(model: PlainAttentionLSTM, grid: torch.Tensor, width: int, steps: int) -> list[int]:
    "The best caption of exactly `steps` words for one image, grid (1, L, D)"
    grid = grid.expand(width, -1, -1).clone()
    mean = grid.mean(1)
    h, c = model.start_h(mean), model.start_c(mean)
    prefixes, scores = [[1]]*width, torch.zeros(width)
    for t in range(steps):
        word = model.embedding(torch.tensor([p[-1] for p in prefixes]))
        view, alpha = model.attend(grid, h)
        h, c = model.cell(torch.cat([word, torch.sigmoid(model.gate(h))*view], 1), (h, c))
        logprob = model.output(h).log_softmax(1)
        logprob[:, [0, 1, END]] = -torch.inf        # the length is forced
        total = scores[:, None] + logprob
        best, at = (total[0] if t == 0 else total.flatten()).topk(width)
        parents, words = at//logprob.shape[1], at % logprob.shape[1]
        prefixes = [prefixes[p.item()] + [w.item()] for p, w in zip(parents, words)]
        scores, h, c, grid = best, h[parents], c[parents], grid[parents]
    return prefixes[0][1:]


def run(quick: bool = False) -> list[Result]:
    "49 regions, 11 and 20 words, fp32 and bf16 against the peer's fp32"
    torch.manual_seed(0)
    vocab, D, dim, images, peers, rounds = (500, 64, 32, 4, 2, 2) if quick else (9500, 2048, 512, 64, 4, 10)
    results = []
    ours = AttentionDecoder(vocab, D, embed_dim=dim, hidden_dim=dim, attention_dim=dim, norm=False).eval()
    with torch.no_grad(): ours.output.weight.mul_(10)      # far from uniform, as a trained model is
    peer = PlainAttentionLSTM(vocab, D, dim, dim, dim).load(ours).eval()
    grid = torch.randn(images, 49, D).relu()
    for steps, low in ((11, False), (11, True), (20, True)):
        def caption():
            with torch.autocast('cpu', torch.bfloat16, enabled=low):
                return [found[0].tokens for found in generate(ours, grid, 5, steps, length_norm=0., banned=[END])]
        def one_by_one(): return [plain_beam(peer, g[None], 5, steps) for g in grid[:peers]]
        if not low and (a := caption()[:peers]) != (b := one_by_one()): raise AssertionError(f'the captions differ: {a} and {b}')
        sizes = dict(images=images, regions=49, D=D, dim=dim, vocab=vocab, words=steps)
        results.append(compare(f'beam 5, {steps} words, ' + ('bf16 | fp32' if low else 'fp32'), caption, one_by_one, images, 'captions/s',
                               rounds=rounds, peer_count=peers, sizes=sizes))
    return results
