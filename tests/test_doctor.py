"""The doctor: planted faults of every kind are found and named; what is sound gives no alarm; the hash lookup against brute force."""
import dataclasses
import importlib.metadata
import json
import shutil
from contextlib import nullcontext
from itertools import permutations
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from caption_nb import doctor
from caption_nb.array_layouts import ArraySource
from caption_nb.cli import main
from caption_nb.config import Config
from caption_nb.data import CaptionData, DataError, load_data
from caption_nb.doctor import Finding, Report, caption_faults, examine, mend_encoding, requirement_faults, vocabulary_words
from caption_nb.features import extract
from caption_nb.lookalikes import LIMIT, WORDS, distance, likeness, look_at, mirrored, near_pairs, photo_hash
from caption_nb.scenes import make_scenes
from caption_nb.text import Vocab
from caption_nb.training import demo_config, prepare_encoder

pytestmark = pytest.mark.usefixtures('one_thread')
TINY = Config(encoder='mobilenetv2_050', encoder_weights='random', image_size=64, embed_dim=16, hidden_dim=16, attention_dim=16, images_per_batch=4,
              min_freq=1, threads=1, precision='fp32')


def photos(folder, n=24, seed=0) -> CaptionData:
    "Pictures with much in them, as photos have: smooth noise of many frequencies"
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for k in range(n):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        small.resize((160, 120), Image.Resampling.BICUBIC).save(folder/f'{k:03}.jpg', quality=92)
    ids = [f'{k:03}.jpg' for k in range(n)]
    orders = permutations('red blue green dark small noise'.split())
    captions = {i: [' '.join(next(orders)), ' '.join(next(orders))] for i in ids}
    return CaptionData('noise', folder, captions, dict(train=ids[:n - 8], dev=ids[n - 8:n - 4], test=ids[n - 4:]))


def with_copy(data: CaptionData, name: str, split: str = 'test') -> CaptionData:
    "`data` with one more photo, which is there already"
    return dataclasses.replace(data, captions=data.captions | {name: ['noise noise red dark noise']},
                               splits=data.splits | {split: [*data.splits[split], name]})


def quick(data, **kwargs) -> Report: return examine(data, config=kwargs.pop('config', TINY), quick=True, quiet=True, workers=1, **kwargs)
def grave(report) -> list[Finding]: return [f for f in report.findings if f.level in ('fault', 'warning') and f.part not in ('software', 'machine', 'disk')]


@pytest.fixture()
def data(tmp_path): return photos(tmp_path/'photos')


# ---- lookalikes

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(0, 24), st.booleans())
def test_lookup_finds_what_brute_force_finds(seed, n, limit, mirror):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 1 << 16, (n, WORDS)).astype(np.uint16)
    for i in range(n//2, n):   # copies with a few signs changed, some mirrored
        hashes[i] = hashes[rng.integers(n//2 + 1)]
        for _ in range(rng.integers(40)): hashes[i, rng.integers(WORDS)] ^= np.uint16(1 << rng.integers(16))
        if rng.random() < 0.5: hashes[i] = mirrored(hashes[i])
    hashes = hashes[np.sort(np.unique(hashes, axis=0, return_index=True)[1])]   # equal ones: see the next test
    def d(i, j): return distance(hashes[i], mirrored(hashes[j]) if mirror else hashes[j])
    want = {(i, j): int(d(i, j)) for i in range(len(hashes)) for j in range(i + 1, len(hashes)) if d(i, j) <= limit}
    pairs, apart = near_pairs(hashes, limit, mirror=mirror)
    assert dict(zip(map(tuple, pairs.tolist()), apart.tolist())) == want
    assert len(pairs) == len(want)
    for first in (0, 1, n//3):
        pairs, _ = near_pairs(hashes, limit, first, mirror)
        assert set(map(tuple, pairs.tolist())) == {p for p in want if p[0] < first}


def test_equal_hashes_are_paired_with_the_first_of_them():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 16, (6, WORDS)).astype(np.uint16)[[0, 1, 0, 2, 0, 2]]
    pairs, apart = near_pairs(hashes)
    assert sorted(map(tuple, pairs.tolist())) == [(0, 2), (0, 4), (3, 5)] and not apart.any()
    assert len(near_pairs(np.repeat(hashes[:1], 20_000, axis=0))[0]) == 19_999   # and not 200 millions
    assert [p.shape for p in near_pairs(hashes[:0])] == [(0, 2), (0,)]


CHANGES = {'half': lambda p: p.resize((p.width//2, p.height//2)), 'twice': lambda p: p.resize((p.width*2, p.height*2)),
           'stretched': lambda p: p.resize((p.width, p.height//2)), 'mirrored': ImageOps.mirror, 'grey': lambda p: p.convert('L').convert('RGB'),
           'brighter': lambda p: ImageEnhance.Brightness(p).enhance(1.15), 'cropped': lambda p: p.crop((2, 2, p.width - 2, p.height - 2))}


@pytest.mark.parametrize('change', CHANGES)
def test_a_changed_photo_is_near_itself(data, change):
    for i in data.images[:6]:
        photo, other = data.open(i), CHANGES[change](data.open(i))
        h = photo_hash(other)
        assert distance(photo_hash(photo), mirrored(h) if change == 'mirrored' else h) <= LIMIT
        assert likeness(photo, other, change == 'mirrored') > 0.9


def test_a_photo_of_one_colour_has_no_signs():
    assert not photo_hash(Image.new('RGB', (50, 40), (90, 90, 90))).any()
    assert likeness(Image.new('RGB', (9, 9), 'red'), Image.new('RGB', (20, 20), 'red')) == 1
    assert look_at(__file__).problem.startswith('not an image')
    assert look_at('nowhere.jpg').problem.startswith('missing')


# ---- photos and splits

def test_sound_data_gives_no_alarm(data):
    report = quick(data)
    assert not grave(report) and report.ok
    assert any(f.part == 'copies' and f.level == 'ok' for f in report.findings)


@pytest.mark.parametrize('how, level, word', [('copied', 'fault', 'byte for byte'), ('png', 'fault', 'pixel for pixel'), ('jpeg', 'warning', 'nearly'),
                                              *((name, 'warning', 'nearly') for name in CHANGES)])
def test_the_same_photo_under_another_name_in_test_is_named(data, how, level, word):
    source = data.splits['train'][3]
    if how == 'copied': shutil.copy(data.path(source), data.path(name := 'other.jpg'))
    elif how == 'png': data.open(source).save(data.path(name := 'other.png'))
    else: CHANGES.get(how, lambda p: p)(data.open(source)).save(data.path(name := 'other.jpg'), quality=60)
    found = grave(quick(with_copy(data, name)))
    assert [(f.part, f.level) for f in found] == [('copies', level)]
    assert word in found[0].what and len(found[0].where) == 1 and found[0].remedy
    assert f'{source} (train)' in found[0].where[0] and f'{name} (test)' in found[0].where[0]
    assert ('mirrored' in found[0].where[0]) == (how == 'mirrored')


def test_a_copy_within_train_is_a_note(data):
    shutil.copy(data.path('000.jpg'), data.path('other.jpg'))
    report = quick(with_copy(data, 'other.jpg', 'train'))
    assert not grave(report) and any(f.level == 'note' and 'byte for byte' in f.what for f in report.findings)


def test_scenes_are_alike_by_construction(tmp_path):
    "What is listed is alike indeed; no fault, no warning about copies. A real copy among them is still found"
    scenes = make_scenes(tmp_path/'scenes', 600, 112, seed=0, quiet=True)
    report = quick(scenes, config=demo_config())
    assert not grave(report)
    alike = [f for f in report.findings if f.part == 'copies' and 'show different things' not in f.what]
    assert all(f.level in ('note', 'ok') for f in alike) and sum(len(f.where) for f in alike) <= 5
    ImageOps.mirror(scenes.open(scenes.splits['train'][0])).save(scenes.path('other.jpg'), quality=90)
    found = grave(quick(with_copy(scenes, 'other.jpg'), config=demo_config()))
    assert [f.level for f in found] == ['warning'] and 'other.jpg (test)' in found[0].where[0] and scenes.splits['train'][0] in found[0].where[0]


def test_photos_that_do_not_open_are_named(data):
    data.path('001.jpg').unlink()
    data.path('002.jpg').write_bytes(data.path('002.jpg').read_bytes()[:700])
    found = grave(quick(data))
    assert [f.level for f in found] == ['fault', 'fault']
    assert '001.jpg' in found[0].where[0] and 'missing' in found[0].where[0] and '002.jpg' in found[1].where[0]


def test_names_in_two_splits_and_empty_splits_are_faults(data):
    data = dataclasses.replace(data, splits=data.splits | dict(dev=[*data.splits['dev'], data.splits['train'][0]], test=[]))
    found = {f.what.partition(':')[0]: f for f in grave(quick(data))}
    assert found['in several splits'].level == 'fault' and found['empty split'].level == 'fault'


# ---- captions and vocabulary

@pytest.mark.parametrize('caption, kind', [('a cafÃ© in Paris', 'broken encoding'), ('see https://example.com', 'address or link'),
                                           ('a dog &amp; a cat', 'HTML'), ('a <b>dog</b>', 'HTML'), ('broken image', 'no description'),
                                           ('Image not available.', 'no description'), ('  ', 'empty caption'), ('A', 'one word'), ('bad \ufffd', 'odd characters')])
def test_captions_that_are_none_are_named(data, caption, kind):
    data.captions['004.jpg'] = [*data.captions['004.jpg'], caption]
    found = [f for f in quick(data).findings if kind in f.what]
    assert len(found) == 1 and found[0].level in (('note',) if kind == 'one word' else ('fault', 'warning'))
    assert any('004.jpg' in w for w in found[0].where)


@pytest.mark.parametrize('caption', ['A man breaks a broken chair', 'Ein schönes Café', 'no people are in this image', 'two dogs', '“a cat” sits',
                                     'a sign that says n/a', 'Ünïcödé all over', 'the photo shows a missing poster'])
def test_captions_that_are_fine_give_no_alarm(caption): assert not list(caption_faults(caption))


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x2fff, exclude_categories=['Cs', 'Cc', 'Cn']), max_size=30))
def test_what_was_broken_is_mended(text):
    try: broken = text.encode('utf-8').decode('cp1252')
    except UnicodeDecodeError: return
    assert mend_encoding(broken) in (text, broken) or not text.isascii()   # runs that touch may be read otherwise, never with an error
    if text.isascii(): assert mend_encoding(text) == text


def test_long_captions_and_copied_ones(data):
    data.captions['005.jpg'].append('very ' * 50 + 'long')
    data.captions[data.splits['dev'][0]] = list(data.captions['003.jpg'])
    report = quick(data)
    assert any('longer than max_words' in f.what and '005.jpg' in f.where[0] for f in report.findings)
    assert any('stand in train word for word' in f.what for f in report.findings)


def test_vocabulary_made_of_all_splits_is_a_leak(data, tmp_path):
    data.captions[data.splits['test'][0]] = ['a zebra appears', 'one zebra and a yak']
    sound = Vocab.build(data.train_captions(), 1).save(tmp_path/'sound.json')
    assert not [f for f in grave(quick(data, vocab=sound)) if 'vocab' in f.part and 'json' in f.what]
    everything = [c for captions in data.captions.values() for c in captions]
    leak = Vocab.build(everything, 1).save(tmp_path/'leak.json')
    (tmp_path/'WORDMAP_x.json').write_text(json.dumps({w: k for k, w in enumerate(Vocab.load(leak).words)}))
    for file in (leak, tmp_path/'WORDMAP_x.json'):
        fault = next(f for f in quick(data, vocab=file).findings if f.level == 'fault')
        assert fault.part == 'vocabulary' and {'zebra', 'yak', 'appears'} <= set(fault.where) and file.name in fault.what


def test_a_vocabulary_file_that_is_none(data, tmp_path):
    (tmp_path/'v.json').write_text('[1, 2]')
    with pytest.raises(ValueError, match='v.json holds no words'): vocabulary_words(tmp_path/'v.json')
    report = quick(data, vocab=tmp_path/'v.json')
    assert any('could not be finished' in f.what and 'v.json' in f.what for f in report.findings) and 'copies' in {f.part for f in report.findings}


# ---- store

@pytest.fixture()
def store(data, tmp_path): return extract(data, prepare_encoder(TINY), tmp_path/'store.h5', quiet=True, workers=1)


def test_a_sound_store(data, store):
    report = quick(data, store=store.path)
    assert not [f for f in grave(report) if 'random weights' not in f.what], report
    assert any('encoded again' in f.what and f.level == 'ok' for f in report.findings)


def spoilt(store, change):
    with h5py.File(store.path, 'r+') as f: change(f['features'])


@pytest.mark.parametrize('word, change', [('NaN', lambda rows: rows.__setitem__((5, 0, 0), np.nan)), ('NaN', lambda rows: rows.__setitem__((5, 0, 0), np.inf)),
                                          ('one number', lambda rows: rows.__setitem__(5, 0)),
                                          ('equal features', lambda rows: rows.__setitem__(5, rows[6]))])
def test_rows_that_are_wrong_are_named(data, store, word, change):
    spoilt(store, change)
    found = [f for f in grave(quick(data, store=store.path)) if word in f.what]
    assert len(found) == 1 and '005.jpg' in found[0].where[0] and found[0].remedy


def test_rows_that_were_mixed_up_are_seen_by_encoding_again(data, store):
    spoilt(store, lambda rows: rows.__setitem__(slice(None), rows[:][::-1]))
    assert any('encoded again' in f.what and f.level == 'fault' for f in quick(data, store=store.path).findings)


def test_a_store_of_other_photos(data, store, tmp_path):
    Image.new('RGB', (99, 99), 'red').save(data.path('003.jpg'))
    shutil.copy(data.path('004.jpg'), data.path('new.jpg'))
    found = [f.what for f in quick(with_copy(data, 'new.jpg', 'train'), store=store.path).findings if f.level == 'fault' and f.part == 'store']
    assert any('changed' in w and '003.jpg' in w for w in found) and any('not in it' in w and 'new.jpg' in w for w in found)
    report = quick(data, store=store.path, config=dataclasses.replace(TINY, flip=True, image_size=96))
    what = ' '.join(f.what for f in report.findings if f.part == 'store' and f.level in ('fault', 'warning'))
    assert 'flip' in what and 'size' in what


@pytest.mark.parametrize('content', [b'', b'no store', None])
def test_a_store_that_is_none(data, tmp_path, content):
    path = tmp_path/'x.h5'
    if content is not None: path.write_bytes(content)
    report = quick(data, store=path)
    assert any(f.level == 'fault' and 'x.h5' in f.what for f in report.findings) and any(f.part == 'copies' for f in report.findings)


# ---- measuring, environment, the whole

def test_measurements_name_a_bottleneck(data, store):
    for given in ('', store.path):
        report = examine(data, given, TINY, budget=3, workers=1, quiet=True)
        assert not [f for f in report.findings if 'could not' in f.what], report
        step = report.costs['a step']
        assert set(step) == {'waiting', 'forward', 'backward', 'update'} and min(step.values()) >= 0 < step['backward']
        bottleneck = next(f for f in report.findings if f.part == 'bottleneck')
        assert bottleneck.remedy and bottleneck.what.split(':')[0] in report.costs['a run']
        assert ('encoding' in report.costs['a run']) == (given == '')   # a store: it is done
    assert len(report.figure().axes) == 3


def test_a_part_that_breaks_is_a_finding(data, monkeypatch):
    def broken(v): raise RuntimeError('the roof is on fire')
    monkeypatch.setitem(doctor.PARTS, 'captions', (broken, 'data'))
    report = quick(data)
    assert any(f.part == 'captions' and 'the roof is on fire' in f.what for f in report.findings)
    assert {'copies', 'vocabulary', 'splits'} <= {f.part for f in report.findings}


def test_a_sample_says_so(data, monkeypatch):
    many = photos(data.root.parent/'many', 120)
    report = quick(many, budget=0.)
    assert any('a sample' in f.what and 'of 120' in f.what and '--full' in f.remedy for f in report.findings)
    assert not any('a sample' in f.what for f in quick(many, budget=0., full=True).findings)


def test_the_machine_alone():
    report = examine(quiet=True, quick=True)
    assert {f.part for f in report.findings} >= {'software', 'machine', 'disk'} and not {'splits', 'copies'} & {f.part for f in report.findings}


def test_versions_that_do_not_match():
    have = {'torch': '2.3.0', 'numpy': '2.1+cpu', 'nltk': '3.1'}
    def version(name):
        if name not in have: raise importlib.metadata.PackageNotFoundError(name)
        return have[name]
    found = list(requirement_faults(['torch<2.14,>=2.4', 'numpy>=1.26', 'timm>=1', 'nltk>=3.9; extra == "tokenizers"', 'spacy>=3; extra == "tokenizers"',
                                     'tomli>=2; python_version < "3"'], version))
    assert [level for level, _ in found] == ['warning', 'fault', 'note']
    assert 'torch 2.3.0' in found[0][1] and 'timm is missing' in found[1][1] and 'nltk 3.1' in found[2][1]


def test_report_shows_itself(tmp_path):
    report = Report('x & y')
    report.add('captions', 'warning', 'odd <b>', ['a <script>', *'bcde'], 'mend it')
    report.add('splits', 'fault', 'leak')
    report.add('photos', 'ok', 'fine')
    assert report.table().index('fault   ') < report.table().index('warning ') < report.table().index('ok   ') and '2 more' in report.table()
    page = report._repr_html_()
    assert '<script>' not in page and 'x &amp; y' in page and not report.ok
    saved = json.loads(report.save(tmp_path/'r.json').read_text())
    assert saved['ok'] is False and saved['findings'][0]['where'][4] == 'e'
    with pytest.raises(ValueError, match='level'): report.add('x', 'bad', 'y')
    assert len(report.figure(tmp_path/'f.png').axes) == 1 and (tmp_path/'f.png').stat().st_size


def test_features_without_photos():
    rows = np.random.default_rng(0).normal(size=(20, 1, 8)).astype(np.float16)
    rows[4] = np.nan
    ids = [str(i) for i in range(20)]
    source = ArraySource('fc7', (1, 8), 'float16', [(ids, lambda: nullcontext(rows))])
    data = CaptionData('given', None, {i: ['a dog runs', 'two cats'] for i in ids}, dict(train=ids[:12], dev=ids[12:]), features=dict(fc7=source))
    report = examine(data, config=TINY, budget=3, workers=1, quiet=True)
    assert any('NaN' in f.what and f.where == ['4'] for f in report.findings)
    assert not [f for f in report.findings if 'could not' in f.what], report
    assert 'a step' in report.costs


def test_given_features_beside_photos(data):
    "What is trained on is measured, and the photos are looked at all the same; a wrong name is told as a run would tell it"
    rows = np.random.default_rng(0).normal(size=(len(data.images), 1, 8)).astype(np.float16)
    both = dataclasses.replace(data, features=dict(fc7=ArraySource('fc7', (1, 8), 'float16', [(data.images, lambda: nullcontext(rows))])))
    report = examine(both, config=dataclasses.replace(TINY, encoder='given'), budget=3, workers=1, quiet=True)
    assert not [f for f in report.findings if 'could not' in f.what], report
    assert 'a step' in report.costs and 'encoding' not in report.costs['a run'] and any(f.part == 'photos' for f in report.findings)
    wrong = examine(both, config=dataclasses.replace(TINY, encoder='given:fc6'), quick=True, quiet=True)
    assert any(f.part == 'encoder' and "did you mean 'fc7'" in f.what for f in wrong.findings)


@pytest.mark.parametrize('changes, rows', [({}, 'photos in 1 view by'), (dict(flip=True, feature_crops=2), 'photos in 6 views by'),
                                           (dict(pca=8), 'before and after the PCA, take')])
def test_room_for_features(data, monkeypatch, changes, rows):
    "Of all views that a run wants, and of what a PCA leaves beside what it starts from"
    config = dataclasses.replace(TINY, **changes)
    encoder = prepare_encoder(config)
    need = 2*len(data.images)*(6 if 'flip' in changes else 1)*encoder.grid[0]*encoder.grid[1]*(encoder.dim + config.pca)
    for free, level in ((need, 'ok'), (need - 1, 'fault')):
        monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=free, total=free, used=0))
        found = [f for f in quick(data, config=config).findings if f.part == 'disk' and 'features of' in f.what]
        assert [f.level for f in found] == [level] and rows in found[0].what


def test_slurm_beside_is_no_complaint(tmp_path, monkeypatch):
    (tmp_path/'sbatch').write_text('#!/bin/sh\n')
    (tmp_path/'sbatch').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')
    monkeypatch.delenv('SLURM_JOB_ID', raising=False)
    assert [f.level for f in examine(quiet=True, quick=True).findings if 'SLURM' in f.what] == ['ok']


def test_a_row_that_cannot_be_read_is_no_matter_of_colours():
    def damaged(): raise DataError("photos of '3' cannot be read (gone); copy the file again")
    assert look_at(damaged).problem == "unreadable: photos of '3' cannot be read (gone); copy the file again"


# ---- the command, real photos

def test_command(data, tmp_path, capsys):
    shutil.copy(data.path('000.jpg'), data.path('other.jpg'))
    rows = [f'{i},{c}' for i, captions in data.captions.items() for c in captions] + ['other.jpg,a copy']
    (tmp_path/'captions.txt').write_text('image,caption\n' + '\n'.join(rows) + '\n')
    for split, ids in dict(train=data.splits['train'], dev=data.splits['dev'], test=[*data.splits['test'], 'other.jpg']).items():
        (tmp_path/f'Flickr_8k.{split}Images.txt').write_text('\n'.join(ids) + '\n')
    status = main(['doctor', str(tmp_path), '--quick', '--json', str(tmp_path/'report.json'), '--encoder', 'scene_cnn'])
    out = capsys.readouterr().out
    assert status == 1 and 'byte for byte' in out and 'other.jpg (test)' in out
    assert not json.loads((tmp_path/'report.json').read_text())['ok']
    assert main(['doctor', '--quick']) in (0, 1) and 'torch' in capsys.readouterr().out
    assert main(['doctor', str(tmp_path/'nowhere'), '--quick']) == 1 and 'nowhere' in capsys.readouterr().out
    assert main(['doctor', 'a', 'b', 'c']) == 2 and 'DATA' in capsys.readouterr().err


def test_flickr8k(flickr8k):
    "One photo is there twice, in train; no other pair is near"
    data = load_data(flickr8k).subset(800, seed=1)
    twice = ['2851198725_37b6027625.jpg', '3050606344_af711c726c.jpg']
    whole = load_data(flickr8k)
    for i in twice:
        if i not in data.captions: data.captions[i] = whole.captions[i]; data.splits['train'].append(i)
    report = quick(data, budget=1e9)
    copies = [f for f in report.findings if f.part == 'copies']
    assert len(copies) == 1 and copies[0].level == 'note' and all(i in copies[0].where[0] for i in twice) and len(copies[0].where) == 1
    assert {f.part for f in grave(report)} <= {'vocabulary'}   # of so few captions
