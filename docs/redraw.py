"""Redraw every figure and every claims table of docs/results from its results.json.

    python docs/redraw.py                    all folders
    python docs/redraw.py mi-shapes shapes   these

Runs the script of each folder with --plot-only, which draws its figures and writes claims.md, and
then puts each claims.md into docs/results.md, between <!-- claims: FOLDER --> and <!-- end -->.
Nothing is trained or measured: `git diff` then shows whether a change of a script has changed a
verdict of a committed run. About seven minutes for all of them, on one thread.
"""

import contextlib
import importlib
import io
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / 'results.md'
# The first word of a folder's name tells whose run it holds; train_at's have the data set's name.
SCRIPTS = {
    'cifs': 'cifs',
    'mi': 'mi_analysis',
    'shape': 'shape_bias',
    'logit': 'logit_distill',
    'dimpled': 'dimpled_manifold',
}


def redraw(folder):
    """Figures and claims.md of one run, from its results.json."""
    script = importlib.import_module(SCRIPTS.get(folder.name.split('-')[0], 'train_at'))
    with contextlib.redirect_stdout(io.StringIO()):
        script.main(['--plot-only', str(folder)])
    for path in folder.glob('*.pdf'):  # the repository holds the PNG alone
        path.unlink()


def with_claims(page, folder):
    """The text of results.md with the folder's claims.md in its place."""
    table = (folder / 'claims.md').read_text()
    verdicts = Counter(line.split('|')[-2].split(':')[0].strip() for line in table.splitlines()[2:])
    counts = ', '.join(f'{n} {verdict}' for verdict, n in verdicts.most_common())
    block = f'<details><summary>claims of <code>{folder.name}</code>: {counts}</summary>\n\n{table}\n</details>\n'
    start, end = f'<!-- claims: {folder.name} -->\n', '<!-- end -->'
    page, places = re.subn(f'{start}.*?{end}', lambda _: start + block + end, page, flags=re.S)
    if places != 1:
        sys.exit(f'error: {PAGE} has {places} places for the claims of {folder.name}')
    return page


def main(names):
    torch.set_num_threads(1)
    sys.path.insert(0, str(DOCS.parent))
    folders = [DOCS / 'results' / name for name in names] or sorted(
        path.parent for path in (DOCS / 'results').glob('*/results.json')
    )
    for folder in folders:
        if not (folder / 'results.json').exists():
            sys.exit(f'error: {folder} holds no results.json')
    page = PAGE.read_text()
    for folder in folders:
        started = time.perf_counter()
        redraw(folder)
        page = with_claims(page, folder)
        print(f'{folder.name:26} {time.perf_counter() - started:5.0f} s', flush=True)
    PAGE.write_text(page)


if __name__ == '__main__':
    main(sys.argv[1:])
