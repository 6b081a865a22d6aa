"""The documentation site, built without Quarto and looked at in a real browser."""
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
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


def test_front_matter_becomes_a_title():
    assert build.front_matter('---\ntitle: A page\ndescription: "what it is"\nskip_exec: true\n---') == '# A page\n\n> what it is'


def test_reference_entries_have_tables():
    entry = build.symbol_entry('caption_nb.basics.nearest', 3)
    assert '(caption_nb.basics.nearest)=\n### nearest' in entry and '| `name` | `str` | What was written |' in entry and '**returns**' in entry


# ---- the site ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    "The built site: the one that `CAPTION_NB_SITE` names, or a new one"
    if made := os.environ.get('CAPTION_NB_SITE'): return Path(made)
    out = tmp_path_factory.mktemp('site')
    done = subprocess.run([sys.executable, 'docs/build.py', '--out', str(out/'html'), '--work', str(out/'work')],
                          cwd=ROOT, capture_output=True, text=True, timeout=400)
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
