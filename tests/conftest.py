"""Counts aloud what did not run and why: a skip should never hide."""
import os

if os.environ.get('KDNOTES_GPU') != '1': os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')      # equal bits are promised on a CPU
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')


def pytest_configure(config):
    config.addinivalue_line('markers', 'soak: takes long; `make soak`')


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get('skipped', [])
    if skipped:
        reasons = {}
        for report in skipped: reasons.setdefault(str(report.longrepr[-1]), []).append(report.nodeid)
        for reason, tests in reasons.items(): terminalreporter.write_line(f'NOT RUN, {len(tests)}: {reason}')
    if not os.environ.get('KDNOTES_DATA'): terminalreporter.write_line('KDNOTES_DATA is not set: nothing was tested on real pictures')
