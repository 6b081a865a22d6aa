"""Self-critical training of the attention LSTM: samples per second of a whole step (drawing, judging, forward, backward, clipping, Adam).

The first row of a pair compares a step with the same step whose rewards cost nothing: 1 - ratio is the reward's share of a step.
The second compares judging in a thread beside the forward pass with judging after it; with one core there is nothing to gain.
'milliseconds' in the JSON tells the parts of a step (judging: processor time of its thread). Words are drawn by Zipf's law, from the
references as from the decoder, and every timed step draws the same samples."""
from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from torch import nn

from bench.common import Result, compare
from caption_nb.attention import AttentionDecoder
from caption_nb.scst import SelfCritical
from caption_nb.text import Vocab


def zipf(words: int) -> np.ndarray:
    "Probabilities of so many words, most frequent first"
    p = 1/np.arange(2, words + 2)
    return p/p.sum()


def make_references(images: int, vocab: Vocab, seed: int = 0) -> dict[str, list[list[str]]]:
    "Five captions an image with the lengths of Flickr8k, as words"
    rng, words = np.random.default_rng(seed), vocab.words[4:]
    def caption(): return [words[i] for i in rng.choice(len(words), max(4, round(rng.normal(10.5, 3.2))), p=zipf(len(words)))]
    return {str(i): [caption() for _ in range(5)] for i in range(images)}


def make_decoder(vocab: Vocab, D: int, dim: int) -> AttentionDecoder:
    "It says words by Zipf's law, and `<end>` once in eleven words"
    torch.manual_seed(0)
    decoder = AttentionDecoder(len(vocab), D, embed_dim=dim, hidden_dim=dim, attention_dim=dim)
    with torch.no_grad():
        decoder.output.weight.mul_(.1)
        decoder.output.bias[4:] = torch.from_numpy(np.log(zipf(len(vocab) - 4)*10/11)).float()
        decoder.output.bias[2] = np.log(1/11)
    return decoder.train()


class Step:
    "One step, ready to be timed; `parts` collects the milliseconds of its parts"
    def __init__(self, decoder: AttentionDecoder, scst: SelfCritical, grid: torch.Tensor, low: bool):
        self.decoder, self.scst, self.grid, self.low, self.parts = decoder, scst, grid, low, []
        self.ids, self.adam = [str(i) for i in range(len(grid))], torch.optim.AdamW(decoder.parameters(), lr=0., weight_decay=0., fused=True)

    def __call__(self):
        start = time.perf_counter()
        self.adam.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=self.low):
            loss, stats = self.scst.loss(self.decoder, self.grid, self.ids, torch.Generator().manual_seed(0))
        loss.backward()
        nn.utils.clip_grad_norm_(self.decoder.parameters(), 5.)
        self.adam.step()
        total = time.perf_counter() - start
        drawing, judging = stats['sampling_seconds'], stats['reward_seconds']
        self.parts.append(dict(step=total, drawing=drawing, judging=judging, update=total - drawing - judging))

    def milliseconds(self) -> dict[str, float]:
        "Medians, without the first step"
        return {name: round(1000*statistics.median(p[name] for p in self.parts[1:]), 2) for name in self.parts[0]}


def free(scst: SelfCritical) -> SelfCritical:
    "The same with rewards that cost nothing"
    def judge(ids, tokens, greedy=None):
        advantage = np.linspace(-1, 1, len(tokens)).reshape(len(ids), -1)
        return advantage, advantage
    scst.judge = judge
    return scst


def run(quick: bool = False) -> list[Result]:
    "In fp32 and bf16, with the reward of the paper; in bf16 also with BLEU-4"
    words, D, dim, images, train, rounds = (300, 64, 32, 4, 50, 2) if quick else (2540, 1280, 512, 32, 6000, 10)
    vocab = Vocab([*Vocab.specials, *(f'w{i}' for i in range(words - 4))])
    references, grid = make_references(train, vocab), torch.randn(images, 49, D).relu()
    decoder, results = make_decoder(vocab, D, dim), []
    for low, bleu in ((False, 0.), (True, 0.), (True, 1.)):
        def step(threaded=False): return Step(decoder, SelfCritical(references, vocab, bleu=bleu, threaded=threaded), grid, low)
        name = f'SCST step, {"bf16" if low else "fp32"}{" + BLEU-4" if bleu else ""}: '
        plain, gratis, threaded, again = step(), step(), step(True), step()
        free(gratis.scst)
        sizes = dict(images=images, samples=5, regions=49, D=D, dim=dim, vocab=words, train_images=train)
        for what, ours, peer in (('whole | without reward', plain, gratis), ('thread | no thread', threaded, again)):
            results.append(compare(name + what, ours, peer, images*5, 'samples/s', rounds=rounds, sizes=sizes))
            results[-1].sizes['milliseconds'] = ours.milliseconds()
    return results
