"""Each script from the outside: what it leaves, finished runs, data that change, mistakes."""
import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
from test_data import class_folders

import common

ROOT = Path(common.__file__).parent
TINY = '--train-size 60 --test-size 20 --epochs 1 --batch-size 20 --device cpu --amp fp32'.split()
SCRIPTS = [  # each with flags of its own that make it tiny; the first one also makes all mistakes
    ('train_at', '--methods standard pgd --apgd-steps 2 --targets 1 --square-queries 2'.split()),
    ('mi_analysis', '--measured 1'.split()),
    ('cifs', '--image-size 16 --arms vanilla cifs --warm-start 1 --apgd-steps 2 --targets 1 '
     '--square-queries 2'.split()),
    ('logit_distill', '--distil-epochs 1 --suite short --students M0'.split()),
    # dimpled_manifold and shape_bias: in their own files, with smaller constants
]
SCRIPT, FLAGS = SCRIPTS[0][0], TINY + SCRIPTS[0][1]
FOLDER = [*FLAGS, *'--train-size 0 --test-size 0 --arch small-cnn'.split()]

def call(capsys, script, *flags):
    """(exit code, stdout, stderr) of a command that runs in this process."""
    code = 0
    try:
        common.entry(partial(importlib.import_module(script).main, list(map(str, flags))))
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()

def refused(capsys, script, *flags):
    """The one line on stderr of a command that ends at once; it has trained nothing."""
    code, _, error = call(capsys, script, *flags)
    assert code == 2 and re.fullmatch('error: [^\n]+\n', error), error
    assert not list(Path().rglob('*.pt'))
    return error

def command(file, flags, cwd, **env):
    """stdout of a file of ours, run from another folder, on its own."""
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | env
    done = subprocess.run([sys.executable, file, *map(str, flags)], cwd=cwd, env=env,
                          capture_output=True)
    assert (done.returncode, done.stderr) == (0, b''), done.stderr.decode()
    return done.stdout

def pictures(folder):
    return {path.name: zlib.crc32(path.read_bytes()) for path in folder.glob('*.png')}

def models(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / 'models').glob('*')}

@pytest.fixture(scope='module', params=SCRIPTS, ids=lambda row: row[0])
def finished(request, tmp_path_factory):
    """(script, flags, folder of its results) of a run of a copy with common.py and nothing else."""
    (script, flags), home = request.param, tmp_path_factory.mktemp('alone')
    for name in (script, 'common'):
        shutil.copy(ROOT / f'{name}.py', home)
    where = tmp_path_factory.mktemp('where')
    command(home / f'{script}.py', [*TINY, *flags], where)
    assert [path.name for path in where.iterdir()] == ['runs']
    assert {path.name for path in home.iterdir()} <= {f'{script}.py', 'common.py', '__pycache__'}
    (folder,) = (where / 'runs' / script).iterdir()
    return script, [*TINY, *flags], folder

@pytest.fixture
def no_network(monkeypatch):
    """Whatever runs a network fails: nothing may be trained or measured."""
    monkeypatch.setattr(torch.nn.Conv2d, 'forward', None)

# ----------------------------------------------------------------------------- Finished runs

def test_a_run_leaves_what_it_promises(finished):
    script, _, folder = finished
    names = {path.name for path in folder.iterdir()}
    assert {'config.json', 'results.json', 'results.npz', 'claims.md', 'log.txt',
            'metrics.csv'} < names and pictures(folder) and not any('tmp' in n for n in names)
    config, results = json.loads((folder / 'config.json').read_text()), common.load_results(folder)
    assert results['finished'] == script and results['config'] == config
    assert config['train_size'] == 60 and config['epochs'] == 1
    table = (folder / 'claims.md').read_text().split('\n\n')[0].splitlines()
    assert len(table) == 2 + len(results['claims']) > 2
    rows = (folder / 'metrics.csv').read_text().splitlines()
    assert len(rows) > 1 and {row.count(',') for row in rows} == {rows[0].count(',')}
    assert (ROOT / f'{script}.py').read_text().endswith('\n    common.entry(main)\n')

def test_the_same_command_again_only_redraws(finished, no_network, monkeypatch, capsys):
    script, flags, folder = finished
    monkeypatch.chdir(folder.parent.parent.parent)
    trained, drawn = models(Path('runs')), pictures(folder)
    text = zlib.crc32((folder / 'results.json').read_bytes())
    for name in drawn:
        (folder / name).unlink()
    assert call(capsys, script, *flags)[::2] == (0, '') and models(Path('runs')) == trained
    assert pictures(folder) == drawn
    assert zlib.crc32((folder / 'results.json').read_bytes()) == text

def test_plot_only_needs_nothing_but_results(finished, no_network, tmp_path, monkeypatch, capsys):
    script, _, folder = finished
    copy = tmp_path / 'copy'
    copy.mkdir()
    for name in ('results.json', 'results.npz'):
        shutil.copy(folder / name, copy)
    monkeypatch.chdir(tmp_path)
    assert call(capsys, script, '--plot-only', copy)[::2] == (0, '')
    assert pictures(copy) == pictures(folder) and list(tmp_path.iterdir()) == [copy]

@pytest.mark.parametrize('script,flags', SCRIPTS)
def test_l2(script, flags, tmp_path, capsys):
    assert call(capsys, script, *TINY, *flags, '--norm', 'l2', '--out', tmp_path)[::2] == (0, '')
    (folder,) = (tmp_path / script).iterdir()
    assert pictures(folder) and json.loads((folder / 'config.json').read_text())[
        'eps'] == pytest.approx(128 / 255)

@pytest.mark.parametrize('length', (0, 0.5))
def test_damaged_checkpoints_are_named_and_kept(finished, length, tmp_path, monkeypatch, capsys):
    script, flags, folder = finished
    shutil.copytree(folder.parent.parent / 'models', tmp_path / 'models')
    for path in (tmp_path / 'models').iterdir():
        os.truncate(path, int(length * path.stat().st_size))
    before = models(tmp_path)
    empty = tmp_path / 'empty'
    empty.mkdir()
    monkeypatch.chdir(empty)  # in which nothing may be trained
    error = refused(capsys, script, *flags, '--out', tmp_path)
    assert any(name in error for name in before) and models(tmp_path) == before

# ------------------------------------------------------------------------------ Class folders

def test_three_classes_whose_images_and_names_change(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = dict(a=5, b=5, c=5)
    name, *size = class_folders(tmp_path / 'data', train=few, test=few)
    again = partial(call, capsys, SCRIPT, *FOLDER, '--dataset', name, *size)
    assert again()[::2] == (0, '')
    (folder,), first = Path('runs', SCRIPT).iterdir(), models(Path('runs'))
    for label in few:
        shutil.copy(f'data/test/{label}/0.png', f'data/test/{label}/new.png')
    code, out, error = again()
    assert (code, error) == (0, '') and 'afresh' in out and models(Path('runs')) == first
    assert sorted(common.load_results(folder)['labels']) == [0] * 6 + [1] * 6 + [2] * 6
    for split in ('train', 'test'):
        Path('data', split, 'a').rename(Path('data', split, 'z'))
    code, out, error = again()
    assert (code, error) == (0, '') and 'afresh' in out
    assert len(models(Path('runs'))) == 2 * len(first)
    assert common.load_results(folder)['classes'] == ['b', 'c', 'z']

def test_two_classes_named_beyond_ascii_in_an_ascii_locale(tmp_path):
    few = {'é': 5, 'ü': 5}
    name, *size = class_folders(tmp_path / 'data', train=few, test=few)
    ascii_only = dict(LC_ALL='C', PYTHONCOERCECLOCALE='0', PYTHONUTF8='0')
    flags = [*FOLDER, '--dataset', name, *size]
    out = command(ROOT / f'{SCRIPT}.py', flags, tmp_path, **ascii_only)
    (folder,) = (tmp_path / 'runs' / SCRIPT).iterdir()
    assert common.load_results(folder)['classes'] == ['é', 'ü'] and pictures(folder)
    assert re.search('[éü]', (folder / 'claims.md').read_text('utf-8'))
    assert re.search('[éü]', (folder / 'log.txt').read_text('utf-8'))
    assert re.search(rb'\\xe9|\\xfc', out)

GOOD = dict(a=3, b=3)

@pytest.mark.parametrize('train,test,flags,words', (
    (GOOD, {}, (), 'needs train/ and test/'), ({}, GOOD, (), 'needs train/ and test/'),
    (dict(a=3, b=0), GOOD, (), r"without .*\['b'\]"), (dict(a=3), dict(a=3), (), 'one class'),
    (GOOD, dict(a=3, c=3), (), r"other classes .*\['b', 'c'\]"),
    (dict(a=1, b=1), GOOD, (), 'validate'),
    (GOOD, GOOD, ('--train-size', 5), '--train-size 5 .* 4 images'),
    (GOOD, GOOD, ('--test-size', 7), '--test-size 7 .* 6 images'),
    (GOOD, GOOD, ('--image-size', 10**6), 'memory: .*--train-size')))  # 36 TB, and a copy
def test_folders_that_are_refused(train, test, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = class_folders(tmp_path / 'data', train=train, test=test)
    assert re.search(words, refused(capsys, SCRIPT, *FOLDER, '--dataset', *folder, *flags))

# ----------------------------------------------------------------------------------- Mistakes

MISTAKES = (  # flags, words of the line; the first for every script
    ('--eps 8', '8/255 is meant'), ('--eps 8/0', "'8/0'"), ('--eps nan', "'nan'"),
    ('--eps -1', "'-1'"), ('--lr abc', "'abc'"), ('--norm l2 --eps 128', '128/255'),
    ('--step-size 17/255', 'ball'), ('--schedule drops:nan', 'drops:nan'),
    ('--schedule drops:2,3', 'drops:2,3'), ('--epochs 0', '--epochs'), ('--epochs 1.5', "'1.5'"),
    ('--seeds 0 0', '--seeds'), ('--dataset cifar', 'known: shapes'), ('--steps -1', '--steps'),
    ('--dataset folder', 'folder:PATH'), ('--dataset folder:nowhere', 'nowhere'),
    ('--dataset mnist', 'mnist in data'), ('--dataset cifar10 --image-size 32', '--image-size'),
    ('--eps-warmup 1', '--eps-warmup'), ('--device cuda', 'no CUDA'), ('--amp fp16', 'CUDA'),
    ('--plot-only .', 'no finished run'), ('--arch lenet5 --image-size 12', 'lenet5'),
    ('--out file/below', 'file/below'), ('--epoch 1', '--epoch'))

@pytest.mark.filterwarnings('error::UserWarning')  # it would stand on stderr, too
@pytest.mark.parametrize('script,flags,words', [(SCRIPT, *row) for row in MISTAKES] + [
    (script, *MISTAKES[0]) for script, _ in SCRIPTS[1:]])
def test_mistakes_are_one_line(script, flags, words, tmp_path, monkeypatch, capsys):
    if 'cuda' in flags and torch.cuda.is_available():
        pytest.skip('there is a CUDA device')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('urllib.request.urlopen', lambda *_, **__: 1 / 0)
    Path('file').touch()
    assert words in refused(capsys, script, *TINY, *dict(SCRIPTS)[script], *flags.split())

def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('disk').mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'none', 'disk']  # a real one as root
    mounted = shutil.which('mount') and not subprocess.call(mount, stderr=subprocess.DEVNULL)
    write = Path.write_bytes

    def full(path, content):
        if len(content) > 64 * 1024:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)
    monkeypatch.setattr(Path, 'write_bytes', write if mounted else full)
    try:
        assert 'No space left' in refused(capsys, SCRIPT, *FLAGS, '--out', 'disk')
        assert not list(Path('disk').rglob('*.tmp'))
    finally:
        if mounted:
            subprocess.check_call(['umount', '-l', 'disk'])

@pytest.mark.parametrize('dataset,defaults', (
    ('cifar10', dict(arch='resnet18', epochs='200', eps='8/255', lr='0.1')),
    ('mnist', dict(arch='small-cnn', epochs='20', eps='0.3', steps='40'))))
def test_help_shows_the_defaults_of_the_data_set(dataset, defaults, capsys):
    code, out, _ = call(capsys, SCRIPT, '--dataset', dataset, '--help')
    shown = dict(re.findall(r'--([a-z-]+) [^()]*\(default: (\S+)\)', ' '.join(out.split())))
    assert code == 0 and defaults.items() <= shown.items() and len(shown) <= 25 + 8
