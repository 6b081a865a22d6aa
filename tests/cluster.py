"""A real SLURM on this machine, on loopback, for tests: one slurmctld and two slurmd with fake GPUs, no systemd, no cgroups.

    with Cluster(Path('/tmp/try')) as cluster:
        job = cluster.sbatch('hostname; sleep 1', '--gres=gpu:1')
        cluster.wait(job, 'COMPLETED')

    python -m tests.cluster /tmp/try [--accounting]   # runs one until Ctrl-C, and says which SLURM_CONF to export

Everything it writes lies in its folder, everything it starts is ended by process id; several run side by side.
Jobs in `debug` and `high` take nodes from jobs in `low` (a warned one gets GraceTime, if the cluster warns) and `low0` (at once)."""
import fcntl
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PROGRAMS = dict(slurmctld='slurmctld', slurmd='slurmd', sbatch='slurm-client', munged='munge')   # program → Debian package
ACCOUNTING = dict(slurmdbd='slurmdbd', mariadbd='mariadb-server')

SETTINGS = dict(
    ClusterName='test', SlurmUser='root', SlurmdUser='root', AuthType='auth/munge', CredType='cred/munge',
    CommunicationParameters='NoCtldInAddrAny,NoInAddrAny',   # on loopback alone
    ProctrackType='proctrack/linuxproc',   # by ancestry: Jupyter kernels start sessions of their own
    TaskPlugin='task/none', JobAcctGatherType='jobacct_gather/linux', JobAcctGatherFrequency=2, SwitchType='switch/none', MpiDefault='none',
    PropagateResourceLimits='NONE', SlurmdParameters='config_overrides',   # believe the sizes below, not the hardware
    ReturnToService=2, MailProg='/bin/true', SchedulerType='sched/backfill', SchedulerParameters='sched_interval=1,bf_interval=1',
    SelectType='select/cons_tres', SelectTypeParameters='CR_Core_Memory', DefMemPerCPU=256, OverTimeLimit=0, MinJobAge=3600,
    BatchStartTimeout=1, SlurmctldTimeout=30, SlurmdTimeout=20, MessageTimeout=20, InactiveLimit=0, JobRequeue=1,
    SlurmctldDebug='info', SlurmdDebug='info', LogTimeFormat='iso8601_ms',
    PreemptType='preempt/partition_prio', PreemptMode='REQUEUE', GresTypes='gpu')

PARTITIONS = dict(debug='Default=YES PriorityTier=10 PreemptMode=REQUEUE GraceTime={grace}', high='PriorityTier=100 PreemptMode=OFF',
                  low='PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}', low0='PriorityTier=1 PreemptMode=REQUEUE GraceTime=0')

CGROUP = 'CgroupPlugin=cgroup/v1\nIgnoreSystemd=yes\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n'   # or slurmd asks dbus


# ---- what has to be there ---------------------------------------------------------------------------------------

def lacking(accounting: bool = False) -> list[str]:
    "Debian packages whose programs are not on this machine"
    path = os.environ.get('PATH', '') + ':/usr/sbin:/sbin'
    wanted = PROGRAMS | (ACCOUNTING if accounting else {})
    return sorted(package for program, package in wanted.items() if not shutil.which(program, path=path))


def install_packages(accounting: bool = False) -> str: # '', or why a cluster cannot run here
    "Install what is missing, without starting any service"
    if not sys.platform.startswith('linux') or os.geteuid(): return 'a test cluster needs Linux and root'
    if not lacking(accounting): return ''
    if not shutil.which('apt-get'): return f'no {", ".join(lacking(accounting))}, and no apt-get to install them'
    with open('/tmp/caption-nb-apt.lock', 'w') as lock:   # tests run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (packages := lacking(accounting)): return ''
        env = os.environ | dict(RUNLEVEL='1', DEBIAN_FRONTEND='noninteractive')
        for words in (['update', '-qq'], ['install', '-y', '-qq', '--no-install-recommends', *packages]):
            done = subprocess.run(['apt-get', '-o', 'DPkg::Lock::Timeout=120', *words], env=env, capture_output=True, text=True)
            if done.returncode: return f'apt-get {words[0]} could not bring {", ".join(packages)}: {done.stderr.strip()[-300:]}'
    return ''


def free_ports(n: int) -> list[int]:
    "Ports on which nobody listens, below those that outgoing connections get: they stay free while a slurmd is away"
    found, rng = {}, random.SystemRandom()
    while len(found) < n:
        s = socket.socket()
        try: s.bind(('127.0.0.1', port := rng.randrange(10_000, 32_000)))
        except OSError: continue
        else: found[port] = s   # held until all are chosen
        finally: port in found or s.close()
    for s in found.values(): s.close()
    return list(found)


def until(condition: Callable[[], object], seconds: float, what: str | Callable[[], str], every: float = 0.05):
    "Wait until `condition()` holds and return what it says; after `seconds` a TimeoutError that tells `what`"
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end: raise TimeoutError(f'not within {seconds:.0f} s: {what() if callable(what) else what}')
        time.sleep(every)
    return found


# ---- processes --------------------------------------------------------------------------------------------------

def pids() -> list[int]: return [int(p) for p in os.listdir('/proc') if p.isdigit()]


def parent_of(pid: int) -> int: # 0 if it is gone or a zombie
    try: state, parent = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[:2]
    except OSError: return 0
    return 0 if state in 'ZX' else int(parent)


def environment_of(pid: int) -> dict[str, str]:
    "What it was started with"
    try: text = Path(f'/proc/{pid}/environ').read_bytes().decode(errors='replace')
    except OSError: return {}
    return dict(v.split('=', 1) for v in text.split('\0') if '=' in v)


def command_of(pid: int) -> str:
    try: return Path(f'/proc/{pid}/cmdline').read_bytes().replace(b'\0', b' ').decode(errors='replace').strip()
    except OSError: return ''


def has_open(pid: int, path: Path) -> bool:
    try: return any(os.path.realpath(f'/proc/{pid}/fd/{fd}') == str(path) for fd in os.listdir(f'/proc/{pid}/fd'))
    except OSError: return False


def descendants(ancestors: Iterable[int]) -> set[int]:
    "Processes that descend from `ancestors`, and those themselves"
    found, parents = set(ancestors), {p: parent_of(p) for p in pids()}
    while new := {p for p, parent in parents.items() if parent in found} - found: found |= new
    return found


def kill(targets: Iterable[int]):
    "KILL, as the loss of power would"
    for pid in targets:
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass


# ---- the cluster ------------------------------------------------------------------------------------------------

class Cluster:
    "A SLURM of its own below the folder `base`: `nodes` nodes n1, n2 … of 8 cores, 6 GB and `gpus` fake GPUs"
    def __init__(self, base: Path, accounting: bool = False, nodes: int = 2, gpus: int = 2, send_user_signal: bool = True,
                 kill_wait: int = 5, # Seconds between TERM and KILL
                 grace: int = 8,     # Seconds between a preemption and TERM, in debug and low
                 hidden: Path | None = None, # A folder that the nodes do not see
                 **settings): # More lines of slurm.conf, or others: MaxArraySize=9
        self.base, self.accounting, self.gpus, self.grace, self.hidden = Path(base).resolve(), accounting, gpus, grace, hidden
        self.nodes = [f'n{i}' for i in range(1, nodes + 1)]
        warned = dict(SlurmctldParameters='preempt_send_user_signal') if send_user_signal else {}
        self.crashed: dict[str, float] = {}   # node → when
        self.settings = SETTINGS | warned | dict(KillWait=kill_wait) | settings
        self.daemons: dict[str, subprocess.Popen] = {}
        if len(str(self.base)) > 80: raise ValueError(f'{self.base}: a longer path than sockets can have; take a shorter one')

    @property
    def conf(self) -> Path: return self.base/'etc'/'slurm.conf'

    @property
    def env(self) -> dict[str, str]:
        "The variables that lead SLURM's commands to this cluster"
        return dict(SLURM_CONF=str(self.conf))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_): self.stop()

    # ---- start and stop

    def start(self):
        "Install what is missing, write the configuration, start all daemons, wait until all nodes are idle"
        if reason := install_packages(self.accounting): raise RuntimeError(reason)
        for attempt in range(3):   # somebody may take a port between choice and use
            try:
                self._write()
                return self._start()
            except (TimeoutError, ChildProcessError):
                self.stop()
                if attempt == 2: raise

    def _write(self):
        b = self.base
        folders = ('etc', 'log', 'run', 'state', 'dev', *(f'spool/{n}' for n in self.nodes))
        for folder in folders: (b/folder).mkdir(parents=True, exist_ok=True)
        self.controller_port, self.dbd_port, *ports = free_ports(2 + len(self.nodes))
        secret(b/'etc'/'munge.key', os.urandom(1024))
        for i in range(self.gpus):
            if not (gpu := b/'dev'/f'nvidia{i}').exists(): gpu.symlink_to('/dev/null')   # any device will do, a plain file will not
        (b/'etc'/'cgroup.conf').write_text(CGROUP)
        gpus = f'NodeName={",".join(self.nodes)} Name=gpu Type=fake File={b}/dev/nvidia[0-{self.gpus-1}]\n' if self.gpus else ''
        (b/'etc'/'gres.conf').write_text('AutoDetect=off\n' + gpus)
        paths = dict(SlurmctldHost='localhost(127.0.0.1)', SlurmctldPort=self.controller_port,
                     AuthInfo=f'socket={b}/run/munge.socket,cred_expire=5',   # a requeue waits as long as a credential lives
                     StateSaveLocation=b/'state', SlurmdSpoolDir=b/'spool'/'%n', SlurmctldPidFile=b/'run'/'slurmctld.pid',
                     SlurmdPidFile=b/'run'/'slurmd-%n.pid', SlurmctldLogFile=b/'log'/'slurmctld.log', SlurmdLogFile=b/'log'/'slurmd-%n.log')
        books = dict(AccountingStorageType='accounting_storage/slurmdbd', AccountingStorageHost='localhost',
                     AccountingStorageTRES='gres/gpu', AccountingStoragePort=self.dbd_port, AccountingStoragePass=b/'run'/'munge.socket')
        lines = [f'{k}={v}' for k, v in (paths | (books if self.accounting else {}) | self.settings).items()]
        size = 'Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=6000' + (f' Gres=gpu:fake:{self.gpus}' if self.gpus else '')
        lines += [f'NodeName={n} NodeHostname={platform.node().split(".")[0]} NodeAddr=127.0.0.1 Port={port} {size}'
                  for n, port in zip(self.nodes, ports)]
        lines += [f'PartitionName={name} Nodes=ALL MaxTime=INFINITE DefaultTime=10 {rest.format(grace=self.grace)}'
                  for name, rest in PARTITIONS.items()]
        self.conf.write_text('\n'.join(lines) + '\n')

    def _start(self):
        self.crashed.clear()
        b, path = self.base, self.base/'run'/'munge.socket'
        self.daemon('munged', '--foreground', '--force', f'--key-file={b}/etc/munge.key', f'--socket={path}', '--num-threads=4',
                    f'--pid-file={b}/run/munged.pid', f'--log-file={b}/log/munged.log', f'--seed-file={b}/run/munge.seed')
        until(path.exists, 10, lambda: self.said('munged'))
        if self.accounting: self._start_accounting()
        self.daemon('slurmctld', '-D')
        until(lambda: self.answers('scontrol', 'ping'), 20, lambda: self.said('slurmctld'))
        for node in self.nodes: self.start_slurmd(node, wait=False)
        until(self.ready, 20, lambda: self.run('sinfo', '-R') + ''.join(self.said(f'slurmd-{n}') for n in self.nodes))

    def _start_accounting(self):
        "MariaDB on a socket, slurmdbd, and this user in its books"
        b, at = self.base, self.base/'run'/'mysql.socket'
        if not (b/'mysql'/'mysql').exists():
            self.run('mariadb-install-db', '--no-defaults', '--user=root', f'--datadir={b}/mysql',
                     '--auth-root-authentication-method=socket', '--auth-root-socket-user=root', '--skip-test-db')
        self.daemon('mariadbd', '--no-defaults', '--user=root', f'--datadir={b}/mysql', f'--socket={at}', '--skip-networking',
                    f'--pid-file={b}/run/mysql.pid', '--innodb-buffer-pool-size=64M', '--innodb-log-file-size=32M',
                    '--innodb-flush-log-at-trx-commit=0', '--innodb-lock-wait-timeout=900')
        client = ('--no-defaults', '-u', 'root', '-S', str(at))
        until(lambda: self.answers('mariadb-admin', *client, 'ping'), 30, lambda: self.said('mariadbd'))
        self.run('mariadb', *client, '-e', 'CREATE DATABASE IF NOT EXISTS slurm_acct_db')
        secret(b/'etc'/'slurmdbd.conf', '\n'.join([
            'AuthType=auth/munge', f'AuthInfo=socket={b}/run/munge.socket', 'DbdHost=localhost', 'DbdAddr=127.0.0.1',
            f'DbdPort={self.dbd_port}', 'SlurmUser=root', f'LogFile={b}/log/slurmdbd.log', f'PidFile={b}/run/slurmdbd.pid',
            'CommunicationParameters=NoInAddrAny', 'StorageType=accounting_storage/mysql', 'StorageHost=localhost',
            'StorageLoc=slurm_acct_db', 'StorageUser=root', '']).encode())
        self.daemon('slurmdbd', '-D', env=dict(MYSQL_UNIX_PORT=str(at)))   # where libmariadb looks for "localhost"
        until(lambda: self.answers('sacctmgr', '-n', 'show', 'cluster'), 30, lambda: self.said('slurmdbd'))
        for words in (['cluster', 'test'], ['account', 'default', 'cluster=test'], ['user', 'root', 'account=default', 'cluster=test']):
            self.answers('sacctmgr', '-i', 'add', *words)   # at a second start they are there

    def stop(self):
        "Kill all jobs, then all daemons; the folder stays"
        for node in self.nodes: self.crash(node)
        for name in [*self.daemons][::-1]: self._end(name)

    def daemon(self, name: str, *arguments: str, program: str = '', env: dict[str, str] | None = None):
        "Start a daemon, which dies with this process; what it prints goes to log/NAME.out"
        command = [f'/usr/sbin/{program or name}', *map(str, arguments)]
        if self.hidden and program == 'slurmd':
            command = ['unshare', '-m', 'sh', '-c', 'mount -t tmpfs none "$0" && exec "$@"', str(self.hidden), *command]
        env = {k: v for k, v in os.environ.items() if not k.startswith('SLURM')} | self.env | (env or {})
        with open(self.base/'log'/f'{name}.out', 'ab') as out:
            self.daemons[name] = subprocess.Popen(['setpriv', '--pdeathsig', 'KILL', '--', *command], stdin=subprocess.DEVNULL,
                                                  stdout=out, stderr=out, env=env, cwd='/', start_new_session=True)
        (self.base/'run'/'pids').write_text(''.join(f'{n} {p.pid}\n' for n, p in self.daemons.items()))

    def _end(self, name: str):
        process = self.daemons.pop(name, None)
        if not process: return
        process.kill()
        process.wait()

    def said(self, name: str) -> str:
        "The end of what a daemon printed"
        return f'{name}: ' + (self.base/'log'/f'{name}.out').read_text(errors='replace')[-1500:]

    def ready(self) -> bool:
        "Are all nodes there?"
        for name, process in self.daemons.items():
            if process.poll() is not None: raise ChildProcessError(f'{name} ended with {process.returncode}: {self.said(name)}')
        up = self._call('sinfo', '-h', '-N', '-p', 'debug', '-t', 'idle,mix,alloc', '-o', '%N')
        return len(up.stdout.split()) == len(self.nodes)

    # ---- commands

    def _call(self, *command) -> subprocess.CompletedProcess:
        env = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM_', 'SBATCH_'))} | self.env
        return subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True, timeout=60)

    def answers(self, *command) -> bool: return self._call(*command).returncode == 0

    def run(self, *command) -> str: # What it printed
        "Run a command on this cluster"
        done = self._call(*command)
        if done.returncode: raise RuntimeError(f'{" ".join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}')
        return done.stdout.strip()

    def sbatch(self, command: str, *options: str) -> int: # The job's number
        "Submit the shell commands `command`; its output goes to log/job-NUMBER.out"
        default = () if any(o.startswith('--output') for o in options) else (f'--output={self.base}/log/job-%j.out',)
        return int(self.run('sbatch', '--parsable', *default, *options, f'--wrap={command}').split(';')[0])

    def output(self, job: int) -> str:
        "What the job `job` of `sbatch` printed"
        path = self.base/'log'/f'job-{job}.out'
        return path.read_text(errors='replace') if path.exists() else ''

    def states(self, job: int | str) -> list[str]:
        "The states of all tasks of a job or array, or of one task ('12_3')"
        return self.run('squeue', '-h', '-r', '-t', 'all', '-o', '%T', '-j', job).split()

    def state(self, job: int | str) -> str:
        "The state of a job: RUNNING, PENDING, COMPLETED … or several, if it is an array"
        return ','.join(sorted(set(self.states(job))))

    def info(self, job: int | str) -> dict[str, str]:
        "What `scontrol show job` says"
        return dict(w.split('=', 1) for w in self.run('scontrol', 'show', 'job', '-o', job).split() if '=' in w)

    def wait(self, job: int | str, states: str | Iterable[str] = ('COMPLETED',), timeout: float = 60) -> str: # The state
        "Wait until all tasks of `job` are in one of `states`"
        states = {states} if isinstance(states, str) else set(states)
        until(lambda: (now := self.states(job)) and set(now) <= states, timeout,
              lambda: f'job {job} in {"/".join(sorted(states))}; it is {self.state(job)}', every=0.2)
        return self.state(job)

    # ---- nodes

    def start_slurmd(self, node: str, wait: bool = True):
        "Start the slurmd of `node` and wait until the node is back; after a crash as late as SLURM needs to miss its jobs"
        self._end(f'slurmd-{node}')
        if node in self.crashed: time.sleep(max(0, self.crashed.pop(node) + 12 - time.monotonic()))   # BatchStartTimeout + 10 s, and one
        self.daemon(f'slurmd-{node}', '-D', '-N', node, program='slurmd')
        up = ('idle', 'mixed', 'allocated')
        if wait: until(lambda: self.node_state(node).rstrip('*') in up, 30, lambda: f'{node} is {self.node_state(node)}')

    def kill_slurmd(self, node: str):
        "KILL the slurmd of `node`; its jobs go on under their slurmstepds"
        self._end(f'slurmd-{node}')

    def crash(self, node: str):
        "The node loses power: its slurmd, slurmstepds and all processes of its jobs are killed at once"
        self._end(f'slurmd-{node}')
        while found := self.processes(node):
            kill(found)
            time.sleep(0.01)
        self.crashed[node] = time.monotonic()

    def node_state(self, node: str) -> str: return self.run('sinfo', '-h', '-n', node, '-p', 'debug', '-o', '%T')

    def processes(self, node: str) -> set[int]:
        "Slurmstepds and processes of jobs on `node`: by slurmd's log, which slurmstepds hold open, by descent, and by environment"
        log, mine = self.base/'log'/f'slurmd-{node}.log', dict(SLURMD_NODENAME=node, SLURM_CONF=str(self.conf))
        def here(pid): return has_open(pid, log) or mine.items() <= environment_of(pid).items()
        daemon = self.daemons.get(f'slurmd-{node}')
        return {p for p in descendants(p for p in pids() if here(p)) if parent_of(p)} - ({daemon.pid} if daemon else set())

    def job_processes(self, job: int | str) -> dict[int, str]: # Process → command
        "The processes of `job` on all nodes, without slurmstepd"
        mine = dict(SLURM_JOB_ID=str(job), SLURM_CONF=str(self.conf))
        found = descendants(p for p in pids() if mine.items() <= environment_of(p).items())
        return {p: c for p in sorted(found) if parent_of(p) and not (c := command_of(p)).startswith('slurmstepd')}


def secret(path: Path, content: bytes):
    "Write what only its owner may read"
    path.touch(0o600)
    path.chmod(0o600)
    path.write_bytes(content)


def main(words: list[str]):
    with Cluster(Path(words[0]), accounting='--accounting' in words) as cluster:
        print(f'export SLURM_CONF={cluster.conf}', flush=True)
        try: signal.pause()
        except KeyboardInterrupt: pass


if __name__ == '__main__': main(sys.argv[1:])
