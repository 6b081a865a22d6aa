"Sweeps and chains on a real SLURM that keeps accounts: an array with a limit, one run that is missing, every step after the one it needs"
import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from cluster import until
from slurm_runs import TINY, TRAIN, check_record, command, done, flags, jobs, logs, notebook, read_json, say, task_runs, toml

from caption_nb import slurm

FROZEN = TINY | dict(encoder='mobilenetv2_050', encoder_weights='random')   # runs with the same seed need the same features


@pytest.fixture(scope='module')
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('work')
    toml(folder/'profile.toml')
    notebook(folder/'small.ipynb', TRAIN)
    page = dict(name='eight', base=FROZEN | dict(cache_dir=str(folder/'cache')), grid=dict(lr=[1e-3, 2e-3], dropout=[0., 0.1]), seeds=2, limit=2)
    (folder/'eight.yaml').write_text(json.dumps(page))
    return folder


@pytest.fixture(scope='module')
def sweep(accounted, work) -> Path:
    "The folder of a sweep of eight runs, the last of which was cancelled while it waited"
    answer = command(work, 'sweep', 'eight.yaml', '--profile', 'profile.toml', '--notebook', 'small.ipynb')
    assert answer.returncode == 0, answer.stderr
    folder = work/'papermill_runs'/'sweep-eight'
    ids = jobs(folder)
    assert f'job {ids["extract"]}: extract\njob {ids["train"]}: train, 8 tasks, after {ids["extract"]}\njob {ids["compare"]}: compare, after {ids["train"]}\n' in answer.stdout
    accounted.run('scancel', f'{ids["train"]}_7')
    return folder


@pytest.fixture(scope='module')
def chain(sweep, work) -> Path:
    "The run folder of a chain of five jobs, which runs beside the sweep"
    out = done(say(work, 'submit', 'extract', 'train', 'scst', 'evaluate', 'compare', *flags(**FROZEN, cache_dir=work/'other', name='chain'),
                   '--profile', 'profile.toml', '--notebook', 'small.ipynb'))
    run = Path(re.search('^run folder: (.+)$', out, re.M)[1])
    ids = jobs(run/'job')
    assert [*ids] == ['extract', 'train', 'scst', 'evaluate', 'compare']
    before = [[], [4], [5], [6], [5, 6, 7]]   # the comparison begins when all have ended, however
    assert [re.search(rf'^job {ids[step]}: {step}(?:, after (.+))?$', out, re.M)[1] for step in ids] == [
        ', '.join(str(id - 4 + ids['extract']) for id in needs) or None for needs in before]
    return run


def most_at_once(spans: list[tuple[float, float]]) -> int:
    "How many of the `spans` (start, end) overlap"
    return max(sum(start <= at < end for start, end in spans) for at, _ in spans)


def accounts(job: int, number: int) -> list[dict]:
    "What sacct says of the starts of a job's tasks; it knows of the end a moment later"
    def known():
        found = [r for name, rows in slurm.history([job]).items() if name.partition('_')[0] == str(job) and ('_' in name or number == 1) for r in rows]
        return len(found) >= number and all(r['end'] != 'Unknown' for r in found) and found
    return until(known, 30, f'{number} rows of sacct', 0.5)


def seconds(text: str) -> float: return datetime.fromisoformat(text).timestamp()


def test_an_array_of_eight_two_at_a_time(accounted, work, sweep, chain):
    ids, runs = jobs(sweep), task_runs(sweep)
    row = [json.loads(line) for line in done(say(work, 'status', 'eight', '--json')).splitlines()]
    assert {r['state'] for r in row} <= {'pending', 'not started', 'starting', 'running', 'done'} and len([r for r in row if r['step'] == 'train']) == 8
    until(lambda: set(accounted.states(ids['compare'])) == {'COMPLETED'}, 240, lambda: f'{accounted.states(ids["train"])}\n{logs(sweep)[-6000:]}', 0.5)
    assert len({*runs}) == 8
    for run in runs[:7]: assert check_record(run) and 'CIDEr' in read_json(run/'results.json')['dev']['scores']
    assert not (runs[7]/'status.json').exists()
    rows = accounts(ids['train'], 7)   # SLURM forgets a task that is cancelled while it waits
    assert [r['state'] for r in rows] == ['COMPLETED']*7
    assert most_at_once([(seconds(r['start']), seconds(r['end'])) for r in rows]) == 2
    attempts = [read_json(run/'status.json')['attempts'][-1] for run in runs[:7]]
    assert {a['job']['array_job_id'] for a in attempts} == {str(ids['train'])} and [a['job']['array_task_id'] for a in attempts] == [*'0123456']


def test_features_were_made_once(accounted, work, sweep):
    accounted.wait(jobs(sweep)['extract'])
    said = [p.name for p in sorted((sweep/'logs').glob('*.log')) if re.search('^encoding', p.read_text(), re.M)]
    made = read_json(sweep/'extract.json')
    assert [*made] == [str(run) for run in task_runs(sweep)]
    assert said == [f'extract-{jobs(sweep)["extract"]}.log'] and {*made.values()} == {str(p) for p in (work/'cache'/'features').iterdir()}
    assert [made[str(run)] for run in task_runs(sweep)] == [*made.values()][:2]*4 and len({*made.values()}) == 2   # each seed has a random encoder of its own


def test_only_what_is_missing_runs_again(accounted, work, sweep):
    "The one that was cancelled, and the comparison; then nothing"
    before = jobs(sweep)
    until(lambda: set(accounted.states(before['compare'])) == {'COMPLETED'}, 240, lambda: logs(sweep)[-6000:], 0.5)
    assert '8 runs: 7 done, 1 not started' in done(say(work, 'status', 'eight'))
    reason = json.loads(done(say(work, 'status', task_runs(sweep)[7].name, '--json')))['reason']
    assert reason == f'job {before["train"]}_7 is gone: cancelled while it waited, or long ago'
    out = done(say(work, 'sweep', 'eight.yaml', '--profile', 'profile.toml'))
    after = jobs(sweep)
    assert '8 runs; to do: train 1, compare 1' in out and f'job {after["train"]}: train\njob {after["compare"]}: compare, after {after["train"]}' in out
    assert 'to do: nothing' in done(say(work, 'sweep', 'eight.yaml', '--profile', 'profile.toml')), 'what waits was submitted again'
    accounted.wait(after['compare'], timeout=120)
    run = task_runs(sweep)[7]
    check_record(run)
    assert read_json(run/'status.json')['attempts'][-1]['job']['job_id'] == str(after['train'])
    assert 'to do: nothing' in done(say(work, 'sweep', 'eight.yaml', '--profile', 'profile.toml')) and jobs(sweep) == after
    assert '8 runs: 8 done' in done(say(work, 'status', 'eight'))


def test_the_leaderboard_is_in_the_sweeps_folder(accounted, work, sweep):
    accounted.wait(jobs(sweep)['compare'], timeout=240)
    check_record(sweep/'compare', ['done']*len(read_json(sweep/'compare'/'status.json')['attempts']))
    board = (sweep/'compare'/'leaderboard.md').read_text()
    assert all(f'{lr:g}' in board for lr in (1e-3, 2e-3)) and 'CIDEr' in board and 'caption-nb train' in board


def test_each_step_of_a_chain_after_the_one_it_needs(accounted, work, chain):
    ids = jobs(chain/'job')
    try: accounted.wait(ids['compare'], timeout=240)
    except TimeoutError as e: raise TimeoutError(f'{e}\n{logs(chain/"job")[-6000:]}') from None
    rows = {step: accounts(id, 1)[0] for step, id in ids.items()}
    assert {r['state'] for r in rows.values()} == {'COMPLETED'}
    for before, step in zip([*ids], [*ids][1:]): assert seconds(rows[before]['end']) <= seconds(rows[step]['start'])
    scst = Path(read_json(chain/'job'/'job.json')['tasks'][0]['scst'])
    assert read_json(scst/'config.json')['from_run'] == str(chain) and read_json(scst/'config.json')['stage'] == 'scst'
    for folder in (chain, scst, scst/'evaluate-dev', scst/'compare'): check_record(folder)
    assert all('CIDEr' in read_json(run/'results.json')['dev']['scores'] for run in (chain, scst))
    assert scst.name in (scst/'compare'/'leaderboard.md').read_text() and 'reward' in (scst/'metrics.jsonl').read_text()
    said = [step for step in ids if re.search('^encoding', (chain/'job'/'logs'/f'{step}-{ids[step]}.log').read_text(), re.M)]
    assert said == ['extract'] and len([*(work/'other'/'features').iterdir()]) == 1
    states = [json.loads(line)['state'] for line in done(say(work, 'status', chain.name, scst.name, '--json')).splitlines()]
    assert states == ['done', 'done']
    assert 'nothing is left to do' in done(say(work, 'submit', *ids, '--resume', chain, '--profile', 'profile.toml'))


def test_a_chain_that_breaks(accounted, work):
    "What needs the step that failed is cancelled by SLURM; the reason is told; given again with what was mended, it goes on"
    book = notebook(work/'broken.ipynb', 'raise ValueError("a fault in the notebook")')
    out = done(say(work, 'submit', 'train', 'evaluate', *flags(**TINY, cache_dir=work/'cache', name='broken'), '--profile', 'profile.toml', '--notebook', book))
    run = Path(re.search('^run folder: (.+)$', out, re.M)[1])
    ids = jobs(run/'job')
    accounted.wait(ids['train'], 'FAILED')
    until(lambda: set(accounted.states(ids['evaluate'])) <= {'CANCELLED'}, 30, lambda: accounted.state(ids['evaluate']), 0.5)
    check_record(run, ['error'])
    row = json.loads(done(say(work, 'status', run.name, '--json')))
    assert (row['state'], row['reason']) == ('error', 'ValueError: a fault in the notebook')
    assert 'ValueError: a fault in the notebook' in logs(run/'job')
    status, out, _ = say(work, 'follow', run.name)
    assert status == 1 and 'error: ValueError: a fault in the notebook' in out
    mended = notebook(work/'mended.ipynb', 'print("mended")')
    done(say(work, 'submit', 'train', '--resume', run, '--profile', 'profile.toml', '--notebook', mended))
    accounted.wait(jobs(run/'job')['train'], timeout=60)
    check_record(run, ['error', 'done'])


def test_the_same_sweep_without_slurm(accounted, work, tmp_path):
    "Here two at a time, then on the cluster what is new"
    notebook(tmp_path/'quick.ipynb', 'from pathlib import Path\n_ = Path(run_dir, "results.json").write_text("{}")')
    def page(rates): (tmp_path/'page.yaml').write_text(json.dumps(dict(name='both', base=TINY, grid=dict(lr=rates), steps=['train'])))
    def sweep(profile): return done(say(tmp_path, 'sweep', 'page.yaml', '--profile', profile, '--jobs', '2', '--notebook', 'quick.ipynb'))
    page([1e-3, 2e-3, 3e-3])
    assert '3 of 3 steps done' in sweep('local') and 'to do: nothing' in sweep('local') and 'to do: nothing' in sweep(work/'profile.toml')
    page([1e-3, 2e-3, 3e-3, 4e-3])
    assert 'to do: train 1\n' in sweep(work/'profile.toml')
    folder = tmp_path/'papermill_runs'/'sweep-both'
    accounted.wait(jobs(folder)['train'])
    for run in task_runs(folder): check_record(run)
    assert ['job_id' in read_json(run/'status.json')['job'] for run in task_runs(folder)] == [False]*3 + [True]
