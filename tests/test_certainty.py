"""Intervals, paired tests, seeds: against captions that are really scored again, and in corners."""
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb import certainty
from caption_nb.certainty import Difference, Interval, bootstrap, holm, markdown_table, over_seeds, paired, t_quantile, welch
from caption_nb.metrics import corpus_scores, score

WORDS = 'a the dog cat runs sleeps on red grass snow with two'.split()
caption = st.lists(st.sampled_from(WORDS), min_size=0, max_size=9).map(' '.join)
image = st.tuples(caption, caption, st.lists(caption.filter(bool), min_size=1, max_size=4))   # two hypotheses, references


def scored(captions: dict, references: dict, **more): return score(captions, references, tokenizer='whitespace', **more)


def runs(n: int, seed: int = 0, wrong: tuple[float, float] = (.3, .5)):
    "Two runs on `n` images: the second has more words wrong"
    rng = np.random.default_rng(seed)
    def spoil(words, share): return ' '.join(rng.choice(WORDS) if rng.random() < share else w for w in words)
    texts = [rng.choice(WORDS, rng.integers(4, 9)).tolist() for _ in range(n)]
    references = {f'{i}.jpg': [spoil(t, .3) for _ in range(3)] for i, t in enumerate(texts)}
    both = [{i: spoil(t, share) for i, t in zip(references, texts)} for share in wrong]
    return *(scored(c, references) for c in both), *both, references


def reordered(scores, order):
    ids = list(scores.per_image)
    return replace(scores, per_image={ids[k]: scores.per_image[ids[k]] for k in order},
                   statistics={f: s[order] for f, s in scores.statistics.items()})


# ---- resampled sums are the captions scored again ------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(image, min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_resampled_sums_are_the_duplicated_captions_scored_again(images, seed):
    references, captions = ({i: im[k] for i, im in enumerate(images)} for k in (2, 0))
    scores = scored(captions, references)
    counts, = certainty._resampling(len(images), np.random.default_rng(seed))(1)
    assert counts.sum() == len(images)
    drawn = [(i, c) for i, k in enumerate(counts) for c in range(int(k))]
    again = scored({d: captions[d[0]] for d in drawn}, {d: references[d[0]] for d in drawn})
    families = certainty._families(scores)
    found = certainty._corpus(counts @ certainty._table(scores, families), families)
    for n in range(1, 5): assert found[f'Bleu_{n}'] == again.corpus[f'Bleu_{n}']                  # to the last bit
    assert found['ROUGE_L'] == pytest.approx(again.corpus['ROUGE_L'], abs=1e-12)
    held = np.mean([scores.per_image[i]['CIDEr'] for i, _ in drawn])                               # document frequencies held
    assert found['CIDEr'] == pytest.approx(held, abs=1e-12)


def test_every_swap_is_the_swapped_captions_scored():
    n = 5
    a, b, mine, theirs, references = runs(n)
    exact = []
    for heads in product((0, 1), repeat=n):
        x = {i: (theirs if h else mine)[i] for i, h in zip(references, heads)}
        y = {i: (mine if h else theirs)[i] for i, h in zip(references, heads)}
        x, y = scored(x, references).corpus, scored(y, references).corpus
        exact.append({m: x[m] - y[m] for m in x})
    found = paired(a, b, resamples=20_000)
    for m, d in found.items():
        assert d.difference == pytest.approx(exact[0][m], abs=1e-12)
        p = np.mean([abs(e[m]) >= abs(exact[0][m]) - 1e-9 for e in exact])
        assert d.p == pytest.approx(p, abs=4*np.sqrt(p*(1 - p)/20_000) + 1e-4), m


# ---- the same every time ------------------------------------------------------------------------------------------

def test_equal_seeds_give_equal_results():
    a, b, *_ = runs(30)
    assert bootstrap(a, 200) == bootstrap(a, 200) != bootstrap(a, 200, seed=1)
    assert paired(a, b, 200) == paired(a, b, 200) != paired(a, b, 200, seed=1)


@pytest.mark.parametrize('block', [1, 37, 1000, 10**9])
def test_size_of_a_block_changes_nothing(block, monkeypatch):
    a, b, *_ = runs(37)
    whole = bootstrap(a, 150), paired(a, b, 150)
    monkeypatch.setattr(certainty, 'BLOCK', block)
    parts = bootstrap(a, 150), paired(a, b, 150)
    for x, y in zip(whole, parts):
        for m in x: assert x[m] == pytest.approx(y[m], abs=1e-12)
    assert whole[0]['Bleu_4'] == parts[0]['Bleu_4']   # whole numbers: to the last bit


def test_memory_stays_small():
    import tracemalloc
    a, *_ = runs(10)
    many = replace(a, per_image=dict.fromkeys(range(40_000)), statistics={f: np.tile(s, (4000, 1)) for f, s in a.statistics.items()})
    tracemalloc.start()
    bootstrap(many, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6, peak


# ---- what the numbers are ------------------------------------------------------------------------------------------

def test_interval_holds_the_value_and_widens_with_confidence():
    a, *_ = runs(60)
    narrow, wide = bootstrap(a, confidence=.5), bootstrap(a, confidence=.99)
    assert list(narrow) == list(a.corpus)
    for m in narrow:
        assert wide[m].low < narrow[m].low < narrow[m].value < narrow[m].high < wide[m].high
        assert narrow[m].value == pytest.approx(a.corpus[m], abs=1e-12)


def test_spread_of_a_mean_is_the_standard_error():
    a, *_ = runs(400)
    values = np.array([v['CIDEr'] for v in a.per_image.values()])
    i = bootstrap(a, 4000)['CIDEr']
    assert (i.high - i.low)/2 == pytest.approx(1.96*values.std()/20, rel=.05)


def test_interval_agrees_with_scipy():
    stats = pytest.importorskip('scipy.stats')
    a, *_ = runs(120)
    s = a.statistics['BLEU']
    done = stats.bootstrap((np.arange(120),), lambda i, axis: corpus_scores({'BLEU': s[i].sum(-2)})['Bleu_4'], n_resamples=5000,
                           method='percentile', vectorized=True, batch=500).confidence_interval
    mine = bootstrap(a, 5000)['Bleu_4']
    assert (mine.low, mine.high) == pytest.approx(tuple(done), abs=.1*(mine.high - mine.low))


def test_difference_is_found_and_has_a_sign():
    a, b, *_ = runs(300)
    found, turned = paired(a, b), paired(b, a)
    for m, d in found.items():
        assert d.low < d.difference < d.high and d.difference == pytest.approx(a.corpus[m] - b.corpus[m], abs=1e-12)
        assert turned[m].p == d.p and turned[m].difference == -d.difference
        assert turned[m][1:3] == pytest.approx((-d.high, -d.low), abs=1e-12)
    assert found['CIDEr'].p < .01 and found['CIDEr'].low > 0
    assert found['CIDEr'].p >= 1/1001                        # the real difference is one of the possible ones


def test_null_is_not_called_a_difference():
    found = [paired(*runs(40, seed, wrong=(.4, .4))[:2], resamples=99)['Bleu_4'].p for seed in range(60)]
    assert np.mean(np.array(found) <= .1) <= .1 + 3*np.sqrt(.09/60) and .3 < np.mean(found) < .7


# ---- corners -------------------------------------------------------------------------------------------------------

def test_one_image():
    a, b, *_ = runs(1)
    for i in bootstrap(a).values(): assert i.low == i.high == pytest.approx(i.value)
    for d in paired(a, b).values(): assert d.p == 1 and d.low == d.high   # with one image every swap is as large


def test_a_run_against_itself():
    a, *_ = runs(25)
    assert set(paired(a, a).values()) == {Difference(0, 0, 0, 1)}
    assert set(paired(a, reordered(a, np.arange(25)[::-1])).values()) == {Difference(0, 0, 0, 1)}


def test_scores_of_nothing_but_zeros():
    references = {i: ['a dog runs on grass'] for i in range(12)}
    empty, wrong = scored(dict.fromkeys(references, ''), references), scored(dict.fromkeys(references, 'xx yy'), references)
    for i in bootstrap(empty).values(): assert i == pytest.approx((0, 0, 0), abs=1e-9)
    for d in paired(empty, wrong).values(): assert abs(d.difference) < 1e-6 and 0 < d.p <= 1


@settings(max_examples=25, deadline=None)
@given(st.lists(image, min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_images_are_aligned_by_id(images, random):
    references, mine, theirs = ({i: im[k] for i, im in enumerate(images)} for k in (2, 0, 1))
    a, b = scored(mine, references), scored(theirs, references)
    order = list(range(len(images))); random.shuffle(order)
    assert paired(a, b, 50) == paired(a, reordered(b, order), 50)
    for d in paired(a, b, 50).values(): assert np.isfinite(d).all() and d.low <= d.high and 0 < d.p <= 1


def test_missing_images_are_named():
    a, b, _, theirs, references = runs(8)
    fewer = [i for i in references if i not in ('1.jpg', '2.jpg', '3.jpg', '4.jpg')]
    b = scored({i: theirs[i] for i in fewer}, {i: references[i] for i in fewer})
    with pytest.raises(ValueError, match=r"same images: b lacks '1\.jpg', '2\.jpg', '3\.jpg' and 1 more$"): paired(a, b)
    with pytest.raises(ValueError, match="a lacks '1.jpg'"): paired(b, a)


def test_scores_judged_differently_are_refused():
    a, b, mine, theirs, references = runs(8)
    fewer = scored(theirs, {i: r[:2] for i, r in references.items()})
    with pytest.raises(ValueError, match=r'judged differently, in .*refs \(3 against 2\)'): paired(a, fewer)
    with pytest.raises(ValueError, match=r'tok \(whitespace against ptb\)'): paired(a, score(theirs, references))
    reworded = scored(theirs, {i: [r[0] + ' today', *r[1:]] for i, r in references.items()})
    with pytest.raises(ValueError, match=r'in set \('): paired(a, reworded)
    with pytest.raises(ValueError, match=r'split \(dev against test\)'):
        paired(scored(mine, references, about=dict(split='dev')), scored(theirs, references, about=dict(split='test')))
    with pytest.raises(ValueError, match=r'split \(dev against unknown\)'): paired(scored(mine, references, about=dict(split='dev')), b)
    one, other = (scored(c, references, about=dict(beam=k, model=k)) for c, k in ((mine, '1'), (theirs, '5')))
    assert paired(one, other) == paired(a, b)                # how the captions were made may differ


def test_metrics_that_only_one_run_has_are_left_out():
    a, _, _, theirs, references = runs(8)
    assert list(paired(a, scored(theirs, references, metrics=('cider',)))) == ['CIDEr']
    with pytest.raises(ValueError, match='no metric in common: BLEU, ROUGE_L against CIDEr'):
        paired(scored(theirs, references, metrics=('bleu', 'rouge')), scored(theirs, references, metrics=('cider',)))


def test_a_metric_that_is_a_mean_takes_part():
    a, *_ = runs(50)
    values = np.random.default_rng(0).random(50)
    more = replace(a, statistics=a.statistics | {'CLIPScore': np.column_stack([values, np.ones(50)])})
    assert bootstrap(more)['CLIPScore'].value == pytest.approx(values.mean())
    assert bootstrap(more)['Bleu_4'] == bootstrap(a)['Bleu_4']


def test_wrong_numbers_are_refused():
    a, b, *_ = runs(3)
    with pytest.raises(ValueError, match='resamples must be 1 or more, not 0'): bootstrap(a, resamples=0)
    with pytest.raises(ValueError, match='between 0 and 1, such as 0.95, not 95'): paired(a, b, confidence=95)
    with pytest.raises(ValueError, match='no statistics of images'): bootstrap(replace(a, statistics={}))


# ---- seeds, many comparisons, text ----------------------------------------------------------------------------------

def test_over_seeds():
    mean, sd, n = over_seeds(iter([.30, .32, .34]))
    assert (mean, sd, n) == pytest.approx((.32, .02, 3))
    assert str(over_seeds([.30, .32, .34])) == '.320 ± .020 (3 seeds)' and str(over_seeds([.3])) == '.300 (one seed)'
    assert np.isnan(over_seeds([.3]).sd)
    with pytest.raises(ValueError, match='no runs'): over_seeds([])


@pytest.mark.parametrize('freedom, expected', [(1, 12.7062), (2, 4.3027), (2.9412, 3.2193), (10, 2.2281), (1000, 1.9623)])
def test_student(freedom, expected): assert t_quantile(freedom) == pytest.approx(expected, rel=2e-4)


def test_welch():
    assert welch([1, 2, 3], [2, 4, 6]) == (-2, pytest.approx(4.15540, rel=1e-4))   # as scipy.stats.ttest_ind(…, equal_var=False) has it
    assert welch([1, 1], [3, 3, 3]) == (-2, 0)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_the_stepwise_procedure(p):
    adjusted = holm(p)
    for alpha in (.01, .05, .2, .7):     # by the definition: go up until one is too large
        order, called = sorted(range(len(p)), key=p.__getitem__), set()
        for k, i in enumerate(order):
            if p[i]*(len(p) - k) > alpha: break
            called.add(i)
        assert {i for i, q in enumerate(adjusted) if q <= alpha} == called
    assert all(x <= y <= 1 for x, y in zip(p, adjusted))


def test_holm_keeps_names_and_refuses_what_is_no_probability():
    assert holm({('a', 'b'): .01, ('a', 'c'): .04}) == {('a', 'b'): .02, ('a', 'c'): .04}
    for wrong in ([.1, -.1], [.1, float('nan')]):
        with pytest.raises(ValueError, match='number 1'): holm(wrong)


def test_text():
    assert str(Interval(.612, .598, .6261)) == '.612 [.598, .626]'
    assert str(Interval(2.3, 10, -.0001)) == '2.300 [10.000, .000]'
    assert str(Difference(-.0123, -.02, .0001, .0004)) == '-.012 [-.020, +.000], p < .001'
    text = markdown_table({'a|b': {'BLEU-4': Interval(.3, .2, .4)}, 'c': {'CIDEr': 1}}, 'run')
    assert text.splitlines() == ['| run  | BLEU-4            | CIDEr |', '|------|-------------------|-------|',
                                 r'| a\|b | .300 [.200, .400] | –     |', '| c    | –                 | 1     |']


def test_import_is_light():
    code = "import sys, caption_nb.certainty; print([m for m in ('torch', 'scipy', 'matplotlib', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


# ---- real captions -------------------------------------------------------------------------------------------------

def test_cider_of_flickr8k_as_the_notebook_says(flickr8k):
    "Width with document frequencies held = width over fresh test sets with their own; and CIDEr falls with the size of the set"
    from caption_nb.data import load_data
    from caption_nb.text import tokenize_all
    data, rng = load_data(flickr8k), np.random.default_rng(0)
    ids = [i for i in data.images if len(data.captions[i]) == 5]
    words = {i: [' '.join(t) for t in tokenize_all(data.captions[i], 'ptb')] for i in ids}

    def human(chosen): return scored({i: words[i][0] for i in chosen}, {i: words[i][1:] for i in chosen}, metrics=('cider',))
    def draw(n): return human([ids[k] for k in rng.choice(len(ids), n, replace=False)])
    fresh = np.array([draw(1000).corpus['CIDEr'] for _ in range(40)])
    i = bootstrap(draw(1000))['CIDEr']
    among_all = (1 - 1000/len(ids))**.5                          # test sets drawn from so few images resemble one another
    assert .75 < (i.high - i.low)/3.92/(fresh.std()/among_all) < 1.33
    small = np.mean([draw(100).corpus['CIDEr'] for _ in range(30)])
    assert small > fresh.mean() + .03 > human(ids).corpus['CIDEr'] + .03
