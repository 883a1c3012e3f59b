"""Losses against their formulas, schedules, exact resume, best checkpoints, results."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import common

CPU = torch.device('cpu')
THREAT = dict(eps=0.03, step_size=0.02, steps=2, norm='linf')


def arguments(out, **changes):
    args = common.parse(common.make_parser(''), ['--out', str(out)])
    vars(args).update(dict(epochs=2, train_size=96, test_size=20, batch_size=32) | changes)
    return args


class Table(torch.nn.Module):
    """Logits are a learnt 3-vector plus the first three pixels."""

    def __init__(self):
        super().__init__()
        self.b = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))

    def forward(self, x):
        return 2 * x.flatten(1)[:, :3] + self.b


def test_kl_divergence_is_torchs_and_zero_for_equal_logits():
    a, b = torch.randn(9, 4), torch.randn(9, 4)
    expected = F.kl_div(a.log_softmax(1), b.softmax(1), reduction='none').sum(1)
    assert torch.allclose(common.kl_divergence(a, b), expected, atol=1e-6)
    assert common.kl_divergence(a, a).abs().max() < 1e-6


def test_losses_without_a_ball_are_their_natural_parts():
    x, y = torch.rand(12, 3, 1, 1), torch.arange(12) % 3
    nothing = dict(THREAT, eps=0.0, step_size=0.0)
    model, g = Table(), torch.Generator().manual_seed(0)
    natural = F.cross_entropy(model(x), y)
    for loss in (common.standard_loss, common.fgsm_loss, common.pgd_loss):
        assert torch.allclose(loss(model, x, y, nothing, g), natural)
    # TRADES starts 0.001 away, but the ball of radius 0 brings it back
    assert torch.allclose(common.trades_loss(model, x, y, nothing, g), natural, atol=1e-3)
    p = model(x).softmax(1)
    other = p.scatter(1, y[:, None], 0).amax(1)
    assert torch.allclose(common.mart_loss(model, x, y, nothing, g), natural - (1 - other).log().mean(), atol=1e-4)


def test_adversarial_losses_exceed_the_natural_one_and_reach_the_parameters():
    x, y = torch.rand(12, 3, 1, 1), torch.arange(12) % 3
    for name, loss_fn in common.METHODS.items():
        model = Table().train()
        loss = loss_fn(model, x, y, THREAT, torch.Generator().manual_seed(0))
        loss.backward()
        assert model.training and model.b.grad is not None and model.b.requires_grad
        if name in ('pgd', 'fgsm', 'trades'):
            assert loss > F.cross_entropy(model(x), y)


def test_trades_beta_weighs_the_divergence():
    x, y = 0.2 + 0.6 * torch.rand(12, 3, 1, 1), torch.arange(12) % 3
    values = [
        common.trades_loss(Table(), x, y, THREAT, torch.Generator().manual_seed(0), beta) for beta in (0.0, 1.0, 3.0)
    ]
    assert torch.allclose(values[2] - values[0], 3 * (values[1] - values[0]), rtol=1e-4)
    assert values[1] > values[0]


def test_schedules():
    f = common.lr_factor
    assert [f('piecewise', p) for p in (0, 0.49, 0.5, 0.75)] == pytest.approx([1, 1, 0.1, 0.01])
    assert f('cosine', 0) == 1 and f('cosine', 0.5) == pytest.approx(0.5)
    assert f('onecycle', 0.25) == 1 and f('onecycle', 0.125) == pytest.approx(0.5)
    assert f('onecycle', 0.625) == pytest.approx(0.5) and f('onecycle', 0.999) < 0.01
    assert [f('drops:0.1,0.3:0.5', p) for p in (0, 0.1, 0.29, 0.3)] == [1, 0.5, 0.5, 0.25]
    assert [f('drops:0.6', p) for p in (0.5, 0.6)] == [1, 0.1] and f('constant', 0.9) == 1
    for bad in ('linear', 'drops:', 'drops:a', 'drops:0.5:x'):
        with pytest.raises(argparse.ArgumentTypeError, match='is not one of'):
            common.schedule(bad)
    e = common.eps_factor
    assert e(0, 0) == 1 and [e(0.6, p) for p in (0, 0.2, 0.4, 0.6, 0.9)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_weight_average_is_exponential():
    a, b = Table(), Table()
    with torch.no_grad():
        a.b.zero_(), b.b.fill_(1)
    for _ in range(3):
        common.update_average(a, b, 0.9)
    assert torch.allclose(a.b, torch.full((3,), 1 - 0.9**3))


def test_everything_that_matters_changes_the_name(tmp_path):
    base = arguments(tmp_path)
    names = {common.model_path(tmp_path, common.model_recipe(base, 'pgd', 0))}
    changes = dict(
        epochs=3,
        batch_size=16,
        lr=0.2,
        weight_decay=0.0,
        schedule='cosine',
        ema=0.9,
        train_size=90,
        eps=0.01,
        step_size=0.01,
        steps=4,
        norm='l2',
        eps_warmup=0.1,
        arch='resnet18',
        dataset='cifar10',
        amp='bf16',
        image_size=48,
        pad=1,
    )
    for key, value in changes.items():
        changed = argparse.Namespace(**(vars(base) | {key: value}))
        names.add(common.model_path(tmp_path, common.model_recipe(changed, 'pgd', 0)))
    names.add(common.model_path(tmp_path, common.model_recipe(base, 'pgd', 1)))
    names.add(common.model_path(tmp_path, common.model_recipe(base, 'trades', 0)))
    names.add(common.model_path(tmp_path, common.model_recipe(base, 'pgd', 0, dict(k=2))))
    assert len(names) == len(changes) + 4
    # the attack does not matter to standard training, nor the place to anything
    far = argparse.Namespace(**(vars(base) | dict(eps=0.5, steps=9, out='elsewhere')))
    assert common.model_recipe(far, 'standard', 0) == common.model_recipe(base, 'standard', 0)


def test_training_twice_gives_the_same_bits_and_the_second_asks_for_nothing(tmp_path):
    data = common.load_data('shapes', train_size=96, test_size=20)
    first = common.train_model(arguments(tmp_path / 'a'), data, 'pgd', 0, CPU)
    second = common.train_model(arguments(tmp_path / 'b'), data, 'pgd', 0, CPU)
    other = common.train_model(arguments(tmp_path / 'b'), data, 'pgd', 1, CPU)
    for k, v in first['last'].items():
        assert torch.equal(v, second['last'][k])
    assert not torch.equal(first['last']['fc.weight'], other['last']['fc.weight'])
    [path] = (tmp_path / 'a' / 'models').glob('*.pt')
    stamp = path.stat().st_mtime_ns
    again = common.train_model(arguments(tmp_path / 'a'), data, 'pgd', 0, CPU)
    assert path.stat().st_mtime_ns == stamp
    assert torch.equal(again['best']['fc.weight'], first['best']['fc.weight'])


def test_best_is_the_epoch_of_highest_robust_validation_accuracy_after_the_warm_up(tmp_path, monkeypatch):
    robust = iter((0.9, 0.3, 0.5, 0.4))

    def fake(model, data, args, loss):
        return dict(
            val_natural=0.5,
            val_robust=next(robust),
            train_natural=0.5,
            train_robust=0.5,
            val_fgsm=0.5,
            val_top_share=0.2,
        )

    monkeypatch.setattr(common, 'epoch_accuracy', fake)
    data = common.load_data('shapes', train_size=32, test_size=10)
    result = common.train_model(arguments(tmp_path, epochs=4, eps_warmup=0.3), data, 'pgd', 0, CPU)
    assert result['best_epoch'] == 3  # not 1: eps had not grown yet
    assert not torch.equal(result['best']['fc.weight'], result['last']['fc.weight'])


def test_own_labels_follow_their_images_and_epochs_can_go_unchecked(tmp_path):
    data = common.load_data('shapes', train_size=96, test_size=20, pad=0)
    seen = []

    def loss_fn(model, x, y, threat, generator):
        label, index = y.unbind(1)
        assert torch.equal(x, common.to_float(data.train[0][index]))
        assert torch.equal(label, data.train[1][index])
        seen.extend(index.tolist())
        return F.cross_entropy(model(x), label)

    labels = torch.stack((data.train[1], torch.arange(96)), 1)
    args = arguments(tmp_path, epochs=5)
    result = common.train_model(args, data, 'own', 0, CPU, loss_fn=loss_fn, labels=labels, check_every=2)
    assert sorted(seen) == sorted(5 * list(range(96)))
    checked = [math.isfinite(row['val_robust']) for row in result['history']]
    assert checked == [False, True, False, True, True]
    scores = [row['score'] for row in result['history']]
    assert result['best_epoch'] == max((1, 3, 4), key=lambda i: (scores[i], i)) + 1
    plain = common.train_model(args, data, 'other', 0, CPU, loss_fn=common.standard_loss)
    for k, v in result['last'].items():  # neither changes the weights
        assert torch.equal(v, plain['last'][k])


def test_kept_epochs_are_those_of_the_training_and_leave_a_finished_model_alone(tmp_path):
    args = arguments(tmp_path)
    data = common.load_data('shapes', train_size=96, test_size=20)
    plain = common.train_model(args, data, 'pgd', 0, CPU)
    [path] = (tmp_path / 'models').glob('*.pt')
    stamp = path.stat().st_mtime_ns
    kept = common.train_model(args, data, 'pgd', 0, CPU, keep=(0, 1, 2))
    assert path.stat().st_mtime_ns == stamp
    weights = [common.restore(kept, epoch, args, data, CPU).state_dict() for epoch in range(3)]
    start = common.make_model(args.arch, 10, (3, 32, 32), 0).state_dict()
    assert torch.equal(weights[0]['fc.weight'], start['fc.weight'])
    assert not torch.equal(weights[1]['fc.weight'], weights[2]['fc.weight'])
    for k, v in plain['last'].items():
        assert torch.equal(v, weights[2][k])
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.pt')}
    assert len(stamps) == 5  # the model, three epochs, the second training
    common.train_model(args, data, 'pgd', 0, CPU, keep=(0, 2))
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.pt')}

    # a training from nothing keeps as it goes, and one that lost an epoch starts over
    fresh = arguments(tmp_path / 'b')
    kept = common.train_model(fresh, data, 'pgd', 0, CPU, keep=(1,))
    assert torch.equal(common.restore(kept, 1, fresh, data, CPU).fc.weight, weights[1]['fc.weight'])
    kept['kept'][1].write_bytes(b'not weights')
    with pytest.raises(common.UserError, match='not a readable checkpoint'):
        common.restore(kept, 1, fresh, data, CPU)
    kept['kept'][1].unlink()
    kept = common.train_model(fresh, data, 'pgd', 0, CPU, keep=(1,))
    assert torch.equal(common.restore(kept, 1, fresh, data, CPU).fc.weight, weights[1]['fc.weight'])


def test_a_collapsed_model_is_recognised(tmp_path, caplog):
    data = common.load_data('shapes', train_size=64, test_size=20)
    caplog.set_level('INFO')
    result = common.train_model(arguments(tmp_path, lr=1e-6), data, 'standard', 0, CPU)
    assert result['history'][-1]['val_top_share'] > 0.9 and result['collapsed']
    assert 'COLLAPSED' in caplog.text


def test_a_diverging_training_says_so(tmp_path):
    data = common.load_data('shapes', train_size=64, test_size=20)
    with pytest.raises(common.UserError, match='--lr'):
        common.train_model(arguments(tmp_path, lr=1e20), data, 'standard', 0, CPU)


RESUME = '''
import sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
import common
common.start_log()
args = common.parse(common.make_parser(''), ['--out', sys.argv[1], '--epochs', '4',
    '--train-size', '192', '--test-size', '20', '--ema', '0.9'])
data = common.load_data('shapes', train_size=192, test_size=20)
common.train_model(args, data, 'pgd', 0, torch.device('cpu'))
'''


@pytest.mark.slow
def test_killed_and_restarted_equals_uninterrupted_bit_for_bit(tmp_path):
    script = tmp_path / 'run.py'
    script.write_text(RESUME.format(root=str(ROOT)))

    def start(out):
        return subprocess.Popen([sys.executable, str(script), str(tmp_path / out)], stdout=subprocess.PIPE, text=True)

    whole = start('whole')
    assert whole.wait(120) == 0
    seen = 0
    for _ in range(2):  # kill -9 twice, in the middle of the epoch after a finished one
        process = start('killed')
        for line in process.stdout:
            if ' epoch ' in line:
                seen += 1
                time.sleep(0.05)
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait(60) == -signal.SIGKILL
    assert seen == 2
    process = start('killed')
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and 'continuing after epoch' in text
    a, b = (torch.load(next((tmp_path / d / 'models').glob('*.pt')), weights_only=True) for d in ('whole', 'killed'))
    for which in ('best', 'last'):
        assert all(torch.equal(a[which][k], b[which][k]) for k in a[which])
    drop = ('seconds',)
    assert [{k: v for k, v in r.items() if k not in drop} for r in a['history']] == [
        {k: v for k, v in r.items() if k not in drop} for r in b['history']
    ]


# --------------------------------------------------------------------------------- results


def test_bootstrap_matches_the_normal_interval_of_a_proportion():
    values = (np.arange(400) < 300).astype(float)
    value, low, high = common.bootstrap(np.mean, values)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert value == 0.75
    assert low == pytest.approx(0.75 - half, abs=0.008)
    assert high == pytest.approx(0.75 + half, abs=0.008)


def test_bootstrap_pairs_images_and_resamples_seeds():
    rng = np.random.default_rng(0)
    a = rng.random((1, 200))
    _, low, high = common.bootstrap(lambda u, v: (u - v).mean(), a + 0.1, a)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    seeds = np.array([0.0, 1.0])[:, None] + np.zeros((2, 50))
    _, low, high = common.bootstrap(np.mean, seeds)
    assert (low, high) == (0.0, 1.0)


@pytest.mark.parametrize(
    'low,high,threshold,verdict',
    (
        (0.1, 0.2, 0, 'supported'),
        (-0.2, -0.1, 0, 'contradicted'),
        (-0.1, 0.1, 0, 'inconclusive'),
        (0.1, 0.2, 0.15, 'inconclusive'),
        (0.0, 0.0, 0, 'inconclusive'),
    ),
)
def test_verdicts(low, high, threshold, verdict):
    assert common.effect_verdict(low, high, threshold) == verdict


def test_pack_is_exact_and_json():
    for array in (np.random.rand(3, 4).astype(np.float32), torch.arange(5).to(torch.uint8)):
        back = common.unpack(json.loads(json.dumps(common.pack(array))))
        assert np.array_equal(back, np.asarray(array)) and back.dtype == np.asarray(array).dtype


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'results.json'
    common.write_json(path, dict(a=1))
    with pytest.raises(AttributeError):
        common.write_json(path, dict(a=object()))
    assert json.loads(path.read_text()) == dict(a=1)
    assert os.listdir(tmp_path) == ['results.json']


def test_precision_and_generators():
    assert common.pick_precision(CPU, 'fp32') is None
    assert common.pick_precision(CPU, 'bf16') == torch.bfloat16
    assert common.pick_precision(CPU, 'auto') in (None, torch.bfloat16)
    with pytest.raises(common.UserError):
        common.pick_precision(CPU, 'fp16')
    draws = [torch.rand(3, generator=common.make_generator('a', s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_trades_and_mart_are_their_formulas(monkeypatch):
    """Zhang et al. 2019, eq. 5, and Wang et al. 2020, table 1, from probabilities."""
    g = torch.Generator().manual_seed(0)
    x, x_adv = torch.rand(2, 6, 1, 2, 2, generator=g)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    with torch.no_grad():
        model[1].weight.copy_(3 * torch.randn(3, 4, generator=g))
    monkeypatch.setattr(common, 'pgd', lambda *a, **k: x_adv)
    p, q = (model(v).softmax(1).double() for v in (x, x_adv))
    kl = (p * (p / q).log()).sum(1)
    p_y, q_y = (v[range(6), y] for v in (p, q))
    other = torch.stack([q[i, [k for k in range(3) if k != y[i]]].max() for i in range(6)])
    trades = -p_y.log().mean() + 6 * kl.mean()
    mart = (-q_y.log() - (1 - other).log() + 5 * (1 - p_y) * kl).mean()
    assert common.trades_loss(model, x, y, {}, g).item() == pytest.approx(trades.item(), rel=1e-4)
    assert common.mart_loss(model, x, y, {}, g).item() == pytest.approx(mart.item(), rel=1e-4)


def test_compile_traces_the_training_as_it_is(tmp_path, monkeypatch):
    """--compile: the attack's and the update's modes, recompiled as they alternate, give the same
    weights, bit for bit where the graphs are run as traced."""
    compile_ = torch.nn.Module.compile
    used = []

    def traced_only(model):
        used.append(model)
        compile_(model, backend='eager')

    monkeypatch.setattr(torch.nn.Module, 'compile', traced_only)
    data = common.load_data('shapes', train_size=96, test_size=20)
    plain, traced = (
        common.train_model(arguments(tmp_path / str(flag), amp='fp32', compile=flag), data, 'pgd', 0, CPU)
        for flag in (False, True)
    )
    assert len(used) == 1 and plain['history'][-1]['loss'] == traced['history'][-1]['loss']
    assert all(torch.equal(a, b) for a, b in zip(plain['last'].values(), traced['last'].values()))
