"""The book in a real browser: JupyterLab opens a notebook, runs all its cells, and shows pictures and no error. `make e2e`

    python tests/lab_e2e.py [notebook ...] [--shots FOLDER]

Works on a copy, so the committed notebooks stay as they are. Needs chromium (set CHROMIUM to its path if it is not found).
"""
import argparse, json, os, secrets, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

root = Path(__file__).resolve().parents[1]
default = ['index.ipynb', 'losses/01_divergence.ipynb', 'experiments/01_segmentation.ipynb']
switches = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', '--disable-background-networking', '--disable-sync', '--disable-component-update']


def server(place, token):
    "JupyterLab on a free port, with settings of its own; (process, address)."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    homes = {f'JUPYTER_{k}_DIR': str(place / 'home' / k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')}
    homes.update({f'JUPYTERLAB_{k}_DIR': str(place / 'home' / k.lower()) for k in ('SETTINGS', 'WORKSPACES')}, IPYTHONDIR=str(place / 'home/ipython'))
    quiet = place / 'home/settings/@jupyterlab/apputils-extension'; quiet.mkdir(parents=True)
    (quiet / 'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    log = open(place / 'log', 'w')
    process = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
                                f'--ServerApp.root_dir={place / "book"}', f'--IdentityProvider.token={token}'], env={**os.environ, **homes}, stdout=log, stderr=subprocess.STDOUT)
    address = f'http://127.0.0.1:{port}'
    for _ in range(300):
        if process.poll() is not None: sys.exit((place / 'log').read_text())
        try: urllib.request.urlopen(f'{address}/api?token={token}', timeout=1); return process, address
        except OSError: time.sleep(.1)
    sys.exit('JupyterLab did not start')


def run_notebook(browser, address, token, name, shots):
    "Open a notebook, clear it, Run All, wait until the kernel is idle again, save; the requests that went elsewhere."
    page, outside = browser.new_page(viewport={'width': 1280, 'height': 1000}), []
    page.on('request', lambda r: outside.append(r.url) if r.url.startswith('http') and not r.url.startswith(address) else None)
    page.goto(f'{address}/lab/tree/nbs/{name}?token={token}&reset')
    page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=60_000)
    idle = "() => /\\| Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText || '')"
    page.wait_for_function(idle, timeout=60_000)                    # earlier, Run All would ask for a kernel instead
    page.click('.lm-MenuBar-item:has-text("Edit")'); page.click('.lm-Menu-item:has-text("Clear Outputs of All Cells")')
    page.click('.lm-MenuBar-item:has-text("Run")'); page.click('.lm-Menu-item:has-text("Run All Cells")')
    done = "() => !document.querySelector('.jp-Dialog') && ![...document.querySelectorAll('.jp-InputPrompt')].some(e => e.innerText.includes('*'))"
    for _ in range(2):                                              # twice: between two cells the kernel is idle for a moment
        page.wait_for_timeout(1500)
        page.wait_for_function(idle, timeout=300_000); page.wait_for_function(done, timeout=300_000)
    page.keyboard.press('Escape')
    if shots: page.screenshot(path=str(Path(shots) / f'{Path(name).stem}.png'))
    page.keyboard.press('Control+s'); page.wait_for_timeout(1500)
    page.close()
    return outside


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('notebooks', nargs='*', default=default); parser.add_argument('--shots')
    args = parser.parse_args()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        for part in ('nbs', 'data', 'kdnotes'): shutil.copytree(root / part, place / 'book' / part)
        shutil.copy(root / 'settings.ini', place / 'book')
        process, address = server(place, token)
        try:
            with sync_playwright() as p:
                browser = p.chromium.launch(executable_path=os.environ.get('CHROMIUM') or shutil.which('chromium') or shutil.which('google-chrome'), args=switches)
                for name in args.notebooks:
                    start = time.time()
                    outside = run_notebook(browser, address, token, name, args.shots)
                    check(place / 'book/nbs' / name, name, outside)
                    print(f'{name}: runs in JupyterLab ({time.time() - start:.0f} s)', flush=True)
                browser.close()
        finally:
            process.send_signal(signal.SIGTERM)
            try: process.wait(15)
            except subprocess.TimeoutExpired: process.kill()


def check(path, name, outside):
    "What JupyterLab saved: every code cell ran, none failed, and there are pictures where the committed notebook has some."
    cells = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code' and ''.join(c['source']).strip()]
    committed = json.loads((root / 'nbs' / name).read_text())['cells']
    pictures = lambda cs: sum('image/png' in o.get('data', {}) for c in cs for o in c.get('outputs', []))
    failed = [''.join(o.get('traceback', []))[-800:] for c in cells for o in c['outputs'] if o['output_type'] == 'error']
    assert not failed, failed[0]
    assert all(c['execution_count'] for c in cells if 'eval: false' not in ''.join(c['source'])), f'{name}: a cell did not run'
    assert pictures(cells) == pictures([c for c in committed if c['cell_type'] == 'code']), f'{name}: pictures are missing'
    assert not outside, f'requests to other places: {outside[:3]}'


if __name__ == '__main__': main()
