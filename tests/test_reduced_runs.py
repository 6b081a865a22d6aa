"Runs on features of several views, after a PCA: resumed to the bit, never another PCA, and new photos go the same way"
import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from caption_nb import pca, training
from caption_nb.basics import read_json_lines
from caption_nb.captioner import Captioner, load_encoder
from caption_nb.config import LATER_FIELDS, Config, ConfigError, follow_up
from caption_nb.encoders import Encoder
from caption_nb.features import FeatureStore, StoreError, extract, view_names
from caption_nb.pca import ProjectedEncoder, ids_fingerprint, pca_spec, stored_pca
from caption_nb.training import Trainer, prepare_data, prepare_encoder, prepare_features

pytestmark = pytest.mark.usefixtures('one_thread')
SIX = view_names(2, flip=True)


@pytest.fixture(scope='module')
def cache(tmp_path_factory) -> Path: return tmp_path_factory.mktemp('cache')


def tiny(cache, **changes) -> Config:
    "Twenty scenes of 64 pixels, seen by a frozen network with random weights"
    return Config.from_dict(dict(encoder='mobilenetv2_050', encoder_weights='random', num_images=20, image_size=64, min_freq=1, embed_dim=16,
                                 hidden_dim=16, attention_dim=16, dropout=0.2, lr=5e-3, images_per_batch=4, captions_per_image=2, epochs=2,
                                 log_every=2, max_len=8, beam=2, precision='fp32', threads=1, device='cpu', cache_dir=str(cache),
                                 flip=True, feature_crops=2, pca=12) | changes)


@pytest.fixture(scope='module')
def done(cache, tmp_path_factory) -> Trainer:
    "A finished run"
    trainer = Trainer(tiny(cache), tmp_path_factory.mktemp('runs')/'done', quiet=True)
    trainer.fit()
    return trainer


def weights(run: Path, name='last') -> bytes: return (run/'checkpoints'/name/'model.safetensors').read_bytes()


def forbid(monkeypatch, *names):
    "Fitting a PCA, or encoding photos, fails from here on"
    def no(*args, **kw): raise AssertionError('must not be called')
    for name in names: monkeypatch.setattr({'fit_pca': pca, 'extract': training}[name], name, no)


# ---- resuming

def test_interrupted_run_goes_on_to_the_bit(cache, done, tmp_path, monkeypatch):
    assert done.source.views == SIX and done.source.dim == done.model.encoder.dim == 12 and isinstance(done.model.encoder, ProjectedEncoder)
    run, step, interrupts = tmp_path/'run', Trainer.train_step, {2, 6}
    def interrupted(self, batch):
        step(self, batch)
        if self.step in interrupts: interrupts.discard(self.step); signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Trainer, 'train_step', interrupted)
    for n in range(2):
        torch.manual_seed(n)
        with pytest.raises(KeyboardInterrupt, match='holds the state'): Trainer(done.config, run, quiet=True).fit()
        forbid(monkeypatch, 'fit_pca')
    Trainer(done.config, run, quiet=True).fit()
    assert weights(run) == weights(done.run) and weights(run, 'best') == weights(done.run, 'best')
    dev = lambda r: [row['dev'] for row in read_json_lines(r/'metrics.jsonl') if 'dev' in row]
    assert dev(run) == dev(done.run) and len(dev(run)) == 2


def test_resumed_where_no_features_are(cache, done, tmp_path, monkeypatch):
    "Another machine: all is extracted again, but the PCA is the checkpoint's"
    run = shutil.copytree(done.run, tmp_path/'run')
    forbid(monkeypatch, 'fit_pca')
    config = dataclasses.replace(done.config, cache_dir=str(tmp_path/'cache'), epochs=3)
    trainer = Trainer(config, run, quiet=True).prepare()
    assert trainer.features.attrs['encoder'] == done.features.attrs['encoder'] and trainer.features.path.parent.parent == tmp_path/'cache'
    trainer.fit()
    assert trainer.epoch == 3 and stored_pca(trainer.features).spec == done.model.encoder.pca.spec


@pytest.mark.parametrize('changes', [dict(pca=8), dict(pca_whiten=True), dict(pca=0), dict(feature_crops=1), dict(flip=False)])
def test_other_features_are_refused_when_resuming(done, tmp_path, changes):
    name, = changes
    run = shutil.copytree(done.run, tmp_path/'run')
    with pytest.raises(ConfigError, match=f'cannot be continued.*{name}: {getattr(done.config, name)} then, {changes[name]} now'):
        Trainer(dataclasses.replace(done.config, **changes), run, quiet=True).prepare()


def test_run_from_before_there_were_these_fields_goes_on(cache, tmp_path, monkeypatch):
    config = tiny(cache, pca=0, feature_crops=0, epochs=1)
    real = Config.to_dict
    def old(self): return {n: v for n, v in real(self).items() if n not in LATER_FIELDS}
    with monkeypatch.context() as m:
        m.setattr(Config, 'to_dict', old)
        Trainer(config, tmp_path/'run', quiet=True).fit()
    assert not LATER_FIELDS & set(json.loads((tmp_path/'run'/'config.json').read_text()))
    assert Config.load(tmp_path/'run'/'config.json') == config
    assert Trainer(dataclasses.replace(config, epochs=2), tmp_path/'run', quiet=True).fit()[-1]['epoch'] == 2


# ---- what the PCA is made of, and where it goes

def test_fitted_on_train_images_alone(done):
    fitted, data = done.model.encoder.pca, done.data
    assert fitted.images == ids_fingerprint(data.ids('train')) and fitted.rows == len(data.ids('train'))*len(SIX)*4
    assert done.features.attrs['crop_sides'] and done.features.crop_boxes().shape == (20, 2, 4)


def test_new_photos_are_captioned_as_the_stored_ones(done, tmp_path):
    captioner, ids = Captioner.load(shutil.copytree(done.checkpoints/'best', tmp_path/'copy'), 'cpu'), done.data.ids('dev')
    assert captioner.model.encoder.spec == done.features.attrs['encoder']
    assert captioner.caption([done.data.path(id) for id in ids]) == list(done.evaluate('dev').captions.values())
    kept, = done.checkpoints.glob('encoder-*.safetensors')
    assert kept.stem.endswith(done.model.encoder.spec['pca']['sha256'][:8])


def test_file_before_the_pca_may_go(cache, done, tmp_path, monkeypatch):
    small = shutil.copy(done.features.path, tmp_path)
    near = tmp_path/'near'/'features'
    near.mkdir(parents=True)
    shutil.copy(small, near)   # and no other file
    forbid(monkeypatch, 'fit_pca', 'extract')
    trainer = Trainer(dataclasses.replace(done.config, cache_dir=str(tmp_path/'near')), tmp_path/'run', quiet=True)
    monkeypatch.setattr(training, 'prepare_data', lambda c, quiet: done.data)
    assert trainer.prepare().features.path == near/done.features.path.name
    trainer.lock.release()


def test_one_extraction_serves_several_pcas(cache, done, monkeypatch):
    monkeypatch.setattr(Encoder, 'encode_batch', lambda *args: 1/0)
    config = dataclasses.replace(done.config, pca=5, pca_whiten=True)
    store = prepare_features(config, done.data, prepare_encoder(config), quiet=True)
    assert store.dim == 5 and stored_pca(store).whiten and store.path != done.features.path and store.path.parent == done.features.path.parent


def test_more_dimensions_than_there_are(done):
    config = dataclasses.replace(done.config, pca=1281, cache_dir='/nowhere')
    with pytest.raises(ConfigError, match='pca=1281: mobilenetv2_050 gives 1280 numbers a cell'):
        prepare_features(config, done.data, prepare_encoder(config), quiet=True)


# ---- a file of features that the configuration names

@pytest.fixture(scope='module')
def whole(done, tmp_path_factory) -> FeatureStore:
    encoder = prepare_encoder(done.config)
    return extract(done.data, encoder, tmp_path_factory.mktemp('given')/'whole.h5', views=SIX, quiet=True)


def test_named_features_before_the_pca(done, whole, tmp_path, monkeypatch):
    forbid(monkeypatch, 'extract')
    config = dataclasses.replace(done.config, features=str(whole.path))
    store = prepare_features(config, done.data, prepare_encoder(config), quiet=True)
    assert store.path.parent == whole.path.parent and pca_spec(store) == done.model.encoder.pca.spec
    with pytest.raises(ValueError, match="lacks the view 'crop-3'"):
        prepare_features(dataclasses.replace(config, feature_crops=3), done.data, prepare_encoder(config), quiet=True)
    monkeypatch.setattr(training.os, 'access', lambda path, mode: Path(path) != whole.path.parent)   # a folder for reading only
    config = dataclasses.replace(config, pca=3)
    assert prepare_features(config, done.data, prepare_encoder(config), quiet=True).path.parent == Path(config.cache_dir)/'features'


def test_named_features_after_the_pca(done, tmp_path, monkeypatch):
    file = shutil.copy(done.features.path, tmp_path/'small.h5')
    forbid(monkeypatch, 'extract', 'fit_pca')
    def prepared(**changes):
        config = dataclasses.replace(done.config, features=str(file), **changes)
        return prepare_features(config, prepare_data(config, quiet=True), prepare_encoder(config), quiet=True)
    assert prepared().path == tmp_path/'small.h5'
    assert prepared(flip=False, feature_crops=0).views == SIX
    with pytest.raises(ConfigError, match='leaves 12 numbers a cell; say so with pca=12, pca_whiten=False, or name the features before it'): prepared(pca=0)
    with pytest.raises(ConfigError, match="another PCA than this run's: pca.dim is 12, expected 8"): prepared(pca=8)
    with pytest.raises(ConfigError, match='pca.images is'): prepared(num_images=19)
    with pytest.raises(StoreError, match='encoder.mean'): prepared(encoder_mean='0.5')
    run = shutil.copytree(done.run, tmp_path/'run')
    assert Trainer(dataclasses.replace(done.config, features=str(file), epochs=3), run, quiet=True).prepare().features.path == tmp_path/'small.h5'


def test_named_features_without_the_plain_view_first(done, tmp_path):
    encoder = prepare_encoder(done.config)
    store = extract(done.data, encoder, tmp_path/'a.h5', views=('flip', 'plain'), quiet=True)
    config = dataclasses.replace(done.config, pca=0, feature_crops=0, features=str(store.path))
    with pytest.raises(ValueError, match="first view is 'flip', but dev photos are read as they are"): prepare_features(config, done.data, encoder, quiet=True)


def test_jobs_name_the_projected_features(done, tmp_path):
    from caption_nb.jobs import extract_features
    made = extract_features(tmp_path/'made.json', [done.run])
    assert made == {str(done.run): str(done.features.path.resolve())}


# ---- a run that follows

def test_from_another_run_with_its_pca(done, tmp_path, monkeypatch):
    forbid(monkeypatch, 'fit_pca')
    config = dataclasses.replace(follow_up(done.config, done.run), epochs=1)
    trainer = Trainer(config, tmp_path/'run', quiet=True)
    trainer.fit()
    assert trainer.model.encoder.pca.spec == done.model.encoder.pca.spec
    assert load_encoder(tmp_path/'run').spec == done.model.encoder.spec
    for changes in (dict(pca=0), dict(pca=8), dict(pca_whiten=True)):
        with pytest.raises(ConfigError, match='belong to features with pca=12, pca_whiten=False'):
            Trainer(dataclasses.replace(config, **changes), tmp_path/'other', quiet=True).prepare()


def test_from_another_run_without_pca(cache, tmp_path):
    config = tiny(cache, pca=0, feature_crops=0, epochs=1)
    Trainer(config, tmp_path/'a', quiet=True).fit()
    with pytest.raises(ConfigError, match='belong to features with pca=0, .*or start a new run without --from'):
        Trainer(dataclasses.replace(follow_up(config, tmp_path/'a'), pca=12), tmp_path/'b', quiet=True).prepare()


def test_encoder_that_learns_later_keeps_the_pca(cache, tmp_path, monkeypatch):
    config = tiny(cache, feature_crops=0, finetune_from=4, encoder_start=1, encoder_lr=1e-3)
    def run(folder, stop=None):
        trainer, step = Trainer(config, folder, quiet=True), Trainer.train_step
        def once(self, batch):
            step(self, batch)
            if self.step == stop: signal.raise_signal(signal.SIGINT)
        with monkeypatch.context() as m:
            m.setattr(Trainer, 'train_step', once)
            try: trainer.fit()
            except KeyboardInterrupt: pass
        return trainer
    whole = run(tmp_path/'whole')
    spec = whole.model.encoder.spec
    assert spec['dim'] == 12 and spec['weights_sha256'] != prepare_encoder(config).spec['weights_sha256']   # it has learnt
    run(tmp_path/'run', stop=whole.per_epoch + 2)
    forbid(monkeypatch, 'fit_pca')
    run(tmp_path/'run')
    assert weights(tmp_path/'run') == weights(tmp_path/'whole')
    ids = whole.data.ids('dev')
    captioner = Captioner.load(tmp_path/'run', 'cpu')
    assert captioner.caption([whole.data.path(id) for id in ids]) == list(whole.evaluate('dev').captions.values())
    assert captioner.model.encoder.pca.images == ids_fingerprint(whole.data.ids('train'))


# ---- the command line and the record

def test_extract_from_the_command_line(cache, done, tmp_path, capsys):
    from caption_nb.cli import main
    own = ('extract', '--encoder', 'mobilenetv2_050', '--encoder-weights', 'random', '--num-images', '20', '--image-size', '64', '--flip',
           '--feature-crops', '2', '--pca', '12', '--cache-dir')
    assert main([*own, str(cache)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f'{done.features.path}: 20 images, grid 2 × 2, 12 channels, views plain, flip, crop-1,')
    assert 'PCA of the train images: 1280 → 12, ' in out and 'of the variance of 384 rows' in out
    assert main([*own, str(tmp_path)]) == 0
    assert 'features of 20 photos in 6 views (plain, flip, crop-1, …), 4 × 1280 numbers each: 1.23 MB\n' in capsys.readouterr().out
    assert {p.name for p in (tmp_path/'features').iterdir()} >= {done.features.path.name}


def test_record_shows_the_explained_variance(cache, tmp_path):
    from caption_nb.runs import execute, experiment, new_run
    config = tiny(cache, runs_dir=str(tmp_path), epochs=1)
    run = new_run(config, tmp_path)
    assert execute(experiment(), run, config.to_dict() | dict(resume=str(run)))['status'] == 'done'
    assert (run/'figures'/'explained_variance.png').stat().st_size > 3000
