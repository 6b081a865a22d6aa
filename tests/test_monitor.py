"""Watching runs from outside: the page about a run, the table of many, the notebook that grows; what to cancel; bringing results home."""
import io
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_nb import cli, monitor, progress, slurm
from caption_nb.basics import atomic_write
from caption_nb.runs import Run

ENV = dict(os.environ, OMP_NUM_THREADS='1', COLUMNS='200')


def said(capsys, *words: str) -> tuple[int, str, str]:
    "Exit status, stdout and stderr of the command, run in this process"
    try: status = cli.main(list(words))
    except SystemExit as e: status = e.code
    out, err = capsys.readouterr()
    return status, out, err


# watching a run

def watched(folder: Path, rows: list[dict], name='run', epochs=3, tail='', **status) -> Run:
    "A run folder as a training leaves it"
    (run := folder/name).mkdir(parents=True, exist_ok=True)
    (run/'config.json').write_text(json.dumps(dict(epochs=epochs)))
    attempt = dict(status='running', attempt=1, host='elsewhere', pid=1, job={}, started='2026-05-01T09:30:00+02:00', signal=None, error=None)
    attempt |= status
    (run/'status.json').write_text(json.dumps(attempt | dict(attempts=[attempt])))
    (run/'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows) + tail)
    return Run(run)


def logged(steps=12, per_epoch=4, **more) -> list[dict]:
    rows = []
    for s in range(1, steps + 1):
        rows.append(dict(step=s, epoch=s/per_epoch, seconds=2.*s, loss=5 - s/4, lr=1e-3, grad_norm=1., captions_per_second=900., memory_MB=1234.) | more)
        if s % per_epoch == 0:
            dev = dict(Bleu_1=.5, Bleu_2=.4, Bleu_3=.3, Bleu_4=.2, ROUGE_L=.4, CIDEr=s/100)
            rows.append(dict(step=s, epoch=s//per_epoch, seconds=2.*s, dev=dev, best=s == 4, eval_seconds=3., references={'a.jpg': f'a dog at {s}'}))
    return rows


def page(run: Run, width=80, height=None) -> str:
    return '\n'.join(monitor.watch_page(run, monitor.MetricsTail(run.path/'metrics.jsonl').read(), width, height))


def test_a_page_says_all(tmp_path):
    found = page(watched(tmp_path, logged(6), attempt=3, job=dict(job_id='77'), tail='{"step": 7, "lo'))
    for text in ('run\n', 'running · attempt 3 · job 77 · elsewhere', ' 50%', 'step 6 of 12', 'epoch 1.5 of 3', '12 s trained', '18 s left',
                 'loss', '▁ 3.500', 'learning rate 0.001', '900 captions/s', '1,234 MB', '*     1   0.040   0.200   0.400', 'a.jpg: a dog at 4'):
        assert text in found, (text, found)
    assert 'continue with' not in found and 'of how many' not in found


def test_total_steps_come_from_the_lines_or_the_configuration(tmp_path):
    assert 'step 6 of 99' in page(watched(tmp_path, logged(6, of=99)))
    unknown = [{k: v for k, v in row.items() if k != 'epoch'} for row in logged(3)]
    found = page(watched(tmp_path, unknown))
    assert 'step 3, of how many is not known yet' in found and '%' not in found and ' left' not in found
    assert 'nothing logged yet' in page(watched(tmp_path, []))


@pytest.mark.parametrize('width', [1, 10, 25, 40, 79, 200])
@pytest.mark.parametrize('height', [None, 24, 8])
def test_a_page_fits_its_terminal(tmp_path, width, height):
    rows = logged(40, changed=dict(lr=[1e-3, 5e-4], epochs=[3, 30])) + \
        [dict(step=41, epoch=11, dev=dict(CIDEr=1., something_else=.3), references={'山の写真.jpg': '一只狗在草地上奔跑'*5, 'x'*90: 'é'*99})]
    lines = page(watched(tmp_path, rows, name='a-name-' + 'of-a-run-'*12), width, height).split('\n')
    assert all(monitor._columns(line) <= width for line in lines) and (height is None or len(lines) <= height)
    if width >= 40: assert any('step 41' in line for line in lines)
    if width >= 40 and height != 8: assert any(line.startswith('*     1') for line in lines), 'the best is shown, however long ago'


def test_odd_lines_do_no_harm(tmp_path):
    odd = [dict(step=1), dict(step=2, loss=float('nan')), dict(step=3, loss=None, epoch='x', seconds='y', dev=3, references=[]), dict(other=1),
           dict(step=4, dev={}, changed=1), dict(step=5, dev=dict(CIDEr='high'), of='many', references={'a': None}), dict(step=6, changed={'a': 1})]
    for n in range(len(odd) + 1): page(watched(tmp_path, odd[:n], tail='\n[1]\nnonsense\n{"step": 9'), 60)
    assert 'nan' in page(watched(tmp_path, odd))


def test_a_caption_cannot_command_the_terminal(tmp_path):
    rows = [dict(step=1, epoch=1, dev=dict(CIDEr=1.), references={'\x1b]0;x\x07.jpg': 'a \x1b[2Jdog\x9b\u202e\ndown'})]
    lines = page(watched(tmp_path, rows, status='error', error=dict(type='E', message='\x1b[31mred')))
    assert all(c.isprintable() or c == '\n' for c in lines) and 'dog' in lines and 'red' in lines


def test_a_run_that_failed_shows_why(tmp_path, capsys):
    run = watched(tmp_path, logged(6), status='error', error=dict(type='ValueError', message='the loss is nan'))
    for attempt, text in ((1, 'old\n'), (2, ''.join(f'line {i}\n' for i in range(5000)))):
        (log := run.path/'ranks'/f'{attempt}'/'rank-0.log').parent.mkdir(parents=True)
        log.write_text(text)
        os.utime(log, (attempt, attempt))
    status, out, _ = said(capsys, 'watch', str(run.path))
    assert status == 1 and 'ValueError: the loss is nan' in out and 'ranks/2/rank-0.log ends with:' in out
    assert 'line 4999' in out and 'line 4990' in out and 'line 4989' not in out and 'old' not in out
    assert out.endswith(f'continue with: caption-nb train --resume {run.path}\n') and ' left' not in out
    killed = watched(tmp_path, logged(6), host=platform.node(), pid=2**22 - 3)
    assert page(killed).split('\n')[1].startswith('killed · ')


def test_silence_is_noticed(tmp_path):
    run = watched(tmp_path, logged(6))
    assert 'no news' not in page(run)
    os.utime(run.path/'metrics.jsonl', (time.time() - 600,)*2)
    assert 'no news for 10 min' in page(run)


def test_watch_once_or_in_a_pipe(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watched(tmp_path/'papermill_runs', logged(6), name='2026-a')
    for words in (['a'], ['papermill_runs/2026-a', '--once'], ['2026', '--every', '0.1']):
        status, out, _ = said(capsys, 'watch', *words)
        assert status == 0 and out.count('step 6 of 12') == 1 and '\033' not in out
    status, _, err = said(capsys, 'watch', 'b')
    assert status == 2 and "caption-nb watch: no run 'b'" in err
    assert said(capsys, 'watch')[0] == 2


class Terminal(io.StringIO):
    def isatty(self): return True


def test_watch_redraws_until_the_run_ends(tmp_path, monkeypatch):
    "The file grows, is written anew after a resume, and the run ends: then the page stays"
    out, looks = Terminal(), iter([lambda: watched(tmp_path, logged(8)), lambda: watched(tmp_path, logged(5), attempt=2),
                                   lambda: watched(tmp_path, logged(12), attempt=2, status='done')])
    monkeypatch.setattr(sys, 'stdout', out)
    monkeypatch.setattr(cli.time, 'sleep', lambda seconds: next(looks)())
    monkeypatch.setenv('COLUMNS', '70'); monkeypatch.setenv('LINES', '12')
    run = watched(tmp_path, logged(6))
    assert cli.main(['watch', str(run.path), '--every', '0.1']) == 0
    screens = re.split(r'\033\[(\d+)A\r', out.getvalue())
    assert [re.search(r'step (\d+) of 12', s)[1] for s in screens[::2]] == ['6', '8', '5', '12'] and 'done · attempt 2' in screens[-1]
    for before, up in zip(screens[::2], screens[1::2]): assert int(up) == before.count('\n') <= 11
    assert 'a dog at 12' in screens[-1] and all(s.endswith('\033[J') for s in screens[::2])


def test_leaving_does_not_say_that_the_run_stopped(tmp_path, monkeypatch, capsys):
    def leave(seconds): raise KeyboardInterrupt
    run = watched(tmp_path, logged(6))
    monkeypatch.setattr(cli.time, 'sleep', leave)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    status, out, err = said(capsys, 'watch', str(run.path))
    assert status == 0 and out.endswith('left; the run goes on\n') and 'stopped' not in err


def test_metrics_are_read_as_they_grow(tmp_path):
    "Cut at any byte, written anew at any time: what is read is what whole lines hold"
    path, rng = tmp_path/'metrics.jsonl', random.Random(0)
    tail = monitor.MetricsTail(path)
    assert tail.read() == []
    content, seed = b'', 0
    for _ in range(300):
        if rng.random() < 0.1:
            kept = content.split(b'\n')[:-1]
            content, seed = b''.join(line + b'\n' for line in kept[:rng.randrange(len(kept) + 1)]), seed + 1
        else: content += b''.join(b'{"step": %d, "run": %d, "caption": "\xc3\xb6"}\n' % (rng.randrange(99), seed) for _ in range(rng.randrange(4)))
        cut = content + b'{"step": 1, "x'[:rng.randrange(14)]
        path.write_bytes(cut)
        assert tail.read() == [json.loads(line) for line in cut.split(b'\n')[:-1]]
    path.unlink()
    assert tail.read() == []


def test_a_long_file_is_quick_to_follow(tmp_path):
    run = watched(tmp_path, [])
    with open(run.path/'metrics.jsonl', 'w') as f: f.writelines(json.dumps(row | dict(step=i)) + '\n' for i, row in enumerate(logged(12)*2000))
    tail = monitor.MetricsTail(run.path/'metrics.jsonl')
    tail.read()
    start = time.process_time()
    tail.read()
    assert time.process_time() - start < 0.02
    monitor.watch_page(run, tail.rows)
    assert time.process_time() - start < 2


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
def test_any_terminal_can_show_it(tmp_path, encoding):
    run = watched(tmp_path, logged(6))
    done = subprocess.run([sys.executable, '-m', 'caption_nb.cli', 'watch', str(run.path)], env=dict(ENV, PYTHONIOENCODING=encoding), cwd=tmp_path,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert ('█' in done.stdout.decode(encoding)) == (encoding == 'utf-8') and b'step 6 of 12' in done.stdout


def test_watch_is_torch_free(tmp_path):
    run = watched(tmp_path, logged(6))
    code = f"import sys; from caption_nb.cli import main; main(['watch', {str(run.path)!r}]); sys.exit(bool({{'torch', 'pandas', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True).returncode == 0


@given(st.lists(st.floats(-1e300, 1e300) | st.sampled_from([None, float('nan'), float('inf')]), max_size=60), st.integers(1, 50))
def test_sparkline(values, width):
    line = monitor.sparkline(values, width)
    assert len(line) == min(width, sum(v is not None and abs(v) <= 1e300 for v in values)) and set(line) <= set('▁▂▃▄▅▆▇█')


def test_follow_a_terminal(tmp_path):
    terminal = Terminal()
    follow = progress.Follow(tmp_path, terminal)
    def bar(text): follow('update_display_data', dict(data={'text/html': f'<progress value="1"></progress> {text}'}))
    (tmp_path/'metrics.jsonl').write_text('{"step": 1, "dev": {"CIDEr": 0.5}, "epoch": 1}\n')
    bar('training: 1/2'); follow.shown = 0; bar('training: 2/2')
    follow.close()
    assert '\r\033[Ktraining: 1/2' in terminal.getvalue() and '\r\033[Ktraining: 2/2' in terminal.getvalue()
    assert 'epoch 1: dev CIDEr 0.500\n' in terminal.getvalue()


def test_follow_a_closed_terminal(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, 'w') as out:
        follow = progress.Follow(tmp_path, out, every=0)
        follow('display_data', dict(data={'text/html': '<progress value="1"></progress> training: 1/2'}))
        follow.line('epoch 1')
        try: out.close()
        except BrokenPipeError: pass


# what files and SLURM say together

def attempt(number=1, status='running', host='n1', task='', job='', **more) -> dict:
    ids = dict(job_id=str(job or 900 + number)) | (dict(array_job_id=task.split('_')[0], array_task_id=task.split('_')[1]) if '_' in task else {})
    return dict(attempt=number, status=status, host=host, pid=1, job=ids if task or job else {}, started='2026-05-01T09:30:00+02:00',
                ended=None if status == 'running' else '2026-05-01T10:30:00+02:00', seconds=None if status == 'running' else 3600.,
                signal=None, error=None) | more


def add_run(folder: Path, *attempts: dict, rows=(), epochs=3, results=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'config.json').write_text(json.dumps(dict(epochs=epochs)))
    if attempts: atomic_write(folder/'status.json', json.dumps(attempts[-1] | dict(attempts=attempts)))
    if rows: (folder/'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    if results: (folder/'results.json').write_text(json.dumps(results))
    return folder


def add_sweep(runs_dir: Path, names: list[str], jobs: list[tuple], name='s', old='/gone') -> Path:
    "A job folder; `jobs` are (step, id, tasks, first); the runs' paths are those of another machine unless `old` is empty"
    (job := runs_dir/f'sweep-{name}').mkdir(parents=True)
    tasks = [dict(run=f'{old or runs_dir}/{n}', scst='') for n in names]
    made = [dict(step=step, id=id, tasks=tasks, first=first, array=len(tasks) > 1, time='', script=f'{step}.sh') for step, id, tasks, first in jobs]
    (job/'job.json').write_text(json.dumps(dict(name=name, profile=dict(requeue=True), steps=[step for step, *_ in jobs], tasks=tasks, jobs=made)))
    return job


@pytest.fixture
def squeue(monkeypatch):
    "What squeue answers: lines of `slurm.QUEUE`; counts the calls"
    class Answer:
        text, calls, fault = '', [], ''
        def ask(self, program, *words, **_):
            self.calls.append(program)
            if self.fault: raise slurm.SlurmError(self.fault)
            if program == 'squeue': return self.text, ''
            raise slurm.SlurmError('Invalid job id specified')
    answer = Answer()
    answer.calls = []
    monkeypatch.setattr(slurm, 'ask', answer.ask)
    monkeypatch.setattr(slurm, 'available', lambda: True)
    return answer


def states_of(*names, runs_dir) -> dict[str, monitor.RunState]: return {s.run: s for s in monitor.Overview(names, runs_dir).look()}


def test_files_and_queue_together(tmp_path, squeue):
    "Every line of the table in the notebook, and the words about it"
    soon = (datetime.now() + timedelta(minutes=1)).strftime('%Y-%m-%dT%H:%M:%S')
    squeue.text = f"""71_0|RUNNING|30:00|0:10|n1|2026-05-01T09:30:00|None
71_1|PENDING|0:00|1:00:00||{soon}|Resources
71_2|PENDING|0:00|1:00:00||N/A|BeginTime
71_3|RUNNING|0:05|1:00:00|n2|2026-05-01T09:30:00|None
71_4|RUNNING|5000:00:00|1:00:00|n2|2026-05-01T09:30:00|None
71_8|COMPLETING|5000:00:00|1:00:00|n2|2026-05-01T09:30:00|None
99_0|RUNNING|1:00|1:00|n9|2026-05-01T09:30:00|None
"""
    names = ['runs', 'waits', 'again', 'starts', 'cancelled', 'lost', 'fresh', 'done', 'preempted', 'hand']
    add_sweep(tmp_path, names, [('train', 71, [*range(10)], 0)])
    add_run(tmp_path/'runs', attempt(task='71_0'), rows=logged(6))
    add_run(tmp_path/'waits')
    add_run(tmp_path/'again', attempt(1, 'interrupted', task='71_2', reason='preempted'), rows=logged(6))
    add_run(tmp_path/'starts', attempt(1, 'interrupted', task='71_3', reason='time limit'))
    add_run(tmp_path/'cancelled', attempt(1, 'interrupted', task='71_4', reason='cancelled'))
    add_run(tmp_path/'lost', attempt(1, task='71_5'))
    add_run(tmp_path/'fresh')
    add_run(tmp_path/'done', attempt(1, 'done', task='71_7'), rows=logged(12), results=dict(dev=dict(scores=dict(CIDEr=1.25))))
    add_run(tmp_path/'preempted', attempt(1, 'interrupted', task='71_8', reason='preempted'))
    add_run(tmp_path/'hand', attempt(1, 'error', error=dict(type='ValueError', message='no\nwonder')))
    s = states_of(runs_dir=tmp_path)
    assert {k: v.state for k, v in s.items()} == dict(runs='running', waits='pending', again='pending', starts='starting', cancelled='cancelled',
        lost='killed', fresh='not started', done='done', preempted='preempted', hand='error')
    assert s['runs'].node == 'n1' and s['runs'].job_left == 10 and not s['runs'].fits and s['runs'].CIDEr == .04 and s['runs'].progress == .5
    assert s['waits'].reason == f'Resources, starts about {soon[11:16]}' and s['again'].reason == 'BeginTime, after preempted'
    assert s['starts'].reason == 'after time limit' and s['starts'].queued == 'RUNNING'
    assert 'the record still says running' in s['lost'].reason and 'job 71_6 is gone' in s['fresh'].reason
    assert s['done'].progress == 1 and s['done'].CIDEr == 1.25 and s['hand'].reason == 'ValueError: no'
    assert s['preempted'].queued == 'COMPLETING' and s['runs'].attempts == 1 and s['waits'].attempts == 0
    lines = monitor.status_lines([*s.values()])
    assert lines[-1] == '10 runs: 1 done, 2 running, 2 waiting, 1 cancelled, 1 error, 1 killed, 1 not started, 1 preempted'
    assert any(' 10 s !' in line for line in lines) and lines[-2].startswith("! the job's time")


def test_reading_only(tmp_path, squeue):
    add_sweep(tmp_path, ['a'], [('train', 71, [0], 0)])
    add_run(tmp_path/'a', attempt(job=71), rows=logged(6))
    def content(): return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob('*') if p.is_file()}
    before = content()
    assert states_of(runs_dir=tmp_path)['a'].state == 'killed' and content() == before


def test_a_job_that_ends_while_we_look_is_not_called_killed(tmp_path, monkeypatch):
    add_run(tmp_path/'a', attempt(job=71))
    def ends(*_, **__): add_run(tmp_path/'a', attempt(1, 'done', job=71)); return {}
    monkeypatch.setattr(slurm, 'available', lambda: True)
    monkeypatch.setattr(slurm, 'queue', ends)
    assert states_of(runs_dir=tmp_path)['a'].state == 'done'


@pytest.mark.parametrize('broken', ['absent', 'silent'])
def test_without_slurm_the_files_speak(tmp_path, squeue, monkeypatch, capsys, broken):
    if broken == 'absent': monkeypatch.setattr(slurm, 'available', lambda: False)
    squeue.fault = 'slurm_load_jobs error: Unable to contact slurm controller'
    add_sweep(tmp_path, ['a', 'b'], [('train', 71, [0, 1], 0)])
    add_run(tmp_path/'a', attempt(task='71_0'), rows=logged(6)); add_run(tmp_path/'b')
    assert monitor.show_status((), tmp_path) == 0
    out = capsys.readouterr().out
    assert re.search(r'a +running +50%', out) and '2 runs: 1 running, 1 not started' in out and 'this is what the files say' in out
    assert ('no SLURM on this machine' in out) == (broken == 'absent') and ('Unable to contact' in out) == (broken == 'silent')
    old = time.time() - 3600
    for p in (tmp_path/'a').iterdir(): os.utime(p, (old, old))
    assert states_of(runs_dir=tmp_path)['a'].reason.startswith('no news for 1 h')


def test_hundreds_of_runs_are_one_question(tmp_path, squeue, capsys):
    names = [f'run-{i:03}' for i in range(300)]
    add_sweep(tmp_path, names, [('extract', 70, [0], 0), ('train', 71, [*range(0, 200)], 0), ('train', 72, [*range(200, 300)], 200)])
    for i, name in enumerate(names):
        task = f'71_{i}' if i < 200 else f'72_{i - 200}'
        add_run(tmp_path/name, *([attempt(1, 'done' if i < 50 else 'running', task=task)] if i < 250 else []), rows=logged(12))
    squeue.text = ''.join(f'71_{i}|RUNNING|1:00|1:00:00|n1|2026-05-01T09:30:00|None\n' for i in range(50, 200)) + \
        ''.join(f'72_{i}|{"RUNNING" if i < 50 else "PENDING"}|1:00|1:00:00|n1|2026-05-01T09:30:00|{"None" if i < 50 else "JobArrayTaskLimit"}\n' for i in range(100))
    overview = monitor.Overview((), tmp_path)
    overview.look()
    start = time.process_time()
    states = overview.look()
    spent = time.process_time() - start
    assert squeue.calls == ['squeue']*2 and spent < 2, spent
    assert monitor.summary_line(states) == '300 runs: 50 done, 200 running, 50 waiting'
    assert monitor.show_status((), tmp_path, as_json=True) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 300 and rows[299]['state'] == 'pending' and rows[299]['job'] == '72_99' and rows[299]['reason'].startswith('JobArrayTaskLimit')


def test_chains_show_the_step_that_goes_on(tmp_path, squeue):
    add_sweep(tmp_path, ['a', 'b'], [('extract', 70, [0], 0), ('train', 71, [0, 1], 0), ('evaluate', 72, [0, 1], 0), ('compare', 73, [0], 0)])
    add_run(tmp_path/'a'); add_run(tmp_path/'b')
    wait = '|PENDING|0:00|10:00||N/A|Dependency\n'
    squeue.text = '70|RUNNING|0:10|10:00|n1|2026-05-01T09:30:00|None\n' + ''.join(f'{id}{wait}' for id in ('71_0', '71_1', '72_0', '72_1', '73'))
    shown = monitor.Overview((), tmp_path).look()
    assert [(s.run, s.step, s.state) for s in shown] == [('sweep-s', 'extract', 'running'), ('sweep-s', 'compare', 'pending'),
                                                         ('a', 'train', 'pending'), ('b', 'train', 'pending')]
    assert monitor.summary_line(shown) == '2 runs: 2 waiting'
    add_run(tmp_path/'a', attempt(1, 'done', task='71_0'))
    squeue.text = '72_0|RUNNING|0:10|10:00|n1|2026-05-01T09:30:00|None\n' + f'71_1{wait}72_1{wait}'
    s = states_of(runs_dir=tmp_path)
    assert (s['a'].step, s['a'].state, s['b'].step) == ('evaluate', 'running', 'train')
    squeue.text = ''
    assert states_of(runs_dir=tmp_path)['a'].state == 'done'
    add_run(tmp_path/'a'/'evaluate-dev', attempt(1, 'error', reason='error', error=dict(type='OSError', message='disk full')))
    s = states_of(runs_dir=tmp_path)
    assert (s['a'].state, s['a'].reason) == ('error', 'of the evaluation: OSError: disk full')


def test_names_of_runs_and_sweeps(tmp_path, squeue, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs_dir = tmp_path/'papermill_runs'
    for name in ('a1', 'a2', 'b'): add_run(runs_dir/name)
    add_sweep(runs_dir, ['a1', 'a2'], [('train', 71, [0, 1], 0)], old='')
    def found(*names): return [r.name for r in monitor.chosen(names)[0]]
    assert found() == found('s', 'b') == ['a1', 'a2', 'b'] and found('sweep-s') == found('papermill_runs/sweep-s') == ['a1', 'a2']
    assert found('a2') == ['a2'] and [t.id for t in monitor.chosen(['a2'])[1]] == ['71_1']
    monkeypatch.chdir('/')
    assert [t.id for t in monitor.chosen([runs_dir/'a2'])[1]] == ['71_1'], 'a path needs no runs folder'
    with pytest.raises(FileNotFoundError, match='no run'): monitor.chosen(['zzz'], runs_dir)
    assert monitor.chosen((), tmp_path/'nothing') == ([], [])
    (runs_dir/'sweep-s'/'job.json').write_text('{"tasks": [{}], "jobs"')
    with pytest.raises(ValueError, match='sweep-s/job.json is damaged'): monitor.chosen(['a1'], runs_dir)
    (runs_dir/'sweep-s'/'job.json').write_text('{"name": "s", "profile": {}, "steps": [], "tasks": [{}], "jobs": [{}]}')
    with pytest.raises(ValueError, match='sweep-s/job.json is damaged .KeyError'): monitor.chosen(['a1'], runs_dir)


def test_one_spoilt_file_hides_nothing_else(tmp_path, squeue):
    add_run(tmp_path/'a', attempt(1, 'done')); add_run(tmp_path/'b')
    (tmp_path/'b'/'status.json').write_text('{"sta')
    s = states_of(runs_dir=tmp_path)
    assert s['a'].state == 'done' and s['b'].state == 'unreadable' and 'status.json is not valid JSON' in s['b'].reason


@pytest.mark.parametrize('width', [20, 40, 80, 120])
def test_the_table_fits(tmp_path, width):
    states = [monitor.RunState('山'*30 + str(i), 'running', .5, 1.5, 1.0, 3600., 60., 'train', f'123456_{i}', reason='x'*200) for i in range(5)]
    lines = monitor.status_lines(states, width)
    assert all(monitor._columns(line) <= width for line in lines) and len(lines) == 8
    assert monitor.status_lines([]) == ['no runs'] and monitor.status_lines([monitor.RunState('a\x1b[2J', 'done')])[1].startswith('a [2J')


def test_status_watch_redraws_until_nothing_goes_on(tmp_path, squeue, monkeypatch):
    out = Terminal()
    for i in range(40): add_run(tmp_path/f'run-{i:02}', attempt(1, 'done' if i < 38 else 'running', job=900 + i))
    squeue.text = '938|RUNNING|1:00|1:00:00|n1|N/A|None\n939|RUNNING|1:00|1:00:00|n1|N/A|None\n'
    looks = iter([lambda: add_run(tmp_path/'run-38', attempt(1, 'done', job=938)), lambda: add_run(tmp_path/'run-39', attempt(1, 'done', job=939))])
    def sleep(seconds):
        next(looks)()
        squeue.text = squeue.text.split('\n', 1)[1]
    monkeypatch.setattr(monitor.time, 'sleep', sleep)
    monkeypatch.setenv('COLUMNS', '90'); monkeypatch.setenv('LINES', '16')
    assert monitor.show_status((), tmp_path, watch=True, out=out) == 0
    screens = re.split(r'\033\[\d+A\r', out.getvalue())
    assert [re.search(r'40 runs: (\d+) done', s)[1] for s in screens] == ['38', '39', '40']
    assert all(s.count('\n') <= 15 for s in screens) and 'run-39' in screens[0] and 'run-38' in screens[0]


# following a notebook

def code(id, status='completed', *outputs, source='') -> dict:
    return dict(cell_type='code', id=id, source=source, outputs=[*outputs], execution_count=1, metadata=dict(papermill=dict(status=status)))


def text_cell(source: str, tags=()) -> dict: return dict(cell_type='markdown', id=f'm{len(source)}', source=source, metadata=dict(tags=[*tags]))


def stream(text: str) -> dict: return dict(output_type='stream', name='stdout', text=text.splitlines(True))


def shows(**data) -> dict: return dict(output_type='display_data', metadata={}, data={k.replace('_', '/'): v for k, v in data.items()})


def bar(line: str) -> dict: return shows(text_html=f'<progress value="1" max="2"></progress> {line} &lt;', text_plain='<IPython.core.display.HTML object>')


def write(run: Path, number: int, *cells: dict, **truth):
    "The notebook of attempt `number`, replaced as `execute` does it, and the status"
    truth = attempt(number, **truth)
    if not (run/'config.json').is_file(): add_run(run)
    before = [a for a in Run(run).attempts if a['attempt'] != number]
    if truth['status'] == 'running': add_run(run, *before, truth)   # as `execute` does it: at the start the status is first, at the end last
    atomic_write(run/f'attempt-{number}.ipynb', json.dumps(dict(cells=cells, metadata=dict(caption_nb=truth), nbformat=4, nbformat_minor=5)))
    (temporary := run/'.link').symlink_to(f'attempt-{number}.ipynb')
    os.replace(temporary, run/'run.ipynb')
    add_run(run, *before, truth)


CELLS = [text_cell('# Training run\n> x'), code('p'), text_cell('## What it learns from\nThe data')]


def test_new_output_comes_once_and_in_order(tmp_path):
    tail = monitor.NotebookTail(tmp_path/'run.ipynb')
    assert tail.read() == []
    write(tmp_path, 1, *CELLS, code('a', 'running', bar('drawing: 1/9'), stream('60 ima')), code('b', 'pending'))
    assert tail.read() == [('attempt', '1'), ('cell', 'cell 1 of 3 · Training run'), ('cell', 'cell 2 of 3 · What it learns from'), ('progress', 'drawing: 1/9 <')]
    assert tail.read() == []
    write(tmp_path, 1, *CELLS, code('a', 'running', bar('drawing: 2/9'), stream('60 images\n\x1b[31mred\x1b[0m 1%\rred 2%\nhal')), code('b', 'pending'))
    assert tail.read() == [('progress', 'drawing: 2/9 <'), ('text', '60 images\nred 2%\n')]
    rest = [shows(image_png='AAAA', text_plain='<Figure size 1x1>'), shows(image_png='AAAA'), shows(text_markdown='**bold**', text_plain='<x.Markdown object>'),
            shows(text_plain='<IPython.core.display.HTML object>'), shows(text_plain="{'a': 1}"), shows(text_html='<img src="data:x">')]
    (tmp_path/'figures').mkdir(); (tmp_path/'figures'/'words.png').touch()
    write(tmp_path, 1, *CELLS, code('a', 'completed', bar('drawing: 2/9'), stream('60 images\n\x1b[31mred\x1b[0m 1%\rred 2%\nhalf'), *rest,
                                    source="keep(plot(x, n=6), run, 'words')\nkeep(plot(x), run, 'gone')"), code('b', 'running'))
    assert tail.read() == [('text', 'half'), ('text', '[figure: figures/words.png]\n'), ('text', '[figure]\n'), ('text', '**bold**\n'), ('text', "{'a': 1}\n"),
                           ('text', '[figure]\n'), ('cell', 'cell 3 of 3 · What it learns from')]
    error = dict(output_type='error', ename='ValueError', evalue='the loss\x1b[31m is nan', traceback=['x'])
    note = text_cell('**This run failed**\n\n# x', ['papermill-error-cell-tag'])
    write(tmp_path, 1, note, *CELLS, code('a', 'completed'), code('b', 'failed', error), status='error')
    assert tail.read() == [('text', 'ValueError: the loss is nan\n')]
    write(tmp_path, 2, *CELLS, code('a', 'running', stream('60 images\n')), code('b', 'pending'))
    assert tail.read()[0] == ('attempt', '2') and ('text', '60 images\n') in monitor.NotebookTail(tmp_path/'run.ipynb').read()


def test_a_notebook_that_is_not_whole_waits(tmp_path):
    tail = monitor.NotebookTail(tmp_path/'run.ipynb')
    for half in ('', '{"cells": ['):
        (tmp_path/'run.ipynb').write_text(half)
        assert tail.read() == []
    (tmp_path/'run.ipynb').unlink()
    write(tmp_path, 1, *CELLS)
    assert len(tail.read()) == 2
    (tmp_path/'run.ipynb').unlink()
    assert tail.read() == []


def goes_by(run: Path, squeue) -> threading.Thread:
    "A run as it happens: waits, runs, is preempted, waits, runs again, is done"
    def happen():
        time.sleep(0.5)
        squeue.text = '71|RUNNING|0:01|1:00:00|n1|N/A|None\n'
        for i in range(1, 4):
            write(run, 1, *CELLS, code('a', 'running', bar(f'training: {i}/9'), stream(''.join(f'line of {j}\n' for j in range(1, i + 1)))), code('b', 'pending'), job=71)
            time.sleep(0.25)
        with open(run/'metrics.jsonl', 'a') as f: f.write('{"step": 50, "epoch": 1, "dev": {"CIDEr": 0.41}, "seconds": 8}\n')
        write(run, 1, *CELLS, code('a', 'failed', bar('training: 3/9'), stream('line of 1\nline of 2\nline of 3\n')), code('b', 'pending'), status='interrupted', reason='preempted', job=71)
        squeue.text = '71|PENDING|0:00|1:00:00||N/A|BeginTime\n'
        time.sleep(1)
        squeue.text = '71|RUNNING|0:01|1:00:00|n2|N/A|None\n'
        write(run, 2, *CELLS, code('a', 'running', stream('again\n')), code('b', 'pending'), host='n2', job=71)
        time.sleep(0.4)
        write(run, 2, *CELLS, code('a', 'completed', stream('again\n')), code('b', 'completed', stream('the end\n')), host='n2', job=71, status='done')
        squeue.text = ''
    thread = threading.Thread(target=happen, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize('tty', [False, True])
def test_follow_from_the_queue_to_the_end(tmp_path, squeue, monkeypatch, tty):
    run, out = add_run(tmp_path/'run'), Terminal() if tty else io.StringIO()
    (run/'job').mkdir()
    made = dict(step='train', id=71, tasks=[0], first=0, array=False)
    (run/'job'/'job.json').write_text(json.dumps(dict(name='run', profile={}, steps=['train'], tasks=[dict(run=str(run), scst='')], jobs=[made])))
    squeue.text = '71|PENDING|0:00|1:00:00||N/A|Priority\n'
    monkeypatch.setattr(monitor, 'ASK_EVERY', 0.2)
    thread = goes_by(run, squeue)
    assert monitor.follow('run', tmp_path, out, every=0.1) == 0
    thread.join()
    said = out.getvalue()
    parts = ['pending: Priority', 'attempt 1 on n1, job 71', 'cell 2 of 3 · What it learns from', 'line of 1', 'epoch 1: dev CIDEr 0.410', 'pending: BeginTime, after preempted',
             'attempt 2 on n2, job 71, after: preempted', 'again', 'the end', 'done in', 'record: ']
    places = [said.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), dict(zip(parts, places))
    assert ('\033[K' in said) == tty and said.count('line of 3') + said.count('line of 1') == 2 and said.count('again') == 1
    if tty: assert '\r\033[Ktraining: 1/9 <' in said
    else: assert said.count('training: ') == 1, 'in a log now and then'


def test_follow_ends_as_the_run_did(tmp_path, squeue, capsys):
    for reason, code_ in (('cancelled', 1), ('out of memory', 1), ('error', 1), ('done', 0), ('preempted', 1)):
        run = add_run(tmp_path/reason.replace(' ', '-'))
        write(run, 1, *CELLS, code('a', 'failed', stream('x\n'*200)), status='done' if reason == 'done' else 'interrupted', reason=reason, job=5)
        start = time.monotonic()
        assert monitor.follow(run, every=0.1) == code_ and time.monotonic() - start < 5
        out = capsys.readouterr().out
        assert ('done in 1 h' in out) == (reason == 'done') and '140 more lines in run.ipynb' in out
        assert reason == 'done' or f'\n{reason}\n' in out and 'continue with: caption-nb train --resume' in out
    lost = add_run(tmp_path/'lost', attempt(1, job=6))
    assert monitor.follow(lost, every=0.1) == 1 and 'killed: ' in capsys.readouterr().out


def test_follow_once_and_past(tmp_path, squeue, capsys):
    squeue.text = '5|RUNNING|0:01|1:00:00|n1|N/A|None\n'
    run = add_run(tmp_path/'run', rows=logged(8))
    write(run, 1, *CELLS, code('z', 'completed', stream('before\n')), code('a', 'running', stream('now\n')), job=5)
    assert monitor.follow(run, once=True) == 0
    out = capsys.readouterr().out
    assert 'attempt 1 on n1, job 5' in out and '  now\n' in out and 'before' not in out and 'epoch 2: dev' in out and 'epoch 1: dev' not in out
    assert out.endswith('running\n')
    assert monitor.follow(run, once=True, past=True) == 0
    out = capsys.readouterr().out
    assert '  before\n' in out and 'epoch 1: dev' in out
    with pytest.raises(FileNotFoundError, match='no run'): monitor.follow('zzz', tmp_path)


def test_follow_leaves_on_ctrl_c(tmp_path, squeue, monkeypatch, capsys):
    def leave(seconds): raise KeyboardInterrupt
    run = add_run(tmp_path/'run')
    squeue.text = '5|RUNNING|0:01|1:00:00|n1|N/A|None\n'
    write(run, 1, *CELLS, job=5)
    monkeypatch.setattr(monitor.time, 'sleep', leave)
    assert monitor.follow(run) == 0 and capsys.readouterr().out.endswith('left; the run goes on\n')


def test_a_large_notebook_is_cheap_to_follow(tmp_path):
    "2 MB of pictures, written anew at every look: less than 50 ms a look; not written: a stat"
    picture = shows(image_png='A'*200_000, text_plain='<Figure>')
    tail, spent = monitor.NotebookTail(tmp_path/'run.ipynb'), []
    for i in range(20):
        write(tmp_path, 1, *CELLS, *[code(f'c{j}', 'completed', picture) for j in range(10)], code('a', 'running', stream('x\n'*i)))
        start = time.process_time()
        tail.read()
        spent.append(time.process_time() - start)
    start = time.process_time()
    for _ in range(100): assert tail.read() == []
    assert sum(spent)/len(spent) < 0.05 and (time.process_time() - start)/100 < 0.001, spent
    assert (tmp_path/'attempt-1.ipynb').stat().st_size > 2e6


# cancelling

def test_cancel_only_what_is_recorded(tmp_path, squeue):
    add_sweep(tmp_path, ['a', 'b', 'c'], [('extract', 70, [0], 0), ('train', 71, [0, 1, 2], 0), ('evaluate', 72, [1, 2], 1)])
    for name in 'abc': add_run(tmp_path/name)
    squeue.text = ''.join(f'{id}|{state}|0:01|1:00|n1|N/A|None\n' for id, state in (('70', 'RUNNING'), ('71_0', 'RUNNING'), ('71_1', 'PENDING'),
                          ('71_2', 'PENDING'), ('72_0', 'PENDING'), ('72_1', 'PENDING'), ('555', 'RUNNING')))
    def ids(*names): return [t.id for t in monitor.cancel_targets(names, tmp_path)]
    assert ids('s') == ids() == ['70', '71', '72'] and ids('b') == ['71_1', '72_0'] and ids('a', 'c') == ['71_0', '71_2', '72_1']
    assert ids('71') == ['71'] and ids('71_2') == ['71_2'] and ids('70') == ['70'] and ids('b', '70') == ['71_1', '72_0', '70']
    assert [t.what for t in monitor.cancel_targets(['b'], tmp_path)] == ['job 71_1: train of b, pending', 'job 72_0: evaluate of b, pending']
    assert monitor.cancel_targets(['s'], tmp_path)[1].what == 'job 71: train of sweep-s, 3 runs'
    with pytest.raises(ValueError, match='scancel 555'): ids('555')
    squeue.text = '71_1|RUNNING|0:01|1:00|n1|N/A|None\n'
    assert ids('s') == ['71_1'] and ids('a') == []
    squeue.fault = 'Unable to contact slurm controller'
    with pytest.raises(ValueError, match='Unable to contact'): ids('s')


def test_cancel_runs_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, 'available', lambda: False)
    with subprocess.Popen(['sleep', '60']) as sleeper:
        try:
            add_run(tmp_path/'mine', attempt(host=platform.node(), pid=sleeper.pid))
            add_run(tmp_path/'else', attempt(host='elsewhere', pid=sleeper.pid)); add_run(tmp_path/'over', attempt(1, 'done', host=platform.node(), pid=sleeper.pid))
            found = monitor.cancel_targets((), tmp_path)
            assert [(t.pid, t.id) for t in found] == [(sleeper.pid, '')] and 'mine' in found[0].what
            os.kill(found[0].pid, signal.SIGTERM)
            assert sleeper.wait(10) == -signal.SIGTERM
        finally: sleeper.kill()
    assert monitor.cancel_targets((), tmp_path) == []


# bringing results home

NASTY = ["2026 it's", 'a"b', 'c;touch hacked', '$(touch hacked)', 'st*r [x] ?', 'back\\slash', 'é 山', '-n', '#x', 'plain']


def remote_runs(folder: Path) -> list[str]:
    for name in NASTY:
        run = add_run(folder/name, rows=logged(4))
        for path in ('checkpoints/best/model', 'checkpoints/last/model', 'checkpoints/last-1/model', 'ranks/1/rank-0.log', 'job/code-1a/caption_nb/x.py',
                     'job/job.json', 'job/logs/train-7.log', 'figures/a.png', '.x.1.tmp', 'attempt-1.ipynb'):
            (run/path).parent.mkdir(parents=True, exist_ok=True)
            (run/path).write_text(path)
        (run/'run.ipynb').symlink_to('attempt-1.ipynb')
    (folder/'sweep-s'/'code-1a').mkdir(parents=True)
    (folder/'sweep-s'/'job.json').write_text('{}'); (folder/'sweep-s'/'code-1a'/'x.py').write_text('')
    return NASTY


def files(folder: Path) -> set[str]: return {str(p.relative_to(folder)) for p in folder.rglob('*') if not p.is_dir()}


@pytest.mark.skipif(not shutil.which('rsync'), reason='no rsync on this machine')
@pytest.mark.parametrize('folder', ['papermill_runs', "my $(touch hacked) run's; `x`", '-v'])
def test_pull_brings_what_is_wanted(tmp_path, folder):
    "The printed lines, run by a shell: nasty names arrive, nothing else does, nothing is executed"
    names = remote_runs(tmp_path/'there'/folder)
    (home := tmp_path/'at home').mkdir()
    def pull(to, runs=(), checkpoints='best', where=f'../there/{folder}'):
        lines = monitor.pull_lines(where, runs, to, checkpoints)
        for line in lines: subprocess.run(['bash', '-c', line], cwd=home, check=True, capture_output=True)
        return files(home/to)
    os.chdir(home)
    small = {'config.json', 'metrics.jsonl', 'job/job.json', 'job/logs/train-7.log', 'figures/a.png', 'attempt-1.ipynb', 'run.ipynb'}
    assert pull('all -x') == {f'{n}/{f}' for n in names for f in (*small, 'checkpoints/best/model')} | {'sweep-s/job.json'}
    assert (home/'all -x'/'plain'/'run.ipynb').is_symlink()
    assert pull('small', checkpoints='none') == {f'{n}/{f}' for n in names for f in small} | {'sweep-s/job.json'}
    assert {'plain/checkpoints/last/model', 'plain/checkpoints/last-1/model', 'plain/checkpoints/best/model'} < pull('whole', ['plain'], 'all')
    for name in names: assert {Path(f).parts[0] for f in pull(f'one/{names.index(name)}', [name])} == {name}
    assert pull('two', ['plain', 'sweep-s'], 'none') == {f'plain/{f}' for f in small} | {'sweep-s/job.json'}
    assert not [*tmp_path.rglob('hacked')]


@pytest.mark.skipif(not shutil.which('rsync'), reason='no rsync on this machine')
@pytest.mark.parametrize('folder', ['papermill_runs', "my $(touch hacked) run's; `x`"])
def test_pull_through_a_remote_shell(tmp_path, folder, monkeypatch):
    "As over ssh: the other side's words pass through a shell, which must not take the folder's name apart"
    remote_runs(tmp_path/'there'/folder)
    (ssh := tmp_path/'ssh').write_text('#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -l ]] && shift; shift; done\nshift\ncd "$THERE" && exec bash -c "$*"\n')
    ssh.chmod(0o755)
    env = dict(os.environ, RSYNC_RSH=str(ssh), THERE=str(tmp_path/'there'))
    for old in ('0', '1'):    # RSYNC_OLD_ARGS: as rsync before 3.2.4 did it
        for line in monitor.pull_lines(f'me@login:~/{folder}', ["2026 it's", 'st*r [x] ?'], tmp_path/f'home {old}'):
            done = subprocess.run(['bash', '-c', line], env=env | dict(RSYNC_OLD_ARGS=old), cwd=tmp_path, capture_output=True, text=True)
            if old == '1' and ' -s ' in line: continue    # rsync refuses the two together
            assert done.returncode == 0, done.stderr
            assert (tmp_path/f'home {old}'/"2026 it's"/'config.json').is_file()
    assert (tmp_path/'home 0'/'st*r [x] ?'/'checkpoints'/'best'/'model').is_file() and not [*tmp_path.rglob('hacked')]


@given(st.lists(st.text(st.characters(exclude_categories=['C', 'Z'], exclude_characters='/'), min_size=1), min_size=1, max_size=3), st.sampled_from(['best', 'all', 'none']))
def test_pull_lines_are_words_for_a_shell(names, checkpoints):
    lines = monitor.pull_lines('me@login:my runs', names, checkpoints=checkpoints)
    commands = monitor.pull_commands('me@login:my runs', names, checkpoints=checkpoints)
    assert [shlex.split(line) for line in lines] == commands and all(c[-3:] == ['--', 'me@login:my runs/', './papermill_runs'] for c in commands)


def test_places_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for where, fault in (('login', 'user@host:/path'), ('me@login:', 'names no folder'), ('a:b\nc', 'characters'), ('/no/such', 'no folder here')):
        with pytest.raises(ValueError, match=fault): monitor.pull_lines(where)
    with pytest.raises(ValueError, match="did you mean 'best'"): monitor.pull_lines('me@a:b', checkpoints='bests')
    with pytest.raises(ValueError, match='is no name'): monitor.pull_lines('me@a:b', ['a\nb'])
    monkeypatch.setenv('PATH', '')
    with pytest.raises(FileNotFoundError, match='scp -r'): monitor.pull('me@a:b')


# a real SLURM

def test_real_array(tmp_path, cluster, capsys):
    "An array, one task at a time: seen running and waiting; its job ends without a word; a task and then all are cancelled"
    script = f"""echo '{{"attempt": 1, "status": "running", "host": "'$SLURMD_NODENAME'", "pid": 1, "job": {{"job_id": "'$SLURM_JOB_ID'",
"array_job_id": "'$SLURM_ARRAY_JOB_ID'", "array_task_id": "'$SLURM_ARRAY_TASK_ID'"}}}}' > {tmp_path}/$SLURM_ARRAY_TASK_ID.tmp
mv {tmp_path}/$SLURM_ARRAY_TASK_ID.tmp {tmp_path}/r$SLURM_ARRAY_TASK_ID/attempt.json; exec sleep 100"""
    names = [f'r{i}' for i in range(4)]
    for name in names: add_run(tmp_path/name)
    id = cluster.sbatch(script, '--array=0-3%1', '--time=5')
    add_sweep(tmp_path, names, [('train', id, [0, 1, 2, 3], 0)])
    def until(condition, what):
        end = time.monotonic() + 30
        while not condition(): assert time.monotonic() < end, what; time.sleep(0.2)
    until((tmp_path/'r0'/'attempt.json').is_file, 'the first task starts')
    now = json.loads((tmp_path/'r0'/'attempt.json').read_text())
    add_run(tmp_path/'r0', now)
    s = states_of(runs_dir=tmp_path)
    assert [s[n].state for n in names] == ['running', 'pending', 'pending', 'pending'] and s['r0'].node == now['host'] and s['r0'].job == f'{id}_0'
    assert 0 < s['r0'].job_left <= 300 and s['r1'].reason.startswith('JobArrayTaskLimit')
    assert monitor.show_status((), tmp_path) == 0 and '4 runs: 1 running, 3 waiting' in capsys.readouterr().out
    targets = monitor.cancel_targets(['r2', 'r0'], tmp_path)
    assert [t.id for t in targets] == [f'{id}_0', f'{id}_2'] and [t.id for t in monitor.cancel_targets(['s'], tmp_path)] == [str(id)]
    slurm.cancel(t.id for t in targets)
    until(lambda: f'{id}_0' not in slurm.queue([id]), 'the first task is gone')
    s = states_of(runs_dir=tmp_path)
    assert s['r0'].state == 'killed' and s['r0'].reason == 'cancelled; the record still says running' and s['r1'].state in ('pending', 'starting', 'running')
    assert s['r2'].state == 'not started' and 'is gone: cancelled' in s['r2'].reason   # no record is left of a task that never started
    assert monitor.follow('r0', tmp_path, every=0.1) == 1 and 'killed: cancelled' in capsys.readouterr().out
    slurm.cancel(t.id for t in monitor.cancel_targets(['s'], tmp_path))
    until(lambda: not slurm.queue([id]), 'all are gone')
    assert monitor.cancel_targets(['s'], tmp_path) == [] and {v.state for v in states_of(runs_dir=tmp_path).values()} == {'killed', 'not started'}


def test_real_queue_reasons(tmp_path, cluster, capsys):
    "A job that waits for another one, and one that nobody can start: SLURM's reason reaches who follows"
    first = cluster.sbatch('sleep 100', '--time=5')
    run = add_run(tmp_path/'run')
    id = cluster.sbatch('sleep 100', '--time=5', f'--dependency=afterok:{first}')
    (run/'job').mkdir()
    made = dict(step='train', id=id, tasks=[0], first=0, array=False)
    (run/'job'/'job.json').write_text(json.dumps(dict(name='run', profile={}, steps=['train'], tasks=[dict(run=str(run), scst='')], jobs=[made])))
    assert monitor.follow(run, once=True) == 0 and 'pending: Dependency' in capsys.readouterr().out
    slurm.cancel([t.id for t in monitor.cancel_targets([run], tmp_path)] + [first])
    end = time.monotonic() + 20
    while slurm.queue([id]) and time.monotonic() < end: time.sleep(0.2)
    assert monitor.follow(run, every=0.1) == 1 and f'not started: job {id} is gone: cancelled' in capsys.readouterr().out
