"Several processes as one: real ranks on gloo, started, watched, killed"
import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import nn

import caption_nb.ranks as module
from caption_nb.ranks import (Attempt, RankError, Ranks, Stopped, Tail, buckets, count_ranks, first_host, launch, rank_command, slurm_tasks,
                              slurm_variables, sum_gradients, sync_batchnorm, tasks_per_node)

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    "No rank, no SLURM job, whoever runs these tests; and one thread a rank"
    for name in list(os.environ):
        if name.startswith('SLURM_') or name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'): monkeypatch.delenv(name)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path/'run').mkdir()
    return tmp_path/'run'


def script(run: Path, text: str, name: str = 'program.py') -> list[str]:
    "A program for the ranks: `run`, `rank` and the usual imports are there"
    head = 'import json, os, signal, sys, time\nfrom pathlib import Path\nrun, rank = Path(sys.argv[1]), int(os.environ["RANK"])\n'
    (run/name).write_text(head + dedent(text))
    return [str(run/name), str(run)]


def ranks_of(run: Path) -> list[int]:
    "Processes whose command line names `run`"
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try: line = (p/'cmdline').read_bytes().decode()
        except OSError: continue
        if str(run) in line and p.name != str(os.getpid()): found.append(int(p.name))
    return found


def until(condition, seconds: float = 30.):
    "Wait for `condition`; its value"
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f'not within {seconds} s'
        time.sleep(0.1)
    return value


linux = pytest.mark.skipif(not Path('/proc/self').exists(), reason='reads /proc')

# ---- where am I? ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('nodes, first', [('n[1-3,7]', 'n1'), ('n[7,1-3]', 'n7'), ('gpu[01-04]-ib,cpu1', 'gpu01-ib'), ('alone', 'alone'),
                                          ('a,b[1-2]', 'a'), ('r[1-2]n[3-4]', 'r1n3'), ('node-12-3', 'node-12-3'), ('n[007]', 'n007')])
def test_first_host(nodes, first): assert first_host(nodes) == first


def test_tasks_per_node():
    assert tasks_per_node('4') == [4]
    assert tasks_per_node('2(x3),1') == [2, 2, 2, 1]


BATCH = dict(SLURM_JOB_ID='77', SLURM_NTASKS='2', SLURM_NPROCS='2', SLURM_PROCID='0', SLURM_LOCALID='0', SLURM_NODEID='0', SLURM_NNODES='1',
             SLURM_JOB_NODELIST='n1', SLURM_TASKS_PER_NODE='2')
STEP = BATCH | dict(SLURM_STEP_ID='3', SLURM_STEP_NUM_TASKS='2', SLURM_STEP_NUM_NODES='1', SLURM_STEP_NODELIST='n1', SLURM_PROCID='1',
                    SLURM_LOCALID='1')


def test_a_task_of_a_step_is_a_rank():
    found = slurm_variables(STEP)
    assert 1024 < int(found.pop('MASTER_PORT')) < 32768
    assert found == dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1')


@pytest.mark.parametrize('environ', [{}, BATCH, BATCH | dict(SLURM_STEP_ID='batch'), BATCH | dict(SLURM_STEP_ID='extern'),
                                     BATCH | dict(SLURM_STEP_ID='4294967291'), BATCH | dict(SLURM_STEP_ID='4294967290'),
                                     STEP | dict(SLURM_STEP_NUM_TASKS='1', SLURM_NTASKS='1'), STEP | dict(RANK='0'),
                                     STEP | dict(SLURM_PTY_PORT='40000')],
                         ids='none batch batch-by-name extern batch-by-number interactive one-task torchrun terminal'.split())
def test_what_is_no_rank_of_slurm(environ, monkeypatch):
    assert slurm_variables(environ) == {}
    for name, value in environ.items(): monkeypatch.setenv(name, value)
    if 'RANK' not in environ: assert Ranks.join('cpu') == Ranks(device=torch.device('cpu'))


def test_several_nodes_meet_at_the_first(monkeypatch):
    monkeypatch.setattr(module, 'node_address', lambda host: f'address of {host}')
    step = STEP | dict(SLURM_STEP_NUM_NODES='3', SLURM_STEP_NODELIST='n[2-4]',
                       SLURM_STEP_TASKS_PER_NODE='2(x2),1', SLURM_STEP_NUM_TASKS='5', SLURM_PROCID='4', SLURM_NODEID='2', SLURM_LOCALID='0')
    found = slurm_variables(step)
    assert (found['MASTER_ADDR'], found['LOCAL_WORLD_SIZE'], found['WORLD_SIZE']) == ('address of n2', '1', '5')
    found = slurm_variables(step | dict(MASTER_ADDR='10.0.0.1', MASTER_PORT='5'))
    assert (found['MASTER_ADDR'], found['MASTER_PORT']) == ('10.0.0.1', '5')


def test_an_unknown_name_is_looked_up_in_slurm(monkeypatch, tmp_path):
    (tmp_path/'scontrol').write_text('#!/bin/sh\necho "NodeName=$3 Arch=x"\necho "   NodeAddr=10.1.2.3 NodeHostName=h"\n')
    (tmp_path/'scontrol').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    assert module.node_address('no-such-host.invalid') == '10.1.2.3'
    assert module.node_address('localhost') == 'localhost'


def test_two_jobs_on_a_node_do_not_meet():
    jobs = [STEP | dict(SLURM_JOB_ID=str(j), SLURM_STEP_ID=str(s)) for j in range(100, 140) for s in range(5)]
    ports = {slurm_variables(job)['MASTER_PORT'] for job in jobs}
    assert len(ports) == 200


def test_one_process_is_trivial():
    code = ("import sys; from caption_nb.ranks import *; assert 'torch' not in sys.modules; r = Ranks(); x = object(); "
            "assert r.sum_(x) is x and r.gather(x) == [x] and r.share(x) is x and r.main; r.barrier(); r.leave(); assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, '-c', code], check=True)


def test_devices(monkeypatch):
    with pytest.raises(ValueError, match="device='tpu' cannot be used here"): Ranks.join('tpu')
    for name, value in dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0').items(): monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="device='cuda:1' and several ranks"): Ranks.join('cuda:1')


def test_count_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert count_ranks(0) == 1 and count_ranks(3) == 3
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert count_ranks(0) == 2 and count_ranks(1) == 1 and count_ranks(0, 'cpu') == 1 and count_ranks(4, 'cpu') == 4
    with pytest.raises(ValueError, match='ranks=3, but this machine has 2 GPUs'): count_ranks(3)
    monkeypatch.setattr(module, 'slurm_tasks', lambda: 8)
    assert count_ranks(0) == 8 and count_ranks(3) == 3
    with pytest.raises(ValueError, match='--ntasks=9'): count_ranks(9)


def test_srun_is_used_in_an_allocation_of_several_tasks(monkeypatch, tmp_path):
    assert slurm_tasks(BATCH) == 1 or module.shutil.which('srun')
    (tmp_path/'srun').touch(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    assert slurm_tasks(BATCH) == 2 and slurm_tasks({}) == 1 and slurm_tasks(BATCH | dict(SLURM_NTASKS='1')) == 1
    command = rank_command(2, ['-m', 'x'], 2, BATCH | dict(SLURM_CPUS_PER_TASK='4'))
    assert command[0] == 'srun'
    assert {'--ntasks=2', '--kill-on-bad-exit=1', '--cpus-per-task=4'} < set(command) and '--overlap' not in command
    assert '--overlap' in rank_command(2, ['-m', 'x'], 2, STEP)
    with pytest.raises(ValueError, match='--ntasks=3'): rank_command(3, ['-m', 'x'], 2, BATCH)


# ---- two ranks = one --------------------------------------------------------------------------------------------

SETUP = dedent("""
    import torch
    from torch import nn

    def network(dtype):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None),
                             nn.Flatten(), nn.Linear(16, 2)).to(dtype)

    def photos(dtype, n=7):
        torch.manual_seed(1)
        return 3*torch.randn(n, 3, 6, 6, dtype=dtype) + torch.arange(float(n)).to(dtype)[:, None, None, None]

    def loss_of(outputs): return outputs.square().sum()
""")
CHECKS = """
    import torch
    from caption_nb.ranks import Ranks, sum_gradients, sync_batchnorm
    ranks = Ranks.join('cpu')
    assert os.environ['GLOO_SOCKET_IFNAME'].startswith('lo')
    out = dict(ranks=(ranks.rank, ranks.size, ranks.local, str(ranks.device), ranks.main))
    out['sum'] = ranks.sum_(torch.tensor([1., 10.])*(rank + 1))
    out['gather'] = ranks.gather({'rank': rank, 'long': 'x'*10000*(rank + 1)})
    out['share'] = ranks.share(f'from {rank}')
    if rank == 0: time.sleep(0.5)
    before = time.time()
    ranks.barrier()
    out['barrier'] = ranks.gather((before, time.time()))

    # gradients that are there on one rank, on both, on none; types; buckets of 7 numbers
    torch.manual_seed(rank)
    shapes = [(3, 4), (5,), (), (2, 2), (6,), (3,)]
    types = [torch.float32]*3 + [torch.float64]*2 + [torch.bfloat16]
    ps = [nn.Parameter(torch.zeros(s, dtype=t)) for s, t in zip(shapes, types)] + [nn.Parameter(torch.zeros(9), requires_grad=False)]
    for i, p in enumerate(ps[:6]):
        if i not in (1, 4) or (i == 1 and rank == 1): p.grad = torch.randn(p.shape).to(p.dtype)
    mine = [None if p.grad is None else p.grad.clone() for p in ps]
    sums = sum_gradients(ps, ranks, torch.tensor([1e9 + rank, 0.1]), bucket=7)
    out['gradients'] = dict(mine=ranks.gather(mine), found=[p.grad for p in ps], sums=sums, exact=torch.tensor([1e9 + rank, .1]).double())

    for dtype in (torch.float32, torch.float64):
        for name, shares in dict(uneven=[5, 2], empty=[0, 7], equal=[4, 3]).items():
            net, x = network(dtype), photos(dtype)
            names = list(net.state_dict())
            assert sync_batchnorm(net, ranks) is net and list(net.state_dict()) == names
            share = x.split(shares)[rank].requires_grad_()
            for step in range(2):
                net.zero_grad()
                outputs = net(share)
                loss = loss_of(outputs)
                (loss/len(x)).backward()
                total = sum_gradients(net.parameters(), ranks, loss.detach()[None])
            out[name, dtype] = dict(outputs=torch.cat(ranks.gather(outputs.detach())), inputs=torch.cat(ranks.gather(share.grad)),
                                    loss=total.item()/len(x), gradients=[p.grad for p in net.parameters()], state=net.state_dict(),
                                    eval=net.eval()(x).detach())
    torch.save(out, run/f'out-{rank}.pt')
    with open(run/'metrics.jsonl', 'a') as f:
        if rank == 0: f.write('{"step": 1}\\n{"step": 2}\\n{"unfini')
    ranks.leave()
    assert not torch.distributed.is_initialized()
"""


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "What two real ranks found, and the lines their driver saw"
    run, lines = tmp_path_factory.mktemp('pair'), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('OMP_NUM_THREADS', '1')
        (run/'metrics.jsonl').write_text('{"step": 0}\n')
        launch(run, 2, lines.append, program=script(run, SETUP + dedent(CHECKS)))
    return [torch.load(run/f'out-{r}.pt', weights_only=False) for r in (0, 1)], lines, run


def test_ranks_know_themselves(pair):
    assert [o['ranks'] for o in pair[0]] == [(0, 2, 0, 'cpu', True), (1, 2, 1, 'cpu', False)]


def test_collectives(pair):
    for out in pair[0]:
        assert out['sum'].tolist() == [3, 30]
        assert out['gather'] == [{'rank': r, 'long': 'x'*10000*(r + 1)} for r in (0, 1)]
        assert out['share'] == 'from 0'
        assert min(after for _, after in out['barrier']) >= max(before for before, _ in out['barrier'])


def test_gradients_are_added(pair):
    for out in pair[0]:
        g = out['gradients']
        for i, found in enumerate(g['found']):
            mine = [m[i] for m in g['mine']]
            if all(m is None for m in mine): assert found is None, i
            else:
                exact = sum(m.to(torch.promote_types(m.dtype, torch.float32)) for m in mine if m is not None)
                assert torch.equal(found, exact.to(found.dtype)), i
        assert [f is None for f in g['found']] == [False, False, False, False, True, False, True]
        assert g['sums'].dtype == torch.float64
        assert g['sums'][1].item() == 2*torch.tensor(.1).double().item()


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=['float32', 'float64'])
@pytest.mark.parametrize('shares', ['uneven', 'empty', 'equal'])
def test_batchnorm_is_global(pair, shares, dtype, tolerance):
    space = {}
    exec(SETUP, space)
    net, x = space['network'](dtype), space['photos'](dtype).requires_grad_()
    for step in range(2):
        net.zero_grad()
        x.grad = None
        outputs = net(x)
        (space['loss_of'](outputs)/len(x)).backward()
    def same(ours, theirs): assert (ours - theirs).abs().max() <= tolerance*max(1., theirs.abs().max().item())
    for out in pair[0]:
        found = out[shares, dtype]
        same(found['outputs'], outputs.detach())
        assert abs(found['loss'] - space['loss_of'](outputs).item()/len(x)) <= tolerance*found['loss']
        for ours, p in zip(found['gradients'], net.parameters()): same(ours, p.grad)
        for name, value in net.state_dict().items(): same(found['state'][name], value)
    same(pair[0][1][shares, dtype]['eval'], copy.deepcopy(net).eval()(x).detach())
    assert all(torch.equal(a, b) for a, b in zip(*(o[shares, dtype]['state'].values() for o in pair[0]))), 'the same bits on every rank'


def test_input_gradients_are_global(pair):
    space = {}
    exec(SETUP, space)
    net, x = space['network'](torch.float64), space['photos'](torch.float64).requires_grad_()
    for step in range(2): (space['loss_of'](net(x))/len(x)).backward()
    assert torch.allclose(pair[0][0]['uneven', torch.float64]['inputs'], x.grad, rtol=0, atol=1e-12)


def test_driver_sees_new_complete_lines(pair): assert pair[1] == [{'step': 1}, {'step': 2}]


def test_logs_and_notes_are_left(pair):
    run = pair[2]
    notes = [json.loads((run/'ranks'/'attempt-1'/f'rank-{r}.json').read_text()) for r in (0, 1)]
    assert [(n['rank'], n['state'], n['error']) for n in notes] == [(0, 'done', ''), (1, 'done', '')]
    assert (run/'ranks'/'attempt-1'/'rank-1.log').exists() and not (run/'STOP').exists()


def test_synced_model_can_be_copied_and_sent():
    net = sync_batchnorm(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)), Ranks(0, 2))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert twin[0].forward.args[0] is twin[0] and list(twin.state_dict()) == list(net.state_dict())
    assert twin.eval()(torch.ones(1, 2, 1, 1)).shape == (1, 1, 1, 1)   # nobody else is asked in evaluation


@pytest.mark.parametrize('kind, shape', [(nn.BatchNorm1d, (6, 3)), (nn.BatchNorm2d, (4, 3, 2, 2)), (nn.BatchNorm3d, (4, 3, 2, 2, 2))])
@pytest.mark.parametrize('options', [{}, dict(affine=False), dict(track_running_stats=False), dict(momentum=None)], ids=str)
def test_batch_norm_of_one_rank_is_torchs(kind, shape, options):
    theirs, x = kind(3, **options).double(), torch.randn(shape, dtype=torch.float64) + 5
    ours = copy.deepcopy(theirs)
    for train in (True, True, False):
        theirs.train(train), ours.train(train)
        assert torch.allclose(module.batch_norm(ours, Ranks(), x), theirs(x), rtol=0, atol=1e-12)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()): assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_batch_norm_keeps_the_type():
    assert module.batch_norm(nn.BatchNorm2d(3), Ranks(), torch.randn(2, 3, 2, 2).bfloat16()).dtype == torch.bfloat16


def test_buckets():
    sizes = ((3, torch.float32), (3, torch.float32), (9, torch.float32), (1, torch.float64), (1, torch.float64))
    ps = [nn.Parameter(torch.zeros(n, dtype=t)) for n, t in sizes]
    assert [[p.numel() for p in group] for group in buckets(ps, 6)] == [[3, 3], [9], [1, 1]]
    assert list(buckets([], 6)) == []


# ---- the driver -------------------------------------------------------------------------------------------------

def test_tail(tmp_path):
    file, lines = tmp_path/'metrics.jsonl', [f'{{"step": {i}}}' for i in range(50)]
    tail = Tail(file)
    assert tail() == []
    file.write_text('\n'.join(lines[:10]) + '\n{"st')
    assert tail() == lines[:10] and tail() == []
    assert Tail(file)() == []                              # what is there already is not new
    file.write_text('\n'.join(lines[:8]) + '\n')           # cut in place …
    with open(file, 'a') as f: f.write('\n'.join(lines[10:20]) + '\n')   # … and longer again before anyone looked
    assert tail() == lines[10:20]
    (tmp_path/'new').write_text('\n'.join(lines[:9]) + '\n')
    os.replace(tmp_path/'new', file)
    assert tail() == lines[8:9]
    file.unlink()
    assert tail() == []


def test_failure_is_the_ranks_own(run):
    with pytest.raises(RankError) as e:
        launch(run, 2, program=script(run, """
            print('before the end', flush=True)
            if rank == 1: time.sleep(0.5); raise OSError('no space left on device')
            time.sleep(100)
        """))
    assert e.value.rank == 1 and 'OSError: no space left on device' in e.value.message and 'runpy' not in e.value.message
    assert str(run/'ranks'/'attempt-1'/'rank-1.log') in str(e.value)
    assert 'before the end' in (run/'ranks'/'attempt-1'/'rank-1.log').read_text()
    assert not ranks_of(run)
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)


@linux
def test_killed_rank_takes_the_run_down(run, record_property):
    "Rank 1 is killed while rank 0 waits for it in an all-reduce; rank 0's broken connection is not what is reported"
    killed = []
    def kill(line):
        os.kill(line['pid'], signal.SIGKILL)
        killed.append(time.monotonic())
    with pytest.raises(RankError) as e:
        launch(run, 2, kill, program=script(run, """
            import torch
            from caption_nb.ranks import Ranks
            ranks = Ranks.join('cpu')
            ranks.barrier()
            if rank == 1:
                print('alive', flush=True)
                (run/'metrics.jsonl').write_text(json.dumps(dict(pid=os.getpid())) + '\\n')
                time.sleep(100)
            ranks.sum_(torch.ones(1))
        """))
    seconds = time.monotonic() - killed[0]
    record_property('seconds', seconds)
    print(f'{seconds:.1f} s from the kill to RankError')
    assert e.value.rank == 1 and 'signal 9' in e.value.message and 'alive' in e.value.message
    assert seconds < 15 and not ranks_of(run)


def test_stubborn_rank_is_killed(run):
    "A rank that ignores what can be ignored does not survive the failure of another"
    with pytest.raises(RankError, match='exit code 3') as e:
        launch(run, 2, program=script(run, """
            if rank == 1: sys.exit(3)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                try: time.sleep(100)
                except BaseException: pass
        """))
    assert e.value.rank == 1 and not ranks_of(run)


def test_program_that_cannot_start(run):
    with pytest.raises(RankError, match='No module named') as e: launch(run, 1, program=['-m', 'no_such_module'])
    assert e.value.rank == 0


def test_stop_ends_with_a_checkpoint(run):
    (run/'STOP').touch()   # of an earlier attempt: it does not count
    program = script(run, """
        (run/f'here-{rank}').touch()
        while not (run/'STOP').exists(): time.sleep(0.05)
        time.sleep(rank)   # torchrun must not end the slower one
        (run/f'checkpoint-{rank}').touch()
        sys.exit(85)
    """)
    with pytest.raises(Stopped): launch(run, 2, stop=lambda: (run/'here-0').exists() and (run/'here-1').exists(), program=program)
    assert (run/'checkpoint-0').exists() and (run/'checkpoint-1').exists() and not (run/'STOP').exists()


def test_rank_that_does_not_stop_is_killed(run):
    with pytest.raises(RankError, match='terminated'):
        launch(run, 1, stop=(run/'here').exists, grace=1., program=script(run, "(run/'here').touch(); time.sleep(100)"))
    assert not ranks_of(run)


DRIVER = "import sys; from caption_nb.ranks import launch; launch(sys.argv[1], 2, program=sys.argv[2:], grace=10.)"
PATIENT = """
    (run/f'here-{rank}').touch()
    while not (run/'STOP').exists(): time.sleep(0.05)
    (run/f'checkpoint-{rank}').touch()
    sys.exit(85)
"""


def driver(run: Path, text: str) -> subprocess.Popen:
    "A driver in a process of its own, once its two ranks are at work"
    process = subprocess.Popen([sys.executable, '-c', DRIVER, str(run), *script(run, text)], stderr=subprocess.PIPE, text=True)
    until(lambda: (run/'here-0').exists() and (run/'here-1').exists())
    return process


@linux
def test_interrupt_lets_the_ranks_checkpoint(run):
    process = driver(run, PATIENT)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=30)[1]
    assert error.rstrip().endswith('KeyboardInterrupt') and 'RankError' not in error
    assert (run/'checkpoint-0').exists() and (run/'checkpoint-1').exists() and not (run/'STOP').exists()
    assert not ranks_of(run)


@linux
def test_death_of_the_driver_stops_the_ranks(run):
    process = driver(run, PATIENT)
    process.kill()
    process.communicate()
    until(lambda: not ranks_of(run), 15)
    assert (run/'checkpoint-0').exists() and (run/'checkpoint-1').exists()


@linux
def test_death_of_the_launcher(run):
    "torchrun itself is killed: its ranks do not stay"
    pids = []
    original = Attempt.__init__
    def remember(self, *args):
        original(self, *args)
        pids.append(self.process.pid)
    def kill():
        if (run/'here-0').exists() and pids: os.kill(pids.pop(), signal.SIGKILL)
        return False
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RankError) as e:
        patch.setattr(Attempt, '__init__', remember)
        launch(run, 1, stop=kill, program=script(run, "(run/'here-0').touch(); time.sleep(100)"))
    assert e.value.rank is None and 'exit code -9' in str(e.value) and not ranks_of(run)


def test_a_bug_in_the_callback_stops_the_ranks(run):
    def bug(line): raise ZeroDivisionError('in the drawing')
    with pytest.raises(ZeroDivisionError, match='in the drawing'):
        launch(run, 1, bug, program=script(run, "(run/'metrics.jsonl').write_text('{}\\n')\n" + dedent(PATIENT)))
    assert (run/'checkpoint-0').exists() and not ranks_of(run)


def test_four_launches_at_once(tmp_path):
    failed = []
    def one(k):
        run = tmp_path/f'run-{k}'
        run.mkdir()
        program = script(run, """
            from caption_nb.ranks import Ranks
            ranks = Ranks.join("cpu") if os.environ["WORLD_SIZE"] == "2" else Ranks()   # alone without torch: faster
            (run/f'sum-{rank}').write_text(str(sum(ranks.gather(int(sys.argv[2])*(rank + 1)))))
        """)
        try:
            launch(run, size := 2 if k < 2 else 1, program=[*program, str(k)])
            assert [(run/f'sum-{r}').read_text() for r in range(size)] == [str(3*k if size == 2 else k)]*size
        except BaseException as e: failed.append(e)
    threads = [threading.Thread(target=one, args=(k,)) for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not failed
