"""Captions in every layout, every fault of a file, and reports that say what was scored."""
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import caption_nb.metrics
from caption_nb.data import load_data
from caption_nb.evaluation import (ALL_METRICS, Comparison, References, align, compare, evaluate_captions, match_ids, read_hypotheses,
                                   read_references, score_files)
from caption_nb.guard import Finding, ProtocolError
from caption_nb.metrics import score
from caption_nb.similarity import wer

DATA = Path(__file__).parent/'data'
FAST = 'bleu,rouge,cider'
TRUTH = {1: ['A dog runs on the grass.', 'The dog is running.'], 2: ['Two boats at sea.', 'Boats, on the water'], 3: ['A girl jumps.']}
SAID = {1: 'a dog runs on grass', 2: 'two boats', 3: 'a boy jumps'}
NAMES = {i: f'COCO_val2014_{i:012}.jpg' for i in TRUTH}
SPLITS = {1: 'train', 2: 'val', 3: 'test'}


@pytest.fixture
def put(tmp_path):
    "Write a file: text, bytes, or what becomes JSON"
    def write(name: str, content) -> Path:
        path = tmp_path/name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes): path.write_bytes(content)
        else: path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')
        return path
    return write


def rows(captions: dict) -> list[dict]:
    return [dict(image_id=i, caption=c) for i, cs in captions.items() for c in ([cs] if isinstance(cs, str) else cs)]


def coco(captions: dict = TRUTH) -> dict:
    return dict(info={}, licenses=[], images=[dict(id=i, file_name=NAMES[i]) for i in captions],
                annotations=[dict(id=100 + k, **row) for k, row in enumerate(rows(captions))])


def karpathy(captions: dict = TRUTH, **more) -> dict:
    return dict(dataset='coco', images=[dict(filepath='val2014', filename=NAMES[i], cocoid=i, imgid=i + 100, split=SPLITS[i],
                                             sentences=[dict(raw=c, tokens=c.split()) for c in cs], **more) for i, cs in captions.items()])


def tokens(captions: dict = TRUTH) -> str: return ''.join(f'{i}.jpg#{k}\t{c}\n' for i, cs in captions.items() for k, c in enumerate(cs))


def table(captions: dict = TRUTH, header: str = 'image,caption') -> str:
    return header + '\n' + ''.join(f'{i}.jpg,"{c}"\n' for i, cs in captions.items() for c in ([cs] if isinstance(cs, str) else cs))


# ---- hypotheses -------------------------------------------------------------------------------------------------

HYPOTHESES = {
    'COCO results': rows(SAID), 'with more keys': [row | dict(perplexity=3., id=99) for row in rows(SAID)], 'dict': SAID,
    'dict of lists': {i: [c] for i, c in SAID.items()}, 'dict of objects': {i: [dict(image_id=i, caption=c)] for i, c in SAID.items()},
    'other names': [dict(image=f'{i}.jpg', text=c) for i, c in SAID.items()], 'JSON lines': '\n'.join(map(json.dumps, rows(SAID))) + '\n\n',
    'table': table(SAID), 'table with more': 'id,Caption,CIDEr\r\n' + ''.join(f'{i},{c},1.0\r\n' for i, c in SAID.items()),
    'indented': json.dumps(rows(SAID), indent=1), 'byte order mark': b'\xef\xbb\xbf' + json.dumps(rows(SAID)).encode(),
    'under annotations': dict(annotations=rows(SAID)), 'tokens': ''.join(f'{i}.jpg#0\t{c}\n' for i, c in SAID.items()),
}


@pytest.mark.parametrize('layout', HYPOTHESES)
def test_hypotheses_of_every_layout(put, layout):
    found = read_hypotheses(put('results.any', HYPOTHESES[layout]))
    assert {int(re.sub(r'\.jpg$', '', str(i))): c for i, c in found.items()} == SAID


def test_one_line_of_json_is_a_row(put): assert read_hypotheses(put('one.jsonl', rows({7: 'a dog'})[0])) == {7: 'a dog'}
def test_empty_captions_are_captions(put): assert read_hypotheses(put('r.json', rows({7: ''}))) == {7: ''}
def test_lines_in_quotes_are_one(put): assert read_hypotheses(put('r.csv', 'image,caption\na.jpg,"a\nb"\n')) == {'a.jpg': 'a\nb'}


FAULTS = {
    'empty': ('', 'the file is empty'), 'blank': (' \n ', 'the file is empty'), 'empty list': ('[]', 'it holds no caption'),
    'empty dict': ('{}', 'it holds no caption'), 'header only': ('image,caption\n', 'it holds no caption'),
    'truncated': (json.dumps(rows(SAID))[:-20], r"line 1, column \d+: not JSON .*ends with '.*': is it complete"),
    'truncated lines': ('\n'.join(map(json.dumps, rows(SAID)))[:-5], r'row 3: not JSON .* is the file complete'),
    'Latin-1': ('[{"image_id": 1, "caption": "café"}]'.encode('latin-1'), r'byte 32, line 1: 0xe9 is not UTF-8'),
    'UTF-16': (json.dumps(rows(SAID)).encode('utf-16'), 'the file is UTF-16'),
    'list of text': (['a dog'], r"\[0\] is no object but str: 'a dog'"), 'number': ('[1, 2]', r'\[0\] is no object but int'),
    'nested': ([rows(SAID)], r'\[0\] is no object but list'), 'a word': ('hello', 'row 1: expected JSON, or a header'),
    'no id': ([*rows(SAID), dict(img=4, caption='x')], r"\[3\] has no 'image_id', but 'img', 'caption'"),
    'no caption': ([dict(image_id=4, words='x')], r"\[0\] has no 'caption', but 'image_id', 'words'"),
    'no caption in a line': ('{"image_id": 1, "caption": "x"}\n{"image_id": 2}\n', r"row 2 has no 'caption', but 'image_id'"),
    'null': ([*rows(SAID), dict(image_id=4, caption=None)], r'captions that are no text: \[3\] \(None\)'),
    'numbers': ([dict(image_id=i, caption=i) for i in range(5)], r'no text: \[0\] \(0\), \[1\] \(1\), \[2\] \(2\) and 2 more'),
    'number in a dict': ({'a.jpg': 7}, r"no text: \['a.jpg'\] \(7\)"),
    'list in a list': ([dict(image_id=1, caption=['a dog'])], r"no text: \[0\] \(\['a dog'\]\)"),
    'id is null': ([dict(image_id=None, caption='x')], r'no image id \(a whole number or a name\): \[0\] \(None\)'),
    'id is a fraction': ([dict(image_id=1.5, caption='x')], r'no image id .*: \[0\] \(1.5\)'),
    'id is true': ([dict(image_id=True, caption='x')], r'no image id .*: \[0\] \(True\)'),
    'id is blank': ('image,caption\n ,a dog\n', r"no image id .*row 2 \(''\)"),
    'double': (rows(SAID) + rows({2: 'a ship'}), r'more than one caption for an image: \[1\] and \[3\] \(2\); .*keep one'),
    'double in a dict': ('{"a": "x", "a": "y"}', "the key 'a' stands 2 times"),
    'two in a list': ({'a': ['x', 'y'], 'b': ['z']}, r"\['a'\]\[0\] and \['a'\]\[1\] \('a'\)"),
    'none in a list': ({'a': ['x'], 'b': []}, r"images without a caption: \['b'\]"),
    'references': (TRUTH, 'more than one caption .* are these the references'), 'COCO references': (coco(), 'a data set with references'),
    'Karpathy references': (karpathy(), 'a data set with references'),
    'too many fields': ('image,caption\na.jpg,one, two\n', r'row 2: expected 2 fields, got 3: .*double quotes'),
    'open quote': ('image,caption\na.jpg,"one\nb.jpg,two\n', r'row 2: bad quoting'),
    'token line': ('a.jpg#0\tx\nb.jpg\ty\n', r"row 2: 'b.jpg\\ty' is not"),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_of_results_are_named(put, fault):
    content, message = FAULTS[fault]
    path = put('results.json', content)
    with pytest.raises(ValueError, match=message) as e: read_hypotheses(path)
    assert str(e.value).startswith(str(path))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='results.json: no such file'): read_hypotheses(tmp_path/'results.json')
    with pytest.raises(FileNotFoundError, match='a folder, not a file of captions'): read_hypotheses(tmp_path)
    with pytest.raises(FileNotFoundError, match='no such file or folder of references'): read_references(tmp_path/'refs')


KEYS = st.sampled_from(['image_id', 'caption', 'images', 'annotations', 'id', 'sentences', 'filename', '7'])


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                    lambda c: st.lists(c, max_size=4) | st.dictionaries(KEYS, c, max_size=4)))
def test_any_json_is_read_or_refused_with_its_name(tmp_path_factory, content):
    path = tmp_path_factory.mktemp('any')/'any.json'
    path.write_text(json.dumps(content))
    for read in (read_hypotheses, read_references):
        try: found = read(path)
        except ValueError as e: assert str(e).startswith(str(path))
        else: assert len(found)


# ---- references -------------------------------------------------------------------------------------------------

REFERENCES = {'captions_val.json': coco(), 'dataset_coco.json': karpathy(), 'dict.json': TRUTH, 'Flickr.token.txt': tokens(),
              'captions.txt': table(), 'ids.csv': table(header='image_id,caption'), 'rows.json': rows(TRUTH),
              'rows.jsonl': '\n'.join(map(json.dumps, rows(TRUTH))),
              'gts.json': {i: rows({i: cs}) for i, cs in TRUTH.items()}}
SPELLINGS = {'numbers': int, 'text': str, 'file names': NAMES.get, 'stems': lambda i: NAMES[i][:-4], '2017': lambda i: f'{i:012}.jpg',
             'with folder': lambda i: f'val2014/{NAMES[i]}'}


@pytest.mark.parametrize('spelling', SPELLINGS)
@pytest.mark.parametrize('layout', REFERENCES)
def test_references_of_every_layout_with_ids_of_every_spelling(put, layout, spelling):
    refs = read_references(put(layout, REFERENCES[layout]))
    assert [len(r) for r in refs.captions.values()] == [2, 2, 1]
    assert len(refs.sha256) == 64 and refs.source.endswith(layout) and not refs.split
    if layout in ('ids.csv', 'captions.txt', 'Flickr.token.txt'): assert list(refs.captions) == ['1.jpg', '2.jpg', '3.jpg']
    hypotheses, same = align({SPELLINGS[spelling](i): c for i, c in reversed(SAID.items())}, refs)
    assert list(hypotheses.values()) == list(SAID.values()) and list(hypotheses) == list(same.captions) == list(refs.captions)
    assert [list(cs) for cs in same.captions.values()] == list(TRUTH.values())


def test_imgids_of_karpathy(put):
    refs = read_references(put('dataset_coco.json', karpathy()))
    assert list(align({i + 100: c for i, c in SAID.items()}, refs)[0].values()) == list(SAID.values())
    assert list(refs.captions)[0] == f'val2014/{NAMES[1]}'


def test_ids_that_mean_two_things_are_refused():
    names = dict(cocoid={'a.jpg': 1, 'b.jpg': 0}, imgid={'a.jpg': 0, 'b.jpg': 1})
    refs = References({'a.jpg': ['x'], 'b.jpg': ['y']}, source='d.json', names=names)
    with pytest.raises(ValueError, match=r'd.json: .* such as 0, fit several of its ids \(cocoid, imgid\)'): match_ids([0, 1], refs)
    assert match_ids(['a', 'b'], refs) == {'a': 'a.jpg', 'b': 'b.jpg'}


def test_names_that_would_become_one_are_kept_apart():
    refs = References({'x/1.jpg': ['a'], 'y/1.jpg': ['b']})
    assert match_ids(['x/1.jpg', 'y/1.jpg'], refs) == {'x/1.jpg': 'x/1.jpg', 'y/1.jpg': 'y/1.jpg'} and match_ids(['1.jpg'], refs) == {}


def test_splits(put, tmp_path):
    path = put('dataset_coco.json', karpathy())
    for split, i in (('train', 1), ('val', 2), ('dev', 2), ('test', 3)):
        refs = read_references(path, split)
        assert list(refs.captions) == [f'val2014/{NAMES[i]}'] and refs.split == ('dev' if i == 2 else split)
    with pytest.raises(ValueError, match="no image is in the split 'tets': did you mean 'test'"): read_references(path, 'tets')
    with pytest.raises(ValueError, match="not tell which image is in which split; leave out the split 'test'"):
        read_references(put('c.json', coco()), 'test')
    token = put('Flickr.token.txt', tokens())
    with pytest.raises(ValueError, match='which split'): read_references(token, 'test')
    put('Flickr_8k.testImages.txt', '3.jpg\n4.jpg\n')
    with pytest.raises(ValueError, match=r"without a caption: '4.jpg'"): read_references(token, 'test')
    put('Flickr_8k.testImages.txt', '3.jpg\n')
    assert read_references(token, 'test').captions == {'3.jpg': TRUTH[3]}


def test_a_data_set_by_its_folder_and_by_its_files(flickr8k):
    data = load_data(flickr8k)
    refs = read_references(flickr8k, 'dev')
    assert refs.captions == data.references('dev') and refs.sha256 == data.fingerprint and len(refs) == 1000
    for name in ('dataset_flickr8k.json', 'Flickr8k.token.txt', 'captions.txt'):
        other = read_references(flickr8k/name, 'dev').captions
        assert other.keys() == refs.captions.keys() and all(len(c) == 5 for c in other.values()), name


BAD_REFERENCES = {
    'no images': (dict(images=[], annotations=[]), "no image: 'images' is empty"),
    'ids': (dict(images=[dict(name=1)], annotations=[]), r"images without an 'id': images\[0\]"),
    'foreign': (coco() | dict(images=[dict(id=1)]), r"not among 'images': annotations\[2\] \(2\), annotations\[3\] \(2\), anno"),
    'annotation': (dict(images=[dict(id=1)], annotations=[dict(image_id=1, caption=5)]), r'no text: \[0\] \(5\)'),
    'no annotation': (dict(images=[dict(id=1)], annotations=[]), 'holds no caption'),
    'sentences': (dict(images=[dict(filename='a.jpg', split='test')]), r"not an image of Karpathy's JSON: images\[0\]"),
    'raw': (dict(images=[dict(filename='a.jpg', sentences=[dict(tokens=[])])]),
            r"images\[0\]; it needs 'filename' and 'sentences' with 'raw'"),
    'split': (dict(images=[dict(filename='a.jpg', split='tset', sentences=[])]), r"unknown split 'tset': images\[0\]; did you mean 'test'"),
    'twice': (dict(images=2*[dict(filename='a.jpg', split='test', sentences=[dict(raw='x')])]),
              r"an image stands twice: images\[1\] \('a.jpg'\)"),
    'truncated': (json.dumps(coco())[:-9], 'is it complete'), 'empty': ('', 'the file is empty'),
    'not text': ({'a': ['x', 3]}, r"no text: \['a'\]\[1\] \(3\)"),
}


@pytest.mark.parametrize('fault', BAD_REFERENCES)
def test_faults_of_references_are_named(put, fault):
    content, message = BAD_REFERENCES[fault]
    path = put('references.json', content)
    with pytest.raises(ValueError, match=message) as e: read_references(path)
    assert str(e.value).startswith(str(path))


# ---- the same images --------------------------------------------------------------------------------------------

def test_missing_images_are_named_and_a_subset_has_to_be_asked_for(put):
    refs = read_references(put('c.json', coco()))
    message = r'r.json: no caption for 2 of the 3 images of .*c.json: 1, 3; caption them all, or let --subset .* 1 image that'
    with pytest.raises(ValueError, match=message):
        align({2: 'x'}, refs, 'r.json')
    hypotheses, part = align({2: 'x'}, refs, subset=True)
    assert hypotheses == {2: 'x'} and part.captions == {2: TRUTH[2]}


def test_the_right_split_is_proposed(put):
    path = put('d.json', karpathy())
    with pytest.raises(ValueError, match='all its images are in split dev, so use --split dev'): align({2: 'x'}, read_references(path))
    with pytest.raises(ValueError, match='none of its 1 image is known: not among the 1 image of split test .*: 2; they are of split dev'):
        align({2: 'x'}, read_references(path, 'test'))
    with pytest.raises(ValueError, match=r'not among .*: 2, 1; they are of split dev and train: score that one, or leave them out'):
        align({3: 'x', 2: 'y', 1: 'z'}, read_references(path, 'test'))


def test_unknown_double_and_bare_images_are_named(put):
    refs = read_references(put('c.json', coco()))
    for given, message in ((SAID | dict.fromkeys([7, 8, 9, 10], ''), r'not among the 3 images .*: 7, 8, 9 and 1 more; leave them out'),
                           ({'x.jpg': '', 'y.jpg': ''}, "none of its 2 images is known: .*: 'x.jpg', 'y.jpg'; .*have ids such as 1, 2"),
                           (SAID | {'2': 'x'}, "more than one caption for an image: 2 and '2' are both 2; keep one")):
        with pytest.raises(ValueError, match=message): align(given, refs)
    for bare in ([], ['', '  ']):
        with pytest.raises(ValueError, match=r'c2.json: images without a reference: 2; they cannot be scored'):
            align(SAID, read_references(put('c2.json', coco(TRUTH | {2: bare}))))
    assert align({1: 'x', 3: 'y'}, read_references(put('c3.json', coco(TRUTH | {2: []}))), subset=True)[0] == {1: 'x', 3: 'y'}


# ---- reports ----------------------------------------------------------------------------------------------------

def test_a_report_has_the_scores_of_score():
    report = evaluate_captions(SAID, TRUTH, metrics=FAST, resamples=20)
    found = score(SAID, TRUTH)
    assert report.scores.corpus == found.corpus and report.scores.per_image == found.per_image and report.signature == found.signature
    assert list(report.intervals) == list(found.corpus) and not report.skipped and report.captions == SAID
    for m, i in report.intervals.items(): assert i.value == pytest.approx(found.corpus[m]) and i.low <= i.high


def test_extra_metrics_and_word_error_rate():
    mine = wer([['a'], ['b'], ['c']], [[['a']], [['b']], [['d', 'c']]])
    extra = {'SPICE': (.25, {1: .1, 2: .2, 3: .9}), 'CLIPScore': (2., {1: 1., 2: 2., 3: 3.}), 'mine': mine}
    report = evaluate_captions(SAID, TRUTH, metrics='bleu, WER', resamples=50, extra=extra)
    assert list(report.scores.corpus)[4:] == ['WER(nearest)', 'SPICE', 'CLIPScore', 'mine'] and report.scores.corpus['mine'] == 1/4
    assert 'SPICE' not in report.intervals and report.intervals['CLIPScore'].value == 2   # .25 is no mean: how to resample it is unknown
    assert report.scores.per_image[2] | dict(SPICE=.2, CLIPScore=2., mine=0.) == report.scores.per_image[2]
    assert '|BLEU,WER(nearest),SPICE,CLIPScore,mine|' in report.signature
    with pytest.raises(ValueError, match='SPICE: images without a value: 2, 3'):
        evaluate_captions(SAID, TRUTH, metrics=FAST, extra={'SPICE': (1., {1: 1.})})
    with pytest.raises(ValueError, match='mine has values of 1 images, the captions are of 3'):
        evaluate_captions(SAID, TRUTH, metrics=FAST, extra={'mine': wer([['a']], [[['a']]])})


def test_no_meteor_is_told_and_the_rest_is_scored(monkeypatch):
    meteor = pytest.importorskip('caption_nb.meteor')
    def missing(): raise meteor.MeteorMissing('no tables, no Java; pip install pycocoevalcap')
    monkeypatch.setattr(caption_nb.metrics, '_meteor', missing)
    report = evaluate_captions(SAID, TRUTH, resamples=0)
    assert report.skipped == {'METEOR': 'no tables, no Java; pip install pycocoevalcap'} and 'METEOR' not in report.scores.corpus
    assert 'METEOR skipped: no tables' in report.text() and '- METEOR skipped' in report.markdown() and 'METEOR' not in report.signature
    with pytest.raises(ValueError, match='no metric is left to score: no tables'): evaluate_captions(SAID, TRUTH, metrics='meteor')
    assert set(ALL_METRICS) == {'bleu', 'meteor', 'rouge', 'cider', 'wer'}


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="unknown metric 'blue': did you mean 'bleu'"): evaluate_captions(SAID, TRUTH, metrics='blue')
    with pytest.raises(ValueError, match='name one or more of bleu'): evaluate_captions(SAID, TRUTH, metrics='wer')
    with pytest.raises(ValueError, match='no flag in finished for images: 2, 3'):
        evaluate_captions(SAID, TRUTH, metrics=FAST, finished={1: True})
    with pytest.raises(ValueError, match='no hypothesis for 3'): evaluate_captions({1: 'x', 2: 'y'}, TRUTH, metrics=FAST)
    with pytest.raises(ValueError, match='there is no report'): compare({})


def test_text_markdown_and_json_of_a_report():
    findings = [Finding('empty captions', 'stamp', '1 of 3', 'Look')]
    report = evaluate_captions(SAID, TRUTH, metrics=FAST, resamples=20, finished={1: True, 2: False, 3: True}, train=['A boy jumps.'],
                               findings=findings, about=dict(beam='5'), name='mine.json')
    text, page = report.text(), report.markdown()
    assert text.startswith('mine.json: 3 images, 95 % intervals') and text.count(report.signature) == page.count(report.signature) == 1
    assert all('empty captions (stamp): 1 of 3. Look' in shown for shown in (text, page)) and '66.7% ended by themselves' in text
    assert re.search(r'CIDEr +\d\.\d{4}  \[\d\.\d{4}, \d\.\d{4}\]', text) and '|beam=5' in report.signature
    assert '33.3% stand word for word in train' in text and report._repr_markdown_() == page and str(report) == text
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found['scores'] == report.scores.corpus
    assert found['findings'] == [dict(rule='empty captions', level='stamp', what='1 of 3', todo='Look')]
    assert found['intervals']['CIDEr'] == list(report.intervals['CIDEr'][1:]) and found['diversity']['in_train'] == 1/3


def test_written_files(tmp_path):
    said = SAID | {3: 'a "boy", jumping\nhigh'}
    report = evaluate_captions(said, TRUTH, metrics=FAST, resamples=0)
    paths = report.write(tmp_path/'new', 'run 1')
    assert [p.name for p in paths] == ['run 1.json', 'run 1.csv']
    found = json.loads(paths[0].read_text())
    assert list(found['overall']) == ['Bleu_1', 'Bleu_2', 'Bleu_3', 'Bleu_4', 'ROUGE_L', 'CIDEr']
    assert found['imgToEval']['1'] == {'image_id': 1} | report.scores.per_image[1] and found['signature'] == report.signature
    with open(paths[1], newline='', encoding='utf-8') as f: table = list(csv.DictReader(f))
    each = found['imgToEval']
    assert [(r['id'], r['caption'], float(r['CIDEr'])) for r in table] == [(str(i), c, each[str(i)]['CIDEr']) for i, c in said.items()]
    assert read_hypotheses(paths[1]) == {str(i): c for i, c in said.items()}


# ---- files in, report out ---------------------------------------------------------------------------------------

def test_scores_never_replace_the_captions_or_each_other(put, tmp_path):
    a, b, c = put('r.json', rows(SAID)), put('r.csv', table(SAID)), put('c.json', coco())
    before = [p.read_bytes() for p in (a, b, c)]
    score_files([a, b], c, metrics='bleu', resamples=0, out=tmp_path)
    score_files(a, c, metrics='bleu', resamples=0, out=tmp_path)
    assert [p.read_bytes() for p in (a, b, c)] == before
    assert sorted(p.name for p in tmp_path.glob('scores_*')) == [f'scores_r{n}.{s}' for n in ('-1', '-2', '') for s in ('csv', 'json')]
    with pytest.raises(FileExistsError, match='r.csv'): score_files(a, c, out=b)


@pytest.mark.parametrize('text, said', [
    ('[{"image_id": 1, "caption": "a dog \\ud83d"}]', r"r.json: half of a character.*: \[0\] \('a dog"),
    ('{"a\\udc36": "a dog"}', 'half of a character'), ('['*100_000, 'r.json: not JSON that can be read'),
    (f'[{{"image_id": {"9"*5000}, "caption": "a"}}]', 'r.json: not JSON that can be read'),
    ('{"results": [{"image_id": 1, "caption": "a"}]}', r"\['results'\]\[0\] is of image 1, but stands under 'results'.*write the list alone"),
    ('[{"image_id": 1.0, "caption": "a"}]', r'a whole number or a name\): \[0\] \(1.0\)')])
def test_odd_json_is_told_with_the_name_of_the_file(put, text, said):
    with pytest.raises(ValueError, match=said): read_hypotheses(put('r.json', text))


def test_what_is_no_file_is_told(tmp_path):
    (tmp_path/'captions_dev.json').write_text('[]')
    with pytest.raises(FileNotFoundError, match='a folder, not a file of captions; it holds captions_dev.json$'): read_hypotheses(tmp_path)
    with pytest.raises(FileNotFoundError, match='a pipe or a device'): read_hypotheses('/dev/null')


def test_score_files_of_one_and_of_several(put, tmp_path):
    a, b = put('a/r.json', rows(SAID)), put('b/r.json', rows({i: rs[0] for i, rs in TRUTH.items()}))
    one = score_files(a, put('c.json', coco()), metrics=FAST, resamples=50)
    assert list(one.reports) == ['r.json'] and not one.differences
    assert one.text() == one['r.json'].text() and one.markdown() == one['r.json'].markdown()
    both = score_files([a, b], tmp_path/'c.json', metrics=FAST, resamples=50, out=tmp_path/'out')
    assert list(both.reports) == ['a/r.json', 'b/r.json'] and both['a/r.json'].scores.corpus == one['r.json'].scores.corpus
    cider = [r.scores.corpus['CIDEr'] for r in both.reports.values()]
    assert both.differences['b/r.json']['CIDEr'].difference == pytest.approx(cider[1] - cider[0])
    for shown in (both.text(), both.markdown()): assert shown.count(both.signature) == 1 and 'CIDEr' in shown and 'b/r.json' in shown
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == [f'scores_{n}' for n in ('a-r.csv', 'a-r.json', 'b-r.csv', 'b-r.json')]
    found = json.loads(json.dumps(both.to_dict(), allow_nan=False))
    assert found['signature'] == both.signature and found['differences']['b/r.json']['CIDEr'].keys() == {'difference', 'low', 'high', 'p'}
    assert not score_files([a, b], tmp_path/'c.json', metrics=FAST, resamples=0).differences
    with pytest.raises(ValueError, match='is named twice'): score_files([a, a], tmp_path/'c.json')
    with pytest.raises(ValueError, match='name one file'): score_files([], tmp_path/'c.json')


def test_the_signature_tells_split_and_subset(put):
    path = put('d.json', karpathy())
    found = score_files(put('r.json', rows({3: SAID[3]})), path, 'test', FAST, resamples=0)
    assert '|split=test' in found.signature and 'subset' not in found.signature
    assert found.to_dict()['reports']['r.json']['references']['split'] == 'test'
    part = score_files(put('r.json', rows({3: SAID[3]})), path, metrics=FAST, subset=True, resamples=0)
    assert '|subset=1 of 3' in part.signature and 'subset of images (stamp)' in part.text()


def test_different_subsets_do_not_get_into_one_table(put):
    refs, a, b = put('c.json', coco()), put('a.json', rows({1: 'x', 2: 'y'})), put('b.json', rows({2: 'x', 3: 'y'}))
    with pytest.raises(ValueError, match='not mixed'): score_files([a, b], refs, metrics=FAST, subset=True, resamples=0)
    reports = {t: evaluate_captions(SAID, TRUTH, metrics=FAST, tokenizer=t, resamples=0) for t in ('ptb', 'whitespace')}
    with pytest.raises(ValueError, match='tok: ptb in ptb; whitespace in whitespace'): compare(reports)
    with pytest.raises(ValueError, match='tok'): Comparison(reports).signature


def test_the_guard_refuses_with_the_name_of_the_file(put):
    path = put('r.json', rows({i: f'<start> {c} <end>' for i, c in SAID.items()}))
    with pytest.raises(ProtocolError, match=r'^/.*r\.json: refused') as e: score_files(path, put('c.json', coco()), metrics=FAST)
    assert 'special tokens' in str(e.value) and e.value.findings
    blank = score_files(put('e.json', rows(SAID | {2: ''})), put('c.json', coco()), metrics=FAST, resamples=0)
    assert [f.rule for f in blank['e.json'].findings] == ['empty captions', 'unequal references']


def test_captions_of_train(put):
    path, results = put('d.json', karpathy()), put('r.json', rows({3: 'a dog runs on the grass'}))
    def share(train): return score_files(results, path, 'test', FAST, train=train, resamples=0)['r.json'].diversity.in_train
    assert share(path) == 1 and share('') is None and share(put('no_splits.json', {'x': ['another']})) == 0


def test_scores_of_the_original_come_out_of_files(put):
    for name, recorded in json.loads((DATA/'caption_scores_committable.json').read_text(encoding='utf-8')).items():
        hypotheses, references = recorded['hyps'], recorded['refs']
        found = score_files(put('r.json', hypotheses), put('c.json', references), metrics=FAST, resamples=0)
        for m, value in recorded['corpus'].items():
            if m in found['r.json'].scores.corpus: assert found['r.json'].scores.corpus[m] == pytest.approx(value, abs=1e-9), (name, m)


def test_neither_torch_nor_a_plotting_library_is_loaded(put):
    a, b, refs = put('a.json', rows(SAID)), put('b.json', rows(SAID)), put('c.json', coco())
    code = ('import sys; from caption_nb.evaluation import score_files\n'
            'print(score_files(sys.argv[1:3], sys.argv[3], metrics="bleu,rouge,cider,wer"))\n'
            'sys.exit(", ".join({"torch", "matplotlib", "pandas", "scipy", "transformers", "timm"} & sys.modules.keys()) or 0)')
    done = subprocess.run([sys.executable, '-c', code, a, b, refs], capture_output=True, text=True)
    assert done.returncode == 0 and 'CIDEr' in done.stdout, done.stderr
