"""cifs.py: the mask against autograd and by hand, losses, measures, the study end to end."""

import argparse
import copy
import json
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import spearmanr

import cifs
import common
import logit_distill
import train_at

X = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 10
THREAT = dict(eps=8 / 255, step_size=4 / 255, steps=2, norm='linf')


def arguments(*flags):
    return common.parse(cifs.make_parser(), [*flags])


def network(arm='cifs', **changes):
    """A small network of one arm with trained-looking probes, in eval mode."""
    args = arguments()
    vars(args).update(changes)
    torch.manual_seed(0)
    net = cifs.builder(args, arm)('small-cnn', 10, (3, 32, 32), 0).eval()
    for probe in getattr(net, 'probes', {}).values():
        for p in probe.parameters():
            nn.init.normal_(p, 0, 0.5)
    return net


# ------------------------------------------------------------------------- the relevance


@pytest.mark.parametrize('hidden', (0, 7))
@pytest.mark.parametrize('k', (1, 2, 3))
def test_relevance_is_the_gradient_of_the_summed_logits_over_each_channel(hidden, k):
    torch.manual_seed(k)
    probe = cifs.Probe(5, 10, hidden).double()
    z = torch.rand(4, 5, 3, 3, dtype=torch.double, requires_grad=True)
    p = probe(z.mean((2, 3)))
    labels = p.topk(k, 1).indices
    (gradient,) = torch.autograd.grad(p.gather(1, labels).sum(), z)
    counts = cifs.label_counts(p, None, k)
    with torch.no_grad():  # the closed form needs no graph
        g = probe.relevance(z.mean((2, 3)), counts)
    assert torch.allclose(g, gradient.sum((2, 3)), atol=1e-5, rtol=1e-5)


def test_relevance_of_a_linear_probe_is_the_sum_of_its_rows():
    probe = cifs.Probe(4, 3)
    counts = torch.tensor([[1.0, 1, 0], [2, 0, 0]])
    w = probe.out.weight
    assert torch.allclose(probe.relevance(torch.rand(2, 4), counts), torch.stack((w[0] + w[1], 2 * w[0])))


def test_relevance_in_bfloat16_follows_float32():
    torch.manual_seed(0)
    probe, z, counts = cifs.Probe(64, 10, 32), torch.rand(8, 64), torch.eye(10)[:8]
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        low = probe.relevance(z, counts).float()
    exact = probe.relevance(z, counts)
    assert (low - exact).abs().max() < 0.03 * exact.abs().max()


def test_masked_network_under_torch_compile():
    model = network()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    with torch.no_grad():
        for y in (None, Y):
            for ours, theirs in zip(model(X, y), compiled(X, y)):
                assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize('training', ('pgd', 'trades', 'mart', 'fat'))
def test_training_step_in_bfloat16_follows_float32(training):
    model = network().train()
    loss_fn, losses = cifs.training_loss(training, 2.0), []
    for low in (False, True):
        net = copy.deepcopy(model)
        with torch.autocast('cpu', torch.bfloat16, enabled=low):
            loss = loss_fn(net, X, Y, THREAT, torch.Generator().manual_seed(0))
        loss.backward()
        losses.append(loss.item())
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# ---------------------------------------------------------------------------- the labels

P = torch.tensor([[0.0, 3, 2, 1], [5, 1, 2, 3]])


@pytest.mark.parametrize(
    'k,y,distinct,expected',
    (
        (2, None, False, [[0, 1, 1, 0], [1, 0, 0, 1]]),  # the top two
        (1, None, False, [[0, 1, 0, 0], [1, 0, 0, 0]]),
        (2, [1, 1], False, [[0, 1, 1, 0], [0, 1, 0, 1]]),  # y and the second
        (2, [0, 2], False, [[1, 0, 1, 0], [0, 0, 1, 1]]),  # the wrong first is left out
        (2, [2, 3], False, [[0, 0, 2, 0], [0, 0, 0, 2]]),  # y is the second: twice
        (2, [2, 3], True, [[0, 1, 1, 0], [1, 0, 0, 1]]),  # distinct: the best other class
        (1, [3, 1], False, [[0, 0, 0, 1], [0, 1, 0, 0]]),
        (3, [0, 0], False, [[1, 0, 1, 1], [1, 0, 1, 1]]),
    ),
)
def test_label_rule(k, y, distinct, expected):
    y = None if y is None else torch.tensor(y)
    counts = cifs.label_counts(P, y, k, distinct)
    assert counts.tolist() == expected and (counts.sum(1) == k).all()


def test_without_labels_train_mode_takes_the_predicted_classes_too():
    model = network()
    model.train()
    for module in model.modules():  # the same batch norm, so that only the labels could differ
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    train = model.trace(X)['masks']
    test = model.eval().trace(X)['masks']
    labelled = model.trace(X, (model(X)[0].argmax(1) + 5) % 10)['masks']
    for place in test:
        assert torch.allclose(train[place], test[place], atol=1e-5)
        assert not torch.allclose(labelled[place], test[place], atol=1e-3)


def test_a_blind_network_never_sees_the_labels():
    model = network('blind')
    assert all(torch.equal(a, b) for a, b in zip(model(X), model(X, (Y + 3) % 10)))


# ----------------------------------------------------------------------------- the masks


def test_importance_functions():
    g = torch.randn(5, 12)
    spec = dict(imgf='softmax', mask_sum=2.0, temperature=1.0, alpha=10.0)
    assert torch.allclose(cifs.importance(g, spec).sum(1), torch.full((5,), 2.0))
    flat = cifs.importance(g, spec | dict(mask_sum=0.0))
    assert torch.allclose(flat.mean(1), torch.ones(5))
    assert torch.allclose(flat / 12, F.softmax(g, 1))
    hot = cifs.importance(g, spec | dict(temperature=0.5))
    assert torch.allclose(hot, 2 * F.softmax(2 * g, 1))
    assert torch.allclose(cifs.importance(g, spec | dict(imgf='sigmoid')), 1 / (1 + torch.exp(-10 * g)), atol=1e-6)
    assert torch.allclose(
        cifs.importance(g, spec | dict(imgf='softplus', alpha=5.0)), torch.log1p(torch.exp(5 * g)) / 5, atol=1e-5
    )
    assert torch.equal(cifs.importance(g, spec | dict(imgf='relu')), g.clamp(min=0))
    assert torch.equal(cifs.importance(g, spec | dict(imgf='identity')), g)


def test_cas_masks_with_the_signed_weights_of_the_label_or_the_prediction():
    model = network('cas')
    for y in (None, (Y + 2) % 10):
        traced = model.trace(X, y)
        for i, (place, probe) in enumerate(model.probes.items()):
            rows = traced['probes'][i].argmax(1) if y is None else y
            assert torch.equal(traced['masks'][place], probe.out.weight[rows])
            assert (traced['masks'][place] < 0).any()


def test_probes_without_mask_leave_the_network_alone():
    model = network('probes')
    assert torch.allclose(model(X)[0], model.net(X), atol=1e-5)
    assert len(model(X)) == 3 and model.trace(X)['masks'] == {}


def test_the_head_control_uses_the_heads_rows():
    model = network('head')
    traced = model.trace(X, Y)
    z = traced['pooled']['stage3']
    second = model.net.fc(z).topk(2, 1).indices[:, 1]
    w = model.net.fc.weight
    assert torch.allclose(traced['masks']['stage3'], 128 * F.softmax(w[Y] + w[second], 1), atol=1e-4)
    assert len(model(X)) == 1  # no probe of its own


def test_the_last_mask_reweighs_the_head():
    """z is masked after its pooling as well as before: logits = W (m * mean z) + b."""
    traced = network().trace(X)
    m, z = traced['masks']['stage3'], traced['pooled']['stage3']
    assert torch.allclose(traced['features'], m * z, atol=1e-5)
    assert torch.allclose(network().net.fc(m * z), traced['logits'], atol=1e-4)


@pytest.mark.parametrize('arch,channels', (('small-cnn', (64, 128)), ('resnet18', (512, 512))))
def test_unmasked_forward_is_the_network(arch, channels):
    net = common.make_model(arch).eval()
    seen = {}

    def look(place, z):
        seen[place] = z.shape[1]
        return z

    with torch.no_grad():
        logits, features = cifs.masked_forward(net, X, look)
        assert torch.allclose(logits, net(X), atol=1e-4)
    assert seen == cifs.places(arch) and tuple(seen.values())[-2:] == channels
    assert features.shape == (6, channels[-1])


def test_wide_resnet_masks_the_residual_path_of_its_last_block_only():
    torch.manual_seed(0)
    net = common.WideResNet(10, depth=16, width=1).eval()
    with torch.no_grad():
        assert torch.allclose(cifs.masked_forward(net, X, lambda place, z: z)[0], net(X), atol=1e-4)
        got = {}

        def silence(place, z):
            got[place] = z
            return 0 * z if place == 'block3' else z

        cifs.masked_forward(net, X, silence)
        x = net.block3[:-1](net.block2(net.block1(net.conv1(net.normalize(X)))))
        last = net.block3[-1]  # with its input silenced, the block adds what batch norm adds
        added = last.conv2(F.relu(last.bn2(torch.zeros_like(x))))
        assert torch.allclose(got['final'], F.relu(net.bn1(x + added)), atol=1e-4)


def test_parameters_of_resnet18_with_cifs():
    """The authors' probes: 512 x 128 x 10 nonlinear and 512 x 10 linear, 72,084 parameters."""
    args = arguments('--dataset', 'cifar10')
    model = cifs.builder(args, 'cifs')('resnet18', 10, (3, 32, 32), 0)
    assert model.spec['places'] == ['layer4_1', 'layer4_2'] and model.spec['mask_sum'] == 2
    assert sum(p.numel() for p in model.probes.parameters()) == 72_084


# ------------------------------------------------------------------------- the gradients


def test_the_mask_is_a_constant_to_the_input_unless_exact():
    model, loss = network(), cifs.joint_loss(2.0)
    masks = {k: v.detach() for k, v in model.trace(X)['masks'].items()}

    def gradient(**options):
        with common.frozen(model):
            return common.loss_and_gradient(lambda v: model(v, **options), X, Y, loss)[2]

    assert torch.allclose(gradient(), gradient(masks=masks), atol=1e-7)
    assert not torch.allclose(gradient(), gradient(exact=True), rtol=0.01)


def test_the_exact_gradient_is_the_derivative():
    model = network().double()
    x, loss = X[:1].double(), cifs.joint_loss(2.0, common.margin)
    with common.frozen(model):
        g = common.loss_and_gradient(lambda v: model(v, exact=True), x, Y[:1], loss)[2]
        direction = torch.randn(x.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        h = 1e-8  # small, so that no ReLU changes side
        slope = (loss(model(x + h * direction), Y[:1]) - loss(model(x - h * direction), Y[:1])) / (2 * h)
        rough = common.loss_and_gradient(model, x, Y[:1], loss)[2]
    assert torch.allclose((g * direction).sum(), slope.sum(), rtol=1e-4)
    assert not torch.allclose((rough * direction).sum(), slope.sum(), rtol=1e-2)


def test_the_final_loss_reaches_the_probes_through_the_mask():
    model = network()
    F.cross_entropy(model(X, Y)[0], Y).backward()
    for probe in model.probes.values():
        assert probe.out.weight.grad.abs().max() > 0
    assert model.probes['stage2'].hidden.weight.grad.abs().max() > 0


def test_attacks_leave_a_masked_network_as_it_was():
    model, other = network().train(), network('cas')
    args = arguments()
    vars(args).update(apgd_steps=2, square_queries=2, targeted_steps=1, restarts=1)
    before = copy.deepcopy(model.state_dict())
    names = []
    for name, _, attack in cifs.suite(args, model, other, 10, 0, torch.device('cpu')):
        with common.frozen(model):
            x_adv = attack(model, X, Y)
        common.check_attack(x_adv, X, args.eps, 'linf')
        names.append(name)
    assert set(names) == set(cifs.ATTACK_NAMES) - {'natural', 'worst'}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize('arm', ('vanilla', 'probes', 'head', 'cifs'))
def test_every_arm_faces_as_many_runs(arm):
    args = arguments()
    runs = cifs.suite(args, network(arm), None, 10, 0, torch.device('cpu'))
    attacks = dict((name, attack) for name, _, attack in runs)
    assert len(runs) + attacks['restarts'].keywords['restarts'] == 26 + args.restarts


def test_square_can_raise_the_masking_flag(monkeypatch):
    """What Square alone finds must not be hidden by the attacks after it."""
    args = arguments()
    vars(args).update(apgd_steps=1, targeted_steps=1, restarts=1, square_queries=1)
    data = common.load_data('shapes', train_size=40, test_size=20, val_size=10)
    net = network()
    with torch.no_grad():  # nothing but Square moves it: it always says 3
        net.net.fc.weight.zero_()
        net.net.fc.bias.copy_(torch.eye(10)[3])
    monkeypatch.setattr(common, 'square', lambda model, x, y, **_: 0 * x)
    monkeypatch.setattr(
        common,
        'correct_under',
        lambda model, x, y, attack=None, **_: (
            torch.zeros if attack and getattr(attack, 'func', None) is common.square else torch.ones
        )(len(y), dtype=torch.bool),
    )
    trained = dict(
        best=net.state_dict(),
        last=net.state_dict(),
        best_epoch=1,
        history=[{}],
        collapsed=False,
        seconds=0,
        precision='',
    )
    out = cifs.evaluate_arm(args, data, trained, cifs.builder(args, 'cifs'), net, 0, torch.device('cpu'))
    assert out['masking']['black box finds what white box misses'][2]


def test_worst_case_counts_images_spared_by_later_attacks_as_lost():
    class Brightness(nn.Module):
        def forward(self, x):
            m = x.mean((1, 2, 3))
            return torch.stack((0.5 - m, m - 0.5), 1)

    x = torch.tensor([0.2, 0.4, 0.45, 0.9])[:, None, None, None].expand(4, 3, 8, 8)
    y = torch.tensor([0, 0, 0, 0])  # the last is wrong from the start
    seen = []

    def brighter(by):
        def attack(model, x, y):
            seen.append(len(x))
            return (x + by).clamp(0, 1)

        return attack

    names = dict(zip(('fgsm', 'apgd', 'square', 'dlr'), (0.06, 0.11, 0.0, 0.4)))
    which = dict(fgsm='all', apgd='all', square='apgd', dlr='left')
    correct = cifs.attacked(Brightness(), x, y, [(n, which[n], brighter(by)) for n, by in names.items()])
    assert seen == [3, 3, 1, 1]
    assert {k: v.tolist() for k, v in correct.items()} == {
        'natural': [True, True, True, False],
        'fgsm': [True, True, False, False],
        'apgd': [True, False, False, False],
        'square': [True, False, False, False],
        'dlr': [False] * 4,
        'worst': [False] * 4,
    }


# ---------------------------------------------------------------------------- the losses


def test_joint_weighs_final_and_probes():
    out = (torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3))
    y = torch.tensor([0, 1, 2, 0])
    ce = [F.cross_entropy(o, y, reduction='none') for o in out]
    assert torch.allclose(cifs.joint_loss(2.0)(out, y), ce[0] + ce[1] + ce[2])
    assert torch.allclose(cifs.joint_loss(0.5)(out, y), ce[0] + 0.25 * (ce[1] + ce[2]))
    assert torch.allclose(cifs.joint_loss(7.0)(out[0], y), ce[0])
    kl = cifs.joint(common.kl_divergence, 2.0, out, out[::-1])
    assert torch.allclose(kl, common.kl_divergence(out[0], out[2]) + common.kl_divergence(out[2], out[0]), atol=1e-6)


@pytest.mark.parametrize('training', ('standard', 'pgd', 'trades', 'mart'))
def test_without_probes_each_training_is_commons(training):
    net = network('vanilla').train()
    with torch.no_grad():
        net.fc.weight.mul_(5)

    def loss(function):
        return function(copy.deepcopy(net), X, Y, THREAT, torch.Generator().manual_seed(3))

    assert torch.allclose(loss(cifs.training_loss(training, 0.0)), loss(common.METHODS[training]), atol=1e-5)


def test_training_keeps_its_scale_over_beta():
    """With final and probes equal, the loss is 3 CE whatever beta, as at the default 2."""

    class Same(cifs.CIFS):
        def __init__(self):
            nn.Module.__init__(self)
            self.probes = ['first', 'second']

        def forward(self, x, y=None):
            return (x.flatten(1)[:, :10],) * 3

    losses = [cifs.training_loss('standard', b)(Same(), X, Y, THREAT, None) for b in (0.1, 2, 100)]
    expected = 3 * F.cross_entropy(X.flatten(1)[:, :10], Y)
    assert torch.allclose(torch.stack(losses), expected.expand(3))


def test_fat_stops_where_an_image_is_misclassified():
    class Dark(nn.Module):
        """Class 0 for dark images; sure of it, so that the loss has a slope."""

        def forward(self, x):
            m = x.mean((1, 2, 3))
            return torch.stack((0.5 - m, m - 0.5), 1)

    x = torch.tensor([0.9, 0.49, 0.1])[:, None, None, None].expand(3, 3, 4, 4).contiguous()
    y = torch.zeros(3, dtype=torch.long)
    threat = dict(eps=0.1, step_size=0.02, steps=10, norm='linf')
    loss = cifs.training_loss('fat', 0.0)(Dark(), x, y, threat, torch.Generator().manual_seed(0))
    logits = Dark()(x)  # wrong already: as it is; near: just over; far: the whole radius
    reached = [F.cross_entropy(logits[:1], y[:1]), F.cross_entropy(Dark()(x[2:] + 0.1), y[2:])]
    near = 3 * loss - sum(reached)
    assert np.log(2) < near < F.cross_entropy(torch.tensor([[-0.05, 0.05]]), y[:1])


def test_probes_do_not_change_the_networks_initial_weights_and_a_start_is_taken():
    args = arguments()
    plain = cifs.builder(args, 'vanilla')('small-cnn', 10, (3, 32, 32), 3).state_dict()
    masked = cifs.builder(args, 'cifs')('small-cnn', 10, (3, 32, 32), 3).state_dict()
    assert all(torch.equal(v, masked[f'net.{k}']) for k, v in plain.items())
    start = {k: v + 1 for k, v in masked.items()}
    again = cifs.builder(args, 'cifs', start)('small-cnn', 10, (3, 32, 32), 3).state_dict()
    assert all(torch.equal(v, start[k]) for k, v in again.items())


def test_vanilla_networks_on_shapes_are_those_of_train_at():
    ours = common.parse(common.make_parser('', cifs.DEFAULTS), [])
    theirs = common.parse(common.make_parser('', train_at.DEFAULTS), [])
    for method in ('standard', 'pgd', 'trades'):
        assert common.model_recipe(ours, method, 0) == common.model_recipe(theirs, method, 0)


def test_defaults_of_cifar10_are_the_authors():
    args = arguments('--dataset', 'cifar10')
    assert (args.arch, args.epochs, args.weight_decay, args.lr) == ('resnet18', 120, 2e-4, 0.1)
    drops = [common.lr_factor(args.schedule, e / 120) for e in (0, 74, 75, 89, 90, 119)]
    assert np.allclose(drops, (1, 1, 0.1, 0.1, 0.01, 0.01))
    assert args.steps == 10 and (args.eps, args.step_size) == (8 / 255, 2 / 255)


def test_every_ablation_changes_what_it_says():
    args = arguments('--dataset', 'cifar10')
    args.ablate = ['imgf', 'k', 'layers', 'probe', 'beta']
    base = cifs.arm_spec(args, 'cifs')
    arms = cifs.ablation_arms(args)
    specs = {arm: cifs.arm_spec(args, arm) for arm, _ in arms}
    same = {arm for arm, spec in specs.items() if spec == base}
    assert same == {'cifs, softmax T=1', 'cifs, k=2', 'cifs, both places', 'cifs, nonlinear + linear', 'cifs, beta=2'}
    assert specs['cifs, k=3']['mask_sum'] == 3 and specs['cifs, k=1']['mask_sum'] == 1
    assert len({json.dumps(v) for v in specs.values()}) == len(specs) - 4


# -------------------------------------------------------------------------- the measures


def test_class_statistics_by_hand():
    """Channels 0 to 3 are PR (weight > 0), 4 and 5 NR."""
    weight = np.array([4.0, 3, 2, 1, -1, -2])
    nat = np.array([8.0, 2, 4, 2, 1, 1])
    adv = np.array([6.0, 1, 4, 1, 3, 1])
    gap, cosine, pr, nr, rho = cifs.class_stats(nat, adv, weight)
    assert gap == pytest.approx(6 / 18)
    assert cosine == pytest.approx((48 + 2 + 16 + 2 + 3 + 1) / np.sqrt(90 * 64))
    assert (pr, nr) == pytest.approx((12 / 16, 4 / 2))
    assert rho == pytest.approx(spearmanr(nat[:4], weight[:4]).statistic)
    many = cifs.class_stats(np.stack((nat, adv)), np.stack((adv, nat)), weight)
    assert many.shape == (2, 5) and np.allclose(many[0], (gap, cosine, pr, nr, rho))


def test_share_of_negative_channels_by_hand():
    z = np.array([[1.0, 2, 3, 4], [1, 1, 1, 1]])
    relevance = np.array([[1.0, -1, 0, -2], [1, 1, 1, 1]])
    assert cifs.negative_share(z, relevance).tolist() == [0.6, 0.0]
    assert cifs.negative_share(-z, relevance).tolist() == [0.6, 0.0]  # CAS's can be negative


def test_activations_of_a_network_against_a_plain_computation():
    args = arguments()
    data = common.load_data('shapes', train_size=40, test_size=30, val_size=10)
    model = network('cifs')
    out = cifs.activations(args, data, model, 0, torch.device('cpu'))
    x, y = common.to_float(data.test[0]), data.test[1]
    traced = model.trace(x)
    for k in (0, 7):
        assert np.allclose(common.unpack(out['nat'])[k], traced['features'][y == k].mean(0).detach(), atol=1e-4)
    assert np.allclose(common.unpack(out['weight']), model.net.fc.weight.detach())
    layer = out['layers']['stage3']  # a linear probe: its relevance is its own rows
    assert np.allclose(common.unpack(layer['relevance']), model.probes['stage3'].out.weight.detach(), atol=1e-5)
    stats = common.unpack(out['stats'])
    assert stats.shape == (1 + cifs.DRAWS, 10, 5)
    expected = cifs.class_stats(
        common.unpack(out['nat'])[3], common.unpack(out['adv'])[3], common.unpack(out['weight'])[3]
    )
    assert np.allclose(stats[0, 3], expected, atol=1e-4)
    assert common.unpack(layer['after']).shape == (30,)


def synthetic(n, **lost):
    """Measurements of one network on n images: `lost` says how many the named attack, in the
    order of the suite, takes from those that the attacks before it left."""
    correct, right = {'natural': np.ones(n, np.uint8)}, n
    for name in ('final', 'joint 2', 'apgd', 'square', 'exact joint'):
        right -= lost.get(name.replace(' ', '_'), 0)
        correct[name] = (np.arange(n) < right).astype(np.uint8)
    return dict(correct={k: common.pack(v) for k, v in correct.items()}, collapsed=False)


@pytest.mark.parametrize(
    'n,square,exact,verdicts',
    (
        (250, 0, 0, ('inconclusive', 'inconclusive')),  # nothing found, but few images
        (2000, 0, 0, ('supported', 'supported')),
        (2000, 50, 0, ('contradicted', 'supported')),  # the authors' 2.5 points
        (2000, 0, 50, ('supported', 'contradicted')),
    ),
)
def test_black_box_verdicts(n, square, exact, verdicts):
    run = synthetic(n, apgd=n // 2, square=square, exact_joint=exact)
    results = dict(config=dict(square_queries=100), test_labels=list(np.arange(n) % 10))
    rows = cifs.masking_claims(results, [run], lambda text: '-')
    assert tuple(row['verdict'] for row in rows) == verdicts
    for row, found in zip(rows, (square, exact)):
        assert row['measured'].startswith(f'{100 * found / n:.1f} points')


def test_networks_near_chance_prove_nothing():
    y = np.arange(100) % 10
    run = synthetic(100)
    assert common.untrained([run], y) == ''
    run['correct']['natural'] = common.pack((np.arange(100) < 14).astype(np.uint8))
    assert common.untrained([run], y) == 'accuracy near chance'
    assert common.untrained([dict(run, collapsed=True)], y) == 'collapsed model'
    collapsed = common.masking_claim('it', [dict(run, collapsed=True, masking={})], y)
    assert collapsed['verdict'] == 'uninformative: collapsed model'


# ----------------------------------------------------------------------------- the study

TINY = (
    '--train-size 40 --test-size 20 --epochs 1 --batch-size 20 --apgd-steps 2 --square-queries 2 '
    '--targeted-steps 1 --restarts 1'
).split()


def test_a_tiny_study_leaves_everything_and_is_not_repeated(tmp_path, capsys):
    command = TINY + [
        '--out',
        str(tmp_path),
        '--arms',
        'vanilla',
        'cifs',
        '--trainings',
        'pgd',
        'fat',
        '--ablate',
        'probe',
        '--warm-start',
        '1',
    ]
    cifs.main(command)
    printed = capsys.readouterr().out
    [folder] = (tmp_path / 'cifs').iterdir()
    figures = sorted(p.stem for p in folder.glob('*.png'))
    assert figures == [
        'fig1_channel_activations',
        'fig2_classes',
        'fig3_masks',
        'fig4_training',
        'fig5_attacks',
        'fig6_worst_case',
        'fig7_eps',
        'fig8_trainings',
        'fig9_ablations',
    ]
    results = json.loads((folder / 'results.json').read_text())
    for key in (
        'pgd/vanilla-s0',
        'pgd/cifs-s0',
        'fat/cifs-s0',
        'fat/vanilla-s0',
        'pgd/cifs, linear + linear-s0',
        'pgd/cifs, nonlinear twice-s0',
    ):
        correct = {k: common.unpack(v) for k, v in results[key]['correct'].items()}
        assert all(len(v) == 20 and (correct['worst'] <= v).all() for v in correct.values())
    claims = (folder / 'claims.md').read_text()
    assert claims.startswith('| claim | source | measured | reference | verdict |')
    for i in set(range(1, 17)) - {8}:  # V8 is about CAS
        assert re.search(rf'V{i}\b', claims), i
    assert 'CIFS' in printed and 'Control' in printed
    models = {p: p.stat().st_mtime_ns for p in (tmp_path / 'models').iterdir()}
    stamp = (folder / 'results.json').stat().st_mtime_ns
    cifs.main(command)
    assert models == {p: p.stat().st_mtime_ns for p in (tmp_path / 'models').iterdir()}
    assert stamp == (folder / 'results.json').stat().st_mtime_ns
    moved = tmp_path / 'moved'
    moved.mkdir()
    (moved / 'results.json').write_text((folder / 'results.json').read_text())
    cifs.main(['--plot-only', str(moved)])
    assert (moved / 'claims.md').read_text() == claims


@pytest.mark.slow
def test_l2_and_one_arm(tmp_path):
    cifs.main(TINY + ['--out', str(tmp_path), '--norm', 'l2', '--arms', 'head', '--imgf', 'sigmoid'])
    [folder] = (tmp_path / 'cifs').iterdir()
    results = json.loads((folder / 'results.json').read_text())
    assert 'square' not in results['pgd/head-s0']['correct']


def test_svhn_in_its_real_format(real_data, tmp_path):
    root = real_data / 'svhn-train-prefix'
    if not root.is_dir():
        pytest.skip('no SVHN here')
    args = arguments('--dataset', 'svhn', '--arch', 'small-cnn', '--out', str(tmp_path))
    assert isinstance(args, argparse.Namespace) and args.epochs == 120
    data = common.load_data('svhn', root, trust=True, test_size=50)
    model = cifs.builder(args, 'cifs')('small-cnn', 10, data.shape, 0).eval()
    out = model(common.to_float(data.test[0]))
    assert len(out) == 3 and out[0].shape == (50, 10)


def test_one_evaluation_judges_every_network():
    """A standard network and CIFS without a mask around the same network fall to the same
    attacks; `train_at.py` and the students of `logit_distill.py` face that list."""
    args = common.parse(cifs.make_parser(), ['--apgd-steps', '4', '--targets', '1', '--square-queries', '5'])
    around = network('probes')
    plain = around.net
    data = common.load_data('shapes', train_size=40, test_size=20)
    x, y = data.test[0], common.predict(plain, common.to_float(data.test[0]))  # all right at first
    judged = {}
    for name, model in (('standard', plain), ('CIFS', around)):
        attacks = common.evaluation_attacks(args, 0, torch.device('cpu'))
        judged[name] = {k: common.correct_under(model, x, y, attack) for k, attack in attacks.items()}
    assert list(judged['CIFS']) == ['fgsm', 'pgd20', 'pgd100', 'apgd_ce', 'apgd_t', 'square']
    for name, correct in judged['standard'].items():
        assert torch.equal(correct, judged['CIFS'][name]), name
    assert not torch.stack(list(judged['standard'].values())).all()

    args.margin_steps = 2
    student = logit_distill.attacks_on_student(args, args.eps, 0, torch.device('cpu'))
    for name, attack in common.evaluation_attacks(args, 0, torch.device('cpu')).items():
        if name != 'pgd100':
            ours, theirs = dict(student[name].keywords), dict(attack.keywords)
            drawn = [k.pop('generator', None) for k in (ours, theirs)]
            assert student[name].func is attack.func and ours == theirs, name
            assert name == 'fgsm' or drawn[0].initial_seed() == drawn[1].initial_seed()
