"Batches: sharing, trimming, order, mirroring, and going on in the middle of an epoch"
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb.batches import CaptionBatches, EvalBatches, ImageSource, epoch_order, mentions_side, pack_captions, pad_captions, plan_epoch, prefetch

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
    plain = SimpleNamespace(views=('plain',), read=Views().read)
    with pytest.raises(ValueError, match="no view 'flip', only .'plain',.*extract features with views=.'plain', 'flip'"):
        CaptionBatches(toy([1]), VOCAB, 'train', plain, flip=True)
    batches = CaptionBatches(toy([1]), VOCAB, 'train', Views(), flip=True)
    batches.source = plain   # another source from the next epoch on is looked at, too
    with pytest.raises(ValueError, match="no view 'flip'"): next(iter(batches))


# ---- the same batches as plain lists give, which is what older runs go on from

def plain_batches(data, epoch, size, per_image, seed, shuffle, flip, length_aware):
    "ids, views, rows of words of every batch, written down as simply as possible"
    ids, rng = data.splits['train'], np.random.default_rng([seed, epoch])
    captions = [[VOCAB.encode(c, 40) for c in data.captions[id]] for id in ids]
    chosen = [np.arange(min(len(own), per_image)) if len(own) <= per_image or not shuffle
              else np.sort(rng.choice(len(own), per_image, replace=False)) for own in captions]
    views = np.zeros(len(ids), int)
    if flip and shuffle:
        free = [not any(mentions_side(data.captions[id][i]) for i in c) for id, c in zip(ids, chosen)]
        views[np.array(free) & (rng.random(len(ids)) < 0.5)] = 1
    longest = np.array([max(len(own[i]) for i in c) for own, c in zip(captions, chosen)])
    if not shuffle: order = np.split(np.arange(len(ids)), range(size, len(ids), size))
    else: order = epoch_order(longest if length_aware else np.zeros_like(longest), size, rng)
    for rows in order:
        shown = [[captions[i][c] for c in chosen[i]] for i in rows]
        k, T = max(map(len, shown)), max(len(c) for own in shown for c in own)
        padded = [[*c, *[0]*(T - len(c))] for own in shown for c in [*own, *[[]]*(k - len(own))]]
        yield [ids[i] for i in rows], views[rows].tolist(), padded


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 6), st.integers(0, 3), st.booleans(),
       st.booleans(), st.booleans())
def test_packed_captions_give_the_batches_of_plain_lists(counts, size, per_image, epoch, shuffle, flip, length_aware):
    data = toy(counts)
    for i, id in enumerate(data.splits['train'][::3]): data.captions[id][-1] += ' left'
    batches = CaptionBatches(data, VOCAB, 'train', Views(), size, per_image, seed=7, shuffle=shuffle, flip=flip, length_aware=length_aware)
    batches.set_epoch(epoch)
    want = list(plain_batches(data, epoch, size, per_image, 7, shuffle, flip, length_aware))
    got = [(b.ids, b.images[:, 0, 1].int().tolist(), b.tokens.tolist()) for b in batches]
    assert got == want and sum(len([r for r in rows if r[0]]) for _, _, rows in want) == batches.num_captions


@given(st.lists(st.lists(st.lists(st.integers(1, 100_000) | st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4), min_size=1, max_size=9))
def test_packing_keeps_every_number(captions):
    packed = pack_captions(iter(captions))
    assert list(packed) == captions == [packed[i - len(packed)] for i in range(len(packed))] and packed.counts.tolist() == [len(c) for c in captions]
    large = max(i for own in captions for c in own for i in c) >= 2**16
    assert packed.tokens.dtype == (np.int32 if large else np.uint16)
    tokens, lengths = pad_captions(packed, np.arange(packed.first[-1])[:, None])
    assert [t[:n].tolist() for t, n in zip(tokens, lengths)] == [c for own in captions for c in own] and tokens.dtype == lengths.dtype == torch.int64


class Many(Views):
    views = ('plain', 'flip', 'crop', 'crop-flip')


def test_views_are_drawn_alike_and_spare_sides():
    data = toy([2]*400)
    for id in data.splits['train'][:100]: data.captions[id][1] = 'a dog on the LEFT'
    make = lambda source=Many(), **kw: CaptionBatches(data, VOCAB, 'train', source, **kw)
    batches = make(views=Many.views)
    epochs = [{id: v for b in batches for id, v in zip(b.ids, b.images[:, 0, 1].tolist())} for _ in range(2)]
    assert epochs[0] != epochs[1]
    views = np.array([[e[id] for id in data.splits['train']] for e in epochs])
    assert set(views[:, :100].ravel()) == {0, 2} and np.bincount(views[:, 100:].ravel().astype(int)).min() > 100
    assert set(plan_epoch(make(views=['crop', 'crop-flip']), 0).views) == {2, 3}
    assert set(plan_epoch(make(views=('crop', 'plain'), shuffle=False), 0).views) == {0}
    for source in (Views(), Many()):   # the short form draws the same
        a, b = plan_epoch(make(source, flip=True), 3), plan_epoch(make(source, views=['plain', 'flip']), 3)
        assert (a.views == b.views).all() and all((x == y).all() for x, y in zip(a.order, b.order))


def test_views_that_cannot_be():
    with pytest.raises(ValueError, match=r"no view 'crpo', only \('plain', 'flip', 'crop', 'crop-flip'\) .did you mean 'crop'"):
        CaptionBatches(toy([1]), VOCAB, 'train', Many(), views=['plain', 'crpo'])
    with pytest.raises(ValueError, match='all mirrored'): CaptionBatches(toy([1]), VOCAB, 'train', Many(), views=['flip', 'crop-flip'])
    with pytest.raises(ValueError, match='give one of the two'): CaptionBatches(toy([1]), VOCAB, 'train', Many(), views=['plain'], flip=True)


def test_state_knows_the_views():
    make = lambda **kw: CaptionBatches(toy([5]*9), VOCAB, 'train', Many(), **kw)
    state = make(views=('plain', 'crop')).state_dict()
    make(views=('plain', 'crop')).load_state_dict(state)
    with pytest.raises(ValueError, match=r"views: \['plain', 'crop'\] there, \['plain', 'flip'\] here"): make(flip=True).load_state_dict(state)
    for flip in (0, 1):   # a state from before views had names
        old = {n: v for n, v in make().state_dict().items() if n != 'views'} | dict(flip=flip, position=1)
        make(flip=bool(flip)).load_state_dict(old)
        with pytest.raises(ValueError, match='views'): make(flip=not flip).load_state_dict(old)


def test_pixels_in_memory_are_mirrored():
    images = torch.randint(0, 256, (3, 3, 4, 5), dtype=torch.uint8)
    source = ImageSource(['a', 'b', 'c'], images)
    assert source.views == ('plain', 'flip') and torch.equal(source.read(['c', 'a']), images[[2, 0]])
    assert torch.equal(source.read(['c', 'a'], 1), images[[2, 0]].flip(3)) and source.read([], 1).shape == (0, 3, 4, 5)


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


def test_prefetch_by_several_threads_keeps_the_order():
    gate, made, lock = threading.Barrier(3, timeout=20), [], threading.Lock()
    def make(x):
        if x < 3: gate.wait()   # passes only if three are made at the same time
        time.sleep((x*7 % 5)/1000)
        with lock: made.append(x)
        return x
    assert list(prefetch(make, range(30), depth=1, workers=3)) == list(range(30)) and sorted(made) == list(range(30))
    def bad(x): return 1//(5 - x)
    run, got = prefetch(bad, range(30), workers=3), []
    with pytest.raises(ZeroDivisionError):
        for x in run: got.append(x)
    assert got == [bad(x) for x in range(5)] and not [t for t in threading.enumerate() if t.name.startswith('prefetch')]


# ---- ranks

def pixels(n: int) -> ImageSource:
    rng = np.random.default_rng(3)
    return ImageSource([f'{i}.jpg' for i in range(n)], torch.from_numpy(rng.integers(0, 256, (n, 3, 2, 3), dtype=np.uint8)))


def noisy(images, rngs):
    "An augmentation that uses all of the generator's bits, and none of its neighbours'"
    assert len(images) == len(rngs) > 0 and images.dtype == torch.uint8
    return images ^ torch.from_numpy(np.stack([r.integers(0, 256, images.shape[1:], dtype=np.uint8) for r in rngs]))


def rows_of(batch) -> dict:
    "image id -> (its captions, its pixels), whatever the padding"
    k = len(batch.tokens)//max(1, len(batch.ids))
    return {id: ([t[t != 0].tolist() for t in batch.tokens[i*k:(i + 1)*k] if t.any()], batch.images[i].tolist())
            for i, id in enumerate(batch.ids)}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2), st.integers(1, 3))
def test_shares_of_the_ranks_are_the_batches_of_one(counts, size, ranks, epoch, workers):
    def make(**kw): return CaptionBatches(toy(counts), VOCAB, 'train', pixels(len(counts)), size, 3, seed=5, flip=True, augment=noisy, **kw)
    one, parts = make(), [make(rank=r, ranks=ranks, workers=workers) for r in range(ranks)]
    for b in (one, *parts): b.set_epoch(epoch)
    whole, shares = list(one), [list(p) for p in parts]
    assert all(len(s) == len(whole) == len(one) for s in shares)   # an empty share is a batch, too: the ranks stay in step
    for i, batch in enumerate(whole):
        assert [s[i].ids for s in shares] == [batch.ids[r::ranks] for r in range(ranks)]
        union = {}
        for s in shares: union |= rows_of(s[i])
        assert union == rows_of(batch) and sum(s[i].num_captions for s in shares) == batch.num_captions
    assert all(p.state_dict() == one.state_dict() for p in parts)


def test_share_of_nothing_has_a_shape():
    for source, shape in ((pixels(3), (0, 3, 2, 3)), (Views(), (0, 1, 2))):
        source = source if shape[1] == 3 else SimpleNamespace(views=('plain',), read=lambda ids, view: np.zeros((len(ids), 1, 2), np.float16))
        batches = CaptionBatches(toy([2, 3, 1]), VOCAB, 'train', source, images_per_batch=2, rank=1, ranks=2, augment=noisy)
        last = min(batches, key=lambda b: len(b.ids)).to('cpu')
        assert last.ids == [] and last.images.shape == shape and last.num_captions == 0
        assert last.tokens.shape == (0, 1) and last.tokens.dtype == torch.int64 and last.inputs.shape == last.targets.shape == (0, 0)


def test_no_rank_gets_all_the_long_captions():
    data = toy([1]*320, lengths=[1 + i % 30 for i in range(320)])
    words = [sum(int(b.lengths.sum()) for b in CaptionBatches(data, VOCAB, 'train', Views(), rank=r, ranks=4)) for r in range(4)]
    assert max(words)/min(words) < 1.1


@pytest.mark.parametrize('rank, ranks', [(1, 1), (-1, 2), (2, 2), (0, 0)])
def test_rank_that_there_is_not(rank, ranks):
    with pytest.raises(ValueError, match='must be at least 0 and less than ranks'):
        CaptionBatches(toy([1]), VOCAB, 'train', Views(), rank=rank, ranks=ranks)


# ---- augmentation

def test_augmentation_knows_only_seed_epoch_and_image():
    n = 23
    def make(**kw): return CaptionBatches(toy([2]*n), VOCAB, 'train', pixels(n), **{**dict(images_per_batch=4, seed=1, augment=noisy), **kw})
    def run(batches, epoch, skip=0):
        batches.load_state_dict({**batches.state_dict(), 'epoch': epoch, 'position': skip})
        return {id: x for b in batches for id, (_, x) in rows_of(b).items()}
    want = run(make(), 3)
    for got in (run(make(images_per_batch=7, workers=3), 3), run(make(length_aware=False, prefetch_depth=0), 3),
                run(make(rank=0, ranks=2, workers=2), 3) | run(make(rank=1, ranks=2), 3)): assert got == want
    rest = run(make(), 3, skip=4)
    assert len(rest) == n - 16 and all(want[id] == x for id, x in rest.items())
    for other in (run(make(), 4), run(make(seed=2), 3)): assert all(want[id] != x for id, x in other.items())
    plain = run(make(augment=None), 3)
    assert all(plain[id] == pixels(n).read([id])[0].tolist() != want[id] for id in want)


def test_features_are_not_augmented():
    batches = CaptionBatches(toy([2]*4), VOCAB, 'train', Views(), augment=lambda *a: pytest.fail('augmented'))
    assert next(iter(batches)).images.dtype == torch.float32
    batches.source, batches.augment = pixels(4), noisy   # from the next epoch on, the encoder learns
    batches.set_epoch(1)
    assert next(iter(batches)).images.dtype == torch.uint8


def test_mirrored_and_augmented_spares_sides():
    data, source = toy([2]*60), pixels(60)
    for id in data.splits['train'][:20]: data.captions[id][0] = 'right of a dog'
    plain = {id: x for b in CaptionBatches(data, VOCAB, 'train', source) for id, (_, x) in rows_of(b).items()}
    mirrored = {id: torch.tensor(x).flip(2).tolist() for id, x in plain.items()}
    got = {id: x for b in CaptionBatches(data, VOCAB, 'train', source, flip=True, augment=lambda x, rngs: x) for id, (_, x) in rows_of(b).items()}
    assert all(got[id] == plain[id] for id in data.splits['train'][:20])
    assert 8 < sum(got[id] == mirrored[id] for id in data.splits['train'][20:]) < 32


def test_eval_batches_in_order():
    ids = [f'{i}.jpg' for i in range(10)]
    got = list(EvalBatches(ids, Views(), 4))
    assert [len(b.ids) for b in got] == [4, 4, 2] and [i for b in got for i in b.ids] == ids
    assert got[0].images.dtype == torch.float32
