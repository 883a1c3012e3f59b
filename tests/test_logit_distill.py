"""logit_distill.py: targets, theory, verdicts, and a tiny study."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

import common
import logit_distill as study

CASES = [(k, ties) for k in (2, 3, 10) for ties in (False, True)]

def logits(k, ties, n=400):
    """Random logits of a teacher and their facts; ties: whole numbers."""
    generator = common.make_generator('test', k)
    t = 2 * torch.randn(n, k, generator=generator).round(decimals=0 if ties else 6)
    return t, study.describe(t, generator) | dict(shrink=torch.tensor(0.5))

def target(name, t, facts):
    return study.make_target(name, t, torch.arange(len(t)), facts)

def others(t, m):
    """(N, K - 1): the values of the other classes, in the order of the classes."""
    return t[torch.arange(t.shape[1]) != m[:, None]].view(len(t), -1)

# ------------------------------------------------------------------------------------ Targets

@pytest.mark.parametrize('k, ties', CASES)
def test_manipulations_keep_what_they_should(k, ties):
    t, facts = logits(k, ties)
    m, odds = t.argmax(1), study.log_odds(t, t.argmax(1))
    largest = t.gather(1, m[:, None])[:, 0]
    made = {name: target(name, t, facts)[0] for name in study.TARGETS}
    for name in ('M0', 'M4', 'M5', 'M6', 'M8'):  # the largest logit
        assert torch.equal(made[name].gather(1, m[:, None])[:, 0], largest), name
    for name in ('M0', 'M4', 'M5', 'M6', 'M8', 'M12'):  # confidence; M12's is another image's
        found = study.log_odds(made[name], m)
        for c in m.unique():
            a, b = ((v[m == c].sort()[0] if name == 'M12' else v[m == c]) for v in (found, odds))
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    for name in ('M6', 'M8'):  # all values
        assert torch.equal(made[name].sort(1)[0], t.sort(1)[0]), name
    for name in ('M11', 'M12'):  # the others
        assert torch.equal(others(made[name], m), others(t, m)), name
    for name in ('M4', 'M16'):  # nothing of the others
        assert others(made[name], m).std(1, unbiased=False).max() < 1e-5, name
    for name in ('M11', 'M16'):
        p = study.log_odds(made[name], m).sigmoid()
        mean = odds.sigmoid().mean().expand_as(p)
        torch.testing.assert_close(p, mean, atol=1e-5, rtol=1e-5)
    assert torch.equal(made['M17'], 0.5 * t) and torch.equal(made['STD'], t)
    torch.testing.assert_close(made['M5'].topk(2, 1)[0], t.topk(2, 1)[0])
    if not ties:
        torch.testing.assert_close(target('M6', made['M6'], facts)[0], t)
        order = others(facts['mean'][m], m).argsort(1)
        assert torch.equal(others(made['M8'], m).argsort(1), order)

def test_the_class_mean_is_that_of_centred_logits():
    t, facts = logits(10, False)
    m = t.argmax(1)
    for c in m.unique():
        expected = (t - t.mean(1, keepdim=True))[m == c].mean(0)
        torch.testing.assert_close(facts['mean'][c], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(target('M7', t, facts)[0], facts['mean'][m])

def test_borrowed_confidence_may_change_the_prediction_and_is_noticed():
    t, facts = logits(10, False)
    found, same = target('M12', t, facts)
    assert 0 < (~same).sum() < len(t) // 2
    assert torch.equal(same, found.argmax(1) == t.argmax(1))
    for name in study.TARGETS.keys() - {'M11', 'M12'}:
        assert target(name, t, facts)[1].all(), name

def test_a_changed_row_is_another_student(monkeypatch):
    prints = {name: study.fingerprint(name) for name in study.TARGETS}
    assert len(set(prints.values())) == len(prints) - 1  # STD is M0 of another teacher
    assert prints == {name: study.fingerprint(name) for name in study.TARGETS}
    monkeypatch.setitem(study.TARGETS, 'M0', ('robust', lambda t, m, c: 1.01 * t, ''))
    assert study.fingerprint('M0') != prints['M0']

@pytest.mark.parametrize('temperature', (1.0, 5.0))
def test_the_gradient_of_the_loss(temperature):
    """d/dz T^2 KL(p || softmax(z / T)) = T (softmax(z / T) - p)."""
    t = logits(10, False)[0].double()
    z = (t.flip(0) * 2).requires_grad_()
    study.distil_loss(z, t / temperature, temperature).sum().backward()
    expected = temperature * ((z / temperature).softmax(1) - (t / temperature).softmax(1))
    torch.testing.assert_close(z.grad, expected.detach(), atol=1e-5, rtol=1e-5)

# ------------------------------------------------------------------------------------- Theory

@pytest.mark.parametrize('norm', ('linf', 'l2'))
@pytest.mark.parametrize('k', (2, 3, 10))
def test_the_linear_radius_is_the_distance_to_the_boundary_of_linear_logits(k, norm):
    torch.manual_seed(k)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, k))
    x = torch.rand(30, 3, 2, 2)
    y = model(x).argmax(1)
    gap, slope = study.linear_radius(model, x, y, norm)
    w, flips = model[1].weight.detach(), torch.zeros(2, len(y), dtype=torch.bool)
    for j in range(k):  # the steepest way to each class, a little too short and far enough
        d = w[j] - w[y]
        size = d.norm(dim=1, keepdim=True).clamp(min=1e-9)
        step = (d.sign() if norm == 'linf' else d / size).view_as(x)
        for i, factor in enumerate((0.999, 1.001)):
            radius = (factor * gap / slope).view(-1, 1, 1, 1)
            flips[i] |= model(x + radius * step).argmax(1) != y
    assert not flips[0].any() and flips[1].all()
    assert all(p.requires_grad for p in model.parameters())

def test_the_best_scale_of_two_classes_is_known():
    """Margins of 1, a share r of them violated: s = log((1 - r) / r)."""
    margin = torch.where(torch.arange(100) < 20, -1.0, 1.0)
    z = torch.stack((margin, torch.zeros(100)), 1)
    y = torch.zeros(100, dtype=torch.int64)
    weights = torch.ones(2, 100, dtype=torch.float64)
    weights[1, 20:] /= 2  # 20 against 40: r = 1/3
    found = study.best_scale(z, y, weights)
    torch.testing.assert_close(found.tolist(), [math.log(4), math.log(2)])
    assert study.best_scale(z.abs(), y, weights)[0] > 999  # all are right

def test_the_best_scale_against_brute_force():
    z = logits(10, True)[0]
    y = torch.where(torch.arange(len(z)) % 3 > 0, z.argmax(1), 0)
    grid = torch.linspace(0.01, 3, 3000, dtype=torch.float64)
    loss = torch.stack([torch.nn.functional.cross_entropy(s * z.double(), y) for s in grid])
    found = study.best_scale(z, y, torch.ones(1, len(z), dtype=torch.float64))
    assert abs(found - grid[loss.argmin()]) < 0.002

# ------------------------------------------------------------------------------------ Verdicts

def made_up(gap=2.0, robust_scale=1.0, agree=0.2, lost=0.3, learned=0.1, natural=1.0, seeds=1):
    """Results: robust logits smaller by `gap`, students below M0 by `lost`, and so on."""
    rng, n = np.random.default_rng(0), 300
    y = np.arange(n) % 10
    noise = {name: rng.normal(size=n) for name in ('standard', 'robust')}
    noise['robust'] = agree * noise['standard'] + (1 - agree) * noise['robust']
    small = {'standard': 0.0, 'robust': gap}
    out = dict(config=dict(seeds=list(range(seeds)), norm='linf', eps=8 / 255), radius='eps 4/255',
               labels=y, classes=list(range(10)), logits={}, theory={}, runs={})

    def arm(make):
        return {f's{seed}': make() for seed in range(seeds)}

    for name in study.NETWORKS:
        kind = name.strip("'")
        out['logits'][name] = arm(lambda: dict(
            centred=8 + noise[kind] - small[kind], gap=5 + noise[kind] - small[kind],
            odds=noise[kind] + 0.1 * rng.normal(size=n), right=rng.random(n) < 0.98))
    for name, scale, slope in (('standard', 0.1, 500), ('robust', robust_scale, 500 / 2**gap)):
        out['theory'][name] = arm(lambda: dict(
            gap=5 - small[name] + rng.random(n), slope=slope * (1 + rng.random(n)),
            best=scale * rng.normal(1, 0.01, 201)))
    rates = dict(standard=0.1, robust=0.9, M0=0.5) | dict.fromkeys(
        ('M4', 'M7', 'M8', 'M12', 'M17'), 0.5 - lost)
    for name, rate in rates.items():
        out['runs'][name] = arm(lambda: dict(
            correct=dict(natural=rng.random(n) < natural, worst=rng.random(n) < rate),
            masking={'zero gradients': 0.0}, target=dict(learned=learned)))
    return out

def verdicts(results, tmp_path):
    common.judge(study.claims(results), results, tmp_path)
    return [row['verdict'].partition(':')[0] for row in results['claims']]

def test_verdicts(tmp_path):
    assert verdicts(made_up(seeds=2), tmp_path) == ['supported'] * 10
    found = verdicts(made_up(gap=-2.0, robust_scale=0.3, agree=1.0, lost=-0.3), tmp_path)
    assert found == ['contradicted'] * 5 + ['supported'] + ['contradicted'] * 3 + ['supported']
    assert verdicts(made_up(lost=0.0), tmp_path)[6] == 'inconclusive'
    assert verdicts(made_up(learned=0.5), tmp_path)[9] == 'contradicted'
    assert verdicts(made_up(natural=0.1), tmp_path)[5:] == ['uninformative'] * 5
    results = made_up()
    results['runs']['M4']['s0']['masking']['zero gradients'] = 0.5
    assert 'M4: zero gradients' in study.claims(results)[9].text
    results['runs']['M0'] = results['runs']['standard']  # nothing to lose
    assert verdicts(results, tmp_path)[5:9] == ['inconclusive'] + ['uninformative'] * 3

def test_resampling_pairs_images_and_uses_seeds():
    a = np.random.default_rng(0).random((2, 200))
    value, low, high = common.resample(lambda u, v: (u - v).mean(), a, a - 0.1)
    assert low == pytest.approx(value) == pytest.approx(high) == pytest.approx(0.1)
    apart = np.stack((np.zeros(200), np.ones(200)))
    assert common.resample(np.mean, apart)[1:] == (0.0, 1.0)

# --------------------------------------------------------------------------------- End to end

TINY = ('--arch lenet5 --train-size 60 --test-size 20 --epochs 1 --distil-epochs 1 --batch-size 20 '
        '--suite short --students M0 M4 M12 M17').split()

def test_a_tiny_study_is_whole_and_not_repeated(tmp_path, monkeypatch):
    command = [*TINY, '--out', str(tmp_path), '--seeds', '0', '1']
    study.main(command)
    [folder] = (tmp_path / 'logit_distill').iterdir()
    assert len(list(folder.glob('fig*.png'))) == 5
    models = {p: p.stat().st_mtime_ns for p in (tmp_path / 'models').iterdir()}
    assert len(models) == 6 + 2 * 4  # seeds 0, 1, 2 of both networks, and the students
    run = common.load_results(folder)['runs']['M12']['s1']
    assert set(run['correct']) == {'natural', 'fgsm', 'pgd', 'margin', 'worst'}
    assert set(run['target']) == {'confidence', 'centred', 'gap', 'left_out', 'learned'}
    claims = (folder / 'claims.md').read_text()
    monkeypatch.setattr(study, 'draw', lambda results, folder: None)
    monkeypatch.setattr(study, 'study', None)
    for again in (command, ['--plot-only', str(folder)]):
        study.main(again)
        assert claims == (folder / 'claims.md').read_text()

def test_class_folders_with_crops_and_flips_and_a_cold_start(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (('train', 16), ('val', 4)):
        for name in ('cat', 'dog', 'eel'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                image = rng.integers(256, size=(16, 16, 3), dtype=np.uint8)
                Image.fromarray(image).save(tmp_path / split / name / f'{i}.png')
    flags = '--image-size 16 --pad 2 --arch small-cnn --epochs 1 --distil-epochs 1 --steps 1'
    study.main([*flags.split(), '--batch-size', '9', '--suite', 'short', '--test-size', '12',
                '--dataset', f'folder:{tmp_path}', '--out', str(tmp_path / 'runs')])
    [folder] = (tmp_path / 'runs' / 'logit_distill').iterdir()
    assert len(list(folder.glob('fig*.png'))) == 5

@pytest.mark.parametrize('flags, words', [
    ('--temperature 0', '--temperature'), ('--distil-epochs 0', '--distil-epochs'),
    ('--judged 0', '--judged'), ('--judged 4', '--judged'), ('--students M99', 'M99')])
def test_bad_flags_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        study.main(flags.split())
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and words in text and len(text.splitlines()) == 1
