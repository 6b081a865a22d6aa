"What a run costs: seconds that add up, memory with its peak, energy that is measured or None; event files that TensorBoard reads back"
import gc
import json
import subprocess
import sys
import threading
import time
import timeit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb import meters
from caption_nb.meters import (EventFiles, GpuEnergy, Meter, ProcessorEnergy, Stopwatch, cost_lines, cost_summary, event_values, memory_use,
                               merge_states)


class Clock:
    "A clock that is turned by hand"
    def __init__(self): self.now = 100.

    def __call__(self): return self.now


# ---------------------------------------------------------------------- time
KINDS = ('training', 'evaluation', 'checkpoint', 'waiting')
TREES = st.recursive(st.floats(0, 100), lambda inner: st.tuples(st.sampled_from(KINDS), st.lists(inner, max_size=4)), max_leaves=20)


@given(st.lists(TREES, max_size=6))
def test_the_dials_add_up_to_the_wall_clock(work):
    "Whatever is nested in whatever: every second goes to the innermost kind that is open"
    clock, expected = Clock(), {}
    watch = Stopwatch(clock)

    def do(part, kind='other'):
        if isinstance(part, float):
            clock.now += part
            expected[kind] = expected.get(kind, 0.) + part
            return
        with watch.time(part[0]):
            for inner in part[1]: do(inner, part[0])
    for part in work: do(part)
    found = watch.read()
    assert sum(found.values()) == pytest.approx(clock.now - 100)
    for kind in {*found, *expected}: assert found.get(kind, 0.) == pytest.approx(expected.get(kind, 0.), abs=1e-9), kind


def test_reading_in_the_middle_changes_nothing():
    clock = Clock()
    watch = Stopwatch(clock)
    with watch.time('training'):
        clock.now += 3
        assert watch.read() == dict(training=3, other=0)
        assert watch.read() == dict(training=3, other=0)
        clock.now += 2
    assert watch.read() == dict(training=5, other=0)


def test_added_seconds_are_taken_from_the_kind_that_is_open():
    clock = Clock()
    watch = Stopwatch(clock)
    with watch.time('training'):
        clock.now += 10
        watch.add('waiting', 4)     # the last four of them
    assert watch.read() == dict(waiting=4, training=6, other=0)
    clock.now += 5
    watch.add('evaluation', 5)
    assert watch.read() == dict(waiting=4, training=6, evaluation=5, other=0)


def test_an_error_closes_its_block():
    clock = Clock()
    watch = Stopwatch(clock)
    with pytest.raises(KeyboardInterrupt), watch.time('training'):
        clock.now += 1
        with watch.time('checkpoint'):
            clock.now += 2
            raise KeyboardInterrupt
    clock.now += 4
    assert watch.read() == dict(training=1, checkpoint=2, other=4) and not watch.open


def test_a_step_pays_less_than_two_microseconds():
    meter = Meter()

    def block():
        with meter.time('training'): pass
    assert min(timeit.repeat(block, number=2000, repeat=50))/2000 < 2e-6
    assert min(timeit.repeat(lambda: meter.add('waiting', 1e-3), number=2000, repeat=50))/2000 < 2e-6


# ---------------------------------------------------------------------- memory
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_memory_now_and_at_its_peak():
    before = memory_use()
    block = bytearray(80_000_000)
    for i in range(0, len(block), 4096): block[i] = 1
    held = memory_use()
    del block
    after = memory_use()
    assert held['resident_MB'] > before['resident_MB'] + 70 and after['resident_MB'] < held['resident_MB'] - 70
    assert after['peak_MB'] >= held['resident_MB'] - 2 and set(after) == {'resident_MB', 'peak_MB'}


def test_memory_without_proc(monkeypatch):
    def missing(self): raise FileNotFoundError(self)
    monkeypatch.setattr(meters.Path, 'read_bytes', missing)
    found = memory_use('cuda:0')       # no GPU in use either
    assert set(found) <= {'peak_MB'} and all(v > 1 for v in found.values())


# ---------------------------------------------------------------------- energy
def powercap(root, zones: dict, most=1_000_000):
    for zone, (name, value) in zones.items():
        (root/zone).mkdir(exist_ok=True)
        for file, content in (('name', name), ('energy_uj', value), ('max_energy_range_uj', most)): (root/zone/file).write_text(f'{content}\n')


@given(st.lists(st.integers(0, 999_999), min_size=1, max_size=20), st.integers(0, 999_999))
@settings(max_examples=20, deadline=None)
def test_counters_that_go_round(tmp_path_factory, used, start):
    "However often it goes round, as long as it is read once in each round"
    root, total = tmp_path_factory.mktemp('powercap'), start
    powercap(root, {'intel-rapl:0': ('package-0', start)})
    processor = ProcessorEnergy(root)
    for microjoules in used:
        total += microjoules
        powercap(root, {'intel-rapl:0': ('package-0', total % 1_000_000)})
        processor.sample()
    assert processor.joules == pytest.approx(sum(used)/1e6)


def test_only_what_is_not_counted_elsewhere_is_added(tmp_path):
    names = {'intel-rapl:0': 'package-0', 'intel-rapl:0:0': 'core', 'intel-rapl:0:1': 'uncore', 'intel-rapl:0:2': 'dram',
             'intel-rapl:1': 'package-1', 'intel-rapl:1:0': 'dram', 'intel-rapl:2': 'psys', 'intel-rapl-mmio:0': 'package-0'}
    powercap(tmp_path, {z: (n, 0) for z, n in names.items()})
    processor = ProcessorEnergy(tmp_path)
    powercap(tmp_path, {z: (n, 10**i) for i, (z, n) in enumerate(names.items())}, most=10**9)
    processor.sample()
    assert processor.joules*1e6 == pytest.approx(1 + 1000 + 10_000 + 100_000)


def test_unreadable_counters_are_none_with_the_reason(tmp_path, monkeypatch):
    assert ProcessorEnergy(tmp_path).joules is None and 'no energy counters' in ProcessorEnergy(tmp_path).why
    powercap(tmp_path, {'intel-rapl:0': ('package-0', 5)})
    processor = ProcessorEnergy(tmp_path)
    (tmp_path/'intel-rapl:0'/'energy_uj').write_text('')
    processor.sample(); processor.sample()
    assert processor.joules is None and 'invalid literal' in processor.why
    def refused(zone): raise PermissionError(13, 'Permission denied', str(zone))
    monkeypatch.setattr(meters, '_microjoules', refused)
    assert ProcessorEnergy(tmp_path).joules is None and 'only root' in ProcessorEnergy(tmp_path).why


def test_power_of_a_gpu_is_integrated():
    clock, answers = Clock(), iter([100., 300., None, None, 300., None, None, None, 300.])
    gpu = GpuEnergy('cuda:0', lambda device: next(answers), clock)
    def after(seconds): clock.now += seconds; gpu.sample(); return gpu.joules
    assert after(10) == 2000
    assert after(10) == after(10) == 2000 and after(10) == 2000 + 30*300    # two answers failed: bridged
    assert after(1) == after(1) == 11_000 and after(1) is None              # three: nobody knows
    assert after(1) is None and 'stopped telling' in gpu.why


def test_nvidia_smi_is_asked_for_the_right_gpu(monkeypatch):
    import torch
    from types import SimpleNamespace
    asked = []
    def smi(command, **kw): asked.append(command); return SimpleNamespace(stdout=answer)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(uuid='1234-abcd'))
    monkeypatch.setattr(subprocess, 'run', smi)
    for answer, watts in (('312.45\n', 312.45), ('[N/A]\n', None), ('', None)): assert meters.watts_by_smi('cuda:1') == watts
    assert asked[0][:3] == ['nvidia-smi', '-i', 'GPU-1234-abcd']


def test_power_by_torch(monkeypatch):
    import torch
    monkeypatch.setattr(torch.version, 'cuda', '12.8')
    monkeypatch.setattr(torch.cuda, 'power_draw', lambda device: 250_000)
    assert meters.watts_by_torch('cuda') == 250.
    gpu = GpuEnergy('cuda')
    assert gpu.joules == 0. and gpu.watts is meters.watts_by_torch
    def absent(device): raise ModuleNotFoundError('pynvml')
    monkeypatch.setattr(torch.cuda, 'power_draw', absent)
    monkeypatch.setattr(meters, 'watts_by_smi', lambda device: 200.)
    assert meters.watts_by_torch('cuda') is None and GpuEnergy('cuda').power == 200.


# ---------------------------------------------------------------------- the meter
def threads(): return [t for t in threading.enumerate() if t.name == 'energy']


def test_the_thread_counts_and_ends_with_the_meter(monkeypatch):
    monkeypatch.setattr(meters, 'watts_by_torch', lambda device: 3600.)
    before = len(threads())
    meter = Meter('cuda:0', processor=False, every=0.01)
    assert len(threads()) == before + 1
    end = time.monotonic() + 20
    while meter.sources['GPU'].joules == 0 and time.monotonic() < end: time.sleep(0.01)
    assert meter.sources['GPU'].joules > 0 and meter.energy > 0
    del meter; gc.collect()
    while len(threads()) > before and time.monotonic() < end: time.sleep(0.01)
    assert len(threads()) == before
    meter = Meter('cuda:0', processor=False, every=0.01)
    meter.close()
    while len(threads()) > before and time.monotonic() < end: time.sleep(0.01)
    assert len(threads()) == before


def test_nothing_to_measure_no_thread(monkeypatch, tmp_path):
    monkeypatch.setattr(meters.ProcessorEnergy, '__init__', lambda self: self.__dict__.update(joules=None, why='none here', zones={}))
    before = len(threads())
    meter = Meter()
    assert len(threads()) == before and meter.energy is None
    assert cost_lines(meter.summary())[-1] == '- Energy: processor not measured: none here'


class Joules:
    def __init__(self, joules, why=''): self.joules, self.why = joules, why

    def sample(self): pass


def made(seconds, joules, clock=None, **kw):
    clock = clock or Clock()
    meter = Meter(clock=clock, **kw)
    meter.sources = {name: Joules(j, '' if j is not None else f'no {name}') for name, j in joules.items()}
    with meter.time('training'): clock.now += seconds
    return meter


def test_attempts_add_up():
    import torch, io
    state = made(100, dict(processor=3600.)).state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer); buffer.seek(0)
    for back in (json.loads(json.dumps(state)), torch.load(buffer, weights_only=True)):
        meter = made(50, dict(processor=1800.))
        meter.load_state_dict(back)
        s = meter.summary(devices=4)
        assert s['attempts'] == 2 and s['total_seconds'] == 150 and s['seconds']['training'] == 150 and meter.energy == 1.5
        assert s['device_hours'] == pytest.approx(4*150/3600, abs=1e-6)
        third = made(1, dict(processor=0.))
        third.load_state_dict(meter.state_dict())
        assert third.summary()['attempts'] == 3 and third.summary()['total_seconds'] == 151
    assert state['memory']['peak_MB'] > 1


def test_energy_that_is_not_measured_everywhere_is_no_number():
    meter = made(50, dict(processor=None, GPU=7200.))
    s = meter.summary()
    assert s['energy_Wh'] is None and s['energy_by'] == dict(GPU=2.) and s['not_measured'] == dict(processor='no processor')
    assert cost_lines(s)[-1] == '- Energy: GPU 2 Wh; processor not measured: no processor'
    later = made(50, dict(processor=10., GPU=7200.))
    later.load_state_dict(meter.state_dict())
    assert later.energy is None and later.summary()['energy_by'] == dict(GPU=4.)
    assert cost_summary(made(1, {}).state_dict())['energy_Wh'] is None
    assert cost_lines(made(1, {}).summary())[-1] == '- Energy: not measured'


def test_ranks_are_added_except_for_their_clocks():
    states = [made(100, j).state_dict() for j in (dict(processor=3600., GPU=3600.), dict(GPU=3600.), dict(processor=3600., GPU=None))]
    states[1]['memory'] = dict(peak_MB=1e6, cuda_peak_MB=7.)
    two = cost_summary(merge_states(states[:2]), devices=2)
    assert two['total_seconds'] == 100 and two['energy_Wh'] == 3. and two['peak_memory_MB'] == 1e6 and two['peak_cuda_MB'] == 7.
    three = cost_summary(merge_states(states), devices=3)
    assert three['energy_Wh'] is None and three['energy_by'] == dict(processor=2.) and three['attempts'] == 1
    assert merge_states(states[:1]) == states[0]


def test_the_section_says_what_counts():
    clock = Clock()
    meter = made(3600, dict(processor=3.6e6), clock)
    with meter.time('evaluation'): clock.now += 300
    with meter.time('checkpoint'): clock.now += 100
    lines = meter.lines(json.loads(json.dumps(meter.summary(devices=2))) | dict(peak_memory_MB=2048.3))
    assert lines == ['## Cost', '', '- 2.22 device-hours: 1 h 06 min on 2 devices',
                     '- Time: training 90.0%, evaluation 7.5%, checkpoint 2.5%, other 0.0%',
                     '- Peak memory of a process: 2,048 MB', '- Energy: processor 1,000 Wh']


def test_import_is_light():
    code = "import sys, caption_nb.meters as m; m.memory_use('cuda'); m.Meter().summary(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


# ---------------------------------------------------------------------- TensorBoard
LINE = dict(step=10, epoch=.5, seconds=1., loss=2., lr=1e-3, encoder_lr=1e-5, grad_norm=1.5, captions_per_second=800., memory_MB=900., of=40)
DEV = dict(step=20, epoch=1, seconds=2., dev=dict(CIDEr=.5, Bleu_4=.2), dev_loss=1.5, best=True, beam=1, words=9.5, signature='BLEU|…',
           references={'a.jpg': 'a dog'})


def test_values_of_a_line():
    assert event_values(LINE) == dict(epoch=.5, loss=2., lr=1e-3, encoder_lr=1e-5, grad_norm=1.5, captions_per_second=800., memory_MB=900.)
    assert event_values(DEV) == {'dev/CIDEr': .5, 'dev/Bleu_4': .2, 'dev/loss': 1.5, 'dev/words': 9.5, 'references': '- `a.jpg`: a dog'}
    assert event_values(dict(step=3, changed=dict(epochs=[2, 3]))) == dict(changed='- `epochs`: 2 → 3')


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()['scalars']}, events.Tags()['tensors']


def test_event_files_are_read_back(tmp_path):
    pytest.importorskip('tensorboard')
    with EventFiles(tmp_path/'events') as events:
        for row in (LINE, DEV, dict(LINE, step=30, loss=float('nan')), dict(step=30, changed=dict(lr=[1, 2]))): events.write(row)
    found, texts = scalars(tmp_path/'events')
    assert [s for s, _ in found['loss']] == [10, 30] and found['loss'][0][1] == 2. and found['loss'][1][1] != found['loss'][1][1]
    assert found['dev/CIDEr'] == [(20, .5)] and found['dev/loss'] == [(20, 1.5)] and found['lr'][0][1] == pytest.approx(1e-3)
    assert sorted(texts) == ['changed/text_summary', 'references/text_summary']


def test_steps_after_the_checkpoint_are_forgotten(tmp_path):
    "A kill at step 50, a checkpoint at 20, and again: what is read back has no step twice"
    pytest.importorskip('tensorboard')
    for attempt, (after, steps) in enumerate([(None, range(10, 60, 10)), (20, range(30, 80, 10)), (70, range(80, 100, 10))]):
        with EventFiles(tmp_path, after=after) as events:
            for step in steps: events.write(dict(LINE, step=step, loss=attempt))
    assert scalars(tmp_path)[0]['loss'] == [(10, 0), (20, 0), (30, 1), (40, 1), (50, 1), (60, 1), (70, 1), (80, 2), (90, 2)]


def test_without_the_package_the_message_says_what_to_do(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.startswith(('torch.utils.tensorboard', 'tensorboard'))]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'tensorboard', None)
    with pytest.raises(ImportError, match='pip install tensorboard'): EventFiles(tmp_path/'events')
    assert not (tmp_path/'events').exists()
