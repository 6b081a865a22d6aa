"Every layout in which captions come as text: the same data set in each of them, and each of them broken"
import csv
import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import need
from hypothesis import given, settings, strategies as st

from caption_nb.data import check, load_data
from caption_nb.layouts import LAYOUTS, SPLIT_NAMES, DataError, Parsed, find_captions, layout_of, read_splits
from caption_nb.scenes import make_scenes

THEIRS = {'train': 'train', 'dev': 'val', 'test': 'test'}


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    "Twenty small scenes; two of their captions get what trips readers up"
    data = make_scenes(tmp_path_factory.mktemp('scenes')/'s', num_images=20, size=64)
    first, second = data.images[:2]
    data.captions[first][0] = 'A "red" dog, running | fast; un café .'
    data.captions[second][0] = '"quoted" first'
    return data


def split_files(root, data, form='Toy.{}Images.txt', bare=False):
    for s, ids in data.splits.items():
        lines = [i.rpartition('.')[0] if bare else i for i in ids]
        (root/form.format(THEIRS[s] if bare else s)).write_text('\n'.join(lines))


def rows_of(data, ids=None):
    "(image, number, caption) for each caption"
    return [(i, k, c) for i in ids or data.images for k, c in enumerate(data.captions[i])]


def photos(root, data, ids=None):
    root.mkdir(parents=True, exist_ok=True)
    for i in ids or data.images: shutil.copy(data.path(i), root/i)


def table(path, header, rows, delimiter=',', **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as f: csv.writer(f, delimiter=delimiter, **options).writerows([header, *rows])


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(json.dumps(r, ensure_ascii=False) for r in rows), encoding='utf-8')


# --- the scenes in every layout: each writer makes the captions in `root`, and the photos there

def flickr8k_tokens(root, data):
    photos(root/'Images', data); split_files(root, data)
    (root/'Toy.token.txt').write_text(''.join(f'{i}#{k}\t{c}\n' for i, k, c in rows_of(data)), encoding='utf-8')


def flickr30k_tokens(root, data):
    photos(root/'flickr30k-images', data); split_files(root, data, '{}.txt', bare=True)
    (root/'results_20130124.token').write_text('\r\n'.join(f'{i}#{k}\t{c}' for i, k, c in rows_of(data)), encoding='utf-8')


def kaggle(root, data):
    photos(root/'Images', data); split_files(root, data)
    table(root/'captions.txt', ('image', 'caption'), [(i, c) for i, _, c in rows_of(data)])


def kaggle_parts(root, data):
    photos(root/'Images', data)
    for s, ids in data.splits.items(): table(root/f'{THEIRS[s]}.csv', ('image', 'caption'), [(i, c) for i, _, c in rows_of(data, ids)])


def results(root, data):
    photos(root/'deep'/'flickr30k_images', data); split_files(root, data, 'flickr30k_{}.txt', bare=True)
    text = '\n'.join(f'{i}| {k}| {c}' for i, k, c in rows_of(data))
    (root/'results.csv').write_text(f'image_name| comment_number| comment\n{text}\n', encoding='utf-8')


def captions_csv(root, data):
    photos(root/'Images', data); split_files(root, data)
    table(root/'captions.csv', ('image', 'caption_number', 'caption', 'id'), [(i, k, c, n//5) for n, (i, k, c) in enumerate(rows_of(data))])


def karpathy(root, data):
    photos(root/'photos', data)
    of = {i: s for s, ids in data.splits.items() for i in ids}
    images = [dict(filename=i, split=THEIRS[of[i]], sentences=[dict(raw=c) for c in data.captions[i]]) for i in data.images]
    (root/'dataset_toy.json').write_text(json.dumps(dict(images=images)))


def coco_file(path, data, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [dict(license=1, file_name=i, id=n) for n, i in enumerate(ids)]
    annotations = [dict(image_id=n, id=5*n + k, caption=c) for k in range(9) for n, i in enumerate(ids) for c in data.captions[i][k:k + 1]]
    path.write_text(json.dumps(dict(info={}, images=images, licenses=[], annotations=annotations)))


def coco(root, data, year='2014', below=''):
    for s, ids in data.splits.items():
        photos(root/below/f'{THEIRS[s]}{year}', data, ids)
        coco_file(root/'annotations'/f'captions_{THEIRS[s]}{year}.json', data, ids)
    (root/'annotations'/f'instances_train{year}.json').write_text(json.dumps(dict(images=[dict(file_name='x', id=1)], annotations=[], categories=[])))


def coco_images_below(root, data): coco(root, data, '2017', 'images')


def metadata_jsonl(root, data):
    photos(root, data)
    of = {i: s for s, ids in data.splits.items() for i in ids}
    lines(root/'metadata.jsonl', [dict(file_name=i, captions=data.captions[i], split='validation' if of[i] == 'dev' else of[i]) for i in data.images])


def metadata_folders(root, data):
    for s, ids in data.splits.items():
        photos(root/THEIRS[s], data, ids)
        lines(root/THEIRS[s]/'metadata.jsonl', [dict(file_name=i, text=c) for i, _, c in rows_of(data, ids)])


def json_lists(root, data):
    photos(root/'Images', data)
    for s, ids in data.splits.items():
        (root/f'toy_karpathy_{THEIRS[s]}.json').write_text(json.dumps([dict(image=i, caption=data.captions[i]) for i in ids], indent=1))


def tsv_with_quotes(root, data):
    photos(root/'Images', data)
    of = {i: s for s, ids in data.splits.items() for i in ids}
    table(root/'mine.tsv', ('File Name', 'Split', 'Sentence'), [(i, of[i].title(), c) for i, _, c in rows_of(data)], '\t')


def tsv_without_quotes(root, data):
    photos(root/'Images', data); split_files(root, data)
    (root/'mine.tsv').write_text('filename\tcomment\n' + '\n'.join(f'{i}\t{c}' for i, _, c in rows_of(data)), encoding='utf-8')


def semicolons(root, data):
    photos(root/'Images', data); split_files(root, data)
    table(root/'mine.csv', ('image', 'text'), [(i, c) for i, _, c in rows_of(data)], ';')


def lists_in_cells(root, data, write=json.dumps):
    photos(root/'Images', data)
    of = {i: s for s, ids in data.splits.items() for i in ids}
    table(root/'annotations_30k.csv', ('raw', 'sentids', 'split', 'filename'), [(write(data.captions[i]), '[0]', of[i], i) for i in data.images])


def python_lists(root, data): lists_in_cells(root, data, repr)


def wide(root, data):
    photos(root/'Images', data); split_files(root, data)
    most = max(map(len, data.captions.values()))
    table(root/'wide.csv', ('image', *(f'caption_{k}' for k in range(most))), [(i, *data.captions[i], *['']*(most - len(data.captions[i]))) for i in data.images])


def parquet(root, data, shards=2):
    need('pyarrow', find_spec('pyarrow') is not None, 'no pyarrow, which reads Parquet')
    import pyarrow as pa, pyarrow.parquet as pq
    photos(root/'Images', data)
    (root/'data').mkdir()
    for s, ids in data.splits.items():
        for k in range(shards):
            part = ids[k*len(ids)//shards:(k + 1)*len(ids)//shards]
            columns = {'image': pa.array(part, pa.string()), 'captions': pa.array([data.captions[i] for i in part], pa.list_(pa.string()))}
            pq.write_table(pa.table(columns), root/'data'/f'{THEIRS[s]}-{k:05}-of-{shards:05}.parquet')


WRITERS = {'tokens': [flickr8k_tokens, flickr30k_tokens], 'kaggle': [kaggle, kaggle_parts], 'results': [results], 'karpathy': [karpathy],
           'coco': [coco, coco_images_below], 'jsonl': [metadata_jsonl, metadata_folders, json_lists], 'parquet': [parquet],
           'table': [captions_csv, tsv_with_quotes, tsv_without_quotes, semicolons, lists_in_cells, python_lists, wide]}


@pytest.mark.parametrize('layout,write', [(n, w) for n, ws in WRITERS.items() for w in ws], ids=lambda x: getattr(x, '__name__', x))
@pytest.mark.filterwarnings('error')
def test_one_data_set_in_every_layout(scenes, tmp_path, layout, write):
    root = tmp_path/'toy'
    root.mkdir()
    write(root, scenes)
    data = load_data(root)
    assert data.layout == layout and not data.notes
    prefixed = {i: i.rpartition('/')[2] for i in data.images}
    assert {prefixed[i]: c for i, c in data.captions.items()} == scenes.captions
    assert {s: sorted(prefixed[i] for i in ids) for s, ids in data.splits.items()} == {s: sorted(ids) for s, ids in scenes.splits.items()}
    assert {'/' in i for i in data.images} == {write in (coco, coco_images_below, metadata_folders)}
    assert load_data(root, layout=layout).fingerprint == data.fingerprint
    assert load_data(find_captions(root)[1], images=data.root).fingerprint == data.fingerprint
    assert check(data, quiet=True).ok


def test_every_layout_is_tried(scenes):
    assert set(WRITERS) | {'scenes', 'images'} == set(LAYOUTS) and load_data(scenes.root.parent).layout == 'scenes'


def test_coco_ids_and_one_year_of_two(scenes, tmp_path):
    coco(tmp_path, scenes)
    data = load_data(tmp_path)
    assert data.ids('dev')[0] == f'val2014/{scenes.ids("dev")[0]}' and data.root == tmp_path
    assert load_data(tmp_path/'annotations').fingerprint == data.fingerprint
    coco(tmp_path, scenes, '2017')
    with pytest.raises(DataError, match='annotations holds several coco files: captions_train2014.json, captions_train2017.json, .*name one'): load_data(tmp_path)
    data = load_data(tmp_path/'annotations'/'captions_val2017.json')
    assert data.ids('train')[0].startswith('train2017/') and len(data.images) == 20
    shutil.rmtree(tmp_path/'train2017')
    with pytest.raises(FileNotFoundError, match=r'16 images of 20 named in captions_\*2017.json not found'):
        load_data(tmp_path/'annotations'/'captions_val2017.json')


def test_images_alone(scenes, tmp_path):
    photos(tmp_path/'a', scenes, scenes.images[:3]); photos(tmp_path/'a'/'b', scenes, scenes.images[3:5]); photos(tmp_path/'a'/'.thumbs', scenes)
    data = load_data(tmp_path/'a')
    assert (data.layout, data.splits, len(data.images)) == ('images', {}, 5) and f'b/{scenes.images[3]}' in data.images
    assert check(data, quiet=True).ok and len(load_data(tmp_path/'a', num_images=2).images) == 2
    assert data.open(data.images[-1]).size == (64, 64)
    with pytest.raises(DataError, match=r'a \(images\) has no splits: its photos can be captioned, nothing more'): data.references('train')
    (tmp_path/'a'/'mycaptions.txt').write_text('what is this')
    with pytest.raises(FileNotFoundError, match="no captions that I know.*for the photos alone say layout='images'"): load_data(tmp_path/'a')
    assert load_data(tmp_path/'a', layout='images').images == data.images
    with pytest.raises(DataError, match="layout 'images' is a folder of photos"): load_data(tmp_path/'a'/'mycaptions.txt', layout='images')
    (tmp_path/'none').mkdir()
    with pytest.raises(DataError, match='none: no photo there or below'): load_data(tmp_path/'none', layout='images')


def test_content_decides_before_the_name(scenes, tmp_path):
    "Files under each other's names"
    for k, (write, name) in enumerate([(flickr8k_tokens, 'Toy.token.txt'), (results, 'results.csv'), (captions_csv, 'captions.csv'),
                                       (karpathy, 'dataset_toy.json'), (metadata_jsonl, 'metadata.jsonl'), (kaggle, 'captions.txt')]):
        root = tmp_path/str(k)
        root.mkdir()
        write(root, scenes)
        want = layout_of(root/name)
        for other in ('captions.txt', 'captions.csv', 'results.csv', 'my.json', 'dataset.json', 'notes.txt'):
            (root/name).rename(root/other)
            assert find_captions(root) == (want, root/other)
            name = other
        assert load_data(root).captions == scenes.captions


def test_nearest_folder_and_first_layout(scenes, tmp_path):
    kaggle(tmp_path, scenes)
    (tmp_path/'below').mkdir()
    karpathy(tmp_path/'below', scenes)
    assert load_data(tmp_path).layout == 'kaggle' and load_data(tmp_path, layout='karpathy').captions == scenes.captions
    captions_csv(tmp_path, scenes)
    assert load_data(tmp_path).layout == 'kaggle'
    assert load_data(tmp_path/'captions.csv').layout == 'table'
    with pytest.raises(FileNotFoundError, match="no captions of layout 'results': looked for results.csv"): load_data(tmp_path, 'results')


# --- real data

def test_flickr30k_broken_row(scenes, tmp_path):
    "The row of the real file that lacks a bar"
    photos(tmp_path, scenes)
    image = scenes.images[0]
    text = f'image_name| comment_number| comment\n{image}| 0| A dog .\n{image}| 4   A dog runs across the grass .\n'
    (tmp_path/'results.csv').write_text(text)
    parsed = LAYOUTS['results'].read(tmp_path/'results.csv')
    assert parsed.captions == {image: ['A dog .', 'A dog runs across the grass .']} and parsed.splits is None
    assert parsed.notes == [f"results.csv, row 3: no | between number and caption; read as caption 4 of {image}: 'A dog runs across the grass .'"]
    (tmp_path/'results.csv').write_text(text + f'{image}| 5\n')
    with pytest.raises(DataError, match=rf"results.csv, row 4: '{image}\| 5' is not image\| number\| caption"): load_data(tmp_path)


def test_flickr8k_in_its_three_layouts(flickr8k, tmp_path):
    parsed = {name: LAYOUTS[name].read(find_captions(flickr8k, name)[1]) for name in ('kaggle', 'tokens', 'karpathy')}
    assert parsed['kaggle'] == parsed['tokens'] and list(parsed['kaggle'].captions) == list(parsed['tokens'].captions)
    assert {s: len(i) for s, i in parsed['tokens'].splits.items()} == {'train': 6000, 'dev': 1000}
    raw = [line.split('\t', 1)[1] for line in (flickr8k/'Flickr8k.token.txt').read_bytes().decode().split('\n') if line]
    assert [c for cs in parsed['tokens'].captions.values() for c in cs] == raw
    for s, ids in parsed['karpathy'].splits.items():
        assert sorted(ids) == sorted(parsed['tokens'].splits[s])
        assert all(parsed['karpathy'].captions[i] == parsed['tokens'].captions[i] for i in ids)


@pytest.mark.parametrize('name,header,row', [
    ('results.csv', 'image_name| comment_number| comment', '{}| {}| {}'), ('mine.tsv', 'image\tcaption', '{0}\t{2}')])
def test_flickr8k_in_other_layouts(flickr8k, tmp_path, name, header, row):
    "All 35,455 real captions, written as Flickr30k's file and as a table that quotes nothing"
    tokens = LAYOUTS['tokens'].read(flickr8k/'Flickr8k.token.txt')
    rows = (row.format(i, k, c) for i, cs in tokens.captions.items() for k, c in enumerate(cs))
    (tmp_path/name).write_text('\n'.join([header, *rows]), encoding='utf-8')
    parsed = LAYOUTS[layout_of(tmp_path/name)].read(tmp_path/name)
    assert parsed.captions == tokens.captions and not parsed.notes


# --- whatever a caption may hold

_text = st.text(alphabet=st.characters(blacklist_categories=('Cs', 'Cc', 'Zl', 'Zp')), min_size=1, max_size=30)
_nasty = st.one_of(_text, st.text(alphabet='"|,;\t#\' a[]', min_size=1, max_size=12))


@settings(max_examples=150, deadline=None)
@given(st.lists(_nasty, min_size=1, max_size=6))
def test_any_caption_survives(tmp_path_factory, captions):
    root = tmp_path_factory.mktemp('any')
    want = {'0.jpg': captions, 'b/1.jpg': captions[::-1]}
    rows = [(i, c) for i, cs in want.items() for c in cs]
    for name, delimiter in (('a.csv', ','), ('b.csv', ';'), ('c.tsv', '\t'), ('d.csv', '|')):
        table(root/name, ('image', 'caption'), rows, delimiter, quoting=csv.QUOTE_ALL)
        assert LAYOUTS['table'].read(root/name).captions == want, name
    lines(root/'a.jsonl', [dict(image=i, captions=cs) for i, cs in want.items()])
    assert LAYOUTS['jsonl'].read(root/'a.jsonl').captions == want
    if not any('\t' in c for c in captions):
        (root/'results.csv').write_text('\n'.join(f'{i}| {k}| {c}' for i, cs in want.items() for k, c in enumerate(cs)), encoding='utf-8')
        assert LAYOUTS['results'].read(root/'results.csv').captions == want


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([n for n in LAYOUTS if n not in ('images', 'parquet')]), st.one_of(st.binary(max_size=200), _nasty.map(str.encode), st.sampled_from(
    [b'{"images": [{"id": 1}], "annotations": 3}', b'[[[', b'[1]', b'{}', b'image,caption', b'image,caption\n"', b'image|caption\n|\n', b'\xef\xbb\xbf',
     b'{"image": 1, "caption": 2}', b'{"image": null, "captions": [null]}', b'[' + b'['*9000, b'1'*5000, b'file_name,split,text\na,b,c'])))
def test_rubbish_is_an_error_of_ours_or_empty(tmp_path_factory, layout, content):
    path = tmp_path_factory.mktemp('rubbish')/'captions.txt'
    path.write_bytes(content)
    layout_of(path)
    try: assert isinstance(LAYOUTS[layout].read(path), Parsed)
    except DataError as e: assert 'captions.txt' in str(e)


# --- bad input, each with its message

def fails(tmp_path, name, content, layout, message, kind=DataError):
    (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=message): LAYOUTS[layout].read(tmp_path/name)


@pytest.mark.parametrize('layout', [n for n in LAYOUTS if n not in ('images', 'parquet')])
def test_missing_file_folder_encoding_and_compression(tmp_path, layout):
    for name in ('gone.txt', 'train.csv'):
        with pytest.raises(FileNotFoundError, match=name): LAYOUTS[layout].read(tmp_path/name)
    (tmp_path/'sub').mkdir()
    with pytest.raises(DataError, match='sub: a folder, not a file of captions'): LAYOUTS[layout].read(tmp_path/'sub')
    good = {'tokens': '0.jpg#0\tcaf\xe9', 'results': '0.jpg| 0| caf\xe9', 'jsonl': '{"image": "0.jpg", "text": "caf\xe9"}'}.get(layout, 'image,caption\n0.jpg,caf\xe9')
    # UTF-8 above, Latin-1 below: what a file edited by two people looks like
    fails(tmp_path, 'a.txt', f'{good}\n'.encode() + good.encode('latin-1'), layout, r'a.txt: byte \d+, line \d+: 0xe9 is not UTF-8.*iconv')
    fails(tmp_path, 'a.txt', good.encode('utf-16'), layout, 'the file is UTF-16')
    fails(tmp_path, 'a.txt', b'PK\x03\x04zip', layout, 'compressed; unpack it first')


@pytest.mark.parametrize('layout,content,message', [
    ('tokens', '0.jpg#0\ta\n0.jpg#0\tb\n', 'row 2: 0.jpg#0 was there before; give each caption a number'),
    ('tokens', '#0\ta\n', 'row 1: the image name is empty'),
    ('results', '0.jpg| 0| a\n0.jpg| 0| b\n', 'row 2: caption 0 of 0.jpg was there before'),
    ('results', '0.jpg, 0, a\n', "row 1: '0.jpg, 0, a' is not image| number| caption"),
    ('results', '| 0| a\n', 'row 1: the image name is empty'),
    ('table', 'photo,words\n0.jpg,a,b\n', r'row 1: no header with a column for the image \(file_name, .*got .photo,words'),
    ('table', 'image,split,caption\n0.jpg,train\n', r"row 2: expected 3 fields \(image, split, caption\) separated by ',', got 2.*add what is missing"),
    ('table', 'image,caption\n0.jpg,a dog, running\n', r"row 2: expected 2 fields .* got 3.*double quotes"),
    ('table', 'image\ttext\n0.jpg\ta\n1.jpg\n', r"row 3: expected 2 fields .*got 1"),
    ('table', 'image,caption\n0.jpg,"never closed\n1.jpg,next\n', 'row 2: '),
    ('table', 'image,caption\n0.jpg,"never closed\n1.jpg,"next"\n', 'row 2: '),
    ('table', 'image,caption\n\n,a\n', 'row 3: the image name is empty'),
    ('table', 'image,caption\n../0.jpg,a\n', 'row 2: image name .* leads out'),
    ('table', 'image,split,caption\n0.jpg,trian,a\n', "row 2: unknown split 'trian': did you mean 'train'"),
    ('table', 'image,captions\n0.jpg,"[""a"", ""b"""\n', "row 2: 'captions' starts like a list, but is none"),
    ('table', 'image,captions\n0.jpg,"[""a""]"\n0.jpg,"[""b""]"\n', 'row 3: 0.jpg was there before; list each image once'),
    ('table', 'image,captions\n0.jpg,"[1, 2]"\n', "row 2: 'captions' should be a text or a list of texts, got '1'"),
    ('jsonl', '{"file_name": "0.jpg", "text": "a"}\n{"file_name": \n', r'line 2, column \d+: not JSON'),
    ('jsonl', '{"file_name": "0.jpg", "text": "a"}\n[1]\n', r'row 2: expected an object such as'),
    ('jsonl', '{"photo": "0.jpg", "text": "a"}\n', "row 1: no column for the image among 'photo', 'text'; name one file_name"),
    ('jsonl', '{"image": "0.jpg", "words": "a"}\n', "row 1: no column for the caption among 'image', 'words'; name one caption"),
    ('jsonl', '{"image": 7, "text": "a"}\n', "row 1: 'image' should be a file name, got '7'"),
    ('jsonl', '{"image": {"bytes": "x", "path": "0.jpg"}, "text": "a"}\n', "row 1: 'image' holds the photo itself"),
    ('jsonl', '{"image": "0.jpg", "text": null}\n', "row 1: 'text' should be a text or a list of texts, got 'None'"),
    ('jsonl', '{"image": "0.jpg", "captions": ["a", 3]}\n', "row 1: 'captions' should be a text or a list of texts, got '3'"),
    ('jsonl', '{"image": "0.jpg", "text": "a", "split": 3}\n', "row 1: 'split' should be a text, got 3"),
    ('jsonl', '{"image": "0.jpg", "text": "a", "split": "tset"}\n', "row 1: unknown split 'tset': did you mean 'test'"),
    ('jsonl', '[{"image": "0.jpg", "captions": ["a"]}, {"image": "0.jpg", "captions": ["b"]}]', 'row 1: 0.jpg was there before'),
    ('jsonl', '{"image": "/etc/passwd", "text": "a"}', 'row 1: image name .* leads out'),
    ('karpathy', '{"images": [' + ', '.join(['{"filename": "0.jpg", "split": "train", "sentences": []}']*2) + ']}', 'row 1: 0.jpg was there before'),
    ('scenes', '{"images": [{"file": "0.png", "split": "val"}]}', "unknown split 'val'"),
    ('coco', '{"images": []}', "no list of objects under 'annotations'"),
    ('coco', '[]', "no list of objects under 'images'"),
    ('coco', '{"images": [{"id": 1}], "annotations": []}', r"row 0 \(images\[0\]\): 'file_name' should be a str, got None; correct it"),
    ('coco', '{"images": [{"file_name": "a.jpg"}], "annotations": []}', r"row 0 \(images\[0\]\): 'id' should be a number, got None"),
    ('coco', '{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}], "annotations": []}', r'image 1 \(b.jpg\) was there before'),
    ('coco', '{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}], "annotations": []}', r'image 2 \(a.jpg\) was there before'),
    ('coco', '{"images": [], "annotations": [{"image_id": 9, "caption": "a"}]}', r'annotations\[0\]\): a caption for image 9, which is not among'),
    ('coco', '{"images": [], "annotations": [{"image_id": 9, "caption": 1}]}', r"annotations\[0\]\): 'caption' should be a str, got 1"),
    ('coco', '{"images": [{"id": 1, "file_name": "../a.jpg"}], "annotations": []}', 'leads out of the image folder'),
])
def test_bad_content(tmp_path, layout, content, message):
    fails(tmp_path, 'captions.x', content, layout, rf'captions\.x[,:] .*{message}')


@pytest.mark.parametrize('write,name', [(metadata_jsonl, 'metadata.jsonl'), (coco, 'annotations/captions_train2014.json')])
def test_image_without_caption(scenes, tmp_path, write, name):
    bare = scenes.ids('train')[0]
    data = scenes.subset(20)
    data.captions[bare] = []
    write(tmp_path, data)
    with pytest.raises(DataError, match=rf"1 image of split 'train' without a caption in .*{bare}; add captions"): load_data(tmp_path)
    assert [Path(i).name for i in check(load_data(tmp_path, strict=False), quiet=True).problems['no caption']] == [bare]


@pytest.mark.parametrize('write', [kaggle_parts, results, coco, metadata_jsonl, tsv_with_quotes])
def test_captions_without_image(scenes, tmp_path, write):
    write(tmp_path, scenes)
    gone = scenes.ids('dev')[0]
    for p in tmp_path.rglob(gone): p.unlink()
    with pytest.raises(FileNotFoundError, match=rf'1 image of 20 named in .* not found in .*{gone}; put the files there'): load_data(tmp_path)


def test_an_image_in_two_parts_is_a_leak(scenes, tmp_path):
    photos(tmp_path, scenes)
    first, second = scenes.images[:2]
    table(tmp_path/'train.csv', ('image', 'text'), [(first, 'a'), (second, 'b')])
    table(tmp_path/'test.csv', ('image', 'text'), [(second, 'c')])
    with pytest.raises(DataError, match=rf'1 image in several splits.*{second} \(train test\)'): load_data(tmp_path)


def test_splits_beside(scenes, tmp_path):
    "train.txt counts only when it lists images, and *Images.txt before it"
    flickr30k_tokens(tmp_path, scenes)
    ids = scenes.images
    assert read_splits(tmp_path) is None and read_splits(tmp_path, ['other.jpg']) is None
    assert read_splits(tmp_path, ids) == scenes.splits
    (tmp_path/'notes_train.txt').write_text('what I think of the training')
    assert read_splits(tmp_path, ids) == scenes.splits
    (tmp_path/'dev.txt').write_text(ids[0])
    with pytest.raises(DataError, match="dev.txt and .*val.txt both give the split 'dev'; keep one"): read_splits(tmp_path, ids)
    (tmp_path/'Toy.trainImages.txt').write_text(ids[1])
    assert read_splits(tmp_path, ids) == read_splits(tmp_path) == {'train': [ids[1]]}
    assert set(SPLIT_NAMES.values()) == {'train', 'dev', 'test'}


def test_names_from_windows(scenes, tmp_path):
    photos(tmp_path/'Images', scenes)
    table(tmp_path/'mine.csv', ('image', 'caption'), [(f'Images\\{i}', c) for i, _, c in rows_of(scenes)])
    data = load_data(tmp_path)
    assert data.images[0] == f'Images/{scenes.images[0]}' and check(data, quiet=True).ok


# --- Parquet

def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    (tmp_path/'train.parquet').write_bytes(b'PAR1')
    with pytest.raises(ImportError, match='need the package pyarrow: pip install pyarrow, or save the table as CSV'): load_data(tmp_path)


def test_bad_parquet(tmp_path):
    need('pyarrow', find_spec('pyarrow') is not None, 'no pyarrow, which reads Parquet')
    import pyarrow as pa, pyarrow.parquet as pq
    read = LAYOUTS['parquet'].read
    (tmp_path/'a.parquet').write_bytes(b'PAR1')
    with pytest.raises(DataError, match='a.parquet: not a Parquet file'): read(tmp_path/'a.parquet')
    for name in ('gone.parquet', 'train.parquet'):
        with pytest.raises(FileNotFoundError, match=name): read(tmp_path/name)
    for columns, message in [({'photo': ['a'], 'text': ['b']}, "no column for the image among 'photo', 'text'"),
                             ({'image': ['a.jpg'], 'words': ['b']}, "no column for the caption among 'image', 'words'"),
                             ({'image': [b'abc'], 'text': ['b']}, "column 'image' holds the photos themselves, not their names"),
                             ({'image': [{'bytes': b'a', 'path': 'a.jpg'}], 'text': ['b']}, "column 'image' holds the photos themselves"),
                             ({'image': ['a.jpg'], 'text': [None]}, "row 0: 'text' should be a text"),
                             ({'image': [None], 'text': ['a']}, "row 0: 'image' should be a file name, got 'None'"),
                             ({'image': ['a.jpg', 'a.jpg'], 'captions': [['a'], ['b']]}, 'row 1: a.jpg was there before'),
                             ({'image': ['a.jpg'], 'text': ['a'], 'split': ['tarin']}, "row 0: unknown split 'tarin': did you mean 'train'")]:
        pq.write_table(pa.table(columns), tmp_path/'a.parquet')
        with pytest.raises(DataError, match=rf'a\.parquet[,:] .*{message}'): read(tmp_path/'a.parquet')


def test_reading_is_light():
    "Neither pyarrow nor pandas nor torch for a table of captions"
    import subprocess
    code = 'import sys, caption_nb.layouts; print([m for m in ("pyarrow", "pandas", "numpy", "torch", "PIL") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.strip() == '[]'


# ---- data sets as people have them ------------------------------------------------------------------------------------

def hub_folders(root, data):
    "As a hub converts data sets to Parquet: a folder for each split, files by number"
    need('pyarrow', find_spec('pyarrow') is not None, 'no pyarrow, which reads Parquet')
    parquet(root, data)
    for p in sorted((root/'data').iterdir()):
        split, number = p.name.split('-')[:2]
        (root/split).mkdir(exist_ok=True)
        p.rename(root/split/f'{int(number):04}.parquet')
    (root/'data').rmdir()


def test_numbered_parquet_in_folders_of_splits(scenes, tmp_path):
    hub_folders(tmp_path, scenes)
    data = load_data(tmp_path)
    assert data.layout == 'parquet' and {s: set(ids) for s, ids in data.splits.items()} == {s: set(ids) for s, ids in scenes.splits.items()}
    assert data.captions == scenes.captions
    assert load_data(tmp_path/'val'/'0001.parquet').splits == data.splits   # whichever is named


def test_one_folder_called_test_may_just_be_a_test(scenes, tmp_path):
    kaggle(tmp_path/'test', scenes)
    assert load_data(tmp_path/'test').splits.keys() == {'train', 'dev', 'test'}


def test_shards_with_a_hash_and_a_shard_that_is_missing(scenes, tmp_path):
    parquet(tmp_path, scenes)
    for k, p in enumerate(sorted((tmp_path/'data').iterdir())): p.rename(p.with_name(f'{p.stem}-{k:016x}.parquet'))
    assert len(load_data(tmp_path).splits['train']) == len(scenes.splits['train'])
    next((tmp_path/'data').glob('train-00001*')).unlink()
    with pytest.raises(DataError, match="data: 1 of 2 files of 'train' missing: train-00001-of-00002; download or copy"): load_data(tmp_path)


@pytest.mark.parametrize('write,part', [(metadata_folders, 'val/metadata.jsonl'), (kaggle_parts, 'val.csv')], ids=['folders', 'files'])
def test_a_part_without_a_row(scenes, tmp_path, write, part):
    write(tmp_path, scenes)
    path = next(p for p in tmp_path.rglob('*') if p.as_posix().endswith(part))
    path.write_text('' if path.suffix == '.jsonl' else path.read_text().split('\n')[0])
    with pytest.raises(DataError, match=f'{path.name}: no row in it, and it is all of a split'): load_data(tmp_path)


def test_what_plainly_is_a_part_and_is_not_read_is_told(scenes, tmp_path):
    metadata_folders(tmp_path/'a', scenes)
    (tmp_path/'a'/'val').rename(tmp_path/'a'/'vaildation')
    assert load_data(tmp_path/'a').notes == ["vaildation/ is not read: did you mean 'validation'? Rename the folder"]
    (tmp_path/'a'/'test'/'metadata.jsonl').unlink()
    assert load_data(tmp_path/'a').notes[0] == 'test/ is not read: no metadata.jsonl is in it'
    folder = tmp_path/'b'
    photos(folder/'Images', scenes)
    for name, ids in (('train.csv', 'train'), ('vall.csv', 'dev'), ('test.tsv', 'test')):
        table(folder/name, ('image', 'caption'), [(i, c) for i, _, c in rows_of(scenes, scenes.splits[ids])], '\t' if name.endswith('tsv') else ',')
    notes = load_data(folder/'train.csv').notes
    assert len(notes) == 2 and notes[0].startswith('test.tsv is not read: train.csv is of another kind')
    assert notes[1] == "vall.csv is not read: did you mean 'val'? Rename it"
    coco(tmp_path/'c', scenes)
    (tmp_path/'c'/'annotations'/'captions_val2014.json').rename(tmp_path/'c'/'annotations'/'val_captions.json')
    assert load_data(tmp_path/'c').notes == ['val_captions.json is not read: names of this layout are like captions_train2014.json, '
                                             'captions_val2014.json']
    for data in (load_data(tmp_path/'a'), load_data(tmp_path/'c')): assert check(data, quiet=True).remarks['put right while reading'] == data.notes


def test_of_karpathys_files_that_whose_photos_are_there(scenes, tmp_path):
    "karpathy-splits unpacked into a folder of COCO, or of Flickr8k"
    coco(tmp_path, scenes)
    of = {i: THEIRS[s] for s, ids in scenes.splits.items() for i in ids}
    def write(name, prefix, below):
        images = [dict(**({'filepath': f'{of[i]}2014'} if below else {}), sentids=[], filename=prefix + i, split=of[i],
                       sentences=[dict(raw=c) for c in scenes.captions[i]]) for i in scenes.images]
        (tmp_path/name).write_text(json.dumps(dict(images=images)))
    write('dataset_coco.json', '', True); write('dataset_flickr8k.json', 'a', False); write('dataset_flickr30k.json', 'b', False)
    data = load_data(tmp_path)
    assert data.layout == 'karpathy' and len(data.images) == 20 and data.images[0].endswith(f'2014/{scenes.images[0]}')
    assert data.notes == ['dataset_coco.json is read, whose photos are there, and not dataset_flickr30k.json, dataset_flickr8k.json beside it']
    with pytest.raises(DataError, match='photos of none of them are there; name one'):
        find_captions(tmp_path, images=tmp_path/'annotations')
    photos(tmp_path/'flickr', scenes)
    for p in list((tmp_path/'flickr').iterdir()): p.rename(p.with_name(f'a{p.name}'))
    with pytest.raises(DataError, match='and photos of dataset_coco.json, dataset_flickr8k.json are there; name one'): load_data(tmp_path)
    data = load_data(tmp_path, images=tmp_path/'flickr')
    assert data.notes[0].startswith('dataset_flickr8k.json is read') and data.root == tmp_path/'flickr'


def test_captions_and_photos_two_folders_down(scenes, tmp_path):
    flickr8k_tokens(tmp_path/'archive'/'Flickr8k', scenes)
    assert len(load_data(tmp_path).images) == 20


def test_names_that_nearly_are_those_of_files(scenes, tmp_path):
    coco(tmp_path/'c', scenes)
    (tmp_path/'c'/'train2014').rename(tmp_path/'c'/'Train2014')
    with pytest.raises(FileNotFoundError, match=r'\(Train2014 differs in case\): train2014/'): load_data(tmp_path/'c')
    photos(tmp_path/'d'/'Images', scenes)
    shutil.copy(scenes.path(scenes.images[0]), tmp_path/'d'/'Images'/'e\u0301.png')   # as macOS packs it
    table(tmp_path/'d'/'captions.csv', ('image', 'caption'), [*((i, 'A dog') for i in scenes.images), ('\u00e9.png', 'A cat')])
    with pytest.raises(FileNotFoundError, match='differs in how its accents are stored'): load_data(tmp_path/'d')


def test_a_folder_that_nobody_may_list_is_passed_over(scenes, tmp_path, monkeypatch):
    kaggle(tmp_path, scenes)
    (tmp_path/'lost+found').mkdir()
    scandir = os.scandir
    def refused(path):
        if Path(path).name == 'lost+found': raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refused)
    assert len(load_data(tmp_path).images) == 20


def test_one_split_is_not_taken_for_all(scenes, tmp_path):
    "test/ is the first of them, and its file has a name of its own"
    metadata_folders(tmp_path, scenes)
    (tmp_path/'test'/'metadata.jsonl').rename(tmp_path/'test'/'meta.jsonl')
    with pytest.raises(DataError, match=r'test/meta.jsonl and train/metadata.jsonl seem to be splits of one data set: give them one name'):
        load_data(tmp_path)
