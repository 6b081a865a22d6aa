"""The command line: one set of options in Config, flags and notebook; messages; and a whole run, from command to record."""
import dataclasses
import json
import os
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
from caption_nb.runs import (Run, config_from, experiment, list_runs, notebook_parameters, parameters_form, reproduce_command,
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
    "A decoder, any values of the fields that it takes, and of most others; heads, shortest captions and views that fit"
    decoder = draw(st.sampled_from(sorted(DECODERS)))
    foreign = set(DecoderOptions.__dataclass_fields__) - set(DECODERS[decoder].options)
    made = {f.name: draw(values(f)) for f in dataclasses.fields(Config) if f.name not in foreign}
    fits = dict(heads=1, init_state='mean', min_len=0, stage='xe', encoder='resnet18', finetune_from=2, encoder_start=0, decoder_start=0,
                feature_crops=0, pca=0, pca_whiten=False)
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


def test_another_decoder_leaves_behind_what_it_does_not_have():
    config, _ = cli.parse_config(['--decoder', 'lstm'], 'demo', default=demo_config())
    assert config.decoder == 'lstm' and config.embed_dim == 128 and config.attention_dim == Config().attention_dim
    with pytest.raises(ValueError, match='gate=False: the decoder lstm has no such option'):
        cli.parse_config(['--decoder', 'lstm', '--no-gate'], 'demo', default=demo_config())


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


def test_check_with_and_without_photos(tmp_path, capsys):
    "A damaged photo is found by who opens it"
    from caption_nb.scenes import make_scenes
    make_scenes(tmp_path/'scenes', 12)
    next((tmp_path/'scenes').rglob('*.png')).write_bytes(b'')
    status, out, _ = said(capsys, 'check', str(tmp_path/'scenes'))
    assert status == 1 and 'truncated' in out
    status, out, _ = said(capsys, 'check', str(tmp_path/'scenes'), '--no-photos')
    assert status == 0 and 'truncated' not in out


def test_help_is_quick_and_torch_free(tmp_path):
    code = "import sys; from caption_nb.cli import main; main(['--help']); main(['--version']); sys.exit('torch' in sys.modules)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r'^caption-nb \d+\.\d+', done.stdout, re.M)
    assert time.monotonic() - start < 10     # 0.3 s on an idle machine; the tests may run on a busy one


# captions without a model

COCO = json.loads((Path(__file__).parent/'data'/'caption_scores_committable.json').read_text())['edge_8']


@pytest.fixture
def coco_files(tmp_path, monkeypatch) -> Path:
    "COCO's annotations and results of images whose scores by coco-caption are known; the current folder"
    monkeypatch.chdir(tmp_path)
    number = {name: n for n, name in enumerate(COCO['refs'], 7)}
    captions = [dict(id=i, image_id=number[name], caption=c) for i, (name, c) in enumerate((n, c) for n, cs in COCO['refs'].items() for c in cs)]
    Path('references.json').write_text(json.dumps(dict(images=[dict(id=n, file_name=f'{n}.jpg') for n in number.values()], annotations=captions)))
    Path('results.json').write_text(json.dumps([dict(image_id=number[name], caption=c) for name, c in COCO['hyps'].items()]))
    Path('worse.json').write_text(json.dumps([dict(image_id=n, caption='a thing') for n in number.values()]))
    return tmp_path


def test_score_prints_the_numbers_of_coco_caption(coco_files, capsys):
    status, out, _ = said(capsys, 'score', 'results.json', '--references', 'references.json', '--metrics', 'bleu,rouge,cider', '--json', '--out', 'scored')
    assert status == 0
    found = json.loads(Path('scored/scores_results.json').read_text())
    for name in ('Bleu_1', 'Bleu_2', 'Bleu_3', 'Bleu_4', 'ROUGE_L', 'CIDEr'):
        assert found['overall'][name] == pytest.approx(COCO['corpus'][name], abs=1e-9, rel=0)
    first = next(iter(COCO['per_image']))
    assert found['imgToEval']['7']['CIDEr'] == pytest.approx(COCO['per_image'][first]['CIDEr'], abs=1e-9)
    assert json.loads(out)['reports']['results.json']['scores'] == found['overall'] and Path('scored/scores_results.csv').is_file()


def test_score_compares_two_files_photo_by_photo(coco_files, capsys):
    status, out, _ = said(capsys, 'score', 'results.json', 'worse.json', '--references', 'references.json', '--metrics', 'bleu,rouge,cider', '--resamples', '200')
    assert status == 0 and out.count('tok=ptb|refs=') == 1 and 'p ' in out and 'worse.json' in out


def test_score_needs_no_torch(coco_files):
    code = ("import sys; from caption_nb.cli import main; "
            "main(['score', 'results.json', '--references', 'references.json', '--metrics', 'bleu,rouge,cider,wer']); sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and 'CIDEr' in done.stdout, done.stderr


@pytest.mark.parametrize('words, expected', [
    ([], 'name one file of captions'), (['results.json'], 'say with --references what to compare with'),
    (['results.json', '--references', 'nowhere.json'], 'nowhere.json'), (['missing.json', '--references', 'references.json'], 'missing.json'),
    (['results.json', '--references', 'references.json', '--metrics', 'blue'], "unknown metric 'blue': did you mean 'bleu'"),
    (['part.json', '--references', 'references.json'], '--subset'), (['twice.json', '--references', 'references.json'], 'twice.json')])
def test_score_names_what_is_wrong(coco_files, capsys, words, expected):
    rows = json.loads(Path('results.json').read_text())
    Path('part.json').write_text(json.dumps(rows[:3]))
    Path('twice.json').write_text(json.dumps(rows + rows[:1]))
    status, out, err = said(capsys, 'score', *words)
    assert status == 2 and expected in err and not out and 'Traceback' not in err


def test_evaluate_hands_its_flags_to_the_notebook(demo_folders, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr('caption_nb.run_evaluation.evaluate_run',
                        lambda *a: asked.append(a) or dict(status='error', notebook='run.ipynb', error=dict(type='E', message='m'), signal=None, out=Path('o')))
    Path('words.txt').write_text('dog, puppy')
    status, _, err = said(capsys, 'evaluate', 'one', '--split', 'test', '--beam', '3', '--against', 'two', '--object-words', 'words.txt', '--clip', 'openai/clip')
    run, split, beam, options = asked[0]
    assert status == 1 and 'again: caption-nb evaluate one --split test' in err and 'train --resume' not in err
    assert (run.name, split, beam) == ('2026-one', 'test', 3) and options['clip'] == 'openai/clip' and options['resamples'] == 1000
    assert options['against'] == str(demo_folders/'papermill_runs'/'2026-two') and options['object_words'] == str(demo_folders/'words.txt')


@pytest.fixture
def demo_folders(tmp_path, monkeypatch) -> Path:
    "The current folder, with two runs by name"
    monkeypatch.chdir(tmp_path)
    for name in ('one', 'two'):
        (run := Path('papermill_runs')/f'2026-{name}').mkdir(parents=True)
        (run/'config.json').write_text(Config(name=name).to_json())
    return tmp_path


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
            'environment.json', 'checkpoints', 'status.json', 'scores_dev.json', 'scores_dev.csv'} == there
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


@pytest.mark.parametrize('words', ['--help', '--version', 'download', 'presets', 'train --help'])
def test_a_reader_that_leaves_is_no_error(words, tmp_path):
    "caption-nb --help | head -1"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, 'wb') as out:
        done = subprocess.run([sys.executable, '-m', 'caption_nb.cli', *words.split()], cwd=tmp_path, env=ENV, stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr == ''
