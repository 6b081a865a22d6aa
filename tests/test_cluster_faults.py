"Runs on a real SLURM that are hit lose nothing: a short campaign; `python -m tests.cluster_faults` does the long one"
import os
import random
import time

import pytest
from cluster import install_packages
from cluster_faults import KINDS, MOMENTS, Campaign, failures, plan, small_disks, table
from conftest import need

SEED = int(os.environ.get('CAPTION_NB_FAULT_SEED', '0'))


def test_short_campaign(tmp_path):
    "Every way in which an attempt ends, but for those that take SLURM minutes: told, killed, cut off"
    reason = install_packages()
    need('slurm', not reason, reason)
    start = time.monotonic()
    cases = Campaign(tmp_path, SEED, lanes=3).run([
        ('node crashed', 'training'), ('scancel', 'evaluation'), ('kernel killed', 'later cells'), ('papermill killed', 'training'),
        ('preempted, no grace', 'checkpoint'), ('disk full' if small_disks() else 'slurmd restarted', 'training')])
    print(f'seed {SEED} (CAPTION_NB_FAULT_SEED sets it), {time.monotonic() - start:.0f} s\n{table(cases)}')
    assert not failures(cases), f'{failures(cases)}\n{table(cases)}'
    assert len(cases) == 7 and all(c.struck for c in cases[1:])


@pytest.mark.parametrize('number', [20, 40])
def test_plan_leaves_nothing_out(number):
    "Each fault while training and at another moment; more if more are asked for"
    pairs = plan(number, random.Random(SEED), list(KINDS))
    assert len(pairs) >= number and {name for name, _ in pairs} == set(KINDS)
    for name, kind in KINDS.items():
        moments = {at for n, at in pairs if n == name}
        assert 'training' in moments and moments <= {'training', *kind.others} <= set(MOMENTS) and len(moments) >= 2
