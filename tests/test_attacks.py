"""Attacks against closed forms, the algorithms of the papers and what their docstrings promise."""
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import common

ATTACKS = {
    'fgsm': common.fgsm, 'pgd': partial(common.pgd, step_size=0.2, steps=20),
    'pgd stop': partial(common.pgd, step_size=0.2, steps=20, stop=True),
    'apgd targeted': partial(common.apgd, steps=8, loss=common.dlr_targeted, targets=3),
    'apgd': partial(common.apgd, steps=8), 'square': partial(common.square, queries=300)}
CASES = [*((name, 'linf') for name in ATTACKS), *((name, 'l2') for name in list(ATTACKS)[:-1])]
every_attack = pytest.mark.parametrize('name, norm', CASES)

def attack(name, norm, model, x, y, eps):
    options = {} if name == 'square' else dict(norm=norm)
    return ATTACKS[name](model, x, y, eps=eps, generator=common.make_generator(0), **options)

def size(v, norm):
    return v.flatten(1).norm(math.inf if norm == 'linf' else 2, dim=1)

class Linear(nn.Module):
    """weight see(x); keeps the points it is asked for."""
    def __init__(self, weight, see=lambda x: x):
        super().__init__()
        self.weight, self.see, self.asked = nn.Parameter(weight), see, []

    def forward(self, x):
        self.asked.append(x.detach())
        return self.see(x).flatten(1) @ self.weight.T

    def read(self, x):
        return common.logits_of(self, x).argmax(1)

@every_attack
def test_ball_box_and_the_network_as_it_was(name, norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 5))
    x, y, eps = torch.rand(12, 3, 8, 8), torch.arange(12) % 5, 0.1 if norm == 'linf' else 1.0
    x[:4] = x[:4].round()  # black and white: the box binds
    model[1].eval()  # a mixture of modes has to survive
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    tensors = x, *model.state_dict(keep_vars=True).values()
    state = lambda: ([m.training for m in model.modules()], [
        (v.tolist(), v.requires_grad, str(v.grad)) for v in tensors])
    before = state()
    with torch.no_grad():
        found = attack(name, norm, model, x, y, eps)
    assert size(found - x, norm).max() <= eps + 1e-5 and found.min() >= 0 and found.max() <= 1
    assert found.shape == x.shape and not found.requires_grad and state() == before
    model.register_forward_hook(lambda model, x, output: (output, x))  # a second output
    assert torch.equal(attack(name, norm, model, x, y, eps), found)
    assert torch.allclose(attack(name, norm, model, x, y, 0.0), x, atol=1e-6)

@every_attack
@pytest.mark.parametrize('see', (lambda x: x.detach() + 0 * x, lambda x: x + (0 * x).sqrt()))
def test_points_are_finite_where_gradients_are_zero_or_nan(name, norm, see):
    model, x = Linear(torch.randn(4, 48), see), torch.rand(4, 3, 4, 4)
    found = attack(name, norm, model, x, model.read(x), 0.05)
    assert found.isfinite().all() and size(found - x, norm).max() <= 0.05 + 1e-5

@every_attack
def test_linear_networks_are_fooled_from_their_distance_to_the_boundary_on(name, norm):
    """The margin grows by eps times the dual norm of w_other - w_y and by no more."""
    model = Linear(torch.randn(2, 12))
    for x in (0.4 + 0.2 * torch.rand(4, 3, 2, 2)).split(1):
        y, before = model.read(x), model(x).diff().abs().item()
        slope = model.weight.diff(dim=0).norm(1 if norm == 'linf' else 2).item()
        for factor in (0.98, 1.02):
            eps = factor * before / slope
            found = attack(name, norm, model, x, y, eps)
            assert (model.read(found) != y) == (factor > 1)
            left = model(found).diff().abs().item()
            assert factor > 1 or before - left == pytest.approx(eps * slope, rel=1e-3)

def croce_hein(start, values, signs, eps):
    """Algorithm 1 of Croce & Hein 2020 in one dimension, around 1/2: the points of 100 steps, if
    the loss of point k is values[k] and the sign of its slope is signs[k]."""
    looks, points, now, last = [0, 22, 41, 57, 70, 80, 87, 93, 99], [start], start, start
    step, halved, best, old_best = 2 * eps, False, 0, 0
    for k in range(100):
        at, best = k, k if values[k] > values[best] else best
        if k in looks[1:]:
            since = looks[looks.index(k) - 1]
            rises = sum(values[i + 1] > values[i] for i in range(since, k))
            halved = rises < 0.75 * (k - since) or (not halved and best == old_best)
            old_best = best
            step, now, at = (step / 2, points[best], best) if halved else (step, now, k)
        ahead = min(max(now + step * signs[at], 0.5 - eps), 0.5 + eps)
        new = now + 0.75 * (ahead - now) + 0.25 * (now - last) if k else ahead
        now, last = min(max(new, 0.5 - eps), 0.5 + eps), now
        points.append(now)
    return points

def test_apgd_queries_the_points_of_the_paper():
    """Losses that rise in three of four steps take every branch of the rule that halves."""
    model, x = Linear(torch.tensor([[0.1], [0.0]])), torch.full((30, 1, 1, 1), 0.5)
    walks = ((torch.rand(30, 101) < 0.75) * 4.0 - 3 + 0.1 * torch.rand(30, 101)).cumsum(1)
    signs = torch.rand(30, 101).round() * 2 - 1

    def loss(output, y):
        k = len(model.asked) - 2  # the first query is for the prediction alone
        return walks[:, k] + signs[:, k] * 10 * (output - output.detach())[:, 0]

    found = common.apgd(model, x, torch.zeros(30, dtype=torch.long), eps=0.1, loss=loss)
    asked = torch.stack(model.asked[1:], 1).flatten(1)
    for row, points in enumerate(asked):
        expected = croce_hein(points[0].item(), walks[row], signs[row], 0.1)
        assert torch.allclose(points, torch.tensor(expected), atol=1e-5)
    assert torch.equal(found.flatten(), asked[torch.arange(30), walks.argmax(1)])  # largest loss

def test_targeted_apgd_runs_towards_each_of_the_likeliest_classes():
    model, goals, x = Linear(torch.tensor([[4.0], [1], [3], [2], [0]])), [], torch.ones(1, 1, 1, 1)
    loss = lambda output, y, goal: goals.append(goal.item()) or common.margin(output, goal)
    common.apgd(model, x, torch.tensor([0]), eps=0.1, steps=0, loss=loss, targets=3)
    assert goals == [2, 3, 1]

@pytest.mark.parametrize('name, norm', [case for case in CASES if case[0] not in ('fgsm', 'pgd')])
def test_fooled_images_are_dropped_at_the_first_point_that_fools(name, norm):
    model, x, eps = Linear(torch.randn(5, 48)), torch.rand(40, 3, 4, 4), dict(linf=0.02, l2=0.1)
    y = (model.read(x) + (torch.arange(40) < 3)) % 5  # three are wrong before any attack
    found, end = attack(name, norm, model, x, y, eps[norm]), {}
    for points in model.asked[1:]:
        owner = (points[:, None] - x).flatten(2).norm(dim=2).argmin(1)
        assert not end.keys() & set(owner.tolist())
        wrong = model.read(points) != y[owner]
        end |= dict(zip(owner[wrong].tolist(), points[wrong]))
    assert {0, 1, 2} < end.keys() and len(end) < 40
    assert all(torch.equal(found[i], point) for i, point in end.items())

def test_square_draws_stripes_and_then_squares_of_the_papers_sizes():
    """The share of pixels, 0.8, is halved after 0.1, 0.5, 2, 5, 10, ... % of the queries."""
    x, model = torch.rand(6, 3, 16, 16), Linear(torch.eye(2, 768), lambda x: torch.eye(16) + 0 * x)
    common.square(model, x, torch.zeros(6, dtype=torch.long), eps=2.0, queries=200)
    _, stripes, *tried = model.asked  # black or white; nothing is better than the stripes
    assert (stripes == stripes[:, :, :1].round()).all() and (stripes != stripes[..., :1]).any()
    for query, share in ((3, 0.2), (7, 0.1), (15, 0.05), (30, 0.025), (60, 0.0125)):
        rows = (tried[query - 1] != stripes).any(3).any(1)
        assert rows.sum(1).max() == round((share * 256) ** 0.5)

@pytest.mark.parametrize('norm', ('linf', 'l2'))
def test_random_starts_are_uniform_in_the_ball(norm, n=4000):
    """Then radius^d is uniform, d the number of pixels, and no direction is preferred."""
    noise = common.random_start(torch.full((n, 3, 2, 2), 0.5), 0.2, norm) - 0.5
    share = (size(noise, norm).double() / 0.2) ** 12
    assert (share.sort()[0] - torch.arange(n) / n).abs().max() < 1.63 / n**0.5  # Kolmogorov, 1 %
    assert noise.sign().mean(0).abs().max() < 0.06
    assert (noise.flatten(1).T.corrcoef() - torch.eye(12)).abs().max() < 0.07

def test_losses_have_their_closed_forms():
    z, y, target = torch.tensor([[5.0, 3, 1, 0], [0, 2, -1, 1]]), *torch.tensor([[0, 3], [2, 1]])
    ratio = torch.tensor([-4 / 4.5, 1 / 2.5])  # (z_t - z_y) / (z_1 - (z_3 + z_4) / 2)
    assert torch.allclose(common.dlr_targeted((z, None), y, target), ratio)
    assert all(common.dlr_targeted(z[:1, :k], y[:1], target[1:]).item() == -2 for k in (2, 3))
    assert common.margin((z, None), y).tolist() == [-2, 1]
    p, q = torch.tensor([[[0.5, 0.25, 0.25]], [[0.25, 0.375, 0.375]]]).log()
    kl = common.kl_divergence((q + 7, None), (p, None)).item()
    assert kl == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)

def test_float16_keeps_small_gradients():
    model, x, y = Linear(torch.tensor([[0.0], [-18.0]])), torch.ones(1, 1, 1, 1), torch.tensor([0])
    exact, found = (common.input_gradient(net, x, y, common.cross_entropy)[2].item()
                    for net in (model, lambda x: model(x).half()))
    assert exact < 0 and found == pytest.approx(exact, rel=0.01)  # p = 1.5e-8 is 0 in float16

def test_correct_under_attacks_what_is_right_in_float32():
    model, x, asked = Linear(torch.randn(3, 12)), (255 * torch.rand(600, 3, 2, 2)).byte(), []
    y = (model.read(x) + (torch.arange(600) % 4 == 0)) % 3  # three batches, a quarter wrong
    invert = partial(lambda model, x, y, generator: asked.append(x) or 1 - x)
    right, still = model.read(x) == y, model.read(1 - x / 255) == y
    for v in (x, x / 255):
        assert torch.equal(common.correct_under(model, v, y), right)
        assert torch.equal(common.correct_under(model, v, y, invert), right & still)
        assert torch.equal(torch.cat(asked[-3:]), x[right] / 255)  # equal in type, too
    assert common.correct_under(model, x[:0], y[:0], invert).shape == (0,)

def test_evaluate_is_cumulative_and_resumes():
    """Image k has k / 255 in its first pixel; its second pixel says whether it is read rightly."""
    model = Linear(torch.tensor([[0, 0.5], [0, 1.0]]), lambda x: x - 0.5)
    x = torch.tensor([[k, 255 * (k == 7)] for k in range(8)]).byte()[..., None, None]
    data = SimpleNamespace(test=(x, torch.zeros(8, dtype=torch.long)), classes='abcd')
    fools = dict(fgsm=(0,), pgd=(1, 2), apgd_ce=(3,), apgd_t=(4,), square=(5,))
    asked, saved, correct = {}, [], {}

    def fool(model, x, y, generator, name):
        asked[name] = [round(255 * k) for k in x[:, 0].flatten().tolist()]
        return torch.tensor([[k / 255, k in fools[name]] for k in asked[name]])[..., None, None]

    attacks = {name: partial(fool, name=name) for name in fools}
    common.evaluate(model, data, attacks, correct, lambda: saved.append(len(correct)))
    everyone, last = [0, 1, 2, 3, 4, 5, 6], dict(apgd_t=[4, 5, 6], square=[5, 6])
    assert asked == dict(fgsm=everyone, pgd=everyone, apgd_ce=[3, 4, 5, 6], **last)
    assert {name: v.nonzero()[0].tolist() for name, v in correct.items()} == dict(
        natural=everyone, fgsm=[1, 2, 3, 4, 5, 6], pgd=[0, 3, 4, 5, 6], apgd_ce=[4, 5, 6],
        apgd_t=[5, 6], square=[6], worst=[6])
    assert saved == [2, 3, 4, 5, 6, 7]  # after each, with the worst case so far
    asked.clear()
    del correct['apgd_t'], correct['square'], correct['worst']
    common.evaluate(model, data, attacks, correct, lambda: None)
    assert asked == last and correct['worst'].nonzero()[0].tolist() == [6]

@pytest.mark.parametrize('symptom, see', (
    ('', lambda x: x), ('random outputs', lambda x: x + 0.1 * torch.randn_like(x)),
    ('zero gradients', lambda x: x.detach() + 0 * x), ('black box beats white', lambda x: x),
    ('zero gradients', lambda x: (8 * x).round()), ('cross-entropy far weaker', lambda x: 1e5 * x),
    ('unbounded attack fails', lambda x: 2 * x.detach() - x),
    ('one step beats many', lambda x: torch.where(  # the slope is right at the image alone
        (255 * x - (255 * x).round()).abs() < 1e-3, x, 2 * x.detach() - x))))
def test_each_way_of_masking_gradients_has_its_symptom(symptom, see):
    weight, y, correct = torch.randn(2, 48), torch.arange(100) % 2, {}
    weight -= weight.mean(1, keepdim=True)
    x = 127 + 13 * (weight[y] + torch.randn(100, 48)).clamp(-9, 9).view(100, 3, 4, 4)
    model, data = Linear(weight, see), SimpleNamespace(test=(x.byte(), y), classes='ab')
    attacks = common.evaluation_attacks(SimpleNamespace(
        dataset='shapes', eps=0.05, norm='linf', apgd_steps=10, targets=3, square_queries=100))
    if symptom == 'black box beats white':  # too few steps
        attacks |= dict.fromkeys(list(attacks)[:4], partial(common.apgd, eps=0.05, steps=0))
    common.evaluate(model, data, attacks, correct, lambda: None)
    found = common.masking_check(model, data, correct)
    tripped = [name for name in common.MASKING if found[name] > common.MASKING[name]]
    assert symptom in tripped if symptom else not tripped and 0.1 < correct['worst'].mean() < 0.9
