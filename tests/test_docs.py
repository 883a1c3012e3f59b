"""The documents: commands parse, examples run, tables are those of the runs."""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import common

sys.path.insert(0, str(ROOT / 'docs'))
import redraw

SCRIPTS = ('train_at', 'mi_analysis', 'cifs', 'shape_bias', 'logit_distill', 'dimpled_manifold')


def notebook():
    cells = json.loads((ROOT / 'docs/colab.ipynb').read_text())['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')


def commands(text):
    text = text.replace('\\\n', ' ')
    for script, flags in re.findall(rf'(?:python|node=\d+) ({"|".join(SCRIPTS)})\.py((?: +[^\s`#]+)*)', text):
        flags = re.split(r' {2,}(?![ -])', flags)[0]  # a comment stands two blanks behind
        if '--help' not in flags:
            yield script, shlex.split(flags)


def config_of(script, flags, monkeypatch):
    """What the command would run with, or SystemExit, UserError."""

    class Parsed(Exception):
        pass

    def stop(study, args):
        raise Parsed({k: v for k, v in vars(args).items() if k not in {'changed', *common.ELSEWHERE}})

    monkeypatch.setattr(common, 'start_run', stop)
    monkeypatch.setattr(common, 'load_data', lambda *a, **k: None)
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(script).main(flags)
    return json.loads(json.dumps(parsed.value.args[0]))


def test_commands_parse(monkeypatch):
    texts = [(ROOT / f).read_text() for f in ('README.md', 'docs/results.md')] + [notebook()]
    texts += [ast.get_docstring(ast.parse((ROOT / f'{s}.py').read_text())) for s in SCRIPTS]
    found = [c for text in texts for c in commands(text)]
    assert len(found) > 50 and {s for s, _ in found} == set(SCRIPTS)
    for script, flags in found:
        config_of(script, flags, monkeypatch)


def test_documented_commands_are_those_of_the_runs(monkeypatch):
    page = (ROOT / 'docs/results.md').read_text()
    rows = dict((n, (s, f)) for n, s, f in re.findall(r'\| \[([\w-]+)\]\(.*?\) \| `python (\w+)\.py ?(.*?)`', page))
    folders = sorted(p.parent for p in (ROOT / 'docs/results').glob('*/results.json'))
    assert sorted(rows) == [f.name for f in folders]
    for folder in folders:
        script, flags = rows[folder.name]
        assert script == redraw.SCRIPTS.get(folder.name.split('-')[0], 'train_at')
        asked, done = (
            config_of(script, shlex.split(flags), monkeypatch),
            json.loads((folder / 'config.json').read_text()),
        )
        for key in asked.keys() - {'amp', 'cue_conflict_dir'}:
            assert asked[key] == done[key], (folder.name, key)
        assert redraw.with_claims(page, folder) == page, f'python docs/redraw.py {folder.name}'


def test_fork_example_runs_in_an_empty_folder(tmp_path):
    section = (ROOT / 'README.md').read_text().split('## How to fork')[1].split('\n## ')[0]
    blocks = re.findall(r'```python\n(.*?)```', section, re.S)
    assert len(blocks) == 5 and all(b.count('\n') < 10 for b in blocks)
    (tmp_path / 'mine.py').write_text(''.join(blocks))
    shutil.copy(ROOT / 'common.py', tmp_path)
    run = subprocess.run([sys.executable, 'mine.py', '--device', 'cpu'], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.splitlines()[-1].startswith('robust accuracy'), run.stderr
