"""Submit real runs to a real SLURM, hit each with a fault at a chosen moment, let it come to its end, and look at what is left.

    python -m tests.cluster_faults --faults 20 --seed 1

Each run is held at its moment until the fault has come (it says so itself, see `attend`), and it prints something every quarter
of a second, noting beside the run when. Afterwards: was every notebook readable whenever somebody looked? Was anything printed
more than 3 s before the end of an attempt and is not in its notebook? Are all attempts there, with the right reasons? And are the
weights, captions and scores those of a run that nothing hit, bit for bit? `tests/test_cluster_faults.py` does it with fewer faults."""
import argparse
import functools
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parent))   # for `python -m`, and in a kernel
from cluster import Cluster, kill, parent_of, until  # noqa: E402

MOMENTS = ('starting', 'training', 'evaluation', 'checkpoint', 'later cells')
OLDEST = 3.   # Seconds: no output older than that may be lost
ENDED = {'COMPLETED', 'CANCELLED', 'FAILED', 'TIMEOUT', 'NODE_FAIL', 'PREEMPTED', 'OUT_OF_MEMORY'}
PACE = 0.1    # Seconds that a training step takes longer here, so that there is something to hit


# ---- in the kernel of a run -------------------------------------------------------------------------------------

class Moment:
    "Four numbers in memory that a run shares with the campaign, and that outlive it"
    names = ('target', 'held', 'go', 'step')
    target, held, go, step = (property(lambda self, i=i: struct.unpack_from('i', self.memory, 4*i)[0]) for i in range(4))

    def __init__(self, path: Path, new: bool = False):
        if new: path.write_bytes(struct.pack('4i', -1, 0, 0, 0))
        with open(path, 'r+b') as f: self.memory = mmap.mmap(f.fileno(), 16)

    def put(self, **values: int):
        for name, value in values.items(): struct.pack_into('i', self.memory, 4*self.names.index(name), value)

    def reach(self, name: str):
        "The run is at the moment `name`: if that is the one, wait for the fault. An interrupt, the campaign's `go` or death end it"
        if self.target != MOMENTS.index(name) or self.held: return
        heard, before = [], signal.getsignal(signal.SIGINT)
        def arrived(number, frame):
            heard.append(number)
            signal.signal(number, before)
            if callable(before): before(number, frame)
        main = threading.current_thread() is threading.main_thread()   # checkpoints are written in another
        if main: signal.signal(signal.SIGINT, arrived)
        self.put(held=1)
        end = time.monotonic() + 600
        while not (heard or self.go) and time.monotonic() < end: time.sleep(0.01)
        if main and not heard: signal.signal(signal.SIGINT, before)

    def follow(self):
        "Have the run of this process say where it is"
        from caption_nb import captioner, checkpoints, training
        def before(owner, name: str, moment: str, when: Callable[..., bool] = lambda *_: True):
            real = getattr(owner, name)
            @functools.wraps(real)
            def wrapped(*args, **kwargs):
                if when(*args): self.reach(moment)
                return real(*args, **kwargs)
            setattr(owner, name, wrapped)
        def paced(trainer, *_):
            time.sleep(PACE)
            self.put(step=trainer.step)
            return trainer.step >= 7
        before(training.Trainer, 'prepare', 'starting')
        before(training.Trainer, 'train_step', 'training', paced)
        before(training.Trainer, '_score_dev', 'evaluation', lambda trainer, epoch: epoch >= 2)
        before(checkpoints, '_put', 'checkpoint',   # all files are written, and not yet in place
               lambda content, path: path.name == checkpoints.CHECKSUMS and path.parent.name == '.last.new' and self.step >= 7)
        before(captioner.Captioner, 'explain', 'later cells')


def attend():
    "Run by IPython at the start of a kernel: hold the run where the campaign wants it, and print ticks while a cell is running"
    from IPython import get_ipython
    folder = Path(os.environ['CAPTION_NB_FAULTS'])
    Moment(folder/'moment').follow()
    token, running, lock = f'{os.getpid()}-{time.time_ns()}', threading.Event(), threading.Lock()
    def tick():
        for n in range(1_000_000):
            running.wait()
            with lock:
                if not running.is_set(): continue
                print(f'tick {token} {n}', flush=True)
                said.write(f'{n} {time.time():.3f}\n')
                said.flush()
            time.sleep(0.25)
    def finished(*_):
        with lock: running.clear()
    said = open(folder/f'{token}.ticks', 'a')
    events = get_ipython().events
    events.register('pre_run_cell', lambda *_: running.set())
    events.register('post_run_cell', finished)
    threading.Thread(target=tick, daemon=True).start()


STARTUP = '''import sys
sys.path.append({folder!r})
from cluster_faults import attend
attend()
'''


# ---- what may happen --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Kind:
    "A fault"
    strike: Callable # Called with the case, whose run waits at its moment
    reasons: tuple[str, ...] # Of the attempts, but for the last, which is done
    again: bool = False # The run does not come back by itself: it has to be submitted again
    cut: bool = False # What writes the record is hit, so nothing that the kernel says afterwards is kept
    partition: str = 'debug'
    warns: bool | None = None # Only on a cluster with (without) preempt_send_user_signal
    profile: dict = field(default_factory=dict)
    others: tuple[str, ...] = ('starting', 'evaluation', 'checkpoint', 'later cells') # Moments besides training


def time_limit(case):
    "The limit is near, or over: SLURM looks every 30 s"
    case.slurm('scontrol', 'update', f'jobid={case.job}', 'timelimit=1')
    case.left(100)
    case.slurm('scontrol', 'update', f'jobid={case.job}', 'timelimit=20')


def preempt(case):
    "A job of a higher partition wants the node"
    case.cluster.sbatch('sleep 1', '--partition=high', '--exclusive', f'--nodelist={case.node}')
    case.left(150)


def kill_kernel(case): kill([case.kernel])


def kill_papermill(case):
    mine = {p for p, c in case.cluster.job_processes(case.job).items() if 'caption_nb.jobs' in c and 'python' in c.split()[0]}
    assert mine, f'no driver among {case.cluster.job_processes(case.job)}'
    kill(mine - {case.kernel})


def kill_everything(case):
    while found := case.cluster.job_processes(case.job): kill(found)


def restart_slurmd(case):
    case.cluster.kill_slurmd(case.node)
    time.sleep(1)
    case.cluster.start_slurmd(case.node)


def crash(case):
    case.cluster.crash(case.node)
    case.struck = time.time()
    case.cluster.start_slurmd(case.node)


def fill_disk(case):
    "Not a byte is left where the run lies, until the attempt has ended"
    with open(case.disk/'ballast', 'wb', buffering=0) as f:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while f.write(b'\0'*size): pass
            except OSError: pass
    case.struck = time.time()
    case.moment.put(go=1)
    until(lambda: case.state() in ENDED, 600, 'the end of a job whose disk is full', 0.5)
    (case.disk/'ballast').unlink()


def requeue(case): case.slurm('scontrol', 'requeue', case.job)


def requeue_twice(case):
    requeue(case)
    case.left(100)
    case.moment.put(held=0, go=0, target=MOMENTS.index('starting'))
    until(lambda: case.moment.held, 300, 'the second attempt', 0.1)
    requeue(case)


NO_CHECKPOINT = ('starting', 'evaluation', 'later cells')   # one does not wait for what takes long
KINDS = {
    'scancel': Kind(lambda case: case.slurm('scancel', case.job), ('cancelled',), again=True),
    'time limit, warned': Kind(time_limit, ('time limit',), profile=dict(warning=30), others=NO_CHECKPOINT),
    'time limit, no warning': Kind(time_limit, ('time limit',), profile=dict(warning=0), others=NO_CHECKPOINT),
    'preempted, warned': Kind(preempt, ('preempted',), partition='low', warns=True, others=NO_CHECKPOINT),
    'preempted, no warning': Kind(preempt, ('preempted',), partition='low', warns=False, others=NO_CHECKPOINT),
    'preempted, no grace': Kind(preempt, ('preempted',), partition='low0'),
    'scontrol requeue': Kind(requeue, ('requeued',)),
    'kernel killed': Kind(kill_kernel, ('kernel killed',)),
    'papermill killed': Kind(kill_papermill, ('papermill killed',), cut=True),
    'all of the job killed': Kind(kill_everything, ('papermill killed',), again=True, cut=True),
    'slurmd restarted': Kind(restart_slurmd, ()),
    'node crashed': Kind(crash, ('node failed',), cut=True),
    'disk full': Kind(fill_disk, ('error',), again=True, cut=True, others=('evaluation', 'later cells')),
    'requeued twice': Kind(requeue_twice, ('requeued', 'requeued')),
}


# ---- one run, and what happens to it ----------------------------------------------------------------------------

CONFIG = dict(encoder='scene_cnn', num_images=41, image_size=64, min_freq=1, flip=True, crop=0.2, embed_dim=32, hidden_dim=32,
              attention_dim=16, dropout=0.2, feature_dropout=0.1, sampling_ratio=0.3, ema=0.9, accumulate=2, images_per_batch=4,
              captions_per_image=2, epochs=3, lr=5e-3, warmup_steps=4, log_every=3, max_len=12, beam=2, precision='fp32', threads=1,
              device='cpu', save_minutes=0.01, keep_last=2)   # all that draws random numbers, within seconds


def toml(values: dict) -> str:
    def shown(v): return '{' + ', '.join(f'{k} = {shown(x)}' for k, x in v.items()) + '}' if isinstance(v, dict) else json.dumps(v)
    return ''.join(f'{k} = {shown(v)}\n' for k, v in values.items())


class Case:
    "A run on `cluster` that is hit by the fault `name` at `moment`; '' is a run that nothing hits"
    def __init__(self, folder: Path, cluster: Cluster, number: int, name: str, moment: str, wait: float = 0.):
        self.folder, self.cluster, self.number, self.name, self.at, self.wait = folder, cluster, number, name, moment, wait
        self.kind = KINDS.get(name, Kind(lambda case: None, ()))
        self.struck, self.seconds, self.lost, self.faults = 0., 0., 0., []
        self.reasons, self.unreadable = [], {}
        self.disk = folder/'runs'
        self.disk.mkdir(parents=True)
        self.moment = Moment(folder/'moment', new=True)
        if moment: self.moment.put(target=MOMENTS.index(moment))

    def __str__(self) -> str: return f'{self.name or "nothing"}, {self.at or "never"}: {", ".join(map(str, self.reasons)) or "no attempt"}'

    # ---- what the faults need

    def slurm(self, *command) -> str: return self.cluster.run(*command)
    def state(self) -> str: return self.cluster.state(self.job)

    @property
    def node(self) -> str: return self.cluster.info(self.job)['NodeList']

    @property
    def kernel(self) -> int: return int(max(self.folder.glob('*.ticks'), key=lambda p: p.stat().st_mtime).name.split('-')[0])

    def left(self, seconds: float):
        "Wait until this attempt is over"
        kernel = self.kernel
        until(lambda: not parent_of(kernel) and self.state() not in ('RUNNING', 'COMPLETING'), seconds,
              lambda: f'job {self.job} still {self.state()}, kernel {parent_of(kernel)}', 0.2)

    # ---- from nothing to the end

    def run(self):
        "Submit, hit, wait for the end, look at what is left"
        start = time.monotonic()
        full = self.kind.strike is fill_disk
        if full: subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64m', 'caption_nb', self.disk], check=True)
        try:
            self.write_files()
            flags = [f'--{name.replace("_", "-")}={value}' for name, value in CONFIG.items() if not isinstance(value, bool)]
            self.submit(*flags, '--flip', '--runs-dir=runs', f'--cache-dir={self.folder.parent/"cache"}')
            self.path, self.job = self.newest()
            if self.at: self.hit()
            self.finish()
            if full: self.bring_home()
            self.check()
        except Exception as e:
            self.faults.append(f'{type(e).__name__}: {e}')
            if os.environ.get('CAPTION_NB_DEBUG'): traceback.print_exc()
        finally:
            if full: subprocess.run(['umount', '-l', self.disk], check=False)
        self.seconds = time.monotonic() - start

    def write_files(self):
        startup = self.folder/'ipython'/'profile_default'/'startup'
        startup.mkdir(parents=True)
        (startup/'00-attend.py').write_text(STARTUP.format(folder=str(Path(__file__).parent)))
        env = dict(IPYTHONDIR=str(self.folder/'ipython'), CAPTION_NB_FAULTS=str(self.folder))
        profile = dict(partition=self.kind.partition, cpus=1, memory='1500M', time='0:20:00', warning=60, env=env)
        (self.folder/'profile.toml').write_text(toml(profile | self.kind.profile))

    def submit(self, *words: str):
        program, profile = Path(sys.executable).with_name('caption-nb'), self.folder/'profile.toml'
        command = [str(program), 'submit', 'train', *words, '--profile', str(profile)]
        env = {k: v for k, v in os.environ.items() if not k.startswith('SLURM')} | self.cluster.env
        done = subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f'submit: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'

    def newest(self) -> tuple[Path, int]: # Run folder, job
        "What was submitted last"
        run, = (p.parent for p in self.disk.glob('*/config.json'))
        return run, json.loads((run/'job'/'job.json').read_text())['jobs'][-1]['id']

    def hit(self):
        "Wait for the moment, and strike"
        def there():
            assert self.state() not in ENDED, f'the job ended before the moment {self.at}\n{self.log()}'
            return self.moment.held
        until(there, 300, lambda: f'{self.at}; step {self.moment.step}\n{self.log()}', 0.2)
        time.sleep(self.wait)
        self.struck = time.time()
        self.kind.strike(self)
        if not self.kind.reasons or self.at == 'checkpoint':   # it goes on; or waits in a thread, and hears nothing
            time.sleep(0.5)
            self.moment.put(go=1)

    def finish(self):
        "Wait for the end of the job; submit the run again where it does not come back by itself"
        self.await_end()
        if not self.kind.again: return
        job = self.cluster.info(self.job)
        if job['JobState'] == 'COMPLETED' or job['Restarts'] != '0':
            self.faults.append(f'job {self.job} was {job["JobState"]} after {job["Restarts"]} restarts')
        self.moment.put(target=-1, go=1)
        self.submit(f'--resume={self.path}')
        self.path, self.job = self.newest()
        self.await_end()

    def await_end(self):
        until(lambda: self.state() in ENDED, 600, lambda: f'the end of job {self.job}, which is {self.state()}\n{self.log()}', 0.5)

    def log(self) -> str: return ''.join(p.read_text(errors='replace')[-1000:] for p in sorted((self.path/'job'/'logs').glob('*.log')))

    def bring_home(self):
        "Copy the run from the small disk to the usual one"
        home = self.folder/'home'/self.path.name
        shutil.copytree(self.path, home, symlinks=True)
        self.path = home

    # ---- what is left

    def look(self, seen: dict[Path, tuple]):
        "Can every notebook be read right now?"
        import nbformat
        for path in self.disk.glob('*/*.ipynb'):
            try: now = (path.stat().st_mtime_ns, path.stat().st_size)
            except FileNotFoundError: continue   # listed, then replaced by another name
            if seen.get(path) == now: continue
            seen[path] = now
            try: nbformat.read(path, 4)
            except Exception as e: self.unreadable[path.name] = f'{type(e).__name__}: {str(e)[:80]}'

    def check(self):
        import nbformat
        if (state := self.state()) != 'COMPLETED': self.faults.append(f'job {self.job} is {state}\n{self.log()}')
        status = json.loads((self.path/'status.json').read_text())
        attempts = status['attempts']
        self.reasons = [a.get('reason') for a in attempts]
        wanted = [*self.kind.reasons, 'done']
        if self.reasons != wanted: self.faults.append(f'reasons {self.reasons}, not {wanted}')
        books = {p.name: nbformat.read(p, 4) for p in sorted(self.path.glob('attempt-*.ipynb'))}
        if (named := [a['notebook'] for a in attempts]) != list(books): self.faults.append(f'attempts {named}, notebooks {list(books)}')
        stamped = [b.metadata.get('caption_nb', {}).get('reason') for b in books.values()]
        if stamped != self.reasons: self.faults.append(f'the notebooks say {stamped}, status.json says {self.reasons}')
        if os.readlink(self.path/'run.ipynb') != list(books)[-1]: self.faults.append('run.ipynb is not the latest attempt')
        if self.unreadable: self.faults.append(f'unreadable: {self.unreadable}')
        self.check_ticks(books)

    def check_ticks(self, books: dict):
        "What an attempt has said, and is not in its notebook: how old was it when the attempt ended?"
        found = {}   # token → numbers
        for book in books.values():
            text = '\n'.join(''.join(o.get('text', '') for o in c.get('outputs', []) if o.output_type == 'stream') for c in book.cells)
            for token, n in re.findall(r'tick (\d+-\d+) (\d+)\n', text): found.setdefault(token, set()).add(int(n))
        said = {}
        for path in sorted(self.folder.glob('*.ticks'), key=lambda p: int(p.stem.split('-')[1])):
            whole = [line.split() for line in path.read_text().split('\n')[:-1]]
            said[path.stem] = {int(n): float(at) for n, at in whole}
        if len(said) != len(books): self.faults.append(f'{len(said)} kernels, {len(books)} notebooks')
        for i, (token, ticks) in enumerate(said.items()):
            end = max(ticks.values(), default=0.)
            if self.kind.cut and i == 0: end = min(end, self.struck)
            lost = [end - t for n, t in ticks.items() if n not in found.get(token, ()) and t <= end]
            self.lost = max([self.lost, *lost])
            if lost and max(lost) > OLDEST:
                self.faults.append(f'attempt {i + 1} lost output that was {max(lost):.1f} s old, {len(lost)} of {len(ticks)} ticks')


# ---- the campaign -----------------------------------------------------------------------------------------------

def small_disks() -> bool:
    "May we mount one?"
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'caption_nb', folder], capture_output=True).returncode: return False
        subprocess.run(['umount', folder], check=True)
    return True


def plan(number: int, rng: random.Random, kinds: list[str]) -> list[tuple[str, str]]: # Fault, moment
    "At least `number` faults: each of `kinds` while training and at another moment, then more; those that take long first"
    pairs = [(name, at) for name in kinds for at in ('training', rng.choice(KINDS[name].others))]
    while len(pairs) < number: pairs.append((name := rng.choice(kinds), rng.choice(KINDS[name].others)))
    return sorted(pairs, key=lambda pair: not pair[0].startswith(('time', 'pre', 'node')))


class Campaign:
    "Runs on several clusters at once, a run at a time on each"
    def __init__(self, folder: Path, seed: int = 0, lanes: int = 4, say: Callable[[str], None] = print):
        self.folder, self.seed, self.lanes, self.say, self.cases = folder, seed, lanes, say, []
        self.lock, self.over = threading.Lock(), threading.Event()

    def run(self, pairs: list[tuple[str, str]]) -> list[Case]:
        "A run that nothing hits, then those that `pairs` of fault and moment name"
        todo = list(enumerate([('', ''), *pairs]))
        with ExitStack() as stack:
            clusters = [Cluster(self.folder/f'c{i}', send_user_signal=i % 2 == 0, kill_wait=10) for i in range(self.lanes)]
            for cluster in clusters: stack.enter_context(cluster)
            stack.callback(self.over.set)
            threading.Thread(target=self.watch, daemon=True).start()
            lanes = [threading.Thread(target=self.lane, args=(c, i % 2 == 0, todo), daemon=True) for i, c in enumerate(clusters)]
            for lane in lanes: lane.start()
            for lane in lanes: lane.join()
        self.cases.sort(key=lambda case: case.number)
        for case in self.cases[1:]: case.faults or self.compare(case, self.cases[0])
        return self.cases

    def lane(self, cluster: Cluster, warns: bool, todo: list):
        "Do what is left and suits `cluster`"
        while True:
            with self.lock:
                mine = next((t for t in todo if not t[1][0] or KINDS[t[1][0]].warns in (None, warns)), None)
                if not mine: return
                todo.remove(mine)
            self.one(cluster, mine[0], *mine[1])

    def one(self, cluster: Cluster, number: int, name: str, moment: str):
        case = Case(self.folder/f'{number:02d}', cluster, number, name, moment, 3*random.Random(f'{self.seed} {number}').random())
        with self.lock: self.cases.append(case)
        case.run()
        self.say(f'{case} ({case.seconds:.0f} s)' + ''.join(f'; {fault.splitlines()[0]}' for fault in case.faults))

    def compare(self, case: Case, whole: Case):
        "The same weights, captions, scores and lines of metrics.jsonl?"
        from faults import differences
        try: found = differences(case.path, whole.path)
        except Exception as e: found = [f'cannot be compared: {type(e).__name__}: {e}']
        if found: case.faults.append('not as if nothing had happened: ' + '; '.join(found[:5]))

    def watch(self):
        "Look at all notebooks again and again, as somebody would who follows a run"
        seen = {}
        while not self.over.wait(0.3):
            for case in list(self.cases):
                if not case.seconds: case.look(seen)


def table(cases: list[Case]) -> str:
    rows = [('', 'fault', 'moment', 'attempts', 'lost', 'seconds', 'verdict')]
    rows += [(str(c.number), c.name or 'nothing', c.at, ', '.join(map(str, c.reasons)), f'{c.lost:.1f} s', f'{c.seconds:.0f}',
              'bad' if c.faults else 'good') for c in cases]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def failures(cases: list[Case]) -> str: return '\n'.join(f'{c.folder}: {c}: {fault.strip()}' for c in cases for fault in c.faults)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--faults', type=int, default=20, help='at least so many')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--lanes', type=int, default=4, help='clusters, and runs at a time')
    parser.add_argument('--only', nargs=2, metavar=('FAULT', 'MOMENT'), help='this one')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # with the clusters stopped
    folder = Path(tempfile.mkdtemp(prefix='cluster-faults-', dir='/tmp'))
    start, kinds = time.monotonic(), [name for name in KINDS if name != 'disk full' or small_disks()]
    if len(kinds) < len(KINDS): print('left out: disk full, because nothing can be mounted here')
    pairs = [tuple(args.only)] if args.only else plan(args.faults, random.Random(args.seed), kinds)
    cases = Campaign(folder, args.seed, args.lanes, functools.partial(print, flush=True)).run(pairs)
    print(f'{table(cases)}\n{len(cases) - 1} faults, seed {args.seed}, {time.monotonic() - start:.0f} s')
    if bad := failures(cases): sys.exit(f'{bad}\nkept: {folder}')
    shutil.rmtree(folder)


if __name__ == '__main__': main()
