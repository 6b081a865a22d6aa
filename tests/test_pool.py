"Commands run some at a time: order, exit codes, signals"
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from caption_nb.pool import NOT_RUN, run_pool, share_threads

EVERY = 0.05


def python(code: str) -> list[str]: return [sys.executable, '-S', '-c', textwrap.dedent(code)]   # -S: born in 10 ms


def noting(path: Path, text: str, code: int = 0) -> list[str]:
    "A child that adds a line to `path` and exits with `code`"
    return python(f'open({str(path)!r}, "a").write({text!r} + "\\n"); raise SystemExit({code})')


def test_codes_in_order_of_the_commands(tmp_path):
    commands = [python(f'print({i}); raise SystemExit({i})') for i in (0, 3, 1, 0)]
    logs = [tmp_path/'logs'/f'{i}.log' for i in range(4)]
    assert run_pool(commands, 2, logs, quiet=True, every=EVERY) == [0, 3, 1, 0]
    assert [p.read_text() for p in logs] == ['0\n', '3\n', '1\n', '0\n']


def test_never_more_than_jobs_at_a_time(tmp_path):
    code = f'''
        import os, time
        mine = {str(tmp_path)!r} + '/' + str(os.getpid())
        open(mine, 'w').close(); n = len(os.listdir({str(tmp_path)!r})); time.sleep(0.1); os.unlink(mine)
        raise SystemExit(0 if n <= 2 else n)'''
    assert run_pool([python(code)]*7, 2, quiet=True, every=EVERY) == [0]*7


def test_chains_wait_and_a_failure_stops_only_its_own(tmp_path):
    note, tasks = tmp_path/'note', 3
    steps = ['extract', 'train', 'evaluate']
    commands = [noting(note, f'{s} {i}', code=7 if (s, i) == ('train', 1) else 0) for s in steps for i in range(tasks)] + [noting(note, 'compare')]
    after = [[]]*tasks + [[n - tasks] for n in range(tasks, 3*tasks)] + [[6, 7, 8]]
    assert run_pool(commands, 2, after=after, either=[9], quiet=True, every=EVERY) == [0, 0, 0, 0, 7, 0, 0, NOT_RUN, 0, 0]
    lines = note.read_text().split('\n')[:-1]
    assert 'evaluate 1' not in lines and lines[-1] == 'compare'
    for i in (0, 2): assert [x for x in lines if x.endswith(f' {i}')] == [f'{s} {i}' for s in steps]


def test_nothing_to_compare_when_all_failed():
    assert run_pool([python('raise SystemExit(1)')]*2 + [python('')], after=[[], [], [0, 1]], either=[2], quiet=True, every=EVERY) == [1, 1, NOT_RUN]


def test_85_starts_again_and_goes_on_in_the_same_log(tmp_path):
    code = f'''
        print('attempt', flush=True)
        import os
        raise SystemExit(85 if os.path.getsize({str(tmp_path/"log")!r}) < 24 else 0)'''
    assert run_pool([python(code)], 1, [tmp_path/'log'], quiet=True, every=EVERY) == [0]
    assert (tmp_path/'log').read_text() == 'attempt\n'*3


def test_killed_and_missing_programs_are_failures(tmp_path):
    commands = [python('import os; os.kill(os.getpid(), 9)'), [str(tmp_path/'no-such-program')], python('')]
    assert run_pool(commands, 1, [tmp_path/str(i) for i in range(3)], quiet=True, every=EVERY) == [137, 127, 0]
    assert 'cannot be started: No such file' in (tmp_path/'1').read_text()


def test_nothing_to_run(): assert run_pool([], 3, quiet=True) == []


@pytest.mark.parametrize('words, message', [(dict(jobs=0), 'jobs=0'), (dict(after=[[0]]), 'waits for 0'), (dict(after=[[-1]]), 'waits for -1'),
                                            (dict(logs=['a', 'b']), '1 commands, 2 logs')])
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(ValueError, match=message): run_pool([['true']], **words)


def test_threads_are_shared(monkeypatch, tmp_path):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr('caption_nb.pool.cores', lambda: 8)
    say = python('import os; print(os.environ["OMP_NUM_THREADS"])')
    run_pool([say]*4, 3, [tmp_path/'a']*4, quiet=True, every=EVERY)
    assert (tmp_path/'a').read_text() == '2\n'*4
    run_pool([say], 4, [tmp_path/'b'], quiet=True, every=EVERY)
    assert (tmp_path/'b').read_text() == '8\n', 'one command alone has all cores'
    assert share_threads(4, dict(OMP_NUM_THREADS='5'))['OMP_NUM_THREADS'] == '5'


# ---- signals: to a process of its own, whose children answer as a job does ----------------------------------------

CHILD = '''
    import signal, sys, time
    note = open({note!r} + sys.argv[1], 'w', buffering=1)
    def arrived(number, frame):
        print(signal.Signals(number).name, file=note)
        if {patient}: return
        time.sleep(0.2); sys.exit(143)
    signal.signal(signal.SIGINT, arrived); signal.signal(signal.SIGTERM, arrived)
    print('ready', file=note)
    time.sleep(60)'''


def pool_process(folder: Path, patient: bool, n: int = 3, jobs: int = 2) -> subprocess.Popen:
    "A process that runs `n` children which wait for a signal, `patient` ones beyond it; it prints the codes at the end"
    child = textwrap.dedent(CHILD.format(note=str(folder/'note-'), patient=patient))
    code = (f'import sys; from caption_nb.pool import run_pool; child = {child!r}\n'
            f'print(run_pool([[sys.executable, "-S", "-c", child, str(i)] for i in range({n})], {jobs}, every={EVERY}))')
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: all((folder/f'note-{i}').is_file() and 'ready' in (folder/f'note-{i}').read_text() for i in range(jobs)))
    return process


def wait_for(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.05)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_waited_for(tmp_path, number):
    process = pool_process(tmp_path, patient=False)
    os.killpg(process.pid, number)      # as a terminal does: to the whole group
    if number != signal.SIGHUP:         # whose children die at once, so that the pool may be gone, too
        time.sleep(0.1)
        os.killpg(process.pid, number)  # a bouncing key
    out, err = process.communicate(timeout=30)
    if number == signal.SIGHUP: assert out.strip() == '[129, 129, 129]'     # the children have no handler for it
    else:
        assert out.strip() == f'[143, 143, {128 + number}]'
        for i in range(2): assert (tmp_path/f'note-{i}').read_text().split() == ['ready', number.name]
    assert not (tmp_path/'note-2').exists() and process.returncode == 0


def test_a_second_signal_kills(tmp_path):
    process = pool_process(tmp_path, patient=True)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: all('SIGINT' in (tmp_path/f'note-{i}').read_text() for i in range(2)))
    time.sleep(0.6)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert out.strip() == '[137, 137, 130]'


def test_handlers_are_as_before_and_threads_may_run_pools():
    before = signal.getsignal(signal.SIGTERM)
    codes = []
    thread = threading.Thread(target=lambda: codes.extend(run_pool([python('')], quiet=True, every=EVERY)))
    thread.start(); thread.join(20)
    assert codes == run_pool([python('')], quiet=True, every=EVERY) == [0] and signal.getsignal(signal.SIGTERM) == before


def test_progress_says_what_failed(capsys):
    run_pool([python('raise SystemExit(1)'), python('')], 1, label='sweep', every=EVERY)
    line = capsys.readouterr().err.strip()
    assert line.startswith('sweep: 2/2 done') and line.endswith('0 running, 1 failed')
