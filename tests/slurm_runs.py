"What tests and benchmarks of jobs share: tiny runs, commands, notebooks of one's own, and a look at what came of them"
import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat

TINY = dict(encoder='scene_cnn', num_images=24, image_size=64, min_freq=1, embed_dim=16, hidden_dim=16, attention_dim=16, epochs=1, images_per_batch=4,
            max_len=8, beam=1, threads=1, precision='fp32', device='cpu')
PROFILE = dict(cpus=1, memory='700M', time='0:20:00', warning=60)
TRAIN = '''from caption_nb.runs import config_from, open_run
from caption_nb.training import Trainer
config = config_from(globals())
trainer = Trainer(config, open_run(config, run_dir)).prepare()
trainer.fit()
trainer.evaluate('dev')'''


def flags(**values) -> list[str]:
    "Fields of a configuration as words of a command line"
    return [f'--{name.replace("_", "-")}={value}' for name, value in values.items()]


def toml(path: Path, **values) -> Path:
    "Write a profile"
    def shown(v): return '{' + ', '.join(f'{k} = {shown(x)}' for k, x in v.items()) + '}' if isinstance(v, dict) else json.dumps(v)
    path.write_text(''.join(f'{k} = {shown(v)}\n' for k, v in (PROFILE | values).items()))
    return path


def notebook(path: Path, *cells: str) -> Path:
    "A notebook of one's own: the form of the shipped one, and `cells`"
    from caption_nb.runs import experiment
    nb = nbformat.read(experiment('train'), 4)
    form = next(c for c in nb.cells if 'parameters' in c.metadata.get('tags', []))
    nb.cells = [form, *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(nb, path)
    return path


def say(cwd: Path, *words: str) -> tuple[int, str, str]: # Exit status, what it printed, its errors
    "`caption-nb WORDS` in the folder `cwd`, in this process, which has imported already what takes two seconds"
    from caption_nb.cli import main
    out, err, before = io.StringIO(), io.StringIO(), (os.getcwd(), sys.argv)
    os.chdir(cwd)
    sys.argv = ['caption-nb', *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): status = main(sys.argv[1:])
    except SystemExit as e: status = e.code   # tyro's
    finally: os.chdir(before[0]); sys.argv = before[1]
    return status, out.getvalue(), err.getvalue()


def command(cwd: Path, *words: str, **env: str) -> subprocess.CompletedProcess:
    "The same in a process of its own"
    return subprocess.run([sys.executable, '-m', 'caption_nb.cli', *map(str, words)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | env, timeout=300)


def done(answer: tuple[int, str, str]) -> str: # What it printed
    "The command has done what it should"
    status, out, err = answer
    assert status == 0, f'exit status {status}\n{out}\n{err}'
    return out


def read_json(path: Path): return json.loads(path.read_text(encoding='utf-8'))


def jobs(folder: Path) -> dict[str, int]: # Step → the job submitted last for it
    "What was submitted from a job folder"
    return {made['step']: made['id'] for made in read_json(folder/'job.json')['jobs']}


def task_runs(folder: Path) -> list[Path]:
    "The run folders of a job folder"
    return [Path(task['run']) for task in read_json(folder/'job.json')['tasks']]


def logs(folder: Path) -> str:
    "All that the jobs of a job folder have said"
    return ''.join(f'--- {p.name}\n{p.read_text(errors="replace")}' for p in sorted((folder/'logs').glob('*')))


def check_record(run: Path, reasons: Sequence[str] = ('done',)) -> nbformat.NotebookNode:
    "The executed notebook of a run: the attempts are all there, and the last one has been executed to the end if it is done"
    status = read_json(run/'status.json')
    assert [a['reason'] for a in status['attempts']] == [*reasons], status
    books = [nbformat.read(p, 4) for p in sorted(run.glob('attempt-*.ipynb'))]
    assert [b.metadata.caption_nb['reason'] for b in books] == [*reasons] and os.readlink(run/'run.ipynb') == f'attempt-{len(books)}.ipynb'
    if reasons[-1] == 'done':
        assert status['status'] == 'done' and all(c.metadata.papermill.status == 'completed' for c in books[-1].cells)
    return books[-1]


def said(nb: nbformat.NotebookNode) -> str:
    "What the cells of a notebook printed"
    return ''.join(o.get('text', '') for c in nb.cells for o in c.get('outputs', []) if o.output_type == 'stream')
