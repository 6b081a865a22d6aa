"""What captions get wrong: words, objects, copies, gaps, and the page that shows them."""
import json
import math
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from browser import browser
from hypothesis import given, settings, strategies as st
from PIL import Image

import caption_nb.error_browser as eb
from caption_nb.data import load_data
from caption_nb.error_browser import (Gap, Mention, Nearest, caption_gaps, chair, error_items, error_page, nearest_training_captions,
                                      nouns_of, object_table, object_words, plot_gaps, plot_lengths, plot_looks, plot_objects,
                                      plot_vocabulary, plot_word_use, read_object_words, scene_objects, word_use)
from caption_nb.metrics import score
from caption_nb.scenes import make_scenes
from caption_nb.text import tokenize
from caption_nb.views import Ranked

CAPTIONS = {'a.jpg': 'a dog on the grass', 'b.jpg': 'a cat', 'c.jpg': ''}
REFERENCES = {'a.jpg': ['A dog runs on grass.', 'a puppy'], 'b.jpg': ['a red ball', 'the ball'], 'c.jpg': ['nothing here', 'a wall']}
PETS = object_words({'dog': ['puppy'], 'cat': [], 'ball': []})


# ---- words ------------------------------------------------------------------------------------------------------

def test_word_use_by_hand():
    use = {u.word: u for u in word_use({1: 'dog dog dog cat'}, ['dog cat cat cat'])}
    assert (use['dog'].said, use['dog'].people, use['dog'].ratio) == (3, 1, 3.5/1.5)
    g = 2*(3*math.log(3/2) + math.log(1/2) + math.log(1/2) + 3*math.log(3/2))
    assert use['dog'].surprise == pytest.approx(g) and use['cat'].surprise == pytest.approx(-g)


texts = st.lists(st.sampled_from(['a', 'b', 'c', 'd', 'e']), max_size=7).map(' '.join)


@given(st.lists(texts, min_size=1, max_size=6), st.lists(texts, max_size=6))
@settings(max_examples=100, deadline=None)
def test_word_use_counts_every_word(captions, people):
    use = word_use(dict(enumerate(captions)), people)
    assert {u.word: u.said for u in use if u.said} == Counter(w for c in captions for w in c.split())
    assert {u.word: u.people for u in use if u.people} == Counter(w for c in people for w in c.split())
    assert all(math.isfinite(u.surprise) and u.ratio > 0 for u in use)
    assert [u.surprise for u in use] == sorted((u.surprise for u in use), reverse=True)


@pytest.mark.parametrize('captions', [CAPTIONS, {'a.jpg': ''}, {'b.jpg': '$x_1$ &lt; 100%'}])
def test_figures_are_drawn(captions):
    for draw in (plot_lengths, plot_word_use, plot_vocabulary): assert draw(captions, REFERENCES)._repr_png_()[:4] == b'\x89PNG'
    assert plot_objects(chair(captions, REFERENCES, PETS))._repr_png_()


def test_captions_that_are_none():
    with pytest.raises(TypeError, match="caption of 'b' must be one string, not list"): plot_lengths({'a': 'x', 'b': ['y']}, {})
    with pytest.raises(ValueError, match=r"no references for 'a' \(1 of 1 captions\)"): plot_lengths({'a': 'x'}, {'a': []})
    with pytest.raises(ValueError, match='no captions'): chair({}, {}, PETS)
    with pytest.raises(TypeError, match='must be a dict'): word_use(['a dog'], ['a dog'])
    with pytest.raises(TypeError, match='got one string'): word_use({1: 'a dog'}, 'a dog')


def test_looks_need_a_map_for_each_caption():
    maps = {'a.jpg': np.full((5, 2, 2), 0.25)}
    figures = plot_looks([Ranked('a.jpg', 1.5, 'a dog on the grass')], lambda id: Image.new('RGB', (32, 32)), maps)
    assert len(figures) == 1 and any('CIDEr-D 1.50 · a.jpg' in t.get_text() for t in figures[0].texts)
    with pytest.raises(ValueError, match=r"no attention for 'b.jpg' \(1 of 1 captions\)"): plot_looks([Ranked('b.jpg', 1, 'a')], None, maps)


# ---- objects ----------------------------------------------------------------------------------------------------

def test_the_longest_name_wins():
    words = object_words({'dog': [], 'hot dog': [], 'bench': ['park bench']})
    found = words.find('Dogs on two park benches eat a hot dog, a Dog, hot dogs')
    assert [m.object for m in found] == ['dog', 'bench', 'hot dog', 'dog', 'hot dog']


def test_what_is_written_counts_more_than_a_derived_plural():
    words = object_words({'glass': ['glasses'], 'sunglasses': ['glasses'], 'glasse': []})
    assert words.names['glasses'] == 'sunglasses'


def test_plurals():
    one = 'man snowman german church box city donkey sheep wolf knife leaf giraffe cliff cafe wife shelf surf'.split()
    many = 'men snowmen germans churches boxes cities donkeys sheep wolves knives leaves giraffes cliffs cafes wives shelves surfs'.split()
    assert [*map(eb._plural, one)] == many and eb._plural('stop sign') == 'stop signs'


def test_word_list_file(tmp_path):
    path = tmp_path/'synonyms.txt'
    path.write_text('person, girl , boy\n\nfire hydrant,hydrant,\n')
    words = read_object_words(path)
    assert words.objects == ['person', 'fire hydrant']
    assert words.find('girls at fire hydrants') == [Mention('person', 'girls'), Mention('fire hydrant', 'fire hydrants')]
    path.write_text('dog\ncat\ndog, puppy\n')
    with pytest.raises(ValueError, match=r"synonyms.txt, line 3: the object 'dog' has a line already"): read_object_words(path)
    path.write_text('\n')
    with pytest.raises(ValueError, match='names no objects'): read_object_words(path)


def test_chair_by_hand():
    found = chair(CAPTIONS, REFERENCES, PETS)
    assert (found.chair_i, found.chair_s, found.recall) == (1/2, 1/3, 1/2)
    assert found.hallucinated == {'cat': 1} and found.missed == {'ball': 1} and found.expected == {'dog': 1, 'ball': 1}
    assert found.per_image['b.jpg'].missed == [Mention('ball', 'ball')]
    assert str(found).startswith('CHAIRi 50.0%  CHAIRs 33.3%  recall 50.0%  [objects|truth=references|images=3]')
    table = object_table(found)
    assert list(table.columns) == ['said', 'invented', 'expected', 'missed'] and table.loc['cat'].tolist() == [1, 1, 0, 0]


def test_chair_with_annotations():
    truth = {'a.jpg': ['cat'], 'b.jpg': ['cat'], 'c.jpg': []}
    assert chair(CAPTIONS, REFERENCES, PETS, truth).chair_i == 0          # the dog is in a reference
    alone = chair(CAPTIONS, None, PETS, truth)
    assert alone.chair_i == 1/2 and alone.hallucinated == {'dog': 1} and alone.missed == {'cat': 1} and alone.against == 'annotations'
    with pytest.raises(ValueError, match="truth says nothing about 'b.jpg'"): chair(CAPTIONS, None, PETS, {'a.jpg': []})
    with pytest.raises(ValueError, match="names 'dogg', which is not in the word list: did you mean 'dog'"):
        chair({1: 'x'}, None, PETS, {1: ['dogg']})
    with pytest.raises(ValueError, match='nothing says what is in the images'): chair(CAPTIONS, None, PETS)


def test_nobody_names_everything():
    refs = {1: ['a dog and a ball', 'a dog', 'a dog']}
    assert chair({1: 'grass'}, refs, PETS).missed == {'dog': 1}
    assert chair({1: 'grass'}, refs, PETS, agreed=0.3).missed == {'dog': 1, 'ball': 1}
    assert math.isnan(chair({1: 'grass'}, refs, PETS).chair_i)


def test_nouns_are_no_objects(flickr8k):
    data = load_data(flickr8k/'dataset_flickr8k.json')
    nouns = nouns_of(data.train_captions())
    assert 300 < len(nouns.objects) < 500
    things = {'dog', 'man', 'woman', 'snow', 'beach', 'shirt', 'hat', 'bicycle', 'frisbee', 'water', 'person'}
    assert things <= set(nouns.objects)
    assert not set(nouns.names) & set('a the red black running jumps two in is wearing young small other front looks runs playing'.split())
    assert nouns.names['dogs'] == 'dog' and nouns.names['women'] == 'woman' and nouns.names['people'] == 'person'
    dev = data.references('dev')
    first, others = {id: r[0] for id, r in dev.items()}, {id: r[1:] for id, r in dev.items()}
    found = chair(first, others, nouns)
    assert 0.2 < found.chair_i < 0.35 and 'CHAIR' not in str(found)   # people against people: what the lesson says


# ---- copies -----------------------------------------------------------------------------------------------------

def slowest(caption, train):
    "The highest cosine, from the formula"
    def grams(c): w = tokenize(c); return {*w, *pairwise(w)}
    train = [grams(c) for c in {' '.join(tokenize(c)): c for c in train}.values()]
    df = Counter(g for c in train for g in c)
    def weight(g): return math.log((1 + len(train))/df.get(g, 1))**2
    def norm(c): return math.sqrt(sum(map(weight, c)))
    a = grams(caption)
    return max((sum(map(weight, a & b))/norm(a)/norm(b) for b in train if a & b), default=0)


@given(st.lists(texts, min_size=1, max_size=40), st.lists(texts, min_size=1, max_size=5), st.sampled_from([1, 3, 500]))
@settings(max_examples=200, deadline=None)
def test_nearest_is_nearest(train, captions, few):
    before, eb._Index.few = eb._Index.few, few
    try: found = nearest_training_captions(dict(enumerate(captions)), train)
    finally: eb._Index.few = before
    for i, caption in enumerate(captions):
        if copies := sum(t == caption for t in train): assert found[i] == Nearest(caption, 1., copies)
        else: assert found[i].copies == 0 and found[i].similarity == pytest.approx(slowest(caption, train), abs=1e-5)


def test_nearest_on_real_captions(flickr8k):
    data = load_data(flickr8k/'dataset_flickr8k.json')
    train, dev = data.train_captions()[:3000], {id: r[0] for id, r in list(data.references('dev').items())[:12]}
    for id, n in nearest_training_captions(dev, train).items(): assert n.similarity == pytest.approx(slowest(dev[id], train), abs=1e-5)


def test_nearest_of_strange_captions():
    near = nearest_training_captions({1: '', 2: 'zebra', 3: 'A dog!', 4: 'a zebra'}, {'x': ['a dog', 'a dog.'], 'y': ['a big cat']})
    assert near == {1: Nearest('', 0., 0), 2: Nearest('', 0., 0), 3: Nearest('a dog', 1., 2), 4: near[4]} and 0 < near[4].similarity < 1
    with pytest.raises(ValueError, match='no training captions'): nearest_training_captions({1: 'a'}, [])


# ---- gaps -------------------------------------------------------------------------------------------------------

def test_gaps_are_sorted_and_checked():
    a, b = {1: 'x', 2: 'y', 3: 'z'}, {1: 'u', 2: 'v', 3: 'w'}
    sa, sb = ({i: {'CIDEr': v} for i, v in enumerate(values, 1)} for values in ((1., 5., math.nan), (2., 1., 1.)))
    gaps = caption_gaps(a, sa, b, sb)
    assert gaps[:2] == [Gap(2, 4., 'y', 'v', 5., 1.), Gap(1, -1., 'x', 'u', 1., 2.)] and gaps[2].id == 3
    assert plot_gaps(gaps)._repr_png_()
    with pytest.raises(ValueError, match='no image has a score in both'): plot_gaps(gaps[2:])
    with pytest.raises(ValueError, match=r"b_captions lacks 2, 3: compare"): caption_gaps(a, sa, {1: 'u'}, sb)
    with pytest.raises(ValueError, match=r"b_per_image has, beyond the images of a_captions, 4: compare"):
        caption_gaps(a, sa, b, sb | {4: {}})
    with pytest.raises(ValueError, match="a_per_image: no score 'CIDer' for 1: did you mean 'CIDEr'"): caption_gaps(a, sa, b, sb, 'CIDer')


# ---- the page ---------------------------------------------------------------------------------------------------

NASTY = ['</script><script>document.title="owned"</script>', '"><img src=x onerror=\'document.title="owned"\'>', '<!--<script>',
         '{{x}} ${document.title="owned"} `', '\u2028 \ud800 \U0001f415 é &amp;', "it's \\u003c a \\ dog"]


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    "60 images of scenes, everything known about them, and their folder"
    folder = tmp_path_factory.mktemp('scenes')
    data = make_scenes(folder/'data', num_images=300)
    references = data.references('dev') | data.references('test')
    a = {id: r[0].replace('star', 'ring') for id, r in references.items()}
    b = {id: ' '.join(r[1].split()[:5]) for id, r in references.items()}
    sa, sb = score(a, references), score(b, references)
    words, truth = scene_objects(data.boxes)
    found, gaps = chair(a, references, words, truth), caption_gaps(a, sa.per_image, b, sb.per_image)
    near = nearest_training_captions(a, data.train_captions())
    return folder, error_items(a, references, sa.per_image, data.path, found, near, gaps), found


def rows(path): return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.S)[1])['items']


def test_items_are_checked(scenes, tmp_path):
    with pytest.raises(ValueError, match="no score 'Cider' for 'a.jpg'"):
        error_items(CAPTIONS, REFERENCES, {'a.jpg': {'CIDEr': 1}}, key='Cider')
    with pytest.raises(ValueError, match="item 0 has an unknown key 'captoin': did you mean 'caption'"):
        error_page(tmp_path/'x.html', [{'captoin': 'a'}])
    with pytest.raises(ValueError, match="item 0 \\(3\\) has no caption"): error_page(tmp_path/'x.html', [{'id': 3}])
    with pytest.raises(ValueError, match='items is empty'): error_page(tmp_path/'x.html', [])
    assert not list(tmp_path.iterdir())


def test_some_photos_are_inside_and_the_others_linked(scenes):
    folder, items, _ = scenes
    written = rows(error_page(folder/'out'/'few.html', items, embed=2))
    images = [r['image'] for r in written]
    assert [i[:5] for i in images[:3]] == ['data:', 'data:', './../']
    assert (folder/'out'/images[2]).is_file()
    assert written[2]['values']['CIDEr'] == pytest.approx(items[2]['scores']['CIDEr'], abs=1e-4)


def test_bare_captions_make_a_page(tmp_path):
    path = error_page(tmp_path/'page.html', [dict(caption='a dog', scores={'CIDEr': math.nan}), dict(caption=NASTY[4])])
    assert [r['values'] for r in rows(path)] == [{'CIDEr': None, 'words': 2}, {'words': len(tokenize(NASTY[4]))}]
    assert rows(path)[1]['caption'] == NASTY[4]


@pytest.fixture(scope='module')
def opened(chromium):
    "Opens a page from its file; whatever it complains of, asks for, or says comes into the list"
    pytest.importorskip('playwright', reason="browser tests need pip install -e '.[dev]'")
    with browser(chromium) as context:
        tab, faults = context.new_page(), []
        tab.on('console', lambda m: faults.append(m.text))
        tab.on('pageerror', lambda e: faults.append(str(e)))
        tab.on('dialog', lambda d: (faults.append(d.message), d.dismiss()))
        tab.on('requestfailed', lambda r: faults.append(f'failed: {r.url[:80]}'))
        tab.on('request', lambda r: r.url.startswith(('file:', 'data:')) or faults.append(f'outside: {r.url}'))

        def visit(path):
            faults.clear()
            tab.goto(path.as_uri())
            tab.wait_for_selector('figure')
            return tab, faults
        yield visit


def until(tab, holds):
    "Wait for the page (playwright's own way of waiting evaluates a text, which the page's policy refuses)"
    for _ in range(100):
        if holds(): return
        tab.wait_for_timeout(100)
    raise AssertionError('the page did not get there in 10 s')


def shown(tab) -> list[str]: return tab.locator('.caption').all_text_contents()   # inner text is empty where nobody looks


def test_page_sorts_and_filters(scenes, opened):
    folder, items, found = scenes
    tab, faults = opened(error_page(folder/'page.html', items, 'rings', ['signature <x>', str(found)], ('rings', 'short'), embed=3))
    assert tab.title() == 'rings' and tab.locator('.about').first.inner_text() == 'signature <x>'
    assert shown(tab) == [i['caption'] for i in items]
    assert tab.evaluate('[...document.images].every(i => i.src)') and tab.locator('img').count() == len(items)
    tab.locator('#sort').select_option('CIDEr')
    tab.locator('#down').check()
    assert shown(tab)[0] == max(items, key=lambda i: i['scores']['CIDEr'])['caption']
    for key, value in (('gap', lambda i: i['gap'].gap), ('words', lambda i: len(tokenize(i['caption'])))):
        tab.locator('#sort').select_option(key)
        by_caption = {i['caption']: value(i) for i in items}
        got = [by_caption[c] for c in shown(tab)]
        assert len(by_caption) < len(items) or got == sorted(got, reverse=True)
    tab.locator('#hallucinated').select_option('=ring')
    wrong = [i for i in items if any(m.object == 'ring' for m in i['hallucinated'])]
    assert len(shown(tab)) == len(wrong) > 0 and tab.locator('#count').inner_text() == f'{len(wrong)} of {len(items)} captions'
    marks = tab.locator('.caption mark').all_text_contents()
    assert {m.lower() for m in marks} <= {'ring', 'rings'} and len(marks) >= len(wrong)
    tab.locator('#missed').select_option('=star')
    assert len(shown(tab)) == sum(any(m.object == 'star' for m in i['missed']) for i in wrong)
    assert 'short (' in tab.locator('figcaption').first.text_content()
    tab.get_by_role('button', name='show all').click()
    until(tab, lambda: tab.locator('figure').count() == len(items))
    tab.locator('#text').fill('TRIANGLE blue')
    def texts(i): return ' '.join([i['id'], i['caption'], *i['references'], i['nearest'].caption, i['gap'].b]).lower()
    assert len(shown(tab)) == sum('triangle' in texts(i) and 'blue' in texts(i) for i in items)
    tab.locator('#text').fill('no such words')
    assert not shown(tab) and tab.locator('#count').inner_text() == f'0 of {len(items)} captions'
    assert not faults


def test_copies_of_training_captions_can_be_hidden(tmp_path, opened):
    items = [dict(caption='old', nearest=Nearest('old', 1., 3)), dict(caption='new', nearest=Nearest('old', 0.2, 0)),
             dict(caption='unknown')]
    tab, faults = opened(error_page(tmp_path/'page.html', items))
    assert 'in train, word for word, 3 times: old' in tab.locator('figcaption').first.text_content()
    tab.locator('#new').check()
    assert shown(tab) == ['new', 'unknown']
    tab.locator('#sort').select_option('similarity')
    assert shown(tab) == ['new', 'unknown']   # what has no value comes last, either way
    tab.locator('#down').check()
    assert shown(tab) == ['new', 'unknown'] and not tab.locator('.objects').first.is_visible() and not faults


def test_captions_stay_text(tmp_path, opened):
    items = [dict(id=t, caption=t, references=NASTY, hallucinated=[Mention(t, t)], missed=[Mention(t, t)], nearest=Nearest(t, 1., 1),
                  gap=Gap(t, 1., t, t, 1., 0.), scores={t: 1.}) for t in NASTY]
    tab, faults = opened(error_page(tmp_path/'page.html', items, NASTY[0], NASTY[:4], (NASTY[1], NASTY[0])))
    assert tab.title() == NASTY[0] and tab.locator('img').count() == 0 and tab.locator('script').count() == 2
    assert len(shown(tab)) == len(NASTY) and shown(tab)[0] == NASTY[0] and tab.locator('.caption mark').first.text_content() == NASTY[0]
    tab.locator('#hallucinated').select_option(index=2)
    tab.locator('#sort').select_option(index=3)
    tab.locator('#text').fill(NASTY[1])
    tab.wait_for_timeout(100)
    assert tab.title() == NASTY[0] and not faults
    ran = tab.evaluate("""() => new Promise(done => { document.addEventListener('securitypolicyviolation', () => done('refused'));
        const s = document.createElement('script');
        s.textContent = 'document.title = "owned"';
        document.body.append(s);
        setTimeout(() => done(document.title), 2000) })""")
    assert ran == 'refused' and tab.title() == NASTY[0]


def test_many_captions_are_laid_out_as_one_scrolls(tmp_path, opened):
    items = [dict(id=i, caption=f'caption number {i}', scores={'CIDEr': i % 97/10}, references=['a reference']*5) for i in range(5000)]
    tab, faults = opened(error_page(tmp_path/'page.html', items))
    assert tab.locator('#count').inner_text() == '5,000 of 5,000 captions' and 60 <= tab.locator('figure').count() <= 300
    before = tab.locator('figure').count()
    tab.evaluate('window.scrollTo(0, document.body.scrollHeight)')
    until(tab, lambda: tab.locator('figure').count() > before)
    tab.locator('#text').fill('number 4999')
    assert shown(tab) == ['caption number 4999'] and not faults
