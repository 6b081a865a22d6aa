"""Makes README.md from index.ipynb: `python docs/readme.py`; `--check` only says whether README.md is up to date."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
directive = re.compile(r'^\s*#\|.*\n?', re.M)


def readme_text() -> str:
    "README.md as `index.ipynb` has it now: directives removed, printed outputs as blocks, pictures left to the site"
    notebook = nbformat.read(ROOT/'index.ipynb', 4)
    cells = []
    for cell in notebook.cells:
        if re.search(r'^\s*#\|\s*hide\s*$', cell.source, re.M): continue
        outputs = [o.get('text', '') or o.get('data', {}).get('text/plain', '') for o in cell.get('outputs', [])]
        cell.source, cell.outputs = directive.sub('', cell.source).strip(), []
        if cell.cell_type == 'markdown': cell.pop('outputs')
        cells.append(cell)
        text = '\n'.join(o.rstrip() for o in outputs if o.strip() and not o.startswith('<'))
        if text: cells.append(nbformat.v4.new_markdown_cell(f'```text\n{text}\n```'))
    notebook.cells = cells
    notebook.metadata.language_info = {'name': 'python'}
    body, _ = MarkdownExporter().from_notebook_node(notebook)
    note = '<!-- made from index.ipynb by `make readme`: edit that notebook, not this file -->'
    return note + '\n\n' + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'


def main() -> int:
    path, text = ROOT/'README.md', readme_text()
    if '--check' not in sys.argv[1:]:
        path.write_text(text, encoding='utf-8')
        return 0
    if path.exists() and path.read_text('utf-8') == text: return 0
    print('README.md is not what index.ipynb gives: run `make readme` and commit it', file=sys.stderr)
    return 1


if __name__ == '__main__': sys.exit(main())
