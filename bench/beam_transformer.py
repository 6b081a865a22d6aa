"""Beam search of width 5 with the Transformer: captions per second, at forced lengths of 11 and 20 words.

The peer is Hugging Face's `generate` with GPT-2 and cross-attention, of the same size and with the same weights. In fp32 both must find
the same captions before anything is timed; in bf16 ours must find captions that are as probable."""
from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from bench.common import Result, compare
from bench.train_transformer import make_peer
from caption_nb.decoding import generate
from caption_nb.transformer import TransformerDecoder

PAD, START, END = 0, 1, 2


def peer_captions(model: nn.Module, grid: torch.Tensor, steps: int) -> list[list[int]]:
    "The best caption of exactly `steps` words for each image of `grid`"
    found = model.generate(torch.full((len(grid), 1), START), encoder_hidden_states=grid, attention_mask=torch.ones(len(grid), 1),
                           num_beams=5, do_sample=False, min_new_tokens=steps, max_new_tokens=steps, suppress_tokens=[PAD, START, END],
                           length_penalty=0.)
    return found[:, 1:].tolist()


@torch.no_grad()
def mean_logprob(decoder: TransformerDecoder, grid: torch.Tensor, captions: list[list[int]]) -> float:
    "Log-probability of `captions` in fp32, a caption"
    words = torch.tensor(captions)
    inputs = F.pad(words[:, :-1], (1, 0), value=START)
    logits, _ = decoder(decoder.encode(grid), inputs, attention=False)
    return logits.log_softmax(-1).gather(2, words[..., None]).sum((1, 2)).mean().item()


def run(quick: bool = False) -> list[Result]:
    "49 regions, 11 and 20 words: fp32, ours in bf16, and at 11 words both in bf16"
    torch.manual_seed(0)
    vocab, dim, ffn, layers, images, rounds = (500, 32, 64, 2, 4, 2) if quick else (9500, 512, 2048, 6, 64, 10)
    results = []
    ours = TransformerDecoder(vocab, dim, dim, dim, layers, 8, ffn, norm=False).eval()
    with torch.no_grad(): ours.final_norm.weight.mul_(3)      # far from uniform, as a trained model is
    peer = make_peer(ours, 21).eval()
    grid = torch.randn(images, 49, dim).relu()
    for steps in (11, 20):
        exact = None
        for low, peer_low in ((False, False), (True, False), (True, True))[:3 if steps == 11 else 2]:
            def mine():
                with torch.autocast('cpu', torch.bfloat16, enabled=low):
                    return [found[0].tokens for found in generate(ours, grid, 5, steps, length_norm=0., banned=[END])]
            def its():
                with torch.autocast('cpu', torch.bfloat16, enabled=peer_low): return peer_captions(peer, grid, steps)
            if not low and mine() != its(): raise AssertionError('the captions differ')
            score = mean_logprob(ours, grid, mine())
            exact = exact or score
            if score < exact - 0.02*abs(exact): raise AssertionError(f'captions of log-probability {score:.2f}, in fp32 {exact:.2f}')
            name = f'Transformer beam 5, {steps} words, ' + {(0, 0): 'fp32', (1, 0): 'bf16 | fp32', (1, 1): 'bf16'}[low, peer_low]
            sizes = dict(images=images, regions=49, dim=dim, ffn=ffn, layers=layers, vocab=vocab, words=steps, logprob=score)
            results.append(compare(name, mine, its, images, 'captions/s', rounds=rounds, sizes=sizes))
    return results
