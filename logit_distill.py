"""The logits of robust networks, and which part of them teaches a student robustness.

Question   Adversarial training lowers the largest logit and its distance to the others. A student
           that copies a robust teacher's logits on clean images alone becomes somewhat robust:
           by small logits, by which images are sure, or by the order of the wrong classes?
Papers     Seguin et al. 2021 (arXiv 2108.12001; of its text only the abstract was at hand, so the
           manipulations, thresholds and the test of its theory are ours), Shafahi et al. 2019
           (linearised radius), Goldblum et al. 2020 (distillation on clean images)
Usage      python logit_distill.py                              shapes, minutes on a laptop
           python logit_distill.py --dataset cifar10            ResNet-18, one GPU
           python logit_distill.py --students M0 M5 M6 M11 --seeds 0 1

Expect     shapes, three seeds, 500 images at 4/255: worst case 7 % of the standard network, 89 % of
           the robust one; students M0 33, M8 24, M4 23, M12 17, M7 15, M17 8 %; all ten claims
           hold; 4 CPU minutes a seed. There a student starts from the standard network (warm): what
           is asked is what clean images add to that. Elsewhere it starts anew (cold), which on
           shapes keeps the order: M0 22.5, M4 18.2, M7 15.1 %. CIFAR-10, small-cnn-64, five epochs
           of students, under PGD: standard 4, robust 54, M0 44, M4 41, M12 42 %.
"""
import argparse
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import common
from common import ATTACK_NAMES, Claim, bootstrap

# T = 5: at T = 1 the wrong classes are 3 % of the divergence on shapes, at 5 they are 12 %, and
# changing them changes the size of the target least (measured with version 1). 200 epochs are
# Goldblum et al.'s. shapes: at 8/255 students keep too little to be compared.
DEFAULTS = {
    '*': dict(students=['M0', 'M4', 'M7', 'M8', 'M12', 'M17'], temperature=5.0, start='cold',
              distil_epochs=200, judged=1.0, suite='full', test_size=1000),
    'shapes': dict(start='warm', distil_epochs=4, judged=0.5, test_size=500)}
TEACHER = 'pgd'  # of common.METHODS
NETWORKS = {  # training and what is added to the seed; the last two show what a seed changes
    'standard': ('standard', 0), 'robust': (TEACHER, 0),
    "standard'": ('standard', 1), "robust'": (TEACHER, 1)}
MARGIN_STEPS = 40
SCALE_IMAGES, SCALE_DRAWS = 500, 200  # training images that are attacked; draws of a bootstrap
SCALES = np.geomspace(1 / 16, 16, 41)
GALLERY = 8  # images in a row

# Thresholds of the claims, chosen before the runs.
NEAR_ONE, SHRUNK = 1.25, 0.5  # best scale of attacked logits: within this factor of 1, below that
DISAGREE = 0.05  # of rank correlations
GAIN = 0.05  # worst-case accuracy that M0 has to gain before it can lose any
LEARNED = 0.25  # divergence from the target, share of that of the best constant answer
NATURAL = 0.02  # difference of natural accuracy to M0

# -------------------------------------------------------------------------- Measures of logits

def log_odds(t, m):
    """log p_m / (1 - p_m) of softmax(t): (N,). Ranks as the confidence does, without its
    saturation at 1. t: (N, K); m: (N,)."""
    rest = t.scatter(1, m[:, None], -math.inf).logsumexp(1)
    return t.gather(1, m[:, None])[:, 0] - rest

def sizes(z):
    """Of logits (N, K): the largest less their mean, which no shift of all logits changes; its gap
    to the runner-up; log-odds of the prediction: each (N,)."""
    top = z.topk(2, 1)[0]
    odds = log_odds(z, z.argmax(1))
    return dict(centred=top[:, 0] - z.mean(1), gap=top[:, 0] - top[:, 1], odds=odds)

def linear_radius(model, x, y, norm='linf'):
    """(gap, slope), each (N,): z_y - z_j and the dual norm of its gradient, for the class j != y
    where gap / slope is least. Were the logits linear, this ratio would be the distance to the
    boundary (Shafahi et al. 2019, equation 4). x: (N, C, H, W) in [0, 1]."""
    with common.frozen(model) as net, torch.enable_grad():
        x = x.detach().requires_grad_()
        z = common.first_of(net(x))
        gradient = torch.stack([torch.autograd.grad(v.sum(), x, retain_graph=True)[0].flatten(1)
                                for v in z.unbind(1)], 1)  # (N, K, CHW)
    own = gradient[torch.arange(len(y), device=y.device), y][:, None]
    slope = (own - gradient).norm(1 if norm == 'linf' else 2, dim=2).clamp(min=1e-12)
    gap = (z.gather(1, y[:, None]) - z).detach()
    j = (gap / slope).scatter(1, y[:, None], math.inf).argmin(1, keepdim=True)
    return gap.gather(1, j)[:, 0], slope.gather(1, j)[:, 0]

def best_scale(z, y, weights):
    """(B,): the s in [0.001, 1000] that minimises the weighted cross-entropy of s z, by bisection
    of its derivative, for it is convex. Where all images are right it falls up to the upper end.
    z: (N, K); y: (N,); weights: (B, N), float64."""
    z = (z - z.gather(1, y[:, None])).double()
    low = torch.full_like(weights[:, 0], math.log(1e-3))
    high = -low
    for _ in range(40):
        middle = (low + high) / 2
        p = (middle.exp()[:, None, None] * z).softmax(2)  # (B, N, K)
        falls = (weights * (p * z).sum(2)).sum(1) <= 0  # 0: too small for a float
        low, high = torch.where(falls, middle, low), torch.where(falls, high, middle)
    return ((low + high) / 2).exp()

# ------------------------------------------------------------------------- Manipulated targets

# t: a teacher's logits (N, K) over the temperature; m: (N,), the class that it predicts; "others"
# are the other classes; c: `describe` of all training images.

def split(t, m):
    """(classes, values), each (N, K): m first, then the others from the largest to the smallest."""
    order = t.scatter(1, m[:, None], math.inf).argsort(dim=1, descending=True, stable=True)
    return order, t.gather(1, order)

def join(classes, values):
    """The logits (N, K) that have these values at these classes."""
    return torch.empty_like(values).scatter_(1, classes, values)

def others(t, m, change):
    """change(values (N, K - 1), falling) -> the new values of the others."""
    classes, values = split(t, m)
    return join(classes, torch.cat((values[:, :1], change(values[:, 1:])), 1))

def level(values, keep=0):
    """All but the first `keep` made equal, their share of the softmax unchanged: the log of the
    mean exponential. Their mean would raise the confidence."""
    tail = values[:, keep:]
    flat = tail.logsumexp(1, keepdim=True) - math.log(max(tail.shape[1], 1))
    return torch.cat((values[:, :keep], flat.expand_as(tail)), 1)

def with_odds(t, m, odds):
    """The others as they are, m moved so that its log-odds are `odds`, a number or (N,)."""
    return t + F.one_hot(m, t.shape[1]) * (odds - log_odds(t, m))[:, None]

def exchange(values, group, generator):
    """values (N,) shuffled among the images of the same group (N,)."""
    chance = torch.randperm(len(group), generator=generator, device=group.device)
    out = torch.empty_like(values)
    out[group.argsort(stable=True)] = values[chance[group[chance].argsort(stable=True)]]
    return out

def describe(t, generator):
    """Of all training images: row m of mean (K, K), the mean logits of those read as m; borrowed
    (N,), log-odds exchanged among these; the log-odds of the mean confidence; the mean gap."""
    m, size = t.argmax(1), sizes(t)
    member = F.one_hot(m, t.shape[1]).to(t)
    mean = member.T @ (t - t.mean(1, keepdim=True)) / member.sum(0).clamp(min=1)[:, None]
    return dict(mean=mean, borrowed=exchange(size['odds'], m, generator), gap=size['gap'].mean(),
                mean_odds=torch.logit(size['odds'].sigmoid().mean()))

TARGETS = {  # student: whose logits it is taught, what is done to them, the same in words
    'M0': ('robust', lambda t, m, c: t, 'as they are'),
    'M4': ('robust', lambda t, m, c: others(t, m, level), 'others levelled'),
    'M5': ('robust', lambda t, m, c: others(t, m, partial(level, keep=1)),
           'all but runner-up levelled'),
    'M6': ('robust', lambda t, m, c: others(t, m, lambda v: v.flip(1)), 'others reversed'),
    'M7': ('robust', lambda t, m, c: c['mean'][m], 'mean of the class'),
    'M8': ('robust', lambda t, m, c: join(split(c['mean'][m], m)[0], split(t, m)[1]),
           "own values, class's order"),
    'M11': ('robust', lambda t, m, c: with_odds(t, m, c['mean_odds']), 'confidence constant'),
    'M12': ('robust', lambda t, m, c: with_odds(t, m, c['borrowed']), 'confidence shuffled'),
    'M16': ('robust', lambda t, m, c: others(with_odds(t, m, c['mean_odds']), m, level),
            'constant and levelled'),
    'M17': ('standard', lambda t, m, c: c['shrink'] * t, "standard's, shrunk"),
    'STD': ('standard', lambda t, m, c: t, "standard's, as they are")}

def make_target(name, t, rows, facts):
    """(target (N, K), whether its largest class is still the teacher's (N,)). t: logits of the
    student's own teacher over the temperature; rows (N,): which training images these are."""
    m = t.argmax(1)
    target = TARGETS[name][1](t, m, dict(facts, borrowed=facts['borrowed'][rows]))
    return target, target.argmax(1) == m

def fingerprint(name):
    """A short hash of what a row of TARGETS does: a changed row is another student."""
    generator = common.make_generator('fingerprint')
    t = torch.randn(64, 10, generator=generator)
    facts = describe(t, generator) | dict(shrink=0.5)
    return common.digest((1000 * make_target(name, t, torch.arange(64), facts)[0]).round().int())

def distil_loss(z, target, temperature):
    """T^2 KL(softmax(target) || softmax(z / T)) of each image, nats (Hinton et al. 2015): (N,).
    z: the student's logits (N, K); target: (N, K), over the temperature already."""
    return temperature**2 * common.kl_divergence(z.float() / temperature, target)

# --------------------------------------------------------------------------------- Experiment

def study(args, folder, device, data, results):
    """Train the networks, measure their logits, distil and attack the students."""
    keep = partial(common.save_results, results, folder)
    near = argparse.Namespace(**vars(args) | dict(eps=args.judged * args.eps))
    results['radius'] = common.eps_text(vars(near))
    for seed in args.seeds:
        s = f's{seed}'
        states = {name: common.train(args, data, method, seed + more, device)
                  for name, (method, more) in NETWORKS.items()}
        nets = {name: common.restore(state, 'best', args, data, device)
                for name, state in states.items()}
        for name, net in nets.items():
            common.measure(results, ('logits', name, s), lambda: measure_logits(net, data), folder)
        for name in COLOURS:
            common.measure(results, ('theory', name, s),
                           lambda: measure_theory(nets[name], data, args), folder)
        lesson = prepare(args, data, nets, seed)
        common.measure(results, ('gallery',), lambda: gallery(results, data, s), folder)
        for name in ('standard', 'robust', *args.students):
            if name in nets:
                state, net = states[name], nets[name]
            else:
                state = distil(args, data, name, states, nets, lesson, seed, device)
                net = common.restore(state, 'last', args, data, device)  # equal steps for all
            run = common.measure(results, ('runs', name, s), lambda: dict(
                history=state['history'], seconds=state['seconds'], correct={}), folder)
            attack_network(net, data, near, run, keep)
            if name not in nets:
                run['target'] = measure_target(net, data, args, name, lesson)

def measure_logits(net, data):
    """What a network says about the clean test images; profile (K,): mean sorted logits."""
    z = common.logits_of(net, data.test[0])
    profile = (z - z.mean(1, keepdim=True)).sort(1, descending=True)[0].mean(0)
    found = dict(sizes(z), right=z.argmax(1) == data.test[1], profile=profile)
    return {name: v.cpu().numpy() for name, v in found.items()}

def measure_theory(net, data, args):
    """gap, slope (N,) of the test images (`linear_radius`); of training images under PGD-10 at
    eps, the cross-entropy at SCALES and the best scale, then those of SCALE_DRAWS draws of the
    images (1 + draws,)."""
    parts = [linear_radius(net, common.to_float(x), y, args.norm)
             for x, y in zip(data.test[0].split(50), data.test[1].split(50))]
    gap, slope = (torch.cat(v) for v in zip(*parts))
    x, y = common.to_float(data.train[0][:SCALE_IMAGES]), data.train[1][:SCALE_IMAGES]
    z = common.logits_of(net, common.pgd(
        net, x, y, eps=args.eps, step_size=args.eps / 4, steps=10, norm=args.norm,
        generator=common.make_generator('theory', device=x.device)))
    draws = np.random.default_rng(0).multinomial(len(y), np.full(len(y), 1 / len(y)), SCALE_DRAWS)
    weights = torch.from_numpy(np.vstack((np.ones(len(y)), draws))).to(y.device)
    found = dict(gap=gap, slope=slope, best=best_scale(z, y, weights),
                 curve=torch.stack([F.cross_entropy(s * z, y) for s in SCALES.tolist()]))
    return {name: v.cpu().numpy() for name, v in found.items()}

def prepare(args, data, nets, seed):
    """What all students of a seed share: {teacher: (logits of the training images over the
    temperature (N, K), facts)}."""
    lesson = {}
    for name in ('robust', 'standard'):
        t = common.logits_of(nets[name], data.train[0]) / args.temperature
        facts = describe(t, common.make_generator('exchange', seed, device=t.device))
        facts['shrink'] = lesson.get('robust', (t, facts))[1]['gap'] / facts['gap']
        lesson[name] = t, facts
    return lesson

def distil(args, data, name, states, nets, lesson, seed, device):
    """Train a student on clean images, from the standard network's weights (warm) or from other
    ones than the teachers' (cold)."""
    teacher = TARGETS[name][0]
    t, facts = lesson[teacher]
    fixed = not (data.pad or data.flip)  # every image has one view

    def loss_fn(net, x, rows, threat, generator):
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            own = t[rows] if fixed else common.first_of(nets[teacher](x)) / args.temperature
            target, same = make_target(name, own, rows, facts)
        each = distil_loss(common.first_of(net(x)), target, args.temperature)
        return (each * same).sum() / same.sum().clamp(min=1)

    def build(*key):
        model = common.make_model(*key)
        if args.start == 'warm':
            model.load_state_dict(states['standard']['best'])
        return model

    taught = argparse.Namespace(**vars(args) | dict(epochs=args.distil_epochs))
    extra = dict(target=fingerprint(name), temperature=args.temperature, start=args.start,
                 teachers=[common.digest(*states[k]['best'].values()) for k in (teacher, *lesson)])
    return common.train(taught, data, name, seed + 1000, device, build=build, loss_fn=loss_fn,
                        extra=extra, labels=torch.arange(len(t), device=device))

def attack_network(net, data, args, run, keep):
    """Fill run['correct'], by `common.evaluate` with PGD on the margin besides, and run['masking'];
    a short suite compares the two PGDs in place of the two APGDs."""
    attacks, correct = common.evaluation_attacks(args), run['correct']
    short = dict(fgsm=attacks['fgsm'], pgd=attacks['pgd'],
                 margin=partial(attacks['pgd'], steps=MARGIN_STEPS, loss=common.margin))
    common.evaluate(net, data, short if args.suite == 'short' else short | attacks, correct, keep)
    gap = float(correct['pgd'].mean() - correct['margin'].mean())
    run['masking'] = {'cross-entropy far weaker': gap} | common.masking_check(
        net, data, correct, norm=args.norm)

def measure_target(net, data, args, name, lesson):
    """Of a student's target on the training images: mean confidence at the temperature, centred
    maximum and gap in units of logits, share of images left out; and the divergence of the student
    from it, as a share of that of the best constant answer."""
    t, facts = lesson[TARGETS[name][0]]
    target, same = make_target(name, t, torch.arange(len(t), device=t.device), facts)
    target, p = target[same], target[same].softmax(1)
    z = common.logits_of(net, data.train[0])[same] / args.temperature
    constant = p.mean(0, keepdim=True).log().expand_as(p)
    own, most = (common.kl_divergence(v, target).mean().item() for v in (z, constant))
    size = {k: args.temperature * v.mean().item() for k, v in sizes(target).items()}
    return dict(confidence=p.amax(1).mean().item(), centred=size['centred'], gap=size['gap'],
                left_out=1 - same.float().mean().item(), learned=own / max(most, 1e-12))

def ranks(values):
    """(..., N) -> (..., N), from 0 to below 1."""
    return values.argsort(-1, kind='stable').argsort(-1) / values.shape[-1]

def gallery(results, data, s):
    """The test images, read rightly by both, whose confidence ranks differ most: {who is surer:
    dict(image (n, C, H, W), label (n,), ranks (n, 2))}."""
    found = [results['logits'][name][s] for name in ('standard', 'robust')]
    rank = np.stack([ranks(v['odds']) for v in found], 1)
    right = np.flatnonzero(found[0]['right'] & found[1]['right'])
    order = right[np.argsort(rank[right, 1] - rank[right, 0], kind='stable')]
    out = {}
    for who, rows in (('standard', order[:GALLERY]), ('robust', order[::-1][:GALLERY].copy())):
        images = common.to_float(data.test[0].cpu()[rows]).numpy()
        out[who] = dict(image=images, label=results['labels'][rows], ranks=rank[rows])
    return out

# ------------------------------------------------------------------------------------ Figures

COLOURS = {'standard': '#000000', 'robust': '#D55E00'}  # common.METHOD_COLOURS

def draw(results, folder):
    for figure in (figure_logits, figure_theory, figure_confidence, figure_gallery,
                   figure_students):
        figure(results, folder)

def figure_logits(results, folder):
    logits = {name: common.stack(results['logits'][name]) for name in COLOURS}
    fig, (axes,) = common.new_figure(1, 3, 9.0, 3.0)
    for axis, key, text in ((axes[0], 'centred', 'largest logit minus the mean of all'),
                            (axes[1], 'gap', 'largest logit minus the runner-up')):
        bins = np.linspace(*np.percentile([v[key] for v in logits.values()], (0.2, 99.8)), 40)
        for name, colour in COLOURS.items():
            values = logits[name][key].ravel()
            axis.hist(values, bins, weights=np.full(len(values), 100 / len(values)), color=colour,
                      histtype='step')
            axis.axvline(values.mean(), color=colour, ls=':', lw=1.2)
        axis.set(xlabel=text, ylabel='test images (%)', title='Histogram (dotted: mean)')
    for name, colour in COLOURS.items():
        profile = logits[name]['profile'].mean(0)
        axes[2].plot(range(1, len(profile) + 1), profile, '.-', color=colour, label=name)
    axes[2].set(xlabel='rank of the class by its logit', ylabel='mean logit (mean of all: 0)',
                title='Sorted logits')
    axes[2].legend(title='network')
    fig.suptitle('Logits of clean test images: are they smaller after adversarial training?')
    common.save_figure(fig, folder, 'fig1_logits')

def figure_theory(results, folder):
    theory, config = {k: common.stack(v) for k, v in results['theory'].items()}, results['config']
    fig, ((left, right),) = common.new_figure(1, 2, 8.5, 3.6)
    for name, colour in COLOURS.items():
        slope, gap = theory[name]['slope'], theory[name]['gap']
        left.plot(slope[gap > 0], gap[gap > 0], '.', ms=3, alpha=0.5, color=colour, label=name)
        right.plot(SCALES, theory[name]['curve'].mean(0), color=colour, label=name)
    ends = np.percentile([v['slope'] for v in theory.values()], (0, 100))
    least = np.percentile([v['gap'] for v in theory.values()], 5)
    left.plot(ends, config['eps'] * ends, color='0.3', lw=1, label=common.eps_text(config))
    left.set(xscale='log', yscale='log', ylim=(max(least, 0.03), None), ylabel='logit gap',
             xlabel=f'gradient of the gap ({1 if config["norm"] == "linf" else 2}-norm)',
             title='The gap and its gradient:\nsafe to first order above the line')
    right.axvline(1, color='0.6', lw=1, ls=':', label='as trained')
    right.set(xscale='log', yscale='log', xlabel='scale s', ylabel='cross-entropy of s z (nats)',
              title='The scale that attacked training images\nask for: the minimum of the curve')
    for axis in (left, right):
        axis.legend()
    common.save_figure(fig, folder, 'fig2_theory')

def figure_confidence(results, folder):
    rank = {k: ranks(common.stack(runs)['odds']) for k, runs in results['logits'].items()}
    fig, axes = common.new_figure(1, 3, 9.0, 3.5)
    pairs = ('standard', 'robust'), ('standard', "standard'"), ('robust', "robust'")
    for axis, (a, b) in zip(axes[0], pairs):
        axis.plot(100 * rank[a][0], 100 * rank[b][0], '.', ms=3, alpha=0.6, color='#0072B2')
        axis.plot((0, 100), (0, 100), color='0.6', lw=0.8, ls='--')
        axis.set(xlabel=f'confidence rank in {a} (%)', ylabel=f'in {b} (%)', aspect=1,
                 title=f'rank correlation {correlation(rank[a], rank[b]):.2f}')
    fig.suptitle("Which test images is a network sure of? Standard and robust network beside two "
                 "of a kind\n(': the same training from the next seed; dashed: the same rank)")
    common.save_figure(fig, folder, 'fig3_confidence')

def figure_gallery(results, folder):
    fig, axes = common.new_figure(2, GALLERY, 1.15 * GALLERY, 3.9)
    for row, (who, found) in zip(axes, results['gallery'].items()):
        row[0].text(-0.12, 0.5, f'{who} surer', rotation=90, ha='right', va='center',
                    transform=row[0].transAxes)
        for axis in row:
            axis.axis('off')
        for axis, image, label, rank in zip(row, found['image'], found['label'], found['ranks']):
            common.show_image(axis, image, results['classes'][label]
                              + '\n{:.0f} % | {:.0f} %'.format(*(100 * rank)))
    fig.suptitle('Images, read rightly by both, whose confidence differs most; below the class:\n'
                 'rank of the confidence in the standard | in the robust network')
    common.save_figure(fig, folder, 'fig4_gallery')

def figure_students(results, folder):
    runs = {name: common.stack(arm)['correct'] for name, arm in results['runs'].items()}
    compared = 'M0' if 'M0' in runs else 'robust'
    base = runs[compared]['worst'].astype(float)
    fig, ((left, right),) = common.new_figure(1, 2, 8.5, 1.2 + 0.36 * len(runs), sharey=True)
    for i, (name, correct) in enumerate(runs.items()):
        colour = COLOURS.get(name, '#0072B2')
        left.plot(100 * correct['natural'].mean(), i, 'o', mfc='none', color=colour)
        for axis, values in ((left, correct['worst']), (right, correct['worst'] - base)):
            mean, low, high = 100 * np.array(bootstrap(values))
            axis.plot(mean, i, 'o', color=colour)
            axis.plot((low, high), (i, i), color=colour)
    texts = [f'{k}: {TARGETS[k][2]}' if k in TARGETS else f'{k} network' for k in runs]
    left.axvline(100 / len(results['classes']), color='0.6', lw=1, ls='--')
    left.set(yticks=range(len(runs)), yticklabels=texts, xlim=(-3, 103),
             xlabel=f'test accuracy (%), worst case at {results["radius"]}; dashed: chance',
             title='Natural (open), worst case (full)')
    left.invert_yaxis()
    right.axvline(0, color='0.6', lw=1, ls='--')
    right.set(xlabel=f'worst case minus that of {compared} (points)',
              title='Paired, image by image')
    fig.suptitle('Students of clean images: what they lose when part of the logits is taken away')
    common.save_figure(fig, folder, 'fig5_students')

# ------------------------------------------------------------------------------------- Claims

def correlation(a, b):
    """Pearson's, the mean over rows (S, N): of ranks it is Spearman's."""
    return float(np.mean([np.corrcoef(u, v)[0, 1] for u, v in zip(a, b)]))

def claims(results):
    """The rows on the logits of the networks, then those on students."""
    logits = {name: common.stack(runs) for name, runs in results['logits'].items()}
    theory = {name: common.stack(runs) for name, runs in results['theory'].items()}
    why = [common.near_chance(v['right'], results['labels']) for v in logits.values()]
    bad = why[0] or why[1]
    standard, robust = logits['standard'], logits['robust']
    both = standard['right'] & robust['right']

    def growth(gap, slope, gap_robust, slope_robust, both):
        before, after = ((u * both).sum() / max((v * both).sum(), 1e-9)
                         for u, v in ((gap, slope), (gap_robust, slope_robust)))
        return math.log(max(after, 1e-9) / max(before, 1e-9))

    parts = [theory[k][v] for k in COLOURS for v in ('gap', 'slope')]
    ratio = common.resample(growth, *parts, both)
    apart = common.resample(lambda a, b, c, d: min(correlation(a, c), correlation(b, d))
                            - correlation(a, b),
                            *(ranks(logits[name]['odds']) for name in NETWORKS))
    return [
        Claim('the largest logit less the mean is lower: standard minus robust',
              'Seguin et al. 2021', standard['centred'] - robust['centred'], unless=bad),
        Claim('the gap to the runner-up is lower: standard minus robust', 'Seguin et al. 2021',
              standard['gap'] - robust['gap'], unless=bad),
        scale_claim(theory, bad),
        Claim('the gradient shrinks more than the gap: log of gap / gradient, robust minus '
              'standard, images that both read rightly', 'Shafahi et al. 2019', ratio[0],
              unless=bad, interval=ratio[1:]),
        Claim('they are sure of different images: rank correlation of confidence, the smaller of '
              'two of a kind minus standard with robust', 'Seguin et al. 2021', apart[0],
              above=DISAGREE, unless=bad or why[2] or why[3], interval=apart[1:]),
        *student_claims(results)]

def scale_claim(theory, bad):
    """Attacked training images cap the scale. The effect: the nats to the nearer threshold."""
    best = [np.log(theory[k]['best']) for k in COLOURS]  # (S, 1 + draws); first: of all images
    seeds = np.random.default_rng(0).integers(len(best[0]), size=best[0].shape)
    seeds[:, 0] = np.arange(len(seeds))
    standard, robust = (np.take_along_axis(v, seeds, 0).mean(0) for v in best)
    slack = np.minimum(math.log(NEAR_ONE) - abs(robust), math.log(SHRUNK) - standard)
    return Claim('robust logits have the scale that attacked images ask for: best s '
                 f'{math.exp(robust[0]):.2f}, needed within a factor of {NEAR_ONE} of 1; '
                 f'{math.exp(standard[0]):.3f} for standard ones, needed below {SHRUNK}',
                 'ours, after Seguin et al. 2021', slack[0], unless=bad,
                 interval=tuple(np.percentile(slack[1:], (2.5, 97.5))))

def student_claims(results):
    """The rows on students, for those that were trained."""
    runs = {name: common.stack(arm) for name, arm in results['runs'].items()}
    if 'M0' not in runs:
        return []
    worst = {name: run['correct']['worst'].astype(float) for name, run in runs.items()}
    lost = {name: worst['M0'] - v for name, v in worst.items()}
    at, y = f'worst case at {results["radius"]}', results['labels']
    bad = {k: common.near_chance(run['correct']['natural'], y) for k, run in runs.items()}
    little = 'M0 gains too little' * bool(lost['standard'].mean() < GAIN)
    rows = [Claim(f'clean images and the logits of a robust teacher teach robustness: M0 minus '
                  f'standard network, {at}', 'Goldblum et al. 2020', lost['standard'],
                  unless=bad['M0'] or bad['standard'],
                  reference='CIFAR-10: 38.2 % (their table), 11.6 % (issue 6 of their code)')]
    for text, names in (
            ('wrong classes matter: M0 minus M4', ('M4',)),
            ('their order in each image matters: M0 minus M8 or M7, the smaller', ('M8', 'M7')),
            ('which image is sure matters and small logits are not enough: M0 minus M12 or M17, '
             'the smaller', ('M12', 'M17'))):
        if set(names) <= runs.keys():
            found = common.resample(lambda *v: min(a.mean() for a in v), *(lost[k] for k in names))
            why = max(bad[name] for name in ('M0', 'standard', *names)) or little
            rows.append(Claim(f'{text}, {at}', 'Seguin et al. 2021', found[0], unless=why,
                              interval=found[1:]))
    return rows + [control_claim(runs, bad['M0'])]

def control_claim(runs, bad):
    """Control: students can be compared. The effect is the least distance to a threshold."""
    slack = {}
    for name, run in runs.items():
        if 'target' in run:
            off = run['correct']['natural'].mean() - runs['M0']['correct']['natural'].mean()
            slack[f'{name}: target not learned'] = LEARNED - run['target']['learned'].max()
            slack[f'{name}: natural accuracy'] = NATURAL - abs(off)
            for symptom, value in run['masking'].items():
                slack[f'{name}: {symptom}'] = common.MASKING[symptom] + 1e-9 - value.max()
    failed, least = [text for text, v in slack.items() if v < 0], min(slack.values())
    return Claim('students learned their targets, are within 2 points of natural accuracy and show '
                 'no masked gradients' + f' (not so: {"; ".join(failed)})' * bool(failed),
                 'control', least, unless=bad, interval=(least, least))

def table(results):
    """Accuracies with intervals into results.json; every target beside M0's."""
    results['accuracy'] = {}
    for name, arm in results['runs'].items():
        run = common.stack(arm)
        found = results['accuracy'][name] = {
            k: common.summary(v) for k, v in run['correct'].items()}
        common.log.info('%-10s' + '  %s %.1f' * len(found), name, *(
            v for k in found for v in (ATTACK_NAMES.get(k, k), 100 * found[k]['mean'])))
        if 'target' in run:
            common.log.info('    taught: %s; ' + '  %s %.3f' * len(run['target']), TARGETS[name][2],
                            *(v for k, x in run['target'].items() for v in (k, x.mean())))

def main(argv=None):
    parser = common.make_parser(__doc__, DEFAULTS, argv)
    add = parser.add_argument
    add('--students', nargs='+', choices=tuple(TARGETS), metavar='M',
        help=f'rows of TARGETS: {", ".join(TARGETS)}')
    add('--temperature', type=common.number, metavar='T', help='of teacher and student')
    add('--start', choices=('warm', 'cold'), help="from the standard network's weights or anew")
    add('--distil-epochs', type=int, metavar='N', help='of each student')
    add('--judged', type=common.number, metavar='X', help='share of --eps in attacks on students')
    add('--suite', choices=('full', 'short'), help='short: without APGD and Square')
    args = common.parse(parser, argv)
    if not (args.temperature and args.distil_epochs):
        parser.error('--temperature and --distil-epochs must be above 0')
    if not 0 < args.judged <= 1:
        parser.error('--judged is a share of --eps, above 0 and at most 1')
    folder, device, data, results = common.start('logit_distill', args)
    if 'finished' not in results:
        study(args, folder, device, data, results)
        common.finish('logit_distill', results, folder)
    table(results)
    draw(results, folder)
    common.judge(claims(results), results, folder)

if __name__ == '__main__':
    common.entry(main)
