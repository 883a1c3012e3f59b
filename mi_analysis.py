"""What the layers of normally and adversarially trained CNNs know: mutual information.

Question   How much do a layer's outputs T tell about the image X and the label Y, in a normally
           (NT) and an adversarially trained network (AT), on natural and adversarial images,
           through training and when texture or shape is destroyed? And which of these numbers
           say something about the network rather than about the estimator?
Paper      Zhang, Qian, Nie, Cao, Xu 2022, Exploring adversarial examples and adversarial
           robustness of CNNs by mutual information (arXiv 2207.05756), with its estimators:
           pairwise distance bounds (Kolchinsky & Tracey 2017; Saxe et al. 2018) and binning.
           Distortions after Zhang & Zhu 2019 (arXiv 1905.09797). Ceilings, permuted labels,
           scale controls and the Monte-Carlo referee (Goldfeld et al. 2019) are ours.
Usage      python mi_analysis.py                                shapes, minutes on a laptop
           python mi_analysis.py --dataset cifar10 --seeds 0 1 2   WRN-10-1, one GPU
           python mi_analysis.py --dataset mnist --epochs 15       LeNet-5, a CPU
           python mi_analysis.py --as-published                 with the authors' choices
Outputs    runs/mi_analysis/<dataset>-<arch>/: results.json, metrics.csv, claims.md and
           fig1_training  fig2_plane_standard  fig3_plane_pgd  fig4_layers  fig5_entropy
           fig6_distortion  fig7_distortion_layers  fig8_images  fig9_scale  fig10_nulls
           fig11_geometry   (each .png and .pdf)
"""

import math
import sys
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap

import common
from common import METHOD_COLOURS, claim, effect_verdict, make_generator

# Source of the numbers below unless another is named: the authors' code, 2022.
VARIANCE = 0.1  # of the noise, for every layer (also MNIST in Saxe et al. 2018)
BIN_WIDTH = 0.5  # absolute, unbounded range
SATURATION = (2, 8, 16, 64, 1024)  # levels p; 2 is the identity
PATCHES = (0, 2, 4, 8)  # k x k patches; 0 is the identity
PUBLISHED_BATCHES = {'mnist': (2500, 2), 'cifar10': (500, 10), 'stl10': (750, 6)}
PUBLISHED = dict(lr=0.025, schedule='constant', weight_decay=0.0)  # see `study`
# Ours.
CURVE = tuple(VARIANCE * 4.0**k for k in range(-3, 6))  # variances of the scale control
PERMUTATIONS = 3  # of the labels, for the null
REPLICATES = 200  # of the bootstrap over images
REFEREE_DRAWS = 4  # noise vectors per image
NEGLIGIBLE = 60.0  # exp(-60) = 1e-26: kernels that are not evaluated
ACTIVATIONS = 2**30  # bytes of activations held at a time

_PAPER = dict(weight_decay=0.0, schedule='drops:0.1,0.3:0.5', steps=7, test_size=5000)
DEFAULTS = {
    '*': dict(measured=20, test_steps=7),
    'shapes': dict(test_size=1500),
    'mnist': dict(_PAPER, arch='lenet5', epochs=200, lr=0.1, eps=45 / 255, step_size=8 / 255, eps_warmup=0.0),
    'fashion-mnist': dict(_PAPER, arch='lenet5', epochs=200, lr=0.1),
    'cifar10': dict(_PAPER, arch='wrn-10-1'),
    'cifar100': dict(_PAPER, arch='wrn-10-1'),
    'svhn': dict(_PAPER, arch='wrn-10-1'),
    'stl10': dict(_PAPER, arch='wrn-10-1', epochs=200, test_size=4500),
}
# The hooked modules; the first prefix that fits. True: followed by a ReLU that is not a module.
LAYERS = {
    'small-cnn': (('stem', 0), ('stage1', 0), ('stage2', 0), ('stage3', 0), ('fc', 0)),
    'lenet5': (('conv1', 1), ('conv2', 1), ('fc1', 1), ('fc2', 1), ('fc3', 0)),
    'wrn-': (('conv1', 0), ('block1.0.relu1', 0), ('block2.0.relu1', 0), ('block3.0.relu1', 0), ('fc', 0)),
    'resnet18': (('layer1', 0), ('layer2', 0), ('layer3', 0), ('layer4', 0), ('linear', 0)),
    'preact': (('layer1', 0), ('layer2', 0), ('layer3', 0), ('layer4', 0), ('linear', 0)),
    'resnet50': (('model.layer1', 0), ('model.layer2', 0), ('model.layer3', 0), ('model.layer4', 0), ('model.fc', 0)),
}
METHODS = ('standard', 'pgd')
NAMES = {'standard': 'NT', 'pgd': 'AT'}
KINDS = {'clean': 'natural', 'adv': 'adversarial'}
QUANTITIES = ('x_upper', 'x_lower', 'x_bin', 'y_upper', 'y_lower', 'y_bin')
ESTIMATORS = {'upper': 'KDE upper', 'lower': 'KDE lower', 'bin': 'binning'}

# Thresholds of the claims, fixed before any run, but TREND_EPOCHS, raised from 4 after the second
# run on shapes.
MARGIN = 0.05  # bit: this close to the ceiling, or this constant, is saturated
TREND = 0.8  # V1: median rank correlation; its interval must lie above TREND_LOW
TREND_LOW = 0.5
TREND_EPOCHS = 6  # V1: below the ceiling; of fewer, 0.8 is no rarer than 1 in 20
STAYS = 0.9  # V5: share of H(Y) that remains
FOOLED = 0.10  # V5: accuracy at most
GEOMETRY = 0.8  # V6: rank correlation
CHANCE = 1.5  # times 1 / classes: natural accuracy below is no network to judge


# ------------------------------------------------------------------------- pairwise distances


def distances(a, b, norm_a, norm_b, centre, dtype, chunk, enough=math.inf):
    """Squared distances of the rows of a (A, D) and b (B, D), computed in dtype: (A, B).

    norm_a, norm_b: (A or B, chunks) squared norms of the rows less `centre`, chunk by chunk;
    |a|^2 + |b|^2 - 2ab cancels badly far from the origin. Stops when all of s, but for a
    diagonal of zeros, is above `enough`: more dimensions only add to it.
    """
    s = torch.zeros(len(a), len(b), dtype=dtype, device=a.device)
    norm_a, norm_b = norm_a.to(dtype), norm_b.to(dtype)
    for k, c in enumerate(range(0, a.shape[1], chunk)):
        u, v = (t[:, c : c + chunk].to(dtype) - centre[c : c + chunk].to(dtype) for t in (a, b))
        s.add_(norm_a[:, k, None]).add_(norm_b[:, k]).addmm_(u, v.T, alpha=-2)
        below = (s <= enough).sum() if enough < math.inf else s.numel()
        if below == (len(a) if a.data_ptr() == b.data_ptr() else 0):
            break
    return s


def refined(a, b, norm_a, norm_b, centre, chunk, reach, whole):
    """Squared distances in float32, those below `reach` once more in float64; None where there
    are so many that float64 throughout is cheaper."""
    # far more than the rounding of s
    slack = 2.0**-16 * (norm_a.sum(1).max() + norm_b.sum(1).max()).item()
    s = distances(a, b, norm_a, norm_b, centre, torch.float32, chunk, math.inf if whole else reach + slack)
    near = s < reach + slack
    if a.data_ptr() == b.data_ptr():
        near.fill_diagonal_(False)
    rows, columns = near.nonzero(as_tuple=True)
    if len(rows) > s.numel() // 128:
        return None
    s = s.double()
    for part in torch.arange(len(rows), device=s.device).split(max(1, 2**21 // a.shape[1])):
        i, j = rows[part], columns[part]
        s[i, j] = (a[i].double() - b[j].double()).square().sum(1)
    return s


@torch.no_grad()
def kernel_sums(t, groups, scales, *, whole=True, raw=False, tile=0, chunk=1024):
    """Sums of exp(-s_ij / u) over the members j of each group, s_ij = |t_i - t_j|^2.

    t: (N, D); groups: (N, G) memberships or weights, or (U, N, G), for each scale its own;
    scales: the values of u, descending. One pass over the tiles of
    the upper triangle serves every scale and group; nothing of size N^2 is held. s_ii is 0.
    Tiles are in float64 (on CPUs with many dimensions in float32, with float64 wherever a
    kernel is not negligible); sums are in float64. whole: False stops a tile after as many
    dimensions as make every kernel in it negligible. tile: rows of a tile (0: 512, on a GPU
    4096). raw: all in float32, not centred and as
    computed, s_ii included, as the authors' code has it.
    Returns sums (U, N, G) and nearest (N,): the smallest s_ij, j != i; not whole: at least it
    or NEGLIGIBLE times the largest u.
    """
    n, d = t.shape
    tile = tile or (4096 if t.is_cuda else 512)
    groups, centre = groups.to(t.device, torch.float64), t.mean(0)
    groups = groups.expand(len(scales), n, -1)
    reach, kind = NEGLIGIBLE * max(scales), torch.float64
    if raw:
        centre, kind, chunk = torch.zeros_like(centre), torch.float32, d
    norms = torch.stack(
        [
            torch.cat(
                [
                    (rows.to(kind) - centre[c : c + chunk].to(kind)).square().sum(1)
                    for rows in t[:, c : c + chunk].split(128)
                ]
            )
            for c in range(0, d, chunk)
        ],
        1,
    )
    sums, nearest = groups.new_zeros(groups.shape), groups.new_full((n,), math.inf)
    exact = d <= 256 or t.is_cuda or t.dtype == torch.float64
    for i in range(0, n, tile):
        for j in range(i, n, tile):
            a, b, same = slice(i, i + tile), slice(j, j + tile), i == j
            pair, s = (t[a], t[b], norms[a], norms[b], centre), None
            if raw:
                s = distances(*pair, torch.float32, chunk).double()
            elif not exact:
                s = refined(*pair, chunk, reach, whole)
                exact = s is None
            if s is None:
                s = distances(*pair, torch.float64, chunk, math.inf if whole else reach)
            if not raw:
                s.clamp_(min=0)
            if same:
                own = s.diagonal().clone() if raw else torch.zeros_like(s.diagonal())
                s.fill_diagonal_(math.inf)
            closest = s.amin(1)
            nearest[a] = torch.minimum(nearest[a], closest)
            nearest[b] = torch.minimum(nearest[b], s.amin(0))
            if same:
                s.diagonal().copy_(own)
            last, kernel = 0.0, None
            for k, u in enumerate(scales):
                if closest.min() > NEGLIGIBLE * u and not raw:
                    if same:
                        sums[k, a] += groups[k, a]  # each image with itself
                    continue
                if abs(last - 4 * u) < 1e-9 * u:  # as for the two bounds: cheaper than exp
                    kernel.square_().square_()
                else:
                    kernel = torch.exp(s / -u)
                last = u
                sums[k, a] += kernel @ groups[k, b]
                if not same:
                    sums[k, b] += kernel.T @ groups[k, a]
    return sums, nearest


def distance_ratio(t, y, classes):
    """Root mean squared distance of two images of different classes over that of two of the
    same class, from distances to the mean instead of pairs."""

    def pairs(rows):  # the sum of the squared distances of all ordered pairs
        mean = rows.mean(0)
        return 2 * len(rows) * sum((part - mean).square_().sum(1).double().sum() for part in rows.split(256))

    size = y.bincount(minlength=classes).double()
    within = sum(pairs(t[y == k]) for k in range(classes) if size[k])
    between = (pairs(t) - within) / (len(t) ** 2 - size.square().sum())
    return (between / (within / (size * (size - 1)).sum())).clamp(0, 1e12).sqrt().item()


# ------------------------------------------------------------------------------ the estimators


def kde_terms(t, labels, classes, variances=(VARIANCE,), raw=False, geometry=False):
    """The pairwise-distance bounds, image by image, in bits.

    With noise N(0, v I) the outputs are a mixture of N Gaussians. Its entropy less that of the
    noise is bounded by -mean_i log[(1/N) sum_j exp(-s_ij / (c v))], from above for c = 2 (KL
    distance) and from below for c = 8 (Bhattacharyya distance; Kolchinsky & Tracey 2017). The
    terms (D/2) log(2 pi v) cancel and are never formed.
    t: (N, D); labels: (P, N) int64, labellings side by side.
    Returns a dict: 'upper', 'lower': (V, N) terms whose mean is I(T;X); 'upper_given',
    'lower_given': (V, P, N), the same among the images of the same label; nearest (N,), the
    smallest squared distance, at least where it matters to a kernel. With `geometry`, and
    where any distance matters, nearest is exact and each term has an 'influence_' of the same
    shape: what the image contributes to the mean, its own term and its part in the others',
    up to a constant (the infinitesimal jackknife), for intervals.
    """
    n, labels = len(t), labels.to(t.device)
    groups = torch.cat([F.one_hot(y, classes) for y in labels], 1).double()
    size = groups.sum(0).view(len(labels), classes)
    factors = {'upper': 2, 'lower': 8}
    at = {(name, v): float(f'{c * v:.12g}') for name, c in factors.items() for v in variances}
    scales = sorted(set(at.values()), reverse=True)
    sums, nearest = kernel_sums(t, groups, scales, whole=False, raw=raw)
    blocks = sums.view(len(scales), n, len(labels), classes)
    total = blocks[:, :, 0].sum(2)  # (U, N)
    own = torch.stack([_pick(blocks[:, :, p], y) for p, y in enumerate(labels)], 2)  # (U, N, P)
    terms = {
        '': -(total / n).log2(),
        '_given': -torch.stack([own[:, :, p] / size[p, y] for p, y in enumerate(labels)], 1).log2(),
    }
    out = {}
    if geometry and nearest.min() <= NEGLIGIBLE * scales[0]:
        share = groups.view(n, len(labels), classes) / own[..., None]  # of a class's sum
        weights = torch.cat((share.flatten(2), 1 / total[..., None]), 2)
        sums, nearest = kernel_sums(t, weights, scales, raw=raw)
        parts = sums[..., :-1].view(len(scales), n, len(labels), classes)
        part = {
            '': sums[..., -1] - 1 / total,
            '_given': torch.stack([_pick(parts[:, :, p], y) - 1 / own[:, :, p] for p, y in enumerate(labels)], 1),
        }
        terms |= {'influence_' + k: terms[k] - v / math.log(2) for k, v in part.items()}
    for name in factors:
        rows = [scales.index(at[name, v]) for v in variances]
        for kind, values in terms.items():
            prefix = 'influence_' if kind.startswith('influence_') else ''
            out[prefix + name + kind.removeprefix('influence_')] = values[rows]
    return out | dict(nearest=nearest)


def _pick(sums, y):
    """(U, N, classes) -> (U, N): each image's own class."""
    return sums.gather(2, y[None, :, None].expand(len(sums), -1, 1))[..., 0]


def cell_keys(t, width=BIN_WIDTH):
    """Two 64-bit hashes of every row's cell floor(t / width): (N, 2) int64.

    Random odd multipliers, sums that wrap: two different rows of cells share both hashes with
    a probability below 2^-100. Raises ValueError for NaN and infinity.
    """
    generator = make_generator('cells')
    factors = torch.randint(-(2**62), 2**62, (2, t.shape[1]), generator=generator) * 2 + 1
    factors, keys = factors.to(t.device), torch.empty(len(t), 2, dtype=torch.int64, device=t.device)
    step = max(1, 2**19 // t.shape[1])
    for i in range(0, len(t), step):
        cells = (t[i : i + step] / width).floor_()
        if not torch.isfinite(cells).all():
            raise ValueError('the activations hold NaN or infinity')
        cells = cells.long()
        for k in (0, 1):
            keys[i : i + step, k] = (cells * factors[k]).sum(1)
    return keys


def bin_terms(keys, labels):
    """The binned estimate, image by image, in bits: terms (N,) whose mean is the entropy of
    the cells, I(T;X) of a deterministic network, and (P, N), the same within each label."""
    n = len(keys)
    _, cell, size = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    given = []
    for y in labels.to(keys.device):
        _, joint, both = torch.unique(cell * (y.max() + 1) + y, return_inverse=True, return_counts=True)
        given.append(-(both[joint].double() / y.bincount()[y]).log2())
    return -(size[cell].double() / n).log2(), torch.stack(given)


@torch.no_grad()
def monte_carlo(t, y, variance, draws, generator):
    """The referee for few dimensions: I(T + noise; X) and I(T + noise; Y) of the mixture by
    sampling (Goldfeld et al. 2019), unbiased. t: (N, D); generator: on the device of t.

    Returns two (draws N,) arrays of terms in bits; their means are the estimates.
    """
    t, y, terms = t.double(), y.to(t.device), []
    for _ in range(draws):
        for rows in torch.arange(len(t), device=t.device).split(1024):
            noise = (
                torch.randn(len(rows), t.shape[1], generator=generator, device=t.device, dtype=torch.float64)
                * variance**0.5
            )
            s = torch.cdist(t[rows] + noise, t, compute_mode='donot_use_mm_for_euclid_dist')
            log_k = s.square() / (-2 * variance)
            # the log density of the noise alone, in place of its mean: less variance
            alone = noise.square().sum(1) / (-2 * variance)
            same = y[rows][:, None] == y
            whole = log_k.logsumexp(1) - math.log(len(t))
            inside = log_k.masked_fill(~same, -math.inf).logsumexp(1) - same.sum(1).double().log()
            terms.append(torch.stack((alone - whole, inside - whole)) / math.log(2))
    return torch.cat(terms, 1).cpu()


def entropy(counts):
    """Entropy in bits of a distribution given by counts."""
    p = np.asarray(counts, float)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log2(p)).sum())


def noise_entropy(dimensions, variance=VARIANCE):
    """Of N(0, v I), in bits."""
    return dimensions / 2 * math.log2(2 * math.pi * math.e * variance)


def layer_information(
    t, labels, classes, weights, raw=False, variance=VARIANCE, width=BIN_WIDTH, unit=False, geometry=True
):
    """Everything measured on the outputs t (N, D) of one layer.

    labels: (1 + PERMUTATIONS, N), the true ones first; weights: (1 + REPLICATES, N), from
    `replicate_weights`. In bits, a dict of: values (QUANTITIES, 1 + REPLICATES); bracket, the
    valid bounds of I(T;Y); null, I(T;Y) with permuted labels by each estimator; entropy of
    T + noise and, class by class, of T + noise given the label; certified: no two images are
    near enough to matter, so that every value is that of the list of images; dimensions. With
    `geometry` also log_nearest, the mean log2 distance of the nearest neighbour (None where
    certified), and ratio of the distances between and within classes. With `unit` also the
    lower bounds of the outputs scaled to unit RMS: I(T;X), I(T;Y) and the latter with permuted
    labels (3, 1 + REPLICATES).
    """
    labels, variances = labels.to(t.device), (variance,)
    if unit:  # the last variance is for the slope
        power = t.double().square().sum(1)
        rms = max((power.mean() / t.shape[1]).sqrt().item(), 1e-9)
        variances += (variance * rms**2, 1.1 * variance * rms**2)
    kde = kde_terms(t, labels, classes, variances, raw, geometry=True)
    cells, cells_given = bin_terms(cell_keys(t, width), labels)

    def terms(bound, at, prefix=''):
        """I(T;X) and I(T;Y), the latter for each labelling: (N,), (P, N)."""
        if prefix + bound not in kde:  # certified: no spread
            prefix = ''
        x = kde[prefix + bound][at]
        return x, x - kde[f'{prefix}{bound}_given'][at]

    def replicated(term, influence):
        """(1 + REPLICATES,): the mean of the terms and its bootstrap by their influence."""
        spread = weights[1:] @ (influence - influence.mean()).cpu()
        return term.mean().cpu() + torch.cat((torch.zeros(1, dtype=torch.float64), spread))

    upper, lower, y = terms('upper', 0), terms('lower', 0), labels[0]
    binned = cells, cells - cells_given
    pairs = (
        (upper, terms('upper', 0, 'influence_')),
        (lower, terms('lower', 0, 'influence_')),
        (binned, binned),
    )  # of a plug-in entropy the influences are the terms
    values = [replicated(v[0], m[0]) for v, m in pairs] + [replicated(v[1][0], m[1][0]) for v, m in pairs]
    label_entropy, noise = entropy(y.bincount().tolist()), noise_entropy(t.shape[1], variance)
    bracket = [(kde[a][0] - kde[b + '_given'][0, 0]).mean().item() for a, b in (('lower', 'upper'), ('upper', 'lower'))]
    given, nearest, more = kde['lower_given'][0, 0], kde['nearest'], {}
    certified = bool(nearest.min() / (8 * variance) > 40 + math.log(len(t)))
    if unit:
        (x, by), (x_moved, by_moved), (_, by_slope) = (
            terms('lower', 1),
            terms('lower', 1, 'influence_'),
            terms('lower', 2),
        )
        # the RMS depends on the images, too
        slope = (
            torch.stack((kde['lower'][2].mean() - x.mean(), (by_slope - by)[0].mean(), (by_slope - by)[1:].mean()))
            / 0.1
        )
        scale = power / power.mean().clamp(min=1e-18) - 1
        more |= dict(
            rms=rms,
            unit=torch.stack(
                [
                    replicated(v, m + s * scale)
                    for v, m, s in (
                        (x, x_moved, slope[0]),
                        (by[0], by_moved[0], slope[1]),
                        (by[1:].mean(0), by_moved[1:].mean(0), slope[2]),
                    )
                ]
            ),
        )
    if geometry:
        more |= dict(
            ratio=distance_ratio(t, y, classes),
            log_nearest=None if certified else 0.5 * nearest.clamp(min=1e-12).log2().mean().item(),
        )
    return more | dict(
        values=torch.stack(values),
        dimensions=t.shape[1],
        certified=certified,
        null=[v[1][1:].mean().item() for v in (upper, lower, binned)],
        bracket=[min(max(b, 0.0), label_entropy) for b in bracket],
        entropy=[noise + lower[0].mean().item()] + [noise + given[y == k].mean().item() for k in range(classes)],
    )


def replicate_weights(n, seed=0):
    """(1 + REPLICATES, n) weights that average terms: over all images, then over bootstrap
    samples of them.

    They average influences: repeating an image in the mixture itself would lower every
    estimate, and its ceiling.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, np.full(n, 1 / n), REPLICATES)
    return torch.from_numpy(np.concatenate((np.ones((1, n)), drawn)) / n)


# --------------------------------------------------------------------- networks and distortions


def layers_of(arch, published):
    """[(name of the module, whether a ReLU follows before the output is taken)]."""
    for prefix, layers in LAYERS.items():
        if arch.startswith(prefix):
            return [(name, bool(rectify) and not published) for name, rectify in layers]
    raise common.UserError(
        f'no layers are known for {arch}; known: small-cnn, lenet5, resnet18, preact-resnet18, wrn-*, resnet50'
    )


def build(arch, classes, shape, seed, published=False):
    """As published, batch norms use the statistics of the batch at any time: in the attacks,
    in testing and while mutual information is measured."""
    model = common.make_model(arch, classes, shape, seed)
    if published:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


def activations(model, x, layers, batch_size=250):
    """Yield (name, outputs (N, D) float32) of each layer, few enough at a time for memory.

    x: (N, C, H, W) float in [0, 1].
    """
    taken = {}

    def taker(name, rectify):
        def take(module, inputs, output):
            taken[name] = (F.relu(output) if rectify else output).detach().flatten(1)

        return take

    modules = dict(model.named_modules())
    with common.frozen(model), torch.no_grad():
        handles = [modules[n].register_forward_hook(taker(n, r)) for n, r in layers]
        try:
            model(x[:2])
            wanted, sizes = [], {n: 4 * len(x) * taken[n].shape[1] for n, _ in layers}
            for name, _ in layers:
                if wanted and sum(map(sizes.get, wanted + [name])) > ACTIVATIONS:
                    yield from _collect(model, x, wanted, taken, batch_size)
                    wanted = []
                wanted.append(name)
            yield from _collect(model, x, wanted, taken, batch_size)
        finally:
            for handle in handles:
                handle.remove()


def _collect(model, x, wanted, taken, batch_size):
    store = {}
    for i in range(0, len(x), batch_size):
        model(x[i : i + batch_size])
        for name in wanted:
            if not i:
                store[name] = torch.empty(len(x), taken[name].shape[1], device=x.device)
            store[name][i : i + batch_size] = taken[name]
    for name in wanted:
        yield name, store.pop(name)


def shuffle_patches(x, k, generator):
    """Cut every image into k x k patches and permute them, each image its own way; k = 0 is
    the identity. x: (N, C, H, W), H and W divisible by k."""
    if k == 0:
        return x
    return common.permute_patches(x, torch.rand(len(x), k * k, generator=generator).argsort(1))


def distort(x, name, level):
    """The distortion of that name and level; the same permutations for every network."""
    if name == 'saturation':
        return common.saturate(x, level)
    return shuffle_patches(x, level, make_generator('patches', level))


def distortion_levels(side):
    """{name: levels} for images of side x side pixels."""
    return {'saturation': SATURATION, 'patches': tuple(k for k in PATCHES if k == 0 or side % k == 0)}


# ---------------------------------------------------------------------------- the experiment


class Setting:
    """What all measurements of a run share: test images, layers, permuted labels, weights."""

    def __init__(self, args, data):
        self.args, self.data, self.classes = args, data, len(data.classes)
        self.layers = layers_of(args.arch, args.as_published)
        self.pool = len(data.test[1])
        self.batch, self.repeats = 250, 1
        if args.as_published:
            self.batch, self.repeats = PUBLISHED_BATCHES.get(args.dataset, (max(self.pool // 20, 1), 10))
            self.batch = min(self.batch, self.pool)
        self.n = self.batch * self.repeats if args.as_published else self.pool
        self.weights = replicate_weights(self.n)

    def sample(self, *key):
        """Indices of the test images: all, or, as published, overlapping random batches."""
        if not self.args.as_published:
            return torch.arange(self.n)
        generator = make_generator('sample', *key)
        return torch.cat([torch.randperm(self.pool, generator=generator)[: self.batch] for _ in range(self.repeats)])

    def images(self, index):
        x, y = self.data.test
        index = index.to(x.device)
        return common.to_float(x[index]), y[index]

    def attack(self, model, x, y):
        """PGD on the true labels, started at the image: (N, C, H, W)."""
        return torch.cat(
            [
                common.pgd(
                    model,
                    a,
                    b,
                    eps=self.args.eps,
                    step_size=self.args.test_step_size,
                    steps=self.args.test_steps,
                    norm=self.args.norm,
                    start='clean',
                )
                for a, b in zip(x.split(self.batch), y.split(self.batch))
            ]
        )

    def labels(self, y):
        """(1 + PERMUTATIONS, N): the labels and permutations of them."""
        generator = make_generator('permute')
        orders = [torch.randperm(len(y), generator=generator) for _ in range(PERMUTATIONS)]
        return torch.stack([y] + [y[order.to(y.device)] for order in orders])

    def measure(self, model, x, y, index, geometry=True):
        """Accuracy, loss and the information in every layer, for results.json, with the geometry
        of the layers or, without it, the predictions."""
        labels, found = self.labels(y), []
        for name, t in activations(model, x, self.layers, self.batch):
            found.append(
                layer_information(
                    t,
                    labels,
                    self.classes,
                    self.weights,
                    self.args.as_published,
                    self.args.variance,
                    self.args.bin_width,
                    unit=name == self.layers[-1][0],
                    geometry=geometry,
                )
            )
        loss = F.cross_entropy(t, y, reduction='none')
        correct = t.argmax(1) == y
        guesses = {} if geometry else dict(predicted=common.pack(t.argmax(1).short()), label=common.pack(y.short()))
        return guesses | dict(
            values=common.pack(torch.stack([f.pop('values') for f in found]).float()),
            unit=common.pack(found[-1].pop('unit').float()),
            rms=found[-1].pop('rms'),
            accuracy=common.pack((self.weights @ correct.double().cpu()).float()),
            loss=common.pack((self.weights @ loss.double().cpu()).float()),
            ceiling=entropy(np.unique(index.numpy(), return_counts=True)[1]),
            label_entropy=entropy(y.bincount().tolist()),
            layers=found,
        )


def measured_epochs(epochs, most, published):
    """The epochs after which the network is measured: 0, the last and, where they are more
    than `most`, as many more at equal ratios. As published the last is left out: an epoch is
    measured before it is trained."""
    if published:
        epochs -= 1
    if most == 0 or epochs + 1 <= most:
        return list(range(epochs + 1))
    spaced = [[0, epochs]] + [
        [0, *np.unique(np.geomspace(1, epochs, n).round().astype(int))] for n in range(2, 4 * most)
    ]
    return [int(e) for e in max((e for e in spaced if len(e) <= max(most, 2)), key=len)]


def measure_epoch(setting, model, *key):
    """{'clean', 'adv': measurement}. As published each has its own random images."""
    out = {}
    for kind in KINDS:
        index = setting.sample(*key, kind)
        x, y = setting.images(index)
        if kind == 'adv':
            x = setting.attack(model, x, y)
        out[kind] = setting.measure(model, x, y, index)
    return out


def measure_distortions(setting, model, levels, *key):
    """{name: {level: {'clean', 'adv': measurement}}}; the attack comes first, the distortion
    second. Level 0 of each is the identity and measured once."""
    out = {name: {level: {} for level in at} for name, at in levels.items()}
    for kind in KINDS:
        index = setting.sample('distortion', kind, *key)
        x, y = setting.images(index)
        if kind == 'adv':
            x = setting.attack(model, x, y)
        plain = setting.measure(model, x, y, index, geometry=False)
        for name, at in levels.items():
            for i, level in enumerate(at):
                found = setting.measure(model, distort(x, name, level), y, index, geometry=False) if i else dict(plain)
                found['layers'] = None  # the information itself is enough here
                out[name][level][kind] = found
    return out


def scale_control(setting, model, *key):
    """Is a difference in information one of scale? On natural images, for every layer: the
    bounds at the variances of CURVE; for the logits also with the noise in proportion to
    their variance, and the Monte-Carlo referee beside the bounds."""
    index = setting.sample('scale', *key)
    x, y = setting.images(index)
    args, labels, curves = setting.args, y[None], []
    for _, t in activations(model, x, setting.layers, setting.batch):
        kde = kde_terms(t, labels, setting.classes, CURVE, args.as_published)
        curves.append(
            [
                [kde['upper'].mean(1).tolist(), kde['lower'].mean(1).tolist()],
                [(kde[e] - kde[e + '_given'][:, 0]).mean(1).tolist() for e in ('upper', 'lower')],
            ]
        )
    spread = t.double().var(0).mean().clamp(min=1e-18).item()
    variances = (*CURVE, args.variance * spread, args.variance)
    kde = kde_terms(t, labels, setting.classes, variances, args.as_published, geometry=True)
    moved = kde.get('influence_lower', kde['lower']).cpu()
    spreads = (moved - moved.mean(1, keepdim=True)) @ setting.weights[1:].T
    means = kde['lower'].mean(1, keepdim=True).cpu()
    logits = torch.cat((means, means + spreads), 1)  # (variances, 1 + REPLICATES)
    referee = monte_carlo(t, y, args.variance, REFEREE_DRAWS, make_generator('referee', device=t.device))
    return dict(
        curves=curves,
        rms=t.double().square().mean().sqrt().item(),
        spread=spread,
        logits=common.pack(logits[:-2].float()),
        relative=common.pack(logits[-2].float()),
        bounds=[kde['lower'][-1].mean().item(), kde['upper'][-1].mean().item()],
        referee=referee.mean(1).tolist(),
        referee_error=(referee.std(1) / referee.shape[1] ** 0.5).tolist(),
        cells=_cells_difference(t, args.bin_width),
    )


def _cells_difference(t, width):
    """|entropy of the hashed cells - entropy of the rows of cells themselves|, bits."""
    keys = cell_keys(t, width)
    hashed = bin_terms(keys, torch.zeros(1, len(t), dtype=torch.long))[0].mean().item()
    rows = (t.cpu() / width).floor().long().numpy()
    return abs(hashed - entropy(np.unique(rows, axis=0, return_counts=True)[1]))


def training_measures(setting, model, n=1000):
    """Loss and accuracy on training images, natural and under the attack of the test:
    (2, 2, 1 + REPLICATES)."""
    if setting.data.stream:
        return None
    x, y = (v[:n] for v in setting.data.train)
    x, weights, terms = common.to_float(x), replicate_weights(len(y)), []
    for images in (x, setting.attack(model, x, y)):
        with common.frozen(model), torch.no_grad():
            logits = torch.cat([model(a) for a in images.split(setting.batch)])
        terms.append(torch.stack((F.cross_entropy(logits, y, reduction='none'), (logits.argmax(1) == y).float())))
    return common.pack((torch.stack(terms).double().cpu() @ weights.T).float())


def usual_test_step(args):
    """The authors' step size on test images; a quarter of eps where there is none."""
    published = {'mnist': 8 / 255, 'stl10': 2 / 255 if args.as_published else 1 / 255}
    return published.get(args.dataset, args.eps / 4) if args.norm == 'linf' else args.eps / 4


def study(args):
    """Train and measure; returns (folder, results).

    As published: a constant learning rate of 0.025 (their schedule stepped per batch and had
    reached it after 60), batch norms on batch statistics, images drawn anew for every
    measurement and with repetitions, distances in float32 with their rounded diagonal, layers
    before their ReLU, measured before each epoch. (The distortions are of the trained network;
    they use the run's eps and batches, where the authors' script has 4/255 and 500 x 10 for
    CIFAR-10 and STL-10 alike. The eps warm-up of shapes stays.)
    """
    layers_of(args.arch, args.as_published)
    device = common.pick_device(args.device)
    if args.as_published and args.epochs == 1:
        raise common.UserError('--as-published measures before each epoch: two or more --epochs')
    args.test_step_size = args.test_step_size or usual_test_step(args)
    folder, config = common.start_run('mi_analysis', args)
    data = common.study_data(args, device)
    results = common.load_results(folder, config, __file__, args.fresh)
    setting = Setting(args, data)
    if setting.n < 2 * len(data.classes):
        raise common.UserError('--test-size is too small: two images of each class at least')
    epochs = measured_epochs(args.epochs, args.measured, args.as_published)
    levels = distortion_levels(data.shape[-1])
    results |= dict(
        classes=data.classes,
        epochs=epochs,
        levels=levels,
        samples=setting.n,
        layers=[name for name, _ in setting.layers],
    )
    builder = partial(build, published=args.as_published)
    extra = dict(batch_statistics=True) if args.as_published and 'lenet' not in args.arch else None
    rows = []
    for seed in args.seeds:
        for method in METHODS:
            keep = sorted({*epochs, args.epochs})
            trained = common.train_model(args, data, method, seed, device, build=builder, extra=extra, keep=keep)
            rows += trained['history']
            common.write_metrics(folder / 'metrics.csv', rows)
            name = f'{method}-s{seed}'
            results[f'history-{name}'] = trained['history']
            results[f'collapsed-{name}'] = trained['collapsed']
            for epoch in epochs:
                model = common.restore(trained, epoch, args, data, device, builder)
                found = common.measure(
                    results,
                    f'plane-{name}-e{epoch}',
                    lambda: measure_epoch(setting, model, method, seed, epoch),
                    folder,
                )
                common.log.info('  %s epoch %3d  %s', NAMES[method], epoch, _brief(found))
            common.measure(results, f'train-{name}', lambda: training_measures(setting, model), folder)
            common.measure(results, f'scale-{name}', lambda: scale_control(setting, model, method, seed), folder)
            model = common.restore(trained, args.epochs, args, data, device, builder)
            common.measure(
                results, f'distortion-{name}', lambda: measure_distortions(setting, model, levels, method, seed), folder
            )
    common.measure(results, 'images', lambda: example_images(setting, levels), folder)
    return folder, common.finish(folder, results)


def _brief(found):
    """One line: logits of a measurement."""
    text = []
    for kind, name in KINDS.items():
        v = common.unpack(found[kind]['values'])[-1, :, 0]
        text.append(
            f'{name}: accuracy {common.unpack(found[kind]["accuracy"])[0]:.3f}, logits '
            f'I(T;X) {v[1]:.2f}-{v[0]:.2f}, I(T;Y) {v[4]:.2f}'
        )
    return '   '.join(text) + ' bits'


def example_images(setting, levels, count=4):
    """The first images of some classes at every level, for the figure."""
    y = setting.data.test[1]
    index = torch.stack([(y == k).nonzero()[0, 0] for k in y.unique()[:count]])
    x, _ = setting.images(index.cpu())
    return {
        name: [common.pack((distort(x, name, level) * 255).round().byte()) for level in at]
        for name, at in levels.items()
    }


# ---------------------------------------------------------------------------- reading results


def short(name):
    """'block1.0.relu1' -> 'block1'."""
    return name.removeprefix('model.').split('.')[0]


def plane(results, method, kind, what='values'):
    """(seeds, epochs, ...) of the measurements through training; their last axis, where it
    has 1 + REPLICATES entries, starts with the value itself."""
    found = [
        [results[f'plane-{method}-s{s}-e{e}'][kind] for e in results['epochs']] for s in results['config']['seeds']
    ]
    if what in ('values', 'unit', 'accuracy', 'loss'):
        return np.array([[common.unpack(m[what]) for m in row] for row in found], float)
    if what in ('ceiling', 'label_entropy'):
        return np.array([[m[what] for m in row] for row in found])
    return np.array(
        [[[layer[what] for layer in m['layers']] for m in row] for row in found],
        None if what == 'dimensions' else float,
    )  # None becomes nan


def distorted(results, method, kind, name, what):
    """(seeds, levels, ...) of the measurements under a distortion."""
    runs = [results[f'distortion-{method}-s{s}'][name] for s in results['config']['seeds']]
    return np.array(
        [[common.unpack(run[str(level)][kind][what]) for level in results['levels'][name]] for run in runs], float
    )


def interval(statistic, *arrays, seed=0):
    """(value, low, high) of a statistic of arrays (seeds, ..., 1 + REPLICATES): it sees means
    over the seeds, at the value and, for the 95 % interval, at each replicate; where there
    are two or more, seeds are resampled, too."""
    rng, seeds = np.random.default_rng(seed), len(arrays[0])
    draws = []
    for b in range(1 + REPLICATES):
        pick = rng.integers(seeds, size=seeds) if b and seeds > 1 else np.arange(seeds)
        draws.append(statistic(*(a[pick][..., b].mean(0) for a in arrays)))
    if not np.isfinite(draws).all():
        return (math.nan,) * 3
    low, high = np.percentile(draws[1:], (2.5, 97.5))
    return float(draws[0]), float(low), float(high)


def below_ceiling(results, method, kind):
    """(epochs, layers, QUANTITIES): is the estimate, or for I(T;Y) the I(T;X) beside it, more
    than MARGIN below the ceiling? If not, it is saturated and says nothing."""
    x = plane(results, method, kind)[..., :3, 0].mean(0)
    free = x < plane(results, method, kind, 'ceiling').mean(0)[:, None, None] - MARGIN
    return np.concatenate((free, free), 2)


def saturated(results, method, kind, layer):
    """Is I(T;X), lower bound, of a layer saturated at the last measured epoch?"""
    return not below_ceiling(results, method, kind)[-1, layer, QUANTITIES.index('x_lower')]


# -------------------------------------------------------------------------------- the figures

KIND_STYLE = {'clean': dict(ls='-', marker='o'), 'adv': dict(ls='--', marker='P')}


def draw(results, folder):
    """All figures, from results.json alone."""
    figure_training(results, folder)
    for number, method in zip((2, 3), METHODS):
        figure_plane(results, method, folder, f'fig{number}_plane_{method}')
    figure_layers(results, folder)
    figure_entropy(results, folder)
    figure_distortion(results, folder)
    figure_distortion_layers(results, folder)
    figure_images(results, folder)
    figure_scale(results, folder)
    figure_nulls(results, folder)
    figure_geometry(results, folder)


def epoch_colours(results):
    """One colour for each measured epoch, dark to light."""
    return colormaps['viridis'](np.linspace(0, 0.93, len(results['epochs'])))


def epoch_bar(figure, axes, results):
    """A colour bar that names the measured epochs."""
    n = len(results['epochs'])
    bar = figure.colorbar(
        ScalarMappable(BoundaryNorm(np.arange(n + 1) - 0.5, n), ListedColormap(epoch_colours(results))),
        ax=axes,
        ticks=range(0, n, max(1, n // 8)),
        aspect=40,
        pad=0.01,
    )
    bar.set_ticklabels([results['epochs'][i] for i in range(0, n, max(1, n // 8))])
    bar.set_label('epochs of training')


def figure_training(results, folder):
    fig, axes = common.new_figure(1, 2, 8.4, 3.1)
    for method in METHODS:
        colour, name = METHOD_COLOURS[method], NAMES[method]
        rows = [results[f'history-{method}-s{s}'] for s in results['config']['seeds']]
        epochs = [r['epoch'] for r in rows[0]]
        key = 'train_natural' if method == 'standard' else 'train_robust'
        label = f'{name}, training' + (' (PGD)' if method == 'pgd' else '')
        axes[0, 0].plot(
            epochs, np.mean([[r['loss'] for r in row] for row in rows], 0), ls=':', color=colour, label=label
        )
        axes[0, 1].plot(epochs, 100 * np.mean([[r[key] for r in row] for row in rows], 0), ls=':', color=colour)
        for kind, text in KINDS.items():
            for axis, what, unit in zip(axes[0], ('loss', 'accuracy'), (1, 100)):
                axis.plot(
                    results['epochs'],
                    unit * plane(results, method, kind, what)[..., 0].mean(0),
                    color=colour,
                    ms=4,
                    **KIND_STYLE[kind],
                    label=f'{name}, {text} test images',
                )
    axes[0, 0].set(yscale='log', ylabel='cross-entropy (nats)', xlabel='epoch', title='Loss')
    axes[0, 1].axhline(100 / len(results['classes']), color='0.6', ls=':', lw=1)
    axes[0, 1].set(ylabel='accuracy (%)', xlabel='epoch', ylim=(-3, 103), title='Accuracy (dotted grey: chance)')
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    common.save_figure(fig, folder, 'fig1_training')


def figure_plane(results, method, folder, name):
    layers, colours = results['layers'], epoch_colours(results)
    fig, axes = common.new_figure(3, len(layers), 1.9 * len(layers) + 1.2, 6.2, sharex=True, sharey=True)
    ceiling = plane(results, method, 'clean', 'ceiling')[0, -1]
    top = plane(results, method, 'clean', 'label_entropy')[0, -1]
    for r, (row, estimator) in enumerate(zip(axes, ESTIMATORS)):
        x, y = (QUANTITIES.index(f'{which}_{estimator}') for which in 'xy')
        for i, axis in enumerate(row):
            axis.axvline(ceiling, color='0.6', lw=1, ls=':')
            axis.axhline(top, color='0.6', lw=1, ls=':')
            for kind in KINDS:
                values = plane(results, method, kind)[..., 0].mean(0)[:, i]
                axis.plot(values[:, x], values[:, y], color='0.7', lw=0.6, zorder=1)
                axis.scatter(
                    values[:, x],
                    values[:, y],
                    c=colours,
                    zorder=2,
                    **dict(s=18) if kind == 'clean' else dict(s=60, marker='+'),
                )
            moving = np.concatenate([plane(results, method, kind)[..., 0].mean(0)[1:, i][:, [x, y]] for kind in KINDS])
            crowded = MARGIN < np.ptp(moving[:, 0]) < 0.3 * ceiling
            if crowded and moving[:, 1].min() > 0.75 * top:  # and not below the inset
                zoom = axis.inset_axes((0.2, 0.12, 0.62, 0.55))  # all but the initial network
                for kind, style in (('clean', dict(s=8)), ('adv', dict(s=26, marker='+'))):
                    values = plane(results, method, kind)[..., 0].mean(0)[1:, i]
                    zoom.scatter(values[:, x], values[:, y], c=colours[1:], **style)
                zoom.tick_params(labelsize=5)
                zoom.ticklabel_format(useOffset=False)
            if r == 0:
                axis.set_title(f'{short(layers[i])}, D = {plane(results, method, "clean", "dimensions")[0, -1, i]}')
            axis.set(xlim=(-0.5, ceiling + 0.7), ylim=(-0.15, top + 0.25))
        row[0].set_ylabel(f'{ESTIMATORS[estimator]}\nI(T;Y) (bits)')
    for axis in axes[-1]:
        axis.set_xlabel('I(T;X) (bits)')
    epoch_bar(fig, axes, results)
    title = 'Normal training (NT)' if method == 'standard' else 'Adversarial training (AT)'
    fig.suptitle(
        f'{title}: information plane of each layer, {results["samples"]} test images. '
        'Circles: natural,\ncrosses: adversarial. Dotted: the ceilings log2 N and H(Y)'
        ', which any layer reaches\nwhose outputs lie far apart; insets: the same '
        'without the initial network'
    )
    common.save_figure(fig, folder, name)


def figure_layers(results, folder):
    layers, colours = results['layers'], epoch_colours(results)
    fig, axes = common.new_figure(2, 3, 11.5, 5.8, sharey='col')
    for row, method in zip(axes, METHODS):
        for axis, which in zip(row, 'xy'):
            q = QUANTITIES.index(f'{which}_lower')
            for kind in KINDS:
                values = plane(results, method, kind)[..., 0].mean(0)[:, :, q]
                for e, line in enumerate(values):
                    axis.plot(range(len(layers)), line, color=colours[e], ms=4, lw=1, **KIND_STYLE[kind])
            limit = plane(results, method, 'clean', 'ceiling' if which == 'x' else 'label_entropy')[0, -1]
            axis.axhline(limit, color='0.6', lw=1, ls=':')
            axis.set(ylim=(-0.03 * limit, 1.06 * limit), ylabel=f'{NAMES[method]}: I(T;{which.upper()}) (bits)')
            axis.set_xticks(range(len(layers)), map(short, layers))
        for kind in KINDS:
            x, y, null = plane(results, method, kind, 'unit')[..., 0].mean(0).T
            row[2].plot(x, y, color='0.7', lw=0.6, zorder=1)
            row[2].scatter(x, y, c=colours, s=26, zorder=2, marker=KIND_STYLE[kind]['marker'])
            row[2].scatter(x, null, s=12, color='0.6', marker=KIND_STYLE[kind]['marker'])
        row[2].set(xlabel='I(T;X) (bits)', ylabel='I(T;Y) (bits)')
        row[2].axhline(limit, color='0.6', lw=1, ls=':')
    axes[0, 0].set_title('Input information of each layer')
    axes[0, 1].set_title('Label information of each layer')
    axes[0, 2].set_title('Plane of the logits at unit RMS\n(grey: labels permuted)')
    epoch_bar(fig, axes, results)
    fig.suptitle(
        'Information through training, KDE lower bound. Solid, circles: natural images; '
        'dashed, crosses: adversarial.\nDotted: ceiling'
    )
    common.save_figure(fig, folder, 'fig4_layers')


def figure_entropy(results, folder):
    layers, classes = results['layers'], results['classes']
    fig, axes = common.new_figure(4, len(layers), 1.9 * len(layers) + 0.8, 7.2, sharex=True, sharey=True)
    places = range(len(results['epochs']))  # the early epochs have as much room as the late
    for r, (method, kind) in enumerate((m, k) for m in METHODS for k in KINDS):
        row = axes[r]
        values = plane(results, method, kind, 'entropy').mean(0)
        sizes = plane(results, method, kind, 'dimensions')[0, -1]
        for i, axis in enumerate(row):
            noise = noise_entropy(sizes[i], results['config']['variance'])
            for k in range(min(len(classes), 10)):
                axis.plot(
                    places,
                    values[:, i, 1 + k] - noise,
                    lw=0.8,
                    alpha=0.8,
                    color=colormaps['tab10'](k),
                    label=f'{classes[k]}' if r == i == 0 else None,
                )
            axis.plot(places, values[:, i, 0] - noise, color='k', lw=2, label='all images' if r == i == 0 else None)
            if r == 0:
                axis.set_title(f'{short(layers[i])}\nH(noise) = {noise:.1f}')
            axis.set_xticks(list(places)[:: max(1, len(places) // 4)], results['epochs'][:: max(1, len(places) // 4)])
        row[0].set_ylabel(f'{NAMES[method]}, {KINDS[kind]}\nH - H(noise) (bits)')
    for axis in axes[-1]:
        axis.set_xlabel('epoch')
    fig.legend(loc='outside lower center', ncols=6)
    fig.suptitle(
        'Entropy of each layer, all images (black) and each class'
        + (' (the first ten)' if len(classes) > 10 else '')
        + ', KDE lower bound'
    )
    common.save_figure(fig, folder, 'fig5_entropy')


def _level_axis(axis, name, levels):
    axis.set_xticks(
        range(len(levels)),
        ['none' if i == 0 else f'{v}' if name == 'saturation' else f'{v}x{v}' for i, v in enumerate(levels)],
    )
    axis.set_xlabel('saturation level p' if name == 'saturation' else 'shuffled patches')


def figure_distortion(results, folder):
    fig, axes = common.new_figure(3, 4, 11.5, 7.2)
    for half, name in enumerate(results['levels']):
        levels = results['levels'][name]
        panels = (
            ('loss', axes[0, 2 * half], 'cross-entropy (nats)'),
            ('accuracy', axes[0, 2 * half + 1], 'accuracy (%)'),
            ('x', axes[1, 2 * half], 'logits: I(T;X) (bits)'),
            ('y', axes[1, 2 * half + 1], 'logits: I(T;Y) (bits)'),
            ('unit x', axes[2, 2 * half], 'at unit RMS: I(T;X)'),
            ('unit y', axes[2, 2 * half + 1], 'at unit RMS: I(T;Y)'),
        )
        for what, axis, label in panels:
            for method in METHODS:
                for kind in KINDS:
                    if 'unit' in what:
                        value = distorted(results, method, kind, name, 'unit')[:, :, 'xy'.index(what[-1])]
                    elif what in 'xy':
                        value = distorted(results, method, kind, name, 'values')[
                            :, :, -1, QUANTITIES.index(f'{what}_lower'), :
                        ]
                    else:
                        value = distorted(results, method, kind, name, what)
                    value = value.mean(0) * (100 if what == 'accuracy' else 1)
                    low, high = np.percentile(value[:, 1:], (2.5, 97.5), axis=1)
                    axis.fill_between(range(len(levels)), low, high, alpha=0.15, lw=0, color=METHOD_COLOURS[method])
                    axis.plot(
                        range(len(levels)),
                        value[:, 0],
                        ms=4,
                        **KIND_STYLE[kind],
                        color=METHOD_COLOURS[method],
                        label=f'{NAMES[method]}, {KINDS[kind]}',
                    )
            _level_axis(axis, name, levels)
            axis.set_ylabel(label)
        axes[0, 2 * half].set_yscale('log')
        axes[0, 2 * half + 1].set_ylim(-3, 103)
        axes[0, 2 * half + 1].axhline(100 / len(results['classes']), color='0.6', ls=':', lw=1)
    axes[0, 0].set_title('Saturation: texture goes, outlines stay', loc='left')
    axes[0, 2].set_title('Patch-shuffle: shape goes, texture stays', loc='left')
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=4)
    fig.suptitle(
        'Networks on distorted images (attacked first, distorted second); information '
        'of the logits\nby the KDE lower bound, as they are and scaled to unit RMS; '
        'bands: 95 % over images; dotted: chance'
    )
    common.save_figure(fig, folder, 'fig6_distortion')


def figure_distortion_layers(results, folder):
    layers = results['layers']
    fig, axes = common.new_figure(4, len(layers), 1.9 * len(layers) + 0.8, 7.6, sharey='row')
    rows = [(name, what) for name in results['levels'] for what in 'xy']
    for r, (row, (name, what)) in enumerate(zip(axes, rows)):
        levels, q = results['levels'][name], QUANTITIES.index(f'{what}_lower')
        for method in METHODS:
            for kind in KINDS:
                values = distorted(results, method, kind, name, 'values')[..., q, 0].mean(0)
                for i, axis in enumerate(row):
                    axis.plot(
                        range(len(levels)),
                        values[:, i],
                        ms=3.5,
                        **KIND_STYLE[kind],
                        color=METHOD_COLOURS[method],
                        label=f'{NAMES[method]}, {KINDS[kind]}' if r == i == 0 else None,
                    )
        for i, axis in enumerate(row):
            _level_axis(axis, name, levels)
            if r == 0:
                axis.set_title(short(layers[i]))
        top = plane(results, 'pgd', 'clean', 'ceiling' if what == 'x' else 'label_entropy')[0, -1]
        for axis in row:
            axis.axhline(top, color='0.6', lw=1, ls=':')
        row[0].set_ylim(min(row[0].get_ylim()[0], top - 0.1), None)  # no zoom into nothing
        row[0].set_ylabel(f'{name}\nI(T;{what.upper()}) (bits)')
    fig.legend(loc='outside lower center', ncols=4)
    fig.suptitle(
        'Information in every layer under distortion, KDE lower bound; lines on top of '
        'each other are at the ceiling (dotted)'
    )
    common.save_figure(fig, folder, 'fig7_distortion_layers')


def figure_images(results, folder):
    images, levels = results['images'], results['levels']
    rows = [(name, i) for name in levels for i in range(len(levels[name]))]
    count = images['saturation'][0]['shape'][0]
    fig, axes = common.new_figure(count, len(rows), 1.05 * len(rows), 1.25 * count)
    for column, (name, i) in enumerate(rows):
        shown = common.unpack(images[name][i]) / 255
        for axis, image in zip(axes[:, column], shown):
            text = ('p = {}' if name == 'saturation' else '{0} x {0}').format(levels[name][i])
            common.show_image(axis, image, ('none' if i == 0 else text) if axis is axes[0, column] else '')
    fig.suptitle('Saturation levels (left) and patch-shuffle (right)')
    common.save_figure(fig, folder, 'fig8_images')


def figure_scale(results, folder):
    layers, seeds = results['layers'], results['config']['seeds']
    fig, axes = common.new_figure(2, 3, 9.6, 5.4, sharey='row', sharex=True)
    for column, method in enumerate(METHODS):
        runs = [results[f'scale-{method}-s{s}'] for s in seeds]
        curves = np.mean([r['curves'] for r in runs], 0)  # (L, X or Y, upper or lower, V)
        rms = np.mean([r['rms'] for r in runs])
        for which, row in enumerate(axes):
            for i, layer in enumerate(layers):
                (line,) = row[column].plot(CURVE, curves[i, which, 1], marker='o', ms=3, label=short(layer))
                row[column].plot(CURVE, curves[i, which, 0], ls=':', lw=1, color=line.get_color())
            row[column].set(
                xscale='log',
                ylabel=f'I(T;{"XY"[which]}) (bits)',
                title=f'{NAMES[method]}, every layer' if which == 0 else '',
            )
            row[2].plot(
                CURVE,
                curves[-1, which, 1],
                color=METHOD_COLOURS[method],
                marker='o',
                ms=3,
                label=f'{NAMES[method]}, as they are',
            )
            row[2].plot(
                np.array(CURVE) / rms**2,
                curves[-1, which, 1],
                ls='--',
                lw=1,
                color=METHOD_COLOURS[method],
                label=f'{NAMES[method]}, unit RMS (was {rms:.1f})',
            )
    for axis in axes.flat:
        axis.axvline(results['config']['variance'], color='0.6', lw=1, ls=':')
    axes[0, 2].set_title('logits, also at unit RMS')
    for axis in axes[1]:
        axis.set_xlabel('variance of the noise')
    handles = [axis.get_legend_handles_labels() for axis in (axes[0, 0], axes[0, 2])]
    fig.legend(*(a + b for a, b in zip(*handles)), loc='outside lower center', ncols=5)
    fig.suptitle(
        'Information against the noise, natural images. Solid: lower bound, dotted: '
        f'upper bound.\nGrey: the usual variance, {results["config"]["variance"]:g}'
    )
    common.save_figure(fig, folder, 'fig9_scale')


def figure_nulls(results, folder):
    layers = results['layers']
    fig, axes = common.new_figure(2, 2, 9.0, 5.4, sharey='row')
    place = np.arange(len(layers))
    for column, method in enumerate(METHODS):
        clean, adv = (plane(results, method, kind)[..., 0].mean(0) for kind in KINDS)
        x, y = QUANTITIES.index('x_lower'), QUANTITIES.index('y_lower')
        null = plane(results, method, 'clean', 'null')[:, -1, :, 1].mean(0)
        top, bottom = axes[:, column]
        for shift, values, text, colour in (
            (-0.25, clean[0, :, x], 'initial network', '0.7'),
            (0, clean[-1, :, x], 'natural', '#0072B2'),
            (0.25, adv[-1, :, x], 'adversarial', '#D55E00'),
        ):
            top.bar(place + shift, values, 0.22, color=colour, label=text)
        top.axhline(
            plane(results, method, 'clean', 'ceiling')[0, -1],
            color='k',
            ls=':',
            lw=1,
            label='ceiling, with repeated images' if results['config']['as_published'] else 'ceiling log2 N',
        )
        for shift, values, text, colour in (
            (-0.25, null, 'labels permuted', '0.7'),
            (0, clean[-1, :, y], 'natural', '#0072B2'),
            (0.25, adv[-1, :, y], 'adversarial', '#D55E00'),
        ):
            bottom.bar(place + shift, values, 0.22, color=colour, label=text)
        bottom.axhline(
            plane(results, method, 'clean', 'label_entropy')[0, -1], color='k', ls=':', lw=1, label='ceiling H(Y)'
        )
        top.set(title=f'{NAMES[method]}: I(T;X)', ylabel='bits')
        bottom.set(title=f'{NAMES[method]}: I(T;Y)', ylabel='bits')
        for axis in (top, bottom):
            axis.set_xticks(place, map(short, layers))
            axis.grid(axis='x', visible=False)
            axis.set_ylim(0, axis.get_ylim()[1] * 1.25)
            axis.legend(ncols=2, loc='upper center')
    fig.suptitle(
        'What is left beside the ceiling and the null, KDE lower bound. A layer that '
        'reaches the ceiling\nuntrained, and with permuted labels, says nothing about '
        'training'
    )
    common.save_figure(fig, folder, 'fig10_nulls')


def figure_geometry(results, folder):
    fig, axes = common.new_figure(1, 2, 8.6, 3.6)
    pairs = (
        ('x_lower', 'log_nearest', 'I(T;X), KDE lower (bits)', 'distance of the nearest neighbour (mean log2)'),
        ('y_lower', 'ratio', 'I(T;Y), KDE lower (bits)', 'distance between classes / within a class'),
    )
    for axis, (quantity, geometry, ylabel, xlabel) in zip(axes[0], pairs):
        for method, marker in zip(METHODS, 'os'):
            for i, layer in enumerate(results['layers']):
                for kind in KINDS:
                    values = plane(results, method, kind)[..., QUANTITIES.index(quantity), 0]
                    where = plane(results, method, kind, geometry)
                    label = f'{short(layer)}, {NAMES[method]}' if kind == 'clean' else None
                    axis.plot(
                        where[:, :, i].ravel(),
                        values[:, :, i].ravel(),
                        ls='',
                        marker=marker,
                        ms=4,
                        color=f'C{i}',
                        alpha=0.7,
                        mfc=f'C{i}' if kind == 'clean' else 'none',
                        label=label,
                    )
        axis.set(xlabel=xlabel, ylabel=ylabel)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside right center')
    fig.suptitle('The estimates follow the geometry of the outputs: every layer and epoch; hollow: adversarial images')
    common.save_figure(fig, folder, 'fig11_geometry')


# -------------------------------------------------------------------------------- the claims

PAPER = 'Zhang et al. 2022'
EXCESS = 'logits scaled to unit RMS, less its value for permuted labels'
SLIDES = "authors' pre-publication run, 100 epochs, digitised from slides, +-0.03 bit"


def judge(results, folder):
    """The claims table, from results.json alone."""
    config, claims = results['config'], []
    broken = {m: 'collapsed to one class' for m in METHODS for s in config['seeds'] if results[f'collapsed-{m}-s{s}']}
    for m in METHODS:
        accuracy = plane(results, m, 'clean', 'accuracy')[:, -1, 0].min()
        if m not in broken and accuracy < CHANCE / len(results['classes']):
            broken[m] = f'near chance, {100 * accuracy:.0f} %'
    slides = config['dataset'] == 'cifar10' and config['arch'] == 'wrn-10-1'

    def add(
        text,
        source,
        found,
        verdict=None,
        *,
        threshold=0.0,
        unit='bits',
        involved=METHODS,
        reference=None,
        why=None,
        detail=None,
    ):
        """found: (value, low, high); why: what makes the claim uninformative, if anything."""
        value, low, high = found
        scale, digits = (100, 1) if unit in ('points', '%') else (1, 3)
        verdict = verdict or effect_verdict(low, high, threshold)
        if not np.isfinite(found).all():
            why = why or 'not defined here'
        if broken.keys() & set(involved):
            why = '; '.join(f'{NAMES[m]} {broken[m]}' for m in broken if m in involved)
        sign = '+' if threshold == 0 else ''
        text_value = ' '.join(f'{scale * v:{sign}.{digits}f}' for v in (value, low, high))
        value, low, high = text_value.split()
        measured = f'{value} {unit} [{low}, {high}]'.replace('  ', ' ')
        claims.append(
            claim(
                text,
                source,
                measured + (f'; {detail}' if detail else ''),
                f'uninformative: {why}' if why else verdict,
                f'{reference} ({SLIDES})' if reference and slides else '-',
            )
        )

    trend_claims(results, add)
    difficulty_claims(results, add)
    extent_claims(results, claims, add, bool(broken))
    distortion_claims(results, add)
    fooled_claims(results, add)
    geometry_claims(results, claims, add)
    saturation_claims(results, claims)
    common.write_claims(claims, folder)
    return claims


def unlabelled(results, *pairs):
    """Why a claim about I(T;Y) of the logits is uninformative, or None: permuted labels give
    as much, to MARGIN bit."""
    names, row = [], QUANTITIES.index('y_lower')
    for method, kind in pairs:
        value = plane(results, method, kind)[:, -1, -1, row, 0].mean()
        if value - plane(results, method, kind, 'null')[:, -1, -1, 1].mean() < MARGIN:
            names.append(f'{NAMES[method]} {KINDS[kind]}')
    return f'permuted labels give as much, to {MARGIN} bit: {", ".join(names)}' if names else None


def trend_claims(results, add):
    """V1, and what its correlations are worth."""

    def common_points(a, b):
        """{(layer, quantity): epochs} where neither series is saturated and both move."""
        free = below_ceiling(results, *a) & below_ceiling(results, *b)
        values = [plane(results, *key)[..., 0].mean(0) for key in (a, b)]
        found = {}
        for i, q in np.ndindex(free.shape[1:]):
            epochs = np.flatnonzero(free[:, i, q])
            if len(epochs) >= TREND_EPOCHS and all(np.ptp(v[epochs, i, q]) > MARGIN for v in values):
                found[i, q] = epochs
        return found

    def add_trend(text, source, a, b, involved, decide):
        points = common_points(a, b)

        def median(u, v):
            return np.median([common.rank_correlation(u[e, i, q], v[e, i, q]) for (i, q), e in points.items()])

        found = interval(median, *(plane(results, *key) for key in (a, b))) if points else (math.nan,) * 3
        names = {}
        for i, q in points:
            names.setdefault(short(results['layers'][i]), []).append(QUANTITIES[q])
        add(
            text,
            source,
            found,
            decide(*found),
            threshold=TREND,
            unit='',
            involved=involved,
            detail='; '.join(f"{k}: {', '.join(v)}" for k, v in names.items()),
            why=None if points else f'nothing stays below its ceiling for {TREND_EPOCHS} epochs',
        )

    for method in METHODS:
        add_trend(
            'V1 Through training, information on natural and adversarial images moves alike in '
            f'{NAMES[method]}: median rank correlation, over what is below its ceiling, is at '
            f'least {TREND}',
            PAPER,
            (method, 'clean'),
            (method, 'adv'),
            (method,),
            lambda value, low, high: (
                'supported'
                if value >= TREND and low > TREND_LOW
                else 'contradicted'
                if high < TREND
                else 'inconclusive'
            ),
        )
    add_trend(
        'V1 Control: so much is more than any two trainings have in common: the same between NT '
        f'and AT on natural images stays below {TREND}',
        'control',
        ('standard', 'clean'),
        ('pgd', 'clean'),
        METHODS,
        lambda value, low, high: effect_verdict(-high, -low, -TREND),
    )


def difficulty_claims(results, add):
    """V2a: AT is the harder task."""
    seeds = results['config']['seeds']
    if all(results[f'train-{m}-s{s}'] for m in METHODS for s in seeds):
        nt, at = (
            np.array([common.unpack(results[f'train-{m}-s{s}']) for s in seeds], float) for m in METHODS
        )  # (seeds, natural or attacked, loss or accuracy, ...)
        add(
            'V2a AT is harder: loss on training images, those of AT attacked, AT minus NT',
            PAPER,
            interval(np.subtract, at[:, 1, 0], nt[:, 0, 0]),
            unit='nats',
            reference='1.61 and 0.25',
        )
        add(
            'V2a AT is harder: accuracy on training images, those of AT attacked, NT minus AT',
            PAPER,
            interval(np.subtract, nt[:, 0, 1], at[:, 1, 1]),
            unit='points',
            reference='88.7 % and 39.0 %',
        )
        add(
            'V2a Control: accuracy on natural training images, NT minus AT',
            'control',
            interval(np.subtract, nt[:, 0, 1], at[:, 0, 1]),
            unit='points',
        )
    accuracy = [plane(results, m, 'clean', 'accuracy')[:, -1] for m in METHODS]
    add(
        'V2a AT is harder: accuracy on natural test images, NT minus AT',
        PAPER,
        interval(np.subtract, *accuracy),
        unit='points',
        reference='82-83 % and 61-64 %',
    )


def extent_claims(results, claims, add, broken):
    """V2b to V2d: AT extracts less information, also apart from the scale of its logits."""

    def logits(method, kind, quantity):
        return plane(results, method, kind)[:, -1, -1, QUANTITIES.index(quantity)]

    def null(method, kind):
        return plane(results, method, kind, 'null')[:, -1, -1, 1].mean()

    nt, at = (logits(m, 'clean', 'x_lower') for m in METHODS)
    full = ' and '.join(NAMES[m] for m in METHODS if saturated(results, m, 'clean', -1))
    add(
        'V2b AT extracts less information from the image: logits, I(T;X) lower bound, natural images, NT minus AT',
        PAPER,
        interval(np.subtract, nt, at),
        why=f'{full} within {MARGIN} bit of the ceiling' if full else None,
        reference='+1.75: 12.12 and 10.37',
        detail=f'{nt[:, 0].mean():.2f} and {at[:, 0].mean():.2f}, ceiling '
        f'{plane(results, "pgd", "clean", "ceiling")[0, -1]:.2f}',
    )
    scale = {m: [results[f'scale-{m}-s{s}'] for s in results['config']['seeds']] for m in METHODS}
    unit = {m: plane(results, m, 'clean', 'unit')[:, -1] for m in METHODS}
    add(
        'V2c The same with logits scaled to unit RMS (if not, V2b is one of scale)',
        'control',
        interval(np.subtract, *(unit[m][:, 0] for m in METHODS)),
    )
    relative = [np.array([common.unpack(r['relative']) for r in scale[m]], float) for m in METHODS]
    add(
        'V2c The same with noise in proportion to the variance of the logits',
        'control',
        interval(np.subtract, *relative),
    )
    curve = [np.array([common.unpack(r['logits']) for r in scale[m]], float) for m in METHODS]
    ceiling = min(plane(results, m, 'clean', 'ceiling')[0, -1] for m in METHODS)
    open_ = [v for v in range(len(CURVE)) if all(c[:, v, 0].mean() < ceiling - MARGIN for c in curve)]
    signs = {f'{CURVE[v]:.2g}': interval(np.subtract, *(c[:, v] for c in curve)) for v in open_}
    above = [v for v, s in signs.items() if s[1] > 0]
    below = [v for v, s in signs.items() if s[2] < 0]
    claims.append(
        claim(
            'V2c The same, at every variance of the noise from 0.0016 to 102 at which neither is at the ceiling',
            'control',
            f"NT higher at {', '.join(above) or 'none'}; AT higher at {', '.join(below) or 'none'} "
            f"of {', '.join(signs) or 'none'}",
            'uninformative: collapsed or near chance'
            if broken
            else 'uninformative: all at the ceiling'
            if not signs
            else 'contradicted'
            if below
            else 'supported'
            if len(above) == len(signs)
            else 'inconclusive',
        )
    )
    pairs = (('standard', 'clean'), ('pgd', 'clean'), ('pgd', 'adv'))
    for text, i, j, value in (
        (
            'AT holds less label information: logits, I(T;Y) lower bound, natural images, NT minus AT',
            0,
            1,
            '+0.71: 3.31 and 2.60',
        ),
        ('and on adversarial images still less: AT natural minus AT adversarial', 1, 2, '+0.31: 2.60 and 2.29'),
    ):
        add(
            f'V2d {text}',
            PAPER,
            interval(np.subtract, logits(*pairs[i], 'y_lower'), logits(*pairs[j], 'y_lower')),
            reference=value,
            why=unlabelled(results, pairs[i], pairs[j]),
            detail=' and '.join(
                f'{logits(*p, "y_lower")[:, 0].mean():.2f} ({null(*p):.2f} with permuted labels)'
                for p in (pairs[i], pairs[j])
            ),
        )
        unit = [plane(results, m, k, 'unit')[:, -1] for m, k in (pairs[i], pairs[j])]
        add(f'V2d The same, {EXCESS}', 'control', interval(np.subtract, *(u[:, 1] - u[:, 2] for u in unit)))


def distortion_claims(results, add):
    """V3: NT leans on texture, AT on shape."""

    def area(values):
        return (values[1:] / values[0]).mean() if values[0] > 0 else math.nan

    for name, number, claimed, first in (
        ('saturation', 'ac', 'AT resists saturation better', 'pgd'),
        ('patches', 'bd', 'NT resists patch-shuffle better', 'standard'),
    ):
        other = METHODS[first == 'standard']
        pair = [(m, 'clean') for m in (first, other)]
        for letter, what, text, unit in (
            (number[0], 'accuracy', 'accuracy', 'points'),
            (number[1], 'values', 'I(T;Y) of the logits, lower bound,', ''),
            (number[1], 'unit', f'I(T;Y), {EXCESS},', ''),
        ):
            series = [distorted(results, m, 'clean', name, what) for m, _ in pair]
            if what == 'values':
                series = [v[:, :, -1, QUANTITIES.index('y_lower')] for v in series]
            elif what == 'unit':
                series = [v[:, :, 1] - v[:, :, 2] for v in series]
            add(
                f'V3{letter} {claimed}: {text} relative to that without distortion, mean over '
                f'levels, {NAMES[first]} minus {NAMES[other]}',
                'control' if what == 'unit' else PAPER,
                interval(lambda a, b: area(a) - area(b), *series),
                unit=unit,
                why=unlabelled(results, *pair) if what == 'values' else None,
            )


def fooled_claims(results, add):
    """V4 and V5: what adversarial images carry, for NT."""
    runs, kept, default, fooled = [results[f'distortion-standard-s{s}'] for s in results['config']['seeds']], [], [], []
    for run in runs:
        adv, clean = {}, {}
        for name, levels in results['levels'].items():
            guesses = {kind: [common.unpack(run[name][str(v)][kind]['predicted']) for v in levels] for kind in KINDS}
            wrong = guesses['adv'][0]
            adv[name] = np.mean([g == wrong for g in guesses['adv'][1:]], 0)
            clean[name] = np.mean([g == wrong for g in guesses['clean'][1:]], 0)
        label = common.unpack(run['patches']['0']['adv']['label'])
        fooled.append((wrong != label).astype(float))
        kept.append(adv['patches'] - adv['saturation'])
        default.append(clean['patches'] - clean['saturation'])

    def mean(share, counts):
        return (share * counts).sum() / counts.sum() if counts.sum() else math.nan

    add(
        'V4 Adversarial images carry the texture of other classes: of those that fool NT, the '
        'share still taken for the wrong class after patch-shuffle minus after saturation',
        PAPER,
        common.bootstrap(mean, np.array(kept), np.array(fooled)),
        unit='points',
        involved=('standard',),
    )
    if not results['config']['as_published']:  # else clean and adv are different images
        add(
            'V4 Control: beyond the share of the same images, distorted alike but not attacked, '
            'that are taken for that class',
            'control',
            common.bootstrap(mean, np.array(kept) - np.array(default), np.array(fooled)),
            unit='points',
            involved=('standard',),
        )

    accuracy = interval(lambda a: a, plane(results, 'standard', 'adv', 'accuracy')[:, -1])
    limit = plane(results, 'standard', 'adv', 'label_entropy')[0, -1]
    why = f'accuracy is {100 * accuracy[0]:.1f} %, above {100 * FOOLED:.0f} %' if accuracy[0] > FOOLED else None
    upper = plane(results, 'standard', 'adv')[:, -1, -1, QUANTITIES.index('y_upper')]
    unit = plane(results, 'standard', 'adv', 'unit')[:, -1]
    null = plane(results, 'standard', 'adv', 'null')[:, -1, -1, 0].mean()
    as_much = f'permuted labels keep {100 * null / limit:.0f} %, too' if null >= STAYS * limit else None
    text = (
        f'V5 Information stays although the labels flip: on adversarial images, where NT has '
        f'{100 * accuracy[0]:.1f} % accuracy, I(T;Y) of the logits, {{}}, is at least '
        f'{100 * STAYS:.0f} % of H(Y)'
    )
    add(
        text.format('upper bound'),
        PAPER,
        interval(lambda a: a / limit, upper),
        threshold=STAYS,
        unit='%',
        involved=('standard',),
        why=why or as_much,
        reference='3.31 of 3.32 bits at 2 % accuracy',
    )
    add(
        text.format('lower bound, ' + EXCESS),
        'control',
        interval(lambda a: a / limit, unit[:, 1] - unit[:, 2]),
        threshold=STAYS,
        unit='%',
        involved=('standard',),
        why=why,
    )


def geometry_claims(results, claims, add):
    """V6: the estimators describe the geometry of the outputs."""
    worst = max(results[f'scale-{m}-s{s}']['cells'] for m in METHODS for s in results['config']['seeds'])
    claims.append(
        claim(
            'V6 The binned I(T;X) is the entropy of repeated rows of cells, to 1e-9 bits',
            PAPER,
            f'differs by {worst:.1g} bits',
            'supported' if worst < 1e-9 else 'contradicted',
        )
    )
    for quantity, geometry, text in (
        ('x_lower', 'log_nearest', 'I(T;X), lower bound, follows the distance of the nearest neighbour'),
        ('y_lower', 'ratio', 'I(T;Y), lower bound, follows the ratio of distances between and within classes'),
    ):
        q, values, where = QUANTITIES.index(quantity), [], []
        for method in METHODS:
            for kind in KINDS:
                free = below_ceiling(results, method, kind)[..., q]
                free[0] &= method == 'standard'  # AT starts from the same network
                values.append(plane(results, method, kind)[..., q, 0].mean(0)[free])
                where.append(plane(results, method, kind, geometry).mean(0)[free])
        values, where = np.concatenate(values), np.concatenate(where)
        enough = len(values) >= 10
        found = (
            common.bootstrap(lambda a, b: common.rank_correlation(a[0], b[0]), values, where)
            if enough
            else (math.nan,) * 3
        )
        add(
            f'V6 {text}: rank correlation over the {len(values)} layers and epochs below the '
            f'ceiling is at least {GEOMETRY} (interval: over them)',
            PAPER,
            found,
            threshold=GEOMETRY,
            unit='',
            why=None if enough else 'fewer than ten',
        )


def saturation_claims(results, claims):
    """V7, V8 and the referee: what the estimates can say at all."""
    x, layers = QUANTITIES.index('x_lower'), results['layers'][:-1]
    gaps = {}
    for text, method, epoch in (('initial', 'standard', 0), ('NT', 'standard', -1), ('AT', 'pgd', -1)):
        values = plane(results, method, 'clean')[:, epoch, :-1, x, 0].mean(0)
        for i, gap in enumerate(plane(results, method, 'clean', 'ceiling')[0, epoch] - values):
            gaps[f'{short(layers[i])} {text}'] = gap
    free = [f'{name} {gap:.2f}' for name, gap in gaps.items() if gap > MARGIN]
    claims.append(
        claim(
            f'V7 Inner layers are saturated, untrained and trained: I(T;X), lower bound, is within '
            f'{MARGIN} bit of the ceiling, so that their curves say nothing',
            'control',
            f'{len(gaps) - len(free)} of {len(gaps)} layers and networks are; bits below it: '
            + (', '.join(free) or 'none'),
            'contradicted' if free else 'supported',
        )
    )
    excess = {}
    for method in METHODS:
        for i, name in enumerate(results['layers']):
            y = plane(results, method, 'clean')[:, -1, i, QUANTITIES.index('y_lower'), 0].mean()
            null = plane(results, method, 'clean', 'null')[:, -1, i, 1].mean()
            excess[f'{NAMES[method]} {short(name)}'] = y - null
    claims.append(
        claim(
            f'V8 Every layer knows more of the labels than of permuted ones, by {MARGIN} bit',
            'control',
            ', '.join(f'{k} {v:+.2f}' for k, v in excess.items()),
            'supported' if min(excess.values()) > MARGIN else 'contradicted',
        )
    )
    text, inside = [], True
    for method in METHODS:
        for run in (results[f'scale-{method}-s{s}'] for s in results['config']['seeds']):
            lower, upper = run['bounds']
            middle, error = run['referee'][0], 3 * run['referee_error'][0]
            inside &= lower - error <= middle <= upper + error
            text.append(f'{NAMES[method]} {lower:.2f} < {middle:.2f} < {upper:.2f}')
    claims.append(
        claim(
            'The Monte-Carlo referee lies between the bounds of I(T;X) of the logits',
            'control',
            '; '.join(text) + ' bits',
            'supported' if inside else 'contradicted',
        )
    )


# --------------------------------------------------------------------------------------------


def print_table(results):
    """Every layer at the last measured epoch: value, ceiling and null side by side."""
    epoch = results['epochs'][-1]
    common.log.info(
        '\nAfter epoch %d, %d images, in bits. "certified": no two images are near '
        'enough to matter; null, excess: of the lower bound',
        epoch,
        results['samples'],
    )
    common.log.info(
        '%-5s%-12s%-9s%8s  %21s%9s  %21s%8s%8s%8s  %15s',
        '',
        'images',
        'layer',
        'D',
        'I(T;X) up / low / bin',
        'ceiling',
        'I(T;Y) up / low / bin',
        'H(Y)',
        'null',
        'excess',
        'valid bracket',
    )
    for method in METHODS:
        for kind, text in KINDS.items():
            run = results[f"plane-{method}-s{results['config']['seeds'][0]}-e{epoch}"][kind]
            values = common.unpack(run['values'])[..., 0]
            for i, name in enumerate(results['layers']):
                layer, v = run['layers'][i], values[i]
                flag = 'certified' if layer['certified'] else 'saturated' if v[1] >= run['ceiling'] - MARGIN else ''
                common.log.info(
                    '%-5s%-12s%-9s%8d  %6.2f %6.2f %6.2f %9.2f  %6.2f %6.2f %6.2f %8.2f%8.2f%8.2f  %6.2f - %6.2f  %s',
                    NAMES[method],
                    text,
                    short(name),
                    layer['dimensions'],
                    *v[:3],
                    run['ceiling'],
                    *v[3:],
                    run['label_entropy'],
                    layer['null'][1],
                    v[4] - layer['null'][1],
                    *layer['bracket'],
                    flag,
                )


def make_parser(published=False):
    """The flags; as published some have other defaults."""
    defaults = {
        name: values | (PUBLISHED | dict(test_size=0) if published and name != '*' else {})
        for name, values in DEFAULTS.items()
    }
    if published:
        defaults['shapes'] |= dict(test_size=3000)
    parser = common.make_parser(__doc__, defaults)
    add = parser.add_argument
    add(
        '--as-published',
        action='store_true',
        help="the authors' choices instead of ours, to see what difference they make",
    )
    add('--measured', type=common.whole, metavar='N', help='epochs that are measured, at equal ratios (20; 0: all)')
    add('--variance', type=common.positive, default=VARIANCE, metavar='X', help=f'of the noise ({VARIANCE})')
    add('--bin-width', type=common.positive, default=BIN_WIDTH, metavar='X', help=f'({BIN_WIDTH})')
    add('--test-steps', type=common.count, metavar='N', help='of PGD on the test images (7)')
    add('--test-step-size', type=common.positive, metavar='X', help='(eps / 4; mnist: 8/255)')
    return parser


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = common.parse(make_parser('--as-published' in argv), argv)
    folder, results = common.measured(args, study, 'mi_analysis')
    print_table(results)
    draw(results, folder)
    judge(results, folder)


if __name__ == '__main__':
    common.entry(main)
