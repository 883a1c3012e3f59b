"""What the layers of normally and adversarially trained CNNs know: mutual information.

Question   How much do the outputs T of a layer tell about the image X and about its label Y, in a
           normally (NT) and an adversarially trained network (AT), on natural and adversarial
           images, through training and when texture or shape is destroyed?
Paper      Zhang, Qian, Nie, Cao, Xu 2022, Exploring Adversarial Examples and Adversarial Robustness
           of Convolutional Neural Networks by Mutual Information (arXiv 2207.05756)
Usage      python mi_analysis.py                          shapes, minutes on a laptop
           python mi_analysis.py --dataset cifar10        WRN-10-1 as in the paper, one GPU

Noise N(0, v I) is added to the outputs, or I(T;X) would be log2 N. `published`: v = 0.1 in every
layer. `scaled`, ours: v in proportion to the squared distances of the layer's own outputs. A number
says something only below its ceiling, log2 N or H(Y), and above that of permuted labels (fig5).

Layers: convolutions and linear layers before batch norm and ReLU, in a wide ResNet the first ReLU
of a block (LeNet-5 and WRN-10-1: the authors'). Ours: batch norm in eval mode (theirs: in train
mode), the same distinct images for all (theirs: drawn anew, with repetitions), measured after an
epoch (theirs: before, never at the end), up to 1000 images held out, PyTorch's initial weights,
global pooling (STL-10), distortions with the training's eps, upper bounds for the logits alone.

Expect     On shapes, three seeds: under published noise and in bins trained layers are at the
           ceilings, with permuted labels, too, but for AT's logits; under scaled noise I(T;Y) grows
           from 0.4 bits in the stem, as of permuted labels, to 2.7 (NT) and 2.4 (AT) in the logits.
           An attack leaves 0.8 and 1.6 and changes I(T;X) little; V4 and V5 are contradicted. It
           knows the label: into the logits of an untrained network it writes 2.6 bits of it.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import nn

import common
from common import COLOURS, METHOD_COLOURS, Claim

# The authors' code, July 2022. Their schedule, stepped at every batch, leaves lr 0.025 after 60.
VARIANCE, BIN_WIDTH = 0.1, 0.5
SATURATION, PATCHES = (2, 8, 16, 64, 1024), (1, 2, 4, 8)  # the first of each changes nothing
WIDE = dict(conv1='conv1', block1='block1.0.relu1', block2='block2.0.relu1',
            block3='block3.0.relu1', fc='fc')
PAPER = dict(epochs=200, lr=0.025, schedule='constant', weight_decay=0.0, steps=7, test_size=5000)
DEFAULTS = {
    '*': dict(measured=20, test_steps=7, test_step_size=0.0, test_size=5000),
    'shapes': dict(test_size=1000),
    'folder': dict(test_size=0),
    'mnist': dict(PAPER, arch='lenet5', eps='45/255', step_size='8/255', eps_warmup=0.0,
                  test_step_size='8/255'),
    'cifar10': dict(PAPER, arch='wrn-10-1'),
    'stl10': dict(PAPER, arch='wrn-10-1', test_size=4500)}

# Ours. A 32nd of the median squared distance, of SOME images, brings I(T;X) near half of log2 N.
SHARE, SOME, PERMUTATIONS = 1 / 32, 300, 3
CURVE = tuple(VARIANCE * 4.0**k for k in range(-3, 6))  # variances of the control

# Thresholds of the claims, chosen before the runs.
MARGIN = 0.05  # bits: so close to a ceiling or to permuted labels, a number says nothing
TREND, TREND_EPOCHS = 0.5, 6  # rank correlation; of fewer epochs it would be chance
STAYS, FOOLED, FEW = 0.9, 0.1, 20  # share of label information; accuracy at most; fooled images
SOURCE, SLIDES = 'Zhang et al. 2022', "(CIFAR-10, authors' slides of 18 May 2022)"

METHODS, NAMES = ('standard', 'pgd'), {'standard': 'NT', 'pgd': 'AT'}
KINDS = ('natural', 'adversarial')
NOISES = 'scaled noise', 'published noise', 'bins'
SCALED, PUBLISHED, BINS = range(3)  # first axis of what is measured
X, Y, NULL = range(3)  # second: I(T;X), I(T;Y), I(T;permuted Y)

# --------------------------------------------------------------------------------- Estimators

# Type of the products, as a T4 has 1/32 of its float32 speed in float64, and the share of the norms
# below which a squared distance is computed again, from the difference and in float64.
PRODUCTS = {'cpu': (torch.float64, 1e-6), 'cuda': (torch.float32, 1 / 16)}

def frame_of(t, chunk=1024):
    """(mean (D,) of t (N, D), exact for equal rows; a number like the largest difference)."""
    centre, unit = [], 0.0
    for part in t.split(chunk, 1):
        away = part - part[0].double()
        centre.append(away.mean(0) + part[0])
        unit += away.abs().max().item()  # a sum keeps NaN
    return torch.cat(centre), unit or 1.0

def squared_distances(a, b, frame, chunk=1024):
    """|a_i - b_j|^2 of rows, float64 (A, B), 0 for equal rows; of a with itself, inf at i = j."""
    (dtype, close), (centre, unit) = PRODUCTS[a.device.type], frame
    s = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    norms_a = norms_b = 0.0
    for k in range(0, a.shape[1], chunk):
        u, v = ((r[:, k : k + chunk] - centre[k : k + chunk]).div_(unit) for r in (a, b))  # float64
        norms_a, norms_b = norms_a + u.square().sum(1), norms_b + v.square().sum(1)
        s.sub_(u.to(dtype) @ v.to(dtype).T, alpha=2)
    norms = norms_a[:, None] + norms_b
    s += norms
    if a is b:
        s.fill_diagonal_(math.inf)
    near = ((s <= close * norms) & (norms > 0)).nonzero()
    for i, j in (pairs.T for pairs in near.split(max(1, 2**22 // a.shape[1]))):
        s[i, j] = ((a[i].double() - b[j].double()) / unit).square().sum(1)
    return s * unit**2

def kernel_sums(t, groups, scales, frame, tile=1000):
    """Sums (U, N, G) of exp(-|t_i - t_j|^2 / u) over the members j of each group, in tiles.
    groups: float64 memberships (N, G); scales: the values of u."""
    sums = groups.repeat(len(scales), 1, 1)  # each image with itself
    tiles = list(zip(t.split(tile), groups.split(tile), sums.split(tile, 1)))
    for k, (a, mine, sum_a) in enumerate(tiles):
        for b, others, sum_b in tiles[k:]:  # the other half is these transposed
            s = squared_distances(a, b, frame)
            for i, u in enumerate(scales):
                kernel = torch.exp(s / -u)
                sum_a[i] += kernel @ others
                if a is not b:
                    sum_b[i] += kernel.T @ mine
    return sums

def kde_terms(t, labels, classes, variances, frame):
    """What outputs t (N, D) with noise N(0, v I) tell, bits: they are a mixture, whose entropy less
    the noise's is -mean_i log[(1/N) sum_j exp(-|t_i - t_j|^2 / (c v))] or more for c = 8, or less
    for c = 2 (Kolchinsky & Tracey 2017). labels: (P, N). Returns x (V, 2, N) and y (V, 2, P, N),
    c = 8 first, whose means over the images are I(T;X) and I(T;Y)."""
    n, member = len(t), F.one_hot(labels, classes).double()  # (P, N, K)
    scales = [c * v for v in variances for c in (8, 2)]
    sums = kernel_sums(t, member.transpose(0, 1).flatten(1), scales, frame)
    sums = sums.view(len(variances), 2, n, len(labels), classes).transpose(2, 3)
    x = math.log2(n) - sums[:, :, 0].sum(-1).log2()
    size = member.sum(1).gather(1, labels)  # of each image's class
    return x, x[:, :, None] + ((sums * member).sum(-1) / size).log2()

def bin_terms(t, labels, classes, chunk=1024):
    """The same of the cells floor(t / BIN_WIDTH), without noise: x (N,), y (P, N). Rows of cells
    are told apart by 64-bit sums with random factors."""
    n, keys = len(t), torch.zeros(len(t), dtype=torch.int64, device=t.device)
    draw = dict(generator=common.make_generator('cells', device=t.device), device=t.device)
    for part in t.split(chunk, 1):
        factors = torch.randint(-2**63, 2**63 - 1, part.shape[1:], **draw)
        cells = (part.double() / BIN_WIDTH).floor_().fmod_(2**53 - 111)  # prime, fits int64
        keys += (cells.long() * factors).sum(1)
    cell = keys.unique(return_inverse=True)[1]

    def surprise(key):  # -log2 of the share of images with the same key
        return math.log2(n) - key.bincount()[key].double().log2()

    x = surprise(cell)
    return x, torch.stack([x + surprise(y) - surprise(cell * classes + y) for y in labels])

@torch.no_grad()
def information(t, labels, classes, layer='logits'):
    """(terms (3, 3, N), scaled variance) of outputs t (N, D), in bits for each image: NOISES by
    I(T;X) (a lower bound), I(T;Y) (a difference of two) and I(T;permuted Y) (mean of several).
    labels: int64 (P, N), the true ones first. UserError for outputs that are not finite."""
    frame = frame_of(t)
    if not math.isfinite(frame[1]):
        raise common.UserError(f'the outputs of layer {layer} hold NaN or infinity')
    some = t[torch.randperm(len(t), generator=common.make_generator('some'))[:SOME].to(t.device)]
    pairs = squared_distances(some, some, frame).fill_diagonal_(math.nan)
    scaled = SHARE * (pairs.nanmedian().item() or pairs.nanmean().item() or 1.0)
    (x, v), (y, w) = (r[:, 0] for r in kde_terms(t, labels, classes, (scaled, VARIANCE), frame))
    kinds = (x, y), (v, w), bin_terms(t, labels, classes)
    terms = torch.stack([torch.stack((a, b[0], b[1:].mean(0))) for a, b in kinds])
    return terms.cpu().numpy(), scaled

# --------------------------------------------------------------------------------- Experiment

def layers_of(arch, model):
    """{stage: name in model.net} of what is measured, the logits last: the last convolution or
    linear layer of each of the last seven stages, or WIDE."""
    found = {name.split('.')[0]: name for name, module in model.net.named_modules()
             if isinstance(module, (nn.Conv2d, nn.Linear))}
    return WIDE if arch.startswith('wrn-') else dict(list(found.items())[-len(COLOURS):])

def outputs_of(model, x, name):
    """Outputs (N, D) of the module of that name in model.net; all layers at once would not fit."""
    rows = []
    handle = model.net.get_submodule(name).register_forward_hook(
        lambda module, args, output: rows.append(output.flatten(1).clone()))
    common.logits_of(model, x)
    handle.remove()
    return torch.cat(rows)

def both_kinds(model, x, y, args):
    """{kind: images}: x and PGD on the true labels from x on, without a random start."""
    step = max(args.test_step_size or args.eps / 4, args.eps / max(1, args.test_steps))
    x_adv = [common.pgd(model, a, b, eps=args.eps, step_size=step, steps=args.test_steps,
                        norm=args.norm, start=a) for a, b in zip(x.split(250), y.split(250))]
    return dict(zip(KINDS, (x, torch.cat(x_adv))))

def shuffle(x, k):
    """Each image cut into k x k patches, permuted in its own way; the same for every network."""
    order = torch.rand(len(x), k * k, generator=common.make_generator('patches', k)).argsort(1)
    return common.permute_patches(x, order)

DISTORTIONS = {'saturation': common.saturate, 'patches': shuffle}

def measure_epoch(model, x, labels, classes, layers, args):
    """{kind: dict of info (layers, 3, 3), scaled (layers,), given (layers, classes, 2): I(T;X)
    within a class under both noises; correct and loss (N,)}."""
    out, y, own = {}, labels[0], labels[0].cpu().numpy()
    for kind, images in both_kinds(model, x, y, args).items():
        rows = dict(info=[], scaled=[], given=[])
        for stage, name in layers.items():
            terms, scaled = information(outputs_of(model, images, name), labels, classes, stage)
            inside = terms[:BINS, X] - terms[:BINS, Y]
            rows['info'].append(terms.mean(-1))
            rows['scaled'].append(scaled)
            rows['given'].append([inside[:, own == k].mean(1) for k in range(classes)])
        logits = common.logits_of(model, images)
        out[kind] = {name: np.array(values) for name, values in rows.items()} | dict(
            correct=(logits.argmax(1) == y).cpu().numpy(),
            loss=common.cross_entropy(logits, y).cpu().numpy())
        common.log.info('    %-11s  accuracy %.3f, I(T;Y) under scaled noise %s bits', kind,
                        out[kind]['correct'].mean(), out[kind]['info'][:, SCALED, Y].round(2))
    return out

def measure_distortions(model, x, labels, classes, levels, args):
    """{kind: {distortion: dict of predicted (levels, N) and info (levels, 3, 3) of the logits},
    terms (3, 3, N) of the undistorted}. The attack comes first, the distortion second."""
    out = {}
    for kind, images in both_kinds(model, x, labels[0], args).items():
        out[kind] = dict(terms=information(common.logits_of(model, images), labels, classes)[0])
        for name, chosen in levels.items():
            logits = [common.logits_of(model, DISTORTIONS[name](images, k)) for k in chosen]
            out[kind][name] = dict(
                info=np.stack([information(t, labels, classes)[0].mean(-1) for t in logits]),
                predicted=np.stack([t.argmax(1).cpu().numpy() for t in logits]))
    return out

def noise_curve(model, x, labels, classes):
    """I(T;X) of the logits, lower and upper bound, at each variance: (len(CURVE), 2)."""
    t = common.logits_of(model, x)
    return kde_terms(t, labels, classes, CURVE, frame_of(t))[0].mean(-1).cpu().numpy()

def study(args, folder, device, data, results):
    """Train both networks and measure them; everything is saved as soon as it is there."""
    (x, y), classes, side = data.test, len(data.classes), data.shape[-1]
    levels = dict(saturation=SATURATION, patches=[k for k in PATCHES if side % k == 0])
    if y.bincount(minlength=classes).min() < 2:
        raise common.UserError('too few test images (--test-size): two of each class at least')
    if len(levels['patches']) == 1:
        raise common.UserError(f'images {side} pixels wide cannot be cut into equal patches')
    layers = layers_of(args.arch, common.make_model(args.arch, classes, data.shape))
    spaced = np.geomspace(1, args.epochs, max(args.measured, 3) - 1).round()
    epochs = [0, *np.unique(spaced).astype(int).tolist()]
    results.update(layers=list(layers), epochs=epochs, levels=levels)
    generator = common.make_generator('permuted')
    orders = [torch.randperm(len(y), generator=generator) for _ in range(PERMUTATIONS)]
    labels = torch.stack([y] + [y[order.to(y.device)] for order in orders])
    shared = common.to_float(x), labels, classes
    for seed in args.seeds:
        for method in METHODS:
            trained = common.train(args, data, method, seed, device, keep=epochs)
            save = lambda name, function: common.measure(
                results, ('runs', method, f's{seed}', name), function, folder)
            save('history', lambda: trained['history'])
            for epoch in epochs:
                model = common.restore(trained, epoch, args, data, device)
                common.log.info('  %s after epoch %d', NAMES[method], epoch)
                save(f'epoch{epoch}', lambda: measure_epoch(model, *shared, layers, args))
            save('noise_curve', lambda: noise_curve(model, *shared))
            save('distorted', lambda: measure_distortions(model, *shared, levels, args))
    shown = shared[0][[(y == k).nonzero()[0, 0].item() for k in range(min(classes, 3))]]
    results['images'] = {
        name: np.stack([DISTORTIONS[name](shown, k).cpu().numpy() for k in levels[name]])
        for name in levels}

# ------------------------------------------------------------------------------------ Reading

def through_training(run, results, kind, name):
    """(epochs, ...) of a quantity of measure_epoch, mean over seeds. run: of common.stack."""
    return np.stack([run[f'epoch{e}'][kind][name].mean(0) for e in results['epochs']])

def survival(run, results, name):
    """Of the images that the attack fools, whether each is read as its wrong class at each level,
    natural and attacked: (2, S, levels, N), NaN for those that it does not fool."""
    natural, after = (run['distorted'][kind][name]['predicted'] for kind in KINDS)
    fooled = (natural[:, 0] == results['labels']) & (after[:, 0] != results['labels'])
    same = np.stack([predicted == after[:, :1] for predicted in (natural, after)])
    return np.where(fooled[:, None], 1.0 * same, np.nan)

def interval(terms):
    """95 % interval of the mean of terms (S, N) of an information. An image is a centre and a
    neighbour of others, which at most doubles its error; seeds add theirs."""
    image = 2 * terms.mean(0).std() / terms.shape[1] ** 0.5
    seed = terms.mean(1).std(ddof=1) / len(terms) ** 0.5 if len(terms) > 1 else 0.0
    return tuple(terms.mean() + 1.96 * math.hypot(image, seed) * np.array([-1, 1]))

def ceilings(results):
    """(log2 N, H(Y)) of the test images, bits."""
    counts = np.unique(results['labels'], return_counts=True)[1]
    n = counts.sum()
    return math.log2(n), math.log2(n) - (counts * np.log2(counts)).sum() / n

# ------------------------------------------------------------------------------------ Figures

STYLES = {'natural': dict(ls='-', marker='o', ms=4), 'adversarial': dict(ls='--', marker='P', ms=4)}
KIND_COLOURS = {'natural': ('#0072B2', 'Blues'), 'adversarial': ('#D55E00', 'Oranges')}
DOTTED = dict(color='0.4', ls=':', lw=1)  # ceilings and chance

def draw(results, folder):
    runs = {method: common.stack(arm) for method, arm in results['runs'].items()}
    for figure in (figure_training, figure_planes, figure_entropy, figure_distortions,
                   figure_controls):
        figure(runs, results, folder)
    figure_images(results, folder)

def legend(fig, columns, lines):
    """A legend below the figure. lines: {label: style}."""
    for label, style in lines.items():
        fig.axes[0].plot([], [], label=label, **style)
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=columns)

def figure_training(runs, results, folder):
    layers, epochs = results['layers'], results['epochs']
    fig, axes = common.new_figure(2, 4, 10.5, 5.4, sharey='col')
    for row, (method, run) in zip(axes, runs.items()):
        key = 'train_natural' if method == 'standard' else 'train_robust'
        for arm in results['runs'][method].values():
            seen = [h['epoch'] for h in arm['history']]
            row[0].plot(seen, [h['loss'] for h in arm['history']], '0.5')
            row[1].plot(seen, [100 * h[key] for h in arm['history']], '0.5')
        for kind, (colour, shades) in KIND_COLOURS.items():
            loss, correct, info = (through_training(run, results, kind, name)
                                   for name in ('loss', 'correct', 'info'))
            row[0].plot(epochs, loss.mean(1), color=colour, **STYLES[kind])
            row[1].plot(epochs, 100 * correct.mean(1), color=colour, **STYLES[kind])
            for shade, values in zip(np.linspace(0.3, 1, len(epochs)), info[:, :, SCALED]):
                for axis, quantity in zip(row[2:], (X, Y)):
                    axis.plot(layers, values[:, quantity], color=colormaps[shades](shade),
                              **STYLES[kind])
        row[0].set(title=NAMES[method], ylabel='loss (nats)', xlabel='epoch', yscale='log')
        row[1].set(title=NAMES[method], ylabel='accuracy (%)', xlabel='epoch')
        for axis, name, ceiling in zip(row[2:], ('I(T;X)', 'I(T;Y)'), ceilings(results)):
            axis.axhline(ceiling, **DOTTED)
            axis.set(title=NAMES[method], ylabel=f'{name} (bits)', xlabel='layer')
            axis.tick_params(axis='x', rotation=30)
    legend(fig, 4, {'images it trains on (AT: attacked)': dict(color='0.5')} | {
        f'{kind} test images': dict(color=KIND_COLOURS[kind][0]) | STYLES[kind] for kind in KINDS
    } | {'ceilings log2 N and H(Y)': DOTTED})
    fig.suptitle('Layers under scaled noise, from before training (pale) to the last epoch (dark). '
                 'Does label\ninformation grow with depth when trained, and fall under attack?')
    common.save_figure(fig, folder, 'fig1_training')

def figure_planes(runs, results, folder):
    fig, axes = common.new_figure(2, 3, 10, 6, sharex=True, sharey=True)
    for (method, run), row in zip(runs.items(), axes):
        for noise, (axis, name) in enumerate(zip(row, NOISES)):
            for kind in KINDS:
                info = through_training(run, results, kind, 'info')[:, :, noise]
                for (x, y, _), colour in zip(info.transpose(1, 2, 0), COLOURS):
                    axis.plot(x, y, color=colour, lw=0.6, ls=STYLES[kind]['ls'])
                    axis.scatter(x, y, np.linspace(8, 50, len(x)), color=colour, alpha=0.75, lw=0,
                                 marker=STYLES[kind]['marker'])
            axis.axvline(ceilings(results)[0], **DOTTED)
            axis.axhline(ceilings(results)[1], **DOTTED)
            axis.set(title=f'{NAMES[method]}, {name}', xlabel='I(T;X) (bits)',
                     ylabel='I(T;Y) (bits)')
    legend(fig, 4, {name: dict(color=c) for name, c in zip(results['layers'], COLOURS)}
           | {f'{kind} images': dict(color='0.4') | STYLES[kind] for kind in KINDS}
           | {'ceilings log2 N and H(Y)': DOTTED})
    fig.suptitle('Through training, small to large: where dotted lines meet, nothing is measured')
    common.save_figure(fig, folder, 'fig2_planes')

def figure_entropy(runs, results, folder):
    layers, n = results['layers'], len(results['labels'])
    fig, axes = common.new_figure(2, len(layers), 2 * len(layers) + 0.5, 5, sharex=True,
                                  sharey=True)
    for noise, row in enumerate(axes):
        for k, axis in enumerate(row):
            for method, run in runs.items():
                info, given = (through_training(run, results, 'natural', name)[:, k]
                               for name in ('info', 'given'))
                style = dict(color=METHOD_COLOURS[method])
                axis.plot(results['epochs'], info[:, noise, X], lw=2.2, **style)
                axis.plot(results['epochs'], given[..., noise], lw=0.6, alpha=0.7, **style)
            for count in (n, n / len(results['classes'])):
                axis.axhline(math.log2(count), **DOTTED)
            axis.set(title=layers[k], xlabel='epoch', ylim=(0, None))
        row[0].set_ylabel(f'{NOISES[noise]}\nH(T) less the noise\'s (bits)')
    legend(fig, 3, {f'{NAMES[method]}, all images (thin: each class alone)': dict(
        color=METHOD_COLOURS[method], lw=2.2) for method in runs}
        | {'log2 of the number of images': DOTTED})
    fig.suptitle('Entropy of outputs, natural images: on dotted lines it only counts images')
    common.save_figure(fig, folder, 'fig3_entropy')

def figure_distortions(runs, results, folder):
    fig, axes = common.new_figure(len(results['levels']), 3, 10, 2.9 * len(results['levels']))
    labels = ('accuracy (%)', 'I(T;Y) of the logits less\nthat of permuted labels (bits)',
              'images that the attack fools:\nread as its wrong class (%)')
    for (name, levels), row in zip(results['levels'].items(), axes):
        at = [str(level) for level in levels]
        for method, run in runs.items():
            for kind, survives in zip(KINDS, survival(run, results, name)):
                style = dict(color=METHOD_COLOURS[method]) | STYLES[kind]
                found = run['distorted'][kind][name]
                info = found['info'].mean(0)[:, SCALED]
                right = found['predicted'] == results['labels']
                row[0].plot(at, 100 * right.mean((0, 2)), **style)
                row[1].plot(at, info[:, Y] - info[:, NULL], **style)
                if np.isfinite(survives).any():
                    row[2].plot(at, 100 * np.nanmean(survives, (0, 2)), **style)
        row[0].axhline(100 / len(results['classes']), **DOTTED)
        for axis, label in zip(row, labels):
            axis.set(title=name, ylabel=label, xlabel=f'level ({levels[0]}: as it was)')
    legend(fig, 5, {f'{NAMES[method]}, {kind}': dict(color=METHOD_COLOURS[method]) | STYLES[kind]
                    for method in runs for kind in KINDS} | {'chance': DOTTED})
    fig.suptitle('Saturation destroys texture, patch-shuffle (patches a side) shape: what is left '
                 'of accuracy,\nof label information under scaled noise and of the class that an '
                 'attack put in')
    common.save_figure(fig, folder, 'fig4_distortions')

def figure_controls(runs, results, folder):
    layers, (most, label_bits) = results['layers'], ceilings(results)
    fig, ((a, b, c),) = common.new_figure(1, 3, 11, 4)
    for step, (method, run) in enumerate(runs.items()):
        info, scaled = (through_training(run, results, 'natural', name)[-1]
                        for name in ('info', 'scaled'))
        for noise, colour in zip(range(3), COLOURS[1:]):
            at = np.arange(len(layers)) + 0.12 * (2 * noise + step - 2.5)
            style = dict(color=colour, marker='os'[step], ls='none', ms=4)
            a.plot(at, info[:, noise, X], label=f'{NAMES[method]}, {NOISES[noise]}', **style)
            b.plot(at, info[:, noise, Y], **style)
            b.plot(at, info[:, noise, NULL], mfc='none', **style)
        style, (low, high) = dict(color=METHOD_COLOURS[method]), run['noise_curve'].mean(0).T
        c.fill_between(CURVE, low, high, alpha=0.3, label=f'{NAMES[method]}, both bounds', **style)
        c.axvline(scaled[-1], ls='--', label=f'{NAMES[method]}, scaled noise', **style)
    c.axvline(VARIANCE, color='0.4', label='published noise')
    c.legend(fontsize=7)
    for axis, ceiling in ((a, most), (b, label_bits), (c, most)):
        axis.axhline(ceiling, **DOTTED)
        axis.set(ylim=(0, None), ylabel='I(T;X) (bits)', xlabel='layer')
    a.set(xticks=range(len(layers)), xticklabels=layers, title='Against log2 N (dotted)')
    b.set(xticks=range(len(layers)), xticklabels=layers, ylabel='I(T;Y) (bits)',
          title='Against permuted labels (open), H(Y) (dotted)')
    c.set(title='Logits: it depends on the noise', xscale='log', xlabel='variance of the noise')
    fig.legend(*a.get_legend_handles_labels(), loc='outside lower center', ncols=6, fontsize=8)
    fig.suptitle('Trained networks, natural images: at a ceiling, or where permuted labels tell as '
                 'much, an estimate says nothing')
    common.save_figure(fig, folder, 'fig5_controls')

def figure_images(results, folder):
    shown = [(f'{name}\n{level}', images) for name, levels in results['levels'].items()
             for level, images in zip(levels, results['images'][name])]
    fig, axes = common.new_figure(len(shown[0][1]), len(shown), 1.1 * len(shown), 4.1)
    for (title, images), column in zip(shown, axes.T):
        for axis, image in zip(column, images):
            common.show_image(axis, image)
        column[0].set_title(title)
    fig.suptitle('What the distortions do to test images (saturation 2 and patches 1: nothing)')
    common.save_figure(fig, folder, 'fig6_images')

# ------------------------------------------------------------------------------------- Claims

def claims(results):
    """The rows of the table."""
    runs = {method: common.stack(arm) for method, arm in results['runs'].items()}
    y, last, ceiling = results['labels'], f'epoch{results["epochs"][-1]}', ceilings(results)[0]
    nt, at = (run[last] for run in runs.values())
    chance = [common.near_chance(kinds['natural']['correct'], y) for kinds in (nt, at)]
    either = max(chance)
    terms = {(NAMES[m], kind): run['distorted'][kind]['terms'] for m, run in runs.items()
             for kind in KINDS}  # of the logits: (S, 3, 3, N)
    gain = (terms['NT', 'natural'] - terms['AT', 'natural'])[:, :, X].swapaxes(0, 1)
    label = {key: v[:, SCALED, Y] - v[:, SCALED, NULL] for key, v in terms.items()}
    top = np.max([terms[k, 'natural'][:, :, X].mean(-1) for k in ('NT', 'AT')], (0, 1))
    full = ['at the ceiling log2 N' * bool(v > ceiling - MARGIN) for v in top]
    null = {k: 'permuted labels tell as much' * bool(v.mean(-1).min() < MARGIN)
            for (k, kind), v in label.items() if kind == 'natural'}
    flipped = '' if nt['adversarial']['correct'].mean(-1).max() <= FOOLED else 'the attack fails'
    rows = [  # of information: text, effect, why it says nothing, reference
        ('V2b AT extracts less from the image: I(T;X) of the logits, published noise, NT minus AT',
         gain[PUBLISHED], either or full[PUBLISHED], f'12.12 and 10.37 {SLIDES}'),
        ('V2c the same under scaled noise (if not, V2b is one of scale)', gain[SCALED],
         either or full[SCALED], '-'),
        ('V2d AT knows less of the label: I(T;Y) of the logits less that of permuted labels, '
         'scaled noise, NT minus AT', label['NT', 'natural'] - label['AT', 'natural'],
         either or null['NT'], f'3.31 and 2.60 under published noise {SLIDES}'),
        ('V2e and on adversarial images still less: AT, natural minus adversarial',
         label['AT', 'natural'] - label['AT', 'adversarial'], chance[1] or null['AT'],
         f'2.60 and 2.29 under published noise {SLIDES}'),
        (f'V5 label information stays although predictions flip: NT, adversarial minus {STAYS} of '
         'natural, scaled noise', label['NT', 'adversarial'] - STAYS * label['NT', 'natural'],
         chance[0] or null['NT'] or flipped, '-')]
    return [
        trend_claim(runs, results, either),
        Claim('V2a AT is harder: test loss of what it trains for, AT attacked minus NT natural',
              SOURCE, at['adversarial']['loss'] - nt['natural']['loss'],
              reference=f'1.78 and 0.5 nats {SLIDES}', unless=either),
        *(Claim(text, SOURCE, effect, reference=reference, unless=unless,
                interval=interval(effect)) for text, effect, unless, reference in rows),
        resistance_claim('V3a AT resists saturation better', 'saturation', ('pgd', 'standard'),
                         runs, results, either),
        resistance_claim('V3b NT resists patch-shuffle better', 'patches', ('standard', 'pgd'),
                         runs, results, either),
        survival_claim(runs['standard'], results, chance[0])]

def trend_claim(runs, results, unless):
    """V1, over series of a network, layer, noise and quantity, whose interval is of such series."""
    rho, ceiling = [], ceilings(results)[0] - MARGIN
    for run in runs.values():
        pair = [through_training(run, results, kind, 'info') for kind in KINDS]
        pair = np.stack(pair) @ [[1, 0], [0, 1], [0, -1]]  # I(T;X), I(T;Y) less I(T;permuted Y)
        free = (np.max(pair, (0, 1))[..., [X, X]] < ceiling) & (np.ptp(pair, 1).min(0) > MARGIN)
        ranks = [v[:, free].argsort(0).argsort(0).T for v in pair]
        rho += [np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks)]
    if len(results['epochs']) < TREND_EPOCHS or not rho:
        unless = unless or f'fewer than {TREND_EPOCHS} epochs, or nothing moves below its ceiling'
    return Claim('V1 information on natural and adversarial images moves alike: rank correlation '
                 f'over epochs, mean and interval of {len(rho)} series below the ceiling', SOURCE,
                 rho or [0.0], above=TREND, unless=unless)

def resistance_claim(text, name, methods, runs, results, unless):
    """V3: accuracy over that without distortion, mean over levels, difference of two networks."""
    left = []
    for method in methods:
        right = runs[method]['distorted']['natural'][name]['predicted'] == results['labels']
        kept, whole = right[:, 1:].mean(1), right[:, 0]  # (S, N)
        accuracy = max(whole.mean(), 1e-9)
        ratio = kept.mean() / accuracy
        left.append(ratio + (kept - ratio * whole) / accuracy)  # of such terms it is the mean
    return Claim(f'{text}: share of the accuracy that is left, mean over levels, difference',
                 f'{SOURCE}; Zhang & Zhu 2019', left[0] - left[1], unless=unless)

def survival_claim(run, results, unless):
    """V4: by how much the attack raises the share that is read as its wrong class."""
    raised = [np.subtract(*survival(run, results, name)[::-1])[:, 1:].mean(1)
              for name in ('patches', 'saturation')]  # (S, N)
    effect = raised[0] - raised[1]
    fooled, mean = np.isfinite(effect), np.nansum(effect) / max(np.isfinite(effect).sum(), 1)
    terms = np.where(fooled, effect - mean, 0) / max(fooled.mean(), 1e-9) + mean
    unless = unless or f'the attack fools fewer than {FEW} images' * bool(fooled.sum() < FEW)
    return Claim('V4 an attack puts in texture: NT reads its wrong class after patch-shuffle more '
                 'often than after saturation, each above unattacked images', SOURCE, terms,
                 unless=unless)

def main(argv=None):
    parser = common.make_parser(__doc__, DEFAULTS, argv)
    parser.add_argument('--measured', type=int, metavar='N', help='epochs, at most')
    parser.add_argument('--test-steps', type=int, metavar='N', help='of PGD in tests')
    parser.add_argument('--test-step-size', type=common.number, metavar='X',
                        help='of PGD in tests, eps / steps at least; 0: a quarter of eps')
    args = common.parse(parser, argv)
    folder, device, data, results = common.start('mi_analysis', args)
    if 'finished' not in results:
        study(args, folder, device, data, results)
        common.finish('mi_analysis', results, folder)
    draw(results, folder)
    common.judge(claims(results), results, folder)

if __name__ == '__main__':
    common.entry(main)
