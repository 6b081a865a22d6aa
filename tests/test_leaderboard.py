"""The leaderboard: groups over seeds, refusals, what is left out and why; and the notebook that compares, on real runs"""
import json
import math
import shutil
import time
from pathlib import Path

import pytest

from caption_nb.config import Config
from caption_nb.leaderboard import (Leaderboard, compare, comparison_folder, group_rows, leaderboards, protocol, protocol_differences,
                                    read_row, read_rows, write_leaderboards)
from caption_nb.runs import execute, experiment
from tiny_runs import texts, tiny_run

pytestmark = pytest.mark.usefixtures('one_thread')

SIGNATURE = 'caption_nb 0.1.0|BLEU,ROUGE_L,CIDErD|tok=ptb|refs=5|df=these 100 images|eos=no'


def invent(folder: Path, name: str, cider=0.5, seed=0, *, split='dev', beam=5, images=100, signature=SIGNATURE, status='done', data='d4' * 32,
           error=None, reason=None, hours=0.5, cuda=None, epochs=4, base=None, **fields) -> Path:
    "A run folder with these numbers in it, as training leaves it"
    run = folder/name
    run.mkdir(parents=True)
    fields |= dict(from_run=str(base)) if base else {}
    (run/'config.json').write_text(json.dumps(Config.from_dict(dict(name=name, seed=seed, epochs=epochs, **fields)).to_dict()))
    (run/'environment.json').write_text(json.dumps(dict(git=dict(diff='}{"fingerprints": {}'*10), fingerprints=dict(data=data) if data else {}), indent=1))
    last = dict(status=status, attempt=1, seconds=60., signal=None, error=error, host='n1', pid=1) | (dict(reason=reason) if reason else {})
    (run/'status.json').write_text(json.dumps(dict(last, attempts=[last])))
    if cider is not None:
        scores = dict(Bleu_4=0.4*cider, CIDEr=cider)
        results = {split: dict(scores=scores, signature=signature, beam=beam, images=images, words=9.5)}
        cost = dict(device_hours=hours, devices=1, peak_cuda_MB=cuda)
        (run/'results.json').write_text(json.dumps(results | dict(best_epoch=3 + seed, seconds=50., cost=cost)))
    rows = [dict(step=10*e, epoch=e, seconds=600.*e, eval_seconds=60., dev=dict(CIDEr=0.1*e), best=True) for e in range(1, epochs + 1)]
    (run/'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in [dict(step=5, loss=3.), *rows]))
    return run


# Groups

def test_seeds_make_a_group_and_nothing_else_does(tmp_path):
    same = [invent(tmp_path, f'a{s}', c, s, device=d, cache_dir=f'/c{s}')
            for s, c, d in ((0, 0.50, 'cpu'), (1, 0.53, 'auto'), (2, 0.56, 'cpu'))]
    other = invent(tmp_path, 'b', 0.9, lr=2e-3)
    board = Leaderboard(read_rows([*same, other])[0])
    assert [(g.n, g.mean('CIDEr')) for g in board.groups] == [(1, 0.9), (3, pytest.approx(0.53))]
    assert board.parameters == ['lr'] and board.groups[1].sd('CIDEr') == pytest.approx(0.03) and math.isnan(board.groups[0].sd('CIDEr'))
    assert '0.5300 ± 0.0300' in board.text() and '±' not in next(line for line in board.text().splitlines() if '0.9000' in line)
    table = board.table()
    assert list(table.index) == [1, 2] and list(table['seeds']) == [1, 3] and table.loc[2, 'CIDEr sd'] == pytest.approx(0.03)
    assert table.loc[1, 'command'] == 'caption-nb train --epochs 4 --lr 0.002 --name b'
    assert table.loc[2, 'best_epoch'] == 4 and '3–5' in board.text()


def test_a_field_that_an_old_run_does_not_have_is_at_its_default(tmp_path):
    run = invent(tmp_path, 'old')
    config = json.loads((run/'config.json').read_text())
    for name in ('ranks', 'from_run', 'length_penalty', 'scst_end'): del config[name]
    (run/'config.json').write_text(json.dumps(config))
    assert Leaderboard(read_rows([run, invent(tmp_path, 'new', seed=1)])[0]).groups[0].n == 2


def test_the_same_seed_again_is_no_second_observation(tmp_path):
    runs = [invent(tmp_path, f'2026-0{i}', 0.5 + i/100) for i in (1, 2)]
    board = Leaderboard(read_rows(runs)[0])
    assert [g.n for g in board.groups] == [1] and board.groups[0].mean('CIDEr') == 0.52
    assert board.apart == [(runs[0], 'the same settings and seed as 2026-02, which is later and counts')]


def test_a_run_given_twice_counts_once(tmp_path):
    run = invent(tmp_path, 'a')
    (tmp_path/'link').symlink_to(run)
    rows, apart = read_rows([run, str(run), tmp_path/'link', tmp_path/'.'/'a'])
    assert len(rows) == 1 and not apart


def test_what_a_run_started_from_is_a_setting(tmp_path):
    "Two bases that differ make two groups; seeds of one base make one"
    a, b, again = invent(tmp_path, 'base-a', lr=1e-3), invent(tmp_path, 'base-b', lr=2e-3), invent(tmp_path, 'base-a1', seed=1, lr=1e-3)
    after = [invent(tmp_path, f'scst-{base.name}', 0.6, base=base, stage='scst') for base in (a, b, again)]
    groups = sorted(group_rows(read_rows(after)[0])[0], key=lambda g: g.n)
    assert [[r.name for r in g.rows] for g in groups] == [['scst-base-b'], ['scst-base-a', 'scst-base-a1']]
    shutil.rmtree(b)
    assert read_row(after[1]).origin == ['base-b']
    assert 'from_run' in Leaderboard(read_rows(after)[0]).parameters
    moved = shutil.move(tmp_path, tmp_path.with_name(f'{tmp_path.name}-moved'))   # runs brought home: the bases are beside them
    assert read_row(Path(moved)/'scst-base-a').origin[0]['lr'] == 1e-3


def test_the_device_of_the_hours(tmp_path):
    gpu, cpu = invent(tmp_path, 'gpu', cuda=900.), invent(tmp_path, 'cpu', lr=1e-3, hours=123.4)
    unknown = invent(tmp_path, 'unknown', lr=3e-3)
    results = json.loads((unknown/'results.json').read_text())
    del results['cost']
    (unknown/'results.json').write_text(json.dumps(results))
    text = Leaderboard(read_rows([gpu, cpu, unknown])[0]).text()
    assert 'device-hours' in text and '0.5 GPU' in text and '123 CPU' in text and 'nan' not in text
    assert 'GPU-hours' in Leaderboard(read_rows([gpu])[0]).text()


def test_sorting_by_another_score(tmp_path):
    runs = [invent(tmp_path, 'a', 0.5), invent(tmp_path, 'b', 0.4, lr=1e-3)]
    results = json.loads((runs[1]/'results.json').read_text())
    results['dev']['scores']['Bleu_4'] = 0.9
    (runs[1]/'results.json').write_text(json.dumps(results))
    assert [b.groups[0].rows[0].name for m in ('CIDEr', 'Bleu_4') for b in leaderboards(runs, metric=m)] == ['a', 'b']
    with pytest.raises(ValueError, match="no score 'Bleu4': did you mean 'Bleu_4'"): leaderboards(runs, metric='Bleu4')


# Differences

def test_only_groups_with_two_seeds_are_compared(tmp_path):
    runs = [invent(tmp_path, f'{lr}-{s}', lr*100 + s/50, s, lr=lr) for lr in (1e-3, 2e-3, 3e-3) for s in range(3 if lr < 3e-3 else 1)]
    board = leaderboards(runs)[0]
    pairs = board.differences()
    assert list(pairs.index) == ['2. lr 0.002 − 3. lr 0.001'] and pairs['difference'].item() == pytest.approx(0.1)
    assert pairs['from'].item() < 0.1 < pairs['to'].item()
    assert '*' not in board.difference_table()
    assert leaderboards(runs[:3])[0].differences().empty


# Protocols

OTHER = dict(beam=dict(beam=3), images=dict(images=99), tokenizer=dict(signature=SIGNATURE.replace('ptb', 'nltk')),
             references=dict(signature=SIGNATURE.replace('refs=5', 'refs=1-5')), scorer=dict(signature=SIGNATURE.replace('0.1.0', '0.9.0')),
             metrics=dict(signature=SIGNATURE.replace('CIDErD', 'CIDErD2')), data=dict(data='e5'*32), length_norm=dict(length_norm=0.7),
             max_len=dict(max_len=25), min_len=dict(min_len=3), no_repeat=dict(no_repeat=2), ban_unk=dict(ban_unk=False),
             length_penalty=dict(length_penalty='gnmt'), bad_endings=dict(bad_endings='a,the'))


def test_scores_that_only_some_runs_have_are_left_out_and_named(tmp_path):
    runs = [invent(tmp_path, f'r{i}', 0.5 + i/10, i) for i in range(3)]
    results = json.loads((runs[2]/'results.json').read_text())
    results['dev'] |= dict(scores=results['dev']['scores'] | dict(METEOR=0.2), signature=SIGNATURE.replace('BLEU,', 'BLEU,METEOR1.5,'))
    (runs[2]/'results.json').write_text(json.dumps(results))
    board = leaderboards(runs)[0]
    assert board.groups[0].n == 3 and board.metrics == ['Bleu_4', 'CIDEr'] and 'METEOR is not shown: r0, r1 have none' in board.text()
    with pytest.raises(ValueError, match='no METEOR in r0, r1: evaluate again'): leaderboards(runs, metric='METEOR')


@pytest.mark.parametrize('name', OTHER)
def test_each_difference_is_refused_by_name(tmp_path, name):
    runs = [invent(tmp_path, 'one'), invent(tmp_path, 'two', seed=1), invent(tmp_path, 'odd', seed=2, **OTHER[name])]
    with pytest.raises(ValueError, match='3 runs cannot be ranked') as e: leaderboards(runs)
    line = next(line for line in str(e.value).splitlines() if line.startswith(f'{name}: '))
    assert 'in one, two' in line and line.endswith('in odd') and '--by-protocol' in str(e.value)
    again = name in ('beam', 'scorer', 'tokenizer', 'metrics')
    assert (f'caption-nb evaluate {runs[2]} --split dev --beam 5' in str(e.value)) == again
    assert f'caption-nb evaluate {runs[0]}' not in str(e.value)
    boards = leaderboards(runs, by_protocol=True)
    assert [sum(g.n for g in b.groups) for b in boards] == [2, 1]
    assert protocol(runs[0]) == protocol(runs[1]) != protocol(runs[2])


def test_data_without_a_fingerprint_are_known_by_name(tmp_path):
    runs = [invent(tmp_path, f'a{i}', seed=i, data='', **more) for i, more in enumerate(({}, dict(num_images=50), dict(split_seed=1)))]
    differences = protocol_differences(read_rows(runs)[0])
    assert 'num_images: 0 in a0, a2; 50 in a1' in differences and 'split_seed: ' in differences
    (runs[1]/'environment.json').unlink()
    assert protocol(runs[1])['num_images'] == 50
    same = [invent(tmp_path, f'b{i}', seed=i, data='f6'*32, num_images=n) for i, n in enumerate((0, 100))]   # the same content, however asked for
    assert protocol_differences(read_rows(same)[0]) == ''


def test_many_runs_are_not_all_named(tmp_path):
    rows = read_rows([invent(tmp_path, f'r{i:02}', seed=i, beam=5 - i % 2) for i in range(40)])[0]
    text = protocol_differences(rows)
    assert 'r00, r02, r04 and 17 more' in text and '… and 15 more' in text and len(text.splitlines()) < 12


# What does not count

def test_what_does_not_count_is_listed_with_its_reason(tmp_path):
    fine = invent(tmp_path, 'fine')
    runs = dict(failed=invent(tmp_path, 'failed', None, status='error', error=dict(type='ValueError', message='no photos | in\nhere')),
                stopped=invent(tmp_path, 'stopped', 0.9, status='interrupted', reason='time limit'),
                going=invent(tmp_path, 'going', None, status='running'),
                testless=invent(tmp_path, 'testless', split='val'), torn=invent(tmp_path, 'torn'), odd=invent(tmp_path, 'odd'),
                listed=invent(tmp_path, 'listed'), inf=invent(tmp_path, 'inf', math.inf), nothing=tmp_path/'nothing', empty=tmp_path/'empty')
    runs['empty'].mkdir()
    (runs['torn']/'results.json').write_text('{"dev": ')
    (runs['odd']/'results.json').write_text('{"dev": {"scores": 7}}')
    (runs['listed']/'config.json').write_text('[1, 2]')
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    rows, apart = read_rows([fine, *runs.values()])
    why = {path.name: reason for path, reason in apart}
    assert [r.name for r in rows] == ['fine'] and why.keys() == runs.keys()
    assert why['failed'] == 'error: ValueError: no photos | in here' and why['stopped'].startswith('interrupted (time limit); it has scores')
    assert why['going'] == 'running' and why['testless'].startswith('no scores of dev (it has val): caption-nb evaluate')
    assert 'results.json is not valid JSON' in why['torn'] and why['odd'].startswith('damaged') and 'config.json should hold' in why['listed']
    assert 'Bleu_4 is inf' in why['inf'] and why['nothing'] == why['empty'] == 'not a run folder: it has no config.json'
    board = Leaderboard(rows, apart=apart)
    page = board.markdown(tmp_path)
    assert all(f'- `{name}`: ' in page for name in runs) and r'no photos \| in here' in page
    assert before == {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}, 'comparing changes nothing'


def test_nothing_to_rank(tmp_path):
    with pytest.raises(ValueError, match='no runs to compare: name run folders'): leaderboards([])
    going = invent(tmp_path, 'going', None, status='running')
    with pytest.raises(ValueError, match='no run can be compared\n  going: running'): leaderboards([going], by_protocol=True)
    with pytest.raises(ValueError, match='no scores of test .it has dev.'): leaderboards([invent(tmp_path, 'a')], 'test')


# Output

def test_names_and_values_stay_in_their_cells(tmp_path):
    runs = [invent(tmp_path, f'run {i}', lr=10**-i, word_vectors=v) for i, v in enumerate(('a|b $x$', 'c\n# d', '<b>'), 2)]
    board = leaderboards(runs)[0]
    assert board.parameters == ['word_vectors', 'lr']
    (tmp_path/'out').mkdir()
    files = write_leaderboards([board], tmp_path/'out')
    lines = files[0].read_text().splitlines()
    table = [line for line in lines if line.startswith('| ')]
    assert len(table) == 4 and len({line.replace(r'\|', '').count('|') for line in table}) == 1
    assert '](../run%202/run.ipynb)' in files[0].read_text() and (tmp_path/'out'/'../run 2').is_dir()
    import pandas
    assert list(pandas.read_csv(files[1])['word_vectors']) == list(board.table()['word_vectors'])
    assert files[2].read_bytes()[:4] == b'\x89PNG'


def test_of_many_parameters_the_unusual_are_shown(tmp_path):
    runs = [invent(tmp_path, f'r{i}', 0.5 + i/100, lr=lr, clip_norm=c, dropout=d, epochs=e, min_freq=f, label_smoothing=s, images_per_batch=b)
            for i, (lr, c, d, e, f, s, b) in enumerate([(1e-3, 1., .1, 4, 5, 0., 32)]*1 + [(1e-3, 1., .1, 4, 5, 0., 16)] + [(2e-3, 2., .2, 5, 6, .1, 32)])]
    board = leaderboards(runs)[0]
    assert len(board.parameters) == 7 and set(board.parameters) < set(board.table().columns)
    assert 'settings' in board.text() and 'the usual' in board.text() and 'The usual: min_freq 5' in board.text()
    assert board.label(board.groups[1]) == '2. images_per_batch 16'


def test_curves_can_be_told_apart_in_grey(tmp_path):
    runs = [invent(tmp_path, f'r{i}-{s}', 0.5 - i/100, s, lr=1e-3*(i + 1)) for i in range(14) for s in range(2)]
    (runs[0]/'metrics.jsonl').write_text('{"step": 5, "epoch": 1, "dev": {"CIDEr": 0.2}}\n{"step": 9, "dev": {"CI')   # cut off by a kill
    (runs[1]/'metrics.jsonl').unlink()
    fig = leaderboards(runs)[0].curves()
    left, right = fig.axes
    looks = {(line.get_linestyle(), line.get_marker()) for line in left.lines if line.get_color() != '0.75'}
    assert len(looks) == 12 and len(left.lines) == len(right.lines) == 28
    assert len(fig.legends[0].get_texts()) == 13 and fig.legends[0].get_texts()[-1].get_text() == '2 more'
    hours = next(line for line in right.lines if len(line.get_xdata()) == 4).get_xdata()
    assert hours == pytest.approx([(600*e + 60*e)/3600 for e in range(1, 5)])


def test_three_hundred_runs(tmp_path):
    for i in range(100):
        for s in range(3): invent(tmp_path, f'r{i:03}-{s}', 0.5 + i/1000 + s/100, s, lr=1e-5*(i + 1))
    start = time.process_time()   # not of the clock on the wall: the machine may be busy
    board, = leaderboards(sorted(tmp_path.iterdir()))
    text, page, table = board.text(), board.markdown(tmp_path), board.table()
    assert time.process_time() - start < 5
    assert len(board.groups) == len(table) == 100 and '… and 70 more' in text and page.count('run.ipynb') == 600
    assert board.groups[0].settings['lr'] == pytest.approx(1e-3)


# The notebooks, on real runs

@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> list[Path]:
    "Two seeds of one configuration and one of another, tiny, with results on dev"
    folder = tmp_path_factory.mktemp('trained')
    return [tiny_run(folder, seed, size) for seed, size in ((0, 16), (1, 16), (0, 24))]


def test_compare(trained):
    runs = [*trained, invent(trained[0].parent, 'broken', None, status='error')]
    truth = compare(runs)
    assert truth['status'] == 'done', truth['error']
    out = truth['out']
    assert out.parent == trained[0].parent and out.name.startswith('compare-')
    assert {p.name for p in truth['files']} == {'leaderboard.md', 'leaderboard.csv', 'curves.png', 'attempt-1.ipynb'}
    page = (out/'leaderboard.md').read_text()
    assert '| embed_dim |' in page and '`broken`: error' in page and f'](../{trained[0].name}/run.ipynb)' in page
    shown = texts(out/'run.ipynb')
    assert '3 runs count, in 2 groups' in shown and '±' in shown and 'caption-nb train' in shown and '`broken`: error' in shown
    assert truth['text'].splitlines()[0].startswith('#  embed_dim')
    with pytest.raises(FileExistsError, match='nothing is ever overwritten'): compare(trained, out)
    alone, = leaderboards(trained[:1])
    assert len(alone.groups) == 1 and not alone.parameters and alone.label(alone.groups[0]) == f'1. {trained[0].name}'[:47]
    shutil.rmtree(runs[-1])


def test_a_refusal_makes_no_folder(trained, tmp_path):
    odd = invent(tmp_path, 'odd')
    with pytest.raises(ValueError, match='cannot be ranked'): compare([*trained, odd], tmp_path/'out')
    assert not (tmp_path/'out').exists()
    record = tmp_path/'by-hand'
    record.mkdir()
    truth = execute(experiment('compare'), record, dict(runs=json.dumps([str(r) for r in (*trained, odd)]), out=str(record)))
    assert truth['status'] == 'error' and 'cannot be ranked' in truth['error']['message']
    assert comparison_folder(record) == record, 'what has not been done to the end may be done again'
    truth = compare([*trained, odd], record, by_protocol=True)
    assert truth['status'] == 'done' and truth['attempt'] == 2
    assert {'curves_1.png', 'curves_2.png'} <= {p.name for p in truth['files']} and '## Protocol 2' in (record/'leaderboard.md').read_text()
