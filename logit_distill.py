"""The logits of robust CNNs, and what a student learns from them on clean images alone.

Question   Adversarial training lowers the largest logit and its distance to the others. A
           student that copies a robust teacher's logits on clean images becomes somewhat
           robust. Which part of the logits teaches that: small logits, which samples are
           confident, the order of the wrong classes?
Paper      Seguin, Ndirango, Mishra, Chung, Lee. Understanding the logit distributions of
           adversarially-trained deep neural networks. arXiv 2108.12001, 2021.
Method     Teachers: standard (STD) and adversarial (AT) training. Students: the same network
           from other initial weights, trained on clean images to match the AT teacher's
           logits after one manipulation each (M0-M19; only LSQ sees labels). Equal steps,
           schedule and order for all. R(M) = (RA_M - RA_STD) / (RA_AT - RA_STD) is the share
           of the teacher's robustness that student M keeps; RA is worst-case accuracy, on
           shapes at half the teacher's eps (--judged).
Usage      python logit_distill.py                              shapes, minutes on a laptop
           python logit_distill.py --dataset cifar10            ResNet-18, one GPU
           python logit_distill.py --students all --seeds 0 1 --distil-epochs 60
           python logit_distill.py --students M0 M0/T5 M0/mse M4 M4/T5    other objectives
Outputs    runs/logit_distill/<dataset>-<arch>/: results.json, metrics.csv, claims.md and
           fig1_logits  fig2_theory  fig3_disagreement  fig4_gallery  fig5_targets
           fig6_students  fig7_lengths  fig8_classes  fig9_eps  fig10_learned
           (each .png and .pdf)
Not known  Only the paper's abstract was at hand when this was written. Its claims are quoted
           from there; its theorem, settings, manipulations and numbers are not known, so the
           theory tested here, M0-M19, every test and threshold are ours unless a source is
           named. Claims about students that were not trained (--students) are left out.
"""

import argparse
import copy
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import mannwhitneyu, rankdata

import common
from common import bootstrap, claim, effect_verdict, final_logits, unpack

# Distillation: KL at T = 1 without labels, SGD as for the teachers (ours; Goldblum et al. 2020
# distil for 200 epochs at T = 30). Attacks: PGD-50 on the margin with 10 restarts beside
# AutoAttack's own numbers; shapes is small to keep the study within minutes.
DEFAULTS = {
    '*': dict(
        students='M0 M1 M2 M4 M5 M6 M7 M8 M11 M12 M16 M17 STD SA AS M0/mse M2/mse M4/mse'.split(),
        distil_epochs=200,
        judged=1.0,
        test_size=1000,
        logit_images=10000,
        margin_steps=50,
        restarts=10,
        apgd_steps=100,
        targets=9,
        square_queries=5000,
    ),
    'shapes': dict(
        students='M0 M1 M2 M4 M6 M7 M11 M12 M16 M17 STD SA AS M0/mse M2/mse M4/mse'.split(),
        distil_epochs=16,
        judged=0.5,
        test_size=250,
        logit_images=2000,
        margin_steps=25,
        restarts=1,
        apgd_steps=25,
        targets=3,
        square_queries=100,
    ),
}
RUNGS = (0.25, 0.5)  # of eps: further teachers, for the dose response
LENGTHS = (1 / 9, 1 / 3)  # of the distillation: shorter ones, each complete
LENGTH_STUDENTS = ('M0', 'M2', 'M4', 'M11')
# Of the teacher's eps: where students are attacked. --judged is the one that the claims are
# about: eps itself, but half of it on shapes, where in a first trial M0 kept 45 % at 4/255 and
# 2 % at 8/255; where nothing is left, nothing can be compared.
RADII = (0.5, 1.0)
EVERY = ('fgsm', 'pgd20', 'margin')  # attacks that every image faces
DRAWS = 2000  # of the bootstrap
REDRAWS = 32  # of a random target, to average what can be learned
GALLERY = 10  # images per row
TARGETS_VERSION = 1  # raise it when a change of this file changes a student

# Thresholds of the claims, fixed before any run unless said otherwise.
MONOTONE = 0.9  # V3
SCALE_NEAR_ONE, ATTACKED_SCALE = (0.8, 1.25), 0.5  # V4
RADIUS_POINTS = 0.10  # V5
DISAGREE = 0.05  # V6
TRANSFER = 0.15  # V9
SHRINK_ONLY = 0.25  # V10
MATTERS, ESSENTIAL = 0.2, 0.75  # V11-V12: share of R(M0) lost
COMPLEX = 0.5  # V14
DOSE = 0.8  # V15
NATURAL_GAP = 0.02  # V16
# V0: means against the target's. The log-odds had 10 % at first; a first run at 18 epochs had
# half of all students 10 to 17 % below, for the surest images weigh least and are learned last.
# Where the mean log-odds are below 1 the share is of 1: on CIFAR-10 they are near 0.
LEARNED = {'confidence': 0.10, 'log-odds': 0.20}
# These three came with a review, after the first runs.
KL_SHARE = 0.25  # V0: of the KL of one constant answer to all images
SQUEEZED = 0.20  # V0: mean centred maximum of LSQ against the teacher's
CONVERGED = 0.10  # gain of R(M0) from a third of the length, at most
BASE = 0.10  # R(M0) below which nothing can be lost
# Standard deviation of the accuracy of retrained students, / sqrt(p (1 - p)): what all students
# of a seed share, and what each has of its own. Measured on shapes, see docs/results.
RETRAINED = {'all': 0.15, 'each': 0.10}

NAMES = {
    'M0': 'intact',
    'M1': 'others permuted, afresh',
    'M2': 'others permuted, per sample',
    'M3': 'others permuted, per class',
    'M4': 'others flat',
    'M5': 'runner-up kept, rest flat',
    'M6': 'others reversed',
    'M7': 'class mean',
    'M8': 'own values, class-mean order',
    'M9': 'own order, mean values',
    'M10': 'runner-up swapped',
    'M11': 'constant confidence',
    'M12': 'confidence shuffled',
    'M13': 'constant largest logit',
    'M14': 'constant gap',
    'M15': 'class Gaussians',
    'M16': 'label smoothing',
    'M17': 'STD, gap of AT',
    'M18': 'hard label, weighted by confidence',
    'M19': 'hard label',
    'K2': 'two wrong classes kept',
    'K3': 'three wrong classes kept',
    'K5': 'five wrong classes kept',
    'STD': 'teacher, intact',
    'AS': "AT's confidence, STD's others",
    'SA': "STD's confidence, AT's others",
    'LSQ': 'logit squeezing',
}
KEPT = {'M4': 0, 'M5': 1, 'K2': 2, 'K3': 3, 'K5': 5}  # wrong classes that keep their logit
FROM_STD = ('M17', 'STD', 'AS', 'SA')  # need the STD teacher's logits
RANDOM = ('M1', 'M2', 'M10', 'M12', 'M15')  # targets drawn for every image


# ------------------------------------------------------------------- the method: logits


def log_odds(t, m):
    """log p_m / (1 - p_m) of softmax(t): (N,). t: (N, K); m: (N,). Ranks as the confidence
    p_m does, without its saturation at 1."""
    others = t.scatter(1, m[:, None], -math.inf)
    return t.gather(1, m[:, None])[:, 0] - others.logsumexp(1)


def logit_measures(z):
    """Of logits (N, K): largest, largest minus the mean (a shift of all logits, which no
    training sees, drops out), gap to the runner-up, log-odds of the prediction: each (N,)."""
    top = z.topk(2, 1)[0]
    return dict(
        largest=top[:, 0], centred=top[:, 0] - z.mean(1), gap=top[:, 0] - top[:, 1], odds=log_odds(z, z.argmax(1))
    )


def linear_radius(model, x, y, norm='linf'):
    """(radius, logit gap, gradient gap), each (N,): the smallest (z_y - z_j) / ||grad z_y -
    grad z_j||_1 over j != y, and its two parts (Shafahi et al. 2019, eq. 4; l2: the 2-norm).

    Were the logits linear in x, a perturbation beyond this radius would suffice.
    """
    with common.frozen(model):
        x = x.detach().requires_grad_()
        z = final_logits(model(x))
        gradients = torch.stack(
            [torch.autograd.grad(z[:, j].sum(), x, retain_graph=True)[0].flatten(1) for j in range(z.shape[1])], 1
        )
    rows = torch.arange(len(y), device=x.device)
    size = torch.linalg.vector_norm(gradients[rows, y][:, None] - gradients, dim=2, ord=1 if norm == 'linf' else 2)
    gap = z.detach().gather(1, y[:, None]) - z.detach()
    radius = (gap / size.clamp(min=1e-12)).scatter(1, y[:, None], math.inf)
    j = radius.argmin(1)
    return radius[rows, j], gap[rows, j], size[rows, j]


def best_scale(z, y, largest=1e3):
    """The s > 0 that minimises the mean cross-entropy of s z: inf where it falls for ever,
    which it does when every image is classified correctly. z: (N, K); convex in s. Searched
    between 0.001 and `largest`."""
    z = z.double()
    others = z.scatter(1, y[:, None], -math.inf).amax(1)
    if (z.gather(1, y[:, None])[:, 0] > others).all():
        return math.inf
    found = minimize_scalar(
        lambda log_s: F.cross_entropy(math.exp(log_s) * z, y).item(),
        bounds=(math.log(1e-3), math.log(largest)),
        method='bounded',
        options=dict(xatol=1e-6),
    )
    return math.exp(found.x)


def scale_bound(z, y):
    """An upper bound on `best_scale`, from the violations alone.

    If a share r of the images has max_j z_j - z_y >= gamma > 0, then
    s* <= ((1 - r)(K - 1) / e + 2 r log K) / (r gamma). The least over all gamma; inf without
    violations. Ours, not the paper's theorem: a right answer pulls the scale up by at most
    (K - 1) / (e s), a violation pulls it down by gamma - 2 log K / s.
    """
    violation = common.margin(z.double(), y).sort(descending=True)[0]
    violation = violation[violation > 0]
    r = torch.arange(1, len(violation) + 1, dtype=torch.float64, device=z.device) / len(y)
    k = z.shape[1]
    bounds = ((1 - r) * (k - 1) / math.e + 2 * r * math.log(k)) / (r * violation)
    return bounds.min().item() if len(bounds) else math.inf


def looks(x):
    """What can be measured about an image without a network: {name: (N,)}. x: (N, C, H, W)."""
    if not len(x):  # of which some Fourier transforms would make an error
        return {k: v[:0] for k, v in looks(x.new_zeros(1, *x.shape[1:])).items()}
    grey = x.mean(1)
    centred = grey - grey.mean((1, 2), keepdim=True)
    power = torch.fft.fft2(centred).abs() ** 2
    fy, fx = torch.meshgrid(
        torch.fft.fftfreq(grey.shape[1], device=x.device),
        torch.fft.fftfreq(grey.shape[2], device=x.device),
        indexing='ij',
    )
    high = torch.maximum(fy.abs(), fx.abs()) > 0.25
    dy, dx = grey[:, 1:, :-1] - grey[:, :-1, :-1], grey[:, :-1, 1:] - grey[:, :-1, :-1]
    rim = max(1, grey.shape[1] // 8)
    border = torch.ones_like(grey[0], dtype=torch.bool)
    border[rim:-rim, rim:-rim] = False
    return {
        'high frequencies': power[:, high].sum(1) / power.sum((1, 2)).clamp(min=1e-12),
        'edges': (dy**2 + dx**2).sqrt().mean((1, 2)),
        'contrast': grey.std((1, 2)),
        'background variance': grey[:, border].var(1),
    }


# ---------------------------------------------------------- the method: manipulated targets

# Each takes logits t (N, K), already divided by the temperature, and m (N,), the class that
# the teacher predicts, and returns logits (N, K). "Others" are the classes other than m.


def ranked(t, m):
    """(classes, values), each (N, K): m first, then the others from largest to smallest."""
    order = t.scatter(1, m[:, None], math.inf).argsort(dim=1, descending=True, stable=True)
    return order, t.gather(1, order)


def place(classes, values):
    """Logits that have these values at these classes, each (N, K)."""
    return torch.empty_like(values).scatter_(1, classes, values)


def permute_others(t, m, u):
    """The others change places, in the order of the random numbers u (N, K)."""
    classes, values = ranked(t, torch.as_tensor(m))
    order = u[:, 1:].argsort(1) + 1
    return place(classes, torch.cat((values[:, :1], values.gather(1, order)), 1))


def flatten_others(t, m, keep=0):
    """All others but the `keep` largest become equal, their share of softmax(t) unchanged:
    the log of their mean exponential. The arithmetic mean would raise the confidence."""
    classes, values = ranked(t, m)
    tail = values[:, 1 + keep :]
    if tail.shape[1] == 0:
        return t.clone()
    level = tail.logsumexp(1, keepdim=True) - math.log(tail.shape[1])
    return place(classes, torch.cat((values[:, : 1 + keep], level.expand_as(tail)), 1))


def reverse_others(t, m):
    """The largest other changes places with the smallest, and so on."""
    classes, values = ranked(t, m)
    return place(classes, torch.cat((values[:, :1], values[:, 1:].flip(1)), 1))


def reorder_others(t, m, scores):
    """The same values, but the others ranked as in scores (N, K)."""
    return place(ranked(scores, m)[0], ranked(t, m)[1])


def with_profile(t, m, profile):
    """The same order, but the values of profile (K,), from m to the smallest other."""
    return place(ranked(t, m)[0], profile.expand_as(t))


def swap_runner_up(t, m, u):
    """The runner-up changes places with a random one of the classes behind it; u: (N,)."""
    classes, values = ranked(t, m)
    k = t.shape[1]
    other = (2 + (u * (k - 2)).long()).clamp(max=k - 1)[:, None]
    swapped = values.scatter(1, other, values[:, 1:2])
    swapped[:, 1:2] = values.gather(1, other)
    return place(classes, swapped)


def with_odds(t, m, odds):
    """The others as they are, m moved so that the log-odds of its probability are odds, a
    number or (N,)."""
    others = t.scatter(1, m[:, None], -math.inf).logsumexp(1)
    return t.scatter(1, m[:, None], (others + odds)[:, None])


def with_gap(t, m, gap):
    """The others as they are, m moved to lie `gap` above the largest of them."""
    others = t.scatter(1, m[:, None], -math.inf).amax(1)
    return t.scatter(1, m[:, None], (others + gap)[:, None])


def with_largest(t, m, height):
    """The others as they are, m moved to lie `height` above their mean."""
    others = (t.sum(1) - t.gather(1, m[:, None])[:, 0]) / (t.shape[1] - 1)
    return t.scatter(1, m[:, None], (others + height)[:, None])


def hard(t, m):
    """All probability on m."""
    return 1e4 * F.one_hot(m, t.shape[1]).to(t.dtype)


def describe(t, s):
    """What manipulations take from a whole set of images.

    t, s: (N, K) logits of the AT and the STD teacher, divided by the temperature. Returns a
    dict of tensors: `mean` (K, K), row m the mean of the centred logits of the images read as
    m (zeros where there are none), `scatter` (K, K, K), a root of their covariance; `profile`
    (K,), the mean sorted logits; the means of log-odds, gap and height that M11, M13, M14 and
    M17 need; and `odds` and `m` of every image.
    """
    k, m = t.shape[1], t.argmax(1)
    t = t - t.mean(1, keepdim=True)
    values = ranked(t, m)[1]
    mean, scatter = torch.zeros(k, k, device=t.device), torch.zeros(k, k, k, device=t.device)
    for c in m.unique().tolist():
        rows = t[m == c]
        mean[c] = rows.mean(0)
        if len(rows) > 1:
            w, v = torch.linalg.eigh(torch.cov(rows.T.double()))
            scatter[c] = (v * w.clamp(min=0).sqrt()).float()
    confidence = torch.sigmoid(log_odds(t, m).double()).mean()
    s_top = s.topk(2, 1)[0]
    gap = (values[:, 0] - values[:, 1]).mean()
    return dict(
        m=m,
        odds=log_odds(t, m),
        mean=mean,
        scatter=scatter,
        profile=values.mean(0),
        mean_odds=torch.logit(confidence).float(),
        gap=gap,
        height=(values[:, 0] - values[:, 1:].mean(1)).mean(),
        centred=values[:, 0].mean(),
        shrink=gap / (s_top[:, 0] - s_top[:, 1]).mean(),
    )


def draw_table(whole, m, odds, generator):
    """The random numbers of every image, drawn once: row i belongs to image i.

    whole: `describe` of the training images; m, odds: of the images the table is for.
    Returns u (N, K); borrowed (N,), the log-odds of a training image with the same m; gaussian
    (N, K), logits drawn with the mean and covariance of class m (M15), again where the largest
    is not m, at most 20 times.
    """
    n, k = len(m), len(whole['mean'])
    device = m.device
    borrowed = odds.clone()
    for c in m.unique().tolist():
        rows, pool = (m == c).nonzero()[:, 0], whole['odds'][whole['m'] == c]
        order = torch.randperm(len(pool), generator=generator, device=device)
        if len(pool):  # in turn, where there are more images than the training has of class c
            borrowed[rows] = pool[order[torch.arange(len(rows), device=device) % len(pool)]]
    gaussian = torch.zeros(n, k, device=device)
    for again in range(20):
        noise = torch.randn(n, k, generator=generator, device=device)
        fresh = whole['mean'][m]
        for c in m.unique().tolist():
            fresh[m == c] += noise[m == c] @ whole['scatter'][c].T
        redraw = gaussian.argmax(1) != m if again else torch.ones_like(m, dtype=torch.bool)
        gaussian = torch.where(redraw[:, None], fresh, gaussian)
    return dict(u=torch.rand(n, k, generator=generator, device=device), borrowed=borrowed, gaussian=gaussian)


def targets(name, t, s, whole, table, fresh):
    """The logits that student `name` has to match, (N, K).

    t, s: AT and STD teacher's logits (N, K), divided by the temperature; whole: `describe` of
    the training images; table: the rows of `draw_table` of these images; fresh: a generator
    for what is drawn anew at every presentation (M1; it is that of the training, so that with
    random crops M1 sees other crops than its fellows).
    """
    m, k = t.argmax(1), t.shape[1]
    if name in KEPT:
        return flatten_others(t, m, KEPT[name])
    return {
        'M0': lambda: t,
        'M1': lambda: permute_others(t, m, torch.rand(t.shape, generator=fresh, device=t.device)),
        'M2': lambda: permute_others(t, m, table['u']),
        'M3': lambda: place(  # class c's logit goes to a class that depends on m and c alone
            _class_permutations(k, t.device)[m], t
        ),
        'M6': lambda: reverse_others(t, m),
        'M7': lambda: whole['mean'][m],
        'M8': lambda: reorder_others(t, m, whole['mean'][m]),
        'M9': lambda: with_profile(t, m, whole['profile']),
        'M10': lambda: swap_runner_up(t, m, table['u'][:, 0]),
        'M11': lambda: with_odds(t, m, whole['mean_odds']),
        'M12': lambda: with_odds(t, m, table['borrowed']),
        'M13': lambda: with_largest(t, m, whole['height']),
        'M14': lambda: with_gap(t, m, whole['gap']),
        'M15': lambda: table['gaussian'],
        'M16': lambda: flatten_others(with_odds(t, m, whole['mean_odds']), m),
        'M17': lambda: s * whole['shrink'],
        'M18': lambda: hard(t, m),
        'M19': lambda: hard(t, m),
        'STD': lambda: s,
        'AS': lambda: with_odds(s, m, log_odds(t, m)),
        'SA': lambda: with_odds(t, m, log_odds(s, s.argmax(1))),
    }[name]()


def _class_permutations(k, device):
    """(K, K): row m a permutation of the classes that leaves m where it is."""
    rows = []
    for m in range(k):
        others = torch.tensor([c for c in range(k) if c != m])
        row = torch.arange(k)
        row[others] = others[torch.randperm(k - 1, generator=common.make_generator('M3', m))]
        rows.append(row)
    return torch.stack(rows).to(device)


def expected_target(name, t, s, whole, key, kind='kl'):
    """What a student can learn of a random target, (N, K): the log of its mean probability
    over redraws, with 'mse' the mean of its logits. For M1 and M2 the mean over permutations
    is M4's target."""
    device, m = t.device, t.argmax(1)
    draws = []
    for i in range(REDRAWS if name in RANDOM else 1):
        generator = common.make_generator('expected', name, key, i, device=device)
        table = draw_table(whole, m, log_odds(t, m), generator)
        draws.append(targets(name, t, s, whole, table, generator))
    if len(draws) == 1:
        return draws[0]
    draws = torch.stack(draws)
    use = (draws.argmax(2) == m).double()[:, :, None]  # the training leaves flips out
    use = torch.where(use.sum(0) > 0, use, 1.0)
    if kind == 'mse':
        return ((use * draws).sum(0) / use.sum(0)).float()
    mean = (use * draws.double().softmax(2)).sum(0) / use.sum(0)
    return mean.clamp(min=1e-30).log().float()


def distil_loss(z, target, temperature=1.0, kind='kl'):
    """(N,): T^2 KL(softmax(target) || softmax(z / T)) (Hinton et al. 2015), or 'mse', its limit
    for T -> inf: half the mean square of the centred difference.

    z: (N, K) of the student; target: (N, K), divided by T already (mse: T = 1).
    """
    if kind == 'mse':
        difference = z.float() - target
        return 0.5 * (difference - difference.mean(1, keepdim=True)).pow(2).mean(1)
    return temperature**2 * common.kl_divergence(z.float() / temperature, target)


def squeeze_weight(height, k):
    """The lambda for which CE(z, y) + lambda |z|^2 of free logits is least where the true one
    lies `height` above the mean: with g = height K / (K - 1) the gap and p its probability,
    lambda = (1 - p) K / (2 g (K - 1)). At most 0.5, with which SGD still converges."""
    g = max(height, 1e-3) * k / (k - 1)
    wrong = 1 - 1 / (1 + (k - 1) * math.exp(-g))
    return min(wrong * k / (2 * g * (k - 1)), 0.5)


# ---------------------------------------------------------------------------- the experiment


def parse_student(text):
    """'M4', 'M4/T5' (temperature), 'M4/mse' (loss) or 'M4/again' (other initial weights and
    order) -> (name, temperature, loss, again). ValueError otherwise."""
    name, slash, option = text.partition('/')
    temperature = float(option[1:]) if option[:1] == 'T' else 1.0
    known = option in ('mse', 'again') or option[:1] == 'T' or not slash
    fits = option in ('', 'again') or name not in ('M18', 'M19', 'LSQ')  # no logits to match
    if name not in NAMES or not known or not fits or not 0 < temperature < 1e4:
        raise ValueError(text)
    return name, temperature, 'mse' if option == 'mse' else 'kl', option == 'again'


def student_name(text):
    """'M0' -> 'M0 intact'; 'M0/T5' -> 'M0 intact, T5'."""
    name, _, option = text.partition('/')
    return f'{name} {NAMES[name]}' + (f', {option}' if option else '')


def network_name(args, eps):
    """'AT 4/255' of a teacher trained at eps; 'AT' of the study's own."""
    if eps == args.eps:
        return 'AT'
    small = args.norm == 'linf' and args.eps < 0.1
    return f'AT {eps * 255:.3g}/255' if small else f'AT {eps:.3g}'


def train_networks(args, data, seed, device, rows):
    """{name: result of train_model}: STD, AT, AT at RUNGS of eps, and STD' and AT', trained
    alike from the next seed."""

    def train(method, share=1.0, seed=seed):
        own = copy.copy(args)
        own.eps, own.step_size = args.eps * share, args.step_size * share
        trained = common.train_model(own, data, method, seed, device)
        rows.extend(r for r in trained['history'] if r not in rows)
        return trained

    networks = {'STD': train('standard'), 'AT': train(args.teacher)}
    for share in RUNGS:
        networks[network_name(args, share * args.eps)] = train(args.teacher, share)
    return networks | {"STD'": train('standard', seed=seed + 1), "AT'": train(args.teacher, seed=seed + 1)}


def make_lesson(args, data, more, networks, seed, device):
    """What all students of a seed share: the teachers, their logits, transferred attacks.

    more: (x, y), the images on which logits are measured. Without augmentation every image has
    one view, and the teachers' logits of the training images serve throughout.
    """
    lesson = dict(
        fixed=not (data.pad or data.flip),
        recipes=[common.short_hash(networks[name]['recipe']) for name in ('AT', 'STD')],
    )
    for name, key in (('AT', 't'), ('STD', 's')):
        model = common.restore(networks[name], 'best', args, data, device)
        lesson |= {
            name: model,
            key: common.logits_of(model, data.train[0]),
            key + '_more': common.logits_of(model, more[0]),
        }
    lesson['transfer'] = {}
    x, y = data.test
    for radius in radii(args):
        for name in ('AT', 'STD'):
            lesson['transfer'][name, radius] = torch.cat(
                [
                    common.pgd(
                        lesson[name],
                        common.to_float(a),
                        b,
                        eps=radius,
                        step_size=radius / 8,
                        steps=20,
                        norm=args.norm,
                        loss='margin',
                        generator=common.make_generator('transfer', name, seed, device=device),
                    )
                    for a, b in zip(x.split(250), y.split(250))
                ]
            )
    return lesson


def radii(args):
    """From the smaller to the larger."""
    return [share * args.eps for share in RADII]


def distil(args, data, lesson, student, epochs, seed, device):
    """Train one student on clean images; the result of train_model."""
    name, temperature, kind, again = parse_student(student)
    own = copy.copy(args)
    own.epochs, own.arch, own.eps_warmup = epochs, args.student_arch or args.arch, 0.0
    t, s = lesson['t'] / temperature, lesson['s'] / temperature
    whole = describe(t, s)
    table = draw_table(whole, whole['m'], whole['odds'], common.make_generator('targets', seed, device=device))
    weight = squeeze_weight(whole['centred'].item(), t.shape[1])

    def loss_fn(model, x, y, threat, generator):
        label, i = y.unbind(1)
        if name == 'LSQ':
            z = model(x).float()
            return F.cross_entropy(z, label) + weight * z.pow(2).sum(1).mean()
        with torch.no_grad(), common.spread(lesson['AT']), common.spread(lesson['STD']):
            # teacher and student see the same view
            a, b = (
                None
                if k == 's' and name not in FROM_STD
                else lesson[k][i] / temperature
                if lesson['fixed']
                else final_logits(lesson[net](x)).float() / temperature
                for k, net in (('t', 'AT'), ('s', 'STD'))
            )
            target = targets(name, a, b, whole, {k: v[i] for k, v in table.items()}, generator)
            m = a.argmax(1)
            use = torch.ones_like(a[:, 0])
            if name not in ('STD', 'M17'):  # a manipulation that changes the prediction
                use = (target.argmax(1) == m).float()
            if name == 'M18':
                use = torch.sigmoid(log_odds(a, m))
            if args.teacher_wrong == 'drop':
                use = use * (m == label)
        each = distil_loss(model(x), target, temperature, kind)
        return (use * each).sum() / use.sum().clamp(min=1e-6)

    index = torch.arange(len(data.train[1]), device=device)
    extra = dict(student=student, teachers=lesson['recipes'], version=TARGETS_VERSION, teacher_wrong=args.teacher_wrong)
    return common.train_model(
        own,
        data,
        'student-' + student.replace('/', '-'),
        seed + (2000 if again else 1000),
        device,
        loss_fn=loss_fn,
        extra=extra,
        labels=torch.stack((data.train[1], index), 1),
        check_every=max(16, epochs // 4),
    )


def attacks_on_student(args, eps, seed, device):
    """`common.evaluation_attacks` at one radius, with PGD on the margin instead of PGD-100."""
    attacks = {}
    for name, attack in common.evaluation_attacks(args, seed, device, eps).items():
        if name == 'pgd100':
            name = 'margin'
            attack = partial(
                common.pgd,
                eps=eps,
                norm=args.norm,
                steps=args.margin_steps,
                step_size=eps / 4,
                loss='margin',
                restarts=args.restarts,
                drop_fooled=True,
                generator=common.make_generator('evaluate', 'margin', seed, device=device),
            )
        attacks[name] = attack
    return attacks


def evaluate(args, data, model, lesson, seed, device, brief=False):
    """Worst-case correctness at both radii and, unless brief, checks of the evaluation itself.

    FGSM, PGD-20 and PGD on the margin attack every image at the radius of the claims; the
    other attacks what is left, which changes no image's worst case. What fits into the smaller
    ball fits into the larger one.
    """
    x, y = data.test
    natural = left = common.correct_under(model, x, y)
    worst, judged = [], {}
    for share, radius in zip(RADII, radii(args)):
        black = torch.stack([common.correct_under(model, lesson['transfer'][k, radius], y) for k in ('AT', 'STD')]).all(
            0
        )
        white = torch.ones_like(left)
        for name, attack in attacks_on_student(args, radius, seed, device).items():
            every = name in EVERY and share == args.judged
            rows = torch.arange(len(y), device=device) if every else (left & white).nonzero()[:, 0]
            held = torch.ones_like(left)
            if len(rows):
                held[rows] = common.correct_under(model, x[rows], y[rows], attack)
            if every:
                judged[name] = held
            if name == 'square':
                black = black & held
            else:
                white = white & held
        left = left & white & black
        worst.append(left)
        if share == args.judged:
            judged |= dict(natural=natural, white=white, square=black)
            eps, final = radius, left
    out = dict(
        natural=common.pack(natural.to(torch.uint8)),
        worst=[common.pack(v.to(torch.uint8)) for v in worst],
        rates={k: judged[k].float().mean().item() for k in EVERY},
    )
    if brief:
        return out

    def generator(name):
        return common.make_generator(name, seed, device=device)

    few = slice(0, 100)
    masking = common.masking_check(
        model, common.to_float(x[few]), y[few], judged, eps=eps, norm=args.norm, generator=generator('masking')
    )
    longer = partial(
        common.pgd,
        eps=eps,
        norm=args.norm,
        steps=100,
        step_size=eps / 10,
        drop_fooled=True,
        generator=generator('longer'),
    )
    rows = final[few].nonzero()[:, 0]
    more = (~common.correct_under(model, x[rows], y[rows], longer)).sum().item() / len(y[few]) if len(rows) else 0.0
    gap = out['rates']['pgd20'] - out['rates']['margin']
    masking |= {
        'a hundred more steps find more (share of images)': (more, 0.03, more > 0.03),
        'cross-entropy misses what the margin finds (gap)': (gap, 0.08, gap > 0.08),
    }
    return out | dict(
        masking=masking,
        eps_curve=common.eps_curve(model, x[:50], y[:50], eps=args.eps, norm=args.norm, generator=generator('curve')),
    )


def evaluate_student(args, data, more, lesson, trained, student, seed, device, brief=False):
    """`evaluate`, and how well the student learned its target, on images it has not seen."""
    name, temperature, kind, _ = parse_student(student)
    own = copy.copy(args)
    own.arch = args.student_arch or args.arch
    model = common.restore(trained, 'last', own, data, device)
    out = evaluate(args, data, model, lesson, seed, device, brief)
    if brief:
        return out
    z = common.logits_of(model, more[0]) / temperature
    measures = {k: v.mean().item() for k, v in logit_measures(z * temperature).items()}
    out |= dict(
        measures=measures,
        confidence=z.softmax(1).amax(1).mean().item(),
        collapsed=trained['collapsed'],
        seconds=trained['seconds'],
        loss=trained['history'][-1]['loss'],
    )
    if name in ('LSQ', 'M18', 'M19'):  # no logits to match
        return out
    t, s = (lesson[k] / temperature for k in ('t', 's'))
    whole = describe(t, s)
    t_more, s_more = (lesson[k] / temperature for k in ('t_more', 's_more'))
    goal = expected_target(name, t_more, s_more, whole, seed, kind)
    table = draw_table(whole, whole['m'], whole['odds'], common.make_generator('targets', seed, device=device))
    used = targets(name, t, s, whole, table, common.make_generator('flips', device=device))
    return out | dict(
        kl=common.kl_divergence(z, goal).mean().item(),
        constant_kl=common.kl_divergence(goal.double().softmax(1).mean(0, keepdim=True).log().expand_as(goal), goal)
        .mean()
        .item(),
        train_kl=common.kl_divergence(common.logits_of(model, data.train[0]) / temperature, used).mean().item(),
        target_confidence=goal.softmax(1).amax(1).mean().item(),
        learned={
            k: (v.mean().item(), logit_measures(goal)[k].mean().item())
            for k, v in logit_measures(z).items()
            if k in ('gap', 'odds')
        },
        flips=(used.argmax(1) != whole['m']).float().mean().item(),
    )


def measure_logits(args, data, more, networks, device):
    """E1, E2, E4: what every network says about the same clean images."""
    x, y = more
    out = {}
    for name, trained in networks.items():
        model = common.restore(trained, 'best', args, data, device)
        z, z_train = common.logits_of(model, x), common.logits_of(model, data.train[0])
        values = z.sort(1, descending=True)[0]
        out[name] = dict(
            correct=common.pack((z.argmax(1) == y).to(torch.uint8)),
            **{k: common.pack(v.half()) for k, v in logit_measures(z).items()},
            profile=(values - values.mean(1, keepdim=True)).mean(0).tolist(),
            gap_errors=((values[:, :1] - values[:, 1:]).std(0) / len(y) ** 0.5).tolist(),
            train={k: v.mean().item() for k, v in logit_measures(z_train).items()},
            train_accuracy=(z_train.argmax(1) == data.train[1]).float().mean().item(),
        )
    return out


def measure_theory(args, data, networks, seed, device):
    """E3: linearised radii of test images, and the best scale of the logits of training
    images, natural and attacked with the model's own PGD-10 at eps."""
    out = {}
    n = min(1000, len(data.train[1]))
    for name in ('STD', 'AT'):
        model = common.restore(networks[name], 'best', args, data, device)
        x, y = data.test
        parts = [linear_radius(model, common.to_float(a), b, args.norm) for a, b in zip(x.split(50), y.split(50))]
        radius, gap, slope = (torch.cat(v) for v in zip(*parts))
        x, y = data.train[0][:n], data.train[1][:n]
        attacked = torch.cat(
            [
                final_logits(
                    model(
                        common.pgd(
                            model,
                            common.to_float(a),
                            b,
                            eps=args.eps,
                            step_size=args.eps / 4,
                            steps=10,
                            norm=args.norm,
                            generator=common.make_generator('theory', seed, device=device),
                        )
                    )
                ).detach()
                for a, b in zip(x.split(250), y.split(250))
            ]
        )
        natural = common.logits_of(model, data.train[0])
        scales = {}
        for kind, z, labels in (('natural', natural, data.train[1]), ('attacked', attacked, y)):
            grid = np.geomspace(1 / 16, 16, 41)
            best = best_scale(z, labels)
            rng = np.random.default_rng(0)
            draws = [
                best_scale(z[i], labels[i])
                for i in (
                    torch.as_tensor(rng.integers(len(z), size=len(z)), device=z.device)
                    for _ in range(100 if kind == 'attacked' else 0)
                )
            ]
            scales[kind] = dict(
                best=best if math.isfinite(best) else None,
                interval=np.percentile(draws, (2.5, 97.5)).tolist() if draws and np.isfinite(draws).all() else None,
                bound=scale_bound(z, labels) if (common.margin(z, labels) > 0).any() else None,
                curve=[F.cross_entropy(g * z.double(), labels).item() for g in grid],
                grid=grid.tolist(),
            )
        out[name] = dict(
            radius=common.pack(radius.cpu()), gap=common.pack(gap.cpu()), slope=common.pack(slope.cpu()), scales=scales
        )
    return out


def measure_disagreement(logits, more):
    """E5: the images on which the two networks' confidence differs most, both being right, by
    the difference of log-odds and of ranks; and what the tails look like."""
    odds = {k: unpack(logits[k]['odds']).astype(np.float64) for k in ('STD', 'AT')}
    right = np.flatnonzero(unpack(logits['STD']['correct']) & unpack(logits['AT']['correct']))
    difference = {
        'raw': odds['STD'] - odds['AT'],
        'rank': (rankdata(odds['STD']) - rankdata(odds['AT'])) / len(odds['AT']),
    }
    out = {}
    for kind, d in difference.items():
        order = right[np.argsort(-d[right], kind='stable')]
        for side, rows in (('STD surer', order), ('AT surer', order[::-1])):
            rows = rows[:GALLERY].copy()
            out[f'{kind}, {side}'] = dict(
                image=common.pack(more[0][torch.as_tensor(rows, device=more[0].device)]),
                label=more[1][torch.as_tensor(rows, device=more[1].device)].tolist(),
                odds=[odds[k][rows].round(3).tolist() for k in ('STD', 'AT')],
            )
            if kind == 'rank':
                tail = order[: len(order) // 10] if side == 'STD surer' else order[len(order) - len(order) // 10 :]
                tail = torch.as_tensor(tail.copy(), device=more[0].device)
                out[side] = {k: common.pack(v.float().cpu()) for k, v in looks(common.to_float(more[0][tail])).items()}
    return out


def example(lesson, more, names, seed, device):
    """One test image of middling confidence and every student's target for it."""
    t, s = lesson['t_more'], lesson['s_more']
    right = (t.argmax(1) == more[1]) & (s.argmax(1) == more[1])
    p = torch.sigmoid(log_odds(t, t.argmax(1)))
    i = torch.where(right, (p - 0.7).abs(), 9.0).argmin()[None]
    whole = describe(lesson['t'], lesson['s'])
    table = draw_table(
        whole, t.argmax(1), log_odds(t, t.argmax(1)), common.make_generator('example', seed, device=device)
    )
    return dict(
        image=common.pack(more[0][i[0]]),
        label=int(more[1][i]),
        own=t[i][0].tolist(),
        targets={
            name: targets(
                name,
                t[i],
                s[i],
                whole,
                {k: v[i] for k, v in table.items()},
                common.make_generator('example', name, device=device),
            )[0].tolist()
            for name in names
            if name not in ('LSQ', 'M18', 'M19')
        },
    )


def study(args):
    """Train the networks, measure their logits, distil and attack; returns (folder, results)."""
    if args.dataset.startswith('folder:'):
        raise common.UserError(
            'this study keeps a target for every training image and does not '
            'stream folder:PATH; use a data set that fits in memory'
        )
    device = common.pick_device(args.device)
    folder, config = common.start_run('logit_distill', args)
    data, more = (
        common.study_data(args, device, size)
        for size in (args.test_size, args.logit_images if args.dataset == 'shapes' else 0)
    )
    more = tuple(v[: args.logit_images] for v in more.test)
    if len(data.classes) < 4:
        raise common.UserError('the manipulations need four classes or more')
    results = common.load_results(folder, config, __file__, args.fresh)
    results |= dict(
        classes=data.classes, test_labels=data.test[1].tolist(), radii=radii(args), judged=RADII.index(args.judged)
    )
    rows, lengths = [], sorted({max(1, round(share * args.distil_epochs)) for share in LENGTHS} - {args.distil_epochs})
    results['lengths'] = [*lengths, args.distil_epochs]
    plan = [
        (epochs, student)
        for epochs in (args.distil_epochs, *lengths)
        for student in args.students
        if epochs not in lengths or student in LENGTH_STUDENTS
    ]
    parts = [
        'logits',
        'theory',
        'disagreement',
        'example',
        'network-STD',
        'network-AT',
        *(f'student-{student}-e{epochs}' for epochs, student in plan),
    ]
    if all(f'{part}-s{seed}' in results for seed in args.seeds for part in parts):
        return folder, common.finish(folder, results)
    for seed in args.seeds:  # metrics.csv needs them all

        def measure(part, function, seed=seed):
            return common.measure(results, f'{part}-s{seed}', function, folder)

        networks = train_networks(args, data, seed, device, rows)
        common.write_metrics(folder / 'metrics.csv', rows)
        results[f'collapsed-s{seed}'] = [k for k, v in networks.items() if v['collapsed']]
        logits = measure('logits', lambda: measure_logits(args, data, more, networks, device))
        measure('theory', lambda: measure_theory(args, data, networks, seed, device))
        measure('disagreement', lambda: measure_disagreement(logits, more))
        lesson = make_lesson(args, data, more, networks, seed, device)
        measure('example', lambda: example(lesson, more, [s for s in args.students if '/' not in s], seed, device))
        for name in ('STD', 'AT'):
            measure(f'network-{name}', lambda: evaluate(args, data, lesson[name], lesson, seed, device))
        for epochs, student in plan:
            trained = distil(args, data, lesson, student, epochs, seed, device)
            if epochs == args.distil_epochs:
                rows += trained['history']
                common.write_metrics(folder / 'metrics.csv', rows)
            found = measure(
                f'student-{student}-e{epochs}',
                lambda: evaluate_student(args, data, more, lesson, trained, student, seed, device, epochs in lengths),
            )
            common.log.info(
                '  %-34s natural %.3f  worst case %.3f, %.3f',
                student_name(student),
                unpack(found['natural']).mean(),
                *(unpack(v).mean() for v in found['worst']),
            )
    return folder, common.finish(folder, results)


# ------------------------------------------------------------------------- reading results


def per_seed(results, part):
    """What was measured of `part` with each seed."""
    return [results[f'{part}-s{seed}'] for seed in common.seeds_of(results)]


def runs_of(results, name, epochs=None):
    """The evaluations of 'STD net', 'AT net' or a student, one for each seed."""
    if name.endswith(' net'):
        return per_seed(results, f'network-{name[:-4]}')
    return per_seed(results, f"student-{name}-e{epochs or results['lengths'][-1]}")


def measure_of(results, name, measure):
    """(S, N) of a network's logits: 'largest', 'centred', 'gap', 'odds' or 'correct'."""
    return np.stack([unpack(v[name][measure]).astype(np.float64) for v in per_seed(results, 'logits')])


def correct(results, name, which, epochs=None):
    """(S, N) of zeros and ones; which: 'natural', or 0 or 1: worst case at that radius."""
    runs = runs_of(results, name, epochs)
    return np.stack([unpack(r['natural'] if which == 'natural' else r['worst'][which]) for r in runs]).astype(float)


def rate(results, name, which, epochs=None):
    return correct(results, name, which, epochs).mean()


def sampler(results, which, images=None):
    """(accuracy, kept): functions of a student that return (1 + DRAWS,) arrays, the value
    measured and its bootstrap draws.

    accuracy(name, epochs) is the worst-case accuracy at radius `which`, kept R of it. Images
    are drawn again, the same for all; students also vary by RETRAINED sqrt(p (1 - p) / seeds):
    what other initial weights and another order of the images change in all students alike,
    and in each of them. images: (N,) bool, those counted.
    """
    images = np.ones(len(results['test_labels']), bool) if images is None else images
    n, seeds = images.sum(), len(common.seeds_of(results))
    rng = np.random.default_rng(0)
    weights = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), DRAWS)]) / n
    alike = rng.standard_normal(DRAWS)

    def accuracy(name, epochs=None):
        hits = correct(results, name, which, epochs)[:, images]
        p = weights @ hits.mean(0)
        if not name.endswith(' net'):
            key = common.short_hash([name, epochs or results['lengths'][-1]])
            own = np.random.default_rng(int(key, 16)).standard_normal(DRAWS)
            noise = RETRAINED['all'] * alike + RETRAINED['each'] * own
            near = (hits.sum() + 0.5) / (hits.size + 1)  # 0 of 250 is not for certain 0
            p[1:] += noise * math.sqrt(near * (1 - near) / seeds)
            p = p.clip(0, 1)
        return p

    low, high = accuracy('STD net'), accuracy('AT net')

    def kept(name, epochs=None):
        return (accuracy(name, epochs) - low) / np.maximum(high - low, 1e-9)

    return accuracy, kept


def interval(values):
    """(value, low, high) of a sampler's array."""
    return (values[0], *np.percentile(values[1:], (2.5, 97.5)))


def failed(results, name):
    """Why a student or network fails V0, or ''."""
    for run in runs_of(results, name):
        flags = [f'{k} {v:.2f}' for k, (v, _, raised) in run['masking'].items() if raised]
        curve = np.array(run['eps_curve'])
        if np.diff(curve).max() > 0.04:
            flags.append('accuracy rises with eps')
        if name.endswith(' net'):
            pass
        elif run['collapsed']:
            flags.append('collapsed')
        elif 'learned' in run:
            pairs = {'confidence': (run['confidence'], run['target_confidence']), 'log-odds': run['learned']['odds']}
            flags += [
                f'{k} {a:.2f}, target {b:.2f}'
                for k, (a, b) in pairs.items()
                if abs(a - b) > LEARNED[k] * (max(abs(b), 1) if k == 'log-odds' else b)
            ]
            if run['kl'] > KL_SHARE * max(run['constant_kl'], 1e-6):
                flags.append(f"KL {run['kl']:.2f}, of one constant answer {run['constant_kl']:.2f}")
        elif name.startswith('LSQ'):
            own, goal = run['measures']['centred'], measure_of(results, 'AT', 'centred').mean()
            if abs(own - goal) > SQUEEZED * goal:
                flags.append(f'mean centred maximum {own:.2f}, of AT {goal:.2f}')
        if flags:
            return '; '.join(flags)
    return ''


def judged(results):
    """(place of the claims' radius in results['radii'], place of the other)."""
    return results['judged'], 1 - results['judged']


def radius_text(results, which):
    return common.eps_text(dict(results['config'], eps=results['radii'][which]))


# ------------------------------------------------------------------------------- the figures

NETWORK_COLOURS = {'STD': '#0072B2', 'AT': '#D55E00'}
GROUPS = (
    ('whole', ('M0', 'LSQ', 'M19', 'M18', 'STD'), '#000000'),
    ('class information', ('M1', 'M2', 'M3', 'M4', 'M5', 'K2', 'K3', 'K5', 'M6', 'M8', 'M10', 'AS'), '#009E73'),
    ('confidence', ('M9', 'M11', 'M12', 'M13', 'M14', 'SA'), '#CC79A7'),
    ('summary or small logits only', ('M7', 'M15', 'M16', 'M17'), '#E69F00'),
)


def colour_of(student):
    name = student.partition('/')[0]
    return next((c for _, names, c in GROUPS if name in names), '#000000')


def draw(results, folder):
    """All figures, from results.json alone."""
    figure_logits(results, folder)
    figure_theory(results, folder)
    figure_disagreement(results, folder)
    figure_gallery(results, folder)
    figure_targets(results, folder)
    figure_students(results, folder)
    figure_lengths(results, folder)
    figure_classes(results, folder)
    figure_eps(results, folder)
    figure_learned(results, folder)


def teachers(results):
    """Names of the networks by eps: STD, the rungs, AT."""
    names = [n for n in per_seed(results, 'logits')[0] if not n.endswith("'")]
    return ['STD', *[n for n in names if n not in ('STD', 'AT')], 'AT']


def shades(names):
    """One colour per teacher, from blue (STD) to orange (AT)."""
    few = ('#0072B2', '#56B4E9', '#E69F00', '#D55E00')
    return dict(zip(names, few))


def figure_logits(results, folder):
    names = teachers(results)
    fig, axes = common.new_figure(1, 4, 10.5, 3.0)
    for axis, (key, text) in zip(
        axes[0],
        (
            ('centred', 'largest logit minus the mean'),
            ('gap', 'gap to the runner-up'),
            ('odds', 'log-odds of the prediction'),
        ),
    ):
        every = np.concatenate([measure_of(results, n, key).ravel() for n in names])
        edges = np.linspace(*np.percentile(every, (0.2, 99.8)), 45)
        for name, colour in shades(names).items():
            values = measure_of(results, name, key).ravel()
            axis.hist(values, edges, density=True, histtype='step', color=colour, lw=1.4, label=name)
            axis.axvline(values.mean(), color=colour, ls=':', lw=1.2)
        axis.set(xlabel=text, yticks=[])
    axes[0, 0].set_ylabel('share of test images')
    for name, colour in shades(names).items():
        profile = np.mean([v[name]['profile'] for v in per_seed(results, 'logits')], 0)
        shown = np.arange(1, len(profile) + 1)
        axes[0, 3].plot(shown, profile, color=colour, marker='o' if len(shown) < 30 else None, ms=3)
    axes[0, 3].set(xlabel='rank of the class', title='', ylabel='mean logit (centred)')
    axes[0, 3].axhline(0, color='0.6', lw=0.8)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=len(names))
    fig.suptitle('Logits of clean test images after standard and adversarial training (dotted: means)')
    common.save_figure(fig, folder, 'fig1_logits')


def figure_theory(results, folder):
    fig, axes = common.new_figure(1, 3, 10.0, 3.4)
    names, eps = teachers(results), results['config']['eps']
    small = results['config']['norm'] == 'linf' and eps < 0.1
    shares = [0, *RUNGS, 1]
    at = np.array(shares) * eps * (255 if small else 1)
    for key, text, colour in (('centred', 'largest minus mean', '#000000'), ('gap', 'gap to the runner-up', '#009E73')):
        values = np.array([measure_of(results, n, key).mean(1) for n in names])
        axes[0, 0].plot(at, values.mean(1), color=colour, marker='o', ms=4, label=text)
        if values.shape[1] > 1:
            axes[0, 0].plot(at, values, '.', color=colour, ms=3)
    axes[0, 0].set(
        xlabel=f"eps of the training{' (1/255)' if small else ''}",
        ylabel='mean over test images',
        ylim=(0, None),
        title='Logits against the strength\nof the adversary',
    )
    axes[0, 0].legend()
    limits = []
    for name, colour in NETWORK_COLOURS.items():
        parts = [v[name] for v in per_seed(results, 'theory')]
        slope, gap = (np.concatenate([unpack(p[k]) for p in parts]) for k in ('slope', 'gap'))
        keep = gap > 0
        axes[0, 1].plot(slope[keep], gap[keep], '.', ms=3, alpha=0.5, color=colour, label=name)
        limits += slope[keep].tolist()
    line = np.array([min(limits, default=1.0), max(limits, default=10.0)])
    for which, style in ((1, '-'), (0, '--')):
        axes[0, 1].plot(
            line,
            line * results['radii'][which],
            style,
            color='0.3',
            lw=1,
            label='radius ' + radius_text(results, which).replace('eps ', ''),
        )
    bottom = np.percentile(
        np.concatenate([unpack(v[n]['gap']) for n in NETWORK_COLOURS for v in per_seed(results, 'theory')]), 3
    )
    axes[0, 1].set(
        xscale='log',
        yscale='log',
        xlabel='gradient gap (1-norm)' if results['config']['norm'] == 'linf' else 'gradient gap (2-norm)',
        ylabel='logit gap to the nearest class',
        ylim=(max(bottom, 0.02), None),
        title='Linearised radius = ratio;\nabove the line: safe to first order',
    )
    axes[0, 1].legend(loc='upper left', fontsize=7)
    styles = {
        ('STD', 'natural'): ('#0072B2', '-'),
        ('STD', 'attacked'): ('#0072B2', '--'),
        ('AT', 'natural'): ('#D55E00', '-'),
        ('AT', 'attacked'): ('#D55E00', '--'),
    }
    for (name, kind), (colour, style) in styles.items():
        found = [v[name]['scales'][kind] for v in per_seed(results, 'theory')]
        curve = np.mean([f['curve'] for f in found], 0)
        grid = np.array(found[0]['grid'])
        axes[0, 2].plot(grid, curve, style, color=colour, label=f'{name}, {kind}')
        if all(f['best'] for f in found):
            best = np.exp(np.mean(np.log([f['best'] for f in found])))
            if grid[0] <= best <= grid[-1]:
                axes[0, 2].plot(best, np.interp(best, grid, curve), 'o', color=colour, ms=5)
    axes[0, 2].axvline(1, color='0.6', lw=1, ls=':')
    axes[0, 2].set(
        xscale='log',
        yscale='log',
        xlabel='scale s of the logits',
        ylabel='cross-entropy of s z',
        ylim=(1e-4, None),
        title='Which scale do the labels ask for?\n(training images; dot: best s)',
    )
    axes[0, 2].legend(loc='lower left', fontsize=7)
    common.save_figure(fig, folder, 'fig2_theory')


def ranks(values):
    return rankdata(values, axis=-1)


def rank_correlation(a, b):
    """Spearman's rho, the mean over rows."""
    return float(np.mean([common.rank_correlation(u, v) for u, v in zip(a, b)]))


def figure_disagreement(results, folder):
    fig, axes = common.new_figure(1, 3, 9.5, 3.6)
    for axis, (a, b) in zip(axes[0], (('STD', 'AT'), ('STD', "STD'"), ('AT', "AT'"))):
        u, v = (measure_of(results, n, 'odds') for n in (a, b))
        x, y = (100 * ranks(w)[0] / w.shape[1] for w in (u, v))
        axis.plot(x, y, '.', ms=2, alpha=0.5, color='#0072B2', rasterized=True)
        axis.set(
            xlabel=f'confidence rank in {a} (%)',
            ylabel=f'in {b} (%)',
            aspect=1,
            title=f'{a} and {b}: Spearman {rank_correlation(u, v):.2f}',
        )
    fig.suptitle("Which test images is a network sure of? STD', AT': trained alike, another seed")
    common.save_figure(fig, folder, 'fig3_disagreement')


def figure_gallery(results, folder):
    found = per_seed(results, 'disagreement')[0]
    rows = [k for k in found if ',' in k]
    fig, axes = common.new_figure(len(rows), GALLERY, 1.05 * GALLERY + 0.9, 1.62 * len(rows))
    texts = {
        'raw, STD surer': 'STD surer\n(difference\nof log-odds)',
        'raw, AT surer': 'AT surer\n(difference\nof log-odds)',
        'rank, STD surer': 'STD surer\n(by rank)',
        'rank, AT surer': 'AT surer\n(by rank)',
    }
    for line, key in zip(axes, rows):
        image = unpack(found[key]['image']) / 255
        for i, axis in enumerate(line):
            if i >= len(image):
                axis.axis('off')
                continue
            s, t = (found[key]['odds'][j][i] for j in (0, 1))
            name = results['classes'][found[key]['label'][i]]
            text = (
                f'{s:.1f} / {t:.1f}'
                if key.startswith('raw')
                else '{:.0f} / {:.0f} %'.format(*(100 / (1 + math.exp(-v)) for v in (s, t)))
            )
            common.show_image(axis, image[i], f'{name[:12]}\n{text}')
            axis.title.set_fontsize(7)
        line[0].set_ylabel(texts[key], rotation=0, ha='right', va='center')
    fig.suptitle(
        'Images that both networks get right and disagree on most; numbers: STD / AT, '
        'log-odds of the prediction (above), confidence (below)'
    )
    common.save_figure(fig, folder, 'fig4_gallery')


def figure_targets(results, folder):
    found = per_seed(results, 'example')[0]
    names = list(found['targets'])
    if not names:
        return
    columns = 5
    lines = math.ceil((len(names) + 1) / columns)
    fig, axes = common.new_figure(lines, columns, 10.5, 1.55 * lines + 0.6)
    flat = axes.ravel()
    classes = results['classes']
    common.show_image(flat[0], unpack(found['image']) / 255, classes[found['label']])
    reference = np.array(found['own']) - np.mean(found['own'])
    shown = np.argsort(-reference)[:10]
    for axis, name in zip(flat[1:], names):
        value = np.array(found['targets'][name])
        value = value - value.mean()
        axis.bar(range(len(shown)), value[shown], color=colour_of(name), width=0.75)
        axis.step(
            np.arange(-0.5, len(shown)),
            np.append(reference[shown], reference[shown][-1]),
            where='post',
            color='0.45',
            lw=0.9,
        )
        axis.set_title(student_name(name), fontsize=7.5)
        axis.set(xticks=range(len(shown)), xticklabels=[])
        axis.tick_params(labelsize=6)
        axis.axhline(0, color='0.6', lw=0.6)
    for axis in flat[len(names) + 1 :]:
        axis.axis('off')
    for axis in flat[max(1, len(names) + 1 - columns) : len(names) + 1]:
        axis.set_xticklabels([classes[k][:9] for k in shown], rotation=90, fontsize=6)
    fig.suptitle('What each student has to match for this image: centred logits (grey outline: the AT teacher\'s own)')
    common.save_figure(fig, folder, 'fig5_targets')


def figure_students(results, folder):
    students = results['config']['students']
    here, there = judged(results)
    order = sorted(students, key=lambda s: rate(results, s, here))
    fig, axes = common.new_figure(1, 1, 8.0, 0.27 * len(order) + 1.7)
    axis = axes[0, 0]
    accuracy, _ = sampler(results, here)
    for i, student in enumerate(order):
        colour, bad = colour_of(student), failed(results, student)
        value, low, high = (100 * v for v in interval(accuracy(student)))
        axis.plot([low, high], [i, i], color=colour, lw=2.2, alpha=0.45)
        axis.plot(value, i, 'X' if bad else 'o', color=colour, ms=7 if bad else 6)
        axis.plot(100 * rate(results, student, there), i, 'D', color=colour, mfc='none', ms=4)
        axis.plot(100 * rate(results, student, 'natural'), i, '|', color=colour, ms=9)
    for name, colour in NETWORK_COLOURS.items():
        text = 'standard network' if name == 'STD' else 'AT teacher'
        axis.axvline(100 * rate(results, name + ' net', here), color=colour, lw=1.3, label=text)
        axis.axvline(100 * rate(results, name + ' net', there), color=colour, lw=1, ls=':')
    axis.plot(
        [], [], 'o', color='0.3', label=f'worst case, {radius_text(results, here)}\n(95 %: images and retraining)'
    )
    axis.plot(
        [],
        [],
        'D',
        mfc='none',
        color='0.3',
        ms=4,
        label=f'worst case, {radius_text(results, there)} (teachers: dotted)',
    )
    axis.plot([], [], '|', color='0.3', ms=9, label='natural')
    axis.plot([], [], 'X', color='0.3', ms=7, label='fails V0')
    for text, _, colour in GROUPS:
        axis.plot(
            [], [], 's', color=colour, ms=6, label='changed: ' + text if text != 'whole' else 'unchanged or hard labels'
        )
    axis.set(
        yticks=range(len(order)),
        yticklabels=[student_name(s) for s in order],
        xlabel='test accuracy (%)',
        xlim=(-2, 102),
        ylim=(-0.7, len(order) - 0.3),
        title=f"Robustness of students of clean images, {results['lengths'][-1]} epochs",
    )
    fig.legend(loc='outside lower center', ncols=3, fontsize=7.5)
    common.save_figure(fig, folder, 'fig6_students')


def figure_lengths(results, folder):
    shown = [s for s in LENGTH_STUDENTS if s in results['config']['students']]
    fig, axes = common.new_figure(1, 2, 8.0, 3.3)
    colours = dict(zip(LENGTH_STUDENTS, ('#000000', '#009E73', '#56B4E9', '#CC79A7')))
    for which, axis in enumerate(axes[0]):
        accuracy, _ = sampler(results, which)
        for student in shown:
            values = 100 * np.array([interval(accuracy(student, e)) for e in results['lengths']])
            axis.plot(
                results['lengths'], values[:, 0], marker='o', ms=4, color=colours[student], label=student_name(student)
            )
            axis.fill_between(results['lengths'], values[:, 1], values[:, 2], alpha=0.15, color=colours[student], lw=0)
        for name, colour in NETWORK_COLOURS.items():
            axis.axhline(
                100 * rate(results, name + ' net', which),
                color=colour,
                lw=1,
                ls='--',
                label='standard network' if name == 'STD' else 'AT teacher',
            )
        axis.set(
            xscale='log',
            xticks=results['lengths'],
            xlabel='epochs of distillation',
            ylabel='worst-case accuracy (%)',
            ylim=(-3, 103),
            title=radius_text(results, which),
        )
        axis.set_xticklabels(results['lengths'])
        axis.minorticks_off()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    fig.suptitle('Robustness against the length of the distillation (every point is a complete training)')
    common.save_figure(fig, folder, 'fig7_lengths')


def dose(results):
    """[(wrong classes that keep their logit, student)], sorted, of the students at hand."""
    students = results['config']['students']
    found = [(keep, s) for s, keep in KEPT.items() if s in students]
    if 'M0' in students:
        found.append((len(results['classes']) - 1, 'M0'))
    return sorted(found)


def figure_classes(results, folder):
    fig, axes = common.new_figure(1, 3, 10.0, 3.3)
    for which, (colour, style) in enumerate((('#000000', '-'), ('#56B4E9', '--'))):
        accuracy, _ = sampler(results, which)
        found = dose(results)
        if found:
            values = 100 * np.array([interval(accuracy(s)) for _, s in found])
            axes[0, 0].errorbar(
                [k for k, _ in found],
                values[:, 0],
                [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]],
                color=colour,
                ls=style,
                marker='o',
                ms=4,
                capsize=2,
                label=radius_text(results, which),
            )
    here, _ = judged(results)
    axes[0, 0].axhline(
        100 * rate(results, 'STD net', here),
        color='#0072B2',
        ls=':',
        lw=1.2,
        label=f'standard network, {radius_text(results, here)}',
    )
    axes[0, 0].set(
        xlabel='wrong classes whose logit is kept',
        ylabel='worst-case accuracy (%)',
        title='Information about wrong classes',
    )
    axes[0, 0].set_ylim(0, 1.5 * axes[0, 0].get_ylim()[1])
    axes[0, 0].legend(fontsize=7, loc='upper left')
    students = results['config']['students']
    for which, axis in enumerate(axes[0, 1:]):
        grid = np.full((2, 2), np.nan)
        cells = {'M0': (0, 0), 'AS': (0, 1), 'SA': (1, 0), 'STD': (1, 1)}
        if len(set(cells) & set(students)) < 2:
            axis.axis('off')
            continue
        for student, cell in cells.items():
            if student in students:
                grid[cell] = 100 * rate(results, student, which)
        axis.imshow(grid, vmin=0, vmax=max(np.nanmax(grid), 1), cmap='Blues', aspect='auto')
        for student, (i, j) in cells.items():
            if student in students:
                dark = grid[i, j] > 0.6 * np.nanmax(grid)
                axis.text(
                    j, i, f'{grid[i, j]:.1f} %\n({student})', ha='center', va='center', color='w' if dark else 'k'
                )
        axis.set(
            xticks=(0, 1),
            yticks=(0, 1),
            xticklabels=('AT', 'STD'),
            yticklabels=('AT', 'STD'),
            xlabel='logits of the other classes from',
            ylabel='confidence from',
            title='Worst case, ' + radius_text(results, which),
        )
        axis.grid(False)
    common.save_figure(fig, folder, 'fig8_classes')


def figure_eps(results, folder):
    students = [s for s in ('M0', 'M2', 'M4', 'M11', 'M16') if s in results['config']['students']]
    curves = {
        'standard network': ('#0072B2', runs_of(results, 'STD net')),
        'AT teacher': ('#D55E00', runs_of(results, 'AT net')),
    }
    for student, colour in zip(students, ('#000000', '#009E73', '#56B4E9', '#CC79A7', '#E69F00')):
        curves[student_name(student)] = (colour, runs_of(results, student))
    curves = {k: (c, np.mean([r['eps_curve'] for r in v], 0)) for k, (c, v) in curves.items()}
    common.draw_eps_curves(curves, results['config'], len(results['classes']), 'margin loss', folder, 'fig9_eps')


def figure_learned(results, folder):
    students = [s for s in results['config']['students'] if 'learned' in runs_of(results, s)[0]]
    fig, axes = common.new_figure(1, 3, 9.0, 0.2 * len(students) + 1.4, sharey=True)
    for i, student in enumerate(students[::-1]):
        runs, colour = runs_of(results, student), colour_of(student)
        for axis, pairs in (
            (axes[0, 0], [(100 * r['confidence'], 100 * r['target_confidence']) for r in runs]),
            (axes[0, 1], [r['learned']['odds'] for r in runs]),
            (axes[0, 2], [r['learned']['gap'] for r in runs]),
        ):
            own, goal = np.mean(pairs, 0)
            axis.plot([own, goal], [i, i], color=colour, lw=1)
            axis.plot(goal, i, '|', color=colour, ms=9, mew=1.6)
            axis.plot(own, i, 'X' if failed(results, student) else 'o', color=colour, ms=5)
    for axis, text in zip(axes[0], ('mean confidence (%)', 'mean log-odds', 'mean gap g_2')):
        axis.set(xlabel=text, yticks=range(len(students)))
    axes[0, 0].set_yticklabels([student_name(s) for s in students[::-1]])
    axes[0, 2].plot([], [], '|', color='0.3', ms=9, mew=1.6, label='target')
    axes[0, 2].plot([], [], 'o', color='0.3', ms=5, label='student')
    axes[0, 2].plot([], [], 'X', color='0.3', ms=5, label='student that fails V0')
    fig.legend(*axes[0, 2].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    fig.suptitle('Did the students learn their targets? Clean test images; of random targets: their mean')
    common.save_figure(fig, folder, 'fig10_learned')


# -------------------------------------------------------------------------------- the claims

PAPER = 'Seguin et al. 2021, abstract'
OURS = 'after the abstract; test ours'


def judge(results, folder):
    """The claims table, from results.json alone."""
    claims = []
    logit_claims(results, claims)
    theory_claims(results, claims)
    disagreement_claims(results, claims)
    student_claims(results, claims)
    common.write_claims(claims, folder)
    return claims


def collapsed(results, *names):
    return any(n in v for n in names for v in per_seed(results, 'collapsed'))


def logit_claims(results, claims):
    """V1-V3."""
    bad = 'uninformative: collapsed model' if collapsed(results, 'STD', 'AT') else None
    right = measure_of(results, 'STD', 'correct') * measure_of(results, 'AT', 'correct') > 0

    def lower(text, key, both=False):
        s, t = (measure_of(results, n, key) for n in ('STD', 'AT'))
        keep = right if both else np.ones_like(right)

        def difference(a, b, k):
            return (a * k).sum() / max(k.sum(), 1) - (b * k).sum() / max(k.sum(), 1)

        value, low, high = bootstrap(difference, s, t, keep)
        claims.append(
            claim(
                text,
                PAPER,
                f'{value:+.2f} [{low:+.2f}, {high:+.2f}], of {s[keep > 0].mean():.2f} in STD',
                bad or effect_verdict(low, high),
            )
        )

    lower('V1 AT lowers the largest logit: STD minus AT', 'largest')
    lower('V1 The same, minus the mean logit', 'centred')
    lower('V1 The same, on images that both get right', 'centred', both=True)
    lower('V2 AT lowers the gap to the runner-up: STD minus AT', 'gap')
    lower('V2 The same, on images that both get right', 'gap', both=True)
    profiles = {n: np.mean([v[n]['profile'] for v in per_seed(results, 'logits')], 0) for n in ('STD', 'AT')}
    gaps = {n: p[0] - p[1:] for n, p in profiles.items()}
    error = np.sqrt(
        sum(np.mean([v[n]['gap_errors'] for v in per_seed(results, 'logits')], 0) ** 2 for n in ('STD', 'AT'))
    )  # of one seed: wider than the mean's
    shrunk = gaps['STD'] - gaps['AT']
    claims.append(
        claim(
            f'V2 Every gap g_2 ... g_{len(profiles["STD"])} is lower in AT on average',
            PAPER,
            'STD minus AT from {:+.2f} to {:+.2f}; the least sure is {:+.2f} +- {:.2f}'.format(
                shrunk.min(), shrunk.max(), shrunk[np.argmin(shrunk / error)], 1.96 * error[np.argmin(shrunk / error)]
            ),
            bad or effect_verdict((shrunk - 1.96 * error).min(), (shrunk + 1.96 * error).min()),
        )
    )
    names = teachers(results)
    shares = np.array([[0, *RUNGS, 1]])

    def weakest(*values):
        """The largest Spearman correlation over measures and seeds: -1 if all fall with eps."""
        means = np.array([v.mean(1) for v in values]).reshape(2, len(names), -1)
        return max(rank_correlation(shares, m[None]) for half in means for m in half.T)

    value, low, high = bootstrap(
        weakest, *(measure_of(results, n, key) for key in ('centred', 'gap') for n in names), draws=500
    )
    claims.append(
        claim(
            'V3 Stronger adversary, smaller logits: Spearman of eps with the mean largest logit '
            f'(centred) and with the gap is {-MONOTONE} or less in every seed',
            'after Shafahi et al. 2019',
            'largest of them {:+.2f} [{:+.2f}, {:+.2f}]; centred {}, gap {}'.format(
                value,
                low,
                high,
                *(', '.join(f'{measure_of(results, n, key).mean():.2f}' for n in names) for key in ('centred', 'gap')),
            ),
            'uninformative: collapsed model'
            if collapsed(results, *names)
            else effect_verdict(-high, -low, MONOTONE - 1e-9),
        )
    )


def theory_claims(results, claims):
    """V4, V5."""
    found = per_seed(results, 'theory')

    def best(name, kind):
        return [v[name]['scales'][kind]['best'] or math.inf for v in found]

    def bound(name, kind):
        return min(v[name]['scales'][kind]['bound'] or math.inf for v in found)

    def text(values):
        return ', '.join(f'{v:.2f}' if math.isfinite(v) else 'unbounded' for v in values)

    def ends(name):
        found_here = [v[name]['scales']['attacked']['interval'] or [0, math.inf] for v in found]
        return min(v[0] for v in found_here), max(v[1] for v in found_here)

    low, high = SCALE_NEAR_ONE
    bad = 'uninformative: collapsed model' if collapsed(results, 'STD', 'AT') else None
    at, std, natural = ends('AT'), ends('STD'), best('STD', 'natural')
    for title, values, verdict, detail in (
        (
            f'V4 AT has the scale that its own attacked training images ask for ({low} to {high})',
            best('AT', 'attacked'),
            'supported'
            if low <= at[0] and at[1] <= high
            else 'contradicted'
            if at[1] < low or at[0] > high
            else 'inconclusive',
            f'[{at[0]:.2f}, {at[1]:.2f}]; bound by violations {bound("AT", "attacked"):.1f}',
        ),
        (
            'V4 STD has not: its natural training images ask for more (above 1; no interval: '
            'without errors there is no optimum)',
            natural,
            'supported' if all(v > 1 for v in natural) else 'contradicted',
            '',
        ),
        (
            f'V4 and its attacked ones for less than {ATTACKED_SCALE}',
            best('STD', 'attacked'),
            effect_verdict(-std[1], -std[0], -ATTACKED_SCALE),
            f'[{std[0]:.2f}, {std[1]:.2f}]; bound {bound("STD", "attacked"):.2f}; searched from 0.001 on',
        ),
    ):
        claims.append(
            claim(
                title,
                'ours; after the abstract',
                f's* = {text(values)}' + (f'; {detail}' if detail else ''),
                bad or verdict,
            )
        )
    parts = {
        n: [np.stack([unpack(v[n][k]).astype(float) for v in found]) for k in ('gap', 'slope', 'radius')]
        for n in ('STD', 'AT')
    }

    right = (parts['STD'][0] > 0) & (parts['AT'][0] > 0)

    def shrinks(gap_s, slope_s, gap_t, slope_t, k):
        gap_s, slope_s, gap_t, slope_t = (np.median(v[k]) for v in (gap_s, slope_s, gap_t, slope_t))
        return np.log(gap_t / gap_s) - np.log(slope_t / slope_s)

    arrays = [parts['STD'][0], parts['STD'][1], parts['AT'][0], parts['AT'][1]]
    few = right.sum() < 20
    value, least, most = (math.nan,) * 3 if few else bootstrap(shrinks, *arrays, right)
    claims.append(
        claim(
            'V5 AT shrinks the gradient gap more than the logit gap (images both get right): log of '
            'the ratio of ratios',
            'Shafahi et al. 2019',
            'fewer than 20 images'
            if few
            else f'{value:+.2f} [{least:+.2f}, {most:+.2f}]; medians '
            f'AT / STD: gradients {np.median(arrays[3][right]) / np.median(arrays[1][right]):.2f}, '
            f'gaps {np.median(arrays[2][right]) / np.median(arrays[0][right]):.2f}',
            bad or ('uninformative: fewer than 20 images' if few else effect_verdict(least, most)),
        )
    )
    values = []
    for which, radius in enumerate(results['radii']):
        robust = correct(results, 'AT net', which)
        value, least, most = bootstrap(lambda a, b: (a > radius).mean() - b.mean(), parts['AT'][2], robust)
        values.append((value, least, most, (parts['AT'][2] > radius).mean(), robust.mean()))
    v = values[1]
    within = (
        'supported'
        if max(abs(v[1]), abs(v[2])) < RADIUS_POINTS
        else 'contradicted'
        if v[1] > RADIUS_POINTS or v[2] < -RADIUS_POINTS
        else 'inconclusive'
    )
    claims.append(
        claim(
            'V5 The linearised radius predicts the worst-case accuracy of AT at eps within 10 points',
            'Shafahi et al. 2019',
            '; '.join(
                f'{radius_text(results, w)}: {100 * r[3]:.1f} % predicted, {100 * r[4]:.1f} % '
                f'measured, {100 * r[0]:+.1f} points [{100 * r[1]:+.1f}, {100 * r[2]:+.1f}]'
                for w, r in ((1, values[1]), (0, values[0]))
            ),
            bad or within,
            reference='CIFAR-10, 8/255: 55.0 % predicted, 56.2 % under FGSM'
            if results['config']['dataset'] == 'cifar10'
            else '-',
        )
    )


def disagreement_claims(results, claims):
    """V6-V8."""
    s, t, s2, t2 = (measure_of(results, n, 'odds') for n in ('STD', 'AT', "STD'", "AT'"))
    bad = 'uninformative: collapsed model' if collapsed(results, 'STD', 'AT', "STD'", "AT'") else None

    def correlation(a, b, c, d):
        return min(rank_correlation(a, c), rank_correlation(b, d)) - rank_correlation(a, b)

    value, low, high = bootstrap(correlation, s, t, s2, t2, draws=500)
    rhos = (rank_correlation(s, t), rank_correlation(s, s2), rank_correlation(t, t2))
    claims.append(
        claim(
            f'V6 STD and AT are sure of different images: Spearman of the confidence is lower by '
            f'{DISAGREE} or more than between two networks trained alike',
            PAPER,
            '{:+.3f} [{:+.3f}, {:+.3f}]; STD and AT {:.2f}, two STD {:.2f}, two AT {:.2f}'.format(
                value, low, high, *rhos
            ),
            bad or effect_verdict(low, high, DISAGREE),
        )
    )

    def overlap(a, b):
        n = max(1, a.shape[1] // 10)
        shares = []
        for u, v in zip(a, b):
            lowest = [set(np.argsort(w, kind='stable')[:n].tolist()) for w in (u, v)]
            shares.append(len(lowest[0] & lowest[1]) / len(lowest[0] | lowest[1]))
        return np.mean(shares)

    value, low, high = bootstrap(
        lambda a, b, c, d: min(overlap(a, c), overlap(b, d)) - overlap(a, b), s, t, s2, t2, draws=500
    )
    claims.append(
        claim(
            'V7 The least sure tenths differ: overlap (Jaccard) of STD and AT is lower than within each kind',
            PAPER,
            '{:+.3f} [{:+.3f}, {:+.3f}]; STD and AT {:.2f}, two STD {:.2f}, two AT {:.2f}; chance 0.05'.format(
                value, low, high, overlap(s, t), overlap(s, s2), overlap(t, t2)
            ),
            bad or effect_verdict(low, high),
        )
    )
    found = per_seed(results, 'disagreement')
    parts, p_values = [], []
    for key in found[0]['STD surer']:
        each = [[unpack(v[side][key]) for side in ('STD surer', 'AT surer')] for v in found]
        if min(len(a) for pair in each for a in pair) < 5:
            break
        # two seeds share test images: the least favourable of them counts
        p = max(mannwhitneyu(*pair).pvalue for pair in each)
        signs = {np.sign(np.median(a) - np.median(b)) for a, b in each}
        p_values.append(p if len(signs) == 1 else 1.0)
        parts.append((key, np.mean([np.median(a) for a, _ in each]), np.mean([np.median(b) for _, b in each])))
    adjusted = holm(p_values)
    claims.append(
        claim(
            'V8 The images look different: STD surer against AT surer, the tenths of largest '
            'difference in rank, at least one measure differs (Mann-Whitney, Holm)',
            PAPER,
            '; '.join(f'{k} {a:.3f} against {b:.3f}, p {p:.1g}' for (k, a, b), p in zip(parts, adjusted))
            or 'fewer than five images',
            bad
            or (
                'uninformative: fewer than five images'
                if not parts
                else 'supported'
                if min(adjusted) < 0.05
                else 'inconclusive'
            ),
        )
    )


def holm(p_values):
    """Holm's step-down adjustment (1979)."""
    order = np.argsort(p_values)
    out, largest = [0.0] * len(p_values), 0.0
    for i, k in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[k]))
        out[k] = largest
    return out


def student_claims(results, claims):
    """V0 and V9-V16."""
    students = results['config']['students']
    here, there = judged(results)
    samplers = [sampler(results, which) for which in (here, there)]
    gate = ''
    _, kept = samplers[0]
    at_net, std_net = samplers[0][0]('AT net'), samplers[0][0]('STD net')
    if collapsed(results, 'STD', 'AT') or interval(at_net - std_net)[1] <= 0.05:
        gate = 'the teacher is not more robust than the standard network'
    broken = {name: failed(results, name) for name in ['STD net', 'AT net', *students]}
    broken = {k: v for k, v in broken.items() if v}
    claims.append(
        claim(
            'V0 Every student learned its target (mean confidence within {:.0f} %, log-odds within '
            '{:.0f} % or 0.2, loosened after a first run; KL below a quarter of that of one constant '
            'answer) and no check of the evaluation is raised'.format(*(100 * v for v in LEARNED.values())),
            'control',
            '; '.join(f'{k}: {v}' for k, v in broken.items())
            or f'{len(students)} students, {len(runs_of(results, "AT net")[0]["masking"])} checks each',
            'contradicted' if broken else 'supported',
        )
    )

    def common_images(names):
        keep = [correct(results, n, 'natural').all(0) for n in (*names, 'STD net', 'AT net')]
        return np.all(keep, 0)

    lengths = results['lengths']
    growing = False
    if 'M0' in students and len(lengths) > 1:
        gain = interval(kept('M0') - kept('M0', lengths[-2]))
        growing = gain[0] > CONVERGED

    def add(text, source, names, formula, threshold=0.0, detail=None, base=True):
        """One row: formula(kept) is an array of draws; supported above the threshold."""
        if not set(names) <= set(students):
            return
        intact = next(n for n in names if n.startswith('M0'))
        value, low, high = interval(formula(kept))
        details = ['{:+.2f} [{:+.2f}, {:+.2f}]'.format(value, low, high)]
        if interval(samplers[1][1](intact))[1] > BASE or not base:  # else a ratio says nothing
            details.append(
                'at {}: {:+.2f} [{:+.2f}, {:+.2f}]'.format(
                    radius_text(results, there), *interval(formula(samplers[1][1]))
                )
            )
        details += [detail] if detail else []
        verdict = effect_verdict(low, high, threshold)
        # another natural accuracy alone must not decide
        if max(abs(rate(results, n, 'natural') - rate(results, intact, 'natural')) for n in names) > NATURAL_GAP:
            images = common_images(names)
            again = interval(formula(sampler(results, here, images)[1])) if images.sum() > 20 else (math.nan,) * 3
            details.append('on the {} images all get right {:+.2f} [{:+.2f}, {:+.2f}]'.format(images.sum(), *again))
            if effect_verdict(*again[1:], threshold) != verdict:
                verdict = 'inconclusive'
        if base and growing and verdict == 'contradicted':
            verdict = 'inconclusive: the distillation has not converged'
        if base and interval(kept(intact))[1] < BASE:
            verdict = f'uninformative: {intact} itself keeps less than {BASE} (lower end)'
        invalid = [n for n in (*names, 'STD net', 'AT net') if n in broken]
        if gate or invalid:
            verdict = 'uninformative: ' + (gate or f'invalid, {", ".join(invalid)} fails V0')
        claims.append(claim(text, source, '; '.join(details), verdict))

    def lost(name, epochs=None):
        intact = 'M0' + name[len(name.partition('/')[0]) :]

        def share(k):
            base = k(intact, epochs)
            return 1 - k(name, epochs) / np.where(np.abs(base) < 0.02, 0.02, base)

        return share

    def trend(name):
        if name not in LENGTH_STUDENTS or len(lengths) < 2 or not {'M0', name} <= set(students):
            return None
        return 'R(M0) and R({}) at {} epochs: {}'.format(
            name,
            ', '.join(map(str, lengths)),
            ', '.join(f'{interval(kept("M0", e))[0]:.2f} / {interval(kept(name, e))[0]:.2f}' for e in lengths),
        )

    def matters(text, names, threshold=MATTERS, source=OURS):
        """A row for each manipulation and, where they were trained, other objectives."""
        for name, what in names:
            for option in ('', *sorted({s[s.index('/') :] for s in students if '/' in s})):
                how = {'': '', '/mse': ', mean square of logits', '/again': ', again'}.get(
                    option, f', temperature {option[2:]}'
                )
                add(
                    f'{text}: {what} ({name}{how}), share of R(M0) lost at {where}, above {threshold}',
                    source,
                    ['M0' + option, name + option],
                    lost(name + option),
                    threshold,
                    trend(name + option),
                )

    where = radius_text(results, here)
    add(
        f'V9 Distillation on clean images transfers robustness: R(M0) at {where}, above {TRANSFER}',
        'after Goldblum et al. 2020',
        ['M0'],
        lambda k: k('M0'),
        TRANSFER,
        base=False,
    )
    if 'M0' in students and len(lengths) > 1:
        claims.append(
            claim(
                f'Control: the distillation has converged, R(M0) gains less than {CONVERGED} from '
                f'{lengths[-2]} to {lengths[-1]} epochs (else no claim on students is contradicted)',
                'control',
                '{:+.2f} [{:+.2f}, {:+.2f}]'.format(*gain),
                effect_verdict(-gain[2], -gain[1], -CONVERGED),
            )
        )
    if {'M0', 'M0/again'} <= set(students):
        again = [abs(interval(k('M0'))[0] - interval(k('M0/again'))[0]) for _, k in samplers]
        claims.append(
            claim(
                'Control: retraining M0 from other initial weights moves R by less than the smallest '
                f'effect claimed, {MATTERS} R(M0)',
                'control',
                f'{again[0]:.2f}; at {radius_text(results, there)}: {again[1]:.2f}',
                'supported' if again[0] < MATTERS * interval(kept('M0'))[0] else 'contradicted',
            )
        )
    matters(
        'V10 Small logits alone are not enough',
        (
            ('M16', "label smoothing at AT's mean confidence"),
            ('M17', "STD's logits at AT's mean gap"),
            ('LSQ', "logit squeezing to AT's mean largest logit"),
        ),
        1 - SHRINK_ONLY,
        'ours; after Mosbach et al. 2018',
    )
    matters('V11 Sample-wise confidence matters', (('M11', 'made constant'), ('M12', 'shuffled within the class')))
    matters(
        'V12 Information on incorrect classes matters',
        (('M1', 'permuted at every presentation'), ('M2', 'permuted once per sample'), ('M4', 'made equal')),
    )
    matters('V12 It is essential', (('M1', 'permuted at every presentation'),), ESSENTIAL)
    add(
        'V13 The order of incorrect classes matters: the smaller of R(M0) - R(M8) and R(M8) - R(M6)',
        OURS,
        ['M0', 'M8', 'M6'],
        lambda k: np.minimum(k('M0') - k('M8'), k('M8') - k('M6')),
    )
    add(
        'V13 The order matters more than own values and confidence: R(M9) - R(M8)',
        'control',
        ['M0', 'M8', 'M9'],
        lambda k: k('M9') - k('M8'),
    )
    matters(
        'V14 The distributions are complex, summaries do not do',
        (('M7', 'class means'), ('M15', 'class Gaussians')),
        1 - COMPLEX,
    )
    found = dose(results)
    if len(found) >= 4 and 'M0' in students:
        counts = np.array([k for k, _ in found])

        def spearman(k):
            values = np.stack([k(s) for _, s in found], 1)
            return np.array([rank_correlation(counts[None], row[None]) for row in values])

        add(
            f'V15 Dose response: Spearman of R with the number of wrong classes kept, above {DOSE}',
            'ours',
            [s for _, s in found],
            spearman,
            DOSE,
            ', '.join(f'{n}: R {interval(kept(s))[0]:.2f}' for n, s in found),
        )
    matters(
        'Swap',
        (('SA', "STD's confidence with AT's other logits"), ('AS', "AT's confidence with STD's other logits")),
        source='ours',
    )
    if 'M0' in students:
        gaps = {s: rate(results, s, 'natural') - rate(results, 'M0', 'natural') for s in students}
        wide = {k: v for k, v in gaps.items() if abs(v) > NATURAL_GAP}
        claims.append(
            claim(
                'V16 Not a matter of natural accuracy: all students within 2 points of M0 (rows with '
                'others need the same verdict on images all get right)',
                'control',
                ', '.join(f'{k} {100 * v:+.1f}' for k, v in wide.items())
                or 'largest difference {:+.1f} points'.format(100 * max(gaps.values(), key=abs)),
                'contradicted' if wide else 'supported',
            )
        )


# --------------------------------------------------------------------------------------------


def print_table(results):
    """Teachers' logits; then natural and worst-case accuracy of every network and student."""
    common.log.info(
        '\nClean test images (training images)\n%-12s%21s%21s%21s%12s',
        '',
        'largest logit',
        'minus the mean',
        'gap',
        'accuracy',
    )
    for name in per_seed(results, 'logits')[0]:
        cells = ''
        for key in ('largest', 'centred', 'gap'):
            train = np.mean([v[name]['train'][key] for v in per_seed(results, 'logits')])
            cells += f'{measure_of(results, name, key).mean():13.2f} ({train:5.2f})'
        common.log.info('%-12s%s%11.1f%%', name, cells, 100 * measure_of(results, name, 'correct').mean())
    common.log.info(
        '\n%-38s%9s%9s%9s%9s%9s%8s%8s',
        f"{results['lengths'][-1]} epochs",
        'natural',
        'PGD-CE',
        'margin',
        'worst',
        'other',
        'KL',
        'flips',
    )
    for name in ['AT net', *results['config']['students'], 'STD net']:
        runs = runs_of(results, name)
        cells = [
            100 * rate(results, name, 'natural'),
            *(100 * np.mean([r['rates'][k] for r in runs]) for k in ('pgd20', 'margin')),
            *(100 * rate(results, name, i) for i in judged(results)),
        ]
        extra = (
            '%8.3f%7.1f%%' % (np.mean([r['kl'] for r in runs]), 100 * np.mean([r['flips'] for r in runs]))
            if 'kl' in runs[0]
            else ''
        )
        common.log.info(
            '%-38s%s%s%s',
            name if name.endswith(' net') else student_name(name),
            ''.join(f'{c:8.1f}%' for c in cells),
            extra,
            '  fails V0' if failed(results, name) else '',
        )
    common.log.info('PGD-CE, margin, worst: at %s; the other: %s', *(radius_text(results, i) for i in judged(results)))


def make_parser():
    parser = common.make_parser(__doc__, DEFAULTS)
    add = parser.add_argument

    def student(text):
        try:
            parse_student(text)
        except ValueError:
            if text != 'all':
                raise argparse.ArgumentTypeError(
                    f"{text!r} is none of all, {', '.join(NAMES)}, nor one of them with /T5 "
                    '(temperature), /mse (loss) or /again (other initial weights)'
                )
        return text

    add(
        '--students',
        type=student,
        nargs='+',
        metavar='M',
        help='all, or of ' + ', '.join(NAMES) + '; M0/T5: at temperature 5, M0/mse: mean square of logits, '
        'M0/again: other initial weights and order',
    )
    add('--distil-epochs', type=common.count, metavar='N', help='the students see')
    add('--student-arch', choices=common.ARCHS, metavar='NAME', help="(the teacher's)")
    add(
        '--teacher',
        choices=[m for m in common.METHODS if m != 'standard'],
        default='pgd',
        metavar='M',
        help='how the AT teacher is trained (pgd)',
    )
    add(
        '--teacher-wrong',
        choices=('keep', 'drop'),
        default='keep',
        metavar='X',
        help='training images that the AT teacher gets wrong (keep)',
    )
    add('--judged', type=float, choices=RADII, metavar='X', help='radius of the claims, as a share of --eps')
    add(
        '--logit-images', type=common.count, metavar='N', help='clean test images at most, for the statistics of logits'
    )
    add('--margin-steps', type=common.count, metavar='N', help='of PGD on the margin')
    add('--restarts', type=common.count, metavar='N', help='of PGD on the margin')
    common.add_attack_flags(parser)
    return parser


def main(argv=None):
    args = common.parse(make_parser(), argv)
    if 'all' in args.students:
        args.students = list(NAMES) + [s for s in args.students if '/' in s]
    if len(set(args.students)) < len(args.students):
        raise common.UserError('--students must differ from each other')
    folder, results = common.measured(args, study, 'logit_distill')
    print_table(results)
    draw(results, folder)
    judge(results, folder)


if __name__ == '__main__':
    common.entry(main)
