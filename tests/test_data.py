"Readers, splits, checks: what real and broken data sets do to `caption_nb.data`"
import csv
import gzip
import json
import os
import random
import string

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from caption_nb.data import CaptionData, DataError, check, load_data, plot_lengths, plot_page, plot_words
from caption_nb.photos import ImageError, open_image

FIVE = ['a red photo', 'a photo, all red', '"red" is what it is', 'one colour', 'nothing but red']


def make_photos(folder, n=6, size=(40, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for i in range(n):
        noise = Image.frombytes('RGB', size, bytes(rng.randrange(256) for _ in range(3*size[0]*size[1])))
        noise.save(folder/f'{i}.jpg', quality=90)
    return [f'{i}.jpg' for i in range(n)]


def write_kaggle(root, captions):
    with open(root/'captions.txt', 'w', newline='', encoding='utf-8') as f:
        out = csv.writer(f)
        out.writerow(['image', 'caption'])
        out.writerows([i, c] for i, cs in captions.items() for c in cs)


def write_tokens(root, captions):
    rows = ''.join(f'{i}#{k}\t{c}\n' for i, cs in captions.items() for k, c in enumerate(cs))
    (root/'Toy.token.txt').write_text(rows, encoding='utf-8')


def write_karpathy(root, captions, splits):
    of = {i: s for s, ids in splits.items() for i in ids}
    images = [dict(filename=i, split=of.get(i, 'train'), sentences=[dict(raw=c, tokens=c.split()) for c in cs])
              for i, cs in captions.items()]
    (root/'dataset_toy.json').write_text(json.dumps(dict(images=images, dataset='toy')), encoding='utf-8')


@pytest.fixture
def toy(tmp_path):
    "A folder with six photos in Images/ and captions.txt"
    root = tmp_path/'toy'
    ids = make_photos(root/'Images')
    write_kaggle(root, {i: [f'{c} {i}' for c in FIVE] for i in ids})
    return root


def append(path, content):
    with open(path, 'ab') as f: f.write(content.encode() if isinstance(content, str) else content)


# --- real data

def test_flickr8k_three_layouts_agree(flickr8k):
    kaggle, tokens, karpathy = (load_data(flickr8k, layout=x) for x in ('kaggle', 'tokens', 'karpathy'))
    assert kaggle.captions == tokens.captions and list(kaggle.captions) == list(tokens.captions)
    assert kaggle.fingerprint == tokens.fingerprint
    assert len(kaggle.images) == 7091 and sum(map(len, kaggle.captions.values())) == 35455
    assert {s: len(ids) for s, ids in kaggle.splits.items()} == {'train': 6000, 'dev': 1000}
    # Karpathy's file does not list the 91 images that are in no split; the others are equal to the byte
    assert {s: set(ids) for s, ids in karpathy.splits.items()} == {s: set(ids) for s, ids in kaggle.splits.items()}
    assert karpathy.captions == {i: kaggle.captions[i] for i in karpathy.captions} and len(karpathy.captions) == 7000
    raw = (flickr8k/'Flickr8k.token.txt').read_bytes().decode().split('\n')
    assert [c for cs in tokens.captions.values() for c in cs] == [line.split('\t', 1)[1] for line in raw if line]
    assert load_data(flickr8k).layout == 'karpathy'


def test_flickr8k_check_survives_junk(flickr8k):
    data = load_data(flickr8k, layout='tokens')
    junk = [i for i, cs in data.captions.items() if any(len(c) < 8 for c in cs)]
    small = CaptionData('junk', data.root, {i: data.captions[i] for i in junk + data.splits['dev'][:60]}, {'dev': junk}, layout='tokens')
    report = check(small, quiet=True)
    assert report.ok and len(report.remarks['caption of one word']) >= 2
    assert 'A' in str(report)


def test_flickr8k_subset(flickr8k):
    data = load_data(flickr8k, num_images=70, split_seed=3)
    assert {s: len(ids) for s, ids in data.splits.items()} == {'train': 60, 'dev': 10}
    assert len(data.images) == 70 and len(data.train_captions()) == 300


# --- readers

_text = st.text(alphabet=st.characters(blacklist_categories=('Cs', 'Cc', 'Zl', 'Zp')), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(_text, min_size=1, max_size=6))
def test_any_caption_survives_every_layout(tmp_path_factory, captions):
    root = tmp_path_factory.mktemp('any')
    ids = make_photos(root/'Images', 3, (8, 8))
    all_captions = {i: captions for i in ids}
    splits = {'train': ids[:2], 'dev': ids[2:]}
    write_kaggle(root, all_captions); write_tokens(root, all_captions); write_karpathy(root, all_captions, splits)
    for layout in ('kaggle', 'tokens', 'karpathy'): assert load_data(root, layout).captions == all_captions


def test_windows_line_ends_and_byte_order_mark(toy):
    good = load_data(toy).captions
    text = (toy/'captions.txt').read_text()
    (toy/'captions.txt').write_bytes(b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode())
    assert load_data(toy).captions == good
    write_tokens(toy, good)
    (toy/'Toy.token.txt').write_bytes((toy/'Toy.token.txt').read_bytes().replace(b'\n', b'\r\n'))
    assert load_data(toy, 'tokens').captions == good


def test_no_header_a_file_instead_of_a_folder_and_another_image_folder(toy, tmp_path):
    good = load_data(toy)
    lines = (toy/'captions.txt').read_text().split('\n', 1)
    (toy/'captions.txt').write_text(lines[1])
    assert load_data(toy/'captions.txt').captions == good.captions
    (toy/'Images').rename(tmp_path/'elsewhere')
    assert load_data(toy, images=tmp_path/'elsewhere').root == tmp_path/'elsewhere'


def test_captions_in_a_folder_of_their_own(toy):
    (toy/'Flickr8k_text').mkdir()
    write_tokens(toy/'Flickr8k_text', load_data(toy).captions)
    (toy/'captions.txt').unlink()
    (toy/'Flickr8k_text'/'Flickr8k.lemma.token.txt').write_text('not these')
    (toy/'Flickr8k_text'/'Flickr_8k.trainImages.txt').write_text('0.jpg\n1.jpg\n')
    data = load_data(toy)
    assert data.layout == 'tokens' and data.splits == {'train': ['0.jpg', '1.jpg']}


def test_several_layouts_and_their_order(toy):
    captions = load_data(toy).captions
    write_tokens(toy, captions)
    assert load_data(toy).layout == 'tokens'
    write_karpathy(toy, captions, {'train': list(captions)[:4], 'val': ['4.jpg'], 'restval': ['5.jpg']})
    data = load_data(toy)
    assert data.layout == 'karpathy' and data.splits == {'train': ['0.jpg', '1.jpg', '2.jpg', '3.jpg', '5.jpg'], 'dev': ['4.jpg']}
    (toy/'Other.token.txt').write_text('')
    with pytest.raises(DataError, match='several tokens files: Other.token.txt, Toy.token.txt'): load_data(toy, 'tokens')


def test_coco_file_paths(tmp_path):
    make_photos(tmp_path/'val2014', 2); make_photos(tmp_path/'train2014', 2)
    images = [dict(filename=f'{i}.jpg', filepath=f, split=s, sentences=[dict(raw='a')])
              for f, s in (('val2014', 'val'), ('train2014', 'train')) for i in (0, 1)]
    (tmp_path/'dataset_coco.json').write_text(json.dumps(dict(images=images)))
    data = load_data(tmp_path)
    assert data.splits == {'train': ['train2014/0.jpg', 'train2014/1.jpg'], 'dev': ['val2014/0.jpg', 'val2014/1.jpg']}
    assert data.open('val2014/1.jpg').size == (40, 30) and check(data, quiet=True).ok


@pytest.mark.parametrize('own', [True, False])
def test_odd_ids_of_the_original_release(toy, own):
    captions = load_data(toy).captions
    if not own: captions.pop('3.jpg')
    captions['3.jpg.1'] = ['odd']
    captions['nowhere.jpg.1'] = ['odd']
    write_tokens(toy, captions)
    data = load_data(toy, 'tokens')
    assert '3.jpg.1' not in data.captions and 'nowhere.jpg' not in data.captions
    assert (data.captions['3.jpg'] == ['odd']) is not own
    assert len(data.notes) == 2 and 'put right while reading' in check(data, quiet=True).remarks


# --- splits and subsets

def test_seeded_split_depends_on_ids_alone(toy):
    captions = load_data(toy).captions
    first = load_data(toy, dev=0.2, test=0.2)
    assert {s: len(i) for s, i in first.splits.items()} == {'train': 4, 'dev': 1, 'test': 1}
    write_kaggle(toy, dict(reversed(captions.items())))
    again = load_data(toy, dev=0.2, test=0.2)
    assert {s: set(i) for s, i in first.splits.items()} == {s: set(i) for s, i in again.splits.items()}
    assert any(load_data(toy, split_seed=k).splits['dev'] != first.splits['dev'] for k in range(1, 9))
    assert set(load_data(toy, test=0).splits) == {'train', 'dev'}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.data(), st.integers(0, 5))
def test_subsets_are_exact_proportional_and_nested(sizes, draw, seed):
    splits = {s: [f'{s}{i}.jpg' for i in range(n)] for s, n in zip(('train', 'dev', 'test'), sizes)}
    data = CaptionData('x', '.', {i: ['c'] for ids in splits.values() for i in ids} | {'extra.jpg': ['c']}, splits)
    n = draw.draw(st.integers(len(sizes), sum(sizes)))
    small = data.subset(n, seed)
    assert len(small.images) == n == sum(map(len, small.splits.values())) and all(small.splits.values())
    for s, ids in small.splits.items():
        assert ids == [i for i in splits[s] if i in set(ids)]
        assert abs(len(ids) - max(1, n*len(splits[s])/sum(sizes))) <= len(sizes)
    assert data.subset(n, seed).fingerprint == small.fingerprint
    assert (small.fingerprint == data.fingerprint) is False


def test_subset_limits(toy):
    data = load_data(toy)
    assert repr(data) == str(data) == 'toy (kaggle): 6 images, 30 captions · train 4 · dev 1 · test 1'
    assert load_data(toy, num_images=0).fingerprint == data.fingerprint
    with pytest.raises(ValueError, match='num_images=7, but toy has 6'): data.subset(7)
    with pytest.raises(ValueError, match='at least 3, one each for train, dev, test'): data.subset(2)
    with pytest.raises(ValueError, match='together below 1'): load_data(toy, dev=0.5, test=0.5)


# --- bad input, each with its message

def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere: no such folder; give the folder'): load_data(tmp_path/'nowhere')


def test_folder_without_captions(tmp_path):
    (tmp_path/'notes.md').write_text('x')
    message = r'no captions that I know: looked for scenes.json.*captions.txt.*found notes.md'
    with pytest.raises(FileNotFoundError, match=message): load_data(tmp_path)
    with pytest.raises(FileNotFoundError, match="no captions of layout 'karpathy'"): load_data(tmp_path, 'karpathy')
    with pytest.raises(ValueError, match="unknown layout 'karpaty': did you mean 'karpathy'"): load_data(tmp_path, 'karpaty')


@pytest.mark.parametrize('row,message', [
    ('5.jpg,a man, running\n', r'captions.txt, row 32: expected 2 fields \(image,caption\), got 3: .*double quotes'),
    ('5.jpg\n', r'captions.txt, row 32: expected 2 fields \(image,caption\), got 1'),
    ('5.jpg,"never closed\n4.jpg,next\n', r'captions.txt, row 32: '),
    ('5.jpg,"never closed\n4.jpg,the "next"\n', r'captions.txt, row 32: '),
    ('5.jpg,"never closed\n4.jpg,"next"\n', r'captions.txt, row 32: bad quoting'),
    (',no image\n', 'captions.txt, row 32: the image name is empty'),
    ('../../etc/passwd,a secret\n', 'captions.txt, row 32: image name .* leads out of the image folder'),
    ('/etc/passwd,a secret\n', 'captions.txt, row 32: image name .* leads out of the image folder'),
    ('C:\\secret.jpg,a secret\n', 'captions.txt, row 32: image name .* leads out of the image folder'),
])
def test_bad_row_kaggle(toy, row, message):
    append(toy/'captions.txt', row)
    with pytest.raises(DataError, match=message): load_data(toy)


def test_row_numbers_count_lines_of_the_file(toy):
    (toy/'captions.txt').write_text('image,caption\n\n0.jpg,"two\nlines"\n1.jpg\n')
    with pytest.raises(DataError, match='row 5: expected 2 fields'): load_data(toy)
    (toy/'captions.txt').write_text('photo;text\n0.jpg;a\n')
    with pytest.raises(DataError, match="row 1: expected the header 'image,caption', got 'photo;text'"): load_data(toy)


@pytest.mark.parametrize('row,message', [
    ('5.jpg#5 no tab\n', 'Toy.token.txt, row 31: no tab between image and caption'),
    ('5.jpg\tno number\n', "Toy.token.txt, row 31: '5.jpg' is not name.jpg#number"),
    ('5.jpg#x\tno number\n', "Toy.token.txt, row 31: '5.jpg#x' is not name.jpg#number"),
])
def test_bad_row_tokens(toy, row, message):
    write_tokens(toy, load_data(toy).captions)
    append(toy/'Toy.token.txt', row)
    with pytest.raises(DataError, match=message): load_data(toy)


@pytest.mark.parametrize('content,message', [
    ('{"images": [', r'dataset_toy.json, line 1, column \d+: not JSON'),
    ('[1, 2]', "no list of objects under 'images'"),
    ('{"images": [{"split": "train"}]}', r"row 0 \(images\[0\]\): 'filename' should be a str, got None"),
    ('{"images": [{"filename": "0.jpg", "split": "trian", "sentences": []}]}', "unknown split 'trian': did you mean 'train'"),
    ('{"images": [{"filename": "0.jpg", "split": "train", "sentences": [{"tokens": []}]}]}', "has no text under 'raw'"),
    ('{"images": [{"filename": "../0.jpg", "split": "train", "sentences": []}]}', 'leads out of the image folder'),
    ('{"images": []}', 'no captions: the file holds no image'),
])
def test_bad_json(toy, content, message):
    (toy/'dataset_toy.json').write_text(content)
    with pytest.raises(DataError, match=message): load_data(toy)


def test_wrong_encoding_names_byte_and_line(toy):
    before = (toy/'captions.txt').stat().st_size
    append(toy/'captions.txt', '5.jpg,un café\n'.encode('latin-1'))
    message = rf'captions.txt: byte {before + 12}, line 32: 0xe9 is not UTF-8.*iconv -f WINDOWS-1252'
    with pytest.raises(DataError, match=message): load_data(toy)
    (toy/'captions.txt').write_text('image,caption\n', encoding='utf-16')
    with pytest.raises(DataError, match='the file is UTF-16'): load_data(toy)
    (toy/'captions.txt').write_bytes(gzip.compress(b'image,caption'))
    with pytest.raises(DataError, match=r'captions.txt: the file is compressed; unpack it first \(gunzip'): load_data(toy)


def test_missing_images_first_few_and_count(toy):
    captions = load_data(toy).captions
    write_kaggle(toy, captions | {f'gone{k}.jpg': ['x'] for k in range(8)})
    message = r'8 images of 14 named in captions.txt not found in .*Images: gone0.jpg, .*gone4.jpg and 3 more; put'
    with pytest.raises(FileNotFoundError, match=message): load_data(toy)
    report = check(load_data(toy, strict=False), quiet=True)
    assert not report.ok and len(report.problems['missing image']) == 8 and 'gone7.jpg: no such file' in report.problems['missing image']


def test_names_that_differ_in_case(toy):
    write_kaggle(toy, load_data(toy).captions | {'IMG.jpg': ['x']})
    make_photos(toy/'Images', 1)
    (toy/'Images'/'0.jpg').with_name('img.JPG').write_bytes((toy/'Images'/'0.jpg').read_bytes())
    with pytest.raises(FileNotFoundError, match='img.JPG differs in case'): load_data(toy)


def test_no_image_folder_at_all(toy, tmp_path):
    (toy/'Images').rename(tmp_path/'elsewhere')
    with pytest.raises(FileNotFoundError, match='none of the images was found there or below.*name it with images='): load_data(toy)
    with pytest.raises(FileNotFoundError, match='no such folder of images'): load_data(toy, images=tmp_path/'nope')


def test_zero_captions_for_an_image(toy):
    captions = load_data(toy).captions
    (toy/'Toy.trainImages.txt').write_text('\n'.join(captions)); captions.pop('2.jpg')
    write_kaggle(toy, captions)
    with pytest.raises(DataError, match="1 image of split 'train' without a caption in captions.txt: 2.jpg; add captions"): load_data(toy)
    assert check(load_data(toy, strict=False), quiet=True).problems['no caption'] == ['2.jpg']
    write_karpathy(toy, captions | {'2.jpg': []}, {'train': []})
    with pytest.raises(DataError, match="1 image of split 'train' without a caption in dataset_toy.json: 2.jpg"): load_data(toy)


def test_empty_split(toy):
    (toy/'Toy.trainImages.txt').write_text('0.jpg\n'); (toy/'Toy.devImages.txt').write_text('\n\n')
    with pytest.raises(DataError, match='Toy.devImages.txt: the split is empty: no image is listed'): load_data(toy)
    (toy/'Toy.devImages.txt').unlink()
    with pytest.raises(ValueError, match="toy has no split 'dev': valid: train"): load_data(toy).references('dev')
    data = CaptionData('toy', toy/'Images', {'0.jpg': ['a']}, {'train': ['0.jpg'], 'dev': []})
    with pytest.raises(DataError, match="split 'dev' of toy is empty"): data.references('dev')
    assert check(data, quiet=True).problems == {'empty split': ['dev']}


def test_too_few_images_to_split(toy):
    write_kaggle(toy, {'0.jpg': ['a'], '1.jpg': ['b']})
    with pytest.raises(DataError, match='2 images cannot be split into train, dev and test: a split would be empty'): load_data(toy)


def test_leaking_splits(toy):
    (toy/'Toy.trainImages.txt').write_text('0.jpg\n1.jpg\n'); (toy/'Toy.testImages.txt').write_text('1.jpg\n2.jpg\n')
    with pytest.raises(DataError, match=r'1 image in several splits.*1.jpg \(train test\)'): load_data(toy)
    assert check(load_data(toy, strict=False), quiet=True).problems['in several splits'] == ['1.jpg: train, test']


# --- photos

def test_truncated_and_not_an_image(toy):
    photo = toy/'Images'/'0.jpg'
    whole = photo.read_bytes()
    photo.write_bytes(whole[:len(whole)//2])
    with pytest.raises(ImageError, match=r'0.jpg: truncated: .*copy it again') as e: open_image(photo)
    assert e.value.kind == 'truncated'
    (toy/'Images'/'1.jpg').write_text('<html>not found</html>')
    message = r'1.jpg: not an image: it looks like text \(starts with b.<html>not found'
    with pytest.raises(ImageError, match=message) as e: open_image(toy/'Images'/'1.jpg')
    assert e.value.kind == 'not an image'
    (toy/'Images'/'2.jpg').write_bytes(b'')
    (toy/'Images'/'3.jpg').write_bytes(bytes(range(256)))
    report = check(load_data(toy), workers=3, quiet=True)
    assert sorted(w.split(':')[0] for w in report.problems['truncated image']) == ['0.jpg', '2.jpg']
    assert sorted(w.split(':')[0] for w in report.problems['not an image']) == ['1.jpg', '3.jpg']
    assert not report.ok and 'NOT ok: 4 problems' in str(report)


# --- check

def test_check_captions_and_files(toy):
    data = load_data(toy)
    data.captions['0.jpg'] = ['same  words', 'same words ', 'other words', '', '  ', 'A', 'broken \ufffd']
    (toy/'Images'/'spare.jpg').write_bytes((toy/'Images'/'4.jpg').read_bytes())
    (toy/'Images'/'3.jpg').write_bytes((toy/'Images'/'4.jpg').read_bytes())
    data.splits = {s: [i for i in ids if i != '5.jpg'] for s, ids in data.splits.items()}
    report = check(data, quiet=True)
    assert set(report.problems) - {'empty split'} == {'empty caption'}
    assert report.problems['empty caption'] == ['0.jpg: 2 captions without a word']
    assert report.remarks['duplicate caption'] == ["0.jpg: 2 × 'same words'"]
    assert report.remarks['caption of one word'] == ["0.jpg: 'A'"]
    assert report.remarks['in no split'] == ['5.jpg'] and report.remarks['photo without captions'] == ['spare.jpg']
    assert len(report.remarks['odd characters']) == 1
    twins = report.remarks['the same photo under several names']
    assert len(twins) == 1 and '3.jpg' in twins[0] and '4.jpg' in twins[0]


def test_check_shows_progress(toy, capfd):
    check(load_data(toy))
    assert 'checking: 6/6 images' in capfd.readouterr().err


# --- plots

def test_plots(toy, tmp_path):
    data = load_data(toy)
    data.captions['0.jpg'] = ['costs $5 and $6 or <b>$x_{$</b>', 'A']
    for k, fig in enumerate((plot_lengths(data), plot_words(data), plot_page(data, n=4), plot_page(data, ['0.jpg']))):
        fig.savefig(tmp_path/f'{k}.png')
        assert all(ax.get_xlabel() and ax.get_ylabel() for ax in fig.axes) or k
    import matplotlib.pyplot as plt
    assert not plt.get_fignums()
    with pytest.raises(ValueError, match='no image to show'): plot_page(data, [])


def test_import_is_light():
    "`caption-nb --help` must not wait for torch or matplotlib"
    import subprocess, sys
    code = ('import sys, caption_nb.data, caption_nb.scenes;'
            'print([m for m in ("torch", "matplotlib", "timm", "spacy", "nltk") if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
