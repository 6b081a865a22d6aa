"What does not fit, is damaged or too new, no number, no memory, a full disk, two trainers: said clearly, and nothing is lost"
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import joint, sha256

from caption_nb.basics import read_json_lines
from caption_nb.checkpoints import CHECKSUMS, CheckpointError, RunBusy, RunLock, checkpoint_step, generations, sealed, verify
from caption_nb.config import Config, ConfigError
from caption_nb.data import load_data
from caption_nb.scenes import make_scenes
from caption_nb.training import Trainer

pytestmark = pytest.mark.usefixtures('one_thread')


def tree(run: Path) -> dict[str, str]:
    "What must not be lost: every checkpoint, and the metrics"
    return {str(p.relative_to(run)): sha256(p) for p in sorted([*run.rglob('checkpoints/**/*'), run/'metrics.jsonl']) if p.is_file()}


def weights(run: Path, kind: str = 'last') -> str: return sha256(run/'checkpoints'/kind/'model.safetensors')


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> Path: return tmp_path_factory.mktemp('bad')


@pytest.fixture(scope='module')
def config(root) -> Config:
    "A run on a folder of photos; it does not look at the dev split before its end"
    make_scenes(root/'photos', 41, 64, 0, quiet=True)
    return dataclasses.replace(joint(root/'cache', epochs=2, eval_every=2, log_every=1), data=str(root/'photos')).validate()


@pytest.fixture(scope='module')
def whole(config, root) -> Path:
    Trainer(config, root/'whole', quiet=True).fit()
    return root/'whole'


@pytest.fixture(scope='module')
def half(config, root) -> Path:
    "Stopped in its second epoch; its last checkpoint but one is of step 5"
    step, run = Trainer.train_step, root/'half'
    def stop(self, batches):
        step(self, batches)
        if self.step == 7: (run/'STOP').touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, 'train_step', stop)
        trainer = Trainer(dataclasses.replace(config, save_minutes=0.), run, quiet=True)
        with pytest.raises(KeyboardInterrupt, match='stopped at step 7 of 10'): trainer.fit()
    assert [checkpoint_step(p) for p in generations(run/'checkpoints'/'last')] == [7, 5]
    return run


@pytest.fixture
def run(half, tmp_path) -> Path: return shutil.copytree(half, tmp_path/'run')


def change_captions(photos: Path): # Of the first image
    path = photos/'scenes.json'
    path.write_text(path.read_text().replace(' a ', ' one ', 1))


def newer(last: Path):
    record = json.loads((last/CHECKSUMS).read_text())
    del record['seal']
    (last/CHECKSUMS).write_bytes(sealed(record | dict(format=record['format'] + 1, version='9.0')))


# ---- what was trained before ------------------------------------------------------------------------------------

def test_other_data(config, run, tmp_path):
    photos, before = shutil.copytree(config.data, tmp_path/'photos'), tree(run)
    change_captions(photos)
    with pytest.raises(ConfigError, match="run cannot be continued.*data: '.*' then, '.*' now.*start a new run"):
        Trainer(dataclasses.replace(config, data=str(photos)), run, quiet=True).prepare()
    shutil.move(photos, aside := tmp_path/'original')
    with pytest.MonkeyPatch.context() as patch:   # the same folder, with other captions in it
        patch.setattr('caption_nb.training.load_data', lambda path, *args, **kwargs: load_data(aside, *args, **kwargs))
        with pytest.raises(ConfigError, match='data: other content than then'): Trainer(config, run, quiet=True).prepare()
    assert tree(run) == before


@pytest.mark.parametrize('name', ['model.safetensors', 'training.pt', 'vocab.json', CHECKSUMS])
def test_truncated_checkpoint(config, run, whole, name):
    "The one before is used, with a warning; what was lost is learnt again, and the end is the same"
    path = run/'checkpoints'/'last'/name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=f'(?s)damaged checkpoints.*{name}.*last-1, of step 5, is used instead.*last.damaged'):
        trainer = Trainer(config, run, quiet=True).prepare()
    assert trainer.step == 5 and read_json_lines(run/'metrics.jsonl')[-1]['step'] == 5
    trainer.fit()
    for kind in ('last', 'best'): assert weights(run, kind) == weights(whole, kind)
    assert [r['step'] for r in read_json_lines(run/'metrics.jsonl')] == [*range(1, 11), 10]
    assert len(list((run/'checkpoints').glob('last.damaged-*'))) == 1


def test_no_sound_checkpoint(config, run):
    for folder in generations(run/'checkpoints'/'last'): (folder/'training.pt').write_bytes(b'')
    before = tree(run)
    with pytest.raises(CheckpointError, match='(?s)no checkpoint .*last is sound.*last: training.pt has 0 bytes.*last-1: training.pt'):
        Trainer(config, run, quiet=True).prepare()
    assert tree(run) == before


def test_newer_format(config, run):
    newer(run/'checkpoints'/'last')
    before = tree(run)
    with pytest.raises(CheckpointError, match=r'newer caption_nb \(version 9.0, .*update it'): Trainer(config, run, quiet=True).prepare()
    assert tree(run) == before


# ---- on the way -------------------------------------------------------------------------------------------------

def breaks(run: Path, config: Config, step: int, how) -> Trainer:
    "A trainer in which `how` happens to the loss of `step`"
    trainer = Trainer(config, run, quiet=True).prepare()
    real = trainer.model.parts
    def parts(batch, *args, **kwargs):
        found = real(batch, *args, **kwargs)
        return how(found) if trainer.step == step - 1 else found
    trainer.model.parts = parts
    return trainer


def ends_as(whole: Path, run: Path, config: Config) -> bool:
    Trainer(config, run, quiet=True).fit()
    return weights(run) == weights(whole)


def test_loss_that_is_no_number(config, run, whole):
    trainer = breaks(run, config, 9, lambda parts: parts | dict(words=parts['words']*float('nan')))
    before = [checkpoint_step(p) for p in generations(run/'checkpoints'/'last')]
    with pytest.raises(FloatingPointError, match=r'nan at step 9 of 10 \(epoch 2\), with the images \d+\.\w+, .*lower lr.*not touched'):
        trainer.fit()
    last = run/'checkpoints'/'last'
    assert verify(last) == [] and before[0] <= checkpoint_step(last) <= 8 and ends_as(whole, run, config)


def test_out_of_memory_on_a_gpu(config, run, whole):
    def full(parts): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has …')
    with pytest.raises(MemoryError, match=r'lower images_per_batch \(now 4\) and raise accumulate \(now 2\).*not lost.*allocate 20.00 GiB'):
        breaks(run, config, 8, full).fit()
    assert ends_as(whole, run, config)


LIMITED = """
import re, resource, sys
from pathlib import Path
from caption_nb.config import Config
from caption_nb.training import Trainer
trainer = Trainer(Config.load(sys.argv[1] + '/config.json'), sys.argv[1], quiet=True).prepare()
now = int(re.search(r'VmSize:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])*1024
resource.setrlimit(resource.RLIMIT_AS, (now + (500 << 20),)*2)
trainer.fit()
"""


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads /proc')
def test_out_of_memory_in_earnest(config, tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    (run/'config.json').write_text(dataclasses.replace(config, attention_dim=30_000, images_per_batch=33, captions_per_image=5).to_json())
    done = subprocess.run([sys.executable, '-c', LIMITED, str(run)], env=os.environ | dict(OMP_NUM_THREADS='1'),
                          capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith('MemoryError: out of memory: lower images_per_batch (now 33)'), done.stderr[-2000:]
    assert verify(run/'checkpoints'/'last') == []


def test_full_disk(config, run, whole, tmp_path):
    "A real one of a few hundred kilobytes; once there is space again, the run goes on"
    disk = tmp_path/'disk'
    disk.mkdir()
    size = sum(p.stat().st_size for p in (run/'checkpoints').rglob('*') if p.is_file())
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size + 60_000}', 'none', str(disk)], capture_output=True).returncode:
        pytest.skip('may not mount a small disk here')
    try:
        shutil.copytree(run, disk/'run')
        with pytest.raises(OSError, match='(last|best) could not be written.*(the one before is intact|no earlier one).*Free some space') as e:
            Trainer(config, disk/'run', quiet=True).fit()
        assert e.value.errno == errno.ENOSPC
        last = disk/'run'/'checkpoints'/'last'
        assert verify(last) == [] and checkpoint_step(last) == 7
        shutil.copytree(disk/'run', tmp_path/'moved')
    finally: subprocess.run(['umount', str(disk)], check=True)
    assert ends_as(whole, tmp_path/'moved', config)


def test_two_trainers(config, run):
    first, before = Trainer(config, run, quiet=True).prepare(), tree(run)
    with pytest.raises(RunBusy, match=f'is being trained by process {os.getpid()} on .*wait until it is done'):
        Trainer(config, run, quiet=True).prepare()
    second = subprocess.run([sys.executable, '-m', 'caption_nb.training', str(run)], capture_output=True, text=True)
    assert second.returncode == 1 and f'is being trained by process {os.getpid()}' in second.stderr.splitlines()[-1]
    assert tree(run) == before
    first.lock.release()


# ---- and on the command line ------------------------------------------------------------------------------------

@pytest.mark.parametrize('fault, message', [('data', 'data: other content than then'), ('newer', 'newer caption_nb (version 9.0'),
                                            ('busy', 'is being trained by process')])
def test_train_resume_says_so(fault, message, config, run, tmp_path):
    "caption-nb train --resume: exit code 1, the message and how to go on, on stderr; and all is as before"
    saved = json.loads((run/'config.json').read_text())
    photos = Path(config.data)
    original, lock = (photos/'scenes.json').read_text(), RunLock(run)
    try:
        if fault == 'data': change_captions(photos)
        if fault == 'newer': newer(run/'checkpoints'/'last')
        if fault == 'busy': lock.acquire()
        before = tree(run)
        command = [sys.executable, '-m', 'caption_nb.cli', 'train', '--resume', str(run)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    finally:
        (photos/'scenes.json').write_text(original)
        lock.release()
    assert done.returncode == 1, (done.stdout + done.stderr)[-2000:]
    assert message in done.stderr and f'caption-nb train --resume {run}' in done.stderr
    assert tree(run) == before and json.loads((run/'config.json').read_text()) == saved
