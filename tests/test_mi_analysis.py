"""mi_analysis.py: estimators against closed forms, transforms, and the script end to end.

The numbers (1) to (16) are those of the estimators' known answers; nats where it says so.
"""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import mi_analysis as mi

LN2 = math.log(2)


def points(n, d, seed=0, std=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(n, d, generator=generator, dtype=dtype)


def kde(t, y=None, variance=0.1, classes=None, **options):
    """{'lower': ..., 'upper': ..., 'lower_y', 'upper_y', ...} in nats."""
    y = torch.zeros(len(t), dtype=torch.long) if y is None else y
    k = mi.kde_terms(t, y[None], classes or int(y.max()) + 1, (variance,), **options)
    out = {}
    for bound in ('lower', 'upper'):
        x, given = k[bound][0].mean(), k[bound + '_given'][0, 0].mean()
        out |= {bound: x.item() * LN2, bound + '_y': (x - given).item() * LN2, bound + '_given': given.item() * LN2}
    return out


def binned(t, y=None, width=0.5):
    """(I(T;X), I(T;Y)) in nats."""
    y = torch.zeros(len(t), dtype=torch.long) if y is None else y
    x, given = mi.bin_terms(mi.cell_keys(t, width), y[None])
    return x.mean().item() * LN2, (x - given[0]).mean().item() * LN2


def direct(t, y, variance=0.1):
    """The bounds by whole distance matrices in float64, as their formulas stand: nats."""
    t = t.double()
    d = t.shape[1]
    out = {}

    def bound(u, c):  # entropy of the mixture
        s = torch.cdist(u, u, compute_mode='donot_use_mm_for_euclid_dist').square()
        kernel = torch.logsumexp(-s / (c * variance), 1) - math.log(len(u))
        return d / 2 + d / 2 * math.log(2 * math.pi * variance) - kernel.mean().item()

    noise = d / 2 * (math.log(2 * math.pi * variance) + 1)
    for name, c in (('upper', 2), ('lower', 8)):
        whole = bound(t, c)
        parts = sum((y == k).double().mean().item() * bound(t[y == k], c) for k in y.unique())
        out |= {name: whole - noise, name + '_y': whole - parts}
    return out


def label_entropy(y):
    return mi.entropy(y.bincount().tolist()) * LN2


# ------------------------------------------------------------------------- (1) to (3): clusters


def test_1_equal_rows_know_nothing():
    t, y = torch.full((60, 7), 3.2), torch.arange(60) % 3
    found = kde(t, y)
    assert all(abs(v) < 1e-12 for v in found.values())
    assert binned(t, y) == (0, 0)


def test_2_distant_rows_know_everything_even_random_labels():
    t = 100 * torch.arange(800.0)[:, None]
    y = torch.from_numpy(np.random.default_rng(0).integers(10, size=800))
    found = kde(t, y)
    for bound in ('lower', 'upper'):
        assert found[bound] == pytest.approx(math.log(800), abs=1e-12) == 6.684611727667927
        assert found[bound + '_y'] == pytest.approx(label_entropy(y), abs=1e-12)
    assert binned(t, y) == pytest.approx((math.log(800), label_entropy(y)), abs=1e-12)


def test_3_clusters_that_are_the_classes_and_clusters_that_are_not():
    y = torch.arange(90) % 3
    t = 1000.0 * y[:, None].double()
    found = kde(t, y)
    for value in (*binned(t, y), *(found[k] for k in ('lower', 'upper', 'lower_y', 'upper_y'))):
        assert value == pytest.approx(math.log(3), abs=1e-12)
    other = torch.arange(90) // 3 % 3  # every cluster holds every class equally often
    found = kde(1000.0 * other[:, None].double(), y)
    assert found['lower_y'] == pytest.approx(0, abs=1e-12)
    assert found['upper_y'] == pytest.approx(0, abs=1e-12)
    assert found['lower'] == pytest.approx(math.log(3), abs=1e-12)


# ------------------------------------------------------------------ (4) to (6): known channels


@pytest.mark.parametrize(
    'r,lower,truth,upper',
    (
        (0.25, 0.015503, 0.030311, 0.060548),
        (1, 0.060548, 0.111421, 0.219070),
        (4, 0.219070, 0.336831, 0.566219),
        (16, 0.566219, 0.632720, 0.692812),
    ),
)
def test_4_two_points_bracket_the_binary_channel(r, lower, truth, upper):
    t = torch.tensor([[0.0], [math.sqrt(r * 0.1)]], dtype=torch.float64)
    found = kde(t)
    assert found['lower'] == pytest.approx(lower, abs=1e-6)
    assert found['upper'] == pytest.approx(upper, abs=1e-6)
    assert found['upper'] == pytest.approx(LN2 - math.log1p(math.exp(-r / 2)), abs=1e-12)
    assert found['lower'] == pytest.approx(LN2 - math.log1p(math.exp(-r / 8)), abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    # the same two points many times over: the same mixture, many draws at once
    terms = mi.monte_carlo(t.repeat(500, 1), torch.zeros(1000, dtype=torch.long), 0.1, 60, generator)
    assert terms[0].mean().item() * LN2 == pytest.approx(truth, abs=4e-3)
    assert abs(terms[1].mean().item()) < 1e-12  # one class: nothing to learn


@pytest.mark.parametrize('d,r,tolerance', ((1, 1, 0.03), (1, 9, 0.03), (2, 4, 0.03), (5, 3, 0.1)))
def test_5_gaussian_source_reaches_its_limits(d, r, tolerance):
    found = kde(points(6000, d, std=math.sqrt(0.1 * r)))
    truth = d / 2 * math.log(1 + r)
    assert found['upper'] == pytest.approx(d / 2 * (math.log(1 + r) + r / (1 + r)), abs=tolerance)
    assert found['lower'] == pytest.approx(d / 2 * (math.log(1 + r / 4) + r / 4 / (1 + r / 4)), abs=0.03)
    assert found['lower'] < truth < found['upper']


def test_5_a_wide_source_in_many_dimensions_saturates():
    found = kde(points(6000, 10, std=1.0))
    assert found['lower'] <= found['upper'] <= math.log(6000) < 5 * math.log(11)


@pytest.mark.parametrize('d,std', ((10, 0.5), (3, 1.0), (1, 0.3)))
def test_6_lower_referee_upper_ceiling(d, std):
    t = points(2000, d, std=std)
    y = torch.arange(2000) % 10
    found = kde(t, y)
    generator = torch.Generator().manual_seed(1)
    terms = mi.monte_carlo(t, y, 0.1, 3, generator) * LN2
    x, label = terms.mean(1).tolist()
    error = 4 * (terms.std(1) / terms.shape[1] ** 0.5).max().item()
    assert 0 <= found['lower'] <= x + error and x - error <= found['upper'] <= math.log(2000)
    assert error / 4 < 0.05
    for name in ('lower_y', 'upper_y'):
        assert found[name] <= math.log(10) + 1e-12
    # the valid bracket of I(T;Y)
    assert found['lower'] - found['upper_given'] - error <= label
    assert label <= found['upper'] - found['lower_given'] + error
    if d == 10:
        assert (found['lower'], x, found['upper']) == pytest.approx((4.25, 5.64, 7.39), abs=0.15)


# ---------------------------------------------------------------- (7) to (9): invariances, limits


def test_7_invariances():
    t, y = points(300, 6, std=0.4), torch.arange(300) % 5
    plain = kde(t, y)
    turn = torch.linalg.qr(points(6, 6, 3))[0]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for other, labels in ((t @ turn, y), (t + 5, y), (t[order], y[order])):
        assert kde(other, labels) == pytest.approx(plain, abs=1e-9)
    assert kde(torch.cat((t, t)), torch.cat((y, y))) == pytest.approx(plain, abs=1e-12)
    assert kde(3 * t, y, variance=0.9) == pytest.approx(plain, abs=1e-12)


def test_8_data_processing():
    t, y = points(400, 8, std=0.5), torch.arange(400) % 4
    found, flat = kde(t, y), kde(F.relu(t), y)
    shadow = kde(t[:, :3], y)
    for bound in ('lower', 'upper'):
        assert flat[bound] <= found[bound] and shadow[bound] <= found[bound]
        assert kde(2 * t, y)[bound] > found[bound]  # a gain can
    cells = (t / 0.5).floor()
    for function in (lambda c: c.abs(), lambda c: c.sum(1, keepdim=True), lambda c: c * 0):
        coarse = binned(0.5 * function(cells) + 0.25, y)
        assert all(a <= b + 1e-12 for a, b in zip(coarse, binned(t, y)))


def test_9_small_and_large_noise():
    t = torch.cat((points(50, 4), points(50, 4)[:20]))  # twenty rows twice
    rows = mi.entropy([2] * 20 + [1] * 30) * LN2
    assert kde(t, variance=1e-6)['lower'] == pytest.approx(rows, abs=1e-9)
    assert binned(t, width=1e-7)[0] == pytest.approx(rows, abs=1e-9)
    assert kde(t, variance=1e9)['upper'] == pytest.approx(0, abs=1e-7)
    curve = mi.kde_terms(t, torch.zeros(1, 70, dtype=torch.long), 1, mi.CURVE)
    for bound in ('lower', 'upper'):
        assert (curve[bound].mean(1).diff() <= 0).all()
        alone = kde(t, variance=mi.CURVE[2])[bound]
        assert curve[bound][2].mean().item() * LN2 == pytest.approx(alone, abs=1e-12)


# ------------------------------------------------------------- (10) to (14): ceilings, precision


@pytest.mark.parametrize(
    'size,repeats,pool,bits', ((500, 10, 10000, 11.87), (2500, 2, 10000, 12.04), (750, 6, 8000, 11.70))
)
def test_10_overlapping_samples_lower_the_ceiling(size, repeats, pool, bits):
    dataset = {500: 'cifar10', 2500: 'mnist', 750: 'stl10'}[size]
    args = type('Args', (), dict(as_published=True, dataset=dataset, arch='lenet5'))
    data = type('Data', (), dict(classes=range(10), test=(None, torch.zeros(pool))))
    setting = mi.Setting(args, data)
    samples = [setting.sample('test', i) for i in range(5)]
    assert {len(index) for index in samples} == {size * repeats} == {setting.n}
    entropies = [mi.entropy(np.unique(i, return_counts=True)[1]) for i in samples]
    assert np.mean(entropies) == pytest.approx(bits, abs=0.02)
    assert not torch.equal(samples[0], samples[1])


def test_11_entropies_of_separated_outputs():
    for d, bits in ((16384, 6338.667), (8192, 3175.477), (10, 16.149)):
        assert mi.noise_entropy(d) + math.log2(5000) == pytest.approx(bits, abs=1e-3)
    t, y = 100 * torch.arange(40.0)[:, None].expand(-1, 3), torch.arange(40) % 4
    found = mi.layer_information(t, y.expand(4, -1), 4, mi.replicate_weights(40))
    assert found['entropy'][0] == pytest.approx(mi.noise_entropy(3) + math.log2(40), abs=1e-9)
    assert found['entropy'][1:] == pytest.approx([mi.noise_entropy(3) + math.log2(10)] * 4)
    assert found['certified'] and found['bracket'] == pytest.approx([2, 2])


def test_12_float32_with_an_offset_is_exact_and_the_raw_diagonal_is_not():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(150, 16384, generator=generator)
    near = base + 0.004 * torch.randn(base.shape, generator=generator)
    t, y = torch.cat((base, near)) + 3, torch.arange(300) % 10
    exact, fast, raw = direct(t, y), kde(t, y), kde(t, y, raw=True)
    assert 5.0 < exact['lower'] < math.log(300) - 0.1  # the pairs of neighbours show
    for name in exact:
        assert fast[name] == pytest.approx(exact[name], abs=1e-6)
    assert max(abs(raw[name] - exact[name]) / LN2 for name in exact) > 1e-3


@pytest.mark.parametrize(
    'n,d,std,dtype', ((700, 3, 0.3, torch.float64), (500, 900, 0.02, torch.float32), (500, 900, 0.3, torch.float32))
)
def test_13_tiles_equal_the_direct_way(n, d, std, dtype):
    t, y = points(n, d, std=std, dtype=dtype), torch.arange(n) % 7
    labels = torch.stack((y, y.flip(0)))
    sums = mi.kernel_sums(t, F.one_hot(y), (0.2, 0.8), tile=128)
    whole = mi.kernel_sums(t, F.one_hot(y), (0.2, 0.8), tile=4096)
    s = torch.cdist(t.double(), t.double(), compute_mode='donot_use_mm_for_euclid_dist') ** 2
    assert torch.allclose(sums[0], whole[0], rtol=1e-9)
    assert torch.allclose(sums[1], whole[1], rtol=1e-3)
    assert torch.allclose(sums[1], s.fill_diagonal_(math.inf).amin(1), rtol=1e-3)
    # as few dimensions as will do
    early = mi.kernel_sums(t, F.one_hot(y), (0.2, 0.8), tile=128, whole=False, chunk=64)
    assert torch.allclose(early[0], whole[0], rtol=1e-9)
    assert (early[1] >= torch.minimum(whole[1], torch.tensor(mi.NEGLIGIBLE * 0.8)) - 1e-3).all()
    expected = direct(t, y)
    assert kde(t, y) == pytest.approx(
        expected | {k: kde(t, y)[k] for k in ('lower_given', 'upper_given')},
        abs=1e-10 if dtype == torch.float64 else 1e-7,
    )
    both = mi.kde_terms(t, labels, 7)
    assert torch.allclose(both['lower_given'][0, 1], mi.kde_terms(t, labels[1:], 7)['lower_given'][0, 0], atol=1e-9)


def test_13_hashed_cells_are_the_cells():
    t, y = points(3000, 40, std=0.16, dtype=torch.float32), torch.arange(3000) % 10
    t[:1000] = t[1000:2000]
    cells = np.ascontiguousarray((t / 0.5).floor().int().numpy())
    _, inverse, counts = np.unique(cells.view('V160'), return_inverse=True, return_counts=True)
    expected = np.log(3000) - (counts * np.log(counts)).sum() / 3000
    assert binned(t)[0] == pytest.approx(expected, abs=1e-12)
    given = 0
    for k in range(10):
        counts = np.unique(inverse.ravel()[y == k], return_counts=True)[1]
        given += 0.1 * (np.log(300) - (counts * np.log(counts)).sum() / 300)
    assert binned(t, y)[1] == pytest.approx(expected - given, abs=1e-12)


def test_14_cells_by_hand():
    t = torch.tensor([[0.1], [0.4], [0.6], [-0.1]])
    assert binned(t)[0] == pytest.approx(1.0397, abs=1e-4)
    assert binned(t)[0] == pytest.approx(1.5 * LN2, abs=1e-12)
    assert binned(torch.tensor([[0.0], [-0.0]]))[0] == 0
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match='NaN or infinity'):
            mi.cell_keys(torch.tensor([[0.0], [bad]]))


# ------------------------------------------------------------------ (15), (16): images and attack


def test_15_saturation():
    x = torch.linspace(0, 1, 101).view(1, 1, 1, -1)
    assert torch.allclose(common.saturate(x, 2), x, atol=1e-6)
    strong = common.saturate(torch.tensor([0.25, 0.5, 0.75]), 1024)
    assert strong == pytest.approx([0.0007, 0.5, 0.9993], abs=1e-4)
    assert (common.saturate(x, 8).diff() >= 0).all()


@pytest.mark.parametrize('k', (0, 2, 4, 8))
def test_15_patch_shuffle_keeps_the_patches(k):
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shuffled = mi.shuffle_patches(x, k, torch.Generator().manual_seed(1))
    assert shuffled.shape == x.shape
    assert torch.equal(shuffled, x) == (k == 0)
    k = k or 1

    def patches(image):
        side = 32 // k
        cut = image.unfold(1, side, side).unfold(2, side, side)  # (3, k, k, side, side)
        return sorted(map(tuple, cut.permute(1, 2, 0, 3, 4).reshape(k * k, -1).tolist()))

    for a, b in zip(x, shuffled):
        assert patches(a) == patches(b)


def test_15_permutations_are_uniform_and_differ_between_images():
    x = torch.arange(4.0).view(1, 1, 2, 2).expand(2400, 1, 2, 2)
    shuffled = mi.shuffle_patches(x, 2, torch.Generator().manual_seed(0)).flatten(1)
    _, counts = shuffled.unique(dim=0, return_counts=True)
    assert len(counts) == 24 and 60 < counts.min() and counts.max() < 140


@pytest.fixture(scope='module')
def tiny_setting():
    args = mi.common.parse(mi.make_parser(), ['--test-size', '40', '--train-size', '60'])
    args.test_step_size = args.eps / 4
    data = common.load_data('shapes', train_size=60, test_size=40)
    return mi.Setting(args, data)


def test_16_the_attack_stays_in_its_ball_and_raises_the_loss(tiny_setting):
    model = common.make_model('small-cnn', 10, (3, 32, 32), 0)
    x, y = tiny_setting.images(tiny_setting.sample())
    x_adv = tiny_setting.attack(model, x, y)
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    with common.frozen(model), torch.no_grad():
        assert F.cross_entropy(model(x_adv), y) > F.cross_entropy(model(x), y)


# -------------------------------------------------------------------------- layers and networks


@pytest.mark.parametrize(
    'arch,shape,sizes',
    (
        ('lenet5', (1, 28, 28), (3456, 1024, 120, 84, 10)),
        ('wrn-10-1', (3, 32, 32), (16384, 16384, 16384, 8192, 10)),
        ('wrn-10-1', (3, 96, 96), (147456, 147456, 147456, 73728, 10)),
        ('small-cnn', (3, 32, 32), (8192, 8192, 4096, 2048, 10)),
        ('resnet18', (3, 32, 32), (65536, 32768, 16384, 8192, 10)),
        ('preact-resnet18', (3, 32, 32), (65536, 32768, 16384, 8192, 10)),
    ),
)
def test_hooked_layers_have_the_papers_sizes(arch, shape, sizes):
    model = mi.build(arch, 10, shape, 0)
    x = torch.rand(3, *shape)
    taken = list(mi.activations(model, x, mi.layers_of(arch, False), 2))
    assert [t.shape for _, t in taken] == [(3, d) for d in sizes]
    with common.frozen(model), torch.no_grad():
        assert torch.allclose(taken[-1][1], model(x), atol=1e-5)
    assert not any(m._forward_hooks for m in model.modules())


def test_activations_are_taken_before_or_after_the_relu_and_in_parts(monkeypatch):
    model, x = mi.build('lenet5', 10, (1, 28, 28), 0), torch.rand(7, 1, 28, 28)
    after = dict(mi.activations(model, x, mi.layers_of('lenet5', False), 3))
    before = dict(mi.activations(model, x, mi.layers_of('lenet5', True), 3))
    assert before['conv1'].min() < 0 <= after['conv1'].min()
    assert torch.equal(F.relu(before['fc1']), after['fc1'])
    assert torch.allclose(before['conv1'], model.conv1(x).flatten(1), atol=1e-6)
    monkeypatch.setattr(mi, 'ACTIVATIONS', 1)
    for name, t in mi.activations(model, x, mi.layers_of('lenet5', False), 3):
        assert torch.equal(t, after[name])
    with pytest.raises(common.UserError, match='no layers are known for alexnet'):
        mi.layers_of('alexnet', False)


def test_as_published_batch_norms_use_the_batch():
    model = mi.build('wrn-10-1', 10, (3, 32, 32), 0, published=True)
    x = torch.rand(8, 3, 32, 32)
    with common.frozen(model), torch.no_grad():
        together, alone = model(x)[:2], model(x[:2])
    assert not torch.allclose(together, alone, atol=1e-3)
    with torch.no_grad():
        assert torch.allclose(model.train()(x)[:2], together, atol=1e-5)
    model.load_state_dict(mi.build('wrn-10-1', 10, (3, 32, 32), 1, True).state_dict())


def test_one_batch_of_the_small_cnn_as_published_is_its_train_mode():
    model = mi.build('small-cnn', 10, (3, 32, 32), 0, published=True)
    x = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), model.train()(x), atol=1e-5)


# ------------------------------------------------------------------------- epochs and intervals


def test_measured_epochs():
    assert mi.measured_epochs(6, 20, False) == list(range(7))
    assert mi.measured_epochs(6, 20, True) == list(range(6))
    assert mi.measured_epochs(200, 0, False) == list(range(201))
    chosen = mi.measured_epochs(200, 20, False)
    assert len(chosen) == 20 and chosen[:3] == [0, 1, 2] and chosen[-1] == 200
    assert chosen == sorted(set(chosen))
    ratios = np.diff(np.log(chosen[8:]))
    assert ratios.max() < 2 * ratios.min()
    assert mi.measured_epochs(9, 1, False) == mi.measured_epochs(9, 2, False) == [0, 9]
    assert mi.measured_epochs(1, 2, False) == [0, 1]


def test_replicates_average_images():
    weights = mi.replicate_weights(500)
    assert weights.shape == (1 + mi.REPLICATES, 500)
    assert torch.allclose(weights.sum(1), torch.ones(len(weights), dtype=torch.float64))
    terms = points(500, 1)[:, 0]
    means = weights @ terms
    assert means[0] == pytest.approx(terms.mean().item())
    assert means[1:].std().item() == pytest.approx(terms.std().item() / 500**0.5, rel=0.15)


def test_the_interval_has_the_spread_of_fresh_samples():
    """The replicates of one sample vary as the estimates of many samples do."""
    values, widths = [], []
    weights = mi.replicate_weights(300)
    generator = torch.Generator().manual_seed(0)
    for seed in range(150):
        y = torch.randint(4, (300,), generator=generator)
        t = 0.3 * points(300, 4, seed) + 0.7 * F.one_hot(y, 4).double()
        found = mi.layer_information(t, y.expand(2, -1), 4, weights, unit=True)
        rows = torch.cat((found['values'], found['unit'][:2]))
        values.append(rows[:, 0])
        widths.append(rows[:, 1:].std(1))
    spread, width = torch.stack(values).std(0), torch.stack(widths).mean(0)
    for i, name in enumerate((*mi.QUANTITIES, 'x_unit', 'y_unit')):
        if 'bin' not in name:  # the plug-in entropy of few images is all bias
            assert width[i] / spread[i] == pytest.approx(1, abs=0.25), name


def test_interval_pairs_replicates_and_resamples_seeds():
    base = np.random.default_rng(0).normal(size=(1, 1 + mi.REPLICATES))
    value, low, high = mi.interval(np.subtract, base + 1, base)
    assert (value, low, high) == pytest.approx((1, 1, 1))
    two = np.stack((np.zeros(1 + mi.REPLICATES), np.ones(1 + mi.REPLICATES)))
    assert mi.interval(lambda a: a, two) == pytest.approx((0.5, 0, 1))


def test_null_and_bracket_of_informative_outputs():
    y = torch.arange(600) % 3
    t = F.one_hot(y).double() * 3 + points(600, 3, std=0.1)
    labels = torch.stack([y, *(y[torch.randperm(600, generator=torch.Generator().manual_seed(i))] for i in range(3))])
    found = mi.layer_information(t, labels, 3, mi.replicate_weights(600))
    upper, lower, cells = found['values'][3:, 0]
    assert lower == pytest.approx(math.log2(3), abs=0.01)
    assert found['null'][1] < 0.02 and found['null'][0] < 0.1 < cells
    assert found['bracket'][0] > 1.2 and found['bracket'][1] <= math.log2(3) + 1e-12
    assert found['ratio'] > 10 and not found['certified']


def test_log_nearest_and_ratio_by_hand():
    t = torch.tensor([[0.0], [1.0], [8.0], [9.0]])
    y = torch.tensor([0, 0, 1, 1])
    found = mi.layer_information(t, y.expand(2, -1), 2, mi.replicate_weights(4))
    assert found['log_nearest'] == pytest.approx(0)
    assert found['ratio'] == pytest.approx(math.sqrt((64 + 81 + 49 + 64) / 4))
    t, y = points(90, 5), torch.arange(90) % 4
    s = torch.cdist(t, t).square()
    same = (y[:, None] == y) & ~torch.eye(90, dtype=torch.bool)
    assert mi.distance_ratio(t, y, 4) == pytest.approx(math.sqrt(s[y[:, None] != y].mean() / s[same].mean()))


def test_rank_correlation():
    assert common.rank_correlation([1, 2, 3], [2, 4, 9]) == pytest.approx(1)
    assert common.rank_correlation([1, 2, 3], [9, 4, 2]) == pytest.approx(-1)
    assert math.isnan(common.rank_correlation([1, 1, 1], [9, 4, 2]))


# ---------------------------------------------------------------------------- the measurements


def test_influences_are_derivatives_of_the_mean():
    """What an image contributes is what the estimate gains when it weighs a little more."""
    t, y = points(40, 3, std=0.4), torch.arange(40) % 2
    found = mi.kde_terms(t, y[None], 2, (0.1,), geometry=True)
    s = torch.cdist(t, t).square()
    same = y[:, None] == y

    def estimates(weights, c):
        p = weights / weights.sum()
        off = torch.exp(-s / (c * 0.1)).fill_diagonal_(0)
        kernel = off * p + torch.eye(40) / 40  # its own term does not grow with its weight
        q = (p * same).sum(1)
        inside = off * same * p / q[:, None] + torch.eye(40) / 20
        return -(p * kernel.sum(1).log2()).sum(), -(p * inside.sum(1).log2()).sum()

    def centred(v):  # within each class: a class as a whole may count for more
        return torch.stack([v[y == k] - v[y == k].mean() for k in (0, 1)])

    for name, c in (('upper', 2), ('lower', 8)):
        weights = torch.ones(40, dtype=torch.float64, requires_grad=True)
        whole, given = estimates(weights, c)
        assert whole.item() == pytest.approx(found[name].mean().item())
        assert given.item() == pytest.approx(found[name + '_given'].mean().item())
        for mean, key in ((whole, f'influence_{name}'), (given, f'influence_{name}_given')):
            (gradient,) = torch.autograd.grad(mean, weights, retain_graph=True)
            influence = found[key].flatten()
            assert torch.allclose(40 * centred(gradient), centred(influence), atol=1e-9)


def test_nothing_is_said_twice_about_certified_outputs():
    t, y = 100 * torch.arange(40.0)[:, None].expand(-1, 3), torch.arange(40) % 4
    found = mi.layer_information(t, y.expand(4, -1), 4, mi.replicate_weights(40))
    assert found['log_nearest'] is None
    assert found['values'][:, 1:].std(1).max() < 1e-9


def test_all_zero_and_tiny_outputs():
    y = torch.arange(40) % 4
    zero = mi.layer_information(torch.zeros(40, 3), y.expand(4, -1), 4, mi.replicate_weights(40), unit=True)
    assert torch.isfinite(zero['unit']).all() and zero['unit'].abs().max() < 1e-9
    t = points(40, 3)
    plain, tiny = (
        mi.layer_information(k * t, y.expand(4, -1), 4, mi.replicate_weights(40), unit=True)['unit'] for k in (1, 1e-7)
    )
    assert torch.allclose(plain, tiny, atol=1e-6)


def test_distortions_come_after_the_attack_on_the_plain_image(tiny_setting):
    model = common.make_model('small-cnn', 10, (3, 32, 32), 0)
    levels = {'saturation': (2, 64), 'patches': (0, 4)}
    found = mi.measure_distortions(tiny_setting, model, levels, 'pgd', 0)
    x, y = tiny_setting.images(tiny_setting.sample())
    x_adv = tiny_setting.attack(model, x, y)
    for kind, images in (('clean', x), ('adv', x_adv)):
        for name, level in (('saturation', 2), ('saturation', 64), ('patches', 0), ('patches', 4)):
            with common.frozen(model), torch.no_grad():
                logits = model(mi.distort(images, name, level))
            loss = common.unpack(found[name][level][kind]['loss'])[0]
            assert loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4)
            assert (common.unpack(found[name][level][kind]['predicted']) == logits.argmax(1).numpy()).all()


def test_a_measurement_is_that_of_its_layers(tiny_setting):
    model = common.make_model('small-cnn', 10, (3, 32, 32), 0)
    index = tiny_setting.sample()
    x, y = tiny_setting.images(index)
    found = tiny_setting.measure(model, x, y, index)
    values = common.unpack(found['values'])
    with common.frozen(model), torch.no_grad():
        logits = model(x)
    expected = direct(logits, y)
    for name, key in (('x_upper', 'upper'), ('x_lower', 'lower'), ('y_upper', 'upper_y'), ('y_lower', 'lower_y')):
        assert values[-1, mi.QUANTITIES.index(name), 0] == pytest.approx(expected[key] / LN2, abs=1e-5)
    assert found['rms'] == pytest.approx(logits.square().mean().sqrt().item(), rel=1e-5)
    unit = direct(logits / found['rms'], y)
    assert common.unpack(found['unit'])[:2, 0] == pytest.approx((unit['lower'] / LN2, unit['lower_y'] / LN2), abs=1e-5)
    for k in range(10):  # each class its own entropy
        own = direct(logits[y == k], y[y == k])['lower'] / LN2 + mi.noise_entropy(10)
        assert found['layers'][-1]['entropy'][1 + k] == pytest.approx(own, abs=1e-4)
    assert found['ceiling'] == pytest.approx(math.log2(40))


def test_training_measures_are_natural_first_and_attacked_second(tiny_setting):
    model = common.make_model('small-cnn', 10, (3, 32, 32), 0)
    (natural, attacked) = common.unpack(mi.training_measures(tiny_setting, model))[:, 0, 0]
    x, y = common.to_float(tiny_setting.data.train[0]), tiny_setting.data.train[1]
    with common.frozen(model), torch.no_grad():
        assert natural == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-4)
    assert attacked > natural


# --------------------------------------------------------------------------------- the verdicts


def synthetic(**changes):
    """results of two networks of which every one of the paper's claims is true.

    Two layers: the first saturated, the second moving; 200 images, ten classes.
    """
    rng, epochs, n = np.random.default_rng(0), list(range(6)), 200
    c = (
        dict(
            nt_x=5.0,
            at_x=3.0,
            nt_y=3.0,
            at_y=2.0,
            at_adv_y=1.0,
            null=0.1,
            nt_adv=0.02,
            at_acc=0.7,
            nt_train=0.95,
            keep_patch=0.8,
            keep_saturation=0.3,
            default=0.1,
            at_saturation=0.9,
            nt_saturation=0.5,
            at_patches=0.4,
            nt_patches=0.8,
            unit=1.0,
            adv_order=1,
            ceiling_gap=0.0,
            unit_null=0.1,
            nt_y_upper=3.2,
        )
        | changes
    )

    def spread(value, width=0.01):
        return np.concatenate(([value], value + width * rng.normal(size=mi.REPLICATES)))

    def pack(rows):
        return common.pack(np.array(rows, np.float32))

    def measurement(method, kind, grown=1.0, level=1.0, predicted=None):
        x = (c['nt_x'] if method == 'standard' else c['at_x']) * grown
        y = (c['nt_y'] if method == 'standard' else c['at_y'] if kind == 'clean' else c['at_adv_y']) * grown * level
        upper = c['nt_y_upper'] * grown if method == 'standard' else y
        top, h = math.log2(n), math.log2(10)
        first = [top, top - c['ceiling_gap'], top, h, h, h]
        second = [x + 1, x, x + 1, upper, y, y]
        accuracy = {'standard': {'clean': 0.95, 'adv': c['nt_adv']}, 'pgd': {'clean': c['at_acc'], 'adv': 0.5}}[method][
            kind
        ] * level
        null = [c['null']] * 3
        return dict(
            values=pack([[spread(v, 0.001) for v in layer] for layer in (first, second)]),
            unit=pack([spread(x * c['unit']), spread(y), spread(c['unit_null'] * level)]),
            accuracy=pack(spread(accuracy, 0.002)),
            loss=pack(spread(1.0)),
            predicted=common.pack(np.asarray(predicted if predicted is not None else np.zeros(n), np.int16)),
            label=common.pack((np.arange(n) % 10).astype(np.int16)),
            ceiling=top,
            label_entropy=h,
            rms=1.0,
            layers=[
                dict(
                    null=[h] * 3,
                    dimensions=999,
                    entropy=[9.0] * 11,
                    log_nearest=None,
                    ratio=1.0,
                    certified=True,
                    bracket=[h, h],
                ),
                dict(
                    null=null,
                    dimensions=10,
                    entropy=[5.0] * 11,
                    log_nearest=x,
                    ratio=1 + y,
                    certified=False,
                    bracket=[0.0, h],
                ),
            ],
        )

    results = dict(
        config=dict(seeds=[0], dataset='cifar10', arch='wrn-10-1', variance=0.1, as_published=False),
        epochs=epochs,
        samples=n,
        classes=list('abcdefghij'),
        layers=['conv1', 'fc'],
        levels=dict(saturation=[2, 64], patches=[0, 4]),
    )
    label = np.arange(n) % 10
    wrong = (label + 1) % 10
    for method in mi.METHODS:
        name = f'{method}-s0'
        for e in epochs:
            grown = (e + 1) / 6
            results[f'plane-{name}-e{e}'] = {
                'clean': measurement(method, 'clean', grown),
                'adv': measurement(method, 'adv', grown if c['adv_order'] > 0 else 7 / 6 - grown),
            }
        distortion = {}
        for kind_of, levels in results['levels'].items():
            share = c[('nt_' if method == 'standard' else 'at_') + kind_of]
            kept = c['keep_patch'] if kind_of == 'patches' else c['keep_saturation']
            distortion[kind_of] = {}
            for i, level in enumerate(levels):
                adv = np.where(np.arange(n) < (kept if i else 1) * n, wrong, (label + 2) % 10)
                clean = np.where(np.arange(n) < c['default'] * n, wrong, label) if i else label
                distortion[kind_of][str(level)] = {
                    'clean': measurement(method, 'clean', 1, share if i else 1, clean),
                    'adv': measurement(method, 'adv', 1, share if i else 1, adv),
                }
        results[f'distortion-{name}'] = distortion
        natural, attacked = (c['nt_train'], 0.01) if method == 'standard' else (0.8, 0.4)
        results[f'train-{name}'] = pack(
            [[spread(1 - natural), spread(natural, 0.002)], [spread(1.5 - attacked), spread(attacked, 0.002)]]
        )
        x = c['nt_x'] if method == 'standard' else c['at_x']
        results[f'scale-{name}'] = dict(
            curves=np.zeros((2, 2, 2, len(mi.CURVE))).tolist(),
            rms=1.0,
            spread=1.0,
            logits=pack([spread(x) for _ in mi.CURVE]),
            relative=pack(spread(x)),
            bounds=[1.0, 2.0],
            referee=[1.5, 1.0],
            referee_error=[0.01, 0.01],
            cells=0.0,
        )
        results[f'collapsed-{name}'] = False
        results[f'history-{name}'] = []
    return json.loads(json.dumps(results, default=lambda v: v.tolist()))


@pytest.fixture
def few_replicates(monkeypatch):
    monkeypatch.setattr(mi, 'REPLICATES', 30)
    monkeypatch.setattr(common, 'bootstrap', partial(common.bootstrap, draws=50))


def verdicts(tmp_path, **changes):
    """{start of the claim: verdict}; paper's and control's rows apart."""
    rows = mi.judge(synthetic(**changes), tmp_path)
    return [(row['claim'], row['source'], row['verdict']) for row in rows]


def verdict(rows, start, control=False):
    found = [v for text, source, v in rows if text.startswith(start) and (source == 'control') == control]
    assert found, start
    return found


def test_results_of_which_every_claim_is_true_support_every_claim(tmp_path, few_replicates):
    rows = verdicts(tmp_path)
    for text, source, found in rows:
        if text.startswith('V8'):  # the first layer is saturated
            assert found == 'contradicted'
        elif 'V1 Control' in text:  # the two series were made alike
            assert found == 'contradicted'
        elif 'V2c The same with logits' in text or ('V5' in text and 'unit RMS' in text):
            pass  # below, and not 90 % of H(Y)
        elif not text.startswith('V6 I(T'):
            assert found == 'supported', (text, source, found)


@pytest.mark.parametrize(
    'changes,claim,control,expected',
    (
        (dict(adv_order=-1), 'V1 Through training', False, 'contradicted'),
        (
            dict(nt_x=25.0),
            'V1 Through training, information on natural and adversarial images moves alike in NT',
            False,
            'uninformative',
        ),
        (dict(nt_x=2.0), 'V2b', False, 'contradicted'),
        (dict(nt_x=7.62), 'V2b', False, 'uninformative'),
        (dict(nt_x=3.0), 'V2b', False, 'inconclusive'),
        (dict(nt_x=2.0), 'V2c The same with logits', True, 'contradicted'),
        (dict(nt_x=2.0), 'V2c The same, at every', True, 'contradicted'),
        (dict(at_y=3.2, at_adv_y=3.3), 'V2d', False, 'contradicted'),
        (dict(at_y=3.2, at_adv_y=3.3), 'V2d', True, 'contradicted'),
        (dict(null=2.98), 'V2d AT', False, 'uninformative'),
        (dict(null=2.98), 'V3c', False, 'uninformative'),
        (dict(at_acc=0.99), 'V2a AT is harder: accuracy on natural', False, 'contradicted'),
        (dict(nt_train=0.2), 'V2a AT is harder: accuracy on training', False, 'contradicted'),
        (dict(at_acc=0.1), 'V2b', False, 'uninformative'),
        (dict(at_saturation=0.3), 'V3a', False, 'contradicted'),
        (dict(at_saturation=0.3), 'V3c', False, 'contradicted'),
        (dict(nt_patches=0.2), 'V3b', False, 'contradicted'),
        (dict(nt_patches=0.2), 'V3d', False, 'contradicted'),
        (dict(keep_patch=0.1), 'V4', False, 'contradicted'),
        (dict(nt_adv=0.3), 'V5', False, 'uninformative'),
        (dict(null=3.1), 'V5', False, 'uninformative'),
        (dict(nt_y_upper=2.0), 'V5', False, 'contradicted'),
        (dict(ceiling_gap=0.2), 'V7', True, 'contradicted'),
    ),
)
def test_a_claim_that_is_false_is_not_supported(changes, claim, control, expected, few_replicates, tmp_path):
    for found in verdict(verdicts(tmp_path, **changes), claim, control):
        assert found.split(':')[0] == expected


def test_a_default_class_of_shuffled_images_is_not_texture(tmp_path, few_replicates):
    results = synthetic(keep_patch=0.8)
    for level, share in (('4', 0.95), ('0', 0)):  # unattacked images go there more often still
        measured = results['distortion-standard-s0']['patches'][level]['clean']
        label = common.unpack(measured['label'])
        taken = np.where(np.arange(200) < share * 200, (label + 1) % 10, label)
        measured['predicted'] = json.loads(json.dumps(common.pack(taken.astype(np.int16))))
    rows = [(r['claim'], r['source'], r['verdict']) for r in mi.judge(results, tmp_path)]
    assert verdict(rows, 'V4') == ['supported']
    assert verdict(rows, 'V4', True) == ['contradicted']


def test_a_collapsed_network_and_undefined_numbers_are_uninformative(tmp_path, few_replicates):
    results = synthetic()
    results['collapsed-pgd-s0'] = True
    rows = [(r['claim'], r['source'], r['verdict']) for r in mi.judge(results, tmp_path)]
    assert verdict(rows, 'V2b') == ['uninformative: AT collapsed to one class']
    assert verdict(rows, 'V4') == ['supported']  # about NT alone
    rows = verdicts(tmp_path, nt_y=0.0, nt_y_upper=0.0)  # nothing to divide by
    assert verdict(rows, 'V3d')[0].startswith('uninformative')


def test_the_referee_is_heard(tmp_path, few_replicates):
    results = synthetic()
    results['scale-pgd-s0']['referee'][0] = 2.2
    rows = [(r['claim'], r['source'], r['verdict']) for r in mi.judge(results, tmp_path)]
    assert verdict(rows, 'The Monte-Carlo', True) == ['contradicted']


# ------------------------------------------------------------------------------------- end to end

TINY = ['--train-size', '60', '--test-size', '40', '--epochs', '2', '--batch-size', '20']
FIGURES = [
    'fig1_training',
    'fig2_plane_standard',
    'fig3_plane_pgd',
    'fig4_layers',
    'fig5_entropy',
    'fig6_distortion',
    'fig7_distortion_layers',
    'fig8_images',
    'fig9_scale',
    'fig10_nulls',
    'fig11_geometry',
]


def test_a_tiny_study_leaves_everything_and_is_not_repeated(tmp_path, capsys, monkeypatch):
    command = TINY + ['--out', str(tmp_path)]
    mi.main(command)
    printed = capsys.readouterr().out
    [folder] = (tmp_path / 'mi_analysis').iterdir()
    for figure in FIGURES:
        assert (folder / f'{figure}.png').stat().st_size > 1000
    results = json.loads((folder / 'results.json').read_text())
    assert results['epochs'] == [0, 1, 2]
    for method in mi.METHODS:
        for kind in mi.KINDS:
            values = mi.plane(results, method, kind)
            assert values.shape == (1, 3, 5, 6, 1 + mi.REPLICATES)
            assert (values[..., :3, 0] <= math.log2(40) + 1e-5).all()
            assert (values[..., 1, 0] <= values[..., 0, 0] + 1e-5).all()
    # no distortion is no distortion
    for name in ('saturation', 'patches'):
        untouched = mi.distorted(results, 'pgd', 'adv', name, 'values')[:, 0]
        assert untouched == pytest.approx(mi.plane(results, 'pgd', 'adv')[:, -1], abs=1e-4)
    # both networks start from the same weights
    assert mi.plane(results, 'pgd', 'clean')[:, 0] == pytest.approx(mi.plane(results, 'standard', 'clean')[:, 0])
    table = (folder / 'claims.md').read_text()
    for name in ('V1', 'V2a', 'V2b', 'V2c', 'V2d', 'V3a', 'V3b', 'V3c', 'V3d', 'V4', 'V5', 'V6', 'V7', 'V8'):
        assert f'| {name} ' in table
    assert 'ceiling' in printed and 'I(T;Y)' in printed
    stamp = (folder / 'results.json').stat().st_mtime_ns
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / 'models').rglob('*.pt')}
    assert len(kept) == 8  # two models with three epochs each
    monkeypatch.setattr(mi, 'draw', lambda results, folder: None)
    mi.main(command)
    assert stamp == (folder / 'results.json').stat().st_mtime_ns
    assert kept == {p: p.stat().st_mtime_ns for p in (tmp_path / 'models').rglob('*.pt')}
    assert (folder / 'claims.md').read_text() == table


@pytest.mark.slow
def test_as_published_and_two_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(mi, 'draw', lambda results, folder: None)
    mi.main(
        [
            '--train-size',
            '60',
            '--test-size',
            '80',
            '--epochs',
            '2',
            '--batch-size',
            '20',
            '--seeds',
            '0',
            '1',
            '--as-published',
            '--out',
            str(tmp_path),
        ]
    )
    [folder] = (tmp_path / 'mi_analysis').iterdir()
    results = json.loads((folder / 'results.json').read_text())
    assert results['epochs'] == [0, 1] and results['samples'] == 40
    config = results['config']
    assert (config['lr'], config['schedule'], config['weight_decay']) == (0.025, 'constant', 0)
    assert mi.plane(results, 'pgd', 'clean', 'ceiling').max() < math.log2(40)


def test_a_published_default_lr_is_constant_and_ours_drops():
    args = common.parse(mi.make_parser(), ['--dataset', 'cifar10'])
    assert (args.arch, args.epochs, args.lr, args.weight_decay) == ('wrn-10-1', 200, 0.1, 0)
    assert [common.lr_factor(args.schedule, e / 200) for e in (0, 19, 20, 59, 60, 199)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    args = common.parse(mi.make_parser(True), ['--dataset', 'mnist', '--as-published'])
    assert args.lr * common.lr_factor(args.schedule, 0.9) == 0.025
    assert (args.eps, args.step_size, args.steps) == (45 / 255, 8 / 255, 7)
    assert (mi.usual_test_step(args), args.test_steps) == (8 / 255, 7)
    args = common.parse(mi.make_parser(), ['--dataset', 'cifar10'])
    assert mi.usual_test_step(args) == pytest.approx(2 / 255)
