"""Scheduled sampling against a loop that follows the paper word for word, and against greedy decoding; for every decoder."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from caption_nb.attention import AttentionDecoder
from caption_nb.decoder import take
from caption_nb.decoding import evaluating, generate
from caption_nb.recurrent import RecurrentDecoder
from caption_nb.scheduled_sampling import choose_places, mixed_inputs, own_words, sampling_ratio
from caption_nb.transformer import TransformerDecoder

pytestmark = pytest.mark.usefixtures('one_thread')
V, D, L = 12, 8, 6
SMALL = dict(embed_dim=8, hidden_dim=8)
DECODERS = {
    **{cell: lambda cell=cell, **kw: RecurrentDecoder(V, D, cell=cell, **SMALL, **kw) for cell in ('rnn', 'lstm', 'gru')},
    'gru, every, 2 layers': lambda **kw: RecurrentDecoder(V, D, cell='gru', image='every', num_layers=2, **SMALL, **kw),
    'lstm, token, scratch': lambda **kw: RecurrentDecoder(V, D, image='token', impl='scratch', **SMALL, **kw),
    **{f'attention {cell}': lambda cell=cell, **kw: AttentionDecoder(V, D, cell=cell, attention_dim=8, **SMALL, **kw)
       for cell in ('rnn', 'lstm', 'gru')},
    'attention, multihead': lambda **kw: AttentionDecoder(V, D, attention='multihead', heads=2, attention_dim=8, **SMALL, **kw),
    'transformer': lambda **kw: TransformerDecoder(V, D, num_layers=2, heads=2, ffn_dim=16, **SMALL, **kw),
    'transformer, post-norm, learned': lambda **kw: TransformerDecoder(V, D, num_layers=1, heads=2, ffn_dim=16, pre_norm=False, tied=False,
                                                                       positions='learned', **SMALL, **kw)}
every_decoder = pytest.mark.parametrize('name', DECODERS)


def talker(name: str, end: float = 0., **kwargs):
    "A decoder with strong opinions; `end` is added to the logit of <end>"
    torch.manual_seed(3)
    decoder = DECODERS[name](**kwargs)
    with torch.no_grad():
        for p in decoder.parameters(): p.normal_(std=0.6)
    project = decoder.project
    decoder.project = lambda hidden: project(hidden) + end*(torch.arange(V) == 2)
    return decoder


def captions(n: int, length: int, seed: int = 0) -> torch.Tensor:
    "Inputs of `n` captions of 1 to `length` tokens"
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, V, (n, length), generator=g)
    tokens[:, 0] = 1
    lengths = torch.randint(1, length + 1, (n,), generator=g)
    lengths[0] = length
    return tokens.masked_fill(torch.arange(length) >= lengths[:, None], 0)


def as_in_the_paper(decoder, memory, tokens, ratio, sample, banned=()):
    "A coin for every word; each row by itself, with its own memory; the whole beginning read again for each word"
    was = [m.training for m in decoder.modules()]
    decoder.eval()
    k, mixed = len(tokens)//len(next(iter(memory.values()))), tokens.clone()
    coins = torch.rand(tokens.shape) < ratio
    for t in range(1, tokens.shape[1]):
        own = [i for i in range(len(tokens)) if coins[i, t] and tokens[i, t] not in (0, 2)]
        noise = torch.empty(len(own), V).exponential_() if own and sample else None
        for j, i in enumerate(own):
            with torch.no_grad(): logits = decoder(take(memory, torch.tensor([i//k])), mixed[i:i + 1, :t])[0][0, -1]
            p = logits.softmax(0)
            for word in (0, 1, *banned): p[word] = 0
            word = int((p/noise[j] if sample else p).argmax())   # p/e is largest at w with probability p(w)
            if word != 2: mixed[i, t] = word
    for m, mode in zip(decoder.modules(), was): m.training = mode
    return mixed


@every_decoder
@pytest.mark.parametrize('ratio, sample', [(0.3, True), (1., True), (0.5, False), (1., False)])
def test_equals_the_paper(name, ratio, sample):
    decoder, tokens = talker(name), captions(6, 7)
    memory = decoder.encode(torch.randn(3, L, D)*3)
    torch.manual_seed(1)
    expected = as_in_the_paper(decoder, memory, tokens, ratio, sample, banned=[3])
    after = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(mixed_inputs(decoder, memory, tokens, ratio, sample, banned=[3]), expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(expected, tokens)


@every_decoder
def test_free_running_is_greedy_decoding(name):
    decoder, grid = talker(name, end=-1.).eval(), torch.randn(4, L, D)
    truth = torch.full((4, 9), 5)
    truth[:, 0] = 1
    free = mixed_inputs(decoder, decoder.encode(grid), truth, 1., sample=False, banned=[3])
    said = [best.tokens for [best] in generate(decoder, grid, max_len=8, banned=[3])]
    for row, words in zip(free.tolist(), said): assert row[1:1 + len(words)] == words
    assert sum(map(len, said)) > 4


@every_decoder
def test_training_on_mixed_inputs_reaches_every_weight(name):
    decoder, tokens = DECODERS[name](dropout=0.1), captions(6, 6)
    memory = decoder.encode(torch.randn(2, L, D))
    inputs = mixed_inputs(decoder, memory, tokens, 0.5)
    assert decoder.training and not inputs.requires_grad and not inputs.is_inference()
    F.cross_entropy(decoder(memory, inputs, attention=False)[0][tokens > 0], tokens[tokens > 0]).backward()
    silent = [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent


@pytest.mark.parametrize('name', ['gru', 'attention lstm', 'transformer'])
def test_autocast_keeps_the_gradients(name):
    "Copies of weights that autocast made without gradients must not reach the training pass (PyTorch's issue 158232)"
    def gradients(roll):
        torch.manual_seed(0)
        decoder = DECODERS[name](dropout=0.)
        tokens, grid = captions(6, 6), torch.randn(2, L, D)
        with torch.autocast('cpu', torch.bfloat16):
            if roll: mixed_inputs(decoder, decoder.encode(grid), tokens, 0.5)
            memory = decoder.encode(grid)
            loss = decoder(memory, tokens, attention=False)[0][tokens > 0].float().logsumexp(-1).mean()
        loss.backward()
        return {n: p.grad for n, p in decoder.named_parameters()}
    plain, rolled = gradients(False), gradients(True)
    for n, g in plain.items():
        assert (g is None) == (rolled[n] is None), f'{n} gets {"a" if g is not None else "no"} gradient without the roll-out'
        if g is not None: assert torch.equal(g, rolled[n]), n


def test_ratio_zero_is_free():
    decoder, tokens = DECODERS['gru'](), captions(4, 5)
    decoder.step = None   # nothing is computed
    memory, state = decoder.encode(torch.randn(2, L, D)), torch.get_rng_state()
    assert mixed_inputs(decoder, memory, tokens, 0.) is tokens
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 1), st.booleans(), st.integers(0, 10_000))
def test_what_never_changes(ratio, sample, seed):
    decoder, tokens = talker('gru', end=2.), captions(6, 7, seed)
    before = tokens.clone()
    tokens[1, -1] = before[1, -1] = 2   # inputs that still hold <end>
    torch.manual_seed(seed)
    mixed = mixed_inputs(decoder, decoder.encode(torch.randn(3, L, D)), tokens, ratio, sample, banned=[3, 4])
    assert torch.equal(tokens, before), 'the true words were changed in place'
    assert torch.equal(mixed == 0, tokens == 0) and torch.equal(mixed[:, 0], tokens[:, 0]) and torch.equal(mixed == 2, tokens == 2)
    changed = mixed[mixed != tokens]
    assert not torch.isin(changed, torch.tensor([0, 1, 2, 3, 4])).any()


def test_a_predicted_end_is_not_read():
    decoder, tokens = talker('gru', end=1e4), captions(4, 6)
    assert torch.equal(mixed_inputs(decoder, decoder.encode(torch.randn(2, L, D)), tokens, 1.), tokens)


def test_share_of_own_words():
    tokens = torch.full((400, 51), 5)
    for ratio in (0.1, 0.25, 0.9):
        places = choose_places(tokens, ratio)
        assert not places[:, 0].any() and abs(places[:, 1:].float().mean() - ratio) < 0.02


def test_own_words_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.randn(3, V)*2
    drawn = own_words(logits.repeat_interleave(20_000, 0), never=[0, 1, 7]).view(3, -1)
    logits[:, [0, 1, 7]] = -math.inf
    for row, p in zip(drawn, logits.softmax(1)): torch.testing.assert_close(row.bincount(minlength=V)/20_000, p, atol=0.015, rtol=0)
    assert torch.equal(own_words(logits, sample=False), logits.argmax(1))
    assert own_words(logits.bfloat16()).dtype == torch.int64 and own_words(logits[:0]).shape == (0,)


def test_the_generator_of_the_device_decides():
    decoder, tokens = talker('attention lstm', dropout=0.5), captions(6, 8)
    memory = decoder.encode(torch.randn(3, L, D)*3)
    def mixed(seed):
        torch.manual_seed(seed)
        return mixed_inputs(decoder, memory, tokens, 0.5)
    assert torch.equal(mixed(0), mixed(0)) and not torch.equal(mixed(0), mixed(1))
    state = torch.get_rng_state()
    a, b = (mixed_inputs(decoder, memory, tokens, 0.5, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), state)


def test_no_more_steps_than_needed(monkeypatch):
    decoder, tokens = DECODERS['gru'](), captions(4, 9)
    tokens[:, 5:] = 0
    memory, steps, step = decoder.encode(torch.randn(2, L, D)), [], decoder.step
    def counted(token, state, memory, attention=True):
        assert not attention and not torch.is_grad_enabled() and not decoder.training
        steps.append(len(token))
        return step(token, state, memory, attention)
    monkeypatch.setattr(decoder, 'step', counted)
    mixed_inputs(decoder, memory, tokens, 1.)
    assert steps == [4]*4   # five words, of which the last is read by no choice
    steps.clear()
    assert torch.equal(mixed_inputs(decoder, memory, tokens, 1e-9), tokens) and not steps


def test_modes_come_back_also_after_an_error():
    decoder = DECODERS['gru, every, 2 layers']()
    decoder.layers[0].eval()   # a part that someone has frozen
    before = [m.training for m in decoder.modules()]
    with pytest.raises(RuntimeError), evaluating(decoder):
        assert not any(m.training for m in decoder.modules())
        raise RuntimeError
    assert [m.training for m in decoder.modules()] == before and torch.is_grad_enabled()


def test_strange_models_and_batches():
    decoder, tokens = DECODERS['gru'](), captions(4, 5)
    memory = decoder.encode(torch.randn(2, L, D))
    for bad in (math.nan, -math.inf, math.inf):   # training names such a loss; the roll-out must get there
        decoder.project = lambda hidden: torch.full((len(hidden), V), bad)
        mixed = mixed_inputs(decoder, memory, tokens, 1.)
        assert ((mixed >= 0) & (mixed < V)).all()
    for shape in ((4, 1), (4, 0), (0, 5)):
        few = tokens[:shape[0], :shape[1]]
        assert torch.equal(mixed_inputs(decoder, take(memory, torch.arange(shape[0] and 2)), few, 1.), few)
    assert torch.equal(mixed_inputs(decoder, memory, tokens*0, 1.), tokens*0)
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match='ratio must be in'): mixed_inputs(decoder, memory, tokens, ratio)


# ---- the schedule -----------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.sampled_from(['linear', 'exponential', 'sigmoid']), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.99), st.integers(1, 200))
def test_ratio_runs_from_start_to_end(schedule, start, end, begin, steps):
    ratios = [sampling_ratio(i, steps, start, end, schedule, begin) for i in range(steps + 1)]
    assert all(0 <= r <= 1 for r in ratios) and ratios[-1] == pytest.approx(end, abs=1e-9)
    grown = [r for i, r in enumerate(ratios) if i/steps >= begin]
    assert grown == sorted(grown, reverse=end < start) and not any(ratios[:len(ratios) - len(grown)])
    assert sampling_ratio(steps + 5, steps, start, end, schedule, begin) == ratios[-1]


def test_shapes_of_the_schedules():
    at = {s: [sampling_ratio(i, 4, 0, 1, s) for i in range(5)] for s in ('linear', 'exponential', 'sigmoid')}
    assert at['linear'] == pytest.approx([0, .25, .5, .75, 1])
    truth = [1 - r*(1 - math.exp(-5)) for r in at['exponential']]       # k^i
    assert truth == pytest.approx([math.exp(-5*i/4) for i in range(5)])
    def paper(i, k): return k/(k + math.exp(i/k))                       # inverse sigmoid decay: σ(5 - 10 u) with ln k = 5, i = 10 k u
    k = math.exp(5)
    first, last = paper(0, k), paper(10*k, k)
    assert at['sigmoid'] == pytest.approx([(first - paper(10*k*i/4, k))/(first - last) for i in range(5)])


def test_bad_schedules():
    with pytest.raises(ValueError, match="unknown schedule 'lineer': did you mean 'linear'"): sampling_ratio(0, 1, schedule='lineer')
    for name, value in (('start', -0.1), ('end', 1.5), ('begin', 1.)):
        with pytest.raises(ValueError, match=f'{name} must be in'): sampling_ratio(0, 1, **{name: value})
