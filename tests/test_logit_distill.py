"""logit_distill.py: invariants of every manipulation, closed forms, an exact tier, verdicts."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import logit_distill as ld


def logits(n=400, k=10, seed=0, spread=2.0):
    return spread * torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


T, S = logits(), logits(seed=1, spread=4.0)
M = T.argmax(1)
ROWS = torch.arange(len(T))


def others(t, m=M):
    keep = torch.ones_like(t, dtype=torch.bool).scatter(1, m[:, None], False)
    return t[keep].view(len(t), -1)


def confidence(t, m=M):
    return t.softmax(1).gather(1, m[:, None])[:, 0]


def generator(key='test'):
    return common.make_generator(key)


def whole_and_table(t=T, s=S, key='table'):
    t, s = t.float(), s.float()
    whole = ld.describe(t, s)
    return whole, ld.draw_table(whole, whole['m'], whole['odds'], generator(key))


def target(name, fresh='fresh', t=T, s=S):
    whole, table = whole_and_table(t, s)
    return ld.targets(name, t.float(), s.float(), whole, table, generator(fresh)).double()


# ---------------------------------------------------------------------------- manipulations


@pytest.mark.parametrize('name', ('M1', 'M2', 'M3', 'M6', 'M8', 'M10'))
def test_moves_keep_the_prediction_and_every_value(name):
    out = target(name)
    assert torch.allclose(out.gather(1, M[:, None]), T.gather(1, M[:, None]), atol=1e-6)
    assert torch.allclose(others(out).sort(1)[0], others(T).sort(1)[0], atol=1e-6)
    assert torch.allclose(confidence(out), confidence(T), atol=1e-6)
    assert not torch.allclose(out, T, atol=1e-3)


def test_permutations_are_fresh_per_sample_or_per_class():
    assert torch.equal(target('M2', 'one'), target('M2', 'two'))  # the table decides
    assert not torch.equal(target('M1', 'one'), target('M1', 'two'))
    # M3: two images read alike are permuted alike, others are not
    order = {}
    for m, t, out in zip(M.tolist(), T.float(), target('M3').float()):
        where = tuple(out.tolist().index(v) for v in t.tolist())
        assert order.setdefault(m, where) == where and where[m] == m
    assert len(set(order.values())) == 10
    # M2: images read alike are not
    same = (M == M[0]).nonzero()[:, 0]
    moved = [
        tuple(o.tolist().index(v) for v in t.tolist()) for t, o in zip(T.float()[same], target('M2').float()[same])
    ]
    assert len(set(moved)) > 0.9 * len(moved)


def test_random_permutations_are_uniform():
    u = torch.rand(30000, 4, generator=generator())
    out = ld.permute_others(torch.tensor([[3.0, 0, 1, 2]]).expand(30000, -1), torch.zeros(30000, dtype=torch.int64), u)
    for place in (1, 2, 3):
        for value in (0, 1, 2):
            assert (out[:, place] == value).double().mean() == pytest.approx(1 / 3, abs=0.015)


@pytest.mark.parametrize('keep', (0, 1, 3, 8, 9))
def test_flattening_keeps_the_confidence_and_the_largest(keep):
    out = ld.flatten_others(T, M, keep)
    assert torch.allclose(confidence(out), confidence(T), atol=1e-12)
    before, after = (others(v).sort(1, descending=True)[0] for v in (T, out))
    assert torch.equal(before[:, :keep], after[:, :keep])
    assert (after[:, keep:].amax(1) - after[:, keep:].amin(1)).abs().max() < 1e-12 if keep < 9 else torch.equal(out, T)
    if keep == 8:  # one class alone is its own mean
        assert torch.allclose(out, T)


def test_the_arithmetic_mean_would_raise_the_confidence():
    flat = T.clone()
    for i, m in enumerate(M):
        rest = torch.arange(10) != m
        flat[i, rest] = T[i, rest].mean()
    assert (confidence(flat) > confidence(T) + 1e-6).all()


def test_reversing_twice_is_nothing():
    once = ld.reverse_others(T, M)
    assert torch.equal(ld.reverse_others(once, M), T)
    order = others(T).argsort(1)
    assert torch.equal(others(once).argsort(1), order.flip(1))


def test_orders_and_profiles():
    whole, _ = whole_and_table()
    out = target('M8')
    assert torch.equal(others(out).argsort(1), others(whole['mean'][M]).argsort(1))
    out = target('M9')
    assert torch.equal(others(out).argsort(1), others(T.float()).argsort(1))
    values = ld.ranked(out, M)[1]
    assert torch.allclose(values, values[:1].expand_as(values))
    assert torch.allclose(values[0], (T - T.mean(1, keepdim=True)).sort(1, descending=True)[0].mean(0), atol=1e-5)


def test_the_runner_up_is_another_class():
    out = target('M10')
    second = [ld.ranked(v, M)[0][:, 1] for v in (T, out)]
    assert (second[0] != second[1]).all()
    seen = {int((ld.ranked(T, M)[0][i] == second[1][i]).nonzero()) for i in range(len(T))}
    assert seen == set(range(2, 10))
    assert torch.allclose(ld.logit_measures(out)['gap'], ld.logit_measures(T)['gap'], atol=1e-6)


def test_confidence_can_be_set_shuffled_and_borrowed():
    whole, table = whole_and_table()
    constant = confidence(target('M11'))
    assert torch.allclose(constant, confidence(T).mean().expand_as(constant), atol=1e-6)
    for c in range(10):  # M12: each class keeps its confidences, images exchange them
        own = confidence(T)[M == c].sort()[0]
        assert torch.allclose(confidence(target('M12'))[M == c].sort()[0], own, atol=1e-5)
    assert (confidence(target('M12')) - confidence(T)).abs().mean() > 0.05
    for name in ('M11', 'M12', 'M13', 'M14', 'SA'):  # the others are left alone
        assert torch.allclose(others(target(name)), others(T), atol=1e-6)
    gap = ld.logit_measures(target('M14'))['gap']
    assert torch.allclose(gap, ld.logit_measures(T)['gap'].mean().expand_as(gap), atol=1e-5)
    height = target('M13').gather(1, M[:, None])[:, 0] - others(T).mean(1)
    assert height.std() < 1e-5
    assert torch.allclose(ld.log_odds(target('SA'), M), ld.log_odds(S, S.argmax(1)), atol=1e-4)
    assert torch.allclose(ld.log_odds(target('AS'), M), ld.log_odds(T, M), atol=1e-4)
    assert torch.allclose(others(target('AS')), others(S), atol=1e-6)


def test_log_odds_are_those_of_the_probability():
    p = confidence(T)
    assert torch.allclose(ld.log_odds(T, M), (p / (1 - p)).log())
    big = torch.tensor([[60.0, 0, 0]])  # where p is 1 in float32
    assert ld.log_odds(big, torch.tensor([0])).item() == pytest.approx(60 - math.log(2))


def test_summaries():
    out = target('M7')
    for c in range(10):
        rows = (T - T.mean(1, keepdim=True))[M == c]
        assert torch.allclose(out[M == c][0], rows.mean(0), atol=1e-5)
    smooth = target('M16')
    assert others(smooth).std(1).max() < 1e-5
    assert torch.allclose(confidence(smooth), confidence(T).mean().expand(len(T)), atol=1e-6)
    gap = ld.logit_measures(target('M17'))['gap'].mean()
    assert gap.item() == pytest.approx(ld.logit_measures(T)['gap'].mean().item(), rel=1e-5)
    hard = target('M19').softmax(1)
    assert torch.equal(hard, F.one_hot(M, 10).double())


def test_gaussians_have_the_moments_of_their_class():
    t = logits(6000, 4) + 8.0 * F.one_hot(torch.arange(6000) % 4, 4)  # never flips
    whole, table = whole_and_table(t, t)
    centred = (t - t.mean(1, keepdim=True)).float()
    for c in range(4):
        rows, drawn = centred[whole['m'] == c], table['gaussian'][whole['m'] == c]
        assert torch.allclose(rows.mean(0), drawn.mean(0), atol=0.25)
        assert torch.allclose(torch.cov(rows.T), torch.cov(drawn.T), atol=0.6)
    # and where they do flip, they are drawn again
    whole, table = whole_and_table()
    assert (table['gaussian'].argmax(1) != M).float().mean() < 0.05


def test_flips_are_those_of_borrowed_confidence():
    for name in ld.NAMES:
        if name in ('LSQ', 'STD', 'M17'):
            continue
        flips = (target(name).argmax(1) != M).double().mean()
        if name in ('M7', 'M11', 'M12', 'M13', 'M15', 'M16', 'AS', 'SA'):
            continue  # may flip: those images are left out of the training
        assert flips == 0, name
    assert 0 < (target('M12').argmax(1) != M).double().mean() < 0.3


def test_what_can_be_learned_of_a_permutation_is_the_flat_target():
    """The mean over permutations gives every other class the same probability: M4."""
    t, s = T.float(), S.float()
    whole, _ = whole_and_table()
    flat = target('M4').softmax(1)
    for name in ('M1', 'M2'):
        mean = ld.expected_target(name, t, s, whole, 'key').double().softmax(1)
        assert (mean - flat).abs().mean() < 0.01
        assert torch.allclose(confidence(mean.log()), confidence(flat.log()), atol=1e-5)
    exact = ld.expected_target('M6', t, s, whole, 'key')
    assert torch.equal(exact, target('M6').float())


# --------------------------------------------------------------------------------- objective


def test_the_mean_square_is_the_limit_of_the_divergence():
    t, z = T[:50], logits(50, seed=3)
    square = ld.distil_loss(z.float(), t.float(), kind='mse')
    hot = ld.distil_loss(z, t / 100, 100.0)
    assert torch.allclose(hot.float(), square, rtol=0.05, atol=1e-3)
    assert torch.allclose(square, ld.distil_loss(z.float() + 7, t.float(), kind='mse'), atol=1e-4)


def test_the_divergence_at_a_temperature():
    t, z = T[:50], logits(50, seed=3)
    p, q = (t / 5).softmax(1), (z / 5).softmax(1)
    assert torch.allclose(ld.distil_loss(z, t / 5, 5.0), 25 * (p * (p / q).log()).sum(1).float(), atol=1e-4)
    assert ld.distil_loss(t, t / 5, 5.0).abs().max() < 1e-5
    y = M[:50]
    assert torch.allclose(ld.distil_loss(z, ld.hard(t, y)), F.cross_entropy(z.float(), y, reduction='none'), atol=1e-5)


def test_squeezing_reaches_the_height_it_is_solved_for():
    for height, k in ((2.0, 10), (6.0, 10), (4.0, 100)):
        weight = ld.squeeze_weight(height, k)
        z = torch.zeros(1, k, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [z], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn='strong_wolfe'
        )

        def closure():
            optimiser.zero_grad()
            loss = F.cross_entropy(z, torch.tensor([0])) + weight * z.pow(2).sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        assert (z[0, 0] - z.mean()).item() == pytest.approx(height, rel=1e-3)


@pytest.mark.parametrize(
    'text,expected',
    (
        ('M4', ('M4', 1.0, 'kl', False)),
        ('M0/T5', ('M0', 5.0, 'kl', False)),
        ('M6/mse', ('M6', 1.0, 'mse', False)),
        ('M0/again', ('M0', 1.0, 'kl', True)),
    ),
)
def test_students_are_read(text, expected):
    assert ld.parse_student(text) == expected


@pytest.mark.parametrize('text', ('M20', 'M0/', 'M0/T', 'M0/T0', 'M0/Tx', 'M0/later', 'LSQ/mse', 'M19/T5', ''))
def test_unknown_students_are_refused(text):
    with pytest.raises(ValueError):
        ld.parse_student(text)


# ------------------------------------------------------------------------------------ theory


def test_the_best_scale_of_two_classes():
    """A share r wrong, all margins m: s m = log((1 - r) / r)."""
    for r, m in ((0.1, 2.0), (0.25, 0.5), (0.4, 3.0)):
        wrong = torch.arange(1000) < 1000 * r
        z = torch.stack((torch.where(wrong, -m, m), torch.zeros(1000)), 1).double()
        y = torch.zeros(1000, dtype=torch.int64)
        assert ld.best_scale(z, y) == pytest.approx(math.log((1 - r) / r) / m, rel=1e-4)
    assert ld.best_scale(T, M) == math.inf  # separable: no finite optimum
    assert ld.scale_bound(T, M) == math.inf


def test_the_bound_holds():
    loose = []
    for seed in range(60):
        k = (3, 10, 30)[seed % 3]
        z = logits(100, k, seed, spread=0.3 + seed / 10)
        y = torch.where(
            torch.rand(100, generator=torch.Generator().manual_seed(seed)) < 0.3, torch.arange(100) % k, z.argmax(1)
        )
        best, bound = ld.best_scale(z, y), ld.scale_bound(z, y)
        assert best <= bound
        loose.append(best / bound)
    assert max(loose) > 0.02  # not vacuous


class Linear(nn.Module):
    """Logits linear in the pixels of (N, 1, 8, 8)."""

    def __init__(self, k=10):
        super().__init__()
        self.fc = nn.Linear(64, k)

    def forward(self, x):
        return self.fc(x.flatten(1))


def exact_radius(model, x, y):
    """min_j (z_y - z_j) / |w_y - w_j|_1: the smallest perturbation, without clipping."""
    z, w = model(x).detach(), model.fc.weight.detach()
    size = (w[y][:, None] - w[None]).abs().sum(2)
    radius = (z.gather(1, y[:, None]) - z) / size.clamp(min=1e-12)
    return radius.scatter(1, y[:, None], math.inf).amin(1)


def test_the_linear_radius_is_exact_for_linear_logits():
    torch.manual_seed(0)
    model, x, y = Linear(), torch.rand(30, 1, 8, 8), torch.arange(30) % 10
    radius, gap, slope = ld.linear_radius(model, x, y)
    assert torch.allclose(radius, exact_radius(model, x, y), atol=1e-5)
    assert torch.allclose(radius, gap / slope)
    two, _, _ = ld.linear_radius(model, x, y, 'l2')
    w, z = model.fc.weight.detach(), model(x).detach()
    size = (w[y][:, None] - w[None]).norm(dim=2).clamp(min=1e-12)
    by_hand = ((z.gather(1, y[:, None]) - z) / size).scatter(1, y[:, None], math.inf).amin(1)
    assert torch.allclose(two, by_hand, atol=1e-5)


# ------------------------------------------------ the exact tier: robustness in closed form

EPS = 0.06


def digits(n, seed):
    """Ten classes of 64 pixels near 1/2, so that nothing is clipped: eight strong features
    per class pair, many weak ones that a perturbation of EPS can turn round."""
    g = torch.Generator().manual_seed(99)
    strong = 0.13 * torch.randn(10, 64, generator=g) * (torch.arange(64) < 20)
    weak = 0.035 * torch.randn(10, 64, generator=g).sign() * (torch.arange(64) >= 20)
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 10
    noise = torch.randn(n, 64, generator=g)
    x = 0.5 + (strong + weak)[y] + noise * torch.where(torch.arange(64) < 20, 0.09, 0.02)
    return x.clamp(0.1, 0.9).view(n, 1, 8, 8), y


def fit(loss, decay, steps=300):
    """A linear model at the minimum of a convex loss(model)."""
    torch.manual_seed(0)
    model = Linear()
    optimiser = torch.optim.LBFGS(
        model.parameters(),
        max_iter=steps,
        history_size=50,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn='strong_wolfe',
    )

    def closure():
        optimiser.zero_grad()
        value = loss(model) + decay * model.fc.weight.pow(2).sum()
        value.backward()
        return value

    optimiser.step(closure)
    return model.eval()


def worst_logits(model, x, y):
    """Each z_j raised by the most that a perturbation of EPS can gain on y: (N, K)."""
    w = model.fc.weight
    return model(x) + EPS * (w[y][:, None] - w[None]).abs().sum(2)


@pytest.fixture(scope='module')
def exact():
    x, y = digits(1500, 0)
    std = fit(lambda m: F.cross_entropy(m(x), y), 1e-3)
    at = fit(lambda m: F.cross_entropy(worst_logits(m, x, y), y), 1e-3)
    return x, y, std, at


def test_attacks_reach_the_exact_robust_accuracy(exact):
    x, y, std, at = exact
    x, y = digits(300, 1)
    args = common.parse(ld.make_parser(), ['--eps', str(EPS), '--targets', '9', '--restarts', '3'])
    for model in (std, at):
        truth = exact_radius(model, x, y) > EPS
        left = common.correct_under(model, x, y)
        for name, attack in ld.attacks_on_student(args, EPS, 0, torch.device('cpu')).items():
            held = common.correct_under(model, x, y, attack)
            assert not (truth & ~held).any(), name  # no attack beats the truth
            left = left & held
        assert left.float().mean() == pytest.approx(truth.float().mean().item(), abs=0.01)


def test_an_exact_student_keeps_the_robustness_and_a_manipulated_one_does_not(exact):
    x, y, std, at = exact
    x_test, y_test = digits(1000, 2)
    t, s = (m(x).detach() for m in (at, std))
    whole = ld.describe(t, s)
    table = ld.draw_table(whole, whole['m'], whole['odds'], generator())

    def robust(model):
        return (exact_radius(model, x_test, y_test) > EPS).float().mean().item()

    kept = {}
    for name in ('M0', 'M2', 'M4', 'M11', 'M17'):
        goal = ld.targets(name, t, s, whole, table, generator())
        student = fit(lambda m: ld.distil_loss(m(x), goal).mean(), 1e-9, 1000)
        kept[name] = (robust(student) - robust(std)) / (robust(at) - robust(std))
    assert robust(at) > robust(std) + 0.2
    assert kept['M0'] == pytest.approx(1.0, abs=0.1)  # a linear student realises its teacher
    assert kept['M17'] == pytest.approx(0.0, abs=0.1)  # scaling all logits changes no radius
    for name in ('M2', 'M4', 'M11'):  # no linear student has such logits
        assert kept[name] < 0.5, kept


def test_looks_of_simple_images():
    flat = torch.full((1, 3, 32, 32), 0.4)
    stripes = flat.clone()
    stripes[..., ::2] += 0.2
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    a, b, c = (ld.looks(v) for v in (flat, stripes, ramp))
    assert all(v.abs().max() < 1e-5 for k, v in a.items() if k != 'high frequencies')
    assert b['high frequencies'] > 0.99 and c['high frequencies'] < 0.1
    assert b['edges'].item() == pytest.approx(0.2, abs=1e-5)
    assert b['contrast'].item() == pytest.approx(0.1, abs=1e-3)
    assert {k: v.shape for k, v in ld.looks(flat[:0]).items()} == dict.fromkeys(a, (0,))


def test_holm():
    assert ld.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert ld.holm([0.9, 0.8]) == [1.0, 1.0]


# ----------------------------------------------------------------------------------- the study

TINY = (
    '--arch lenet5 --train-size 100 --epochs 1 --batch-size 50 --test-size 20 --amp fp32 --distil-epochs 3 '
    '--logit-images 100 --apgd-steps 3 --margin-steps 3 --square-queries 5 --targets 1'
).split()
SOME = ['M0', 'M0/mse', 'M0/again', *(n for n in ld.NAMES if n != 'M0')]


@pytest.fixture(autouse=True, scope='module')
def short_curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, 'EPS_MULTIPLES', (0, 1, 8))
        yield


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A tiny study with every manipulation: its folder, results, claims and output folder."""
    out = tmp_path_factory.mktemp('logit_distill')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ld, 'REDRAWS', 3)
        args = common.parse(ld.make_parser(), [*TINY, '--students', *SOME, '--out', str(out)])
        folder, results = ld.study(args)
        ld.print_table(results)
        ld.draw(results, folder)
        return folder, results, ld.judge(results, folder), out


def test_a_tiny_study_leaves_everything(finished):
    folder, results, claims, out = finished
    figures = {p.stem for p in folder.glob('*.png')}
    assert figures == {
        f'fig{i}_{n}'
        for i, n in enumerate(
            (
                'logits',
                'theory',
                'disagreement',
                'gallery',
                'targets',
                'students',
                'lengths',
                'classes',
                'eps',
                'learned',
            ),
            1,
        )
    }
    text = ' '.join(c['claim'] for c in claims)
    for number in range(17):
        assert f'V{number} ' in text, number
    # 6 networks; students, and those of the two shorter lengths (1 epoch, as 3 / 9 rounds up)
    shorter = len(results['lengths']) - 1
    assert len(list((out / 'models').glob('*student*'))) == len(SOME) + 4 * shorter
    assert len(list((out / 'models').glob('*.pt'))) == 6 + len(SOME) + 4 * shorter
    assert ld.judge(json.loads((folder / 'results.json').read_text()), folder) == claims


def test_nothing_is_measured_twice(finished, monkeypatch):
    _, results, _, out = finished
    monkeypatch.setattr(ld, 'evaluate', None)
    monkeypatch.setattr(ld, 'measure_logits', None)
    args = common.parse(ld.make_parser(), [*TINY, '--students', *SOME, '--out', str(out)])
    assert ld.study(args)[1]['student-M0-e3-s0'] == results['student-M0-e3-s0']


def test_a_finished_run_is_redrawn(finished):
    folder = finished[0]
    (folder / 'fig6_students.png').unlink()
    ld.main(['--plot-only', str(folder)])
    assert (folder / 'fig6_students.png').exists()


def test_students_share_their_seed_and_differ_in_their_targets(finished):
    rows = {}
    for line in (finished[0] / 'metrics.csv').read_text().splitlines()[1:]:
        cells = line.split(',')
        rows.setdefault(cells[0], []).append(cells)
    assert rows['student-M0'][0][1] == rows['student-M4'][0][1] == '1000'
    assert rows['student-M0-again'][0][1] == '2000'
    losses = {k: v[-1][5] for k, v in rows.items() if k.startswith('student')}
    assert len(set(losses.values())) > 0.8 * len(losses)


def test_teachers_are_left_alone_and_see_the_same_view(tmp_path, monkeypatch):
    """With augmentation the targets are computed from the very batch the student sees."""
    args = common.parse(ld.make_parser(), [*TINY, '--out', str(tmp_path), '--pad', '2'])
    data = common.load_data('shapes', train_size=200, test_size=40, pad=2)
    device = torch.device('cpu')
    networks = ld.train_networks(args, data, 0, device, [])
    lesson = ld.make_lesson(args, data, data.test, networks, 0, device)
    assert not lesson['fixed']
    before = {k: v.clone() for k, v in lesson['AT'].state_dict().items()}
    seen, taught = [], []
    lesson['AT'].register_forward_hook(lambda m, x, z: taught.append(x[0].clone()))
    build = common.make_model

    def watched(*a, **k):
        model = build(*a, **k)
        model.register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()) if m.training else None)
        return model

    monkeypatch.setattr(common.train_model, '__kwdefaults__', common.train_model.__kwdefaults__ | dict(build=watched))
    ld.distil(args, data, lesson, 'M0', 1, 0, device)
    assert len(seen) == len(taught) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen, taught))
    assert not lesson['AT'].training
    assert all(torch.equal(v, before[k]) for k, v in lesson['AT'].state_dict().items())


def test_wrong_answers_of_the_teacher_can_be_left_out(tmp_path):
    data = common.load_data('shapes', train_size=200, test_size=40)
    device = torch.device('cpu')
    folder = ['--out', str(tmp_path)]
    found = []
    for flags in ([], ['--teacher-wrong', 'drop']):
        args = common.parse(ld.make_parser(), [*TINY, *folder, *flags])
        networks = ld.train_networks(args, data, 0, device, [])
        lesson = ld.make_lesson(args, data, data.test, networks, 0, device)
        found.append(ld.distil(args, data, lesson, 'M0', 1, 0, device)['history'][-1]['loss'])
    assert found[0] != found[1]  # an untrained teacher is mostly wrong


# --------------------------------------------------------------------------------- verdicts


def synthetic(results, robust):
    """The results with other worst-case accuracies: {name: share at the radius of claims}."""
    out = json.loads(json.dumps(results))
    n = len(out['test_labels'])
    names = {'STD net': 'network-STD-s0', 'AT net': 'network-AT-s0'}
    for key in list(out):
        if not key.startswith(('student-', 'network-')):
            continue
        name = next((k for k, v in names.items() if v == key), key.split('-')[1])
        share = robust.get(name, 0.3)
        run = out[key]
        hit = (np.arange(400) < 400 * share).astype(np.uint8)
        run['natural'] = common.pack(np.ones(400, np.uint8))
        run['worst'] = [common.pack(hit), common.pack(hit)]
        run['collapsed'] = False
        if 'masking' in run:
            run['masking'] = {k: (0.0, v[1], False) for k, v in run['masking'].items()}
            run['eps_curve'] = sorted(run['eps_curve'], reverse=True)
        if 'learned' in run:
            run['confidence'] = run['target_confidence']
            run['learned'] = {k: (v[1], v[1]) for k, v in run['learned'].items()}
            run['kl'] = 0.1 * run['constant_kl']
        elif 'LSQ' in key:
            run['measures']['centred'] = common.unpack(out['logits-s0']['AT']['centred']).astype(float).mean()
    out['test_labels'] = (out['test_labels'] * math.ceil(400 / n))[:400]
    out['collapsed-s0'] = []
    return out


def verdict(claims, start):
    found = [c['verdict'] for c in claims if c['claim'].startswith(start)]
    assert found, start
    return found[0]


TEACHERS = {'STD net': 0.05, 'AT net': 0.85}


@pytest.mark.parametrize(
    'robust,expected',
    (
        (
            dict(
                M0=0.65,
                M1=0.1,
                M2=0.1,
                M4=0.1,
                M11=0.1,
                M12=0.1,
                M16=0.06,
                M17=0.06,
                M7=0.1,
                M8=0.4,
                M6=0.1,
                M5=0.3,
                K2=0.4,
                K3=0.5,
                K5=0.6,
                M15=0.1,
                LSQ=0.06,
            ),
            'supported',
        ),
        (
            dict(
                M0=0.55,
                M1=0.65,
                M2=0.65,
                M4=0.65,
                M11=0.65,
                M12=0.65,
                M16=0.6,
                M17=0.6,
                M7=0.65,
                M8=0.3,
                M6=0.6,
                M5=0.5,
                K2=0.4,
                K3=0.3,
                K5=0.2,
                M15=0.6,
                LSQ=0.6,
            ),
            'contradicted',
        ),
    ),
)
def test_verdicts_on_students(finished, tmp_path, robust, expected):
    claims = ld.judge(synthetic(finished[1], TEACHERS | robust), tmp_path)
    assert verdict(claims, 'V9 ') == 'supported' and verdict(claims, 'V0 ') == 'supported'
    for start in (
        'V10 Small logits alone are not enough: label smoothing',
        "V10 Small logits alone are not enough: STD's",
        'V10 Small logits alone are not enough: logit squeezing',
        'V11 Sample-wise confidence matters: made constant',
        'V11 Sample-wise confidence matters: shuffled',
        'V12 Information on incorrect classes matters: permuted at every',
        'V12 Information on incorrect classes matters: permuted once',
        'V12 Information on incorrect classes matters: made equal',
        'V12 It is essential',
        'V13 The order of',
        'V14 The distributions are complex, summaries do not do: class means',
    ):
        assert verdict(claims, start) == expected, start
    if expected == 'supported':
        assert verdict(claims, 'V15') == 'supported'
    else:
        assert verdict(claims, 'V15') != 'supported'


def test_small_differences_between_students_are_inconclusive(finished, tmp_path):
    claims = ld.judge(synthetic(finished[1], TEACHERS | dict(M0=0.5, M4=0.40)), tmp_path)
    assert verdict(claims, 'V12 Information on incorrect classes matters: made equal') == 'inconclusive'


@pytest.mark.slow
def test_a_student_that_did_not_learn_its_target_has_no_verdict(finished, tmp_path):
    results = synthetic(finished[1], TEACHERS | dict(M0=0.65, M4=0.1))
    results['student-M4-e3-s0']['confidence'] *= 0.8
    claims = ld.judge(results, tmp_path)
    assert 'invalid, M4 fails V0' in verdict(claims, 'V12 Information on incorrect classes matters: made equal')
    assert verdict(claims, 'V0 ') == 'contradicted'
    assert verdict(claims, 'V12 Information on incorrect classes matters: permuted once') == 'supported'
    results = synthetic(finished[1], TEACHERS | dict(M0=0.65, M11=0.1))
    first = next(iter(results['student-M0-e3-s0']['masking']))
    results['student-M0-e3-s0']['masking'][first] = (0.5, 0.1, True)
    assert 'invalid, M0' in verdict(ld.judge(results, tmp_path), 'V11 ')
    results = synthetic(finished[1], TEACHERS | dict(M0=0.65, M11=0.1))
    results['network-AT-s0']['eps_curve'][1:3] = [0.2, 0.6]
    assert 'invalid, AT net' in verdict(ld.judge(results, tmp_path), 'V11 ')
    results = synthetic(finished[1], TEACHERS | dict(M0=0.65, LSQ=0.1))
    results['student-LSQ-e3-s0']['measures']['centred'] *= 1.5
    results['student-M6-e3-s0']['kl'] = 0.5 * results['student-M6-e3-s0']['constant_kl']
    claims = ld.judge(results, tmp_path)
    assert 'invalid, LSQ' in verdict(claims, 'V10 Small logits alone are not enough: logit sq')
    assert 'invalid, M6' in verdict(claims, 'V13 The order of')


def test_a_growing_student_contradicts_nothing(finished, tmp_path):
    results = synthetic(finished[1], TEACHERS | dict(M0=0.55, M4=0.65, M11=0.1))
    row = 'V12 Information on incorrect classes matters: made equal'
    assert verdict(ld.judge(results, tmp_path), row) == 'contradicted'
    first = results['lengths'][0]
    results[f'student-M0-e{first}-s0']['worst'] = [common.pack((np.arange(400) < 100).astype(np.uint8))] * 2
    claims = ld.judge(results, tmp_path)
    assert 'has not converged' in verdict(claims, row)
    assert verdict(claims, 'Control: the distillation has converged') == 'contradicted'
    assert verdict(claims, 'V11 ') == 'supported'


def test_intervals_hold_what_images_and_retraining_change(finished):
    results = synthetic(finished[1], TEACHERS | dict(M0=0.5, M4=0.5, M11=0.0))
    accuracy, kept = ld.sampler(results, 0)
    value, low, high = ld.interval(accuracy('AT net'))
    assert (high - low) / 2 == pytest.approx(1.96 * (0.85 * 0.15 / 400) ** 0.5, rel=0.1)
    value, low, high = ld.interval(accuracy('M0'))
    variance = 0.25 / 400 + 0.25 * sum(v**2 for v in ld.RETRAINED.values())
    assert (high - low) / 2 == pytest.approx(1.96 * variance**0.5, rel=0.1)
    # the same images and the same luck: only each student's own noise is left
    value, low, high = ld.interval(accuracy('M0') - accuracy('M4'))
    own = 1.96 * 0.5 * 2**0.5 * ld.RETRAINED['each']
    assert (high - low) / 2 == pytest.approx(own, rel=0.1)
    value, low, high = ld.interval(accuracy('M11'))
    assert value == 0 and high > low  # none of 400 is not for certain none
    assert ld.interval(kept('M0'))[0] == pytest.approx((0.5 - 0.05) / 0.8, abs=0.01)


def test_nothing_follows_from_a_student_that_keeps_nothing(finished, tmp_path):
    claims = ld.judge(synthetic(finished[1], TEACHERS | dict(M0=0.06, M4=0.05)), tmp_path)
    assert verdict(claims, 'V9 ') == 'contradicted'
    assert 'M0 itself keeps less' in verdict(claims, 'V12 Information')
    claims = ld.judge(synthetic(finished[1], {'STD net': 0.3, 'AT net': 0.31, 'M0': 0.3}), tmp_path)
    assert 'not more robust' in verdict(claims, 'V9 ')


def test_differences_of_natural_accuracy_ask_for_a_second_look(finished, tmp_path):
    """M4 errs on the very images that M0 is robust on: on the others nothing is lost."""
    results = synthetic(finished[1], TEACHERS | dict(M0=0.65, M4=0.1))
    run = results['student-M4-e3-s0']
    right = np.ones(400, np.uint8)
    right[40:260] = 0
    run['natural'] = common.pack(right)
    claims = ld.judge(results, tmp_path)
    row = next(c for c in claims if c['claim'].startswith('V12 Information on incorrect classes matters: made equal'))
    assert row['verdict'] == 'inconclusive' and 'on the 180 images' in row['measured']
    assert verdict(claims, 'V16') == 'contradicted'


def with_logits(results, scale, other=None):
    """The results with AT's measures `scale` times those of STD."""
    out = json.loads(json.dumps(results))
    rng = np.random.default_rng(0)
    base = dict(largest=rng.normal(10, 1, 300), gap=rng.normal(6, 1, 300))
    base |= dict(centred=base['largest'] + 0.1, odds=base['gap'] - 1)
    out['collapsed-s0'] = []
    factor = {'STD': 1, "STD'": 1, 'AT': scale, "AT'": scale}
    rungs = [k for k in out['logits-s0'] if k not in factor]
    factor |= {k: 1 + (scale - 1) * (i + 1) / 3 for i, k in enumerate(rungs)}
    for name, f in factor.items():
        run = out['logits-s0'][name]
        for key, v in base.items():
            if key == 'odds' and other and name.startswith('AT'):
                v = other(v)
            run[key] = common.pack((f * v).astype(np.float16))
        run['correct'] = common.pack(np.ones(300, np.uint8))
        run['profile'] = (f * np.linspace(9, -9, 10)).tolist()
        run['gap_errors'] = [0.05] * 9
    return out


def test_verdicts_on_logits(finished, tmp_path):
    claims = ld.judge(with_logits(finished[1], 0.6), tmp_path)
    for start in ('V1 AT lowers', 'V1 The same, minus', 'V1 The same, on', 'V2 AT', 'V2 The', 'V2 Every', 'V3'):
        assert verdict(claims, start) == 'supported', start
    assert verdict(claims, 'V6') == 'contradicted'  # the same ranks
    claims = ld.judge(with_logits(finished[1], 1.5, lambda v: v[::-1].copy()), tmp_path)
    for start in ('V1 AT lowers', 'V2 AT', 'V2 Every', 'V3'):
        assert verdict(claims, start) == 'contradicted', start
    assert verdict(claims, 'V6') == verdict(claims, 'V7') == 'supported'  # other ranks


def test_verdicts_on_the_scale(finished, tmp_path):
    results = json.loads(json.dumps(finished[1]))
    results['collapsed-s0'] = []
    scales = results['theory-s0']
    for name, kind, value in (('AT', 'attacked', 1.05), ('STD', 'natural', None), ('STD', 'attacked', 0.1)):
        scales[name]['scales'][kind] |= dict(best=value, interval=[0.9 * (value or 1), 1.1 * (value or 1)])
    claims = ld.judge(results, tmp_path)
    starts = ('V4 AT', 'V4 STD', 'V4 and')
    assert [verdict(claims, s) for s in starts] == ['supported'] * 3
    for name, kind, value in (('AT', 'attacked', 2.0), ('STD', 'natural', 0.9), ('STD', 'attacked', 0.9)):
        scales[name]['scales'][kind] |= dict(best=value, interval=[0.9 * value, 1.1 * value])
    claims = ld.judge(results, tmp_path)
    assert [verdict(claims, s) for s in starts] == ['contradicted'] * 3
    for name in ('AT', 'STD'):
        scales[name]['scales']['attacked']['interval'] = [0.4, 1.1]
    claims = ld.judge(results, tmp_path)
    assert verdict(claims, 'V4 AT') == verdict(claims, 'V4 and') == 'inconclusive'


@pytest.mark.parametrize('students', (['M4', 'M5', 'K2', 'K3'], ['M0/mse'], ['LSQ'], ['M0']))
def test_any_choice_of_students_is_drawn_and_judged(finished, tmp_path, students):
    results = json.loads(json.dumps(finished[1]))
    results['config']['students'] = students
    for key in list(results):
        if key.startswith('student-') and key.split('-')[1] not in students:
            del results[key]
    results['example-s0']['targets'] = {k: v for k, v in results['example-s0']['targets'].items() if k in students}
    common.start_log()
    ld.print_table(results)
    ld.draw(results, tmp_path)
    claims = ld.judge(results, tmp_path)
    assert verdict(claims, 'V0 ') and (tmp_path / 'fig6_students.png').exists()


@pytest.mark.slow
def test_a_hundred_classes_and_grey_images():
    t, s = logits(300, 100), logits(300, 100, 1)
    for name in ld.NAMES:
        if name != 'LSQ':
            assert target(name, t=t, s=s).shape == t.shape
    whole, _ = whole_and_table(t, s)
    out = ld.expected_target('M12', t.float(), s.float(), whole, 'key')
    assert torch.isfinite(out).all()
    assert all(v.shape == (5,) for v in ld.looks(torch.rand(5, 1, 28, 28)).values())


def test_worst_cases_shrink_with_the_radius(finished):
    for key, run in finished[1].items():
        if key.startswith(('student-', 'network-')):
            assert ('masking' in run) == ('-e1-' not in key)
            natural, half, full = (common.unpack(v) for v in (run['natural'], *run['worst']))
            assert (full <= half).all() and (half <= natural).all()
