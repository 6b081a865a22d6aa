"""Train tiny runs, kill them at random moments, resume them, and compare the end, bit for bit, with runs that nobody killed.

    python -m tests.faults --kills 20 --seed 1             # one process a run
    python -m tests.faults --kills 20 --seed 1 --ranks 2   # two processes a run, on gloo

prints what was hit, and by what. `tests/test_faults.py` does the same with fewer kills."""
import argparse
import contextlib
import functools
import hashlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from caption_nb.basics import read_json_lines
from caption_nb.checkpoints import checkpoint_step, generations, verify
from caption_nb.config import Config
from caption_nb.ranks import STOPPED

TIMES = {'seconds', 'captions_per_second', 'eval_seconds', 'memory_MB'}   # of a line of metrics.jsonl: never twice the same
PHASES = ('starting', 'resuming', 'training', 'evaluation', 'results')
TARGETS = ('starting', 'resuming', 'training', 'evaluation', 'checkpoint')
SIGNALS = dict(KILL=signal.SIGKILL, TERM=signal.SIGTERM, INT=signal.SIGINT, USR2=getattr(signal, 'SIGUSR2', None))


# ---- what is trained --------------------------------------------------------------------------------------------

def joint(cache: Path, **changes) -> Config:
    "All that draws random numbers or counts; of 33 train scenes in batches of 4, the last batch has one, and the last step one batch"
    return Config.from_dict(dict(
        encoder='scene_cnn', num_images=41, image_size=64, min_freq=1, flip=True, crop=0.2, colour=0.2, embed_dim=32, hidden_dim=32,
        attention_dim=16, dropout=0.2, feature_dropout=0.1, sampling_ratio=0.3, ema=0.9, accumulate=2, images_per_batch=4,
        captions_per_image=2, epochs=4, lr=5e-3, warmup_steps=4, log_every=3, dev_loss=True, max_len=12, beam=2, precision='fp32',
        threads=1, device='cpu', save_minutes=0.004, keep_last=2, cache_dir=str(cache)) | changes)


def scenarios(cache: Path, taught: Path) -> dict[str, Config]:
    "What is killed; `taught` is a run that self-critical training starts from"
    small = dict(encoder='mobilenetv2_050', encoder_weights='random', finetune_from=3, encoder_start=1, image_store=str(cache/'photos.h5'))
    return {'joint': joint(cache),
            'fp16': joint(cache, precision='fp16', schedule='plateau', plateau_patience=0, sampling_schedule='sigmoid'),
            'scst': joint(cache, stage='scst', from_run=str(taught), sampling_ratio=0., feature_dropout=0., scst_samples=3, epochs=2),
            'fine-tuning': joint(cache, **small, epochs=3, optimizer='lion', monitor='loss', decoder='transformer', heads=2, ffn_dim=32,
                                 num_layers=1, attention_dim=512)}


# ---- where a trainer is -----------------------------------------------------------------------------------------

class Phases:
    "What a trainer does right now, in memory that it shares with who watches it, and that outlives it"
    names = ('phase', 'writing', 'written', 'step', 'begun', 'target', 'more', 'here')
    phase, writing, written, step, begun, target, more, here = (property(lambda self, i=i: self.get(i)) for i in range(8))

    def __init__(self, path: Path, new: bool = True):
        if new: path.write_bytes(struct.pack('8i', 0, 0, 0, 0, -1, -1, 0, 0))
        with open(path, 'r+b') as f: self.memory = mmap.mmap(f.fileno(), 32)

    def get(self, place: int) -> int: return struct.unpack_from('i', self.memory, 4*place)[0]
    def put(self, **values: int):
        for name, value in values.items(): struct.pack_into('i', self.memory, 4*self.names.index(name), value)
    def __str__(self) -> str: return PHASES[self.phase] + ' + checkpoint'*self.writing

    def there(self) -> bool:
        "Is the moment there that we are asked for?"
        what = TARGETS[self.target]
        if what == 'checkpoint': return self.writing and self.written >= self.more//3
        return PHASES[self.phase] == what and (what != 'training' or self.step >= self.begun + self.more)

    def enter(self, **values: int):
        "Something begins; at the moment asked for, wait until that was seen: on a busy machine it may take longer than the moment"
        self.put(**values)
        if self.target < 0 or self.here or not self.there(): return
        self.put(here=1)
        end = time.monotonic() + 60
        while self.here == 1 and time.monotonic() < end: time.sleep(0.0005)

    def follow(self):
        "Have the trainer of this process say where it is"
        from caption_nb import checkpoints, training
        Trainer, whole = training.Trainer, checkpoints.write_checkpoint
        def during(name: str, before: Callable, after: Callable):
            real = getattr(Trainer, name)
            @functools.wraps(real)
            def step(trainer, *args, **kwargs):
                self.enter(phase=before(trainer))
                done = real(trainer, *args, **kwargs)
                after(trainer)
                return done
            setattr(Trainer, name, step)
        during('prepare', lambda t: int(bool(generations(t.checkpoints/'last'))), lambda t: self.put(begun=t.step, step=t.step))
        during('train_step', lambda t: 2, lambda t: self.put(step=t.step))
        during('_score_dev', lambda t: 3, lambda t: self.put(phase=2))
        during('evaluate', lambda t: 4, lambda t: None)
        def write(*args, **kwargs):
            self.enter(writing=1)
            try: return whole(*args, **kwargs)
            finally: self.put(writing=0, written=self.written + 1)
        checkpoints.write_checkpoint = write


# ---- a trainer in a fraction of a second ------------------------------------------------------------------------

def serve():
    "Fork the trainers of a run for each line on standard input; say their pids, and later how they ended"
    import accelerate, torch._dynamo, PIL.Image   # what a trainer imports late  # noqa: E401, F401
    from caption_nb import encoders, training   # noqa: F401
    PIL.Image.init()
    encoders.import_timm()
    print('ready', flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pids = [_fork(job, env, phases) for env, phases in zip(job['environ'], job['phases'])]
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


def _fork(job: dict, environ: dict, phases: str) -> int:
    if pid := os.fork(): return pid
    code = 1
    try:
        os.environ.update(environ)
        log = os.open(job['log'], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for fd, mine in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)): os.dup2(fd, mine)
        Phases(Path(phases), new=False).follow()
        from caption_nb.training import main
        code = main([job['run']])
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


class Server:
    "A process that has imported everything and forks trainers"
    def __enter__(self):
        env = {n: v for n, v in os.environ.items() if not n.startswith('SLURM_') and n not in ('RANK', 'WORLD_SIZE')}
        self.process = subprocess.Popen([sys.executable, __file__, '--serve'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=env | dict(OMP_NUM_THREADS='1'), start_new_session=True)
        assert self.process.stdout.readline() == 'ready\n', 'the fork server did not start'
        return self

    def __exit__(self, kind, *_):
        if kind: os.killpg(self.process.pid, signal.SIGKILL)   # with all trainers
        self.process.stdin.close()
        self.process.wait(60)


class Forked:
    "The trainers of one run, one a rank"
    def __init__(self, server: Server, run: Path, ranks: int = 1,
                 rank: int = 0, target: int = -1, more: int = 0): # Where a rank shall wait for us
        self.server, self.run, self.codes = server, run, None
        paths = [run.with_name(f'{run.name}.phases-{r}') for r in range(ranks)]
        self.phases = [Phases(p) for p in paths]
        self.phases[rank].put(target=target, more=more)
        group = dict(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
        environ = [dict(group, RANK=str(r), LOCAL_RANK=str(r)) if ranks > 1 else {} for r in range(ranks)]
        job = dict(run=str(run), log=str(run.with_name(f'{run.name}.log')), environ=environ, phases=list(map(str, paths)))
        print(json.dumps(job), file=server.process.stdin, flush=True)
        self.pids = json.loads(server.process.stdout.readline())

    def alive(self) -> bool: return any(_alive(pid) for pid in self.pids)

    def send(self, number: int, rank: int = 0):
        with contextlib.suppress(ProcessLookupError): os.kill(self.pids[rank], number)

    def wait(self) -> list[int]: # Exit codes
        if self.codes is None: self.codes = json.loads(self.server.process.stdout.readline())
        return self.codes


class Started:
    "A trainer as anybody starts it: `python -m caption_nb.training RUN`; where it is can only be seen from its files"
    phases = ()

    def __init__(self, run: Path):
        self.run = run
        with open(run.with_name(f'{run.name}.log'), 'ab') as log:
            self.process = subprocess.Popen([sys.executable, '-m', 'caption_nb.training', str(run)], stdout=log, stderr=log,
                                            env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def alive(self) -> bool: return self.process.poll() is None
    def send(self, number: int): self.process.send_signal(number)
    def wait(self) -> list[int]: return [self.process.wait()]


def _alive(pid: int) -> bool:
    "Does `pid` still run? A zombie does not"
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError): return False


def free_port() -> int:
    "A port that is free, below those that systems give away"
    while True:
        port = random.SystemRandom().randrange(12000, 32000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(('127.0.0.1', port))
            return port


# ---- what was learnt --------------------------------------------------------------------------------------------

def sha256(path: Path) -> str: return hashlib.sha256(path.read_bytes()).hexdigest()


def lines(run: Path) -> list[dict]:
    "metrics.jsonl without what no two runs share"
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_json_lines(run/'metrics.jsonl')]


def state(run: Path) -> dict:
    "What training.pt holds, without times"
    found = torch.load(run/'checkpoints'/'last'/'training.pt', weights_only=True)
    return {k: v for k, v in found.items() if k not in ('seconds', 'meter', 'history', 'window')}


def unlike(a, b, name: str = '') -> list[str]:
    "Where the trees `a` and `b` differ, down to the bit"
    if type(a) is not type(b): return [f'{name}: {type(a).__name__} and {type(b).__name__}']
    if isinstance(a, dict):
        if a.keys() != b.keys(): return [f'{name}: {sorted(map(str, a.keys() ^ b.keys()))} only in one']
        return [d for k in a for d in unlike(a[k], b[k], f'{name}.{k}')]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b): return [f'{name}: {len(a)} and {len(b)} long']
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in unlike(x, y, f'{name}[{i}]')]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [f'{name}: {a!r:.60} and {b!r:.60}']


def differences(run: Path, whole: Path) -> list[str]:
    "In what the finished `run` differs from the uninterrupted `whole`; nothing is expected"
    weights = [f'checkpoints/{name}/model.safetensors' for name in ('last', 'best')]
    files = [f'{f}: another SHA-256' for f in (*weights, 'captions_dev.json', 'config.json') if sha256(run/f) != sha256(whole/f)]
    mine, theirs = lines(run), lines(whole)
    steps = [r['step'] for r in mine if 'dev' not in r]
    if steps != sorted(set(steps)): files.append(f'metrics.jsonl: steps {steps}')
    results = [{k: v for k, v in json.loads((r/'results.json').read_text())['dev'].items() if 'second' not in k} for r in (run, whole)]
    files += unlike(mine, theirs, 'metrics.jsonl')
    return files + unlike(state(run), state(whole), 'training.pt') + unlike(*results, 'results.json')


# ---- kills ------------------------------------------------------------------------------------------------------

@dataclass
class Kill:
    "One row of the table"
    run: str    # Scenario
    how: str    # What was sent: KILL, TERM, INT, USR2, STOP; to which rank
    phase: str  # What it hit
    begun: int  # Step at which this attempt took up the run; -1: it had not yet
    step: int   # Steps done when it was hit
    code: str   # Exit codes; '' if it goes on
    seconds: float # From the signal to the end


def table(kills: list[Kill]) -> str:
    rows = [('', 'run', 'how', 'phase', 'from', 'step', 'exit', 'within')]
    rows += [(str(i), k.run, k.how, k.phase, '' if k.begun < 0 else str(k.begun), '' if k.step < 0 else str(k.step), k.code or 'goes on',
              f'{k.seconds:.1f} s' if k.code else '') for i, k in enumerate(kills, 1)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


class Torturer:
    "Kills runs, resumes them, and compares what comes out"
    suits = ['KILL']*6 + ['TERM', 'INT', 'STOP', 'USR2']

    def __init__(self, server: Server, folder: Path, seed: int, ranks: int = 1):
        self.server, self.folder, self.ranks, self.rng, self.kills = server, folder, ranks, random.Random(seed), []
        self.hit, self.deck = Counter(), []   # target → how often; what is sent next

    def train(self, config: Config, name: str) -> Path: # The run folder
        "Train without any kill"
        run = self.new(config, name)
        attempt = Forked(self.server, run, self.ranks)
        assert attempt.wait() == [0]*self.ranks, self.log(run)
        return run

    def new(self, config: Config, name: str) -> Path:
        run = self.folder/name
        run.mkdir(parents=True)
        (run/'config.json').write_text(config.to_json())
        return run

    def log(self, run: Path) -> str: return run.with_name(f'{run.name}.log').read_text()[-3000:]

    def torture(self, name: str, config: Config, kills: int, real: int = 0):
        "Kill runs of `config`, `real` of the `kills` times as started by hand; then let them finish and compare"
        whole, start, rounds = self.train(config, f'{name}-whole'), len(self.kills), 0
        while (done := len(self.kills) - start) < kills or not rounds:
            rounds += 1
            run = self.new(config, f'{name}-{rounds}')
            self.one_run(name, run, kills - done, real)
            real = 0
            faults = differences(run, whole)
            assert not faults, f'{run} differs from {whole}:\n' + '\n'.join(faults[:20]) + '\n' + table(self.kills)
            assert 'damaged' not in self.log(run), self.log(run)

    def one_run(self, name: str, run: Path, kills: int, real: int):
        "From nothing to the end, with at most so many kills"
        reached = -1   # where attempts took up the run: that never goes back
        goal = len(self.kills) + kills
        while len(self.kills) < goal:
            if real: attempt, kill = self.strike_started(name, run)
            else: attempt, kill = self.strike(name, run)
            real -= real > 0
            if kill: self.kills.append(kill)
            begun = kill.begun if kill else attempt.phases[0].begun
            assert begun < 0 or begun >= reached, f'went back from step {reached} to {begun}\n{table(self.kills)}'
            reached = max(reached, begun)
            if not kill: break   # it was done before anything hit it
        else: self.ended(Forked(self.server, run, self.ranks))

    def strike(self, name: str, run: Path) -> tuple[Forked, Kill | None]:
        "Start, wait for a moment, hit"
        rng, fresh, rank = self.rng, not generations(run/'checkpoints'/'last'), self.rng.randrange(self.ranks)
        possible = [t for t in TARGETS if t != ('resuming' if fresh else 'starting') and (rank == 0 or t != 'checkpoint')]   # rank 0 writes
        target = min(possible, key=lambda t: (self.hit[t], rng.random()))
        attempt = Forked(self.server, run, self.ranks, rank, TARGETS.index(target), rng.randint(1, 6//self.ranks))
        phases, wait = attempt.phases[rank], dict(training=.1, checkpoint=.02, evaluation=.1).get(target, .15)*rng.random()
        if not self.until(attempt, lambda: phases.here or PHASES[phases.phase] == 'results'): return attempt, self.ended(attempt)
        phases.put(here=2)
        time.sleep(wait)
        how = self.draw(target)
        seen, step, written = str(phases), phases.step, attempt.phases[0].written
        if not attempt.alive() or seen.startswith('results'): return attempt, self.ended(attempt)
        if how == 'STOP': (run/'STOP').touch()
        else: attempt.send(SIGNALS[how], rank)
        hit = time.monotonic()
        self.hit['checkpoint' if '+' in seen else seen] += 1
        which = f'{how} to rank {rank}' if self.ranks > 1 and how != 'STOP' else how
        if how == 'USR2':   # it writes a checkpoint and goes on; then it is hit in earnest
            self.until(attempt, lambda: attempt.phases[0].written > written)
            assert attempt.phases[0].written > written, f'SIGUSR2 wrote nothing\n{self.log(run)}'
            self.kills.append(Kill(name, which, seen, phases.begun, step, '', 0.))
            time.sleep(0.1*rng.random())
            which, seen, step, how, hit = which.replace('USR2', 'KILL after it'), str(phases), phases.step, 'KILL', time.monotonic()
            attempt.send(signal.SIGKILL, rank)
        if self.ranks > 1: self.launcher(attempt, seen)
        codes = attempt.wait()
        seconds = time.monotonic() - hit
        if set(codes) == {0}: return attempt, None   # it came too late
        self.check_end(run, attempt, how, seen, codes)
        return attempt, Kill(name, which, seen, phases.begun, step, ' '.join(map(str, codes)), seconds)

    def draw(self, target: str) -> str:
        "What to send: from a deck, so that all of it comes"
        if len(self.deck) < 5: self.deck += self.rng.sample(self.suits, len(self.suits))
        early = target in ('starting', 'resuming')   # there nobody listens to some of them yet
        how = next(h for h in self.deck if not (early and h in ('STOP', 'USR2')))
        self.deck.remove(how)
        return how

    def until(self, attempt, condition: Callable[[], bool]) -> bool: # False: the attempt ended before
        end = time.monotonic() + 120
        while not condition():
            if not attempt.alive(): return False
            assert time.monotonic() < end, f'nothing within 2 minutes\n{self.log(attempt.run)}'
            time.sleep(0.001)
        return True

    def launcher(self, attempt: Forked, phase: str):
        "Do what torchrun does: a rank that waits for one that died before they met is ended"
        def gone(): return [not _alive(pid) for pid in attempt.pids]
        meeting, end = phase.startswith(('starting', 'resuming')), time.monotonic() + 60
        while not all(gone()):
            if meeting and any(gone()) and time.monotonic() > end - 57:
                for rank in range(self.ranks): attempt.send(signal.SIGKILL, rank)
            assert time.monotonic() < end, f'a rank outlived the other by a minute\n{self.log(attempt.run)}'
            time.sleep(0.01)

    def ended(self, attempt) -> None:
        codes = attempt.wait()
        assert codes == [0]*len(codes), f'exit codes {codes}\n{self.log(attempt.run)}'

    def check_end(self, run: Path, attempt: Forked, how: str, phase: str, codes: list[int]):
        "Was what happened to `run` what `how` asks for?"
        sound = [p for p in generations(run/'checkpoints'/'last') if not verify(p)]
        if how == 'KILL': assert -signal.SIGKILL in codes and 0 not in codes, f'exit codes {codes}\n{self.log(run)}'
        elif phase.startswith(('starting', 'resuming')): assert 0 not in codes, f'exit codes {codes}\n{self.log(run)}'
        elif set(codes) == {STOPPED}:   # not a step is lost
            assert checkpoint_step(sound[0]) == attempt.phases[0].step, f'stopped after step {attempt.phases[0].step}\n{self.log(run)}'
        else: assert PHASES[attempt.phases[0].phase] == 'results', f'exit codes {codes}\n{self.log(run)}'   # too late to stop

    def strike_started(self, name: str, run: Path) -> tuple[Started, Kill]:
        "As `strike`, of a trainer in a program of its own"
        last, metrics = run/'checkpoints'/'last'/'training.pt', run/'metrics.jsonl'
        def changed(p):
            try: return p.stat().st_mtime_ns
            except FileNotFoundError: return 0   # not yet there, or `last` is being exchanged just now
        def look(): return [changed(p) for p in (last, metrics)]
        def writes(): return any((run/'checkpoints').glob('.*.new'))
        before, attempt = look(), Started(run)
        moved = self.until(attempt, lambda: all(a != b for a, b in zip(before, look())))   # past its first checkpoint
        wait, how = time.monotonic() + self.rng.random()*0.5, self.rng.choice(['KILL', 'KILL', 'TERM'])
        self.until(attempt, lambda: time.monotonic() > wait and (how == 'TERM' or writes() or time.monotonic() > wait + 0.2))
        seen, hit = 'checkpoint' if writes() else 'training, evaluation', time.monotonic()
        attempt.send(SIGNALS[how])
        codes = attempt.wait()
        assert moved and codes[0] in (-signal.SIGKILL, STOPPED, 0), f'exit codes {codes}\n{self.log(run)}'
        return attempt, Kill(name, f'{how} to python -m', seen, -1, -1, str(codes[0]), time.monotonic() - hit)


def prepared(torturer: Torturer, cache: Path) -> dict[str, Config]:
    "All scenarios; and the run that one of them starts from"
    taught = torturer.train(joint(cache, epochs=2), 'taught')
    return scenarios(cache, taught)


def one_rank(folder: Path, seed: int, kills: int) -> list[Kill]:
    "Every scenario, one process a run"
    with Server() as server:
        torturer = Torturer(server, folder, seed)
        configs = prepared(torturer, folder/'cache')
        share = {name: kills//len(configs) for name in configs}
        share['joint'] += kills - sum(share.values())
        for name, config in configs.items(): torturer.torture(name, config, share[name], real=2 if name == 'joint' else 0)
    return torturer.kills


def two_ranks(folder: Path, seed: int, kills: int) -> list[Kill]:
    "The jointly trained one, as two ranks on gloo; two of the kills hit what `launch` started, the way a user's notebook does"
    with Server() as server:
        torturer = Torturer(server, folder, seed, ranks=2)
        config = joint(folder/'cache', images_per_batch=16, epochs=3, ranks=2)   # a step takes a hundred messages
        torturer.torture('joint', config, kills - 2)
        run = torturer.new(config, 'launched')
        hows = torturer.rng.sample(['KILL to a rank', 'KILL to the driver', 'TERM to the driver'], 2)
        torturer.kills += [launched(server, run, how) for how in hows]
        torturer.ended(Forked(server, run, 2))
        faults = differences(run, folder/'joint-whole')
        assert not faults, f'{run}:\n' + '\n'.join(faults[:20]) + '\n' + table(torturer.kills)
    return torturer.kills


def launched(server: Server, run: Path, how: str) -> Kill:
    "Let `launch` start two ranks, and hit one of them or its driver once they are past a step"
    driver, log, start = Forked(server, run), run.with_name(f'{run.name}.log'), len(read_json_lines(run/'metrics.jsonl'))
    def notes(): return [json.loads(p.read_text()) for p in attempt().glob('rank-*.json')]
    def attempt(): return max((run/'ranks').glob('attempt-*'), key=lambda p: p.stat().st_mtime)
    def trained(): return len(read_json_lines(run/'metrics.jsonl')) > start
    wait_for(lambda: trained() or not driver.alive(), log)
    assert trained(), log.read_text()[-3000:]
    pids = {n['rank']: n['pid'] for n in notes()}
    number, hit = SIGNALS[how.split()[0]], time.monotonic()
    if how.endswith('rank'): os.kill(pids[1], number)
    else: driver.send(number)
    codes = driver.wait()
    wait_for(lambda: not any(map(_alive, pids.values())), log)   # nothing may stay behind
    seconds, step = time.monotonic() - hit, checkpoint_step(run/'checkpoints'/'last')
    said = re.search('rank 1 failed.*killed by signal 9', log.read_text(), re.S)
    if how.endswith('rank'): assert codes == [1] and said, log.read_text()[-3000:]
    else: assert {n['state'] for n in notes()} == {'stopped'}, notes()   # without their driver they stop, with a checkpoint
    return Kill('launched', how, 'training', -1, step, ' '.join(map(str, codes)), seconds)


def wait_for(condition: Callable[[], bool], log: Path):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, f'nothing within 2 minutes\n{log.read_text()[-3000:]}'
        time.sleep(0.05)


def main():
    parser = argparse.ArgumentParser(prog='python -m tests.faults', description=__doc__.split('\n')[0])
    parser.add_argument('--kills', type=int, default=20, help='how many')
    parser.add_argument('--seed', type=int, default=int(time.time()), help='of their moments')
    parser.add_argument('--ranks', type=int, default=1, choices=(1, 2), help='processes that train together')
    parser.add_argument('--folder', type=Path, help='where the runs are left; default: a temporary folder, deleted at the end')
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix='faults-'))
    print(f'seed {args.seed}, runs in {folder}', flush=True)
    start = time.monotonic()
    kills = (one_rank if args.ranks == 1 else two_ranks)(folder, args.seed, args.kills)
    print(f'{table(kills)}\n{len(kills)} in {time.monotonic() - start:.0f} s; every run ended with the bits of the one that nobody killed')
    if not args.folder: shutil.rmtree(folder)


if __name__ == '__main__':
    if '--serve' in sys.argv: serve()
    else: main()
