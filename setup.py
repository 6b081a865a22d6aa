"""Packaging. Everything is read from settings.ini; the wheel also carries what lies outside the package: notebooks, templates."""
from configparser import ConfigParser
from pathlib import Path
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']


SHIPPED = {'experiments': (here/'nbs'/'experiments', ('*.ipynb', 'presets/*.yaml', 'sweeps/*.yaml')),
           'slurm': (here/'slurm', ('job.sh', 'profiles/*.toml', 'README.md'))}


class BuildWithData(build_py):
    "Copies experiments, presets, job template and profiles into the package: an installed wheel trains and submits outside a clone"
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return   # a clone reads them where they are
        for folder, (source, patterns) in SHIPPED.items():
            for file in (f for pattern in patterns for f in source.glob(pattern)):
                target = Path(self.build_lib)/cfg['lib_name']/folder/file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)


extras = {key.removesuffix('_requirements'): value.split() for key, value in cfg.items() if key.endswith('_requirements')}
extras['dev'] += extras['docs']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl'], 'Source': cfg['git_url']},
    classifiers=[
        'Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Intended Audience :: Education',
        'Natural Language :: English', 'Programming Language :: Python :: 3', 'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11', 'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    python_requires='>=' + cfg['min_python'], packages=find_packages(include=[cfg['lib_name'], cfg['lib_name'] + '.*']),
    include_package_data=True, install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split()}, cmdclass={'build_py': BuildWithData}, zip_safe=False,
)
