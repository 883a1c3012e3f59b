"""Many processes give what one gives: losses, weights, resumed trainings, every attacked image."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import common

CPU = torch.device('cpu')
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE')} | {
    'OMP_NUM_THREADS': '1',
    'PYTHONPATH': os.pathsep.join((str(ROOT), str(ROOT / 'tests'))),
}


def torchrun(processes, *command, expect=0):
    """Run a script in so many processes; (stdout, stderr)."""
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            f'--nproc-per-node={processes}',
            *map(str, command),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == expect, done.stderr[-4000:]
    return done.stdout, done.stderr


def arguments(out, **changes):
    args = common.parse(common.make_parser(''), ['--out', str(out), '--amp', 'fp32'])
    vars(args).update(dict(epochs=2, train_size=96, test_size=20, batch_size=32, eps_warmup=0.0) | changes)
    return args


class Net(nn.Module):
    """Batch norm and dropout, two outputs, and keyword arguments that are batches, too."""

    def __init__(self, *_):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn1 = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(8, 16)
        self.bn2 = nn.BatchNorm1d(16, momentum=None)
        self.head = nn.Linear(16, 10)

    def forward(self, x, shifts=None):
        x = x.double()
        z = F.relu(common.conv_bn(x, self.conv, self.bn1)).mean((2, 3))
        z = self.bn2(self.fc(self.drop(z)))
        return self.head(F.relu(z)) + (shifts['all'] if shifts else 0), z


class Double(nn.Module):
    """A network in double precision. In float32 the signs of a training attack's gradients
    make a rounding error of one step visible a few steps later, with any number of processes."""

    def __init__(self, *args):
        super().__init__()
        self.net = common.make_model(*args).double()

    def forward(self, x):
        return self.net(x.double())


def net_loss(model, x, y, threat, generator):
    """Two calls, a subset of the batch, a penalty that does not go through the model."""
    x_adv = common.pgd(model, x, y, **threat, generator=generator)
    shifts = {'all': torch.rand(len(x), 10, generator=generator)}
    penalty = sum(p.square().sum() for p in model.parameters())
    return F.cross_entropy(model(x_adv, shifts=shifts)[0], y) + 0.01 * penalty + model(x[5:])[1].square().mean()


def train(out, method='pgd', loss_fn=None, build=common.make_model, **changes):
    data = common.load_data('shapes', train_size=96, test_size=20)
    return common.train_model(
        arguments(out, **changes),
        data,
        method,
        0,
        CPU,
        loss_fn=loss_fn,
        build=build,
        keep=(1,) if method == 'trades' else (),
    )


TRAININGS = {
    'float32': dict(epochs=1),
    'l2': dict(norm='l2', eps=0.5, step_size=0.2, epochs=1),
    'standard': dict(method='standard', epochs=1, lr=0.02),
    'pgd': dict(build=Double),
    'trades': dict(method='trades', ema=0.9, build=Double),
    'net': dict(method='net', loss_fn=net_loss, build=lambda *_: Net().double()),
}


def evaluate():
    """{what: tensor} of every attack on a small network, its points included."""
    g = torch.Generator().manual_seed(0)
    model = common.make_model('small-cnn').eval()
    x = torch.rand(21, 3, 32, 32, generator=g).contiguous(memory_format=torch.channels_last)
    y = common.predict(model, x)
    out = {}
    for name, attack in {
        'natural': None,
        'fgsm': partial(common.fgsm, eps=0.01),
        'pgd': partial(common.pgd, eps=0.004, step_size=0.001, steps=4, drop_fooled=True, restarts=2),
        'l2': partial(common.pgd, eps=0.1, step_size=0.03, steps=4, norm='l2'),
        'apgd': partial(common.apgd, eps=0.004, steps=5, targets=2),
        'square': partial(common.square, eps=0.01, queries=12),
    }.items():
        if attack and name != 'fgsm':
            attack = partial(attack, generator=common.make_generator(name))
            out[name + ' points'] = attack(model, x, y)
            attack.keywords['generator'] = common.make_generator(name)
        out[name] = common.correct_under(model, x, y, attack, batch_size=16)
    out['curve'] = torch.tensor(common.eps_curve(model, x, y, eps=0.002, generator=common.make_generator('curve')))
    correct = {k: out[k] for k in ('fgsm', 'square')}
    out['masking'] = torch.tensor(
        [
            v[0]
            for v in common.masking_check(
                model, x, y, correct, eps=0.01, generator=common.make_generator('masking')
            ).values()
        ]
    )
    out['one image'] = common.fgsm(model, x[:1], y[:1], eps=0.01)
    assert model(x).shape == (21, 10) and not hasattr(model, 'is_spread')
    return out


WORKER = '''
import sys, torch, common, test_distributed
torch.set_num_threads(1)
common.pick_device('cpu')
out, names = sys.argv[1], sys.argv[2].split(',')
found = {n: test_distributed.train(out, **test_distributed.TRAININGS[n]) for n in names}
torch.save(dict(trained=found, evaluated=test_distributed.evaluate()),
           f'{out}/rank{common.rank()}.pt')
'''


def assert_close(a, b):
    """The same accuracies, losses to 1e-5, and weights as their precision has it."""
    assert len(a['history']) == len(b['history']) and a['best_epoch'] == b['best_epoch']
    for x, y in zip(a['history'], b['history']):
        assert x['loss'] == pytest.approx(y['loss'], abs=1e-5)
        assert x['val_natural'] == y['val_natural'] and x['val_robust'] == y['val_robust']
    for k, v in a['last'].items():
        double = v.dtype == torch.float64
        assert torch.allclose(v, b['last'][k], rtol=0, atol=1e-9 if double else 1e-4), k


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """What one process finds."""
    return {n: train(tmp_path_factory.mktemp(n), **t) for n, t in TRAININGS.items()}


@pytest.mark.parametrize('processes,names', ((2, ','.join(TRAININGS)), pytest.param(3, 'net', marks=pytest.mark.slow)))
def test_processes_agree_with_one_and_with_each_other(tmp_path, alone, processes, names):
    worker = tmp_path / 'worker.py'
    worker.write_text(WORKER)
    torchrun(processes, worker, tmp_path, names)
    ranks = [torch.load(tmp_path / f'rank{i}.pt', weights_only=False) for i in range(processes)]
    for name in names.split(','):
        assert_close(ranks[0]['trained'][name], alone[name])
        for other in ranks[1:]:  # the same bits, or they would drift apart
            for k, v in ranks[0]['trained'][name]['last'].items():
                assert torch.equal(v, other['trained'][name]['last'][k])
    expected = evaluate()
    for found in ranks:
        for name, value in expected.items():
            assert torch.equal(found['evaluated'][name], value), name
    names = {p.suffix for p in (tmp_path / 'models').rglob('*')}
    assert names <= {'.pt', ''}  # nothing half written


STOPPED = '''
import sys, torch, common, test_distributed
torch.set_num_threads(1)
device = common.pick_device('cpu')
def main():
    common.start_log()
    calls = []
    def loss_fn(*batch):
        calls.append(1)
        if len(calls) == 5 and common.rank() == int(sys.argv[2]):
            raise common.UserError('stopped in the second epoch')
        return common.pgd_loss(*batch)
    test_distributed.train(sys.argv[1], loss_fn=loss_fn, build=test_distributed.Double)
common.entry(main)
'''


def test_an_error_in_one_process_ends_all_and_any_number_continues(tmp_path, alone):
    script, resumed = tmp_path / 'run.py', tmp_path / 'worker.py'
    script.write_text(STOPPED)
    resumed.write_text(WORKER)
    text, errors = torchrun(2, script, tmp_path / 'one', 1, expect=1)  # torchrun's own exit code
    lines = errors.splitlines()
    assert [n for n in lines if n.startswith('error:')] == ['error: stopped in the second epoch']
    assert 'exitcode  : 2' in errors and 'RuntimeError' not in errors
    assert text.count('epoch   1/2') == 1 and 'epoch   2/2' not in text
    shutil.copytree(tmp_path / 'one', tmp_path / 'two')
    assert_close(train(tmp_path / 'one', build=Double), alone['pgd'])  # one takes over from two
    torchrun(2, resumed, tmp_path / 'two', 'pgd')
    assert_close(torch.load(tmp_path / 'two' / 'rank1.pt', weights_only=False)['trained']['pgd'], alone['pgd'])


@pytest.mark.parametrize(
    'flags,message',
    (
        (('--eps', 3), 'did you mean'),
        pytest.param(('--batch-size', 1), 'cannot train on a batch of 1', marks=pytest.mark.slow),
    ),
)
def test_a_mistake_is_one_line(tmp_path, flags, message):
    _, errors = torchrun(
        2, ROOT / 'train_at.py', '--out', tmp_path, '--train-size', 64, '--test-size', 20, *flags, expect=1
    )
    [line] = [n for n in errors.splitlines() if n.startswith('error:')]
    assert message in line


@pytest.mark.slow
@pytest.mark.parametrize(
    'script,flags',
    (
        ('train_at.py', '--methods pgd --apgd-steps 2 --targets 1 --square-queries 3'),
        ('cifs.py', '--arms cifs --apgd-steps 2 --targets 1 --square-queries 2 --targeted-steps 1 --restarts 1'),
    ),
)
def test_studies_run_in_two_processes(tmp_path, script, flags):
    flags = f'{flags} --epochs 1 --train-size 64 --test-size 20 --amp fp32'.split()
    text, _ = torchrun(2, ROOT / script, '--out', tmp_path / 'two', *flags)
    [folder] = (tmp_path / 'two' / script[:-3]).iterdir()
    results = json.loads((folder / 'results.json').read_text())
    assert text.count('figures and results in') == 1 and list(folder.glob('fig*.png'))
    assert not [p for p in folder.iterdir() if p.name.startswith('.')]
    log = (folder / 'log.txt').read_text()
    assert (
        log.count('epoch   1/1') == text.count('epoch   1/1') == len(list((tmp_path / 'two' / 'models').glob('*.pt')))
    )
    if script == 'train_at.py':  # one process accepts the models and the results as they are
        done = subprocess.run(
            [sys.executable, ROOT / script, '--out', tmp_path / 'two', *flags],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0
        assert done.stdout.count('trained already') == log.count('epoch   1/1')
        assert json.loads((folder / 'results.json').read_text()) == results
