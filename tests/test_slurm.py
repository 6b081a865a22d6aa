"""SLURM's commands as functions, against a real SLURM; small scripts take its place only where it cannot be made to fail that way."""
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
#SBATCH --job-name={name} --partition={partition} --cpus-per-task={cpus} --time=10
#SBATCH --output={folder}/%x-%j.log --open-mode=append --chdir={root}
exec {python} {folder}/spy.py {folder}
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
    reason = stop_reason(name, started, warning=30)
    with note.open('a') as f: print(name, reason, f'{time.monotonic() - begin:.1f}', file=f)
    if name == 'SIGTERM': os._exit(143)
for s in (signal.SIGTERM, signal.SIGUSR2): signal.signal(s, stop)
ids = {k.lower(): os.environ['SLURM_' + k] for k in ('JOB_ID', 'RESTART_COUNT') if 'SLURM_' + k in os.environ}
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
    yield from _cluster(tmp_path_factory, accounting=True, nodes=3, grace=3, EnforcePartLimits='ALL', MaxArraySize=101,
                        AccountingStorageEnforce='limits,qos,associations')


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

class Spies:
    "Jobs that write down why they were stopped, by name"
    def __init__(self, cluster, folder: Path):
        self.cluster, self.folder, self.ids = cluster, folder, {}
        (folder/'spy.py').write_text(PROGRAM)

    def start(self, name, *options, partition='low', cpus=1):
        text = SPY.format(name=name, partition=partition, cpus=cpus, folder=self.folder, python=sys.executable, root=ROOT)
        path = self.folder/f'{name}.sh'
        path.write_text(text.replace('exec', ''.join(f'#SBATCH {o}\n' for o in options) + 'exec'))
        self.ids[name] = slurm.submit(path)

    def runs(self, name, restart=0) -> bool: return (self.folder/f'{name}-{restart}.json').exists()
    def attempt(self, name) -> dict: return json.loads((self.folder/f'{name}-0.json').read_text())
    def log(self, name) -> Path: return self.folder/f'{name}-{self.ids[name]}.log'

    def notes(self, name) -> list[str]:
        path = self.folder/f'{name}-0'
        return path.read_text().split('\n')[:-1] if path.exists() else []

    def said(self, name, lines=1) -> list[str]: # 'SIGTERM cancelled'
        until(lambda: len(self.notes(name)) >= lines)
        return [line.rpartition(' ')[0] for line in self.notes(name)]


@pytest.fixture(scope='module')
def spies(strict_cluster, tmp_path_factory):
    "Jobs that are stopped in every way, beginning now"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SLURM_CONF', str(strict_cluster.conf))
        s = Spies(strict_cluster, tmp_path_factory.mktemp('spies'))
        for name, more in dict(crash=(), norequeue=('--no-requeue',), killed=()).items(): s.start(name, '--nodelist=n1', *more)
        for name in ('cancel', 'requeue', 'limit', 'byhand'): s.start(name, '--nodelist=n2')
        s.start('warned', '--nodelist=n2', '--signal=B:USR2@30')
        s.start('graced', '--nodelist=n3', '--signal=B:USR2@30', cpus=4)
        s.start('sudden', '--nodelist=n3', partition='low0', cpus=4)
        until(lambda: all(s.runs(n) for n in s.ids))
        s.cluster.run('scontrol', 'update', f'jobid={s.ids["limit"]}', 'EndTime=now+1')   # SLURM looks every 30 s
        s.cluster.run('scontrol', 'update', f'jobid={s.ids["warned"]}', 'EndTime=now+50')
        s.cluster.sbatch('sleep 1', '--partition=high', '--nodelist=n3', '--cpus-per-task=8')
        slurm.cancel([s.ids['cancel'], 999999])
        assert slurm.requeue(s.ids['requeue']) and not slurm.requeue(999999)
    os.kill(s.attempt('byhand')['pid'], signal.SIGTERM)
    os.kill(s.attempt('killed')['pid'], signal.SIGKILL)
    return s


@pytest.mark.parametrize('name, said', dict(cancel=['SIGTERM cancelled'], requeue=['SIGTERM requeued'], byhand=['SIGTERM interrupted']).items())
def test_a_job_knows_why_it_is_stopped(spies, name, said): assert spies.said(name) == said


def test_a_node_that_failed_left_no_word(spies, strict):
    strict.wait(spies.ids['killed'], 'FAILED')
    strict.crash('n1')
    strict.start_slurmd('n1')
    until(lambda: strict.state(spies.ids['norequeue']) == 'NODE_FAIL' and spies.runs('crash', restart=1))
    for name in ('crash', 'norequeue', 'killed'): assert not spies.notes(name)


def test_tasks_of_an_array_are_told_apart(strict, tmp_path):
    "The last task of an array has the id of the array: asked by that id SLURM shows, and requeues, all of them"
    path = script(tmp_path, f'env | grep ^SLURM_ > {tmp_path}/env-$SLURM_ARRAY_TASK_ID-${{SLURM_RESTART_COUNT:-0}}\nsleep 30')
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
    given = dict(MY_PROXY='http://x y;$(z)', SBATCH_PARTITION='nowhere', SBATCH_ARRAY_INX='0-3', SLURM_ARRAY_TASK_ID='9', SLURM_JOB_ID='1',
                 SLURM_CPUS_PER_TASK='7', SLURM_TIME_FORMAT='relative', RANK='3', XDG_RUNTIME_DIR='/run/user/1', CUDA_VISIBLE_DEVICES='5',
                 TMPDIR=str(tmp_path))
    for name, value in given.items(): monkeypatch.setenv(name, value)
    job = slurm.submit(script(tmp_path, f'env -0 > {tmp_path}/env.part; mv {tmp_path}/env.part {tmp_path}/env', '--partition=debug'))
    until((tmp_path/'env').exists)
    got = dict(line.split('=', 1) for line in (tmp_path/'env').read_text().split('\0') if '=' in line)
    assert got['MY_PROXY'] == given['MY_PROXY'] and got['SLURM_JOB_ID'] == str(job) and got['HOME'] == os.environ['HOME']
    gone = {'RANK', 'XDG_RUNTIME_DIR', 'SLURM_ARRAY_TASK_ID', 'CUDA_VISIBLE_DEVICES', 'SBATCH_ARRAY_INX', 'SLURM_TIME_FORMAT'}
    assert not got.keys() & gone
    assert got.get('TMPDIR') != given['TMPDIR'] and got.get('SLURM_CPUS_PER_TASK') != '7'


# ---- refusals ---------------------------------------------------------------------------------------------------

REFUSED = {   # option → SLURM's words, ours
    '--partition=debgu': ('invalid partition specified: debgu', "did you mean 'debug'?"),
    '--account=nobody': ('Invalid account', 'account default'),
    '--qos=nix': ('Invalid qos', 'normal'),
    '--gres=gpu:3': ('node configuration', 'gpu:fake:2'),
    '--gres=tpu:1': ('generic resource', 'gpu:fake:2'),
    '--gpus-per-node=v100:1': ('node configuration', 'gpu:fake:2'),
    '--mem=100G': ('Memory specification', '6000 MB'),
    '--cpus-per-task=400': ('More processors', '8 cores'),
    '--nodes=9': ('Node count', '3 nodes'),
    '--constraint=v100': ('feature', '`constraint`'),
    '--nodelist=n9': ('node name', '`nodes`'),
    '--time=1:99:xx': ('--time', 'hours:minutes'),
    '--array=0-500': ('array', '0 to 100'),
    '--array=a': ('array', '0 to 100'),
    '--dependency=bla:1': ('dependency', 'ended long ago'),
    '--reservation=foo': ('reservation', 'scontrol show reservation'),
    '--licenses=foo': ('license', 'license'),
    '--frobnicate': ('frobnicate', 'man sbatch'),
    '--signal=B:FOO@10': ('--signal', 'man sbatch'),
    '--mail-type=XX': ('--mail-type', 'man sbatch'),
}


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
    assert 'AssocMaxSubmitJobLimit' in message and 'as many jobs as you may' in message
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


# ---- what is known afterwards -----------------------------------------------------------------------------------

AFTERWARDS = dict(crash='node failed', norequeue='node failed', killed='papermill killed', cancel='cancelled', requeue='requeued',
                  limit='time limit', sudden='preempted', graced='preempted')


@pytest.mark.parametrize('name, said', dict(sudden=['SIGTERM preempted'], graced=['SIGUSR2 preempted', 'SIGTERM preempted'],
                                            warned=['SIGUSR2 time limit'], limit=['SIGTERM time limit']).items())
def test_so_does_one_that_slurm_looks_at_every_thirty_seconds(spies, name, said): assert spies.said(name, len(said)) == said


def test_the_answer_takes_no_time(spies):
    took = [float(line.split()[-1]) for name in spies.ids for line in spies.notes(name)]
    assert len(took) >= 8 and max(took) < 3


def test_what_ended_an_attempt_is_known_afterwards(spies, strict, monkeypatch):
    def reasons(names, **log): return {n: slurm.silent_reason(spies.attempt(n), *log.get('log', lambda n: ())(n)) for n in names}
    until(lambda: reasons(AFTERWARDS) == AFTERWARDS, 10)   # sacct lags
    monkeypatch.setattr(slurm, 'history', lambda ids: {})
    assert reasons(AFTERWARDS) == AFTERWARDS, 'without sacct: the words in the logs, and scontrol'
    monkeypatch.setattr(slurm, 'job_info', lambda job: {})
    with_words = {n: AFTERWARDS[n] for n in ('cancel', 'requeue', 'limit', 'sudden', 'graced')}
    assert reasons(with_words, log=lambda n: [spies.log(n)]) == with_words, 'SLURM has forgotten the jobs: the logs alone'
    slurm.cancel(spies.ids.values())
    until(lambda: not slurm.queue())


# ---- a controller that does not answer --------------------------------------------------------------------------

AWAY = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'


def test_looking_tries_again(fake, tmp_path):
    line = '7|RUNNING|0:05|0:55|n1|2026-03-02T15:12:28|None'
    calls = fake(sbatch='true', squeue=f'[ $(wc -l < {tmp_path}/calls) = 3 ] || {{ {AWAY}; }}; echo "{line}"')
    assert slurm.queue()['7'].left == 55
    assert len(calls()) == 3


def test_a_job_that_was_accepted_in_spite_of_an_error_is_not_submitted_twice(fake, tmp_path):
    calls = fake(sbatch='echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1',
                 squeue=f'echo "41|(null)"; echo "42|$(grep -o caption-nb-[0-9a-f]* {tmp_path}/calls | head -1)"')
    assert slurm.submit(script(tmp_path)) == 42
    assert sum(c.startswith('sbatch') for c in calls()) == 1


def test_submitting_gives_up_with_words(fake, tmp_path):
    calls = fake(sbatch=AWAY, squeue='true')
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


@pytest.mark.parametrize('sacct', ['echo "Slurm accounting storage is disabled" >&2; exit 1', 'echo "sacct: error: …" >&2; exit 1', 'true'])
def test_no_accounting_is_no_history(fake, sacct, capfd):
    fake(sbatch='true', sacct=sacct)
    assert slurm.history([1, '2_3']) == {}
    assert capfd.readouterr() == ('', '')


# ---- parsers ----------------------------------------------------------------------------------------------------

@given(st.integers(0, 400), st.integers(0, 86399))
@settings(max_examples=50, deadline=None)
def test_durations_are_read_as_slurm_writes_them(days, rest):
    h, m, s = rest//3600, rest % 3600//60, rest % 60
    written = {f'{days}-{h:02d}:{m:02d}:{s:02d}'}
    if not days: written |= {f'{h}:{m:02d}:{s:02d}', *([f'{m}:{s:02d}'] if not h else [])}
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
    for name in ('seconds', 'fields', 'queue_lines', 'history_lines', 'config_lines', 'node_lines', 'when'): getattr(slurm, name)(text)
    info = dict.fromkeys(('StartTime', 'TimeLimit', 'EndTime', 'PreemptTime', 'Reason'), text)
    assert slurm.why('SIGTERM', info, 0) in ('cancelled', 'preempted', 'time limit')
