"""The notebooks in a real JupyterLab, in a real browser."""
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from browser import browser
from conftest import LONG, ROOT

pytest.importorskip('jupyterlab', reason="needs pip install -e '.[dev]'")
pytest.importorskip('playwright', reason="needs pip install -e '.[dev]'")

NOTEBOOKS = ['index.ipynb'] + [p.relative_to(ROOT).as_posix() for folder in ('nbs', 'nbs/experiments', 'nbs/tutorials', 'nbs/data_sets')
                               for p in sorted((ROOT/folder).glob('[0-9a-zA-Z]*.ipynb')) if not p.is_symlink()]
RUN_THROUGH = 'nbs/50_metrics.ipynb'
# of each kind one: the home page, most pictures, a page's own HTML, a form, a tutorial, a page on data; the others take minutes
FEW = ('index.ipynb', 'nbs/70_attention_views.ipynb', 'nbs/71_error_browser.ipynb', 'nbs/experiments/train.ipynb',
       'nbs/tutorials/what_the_numbers_mean.ipynb', 'nbs/data_sets/show_attend_tell.ipynb')
assert set(FEW) <= set(NOTEBOOKS), set(FEW) - set(NOTEBOOKS)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab on a copy of the notebooks, with settings of its own; gives its address, its token and the folder"
    folder, home = tmp_path_factory.mktemp('lab'), tmp_path_factory.mktemp('home')
    shutil.copytree(ROOT/'nbs', folder/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    for name in ('index.ipynb', 'settings.ini', 'pyproject.toml'): shutil.copy2(ROOT/name, folder/name)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    token, address = secrets.token_hex(16), f'http://127.0.0.1:{port}'
    environment = {k: v for k, v in os.environ.items() if not k.startswith(('JUPYTER', 'JPY_', 'PYTEST'))}
    environment |= {'JUPYTER_CONFIG_DIR': str(home/'config'), 'JUPYTER_DATA_DIR': str(home/'data'), 'JUPYTER_RUNTIME_DIR': str(home/'runtime'),
                    'IPYTHONDIR': str(home/'ipython'), 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'MPLBACKEND': ''}
    environment.pop('MPLBACKEND')   # the kernel's inline backend draws the figures
    log = (home/'lab.log').open('w')
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1',
                               f'--ServerApp.port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={token}',
                               f'--ServerApp.root_dir={folder}', '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'],
                              env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        for _ in range(120):
            if server.poll() is not None: break
            try:
                urllib.request.urlopen(f'{address}/api/status?token={token}', timeout=5).close()
                break
            except OSError: time.sleep(0.5)
        else: pytest.fail(f'JupyterLab did not answer:\n{(home/"lab.log").read_text()[-3000:]}')
        assert server.poll() is None, f'JupyterLab stopped:\n{(home/"lab.log").read_text()[-3000:]}'
        yield address, token, folder
    finally:
        server.terminate()   # it shuts its kernels down
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


@pytest.fixture(scope='module')
def page(lab, chromium):
    "One tab of Chromium"
    with browser(chromium) as context: yield context.new_page()


def open_notebook(page, lab, name: str):
    "Show notebook `name` alone, in a fresh workspace, and wait until its cells are there"
    address, token, _ = lab
    page.goto(f'{address}/doc/tree/{name}?token={token}&reset', wait_until='load')
    page.wait_for_selector('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell', timeout=60_000)


def ask(lab, path: str, method: str = 'GET'):
    "JupyterLab's answer to a request of its REST interface"
    request = urllib.request.Request(f'{lab[0]}/api/{path}', method=method, headers={'Authorization': f'token {lab[1]}'})
    with urllib.request.urlopen(request, timeout=30) as answer: return json.loads(answer.read() or 'null')


@pytest.fixture(autouse=True)
def end_kernels(lab):
    "One kernel at a time: each is a process with torch in it"
    yield
    for session in ask(lab, 'sessions'): ask(lab, f'sessions/{session["id"]}', 'DELETE')


def wait_for_kernel(page, lab, name: str):
    "Until the kernel of notebook `name` idles and the page talks to it: before that, Run All asks for a kernel instead"
    deadline, kernels = time.time() + 120, []
    while time.time() < deadline:
        kernels = [s['kernel'] for s in ask(lab, 'sessions') if s['path'] == name]
        if any(k['connections'] and k['execution_state'] == 'idle' for k in kernels): return page.wait_for_timeout(1000)
        page.wait_for_timeout(500)
    pytest.fail(f'the kernel of {name} did not start: {kernels}')


@pytest.mark.parametrize('name', [pytest.param(name, marks=() if name in FEW else LONG) for name in NOTEBOOKS])
def test_notebook_opens(page, lab, name):
    open_notebook(page, lab, name)
    expected = nbformat.read(lab[2]/name, 4)
    title = expected.cells[0].source.splitlines()[0].removeprefix('# ')
    page.wait_for_selector('.jp-Notebook h1')
    assert page.locator('.jp-Notebook h1').first.inner_text().rstrip('¶').strip() == re.sub('[`*]', '', title)
    assert page.locator('.jp-Notebook .jp-Cell').first.is_visible()
    assert page.locator('.jp-Dialog').count() == 0, page.locator('.jp-Dialog').first.inner_text()


def test_notebook_runs_through(page, lab):
    "Run All Cells from the menu; every cell is executed, none fails, and what is saved says so"
    name, path = RUN_THROUGH, lab[2]/RUN_THROUGH
    before = nbformat.read(path, 4)
    for cell in before.cells:
        if cell.cell_type == 'code': cell.outputs, cell.execution_count = [], None
    nbformat.write(before, path)
    open_notebook(page, lab, name)
    wait_for_kernel(page, lab, name)
    page.click('.lm-MenuBar-itemLabel:text-is("Run")')
    page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
    code = [c for c in before.cells if c.cell_type == 'code' and c.source.strip()]
    deadline = time.time() + 240
    while time.time() < deadline:   # what counts is what is saved, not what the window happens to show
        dialog = page.locator('.jp-Dialog')
        assert not dialog.count(), dialog.first.inner_text()
        page.keyboard.press('Control+s')
        page.wait_for_timeout(1500)
        try: after = nbformat.read(path, 4)
        except (json.JSONDecodeError, nbformat.reader.NotJSONError): continue   # caught it while it was being written
        done = [c for c in after.cells if c.cell_type == 'code' and c.source.strip()]
        failed = [o for c in done for o in c.outputs if o.output_type == 'error']
        assert not failed, failed[0].get('evalue')
        if len(done) == len(code) and all(c.execution_count for c in done): break
    else: pytest.fail(f'{sum(not c.execution_count for c in done)} of {len(code)} cells were not executed')
    assert any(c.outputs for c in done), 'nothing was shown'
    assert page.locator('.jp-Dialog').count() == 0


def test_link_to_the_home_page_opens(page, lab):
    "nbs/index.ipynb is a link: JupyterLab follows it"
    open_notebook(page, lab, 'nbs/index.ipynb')
    assert page.locator('.jp-Notebook h1').first.inner_text().startswith('caption_nb')
