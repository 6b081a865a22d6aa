"""Training the recurrent decoders: captions per second of a whole step (forward, backward, clipping, Adam).

The peer is torch's own module in the usual way: a padded batch, one copy of an image's features for each of its captions, the output layer
at pads too, `nn.Dropout`, fp32. It has the same weights, and before anything is timed its loss must be the same."""
from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from bench.common import Result, compare
from bench.train_attention import inputs_targets, our_loss, random_captions, trainer
from caption_nb.recurrent import RecurrentDecoder


class PlainRecurrent(nn.Module):
    "A network of one layer that starts from the mean cell, with the weights of `ours`"
    def __init__(self, ours: RecurrentDecoder):
        super().__init__()
        c = ours.config
        E, H, V, self.cell = c['embed_dim'], c['hidden_dim'], c['vocab_size'], c['cell']
        self.embedding, self.start = nn.Embedding(V, E), nn.Linear(c['grid_dim'], H*(2 if self.cell == 'lstm' else 1))
        self.layer = dict(rnn=nn.RNN, lstm=nn.LSTM, gru=nn.GRU)[self.cell](E, H, batch_first=True)
        self.dropout, self.output = nn.Dropout(c['dropout']), nn.Linear(H, V)
        for mine, its in ((ours.embedding.vectors, self.embedding), (ours.start, self.start), (ours.layers[0], self.layer),
                          (ours.output, self.output)): its.load_state_dict(mine.state_dict())

    def forward(self, grid: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        "Logits (N, T, V) for one copy of the cells a caption (N, L, D) and tokens (N, T)"
        first = self.start(grid.mean(1))[None].chunk(2 if self.cell == 'lstm' else 1, 2)
        first = tuple(x.contiguous() for x in first)
        h, _ = self.layer(self.embedding(tokens), first if self.cell == 'lstm' else first[0])
        return self.output(self.dropout(h))


def plain_loss(model: PlainRecurrent, grid: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    "The same for the peer"
    inputs, targets = inputs_targets(tokens)
    logits = model(grid.repeat_interleave(len(tokens)//len(grid), 0), inputs)
    return F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=0)


def run(quick: bool = False) -> list[Result]:
    "LSTM in fp32 against fp32 and as each is used; GRU and RNN as each is used"
    vocab, D, dim, images, rounds = (500, 64, 32, 4, 2) if quick else (9500, 2048, 512, 10, 10)
    results = []
    for cell, low in (('lstm', False), ('lstm', True), ('gru', True), ('rnn', True)):
        torch.manual_seed(0)
        ours = RecurrentDecoder(vocab, D, cell, dim, dim, norm=False)
        peer = PlainRecurrent(ours)
        tokens, grid = random_captions(images*5, vocab), torch.randn(images, 49, D).relu()
        ours.eval(), peer.eval()
        with torch.no_grad(): torch.testing.assert_close(our_loss(ours, grid, tokens), plain_loss(peer, grid, tokens), rtol=1e-4, atol=1e-4)
        ours.train(), peer.train()
        sizes = dict(images=images, captions=5, regions=49, D=D, dim=dim, vocab=vocab)
        results.append(compare(f'{cell.upper()} training, ' + ('bf16 | fp32' if low else 'fp32'), trainer(ours, our_loss, grid, tokens, low, True),
                               trainer(peer, plain_loss, grid, tokens, False, True), len(tokens), 'captions/s', rounds=rounds, sizes=sizes))
    return results
