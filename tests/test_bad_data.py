"""Every reader against every fault: what a user sees is an error of ours that names the file, the place and the remedy. A cell that
cannot be says why."""
import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec

import h5py
import numpy as np
import pytest
import torch
from conftest import need

from caption_nb.array_layouts import ARRAY_LAYOUTS
from caption_nb.convert import write_data
from caption_nb.data import check, load_data
from caption_nb.layouts import LAYOUTS, DataError
from caption_nb.scenes import make_scenes

FORM = {'coco': 'coco2014', 'table': 'csv'}   # Reader → what writes it, where the names differ


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    "Reader → a folder that it reads without complaint; made when asked for"
    root, made = tmp_path_factory.mktemp('sets'), {}
    scenes = make_scenes(root/'drawn', 12, size=64, quiet=True)
    said = {i: [f'un café {k} .' for k in range(5)] for i in scenes.images}
    data = replace(scenes, boxes=None, captions=said)
    def get(reader):
        if reader == 'parquet': need('pyarrow', find_spec('pyarrow') is not None, 'no pyarrow, which reads Parquet')
        if reader not in made:
            made[reader] = root/reader
            if reader == 'images': shutil.copytree(scenes.root, made[reader])
            elif reader == 'scenes': write(shutil.copytree(scenes.root.parent, made[reader])/'scenes.json', lambda c: c.update(images=[{**i, 'captions': said[i['file']]} for i in c['images']]))
            else: write_data(data, made[reader], FORM.get(reader, reader), lossy=True, min_freq=0, size=8, quiet=True)
            (made[reader]/'conversion.json').unlink(missing_ok=True)
        return made[reader]
    return get


@pytest.fixture
def data(sets, tmp_path, request):
    "A copy of the reader's folder, to be spoilt"
    return shutil.copytree(sets(request.getfixturevalue('reader')), tmp_path/'set')


@pytest.mark.parametrize('reader', [*LAYOUTS, *ARRAY_LAYOUTS])
def test_without_a_fault(data, reader):
    assert load_data(data).layout == reader and check(load_data(data, reader), quiet=True).ok


# --- how to spoil a folder `d`; each says what the error must name

def one(d, pattern): return next(iter(sorted(d.rglob(pattern))))


def write(path, change):
    "JSON, changed in place or replaced by what `change` returns"
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def gone(pattern):
    def spoil(d):
        for p in list(d.rglob(pattern)): p.unlink()
    return spoil


def text(pattern, change): return lambda d: (p := one(d, pattern)).write_text(change(p.read_text(encoding='utf-8')), encoding='utf-8')


def add(pattern, data): return lambda d: (p := one(d, pattern)).write_bytes(p.read_bytes() + data)


def jsn(pattern, change): return lambda d: write(one(d, pattern), change)


def latin(pattern): return lambda d: (p := one(d, pattern)).write_bytes(p.read_bytes().replace(b'"', 'é"'.encode('latin-1'), 2))


def lines(pattern, change):
    "The rows of a JSON-lines file, changed"
    def spoil(d):
        p = one(d, pattern)
        rows = [json.loads(line) for line in p.read_text().splitlines()]
        p.write_text('\n'.join(json.dumps(r) for r in change(rows) or rows))
    return spoil


def rows(change, kinds=None):
    "The columns of a Parquet file, changed"
    def spoil(d):
        import pyarrow as pa, pyarrow.parquet as pq
        p = d/'metadata.parquet'
        columns = pq.read_table(p).to_pydict()
        pq.write_table(pa.table(change(columns) or columns), p)
    return spoil


def latin_parquet(d):
    import pyarrow as pa, pyarrow.parquet as pq
    columns = pq.read_table(d/'metadata.parquet').to_pydict()
    said = pa.array([b'fine', b'caf\xe9', *[b'fine']*10]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({'file_name': columns['file_name'], 'text': said}), d/'metadata.parquet')


def array(pattern, name, to):
    def spoil(d):
        with h5py.File(one(d, pattern), 'r+') as f:
            value = to(f[name][()]) if callable(to) else to
            del f[name]
            if value is not None: f[name] = value
    return spoil


def tensors(change):
    def spoil(d):
        content = torch.load(d/'coco.pt', weights_only=True)
        torch.save(change(content) or content, d/'coco.pt')
    return spoil


class Trap:
    def __reduce__(self): return os.mkdir, ('/nonexistent/harm',)


def photo_gone(d): one(d, '*.png').unlink()


def renamed(old, new): return lambda d: (p := one(d, f'*{old}*')).rename(p.with_name(p.name.replace(old, new)))


def listed(d): one(d, '*trainImages.txt').open('a').write('bare.png\n')


def set_(value, *keys):
    "A change of JSON: the entry at `keys` becomes `value`"
    def change(content):
        for k in keys[:-1]: content = content[k]
        content[keys[-1]] = value
    return change


MAIN = {'karpathy': 'dataset_*.json', 'coco': 'captions_val2014.json', 'tokens': '*.token.txt', 'kaggle': 'captions.txt', 'results': 'results.csv',
        'jsonl': 'metadata.jsonl', 'parquet': 'metadata.parquet', 'table': 'captions.csv', 'scenes': 'scenes.json'}
FLAT, PHOTOS = ('tokens', 'kaggle', 'results'), [*MAIN]
ROW = 'a row more of an image is a caption more'
FIXED = 'its names of splits are names of files; other files are none of its own'

FAULTS = {
    'missing files': {
        **{r: (gone(p), [f'no captions of layout {r!r}', 'looked for']) for r, p in MAIN.items()},
        'coco': (gone('captions_*.json'), ["no captions of layout 'coco'", 'captions_train*.json']),
        'images': (gone('*.png'), ['no photo there or below', 'name another folder']),
        'sat': (gone('TRAIN_CAPTIONS_*'), ['TRAIN_CAPTIONS_', 'no such file', 'get it from the same source']),
        'cs231n': (gone('coco2014_vocab.json'), ['coco2014_vocab.json', 'no such file', 'get it from the same source']),
        'eecs498': (gone('coco.pt'), ["no data set of arrays of layout 'eecs498'", 'looked for *.pt'])},
    'wrong columns': {
        'karpathy': (jsn(MAIN['karpathy'], lambda c: c['images'][3].pop('sentences') and None), ['row 3', "'sentences' should be a list", 'correct it']),
        'coco': (jsn(MAIN['coco'], lambda c: c['annotations'][2].pop('caption') and None), ['annotations[2]', "'caption' should be a str", 'correct it']),
        'tokens': (add(MAIN['tokens'], b'0.png,a dog\n'), ['row 61', 'no tab', 'write name.jpg#0<TAB>caption']),
        'kaggle': (add(MAIN['kaggle'], b'0.png,0,a dog\n'), ['row 62', 'expected 2 fields', 'double quotes']),
        'results': (add(MAIN['results'], b'0.png,0,a dog\n'), ['row 62', 'is not image| number| caption', 'add what is missing']),
        'jsonl': (add(MAIN['jsonl'], b'{"file_name": "0.png", "words": "a"}'), ['row 13', 'no column for the caption', 'name one caption']),
        'parquet': (rows(lambda c: {'file_name': c['file_name'], 'words': c['captions']}), ['row 0', 'no column for the caption', 'name one caption']),
        'table': (text(MAIN['table'], lambda t: t.replace('caption', 'words', 1)), ['row 1', 'no header with a column', 'write one, such as image,caption']),
        'scenes': (jsn(MAIN['scenes'], lambda c: c['images'][1].pop('captions') and None), ['row 1', "'captions' should be a list", 'correct it']),
        'images': 'it reads no file of captions',
        'sat': (array('TRAIN_IMAGES_*', 'images', None), ['TRAIN_IMAGES_', "no array 'images'", 'another data set?']),
        'cs231n': (array('coco2014_captions.h5', 'val_captions', None), ["no array 'val_captions'", 'another data set?']),
        'eecs498': (tensors(lambda c: c.pop('val_captions') is None and None), ["no tensor 'val_captions'", 'another data set?'])},
    'mixed encodings': {
        **{r: (add(MAIN[r], 'é\n'.encode('latin-1')), ['line', '0xe9 is not UTF-8', 'iconv -f WINDOWS-1252']) for r in (*FLAT, 'table', 'jsonl')},
        **{r: (latin(MAIN[r]), ['byte', '0xe9 is not UTF-8', 'iconv']) for r in ('karpathy', 'coco', 'scenes')},
        'parquet': (latin_parquet, ['row 1', '0xe9 is not UTF-8', 'write the file again']),
        'images': 'it reads no text',
        'sat': (latin('WORDMAP_*'), ['WORDMAP_', '0xe9 is not UTF-8', 'iconv']),
        'cs231n': (latin('coco2014_vocab.json'), ['coco2014_vocab.json', '0xe9 is not UTF-8', 'iconv']),
        'eecs498': 'its text lies in a pickle, which is UTF-8 by definition'},
    'duplicated ids': {
        'karpathy': (jsn(MAIN['karpathy'], lambda c: c['images'].append(c['images'][0])), ['row 12', 'was there before', 'list each image once']),
        'coco': (jsn(MAIN['coco'], lambda c: c['images'].append(c['images'][0])), ['images[2]', 'was there before', 'list each image once']),
        'tokens': (text(MAIN['tokens'], lambda t: t + t.split('\n')[0]), ['row 61', 'was there before', 'give each caption a number of its own']),
        'kaggle': ROW, 'table': ROW,
        'results': (text(MAIN['results'], lambda t: t + t.split('\n')[1]), ['row 62', 'was there before', 'give each caption a number of its own']),
        'jsonl': (lines(MAIN['jsonl'], lambda r: r.append(r[2])), ['row 13', 'was there before', 'list each image once']),
        'parquet': (rows(lambda c: {k: v + v[:1] for k, v in c.items()}), ['row 12', 'was there before', 'list each image once']),
        'scenes': (jsn(MAIN['scenes'], lambda c: c['images'].append(c['images'][0])), ['row 12', 'was there before', 'list each image once']),
        'images': 'a folder holds each name once',
        'sat': (jsn('TRAIN_IMAGEIDS_*', lambda c: set_(c['ids'][0], 'ids', 1)(c)), ['TRAIN_IMAGEIDS_', 'names of two images', 'write the set again']),
        'cs231n': (text('train2014_urls.txt', lambda t: t.replace(t.split('\n')[1], t.split('\n')[0])), None),
        'eecs498': 'its images have numbers, no names'},
    'captions without image': {
        **{r: (photo_gone, ['1 image of 12 named in', 'not found in', 'put the files there']) for r in PHOTOS if r != 'scenes'},
        'scenes': (photo_gone, ['1 image of 12 named in scenes.json', 'not found in', 'call make_scenes on this folder again']),
        'images': 'it has no captions',
        'sat': (array('TRAIN_IMAGES_*', 'images', lambda a: a[:-1]), ['captions, but', 'images with', 'one run?']),
        'cs231n': (array('coco2014_captions.h5', 'val_image_idxs', lambda a: a + 90), ['val_image_idxs names image 91', 'one source?']),
        'eecs498': (tensors(lambda c: c.update(val_images=c['val_images'][:0])), ['0 val_images', '2 val_captions', 'each image has one caption'])},
    'images without caption': {
        **{r: (listed, ["1 image of split 'train' without a caption", 'bare.png', 'add captions']) for r in FLAT},
        'karpathy': (jsn(MAIN['karpathy'], lambda c: set_([], 'images', 0, 'sentences')(c)), ['1 image of split', 'without a caption in dataset_', 'add captions']),
        'coco': (jsn(MAIN['coco'], lambda c: set_([], 'annotations')(c)), ["2 images of split 'dev' without a caption in captions_*2014.json", 'add captions']),
        'jsonl': (lines(MAIN['jsonl'], lambda r: r[0].update(captions=[])), ['1 image of split', 'without a caption in metadata.jsonl', 'add captions']),
        'parquet': (rows(lambda c: c['captions'].__setitem__(0, [])), ['1 image of split', 'without a caption in metadata.parquet', 'add captions']),
        'table': 'a row is a caption; photos without a row are a remark of `check`',
        'scenes': (jsn(MAIN['scenes'], lambda c: set_([], 'images', 0, 'captions')(c)), ['1 image of split', 'without a caption in scenes.json', 'add captions']),
        'images': 'none has one: that is what it is for',
        'sat': (jsn('TRAIN_CAPTIONS_*', lambda c: c[:-5]), ['TRAIN_CAPTIONS_', 'captions, but', 'one run?']),
        'cs231n': (array('coco2014_captions.h5', 'train_image_idxs', lambda a: np.where(a == 1, 0, a)), None),
        'eecs498': (tensors(lambda c: c.update(val_captions=c['val_captions'][:0])), ['2 val_images', '0 val_captions', 'each image has one caption'])},
    'unknown split names': {
        **{r: (renamed('trainImages', 'trianImages'), ["unknown split 'trian'", "did you mean 'train'", 'Rename the file']) for r in FLAT},
        'karpathy': (jsn(MAIN['karpathy'], lambda c: set_('trian', 'images', 4, 'split')(c)), ['row 4', "unknown split 'trian'", "did you mean 'train'"]),
        'coco': FIXED, 'sat': FIXED, 'cs231n': FIXED, 'eecs498': FIXED, 'images': 'it has no splits',
        'jsonl': (lines(MAIN['jsonl'], lambda r: r[5].update(split='trian')), ['row 6', "unknown split 'trian'", "did you mean 'train'"]),
        'parquet': (rows(lambda c: c['split'].__setitem__(5, 'trian')), ['row 5', "unknown split 'trian'", "did you mean 'train'"]),
        'table': (text(MAIN['table'], lambda t: t.replace(',train', ',trian', 1)), ["unknown split 'trian'", "did you mean 'train'"]),
        'scenes': (jsn(MAIN['scenes'], lambda c: set_('trian', 'images', 4, 'split')(c)), ['row 4', "unknown split 'trian'", "did you mean 'train'"])},
    'a .pt that holds code': {
        'eecs498': (tensors(lambda c: {**c, 'train_images': Trap()}), ['coco.pt', 'code that would run', 'refused', 'Take it from the course itself'])},
    'HDF5 of wrong shapes': {
        'sat': (array('TRAIN_IMAGES_*', 'images', lambda a: a.transpose(0, 2, 3, 1)), ['TRAIN_IMAGES_', '(N, 3, H, W)', 'another data set?']),
        'cs231n': (array('coco2014_captions.h5', 'val_captions', lambda a: a[0]), ['val_captions', 'shape (N, T)', 'another data set?'])}}

CELLS = [(fault, reader, cell) for fault, readers in FAULTS.items() for reader, cell in readers.items() if not isinstance(cell, str)]


@pytest.mark.parametrize('fault,reader,cell', CELLS, ids=lambda x: x if isinstance(x, str) else '')
def test_the_fault_is_named(data, fault, reader, cell):
    spoil, words = cell
    spoil(data)
    if words is None:   # the layout has a rule of its own: it is read, and the note says what was done
        assert load_data(data, reader).notes
        return
    with pytest.raises((DataError, FileNotFoundError)) as e: load_data(data, reader)
    message = str(e.value)
    assert all(w in message for w in words), message
    named = ['captions_*2014.json', *(p.name for p in data.rglob('*') if p.is_file() and p.suffix != '.png')]
    assert any(n in message for n in named) or fault == 'missing files' or str(data) in message, message
    assert '\n' not in message and len(message) < 600


@pytest.mark.parametrize('fault', FAULTS)
def test_the_matrix_is_complete(fault):
    "Every reader of tables and arrays, or the reason why not"
    some = {'a .pt that holds code': {'eecs498'}, 'HDF5 of wrong shapes': {'sat', 'cs231n'}}.get(fault)
    assert set(FAULTS[fault]) == (some or {*LAYOUTS, *ARRAY_LAYOUTS})


def test_a_layout_that_is_not_found_by_itself_is_not_guessed(sets, tmp_path):
    "Without its captions a folder of photos beside other text is not silently a data set of photos alone"
    shutil.copytree(sets('kaggle'), tmp_path/'set')
    (tmp_path/'set'/'captions.txt').unlink()
    with pytest.raises(FileNotFoundError, match='no captions that I know'): load_data(tmp_path/'set')


def test_parquet_that_is_damaged_within(sets, tmp_path):
    path = shutil.copytree(sets('parquet'), tmp_path/'set')/'metadata.parquet'
    whole = path.read_bytes()
    for at in range(8, len(whole) - 1200, 60):
        path.write_bytes(whole[:at] + bytes(x ^ 255 for x in whole[at:at + 40]) + whole[at + 40:])
        try: load_data(tmp_path/'set')
        except (DataError, FileNotFoundError) as e: assert 'metadata.parquet' in str(e), e


def test_names_of_splits_that_are_none(tmp_path):
    "Only what is nearly the name of a split is an error"
    from caption_nb.layouts import read_splits
    for name in ('myImages.txt', 'all_images.txt', 'Toy.extraImages.txt'): (tmp_path/name).write_text('0.jpg')
    assert read_splits(tmp_path) is None
    for name in ('Toy.tainImages.txt', 'tset_images.txt', 'trainingImages.txt', 'valdationImages.txt'):
        (tmp_path/name).write_text('0.jpg')
        with pytest.raises(DataError, match=rf"{name}: unknown split .*: did you mean '.*'\? Rename the file"): read_splits(tmp_path)
        (tmp_path/name).unlink()
