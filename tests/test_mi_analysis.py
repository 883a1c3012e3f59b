"""mi_analysis.py: estimators against a plain reference and closed forms, verdicts, a tiny run."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import mi_analysis as mi
from mi_analysis import BINS, NULL, PUBLISHED, SCALED, X, Y


def labels_of(n):
    """(4, N): balanced labels and three permutations of them."""
    g, y = torch.Generator().manual_seed(0), torch.arange(n) % 10
    return torch.stack([y] + [y[torch.randperm(n, generator=g)] for _ in range(3)])

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def reference(t, y, variance, c):
    """(I(T;X), I(T;Y)) in bits, from all differences in float64."""
    t = t.double()
    s = torch.stack([(t - row).square().sum(1) for row in t])
    kernel = -s / (c * variance)
    x = -(kernel.logsumexp(1) - math.log(len(t))).mean()
    same = y[:, None] == y
    inside = kernel.masked_fill(~same, -math.inf).logsumexp(1) - same.double().sum(1).log()
    return (x / math.log(2)).item(), ((x + inside.mean()) / math.log(2)).item()

def bounds(t, variance, labels=None):
    """(I(T;X), I(T;Y)), each (2,): lower and upper bound."""
    labels = labels_of(len(t)) if labels is None else labels
    x, y = mi.kde_terms(t, labels, 10, (variance,), mi.frame_of(t))
    return x[0].mean(-1).numpy(), y[0, :, 0].mean(-1).numpy()

def means(t, labels=None, classes=10):
    labels = labels_of(len(t)) if labels is None else labels
    return mi.information(t, labels, classes)[0].mean(-1)

@pytest.fixture(scope='module')
def trained():
    """A network after 45 steps on shapes, and test images."""
    model = common.make_model('small-cnn').train()
    x, y, _ = common.make_shapes(960, 'train')
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for a, b in list(zip(x.split(64), y.split(64))) * 3:
        optimizer.zero_grad()
        F.cross_entropy(model(common.to_float(a)), b).backward()
        optimizer.step()
    x, y, _ = common.make_shapes(300, 'test')
    return model.eval(), common.to_float(x), y

@pytest.mark.parametrize('n, d, scale, offset', [(60, 3, 0.3, 0), (1100, 40, 0.1, 5),
                                                 (130, 2500, 0.02, 100), (90, 10, 30, 0)])
def test_bounds_equal_the_reference(n, d, scale, offset):
    t, y = scale * normal(n, d) + offset, labels_of(n)
    expected = np.transpose([reference(t, y[0], 0.1, c) for c in (8, 2)])
    assert np.allclose(bounds(t, 0.1, y), expected, rtol=0, atol=1e-9)

def test_information_of_trained_layers_equals_the_reference(trained):
    model, x, y = trained
    labels = torch.stack((y, y.flip(0)))
    for name in ('stage3.1.0', 'fc'):
        t = mi.outputs_of(model, x, name)
        terms, scaled = mi.information(t, labels, 10)
        assert 0.1 < terms[SCALED, Y].mean() < terms[SCALED, X].mean() < math.log2(300) - 1
        for noise, variance in ((SCALED, scaled), (PUBLISHED, 0.1)):
            found = terms[noise].mean(-1)
            assert np.allclose(found[[X, Y]], reference(t, y, variance, 8), rtol=0, atol=1e-9)
            assert abs(found[NULL] - reference(t, y.flip(0), variance, 8)[1]) < 1e-9
    s = torch.pdist(t.double()).square()  # of all pairs, as there are 300 images
    assert abs(scaled / (mi.SHARE * s.median().item()) - 1) < 1e-9

def test_float32_products_lose_little(trained, monkeypatch):
    """What a GPU computes: within 1e-4 bits of float64, far from the origin, with duplicates."""
    model, x, _ = trained
    cases = [mi.outputs_of(model, x, 'stage1.0') + 30, normal(400, 3000) + 3,
             normal(200, 3000).repeat(2, 1) * 1e19, normal(400, 10) * 5]
    exact = [means(t) for t in cases]
    monkeypatch.setitem(mi.PRODUCTS, 'cpu', mi.PRODUCTS['cuda'])
    for t, expected in zip(cases, exact):
        assert np.abs(means(t) - expected).max() < 1e-4

def test_two_points():
    """A binary input in Gaussian noise lies between the bounds, which have a closed form."""
    for r, lower, truth, upper in ((0.25, 0.015503, 0.030311, 0.060548),
                                   (4, 0.219070, 0.336831, 0.566219)):
        t = torch.tensor([[0.0], [math.sqrt(0.1 * r)]]).double()
        found = bounds(t, 0.1)[0] * math.log(2)  # nats
        assert np.allclose(found, [lower, upper], atol=1e-6) and lower < truth < upper

@pytest.mark.parametrize('d, r', [(1, 1), (1, 9), (2, 4)])
def test_gaussian_source(d, r):
    """Limits for N(0, r v I): (D/2) [ln(1 + q) + q / (1 + q)] with q = r / 4 and r."""
    found = bounds(math.sqrt(0.1 * r) * normal(3000, d), 0.1)[0] * math.log(2)
    limits = [d / 2 * (math.log(1 + q) + q / (1 + q)) for q in (r / 4, r)]
    assert np.allclose(found, limits, atol=0.05)
    assert found[0] < d / 2 * math.log(1 + r) < found[1]

def test_invariances():
    t, y = normal(200, 20), labels_of(200)
    first, order = means(t, y), torch.randperm(200, generator=torch.Generator().manual_seed(1))
    other = t.double() @ torch.linalg.qr(normal(20, 20, seed=2).double())[0] + 7  # rotated, moved
    assert np.allclose(means(other, y)[:BINS], first[:BINS], atol=1e-9)
    assert np.allclose(means(4 * t, y)[SCALED], first[SCALED], atol=1e-9)
    assert np.allclose(bounds(4 * t, 1.6, y), bounds(t, 0.1, y), atol=1e-9)
    assert np.allclose(bounds(t[order], 0.1, y[:, order]), bounds(t, 0.1, y), atol=1e-9)
    assert np.allclose(bounds(t.repeat(2, 1), 0.1, y.repeat(1, 2)), bounds(t, 0.1, y), atol=1e-9)

def test_at_the_ceiling_any_labels_tell_all_and_clusters_do_not():
    expected = [math.log2(300)] + [math.log2(10)] * 2
    assert np.allclose(means(100 * normal(300, 50))[PUBLISHED:], expected, atol=1e-9)
    y = labels_of(300)
    clusters = means(F.one_hot(y[0]).float() * 50 + 1e-3 * normal(300, 10), y)
    assert np.allclose(clusters[PUBLISHED, :NULL], math.log2(10), atol=1e-3)
    assert clusters[PUBLISHED, NULL] < 0.4

def test_bins():
    t = torch.tensor([[0.1], [0.4], [0.6], [-0.1]])  # cells 0, 0, 1, -1
    assert mi.bin_terms(t, torch.zeros(1, 4, dtype=torch.long), 1)[0].mean() == 1.5
    t, y = normal(500, 3), labels_of(500)
    cells = np.floor(t.double().numpy() / 0.5)
    counts = [np.unique(rows, axis=0, return_counts=True)[1]
              for rows in (cells, np.c_[cells, y[0]])]
    h, joint = (math.log2(500) - (c * np.log2(c)).sum() / 500 for c in counts)
    x, terms = mi.bin_terms(t, y, 10)
    assert abs(x.mean() - h) < 1e-9 and abs(terms[0].mean() - h - math.log2(10) + joint) < 1e-9

@pytest.mark.parametrize('scale', [1e-30, 1.0, 1e19, 1e30])
def test_constant_duplicated_and_huge_outputs(scale):
    y = labels_of(100)
    assert np.allclose(means(torch.full((100, 30), 0.3 * scale), y), 0, atol=1e-9)
    pairs = means(scale * normal(50, 30).repeat(2, 1), y)  # each row twice, of one class
    assert (pairs[:, X] < math.log2(50) + 1e-9).all() and (pairs[:, :NULL] > -1e-9).all()
    assert np.allclose(pairs[SCALED], means(normal(50, 30).repeat(2, 1), y)[SCALED], atol=1e-6)
    if scale > 1:
        assert np.allclose(pairs[PUBLISHED:, X], math.log2(50), atol=1e-9)

def test_smallest_samples_and_what_is_not_finite():
    two = means(torch.tensor([[0.0], [100.0]]), torch.tensor([[0, 1], [1, 0]]), 2)
    assert np.allclose(two[PUBLISHED], 1)
    one = means(normal(20, 4), torch.zeros(2, 20, dtype=torch.long), 3)
    assert np.allclose(one[:, Y:], 0) and (one[:, X] > 1).all()
    for bad in (math.nan, math.inf):
        t = normal(20, 4)
        t[3, 2] = bad
        with pytest.raises(common.UserError, match='layer stem'):
            mi.information(t, labels_of(20), 10, 'stem')

def test_intervals_cover():
    """Of 200 samples of a Gaussian source about 95 % hold the mean of all; half the error, as if
    images were independent, does not do."""
    terms = [mi.information(normal(120, 2, seed=seed), labels_of(120), 10)[0][PUBLISHED, X]
             for seed in range(200)]
    found, wide = np.mean(terms, 1), np.array([np.ptp(mi.interval(t[None])) / 2 for t in terms])
    gap = np.abs(found - found.mean())
    assert (gap < wide).mean() >= 0.94 and (gap < wide / 2).mean() < 0.94

def test_layers_are_outputs_before_the_relu(trained):
    model, x, _ = trained
    layers = mi.layers_of('small-cnn', model)
    assert list(layers) == ['stem', 'stage1', 'stage2', 'stage3', 'fc']
    t = mi.outputs_of(model, x[:20], layers['stem'])
    conv = model.net.stem[1][0](model.net.stem[0](model.normalize(x[:20])))
    assert torch.allclose(t, conv.flatten(1), atol=1e-5) and t.min() < 0
    assert not model.net.stem[1][0]._forward_hooks
    lenet = mi.layers_of('lenet5', common.make_model('lenet5', 10, (1, 28, 28)))
    assert list(lenet) == ['conv1', 'conv2', 'fc1', 'fc2', 'fc3']
    wide = common.make_model('wrn-10-1')
    outputs = [mi.outputs_of(wide, x[:2], n) for n in mi.layers_of('wrn-10-1', wide).values()]
    assert [t.shape[1] for t in outputs] == [16384, 16384, 16384, 8192, 10]

def made_up(true=True, right=0.9, published=6.0, null=0.5):
    """Results in which every claim is true, or false."""
    n, rng, sign, runs = 400, np.random.default_rng(0), 1 if true else -1, {}
    y = np.arange(n) % 10
    for k, method in enumerate(mi.METHODS):
        run = dict(distorted={})
        for attack, kind in enumerate(mi.KINDS):
            terms = 0.1 * rng.standard_normal((3, 3, n))
            terms[:, X] += 6 - sign * 0.5 * k
            terms[PUBLISHED, X] += published - 6
            terms[:, Y] += 2.5 - sign * 0.5 * (k + attack * k) - attack * (1 - k) * (not true)
            terms[:, NULL] += null
            correct = rng.random(n) < (0.5 * k if attack else right)
            guess = np.where(correct, y, (y + 1) % 10)
            keep = [0.4, 0.8][::sign * (1 - 2 * k)]  # without texture, without shape
            predicted = [np.stack((guess, np.where(rng.random(n) < p, guess, (y + 5) % 10)))
                         for p in keep]
            run['distorted'][kind] = dict(terms=terms, saturation=dict(predicted=predicted[0]),
                                          patches=dict(predicted=predicted[1]))
            info = 2 + 0.1 * np.arange(7) * (1 if true or not attack else -1)
            loss = 1 + sign * (0.5 * k + attack) + 0.1 * rng.standard_normal(n)
            for e in range(7):
                run.setdefault(f'epoch{e}', {})[kind] = dict(
                    info=np.full((2, 3, 3), info[e]), correct=correct, loss=loss)
        runs[method] = {'s0': run}
    return dict(config=dict(seeds=[0]), labels=y, epochs=[*range(7)], layers=['a', 'b'], runs=runs,
                levels=dict(saturation=[2, 8], patches=[1, 2]), classes=[*range(10)])

def verdicts(results, tmp_path):
    common.judge(mi.claims(results), results, tmp_path)
    return [row['verdict'] for row in results['claims']]

def test_verdicts(tmp_path):
    assert verdicts(made_up(), tmp_path) == ['supported'] * 10
    assert verdicts(made_up(true=False), tmp_path) == ['contradicted'] * 10
    assert all('near chance' in v for v in verdicts(made_up(right=0.1), tmp_path))
    full = verdicts(made_up(published=math.log2(400) + 0.5), tmp_path)
    assert full[2] == 'uninformative: at the ceiling log2 N' and full[3] == 'supported'
    empty = verdicts(made_up(null=2.5), tmp_path)
    assert [k for k, v in enumerate(empty) if 'permuted labels' in v] == [4, 5, 6]

def test_tiny_run(tmp_path, monkeypatch):
    flags = ['--train-size', '100', '--test-size', '40', '--epochs', '1', '--out', str(tmp_path),
             '--device', 'cpu', '--image-size', '16', '--test-steps', '2']
    with pytest.raises(common.UserError, match='--test-size'):  # before anything is trained
        mi.main([*flags, '--test-size', '10'])
    assert not (tmp_path / 'models').exists()
    monkeypatch.setitem(common.STYLE, 'savefig.dpi', 40)
    mi.main(flags)
    folder = next(p.parent for p in tmp_path.rglob('claims.md'))
    assert len((folder / 'claims.md').read_text().splitlines()) >= 12
    for figure in folder.glob('fig*.png'):
        figure.unlink()
    mi.main(['--plot-only', str(folder)])
    assert len(list(folder.glob('fig*.png'))) == 6
