"""Metrics: equal to the original tools, on recorded scores and on odd captions made at random; wrong input is named."""
import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb.metrics import METRICS, CiderD, Signature, corpus_scores, same_signature, score, score_tokens

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


def odd_set(seed: int, pieces: list[str], lengths: tuple = (0, 0, 1, 1, 2, 3, 4, 5, 9, 14), long: float = .01) -> list[tuple]:
    "One to five images: hypothesis and 1–20 references, of few different pieces, empty, short, long, and seldom 1,000 words long"
    rng = random.Random(seed)
    known = rng.sample(pieces, rng.randint(1, min(12, len(pieces))))
    def caption(): return ' '.join(rng.choices(known, k=rng.choice(lengths)))
    items = [(caption(), [caption() for _ in range(rng.choice((1, 1, 2, 5, 20)))]) for _ in range(rng.randint(1, 5))]
    if rng.random() < long: items[0] = (' '.join(rng.choices(known, k=1000)), items[0][1][:2])
    return items


ODD_WORDS = ['a', 'b', 'dog', 'é', 'É', 'ß', '日本', '🙂', 'e\u0301', '3\xa01/2', 'x\u2003y', '\xa0', "'s", '-lrb-', '<unk>', 'o\x1fo', 'ﬁ',
             'नमस्ते']


@settings(max_examples=2000, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_two_thousand_odd_sets_score_as_with_the_original(seed):
    items = odd_set(seed, ODD_WORDS)
    check([h for h, _ in items], [rs for _, rs in items])


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


# ---- From raw strings, through the original's own tokeniser

def originally_tokenised(captions: list[str]) -> dict[str, str]:
    """Every caption as coco-caption tokenises it, in one call. Between any two stands an 'x': at the end of a line the original looks at
    the letters with which the next one starts, and takes the full stop of 'mr.' or 'a.' for one or the other"""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    found = PTBTokenizer().tokenize({c: [{'caption': c}, {'caption': 'x'}] for c in dict.fromkeys(captions)})
    assert all(len(v) == 2 and v[1] == 'x' for v in found.values()), 'the original lost or gained a line'
    return {c: v[0] for c, v in found.items()}


def check_raw(hypotheses: dict[str, str], references: dict[str, list[str]], words: dict[str, str]):
    ours = score(hypotheses, references)
    expected = original([words[h] for h in hypotheses.values()], [[words[r] for r in references[i]] for i in hypotheses])
    for k in NAMES:
        mine = [ours.corpus[k], *(ours.per_image[i][k] for i in hypotheses)]
        np.testing.assert_allclose(mine, expected[k], atol=1e-9, rtol=0, err_msg=k)


def like_a_model(rng: random.Random, own: str, neighbour: str) -> str:
    "A hypothesis as models make them: words of a reference, lost, doubled, exchanged for the neighbour's, and at times cut off in the air"
    others, words = neighbour.split(), [w for w in own.split() for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 1, 2)))]
    words = [rng.choice(others) if rng.random() < .2 else w for w in words]
    if rng.random() < .1: words = words[:rng.randint(0, 5)] + ['with', 'a']
    return ' '.join(words) if rng.random() > .02 else rng.choice(('', '.', 'a', '<unk>', words[0] if words else ''))


def test_captions_of_flickr8k_and_odd_strings_score_as_with_the_original_from_raw_text(flickr8k, java):
    pytest.importorskip('pycocoevalcap')
    images = json.loads((flickr8k/'dataset_flickr8k.json').read_text(encoding='utf-8'))['images']
    references = {i['filename']: [x['raw'] for x in i['sentences']] for i in images if i['split'] == 'val'}
    assert len(references) == 1000 and {len(rs) for rs in references.values()} == {5}
    rng, sets, ids = random.Random(0), [], list(references)
    neighbours = [references[i] for i in ids[1:] + ids[:1]]
    sets.append(({i: rng.choice(rs) for i, rs in zip(ids, neighbours)}, references))                       # those of another photo
    sets.append(({i: like_a_model(rng, rng.choice(references[i]), rng.choice(rs)) for i, rs in zip(ids, neighbours)}, references))
    sets.append(({i: rs[0] for i, rs in references.items()}, {i: rs[1:] for i, rs in references.items()}))   # a person's
    pieces = ['A dog', 'a man', "isn't", "the dog's", 'cannot', '(red)', '[b]', '"big"', "'quoted'", 'cat.', 'dogs,', ', ', '...', '-',
              '!!', '!?!', '£5', '€5', '½', '3 1/2', '12,000', '3:45', 'é', 'Ünder', '日本', '🙂', 'a\nb', '&amp;', 'at&t', "o'clock",
              't-shirt', 'u.s.', '; and', '<unk>']
    for seed in range(400):
        items = odd_set(seed, pieces, (0, 0, 1, 1, 2, 3, 5, 9), long=.02)
        sets.append(({str(k): h for k, (h, _) in enumerate(items)}, {str(k): rs for k, (_, rs) in enumerate(items)}))
    words = originally_tokenised([c for hs, refs in sets for i, h in hs.items() for c in (h, *refs[i])])
    for hypotheses, refs in sets: check_raw(hypotheses, refs, words)


def test_more_words_than_sixteen_bits_can_number_are_sorted_in_two_passes():
    from caption_nb.metrics import _by_word
    many = [str(k) for k in range(70_000)]
    hyps = [' '.join(many[k:k + 1000]) for k in range(0, len(many), 1000)]
    check(hyps, [[f'a {k} 5 69998 69999', f'{k} {k + 1} 65541'] for k in range(0, len(many), 1000)])
    words = np.random.default_rng(1).integers(0, 1 << 20, 1000)
    np.testing.assert_array_equal(_by_word(words), np.argsort(words, kind='stable'))


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
    assert s.signature.startswith('caption_nb ')
    assert '|BLEU,ROUGE_L,CIDErD|tok=ptb|refs=1-3|df=these 2 images|eos=no|images=2|set=' in s.signature
    assert s.signature in str(s) and 'Bleu_4' in str(s)
    assert 'tok=whitespace|refs=1|' in score({1: 'a'}, {1: ['a']}, tokenizer='whitespace').signature


def test_the_set_has_a_fingerprint_that_does_not_depend_on_order():
    def set_of(references): return Signature.parse(score({i: 'a' for i in references}, references).signature).parts['set']
    same = [{1: ['a', 'B'], 2: ['c']}, {2: ['c'], 1: ['B', 'a']}, {'2': ['c'], '1': ['a', 'B']}]
    other = [{1: ['a', 'b'], 2: ['c']}, {1: ['a', 'B'], 3: ['c']}, {1: ['a'], 2: ['B', 'c']}, {1: ['a', 'B', 'B'], 2: ['c']},
             {1: ['a', 'B']}, {1: ['a', '\ud800'], 2: ['c']}]
    assert len({set_of(r) for r in same}) == 1 and len({set_of(r) for r in [same[0], *other]}) == 7


def test_what_the_caller_knows_comes_into_the_signature():
    signature = Signature.parse(score({1: 'a'}, {1: ['a']}, about=dict(split='dev', beam=5)).signature)
    assert signature.parts['split'] == 'dev' and signature.parts['beam'] == '5'
    assert list(signature.parts)[:3] == ['scorer', 'metrics', 'tok']
    with pytest.raises(ValueError, match="about must not name refs, tok: score fills in .* itself"):
        score({1: 'a'}, {1: ['a']}, about=dict(refs=5, tok='ptb'))
    with pytest.raises(ValueError, match=r"no '\|'"): score({1: 'a'}, {1: ['a']}, about=dict(split='dev|test'))


part = st.text(st.characters(exclude_characters='|\n', exclude_categories=['Cs']), max_size=8)


@settings(max_examples=100, deadline=None)
@given(part, part, st.dictionaries(part.filter(lambda k: '=' not in k and k not in ('scorer', 'metrics')), part, max_size=4))
def test_signatures_are_read_as_they_were_written(scorer, metrics, more):
    signature = Signature(dict(scorer=scorer, metrics=metrics, **{}) | more)
    assert Signature.parse(str(signature)) == signature and hash(Signature.parse(str(signature))) == hash(signature)
    assert signature.differences(signature) == {}


def test_signatures_that_differ_are_not_mixed():
    base = 'caption_nb 0.1.0|BLEU,CIDErD|tok=ptb|refs=5|df=these 9 images|eos=no'
    assert str(same_signature({'a': base, 'b': Signature.parse(base)})) == base
    rows = {'a': base, 'b': base, 'c': base.replace('refs=5', 'refs=1'), 'd': base + '|beam=5'}
    with pytest.raises(ValueError) as e: same_signature(rows)
    assert 'refs: 5 in a, b, d; 1 in c\n' in str(e.value) and 'tok' not in str(e.value)
    assert 'beam: not noted in a, b, c; 5 in d\n' in str(e.value)
    assert Signature.parse(base).differences(Signature.parse(rows['d'])) == {'beam': (None, '5')}
    for wrong in ('', 'caption_nb', 'a|b|c'):
        with pytest.raises(ValueError, match='not a signature'): Signature.parse(wrong)
    with pytest.raises(ValueError, match='no scores'): same_signature({})


# ---- Statistics that add up, and the choice of metrics

def some_set(images: int, seed: int = 0) -> tuple[dict, dict]:
    rng = np.random.default_rng(seed)
    def caption(): return ' '.join(rng.choice(list('abcdefgh'), rng.integers(0, 12)))
    return {i: caption() for i in range(images)}, {i: [caption() for _ in range(rng.integers(1, 6))] for i in range(images)}


ALL = tuple(m for m in METRICS if m != 'meteor')


def test_scores_are_functions_of_summed_statistics():
    hypotheses, references = some_set(30)
    s = score(hypotheses, references, metrics=ALL)
    assert {k: v.shape for k, v in s.statistics.items()} == {'BLEU': (30, 10), 'ROUGE_L': (30, 2), 'CIDEr': (30, 2), 'CIDEr_plain': (30, 2)}
    assert {k: float(v) for k, v in corpus_scores({k: v.sum(0) for k, v in s.statistics.items()}).items()} == s.corpus
    for k, v in corpus_scores(s.statistics).items(): assert v.tolist() == [x[k] for x in s.per_image.values()]
    chosen = np.array([[3, 3, 7, 1], [0, 1, 2, 29]])                     # two multisets of images
    scores = corpus_scores({k: v[chosen].sum(1) for k, v in s.statistics.items()})
    for row, images in enumerate(chosen):
        again = score({k: hypotheses[i] for k, i in enumerate(images)}, {k: references[i] for k, i in enumerate(images)}).corpus
        for k in NAMES[:-1]: assert scores[k][row] == pytest.approx(again[k], abs=1e-12)      # all but CIDEr, whose weights are the set's
        assert scores['CIDEr'][row] == pytest.approx(np.mean([s.per_image[i]['CIDEr'] for i in images]))
    assert corpus_scores({'CLIPScore': np.array([[1.5, 2], [.6, 1]])})['CLIPScore'].tolist() == [.75, .6]


def test_statistics_of_bleu_are_counts():
    s = score({1: 'a b c d x', 2: 'y'}, {1: ['a b c d', 'a b c d e f'], 2: ['z']})
    assert s.statistics['BLEU'].tolist() == [[4, 3, 2, 1, 5, 4, 3, 2, 5, 4], [0, 0, 0, 0, 1, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize('metrics, names, signed', [
    (('cider', 'bleu'), ['Bleu_1', 'Bleu_2', 'Bleu_3', 'Bleu_4', 'CIDEr'], '|BLEU,CIDErD|'), ('rouge', ['ROUGE_L'], '|ROUGE_L|'),
    (('cider_plain',), ['CIDEr_plain'], '|CIDEr|'),
    (['cider_plain', 'rouge', 'cider'], ['ROUGE_L', 'CIDEr', 'CIDEr_plain'], '|ROUGE_L,CIDErD,CIDEr|'),
])
def test_metrics_are_chosen_and_come_in_the_original_order(metrics, names, signed):
    hypotheses, references = some_set(8)
    s, whole = score(hypotheses, references, metrics=metrics), score(hypotheses, references, metrics=ALL)
    assert list(s.corpus) == names and list(s.per_image[0]) == names and signed in s.signature
    assert s.corpus == {k: whole.corpus[k] for k in names}


def test_misspelt_metrics_are_named():
    with pytest.raises(ValueError, match="unknown metric 'ciderd': did you mean 'cider'"):
        score({1: 'a'}, {1: ['a']}, metrics=('bleu', 'ciderd'))
    with pytest.raises(ValueError, match='name a metric: bleu, meteor, rouge'): score({1: 'a'}, {1: ['a']}, metrics=())


def test_meteor_stands_between_bleu_and_rouge():
    pytest.importorskip('pycocoevalcap', reason='the tables of METEOR come with pycocoevalcap')
    from caption_nb.meteor import load_meteor
    hypotheses, references = {1: 'a dog runs', 2: 'a red bus'}, {1: ['the dog is running', 'a dog'], 2: ['a bus']}
    s = score(hypotheses, references, metrics=('rouge', 'meteor', 'bleu'))
    assert list(s.corpus) == ['Bleu_1', 'Bleu_2', 'Bleu_3', 'Bleu_4', 'METEOR', 'ROUGE_L'] and '|BLEU,METEOR1.5,ROUGE_L|' in s.signature
    expected = load_meteor().statistics([h.split() for h in hypotheses.values()], [[r.split() for r in rs] for rs in references.values()])
    np.testing.assert_allclose(s.statistics['METEOR'], expected)
    assert s.corpus['METEOR'] == pytest.approx(corpus_scores({'METEOR': expected.sum(0)})['METEOR'])


def test_scoring_starts_without_torch():
    code = "import sys, caption_nb.metrics; assert not {'torch', 'matplotlib', 'scipy', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('hypotheses, references, message', [
    ({}, {1: ['a']}, 'no hypothesis for 1'),
    ({i: 'a' for i in range(2)}, {i: ['a'] for i in range(9)}, r'no hypothesis for 2, 3, 4 and 4 more \(of 9 images\)'),
    ({1: 'a', 2: 'a', 3: 'b'}, {1: ['a']}, 'hypotheses for images that have no references: 2, 3'),
    ({1: 'a'}, {'1': ['a']}, 'ids are int in hypotheses, str in references'),
    ({1: 'a'}, {1: []}, '1: no references'),
    ({i: 'a' for i in range(6)}, {i: ['a']*(i == 3) for i in range(6)}, '0, 1, 2 and 2 more: no references'),
    ({i: 'a' if i % 2 else i for i in range(6)}, {i: ['a'] for i in range(6)}, 'the hypothesis for 0, 2, 4 must be one string, not int: 0'),
    ({1: float('nan')}, {1: ['a']}, 'the hypothesis for 1 must be one string, not float: nan'),
    ({1: 'a', 2: 'b', 3: 'c'}, {1: ['a'], 2: [None], 3: [b'c', 4]}, 'a reference of 2, 3 must be a string, not NoneType: None'),
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

def plain_reward(hyp, refs, df, N, plain=False):
    "The formula, written down as plainly as possible; `plain`: CIDEr without the D"
    def vector(words, n):
        grams = Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))
        return {g: tf*(math.log(N) - math.log(max(1, df.get(g, 0)))) for g, tf in grams.items()}
    total = 0.
    for ref in refs:
        delta = max(0, len(hyp) - 1) - max(0, len(ref) - 1)
        for n in range(1, 5):
            h, r = vector(hyp, n), vector(ref, n)
            norm = math.sqrt(sum(v*v for v in h.values()))*math.sqrt(sum(v*v for v in r.values()))
            dot = sum((v if plain else min(v, r.get(g, 0)))*r.get(g, 0) for g, v in h.items())
            total += (dot/norm if norm else dot)*(1 if plain else math.exp(-delta**2/72))
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


@settings(max_examples=200, deadline=None)
@given(sets)
def test_cider_with_and_without_the_d_follow_the_formula(items):
    hyps, refs = [h.split() for h, _ in items], [[r.split() for r in rs] for _, rs in items]
    df = Counter(g for rs in refs for g in {tuple(r[i:i + n]) for r in rs for n in range(1, 5) for i in range(len(r) - n + 1)})
    _, each = score_tokens(hyps, refs, ('cider', 'cider_plain'))
    for name, plain in (('CIDEr', False), ('CIDEr_plain', True)):
        expected = [plain_reward(h, rs, df, len(refs), plain) for h, rs in zip(hyps, refs)]
        np.testing.assert_allclose(each[name], expected, atol=1e-9, rtol=0, err_msg=name)


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
