"""Beam search: against brute force, greedy search and itself, and its edges."""
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from caption_nb.attention import AttentionLSTM
from caption_nb.decoder import Decoder
from caption_nb.decoding import Beam, generate

PAD, START, END = 0, 1, 2


pytestmark = pytest.mark.usefixtures('one_thread')


def sharp(seed: int, vocab: int = 6, images: int = 3, scale: float = 20., **options):
    "A small decoder in double precision with strong opinions, and a grid"
    torch.manual_seed(seed)
    decoder = AttentionLSTM(vocab, 5, 4, 6, 4, **options).double().eval()
    with torch.no_grad():
        decoder.output.weight.mul_(scale); decoder.recur.weight.mul_(4); decoder.word.weight.mul_(4); decoder.embedding.vectors.weight.mul_(20)
    return decoder, torch.randn(images, 4, 5).double()


@torch.no_grad()
def logprob(decoder, grid, tokens) -> float:
    "log p of the tokens that follow <start>, by teacher forcing"
    inputs, targets = torch.tensor([[START, *tokens[:-1]]]), torch.tensor([tokens])
    logits, _ = decoder(decoder.encode(grid[None]), inputs)
    return logits.log_softmax(-1).gather(2, targets[..., None]).sum().item()


@torch.no_grad()
def brute_force(decoder, grid, max_len, length_norm, banned):
    "Every hypothesis there is, best first, the finished ones before the others: (words, score, logprob, finished)"
    words = [w for w in range(decoder.vocab_size) if w not in {PAD, START, END, *banned}]
    ended = [[*w, END] for n in range(max_len) for w in itertools.product(words, repeat=n)] if END not in banned else []
    everything = ended + [list(w) for w in itertools.product(words, repeat=max_len)]
    padded = torch.tensor([w + [PAD]*(max_len - len(w)) for w in everything])
    inputs = torch.cat([torch.full((len(padded), 1), START), padded[:, :-1]], 1)
    each = decoder(decoder.encode(grid[None]), inputs)[0].log_softmax(-1).gather(2, padded[..., None])[..., 0]
    logprobs = each.masked_fill(padded == PAD, 0.).sum(1).tolist()
    found = [([x for x in w if x != END], lp/len(w)**length_norm, lp, w[-1] == END) for w, lp in zip(everything, logprobs)]
    return sorted(found, key=lambda x: (not x[3], -x[1]))


@pytest.mark.parametrize('length_norm', [0., 0.7, 1., 2., -0.5])
@pytest.mark.parametrize('banned', [(), (3,), (2,)])
def test_a_beam_that_holds_everything_is_exhaustive(length_norm, banned):
    decoder, grid = sharp(1, images=2)
    n = 12
    found = generate(decoder, grid, width=200, max_len=4, length_norm=length_norm, n_best=n, banned=banned)
    for i, hypotheses in enumerate(found):
        truth = brute_force(decoder, grid[i], 4, length_norm, banned)[:n]
        assert [h.tokens for h in hypotheses] == [t[0] for t in truth]
        assert [h.finished for h in hypotheses] == [t[3] for t in truth]
        for h, t in zip(hypotheses, truth): assert (h.score, h.logprob) == (pytest.approx(t[1], abs=1e-9), pytest.approx(t[2], abs=1e-9))


@torch.no_grad()
def greedy(decoder, grid, max_len, banned=()):
    "The best word at every step, for one image"
    memory, state, token, words = decoder.encode(grid[None]), None, torch.tensor([START]), []
    for _ in range(max_len):
        logits, _, state = decoder.step(token, state, memory)
        logits[:, [PAD, START, *banned]] = -torch.inf
        token = logits.argmax(1)
        if token.item() == END: break
        words.append(token.item())
    return words


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), max_len=st.integers(1, 9), length_norm=st.floats(0, 2), banned=st.sampled_from([(), (3,), (2, 5)]))
def test_width_one_is_greedy(seed, max_len, length_norm, banned):
    decoder, grid = sharp(seed, vocab=9)
    found = generate(decoder, grid, 1, max_len, length_norm, banned=banned)
    assert [h[0].tokens for h in found] == [greedy(decoder, g, max_len, banned) for g in grid]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), width=st.integers(1, 6), max_len=st.integers(1, 9), length_norm=st.floats(0, 1.5), data=st.data())
def test_one_image_or_many_leaving_early_or_staying(seed, width, max_len, length_norm, data):
    decoder, grid = sharp(seed, vocab=9, images=5)
    options = dict(width=width, max_len=max_len, length_norm=length_norm, n_best=data.draw(st.integers(1, width)), attention=True)
    together = generate(decoder, grid, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Beam, 'leave', lambda self: None)         # nobody stops before the maximum length
        staying = generate(decoder, grid, **options)
    for i, hypotheses in enumerate(together):
        alone, = generate(decoder, grid[i:i+1], **options)
        for other in (alone, staying[i]):
            for a, b in itertools.zip_longest(hypotheses, other):
                if b is None or a is None or not (a.finished and b.finished): continue
                assert a.tokens == b.tokens and a.score == pytest.approx(b.score, abs=1e-9)
        for a, b in zip(hypotheses, alone, strict=True):
            assert a.tokens == b.tokens and a.finished == b.finished
            torch.testing.assert_close(a.attention, b.attention, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), width=st.integers(1, 5), max_len=st.integers(1, 8), length_norm=st.floats(0, 1.5))
def test_what_is_reported_is_what_the_decoder_says(seed, width, max_len, length_norm):
    decoder, grid = sharp(seed, vocab=8)
    for g, hypotheses in zip(grid, generate(decoder, grid, width, max_len, length_norm, n_best=width, attention=True)):
        assert 1 <= len(hypotheses) <= width and len({tuple(h.tokens) for h in hypotheses}) == len(hypotheses)
        assert hypotheses == sorted(hypotheses, key=lambda h: (not h.finished, -h.score))
        for h in hypotheses:
            full = h.tokens + [END]*h.finished
            assert len(full) == max_len or h.finished and len(full) <= max_len
            assert not {PAD, START, END} & set(h.tokens)
            assert h.logprob == pytest.approx(logprob(decoder, g, full), abs=1e-6)
            assert h.score == pytest.approx(h.logprob/len(full)**length_norm, abs=1e-9)
            _, look = decoder(decoder.encode(g[None]), torch.tensor([[START, *h.tokens]]))
            torch.testing.assert_close(h.attention, look[0, :len(h.tokens)].detach().float(), rtol=0, atol=1e-6)


class Fixed(Decoder):
    "Next-word probabilities that depend on the last word; the image only scales them"
    def __init__(self, vocab_size=5, grid_dim=1, table=None):
        super().__init__(vocab_size, grid_dim)
        self.table, self.rows = nn.Parameter(torch.as_tensor(table, dtype=torch.float).log()), []
    def encode(self, grid): return dict(image=grid.mean((1, 2))[:, None])
    def step(self, token, state, memory):
        self.rows.append(len(token))
        return self.table[token], None, {}


def test_a_longer_caption_overtakes_a_shorter_one():
    "<end> is the best first word, but a certain long caption has the better mean: the search may not stop at once"
    table = [[.2]*5, [1e-9, 1e-9, .5, .3, .2], [.2]*5, [1e-9, 1e-9, 1e-9, 1e-9, 1.], [1e-9, 1e-9, .9, 1e-9, .1]]
    decoder, grid = Fixed(table=table), torch.zeros(1, 1, 1)
    best = generate(decoder, grid, width=2, length_norm=1., max_len=6)[0][0]
    assert best.tokens == [3, 4] and best.finished
    assert generate(decoder, grid, width=2, length_norm=0., max_len=6)[0][0].tokens == []


def test_finished_images_leave_the_batch():
    "Image by image the rows become fewer"
    class Stops(Fixed):
        def step(self, token, state, memory):
            age = (state['age'] if state else torch.zeros(len(token), 1)) + 1
            logits = torch.full((len(token), 5), -9.)
            stop = age[:, 0] >= memory['image'][:, 0].repeat_interleave(len(token)//len(memory['image']))
            logits[stop, END], logits[~stop, 3] = 9., 9.
            self.rows.append(len(token))
            return logits, None, dict(age=age)
    decoder = Stops(table=[[.2]*5]*5)
    found = generate(decoder, torch.arange(1., 5).view(4, 1, 1))
    assert [h[0].tokens for h in found] == [[3]*n for n in range(4)]
    assert decoder.rows == [4, 3, 2, 1]


def test_it_always_returns_a_caption():
    decoder, grid = sharp(0)
    for hypotheses in generate(decoder, grid, 3, 5, banned=[END]):
        assert len(hypotheses[0].tokens) == 5 and not hypotheses[0].finished


def test_edges():
    decoder, grid = sharp(0)
    assert generate(decoder, grid[:0], 3) == []
    for width in (1, 50):                                       # also wider than the vocabulary
        for hypotheses in generate(decoder, grid, width, max_len=1, n_best=min(width, 4)):
            assert all(len(h.tokens) == (0 if h.finished else 1) for h in hypotheses) and hypotheses
    only_end = generate(decoder, grid, 4, banned=[3, 4, 5], n_best=4)
    assert [(h.tokens, h.finished) for hs in only_end for h in hs] == [([], True)]*3
    one_word = generate(decoder, grid, 4, 3, banned=[END, 4, 5], n_best=4)
    assert [h.tokens for hs in one_word for h in hs] == [[3, 3, 3]]*3
    assert generate(decoder, grid)[0][0].attention is None
    table = Fixed(table=torch.full((5, 5), .2))
    assert generate(table, torch.zeros(1, 1, 1), attention=True)[0][0].attention is None     # a decoder without attention


def test_the_mode_is_given_back_and_dropout_is_off():
    decoder, grid = sharp(0, dropout=0.9)
    expected = generate(decoder, grid, 3)
    decoder.train()
    assert [h[0].tokens for h in generate(decoder, grid, 3)] == [h[0].tokens for h in expected] and decoder.training
    with pytest.raises(ValueError): generate(decoder, grid*float('nan'), 2)
    assert decoder.training


@pytest.mark.parametrize('options, message', [
    (dict(width=0), 'width must be at least 1, got 0'), (dict(max_len=0), 'max_len must be at least 1, got 0'),
    (dict(n_best=0), 'n_best must be at least 1'),
    (dict(width=2, n_best=3), 'n_best=3 hypotheses need a beam of at least that width, got width=2'),
    (dict(banned=[2, 3, 4, 5]), 'all 6 words of the vocabulary are banned'),
    (dict(banned=[6, 3]), r'ids \[6\] are not in the vocabulary of 6'),
    (dict(banned=[-1]), r'ids \[-1\] are not in the vocabulary'), (dict(end_id=9), r'ids \[9\] are not in the vocabulary')])
def test_bad_arguments_are_named(options, message):
    decoder, grid = sharp(0)
    with pytest.raises(ValueError, match=message): generate(decoder, grid, **options)


def test_bad_grids_are_named():
    decoder, grid = sharp(0)
    with pytest.raises(ValueError, match=r'grid must have shape \(images, cells, 5\), got \(4, 5\)'): generate(decoder, grid[0])
    with pytest.raises(ValueError, match=r'got \(3, 4, 4\)'): generate(decoder, grid[..., :4])
    with pytest.raises(ValueError, match='image 1 of the batch: the decoder gave no finite log-probability'):
        generate(decoder, torch.stack([grid[0], grid[1]*float('nan')]))


def test_low_precision_is_searched_in_float32():
    decoder, grid = sharp(0)
    decoder, grid = decoder.float(), grid.float()
    with torch.autocast('cpu', torch.bfloat16): found = generate(decoder, grid, 3, attention=True)
    assert all(h[0].attention.dtype == torch.float32 for h in found)


def test_heads_are_kept_apart():
    class Heads(Fixed):
        def step(self, token, state, memory):
            self.rows.append(len(token))
            return self.table[token], torch.rand(len(token), 2, 3), {}
    decoder = Heads(table=torch.full((5, 5), .2))
    h = generate(decoder, torch.zeros(2, 1, 1), 2, 4, attention=True)[1][0]
    assert h.attention.shape == (len(h.tokens), 2, 3)
