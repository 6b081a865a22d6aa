"""Sampling: its distribution, its knobs, its seed, packing, gradients, and strange decoders."""
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb.attention import AttentionDecoder
from caption_nb.constraints import Constraints, Rules
from caption_nb.decoding import generate
from caption_nb.recurrent import RecurrentDecoder
from caption_nb.sampling import choose, rollout, sample, sampled_hypotheses, shortlist
from caption_nb.transformer import TransformerDecoder
from slow_search import Slow
from toy import END, PAD, START, Strange, predictor, toy

pytestmark = pytest.mark.usefixtures('one_thread')
REAL = [AttentionDecoder(9, 3, embed_dim=4, hidden_dim=6, attention_dim=4), RecurrentDecoder(9, 3, embed_dim=4, hidden_dim=6),
        TransformerDecoder(9, 3, hidden_dim=8, embed_dim=8, num_layers=2, heads=2, ffn_dim=12)]


def plain_shortlist(p: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    "The distribution drawn from, by the definition"
    if temperature == 0: temperature, top_k = 1., 1
    p = [x**(1/temperature) for x in p]
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k or len(p)]
    total, kept, reached = sum(p[i] for i in order), [], 0.
    for i in order:
        if reached >= top_p: break
        kept.append(i)
        reached += p[i]/total
    return [p[i]/sum(p[j] for j in kept) if i in kept else 0. for i in range(len(p))]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), temperature=st.sampled_from([0, .3, 1., 2.]), top_k=st.integers(0, 9),
       top_p=st.sampled_from([.01, .5, .9, 1.]), V=st.sampled_from([7, 600, 2100]))
def test_the_shortlist_is_its_definition(seed, temperature, top_k, top_p, V):
    logprob = torch.randn(2, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).log_softmax(-1)
    prob, word = shortlist(logprob, temperature, top_k, top_p)
    full = torch.zeros_like(logprob).scatter(1, torch.arange(V).expand(2, V) if word is None else word, prob/prob.sum(1, keepdim=True))
    for ours, p in zip(full, logprob.exp().tolist()):
        assert ours.tolist() == pytest.approx(plain_shortlist(p, temperature, top_k, top_p), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), V=st.integers(1, 700), luck=st.sampled_from([0., .3, .9999999, 1.]))
def test_what_has_no_probability_is_never_chosen(seed, V, luck):
    g = torch.Generator().manual_seed(seed)
    prob = torch.rand(5, V, generator=g)*(torch.rand(5, V, generator=g) < .3)
    prob[:, V//2] += .1
    at = choose(prob, torch.full((5,), luck))
    assert (prob.gather(1, at[:, None]) > 0).all()


def test_extreme_temperatures_are_numbers():
    logprob = torch.tensor([[-1., -2., -torch.inf]])
    assert shortlist(logprob, 1e-30)[0].tolist() == [[1., 0., 0.]] and shortlist(logprob, 1e30)[0].tolist() == [[.5, .5, 0.]]


def test_samples_come_as_often_as_they_should():
    decoder, grid = toy(4, 6, images=2, sharp=.7)
    slow, n = Slow(6, max_len=3, min_len=1, no_repeat=1), 4000
    for seed, knobs in enumerate((dict(), dict(temperature=1.7), dict(top_p=.8), dict(top_k=2))):
        drawn = sample(decoder, grid, n, max_len=3, min_len=1, no_repeat=1, seed=seed, **knobs)
        for g, hypotheses in zip(grid, drawn):
            predict, expected = predictor(decoder, g), {}
            def grow(caption, p):
                if caption[-1:] == (END,) or len(caption) == 3: expected[caption] = p; return
                allowed = slow.children(caption)
                q = plain_shortlist([math.exp(predict(caption)[w]) for w in allowed],
                                    **{'temperature': 1., 'top_k': 0, 'top_p': 1.} | knobs)
                for w, x in zip(allowed, q):
                    if x: grow((*caption, w), p*x)
            grow((), 1.)
            counts = Counter((*h.tokens, *[END]*h.finished) for h in hypotheses)
            assert set(counts) <= set(expected) and sum(expected.values()) == pytest.approx(1)
            assert sum(abs(counts[c]/n - p) for c, p in expected.items())/2 < .03      # total variation


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 4), max_len=st.integers(1, 8), top_p=st.sampled_from([.7, 1.]), top_k=st.integers(0, 4))
def test_what_is_reported_is_what_the_decoder_says(seed, n, max_len, top_p, top_k):
    decoder, grid = toy(seed, 9, images=4, sharp=1.)
    options = dict(n=n, max_len=max_len, top_p=top_p, top_k=top_k, min_len=min(2, max_len), no_repeat=2, bad_endings=(4,), banned=(3,))
    drawn = sample(decoder, grid, seed=seed, attention=True, **options)
    for g, hypotheses in zip(grid, drawn):
        assert len(hypotheses) == n
        for h in hypotheses:
            full, predict = h.tokens + [END]*h.finished, predictor(decoder, g)
            assert len(full) == max_len or h.finished and len(full) <= max_len
            assert not {PAD, START, END, 3} & set(h.tokens) and len(h.tokens) >= min(2, max_len) and h.tokens[-1:] != [4]
            assert h.logprobs == pytest.approx([predict(tuple(full[:t]))[w] for t, w in enumerate(full)], abs=1e-6)
            assert h.logprob == pytest.approx(sum(h.logprobs), abs=1e-9) and h.score == pytest.approx(h.logprob/len(full), abs=1e-9)
            _, look = decoder(decoder.encode(g[None]), torch.tensor([[START, *h.tokens]]))
            torch.testing.assert_close(h.attention, look[0, :len(h.tokens)].detach().float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize('decoder', [toy(2, 9)[0], *REAL], ids=lambda d: type(d).__name__)
def test_temperature_zero_is_greedy(decoder):
    decoder, grid = decoder.double().eval(), toy(2, 9, images=6)[1]
    greedy = generate(decoder, grid, 1, 7, no_repeat=1)
    for knobs in (dict(temperature=0.), dict(temperature=1e-9), dict(top_k=1), dict(top_p=1e-9)):
        for hypotheses, (best,) in zip(sample(decoder, grid, 2, max_len=7, no_repeat=1, **knobs), greedy):
            for h in hypotheses:
                assert h.tokens == best.tokens and h.finished == best.finished
                assert h.logprobs == pytest.approx(best.logprobs, abs=1e-6)


def test_the_seed_is_all_that_chance_depends_on():
    decoder, grid = toy(3, 30, images=6, sharp=.5)
    state = torch.get_rng_state()
    first = sample(decoder, grid, 3, seed=5, max_len=9)
    assert first == sample(decoder, grid, 3, seed=5, max_len=9)
    assert first != sample(decoder, grid, 3, seed=6, max_len=9)
    assert torch.equal(state, torch.get_rng_state())
    few = sample(decoder, grid[:2], 3, seed=5, max_len=9)                               # whatever else is in the batch
    assert [[h.tokens for h in hs] for hs in few] == [[h.tokens for h in hs] for hs in first[:2]]
    stream = torch.Generator().manual_seed(5)
    assert sample(decoder, grid, 3, seed=stream, max_len=9) == first != sample(decoder, grid, 3, seed=stream, max_len=9)


def test_samples_share_memory_and_leave_when_they_end():
    decoder, grid = toy(3, 9, images=8, sharp=.7)
    drawn = sample(decoder, grid, 5, max_len=12)
    rows, lengths = decoder.rows, [[len(h.logprobs) for h in hs] for hs in drawn]
    assert decoder.calls == 1 and max(decoder.sizes) == 8 and rows[0] == 40 and rows[-1] < 40 and len(rows) == max(map(max, lengths))
    for t, now in enumerate(rows[1:], 1):
        going = [sum(n > t for n in ns) for ns in lengths]
        images, most = sum(g > 0 for g in going), max(going)
        assert images*most <= now <= images*most*(8/7)**2 + 1


@pytest.mark.parametrize('decoder', [toy(2, 9)[0], *REAL], ids=lambda d: type(d).__name__)
def test_gradients_are_those_of_teacher_forcing(decoder):
    decoder, grid = decoder.double().eval(), toy(2, 9, images=3)[1]
    rules, reward = Rules(Constraints(max_len=6, no_repeat=2), 9, 3), torch.randn(6, 1, dtype=torch.float64)
    drawn = rollout(decoder, decoder.encode(grid), rules, 2, torch.Generator().manual_seed(1))
    def gradients(loss): return torch.autograd.grad(loss, [p for p in decoder.parameters()], allow_unused=True)
    ours = gradients((drawn.logprobs*reward).sum())
    inputs = torch.cat([torch.full((6, 1), START), drawn.tokens[:, :-1]], 1)
    logprobs = decoder(decoder.encode(grid), inputs)[0].log_softmax(-1).gather(2, drawn.tokens[..., None])[..., 0]
    logprobs = logprobs.masked_fill(drawn.tokens == PAD, 0.)
    torch.testing.assert_close(drawn.logprobs, logprobs)
    for a, b in zip(ours, gradients((logprobs*reward).sum()), strict=True):
        if b is not None and b.abs().max() > 0: torch.testing.assert_close(a, b)
    with torch.no_grad(): assert not rollout(decoder, decoder.encode(grid), rules, 2).logprobs.requires_grad


def test_no_tensor_is_made_on_another_device():
    decoder, grid = toy(0, 700, images=3)
    rules, memory = Rules(Constraints(8, 2, (3,), (4, 5), 2), 700, 3), decoder.encode(grid)
    for knobs in (dict(), dict(top_p=.9), dict(top_k=5, attention=True)):
        with torch.device('meta'): drawn = rollout(decoder, memory, rules, 3, torch.Generator('cpu').manual_seed(0), **knobs)
        assert len(sampled_hypotheses(drawn, rules)) == 9


@pytest.mark.parametrize('knobs', [dict(), dict(top_p=.9), dict(top_k=3), dict(temperature=0)], ids=str)
def test_strange_decoders_get_a_clear_answer(knobs):
    decoder, grid = Strange(7), torch.randn(7, 4, 3, dtype=torch.float64)
    grid[:, 0, 0] = torch.arange(7.)
    with pytest.warns(UserWarning, match=r'no caption for the images \[0, 1, (4, )?5\] of this batch') as seen:
        found = sample(decoder, grid, 3, max_len=6, attention=True, seed=1, **knobs)
    assert len(seen) == 1 and seen[0].filename == __file__
    for i in (0, 1, 5): assert all((h.tokens, h.finished, h.logprob) == ([], False, -torch.inf) for h in found[i]) and found[i]
    assert all(h.tokens == [] and h.finished for h in found[2])
    assert all(len(h.tokens) == 6 and not h.finished for h in found[3])
    assert all(math.isfinite(h.logprob) for h in found[6])


def test_bfloat16_and_edges():
    decoder, grid = REAL[0].float().eval(), torch.randn(3, 4, 3)
    with torch.autocast('cpu', torch.bfloat16): found = sample(decoder, grid, 4, top_p=.9, attention=True)
    assert all(h.attention.dtype == torch.float32 and math.isfinite(h.score) for hs in found for h in hs)
    assert sample(decoder, grid[:0], 3) == []
    decoder.train()
    sample(decoder, grid)
    assert decoder.training
    decoder.eval()
    only_end = sample(decoder, grid, 2, banned=range(3, 9))
    assert [(h.tokens, h.finished) for hs in only_end for h in hs] == [([], True)]*6
    one, = {tuple(h.tokens) for hs in sample(decoder, grid, 2, max_len=3, banned=[END, *range(4, 9)]) for h in hs}
    assert one == (3, 3, 3)


@pytest.mark.parametrize('options, message', [
    (dict(n=0), 'n must be at least 1, got 0'), (dict(temperature=-.1), 'temperature must be 0 or more'),
    (dict(temperature=math.nan), 'temperature'), (dict(temperature=math.inf), 'temperature'), (dict(top_k=-1), 'top_k must not be'),
    (dict(top_p=0), 'top_p must be above 0'), (dict(top_p=1.1), 'top_p must be above 0 and at most 1, got 1.1'),
    (dict(min_len=21), 'do not fit'), (dict(banned=[99]), r'ids \[99\]'), (dict(penalty='averge'), 'unknown penalty')])
def test_bad_arguments_are_named(options, message):
    decoder, grid = toy(0)
    with pytest.raises(ValueError, match=message): sample(decoder, grid, **options)
