"Every recipe trains, stops in mid-epoch and goes on to the same bits: optimisers, schedules, precisions, stages, encoders that learn"
import dataclasses
import hashlib
import json
import math

import pytest
import torch

from caption_nb.basics import read_json_lines
from caption_nb.captioner import Captioner
from caption_nb.cli import main as cli
from caption_nb.config import Config, ConfigError, follow_up
from caption_nb.training import Trainer

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')


def tiny(cache, **changes) -> Config:
    "A run of seconds: 30 scenes of 64 pixels, 24 of them for training, 4 batches and 2 steps an epoch"
    return Config.from_dict(dict(encoder='scene_cnn', num_images=30, image_size=64, min_freq=1, embed_dim=16, hidden_dim=16, attention_dim=8,
                                 dropout=0.2, lr=3e-3, images_per_batch=6, accumulate=2, captions_per_image=2, epochs=2, log_every=1, max_len=12,
                                 beam=2, precision='fp32', threads=1, device='cpu', cache_dir=str(cache)) | changes)


def digest(run, name='last'): return hashlib.sha256((run/'checkpoints'/name/'model.safetensors').read_bytes()).hexdigest()


def stopped_at(trainer: Trainer, steps: set[int], monkeypatch):
    "Train, and be stopped after each of `steps`"
    real = Trainer.train_step
    def step(self, batches):
        real(self, batches)
        if self.step in steps: steps.discard(self.step); (self.run/'STOP').touch()
    monkeypatch.setattr(Trainer, 'train_step', step)
    while steps:
        with pytest.raises(KeyboardInterrupt, match='holds the state'): Trainer(trainer.config, trainer.run, quiet=True).fit()
    monkeypatch.undo()
    return Trainer(trainer.config, trainer.run, quiet=True).fit()


RECIPES = dict(
    sgd=dict(optimizer='sgd', lr=0.05, schedule='step', decay_epochs=1, clip_value=0.5),
    rmsprop=dict(optimizer='rmsprop', beta2=0.99, schedule='exponential', decay_factor=0.9, weight_decay=0.01),
    adam=dict(optimizer='adam', schedule='noam', warmup_steps=2, ema=0.9),
    lion=dict(optimizer='lion', lr=3e-4, beta2=0.99, schedule='onecycle', label_smoothing=0.1),
    plateau=dict(schedule='plateau', plateau_patience=0, monitor='loss', patience=3, dev_loss=True),
    augmented=dict(crop=0.3, colour=0.3, flip=True, sampling_ratio=0.5, sampling_start=0.2, image_store='auto'),
    bf16=dict(precision='bf16', decoder='transformer', heads=2, ffn_dim=16, attention_dim=512, num_layers=1),
    fp16=dict(precision='fp16'))


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_is_resumed_bit_for_bit(name, cache, tmp_path, monkeypatch):
    config = tiny(cache, **RECIPES[name])
    whole = Trainer(config, tmp_path/'whole', quiet=True).fit()
    rows = stopped_at(Trainer(config, tmp_path/'halves', quiet=True), {1, 3}, monkeypatch)
    assert digest(tmp_path/'whole') == digest(tmp_path/'halves')
    times = ('seconds', 'captions_per_second', 'memory_MB', 'eval_seconds')
    assert [{k: v for k, v in r.items() if k not in times} for r in rows] == [{k: v for k, v in r.items() if k not in times} for r in whole]
    assert [r['step'] for r in rows if 'loss' in r] == [1, 2, 3, 4] and all(math.isfinite(r['loss']) for r in rows if 'loss' in r)


def test_accumulated_batches_are_one_large_batch(cache, tmp_path):
    "The parts of the loss are means over other things; put together they must be those of all captions at once"
    runs = []
    for name, changes in (('large', dict(images_per_batch=12, accumulate=1)), ('small', dict(images_per_batch=6, accumulate=2))):
        config = tiny(cache, encoder='mobilenetv2_050', encoder_weights='random', dropout=0., captions_per_image=5, **changes)
        trainer = Trainer(config, tmp_path/name, quiet=True).prepare()
        trainer.batches.shuffle = False   # the same images, whatever the size of a batch
        runs.append([r['loss'] for r in trainer.fit() if 'loss' in r])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


# An encoder that learns from an epoch on

@pytest.fixture(scope='module')
def tuned(cache, tmp_path_factory):
    config = tiny(cache, encoder='mobilenetv2_050', encoder_weights='random', finetune_from=3, encoder_start=1, encoder_lr=1e-3, flip=True, epochs=3)
    trainer = Trainer(config, tmp_path_factory.mktemp('runs')/'tuned', quiet=True).prepare()
    before = {n: t.clone() for n, t in trainer.model.encoder.state_dict().items()}
    return trainer, before, trainer.fit()


def test_only_the_last_stages_learn_and_no_statistic_moves(tuned):
    trainer, before, rows = tuned
    encoder = trainer.model.encoder
    learned = {n for n, p in encoder.named_parameters() if p.requires_grad}
    changed = {n for n, t in encoder.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == learned and learned and not any('running' in n or 'tracked' in n for n in changed)
    rates = [(r['epoch'], r['encoder_lr']) for r in rows if 'encoder_lr' in r]
    assert all((rate > 0) == (epoch > 1) for epoch, rate in rates) and trainer.source is trainer.pixels


def test_checkpoint_of_a_tuned_encoder_captions_as_the_trainer_does(tuned):
    trainer = tuned[0]
    ids = trainer.data.ids('dev')
    assert Captioner.load(trainer.run).caption([trainer.data.path(i) for i in ids]) == list(trainer.evaluate('dev').captions.values())


def test_tuning_is_resumed_before_and_after_its_beginning(tuned, tmp_path, monkeypatch):
    trainer = tuned[0]
    stopped_at(Trainer(trainer.config, tmp_path/'run', quiet=True), {1, 3, 5}, monkeypatch)
    assert digest(tmp_path/'run') == digest(trainer.run)


# Runs that follow

def test_self_critical_stage_follows_and_is_resumed(tuned, cache, tmp_path, monkeypatch):
    trainer = tuned[0]
    config = follow_up(trainer.config, trainer.run, 'scst')
    config = dataclasses.replace(config, finetune_from=-1, encoder_start=0, epochs=2, eval_every=1, lr=1e-3, log_every=1).validate()
    whole = Trainer(config, tmp_path/'whole', quiet=True).fit()
    start, *later = [r for r in whole if 'dev' in r]
    assert start['epoch'] == 0 and {'words', 'distinct_words', 'fragments'} <= set(start) and len(later) == 2
    best = next(r for r in reversed(tuned[2]) if r.get('best'))
    assert start['dev'] == pytest.approx(best['dev'], abs=1e-6)   # it starts where the other's best was
    steps = [r for r in whole if 'reward' in r]
    assert len(steps) == 4 and all({'baseline', 'sample_tokens', 'lr'} <= set(r) for r in steps)
    stopped_at(Trainer(config, tmp_path/'halves', quiet=True), {1, 3}, monkeypatch)
    assert digest(tmp_path/'whole') == digest(tmp_path/'halves')
    done = Trainer(config, tmp_path/'whole', quiet=True)
    done.evaluate('dev')
    assert 'CIDErD' in json.loads((tmp_path/'whole'/'results.json').read_text())['reward']


def test_start_of_another_vocabulary_is_refused(tuned, tmp_path):
    trainer = tuned[0]
    config = dataclasses.replace(follow_up(trainer.config, trainer.run), min_freq=3)
    with pytest.raises(ConfigError, match='knows .* words.*same train captions'): Trainer(config, tmp_path/'run', quiet=True).prepare()


def test_continued_run_may_change_its_rate_and_says_so(cache, tmp_path):
    config = tiny(cache, epochs=1)
    Trainer(config, tmp_path/'run', quiet=True).fit()
    rows = Trainer(dataclasses.replace(config, lr=1e-3, epochs=2), tmp_path/'run', quiet=True).fit()
    assert [r['changed'] for r in rows if 'changed' in r] == [dict(epochs=[1, 2], lr=[3e-3, 1e-3])]
    assert [r['step'] for r in rows if 'loss' in r] == [1, 2, 3, 4] and max(r['lr'] for r in rows[3:] if 'lr' in r) <= 1e-3
    assert Config.load(tmp_path/'run'/'config.json').epochs == 2 and rows == read_json_lines(tmp_path/'run'/'metrics.jsonl')


def test_command_line_follows_and_refuses(tuned, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(['train', '--from', str(tuned[0].run), '--resume', str(tuned[0].run)]) == 2
    assert 'a continued run keeps its configuration' in capsys.readouterr().err
    assert cli(['train', '--resume', str(tuned[0].run), '--hidden-dim', '32']) == 2
    assert '--hidden-dim 32' in capsys.readouterr().err
    assert cli(['train', '--stage', 'scst']) == 2
    assert 'name a run trained with cross-entropy' in capsys.readouterr().err


def test_event_files_on_option(cache, tmp_path):
    pytest.importorskip('tensorboard')
    Trainer(tiny(cache, epochs=1, tensorboard=True), tmp_path/'run', quiet=True).fit()
    assert list((tmp_path/'run'/'events').glob('events.out.tfevents*'))


def test_deterministic_mode_is_only_in_the_loop(cache, tmp_path):
    before = torch.are_deterministic_algorithms_enabled()
    config = tiny(cache, epochs=1)
    Trainer(dataclasses.replace(config, deterministic=True), tmp_path/'a', quiet=True).fit()
    assert torch.are_deterministic_algorithms_enabled() == before
