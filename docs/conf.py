"""Sphinx settings of the documentation site. Everything that a page loads comes from the site itself: it works offline."""
import importlib.util
import shutil
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).parent
settings = ConfigParser(delimiters=['='])
settings.read(here.parent/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']

project, author, copyright = settings['title'], settings['author'], settings['copyright']
release = version = settings['version']
extensions = ['myst_nb', 'sphinx.ext.mathjax']
exclude_patterns = ['**.ipynb_checkpoints']

# notebooks: executed before, by whoever committed them or by the run; never here
nb_execution_mode = 'off'
nb_code_prompt_show = 'Source'
nb_code_prompt_hide = 'Hide source'
nb_merge_streams = True
nb_ipywidgets_js = {}   # the default loads two scripts from a CDN
nb_render_markdown_format = 'myst'
nb_mime_priority_overrides = [('html', 'text/html', 10), ('html', 'image/svg+xml', 20), ('html', 'image/gif', 22),
                              ('html', 'image/png', 25), ('html', 'image/jpeg', 30), ('html', 'text/markdown', 40), ('html', 'text/plain', 90)]
myst_enable_extensions = ['dollarmath', 'amsmath', 'attrs_block', 'attrs_inline', 'colon_fence', 'deflist']
myst_heading_anchors = 4
myst_dmath_double_inline = True
# myst.header: a page starts its reference entries one level below the last heading, which may skip one
suppress_warnings = ['myst.header']

html_theme = 'furo'
html_title = f'{project} {release}'
html_short_title = project
html_static_path = ['static']
html_css_files = ['custom.css']
html_logo = 'static/logo.svg'
html_favicon = 'static/logo.svg'
html_copy_source = False
html_show_sphinx = False
html_permalinks_icon = '#'
pygments_style = 'friendly'
pygments_dark_style = 'github-dark'
html_theme_options = {
    'sidebar_hide_name': False,
    'navigation_with_keys': True,
    'light_css_variables': {'color-brand-primary': '#8a3b12', 'color-brand-content': '#a0430f'},
    'dark_css_variables': {'color-brand-primary': '#f0a878', 'color-brand-content': '#f3b58b'},
}

# MathJax lies in the site: one file, SVG output, so that it needs no fonts either
mathjax_path = 'mathjax/tex-svg.js'
mathjax3_config = {'svg': {'scale': 0.9}}   # the size of the text around it


def copy_mathjax(app, exception):
    "Put MathJax beside the pages; the package holds 24 MB, a page needs one file of them"
    if exception or app.builder.name != 'html': return
    package = importlib.util.find_spec('sphinx-mathjax-offline')
    if package is None: raise RuntimeError("MathJax is not there: pip install -e '.[docs]'")
    target = Path(app.outdir)/'_static'/mathjax_path
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(Path(package.origin).parent/'static'/mathjax_path, target)


def setup(app): app.connect('build-finished', copy_mathjax)
