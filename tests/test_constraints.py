"""Constraints: what is refused, which words they forbid, and the automaton of forced phrases."""
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from caption_nb.constraints import MAX_STATES, Constraints, Forced, Rules, automaton, repeats, top_words
from slow_search import Slow, begun, missing

pytestmark = pytest.mark.usefixtures('one_thread')


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 4), vocab=st.integers(1, 3000), k=st.integers(1, 9), seed=st.integers(0, 99))
def test_top_words_is_topk(rows, vocab, k, seed):
    x = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[x < .1] = -torch.inf
    for ours, theirs in zip(top_words(x, k), x.topk(min(k, vocab))):
        if vocab > 50: assert torch.equal(ours, theirs)
        else: assert torch.equal(x.gather(1, top_words(x, k)[1]), x.topk(min(k, vocab)).values)     # equal -inf have no order


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 4))
def test_repeats_are_found_in_all_rows(data, n):
    t = data.draw(st.integers(n, 9))
    prefix = data.draw(st.lists(st.lists(st.integers(3, 5), min_size=t, max_size=t), min_size=1, max_size=4))
    for row, found in zip(prefix, repeats(torch.tensor(prefix), n).tolist()):
        runs = [tuple(row[i:i + n]) for i in range(t - n + 1)]
        assert set(found) - {0} == {w for w in (3, 4, 5) if (*row[t - n + 1:], w) in runs}


@settings(max_examples=40, deadline=None)
@given(phrases=st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=2, unique=True),
       caption=st.lists(st.integers(3, 6), max_size=6).map(tuple), bad=st.sampled_from([(), (3, 4)]))
def test_the_automaton_knows_what_is_missing(phrases, caption, bad):
    words, table, far, met = automaton(phrases, bad)
    state = 0
    for w in caption: state = table[state, words.index(w) if w in words else -1].item()
    assert far[state] == missing(caption, tuple(phrases), bad)
    if all(begun(caption, p) < len(p) for p in phrases): assert met[state] == sum(begun(caption, p) for p in phrases)
    assert (far[state] == 0) == (met[state] == sum(map(len, phrases)))


@settings(max_examples=100, deadline=None)
@given(caption=st.lists(st.integers(3, 5), max_size=5).map(tuple), min_len=st.integers(0, 4), no_repeat=st.integers(0, 3),
       banned=st.sampled_from([(), (3,), (2,)]), bad=st.sampled_from([(), (3, 4), (5,)]), room=st.integers(1, 3))
def test_the_mask_is_the_plain_definition(caption, min_len, no_repeat, banned, bad, room):
    slow = Slow(6, 1, len(caption) + room, banned=banned, min_len=min_len, no_repeat=no_repeat, bad_endings=bad)
    assume(min_len <= slow.max_len and all(slow.possible(caption[:i + 1]) for i in range(len(caption))))
    try: rules = Rules(Constraints(slow.max_len, min_len, banned, bad, no_repeat), 6, 1)
    except ValueError: return assume(False)
    prefix = torch.tensor([caption], dtype=torch.long)
    last = prefix[:, -1] if caption else torch.tensor([1])
    mask = rules.mask(torch.zeros(1, 6), len(caption) + 1, last, prefix)
    assert mask[0].isfinite().nonzero().flatten().tolist() == sorted(slow.children(caption))


def test_padding_between_images_changes_nothing():
    "Images with many forced words and with none have tables of one size; each keeps its own automaton"
    c = Constraints(forced={0: [3, [4, 5, 4]], 2: [6]})
    f = Forced(c, 3)
    for i in range(3):
        words, table, far, met = automaton(c.phrases(i))
        s = len(table)
        assert f.words[i, :len(words)].tolist() == words and (f.words[i, len(words):] == c.pad_id).all()
        assert torch.equal(f.table[i, :s, -1], table[:, -1]) and torch.equal(f.table[i, :s, :len(words)], table[:, :-1])
        assert torch.equal(f.missing[i, :s], far) and torch.equal(f.met[i, :s], met) and f.banks[i] == met.max() + 1


@pytest.mark.parametrize('options, message', [
    (dict(max_len=0), 'max_len must be at least 1, got 0'), (dict(min_len=-1), 'min_len must be at least 0, got -1'),
    (dict(no_repeat=-1), 'no_repeat must be at least 0'), (dict(min_len=5, max_len=4), 'min_len=5 words do not fit into max_len=4'),
    (dict(banned=[2, 3, 4, 5]), 'all 6 words of the vocabulary are banned'), (dict(banned=[3, 4, 5], min_len=1), 'all words are banned'),
    (dict(banned=[6, 3]), r'ids \[6\] are not in the vocabulary of 6'), (dict(bad_endings=[-2]), r'ids \[-2\] are not in'),
    (dict(bad_endings=[3, 4, 5], min_len=1), 'every word that is not banned is a bad ending'),
    (dict(bad_endings=[3, 4], banned=[5, 2]), 'every word that is not banned is a bad ending'),
    (dict(no_repeat=1, min_len=4), 'with 3 words and no_repeat=1 a caption has at most 3'),
    (dict(no_repeat=2, max_len=11, banned=[2]), 'with 3 words and no_repeat=2 a caption has at most 10'),
    (dict(forced=[9]), 'forced word 9 is not in the vocabulary of 6'), (dict(forced=[[3, 2]]), 'special token 2 is forced'),
    (dict(forced=[3], banned=[3]), 'word 3 is forced and banned'), (dict(forced=[[]]), 'empty phrase'),
    (dict(forced=[[3, 4, 3, 4]], no_repeat=2), r'\[3, 4, 3, 4\] repeats 2 words, which no_repeat=2 forbids'),
    (dict(forced=[3, 4, 5], max_len=2), r'\[\[3\], \[4\], \[5\]\] need 3 words, max_len=2'),
    (dict(forced=[3, 4], bad_endings=[3, 4], max_len=2), 'need 3 words'), (dict(forced=['dog']), 'got text'),
    (dict(forced='dog'), 'got text'), (dict(forced={7: [3]}), r'images \[7\], but there are 2 images'),
    (dict(forced={1: [9]}), 'forced word 9')])
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message): Rules(Constraints(**options), 6, 2)


def test_too_many_forced_phrases_are_refused_quickly():
    with pytest.raises(ValueError, match=f'13 forced phrases are too many: they make over {MAX_STATES}'):
        Rules(Constraints(forced=range(3, 16)), 50, 1)
    Rules(Constraints(forced=range(3, 11)), 50, 1)


@pytest.mark.parametrize('options', [dict(no_repeat=1, min_len=3), dict(no_repeat=2, max_len=10, banned=[2]), dict(min_len=4, max_len=4),
                                     dict(forced=[[3, 4], [4, 5]], max_len=3), dict(bad_endings=[3, 4, 5]), dict(banned=[3, 4, 5])])
def test_what_can_just_be_is_not_refused(options): Rules(Constraints(**options), 6, 2)


def test_a_longest_caption_without_repeats_exists():
    "The bound that is refused above is sharp: a de Bruijn word of three letters and runs of two has ten letters"
    def new(w): return len({*zip(w, w[1:])}) == len(w) - 1
    def grow(w): return [x for c in 'abc' if new(w + c) for x in grow(w + c)] or [w]
    assert max(map(len, grow('a'))) == 3**2 + 2 - 1
