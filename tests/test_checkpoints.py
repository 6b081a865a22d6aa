"Checkpoints: kills at every operation, full disks, flipped bits, newer formats, writing in the background, and the lock of a run"
import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import caption_nb.basics as basics
import caption_nb.checkpoints as checkpoints
from caption_nb.checkpoints import (CHECKPOINT_FILES, CHECKSUMS, FORMAT, STATE, CheckpointError, CheckpointWriter, RunBusy, RunLock,
                                    checkpoint_step, checkpoint_weights, find_checkpoint, generations, newest_sound, random_state,
                                    read_state, recover_checkpoint, sealed, set_random_state, snapshot, state_bytes, unsealed, verify,
                                    weight_bytes, write_checkpoint)

pytestmark = pytest.mark.usefixtures('one_thread')
needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system cannot fork')


def content(step: int, size: int = 300, encoder: Path | None = None) -> dict[str, bytes | Path]:
    "A checkpoint of `step`, with about `size` numbers"
    files = {n: json.dumps(dict(step=step)).encode() for n in CHECKPOINT_FILES}
    own = {} if encoder else {'encoder.w': torch.ones(2)}
    files['model.safetensors'] = weight_bytes({'decoder.w': torch.full((size,), float(step))} | own)
    return files | {STATE: state_bytes(dict(step=step))} | ({'encoder.safetensors': encoder} if encoder else {})


def steps(last: Path) -> list[int]: return [checkpoint_step(p) for p in generations(last)]


def names(folder: Path) -> list[str]: return sorted(p.name for p in folder.iterdir())


def child(work) -> int:
    "Do `work` in a fork; its pid"
    if pid := os.fork(): return pid
    try: work(); os._exit(0)
    except BaseException: traceback.print_exc(); os._exit(1)
    finally: os._exit(2)


def ended(pid: int) -> int: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying(work, operation: int) -> int:
    "Do `work` in a process that is killed right before its n-th operation on files; 0 if it ends before"
    def run():
        count, fsync = 0, os.fsync
        def step(event='os.fsync', args=()):
            nonlocal count
            count += event in ('open', 'os.mkdir', 'os.link', 'os.fsync', 'os.rename', 'os.remove', 'os.rmdir')
            if count > operation and event != 'os.kill': os.kill(os.getpid(), signal.SIGKILL)
        def sync(fd): step(); fsync(fd)
        os.fsync = sync
        sys.addaudithook(step)
        work()
    return ended(child(run))


# Kills

@needs_fork
@pytest.mark.parametrize('keep', [1, 2, 3])
def test_a_kill_between_any_two_operations_leaves_a_sound_checkpoint(tmp_path, keep):
    "Die at each operation in turn, and again while recovering; what is there is old or new, whole, and no older than it must be"
    killed, encoder, new = 0, tmp_path/'encoder.safetensors', content(9, encoder=tmp_path/'encoder.safetensors')
    encoder.write_bytes(weight_bytes({'encoder.w': torch.ones(99)}))
    for operation in range(1000):
        last = tmp_path/str(operation)/'last'
        for step in range(1, 4): write_checkpoint(last, content(step, encoder=encoder), keep)
        status = dying(lambda: write_checkpoint(last, new, keep), operation)
        assert verify(find_checkpoint(last)) == []   # for those who only read
        if status == 0: break
        assert status == -signal.SIGKILL
        for again in (operation % 5, operation % 3): dying(lambda: newest_sound(last), again)
        assert newest_sound(last) == last and verify(last) == []
        there, old = steps(last), [3, 2, 1][:keep]
        assert there in (old, [9, *old], [9, *old][:keep]) and len(names(last.parent)) == len(there)
        write_checkpoint(last, content(10), keep)
        assert steps(last) == [10, *there][:keep] and len(names(last.parent)) == keep
        shutil.rmtree(last.parent)
        killed += 1
    assert killed > 15 and steps(last) == [9, 3, 2][:keep]


@needs_fork
def test_ten_kills_of_a_process_that_writes_in_a_loop(tmp_path):
    "What was reported as written is never lost, steps only rise, and nothing needs a warning"
    last, seen, rng = tmp_path/'checkpoints'/'last', 0, random.Random(0)
    def train(pipe):
        step = checkpoint_step(last) or 0
        with CheckpointWriter() as writer:
            while True:
                step += 1
                writer.submit(last, lambda s=step: content(s, 50_000), keep=2)
                writer.wait()
                os.write(pipe, step.to_bytes(4, 'big'))
    for _ in range(10):
        done, pipe = os.pipe()
        pid = child(lambda: train(pipe))
        os.close(pipe)
        promised = int.from_bytes(os.read(done, 4), 'big')   # let it get past one more
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        while word := os.read(done, 4): promised = int.from_bytes(word, 'big')
        os.close(done)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert newest_sound(last) == last
        assert checkpoint_step(last) in (promised, promised + 1) and promised > seen
        seen = checkpoint_step(last)
        assert torch.equal(checkpoint_weights(last)['decoder.w'], torch.full((50_000,), float(seen)))
        assert steps(last)[:2] == [seen, seen - 1][:seen]


def test_checkpoints_stay_as_many_as_asked(tmp_path):
    last = tmp_path/'last'
    for step in range(1, 6): write_checkpoint(last, content(step), keep=3)
    assert steps(last) == [5, 4, 3] and names(tmp_path) == ['last', 'last-1', 'last-2']
    write_checkpoint(last, content(6), keep=2)
    assert steps(last) == [6, 5] and names(tmp_path) == ['last', 'last-1']
    write_checkpoint(last, content(7))
    assert steps(last) == [7] and names(tmp_path) == ['last']
    for folder in ('last-x', 'lasting', 'last-01', 'last.damaged-1'): (tmp_path/folder).mkdir()
    (tmp_path/'last-1').write_text('a file')
    assert generations(last) == [last]


def test_what_an_older_program_left_is_recovered(tmp_path):
    write_checkpoint(tmp_path/'last', content(1)).rename(tmp_path/'last.old')
    (tmp_path/'.last.new').mkdir()
    assert find_checkpoint(tmp_path/'last') == tmp_path/'last.old'
    assert checkpoint_step(recover_checkpoint(tmp_path/'last')) == 1 and names(tmp_path) == ['last']
    write_checkpoint(tmp_path/'other', content(0)).rename(tmp_path/'last.old')
    assert checkpoint_step(recover_checkpoint(tmp_path/'last')) == 1 and names(tmp_path) == ['last']


# Full disks

@pytest.mark.parametrize('before', [True, False])
@pytest.mark.parametrize('call, fail_at', [('fsync', 1), ('fsync', 4), ('fsync', 6), ('rename', 1), ('rename', 2)])
def test_an_error_at_any_place_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, call, fail_at, before):
    last, real, count = tmp_path/'last', getattr(os, call), 0
    if before: write_checkpoint(last, content(1))
    elif fail_at == 2: pytest.skip('there is only one rename')
    def full(*args):
        nonlocal count
        count += 1
        if count == fail_at: raise OSError(errno.ENOSPC, 'No space left on device')
        return real(*args)
    with monkeypatch.context() as m:
        m.setattr(os, call, full)
        says = 'No space left.*' + ('the one before is intact' if before else 'there is no earlier one') + '.*Free some space'
        with pytest.raises(OSError, match=says) as e: write_checkpoint(last, content(2))
    assert e.value.errno == errno.ENOSPC and steps(last) == [1]*before and len(names(tmp_path)) == before
    assert newest_sound(last) == (last if before else None)


@pytest.fixture
def small_disk(tmp_path) -> Path:
    "A disk of one megabyte"
    disk = tmp_path/'disk'
    disk.mkdir()
    if not shutil.which('mount'): pytest.skip('cannot mount a small disk: there is no mount')
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk], capture_output=True, text=True)
    if made.returncode: pytest.skip(f'cannot mount a small disk: {made.stderr.strip()}')
    yield disk
    subprocess.run(['umount', disk], check=True)


def test_a_disk_that_is_really_full(small_disk):
    last = small_disk/'checkpoints'/'last'
    for step in (1, 2): write_checkpoint(last, content(step, 60_000), keep=2)   # 240 kB each
    (small_disk/'photos').write_bytes(bytes(400_000))
    for _ in range(2):
        with pytest.raises(OSError, match='No space left.*the one before is intact.*Free some space'):
            write_checkpoint(last, content(3, 60_000), keep=2)
        assert names(last.parent) == ['last', 'last-1'] and steps(newest_sound(last)) == [2, 1] and verify(last) == []
    with CheckpointWriter() as writer:
        writer.submit(last, lambda: content(3, 60_000), keep=2)
        with pytest.raises(OSError, match='No space left'): writer.wait()
        (small_disk/'photos').unlink()
        writer.submit(last, lambda: content(3, 60_000), keep=2)
    assert steps(last) == [3, 2] and verify(last) == []


# Damage

@pytest.fixture(scope='module')
def sound(tmp_path_factory) -> Path:
    "Two checkpoints"
    last = tmp_path_factory.mktemp('sound')/'last'
    for step in (1, 2): write_checkpoint(last, content(step), keep=2)
    return last


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path: return tmp_path_factory.mktemp('place')


def damaged(sound: Path, place: Path, name: str, data: bytes) -> Path:
    "A copy of `sound` in which the newest has other `data` as the file `name`"
    shutil.rmtree(place)
    shutil.copytree(sound.parent, place)
    (place/'last'/name).write_bytes(data)
    return place/'last'


def check_damage(last: Path, name: str):
    "It is said of this file alone, in one warning, and the one before is used"
    (fault,) = verify(last)
    assert fault.startswith(name)
    with pytest.warns(UserWarning) as caught: assert newest_sound(last) == last
    assert len(caught) == 1
    for part in (fault, 'last-1, of step 1, is used instead', 'lost', 'kept as last.damaged-'): assert part in str(caught[0].message)
    assert steps(last) == [1] and verify(last) == [] and len(names(last.parent)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert newest_sound(last) == last   # said once


ANY_FILE = st.sampled_from([*CHECKPOINT_FILES, STATE, CHECKSUMS])


@settings(max_examples=60, deadline=None)
@given(name=ANY_FILE, where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_noticed(sound, place, name, where, bit):
    data = bytearray((sound/name).read_bytes())
    data[int(where*len(data))] ^= 1 << bit
    check_damage(damaged(sound, place, name, bytes(data)), name)


@settings(max_examples=30, deadline=None)
@given(name=ANY_FILE, where=st.floats(0, 1, exclude_max=True), zeros=st.booleans())
def test_a_file_that_is_cut_off_anywhere_is_noticed(sound, place, name, where, zeros):
    "Or whose end is zeros, as after a power cut"
    data = (sound/name).read_bytes()
    cut = data[:int(where*len(data))]
    if zeros: cut = cut + bytes(len(data) - len(cut))
    if cut == data: return
    last = damaged(sound, place, name, cut)
    if name != CHECKSUMS and not zeros: assert verify(last) == [f'{name} has {len(cut):,} bytes of {len(data):,}: it is cut off']
    check_damage(last, name)


@pytest.mark.parametrize('name', [*CHECKPOINT_FILES, STATE])
def test_a_missing_file_is_named(sound, place, name):
    last = damaged(sound, place, name, b'')
    (last/name).unlink()
    assert verify(last) == [f'{name} is missing']
    if name in CHECKPOINT_FILES:
        with pytest.raises(FileNotFoundError, match=f'last lacks {name}: it takes .* copy the whole folder'): find_checkpoint(last)
    check_damage(last, name)


def test_a_disk_error_is_damage(sound, place, monkeypatch):
    last = damaged(sound, place, STATE, (sound/STATE).read_bytes())
    def bad_sector(path):
        if path == last/STATE: raise OSError(errno.EIO, 'Input/output error')
        return basics.sha256_file(path)
    monkeypatch.setattr(checkpoints, 'sha256_file', bad_sector)
    assert verify(last) == [f'{STATE} cannot be read (Input/output error)']


def test_if_all_are_damaged_each_is_listed_and_none_is_touched(sound, place):
    last = damaged(sound, place, STATE, b'x')
    (place/'last-1'/'vocab.json').unlink()
    says = r'(?s)no checkpoint .*last is sound:.last: training.pt has 1 bytes.*\nlast-1: vocab.json is missing.*start a new run'
    with pytest.raises(CheckpointError, match=says): newest_sound(last)
    assert names(place) == ['last', 'last-1']
    assert newest_sound(place/'best') is None
    with pytest.raises(FileNotFoundError, match='no such checkpoint folder'): verify(place/'best')


def test_damaged_ones_of_the_same_second_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(time, 'strftime', lambda *a: '20300101-000000')
    for i in range(3):
        write_checkpoint(tmp_path/'last', {}).joinpath('mark').write_text(str(i))
        checkpoints.set_aside(tmp_path/'last')
    assert sorted((p/'mark').read_text() for p in tmp_path.iterdir()) == ['0', '1', '2']


def test_checkpoints_without_checksums_are_accepted_and_checked_as_far_as_can_be(sound, place):
    last = damaged(sound, place, 'x', b'')
    (last/'x').unlink()
    (last/CHECKSUMS).unlink()
    assert verify(last) == [] and newest_sound(last) == last and checkpoint_weights(last)
    for name in ('model.safetensors', 'config.json', STATE):
        whole = (last/name).read_bytes()
        (last/name).write_bytes(whole[:-5])
        assert [f.split()[0] for f in verify(last)] == [name]
        (last/name).write_bytes(whole)
    (last/STATE).write_bytes(whole.replace(b'step', b'stop', 1))
    assert 'training.pt is damaged' in verify(last)[0]
    (last/'vocab.json').unlink()
    assert 'vocab.json is missing' in verify(last)


def test_a_newer_format_is_refused_not_replaced(sound, place):
    last = damaged(sound, place, CHECKSUMS, sealed(dict(format=FORMAT + 1, version='7.1', files=dict(new='field'), extra=[1])))
    for read in (verify, newest_sound, find_checkpoint, checkpoint_weights):
        with pytest.raises(CheckpointError, match=rf'newer caption_nb \(version 7.1, checkpoint format {FORMAT + 1}\).*update'): read(last)
    assert names(place) == ['last', 'last-1']


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers())).filter(lambda d: 'seal' not in d))
def test_a_seal_keeps_what_it_seals(record): assert unsealed(sealed(record)) == record


@pytest.mark.parametrize('raw', [b'', b'[]', b'{}', b'1', b'{"seal": 1}', b'\xff', sealed({})[:-1] + b' }', sealed({}) + b'\n'])
def test_what_is_not_sealed_does_not_count(raw): assert unsealed(raw) is None


def test_checksums_do_not_reach_out_of_the_folder(sound, place):
    files = {'../last-1/config.json': dict(sha256='0', size=1)}
    assert verify(damaged(sound, place, CHECKSUMS, sealed(dict(format=FORMAT, version='0', files=files)))) == [f'{CHECKSUMS} is damaged']


# Shared files

def test_a_shared_file_is_linked_and_hashed_once(tmp_path, monkeypatch):
    encoder, hashed = tmp_path/'encoder.safetensors', []
    encoder.write_bytes(weight_bytes({'encoder.w': torch.ones(1000)}))
    monkeypatch.setattr(checkpoints, 'sha256_file', lambda path: hashed.append(path) or basics.sha256_file(path))
    for step in (1, 2, 3): write_checkpoint(tmp_path/'last', content(step, encoder=encoder), keep=2)
    assert hashed == [encoder] and (tmp_path/'last'/'encoder.safetensors').samefile(encoder) and encoder.stat().st_nlink == 3
    assert verify(tmp_path/'last') == []
    basics.atomic_write(encoder, weight_bytes({'encoder.w': torch.zeros(1000)}))   # of the same size, at almost the same time
    write_checkpoint(tmp_path/'last', content(4, encoder=encoder), keep=2)
    assert verify(tmp_path/'last') == verify(tmp_path/'last-1') == []
    assert checkpoint_weights(tmp_path/'last')['encoder.w'].sum() == 0 and checkpoint_weights(tmp_path/'last-1')['encoder.w'].sum() == 1000


def test_where_links_are_impossible_it_is_copied(tmp_path, monkeypatch):
    encoder = tmp_path/'encoder.safetensors'
    encoder.write_bytes(weight_bytes({'encoder.w': torch.ones(10)}))
    def refuse(*a): raise OSError(errno.EXDEV, 'Invalid cross-device link')
    monkeypatch.setattr(os, 'link', refuse)
    last = write_checkpoint(tmp_path/'last', content(1, encoder=encoder))
    assert not (last/'encoder.safetensors').samefile(encoder) and verify(last) == []
    encoder.unlink()
    with pytest.raises(OSError, match='could not be written.*the one before is intact'): write_checkpoint(last, content(2, encoder=encoder))
    assert steps(last) == [1]


def test_weights_are_compared_with_their_checksums(tmp_path):
    encoder = tmp_path/'encoder.safetensors'
    encoder.write_bytes(weight_bytes({'encoder.w': torch.ones(10)}))
    last = write_checkpoint(tmp_path/'last', content(1, encoder=encoder))
    assert {n: t.sum().item() for n, t in checkpoint_weights(last).items()} == {'decoder.w': 300, 'encoder.w': 10}
    encoder.write_bytes(weight_bytes({'encoder.w': torch.zeros(10)}))   # in place: all its names see it
    with pytest.raises(CheckpointError, match='encoder.safetensors is damaged.*on purpose, delete checksums.json'): checkpoint_weights(last)
    (last/CHECKSUMS).unlink()
    assert checkpoint_weights(last)['encoder.w'].sum() == 0
    (last/'encoder.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='last lacks encoder.safetensors'): checkpoint_weights(last)
    (last/'encoder.safetensors').write_bytes(b'{')
    with pytest.raises(CheckpointError, match='encoder.safetensors is damaged'): checkpoint_weights(last)


def test_tied_and_strided_weights_can_be_stored(tmp_path):
    w = torch.randn(4, 6)
    last = write_checkpoint(tmp_path/'last', {'model.safetensors': weight_bytes({'encoder.a': w, 'encoder.b': w, 'encoder.t': w.T})})
    found = checkpoint_weights(last)
    assert torch.equal(found['encoder.b'], w) and torch.equal(found['encoder.t'], w.T)


def test_a_run_folder_means_its_best_checkpoint(tmp_path):
    best = write_checkpoint(tmp_path/'checkpoints'/'best', content(1))
    assert find_checkpoint(tmp_path) == find_checkpoint(str(best)) == best
    best.rename(best.with_name('best-1'))   # killed between two renames
    assert find_checkpoint(tmp_path) == best.with_name('best-1')
    with pytest.raises(FileNotFoundError, match='no such checkpoint folder'): find_checkpoint(tmp_path/'worst')


# Training state

def test_training_state_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self): return (os.system, (f'touch {tmp_path}/owned',))
    for raw in (pickle.dumps(Evil()), b'', b'PK\x03\x04'):
        (tmp_path/STATE).write_bytes(raw)
        with pytest.raises(CheckpointError, match='training.pt is damaged.*copy it again'): read_state(tmp_path)
    torch.save(Evil(), tmp_path/STATE)
    with pytest.raises(CheckpointError, match='training.pt is damaged'): read_state(tmp_path)
    assert not (tmp_path/'owned').exists() and checkpoint_step(tmp_path) is None
    (tmp_path/STATE).unlink()
    with pytest.raises(FileNotFoundError, match='lacks training.pt: it can caption, but not be resumed'): read_state(tmp_path)


def draw() -> list:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), np.random.randint(9), *torch.randn(3).tolist(),
            torch.rand(1).item(), torch.nn.functional.dropout(torch.ones(20)).tolist()]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), before=st.integers(0, 3))
def test_random_states_come_back_exactly(place, seed, before):
    "Through a file, also in the middle of a pair of Gaussian numbers"
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    for _ in range(before): random.gauss(0, 1), np.random.normal(), torch.randn(1)
    state = random_state()
    (place/STATE).write_bytes(state_bytes(state))
    first = draw()
    random.seed(), np.random.seed(), torch.seed()
    back = read_state(place)
    set_random_state(back)
    assert draw() == first
    set_random_state(back)
    again = random_state()
    assert again['python'] == state['python'] and again['numpy'][2:] == state['numpy'][2:]
    assert torch.equal(again['numpy'][1], state['numpy'][1]) and torch.equal(again['torch'], state['torch'])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_random_states_and_snapshots_of_gpus():
    live = dict(w=torch.randn(1000, device='cuda'))
    state, copied, first = random_state(), snapshot(live), torch.randn(5, device='cuda')
    assert copied['w'].device.type == 'cpu' and torch.equal(copied['w'], live['w'].cpu())
    live['w'].zero_()
    assert copied['w'].any()
    set_random_state(state)
    assert torch.equal(torch.randn(5, device='cuda'), first) and len(state['cuda']) == torch.cuda.device_count()


def test_a_state_of_another_machine_with_more_gpus():
    "Their states are passed over where there are none"
    here = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    set_random_state(random_state() | dict(cuda=[*here, torch.zeros(16, dtype=torch.uint8)]))


# In the background

def test_snapshot_is_a_copy_of_all(tmp_path):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    def train():
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    train()
    live = dict(model=layer.state_dict(), optimizer=optimizer.state_dict(), random=random_state(), numbers=[1, (2., None)],
                array=np.zeros(2), strided=torch.randn(2, 3).T)
    copied, before = snapshot(live), state_bytes(live)
    train()
    optimizer.param_groups[0]['lr'] = 7
    live['array'][0] = 1
    (tmp_path/STATE).write_bytes(state_bytes({n: v for n, v in copied.items() if n != 'array'}))
    back = read_state(tmp_path)
    assert state_bytes(live) != before and copied['array'][0] == 0 and back['optimizer']['param_groups'][0]['lr'] == 0.1
    assert back['optimizer']['state'][0]['step'] == 1 and not torch.equal(back['model']['weight'], layer.weight)
    assert back['numbers'] == [1, (2., None)] and torch.equal(back['strided'], live['strided'])
    assert not copied['model']['weight'].requires_grad


def test_training_goes_on_while_it_is_written(tmp_path):
    go, where = threading.Event(), []
    def slow(step):
        go.wait(10)
        where.append(threading.current_thread())
        return content(step)
    with CheckpointWriter() as writer:
        assert writer.wait() is None
        writer.submit(tmp_path/'last', lambda: slow(1), keep=3)
        assert names(tmp_path) == []   # submit has not waited
        go.set()
        for step in (2, 3): writer.submit(tmp_path/'last', lambda: slow(3), keep=3)   # these wait for each other
        assert writer.wait() == tmp_path/'last'
    assert len(generations(tmp_path/'last')) == 3 and threading.main_thread() not in where and len(set(where)) == 1


def test_errors_of_the_thread_surface_once_at_the_next_call(tmp_path, monkeypatch):
    (tmp_path/'file').touch()
    with CheckpointWriter() as writer:
        for ask in (writer.wait, lambda: writer.submit(tmp_path/'never', lambda: content(1))):
            writer.submit(tmp_path/'file'/'last', lambda: content(1))
            with pytest.raises(OSError, match='could not be written'): ask()
        assert writer.wait() is None and not (tmp_path/'never').exists()
        writer.submit(tmp_path/'last', lambda: 1/0)
        with pytest.raises(ZeroDivisionError): writer.wait()
        writer.submit(tmp_path/'last', lambda: content(2))
    assert steps(tmp_path/'last') == [2]
    with pytest.raises(OSError, match='could not be written'), CheckpointWriter() as writer: writer.submit(tmp_path/'file'/'last', dict)
    with pytest.raises(KeyError, match='first'), pytest.warns(UserWarning, match='could not be written'), CheckpointWriter() as writer:
        writer.submit(tmp_path/'file'/'last', dict)
        raise KeyError('first')


def test_an_interrupted_wait_can_be_waited_for_again(tmp_path):
    go = threading.Event()
    with CheckpointWriter() as writer:
        writer.submit(tmp_path/'last', lambda: go.wait(10) and content(1))
        timer = threading.Timer(0.2, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt): writer.wait()
        assert names(tmp_path) == []
        go.set()
    assert steps(tmp_path/'last') == [1]


def test_a_process_that_ends_finishes_what_it_writes(tmp_path):
    script = ('import sys, time; from caption_nb.checkpoints import *; writer = CheckpointWriter()\n'
              'writer.submit(sys.argv[1], lambda: time.sleep(0.3) or {"model.safetensors": bytes(100)})\nraise SystemExit(3)')
    assert subprocess.run([sys.executable, '-c', script, tmp_path/'last']).returncode == 3
    assert verify(tmp_path/'last') == [] and names(tmp_path) == ['last']


# One trainer a run

@needs_fork
def test_a_second_trainer_is_refused_until_the_first_is_dead(tmp_path):
    "Children that outlive a killed trainer do not keep its lock: neither forks nor programs"
    run, (done, pipe) = tmp_path/'runs'/'run', os.pipe()
    def hold():
        with RunLock(run):
            fork = child(lambda: time.sleep(60))
            program = subprocess.Popen(['sleep', '60'], close_fds=False)
            os.write(pipe, f'{fork} {program.pid}'.encode())
            time.sleep(60)
    pid = child(hold)
    orphans = [int(p) for p in os.read(done, 100).split()]
    try:
        with pytest.raises(RunBusy, match=rf'run is being trained by process {pid} on \S+ since 20.*wait until it is done; or stop it'):
            RunLock(run).acquire()
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        assert (run/'.lock').exists()
        with RunLock(run): pass
        assert names(run) == []
    finally:
        for orphan in orphans: os.kill(orphan, signal.SIGKILL)
        os.close(done), os.close(pipe)


@needs_fork
def test_a_child_that_ends_does_not_release_its_parents_lock(tmp_path):
    lock = RunLock(tmp_path).acquire()
    assert ended(child(lock.release)) == 0
    with pytest.raises(RunBusy): RunLock(tmp_path).acquire()
    lock.release()
    lock.release()   # harmless
    RunLock(tmp_path).acquire()   # nobody keeps it: it is given back
    RunLock(tmp_path).acquire()


@needs_fork
def test_of_many_that_come_at_once_one_at_a_time_gets_the_lock(tmp_path):
    "Four processes take and leave it; a counter without any other protection stays right"
    (tmp_path/'count').write_text('0')
    def work():
        for _ in range(50):
            while True:
                try: lock = RunLock(tmp_path).acquire(); break
                except RunBusy: time.sleep(0.0005)
            n = int((tmp_path/'count').read_text())
            (tmp_path/'count').write_text(str(n + 1))
            lock.release()
    assert [ended(pid) for pid in [child(work) for _ in range(4)]] == [0]*4
    assert (tmp_path/'count').read_text() == '200'


def test_without_locks_work_goes_on_with_one_warning(tmp_path, monkeypatch):
    def refuse(fd): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(basics, '_flock', refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        for _ in range(3):
            with RunLock(tmp_path): pass
    assert len(caught) == 1 and 'file system without locks' in str(caught[0].message)
