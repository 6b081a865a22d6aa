"""What a run costs beyond its own work, on a SLURM that is started for it (Linux, root; see tests/cluster.py).

'submit to first cell': seconds from the return of `sbatch` to the first line that a notebook of one's own executes, with
`caption-nb submit`; the peer is a bare batch script that starts a kernel with jupyter_client and has it execute one cell. The bar is
3 s more ('over_s', the median of the differences). 'command_s' is counted from the start of the command, its imports included.

'processor time of the wrapper': seconds for each second of a run, of all processes of the job but the kernel: the shells of the batch
script, and the driver, which saves a growing notebook of half a megabyte every two seconds. The bar is 10 ms a second: 1 %. What they take
before the first cell is in 'start_s', and in the time above."""
from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.common import Result
from tests.cluster import Cluster, until
from tests.slurm_runs import flags, jobs, notebook, toml

FIRST = 'import time\nfrom pathlib import Path\n_ = Path(run_dir, "first").write_text(repr(time.time()))'
BUSY = '''import os
from IPython.display import HTML, display
display(HTML('<p>' + 'a figure ' * 60_000))
end = time.monotonic() + float(os.environ['BENCH_SECONDS'])
while time.monotonic() < end:
    step = time.monotonic()
    while time.monotonic() < step + 0.5: sum(i*i for i in range(1000))
    print('step', step, 'loss 2.345, of which nothing is known in advance')'''
BARE = '''import sys, time
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel()
client.execute_interactive(f'import time; _ = open({sys.argv[1]!r}, "w").write(repr(time.time()))')
client.stop_channels()
manager.shutdown_kernel(now=True)'''
COMMAND = '''import sys, time
from caption_nb import slurm
real = slurm.submit
def submit(*words, **options):
    try: return real(*words, **options)
    finally: print(f'at {time.time()!r}', flush=True)
slurm.submit = submit
from caption_nb.cli import main
sys.exit(main(sys.argv[1:]))'''


def read_time(path: Path) -> float:
    "The time that the first cell wrote"
    return float(until(lambda: path.is_file() and path.read_text(), 120, f'no {path}'))


def bare(cluster: Cluster, work: Path) -> float:
    "Seconds from the return of sbatch to the first cell, without anything of ours"
    (out := work/'bare').unlink(missing_ok=True)
    job = cluster.sbatch(f'exec {sys.executable} {work/"bare.py"} {out}', '--cpus-per-task=1', '--mem=700M')
    start = time.time()
    seconds = read_time(out) - start
    cluster.wait(job)
    return seconds


def submit(work: Path, book: str, **env: str) -> tuple[Path, float, float]: # Run folder, when the command began, when sbatch returned
    "`caption-nb submit train` with a notebook"
    words = ['submit', 'train', *flags(encoder='scene_cnn'), '--notebook', book, '--profile', 'profile.toml']
    start = time.time()
    done = subprocess.run([sys.executable, '-c', COMMAND, *words], cwd=work, capture_output=True, text=True, env=os.environ | env, check=True)
    said = dict(line.split(' ', 1) for line in done.stdout.splitlines())
    return Path(said['run'].partition(': ')[2]), start, float(said['at'])


def ours(cluster: Cluster, work: Path) -> tuple[float, float]: # From sbatch, from the start of the command
    "Seconds to the first cell of a submitted notebook"
    run, start, at = submit(work, 'first.ipynb')
    first = read_time(run/'first')
    cluster.wait(jobs(run/'job')['train'])
    return first - at, first - start


def processor_seconds(pid: int) -> float:
    "Processor time of a process and of its children that have ended; 0 if it is gone"
    try: ticks = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[11:15]
    except OSError: return 0.
    return sum(map(int, ticks))/os.sysconf('SC_CLK_TCK')


def wrapper(cluster: Cluster, work: Path, seconds: int) -> tuple[float, float, float]: # Of the wrapper, of the kernel; of the wrapper before that
    "Processor seconds a second of a run that prints twice a second, from its first cell on; and in all before that"
    toml(work/'profile.toml', env=dict(BENCH_SECONDS=str(seconds)))
    run, _, _ = submit(work, 'busy.ipynb')
    job = jobs(run/'job')['train']
    read_time(run/'first')
    time.sleep(2)
    def measure(): return time.monotonic(), {pid: ('_kernel_main' in c, processor_seconds(pid)) for pid, c in cluster.job_processes(job).items()}
    start, before = measure()
    time.sleep(seconds - 4)
    end, after = measure()
    spent = [sum(t - before.get(pid, (kernel, 0.))[1] for pid, (kernel, t) in after.items() if kernel == which)/(end - start) for which in (False, True)]
    cluster.wait(job, timeout=120)
    return spent[0], spent[1], sum(t for kernel, t in before.values() if not kernel)


def run(quick: bool = False) -> list[Result]:
    with tempfile.TemporaryDirectory(prefix='bench-', dir='/tmp') as folder, Cluster(Path(folder)/'c', nodes=1) as cluster:
        os.environ |= cluster.env
        (work := Path(folder)/'work').mkdir()
        toml(work/'profile.toml')
        (work/'bare.py').write_text(BARE)
        notebook(work/'first.ipynb', FIRST)
        notebook(work/'busy.ipynb', FIRST, BUSY)
        ours(cluster, work), bare(cluster, work)   # files are in memory
        rounds = [(*ours(cluster, work), bare(cluster, work)) for _ in range(2 if quick else 9)]
        seconds = 12 if quick else 65
        spent, kernel, start = wrapper(cluster, work, seconds)
    mine, command, peer = (statistics.median(column) for column in zip(*rounds))
    ratios = [m/p for m, _, p in rounds]
    over = [m - p for m, _, p in rounds]
    return [Result('submit to first cell', 1e3*mine, 1e3*peer, statistics.median(ratios), 'ms', [min(ratios), max(ratios)],
                   dict(over_s=round(statistics.median(over), 2), over_range_s=[round(min(over), 2), round(max(over), 2)], command_s=round(command, 2),
                        rounds=len(rounds))),
            Result("processor time of the wrapper, beside the kernel's", 1e3*spent, 1e3*kernel, spent/kernel, 'ms/s', [spent/kernel]*2,
                   dict(seconds=seconds, start_s=round(start, 2)))]
