"Runs that are killed again and again end with the bits of runs that nobody killed; `python -m tests.faults` does it by hand"
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import faults
import pytest

SEED = int(os.environ.get('CAPTION_NB_FAULT_SEED', '0'))
pytestmark = pytest.mark.skipif(not Path('/proc/self').exists() or not hasattr(os, 'fork'), reason='forks, and reads /proc')


def shown(kills: list[faults.Kill], seconds: float):
    print(f'seed {SEED} (CAPTION_NB_FAULT_SEED sets it), {seconds:.0f} s\n{faults.table(kills)}')


def test_twenty_kills(tmp_path):
    "In every phase, by every signal, in four kinds of runs: the same SHA-256, no gap in metrics.jsonl and no line twice"
    start = time.monotonic()
    kills = faults.one_rank(tmp_path, SEED, 20)
    shown(kills, time.monotonic() - start)
    assert len(kills) >= 20 and sum(k.code == '-9' for k in kills) >= 8
    assert {k.run for k in kills} == {'joint', 'fp16', 'scst', 'fine-tuning'}
    assert {k.how.split()[0] for k in kills} >= {'KILL', 'TERM', 'INT', 'STOP', 'USR2'}
    hit = Counter(word for k in kills for word in k.phase.replace(',', '').split(' + ' if '+' in k.phase else ' '))
    assert set(hit) >= {'starting', 'resuming', 'training', 'evaluation', 'checkpoint'}, hit


def test_kills_of_two_ranks(tmp_path):
    "A rank that is killed takes the other down within seconds; one that is asked to stop stops both, with a checkpoint"
    start = time.monotonic()
    kills = faults.two_ranks(tmp_path, SEED, 7)
    shown(kills, time.monotonic() - start)
    killed = [k for k in kills if '-9' in k.code.split()]
    assert len(kills) >= 7 and len(killed) >= 3 and max(k.seconds for k in killed) < 30
