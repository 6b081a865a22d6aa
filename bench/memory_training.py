"""Resident memory of a training over more than a thousand steps and a hundred epochs, each with an evaluation and a checkpoint.

'ours' is the memory in the last tenth of the epochs, 'peer' the memory around the middle (medians, MB); a leak shows in the ratio, and in
'growth_percent' and 'MB_per_1000_steps', a straight line through the second half. The first half is left out: caches fill, the allocator
finds its size. Two kinds: stored features, and an encoder that learns from augmented photos. Each is trained in a process of its own."""
from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.common import Result

KINDS = {'stored features': dict(embed_dim=32, hidden_dim=32, attention_dim=32),
         'encoder learns, augmented': dict(encoder='scene_cnn', features='', data='scenes', layout='auto', num_images=70, image_size=64,
                                           embed_dim=32, hidden_dim=32, attention_dim=32, crop=.2, colour=.2, flip=True)}


def child(kind: str, epochs: int, images: int):
    "Train, and print a line of JSON: step and resident MB after each epoch"
    from bench.training_loop import feature_config
    from caption_nb.config import Config
    from caption_nb.meters import memory_use
    from caption_nb.training import Trainer

    class Weighed(Trainer):
        def end_epoch(self):
            super().end_epoch()
            seen.append((self.step, memory_use()['resident_MB']))
    seen = []
    with tempfile.TemporaryDirectory() as tmp:
        changes = KINDS[kind]
        base = feature_config(Path(tmp), images, 200, images_per_batch=8, captions_per_image=2, epochs=epochs, ema=.99, dev_loss=True, save_minutes=0.,
                              threads=1, precision='fp32', device='cpu', log_every=10)
        config = Config.from_dict(base.to_dict() | changes)
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stderr(nowhere): Weighed(config, Path(tmp)/'run', quiet=True).fit()
    print(json.dumps(seen))


def measure(kind: str, epochs: int, images: int) -> list[tuple[int, float]]:
    "What `child` says, from a process of its own"
    command = [sys.executable, '-c', f'from bench.memory_training import child; child({kind!r}, {epochs}, {images})']
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    if done.returncode: raise RuntimeError(f'{kind}: {done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def run(quick: bool = False) -> list[Result]:
    epochs, images, results = 8 if quick else 150, 56, []
    for kind in KINDS:
        steps, memory = np.array(measure(kind, epochs, images)).T
        half, tenth = len(steps)//2, max(1, len(steps)//10)
        slope = np.polyfit(steps[half:], memory[half:], 1)[0]
        middle, end = statistics.median(memory[half:half + tenth]), statistics.median(memory[-tenth:])
        sizes = dict(steps=int(steps[-1]), epochs=len(steps), MB_per_1000_steps=round(1000*slope, 3), first_MB=memory[0],
                     growth_percent=round(100*slope*(steps[-1] - steps[half])/middle, 3))
        ratios = memory[half:]/middle
        results.append(Result(f'memory of training: {kind}', end, middle, end/middle, 'MB', [float(ratios.min()), float(ratios.max())], sizes))
    return results
