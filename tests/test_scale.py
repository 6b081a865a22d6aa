"Millions of images: what is read, checked and packed piece by piece gives the same as all at once, and needs the memory of a piece"
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

import caption_nb.data as d
from caption_nb.batches import CaptionBatches, plan_epoch
from caption_nb.data import CaptionData, DataError, check, load_data
from caption_nb.text import Vocab, tokenize

IDS = st.sampled_from([f'{i}.jpg' for i in range(12)])
SPLITS = st.dictionaries(st.sampled_from(['train', 'dev', 'test']), st.lists(IDS))


@given(st.dictionaries(st.text(), st.lists(st.text())), SPLITS)
def test_fingerprint_is_that_of_the_whole_json(captions, splits):
    whole = json.dumps([captions, splits], ensure_ascii=False, separators=(',', ':'))
    assert ''.join(d._json_of(captions, splits, 3)) == whole
    data = CaptionData('toy', Path('.'), captions, splits)
    assert data.fingerprint == hashlib.sha256(whole.encode('utf-8', 'surrogatepass')).hexdigest()


@given(SPLITS)
def test_images_in_several_splits(splits):
    where = {}
    for s, ids in splits.items():
        for i in ids: where.setdefault(i, []).append(s)
    got = d.in_several_splits(splits)
    assert got == {i: s for i, s in where.items() if len(s) > 1}
    assert list(got) == [i for i in where if i in got]   # in the order in which they are met


@given(st.lists(st.text(), unique=True, min_size=3), st.integers(0, 5), st.sampled_from([0.1, 0.3]), st.sampled_from([0, 0.2]))
def test_random_splits_are_a_cut_of_the_order_by_hash(ids, seed, dev, test):
    order, n = d.order_by_hash(ids, seed), max(1, round(dev*len(ids)))
    m = max(1, round(test*len(ids))) if test else 0
    want = {'train': order[n + m:], 'dev': order[:n], **({'test': order[n:n + m]} if test else {})}
    assert d.random_splits(ids, seed, dev, test) == {s: sorted(own, key=ids.index) for s, own in want.items()}


@given(st.lists(st.text('abc -'), max_size=30), st.lists(st.text('abcd -'), max_size=30))
def test_vocabulary_of_a_stream(captions, others):
    vocab, words = Vocab.build(iter(captions), min_freq=2), [w for c in captions for w in tokenize(c)]
    assert vocab == Vocab.build(captions, min_freq=2) and set(vocab.words[4:]) == {w for w, n in Counter(words).items() if n > 1}
    got, split = vocab.coverage(iter(others)), [tokenize(c) for c in others]
    unknown = Counter(w for words in split for w in words if w not in vocab.words[4:])
    assert (got.captions, got.whole) == (len(others), sum(not unknown.keys() & words for words in split)) and got.missing == unknown.most_common(10)
    assert (got.tokens - got.known, got.distinct - got.distinct_known) == (unknown.total(), len(unknown))


# ---- files

def some_tokens(folder, rows, **splits):
    (folder/'Some.token.txt').write_text(''.join(f'{key}\tcaption {n}\n' for n, key in enumerate(rows)))
    for split, ids in splits.items(): (folder/f'Some.{split}Images.txt').write_text('\n'.join(ids))
    return folder


def test_numbers_of_captions_need_not_be_in_order(tmp_path):
    keys = ['a.jpg#1', 'a.jpg#2', 'a.jpg#0', 'b.jpg#0', 'b.jpg#7', 'b.jpg#1', 'c.jpg#0', 'c.jpg#1', 'c.jpg#2', 'b.jpg#2', 'a.jpg#3']
    some_tokens(tmp_path, keys)
    assert sorted(len(c) for c in load_data(tmp_path, images=tmp_path, strict=False).captions.values()) == [3, 4, 4]
    for again in ('a.jpg#0', 'a.jpg#1', 'b.jpg#7', 'b.jpg#2', 'c.jpg#1'):
        some_tokens(tmp_path, [*keys, again])
        with pytest.raises(DataError, match=f'row 12: {again} was there before'): load_data(tmp_path, images=tmp_path, strict=False)


def test_a_name_is_one_string_in_captions_and_splits(tmp_path):
    folder = some_tokens(tmp_path, ['a.jpg#0', 'b.jpg#0', 'c.jpg#0'], train=['a.jpg'], dev=['b.jpg'], test=['c.jpg'])
    data = load_data(folder, images=folder, strict=False)
    own = {id(i) for i in data.captions}
    assert all(id(i) in own for ids in data.splits.values() for i in ids)


def test_check_without_photos(tmp_path):
    folder = some_tokens(tmp_path, ['a.jpg#0', 'b.jpg#0', 'c.jpg#0'], train=['a.jpg'], dev=['b.jpg'], test=['c.jpg'])
    data = load_data(folder, images=folder, strict=False)
    report = check(data, photos=False)
    assert report.ok and 'every caption reads' in str(report) and 'opens' not in str(report)
    assert len(check(data, quiet=True).problems['missing image']) == 3


def test_check_takes_few_photos_at_a_time_and_finds_the_same_ones(tmp_path, monkeypatch):
    ids = [f'{i}.png' for i in range(120)]
    for i, id in enumerate(ids): Image.new('L', (2, 2), i % 100).save(tmp_path/id)
    data, looked, look = CaptionData('toy', tmp_path, {i: ['a'] for i in ids}, {'train': ids[:110], 'dev': ids[110:]}), [], d._look
    monkeypatch.setattr(d, '_look', lambda path: looked.append(path) or look(path))
    looks = d._looks(data, 2)
    next(looks)
    looks.close()
    assert len(looked) < 20
    same = check(data, quiet=True).remarks['the same photo under several names']
    split = dict.fromkeys(ids[:110], 'train') | dict.fromkeys(ids[110:], 'dev')
    assert same == [f'{i}.png ({split[f"{i}.png"]}) = {i + 100}.png ({split[f"{i + 100}.png"]})' for i in range(20)]


# ---- memory

def grown(work):
    "What `work` gives; the bytes that Python's memory grew by meanwhile, at its highest and at last"
    tracemalloc.start()
    try: result = work()
    finally: now, peak = tracemalloc.get_traced_memory(); tracemalloc.stop()
    return result, peak, now


def test_vocabulary_and_batches_hold_no_lists_of_words():
    rng, n, k = np.random.default_rng(0), 2000, 5
    words = [f'{a}{b}' for a in 'abcdefghij' for b in 'klmnopqrst']
    ids = [f'{i}.jpg' for i in range(n)]
    captions = {i: [' '.join(rng.choice(words, 11)) for _ in range(k)] for i in ids}
    data = SimpleNamespace(name='toy', captions=captions, splits=dict(train=ids))
    vocab, peak, _ = grown(lambda: Vocab.build((c for own in captions.values() for c in own), 1))
    assert peak < 200_000   # a list of all words has 110,000 entries of 8 bytes
    source = SimpleNamespace(views=('plain', 'flip'))
    batches, peak, kept = grown(lambda: CaptionBatches(data, vocab, 'train', source, captions_per_image=3, flip=True))
    assert kept < n*(k*(13*2 + 8 + 1) + 8 + 8)*1.2 and peak < 1.5*kept
    _, peak, kept = grown(lambda: plan_epoch(batches, 0))
    assert kept < n*(3*2 + 3*8) + 200*len(batches) + 10_000 and peak < 4*kept


def test_bench_measures_a_small_index(tmp_path):
    run = 'import bench.scale as s; from pathlib import Path; import sys; print(s.measured(Path(sys.argv[1]), 500, 2, sys.argv[2])[0].ratio)'
    for layout in ('jsonl', 'tokens'):
        (folder := tmp_path/layout).mkdir()
        done = subprocess.run([sys.executable, '-c', run, folder, layout], capture_output=True, text=True, cwd=Path(__file__).parent.parent,
                              env=os.environ | {'OMP_NUM_THREADS': '1'})
        assert done.returncode == 0, done.stderr
        assert 'resumed: 3 batches' in done.stdout and float(done.stdout.split()[-1]) > 4
