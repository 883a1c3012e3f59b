"""What goes wrong at users' places: mistakes, broken files, full disks, interruptions, two runs
at once, masked gradients. One line and exit code 2, or a clean resume; nothing is lost."""

import argparse
import contextlib
import csv
import errno
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from conftest import ROOT
from PIL import Image

import common

SCRIPTS = {
    name: importlib.import_module(name)
    for name in ('train_at', 'mi_analysis', 'cifs', 'shape_bias', 'logit_distill', 'dimpled_manifold')
}
FLAGS = {  # a whole study in seconds
    'train_at': '--arch lenet5 --methods standard pgd --steps 1 --apgd-steps 1 --targets 1 --square-queries 1',
    'mi_analysis': '--arch lenet5 --steps 1 --test-steps 1 --measured 1',
    'cifs': '--arms vanilla --steps 1 --apgd-steps 1 --targets 1 --square-queries 1 --targeted-steps 1 --restarts 1',
    'shape_bias': '--arch lenet5 --steps 1 --channels 1',
    'logit_distill': '--arch lenet5 --steps 1 --students M0 --distil-epochs 1 --logit-images 40 '
    '--apgd-steps 1 --margin-steps 1 --square-queries 1 --targets 1',
    'dimpled_manifold': '--arch lenet5 --steps 1 --parts training --latent 2 --ae-epochs 2 '
    '--checkpoints 4 --watched 4 --attack-steps 1',
}
SMALL = ('--train-size 40 --test-size 40 --epochs 1 --batch-size 20 --amp fp32 --out runs').split()


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Every test runs in an empty folder, without a network and without a GPU."""

    def offline(*_, **__):
        raise URLError('no network')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('urllib.request.urlopen', offline)
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    """What has no flag."""
    for name, value in dict(CONFLICTS=90, PROBES=60, PAIRS=20, TOP=5, TAUS=(0.05,)).items():
        monkeypatch.setattr(SCRIPTS['shape_bias'], name, value)
    monkeypatch.setattr(common, 'EPS_MULTIPLES', (0, 1))
    train_at = SCRIPTS['train_at']
    monkeypatch.setattr(train_at, 'loss_surface', partial(train_at.loss_surface, points=3))


def main(script, *flags):
    """A function that runs a small study."""
    return partial(SCRIPTS[script].main, [*SMALL, *FLAGS[script].split(), *flags])


def files(folder='.'):
    """{path: contents} of all files below a folder."""
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def refused(function, message, capsys):
    """function() as a script's main: one line on stderr that matches, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_, warnings.catch_warnings(record=True) as warned:
        common.entry(function)
    stderr = capsys.readouterr().err
    assert exit_.value.code == 2
    assert not [w.message for w in warned if issubclass(w.category, (UserWarning, RuntimeWarning))]
    assert stderr.startswith('error: ') and stderr.endswith('\n'), stderr
    assert stderr[:-1].isprintable(), stderr  # neither a second line nor a colour
    assert re.search(message, stderr), stderr


# --------------------------------------------------------------------------------- bad input

MISTAKES = (  # in every script
    ('--dataset cifar', "unknown data set 'cifar'"),
    ('--dataset folder', 'unknown data set'),
    ('--dataset shapes:here', 'unknown data set'),
    ('--dataset cifar10 --image-size 64', 'goes with shapes'),
    ('--arch vgg', 'vgg'),
    ('--norm l1', 'l1'),
    ('--eps 8', 'did you mean 8/255'),
    ('--eps 0', '0 is not allowed'),
    ('--eps=-1/255', 'finite number'),
    ('--eps nan', 'finite number'),
    ('--eps inf', 'finite number'),
    (f'--eps {10**400}/1', 'finite number'),
    ('--eps 8/0', 'not a number'),
    ('--eps eight', 'not a number'),
    ('--step-size 2', 'did you mean 2/255'),
    ('--epochs 0', 'whole number'),
    ('--epochs -1', 'whole number'),
    ('--epochs 1.5', 'whole number'),
    ('--batch-size 0', 'whole number'),
    ('--train-size -1', 'whole number'),
    ('--image-size 0', 'whole number'),
    ('--lr 0', '0 is not allowed'),
    ('--weight-decay nan', 'finite number'),
    ('--schedule never', 'drops:0.6,0.8'),
    ('--schedule drops:', 'drops:0.6,0.8'),
    ('--ema 1', r'\[0, 1\)'),
    ('--eps-warmup 1', r'\[0, 1\)'),
    ('--seeds 1 1', 'differ'),
    ('--seeds -1', 'whole number'),
    (f'--seeds {2**64}', '--seeds'),
    ('--epoch 3', 'unrecognized'),
    ('--device gpu', 'gpu'),
    ('--device cuda', 'no CUDA device'),
    ('--amp fp16', 'needs a CUDA device'),
    ('--plot-only nowhere', 'nowhere'),
)
OWN_MISTAKES = (
    ('train_at', '--methods free', 'free'),
    ('train_at', '--arch wrn-28-10 --image-size 16', '32 pixels'),
    ('mi_analysis', '--arch alexnet --image-size 64', 'no layers are known for alexnet'),
    ('mi_analysis', '--variance 0', '0 is not allowed'),
    ('mi_analysis', '--measured -1', 'whole number'),
    ('mi_analysis', '--test-size 10', '--test-size is too small'),
    ('cifs', '--arch lenet5', 'no place in lenet5'),
    ('cifs', '--arms best', 'best'),
    ('cifs', '--trainings free', 'free'),
    ('cifs', '--ablate everything', 'everything'),
    ('cifs', '--topk 0', 'whole number'),
    ('cifs', '--topk 11', 'a mask for 11 classes'),
    ('cifs', '--test-size 5', 'without images'),
    ('cifs', '--mask-sum -1', 'finite number'),
    ('cifs', '--temperature 0', '0 is not allowed'),
    ('shape_bias', '--robust-weights x.pt', 'needs --weights'),
    ('shape_bias', '--weights nowhere.pt', 'no checkpoint'),
    ('shape_bias', '--weights random --seeds 0 1', 'one network'),
    ('shape_bias', '--stem 7', '--stem goes with'),
    ('shape_bias', '--arch resnet18 --stem 4', 'must be odd'),
    ('shape_bias', '--weights IMAGENET1K_V1', 'goes with alexnet'),
    ('shape_bias', '--ladder 8', 'did you mean 8/255'),
    ('shape_bias', '--ladder 0', '0 is not allowed'),
    ('shape_bias', '--arch alexnet --weights random', 'needs --cue-conflict-dir'),
    ('shape_bias', '--arch alexnet --weights random --cue-conflict-dir nowhere', 'no folder'),
    ('shape_bias', '--cue-conflict-dir nowhere', 'fewer than two classes'),
    ('shape_bias', '--probe-dir nowhere', 'needs images'),
    ('logit_distill', '--students M20', 'none of all'),
    ('logit_distill', '--students M0/T0', 'none of all'),
    ('logit_distill', '--students M0 M0', 'must differ'),
    ('logit_distill', '--students', 'expected at least one'),
    ('logit_distill', '--judged 0.7', '0.7'),
    ('logit_distill', '--teacher standard', 'standard'),
    ('logit_distill', '--distil-epochs 0', 'whole number'),
    ('logit_distill', '--student-arch lenet6', 'lenet6'),
    ('dimpled_manifold', '--parts circle', 'circle'),
    ('dimpled_manifold', '--latent 0', 'whole number'),
    ('dimpled_manifold', '--latent 4 4', 'must differ'),
    ('dimpled_manifold', '--sizes 2', 'at most 1'),
    ('dimpled_manifold', '--checkpoints 3', '4 or more'),
    ('dimpled_manifold', '--wrong-eps 0', '0 is not allowed'),
    ('dimpled_manifold', '--replicas -1', 'whole number'),
)


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('flags,message', MISTAKES)
def test_mistakes_that_all_scripts_share(script, flags, message, capsys):
    refused(partial(SCRIPTS[script].main, SMALL + flags.split()), message, capsys)
    assert files() == {} and not Path('runs').exists()


@pytest.mark.parametrize('script,flags,message', OWN_MISTAKES)
def test_mistakes_of_one_script(script, flags, message, capsys):
    refused(partial(SCRIPTS[script].main, SMALL + flags.split()), message, capsys)
    assert {Path(p).name for p in files()} <= {'config.json', 'log.txt'}


@pytest.mark.parametrize('script', SCRIPTS)
def test_data_that_are_not_there_or_too_few(script, capsys):
    main = SCRIPTS[script].main
    refused(
        partial(main, SMALL + ['--dataset', 'cifar10', '--data-root', 'nowhere']),
        'no cifar10 in nowhere .* --data-root',
        capsys,
    )
    refused(partial(main, SMALL + ['--dataset', 'folder:nowhere']), 'train/ and test/|does not stream', capsys)
    assert {Path(p).name for p in files()} <= {'config.json', 'log.txt'}
    fake_data('cifar10')
    refused(
        partial(main, SMALL + '--dataset cifar10 --trust-data --train-size 49'.split()), '--train-size 49 .* 50', capsys
    )


# -------------------------------------------------------------------------------------- data


def fake_data(name, root='data'):
    """A tiny data set of noise in torchvision's layout; its file of training images. 50 training
    and 20 test images."""
    rng = np.random.default_rng(0)
    folder = Path(
        root,
        {
            'cifar10': 'cifar-10-batches-py',
            'cifar100': 'cifar-100-python',
            'svhn': '',
            'stl10': 'stl10_binary',
            'mnist': 'MNIST/raw',
        }[name],
    )
    folder.mkdir(parents=True)

    def pixels(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)

    def put(file, content):
        (folder / file).write_bytes(content)
        return folder / file

    if name.startswith('cifar'):
        key, names = ('labels', 'label_names') if name == 'cifar10' else ('fine_labels', 'fine_label_names')
        parts = (
            {f'data_batch_{i}': 10 for i in range(1, 6)} | dict(test_batch=20)
            if name == 'cifar10'
            else dict(train=50, test=20)
        )
        for file, n in parts.items():
            put(file, pickle.dumps({'data': pixels(n, 3072), key: [i % 10 for i in range(n)]}))
        put(
            'batches.meta' if name == 'cifar10' else 'meta',
            pickle.dumps({names: [f'class {i}' for i in range(int(name[5:]))]}),
        )
        return folder / next(iter(parts))
    if name == 'svhn':
        for split, n in (('test', 20), ('train', 50)):
            path = folder / f'{split}_32x32.mat'
            scipy.io.savemat(path, dict(X=pixels(32, 32, 3, n), y=np.arange(n)[:, None] % 10 + 1))
        return path
    if name == 'stl10':
        put('unlabeled_X.bin', b'')
        put('class_names.txt', '\n'.join(f'class {i}' for i in range(10)).encode())
        for split, n in (('test', 20), ('train', 50)):
            put(f'{split}_y.bin', (np.arange(n) % 10 + 1).astype(np.uint8).tobytes())
            path = put(f'{split}_X.bin', pixels(n, 3, 96, 96).tobytes())
        return path
    for split, n in (('t10k', 20), ('train', 50)):
        put(f'{split}-labels-idx1-ubyte', struct.pack('>II', 0x801, n) + bytes(i % 10 for i in range(n)))
        path = put(f'{split}-images-idx3-ubyte', struct.pack('>IIII', 0x803, n, 28, 28) + pixels(n, 28, 28).tobytes())
    return path


@pytest.fixture
def genuine(monkeypatch):
    """A function that makes torchvision take the files of a data set for the original ones."""

    def mark(name, folder):
        cls = common.TORCHVISION[name][0]

        def md5(file):
            return hashlib.md5(Path(folder, file).read_bytes()).hexdigest()

        for attribute in ('train_list', 'test_list'):
            if hasattr(cls, attribute):
                monkeypatch.setattr(cls, attribute, [[f, md5(f)] for f, _ in getattr(cls, attribute)])
        if hasattr(cls, 'meta'):
            monkeypatch.setattr(cls, 'meta', dict(cls.meta, md5=md5(cls.meta['filename'])))
        if hasattr(cls, 'split_list'):
            monkeypatch.setattr(
                cls,
                'split_list',
                {k: [url, f, md5(f) if Path(folder, f).exists() else ''] for k, (url, f, _) in cls.split_list.items()},
            )

    return mark


def damage(path, how):
    """Break a file, or replace it, in one of the usual ways."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.unlink()
    if how != 'gone':
        path.write_bytes(
            {
                'truncated': content[:middle],
                'empty': b'',
                'altered': content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
                'html': b'<!DOCTYPE html><html>Quota exceeded</html>',
            }[how]
        )


@pytest.mark.parametrize('name', ('cifar10', 'cifar100', 'svhn', 'stl10', 'mnist'))
@pytest.mark.parametrize('how', ('gone', 'truncated', 'empty', 'altered', 'html'))
def test_damaged_data_files(name, how, genuine, capsys):
    path = fake_data(name)
    genuine(name, path.parent)
    assert len(common.load_data(name, val_size=10).train[1]) == 40
    damage(path, how)
    before = files()
    load = partial(common.load_data, name, val_size=10)
    if how == 'gone' and name == 'svhn':  # its files are fetched one by one
        refused(load, 'no svhn in data .* --data-root', capsys)
    elif name != 'mnist':
        refused(load, '--trust-data .* deleting them', capsys)
    if how == 'altered':  # the unpacked files of MNIST have no checksums
        assert len(load(trust=True).train[1]) == 40
        assert name != 'mnist' or len(load().train[1]) == 40
    else:
        refused(partial(load, trust=name != 'mnist'), 'no svhn|delet', capsys)
    assert files() == before


@pytest.mark.parametrize('labels', ([0, 1, 2], [10] * 20, [-1] * 20))
def test_labels_that_are_none(labels, capsys):
    fake_data('cifar10')
    Path('data/cifar-10-batches-py/test_batch').write_bytes(
        pickle.dumps(dict(data=np.zeros((20, 3072), np.uint8), labels=labels))
    )
    refused(partial(common.load_data, 'cifar10', trust=True), 'cifar10 files in data', capsys)


class Evil:
    """Unpickling it would create a file."""

    def __reduce__(self):
        return open, ('created', 'w')


def test_data_with_other_checksums_run_no_code(genuine, capsys):
    path = fake_data('cifar10')
    genuine('cifar10', path.parent)
    for file in path.parent.iterdir():
        content = file.read_bytes()
        file.write_bytes(pickle.dumps(Evil()))
        refused(partial(common.load_data, 'cifar10'), 'cifar10 files in data', capsys)
        assert not Path('created').exists()
        file.write_bytes(content)


def test_a_download_that_is_interrupted_starts_again(monkeypatch):
    """Half the files must not pass for all of them."""

    def half(self):
        Path(self.root, 'cifar-10-batches-py').mkdir(parents=True)
        Path(self.root, 'cifar-10-batches-py/data_batch_1').write_bytes(b'x')
        raise KeyboardInterrupt

    monkeypatch.setattr(common.TORCHVISION['cifar10'][0], 'download', half)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            common.load_data('cifar10', 'data')
        assert files() == {}


def image_folder(classes=('cat', 'dog')):
    """data/{train,test}/<class>/<n>.png of noise."""
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        for c in classes:
            Path('data', split, c).mkdir(parents=True)
            for i in range(6):
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(f'data/{split}/{c}/{i}.png')


@pytest.mark.parametrize('how', ('truncated', 'empty', 'html'))
@pytest.mark.parametrize('split', ('train', 'test'))
def test_damaged_images_of_a_folder_are_named(split, how, capsys):
    def epoch():
        data = common.load_data('folder:data', image_size=32)
        list(common.train_batches(data, 11, common.make_generator('x'), torch.device('cpu')))

    image_folder()
    epoch()
    damage(Path(f'data/{split}/dog/3.png'), how)
    refused(epoch, f'data/{split}/dog/3.png', capsys)


def test_a_damaged_image_seen_from_the_shell():
    """The real thing, with the worst way for an error to take: out of a worker process."""
    image_folder()
    damage(Path('data/train/dog/3.png'), 'html')
    run = subprocess.run(
        [
            sys.executable,
            ROOT / 'train_at.py',
            '--dataset',
            'folder:data',
            '--arch',
            'small-cnn',
            '--image-size',
            '32',
            '--epochs',
            '1',
            '--batch-size',
            '11',
            '--methods',
            'standard',
        ],
        capture_output=True,
        text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )
    assert run.returncode == 2
    assert run.stderr.startswith('error: data/train/dog/3.png cannot be read')
    assert run.stderr.count('\n') == 1, run.stderr


def test_folders_that_hold_other_things(capsys):
    load = partial(common.load_data, 'folder:data', image_size=32)
    image_folder()
    Path('data/train/bird').mkdir()
    refused(load, 'bird', capsys)  # a class without images
    Path('data/train/bird').rmdir()
    Path('data/test/dog').rename('data/test/wolf')
    refused(load, 'different classes', capsys)


# ------------------------------------------------------------------------------- checkpoints


def saved(obj):
    """The bytes of torch.save."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def shrunk(state):
    return {k: torch.zeros(1) for k in state}


# {what it is: function of what belongs there -> bytes}
BROKEN = {
    'empty': lambda right: b'',
    'half': lambda right: saved(right)[: len(saved(right)) // 2],
    'without its end': lambda right: saved(right)[:-100],
    'noise': lambda right: np.random.default_rng(0).bytes(5000),
    'html': lambda right: b'<!DOCTYPE html><html>Quota exceeded</html>',
    'a list': lambda right: saved([]),
    'a number': lambda right: saved(0),
    'nothing': lambda right: saved({}),
    'malicious': lambda right: saved(Evil()),
    'malicious in its old format': lambda right: pickle.dumps(Evil()),
    'malicious within': lambda right: saved(dict(right, history=Evil())),
}
WRONG = {
    'a state_dict': lambda right: saved(right['best']),
    'another model': lambda right: saved(right | dict(recipe=right['recipe'] | dict(seed=7))),
    'a recipe alone': lambda right: saved(dict(recipe=right['recipe'])),
    'a recipe and an end': lambda right: saved(dict(recipe=right['recipe'], finished=True)),
}
MISFITS = {
    'weights of another network': lambda right: saved(
        right | {k: shrunk(right[k]) for k in ('model', 'best') if k in right}
    )
}
FIRST = (*((script, 'network') for script in SCRIPTS), ('dimpled_manifold', 'autoencoder'))
# where the weights of some epochs are missing, too, these two train again in another file
CASES = [
    (*what, how)
    for what in FIRST
    for how in BROKEN | WRONG | MISFITS
    if not (how in MISFITS and what in (('mi_analysis', 'network'), ('dimpled_manifold', 'network')))
]


@pytest.fixture(scope='module')
def first_checkpoint(tmp_path_factory):
    """A function (script, kind) -> path and contents of the first checkpoint that its small
    study writes, after its first epoch of two."""

    class Found(BaseException):
        pass

    def found(path, obj):
        if 'recipe' in obj and ('autoencoder' in path.name) == (now[1] == 'autoencoder'):
            raise Found(path, obj)

    known, now = {}, None

    def find(*what):
        nonlocal now
        if what not in known:
            now = what
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Found) as caught:
                patch.chdir(tmp_path_factory.mktemp('first'))
                patch.setattr(common, 'write_weights', found)
                main(what[0], '--epochs', '2')()
            known[what] = caught.value.args
        return known[what]

    return find


@pytest.mark.parametrize('script,kind,how', CASES)
def test_checkpoints_that_are_none(script, kind, how, first_checkpoint, capsys):
    path, right = first_checkpoint(script, kind)
    path.parent.mkdir(parents=True)
    path.write_bytes((BROKEN | WRONG | MISFITS)[how](right))
    before = files('runs/models')
    refused(main(script, '--epochs', '2'), f'{re.escape(str(path))} .*delete it', capsys)
    after = files('runs/models')
    assert {k: after[k] for k in before} == before and not Path('created').exists()
    assert all('autoencoder' in k for k in after.keys() - before.keys())


@pytest.mark.parametrize('which', ('best', 'last', 1))
def test_trained_weights_that_do_not_fit_are_named(which, capsys):
    """As after a change of the network under the same name."""
    args = common.parse(common.make_parser(''), [*SMALL, '--arch', 'lenet5'])
    data = common.load_data('shapes', train_size=40, test_size=20)
    device = torch.device('cpu')
    result = common.train_model(args, data, 'standard', 0, device, keep=(1,))
    path = next(Path('runs/models').glob('*.pt')) if isinstance(which, str) else result['kept'][1]
    small = shrunk(result['best'])
    path.write_bytes(
        saved(small if which == 1 else {k: v for k, v in result.items() if k not in ('kept', 'path')} | {which: small})
    )
    again = common.train_model(args, data, 'standard', 0, device, keep=(1,))
    refused(lambda: common.restore(again, which, args, data, device), f'{re.escape(str(path))} .*delete it', capsys)


FOREIGN = BROKEN | {
    'a tensor': lambda right: saved(torch.zeros(3)),
    'numbers for names': lambda right: saved({1: torch.zeros(3)}),
    'a training without weights': lambda right: saved(dict(epoch=3, state_dict=None)),
    'another network': lambda right: saved(common.make_model('small-cnn').state_dict()),
}


@pytest.mark.parametrize('how', FOREIGN)
def test_foreign_weights_that_are_none(how, capsys):
    model = common.make_model('lenet5', 10, (1, 28, 28))
    path = Path('weights.pt')
    path.write_bytes(FOREIGN[how](model.state_dict()))
    before = files()
    refused(partial(common.make_model, 'lenet5', 10, (1, 28, 28), weights=path), 'weights.pt', capsys)
    assert files() == before


# -------------------------------------------------------------------- results of other studies

RESULTS = {
    'train_at': 'shapes',
    'mi_analysis': 'mi-shapes',
    'cifs': 'cifs-shapes',
    'shape_bias': 'shape-bias-shapes',
    'logit_distill': 'logit-shapes',
    'dimpled_manifold': 'dimpled-shapes',
}  # below docs/results


@pytest.mark.parametrize('script', SCRIPTS)
def test_only_finished_runs_of_the_same_study_are_redrawn(script, capsys):
    plot = main(script, '--plot-only', 'run')
    refused(plot, 'run holds no readable results.json', capsys)
    Path('run').mkdir()
    Path('run/results.json').mkdir()
    refused(plot, 'run holds no readable results.json', capsys)
    Path('run/results.json').rmdir()
    contents = {
        name: (ROOT / 'docs/results' / folder / 'results.json').read_bytes() for name, folder in RESULTS.items()
    }
    own = json.loads(contents.pop(script))
    assert own.pop('finished') == script  # and without that it is another run's, or not yet
    wrong = [b'[]', b'null', b'3', b'{}', b'{"config": {}}', json.dumps(own).encode(), *contents.values()]
    for text, message in [
        (b'', 'readable'),
        (b'{"config": {', 'readable'),
        (b'\xff\xfe', 'readable'),
        *((v, f'finished run of {script}') for v in wrong),
    ]:
        Path('run/results.json').write_bytes(text)
        refused(plot, f'run holds no {message}', capsys)
        assert files('run') == {'run/results.json': text} and not Path('runs').exists()


def test_results_that_are_none_are_measured_again(monkeypatch):
    monkeypatch.setattr(SCRIPTS['train_at'], 'draw', lambda results, folder: None)
    run = main('train_at', '--methods', 'standard')
    run()
    [path] = Path('runs/train_at').glob('*/results.json')
    right = path.read_bytes()
    for wrong in (right[: len(right) // 2], b'[]', b'\xff\xfe', b''):
        path.write_bytes(wrong)
        run()
        assert plain(json.loads(path.read_text())) == plain(json.loads(right))


# ------------------------------------------------------------------------------------ output


@contextlib.contextmanager
def small_files(limit):
    """Inside, no file of this process may grow beyond so many bytes: a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('script', SCRIPTS)
def test_output_that_cannot_be_written(script, capsys):
    Path('file').write_text('mine')
    for out in ('file', 'file/below', '/dev/full'):
        refused(main(script, '--out', out), f'(Not a directory|File exists): {out}', capsys)
    assert files() == {'file': b'mine'}
    Path('runs').mkdir()
    Path('runs/models').write_text('mine')
    refused(main(script), '(Not a directory|File exists): runs/models', capsys)
    assert {Path(p).name for p in files('runs')} == {'models', 'config.json', 'log.txt'}
    assert Path('runs/models').read_text() == 'mine'


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_folder_without_permission(capsys):
    Path('runs').mkdir(0o500)
    refused(main('train_at'), 'Permission denied: runs', capsys)


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('limit', (100, 20_000))
def test_a_full_disk(script, limit, capsys):
    """Before anything is written, and where the first checkpoint does not fit."""
    with small_files(limit):
        refused(main(script), 'File too large', capsys)
    left = files('runs')
    assert {Path(p).name for p in left} <= {'config.json', 'log.txt'}
    assert max(map(len, left.values()), default=0) <= limit
    if limit > 100:
        assert Path('runs/models').is_dir() and files('runs/models') == {}


@pytest.mark.parametrize('allocate', (torch.empty, np.empty))
def test_out_of_memory(allocate, capsys):
    refused(partial(allocate, 10**16), 'out of memory: a smaller --batch-size', capsys)


@pytest.mark.parametrize('name', ('results.json', 'metrics.csv', 'claims.md', 'fig.png', 'log.txt'))
def test_a_full_disk_at_the_end(name, capsys):
    """Whatever is written then keeps its last whole version, and no file of another name."""

    def write(n):
        common.start_log('log.txt')
        if name == 'results.json':
            common.write_json(name, list(range(n)))
        elif name == 'metrics.csv':
            common.write_metrics(name, [dict(epoch=i) for i in range(n)])
        elif name == 'claims.md':
            common.write_claims(n * [common.claim('text', 'source', '1', 'supported')], '.')
        elif name == 'fig.png':
            figure, axes = common.new_figure()
            axes[0, 0].imshow(np.random.default_rng(0).random((n, n)))
            common.save_figure(figure, '.', 'fig')
        for _ in range(n if name == 'log.txt' else 0):
            common.log.info('a line')

    write(2)
    before = files()
    with small_files(len(before[name]) + 1000):
        refused(partial(write, 1000), 'File too large', capsys)
    after = files()
    if name == 'log.txt':
        assert after['log.txt'].startswith(before['log.txt'])
    else:
        assert after | before == after and before[name] == after[name]
    assert after.keys() == before.keys()


# ----------------------------------------------------------------------------- interruptions


def around(monkeypatch, meet):
    """Call meet(moment) before and after whatever a crash could catch half done, and half-way
    through the writing of a file."""

    def patch(owner, name, half=None):
        function = getattr(owner, name)

        def patched(*args, **options):
            meet(f'before {name}')
            if half:
                try:
                    meet(f'during {name}')
                except BaseException:
                    function(args[0], args[1][: len(args[1]) // 2])
                    raise
            result = function(*args, **options)
            meet(f'after {name}')
            return result

        monkeypatch.setattr(owner, name, patched)

    patch(torch.optim.SGD, 'step')
    patch(common, 'correct_under')
    patch(os, 'replace')
    patch(Path, 'write_bytes', half=True)
    patch(Path, 'write_text', half=True)


def plain(obj):
    """Something that can be compared, without what a clock has measured."""
    if isinstance(obj, dict):
        return {str(k): plain(v) for k, v in obj.items() if k not in ('seconds', 'cost')}
    if isinstance(obj, (list, tuple)):
        return [plain(v) for v in obj]
    if torch.is_tensor(obj):
        return str(obj.dtype), obj.shape, obj.numpy().tobytes()
    return repr(obj)


def outcome(folder='runs'):
    """{path: contents} of what a study leaves, every file checked to be whole; no temporary
    ones."""
    found = {}
    for path in sorted(p for p in Path(folder).rglob('*') if p.is_file()):
        assert not path.name.startswith('.'), path
        if path.suffix == '.pt':
            found[str(path)] = plain(torch.load(path, weights_only=True))
        elif path.suffix == '.json':
            found[str(path)] = plain(json.loads(path.read_text()))
        elif path.suffix == '.csv':
            found[str(path)] = [plain(row) for row in csv.DictReader(path.open())]
        elif path.suffix == '.md':
            found[str(path)] = path.read_text()
    return found


def assert_interruptions_do_no_harm(run, monkeypatch, capsys, times=20):
    """Stop run() at `times` random moments, by Ctrl-C or a full disk, starting it again each
    time; whenever it reaches its end, what it leaves is what a run left alone leaves."""
    met, first, lengths, stops = [], [], [], []
    rng, expected, stop, error = random.Random(0), None, None, None

    def meet(moment):
        met.append(moment)
        if stop and moment == stop[0] and met.count(moment) == stop[1]:
            stops.append(moment)
            raise error

    around(monkeypatch, meet)
    while expected is None or len(stops) < times or stop:
        stop, error = None, rng.choice((KeyboardInterrupt(), OSError(errno.ENOSPC, 'disk full')))
        if expected and len(stops) < times:
            stop = rng.choice(sorted(set(first)))
            stop = stop, rng.randint(1, 1 + first.count(stop) // 3)
        met.clear()
        capsys.readouterr()
        try:
            common.entry(run)
        except SystemExit as exit_:
            stderr = capsys.readouterr().err
            if isinstance(error, KeyboardInterrupt):
                assert exit_.code == 130 and 'the same command continues' in stderr
            else:
                assert exit_.code == 2 and stderr == 'error: disk full: while writing\n'
            assert met.count(stop[0]) == stop[1]
            outcome()  # of whole files
        else:
            lengths.append(len(met))
            first = first or list(met)
            expected = expected or outcome()
            assert outcome() == expected
            shutil.rmtree('runs')
    assert min(lengths) < lengths[0] / 2  # what had been done was not done again
    assert len(set(stops)) > 0.7 * len(set(first))


def test_a_training_interrupted_twenty_times(monkeypatch, capsys):
    """Dropout, a weight average, and weights kept within and after epochs."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Flatten(),
                torch.nn.Linear(3072, 8),
                torch.nn.BatchNorm1d(8),
                torch.nn.ReLU(),
                torch.nn.Dropout(0.5),
                torch.nn.Linear(8, 10),
            )

        def forward(self, x):
            return self.net(x)

    def run():
        common.start_log()
        return common.train_model(
            args, data, 'pgd', 0, torch.device('cpu'), build=lambda *_: Net(), keep=(0, 0.5, 1, 2.5, 4, 6)
        )

    args = common.parse(
        common.make_parser(''), [*SMALL, '--epochs', '6', '--ema', '0.9', '--eps-warmup', '0', '--lr', '0.5']
    )
    data = common.load_data('shapes', train_size=40, test_size=20)
    assert 1 < run()['best_epoch'] < 6  # so that the best weights, too, have to survive
    shutil.rmtree('runs')
    assert_interruptions_do_no_harm(run, monkeypatch, capsys)


@pytest.mark.parametrize(
    'script',
    ('train_at', *(pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS if script != 'train_at')),
)
def test_a_study_interrupted_twenty_times(script, monkeypatch, capsys):
    for name in ('draw', 'judge'):
        monkeypatch.setattr(SCRIPTS[script], name, lambda results, folder: None)
    run = main(script, '--epochs', '2', *(['--seeds', '0', '1'] if script != 'train_at' else []))
    assert_interruptions_do_no_harm(run, monkeypatch, capsys)


# ---------------------------------------------------------------------------- two runs at once


class Turns:
    """Threads of which one runs at a time; at a meeting another may go on, with probability
    `often`."""

    def __init__(self, seed, often):
        self.rng, self.often, self.who = random.Random(seed), often, threading.local()
        self.waiting, self.alive, self.turn = threading.Condition(), [], 0

    def meet(self, moment=None):
        if hasattr(self.who, 'number'):  # else not one of ours
            with self.waiting:
                if self.rng.random() < self.often:
                    self.turn = self.rng.choice(self.alive)
                self.waiting.notify_all()
                self.waiting.wait_for(lambda: self.turn == self.who.number, timeout=60)

    def run(self, *functions):
        """Run them all; returns what they raised, or None, in their order."""
        raised = [None] * len(functions)

        def body(number):
            self.who.number = number
            with self.waiting:
                self.waiting.wait_for(lambda: self.turn == number, timeout=60)
            try:
                functions[number]()
            except BaseException as error:
                raised[number] = error
            with self.waiting:
                self.alive.remove(number)
                self.turn = self.alive[0] if self.alive else None
                self.waiting.notify_all()

        self.alive = list(range(len(functions)))
        threads = [threading.Thread(target=body, args=(i,)) for i in self.alive]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return raised


@pytest.mark.parametrize('often,stop', ((1, None), (0.02, None), (0.1, 50)))
def test_two_runs_at_once(often, stop, monkeypatch):
    """In one folder, taking turns; or one of them is stopped somewhere, and started again."""
    turns, count = Turns(0, often), 0

    def meet(moment):
        nonlocal count
        turns.meet()
        if getattr(turns.who, 'number', 0) == 1:
            count += 1
            if count == stop:
                raise KeyboardInterrupt

    monkeypatch.setattr(SCRIPTS['train_at'], 'draw', lambda results, folder: None)
    run = main('train_at')
    Path('alone').mkdir()
    with contextlib.chdir('alone'):
        run()
        expected = outcome()
    around(monkeypatch, meet)
    first, second = turns.run(run, run)
    assert first is None and (isinstance(second, KeyboardInterrupt) if stop else second is None)
    left = outcome()
    if stop:
        run()
    assert outcome() == expected and left.keys() == expected.keys()


def test_a_run_behind_takes_nothing_from_one_that_ends(monkeypatch):
    """While a run measures its first network another comes to its end: the first finds what
    the other has measured, and overwrites none of it."""

    def behind(*args):
        found = evaluate(*args)
        monkeypatch.setattr(train_at, 'evaluate_model', evaluate)
        run()
        monkeypatch.setattr(train_at, 'evaluate_model', lambda *_: pytest.fail('measured again'))
        return found

    def late(folder, results):  # what a run behind has so far, written at the worst time
        common.write_json(folder / 'results.json', {k: results[k] for k in ('config', 'code')})
        return finish(folder, results)

    train_at, finish = SCRIPTS['train_at'], common.finish
    evaluate, run = train_at.evaluate_model, main('train_at')
    monkeypatch.setattr(train_at, 'draw', lambda results, folder: None)
    monkeypatch.setattr(common, 'finish', late)
    monkeypatch.setattr(train_at, 'evaluate_model', behind)
    run()  # has nothing left to measure once it has found the other's results
    [path] = Path('runs/train_at').glob('*/results.json')
    assert json.loads(path.read_text()).keys() > {'standard-s0', 'pgd-s0', 'gallery', 'finished'}


@pytest.mark.slow
@pytest.mark.parametrize('script', ('train_at', 'mi_analysis'))  # without and with kept epochs
def test_two_processes_at_once(script):
    """The real thing, and alone for comparison. One of a second pair is killed."""

    def start(where):
        Path(where).mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, ROOT / f'{script}.py', *SMALL, *FLAGS[script].split()],
            cwd=where,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {'OMP_NUM_THREADS': '1'},
        )

    def end(process):
        stderr = process.communicate(timeout=300)[1]
        assert process.returncode == 0, stderr

    def left(where):
        with contextlib.chdir(where):
            return outcome()

    end(start('alone'))
    both = [start('both'), start('both')]
    for process in both:
        end(process)
    killed, other = start('killed'), start('killed')
    models = Path('killed/runs/models')
    while killed.poll() is None and not (models.is_dir() and list(models.glob('*.pt'))):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    end(other)
    for path in Path('killed').rglob('.*'):  # kill -9 may leave a file half written
        path.unlink()
    assert left('alone') == left('both') == left('killed')


# ---------------------------------------------------------------------------- masked gradients


class Masked(torch.nn.Module):
    """A network behind what has made networks look robust."""

    def __init__(self, net, how):
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x):
        if self.how == 'quantised input':
            x = (4 * x).round() / 4
        logits = self.net(x)
        if self.how == 'logits x 1000':
            return 1000 * logits
        if self.how == 'dropout left on':
            return torch.nn.functional.dropout(logits, 0.5, training=True)
        if self.how == 'constant':
            return 0 * logits + torch.arange(5.0).flip(0)
        return logits.softmax(1) if self.how == 'probabilities' else logits


@pytest.fixture(scope='module')
def clean():
    """A small trained network, images that it gets right, and their labels."""
    torch.manual_seed(0)
    y = torch.arange(600) % 5
    means = 0.5 + 0.06 * torch.randn(5, 3, 8, 8)
    x = (means[y] + 0.1 * torch.randn(600, 3, 8, 8)).clamp(0, 1)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
    optimizer = torch.optim.Adam(net.parameters(), 0.003)
    for _ in range(200):  # with few steps cross-entropy can be the poorer attack, masked or not
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x[100:]), y[100:]).backward()
        optimizer.step()
    return net, x[:100], y[:100]


@pytest.mark.parametrize(
    'how,flag',
    (
        (None, None),
        ('logits x 1000', 'zero input gradients'),
        ('quantised input', 'zero input gradients'),
        ('dropout left on', 'random outputs'),
        ('probabilities', 'outputs are probabilities'),
        ('constant', 'unbounded attack leaves accuracy'),
    ),
)
def test_masked_gradients_trip_their_own_flag(how, flag, clean):
    net, x, y = clean
    model = Masked(net, how)
    y = torch.zeros_like(y) if how == 'constant' else y
    args = argparse.Namespace(eps=0.04, norm='linf', apgd_steps=20, targets=3, square_queries=200)
    correct = {'natural': common.correct_under(model, x, y)} | {
        name: common.correct_under(model, x, y, attack)
        for name, attack in common.evaluation_attacks(args, 0, 'cpu').items()
    }
    checks = common.masking_check(model, x, y, correct, eps=args.eps)
    raised = {k.partition(' (')[0] for k, (_, _, yes) in checks.items() if yes}
    if how is None:
        assert raised == set() and len(checks) == 8
        assert 0.1 < correct['apgd_t'].float().mean() < 0.9  # there was something to see
    else:
        assert flag in raised
        assert raised & {'random outputs', 'outputs are probabilities'} <= {flag}


@pytest.mark.parametrize(
    'weak,strong,flag',
    (
        ('pgd20', 'fgsm', 'one step beats twenty (gap)'),
        ('pgd20', 'pgd100', 'twenty steps are too few (gap)'),
        ('apgd_ce', 'apgd_t', 'cross-entropy is a poor attack (gap)'),
        ('pgd20', 'square', 'black box finds what white box misses'),
    ),
)
def test_a_stronger_attack_trips_the_flag_of_the_weaker(weak, strong, flag, clean):
    net, x, y = clean
    limit = round(100 * common.masking_check(net, x, y, {k: y >= 0 for k in (weak, strong)}, eps=0.03)[flag][1])
    for more, expected in ((0, []), (limit - 1, []), (limit + 1, [flag])):
        correct = {weak: torch.ones(100, dtype=torch.bool), strong: torch.arange(100) >= more}
        checks = common.masking_check(net, x, y, correct, eps=0.03)
        assert [k for k, (_, _, raised) in checks.items() if raised] == expected


@pytest.mark.parametrize(
    'broken,words',
    ((lambda x: x + 0.0302, 'left the ball'), (lambda x: x - 2, 'left .0, 1'), (lambda x: x * math.nan, 'non-finite')),
)
def test_an_attack_that_cheats_is_no_evaluation(broken, words, clean):
    def cheat(model, x, y, eps):
        return broken(x)

    net, x, y = clean
    with pytest.raises(AssertionError, match=words):
        common.correct_under(net, 0.3 + 0.4 * x, y, partial(cheat, eps=0.03))
