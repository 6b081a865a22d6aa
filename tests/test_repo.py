"""The repository as a whole: generated files, notebooks, packaging, home page."""
import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

settings = ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']

MODULE_NOTEBOOKS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
EXPERIMENTS = sorted((ROOT/'nbs'/'experiments').glob('*.ipynb'))
NOTEBOOKS = [*MODULE_NOTEBOOKS, *EXPERIMENTS, *(p for d in ('tutorials', 'data_sets') for p in sorted((ROOT/'nbs'/d).glob('*.ipynb'))), ROOT/'index.ipynb']
short = [p.relative_to(ROOT).as_posix() for p in NOTEBOOKS]


def module_of(path: Path) -> str:
    "What the notebook exports to"
    for cell in nbformat.read(path, 4).cells:
        if found := re.search(r'^#\|\s*default_exp\s+(\S+)', cell.source, re.M): return found[1]
    return ''


MODULES = {module_of(p): p for p in MODULE_NOTEBOOKS}


def files(folder: Path) -> dict[str, bytes]:
    "Every file below `folder`: relative name -> content"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def run(*command, cwd: Path, **environment) -> str:
    "Run a program of this environment; its output goes into the failure message"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, 'PATH': path, **environment})
    assert done.returncode == 0, f'{" ".join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    return done.stdout


@pytest.fixture(scope='module')
def clone(tmp_path_factory) -> Path:
    "A copy of what git would commit: the tests change nothing in the checkout itself"
    target = tmp_path_factory.mktemp('clone')
    try: listed = run('git', 'ls-files', '-co', '--exclude-standard', cwd=ROOT).splitlines()
    except (AssertionError, FileNotFoundError): pytest.skip('not a git checkout: nothing says which files belong to the project')
    for name in listed:
        source = ROOT/name
        if not (source.exists() or source.is_symlink()): continue   # deleted, not yet committed
        (target/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target/name, follow_symlinks=False)
    run('git', 'init', '-q', cwd=target)
    return target


# ---- generated files --------------------------------------------------------------------------------------------

def test_package_is_what_the_notebooks_say(clone):
    before = files(clone/settings['lib_path'])
    pyproject = (clone/'pyproject.toml').read_text()
    run('nbdev_export', cwd=clone)
    after = files(clone/settings['lib_path'])
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k) and '__pycache__' not in k)
    assert not changed, f'nbdev_export changes {changed}: run it and commit what it writes'
    assert (clone/'pyproject.toml').read_text() == pyproject
    stray = [k for k in after if k.endswith('.py') and not k.startswith('_') and k.removesuffix('.py') not in MODULES]
    assert not stray, f'{stray} come from no notebook'


def test_notebooks_are_clean(clone):
    before = files(clone/'nbs')
    run('nbdev_clean', cwd=clone)
    after = files(clone/'nbs')
    changed = sorted(k for k in before if before[k] != after.get(k))
    assert not changed, f'nbdev_clean changes {changed}: run it and commit what it writes'


def test_home_page_is_bridged_without_a_copy():
    link = ROOT/'nbs'/'index.ipynb'
    assert link.is_symlink() and os.readlink(link) == '../index.ipynb' and link.resolve() == (ROOT/'index.ipynb').resolve()


def test_nbdev_keeps_the_link(clone):
    link = clone/'nbs'/'index.ipynb'
    content = (clone/'index.ipynb').read_text('utf-8')
    dirty = nbformat.reads(content, 4)
    dirty.cells[0].metadata['collapsed'] = True
    nbformat.write(dirty, clone/'index.ipynb')
    run('nbdev_clean', cwd=clone)
    assert link.is_symlink() and (clone/'index.ipynb').read_text('utf-8') == content   # cleaned through the link


def test_readme_is_made_from_the_home_page():
    run(sys.executable, 'docs/readme.py', '--check', cwd=ROOT)
    text = (ROOT/'README.md').read_text('utf-8')
    assert '#|' not in text and 'data:image' not in text
    for address in re.findall(r'\]\(([^)#:]+)\)', text): assert (ROOT/address).exists(), f'README.md links to {address}'


# ---- notebooks --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('path', NOTEBOOKS, ids=short)
def test_notebook_form(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 300_000, 'committed notebooks stay under 300 kB: smaller figures, fewer of them'
    assert notebook.cells[0].source.startswith('# '), 'a notebook opens with an H1 title'
    assert re.search(r'^> \S', '\n'.join(c.source for c in notebook.cells[:2]), re.M), 'a `>` subtitle follows the title'
    errors = [c.source for c in notebook.cells for o in c.get('outputs', []) if o.output_type == 'error']
    assert not errors, f'saved with an error: {errors}'
    warned = [o.text for c in notebook.cells for o in c.get('outputs', []) if o.get('name') == 'stderr']
    assert not warned, f'saved with a warning, which names files of one machine: {warned}'


@pytest.mark.parametrize('path', MODULE_NOTEBOOKS, ids=[p.name for p in MODULE_NOTEBOOKS])
def test_module_notebook_teaches(path):
    cells = [c for c in nbformat.read(path, 4).cells if c.source.strip()]
    share = sum(c.cell_type == 'markdown' for c in cells)/len(cells)
    assert share >= 0.20, f'{share:.0%} of the cells are prose'
    for cell in cells:
        if cell.cell_type != 'code' or not re.match(r'\s*#\|\s*exporti?s?\b', cell.source): continue
        lines = sum(bool(line.strip()) for line in cell.source.splitlines()) - 1
        assert lines <= 45, f'an exported cell of {lines} lines:\n{cell.source[:200]}'
        body = ast.parse(cell.source).body
        imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom)) or ast.unparse(n).startswith('if TYPE_CHECKING:')]
        assert not imports or len(imports) == len(body), f'imports and other code in one cell:\n{cell.source[:200]}'


@pytest.mark.parametrize('path', EXPERIMENTS, ids=[p.name for p in EXPERIMENTS])
def test_parameters_cell_survives_cleaning(path, tmp_path):
    def parameter_cells(p): return [c for c in nbformat.read(p, 4).cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(parameter_cells(path)) == 1, 'papermill needs exactly one cell tagged `parameters`'
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy2(ROOT/name, tmp_path/name)
    (tmp_path/'nbs').mkdir()
    shutil.copy2(path, tmp_path/'nbs'/path.name)
    run('nbdev_clean', cwd=tmp_path)
    assert [c.source for c in parameter_cells(tmp_path/'nbs'/path.name)] == [c.source for c in parameter_cells(path)]


def test_there_is_an_experiment(): assert (ROOT/'nbs'/'experiments'/'train.ipynb') in EXPERIMENTS


# ---- the package ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', MODULES)
def test_imports_go_down_only(name):
    order = list(MODULES)
    tree = ast.parse((ROOT/settings['lib_path']/f'{name}.py').read_text('utf-8'))
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ''
            if node.level or module == settings['lib_name']: used |= {module.split('.')[0] or a.name for a in node.names} if module != settings['lib_name'] else {a.name for a in node.names}
            elif module.startswith(settings['lib_name'] + '.'): used.add(module.split('.')[1])
        if isinstance(node, ast.Import): used |= {a.name.split('.')[1] for a in node.names if a.name.startswith(settings['lib_name'] + '.')}
    used &= set(order)
    above = sorted(u for u in used - {name} if order.index(u) > order.index(name))
    assert not above, f'{name} imports {above}, which come later'


@pytest.mark.parametrize('name', MODULES)
def test_public_symbols_are_documented(name):
    module = importlib.import_module(f'{settings["lib_name"]}.{name}')
    for symbol in module.__all__:
        thing = getattr(module, symbol)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)) or thing.__module__ != module.__name__: continue
        doc = inspect.getdoc(thing) or ''
        assert doc and not doc.startswith(f'{symbol}('), f'{name}.{symbol} has no docstring'
        assert vars(thing).get('__doc__') if inspect.isclass(thing) else True, f'{name}.{symbol} has no docstring of its own'


def test_nothing_private_is_in_the_project(clone):
    "No home folders, no names of machines, nothing of the developers' folder except in tests"
    home = re.compile(r'/(?:home|Users)/[a-z][\w.-]*/|/root/')
    beside = re.compile(r'\.\./shared')
    for path in sorted(clone.rglob('*')):
        name = path.relative_to(clone).as_posix()
        if path.is_symlink() or not path.is_file() or name.startswith(('.git/', 'LICENSE')) or '__pycache__' in name: continue
        try: text = path.read_text('utf-8')
        except UnicodeDecodeError: continue
        if name.startswith('tests/'): continue
        if found := beside.search(text): pytest.fail(f'{name} mentions {found[0]}')
        if found := home.search(text): pytest.fail(f'{name} holds a path of one machine: {text[max(0, found.start() - 40):found.end() + 40]!r}')


def test_no_template_text():
    text = (ROOT/'settings.ini').read_text() + (ROOT/'setup.py').read_text()
    for left in ('TODO', 'FIXME', 'Your Name', 'nbdev_template', 'some description', 'github.com/fastai', 'Jeremy'):
        assert left.lower() not in text.lower(), f'template text left: {left}'


# ---- the wheel --------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def wheel(clone, tmp_path_factory) -> Path:
    "The project's wheel, built from what git would commit"
    out = tmp_path_factory.mktemp('wheel')
    run(sys.executable, '-m', 'pip', 'wheel', '.', '--no-deps', '--no-build-isolation', '--quiet', '-w', str(out), cwd=clone)
    return next(out.glob('*.whl'))


def test_wheel_holds_modules_and_experiments(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for module in MODULES: assert f'{settings["lib_name"]}/{module}.py' in names
    for path in EXPERIMENTS: assert f'{settings["lib_name"]}/experiments/{path.name}' in names
    for name in ('job.sh', *(f'profiles/{path.name}' for path in (ROOT/'slurm'/'profiles').glob('*.toml'))):
        assert f'{settings["lib_name"]}/slurm/{name}' in names
    assert any(n.endswith('LICENSE') for n in names)
    strange = [n for n in names if not n.startswith((settings['lib_name'] + '/', settings['lib_name'] + '-'))]
    assert not strange, f'the wheel installs {strange} beside the package'


def test_wheel_metadata_is_real(wheel):
    archive = zipfile.ZipFile(wheel)
    meta = Parser().parsestr(archive.read(next(n for n in archive.namelist() if n.endswith('METADATA'))).decode('utf-8'))
    assert meta['Name'] == settings['lib_name'] and meta['Version'] == settings['version']
    assert meta['Summary'] == settings['description'] and meta['Requires-Python'] == '>=' + settings['min_python']
    assert (meta['License-Expression'] or meta['License']) == 'Apache-2.0'
    assert settings['author'] in (meta['Author'] or meta['Author-email'])
    requires = meta.get_all('Requires-Dist')
    assert any(r.startswith('tomli') and 'python_version < "3.11"' in r for r in requires)
    assert any(r.startswith('torch') and '<' in r for r in requires) and any(r.startswith('torchvision') and '<' in r for r in requires)
    assert {'lab', 'tokenizers', 'dev', 'docs'} <= set(meta.get_all('Provides-Extra'))
    assert not [r for r in requires if r.startswith(('pycocoevalcap', 'nbdev')) and 'extra' not in r], 'test tools are no dependency of the product'
    assert meta.get_payload().startswith('<!-- made from index.ipynb') or meta['Description']
    entry = archive.read(next(n for n in archive.namelist() if n.endswith('entry_points.txt'))).decode()
    assert 'caption-nb = caption_nb.cli:main' in entry.replace('=', ' = ').replace('  ', ' ')


def test_installed_wheel_works_outside_a_clone(wheel, tmp_path):
    "The command line answers, from the wheel alone, in an empty folder"
    site = tmp_path/'site'
    run(sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-compile', '--target', str(site), str(wheel), cwd=tmp_path)
    (tmp_path/'empty').mkdir()
    where = run(sys.executable, '-c', 'import caption_nb; print(caption_nb.__file__)', cwd=tmp_path/'empty', PYTHONPATH=str(site))
    assert where.startswith(str(site))
    shown = run(sys.executable, '-c', 'import sys; from caption_nb.cli import main; sys.exit(main())', '--help', cwd=tmp_path/'empty', PYTHONPATH=str(site))
    for command in ('train', 'runs', 'caption', 'extract', 'check', 'demo'): assert command in shown
    profiles = run(sys.executable, '-c', 'from caption_nb.profiles import profiles, slurm_folder; print(slurm_folder(), *profiles())',
                   cwd=tmp_path/'empty', PYTHONPATH=str(site), XDG_CONFIG_HOME=str(tmp_path))
    assert profiles.startswith(str(site)) and {'local', 'debug', 'one-gpu'} <= set(profiles.split())


def test_make_lists_its_targets():
    if not shutil.which('make'): pytest.skip('no make')
    shown = run('make', 'help', cwd=ROOT)
    for target in ('demo', 'test', 'lab', 'docs', 'bench', 'readme', 'clean'): assert f'make {target} ' in shown
