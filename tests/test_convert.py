"One data set in another layout: what comes back is what went in, or it is said before anything is written"
import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import need
from hypothesis import given, settings, strategies as st
from PIL import Image

import caption_nb.convert as module
from caption_nb.array_layouts import ARRAY_LAYOUTS, read_arrays
from caption_nb.cli import main
from caption_nb.convert import FORMS, convert, data_differences, open_source, place_photos, plan, write_data
from caption_nb.data import CaptionData, check, load_data
from caption_nb.layouts import LAYOUTS, DataError, find_captions
from caption_nb.scenes import make_scenes
from caption_nb.text import tokenize

TEXT = [n for n, f in FORMS.items() if f.layout in LAYOUTS]
ARRAYS = [n for n, f in FORMS.items() if f.layout in ARRAY_LAYOUTS]


def pyarrow(name='parquet'):
    if 'parquet' in name: need('pyarrow', find_spec('pyarrow') is not None, 'no pyarrow, which reads Parquet')


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    "Twenty scenes without their boxes, which nothing else holds; some captions trip readers up"
    data = make_scenes(tmp_path_factory.mktemp('scenes')/'s', num_images=20, size=64, quiet=True)
    first, second = data.images[:2]
    data.captions[first][:3] = ['A "red" dog, running | fast; un café .', ' leading # and \t tab', '🐕 [not a list]']
    data.captions[second][0] = '"quoted" first'
    return replace(data, boxes=None)


def read(folder, name):
    return read_arrays(folder).parsed if FORMS[name].layout in ARRAY_LAYOUTS else load_data(folder)


# --- there and back

@pytest.mark.parametrize('name', TEXT)
@pytest.mark.parametrize('photos', ['link', 'copy'])
def test_there_and_back(scenes, tmp_path, name, photos):
    pyarrow(name)
    made = write_data(scenes, tmp_path/'new', name, photos, quiet=True)
    data = load_data(tmp_path/'new')
    assert made.lost == [] and data.layout == FORMS[name].layout and not data.notes
    assert data.fingerprint == made.data.fingerprint and list(data.captions) == list(made.data.captions)
    new = {i: made.names.get(i, i) for i in scenes.images}
    assert data.captions == {new[i]: c for i, c in scenes.captions.items()}
    assert {s: set(i) for s, i in data.splits.items()} == {s: {new[i] for i in ids} for s, ids in scenes.splits.items()}
    if not name.startswith('coco'): assert list(data.captions) == scenes.images and not made.names
    assert check(data, quiet=True).ok
    i = scenes.images[3]
    assert data.path(new[i]).samefile(scenes.path(i)) == (photos == 'link')
    assert not [p for p in (tmp_path/'new').rglob('.*')]
    back = convert(tmp_path/'new', tmp_path/'back', 'jsonl', quiet=True)
    assert {Path(i).name: c for i, c in back.data.captions.items()} == scenes.captions


@pytest.mark.parametrize('name', ARRAYS)
def test_there_and_back_as_words(scenes, tmp_path, name):
    "Captions that are words already come back as they are; the image names of EECS 498 do not"
    first = make_scenes(scenes.root.parent, 20, 64, quiet=True)
    words = {i: [' '.join(tokenize(c)) for c in cs] for i, cs in first.captions.items()}
    if name == 'eecs498': words = {i: cs[:1] for i, cs in words.items()}
    data = replace(first, boxes=None, captions=words)
    if name != 'sat': data = replace(data, splits={s: data.splits[s] for s in ('train', 'dev')})
    within = {i for ids in data.splits.values() for i in ids}
    data = replace(data, captions={i: c for i, c in data.captions.items() if i in within})
    made = write_data(data, tmp_path/'new', name, lossy=True, min_freq=0, size=64, quiet=True)
    assert all('photos' in x or name == 'eecs498' and 'names' in x or 'changed' in x for x in made.lost), made.lost
    parsed, new = read(tmp_path/'new', name), lambda i: made.names.get(i, i)
    known = {w for i in data.splits['train'] for c in words[i] for w in c.split()}
    assert parsed.captions == {new(i): [' '.join(w if w in known else '<unk>' for w in c.split()) for c in words[i]] for i in data.captions}
    assert parsed.splits == {s: [new(i) for i in ids] for s, ids in data.splits.items()} == made.data.splits
    found = read_arrays(tmp_path/'new')
    if name != 'cs231n':
        old = {b: a for a, b in made.names.items()}
        assert all(np.array_equal(a, np.asarray(data.open(old.get(i, i))).transpose(2, 0, 1)) for i, a in found.images)
    back, packed = open_source(tmp_path/'new')
    assert back.captions == parsed.captions and packed is None and back.has_photos == (name != 'cs231n')
    if name == 'cs231n':
        done = convert(tmp_path/'new', tmp_path/'back', 'csv', quiet=True)
        assert done.lost == [] and done.notes == ['the source has no photos']
        with pytest.raises(DataError, match="has no photos, which layout 'sat' is made of"): convert(tmp_path/'new', tmp_path/'n', 'sat')
    else: # and out of the arrays into files
        done = convert(tmp_path/'new', tmp_path/'back', 'csv', quiet=True)
        assert done.lost == [] and load_data(tmp_path/'back').captions == parsed.captions
        again = convert(tmp_path/'new', tmp_path/'again', name, lossy=True, min_freq=0, size=64, quiet=True)
        assert again.data.captions == made.data.captions and not [x for x in again.lost if 'photos' not in x]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found.images, read_arrays(tmp_path/'again').images))


def test_every_layout_can_be_written():
    assert {f.layout for f in FORMS.values()} == {*LAYOUTS, *ARRAY_LAYOUTS} - {'scenes', 'images'}
    for name, why in (('scenes', 'make_scenes'), ('images', 'photos alone'), ('karpaty', "did you mean 'karpathy'")):
        with pytest.raises(ValueError, match=why): plan(CaptionData('x', Path('.'), {}, {}), name)


# --- real data

@pytest.mark.parametrize('name', TEXT)
def test_flickr8k_in_every_layout_and_back(flickr8k, tmp_path, name):
    "7,091 images, of which 91 in no split; the captions equal to the byte"
    pyarrow(name)
    tokens = load_data(flickr8k, 'tokens')
    loose = len(tokens.images) - sum(map(len, tokens.splits.values()))
    made = write_data(tokens, tmp_path/'new', name, 'none', lossy=not FORMS[name].loose, quiet=True)
    assert loose == 91 and made.lost == ([] if FORMS[name].loose else [x for x in made.lost if x.startswith('91 images in no split left out')])
    parsed = LAYOUTS[FORMS[name].layout].read(find_captions(tmp_path/'new')[1])
    within = {i for ids in tokens.splits.values() for i in ids}
    want = {made.names.get(i, i): c for i, c in tokens.captions.items() if FORMS[name].loose or i in within}
    assert parsed.captions == want
    assert {s: set(i) for s, i in parsed.splits.items()} == {s: {made.names.get(i, i) for i in ids} for s, ids in tokens.splits.items()}
    karpathy = load_data(flickr8k, 'karpathy')
    assert plan(karpathy, name).lost == [] and all(tokens.captions[i] == c for i, c in karpathy.captions.items())


def test_flickr8k_splits_of_captions_txt(flickr8k, tmp_path):
    "captions.txt has none of its own: it gets those of the lists beside it, else drawn ones"
    (tmp_path/'a').mkdir()
    shutil.copy(flickr8k/'captions.txt', tmp_path/'a')
    alone = load_data(tmp_path/'a', images=flickr8k/'Images')
    assert {s: len(i) for s, i in alone.splits.items()} == {'train': 5673, 'dev': 709, 'test': 709}
    assert 'the source has no splits; these were drawn, with seed 0, and are now fixed' in plan(alone, 'csv').notes
    for p in flickr8k.glob('*Images.txt'): shutil.copy(p, tmp_path/'a')
    beside = load_data(tmp_path/'a', images=flickr8k/'Images')
    assert beside.splits == load_data(flickr8k, 'tokens').splits and not any('drawn' in n for n in plan(beside, 'csv').notes)


def test_karpathys_words_are_his(flickr8k):
    images = json.loads((flickr8k/'dataset_flickr8k.json').read_text())['images']
    sentences = [s for i in images for s in i['sentences']]
    assert sum(module._karpathy_words(s['raw']) != s['tokens'] for s in sentences) <= 17 and len(sentences) == 35_000


def test_flickr8k_as_arrays(flickr8k, tmp_path):
    "A few real photos and captions as the tutorial has them"
    data = load_data(flickr8k, 'tokens', num_images=12)
    found = plan(data, 'sat', size=32)
    assert any('captions changed' in x for x in found.lost) and 'photos become squares of 32 pixels' in found.lost
    with pytest.raises(DataError, match='does not hold everything') as e: write_data(data, tmp_path/'new', 'sat')
    assert all(x in str(e.value) for x in plan(data, 'sat').lost) and not (tmp_path/'new').exists()
    made = write_data(data, tmp_path/'new', 'sat', lossy=True, size=32, quiet=True)
    assert read_arrays(tmp_path/'new').parsed.captions == made.data.captions and set(made.data.captions) == set(data.captions)
    assert all(c == c.lower() and not c.endswith('.') for cs in made.data.captions.values() for c in cs)
    again = convert(tmp_path/'new', tmp_path/'again', 'csv', quiet=True)   # words that were tokenised once are not again
    assert again.lost == [] and again.data.captions == made.data.captions
    record = json.loads((tmp_path/'new'/'conversion.json').read_text())
    assert record['done'] and record['lost'] == made.lost == found.lost


# --- whatever a caption may hold

_text = st.text(alphabet=st.characters(blacklist_categories=('Cs',)), min_size=1, max_size=20)
_nasty = st.one_of(_text, st.text(alphabet='"|,;\t\n\r#\' a[].jpg\0🐕\u2028\ud800', max_size=14))


@settings(max_examples=25, deadline=None)
@given(st.lists(_nasty, min_size=1, max_size=4), st.lists(_nasty, max_size=2), st.booleans())
def test_any_caption(tmp_path_factory, captions, more, loose):
    "Each layout gives back every caption, or says before what it changes; and never anything else"
    root = tmp_path_factory.mktemp('any')
    data = CaptionData('any', root, {'0.jpg': captions, 'b/1 (a),#.jpg': more, '2.jpg': captions[::-1]},
                       {'train': ['0.jpg'], 'dev': ['b/1 (a),#.jpg'] if not loose else [], 'test': ['2.jpg']})
    for i in data.captions: (root/i).parent.mkdir(exist_ok=True); (root/i).touch()
    for name in TEXT:
        if name == 'parquet' and not find_spec('pyarrow'): continue
        made = write_data(data, root/name, name, 'none', lossy=True, quiet=True)
        parsed = LAYOUTS[FORMS[name].layout].read(find_captions(root/name)[1])
        if made.lost == []: assert parsed.captions == {made.names.get(i, i): c for i, c in data.captions.items()}
        assert parsed.captions == made.data.captions
        plain = not any(x in c for c in captions + more for x in '\n\r\0\ud800')
        if plain and (more or FORMS[name].bare) and (not loose or FORMS[name].loose): assert made.lost == [], (name, made.lost)
        if name in ('jsonl', 'karpathy', 'coco2014') and not loose: assert made.lost == []   # JSON holds everything


@settings(max_examples=10, deadline=None)
@given(st.lists(_nasty, min_size=1, max_size=7))
def test_any_caption_in_arrays(tmp_path_factory, captions):
    root = tmp_path_factory.mktemp('any')
    for i in '01': Image.new('RGB', (9, 7), (90, 10, int(i)*200)).save(root/f'{i}.png')
    data = CaptionData('any', root, {'0.png': captions, '1.png': captions[::-1]}, {'train': ['0.png'], 'dev': ['1.png']})
    for name in ARRAYS:
        made = write_data(data, root/name, name, lossy=True, size=4, min_freq=1, quiet=True)
        assert read_arrays(root/name).parsed.captions == made.data.captions


# --- what is lost is said before

@pytest.mark.parametrize('name', FORMS)
def test_what_is_lost_is_said_before(scenes, tmp_path, name):
    first, second, third = scenes.splits['train'][:3]
    data = replace(scenes, captions={**scenes.captions, first: ['two\nlines'], second: []},
                   splits={**scenes.splits, 'train': [i for i in scenes.splits['train'] if i != third]},
                   boxes={i: [] for i in scenes.images})
    form, lost = FORMS[name], plan(data, name).lost
    assert 'the boxes of the scenes' in lost
    assert any('without a caption left out' in x for x in lost) is not form.bare
    assert any('1 image in no split left out' in x for x in lost) is not form.loose
    assert any(first in x or 'changed' in x for x in lost) is (name in ('tokens', 'results', *ARRAYS))
    before = sorted(scenes.root.rglob('*'))
    with pytest.raises(DataError, match='Lost would be:\n- .*\nNothing was written; with lossy=True'.replace('.*', '(.|\n)*')):
        write_data(data, tmp_path/'new', name)
    assert not (tmp_path/'new').exists() and sorted(scenes.root.rglob('*')) == before


def test_differences_are_named():
    data = CaptionData('x', Path('.'), {'a.jpg': ['one', 'two'], 'b.jpg': ['three']}, {'train': ['a.jpg'], 'dev': ['b.jpg']})
    assert data_differences(data, data) == []
    assert data_differences(data, replace(data, captions={'a.jpg': ['one'], 'b.jpg': ['three']})) == ['1 caption left out: more than an image may have, or too long']
    assert data_differences(data, replace(data, splits={'train': ['a.jpg', 'b.jpg']})) == ["the split of 1 image: 'b.jpg'"]
    assert "1 caption changed: one of b.jpg was 'three' and is 'four'" in data_differences(data, replace(data, captions={**data.captions, 'b.jpg': ['four']}))
    assert data_differences(data, replace(data, captions={'a.jpg': ['one', 'two'], 'x.jpg': ['three']}, splits={'train': ['a.jpg'], 'dev': ['x.jpg']}),
                       {'b.jpg': 'x.jpg'}) == ['1 name of images: b.jpg is called x.jpg']


@pytest.mark.parametrize('name,bad', [('tokens', 'a\tb.jpg'), ('results', 'a|b.jpg'), ('csv', ' a.jpg'), ('kaggle', 'a\n.jpg')])
def test_names_that_a_layout_cannot_hold(tmp_path, name, bad):
    data = CaptionData('x', tmp_path, {bad: ['a']}, {'train': [bad]})
    with pytest.raises(DataError, match=f"layout '{name}' cannot hold image names such as .*rename the files"): plan(data, name)


def test_what_cannot_be_converted(scenes, tmp_path):
    leak = replace(scenes, splits={**scenes.splits, 'dev': scenes.splits['train'][:1]})
    with pytest.raises(DataError, match='in several splits'): plan(leak, 'csv')
    with pytest.raises(DataError, match='no image has a caption'): plan(replace(scenes, captions={i: [] for i in scenes.images}), 'csv')
    with pytest.raises(ValueError, match="photos='liink': did you mean 'link'"): write_data(scenes, tmp_path/'n', 'csv', 'liink')
    gone = replace(scenes, captions={**scenes.captions, 'gone.jpg': ['x']})
    with pytest.raises(FileNotFoundError, match="1 photo of .* not found in .*: 'gone.jpg'; put them there"): write_data(gone, tmp_path/'n', 'csv')
    assert not (tmp_path/'n').exists()
    odd = replace(scenes, captions={**scenes.captions, './a\\b.jpg': ['x']})
    with pytest.raises(DataError, match='does not give back what was written'): write_data(odd, tmp_path/'m', 'csv', 'none', packed=object())
    assert [p.name for p in (tmp_path/'m').iterdir()] == ['conversion.json']


# --- folders, and what was interrupted

def test_other_peoples_folders_are_left_alone(scenes, tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('mine')
    with pytest.raises(DataError, match='mine holds other files'): write_data(scenes, tmp_path/'mine', 'csv')
    with pytest.raises(DataError, match='holds other files'): write_data(scenes, scenes.root, 'csv')
    write_data(scenes, tmp_path/'new', 'csv', quiet=True)
    for other in (dict(layout='tsv'), dict(layout='csv', photos='copy')):
        with pytest.raises(DataError, match=r'new holds another conversion \(to csv\)'): write_data(scenes, tmp_path/'new', **other)
    changed = replace(scenes, captions={**scenes.captions, scenes.images[0]: ['other']})
    with pytest.raises(DataError, match='holds another conversion'): write_data(changed, tmp_path/'new', 'csv')
    assert load_data(tmp_path/'new').captions == scenes.captions


@pytest.mark.parametrize('photos', ['link', 'copy'])
@pytest.mark.parametrize('name', ['kaggle', 'jsonl', 'coco2017'])
def test_an_interrupted_conversion_goes_on(scenes, tmp_path, monkeypatch, photos, name):
    real, done = getattr(module, f'_{photos}'), []
    def breaks(a, b):
        if len(done) == 7: raise KeyboardInterrupt
        done.append(b); real(a, b)
    monkeypatch.setattr(module, '_link', breaks); monkeypatch.setattr(module, '_copy', breaks)
    with pytest.raises(KeyboardInterrupt): write_data(scenes, tmp_path/'new', name, photos, quiet=True)
    with pytest.raises(FileNotFoundError): load_data(tmp_path/'new')   # photos, but no captions: not half a data set
    monkeypatch.setattr(module, f'_{photos}', lambda a, b: (done.append(b), real(a, b)))
    before = len(done)
    made = write_data(scenes, tmp_path/'new', name, photos, quiet=True)
    assert 0 < before and len(done) == len(set(done)) == 20
    assert load_data(tmp_path/'new').fingerprint == made.data.fingerprint
    (tmp_path/'new'/FORMS[name].photos/made.names.get(scenes.images[0], scenes.images[0])).unlink()
    write_data(scenes, tmp_path/'new', name, photos, quiet=True)
    assert len(done) == 21 and check(load_data(tmp_path/'new'), quiet=True).ok


def test_an_interrupted_array_is_not_taken_for_whole(scenes, tmp_path, monkeypatch):
    def breaks(*_): raise OSError('disk full')
    monkeypatch.setattr(module, 'squeezed', breaks)
    for name in ('sat', 'eecs498'):
        with pytest.raises(OSError, match='disk full'): write_data(scenes, tmp_path/name, name, lossy=True, size=8, quiet=True)
        assert [p.name for p in (tmp_path/name).iterdir()] == ['conversion.json']
    monkeypatch.undo()
    write_data(scenes, tmp_path/'sat', 'sat', lossy=True, size=8, quiet=True)
    assert read_arrays(tmp_path/'sat').images.shape == (3, 8, 8)


def test_links_where_there_are_no_hard_links(scenes, tmp_path, monkeypatch):
    def refuses(*_): raise OSError('not permitted')
    monkeypatch.setattr(os, 'link', refuses)
    write_data(scenes, tmp_path/'new', 'csv', quiet=True)
    assert all(p.is_symlink() for p in (tmp_path/'new'/'Images').iterdir()) and check(load_data(tmp_path/'new'), quiet=True).ok
    photo = tmp_path/'new'/'Images'/scenes.images[0]
    photo.unlink(); photo.symlink_to(tmp_path/'nowhere')
    assert place_photos(scenes, tmp_path/'new'/'Images', quiet=True) == 1 and photo.is_file()


def test_coco_numbers_are_those_in_the_names(tmp_path):
    ids = ['val2014/COCO_val2014_000000391895.jpg', 'train2014/COCO_train2014_000000000009.jpg', 'val2014/COCO_val2014_000000000042.jpg']
    for i in ids: (tmp_path/i).parent.mkdir(exist_ok=True); (tmp_path/i).touch()
    data = CaptionData('coco', tmp_path, {i: ['a'] for i in ids}, {'train': ids[1:], 'dev': ids[:1]})   # as Karpathy has it: val is in train
    made = write_data(data, tmp_path/'new', 'coco2014', quiet=True)
    content = json.loads((tmp_path/'new'/'annotations'/'captions_train2014.json').read_text())
    assert [i['id'] for i in content['images']] == [9, 42] == [a['image_id'] for a in content['annotations']]
    assert made.names[ids[2]] == 'train2014/COCO_val2014_000000000042.jpg' and load_data(tmp_path/'new').captions == made.data.captions
    assert any('another folder in their name' in n for n in made.notes)


def test_cs231n_with_features(scenes, tmp_path):
    class Store:
        path, dim, grid = tmp_path, 512, (1, 1)
        def read(self, ids): return np.stack([np.full((1, 512), scenes.images.index(i), 'float16') for i in ids])
    write_data(scenes, tmp_path/'new', 'cs231n', lossy=True, features=Store(), quiet=True)
    source = read_arrays(tmp_path/'new').features['vgg16_fc7_pca']
    assert [int(a[0, 0]) for _, a in source] == [scenes.images.index(i) for i in (*scenes.splits['train'], *scenes.splits['dev'])]
    with pytest.raises(DataError, match="Lost would be:\n- the features 'vgg16_fc7_pca'\n"): convert(tmp_path/'new', tmp_path/'csv', 'csv')
    again = convert(tmp_path/'new', tmp_path/'again', 'cs231n', min_freq=0, quiet=True)   # with the features that it has
    assert again.lost == [] and all(np.array_equal(a, b) for (_, a), (_, b) in zip(source, read_arrays(tmp_path/'again').features['vgg16_fc7_pca']))
    Store.read = lambda self, ids: np.zeros((len(ids), 49, 512), 'float16')
    with pytest.raises(DataError, match='49 vectors an image'): write_data(scenes, tmp_path/'other', 'cs231n', lossy=True, features=Store(), quiet=True)


# --- a hub's Parquet, which holds the photos

def packed(root, data, how):
    "`data` as hubs have it, with the bytes of the photos"
    pyarrow()
    import pyarrow as pa, pyarrow.parquet as pq
    (root/'data').mkdir(parents=True)
    for s, ids in data.splits.items():
        photo = [data.path(i).read_bytes() for i in ids]
        if how == 'rows':
            ids, photo = [i for i in ids for _ in data.captions[i]], [p for i, p in zip(ids, photo) for _ in data.captions[i]]
            columns = {'image': [{'bytes': p, 'path': i} for i, p in zip(ids, photo)], 'text': [c for i in dict.fromkeys(ids) for c in data.captions[i]]}
        elif how == 'wide': columns = {'image': [{'bytes': p, 'path': None} for p in photo], **{f'caption_{k}': [data.captions[i][k] for i in ids] for k in range(5)}}
        elif how == 'bytes': columns = {'image': photo, 'captions': [data.captions[i] for i in ids]}
        else: columns = {'image': [{'bytes': p, 'path': None} for p in photo], 'filename': ids, 'caption': [data.captions[i] for i in ids]}
        pq.write_table(pa.table(columns), root/'data'/f'{"validation" if s == "dev" else s}-00000-of-00001.parquet')


@pytest.mark.parametrize('how', ['rows', 'wide', 'bytes', 'filename'])
def test_photos_in_parquet_become_files(scenes, tmp_path, how):
    packed(tmp_path/'hub', scenes, how)
    if how != 'filename':
        with pytest.raises(DataError, match=r"'image' holds the photos themselves.*caption-nb convert .* NEW_FOLDER --to jsonl"): load_data(tmp_path/'hub')
    made = convert(tmp_path/'hub', tmp_path/'new', 'jsonl', quiet=True)
    data = load_data(tmp_path/'new')
    assert made.lost == [] and check(data, quiet=True).ok and not list((tmp_path/'new').glob('.*'))
    if how in ('rows', 'filename'): assert data.captions == scenes.captions and {s: set(i) for s, i in data.splits.items()} == {s: set(i) for s, i in scenes.splits.items()}
    pixels = {data.path(i).read_bytes(): (s, data.captions[i]) for s, ids in data.splits.items() for i in ids}
    assert pixels == {scenes.path(i).read_bytes(): (s, scenes.captions[i]) for s, ids in scenes.splits.items() for i in ids}
    if how in ('wide', 'bytes'): assert 'train-00000-of-00001-000000.png' in data.captions
    again = convert(tmp_path/'hub', tmp_path/'coco', 'coco2014', quiet=True)
    assert check(load_data(tmp_path/'coco'), quiet=True).ok and again.names
    sat = convert(tmp_path/'hub', tmp_path/'sat', 'sat', lossy=True, size=8, quiet=True)
    assert len(read_arrays(tmp_path/'sat').images) == 20 and sat.lost and not (tmp_path/'sat'/'.photos').exists()


def test_bad_photos_in_parquet(tmp_path):
    pyarrow()
    import pyarrow as pa, pyarrow.parquet as pq
    for columns, message in [({'image': [{'bytes': None, 'path': None}], 'text': ['a']}, "row 0: 'image' holds no photo; remove the row"),
                             ({'image': [b'x', b''], 'text': ['a', 'b']}, "row 1: 'image' holds no photo"),
                             ({'image': [{'bytes': b'x', 'path': '../a.jpg'}], 'text': ['a']}, 'row 0: image name .* leads out'),
                             ({'image': [b'x'], 'words': ['a']}, "row 0: no column for the caption among 'file_name', 'words'"),
                             ({'image': [b'x'], 'text': [None]}, "row 0: 'text' should be a text")]:
        pq.write_table(pa.table(columns), tmp_path/'a.parquet')
        with pytest.raises(DataError, match=rf'a\.parquet[,:] .*{message}'): convert(tmp_path, tmp_path/'new', 'jsonl', quiet=True)
    assert not (tmp_path/'new').exists()


# --- the command

def test_the_command(scenes, tmp_path, capsys):
    write_data(scenes, tmp_path/'a', 'kaggle', quiet=True)
    assert main(['convert', str(tmp_path/'a'), str(tmp_path/'b'), '--to', 'tokens', '--photos', 'copy']) == 0
    out = capsys.readouterr().out
    assert '20 images' in out and 'tokens' in out and 'lost' not in out and load_data(tmp_path/'b').captions == scenes.captions
    assert main(['convert', str(tmp_path/'a'), str(tmp_path/'c'), '--to', 'sat', '--size', '8']) == 2
    err = capsys.readouterr().err
    assert '--lossy' in err and 'photos become squares of 8 pixels' in err and not (tmp_path/'c').exists()
    assert main(['convert', str(tmp_path/'a'), str(tmp_path/'c'), '--to', 'sat', '--size', '8', '--lossy', '--num-images', '10']) == 0
    assert 'lost: photos become squares' in capsys.readouterr().out and len(read_arrays(tmp_path/'c').images) == 10
    assert main(['convert', str(tmp_path/'a'), '--to', 'csv']) == 2 and 'two folders' in capsys.readouterr().err
    assert main(['convert', str(tmp_path/'a'), str(tmp_path/'d')]) == 2 and 'karpathy, coco2014' in capsys.readouterr().err
    assert main(['convert', str(tmp_path/'a'), str(tmp_path/'d'), '--to', 'coco214']) == 2 and "did you mean 'coco2014'" in capsys.readouterr().err
    assert main(['convert', str(tmp_path/'nowhere'), str(tmp_path/'d'), '--to', 'csv']) == 2 and 'no such folder' in capsys.readouterr().err


def test_photos_in_numbered_parquet_files_of_each_split(tmp_path):
    "train/0000.parquet and test/0000.parquet: photos without names, or with the same ones, stay apart"
    pa, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    scenes = make_scenes(tmp_path/'scenes', 12, size=64, quiet=True)
    for name in (None, '0.png'):
        hub = tmp_path/f'hub-{name}'
        for s, ids in scenes.splits.items():
            (hub/s).mkdir(parents=True)
            rows = [{'bytes': scenes.path(i).read_bytes(), 'path': name and f'{k}.png'} for k, i in enumerate(ids)]
            parquet.write_table(pa.table({'image': rows, 'caption': [scenes.captions[i] for i in ids]}), hub/s/'0000.parquet')
        convert(hub, tmp_path/f'new-{name}', 'jsonl', quiet=True)
        data = load_data(tmp_path/f'new-{name}')
        assert {s: [data.captions[i] for i in ids] for s, ids in data.splits.items()} == \
               {s: [scenes.captions[i] for i in ids] for s, ids in scenes.splits.items()}
        assert data.path(data.splits['test'][0]).read_bytes() == scenes.path(scenes.splits['test'][0]).read_bytes()
