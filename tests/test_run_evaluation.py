"""Evaluating a run: the notebook and its record, what the guard stamps and refuses, models of others, other runs, what cannot be evaluated"""
import csv
import json
import shutil
import statistics
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from caption_nb.config import Config
from caption_nb.guard import ProtocolError
from caption_nb.leaderboard import leaderboards
from caption_nb.run_evaluation import captions_of, evaluate_best, evaluate_run, judge, note_report, trained_run
from caption_nb.runs import score_lines
from caption_nb.similarity import Measured
from caption_nb.text import Vocab
from caption_nb.training import Trainer
from tiny_runs import texts, tiny_run

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> list[Path]:
    "Two seeds of one tiny configuration, with results on dev"
    folder = tmp_path_factory.mktemp('trained')
    return [tiny_run(folder, seed, size) for seed, size in ((0, 16), (1, 16))]


def unfinished(folder: Path, name: str, status: str) -> Path:
    "A run folder without checkpoints"
    run = folder/name
    run.mkdir()
    (run/'config.json').write_text(Config(name=name).to_json())
    last = dict(status=status, attempt=1, seconds=60., signal=None, error=None, host='n1', pid=1)
    (run/'status.json').write_text(json.dumps(dict(last, attempts=[last])))
    return run


def training_state(run: Path) -> dict:
    "All files that training goes on from"
    kept = [run/'config.json', run/'metrics.jsonl', *(p for p in (run/'checkpoints').rglob('*') if p.is_file())]
    return {p.relative_to(run): p.read_bytes() for p in kept}


def test_evaluate(trained, tmp_path):
    run, other = tmp_path/'runs'/'copy', trained[1]
    shutil.copytree(trained[0], run)
    state, before = training_state(run), json.loads((run/'results.json').read_text())
    Trainer(Config.load(other/'config.json'), other, quiet=True).evaluate('test', 2)
    truth = evaluate_run(run, 'test', 3, dict(device='cpu', resamples=100, samples=2, against=str(other), clip=''))
    assert truth['status'] == 'done', truth['error']
    out = run/'evaluate-test'
    assert truth['out'] == out and (out/'run.ipynb').exists() and training_state(run) == state
    results = json.loads((run/'results.json').read_text())
    found = results.pop('test')
    assert found['beam'] == 3 and results == before, 'what training cost, and dev, stay as they were'
    assert set(found['intervals']) >= {'Bleu_4', 'ROUGE_L', 'CIDEr', 'WER(nearest)'} and 'SPICE' in found['skipped']
    assert all(low <= found['scores'][m] <= high for m, (low, high) in found['intervals'].items() if m != 'Bleu_4')
    assert found['teacher_forced']['words'] > 0 and 0 < found['diversity']['self_cider'] <= 1
    assert '|split=test|beam=3|' in found['signature'] and found['looks'] == 1
    assert {f['rule'] for f in found['findings']} <= {'empty captions'}   # the tiny model may have nothing to say
    ids = {row['image_id'] for row in json.loads((run/'captions_test.json').read_text())}
    rows = list(csv.DictReader(open(run/'scores_test.csv')))
    assert {r['id'] for r in rows} == ids and len(ids) == 4
    assert statistics.fmean(float(r['CIDEr']) for r in rows) == pytest.approx(found['scores']['CIDEr'])
    for name in ('lengths', 'word_use', 'vocabulary', 'captions_best', 'objects', 'gaps', 'attention_1'): assert (out/'figures'/f'{name}.png').is_file()
    page, shown = (out/'errors.html').read_text(), texts(out/'run.ipynb')
    assert all(i in page for i in ids) and other.name in page and 'CHAIR' in page
    for text in ('it is for the end', 'refs=5', 'pointing', 'perplexity', 'difference [95 % interval]', 'self-CIDEr', 'word for word in the train'): assert text in shown
    summary = (run/'summary.md').read_text()
    assert '| test, 95 % |' in summary and 'SPICE skipped' in summary
    assert [b.groups[0].n for b in leaderboards([run], 'test')] == [1]


def test_a_second_look_at_test_is_stamped_on_the_record(trained, tmp_path):
    run = tmp_path/'copy'
    shutil.copytree(trained[0], run)
    for n in (1, 2): found = evaluate_best(run, 'test', quiet=True)[1]
    entry = json.loads((run/'results.json').read_text())['test']
    assert 'test looked at again' in [f.rule for f in found.findings] and entry['looks'] == 2
    assert 'this is evaluation 2 of test in this run' in [f['what'] for f in entry['findings']]
    assert '**test, test looked at again**' in '\n'.join(score_lines(dict(test=entry)))


def test_the_guard_refuses_captions_with_special_tokens(trained, tmp_path, monkeypatch):
    run = tmp_path/'copy'
    shutil.copytree(trained[0], run)
    before = (run/'results.json').read_bytes()
    decode = Vocab.decode
    monkeypatch.setattr(Vocab, 'decode', lambda self, ids: decode(self, ids) + ' <end>')
    with pytest.raises(ProtocolError, match='<end>'): evaluate_best(run, 'dev', quiet=True)
    assert (run/'results.json').read_bytes() == before


def test_models_of_others_join_the_report(trained, tmp_path, monkeypatch):
    "SPICE and CLIPScore played by stand-ins: their programs and weights are tested where they are defined"
    monkeypatch.setattr('caption_nb.pretrained_metrics.spice', lambda h, r, folder, quiet: (Measured('SPICE', np.array([(0.25, 1.)]*len(h))), []))
    class Clip:
        def __init__(self, model, device, quiet): assert model == 'some-model'
        def __call__(self, captions, images, references):
            one = Measured('CLIPScore(some-model@1)', np.array([(0.5, 1.)]*len(captions)))
            return types.SimpleNamespace(clip=one, ref_clip=replace(one, name='RefCLIPScore(some-model@1)'))
    monkeypatch.setattr('caption_nb.pretrained_metrics.ClipScore', Clip)
    vectors = tmp_path/'vectors.txt'
    vectors.write_text(''.join(f'{w} {i} 1 2\n' for i, w in enumerate('a the red blue square circle'.split())))
    run = tmp_path/'copy'
    shutil.copytree(trained[0], run)
    trainer, found = evaluate_best(run, 'dev', quiet=True)
    report = judge(trainer, found, resamples=10, clip='some-model', vectors=str(vectors), quiet=True)
    names = ['SPICE', 'CLIPScore(some-model@1)', 'RefCLIPScore(some-model@1)', 'cosine(vectors.txt, nearest)']
    assert list(report.scores.corpus)[-4:] == names and report.scores.corpus['SPICE'] == 0.25 and not {'SPICE', 'CLIPScore'} & set(report.skipped)
    note_report(run, 'dev', report)
    assert json.loads((run/'results.json').read_text())['dev']['intervals']['SPICE'] == [0.25, 0.25]


def test_captions_of_another_run_that_are_not_there(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match='captions_test.json does not exist: caption-nb evaluate .* --split test writes it'):
        captions_of(unfinished(tmp_path, 'fresh', 'done'), 'test')
    truth = evaluate_run(shutil.copytree(trained[0], tmp_path/'copy'), 'dev', 0, dict(against=str(tmp_path/'fresh')))
    assert truth['status'] == 'error' and 'captions_dev.json does not exist' in truth['error']['message']


def test_what_cannot_be_had_is_told_before_any_work(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path/'run')
    before = (run/'results.json').read_bytes()
    for options, said in ((dict(metrics='blue'), "did you mean 'bleu'"), (dict(samples=1), 'samples=1: 2 or more'), (dict(resamples=-1), 'resamples=-1')):
        with pytest.raises(ValueError, match=said): evaluate_run(run, options=options)
    assert not (run/'evaluate-dev').exists() and (run/'results.json').read_bytes() == before


def test_cider_is_always_among_the_metrics_and_captions_of_other_photos_are_no_other_run(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path/'run')
    truth = evaluate_run(run, options=dict(metrics='bleu', resamples=0, against=str(trained[1])))
    scores = json.loads((run/'results.json').read_text())['dev']['scores']
    assert truth['status'] == 'done' and list(scores) == ['Bleu_1', 'Bleu_2', 'Bleu_3', 'Bleu_4', 'CIDEr'] and (truth['out']/'errors.html').is_file()
    (tmp_path/'other.json').write_text('{"another.png": "a circle"}')
    with pytest.raises(ValueError, match=r'other.json: captions of other photos: of 2 photos here and 1 there, 3 are not on both sides: '):
        captions_of(tmp_path/'other.json', 'dev', ['00001.png', '00002.png'])


def test_evaluating_again_is_the_trainers_own_evaluation(trained, tmp_path):
    run = tmp_path/'copy'
    shutil.copytree(trained[1], run)
    before, captions = (run/'results.json').read_bytes(), (run/'captions_dev.json').read_bytes()
    trainer, found = evaluate_best(run, quiet=True)
    assert (run/'results.json').read_bytes() == before and (run/'captions_dev.json').read_bytes() == captions and found.beam == 2
    with pytest.raises(ValueError, match='lr belongs to the run'): evaluate_best(run, lr='1')
    state = training_state(run)
    with pytest.raises(Exception, match="'nowhere'"): evaluate_best(run, 'nowhere', quiet=True, device='cpu')
    assert training_state(run) == state


def test_what_cannot_be_evaluated(trained, tmp_path):
    going = unfinished(tmp_path, 'going', 'running')
    with pytest.raises(ValueError, match='going is still training .attempt 1 on n1.: wait'): evaluate_run(going)
    fresh = unfinished(tmp_path, 'fresh', 'done')
    with pytest.raises(FileNotFoundError, match="no checkpoint 'best'"): trained_run(fresh)
    with pytest.raises(FileNotFoundError, match='no run'): evaluate_run(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='a name such as dev'): evaluate_run(trained[0], '../../x')
    with pytest.raises(ValueError, match='beam=-1'): evaluate_run(trained[0], beam=-1)
    half = tmp_path/'half'
    shutil.copytree(trained[0], half)
    shutil.rmtree(half/'checkpoints'/'last')
    for other in half.glob('checkpoints/last*'): shutil.rmtree(other)
    with pytest.raises(FileNotFoundError, match="no checkpoint 'last'.*evaluate where it was trained"): evaluate_run(half)
    assert not list(tmp_path.rglob('evaluate-*')), 'nothing was made'
