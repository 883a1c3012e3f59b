"""Put finished runs into the documentation: python docs/collect.py NAME=RUN_FOLDER ...

Copies a run's settings, numbers, claims and figures (as PNGs of 128 colours) to docs/results/NAME,
and puts the claims of every folder there into docs/results.md between its markers
<!-- claims: NAME --> and <!-- end --> (with "counts" for "claims": their number and a link alone).
Without arguments it does the latter alone.
"""
import re
import shutil
import sys
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parent
COPIED = ('config.json', 'results.json', 'claims.md', '*.gif')

def collect(name, run):
    """docs/results/NAME from a run's folder."""
    target = DOCS / 'results' / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for pattern in COPIED:
        for path in Path(run).glob(pattern):
            shutil.copy(path, target)
    for path in sorted(Path(run).glob('*.png')):
        small = Image.open(path).convert('RGB').quantize(128, dither=Image.Dither.NONE)
        small.save(target / path.name, optimize=True)

def claims_of(match):
    """The marked place with the claims as they are now: their number, and below it, folded, all."""
    kind, name = match.groups()
    path = DOCS / 'results' / name / 'claims.md'
    if not path.exists():
        sys.exit(f'error: no claims at {path}')
    text = path.read_text('utf-8').strip()
    verdicts = [line.split(' | ')[-1].split(':')[0].strip(' |') for line in text.splitlines()[2:]
                if line.startswith('|')]
    counts = ', '.join(f'{verdicts.count(v)} {v}' for v in dict.fromkeys(verdicts))
    shown = f'[Claims](results/{name}/claims.md): {counts}.'
    if kind == 'claims':
        shown = f'<details><summary>claims: {counts}</summary>\n\n{text}\n\n</details>'
    return f'<!-- {kind}: {name} -->\n{shown}\n<!-- end -->'

if __name__ == '__main__':
    for argument in sys.argv[1:]:
        collect(*argument.split('=', 1))
    page = DOCS / 'results.md'
    marked = r'<!-- (claims|counts): (\S+) -->.*?<!-- end -->'
    page.write_text(re.sub(marked, claims_of, page.read_text('utf-8'), flags=re.S), 'utf-8')
