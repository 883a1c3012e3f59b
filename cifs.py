"""CIFS: does masking the channels that speak for other classes make a CNN more robust?

Question   Adversarial images over-activate channels of negative relevance (NR: those with a
           negative weight for the true class). CIFS multiplies each channel by a mask, made from
           its relevance to the two likeliest classes of a small probe. Does that help, at the
           last and at the best epoch, and against attacks that know the masks?
Paper      Yan et al., CIFS: Improving adversarial robustness of CNNs via channel-wise
           importance-based feature selection, ICML 2021; its rival CAS: Bai et al., ICLR 2021.
           Tables unread: references are the authors' logs. Left out: ResNet-10, FGSM, C&W, timing.
Usage      python cifs.py                                      shapes, minutes on a laptop
           python cifs.py --dataset svhn --epochs 100          ResNet-18, one GPU
           python cifs.py --arms vanilla cifs early --seeds 0 1 2

Expect     shapes, three seeds, natural / worst case (%): vanilla 99 / 47, CAS 99 / 48, probes
           without masks 99 / 45, CIFS 90 / 35 (natural 99 if its masks are told the labels), early
           90 / 24. CAS keeps 93 under PGD-20 on its final loss alone. The last epoch is the best,
           so that the paper's claims about it are not testable; where training overfits they hold
           (1,000 CIFAR-10 images, two seeds). 230 CPU seconds a seed (without early).
"""
import argparse
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest, rankdata
from torch import nn

import common
from common import COLOURS, Claim, bootstrap

# CIFAR-10: the authors' code (120 epochs, drops after 75 and 90, decay 2e-4; masks that sum to 2
# in their logged runs; their CIFS run goes on from 46 epochs on natural images, here every arm
# does). SVHN: only its 120 epochs are known; lr and step are the usual ones, the warm start ours.
# Elsewhere no warm start, and masks of mean 1 (--mask-sum 0), which train without one.
DEFAULTS = {
    '*': dict(arms=['vanilla', 'cas', 'cifs', 'probes'], epochs=120, schedule='drops:0.625,0.75',
              weight_decay=2e-4, warm_start=0, mask_sum=0.0),
    'cifar10': dict(warm_start=46, mask_sum=2.0),
    'svhn': dict(warm_start=10, mask_sum=2.0),
    'folder': dict(arch='resnet18-imagenet'),
    'shapes': dict(weight_decay=5e-4)}  # that of train_at.py: vanilla is its PGD-AT network

# Thresholds of the claims, chosen before the runs.
GAP_SHRINKS = 0.5  # V1: the gap after adversarial training in units of that before
RHO_RANK = 0.3  # V4: rank correlation over the classes
EXACT_GAP = 0.005  # what attacks without the mask's gradient may miss

# --------------------------------------------------------------------------------- The method

SHARPNESS = 5  # of the probe's softplus: a ReLU's slope would not be differentiable

IMGF = {  # importance mask generating functions: relevance g (N, C), sum of the mask -> (N, C)
    'softmax': lambda g, total: (total or g.shape[1]) * F.softmax(g, 1),
    'sigmoid': lambda g, total: torch.sigmoid(10 * g),
    'softplus': lambda g, total: F.softplus(g, beta=5),
    'signed': lambda g, total: g,  # CAS
    'none': lambda g, total: torch.ones_like(g)}

class Mask(nn.Module):
    """One CIFS layer: z (N, C, H, W) -> mask * z.

    A probe reads the channels' means. The relevance of a channel is the derivative of the sum of
    k of the probe's logits with respect to it; these are its k largest or, in train mode and where
    the labels are given, that of the label in place of the largest. `exact`: let gradients flow
    through the mask into z, which the authors' code leaves out. What forward read and made lies in
    `seen` until Masked takes it away.
    """
    def __init__(self, channels, classes, hidden, k, imgf, total):
        super().__init__()
        self.hidden = nn.Linear(channels, hidden) if hidden else None
        self.out = nn.Linear(hidden or channels, classes)
        self.k, self.imgf, self.total = min(k, classes), IMGF[imgf], total
        self.labels, self.exact, self.seen = None, False, None

    def probe(self, pooled):
        """(N, C) -> logits (N, K)."""
        if self.hidden:
            pooled = F.softplus(self.hidden(pooled), beta=SHARPNESS)
        return self.out(pooled)

    def relevance(self, pooled, chosen):
        """d(sum of the chosen logits) / d(pooled), in closed form so that no graph is needed:
        (N, C), classes (N, k) -> (N, C)."""
        g = self.out.weight[chosen].sum(1)
        if self.hidden:
            g = (g * torch.sigmoid(SHARPNESS * self.hidden(pooled))) @ self.hidden.weight
        return g

    def forward(self, z):
        pooled = z.mean((2, 3))
        logits = self.probe(pooled)
        chosen = logits.topk(self.k, 1).indices
        if self.training and self.labels is not None:
            chosen = torch.cat((self.labels[:, None], chosen[:, 1:]), 1)
        g = self.relevance(pooled if self.exact else pooled.detach(), chosen)
        mask = self.imgf(g, self.total)
        self.seen = dict(logits=logits, pooled=pooled, mask=mask)
        return mask[:, :, None, None].to(z.dtype) * z

# Where masks go, a row a network: (module, its channels, hidden units of its probe, 0: linear).
# `early` is a stage before `first` and ours, as are small-cnn's rows; the others are the authors'.
PLACES = {
    'small-cnn': dict(early=('net.stage2.1', 64, 64), first=('net.stage3.0', 128, 128),
                      last=('net.stage3.1', 128, 0)),
    'small-cnn-64': dict(early=('net.stage2.1', 128, 128), first=('net.stage3.0', 256, 256),
                         last=('net.stage3.1', 256, 0)),
    'resnet18': dict(early=('net.layer3.1', 256, 128), first=('net.layer4.0', 512, 128),
                     last=('net.layer4.1', 512, 0)),
    'wrn-28-10': dict(early=('net.block2.3', 320, 240), first=('net.block3.3.relu1', 640, 240),
                      last=('net.relu', 640, 0))}
PLACES['resnet18-imagenet'] = PLACES['resnet18']

# CIFS as in the paper, and what each arm does otherwise.
CIFS = dict(places=['first', 'last'], linear=False, k=2, imgf='softmax', labels=True, beta=2.0,
            method='pgd')
ARMS = {
    'vanilla': dict(places=[]),
    'cas': dict(linear=True, k=1, imgf='signed'),  # the label's row of weights is the mask
    'cifs': {},
    'probes': dict(imgf='none'),  # trained with the probes' losses, but nothing is masked
    'early': dict(places=['early', 'last']),
    'last place': dict(places=['last']),
    'blind': dict(labels=False),  # masks of the predicted classes in training, too
    'linear': dict(linear=True),
    'k=1': dict(k=1),
    'k=3': dict(k=3),  # the authors' masks then sum to 3, here to --mask-sum
    'sigmoid': dict(imgf='sigmoid'),
    'softplus': dict(imgf='softplus'),
    'beta=0.1': dict(beta=0.1),
    'beta=10': dict(beta=10.0),
    'vanilla+trades': dict(places=[], method='trades'),
    'cifs+trades': dict(method='trades'),
    'vanilla+mart': dict(places=[], method='mart'),
    'cifs+mart': dict(method='mart'),
    'vanilla+fat': dict(places=[], method='fat'),
    'cifs+fat': dict(method='fat')}
ARM_NAMES = {arm: arm for arm in ARMS} | dict(cas='CAS', cifs='CIFS', probes='probes, no mask')
ARM_COLOURS = dict(zip(ARMS, COLOURS * 3))

class Masked(nn.Module):
    """A network with masks behind some of its modules: x -> (logits, those of each probe). With
    no places it is the network itself."""
    def __init__(self, net, places=(), classes=0, k=2, imgf='softmax', total=0.0):
        super().__init__()
        self.net = net
        for name, channels, hidden in places:
            parent, _, child = name.rpartition('.')
            layer = Mask(channels, classes, hidden, k, imgf, total)
            setattr(net.get_submodule(parent), child,
                    nn.Sequential(net.get_submodule(name), layer))

    def trace(self, x):
        """(logits, [what each mask has seen: dict(logits, pooled, mask)])."""
        layers, logits = masks_of(self), self.net(x)
        seen = [layer.seen for layer in layers]
        for layer in layers:  # a graph left on a module could not be copied
            layer.seen = None
        return logits, seen

    def forward(self, x):
        logits, seen = self.trace(x)
        return (logits, *(s['logits'] for s in seen))

def masks_of(model):
    return [module for module in model.modules() if isinstance(module, Mask)]

@contextmanager
def masking(model, labels=None, exact=False):
    """The masks of a model with labels (N,), which only masks in train mode heed, or with exact
    gradients; afterwards without."""
    for layer in masks_of(model):
        layer.labels, layer.exact = labels, exact
    try:
        yield
    finally:
        for layer in masks_of(model):
            layer.labels, layer.exact = None, False

# ----------------------------------------------------------------------------------- Training

def joint(loss, beta=CIFS['beta']):
    """loss(logits, y) over all heads: that of the final one + beta / P times the sum of the P
    probes': (N,). In y's place there may be as many other outputs, for a divergence."""
    def over_heads(output, other, *more):
        heads = output if isinstance(output, tuple) else (output,)
        others = other if isinstance(other, tuple) else (other,) * len(heads)
        final, *probes = (loss(a, b, *more) for a, b in zip(heads, others))
        return final + beta / max(1, len(probes)) * sum(probes)
    return over_heads

def joint_loss(method, beta, labels):
    """One of common's losses, joint over the heads in attack and update. Attacks see the masks of
    the predicted classes. So do both outputs that a divergence compares, in TRADES and MART: masks
    of the label would pull both to it and leave the divergence little to do."""
    heads = dict(ce=joint(common.cross_entropy, beta))
    if method in ('trades', 'mart'):
        heads['kl'] = joint(common.kl_divergence, beta)
    if method == 'mart':
        heads['boosted'] = joint(common.boosted_cross_entropy, beta)
    told = labels and 'kl' not in heads

    def loss_fn(net, x, y, threat, generator):
        with masking(net, labels=y if told else None):
            loss = common.METHODS[method](net, x, y, threat, generator, **heads)
        return loss * 3 / (beta + 1)  # the authors': beta does not change the size of a step
    return loss_fn

def build(spec, start, arch, classes, shape, seed):
    """The network of an arm, with the weights `start` if they are given."""
    model = common.make_model(arch, classes, shape, seed)
    if spec['places']:
        places = [PLACES[arch][place] for place in spec['places']]
        places = [(name, c, 0 if spec['linear'] else hidden) for name, c, hidden in places]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)  # the probes', so that the network is vanilla's
            model = Masked(model, places, classes, spec['k'], spec['imgf'], spec['total'])
    if start:
        model.load_state_dict(start)
    return model

def train_arm(args, data, arm, seed, device, method=None):
    """(what common.train returns, best and last network) of an arm, after --warm-start epochs on
    natural images; where nothing differs, the vanilla networks are those of train_at.py."""
    spec = CIFS | ARMS[arm] | dict(total=args.mask_sum, chosen='joint')
    method, name, start, extra, loss_fn = method or spec['method'], '', None, {}, None
    if args.warm_start:
        natural = dict(epochs=args.warm_start, schedule='constant', warm_start=0)
        warm = argparse.Namespace(**vars(args) | natural)
        start = train_arm(warm, data, arm, seed, device, 'standard')[0]['last']
        extra['warm_start'] = args.warm_start
    if spec['places']:
        name, extra['spec'] = f'{arm}-', spec
        loss_fn = joint_loss(method, spec['beta'], spec['labels'])
    trained = common.train(args, data, name + method, seed, device, extra=extra, loss_fn=loss_fn,
                           build=partial(build, spec, start),
                           val_loss=joint(common.cross_entropy))
    nets = (common.restore(trained, which, args, data, device, partial(build, spec, None))
            for which in ('best', 'last'))
    return trained, *(net if spec['places'] else Masked(net) for net in nets)

# ------------------------------------------------------------------------------------ Attacks

ATTACKS = {  # the last three face what is left, so that the last is the worst case
    'told': "natural,\nlabels' masks", 'natural': 'natural', 'final': 'PGD-20\nfinal loss',
    'probe': 'PGD-20\nprobe 1', 'pgd100': 'PGD-100\njoint',
    'targets': 'multi-target\njoint, exact', 'apgd_ce': 'APGD-CE\njoint, exact',
    'apgd_t': 'APGD-T\nfinal, exact', 'square': 'Square'}

def with_mask_gradient(attack, model, x, y, **options):
    """attack(model, x, y) along the gradient of the masks, too."""
    with masking(model, exact=True):
        return attack(model, x, y, **options)

def toward(logits, y, target):
    """Logit of a class minus that of the label: (N,)."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]

def first_probe(output, y):
    """Cross-entropy of the first probe, of the logits where there is none: (N,)."""
    return common.cross_entropy(output[min(1, len(output) - 1)], y)

def suite(args):
    """The seven attacks of ATTACKS on a Masked network; for one without places all losses are the
    final one's, and 'probe' repeats 'final'. PGD: the authors' step size, but a random start."""
    ball, ce = dict(eps=args.eps, norm=args.norm), joint(common.cross_entropy)
    near = partial(common.pgd, **ball, step_size=args.eps / 10, stop=True)
    exact = partial(with_mask_gradient, common.apgd, **ball)
    attacks = {
        'final': partial(near, steps=20),
        'probe': partial(near, steps=20, loss=first_probe),
        'pgd100': partial(near, steps=100, loss=ce),
        'targets': partial(exact, steps=max(10, args.apgd_steps // 5), targets=9,
                           loss=joint(toward)),
        'apgd_ce': partial(exact, steps=args.apgd_steps, loss=ce),
        'apgd_t': partial(exact, steps=args.apgd_steps, targets=args.targets,
                          loss=common.dlr_targeted),
        'square': partial(common.square, eps=args.eps, queries=args.square_queries)}
    return {k: v for k, v in attacks.items() if args.norm == 'linf' or k != 'square'}

# --------------------------------------------------------------------------------- Experiment

def study(args, folder, device, data, results):
    """Train each arm and measure it; everything is saved as soon as it is there."""
    keep, attacks = partial(common.save_results, results, folder), suite(args)
    for seed in args.seeds:
        for arm in args.arms:
            trained, model, last = train_arm(args, data, arm, seed, device)
            run = common.measure(results, ('runs', arm, f's{seed}'), lambda: dict(
                {name: trained[name] for name in ('history', 'best_epoch', 'seconds')},
                correct={}, correct_last={}), folder)
            common.evaluate(model, data, attacks, run['correct'], keep)
            if trained['best_epoch'] == args.epochs:
                run['correct_last'] = dict(run['correct'])
            common.evaluate(last, data, attacks, run['correct_last'], keep)
            if 'masking' not in run:
                run['told'] = told(model, data)
                run['detached'] = without_mask_gradient(model, data, attacks, run['correct'])
                if arm in ('vanilla', 'cifs'):
                    run['activations'] = activations(model, data, args)
                run['masking'] = common.masking_check(
                    model, data, run['correct'], norm=args.norm, loss=joint(common.margin))
                keep()
    if 'vanilla' in args.arms:  # the network before adversarial training, for V1: one for all seeds
        trained = common.train(args, data, 'standard', args.seeds[0], device)
        model = Masked(common.restore(trained, 'best', args, data, device))
        results['standard'] = activations(model, data, args) | dict(told=told(model, data))

def told(model, data):
    """Whether test images are classified rightly, unattacked, with the masks of their labels:
    (N,) bool. What the masks tell the layers behind them."""
    right = []
    for layer in masks_of(model):
        layer.train()  # masks alone: batch norm stays in eval mode
    for x, y in zip(*(v.split(250) for v in data.test)):
        with masking(model, labels=y), torch.no_grad():
            right.append(model(common.to_float(x))[0].argmax(1) == y)
    model.eval()
    return torch.cat(right).cpu().numpy()

def without_mask_gradient(model, data, attacks, correct):
    """The column 'apgd_ce' of correct, after the same attacks (one exact) and from the same starts,
    of an attack for which the masks are constants: (N,) bool."""
    before = ('natural', 'final', 'probe', 'pgd100', 'targets')
    right = np.all([correct[name] for name in before], 0)
    (x, y), rows = data.test, torch.from_numpy(right).to(data.test[1].device)
    attack = partial(common.apgd, **attacks['apgd_ce'].keywords)
    right[right] = common.correct_under(model, x[rows], y[rows], attack).cpu().numpy()
    return right

def inspect(model, batches):
    """What a Masked network makes of [(x, y)]: (features (N, C), the input of its last layer; of
    each mask a dict of pooled, mask and relevance to the true class (N, C))."""
    features, parts = [], []
    hook = model.net.get_submodule('net.fc').register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0]))
    for x, y in batches:
        with torch.no_grad():
            parts.append(model.trace(x)[1])
            for layer, seen in zip(masks_of(model), parts[-1]):
                seen['relevance'] = layer.relevance(seen['pooled'], y[:, None])
    hook.remove()
    return torch.cat(features).cpu().numpy(), [
        {name: torch.cat([s[name] for s in seen]).cpu().numpy() for name in seen[0]}
        for seen in zip(*parts)]

def activations(model, data, args):
    """Features of the test images (nat) and of their PGD-20 versions (adv). Per image (N,): gap,
    sum |adv - nat| / sum |nat|; over, log(adv / nat) of the NR channels minus that of the PR ones
    (negative and positive weight for the true class); rho, Spearman correlation of nat and weight
    over PR. Per class (K, C): natural and adversarial mean, weight. Per mask: the share of adv in
    channels of negative relevance, before and after (N,); means of mask and relevance (K, C)."""
    attack = partial(common.pgd, eps=args.eps, step_size=args.eps / 10, steps=20,
                     norm=args.norm, loss=joint(common.cross_entropy))
    batches = [(common.to_float(x), y) for x, y in zip(*(v.split(250) for v in data.test))]
    attacked = [(attack(model, x, y, generator=common.make_generator(
        'activations', i, device=x.device)), y) for i, (x, y) in enumerate(batches)]
    (nat, _), (adv, masks) = inspect(model, batches), inspect(model, attacked)
    weight, y = model.net.get_submodule('net.fc').weight.detach().cpu().numpy(), data.test[1]
    y = y.cpu().numpy()
    member = np.eye(len(weight))[y] / np.maximum(np.bincount(y, minlength=len(weight)), 1)
    out, negative = {}, weight[y] < 0
    for i, seen in enumerate(masks):
        pooled, mask, g = seen['pooled'], seen['mask'], seen['relevance']
        before, after = (total(z, g < 0) / total(z) for z in (pooled, mask * pooled))
        out[f'mask {i + 1}'] = dict(before=before, after=after, mask=member.T @ mask,
                                    relevance=member.T @ g)
    growth = [np.log(total(adv, part) / total(nat, part)) for part in (negative, ~negative)]
    return dict(gap=total(adv - nat) / total(nat), over=growth[0] - growth[1], masks=out,
                rho=relevance_rank(nat, weight, y), weight=weight, natural=member.T @ nat,
                adversarial=member.T @ adv)

def total(z, part=True):
    """Sum of |z| (N, C) over some channels: (N,), at least 1e-6."""
    return np.maximum((np.abs(z) * part).sum(1), 1e-6)

def relevance_rank(z, weight, y):
    """Spearman correlation, over the channels of positive weight for its class, of each image's
    activations (N, C) with these weights (K, C): (N,)."""
    rho = np.zeros(len(y))
    for k in np.unique(y):
        positive = weight[k] > 0
        rho[y == k] = correlation(rankdata(z[y == k][:, positive], axis=1),
                                  rankdata(weight[k][positive]))
    return rho

def correlation(a, b):
    """Pearson's, over the last axis; 0 where one of both is constant."""
    a, b = (v - v.mean(-1, keepdims=True) for v in (a, b))
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1) + 1e-12)

# ------------------------------------------------------------------------------------ Figures

def draw(results, folder):
    runs = {arm: common.stack(seeds) for arm, seeds in results['runs'].items()}
    if 'vanilla' in runs:
        figure_activations(runs, results, folder)
        figure_classes(runs, results, folder)
    if 'cifs' in runs:
        figure_masks(runs['cifs']['activations']['masks'], folder)
    figure_attacks(runs, folder)
    figure_training(results, folder)

def figure_activations(runs, results, folder):
    """The paper's motivating figure, of the first seed, the classes vanilla does best and worst."""
    y, correct = results['labels'], runs['vanilla']['correct']['pgd100']
    ranked = sorted(np.unique(y), key=lambda k: -correct[:, y == k].mean())
    nets = {'standard training': results['standard']}
    for arm, title in (('vanilla', 'vanilla (PGD-AT)'), ('cifs', 'CIFS, after the masks')):
        if arm in runs:
            nets[title] = {k: v[0] for k, v in runs[arm]['activations'].items() if k != 'masks'}
    fig, axes = common.new_figure(4, len(nets), 2.6 * len(nets) + 0.6, 5.6, sharex=True,
                                  height_ratios=(3, 1, 3, 1))
    for column, (title, net) in zip(axes.T, nets.items()):
        for row, k in ((0, ranked[0]), (2, ranked[-1])):
            order = np.argsort(-net['weight'][k])
            weight, at = net['weight'][k][order], np.arange(len(order))
            for name, colour in (('natural', COLOURS[1]), ('adversarial', COLOURS[2])):
                height = net[name][k][order] / net['natural'][k].max()
                column[row].fill_between(at, height, step='mid', color=colour, alpha=0.5, lw=0,
                                         label=f'{name} images')
            column[row + 1].fill_between(at, weight / abs(weight).max(), step='mid', color='0.5')
            for axis in column[row : row + 2]:
                axis.axvline((weight > 0).sum() - 0.5, color='k', lw=0.8, ls=':')
            kind = 'non-robust' if row else 'robust'
            column[row].set_title(f'{title}\n{results["classes"][k]} ({kind} class)')
        column[3].set_xlabel('channel, in the order of weight')
    for axis, label in zip(axes[:, 0], ('activation', 'weight') * 2):
        axis.set_ylabel(label)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=2)
    fig.suptitle("Class means of the last layer's input, 1: the largest natural one. Right of the "
                 'dotted line\nweights are negative: are those channels activated by adversaries?')
    common.save_figure(fig, folder, 'fig1_activations')

def figure_classes(runs, results, folder):
    arms, y = [arm for arm in ('vanilla', 'cifs') if arm in runs], results['labels']
    fig, axes = common.new_figure(1, len(arms), 3.6 * len(arms), 3.4, sharex=True, sharey=True)
    for axis, arm in zip(axes[0], arms):
        for k in np.unique(y)[:20]:  # a hundred do not fit
            robust = 100 * runs[arm]['correct']['pgd100'][:, y == k].mean()
            rho = runs[arm]['activations']['rho'][:, y == k].mean()
            axis.plot(robust, rho, 'o', ms=4, color=ARM_COLOURS[arm])
            axis.annotate(results['classes'][k], (robust, rho), (3, 3 if k % 2 else -8),
                          textcoords='offset points', fontsize=6)
        axis.set(xlabel='PGD-100 accuracy of the class (%)', title=ARM_NAMES[arm])
        axis.margins(0.18)
    axes[0, 0].set_ylabel('rank correlation of activation\nand weight, positive weights')
    fig.suptitle('Do activations follow the weights more in robust classes?')
    common.save_figure(fig, folder, 'fig2_classes')

def figure_masks(masks, folder):
    fig, axes = common.new_figure(1, len(masks) + 1, 3.2 * (len(masks) + 1), 3.2)
    bars = axes[0, -1]
    for i, (name, mask) in enumerate(masks.items()):
        g, m = mask['relevance'].ravel(), mask['mask'].ravel()
        axes[0, i].plot(g, m, '.', ms=2, alpha=0.5, label='a channel, mean of a class')
        axes[0, i].axhline(m.mean(), color=COLOURS[2], ls='--', lw=1, label='mean')
        axes[0, i].axvline(0, color='k', ls=':', lw=0.8)
        axes[0, i].set(xlabel='relevance to the true class', ylabel='mask',
                       title=f'CIFS, {name}: does it grow\nwith the relevance?')
        axes[0, i].legend(loc='upper left', fontsize=7)
        for shift, when, colour in ((-0.18, 'before', '0.6'), (0.18, 'after', COLOURS[2])):
            label = f'{when} the mask' if i == 0 else None
            bars.bar(i + shift, 100 * mask[when].mean(), 0.34, color=colour, label=label)
    bars.set(xticks=range(len(masks)), xticklabels=list(masks), ylim=(0, 100),
             ylabel='share of the activation (%)',
             title='Channels of negative relevance,\nadversarial images')
    bars.legend(fontsize=7)
    common.save_figure(fig, folder, 'fig3_masks')

def figure_attacks(runs, folder):
    bars = {arm: run['correct'] | dict(told=run['told']) for arm, run in runs.items()}
    names = [name for name in ATTACKS if name in next(iter(bars.values()))]
    fig, axes = common.new_figure(1, 1, 9.5, 3.8)
    axis, width = axes[0, 0], 0.8 / len(runs)
    for i, (arm, correct) in enumerate(bars.items()):
        mean, low, high = 100 * np.array([bootstrap(correct[name]) for name in names]).T
        at = np.arange(len(names)) + (i - (len(runs) - 1) / 2) * width
        axis.bar(at, mean, 0.92 * width, color=ARM_COLOURS[arm], label=ARM_NAMES[arm],
                 yerr=[mean - low, high - mean], error_kw=dict(lw=0.8, ecolor='0.4'))
        for a, value, top in zip(at, mean, high):
            axis.text(a, top + 1.5, f'{value:.0f}', ha='center', fontsize=6)
    axis.set(xticks=range(len(names)), xticklabels=[ATTACKS[name] for name in names],
             ylim=(0, 112), ylabel='test accuracy (%)', title='Best checkpoint: is an attack '
             'on the final loss alone enough? From APGD-CE on, what is left by\nall attacks so '
             'far: the last is the worst case (exact: with the gradient of the masks)')
    fig.legend(loc='outside lower center', ncols=min(6, len(runs)))
    common.save_figure(fig, folder, 'fig4_attacks')

def figure_training(results, folder):
    fig, axes = common.new_figure(1, 2, 9.0, 3.6, sharey=True)
    for arm, seeds in results['runs'].items():
        colour = ARM_COLOURS[arm]
        axes[0, 0].plot([], [], color=colour, label=ARM_NAMES[arm])
        for run in seeds.values():
            history, best = run['history'], run['best_epoch']
            for axis, split in zip(axes[0], ('train', 'val')):
                values = [100 * row[f'{split}_robust'] for row in history]
                axis.plot(range(1, len(history) + 1), values, color=colour, lw=1)
                axis.plot(best, values[best - 1], 'o', ms=5, color=colour)
            for epoch, correct in ((best, run['correct']), (len(history), run['correct_last'])):
                axes[0, 1].plot(epoch, 100 * correct['worst'].mean(), 'x', ms=7, color=colour)
    axes[0, 1].plot([], [], 'o', color='0.4', label='best epoch')
    axes[0, 1].plot([], [], 'x', color='0.4', label='worst case, test images')
    axes[0, 0].set(title='Training images', ylabel='accuracy (%), PGD-10 on the joint loss')
    axes[0, 1].set(title='Validation images: falling is overfitting')
    for axis in axes[0]:
        axis.set(xlabel='epoch', ylim=(0, None))
        axis.legend(fontsize=7)
    common.save_figure(fig, folder, 'fig5_training')

# ------------------------------------------------------------------------------------- Claims

PAPER, LOGS = 'Yan et al. 2021', "authors' logs"
RIVALS = [('cifs', arm) for arm in ARMS if '+' not in arm and arm not in ('vanilla', 'cas', 'cifs')]
RIVALS += [(f'cifs+{method}', f'vanilla+{method}') for method in ('trades', 'mart', 'fat')]

def claims(results):
    """The rows of the table, for the arms that were trained."""
    runs = {arm: common.stack(seeds) for arm, seeds in results['runs'].items()}
    best, last = ({arm: {name: v.astype(float) for name, v in run[when].items()}
                   for arm, run in runs.items()} for when in ('correct', 'correct_last'))
    rows, both, y = [], ('cifs', 'vanilla'), results['labels']
    why = {arm: common.near_chance(best[arm]['natural'], y) for arm in runs}

    def add(arms, text, source, effect, unless='', **options):
        """A row, if its arms were trained; effect() is called only then."""
        if set(arms) <= runs.keys():
            poor = [why[arm] for arm in arms if why[arm]] or [unless]
            rows.append(Claim(text, source, effect(), unless=poor[0], **options))

    if 'vanilla' in runs:
        vanilla, standard = runs['vanilla']['activations'], results['standard']
        add(['vanilla'], 'V1 the gap closes: |adversarial - natural| / |natural| of the features, '
            f'{GAP_SHRINKS:g} x standard minus vanilla', PAPER, lambda: GAP_SHRINKS
            * standard['gap'] - vanilla['gap'], common.near_chance(standard['told'], y))
        add(['vanilla'], 'V2 NR channels stay over-activated: log(adversarial / natural), NR minus '
            'PR channels, vanilla', PAPER, lambda: vanilla['over'])
        effect, interval = rank_effect(vanilla['rho'], best['vanilla']['pgd100'], y)
        add(['vanilla'], 'V4 activation follows relevance in robust classes: rank correlation over '
            'classes of rho(activation, weight) and PGD-100 accuracy, vanilla', PAPER,
            lambda: effect, 'few classes' * (len(set(y)) < 5), above=RHO_RANK, interval=interval)
        never = max(runs['vanilla']['best_epoch']) == results['config']['epochs']
        short = 'not testable at this length' if never else max(
            common.near_chance(last[arm]['natural'], y) for arm in both if arm in runs)
        add(both, 'V6 CIFS above vanilla at the last epoch: joint PGD-100', PAPER,
            lambda: last['cifs']['pgd100'] - last['vanilla']['pgd100'], short,
            reference='+.041, CIFAR-10, ResNet-18 (logs)')
        add(both, 'V14 CIFS overfits less: joint PGD-100, best minus last epoch, vanilla minus '
            'CIFS', LOGS, lambda: best['vanilla']['pgd100'] - last['vanilla']['pgd100']
            - best['cifs']['pgd100'] + last['cifs']['pgd100'], short)
    add(both, 'V7 CIFS above vanilla at the best checkpoint: worst case', 'control',
        lambda: best['cifs']['worst'] - best['vanilla']['worst'],
        reference='-.016, APGD-CE and Square, CIFAR-10, ResNet-18 (logs)')
    add(('cas', 'vanilla'), 'V9 an attack on the final loss alone flatters CAS: PGD-20 on it minus '
        'joint PGD-100, CAS minus vanilla', LOGS, lambda: best['cas']['final']
        - best['cas']['pgd100'] - best['vanilla']['final'] + best['vanilla']['pgd100'],
        reference='+.143, last epoch, joint x0.1 minus x1000 (logs)')
    add(('cifs', 'cas'), 'V8 CIFS above CAS: worst case', PAPER,
        lambda: best['cifs']['worst'] - best['cas']['worst'],
        reference='+.022, last epoch, strongest PGD-100, CIFAR-10, ResNet-18 (logs)')
    for a, b in RIVALS:
        add((a, b), f'{ARM_NAMES[a]} above {ARM_NAMES[b]}: worst case', 'control',
            lambda: best[a]['worst'] - best[b]['worst'])
    if 'cifs' in runs:
        masks = runs['cifs']['activations']['masks'].values()
        add(['cifs'], 'V5 the masks lower the share of NR channels in adversarial activation (in '
            'part by construction): before minus after', PAPER,
            lambda: np.mean([mask['before'] - mask['after'] for mask in masks], 0))
        found = runs['cifs']['detached'] & ~runs['cifs']['correct']['apgd_ce']
        low, high = binomtest(round(found.sum() / len(found)), found.shape[1]).proportion_ci()
        add(['cifs'], f"attacks hardly need the masks' gradient: {EXACT_GAP:g} minus what joint "
            'APGD, after multi-target, finds only with it', 'control', lambda: EXACT_GAP - found,
            interval=(EXACT_GAP - high, EXACT_GAP - low))
        rows.append(common.masking_claim('CIFS', runs['cifs']['masking'], why['cifs']))
    return rows

def rank_effect(rho, correct, y):
    """(rank correlation of the class means of two (S, N), its interval over images and seeds)."""
    rng, rows = np.random.default_rng(0), [np.flatnonzero(y == k) for k in np.unique(y)]
    def effect(rows, s=slice(None)):
        return correlation(*(rankdata([v[s][:, i].mean() for i in rows]) for v in (rho, correct)))
    draws = [effect([rng.choice(i, len(i)) for i in rows], rng.choice(len(rho), len(rho)))
             for _ in range(500)]
    return effect(rows), tuple(np.percentile(draws, (2.5, 97.5)))

def table(results):
    """Accuracies with intervals into results.json, those of each training into the log."""
    results['accuracy'] = {}
    for arm, seeds in results['runs'].items():
        for when, label in (('correct', 'best'), ('correct_last', 'last')):
            results['accuracy'][f'{arm}, {label}'] = {
                name: common.summary(v) for name, v in common.stack(seeds)[when].items()}
            for seed, run in seeds.items():
                values = '  '.join(f'{k} {100 * v.mean():.1f}' for k, v in run[when].items())
                common.log.info('%-16s %s %s  %s', ARM_NAMES[arm], seed, label, values)

def main(argv=None):
    parser = common.make_parser(__doc__, DEFAULTS, argv)
    add = parser.add_argument
    add('--arms', nargs='+', choices=ARMS, metavar='ARM', help=', '.join(ARMS))
    add('--warm-start', type=int, metavar='N', help='epochs on natural images before')
    add('--mask-sum', type=common.number, metavar='X', help='of softmax masks; 0: of mean 1')
    add('--apgd-steps', type=int, metavar='N', help='of APGD')
    add('--targets', type=int, metavar='N', help='of APGD-T')
    add('--square-queries', type=int, metavar='N', help='of Square')
    args = common.parse(parser, argv)
    if args.arch not in PLACES:
        parser.error(f'no places for masks in {args.arch}; there are in {", ".join(PLACES)}')
    folder, device, data, results = common.start('cifs', args)
    if 'finished' not in results:
        study(args, folder, device, data, results)
        common.finish('cifs', results, folder)
    table(results)
    draw(results, folder)
    common.judge(claims(results), results, folder)

if __name__ == '__main__':
    common.entry(main)
