"""METEOR: equal to its Java program, image by image and to the last digit; tables and JVM that are missing, damaged or dying."""
import json
import os
import random
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb import meteor as module
from caption_nb.meteor import JavaMeteor, Meteor, MeteorMissing, Tables, find_meteor, load_meteor, meteor_score, meteor_words, read_tables, stem
from caption_nb.text import tokenize_all

DATA = Path(__file__).parent/'data'
ODD = ("' \" . .. ... , - -- – ` ‘ “ ” '' U.S. mr. No. v. e.g. 3 1,000 12:30 é α Ж 😀 \u2009 3\xa01/2 \x0b \x1c \t ! ? ( ) -lrb- -rrb- _ & $ ½ İ "
       "Σ ΑΣ n't i.e rev. pp. | || ||| |||| a|||b x-y an c0 The \x00 \ud800 ß ﬁ ice_cream c++ o’neil o'neil at&t").split(' ') + ['\n', '  ', '']
PLAIN = ('a the dog dogs hound man men guy person people running runs run is are in front of before on group several two boy child children kids '
         'playing plays with ball and standing stands sitting near next to beside water grass field it its').split()


@pytest.fixture(scope='module')
def tables():
    try: return read_tables()
    except MeteorMissing as e: pytest.skip(str(e))


@pytest.fixture(scope='module')
def ours(tables): return Meteor(tables=tables)


@pytest.fixture(scope='module')
def jar(java, tables):
    with JavaMeteor() as j: yield j


def check_equal(ours, jar, hypotheses, references):
    "All statistics are equal, and the program's scores of them, of the images and of the corpus"
    mine, theirs = (m.statistics(hypotheses, references) for m in (ours, jar))
    differ = np.flatnonzero((mine != theirs).any(1))
    assert not len(differ), f'{len(differ)} of {len(mine)} images: {[(hypotheses[i], references[i], mine[i], theirs[i]) for i in differ[:2]]}'
    line = ''.join(f' ||| {" ".join(map(repr, row))}' for row in mine.tolist())
    *each, corpus = map(float, jar.ask([f'EVAL{line}'], len(mine) + 1))
    assert np.abs(meteor_score(mine) - each).max(initial=0) < 1e-12 and abs(meteor_score(mine.sum(0)) - corpus) < 1e-12


def split(captions): return [c.split(' ') for c in captions]


# --- against recorded scores, which need no Java ---

def check_recorded(ours, sets):
    for name, recorded in sets.items():
        ids = list(recorded['tok_refs'])
        statistics = ours.statistics([recorded['tok_hyps'][i].split(' ') for i in ids], [split(recorded['tok_refs'][i]) for i in ids])
        assert abs(meteor_score(statistics.sum(0)) - recorded['corpus']['METEOR']) < 1e-9, name
        for i, s in zip(ids, meteor_score(statistics)): assert abs(s - recorded['per_image'][i]['METEOR']) < 1e-9, (name, i)


def test_recorded_scores(ours): check_recorded(ours, json.loads((DATA/'caption_scores_committable.json').read_text()))


def test_recorded_scores_of_real_captions(ours, shared): check_recorded(ours, json.loads((shared/'reference'/'caption_scores.json').read_text()))


# --- against the program ---

def test_all_captions_of_flickr8k_dev(ours, jar, flickr8k):
    from caption_nb.data import load_data
    rng, references = random.Random(0), load_data(flickr8k).references('dev')
    flat = tokenize_all([c for r in references.values() for c in r])
    captions = [[flat[i + j] if isinstance(flat[i + j], list) else flat[i + j].split(' ') for j in range(5)] for i in range(0, len(flat), 5)]
    words = sorted({w for r in captions for c in r for w in c})

    def generated(caption):
        caption = [w if rng.random() < .75 else rng.choice(words) for w in caption if rng.random() < .9]
        turn = rng.randrange(len(caption) + 1) if rng.random() < .3 else 0
        return caption[turn:] + caption[:turn]
    check_equal(ours, jar, [generated(rng.choice(r)) for r in captions], captions)


def odd_captions(pick, size):
    "A caption and references that share most of their words: `pick` chooses from a list, `size` up to a number"
    words = pick([ODD, PLAIN, ODD + PLAIN, PLAIN[:12], ['a', 'b']])
    base = [pick(words) for _ in range(size(20))]

    def like():
        caption = [pick(words) if size(6) == 0 else w for w in base if size(6)]
        turn = size(len(caption))
        return caption[turn:] + caption[:turn]
    return like(), [like() for _ in range(1 + size(pick([1, 4, 19])))]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_odd_captions(ours, jar, data):
    pairs = [odd_captions(lambda of: data.draw(st.sampled_from(of)), lambda n: data.draw(st.integers(0, n)))]
    check_equal(ours, jar, *map(list, zip(*pairs)))


def test_many_odd_captions_at_once(ours, jar):
    rng = random.Random(2)
    pairs = [odd_captions(rng.choice, lambda n: rng.randint(0, n)) for _ in range(300)]
    check_equal(ours, jar, *map(list, zip(*pairs)))


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60), st.lists(st.text(max_size=60), min_size=1, max_size=20))
def test_any_text(ours, jar, hypothesis, references): check_equal(ours, jar, [hypothesis.split(' ')], [split(references)])


def test_a_thousand_words(ours, jar):
    rng = random.Random(3)
    hypotheses = [rng.choices(words, k=1000) for words in (PLAIN, ODD, ['a', 'dog', 'the', 'man'])]
    check_equal(ours, jar, hypotheses, [[h[k:] + h[:k], h] for h, k in zip(hypotheses, (500, 500, 800))])


def test_empty(ours, jar):
    check_equal(ours, jar, [[], [], ['a'], [], [''], ['']], [[[]], [['a']], [[]], [[], ['a', 'dog']], [['']], []])
    assert ours.statistics([], []).shape == jar.statistics([], []).shape == (0, 23)


def test_words_with_one_hash_code_are_equal(ours, jar): check_equal(ours, jar, [['an', 'c0']], [[['c0', 'an']]])


def test_small_portions_give_the_same(ours, jar):
    rng = random.Random(4)
    hypotheses, references = zip(*(odd_captions(rng.choice, lambda n: rng.randint(0, n)) for _ in range(40)))
    lines = sorted({r for h, rs in zip(hypotheses, references) for line in [module._line(h, rs)] for r in (line[0], *line[1])})
    text, every = ours._text(lines), np.arange(len(lines))
    whole, parts = (ours._statistics(text, every, every[::-1], cells=n) for n in (1_000_000, 300))
    assert (whole == parts).all()


# --- without tables or Java ---

SMALL = Tables(function=['a', 'the'], synsets=dict(dog=[1], hound=[1], sofa=[2], couch=[2], man=[3], guy=[3], base=[4]),
               bases=dict(geese=['goose']), paraphrases=[('in front of', 'before'), ('before', 'in front of'), ('a b', 'c')])


def test_longer_captions_than_one_integer_has_bits():
    meteor, words = Meteor(tables=SMALL), ['a', 'b']*70
    statistics = meteor.statistics([words, words], [[words[1:] + ['x']], [words]])
    assert statistics[0, [0, 1, 21, 22]].tolist() == [140, 140, 139, 139] and statistics[0, 20] < 10 and meteor_score(statistics)[1] == 1


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(*[st.lists(st.sampled_from(['a', 'b', 'c', 'dog', 'hound', 'dogs', 'in', 'front', 'of', 'before', '(', "it's"]), max_size=9)]*3),
                min_size=1, max_size=6))
def test_a_batch_gives_what_single_images_give(images):
    meteor = Meteor(tables=SMALL)
    together = meteor.statistics([h for h, *_ in images], [r for _, *r in images])
    alone = np.concatenate([Meteor(tables=SMALL).statistics([h], [r]) for h, *r in images])
    assert (together == alone).all() and ((meteor_score(together) >= 0) & (meteor_score(together) <= 1)).all()


def test_a_caption_equal_to_a_reference_scores_one():
    meteor = Meteor(tables=SMALL)
    statistics = meteor.statistics([['the', 'dog', 'in', 'front']]*2, [[['x'], ['the', 'dog', 'in', 'front']], [['the', 'hound', 'in', 'front']]])
    assert meteor_score(statistics).tolist()[0] == 1 > meteor_score(statistics)[1] > .8


def test_explain_names_kinds():
    why = Meteor(tables=SMALL).explain('a hound in front of the couches'.split(), 'the dog before a sofa'.split())
    assert [(h, r, k) for h, r, k in why if k != 'equal'] == [((1, 2), (1, 2), 'synonym'), ((2, 5), (2, 3), 'paraphrase'), ((6, 7), (4, 5), 'synonym')]


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError): Meteor(tables=SMALL).statistics([['a']], [])


@pytest.mark.parametrize('word,expected', dict(generously='generous', skies='sky', happily='happili', dying='die', dogs='dog', running='run', hoping='hope',
                                               ayyb='ayyb', national='nation', conditional='condit', ties='tie', cries='cri', gas='gas', this='this',
                                               proceed='proceed', yellow='yellow', controllable='control').items())
def test_stems(word, expected): assert stem(word) == expected


def test_words():
    assert meteor_words('A  dog') == ['a', 'dog'] and meteor_words('') == meteor_words(' \x1c ') == []
    assert meteor_words('in 1990\'s, v. 3,000.', {'v': 'any'}) == ['in', '1990', "'s", ',', 'v.', '3,000', '.']


def test_nothing_heavy_is_imported():
    code = 'import sys, caption_nb.meteor; print([m for m in ("torch", "matplotlib", "pandas", "scipy", "pycocoevalcap") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


# --- the files ---

@pytest.fixture
def source(tmp_path):
    "METEOR's files with few entries, which no jar could run"
    folder = tmp_path/'meteor'
    (folder/'data').mkdir(parents=True)
    write_jar(folder)
    import gzip
    with gzip.open(folder/'data'/'paraphrase-en.gz', 'wt') as f: f.write('0.5\nin front of\nbefore\n0.25\nin front of\nahead of\n')
    return folder


def write_jar(folder, function='a\nthe\n'):
    with zipfile.ZipFile(folder/'meteor-1.5.jar', 'w') as jar:
        jar.writestr('function/english.words', function)
        jar.writestr('synonym/english.synsets', "dog\n1 2\nice_cream\n5\nhound\n1\ngoose\n7\n")
        jar.writestr('synonym/english.exceptions', 'goose\ngeese\n')
        jar.writestr('nonbreaking/english.prefixes', '# comment\nMr\nNo #NUMERIC_ONLY# # with numbers\n\n')


def test_an_index_is_made_once_and_anew_when_the_tables_change(source, tmp_path, capsys):
    cache = tmp_path/'cache'
    t = read_tables(source, cache)
    assert 'making an index' in capsys.readouterr().err
    assert t.function == {'a', 'the'} and t.bases == dict(geese=['goose']) and t.prefixes == dict(Mr='any', No='number')
    assert t.synonyms('geese') == {7} and t.synonyms('dogs') == {1, 2} and 'ice_cream' not in t.synset_row
    again = read_tables(source, cache)
    assert not capsys.readouterr().err and {k: np.asarray(v).tolist() for k, v in vars(again).items()} == {k: np.asarray(v).tolist() for k, v in vars(t).items()}
    write_jar(source, function='a\nthe\nof\n')
    assert read_tables(source, cache).function == {'a', 'the', 'of'} and len(list(cache.iterdir())) == 2


def test_a_damaged_index_is_made_anew(source, tmp_path, capsys):
    read_tables(source, tmp_path)
    path = next(tmp_path.glob('*.npz'))
    for damage in (path.read_bytes()[:200], b'', b'nonsense'):
        path.write_bytes(damage)
        capsys.readouterr()
        assert read_tables(source, tmp_path).synonyms('dog') == {1, 2} and 'making an index' in capsys.readouterr().err


def test_several_processes_make_the_index_at_once(source, tmp_path):
    code = f'from caption_nb.meteor import Meteor; print(Meteor({str(source)!r}, {str(tmp_path/"c")!r}).statistics([["dog"]], [[["hound"]]])[0, 12])'
    running = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [p.communicate()[0].strip() for p in running] == ['1.0']*3 and len(list((tmp_path/'c').iterdir())) == 1


def test_a_cache_that_is_a_file_is_no_obstacle(source, tmp_path, capsys):
    (tmp_path/'c').write_text('')
    assert read_tables(source, tmp_path/'c').function == {'a', 'the'} and 'cannot be kept' in capsys.readouterr().err


@pytest.mark.parametrize('damage', [lambda s: (s/'meteor-1.5.jar').write_bytes(b'no zip'), lambda s: (s/'data'/'paraphrase-en.gz').write_bytes(b'no gzip at all'),
                                    lambda s: zipfile.ZipFile(s/'meteor-1.5.jar', 'w').close(), lambda s: (s/'data'/'paraphrase-en.gz').write_bytes(b'')])
def test_damaged_tables_are_named(source, tmp_path, damage):
    damage(source)
    with pytest.raises(MeteorMissing, match='cannot be read'): read_tables(source, tmp_path/'c')


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv('CAPTION_NB_METEOR', raising=False)
    with pytest.raises(MeteorMissing, match=r"folder=.*does not hold meteor-1.5.jar and data/paraphrase-en.gz.*pip install 'caption_nb\[metrics\]'"):
        find_meteor(tmp_path)
    monkeypatch.setenv('CAPTION_NB_METEOR', str(tmp_path))
    with pytest.raises(MeteorMissing, match=r'\$CAPTION_NB_METEOR='): find_meteor()
    monkeypatch.delenv('CAPTION_NB_METEOR')
    monkeypatch.setattr(module.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(MeteorMissing, match='pycocoevalcap is not installed'): load_meteor()


def test_a_folder_that_is_given_is_used(source, monkeypatch):
    assert find_meteor(source) == source
    monkeypatch.setenv('CAPTION_NB_METEOR', str(source))
    assert find_meteor() == source


def test_without_tables_java_is_taken_and_without_both_both_reasons_are_given(source, tmp_path, monkeypatch, java):
    (source/'meteor-1.5.jar').write_bytes(b'no zip')
    with load_meteor(source, tmp_path/'c') as meteor: assert isinstance(meteor, JavaMeteor)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(MeteorMissing, match='cannot be read.*needs a Java runtime'): load_meteor(source, tmp_path/'c')


# --- the JVM ---

def test_a_jar_that_does_not_run_says_why(source, java):
    with JavaMeteor(source) as j, pytest.raises(MeteorMissing, match=r'ended \(exit code 1\).*meteor-1.5.jar'): j.statistics([['a']], [[['a']]])


def test_a_dead_jvm_is_replaced_and_none_is_left(jar):
    first = jar.statistics([['a', 'dog']], [[['a', 'dog']]])
    process = jar._process
    os.kill(process.pid, signal.SIGKILL); process.wait()
    assert (jar.statistics([['a', 'dog']], [[['a', 'dog']]]) == first).all() and jar._process.pid != process.pid


def test_pipes_do_not_fill_and_threads_take_turns(jar):
    found = {}
    def work(k): found[k] = jar.statistics([['a', 'dog']]*3000, [[['a', 'dog', *['x']*k]]]*3000)
    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2)]
    for t in threads: t.start()
    for t in threads: t.join(100)
    assert {k: set(s[:, 1]) for k, s in found.items()} == {1: {3}, 2: {4}}


def test_python_that_ends_takes_its_jvm_along(java, tables):
    code = 'from caption_nb.meteor import JavaMeteor; j = JavaMeteor(); j._running(); print(j._process.pid)'
    pid = int(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)
    with pytest.raises(ProcessLookupError): os.kill(pid, 0)
