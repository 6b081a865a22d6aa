"""Training the Transformer: captions per second of a whole step (forward, backward, clipping, Adam).

The first peer is Hugging Face's GPT-2 with cross-attention, of the same size: one copy of an image's cells for each of its captions, as
its interface wants it, and the loss by its `labels`. The second is torch's own `nn.TransformerDecoder`, as most captioning code has it.
Both have the same weights, and before anything is timed their loss must be the same."""
from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from bench.common import Result, compare
from bench.train_attention import inputs_targets, our_loss, random_captions, trainer
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


class TorchCaptioner(nn.Module):
    "`nn.TransformerDecoder` with the weights of `ours`"
    def __init__(self, ours: TransformerDecoder, longest: int):
        super().__init__()
        c = ours.config
        self.embedding, self.bias = copy.deepcopy(ours.embedding.vectors), nn.Parameter(ours.bias.detach().clone())
        self.register_buffer('places', sinusoids(torch.arange(longest), c['hidden_dim']))
        layer = nn.TransformerDecoderLayer(c['hidden_dim'], c['heads'], c['ffn_dim'], c['dropout'], c['activation'], batch_first=True,
                                           norm_first=True)
        self.decoder, self.dropout = nn.TransformerDecoder(layer, c['num_layers'], nn.LayerNorm(c['hidden_dim'])), nn.Dropout(c['dropout'])
        for mine, its in zip(ours.layers, self.decoder.layers):
            own, cross = mine.self_attention, mine.cross_attention
            for attention, query, rest, out in ((its.self_attn, None, own.qkv, own.out), (its.multihead_attn, cross.query, cross.key_value, cross.out)):
                parts = [x for x in (query, rest) if x is not None]
                attention.in_proj_weight.data = torch.cat([x.weight for x in parts]).detach().clone()
                attention.in_proj_bias.data = torch.cat([x.bias for x in parts]).detach().clone()
                attention.out_proj.load_state_dict(out.state_dict())
            for its_part, part in ((its.linear1, mine.widen), (its.linear2, mine.narrow), (its.norm1, mine.self_norm),
                                   (its.norm2, mine.cross_norm), (its.norm3, mine.ffn_norm)): its_part.load_state_dict(part.state_dict())
        self.decoder.norm.load_state_dict(ours.final_norm.state_dict())

    def forward(self, tokens: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        "Logits (N, T, V) for tokens (N, T) and one copy of the cells a caption (N, L, H)"
        T, H = tokens.shape[1], cells.shape[2]
        words = self.dropout(self.embedding(tokens)*H**0.5 + self.places[:T])
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        h = self.decoder(words, cells, tgt_mask=later, tgt_is_causal=True, tgt_key_padding_mask=tokens == 0)
        return F.linear(h, self.embedding.weight, self.bias)


def torch_loss(model: TorchCaptioner, grid: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    "The same for torch's module"
    inputs, targets = inputs_targets(tokens)
    logits = model(inputs, grid.repeat_interleave(len(tokens)//len(grid), 0))
    return F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=0)


def peer_loss(model: nn.Module, grid: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    "The same for the peer"
    cells = grid.repeat_interleave(len(tokens)//len(grid), 0)
    return model(input_ids=tokens, encoder_hidden_states=cells, labels=tokens.masked_fill(tokens == 0, -100), use_cache=False).loss


def run(quick: bool = False) -> list[Result]:
    "Six layers at 49 regions: fp32 against fp32 with equal dropout, as each is used, and bf16 against bf16; then torch's module"
    vocab, dim, ffn, layers, images, rounds = (500, 32, 64, 2, 4, 2) if quick else (9500, 512, 2048, 6, 10, 10)
    results = []
    for low, peer_low, hf in ((False, False, True), (True, False, True), (True, True, True), (False, False, False), (True, False, False)):
        torch.manual_seed(0)
        ours = TransformerDecoder(vocab, dim, dim, dim, layers, 8, ffn, norm=False)
        tokens, grid = random_captions(images*5, vocab), torch.randn(images, 49, dim).relu()
        peer = make_peer(ours, tokens.shape[1], 0.1 if low != peer_low else 0.) if hf else TorchCaptioner(ours, tokens.shape[1])
        its_loss = peer_loss if hf else torch_loss
        ours.eval(), peer.eval()
        with torch.no_grad(): torch.testing.assert_close(our_loss(ours, grid, tokens), its_loss(peer, grid, tokens), rtol=1e-4, atol=1e-4)
        ours.train(), peer.train()
        name = 'Transformer training, ' + {(0, 0): 'fp32', (1, 0): 'bf16 | fp32', (1, 1): 'bf16'}[low, peer_low] + ('' if hf else ' (torch)')
        sizes = dict(images=images, captions=5, regions=49, dim=dim, ffn=ffn, layers=layers, vocab=vocab, tokens=int((tokens != 0).sum()))
        results.append(compare(name, trainer(ours, our_loss, grid, tokens, low, True), trainer(peer, its_loss, grid, tokens, peer_low, True),
                               len(tokens), 'captions/s', rounds=rounds, sizes=sizes))
    return results
