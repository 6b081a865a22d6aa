"""Ensembles: the averages, one model with itself, different kinds and grids, and what is refused."""
import pytest
import torch

from caption_nb.attention import AttentionDecoder
from caption_nb.decoding import generate
from caption_nb.ensemble import Ensemble, mean_attention, vote
from caption_nb.recurrent import RecurrentDecoder
from caption_nb.sampling import sample
from caption_nb.transformer import TransformerDecoder
from slow_search import Slow
from toy import END, Toy, compare, predictor, toy

pytestmark = pytest.mark.usefixtures('one_thread')


def kinds(seed=0, vocab=9) -> list:
    torch.manual_seed(seed)
    return [d.double().eval() for d in (AttentionDecoder(vocab, 3, embed_dim=4, hidden_dim=6, attention_dim=4),
            TransformerDecoder(vocab, 3, hidden_dim=8, embed_dim=8, num_layers=2, heads=2, ffn_dim=12),
            RecurrentDecoder(vocab, 5, cell='gru', embed_dim=4, hidden_dim=6))]


def grids(images=4) -> list:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(images, L, D, generator=g).double() for L, D in ((6, 3), (6, 3), (1, 5))]


@pytest.mark.parametrize('geometric', [False, True])
@pytest.mark.parametrize('weights', [None, [1, 3]])
@pytest.mark.parametrize('i', range(3))
def test_one_decoder_with_itself_is_that_decoder(i, weights, geometric):
    decoder, grid = kinds()[i], grids()[i]
    both, options = Ensemble([decoder]*2, weights, geometric), dict(width=4, max_len=8, n_best=3, attention=True)
    memory, tokens = decoder.encode(grid), torch.randint(1, 9, (8, 5))
    alone, together = decoder(memory, tokens)[0], both(both.encode(grid), tokens)[0]
    torch.testing.assert_close(alone.log_softmax(-1), together.log_softmax(-1), rtol=0, atol=1e-9)
    for a, b in zip(generate(decoder, grid, **options), generate(both, grid, **options), strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.tokens == y.tokens and [x.score, *x.logprobs] == pytest.approx([y.score, *y.logprobs], abs=1e-9)
            if x.attention is not None:
                look = x.attention if x.attention.ndim == y.attention.ndim else x.attention.mean(1)
                torch.testing.assert_close(look, y.attention, rtol=0, atol=1e-6)
    drawn = [[h.tokens for hs in sample(d, grid, 3, max_len=6) for h in hs] for d in (decoder, both)]
    assert drawn[0] == drawn[1]


@torch.no_grad()
@pytest.mark.parametrize('geometric', [False, True])
def test_step_is_forward_is_the_average(geometric):
    members, weights = kinds(), [.5, .2, .3]
    ensemble, tokens = Ensemble(members, [5, 2, 3], geometric), torch.randint(1, 9, (8, 5))
    memory, state = ensemble.encode(grids()), None
    logits, look = ensemble(memory, tokens)
    each = torch.stack([d(d.encode(g), tokens)[0].softmax(-1) for d, g in zip(members, grids())])
    w = torch.tensor(weights, dtype=torch.double).view(3, 1, 1, 1)
    expected = each.pow(w).prod(0) if geometric else (each*w).sum(0)
    torch.testing.assert_close(logits.softmax(-1), expected/expected.sum(-1, keepdim=True), rtol=0, atol=1e-9)
    for t in range(5):
        now, here, state = ensemble.step(tokens[:, t], state, memory)
        torch.testing.assert_close(now, logits[:, t], rtol=0, atol=1e-6)
        torch.testing.assert_close(here, look[:, t], rtol=0, atol=1e-6)
    assert ensemble.step(tokens[:, 0], None, memory, False)[1] is None and ensemble(memory, tokens, False)[1] is None


@pytest.mark.parametrize('geometric', [False, True])
def test_an_ensemble_is_searched_like_any_decoder(geometric):
    (a, grid), (b, _) = toy(1, 8, images=3), toy(2, 8)
    ensemble = Ensemble([a, b], [2, 1], geometric).eval()
    slow = Slow(8, width=4, groups=2, max_len=5, n_best=3, phrases=[(5,)], no_repeat=2)
    found = generate(ensemble, grid, 4, 5, n_best=3, groups=2, forced=[5], no_repeat=2)
    for hypotheses, g in zip(found, grid): compare(hypotheses, slow.beam(predictor(ensemble, g)))


def test_two_are_better_than_the_worse_one():
    "The mean of two distributions gives any caption at least half of what each gives: log p is within log 2 a word of the better one's"
    p = torch.randn(2, 50, dtype=torch.double).log_softmax(-1)
    mixed = vote([*p], [.5, .5])
    assert (mixed >= p.amax(0) - torch.tensor(2.).log()).all() and mixed.logsumexp(-1).item() == pytest.approx(0, abs=1e-7)


def test_attention_is_the_mean_where_grids_agree():
    members, g = kinds(), grids()
    h = generate(Ensemble(members), g, 2, 5, attention=True, banned=[END])[0][0]
    assert h.attention.shape == (5, 6) and torch.allclose(h.attention.sum(1), torch.ones(5))
    assert generate(Ensemble(members), [g[0], g[1][:, :4], g[2]], 2, 5, attention=True, banned=[END])[0][0].attention is None
    assert generate(Ensemble(members[2:]), g[2:], 2, 5, attention=True, banned=[END])[0][0].attention is None
    a, b = torch.rand(3, 6).softmax(-1), torch.rand(3, 2, 6).softmax(-1)
    torch.testing.assert_close(mean_attention([a, None, b], [.2, .3, .5], 2), (a*.2 + b.mean(1)*.5)/.7)


def test_grids_one_for_all_or_one_each():
    same = [toy(1, 8)[0], toy(2, 8)[0]]
    grid = toy(1, 8)[1]
    assert generate(Ensemble(same), grid, 3) == generate(Ensemble(same), [grid, grid], 3) != generate(Ensemble(same), [grid, -grid], 3)


def test_weights_count_and_members_keep_their_mode():
    a, b = toy(1, 8)[0], toy(2, 8)[0]
    grid = toy(1, 8)[1]
    assert [h[0].tokens for h in generate(Ensemble([a, b], [1e9, 1]), grid, 3)] == [h[0].tokens for h in generate(a, grid, 3)]
    a.train(); b.eval()
    ensemble = Ensemble([a, b])
    generate(ensemble, grid)
    assert (a.training, b.training) == (True, False)
    assert len(list(ensemble.parameters())) == 2*len(list(a.parameters()))
    with torch.autocast('cpu', torch.bfloat16): generate(Ensemble(kinds()).float(), [g.float() for g in grids()], 3, 5)


@pytest.mark.parametrize('make, message', [
    (lambda: Ensemble([Toy(8), Toy(9)]), 'different sizes cannot work together: Toy 8, Toy 9 words'),
    (lambda: Ensemble([]), 'at least one decoder'), (lambda: Ensemble([Toy(8)], [1, 2]), '2 weights for 1 decoders'),
    (lambda: Ensemble([Toy(8)]*2, [1, 0]), r'positive and finite, got \[1.0, 0.0\]'),
    (lambda: Ensemble([Toy(8)], [float('nan')]), 'positive and finite'),
    (lambda: generate(Ensemble(kinds()), grids()[0]), r'must have shape \(images, cells, 5\), got \(4, 6, 3\)'),
    (lambda: generate(Ensemble(kinds()), grids()[:2]), '2 grids for 3 decoders'),
    (lambda: generate(Ensemble(kinds()), []), '0 grids for 3 decoders'),
    (lambda: sample(Ensemble(kinds()), [*grids()[:2], grids(3)[2]]), 'one grid has 4 images, another one 3')])
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message): make()
