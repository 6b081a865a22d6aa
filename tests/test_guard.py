"The protocol guard: every rule finds its fault, and honest captions and runs are left alone"
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb.data import CaptionData, load_data
from caption_nb.guard import RULES, Finding, ProtocolError, check_captions, check_run, enforce, looks, record_look
from caption_nb.scenes import make_scenes
from caption_nb.text import Vocab, tokenize

REFS = {f'{i}.jpg': [f'A dog number {i} runs .', f'A dog number {i} runs .', f'The Poodle leaps over {i} logs .', f'Dogs, {i} of them']
        for i in range(25)}
HYPS = {i: 'a dog jumps over a log' for i in REFS}


def rules(findings): return [f.rule for f in findings]


def changed(captions, images=3, data=REFS):
    "`data` with `captions` of each image applied to the first `images`"
    return {i: captions(rs) if n < images else rs for n, (i, rs) in enumerate(data.items())}


def test_honest_captions_pass():
    assert check_captions(HYPS, REFS) == check_captions(HYPS, REFS, REFS) == []


def end(texts): return [f'{t} <end>' for t in texts]


CAPTIONS = {   # rule → captions, references, captions of the data (None: not at hand)
    'missing images': ({i: HYPS[i] for i in list(HYPS)[2:]}, REFS, None),
    'unknown images': (HYPS | {'x.jpg': 'a cat'}, REFS, None),
    'several captions': (HYPS | {'0.jpg': ['a dog', 'a cat']}, REFS, None),
    'special tokens': (dict(zip(HYPS, end(HYPS.values()))), REFS, None),
    'unknown words': (HYPS | {'0.jpg': 'a <unk> jumps'}, REFS, None),
    'empty captions': (HYPS | {'0.jpg': ''}, REFS, None),
    'no references': (HYPS, REFS | {'0.jpg': []}, None),
    'references through unk': (HYPS, changed(lambda rs: [*rs[:2], 'the <unk> leaps over logs', rs[3]]), REFS),
    'references left out': (HYPS, changed(lambda rs: rs[:3]), REFS),
    'duplicates removed': (HYPS, changed(lambda rs: rs[1:]), REFS),
    'references changed': (HYPS, changed(lambda rs: [*rs[:2], 'The leaps over logs', rs[3]]), REFS),
    'references tokenised': (HYPS, changed(lambda rs: [' '.join(tokenize(r)) for r in rs]), REFS),
    'unequal references': (HYPS, changed(lambda rs: rs[1:]), None),
    'one reference': (HYPS, changed(lambda rs: rs[:1], 25), None),
    'references as captions': ({i: rs[3] for i, rs in REFS.items()}, REFS, REFS),
}


@pytest.mark.parametrize('rule', CAPTIONS)
def test_each_fault_of_captions_is_found_alone(rule):
    found = check_captions(*CAPTIONS[rule])
    assert rules(found) == [rule] and found[0].level == RULES[rule].level
    if RULES[rule].level == 'stamp': assert enforce(found) == found
    else:
        with pytest.raises(ProtocolError, match=rule) as e: enforce(found)
        assert e.value.findings == found


@pytest.mark.parametrize('mark', ['<start>', '<END>', '<eos>', '<sos>', '<bos>', '<pad>', '</s>', '<s>', 'startseq', 'endseq', '<end_seq>',
                                  '[SEP]', '[PAD]', '<|endoftext|>', '<start_of_text>', '<CLS>'])
def test_marks_by_many_names(mark):
    one = check_captions(HYPS | {'3.jpg': f'a dog {mark}'}, REFS)
    assert rules(one) == ['special tokens'] and "'3.jpg'" in one[0].what and mark in one[0].what and '1 of 25' in one[0].what
    both = check_captions(HYPS, {i: [f'{mark} {r}' for r in rs] for i, rs in REFS.items()})
    assert rules(both) == ['special tokens'] and '100 of 100 references' in both[0].what


def test_marks_without_their_brackets():
    assert rules(check_captions({i: f'{h} eos' for i, h in HYPS.items()}, REFS)) == ['special tokens']
    assert rules(check_captions({i: f'start {h} end .' for i, h in HYPS.items()}, REFS)) == ['special tokens']
    assert check_captions(HYPS | {'1.jpg': 'a race from start to end'}, REFS) == []


def test_what_people_wrote_may_hold_anything():
    many = {f'{n}.jpg': [f'a dog {n}', f'the dog {n}', 'a cat', 'cats'] for n in range(500)}
    for texts, found in ((['an unk', 'the [END]'], []), (['an unk']*3, ['references through unk']), (['a dog <end>']*3, ['special tokens'])):
        assert rules(check_captions(dict.fromkeys(many, 'a dog'), many | {'0.jpg': [*texts, 'a', 'b'][:4]})) == found
    odd = REFS | {'0.jpg': ['a sign that says <end>', 'unk', 'A', 'B']}
    assert check_captions(HYPS, odd, odd) == []
    assert rules(check_captions(HYPS, odd)) == ['special tokens', 'references through unk']


def test_ids_of_another_type_are_named():
    found = check_captions({int(i[:-4]): h for i, h in HYPS.items()}, REFS)
    assert rules(found) == ['missing images', 'unknown images'] and 'ids are int there, str here' in found[0].what
    assert '25 of 25' in found[0].what and "'0.jpg', '1.jpg', '2.jpg' and 22 more" in found[0].what


def test_a_subset_is_stamped_if_it_was_asked_for():
    few = {i: HYPS[i] for i in list(HYPS)[:10]}
    refs = {i: REFS[i] for i in few}
    assert check_captions(few, refs) == []              # without the data nobody can know
    assert rules(check_captions(few, refs, REFS)) == ['missing images']
    assert rules(enforce(check_captions(few, refs, REFS, subset=True))) == ['subset of images']
    assert rules(check_captions({}, {}, REFS, subset=True)) == ['missing images']   # nothing is no subset


def test_lists_of_one_are_captions_and_lists_of_none_are_missing():
    assert check_captions({i: [h] for i, h in HYPS.items()}, REFS, REFS) == []
    assert rules(check_captions(HYPS | {'1.jpg': []}, REFS, REFS)) == ['missing images']


@pytest.mark.parametrize('hypotheses, references, message', [
    (HYPS | {'1.jpg': None}, REFS, "hypotheses: expected text for '1.jpg', got None"),
    (HYPS | {'1.jpg': [3]}, REFS, "hypotheses: expected text for '1.jpg', got 3"),
    (HYPS, REFS | {'2.jpg': 'a dog'}, "references: expected text for '2.jpg', got 'a dog'"),
    (HYPS, REFS | {'2.jpg': [None]}, "references: expected text for '2.jpg', got None")])
def test_what_is_no_text_is_named(hypotheses, references, message):
    with pytest.raises(TypeError, match=message.replace('.', r'\.')): check_captions(hypotheses, references)


def test_how_a_reference_was_changed_is_told():
    def what(new): return check_captions(HYPS, REFS | {'0.jpg': [*REFS['0.jpg'][:3], new]}, REFS)[0].what
    assert "cut off: 'Dogs, 0 of them'" in what('Dogs, 0 of')
    assert "words left out of 'Dogs, 0 of them'" in what('Dogs of them')
    assert "nearest caption: 'Dogs, 0 of them'" in what('cats and 0 of them')


def test_another_cut_of_words_is_told():
    refs = {'a': ["The dog's ball", 'x y'], 'b': ['A b', 'c d']}
    hyps = {'a': 'dog', 'b': 'dog'}
    same = check_captions(hyps, {'a': ["the dog 's ball", 'x y'], 'b': ['a b', 'c d']}, refs)
    assert rules(same) == ['references tokenised'] and 'their words are the same' in same[0].what and '2 of 4' in same[0].what
    other = check_captions(hyps, {'a': ['the dogs ball', 'x y'], 'b': ['a b', 'c d']}, refs)
    assert "1 of them have other words for it, first 'the dogs ball'" in other[0].what


def test_several_faults_are_all_refused_at_once():
    with pytest.raises(ProtocolError) as e:
        enforce(check_captions(dict(zip(list(HYPS)[1:], end(HYPS.values()))), changed(lambda rs: rs[:2]), REFS))
    assert rules(e.value.findings) == ['missing images', 'special tokens', 'references left out']
    assert str(e.value).count('\n- ') == 3 and isinstance(e.value, ValueError)


words = st.lists(st.sampled_from('a dog The Poodle leaps over logs , . 12 ½ (two) can\'t'.split()), min_size=1, max_size=8).map(' '.join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(words, min_size=1, max_size=5), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_captions_of_the_data_are_never_refused(captions, rnd):
    "In any order, and cut into words: at most a stamp; one taken away is always refused"
    raw = {n: cs for n, cs in enumerate(captions)}
    hyps = {n: 'a cat sits' for n in raw}
    refs = {n: rnd.sample(cs, len(cs)) for n, cs in raw.items()}
    assert check_captions(hyps, refs, raw) == []
    cut = {n: [' '.join(tokenize(c)) for c in cs] for n, cs in refs.items()}
    assert set(rules(check_captions(hyps, cut, raw))) <= {'references tokenised'}
    for given in (refs, cut):
        n = rnd.choice(list(raw))
        lost = rules(check_captions(hyps, given | {n: given[n][1:]}, raw))
        assert set(lost) & {'references left out', 'duplicates removed', 'no references'}


# Runs

@pytest.fixture(scope='module')
def scenes(tmp_path_factory) -> CaptionData: return make_scenes(tmp_path_factory.mktemp('scenes'), 60, quiet=True)


CONFIG = dict(data='scenes', layout='auto', split_seed=0, num_images=60, min_freq=10, monitor='CIDEr', patience=0, from_run='')


def lines(data, scores=(.2, .5, .4), best=1, of=None, **more) -> list[dict]:
    "metrics.jsonl of a run of an epoch for each of `scores`, of which `best` (from 0) was the last that was kept"
    n = len(data.splits['dev'])
    return [dict(step=5, epoch=.5, loss=3.)] + [
        dict(step=10*e, of=of or 10*len(scores), epoch=e, dev=dict(CIDEr=s, Bleu_4=1 - s), dev_loss=1 - s, best=e == 1 or e - 1 == best,
             signature=f'caption_nb 0.1.0|BLEU,CIDErD|tok=ptb|refs=5|df=these {n} images|eos=no') | more for e, s in enumerate(scores, 1)]


def write(folder: Path, data: CaptionData, rows=None, results=None, config=CONFIG, trained=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in (lines(data) if rows is None else rows)))
    if results is not None: (folder/'results.json').write_text(json.dumps(results))
    (folder/'environment.json').write_text(json.dumps(dict(fingerprints=dict(data=trained or data.fingerprint))))
    (folder/'config.json').write_text(json.dumps(config))
    return folder


def found(run, data, split='test', vocab=None, config=CONFIG):
    return check_run(run, data, split, vocab or Vocab.build(data.train_captions(), config['min_freq']), config)


def test_an_honest_run_passes(scenes, tmp_path):
    run = write(tmp_path, scenes, results=dict(dev=dict(looks=7), reward='CIDErD|df=48 training images|eos=yes', best_epoch=1))
    assert len(scenes.splits['train']) == 48
    assert found(run, scenes, 'dev') == found(run, scenes, 'test') == found(run, scenes, 'train') == []


def test_a_folder_without_a_record_passes_as_far_as_it_goes(scenes, tmp_path):
    assert found(tmp_path, scenes) == []


def test_images_seen_before(scenes, tmp_path):
    s = scenes.splits
    run = write(tmp_path, scenes)
    def of(**splits):
        data = replace(scenes, splits=s | splits)
        return enforced(found(write(run, data), data))
    def enforced(findings):
        with pytest.raises(ProtocolError) as e: enforce(findings)
        return e.value.findings
    train, = of(test=[*s['test'], *s['train'][:2]])
    assert train.rule == 'train images'
    assert train.what.startswith(f'2 of the {len(s["test"]) + 2} images of test are in train too: {s["train"][0]!r}')
    dev, = of(test=s['dev'])
    assert dev.rule == 'dev images' and f'{len(s["dev"])} of the' in dev.what
    data = replace(scenes, splits=s | dict(test=s['dev']))
    assert found(write(run, data), data, 'dev') == []   # dev is what it is


def test_a_photo_under_two_names(scenes, tmp_path):
    for split, where in (('test', 'train'), ('test', 'dev'), ('dev', 'train')):
        twin, other = scenes.splits[split][0], scenes.splits[where][3]
        data = replace(scenes, captions=scenes.captions | {twin: [c.lower() for c in reversed(scenes.captions[other])]})
        f, = found(write(tmp_path, data), data, split)
        assert f.rule == 'same captions' and f'{twin} = {other}' in f.what


def test_vocabulary_of_all_captions(scenes, tmp_path):
    run, everything = write(tmp_path, scenes), [c for cs in scenes.captions.values() for c in cs]
    f, = found(run, scenes, vocab=Vocab.build(everything, 10))
    assert f.rule == 'vocabulary from test' and f.level == 'stamp' and 'times in train' in f.what
    alien = Vocab([*Vocab.specials, 'zebra'])          # a word that no caption has: of pretrained vectors perhaps
    assert found(run, scenes, vocab=alien) == []
    data = replace(scenes, captions=scenes.captions | {scenes.splits['test'][0]: ['A zebra']})
    f, = found(write(run, data), data, vocab=alien)
    assert '1 word of 1 ' in f.what and '0 in dev, 1 in test' in f.what and 'zebra (0 times in train, 1 in all)' in f.what


def test_vocabulary_with_another_tokenizer_or_fewer_words(scenes, tmp_path):
    run = write(tmp_path, scenes)
    assert found(run, scenes, vocab=Vocab.build(scenes.train_captions(), 10, tokenizer='whitespace')) == []
    assert found(run, scenes, vocab=Vocab.build(scenes.train_captions(), 10, top_k=8)) == []


def test_document_frequencies(scenes, tmp_path):
    run = write(tmp_path, scenes, results=dict(reward='caption_nb 0.1.0|CIDErD+0.5*BLEU4|tok=ptb|refs=5|df=60 training images|eos=yes'))
    f, = found(run, scenes)
    assert f.rule == 'document frequencies' and '60 images, train has 48' in f.what


def test_selection(scenes, tmp_path):
    def of(rows, **config): return found(write(tmp_path, scenes, rows), scenes, config=CONFIG | config)
    f, = of(lines(scenes, best=2))
    assert f.rule == 'selection not on dev' and 'are of epoch 3, by CIDEr on dev of 2' in f.what
    assert of(lines(scenes), monitor='loss') == [] == of(lines(scenes, best=0), monitor='Bleu_4')
    assert rules(of(lines(scenes, best=2), monitor='loss')) == ['selection not on dev']
    f, = of(lines(scenes, test=dict(CIDEr=.3)))
    assert 'training scored test 3 times' in f.what and 'step 10' in f.what
    assert rules(of(lines(scenes, signature='caption_nb|split=test'))) == ['selection not on dev']
    f, = of(lines(scenes, signature='caption_nb|df=these 1,200 images'))
    assert '1200 images, dev has 6' in f.what.replace(',200', '200')
    assert of(lines(scenes, scores=(.5, .5), best=0)) == []     # the first of equals


def test_looks_at_test(scenes, tmp_path):
    results = {}
    assert looks(results) == 0
    for n in (1, 2):
        assert len(found(write(tmp_path, scenes, results=results), scenes)) == n - 1
        results['test'] = dict(scores={}) | record_look(results, 'test', 30)
        assert looks(results) == n
    assert results['test']['first_look'] == 30
    assert looks(dict(test=dict(scores={}))) == 1        # written before looks were counted
    run = write(tmp_path, scenes, results=results)
    f, = found(run, scenes)
    assert f.rule == 'test looked at again' and 'evaluation 3 of test' in f.what
    assert found(run, scenes, 'dev') == []


def test_test_before_the_end(scenes, tmp_path):
    def of(rows, first=None, **config):
        results = {} if first is None else dict(test=dict(looks=1, first_look=first))
        return [f for f in found(write(tmp_path, scenes, rows, results), scenes, config=CONFIG | config) if f.rule != 'test looked at again']
    f, = of(lines(scenes, of=50))
    assert f.rule == 'test before the end' and 'step 30 of 50' in f.what
    assert of(lines(scenes, (.2, .5, .4, .3), of=90), patience=2) == []      # stopped early
    assert rules(of(lines(scenes, (.2, .5, .4), of=90), patience=2)) == ['test before the end']
    f, = of(lines(scenes), first=10)
    assert 'first evaluated at step 10, training went on to step 30' in f.what
    assert of(lines(scenes), first=30) == []


def test_other_data_than_trained_with(scenes, tmp_path):
    other = make_scenes(tmp_path/'other', 60, seed=1, quiet=True)
    f, = found(write(tmp_path/'run', scenes), other)
    assert f.rule == 'other data' and scenes.fingerprint[:8] in f.what and other.fingerprint[:8] in f.what


def test_part_of_a_data_set_is_stamped(scenes, tmp_path):
    f, = found(write(tmp_path, scenes), scenes, config=CONFIG | dict(data='flickr8k'))
    assert f.rule == 'subset of images' and 'num_images=60: test is 6 images of more' in f.what


def test_weights_of_another_run(scenes, tmp_path):
    def of(start, **config):
        return found(write(tmp_path/'runs'/'last', scenes), scenes, config=CONFIG | dict(from_run=str(start)) | config)
    same = write(tmp_path/'runs'/'first', scenes)
    assert of(same) == [] == of('gone/elsewhere/first')                      # moved together with its follower
    f, = of(tmp_path/'nowhere')
    assert f.rule == 'other start' and 'is not there' in f.what
    f, = of(write(tmp_path/'b', scenes, config=CONFIG | dict(split_seed=3), trained='f'*64))
    assert f.rule == 'other start' and 'split_seed=3 there, 0 here' in f.what
    middle = write(tmp_path/'c', scenes, config=CONFIG | dict(from_run=str(tmp_path/'b')))
    assert rules(of(middle)) == ['other start']                              # a run before the run before
    circle = write(tmp_path/'d', scenes, config=CONFIG | dict(from_run=str(tmp_path/'d')))
    assert of(circle) == []


def test_broken_record_is_named(scenes, tmp_path):
    write(tmp_path, scenes)
    (tmp_path/'results.json').write_text('{"dev": ')
    with pytest.raises(ValueError, match=r'results\.json is not valid JSON'): found(tmp_path, scenes)


def test_every_rule_is_tested():
    "By name, in this file"
    text = Path(__file__).read_text(encoding='utf-8')
    assert [r for r in RULES if f"'{r}'" not in text] == []
    assert {r.level for r in RULES.values()} == {'refuse', 'stamp'}


def test_findings_speak():
    f = Finding('one reference', 'stamp', 'each of the 3 images has a single reference', 'Score against all')
    assert str(f) == 'one reference (stamp): each of the 3 images has a single reference. Score against all'
    assert enforce([]) == [] and enforce(iter([f])) == [f]


def test_starts_fast():
    "`caption-nb score` must not wait for torch"
    code = 'import sys, caption_nb.guard; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


# The real thing

def test_flickr8k_and_its_abuse(flickr8k):
    data = load_data(flickr8k)
    raw, train, rnd = data.references('dev'), data.train_captions(), random.Random(0)
    hyps = {i: ' '.join(tokenize(rnd.choice(train))) for i in raw}
    assert check_captions(hyps, raw, raw) == check_captions(hyps, raw) == []
    known = set(Vocab.build(train).words)
    def refused(way): return rules(f for f in check_captions(hyps, {i: way(rs) for i, rs in raw.items()}, raw) if f.level == 'refuse')
    assert refused(lambda rs: [' '.join(w if w in known else '<unk>' for w in tokenize(r)) for r in rs]) == ['references through unk']
    assert refused(lambda rs: [' '.join(w for w in tokenize(r) if w in known) for r in rs]) == ['references changed']
    assert refused(lambda rs: list({tuple(tokenize(r)): r for r in rs}.values())) == ['duplicates removed']   # of one image of dev
    assert refused(lambda rs: rs[:1])[0] == 'references left out'
    cut = {i: [' '.join(tokenize(r)) for r in rs] for i, rs in raw.items()}
    f, = check_captions(hyps, cut, raw)
    assert f.rule == 'references tokenised' and 'their words are the same' in f.what


def test_flickr8k_run(flickr8k, tmp_path):
    data = load_data(flickr8k)
    config = CONFIG | dict(data=str(flickr8k), num_images=0, min_freq=5)
    run = write(tmp_path, data, config=config)
    assert found(run, data, 'dev', config=config) == []
    f, = found(run, data, 'dev', Vocab.build([c for cs in data.captions.values() for c in cs]), config)
    assert f.rule == 'vocabulary from test'


def test_a_trained_run(tmp_path, one_thread):
    "What the trainer writes is what the guard reads"
    from caption_nb.config import Config
    from caption_nb.runs import note_fingerprints
    from caption_nb.training import Trainer
    config = Config.from_dict(dict(encoder='scene_cnn', num_images=40, image_size=96, min_freq=1, embed_dim=32, hidden_dim=32, attention_dim=16,
                                   images_per_batch=8, captions_per_image=2, epochs=2, max_len=15, beam=1, precision='fp32', threads=1,
                                   device='cpu', cache_dir=str(tmp_path/'cache')))
    trainer = Trainer(config, tmp_path/'run', quiet=True)
    trainer.fit()
    note_fingerprints(trainer.run, trainer)
    captions = trainer.evaluate('dev').captions
    args = trainer.run, trainer.data, 'dev', trainer.vocab, config.to_dict()
    raw = trainer.data.references('dev')
    assert check_run(*args) == check_captions(captions, raw, raw) == []
    assert check_run(trainer.run, trainer.data, 'test', *args[3:]) == []
    forced, again = trainer.teacher_forced('dev'), trainer.teacher_forced('dev')
    assert forced == again and forced.words == sum(len(trainer.vocab.encode(c)) - 1 for cs in raw.values() for c in cs)
