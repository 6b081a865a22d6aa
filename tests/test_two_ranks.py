"""Two ranks learn what one process learns: the same losses, gradients, scores and captions.

The tests train every case of `cases` in this process, and in two ranks, which run this file as their program."""
import json
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import joint
from torch.nn import functional as F

from caption_nb import training
from caption_nb.basics import read_json_lines
from caption_nb.captioner import caption_images
from caption_nb.config import Config
from caption_nb.ranks import Ranks, launch
from caption_nb.scst import SelfCritical
from caption_nb.training import Trainer

pytestmark = pytest.mark.usefixtures('one_thread')


def cases(root: Path) -> dict[str, Config]:
    "Nothing random in a step; 40 train images in batches of 13, so the last batch has one image, which only rank 0 sees"
    calm = dict(num_images=50, images_per_batch=13, dropout=0., feature_dropout=0., sampling_ratio=0., crop=0., colour=0., accumulate=2,
                epochs=2, log_every=1, save_minutes=0., doubly_stochastic=1., lr=2e-3, beam=2)
    return {'joint': joint(root/'cache', **calm, concepts=1., label_smoothing=0.1),
            'frozen': joint(root/'cache', **calm, encoder='mobilenetv2_050', encoder_weights='random', ema=0.),
            'scst': joint(root/'cache', **calm, stage='scst', from_run=str(root/'one'/'joint'), scst_samples=3, dev_loss=False)}


def draw_by_image(critic: SelfCritical, decoder, grid, generator=None):
    "The samples of an image are a matter of its own generator, whoever else is in the batch"
    drawn = [DRAW(critic, decoder, grid[i:i + 1], torch.Generator().manual_seed(zlib.crc32(id.encode())))[0]
             for i, id in enumerate(critic.now)]
    most = max(d.tokens.shape[1] for d in drawn)
    tokens = torch.cat([F.pad(d.tokens, (0, most - d.tokens.shape[1]), value=critic.vocab.pad_id) for d in drawn])
    return replace(drawn[0], tokens=tokens, logprobs=torch.cat([d.logprobs for d in drawn])), None


def loss_of_images(critic: SelfCritical, decoder, grid, ids, generator=None):
    critic.now = ids
    return LOSS(critic, decoder, grid, ids, generator)


DRAW, LOSS = SelfCritical.draw, SelfCritical.loss


def train_all(folder: Path):
    "Train every case in `folder`; beside the run lie the gradients of its first step, and whom this rank captioned"
    for name, config in cases(folder.parent).items():
        first, captioned = {}, []
        trainer = Trainer(config, folder/name, quiet=True).prepare()
        def clip(parameters, *args):
            if not first: first.update((n, p.grad.clone()) for n, p in trainer.model.named_parameters() if p.grad is not None)
            return clip.real(parameters, *args)
        def caption(model, vocab, ids, *args, **kwargs):
            captioned.append(list(ids))
            return caption_images(model, vocab, ids, *args, **kwargs)
        clip.real = training.clip_gradients
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, 'clip_gradients', clip)
            patch.setattr(training, 'caption_images', caption)
            patch.setattr(SelfCritical, 'draw', draw_by_image)
            patch.setattr(SelfCritical, 'loss', loss_of_images)
            trainer.fit()
            trainer.evaluate('dev')
        torch.save(dict(gradients=first, captioned=captioned, dev=trainer.data.ids('dev')), folder/f'{name}-{trainer.ranks.rank}.pt')
    trainer.ranks.leave()


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> Path:
    "Folders one/ and two/ with all runs"
    root = tmp_path_factory.mktemp('ranks')
    for n in ('one', 'two'): (root/n).mkdir()
    train_all(root/'one')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('OMP_NUM_THREADS', '1')
        launch(root/'two', 2, program=[__file__, str(root/'two')])
    return root


def rows(root: Path, n: str, name: str) -> list[dict]: return read_json_lines(root/n/name/'metrics.jsonl')


def seen(root: Path, n: str, name: str, rank: int = 0) -> dict: return torch.load(root/n/f'{name}-{rank}.pt')


each = pytest.mark.parametrize('name', ['joint', 'frozen', 'scst'])


@each
def test_gradients_of_the_first_step(root, name):
    one, two, other = seen(root, 'one', name)['gradients'], seen(root, 'two', name)['gradients'], seen(root, 'two', name, 1)['gradients']
    assert one.keys() == two.keys() == other.keys() and len(one) > 5
    worst = max((one[n] - two[n]).abs().max().item() for n in one)
    print(f'{name}: gradients of up to {max(g.abs().max().item() for g in one.values()):.3g} differ by at most {worst:.2g}')
    assert worst < 1e-6
    assert all(torch.equal(two[n], other[n]) for n in two), 'not the same bits on both ranks'


@each
def test_losses_and_scores(root, name):
    one, two = rows(root, 'one', name), rows(root, 'two', name)
    assert [(r['step'], r['epoch'], 'dev' in r) for r in one] == [(r['step'], r['epoch'], 'dev' in r) for r in two]
    assert len([r for r in one if 'dev' not in r]) == 4
    worst = 0.
    for a, b in zip(one, two):
        for key in ('loss', 'reward', 'baseline', 'sample_tokens', 'lr', 'encoder_lr', 'dev_loss'):
            assert (key in a) == (key in b)
            if key in a: worst = max(worst, abs(a[key] - b[key]))
        if 'grad_norm' in a: assert b['grad_norm'] == pytest.approx(a['grad_norm'], rel=1e-4)
        if 'dev' in a:
            assert b['dev'] == pytest.approx(a['dev'], abs=1e-6)
            assert all(a[k] == b[k] for k in ('references', 'words', 'distinct_words', 'best', 'signature'))
    print(f'{name}: losses and rewards differ by at most {worst:.2g}')
    assert worst < 1e-5


@each
def test_results(root, name):
    one, two = ((root/n/name/'captions_dev.json').read_text() for n in ('one', 'two'))
    assert one == two
    one, two = (json.loads((root/n/name/'results.json').read_text())['dev']['scores'] for n in ('one', 'two'))
    assert two == pytest.approx(one, abs=1e-6)


@each
def test_no_image_is_captioned_twice(root, name):
    here, there = seen(root, 'two', name), seen(root, 'two', name, 1)
    assert len(here['captioned']) == len(there['captioned']) > 2 and len(here['dev']) % 2   # in training, and at the end
    for a, b in zip(here['captioned'], there['captioned']): assert sorted(a + b) == sorted(here['dev']) and abs(len(a) - len(b)) == 1


if __name__ == '__main__': train_all(Path(sys.argv[1]))
