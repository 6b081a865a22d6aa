"Training: configuration, loop, checkpoints, exact resume, kills, full disks, and what a checkpoint gives"
import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import caption_nb.checkpoints as checkpoints
import caption_nb.training as training
from caption_nb.basics import read_json_lines
from caption_nb.batches import pack_captions
from caption_nb.captioner import Captioner, load_model
from caption_nb.checkpoints import CHECKPOINT_FILES, CheckpointError, RunBusy, checkpoint_step, find_checkpoint, generations
from caption_nb.config import Config, ConfigError
from caption_nb.ranks import choose_device
from caption_nb.training import Trainer, main, prepare_encoder


@pytest.fixture(scope='module')
def cache(tmp_path_factory) -> Path: return tmp_path_factory.mktemp('cache')


pytestmark = pytest.mark.usefixtures('one_thread')


def tiny(cache, **changes) -> Config:
    "A run of seconds: 40 scenes of 96 pixels, 32 of them for training"
    return Config.from_dict(dict(encoder='scene_cnn', num_images=40, image_size=96, min_freq=1, embed_dim=32, hidden_dim=32, attention_dim=16,
                                 dropout=0.2, lr=5e-3, images_per_batch=8, captions_per_image=2, epochs=3, log_every=2, max_len=15, beam=2,
                                 precision='fp32', threads=1, device='cpu', cache_dir=str(cache)) | changes)


@pytest.fixture(scope='module')
def done(cache, tmp_path_factory) -> Trainer:
    "A finished run"
    trainer = Trainer(tiny(cache, ema=0.9), tmp_path_factory.mktemp('runs')/'done', quiet=True)
    trainer.fit()
    return trainer


def weights(run: Path, name='last') -> bytes: return (run/'checkpoints'/name/'model.safetensors').read_bytes()


def losses(run: Path) -> list: return [(r['step'], r['loss']) for r in read_json_lines(run/'metrics.jsonl') if 'loss' in r]


# Pieces

def test_plateau_and_early_stop(cache, tmp_path):
    t = Trainer(tiny(cache, schedule='plateau', plateau_patience=1, plateau_factor=0.1, patience=4), tmp_path)
    scales = []
    for t.epoch, cider in enumerate([0.1, 0.3, 0.2, 0.3, 0.1, 0.2], 1):
        t.judge(cider, t.epoch)
        scales.append(round(t.scale, 6))
    assert scales == [1, 1, 1, .1, .1, .01] and t.best_epoch == 2 and t.stopped


def test_unusable_device_is_named():
    with pytest.raises(ValueError, match="device='cuda:77' cannot be used here"): choose_device('cuda:77')


# Checkpoints

def test_full_disk_while_training_leaves_a_run_that_continues(cache, tmp_path, monkeypatch):
    config = tiny(cache, epochs=2)
    trainer = Trainer(config, tmp_path/'run', quiet=True)
    real, count = checkpoints.write_checkpoint, 0
    def third_fails(folder, files, keep):   # the first is written before the first step
        nonlocal count
        count += folder.name == 'last'
        with monkeypatch.context() as m:
            def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
            if count == 3: m.setattr(os, 'fsync', full)
            return real(folder, files, keep)
    monkeypatch.setattr(checkpoints, 'write_checkpoint', third_fails)
    with pytest.raises(OSError, match='No space left'): trainer.fit()
    monkeypatch.undo()
    again = Trainer(config, tmp_path/'run', quiet=True).prepare()
    assert again.epoch == 1
    assert again.fit()[-1]['epoch'] == 2


@pytest.mark.parametrize('name', CHECKPOINT_FILES)
def test_missing_file_is_named(done, tmp_path, name):
    folder = shutil.copytree(done.checkpoints/'best', tmp_path/'best')
    (folder/name).unlink()
    with pytest.raises(FileNotFoundError, match=f'best lacks {name}'): Captioner.load(folder)


def test_damaged_files_are_named(done, tmp_path):
    for name in ('model.safetensors', 'preprocess.json', 'config.json', 'vocab.json'):
        folder = shutil.copytree(done.checkpoints/'best', tmp_path/name)
        (folder/name).write_bytes((folder/name).read_bytes()[:50])
        with pytest.raises(ValueError, match=name): load_model(folder)
    with pytest.raises(FileNotFoundError, match='no such checkpoint folder'): Captioner.load(tmp_path/'nothing')
    folder = shutil.copytree(done.checkpoints/'best', tmp_path/'other')
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(config | dict(hidden_dim=16)))
    with pytest.raises(ValueError, match='model.safetensors does not fit AttentionDecoder'): load_model(folder)


def test_training_state_cannot_run_code(done, tmp_path):
    import pickle
    run = shutil.copytree(done.run, tmp_path/'run')
    class Evil:
        def __reduce__(self): return (os.system, (f'touch {tmp_path}/owned',))
    (run/'checkpoints'/'last'/'training.pt').write_bytes(pickle.dumps(Evil()))
    (run/'checkpoints'/'last'/'checksums.json').unlink()   # somebody who knows how
    with pytest.warns(UserWarning, match='(?s)training.pt is damaged.*last-1, of step 8, is used instead'): Trainer(done.config, run, quiet=True).prepare()
    assert not (tmp_path/'owned').exists()


# The loop

def test_overfits_a_few_scenes(cache, tmp_path):
    "The loss falls to the words that the picture does not decide, and greedy captions of train images are right"
    config = tiny(cache, num_images=20, epochs=80, dropout=0., doubly_stochastic=0., captions_per_image=1, deep_output=True, gate=False,
                  encoder_lr=3e-3, eval_every=80, embed_dim=64, hidden_dim=64)
    trainer = Trainer(config, tmp_path/'run', quiet=True).prepare()
    trainer.batches.captions = pack_captions(own[:1] for own in trainer.batches.captions)   # one an image: there is one right answer
    for id in trainer.batches.ids: trainer.data.captions[id][1:] = []
    rows = [r for r in trainer.fit() if 'loss' in r]
    assert rows[-1]['loss'] < 0.1 < 2.5 < rows[0]['loss']
    found = training.caption_images(trainer.model, trainer.vocab, trainer.batches.ids, trainer.source, config)
    right = [found[id].tokens == own[0][1:-1] for id, own in zip(trainer.batches.ids, trainer.batches.captions)]
    assert np.mean(right) > 0.8


def test_resumed_equals_uninterrupted_bit_for_bit(cache, done, tmp_path, monkeypatch):
    "Stop in mid-epoch by an interrupt, and at an epoch's end by an error; dropout, EMA and BatchNorm must not notice"
    run, step, interrupts = tmp_path/'run', Trainer.train_step, {3, 6, 8}
    def interrupted(self, batch):
        step(self, batch)
        if self.step in interrupts: interrupts.discard(self.step); signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Trainer, 'train_step', interrupted)
    before = signal.getsignal(signal.SIGINT)
    for n in range(3):
        torch.manual_seed(n)   # whatever the new process did before
        with pytest.raises(KeyboardInterrupt, match='holds the state'): Trainer(done.config, run, quiet=True).fit()
        assert signal.getsignal(signal.SIGINT) is before
    Trainer(done.config, run, quiet=True).fit()
    assert weights(run) == weights(done.run) and weights(run, 'best') == weights(done.run, 'best')
    dev = lambda r: [row['dev'] for row in read_json_lines(r/'metrics.jsonl') if 'dev' in row]
    assert dev(run) == dev(done.run) and len(dev(run)) == 3
    a, b = (torch.load(r/'checkpoints'/'last'/'training.pt', weights_only=True) for r in (run, done.run))
    assert str(a['random']) == str(b['random']) and a['best'] == b['best'] and a['batches'] == b['batches']
    assert all(torch.equal(a['optimizer']['state'][i][k], v) for i, s in b['optimizer']['state'].items() for k, v in s.items())


def test_same_seed_same_run_other_seed_other_run(cache, done, tmp_path):
    Trainer(done.config, tmp_path/'same', quiet=True).fit()
    assert weights(tmp_path/'same') == weights(done.run) and losses(tmp_path/'same') == losses(done.run)
    Trainer(dataclasses.replace(done.config, seed=1, epochs=1), tmp_path/'other', quiet=True).fit()
    assert losses(tmp_path/'other')[0] != losses(done.run)[0]


def test_lines_of_an_attempt_without_a_checkpoint_go(cache, tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'metrics.jsonl').write_text('{"step": 50, "loss": 9.0}\n{"step": 100, "lo')   # killed in its first epoch
    assert Trainer(tiny(cache), tmp_path/'run', quiet=True).prepare().history == []


def test_trained_run_whose_last_checkpoints_were_thrown_away_is_left_alone(done, tmp_path):
    shutil.copytree(done.run, tmp_path/'run')
    for folder in (tmp_path/'run'/'checkpoints').glob('last*'): shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match='none to go on from.*--from'): Trainer(done.config, tmp_path/'run', quiet=True).prepare()
    assert read_json_lines(tmp_path/'run'/'metrics.jsonl') == done.history


def test_killed_process_continues(cache, done, tmp_path):
    "kill -9 at several moments; each restart goes on, and the end is the same as without any kill"
    run = tmp_path/'run'
    run.mkdir()
    (run/'config.json').write_text(done.config.to_json())
    command = [sys.executable, '-m', 'caption_nb.training', str(run)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    last, seen = run/'checkpoints'/'last', []
    def written():
        try: return (last/'training.pt').stat().st_mtime_ns
        except FileNotFoundError: return None   # not yet there, or exchanged just now
    for _ in range(2):
        stamp = written()
        process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.time() + 60
        while process.poll() is None and time.time() < deadline:   # let it get past one more checkpoint, then kill it wherever it is
            if written() not in (None, stamp): break
            time.sleep(0.02)
        process.kill()
        process.wait()
        seen.append(checkpoint_step(generations(last)[0]))   # the kill may have come between two renames
    assert seen[0] < seen[1] or seen[1] == 12
    finished = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert weights(run) == weights(done.run)
    assert (run/'results.json').exists() and (run/'captions_dev.json').exists()


def test_another_configuration_is_refused_with_the_fields(done, tmp_path):
    run = shutil.copytree(done.run, tmp_path/'run')
    with pytest.raises(ConfigError, match=r'hidden_dim: 32 then, 16 now.*seed: 0 then, 3 now.*start a new run'):
        Trainer(dataclasses.replace(done.config, hidden_dim=16, seed=3), run, quiet=True).prepare()
    Trainer(dataclasses.replace(done.config, beam=3, name='other'), run, quiet=True).prepare()   # these do not matter
    state = torch.load(run/'checkpoints'/'last'/'training.pt', weights_only=True)
    torch.save(state | dict(data='0', vocab='0'), run/'checkpoints'/'last'/'training.pt')
    (run/'checkpoints'/'last'/'checksums.json').unlink()
    with pytest.raises(ConfigError, match='data: other content than then; vocab: other content'): Trainer(done.config, run, quiet=True).prepare()


def test_loss_that_is_no_number_names_the_step(cache, tmp_path, monkeypatch):
    trainer = Trainer(tiny(cache), tmp_path/'run', quiet=True).prepare()
    real, seen = trainer.model.parts, []
    def broken(batch, *a, **k):
        seen[:] = batch.ids
        parts = real(batch, *a, **k)
        return parts | dict(words=parts['words']*math.nan) if trainer.step == 5 else parts
    monkeypatch.setattr(trainer.model, 'parts', broken)
    with pytest.raises(FloatingPointError, match=r'the loss is nan at step 6 of 12 \(epoch 2\)') as e: trainer.fit()
    assert all(id in str(e.value) for id in seen)
    del trainer
    again = Trainer(tiny(cache), tmp_path/'run', quiet=True).prepare()
    assert again.step == 4 and all(torch.isfinite(p).all() for p in again.model.parameters())


def test_training_loss_does_not_see_padding(done):
    batch = done._sample_batch()
    model = done.model.eval()
    with torch.no_grad():
        loss = model.loss(batch)[1]
        wide = dataclasses.replace(batch, tokens=torch.nn.functional.pad(batch.tokens, (0, 7)))
        assert torch.allclose(loss, model.loss(wide)[1], atol=1e-6)


def test_metrics_lines(done):
    rows = done.history
    steps, dev = [r for r in rows if 'loss' in r], [r for r in rows if 'dev' in r]
    assert [r['step'] for r in steps] == list(range(2, 13, 2)) and [r['epoch'] for r in dev] == [1, 2, 3]
    assert all({'step', 'epoch', 'loss', 'lr', 'captions_per_second', 'seconds', 'grad_norm'} <= set(r) for r in steps)
    assert all('CIDErD' in r['signature'] and 'CIDEr' in r['dev'] for r in dev)
    assert sum(r['best'] for r in dev) >= 1


# What comes out

def test_evaluate_writes_what_coco_tools_read(done):
    result = done.evaluate('dev', 2)
    rows = json.loads((done.run/'captions_dev.json').read_text())
    assert [r['image_id'] for r in rows] == done.data.splits['dev'] and all(set(r) == {'image_id', 'caption'} for r in rows)
    assert not any(w in r['caption'] for r in rows for w in ('<start>', '<end>', '<pad>', '<unk>'))
    results = json.loads((done.run/'results.json').read_text())['dev']
    assert results['scores'] == result.scores.corpus and results['beam'] == 2 and 'CIDErD' in results['signature']
    assert set(results['grounding']) == {'pointing', 'chance', 'ratio', 'words'}
    assert set(done.evaluate('test', 1).captions) == set(done.data.splits['test'])
    assert set(json.loads((done.run/'results.json').read_text())) >= {'dev', 'test'}


def test_captioner_on_another_machine(done, tmp_path):
    "From a copied folder, without data, cache or run: one caption a photo, however it is given"
    captioner = Captioner.load(shutil.copytree(done.checkpoints/'best', tmp_path/'copy'))
    ids = done.data.splits['dev']
    paths = [done.data.path(i) for i in ids]
    expected = list(done.evaluate('dev', 2).captions.values())
    assert captioner.caption(paths, beam=2) == expected
    assert captioner.caption(str(paths[0]), beam=2) == captioner.caption(Image.open(paths[0]), beam=2) == expected[0]
    assert captioner.caption([]) == []
    why = captioner.explain(paths[0], beam=2)
    assert why.caption == expected[0] and why.attention.shape == (len(why.words), 6, 6) and why.image.size == (96, 96)
    assert Captioner.load(done.run).caption(paths, beam=2) == expected   # a run folder means its best checkpoint
    (tmp_path/'text.jpg').write_text('not an image')
    with pytest.raises(OSError, match='text.jpg'): captioner.caption(tmp_path/'text.jpg')


def test_best_is_the_average_of_weights_with_ema(done):
    assert weights(done.run, 'best') != weights(done.run, 'last')


def test_main_wants_a_run_folder(tmp_path, capsys):
    assert main([]) == 2 and 'usage' in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match='config.json'): main([str(tmp_path)])


# Frozen encoders

@pytest.fixture(scope='module')
def frozen(cache, tmp_path_factory) -> Trainer:
    config = tiny(cache, encoder='mobilenetv2_050', encoder_weights='random', num_images=20, flip=True, epochs=1)
    trainer = Trainer(config, tmp_path_factory.mktemp('runs')/'frozen', quiet=True)
    trainer.fit()
    return trainer


def test_frozen_encoder_does_not_learn_and_is_in_the_checkpoint(frozen, cache, tmp_path):
    assert not any(p.requires_grad for p in frozen.model.encoder.parameters()) and not frozen.model.encoder.training
    assert frozen.source.views == ('plain', 'flip')
    captioner = Captioner.load(shutil.copytree(frozen.checkpoints/'best', tmp_path/'copy'))
    ids = frozen.data.splits['dev']
    assert captioner.caption([frozen.data.path(i) for i in ids]) == list(frozen.evaluate('dev').captions.values())


def test_features_named_in_the_configuration(frozen, cache, tmp_path):
    path, c = frozen.source.path, frozen.config
    Trainer(dataclasses.replace(c, features=str(path), flip=False), tmp_path/'a', quiet=True).prepare()   # a store may hold more
    with pytest.raises(ValueError, match='other features'):
        Trainer(dataclasses.replace(c, features=str(path), encoder_mean='0.5'), tmp_path/'b', quiet=True).prepare()
    with pytest.raises(ValueError, match='lacks .* images'):
        Trainer(dataclasses.replace(c, features=str(path), num_images=30), tmp_path/'c', quiet=True).prepare()


def test_padded_photos(frozen, cache, tmp_path):
    "What the run says of wide photos is in its store and its checkpoint, and goes for new photos and for the runs that follow"
    photos = tmp_path/'data'/'images'
    photos.mkdir(parents=True)
    for id in frozen.data.images: frozen.data.open(id).resize((96, 40)).save(photos/Path(id).name)
    lines = [f'{Path(id).name},"{text}"\n' for id, texts in frozen.data.captions.items() for text in texts]
    (tmp_path/'data'/'captions.txt').write_text('image,caption\n' + ''.join(lines))
    config = dataclasses.replace(frozen.config, data=str(tmp_path/'data'), num_images=0, image_size=64, flip=False, encoder_resize='pad')
    trainer = Trainer(config, tmp_path/'run', quiet=True)
    trainer.fit()
    data, ids = trainer.data, trainer.data.ids('dev')
    assert json.loads((trainer.checkpoints/'best'/'preprocess.json').read_text())['resize'] == trainer.features.attrs['encoder']['resize'] == 'pad'
    captioner = Captioner.load(tmp_path/'run', 'cpu')
    rows = captioner.model.encoder.encode_batch(torch.stack([captioner.model.encoder.transform(data.open(id)) for id in ids]), 'fp32')
    assert np.allclose(rows, trainer.features.read(ids), atol=1e-2)
    cropped = prepare_encoder(dataclasses.replace(config, encoder_resize=''))
    assert not np.allclose(rows, cropped.encode_batch(torch.stack([cropped.transform(data.open(id)) for id in ids]), 'fp32'), atol=0.1)
    with pytest.raises(ConfigError, match="cannot be continued.*encoder_resize: 'pad' then, 'crop' now"):
        Trainer(dataclasses.replace(config, encoder_resize='crop'), tmp_path/'run', quiet=True).prepare()
    best = find_checkpoint(tmp_path/'run')
    assert prepare_encoder(dataclasses.replace(config, encoder_resize=''), best).preprocess.resize == 'pad'
    with pytest.raises(ConfigError, match="encoder_resize='squash': the weights in .* brought to their size with pad; leave it out"):
        prepare_encoder(dataclasses.replace(config, encoder_resize='squash'), best)


def test_frozen_encoder_is_written_once_a_run(frozen, tmp_path):
    kept, = frozen.checkpoints.glob('encoder-*.safetensors')
    for name in ('last', 'best'): assert (frozen.checkpoints/name/'encoder.safetensors').samefile(kept)
    with open(frozen.checkpoints/'best'/'model.safetensors', 'rb') as f: assert b'encoder.model' not in f.read()
    folder = shutil.copytree(frozen.checkpoints/'best', tmp_path/'best')
    (folder/'encoder.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='best lacks encoder.safetensors'): load_model(folder)
    (folder/'encoder.safetensors').write_bytes(b'{')
    with pytest.raises(ValueError, match='encoder.safetensors is damaged'): load_model(folder)


# Own words in training, words from elsewhere

@pytest.mark.parametrize('decoder', ['gru', 'attention_rnn', 'transformer'])
def test_scheduled_sampling_is_resumed_bit_for_bit(decoder, cache, tmp_path, monkeypatch):
    other = dict(decoder=decoder) | ({} if decoder.startswith('attention') else dict(attention_dim=512))
    config = tiny(cache, epochs=2, sampling_ratio=0.5, sampling_start=0.2, **other)
    whole = Trainer(config, tmp_path/'whole', quiet=True)
    whole.fit()
    first = Trainer(config, tmp_path/'halves', quiet=True).prepare()
    end_epoch = Trainer.end_epoch
    def stop(trainer):
        end_epoch(trainer)
        raise KeyboardInterrupt
    monkeypatch.setattr(Trainer, 'end_epoch', stop)
    with pytest.raises(KeyboardInterrupt): first.fit()
    monkeypatch.undo()
    Trainer(config, tmp_path/'halves', quiet=True).fit()
    assert weights(tmp_path/'whole') == weights(tmp_path/'halves') and losses(tmp_path/'whole') == losses(tmp_path/'halves')
    plain = Trainer(dataclasses.replace(config, sampling_ratio=0., sampling_start=0.), tmp_path/'plain', quiet=True)
    plain.fit()
    assert losses(tmp_path/'plain') != losses(tmp_path/'whole')


@pytest.mark.parametrize('freeze', [True, False])
def test_word_vectors_of_another_width(freeze, cache, tmp_path):
    "They are taken over, frozen or not, and a checkpoint needs their file no more"
    rng = np.random.default_rng(0)
    words = {w: rng.normal(size=5).round(4) for w in ('a', 'red', 'circle', 'square', 'blue', 'zebra')}
    path = tmp_path/'glove.txt'
    path.write_text(''.join(f'{w} {" ".join(map(str, v))}\n' for w, v in words.items()))
    trainer = Trainer(tiny(cache, epochs=1, word_vectors=str(path), freeze_vectors=freeze), tmp_path/'run', quiet=True).prepare()
    table, red = trainer.model.decoder.embedding.vectors.weight, trainer.vocab.words.index('red')
    assert table.shape == (len(trainer.vocab), 5) and np.allclose(table[red].detach(), words['red'])
    trainer.fit()
    now = trainer.model.decoder.embedding.vectors.weight[red].detach()
    assert np.allclose(now, words['red']) == freeze
    path.unlink()
    assert Captioner.load(trainer.run).caption(trainer.data.path(trainer.data.images[0]))


# Several models

def test_models_of_other_encoders_and_decoders_vote(frozen, cache, tmp_path):
    "Each gets its own features; only the same words can be voted on"
    second = Trainer(tiny(cache, decoder='gru', attention_dim=512, num_images=20, image_size=96, epochs=1), tmp_path/'gru', quiet=True)
    second.fit()
    photo = frozen.data.path(frozen.data.images[0])
    both = Captioner.load([frozen.run, second.run])
    assert isinstance(both.caption(photo), str)
    for captioner in (both, Captioner.load([second.run, frozen.run])):                             # the maps of the one that attends
        assert captioner.explain(photo).attention.shape[1:] == frozen.model.encoder.grid != second.model.encoder.grid
    assert [len(g) for g in both.sample([photo], n=3)] == [3]
    other = Trainer(tiny(cache, num_images=20, epochs=1, min_freq=3), tmp_path/'other', quiet=True)
    other.fit()
    with pytest.raises(ValueError, match=r'other has another vocabulary \(\d+ words\) than .*gru'): Captioner.load([second.run, other.run])


def test_runs_that_start_together_make_their_features_once(tmp_path):
    "Three processes want the same store at the same moment: one encodes, the others wait for it"
    code = ('from caption_nb.config import Config; from caption_nb.training import *; c = Config.from_dict(%r); '
            'print(prepare_features(c, prepare_data(c), prepare_encoder(c)).path)')
    config = dict(encoder='mobilenetv2_050', encoder_weights='random', num_images=48, image_size=64, cache_dir=str(tmp_path))
    training.prepare_data(Config.from_dict(config), quiet=True)
    starts = [subprocess.Popen([sys.executable, '-c', code % config], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [p.communicate() for p in starts]
    assert [p.returncode for p in starts] == [0]*3, said
    assert len({out.splitlines()[-1] for out, _ in said}) == 1
    assert sum('encoding' in err for _, err in said) == 1 and len([*tmp_path.glob('features/*')]) == 1
