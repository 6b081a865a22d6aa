"""Metrics: equal to the original tools, on recorded scores and on odd captions made at random; wrong input is named."""
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb.metrics import CiderD, lcs_length, score, score_tokens

DATA = Path(__file__).parent/'data'
NAMES = ['Bleu_1', 'Bleu_2', 'Bleu_3', 'Bleu_4', 'ROUGE_L', 'CIDEr']


def check_recorded(sets: dict):
    for name, recorded in sets.items():
        ours = [score(recorded['hyps'], recorded['refs']), score(recorded['tok_hyps'], recorded['tok_refs'], tokenizer='whitespace')]
        for s in ours:
            assert list(s.corpus) == NAMES and list(s.per_image) == list(recorded['refs'])
            for k in NAMES:
                assert s.corpus[k] == pytest.approx(recorded['corpus'][k], abs=1e-9, rel=0), (name, k)
                for i, expected in recorded['per_image'].items(): assert abs(s.per_image[i][k] - expected[k]) < 1e-9, (name, i, k)


def test_recorded_scores_of_the_original_tools(): check_recorded(json.loads((DATA/'caption_scores_committable.json').read_text()))


def test_recorded_scores_of_real_captions(shared): check_recorded(json.loads((shared/'reference'/'caption_scores.json').read_text()))


def original(hypotheses: list[str], references: list[list[str]]) -> dict[str, np.ndarray]:
    "pycocoevalcap's corpus score, then the scores by image, from the words joined by spaces"
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    refs, hyps = dict(enumerate(references)), {i: [h] for i, h in enumerate(hypotheses)}
    corpus, each = Bleu(4).compute_score(refs, hyps, verbose=0)
    result = {f'Bleu_{n}': np.array([corpus[n - 1], *each[n - 1]]) for n in range(1, 5)}
    for name, tool in (('ROUGE_L', Rouge), ('CIDEr', Cider)):
        try: corpus, each = tool().compute_score(refs, hyps)
        except ValueError: corpus, each = 0., np.zeros(len(refs))   # its CIDEr takes the maximum of no document frequencies at all
        result[name] = np.array([corpus, *each])
    return result


def check(hypotheses: list[str], references: list[list[str]]):
    def words(caption): return caption.split(' ') if caption else []
    corpus, each = score_tokens([words(h) for h in hypotheses], [[words(r) for r in rs] for rs in references])
    expected = original(hypotheses, references)
    for k in NAMES: np.testing.assert_allclose([corpus[k], *each[k]], expected[k], atol=1e-9, rtol=0, err_msg=k)


words = st.sampled_from(['a', 'b', 'c', 'd', 'dog', 'é', '日本', '🙂', '3\xa01/2', 'x\u2003y'])
captions = st.lists(words, max_size=14).map(' '.join)
sets = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=20)), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(sets)
def test_random_captions_score_as_with_the_original(items): check([h for h, _ in items], [rs for _, rs in items])


@pytest.mark.parametrize('items', [
    [('', [''])], [('', ['a b'])], [('a b', [''])], [('', ['']), ('', [''])], [('a', ['a'])], [('a', ['b']), ('b', ['a'])],
    [('a b c', ['a b c'])]*3, [('a b c d e', ['a b c d e']), ('x', ['y'])], [('a a a a a a', ['a', 'a a a b b b b'])]*2,
    [('a b', ['a', 'a b c'])]*2,                                    # two references equally near: the shorter counts
    [(' '.join('abcdefgh'*8), ['a b'])]*2, [(' '.join('abcdefgh'*8) + ' i', [' '.join('hgfedcba'*9)]), ('a', ['a b'])],   # 64 and 65 words
], ids=lambda items: items[0][0][:12] or 'empty')
def test_corner_cases_score_as_with_the_original(items): check([h for h, _ in items], [rs for _, rs in items])


def test_captions_of_a_thousand_words_score_as_with_the_original():
    rng = np.random.default_rng(0)
    def caption(size): return ' '.join(map(str, rng.integers(0, 60, size)))
    check([caption(n) for n in (1000, 64, 65, 3)], [[caption(n) for n in sizes] for sizes in ((900, 5), (64, 1000), (65, 130), (200,))])


def test_more_words_than_sixteen_bits_can_number_are_sorted_in_two_passes():
    from caption_nb.metrics import _by_word
    many = [str(k) for k in range(70_000)]
    hyps = [' '.join(many[k:k + 1000]) for k in range(0, len(many), 1000)]
    check(hyps, [[f'a {k} 5 69998 69999', f'{k} {k + 1} 65541'] for k in range(0, len(many), 1000)])
    words = np.random.default_rng(1).integers(0, 1 << 20, 1000)
    np.testing.assert_array_equal(_by_word(words), np.argsort(words, kind='stable'))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from('abcd'), max_size=90), st.lists(st.sampled_from('abcd'), max_size=90))
def test_lcs_length(a, b):
    row = [0]*(len(b) + 1)
    for x in a:
        new = [0]
        for j, y in enumerate(b): new.append(row[j] + 1 if x == y else max(row[j + 1], new[j]))
        row = new
    assert lcs_length(a, b) == row[-1]


def test_known_values():
    s = score({1: 'a b c', 2: 'x'}, {1: ['a b c'], 2: ['y z']}, tokenizer='whitespace')
    assert s.per_image[1]['Bleu_4'] == pytest.approx(0.0316, abs=1e-4)          # perfect, but three words long
    assert score({1: 'a b c d'}, {1: ['a b c d']}).corpus['CIDEr'] == 0          # N = 1: every weight is log 1
    two = score({1: 'a b c d', 2: 'w x y z'}, {1: ['a b c d'], 2: ['w x y z']})
    assert two.corpus['CIDEr'] == pytest.approx(10) and two.corpus['Bleu_4'] == pytest.approx(1)


def test_special_and_odd_ids_and_order_are_kept():
    refs = {('a', 1): ['a dog'], 7: ['a cat', 'cats'], 'x': ['']}
    s = score({7: 'a cat', 'x': '', ('a', 1): 'a dog'}, refs)
    assert list(s.per_image) == list(refs) and s.per_image[7]['Bleu_2'] == pytest.approx(1)


def test_signature_says_how_the_scores_were_made():
    s = score({1: 'a dog', 2: 'a cat'}, {1: ['a dog'], 2: ['a cat', 'cats', 'a pet']})
    assert s.signature.startswith('caption_nb ') and '|BLEU,ROUGE_L,CIDErD|tok=ptb|refs=1-3|df=these 2 images|eos=no|images=2|set=' in s.signature
    assert s.signature in str(s) and 'Bleu_4' in str(s)
    assert 'tok=whitespace|refs=1|' in score({1: 'a'}, {1: ['a']}, tokenizer='whitespace').signature


@pytest.mark.parametrize('hypotheses, references, message', [
    ({}, {1: ['a']}, 'no hypothesis for 1'),
    ({i: 'a' for i in range(2)}, {i: ['a'] for i in range(9)}, r'no hypothesis for 2, 3, 4 and 4 more \(of 9 images\)'),
    ({1: 'a', 2: 'a', 3: 'b'}, {1: ['a']}, 'hypotheses for images that have no references: 2, 3'),
    ({1: 'a'}, {'1': ['a']}, 'ids are int in hypotheses, str in references'),
    ({1: 'a'}, {1: []}, '1 has no references'),
    ({}, {}, 'there are no references'),
    ({1: ['a']}, {1: ['a']}, 'the hypothesis for 1 must be one string, not list'),
    ({1: None}, {1: ['a']}, 'the hypothesis for 1 must be one string, not NoneType'),
    ({1: 'a'}, {1: 'a dog'}, 'the references of 1 must be a list of strings, not str'),
    ({1: 'a'}, {1: None}, 'the references of 1 must be a list of strings, not NoneType'),
    ({1: 'a'}, {1: ['a', 3]}, 'a reference of 1 must be a string, not int: 3'),
    (['a'], {1: ['a']}, 'hypotheses must be a dict by image id, not list'),
    ({1: 'a'}, [['a']], 'references must be a dict by image id, not list'),
])
def test_wrong_input_is_named(hypotheses, references, message):
    with pytest.raises((ValueError, TypeError), match=message): score(hypotheses, references)


def test_misspelt_tokenizer_is_named():
    with pytest.raises(ValueError, match="did you mean 'spacy'"): score({1: 'a'}, {1: ['a']}, tokenizer='spacey')


# ---- CIDEr-D with fixed document frequencies

def plain_reward(hyp, refs, df, N):
    "The formula, written down as plainly as possible"
    def vector(words, n):
        grams = Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))
        return {g: tf*(math.log(N) - math.log(max(1, df.get(g, 0)))) for g, tf in grams.items()}
    total = 0.
    for ref in refs:
        delta = max(0, len(hyp) - 1) - max(0, len(ref) - 1)
        for n in range(1, 5):
            h, r = vector(hyp, n), vector(ref, n)
            norm = math.sqrt(sum(v*v for v in h.values()))*math.sqrt(sum(v*v for v in r.values()))
            dot = sum(min(v, r.get(g, 0))*r.get(g, 0) for g, v in h.items())
            total += (dot/norm if norm else dot)*math.exp(-delta**2/72)
    return 10*total/4/len(refs)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([None, '<end>']))
def test_rewards_follow_the_formula(data, end):
    word = st.sampled_from('abcdefg')
    refs = data.draw(st.lists(st.lists(st.lists(word, max_size=8), min_size=1, max_size=4), min_size=1, max_size=6))
    row = st.tuples(st.integers(0, len(refs) - 1), st.lists(st.sampled_from('abcdefgxyz'), max_size=9), st.booleans())
    rows = data.draw(st.lists(row, max_size=8))
    reward = CiderD(dict(enumerate(refs)), end=end)
    marked = [[r + [end] for r in rs] if end else rs for rs in refs]
    df = Counter(g for rs in marked for g in {tuple(r[i:i + n]) for r in rs for n in range(1, 5) for i in range(len(r) - n + 1)})
    ours = reward([i for i, _, _ in rows], [h for _, h, _ in rows], [f for _, _, f in rows])
    expected = [plain_reward(h + [end] if end and f else h, marked[i], df, len(refs)) for i, h, f in rows]
    np.testing.assert_allclose(ours, expected, atol=1e-9)


def test_rewards_equal_scores_when_the_set_is_the_same():
    refs = {i: [f'a {c} dog runs', f'the {c} dog is here'] for i, c in enumerate(['red', 'blue', 'big', 'old'])}
    hyps = {i: f'a {c} dog is here' for i, c in enumerate(['red', 'big', 'big', 'zebra'])}
    reward = CiderD(refs, end=None)
    expected = [s['CIDEr'] for s in score(hyps, refs).per_image.values()]
    np.testing.assert_allclose(reward(list(refs), [h.split() for h in hyps.values()]), expected, atol=1e-12)
    before = len(reward.ids)
    reward([0], [['never', 'seen', 'before']])
    assert len(reward.ids) == before                                             # looking words up does not grow the table


def test_rewards_take_ids_of_words():
    reward = CiderD({'a': [[4, 5, 6]], 'b': [[7, 8, 9]]}, end=2)
    np.testing.assert_allclose(reward(['a', 'b', 'a'], [[4, 5, 6], [7, 8, 9], [9, 9]]), [10, 10, 0], atol=1e-12)
    assert reward([], []).shape == (0,) and reward.signature.endswith('CIDErD|tok=ptb|refs=1|df=2 training images|eos=yes')
    assert CiderD({'a': [[4]]}, end=None).signature.endswith('eos=no')


def test_rewards_name_wrong_input():
    with pytest.raises(ValueError, match='no references'): CiderD({})
    with pytest.raises(ValueError, match="'a' needs a list"): CiderD({'a': 'a dog'})
    with pytest.raises(ValueError, match="'a' needs a list"): CiderD({'a': []})
    with pytest.raises(ValueError, match="no references for 'z'"): CiderD({'a': ['a dog']})(['z'], [['a']])
    with pytest.raises(ValueError, match='2 ids but 1 hypotheses'): CiderD({'a': ['a dog']})(['a', 'a'], [['a']])
