"""Fixtures shared by every test. What a machine lacks is skipped with the reason, except where `CAPTION_NB_REQUIRE`
names it (`.ci/run` does: there a missing piece is a failure)."""
import os
import signal
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent/'shared'


def need(name: str, there: bool, reason: str):
    "Skip with `reason` if `name` is not there; fail instead if `CAPTION_NB_REQUIRE` lists `name`"
    if there: return
    if name in os.environ.get('CAPTION_NB_REQUIRE', '').split(','): pytest.fail(f'{name} is required here: {reason}')
    pytest.skip(reason)


LONG = pytest.mark.skipif(not os.environ.get('CAPTION_NB_LONG'), reason='takes minutes: CAPTION_NB_LONG=1 runs it, and .ci/run does')

SLOW = ('test_on_slurm', 'test_sweep_on_slurm', 'test_cluster_faults', 'test_gpu', 'test_jobs', 'test_cli', 'test_faults', 'test_slurm',
        'test_run_evaluation', 'test_docs', 'test_text', 'test_metrics', 'test_pretrained_metrics', 'test_meteor',
        'test_reduced_runs', 'test_features', 'test_encoders', 'test_doctor', 'test_array_layouts', 'test_convert', 'test_images')


def pytest_collection_modifyitems(items: list[pytest.Item]):
    "Files that take long come first: two workers then end together (the Makefile tells xdist to keep this order)"
    place = {f'{name}.py': i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.name, len(SLOW)))   # stable: else as collected


# A shell that starts tests in the background lets them ignore Ctrl-C, which some of them send
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='session')
def shared() -> Path:
    "The developers' folder of real data, beside the checkout"
    need('shared', SHARED.is_dir(), f'no {SHARED.name}/ beside the checkout: real data and reference scores live there')
    return SHARED


@pytest.fixture(scope='session')
def flickr8k(shared) -> Path: return shared/'data'/'flickr8k'


@pytest.fixture(scope='session')
def mobilenet(shared) -> Path: return shared/'weights'/'mobilenetv2_100_tf.safetensors'


@pytest.fixture(scope='session')
def java() -> str:
    "Path of a Java runtime, for the original metric tools"
    need('java', bool(shutil.which('java')), 'no java on PATH: the original caption metrics run on it')
    return shutil.which('java')


@pytest.fixture(scope='session')
def chromium() -> str:
    "Path of a real browser"
    found = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
    need('chromium', bool(found), 'no Chromium on PATH: browser tests drive a real one')
    return found


@pytest.fixture(scope='module')
def one_thread():
    "A second torch thread makes the small operations of tests slower, on a busy machine a hundred times"
    import torch   # here, not above: most tests need none of it
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    "A real SLURM of two nodes, without accounting, for the tests of a file; SLURM's commands here lead to it"
    yield from _cluster(tmp_path_factory)


@pytest.fixture(scope='module')
def accounted(tmp_path_factory):
    "The same with slurmdbd and MariaDB: sacct works"
    yield from _cluster(tmp_path_factory, accounting=True)


def _cluster(tmp_path_factory, **options):
    from cluster import Cluster, install_packages
    reason = install_packages(options.get('accounting', False))
    need('slurm', not reason, reason)
    with Cluster(tmp_path_factory.mktemp('slurm'), **options) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.env.items(): patch.setenv(name, value)
        yield started
