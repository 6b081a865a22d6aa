"Runs on a real SLURM that are hit lose nothing: a short campaign; `python -m tests.cluster_faults` does the long one"
import os
import random
import time

import pytest
from cluster import install_packages
from cluster_faults import KINDS, MOMENTS, Campaign, Case, failures, plan, table
from conftest import LONG, need
from nbformat.v4 import new_code_cell, new_notebook, new_output

SEED = int(os.environ.get('CAPTION_NB_FAULT_SEED', '0'))


@LONG
def test_short_campaign(tmp_path):
    "Told to stop, killed, cut off, restarted behind its back; what takes SLURM minutes is left to the long campaign"
    reason = install_packages()
    need('slurm', not reason, reason)
    start = time.monotonic()
    cases = Campaign(tmp_path, SEED, lanes=3).run([
        ('node crashed', 'training'), ('scancel', 'evaluation'), ('papermill killed', 'later cells'), ('preempted, no grace', 'checkpoint'),
        ('slurmd restarted', 'starting')])
    print(f'seed {SEED} (CAPTION_NB_FAULT_SEED sets it), {time.monotonic() - start:.0f} s\n{table(cases)}')
    assert not failures(cases), f'{failures(cases)}\n{table(cases)}'
    assert len(cases) == 6 and all(c.struck for c in cases[1:])


@pytest.mark.parametrize('number', [20, 40])
def test_plan_leaves_nothing_out(number):
    "Each fault while training and at another moment; more if more are asked for"
    pairs = plan(number, random.Random(SEED), list(KINDS))
    assert len(pairs) >= number and {name for name, _ in pairs} == set(KINDS)
    for name, kind in KINDS.items():
        moments = {at for n, at in pairs if n == name}
        assert 'training' in moments and moments <= {'training', *kind.others} <= set(MOMENTS) and len(moments) >= 2


@pytest.mark.parametrize('missing, lost', [(0, 0.), (8, 1.75), (20, 4.75)])
def test_lost_output_is_noticed(tmp_path, missing, lost):
    "The last ticks before the fault are not in the notebook; one after it need not be"
    case = Case(tmp_path/'01', None, 1, 'papermill killed', 'training')
    case.struck = 1000 + 99/4
    (case.folder/'7-1.ticks').write_text(''.join(f'{n} {1000 + n/4}\n' for n in range(101)))
    kept = [new_output('stream', text=f'tick 7-1 {n}\n') for n in range(100 - missing)]
    case.check_ticks({'attempt-1.ipynb': new_notebook(cells=[new_code_cell('train()', outputs=kept)])})
    assert case.lost == lost and len(case.faults) == (lost > 3)
