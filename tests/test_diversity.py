"""Diversity of sets of captions: counted by hand, at the extremes, and against the formulas."""
import json
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb.diversity import describe, distinct, fragment_share, mutual_bleu, repetition, self_cider
from caption_nb.text import Vocab

words = st.lists(st.sampled_from('a dog the cat runs on'.split()), max_size=7)


def test_fragments_of_text_and_of_words():
    assert fragment_share([]) == fragment_share(['', '  ', []]) == 0
    captions = ['a dog with a', 'a dog', 'the sea and', 'a boat on']
    assert fragment_share(captions) == fragment_share([c.split() for c in captions]) == fragment_share(iter(captions)) == .75


def test_ngrams_by_hand():
    captions = ['a b a b'.split(), 'a b'.split(), []]
    assert (distinct(captions, 1), distinct(captions, 2), distinct(captions, 4)) == (2/6, 2/4, 1)
    assert (repetition(captions, 1), repetition(captions, 2), repetition(captions, 5)) == (2/6, 1/4, 0)


@given(st.lists(words, min_size=1, max_size=6), st.integers(1, 4))
def test_shares_are_shares(captions, n):
    assert 0 <= distinct(captions, n) <= 1 and 0 <= repetition(captions, n) <= 1
    assert distinct([[*'abcdefgh'][:n]], n) == 1 and repetition([[*'abcdefgh']], n) == 0


def test_self_cider_of_the_extremes():
    same, other = ['a b c d'.split()]*4, [['abcdefghijklmnopqrstuvwxyz'[4*k + j] for j in range(4)] for k in range(4)]
    assert self_cider([same, other]) == pytest.approx([0, 1], abs=1e-6)
    assert self_cider([same]) == pytest.approx([0], abs=1e-6)
    assert self_cider([[[], []]]) == pytest.approx([0], abs=1e-6)
    assert self_cider([[['a'], ['a']]], documents=[[['a']]]*5) == pytest.approx([0], abs=1e-6)    # a word of every image


def plain_self_cider(group: list, N: int, df: dict) -> float:
    "The same by singular values, written without the library's kernel"
    K = np.zeros((len(group),)*2)
    for n in range(1, 5):
        grams = [[tuple(w[i:i + n]) for i in range(len(w) - n + 1)] for w in group]
        every = sorted({g for gs in grams for g in gs})
        values = np.array([[gs.count(g)*log((1 + N)/max(1, df.get(g, 0))) for g in every] for gs in grams]).reshape(len(group), -1)
        for i, j in np.ndindex(K.shape):
            norms = np.sqrt((values[i]**2).sum()*(values[j]**2).sum())
            K[i, j] += values[i]@values[j]/norms/4 if norms else 0
    s = np.sqrt(np.linalg.svd(K)[1])
    return -log(s.max()/s.sum())/log(len(group))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(words.filter(bool), min_size=2, max_size=4), min_size=1, max_size=4))
def test_self_cider_follows_the_formula(groups):
    df: dict = {}
    for group in groups:
        for g in {tuple(w[i:i + n]) for w in group for n in range(1, 5) for i in range(len(w) - n + 1)}: df[g] = df.get(g, 0) + 1
    found = self_cider(groups)
    assert found == pytest.approx([plain_self_cider(g, len(groups), df) for g in groups], abs=1e-4)
    assert (found >= -1e-9).all() and (found <= 1 + 1e-9).all()
    assert self_cider([g[::-1] for g in groups]) == pytest.approx(found, abs=1e-4)                # the order of captions is no matter


def test_mutual_bleu():
    assert mutual_bleu([['a b c d e'.split()]*3])['Bleu_4'] == pytest.approx(1)
    assert mutual_bleu([[['a', 'b'], ['a', 'c']]])['Bleu_1'] == pytest.approx(.5)
    assert list(mutual_bleu([[['a'], ['b']]])) == ['Bleu_1', 'Bleu_2', 'Bleu_3', 'Bleu_4']


@pytest.mark.parametrize('measure', [self_cider, mutual_bleu])
def test_one_caption_cannot_be_compared(measure):
    with pytest.raises(ValueError, match='image 1 has 1'): measure([[['a'], ['b']], [['a']]])
    with pytest.raises(ValueError, match='there is no image'): measure([])


def test_description():
    captions = [c.split() for c in ('a dog runs', 'a dog runs', 'a cat on the', '')]
    d = describe(captions, train=[['a', 'dog', 'runs'], ['the', 'sea']], finished=[True, True, False, True])
    assert (d.captions, d.different, d.in_train, d.ended, d.fragments, d.empty) == (4, .75, .5, .75, 1/3, .25)
    assert (d.words, d.vocabulary, d.length, d.shortest, d.longest) == (6, 4/5, 2.5, 0, 4)        # a dog runs the, of those and sea
    assert d.lengths == {0: 1, 3: 2, 4: 1} and d.length_sd == pytest.approx(np.std([3, 3, 4, 0]))
    assert d.mbleu is d.self_cider is None
    several = describe(captions, several=[[['a'], ['b']]])
    assert several.self_cider == pytest.approx(1, abs=.3) and 'self-CIDEr' in str(several) and 'self-CIDEr' not in str(d)


def test_vocabulary_counts_words_only():
    vocab = Vocab.build(['a dog runs', 'a cat'], min_freq=1)
    assert describe([['a', 'dog', 'flies']], vocab=vocab).vocabulary == .5                        # a, dog of a, dog, runs, cat
    assert describe([['a']], vocab=['a', 'b']).vocabulary == .5
    assert describe([['a']]).vocabulary is None and describe([['a']], vocab=[]).vocabulary is None


def test_description_as_json_and_text():
    d = describe([['a', 'dog'], ['a']])
    assert json.loads(json.dumps(d.to_dict(), allow_nan=False)) == d.to_dict() and 'in_train' not in d.to_dict()
    assert d.to_dict()['lengths'] == {'1': 1, '2': 1}
    assert '2 captions, 100.0% different\n1.5 ± 0.5 words (1 to 2)' in str(d) and 'None' not in str(d)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match='no captions'): describe([])
    with pytest.raises(TypeError, match="lists of words, not text: 'a dog'"): describe([['a'], 'a dog'])
    with pytest.raises(ValueError, match='1 flags of finished captions for 2'): describe([['a'], ['b']], finished=[True])
