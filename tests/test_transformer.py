"""The Transformer: the protocol over its options, torch's own layers, the plain layers, memory, attention on request, what is refused."""
import itertools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from caption_nb.decoder import check_decoder
from caption_nb.transformer import Places, TransformerDecoder, attend_heads, grid_sides, sinusoids

pytestmark = pytest.mark.usefixtures('one_thread')

COMBINATIONS = [dict(zip(('pre_norm', 'tied', 'positions', 'encoder_layers', 'impl'), values)) for values in itertools.product(
    (True, False), (True, False), ('sinusoidal', 'learned'), (0, 2), ('fused', 'scratch'))]
MORE = [dict(vector_dim=7), dict(vector_dim=7, tied=False), dict(vector_dim=12), dict(norm=False), dict(project_grid=5), dict(project_grid=12),
        dict(activation='gelu', pre_norm=False), dict(heads=1), dict(heads=12), dict(num_layers=1), dict(embed_dim=12)]


def small(**options) -> TransformerDecoder:
    "A decoder with sizes that are all different"
    sizes = dict(vocab_size=11, grid_dim=6, hidden_dim=12, embed_dim=10, num_layers=2, heads=3, ffn_dim=16, grid_shape=(2, 3))
    return TransformerDecoder(**{**sizes, **options})


def run(d: TransformerDecoder, grid, tokens, seed: int = 0):
    "Loss and gradients in training mode without dropout"
    d.zero_grad()
    h, _ = d.hidden(d.encode(grid), tokens, attention=False)
    real = tokens != d.config['pad_id']
    loss = F.cross_entropy(d.project(h[real]), tokens[real])
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in d.named_parameters()}


def ragged(rows: int = 4, length: int = 6, vocab: int = 11) -> torch.Tensor:
    "Captions of all lengths, one of no words"
    tokens = torch.randint(1, vocab, (rows, length))
    return tokens.masked_fill(torch.arange(length) >= torch.tensor([length, 0, 3, 1])[:rows, None], 0)


@pytest.mark.parametrize('options', COMBINATIONS + MORE, ids=lambda o: ' '.join(map(str, o.values())))
def test_protocol_and_no_dead_parameters(options):
    torch.manual_seed(0)
    d = small(**options)
    check_decoder(d, length=6, tolerance=1e-5)
    _, gradients = run(d, torch.randn(2, 6, 6), ragged())
    dead = [name for name, g in gradients.items() if g is None or not g.any()]
    assert not dead


@pytest.mark.parametrize('options', [o for o in COMBINATIONS if o['impl'] == 'fused'] + MORE, ids=lambda o: ' '.join(map(str, o.values())))
def test_fused_is_scratch(options):
    torch.manual_seed(0)
    fused = small(**options, dropout=0.).double()
    scratch = TransformerDecoder(**fused.config | dict(impl='scratch')).double()
    scratch.load_state_dict(fused.state_dict())
    grid, tokens = torch.randn(2, 6, 6).double(), ragged()
    (loss, mine), (plain, its) = (run(d, grid, tokens) for d in (fused, scratch))
    torch.testing.assert_close(loss, plain, rtol=1e-10, atol=0)
    assert mine.keys() == its.keys()
    for name in mine: torch.testing.assert_close(mine[name], its[name], rtol=1e-8, atol=1e-12, msg=lambda m: f'{name}: {m}')
    real = tokens != 0
    with torch.no_grad(): a, b = (d.hidden(d.encode(grid), tokens)[1] for d in (fused, scratch))
    torch.testing.assert_close(a[real], b[real])


def torchs(d: TransformerDecoder) -> tuple[nn.TransformerDecoder, nn.TransformerEncoder]:
    "torch's own Transformer with the weights of `d`"
    c = d.config
    options = dict(d_model=c['hidden_dim'], nhead=c['heads'], dim_feedforward=c['ffn_dim'], dropout=0., activation=c['activation'],
                   batch_first=True, norm_first=c['pre_norm'])
    def norm(ours):
        return ours if isinstance(ours, nn.LayerNorm) else None
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), c['num_layers'], norm(d.final_norm))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**options), c['encoder_layers'], norm(d.encoder_norm), enable_nested_tensor=False)
    for mine, its in [*zip(d.layers, decoder.layers), *zip(d.encoder, encoder.layers)]:
        own, cross = mine.self_attention, mine.cross_attention
        pairs = [(its.self_attn, own.qkv.weight, own.qkv.bias, own.out)]
        if cross:
            stacked = (torch.cat([getattr(cross.query, n), getattr(cross.key_value, n)]) for n in ('weight', 'bias'))
            pairs.append((its.multihead_attn, *stacked, cross.out))
        for attention, weight, bias, out in pairs:
            attention.in_proj_weight.data, attention.in_proj_bias.data, attention.out_proj = weight.data, bias.data, out
        its.linear1, its.linear2 = mine.widen, mine.narrow
        norms = (mine.self_norm, mine.cross_norm, mine.ffn_norm) if cross else (mine.self_norm, mine.ffn_norm)
        for i, layer_norm in enumerate(norms): setattr(its, f'norm{i + 1}', layer_norm)
    return decoder, encoder


@pytest.mark.parametrize('pre_norm', [True, False])
@pytest.mark.parametrize('impl', ['fused', 'scratch'])
@pytest.mark.parametrize('activation', ['relu', 'gelu'])
def test_equals_torchs_transformer(pre_norm, impl, activation):
    torch.manual_seed(0)
    d = small(pre_norm=pre_norm, impl=impl, activation=activation, encoder_layers=2).eval()
    with torch.no_grad():
        for p in d.parameters(): p.add_(torch.randn_like(p)*0.1)                        # biases and norms that matter
    decoder, encoder = (m.eval() for m in torchs(d))
    grid, tokens = torch.randn(2, 6, 6), torch.randint(1, 11, (4, 5))
    from caption_nb.transformer import grid_sinusoids
    cells = encoder(d.cells(d.norm(grid)) + grid_sinusoids((2, 3), 12, grid)).repeat_interleave(2, 0)
    words = d.embedding(tokens)*12**0.5 + sinusoids(torch.arange(5), 12)
    want = decoder(words, cells, tgt_mask=nn.Transformer.generate_square_subsequent_mask(5), tgt_is_causal=True)
    torch.testing.assert_close(d.hidden(d.encode(grid), tokens)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('impl', ['fused', 'scratch'])
def test_looks(impl):
    "All weights sum to one, nobody sees the future, and the protocol's attention is the cross-attention, layer by layer"
    torch.manual_seed(0)
    d = small(impl=impl).eval()
    memory, tokens = d.encode(torch.randn(2, 6, 6)), torch.randint(1, 11, (4, 5))
    looks = d.looks(memory, tokens)
    assert looks['cross'].shape == (4, 5, 2, 3, 6) and looks['self'].shape == (4, 2, 3, 5, 5)
    for w in looks.values(): torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:-1]))
    assert not looks['self'].triu(1).any()
    assert torch.equal(looks['cross'].flatten(2, 3), d(memory, tokens)[1])


def test_the_causal_kernel_of_torch_gives_the_same():
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    torch.testing.assert_close(attend_heads(q, k, v, causal=True)[0], F.scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(attend_heads(q, k[:, :, :3], v[:, :, :3])[0], F.scaled_dot_product_attention(q, k[:, :, :3], v[:, :, :3]))


def test_without_packing_it_is_the_same(monkeypatch):
    "On a GPU words and pads go through the layers together"
    torch.manual_seed(0)
    d, grid, tokens = small(dropout=0.), torch.randn(2, 6, 6), ragged()
    packed = run(d, grid, tokens)
    monkeypatch.setattr(Places, 'of', classmethod(lambda cls, tokens, pad_id=0: cls(*tokens.shape)))
    together = run(d, grid, tokens)
    torch.testing.assert_close(packed, together)


def test_places():
    tokens = ragged(3)
    places = Places.of(tokens)
    assert torch.equal(places.unpack(places.pack(tokens)), tokens) and len(places.at) == (tokens != 0).sum()
    assert Places.of(torch.ones(2, 3)).at is None
    assert Places.of(torch.full((2, 3), 5), pad_id=5).pack(torch.ones(2, 3, 4)).shape == (0, 4)


def test_another_pad():
    torch.manual_seed(0)
    grid, tokens = torch.randn(2, 6, 6), ragged()
    d = small(dropout=0.).eval()
    other = small(dropout=0., pad_id=10).eval()
    other.load_state_dict(d.state_dict())
    tokens[tokens == 10] = 4
    a, b = d(d.encode(grid), tokens)[0], other(other.encode(grid), tokens.masked_fill(tokens == 0, 10))[0]
    torch.testing.assert_close(a[tokens != 0], b[tokens != 0])


def test_no_words_at_all():
    d = small()
    hidden, attention = d.hidden(d.encode(torch.randn(2, 6, 6)), torch.zeros(4, 3, dtype=torch.long))
    assert hidden.shape == (4, 3, 12) and not hidden.any() and attention.shape == (4, 3, 6, 6)
    hidden.sum().backward()
    hidden, attention = d.hidden(d.encode(torch.randn(0, 6, 6)), torch.zeros(0, 3, dtype=torch.long))
    assert hidden.shape == (0, 3, 12) and attention.shape == (0, 3, 6, 6)


def test_the_state_grows_by_a_word_and_holds_nothing_else():
    d = small().eval()
    memory, state = d.encode(torch.randn(2, 6, 6)), None
    assert sorted(memory) == ['keys0', 'keys1', 'values0', 'values1'] and memory['keys0'].shape == (2, 3, 6, 4)
    for t in range(3):
        _, _, new = d.step(torch.randint(1, 11, (4,)), state, memory, attention=False)
        assert {x.shape for x in new.values()} == {(4, 3, t + 1, 4)}
        if state: assert all(torch.equal(new[n][:, :, :t], x) for n, x in state.items())
        state = new


@pytest.mark.parametrize('impl', ['fused', 'scratch'])
def test_learned_places_end(impl):
    d = small(positions='learned', max_positions=4, impl=impl).eval()
    memory = d.encode(torch.randn(1, 6, 6))
    assert d(memory, torch.ones(2, 4, dtype=torch.long))[0].shape == (2, 4, 11)
    with pytest.raises(ValueError, match='a caption of 5 words, but places are learned for 4: raise max_positions'):
        d(memory, torch.ones(2, 5, dtype=torch.long))
    state = None
    for _ in range(4): _, _, state = d.step(torch.ones(2, dtype=torch.long), state, memory)
    with pytest.raises(ValueError, match='raise max_positions'): d.step(torch.ones(2, dtype=torch.long), state, memory)
    assert small(max_positions=4)(small().encode(torch.randn(1, 6, 6)), torch.ones(2, 9, dtype=torch.long))[0].shape == (2, 9, 11)


def test_learned_places_start_as_sinusoids():
    torch.manual_seed(0)
    waves = small().eval()
    torch.manual_seed(0)
    learned = small(positions='learned').eval()
    learned.load_state_dict(waves.state_dict(), strict=False)
    grid, tokens = torch.randn(1, 6, 6), torch.randint(1, 11, (2, 5))
    torch.testing.assert_close(waves(waves.encode(grid), tokens)[0], learned(learned.encode(grid), tokens)[0])


def test_random_weights_keep_the_variance():
    torch.manual_seed(0)
    for pre_norm, tied in itertools.product((True, False), repeat=2):
        d = TransformerDecoder(500, 64, 128, 128, 6, 8, 256, pre_norm=pre_norm, tied=tied).eval()
        logits, _ = d(d.encode(torch.randn(2, 49, 64)), torch.randint(1, 500, (4, 12)))
        assert 0.5 < logits.std().item() < 2
        assert d.embedding(torch.arange(1, 500)).std().item() == pytest.approx(128**-0.5, rel=0.05)


def test_where_a_cell_is_matters_with_encoder_layers_only():
    torch.manual_seed(0)
    grid, tokens, order = torch.randn(1, 6, 6), torch.randint(1, 11, (1, 5)), torch.tensor([3, 1, 5, 0, 2, 4])
    for layers, same in ((0, True), (1, False)):
        d = small(encoder_layers=layers).eval()
        a, b = (d(d.encode(g), tokens)[0] for g in (grid, grid[:, order]))
        assert torch.allclose(a, b, atol=1e-5) == same


def test_doubly_stochastic_is_per_head():
    d = small(doubly_stochastic=2.0)
    tokens = torch.randint(1, 11, (2, 4))
    mask = torch.tensor([[True]*4, [True, False, False, False]])
    _, attention = d.hidden(d.encode(torch.randn(1, 6, 6)), tokens)
    penalty = d.loss_terms(attention, mask)['doubly_stochastic']
    want = sum((1 - attention[n][mask[n]][:, head].sum(0)).square().mean() for n in range(2) for head in range(6))/12
    torch.testing.assert_close(penalty, 2*want)
    penalty.backward()
    assert d.layers[1].cross_attention.query.weight.grad.any() and d.needs_attention and not small().needs_attention


@pytest.mark.parametrize('impl', ['fused', 'scratch'])
def test_bf16_autocast_is_close_and_gives_float32_gradients(impl):
    torch.manual_seed(0)
    d = TransformerDecoder(50, 32, 32, 32, 2, 4, 64, encoder_layers=1, impl=impl).eval()
    grid, tokens = torch.randn(3, 9, 32), torch.randint(1, 50, (6, 7))
    full, look = d(d.encode(grid), tokens)
    with torch.autocast('cpu', torch.bfloat16):
        memory, state = d.encode(grid), None
        low, low_look = d(memory, tokens)
        for t in range(3): step, step_look, state = d.step(tokens[:, t], state, memory)
    assert low.dtype == torch.bfloat16 and low_look.dtype == step_look.dtype == torch.float32
    if impl == 'fused': assert {x.dtype for x in [*memory.values(), *state.values()]} == {torch.bfloat16}
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.1)
    torch.testing.assert_close(low_look, look, rtol=0.1, atol=0.02)
    torch.testing.assert_close(step.float(), full[:, 2], rtol=0.1, atol=0.1)
    low.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in d.parameters() if p.grad is not None)


def test_half_precision_features_are_taken():
    d = small(encoder_layers=1).eval()
    assert d(d.encode(torch.randn(2, 6, 6).half()), torch.ones(2, 2, dtype=torch.long))[0].dtype == torch.float32


def test_step_can_be_differentiated():
    "Free-running training feeds the decoder its own words"
    d = small()
    memory = d.encode(torch.randn(2, 6, 6))
    logits, _, state = d.step(torch.tensor([1, 1]), None, memory)
    logits, _, state = d.step(logits.argmax(1), state, memory)
    logits.sum().backward()
    assert d.layers[0].self_attention.qkv.weight.grad.any() and d.layers[0].cross_attention.key_value.weight.grad.any()


def test_dropout_is_in_training_only():
    torch.manual_seed(0)
    d, grid, tokens = small(dropout=0.5, encoder_layers=1), torch.randn(1, 6, 6), torch.randint(1, 11, (2, 4))
    a, b = (d(d.encode(grid), tokens)[0] for _ in range(2))
    d.eval()
    c, e = (d(d.encode(grid), tokens)[0] for _ in range(2))
    assert not torch.allclose(a, b) and torch.equal(c, e)


def test_tied_word_vectors_are_the_output_layer():
    d = small(embed_dim=12)
    assert not [n for n, _ in d.named_parameters() if n.startswith('output')] and d.bias.shape == (11,)
    h = torch.randn(3, 12)
    torch.testing.assert_close(d.project(h), h @ d.embedding.vectors.weight.T)
    brought = small(vector_dim=7)
    brought.embedding.load(torch.randn(11, 7), frozen=True)
    torch.testing.assert_close(brought.project(h), h @ brought.embedding.adapt.weight @ brought.embedding.vectors.weight.T)


@pytest.mark.parametrize('options, message', [
    (dict(hidden_dim=10, heads=4), 'hidden_dim 10 cannot be shared by 4 heads'), (dict(positions='learnt'), "unknown positions 'learnt': did you mean"),
    (dict(activation='rleu'), "unknown activation 'rleu': did you mean 'relu'"), (dict(impl='fast'), "unknown impl 'fast'"),
    (dict(dropout=1.), r'dropout must be in \[0, 1\), got 1.0'), (dict(num_layers=0), 'num_layers must be at least 1, got 0'),
    (dict(encoder_layers=-1), 'encoder_layers must not be negative'), (dict(heads=0), 'heads must be at least 1'),
    (dict(vector_dim=-1), 'vector_dim must not be negative'), (dict(doubly_stochastic=-1.), 'doubly_stochastic must not be negative'),
    (dict(grid_shape=(2, 3, 4)), 'grid_shape must be two positive whole numbers'), (dict(grid_shape=(0, 3)), 'grid_shape must be two'),
    (dict(pad_id=11), 'pad_id 11 is not in the vocabulary of 11'), (dict(vocab_size=0), 'vocab_size must be at least 1')])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message): small(**options)


def test_grids_that_do_not_fit():
    assert grid_sides(49) == (7, 7) and grid_sides(6, (2, 3)) == (2, 3)
    with pytest.raises(ValueError, match='12 cells is not square: encoder layers need grid_shape'):
        small(encoder_layers=1, grid_shape=()).encode(torch.randn(1, 12, 6))
    with pytest.raises(ValueError, match=r'the grid has 12 cells, but grid_shape=\(2, 3\) is for 6'): small(encoder_layers=1).encode(torch.randn(1, 12, 6))
    assert small(grid_shape=()).encode(torch.randn(1, 12, 6))['keys0'].shape == (1, 3, 12, 4)
    with pytest.raises(ValueError, match='5 rows cannot share the memories of 2 images'):
        small()(small().encode(torch.randn(2, 6, 6)), torch.ones(5, 2, dtype=torch.long))
    d = small()
    with pytest.raises(ValueError, match='5 rows cannot share'): d.step(torch.ones(5, dtype=torch.long), None, d.encode(torch.randn(2, 6, 6)))


def test_config_is_json_and_complete():
    d = small(grid_shape=(2, 3), tied=False)
    assert json.loads(json.dumps(d.config)) == d.config and d.config['grid_shape'] == [2, 3]
