"""Run notebooks top to bottom and store their outputs: `python tools/run_nbs.py [notebook ...]` (default: all).

Cells marked `#| eval: false`, cells under a flag of `tst_flags` and the exporting cell are left alone.
Afterwards the notebook is cleaned as `nbdev_clean` does, so nothing of the machine stays in it.
"""
import re, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config

cfg = get_config()
flags = '|'.join(cfg.tst_flags.split())
left_alone = re.compile(rf'^\s*#\|\s*(eval:\s*false|{flags})\s*$|nbdev_export\(', re.M | re.I)


def run(path):
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == 'code' and left_alone.search(cell.source): cell.metadata.tags = ['skip-execution']
    NotebookClient(nb, timeout=900, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}},
                   skip_cells_with_tag='skip-execution').execute()
    for cell in nb.cells: cell.metadata.pop('tags', None)
    nb.metadata.pop('widgets', None)                                     # widget state is machine residue
    nbformat.write(nb, path)
    nbdev_clean(fname=str(path))


paths = [Path(o).resolve() for o in sys.argv[1:]] or sorted(cfg.nbs_path.rglob('[!_.]*.ipynb'))
for path in paths:
    start = time.time()
    run(path)
    print(f'{path.relative_to(cfg.config_path)}  {time.time() - start:.1f} s', flush=True)
