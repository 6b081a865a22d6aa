"""Training the Transformer: captions per second of a whole step (forward, backward, clipping, Adam).

The peer is Hugging Face's GPT-2 with cross-attention, of the same size: one copy of an image's cells for each of its captions, as its
interface wants it, and the loss by its `labels`. It has the same weights, and before anything is timed its loss must be the same."""
from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from bench.common import Result, compare
from bench.train_attention import inputs_targets, random_captions
from caption_nb.encoders import import_timm
from caption_nb.transformer import TransformerDecoder, sinusoids


def make_peer(ours: TransformerDecoder, longest: int, attn_pdrop: float = 0.1) -> nn.Module:
    "GPT-2 with the weights of `ours`, which is pre-norm, tied, and takes the cells as they are"
    import_timm()       # repairs a torchvision that does not fit torch: transformers imports it too
    try: from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as e: raise ImportError('the peer of this benchmark is missing: pip install transformers') from e
    c = ours.config
    H, drop = c['hidden_dim'], c['dropout']
    peer = GPT2LMHeadModel(GPT2Config(
        vocab_size=c['vocab_size'], n_positions=longest, n_embd=H, n_layer=c['num_layers'], n_head=c['heads'], n_inner=c['ffn_dim'],
        activation_function=c['activation'], resid_pdrop=drop, embd_pdrop=drop, attn_pdrop=attn_pdrop, add_cross_attention=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0))
    body, pairs = peer.transformer, []
    for mine, its in zip(ours.layers, body.h):
        own, cross = mine.self_attention, mine.cross_attention
        pairs += [(own.qkv, its.attn.c_attn), (own.out, its.attn.c_proj), (cross.query, its.crossattention.q_attn),
                  (cross.key_value, its.crossattention.c_attn), (cross.out, its.crossattention.c_proj), (mine.widen, its.mlp.c_fc),
                  (mine.narrow, its.mlp.c_proj), (mine.self_norm, its.ln_1), (mine.cross_norm, its.ln_cross_attn), (mine.ffn_norm, its.ln_2)]
    with torch.no_grad():
        for mine, its in pairs: its.weight.copy_(mine.weight.T if mine.weight.ndim == 2 else mine.weight), its.bias.copy_(mine.bias)
        body.wte.weight.copy_(ours.embedding.vectors.weight*H**0.5)      # words go in √H times as long as they come out
        body.wpe.weight.copy_(sinusoids(torch.arange(longest), H))
        body.ln_f.weight.copy_(ours.final_norm.weight*H**-0.5), body.ln_f.bias.copy_(ours.final_norm.bias*H**-0.5)
    return peer


def our_loss(decoder: TransformerDecoder, grid: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    "Cross-entropy of the next words"
    inputs, targets = inputs_targets(tokens)
    real = targets != 0
    hidden, _ = decoder.hidden(decoder.encode(grid), inputs, attention=False)
    return F.cross_entropy(decoder.project(hidden[real]).float(), targets[real])


def peer_loss(model: nn.Module, grid: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    "The same for the peer"
    cells = grid.repeat_interleave(len(tokens)//len(grid), 0)
    return model(input_ids=tokens, encoder_hidden_states=cells, labels=tokens.masked_fill(tokens == 0, -100), use_cache=False).loss


def trainer(model, loss, grid, tokens, low):
    "One training step, ready to be timed"
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    def step():
        adam.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=low): value = loss(model, grid, tokens)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        adam.step()
        return value.item()
    return step


def run(quick: bool = False) -> list[Result]:
    "Six layers at 49 regions: fp32 against fp32 with equal dropout, as each is used, and bf16 against bf16"
    vocab, dim, ffn, layers, images, rounds = (500, 32, 64, 2, 4, 2) if quick else (9500, 512, 2048, 6, 10, 10)
    results = []
    for low, peer_low in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        ours = TransformerDecoder(vocab, dim, dim, dim, layers, 8, ffn, norm=False)
        tokens, grid = random_captions(images*5, vocab), torch.randn(images, 49, dim).relu()
        peer = make_peer(ours, tokens.shape[1], 0.1 if low != peer_low else 0.)
        ours.eval(), peer.eval()
        with torch.no_grad(): torch.testing.assert_close(our_loss(ours, grid, tokens), peer_loss(peer, grid, tokens), rtol=1e-4, atol=1e-4)
        ours.train(), peer.train()
        name = 'Transformer training, ' + {(0, 0): 'fp32', (1, 0): 'bf16 | fp32', (1, 1): 'bf16'}[low, peer_low]
        sizes = dict(images=images, captions=5, regions=49, dim=dim, ffn=ffn, layers=layers, vocab=vocab, tokens=int((tokens != 0).sum()))
        results.append(compare(name, trainer(ours, our_loss, grid, tokens, low), trainer(peer, peer_loss, grid, tokens, peer_low),
                               len(tokens), 'captions/s', rounds=rounds, sizes=sizes))
    return results
