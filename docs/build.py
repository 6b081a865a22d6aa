"""Builds the documentation site from the notebooks: `python docs/build.py [--out _site] [--run RUN_FOLDER]`.

nbdev's own site needs Quarto, which many machines lack. Here the notebooks go to Sphinx (myst-nb, furo) instead:
nbdev's directives decide what is shown, its docments become parameter tables, names in backticks become links.
"""
from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from fastcore.docments import docments
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'caption_nb'
RUN_OPTIONS = '--num-images 800 --epochs 14'   # the run shown when none is given: small enough for every build

directive = re.compile(r'^\s*#\|\s*([\w-]+):?[ \t]*(.*)$', re.M)
fences = re.compile(r'(^```.*?^```[^\n]*$|^~~~.*?^~~~[^\n]*$)', re.M | re.S)
ansi = re.compile(r'\x1b(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])')


@dataclasses.dataclass
class Page:
    "One page of the site and the file that it is made from"
    source: Path       # relative to the repository
    name: str          # document name: where the page lies in the site, without suffix
    module: str = ''   # full name of the module that the notebook exports


def cell_directives(source: str) -> dict[str, str]:
    "nbdev's `#|` directives of a cell: name -> rest of the line"
    return dict(directive.findall(source))


def notebook_module(notebook: NotebookNode) -> str:
    "What the notebook's `#| default_exp` names, or ''"
    for cell in notebook.cells:
        if cell.cell_type == 'code' and (name := cell_directives(cell.source).get('default_exp')): return name.strip()
    return ''


def find_pages() -> list[Page]:
    "The home page, the modules in order, the tutorials, the guide to clusters, the data sets, and the two documents about the project"
    pages = [Page(Path('index.ipynb'), 'index')]
    for path in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')):
        module = notebook_module(nbformat.read(path, 4))
        name = module.rsplit('.')[-1] or path.stem
        pages.append(Page(path.relative_to(ROOT), name, f'{PACKAGE}.{module}' if module else ''))
    for path in sorted((ROOT/'nbs'/'tutorials').glob('[!_.]*.ipynb')):
        pages.append(Page(path.relative_to(ROOT), f'tutorials/{path.stem}'))
    pages += [Page(Path('slurm/README.md'), 'tutorials/from_ssh_to_results')]
    table = ROOT/'nbs'/'data_sets'/'index.ipynb'
    linked = table.read_text('utf-8') if table.exists() else ''
    sets = sorted(table.parent.glob('[!_.]*.ipynb'), key=lambda path: linked.find(f'({path.name})'))   # the table of all, then as it has them
    pages += [Page(path.relative_to(ROOT), f'data_sets/{path.stem}') for path in sets]
    pages += [Page(Path('CONTRIBUTING.md'), 'contributing'), Page(Path('CHANGELOG.md'), 'changelog')]
    return pages


# ---- symbols ----------------------------------------------------------------------------------------------------

def public_symbols(pages: list[Page]) -> dict[str, str]:
    "Short name -> full name of everything public, except names that two modules share"
    found: dict[str, list[str]] = {}
    for page in pages:
        if not page.module: continue
        module = importlib.import_module(page.module)
        for name in getattr(module, '__all__', []):
            if getattr(getattr(module, name), '__module__', '') == page.module: found.setdefault(name, []).append(f'{page.module}.{name}')
    return {short: full[0] for short, full in found.items() if len(full) == 1}


def label(full_name: str) -> str:
    "The target of links to a symbol. Sphinx ignores case, so a class must not share it with a function of the same letters"
    return full_name + ('-class' if full_name.rsplit('.', 1)[1][:1].isupper() else '')


def type_name(annotation) -> str:
    "How an annotation is written in a table"
    if annotation is inspect.Parameter.empty or annotation is None: return ''
    if isinstance(annotation, str): return annotation
    text = getattr(annotation, '__name__', '') if isinstance(annotation, type) and '[' not in str(annotation) else str(annotation)
    return re.sub(r'\b(?:typing|collections\.abc|pathlib|torch|numpy)\.', '', text or str(annotation))


def code(text: str) -> str:
    "Inline code that survives inside a Markdown table"
    if not text: return ''
    text = ' '.join(text.split()).replace('|', r'\|')
    return f'`` {text} ``' if '`' in text else f'`{text}`'


def prose(text) -> str:
    "A comment as one table cell"
    if text is inspect.Parameter.empty or text is None: return ''
    parts = re.split(r'(`[^`]*`)', ' '.join(str(text).split()))   # what stands outside code is not Markdown
    return ''.join(p.replace('|', r'\|') if p.startswith('`') else re.sub(r'([\\*_<>$|\[\]{}])', r'\\\1', p) for p in parts)


def default_text(value) -> str:
    "How a default value is written in a table"
    if value is inspect.Parameter.empty: return ''
    if callable(value): return getattr(value, '__name__', repr(value))
    return re.sub(r' at 0x[0-9a-f]+', '', repr(value))


def parameter_table(symbol) -> str:
    "Name, type, default and meaning of each parameter, from nbdev's docments"
    try:
        rows = docments(symbol, full=True, returns=not inspect.isclass(symbol))
        order = list(inspect.signature(symbol).parameters)
    except (ValueError, TypeError): return ''
    rows_shown = []
    for name in [n for n in order if n in rows and n not in ('self', 'cls')] + ['return'] * ('return' in rows):
        row = rows[name]
        cells = [f'`{name}`' if name != 'return' else '**returns**', code(type_name(row.get('anno'))),
                 code(default_text(row.get('default', inspect.Parameter.empty))), prose(row.get('docment'))]
        if name != 'return' or any(cells[1:]): rows_shown.append(cells)
    if not rows_shown: return ''
    heads = ['name', 'type', 'default', 'meaning']
    used = [i for i in range(4) if i == 0 or any(cells[i] for cells in rows_shown)]
    return '\n'.join('| ' + ' | '.join(cells[i] for i in used) + ' |' for cells in [heads, ['---'] * 4, *rows_shown])


def method_table(symbol: type) -> str:
    "Public methods and properties that the class itself defines, with the first line of their docstrings"
    lines = []
    for name, member in vars(symbol).items():
        function = member.fget if isinstance(member, property) else getattr(member, '__func__', member)
        if name.startswith('_') or not inspect.isfunction(function): continue
        if isinstance(member, property): call = name
        else:
            parameters = list(inspect.signature(function).parameters.values())
            if not isinstance(member, staticmethod): parameters = parameters[1:]
            call = f'{name}({", ".join(("*"*(p.kind == p.VAR_POSITIONAL) + "**"*(p.kind == p.VAR_KEYWORD)) + p.name for p in parameters)})'
        lines.append(f'| {code(call)} | {prose((inspect.getdoc(function) or "").split(chr(10))[0])} |')
    if not lines: return ''
    return '\n'.join(['| method | what it does |', '|---|---|', *lines])


def symbol_entry(full_name: str, level: int) -> str:
    "The reference entry of one symbol: heading, docstring, parameters, methods"
    module, name = full_name[len(PACKAGE) + 1:].split('.', 1)
    symbol = importlib.import_module(f'{PACKAGE}.{module}')
    for part in name.split('.'): symbol = getattr(symbol, part)
    kind = 'class' if inspect.isclass(symbol) else 'def'
    parts = [f'({label(full_name)})=\n{"#" * level} {name}', f'{{.entry}}\n*{kind}* `{PACKAGE}.{module}.{name}`']
    if doc := inspect.getdoc(symbol): parts.append(prose_paragraph(doc))
    parts += [parameter_table(symbol), method_table(symbol) if inspect.isclass(symbol) else '']
    return '\n\n'.join(p for p in parts if p)


def prose_paragraph(doc: str) -> str:
    "A docstring as a paragraph; dataclasses without one carry their signature, which the table already tells"
    if re.match(r'^\w+\(.*\)$', doc, re.S): return ''
    return '\n\n'.join(prose(p) for p in re.split(r'\n\s*\n', doc))


# ---- cells ------------------------------------------------------------------------------------------------------

def defined_names(source: str, private: bool = False) -> list[str]:
    "Public (or also private) functions and classes that a cell defines at top level; `@patch` methods as `Class.method`"
    names = []
    for node in ast.parse(re.sub(r'^\s*[%!].*$', '', source, flags=re.M)).body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or (node.name.startswith('_') and not private): continue
        decorators = {getattr(d, 'id', getattr(d, 'attr', '')) for d in getattr(node, 'decorator_list', [])}
        owner = node.args.args[0].annotation if 'patch' in decorators else None
        names.append(f'{owner.id}.{node.name}' if isinstance(owner, ast.Name) else node.name)
    return names


def only_imports(source: str) -> bool:
    "True for a cell with nothing but imports, those for type checkers included"
    body = ast.parse(re.sub(r'^\s*[%!].*$', '', source, flags=re.M)).body
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) or ast.unparse(node).startswith('if TYPE_CHECKING:') for node in body)


def link_names(text: str, symbols: dict[str, str], here: str = '') -> str:
    "Turn `Name`, `name_with_underscore` and `name()` into links to their entries, outside code and existing links"
    def link(match):
        name = match[1].removesuffix('()').removeprefix(f'{PACKAGE}.')
        short = name.split('.')[-1]
        full = symbols.get(name) or (symbols.get(short) if symbols.get(short, '').endswith(f'.{name}') else None)
        telling = name[:1].isupper() or '_' in name or match[1].endswith('()') or '.' in name   # not every `score` is the function
        return f'[`{match[1]}`](#{label(full)})' if full and telling else match[0]
    pieces = fences.split(text)
    for i, piece in enumerate(pieces):
        if i % 2: continue
        lines = [line if line.lstrip().startswith('#') else re.sub(r'(?<![\[`])`([A-Za-z_][\w.]*(?:\(\))?)`(?![\]`])', link, line)
                 for line in piece.split('\n')]
        pieces[i] = '\n'.join(lines)
    return ''.join(pieces)


def relink(text: str, page: Page, targets: dict[str, str]) -> str:
    "Links to notebooks and files of the repository become links to their pages, or to the file at its public home"
    def link(match):
        label, address, anchor = match[1], match[2], match[3] or ''
        if not address or re.match(r'[a-z]+:|/', address): return match[0]   # an anchor of this page, another site
        candidates = [Path(os.path.normpath(page.source.parent/address)), Path(os.path.normpath(address))]
        for path in candidates:
            if path.as_posix() in targets:
                target = os.path.relpath(targets[path.as_posix()], Path(page.name).parent)
                return f'[{label}]({target}{"" if target.endswith(".md") or not anchor else anchor})'
        for path in candidates:
            if (ROOT/path).exists(): return f'[{label}]({repository_url()}/blob/main/{path.as_posix()})'
        raise SystemExit(f'{page.source}: link to {address}, which is neither a page nor a file of the repository')
    return re.sub(r'\[([^\]\[]*(?:\[[^\]]*\][^\]\[]*)?)\]\(([^)\s#]*)(#[^)\s]*)?\)', link, text)


def repository_url() -> str:
    "Where the source is published, from settings.ini"
    from nbdev.config import get_config
    return get_config(path=ROOT).git_url


def front_matter(source: str) -> str:
    "A raw cell with nbdev's front matter, as a title in Markdown"
    fields = dict(re.findall(r'^(title|description|subtitle):\s*["\']?(.*?)["\']?\s*$', source, re.M))
    title, below = fields.get('title'), fields.get('subtitle') or fields.get('description')
    return '\n\n'.join([f'# {title}'] * bool(title) + [f'> {below}'] * bool(below))


def clean_outputs(cell: NotebookNode):
    "Outputs as a page shows them: no terminal colours, no widget state, no finished progress bars"
    kept = []
    for output in cell.get('outputs', []):
        if output.output_type == 'stream': output.text = ansi.sub('', output.text)
        if output.output_type == 'error': output.traceback = [ansi.sub('', line) for line in output.traceback]
        data = output.get('data', {})
        data.pop('application/vnd.jupyter.widget-view+json', None)
        if text := data.get('text/markdown'): data['text/markdown'] = re.sub(r'(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)[^)]*\)', r'\1', ''.join(text))   # to files of a run
        if output.output_type in ('display_data', 'execute_result') and not data: continue
        kept.append(output)
    cell.outputs = kept


def code_cells(cell: NotebookNode, page: Page, level: int) -> list[NotebookNode]:
    "What a page shows of a code cell: an exported one becomes reference entries with the source folded below"
    marks = cell_directives(cell.source)
    if marks.keys() & {'hide', 'default_exp'} or marks.get('include') == 'false' or 'nbdev_export()' in cell.source: return []
    lines = [l for l in cell.source.split('\n') if not directive.match(l) and not re.search(r'#\|\s*hide_line\s*$', l)]
    source = '\n'.join(lines).strip()
    exported = bool(marks.keys() & {'export', 'exports', 'exporti'})
    if exported and only_imports(source): return []
    tags = set(cell.metadata.get('tags', []))
    if marks.get('echo') == 'false' or cell.metadata.get('hide_input'): tags.add('remove-input')
    if marks.get('output') == 'false': cell.outputs = []
    if exported and 'exports' not in marks: tags.add('hide-input')
    cell.source, cell.metadata = source, NotebookNode(tags=sorted(tags)) if tags else NotebookNode()
    clean_outputs(cell)
    if exported and page.module:
        names = defined_names(source)
        prompt = f'Source of {", ".join(defined)}' if (defined := defined_names(source, private=True)) else 'Source'
        cell.metadata.mystnb = {'code_prompt_show': prompt, 'code_prompt_hide': prompt}
        shown = names if 'exporti' not in marks else []
        return [new_markdown_cell(symbol_entry(f'{page.module}.{name}', max(level, 3))) for name in shown] + [cell]
    return [cell] if source or cell.outputs else []


def make_page(page: Page, symbols: dict[str, str], targets: dict[str, str]) -> NotebookNode:
    "The notebook of `page` as Sphinx gets it"
    notebook = nbformat.read(ROOT/page.source, 4)
    cells, level = [], 2
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            cells += code_cells(cell, page, min(level + 1, 5))
            continue
        text = front_matter(cell.source) if cell.cell_type == 'raw' else cell.source
        text = re.sub(r'^\s*#\|.*\n?', '', text)
        if not text.strip(): continue
        for heading in re.findall(r'^(#+) ', fences.sub('', text), re.M): level = max(len(heading), 1)
        cells.append(new_markdown_cell(relink(link_names(text, symbols), page, targets)))
    notebook.cells = cells
    notebook.metadata = NotebookNode(kernelspec={'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
                                     language_info={'name': 'python', 'pygments_lexer': 'ipython3'})
    return notebook


# ---- the executed run -------------------------------------------------------------------------------------------

def make_run(folder: Path) -> Path:
    "Train a small captioner on the drawn scenes, through the same command as everybody; give the run's folder"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, '-c', f'import sys; from {PACKAGE}.cli import main; sys.exit(main())', 'demo', '--runs-dir', str(folder), *os.environ.get('DOCS_RUN_OPTIONS', RUN_OPTIONS).split()]
    print('  caption-nb ' + ' '.join(command[3:]), flush=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    runs = sorted(p.parent for p in folder.glob('*/config.json'))
    if done.returncode or not runs: raise SystemExit(f'the example run failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}')
    return runs[-1]


def run_notebook(run: Path) -> Path:
    "The newest executed notebook of a run folder (or the notebook itself)"
    if run.suffix == '.ipynb': return run
    found = sorted(run.glob('*.ipynb'), key=lambda p: p.stat().st_mtime)
    if not found: raise SystemExit(f'{run}: no executed notebook in this run folder')
    return found[-1]


def make_run_page(run: Path, source: Path):
    "Copy the executed notebook of `run`, and the pictures that it links to, as the page `run`"
    path = run_notebook(run)
    notebook = nbformat.read(path, 4)
    folder = path.parent.resolve()
    hide = {str(folder): f'papermill_runs/{folder.name}', str(folder.parent): 'papermill_runs', str(ROOT): '…', str(Path.home()): '~'}
    for cell in notebook.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k == 'tags'})
        if cell.cell_type != 'code':
            for name in re.findall(r'!\[[^\]]*\]\(([^):]+)\)', cell.source):
                target = source/name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path.parent/name, target)
            continue
        marks = cell_directives(cell.source)
        if 'hide' in marks or marks.get('include') == 'false': cell.metadata.tags = [*cell.metadata.get('tags', []), 'remove-cell']
        if marks.get('echo') == 'false': cell.metadata.tags = [*cell.metadata.get('tags', []), 'remove-input']
        cell.source = directive.sub('', cell.source).strip()
        clean_outputs(cell)
    text = nbformat.writes(notebook)
    for private, shown in hide.items(): text = text.replace(private, shown)   # a page names no machine
    notebook = nbformat.reads(text, 4)
    notebook.metadata = NotebookNode(kernelspec={'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
                                     language_info={'name': 'python', 'pygments_lexer': 'ipython3'})
    note = '```{note}\nThis page is the record of a real run, as `caption-nb demo` leaves it in its run folder, made small for this site: ' \
           'few images, few epochs. The default run takes two to three minutes and scores far higher.\n```'
    notebook.cells.insert(1, new_markdown_cell(note))
    nbformat.write(notebook, source/'run.ipynb')


# ---- the whole --------------------------------------------------------------------------------------------------

def toctree(caption: str, names: list[str]) -> str:
    "A hidden table of contents: furo shows it in the side bar"
    return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *names, '```'])


def write_sources(source: Path, run: Path | None):
    "Write every page of the site, as Sphinx reads them, into `source`"
    pages = find_pages()
    symbols = public_symbols(pages)
    targets = {p.source.as_posix(): p.name + p.source.suffix for p in pages}
    targets |= {'nbs/index.ipynb': 'index.ipynb', 'README.md': 'index.ipynb'}
    if run: targets['nbs/experiments/train.ipynb'] = 'run.ipynb'
    for page in pages:
        target = source/(page.name + page.source.suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        if page.source.suffix == '.md':
            target.write_text(relink(link_names((ROOT/page.source).read_text('utf-8'), symbols), page, targets), encoding='utf-8')
            continue
        notebook = make_page(page, symbols, targets)
        if page.name == 'index':
            numbered = [p.name for p in pages if p.source.parent.as_posix() == 'nbs']
            tutorials = [p.name for p in pages if p.name.startswith('tutorials/')]
            sets = [p.name for p in pages if p.name.startswith('data_sets/')]
            trees = ['```{toctree}\n:hidden:\n\nHome <self>\n```', toctree('Modules', numbered)]
            trees += [toctree(caption, names) for caption, names in (('Tutorials', tutorials), ('Data sets', sets)) if names]
            trees += [toctree('Experiments', ['run'])] * bool(run) + [toctree('Project', ['contributing', 'changelog'])]
            notebook.cells.append(new_markdown_cell('\n\n'.join(trees)))
        nbformat.write(notebook, target)
    if run: make_run_page(run, source)


def main() -> int:
    parser = argparse.ArgumentParser(description='Build the documentation site')
    parser.add_argument('--out', type=Path, default=ROOT/'_site', help='where the HTML goes')
    parser.add_argument('--work', type=Path, default=ROOT/'_proc', help='where the pages go before Sphinx reads them')
    parser.add_argument('--run', default=os.environ.get('DOCS_RUN', ''), help='a run folder to show; without it a small run is made. `none`: no such page')
    args = parser.parse_args()
    os.environ.setdefault('MPLBACKEND', 'agg')
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    start, source, html = time.time(), args.work.resolve()/'docs', args.work.resolve()/'html'
    for folder in (source, html): shutil.rmtree(folder, ignore_errors=True)
    run = None if args.run == 'none' else Path(args.run) if args.run else make_run(args.work.resolve()/'run')
    print(f'run: {time.time() - start:.0f} s', flush=True)
    write_sources(source, run)
    print(f'pages: {time.time() - start:.0f} s', flush=True)
    command = [sys.executable, '-m', 'sphinx', '-b', 'html', '-W', '--keep-going', '-q', '-j', 'auto', '-c', str(ROOT/'docs'),
               '-d', str(args.work.resolve()/'doctrees'), str(source), str(html)]
    failed = subprocess.run(command, cwd=ROOT).returncode
    if failed: return failed
    shutil.rmtree(args.out, ignore_errors=True)   # only now: a site that could not be built leaves the one before
    shutil.move(html, args.out)
    print(f'site: {args.out}/index.html ({time.time() - start:.0f} s)')
    return 0


if __name__ == '__main__': sys.exit(main())
