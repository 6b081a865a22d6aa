"""Jobs: whatever ends a step, its record is readable and true, and its exit code says what comes next."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook

from caption_nb import jobs, runs, slurm, training
from caption_nb.array_layouts import ArraySource
from caption_nb.basics import FileLock
from caption_nb.config import Config, ConfigError
from caption_nb.data import CaptionData
from caption_nb.jobs import (JobError, Step, changed_fields, close_attempts, extract_features, next_code, progress, read_job, stage_features, step_done,
                             write_job)
from caption_nb.runs import Run, execute, experiment, open_attempts

PROFILE = dict(slurm=True, requeue=True, retries=1, warning=25)


def make_job(folder: Path, *cells: str, tasks: int = 1, form: str = "run_dir = ''  # folder\n", config: dict | None = None, **profile) -> Path:
    "A job folder whose notebook consists of `cells`, and its run folders"
    nb = new_notebook(metadata=dict(kernelspec=dict(name='python3', language='python', display_name='Python 3')))
    nb.cells = [new_code_cell(form, metadata=dict(tags=['parameters'])), *map(new_code_cell, cells)]
    job = folder/'job'
    job.mkdir(parents=True)
    nbformat.write(nb, job/'own.ipynb')
    for i in range(tasks):
        (folder/f'run-{i}').mkdir(exist_ok=True)
        (folder/f'run-{i}'/'config.json').write_text(json.dumps(config or {}))
    write_job(job, dict(name='x', steps=['train'], notebook='own.ipynb', profile=PROFILE | profile,
                        tasks=[dict(run=str(folder/f'run-{i}'), scst='') for i in range(tasks)]))
    return job


def run_in(folder: Path) -> Path: return folder/'run-0'


def start(job: Path, *words: str, **env) -> subprocess.Popen:
    "`python -m caption_nb.jobs` as the batch script starts it"
    return subprocess.Popen([sys.executable, '-m', 'caption_nb.jobs', *(words or (str(job), 'train', '0'))], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True, env=dict(os.environ, **env))


def end(process: subprocess.Popen, seconds: float = 60) -> tuple[int, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out + err


def wait_for(condition, seconds: float = 60):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f'not in {seconds} s'
        time.sleep(0.05)
    return found


def status(run: Path) -> dict: return json.loads((run/'status.json').read_text())


def check_records(run: Path):
    "All attempts are there, each readable, the latest one is run.ipynb, and no rubbish lies around"
    for a in status(run)['attempts']:
        nb = nbformat.read(run/a['notebook'], 4)
        assert nb.metadata.caption_nb['status'] == a['status'] and nb.metadata.caption_nb['reason'] == a['reason']
    assert nbformat.read(run/'run.ipynb', 4).metadata.caption_nb['attempt'] == len(status(run)['attempts'])
    assert not list(run.glob('.*tmp')) and not list(run.glob('.*ipynb*'))


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    "An environment like that of a job, and SLURM's commands, which say what is written into files of the folder"
    folder = tmp_path/'slurm'
    folder.mkdir()
    (folder/'config').write_text('KillWait                = 8 sec\n')
    (folder/'job').write_text('JobId=7 JobName=x\n   JobState=COMPLETING Reason=None Restarts=0 TimeLimit=01:00:00 '
                              f'StartTime={time.strftime("%Y-%m-%dT%H:%M:%S")}\n')
    (folder/'scontrol').write_text(textwrap.dedent(f'''\
        #!/bin/sh
        [ -f {folder}/slow ] && [ "$2" = job ] && exec sleep 60
        cat {folder}/"$2"'''))
    (folder/'sbatch').write_text('#!/bin/sh\n')
    for name in ('scontrol', 'sbatch'): (folder/name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
    monkeypatch.setenv('SLURM_JOB_ID', '7')
    return folder


GOES_ON = "import pathlib, time\nprint('before', flush=True)\npathlib.Path(run_dir, 'begun').touch()\ntime.sleep(60)"
DEAF = '''import pathlib, time
print('before', flush=True)
pathlib.Path(run_dir, 'begun').touch()
while True:
    try: time.sleep(1)
    except KeyboardInterrupt: pass'''


# a step from beginning to end

def test_done_and_not_again(tmp_path):
    job = make_job(tmp_path, 'print(run_dir)')
    code, said = end(start(job))
    assert code == 0, said
    truth = status(run_in(tmp_path))
    assert (truth['status'], truth['reason'], truth['progress']) == ('done', 'done', [0, 0]) and step_done(job, 'train', 0)
    code, said = end(start(job))
    assert code == 0 and 'done already' in said and len(status(run_in(tmp_path))['attempts']) == 1
    assert 'print(run_dir)' in (tmp_path/'run-0'/'run.ipynb').read_text()
    check_records(run_in(tmp_path))


def test_error_is_not_tried_again(tmp_path):
    code, said = end(start(make_job(tmp_path, '1/0')))
    assert code == 1 and 'ZeroDivisionError' in said and status(run_in(tmp_path))['reason'] == 'error'


def test_memory(tmp_path, monkeypatch):
    run = tmp_path/'run'
    run.mkdir()
    job = make_job(tmp_path, 'raise MemoryError("lower images_per_batch")', 'print()')
    truth = execute(job/'own.ipynb', run)
    assert (truth['status'], truth['reason']) == ('error', 'out of memory')
    assert 'ran out of memory' in nbformat.read(run/'run.ipynb', 4).cells[0].source
    dies = make_job(tmp_path/'b', 'import os; os.kill(os.getpid(), 9)')
    counts = iter([0, 1])
    monkeypatch.setattr(runs, 'oom_kills', lambda: next(counts))
    truth = execute(dies/'own.ipynb', run)
    assert (truth['status'], truth['reason']) == ('kernel died', 'out of memory') and 'SIGKILL' in truth['error']['message']


def test_memory_is_counted_by_version_one_too(tmp_path):
    group = tmp_path/'memory'/'slurm'/'uid_0'/'job_7'/'step_0'
    group.mkdir(parents=True)
    (group/'memory.oom_control').write_text('oom_kill_disable 0\nunder_oom 0\noom_kill 2\n')
    (tmp_path/'groups').write_text('5:cpu:/x\n4:memory:/slurm/uid_0/job_7/step_batch/task_0\n')
    assert runs.oom_kills(tmp_path, tmp_path/'groups') == 2
    assert runs.oom_kills(tmp_path, tmp_path/'none') == 0


def test_killed_kernel_is_tried_again_a_few_times(tmp_path):
    job = make_job(tmp_path, 'import os; os.kill(os.getpid(), 9)')
    code, said = end(start(job))
    assert code == 85 and 'kernel killed: goes on' in said
    assert status(run_in(tmp_path))['reason'] == 'kernel killed' and 'SIGKILL' in status(run_in(tmp_path))['error']['message']
    code, said = end(start(job))
    assert code == 1 and 'not tried again' in said
    check_records(run_in(tmp_path))


@pytest.mark.parametrize('words, message', [(['{job}', 'train', '3'], 'has 1 tasks, counted from 0: there is no task 3'),
                                            (['{job}', 'trian', '0'], "did you mean 'train'"),
                                            (['{job}/elsewhere', 'train', '0'], 'is not visible from node'),
                                            (['{job}', 'train'], 'usage:')])
def test_what_cannot_be_done(tmp_path, words, message):
    job = make_job(tmp_path)
    code, said = end(start(job, *(w.format(job=job) for w in words)))
    assert code in (1, 2) and message in said


def test_damaged_and_vanished(tmp_path):
    job = make_job(tmp_path)
    (run_in(tmp_path)/'config.json').unlink()
    run_in(tmp_path).rmdir()
    code, said = end(start(job))
    assert code == 1 and f'{run_in(tmp_path)} is not visible from node' in said
    (job/'job.json').write_text('{"name"')
    with pytest.raises(JobError, match='is damaged'): read_job(job)
    (job/'job.json').write_text('{"name": 1}')
    with pytest.raises(JobError, match='lacks profile, steps, tasks'): read_job(job)


def test_parameters_are_those_of_train():
    for config in (Config(), Config(epochs=3, lr=1e-4, gate=False, name='a "name"; $(rm) ü\n'), Config(data='it\'s', min_freq=2, beam=7)):
        assert changed_fields(config.to_dict(), experiment('train')) == config.changed()


def test_steps_know_their_folders(tmp_path):
    job = make_job(tmp_path, tasks=2)
    write_job(job, read_job(job) | dict(steps=['train', 'scst', 'evaluate', 'compare'], split='test',
                                        tasks=[dict(run='/r/0', scst='/r/0-scst'), dict(run='/r/1', scst='')]))
    steps = {name: Step.load(job, name, 0) for name in ('train', 'scst', 'evaluate', 'compare')}
    assert [str(s.record) for s in steps.values()] == ['/r/0', '/r/0-scst', '/r/0-scst/evaluate-test', str(job/'compare')]
    assert [s.notebook.name for s in steps.values()] == ['own.ipynb', 'own.ipynb', 'evaluate.ipynb', 'compare.ipynb']
    assert json.loads(steps['compare'].parameters()['runs']) == ['/r/0-scst', '/r/1']
    for name in ('evaluate', 'compare'): runs.check_parameters(steps[name].notebook, steps[name].parameters())


# signals

def stop(job: Path, run: Path, *signals: str) -> tuple[int, str, float]:
    "Start, send `signals` a second apart once the cell runs; exit code, output, seconds until the end"
    process = start(job)
    wait_for((run/'begun').exists)
    for i, name in enumerate(signals):
        if i: time.sleep(1)
        else: begun = time.monotonic()
        process.send_signal(getattr(signal, name))
    return *end(process), time.monotonic() - begun


@pytest.mark.parametrize('job_now, came, reason, code', [
    ('JobState=RUNNING PreemptTime=2026-01-01T00:00:00', 'SIGUSR2', 'preempted', 85),
    ('JobState=RUNNING', 'SIGUSR2', 'time limit', 85),
    ('JobState=COMPLETING', 'SIGTERM', 'cancelled', 143),
    ('JobState=COMPLETING Restarts=1', 'SIGTERM', 'requeued', 143),
    ('JobState=COMPLETING Reason=TimeLimit', 'SIGTERM', 'time limit', 85)])
def test_reasons(tmp_path, fake, job_now, came, reason, code):
    (fake/'job').write_text(f'JobId=7 JobName=x\n   TimeLimit=00:01:00 StartTime={time.strftime("%Y-%m-%dT%H:%M:%S")} {job_now}\n')
    found, said, seconds = stop(make_job(tmp_path, GOES_ON, 'print("never")', warning=120), run_in(tmp_path), came)
    truth = status(run_in(tmp_path))
    assert (truth['status'], truth['reason'], truth['signal'], found) == ('interrupted', reason, came, code), said
    assert 'closing' not in truth and seconds < 20
    check_records(run_in(tmp_path))


@pytest.mark.parametrize('came, most', [(['SIGTERM'], 2 + 8), (['SIGUSR2', 'SIGTERM'], 3 + 8)])
def test_a_deaf_cell_is_killed_in_time(tmp_path, fake, came, most):
    "KillWait is 8 s here, so a cell has 2 s after TERM; and USR2, which leaves more time, is overtaken by it"
    code, said, seconds = stop(make_job(tmp_path, DEAF, warning=60), run_in(tmp_path), *came)
    truth, nb = status(run_in(tmp_path)), nbformat.read(run_in(tmp_path)/'run.ipynb', 4)
    assert truth['status'] == 'interrupted' and truth['reason'] == 'cancelled' and code in (140, 143) and seconds < most
    assert truth['error']['type'] == 'InterruptIgnored' and 'ignored the interrupt' in nb.cells[0].source
    assert [s['signal'] for s in truth['signals']] == came and 'before' in str(nb.cells)
    check_records(run_in(tmp_path))


def test_killed_right_after_the_signal(tmp_path, fake):
    process, run = start(make_job(tmp_path, DEAF)), run_in(tmp_path)
    wait_for((run/'begun').exists)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.4)
    process.kill()
    end(process)
    truth = status(run)
    assert truth['status'] == 'interrupted' and truth['signal'] == 'SIGTERM' and truth['ended'] and truth['closing']
    nb = nbformat.read(run/'run.ipynb', 4)
    assert nb.metadata.caption_nb['status'] == 'interrupted' and '(SIGTERM)' in nb.cells[0].source or 'by SIGTERM' in nb.cells[0].source
    closed = close_attempts(run, 'cancelled')
    assert closed[0]['reason'] == 'cancelled' and closed[0]['status'] == 'interrupted' and not open_attempts(run)
    check_records(run)


def test_a_slow_answer_delays_nothing(tmp_path, fake):
    (fake/'slow').touch()
    code, said, seconds = stop(make_job(tmp_path, GOES_ON), run_in(tmp_path), 'SIGUSR2')
    assert code == 85 and status(run_in(tmp_path))['reason'] == 'interrupted' and seconds < 15


def test_signals_at_any_moment(tmp_path, fake):
    rng, found = random.Random(0), []
    job = make_job(tmp_path, *['import time; time.sleep(0.1)']*60)   # longer than the latest signal takes to come
    for i in range(6):
        with open(run_in(tmp_path)/'metrics.jsonl', 'a') as f: f.write('{"dev": {}}\n')   # it gets on
        process = start(job)
        time.sleep(0.35 + rng.random()*3.5)
        name = ('SIGTERM', 'SIGUSR2')[i % 2]
        process.send_signal(getattr(signal, name))
        code, said = end(process)
        found.append(code)
        assert code in ((143, 0, -15) if name == 'SIGTERM' else (85, 0, -12)), (name, code, said)   # negative: nobody listened yet
        for path in run_in(tmp_path).glob('attempt-*.ipynb'): nbformat.read(path, 4)
    if (run_in(tmp_path)/'status.json').exists(): check_records(run_in(tmp_path))
    assert set(found) & {85, 143}
    assert end(start(job, '--close', str(job), 'train', '0', '140'))[0] == 85


# processes that are gone

def test_driver_killed(tmp_path, fake):
    (fake/'job').write_text('JobId=7 JobName=x\n   JobState=RUNNING Restarts=0\n')
    job, run = make_job(tmp_path, GOES_ON, 'print()'), run_in(tmp_path)
    process = start(job)
    wait_for((run/'begun').exists)
    time.sleep(3)
    process.kill()
    end(process)
    assert Run(run).status == 'killed' and 'before' in (run/'run.ipynb').read_text()
    code, said = end(start(job, '--close', str(job), 'train', '0', '137'))
    truth = status(run)
    assert (code, truth['status'], truth['reason']) == (85, 'killed', 'papermill killed'), said
    assert abs(truth['seconds'] - 4) < 4 and 'was killed' in nbformat.read(run/'run.ipynb', 4).cells[0].source
    assert Run(run).reason == 'papermill killed' and 'papermill killed' in runs.list_runs(tmp_path).status[0]
    check_records(run)
    truth = status(run)
    assert end(start(job, '--close', str(job), 'train', '0', '137'))[0] == 137 and status(run) == truth   # nothing is left to close


def silent_attempt(run: Path, **changes) -> dict:
    run.mkdir(exist_ok=True)
    (run/'config.json').write_text('{}')
    record = runs.Record(run, 1)
    record.nb = dict(cells=[dict(cell_type='code', id='a', metadata={}, source='1', outputs=[], execution_count=None)], metadata={}, nbformat=4,
                     nbformat_minor=5)
    record.truth.update(changes)
    record.save()
    record.write_status()
    return record.truth


def test_what_still_runs_is_left_alone(tmp_path, monkeypatch):
    run = tmp_path/'run'
    silent_attempt(run)
    assert close_attempts(run, 'node failed') == [] and Run(run).status == 'running'
    silent_attempt(run, born='another')   # the number of a process that is gone was given to this one
    assert [a['reason'] for a in close_attempts(run, 'node failed')] == ['node failed']


def test_another_host(tmp_path, monkeypatch, fake):
    run, now = tmp_path/'run', dict(host='elsewhere', job=dict(job_id='7'))
    monkeypatch.setattr(jobs, 'HEARTBEAT', 0.4)
    def slurm_says(**info): monkeypatch.setattr(slurm, 'job_info', lambda *a, **k: info)
    def old(seconds): os.utime(run/'attempt-1.ipynb', (time.time() - seconds,)*2)
    silent_attempt(run, **now)
    assert Run(run).status == 'running'
    old(500)
    assert Run(run).status == 'killed'
    slurm_says(JobState='SUSPENDED', Restarts='0')
    assert close_attempts(run, 'x') == []
    slurm_says(JobState='RUNNING', Restarts='1')   # requeued, because SLURM has lost the node; its process goes on
    stop_beating = threading.Event()
    def beat():
        while not stop_beating.wait(0.2): os.utime(run/'attempt-1.ipynb')
    old(0)
    heart = threading.Thread(target=beat)
    heart.start()
    assert close_attempts(run, 'x') == []
    stop_beating.set(); heart.join()
    assert [a['reason'] for a in close_attempts(run, 'node failed')] == ['node failed']
    check_records(run)


def test_the_notebook_knows_more(tmp_path):
    "Two attempts wrote status.json at once, and the end of one was lost"
    run = tmp_path/'run'
    silent_attempt(run, born='another')
    nb = json.loads((run/'attempt-1.ipynb').read_text())
    nb['metadata']['caption_nb'].update(status='done', reason='done', ended='2026-01-01T00:00:00+00:00')
    (run/'attempt-1.ipynb').write_text(json.dumps(nb))
    assert [a['status'] for a in close_attempts(run, 'node failed')] == ['done'] and Run(run).status == 'done'
    (run/'status.json').unlink()
    silent_attempt(run, born='another')
    (run/'status.json').unlink()      # killed between making the notebook and noting it
    assert [a['attempt'] for a in open_attempts(run)] == [1]


def test_the_trainer_before_is_waited_for(tmp_path, capfd):
    run = tmp_path/'run'
    run.mkdir()
    lock = FileLock(run/'.lock', RuntimeError)
    holder = subprocess.Popen([sys.executable, '-c', f'from caption_nb.basics import FileLock; import time; l = FileLock({str(run/".lock")!r}, '
                               'RuntimeError).acquire(); print(1, flush=True); time.sleep(2)'], stdout=subprocess.PIPE)
    holder.stdout.readline()
    jobs.wait_for_trainer(run, 20)
    assert 'is being trained by process' in capfd.readouterr().err and holder.wait(20) == 0
    lock.acquire().release()


# the disk

@pytest.fixture
def small_disk(tmp_path):
    "A run folder on a disk of a megabyte"
    folder = tmp_path/'run-0'
    folder.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder], capture_output=True).returncode: pytest.skip('cannot mount')
    yield folder
    subprocess.run(['umount', '-l', folder])


def test_full_disk(tmp_path, small_disk, capfd):
    cells = ['''
import time, pathlib, itertools
full = pathlib.Path(run_dir, 'full')
print('earlier', flush=True)
time.sleep(3)
try: full.write_bytes(bytes(2_000_000))
except OSError: pass
for i in range(10): print('no room', i, flush=True); time.sleep(0.5)
full.unlink()
print('room again', flush=True)
time.sleep(4)''', 'print(1)']
    nb = make_job(tmp_path/'x', *cells)
    seen = []
    def look():
        while not seen or seen[-1] is not None:
            time.sleep(0.3)
            try: seen.append((small_disk/'run.ipynb').read_text())
            except OSError: continue
            if 'room again' in seen[-1]: seen.append(None)
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    truth = execute(nb/'own.ipynb', small_disk, dict(run_dir=str(small_disk)))
    assert truth['status'] == 'done' and 'No space left' in truth['faults'][0] and len(truth['faults']) == 1
    assert capfd.readouterr().err.count('could not be saved') == 1
    watcher.join(5)
    for text in filter(None, seen): json.loads(text)     # whole at every moment
    assert seen[-1] is None and any('no room' in t for t in filter(None, seen))
    assert not list(small_disk.glob('.*')) and 'faults' in nbformat.read(small_disk/'run.ipynb', 4).metadata.caption_nb


def test_the_end_cannot_be_written(tmp_path, small_disk):
    (small_disk/'config.json').write_text('{}')
    job = make_job(tmp_path/'x', "import pathlib\nf = open(pathlib.Path(run_dir, 'full'), 'wb')\ntry:\n    while True: f.write(bytes(4096)); "
                   "f.flush()\nexcept OSError: print('x'*2000)")
    write_job(job, read_job(job) | dict(tasks=[dict(run=str(small_disk))]))
    code, said = end(start(job))
    assert code == 1 and 'could not be written' in said and 'No space left' in said
    assert nbformat.read(small_disk/'attempt-1.ipynb', 4).cells


def test_no_output_is_older_than_three_seconds(tmp_path, monkeypatch):
    "Saving takes 0.7 s here"
    run = tmp_path/'run-0'
    job = make_job(tmp_path, 'import time\nfor i in range(40): print("at", time.time(), flush=True); time.sleep(0.2)')
    def slow(path, content, write=runs.atomic_write):
        if path.name.startswith('attempt'): time.sleep(0.7)
        return write(path, content)
    monkeypatch.setattr(runs, 'atomic_write', slow)
    ages, ended = [], threading.Event()
    def look():
        begun = 0.
        while not ended.wait(0.1):
            text = (run/'run.ipynb').read_text() if (run/'run.ipynb').exists() else ''
            times = [float(t) for t in re.findall(r'at (\d+\.\d+)', text)]
            begun = begun or (times[0] if times else 0.)
            if begun and time.time() < begun + 7.5: ages.append(time.time() - times[-1])
    watcher = threading.Thread(target=look)
    watcher.start()
    truth = execute(job/'own.ipynb', run)
    ended.set(); watcher.join()
    assert truth['status'] == 'done' and len(ages) > 20 and max(ages) < 3.3, max(ages)


def test_a_character_that_is_none(tmp_path):
    "Half of a pair of UTF-16, which a kernel can send but no file can hold"
    record = runs.Record(tmp_path, 1)
    record.nb = new_notebook(cells=[new_code_cell('1', outputs=[nbformat.v4.new_output('stream', text='half: \ud83d')])])
    for save in (record.save, record.finish):
        save()
        assert json.loads(record.path.read_text())['cells'][0]['outputs'][0]['text'] in ('half: \ud83d', ['half: \ud83d'])


# features on the node

@pytest.fixture
def store(tmp_path) -> Path:
    path = tmp_path/'shared'/'features.h5'
    path.parent.mkdir()
    path.write_bytes(random.Random(0).randbytes(3_000_000))
    return path


def test_staging_finds_what_is_there_and_mends_it(tmp_path, store):
    copy = stage_features(store, tmp_path/'node')
    made = copy.stat().st_mtime_ns
    assert copy != store and copy.read_bytes() == store.read_bytes() and stage_features(store, tmp_path/'node').stat().st_mtime_ns == made
    with open(copy, 'r+b') as f: f.seek(1000); f.write(b'damage')
    assert stage_features(store, tmp_path/'node').read_bytes() == store.read_bytes()
    with open(copy, 'r+b') as f: f.truncate(1000)
    assert stage_features(store, tmp_path/'node').read_bytes() == store.read_bytes()
    store.write_bytes(b'another content')
    assert stage_features(store, tmp_path/'node').read_bytes() == b'another content'


def test_staging_without_room(tmp_path, store, monkeypatch, capfd):
    monkeypatch.setattr(jobs.shutil, 'disk_usage', lambda p: SimpleNamespace(free=1000))
    assert stage_features(store, tmp_path/'node') == store.resolve() and 'are free); read from' in capfd.readouterr().err
    assert stage_features(store, '/proc/nowhere') == store.resolve()


def test_staging_compares(tmp_path, store, monkeypatch, capfd):
    digests = iter(['one', 'another'])
    monkeypatch.setattr(jobs, '_digest', lambda *a: next(digests))
    assert stage_features(store, tmp_path/'node') == store.resolve() and 'differs from the original' in capfd.readouterr().err
    assert not [p for p in (tmp_path/'node').rglob('*') if p.is_file()]


def test_staging_killed_and_two_at_once(tmp_path, store):
    store.write_bytes(bytes(200_000_000))
    one = start(tmp_path, '--stage', str(store), str(tmp_path/'node'))
    wait_for(lambda: list((tmp_path/'node').rglob('*.partial')))
    one.kill(); end(one)
    both = [start(tmp_path, '--stage', str(store), str(tmp_path/'node')) for _ in range(2)]
    found = [end(p) for p in both]
    paths = {said.splitlines()[0] for _, said in found}
    assert [code for code, _ in found] == [0, 0] and len(paths) == 1 and sum('copied to' in said for _, said in found) == 1
    assert Path(paths.pop()).stat().st_size == 200_000_000 and not list((tmp_path/'node').rglob('*.partial'))


def test_extract_and_stage(tmp_path, monkeypatch):
    "Features are extracted once for two runs, copied, and the notebook reads the copy; the configuration keeps the original"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    small = Config(encoder='mobilenetv3_small_050', encoder_weights='random', image_size=64, num_images=40, data='scenes')
    form = "run_dir = ''\nfeatures = ''\n" + ''.join(f'{name} = {value!r}\n' for name, value in small.changed().items())
    job = make_job(tmp_path, "import json\nc = json.load(open(run_dir + '/config.json')); c['features'] = features\n"
                   "json.dump(c, open(run_dir + '/config.json', 'w')); print(features)", tasks=2, form=form, config=small.to_dict(),
                   copy_features=True, scratch=str(tmp_path/'node'))
    write_job(job, read_job(job) | dict(steps=['extract', 'train']))
    assert not step_done(job, 'extract')
    code, said = end(start(job, str(job), 'extract', '0'), 120)
    assert code == 0 and step_done(job, 'extract'), said
    assert len(list((tmp_path/'cache').rglob('*.h5'))) == 1
    code, said = end(start(job, str(job), 'train', '0', '1'))      # INDEX and FIRST
    assert code == 0, said
    printed = nbformat.read(tmp_path/'run-1'/'run.ipynb', 4).cells[-1].outputs[0].text.strip()
    assert printed.startswith(str(tmp_path/'node')) and Path(printed).is_file()
    assert json.loads((tmp_path/'run-1'/'config.json').read_text())['features'] == '' and not (tmp_path/'run-1'/'.features.json').exists()


def test_extraction_of_what_has_no_photos_fetches_no_weights(tmp_path, monkeypatch):
    "Features that came with the data need no network: that is said before one is brought here"
    data = CaptionData('course', None, {'a': ['a dog'], 'b': ['a cat']}, dict(train=['a'], dev=['b']),
                       features=dict(fc7=ArraySource('fc7', (1, 8), 'float16', [])))
    monkeypatch.setattr(training, 'prepare_data', lambda config: data)
    monkeypatch.setattr(training, 'make_encoder', lambda *args, **kwargs: pytest.fail('weights would be fetched'))
    (tmp_path/'config.json').write_text(Config(data='course').to_json())
    with pytest.raises(ConfigError, match="encoder='given:fc7'"): extract_features(tmp_path/'out.json', [tmp_path])


# what comes next

def attempt(reason, step=0, came='', status='interrupted', **more):
    return dict(status=status, reason=reason, signal=came or None, signals=[dict(signal=came, reason=reason)] if came else [],
                progress=[step, 0]) | more


@pytest.mark.parametrize('attempts, code', [
    ([attempt('done', status='done')], 0), ([attempt('done', status='done', unsaved='full')], 1),
    ([attempt('error', status='error')], 1), ([attempt('out of memory', status='error')], 1),
    ([attempt('time limit', 5, 'SIGUSR2')], 85), ([attempt('time limit', 5, 'SIGTERM')], 85), ([attempt('preempted', 5, 'SIGUSR2')], 85),
    ([attempt('preempted', 5, 'SIGTERM')], 143), ([attempt('requeued', 5, 'SIGTERM')], 143), ([attempt('cancelled', 5, 'SIGTERM')], 143),
    ([attempt('interrupted', 5, 'SIGINT')], 130), ([attempt('interrupted', 5)], 130), ([attempt('interrupted', 5, 'SIGUSR2')], 85),
    ([attempt('kernel killed', 5, status='kernel died')], 85), ([attempt('kernel killed', 5, status='kernel died')]*2, 1),
    ([attempt('papermill killed', status='killed')], 85), ([attempt('out of memory', status='killed')], 1),
    ([attempt('time limit', 0, 'SIGUSR2')]*2, 85), ([attempt('time limit', 0, 'SIGUSR2')]*3, 1),
    ([attempt('time limit', 5, 'SIGUSR2')]*3, 85), ([attempt('time limit', 5, 'SIGUSR2')]*4, 1),
    ([attempt('time limit', s, 'SIGUSR2') for s in (5, 5, 5, 6)], 85)])
def test_policy(attempts, code):
    assert next_code(attempts, PROFILE)[0] == code
    if code == 85: assert next_code(attempts, PROFILE | dict(requeue=False))[0] != 85


@given(st.lists(st.tuples(st.sampled_from(sorted({*jobs.AGAIN, *jobs.KILLED})), st.integers(0, 3)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_no_run_goes_round_for_ever(history):
    attempts = [attempt(reason, step, 'SIGUSR2') for reason, step in history]
    if next_code(attempts, PROFILE)[0] == 85 and len(attempts) > 3: assert len({a['progress'][0] for a in attempts[-4:]}) > 1


def test_progress_is_read_without_torch(tmp_path):
    import torch
    (tmp_path/'checkpoints'/'last').mkdir(parents=True)
    assert progress(tmp_path) == [0, 0]
    for step in (7, 300, 70_000):
        torch.save(dict(step=step, epoch=1, optimizer=dict(step=torch.zeros(2))), tmp_path/'checkpoints'/'last'/'training.pt')
        (tmp_path/'metrics.jsonl').write_text('{"step": 1}\n{"step": 2, "dev": {}}\n')
        assert progress(tmp_path) == [step, 1]
    code = f'import sys; from caption_nb.jobs import progress; progress({str(tmp_path)!r}); sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


# in a real SLURM

ONCE_MORE = '''import pathlib, time
again = pathlib.Path(run_dir, 'attempt-2.ipynb').exists()
pathlib.Path(run_dir, 'begun').touch()
with open(pathlib.Path(run_dir, 'metrics.jsonl'), 'a') as f: print('{"dev": {}}', file=f)
if not again: time.sleep(600)'''


def test_ends_in_slurm(tmp_path, cluster):
    "Five jobs, each ended otherwise while its first attempt runs: the reasons are right, and all but the cancelled one are done in the end"
    from caption_nb.profiles import Profile, batch_script
    ways = ('scancel', 'requeue', 'driver', 'kernel', 'warned')
    profile, code = Profile(name='x', partition='debug', cpus=1, memory='500M', time='10:00'), Path(jobs.__file__).parent.parent
    ids, run_folders = {}, {way: tmp_path/way/'run-0' for way in ways}
    for way in ways:
        job = make_job(tmp_path/way, ONCE_MORE, **profile.to_dict())
        words = ['-m', 'caption_nb.jobs', job, 'train', '0']
        script = batch_script(profile, way, words, [*words[:2], '--close', *words[2:]], job/'log-%j.txt', code, tmp_path)
        (job/'train.sh').write_text(script)
        ids[way] = slurm.submit(job/'train.sh')
    for run in run_folders.values(): wait_for((run/'begun').exists, 120)
    time.sleep(1)
    driver = {way: status(run)['pid'] for way, run in run_folders.items()}
    cluster.run('scancel', ids['scancel'])
    cluster.run('scontrol', 'requeue', ids['requeue'])
    cluster.run('scancel', '-b', '-s', 'USR2', ids['warned'])   # as SLURM warns
    kernel = subprocess.run(['pgrep', '-P', str(driver['kernel'])], capture_output=True, text=True).stdout.split()[0]
    os.kill(int(kernel), signal.SIGKILL)
    os.kill(driver['driver'], signal.SIGKILL)
    def said(way): return ''.join(p.read_text() for p in (tmp_path/way/'job').glob('log-*'))
    for way in ways: cluster.wait(ids[way], 'CANCELLED' if way == 'scancel' else 'COMPLETED', 120)
    first = {way: status(run)['attempts'][0] for way, run in run_folders.items()}
    assert {way: a['reason'] for way, a in first.items()} == dict(
        scancel='cancelled', requeue='requeued', driver='papermill killed', kernel='kernel killed', warned='preempted'), said('warned')
    assert [len(status(run)['attempts']) for run in run_folders.values()] == [1, 2, 2, 2, 2]
    for way, run in run_folders.items():
        check_records(run)
        assert status(run)['status'] == ('interrupted' if way == 'scancel' else 'done'), said(way)
