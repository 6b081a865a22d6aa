"""The command line: one set of options in Config, flags and notebook; messages; and a whole run, from command to record."""
import dataclasses
import io
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from caption_nb import cli
from caption_nb.captioner import Captioner
from caption_nb.config import DECODERS, Config, DecoderOptions
from caption_nb.runs import (Run, config_from, execute, experiment, list_runs, notebook_parameters, parameters_form, reproduce_command,
                             update_form)
from caption_nb.training import demo_config

ENV = dict(os.environ, OMP_NUM_THREADS='1', COLUMNS='200')
TINY = ['--num-images', '40', '--epochs', '1', '--threads', '1', '--precision', 'fp32', '--embed-dim', '16', '--hidden-dim', '16',
        '--attention-dim', '8', '--max-len', '8']


def caption_nb(*words: str, cwd: Path, timeout: float = 300, **kw) -> subprocess.CompletedProcess:
    "Run the program as a user does"
    return subprocess.run([sys.executable, '-m', 'caption_nb.cli', *map(str, words)], cwd=cwd, env=ENV, capture_output=True, text=True,
                          timeout=timeout, **kw)


def said(capsys, *words: str) -> tuple[int, str, str]:
    "Exit status, stdout and stderr of the command, run in this process"
    try: status = cli.main(list(words))
    except SystemExit as e: status = e.code
    out, err = capsys.readouterr()
    return status, out, err


# one set of options

def fields() -> set[str]: return {f.name for f in dataclasses.fields(Config)}


def test_flags_are_config_fields(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '110')     # wider, and the groups stand side by side
    status, out, _ = said(capsys, 'train', '--help')
    flags = {flag.replace('-', '_') for flag in re.findall(r'^\W*--([a-z][a-z0-9-]*)', out, re.M)}
    assert status == 0 and flags - {'run_dir', 'preset', 'from'} == fields()
    for f in dataclasses.fields(Config): assert ' '.join(f.metadata['help'].split()[:3]) in out, f'the help of {f.name} is missing'
    for group in ('data', 'encoder', 'decoder', 'training', 'optimizer', 'scst', 'decoding', 'machine', 'record'): assert f' {group} options ' in out


def test_notebook_parameters_are_config_fields():
    seen = papermill.inspect_notebook(str(experiment('train')))
    assert set(seen) - {'run_dir'} == fields() and seen['run_dir']['default'] == "''"
    defaults = Config().to_dict()
    for name, p in seen.items():
        if name != 'run_dir': assert eval(p['default']) == defaults[name] and p['help'], name


def test_form_is_up_to_date(tmp_path):
    cell, = [c for c in nbformat.read(experiment('train'), 4).cells if 'parameters' in c.metadata.get('tags', [])]
    assert cell.source == parameters_form(), "Config changed: run python -c 'from caption_nb.runs import *; update_form(experiment())'"
    assert not [line for line in cell.source.splitlines() if line.count('=') > 1]
    (copy := tmp_path/'train.ipynb').write_bytes(experiment('train').read_bytes())
    update_form(copy)
    assert notebook_parameters(copy) == notebook_parameters(experiment('train'))


def test_nbdev_clean_keeps_the_tag(tmp_path):
    nbdev = pytest.importorskip('nbdev')
    root = Path(cli.__file__).resolve().parent.parent
    if not (root/'settings.ini').is_file(): pytest.skip('not in a clone: nbdev reads settings.ini')
    (tmp_path/'settings.ini').write_bytes((root/'settings.ini').read_bytes())
    (tmp_path/'nbs').mkdir()
    copy = tmp_path/'nbs'/'train.ipynb'
    copy.write_bytes(experiment('train').read_bytes())
    subprocess.run([Path(sys.executable).parent/'nbdev_clean', '--fname', str(copy)], cwd=tmp_path, check=True, capture_output=True)
    assert notebook_parameters(copy) == notebook_parameters(experiment('train'))
    assert copy.read_bytes() == experiment('train').read_bytes()


def values(f: dataclasses.Field):
    "Values of the field `f` that a shell can carry"
    if f.type is bool: return st.booleans()
    if f.type is int: return st.integers(max(1, int(f.metadata['low'] or 1)), 50)
    if f.type is float: return st.floats(0.01, 0.85)
    return st.sampled_from(f.metadata['choices']) if f.metadata['choices'] else st.just(f.default)


@st.composite
def configurations(draw) -> Config:
    "A decoder, any values of the fields that it takes, and of most others; heads and shortest captions that fit"
    decoder = draw(st.sampled_from(sorted(DECODERS)))
    foreign = set(DecoderOptions.__dataclass_fields__) - set(DECODERS[decoder].options)
    made = {f.name: draw(values(f)) for f in dataclasses.fields(Config) if f.name not in foreign}
    fits = dict(heads=1, init_state='mean', min_len=0, stage='xe', encoder='resnet18', finetune_from=2, encoder_start=0, decoder_start=0)
    return Config.from_dict(made | {n: v for n, v in fits.items() if n in made} | dict(decoder=decoder, data="it's a folder/ö", name='x y'))


@settings(max_examples=15, deadline=None)
@given(configurations())
def test_reproduce_command_round_trip(config):
    import shlex
    words = shlex.split(reproduce_command(config))
    assert words[:2] == ['caption-nb', 'train'] and cli.parse_config(words[2:])[0] == config


def test_parse_cases():
    assert cli.parse_config(['--encoder-weights', 'w.safetensors', '--flip', '--no-gate', '--lr=1e-3', '--encoder-stage', '-2'])[0].changed() == \
        dict(encoder_weights='w.safetensors', flip=True, gate=False, lr=1e-3, encoder_stage=-2)
    assert cli.parse_config([], default=demo_config())[0] == demo_config()


# messages

@pytest.mark.parametrize('words, expected', [
    (['--epocs', '3'], '--epochs'), (['--no-gates'], '--no-gate'), (['--encoder-weight', 'x'], '--encoder-weights'),
    (['--epochs', 'three'], "--epochs: invalid literal for int() with base 10: 'three'"), (['--lr', 'fast'], '--lr'),
    (['--epochs'], '--epochs'), (['--flip', 'yes'], 'yes'),
    (['--schedule', 'cosin'], "did you mean 'cosine'?"), (['--dropout', '1.5'], 'dropout=1.5: must be at most 0.95'),
    (['--encoder-mean', 'grey'], "encoder_mean='grey'"), (['--data', 'no/such folder'], '--data no/such folder: no such file or folder'),
    (['--resume', 'nothing'], "no run 'nothing'")])
def test_bad_usage_is_named(tmp_path, capsys, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    status, out, err = said(capsys, 'train', *words)
    assert status == 2 and expected in re.sub(r'\s*│\n│\s*', ' ', out + err)
    assert not list(tmp_path.iterdir()), 'a run folder was made although nothing could run'


def test_unknown_command(capsys):
    assert said(capsys, 'trian')[::2] == (2, "caption-nb: no command 'trian': did you mean 'train'?\n")
    assert said(capsys)[0] == 2
    status, out, _ = said(capsys, '--help')
    assert status == 0 and all(f'\n  {name} ' in out for name in cli.COMMANDS)


def test_run_folder_that_exists(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mine').mkdir()
    status, _, err = said(capsys, 'demo', '--run-dir', 'mine')
    assert status == 2 and 'mine exists already and nothing is ever overwritten' in err and not list((tmp_path/'mine').iterdir())


def test_runs_and_caption_messages(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(capsys, 'runs')[:2] == (0, 'no runs in papermill_runs\n')
    assert 'there are no runs yet' in said(capsys, 'caption', 'x', 'photo.jpg')[2]
    assert said(capsys, 'caption', 'x')[0] == 2
    assert said(capsys, 'check', 'nowhere')[0] == 2
    status, _, err = said(capsys, 'extract', '--encoder', 'scene_cnn', '--encoder-weights', 'random')
    assert status == 2 and 'trained jointly' in err


def test_help_is_quick_and_torch_free(tmp_path):
    code = "import sys; from caption_nb.cli import main; main(['--help']); main(['--version']); sys.exit('torch' in sys.modules)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r'^caption-nb \d+\.\d+', done.stdout, re.M)
    assert time.monotonic() - start < 10     # 0.3 s on an idle machine; the tests may run on a busy one


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
    return '\n'.join(cli.watch_page(run, cli.MetricsTail(run.path/'metrics.jsonl').read(), width, height))


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
    assert all(cli._columns(line) <= width for line in lines) and (height is None or len(lines) <= height)
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
    tail = cli.MetricsTail(path)
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
    tail = cli.MetricsTail(run.path/'metrics.jsonl')
    tail.read()
    start = time.process_time()
    tail.read()
    assert time.process_time() - start < 0.02
    cli.watch_page(run, tail.rows)
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
    line = cli.sparkline(values, width)
    assert len(line) == min(width, sum(v is not None and abs(v) <= 1e300 for v in values)) and set(line) <= set('▁▂▃▄▅▆▇█')


def test_follow_a_terminal(tmp_path):
    import io
    class Terminal(io.StringIO):
        def isatty(self): return True
    terminal = Terminal()
    follow = cli.Follow(tmp_path, terminal)
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
        follow = cli.Follow(tmp_path, out, every=0)
        follow('display_data', dict(data={'text/html': '<progress value="1"></progress> training: 1/2'}))
        follow.line('epoch 1')
        try: out.close()
        except BrokenPipeError: pass


# a whole run

@pytest.fixture(scope='module')
def demo(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    "A run of the demo made small: its folder, and what the command printed"
    folder = tmp_path_factory.mktemp('demo')
    done = caption_nb('demo', *TINY, '--cache-dir', 'cache', cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((folder/'papermill_runs').iterdir()), done


def test_run_folder_holds_everything(demo):
    run, _ = demo
    there = {p.name for p in run.iterdir()}
    assert {'attempt-1.ipynb', 'run.ipynb', 'config.json', 'summary.md', 'metrics.jsonl', 'results.json', 'captions_dev.json', 'figures',
            'environment.json', 'checkpoints', 'status.json'} == there
    for which in ('last', 'best'):
        assert {'model.safetensors', 'config.json', 'vocab.json', 'preprocess.json'} <= {p.name for p in (run/'checkpoints'/which).iterdir()}
    figures = {p.name for p in (run/'figures').iterdir()}
    assert {'data_examples.png', 'caption_lengths.png', 'curves.png', 'captions_best.png', 'captions_worst.png', 'attention_1.png',
            'attention_1.gif', 'captions_dev.html'} <= figures
    config, env, results = Run(run).config, Run(run).environment, Run(run).results
    assert config == demo_config(num_images=40, epochs=1, threads=1, precision='fp32', embed_dim=16, hidden_dim=16, attention_dim=8, max_len=8,
                                 cache_dir='cache').to_dict()
    assert set(env['fingerprints']) == {'data', 'vocabulary'} and env['packages']['torch']
    assert {'Bleu_1', 'Bleu_4', 'ROUGE_L', 'CIDEr'} <= set(results['dev']['scores']) and results['dev']['signature']
    rows = json.loads((run/'captions_dev.json').read_text())
    assert len(rows) == 4 and set(rows[0]) == {'image_id', 'caption'}


def test_record_reads_well(demo):
    run, done = demo
    nb = nbformat.read(run/'run.ipynb', 4)
    assert nb.metadata.caption_nb['status'] == 'done' and nb.cells[0].source.startswith('# ')
    outputs = [o for c in nb.cells for o in c.get('outputs', [])]
    assert sum('image/png' in o.get('data', {}) for o in outputs) >= 8
    assert not [o for o in outputs if o.get('name') == 'stderr' or 'application/vnd.jupyter.widget-view+json' in o.get('data', {})]
    text = json.dumps([o for o in outputs])
    assert 'Signature' in text and 'caption-nb train --num-images 40' in text and 'image/gif' in text
    assert (run/'run.ipynb').stat().st_size < 3e6
    assert all(len(line) <= 120 for c in nb.cells if c.cell_type == 'code' and not c.metadata.get('tags') for line in c.source.splitlines())
    summary = (run/'summary.md').read_text()
    assert '**done**' in summary and '| dev |' in summary and 'caption-nb train' in summary
    assert f'run folder: papermill_runs/{run.name}' in done.stdout and '| dev |' in done.stdout and 'summary.md' in done.stdout
    assert 'epoch 1: dev' in done.stderr


def test_caption_from_a_run(demo, capsys, tmp_path, monkeypatch):
    run, _ = demo
    photo = tmp_path/'photo.png'
    Image.new('RGB', (112, 112), 'red').save(photo)
    (tmp_path/'broken.jpg').write_text('not a photo')
    monkeypatch.chdir(run.parent.parent)
    status, out, err = said(capsys, 'caption', run.name, str(photo), str(tmp_path/'broken.jpg'), '--beam', '2', '--json')
    assert status == 1 and 'broken.jpg' in err
    expected = Captioner.load(run).caption(photo, beam=2)
    row = json.loads(out)
    assert row['photo'] == str(photo) and row['caption'] == row['captions'][0]['caption'] == expected and len(row['captions']) == 1
    _, out, _ = said(capsys, 'caption', run.name, str(photo), '--also', run.name, '--beam', '2')     # the vote of one model with itself
    assert out == f'{photo}: {expected}\n'
    _, out, _ = said(capsys, 'caption', run.name, str(photo), '--n', '3', '--beam', '6', '--groups', '3', '--force', 'green')
    assert len(out.splitlines()) == 3 and all('green' in line.split() for line in out.splitlines())
    draws = [said(capsys, 'caption', run.name, str(photo), '--sample', '--n', '4', '--temperature', '2', '--seed', seed)[1] for seed in '001']
    assert draws[0] == draws[1] != draws[2] and len(draws[0].splitlines()) == 4
    for words, message in ((['--force', 'gren'], "did you mean 'green'"), (['--sample', '--force', 'green'], '--force and --groups are for searching'),
                           (['--sample', '--top-p', '2'], 'top_p must be above 0'), (['--groups', '2', '--beam', '3'], 'cannot be divided')):
        status, _, err = said(capsys, 'caption', run.name, str(photo), *words)
        assert status == 2 and message in err
    assert said(capsys, 'caption', str(run/'checkpoints'/'best'), str(photo))[0] == 0
    status, out, _ = said(capsys, 'runs', '--json')
    assert json.loads(out)['status'] == 'done' and 'demo' in said(capsys, 'runs')[1]


def test_resume_keeps_the_configuration(demo, capsys, monkeypatch):
    run, _ = demo
    monkeypatch.chdir(run.parent.parent)
    status, _, err = said(capsys, 'train', '--resume', run.name, '--embed-dim', '32', '--lr', '1')
    assert status == 2 and '--embed-dim 32' in err and 'stays the same experiment' in err and '--lr' not in err
    assert not (run/'attempt-2.ipynb').exists()


def test_plain_papermill_with_a_misspelt_parameter(tmp_path):
    "Who calls papermill without us: its warning is not enough, the notebook itself refuses"
    with pytest.raises(papermill.PapermillExecutionError, match="unknown field 'epocs': did you mean 'epochs'"):
        papermill.execute_notebook(str(experiment('train')), str(tmp_path/'out.ipynb'), dict(epocs=3, runs_dir=str(tmp_path/'runs')),
                                   cwd=str(tmp_path), progress_bar=False)
    assert not (tmp_path/'runs').exists()


def test_interrupted_then_resumed(tmp_path):
    "Ctrl-C while training: a checkpoint, a truthful record, status 130; then the same run is finished in the same folder"
    long = [*TINY, '--cache-dir', 'cache', '--epochs', '400', '--eval-every', '400', '--log-every', '1', '--schedule', 'constant']
    with subprocess.Popen([sys.executable, '-m', 'caption_nb.cli', 'demo', *long], cwd=tmp_path, env=ENV, stderr=subprocess.PIPE,
                          text=True) as process:
        try:
            end = time.monotonic() + 180
            while not list(tmp_path.glob('papermill_runs/*/metrics.jsonl')): assert time.monotonic() < end; time.sleep(0.1)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        finally: process.kill()
    run = next((tmp_path/'papermill_runs').iterdir())
    assert process.returncode == 130 and 'interrupted by SIGINT' in err and f'--resume papermill_runs/{run.name}' in err
    assert Run(run).status == 'interrupted' and 'stopped at step' in Run(run).attempts[0]['error']['message']
    assert '**interrupted** (SIGINT)' in (run/'summary.md').read_text() and (run/'checkpoints'/'last'/'training.pt').is_file()
    steps = Run(run).metrics[-1]['step']
    epochs = steps//1 + 2     # one step an epoch would be the least
    done = caption_nb('train', '--resume', run.name, '--epochs', str(epochs), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    again = Run(run)
    assert again.status == 'done' and [a['status'] for a in again.attempts] == ['interrupted', 'done'] and again.results
    assert (run/'attempt-1.ipynb').is_file() and (run/'attempt-2.ipynb').is_file() and len(list(run.parent.iterdir())) == 1
    logged = [row['step'] for row in again.metrics if 'loss' in row]
    assert logged == sorted(set(logged)), 'steps were lost or repeated'
