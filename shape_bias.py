"""Shape or texture, and how simple: what adversarial training does to a CNN's features.

Question   Where outline and texture name different classes, does a robust network (R) decide for
           the outline more often than a standard one (S)? Are its features simpler?
Papers     Chen et al. 2020 (arXiv 2006.09373, protocols from the authors' code), Geirhos et al.
           2019 (cue conflicts), Bau et al. 2017 (dissection)
Usage      python shape_bias.py                                     shapes, minutes on a laptop
           python shape_bias.py --dataset cifar10 --ladder --cue-conflict-dir DIR
           python shape_bias.py --arch resnet50 --weights resnet50-0676ba61.pth \\
               --robust-weights resnet50_l2_eps3.ckpt --cue-conflict-dir DIR
           DIR: style-transfer-preprocessed-512 of github.com/rgeirhos/texture-vs-shape, beside it
           edges and filled-silhouettes; files of torchvision, DataParallel and robustness load

Expect     shapes, three seeds: shape bias .55 (S), .67 (4/255), .71 (R, 8/255); a texture bias of
           S is not seen; concepts, types of inputs and leaning inconclusive. 230 CPU s a seed.
"""
import argparse
import math
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import colors
from torch import nn

import common
from common import COLOURS, Claim, make_generator

# Outlines win more decisions the longer a network is trained: here 10 epochs, not 6.
DEFAULTS = {'*': dict(ladder=[0.25, 0.5]),
            'shapes': dict(epochs=10, test_size=1000, ladder=[0.5])}

# Geirhos et al. 2019: sixteen categories and their ImageNet classes.
SIXTEEN = {
    'airplane': [404], 'bear': [*range(294, 298)], 'bicycle': [444, 671],
    'bird': [8, *range(10, 17), *range(18, 21), *range(22, 25), *range(80, 84), *range(87, 97),
             *range(98, 101), *range(127, 134), *range(135, 146)],
    'boat': [472, 554, 625, 814, 914], 'bottle': [440, 720, 737, 898, 899, 901, 907],
    'car': [436, 511, 817], 'cat': [*range(281, 287)], 'chair': [423, 559, 765, 857],
    'clock': [409, 530, 892], 'dog': [
        *range(152, 192), *range(193, 204), *range(205, 227), *range(228, 242), *range(243, 251),
        *range(252, 258), 259, *range(261, 264), *range(265, 269)],
    'elephant': [385, 386], 'keyboard': [508, 878], 'knife': [499], 'oven': [766],
    'truck': [555, 569, 656, 675, 717, 734, 864, 867]}
ALIASES = {'automobile': 'car', 'ship': 'boat'}  # CIFAR-10's and STL-10's names

# Start of --arch, which is one of common.ARCHS: modules whose outputs are looked at. The authors
# take a ResNet's conv1 before batch norm and ReLU, AlexNet's layers after ReLU.
STAGES = {
    'small-cnn': 'stem stage1 stage2 stage3', 'lenet5': 'relu1 relu2',
    'resnet': 'conv1 layer1 layer2 layer3 layer4', 'wrn': 'conv1 block1 block2 block3',
    'alexnet': 'features.1 features.4 features.7 features.9 features.11',
    'googlenet': 'conv1 conv2 conv3 inception3a inception3b inception4a inception4b inception4c '
                 'inception4d inception4e inception5a inception5b'}

TV_NOISE, OUTLIER = 0.08, 0.2  # noise; change of TV by it, of the layer's mean in S (authors' code)
IOU, LIFT = 0.04, 1.5  # of a detector (NetDissect); of its IoU over that with other images' masks
TAUS = (0.005, 0.02, 0.05, 0.1, 0.2)  # shares of positions above a unit's level; NetDissect: 0.005
TAU = 2  # of the claims: 0.05, about what a concept covers in `shapes`
CONFLICTS, PROBES, DISSECTED, TOP = 900, 1000, 500, 50  # images of `shapes`; that excite a channel
NATURAL, MASK_SIZE = 128, 56  # images of other data that are dissected; pixels of their masks
ABLATED = 256, 8  # images at most; channels of a stage at 224 pixels, or it takes hours
BANDS = [k / 10 for k in range(1, 10)]  # 1 is the Nyquist frequency

# Thresholds of the claims, chosen before the runs.
GATE, MARGIN = 3.0, 0.20  # robust accuracy of R over that of S; natural accuracy that R may lose
COVERAGE, DECISIONS = 0.5, 50  # share and number of conflicts decided for either cue
UNITS, NO_SIGNAL = 20, 0.05  # channels that matter alone; a smaller share or effect is chance
# How far trainings that differ in the seed alone came apart (six of 6 epochs, before the runs; for
# leaning three of the runs). Less is inconclusive; of n seeds, less than 1/sqrt(n) of it.
NOISE = dict(bias=0.09, blank=0.15, kept=0.11, filters=0.08, outliers=0.07, concepts=0.12,
             types=0.05, leaning=0.7)

# ------------------------------------------------------------------- Method: shape and texture

def decide(logits, groups):
    """Geirhos' decision: the category of largest mean probability over its classes; classes of no
    category do not count. logits (N, K); groups: class indices of each. Returns categories (N,)."""
    p = logits.double().softmax(1)
    return torch.stack([p[:, group].mean(1) for group in groups], 1).argmax(1)

def by_cue(decisions, shape, texture):
    """Decided for the shape, decided for the texture: two arrays (..., n) of 0.0 and 1.0 over the
    images (n of N) whose cues differ."""
    conflict = shape != texture
    return [(decisions == cue)[..., conflict].astype(float) for cue in (shape, texture)]

def shape_bias(by_shape, by_texture):
    """Share of the shape among the decisions for either cue; nan where there are none."""
    total = np.sum(by_shape) + np.sum(by_texture)
    return np.sum(by_shape) / total if total else math.nan

def category_of(name):
    """'Ship', 'air_plane' -> one of SIXTEEN, or what is left of the name."""
    name = re.sub('[^a-z]', '', name.lower())
    return ALIASES.get(name, name)

def read_stimuli(folder, categories, size, cues):
    """Images <category><n>.png or, for two cues, <category><n>-<category><n>.png: (uint8
    (N, 3, S, S), categories (N, cues)). Other and unreadable files are skipped and counted."""
    pattern = re.compile('-'.join(['([a-z _-]*[a-z])[0-9]+'] * cues))
    if not folder.is_dir():
        raise common.UserError(f'--cue-conflict-dir: there is no folder {folder}')
    images, labels, skipped, known = [], [], 0, list(categories)
    for path in sorted(path for path in folder.rglob('*') if path.is_file()):
        match = pattern.fullmatch(path.stem.lower())
        try:
            label = [known.index(category_of(c)) for c in match.groups()]
            images.append(common.read_image(path, size))
            labels.append(label)
        except (AttributeError, ValueError, common.UserError):  # no match, not known, no image
            skipped += 1
    common.log.info('%s: %d images, %d other files skipped', folder, len(images), skipped)
    if not images:
        raise common.UserError(f'{folder} holds no images like cat1{"-dog2" * (cues - 1)}.png of '
                               f'{", ".join(known) or "the classes"}')
    return torch.stack(images), torch.tensor(labels)

# --------------------------------------------------------------------- Method: altered images

SCRAMBLED = {2: (2, 3, 1, 0),  # the authors'; in both no patch stays
             4: (5, 8, 3, 14, 1, 12, 0, 9, 15, 6, 13, 2, 7, 4, 11, 10)}

def scramble(x, k):
    h, w = (side - side % k for side in x.shape[-2:])
    return common.permute_patches(x[..., :h, :w], torch.tensor(SCRAMBLED[k]))

def noisy(x, sigma):
    generator = make_generator('noise', device=x.device)
    return (x + sigma * torch.randn(x.shape, generator=generator, device=x.device)).clamp(0, 1)

def filtered(x, keep):
    """The frequencies for which keep(frequency as a share of Nyquist's) holds."""
    y, x_axis = (torch.fft.fftfreq(side, device=x.device) for side in x.shape[-2:])
    radius = 2 * (y[:, None].square() + x_axis.square()).sqrt()
    return torch.fft.ifft2(torch.fft.fft2(x) * keep(radius)).real.clamp(0, 1)

VIEWS = {  # name: function of (x in [0, 1], level), levels and what they are
    'grey': (lambda x, _: x.mean(1, keepdim=True).expand_as(x), [1], ''),
    'saturated': (common.saturate, [4, 16, 64, 1024], 'level'),  # Zhang & Zhu 2019
    'scrambled': (scramble, [2, 4], 'patches per side'),
    'noise': (noisy, [0.04, 0.08, 0.12, 0.18, 0.26], 'standard deviation'),
    'contrast': (lambda x, factor: x.mean((2, 3), keepdim=True).lerp(x, factor),
                 [0.75, 0.5, 0.35, 0.2, 0.1], 'factor'),
    'low-pass': (lambda x, b: filtered(x, lambda r: r <= b), BANDS, 'up to (Nyquist: 1)'),
    'high-pass': (lambda x, b: filtered(x, lambda r: (r >= b) | (r == 0)), BANDS, 'from')}
DRAWN = {'flat fill': 'flat', 'silhouettes': 'mask', 'edges': 'edge'}  # `shapes` without texture

def every_view(data):
    """Yield (name, images (N, C, H, W) of each level, made one by one) of the test images."""
    x = common.to_float(data.test[0])
    for name, kind in DRAWN.items() if data.name == 'shapes' else ():
        drawn = common.make_shapes(len(x), 'test', x.shape[-1], kind=kind)[0]
        drawn = common.to_float(drawn).to(x.device).expand_as(x)
        yield name, [drawn] if kind == 'flat' else [1 - drawn, drawn]
    for name, (function, levels, _) in VIEWS.items():
        yield name, (function(x, level) for level in levels)

# -------------------------------------------------------------------- Method: inside a network

@contextmanager
def hooked(model, actions):
    """Forward hooks {module of model.net: function (module, inputs, output)} for a while."""
    handles = [model.net.get_submodule(name).register_forward_hook(action)
               for name, action in actions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

def logits_of(model, x):  # in batches whose maps fit into memory
    return common.logits_of(model, x, min(250, max(1, 2**20 // x[0, 0].numel())))

def at_stages(model, stages, x, function):
    """{stage: function(maps (n, C, h, w)), joined}; maps of 1,200 stimuli would be 15 GB."""
    found = {stage: [] for stage in stages}
    actions = {stage: lambda module, inputs, out, stage=stage: found[stage].append(function(out))
               for stage in stages}
    with hooked(model, actions):
        logits_of(model, x)
    return {stage: torch.cat(parts) for stage, parts in found.items()}

def without(model, stage, channels):
    """Ablation: channels of a stage give zeros."""
    def zero(module, inputs, out):
        return out.index_fill(1, torch.tensor(channels, device=out.device), 0)
    return hooked(model, {stage: zero})

def total_variation(a):
    """Sum of |differences| of neighbours, down and across: (..., H, W) -> (...)."""
    return a.diff(dim=-2).abs().sum((-2, -1)) + a.diff(dim=-1).abs().sum((-2, -1))

def first_filters(model):
    """Weights of the first convolution over pixels: (O, C, k, k)."""
    layers = list(model.modules())
    weight = next(m for m in layers if isinstance(m, nn.Conv2d)).weight.detach().float().cpu()
    if any(isinstance(m, nn.PixelUnshuffle) for m in layers):  # sees 2 x 2 pixels as channels
        weight = F.pixel_shuffle(weight, 2)
    return weight

COLOUR_NAMES = ('dark grey', 'light grey', 'red', 'yellow', 'green', 'cyan', 'blue', 'magenta')

def colour_of(x):
    """Index into COLOUR_NAMES of every pixel, on the CPU: (N, 3, H, W) -> (N, H, W); grey where
    the largest and the smallest channel are less than 0.12 apart."""
    x = x.permute(0, 2, 3, 1).cpu()
    hue, top, low = torch.from_numpy(colors.rgb_to_hsv(x))[..., 0], x.amax(-1), x.amin(-1)
    sector = 2 + (6 * hue).round().long() % 6
    return torch.where(top - low < 0.12, (top + low > 1).long(), sector)

def dissect(maps, masks, group):
    """Intersection over union of channels and concepts (Bau et al. 2017, as the authors have it).
    maps (N, C, h, w), on where they, enlarged bilinearly, exceed the level that a share tau of all
    positions does; masks (N, K, H, W); group (K,): category of each concept. Of an image counts
    what is on if it touches any concept of the category. Returns (TAUS, C, K)."""
    ranks = [int(tau * maps[:, 0].numel()) for tau in TAUS]
    values = maps.transpose(0, 1).flatten(1)
    levels = torch.stack([v.topk(max(ranks) + 1)[0][ranks] for v in values], 1)[..., None]
    same = (group[:, None] == group).float()
    both, area = maps.new_zeros(2, len(TAUS), maps.shape[1], len(group))
    batch = max(1, 2**20 // (maps.shape[1] * masks[0, 0].numel()))
    for some, here in zip(maps.split(batch), masks.split(batch)):
        some = F.interpolate(some, here.shape[-2:], mode='bilinear').flatten(2)
        here = here.flatten(2).float().transpose(1, 2)
        for t, level in enumerate(levels):
            on = (some > level).float()
            hit = on @ here  # (n, C, K)
            both[t] += hit.sum(0)
            area[t] += (on.sum(2, keepdim=True) * (hit @ same > 0)).sum(0)
    return both / (area + masks.sum((0, 2, 3)) - both).clamp(min=1)

def unit_labels(iou):
    """The concept of largest IoU among those that a channel detects, or -1: (..., C, 2K), with the
    masks of each image and of another one, -> (..., C)."""
    own, other = np.split(iou, 2, -1)
    found = (own > IOU) & (own > LIFT * other)
    return np.where(found.any(-1), np.where(found, own, -1).argmax(-1), -1)

def input_types(peak, label):
    """Effective number, exp of the entropy, of the labels (N,) among the images that excite a
    channel most. peak (N, C): highest value of each map. Returns (C,), nan for dead channels."""
    kind = label.unique(return_inverse=True)[1]
    top = peak.topk(max(1, min(TOP, len(peak) // 10)), 0)[1]
    share = F.one_hot(kind[top]).float().mean(0)
    number = torch.special.entr(share).sum(1).exp()
    return torch.where(peak.amax(0) == peak.amin(0), math.nan, number)

def ablate_channels(model, widths, x, groups, cues):
    """Zero channels one at a time: all, or for large images ABLATED[1] of a stage, evenly
    spaced. widths: {stage: channels}; cues (N, 2): shape and texture. Returns {stage: decisions for
    the shape and for the texture that are lost (2, C), nan for other channels}."""
    before, lost = decide(logits_of(model, x), groups), {}
    few = ABLATED[1] if x.shape[-1] > 64 else math.inf
    for stage, width in widths.items():
        lost[stage] = np.full((2, width), math.nan)
        for c in np.unique(np.linspace(0, width - 1, min(few, width)).astype(int)):
            with without(model, stage, [c]):
                changed = decide(logits_of(model, x), groups) != before
            lost[stage][:, c] = ((before == cues.T) & changed).sum(1).cpu()
    return lost

# ---------------------------------------------------------------- Experiment: foreign networks

WRAPPERS = ('state_dict', 'model_state_dict', 'model', 'best')  # where a file keeps its weights
PREFIXES = {'module', 'model', '_orig_mod', 'net'}  # DataParallel, robustness, compile, train_at
UNUSED = {'attacker', 'normalizer', 'normalize', 'aux1', 'aux2'}

def read_weights(path):
    """What a file holds; none of its code is run, but numpy scalars and Namespaces are taken."""
    scalar, array = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]
    safe = [argparse.Namespace, np.ndarray, np.dtype, *{type(np.dtype(c)) for c in '?bBhHiIlLefd'}]
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):  # numpy 1 and 2
        safe += [(scalar, f'{module}.scalar'), (array, f'{module}._reconstruct')]
    try:
        with torch.serialization.safe_globals(safe):
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        why = ' '.join(str(error).split())[:200]
        raise common.UserError(f'{path} cannot be read safely: {why}') from None

def plain_keys(content, arch):
    """A file's content -> {key of torchvision's network: tensor}."""
    while inner := next((content[w] for w in WRAPPERS if isinstance(content.get(w), dict)), None):
        content = inner
    last, state = 'classifier.6' if arch == 'alexnet' else 'fc', {}
    renamed = {'last_layer': last, 'branch4_conv': 'branch4.1'}  # of robustness
    for key, value in content.items():
        parts = [renamed.get(part, part) for part in str(key).split('.') if part not in PREFIXES]
        if torch.is_tensor(value) and UNUSED.isdisjoint(parts):
            state['.'.join(parts)] = value
    return state

def load_network(path, arch):
    """The ImageNet network of a file. UserError, which names the keys, where it does not fit."""
    model, content = common.make_model(arch, 1000, (3, 224, 224)), read_weights(path)
    content = content if isinstance(content, dict) else {}
    state = plain_keys(content, arch)
    ours, theirs = ({k: tuple(v.shape) for k, v in found.items() if 'num_batches' not in k}
                    for found in (model.net.state_dict(), state))  # old files do not count batches
    wrong = [f'{k} {ours.get(k, "is not known")}, in the file {theirs.get(k, "missing")}'
             for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
    if wrong:
        raise common.UserError(f'{path} is no {arch}, {len(wrong)} keys do not fit: '
                               + '; '.join(wrong[:5]))
    model.net.load_state_dict(state, strict=False)
    if arch == 'googlenet':  # torchvision's own, a bare file, has other means inside
        model.net.transform_input = 'conv1.conv.weight' in content
    return model.eval()

# ---------------------------------------------------------------------- Experiment: this study

def load(args, device):
    """The Data, with stimuli = {'conflict', 'edges', 'silhouettes': (images, categories (N, cues))}
    as far as there are any, categories, groups of classes, and networks {arm: that of a file}."""
    files = dict(standard=args.weights, robust=args.robust_weights) if args.weights else {}
    networks = {arm: load_network(path, args.arch).to(device) for arm, path in files.items()}
    data, stimuli, categories, size = None, {}, SIXTEEN, 224
    if not networks:
        data = common.load_data(args, device)
        size, names = data.shape[-1], [category_of(c) for c in data.classes]
        categories = {c: [names.index(c)] for c in SIXTEEN if c in names}
    if args.cue_conflict_dir:
        folder = Path(args.cue_conflict_dir)
        places = dict(conflict=folder, silhouettes=folder.parent / 'filled-silhouettes',
                      edges=folder.parent / 'edges')
        stimuli = {name: read_stimuli(place, categories, size, 1 + (place == folder))
                   for name, place in places.items() if place == folder or place.is_dir()}
    elif args.dataset == 'shapes':
        categories, i = {c: [k] for k, c in enumerate(data.classes)}, torch.arange(CONFLICTS)
        texture = (i + 1 + i // 10 % 9) % 10  # all 90 pairs with outlines 0, 1, ..., 9, 0, ...
        x, outline, _ = common.make_shapes(CONFLICTS, 'conflict', size, texture)
        stimuli = dict(conflict=(x, torch.stack((outline, texture), 1)))
    stimuli = {name: (x.to(device), y.to(device)) for name, (x, y) in stimuli.items()}
    if networks:
        x, cues = stimuli['conflict']
        none, classes = (x[:0], cues[:0, 0]), [str(k) for k in range(1000)]
        data = common.Data(args.dataset, classes, none, none, (x, cues[:, 0]))
        weights = [v for m in networks.values() for v in m.state_dict().values()]
        data.digest = common.digest(*weights)
    data.test_digest = common.digest(
        data.test_digest, *(part for pair in stimuli.values() for part in pair))
    data.stimuli, data.networks, data.categories = stimuli, networks, list(categories)
    data.groups = list(categories.values())
    return data

def train_arms(args, data, seed, device):
    """{arm: (network, history of its training)}; what train_at.py has trained is taken from it."""
    model = common.make_model(args.arch, len(data.classes), data.shape, seed).to(device).eval()
    arms = {'untrained': (model, [])}
    for eps in (0, *sorted({share * args.eps for share in (*args.ladder, 1)})):
        name = common.eps_text(dict(norm=args.norm, eps=eps)) if eps else 'standard'
        own = dict(eps=eps, step_size=args.step_size * (eps / args.eps)) if eps else {}
        setting = argparse.Namespace(**vars(args) | own)
        trained = common.train(setting, data, 'pgd' if eps else 'standard', seed, device)
        arms[name] = common.restore(trained, 'best', args, data, device), trained['history']
    return arms

def make_probe(data):
    """What networks are probed with: dict(x, labels {name: (N,)}; of its first images masks
    (n, 2K, H, W) of the K concepts [category, name] and, for the lift, those of another image)."""
    shapes, (x, y), side = data.name == 'shapes', data.test, data.shape[-1]
    if shapes:
        n, (x, y, p) = DISSECTED, common.make_shapes(
            PROBES, 'probe', side, torch.arange(PROBES) // 10 % 10)
        drawn = common.render_shapes({name: v[:n] for name, v in p.items()}, side)
        colour = colour_of(p['colour'][:, :, None, None])[:, 0, 0]
        image, labels = drawn['image'], dict(outline=y, texture=p['texture'], colour=colour)
    else:  # stimuli and the test images of CIFAR-10 may be sorted by class
        order = torch.randperm(len(y), generator=make_generator('probe')).to(y.device)
        n, x = min(NATURAL, len(y)), x[order]
        labels = dict(zip(('shape', 'texture'), data.stimuli['conflict'][1][order].T)
                      ) if data.networks else {'class': y[order]}
        image = F.interpolate(common.to_float(x[:n]), [min(side, MASK_SIZE)] * 2, mode='area')
        image = image.expand(-1, 3, -1, -1)
    if len(labels) > 1:
        each = torch.stack(list(labels.values()), 1)
        labels['joint'] = each.unique(dim=0, return_inverse=True)[1]
    own = [('colour', COLOUR_NAMES, colour_of(image)[:, None] == torch.arange(8)[:, None, None])]
    other = torch.randperm(n, generator=make_generator('other masks'))
    null = [own[0][2][other]]
    objects = (('texture', common.TEXTURES), ('outline', common.OUTLINES)) if shapes else ()
    for name, known in objects:  # null: the object itself under the label of another
        inside, label = drawn['mask'] > 0.5, F.one_hot(labels[name][:n], 10).bool()[..., None, None]
        own.append((name, known, inside & label))
        null.append(inside & label[other])
    masks = torch.cat([mask for *_, mask in own] + null, 1).to(data.test[1].device)
    return dict(x=x.to(masks.device), labels={k: v.to(masks.device) for k, v in labels.items()},
                masks=masks, concepts=[[kind, name] for kind, names, _ in own for name in names])

def to_numpy(found):
    return {name: v.cpu().numpy() for name, v in found.items()}

def measure_network(args, data, probe, model, history):
    """Everything that concerns one network, as arrays."""
    stages = next(names.split() for arch, names in STAGES.items() if args.arch.startswith(arch))
    out, (x, y) = dict(history=history), data.test
    right = partial(common.correct_under, model)
    if history:
        attack = common.evaluation_attacks(args)['pgd']
        out |= to_numpy(dict(natural=right(x, y), attacked=right(x, y, attack)))
        out['views'] = to_numpy({name: torch.stack([right(image, y) for image in images])
                                 for name, images in every_view(data)})
    for name, (images, cues) in data.stimuli.items():
        decided = decide(logits_of(model, images), data.groups)
        out[name] = (decided if name == 'conflict' else decided == cues[:, 0]).cpu().numpy()
    filters, some = first_filters(model), probe['x'][: len(probe['masks'])]
    out |= to_numpy(dict(filters=filters[:32],  # nan for filters of zeros
                         tv=total_variation(filters).sum(1) / filters.abs().sum((1, 2, 3))))
    tv = [at_stages(model, stages, image, total_variation)
          for image in (some, noisy(common.to_float(some), TV_NOISE))]
    out['map_tv'] = to_numpy({s: torch.stack([v[s].mean(0) for v in tv]) for s in stages})
    kinds = [kind for kind, _ in probe['concepts']]
    group = torch.tensor([kinds.index(kind) + null * len(kinds) for null in (0, 1)
                          for kind in kinds], device=y.device)
    maps = at_stages(model, stages, some, lambda a: a)
    out['iou'] = to_numpy({s: dissect(maps.pop(s), probe['masks'], group) for s in stages})
    peaks = at_stages(model, stages, probe['x'], lambda a: a.amax((2, 3)))
    random = torch.rand(len(probe['x']), 200, generator=make_generator('chance')).to(y.device)
    out['types'] = {name: to_numpy({s: input_types(peaks[s], label) /
                                    input_types(random, label).mean() for s in stages})
                    for name, label in probe['labels'].items()}
    return out

def study(args, folder, device, data, results):
    """Train or take each network and measure it; saved when a network is finished."""
    probe = make_probe(data)
    main = 'robust' if data.networks else common.eps_text(results['config'])
    results |= dict(robust=main, concepts=probe['concepts'], categories=data.categories)
    if 'conflict' in data.stimuli:
        x, cues = data.stimuli['conflict']
        results['cues'] = dict(zip(('shape', 'texture'), cues.T.cpu().numpy()))
        some = torch.linspace(0, len(x) - 1, min(ABLATED[0], len(x)), device=device).long()
    for seed in args.seeds:
        arms = {arm: (model, []) for arm, model in data.networks.items()}
        for arm, (model, history) in (arms or train_arms(args, data, seed, device)).items():
            keys = ('runs', arm, f's{seed}')
            common.log.info('measuring %s (seed %d)', arm, seed)
            run = common.measure(results, keys, lambda: measure_network(
                args, data, probe, model, history), folder)
            if arm in ('standard', main) and 'cues' in results:
                widths = {stage: iou.shape[1] for stage, iou in run['iou'].items()}
                common.measure(results, (*keys, 'lost'), lambda: ablate_channels(
                    model, widths, x[some], data.groups, cues[some]), folder)

# ------------------------------------------------------------------------------------ Figures

def joined(stages):
    """{stage: (..., C)} -> (..., all channels)."""
    return np.concatenate(list(stages.values()), -1).astype(float)

def kept(seen, natural, classes):
    """Accuracy above chance as a share of natural accuracy above chance; nan if that is < 5 %."""
    above = np.mean(natural) - 1 / classes
    return (np.mean(seen) - 1 / classes) / above if above > 0.05 else math.nan

def derive(results):
    """{arm: {measure: array (seeds, images or channels)}} for figures and claims."""
    runs = {arm: common.stack(run) for arm, run in results['runs'].items()}
    kinds = np.array([kind for kind, _ in results['concepts']] + [''])  # '': detects nothing
    clean = {stage: tv[:, :1].mean(2) for stage, tv in runs['standard']['map_tv'].items()}
    for run in runs.values():
        run['kind'] = kinds[unit_labels(np.concatenate(list(run['iou'].values()), -2))]
        low, high = (np.isin(run['kind'][:, TAU], k) for k in (('colour', 'texture'), 'outline'))
        run['level'] = low.astype(float) - high
        run['outlier'] = joined({stage: abs(tv[:, 1] - tv[:, 0]) >= OUTLIER * clean[stage]
                                 for stage, tv in run['map_tv'].items()})
        run['joint'] = joined(list(run['types'].values())[-1])
        if 'conflict' in run:
            run['shape'], run['texture'] = by_cue(run['conflict'], *results['cues'].values())
        if 'lost' in run:  # equal losses, also of dead channels, lean to neither
            lean = np.subtract(*joined(run['lost']).swapaxes(0, 1))
            run['leaning'] = np.where(lean == 0, math.nan, np.heaviside(lean, 0))
        if 'views' in run:
            views = run['views']
            blank = ('flat fill', 'silhouettes') if 'flat fill' in views else ('saturated',)
            run['blank'] = np.concatenate([views[name] for name in blank], 1).mean(1)
            run['low'] = views['low-pass'][:, :3].mean(1)
            run |= {name: views[name].mean(1) for name in ('scrambled', 'contrast')}
    return runs

def interval(statistic, *arrays, noise=0.0):
    """(value, low, high): 95 % bootstrap of a statistic of arrays (S, N) over seeds and images, the
    same in arrays of one width; at least noise / sqrt(S) to both sides."""
    value, low, high = common.resample(statistic, *arrays)
    least = noise / len(arrays[0]) ** 0.5
    return value, min(low, value - least), max(high, value + least)

def draw(results, folder):
    runs = derive(results)  # untrained is grey, S black
    palette = dict(zip(runs, ('0.65',) * ('untrained' in runs) + COLOURS * 9))
    for key, figure in (('shape', figure_bias), ('views', figure_views),
                        ('map_tv', figure_smooth), ('kind', figure_simplicity)):
        if key in runs['standard']:
            figure(runs, results, folder, palette)

def bars(axis, values, palette):
    """A bar for each arm of {arm: (value, low, high)}, in %."""
    for i, (arm, (value, low, high)) in enumerate(values.items()):
        axis.bar(i, 100 * value, color=palette[arm], error_kw=dict(lw=0.8, ecolor='0.4'),
                 yerr=[[100 * max(value - low, 0)], [100 * max(high - value, 0)]])
        axis.text(i, 100 * high + 2, f'{100 * value:.0f}', ha='center', fontsize=7)
    axis.set_xticks(range(len(values)), values, rotation=35, ha='right')

def figure_bias(runs, results, folder, palette):
    singles = [name for name in ('silhouettes', 'edges') if name in runs['standard']]
    fig, (axes,) = common.new_figure(1, 1 + len(singles), 5 + 2.6 * len(singles), 3.8)
    bars(axes[0], {arm: interval(shape_bias, run['shape'], run['texture'])
                   for arm, run in runs.items()}, palette)
    coverage = [100 * (run['shape'] + run['texture']).mean() for run in runs.values()]
    axes[0].plot(coverage, 'D', ms=5, color='0.2', mfc='white', label='coverage (%)')
    axes[0].set(ylim=(0, 125), yticks=range(0, 101, 25), ylabel='%',
                title='Share of the shape in\ndecisions for shape or texture')
    for axis, name in zip(axes[1:], singles):
        bars(axis, {arm: common.bootstrap(run[name]) for arm, run in runs.items()}, palette)
        axis.axhline(100 / len(results['categories']), color='0.5', ls='--', lw=1)
        axis.set(ylim=(0, 110), title=f"Geirhos' {name}:\naccuracy (%), dashed: chance")
    axes[0].legend(fontsize=7)
    fig.suptitle('{dataset}, {arch}; coverage: decided for either cue'.format(**results['config']))
    common.save_figure(fig, folder, 'fig1_shape_bias')

def figure_views(runs, results, folder, palette):
    trained = {arm: run for arm, run in runs.items() if 'views' in run}
    names = trained[results['robust']]['views']
    fig, axes = common.new_figure(2, math.ceil(len(names) / 2), 1.9 * len(names) / 2 + 1, 5,
                                  sharey=True)
    for axis, name in zip(axes.flat, names):
        levels, unit = VIEWS[name][1:] if name in VIEWS else (['dark', 'light'], 'object is')
        for arm, run in trained.items():
            share = [100 * kept(seen, run['natural'], len(results['classes']))
                     for seen in run['views'][name].swapaxes(0, 1)]
            axis.plot(share, 'o-', ms=3, color=palette[arm], label=arm)
        axis.set_xticks(range(len(share)), levels[: len(share)] if share[1:] else [''], fontsize=6)
        axis.set(title=name, xlabel=unit * bool(share[1:]), xlim=(-0.5, len(share) - 0.5))
    for axis in axes.flat[len(names):]:
        axis.remove()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=6)
    fig.suptitle('Accuracy above chance on altered images, in % of that on natural images')
    common.save_figure(fig, folder, 'fig2_missing_cues')

def figure_smooth(runs, results, folder, palette):
    fig, (axes,) = common.new_figure(1, 3, 10, 3.4)
    for axis, arm in zip(axes, ('standard', results['robust'])):
        filters = runs[arm]['filters'][0]
        filters = 0.5 + filters / (2 * abs(filters).max((1, 2, 3), keepdims=True) + 1e-12)
        tiles = torchvision.utils.make_grid(torch.from_numpy(filters), 4, 1, pad_value=1)
        common.show_image(axis, tiles, f'{arm}: first filters')
        clean, noise = joined(runs[arm]['map_tv']).mean(0) + 1e-3
        axes[2].loglog(clean, noise, '.', ms=4, color=palette[arm], label=arm)
    axes[2].axline((1, 1), (10, 10), color='0.5', lw=1, label='unchanged')
    axes[2].set(xlabel='TV of its maps of clean images', ylabel='of noisy images',
                title=f'Channels under noise ({TV_NOISE})')
    axes[2].legend(fontsize=7)
    common.save_figure(fig, folder, 'fig3_smoothness')

def figure_simplicity(runs, results, folder, palette):
    fig, (axes,) = common.new_figure(1, 3, 11.5, 3.8)
    bottom, kinds = np.zeros(len(runs)), dict.fromkeys(kind for kind, _ in results['concepts'])
    for colour, kind in zip(COLOURS[1:], kinds):
        share = {arm: 100 * (run['kind'] == kind).mean((0, 2)) for arm, run in runs.items()}
        now = np.array([v[TAU] for v in share.values()])
        axes[0].bar(range(len(runs)), now, bottom=bottom, color=colour, label=kind)
        bottom += now
        for arm, style in (('standard', 'o--'), (results['robust'], 's-')):
            axes[1].semilogx(TAUS, share[arm], style, ms=4, color=colour, label=f'{kind}, {arm}')
    for arm, run in runs.items():
        name, stages = list(run['types'].items())[-1]
        axes[2].plot([100 * np.nanmean(v) for v in stages.values()], 'o-', color=palette[arm],
                     label=arm, ms=4)
    axes[2].axhline(100, color='0.5', ls='--', lw=1)
    axes[0].set_xticks(range(len(runs)), runs, rotation=35, ha='right')
    axes[2].set_xticks(range(len(stages)), stages, rotation=35, ha='right')
    titles = (f'What channels detect (tau {TAUS[TAU]})', 'The same by tau (share that is on)',
              f'Types of inputs ({name}), random: 100')
    for axis, title in zip(axes, titles):
        low, high = axis.get_ylim()
        axis.set(ylabel='%', title=title, ylim=(low, high + 0.4 * (high - low)))
        axis.legend(fontsize=7, ncols=2, loc='upper center')
    common.save_figure(fig, folder, 'fig4_simplicity')

# ------------------------------------------------------------------------------------- Claims

CHEN, BENCHMARK = 'Chen et al. 2020', "(Gavrikov's benchmark of ResNet-50, S and l2 3)"
ROWS = (  # key of NOISE, sign of R minus S, measures, statistic, claim, reference
    ('bias', 1, 'shape texture', shape_bias, 'R is more shape-biased', f'.215, .648 {BENCHMARK}'),
    ('blank', 1, 'blank natural', kept, 'R keeps more accuracy without texture', '-'),
    ('kept', -1, 'scrambled natural', kept, 'R keeps less without shape (scrambled)', '-'),
    ('kept', -1, 'contrast natural', kept, 'R keeps less under low contrast', '-'),
    ('kept', 1, 'low natural', kept, 'R keeps more through low-pass filters (.1 to .3)', '-'),
    ('filters', -1, 'tv', np.nanmean, 'first filters of R are smoother: TV / L1', '-'),
    ('outliers', -1, 'outlier', np.nanmean, 'noise changes the TV of fewer channels of R', '-'),
    ('concepts', 1, 'level', np.nanmean, 'R detects colour, texture, not outline, if probed', '-'),
    ('types', -1, 'joint', np.nanmean, 'channels of R like fewer types of inputs (random: 1)', '-'),
    ('leaning', 1, 'leaning', np.nanmean, 'more channels of R serve shape than texture', '-'))

def unfit(results, run):
    """Why a network can support no claim, or ''."""
    why = common.near_chance(run['natural'], results['labels']) if 'natural' in run else ''
    low = 'shape' in run and (run['shape'] + run['texture']).mean() < COVERAGE
    return why or 'coverage below one half' * bool(low)

def claims(results):
    """The gate, S's own bias and those of ROWS that were measured; (S and R) in brackets."""
    runs, rows, own, detail = derive(results), [], {}, {}
    pair = s, r = runs['standard'], runs[results['robust']]
    why = unfit(results, s) or unfit(results, r)
    if 'natural' in s:
        arrays = [run[name] for run in pair for name in ('attacked', 'natural')]
        value, *ends = interval(lambda sa, sn, ra, rn: min(  # accuracy of S: one image at least
            np.mean(ra) - GATE * max(np.mean(sa), 1 / sa.size), MARGIN - np.mean(sn) + np.mean(rn)),
            *arrays)
        text = 'gate: PGD and natural accuracy (S {:.3f}, {:.3f}, R {:.3f}, {:.3f})'
        rows.append(Claim(text.format(*map(np.mean, arrays)), 'control', value, interval=ends,
                          unless=why))
        why = why or 'R fails the gate' * bool(value <= 0)
    if 'shape' in s:
        decided = min((run['shape'] + run['texture']).sum(1).mean() for run in pair)
        mattering = min(np.isfinite(run['leaning']).sum(1).mean() for run in pair)
        own['bias'] = f'{decided:.0f} conflicts decided for either' * bool(decided < DECISIONS)
        own['leaning'] = own['bias'] or f'{mattering:.0f} channels' * bool(mattering < UNITS)
        value, *ends = interval(lambda *cues: 0.5 - shape_bias(*cues), s['shape'], s['texture'],
                                noise=NOISE['bias'])
        rows.append(Claim('S is texture-biased: 0.5 minus its shape bias', CHEN, value,
                          unless=unfit(results, s) or own['bias'], interval=ends))
        detail['bias'] = ''.join(f'; {arm} {shape_bias(run["shape"], run["texture"]):.3f}'
                                 for arm, run in runs.items())
    for key, sign, names, function, text, reference in ROWS:
        if set(names.split()) <= r.keys():
            extra = dict(classes=len(results['classes'])) if function is kept else {}
            function = partial(function, **extra)
            arrays = [[run[name].astype(float) for name in names.split()] for run in pair]
            n, measured = len(arrays[0]), np.array([function(*a) for a in arrays])
            value, *ends = interval(lambda *v: sign * (function(*v[n:]) - function(*v[:n])),
                                    *arrays[0], *arrays[1], noise=NOISE[key])
            chance = dict(types=1, blank=0, kept=0).get(key, math.inf)
            unless = why or own.get(key)
            if not np.abs(measured - chance).max() >= NO_SIGNAL:  # nan: not defined
                unless = unless or 'both near chance'
            text += ' ({:.3f} and {:.3f}{})'.format(*measured, detail.get(key, ''))
            rows.append(Claim(text, CHEN, value, reference=reference, unless=unless, interval=ends))
    return rows

def check(args):
    """What argparse cannot see."""
    files = [args.weights, args.robust_weights]
    if not all(0 < share <= 1 for share in args.ladder):
        raise common.UserError('--ladder: shares of --eps, above 0 and at most 1')
    if any(files):
        small = re.fullmatch('small-cnn.*|lenet5|wrn.*|resnet18', args.arch)
        if not all([*files, args.cue_conflict_dir]) or small or len(args.seeds) > 1:
            raise common.UserError('--weights needs --robust-weights, --cue-conflict-dir, one seed '
                                   f'and --arch resnet18-imagenet or the like, not {args.arch}')
        args.dataset = '-'.join(Path(file).stem for file in files)

def main(argv=None):
    parser = common.make_parser(__doc__, DEFAULTS, argv)
    add = parser.add_argument
    add('--ladder', type=common.number, nargs='*', metavar='X',
        help='train R with these shares of --eps, too')
    add('--cue-conflict-dir', metavar='DIR', help='stimuli <shape>/<shape>1-<texture>1.png')
    add('--weights', metavar='FILE', help='of the standard ImageNet network')
    add('--robust-weights', metavar='FILE', help='of the robust one; nothing is trained then')
    args = common.parse(parser, argv)
    check(args)
    folder, device, data, results = common.start('shape_bias', args, load)
    if 'finished' not in results:
        study(args, folder, device, data, results)
        common.finish('shape_bias', results, folder)
    draw(results, folder)
    common.judge(claims(results), results, folder)

if __name__ == '__main__':
    common.entry(main)
