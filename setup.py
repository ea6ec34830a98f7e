"Builds kdnotes from settings.ini, the one place where name, version, requirements and scripts are written."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

# on the package index the README stands alone, so its links and pictures must lead to the repository
readme = (here/'README.md').read_text(encoding='utf-8')
readme = re.sub(r'(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)',
                lambda m: f"{m[1]}[{m[2]}]({cfg['git_url']}/{'raw' if m[1] else 'blob'}/{cfg['branch']}/{m[3]})", readme)

minor = int(cfg['min_python'].split('.')[1])
setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme,
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'],
    classifiers=[
        'Development Status :: 3 - Alpha',
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ] + [f'Programming Language :: Python :: 3.{m}' for m in range(minor, 14)],
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'e2e', 'onnx')},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
