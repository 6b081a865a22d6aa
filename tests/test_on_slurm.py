"From a command line to an executed record on a real SLURM: one run, two nodes, many at once, deaf cells, names that a shell would obey, refusals"
import json
import random
import re
import shutil
import time
from datetime import datetime
from pathlib import Path

import nbformat
import pytest
from cluster import Cluster, until
from conftest import LONG, ROOT, _cluster
from slurm_runs import TINY, TRAIN, check_record, command, done, flags, jobs, logs, notebook, read_json, said, say, task_runs, toml

from caption_nb import slurm
from caption_nb.profiles import check_script, load_profile, slurm_folder

QUICK = '''import json, time
from pathlib import Path
time.sleep(0.5)
_ = Path(run_dir, 'results.json').write_text(json.dumps(dict(lr=lr, seed=seed)))'''


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    "A SLURM that refuses what a partition does not give; others let such a job wait for ever"
    yield from _cluster(tmp_path_factory, EnforcePartLimits='ALL')


@pytest.fixture(scope='module')
def work(tmp_path_factory) -> Path:
    "The folder from which everything is submitted"
    folder = tmp_path_factory.mktemp('work')
    toml(folder/'profile.toml')
    toml(folder/'two.toml', nodes=2, env=dict(GLOO_SOCKET_IFNAME='lo'))
    notebook(folder/'quick.ipynb', QUICK)
    notebook(folder/'small.ipynb', TRAIN)
    return folder


def submit(work: Path, *words: str, profile: str = 'profile.toml', **fields) -> Path: # Its run folder
    "`caption-nb submit`"
    out = done(say(work, 'submit', *words, *flags(**TINY | dict(cache_dir=work/'cache') | fields), '--profile', work/profile))
    return Path(re.search('^run folder: (.+)$', out, re.M)[1])


def ended(cluster: Cluster, run: Path, step: str = 'train', states=('COMPLETED',), timeout: float = 120):
    "Wait for the end of a step"
    job = jobs(run/'job')[step]
    try: cluster.wait(job, states, timeout)
    except TimeoutError as e: raise TimeoutError(f'{e}\n{logs(run/"job")}') from None


# ---- one run, one on two nodes ----------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def started(cluster, work) -> dict[str, Path]:
    "Run folders of two jobs that were submitted one after the other: both cores are busy"
    one = command(work, 'submit', 'train', *flags(**TINY, cache_dir=work/'cache', name='one'), '--profile', 'profile.toml')
    assert one.returncode == 0, one.stderr
    two = submit(work, 'train', profile='two.toml', name='two', epochs=2, notebook=work/'small.ipynb')
    return dict(one=Path(re.search('^run folder: (.+)$', one.stdout, re.M)[1]), two=two, said=one)


def test_one_run(cluster, work, started):
    "The shipped notebook, from the command line to scores; what was shown on the way"
    run, answer = started['one'], started['said']
    job = jobs(run/'job')['train']
    assert re.search(rf'^job {job}: train$', answer.stdout, re.M) and f'caption-nb follow {run.name}' in answer.stdout
    assert re.search('^caution: .* is below /tmp, which every machine has for itself', answer.stderr, re.M)
    assert (run/'config.json').is_file() and (run/'job'/'train.sh').is_file() and not check_script((run/'job'/'train.sh').read_text())
    row = json.loads(done(say(work, 'status', run.name, '--json')))
    assert (row['run'], row['job'], row['step']) == (run.name, str(job), 'train') and row['state'] in ('pending', 'starting', 'running')
    until(lambda: (run/'run.ipynb').exists(), 60, lambda: logs(run/'job'), every=0.2)
    assert f', job {job}\n' in done(say(work, 'follow', run.name, '--once'))
    ended(cluster, run)
    nb = check_record(run)
    assert nb.metadata.caption_nb['job']['job_id'] == str(job) and sum('image/png' in o.get('data', {}) for c in nb.cells for o in c.get('outputs', [])) >= 8
    results = read_json(run/'results.json')
    assert 'CIDEr' in results['dev']['scores'] and (run/'checkpoints'/'best').is_dir() and '**done**' in (run/'summary.md').read_text()
    assert 'epoch 1: dev' in logs(run/'job') and 'train: done (attempt 1' in logs(run/'job')
    row = json.loads(done(say(work, 'status', run.name, '--json')))
    assert (row['state'], row['progress'], row['attempts'], row['CIDEr']) == ('done', 1., 1, results['dev']['scores']['CIDEr'])
    assert '1 run: 1 done' in done(say(work, 'status', run.name)) and 'done in' in done(say(work, 'follow', run.name))
    assert 'nothing is left to do' in done(say(work, 'submit', 'train', '--resume', run, '--profile', work/'profile.toml'))


def test_environment_says_where(started, cluster):
    run = started['one']
    ended(cluster, run)
    env = read_json(run/'environment.json')
    assert env['job']['job_id'] == str(jobs(run/'job')['train']) and env['submitted']['command'].endswith('profile.toml')
    version = next((run/'job').glob('code-*/version.json'))
    assert env['git'] == json.loads(version.read_text())


def test_two_nodes_train_one_model(cluster, work, started):
    run = started['two']
    ended(cluster, run)
    nb = check_record(run)
    assert nb.metadata.caption_nb['job']['ntasks'] == '2' and read_json(run/'config.json')['ranks'] == 2
    rank_logs = sorted(p.name for p in run.glob('ranks/attempt-1/*.log'))
    assert [n for n in rank_logs if n.startswith('rank-')] == ['rank-0.log', 'rank-1.log']
    info = slurm.job_info(jobs(run/'job')['train'])
    assert info['NumNodes'] == '2' and info['NodeList'] == 'n[1-2]'
    results = read_json(run/'results.json')
    assert 'CIDEr' in results['dev']['scores'] and results['cost']['devices'] == 2


# ---- many at once -----------------------------------------------------------------------------------------------

def starts(job: int, cluster: Cluster) -> dict[str, list[tuple[str, float]]]: # Node → task, second
    "Where and when SLURM started the tasks of an array"
    found = {}
    for line in cluster.run('squeue', '-h', '-r', '-t', 'all', '-o', '%K %N %S', '-j', job).splitlines():
        task, node, start = line.split()
        found.setdefault(node, []).append((task, datetime.fromisoformat(start).timestamp()))
    return found


def check_many(cluster: Cluster, work: Path, number: int, book: str, **fields) -> list[Path]: # Run folders
    "Submit `number` runs as one sweep, all of which can start at once: as many folders and sound records, no port was taken twice"
    base = '\n'.join(f'  {k}: {json.dumps(str(v) if isinstance(v, Path) else v)}' for k, v in (TINY | fields).items())
    (work/f'many{number}.yaml').write_text(f'name: many{number}\nbase:\n{base}\ngrid:\n  lr: {[(i + 1)/1000 for i in range(number)]}\nsteps: [train]\n')
    toml(work/'light.toml', memory='500M')
    out = done(say(work, 'sweep', f'many{number}.yaml', '--profile', 'light.toml', '--notebook', book, '--runs-dir', f'runs{number}'))
    folder = work/f'runs{number}'/f'sweep-many{number}'
    job = jobs(folder)['train']
    assert f'{number} runs; to do: train {number}' in out and f'job {job}: train, {number} tasks' in out
    over = {'COMPLETED', 'FAILED', 'CANCELLED'}
    until(lambda: {*cluster.states(job)} <= over, 30 + 15*number, lambda: f'{cluster.state(job)}\n{logs(folder)[-5000:]}', every=0.5)
    assert {*cluster.states(job)} == {'COMPLETED'}, [line for line in logs(folder).splitlines() if 'Error' in line]
    nodes, runs = starts(job, cluster), task_runs(folder)
    seconds = [s for found in nodes.values() for _, s in found]
    assert all(len(found) >= 8 for found in nodes.values()) and max(seconds) - min(seconds) <= 2 and max(map(seconds.count, seconds)) >= number/2
    assert len(set(runs)) == len([*folder.parent.glob('*/config.json')]) == number
    for run in runs: check_record(run)
    assert len({(a := read_json(run/'status.json'))['job']['job_id'] for run in runs}) == number
    assert not re.search('in use|Traceback|Error', logs(folder)) and not list(folder.parent.glob('*/kernel-*.log'))
    assert f'{number} runs: {number} done' in done(say(work, 'status', f'many{number}', '--runs-dir', folder.parent))
    return runs


def test_sixteen_at_once(cluster, work):
    "As many as the two nodes have cores, with a notebook that learns nothing"
    runs = check_many(cluster, work, 16, 'quick.ipynb')
    assert [read_json(run/'results.json')['lr'] for run in runs] == [(i + 1)/1000 for i in range(16)]


@LONG
def test_forty_at_once(work, tmp_path_factory, monkeypatch):
    "All forty need the same features, and no job made them before: one run does, and the others wait for it"
    with Cluster(tmp_path_factory.mktemp('five'), nodes=5) as cluster:
        for name, value in cluster.env.items(): monkeypatch.setenv(name, value)
        runs = check_many(cluster, work, 40, 'small.ipynb', encoder='mobilenetv2_050', encoder_weights='random', cache_dir=work/'forty')
    assert len([*(work/'forty'/'features').iterdir()]) == 1
    shown = [json.dumps([c.get('outputs') for c in read_json(run/'run.ipynb')['cells']]) for run in runs]
    assert sum('encoding' in text for text in shown) == 1 and sum('waiting for it' in text for text in shown) > 1
    assert all('CIDEr' in read_json(run/'results.json')['dev']['scores'] for run in runs)


# ---- a cell that ignores the interrupt --------------------------------------------------------------------------

def test_a_deaf_cell_ends_within_killwait(cluster, work):
    deaf = 'import time\nprint("deaf", flush=True)\nwhile True:\n    try: time.sleep(0.2)\n    except KeyboardInterrupt: print("not now", flush=True)'
    run = submit(work, 'train', notebook=notebook(work/'deaf.ipynb', deaf), name='deaf')
    until(lambda: (run/'run.ipynb').exists() and 'deaf' in said(nbformat.read(run/'run.ipynb', 4)), 60, lambda: logs(run/'job'), every=0.2)
    job, start = jobs(run/'job')['train'], time.monotonic()
    assert f'cancelled: job {job}: train of {run.name}, running' in done(say(work, 'cancel', run.name))
    ended(cluster, run, states=('CANCELLED',), timeout=20)
    until(lambda: not cluster.job_processes(job), 10, 'the end of its processes', 0.1)
    assert time.monotonic() - start < slurm.site()['KillWait'] + 2
    nb = check_record(run, ['cancelled'])
    assert said(nb) == 'deaf\nnot now\n' and 'was cancelled (SIGTERM)' in nb.cells[0].source
    attempt = read_json(run/'status.json')['attempts'][-1]
    assert attempt['error']['type'] == 'InterruptIgnored' and attempt['status'] == 'interrupted'
    row = json.loads(done(say(work, 'status', run.name, '--json')))
    assert row['state'] == 'cancelled' and 'InterruptIgnored' in row['reason'] or row['reason'] == '', row


# ---- names and values that mean something to a shell ------------------------------------------------------------

NASTY = ['$(touch canary)', '`touch canary`', "'; touch canary; '", '"; touch canary; "', '\\\'; touch canary #', '$HOME ${PATH} %j %A \\', '!! & | > canary < ~ * ?',
         'zwei\nZeilen; touch canary', "#SBATCH --comment=x\n#SBATCH --wrap='touch canary'", 'Ünïcödé 猫 \U0001f600 \u2028', '--dry-run', ' a  b ', '{{program}}', "a\tb\r\n"]
SHOW = '''import json
from pathlib import Path
found = {name: globals()[name] for name in ('name', 'data', 'bad_endings', 'cache_dir', 'word_vectors', 'runs_dir')}
_ = Path(run_dir, 'seen.json').write_text(json.dumps(found))'''


def test_no_shell_reads_names_and_values(cluster, work):
    "Through command line, configuration, batch script, driver and papermill, into the notebook"
    place = work/'a folder; touch canary $(touch canary) `x` \'quoted\' "twice" Ünï 猫 #1 %j'
    place.mkdir()
    shutil.copy(work/'profile.toml', place)
    book = notebook(place/'own $(touch canary) \'note"book.ipynb', SHOW)
    data = place/"photos\n$(touch canary); ' \" \\ 猫"
    data.mkdir()
    dice = random.Random(0)
    everything = ''.join(dice.sample(NASTY, len(NASTY)))
    values = dict(name=everything, data=data, bad_endings=everything + ',' + ','.join(NASTY), cache_dir=place/'cache $(touch canary) `x`\n', word_vectors=NASTY[4],
                  runs_dir='runs; $(touch canary) "x" \'y\' ü')
    run = submit(place, 'train', profile=place/'profile.toml', notebook=book, **values)
    ended(cluster, run)
    expected = {name: str(value) for name, value in values.items()}
    config, seen = read_json(run/'config.json'), read_json(run/'seen.json')
    assert seen == expected == {name: config[name] for name in values}
    given = next(c.source for c in check_record(run).cells if 'injected-parameters' in c.metadata.get('tags', []))
    exec(given, injected := {})
    assert {name: injected[name] for name in values} == expected and injected['run_dir'] == str(run)
    assert run.parent == place/values['runs_dir'] and run.is_dir() and re.fullmatch(r'[\w.-]+', run.name)
    assert not list(work.rglob('canary*')) and not (Path.home()/'canary').exists() and not (ROOT/'canary').exists()
    assert run.name in done(say(place, 'status', '--runs-dir', values['runs_dir']))


def test_a_sweep_of_nasty_values(cluster, work):
    page = dict(name='nasty', base=TINY, grid=dict(bad_endings=NASTY[:3] + NASTY[7:9]), steps=['train'])
    (work/'nasty.yaml').write_text(json.dumps(page))
    done(say(work, 'sweep', 'nasty.yaml', '--profile', 'profile.toml', '--notebook', notebook(work/'show.ipynb', SHOW)))
    folder = work/'papermill_runs'/'sweep-nasty'
    cluster.wait(jobs(folder)['train'], timeout=120)
    assert [read_json(run/'seen.json')['bad_endings'] for run in task_runs(folder)] == page['grid']['bad_endings']
    assert not list(work.rglob('canary*'))


# ---- dry runs ---------------------------------------------------------------------------------------------------

@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    "An empty folder to submit from, by somebody who has no profiles of his own"
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path/'config'))
    (tmp_path/'here').mkdir()
    return tmp_path/'here'


def scripts(text: str) -> list[str]: return [f'#!/bin/bash{part}' for part in text.split('#!/bin/bash')[1:]]


@pytest.mark.parametrize('name', [p.stem for p in sorted((slurm_folder()/'profiles').glob('*.toml'))])
def test_a_dry_run_is_what_sbatch_takes(cluster, bare, name):
    "With nodes as small as those of the test cluster"
    profile = load_profile(name)
    fits = dict(partition='debug', memory='2G', cpus=1) if profile.slurm else {}
    if profile.gres: fits['gres'] = f'gpu:{profile.gres.split(":")[-1]}'
    before = cluster.run('squeue', '-h', '-t', 'all', '-o', '%i')
    status, out, err = say(bare, 'submit', 'extract', 'train', 'scst', 'evaluate', 'compare', '--profile', name, *flags(**fits), '--dry-run')
    assert status == 0, err
    if not profile.slurm: assert 'train: 1 task, on this machine' in out
    else:
        assert len(scripts(out)) == 5 and [check_script(text) for text in scripts(out)] == [[]]*5
        starts = re.findall(r'^Job \d+ to start at \S+ using (\d+) processors on nodes \S+ in partition debug$', err, re.M)
        ranks = str(profile.nodes*profile.tasks)
        assert starts == ['1', ranks, ranks, '1', '1']
    assert not [p for p in bare.rglob('*') if p.is_file() or p.name != 'papermill_runs'] and cluster.run('squeue', '-h', '-t', 'all', '-o', '%i') == before


def test_a_dry_run_of_a_sweep(cluster, work, bare):
    (bare/'page.yaml').write_text(json.dumps(dict(base=TINY, grid=dict(lr=[1e-3, 1e-4]), seeds=2, limit=2)))
    status, out, err = say(bare, 'sweep', 'page.yaml', '--profile', work/'profile.toml', '--dry-run')
    assert status == 0 and '--array=0-3%2' in out and [check_script(text) for text in scripts(out)] == [[], []] and err.count('to start at') == 2
    assert {p.name for p in bare.iterdir()} <= {'page.yaml', 'papermill_runs'} and not list(bare.glob('papermill_runs/*'))


# ---- what cannot be ---------------------------------------------------------------------------------------------

TRAIN_ON = ['train', '--encoder', 'scene_cnn', '--profile']


@pytest.mark.parametrize('words, expected', [
    ([*TRAIN_ON, 'debug', '--partition', 'dbug'], ['invalid partition specified: dbug', "did you mean 'debug'", 'This cluster has:', '2 nodes of 8 cores']),
    ([*TRAIN_ON, 'debug', '--gpus', '3'], ['Requested node configuration is not available', 'No node has what is asked for', 'gpu:fake:2']),
    ([*TRAIN_ON, 'debug', '--gres', 'gpu:v100:1'], ['Requested node configuration is not available', '`gpus`', 'gpu:fake:2']),
    ([*TRAIN_ON, 'debug', '--gres', 'gpus:1'], ['Invalid generic resource', 'GPU types are written as there', 'gpu:fake:2']),
    ([*TRAIN_ON, 'debug', '--memory', '900G'], ['Memory specification can not be satisfied', '6000 MB']),
    ([*TRAIN_ON, 'debug', '--nodes', '3'], ['Node count specification invalid', '`nodes`']),
    ([*TRAIN_ON, 'debug', '--time', '4 hours'], ["time: '4 hours' is no time", "'4:00:00' for four hours"]),
    ([*TRAIN_ON, 'debug', '--memory', 'much'], ['memory', "'16G'"]),
    ([*TRAIN_ON, 'debgu'], ["no profile 'debgu'", "did you mean 'debug'"]),
    ([*TRAIN_ON, './mine.toml'], ["mine.toml: unknown field 'partiton': did you mean 'partition'"]),
    ([*TRAIN_ON, 'two-node', '--ranks', '4'], ['ranks=4: the profile two-node has 2 tasks', 'say --ranks 2']),
    (['trian', '--profile', 'debug'], ["no step 'trian': did you mean 'train'"]),
    (['--profile', 'debug'], ['name at least one step: extract, train, scst, evaluate, compare']),
    (['train'], ['say with --profile where it shall run: debug,']),
    ([*TRAIN_ON, 'debug', '--notebook', 'none.ipynb'], ['--notebook none.ipynb: no such file']),
    ([*TRAIN_ON, 'debug', '--data', 'none'], ['--data none: no such file or folder'])])
def test_what_cannot_be_submitted(cluster, bare, words, expected):
    "Whose words, what they mean, what there is instead; and nothing is left of it"
    (bare/'mine.toml').write_text('partiton = "debug"\n')
    status, out, err = say(bare, 'submit', *words)
    for text in expected: assert text.lower() in err.lower(), err
    assert status == 2 and not list(bare.glob('papermill_runs/*')), 'something is left'


def test_time_that_a_partition_does_not_give(cluster, bare):
    cluster.run('scontrol', 'update', 'PartitionName=low0', 'MaxTime=30')
    try: status, _, err = say(bare, 'submit', *TRAIN_ON, 'debug', '--partition', 'low0', '--time', '2:00:00')
    finally: cluster.run('scontrol', 'update', 'PartitionName=low0', 'MaxTime=INFINITE')
    assert status == 2 and 'Requested time limit is invalid' in err and '`time` in the profile is longer than the partition allows' in err and 'at most 30:00' in err


@pytest.mark.parametrize('page, expected', [
    (dict(grid=dict(leaning_rate=[1])), ["'leaning_rate'", "did you mean"]), (dict(gird=dict(lr=[1])), ["did you mean 'grid'"]),
    (dict(grid=dict(lr=[0.1, 0.2]), drop=['lr > 0']), ['drop']), (dict(grid=dict(seed=list(range(10_001)))), ['10,001'])])
def test_sweeps_that_cannot_be(cluster, bare, work, page, expected):
    (bare/'page.yaml').write_text(json.dumps(page))
    start = time.monotonic()
    status, out, err = say(bare, 'sweep', 'page.yaml', '--profile', work/'profile.toml')
    assert status == 2 and all(text in err for text in expected), err
    assert err.count('page.yaml') >= 1 and not (bare/'papermill_runs').exists() and time.monotonic() - start < 20


def test_no_slurm_here(bare, monkeypatch):
    "What to do instead; a dry run needs none"
    monkeypatch.setenv('PATH', str(bare))
    for words in (['submit', 'train', '--profile', 'debug'], ['sweep', 'learning_rate', '--profile', 'debug']):
        if words[0] == 'sweep': (bare/'flickr8k').mkdir()
        status, out, err = say(bare, *words)
        assert status == 2 and 'there is no SLURM here' in err and 'Use --profile local' in err and "log in to the cluster's login node" in err
        assert not list(bare.glob('papermill_runs/*')), 'something is left'
    assert scripts(done(say(bare, 'submit', 'train', '--profile', 'debug', '--dry-run')))
    assert 'no runs' in done(say(bare, 'status'))


def test_a_run_folder_that_the_nodes_do_not_see(work, tmp_path_factory, monkeypatch):
    "Such a job fails without a word, not even in its log: status says why"
    here = tmp_path_factory.mktemp('login')
    shutil.copy(work/'profile.toml', here)
    with Cluster(tmp_path_factory.mktemp('blind'), nodes=1, hidden=here) as cluster:
        for name, value in cluster.env.items(): monkeypatch.setenv(name, value)
        run = submit(here, 'train', notebook=work/'quick.ipynb')
        ended(cluster, run, states=('FAILED',), timeout=30)
        assert not logs(run/'job') and not (run/'status.json').exists()
        row = json.loads(done(say(here, 'status', '--json')))
        assert row['state'] == 'not started' and f'node n1 could not write into {run/"job"/"logs"}: does it see this folder?' in row['reason'], row
        status, out, _ = say(here, 'follow', run.name, '--once')
        assert status == 1 and 'node n1 could not write into' in out


@pytest.mark.parametrize('profile, reason', [(dict(python='/nowhere/python'), '/nowhere/python: No such file or directory'),
                                             (dict(modules=['nowhere']), 'caption-nb: profile bad: modules = "nowhere" failed (on '),
                                             (dict(activate='/nowhere/activate'), 'caption-nb: profile bad: activate = "/nowhere/activate" failed (on ')])
def test_software_that_the_nodes_do_not_have(cluster, work, bare, profile, reason):
    "The last line of the log is the reason that status tells"
    toml(bare/'bad.toml', **profile)
    run = submit(bare, 'train', profile=bare/'bad.toml')
    ended(cluster, run, states=('FAILED',))
    row = json.loads(done(say(bare, 'status', '--json')))
    assert row['state'] == 'not started' and row['reason'].startswith(f'job {jobs(run/"job")["train"]} is gone: failed: ') and reason in row['reason'], row
    assert 'status.json' not in {p.name for p in run.iterdir()}
