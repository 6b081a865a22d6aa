"""Word vectors: every format to the same matrix, every kind of damage named, nothing kept that is not wanted."""
import builtins
import gzip
import json
import pickle
import struct
import sys
import tracemalloc
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb import vectors as module
from caption_nb.text import Vocab
from caption_nb.vectors import read_vectors, save_vectors

WORDS = ['the', 'dog', 'runs', "n't", 'naïve', '-lrb-', '3\xa01/2', '雪']
MATRIX = np.random.default_rng(0).normal(size=(len(WORDS), 5)).astype(np.float32)
VOCAB = Vocab([*Vocab.specials, *reversed(WORDS)]).words


def text(words=WORDS, matrix=MATRIX, header=False, end='\n') -> bytes:
    top = f'{len(words)} {matrix.shape[1]}\n' if header else ''
    return (top + ''.join(f'{w} {" ".join(repr(float(x)) for x in v)}{end}' for w, v in zip(words, matrix))).encode()


def binary(words=WORDS, matrix=MATRIX, between=b'\n') -> bytes:
    return b'%d %d\n' % matrix.shape + b''.join(w.encode() + b' ' + v.astype('<f4').tobytes() + between for w, v in zip(words, matrix))


def zipped(path, **members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items(): z.writestr(name.replace('_', '.'), content)
    return path


@pytest.fixture
def read(tmp_path):
    def read(content: bytes, words=VOCAB, name='v.txt', **kwargs):
        (tmp_path/name).write_bytes(content)
        return read_vectors(tmp_path/name, words, quiet=True, **kwargs)
    return read


# ---- formats ----------------------------------------------------------------------------------------------------

FORMATS = dict(
    glove=text(), tabs=text().replace(b' ', b'\t'), one_tabbed_line=text().replace(b'runs ', b'runs\t'), word2vec_text=text(header=True),
    ends_with_spaces=text(header=True, end=' \n'), windows=text(end='\r\n'),
    no_last_line_end=text()[:-1], blank_lines=text(end='\n\n'), binary=binary(), binary_without_breaks=binary(between=b''),
    glove_gz=gzip.compress(text()), binary_gz=gzip.compress(binary()))


@pytest.mark.parametrize('block', [200, 1 << 22])   # of any size in which the first vector fits
@pytest.mark.parametrize('name', FORMATS)
def test_every_format_gives_the_same(read, monkeypatch, name, block):
    monkeypatch.setattr(module, '_block', block)
    vectors = read(FORMATS[name], name='vectors')   # the name says nothing: the content does
    assert vectors.matrix.dtype == np.float32 and vectors.matrix.shape == (len(VOCAB), 5) and vectors.width == 5
    np.testing.assert_array_equal(vectors.matrix[4:], MATRIX[::-1])
    assert vectors.found.tolist() == [False]*4 + [True]*len(WORDS)


def test_zip(tmp_path):
    one = zipped(tmp_path/'one.zip', glove_txt=text(), readme_md=b'hello')
    np.testing.assert_array_equal(read_vectors(one, VOCAB, quiet=True).matrix[4:], MATRIX[::-1])
    two = zipped(tmp_path/'two.zip', a_txt=text(), b_bin=binary())
    with pytest.raises(ValueError, match=r'several files: say which, as .*two.zip:a.txt \(they are a.txt, b.bin\)'): read_vectors(two, VOCAB)
    np.testing.assert_array_equal(read_vectors(f'{two}:b.bin', VOCAB, quiet=True).matrix[4:], MATRIX[::-1])
    with pytest.raises(ValueError, match="holds no c.bin: did you mean 'b.bin'"): read_vectors(f'{two}:c.bin', VOCAB)
    with pytest.raises(ValueError, match='holds no .txt'): read_vectors(zipped(tmp_path/'none.zip', data_pkl=b'x'), VOCAB)


def test_gensim_reads_what_we_write_and_we_what_it_writes(tmp_path):
    keyed = pytest.importorskip('gensim.models').KeyedVectors
    words = [w for w in WORDS if '\xa0' not in w]
    matrix = MATRIX[:len(words)]
    ours = keyed.load_word2vec_format(save_vectors(tmp_path/'ours.txt', words, matrix), no_header=True)
    assert ours.index_to_key == words
    np.testing.assert_allclose(ours.vectors, matrix, rtol=1e-5)
    theirs = keyed(5)
    theirs.add_vectors(words, matrix)
    for name, is_binary in (('v.bin', True), ('v.bin.gz', True), ('v.txt', False)):
        theirs.save_word2vec_format(tmp_path/name, binary=is_binary)
        np.testing.assert_allclose(read_vectors(tmp_path/name, words, quiet=True).matrix, matrix, rtol=1e-6)
    theirs.save(str(tmp_path/'v.kv'))
    with pytest.raises(ValueError, match='pickles.*save_word2vec_format'): read_vectors(tmp_path/'v.kv', words)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 60), st.integers(300, 700), st.booleans(), st.randoms(use_true_random=False))
def test_any_size_in_any_blocks(tmp_path_factory, width, n, block, is_binary, random):
    words = [f'w{i}' for i in range(n)]
    matrix = np.random.default_rng(random.getrandbits(32)).normal(size=(n, width)).astype(np.float32)
    matrix[:, 0] = 1   # a zero byte in each vector: what tells binary from text is certain only for files of some size
    wanted = random.sample(words, random.randint(1, n))
    path = tmp_path_factory.mktemp('v')/'v'
    path.write_bytes(binary(words, matrix) if is_binary else text(words, matrix))
    before, module._block = module._block, block
    try: got = read_vectors(path, wanted, quiet=True)
    finally: module._block = before
    np.testing.assert_array_equal(got.matrix, matrix[[int(w[1:]) for w in wanted]])


def test_nothing_is_kept_that_is_not_wanted(tmp_path):
    row = np.ones(300, '<f4').tobytes()
    with open(tmp_path/'big.bin', 'wb') as f:
        f.write(b'60000 300\n')
        for i in range(60_000): f.write(b'w%d ' % i + row)
    tracemalloc.start()
    vectors = read_vectors(tmp_path/'big.bin', ['w1', 'w59999'], quiet=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert vectors.found.all() and peak < 6*module._block < (tmp_path/'big.bin').stat().st_size/2


# ---- spelling ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('turn', [1, -1])
def test_exact_spelling_wins_wherever_it_stands(read, turn):
    words = ['tv', 'TV', 'Tv', 'Paris', 'UK', 'dog'][::turn]
    matrix = np.arange(12, dtype=np.float32).reshape(6, 2)
    row = dict(zip(words, matrix.tolist()))
    got = read(text(words, matrix), ['tv', 'paris', 'uk', 'Dog', 'PARIS'])
    assert got.matrix[:4].tolist() == [row['tv'], row['Paris'], row['UK'], row['dog']]
    assert got.found.tolist() == [True, True, True, True, True]


def test_the_first_of_two_equal_words_counts(read):
    assert read(text(['dog', 'dog'], MATRIX[:2]), ['dog']).matrix.tolist() == MATRIX[:1].tolist()


def test_words_with_spaces_are_passed_over(read):
    "As in glove.840B.300d.txt"
    lines = text(['the', '. . .', 'at name@domain.com', 'at', '.'], MATRIX[:5])
    got = read(lines, ['.', 'at', 'the'])
    np.testing.assert_array_equal(got.matrix, MATRIX[[4, 3, 0]])


def test_special_tokens(read):
    words = ['<pad>', '<start>', '<end>', *WORDS]
    matrix = np.concatenate([MATRIX[:3] + 100, MATRIX])
    got = read(text(words, matrix))
    assert not got.found[:4].any() and got.matrix[0].tolist() == [0]*5
    np.testing.assert_allclose(got.matrix[3], MATRIX.mean(0), rtol=1e-4)
    assert np.abs(got.matrix[1:3]).max() < 50 and got.matrix[1].tolist() != got.matrix[2].tolist()
    got = read(text([*WORDS, '<unk>'], np.concatenate([MATRIX, MATRIX[:1] + 7])))
    assert got.found[3] and not got.found[:3].any()
    np.testing.assert_array_equal(got.matrix[3], MATRIX[0] + 7)


# ---- what the file lacks ----------------------------------------------------------------------------------------

def test_missing_rows_look_like_found_ones(read):
    rng = np.random.default_rng(3)
    n, width = 400, 40
    matrix = (rng.normal(size=(n, width))*np.linspace(0.1, 2, width) + np.linspace(-1, 1, width)).astype(np.float32)
    words = [f'w{i}' for i in range(n)]
    got = read(text(words, matrix), [*words, *(f'm{i}' for i in range(n))])
    found, drawn = got.matrix[:n], got.matrix[n:]
    np.testing.assert_allclose(drawn.mean(0), found.mean(0), atol=0.4)
    np.testing.assert_allclose(drawn.std(0), found.std(0), rtol=0.2)
    assert abs(np.square(drawn).sum(1).mean()/np.square(found).sum(1).mean() - 1) < 0.05
    assert len({r.tobytes() for r in drawn}) == n


def test_seed(read):
    words = [*VOCAB, 'cat', 'mouse']
    a, b, c = (read(text(), words, seed=s).matrix for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a[-2:] != c[-2:]).all() and (a[4:-2] == c[4:-2]).all()


def test_one_found_word_is_enough(read):
    got = read(text(['dog'], MATRIX[:1]), ['dog', 'cat', 'mouse'])
    assert np.isfinite(got.matrix).all() and (got.matrix[1] != got.matrix[2]).all()


def test_coverage(read):
    words = [*Vocab.specials, 'the', 'dog', 'cat', 'mouse']
    plain = read(text(), words).coverage
    assert (plain.words, plain.found, plain.tokens, plain.missing) == (4, 2, 0, ['cat', 'mouse'])
    assert str(plain) == 'words 2 of 4 (50.0%); missing: cat, mouse'
    counted = read(text(), words, counts={'the': 6, 'dog': 2, 'mouse': 2, 'rare': 9}).coverage
    assert (counted.tokens, counted.tokens_found, counted.missing) == (10, 8, ['mouse', 'cat'])
    assert 'running words 8 of 10 (80.0%)' in str(counted)
    many = read(text(), [*words, *(f'm{i}' for i in range(50))]).coverage
    assert '… (52 in all)' in str(many)
    assert 'v.txt' in str(read(text(), words))


def test_similar(read):
    matrix = np.array([[1, 0], [.9, .1], [0, 1], [-1, 0]], np.float32)
    got = read(text(['a', 'b', 'c', 'd'], matrix), ['a', 'b', 'c', 'd', 'made-up'])
    assert [w for w, _ in got.similar('a', 10)] == ['b', 'c', 'd'] and got.similar('a')[2][1] == pytest.approx(-1)
    with pytest.raises(ValueError, match='did you mean'): got.similar('made-ip')


# ---- damage -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('line, problem', [
    ("dog 1 2 3 4", r"line 3 \('dog'\): 4 numbers where 5 should be"), ("cat 1 2 3 4", r"line 3 \('cat'\): 4 numbers where 5 should be"),
    ("dog 1 2 3 4 5 6", "6 numbers where 5 should be"), ("cat 1 2 3 4 5 6", "6 numbers where 5 should be"),
    ("dog 1 2 3 4 x", r"line 3 \('dog'\): 'x' is not a number"), ("dog 1 2 nan 4 5", r"line 3 \('dog'\): number 3 is nan"),
    ("dog 1 2 3 inf 5", "number 4 is inf"), ("dog 1 2 3 1e99 5", "number 4 is inf"), ("dog", r"line 3 \('dog'\): 0 numbers"),
    (" 1 2 3 4", "3 numbers where 5 should be")])
@pytest.mark.parametrize('header', [False, True])
def test_broken_line(read, line, problem, header):
    lines = text(header=header).decode().split('\n')
    lines[2] = line
    if 'line 3' not in problem: problem = r'v.txt, line 3 .*' + problem
    with pytest.raises(ValueError, match=problem): read('\n'.join(lines).encode())


def test_another_width_than_announced(read):
    with pytest.raises(ValueError, match=r"line 2 \('the'\): 5 numbers where 6 should be"): read(text(header=True).replace(b'8 5\n', b'8 6\n'))


def test_cut_off(read):
    with pytest.raises(ValueError, match='announces 8 vectors and ends after 7'): read(b'\n'.join(text(header=True).split(b'\n')[:-2]))
    with pytest.raises(ValueError, match='line 8'): read(text()[:-30])
    with pytest.raises(ValueError, match='announces 8 vectors and ends after 7: was the download cut off'): read(binary()[:-4])
    for whole in (text(), binary()):
        with pytest.raises(ValueError, match='cannot be unpacked.*cut off'): read(gzip.compress(whole)[:-12])
    damaged = bytearray(gzip.compress(text()*50))
    damaged[200:230] = bytes(30)
    with pytest.raises(ValueError, match='cannot be unpacked'): read(bytes(damaged))


def test_cut_off_zip(tmp_path, read):
    whole = zipped(tmp_path/'v.zip', v_txt=text()).read_bytes()
    with pytest.raises(ValueError, match='cannot be unpacked'): read(whole[:-30])


def test_damaged_binary(read):
    bad = MATRIX.copy()
    bad[1, 3] = np.nan
    with pytest.raises(ValueError, match=r"vector 2 of 8 \('dog'\): number 4 is nan"): read(binary(matrix=bad))
    with pytest.raises(ValueError, match='vector 1 of 8: no word where one should start'): read(b'8 5\n' + bytes(100_000))
    assert read(binary(matrix=bad), ['the', 'runs']).found.all()   # nobody asked for the dog


@pytest.mark.parametrize('content', [b'', b'\n\n', gzip.compress(b'', mtime=0)])
def test_empty(read, content):
    with pytest.raises(ValueError, match='v.txt is empty'): read(content)


@pytest.mark.parametrize('content', [pickle.dumps({'dog': [1.0]}), b'\x89HDF\r\n\x1a\n' + bytes(50),
                                     struct.pack('<i', 793712314) + bytes(50)], ids=['pickle', 'hdf5', 'fasttext'])
def test_other_formats_are_refused(read, content):
    with pytest.raises(ValueError, match='neither text nor word2vec binary'): read(content)


def test_no_pickle_is_ever_run(read, tmp_path):
    class Evil:
        def __reduce__(self): return builtins.open, (str(tmp_path/'owned'), 'w')
    with pytest.raises(ValueError, match='pickles'): read(pickle.dumps(Evil()), name='vectors.kv')
    assert not (tmp_path/'owned').exists()


@pytest.mark.parametrize('content, problem', [(b'just\nwords\n', "line 1: expected a word and its numbers, got 'just'"),
                                              (b'0 5\n', 'announces 0 vectors'), (b'5 0\n', '5 vectors of 0 numbers'), (b'5 999999999\n', '999999999 numbers'),
                                              (b'A photo of a dog\nAnother photo of it\n', "'dog' is not|'photo' is not"),
                                              (b'{"dog": [1, 2]}\n', 'is not a number')])
def test_other_texts(read, content, problem):
    with pytest.raises(ValueError, match=problem): read(content)


@pytest.mark.parametrize('make', [text, binary])
def test_no_overlap(read, make):
    with pytest.raises(ValueError, match="none of the 7 words.*other capitals.*'the', 'dog', 'runs', \"n't\", 'naïve'.*'chien', 'chat', 'loup'"):
        read(make(), [*Vocab.specials, 'chien', 'chat', 'loup'])
    with pytest.raises(ValueError, match='with none$'): read(make(), list(Vocab.specials))


def test_missing_file(tmp_path):
    (tmp_path/'glove.6B.50d.txt').write_bytes(text())
    with pytest.raises(FileNotFoundError, match="did you mean 'glove.6B.50d.txt'"): read_vectors(tmp_path/'glove.6b.50d.txt', VOCAB)
    with pytest.raises(FileNotFoundError, match="'gensim:NAME'"): read_vectors(tmp_path/'nowhere'/'v.txt', VOCAB)
    with pytest.raises(FileNotFoundError): read_vectors(tmp_path/'no.zip:v.txt', VOCAB)
    with pytest.raises(ValueError, match='is a folder'): read_vectors(tmp_path, VOCAB)


def test_save_vectors(tmp_path):
    with pytest.raises(ValueError, match='2 words, but 1 vectors'): save_vectors(tmp_path/'v', ['a', 'b'], MATRIX[:1])
    for bad in ('', 'hot dog', 'a\n'):
        with pytest.raises(ValueError, match='white space'): save_vectors(tmp_path/'v', [bad], MATRIX[:1])


def test_progress(read, tmp_path, capsys):
    (tmp_path/'v.txt').write_bytes(text())
    read_vectors(tmp_path/'v.txt', VOCAB)
    assert 'reading v.txt' in capsys.readouterr().err
    read(text())
    assert capsys.readouterr() == ('', '')


# ---- gensim's downloads -----------------------------------------------------------------------------------------

@pytest.fixture
def downloader(tmp_path, monkeypatch):
    "gensim's downloader with a folder of its own and no internet"
    real = pytest.importorskip('gensim.downloader')
    monkeypatch.setattr(real, 'BASE_DIR', str(tmp_path/'gensim-data'))
    def urlopen(*args, **kwargs): raise OSError('no route to host')
    monkeypatch.setattr(real, 'urlopen', urlopen)
    monkeypatch.setattr(real.urllib, 'urlretrieve', urlopen)
    return real


def test_a_downloaded_set_needs_no_internet(downloader, tmp_path):
    folder = tmp_path/'gensim-data'/'toy-5'
    folder.mkdir(parents=True)
    (folder/'__init__.py').write_text('raise SystemExit("code that came with a download was run")')
    (folder/'toy-5.gz').write_bytes(gzip.compress(binary()))
    got = read_vectors('gensim:toy-5', VOCAB, quiet=True)
    np.testing.assert_array_equal(got.matrix[4:], MATRIX[::-1])
    assert got.source == 'gensim:toy-5' and 'toy-5' not in sys.modules


def test_without_internet(downloader, tmp_path, capfd):
    with pytest.raises(ConnectionError, match=r'could not download .toy-5.*fetch toy-5.gz.*pass its path, or put it at .*toy-5.toy-5.gz'):
        read_vectors('gensim:toy-5', VOCAB)
    listing = dict(corpora={'text8': {}}, models={'toy-5': dict(file_name='toy-5.gz', file_size=2e6, parts=1, checksum='x')})
    (tmp_path/'gensim-data'/'information.json').write_text(json.dumps(listing))   # gensim's own copy of the list
    with pytest.raises(ConnectionError, match='no route to host'): read_vectors('gensim:toy-5', VOCAB)
    with pytest.raises(ValueError, match="no word vectors 'toy-50': did you mean 'toy-5'"): read_vectors('gensim:toy-50', VOCAB)
    with pytest.raises(ValueError, match="no word vectors 'text8'"): read_vectors('gensim:text8', VOCAB)
    out, err = capfd.readouterr()
    assert 'Traceback' not in err and out == '' and 'downloading toy-5 (2 MB)' in err


def test_a_download(downloader, tmp_path, monkeypatch, capsys):
    def load(name, return_path=False):
        assert return_path, 'gensim would import the code that came with the download'
        print('[====    ] 50%')
        (tmp_path/'got.gz').write_bytes(gzip.compress(text()))
        return str(tmp_path/'got.gz')
    monkeypatch.setattr(downloader, 'info', lambda: dict(models={'toy-5': dict(file_size=2e6)}))
    monkeypatch.setattr(downloader, 'load', load)
    np.testing.assert_array_equal(read_vectors('gensim:toy-5', VOCAB, quiet=True).matrix[4:], MATRIX[::-1])
    assert capsys.readouterr() == ('', '')


def test_without_gensim(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gensim', None)
    with pytest.raises(ImportError, match=r"pip install 'caption-nb\[vectors\]'"): read_vectors('gensim:glove-wiki-gigaword-200', VOCAB)


def test_a_decoder_takes_them_at_any_width(read):
    torch = pytest.importorskip('torch')
    from caption_nb.decoder import WordEmbedding
    vectors = read(text())
    for width in (5, 8):
        embedding = WordEmbedding(len(VOCAB), width, vector_dim=vectors.width)
        embedding.load(torch.from_numpy(vectors.matrix), frozen=True)
        assert embedding(torch.arange(len(VOCAB))).shape == (len(VOCAB), width)
        np.testing.assert_array_equal(embedding.vectors.weight.numpy(), vectors.matrix)


def test_imports_no_torch():
    import subprocess
    code = "import sys, caption_nb.vectors; assert not {'torch', 'gensim'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)
