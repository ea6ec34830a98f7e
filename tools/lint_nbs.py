"""House rules for notebooks, the ones a machine can check. Prints every breach and exits 1 if there is one."""
import json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
LONGEST_CELL, MOST_OUTPUT = 40, 350_000           # lines of code, characters of stored output (pictures apart: they count in full)
LOSS_SECTIONS = ('question', 'by hand', 'gradient', 'what the loss sees', 'limits', 'errata', 'cost', 'in training', 'mutants', 'exercises', 'references')


def breaches(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    cells = nb['cells']
    code = [c for c in cells if c['cell_type'] == 'code']
    text = lambda c: ''.join(c['source'])
    stored = ''.join(json.dumps(c['outputs']) for c in code)
    if any('#|' not in text(c) and text(c).strip() for c in code) and not any(c['outputs'] for c in code): yield 'no stored output: run tools/run_nbs.py on it'
    if not re.match(r'# \S.*\n\n> \S', text(cells[0])): yield 'the first cell is not a title and a one-line promise (# Title, blank line, > promise)'
    if nb['metadata'].get('widgets'): yield 'widget state is stored'
    if len(set(c.get('id') for c in cells)) < len(cells): yield 'cell ids are missing or not unique'
    for i, c in enumerate(cells):
        if not isinstance(c['source'], list): yield f'cell {i}: source is not a list of lines'
    for c in code:
        source, where = text(c), f'cell {c["id"]}'
        if len(source.splitlines()) > LONGEST_CELL: yield f'{where} has {len(source.splitlines())} lines, more than {LONGEST_CELL}'
        if c['execution_count'] is not None: yield f'{where} keeps an execution count'
        if any(o['output_type'] == 'error' for o in c['outputs']): yield f'{where} stores an error'
        if any(o.get('name') == 'stderr' for o in c['outputs']): yield f'{where} stores stderr: a warning or a progress bar'
        if path.stem != '00_checks' and re.search(r'\b(test_fail|test_close|test_eq)\(', source): yield f'{where} uses a stock test helper; see 00_checks'
    if residue := re.search(r'/(home|root|tmp|work|Users|mnt|opt)/[\w.-]+', stored): yield f'an output names a place of one machine: {residue[0]}'
    if len(stored) > MOST_OUTPUT: yield f'{len(stored)} characters of output, more than {MOST_OUTPUT}'
    for link in re.findall(r'\]\(([^)\s#:]+\.(?:ipynb|md|png|json))', ' '.join(text(c) for c in cells if c['cell_type'] == 'markdown')):
        if not (path.parent / link).exists(): yield f'a link to {link}, which does not exist'
    if path.parent.name == 'losses':
        heads = ' | '.join(l.lower() for c in cells if c['cell_type'] == 'markdown' for l in text(c).splitlines() if l.startswith('#'))
        yield from (f'no section on {s!r}' for s in LOSS_SECTIONS if s not in heads)
        if 'image/png' not in stored: yield 'a loss notebook without a picture'
        if sum('assert ' in text(c) or re.search(r'\b(same|raises|grad_matches|kill)\(', text(c)) is not None for c in code) < len(code) / 3: yield 'fewer than a third of the code cells prove anything'


def main():
    paths = sorted((root / 'nbs').rglob('[!_.]*.ipynb'))
    paths = [p for p in paths if '.ipynb_checkpoints' not in p.parts]
    found = [f'{p.relative_to(root)}: {b}' for p in paths for b in breaches(p)]
    if found: sys.exit('\n'.join(found))
    print(f'{len(paths)} notebooks keep the house rules')


if __name__ == '__main__': main()
