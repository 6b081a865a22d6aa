"""Watching runs from outside: the page about a run, and the line in the terminal that started it."""
import io
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_nb import cli, monitor
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
    follow = monitor.Follow(tmp_path, terminal)
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
        follow = monitor.Follow(tmp_path, out, every=0)
        follow('display_data', dict(data={'text/html': '<progress value="1"></progress> training: 1/2'}))
        follow.line('epoch 1')
        try: out.close()
        except BrokenPipeError: pass
