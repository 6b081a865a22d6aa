"""Word error rate, ROUGE-L F1, mean sentence BLEU and cosine: equal to the tools they come from, each named by its rule."""
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb import similarity
from caption_nb.similarity import (RULES, Measured, SentenceModel, WordAverage, cosine, edit_distance, lcs_length, load_pretrained,
                                   rouge_l_f1, sentence_bleu_mean, wer, whole)
from caption_nb.vectors import save_vectors

words = st.lists(st.sampled_from(['a', 'dog', 'runs', 'running', 'été', '犬', "'s", 'flies']), max_size=9)
images = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=5)), min_size=1, max_size=4)


def split(captions): return [h for h, _ in captions], [rs for _, rs in captions]


def table(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1): new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


def common(a, b):
    row = [0]*(len(b) + 1)
    for x in a:
        new = [0]
        for j, y in enumerate(b, 1): new.append(row[j - 1] + 1 if x == y else max(row[j], new[-1]))
        row = new
    return row[-1]


# ---- word error rate --------------------------------------------------------------------------------------------

@settings(max_examples=500, deadline=None)
@given(words, words)
def test_edit_distance_is_the_tables(a, b): assert edit_distance(a, b) == table(a, b) == edit_distance(b, a)


def test_edit_distance_of_long_captions():
    rng = np.random.default_rng(0)
    for n, m in ((63, 64), (64, 64), (65, 200), (300, 130), (1, 400), (0, 90)):
        a, b = rng.integers(0, 20, n).tolist(), rng.integers(0, 20, m).tolist()
        assert edit_distance(a, b) == table(a, b)


@settings(max_examples=150, deadline=None)
@given(images)
def test_wer_by_its_definition(captions):
    hyps, refs = split(captions)
    pairs = [[(table(h, r), len(r)) for r in rs] for h, rs in captions]
    def rate(p): return p[0]/max(p[1], 1)
    near = [min(ps, key=lambda p: (rate(p), p[1])) for ps in pairs]
    got = wer(hyps, refs)
    assert got.name == 'WER(nearest)'
    np.testing.assert_allclose(got.per_image, list(map(rate, near)))
    assert got.corpus == pytest.approx(sum(e for e, _ in near)/max(sum(n for _, n in near), 1))
    assert wer(hyps, refs, average='images').corpus == pytest.approx(np.mean(list(map(rate, near))))
    first = [ps[0] for ps in pairs]
    assert wer(hyps, refs, 'first').corpus == pytest.approx(sum(e for e, _ in first)/max(sum(n for _, n in first), 1))
    np.testing.assert_allclose(wer(hyps, refs, 'mean').statistics, [np.mean(ps, axis=0) for ps in pairs])
    np.testing.assert_allclose(wer(hyps, refs, 'joined').statistics, [(table(h, sum(rs, [])), sum(map(len, rs))) for h, rs in captions])


@settings(max_examples=50, deadline=None)
@given(images)
def test_order_of_references_does_not_matter_to_nearest_and_mean(captions):
    hyps, refs = split(captions)
    back = [rs[::-1] for rs in refs]
    for rule in ('nearest', 'mean'):
        np.testing.assert_allclose(wer(hyps, refs, rule).statistics, wer(hyps, back, rule).statistics)
        np.testing.assert_allclose(rouge_l_f1(hyps, refs, rule).statistics, rouge_l_f1(hyps, back, rule).statistics)


def test_wer_is_jiwers():
    jiwer = pytest.importorskip('jiwer', reason='the original tool is not installed')
    rng = np.random.default_rng(0)
    hyps = [[f'w{i}' for i in rng.integers(0, 9, rng.integers(0, 12))] for _ in range(200)]
    refs = [[f'w{i}' for i in rng.integers(0, 9, rng.integers(0 if k % 10 == 0 else 1, 12))] for k in range(200)]
    texts = [' '.join(r) for r in refs], [' '.join(h) for h in hyps]
    assert wer(hyps, [[r] for r in refs], 'first').corpus == pytest.approx(jiwer.wer(*texts), abs=1e-12)
    each = wer(hyps, [[r] for r in refs], 'first').per_image
    for r, h, got in zip(*texts, each): assert got == pytest.approx(jiwer.wer(r, h), abs=1e-12)


def test_sums_over_any_images_make_their_score():
    hyps, refs = [['a'], ['a', 'dog'], []], [[['a', 'b']], [['dog']], [['x', 'y', 'z']]]
    whole_set, some = wer(hyps, refs), [0, 2, 2]
    assert Measured('', whole_set.statistics[some]).corpus == wer([hyps[i] for i in some], [refs[i] for i in some]).corpus


# ---- ROUGE-L F1 -------------------------------------------------------------------------------------------------

@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from('abcd'), max_size=90), st.lists(st.sampled_from('abcd'), max_size=90))
def test_lcs_length_is_the_tables(a, b): assert lcs_length(a, b) == common(a, b) == lcs_length(b, a)


@settings(max_examples=150, deadline=None)
@given(images)
def test_rouge_by_its_definition(captions):
    hyps, refs = split(captions)
    expected = []
    for h, rs in captions:
        each = []
        for r in rs:
            p, q = (common(h, r)/max(len(c), 1) for c in (h, r))
            each.append(2*p*q/(p + q) if p + q else 0)
        expected.append(each)
    np.testing.assert_allclose(rouge_l_f1(hyps, refs).per_image, [max(e) for e in expected])
    np.testing.assert_allclose(rouge_l_f1(hyps, refs, 'mean').per_image, [np.mean(e) for e in expected])


@pytest.mark.parametrize('stem', [False, True])
def test_rouge_is_rouge_scores(stem):
    scorer = pytest.importorskip('rouge_score.rouge_scorer', reason='the original tool is not installed').RougeScorer(['rougeL'], stem)
    rng = np.random.default_rng(1)
    known = 'a the dog dogs runs running ran happily happy flies fly generalization 12 beaches'.split()
    def caption(): return [known[i] for i in rng.integers(0, len(known), rng.integers(0, 11))]
    for _ in range(200):
        h, rs = caption(), [caption() for _ in range(3)]
        expected = scorer.score_multi([' '.join(r) for r in rs], ' '.join(h))['rougeL'].fmeasure
        assert rouge_l_f1([h], [rs], stem=stem).corpus == pytest.approx(expected, abs=1e-12)


def test_rouge_with_stems():
    pytest.importorskip('nltk')
    assert rouge_l_f1([['dogs', 'running']], [[['dog', 'runs']]]).corpus == 0
    score = rouge_l_f1([['dogs', 'running']], [[['dog', 'runs']]], stem=True)
    assert score.corpus == 1 and score.name == 'ROUGE-L-F1(nearest, Porter stems)'


def test_stems_without_nltk(monkeypatch):
    monkeypatch.setitem(sys.modules, 'nltk.stem.porter', None)
    with pytest.raises(ImportError, match=r"caption-nb\[tokenizers\]"): rouge_l_f1([['dogs']], [[['dog']]], stem=True)


# ---- mean sentence BLEU -----------------------------------------------------------------------------------------

@settings(max_examples=300, deadline=None)
@given(words, st.lists(words, min_size=1, max_size=5))
def test_sentence_bleu_is_nltks(h, rs):
    bleu = pytest.importorskip('nltk.translate.bleu_score')
    method4 = bleu.SmoothingFunction().method4
    expected = bleu.sentence_bleu(rs, h, smoothing_function=method4)
    assert sentence_bleu_mean([h], [rs]).corpus == pytest.approx(expected, abs=1e-12)
    assert sentence_bleu_mean([h], [rs], 'first').corpus == pytest.approx(bleu.sentence_bleu(rs[:1], h, smoothing_function=method4), abs=1e-12)


def test_sentence_bleu_says_that_it_is_not_bleu():
    score = sentence_bleu_mean([['a', 'dog'], ['cat']], [[['a', 'dog']], [['cat']]])
    assert score.name == 'mean sentence BLEU-4(NLTK method4, all references)'
    assert score.corpus == pytest.approx(score.per_image.mean())
    assert 'NLTK method4, first reference)' in sentence_bleu_mean([['a']], [[['a']]], 'first').name
    with pytest.raises(ValueError, match='all, first, joined'): sentence_bleu_mean([['a']], [[['a']]], 'nearest')


# ---- cosine -----------------------------------------------------------------------------------------------------

class Toy:
    "Rows that are known beforehand"
    name = 'toy'
    def __init__(self, table): self.table, self.asked = table, []
    def __call__(self, captions):
        self.asked += captions
        return np.array([self.table[' '.join(c)] for c in captions], float)


def test_cosine_by_its_definition():
    toy = Toy({'a': [1, 0], 'b': [0, 2], 'c': [3, 3], '': [0, 0], 'a b': [-1, 0], 'c a': [5, 0]})
    hyps, refs = [['a'], ['b'], []], [[['a'], ['b']], [['c'], ['a']], [['a']]]
    half = np.sqrt(.5)
    for rule, expected in (('nearest', [1, half, 0]), ('first', [1, half, 0]), ('mean', [.5, half/2, 0]), ('joined', [-1, 0, 0])):
        got = cosine(hyps, refs, toy, rule)
        assert got.name == f'cosine(toy, {rule})'
        np.testing.assert_allclose(got.per_image, expected, atol=1e-12)
        assert got.corpus == pytest.approx(np.mean(expected))


def test_an_embedding_without_a_name_goes_by_that_of_its_function_or_class():
    def letters(captions): return np.array([[len(c), 1] for c in captions])
    class Ones:
        def __call__(self, captions): return np.ones((len(captions), 2))
    assert cosine([['a']], [[['b']]], letters).name == 'cosine(letters, nearest)'
    assert cosine([['a']], [[['b']]], Ones()).name == 'cosine(Ones, nearest)'


def test_each_different_caption_is_embedded_once():
    toy = Toy({'a': [1, 0], 'b': [0, 2]})
    cosine([['a'], ['a'], ['b']], [[['a'], ['b']], [['b']], [['a']]], toy)
    assert sorted(toy.asked) == [('a',), ('b',)]


@settings(max_examples=50, deadline=None)
@given(images)
def test_cosine_against_a_plain_loop(captions):
    class Counts:
        name = 'counts'
        def __call__(self, captions): return np.array([[c.count(w) for w in ('a', 'dog', 'runs', 'running')] for c in captions])
    def cos(a, b):
        x, y = Counts()([a, b])
        return float(x @ y/np.sqrt(max(x @ x, 1)*max(y @ y, 1)))
    hyps, refs = split(captions)
    for rule, best in (('nearest', max), ('mean', np.mean)):
        np.testing.assert_allclose(cosine(hyps, refs, Counts(), rule).per_image, [best([cos(h, r) for r in rs]) for h, rs in captions], atol=1e-9)


def test_word_average(tmp_path):
    file = save_vectors(tmp_path/'glove.txt', ['a', 'dog', 'runs'], np.array([[1, 0], [0, 1], [1, 1.]]))
    embed = WordAverage(file, quiet=True)
    np.testing.assert_allclose(embed([('a', 'dog'), ('dog', 'qwertz'), (), ('qwertz',)]), [[.5, .5], [0, 1], [0, 0], [0, 0]])
    np.testing.assert_allclose(embed([('zzz',), ('runs',)]), [[0, 0], [1, 1]])          # words that come later
    np.testing.assert_allclose(embed([('zzz',)]), [[0, 0]])
    assert cosine([['a', 'dog']], [[['runs']]], embed).corpus == pytest.approx(1)
    assert cosine([['a']], [[['dog']]], embed).name == 'cosine(glove.txt, nearest)'
    with pytest.raises(FileNotFoundError, match='no word vectors at'): WordAverage(tmp_path/'none.txt', quiet=True)([('a',)])


# ---- sentence models --------------------------------------------------------------------------------------------

KNOWN = '[PAD] [UNK] [CLS] [SEP] [MASK] a dog runs on the beach . cat sits'.split()


@pytest.fixture(scope='module')
def bert(tmp_path_factory, one_thread):
    "A sentence model of a few thousand random weights, in a folder"
    transformers = pytest.importorskip('transformers')
    similarity.import_transformers()
    import torch
    folder = tmp_path_factory.mktemp('models')/'tiny-sentences'
    folder.mkdir()
    (folder/'vocab.txt').write_text('\n'.join(KNOWN))
    tokenizer = transformers.BertTokenizerFast(**tokenizer_vocabulary(folder), model_max_length=16)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(KNOWN), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=16)
    transformers.BertModel(config).eval().save_pretrained(folder)
    (folder/'1_Pooling').mkdir()
    (folder/'1_Pooling'/'config.json').write_text(json.dumps(dict(pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)))
    return folder


def tokenizer_vocabulary(folder):
    import transformers
    five = int(transformers.__version__.split('.')[0]) >= 5
    return dict(vocab={w: i for i, w in enumerate(KNOWN)}) if five else dict(vocab_file=str(folder/'vocab.txt'))


CAPTIONS = [tuple(c.split()) for c in ('a dog runs', 'the cat sits on the beach .', '', 'dog', 'a dog runs on the beach')]


def test_sentence_model_is_the_mean_over_words(bert):
    import torch
    import transformers
    got = SentenceModel(bert, device='cpu', quiet=True)(CAPTIONS)
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(bert), transformers.AutoModel.from_pretrained(bert).eval()
    for row, caption in zip(got, CAPTIONS):
        if not caption: assert not row.any(); continue
        with torch.no_grad(): out = model(**tokenizer(' '.join(caption), return_tensors='pt')).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, (out/out.norm()).numpy(), atol=1e-6)
    ids = tokenizer('a dog runs')['input_ids']
    assert [KNOWN[i] for i in ids] == ['[CLS]', 'a', 'dog', 'runs', '[SEP]']


def test_sentence_model_does_not_depend_on_batch_size(bert):
    one, all_ = (SentenceModel(bert, device='cpu', batch_size=n, quiet=True)(CAPTIONS) for n in (1, 64))
    np.testing.assert_allclose(one, all_, atol=1e-6)


def test_cosine_with_a_sentence_model(bert):
    embed = SentenceModel(str(bert), device='cpu', quiet=True)
    score = cosine([CAPTIONS[0], ()], [[CAPTIONS[3], CAPTIONS[0]], [CAPTIONS[0]]], embed)
    assert score.name == 'cosine(tiny-sentences, nearest)'
    np.testing.assert_allclose(score.per_image, [1, 0], atol=1e-6)
    long = ['dog']*100                                  # longer than the model's 16 positions: cut, not a crash
    assert embed([long]).shape == (1, 16)


def test_models_for_another_pooling_are_refused(bert, tmp_path):
    import shutil
    copy = shutil.copytree(bert, tmp_path/'cls')
    (copy/'1_Pooling'/'config.json').write_text(json.dumps(dict(pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)))
    with pytest.raises(ValueError, match='made for cls_token'): SentenceModel(copy, device='cpu')


def test_models_that_are_not_whole_are_refused(bert, tmp_path):
    import shutil
    from safetensors.torch import load_file, save_file
    copy = shutil.copytree(bert, tmp_path/'part')
    state = load_file(copy/'model.safetensors')
    name = next(k for k in state if 'word_embeddings' in k)
    del state[name]
    save_file(state, copy/'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match=r'part cannot be loaded \(1 weights are not in its files, .*word_embeddings'):
        SentenceModel(copy, device='cpu')
    (copy/'model.safetensors').write_bytes(b'cut off')
    with pytest.raises(ValueError, match='part cannot be loaded'): SentenceModel(copy, device='cpu')


def test_what_is_no_model_is_named(tmp_path):
    (tmp_path/'notes.txt').write_text('x')
    with pytest.raises(FileNotFoundError, match=r'holds no config.json \(but notes.txt\)'): load_pretrained(tmp_path, [])
    with pytest.raises(FileNotFoundError, match='is no folder of a model'): load_pretrained(tmp_path/'notes.txt', [])
    with pytest.raises(FileNotFoundError, match='is no folder of a model'): load_pretrained('models/of/mine', [])


def test_the_cache_comes_before_the_network():
    asked = []
    def load(source, local_files_only=False):
        asked.append(local_files_only)
        if local_files_only: raise OSError('not in the cache')
        return 'model'
    assert load_pretrained('some/model', [load]) == ['model'] and asked == [True, False]
    def fail(source, **options): raise OSError('We could not connect\nlong story')
    with pytest.raises(ValueError, match=r'some/model cannot be loaded \(We could not connect\). Without internet: .*pass its path'):
        load_pretrained('some/model', [fail])


def test_whole_ignores_only_what_is_not_used():
    class Model:
        def eval(self): return self
    def load(source, output_loading_info, **options): return Model(), {'missing_keys': ['pooler.dense.weight', 'embeddings.position_ids']}
    assert isinstance(whole(load, ('pooler',))('x'), Model)
    with pytest.raises(ValueError, match='pooler.dense.weight first'): whole(load)('x')


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ImportError, match=r"pip install 'caption-nb\[clip\]'"): SentenceModel('any')


# ---- bad input --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('measure', [wer, rouge_l_f1, sentence_bleu_mean, lambda h, r, **kw: cosine(h, r, Toy({}), **kw)])
def test_bad_captions_are_named(measure):
    with pytest.raises(ValueError, match='2 hypotheses, but references of 1 images'): measure([['a'], ['b']], [[['a']]])
    with pytest.raises(ValueError, match='image 1 .* has no references'): measure([['a'], ['b']], [[['a']], []])
    with pytest.raises(TypeError, match="image 0 .* not a string: 'a dog'"): measure(['a dog'], [[['a', 'dog']]])
    with pytest.raises(TypeError, match="image 0 .* not a string: 'a dog'"): measure([['a']], [['a dog']])
    with pytest.raises(TypeError, match='image 0'): measure([['a']], ['a dog'])
    with pytest.raises(ValueError, match='nothing to compare'): measure([], [])
    with pytest.raises(ValueError, match='is not known'): measure([['a']], [[['a']]], rule='nearst')


def test_unknown_average_is_named():
    with pytest.raises(ValueError, match="did you mean 'images'"): wer([['a']], [[['a']]], average='image')


def test_rules_are_in_the_names():
    for rule in RULES:
        assert rule in wer([['a']], [[['a']]], rule).name and rule in rouge_l_f1([['a']], [[['a']]], rule).name
    assert wer([['a']], [[['a']]], average='images').name == 'WER(nearest, mean of images)'
    assert str(wer([['a']], [[['b', 'c']]])) == 'WER(nearest) 1.0000 (1 images)'


def test_module_needs_neither_torch_nor_transformers():
    code = 'import sys, caption_nb.similarity; print([m for m in ("torch", "transformers", "nltk", "matplotlib") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
