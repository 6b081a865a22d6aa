"""Recurrent decoders: the protocol over all options, against torch's own modules, from scratch, and what is refused."""
import copy
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from caption_nb.decoder import check_decoder, take
from caption_nb.recurrent import CELLS, RecurrentDecoder, make_step

pytestmark = pytest.mark.usefixtures('one_thread')

WAYS = [('state', 'mean'), ('state', 'flat'), *itertools.product(('token', 'every'), ('mean', 'flat', 'zeros'))]
every_way = pytest.mark.parametrize('image, init', WAYS, ids=['-'.join(way) for way in WAYS])
every_cell = pytest.mark.parametrize('cell', CELLS)


def small(**options) -> RecurrentDecoder:
    "A decoder with sizes that are all different"
    return RecurrentDecoder(**{**dict(vocab_size=11, grid_dim=6, embed_dim=4, hidden_dim=7, grid_cells=5), **options})


def batch(images=3, captions=2, length=6, vocab=11, dtype=torch.float32):
    "Grids, tokens that start with <start> and have all lengths, and which of them are words"
    tokens = torch.randint(3, vocab, (images*captions, length))
    tokens[:, 0] = 1
    lengths = torch.randint(1, length + 1, (len(tokens), 1))
    lengths[0] = length                                                                 # there is always one that needs the recurrence
    tokens[torch.arange(length) >= lengths] = 0
    return torch.randn(images, 5, 6, dtype=dtype), tokens, tokens != 0


def loss_of(decoder, grid, tokens) -> torch.Tensor:
    "Nats per word"
    hidden, _ = decoder.hidden(decoder.encode(grid), tokens[:, :-1])
    targets = tokens[:, 1:]
    return F.cross_entropy(decoder.project(hidden[targets != 0]), targets[targets != 0])


# ---- the protocol -----------------------------------------------------------------------------------------------

@every_cell
@every_way
def test_protocol(cell, image, init):
    "Also that each parameter learns something, and that there is none that its options do not need"
    torch.manual_seed(0)
    for layers, impl, norm, project in itertools.product((1, 2), ('fused', 'scratch'), (True, False), (0, 3)):
        d = small(cell=cell, image=image, init=init, num_layers=layers, impl=impl, norm=norm, project_grid=project, vector_dim=0 if norm else 9)
        check_decoder(d, grid=torch.randn(3, 5, 6), tolerance=1e-5)
        grid, tokens, _ = batch()
        loss_of(d, grid, tokens).backward()
        idle = [name for name, p in d.named_parameters() if p.grad is None or not p.grad.any()]
        assert not idle, f'{d.config}: no gradient for {idle}'


@every_cell
@every_way
def test_captions_are_learned_and_the_image_decides(cell, image, init):
    "32 captions of 8 images, learned by heart; then other images say other things"
    torch.manual_seed(0)
    d = RecurrentDecoder(20, 6, cell, 16, 48, image=image, init=init, grid_cells=5, dropout=0.)
    grid, tokens = torch.randn(8, 5, 6), torch.randint(3, 20, (32, 7))
    tokens[:, 0], tokens[:, 1] = 1, 3 + torch.arange(32) % 4                            # the first word says which caption it is
    optimiser = torch.optim.Adam(d.parameters(), lr=0.015)
    for step in range(250):
        hidden, _ = d.hidden(d.encode(grid), tokens[:, :-1])
        losses = F.cross_entropy(d.project(hidden[:, 1:]).flatten(0, 1), tokens[:, 2:].flatten())
        if losses < 0.05: break
        optimiser.zero_grad(); losses.backward(); optimiser.step()
    assert losses < 0.1, f'{losses:.3f} nats per word after {step} steps'
    right, wrong = (d(d.encode(g), tokens[:, :-1])[0][:, 1:].argmax(2) == tokens[:, 2:] for g in (grid, grid.roll(1, 0)))
    assert right.float().mean() > 0.95 and wrong[:, 0].float().mean() < 0.5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), cell=st.sampled_from(list(CELLS)), way=st.sampled_from(WAYS), impl=st.sampled_from(['fused', 'scratch']),
       images=st.integers(1, 3), captions=st.integers(1, 3))
def test_rows_do_not_depend_on_the_batch(seed, cell, way, impl, images, captions):
    "Alone or with others, in this order or in that, with pads or without: the same"
    torch.manual_seed(seed)
    d = small(cell=cell, image=way[0], init=way[1], impl=impl, num_layers=2).double().eval()
    grid, tokens, words = batch(images, captions, dtype=torch.float64)
    logits, _ = d(d.encode(grid), tokens)
    order = torch.randperm(images)
    rows = (order[:, None]*captions + torch.arange(captions)).flatten()
    again, _ = d(d.encode(grid[order]), tokens[rows])
    torch.testing.assert_close(again[words[rows]], logits[rows][words[rows]], rtol=1e-10, atol=1e-12)
    for row, own in enumerate(words.sum(1).tolist()):
        alone, _ = d(d.encode(grid[row//captions][None]), tokens[row:row + 1, :own])
        torch.testing.assert_close(alone[0], logits[row, :own], rtol=1e-10, atol=1e-12)


# ---- two implementations, and torch ---------------------------------------------------------------------------------

@every_cell
@every_way
def test_scratch_is_fused(cell, image, init):
    "Loss and gradients at the same weights, to the precision of float64"
    torch.manual_seed(0)
    pair = [small(cell=cell, image=image, init=init, num_layers=2, project_grid=3, impl=impl).double() for impl in ('fused', 'scratch')]
    assert {n: p.shape for n, p in pair[0].named_parameters()} == {n: p.shape for n, p in pair[1].named_parameters()}
    pair[1].load_state_dict(pair[0].state_dict())
    grid, tokens, _ = batch(dtype=torch.float64)
    results = []
    for d in pair:
        torch.manual_seed(1)                                                            # the same dropout in both
        own = grid.clone().requires_grad_()
        loss = loss_of(d, own, tokens)
        results.append([loss, *torch.autograd.grad(loss, [own, *d.parameters()])])
    for name, fused, scratch in zip(['loss', 'grid', *dict(pair[0].named_parameters())], *results):
        torch.testing.assert_close(fused, scratch, rtol=1e-9, atol=1e-12, msg=lambda m: f'{name}: {m}')


@every_cell
def test_scratch_learns_like_fused(cell):
    "Ten steps of Adam, dropout included"
    curves = []
    for impl in ('fused', 'scratch'):
        torch.manual_seed(0)
        d, (grid, tokens, _) = small(cell=cell, image='token', num_layers=2, dropout=0.3, impl=impl), batch()
        optimiser, losses = torch.optim.Adam(d.parameters(), lr=0.01), []
        for _ in range(10):
            losses.append(loss_of(d, grid, tokens))
            optimiser.zero_grad(); losses[-1].backward(); optimiser.step()
        curves.append(torch.stack(losses).detach())
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(*curves, rtol=0, atol=1e-4)


@every_cell
@pytest.mark.parametrize('image', ['state', 'token', 'every'])
def test_torch_by_hand(cell, image):
    "A padded, batch-first module of two layers, fed by hand with features that are copied for each caption, has the same logits"
    torch.manual_seed(0)
    d, H = small(cell=cell, image=image, num_layers=2).double().eval(), 7
    grid, tokens, words = batch(dtype=torch.float64)
    kind = dict(rnn=nn.RNN, lstm=nn.LSTM, gru=nn.GRU)[cell]
    model = kind(8 if image == 'every' else 4, H, num_layers=2, batch_first=True).double()
    model.load_state_dict({f'{name[:-1]}{i}': p for i, layer in enumerate(d.layers) for name, p in layer.named_parameters()})
    seen = F.layer_norm(grid.repeat_interleave(2, 0), (6,), d.norm.weight, d.norm.bias).mean(1)     # (N, D)
    first = F.linear(seen, d.start.weight, d.start.bias).view(len(tokens), -1, 2, H).permute(1, 2, 0, 3).contiguous()
    x = d.embedding.vectors.weight[tokens]
    if image != 'state': shown = F.linear(seen, d.image.weight, d.image.bias)[:, None]              # (N, 1, E)
    if image == 'token': x = torch.cat([shown, x], 1)
    if image == 'every': x = torch.cat([x, shown.expand_as(x)], 2)
    h, _ = model(x, (first[0], first[1]) if cell == 'lstm' else first[0])
    expected = F.linear(h[:, 1:] if image == 'token' else h, d.output.weight, d.output.bias)
    torch.testing.assert_close(d(d.encode(grid), tokens)[0][words], expected[words], rtol=1e-10, atol=1e-12)


@every_cell
@pytest.mark.parametrize('impl', ['fused', 'scratch'])
def test_one_step(cell, impl):
    torch.manual_seed(0)
    whole, *_ = CELLS[cell]
    layer, x, state = whole(3, 4), torch.randn(5, 3), tuple(torch.randn(5, 4) for _ in range(2 if cell == 'lstm' else 1))
    new = make_step(cell, layer, impl)(x, state)
    out, _ = layer(x[None], tuple(s[None] for s in state) if cell == 'lstm' else state[0][None])
    assert len(new) == len(state)
    torch.testing.assert_close(new[0], out[0])


# ---- precision --------------------------------------------------------------------------------------------------

@every_cell
@pytest.mark.parametrize('impl', ['fused', 'scratch'])
def test_bf16_autocast(cell, impl):
    "Close to float32; the state keeps its type, so that beam search can mix old and new rows"
    torch.manual_seed(0)
    d = RecurrentDecoder(50, 32, cell, 32, 32, 2, 'every', impl=impl).eval()
    grid, tokens = torch.randn(3, 9, 32), torch.randint(1, 50, (6, 7))
    full, _ = d(d.encode(grid), tokens)
    with torch.autocast('cpu', torch.bfloat16):
        memory, state = d.encode(grid), None
        low, _ = d(memory, tokens)
        for t in range(7):
            logits, _, state = d.step(tokens[:, t], state, memory)
            assert logits.dtype == torch.bfloat16 and all(s.dtype == torch.float32 for s in state.values())
            torch.testing.assert_close(logits.float(), low[:, t].float(), rtol=0.1, atol=0.03)
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.03)
    low.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in d.parameters())


@every_cell
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_precisions(cell, dtype):
    "The model's precision decides, whatever the features have"
    d = small(cell=cell, image='every', init='zeros', num_layers=2).to(dtype).eval()
    memory = d.encode(torch.randn(2, 5, 6).half())
    logits, _, state = d.step(torch.tensor([1, 1, 1, 1]), None, memory)
    assert {x.dtype for x in (logits, *memory.values(), *state.values())} == {dtype}
    assert d(memory, torch.ones(4, 2, dtype=torch.long))[0].dtype == dtype


# ---- single properties ----------------------------------------------------------------------------------------------

def test_an_image_is_seen_once_and_not_copied():
    for image in ('state', 'token', 'every'):
        memory = small(image=image).encode(torch.randn(3, 5, 6))
        assert set(memory) == {'h', 'c', *(['image'] if image == 'every' else [])}
        assert {len(x) for x in memory.values()} == {3}


def test_survivors_of_a_beam_go_on():
    torch.manual_seed(0)
    d = small(num_layers=2).double().eval()
    memory, rows = d.encode(torch.randn(2, 5, 6).double()), torch.tensor([1, 1, 2, 3])
    _, _, state = d.step(torch.tensor([1, 1, 1, 1]), None, memory)
    _, _, state = d.step(torch.tensor([3, 4, 5, 6]), state, memory)
    logits, _, _ = d.step(torch.tensor([7, 8, 9, 10]), take(state, rows), memory)
    expected, _ = d(memory, torch.tensor([[1, 4, 7], [1, 4, 8], [1, 5, 9], [1, 6, 10]]))
    torch.testing.assert_close(logits, expected[:, 2])


def test_step_can_be_differentiated():
    d = small(image='token')
    memory = d.encode(torch.randn(2, 5, 6))
    logits, _, state = d.step(torch.tensor([1, 1]), None, memory)
    d.step(logits.argmax(1), state, memory)[0].sum().backward()
    assert all(p.grad is not None for p in d.parameters())


def test_rows_without_words():
    d = small()
    hidden, attention = d.hidden(d.encode(torch.randn(2, 5, 6)), torch.zeros(4, 3, dtype=torch.long))
    assert hidden.shape == (4, 3, 7) and hidden.isfinite().all() and attention is None
    assert d.hidden(d.encode(torch.randn(2, 5, 6)), torch.zeros(4, 0, dtype=torch.long))[0].shape == (4, 0, 7)
    assert d.hidden(d.encode(torch.randn(0, 5, 6)), torch.zeros(0, 3, dtype=torch.long))[0].shape == (0, 3, 7)


def test_another_pad():
    "Zero is then a word like others"
    torch.manual_seed(0)
    d = small(pad_id=4).double().eval()
    check_decoder(d, grid=torch.randn(3, 5, 6), tolerance=1e-10)
    assert not d.embedding.vectors.weight[4].any() and d.embedding.vectors.weight[0].all()


def test_dropout_in_training_only():
    torch.manual_seed(0)
    d, (grid, tokens, words) = small(num_layers=2, dropout=0.5, image='token'), batch()
    run = lambda: d.hidden(d.encode(grid), tokens)[0][words]
    assert not torch.equal(run(), run())                                                # between the layers
    one = small(dropout=0.5)
    assert torch.equal(*(one.hidden(one.encode(grid), tokens)[0] for _ in range(2)))    # one layer: nothing between
    d.eval()
    assert torch.equal(run(), run())


def test_first_weights():
    d = small(cell='lstm', num_layers=2)
    for layer in d.layers: assert (layer.bias_ih_l0 + layer.bias_hh_l0)[7:14].tolist() == [1]*7    # torch's order: i, f, g, o
    assert not d.output.bias.any() and d.output.weight.abs().max() <= 0.1 and d.embedding.vectors.weight.abs().max() <= 0.1
    assert not d.embedding.vectors.weight[0].any()
    gru = small(cell='gru').layers[0]
    assert (gru.bias_ih_l0 + gru.bias_hh_l0)[7:14].tolist() == [1]*7                    # r, z, n


def test_keep_gates_keep():
    "With gates far open, the state after a word is the one before"
    for cell, index in (('lstm', 1), ('gru', 0)):
        d = small(cell=cell).eval()
        nn.init.constant_(d.layers[0].bias_ih_l0.chunk(4 if cell == 'lstm' else 3)[1], 50.)
        if cell == 'lstm': nn.init.constant_(d.layers[0].bias_ih_l0.chunk(4)[0], -50.)  # and nothing comes in
        memory = d.encode(torch.randn(2, 5, 6))
        _, _, state = d.step(torch.tensor([1, 1]), None, memory)
        torch.testing.assert_close(state['c' if index else 'h'], memory['c' if index else 'h'])


def test_copies_are_independent():
    "Scratch cells hold no parameters of their own that a copy could leave behind"
    d = copy.deepcopy(small(impl='scratch')).double()
    with torch.no_grad():
        for p in d.parameters(): p.zero_()
    logits, _, _ = d.step(torch.tensor([1, 2]), None, d.encode(torch.randn(2, 5, 6)))
    assert logits.dtype == torch.float64 and not logits.any()


def test_config_is_json_and_has_the_options():
    d = small(cell='gru', image='every', init='flat', impl='scratch', vector_dim=3)
    assert json.loads(json.dumps(d.config)) == d.config
    assert d.config['cell'] == 'gru' and not d.needs_attention and d.loss_terms(None, torch.ones(2, 3, dtype=torch.bool)) == {}


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options, message', [
    (dict(cell='lstn'), "unknown cell 'lstn': did you mean 'lstm'"), (dict(image='tokens'), "unknown image 'tokens': did you mean 'token'"),
    (dict(init='means'), "unknown init 'means': did you mean 'mean'"), (dict(impl='fast'), "unknown impl 'fast': valid: fused, scratch"),
    (dict(num_layers=0), 'num_layers must be at least 1, got 0'), (dict(hidden_dim=0), 'hidden_dim must be at least 1, got 0'),
    (dict(embed_dim=-1), 'embed_dim must be at least 1, got -1'), (dict(vocab_size=0), 'vocab_size must be at least 1'),
    (dict(project_grid=-2), 'project_grid must not be negative, got -2'), (dict(vector_dim=-2), 'vector_dim must not be negative'),
    (dict(grid_cells=-5), 'grid_cells must not be negative'), (dict(init='flat', grid_cells=0), "init='flat' has to know .* give grid_cells"),
    (dict(init='zeros'), "image='state' with init='zeros' never sees the image"), (dict(dropout=1.), r'dropout must be in \[0, 1\), got 1.0'),
    (dict(dropout=math.nan), 'dropout must be in'), (dict(pad_id=11), 'pad_id 11 is not in the vocabulary of 11')])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message): small(**options)


def test_a_flat_grid_of_another_size():
    with pytest.raises(ValueError, match="a grid of 9 cells, but init='flat' was built for grid_cells=5"):
        small(init='flat').encode(torch.randn(2, 9, 6))
    small(init='mean').encode(torch.randn(2, 9, 6))                                     # the mean does not mind


def test_rows_that_do_not_fit_the_images():
    d = small()
    with pytest.raises(ValueError, match='5 rows cannot share the memories of 2 images'):
        d.hidden(d.encode(torch.randn(2, 5, 6)), torch.ones(5, 2, dtype=torch.long))
