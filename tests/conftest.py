"""Counts aloud what did not run and why: a skip should never hide."""
import datetime, json, os, platform, signal, subprocess
from pathlib import Path

import pytest

if os.environ.get('KDNOTES_GPU') != '1': os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')      # equal bits are promised on a CPU
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')
signal.signal(signal.SIGINT, signal.default_int_handler)      # a job in the background starts with Ctrl-C ignored, and hands that on


def pytest_configure(config):
    config.addinivalue_line('markers', 'soak: takes long; `make soak`')


@pytest.fixture
def ledger():
    "Keep the figures of a long run, with date and commit, in data/ledger/soak/NAME.json; `make soak` asks for it."
    def keep(name, figures):
        if os.environ.get('KDNOTES_LEDGER') != '1': return
        import torch
        root = Path(__file__).parent.parent
        git = lambda *args: subprocess.run(['git', *args], cwd=root, capture_output=True, text=True).stdout.strip()
        about = {'date': datetime.date.today().isoformat(), 'commit': git('rev-parse', 'HEAD') + '+changes' * bool(git('status', '--porcelain', '--untracked-files=no')),
                 'device': f'cpu ({torch.get_num_threads()} threads)', 'python': platform.python_version(), 'torch': torch.__version__}
        file = root / 'data/ledger/soak' / f'{name}.json'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**about, **figures}, indent=1) + '\n')
    return keep


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get('skipped', [])
    if skipped:
        reasons = {}
        for report in skipped: reasons.setdefault(str(report.longrepr[-1]), []).append(report.nodeid)
        for reason, tests in reasons.items(): terminalreporter.write_line(f'NOT RUN, {len(tests)}: {reason}')
    if not os.environ.get('KDNOTES_DATA'): terminalreporter.write_line('KDNOTES_DATA is not set: nothing was tested on real pictures')
