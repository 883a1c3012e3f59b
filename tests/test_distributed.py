"""Two processes give what one gives: weights, verdicts, resumed trainings, files written once."""
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from test_training import DATA, X, same, train
from torch import nn

import common

LAUNCH = (sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2', '--standalone')

def plain(arch, classes, shape, seed):
    """No batch norm, which on CPUs each process has of its own part of a batch."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))

def measure(out):
    """Weights after two updates of step size 1, the images they saw, and which of 600 images,
    three batches, are right after an attack with a random start."""
    seen, model = [], plain('', 4, (3, 8, 8), 0)
    loss_fn = lambda net, *batch: seen.append(batch[0]) or common.standard_loss(net, *batch)
    data = replace(DATA, pad=0, flip=False)  # crops are each process's own
    state = train(out, 'plain', data, plain, loss_fn=loss_fn, batch_size=16, lr=1.0)
    x = X.roll(1, 3).repeat(10, 1, 1, 1)[:600]
    y = common.logits_of(model, x).argmax(1) * (torch.arange(600) % 7 > 0)
    attack = partial(common.pgd, eps=0.03, step_size=0.01, steps=1)
    return state['last'], seen, common.correct_under(model, x, y, attack)

def program(out):
    """What each process runs. The first time it dies in the second epoch of a training."""
    common.pick_device('cpu')
    rename, first, updates = Path.replace, not (out / 'killed').exists(), iter(range(99))
    def tell_and_rename(*paths):
        with open(out / 'writers', 'a') as file:
            file.write(f'{common.RANK} {Path(paths[1]).suffix}\n')
        rename(*paths)
    Path.replace = tell_and_rename
    if first:
        torch.save(measure(out / 'two'), out / f'rank{common.RANK}')
        train(out / 'whole', epochs=3)
    train(out / 'killed', epochs=3, loss_fn=lambda *args: os._exit(7)
          if first and next(updates) == 5 else common.pgd_loss(*args))
    raise common.UserError('the end')

def test_two_processes(tmp_path):
    for mistakes in (0, 1):  # the same call twice; the first dies
        done = subprocess.run([*LAUNCH, __file__, tmp_path], stderr=subprocess.PIPE, text=True,
                              timeout=500)
        assert done.stderr.count('error: the end\n') == mistakes, done.stderr
    a, b = (common.read_checkpoint(*(tmp_path / k).rglob('*.pt')) for k in ('killed', 'whole'))
    assert same(a['last'], b['last'])
    assert (tmp_path / 'writers').read_text() == '0 .pt\n' * (1 + 3 + 3)  # epochs
    assert not list(tmp_path.rglob('*.tmp'))
    weights, batches, right = measure(tmp_path / 'one')
    ranks = [torch.load(tmp_path / f'rank{rank}') for rank in (0, 1)]
    assert 100 < right.sum() < 500
    for others, _, verdict in ranks:
        assert torch.equal(verdict, right)
        torch.testing.assert_close(others, weights, rtol=0, atol=1e-5)
    for batch, *parts in zip(batches, *(seen for _, seen, _ in ranks)):  # one half each
        assert len(parts[0]) == len(parts[1]) == 8
        assert sorted(batch.flatten(1).tolist()) == sorted(torch.cat(parts).flatten(1).tolist())

def test_a_process_that_fails_alone_says_so():
    code = "import common\ndef main(): raise common.UserError('alone')\ncommon.entry(main)"
    done = subprocess.run([sys.executable, '-c', code], cwd=Path(common.__file__).parent, text=True,
                          env=os.environ | dict(RANK='1', WORLD_SIZE='2'), stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, 'error: alone\n')

if __name__ == '__main__':
    common.entry(partial(program, Path(sys.argv[1])))
