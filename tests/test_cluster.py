"The SLURM that the tests run on: jobs, fake GPUs, preemption, lost nodes, accounting, several clusters at once, nothing left behind"
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from cluster import Cluster, free_ports, pids, has_open, until


def left(base) -> list[int]:
    "Processes with a log or an output of the cluster in `base` open"
    return [p for p in pids() for f in (base/'log').glob('*') if has_open(p, f)]


def test_job_sees_its_gpus(cluster):
    job = cluster.sbatch('echo $SLURMD_NODENAME gpus $CUDA_VISIBLE_DEVICES', '--gpus-per-node=2', '--nodes=1', '--cpus-per-task=4')
    assert cluster.wait(job) == 'COMPLETED' and cluster.output(job).split() == [cluster.info(job)['NodeList'], 'gpus', '0,1']
    with pytest.raises(RuntimeError, match='configuration is not available'): cluster.sbatch('true', '--gres=gpu:3')


def test_commands_of_this_process_lead_to_it(cluster):
    assert os.environ['SLURM_CONF'] == str(cluster.conf)
    listed = subprocess.run(['sinfo', '-h', '-N', '-o', '%N'], capture_output=True, text=True, check=True)
    assert set(listed.stdout.split()) == {'n1', 'n2'}


def test_two_nodes_work_together(cluster):
    job = cluster.sbatch('srun bash -c \'echo $SLURM_PROCID $SLURMD_NODENAME\'', '--nodes=2', '--ntasks-per-node=1')
    cluster.wait(job)
    assert sorted(cluster.output(job).splitlines()) == ['0 n1', '1 n2']


def test_array_has_states(cluster):
    job = cluster.sbatch('exit $((SLURM_ARRAY_TASK_ID == 2))', '--array=0-3%2')
    assert cluster.wait(job, ('COMPLETED', 'FAILED')) == 'COMPLETED,FAILED'
    assert [cluster.state(f'{job}_{i}') for i in range(4)] == ['COMPLETED']*2 + ['FAILED', 'COMPLETED']


def test_higher_partition_preempts(cluster):
    "Without grace a job hears its signal and TERM at once, and is requeued; with grace it hears its signal, and goes on"
    script = ('trap "echo warned" USR2; trap "echo term; exit 143" TERM; '
              'echo start $SLURM_RESTART_COUNT; for i in $(seq 400); do sleep 0.1; done')
    options = ('--signal=B:USR2@60', '--gpus-per-node=2', '--nodes=1', '--open-mode=append')
    low, low0 = [cluster.sbatch(script, f'--partition={p}', *options) for p in ('low', 'low0')]
    def heard(job): return [line.strip() for line in cluster.output(job).splitlines() if line.split()[0] in ('start', 'warned', 'term')]
    for job in (low, low0):
        cluster.wait(job, 'RUNNING')
        until(lambda: heard(job) == ['start'], 5, lambda: cluster.output(job))
    high, high0 = [cluster.sbatch('sleep 1', '--partition=high', f'--nodelist={cluster.info(j)["NodeList"]}', *options[1:3])
                   for j in (low, low0)]
    cluster.wait(high0)
    until(lambda: heard(low) == ['start', 'warned'], 10, lambda: cluster.output(low))
    assert cluster.state(low) == 'RUNNING' and cluster.info(low)['PreemptTime'] != 'None'
    until(lambda: heard(low0)[-1] == 'start 1', 20, lambda: cluster.output(low0))
    assert [w for w in heard(low0) if w != 'warned'] == ['start', 'term', 'start 1']   # both signals at once: the trap of TERM may end it first
    cluster.run('scancel', high, low, low0)


def test_node_that_loses_power(cluster):
    "Its jobs die at once and start again; when only slurmd dies, they never notice"
    victim = cluster.sbatch('sleep 60 & (setsid sleep 60 &); wait')
    cluster.wait(victim, 'RUNNING')
    until(lambda: len(cluster.job_processes(victim)) == 3, 5, lambda: str(cluster.job_processes(victim)))
    node, before = cluster.info(victim)['NodeList'], cluster.job_processes(victim)
    cluster.kill_slurmd(node)
    cluster.start_slurmd(node)
    assert cluster.job_processes(victim) == before and cluster.state(victim) == 'RUNNING'
    cluster.crash(node)
    assert not cluster.processes(node) and not cluster.job_processes(victim)
    cluster.start_slurmd(node)
    until(lambda: cluster.info(victim)['Restarts'] == '1', 20, lambda: str(cluster.info(victim)))


def test_accounting(accounted):
    job = accounted.sbatch('exit 3')
    accounted.wait(job, 'FAILED')
    row = until(lambda: accounted.run('sacct', '-n', '-D', '-P', '-X', '-j', job, '-o', 'state,exitcode'), 20, 'the job in sacct', 0.2)
    assert row == 'FAILED|3:0'


def test_several_at_once_and_nothing_left(tmp_path):
    "Jobs that ignore every signal end with their cluster"
    many = [Cluster(tmp_path/f'c{i}', nodes=1, gpus=i, send_user_signal=False, MaxArraySize=9) for i in range(2)]
    try:
        for c in many: c.start()
        jobs = [c.sbatch('trap "" TERM INT; (setsid sleep 300 &); sleep 300') for c in many]
        for c, job in zip(many, jobs): c.wait(job, 'RUNNING')
        assert [c.run('sinfo', '-h', '-o', '%G', '-p', 'debug') for c in many] == ['(null)', 'gpu:fake:1']
        with pytest.raises(RuntimeError, match='Invalid job array'): many[0].sbatch('true', '--array=0-9')
        until(lambda: all(len(left(c.base)) >= 7 for c in many), 5, lambda: str([left(c.base) for c in many]))
    finally:
        for c in many: c.stop()
    assert [left(c.base) for c in many] == [[], []]
    assert len(set(free_ports(50))) == 50


def test_dies_with_who_started_it(tmp_path):
    "Killed tests leave no daemon behind"
    process = subprocess.Popen([sys.executable, '-m', 'tests.cluster', str(tmp_path/'c')], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == f'export SLURM_CONF={tmp_path}/c/etc/slurm.conf\n'
    process.kill()
    process.wait()
    process.stdout.close()
    until(lambda: not left(tmp_path/'c'), 10, lambda: str(left(tmp_path/'c')))
