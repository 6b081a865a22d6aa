"Batches: sharing, trimming, order, mirroring, and going on in the middle of an epoch"
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb.batches import CaptionBatches, EvalBatches, ImageSource, epoch_order, mentions_side, plan_epoch, prefetch

VOCAB = SimpleNamespace(pad_id=0, encode=lambda c, max_words=None: [1, *(3 + len(w) for w in c.split()[:max_words]), 2])


def toy(counts, lengths=None, text='a'):
    "A data set whose image i has counts[i] captions"
    ids = [f'{i}.jpg' for i in range(len(counts))]
    captions = {id: [' '.join([text]*(1 + (3*i + 5*j) % 12 if lengths is None else lengths[i])) for j in range(n)]
                for i, (id, n) in enumerate(zip(ids, counts))}
    return SimpleNamespace(name='toy', captions=captions, splits=dict(train=ids))


class Views:
    "A source whose features say which image and view they are"
    views = ('plain', 'flip')

    def read(self, ids, view=0):
        return np.array([[[int(i.split('.')[0]), view]] for i in ids], np.float16)


def same(a, b): return a.ids == b.ids and torch.equal(a.tokens, b.tokens) and torch.equal(a.images, b.images)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 6), st.integers(0, 3), st.integers(0, 50),
       st.booleans())
def test_resume_mid_epoch_gives_the_same_remaining_batches(counts, size, per_image, epoch, stop, flip):
    make = lambda: CaptionBatches(toy(counts), VOCAB, 'train', Views(), images_per_batch=size, captions_per_image=per_image, flip=flip)
    whole, broken, resumed = make(), make(), make()
    for b in (whole, broken): b.set_epoch(epoch)
    expected = list(whole)
    stop, got = min(stop, len(expected)), []
    if stop:
        for b in broken:
            got.append(b)
            if len(got) == stop: break
    resumed.load_state_dict(broken.state_dict())
    resumed.set_epoch(epoch)
    got += list(resumed)
    assert len(got) == len(expected) and all(map(same, got, expected))
    assert resumed.epoch == epoch + 1 and resumed.position == 0
    assert all(map(same, resumed, whole))   # and so does the next epoch


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 6))
def test_every_image_once_trimmed_and_its_captions_in_its_rows(counts, size, per_image):
    data = toy(counts)
    batches = CaptionBatches(data, VOCAB, 'train', Views(), images_per_batch=size, captions_per_image=per_image)
    seen = []
    for b in batches:
        seen += b.ids
        k = len(b.tokens)//len(b.ids)
        assert b.tokens.shape == (len(b.ids)*k, b.lengths.max()) and k <= per_image
        assert ((b.tokens != 0).sum(1) == b.lengths).all() and b.images.dtype == torch.float32
        for i, id in enumerate(b.ids):
            rows = [t[t != 0].tolist() for t in b.tokens[i*k:(i + 1)*k] if t.any()]
            own = [VOCAB.encode(c) for c in data.captions[id]]
            assert len(rows) == min(len(own), per_image) and all(r in own for r in rows)
            assert b.images[i, 0, 0] == int(id.split('.')[0])
    assert sorted(seen) == sorted(data.splits['train'])


def test_more_captions_than_wanted_are_sampled_anew_each_epoch():
    batches = CaptionBatches(toy([9]*30), VOCAB, 'train', Views(), captions_per_image=3)
    chosen = [np.stack(plan_epoch(batches, e).chosen) for e in range(40)]
    assert all(len(set(row)) == 3 for c in chosen for row in c)
    assert len({c.tobytes() for c in chosen}) == 40
    assert set(np.concatenate(chosen).ravel()) == set(range(9))


def test_length_aware_batches_pad_little_and_still_mix():
    lengths = np.random.default_rng(0).integers(3, 38, 3200)
    orders = [epoch_order(lengths, 32, np.random.default_rng(e)) for e in (0, 1)]
    padding = sum(len(b)*lengths[b].max() for b in orders[0])/lengths.sum() - 1
    assert padding < 0.07
    first = {i: frozenset(b.tolist()) for b in orders[0] for i in b}
    second = {i: frozenset(b.tolist()) for b in orders[1] for i in b}
    assert np.mean([len(first[i] & second[i]) for i in range(3200)]) < 5   # other company in every epoch
    means = np.array([lengths[b].mean() for b in orders[0]])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.4             # long and short batches alternate


def test_flip_spares_sides_and_follows_the_coin():
    data = toy([2]*200)
    for id in data.splits['train'][:50]: data.captions[id][1] = 'a dog on the LEFT'
    batches = CaptionBatches(data, VOCAB, 'train', Views(), flip=True)
    views = {}
    for b in batches:
        for id, v in zip(b.ids, b.images[:, 0, 1].tolist()): views[id] = v
    flipped = [views[id] for id in data.splits['train']]
    assert sum(flipped[:50]) == 0 and 45 < sum(flipped[50:]) < 105
    assert mentions_side('the right-hand side') and mentions_side('leftmost') and not mentions_side('a bright cleft')


def test_flip_without_the_view_is_refused():
    with pytest.raises(ValueError, match="only the views .'plain',.*extract features with views"):
        CaptionBatches(toy([1]), VOCAB, 'train', ImageSource(['0.jpg'], torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), flip=True)


def test_empty_split_and_image_without_caption_are_named():
    with pytest.raises(ValueError, match="split 'dev' of toy is empty"): CaptionBatches(toy([1]), VOCAB, 'dev', Views())
    with pytest.raises(ValueError, match=r"1 images .* have no caption, first \['1.jpg'\]"):
        CaptionBatches(toy([1, 0]), VOCAB, 'train', Views())


def test_state_of_another_order_is_refused():
    a = CaptionBatches(toy([5]*9), VOCAB, 'train', Views(), seed=1)
    with pytest.raises(ValueError, match='seed: 1 there, 2 here'):
        CaptionBatches(toy([5]*9), VOCAB, 'train', Views(), seed=2).load_state_dict(a.state_dict())


def test_long_captions_are_cut():
    batches = CaptionBatches(toy([1, 1], lengths=[60, 3]), VOCAB, 'train', Views(), max_words=10)
    assert next(iter(batches)).tokens.shape[1] == 12


def test_unshuffled_is_the_order_of_the_data():
    batches = CaptionBatches(toy([3]*10), VOCAB, 'train', Views(), images_per_batch=4, shuffle=False, flip=True)
    assert [i for b in batches for i in b.ids] == batches.ids
    assert all((b.images[:, 0, 1] == 0).all() for b in batches)


def test_prefetch_stays_ahead_stops_and_reports_errors():
    made = []
    def make(x):
        made.append(x)
        if x == 7: raise OSError('disk gone')
        return x
    run = prefetch(make, range(10))
    assert next(run) == 0
    time.sleep(0.1)
    assert made == [0, 1, 2]           # two ahead, no more
    run.close()
    assert not [t for t in threading.enumerate() if t.name.startswith('prefetch')]
    with pytest.raises(OSError, match='disk gone'): list(prefetch(make, range(10)))
    assert list(prefetch(lambda x: x, range(3), depth=0)) == [0, 1, 2]


def test_eval_batches_in_order():
    ids = [f'{i}.jpg' for i in range(10)]
    got = list(EvalBatches(ids, Views(), 4))
    assert [len(b.ids) for b in got] == [4, 4, 2] and [i for b in got for i in b.ids] == ids
    assert got[0].images.dtype == torch.float32
