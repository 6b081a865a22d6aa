"""The training loop against the bare step, and what a checkpoint holds it up.

Ours is `Trainer.fit` with all that it does besides learning: batches read from a feature store, schedule, scaler, moving average of the
weights, meter, progress bar, metrics.jsonl, watching for signals and a STOP file. The peer is what no training can do without: loss,
backward, clipping, optimiser, on batches that are there already. Both take the same batches of the same data, some steps ours, some steps
the peer's. 1 - ratio is about the overhead; 'overhead_percent' in the JSON is exactly it, 'cpu_overhead_percent' the same in processor time of all threads, which other programs of a busy machine disturb less.

The other rows are about checkpoints: for how many milliseconds `save` holds the loop up, beside writing at once; what share that is of an
epoch of Flickr8k (188 steps), of ten minutes, and what the thread that writes costs the steps beside it (in the JSON). Evaluations are
left out."""
from __future__ import annotations

import contextlib
import copy
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from torch import nn

from bench.common import Result
from caption_nb.config import Config
from caption_nb.features import FeatureStore, _create
from caption_nb.optimizers import make_optimizer
from caption_nb.training import Trainer, autocast, demo_config, prepare_encoder

EPOCH = 188   # steps in an epoch of Flickr8k: 6,000 images, 32 in a batch


def draw_captions(images: int, words: int, rng: np.random.Generator) -> list[list[str]]:
    "Five captions an image, with the lengths of Flickr8k's"
    def caption(): return ' '.join(f'w{i}' for i in rng.integers(words, size=max(4, round(rng.normal(10.5, 3.2)))))
    return [[caption() for _ in range(5)] for _ in range(images)]


def make_data(folder: Path, images: int, words: int, dev: int = 8) -> Path:
    "A data set in the layout of Flickr8k: random captions, and pictures of a pixel that nobody looks at"
    rng, ids = np.random.default_rng(0), [f'{i:05d}.jpg' for i in range(images + 2*dev)]
    folder.mkdir(parents=True)
    for id in ids: Image.new('RGB', (1, 1)).save(folder/id)
    rows = [f'{id}#{n}\t{text}' for id, own in zip(ids, draw_captions(len(ids), words, rng)) for n, text in enumerate(own)]
    (folder/'Flickr8k.token.txt').write_text('\n'.join(rows) + '\n')
    for split, part in (('train', ids[:images]), ('dev', ids[images:images + dev]), ('test', ids[images + dev:])):
        (folder/f'Flickr_8k.{split}Images.txt').write_text('\n'.join(part) + '\n')
    return folder


def make_store(path: Path, config: Config, ids: list[str]) -> Path:
    "Random features of `ids`, which `config` takes for those of its encoder"
    torch.manual_seed(config.seed)   # as the trainer does: the same random weights
    encoder, rng = prepare_encoder(config), np.random.default_rng(0)
    shape = (encoder.grid[0]*encoder.grid[1], encoder.dim)
    record = dict(grid=list(encoder.grid), dim=encoder.dim, views=['plain'], precision='fp32', encoder=encoder.spec)
    _create(path, FeatureStore, record, shape, ids, [0]*len(ids))
    with h5py.File(path, 'r+') as store:
        for i in range(len(ids)): store['features'][i] = np.maximum(rng.standard_normal(shape, dtype='f4'), 0)
    return path


def feature_config(folder: Path, images: int, words: int, **changes) -> Config:
    "A run with a frozen encoder on data that are made in `folder`"
    data = make_data(folder/'data', images, words)
    base = dict(data=str(data), layout='tokens', tokenizer='whitespace', min_freq=1, encoder='mobilenetv2_100', encoder_weights='random',
                features=str(folder/'features.h5'), cache_dir=str(folder/'cache'))
    config = Config.from_dict(base | changes)
    make_store(folder/'features.h5', config, sorted(p.name for p in data.glob('*.jpg')))
    return config


class Bare:
    "What has to be done in a step, and nothing else"
    def __init__(self, trainer: Trainer):
        self.model, self.c, self.precision, self.device = copy.deepcopy(trainer.model).train(), trainer.config, trainer.machine.precision, trainer.device
        self.optimizer = make_optimizer(self.c, self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def __call__(self, batches: list) -> float:
        "Seconds for a step on each of `batches`"
        batches, start = [b.to(self.device) for b in batches], settled(self.device)
        for batch in batches:
            with autocast(self.device, self.precision): loss, _ = self.model.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, self.c.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return settled(self.device) - start


def settled(device: torch.device) -> float:
    "The time, when all that was asked of `device` is done"
    if device.type == 'cuda': torch.cuda.synchronize(device)
    return time.perf_counter()


class TimedTrainer(Trainer):
    "Its loop pauses after every few steps, for a bare loop to do the same steps"
    def __init__(self, config: Config, run: Path, steps: int, rounds: int):
        super().__init__(config, run)
        self.few, self.rounds, self.times = steps, rounds, []

    def end_epoch(self):
        self.log_steps()
        self.epoch += 1
        self._enter_epoch()

    def _few_steps(self, groups, seen: list):
        for batches in islice(groups, self.few):
            seen += batches
            yield batches

    def _groups(self, show):
        groups, bare = super()._groups(show), Bare(self)
        for i in range(self.rounds + 1):   # the first warms up
            seconds, seen = {}, []
            for kind in ('plain', 'checkpoint'):
                self.writer.wait()
                start, cpu = settled(self.device), time.process_time()
                self.tick = start
                if kind == 'checkpoint':
                    stalled = self.meter.watch.seconds.get('checkpoint', 0.)
                    self.save('last')
                    seconds['stall'] = self.meter.watch.seconds['checkpoint'] - stalled
                yield from self._few_steps(groups, seen if kind == 'plain' else [])
                seconds[kind], seconds[f'{kind}_cpu'] = settled(self.device) - start, time.process_time() - cpu
            self.writer.wait()
            cpu = time.process_time()
            seconds['bare'] = bare(seen)
            seconds['bare_cpu'] = time.process_time() - cpu
            start = time.perf_counter()
            self.save('last', wait=True)
            seconds['synchronous'] = time.perf_counter() - start
            if i: self.times.append(seconds | dict(captions=sum(b.num_captions for b in seen)))


def measure(config: Config, run: Path, steps: int, rounds: int) -> TimedTrainer:
    "A trainer that was timed, its progress bar shown to nobody"
    trainer = TimedTrainer(config, run, steps, rounds)
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stderr(nowhere): trainer.fit()
    return trainer


def median(times: list[dict], name: str) -> float: return statistics.median(t[name] for t in times)


def results_of(name: str, trainer: TimedTrainer, sizes: dict) -> list[Result]:
    "Two rows: the loop, and the checkpoints"
    times, few = trainer.times, trainer.few
    def over(kind=''):
        percent = [100*(t[f'plain{kind}']/t[f'bare{kind}'] - 1) for t in times]
        return [round(x, 2) for x in (statistics.median(percent), min(percent), max(percent))]
    sizes = sizes | dict(precision=trainer.machine.precision, parameters=sum(p.numel() for p in trainer.parameters), rounds=len(times), steps=few)
    sizes |= dict(overhead_percent=over(), cpu_overhead_percent=over('_cpu'))
    ratios = [t['bare']/t['plain'] for t in times]
    rate = {kind: statistics.median(t['captions']/t[kind] for t in times) for kind in ('plain', 'bare')}
    loop = Result(f'{name}: loop | bare step', rate['plain'], rate['bare'], statistics.median(ratios), 'captions/s', [min(ratios), max(ratios)], sizes)
    stall, step, beside = median(times, 'stall'), median(times, 'plain')/few, statistics.median(t['checkpoint'] - t['plain'] for t in times)
    gain = [t['synchronous']/t['stall'] for t in times]
    shares = dict(of_an_epoch=stall/(EPOCH*step), of_10_minutes=stall/600, with_thread_of_an_epoch=max(stall, beside)/(EPOCH*step),
                  synchronous_of_an_epoch=median(times, 'synchronous')/(EPOCH*step))
    sizes = sizes | dict(step_ms=round(1000*step, 2), with_thread_ms=round(1000*beside, 1),
                         share_percent={n: round(100*s, 4) for n, s in shares.items()})
    held = Result(f'{name}: checkpoint | written at once', 1000*stall, 1000*median(times, 'synchronous'), statistics.median(gain), 'ms held up',
                  [min(gain), max(gain)], sizes)
    return [loop, held]


def run(quick: bool = False) -> list[Result]:
    "A realistic model on stored features, and the demo's small one, trained with its encoder, as a harsh case"
    threads, (images, words, dim, batch) = torch.get_num_threads(), (64, 200, 32, 8) if quick else (256, 2540, 512, 32)
    common = dict(ema=0.998, epochs=1000, save_minutes=0., keep_last=2, eval_every=1000, threads=threads)
    results = []
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        base = feature_config(folder, images, words, embed_dim=dim, hidden_dim=dim, attention_dim=dim, images_per_batch=batch,
                              precision='fp32' if quick else 'bf16', **common)
        trainer = measure(base, folder/'frozen', *((4, 2) if quick else (8, 5)))
        sizes = dict(images=batch, captions=5, regions=49, D=1280, dim=dim, vocab=len(trainer.vocab))
        results += results_of(f'attention LSTM, {base.precision}', trainer, sizes)
        config = demo_config(**common | dict(num_images=60 if quick else 400, cache_dir=str(folder/'cache'), precision='fp32', images_per_batch=8))
        trainer = measure(config, folder/'demo', *((4, 2) if quick else (20, 15)))
        results += results_of('demo with encoder, fp32', trainer, dict(images=8, captions=5, regions=49, D=128, dim=128, vocab=len(trainer.vocab)))
    return results
