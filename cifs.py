"""CIFS: does masking the channels that speak for other classes make a CNN more robust?

Paper      Yan, Zhang, Niu, Feng, Tan, Sugiyama. CIFS: Improving adversarial robustness of CNNs
           via channel-wise importance-based feature selection. ICML 2021. Rival: CAS, Bai et al.
           ICLR 2021.
Question   Adversarial images over-activate channels of negative relevance (NR: negative weight
           for the true class). CIFS weighs each channel by a mask made from its relevance to
           the top-2 classes of a small probe. Does that help, at the last and at the best
           epoch, and against attacks that know the mask?
Usage      python cifs.py                                     shapes, minutes on a laptop
           python cifs.py --dataset svhn --epochs 100         ResNet-18, one GPU
           python cifs.py --trainings pgd trades mart fat --seeds 0 1 2
           python cifs.py --ablate imgf k layers probe beta
Outputs    runs/cifs/<dataset>-<arch>/: results.json, metrics.csv, claims.md and
           fig1_channel_activations  fig2_classes  fig3_masks  fig4_training  fig5_attacks
           fig6_worst_case  fig7_eps  fig8_trainings  fig9_ablations  (each .png and .pdf)
Not known  No table of the paper was at hand when this was written: reference numbers are the
           authors' own logs, named as such.
"""
import copy
import json
import math
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import rankdata, spearmanr

import common
from common import bootstrap, claim, effect_verdict, final_logits, pgd, stack_correct

# CIFAR-10: the authors' code (learning rate, decay, drops after epochs 75 and 90 of 120, masks
# summing to 2 in the code behind their logged results; their released CIFS run starts from a
# network trained on natural images for 46 epochs, here every arm does). Their SVHN settings
# are not known beyond 120 epochs; lr and step are those usual for SVHN. shapes: the recipe all
# studies share, its clean warm-up epochs in place of the warm start, and masks of mean 1.
DEFAULTS = {
    '*': dict(arms=['vanilla', 'cas', 'cifs', 'probes'], trainings=['pgd'], ablate=[],
              epochs=120, schedule='drops:0.625,0.75', weight_decay=2e-4, warm_start=0,
              imgf='softmax', temperature=1.0, topk=2, mask_sum=2.0, beta=2.0, exact=False,
              apgd_steps=100, square_queries=5000, targeted_steps=20, restarts=5),
    'cifar10': dict(warm_start=46),
    'shapes': dict(epochs=6, schedule='onecycle', weight_decay=5e-4, mask_sum=0.0,
                   apgd_steps=25, square_queries=100, targeted_steps=7, restarts=2),
}
IMGFS = ('softmax', 'sigmoid', 'softplus', 'relu')
ALPHA = {'sigmoid': 10.0, 'softplus': 5.0}   # defaults of the authors' code
HIDDEN = {'resnet18': 128, 'wrn-28-10': 240, 'wrn-34-10': 240}  # of the nonlinear probe
SHARPNESS = 5                                # beta of the probe's softplus
TRADES_BETA, MART_WEIGHT = 6.0, 5.0          # Zhang et al. 2019, Wang et al. 2020
ATTACK_BETAS = (0.1, 1, 2, 10, 100, 1000)    # weights of the probes in the authors' attacks
PAIR = {'cifar10': ('automobile', 'cat')}    # robust, non-robust class of the paper's figure

ARM_NAMES = {'vanilla': 'vanilla', 'cas': 'CAS', 'cifs': 'CIFS', 'probes': 'probes, no mask',
             'random': 'random mask', 'head': "head's own weights as mask"}
ARM_COLOURS = dict(zip(ARM_NAMES, common.COLOURS))
TRAINING_NAMES = {'pgd': 'PGD-AT', 'trades': 'TRADES', 'mart': 'MART', 'fat': 'FAT'}

# Thresholds of the claims, fixed before any run.
GAP_SHRINKS, COSINE, CLASSES_SHARE = 0.5, 0.95, 0.9      # V1
OVER_ACTIVATED, OVER_SHARE = 1.2, 0.8                    # V2
CLASS_SPREAD = 0.20                                      # V3
RHO_GAP, RHO_RANK = 0.1, 0.3                             # V4
BLACK_BOX_GAP = 0.005                                    # V12
COST = 1.10                                              # V13
DRAWS = 200                                              # bootstrap of the activations


# ------------------------------------------------------------------------------- the method

class Probe(nn.Module):
    """A_l: pooled features (N, C) -> raw logits (N, K), linear or with one hidden layer of
    softplus units, and the relevance of each channel to a choice of classes."""

    def __init__(self, channels, classes, hidden=0):
        super().__init__()
        self.hidden = nn.Linear(channels, hidden) if hidden else None
        self.out = nn.Linear(hidden or channels, classes)

    def forward(self, pooled):
        if self.hidden:
            pooled = F.softplus(self.hidden(pooled), beta=SHARPNESS)
        return self.out(pooled)

    def relevance(self, pooled, counts):
        """g_c = d(sum_j counts_j p_j) / d pooled_c, in closed form: (N, C), signed.

        counts: (N, K), how often each class's logit counts. A closed form needs no second
        autograd graph: it works under no_grad, autocast and torch.compile, and in training
        the mask stays differentiable in the probe's weights.
        """
        g = counts @ self.out.weight
        if self.hidden:
            slope = torch.sigmoid(SHARPNESS * self.hidden(pooled))
            g = (g * slope) @ self.hidden.weight
        return g


def label_counts(p, y, k, distinct=False):
    """Which k classes define the relevance: (N, K), one count for each choice.

    Without labels (tests, attacks): the k largest logits p. With labels (weight updates): y
    and the classes the probe ranks second to k-th; y counts twice when it is among those, as
    in the authors' code, unless `distinct` takes the best k-1 classes other than y.
    """
    if y is not None and distinct:
        p = p.scatter(1, y[:, None], math.inf)
    ranked = p.topk(k, 1).indices
    if y is not None:
        ranked = torch.cat((y[:, None], ranked[:, 1:]), 1)
    return F.one_hot(ranked, p.shape[1]).sum(1).to(p.dtype)


def importance(g, spec):
    """The importance mask generating function (IMGF): relevance (N, C) -> mask (N, C).

    softmax: sums to spec['mask_sum'] over the channels (0: to C, a mean of 1);
    sigmoid(alpha g); softplus log(1 + exp(alpha g)) / alpha; relu; identity: the signed
    relevance itself, which with k = 1 and linear probes is CAS.
    """
    kind = spec['imgf']
    if kind == 'softmax':
        return (spec['mask_sum'] or g.shape[1]) * F.softmax(g / spec['temperature'], 1)
    if kind == 'sigmoid':
        return torch.sigmoid(spec['alpha'] * g)
    if kind == 'softplus':
        return F.softplus(g, beta=spec['alpha'])
    return F.relu(g) if kind == 'relu' else g


def places(arch, classes=10):
    """Where masks can go, from early to late: {place: channels}. The last two are CIFS's."""
    if arch.startswith('small-cnn'):
        w = 64 if arch.endswith('64') else 32
        return {'stage1': w, 'stage2': 2 * w, 'stage3': 4 * w}
    if arch == 'resnet18':
        return {'layer3': 256, 'layer4_1': 512, 'layer4_2': 512}
    if arch in ('wrn-28-10', 'wrn-34-10'):
        return {'block2': 320, 'block3': 640, 'final': 640}
    raise common.UserError(f'CIFS has no place in {arch}; it has in small-cnn, small-cnn-64, '
                           'resnet18, wrn-28-10, wrn-34-10')


def masked_forward(net, x, mask):
    """The network's forward pass with z replaced by mask(place, z) at each place.

    Returns (logits, pooled features before the last layer (N, C)).
    """
    x = net.normalize(x)
    if isinstance(net, common.SmallCNN):
        x = net.stem(x)
        for place in ('stage1', 'stage2', 'stage3'):
            x = mask(place, getattr(net, place)(x))
    elif isinstance(net, common.ResNet18):
        x = F.relu(common.conv_bn(x, net.conv1, net.bn1), inplace=True)
        x = mask('layer3', net.layer3(net.layer2(net.layer1(x))))
        for i, block in enumerate(net.layer4, 1):
            x = mask(f'layer4_{i}', block(x))
    else:  # a wide ResNet; the first mask lies inside the last block, beside its shortcut
        x = mask('block2', net.block2(net.block1(net.conv1(x))))
        last = net.block3[-1]
        x = net.block3[:-1](x)
        inside = mask('block3', last.relu1(last.bn1(x)))
        x = last.conv2(last.relu2(common.conv_bn(inside, last.conv1, last.bn2))) + x
        x = mask('final', net.relu(net.bn1(x)))
    features = x.mean((2, 3))
    return last_layer(net)(features), features


def last_layer(net):
    return net.linear if isinstance(net, common.ResNet18) else net.fc


class CIFS(nn.Module):
    """A network with channel masks: z -> m * z at the places of `spec`.

    The same class makes the rival and the controls; see `arm_spec`. forward(x) returns
    (logits, probe 1, probe 2, ...); forward(x, y), for weight updates only, takes the masks
    from the labels. Eval or train mode does not matter to the masks.
    """

    def __init__(self, net, arch, classes, spec):
        super().__init__()
        self.net, self.spec = net, spec
        known = places(arch)
        self.probes = nn.ModuleDict()
        for place, kind in zip(spec['places'], spec['probes']):
            hidden = HIDDEN.get(arch, known[place]) if kind == 'nonlinear' else 0
            if spec['relevance'] != 'head':
                self.probes[place] = Probe(known[place], classes, hidden)
            if spec['relevance'] == 'random':
                self.register_buffer(f'random_{place}', torch.randn(classes, known[place]))

    def relevance(self, place, pooled, counts):
        """(N, C): from the probe's weights; from random ones or the head's (the controls)."""
        if self.spec['relevance'] == 'random':
            return counts @ getattr(self, f'random_{place}')
        if self.spec['relevance'] == 'head':
            return counts @ last_layer(self.net).weight
        return self.probes[place].relevance(pooled, counts)

    def trace(self, x, y=None, exact=False, masks=None):
        """One forward pass, everything kept: dict(logits (N, K), probes [(N, K)], pooled and
        masks {place: (N, C)}, features (N, C)).

        exact: let gradients flow from the mask into the features; by default the mask is a
        constant to them, as in the authors' code. masks: use these instead.
        """
        spec, probes, pooled, used = self.spec, [], {}, {}
        exact = exact or spec['exact']

        def mask(place, z):
            if place not in spec['places']:
                return z
            pooled[place] = zbar = z.mean((2, 3))
            head = last_layer(self.net) if spec['relevance'] == 'head' else self.probes[place]
            p = head(zbar)
            if spec['relevance'] != 'head':
                probes.append(p)
            if spec['imgf'] == 'none':
                return z
            if masks is not None:
                used[place] = masks[place]
            else:
                counts = label_counts(p.detach(), y, spec['k'], spec['distinct'])
                g = self.relevance(place, zbar if exact else zbar.detach(), counts)
                used[place] = importance(g, spec).to(z.dtype)
            return used[place][:, :, None, None] * z

        logits, features = masked_forward(self.net, x, mask)
        return dict(logits=logits, probes=probes, pooled=pooled, masks=used, features=features)

    def forward(self, x, y=None, exact=False, masks=None):
        traced = self.trace(x, y, exact, masks)
        return (traced['logits'], *traced['probes'])


def arm_spec(args, arm):
    """What an arm does to the network, as a JSON-able dict; None for the vanilla network.

    arm: a key of ARM_NAMES, or an ablation 'cifs, <label>' of `ablation_arms`.
    """
    if arm == 'vanilla':
        return None
    names = list(places(args.arch))[-2:]
    spec = dict(places=names, probes=['nonlinear', 'linear'], relevance='probe', k=args.topk,
                distinct=False, imgf=args.imgf, mask_sum=args.mask_sum, beta=args.beta,
                temperature=args.temperature, alpha=args.alpha or ALPHA.get(args.imgf, 1.0),
                exact=args.exact)
    if arm == 'cas':    # Bai et al. 2021: the signed weights of the label's class
        spec |= dict(probes=['linear', 'linear'], k=1, imgf='identity')
    elif arm == 'probes':
        spec |= dict(imgf='none')
    elif arm == 'random':
        spec |= dict(relevance='random')
    elif arm == 'head':  # no probe: the last layer's own rows, at the last place
        spec |= dict(relevance='head', places=names[-1:], probes=['linear'])
    return spec | dict(ablation_arms(args)).get(arm, {})


def ablation_arms(args):
    """[(arm, change of the specification)] of all ablations asked for."""
    first, second, third = places(args.arch)
    full = args.mask_sum and 1

    def softmax(t):
        return dict(imgf='softmax', temperature=t)

    tables = {
        'imgf': {'softmax T=1': softmax(1.0), 'softmax T=0.5': softmax(0.5),
                 'softmax T=4': softmax(4.0), 'sigmoid': dict(imgf='sigmoid', alpha=10.0),
                 'softplus': dict(imgf='softplus', alpha=5.0), 'relu': dict(imgf='relu')},
        'k': {f'k={k}': dict(k=k, mask_sum=float(full * k)) for k in (2, 1, 3)}
        | {'k=2 distinct': dict(distinct=True)},
        'layers': {'both places': {}, 'first place': dict(places=[second], probes=['nonlinear']),
                   'second place': dict(places=[third], probes=['linear']),
                   'one earlier': dict(places=[first], probes=['nonlinear'])},
        'probe': {'nonlinear + linear': {}, 'linear + linear': dict(probes=['linear'] * 2),
                  'nonlinear twice': dict(probes=['nonlinear'] * 2)},
        'beta': {f'beta={b:g}': dict(beta=b) for b in (2.0, 0.1, 1.0, 10.0, 100.0)},
    }
    return [(f'cifs, {label}', change) for name in args.ablate
            for label, change in tables[name].items()]


# ----------------------------------------------------------------------------- the training

def outputs(model, x, y=None):
    """(logits, probe 1, ...) of any model; a plain network has no probes and needs no y."""
    return model(x, y) if isinstance(model, CIFS) else (model(x),)


def joint(loss, beta, *each):
    """loss(final) + beta / P sum_l loss(probe l): (N,). each: outputs; loss gets one of each.

    joint(kl, 2, a, b) = kl(a[0], b[0]) + ...; with no probes it is the final loss alone.
    """
    each = [out if isinstance(out, tuple) else (out,) for out in each]
    weights = [1.0] + [beta / max(len(each[0]) - 1, 1)] * (len(each[0]) - 1)
    return sum(w * loss(*heads) for w, heads in zip(weights, zip(*each)))


def joint_loss(beta, loss=common.cross_entropy):
    """The joint loss as the attacks take it: a function (output, y) -> (N,)."""
    return lambda output, y: joint(lambda logits: loss(logits, y), beta, output)


def training_loss(training, beta):
    """A loss (model, x, y, threat, generator) for `common.train_model`, joint over the probes.

    Attacks see the masks of the predicted classes, in eval mode; updates those of the labels.
    """
    ce = joint_loss(beta)

    def standard(model, x, y, threat, generator):
        return ce(outputs(model, x, y), y).mean()

    def pgd_at(model, x, y, threat, generator):
        x_adv = pgd(model, x, y, **threat, loss=ce, generator=generator)
        return ce(outputs(model, x_adv, y), y).mean()

    def fat(model, x, y, threat, generator):
        """FAT (Zhang et al. 2020) at tau = 0: each image's first misclassified iterate."""
        x_adv = pgd(model, x, y, **threat, loss=ce, drop_fooled=True, generator=generator)
        return ce(outputs(model, x_adv, y), y).mean()

    def halves(model, x, x_adv, y):
        out = outputs(model, torch.cat((x, x_adv)), torch.cat((y, y)))
        return zip(*(o.chunk(2) for o in out))

    def trades(model, x, y, threat, generator):
        with common.frozen(model):
            natural = tuple(o.detach() for o in outputs(model, x))
        start = x + 0.001 * torch.randn(x.shape, generator=generator, device=x.device)
        seen = pgd(model, x, y, **threat, start=start, generator=generator, loss=lambda out, _:
                   joint(common.kl_divergence, beta, out, natural))
        nat, adv = halves(model, x, seen, y)
        return (ce(nat, y) + TRADES_BETA * joint(common.kl_divergence, beta, adv, nat)).mean()

    def mart(model, x, y, threat, generator):
        """The final head's natural probability of y weighs the divergence of the probes, too,
        as in CAS's code."""
        x_adv = pgd(model, x, y, **threat, loss=ce, generator=generator)
        nat, adv = halves(model, x, x_adv, y)

        def boosted(logits):
            other = F.softmax(logits.float(), 1).scatter(1, y[:, None], 0).amax(1)
            return common.cross_entropy(logits, y) - torch.log1p(-other + 1e-6)

        true = F.softmax(nat[0].float(), 1).gather(1, y[:, None])[:, 0]
        return (joint(boosted, beta, adv) + MART_WEIGHT * (1 - true)
                * joint(common.kl_divergence, beta, adv, nat)).mean()

    chosen = dict(standard=standard, pgd=pgd_at, fat=fat, trades=trades, mart=mart)[training]

    def scaled(model, *batch):
        # 3 / (beta + 1) keeps the size of the loss, so that beta does not change the step
        return chosen(model, *batch) * (3 / (beta + 1) if isinstance(model, CIFS) else 1)
    return scaled


def builder(args, arm, start=None):
    """A function that makes the arm's network, from the weights `start` if given."""
    spec = arm_spec(args, arm)

    def build(arch, classes, shape, seed):
        net = common.make_model(arch, classes, shape, seed)
        if spec:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + 1)  # for the probes; the network stays vanilla's
                net = CIFS(net, arch, classes, spec)
        if start:
            net.load_state_dict(start)
        return net.to(memory_format=torch.channels_last)
    return build


def train_arm(args, data, arm, training, seed, device):
    """`common.train_model` of one arm. Where nothing differs, vanilla networks are those that
    other studies train, too. Returns (result, build)."""
    spec, extra, start = arm_spec(args, arm), {}, None
    if args.warm_start and training != 'standard':
        warm = copy.copy(args)
        warm.epochs, warm.schedule, warm.eps_warmup = args.warm_start, 'drops:1', 0.0
        warm.warm_start = 0
        start = train_arm(warm, data, arm, 'standard', seed, device)[0]['last']
        extra['warm_start'] = args.warm_start
    if spec:
        extra['cifs'] = spec
    method = training if arm == 'vanilla' else f'{arm.split(",")[0]}-{training}'
    build = builder(args, arm, start)
    beta = spec['beta'] if spec else 0.0
    own = arm != 'vanilla' or training == 'fat'
    common.log.info('%s with %s, seed %d', ARM_NAMES.get(arm, arm),
                    TRAINING_NAMES.get(training, training), seed)
    result = common.train_model(
        args, data, method, seed, device, build=build, extra=extra or None,
        loss_fn=training_loss(training, beta) if own else None,
        val_loss=joint_loss(beta) if spec else 'ce')
    return result, build
