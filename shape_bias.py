"""Shape or texture, and how simple: what adversarial training does to a CNN's features.

Question   Does a robust network (R) decide by shape where a standard one (S) decides by texture,
           does the shift grow with eps, and what does it buy when shape or texture is missing?
           Are its features simpler: smoother filters, lower-level concepts, fewer types of inputs?
Paper      Chen, Agarwal, Nguyen 2020, The shape and simplicity biases of adversarially robust
           ImageNet-trained CNNs (arXiv 2006.09373). Its body was not at hand: protocols are from
           the authors' released code. Cue conflicts after Geirhos et al. 2019, saturation after
           Zhang & Zhu 2019, dissection after Bau et al. 2017, dimensionality after Islam et al.
           2021. The reversed control and texture-randomised training are ours.
Usage      python shape_bias.py                                 shapes, minutes on a laptop
           python shape_bias.py --dataset cifar10 --norm l2 --ladder 0.25 1 --seeds 0 1 2
           python shape_bias.py --dataset cifar10 --cue-conflict-dir PATH      one GPU
           python shape_bias.py --arch resnet50 --weights IMAGENET1K_V1 \\
               --robust-weights resnet50_l2_eps3.ckpt --cue-conflict-dir PATH
           PATH: stimuli/style-transfer-preprocessed-512 of github.com/rgeirhos/texture-vs-shape;
           the folders edges and filled-silhouettes beside it are used, too.
Outputs    runs/shape_bias/<dataset>-<arch>/: results.json, metrics.csv, claims.md and
           fig1_views  fig2_shape_bias  fig3_missing_cues  fig4_corruptions  fig5_frequency
           fig6_filters  fig7_smoothness  fig8_noise  fig9_dissection  fig10_inputs
           fig11_ablation  fig12_concept_ablation  fig13_dimensions  fig14_reversed
           fig15_stimuli   (each .png and .pdf; those that the data allow)
"""

import argparse
import hashlib
import io
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from scipy.stats import spearmanr

import common
from common import claim, effect_verdict, make_generator

# ImageNet classes of Geirhos' sixteen categories (their code), as (first, last) or single.
SIXTEEN = {
    'airplane': [404],
    'bear': [(294, 297)],
    'bicycle': [444, 671],
    'bird': [8, (10, 16), (18, 20), (22, 24), (80, 83), (87, 96), (98, 100), (127, 133), (135, 145)],
    'boat': [472, 554, 625, 814, 914],
    'bottle': [440, 720, 737, 898, 899, 901, 907],
    'car': [436, 511, 817],
    'cat': [(281, 286)],
    'chair': [423, 559, 765, 857],
    'clock': [409, 530, 892],
    'dog': [(152, 191), (193, 203), (205, 226), (228, 241), (243, 250), (252, 257), 259, (261, 263), (265, 268)],
    'elephant': [385, 386],
    'keyboard': [508, 878],
    'knife': [499],
    'oven': [766],
    'truck': [555, 569, 656, 675, 717, 734, 864, 867],
}
ALIASES = {'automobile': 'car', 'ship': 'boat'}  # CIFAR-10 and STL-10
# From the authors' code.
TV_NOISE = 0.08  # Gaussian, of the noisy images: ImageNet-C's severity 1
OUTLIER = 0.2  # change of a channel's TV, of the layer's mean TV in S
SCRAMBLE_2X2 = (2, 3, 1, 0)
IOU = 0.04  # NetDissect's cut-off for a detector
SATURATION = (4, 16, 64, 1024)  # Zhang & Zhu 2019
# Ours.
TAUS = (0.005, 0.02, 0.05, 0.1, 0.2)  # shares of positions above a unit's threshold
TAU = 0.05  # that of the claims: near the share a concept covers (NetDissect: 0.005)
LIFT = 1.5  # of IoU over that with the labels of other images
SCRAMBLES = (2, 4, 8)
CONFLICTS, PROBES, PAIRS = 900, 1000, 500  # images of `shapes` for each
TOP = 50  # images that excite a channel most
PATCH = 11  # pixels, of the patches compared
BANDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # 1 is the Nyquist frequency
HYBRID = 0.3  # band below which the hybrids show one image, above it the other
CORRUPTIONS = {  # five severities each
    'noise': (0.04, 0.08, 0.12, 0.18, 0.26),  # standard deviation
    'blur': (0.5, 0.75, 1.0, 1.5, 2.0),  # of the Gaussian, in 1/32 of the image
    'contrast': (0.75, 0.5, 0.35, 0.2, 0.1),  # factor, around the mean
    'veil': (0.2, 0.35, 0.5, 0.65, 0.8),  # opacity of a smooth bright field, like fog
    'pixelate': (0.5, 0.4, 0.3, 0.25, 0.2),  # factor of the resolution
    'JPEG': (80, 50, 30, 15, 7),
}  # quality
# The reversed control: faint outlines with strong textures, which agree with the class in
# seven of ten images; chosen on S alone (docs/results.md has the tries).
REVERSED = dict(version=1, distance=(0.06, 0.12), contrast=(0.1, 0.2), agreement=0.7)
LADDER = (0.5,)  # of eps, where --ladder is not given
DEFAULTS = {'shapes': dict(test_size=1000)}

# Thresholds of the claims. Fixed before any run: GATE, MARGIN, COVERAGE and the bands; the others
# after the first runs and a review (docs/results.md).
GATE = 3.0  # robust accuracy of R, as a multiple of that of S
MARGIN = 0.20  # natural accuracy that R may lose
COVERAGE = 0.5  # share of conflicts decided for either cue
NO_SIGNAL = 0.05  # of chance: inputs this near to random ones
DECISIONS, UNITS = 50, 20  # fewer decisions, or channels that matter, say nothing
# How much two trainings that differ in their seed alone differed at most (three of S, three of
# R on shapes; docs/results.md); other data are taken to be alike. A smaller effect is
# inconclusive; for means over n seeds, one smaller than 1 / sqrt(n) of it.
RETRAINED = {
    'bias': 0.09,
    'hybrids': 0.05,
    'flat fill': 0.11,
    'silhouettes': 0.15,
    'edges': 0.49,
    'accuracy': 0.11,
    'TV': 0.08,
    'energy': 0.03,
    'rise': 0.03,
    'outliers': 0.07,
    'detectors': 0.06,
    'leaning': 0.32,
    'dimensions': 0.02,
    'types': 0.05,
    'number': 0.13,
}  # the last two as shares of chance or of S
TEXTURE_LESS = ('flat fill', 'silhouette', 'silhouette inverted')
SINGLE = ('congruent', 'edges', 'silhouettes')  # stimuli with one cue or two that agree
LOW, HIGH = ('0.1', '0.2', '0.3'), ('0.1', '0.2', '0.3')  # bands of the frequency claims
PAPER = 'Chen et al. 2020'
BENCHMARK = "independent: ResNet-50, Gavrikov's benchmark"


# --------------------------------------------------------------------------------- the method


def decide(logits, groups):
    """Geirhos' decision: the category of largest mean probability over its classes.

    logits: (N, K); groups: class indices of each category. Returns categories (N,).
    """
    p = F.softmax(logits.double(), 1)
    return torch.stack([p[:, group].mean(1) for group in groups], 1).argmax(1)


def imagenet_groups():
    """{category: class indices} of the sixteen categories."""
    return {
        name: [i for part in parts for i in (range(part[0], part[1] + 1) if isinstance(part, tuple) else (part,))]
        for name, parts in SIXTEEN.items()
    }


def category_groups(classes):
    """The categories that a network's classes can decide for: all sixteen for ImageNet's 1000
    classes, else those found among the class names (seven for CIFAR-10)."""
    if len(classes) == 1000:
        return imagenet_groups()
    names = [ALIASES.get(c, c) for c in classes]
    return {c: [names.index(c)] for c in SIXTEEN if c in names}


def by_cue(decisions, shape, texture):
    """Two arrays of 0.0 and 1.0: decided for the shape, decided for the texture. decisions:
    (..., N); shape, texture: (N,); images whose cues agree count for neither."""
    conflict = shape != texture
    return tuple(((decisions == cue) & conflict).astype(float) for cue in (shape, texture))


def shape_bias(by_shape, by_texture):
    """Share of shape decisions among those for either cue; nan where there are none. Takes
    arrays of 0 and 1 or counts."""
    by_shape, by_texture = np.sum(by_shape), np.sum(by_texture)
    return by_shape / (by_shape + by_texture) if by_shape + by_texture else math.nan


def pieces(model):
    """The network as [(name, function)], each a map from the output of the one before: stages
    that return maps (N, C, h, w), and last 'head', which returns logits."""
    m = model
    if isinstance(m, common.SmallCNN):
        stages = [
            ('stem', lambda x: m.stem(m.normalize(x))),
            ('stage1', m.stage1),
            ('stage2', m.stage2),
            ('stage3', m.stage3),
        ]
        return stages + [('head', lambda a: m.fc(a.mean((2, 3))))]
    if isinstance(m, common.LeNet5):

        def dense(a):
            a = F.max_pool2d(a, 2).flatten(1)
            return m.fc3(F.relu(m.fc2(F.relu(m.fc1(a)))))

        return [
            ('conv1', lambda x: F.relu(m.conv1(m.normalize(x)))),
            ('conv2', lambda a: F.relu(m.conv2(F.max_pool2d(a, 2)))),
            ('head', dense),
        ]
    if isinstance(m, common.ResNet18):

        def first(x):
            x = m.normalize(x)
            return F.relu(common.conv_bn(x, m.conv1, m.bn1)) if m.bn1 else m.conv1(x)

        def last(a):
            return m.linear((F.relu(m.bn(a)) if m.bn else a).mean((2, 3)))

        names = [f'layer{i}' for i in range(1, 5)]
        return [('conv1', first), *((n, getattr(m, n)) for n in names), ('head', last)]
    if isinstance(m, common.WideResNet):
        return [
            ('conv1', lambda x: m.conv1(m.normalize(x))),
            *((f'block{i}', getattr(m, f'block{i}')) for i in (1, 2, 3)),
            ('head', lambda a: m.fc(F.avg_pool2d(m.relu(m.bn1(a)), 8).flatten(1))),
        ]
    inner = m.model  # torchvision's, behind Normalize
    if hasattr(inner, 'features'):  # AlexNet: after each ReLU of a convolution
        cuts = (0, 2, 5, 8, 10, 12)
        stages = [(f'conv{i}', inner.features[a:b]) for i, (a, b) in enumerate(zip(cuts, cuts[1:]), 1)]
        head = nn.Sequential(inner.features[12:], inner.avgpool, nn.Flatten(), inner.classifier)
    elif hasattr(inner, 'inception3a'):
        names = (
            'conv1',
            'maxpool1',
            'conv2',
            'conv3',
            'maxpool2',
            'inception3a',
            'inception3b',
            'maxpool3',
            'inception4a',
            'inception4b',
            'inception4c',
            'inception4d',
            'inception4e',
            'maxpool4',
            'inception5a',
            'inception5b',
        )
        stages, pools = [], []
        for name in names:
            if 'maxpool' in name:
                pools = [getattr(inner, name)]
            else:
                stages.append((name, nn.Sequential(*pools, getattr(inner, name))))
                pools = []
        transform = inner._transform_input
        stages[0] = ('conv1', lambda x: inner.conv1(transform(x)))
        head = nn.Sequential(inner.avgpool, nn.Flatten(), inner.fc)
    else:  # ResNet-50
        stages = [
            ('conv1', nn.Sequential(inner.conv1, inner.bn1, inner.relu)),
            ('layer1', nn.Sequential(inner.maxpool, inner.layer1)),
            *((f'layer{i}', getattr(inner, f'layer{i}')) for i in (2, 3, 4)),
        ]
        head = nn.Sequential(inner.avgpool, nn.Flatten(), inner.fc)
    name, start = stages[0]
    return [(name, lambda x: start(m.normalize(x))), *stages[1:], ('head', head)]


def stage_maps(model, x, batch=250):
    """Yield (name, maps (N, C, h, w)) of every stage in turn; two are held at a time."""
    for name, function in pieces(model)[:-1]:
        with common.frozen(model), torch.no_grad():  # not across the yield
            x = torch.cat([function(b) for b in x.split(batch)])
        yield name, x


# ----------------------------------------------------------------------------------- the views


def derangement(k):
    """A fixed order of k x k patches in which none stays; for k = 2 the authors'."""
    if k == 2:
        return torch.tensor(SCRAMBLE_2X2)
    generator = make_generator('scramble', k)
    while True:
        order = torch.randperm(k * k, generator=generator)
        if (order != torch.arange(k * k)).all():
            return order


def black_and_white(x):
    """1 where the mean over the channels is above 1/2, else 0."""
    return (x.mean(1, keepdim=True) > 0.5).float().expand_as(x)


def outlines(x):
    """Black lines on white where the Sobel gradient of the blurred grey image is more than one
    standard deviation above its mean."""
    grey = blur(x.mean(1, keepdim=True), 1.0)
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=x.device)
    gradient = F.conv2d(F.pad(grey, (1,) * 4, mode='replicate'), torch.stack((kernel, kernel.T))[:, None]).norm(
        dim=1, keepdim=True
    )
    mean, std = (f(gradient, dim=(2, 3), keepdim=True) for f in (torch.mean, torch.std))
    return (gradient < mean + std).float().expand_as(x)


def blur(x, sigma):
    """Gaussian blur; sigma in pixels."""
    reach = max(1, math.ceil(3 * sigma))
    t = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-t.square() / (2 * sigma * sigma))
    kernel = (kernel / kernel.sum()).to(x.dtype)
    c = x.shape[1]
    reach = min(reach, x.shape[-1] - 1)
    kernel = kernel[len(kernel) // 2 - reach : len(kernel) // 2 + reach + 1]
    x = F.pad(x, (reach,) * 4, mode='reflect')
    x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)
    return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)


def radius_map(h, w, device):
    """Frequency of each coefficient of fft2, as a share of the Nyquist frequency."""
    fy, fx = torch.fft.fftfreq(h, device=device), torch.fft.fftfreq(w, device=device)
    return (fy[:, None].square() + fx.square()).sqrt() / 0.5


def low_pass(x, band):
    """Frequencies up to `band` of the Nyquist frequency."""
    keep = radius_map(*x.shape[-2:], x.device) <= band
    return torch.fft.ifft2(torch.fft.fft2(x) * keep).real.clamp(0, 1)


def high_pass(x, band):
    """Frequencies from `band` of the Nyquist frequency, and the mean."""
    radius = radius_map(*x.shape[-2:], x.device)
    keep = (radius >= band) | (radius == 0)
    return torch.fft.ifft2(torch.fft.fft2(x) * keep).real.clamp(0, 1)


def hybrid(a, b):
    """The low frequencies of a and the high ones of b."""
    high = torch.fft.fft2(b) * (radius_map(*b.shape[-2:], b.device) > HYBRID)
    low = torch.fft.fft2(a) * (radius_map(*a.shape[-2:], a.device) <= HYBRID)
    return torch.fft.ifft2(low + high).real.clamp(0, 1)


def phase_of(a, b):
    """The phases of a with the amplitudes of b."""
    fa, fb = torch.fft.fft2(a), torch.fft.fft2(b)
    return torch.fft.ifft2(torch.polar(fb.abs(), fa.angle())).real.clamp(0, 1)


def evenly(n, most):
    """Indices of at most so many of n, evenly spaced: image folders are sorted by class."""
    return torch.linspace(0, n - 1, min(n, most)).round().long()


def partners(y):
    """For each image the index of a random one of another class: (N,)."""
    if len(y.unique()) < 2:
        raise common.UserError('the test images are all of one class; try a larger --test-size')
    generator = make_generator('partners')
    other = torch.randint(len(y), (len(y),), generator=generator)
    while (same := y.cpu()[other] == y.cpu()).any():
        other[same] = torch.randint(len(y), (int(same.sum()),), generator=generator)
    return other.to(y.device)


def corrupt(x, name, severity):
    """A corruption at severity 0 to 4. x: (N, C, H, W) in [0, 1]."""
    value, (n, _, h, w) = CORRUPTIONS[name][severity], x.shape
    generator = make_generator('corrupt', name, severity)
    if name == 'noise':
        return (x + value * torch.randn(x.shape, generator=generator).to(x.device)).clamp(0, 1)
    if name == 'blur':
        return blur(x, value * w / 32)
    if name == 'contrast':
        mean = x.mean((2, 3), keepdim=True)
        return mean + value * (x - mean)
    if name == 'veil':
        field = torch.rand(n, 1, 4, 4, generator=generator).to(x.device)
        field = F.interpolate(field, (h, w), mode='bicubic').clamp(0, 1)
        return x * (1 - value) + value * (0.6 + 0.4 * field)
    if name == 'pixelate':
        small = F.interpolate(x, (round(h * value), round(w * value)), mode='area')
        return F.interpolate(small, (h, w), mode='nearest')
    images = (x * 255).round().byte().cpu().numpy()
    coded = [torch.from_numpy(jpeg(image, value)) for image in images]
    return common.to_float(torch.stack(coded)).to(x.device)


def jpeg(image, quality):
    """A uint8 image (C, H, W) after JPEG coding."""
    file = io.BytesIO()
    image = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(image)).save(file, 'JPEG', quality=quality)
    decoded = np.array(Image.open(file))
    return decoded[None] if decoded.ndim == 2 else decoded.transpose(2, 0, 1)


def views(data, x):
    """Yield (group, name, images): every version of the test images x, in their order."""
    yield 'natural', 'natural', x
    if data.name == 'shapes':

        def drawn(variant):
            images, _ = common.make_shapes(len(x), 'test', x.shape[-1], variant)
            return common.to_float(images).to(x.device)

        yield 'texture-less', 'flat fill', drawn('outline_only')
        silhouette, edges = drawn('silhouette'), drawn('edges')
        yield 'texture-less', 'silhouette', silhouette
        yield 'texture-less', 'silhouette inverted', 1 - silhouette
    else:
        edges = outlines(x)
    yield 'texture-less', 'edges', edges
    yield 'texture-less', 'edges inverted', 1 - edges
    yield 'texture-less', 'black and white', black_and_white(x)
    for level in SATURATION:
        yield 'texture-less', f'saturation {level}', common.saturate(x, level)
    for k in SCRAMBLES:
        if x.shape[-1] % k == 0:
            yield 'shape-less', f'scrambled {k}x{k}', common.permute_patches(x, derangement(k))
    if data.name == 'shapes':
        yield 'shape-less', 'texture fills frame', drawn('texture_only')
    for name in CORRUPTIONS:
        for severity in range(5):
            yield name, str(severity + 1), corrupt(x, name, severity)
    for band in BANDS:
        yield 'low-pass', str(band), low_pass(x, band)
        yield 'high-pass', str(band), high_pass(x, band)


def read_stimuli(folder, categories, size, device):
    """Geirhos' stimuli whose shape and texture are both among the categories.

    folder: <shape>/<shape><n>-<texture><m>.png or .jpg. Returns x (N, 3, S, S) in [0, 1] and
    shape, texture (N,) int64. Raises UserError.
    """
    files, kept = image_files(folder), []
    for path in files:
        match = re.fullmatch(r'([a-z]+)\d+-([a-z]+)\d+', path.stem)
        if not match:
            raise common.UserError(f'{path} is not named <shape><n>-<texture><m>')
        if set(match.groups()) <= set(categories):
            kept.append((path, *(list(categories).index(c) for c in match.groups())))
    if not kept:
        raise common.UserError(f"{folder} holds no stimulus of the network's classes")
    x = torch.stack([read_image(path, size) for path, _, _ in kept])
    shape, texture = (torch.tensor([k[i] for k in kept]) for i in (1, 2))
    common.log.info(
        '%s: %d of %d stimuli have shape and texture among %s', folder, len(kept), len(files), ', '.join(categories)
    )
    return x.to(device), shape, texture


def read_class_folder(folder, categories, size, device):
    """(x, category) of <category>/*.png; None where there is no such folder."""
    kept = (
        [(p, list(categories).index(p.parent.name)) for p in image_files(folder) if p.parent.name in categories]
        if Path(folder).is_dir()
        else []
    )
    if not kept:
        return None
    return (torch.stack([read_image(p, size) for p, _ in kept]).to(device), torch.tensor([c for _, c in kept]))


def image_files(folder):
    if not Path(folder).is_dir():
        raise common.UserError(f'no folder {folder}; see --help for what belongs there')
    return sorted(p for p in Path(folder).glob('*/*') if p.suffix in ('.png', '.jpg', '.jpeg'))


def read_image(path, size, channels=3):
    """One image file as (C, S, S) in [0, 1]; smaller by averaging, as suits 32 pixels."""
    try:
        with Image.open(path) as image:
            a = np.array(image.convert('RGB' if channels == 3 else 'L'))
    except Exception as error:
        raise common.UserError(f'{path} cannot be read ({type(error).__name__})')
    x = torch.from_numpy(a.reshape(1, *a.shape[:2], channels)).permute(0, 3, 1, 2)
    return F.interpolate(common.to_float(x), (size, size), mode='area')[0]


# ---------------------------------------------------------------- simplicity 1: smoother filters


def total_variation(a):
    """Sum of |differences| of vertical and horizontal neighbours: (..., H, W) -> (...)."""
    return a.diff(dim=-2).abs().sum((-2, -1)) + a.diff(dim=-1).abs().sum((-2, -1))


def first_filters(model):
    """Weights of the first convolution over pixels: (O, C, k, k)."""
    weight = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight.detach()
    if isinstance(model, common.SmallCNN):  # sees 2 x 2 pixels as channels
        weight = F.pixel_shuffle(weight, 2)
    return weight.float().cpu()


def filter_smoothness(weight):
    """(TV / L1 (O,), share of energy above a quarter cycle per pixel (O,)) of each filter
    (O, C, k, k); both are free of the filter's scale. nan for filters of zeros."""
    size = weight.abs().sum((1, 2, 3))
    tv = total_variation(weight).sum(1) / size
    energy = torch.fft.fft2(weight, s=(16, 16)).abs().square().sum(1)
    high = energy[:, radius_map(16, 16, weight.device) > 0.5].sum(1) / energy.sum((1, 2))
    return tv, high


def smoothness(model):
    """Per layer: TV / L1 and high-frequency energy of every filter; first filters to look at."""
    layers = []
    first = first_filters(model)
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1:
            weight = m.weight.detach().float().cpu() if layers else first
            tv, high = filter_smoothness(weight)
            layers.append(dict(name=name.removesuffix('.conv'), tv=common.pack(tv), high=common.pack(high)))
    return dict(layers=layers, filters=common.pack(first.half()))


def map_variation(model, x):
    """TV of the activation maps on x and on x with noise, per stage: the mean over images of
    each channel (2, C)."""
    noise = torch.randn(x.shape, generator=make_generator('tv-noise')).to(x.device)
    noisy, stages = (x + TV_NOISE * noise).clamp(0, 1), []
    for (name, a), (_, b) in zip(stage_maps(model, x), stage_maps(model, noisy)):
        tv, tv_noisy = total_variation(a), total_variation(b)
        both = torch.stack((tv.mean(0), tv_noisy.mean(0)))
        stages.append(dict(name=name, channel=common.pack(both)))
    return stages


# ---------------------------------------------------------- simplicity 2: lower-level concepts

COLOURS = ('dark grey', 'light grey', 'red', 'yellow', 'green', 'cyan', 'blue', 'magenta')


def colour_names(x):
    """Index into COLOURS of every pixel: (..., 3, H, W) -> (..., H, W); grey where max - min is
    below 0.12."""
    r, g, b = x.unbind(-3)
    top, low = x.amax(-3), x.amin(-3)
    hue = torch.atan2(3**0.5 * (g - b), 2 * r - g - b)  # radians, red at 0
    sector = (hue / (math.pi / 3)).round().long() % 6
    return torch.where(top - low < 0.12, (top + low > 1).long(), sector + 2)


def make_probe(n, size, device):
    """Images of `shapes` with every pair of outline and texture equally often, and pixel-exact
    masks: colours of all pixels; texture, outline (both: the object's pixels); layout.

    Returns dict: x (n, 3, S, S); masks (n, K, S, S) bool; null, of the same shape, the masks of
    other images, for texture and outline the image's own object with the label of another, so
    that finding the object is not yet to know what it is; concepts [(category, name)]; labels
    {name: (n,)} of the images.
    """
    generator, i = make_generator('probe', common.SHAPES_VERSION), torch.arange(n)
    params = common.shape_parameters(n, generator, outline=i % 10, texture=i // 10 % 10)
    drawn = common.render_shapes(params, size)
    noise = common.SHAPES['noise'] * torch.randn(drawn['image'].shape, generator=generator)
    inside, edge = drawn['mask'] > 0.5, drawn['edge'] > 0.5
    colour = colour_names(drawn['image'])
    other = torch.randperm(n, generator=make_generator('other masks'))
    masks = [colour[:, None] == torch.arange(8)[:, None, None]]
    null, concepts = [masks[0][other]], [('colour', c) for c in COLOURS]
    for category, names in (('texture', common.TEXTURES), ('outline', common.OUTLINES)):
        label = params[category][:, None] == torch.arange(10)
        masks.append(inside & label[:, :, None, None])
        null.append(inside & label[other][:, :, None, None])
        concepts += [(category, name) for name in names]
    masks.append(torch.cat((inside & ~edge, edge, ~inside & ~edge), 1))
    null.append(masks[-1][other])
    concepts += [('layout', name) for name in ('object', 'edge', 'background')]
    object_colour = colour_names(params['colour'][:, :, None, None])[:, 0, 0]
    labels = dict(outline=params['outline'], texture=params['texture'], colour=object_colour)
    labels['joint'] = (object_colour * 10 + params['texture']) * 10 + params['outline']
    return dict(
        x=(drawn['image'] + noise).clamp(0, 1).to(device),
        labels=labels,
        masks=torch.cat(masks, 1),
        null=torch.cat(null, 1),
        concepts=concepts,
    )


def read_probe(folder, size, channels, device):
    """A probe from files: images/<name>.png and masks/<category>/<concept>/<name>.png, white
    where the concept is; a missing mask is empty."""
    files = sorted(p for p in Path(folder, 'images').glob('*') if p.suffix in ('.png', '.jpg', '.jpeg'))
    concepts = sorted((p.parent.name, p.name) for p in Path(folder, 'masks').glob('*/*') if p.is_dir())
    if not files or not concepts:
        raise common.UserError(f'{folder} needs images/<name>.png and masks/<category>/<concept>/<name>.png')
    masks = torch.zeros(len(files), len(concepts), size, size, dtype=torch.bool)
    for i, path in enumerate(files):
        for j, concept in enumerate(concepts):
            mask = Path(folder, 'masks', *concept, path.stem + '.png')
            if mask.exists():
                masks[i, j] = read_image(mask, size, 1)[0] > 0.5
    x = torch.stack([read_image(p, size, channels) for p in files]).to(device)
    other = torch.randperm(len(files), generator=make_generator('other masks'))
    names = {'color': 'colour', 'object': 'outline'}  # Broden's
    return dict(
        x=x, labels={}, masks=masks, null=masks[other], concepts=[(names.get(c, c), name) for c, name in concepts]
    )


def dissect(maps, masks, null, categories, taus=TAUS):
    """Intersection over union of units and concepts (Bau et al. 2017, as the authors have it).

    maps: (N, C, h, w); masks, null: (N, K, H, W) bool; categories: (K,) ints. A unit's mask is
    where its map, enlarged bilinearly, exceeds the value that a share tau of all positions does.
    IoU = I / (A + L - I): L pixels of the concept, A of the unit's mask in images where the
    mask touches a concept of the same category. Returns (taus, 2, C, K): IoU with the masks,
    and with the null masks.
    """
    n, c = maps.shape[:2]
    values = maps.transpose(0, 1).flatten(1)
    at = values.shape[1] - 1 - (torch.tensor(taus) * values.shape[1]).long()
    levels = torch.stack([v.sort()[0][at.to(v.device)] for v in values])  # (C, taus)
    groups = F.one_hot(torch.as_tensor(categories)).T.to(maps.device).float()  # (G, K)
    both, area = (maps.new_zeros(len(taus), 2, c, masks.shape[1]) for _ in range(2))
    elements = 2**26 if maps.is_cuda else 2**20  # at a time; these stay in a CPU's cache
    batch = max(1, elements // (c * masks[0, 0].numel()))
    for i in range(0, n, batch):
        a = F.interpolate(maps[i : i + batch], masks.shape[-2:], mode='bilinear').flatten(2)
        pair = [m[i : i + batch].to(maps.device).flatten(2).float() for m in (masks, null)]
        on = torch.empty_like(a)  # (n, C, pixels), 1.0 or 0.0
        for t in range(len(taus)):
            torch.gt(a, levels[:, t, None], out=on)
            for s, m in enumerate(pair):
                hit = torch.bmm(on, m.transpose(1, 2))  # (n, C, K)
                touched = (hit @ groups.T > 0).float() @ groups  # back to (n, C, K)
                both[t, s] += hit.sum(0)
                area[t, s] += (on.sum(2, keepdim=True) * touched).sum(0)
    size = torch.stack([m.sum((0, 2, 3)) for m in (masks, null)]).to(maps.device).float()
    return both / (area + size[:, None] - both).clamp(min=1)


def detectors(iou, cut=IOU, lift=LIFT):
    """(..., 2, C, K) of `dissect` -> which unit detects which concept (..., C, K) bool."""
    own, null = iou.unbind(-3)
    return (own > cut) & (own > lift * null)


def unit_labels(iou):
    """The concept of largest IoU among those that a unit detects, -1 for none: (..., C)."""
    found = detectors(iou)
    best = torch.where(found, iou.select(-3, 0), -1.0)
    return torch.where(found.any(-1), best.argmax(-1), -1)


# ------------------------------------------------------- simplicity 3: fewer types of inputs


def effective_number(labels):
    """exp of the entropy of the labels of each row: (C, T) -> (C,)."""
    out = []
    for row in labels:
        p = row.bincount().float() / len(row)
        out.append(torch.special.entr(p).sum().exp())
    return torch.stack(out)


def patches_at(x, rows, columns):
    """PATCH x PATCH pixels around (row, column) of each image, reflected at the border."""
    half = PATCH // 2
    x = F.pad(x, (half,) * 4, mode='reflect')
    span = torch.arange(PATCH, device=x.device)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return x[image, :, (rows[:, None] + span)[:, :, None], (columns[:, None] + span)[:, None]]


def mean_distance(patches):
    """Mean distance of all pairs of rows: (T, D) -> ()."""
    n = len(patches)
    return torch.cdist(patches, patches).sum() / (n * (n - 1))


def input_types(model, probe):
    """What the images that excite a channel most have in common, per stage and channel: the
    effective number of each label among the TOP, and the distance of their patches around the
    maximum (blurred), relative to random patches."""
    x, labels = probe['x'], probe['labels']
    smooth, size = blur(x, 1.0), x.shape[-1]
    top = min(TOP, len(x) // 2)
    generator = make_generator('patches')
    where = torch.randint(size, (2, min(len(x), 500)), generator=generator).to(x.device)
    random = mean_distance(patches_at(smooth[: where.shape[1]], *where).flatten(1))
    stages = []
    for name, a in stage_maps(model, x):
        peak, at = a.flatten(2).max(2)  # (N, C)
        dead = peak.amax(0) == peak.amin(0)
        best = peak.topk(top, 0)[1].T  # (C, top)
        row = dict(name=name)
        for label, values in labels.items():
            number = effective_number(values.to(x.device)[best])
            row[label] = common.pack(torch.where(dead, math.nan, number))
        h, w = a.shape[-2:]
        distance = []
        for c in range(a.shape[1]):
            place = at[best[c], c]
            rows, columns = ((v.float() + 0.5) * size / s for v, s in ((place // w, h), (place % w, w)))
            found = patches_at(smooth[best[c]], rows.long(), columns.long())
            distance.append(mean_distance(found.flatten(1)) / random)
        row['patches'] = common.pack(torch.where(dead, math.nan, torch.stack(distance)))
        stages.append(row)
    chance = {
        label: effective_number(
            torch.stack([values[torch.randperm(len(x), generator=generator)[:top]] for _ in range(100)])
        )
        .mean()
        .item()
        for label, values in labels.items()
    }
    return dict(stages=stages, top=top, chance=chance | dict(patches=1.0))


# -------------------------------------------------------------------------------- ablation


def ablate_channels(model, x, groups, shape, texture, most, batch=250):
    """Zero each channel of each stage in turn, at most so many, evenly spaced. Per stage: the
    channels, and how many of the images decided for the shape, and for the texture, are decided
    so no longer: (2, channels)."""
    parts, stages, a = pieces(model), [], x
    shape, texture = shape.to(x.device), texture.to(x.device)
    with common.frozen(model), torch.no_grad():
        decided = decide(torch.cat([common.final_logits(model(b)) for b in x.split(batch)]), groups)
        for j, (name, function) in enumerate(parts[:-1]):
            a = torch.cat([function(b) for b in a.split(batch)])
            n = a.shape[1]
            chosen = np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))
            lost = []
            for c in chosen:
                logits = []
                for b in a.split(batch):
                    b = b.clone()
                    b[:, c] = 0
                    for _, after in parts[j + 1 :]:
                        b = after(b)
                    logits.append(b)
                now = decide(torch.cat(logits), groups)
                lost.append([((decided == cue) & (now != cue)).sum().item() for cue in (shape, texture)])
            stages.append(dict(name=name, channels=chosen.tolist(), lost=np.array(lost).T))
    return dict(stages=stages, decided=[(decided == cue).sum().item() for cue in (shape, texture)])


def accuracy_without(model, x, y, zeroed, batch=250):
    """Accuracy with channels zeroed in every stage at once; zeroed: {stage: channels}."""
    correct = 0
    with common.frozen(model), torch.no_grad():
        for a, b in zip(x.split(batch), y.split(batch)):
            for name, function in pieces(model):
                a = function(a)
                if len(zeroed.get(name, ())):
                    a[:, zeroed[name]] = 0
            correct += (a.argmax(1) == b).sum().item()
    return correct / len(y)


def ablate_concepts(models, found, concepts, sets, y):
    """Zero the units of one concept in S and R, in each stage as many in one as in the other,
    those of highest IoU first; and as many random units, three times.

    found: {arm: {stage: IoU (2, C, K) at TAU}}; sets: {name: images}. Returns {category:
    {concepts, channels: numbers, arm: {set: mean over the concepts of [accuracy, without the
    units, without random ones]}}}; concepts that no stage has in both are left out.
    """
    label = {arm: {stage: unit_labels(iou) for stage, iou in stages.items()} for arm, stages in found.items()}
    whole = {(arm, name): accuracy_without(models[arm], x, y, {}) for arm in models for name, x in sets.items()}
    out = {
        c: dict(concepts=0, channels=0) | {arm: {n: [] for n in sets} for arm in models}
        for c in dict.fromkeys(c for c, _ in concepts)
    }
    for k, (category, _) in enumerate(concepts):
        chosen = {arm: {} for arm in models}
        for stage in next(iter(found.values())):
            units = {arm: (label[arm][stage] == k).nonzero()[:, 0] for arm in models}
            few = min(map(len, units.values()))
            for arm in models:
                iou = found[arm][stage][0, units[arm], k]
                chosen[arm][stage] = units[arm][iou.argsort(descending=True, stable=True)[:few]]
        number = sum(map(len, next(iter(chosen.values())).values()))
        if not number:
            continue
        out[category]['concepts'] += 1
        out[category]['channels'] += number
        for arm, model in models.items():
            for name, x in sets.items():
                generator = make_generator('random channels', k)
                random = [
                    accuracy_without(
                        model,
                        x,
                        y,
                        {
                            stage: torch.randperm(found[arm][stage].shape[1], generator=generator)[: len(units)]
                            for stage, units in chosen[arm].items()
                        },
                    )
                    for _ in range(3)
                ]
                out[category][arm][name].append(
                    [whole[arm, name], accuracy_without(model, x, y, chosen[arm]), np.mean(random)]
                )
    for row in out.values():
        for arm in models:
            row[arm] = {name: np.mean(v, 0).tolist() if v else None for name, v in row[arm].items()}
    return out


# --------------------------------------------------------------------------- dimensionality


def factor_pairs(n, size, factor, device):
    """Two sets of n images, pair by pair alike in `factor` ('outline' or 'texture') alone."""
    i = torch.arange(n)
    shared, first, second = i % 10, (i // 10) % 10, (i // 10 + 1 + i // 100 % 9) % 10
    out = []
    for part, other in (('a', first), ('b', second)):
        generator = make_generator('pairs', common.SHAPES_VERSION, factor, part)
        cues = dict(outline=shared, texture=other) if factor == 'outline' else dict(outline=other, texture=shared)
        params = common.shape_parameters(n, generator, **cues)
        image = common.render_shapes(params, size)['image']
        noise = common.SHAPES['noise'] * torch.randn(image.shape, generator=generator)
        out.append((image + noise).clamp(0, 1).to(device))
    return out


def covariance_terms(za, zb):
    """Per pair: (sum over units of the product of deviations, of their mean square), whose
    ratio of means is rho, 1 for equal and 0 for unrelated features (Islam et al. 2021)."""
    mean = torch.cat((za, zb)).mean(0)
    a, b = za - mean, zb - mean
    return (a * b).sum(1), (a.square() + b.square()).sum(1) / 2


def dimension_shares(rho_outline, rho_texture):
    """Shares of the dimensions for outline, texture and the rest: softmax over (rho, rho, 1)."""
    e = np.exp([rho_outline, rho_texture, 1.0])
    return e / e.sum()


def dimensions(model, pairs):
    """Per stage, of the mean activations: {factor: terms (2, n)}."""
    stages = []
    for factor, (a, b) in pairs.items():
        for j, ((name, u), (_, v)) in enumerate(zip(stage_maps(model, a), stage_maps(model, b))):
            terms = covariance_terms(u.mean((2, 3)).double(), v.mean((2, 3)).double())
            if j == len(stages):
                stages.append(dict(name=name))
            stages[j][factor] = common.pack(torch.stack(terms).float())
    return stages


# ---------------------------------------------------------------------------- the experiment


def draw_images(n, key, size, texture, reverse=False):
    """(x uint8, outline, texture) of `shapes` with outline 0, 1, ..., 9, 0, ... and the textures
    given (n,); reverse: faint outlines and strong textures (REVERSED)."""
    generator = make_generator('shape-bias', common.SHAPES_VERSION, key)
    params = common.shape_parameters(n, generator, texture=texture)
    if reverse:
        way = params['colour'] - params['background']
        low, high = REVERSED['distance']
        reach = low + (high - low) * torch.rand(n, 1, generator=generator)
        way = way / way.abs().amax(1, keepdim=True) * reach
        params['colour'] = (params['background'] + way).clamp(0.05, 0.95)
        low, high = REVERSED['contrast']
        params['contrast'] = low + (high - low) * torch.rand(n, generator=generator)
    image = torch.cat(
        [
            common.render_shapes({k: v[i : i + 1000] for k, v in params.items()}, size)['image']
            for i in range(0, n, 1000)
        ]
    )
    image = image + common.SHAPES['noise'] * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().byte(), params['outline'], params['texture']


def training_textures(n, reverse):
    """Textures for outlines 0, 1, ..., 9, 0, ...: random; with `reverse` as many of them agree
    as REVERSED says."""
    generator = make_generator('textures', 'reversed' if reverse else 'random')
    texture = torch.randint(10, (n,), generator=generator)
    if reverse:
        agree = torch.rand(n, generator=generator) < REVERSED['agreement']
        texture = torch.where(agree, torch.arange(n) % 10, texture)
    return texture


def retextured(data, reverse):
    """`shapes` for other trainings; the label is always the outline. Without `reverse` textures
    are random; with it they are REVERSED."""
    n, m, size = len(data.train[1]), len(data.val[1]), data.shape[-1]
    images = draw_images(n + m, 'reversed' if reverse else 'random', size, training_textures(n + m, reverse), reverse)
    x, y, _ = (v.to(data.val[1].device) for v in images)
    return common.Data('shapes', data.classes, (x[:n], y[:n]), (x[n:], y[n:]), data.test, data.pad, data.flip)


def build(arch, classes, shape, seed, stem=0):
    """make_model, with a first convolution of `stem` x `stem` pixels where asked for: filters
    of 3 x 3 have little to be smooth with."""
    model = common.make_model(arch, classes, shape, seed)
    if stem:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.conv1 = nn.Conv2d(shape[0], model.conv1.out_channels, stem, 1, stem // 2, bias=False)
    return model


def arm_names(args):
    """{arm: (method, eps)} of the networks that are trained, weakest first, and the name of
    the main robust one."""

    def name(eps):
        return common.eps_text(dict(norm=args.norm, eps=eps))

    arms = {'untrained': (None, 0.0), 'standard': ('standard', 0.0)}
    arms |= {name(eps): ('pgd', eps) for eps in args.ladder}
    if args.dataset == 'shapes':
        arms['random textures'] = ('standard', 0.0)
    return arms, name(args.eps)


def at_eps(args, eps):
    """args for another eps, its step in proportion."""
    return argparse.Namespace(**vars(args) | dict(eps=eps, step_size=args.step_size * (eps / args.eps)))


def train_arms(args, data, arms, seed, device, results, rows):
    """{arm: network}, trained or taken from runs/models, and for `shapes` the two of the
    reversed control."""

    def train(name, data, method, eps, extra):
        setting = at_eps(args, eps) if eps else args
        common.log.info('%s (seed %d)', name, seed)
        trained = common.train_model(setting, data, method, seed, device, build=builder, extra=extra or None)
        results[f'collapsed-{name}-s{seed}'] = trained['collapsed']
        rows.extend(dict(arm=name) | h for h in trained['history'])
        return common.restore(trained, 'best', args, data, device, builder)

    builder = partial(build, stem=args.stem)
    extra, models, pair = dict(stem=args.stem) if args.stem else {}, {}, {}
    for name, (method, eps) in arms.items():
        if method is None:
            models[name] = builder(args.arch, len(data.classes), data.shape, seed).to(device)
            continue
        other = name == 'random textures'
        models[name] = train(
            name,
            retextured(data, False) if other else data,
            method,
            eps,
            extra | (dict(textures='random') if other else {}),
        )
    if data.name == 'shapes':
        other = retextured(data, True)
        for name, method, eps in (('standard', 'standard', 0), ('robust', 'pgd', args.eps)):
            pair[name] = train(f'reversed {name}', other, method, eps, extra | dict(reversed=REVERSED))
    return models, pair


def given_arms(args, classes, shape, device):
    """{'standard', 'robust': network} from --weights and --robust-weights."""
    if len(classes) != 1000 and 'IMAGENET1K_V1' in (args.weights, args.robust_weights):
        raise common.UserError(f'IMAGENET1K_V1 has 1000 classes, {args.dataset} {len(classes)}')
    models = {}
    for seed, (name, weights) in enumerate((('standard', args.weights), ('robust', args.robust_weights))):
        if weights:
            models[name] = (
                common.make_model(args.arch, len(classes), shape, seed, None if weights == 'random' else weights)
                .to(device)
                .eval()
            )
    return models


def measure_views(args, data, models):
    """{arm: {'group/name': correct}} on every view of the test images and under PGD-20."""
    x, y = data.test
    x, out = common.to_float(x), {arm: {} for arm in models}
    for group, name, image in views(data, x):
        for arm, model in models.items():
            out[arm][f'{group}/{name}'] = common.pack(common.correct_under(model, image, y))
    for arm, model in models.items():
        out[arm]['attack/PGD-20'] = common.pack(right_under_attack(args, model, x, y))
    return out


def right_under_attack(args, model, x, y):
    """Which images are right under PGD-20 on the margin: (N,) bool."""
    attack = partial(
        common.pgd,
        eps=args.eps,
        norm=args.norm,
        steps=20,
        step_size=args.eps / 4,
        loss='margin',
        drop_fooled=True,
        generator=make_generator('test', device=x.device),
    )
    return common.correct_under(model, x, y, attack)


def conflict_sets(data, stimuli):
    """{name: (images, cue 1, cue 2, groups)}: images on which two cues name two classes."""
    sets = {}
    if data:
        x, y = common.to_float(data.test[0]), data.test[1]
        singles = [[k] for k in range(len(data.classes))]
        if data.name == 'shapes':
            image, shape, texture = draw_images(CONFLICTS, 'conflict', x.shape[-1], common.conflict_textures(CONFLICTS))
            sets['shapes'] = common.to_float(image).to(x.device), shape, texture, singles
        other = partners(y)
        sets['phase'] = phase_of(x, x[other]), y, y[other], singles
        sets['low'] = hybrid(x, x[other]), y, y[other], singles
    if stimuli:
        image, shape, texture, groups = stimuli['conflict']
        sets['stimuli'] = image, shape, texture, list(groups.values())
    return sets


def measure_conflicts(models, sets, stimuli, classes):
    """{arm: {set: decisions}}. 'stimuli, all classes': among all classes, -1 for those that are
    no category; SINGLE: whether the category is right."""
    out = {arm: {} for arm in models}
    for arm, model in models.items():
        for name, (x, _, _, groups) in sets.items():
            logits = common.logits_of(model, x)
            out[arm][name] = common.pack(decide(logits, groups).short())
            if name == 'stimuli' and len(classes) != 1000:
                category = torch.full((len(classes),), -1, dtype=torch.long)
                for i, group in enumerate(groups):
                    category[group] = i
                out[arm]['stimuli, all classes'] = common.pack(category[logits.argmax(1).cpu()].short())
        for name in SINGLE:
            if stimuli and stimuli[name]:
                x, y = stimuli[name]
                groups = list(stimuli['conflict'][3].values())
                out[arm][name] = common.pack(decide(common.logits_of(model, x), groups).cpu() == y)
    return out


def measure_concepts(data, models, main, probe):
    """Dissection of every network at every threshold, and concept ablation of S and R."""
    names = [category for category, _ in probe['concepts']]
    ids = [sorted(set(names)).index(c) for c in names]
    named = [i for i, c in enumerate(names) if c != 'layout']
    out, found = {}, {}
    for arm, model in models.items():
        out[arm], found[arm] = [], {}
        for stage, maps in stage_maps(model, probe['x']):
            iou = dissect(maps, probe['masks'], probe['null'], ids, TAUS)
            found[arm][stage] = iou[TAUS.index(TAU)].cpu()
            out[arm].append(
                dict(
                    name=stage,
                    label=common.pack(unit_labels(iou).short()),
                    uncut=common.pack(iou[:, 0].argmax(-1).short()),
                    number=common.pack(detectors(iou)[..., named].sum(-1).short()),
                )
            )
    ablation = None
    if data and 'standard' in models and main in models:
        some = evenly(len(data.test[1]), 250)
        x, y = (v[some.to(v.device)] for v in data.test)
        x = common.to_float(x)
        sets = dict(natural=x, noise=corrupt(x, 'noise', 1))
        if x.shape[-1] % 2 == 0:
            sets['scrambled'] = common.permute_patches(x, derangement(2))
        if data.name == 'shapes':
            flat, _ = common.make_shapes(len(data.test[1]), 'test', x.shape[-1], 'outline_only')
            sets['flat fill'] = common.to_float(flat[some]).to(x.device)
        pair = {arm: models[arm] for arm in ('standard', main)}
        ablation = ablate_concepts(pair, {arm: found[arm] for arm in pair}, probe['concepts'], sets, y)
    return dict(arms=out, ablation=ablation)


def measure_reversed(pair, size, args, y_device):
    """Decisions of the two networks of the reversed control on its own conflicts, and accuracy
    on new images whose texture agrees with the outline."""
    x, outline, texture = draw_images(CONFLICTS, 'reversed conflict', size, common.conflict_textures(CONFLICTS), True)
    plain, y, _ = draw_images(PROBES // 2, 'reversed test', size, None, True)
    x, plain, y = (v.to(y_device) for v in (x, plain, y))
    out = dict(outline=common.pack(outline.short()), texture=common.pack(texture.short()), images=common.pack(x[:4]))
    for name, model in pair.items():
        out[name] = dict(
            decisions=common.pack(common.logits_of(model, common.to_float(x)).argmax(1).short()),
            natural=common.correct_under(model, plain, y).float().mean().item(),
            robust=right_under_attack(args, model, plain, y).float().mean().item(),
        )
    return out


def identity(path):
    """Its name and contents, free of where a file or folder lies."""
    path = Path(path)
    files = sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]
    if not path.exists():
        return path.name
    digest = hashlib.sha1()
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else ''
        digest.update(name.encode() + file.read_bytes())
    return f'{path.name}-{digest.hexdigest()[:10]}'


def check(args):
    """What argparse cannot see. Raises UserError."""
    if args.robust_weights and not args.weights:
        raise common.UserError('--robust-weights needs --weights for the standard network')
    if args.weights and len(args.seeds) > 1:
        raise common.UserError('--weights gives one network: use one of --seeds')
    if args.stem and (args.weights or not args.arch.startswith(('resnet18', 'preact', 'wrn'))):
        raise common.UserError('--stem goes with resnet18, preact-resnet18 and wrn-* trained here')
    if args.stem and args.stem % 2 == 0:
        raise common.UserError('--stem must be odd')
    if args.norm == 'linf' and args.ladder and max(args.ladder) >= 1:
        raise common.UserError(
            f'--ladder {max(args.ladder):g} is outside (0, 1); did you mean {max(args.ladder):g}/255?'
        )
    torchvisions = args.arch in ('alexnet', 'googlenet', 'resnet50')
    if not torchvisions and 'IMAGENET1K_V1' in (args.weights, args.robust_weights):
        raise common.UserError('IMAGENET1K_V1 goes with alexnet, googlenet and resnet50')
    imagenet = args.weights and args.dataset == 'shapes' and torchvisions
    if imagenet and not args.cue_conflict_dir:
        raise common.UserError(
            f'--arch {args.arch} with --weights needs --cue-conflict-dir, or its images with --dataset folder:PATH'
        )
    return bool(imagenet)


def study(args):
    """Train and measure; returns (folder, results)."""
    device = common.pick_device(args.device)
    imagenet = check(args)
    args.channels = args.channels or (128 if not imagenet and args.image_size <= 64 else 16)
    args.ladder = sorted({*(args.ladder or [f * args.eps for f in LADDER]), args.eps})
    paths = {k: getattr(args, k) for k in ('cue_conflict_dir', 'probe_dir', 'weights', 'robust_weights')}
    for key, path in paths.items():  # results do not depend on where files lie
        setattr(args, key, path and identity(path))
    if args.cue_conflict_dir:
        args.cue_conflict_dir += ''.join(
            '-' + identity(p).rsplit('-')[-1] for p in beside(paths['cue_conflict_dir']).values() if p.is_dir()
        )
    folder, config = common.start_run('shape_bias', args)
    vars(args).update(paths)
    data, shape, classes = None, (3, args.image_size, args.image_size), range(1000)
    if imagenet:
        shape = (3, 224, 224)
    else:
        data = common.study_data(args, device)
        shape, classes = data.shape, data.classes
    results = common.load_results(folder, config, __file__, args.fresh)
    stimuli = load_stimuli(args.cue_conflict_dir, classes, shape, device)
    sets = conflict_sets(data, stimuli)
    probe = natural_probe(data, sets, device)
    masked = (
        read_probe(args.probe_dir, shape[-1], shape[0], device)
        if args.probe_dir
        else probe
        if 'masks' in probe
        else None
    )
    arms, main = (
        arm_names(args)
        if not args.weights
        else (dict.fromkeys(['standard', 'robust'][: 1 + bool(args.robust_weights)]), 'robust')
    )
    results |= dict(
        arms=list(arms),
        robust=main,
        classes=list(classes),
        shape=shape,
        eps={a: v[1] for a, v in arms.items() if v},
        groups=list(stimuli['conflict'][3]) if stimuli else [],
        cues={n: dict(shape=common.pack(s[1].short()), texture=common.pack(s[2].short())) for n, s in sets.items()},
        concepts=masked['concepts'] if masked else [],
    )
    rows, pair = [], {}
    for seed in args.seeds:
        if args.weights:
            models = given_arms(args, classes, shape, device)
        else:
            models, pair = train_arms(args, data, arms, seed, device, results, rows)
            common.write_metrics(folder / 'metrics.csv', rows)

        def measure(part, function, seed=seed):
            common.log.info('measuring %s', part)
            return common.measure(results, f'{part}-s{seed}', function, folder)

        if data:
            measure('views', lambda: measure_views(args, data, models))
        measure('conflict', lambda: measure_conflicts(models, sets, stimuli, classes))
        measure('filters', lambda: {arm: smoothness(m) for arm, m in models.items()})
        some = evenly(len(probe['x']), 500).to(device)
        measure('maps', lambda: {arm: map_variation(m, probe['x'][some]) for arm, m in models.items()})
        measure('inputs', lambda: {arm: input_types(m, probe) for arm, m in models.items()})
        if masked:
            measure('concepts', lambda: measure_concepts(data, models, main, masked))
        exact = sets.get('shapes') or sets.get('stimuli')
        if exact:
            x, first, second, groups = exact
            measure(
                'ablation',
                lambda: {
                    arm: ablate_channels(m, x, groups, first, second, args.channels)
                    for arm, m in models.items()
                    if arm != 'untrained'
                },
            )
        if pair:
            pairs = {f: factor_pairs(PAIRS, shape[-1], f, device) for f in ('outline', 'texture')}
            measure('dimensions', lambda: {arm: dimensions(m, pairs) for arm, m in models.items()})
            measure('reversed', lambda: measure_reversed(pair, shape[-1], args, device))
    common.measure(results, 'gallery', lambda: gallery(data, sets, stimuli), folder)
    return folder, common.finish(folder, results)


def beside(folder):
    """Where the other stimuli lie, in the layout of Geirhos' repository."""
    parent = Path(folder).resolve().parent
    return dict(edges=parent / 'edges', silhouettes=parent / 'filled-silhouettes')


def load_stimuli(folder, classes, shape, device):
    """Geirhos' stimuli for a network's categories: dict conflict (x, shape, texture, groups);
    congruent (shape and texture agree), edges and silhouettes: (x, category) or None. None
    without a folder."""
    if not folder:
        return None
    if shape[0] != 3:
        raise common.UserError('--cue-conflict-dir needs a data set in colour')
    groups = category_groups(classes)
    if len(groups) < 2:
        raise common.UserError(
            '--cue-conflict-dir: fewer than two classes of the data set are among ' + ', '.join(SIXTEEN)
        )
    others = {name: read_class_folder(path, groups, shape[-1], device) for name, path in beside(folder).items()}
    x, first, second = read_stimuli(folder, groups, shape[-1], device)
    conflict = first != second
    if not conflict.any():
        raise common.UserError(f'{folder} holds no stimulus whose shape and texture differ')
    agreeing = (x[~conflict], first[~conflict]) if not conflict.all() else None
    return dict(conflict=(x[conflict], first[conflict], second[conflict], groups), congruent=agreeing, **others)


def natural_probe(data, sets, device):
    """The images that units are probed with: `make_probe` for shapes, else up to 1000 test
    images or the stimuli."""
    if data and data.name == 'shapes':
        return make_probe(PROBES, data.shape[-1], device)
    if data:
        x, y = (v[evenly(len(v), PROBES).to(v.device)] for v in data.test)
        return dict(x=common.to_float(x), labels={'class': y.cpu()})
    x, shape, texture, _ = sets['stimuli']
    return dict(x=x, labels=dict(shape=shape, texture=texture))


def gallery(data, sets, stimuli):
    """Two images in every view, and of every conflict set, for the figures."""

    def few(x):
        return common.pack((x[:2] * 255).round().byte().cpu())

    found = {}
    if data:
        x = common.to_float(data.test[0])
        for group, name, image in views(data, x):
            if (group in CORRUPTIONS and name != '3') or ('pass' in group and name != '0.3'):
                continue
            label = name if group not in CORRUPTIONS and 'pass' not in group else f'{group} {name}'
            found[label] = few(image)
    titles = dict(shapes='cue conflict', phase='phase, amplitude', low='low + high', stimuli='stimuli')
    found |= {titles[name]: few(s[0]) for name, s in sets.items() if data or name == 'stimuli'}
    for name in SINGLE:
        if stimuli and stimuli[name]:
            found[f'stimuli: {name}'] = few(stimuli[name][0])
    return found


# ---------------------------------------------------------------------------- reading results


def runs(results, part, arm):
    """What a part measured on an arm, one entry per seed."""
    found = [results[f'{part}-s{s}'] for s in results['config']['seeds']]
    return [f['arms'][arm] if 'arms' in f else f[arm] for f in found]


def seen(results, arm, *names):
    """(seeds, images): the share of the views 'group/name' on which the arm is right."""
    return np.mean(
        [np.stack([common.unpack(r[name]) for r in runs(results, 'views', arm)]) for name in names], 0, dtype=float
    )


def kept(correct, natural, classes):
    """Accuracy above chance, as a share of the natural accuracy above chance; nan where that is
    less than 5 points. Plain ratios flatter a network of low natural accuracy, which at chance
    keeps most."""
    above = natural.mean() - 1 / classes
    return (correct.mean() - 1 / classes) / above if above > 0.05 else math.nan


def in_group(results, group):
    """The views of a group, 'group/name', in order."""
    return [v for v in runs(results, 'views', results['arms'][0])[0] if v.startswith(group + '/')]


def decided(results, arm, name):
    """Two arrays (seeds, images) of 0.0 and 1.0: decided for the first cue (shape, phase, low
    frequencies), and for the second one."""
    cues = results['cues'][name.split(',')[0]]
    shape, texture = (common.unpack(cues[c]) for c in ('shape', 'texture'))
    d = np.stack([common.unpack(r[name]) for r in runs(results, 'conflict', arm)])
    return by_cue(d, shape, texture)


def reversed_decided(results, name):
    """The same for a network of the reversed control."""
    found = [results[f'reversed-s{s}'] for s in results['config']['seeds']]
    return by_cue(
        np.stack([common.unpack(run[name]['decisions']) for run in found]),
        *(common.unpack(found[0][cue]) for cue in ('outline', 'texture')),
    )


def coverage(shape, texture):
    """Share of the conflicts decided for either cue."""
    return np.mean(shape + texture)


def congruent(results, arm, name):
    """Accuracy where the two cues of a conflict set agree; nan where there are no such images."""
    if name == 'shapes':
        return seen(results, arm, 'natural/natural').mean()
    found = [r['congruent'] for r in runs(results, 'conflict', arm) if 'congruent' in r]
    return np.mean([common.unpack(f).mean() for f in found]) if found else math.nan


def units(results, part, arm, key, stages=None):
    """(seeds, channels) of a per-channel measure, of all stages, or those numbered, in a row."""
    out = []
    for run in runs(results, part, arm):
        rows = run if isinstance(run, list) else run.get('layers', run.get('stages'))
        rows = [rows[i] for i in stages] if stages else rows
        out.append(np.concatenate([common.unpack(row[key]) for row in rows], -1))
    return np.stack(out).astype(float)


def stage_names(results, part='maps'):
    run = runs(results, part, 'standard')[0]
    return [row['name'] for row in (run if isinstance(run, list) else run.get('layers', run.get('stages')))]


def labelled(results, arm, tau=TAU, key='label'):
    """(seeds, channels): the category each unit detects at a threshold, '' for none."""
    names = np.array([category for category, _ in results['concepts']] + [''])
    return names[
        np.stack(
            [
                np.concatenate([common.unpack(stage[key])[TAUS.index(tau)] for stage in run])
                for run in runs(results, 'concepts', arm)
            ]
        )
    ]


def scores(results, arm):
    """(2, channels) of the first seed: share of the shape and of the texture decisions lost when
    a channel is zeroed; and the number of the stage of each channel."""
    run = runs(results, 'ablation', arm)[0]
    lost = np.concatenate([np.array(stage['lost']) for stage in run['stages']], 1)
    stage = np.repeat(range(len(run['stages'])), [len(s['channels']) for s in run['stages']])
    return lost / np.maximum(run['decided'], 1)[:, None], stage


def leaning(results, arm, relative=False):
    """(seeds, channels): 1 where zeroing a channel loses more of the shape decisions than of the
    texture decisions (relative: a larger share of them), 0 where fewer, nan where as many."""
    out = []
    for run in runs(results, 'ablation', arm):
        shape, texture = np.concatenate([np.array(stage['lost']) for stage in run['stages']], 1) / (
            np.maximum(run['decided'], 1)[:, None] if relative else 1
        )
        out.append(np.where(shape == texture, np.nan, shape > texture))
    return np.stack(out)


def mean(values):
    """Mean of what is finite; nan if nothing is."""
    values = values[np.isfinite(values)]
    return values.mean() if len(values) else math.nan


def conflict_name(results):
    """The set that shape bias is judged on."""
    return next((n for n in ('shapes', 'stimuli') if n in results['cues']), None)


# -------------------------------------------------------------------------------- the figures


def colours(results):
    """{arm: colour}: grey, black, reds that darken with eps, green."""
    robust = [a for a in results['arms'] if a not in ('untrained', 'standard', 'random textures')]
    reds = (
        colormaps['OrRd'](np.linspace(0.45, 0.85, len(robust))) if len(robust) > 1 else [common.METHOD_COLOURS['pgd']]
    )
    return {'untrained': '0.65', 'standard': '#000000', 'random textures': '#009E73'} | dict(zip(robust, reds))


def first_seed(results):
    """What a title adds where a figure shows one of several seeds."""
    return ' (first seed)' if len(results['config']['seeds']) > 1 else ''


def called(arm):
    """The arm in a legend."""
    return (
        f'robust, {arm}'
        if arm.startswith(('eps', 'l2'))
        else 'trained on random textures'
        if arm == 'random textures'
        else arm
    )


def draw(results, folder):
    """All figures that the run's data allow, from results.json alone."""
    parts = {key.split('-s')[0] for key in results}
    figure_views(results, folder)
    if conflict_name(results):
        figure_bias(results, folder)
    if 'views' in parts:
        figure_missing(results, folder)
        figure_corruptions(results, folder)
        figure_frequency(results, folder)
    figure_filters(results, folder)
    figure_smoothness(results, folder)
    figure_noise(results, folder)
    if results['concepts']:
        figure_dissection(results, folder)
        if runs_ablation(results):
            figure_concept_ablation(results, folder)
    figure_inputs(results, folder)
    if 'ablation' in parts:
        figure_ablation(results, folder)
    if 'dimensions' in parts:
        figure_dimensions(results, folder)
        figure_reversed(results, folder)
    if results['groups']:
        figure_stimuli(results, folder)


def figure_views(results, folder):
    shown, width = list(results['gallery'].items()), 9
    blocks = -(-len(shown) // width)
    fig, axes = common.new_figure(2 * blocks, width, 9.4, 2.25 * blocks)
    for axis in axes.ravel():
        axis.set_axis_off()
    for i, (name, images) in enumerate(shown):
        for row, image in enumerate(common.unpack(images)):
            axis = axes[2 * (i // width) + row, i % width]
            axis.set_axis_on()
            common.show_image(axis, image / 255, name.replace(' ', '\n', 1) if row == 0 else '')
            axis.title.set_fontsize(7)
    credit = '; stimuli: Geirhos et al. 2019, CC BY 4.0, resized' if results['groups'] else ''
    fig.suptitle('What the networks are shown: two images in every version' + credit)
    common.save_figure(fig, folder, 'fig1_views')


def dot(axis, at, found, **style):
    """A dot with its interval, in percent; found: (value, low, high)."""
    value, low, high = 100 * np.array(found)
    axis.errorbar(at, value, [[max(value - low, 0)], [max(high - value, 0)]], capsize=3, **style)


def points_with_intervals(axis, results, arms, interval, crosses=None, crossed=''):
    """One dot with its 95 % interval per arm, in percent; crosses: {arm: another measure}."""
    for i, arm in enumerate(arms):
        dot(axis, i, interval(arm), fmt='o', ms=6, color=colours(results)[arm])
        if crosses:
            axis.plot(i, 100 * crosses[arm], 'x', ms=6, color=colours(results)[arm], label=crossed if i == 0 else None)
    axis.set_xticks(
        range(len(arms)), [called(a).replace(' ', '\n', 2).replace('eps\n', 'eps ') for a in arms], fontsize=7
    )
    axis.set(ylim=(-3, 103), xlim=(-0.5, len(arms) - 0.5))


def figure_bias(results, folder):
    name = conflict_name(results)
    classes = results['classes'] if name == 'shapes' else results['groups']
    cues = common.unpack(results['cues'][name]['shape'])
    fig, axes = common.new_figure(1, 2, 9.0, 3.8)
    for arm in results['arms']:
        s, t = decided(results, arm, name)
        rates = [100 * shape_bias(s[:, cues == k], t[:, cues == k]) for k in range(len(classes))]
        axes[0, 0].plot(rates, range(len(classes)), 'o', ms=5, color=colours(results)[arm], label=called(arm))
        axes[0, 0].axvline(100 * shape_bias(s, t), color=colours(results)[arm], lw=1)
    axes[0, 0].set_yticks(range(len(classes)), classes)
    axes[0, 0].set(
        xlim=(-3, 103),
        xlabel='shape bias: decided for the shape, of those decided\nfor shape or texture (%); lines: all classes',
        ylabel='class of the shape',
    )
    points_with_intervals(
        axes[0, 1],
        results,
        results['arms'],
        lambda arm: common.bootstrap(shape_bias, *decided(results, arm, name)),
        {arm: coverage(*decided(results, arm, name)) for arm in results['arms']},
        'coverage: conflicts decided for either',
    )
    axes[0, 1].axhline(50, color='0.6', ls=':', lw=1)
    chance = 200 / len(classes)
    axes[0, 1].axhline(chance, color='0.6', ls='--', lw=1, label='coverage by chance')
    axes[0, 1].set(ylabel='shape bias with 95 % interval (%)')
    axes[0, 1].legend(loc='best', fontsize=7)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside upper center', ncols=5, fontsize=8)
    common.save_figure(fig, folder, 'fig2_shape_bias')


def figure_missing(results, folder):
    names = in_group(results, 'texture-less') + in_group(results, 'shape-less')
    classes = len(results['classes'])
    fig, axes = common.new_figure(1, 1, 6.4, 0.28 * len(names) + 1.6)
    axis = axes[0, 0]
    for arm in results['arms']:
        if arm == 'untrained':
            continue
        natural = seen(results, arm, 'natural/natural')
        values = [100 * kept(seen(results, arm, n), natural, classes) for n in names]
        axis.plot(values, range(len(names)), 'o', ms=6, alpha=0.8, color=colours(results)[arm], label=called(arm))
    axis.axvline(0, color='0.6', ls='--', lw=1, label='chance')
    axis.axhline(len(in_group(results, 'texture-less')) - 0.5, color='0.3', lw=0.8)
    axis.set_yticks(range(len(names)), [n.split('/')[1] for n in names])
    axis.invert_yaxis()
    axis.set(
        xlim=(-8, 108),
        xlabel='accuracy above chance, of that on natural images (%)',
        title='Above the line texture is missing, below it shape',
    )
    fig.legend(*axis.get_legend_handles_labels(), loc='outside lower center', ncols=2, fontsize=8)
    common.save_figure(fig, folder, 'fig3_missing_cues')


def figure_corruptions(results, folder):
    fig, axes = common.new_figure(2, 3, 7.6, 4.6, sharex=True, sharey=True)
    for axis, name in zip(axes.ravel(), CORRUPTIONS):
        for arm in results['arms']:
            if arm != 'untrained':
                y = [100 * seen(results, arm, v).mean() for v in ['natural/natural', *in_group(results, name)]]
                axis.plot(range(6), y, marker='o', ms=3.5, color=colours(results)[arm], label=called(arm))
        axis.axhline(100 / len(results['classes']), color='0.6', ls='--', lw=1, label='chance')
        axis.set(title=name, ylim=(-3, 103))
    for axis in axes[1]:
        axis.set_xticks(range(6), ['none', 1, 2, 3, 4, 5])
        axis.set_xlabel('severity')
    for axis in axes[:, 0]:
        axis.set_ylabel('accuracy (%)')
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=8)
    common.save_figure(fig, folder, 'fig4_corruptions')


def figure_frequency(results, folder):
    fig, axes = common.new_figure(1, 3, 9.6, 3.6)
    arms = [a for a in results['arms'] if a != 'untrained']
    for axis, group, text in ((axes[0, 0], 'low-pass', 'up to'), (axes[0, 1], 'high-pass', 'from')):
        for arm in arms:
            natural = seen(results, arm, 'natural/natural')
            y = [100 * kept(seen(results, arm, v), natural, len(results['classes'])) for v in in_group(results, group)]
            axis.plot(BANDS, y, marker='o', ms=3.5, color=colours(results)[arm], label=called(arm))
        axis.axhline(0, color='0.6', ls='--', lw=1, label='chance')
        axis.set(title=f'{group}: frequencies {text} ...', ylim=(-8, 108), xlabel='share of the Nyquist frequency')
    axes[0, 0].set_ylabel('accuracy above chance, of\nthat on natural images (%)')
    for i, (name, marker, text) in enumerate(
        (('phase', 'o', 'phase (not amplitude)'), ('low', 's', f'below {HYBRID} (not above)'))
    ):
        for j, arm in enumerate(arms):
            s, t = decided(results, arm, name)
            dot(
                axes[0, 2],
                j + 0.24 * i - 0.12,
                common.bootstrap(shape_bias, s, t),
                fmt=marker,
                color=colours(results)[arm],
                ms=5,
                label=text if j == 0 else None,
            )
    axes[0, 2].set_xticks([])
    axes[0, 2].axhline(50, color='0.6', ls=':', lw=1)
    axes[0, 2].set(title='hybrids: decided for ...', ylim=(-3, 103), ylabel='of those decided for either (%)')
    axes[0, 2].legend(fontsize=7)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=8)
    common.save_figure(fig, folder, 'fig5_frequency')


def figure_filters(results, folder):
    arms = [a for a in results['arms'] if a in ('untrained', 'standard', results['robust'])]
    filters = {a: common.unpack(runs(results, 'filters', a)[0]['filters']).astype(float) for a in arms}
    strongest = np.argsort(-np.abs(filters[arms[-1]]).sum((1, 2, 3)))[:16]
    fig, axes = common.new_figure(len(arms), len(strongest), 9.4, 0.75 * len(arms) + 0.4)
    for row, arm in zip(axes, arms):
        for axis, c in zip(row, strongest):
            w = filters[arm][c]
            w = w[:3] if len(w) >= 3 else w[:1]
            common.show_image(axis, 0.5 + 0.5 * w / max(np.abs(w).max(), 1e-9))
        row[0].set_ylabel(called(arm).replace(', ', ',\n'), rotation=0, ha='right', va='center')
    fig.suptitle(
        'First convolution: the 16 filters of largest weights in '
        f'{called(arms[-1])}, and the same channels before; each scaled to '
        'its own range, grey is 0' + first_seed(results),
        fontsize=8,
    )
    common.save_figure(fig, folder, 'fig6_filters')


def figure_smoothness(results, folder):
    fig, axes = common.new_figure(1, 3, 9.6, 3.4)
    layers = stage_names(results, 'filters')
    for axis, key, text in (
        (axes[0, 0], 'tv', 'total variation / L1 norm'),
        (axes[0, 1], 'high', 'energy above 1/4 cycle per pixel (%)'),
    ):
        for i, arm in enumerate(results['arms']):
            v = units(results, 'filters', arm, key, [0])[0] * (100 if key == 'high' else 1)
            jitter = np.random.default_rng(0).uniform(-0.2, 0.2, len(v))
            axis.plot(i + jitter, v, '.', color=colours(results)[arm], ms=4, alpha=0.6)
            axis.plot([i - 0.3, i + 0.3], [mean(v)] * 2, color=colours(results)[arm], label=called(arm))
        axis.set(title='first layer, every filter' + first_seed(results), ylabel=text, xticks=[])
    for arm in results['arms']:
        means = [mean(units(results, 'filters', arm, 'tv', [i])) for i in range(len(layers))]
        axes[0, 2].plot(range(len(layers)), means, marker='o', ms=3.5, color=colours(results)[arm])
    axes[0, 2].set(title='every layer, mean over filters', ylabel='total variation / L1 norm', xlabel='convolution')
    axes[0, 2].set_xticks(
        range(len(layers)),
        layers if len(layers) < 7 else range(1, len(layers) + 1),
        fontsize=7 if len(layers) < 7 else 6,
    )
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=8)
    common.save_figure(fig, folder, 'fig7_smoothness')


def figure_noise(results, folder):
    stages = stage_names(results)
    shown = list(range(len(stages)))[:5] if len(stages) < 6 else np.linspace(0, len(stages) - 1, 5).round().astype(int)
    fig, axes = common.new_figure(1, len(shown), 2.3 * len(shown), 2.9)
    for axis, i in zip(axes[0], shown):
        for arm in (a for a in results['arms'] if a in ('standard', results['robust'])):
            clean, noisy = common.unpack(runs(results, 'maps', arm)[0][i]['channel'])
            axis.plot(clean, noisy, '.', ms=5, alpha=0.6, color=colours(results)[arm], label=called(arm))
        high = axis.get_xlim()[1]
        axis.plot([0, high], [0, high], color='0.5', lw=1, label='noise changes nothing')
        axis.set(title=stages[i], xlabel='natural images')
    axes[0, 0].set_ylabel(f'with noise of {TV_NOISE}')
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    fig.suptitle('Total variation of the activation maps, each dot a channel' + first_seed(results))
    common.save_figure(fig, folder, 'fig8_noise')


def figure_dissection(results, folder):
    categories = list(dict.fromkeys(c for c, _ in results['concepts']))
    fig, axes = common.new_figure(1, 1 + len(categories), 2.5 * (1 + len(categories)), 3.4)
    width = 0.8 / len(results['arms'])
    for i, arm in enumerate(results['arms']):
        label = labelled(results, arm)
        axes[0, 0].bar(
            np.arange(len(categories)) + i * width - 0.4,
            [100 * (label == c).mean() for c in categories],
            width,
            align='edge',
            color=colours(results)[arm],
            label=called(arm),
        )
        for axis, category in zip(axes[0, 1:], categories):
            axis.semilogx(
                TAUS,
                [100 * (labelled(results, arm, t) == category).mean() for t in TAUS],
                marker='o',
                ms=3.5,
                color=colours(results)[arm],
            )
            axis.set(title=category, xlabel='share of positions above\nthe threshold')
            axis.axvline(TAU, color='0.6', ls=':', lw=1)
    axes[0, 0].set_xticks(range(len(categories)), categories)
    axes[0, 0].set(ylabel='units whose best concept it is (%)', title=f'at {TAU}')
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=8)
    fig.suptitle(f'Detectors: IoU above {IOU} and {LIFT} times that with labels of other images')
    common.save_figure(fig, folder, 'fig9_dissection')


def figure_inputs(results, folder):
    chance = runs(results, 'inputs', 'standard')[0]['chance']
    names, stages = list(chance), stage_names(results, 'inputs')
    top = runs(results, 'inputs', 'standard')[0]['top']
    fig, axes = common.new_figure(1, len(names), 2.3 * len(names) + 0.3, 3.3)
    for axis, name in zip(axes[0], names):
        for arm in results['arms']:
            means = [mean(units(results, 'inputs', arm, name, [i])) for i in range(len(stages))]
            axis.plot(range(len(stages)), means, marker='o', ms=3.5, color=colours(results)[arm], label=called(arm))
        axis.axhline(chance[name], color='0.6', ls='--', lw=1, label='random images')
        axis.set(
            title={'patches': 'distance of patches', 'joint': 'all three'}.get(
                name, 'number of classes' if name == 'class' else f'number of {name}s'
            ),
            xlabel='stage',
        )
        axis.set_xticks(range(len(stages)), range(1, len(stages) + 1))
    axes[0, 0].set_ylabel('mean over channels')
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=8)
    fig.suptitle(
        f'How mixed are the {top} images that excite a channel most?\n'
        '(effective numbers; distances relative to random patches)',
        fontsize=9,
    )
    common.save_figure(fig, folder, 'fig10_inputs')


def figure_ablation(results, folder):
    arms = [a for a in results['arms'] if a in ('standard', results['robust'])]
    fig, axes = common.new_figure(1, len(arms), 3.6 * len(arms) + 1, 3.5, sharex=True, sharey=True)
    stages = stage_names(results, 'ablation')
    for axis, arm in zip(axes[0], arms):
        (shape, texture), stage = scores(results, arm)
        for i, name in enumerate(stages):
            axis.plot(
                100 * texture[stage == i],
                100 * shape[stage == i],
                'o',
                ms=4,
                alpha=0.6,
                color=colormaps['viridis'](i / max(len(stages) - 1, 1)),
                label=name,
            )
        top = max(axis.get_xlim()[1], axis.get_ylim()[1])
        axis.plot([0, top], [0, top], color='0.5', lw=1)
        lean = leaning(results, arm, relative=True)[0]
        lean = lean[np.isfinite(lean)]
        text = (
            f'{100 * lean.mean():.0f} % of the channels\nthat matter are above the line'
            if len(lean)
            else 'no channel matters alone'
        )
        axis.set(title=f'{called(arm)}: {text}', xlabel='texture decisions lost (%)')
    axes[0, 0].set_ylabel('shape decisions lost (%)')
    fig.suptitle('Each dot: one channel set to zero' + first_seed(results))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside right center')
    common.save_figure(fig, folder, 'fig11_ablation')


def runs_ablation(results):
    """Concept ablation of each seed, where it was measured and removed any unit."""
    found = [results[f'concepts-s{s}']['ablation'] for s in results['config']['seeds']]
    return [f for f in found if f and any(c['channels'] for c in f.values())]


def figure_concept_ablation(results, folder):
    found = runs_ablation(results)[0]
    categories = [c for c, v in found.items() if v['channels']]
    arms = ('standard', results['robust'])
    names = list(found[categories[0]]['standard'])
    fig, axes = common.new_figure(1, len(names), 2.4 * len(names), 3.3, sharey=True)
    for axis, name in zip(axes[0], names):
        for i, arm in enumerate(arms):
            base, without, random = 100 * np.array([found[c][arm][name] for c in categories]).T
            at = np.arange(len(categories)) + 0.4 * i - 0.38
            axis.bar(at, base - without, 0.36, align='edge', color=colours(results)[arm], label=called(arm))
            axis.hlines(
                base - random, at, at + 0.36, color='#56B4E9', lw=2.5, label='as many random channels' if i else None
            )
        axis.set_xticks(
            range(len(categories)),
            [f"{c}\n{found[c]['concepts']}, {found[c]['channels']}" for c in categories],
            fontsize=7,
        )
        axis.set(title=name, xlabel='concepts, units')
    axes[0, 0].set_ylabel('accuracy lost (points)')
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    fig.suptitle(
        'Without the units of one concept (as many in both networks), mean over the '
        'concepts of a category' + first_seed(results)
    )
    common.save_figure(fig, folder, 'fig12_concept_ablation')


def rho(terms):
    """The ratio of `covariance_terms`, summed over pairs; 0 where no unit varies."""
    total = terms[1].sum()
    return terms[0].sum() / total if total > 0 else 0.0


def figure_dimensions(results, folder):
    fig, axes = common.new_figure(1, 2, 7.4, 3.3, sharey=True)
    for arm in results['arms']:
        shares = np.mean(
            [
                [dimension_shares(*(rho(common.unpack(stage[f])) for f in ('outline', 'texture'))) for stage in run]
                for run in runs(results, 'dimensions', arm)
            ],
            0,
        )
        for axis, values in zip(axes[0], shares.T):
            axis.plot(
                range(len(shares)), 100 * values, marker='o', ms=3.5, color=colours(results)[arm], label=called(arm)
            )
    for axis, name in zip(axes[0], ('outline', 'texture')):
        axis.axhline(100 / (2 + math.e), color='0.6', ls='--', lw=1, label='nothing encoded')
        axis.set(title=f'dimensions for {name}', xlabel='stage')
        axis.set_xticks(range(len(shares)), stage_names(results, 'dimensions'))
    axes[0, 0].set_ylabel('share of the dimensions (%)')
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=8)
    common.save_figure(fig, folder, 'fig13_dimensions')


def figure_reversed(results, folder):
    run = results[f"reversed-s{results['config']['seeds'][0]}"]
    fig, axes = common.new_figure(1, 6, 9.6, 2.6, width_ratios=(1, 1, 1, 1, 2.2, 2.2))
    for axis, image, outline, texture in zip(
        axes[0], common.unpack(run['images']), *(common.unpack(run[c]) for c in ('outline', 'texture'))
    ):
        common.show_image(axis, image / 255, f'{results["classes"][outline]},\n{common.TEXTURES[texture]}')
        axis.title.set_fontsize(7)
    usual = [decided(results, a, 'shapes') for a in ('standard', results['robust'])]
    other = [reversed_decided(results, a) for a in ('standard', 'robust')]
    for axis, pair, text in ((axes[0, 4], usual, 'usual data'), (axes[0, 5], other, 'reversed: faint outlines')):
        for i, (s, t) in enumerate(pair):
            colour = colours(results)[('standard', results['robust'])[i]]
            dot(axis, i, common.bootstrap(shape_bias, s, t), fmt='o', color=colour)
            axis.plot(i, 100 * coverage(s, t), 'x', color=colour)
        axis.axhline(50, color='0.6', ls=':', lw=1)
        axis.set_xticks((0, 1), ('standard', 'robust'))
        axis.set(ylim=(-3, 103), xlim=(-0.5, 1.5), title=text)
    axes[0, 4].set_ylabel('shape bias (%)\nx: coverage')
    fig.suptitle('The reversed control: faint outlines, strong textures, here in conflict')
    common.save_figure(fig, folder, 'fig14_reversed')


def figure_stimuli(results, folder):
    names = [n for n in SINGLE if n in runs(results, 'conflict', 'standard')[0]]
    fig, axes = common.new_figure(1, 1 + len(names), 3.4 * (1 + len(names)), 3.4)
    points_with_intervals(
        axes[0, 0],
        results,
        results['arms'],
        lambda arm: common.bootstrap(shape_bias, *decided(results, arm, 'stimuli')),
        {arm: coverage(*decided(results, arm, 'stimuli')) for arm in results['arms']},
        'coverage',
    )
    count = len(common.unpack(results['cues']['stimuli']['shape']))
    k = len(results['groups'])
    axes[0, 0].axhline(50, color='0.6', ls=':', lw=1)
    axes[0, 0].axhline(200 / k, color='0.6', ls='--', lw=1, label='coverage by chance')
    axes[0, 0].set(ylabel='shape bias with 95 % interval (%)', title=f'{count} cue conflicts, {k} categories')
    axes[0, 0].legend(fontsize=7)
    for axis, name in zip(axes[0, 1:], names):
        points_with_intervals(
            axis,
            results,
            results['arms'],
            lambda arm: common.bootstrap(
                np.mean, np.stack([common.unpack(r[name]) for r in runs(results, 'conflict', arm)])
            ),
        )
        axis.axhline(100 / k, color='0.6', ls='--', lw=1, label='chance')
        axis.set(title=name, ylabel='accuracy (%)')
        axis.legend(fontsize=7)
    common.save_figure(fig, folder, 'fig15_stimuli')


# -------------------------------------------------------------------------------- the claims


def judge(results, folder):
    """The claims table, from results.json alone."""
    claims, main = [], results['robust']
    has = {key.split('-s')[0] for key in results}

    seeds = len(results['config']['seeds'])

    def add(
        text,
        source,
        found,
        *,
        arms=('standard', main),
        name=None,
        threshold=0.0,
        unit='points',
        why=None,
        detail=None,
        reference='-',
        verdict=None,
        least=0.0,
    ):
        """found: (value, low, high) of an effect that must exceed the threshold; name: the
        conflict set whose coverage counts; why: what makes the claim uninformative; least: an
        effect that retraining alone can have, of means over n seeds 1 / sqrt(n) of it."""
        scale, digits = (100, 1) if unit in ('points', '%') else (1, 3)
        sign = '+' if threshold == 0 else ''
        value, low, high = (f'{scale * v:{sign}.{digits}f}' for v in found)
        why = unfit(results, arms, name) or why
        measured = f'{value} {unit}'.strip() + f' [{low}, {high}]'
        if not np.isfinite(found).all():
            measured, why = 'not defined here', why or 'not defined here'
        verdict = verdict or effect_verdict(found[1], found[2], threshold)
        least /= seeds**0.5
        if abs(found[0] - threshold) < least and verdict != 'inconclusive':
            verdict = 'inconclusive'
            measured += f' (retraining alone may change it by {scale * least:.3g})'
        claims.append(
            claim(
                text,
                source,
                measured + (f'; {detail}' if detail else ''),
                f'uninformative: {why}' if why else verdict,
                reference,
            )
        )

    name = conflict_name(results)
    sets = [name] * (name is not None) + ['stimuli'] * (name == 'shapes' and bool(results['groups']))
    if main in results['arms'] and 'views' in has:
        gate_claims(results, claims)
    for name in sets:
        texture_claim(results, add, name)
    if main in results['arms']:
        for name in sets:
            bias_claims(results, add, name)
        if 'views' in has:
            view_claims(results, add)
        smoothness_claims(results, add)
        if results['concepts']:
            concept_claims(results, add)
        input_claims(results, add)
        if 'ablation' in has:
            ablation_claims(results, add)
        control_claims(results, add, has)
    if sets and 'untrained' in results['arms']:
        coverage_claim(results, claims, sets[0])
    if seeds < 3:
        common.log.info(
            '\nWith one or two --seeds the intervals are those of images or channels '
            'of these networks; another training may come out otherwise.'
        )
    common.write_claims(claims, folder)
    return claims


def unfit(results, arms, name=None):
    """Why networks cannot be compared: collapsed, decides too few of the conflicts `name` for
    either cue, or the robust one is not robust or has lost too much; None if they can."""
    views = f"views-s{results['config']['seeds'][0]}" in results
    if not views:  # the only sign that networks given on the command line know anything
        name = name or conflict_name(results)
    for arm in arms:
        if any(results.get(f'collapsed-{arm}-s{s}') for s in results['config']['seeds']):
            return f'{arm} collapsed to one class'
        if name:
            pair = decided(results, arm, name)
            count = len(results['groups'] if name == 'stimuli' else results['classes'])
            if coverage(*pair) < max(COVERAGE, 3 / count):  # 3 / count: 1.5 times chance
                return f'{arm} decides {100 * coverage(*pair):.0f} % of the conflicts for either cue'
            number = np.sum(pair) / len(pair[0])  # of each seed: the images are the same
            if number < DECISIONS:
                return f'{arm} decides {number:.0f} conflicts for either cue, fewer than {DECISIONS}'
    if views and results['robust'] in arms:
        ratio, loss = (statistic(s, r) for statistic, s, r in gates(results))
        if ratio < GATE or loss > MARGIN:
            return 'the robust network fails its gate'
        if seen(results, 'standard', 'natural/natural').mean() < 1.5 / len(results['classes']):
            return 'standard is near chance on natural images'
    return None


def gates(results):
    """((statistic, S, R), (statistic, S, R)): robust accuracy of R over that of S (at least one
    image), natural accuracy of S minus that of R."""
    attacked, natural = (
        [seen(results, a, view) for a in ('standard', results['robust'])]
        for view in ('attack/PGD-20', 'natural/natural')
    )
    return (
        (lambda s, r: r.mean() / max(s.mean(), 1 / s.size), *attacked),
        (lambda s, r: s.mean() - r.mean(), *natural),
    )


def gate_claims(results, claims):
    ratio, loss = (common.bootstrap(*gate) for gate in gates(results))
    attacked = [100 * seen(results, a, 'attack/PGD-20').mean() for a in ('standard', results['robust'])]
    claims.append(
        claim(
            f'Gate: R is robust, at least {GATE:.0f} times the accuracy of S under PGD-20',
            'control',
            f'{attacked[0]:.1f} and {attacked[1]:.1f} %',
            'supported' if ratio[1] > GATE else 'contradicted' if ratio[2] < GATE else 'inconclusive',
        )
    )
    claims.append(
        claim(
            f'Gate: and loses at most {100 * MARGIN:.0f} points of natural accuracy',
            'control',
            '{:.1f} points [{:.1f}, {:.1f}]'.format(*(100 * v for v in loss)),
            'uninformative: S is near chance'
            if seen(results, 'standard', 'natural/natural').mean() < 1.5 / len(results['classes'])
            else effect_verdict(-loss[2], -loss[1], -MARGIN),
        )
    )


def whose(results, name):
    """What a conflict set is, behind the claim."""
    if name == 'shapes':
        return ''
    return (
        f" ({len(common.unpack(results['cues'][name]['shape']))} stimuli of Geirhos et al., "
        f"{len(results['groups'])} categories)"
    )


def texture_claim(results, add, name):
    """V0, which concerns S alone."""
    s = decided(results, 'standard', name)
    found = common.bootstrap(shape_bias, *s)
    add(
        f'V0 S is texture-biased: shape bias below 50 %{whose(results, name)}',
        PAPER,
        found,
        arms=('standard',),
        name=name,
        threshold=0.5,
        unit='%',
        least=RETRAINED['bias'],
        verdict=effect_verdict(-found[2], -found[1], -0.5),
        detail=f'coverage {100 * coverage(*s):.0f} %',
        reference=f'21 % ({BENCHMARK})',
    )


def coverage_claim(results, claims, name):
    """Control: what shape bias is worth without coverage."""
    pair = decided(results, 'untrained', name)
    found = common.bootstrap(coverage, *pair)
    claims.append(
        claim(
            f'Control: shape bias needs its coverage; that of an untrained network is below {100 * COVERAGE:.0f} %',
            'control',
            '{:.1f} % [{:.1f}, {:.1f}]'.format(*(100 * v for v in found))
            + f'; its shape bias {100 * shape_bias(*pair):.1f} %',
            effect_verdict(-found[2], -found[1], -COVERAGE),
            f'an untrained ResNet-50 scores 65 % ({BENCHMARK})',
        )
    )


def bias_claims(results, add, name):
    """V1, V2, and V14's first half: shape bias and its dose response."""
    main, on, s = results['robust'], whose(results, name), decided(results, 'standard', name)

    def difference(a, b, c, d):
        return shape_bias(c, d) - shape_bias(a, b)

    right = [congruent(results, a, name) for a in ('standard', main)]
    right = (
        ', right where the cues agree {:.0f} and {:.0f} %'.format(*(100 * v for v in right))
        if np.isfinite(right).all()
        else ''
    )
    r = decided(results, main, name)
    add(
        f'V1 R is more shape-biased than S{on}',
        PAPER,
        common.bootstrap(difference, *s, *r),
        name=name,
        least=RETRAINED['bias'],
        detail=f'{100 * shape_bias(*s):.1f} and {100 * shape_bias(*r):.1f} %, '
        f'coverage {100 * coverage(*s):.0f} and {100 * coverage(*r):.0f} %' + right,
        reference=f'+44 points: 21 and 65 % (l2 eps 3; {BENCHMARK})',
    )
    ladder = sorted((e, a) for a, e in results['eps'].items() if a == 'standard' or e > 0)
    if len(ladder) > 2:
        pairs = [v for _, a in ladder for v in decided(results, a, name)]
        eps = [e for e, _ in ladder]

        def correlation(*v):
            values = [shape_bias(v[i], v[i + 1]) for i in range(0, len(v), 2)]
            return spearmanr(eps, values).statistic if len(set(values)) > 1 else math.nan

        found = common.bootstrap(correlation, *pairs)
        least = RETRAINED['bias'] / len(results['config']['seeds']) ** 0.5
        small = abs(shape_bias(*pairs[-2:]) - shape_bias(*pairs[:2])) < least
        note = f' (retraining alone may change it by {100 * least:.3g})' if small else ''
        add(
            f'V2 Shape bias grows with eps: rank correlation{on}',
            PAPER,
            found,
            name=name,
            arms=[a for _, a in ladder],
            verdict='inconclusive' if small else None,
            unit='',
            detail=', '.join(f'{100 * shape_bias(*decided(results, a, name)):.1f}' for _, a in ladder) + ' %' + note,
            reference=f'nearly monotone ({BENCHMARK})',
        )
    if name == 'stimuli':
        for kind, reference in (('silhouettes', '48.1 to 60.6 %'), ('edges', '23.8 to 25.6 %')):
            found = {a: [v[kind] for v in runs(results, 'conflict', a) if kind in v] for a in ('standard', main)}
            if found[main]:
                a, b = (np.stack([common.unpack(v) for v in found[x]]).astype(float) for x in ('standard', main))
                chance = 1.5 / len(results['groups'])
                add(
                    f'V3 R is better on the {kind} of Geirhos et al. ({a.shape[1]} images), R minus S',
                    PAPER,
                    common.bootstrap(lambda u, v: v.mean() - u.mean(), a, b),
                    why='both near chance' if max(a.mean(), b.mean()) < chance else None,
                    least=RETRAINED[kind],
                    detail=f'{100 * a.mean():.1f} and {100 * b.mean():.1f} %',
                    reference=f'{reference} (eps 0 to l2 3; {BENCHMARK})',
                )
    if 'random textures' in results['arms'] and name == 'shapes':
        t = decided(results, 'random textures', name)
        add(
            'V14 Training on random textures, whose labels are the outlines, also raises the shape bias',
            'control',
            common.bootstrap(difference, *s, *t),
            name=name,
            arms=('standard', 'random textures'),
            least=RETRAINED['bias'],
            detail=f'{100 * shape_bias(*t):.1f} %',
            reference=f'Stylized-ImageNet: 21 to 81 % ({BENCHMARK})',
        )


def view_claims(results, add):
    """V3 to V5 and V8: what robust training buys when a cue, a band or the quality is lost."""
    main, classes = results['robust'], len(results['classes'])

    def change(text, source, names, lower=False, relative=True, arms=('standard', main), least='accuracy', **more):
        """Accuracy on the views (relative: `kept` of natural accuracy) of the second arm minus
        the first; lower: the claim is that it is lower."""
        arrays = [v for a in arms for v in (seen(results, a, *names), seen(results, a, 'natural/natural'))]
        sign = -1 if lower else 1

        def statistic(s, ns, r, nr):
            if relative:
                return sign * (kept(r, nr, classes) - kept(s, ns, classes))
            return sign * (r.mean() - s.mean())

        plain = [100 * seen(results, a, *names).mean() for a in arms]
        shares = [100 * kept(seen(results, a, *names), seen(results, a, 'natural/natural'), classes) for a in arms]
        detail = '{:.1f} and {:.1f} %'.format(*shares if relative else plain)
        detail += ', absolute {:.1f} and {:.1f} %'.format(*plain) if relative else ''
        why = (
            f'both near chance, {plain[0]:.1f} and {plain[1]:.1f} %'
            if max(plain) < 150 / classes
            else f'both saturated, {plain[0]:.1f} and {plain[1]:.1f} %'
            if min(plain) > 99
            else None
        )
        if arms[0] == 'standard':
            text += ', S minus R' if lower else ', R minus S'
        add(
            text,
            source,
            common.bootstrap(statistic, *arrays),
            arms=arms,
            why=why,
            detail=detail,
            least=RETRAINED[least],
            **more,
        )

    present = in_group(results, 'texture-less')
    silhouettes = [f'texture-less/{n}' for n in TEXTURE_LESS if f'texture-less/{n}' in present]
    if silhouettes:
        change(
            'V3 R is better without texture: flat fill, share kept of natural accuracy',
            PAPER,
            silhouettes[:1],
            least='flat fill',
        )
        change(
            'V3 R is better without texture: silhouettes of both polarities, share kept',
            PAPER,
            silhouettes[1:],
            least='silhouettes',
        )
    change(
        'V3 R is better without texture: edges of both polarities, share kept',
        PAPER,
        ['texture-less/edges', 'texture-less/edges inverted'],
        least='edges',
    )
    change(
        'V3 R is better without texture: black and white, and saturation, share kept',
        PAPER,
        ['texture-less/black and white', *(v for v in present if 'saturation' in v)],
    )
    scrambled = [v for v in in_group(results, 'shape-less') if 'scrambled' in v]
    if scrambled:
        change('V4 R is hurt more without shape: scrambled, share kept', PAPER, scrambled, lower=True)
    for text, names, lower, reference in (
        (
            'R is worse off-distribution on average: corruptions',
            list(CORRUPTIONS),
            True,
            'ImageNet-C 40.9 to 34.6 %, eps 0 to l2 3',
        ),
        ('R is worse under contrast and veil', ['contrast', 'veil'], True, 'fog 45.4 to 6.4, contrast 38.8 to 9.6 %'),
        (
            'R is better under pixelate and JPEG',
            ['pixelate', 'JPEG'],
            False,
            'pixelate 44.8 to 57.2, JPEG 53.7 to 59.6 %',
        ),
    ):
        every = [v for c in names for v in in_group(results, c)]
        change(f'V5 {text}', PAPER, every, lower=lower, relative=False, reference=f'{reference} ({BENCHMARK})')
        change(
            f'V5 Control: the same, share kept of natural accuracy (R starts lower): {text}',
            'control',
            every,
            lower=lower,
        )
    change(
        f"V8 R tolerates low-pass filters better: bands {', '.join(LOW)}, share kept",
        'independent',
        [f'low-pass/{b}' for b in LOW],
        reference='.155/.513/.701 to .359/.696/.855 (' + BENCHMARK + ')',
    )
    change(
        f"V8 R keeps less through high-pass filters: bands {', '.join(HIGH)}, share kept",
        'independent',
        [f'high-pass/{b}' for b in HIGH],
        lower=True,
        reference='.266 to .034 at one band (' + BENCHMARK + ')',
    )
    if 'random textures' in results['arms']:
        change(
            'V14 Unlike R, training on random textures keeps the high frequencies: high-pass '
            f"{', '.join(HIGH)}, it minus R",
            'control',
            [f'high-pass/{b}' for b in HIGH],
            arms=(main, 'random textures'),
            reference='.439 and .034 at one band (' + BENCHMARK + ')',
        )
    for name, text in (
        ('low', f'low frequencies (below {HYBRID} of Nyquist) to high ones'),
        ('phase', 'phase to amplitude'),
    ):
        s, r = (decided(results, a, name) for a in ('standard', main))
        add(
            f'Control: where two images are in one, R prefers {text} more than S',
            'control',
            common.bootstrap(lambda a, b, c, d: shape_bias(c, d) - shape_bias(a, b), *s, *r),
            name=name,
            least=RETRAINED['hybrids'],
            detail=f'{100 * shape_bias(*s):.1f} and {100 * shape_bias(*r):.1f} %',
        )


def smoothness_claims(results, add):
    """V6 and V7: smoother filters, which let less noise through."""
    pair = ('standard', results['robust'])
    layers = stage_names(results, 'filters')
    for key, text, unit in (('tv', 'TV / L1', ''), ('high', 'energy above 1/4 cycle per pixel', 'points')):
        s, r = (units(results, 'filters', a, key, [0]) for a in pair)
        others = [
            mean(units(results, 'filters', pair[0], key, [i])) - mean(units(results, 'filters', pair[1], key, [i]))
            for i in range(1, len(layers))
        ]
        scale = 100 if unit else 1
        add(
            f'V6 The first filters of R are smoother: {text}, S minus R, mean over channels',
            PAPER,
            common.bootstrap(lambda a, b: mean(a) - mean(b), s, r),
            unit=unit,
            least=RETRAINED['energy' if unit else 'TV'],
            detail=f'{scale * mean(s):.2f} and {scale * mean(r):.2f}; '
            f'{sum(d > 0 for d in others)} of the {len(others)} later layers as well',
        )
    stages = range(len(stage_names(results)))

    def rises(arm, chosen):
        """(seeds, channels): change of each channel's TV under noise over the stage's mean TV,
        weighted so that the mean is that over the stages."""
        parts = []
        for i in chosen:
            clean, noisy = np.moveaxis(
                np.stack([common.unpack(run[i]['channel']) for run in runs(results, 'maps', arm)]).astype(float), 1, 0
            )
            change = (noisy - clean) / np.maximum(clean.mean(1, keepdims=True), 1e-12)
            parts.append(change / change.shape[1] / len(chosen))
        return np.concatenate(parts, 1) * sum(p.shape[1] for p in parts)

    for text, chosen in (('first stage', [0]), ('mean over the stages', stages)):
        s, r = (rises(a, chosen) for a in pair)
        add(
            f'V7 R blocks noise: relative rise of the TV of its activations under noise of '
            f'{TV_NOISE}, {text}, S minus R',
            PAPER,
            common.bootstrap(lambda a, b: a.mean() - b.mean(), s, r),
            least=RETRAINED['rise'],
            detail=f'{100 * s.mean():.0f} and {100 * r.mean():.0f} %',
        )

    def outliers(arm, threshold_of):
        rows = []
        for run, reference in zip(runs(results, 'maps', arm), runs(results, 'maps', threshold_of)):
            pairs = [
                (common.unpack(a['channel']), common.unpack(b['channel'])[0].mean()) for a, b in zip(run, reference)
            ]
            rows.append(np.concatenate([np.abs(v[1] - v[0]) >= OUTLIER * m for v, m in pairs]))
        return np.stack(rows).astype(float)

    s, r = (outliers(a, 'standard') for a in pair)
    add(
        'V7 R blocks noise: share of channels whose TV changes by a fifth of the mean TV of S, S minus R',
        PAPER,
        common.bootstrap(lambda a, b: a.mean() - b.mean(), s, r),
        least=RETRAINED['outliers'],
        detail=f'{100 * s.mean():.1f} and {100 * r.mean():.1f} %; of the mean TV of R itself '
        f'{100 * outliers(pair[1], pair[1]).mean():.1f} %',
    )


def concept_claims(results, add):
    """V9 to V11, adapted: exact masks of `shapes` (or a folder's) instead of Broden's."""
    pair = ('standard', results['robust'])
    categories = {c for c, _ in results['concepts']}
    layout = [100 * (labelled(results, a) == 'layout').mean() for a in pair]
    for number, category, sign, text in (
        ('V9', 'colour', 1, 'R has more colour detectors'),
        ('V10', 'texture', 1, 'R has more texture detectors'),
        ('V11', 'outline', -1, 'R has fewer outline detectors (for objects)'),
    ):
        if category not in categories:
            continue
        s, r = ((labelled(results, a) == category).astype(float) for a in pair)
        uncut = [100 * (labelled(results, a, key='uncut') == category).mean() for a in pair]
        sweep = [
            np.sign(
                (labelled(results, pair[1], t) == category).sum() - (labelled(results, pair[0], t) == category).sum()
            )
            for t in TAUS
        ]
        add(
            f'{number} {text}: share of the units, ' + ('R minus S' if sign > 0 else 'S minus R'),
            PAPER + ', adapted',
            common.bootstrap(lambda a, b: sign * (b.mean() - a.mean()), s, r),
            why=None if s.any() or r.any() else 'neither has any',
            least=RETRAINED['detectors'],
            detail='{:.1f} and {:.1f} %; more in R at {} of {} thresholds, in S at {}; without '
            'the cut-offs {:.1f} and {:.1f} %{}'.format(
                100 * s.mean(),
                100 * r.mean(),
                sum(v > 0 for v in sweep),
                len(TAUS),
                sum(v < 0 for v in sweep),
                *uncut,
                '; layout has {:.1f} and {:.1f} %'.format(*layout) if 'layout' in categories else '',
            ),
        )


def input_claims(results, add):
    """V12, adapted: the paper's statistic is not known, so several stand side by side."""
    pair = ('standard', results['robust'])
    chance = runs(results, 'inputs', 'standard')[0]['chance']
    top = runs(results, 'inputs', 'standard')[0]['top']
    plural = {'joint': 'combinations of the three', 'class': 'classes'}
    rows = [
        (
            f"effective number of {plural.get(n, n + 's')} among the {top} images that excite a channel most"
            if n != 'patches'
            else 'distance of the patches that excite a channel most, relative to random ones',
            'inputs',
            n,
            chance[n],
        )
        for n in chance
    ]
    if results['concepts']:
        rows.append(('number of concepts detected by a channel', 'concepts', 'number', None))
    for text, part, key, by_chance in rows:
        if part == 'inputs':
            s, r = (units(results, part, a, key) for a in pair)
        else:
            s, r = (
                np.stack(
                    [
                        np.concatenate([common.unpack(stage[key])[TAUS.index(TAU)] for stage in run])
                        for run in runs(results, part, a)
                    ]
                ).astype(float)
                for a in pair
            )
        add(
            f"V12 Channels of R respond to fewer types of inputs: {text}, S minus R",
            PAPER + ', adapted',
            common.bootstrap(lambda a, b: mean(a) - mean(b), s, r),
            unit='',
            least=RETRAINED['types'] * by_chance if by_chance else RETRAINED['number'] * mean(s),
            why=f'both within {100 * NO_SIGNAL:.0f} % of random images'
            if by_chance and max(abs(mean(v) / by_chance - 1) for v in (s, r)) < NO_SIGNAL
            else None,
            detail=f'{mean(s):.2f} and {mean(r):.2f}' + (f', random images {by_chance:.2f}' if by_chance else ''),
        )


def ablation_claims(results, add):
    """V13: which cue the channels serve."""
    for relative, text, source in (
        (False, 'more shape than texture decisions', PAPER + ', adapted'),
        (
            True,
            'a larger share of the shape than of the texture decisions (counts favour the '
            'cue that decides more often, shares the other)',
            'control',
        ),
    ):
        s, r = (leaning(results, a, relative) for a in ('standard', results['robust']))
        empty = np.isnan(s).all() or np.isnan(r).all()
        count = min(np.isfinite(v).sum() for v in (s, r))
        add(
            f'V13 More channels of R serve shape: zeroing them loses {text}, share of the channels, R minus S',
            source,
            common.bootstrap(lambda a, b: mean(b) - mean(a), s, r) if not empty else (math.nan,) * 3,
            name=conflict_name(results),
            why=f'{count} channels matter alone' if count < UNITS else None,
            least=RETRAINED['leaning'],
            detail=''
            if empty
            else '{:.1f} and {:.1f} % of {} and {} channels'.format(
                100 * mean(s), 100 * mean(r), np.isfinite(s).sum(), np.isfinite(r).sum()
            ),
        )


def control_claims(results, add, has):
    """Our own controls."""
    main = results['robust']
    if 'reversed' in has:
        s, r = (reversed_decided(results, a) for a in ('standard', 'robust'))
        covered = [coverage(*v) for v in (s, r)]
        natural, robust = (
            [
                100 * np.mean([results[f'reversed-s{seed}'][a][what] for seed in results['config']['seeds']])
                for a in ('standard', 'robust')
            ]
            for what in ('natural', 'robust')
        )
        low = min(natural) < 300 / len(results['classes'])
        bad = [
            a
            for a in ('reversed standard', 'reversed robust')
            if any(results.get(f'collapsed-{a}-s{x}') for x in results['config']['seeds'])
        ]
        add(
            'Reversed control: with faint outlines and strong textures robust training moves '
            'towards texture, whatever it costs in natural accuracy: shape bias, S minus R',
            'control',
            common.bootstrap(lambda a, b, c, d: shape_bias(a, b) - shape_bias(c, d), *s, *r),
            arms=(),
            least=RETRAINED['bias'],
            why=f'{bad[0]} collapsed'
            if bad
            else 'near chance'
            if low
            else 'the robust network is not robust'
            if robust[1] < GATE * robust[0]
            else 'coverage below 50 %'
            if min(covered) < COVERAGE
            else None,
            detail=f'{100 * shape_bias(*s):.1f} and {100 * shape_bias(*r):.1f} %, coverage '
            f'{100 * covered[0]:.0f} and {100 * covered[1]:.0f} %, natural accuracy '
            f'{natural[0]:.1f} and {natural[1]:.1f} %, under PGD-20 {robust[0]:.1f} and '
            f'{robust[1]:.1f} %',
        )
    if 'dimensions' in has:
        last, source = -1, 'after Islam et al. 2021'
        terms = [
            np.stack([common.unpack(run[last][f])[i] for run in runs(results, 'dimensions', a)])
            for a in ('standard', main)
            for f in ('outline', 'texture')
            for i in (0, 1)
        ]

        def shares(v, k):
            return dimension_shares(rho(v[:2]), rho(v[2:]))[k]

        for k, text, sign in (
            (0, 'More dimensions for the outline in R', 1),
            (1, 'Fewer dimensions for the texture in R', -1),
        ):
            add(
                f"{text}: share in the last stage, {'R minus S' if sign > 0 else 'S minus R'}",
                source,
                common.bootstrap(lambda *v: sign * (shares(v[4:], k) - shares(v[:4], k)), *terms),
                least=RETRAINED['dimensions'],
                detail='{:.1f} and {:.1f} %'.format(*(100 * shares(terms[i : i + 4], k) for i in (0, 4))),
            )


# --------------------------------------------------------------------------------------------


def print_table(results):
    """Every view: all networks on all test images, and S and R on those that both get right
    (CL, the paper's choice); then every conflict set."""
    arms, main = results['arms'], results['robust']
    head = ''.join(f'{a:>17}' for a in arms)
    if f"views-s{results['config']['seeds'][0]}" in results:
        both = main in arms
        common.log.info(
            '\nAccuracy, %%%s%s\n%-32s%s',
            '',
            '; CL: images that S and R both get right' if both else '',
            '',
            head + ('     CL: S      R' if both else ''),
        )
        right = seen(results, 'standard', 'natural/natural') * seen(results, main, 'natural/natural') if both else None
        groups = [[v] for v in runs(results, 'views', arms[0])[0] if v.split('/')[0] not in CORRUPTIONS]
        groups += [in_group(results, name) for name in CORRUPTIONS]
        for names in groups:
            row = [100 * seen(results, a, *names).mean() for a in arms]
            row = ''.join(f'{v:17.1f}' for v in row)
            if both and right.sum():
                shares = [100 * (seen(results, a, *names) * right).sum() / right.sum() for a in ('standard', main)]
                row += '{:10.1f}{:7.1f}'.format(*shares)
            text = (
                names[0].replace('/', ': ') if len(names) == 1 else f"{names[0].split('/')[0]}: mean of five severities"
            )
            common.log.info('%-32s%s', text, row)
    if results['cues']:
        common.log.info(
            '\nConflicts: share decided for the first cue, of those for either (coverage), %%\n%-32s%s', '', head
        )
    for name in results['cues']:
        for variant in (name, name + ', all classes'):
            if variant in runs(results, 'conflict', arms[0])[0]:
                pairs = [decided(results, a, variant) for a in arms]
                common.log.info(
                    '%-32s%s',
                    variant,
                    ''.join(f'{f"{100 * shape_bias(*p):.1f} ({100 * coverage(*p):.1f})":>17}' for p in pairs),
                )
    for name in SINGLE:
        if name in runs(results, 'conflict', arms[0])[0]:
            right = [np.mean([common.unpack(r[name]) for r in runs(results, 'conflict', a)]) for a in arms]
            common.log.info('%-32s%s', f'stimuli: {name}, accuracy', ''.join(f'{100 * v:17.1f}' for v in right))


def make_parser():
    parser = common.make_parser(__doc__, DEFAULTS)
    add = parser.add_argument
    add(
        '--ladder',
        type=common.positive,
        nargs='+',
        metavar='EPS',
        help='of further robust networks, such as 2/255 4/255 (half of --eps)',
    )
    add(
        '--stem',
        type=common.whole,
        default=0,
        metavar='PX',
        help='size of the first convolution of resnet18, preact-resnet18, wrn-*, such as 7 (0: their own)',
    )
    add(
        '--channels',
        type=common.count,
        metavar='N',
        help='of each stage at most are ablated singly (128; images above 64 pixels: 16)',
    )
    add(
        '--cue-conflict-dir',
        metavar='DIR',
        help="Geirhos' stimuli: <shape>/<shape><n>-"
        '<texture><m>.png; edges and filled-silhouettes beside it are used, too',
    )
    add(
        '--probe-dir',
        metavar='DIR',
        help='concept masks for dissection: images/<name>.png and masks/<category>/<concept>/<name>.png',
    )
    add(
        '--weights',
        metavar='FILE',
        help='a standard network instead of training: a checkpoint, IMAGENET1K_V1 (torchvision\'s) or random',
    )
    add('--robust-weights', metavar='FILE', help='and a robust one')
    return parser


def main(argv=None):
    args = common.parse(make_parser(), argv)
    folder, results = common.measured(args, study, 'shape_bias')
    print_table(results)
    draw(results, folder)
    judge(results, folder)


if __name__ == '__main__':
    common.entry(main)
