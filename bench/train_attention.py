"""Training the attention LSTM: captions per second of a whole step (forward, backward, clipping, Adam).

The peer is a plain loop in PyTorch, as most public code has it: one caption a row with its own copy of the features, keys projected
and output layer applied at every word, batch of 32, `nn.Dropout`, fp32. It has the same weights, and before anything is timed its
loss must be the same."""
from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from bench.common import Result, compare
from caption_nb.attention import AttentionDecoder


class PlainAttentionLSTM(nn.Module):
    "Show, attend and tell as it is usually written: everything inside the loop over words"
    def __init__(self, vocab: int, D: int, E: int, H: int, A: int):
        super().__init__()
        self.embedding, self.start_h, self.start_c = nn.Embedding(vocab, E), nn.Linear(D, H), nn.Linear(D, H)
        self.key, self.query, self.energy = nn.Linear(D, A), nn.Linear(H, A), nn.Linear(A, 1)
        self.gate, self.cell, self.dropout, self.output = nn.Linear(H, D), nn.LSTMCell(E + D, H), nn.Dropout(0.5), nn.Linear(H, vocab)

    def load(self, ours: AttentionDecoder):
        "Take over the weights of `ours`; its gates are in the order i, f, o, g and torch's in i, f, g, o"
        A, G, _ = ours.split
        H = self.cell.hidden_size
        def order(x):
            i, f, o, g = x.split(H)
            return torch.cat([i, f, g, o])
        with torch.no_grad():
            for p in self.parameters(): p.zero_()
            for mine, theirs in ((self.embedding.weight, ours.embedding.vectors.weight), (self.key.weight, ours.key.weight),
                                 (self.query.weight, ours.recur.weight[:A]), (self.query.bias, ours.recur.bias[:A]),
                                 (self.gate.weight, ours.recur.weight[A:A+G]), (self.gate.bias, ours.recur.bias[A:A+G]),
                                 (self.cell.weight_hh, order(ours.recur.weight[A+G:])), (self.cell.bias_hh, order(ours.recur.bias[A+G:])),
                                 (self.cell.weight_ih, torch.cat([order(ours.word.weight), order(ours.context.weight)], 1)),
                                 (self.energy.weight, ours.energy.weight), (self.output.weight, ours.output.weight),
                                 (self.output.bias, ours.output.bias), (self.start_h.weight, ours.start.weight[:H]),
                                 (self.start_h.bias, ours.start.bias[:H]), (self.start_c.weight, ours.start.weight[H:]),
                                 (self.start_c.bias, ours.start.bias[H:])): mine.copy_(theirs)
        return self

    def attend(self, grid, h):
        "Attention over the cells, with the keys projected anew"
        alpha = self.energy(torch.tanh(self.key(grid) + self.query(h)[:, None])).squeeze(2).softmax(1)
        return (grid*alpha[..., None]).sum(1), alpha

    def forward(self, grid, tokens, lengths):
        "Logits and attention; rows sorted by `lengths`, the longest first"
        mean = grid.mean(1)
        h, c, words = self.start_h(mean), self.start_c(mean), self.embedding(tokens)
        logits = grid.new_zeros(*tokens.shape, self.output.out_features)
        alphas = grid.new_zeros(*tokens.shape, grid.shape[1])
        for t in range(max(lengths)):
            n = sum(length > t for length in lengths)
            view, alpha = self.attend(grid[:n], h[:n])
            view = torch.sigmoid(self.gate(h[:n]))*view
            h, c = self.cell(torch.cat([words[:n, t], view], 1), (h[:n], c[:n]))
            logits[:n, t], alphas[:n, t] = self.output(self.dropout(h)), alpha
        return logits, alphas


def random_captions(rows: int, vocab: int, longest: int = 20) -> torch.Tensor:
    "Captions with a mean of 10.5 words and Flickr8k's spread, as ids with start and end, padded (rows, longest + 2)"
    lengths = (torch.randn(rows)*3.2 + 10.5).round().long().clamp(4, longest)
    tokens = torch.randint(4, vocab, (rows, longest + 2))
    tokens[:, 0] = 1
    steps = torch.arange(longest + 2)
    tokens[steps > lengths[:, None] + 1] = 0
    tokens[steps == lengths[:, None] + 1] = 2
    return tokens[:, :int(lengths.max()) + 2]


def inputs_targets(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Input words and next words; where there is no next word, the input is pad too"
    return tokens[:, :-1].masked_fill(tokens[:, 1:] == 0, 0), tokens[:, 1:]


def our_loss(decoder, grid, tokens):
    "Cross-entropy of the next words, and the penalty that the decoder may want"
    inputs, targets = inputs_targets(tokens)
    real = targets != 0
    hidden, attention = decoder.hidden(decoder.encode(grid), inputs, decoder.needs_attention)
    return F.cross_entropy(decoder.project(hidden[real]).float(), targets[real]) + sum(decoder.loss_terms(attention, real).values())


def plain_loss(model, grid, tokens):
    "The same for the peer, from one copy of the features a row"
    lengths, order = (tokens != 0).sum(1).sub(1).sort(descending=True)
    inputs, targets = inputs_targets(tokens[order])
    real = targets != 0
    logits, alphas = model(grid[order], inputs, lengths.tolist())
    return F.cross_entropy(logits[real], targets[real]) + ((1 - alphas.sum(1))**2).mean()


def trainer(model, loss, grid, tokens, low, fused):
    "One training step, ready to be timed"
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=fused)
    def step():
        adam.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=low): value = loss(model, grid, tokens)
        value.backward()
        if fused: nn.utils.clip_grad_norm_(model.parameters(), 5.)
        else:
            for p in model.parameters(): p.grad.clamp_(-5, 5)
        adam.step()
        return value.item()
    return step


def run(quick: bool = False) -> list[Result]:
    "At 49 and 196 regions, fp32 against fp32 and as each is used"
    torch.manual_seed(0)
    vocab, D, dim, images, rounds = (500, 64, 32, 4, 2) if quick else (9500, 2048, 512, 10, 10)
    results = []
    for L, low, peer_low in ((49, False, False), (49, True, False), (49, True, True), (196, True, False)):
        ours = AttentionDecoder(vocab, D, embed_dim=dim, hidden_dim=dim, attention_dim=dim, norm=False)
        peer = PlainAttentionLSTM(vocab, D, dim, dim, dim).load(ours)
        grid, tokens = torch.randn(images, L, D).relu(), random_captions(images*5, vocab)
        rows = grid.repeat_interleave(5, 0)
        ours.eval(), peer.eval()
        with torch.no_grad(): torch.testing.assert_close(our_loss(ours, grid, tokens), plain_loss(peer, rows, tokens), rtol=1e-4, atol=1e-4)
        ours.train(), peer.train()
        n = min(32, len(rows))
        name = f'attention training, {L} regions, ' + {(0, 0): 'fp32', (1, 0): 'bf16 | fp32', (1, 1): 'bf16'}[low, peer_low]
        sizes = dict(images=images, captions=5, regions=L, D=D, dim=dim, vocab=vocab, peer_batch=n)
        results.append(compare(name, trainer(ours, our_loss, grid, tokens, low, True),
                               trainer(peer, plain_loss, rows[:n].clone(), tokens[:n], peer_low, False), len(tokens), 'captions/s',
                               rounds=rounds, peer_count=n, sizes=sizes))
    return results
