"""The README's other way to two processes: `notebook_launcher`, in a real kernel."""
import os

import nbformat
from nbclient import NotebookClient

CELL = '''
def train():
    import torch
    from kdnotes.loop import Budget, train_supervised
    from kdnotes.recipes import lesson
    room = lesson()
    train_supervised(room.student, room.task, room.data, budget=Budget(steps=2, batch_size=4, lr=.05), processes=2, progress=False)
    if torch.distributed.get_rank() == 0: print('trained by', torch.distributed.get_world_size())

from accelerate import notebook_launcher
notebook_launcher(train, num_processes=2)
'''


def test_a_notebook_starts_two_processes(tmp_path, monkeypatch):
    for name in [k for k in os.environ if k.startswith(('ACCELERATE_', 'WORLD_', 'MASTER_'))]: monkeypatch.delenv(name)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', ''); monkeypatch.setenv('OMP_NUM_THREADS', '1')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(nb, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}).execute()
    said = ''.join(o.get('text', '') for o in nb.cells[0].outputs)
    assert 'trained by 2' in said, said
