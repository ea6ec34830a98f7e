"""README.md from nbs/index.ipynb: `python tools/readme.py` writes it, `--check` exits 1 when it is stale.

Nothing is executed: markdown cells are taken as they are, code cells with their stored text outputs, pictures are written to nbs/images.
Cells with `#| hide` are left out. Links to notebooks are made relative to the top folder.
"""
import base64, hashlib, json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
images = 'nbs/images'


def render():
    cells, out, files = json.loads((root / 'nbs/index.ipynb').read_text(encoding='utf-8'))['cells'], [], {}
    out.append('<!-- made from nbs/index.ipynb by tools/readme.py; edit the notebook -->')
    for cell in cells:
        source = ''.join(cell['source'])
        if re.search(r'^#\|\s*hide\s*$', source, re.M): continue
        if cell['cell_type'] == 'markdown':
            out.append(re.sub(r'\]\((?!https?:|#|\.\./)([^)]+)\)', r'](nbs/\1)', source).replace('](../', ']('))
            continue
        body = '\n'.join(l for l in source.splitlines() if not l.startswith('#|')).strip()
        if body and '#| echo: false' not in source: out.append(f'```python\n{body}\n```')
        for o in cell['outputs']:
            data = o.get('data', {})
            if 'image/png' in data:
                png = base64.b64decode(''.join(data['image/png']))
                name = f'{images}/{hashlib.sha256(png).hexdigest()[:12]}.png'
                files[name] = png
                out.append(f'![]({name})')
            elif 'text/markdown' in data: out.append(''.join(data['text/markdown']))
            elif plain := ''.join(o.get('text', '') or data.get('text/plain', '')): out.append('\n'.join(f'    {l}' for l in plain.rstrip().splitlines()))
    return '\n\n'.join(o.strip('\n') for o in out) + '\n', files


def main():
    text, files = render()
    have = {p.relative_to(root).as_posix(): p.read_bytes() for p in (root / images).glob('*.png')}
    readme = root / 'README.md'
    if '--check' in sys.argv:
        if not readme.exists() or readme.read_text(encoding='utf-8') != text or have != files: sys.exit('README.md is not what nbs/index.ipynb makes: run `make readme`')
        return print('README.md is up to date')
    for name in have.keys() - files.keys(): (root / name).unlink()
    for name, png in files.items(): (root / name).parent.mkdir(parents=True, exist_ok=True); (root / name).write_bytes(png)
    readme.write_text(text, encoding='utf-8')


if __name__ == '__main__': main()
