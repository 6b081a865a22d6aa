"""Job folders: what a job needs, what waits for what, and that nothing that comes later changes a job that waits. SLURM is played
here by a list; `test_on_slurm.py` and `test_sweep_on_slurm.py` ask the real one."""
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_nb import slurm, submit
from caption_nb.cli import main
from caption_nb.config import Config
from caption_nb.jobs import Step, read_job
from caption_nb.profiles import load_profile
from caption_nb.slurm import QueuedJob, SlurmError
from caption_nb.submit import add_tasks, array_text, left_to_do, make_runs, new_job, parts, submit_job

ALL = ('extract', 'train', 'scst', 'evaluate', 'compare')


@pytest.fixture
def queue(monkeypatch) -> list[tuple[Path, tuple]]:
    "What was submitted: script, and what it waits for; ids are 1, 2, 3 …"
    asked = []
    def take(script, after=()):
        asked.append((Path(script), tuple(after)))
        return len(asked)
    def known(ids, **_): return {str(i): QueuedJob(str(i), 'PENDING', '', 0, None, '', '') for i in ids}
    for name, function in dict(submit=take, require=lambda: None, available=lambda: True, queue=known, site=dict).items():
        monkeypatch.setattr(slurm, name, function)
    return asked


@pytest.fixture
def profile(tmp_path): return load_profile('one-gpu', work=str(tmp_path), python='python3')


def job(profile, n: int = 1, steps=ALL, **more) -> Path:
    runs = make_runs([Config(encoder='mobilenetv2_050', seed=seed) for seed in range(n)], profile)
    return new_job(runs, profile, steps, Path(profile.work)/'sweep-x' if n > 1 else '', **more)


@given(st.sets(st.integers(0, 60)))
def test_ranges_are_the_tasks(tasks):
    found = []
    for part in filter(None, array_text(sorted(tasks)).split(',')):
        first, _, last = part.partition('-')
        found += range(int(first), int(last or first) + 1)
    assert found == sorted(tasks)


def test_long_arrays_are_cut(profile):
    "SLURM takes indices below its limit: later tasks are counted from the first of their part, and wait for their own kind"
    folder = job(profile, 5, ('extract', 'train', 'scst'))
    found = parts(folder, {'extract': [0], 'train': [0, 1, 3, 4], 'scst': [0, 1, 2, 3, 4]}, size=2)
    told = [(p.step, p.first, p.tasks, [(kind, q.step, q.tasks) for kind, q in p.after]) for p in found]
    assert told == [('extract', 0, [0], []), *(('train', first, tasks, [('afterok', 'extract', [0])]) for first, tasks in ((0, [0, 1]), (2, [3]), (4, [4]))),
                    ('scst', 0, [0, 1], [('aftercorr', 'train', [0, 1])]), ('scst', 2, [3], [('afterok', 'train', [3])]),
                    ('scst', 4, [4], [('afterok', 'train', [4])]), ('scst', 2, [2], [])]    # 2 was trained before
    assert '#SBATCH --array=0-1\n' in found[1].text
    assert f'{folder}/train-2.json train 1 2' in found[2].text and len({p.script for p in found}) == len(found)


def test_each_step_waits_for_the_one_before(profile, queue):
    folder = job(profile)
    made = submit_job(folder)
    assert [p.step for p in made] == list(ALL)
    assert [after for _, after in queue] == [(), (('afterok', 1),), (('afterok', 2),), (('afterok', 3),),
                                             (('afterany', 2), ('afterany', 3), ('afterany', 4))]
    assert left_to_do(folder) == {} and [m['id'] for m in read_job(folder)['jobs']] == [1, 2, 3, 4, 5]


def test_what_is_submitted_later_changes_no_job_that_waits(profile, queue, tmp_path):
    own = tmp_path/'own.ipynb'
    own.write_text('{"first": 1}')
    folder = job(profile, notebook=own)
    submit_job(folder)
    before = {step: Step.load(folder/f'{step}.json', step, 0) for step in ALL}
    own.write_text('{"second": 1}')
    add_tasks(folder, [], notebook=own, steps=['compare'], split='test', profile=profile.to_dict() | dict(retries=0, copy_features=True))
    for step, then in before.items():
        now = Step.load(folder/f'{step}.json', step, 0)
        assert (now.run(), now.record, now.split, now.profile) == (then.run(), then.record, then.split, then.profile)
        assert f'{folder}/{step}.json' in (folder/f'{step}.sh').read_text()
    assert before['evaluate'].run() == Path(read_job(folder)['tasks'][0]['scst']) and before['evaluate'].split == 'dev'
    assert Step.load(folder/'train.json', 'train', 0).notebook.read_text() == '{"first": 1}'
    assert Step.load(folder, 'train', 0).notebook.read_text() == '{"second": 1}'


def test_an_edit_changes_no_job_that_waits(profile, queue, tmp_path, monkeypatch):
    module = tmp_path/'module.py'
    module.write_text('then = True')
    monkeypatch.setattr(submit, 'package_files', lambda: {'caption_nb/module.py': module})
    folder = job(profile, steps=('train',))
    submit_job(folder)
    module.write_text('then = False')
    add_tasks(folder, [], steps=['train', 'evaluate'])
    submit_job(folder)
    copies = [next(line for line in (folder/name).read_text().splitlines() if 'PYTHONPATH=' in line) for name in ('train.sh', 'evaluate.sh')]
    codes = [folder/json.loads((folder/name).read_text())['code'] for name in ('train.json', 'evaluate.json')]
    assert [(code/'caption_nb'/'module.py').read_text() for code in codes] == ['then = True', 'then = False']
    assert all(str(code) in line for code, line in zip(codes, copies))


def test_what_slurm_took_before_it_refused_is_not_forgotten(profile, queue, monkeypatch):
    folder, take = job(profile, steps=('extract', 'train', 'evaluate')), slurm.submit
    def third_time(script, after=()):
        if len(queue) == 2: raise SlurmError('no more jobs')
        return take(script, after)
    monkeypatch.setattr(slurm, 'submit', third_time)
    with pytest.raises(SlurmError, match='(?s)no more jobs.*job 1: extract.*job 2: train, after 1'): submit_job(folder)
    assert [m['step'] for m in read_job(folder)['jobs']] == ['extract', 'train'] and left_to_do(folder) == {'evaluate': [0]}
    assert not list(folder.glob('evaluate*'))


def test_a_configuration_is_not_changed_under_a_job_that_waits(profile, queue, capsys):
    folder = job(profile, steps=('train',))
    run = folder.parent
    submit_job(folder)
    before = (run/'config.json').read_bytes()
    assert main(['submit', 'train', '--resume', str(run), '--epochs', '20']) == 2
    assert 'job 1 waits or runs' in capsys.readouterr().err and (run/'config.json').read_bytes() == before
    assert main(['submit', 'train', '--resume', str(run)]) == 0 and len(queue) == 1    # nothing is left to do


@pytest.mark.parametrize('words, requeue, copy', [([], True, True), (['--no-requeue'], False, True), (['--no-copy-features', '--time', '60'], True, False)])
def test_only_flags_that_are_given_change_the_profile(queue, tmp_path, words, requeue, copy):
    (profile := tmp_path/'mine.toml').write_text(f'copy_features = true\nwork = "{tmp_path}"\n')
    assert main(['submit', 'train', '--encoder', 'scene_cnn', '--profile', str(profile), *words]) == 0
    script = queue[0][0].read_text()
    assert ('#SBATCH --requeue' in script, '#SBATCH --no-requeue' in script) == (requeue, not requeue)
    assert read_job(queue[0][0].parent)['profile']['copy_features'] == copy and ('--time=60' in script) == ('--time' in words)
    run = queue[0][0].parent.parent
    (run/'job'/'job.json').write_text(json.dumps(read_job(run/'job') | dict(jobs=[])))
    assert main(['submit', 'train', '--resume', str(run)]) == 0     # with the profile it had
    assert read_job(run/'job')['profile']['copy_features'] == copy and ('#SBATCH --requeue' in queue[1][0].read_text()) == requeue
