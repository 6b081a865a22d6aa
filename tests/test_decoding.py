"""Beam search: against brute force and a plain implementation, constraints, groups, the trace, strange decoders, and its edges."""
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from caption_nb.attention import AttentionDecoder
from caption_nb.constraints import Constraints, Rules
from caption_nb.decoder import Decoder, check_decoder
from caption_nb.decoding import Beam, Hypothesis, _search, evaluating, generate, length_penalty
from caption_nb.recurrent import RecurrentDecoder
from caption_nb.transformer import TransformerDecoder
from slow_search import Slow
from toy import END, PAD, START, Strange, Toy, compare, predictor, toy

pytestmark = pytest.mark.usefixtures('one_thread')
none_lost = pytest.mark.filterwarnings('error')


def test_the_toy_keeps_the_protocol():
    decoder, grid = toy(0)
    check_decoder(decoder, grid)


# --- against the plain implementations
PHRASES = st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=2).map(tuple), max_size=2, unique=True)
RULES = dict(banned=st.sampled_from([(), (), (3,), (2,)]), min_len=st.integers(0, 3), no_repeat=st.integers(0, 2),
             bad_endings=st.sampled_from([(), (3,), (4, 5)]))
RANKS = dict(penalty=st.sampled_from(['power', 'gnmt']), length_norm=st.sampled_from([0., .7, 1., 2., -.5]))
HOLES = st.sampled_from([(), (), (), (4,), (2, 3)])


def search(decoder, grid, options) -> list | None:
    "What `generate` finds, or None if it refuses the options"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: return generate(decoder, grid, **options)
        except ValueError: return None


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 999), max_len=st.integers(1, 4), phrases=PHRASES, holes=HOLES, **RULES, **RANKS)
def test_a_beam_that_holds_everything_is_exhaustive(seed, max_len, phrases, holes, **options):
    decoder, grid = toy(seed, images=2, holes=holes)
    slow = Slow(6, max_len=max_len, phrases=phrases, **options)
    truth = [[t for t in slow.everything(predictor(decoder, g)) if t[2] > -torch.inf] for g in grid]
    found = search(decoder, grid, options | dict(width=320, n_best=320, max_len=max_len, forced=phrases))
    if found is None: assert not any(truth)                     # only what nothing can fulfil is refused
    else:
        for hypotheses, t in zip(found, truth, strict=True): compare(hypotheses, t)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(1, 4), groups=st.integers(1, 3), max_len=st.integers(1, 6), vocab=st.sampled_from([6, 9]),
       phrases=st.tuples(PHRASES, PHRASES, st.just([])), holes=HOLES, diversity=st.sampled_from([0., .3, 2.]), data=st.data(),
       **RULES, **RANKS)
def test_any_beam_equals_the_plain_implementation(seed, size, groups, max_len, vocab, phrases, holes, data, **options):
    decoder, grid = toy(seed, vocab, images=3, holes=holes)
    options |= dict(width=size*groups, groups=groups, max_len=max_len, n_best=data.draw(st.integers(1, size*groups)))
    found = search(decoder, grid, options | dict(forced=dict(enumerate(phrases))))
    assume(found is not None)
    for hypotheses, p, g in zip(found, phrases, grid, strict=True):
        compare(hypotheses, Slow(vocab, phrases=p, **options).beam(predictor(decoder, g)))


REAL = [AttentionDecoder(7, 5, embed_dim=4, hidden_dim=6, attention_dim=4), RecurrentDecoder(7, 5, embed_dim=4, hidden_dim=6),
        AttentionDecoder(7, 5, cell='gru', attention='multihead', heads=2, embed_dim=4, hidden_dim=6, attention_dim=4),
        TransformerDecoder(7, 5, hidden_dim=8, embed_dim=8, num_layers=2, heads=2, ffn_dim=12)]


@pytest.mark.parametrize('decoder', REAL, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize('options', [dict(width=1), dict(width=4, n_best=3), dict(width=4, groups=2, n_best=4, no_repeat=1),
                                     dict(width=4, phrases=[(4,), (6, 5)], bad_endings=(5,))], ids=str)
def test_real_decoders_are_searched_like_the_plain_implementation(decoder, options):
    decoder, grid = decoder.double().eval(), torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        for p in decoder.parameters(): p.mul_(1.1)
    slow = Slow(7, max_len=6, **options)
    found = generate(decoder, grid, max_len=6, forced=slow.phrases, **{k: v for k, v in options.items() if k != 'phrases'})
    for hypotheses, g in zip(found, grid): compare(hypotheses, slow.beam(predictor(decoder, g)))


# --- what is promised of the result
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), width=st.integers(1, 6), max_len=st.integers(1, 9), length_norm=st.floats(0, 1.5), data=st.data())
def test_one_image_or_many_leaving_early_or_staying(seed, width, max_len, length_norm, data):
    decoder, grid = toy(seed, 9, images=5)
    groups = data.draw(st.sampled_from([g for g in range(1, width + 1) if width % g == 0]))
    options = dict(width=width, max_len=max_len, length_norm=length_norm, n_best=data.draw(st.integers(1, width)), attention=True,
                   groups=groups, min_len=data.draw(st.integers(0, max_len)))
    together = generate(decoder, grid, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Beam, 'leave', lambda self: None)         # nobody stops before the maximum length
        staying = generate(decoder, grid, **options)
    for i, hypotheses in enumerate(together):
        alone, = generate(decoder, grid[i:i+1], **options)
        for other in (alone, staying[i]):
            for a, b in zip(hypotheses, other, strict=True):
                assert a.tokens == b.tokens and a.finished == b.finished and a.score == pytest.approx(b.score, abs=1e-9)
                torch.testing.assert_close(a.attention, b.attention, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), width=st.integers(1, 5), max_len=st.integers(1, 8), **RANKS)
def test_what_is_reported_is_what_the_decoder_says(seed, width, max_len, penalty, length_norm):
    decoder, grid = toy(seed, 8, images=3)
    for g, hypotheses in zip(grid, generate(decoder, grid, width, max_len, length_norm, n_best=width, attention=True, penalty=penalty)):
        assert 1 <= len(hypotheses) <= width and len({tuple(h.tokens) for h in hypotheses}) == len(hypotheses)
        assert hypotheses == sorted(hypotheses, key=lambda h: (not h.finished, -h.score))
        for h in hypotheses:
            full, predict = h.tokens + [END]*h.finished, predictor(decoder, g)
            assert len(full) == max_len or h.finished and len(full) <= max_len
            assert not {PAD, START, END} & set(h.tokens)
            assert h.logprobs == pytest.approx([predict(tuple(full[:t]))[w] for t, w in enumerate(full)], abs=1e-6)
            assert h.logprob == pytest.approx(sum(h.logprobs), abs=1e-6)
            assert h.score == pytest.approx(h.logprob/length_penalty(len(full), length_norm, penalty), abs=1e-9)
            _, look = decoder(decoder.encode(g[None]), torch.tensor([[START, *h.tokens]]))
            torch.testing.assert_close(h.attention, look[0, :len(h.tokens)].detach().float(), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_beam_of_five_finds_what_is_at_least_as_probable_as_greedy_does():
    for vocab, sharp in ((8, 1.), (60, 1.), (400, .7)):
        decoder, grid = toy(3, vocab, images=200, sharp=sharp)
        mean = [sum(h[0].logprob for h in generate(decoder, grid, width, 12, length_norm=0.))/200 for width in (1, 5)]
        assert mean[1] > mean[0] + .01


def test_large_vocabularies_are_searched_by_chunks():
    decoder, grid = toy(5, 3000, images=3, sharp=1.)
    slow = Slow(3000, width=5, max_len=4, n_best=5, banned=(17, 40))
    found = generate(decoder, grid, 5, 4, n_best=5, banned=(17, 40))
    for hypotheses, g in zip(found, grid): compare(hypotheses, slow.beam(predictor(decoder, g)))


# --- work and memory
def test_an_image_is_encoded_once_and_its_memory_is_shared():
    decoder, grid = toy(0, 9, images=4)
    generate(decoder, grid, 6, 5, banned=[END])
    assert decoder.calls == 1 and decoder.sizes == {4} and decoder.rows == [4, 24, 24, 24, 24]


class Fixed(Decoder):
    "Next-word probabilities that depend on the last word"
    def __init__(self, vocab_size=5, grid_dim=1, table=None):
        super().__init__(vocab_size, grid_dim)
        self.table, self.rows = nn.Parameter(torch.as_tensor(table, dtype=torch.float).log()), []
    def encode(self, grid): return dict(image=grid.mean((1, 2))[:, None])
    def step(self, token, state, memory, attention=True):
        self.rows.append(len(token))
        return self.table[token], None, {}


def test_finished_images_leave_the_batch():
    "Image by image the rows become fewer"
    class Stops(Fixed):
        def step(self, token, state, memory, attention=True):
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


def test_no_tensor_is_made_on_another_device():
    "Every new tensor that does not say where it belongs lands on the meta device here, and cannot be used with the others"
    for options in (dict(width=4), dict(width=4, groups=2, trace=True), dict(width=3), dict(width=1)):
        decoder, grid = toy(0, 700, images=3)
        rules = Rules(Constraints(6, 2, (3,), (4, 5), 2, forced={0: [7, [8, 9]]} if options['width'] == 3 else ()), 700, 3)
        with evaluating(decoder):
            beam = Beam(3, rules, like=grid, **options)
            with torch.device('meta'): _search(decoder, grid, beam, True)
            assert len(beam.hypotheses()[0]) == 1


def test_low_precision_is_searched_in_float32():
    decoder, grid = AttentionDecoder(50, 5, embed_dim=4, hidden_dim=6, attention_dim=4), torch.randn(3, 4, 5)
    with torch.autocast('cpu', torch.bfloat16): found = generate(decoder, grid, 3, 30, attention=True, banned=[END])
    for h, in found:
        assert h.attention.dtype == torch.float32 and h.logprob == pytest.approx(sum(h.logprobs), abs=1e-4)
        assert h.logprob != torch.tensor(h.logprob).bfloat16().item()       # it has not been rounded
    low = toy(0, 9)[0].bfloat16(), toy(0, 9)[1].bfloat16()
    assert len(generate(*low, 4)[0][0].logprobs) >= 1


# --- constraints in whole captions
@none_lost
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), width=st.integers(1, 5), words=st.sets(st.integers(3, 8), min_size=1, max_size=4))
def test_forced_words_come_at_any_width(seed, width, words):
    decoder, grid = toy(seed, 9, images=2)
    for h, in generate(decoder, grid, width, max_len=6, forced=sorted(words)): assert words <= set(h.tokens)


@pytest.mark.filterwarnings('ignore:no caption')                # a narrow beam may end where every word is a repetition
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), width=st.integers(1, 5), groups=st.integers(1, 2))
def test_rules_hold_together(seed, width, groups):
    decoder, grid = toy(seed, 12, images=3)
    rules = dict(min_len=4, no_repeat=2, banned=[3], bad_endings=[4, 5], forced=[[7, 4]])
    for hypotheses in generate(decoder, grid, width*groups, max_len=9, n_best=width*groups, groups=groups, **rules):
        for h in hypotheses:
            if h.score == -torch.inf: continue
            assert len(h.tokens) >= 4 and 3 not in h.tokens and h.tokens[-1] not in (4, 5)
            pairs = [*zip(h.tokens, h.tokens[1:])]
            assert (7, 4) in pairs and len(set(pairs)) == len(pairs)


def test_a_longer_caption_overtakes_a_shorter_one():
    "<end> is the best first word, but a certain long caption has the better mean: the search may not stop at once"
    table = [[.2]*5, [1e-9, 1e-9, .5, .3, .2], [.2]*5, [1e-9, 1e-9, 1e-9, 1e-9, 1.], [1e-9, 1e-9, .9, 1e-9, .1]]
    decoder, grid = Fixed(table=table), torch.zeros(1, 1, 1)
    best = generate(decoder, grid, width=2, length_norm=1., max_len=6)[0][0]
    assert best.tokens == [3, 4] and best.finished
    assert generate(decoder, grid, width=2, length_norm=0., max_len=6)[0][0].tokens == []


def test_groups_bring_other_captions():
    decoder, grid = toy(1, 30, images=20, sharp=1.)
    def first_words(**options):
        return sum(len({h.tokens[0] for h in hs if h.tokens}) for hs in generate(decoder, grid, 6, 8, n_best=6, **options))
    assert first_words(groups=6, diversity=3.) > first_words() + 20


# --- the trace
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(1, 4), groups=st.integers(1, 2), max_len=st.integers(1, 6), forced=PHRASES)
def test_the_trace_is_the_search(seed, size, groups, max_len, forced):
    decoder, grid = toy(seed, 8, images=3)
    options = dict(width=size*groups, groups=groups, max_len=max_len + 3, n_best=size*groups, forced=forced)
    for g, hypotheses, other in zip(grid, generate(decoder, grid, trace=True, **options), generate(decoder, grid, **options)):
        assert hypotheses == other and other[0].trace is None
        trace, predict, steps = hypotheses[0].trace, predictor(decoder, g), {}
        captions = [tuple(trace.nodes[n].token for n in trace.path(i)) for i in range(len(trace.nodes))]
        for node, caption in zip(trace.nodes[1:], captions[1:]):
            assert trace.nodes[node.parent].state == 'kept' and node.step == len(caption) == trace.nodes[node.parent].step + 1
            assert (node.state == 'dropped') or (node.state == 'finished') == (node.token == END)
            assert node.logprob == pytest.approx(sum(predict(caption[:t])[w] for t, w in enumerate(caption)), abs=1e-9)
            if node.state != 'dropped': steps.setdefault((node.step, node.group), []).append(node)
        assert all(len(nodes) <= size for nodes in steps.values())
        finished = {c[:-1] for c, n in zip(captions, trace.nodes) if n.state == 'finished'}
        assert {tuple(h.tokens) for h in hypotheses if h.finished} <= finished
        if groups == 1 and not forced:
            for node in trace.nodes:
                if node.state == 'dropped': assert all(node.logprob <= n.logprob for n in steps[node.step, 0])


def test_the_trace_can_be_read():
    table = [[.2]*5, [1e-9, 1e-9, .1, .5, .4], [.2]*5, [1e-9, 1e-9, .3, .1, .6], [1e-9, 1e-9, 1., 1e-9, 1e-9]]
    trace = generate(Fixed(table=table), torch.zeros(1, 1, 1), width=2, length_norm=0., trace=True)[0][0].trace
    words = '<pad> <start> <end> a b'.split()
    assert trace.text(words) == '<start>  0.00\n├ a b  -1.20\n└ b <end>  -0.92 ■ -0.92'
    assert '│ ├ b  -1.20\n│ └ <end>  -1.90 ✗\n└ b  -0.92\n  ├ <end>  -0.92 ■ -0.92' in trace.text(words, dropped=True)


# --- strange decoders
@pytest.mark.parametrize('options', [dict(), dict(width=4, n_best=2), dict(width=4, groups=2), dict(width=3, forced=[4]),
                                     dict(width=3, trace=True), dict(width=3, min_len=2, no_repeat=2, bad_endings=[3])], ids=str)
def test_strange_decoders_get_a_clear_answer(options):
    decoder, grid = Strange(7), torch.randn(7, 4, 3, dtype=torch.float64)
    grid[:, 0, 0] = torch.arange(7.)
    with pytest.warns(UserWarning, match=r'no caption for the images \[0, 1, .*5\] of this batch') as seen:
        found = generate(decoder, grid, max_len=6, length_norm=0., attention=True, **options)
    assert len(seen) == 1 and seen[0].filename == __file__
    for i in (0, 1, 5): assert found[i] == [Hypothesis([], -torch.inf, -torch.inf, False)]
    if not {'min_len', 'forced'} & set(options): assert found[2][0].tokens == [] and found[2][0].finished and found[2][0].logprob == 0
    assert len(found[3][0].tokens) == 6 and not found[3][0].finished
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        alone, = generate(Toy(7), grid[6:], max_len=6, length_norm=0., attention=True, **options)
    assert found[6] == alone


@none_lost
def test_it_always_returns_a_caption():
    decoder, grid = toy(0)
    for hypotheses in generate(decoder, grid, 3, 5, banned=[END]):
        assert len(hypotheses[0].tokens) == 5 and not hypotheses[0].finished


@none_lost
def test_edges():
    decoder, grid = toy(0, images=3)
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
    decoder, grid = AttentionDecoder(9, 5, embed_dim=4, hidden_dim=6, attention_dim=4, dropout=.9), torch.randn(2, 4, 5)
    decoder.eval()
    expected = generate(decoder, grid, 3)
    decoder.train()
    assert [h[0].tokens for h in generate(decoder, grid, 3)] == [h[0].tokens for h in expected] and decoder.training
    decoder.step = None
    with pytest.raises(TypeError): generate(decoder, grid, 2)
    assert decoder.training


@pytest.mark.parametrize('options, message', [
    (dict(width=0), 'width must be at least 1, got 0'), (dict(max_len=0), 'max_len must be at least 1, got 0'),
    (dict(n_best=0), 'n_best must be at least 1'), (dict(groups=0), 'groups must be at least 1'),
    (dict(width=2, n_best=3), 'n_best=3 hypotheses need a beam of at least that width, got width=2'),
    (dict(width=5, groups=2), 'width=5 cannot be divided into groups=2'), (dict(diversity=-1.), 'diversity must not be negative'),
    (dict(penalty='gmnt'), "unknown penalty 'gmnt'.*gnmt"), (dict(banned=[3], forced=[3]), 'word 3 is forced and banned'),
    (dict(banned=[2, 3, 4, 5]), 'all 6 words of the vocabulary are banned'), (dict(min_len=21), 'min_len=21 words do not fit'),
    (dict(banned=[6, 3]), r'ids \[6\] are not in the vocabulary of 6'),
    (dict(banned=[-1]), r'ids \[-1\] are not in the vocabulary'), (dict(end_id=9), r'ids \[9\] are not in the vocabulary')])
def test_bad_arguments_are_named(options, message):
    decoder, grid = toy(0)
    with pytest.raises(ValueError, match=message): generate(decoder, grid, **options)


def test_bad_grids_are_named():
    decoder, grid = toy(0)
    with pytest.raises(ValueError, match=r'grid must have shape \(images, cells, 3\), got \(4, 3\)'): generate(decoder, grid[0])
    with pytest.raises(ValueError, match=r'got \(2, 4, 2\)'): generate(decoder, grid[..., :2])
    with pytest.raises(ValueError, match='2 grids for 1 decoders'): generate(decoder, [grid, grid])


def test_heads_are_kept_apart():
    class Heads(Fixed):
        def step(self, token, state, memory, attention=True): return self.table[token], torch.rand(len(token), 2, 3), {}
    decoder = Heads(table=torch.full((5, 5), .2))
    h = generate(decoder, torch.zeros(2, 1, 1), 2, 4, attention=True)[1][0]
    assert h.attention.shape == (len(h.tokens), 2, 3)
