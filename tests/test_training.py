"""Losses against their formulas, schedules, killed trainings, checkpoints, networks."""
import math
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import conftest  # noqa: F401  (for processes that import this file without pytest)
import pytest
import torch
import torchvision
from torch import nn

import common

THREAT = dict(eps=0.1, step_size=0.04, steps=4, norm='linf')
X = torch.randint(256, (64, 3, 8, 8), generator=common.make_generator(0), dtype=torch.uint8)
SPLITS = zip(*(v.split((32, 16, 16)) for v in (X, torch.arange(64) // 3 % 4)))
DATA = common.Data('toy', list('abcd'), *SPLITS, pad=1, flip=True)

def tiny(arch, classes, shape, seed):
    """Batch norm and dropout: what has a state and draws at random."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Dropout(0.3), nn.Linear(36, classes))

def flags(out, **changes):
    args = common.parse(common.make_parser('', argv=[]), [])
    vars(args).update(dict(out=str(out), epochs=1, batch_size=8, amp='fp32', steps=2) | changes)
    return args

def train(out, method='pgd', data=DATA, build=tiny, seed=0, **changes):
    own = {k: changes.pop(k) for k in ('loss_fn', 'extra', 'keep', 'labels') if k in changes}
    device = torch.device('cpu')
    return common.train(flags(out, **changes), data, method, seed, device, build=build, **own)

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

class Net(nn.Linear):
    """Logits linear in the pixels, of one head or, as a tuple, of two; keeps what it is given."""
    seen = ()

    def forward(self, x):
        heads = (4 * super().forward(x.flatten(1))).split(3, 1)
        self.seen += ((self.training, x.detach(), heads[0].dtype),)
        return heads if len(heads) > 1 else heads[0]

def joint(loss):
    """The sum of a loss over all heads, compared with labels or with other heads."""
    return lambda output, other: sum(
        loss(head, other if torch.is_tensor(other) else other[i]) for i, head in enumerate(output))

@pytest.mark.parametrize('heads', (1, 2))
@pytest.mark.parametrize('method', common.METHODS)
def test_losses_and_attacks_are_those_of_the_papers(method, heads):
    net, x, y = Net(12, 3 * heads), 0.2 + 0.6 * torch.rand(48, 3, 2, 2), torch.arange(48) % 3
    takes = {'trades': ('ce', 'kl'), 'mart': ('ce', 'kl', 'boosted')}.get(method, ('ce',))
    losses = dict(ce='cross_entropy', kl='kl_divergence', boosted='boosted_cross_entropy')
    own = {name: joint(getattr(common, losses[name])) for name in takes if heads == 2}
    loss = common.METHODS[method](net, x, y, THREAT, common.make_generator('start'), **own)
    x_adv = next(seen for training, seen, _ in net.seen if training)[-48:]
    probabilities = lambda at: [
        z.double().softmax(1) for z in (net(at) if heads == 2 else (net(at),))]
    p, q = probabilities(x), probabilities(x_adv)
    ce = lambda q: -sum(head[range(48), y].log() for head in q)
    kl = lambda q: sum((a * (a / b).log()).sum(1) for a, b in zip(p, q))
    others = sum((1 - head.scatter(1, y[:, None], 0).amax(1)).log() for head in q)
    mart = ce(q) - others + 5 * (1 - p[0][range(48), y]) * kl(q)
    expected = dict(standard=ce(p), trades=ce(p) + 6 * kl(q), mart=mart).get(method, ce(q)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    # natural outputs have gradients, too, in TRADES and MART
    found, wanted = (torch.autograd.grad(v, net.weight, retain_graph=True)[0]
                     for v in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    eps, g = THREAT['eps'], common.make_generator('start')
    step, steps = {'standard': (0, 0), 'fgsm': (1.25 * eps, 1)}.get(method, (0.04, 4))
    path = [x] if method == 'standard' else [common.random_start(x, eps, 'linf', g)]
    if method == 'trades':
        path = [x + 0.001 * torch.randn(x.shape, generator=common.make_generator('start'))]
    for _ in range(steps):
        at = path[-1].clone().requires_grad_()
        value = (kl if method == 'trades' else ce)(probabilities(at)).sum()
        at = path[-1] + step * torch.autograd.grad(value, at)[0].sign()
        path.append(at.clamp(x - eps, x + eps).clamp(0, 1))
    first = torch.tensor([steps] * 48)
    if method == 'fat':  # the first that is misclassified
        wrong = torch.stack([probabilities(at)[0].argmax(1) != y for at in path])
        first = torch.where(wrong.any(0), wrong.int().argmax(0), steps)
        assert len(first.unique()) > 2
    torch.testing.assert_close(x_adv, torch.stack(path)[first, range(48)])

def test_trades_starts_near_the_image_and_in_float32():
    net, x, half = Net(3072, 3), 0.2 + 0.6 * torch.rand(4, 3, 32, 32), torch.bfloat16
    with torch.autocast('cpu', half):
        common.trades_loss(net, x, torch.arange(4) % 3, THREAT, common.make_generator('start'))
    assert [dtype for _, _, dtype in net.seen] == [torch.float32] * 2 + [half] * 4  # x, start, ...
    noise = (net.seen[1][1] - x) / 0.001
    assert abs(noise.mean()) < 0.05 and noise.std().item() == pytest.approx(1, rel=0.03)
    assert (noise.abs() > 2).float().mean().item() == pytest.approx(0.0455, abs=0.01)  # normal

@pytest.mark.parametrize('schedule,points', (
    ('piecewise', {0: 1, 0.49: 1, 0.5: 0.1, 0.74: 0.1, 0.75: 0.01}),  # Rice et al. 2020
    ('constant', {0: 1, 0.99: 1}), ('drops:0.9,.95', {0.89: 1, 0.9: 0.1, 0.95: 0.01}),
    ('cosine', {0: 1, 1 / 3: 0.75, 0.5: 0.5}), ('onecycle', {0.125: 0.5, 0.25: 1, 0.625: 0.5}),
    *((unknown, {0.3: None}) for unknown in (
        'foo', '', 'drops:', 'drops:nan', 'drops:2,3', 'drops:-0.5', 'drops:.5,', 'drops:.5;.9'))))
def test_learning_rate(schedule, points):
    assert {p: common.lr_factor(schedule, p) for p in points} == pytest.approx(points)

def test_updates_are_sgd_and_the_ball_grows_with_them(tmp_path):
    balls = []
    loss_fn = lambda net, x, y, threat, _: balls.append(threat) or net[5].weight.sum() * 2
    state = train(tmp_path, loss_fn=loss_fn, keep=(0,), lr=0.1, weight_decay=0.01, eps=0.3,
                  step_size=0.2, eps_warmup=0.5, schedule='drops:0.375', batch_size=4)
    weight, velocity = state['kept'][0]['5.weight'], 0  # whose gradient is 2
    for step in range(8):
        velocity = 0.9 * velocity + 2 + 0.01 * weight
        weight = weight - (0.1 if step < 3 else 0.01) * velocity
    torch.testing.assert_close(state['last']['5.weight'], weight, rtol=1e-5, atol=1e-5)
    grown = [0, 0, 0.25, 0.625, 1, 1, 1, 1]  # nothing in the first third of the warm-up
    balls = [(b['eps'], b['step_size'], b['steps']) for b in balls]
    assert balls == [pytest.approx((0.3 * k, 0.2 * k, 2)) for k in grown]

def long_training(out, death=None):
    """Attacks, crops, flips, dropout, batch norm, momentum; killed at an update or in a write."""
    kill, updates = lambda *_: os.kill(os.getpid(), 9), iter(range(99))
    if death == 'write':
        Path.replace = kill
    return train(out, loss_fn=lambda *args: kill() if next(updates) == death
                 else common.pgd_loss(*args), keep=(0, 2), seed=3, epochs=6, eps_warmup=0.3)

def die(out):
    for death in (*random.Random(0).sample(range(9), 4), 'write'):
        victim = os.fork()  # a process of its own, but torch is imported once
        if not victim:
            long_training(out, death)
            os._exit(0)
        print(os.waitpid(victim, 0)[1])

@pytest.mark.filterwarnings('ignore:CUDA is not available')
def test_a_graph_answers_whole_batches_of_attacks_alone(monkeypatch):
    made = []

    def make(function, inputs):  # as torch does, but without a GPU
        made.append(inputs[0].shape)
        return lambda x: 'graph'
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', make)
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda kind: True)
    net, x = tiny('', 4, (3, 8, 8), 0), torch.rand(8, 3, 8, 8, requires_grad=True)
    common.replay_attacks(net)
    assert torch.is_tensor(net(x)) and not made  # the update, in train mode
    net.eval()
    assert net(x) == net(x) == 'graph' and made == [x.shape]
    assert torch.is_tensor(net(x[:5])) and torch.is_tensor(net(x.detach()))
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda kind: False)
    assert torch.is_tensor(net(x))  # TRADES's first step, in float32

@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device')
@pytest.mark.parametrize('method', common.METHODS)
def test_a_graph_trains_the_same_bits(method, tmp_path, monkeypatch):
    args, device = flags(tmp_path, amp='auto', epochs=2), common.pick_device('cuda')
    data = replace(DATA, train=tuple(v.to(device) for v in DATA.train),
                   val=tuple(v.to(device) for v in DATA.val))
    fast = common.train(args, data, method, 0, device)
    monkeypatch.setattr(common, 'spread', lambda model, device: model)
    args.fresh = True
    assert same(fast['last'], common.train(args, data, method, 0, device)['last'])

def test_killed_trainings_end_with_the_same_bits(tmp_path):
    killed = str(tmp_path / 'killed')
    call = [sys.executable, '-c', f'import test_training; test_training.die({killed!r})']
    assert subprocess.check_output(call, cwd=Path(__file__).parent, text=True).split() == ['9'] * 5
    assert 2 <= len(common.read_checkpoint(*Path(killed).rglob('*.pt'))['history']) < 6
    ended, whole = long_training(killed), long_training(tmp_path)
    for state in (ended, long_training(killed, 0)):  # the second has nothing left to do
        for a, b in zip(*((s['last'], s['best'], *s['kept'].values()) for s in (state, whole))):
            assert same(a, b)
        rows, expected = ([row | dict(seconds=0) for row in s['history']] for s in (state, whole))
        assert rows == expected and len(rows) == 6 and state['best_epoch'] == whole['best_epoch']
    model = common.restore(whole, 'last', flags(''), DATA, 'cpu', build=tiny)
    for split, (x, y) in dict(train=DATA.train, val=DATA.val).items():  # the first 16 of both
        right = common.correct_under(model, x[:16], y[:16]).float().mean()
        assert rows[-1][f'{split}_robust'] <= rows[-1][f'{split}_natural'] == right

@pytest.mark.parametrize('kind,bad,changes', (
    *((kind, range(2, 11), dict(batch_size=2)) for kind in ('images', 'infinite', 'added')),
    ('infinite', range(0, 400, 2), dict(batch_size=2, epochs=25))))
def test_batches_without_a_finite_loss_are_skipped_and_counted(kind, bad, changes, tmp_path):
    weights, losses = [], []
    def loss_fn(net, x, y, threat, generator):
        loss = common.standard_loss(net, x, y, threat, generator)
        if len(losses) in bad:
            loss = dict(images=net(x / 0).mean(), infinite=loss / 0, added=loss + math.inf)[kind]
        weights.append(nn.utils.parameters_to_vector(net.parameters()).detach().clone())
        losses.append(loss.item())
        return loss
    state = train(tmp_path, loss_fn=loss_fn, lr=0.01, schedule='constant', **changes)
    for k, (before, after) in enumerate(zip(weights, weights[1:])):
        assert after.isfinite().all() and torch.equal(before, after) == (k in bad)
    assert all(v.isfinite().all() for v in state['last'].values())  # batch norm's, too
    assert sum(row['skipped'] for row in state['history']) == len(bad)
    total = sum(row['loss'] * (16 - row['skipped']) for row in state['history'])
    assert total == pytest.approx(sum(filter(math.isfinite, losses)))
    bad, losses[:] = range(2, 12), ()  # ten in a row end the training
    with pytest.raises(common.UserError, match='^epoch 1: no finite loss.*--lr'):
        train(tmp_path, loss_fn=loss_fn, batch_size=2, lr=0.02)

def test_what_changes_the_weights_and_nothing_else_changes_the_name(tmp_path):
    def files(changes):  # after one more training
        train(tmp_path, **changes)
        return len(list(tmp_path.rglob('*.pt')))
    (x, y), (x_val, y_val), (x_test, y_test) = DATA.train, DATA.val, DATA.test
    attack = dict(eps=0.02, step_size=0.01, steps=3, norm='l2', eps_warmup=0.1)
    every = attack | dict(
        epochs=2, batch_size=16, lr=0.05, weight_decay=0.0, schedule='cosine', amp='bf16', seed=1,
        arch='lenet5', dataset='svhn', keep=(0,), extra=dict(k=2), method='fgsm')
    data = [dict(train=(x ^ (x > 254), y)), dict(train=(x, y.flip(0))), dict(classes=list('bacd')),
            dict(val=(x_val, y_val.flip(0))), dict(val=(x_val.flip(0), y_val)), dict(pad=2)]
    different = [{}, dict(extra=dict(k=3)), *({k: v} for k, v in every.items()),
                 *(dict(data=replace(DATA, **change)) for change in data)]
    assert [files(changes) for changes in different] == [*range(1, len(different) + 1)]
    nothing = [dict(device='auto'), dict(data=replace(DATA, test=(x_test, y_test + 1)))]
    assert {files(changes) for changes in nothing} == {len(different)}
    standard = [{'method': 'standard', k: v} for k, v in attack.items()]
    assert [files(changes) for changes in standard] == [  # its history is of norm and eps
        len(different) + k for k in (1, 2, 2, 3, 3)]

def test_own_labels_reach_the_loss_with_their_images_and_change_the_name(tmp_path):
    seen, own = [], torch.stack((torch.rand(32), torch.arange(32.0)), 1)
    loss_fn = lambda net, x, y, *_: seen.append((x, y)) or net(x).mean()
    for labels in (own, own * torch.tensor([2, 1])):
        train(tmp_path, data=replace(DATA, pad=0, flip=False), loss_fn=loss_fn, labels=labels)
    x, y = map(torch.cat, zip(*seen))
    assert torch.equal((255 * x).round().byte(), X[y[:, 1].long()])
    assert sorted(y[:32, 1].tolist()) == list(range(32))
    assert len(y) == 64 and len(list(tmp_path.rglob('*.pt'))) == 2

@pytest.mark.parametrize('method,warmup,best', (
    ('pgd', 0, 2), ('pgd', 0.5, 4), ('pgd', 0.8, 4), ('pgd', 0.81, 5), ('standard', 0.5, 2)))
def test_the_best_epoch_has_the_whole_eps(method, warmup, best, tmp_path, monkeypatch):
    rows = iter([dict(val_robust=robust, val_natural=natural, train_robust=0, train_natural=0)
                 for robust, natural in ((.5, .1), (.9, .9), (.3, .2), (.6, .7), (.4, .8))])
    monkeypatch.setattr(common, 'validate', lambda *_: next(rows))
    state = train(tmp_path, method, epochs=5, eps_warmup=warmup, keep=(0, best, 5))
    assert state['best_epoch'] == best and state['kept'].keys() == {0, best, 5}
    assert same(state['kept'][0], tiny('', 4, (3, 8, 8), 0).state_dict())
    for which, epoch in (('best', best), ('last', 5), (0, 0)):
        model = common.restore(state, which, flags(tmp_path), DATA, 'cpu', build=tiny)
        assert same(model.state_dict(), state['kept'][epoch]) and not model.training

@pytest.mark.parametrize('damage', (
    lambda path: os.truncate(path, path.stat().st_size // 2),
    lambda path: path.write_bytes(random.Random(0).randbytes(999)),
    lambda path: path.write_bytes(b'csys\nexit\n(I3\ntR.'),  # a pickle that calls sys.exit(3)
    lambda path: torch.save([1], path),
    lambda path: torch.save(dict(conv=torch.ones(1)), path)))
def test_damaged_checkpoints_are_one_line_and_stay(damage, tmp_path):
    train(tmp_path)
    (path,) = tmp_path.rglob('*.pt')
    damage(path)
    before, one_line = path.read_bytes(), rf'^.*{path.name}[^\n]*\Z'
    pytest.raises(common.UserError, train, tmp_path, match=one_line)
    assert path.read_bytes() == before

@pytest.mark.parametrize('arch,shape,parameters', (
    ('resnet18', (3, 32, 32), 11_173_962), ('wrn-28-10', (3, 32, 32), 36_479_194),
    ('wrn-10-1', (3, 32, 32), 77_850), ('lenet5', (1, 28, 28), 44_426),
    *((arch, (3, 33, 33), None) for arch in ('small-cnn', 'small-cnn-64', 'alexnet')),
    *((arch, (3, 8, 20), None) for arch in ('lenet5', 'googlenet')), ('lenet5', (3, 8, 8), None),
    *((arch, (2, 64, 64), None) for arch in ('resnet50', 'resnet18-imagenet'))))
def test_networks_are_as_large_as_published_or_refuse_images(arch, shape, parameters):
    refused = pytest.raises(common.UserError, match=f'^{arch} ')
    with torch.device('meta'), nullcontext() if parameters else refused:  # without numbers
        model = common.make_model(arch, 10, shape)
        assert sum(p.numel() for p in model.parameters()) == parameters

def test_weights_come_from_the_seed_and_normalisation_first():
    before = torch.get_rng_state()
    a, b, c = (common.make_model('lenet5', seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state()) and same(a, b) and not same(a, c)
    x, imagenet = torch.rand(2, 3, 64, 64), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(common.make_model('resnet18-imagenet')[0](x),
                               torchvision.transforms.functional.normalize(x, *imagenet))
    model = common.make_model('resnet18', 7).eval()
    stem = model.net.maxpool(model.net.conv1(x))  # not made smaller, as usual for CIFAR
    assert stem.shape == (2, 64, 64, 64) and model(x).shape == (2, 7)
