"Diagnostics before a run: they leave no trace, tell a model that can learn from one that cannot, and find a rate"
import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import caption_nb.diagnostics as diagnostics
from caption_nb.basics import read_json_lines
from caption_nb.config import Config
from caption_nb.diagnostics import LrCurve, blind_loss, find_lr, one_caption_each, overfit_batch, plain_model, rehearsal, smoothed
from caption_nb.training import Trainer

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def cache(tmp_path_factory) -> Path: return tmp_path_factory.mktemp('cache')


def tiny(cache, **changes) -> Config:
    return Config.from_dict(dict(encoder='scene_cnn', num_images=40, image_size=64, min_freq=1, embed_dim=32, hidden_dim=32, attention_dim=16,
                                 dropout=0.2, lr=5e-3, encoder_lr=5e-3, images_per_batch=4, captions_per_image=2, epochs=2, log_every=3,
                                 warmup_steps=3, max_len=15, beam=1, precision='fp32', threads=1, device='cpu', cache_dir=str(cache)) | changes)


def everything(trainer: Trainer) -> list:
    "All that may not change, as something that can be compared"
    weights = [t.numpy().tobytes() for t in trainer.model.state_dict().values()]
    generators = [torch.get_rng_state().numpy().tobytes(), str(np.random.get_state())]
    slots = [t.numpy().tobytes() for s in trainer.optimizer.state_dict()['state'].values() for t in s.values() if isinstance(t, torch.Tensor)]
    rates = [(g['lr'], g['highest'], g['weight_decay']) for g in trainer.optimizer.param_groups]
    modes = [(n, m.training) for n, m in trainer.model.named_modules()]
    places = dict(trainer.batches.state_dict(), step=trainer.step, epoch=trainer.epoch, scale=trainer.scale, machine=trainer.machine)
    files = {p.name: p.read_bytes() for p in trainer.run.rglob('*') if p.is_file() and p.name != '.lock'}
    gradients = [p.grad is None for p in trainer.model.parameters()]
    return [weights, generators, slots, rates, modes, places, files, gradients, trainer.window, trainer.history, trainer.meter.watch.seconds,
            torch.get_num_threads(), trainer.config]


@pytest.fixture(scope='module')
def reference(cache, tmp_path_factory) -> Path:
    "A run that nobody looked at"
    run = tmp_path_factory.mktemp('runs')/'plain'
    Trainer(tiny(cache, ema=.9), run, quiet=True).fit()
    return run


def test_they_leave_no_trace_and_the_run_is_the_same(cache, reference, tmp_path):
    trainer = Trainer(tiny(cache, ema=.9), tmp_path/'run', quiet=True).prepare()
    before = copy.deepcopy(everything(trainer))
    overfit_batch(trainer, steps=6, quiet=True)
    find_lr(trainer, steps=6, quiet=True)
    assert everything(trainer) == before
    trainer.fit()
    weights = [(r/'checkpoints'/'last'/'model.safetensors').read_bytes() for r in (reference, trainer.run)]
    assert weights[0] == weights[1]
    losses = [[r['loss'] for r in read_json_lines(p/'metrics.jsonl') if 'loss' in r] for p in (reference, trainer.run)]
    assert losses[0] == losses[1]
    after = copy.deepcopy(everything(trainer))   # and after a run, too
    find_lr(trainer, steps=4, quiet=True)
    assert everything(trainer) == after


def test_a_trace_is_not_left_by_an_error_either(cache, tmp_path):
    trainer = Trainer(tiny(cache), tmp_path/'run', quiet=True).prepare()
    before = copy.deepcopy(everything(trainer))
    with pytest.raises(RuntimeError, match='half-way'), rehearsal(trainer) as twin:
        for batch in twin.batches:
            twin.train_step([batch])
            torch.rand(1), np.random.rand()
            raise RuntimeError('half-way')
    assert everything(trainer) == before


def test_configuration_alone_leaves_no_folder(cache, tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    state = torch.get_rng_state()
    curve = find_lr(tiny(cache), steps=5, quiet=True)
    assert len(curve.rates) == 5 and not list(tmp_path.iterdir()) and torch.equal(state, torch.get_rng_state())


def test_compiled_parts_of_the_original_are_not_used(cache, tmp_path):
    "torch.compile leaves functions in the modules that belong to the original's weights"
    trainer = Trainer(tiny(cache), tmp_path/'run', quiet=True).prepare()
    def never(*args, **kwargs): raise AssertionError('of the original')
    trainer.model.decoder.hidden = trainer.model.encoder.model.forward_features = never
    find_lr(trainer, steps=2, quiet=True)
    overfit_batch(trainer, steps=2, quiet=True)
    assert trainer.model.decoder.hidden is never


# One batch by heart

@pytest.mark.parametrize('decoder', ['attention_lstm', 'gru', 'transformer'])
def test_sound_models_learn_a_batch_by_heart(decoder, cache, tmp_path):
    other = {} if decoder.startswith('attention') else dict(attention_dim=512)
    if decoder == 'transformer': other |= dict(num_layers=1, ffn_dim=64, heads=4, lr=3e-3)
    config = tiny(cache, decoder=decoder, embed_dim=64, hidden_dim=64, label_smoothing=.1, sampling_ratio=.3, feature_dropout=.2, concepts=1.,
                  weight_decay=.1, **other)
    result = overfit_batch(Trainer(config, tmp_path/'run', quiet=True), quiet=True)
    assert result.ok and result.right >= 3 and not result.suspects, result
    assert str(result).startswith('ok: the model can learn: the loss went from') and result._repr_markdown_().startswith('```text\nok')
    assert set(result.captions) == set(result.references) and len(result.captions) == 4
    ax, = result.plot().axes
    assert ax.get_xlabel() and 'nats' in ax.get_ylabel() and ax.get_yscale() == 'log'


class Same:
    "Every image is the first one"
    views = ('plain', 'flip')

    def __init__(self, source): self.source = source

    def read(self, ids, view=0): return self.source.read([self.source.ids[0]]*len(ids), view)


def test_pictures_that_do_not_get_through_are_suspected(cache, tmp_path):
    trainer = Trainer(tiny(cache, embed_dim=64, hidden_dim=64), tmp_path/'run', quiet=True).prepare()
    trainer.batches.source = Same(trainer.batches.source)
    result = overfit_batch(trainer, quiet=True)
    assert not result.ok and 'all 4 images are the same' in result.suspects[0] and 'not whose they are' in result.suspects[1]
    assert 'NOT ok' in str(result) and 'suspect: ' in str(result)


def test_weights_that_never_move_are_named(cache, tmp_path, monkeypatch):
    real = diagnostics.plain_model
    def cut(model):
        model = real(model)
        model.decoder.project = lambda h: nn.functional.linear(h, model.decoder.output.weight.detach(), model.decoder.output.bias.detach())
        return model
    monkeypatch.setattr(diagnostics, 'plain_model', cut)
    result = overfit_batch(tiny(cache), steps=10, quiet=True)
    assert any('never moved' in s and 'decoder.output.weight' in s for s in result.suspects)


@pytest.mark.parametrize('lr, word', [(1e-7, 'hardly falls'), (30., 'lr=30')])
def test_a_wrong_rate_is_suspected(lr, word, cache):
    result = overfit_batch(tiny(cache, lr=lr, encoder_lr=lr), steps=25, quiet=True)
    assert not result.ok and any(word in s for s in result.suspects), result


@pytest.mark.filterwarnings('ignore:no caption for the images')
def test_loss_that_is_no_number_ends_it(cache, monkeypatch):
    real = diagnostics.plain_model
    def poisoned(model):
        with torch.no_grad(): (model := real(model)).decoder.output.bias[5] = math.inf
        return model
    monkeypatch.setattr(diagnostics, 'plain_model', poisoned)
    result = overfit_batch(tiny(cache), steps=5, quiet=True)
    assert not result.ok and len(result.losses) == 1 and 'the loss is nan at step 1' in result.suspects[0]
    result.plot()


def test_blind_loss_is_that_of_the_best_model_without_pictures():
    rows = torch.tensor([[1, 4, 5, 2, 0], [1, 4, 6, 6, 2], [1, 4, 5, 7, 2], [1, 8, 2, 0, 0]])
    def surprise(n, of): return -math.log(n/of)
    expected = 3*surprise(3, 4) + surprise(1, 4) + 2*surprise(2, 3) + surprise(1, 3) + 2*surprise(1, 2)
    assert blind_loss(rows) == pytest.approx(expected/(3 + 4 + 4 + 2)) and blind_loss(rows[:1]) == 0.


def test_plain_model_computes_the_same_and_keeps_what_is_frozen(cache, tmp_path):
    trainer = Trainer(tiny(cache), tmp_path/'run', quiet=True).prepare()
    trainer.model.decoder.embedding.vectors.weight.requires_grad_(False)
    with rehearsal(trainer) as twin:
        plain, batch = plain_model(twin.model), twin._sample_batch()
        assert not plain.decoder.embedding.vectors.weight.requires_grad and plain.training
        assert not plain.decoder.needs_attention and trainer.model.decoder.needs_attention
        with torch.no_grad():
            assert torch.equal(plain.eval().loss(batch)[1], twin.model.eval().loss(batch)[1])
        one = one_caption_each(batch)
        assert len(one.tokens) == len(one.ids) == 4 and torch.equal(one.tokens, batch.tokens[::2, :one.tokens.shape[1]])
        assert (one.lengths == (one.tokens != 0).sum(1)).all()


# The learning rate

@pytest.mark.parametrize('optimizer', ['sgd', 'rmsprop', 'adam', 'adamw', 'lion'])
def test_every_optimizer_is_swept(optimizer, cache):
    curve = find_lr(tiny(cache, optimizer=optimizer, accumulate=2), steps=12, low=1e-4, high=.1, quiet=True)
    assert curve.rates == pytest.approx(list(np.geomspace(1e-4, .1, 12)[:len(curve.rates)])) and len(curve.smooth) == len(curve.losses) == len(curve.rates)
    assert curve.suggestion == min(curve.lowest/10, curve.steepest) and {curve.lowest, curve.steepest} <= {*curve.rates} and curve.lr == 5e-3


def test_the_sweep_makes_the_steps_that_training_would(cache, tmp_path, monkeypatch):
    "Rates in every group, as many batches a step as are accumulated, epochs one after another"
    trainer = Trainer(tiny(cache, accumulate=3, encoder_lr=5e-4), tmp_path/'run', quiet=True).prepare()
    seen, real = [], Trainer.train_step
    def watched(self, batches):
        real(self, batches)
        seen.append(([b.ids for b in batches], {g['part']: g['lr'] for g in self.optimizer.param_groups}))
    monkeypatch.setattr(Trainer, 'train_step', watched)
    curve = find_lr(trainer, steps=7, low=1e-5, high=1e-3, quiet=True)
    assert all(len(ids) == 3 for ids, _ in seen) and [r['decoder'] for _, r in seen] == pytest.approx(curve.rates)
    assert all(r['encoder'] == pytest.approx(r['decoder']/10) for _, r in seen)
    first = [b.ids for b in trainer.batches]
    assert [ids for group, _ in seen for ids in group][:8] == first   # an epoch is 8 batches
    assert sorted(sum([ids for group, _ in seen for ids in group][8:16], [])) == sorted(sum(first, []))


def test_an_explosion_ends_the_sweep(cache):
    curve = find_lr(tiny(cache, clip_norm=0.), low=1e-4, high=1e4, steps=60, quiet=True)
    assert curve.exploded and len(curve.rates) < 60 and 1e-4 < curve.suggestion < 1
    ax, = curve.plot().axes
    assert ax.get_xscale() == 'log' and 'rate' in ax.get_xlabel() and 'nats' in ax.get_ylabel()
    assert f'try lr={curve.suggestion:.1e}' in str(curve) and 'configured: 0.005' in str(curve)


def test_suggested_rate_learns(cache):
    curve = find_lr(tiny(cache), quiet=True)
    def loss(lr): return overfit_batch(tiny(cache, lr=lr, encoder_lr=lr), steps=40, quiet=True).losses[-1]
    assert 1e-3 < curve.suggestion < 2.5e-2   # 5e-3 is known to be good here
    assert loss(curve.suggestion) < 0.7*loss(curve.suggestion/100)


def test_what_cannot_be_swept_is_refused(cache):
    with pytest.raises(ValueError, match='low=1, high=0.1'): find_lr(tiny(cache), low=1., high=.1)
    with pytest.raises(ValueError, match='steps=1'): find_lr(tiny(cache), steps=1)


def test_rules_of_the_curve():
    assert smoothed([]) == [] and smoothed([2., 0.], .5) == pytest.approx([2., 2/3])
    rates = list(np.geomspace(1e-5, 1, 51))
    falls = [4 - 3/(1 + (2e-3/r)**2) + (3*r)**3 for r in rates]
    curve = LrCurve(rates, falls, falls, False, 1e-3)
    assert curve.steepest == pytest.approx(2e-3, rel=.3) and curve.steepest < curve.lowest and curve.suggestion == min(curve.lowest/10, curve.steepest)
    rising = LrCurve(rates[:3], [1., 2., 3.], [1., 2., 3.], True, 1e-3)
    assert rising.steepest == rising.lowest == rates[0]


def test_parts_that_begin_later_stay_still(cache, tmp_path):
    config = tiny(cache, encoder='mobilenetv2_050', encoder_weights='random', num_images=20, image_size=64, finetune_from=4, encoder_start=1)
    trainer = Trainer(config, tmp_path/'run', quiet=True).prepare()
    with rehearsal(trainer) as twin:
        before = [p.clone() for p in twin.model.encoder.parameters()]
        twin.train_step([next(iter(twin.batches))])
        assert all(map(torch.equal, before, twin.model.encoder.parameters()))
    assert len(find_lr(trainer, steps=3, quiet=True).losses) == 3
    assert not any('encoder' in s for s in overfit_batch(trainer, steps=3, quiet=True).suspects)


def test_self_critical_training_has_no_such_loss(cache, reference, tmp_path):
    config = dataclasses.replace(tiny(cache, ema=.9), stage='scst', from_run=str(reference), ema=0.)
    trainer = Trainer(config, tmp_path/'run', quiet=True).prepare()
    with pytest.raises(ValueError, match="stage='scst'"): find_lr(trainer)
    assert overfit_batch(trainer, steps=3, quiet=True).losses
