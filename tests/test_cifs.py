"""cifs.py: masks against autograd, label rule, joint losses, verdicts, the study end to end."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

import cifs
import common

X = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6)
THREAT = dict(eps=8 / 255, step_size=4 / 255, steps=2, norm='linf')

def layer(hidden=7, k=2, imgf='softmax', total=0.0):
    torch.manual_seed(3)
    mask = cifs.Mask(5, 10, hidden, k, imgf, total).double()
    for p in mask.parameters():
        torch.nn.init.normal_(p)
    return mask.eval()

def network(arm='cifs', total=0.0, arch='small-cnn'):
    """A network of an arm whose probes look trained, in eval mode."""
    spec = cifs.CIFS | cifs.ARMS[arm] | dict(total=total)
    model = cifs.build(spec, None, arch, 10, (3, 32, 32), 0)
    torch.manual_seed(0)
    for mask in cifs.masks_of(model):
        for p in mask.parameters():
            torch.nn.init.normal_(p, 0, 0.5)
    return (model if spec['places'] else cifs.Masked(model)).eval()

# ----------------------------------------------------------------------------------- The mask

@pytest.mark.parametrize('hidden', (0, 7))
@pytest.mark.parametrize('k', (1, 2, 3))
def test_relevance_is_the_gradient_of_the_chosen_logits(hidden, k):
    mask, pooled = layer(hidden, k), torch.rand(4, 5).double().requires_grad_()
    chosen = mask.probe(pooled).topk(k, 1).indices
    gradient = torch.autograd.grad(mask.probe(pooled).gather(1, chosen).sum(), pooled)[0]
    assert torch.allclose(mask.relevance(pooled, chosen), gradient, atol=1e-5)

def by_autograd(mask, z, chosen, exact):
    """The layer as the paper writes it: the mask is made of a gradient."""
    pooled = z.mean((2, 3)) if exact else z.detach().mean((2, 3)).requires_grad_()
    logits = mask.probe(pooled).gather(1, chosen)
    g = torch.autograd.grad(logits.sum(), pooled, create_graph=True)[0]
    return 5 * F.softmax(g, 1)[:, :, None, None] * z

@pytest.mark.parametrize('hidden', (0, 7))
@pytest.mark.parametrize('exact', (False, True))
def test_gradients_with_and_without_the_mask(hidden, exact):
    mask, weights = layer(hidden), torch.rand(4, 5, 2, 2).double()
    z = torch.rand(4, 5, 2, 2).double().requires_grad_()
    chosen = mask.probe(z.mean((2, 3))).topk(2, 1).indices
    mask.exact = exact
    outputs = mask(z), by_autograd(mask, z, chosen, exact)
    assert torch.allclose(*outputs)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), (z, mask.out.weight))
                    for out in outputs)
    for a, b in zip(ours, theirs):  # the probe learns from the mask in both
        assert torch.allclose(a, b, atol=1e-8) and a.abs().max() > 0

LOGITS = torch.tensor([[0.0, 3, 2, 1], [5, 1, 2, 3]])

@pytest.mark.parametrize('k,labels,training,expected', (
    (2, None, True, [[1, 2], [0, 3]]),  # the two likeliest
    (2, [0, 2], False, [[1, 2], [0, 3]]),  # no labels in eval mode: attacks and tests
    (2, [0, 2], True, [[0, 2], [2, 3]]),  # the label and the second; the first is left out
    (2, [2, 3], True, [[2, 2], [3, 3]]),  # the label is the second: counted twice
    (1, [3, 1], True, [[3], [1]]), (3, [0, 0], True, [[0, 2, 3], [0, 3, 2]])))
def test_label_rule(k, labels, training, expected):
    mask, seen = cifs.Mask(4, 4, 0, k, 'softmax', 2.0).train(training), []
    torch.nn.init.eye_(mask.out.weight)
    torch.nn.init.zeros_(mask.out.bias)
    mask.relevance = lambda pooled, chosen: seen.append(chosen) or pooled
    mask.labels = None if labels is None else torch.tensor(labels)
    mask(LOGITS[:, :, None, None])
    assert seen[0].tolist() == expected

def test_sum_and_mean_of_masks():
    g = torch.randn(3, 8)
    assert torch.allclose(cifs.IMGF['softmax'](g, 2.0).sum(1), torch.tensor(2.0))
    assert torch.allclose(cifs.IMGF['softmax'](g, 0.0).mean(1), torch.tensor(1.0))

# ------------------------------------------------------------------------------- The network

def test_copies_leave_no_graph_behind():
    model = network()
    logits = model(X.requires_grad_())
    assert all(mask.seen is None for mask in cifs.masks_of(model))
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(cifs.masks_of(twin)[0].out.weight)
    assert all(torch.equal(a, b) for a, b in zip(logits, model(X)))
    assert not torch.equal(twin(X)[0], logits[0])

def test_parameters_of_the_probes_are_the_authors():
    plain, masked = (sum(p.numel() for p in network(arm, arch='resnet18').parameters())
                     for arm in ('vanilla', 'cifs'))
    assert masked - plain == 66_954 + 5_130

@pytest.mark.parametrize('training', (False, True))
def test_attacks_leave_the_network_as_it_was(training):
    model = network().train(training)
    before = copy.deepcopy(model.state_dict())
    args = common.parse(common.make_parser('', {'*': dict(warm_start=0)}, []), [])
    vars(args).update(apgd_steps=2, targets=1, square_queries=2)
    with cifs.masking(model, labels=Y):  # as in training, where eval mode hides the labels
        for attack in list(cifs.suite(args).values()):
            attack(model, X.detach(), Y, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training == training for m in model.modules())
    assert all(m.labels is None and not m.exact for m in cifs.masks_of(model))

def test_masks_are_told_the_labels_without_touching_batch_norm():
    class Data:
        test = (X.detach() * 255).byte(), Y

    model, seen = network(), []
    before, mask = copy.deepcopy(model.state_dict()), cifs.masks_of(model)[1]
    relevance = mask.relevance
    mask.relevance = lambda pooled, chosen: seen.append(chosen[:, 0]) or relevance(pooled, chosen)
    assert cifs.told(model, Data).shape == (6,) and seen[0].equal(Y)
    model(X)
    assert not seen[1].equal(Y) and not any(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

# ------------------------------------------------------------------------------------- Losses

def test_joint_loss_weighs_the_probes():
    heads, y = tuple(torch.randn(4, 10) for _ in range(3)), torch.arange(4)
    final, one, two = (F.cross_entropy(h, y, reduction='none') for h in heads)
    assert torch.allclose(cifs.joint(common.cross_entropy, 10)(heads, y), final + 5 * (one + two))
    assert torch.allclose(cifs.joint(common.cross_entropy)(heads[:1], y), final)
    kl = cifs.joint(common.kl_divergence)(heads, heads[::-1])
    each = [common.kl_divergence(a, b) for a, b in zip(heads, heads[::-1])]
    assert torch.allclose(kl, sum(each))

@pytest.mark.parametrize('method,told', (
    ('pgd', True), ('fat', True), ('trades', False), ('mart', False)))
def test_labels_make_the_masks_where_no_divergence_compares(method, told):
    losses = [cifs.joint_loss(method, 2.0, labels)(
        network().train(), X.detach(), Y, THREAT, torch.Generator().manual_seed(0))
        for labels in (True, False)]
    assert (losses[0].item() != losses[1].item()) == told
    losses[0].backward()

# ----------------------------------------------------------------------------- Measures, claims

def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    z, weight, y = rng.random((6, 20)), rng.normal(size=(3, 20)), np.array([0, 1, 2, 0, 1, 2])
    rho = cifs.relevance_rank(z, weight, y)
    for i, k in enumerate(y):
        positive = weight[k] > 0
        assert rho[i] == pytest.approx(spearmanr(z[i, positive], weight[k, positive])[0], abs=1e-9)

N = 400
RNG = np.random.default_rng(1)
CLASS = np.arange(N) % 10

def made_up(natural=0.9, best=0.5, last=0.4, final=0.5, epoch=2, over=0.5, mask=(0.5, 0.3)):
    """A run whose accuracies are these rates."""
    def rate(p):
        return RNG.permutation(N) < p * N
    names = ('probe', 'targets', 'apgd_ce', 'apgd_t', 'square', 'worst', 'pgd100')
    noise = RNG.normal(0, 0.01, N)
    act = dict(gap=0.2 + noise, over=over + noise, rho=CLASS / 10 + noise,
               masks={'mask 1': dict(before=mask[0] + noise, after=mask[1] + noise)})
    correct = {name: rate(best) for name in names}
    return dict(correct=correct | dict(natural=rate(natural), final=rate(final)),
                correct_last={name: rate(last) for name in names} | dict(natural=rate(natural)),
                told=rate(natural), detached=correct['apgd_ce'], activations=act,
                masking={name: 0.0 for name in common.MASKING}, best_epoch=epoch)

def verdicts(told=1, **arms):
    runs = {arm: {f's{seed}': made_up(**rates) for seed in range(3)}
            for arm, rates in arms.items()}
    results, out = dict(config=dict(epochs=4), labels=CLASS, runs=runs), {}
    for c in cifs.claims(results | dict(standard=dict(
            gap=np.full(N, 1.2), told=np.full(N, told)))):
        value, low, high = (0, *c.interval) if c.interval else common.bootstrap(c.effect, 200)
        out[c.text.split()[0]] = c.unless or ('yes' if low > c.above else
                                              'no' if high < c.above else 'open')
    return out

@pytest.mark.parametrize('verdict,claims,arms', (
    ('yes', ('V1', 'V2', 'V5', 'V6', 'V8', 'V9', 'V14'),
     dict(vanilla=dict(last=0.3), cifs=dict(last=0.48), cas=dict(best=0.3, final=0.6))),
    ('no', ('V2', 'V5', 'V6', 'V7', 'V8', 'V9', 'V14'),
     dict(vanilla=dict(best=0.6, last=0.6, over=-0.5), cas=dict(best=0.7, final=0.5),
          cifs=dict(best=0.5, last=0.3, mask=(0.3, 0.5))))))
def test_verdicts(verdict, claims, arms):
    found = verdicts(**arms)
    assert {name: found[name] for name in claims} == dict.fromkeys(claims, verdict)

def test_what_cannot_be_learnt_is_not_judged():
    found = verdicts(vanilla=dict(epoch=4), cifs={})
    assert found['V6'] == found['V14'] == 'not testable at this length'
    assert found['V7'] in ('yes', 'no', 'open') and 'V8' not in found
    found = verdicts(vanilla={}, cifs=dict(natural=0.1))
    assert found['V6'] == found['V7'] == 'accuracy near chance' and found['V2'] == 'yes'
    assert verdicts(told=0.1, vanilla={})['V1'] == 'accuracy near chance'

# ------------------------------------------------------------------------------------ End to end

TINY = ['--train-size', '40', '--test-size', '20', '--epochs', '1', '--warm-start', '1',
        '--image-size', '16', '--batch-size', '20', '--apgd-steps', '2', '--targets', '1',
        '--square-queries', '2', '--device', 'cpu', '--arms', 'vanilla', 'cas', 'cifs']

def test_study_runs_and_redraws(tmp_path, monkeypatch):
    cifs.main([*TINY, '--out', str(tmp_path)])
    folder = next((tmp_path / 'cifs').iterdir())
    assert len(list(folder.glob('*.png'))) == 5
    assert 'CIFS above CAS' in (folder / 'claims.md').read_text()
    for name in ('train_epoch', 'input_gradient', 'square'):
        monkeypatch.delattr(common, name)  # nothing is computed again
    cifs.main([*TINY, '--out', str(tmp_path)])

def test_vanilla_is_the_network_of_the_other_studies(monkeypatch):
    seen, args = [], common.make_parser('', cifs.DEFAULTS, []).parse_args([])
    monkeypatch.setattr(common, 'train', lambda *a, extra, loss_fn, **options: seen.append(
        (a[2], extra, loss_fn)))
    monkeypatch.setattr(common, 'restore', lambda *a: torch.nn.Identity())
    cifs.train_arm(args, None, 'vanilla', 0, 'cpu')
    assert seen == [('pgd', {}, None)]

def test_a_network_without_places_is_refused(capsys):
    with pytest.raises(SystemExit):
        cifs.main(['--arch', 'lenet5'])
    assert 'no places for masks in lenet5' in capsys.readouterr().err
