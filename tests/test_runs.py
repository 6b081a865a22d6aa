"""Run folders and records: unique, whole, and true also when the run is stopped, fails or is killed."""
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from caption_nb import runs
from caption_nb.runs import (Run, config_from, execute, find_run, list_runs, new_run, note_fingerprints, notebook_parameters, open_run,
                             reproduce_command, write_summary)
from caption_nb.training import Config

PYTHON3 = dict(name='python3', language='python', display_name='Python 3')


def notebook(folder: Path, *cells: str) -> Path:
    "An experiment with one parameter, `x`, and `cells`"
    nb = new_notebook(metadata=dict(kernelspec=PYTHON3))
    nb.cells = [new_code_cell('x = 1  # a number\n', metadata=dict(tags=['parameters'])), *map(new_code_cell, cells)]
    path = folder/'experiment.ipynb'
    nbformat.write(nb, path)
    return path


def launch(folder: Path, *cells: str) -> tuple[subprocess.Popen, Path]:
    "Execute `cells` in a process of its own, as `caption-nb train` does; returns it and the run folder"
    run = folder/'run'
    run.mkdir()
    code = f'''
        import sys
        from caption_nb.runs import execute
        truth = execute({str(notebook(folder, *cells))!r}, {str(run)!r}, every=0.5)
        print(truth["status"], truth["signal"])'''
    def listen(): signal.signal(signal.SIGHUP, signal.SIG_DFL)     # under nohup the tests ignore it, and what they start would too
    process = subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=listen)
    return process, run


def wait_for(path: Path, seconds: float = 90):
    "Wait until `path` exists"
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f'{path} did not appear in {seconds} s'
        time.sleep(0.05)


def latest(run: Path): return nbformat.read(run/'run.ipynb', 4)


def cell_states(nb) -> list[str]: return [c.metadata.papermill['status'] for c in nb.cells if c.cell_type == 'code']


# the folder

def test_names_are_unique_across_threads(tmp_path):
    config = Config(name='same')
    with ThreadPoolExecutor(8) as pool: made = list(pool.map(lambda _: runs._unique(tmp_path, 'same-second'), range(40)))
    assert len(set(made)) == 40 and all(p.is_dir() for p in made)
    first, second = new_run(config, tmp_path/'runs'), new_run(config, tmp_path/'runs')
    assert first != second
    assert re.fullmatch(rf'\d{{4}}-\d\d-\d\d-\d{{6}}-same-{config.hash()}', first.name)
    assert json.loads((first/'config.json').read_text()) == config.to_dict()


@pytest.mark.parametrize('name', ['../../etc', 'a/b', '..', 'weiß nicht', '<script>', '-rf', ' '])
def test_a_name_stays_in_its_folder(tmp_path, name):
    run = new_run(Config(name=name), tmp_path)
    assert run.parent == tmp_path and run.resolve().parent == tmp_path.resolve()
    assert re.fullmatch(r'[A-Za-z0-9_.-]+', run.name)


def test_an_existing_folder_is_refused(tmp_path):
    run = new_run(Config(), folder=tmp_path/'mine')
    before = (run/'config.json').read_bytes()
    with pytest.raises(FileExistsError, match='mine exists already and nothing is ever overwritten.*--resume'):
        new_run(Config(epochs=3), folder=run)
    assert (run/'config.json').read_bytes() == before
    (tmp_path/'file').touch()
    with pytest.raises(NotADirectoryError, match='it is a file'): new_run(Config(), tmp_path/'file')


def test_environment(tmp_path, monkeypatch):
    monkeypatch.setenv('SLURM_JOB_ID', '4711')
    monkeypatch.setenv('MY_PASSWORD', 'correct horse')
    run = new_run(Config(), tmp_path)
    env = Run(run).environment
    assert env['job']['job_id'] == '4711' and env['hardware']['cores'] and env['packages']['torch'] and env['python']
    assert 'correct horse' not in (run/'environment.json').read_text()
    note_fingerprints(run, data='abc', features=None)
    assert note_fingerprints(run, vocabulary='def') == dict(data='abc', vocabulary='def')
    clone = Path(runs.__file__).parent.parent
    if (clone/'.git').exists(): assert re.fullmatch('[0-9a-f]{40}', env['git']['revision'])


# executing

@pytest.fixture(scope='module')
def two_attempts(tmp_path_factory) -> Path:
    "A run whose first attempt failed and whose second was fine"
    folder = tmp_path_factory.mktemp('two')
    run = new_run(Config(name='two'), folder)
    path = notebook(folder, 'import os, sys, signal, matplotlib; print(os.getcwd()); print(sys.executable); print(matplotlib.get_backend())',
                    'print(6//x)', 'print("after")')
    os.environ['MPLBACKEND'] = 'agg'
    try: first, second = execute(path, run, dict(x=0)), execute(path, run, dict(x=3))
    finally: del os.environ['MPLBACKEND']
    assert (first['status'], second['status']) == ('error', 'done')
    return run


def test_error_is_kept(two_attempts):
    nb = nbformat.read(two_attempts/'attempt-1.ipynb', 4)
    assert 'failed with `ZeroDivisionError`' in nb.cells[0].source and '--resume' in nb.cells[0].source
    assert cell_states(nb) == ['completed', 'completed', 'completed', 'failed', 'pending']
    truth = nb.metadata.caption_nb
    assert truth['status'] == 'error' and truth['error']['type'] == 'ZeroDivisionError' and truth['ended'] and truth['attempt'] == 1
    assert 'division' in truth['error']['message']
    assert nb.metadata.papermill['exception'] is True


def test_success_is_kept(two_attempts):
    nb = latest(two_attempts)
    assert nb.metadata.caption_nb['status'] == 'done' and nb.metadata.caption_nb['attempt'] == 2
    assert nb.cells[-2].outputs[0].text == '2\n'
    assert set(cell_states(nb)) == {'completed'}
    assert not any('papermill-error-cell-tag' in c.metadata.get('tags', []) for c in nb.cells)
    status = json.loads((two_attempts/'status.json').read_text())
    assert [a['status'] for a in status['attempts']] == ['error', 'done'] and status['status'] == 'done'
    assert not list(two_attempts.glob('.*tmp')) and not list(two_attempts.glob('kernel-*.log'))


def test_kernel_is_this_python_here(two_attempts):
    folder, interpreter, backend = latest(two_attempts).cells[2].outputs[0].text.splitlines()
    assert folder == os.getcwd() and interpreter == sys.executable
    assert 'inline' in backend     # although MPLBACKEND=agg was set


def test_needs_no_kernelspec(tmp_path):
    "A machine whose kernel called python3 is another Python, or broken"
    spec = tmp_path/'jupyter'/'kernels'/'python3'
    spec.mkdir(parents=True)
    (spec/'kernel.json').write_text(json.dumps(dict(argv=['/nowhere/python', '-f', '{connection_file}'], display_name='x', language='python')))
    run = tmp_path/'run'
    run.mkdir()
    code = f'from caption_nb.runs import execute; print(execute({str(notebook(tmp_path, "print(x)"))!r}, {str(run)!r})["status"])'
    done = subprocess.run([sys.executable, '-c', code], env=dict(os.environ, JUPYTER_PATH=str(tmp_path/'jupyter')), capture_output=True,
                          text=True, timeout=60)
    assert done.stdout.strip() == 'done', done.stderr


def test_misspelt_parameter_is_refused(tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    with pytest.raises(ValueError, match="experiment.ipynb has no parameter 'xx': did you mean 'x'"): execute(notebook(tmp_path), run, dict(xx=2))
    assert not list(run.iterdir())
    untagged = tmp_path/'untagged.ipynb'
    nbformat.write(new_notebook(cells=[new_code_cell('x = 1')], metadata=dict(kernelspec=PYTHON3)), untagged)
    with pytest.raises(ValueError, match="0 cells are tagged 'parameters'"): execute(untagged, run, dict(x=2))
    with pytest.raises(FileNotFoundError, match='no such run folder'): execute(notebook(tmp_path), tmp_path/'none')


WAITS = '''
import time, pathlib
print('before', flush=True)
pathlib.Path({marker!r}).touch()
try: time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path({saved!r}).write_text('checkpoint')
    raise
'''


@pytest.mark.parametrize('name, whole_group', [('SIGINT', False), ('SIGTERM', False), ('SIGTERM', True), ('SIGHUP', False)])
def test_signal_interrupts_the_cell(tmp_path, name, whole_group):
    marker, saved = tmp_path/'running', tmp_path/'saved'
    process, run = launch(tmp_path, WAITS.format(marker=str(marker), saved=str(saved)), 'print("never")')
    wait_for(marker)
    if whole_group:     # a cluster signals every process of the job, the kernel too
        kernel = int(subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()[0])
        os.kill(kernel, signal.SIGTERM)
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=90)
    assert out.split() == ['interrupted', name]
    assert saved.read_text() == 'checkpoint'
    nb = latest(run)
    assert f'interrupted by {name}' in nb.cells[0].source
    assert cell_states(nb) == ['completed', 'failed', 'pending']
    assert 'before' in nb.cells[-2].outputs[0].text and nb.cells[-2].outputs[-1].ename == 'KeyboardInterrupt'
    assert nb.metadata.caption_nb['signal'] == name and json.loads((run/'status.json').read_text())['status'] == 'interrupted'


def test_signal_between_cells_stops_before_the_next(tmp_path):
    "Many short cells: wherever the signal falls, the attempt ends as interrupted, and soon"
    marker = tmp_path/'running'
    process, run = launch(tmp_path, f'import pathlib; pathlib.Path({str(marker)!r}).touch()', *['pass']*3000)
    wait_for(marker)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    out, _ = process.communicate(timeout=90)
    assert out.split() == ['interrupted', 'SIGTERM'] and time.monotonic() - start < 45
    assert cell_states(latest(run))[-1] == 'pending'


def test_second_ctrl_c_kills_a_deaf_cell(tmp_path):
    marker = tmp_path/'running'
    deaf = f'''
import time, pathlib
pathlib.Path({str(marker)!r}).touch()
while True:
    try: time.sleep(60)
    except KeyboardInterrupt: pass
'''
    process, run = launch(tmp_path, deaf)
    wait_for(marker)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=90)
    assert out.split() == ['interrupted', 'SIGINT']


def test_killed_kernel(tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    truth = execute(notebook(tmp_path, 'print("before")', 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)', 'print("never")'), run)
    assert truth['status'] == 'kernel died' and truth['signal'] is None
    nb = latest(run)
    assert 'kernel process died' in nb.cells[0].source
    assert cell_states(nb) == ['completed', 'completed', 'failed', 'pending']
    assert json.loads((run/'status.json').read_text())['error']['type'] == 'DeadKernelError'


def test_killed_launcher_leaves_what_was_printed(tmp_path):
    "kill -9 of everything: the record is there, whole, at most a moment old, and does not pass for a running one"
    marker = tmp_path/'running'
    process, run = launch(tmp_path, f'import time, pathlib; print("line", flush=True); pathlib.Path({str(marker)!r}).touch(); time.sleep(60)')
    wait_for(marker)
    time.sleep(1.5)     # saved every 0.5 s here, although nothing is printed any more
    process.kill()
    process.communicate()
    (run/'config.json').write_text(Config().to_json())
    assert 'line' in latest(run).cells[-1].outputs[0].text
    assert Run(run).status == 'killed'
    wait_for_end = time.monotonic() + 15
    while subprocess.run(['pgrep', '-f', str(run)], capture_output=True).stdout and time.monotonic() < wait_for_end: time.sleep(0.2)


def test_a_kernel_that_does_not_start_gets_another_chance(tmp_path, monkeypatch):
    run, made = tmp_path/'run', []
    run.mkdir()
    class Shaky(runs._Kernel):
        def __init__(self, log):
            super().__init__(log)
            made.append(self)
            if len(made) < 3: self.send(signal.SIGKILL)
    monkeypatch.setattr(runs, '_Kernel', Shaky)
    truth = execute(notebook(tmp_path, 'print(x)'), run)
    assert (truth['status'], truth['reason'], len(made)) == ('done', 'done', 3) and latest(run).cells[-1].outputs[0].text == '1\n'
    assert all(k.process.poll() is not None and not k.sockets.exists() for k in made)


def test_signs_of_life_of_a_silent_cell(tmp_path, monkeypatch):
    run = tmp_path/'run'
    run.mkdir()
    monkeypatch.setattr(runs, 'HEARTBEAT', 0.5)
    truth = execute(notebook(tmp_path, 'import os, time; p = "RUN/attempt-1.ipynb"; time.sleep(2); a = os.stat(p).st_mtime; time.sleep(2); '
                             'print(os.stat(p).st_mtime > a)'.replace('RUN', str(run))), run)
    assert truth['status'] == 'done' and latest(run).cells[-1].outputs[0].text == 'True\n'


def test_forms_are_read_without_papermill(tmp_path):
    import papermill
    for path in runs.experiments_folder().glob('*.ipynb'):
        theirs = {name: p['default'] for name, p in papermill.inspect_notebook(str(path)).items()}
        assert notebook_parameters(path) == theirs
    (tmp_path/'no.ipynb').write_text('{}')
    with pytest.raises(ValueError, match='is not a notebook of format 4'): notebook_parameters(tmp_path/'no.ipynb')


def test_an_older_attempt_does_not_take_the_link_back(tmp_path):
    records = [runs.Record(tmp_path, n) for n in (1, 2)]
    for record in (records[1], records[0]):
        record.nb = new_notebook()
        record.save(); record.write_status()
    assert os.readlink(tmp_path/'run.ipynb') == 'attempt-2.ipynb'
    status = json.loads((tmp_path/'status.json').read_text())
    assert status['attempt'] == 2 and [a['attempt'] for a in status['attempts']] == [1, 2]


def test_a_crash_leaves_its_last_words(tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    code = 'import faulthandler, sys; faulthandler.enable(sys.__stderr__); import ctypes; ctypes.string_at(0)'
    truth = execute(notebook(tmp_path, code), run)
    assert truth['status'] == 'kernel died' and 'Segmentation fault' in truth['error']['message']
    assert 'Segmentation fault' in (run/'kernel-1.log').read_text()


def test_children_of_the_kernel_can_be_terminated(tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    code = '''
import multiprocessing, subprocess, time
p = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,)); p.start(); p.terminate(); p.join(10); print(p.exitcode)
q = subprocess.Popen(['sleep', '60']); q.terminate(); print(q.wait(10))'''
    execute(notebook(tmp_path, code), run)
    assert latest(run).cells[-1].outputs[0].text.split() == ['-15', '-15']


def test_disk_full_leaves_the_record_before(tmp_path, monkeypatch):
    record = runs.Record(tmp_path, 1)
    record.nb = new_notebook()
    record.save()
    before = record.path.read_bytes()
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    record.nb.cells.append(new_code_cell('1'))
    with pytest.raises(OSError, match='No space left'): record.save()
    assert record.path.read_bytes() == before and not list(tmp_path.glob('.*'))


# parameters of the notebook

FORM = '\n'.join(f'{name} = {value!r}' for name, value in Config().to_dict().items())


def namespace(**more) -> dict: return Config().to_dict() | dict(In=[FORM, *more.pop('cells', [])], run_dir='', exit=object()) | more


def test_config_from_a_notebook():
    assert config_from(namespace()) == Config()
    assert config_from(namespace(cells=['# Parameters\nepochs = 2'], epochs=2)).epochs == 2
    with pytest.raises(ValueError, match="'epocs': did you mean 'epochs'"): config_from(namespace(cells=['# Parameters\nepocs = 2'], epocs=2))
    with pytest.raises(ValueError, match="'epocs': did you mean"): config_from(namespace(In=[FORM + '\nepocs = 2'], epocs=2))
    with pytest.raises(ValueError, match="epochs='two': expected int, got str"):
        config_from(namespace(cells=['# Parameters\nepochs = "two"'], epochs='two'))
    # a name that was corrected, and one that a later cell defines
    assert config_from(namespace(In=[FORM + '\nepocs = 2', FORM, 'best = 3'], epocs=2, best=3)) == Config()


def test_open_run(tmp_path):
    run = open_run(Config(runs_dir=str(tmp_path)))
    assert run.parent == tmp_path and (run/'figures').is_dir()
    assert open_run(Config(), str(run)) == run
    with pytest.raises(FileNotFoundError, match='leave run_dir empty'): open_run(Config(), str(tmp_path/'none'))


# reading

def test_run_reader_and_table(two_attempts, tmp_path):
    run = Run(two_attempts)
    assert run.status == 'done' and run.config['name'] == 'two' and len(run.attempts) == 2 and run.results == {}
    (tmp_path/'r1').mkdir()
    (tmp_path/'r1'/'config.json').write_text(Config().to_json())
    (tmp_path/'r1'/'metrics.jsonl').write_text('{"epoch": 1, "loss": 3.0}\n{"epoch": 2, "loss": 2.0}\n{"epoch": 3, "lo')
    (tmp_path/'r1'/'results.json').write_text(json.dumps(dict(dev=dict(corpus=dict(CIDEr=0.5, Bleu_4=0.2), signature='sig'))))
    table = list_runs(tmp_path)
    assert table.epochs[0] == 2 and table.CIDEr[0] == 0.5 and table.status[0] == 'done'
    assert list(list_runs(tmp_path/'nothing')) == list(table)
    with pytest.raises(FileNotFoundError, match="no checkpoint 'best'"): Run(tmp_path/'r1').checkpoint()


def test_find_run(tmp_path):
    run = new_run(Config(name='cats'), tmp_path)
    assert find_run('cats', tmp_path) == run == find_run(run)
    new_run(Config(name='cats'), tmp_path)
    with pytest.raises(FileNotFoundError, match='part of 2 names'): find_run('cats', tmp_path)
    with pytest.raises(FileNotFoundError, match='did you mean'): find_run(run.name.replace('cats', 'cast')[:-2] + 'xx', tmp_path)
    with pytest.raises(FileNotFoundError, match='not a run folder'): find_run(tmp_path)
    with pytest.raises(FileNotFoundError, match='there are no runs yet'): find_run('x', tmp_path/'none')


def test_summary(two_attempts):
    (two_attempts/'results.json').write_text(json.dumps(dict(dev=dict(corpus=dict(CIDEr=0.51, Bleu_4=0.2), signature='tokens: ptb'))))
    text = write_summary(two_attempts).read_text()
    assert '| dev | 0.5100 | 0.2000 |' in text and 'tokens: ptb' in text and 'caption-nb train --name two' in text
    assert '`attempt-1.ipynb`' in text and '**done**' in text
    (two_attempts/'results.json').unlink()


def test_reproduce_command():
    assert reproduce_command(Config()) == 'caption-nb train'
    command = reproduce_command(Config(flip=True, gate=False, data="it's", lr=1e-3, resume='x'))
    assert '--flip' in command and '--no-gate' in command and '--lr 0.001' in command and 'resume' not in command


def test_experiments_are_found():
    assert (runs.experiments_folder()/'train.ipynb').is_file()
    with pytest.raises(FileNotFoundError, match="did you mean 'train'"): runs.experiment('trian')
