"""Every decoder with its options: step = forward, no dead parameter, it can learn 32 captions by heart, it looks at the image, rows and pads
do not disturb each other. What is special to one decoder is tested beside it."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from caption_nb.attention import AttentionDecoder
from caption_nb.decoder import Decoder, check_decoder
from caption_nb.decoding import generate
from caption_nb.recurrent import RecurrentDecoder
from caption_nb.scheduled_sampling import mixed_inputs
from caption_nb.transformer import TransformerDecoder

V, L, D, PAD, START, END = 24, 4, 12, 0, 1, 2
CELLS = ('rnn', 'lstm', 'gru')
SMALL = dict(embed_dim=24, hidden_dim=32, dropout=0.)


def grid_of_options() -> dict[str, tuple[type[Decoder], dict]]:
    "Name → class and options"
    found = {}
    def add(make, **options): found[f'{make.__name__}({", ".join(f"{k}={v}" for k, v in options.items())})'] = make, options
    for cell in CELLS:
        for image, init in (('state', 'mean'), ('state', 'flat'), ('token', 'zeros'), ('every', 'zeros'), ('every', 'mean')):
            add(RecurrentDecoder, cell=cell, image=image, init=init)
        add(RecurrentDecoder, cell=cell, num_layers=2)
        add(RecurrentDecoder, cell=cell, impl='scratch')
        for attention in ('additive_tanh', 'additive_relu', 'dot', 'multihead'):
            add(AttentionDecoder, cell=cell, attention=attention)
            add(AttentionDecoder, cell=cell, attention=attention, gate=False, deep_output=True, init='zeros', doubly_stochastic=0.)
        add(AttentionDecoder, cell=cell, init='flat')
        add(AttentionDecoder, cell=cell, attention='multihead', impl='scratch')
    add(RecurrentDecoder, project_grid=16, norm=False)
    add(RecurrentDecoder, vector_dim=10, num_layers=3, image='token', init='zeros')
    add(AttentionDecoder, project_grid=16, norm=False)
    add(AttentionDecoder, vector_dim=10, gate=False)
    for pre_norm in (True, False):
        add(TransformerDecoder, pre_norm=pre_norm)
        add(TransformerDecoder, pre_norm=pre_norm, tied=False, positions='learned', activation='gelu')
        add(TransformerDecoder, pre_norm=pre_norm, encoder_layers=1, grid_shape=[2, 2])
        add(TransformerDecoder, pre_norm=pre_norm, impl='scratch')
    add(TransformerDecoder, project_grid=16, norm=False)
    add(TransformerDecoder, vector_dim=10)
    add(TransformerDecoder, doubly_stochastic=1., num_layers=1)
    return found


GRID = grid_of_options()
every = pytest.mark.parametrize('name', GRID)


def build(name: str, seed: int = 0, **more) -> Decoder:
    make, options = GRID[name]
    own = dict(attention_dim=16, heads=4) if make is AttentionDecoder else {}
    if make is TransformerDecoder: own = dict(num_layers=2, heads=4, ffn_dim=64)
    if options.get('init') == 'flat': own['grid_cells'] = L
    torch.manual_seed(seed)
    return make(V, D, **SMALL | own | options | more)


def examples(images: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    "Grids (images, L, D), and one random caption of 2 to 6 words for each: tokens with start, end and pads"
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(images, L, D, generator=generator)
    lengths = torch.randint(2, 7, (images,), generator=generator)
    tokens = torch.zeros(images, 9, dtype=torch.long)
    for row, n in zip(tokens, lengths.tolist()):
        row[0], row[1:n + 1], row[n + 1] = START, torch.randint(4, V, (n,), generator=generator), END
    return grid, tokens


def losses(decoder: Decoder, grid: torch.Tensor, tokens: torch.Tensor, inputs: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    "Cross-entropy of each word (N, T), zero at pads; and the sum of the decoder's own terms"
    inputs, targets = tokens[:, :-1] if inputs is None else inputs, tokens[:, 1:]
    hidden, attention = decoder.hidden(decoder.encode(grid), inputs, decoder.needs_attention)
    words = F.cross_entropy(decoder.project(hidden).transpose(1, 2), targets, reduction='none', ignore_index=PAD)
    return words, sum(decoder.loss_terms(attention, targets != PAD).values(), words.new_zeros(()))


def test_the_grid_is_wide():
    assert len(GRID) >= 40


@every
def test_protocol(name):
    decoder = build(name).double()
    check_decoder(decoder, torch.randn(3, L, D, dtype=torch.double))
    decoder = build(name)
    check_decoder(decoder, torch.randn(3, L, D))


@every
def test_every_parameter_learns(name):
    decoder = build(name).double()
    for p in decoder.parameters():      # what starts at zero would hide what lies behind it
        if p.abs().max() == 0: nn.init.uniform_(p, -.1, .1)
    grid, tokens = examples(4)
    words, terms = losses(decoder, grid.double(), tokens)
    (words.sum()/100 + terms).backward()
    dead = [n for n, p in decoder.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    assert not dead


@every
def test_rows_and_pads(name):
    "Another order of images gives the same losses in another order; more pads change neither losses nor gradients"
    decoder = build(name).double()
    grid, tokens = examples(5)
    grid, order = grid.double(), torch.tensor([3, 0, 4, 1, 2])
    words, terms = losses(decoder, grid, tokens)
    gradient = torch.autograd.grad(words.sum() + terms, list(decoder.parameters()), allow_unused=True)
    shuffled, same = losses(decoder, grid[order], tokens[order])
    torch.testing.assert_close(shuffled, words[order], rtol=0, atol=1e-9)
    torch.testing.assert_close(same, terms, rtol=0, atol=1e-9)
    longer, more = losses(decoder, grid, F.pad(tokens, (0, 4)))
    torch.testing.assert_close(longer[:, :words.shape[1]], words, rtol=0, atol=1e-9)
    assert longer[:, words.shape[1]:].abs().max() == 0
    torch.testing.assert_close(more, terms, rtol=0, atol=1e-9)
    for a, b in zip(gradient, torch.autograd.grad(longer.sum() + more, list(decoder.parameters()), allow_unused=True)):
        if a is not None: torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@every
def test_learns_captions_by_heart_from_the_image(name):
    "Below 0.1 nats a token on 32 captions; then each image gets its own caption, wherever it stands in the batch"
    decoder = build(name)
    grid, tokens = examples(32)
    optimizer, count = torch.optim.Adam(decoder.parameters(), 1e-2 if not isinstance(decoder, TransformerDecoder) else 3e-3), (tokens[:, 1:] != PAD).sum()
    for step in range(400):
        words, terms = losses(decoder, grid, tokens)
        loss = words.sum()/count
        if loss < 0.05: break
        (loss + 0.05*terms).backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.)
        optimizer.step(); optimizer.zero_grad()
    assert loss < 0.1, f'{loss:.3f} nats a token after {step + 1} steps'
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    found = generate(decoder, grid[order], 1, max_len=9)
    right = sum(h[0].tokens == [w for w in tokens[i].tolist() if w > END] for h, i in zip(found, order.tolist()))
    assert right >= 29, f'{right} of 32 images get their own caption'


@every
def test_free_running(name):
    "Fed with nothing but its own words, training sees what greedy search writes"
    decoder = build(name).eval()
    with torch.no_grad():      # sharper than at random, as trained ones are
        for p in decoder.parameters(): p.mul_(2)
    grid, tokens = examples(4)
    tokens = torch.cat([torch.full((4, 1), START), torch.randint(4, V, (4, 7))], 1)
    mixed = mixed_inputs(decoder, decoder.encode(grid), tokens, 1., sample=False)
    for row, (h, *_) in zip(mixed.tolist(), generate(decoder, grid, 1, max_len=8)):
        n = min(len(h.tokens), 7)
        assert row[1:n + 1] == h.tokens[:n]
