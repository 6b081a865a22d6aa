"""Presets: the twelve that are shipped hold what their systems had, and each trains, goes on, captions and draws.

Everything of a preset is used as it is except what would take minutes: few and small images, two epochs, encoders without trained weights,
and, where it is trained, at most 512 units, which spares the disk. Three encoders are too large to be trained with (ConvNeXt-B 350 MB, VGG16
540 MB, ResNet50 100 MB): smaller networks with the same interface stand in for them, and their real shapes are taken from the networks
themselves, without weights.
"""
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
import torch
import yaml
from PIL import Image

from caption_nb import cli
from caption_nb.basics import experiments_folder, read_json_lines
from caption_nb.batches import Batch
from caption_nb.captioner import Captioner, CaptionModel
from caption_nb.config import Config, ConfigError, load_preset, make_decoder, presets
from caption_nb.runs import Run, experiment, reproduce_command
from caption_nb.text import Vocab
from caption_nb.training import Trainer, prepare_encoder
from caption_nb.views import plot_attention

# Preset → grid (rows, columns), channels
SHAPES = dict(s1_convnext_lstm=(7, 7, 1024), s1_convnext_lstm_attention=(7, 7, 1024), s1_convnext_transformer=(7, 7, 1024),
              s2_inception_gru_attention=(8, 8, 2048), s3_vgg16pca_rnn=(1, 1, 4096), s3_vgg16pca_lstm=(1, 1, 4096),
              s3_vgg16pca_transformer=(7, 7, 512), s4_regnet_rnn=(4, 4, 400), s4_regnet_lstm=(4, 4, 400),
              s4_regnet_lstm_attention=(4, 4, 400), s5_resnet50_lstm=(1, 1, 2048), s5_resnet50_lstm_attention=(7, 7, 2048))
ATTENDING = {name for name in SHAPES if name.endswith(('attention', 'transformer'))}
SMALL = {'convnext_base.fb_in1k': ('convnext_atto', 64), 'vgg16.tv_in1k': ('resnet18', 64), 'inception_v3.tf_in1k': ('inception_v3', 107),
         'regnetx_004_tv.tv2_in1k': ('regnetx_004_tv', 64), 'resnet50.tv_in1k': ('resnet18', 64)}   # stands in, at so many pixels

pytestmark = pytest.mark.usefixtures('one_thread')
every = pytest.mark.parametrize('name', SHAPES)


def vocab_of(words: int) -> Vocab: return Vocab([*Vocab.specials, *(f'w{i}' for i in range(words - 4))])


def path_of(name: str) -> Path: return experiments_folder()/'presets'/f'{name}.yaml'


@pytest.fixture(scope='module')
def cache(tmp_path_factory) -> Path:
    "Scenes and features, shared by the presets that have an encoder in common"
    return tmp_path_factory.mktemp('cache')


@pytest.fixture
def run(tmp_path) -> Path:
    "A run folder that is gone after the test: checkpoints of real size are large"
    yield tmp_path/'run'
    shutil.rmtree(tmp_path)


# what they say

def test_the_twelve_are_shipped():
    found = presets()
    assert {name for name in found if re.match(r's\d_', name)} == set(SHAPES)
    for name in SHAPES: assert f'({name[:2].upper()}' in found[name]
    for name, what in found.items(): assert 20 < len(what) <= 100 and load_preset(name).name == name


@every
def test_preset_is_parameters_of_the_notebook(name):
    "papermill reads the same file: nothing but names of fields, values of their types"
    values, text = yaml.safe_load(path_of(name).read_text()), path_of(name).read_text()
    config, seen = load_preset(name), papermill.inspect_notebook(str(experiment('train')))
    assert text.startswith('# ') and all(len(line) <= 140 for line in text.splitlines())
    assert set(values) <= set(seen) and {n: getattr(config, n) for n in values} == values
    assert config.name == name and load_preset(str(path_of(name))) == config
    assert config.changed().keys() - {'name'} <= values.keys()
    assert not config.features and config.data == 'scenes' and config.encoder_weights == 'pretrained', 'what belongs to a machine'


@every
def test_record_gives_the_preset_again(name):
    words = shlex.split(reproduce_command(load_preset(name)))
    assert words[:2] == ['caption-nb', 'train'] and cli.parse_config(words[2:])[0] == load_preset(name)


THEIRS = dict(   # What the systems' own defaults were
    s1=dict(encoder='convnext_base.fb_in1k', embed_dim=512, hidden_dim=512, dropout=0.5, lr=1e-4, epochs=120, min_freq=6, max_words=50,
            schedule='plateau', plateau_factor=0.8, plateau_patience=7, patience=20, monitor='Bleu_4', optimizer='adam', clip_value=5., clip_norm=0.,
            finetune_from=3, encoder_start=20, encoder_lr=1e-4, seed=42),
    s2=dict(encoder='inception_v3.tf_in1k', decoder='attention_gru', attention='additive_tanh', project_grid=256, embed_dim=256,
            hidden_dim=512, init_state='zeros', gate=False, dropout=0., lr=1e-3, epochs=10, top_k=20000, optimizer='adam', schedule='constant', finetune_from=-1),
    s3=dict(encoder='vgg16.tv_in1k', max_words=15, max_len=30, seed=510, optimizer='adam', finetune_from=-1),
    s4=dict(encoder='regnetx_004_tv.tv2_in1k', image_size=112, embed_dim=256, hidden_dim=512, dropout=0., lr=1e-3, weight_decay=0.01,
            epochs=60, max_words=15, max_len=15, optimizer='adamw', schedule='constant', finetune_from=0, encoder_start=0, encoder_lr=1e-3),
    s5=dict(encoder='resnet50.tv_in1k', embed_dim=512, hidden_dim=1024, dropout=0.3, lr=1e-4, epochs=10, min_freq=5, max_len=20,
            optimizer='adam', schedule='plateau', plateau_patience=3, plateau_factor=0.5, monitor='loss', finetune_from=-1),
    s1_convnext_lstm_attention=dict(attention='additive_relu', attention_dim=512, gate=True, init_state='mean', doubly_stochastic=1.),
    s1_convnext_transformer=dict(num_layers=6, heads=8, ffn_dim=512, pre_norm=False, tied=False, positions='sinusoidal'),
    s3_vgg16pca_lstm=dict(embed_dim=256, hidden_dim=512, num_layers=1, project_grid=512, epochs=25, schedule='exponential', decay_factor=0.995, decay_epochs=1),
    s3_vgg16pca_transformer=dict(num_layers=2, heads=2, hidden_dim=256, ffn_dim=2048, dropout=0.1, lr=1e-3, epochs=50, pre_norm=False,
                                 schedule='constant'),
    s4_regnet_lstm=dict(init_state='flat', image_input='state'), s4_regnet_lstm_attention=dict(attention='dot', gate=False),
    s5_resnet50_lstm=dict(num_layers=3, image_input='token'), s5_resnet50_lstm_attention=dict(attention='additive_relu', attention_dim=512))
BATCH = dict(s1=32, s2=64, s3=25, s4=256, s5=128)   # captions; of S3 the Transformer's


@every
def test_sizes_and_defaults_are_theirs(name):
    config = load_preset(name)
    for field, value in (THEIRS[name[:2]] | THEIRS.get(name, {})).items(): assert getattr(config, field) == value, field
    assert abs(config.images_per_batch*config.captions_per_image/BATCH[name[:2]] - 1) < 0.07


@pytest.mark.parametrize('name, words, millions', [('s1_convnext_lstm_attention', 9490, 16.3), ('s1_convnext_lstm', 9490, 12.9),
                                                   ('s1_convnext_transformer', 9490, 26.0), ('s3_vgg16pca_transformer', 1004, 3.80)])
def test_as_many_parameters_as_theirs(name, words, millions):
    with torch.device('meta'):
        encoder = prepare_encoder(dataclasses.replace(load_preset(name), encoder_weights='random'))
        decoder = make_decoder(load_preset(name), vocab_of(words), encoder)
    assert abs(sum(p.numel() for p in decoder.parameters())/1e6/millions - 1) < 0.01


# real sizes

@every
def test_real_shapes(name):
    "The encoder's real grid, and one step of the decoder on it: every parameter learns, one word at a time is the same as all at once"
    config, (gh, gw, dim) = load_preset(name), SHAPES[name]
    with torch.device('meta'): encoder = prepare_encoder(dataclasses.replace(config, encoder_weights='random'))   # shapes, no weights
    assert (*encoder.grid, encoder.dim) == (gh, gw, dim)
    torch.manual_seed(0)
    decoder, grid = make_decoder(config, vocab_of(300), encoder), torch.randn(2, gh*gw, dim).relu()
    tokens = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 2, 0, 0], [1, 9, 9, 2, 0], [1, 250, 4, 2, 0]])
    loss, words = CaptionModel(encoder, decoder).loss(Batch(['a', 'b'], grid, tokens, (tokens > 0).sum(1)))
    loss.backward()
    assert torch.isfinite(words) and abs(words.item() - 5.7) < 1.5     # log 300
    assert not [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    decoder.eval()
    with torch.no_grad():
        memory, state = decoder.encode(grid), None
        logits, attention = decoder(memory, tokens[:, :4])
        for t in range(2):
            now, _, state = decoder.step(tokens[:, t], state, memory)
            torch.testing.assert_close(now, logits[:, t], atol=1e-5, rtol=1e-5)
    assert (attention is not None) == (name in ATTENDING)
    if attention is not None: torch.testing.assert_close(attention[:, :2].sum(-1), torch.ones_like(attention[:, :2, ..., 0]))


# training, tiny

def small(name: str, cache: Path, **changes) -> Config:
    "The preset on 20 small scenes, 16 of them for training, with what is too large replaced; what learns later does so from the second epoch on"
    config = load_preset(name)
    encoder, size = SMALL[config.encoder]
    changes = dict(encoder_start=min(1, config.encoder_start), hidden_dim=min(512, config.hidden_dim)) | changes
    return dataclasses.replace(config, **dict(encoder=encoder, encoder_weights='random', image_size=size, num_images=20, epochs=2,
                                              eval_every=2, max_len=6, min_len=2, beam=2, log_every=1, device='cpu', threads=1,
                                              precision='fp32', cache_dir=str(cache)) | changes).validate()


def interrupted_at(monkeypatch, step: int):
    "Ctrl-C in this step of the next training"
    real = Trainer.train_step
    def train_step(self, batch):
        real(self, batch)
        if self.step == step: signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Trainer, 'train_step', train_step)


def stages_that_learn(encoder) -> set[str]:
    "Names of the weights that fine-tuning may change"
    return {n for n, p in encoder.named_parameters() if p.requires_grad}


def losses(run: Path) -> list: return [(r['step'], r['loss']) for r in read_json_lines(run/'metrics.jsonl') if 'loss' in r]


@every
def test_trains_resumes_captions_and_draws(name, cache, run, monkeypatch):
    config = small(name, cache)
    trainer = Trainer(config, run, quiet=True).prepare()
    at_first = {n: t.clone() for n, t in trainer.model.encoder.state_dict().items()}
    middle = trainer.per_epoch + 1 if config.encoder_start else trainer.steps//2   # where the encoder learns, if it ever does
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt, match='holds the state'):
        interrupted_at(m, middle)
        trainer.fit()
    again = Trainer(config, run, quiet=True).prepare()
    assert again.step == middle < again.steps and again.epoch < 2
    again.fit()
    encoder = again.model.encoder
    changed = {n for n, t in encoder.state_dict().items() if not torch.equal(t, at_first[n])}
    assert changed == (stages_that_learn(encoder) if config.finetune_from >= 0 else set()), 'what learns, all of it, and nothing else'
    whole = Trainer(cli.parse_config(shlex.split(reproduce_command(config))[2:])[0], run.with_name('whole'), quiet=True)   # from the record
    with monkeypatch.context() as m:
        m.setattr(Trainer, 'save', lambda self, name: None)   # its weights are looked at where they are
        whole.fit()
    assert losses(run) == losses(whole.run) and len(losses(run)) == again.steps
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values()))
    del trainer, whole
    captioner, photo = Captioner.load(run), again.data.path(again.data.splits['dev'][0])
    explained = captioner.explain(photo)
    assert 2 <= len(explained.words) <= 6 and captioner.caption(photo) == explained.caption
    assert captioner.caption([photo, Image.new('RGB', (90, 60), 'red')])[0] == explained.caption
    assert (explained.attention is not None) == (name in ATTENDING)
    if name in ATTENDING:
        assert explained.attention.shape == (len(explained.words), *captioner.model.encoder.grid)
        figure = plot_attention(explained.image, explained.words, explained.attention)
        figure.canvas.draw()
        assert len(figure.axes) >= 1 + len(explained.words)


def test_the_largest_encoder_is_written_once(cache, run):
    "VGG16 itself, 134 million parameters, from photo to caption; what its checkpoints share takes no second place on the disk"
    config = dataclasses.replace(small('s3_vgg16pca_rnn', cache), encoder='vgg16.tv_in1k', epochs=1, num_images=10)
    trainer = Trainer(config, run, quiet=True)
    trainer.fit()
    assert trainer.model.encoder.dim == 4096
    files = [p for p in (run/'checkpoints').rglob('*.safetensors') if p.stat().st_size > 5e8]
    assert len({p.stat().st_ino for p in files}) == 1 < len(files)
    photo = trainer.data.path(trainer.data.splits['dev'][0])
    del trainer
    assert Captioner.load(run).caption(photo)


# real photos, with the features of the shared encoder

@pytest.fixture(scope='module')
def photo_cache(tmp_path_factory) -> Path: return tmp_path_factory.mktemp('photos')


@pytest.mark.parametrize('name', [n for n in SHAPES if load_preset(n).init_state != 'flat'])   # flat: 49 × 1280 numbers are another model
def test_real_photos(name, photo_cache, run, flickr8k, mobilenet):
    "The preset's decoder on the features of a trained encoder: 7 × 7 regions of 1280 channels, or their mean"
    config = dataclasses.replace(load_preset(name), data=str(flickr8k), num_images=20, encoder='mobilenetv2_100', image_size=0,
                                 encoder_weights=str(mobilenet), encoder_pad_type='same', encoder_mean='0.5', encoder_std='0.5', epochs=1,
                                 finetune_from=-1, encoder_start=0, image_store='',   # its features, as they are
                                 hidden_dim=min(512, load_preset(name).hidden_dim),
                                 min_freq=2, max_len=12, beam=3, device='cpu', threads=1, precision='fp32', cache_dir=str(photo_cache))
    trainer = Trainer(config.validate(), run, quiet=True)
    history = trainer.fit()
    assert len([r for r in history if 'loss' in r]) >= 1 and history[-1]['dev'].keys() >= {'Bleu_4', 'ROUGE_L', 'CIDEr'}
    captioner = Captioner.load(run)
    assert captioner.model.encoder.grid == ((1, 1) if config.encoder_pool else (7, 7)) and captioner.model.encoder.dim == 1280
    photos = [trainer.data.path(id) for id in trainer.data.splits['dev'][:2]]
    assert len(captioner.caption(photos)) == 2
    assert len(list(photo_cache.glob('features/*'))) <= 2 + 2     # pooled and not, each with its lock at most: extracted once


# the command line

def said(capsys, *words: str) -> tuple[int, str, str]:
    "Exit status, stdout and stderr of the command, run in this process"
    try: status = cli.main(list(words))
    except SystemExit as e: status = e.code
    out, err = capsys.readouterr()
    return status, out, err


def test_list_of_presets(capsys):
    status, out, _ = said(capsys, 'presets')
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == sorted(presets())
    for name, what in presets().items(): assert re.search(f'^{name} +{re.escape(what)}$', out, re.M)
    assert said(capsys, 'presets', 's1')[0] == 2


@pytest.mark.parametrize('words, expected', [
    (['--preset', 's1_convnext_lstn'], "preset 's1_convnext_lstn': did you mean 's1_convnext_lstm'"),
    (['--preset=s9'], "preset 's9': "), (['--preset', 'mine.yaml'], "preset 'mine.yaml': there is no such file"),
    (['--preset'], '--preset'), (['--preset', 's1_convnext_lstm', '--resume', 'run'], '--preset: a continued run keeps its configuration'),
    (['--resume', 'run', '--preset=s1_convnext_lstm'], '--preset: a continued run keeps its configuration'),
    (['--preset', 's1_convnext_lstm', '--heads', '4'], 'heads=4: the decoder lstm has no such option'),
    (['--preset', 's3_vgg16pca_transformer', '--heads', '3'], 'heads=3: do not divide hidden_dim=256'),
    (['--preset', 's1_convnext_lstm', '--epochs', '20'], 'encoder_start=20: must be less than epochs=20'),
    (['--preset', 's1_convnext_lstm', '--data', 'no/folder'], '--data no/folder: no such file or folder')])
def test_bad_usage_is_named(tmp_path, capsys, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    status, out, err = said(capsys, 'train', *words)
    assert status == 2 and expected in re.sub(r'\s*│\n│\s*', ' ', out + err)
    assert not list(tmp_path.iterdir()), 'a run folder was made although nothing could run'


@pytest.mark.parametrize('text, expected', [
    ('epochs: [1', 'mine.yaml is no YAML'), ('epochs: 3\n  lr: 1.0', 'mine.yaml is no YAML'), ('just words', 'expected lines such as'),
    ('', 'expected lines such as'), ('epocs: 3', "mine.yaml: unknown field 'epocs': did you mean 'epochs'"),
    ('lr: 1e-4', "mine.yaml: lr='1e-4': expected float, got str"),   # YAML takes 1e-4 for a word, 1.0e-4 for a number
    ('epochs: 0\nbeam: 0', 'mine.yaml: epochs=0: must be at least 1\nmine.yaml: beam=0: must be at least 1'),
    ('decoder: lstm\nheads: 4', 'mine.yaml: heads=4: the decoder lstm has no such option')])
def test_bad_file_is_named(tmp_path, text, expected):
    (tmp_path/'mine.yaml').write_text(text)
    with pytest.raises(ConfigError) as e: load_preset(str(tmp_path/'mine.yaml'))
    assert expected in str(e.value)


def test_own_preset(tmp_path, capsys, monkeypatch):
    "A file of one's own, with umlauts, from anywhere; its name is the run's, unless it says another"
    mine = tmp_path/'größer.yaml'
    mine.write_text('# my own\ndecoder: gru\nhidden_dim: 700\nencoder_mean: "0.5"\n', encoding='utf-8')
    assert load_preset(str(mine)).changed() == dict(decoder='gru', hidden_dim=700, encoder_mean='0.5', name='größer')
    mine.write_text(mine.read_text(encoding='utf-8') + 'name: big\n', encoding='utf-8')
    assert load_preset(str(mine)).name == 'big'
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, 'launch', lambda config, run_dir: print(config.decoder, config.hidden_dim, config.epochs, config.lr) or 0)
    assert said(capsys, 'train', '--preset', 'größer.yaml', '--epochs', '3')[:2] == (0, 'gru 700 3 0.0012\n')
    assert said(capsys, 'train', '--epochs=30', '--preset=s1_convnext_transformer', '--lr', '1')[:2] == (0, 'transformer 512 30 1.0\n')


def test_train_from_a_preset(tmp_path):
    "The program as users call it: other flags change the preset, the record names every field"
    flags = shlex.split('--data scenes --num-images 20 --encoder-weights random --epochs 1 --max-len 6 --device cpu --threads 1 '
                        '--precision fp32 --cache-dir cache')
    done = subprocess.run([sys.executable, '-m', 'caption_nb.cli', 'train', '--preset', 's4_regnet_lstm_attention', *flags], cwd=tmp_path,
                          env=dict(os.environ, OMP_NUM_THREADS='1', COLUMNS='200'), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    folder, = (tmp_path/'papermill_runs').iterdir()
    asked = dataclasses.replace(load_preset('s4_regnet_lstm_attention'), num_images=20, encoder_weights='random', epochs=1, max_len=6,
                                device='cpu', threads=1, precision='fp32', cache_dir='cache')
    assert 's4_regnet_lstm_attention' in folder.name and Run(folder).config == asked.to_dict() and Run(folder).status == 'done'
    assert reproduce_command(asked) in (folder/'summary.md').read_text()
    assert (folder/'figures'/'attention_1.png').is_file() and Run(folder).results['dev']['scores']['CIDEr'] >= 0
