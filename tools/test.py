"""The whole test run, in order; stops at the first step that fails. `make test` calls it, and so does CI.

1. kdnotes/ is what the notebooks export, and the notebooks are clean     tools/check_sync.py
2. notebooks follow the house rules                                        tools/lint_nbs.py
3. README.md is what the front page makes                                  tools/readme.py --check
4. every notebook runs from top to bottom                                  nbdev_test
5. everything that is not a lesson, file by file on the cores there are    pytest
"""
import os, subprocess, sys, time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
env = {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
env.setdefault('OMP_NUM_THREADS', '1')                  # several notebooks run side by side
env.setdefault('HF_HUB_OFFLINE', '1')                   # nothing here may need a network
env.setdefault('CUDA_VISIBLE_DEVICES', '')              # equal bits are promised on a CPU; KDNOTES_GPU=1 asks for the GPU instead
if env.get('KDNOTES_GPU') == '1': del env['CUDA_VISIBLE_DEVICES']
steps = [[sys.executable, 'tools/check_sync.py'], [sys.executable, 'tools/lint_nbs.py'], [sys.executable, 'tools/readme.py', '--check'],
         ['nbdev_test', '--timing'],
         [sys.executable, '-m', 'pytest', '-q', '-n', str(min(4, os.cpu_count() or 1)), '--dist', 'loadfile', '-m', 'not soak', 'tests']]

for step in steps:
    start = time.time()
    code = subprocess.run(step, cwd=root, env=env).returncode
    if step[-1] != 'tests': print(f'--- {" ".join(Path(s).name for s in step)}: {"ok" if code == 0 else "FAILED"} ({time.time() - start:.0f} s)', flush=True)
    if code: sys.exit(code)
