"""The documentation site, built without Quarto and looked at in a real browser."""
import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from functools import cache
from html.parser import HTMLParser
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from browser import browser, serve
from conftest import ROOT

sys.path.insert(0, str(ROOT/'docs'))
build = pytest.importorskip('build', reason="the site needs pip install -e '.[dev]'", exc_type=ImportError)
for name in ('sphinx', 'myst_nb', 'furo'): pytest.importorskip(name, reason="the site needs pip install -e '.[docs]'")

PAGES = [p.name for p in build.find_pages()] + ['run']


# ---- the pieces -------------------------------------------------------------------------------------------------

def test_names_become_links():
    symbols = {'Vocab': 'caption_nb.text.Vocab', 'load_data': 'caption_nb.data.load_data', 'score': 'caption_nb.metrics.score'}
    links = build.link_names('`Vocab` `load_data` `score` `score()` `other_name`', symbols)
    assert links == ('[`Vocab`](#caption_nb.text.Vocab-class) [`load_data`](#caption_nb.data.load_data) `score` '
                     '[`score()`](#caption_nb.metrics.score) `other_name`')
    for same in ('# `Vocab`', '[`Vocab`](x.md)', '```python\n`Vocab`\n```', '``Vocab``'): assert build.link_names(same, symbols) == same


def test_links_lead_to_pages():
    page, targets = build.Page(Path('nbs/05_text.ipynb'), 'text'), {'nbs/10_data.ipynb': 'data.ipynb', 'index.ipynb': 'index.ipynb'}
    assert build.relink('[d](10_data.ipynb) [h](../index.ipynb) [w](https://x.org/a.ipynb)', page, targets) == \
        '[d](data.ipynb) [h](index.ipynb) [w](https://x.org/a.ipynb)'
    entry = '[`Vocab`](#caption_nb.text.Vocab-class) [s](05_text.ipynb#words)'
    assert build.relink(entry, page, targets | {'nbs/05_text.ipynb': 'text.ipynb'}) == entry.replace('05_text', 'text')
    with pytest.raises(SystemExit, match=r'05_text.ipynb: link to 99_nothing.ipynb'): build.relink('[x](99_nothing.ipynb)', page, targets)


def test_cells_become_what_a_page_shows():
    page = build.Page(Path('nbs/00_x.ipynb'), 'x')
    def shown(source, **metadata): return build.code_cells(nbformat.v4.new_code_cell(source, metadata=metadata), page, 3)
    assert shown('#| default_exp x') == shown('#| hide\nx = 1') == shown('#| export\nimport os') == shown('#| include: false\nx = 1') == []
    assert shown('#| echo: false\nx')[0].metadata.tags == ['remove-input']
    cell, = shown('x = 1\ny = 2  #| hide_line')
    assert cell.source == 'x = 1'
    assert '#|' not in shown('#| eval: false\nx')[0].source


def test_outputs_link_to_no_files_of_runs():
    text = '[a](../run/run.ipynb) [w](https://x.org) [h](#here) ![p](figures/a.png)'
    cell = nbformat.v4.new_code_cell('x', outputs=[nbformat.v4.new_output('display_data', {'text/markdown': text})])
    build.clean_outputs(cell)
    assert cell.outputs[0].data['text/markdown'] == text.replace('[a](../run/run.ipynb)', 'a')


def test_front_matter_becomes_a_title():
    assert build.front_matter('---\ntitle: A page\ndescription: "what it is"\nskip_exec: true\n---') == '# A page\n\n> what it is'


def test_reference_entries_have_tables():
    entry = build.symbol_entry('caption_nb.basics.nearest', 3)
    assert '(caption_nb.basics.nearest)=\n### nearest' in entry and '| `name` | `str` | What was written |' in entry and '**returns**' in entry


# ---- the guide to clusters --------------------------------------------------------------------------------------

GUIDE = (ROOT/'slurm'/'README.md').read_text('utf-8')
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)


def guide_commands() -> list[list[str]]:
    "The words of every command line of `caption-nb` in the guide, its tutorial and on the home page"
    found = []
    for name in ('nbs/tutorials/on_a_cluster.ipynb', 'index.ipynb'):
        for cell in nbformat.read(ROOT/name, 4).cells:
            if cell.cell_type == 'code': found += re.findall(r"caption_nb\(f?'([^']+)'\)", cell.source)
    texts = [GUIDE, *(c.source for n in ('nbs/tutorials/on_a_cluster.ipynb', 'index.ipynb') for c in nbformat.read(ROOT/n, 4).cells if c.cell_type == 'markdown')]
    return [shlex.split(line) for line in found] + [words for text in texts for words in commands_in(text)]


def commands_in(text: str) -> list[list[str]]:
    "The words of every command line of `caption-nb` in `text`"
    lines = [line for kind, block in BLOCK.findall(text) if kind in ('sh', 'bash') for line in block.replace('\\\n', ' ').splitlines()]
    lines += re.findall(r'`(caption-nb [^`]+)`', BLOCK.sub('', text))
    return [shlex.split(re.sub(r'<[^>]*>', 'RUN', line.removeprefix('caption-nb ')), comments=True) for line in lines if line.startswith('caption-nb ')]


@cache
def flags_of(command: str) -> set[str]:
    "What `caption-nb COMMAND --help` offers"
    from caption_nb.cli import main
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as end:
        patch.setenv('COLUMNS', '200')
        main([command, '--help'])
    assert not end.value.code
    return {*re.findall(r'--[a-z][a-z-]*', out.getvalue())}


def test_commands_of_the_guide_exist(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path))
    from caption_nb.cli import COMMANDS
    from caption_nb.config import presets
    from caption_nb.jobs import STEPS
    from caption_nb.profiles import profiles
    lines = guide_commands()
    assert len(lines) > 30 and {words[0] for words in lines} >= {'submit', 'sweep', 'status', 'follow', 'cancel', 'evaluate', 'compare', 'pull'}
    for command, *words in lines:
        assert command in COMMANDS, command
        flags, values = {word for word in words if word.startswith('-')}, dict(zip(words, words[1:]))
        assert flags - {'--help'} <= flags_of(command), f'caption-nb {command}: no {flags - flags_of(command)}'
        if command == 'submit': assert all(word in STEPS for word in takewhile(lambda w: w not in flags, words)), words
        if (profile := values.get('--profile', '{')) and profile[0] != '{': assert profile in profiles(), profile
        if preset := values.get('--preset', '').replace('NAME', ''): assert preset in presets(), preset


def first_column(head: str) -> list[list[str]]:
    "The rows of the table of the guide that begins with `head`: names in the first cell, then the other cells"
    rows = GUIDE.split(head, 1)[1].split('\n\n')[0].splitlines()[2:]
    cells = [[cell.strip() for cell in re.split(r'(?<!\\)\|', row.strip('|'))] for row in rows]
    return [[re.findall(r'`([^`]+)`', first), *rest] for first, *rest in cells]


def test_guide_has_every_key():
    from caption_nb.profiles import Profile, slurm_folder
    from caption_nb.sweeps import KEYS
    try: import tomllib
    except ModuleNotFoundError: import tomli as tomllib
    rows = first_column('| key | default | meaning |')
    assert [name for names, *_ in rows for name in names] == [f.name for f in fields(Profile)]
    usual = {k: list(v) if isinstance(v, tuple) else v for k, v in Profile().to_dict().items()}
    assert {names[0]: tomllib.loads('x = ' + default.strip('`'))['x'] for names, default, _ in rows} == usual
    assert {name for names, *_ in first_column('| key of the page | meaning |') for name in names} == {*KEYS}
    shipped = {re.match(r'\w[\w-]*', names[0])[0] for names, *_ in first_column('| profile | for |')}
    assert shipped == {p.stem for p in (slurm_folder()/'profiles').glob('*.toml')}


def test_guide_tells_what_starts_again():
    from caption_nb.jobs import AGAIN, KILLED
    from caption_nb.runs import _REASONS
    rows = {reason.strip('`'): again for _, _, reason, again in first_column('| event | what the run does |')}
    assert {*rows} >= {*_REASONS, *AGAIN, *KILLED, 'done', 'error'}
    for reason, again in rows.items(): assert again.startswith('yes') == (reason in (*AGAIN, *KILLED, 'requeued', 'node failed')), reason


def test_examples_of_the_guide_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    from caption_nb.profiles import load_profile
    from caption_nb.sweeps import read_sweep
    examples = {kind: text for kind, text in BLOCK.findall(GUIDE) if kind in ('toml', 'yaml')}
    for kind, text in examples.items(): (tmp_path/f'lr.{kind}').write_text(text)
    assert load_profile(str(tmp_path/'lr.toml')).env == dict(HF_HOME='/shared/me/huggingface')
    assert len(read_sweep(tmp_path/'lr.yaml')) == 15


# ---- the pages of the data sets ---------------------------------------------------------------------------------

SETS = {p.name.split('/')[1]: nbformat.read(ROOT/p.source, 4) for p in build.find_pages() if p.name.startswith('data_sets/')}
PUBLISHED = ('flickr8k', 'flickr30k', 'coco', 'cs231n', 'eecs498')


def words_of(name: str) -> str:
    "All text of a page of a data set"
    return '\n'.join(c.source for c in SETS[name].cells if c.cell_type == 'markdown')


def test_every_data_set_has_a_page():
    assert {*SETS} == {'index', *PUBLISHED, 'show_attend_tell', 'scenes', 'your_own'}
    assert next(iter(SETS)) == 'index', 'the table of all comes first in the side bar'
    for name in SETS: assert name == 'index' or f']({name}.ipynb)' in words_of('index'), name
    for name in PUBLISHED:
        headings = re.findall(r'^## (.+)$', words_of(name), re.M)
        assert {'What it is', 'Licence', 'How to get it', 'Known faults', 'Published results'} <= {h.split(',')[0] for h in headings}, name


def test_data_sets_are_called_as_the_program_calls_them():
    from caption_nb.array_layouts import ARRAY_LAYOUTS
    from caption_nb.download import SOURCES
    from caption_nb.layouts import LAYOUTS
    text = '\n'.join(map(words_of, SETS))
    named = {*re.findall(r'caption-nb download ([a-z][\w-]*)', text)}
    assert named <= {*SOURCES} and {n for n in SOURCES if not n.startswith(('glove', 'coco2017-'))} <= named
    rows = [row for row in words_of('index').splitlines() if row.startswith('| [')]
    layouts = {layout for row in rows for layout in re.findall(r'`(\w+)`', row.split('|')[-3])}
    assert layouts == {*LAYOUTS, *ARRAY_LAYOUTS}


def test_commands_of_the_data_sets_exist():
    from caption_nb.cli import COMMANDS
    lines = [line for name in SETS for line in commands_in(words_of(name))]
    assert len(lines) > 20
    for command, *words in lines:
        assert command in COMMANDS, command
        flags = {word for word in words if word.startswith('--')}
        assert flags <= flags_of(command), f'caption-nb {command}: no {flags - flags_of(command)}'


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_results_have_sources(name):
    results = words_of(name).split('## Published results', 1)[1]
    rows = [row for row in results.splitlines() if row.startswith('| ')][1:]
    assert len(rows) > 4 or 'None' in results
    for row in rows: assert re.search(r'\]\(https://|^\| the same |\(same\)|\*\*this project\*\*', row), row
    assert not rows or 'How the figures were read' in results


def test_links_of_the_data_sets_resolve():
    pages = build.find_pages()
    targets = {p.source.as_posix(): p.name + p.source.suffix for p in pages}
    for page in pages:
        if page.name.startswith('data_sets/'): build.make_page(page, {}, targets)   # a broken one ends the build


# ---- the site ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    "The built site: the one that `CAPTION_NB_SITE` names, or a new one"
    if made := os.environ.get('CAPTION_NB_SITE'): return Path(made)
    out = tmp_path_factory.mktemp('site')
    done = subprocess.run([sys.executable, 'docs/build.py', '--out', str(out/'html'), '--work', str(out/'work')], cwd=ROOT, capture_output=True,
                          text=True, timeout=400, env=dict(DOCS_RUN_OPTIONS='--num-images 100 --epochs 2') | os.environ)   # a smaller run
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out/'html'


class Links(HTMLParser):
    "Every address that a page links to or loads, and every place in it that can be linked to"
    def __init__(self, text: str):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if 'id' in attrs: self.anchors.add(attrs['id'])
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        if tag in ('img', 'script', 'iframe', 'source', 'video') and attrs.get('src'): self.loads.append(attrs['src'])
        if tag == 'link' and attrs.get('rel') in ('stylesheet', 'icon', 'preload'): self.loads.append(attrs['href'])


def test_links_work(site):
    "Every link inside the site leads to a page that is there, and to an anchor that is in it"
    pages = {p.relative_to(site).as_posix(): Links(p.read_text('utf-8')) for p in site.rglob('*.html')}
    broken = []
    for name, page in pages.items():
        for address in page.links + page.loads:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc: continue
            path = Path(os.path.normpath(Path(name).parent/unquote(parts.path))).as_posix() if parts.path else name
            if not (site/path).is_file(): broken.append(f'{name} -> {address}')
            elif parts.fragment and path in pages and unquote(parts.fragment) not in pages[path].anchors: broken.append(f'{name} -> {address}')
        broken += [f'{name} loads {address}' for address in page.loads if re.match(r'(https?:)?//', address)]
    assert not broken, '\n'.join(broken[:30])


@pytest.fixture(scope='module')
def tab(site, chromium):
    "A function that opens a page of the site and gives it with everything that went wrong"
    pytest.importorskip('playwright', reason="browser tests need pip install -e '.[dev]'")
    with serve(site) as address, browser(chromium) as context:
        page, faults = context.new_page(), []
        page.on('console', lambda m: m.type in ('error', 'warning') and faults.append(f'console: {m.text}'))
        page.on('pageerror', lambda e: faults.append(f'error: {e}'))
        page.on('requestfailed', lambda r: faults.append(f'failed: {r.url}'))
        page.on('response', lambda r: r.status >= 400 and faults.append(f'{r.status}: {r.url}'))
        page.on('request', lambda r: r.url.startswith((address, 'data:', 'blob:')) or faults.append(f'outside: {r.url}'))

        def visit(name: str):
            faults.clear()
            page.goto(f'{address}/{name}.html', wait_until='load')
            if page.locator('.math').count(): page.wait_for_selector('mjx-container')
            page.evaluate('''async () => { for (const i of document.images) { i.loading = 'eager'; if (!i.complete) await new Promise(r => { i.onload = i.onerror = r }) } }''')
            return page, faults
        yield visit


@pytest.mark.parametrize('name', PAGES)
def test_page_reads_well(tab, name):
    page, faults = tab(name)
    assert not faults
    assert page.locator('article h1').count() == 1 and page.locator('article').inner_text().strip()
    text = page.locator('article').inner_text()
    shown = page.locator('article pre').all_inner_texts()
    assert not [s for s in shown if re.search(r'^\s*#\|', s, re.M)], 'a directive of nbdev is shown'
    for raw in ('show_doc(', 'default_exp', '<!--', '{target=', 'tags="'): assert raw not in text, raw
    assert page.locator('article .math').count() == page.locator('article mjx-container').count(), 'formulas left unrendered'
    assert page.locator('mjx-merror, [data-mjx-error]').count() == 0, 'a formula with an error'
    sizes = page.evaluate('[...document.querySelectorAll("article img")].map(i => [i.src.slice(0, 120), i.naturalWidth])')
    assert all(width > 0 for _, width in sizes), sizes
    assert page.locator('.output.traceback').count() == 0, 'an error is shown as output'
    wide = page.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth')
    assert wide <= 1, f'the page scrolls sideways by {wide} pixels'


def test_home_leads_everywhere(tab):
    page, _ = tab('index')
    side = page.eval_on_selector_all('.sidebar-tree a', 'links => links.map(a => a.getAttribute("href"))')
    for name in PAGES: assert name == 'index' or f'{name}.html' in side, f'{name} is not in the side bar'
    table = page.eval_on_selector_all('article table a', 'links => links.map(a => a.getAttribute("href"))')
    modules = [p.name for p in build.find_pages() if p.module]
    assert not [m for m in modules if f'{m}.html' not in table], 'a module is missing in the table on the home page'


def test_mathematics_and_figures_are_there(tab):
    assert tab('attention')[0].locator('mjx-container svg').count() >= 3
    assert tab('scenes')[0].locator('article img').count() >= 1
    page, _ = tab('run')
    assert page.locator('article img').count() >= 3, 'the executed run shows its figures'
    assert page.locator('article table').count() >= 1, 'the executed run shows its results'


def test_source_unfolds(tab):
    page, _ = tab('basics')
    fold = page.locator('details.hide').first
    assert not fold.locator('pre').first.is_visible()
    fold.locator('summary').click()
    assert fold.locator('pre').first.is_visible() and 'def ' in fold.locator('pre').first.inner_text()


def test_search_finds_a_function(tab):
    page, faults = tab('index')
    page.goto(page.url.replace('index.html', 'search.html?q=make_scenes'))
    page.wait_for_selector('#search-results li a')
    assert 'scenes' in page.locator('#search-results').inner_text().lower() and not faults
