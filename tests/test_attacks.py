"""Attacks against closed forms, against the papers' algorithms, and their invariants."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn

import common

ATTACKS = {
    'fgsm': common.fgsm,
    'pgd': partial(common.pgd, step_size=0.02, steps=5),
    'pgd_eval': partial(common.pgd, step_size=0.02, steps=5, drop_fooled=True, restarts=2),
    'apgd': partial(common.apgd, steps=6),
    'apgd_t': partial(common.apgd, steps=6, targets=3),
    'square': partial(common.square, queries=15),
}


class Linear(nn.Module):
    """logits = W x + b, in double precision if asked."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.w = nn.Parameter(weight)
        self.b = nn.Parameter(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, x):
        return x.flatten(1) @ self.w.T + self.b


def random_model(seed, classes=5):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, classes),
    )


def batch(n=6, seed=0, classes=5, size=8):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 3, size, size, generator=g), torch.randint(classes, (n,), generator=g))


# ----------------------------------------------------------------------- closed forms


@pytest.mark.parametrize('n', (1, 3, 8))
@pytest.mark.parametrize('norm', ('linf', 'l2'))
def test_pgd_reaches_the_closed_form_on_a_linear_model(n, norm):
    g = torch.Generator().manual_seed(n)
    w = torch.randn(2, 48, generator=g)
    x = 0.3 + 0.4 * torch.rand(n, 3, 4, 4, generator=g)  # far from 0 and 1: only the ball binds
    y = torch.arange(n) % 2
    eps = 0.05
    direction = torch.stack([w[1 - k] - w[k] for k in y]).view_as(x)
    best = (
        eps * direction.sign()
        if norm == 'linf'
        else eps * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    )
    model = Linear(w)
    for attack in (
        partial(common.pgd, step_size=eps / 2, steps=40),
        partial(common.pgd, step_size=eps / 2, steps=40, loss='margin'),
        partial(common.apgd, steps=40),
    ):
        x_adv = attack(model, x, y, eps=eps, norm=norm)
        gain = common.margin(model(x_adv), y)
        optimum = common.margin(model(x + best), y)
        robust = optimum <= 0  # a fooled image may stop early
        assert torch.allclose(gain[robust], optimum[robust], atol=1e-3)
        assert ((gain > 0) == (optimum > 0)).all()


@pytest.mark.parametrize('norm,dual', (('linf', 1), ('l2', 2)))
def test_success_begins_at_the_distance_to_the_boundary(norm, dual):
    w = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    x = torch.full((1, 3, 2, 2), 0.5)
    model = Linear(w)
    y = model(x).argmax(1)
    difference = w[1 - y] - w[y]
    radius = (-common.margin(model(x), y) / difference.norm(p=dual)).item()
    assert radius < 0.4
    for factor, falls in ((0.98, False), (1.02, True)):
        x_adv = common.pgd(
            model, x, y, eps=factor * radius, step_size=radius / 4, steps=60, norm=norm, drop_fooled=True
        )
        assert (model(x_adv).argmax(1) != y).item() == falls


def test_fgsm_is_one_signed_step():
    model, (x, y) = random_model(0).eval(), batch()
    xr = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(common.cross_entropy(model(xr), y).sum(), xr)
    expected = (x + 0.1 * gradient.sign()).clamp(0, 1)
    assert torch.allclose(common.fgsm(model, x, y, eps=0.1), expected, atol=1e-7)


# -------------------------------------------------------------------------- invariants


@pytest.mark.parametrize('name', ATTACKS)
@pytest.mark.parametrize('norm', ('linf', 'l2'))
@pytest.mark.parametrize('eps', (0.0, 0.01, 0.3))
def test_attack_stays_in_ball_and_box_and_leaves_the_model_alone(name, norm, eps):
    if name == 'square' and norm == 'l2':
        pytest.skip('linf only')
    options = {} if name == 'square' else dict(norm=norm)
    for seed in range(3):
        model, (x, y) = random_model(seed), batch(seed=seed)
        model[0].weight.requires_grad_(False)
        model[1].eval()  # a mixture of modes must survive
        model[-1].weight.grad = torch.ones_like(model[-1].weight)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        modes = [m.training for m in model.modules()]
        needs = [p.requires_grad for p in model.parameters()]
        x_before = x.clone()
        with torch.no_grad():  # attacks must work there, too
            x_adv = (
                ATTACKS[name](model, x, y, eps=eps, **options, generator=torch.Generator().manual_seed(seed))
                if name != 'fgsm'
                else common.fgsm(model, x, y, eps=eps, norm=norm)
            )
        common.check_attack(x_adv, x, eps, norm)
        assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
        assert torch.equal(x, x_before)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert modes == [m.training for m in model.modules()]
        assert needs == [p.requires_grad for p in model.parameters()]
        assert model[-1].weight.grad.eq(1).all() and model[3].weight.grad is None
        if eps == 0:
            assert torch.allclose(x_adv, x, atol=1e-7)


@pytest.mark.parametrize('norm,eps', (('linf', 0.03), ('l2', 0.5)))
def test_loss_grows_with_steps(norm, eps):
    losses = []
    for steps in (1, 3, 10, 30):
        total = 0
        for seed in range(4):
            model, (x, y) = random_model(seed).eval(), batch(16, seed)
            x_adv = common.pgd(model, x, y, eps=eps, step_size=eps / 4, steps=steps, norm=norm, start='clean')
            total += common.cross_entropy(model(x_adv), y).mean().item()
        losses.append(total)
    assert losses == sorted(losses)


def test_restarts_never_help_the_defender():
    for seed in range(4):
        model, (x, y) = random_model(seed).eval(), batch(32, seed)
        y = model(x).argmax(1)
        survivors = []
        for restarts in (1, 2, 5):
            x_adv = common.pgd(
                model,
                x,
                y,
                eps=0.02,
                step_size=0.01,
                steps=3,
                drop_fooled=True,
                restarts=restarts,
                generator=torch.Generator().manual_seed(7),
            )
            survivors.append(model(x_adv).argmax(1) == y)
        assert (survivors[1] <= survivors[0]).all() and (survivors[2] <= survivors[1]).all()


def test_dropping_fooled_images_changes_no_verdict():
    model, (x, y) = random_model(1).eval(), batch(24, 1)
    y = model(x).argmax(1)
    attack = partial(common.pgd, eps=0.03, step_size=0.01, steps=6, start='clean', drop_fooled=True)
    together = common.correct_under(model, x, y, attack)
    alone = torch.cat([common.correct_under(model, x[i : i + 1], y[i : i + 1], attack) for i in range(len(y))])
    path = x.clone()
    ever = torch.zeros(len(y), dtype=torch.bool)
    for _ in range(6):  # plain PGD, looking at every iterate
        path = common.pgd(model, path, y, eps=0.01, step_size=0.01, steps=1, start='clean')
        path = common.project(path, x, 0.03, 'linf')
        ever |= model(path).argmax(1) != y
    assert torch.equal(together, alone)
    assert torch.equal(together, ~ever)
    assert 0 < together.sum() < len(y)


def test_any_loss_plugs_in_and_may_see_the_whole_output():
    class TwoHeads(nn.Module):
        def forward(self, x):
            v = x.flatten(1)
            return v[:, :2], v[:, 2:4]

    x, y = torch.full((1, 4, 1, 1), 0.5), torch.zeros(1, dtype=torch.long)
    x_adv = common.pgd(
        TwoHeads(), x, y, eps=0.1, step_size=0.1, steps=2, start='clean', loss=lambda out, y: common.margin(out[1], y)
    )
    assert torch.allclose((x_adv - x).flatten(), torch.tensor([0, 0, -0.1, 0.1]), atol=1e-6)


@pytest.mark.parametrize('eps', (-0.1, 8.0, math.nan))
def test_eps_out_of_range_is_refused(eps):
    x, y = batch()
    with pytest.raises(common.UserError):
        common.pgd(random_model(0), x, y, eps=eps, step_size=0.1, steps=1)


def test_the_l2_start_is_uniform_in_the_ball():
    x = torch.full((4000, 1, 1, 2), 0.5)
    r = (common.random_start(x, 0.2, 'l2', torch.Generator().manual_seed(0)) - x).flatten(1)
    r = r.norm(dim=1) / 0.2
    assert r.max() <= 1 + 1e-6
    assert abs((r < 0.5).float().mean() - 0.25) < 0.03  # area, not radius, is uniform


# ------------------------------------------------------------------- losses, APGD, Square


def test_dlr_is_invariant_to_shift_and_scale_and_has_its_values():
    z, y = torch.randn(20, 6, dtype=torch.double), torch.arange(20) % 6
    target = (y + 1) % 6
    for args in ((y,), (y, target)):
        value = common.dlr(z, *args)
        assert torch.allclose(common.dlr(3.7 * z + 5, *args), value, atol=1e-9)
    z = torch.tensor([[5.0, 3.0, 1.0, 0.0]])
    # -(5 - 3) / (5 - 1); towards class 2: -(5 - 1) / (5 - (1 + 0) / 2)
    assert common.dlr(z, torch.tensor([0])).item() == pytest.approx(-0.5)
    assert common.dlr(z, torch.tensor([0]), torch.tensor([2])).item() == pytest.approx(-4 / 4.5)
    assert common.dlr(z, torch.tensor([1])).item() == pytest.approx(0.5)
    with pytest.raises(common.UserError):
        common.dlr(torch.randn(3, 2), torch.zeros(3, dtype=torch.long))


def test_margin_is_positive_exactly_where_the_model_errs():
    z, y = torch.randn(200, 7), torch.randint(7, (200,))
    assert torch.equal(common.margin(z, y) > 0, z.argmax(1) != y)


def test_apgd_checkpoints():
    # p = 0, 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99
    assert common.apgd_checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]


def reference_apgd(value, slope, x, eps, steps, rho=0.75, alpha=0.75):
    """Algorithm 1 of Croce & Hein (2020) for one point in one variable, written from the paper."""

    def p(v):
        return min(max(v, x - eps, 0.0), x + eps, 1.0)

    w = common.apgd_checkpoints(steps)
    xs, eta = [x], 2 * eps
    xs.append(p(x + eta * np.sign(slope(x))))
    f = [value(xs[0]), value(xs[1])]
    best = max(xs, key=value)
    eta_at, best_at, j, rises, sizes = eta, value(x), 1, int(f[1] > f[0]), [eta]
    for k in range(1, steps):
        if k == w[j]:
            fell = rises < rho * (w[j] - w[j - 1])
            same = eta_at == eta and best_at == value(best)
            eta_at, best_at, rises, j = eta, value(best), 0, min(j + 1, len(w) - 1)
            if fell or same:
                eta /= 2
                xs[-1] = best
        z = p(xs[-1] + eta * np.sign(slope(xs[-1])))
        new = p(xs[-1] + alpha * (z - xs[-1]) + (1 - alpha) * (xs[-1] - xs[-2]))
        before = f[-1]
        xs.append(new)
        f.append(value(new))
        rises += f[-1] > before
        best = max(best, new, key=value)
        sizes.append(eta)
    return best, sizes


@pytest.mark.parametrize('peak', (0.05, 0.5, 0.83))
def test_apgd_follows_the_algorithm(peak, monkeypatch):
    """A tent of height below the decision boundary: APGD must halve its way to the peak."""
    x0, eps, steps = 0.4, 0.2, 50
    target = x0 + eps * (2 * peak - 1)

    class Tent(nn.Module):
        def forward(self, x):
            f = -3 * (x.flatten(1)[:, :1] - target).abs()
            return torch.cat((torch.ones_like(f), f), 1)

    sizes = []

    def project(x_adv, x, eps_, norm):
        sizes.append((x_adv, x))
        return plain(x_adv, x, eps_, norm)

    plain = common.project
    monkeypatch.setattr(common, 'project', project)
    x = torch.full((1, 1, 1, 1), x0, dtype=torch.double)
    x_adv = common.apgd(Tent(), x, torch.zeros(1, dtype=torch.long), eps=eps, steps=steps, loss='margin', start='clean')
    best, expected = reference_apgd(lambda v: -3 * abs(v - target), lambda v: np.sign(target - v), x0, eps, steps)
    assert len(sizes) == 2 * steps  # z and x of every step
    assert x_adv.item() == pytest.approx(best, abs=1e-6)  # the loss is kept in float32
    assert abs(x_adv.item() - target) < 0.02 * eps
    assert expected[0] == 2 * eps and expected[-1] < expected[0] / 4


def test_apgd_beats_pgd_of_the_same_cost():
    drops = 0
    for seed in range(4):
        model, (x, _) = random_model(seed).eval(), batch(32, seed)
        y = model(x).argmax(1)
        apgd = common.apgd(model, x, y, eps=0.02, steps=20, loss='dlr', start='clean')
        pgd = common.pgd(model, x, y, eps=0.02, step_size=0.02, steps=20, start='clean', drop_fooled=True)
        drops += (model(pgd).argmax(1) == y).sum() - (model(apgd).argmax(1) == y).sum()
    assert drops >= 0


def test_targeted_apgd_reaches_a_class_that_untargeted_ce_does_not_prefer():
    model, (x, _) = random_model(3).eval(), batch(40, 3)
    y = model(x).argmax(1)
    few = common.correct_under(model, x, y, partial(common.apgd, eps=0.02, steps=8, targets=1, start='clean'))
    many = common.correct_under(model, x, y, partial(common.apgd, eps=0.02, steps=8, targets=4, start='clean'))
    assert (many <= few).all()


def test_square_needs_no_gradient_and_changes_pixels_by_eps():
    class Quantised(nn.Module):
        def forward(self, x):
            v = (x * 4).round().flatten(1)
            return torch.stack((v.sum(1) - 2 * v.shape[1] + 20, torch.zeros(len(v))), 1)

    x = torch.full((5, 3, 6, 6), 0.5)
    y = torch.zeros(5, dtype=torch.long)
    x_adv = common.square(Quantised(), x, y, eps=0.2, queries=400, generator=torch.Generator().manual_seed(0))
    assert (Quantised()(x_adv).argmax(1) != y).all()
    assert torch.allclose((x_adv - x).abs(), torch.full_like(x, 0.2), atol=1e-6)


def test_square_finds_more_with_more_queries():
    model, (x, _) = random_model(2).eval(), batch(40, 2)
    y = model(x).argmax(1)
    left = [
        common.correct_under(
            model, x, y, partial(common.square, eps=0.05, queries=q, generator=torch.Generator().manual_seed(0))
        ).sum()
        for q in (1, 200)
    ]
    assert left[1] < left[0]
