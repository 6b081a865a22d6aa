"""SLURM's commands as functions: against a real SLURM; with small scripts in its place only where the real one cannot be made to fail that way."""
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, _cluster
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb import slurm
from caption_nb.slurm import SlurmError

SPY = '''#!/bin/bash
#SBATCH --partition={partition} --cpus-per-task={cpus} --output={folder}/%x-%j.log --open-mode=append --time=10
#SBATCH --comment=spy
exec {python} {program} {folder}
'''
PROGRAM = '''import json, os, signal, sys, time
from datetime import datetime
from pathlib import Path
from caption_nb.slurm import stop_reason, this_job
started = datetime.now().astimezone().isoformat(timespec='seconds')
restart = os.environ.get('SLURM_RESTART_COUNT', '0')
note = Path(sys.argv[1])/f"{os.environ['SLURM_JOB_NAME']}-{restart}"
def stop(number, frame):
    name = signal.Signals(number).name
    begin = time.monotonic()
    with note.open('a') as f: print(name, stop_reason(name, started, warning=30).replace(' ', '-'), f'{time.monotonic() - begin:.1f}', file=f)
    if name == 'SIGTERM': os._exit(143)
for s in (signal.SIGTERM, signal.SIGUSR2): signal.signal(s, stop)
ids = {k.lower(): os.environ['SLURM_' + k] for k in ('JOB_ID', 'RESTART_COUNT', 'ARRAY_JOB_ID', 'ARRAY_TASK_ID') if 'SLURM_' + k in os.environ}
note.with_suffix('.json').write_text(json.dumps(dict(started=started, job=ids, pid=os.getpid(), name=this_job())))
while True: time.sleep(1)
'''


def until(condition, timeout=40., every=0.2):
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < end, f'not within {timeout} s'
        time.sleep(every)
    return found


def script(folder: Path, text: str = 'sleep 0.1', *options: str) -> Path:
    "A batch script of its own"
    path = folder/f'{len(list(folder.glob("*.sh")))}.sh'
    path.write_text('\n'.join(['#!/bin/bash', *(f'#SBATCH {o}' for o in (f'--output={folder}/%A_%a.log', *options)), text, '']))
    return path


@pytest.fixture(scope='module')
def strict_cluster(tmp_path_factory):
    "Accounting, limits that are enforced at submission, a node more"
    yield from _cluster(tmp_path_factory, accounting=True, nodes=3, grace=3, AccountingStorageEnforce='limits,qos,associations', EnforcePartLimits='ALL',
                        MaxArraySize=101, AccountingStoreFlags='job_comment')


@pytest.fixture
def strict(strict_cluster, monkeypatch):
    monkeypatch.setenv('SLURM_CONF', str(strict_cluster.conf))
    return strict_cluster


@pytest.fixture
def plain(cluster, monkeypatch):
    monkeypatch.setenv('SLURM_CONF', str(cluster.conf))
    return cluster


@pytest.fixture
def fake(tmp_path, monkeypatch):
    "Commands that do what a line of shell says, in place of SLURM's"
    monkeypatch.setenv('PATH', f'{tmp_path}/bin')   # nothing of a real SLURM
    (tmp_path/'bin').mkdir()
    def make(**commands):
        for name, text in commands.items():
            path = tmp_path/'bin'/name
            path.write_text(f'#!/bin/bash\nPATH=/usr/bin:/bin\necho "$(basename $0) $*" >> {tmp_path}/calls\n{text}\n')
            path.chmod(0o755)
        return lambda: (tmp_path/'calls').read_text().splitlines()
    monkeypatch.setattr(time, 'sleep', lambda s: None)
    return make


# ---- why a job was stopped: every way, on the real one ----------------------------------------------------------

def test_every_way_to_stop_a_job_has_its_reason(strict, tmp_path):
    program = tmp_path/'spy.py'
    program.write_text(PROGRAM)

    def start(name, *options, partition='low', cpus=1):
        text = SPY.format(partition=partition, cpus=cpus, folder=tmp_path, python=sys.executable, program=program)
        path = tmp_path/f'{name}.sh'
        path.write_text(text.replace('#SBATCH --comment=spy', '\n'.join(f'#SBATCH {o}' for o in (f'--job-name={name}', f'--chdir={ROOT}', *options))))
        return slurm.submit(path)

    def notes(name, restart=0): return (tmp_path/f'{name}-{restart}').read_text().split('\n') if (tmp_path/f'{name}-{restart}').exists() else []
    def attempt(name, restart=0): return json.loads((tmp_path/f'{name}-{restart}.json').read_text())
    def said(name, lines=1):
        until(lambda: len(notes(name)) > lines)
        return [line.split()[:2] for line in notes(name)[:lines]]

    jobs = {n: start(n, '--nodelist=n1') for n in ('crash', 'killed')} | dict(norequeue=start('norequeue', '--nodelist=n1', '--no-requeue'))
    jobs |= {n: start(n, '--nodelist=n2') for n in ('cancel', 'requeue', 'limit', 'byhand')}
    jobs |= dict(warned=start('warned', '--nodelist=n2', '--signal=B:USR2@30'), graced=start('graced', '--nodelist=n3', '--signal=B:USR2@30', cpus=4),
                 sudden=start('sudden', '--nodelist=n3', partition='low0', cpus=4))
    until(lambda: all((tmp_path/f'{n}-0.json').exists() for n in jobs))
    began = time.monotonic()

    strict.run('scontrol', 'update', f'jobid={jobs["limit"]}', 'EndTime=now+1')
    strict.run('scontrol', 'update', f'jobid={jobs["warned"]}', 'EndTime=now+50')
    high = strict.sbatch('sleep 1', '--partition=high', '--nodelist=n3', '--cpus-per-task=8')
    slurm.cancel([jobs['cancel'], 999999])
    assert slurm.requeue(jobs['requeue']) and not slurm.requeue(999999)
    os.kill(attempt('byhand')['pid'], signal.SIGTERM)
    os.kill(attempt('killed')['pid'], signal.SIGKILL)

    until(lambda: time.monotonic() > began + 12)   # SLURM would not miss a younger job
    strict.crash('n1')
    strict.start_slurmd('n1')
    assert said('cancel') == [['SIGTERM', 'cancelled']]
    assert said('requeue') == [['SIGTERM', 'requeued']]
    assert said('byhand') == [['SIGTERM', 'interrupted']]
    assert said('warned') == [['SIGUSR2', 'time-limit']]
    assert said('sudden') == [['SIGTERM', 'preempted']]
    assert said('graced', 2) == [['SIGUSR2', 'preempted'], ['SIGTERM', 'preempted']]

    until(lambda: strict.state(jobs['norequeue']) == 'NODE_FAIL' and (tmp_path/'crash-1.json').exists())
    assert not notes('crash') and not notes('killed')
    assert said('limit') == [['SIGTERM', 'time-limit']]
    slow = [line for n in jobs for line in notes(n) if line and float(line.split()[2]) > 3]
    assert not slow, 'a job has only seconds'

    expected = dict(crash='node failed', norequeue='node failed', killed='papermill killed', cancel='cancelled', requeue='requeued', limit='time limit',
                    sudden='preempted', graced='preempted')
    found = {n: slurm.silent_reason(attempt(n)) for n in expected}
    assert found == expected, 'with sacct'
    with pytest.MonkeyPatch.context() as patch:   # the words in the logs and scontrol are enough
        patch.setattr(slurm, 'history', lambda ids: {})
        assert {n: slurm.silent_reason(attempt(n)) for n in expected} == expected, 'without sacct'
        patch.setattr(slurm, 'job_info', lambda job: {})   # SLURM has forgotten it: only the log is left
        logs = {n: tmp_path/f'{n}-{jobs[n]}.log' for n in ('cancel', 'requeue', 'limit', 'sudden', 'graced')}
        assert {n: slurm.silent_reason(attempt(n), log) for n, log in logs.items()} == {n: expected[n] for n in logs}
    slurm.cancel([*jobs.values(), high])


def test_tasks_of_an_array_are_told_apart(strict, tmp_path):
    "The last task of an array has the id of the array: asked by that id SLURM shows, and requeues, all of them"
    path = script(tmp_path, f'env | grep ^SLURM_ > {tmp_path}/env-$SLURM_ARRAY_TASK_ID-${{SLURM_RESTART_COUNT:-0}}; sleep 30', '--partition=low')
    job = slurm.submit(path, array='0-1')
    until(lambda: len(list(tmp_path.glob('env-?-0'))) == 2)
    last = dict(line.split('=', 1) for line in (tmp_path/'env-1-0').read_text().splitlines() if '=' in line)
    assert last['SLURM_JOB_ID'] == str(job)
    name = slurm.this_job(last)
    assert name == f'{job}_1' and slurm.job_info(name)['ArrayTaskId'] == '1' and slurm.job_info(job)['JobId'] == str(job)
    assert slurm.requeue(name)
    until(lambda: len(slurm.history([name]).get(name, [])) == 2)
    past = slurm.history([job])
    assert [s['state'] for s in past[name]][0] == 'REQUEUED' and len(past[f'{job}_0']) == 1 and past[str(job)] == past[name]
    slurm.cancel([f'{job}_0', name])
    until(lambda: not slurm.queue([job]))


# ---- submitting and looking -------------------------------------------------------------------------------------

def test_a_queue_of_arrays_and_chains(plain, tmp_path):
    first = slurm.submit(script(tmp_path, 'sleep 20'), array='0-7%2')
    then = slurm.submit(script(tmp_path), after=[('aftercorr', first)], array='0-7')
    held = slurm.submit(script(tmp_path, 'true', '--job-name="a b|c Restarts=7"'), hold=True)
    jobs = until(lambda: (q := slurm.queue([first, then, held])) and sum(j.state == 'RUNNING' for j in q.values()) == 2 and q)
    assert sorted(jobs) == sorted([str(held), *(f'{j}_{t}' for j in (first, then) for t in range(8))])
    running = jobs[f'{first}_0']
    assert running.nodes in ('n1', 'n2', 'n[1-2]') and 0 < running.left <= 600 and slurm.when(running.start)
    waiting = slurm.queue([f'{first}_7', then])
    assert len(waiting) == 9 and waiting[f'{first}_7'].reason == 'JobArrayTaskLimit' and waiting[f'{then}_3'].reason == 'Dependency'
    assert jobs[str(held)].state == 'PENDING' and jobs[str(held)].reason.startswith('JobHeld')
    info = slurm.job_info(held)
    assert info['JobName'] == 'a b|c Restarts=7' and info['Restarts'] == '0'
    slurm.cancel([f'{first}_[2-7]'])
    assert len(slurm.queue([first])) <= 4   # two that end
    slurm.cancel([first])
    until(lambda: not slurm.queue([first]))
    until(lambda: not slurm.queue([then]), 20)   # what waits for what was cancelled goes by itself
    slurm.cancel([held, held, 999999])
    assert slurm.queue([held, 999999]) == {} and slurm.job_info(999999) == {}
    assert slurm.history([first, held, 999999]) == {}   # no accounting here: no history, and no fuss


def test_an_estimate_and_the_settings(plain, tmp_path):
    said = slurm.test(script(tmp_path, 'true', '--ntasks=2'), array='0-3')
    assert 'to start at' in said and 'sbatch:' not in said
    assert slurm.queue() == {}
    found = slurm.site()
    assert found['KillWait'] == 5 and found['MaxArraySize'] == 1001 and found['PreemptType'] == 'preempt/partition_prio'


def test_a_job_gets_the_environment_and_not_that_of_an_enclosing_job(plain, tmp_path, monkeypatch):
    given = dict(MY_PROXY='http://x y;$(z)', SBATCH_PARTITION='nowhere', SBATCH_ARRAY_INX='0-3', SLURM_ARRAY_TASK_ID='9', SLURM_JOB_ID='1', RANK='3',
                 SLURM_CPUS_PER_TASK='7', XDG_RUNTIME_DIR='/run/user/1', CUDA_VISIBLE_DEVICES='5', TMPDIR=str(tmp_path), SLURM_TIME_FORMAT='relative')
    for name, value in given.items(): monkeypatch.setenv(name, value)
    job = slurm.submit(script(tmp_path, f'env -0 > {tmp_path}/env.part; mv {tmp_path}/env.part {tmp_path}/env', '--partition=debug'))
    got = dict(line.split('=', 1) for line in until(lambda: (tmp_path/'env').exists() and (tmp_path/'env').read_text()).split('\0') if '=' in line)
    assert got['MY_PROXY'] == given['MY_PROXY'] and got['SLURM_JOB_ID'] == str(job) and got['HOME'] == os.environ['HOME']
    assert not got.keys() & {'RANK', 'XDG_RUNTIME_DIR', 'SLURM_ARRAY_TASK_ID', 'CUDA_VISIBLE_DEVICES', 'SBATCH_ARRAY_INX', 'SLURM_TIME_FORMAT'}
    assert got.get('TMPDIR') != given['TMPDIR'] and got.get('SLURM_CPUS_PER_TASK') != '7'


# ---- refusals ---------------------------------------------------------------------------------------------------

REFUSED = {
    '--partition=debgu': ('invalid partition specified: debgu', "did you mean 'debug'?"), '--account=nobody': ('Invalid account', 'account default'),
    '--qos=nix': ('Invalid qos', 'normal'), '--gres=gpu:3': ('node configuration', 'gpu:fake:2'), '--gres=tpu:1': ('generic resource', 'gpu:fake:2'),
    '--gpus-per-node=v100:1': ('node configuration', 'gpu:fake:2'), '--mem=100G': ('Memory specification', '6000 MB'),
    '--cpus-per-task=400': ('More processors', '8 cores'), '--nodes=9': ('Node count', '3 nodes'), '--constraint=v100': ('feature', '`constraint`'),
    '--nodelist=n9': ('node name', '`nodes`'), '--time=1:99:xx': ('--time', 'hours:minutes'), '--array=0-500': ('array', '0 to 100'), '--array=a': ('array', '0 to 100'),
    '--dependency=bla:1': ('dependency', 'ended long ago'), '--reservation=foo': ('reservation', 'scontrol show reservation'), '--licenses=foo': ('license', 'license'),
    '--frobnicate': ('frobnicate', 'man sbatch'), '--signal=B:FOO@10': ('--signal', 'man sbatch'), '--mail-type=XX': ('--mail-type', 'man sbatch')}


@pytest.mark.parametrize('option', REFUSED)
def test_slurms_own_words_are_kept_and_explained(strict, tmp_path, option):
    words, hint = REFUSED[option]
    with pytest.raises(SlurmError) as e: slurm.submit(script(tmp_path, 'true', option))
    message = str(e.value)
    assert words in message.splitlines()[0] + message.splitlines()[1] and hint in message and len(message.splitlines()) >= 2
    with pytest.raises(SlurmError): slurm.test(script(tmp_path, 'true', option))


def test_refusals_that_a_cluster_has_to_be_set_up_for(strict, tmp_path):
    def refusal(*options, **kw):
        with pytest.raises(SlurmError) as e: slurm.submit(script(tmp_path, 'true', *options), **kw)
        return str(e.value)
    strict.run('scontrol', 'update', 'partition=low', 'MaxTime=10')
    message = refusal('--partition=low', '--time=60')
    assert 'time limit is invalid' in message and 'at most 10:00' in message and 'debug' not in message
    strict.run('scontrol', 'update', 'partition=low', 'MaxTime=INFINITE', 'State=DRAIN')
    assert 'inactive or drain' in (message := refusal('--partition=low')) and 'take another' in message
    strict.run('scontrol', 'update', 'partition=low', 'State=UP')
    strict.run('sacctmgr', '-i', 'modify', 'user', 'root', 'set', 'MaxSubmitJobs=0')
    message = refusal()
    assert 'AssocMaxSubmitJobLimit' in message and 'as many jobs waiting as you may' in message
    strict.run('sacctmgr', '-i', 'modify', 'user', 'root', 'set', 'MaxSubmitJobs=-1')
    damaged = tmp_path/'dos.sh'
    damaged.write_bytes(b'#!/bin/bash\r\ntrue\r\n')
    with pytest.raises(SlurmError, match='damaged'): slurm.submit(damaged)


def test_no_slurm_here(fake, tmp_path):
    assert not slurm.available()
    for call in (slurm.require, lambda: slurm.submit(script(tmp_path)), slurm.queue, lambda: slurm.cancel([1])):
        with pytest.raises(SlurmError, match='--profile local'): call()
    assert slurm.job_info(1) == {} and slurm.history([1]) == {} and not slurm.requeue(1)
    fake(sbatch='true')
    with pytest.raises(SlurmError, match='incomplete'): slurm.queue()


# ---- a controller that does not answer --------------------------------------------------------------------------

AWAY = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'


def test_looking_tries_again(fake, tmp_path):
    calls = fake(sbatch='true', squeue=f'[ $(wc -l < {tmp_path}/calls) = 3 ] || {{ {AWAY}; }}; echo "7|RUNNING|0:05|0:55|n1|2026-03-02T15:12:28|None"')
    assert slurm.queue()['7'].left == 55
    assert len(calls()) == 3


def test_a_job_that_was_accepted_in_spite_of_an_error_is_not_submitted_twice(fake, tmp_path):
    calls = fake(sbatch='echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1',
                 squeue=f'echo "41|(null)"; echo "42|$(grep -o caption-nb-[0-9a-f]* {tmp_path}/calls | head -1)"')
    assert slurm.submit(script(tmp_path)) == 42
    assert sum(c.startswith('sbatch') for c in calls()) == 1


def test_submitting_gives_up_with_words(fake, tmp_path):
    calls = fake(sbatch='echo "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)" >&2; exit 1', squeue='true')
    with pytest.raises(SlurmError, match='controller does not answer'): slurm.submit(script(tmp_path), tries=3)
    assert sum(c.startswith('sbatch') for c in calls()) == 3
    fake(sbatch='echo "12;far"')
    assert slurm.submit(script(tmp_path)) == 12


def test_nothing_hangs(fake, monkeypatch):
    fake(sbatch='true', scontrol='exec sleep 30', sacct='exec sleep 30')
    begin = time.monotonic()
    assert slurm.job_info(1, timeout=0.3) == {} and slurm.history([1], timeout=0.3) == {} and not slurm.requeue(1, timeout=0.3)
    monkeypatch.setenv('SLURM_JOB_ID', '1')
    assert slurm.stop_reason('SIGTERM', timeout=0.3) == 'interrupted'
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize('sacct', ['echo "Slurm accounting storage is disabled" >&2; exit 1', 'echo "sacct: error: slurm_persist_conn_open: failed" >&2; exit 1', 'true'])
def test_no_accounting_is_no_history(fake, sacct, capfd):
    fake(sbatch='true', sacct=sacct)
    assert slurm.history([1, '2_3']) == {}
    assert capfd.readouterr() == ('', '')


# ---- out of memory ----------------------------------------------------------------------------------------------

def test_memory_kills_are_counted_in_both_kinds_of_cgroup(tmp_path):
    two = tmp_path/'two'/'system.slice/slurmstepd.scope/job_12/step_batch/user/task_0'
    one = tmp_path/'one'/'memory/slurm/uid_0/job_12/step_batch/task_0'
    for folder in (two, one): folder.mkdir(parents=True)
    (two.parents[2]/'memory.events').write_text('low 0\noom 3\noom_kill 2\n')
    (two.parents[3]/'memory.events').write_text('oom_kill 9\n')   # other jobs' too
    (one.parent/'memory.oom_control').write_text('oom_kill_disable 0\nunder_oom 0\noom_kill 1\n')
    proc = tmp_path/'cgroup'
    proc.write_text('0::/system.slice/slurmstepd.scope/job_12/step_batch/user/task_0\n')
    assert slurm.oom_kills(proc, tmp_path/'two') == 2
    proc.write_text('4:cpu:/slurm/uid_0/job_12\n3:memory:/slurm/uid_0/job_12/step_batch/task_0\n0::/\n')
    assert slurm.oom_kills(proc, tmp_path/'one') == 1
    proc.write_text('0::/user.slice\n')
    assert slurm.oom_kills(proc, tmp_path/'two') == 0 and slurm.oom_kills(tmp_path/'none') == 0


# ---- parsers ----------------------------------------------------------------------------------------------------

@given(st.integers(0, 400), st.integers(0, 86399))
@settings(max_examples=50, deadline=None)
def test_durations_are_read_as_slurm_writes_them(days, rest):
    h, m, s = rest//3600, rest % 3600//60, rest % 60
    written = {f'{days}-{h:02d}:{m:02d}:{s:02d}', *([f'{h}:{m:02d}:{s:02d}'] if not days else []), *([f'{m}:{s:02d}'] if not days and not h else [])}
    assert {slurm.seconds(w) for w in written} == {days*86400 + rest}


@given(st.text(st.characters(blacklist_categories=['Cs', 'Cc', 'Zl', 'Zp']), min_size=1).map(str.strip).filter(bool))
@settings(max_examples=100, deadline=None)
def test_a_name_is_no_field(name):
    text = f'JobId=9 JobName={name}\n   JobState=RUNNING Reason=None\n   Requeue=1 Restarts=2 ExitCode=0:0\n   StdErr=/x/{name}'
    found = slurm.fields(text)
    assert (found['JobState'], found['Restarts'], found['JobName']) == ('RUNNING', '2', name) and found['StdErr'] == f'/x/{name}'


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_parsers_take_anything(text):
    slurm.seconds(text), slurm.fields(text), slurm.queue_lines(text), slurm.history_lines(text), slurm.config_lines(text), slurm.node_lines(text), slurm.when(text)
    info = slurm.fields(text)
    assert isinstance(slurm.why('SIGTERM', {k: v for k, v in info.items() if k != 'Restarts'}, 0), str)
