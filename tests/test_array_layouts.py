"""Data sets of arrays: read as they are, written and read back, and refused with the place named when something is wrong."""
import dataclasses
import json
import os
import pickle
import shutil
from contextlib import nullcontext

import h5py
import numpy as np
import pytest
import torch
from caption_nb.array_layouts import (ARRAY_LAYOUTS, ArraySource, array_layout, read_arrays, read_coco_pt, read_cs231n, read_sat,
                                      unpack_images, write_sat)
from caption_nb.captioner import Captioner
from caption_nb.config import Config, ConfigError
from caption_nb.data import check, load_data, plot_page
from caption_nb.encoders import make_encoder
from caption_nb.error_browser import error_items, error_page
from caption_nb.features import FeatureStore, StoreError, default_store_path, extract, store_given
from caption_nb.layouts import DataError
from caption_nb.photos import open_image
from caption_nb.scenes import make_scenes
from caption_nb.training import Trainer, given_encoder, prepare_encoder
from caption_nb.views import caption_items, plot_captions
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

SPECIAL = ['<NULL>', '<START>', '<END>', '<UNK>']


@pytest.fixture(scope='module')
def scenes(tmp_path_factory): return make_scenes(tmp_path_factory.mktemp('scenes'), 20, size=64, quiet=True)


def words_of(data) -> dict:
    "id -> captions as words"
    return {i: [c.split() for c in captions] for i, captions in data.captions.items()}


def numbered(captions: list, width: int = 17, known: int | None = None) -> tuple[np.ndarray, list[str]]:
    "Rows of numbers and the vocabulary, as the courses have them; `known`: only so many words get a number"
    vocabulary = SPECIAL + list(dict.fromkeys(w for c in captions for w in c))[:known]
    number = {w: k for k, w in enumerate(vocabulary)}
    rows = [[1, *(number.get(w, 3) for w in c), 2] for c in captions]
    return np.array([r + [0]*(width - len(r)) for r in rows], 'int32'), vocabulary


def pixels_of(data, ids) -> np.ndarray: return np.stack([np.asarray(data.open(i)).transpose(2, 0, 1) for i in ids])


# ---- CS231n -----------------------------------------------------------------------------------------------------

def write_cs231n(folder, data, dims=(4096, 512), urls=True, known=None) -> dict:
    "A data set in the layout of CS231n; what its captions then are"
    folder.mkdir(parents=True, exist_ok=True)
    words = words_of(data)
    halves = {'train': data.splits['train'], 'val': data.splits['dev']}
    pairs = {h: [(k, c[:15]) for k, i in enumerate(ids) for c in words[i]] for h, ids in halves.items()}
    rng = np.random.default_rng(0)
    for h in pairs: rng.shuffle(pairs[h])   # as in the real files, the captions of an image are not neighbours
    rows, vocabulary = numbered([c for h in halves for _, c in pairs[h]], known=known)
    n = len(pairs['train'])
    with h5py.File(folder/'coco2014_captions.h5', 'w') as f:
        for h, part in (('train', rows[:n]), ('val', rows[n:])):
            f[f'{h}_captions'], f[f'{h}_image_idxs'] = part, np.array([k for k, _ in pairs[h]], 'int32')
    forward = {'idx_to_word': vocabulary, 'word_to_idx': {w: k for k, w in enumerate(vocabulary)}}
    (folder/'coco2014_vocab.json').write_text(json.dumps(forward))
    features = {}
    for h, ids in halves.items():
        for dim in dims:
            features[h, dim] = rng.normal(size=(len(ids), dim)).astype('float32')
            kind = 'vgg16_fc7_pca' if dim == 512 else 'vgg16_fc7'
            with h5py.File(folder/f'{h}2014_{kind}.h5', 'w') as f: f['features'] = features[h, dim]
        if urls: (folder/f'{h}2014_urls.txt').write_text(''.join(f'http://farm1.example.com/20/{i}\n' for i in ids))
    want = {i: [] for ids in halves.values() for i in ids}
    for h, ids in halves.items():
        for k, c in pairs[h]: want[ids[k]].append(' '.join(w if w in vocabulary else '<unk>' for w in c))
    return dict(captions=want, vocabulary=vocabulary, features=features)


@pytest.fixture
def cs231n(scenes, tmp_path):
    folder = tmp_path/'coco_captioning'
    return folder, write_cs231n(folder, scenes)


def test_cs231n_is_read(scenes, cs231n):
    folder, want = cs231n
    found = read_cs231n(folder)
    assert found.parsed.captions == want['captions'] and found.words == want['vocabulary']
    assert found.parsed.splits == {'train': scenes.splits['train'], 'dev': scenes.splits['dev']}
    assert not found.parsed.notes and found.images is None
    for kind, dim in (('vgg16_fc7', 4096), ('vgg16_fc7_pca', 512)):
        source = found.features[kind]
        assert source.shape == (1, dim) and source.ids == list(want['captions']) and len(source) == len(source.ids)
        blocks = list(source.blocks(7))
        assert all(b.dtype == np.float16 and b.shape == (len(ids), 1, dim) for ids, b in blocks)
        assert [i for ids, _ in blocks for i in ids] == source.ids
        every = np.concatenate([want['features']['train', dim], want['features']['val', dim]]).astype('float16')
        assert np.array_equal(np.concatenate([b for _, b in blocks])[:, 0], every)


def test_cs231n_without_addresses_and_with_unknown_words(scenes, tmp_path):
    want = write_cs231n(tmp_path/'a', scenes, dims=(512,), urls=False, known=6)
    found = read_cs231n(tmp_path/'a')
    assert list(found.parsed.captions.values()) == list(want['captions'].values())
    assert found.parsed.splits['train'][1] == 'train2014-000001' and found.parsed.splits['dev'][0] == 'val2014-000000'
    assert list(found.features) == ['vgg16_fc7_pca'] and '<unk>' in str(found.parsed.notes)


def test_cs231n_images_without_captions_and_names_that_come_twice(cs231n):
    folder, _ = cs231n
    urls = folder/'val2014_urls.txt'
    first = (folder/'train2014_urls.txt').read_text().split('\n')[0]
    urls.write_text('\n'.join([first, *urls.read_text().split('\n')[1:]]))
    with h5py.File(folder/'coco2014_captions.h5', 'r+') as f:
        images = f['train_image_idxs'][()]
        f['train_image_idxs'][...] = np.where(images == 2, 3, images)
    found = read_cs231n(folder)
    bare = [i for i, c in found.parsed.captions.items() if not c]
    assert len(bare) == 1 and bare[0] not in found.parsed.splits['train'] and bare[0] in found.features['vgg16_fc7'].ids
    assert found.parsed.splits['dev'][0] == 'val2014-000000' and len(found.parsed.notes) == 2


def test_cs231n_without_features(cs231n):
    folder, want = cs231n
    for p in folder.glob('*vgg16*'): p.unlink()
    found = read_cs231n(folder)
    assert found.features == {} and found.parsed.captions == want['captions'] and 'no features' in found.parsed.notes[0]


def change(path, name, to):
    with h5py.File(path, 'r+') as f:
        del f[name]
        if to is not None: f[name] = to


def edit(path, change_):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change_(content)))


def swap_two(v):
    v['word_to_idx']['a'], v['word_to_idx']['<UNK>'] = v['word_to_idx']['<UNK>'], v['word_to_idx']['a']
    return v


CAPTIONS, VOCAB, PCA, URLS = 'coco2014_captions.h5', 'coco2014_vocab.json', 'val2014_vgg16_fc7_pca.h5', 'train2014_urls.txt'


@pytest.mark.parametrize('fault, words', [
    (lambda d: (d/CAPTIONS).unlink(), [CAPTIONS, 'no such file']),
    (lambda d: (d/VOCAB).unlink(), [VOCAB, 'no such file']),
    (lambda d: (d/PCA).unlink(), [PCA, 'no such file']),
    (lambda d: (d/CAPTIONS).write_bytes((d/CAPTIONS).read_bytes()[:-200]), [CAPTIONS, 'cut off']),
    (lambda d: (d/CAPTIONS).write_text('<!DOCTYPE html>'), [CAPTIONS, 'no HDF5']),
    (lambda d: change(d/CAPTIONS, 'val_captions', None), [CAPTIONS, "no array 'val_captions'"]),
    (lambda d: change(d/CAPTIONS, 'val_captions', np.zeros(4, 'int32')), [CAPTIONS, 'val_captions', 'shape (N, T)', '(4)']),
    (lambda d: change(d/CAPTIONS, 'val_captions', np.zeros((4, 17))), ['val_captions', 'whole numbers', 'float64']),
    (lambda d: change(d/CAPTIONS, 'val_image_idxs', np.zeros(3, 'int32')), ['val_captions', '3 val_image_idxs']),
    (lambda d: change(d/CAPTIONS, 'val_image_idxs', np.full(10, -1)), ['val_image_idxs', 'row 0', 'below 0']),
    (lambda d: change(d/CAPTIONS, 'val_image_idxs', np.full(10, 77)), ['val_image_idxs', '77']),
    (lambda d: change(d/CAPTIONS, 'val_captions', np.full((10, 17), 5000)), ['val_captions, row 0', '5000', 'outside of the vocabulary']),
    (lambda d: change(d/CAPTIONS, 'val_captions', np.full((10, 17), 2)), ['val_captions, row 0', 'begin with <START>']),
    (lambda d: change(d/CAPTIONS, 'val_captions', np.full((10, 3), [1, 4, 4])), ['row 0 and 9 more', 'no <END>']),
    (lambda d: change(d/CAPTIONS, 'val_captions', np.full((10, 4), [1, 2, 4, 0])), ['row 0', 'after <END>']),
    (lambda d: change(d/CAPTIONS, 'val_captions', np.full((10, 4), [1, 0, 4, 2])), ['row 0', 'inside']),
    (lambda d: change(d/PCA, 'features', np.zeros((5, 512), 'float32')), ['val', '5', 'disagree']),
    (lambda d: change(d/PCA, 'features', np.zeros((2, 512, 7, 7), 'float32')), [PCA, 'shape (N, D)', '(2, 512, 7, 7)']),
    (lambda d: change(d/PCA, 'features', np.zeros((2, 512), 'int64')), [PCA, 'floats', 'int64']),
    (lambda d: change(d/PCA, 'features', np.zeros((2, 256), 'float32')), [PCA, '256', 'equally many']),
    (lambda d: change(d/PCA, 'features', h5py.ExternalLink(str(d/'train2014_vgg16_fc7_pca.h5'), 'features')), [PCA, 'another file']),
    (lambda d: (d/URLS).write_text('http://x.example/a.jpg\n'), [URLS, 'disagree']),
    (lambda d: (d/URLS).write_text('http://x.example/\n'), [URLS, 'row 1', 'empty']),
    (lambda d: (d/URLS).write_bytes(b'http://x.example/caf\xe9.jpg\n'), [URLS, 'UTF-8']),
    (lambda d: edit(d/VOCAB, swap_two), [VOCAB, 'word_to_idx', "'<UNK>', 'a'", 'another number']),
    (lambda d: edit(d/VOCAB, lambda v: {**v, 'idx_to_word': v['idx_to_word'][:4] + v['idx_to_word'][4:5]*2}), [VOCAB, 'two numbers']),
    (lambda d: edit(d/VOCAB, lambda v: {**v, 'idx_to_word': v['idx_to_word'][4:]}), [VOCAB, "'<NULL>', '<START>', '<END>'"]),
    (lambda d: edit(d/VOCAB, lambda v: {**v, 'idx_to_word': [*v['idx_to_word'], 7]}), [VOCAB, 'should be a word, got 7']),
    (lambda d: edit(d/VOCAB, lambda v: {'words': []}), [VOCAB, "no 'idx_to_word'"]),
    (lambda d: edit(d/VOCAB, lambda v: []), [VOCAB, "no 'idx_to_word'"]),
    (lambda d: (d/VOCAB).write_text((d/VOCAB).read_text()[:-5]), [VOCAB, 'not JSON']),
    (lambda d: (d/VOCAB).write_text('{"idx_to_word": [], "idx_to_word": []}'), [VOCAB, "twice: 'idx_to_word'"]),
])
def test_cs231n_faults(cs231n, fault, words):
    folder, _ = cs231n
    fault(folder)
    with pytest.raises((DataError, FileNotFoundError)) as e: read_cs231n(folder)
    assert all(w in str(e.value) for w in words), e.value


def test_idx_to_word_may_be_a_dictionary(cs231n):
    folder, want = cs231n
    edit(folder/VOCAB, lambda v: {**v, 'idx_to_word': {str(k): w for k, w in enumerate(v['idx_to_word'])}})
    assert read_cs231n(folder).words == want['vocabulary']
    edit(folder/VOCAB, lambda v: {**v, 'idx_to_word': {k: w for k, w in v['idx_to_word'].items() if k != '5'}})
    with pytest.raises(DataError, match='should be 0 to'): read_cs231n(folder)


def test_features_beyond_half_precision(cs231n):
    folder, _ = cs231n
    change(folder/PCA, 'features', np.full((2, 512), 1e9, 'float32'))
    found = read_cs231n(folder)
    with pytest.raises(DataError, match=f'vgg16_fc7_pca of .{found.parsed.splits["dev"][0]}.*not finite'): list(found.features['vgg16_fc7_pca'])


# ---- EECS 498 ---------------------------------------------------------------------------------------------------

def coco_pt(data, known=None) -> dict:
    ids = [*data.splits['train'], *data.splits['dev']]
    n = len(data.splits['train'])
    rows, vocabulary = numbered([words_of(data)[i][0][:15] for i in ids], known=known)
    pixels, rows = torch.from_numpy(pixels_of(data, ids)), torch.from_numpy(rows).long()
    return {'train_images': pixels[:n], 'val_images': pixels[n:], 'train_captions': rows[:n], 'val_captions': rows[n:],
            'vocab': {'idx_to_token': vocabulary, 'token_to_idx': {w: k for k, w in enumerate(vocabulary)}}}


@pytest.fixture(scope='module')
def pt(scenes): return coco_pt(scenes)


@pytest.mark.parametrize('zipped', [True, False], ids=['now', 'before 1.6'])
def test_coco_pt_is_read(scenes, pt, tmp_path, zipped):
    torch.save(pt, tmp_path/'coco.pt', _use_new_zipfile_serialization=zipped)
    found = read_coco_pt(tmp_path/'coco.pt')
    assert {s: len(i) for s, i in found.parsed.splits.items()} == {s: len(scenes.splits[s]) for s in ('train', 'dev')}
    assert found.parsed.captions['train-000002.png'] == [' '.join(words_of(scenes)[scenes.splits['train'][2]][0][:15])]
    pixels = dict(found.images)
    assert list(pixels) == list(found.parsed.captions) == found.images.ids and found.images.shape == (3, 64, 64)
    assert np.array_equal(pixels['val-000001.png'], pt['val_images'][1].numpy()) and found.words == pt['vocab']['idx_to_token']


class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('how', ['zip', 'old', 'pickle'])
def test_a_pt_that_holds_code_is_refused_and_nothing_runs(pt, tmp_path, how):
    bad, path = {**pt, 'train_images': Trap(tmp_path/'harm')}, tmp_path/'coco.pt'
    if how == 'pickle': path.write_bytes(pickle.dumps(bad, protocol=2))
    else: torch.save(bad, path, _use_new_zipfile_serialization=how == 'zip')
    with pytest.raises(DataError, match='coco.pt.*code that would run') as e: read_arrays(path)
    assert not (tmp_path/'harm').exists() and 'mkdir' in str(e.value)


@pytest.mark.parametrize('fault, words', [
    (dict(train_images=None), ["no tensor 'train_images'"]),
    (dict(val_captions=torch.ones(2, 17)), ["'val_captions'", 'whole numbers', 'float32']),
    (dict(val_captions=torch.ones(2, 17, dtype=torch.bfloat16)), ["'val_captions'", 'whole numbers', 'bfloat16']),
    (dict(val_captions=torch.ones(5, 17, dtype=torch.long)), ['2 val_images', '5 val_captions']),
    (dict(val_images=torch.zeros(2, 64, 64, 3, dtype=torch.uint8)), ["'val_images'", '(N, 3, H, W)', '(2, 64, 64, 3)']),
    (dict(val_images=torch.zeros(2, 3, 64, 64)), ["'val_images'", 'uint8', 'float32']),
    (dict(val_images=torch.zeros(2, 3, 24, 24, dtype=torch.uint8)), ['several sizes']),
    (dict(val_captions=torch.full((2, 17), 10**6)), ['val_captions, row 0', '1000000', 'outside']),
    (dict(vocab=['a']), ["no 'idx_to_token'"]),
    (dict(vocab={'idx_to_token': [*SPECIAL, 'a', 'a'], 'token_to_idx': {}}), ['idx_to_token', "two numbers: 'a'"]),
    (dict(vocab={'idx_to_token': [*SPECIAL, 'a'], 'token_to_idx': {'a': 4}}), ['token_to_idx', "'<NULL>'"])])
def test_coco_pt_faults(pt, tmp_path, fault, words):
    torch.save({k: v for k, v in {**pt, **fault}.items() if v is not None}, tmp_path/'coco.pt')
    with pytest.raises(DataError) as e: read_coco_pt(tmp_path/'coco.pt')
    assert all(w in str(e.value) for w in ['coco.pt', *words]), e.value


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('share', [0., 0.01, 0.5, 0.999])
def test_a_cut_off_pt_is_named(pt, tmp_path, zipped, share):
    path = tmp_path/'coco.pt'
    torch.save(pt, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])
    with pytest.raises(DataError, match='coco.pt.*(damaged|no file of torch.save)'): read_coco_pt(path)


@pytest.mark.parametrize('content', ['<!DOCTYPE html>', 'hello', '404: not found'])
def test_a_pt_that_is_text(tmp_path, content):
    (tmp_path/'coco.pt').write_text(content)
    with pytest.raises(DataError, match='no file of torch.save'): read_arrays(tmp_path)
    torch.save([1], tmp_path/'coco.pt')
    with pytest.raises(DataError, match='expected a dictionary'): read_arrays(tmp_path)


# ---- Show, Attend and Tell --------------------------------------------------------------------------------------

def parts(data) -> dict:
    words = words_of(data)
    return {s: (ids, [words[i] for i in ids], map(data.open, ids)) for s, ids in data.splits.items()}


def write(folder, data, base='scenes', **how):
    how = {'min_word_freq': 0, 'size': 64, 'words_from': list(data.splits), 'quiet': True, **how}
    return write_sat(folder, base, parts(data), **how)


@pytest.fixture(scope='module')
def one_sat(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp('sat')
    assert write(folder, scenes) == []
    return folder


@pytest.fixture
def sat(one_sat, tmp_path): return shutil.copytree(one_sat, tmp_path/'set')


def test_sat_round_trip(scenes, sat, tmp_path):
    found = read_sat(sat)
    assert found.parsed.splits == scenes.splits and not found.parsed.notes
    assert found.parsed.captions == {i: [' '.join(c) for c in words_of(scenes)[i]] for ids in scenes.splits.values() for i in ids}
    pixels = dict(found.images)
    assert found.images.shape == (3, 64, 64) and list(pixels) == list(found.parsed.captions)
    assert all(np.array_equal(pixels[i], np.asarray(scenes.open(i)).transpose(2, 0, 1)) for i in pixels)
    again = {s: (ids, [[c.split() for c in found.parsed.captions[i]] for i in ids], [pixels[i] for i in ids]) for s, ids in found.parsed.splits.items()}
    write_sat(tmp_path/'again', 'scenes', again, min_word_freq=0, size=64, words_from=list(again), quiet=True)
    for p in sat.iterdir():
        other = tmp_path/'again'/p.name
        if p.suffix == '.json': assert p.read_bytes() == other.read_bytes()
        else: assert np.array_equal(h5py.File(p)['images'][()], h5py.File(other)['images'][()])


def test_sat_files_are_those_that_other_programs_read(scenes, sat):
    "The layout's definition, read without our reader"
    with h5py.File(sat/'TRAIN_IMAGES_scenes.hdf5') as f:
        images, per_image = f['images'], f.attrs['captions_per_image']
        assert images.shape == (len(scenes.splits['train']), 3, 64, 64) and images.dtype == np.uint8 and per_image == 5
    captions, lengths = (json.loads((sat/f'TRAIN_{n}_scenes.json').read_text()) for n in ('CAPTIONS', 'CAPLENS'))
    numbers = json.loads((sat/'WORDMAP_scenes.json').read_text())
    n = len(numbers)
    assert [numbers[w] for w in ('<pad>', '<unk>', '<start>', '<end>')] == [0, n - 3, n - 2, n - 1]
    assert sorted(numbers.values()) == list(range(n)) and len(captions) == len(lengths) == 5*len(scenes.splits['train'])
    assert {len(c) for c in captions} == {52}
    words = words_of(scenes)[scenes.splits['train'][1]]
    assert captions[5:10] == [[n - 2, *(numbers[w] for w in c), n - 1] + [0]*(50 - len(c)) for c in words]
    assert lengths[5:10] == [len(c) + 2 for c in words]


def test_sat_without_our_names(scenes, sat):
    for p in sat.glob('*IMAGEIDS*'): p.unlink()
    found = read_arrays(sat)
    assert found.parsed.splits['train'][:2] == ['TRAIN-000000.png', 'TRAIN-000001.png'] and 'VAL-000000.png' in found.parsed.captions
    assert found.parsed.captions['TRAIN-000001.png'] == [' '.join(c) for c in words_of(scenes)[scenes.splits['train'][1]]]


def test_sat_chooses_repeats_and_leaves_out(tmp_path):
    image = Image.new('L', (30, 20), 77)
    captions = {'two.jpg': [['a', 'b'], ['c']], 'many.jpg': [[w] for w in 'abcdefg'], 'long.jpg': [['a']*51], 'both.jpg': [['b']*60, ['b']]}
    split = {'train': (list(captions), list(captions.values()), [image]*4)}
    notes = write_sat(tmp_path, 'x', split, min_word_freq=0, size=16, quiet=True)
    assert any('1 image of train left out' in n for n in notes) and any('2 captions of more than 50 words' in n for n in notes)
    assert any('2 captions beyond 5 an image' in n for n in notes)
    found = read_sat(tmp_path).parsed.captions
    assert list(found) == ['two.jpg', 'many.jpg', 'both.jpg'] and found['two.jpg'] == ['a b', 'c'] and found['both.jpg'] == ['b']
    assert len(found['many.jpg']) == 5 and found['many.jpg'] == sorted(found['many.jpg'])
    rows = json.loads((tmp_path/'TRAIN_CAPTIONS_x.json').read_text())
    assert rows[0] == rows[2] == rows[4] and rows[1] == rows[3]
    with h5py.File(tmp_path/'TRAIN_IMAGES_x.hdf5') as f: assert f['images'].shape == (3, 3, 16, 16) and (f['images'][()] == 77).all()
    reverse = {'train': (list(captions)[::-1], list(captions.values())[::-1], [image]*4)}
    write_sat(tmp_path/'b', 'x', reverse, min_word_freq=0, size=16, quiet=True)
    assert read_sat(tmp_path/'b').parsed.captions['many.jpg'] == found['many.jpg']   # whatever the order of the images
    chosen = set()
    for seed in range(4):
        write_sat(tmp_path/'b', 'x', {'train': (list(captions), list(captions.values()), [image]*4)}, seed=seed, size=4, min_word_freq=0, force=True, quiet=True)
        chosen.add(tuple(read_sat(tmp_path/'b').parsed.captions['many.jpg']))
    assert len(chosen) > 1


def test_sat_squeezes_photos_like_pillow(tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (40, 90, 3), 'uint8')
    image = Image.fromarray(photo)
    write_sat(tmp_path, 'x', {'train': (['a', 'b'], [[['a']]]*2, [image, photo.transpose(2, 0, 1)])}, 0, quiet=True)
    want = np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert all(np.array_equal(a, want) for _, a in read_sat(tmp_path).images)


def test_sat_words_come_from_the_train_split_alone(scenes, tmp_path):
    notes = write(tmp_path, scenes, words_from=('train',), min_word_freq=1)
    train = [w for i in scenes.splits['train'] for c in words_of(scenes)[i] for w in c]
    numbers = json.loads((tmp_path/'WORDMAP_scenes.json').read_text())
    assert set(numbers) - {'<pad>', '<unk>', '<start>', '<end>'} == {w for w in train if train.count(w) > 1}
    assert any('became <unk>' in n for n in notes) and '<unk>' in str(read_sat(tmp_path).parsed.notes)


def test_special_words_in_a_caption_do_not_end_it(tmp_path):
    said = [['<start>', 'a', '<end>', 'b', '<pad>', '<unk>']]
    write_sat(tmp_path, 'x', {'train': (['a.jpg'], [said], [Image.new('RGB', (4, 4))])}, 0, size=4, quiet=True)
    assert read_sat(tmp_path).parsed.captions == {'a.jpg': ['<unk> a <unk> b <unk> <unk>']}


def test_several_sets_in_one_folder(scenes, sat):
    write(sat, scenes, base='other', captions_per_image=1)
    with pytest.raises(DataError, match="several sets: 'other', 'scenes'"): read_sat(sat)
    assert len(read_sat(sat, 'other').parsed.captions[scenes.images[0]]) == 1
    assert read_sat(sat/'WORDMAP_scenes.json').parsed.captions == read_sat(sat, 'scenes').parsed.captions
    with pytest.raises(FileNotFoundError, match="did you mean 'scenes'"): read_sat(sat, 'scene')


def test_an_interrupted_set_is_not_taken_for_whole(scenes, tmp_path):
    def broken():
        yield scenes.open(scenes.images[0])
        raise OSError('disk gone')
    split = {'train': (scenes.images, list(words_of(scenes).values()), broken())}
    with pytest.raises(OSError, match='disk gone'): write_sat(tmp_path, 'x', split, 0, size=8, quiet=True)
    assert not any(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match='no WORDMAP'): read_sat(tmp_path)
    write(tmp_path, scenes, base='x')   # no force needed: there is no set yet


def test_a_set_is_replaced_as_a_whole(scenes, sat):
    with pytest.raises(FileExistsError, match='force=True'): write(sat, scenes)
    words = words_of(scenes)
    ids = scenes.splits['train']
    write_sat(sat, 'scenes', {'train': (ids, [words[i] for i in ids], map(scenes.open, ids))}, 0, size=8, force=True, quiet=True)
    assert read_sat(sat).parsed.splits == {'train': ids} and not list(sat.glob('VAL_*'))


@pytest.mark.parametrize('splits, how, words', [
    ({'trian': ([], [], [])}, {}, "did you mean 'train'"),
    ({'train': (['a'], [], [])}, {}, '1 ids, but captions of 0'),
    ({'train': (['a', 'a'], [[['x']]]*2, [])}, {}, "'a' comes twice"),
    ({'train': (['../a'], [[['x']]], [])}, {}, 'leads out'),
    ({'train': (['a'], [['x y']], [])}, {}, 'a: a caption should be a list of words'),
    ({'train': (['a'], [[['x y']]], [])}, {}, 'without spaces'),
    ({'train': (['a'], [[]], [])}, {}, 'nothing to write'),
    ({'train': (['a', 'b'], [[['x']]]*2, [Image.new('RGB', (2, 2))])}, {}, "no image for 'b'"),
    ({'train': (['a'], [[['x']]], [Image.new('RGB', (2, 2))]*2)}, {}, 'more images than the 1 ids'),
    ({'train': (['a'], [[['x']]], [np.zeros((2, 2, 3), 'uint8')])}, {}, 'the image of a should be uint8 of shape (3, H, W)'),
    ({'train': (['a'], [[['x']]], [])}, dict(words_from=['all']), 'words_from'),
    ({'train': (['a'], [[['x']]], [])}, dict(captions_per_image=0), 'at least 1'),
    ({'train': (['a'], [[['x']]], [])}, dict(base='a/b'), 'base')])
def test_write_sat_faults(tmp_path, splits, how, words):
    with pytest.raises(ValueError) as e: write_sat(tmp_path/'new', **{'base': 'x', 'splits': splits, 'size': 4, 'quiet': True, **how})
    assert words in str(e.value) and not list(tmp_path.glob('new/WORDMAP*'))


def set_row(k, value):
    def changed(rows): rows[k] = value; return rows
    return changed


IMAGES, CAPS, LENS, MAP, IDS = ('TRAIN_IMAGES_scenes.hdf5', 'TRAIN_CAPTIONS_scenes.json', 'TRAIN_CAPLENS_scenes.json',
                                'WORDMAP_scenes.json', 'TRAIN_IMAGEIDS_scenes.json')


def no_attribute(path):
    with h5py.File(path, 'r+') as f: del f.attrs['captions_per_image']


@pytest.mark.parametrize('fault, words', [
    *[(lambda d, n=n: (d/n).unlink(), [n]) for n in (IMAGES, CAPS, LENS)],
    (lambda d: (d/MAP).unlink(), ['WORDMAP_<base>.json']),
    *[(lambda d, n=n: (d/n).write_bytes((d/n).read_bytes()[:-3000 if n == IMAGES else -30]), [n]) for n in (IMAGES, CAPS, LENS, MAP, IDS)],
    (lambda d: change(d/IMAGES, 'images', np.zeros((16, 64, 64, 3), 'uint8')), [IMAGES, '(N, 3, H, W)', '(16, 64, 64, 3)']),
    (lambda d: change(d/IMAGES, 'images', np.zeros((16, 3, 64, 64), 'float32')), [IMAGES, 'uint8', 'float32']),
    (lambda d: change(d/IMAGES, 'images', None), [IMAGES, "no array 'images'", 'nothing']),
    (lambda d: change(d/IMAGES, 'images', np.zeros((15, 3, 64, 64), 'uint8')), [CAPS, '80 captions', '15 images with 5']),
    (lambda d: change(d/IMAGES, 'images', np.zeros((16, 3, 32, 32), 'uint8')), ['several sizes', 'TRAIN (32, 32)']),
    (lambda d: no_attribute(d/IMAGES), [IMAGES, 'captions_per_image', 'None']),
    (lambda d: edit(d/CAPS, set_row(3, [9999]*52)), [CAPS, 'row 3', '9999', 'outside of the vocabulary']),
    (lambda d: edit(d/CAPS, set_row(3, [1, 2])), [CAPS, 'row 3', 'as many numbers']),
    (lambda d: edit(d/CAPS, set_row(3, ['a']*52)), [CAPS, 'whole numbers']),
    (lambda d: edit(d/CAPS, set_row(3, [1.5]*52)), [CAPS, 'whole numbers']),
    (lambda d: edit(d/CAPS, set_row(3, [2**70]*52)), [CAPS, 'whole numbers']),
    (lambda d: edit(d/CAPS, lambda rows: {'rows': rows}), [CAPS, 'should hold a list']),
    (lambda d: edit(d/LENS, lambda rows: rows[:-1]), [LENS, '79 lengths', '80 captions']),
    (lambda d: edit(d/LENS, set_row(7, 3)), [LENS, 'row 7', 'length 3', 'has']),
    (lambda d: edit(d/LENS, set_row(7, 'x')), [LENS, 'whole numbers']),
    (lambda d: edit(d/MAP, lambda m: {**m, 'a': 2}), [MAP, "'a'", 'the number 2']),
    (lambda d: edit(d/MAP, lambda m: {**m, 'zebra': 10**6}), [MAP, 'should be 0 to']),
    (lambda d: edit(d/MAP, lambda m: {**m, 'zebra': 'x'}), [MAP, "'zebra'", 'whole number']),
    (lambda d: edit(d/MAP, lambda m: {('oov' if w == '<unk>' else w): k for w, k in m.items()}), [MAP, "'<unk>'"]),
    (lambda d: (d/MAP).write_text((d/MAP).read_text().replace('{', '{"a": 1, ', 1)), [MAP, "twice: 'a'"]),
    (lambda d: edit(d/IDS, lambda v: {**v, 'ids': v['ids'][:3]}), [IDS, '16 images']),
    (lambda d: edit(d/IDS, lambda v: {**v, 'ids': v['ids'][:-1] + v['ids'][:1]}), [IDS, 'two images']),
    (lambda d: edit(d/IDS, lambda v: {**v, 'ids': ['../../x.png'] + v['ids'][1:]}), [IDS, 'leads out']),
    (lambda d: edit(d/IDS, lambda v: {**v, 'captions': [6] + v['captions'][1:]}), [IDS, 'captions[0]', '6'])])
def test_sat_faults(sat, fault, words):
    fault(sat)
    with pytest.raises((DataError, FileNotFoundError)) as e: read_sat(sat)
    assert all(w in str(e.value) for w in words), e.value


def test_the_same_name_in_two_splits(sat):
    edit(sat/'VAL_IMAGEIDS_scenes.json', lambda v: {**v, 'ids': json.loads((sat/IDS).read_text())['ids'][:len(v['ids'])]})
    with pytest.raises(DataError, match='VAL_IMAGEIDS_scenes.json.*two images'): read_sat(sat)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.lists(st.sampled_from('abcdefgh<é'), max_size=7), min_size=1, max_size=8), min_size=1, max_size=5),
       st.integers(1, 6), st.integers(0, 2))
def test_any_captions_round_trip(tmp_path_factory, captions, per_image, freq):
    folder = tmp_path_factory.mktemp('any')
    ids = [f'{k}.png' for k in range(len(captions))]
    write_sat(folder, 'x', {'train': (ids, captions, [np.zeros((3, 2, 2), 'uint8')]*len(ids))}, freq, per_image, size=2, quiet=True)
    found = read_sat(folder).parsed.captions
    every = [w for own in captions for c in own for w in c]
    for i, own in zip(ids, captions):
        want = [' '.join(w if every.count(w) > freq else '<unk>' for w in c) for c in own]
        assert len(found[i]) == min(len(own), per_image)
        left = iter(want)
        assert all(c in left for c in found[i])   # in their order


# ---- photos -----------------------------------------------------------------------------------------------------

def test_unpacked_photos_are_the_pixels(scenes, sat, tmp_path):
    found = read_sat(sat)
    folder = unpack_images(found, tmp_path/'photos', quiet=True)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*scenes.images, 'unpacked.json'])
    for i, a in found.images: assert np.array_equal(np.asarray(open_image(folder/i)).transpose(2, 0, 1), a)
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    gone = folder/scenes.images[5]
    gone.unlink()
    unpack_images(found.images, folder, quiet=True)
    assert {p for p in folder.iterdir() if before[p] != p.stat().st_mtime_ns} == {gone}


def test_unpacking_goes_on_where_it_was_broken_off(sat, tmp_path, monkeypatch):
    import caption_nb.array_layouts as module
    found, real, done = read_sat(sat), module.atomic_write, []
    def breaks(path, content):
        if len(done) == 7: raise KeyboardInterrupt
        done.append(path)
        return real(path, content)
    monkeypatch.setattr(module, 'atomic_write', breaks)
    with pytest.raises(KeyboardInterrupt): unpack_images(found, tmp_path/'p', workers=1, quiet=True)
    monkeypatch.setattr(module, 'atomic_write', real)
    there = len(list((tmp_path/'p').glob('*.*g')))
    assert 0 < there < len(found.images)
    unpack_images(found, tmp_path/'p', quiet=True)
    assert all((tmp_path/'p'/i).is_file() for i in found.images.ids)


def test_folders_of_other_photos_are_left_alone(cs231n, sat, pt, tmp_path):
    torch.save(pt, tmp_path/'coco.pt')
    folder = unpack_images(read_arrays(tmp_path/'coco.pt'), tmp_path/'p', quiet=True)
    with pytest.raises(DataError, match='photos of another data set'): unpack_images(read_sat(sat), folder, quiet=True)
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'a.jpg').write_text('mine')
    with pytest.raises(DataError, match='other files'): unpack_images(read_sat(sat), tmp_path/'mine', quiet=True)
    with pytest.raises(DataError, match='no photos'): unpack_images(read_cs231n(cs231n[0]), tmp_path/'new', quiet=True)
    change(sat/IMAGES, 'images', np.zeros((16, 3, 64, 64), 'uint8'))
    source = read_coco_pt(tmp_path/'coco.pt').images
    darker = ArraySource('photos', source.shape, 'uint8', [(ids, read_coco_pt_zero(len(ids))) for ids, _ in source.parts])
    with pytest.raises(DataError, match='another data set'): unpack_images(darker, folder, quiet=True)


def read_coco_pt_zero(n):
    from contextlib import nullcontext
    return lambda: nullcontext(np.zeros((n, 3, 64, 64), 'uint8'))


def test_names_may_hold_folders(tmp_path):
    image = np.arange(12, dtype='uint8').reshape(3, 2, 2)
    write_sat(tmp_path/'s', 'x', {'train': (['a/b/c.jpg'], [[['x']]], [image])}, 0, size=2, quiet=True)
    folder = unpack_images(read_sat(tmp_path/'s'), tmp_path/'p', quiet=True)
    assert np.array_equal(np.asarray(open_image(folder/'a/b/c.jpg')).transpose(2, 0, 1), image)


# ---- read by id -------------------------------------------------------------------------------------------------

def three(cs231n, sat, pt, tmp_path) -> dict:
    "An `ArraySource` of each kind of file, and all that is in it"
    torch.save(pt, tmp_path/'coco.pt')
    torch.save(pt, tmp_path/'old.pt', _use_new_zipfile_serialization=False)
    sources = dict(pt=read_coco_pt(tmp_path/'coco.pt').images, old=read_coco_pt(tmp_path/'old.pt').images, sat=read_sat(sat).images,
                   vgg=read_cs231n(cs231n[0]).features['vgg16_fc7'])
    return {name: (source, dict(source)) for name, source in sources.items()}


def same(source, want, ids): return np.array_equal(source.read(ids), np.stack([want[i] for i in ids]))


def test_images_are_read_by_id_in_any_order(cs231n, sat, pt, tmp_path):
    for source, want in three(cs231n, sat, pt, tmp_path).values():
        ids = source.ids
        for some in (ids, ids[::-1], ids[3:9] + ids[5:6]*2 + ids[-2:], []): assert source.read(some).shape == (len(some), *source.shape)
        assert same(source, want, ids) and same(source, want, ids[::-1]) and same(source, want, [ids[5], *ids[2:7], ids[-1], ids[0]])
        assert source.read(ids).dtype == source.dtype
        with pytest.raises(KeyError, match='e.g. .nothing'): source.read([ids[0], 'nothing'])
        source.close()
        assert same(source, want, ids[1:3])


def _in_another(source, ids, queue): queue.put(source.read(ids))


@pytest.mark.parametrize('how', ['fork', 'spawn'])
def test_images_are_read_in_other_processes(cs231n, sat, pt, tmp_path, how):
    import multiprocessing
    context = multiprocessing.get_context(how)
    for source, want in list(three(cs231n, sat, pt, tmp_path).values())[::1 if how == 'fork' else 2]:
        ids = source.ids[::-3]
        assert same(source, want, ids)   # the files are open before the other process starts
        queue = context.Queue()
        others = [context.Process(target=_in_another, args=(source, ids, queue)) for _ in range(2 if how == 'fork' else 1)]   # spawn imports torch
        for p in others: p.start()
        found = [queue.get(timeout=60) for _ in others]
        for p in others: p.join()
        assert all(np.array_equal(f, source.read(ids)) for f in found) and same(source, want, ids)


def test_images_are_read_by_several_threads(cs231n, sat, pt, tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    for source, want in three(cs231n, sat, pt, tmp_path).values():
        source.close()
        orders = [np.random.default_rng(k).permutation(source.ids).tolist() for k in range(16)]
        with ThreadPoolExecutor(8) as pool: assert all(pool.map(lambda ids: same(source, want, ids), orders))


def test_pickled_sources_hold_no_pixels(cs231n, sat, pt, tmp_path):
    for source, want in three(cs231n, sat, pt, tmp_path).values():
        source.read(source.ids)
        packed = pickle.dumps(source)
        assert len(packed) < 3000 and same(pickle.loads(packed), want, source.ids[2:5])


def test_a_file_that_was_replaced_meanwhile_is_refused(cs231n, sat, pt, tmp_path):
    for name, (source, _) in three(cs231n, sat, pt, tmp_path).items():
        path = source.parts[0][1].path
        other = tmp_path/'other'
        other.write_bytes(path.read_bytes())
        source.read(source.ids[:1])
        os.replace(other, path)
        for read in (lambda: source.read(source.ids[:1]), lambda: list(source), lambda: pickle.loads(pickle.dumps(source)).read(source.ids[:1])):
            with pytest.raises(DataError, match=f'{path.name} has been changed or replaced'): read()
        path.unlink()
        with pytest.raises((DataError, FileNotFoundError), match='no such file'): source.read(source.ids[:1])


def test_fingerprints_tell_arrays_apart(cs231n, sat, pt, tmp_path):
    prints = {name: source.fingerprint for name, (source, _) in three(cs231n, sat, pt, tmp_path).items()}
    assert prints.pop('old') == prints['pt'] and len(set(prints.values())) == 3   # not of the file's form
    torch.save({**pt, 'val_images': 255 - pt['val_images']}, tmp_path/'coco.pt')
    assert read_coco_pt(tmp_path/'coco.pt').images.fingerprint != prints['pt']


# ---- which layout -----------------------------------------------------------------------------------------------

def test_the_layout_is_seen(cs231n, sat, pt, tmp_path):
    (tmp_path/'e').mkdir()
    torch.save(pt, tmp_path/'e'/'coco.pt')
    for path, name in ((cs231n[0], 'cs231n'), (cs231n[0]/'coco2014_captions.h5', 'cs231n'), (sat, 'sat'), (sat/MAP, 'sat'),
                       (tmp_path/'e', 'eecs498'), (tmp_path/'e'/'coco.pt', 'eecs498')):
        assert array_layout(path)[0] == name and read_arrays(path).layout == read_arrays(path, name).layout == name
    assert array_layout(tmp_path, below=False) is None and array_layout(tmp_path/'nothing') is None
    with pytest.raises(FileNotFoundError, match="of layout 'sat'"): read_arrays(cs231n[0], 'sat')
    with pytest.raises(FileNotFoundError, match='looked for'): read_arrays(tmp_path/'e', 'sat')
    with pytest.raises(ValueError, match='did you mean'): read_arrays(sat, 'cs231')
    assert set(ARRAY_LAYOUTS) == {'cs231n', 'eecs498', 'sat'}


def test_torch_is_imported_only_for_pt():
    import subprocess, sys
    code = 'import sys, caption_nb.array_layouts; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


# ---- as ordinary data sets --------------------------------------------------------------------------------------

@pytest.fixture
def sets(cs231n, sat, pt, tmp_path) -> dict:
    (tmp_path/'eecs').mkdir()
    torch.save(pt, tmp_path/'eecs'/'coco.pt')
    return dict(cs231n=cs231n[0], eecs498=tmp_path/'eecs', sat=sat)


def tiny(data, tmp_path, **changes) -> Config:
    small = dict(min_freq=1, embed_dim=8, hidden_dim=8, attention_dim=8, epochs=1, images_per_batch=8, beam=1, threads=1, precision='fp32',
                 max_len=5, cache_dir=str(tmp_path/'cache'))
    return Config.from_dict({**small, 'data': str(data), **changes})


HOW = {'cs231n': dict(encoder='given:vgg16_fc7_pca'), 'sat': dict(encoder='scene_cnn', image_size=64, image_store='auto'),
       'eecs498': dict(encoder='mobilenetv2_050', encoder_weights='random', image_size=64, flip=True)}


@pytest.mark.parametrize('layout', ARRAY_LAYOUTS)
def test_each_layout_trains_from_its_arrays(sets, tmp_path, layout):
    data = load_data(sets[layout])
    assert data.layout == layout and data.fingerprint == load_data(sets[layout], layout).fingerprint and check(data, quiet=True).ok
    trainer = Trainer(tiny(sets[layout], tmp_path, **HOW[layout]), tmp_path/'run', quiet=True).prepare()
    trainer.fit()
    found = trainer.evaluate('dev')
    assert set(found.captions) == set(data.splits['dev']) and np.isfinite(found.scores.corpus['CIDEr'])
    captioner, id = Captioner.load(tmp_path/'run'/'checkpoints'/'best', 'cpu'), data.splits['dev'][0]
    photo = data.open(id) if data.has_photos else data.features['vgg16_fc7_pca'].read([id])[0]
    assert captioner.caption(photo) == captioner.caption([photo])[0] == found.captions[id]
    items = caption_items(data, found.captions, per_image=found.scores.per_image)
    assert plot_captions(items) and plot_page(data, n=2) and error_page(tmp_path/'e.html', error_items(
        found.captions, data.references('dev'), found.scores.per_image, data.picture), embed=1)
    assert not list(sets[layout].glob('**/*.png'))   # nothing was unpacked


def test_photos_and_splits_are_those_of_the_arrays(scenes, sets):
    data = load_data(sets['sat'])
    assert data.splits == scenes.splits and data.photos is not None and not data.features
    for i in data.images[::5]: assert np.array_equal(np.asarray(data.open(i)), np.asarray(scenes.open(i)))
    with pytest.raises(DataError, match='no file, but a row of an array.*unpack_images'): data.path(data.images[0])
    with pytest.raises(KeyError, match='e.g. .nothing'): data.open('nothing')
    small = pickle.loads(pickle.dumps(data.subset(6)))
    assert len(small.images) == 6 and all(small.open(i) == data.open(i) for i in small.images)
    course = load_data(sets['cs231n'])
    assert not course.has_photos and course.splits == {s: scenes.splits[s] for s in ('train', 'dev')}
    for call in (course.open, course.path, lambda i: course.versions([i])):
        with pytest.raises(DataError, match="no photos: train on these with encoder='given:vgg16_fc7' or 'given:vgg16_fc7_pca'"): call(course.images[0])
    assert course.picture(course.images[0])().size and course.subset(5).features.keys() == course.features.keys()


def test_captions_with_their_photos_are_better_than_what_was_made_of_them(scenes, sat, tmp_path):
    shutil.copytree(scenes.root.parent, tmp_path/'both')
    for p in sat.iterdir(): shutil.copy(p, tmp_path/'both')
    assert load_data(tmp_path/'both').layout == 'scenes' and load_data(tmp_path/'both', 'sat').layout == 'sat'
    assert load_data(tmp_path/'both'/MAP).layout == 'sat'
    (tmp_path/'top').mkdir()
    for p in sat.iterdir(): shutil.copy(p, tmp_path/'top')
    shutil.copytree(scenes.root.parent, tmp_path/'top'/'below')
    assert load_data(tmp_path/'top').layout == 'sat'   # what lies in the folder itself comes first


def test_photos_in_files_may_be_given_beside_the_arrays(sat, tmp_path):
    folder = unpack_images(read_sat(sat), tmp_path/'photos', quiet=True)
    data = load_data(sat, images=folder)
    assert data.photos is None and data.path(data.images[0]).is_file() and check(data, quiet=True).ok
    (folder/data.images[3]).unlink()
    with pytest.raises(FileNotFoundError, match='1 image of 20'): load_data(sat, images=folder)
    with pytest.raises(FileNotFoundError, match='no such folder of images'): load_data(sat, images=tmp_path/'nowhere')


@pytest.mark.parametrize('layout', ['cs231', 'eecs', 'SAT'])
def test_misspelt_layouts(sets, layout):
    with pytest.raises(ValueError, match='unknown layout .*(did you mean|valid)'): load_data(sets['sat'], layout)


def test_a_layout_that_is_not_there(sets):
    with pytest.raises(FileNotFoundError, match="of layout 'eecs498'.*\\*.pt"): load_data(sets['sat'], 'eecs498')
    (sets['cs231n']/'coco2014_vocab.json').unlink()
    with pytest.raises(FileNotFoundError, match='coco2014_vocab.json'): load_data(sets['cs231n'])


def test_the_word_map_of_another_set_is_noticed(scenes, sat, tmp_path):
    write(tmp_path/'other', scenes, words_from=('dev',), min_word_freq=1)
    shutil.copy(tmp_path/'other'/MAP, sat/MAP)
    with pytest.raises(DataError, match='outside of the vocabulary.*one source'): load_data(sat)


def test_check_tells_what_cannot_be_read(cs231n, sat):
    data = load_data(sat)
    os.utime(sat/IMAGES, (0, 0))
    report = check(data, quiet=True)
    assert list(report.problems) == ['unreadable image'] and len(report.problems['unreadable image']) == len(data.splits['train'])
    change(cs231n[0]/PCA, 'features', np.full((2, 512), np.nan, 'float32'))
    report = check(load_data(cs231n[0]), quiet=True)
    assert len(report.problems['unreadable image']) == 2 and 'not finite' in str(report)
    with h5py.File(cs231n[0]/CAPTIONS, 'r+') as f: f['train_image_idxs'][...] = np.where(f['train_image_idxs'][()] == 2, 3, f['train_image_idxs'][()])
    change(cs231n[0]/PCA, 'features', np.ones((2, 512), 'float32'))
    report = check(load_data(cs231n[0]), quiet=True)
    assert report.ok and len(report.remarks['no caption']) == 1 and '2 vgg16' not in str(report.problems)


def test_same_names_other_pixels_are_other_features(pt, tmp_path):
    data = []
    for home, images in (('a', pt['train_images']), ('b', 255 - pt['train_images'])):
        (tmp_path/home/'course').mkdir(parents=True)
        torch.save({**pt, 'train_images': images}, tmp_path/home/'course'/'coco.pt')
        data.append(load_data(tmp_path/home/'course'))
    encoder = make_encoder('scene_cnn', 'random', image_size=32).freeze()
    assert data[0].images == data[1].images and default_store_path(data[0], encoder) != default_store_path(data[1], encoder)
    extract(data[0], encoder, tmp_path/'store.h5', quiet=True)
    with pytest.raises(StoreError, match='have changed since'): extract(data[1], encoder, tmp_path/'store.h5', quiet=True)


# ---- features that are given ------------------------------------------------------------------------------------

@pytest.fixture
def given_run(cs231n, tmp_path):
    config = tiny(cs231n[0], tmp_path, encoder='given:vgg16_fc7_pca', epochs=2)
    trainer = Trainer(config, tmp_path/'run', quiet=True).prepare()
    trainer.fit()
    return trainer


def test_given_features_lie_in_an_ordinary_store(cs231n, given_run):
    store, want = given_run.features, cs231n[1]['features']
    assert isinstance(store, FeatureStore) and (store.grid, store.dim, store.views) == ((1, 1), 512, ('plain',))
    assert store.ids == given_run.data.images and store.attrs['origin']['features'] == 'vgg16_fc7_pca'
    assert np.array_equal(store.read(given_run.data.splits['dev'])[:, 0], want['val', 512].astype('float16'))
    again = Trainer(given_run.config, given_run.run.parent/'again', quiet=True).prepare()
    assert again.features.path == store.path
    again.lock.release()


def test_given_features_are_copied_in_blocks(cs231n, tmp_path, monkeypatch):
    data, seen, real = load_data(cs231n[0]), [], ArraySource.read
    ids = [f'{k}.jpg' for k in range(1000)]
    source = data.features['vgg16_fc7'] = ArraySource('vgg16_fc7', (1, 8), 'float16', [(ids, lambda: nullcontext(np.ones((1000, 8), 'float32')))])
    data.captions, data.splits, _ = {i: ['a'] for i in ids}, {'train': ids}, source.fingerprint
    encoder = given_encoder(tiny(cs231n[0], tmp_path, encoder='given:vgg16_fc7'), data)
    monkeypatch.setattr(ArraySource, 'read', lambda self, ids: seen.append(len(ids)) or real(self, ids))
    store = store_given(data, encoder, tmp_path/'s.h5', quiet=True)
    assert sum(seen) == 1000 == len(store) and max(seen) <= 256 and (store.read(ids) == 1).all()


def test_a_run_on_given_features_goes_on_and_refuses_others(cs231n, given_run, tmp_path):
    longer = dataclasses.replace(given_run.config, epochs=3)
    Trainer(longer, given_run.run, quiet=True).prepare().fit()
    path = cs231n[0]/'train2014_vgg16_fc7_pca.h5'
    with h5py.File(path) as f: shape = f['features'].shape
    change(path, 'features', np.ones(shape, 'float32'))
    with pytest.raises(ConfigError, match='features: other content'): Trainer(dataclasses.replace(longer, epochs=4), given_run.run, quiet=True).prepare()
    for half, n in (('train', shape[0]), ('val', 2)): change(cs231n[0]/f'{half}2014_vgg16_fc7_pca.h5', 'features', np.ones((n, 7), 'float32'))
    with pytest.raises(ConfigError, match='7 numbers an image, those that the weights belong to 512'): Trainer(longer, given_run.run, quiet=True).prepare()


def test_a_model_of_given_features_says_why_it_sees_no_photos(cs231n, given_run, tmp_path):
    captioner = Captioner.load(given_run.checkpoints/'best', 'cpu')
    for call in (captioner.caption, captioner.explain):
        with pytest.raises(ValueError, match='features that came with its data set.*cannot see photos. Give it such features.*1 × 512'):
            call(Image.new('RGB', (8, 8)))
    features = cs231n[1]['features']['val', 512]
    ids = given_run.data.splits['dev']
    want = [given_run.evaluate('dev').captions[i] for i in ids]
    assert captioner.caption(features[:, None]) == captioner.caption([torch.from_numpy(f) for f in features]) == want
    np.save(tmp_path/'f.npy', features[0])
    assert captioner.caption(tmp_path/'f.npy') == captioner.caption(str(tmp_path/'f.npy')) == captioner.caption(features[:1]) == want[0]
    for bad, words in ((features[0][:9], 'shape .1, 9., but those of given:vgg16_fc7_pca are .1, 512.'), (features[0]*np.nan, 'not finite'),
                       ([features[0], Image.new('RGB', (8, 8))], 'each kind for itself'), (np.zeros((1, 512), 'uint8'), 'array of uint8')):
        with pytest.raises(ValueError, match=words): captioner.caption(bad)
    np.save(tmp_path/'bad.npy', np.array([Trap(tmp_path/'harm')], object), allow_pickle=True)
    with pytest.raises(ValueError, match='bad.npy holds no array of numbers'): captioner.caption(tmp_path/'bad.npy')
    assert not (tmp_path/'harm').exists()


@pytest.mark.parametrize('layout, encoder, words', [
    ('cs231n', 'mobilenetv2_050', "nothing to look at, for this data set has features and no photos.*encoder='given:vgg16_fc7' or"),
    ('cs231n', 'scene_cnn', 'nothing to look at'), ('cs231n', 'given', 'several.*given:vgg16_fc7 or given:vgg16_fc7_pca'),
    ('cs231n', 'given:vgg16_fc', "did you mean 'vgg16_fc7'"), ('sat', 'given', 'brought no features along'),
    ('eecs498', 'given:vgg16_fc7', 'brought no features along')])
def test_which_encoder_goes_with_which_data(sets, tmp_path, layout, encoder, words):
    with pytest.raises(ConfigError, match=words): Trainer(tiny(sets[layout], tmp_path, encoder=encoder), tmp_path/'run', quiet=True).prepare()


@pytest.mark.parametrize('field', [dict(flip=True), dict(image_size=64), dict(pca=8), dict(finetune_from=0), dict(feature_crops=2),
                                   dict(encoder_pool=True), dict(encoder_weights='random'), dict(crop=0.1), dict(image_store='auto')])
def test_what_cannot_be_said_of_given_features(field, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(field))): tiny('x', tmp_path, encoder='given', **field)


def test_features_of_a_network_may_stand_in_for_photos_that_are_not_there(scenes, sets, tmp_path):
    encoder = prepare_encoder(tiny('x', tmp_path, **HOW['eecs498']))
    course = load_data(sets['cs231n'])
    extract(scenes, encoder, tmp_path/'own.h5', course.images, ('plain', 'flip'), quiet=True)
    trainer = Trainer(tiny(sets['cs231n'], tmp_path, **HOW['eecs498'], features=str(tmp_path/'own.h5')), tmp_path/'run', quiet=True).prepare()
    trainer.fit()
    assert set(trainer.evaluate('dev').captions) == set(course.splits['dev'])


def test_a_folder_below_and_any_of_its_files(cs231n, tmp_path):
    "coco_captioning.zip unpacks to a folder"
    want = load_data(cs231n[0])
    for path in (tmp_path, cs231n[0]/'coco2014_vocab.json', cs231n[0]/'train2014_urls.txt'):
        found = load_data(path)
        assert found.layout == 'cs231n' and found.captions == want.captions and found.splits == want.splits
    assert load_data(tmp_path, 'cs231n').captions == want.captions
    shutil.copytree(cs231n[0], tmp_path/'again')
    with pytest.raises(DataError, match='holds several data sets of arrays: again, coco_captioning; name one'): load_data(tmp_path)


def test_captions_as_text_come_before_arrays_in_a_folder_below(scenes, sat, tmp_path):
    data = tmp_path/'flickr'
    shutil.copytree(scenes.root.parent, data)
    shutil.copytree(sat, data/'prepared')
    assert load_data(data).layout == 'scenes' and load_data(data/'prepared').layout == 'sat'


def test_files_that_are_nearly_called_as_they_should_be_are_told(cs231n, sat):
    (cs231n[0]/'val2014_urls.txt').rename(cs231n[0]/'val2014_url.txt')
    assert 'val2014_url.txt is not read: did you mean val2014_urls.txt? Rename it' in read_cs231n(cs231n[0]).parsed.notes
    assert not read_sat(sat).parsed.notes
    for p in list(sat.glob('VAL_*')): p.rename(p.with_name(f'VALID_{p.name[4:]}'))
    notes = read_sat(sat).parsed.notes
    assert len(notes) == 4 and any(n.startswith('VALID_IMAGES_') and 'did you mean VAL_IMAGES_' in n for n in notes)


def test_the_files_of_another_set_are_no_misspelling(sat):
    for p in list(sat.iterdir()): shutil.copy(p, p.with_name(f'{p.stem}2{p.suffix}'))
    for p in sat.glob('VAL_*_scenes.*'): p.unlink()
    assert read_sat(sat, 'scenes').parsed.notes == []


def test_check_of_captions_without_anything_to_see(cs231n):
    for p in cs231n[0].glob('*_vgg16_*'): p.unlink()
    remarks = check(load_data(cs231n[0]), quiet=True).remarks
    assert not remarks.keys() & {'features, and no photos', 'the same photo under several names'}
