"""What the documentation says works: commands, links, the fork example."""
import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest

import common

ROOT = common.Path(common.__file__).parent
PAGES = {name: (ROOT / name).read_text('utf-8') for name in ('README.md', 'docs/results.md')}
for cell in json.loads((ROOT / 'docs' / 'colab.ipynb').read_text('utf-8'))['cells']:
    PAGES['notebook'] = PAGES.get('notebook', '') + '\n' + ''.join(cell['source'])
SCRIPTS = 'train_at|cifs|mi_analysis|shape_bias|logit_distill|dimpled_manifold'
TEXT = '\n'.join(PAGES.values()).replace('\\\n', ' ')
for script in SCRIPTS.split('|'):
    TEXT += '\n' + importlib.import_module(script).__doc__.replace('\\\n', ' ')
# a comment, an explanation or the end of a quotation ends a command
FOUND = [re.split(r'[`#(|]| {2,}(?![- ])|,(?![0-9])', m[0])[0].strip()
         for m in re.finditer(rf'({SCRIPTS})\.py .*', TEXT)]
COMMANDS = sorted({command for command in FOUND if ' -' in command})

def test_commands_are_found():
    assert len(COMMANDS) > 12

@pytest.mark.parametrize('command', COMMANDS)
def test_documented_commands_parse(command, monkeypatch):
    """Each is run until its flags have been checked."""
    script, *flags = command.split()

    def stop(*args, **options):
        raise KeyError('parsed')

    monkeypatch.setattr(common, 'start', stop)
    with pytest.raises(KeyError, match='parsed'):
        importlib.import_module(script.removesuffix('.py')).main(flags)

@pytest.mark.parametrize('page', ('README.md', 'docs/results.md'))
def test_links_lead_somewhere(page):
    base = (ROOT / page).parent
    for link in re.findall(r'\]\(([^)#:]+)[)#]|src="([^"]+)"', PAGES[page]):
        assert (base / (link[0] or link[1])).exists(), link

def test_fork_example_runs(tmp_path):
    (example,) = re.findall(r'```python\n(.*?)```', PAGES['README.md'], re.S)
    shutil.copy(ROOT / 'common.py', tmp_path)
    (tmp_path / 'mine.py').write_text(example, 'utf-8')
    flags = '--train-size 60 --test-size 20 --epochs 1 --batch-size 20 --steps 1'.split()
    done = subprocess.run([sys.executable, 'mine.py', *flags], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b'survive' in (tmp_path / 'runs/mine').glob('*/claims.md').__next__().read_bytes()
