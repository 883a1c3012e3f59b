"""What every study shares: set-up, data, models, attacks, training, evaluation, results.

Copy this file beside any one of the scripts and both run on their own. It is meant to be read
from top to bottom:

    1. Set-up       flags, eps parsing, device and precision, run folders
    2. Shapes       the embedded data set: ten outlines filled with ten textures
    3. Data         torchvision's data sets and image folders; batches on the device
    4. Models       small-cnn, lenet5, resnet18, preact-resnet18, wrn-*, torchvision's
    5. Processes    torchrun: many GPUs, one result
    6. Attacks      fgsm, pgd, apgd, square; robust accuracy; gradient-masking check
    7. Training     standard, FGSM-AT, PGD-AT, TRADES, MART; exact resume
    8. Results      results.json, bootstrap intervals, figures, claims

Conventions: images are float tensors (N, C, H, W) in [0, 1] (uint8 while stored), labels are
int64 (N,), a model maps images to logits (N, K) and normalises them itself. eps and step sizes
are in pixel units of [0, 1], so 8/255 is 0.03137.
"""

import argparse
import base64
import contextlib
import copy
import csv
import hashlib
import io
import json
import logging
import math
import os
import pickle
import re
import shutil
import sys
import textwrap
import time
import warnings
import zlib
from dataclasses import dataclass, field, replace
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from scipy.stats import rankdata
from tqdm import tqdm

log = logging.getLogger('advcnn')


# ------------------------------------------------------------------------------ 1. Set-up

# Weights depend on these numbers; the scripts share them so that they can share models.
# Sources: mnist Madry et al. 2018 (PGD-40, step 0.01, eps 0.3); cifar and svhn Rice et al.
# 2020 (PGD-10, 2/255, 200 epochs, drops at 1/2 and 3/4; SVHN at lr 0.01, step 1/255); shapes,
# fashion-mnist, stl10 and folder are ours. `eps_warmup` is the share of the training over
# which eps grows, clean for its first third: SVHN, MNIST at 0.3 and shapes collapse to one
# class without it.
DEFAULTS = {
    'shapes': dict(
        arch='small-cnn',
        epochs=6,
        batch_size=64,
        lr=0.1,
        schedule='onecycle',
        steps=2,
        step_size=6 / 255,
        eps_warmup=0.6,
        train_size=3200,
        test_size=250,
    ),
    'mnist': dict(
        arch='small-cnn', epochs=20, lr=0.05, schedule='onecycle', eps=0.3, step_size=0.01, steps=40, eps_warmup=0.4
    ),
    'fashion-mnist': dict(
        arch='small-cnn', epochs=30, lr=0.05, schedule='onecycle', eps=0.1, step_size=0.02, steps=10, eps_warmup=0.4
    ),
    'cifar10': {},
    'cifar100': {},
    'svhn': dict(lr=0.01, step_size=1 / 255, eps_warmup=0.05),
    'stl10': dict(epochs=100, eps=4 / 255, step_size=1 / 255),
    'folder': dict(arch='resnet50', epochs=90, batch_size=256, eps=4 / 255, step_size=1 / 255, weight_decay=1e-4),
}
BASE = dict(
    arch='resnet18',
    epochs=200,
    batch_size=128,
    lr=0.1,
    weight_decay=5e-4,
    schedule='piecewise',
    eps=8 / 255,
    step_size=2 / 255,
    steps=10,
    norm='linf',
    eps_warmup=0.0,
    ema=0.0,
    pad=None,
    train_size=0,
    test_size=0,
)
ARCHS = (
    'small-cnn',
    'small-cnn-64',
    'lenet5',
    'resnet18',
    'preact-resnet18',
    'wrn-10-1',
    'wrn-28-10',
    'wrn-34-10',
    'alexnet',
    'googlenet',
    'resnet50',
)


# Flags that say where and how, not what: they do not change a run's name.
ELSEWHERE = ('out', 'data_root', 'trust_data', 'device', 'compile', 'fresh', 'plot_only')


class UserError(Exception):
    """Something the user can put right: shown as one line on stderr, exit code 2."""


def entry(main):
    """Run `main()`, turning mistakes and full disks into one line and exit code 2."""
    try:
        main()
    except UserError as error:
        sys.exit(_complain(error))
    except OSError as error:  # disk full, read-only folder, path that is a file, ...
        if error.filename is None and error.strerror is None:
            raise  # not the file system's: show where it comes from
        sys.exit(_complain(f'{error.strerror}: {error.filename or "while writing"}'))
    except KeyboardInterrupt:
        if first():
            print('\ninterrupted; the same command continues from the last finished epoch', file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if full:
            sys.exit(_complain('out of memory: a smaller --batch-size, --arch or --test-size needs less'))
        if not _failures(0):
            raise
        sys.exit(2)  # another process has failed, and said why
    finally:
        if 'store' in _joined and dist.is_initialized():
            dist.destroy_process_group()


def _complain(message):
    # of many processes the first to fail speaks; before they have met all fail alike
    if _failures(1) == 1 if 'store' in _joined else first():
        print(f'error: {message}', file=sys.stderr, flush=True)
    return 2


def number(text):
    """'8/255' or '0.031' -> float; anything else is refused."""
    try:
        value = float(Fraction(text)) if '/' in text else float(text)
    except OverflowError:
        value = math.inf
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f'{text!r} is not a number like 8/255 or 0.031')
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a finite number >= 0')
    return value


def positive(text):
    """A number > 0."""
    value = number(text)
    if value == 0:
        raise argparse.ArgumentTypeError('0 is not allowed here')
    return value


def count(text):
    """A whole number >= 1."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number >= 1')
    return int(text)


def whole(text):
    """A whole number >= 0."""
    return 0 if text == '0' else count(text)


def schedule(text):
    """The name of a learning-rate schedule that `lr_factor` knows."""
    try:
        lr_factor(text, 0.0)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not one of piecewise, cosine, onecycle, constant, drops:0.6,0.8')
    return text


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of argparse's usage block
        self.exit(2, f'error: {message} (see --help)\n' if first() else None)

    def format_help(self):  # two flags a line where they fit: the whole in one screen
        lines = []
        for action in self._actions:
            flag = action.option_strings[-1] + (f' {action.metavar}' if action.metavar else '')
            cell = f'{flag:<19} {action.help or ""}'.rstrip()
            beside = lines and len(lines[-1]) <= 49 and not lines[-1].startswith(' ')
            if beside and len(cell) <= 50:
                lines[-1] = f'{lines[-1]:<50}{cell}'
            else:
                lines += textwrap.wrap(cell, 100, subsequent_indent=20 * ' ', break_on_hyphens=False)
        return '\n'.join([self.description, '', *lines, '', self.epilog, ''])


def make_parser(doc, defaults=None):
    """The flags that mean the same in every script.

    doc: the script's docstring; defaults: {dataset or '*': {flag: value}}, laid over
    DEFAULTS.
    The script adds its own flags to the parser and then calls `parse`.
    """
    defaults = defaults or {}
    table = {name: BASE | defaults.get('*', {}) | values | defaults.get(name, {}) for name, values in DEFAULTS.items()}
    columns = ('arch', 'epochs', 'batch_size', 'lr', 'schedule', 'eps', 'step_size', 'steps')
    rows = [('defaults', *columns)]
    for name, values in table.items():
        rows.append(
            (name, *(f'{values[c] * 255:.3g}/255' if c in ('eps', 'step_size') else str(values[c]) for c in columns))
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        '  '.join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    usage = re.search(r'^Usage.*?(?=^\S|\Z)', doc or '', re.M | re.S)
    parser = _Parser(
        description=(doc or '').split('\n')[0] + '\n' + (usage.group().rstrip() if usage else ''),
        epilog='\n'.join(lines),
        allow_abbrev=False,
    )
    parser.defaults_table = table
    add = parser.add_argument
    add(
        '--dataset',
        default='shapes',
        metavar='NAME',
        help='shapes (embedded), mnist, fashion-mnist, cifar10, cifar100, svhn, stl10, folder:PATH',
    )
    add('--data-root', default='data', metavar='DIR', help="torchvision's folder (data)")
    add('--trust-data', action='store_true', help='accept altered data files')
    add('--image-size', type=count, metavar='PX', help='shapes: 32, folder: 224')
    add('--pad', type=whole, metavar='PX', help='padding of random crops')
    add('--train-size', type=whole, metavar='N', help='balanced subset (0: all)')
    add('--test-size', type=whole, metavar='N', help='balanced subset (0: all)')
    add('--arch', choices=ARCHS, metavar='NAME', help=', '.join(ARCHS))
    add('--epochs', type=count, metavar='N', help='of each training')
    add('--batch-size', type=count, metavar='N', help='of all processes')
    add('--lr', type=positive, metavar='X', help='peak; SGD, momentum 0.9')
    add('--weight-decay', type=number, metavar='X', help='of all weights')
    add(
        '--schedule',
        type=schedule,
        metavar='NAME',
        help='piecewise, cosine, onecycle, constant or drops:0.6,0.8[:0.1] (shares[:factor])',
    )
    add('--ema', type=number, metavar='DECAY', help='of averaged weights: 0.999')
    add('--eps', type=positive, metavar='X', help='radius of the attack: 8/255')
    add('--step-size', type=positive, metavar='X', help='of training attacks: 2/255')
    add('--steps', type=count, metavar='N', help='of training attacks')
    add('--eps-warmup', type=number, metavar='SHARE', help='of training; eps grows')
    add(
        '--norm',
        choices=('linf', 'l2'),
        metavar='NORM',
        help='linf or l2 (with its own defaults: eps 128/255, step 15/255)',
    )
    add('--seeds', type=whole, nargs='+', default=[0], metavar='N ...', help='one or more (0)')
    add('--device', choices=('auto', 'cpu', 'cuda'), default='auto', metavar='NAME', help='auto, cpu or cuda')
    add(
        '--amp',
        choices=('auto', 'bf16', 'fp16', 'fp32'),
        default='auto',
        metavar='NAME',
        help='precision of training: auto, bf16, fp16 or fp32 (reported attacks: always float32)',
    )
    add('--compile', action='store_true', help='torch.compile (GPU)')
    add('--out', default='runs', metavar='DIR', help='for models, results (runs)')
    add('--fresh', action='store_true', help='train and measure again')
    add('--plot-only', metavar='RUN', help='redraw a finished run')
    return parser


def add_attack_flags(parser):
    """The flags of `evaluation_attacks`."""
    parser.add_argument('--apgd-steps', type=count, metavar='N')
    parser.add_argument('--targets', type=count, metavar='N', help='classes APGD-T aims at')
    parser.add_argument('--square-queries', type=count, metavar='N')


def parse(parser, argv=None):
    """Parse, fill the data set's defaults in, check ranges. Raises UserError."""
    args = parser.parse_args(argv)
    base = args.dataset.split(':')[0]
    if base not in DEFAULTS or (base == 'folder') != (':' in args.dataset):
        raise UserError(
            f"unknown data set '{args.dataset}'; known: " + ', '.join(DEFAULTS).replace('folder', 'folder:PATH')
        )
    if args.norm == 'l2':  # Rice et al. 2020
        args.eps, args.step_size = args.eps or 128 / 255, args.step_size or 15 / 255
    for flag, value in parser.defaults_table[base].items():
        if getattr(args, flag, None) is None:
            setattr(args, flag, value)
    if args.norm == 'linf' and args.eps >= 1:
        raise UserError(f'--eps {args.eps:g} is outside (0, 1), the range of pixels; did you mean {args.eps:g}/255?')
    if args.norm == 'linf' and args.step_size >= 1:
        raise UserError(f'--step-size {args.step_size:g} is outside (0, 1); did you mean {args.step_size:g}/255?')
    for flag in ('ema', 'eps_warmup'):
        if not 0 <= getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must lie in [0, 1)")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError('--seeds must differ from each other')
    if max(args.seeds) >= 2**32:  # studies add to them, and torch takes 64 bits
        raise UserError(f'--seeds must be below 2^32, not {max(args.seeds)}')
    if args.image_size and base not in ('shapes', 'folder'):
        raise UserError('--image-size goes with shapes and folder:PATH')
    args.image_size = args.image_size or dict(shapes=32, folder=224).get(base, 0)
    defaults = vars(parser.parse_args([])) | parser.defaults_table[base]
    defaults['image_size'] = dict(shapes=32, folder=224).get(base, 0)
    args.changed = any(
        value != defaults[flag] for flag, value in vars(args).items() if flag not in {'dataset', 'arch', *ELSEWHERE}
    )
    return args


def pick_device(name='auto'):
    """'auto' | 'cpu' | 'cuda' -> torch.device; also fixes what reproducibility needs and, under
    torchrun, meets the other processes."""
    if name == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: no CUDA device found; use --device cpu or auto')
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device('cuda' if name != 'cpu' and torch.cuda.is_available() else 'cpu')
    if launched() and not _joined:
        join(device)
    return device


def pick_precision(device, amp='auto'):
    """The dtype of training, or None for float32.

    auto: bf16 on CUDA of compute capability 8 or more (older cards only emulate it), fp16 on
    older ones such as a T4, bf16 on CPUs with AVX512-BF16 or AMX, float32 elsewhere.
    """
    if amp == 'auto':
        if device.type == 'cuda':
            amp = 'bf16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'fp16'
        else:
            has = (getattr(torch.cpu, f'_is_{unit}_supported', lambda: False)() for unit in ('avx512_bf16', 'amx_tile'))
            amp = 'bf16' if any(has) else 'fp32'
    if amp == 'fp16' and device.type == 'cpu':
        raise UserError('--amp fp16 needs a CUDA device')
    return {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': None}[amp]


def make_generator(*key, device='cpu'):
    """A generator seeded by what it is for: make_generator('train', seed, epoch)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], 'big'))


def start_run(study, args):
    """Make the run's folder, start log.txt, print and save the configuration.

    Returns (folder, config). The folder is <out>/<study>/<dataset>-<arch>, with a short hash
    behind it when a flag differs from the data set's defaults.
    """
    config = {k: v for k, v in vars(args).items() if k not in {'changed', *ELSEWHERE}}
    device = pick_device(args.device)
    name = f"{args.dataset.replace(':', '-').strip('/').replace('/', '_')}-{args.arch}"
    if args.changed:
        name += '-' + short_hash(config)
    config['amp'] = str(pick_precision(device, args.amp) or 'float32').replace('torch.', '')
    config['device'] = device.type
    folder = Path(args.out, study, name)
    if first():
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / 'config.json', config)
    start_log(folder / 'log.txt')
    eps = f'eps={args.eps:.5f}' + (f' ({args.eps * 255:.2f}/255)' if args.norm == 'linf' else '')
    log.info('%s: %s  %s  -> %s', study, eps, ' '.join(f'{k}={v}' for k, v in config.items() if k != 'eps'), folder)
    return folder, config


def start_log(path=None):
    """Log to stdout and, if given, to a file; of many processes the first alone."""
    log.setLevel(logging.INFO)
    for handler in log.handlers:
        with contextlib.suppress(OSError):  # what a full disk did not take
            handler.close()
    log.handlers = [logging.StreamHandler(sys.stdout) if first() else logging.NullHandler()]
    if path and first():
        log.addHandler(logging.FileHandler(path))
    for handler in log.handlers:
        handler.handleError = partial(_log_error, handler)


def _log_error(handler, record):
    """A full disk ends the run; logging would go on, with a traceback for every line."""
    if isinstance(sys.exc_info()[1], OSError):
        raise
    logging.Handler.handleError(handler, record)


def short_hash(obj):
    """Ten hex digits of a JSON-able object."""
    return hashlib.sha1(json.dumps(obj, sort_keys=True).encode()).hexdigest()[:10]


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path that replaces `path` when the block succeeds."""
    path = Path(path)
    # random: in two containers on one disk the process numbers may be the same
    temporary = path.with_name(f'.{path.stem}.{os.urandom(4).hex()}{path.suffix}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(obj):
    """JSON, with numpy and torch scalars and arrays as plain numbers."""
    return json.dumps(obj, indent=1, default=lambda v: v.tolist())


def write_json(path, obj):
    """Write JSON atomically. Like whatever writes, this does nothing in any process but the
    first."""
    if not first():
        return
    with atomic(path) as temporary:
        temporary.write_text(to_json(obj))


# -------------------------------------------------------------------------------- 2. Shapes

# Ten outlines, each filled with its own texture: class k is outline k with texture k, so that
# both cues predict the class and a network may choose. Position, size, rotation, colours,
# texture phase and contrast vary; background gradient, two soft blobs and noise are nuisance.
# Frozen: the trials behind these numbers are in docs/shapes.md. A change needs a new version.
SHAPES_VERSION = 1
OUTLINES = ('disc', 'square', 'triangle', 'ring', 'cross', 'star', 'crescent', 'bar', 'ell', 'two discs')
TEXTURES = (
    'bars across',
    'diagonal up',
    'bars upright',
    'diagonal down',
    'checks',
    'dots',
    'grid',
    'rings',
    'zigzag',
    'blotches',
)
SHAPES = dict(
    radius=(0.60, 0.90),  # of the outline; the frame is [-1, 1] x [-1, 1]
    angle=(-0.26, 0.26),  # radians; more would turn one stripe texture into another
    period=(4.0, 8.0),  # of the texture, in pixels of a 32-pixel frame
    contrast=(0.08, 0.25),  # of the texture, +- around the object's colour, every channel
    distance=(0.20, 0.50),  # of object and background colour, in the largest channel
    background=(0.20, 0.80),
    gradient=0.10,
    clutter=0.15,
    clutter_radius=(0.1, 0.3),
    noise=0.02,
)


def _box(u, v, a, b):
    """Signed distance to the box |u| < a, |v| < b (negative inside)."""
    du, dv = u.abs() - a, v.abs() - b
    outside = (du.clamp(min=0).square() + dv.clamp(min=0).square() + 1e-12).sqrt()
    return outside + torch.maximum(du, dv).clamp(max=0)


def _polygon(u, v, corners, inner):
    """Regular star polygon with tips at radius 1 and notches at `inner`; first tip upwards."""
    half = math.pi / corners
    phi = torch.remainder(torch.atan2(u, -v) + half, 2 * half) - half  # fold into one sector
    r = (u.square() + v.square() + 1e-12).sqrt()
    x, y = r * phi.cos(), r * phi.sin().abs()
    edge_x, edge_y = inner * math.cos(half) - 1, inner * math.sin(half)
    return ((x - 1) * edge_y - y * edge_x) / math.hypot(edge_x, edge_y)


def _radius(u, v):
    return (u.square() + v.square() + 1e-12).sqrt()  # differentiable at the centre


# (u, v) in units of the object's radius, v downwards -> signed distance in the same units
OUTLINE_DISTANCES = (
    lambda u, v: _radius(u, v) - 0.9,
    lambda u, v: _box(u, v, 0.78, 0.78),
    lambda u, v: _polygon(u, v - 0.15, 3, 0.5),
    lambda u, v: (_radius(u, v) - 0.68).abs() - 0.24,
    lambda u, v: torch.minimum(_box(u, v, 0.95, 0.3), _box(u, v, 0.3, 0.95)),
    lambda u, v: _polygon(u, v, 5, 0.42),
    lambda u, v: torch.maximum(_radius(u, v) - 0.95, 0.8 - _radius(u - 0.55, v)),
    lambda u, v: _box(u, v, 0.36, 1.0),
    lambda u, v: torch.minimum(_box(u + 0.45, v, 0.36, 0.9), _box(u, v - 0.55, 0.85, 0.35)),
    lambda u, v: torch.minimum(_radius(u - 0.5, v - 0.42), _radius(u + 0.5, v + 0.42)) - 0.5,
)


def _wave(t):
    """A square wave with soft edges, period 1, in [-1, 1]."""
    return torch.tanh(2.5 * torch.sin(2 * math.pi * t)) / math.tanh(2.5)


def _cosines(u, v):
    return torch.cos(2 * math.pi * u), torch.cos(2 * math.pi * v)


def _blotches(u, v, blobs):
    at = torch.stack((u, v), -1) / 4
    return torch.tanh(2 * F.grid_sample(blobs, at, padding_mode='reflection', align_corners=True)[:, 0])


# (u, v) in periods, blobs (N, 1, 9, 9) -> texture in [-1, 1]
TEXTURE_WAVES = (
    lambda u, v, _: _wave(v),
    lambda u, v, _: _wave((u + v) * 0.5**0.5),
    lambda u, v, _: _wave(u),
    lambda u, v, _: _wave((u - v) * 0.5**0.5),
    lambda u, v, _: _wave(0.75 * u) * _wave(0.75 * v),
    lambda u, v, _: torch.tanh(4 * (sum(_cosines(u, v)) - 0.7)),
    lambda u, v, _: torch.tanh(4 * (torch.maximum(*_cosines(u, v)) - 0.55)),
    lambda u, v, _: _wave(_radius(u, v)),
    lambda u, v, _: _wave(v + 1.2 * (torch.remainder(0.7 * u, 1) - 0.5).abs()),
    _blotches,
)


def shape_parameters(n, generator, outline=None, texture=None):
    """Draw everything that varies between images; `render_shapes` is a function of it.

    outline, texture: int64 (n,) or None (outline 0, 1, ..., 9, 0, ...; texture = outline).
    Returns a dict of tensors whose first dimension is n.
    """

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    outline = torch.arange(n) % 10 if outline is None else outline
    radius = uniform(*SHAPES['radius'])
    background = uniform(*SHAPES['background'], 3)
    way = torch.randn(n, 3, generator=generator)
    way = way / way.abs().amax(1, keepdim=True) * uniform(*SHAPES['distance'], 1)
    colour = background + way
    colour = torch.where((colour < 0.1) | (colour > 0.9), background - way, colour)
    return dict(
        outline=outline,
        texture=outline if texture is None else texture,
        radius=radius,
        center=0.9 * (1 - radius[:, None]) * uniform(-1, 1, 2),
        angle=uniform(*SHAPES['angle']),
        period=uniform(*SHAPES['period']),
        phase=uniform(0, 1, 2),
        contrast=uniform(*SHAPES['contrast']),
        colour=colour.clamp(0.05, 0.95),
        texture_colour=torch.randint(2, (n, 3), generator=generator) * 2.0 - 1,
        blobs=torch.randn(n, 1, 9, 9, generator=generator),
        background=background,
        gradient=SHAPES['gradient'] * uniform(-1, 1, 3, 2),
        clutter_center=uniform(-1, 1, 2, 2),
        clutter_radius=uniform(*SHAPES['clutter_radius'], 2),
        clutter_colour=SHAPES['clutter'] * uniform(-1, 1, 2, 3),
    )


def render_shapes(params, size=32):
    """Draw the parameters, without noise. Differentiable in every floating-point parameter.

    Returns a dict: image (N, 3, S, S) in [0, 1]; and, each (N, 1, S, S): mask (1 inside the
    outline), edge (1 on it) and texture in [-1, 1] over the whole frame.
    """

    def col(t):  # (N,) -> (N, 1, 1)
        return t[:, None, None]

    p = params
    axis = (torch.arange(size, device=p['radius'].device) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing='ij')
    dx, dy = x - col(p['center'][:, 0]), y - col(p['center'][:, 1])
    cos, sin = col(p['angle'].cos()), col(p['angle'].sin())
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    distance, wave = torch.zeros_like(u), torch.zeros_like(u)
    for k in range(10):
        i = (p['outline'] == k).nonzero()[:, 0]
        r = col(p['radius'][i])
        distance = distance.index_put((i,), OUTLINE_DISTANCES[k](u[i] / r, v[i] / r) * r)
        i = (p['texture'] == k).nonzero()[:, 0]
        per = 16 / col(p['period'][i])  # the frame is 32 pixels of the nominal size, 2 units
        shift = p['phase'][i] * (TEXTURES[k] != 'rings')
        wave = wave.index_put(
            (i,), TEXTURE_WAVES[k](u[i] * per + col(shift[:, 0]), v[i] * per + col(shift[:, 1]), p['blobs'][i])
        )
    pixels = distance[:, None] * size / 2
    mask, edge = (0.5 - pixels).clamp(0, 1), (1.5 - pixels.abs()).clamp(0, 1)
    ground = p['background'][:, :, None, None] + p['gradient'][:, :, :1, None] * x + p['gradient'][:, :, 1:, None] * y
    for j in range(2):
        cx, cy = p['clutter_center'][:, j, :, None, None].unbind(1)
        blob = torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * col(p['clutter_radius'][:, j]) ** 2))
        ground = ground + p['clutter_colour'][:, j, :, None, None] * blob[:, None]
    flat = p['colour'][:, :, None, None]
    filled = flat + (col(p['contrast']) * p['texture_colour'][:, :, None])[..., None] * wave[:, None]
    return dict(
        image=(mask * filled + (1 - mask) * ground).clamp(0, 1),
        mask=mask,
        edge=edge,
        texture=wave[:, None],
        filled=filled.clamp(0, 1),
        outline_only=(mask * flat + (1 - mask) * ground).clamp(0, 1),
    )


SHAPE_VARIANTS = (
    'standard',
    'cue_conflict',
    'outline_only',
    'texture_only',
    'silhouette',
    'silhouette_inverted',
    'edges',
)


def conflict_textures(n):
    """Textures j != i for outlines i = 0, 1, ..., 9, 0, ...: all 90 pairs equally often."""
    i = torch.arange(n)
    return (i + 1 + i // 10 % 9) % 10


def make_shapes(n, key, size=32, variant='standard'):
    """n images of a variant, the same for the same key on every device.

    standard: outline k with texture k. cue_conflict: outline i, texture j != i, all pairs
    equally often. outline_only: flat fill. texture_only: the texture fills the frame.
    silhouette: black on white (inverted: white on black). edges: black lines on white.
    Returns x (n, 3, S, S) uint8 and a dict with outline (n,), texture (n,), mask and edge
    (n, 1, S, S) and the parameters.
    """
    if variant not in SHAPE_VARIANTS:
        raise UserError(f"unknown variant '{variant}' of shapes; known: " + ', '.join(SHAPE_VARIANTS))
    generator = make_generator('shapes', SHAPES_VERSION, key)
    texture = conflict_textures(n) if variant == 'cue_conflict' else None
    params = shape_parameters(n, generator, texture=texture)
    images, masks, edges = [], [], []
    for start in range(0, n, 1000):  # bounds the memory
        drawn = render_shapes({k: v[start : start + 1000] for k, v in params.items()}, size)
        image = {
            'outline_only': drawn['outline_only'],
            'texture_only': drawn['filled'],
            'silhouette': (1 - drawn['mask']).expand(-1, 3, -1, -1),
            'silhouette_inverted': drawn['mask'].expand(-1, 3, -1, -1),
            'edges': (1 - drawn['edge']).expand(-1, 3, -1, -1),
        }.get(variant, drawn['image'])
        if variant not in ('silhouette', 'silhouette_inverted', 'edges'):
            image = image + SHAPES['noise'] * torch.randn(image.shape, generator=generator)
        images.append((image.clamp(0, 1) * 255).round().byte())
        masks.append(drawn['mask'])
        edges.append(drawn['edge'])
    return torch.cat(images), dict(
        outline=params['outline'],
        texture=params['texture'],
        mask=torch.cat(masks),
        edge=torch.cat(edges),
        params=params,
    )


# ---------------------------------------------------------------------------------- 3. Data


@dataclass
class Data:
    """Images as uint8 on the device, or a dataset to stream the training images from."""

    name: str
    classes: tuple  # names, class k at place k
    train: tuple  # (x uint8 (N, C, H, W), y int64 (N,)); x None if streamed
    val: tuple  # held out of the training set; selects checkpoints
    test: tuple  # never selects anything
    pad: int = 0  # random crops: zero padding on each side
    flip: bool = False  # random horizontal flips
    stream: object = field(default=None, repr=False)  # folder: yields (uint8 image, label)

    @property
    def shape(self):
        return tuple(self.val[0].shape[1:])


# name: (class, a file or folder that is there when the data is, padding, flip)
TORCHVISION = {
    'mnist': (torchvision.datasets.MNIST, 'MNIST/raw', 0, False),
    'fashion-mnist': (torchvision.datasets.FashionMNIST, 'FashionMNIST/raw', 2, True),
    'cifar10': (torchvision.datasets.CIFAR10, 'cifar-10-batches-py', 4, True),
    'cifar100': (torchvision.datasets.CIFAR100, 'cifar-100-python', 4, True),
    'svhn': (torchvision.datasets.SVHN, '{split}_32x32.mat', 4, False),
    'stl10': (torchvision.datasets.STL10, 'stl10_binary', 12, True),
}


def load_data(
    name, root='data', *, trust=False, train_size=0, test_size=0, val_size=0, image_size=0, pad=None, device='cpu'
):
    """Load a data set and hold a validation split out of its training images.

    name: see DEFAULTS; 'folder:PATH' has class folders below PATH/train and PATH/test (or
    val). train_size, test_size: balanced subsets, the same for every seed; 0 takes all.
    val_size: 0 takes a twentieth of the training images, at most 1000. pad: padding of the
    random crops, by default the data set's own.
    Raises UserError when the files are absent and cannot be fetched, differ from
    torchvision's checksums (unless trusted), or cannot be read.
    """
    stream, usual_pad, flip = None, 0, False
    if name == 'shapes':
        n, m = train_size or 3200, test_size or 250
        val_size = val_size or min(1000, max(n // 20, 10))
        x, info = make_shapes(n + val_size, 'train', image_size or 32)
        y = info['outline']
        x_test, info = make_shapes(m, 'test', image_size or 32)
        y_test, classes = info['outline'], OUTLINES
    elif name.startswith('folder:'):
        stream, x_test, y_test, classes = _open_folder(name[7:], image_size or 224, test_size)
        x, y, flip = None, torch.tensor(stream.targets), True
    else:
        _, _, usual_pad, flip = TORCHVISION[name]
        with first_in():
            (x, y, classes), (x_test, y_test, _) = (
                _load_torchvision(name, root, split, trust) for split in ('train', 'test')
            )
    k = len(classes)
    order = _balanced_order(y, k, make_generator('split', name))
    val_size = val_size or min(1000, max(len(y) // 20, 1))
    train_size = train_size or len(y) - val_size
    if train_size + val_size > len(y):
        raise UserError(
            f'--train-size {train_size} and {val_size} validation images are more '
            f'than the {len(y)} training images of {name}'
        )
    if test_size > len(y_test):
        raise UserError(f'--test-size {test_size} is more than the {len(y_test)} of {name}')
    # sorted, so that the whole training set keeps its order whatever the split's seed
    val, train = order[:val_size].sort()[0], order[val_size : val_size + train_size].sort()[0]
    test = _balanced_order(y_test, k, make_generator('test', name))[: test_size or None].sort()[0]
    if stream:
        x_val, stream = _decode(stream, val), torch.utils.data.Subset(stream, train.tolist())
    else:
        x_val = x[val]
    pick = [(None if stream else x[train], y[train]), (x_val, y[val]), (x_test[test], y_test[test])]
    pick = [(None if a is None else a.to(device), b.to(device)) for a, b in pick]
    return Data(name, tuple(classes), *pick, usual_pad if pad is None else pad, flip, stream)


def study_data(args, device, test_size=None):
    """The data set that a script's flags ask for; test_size: another number of test images."""
    return load_data(
        args.dataset,
        args.data_root,
        trust=args.trust_data,
        train_size=args.train_size,
        test_size=args.test_size if test_size is None else test_size,
        image_size=args.image_size,
        pad=args.pad,
        device=device,
    )


def _balanced_order(y, k, generator):
    """A random order of which every prefix holds the classes as equally as can be."""
    shuffled = torch.randperm(len(y), generator=generator)
    onehot = F.one_hot(y[shuffled], k)
    rank = (onehot.cumsum(0) * onehot).sum(1)  # first, second, ... of its class
    return shuffled[rank.argsort(stable=True)]


def _load_torchvision(name, root, split, trust):
    """(x uint8 (N, C, H, W), y, class names) of one split."""
    cls, marker, _, _ = TORCHVISION[name]
    path = Path(root, marker.format(split=split))
    choose = dict(split=split) if name in ('svhn', 'stl10') else dict(train=split == 'train')
    present = path.exists()
    if trust and not name.endswith('mnist'):  # the MNISTs are not checked once unpacked

        def unchecked(files):
            return [[f[0], None] for f in files]

        changes = {
            'train_list': unchecked,
            'test_list': unchecked,
            'meta': lambda meta: dict(meta, md5=None),
            'split_list': lambda d: {k: [v[0], v[1], None] for k, v in d.items()},
        }
        cls = type(
            cls.__name__,
            (cls,),
            {
                attribute: change(getattr(cls, attribute))
                for attribute, change in changes.items()
                if hasattr(cls, attribute)
            },
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):
            data = cls(root, download=not present, **choose)
        x = torch.as_tensor(np.asarray(data.data))
        y = torch.as_tensor(np.asarray(getattr(data, 'targets', getattr(data, 'labels', None))))
        classes = getattr(data, 'classes', range(10))
        if len(y) != len(x) or y.min() < 0 or y.max() >= len(classes):
            raise ValueError('the labels do not fit')
    except BaseException as error:  # Ctrl-C, too
        if not present:
            if path.is_file():  # half a download would look present next time
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        if not present:
            raise UserError(
                f'no {name} in {root} and the download failed ({_short(error)}); '
                'give the folder that holds it with --data-root'
            )
        if 'corrupted' in str(error) and not trust:
            raise UserError(
                f"the {name} files in {root} are incomplete or differ from "
                "torchvision's checksums: --trust-data takes them as they are, "
                "deleting them downloads them afresh"
            )
        why = 'some are missing' if 'not found' in str(error) else _short(error)
        raise UserError(f'the {name} files in {root} cannot be read ({why}); deleting them downloads them afresh')
    if x.dim() == 3:
        x = x[:, None]
    elif x.shape[-1] == 3:
        x = x.permute(0, 3, 1, 2).contiguous()
    return x, y.long(), [str(c).split(' - ')[-1] for c in classes]


def _short(error):
    return f'{type(error).__name__}: {error}'.splitlines()[0][:120]


def _open_folder(path, size, test_size):
    """Training images to stream, and the test images decoded (at most test_size or 1000)."""
    from torchvision.transforms import v2

    edge = round(size * 1.14)  # the usual 256 for 224; random crops use the margin
    read = v2.Compose([v2.PILToTensor(), v2.Resize(edge, antialias=True), v2.CenterCrop(edge)])
    test = next((Path(path, name) for name in ('test', 'val') if Path(path, name).is_dir()), None)
    if not Path(path, 'train').is_dir() or not test:
        raise UserError(f'{path} needs the folders train/ and test/ (or val/), each with one folder per class')
    try:
        train, test = (
            torchvision.datasets.ImageFolder(p, read, loader=_read_image) for p in (Path(path, 'train'), test)
        )
    except FileNotFoundError as error:
        raise UserError(_short(error))
    if train.classes != test.classes:
        raise UserError(f'train and test folders of {path} have different classes')
    y = torch.tensor(test.targets)
    keep = _balanced_order(y, len(test.classes), make_generator('test', path))
    keep = keep[: test_size or 1000].sort()[0]
    return train, _decode(test, keep), y[keep], tuple(train.classes)


def _read_image(path):
    try:
        return torchvision.datasets.folder.default_loader(path)
    except Exception as error:  # PIL's say neither which file nor that it is the file
        raise UserError(f'{path} cannot be read ({_short(error)})')


def _decode(dataset, indices):
    """The centre crops of some images of a folder, uint8 in memory."""
    x = torch.stack([dataset[i][0] for i in indices.tolist()])
    margin = (x.shape[-1] - round(x.shape[-1] / 1.14)) // 2
    size = round(x.shape[-1] / 1.14)
    return x[..., margin : margin + size, margin : margin + size].contiguous()


def to_float(x):
    """uint8 (N, C, H, W) -> float in [0, 1], channels_last."""
    return x.to(torch.float32, memory_format=torch.channels_last).div_(255)


def augment(x, pad, flip, generator, size=None):
    """Random crops after zero padding and random flips, each image its own, on its device.

    x: (N, C, H, W) of any dtype; size: of the crop, by default H.
    """
    n, _, h, _ = x.shape
    size = size or h
    if pad:
        x = F.pad(x, (pad,) * 4)
    span = torch.arange(size, device=x.device)
    room = x.shape[-1] - size + 1
    top, left = torch.randint(room, (2, n, 1), generator=generator, device=x.device)
    columns = left + span
    if flip:
        mirrored = torch.rand(n, 1, generator=generator, device=x.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows = (top + span)[:, :, None]
    image = torch.arange(n, device=x.device)[:, None, None]
    return x[image, :, rows, columns[:, None, :]].permute(0, 3, 1, 2)  # is channels_last


def saturate(x, level):
    """Stretch every pixel away from 1/2: 1/2 + sign(u) |u|^(2/p) / 2 with u = 2x - 1; level 2
    is the identity, a large one leaves 0 and 1 (Zhang & Zhu 2019)."""
    u = 2 * x - 1
    return (0.5 + 0.5 * u.sign() * u.abs() ** (2 / level)).clamp(0, 1)


def permute_patches(x, order):
    """Cut every image into k x k patches; place i then shows patch order[i].

    x: (N, C, H, W), H and W divisible by k; order: (k*k,) for all images or (N, k*k).
    """
    n, c, h, w = x.shape
    k = math.isqrt(order.shape[-1])
    patches = x.reshape(n, c, k, h // k, k, w // k).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(n, k * k, c, h // k, w // k)
    patches = patches[torch.arange(n, device=x.device)[:, None], order.to(x.device).expand(n, -1)]
    patches = patches.view(n, k, k, c, h // k, w // k).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(n, c, h, w)


def train_batches(data, batch_size, generator, device):
    """Yield shuffled, augmented (x in [0, 1], y) of one epoch; the last, short batch is dropped.

    generator: on the device; the epoch's draws all come from it.
    """
    size = data.shape[-1]
    n = len(data.train[1])
    batch_size = min(batch_size, n)
    if data.stream:
        host = torch.Generator().manual_seed(int(torch.randint(2**31, (1,), generator=generator, device=device)))
        sampler = torch.utils.data.RandomSampler(data.stream, generator=host)
        batches = torch.utils.data.BatchSampler(sampler, batch_size, drop_last=True)
        source = _without_traceback(
            torch.utils.data.DataLoader(
                data.stream,  # many processes decode a part each
                batch_sampler=(_own(i, row_counts(batch_size)) for i in batches),
                generator=host,
                num_workers=min(8, os.cpu_count() or 1),
                pin_memory=device.type == 'cuda',
            )
        )
    else:
        order = torch.randperm(n, generator=generator, device=device)
        source = ((data.train[0][i], data.train[1][i]) for i in order[: n - n % batch_size].split(batch_size))
    for x, y in source:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        if data.stream:
            x, y = (_gather(v, row_counts(batch_size)) for v in (x, y))
        if data.pad or data.flip or x.shape[-1] != size:
            x = augment(x, 0 if data.stream else data.pad, data.flip, generator, size)
        yield to_float(x), y


def _without_traceback(loader):
    """The loader's batches; a UserError of a worker as that worker raised it."""
    try:
        yield from loader
    except UserError as error:  # its last line is 'common.UserError: what the worker said'
        message = str(error).splitlines()[-1].partition(': ')[2]
        error.__traceback__ = None  # holds the workers; they end now, not when the garbage goes
    else:
        return
    raise UserError(message)


# -------------------------------------------------------------------------------- 4. Models


class Normalize(nn.Module):
    """(x - mean) / std per channel: the first layer of every model, so that inputs and
    attacks live in [0, 1]."""

    def __init__(self, mean, std):
        super().__init__()
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
        self.register_buffer('scale', 1 / std, persistent=False)
        self.register_buffer('shift', -mean / std, persistent=False)

    def forward(self, x):
        return torch.addcmul(self.shift, x, self.scale)


def conv_bn(x, conv, bn):
    """bn(conv(x)); in eval mode as one convolution with the batch norm folded into it.

    Every attack runs in eval mode, so this saves it a pass over each activation, forwards and
    backwards. Exact up to rounding (about 1e-6 of the logits). A batch norm without running
    statistics uses the batch's own in either mode.
    """
    if bn.training or bn.running_var is None:
        return bn(conv(x))
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    return F.conv2d(
        x, conv.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale, conv.stride, conv.padding
    )


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, in_channels, channels, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(conv_bn(x, self.conv, self.bn), inplace=True)


class SmallCNN(nn.Module):
    """Five 3x3 convolutions, the first of `width` channels; ours, made for CPUs.

    The first sees 2x2 pixels as 12 channels (pixel_unshuffle): one resolution less to compute,
    and the input gradient, slow on CPUs for 3 channels, takes a third of the time.
    """

    def __init__(self, classes, channels=3, width=32):
        super().__init__()
        self.normalize = Normalize([0.5] * channels, [0.25] * channels)
        w = width
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), ConvBlock(4 * channels, w))
        self.stage1 = ConvBlock(w, w)
        self.stage2 = nn.Sequential(ConvBlock(w, 2 * w, 2), ConvBlock(2 * w, 2 * w))
        self.stage3 = ConvBlock(2 * w, 4 * w, 2)
        self.fc = nn.Linear(4 * w, classes)

    def forward(self, x):
        x = self.stage3(self.stage2(self.stage1(self.stem(self.normalize(x)))))
        return self.fc(x.mean((2, 3)))


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max pooling; 44.4 k parameters on 28x28 (LeCun et al. 1998)."""

    def __init__(self, classes, channels=1, size=28):
        super().__init__()
        self.normalize = Normalize([0.0] * channels, [1.0] * channels)
        self.conv1, self.conv2 = nn.Conv2d(channels, 6, 5), nn.Conv2d(6, 16, 5)
        side = ((size - 4) // 2 - 4) // 2
        self.fc1, self.fc2 = nn.Linear(16 * side * side, 120), nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(self.normalize(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class BasicBlock(nn.Module):
    """He et al. 2016; names of the parameters as in the usual CIFAR implementations."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        out = F.relu(conv_bn(x, self.conv1, self.bn1), inplace=True)
        out = conv_bn(out, self.conv2, self.bn2)
        return F.relu(out + (conv_bn(x, *self.shortcut) if self.shortcut else x), inplace=True)


class PreActBlock(nn.Module):
    """Pre-activation block of PreAct-ResNets and wide residual networks (He et al. 2016b)."""

    def __init__(self, in_channels, channels, stride, slope=0.0):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.LeakyReLU(slope)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.LeakyReLU(slope)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x):
        out = self.relu1(self.bn1(x))
        shortcut = self.shortcut(out) if self.shortcut else x
        return self.conv2(self.relu2(conv_bn(out, self.conv1, self.bn2))) + shortcut


class ResNet18(nn.Module):
    """ResNet-18 with the CIFAR stem (3x3, no pooling); 11.17 M parameters for ten classes."""

    def __init__(self, classes, channels=3, block=BasicBlock):
        super().__init__()
        self.normalize = Normalize([0.0] * channels, [1.0] * channels)
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        # a pre-activation network has its last batch norm before the pooling instead
        self.bn1 = nn.BatchNorm2d(64) if block is BasicBlock else None
        self.bn = nn.BatchNorm2d(512) if block is PreActBlock else None
        widths = (64, 64, 128, 256, 512)
        for i in range(1, 5):
            layer = nn.Sequential(block(widths[i - 1], widths[i], 1 if i == 1 else 2), block(widths[i], widths[i], 1))
            setattr(self, f'layer{i}', layer)
        self.linear = nn.Linear(512, classes)

    def forward(self, x):
        x = self.normalize(x)
        x = F.relu(conv_bn(x, self.conv1, self.bn1), inplace=True) if self.bn1 else self.conv1(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if self.bn:
            x = F.relu(self.bn(x), inplace=True)
        return self.linear(x.mean((2, 3)))


class WideResNet(nn.Module):
    """WRN-depth-width with ReLU; WRN-10-1 with LeakyReLU 0.1, as in Zhang et al. 2022."""

    def __init__(self, classes, channels=3, depth=28, width=10, slope=0.0, size=32):
        super().__init__()
        blocks = (depth - 4) // 6
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.normalize = Normalize([0.0] * channels, [1.0] * channels)
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        for i in range(1, 4):
            layer = nn.Sequential(
                *(
                    PreActBlock(widths[i - 1] if j == 0 else widths[i], widths[i], 2 if i > 1 and j == 0 else 1, slope)
                    for j in range(blocks)
                )
            )
            setattr(self, f'block{i}', layer)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.LeakyReLU(slope)
        self.fc = nn.Linear(widths[3] * (size // 32) ** 2, classes)
        for m in self.modules():  # the initialisation of the original
            if isinstance(m, nn.Conv2d):
                fan = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
                nn.init.normal_(m.weight, 0, math.sqrt(2 / fan))

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        return self.fc(F.avg_pool2d(self.relu(self.bn1(x)), 8).flatten(1))


class Normalized(nn.Module):
    """torchvision's model behind ImageNet's normalisation."""

    def __init__(self, model):
        super().__init__()
        self.normalize = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.model = model

    def forward(self, x):
        return self.model(self.normalize(x))


def make_model(arch, classes=10, shape=(3, 32, 32), seed=0, weights=None):
    """A model for images of `shape`, its initial weights a function of (arch, seed) alone.

    weights: a checkpoint to load, or 'IMAGENET1K_V1' for torchvision's own (downloaded).
    """
    channels, _, size = shape
    least = {'lenet5': 28, 'alexnet': 63}.get(arch, 32 if 'wrn' in arch else 16)
    if size < least:
        raise UserError(f'{arch} needs images of {least} pixels or more, these have {size}')
    if arch.startswith('small-cnn') and size % 2:
        raise UserError(f'{arch} needs an even image size, not {size}')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch.startswith('small-cnn'):
            model = SmallCNN(classes, channels, 64 if arch.endswith('64') else 32)
        elif arch == 'lenet5':
            model = LeNet5(classes, channels, size)
        elif arch in ('resnet18', 'preact-resnet18'):
            model = ResNet18(classes, channels, BasicBlock if arch == 'resnet18' else PreActBlock)
        elif arch.startswith('wrn-'):
            depth, width = map(int, arch.split('-')[1:])
            model = WideResNet(classes, channels, depth, width, 0.1 if arch == 'wrn-10-1' else 0.0, size)
        elif arch in ('alexnet', 'googlenet', 'resnet50'):
            extra = dict(aux_logits=False, init_weights=True) if arch == 'googlenet' else {}
            model = Normalized(getattr(torchvision.models, arch)(num_classes=classes, **extra))
        else:
            raise UserError(f"unknown architecture '{arch}'; known: {', '.join(ARCHS)}")
    if weights == 'IMAGENET1K_V1':
        try:
            with first_in():
                model.model = torchvision.models.get_model(arch, weights=weights)
        except Exception as error:
            raise UserError(f"torchvision's weights for {arch} are not to be had ({_short(error)})")
    elif weights:
        load_weights(model, weights)
    return model.to(memory_format=torch.channels_last)


def read_checkpoint(path):
    """torch.load that cannot run code; raises UserError for anything unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # what is wrong is said below
            return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'no checkpoint at {path}')
    except Exception as error:
        why = (
            'it holds no weights, or more than weights' if isinstance(error, pickle.UnpicklingError) else _short(error)
        )
        raise UserError(f'{path} is not a readable checkpoint ({why}); delete it, or save a plain state_dict')


def load_weights(model, path):
    """Load a foreign checkpoint: a state_dict, plain or under 'state_dict', 'model' or
    'best', with the prefixes of DataParallel, torch.compile and MadryLab's robustness."""
    state = read_checkpoint(path)
    for key in ('state_dict', 'model_state_dict', 'model', 'best'):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f'{path} holds no state_dict')
    state = {str(k): v for k, v in state.items()}
    if any(k.startswith('module.model.') for k in state):  # beside the attacker's own copy
        state = {k[13:]: v for k, v in state.items() if k.startswith('module.model.')}
    for prefix in ('module.', '_orig_mod.', 'model.'):
        if all(k.startswith(prefix) for k in state):
            state = {k[len(prefix) :]: v for k, v in state.items()}
    if isinstance(model, Normalized):
        model = model.model
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f'{path} does not fit {type(model).__name__}: ' + str(error).splitlines()[1].strip()[:160])


def final_logits(output):
    """The prediction of a model that may return (logits, other outputs)."""
    return output[0] if isinstance(output, tuple) else output


# ----------------------------------------------------------------------------- 5. Processes

# `torchrun --nproc-per-node=8 train_at.py ...` runs every script in many processes, one a GPU.
# All of them run the same program on the same data with the same random numbers; only inside
# `spread` does each compute its rows of a batch, which are put together again before anything
# depends on them. So losses, attacks, images dropped and decisions are those of one process,
# whatever the loss function or attack does, and the first process writes and prints.
#
# DistributedDataParallel would hand each process a batch of its own: random starts, crops and
# losses would then have to know of the others, batch norm on the CPU could not, and its reducer
# wants to see each forward pass but not those of the attack. Gradients are summed after the
# backward pass instead (`average_gradients`).

_joined = {}  # size and store, once `join` has been called
_alone = [False]


def launched():
    """Whether torchrun, or what sets the same variables, started several processes."""
    names = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
    return all(n in os.environ for n in names) and int(os.environ['WORLD_SIZE']) > 1


def rank():
    """The number of this process: 0, 1, ..."""
    return int(os.environ['RANK']) if launched() else 0


def first():
    """Whether this is the process that prints and writes."""
    return rank() == 0


def processes():
    """How many processes share the work; 1 inside `agreed`."""
    return 1 if _alone[0] else _joined.get('size', 1)


def join(device):
    """Meet the other processes: nccl on GPUs, gloo on CPUs."""
    _joined['store'], place, size = next(dist.rendezvous('env://'))
    if device.type == 'cuda':
        local = int(os.environ.get('LOCAL_RANK', place))
        if local >= torch.cuda.device_count():
            raise UserError(f'more processes than the {torch.cuda.device_count()} GPUs here')
        torch.cuda.set_device(local)
    dist.init_process_group(
        'nccl' if device.type == 'cuda' else 'gloo',
        rank=place,
        store=_joined['store'],
        world_size=size,
        timeout=timedelta(hours=12),
    )  # the others wait for a download
    _joined['size'] = size


def _failures(more):
    """How many processes have failed, this call's included."""
    return _joined['store'].add('failures', more) if 'store' in _joined else 0


@contextlib.contextmanager
def first_in():
    """The first process goes through the block first: what it downloads, the others find."""
    if processes() > 1 and not first():
        dist.barrier()
    yield
    if processes() > 1 and first():
        dist.barrier()


def agreed(function):
    """function() as called by the first process alone, the result or UserError in every one."""
    if processes() == 1:
        return function()
    found = [None, None]
    if first():
        _alone[0] = True
        try:
            found[0] = function()
        except UserError as error:
            found[1] = error
        finally:
            _alone[0] = False
    dist.broadcast_object_list(found, src=0)
    if found[1]:
        raise found[1]
    return found[0]


def row_counts(n):
    """How many of n rows each process takes."""
    size = processes()
    return [n // size + (i < n % size) for i in range(size)]


def _own(rows, counts):
    start = sum(counts[: rank()]) if len(counts) > 1 else 0
    return rows[start : start + counts[rank() if len(counts) > 1 else 0]]


def _gather(t, counts):
    """Every process's rows, in order: (counts[rank], ...) -> (sum of counts, ...). Images
    (N, C, H, W) are channels_last afterwards. As bytes, because gloo knows few dtypes."""
    if len(counts) == 1:
        return t
    image = t.dim() == 4
    t = t.permute(0, 2, 3, 1) if image else t
    padded = t.new_zeros(max(counts), *t.shape[1:])  # which all_gather needs
    padded[: len(t)] = t
    parts = [torch.empty_like(padded).view(-1).view(torch.uint8) for _ in counts]
    dist.all_gather(parts, padded.view(-1).view(torch.uint8))
    whole = torch.cat([part.view(t.dtype).view_as(padded)[:n] for part, n in zip(parts, counts)])
    return whole.permute(0, 3, 1, 2) if image else whole


# Inside the model gradients are `scale` times too large, so that the mean over the processes
# is the gradient of the network's part of the loss, and also of terms, such as a penalty on
# the weights, that every process computes in full.


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, counts, scale):
        ctx.counts, ctx.scale = counts, scale
        return _own(t, counts).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return _gather(gradient / ctx.scale, ctx.counts), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, counts, scale):
        ctx.counts, ctx.scale = counts, scale
        return _gather(t, counts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return _own(gradient, ctx.counts) * ctx.scale, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        t = t.clone()
        dist.all_reduce(t)
        return t

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return _Sum.apply(gradient)


def _each(function, value):
    """function of every tensor in a tensor, tuple, list or dict."""
    if isinstance(value, dict):
        return {k: _each(function, v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_each(function, v) for v in value)
    return function(value) if torch.is_tensor(value) else value


@contextlib.contextmanager
def spread(model):
    """Inside, each process computes its rows of every batch given to `model`.

    Of tensors (N, ...) among its arguments every process takes its rows, of its outputs it
    gets those of all; gradients with respect to the arguments are whole, too. In train mode
    batch norm uses the statistics of the whole batch and dropout draws for it. A batch of
    fewer images than processes is computed by all of them, or refused in train mode. Does
    nothing with one process, with a function that is no module, and inside itself.
    """
    if processes() == 1 or not isinstance(model, nn.Module) or hasattr(model, 'is_spread'):
        yield
        return
    now = {}  # of the present call

    def split(module, inputs, named):
        n = len(inputs[0])
        if n < processes() and module.training:
            raise UserError(f'{processes()} processes cannot train on a batch of {n}')
        now['counts'] = counts = row_counts(n) if n >= processes() else [n]
        now['scale'] = scale = processes() if module.training else 1

        def part(t):
            return _Split.apply(t, counts, scale) if t.dim() and len(t) == n else t

        return _each(part, inputs), _each(part, named)

    def join(module, inputs, output):
        return _each(lambda t: _Join.apply(t, now['counts'], now['scale']), output)

    changed = {nn.modules.batchnorm._BatchNorm: _whole_batch_norm, nn.Dropout: partial(_whole_dropout, now)}
    modules = [(m, f) for m in model.modules() for kind, f in changed.items() if isinstance(m, kind)]
    hooks = [model.register_forward_pre_hook(split, with_kwargs=True), model.register_forward_hook(join)]
    for module, function in modules:
        module.forward = partial(function, module)
    model.is_spread = True
    try:
        yield
    finally:
        del model.is_spread
        for module, _ in modules:
            del module.forward
        for hook in hooks:
            hook.remove()


def _whole_batch_norm(bn, x):
    """bn(x), by the statistics of the batch of all processes where it uses a batch's."""
    if not bn.training and bn.running_mean is not None:
        return type(bn).forward(bn, x)
    dims, shape = (0, *range(2, x.dim())), (-1, *[1] * (x.dim() - 2))
    v = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    total = _Sum.apply(torch.cat((v.sum(dims), v.new_tensor([v.numel() / v.shape[1]]))))
    n = total[-1]
    mean = total[:-1] / n
    centred = v - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(dims)) / n
    if bn.training and bn.track_running_stats and bn.running_mean is not None:
        bn.num_batches_tracked.add_(1)
        share = bn.momentum if bn.momentum is not None else 1 / bn.num_batches_tracked.item()
        with torch.no_grad():
            bn.running_mean.lerp_(mean, share)
            bn.running_var.lerp_(variance * n / (n - 1), share)
    scale = torch.rsqrt(variance + bn.eps)
    out = centred * (scale if bn.weight is None else scale * bn.weight).view(shape)
    return (out if bn.bias is None else out + bn.bias.view(shape)).to(x.dtype)


def _whole_dropout(now, module, x):
    """module(x) with its rows of the noise that one process would draw for the batch."""
    if not module.training or len(now['counts']) == 1:
        return type(module).forward(module, x)
    noise = F.dropout(x.new_ones(sum(now['counts']), *x.shape[1:]), module.p)
    return x * _own(noise, now['counts'])


def average_gradients(parameters):
    """Mean over the processes of all gradients, in one message."""
    if processes() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= processes()
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        g.copy_(part.view_as(g))


# ------------------------------------------------------------------------------- 6. Attacks

# Losses of a model's output; of a model that returns more than its logits, they see those.


def cross_entropy(output, y):
    return F.cross_entropy(final_logits(output).float(), y, reduction='none')


def margin(output, y):
    """Largest other logit minus the true one: > 0 where the model errs."""
    logits = final_logits(output)
    other = logits.scatter(1, y[:, None], -math.inf)
    return other.amax(1) - logits.gather(1, y[:, None])[:, 0]


def dlr(output, y, target=None):
    """Difference of logits ratio (Croce & Hein 2020), plain or towards a target class."""
    logits = final_logits(output)
    if logits.shape[1] < (3 if target is None else 4):
        raise UserError('the DLR loss needs three classes, the targeted one four')
    top = logits.sort(1, descending=True)[0]
    if target is None:
        return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)
    toward = logits.gather(1, target[:, None])[:, 0] - logits.gather(1, y[:, None])[:, 0]
    return toward / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


ATTACK_LOSSES = {'ce': cross_entropy, 'margin': margin, 'dlr': dlr}


@contextlib.contextmanager
def frozen(model):
    """Eval mode and no gradients for the parameters; everything as it was afterwards."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [m.training for m in modules]
    needs = [p for m in modules[:1] for p in m.parameters() if p.requires_grad]
    for m in modules:
        m.training = False
    for p in needs:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for m, mode in zip(modules, modes):
            m.training = mode
        for p in needs:
            p.requires_grad_(True)


def loss_and_gradient(model, x, y, loss_fn):
    """(logits, loss (N,), gradient of the loss with respect to x), all detached.

    loss_fn(output, y) -> (N,) sees the model's whole output. In fp16 the loss is scaled, or
    small gradients would vanish.
    """
    x = x.detach().requires_grad_()
    output = model(x)
    loss = loss_fn(output, y)
    kind = x.device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    (gradient,) = torch.autograd.grad(loss.sum() * (128 if half else 1), x)
    return (final_logits(output).detach(), loss.detach().float(), gradient / 128 if half else gradient)


def _flat_norm(v):
    """L2 norm per image, shaped to divide it: (N, C, H, W) -> (N, 1, 1, 1)."""
    return torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)


def project(x_adv, x, eps, norm):
    """The nearest point in the eps-ball around x (l2: along the ray), then in [0, 1]."""
    if norm == 'linf':
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    delta = x_adv - x
    return (x + delta * (eps / _flat_norm(delta)).clamp(max=1)).clamp(0, 1)


def _steepest(gradient, norm):
    return gradient.sign() if norm == 'linf' else gradient / _flat_norm(gradient)


def random_start(x, eps, norm, generator=None):
    """Uniform in the ball around x, then clipped to [0, 1]."""
    if norm == 'linf':
        noise = torch.rand(x.shape, generator=generator, device=x.device) * 2 - 1
    else:
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        radius = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
        noise = noise / _flat_norm(noise) * radius ** (1 / x[0].numel())
    return (x + eps * noise).clamp(0, 1)


def _check_eps(eps, norm):
    if norm not in ('linf', 'l2'):
        raise UserError(f"unknown norm '{norm}'; known: linf, l2")
    if not eps >= 0 or (norm == 'linf' and eps > 1):
        raise UserError(f'eps {eps:g} is outside [0, 1]')


def pgd(
    model,
    x,
    y,
    *,
    eps,
    step_size,
    steps,
    norm='linf',
    loss='ce',
    start='random',
    restarts=1,
    drop_fooled=False,
    generator=None,
):
    """Projected gradient ascent on a loss (Madry et al. 2018).

    x: (N, C, H, W) in [0, 1]; y: (N,). loss: 'ce', 'margin', 'dlr' or a function
    (output, y) -> (N,) to be maximised. start: 'random', 'clean' or a tensor of points.
    For training: the last iterate. With drop_fooled or several restarts, for evaluation: the
    first misclassified iterate, or else the one of largest loss among the restarts; fooled
    images are dropped, which changes no image's result, because the random starts of the
    whole batch are drawn first. The model is left as it was.
    """
    _check_eps(eps, norm)
    loss_fn = ATTACK_LOSSES.get(loss, loss)
    evaluate = drop_fooled or restarts > 1
    if eps == 0:
        return x.clone()
    best, best_loss = x.clone(), torch.full((len(x),), -math.inf, device=x.device)
    with frozen(model), spread(model):
        todo = torch.arange(len(x), device=x.device)
        if evaluate:
            todo = todo[predict(model, x) == y]
        for _ in range(restarts):
            x_adv = x if isinstance(start, str) else start
            if isinstance(start, str) and start == 'random':
                x_adv = random_start(x, eps, norm, generator)
            x_adv = project(x_adv, x, eps, norm)
            if not evaluate:
                for _ in range(steps):
                    _, _, gradient = loss_and_gradient(model, x_adv, y, loss_fn)
                    x_adv = project(x_adv + step_size * _steepest(gradient, norm), x, eps, norm)
                return x_adv
            x_adv = x_adv[todo]
            for step in range(steps + 1):
                if len(todo) == 0:
                    break
                if step < steps:
                    logits, value, gradient = loss_and_gradient(model, x_adv, y[todo], loss_fn)
                else:  # judge the last point, too
                    with torch.no_grad():
                        output = model(x_adv)
                    logits, value = final_logits(output), loss_fn(output, y[todo]).float()
                fooled = logits.argmax(1) != y[todo]
                better = fooled | (value > best_loss[todo] if step == steps else fooled)
                best[todo[better]] = x_adv[better]
                best_loss[todo[better]] = value[better]
                keep = ~fooled
                if fooled.any():
                    todo, x_adv = todo[keep], x_adv[keep]
                    gradient = gradient[keep] if step < steps else None
                if step < steps and len(todo):
                    x_adv = project(x_adv + step_size * _steepest(gradient, norm), x[todo], eps, norm)
    return best


def fgsm(model, x, y, *, eps, norm='linf', loss='ce'):
    """One full step along the sign of the gradient (Goodfellow et al. 2015)."""
    return pgd(model, x, y, eps=eps, step_size=eps, steps=1, norm=norm, loss=loss, start='clean')


def apgd_checkpoints(steps):
    """Where APGD looks back: 0, 0.22 N, 0.41 N, ... (Croce & Hein 2020)."""
    percent = [0, 22]
    while percent[-1] < 100:
        percent.append(percent[-1] + max(percent[-1] - percent[-2] - 3, 6))
    return [math.ceil(p * steps / 100) for p in percent[:-1]]


def apgd(model, x, y, *, eps, steps=100, norm='linf', loss='ce', restarts=1, targets=0, start='random', generator=None):
    """Auto-PGD (Croce & Hein 2020, algorithm 1): momentum 0.75, first step 2 eps, halved where
    the loss stalls; needs no step size.

    loss: 'ce', 'dlr', 'margin' or a function. targets > 0: the targeted DLR loss in turn
    towards that many most likely wrong classes. Fooled images are dropped. Returns the first
    misclassified point of each image, or else the one of largest loss.
    """
    _check_eps(eps, norm)
    best, best_loss = x.clone(), torch.full((len(x),), -math.inf, device=x.device)
    with frozen(model), spread(model):
        with torch.no_grad():
            logits = final_logits(model(x))
        todo = (logits.argmax(1) == y).nonzero()[:, 0]
        wrong = logits.scatter(1, y[:, None], -math.inf).argsort(1, descending=True)
        targets = min(targets, logits.shape[1] - 1)
        for run in range(restarts * max(targets, 1)):
            x0 = random_start(x, eps, norm, generator) if start == 'random' else x
            if len(todo) == 0:
                continue
            loss_fn = ATTACK_LOSSES.get(loss, loss)
            if targets:
                goal = wrong[:, run % targets]

            def objective(output, i):
                if targets:
                    return dlr(output, y[i], goal[i])
                return loss_fn(output, y[i])

            x_adv, value, fooled = _apgd_run(model, x, y, x0, todo, objective, eps, steps, norm)
            better = fooled | (value > best_loss[todo])
            best[todo[better]], best_loss[todo[better]] = x_adv[better], value[better]
            todo = todo[~fooled]
    return best


def _apgd_run(model, x, y, x0, todo, objective, eps, steps, norm):
    """One run on the images `todo`: (best points, their loss, fooled), in that order."""
    checkpoints = apgd_checkpoints(steps)
    result, result_loss = x0[todo].clone(), torch.full((len(todo),), -math.inf, device=x.device)
    fooled = torch.zeros(len(todo), dtype=torch.bool, device=x.device)
    at = torch.arange(len(todo), device=x.device)  # places in `todo` still running
    x_k = x0[todo]
    x_previous, x_best = x_k, x_k
    step = torch.full((len(todo), 1, 1, 1), 2.0 * eps, device=x.device)
    gradient = best_gradient = torch.zeros_like(x_k)
    best_value = last_value = last_best = torch.full_like(result_loss, -math.inf)
    last_step = step
    rises = torch.zeros_like(result_loss)
    for k in range(steps + 1):
        # f(x_k) and its gradient; x_k is the k-th iterate
        logits, value, gradient = loss_and_gradient(
            model, x_k, y[todo[at]], lambda output, _: objective(output, todo[at])
        )
        rises = rises + (value > last_value) if k else rises
        improved = value > best_value
        best_value = torch.where(improved, value, best_value)
        pick = improved[:, None, None, None]
        x_best = torch.where(pick, x_k, x_best)
        best_gradient = torch.where(pick, gradient, best_gradient)
        last_value = value
        hit = logits.argmax(1) != y[todo[at]]
        result[at], result_loss[at] = x_best, best_value
        result[at[hit]], result_loss[at[hit]], fooled[at[hit]] = x_k[hit], value[hit], True
        if k == steps or hit.all():
            break
        if k == 0:
            last_best, last_step = best_value, step
        elif k in checkpoints:
            period = k - checkpoints[checkpoints.index(k) - 1]
            stalled = rises < 0.75 * period
            stuck = (last_step == step)[:, 0, 0, 0] & (last_best == best_value)
            halve = (stalled | stuck)[:, None, None, None]
            last_best, last_step = best_value, step
            step = torch.where(halve, step / 2, step)
            x_k = torch.where(halve, x_best, x_k)
            gradient = torch.where(halve, best_gradient, gradient)
            rises = torch.zeros_like(rises)
        if hit.any():
            keep = ~hit
            at = at[keep]
            # fmt: off
            (x_k, x_previous, x_best, step, gradient, best_gradient, best_value, last_value, last_best,
             last_step, rises) = (v[keep] for v in (
                 x_k, x_previous, x_best, step, gradient, best_gradient, best_value, last_value, last_best,
                 last_step, rises))
            # fmt: on
        clean = x[todo[at]]
        z = project(x_k + step * _steepest(gradient, norm), clean, eps, norm)
        share = 0.75 if k else 1.0
        x_next = project(x_k + share * (z - x_k) + (1 - share) * (x_k - x_previous), clean, eps, norm)
        x_previous, x_k = x_k, x_next
    return result, result_loss, fooled


def square(model, x, y, *, eps, queries=1000, p_init=0.8, generator=None):
    """Square attack, linf (Andriushchenko et al. 2020, algorithms 1 and 2): random search
    with square patches of +-eps on the margin, no gradients.

    queries: per image. p_init: first share of pixels changed; it shrinks by the paper's
    schedule, stretched to the number of queries. Fooled images are dropped.
    """
    _check_eps(eps, 'linf')
    n, c, h, w = x.shape
    device = x.device

    def signs(*shape):
        return torch.randint(2, shape, generator=generator, device=device) * 2.0 - 1

    with frozen(model), spread(model), torch.no_grad():
        todo = (predict(model, x) == y).nonzero()[:, 0]
        best = x.clone()
        stripes = (x + eps * signs(n, c, 1, w)).clamp(0, 1)
        worst = torch.full((n,), math.inf, device=device)  # true logit minus largest other
        rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
        for query in range(queries):
            halvings = sum(query / queries > q / 10000 for q in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
            side = max(1, min(round(math.sqrt(p_init / 2**halvings * h * w)), h - 1, w - 1))
            top = torch.randint(h - side + 1, (n, 1), generator=generator, device=device)
            left = torch.randint(w - side + 1, (n, 1), generator=generator, device=device)
            colour = signs(n, c, 1, 1)
            if query == 0:
                candidate = stripes[todo]
            else:
                row = (rows >= top[todo]) & (rows < top[todo] + side)
                column = (columns >= left[todo]) & (columns < left[todo] + side)
                patch = row[:, None, :, None] & column[:, None, None, :]
                clean = x[todo]
                candidate = torch.where(patch, (clean + eps * colour[todo]).clamp(0, 1), best[todo])
            value = -margin(model(candidate), y[todo]).float()
            better = value < worst[todo]
            best[todo[better]], worst[todo[better]] = candidate[better], value[better]
            todo = todo[worst[todo] > 0]
            if len(todo) == 0:
                break
    return best


def predict(model, x):
    """Predicted classes (N,), without gradients, in the model's present mode."""
    with torch.no_grad():
        return final_logits(model(x)).argmax(1)


def logits_of(model, x, batch_size=250):
    """Logits (N, K) in eval mode, without gradients. x: uint8 or float."""
    with frozen(model), spread(model), torch.no_grad():
        return torch.cat(
            [final_logits(model(to_float(b) if b.dtype == torch.uint8 else b)) for b in x.split(batch_size)]
        )


def correct_under(model, x, y, attack=None, batch_size=250):
    """Whether each image is still classified correctly after `attack(model, x, y)`: (N,) bool.

    x: uint8 or float. No attack: natural accuracy. Runs in float32, in eval mode, and checks
    that the attack stayed in [0, 1]; `attack.eps` and `attack.norm`, where the attack is a
    functools.partial that fixes them, are checked as well.
    """
    limits = getattr(attack, 'keywords', {})
    correct = []
    with frozen(model), spread(model):
        for i in range(0, len(y), batch_size):
            a, b = x[i : i + batch_size], y[i : i + batch_size]
            a = to_float(a) if a.dtype == torch.uint8 else a
            x_adv = attack(model, a, b) if attack else a
            if attack and 'eps' in limits:
                check_attack(x_adv, a, limits['eps'], limits.get('norm', 'linf'))
            correct.append(predict(model, x_adv) == b)
    return torch.cat(correct)


def check_attack(x_adv, x, eps, norm, tolerance=1e-6):
    """Raise AssertionError unless x_adv is finite, in [0, 1] and in the eps-ball around x."""
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if norm == 'linf' else delta.norm(dim=1)
    assert torch.isfinite(x_adv).all(), 'the attack returned non-finite values'
    assert 0 <= x_adv.min() and x_adv.max() <= 1, 'the attack left [0, 1]'
    limit = eps + tolerance * (1 if norm == 'linf' else 10)
    assert size.max() <= limit, f'the attack left the ball: {size.max():.6f} > {eps:.6f}'


def evaluation_attacks(args, seed, device, eps=None, pgd_steps=20):
    """The attacks that every network faces: {name: function (model, x, y) -> x_adv}.

    args: with eps, norm and the flags of `add_attack_flags`; eps: another radius. pgd_steps:
    of the shorter PGD, 20 or, as usual on MNIST, 40.
    """
    eps = eps or args.eps

    def of(attack, name, **options):
        generator = make_generator('evaluate', name, seed, device=device)
        return partial(attack, eps=eps, generator=generator, **options)

    attacks = {'fgsm': partial(fgsm, eps=eps, norm=args.norm)}
    for steps, step_size in ((pgd_steps, eps / 4), (100, eps / 10)):
        attacks[f'pgd{steps}'] = of(
            pgd, f'pgd{steps}', norm=args.norm, steps=steps, step_size=step_size, drop_fooled=True
        )
    attacks['apgd_ce'] = of(apgd, 'apgd_ce', norm=args.norm, steps=args.apgd_steps)
    attacks['apgd_t'] = of(apgd, 'apgd_t', norm=args.norm, steps=args.apgd_steps, targets=args.targets)
    if args.norm == 'linf':
        attacks['square'] = of(square, 'square', queries=args.square_queries)
    return attacks


def masking_check(model, x, y, correct, *, eps, norm='linf', loss='margin', generator=None):
    """Symptoms of masked gradients (Athalye et al. 2018; Carlini et al. 2019), as
    {symptom: (value, threshold, raised)}.

    x, y: a small batch of float images; correct: {attack: (N,) bool} of the evaluation, any
    of 'fgsm', 'pgd20', 'pgd100', 'apgd_ce', 'apgd_t', 'square'; loss: of the unbounded attack.
    """

    def rate(name):
        return correct[name].float().mean().item()

    with frozen(model), spread(model):
        _, _, gradient = loss_and_gradient(model, x, y, cross_entropy)
        logits = final_logits(model(x)).detach()
        again = final_logits(model(x)).detach()
        rows = logits.sum(1)
        free = pgd(
            model,
            x,
            y,
            eps=1.0 if norm == 'linf' else 0.5 * x[0].numel() ** 0.5,
            step_size=0.1 if norm == 'linf' else 2.0,
            steps=30,
            norm=norm,
            loss=loss,
            drop_fooled=True,
            generator=generator,
        )
        unbounded = (predict(model, free) == y).float().mean().item()
    zero = (gradient.flatten(1).abs().amax(1) == 0).float().mean().item()
    chance = 1.5 / logits.shape[1]
    checks = {
        'zero input gradients (share of images)': (zero, 0.05),
        'random outputs (share of images)': ((logits != again).any(1).float().mean().item(), 0.0),
        'outputs are probabilities (share of images)': (
            (((rows - 1).abs() < 1e-4) & (logits >= 0).all(1)).float().mean().item(),
            0.5,
        ),
        'unbounded attack leaves accuracy': (unbounded, chance),
    }
    pairs = (
        ('one step beats twenty', 'pgd20', 'fgsm', 0.01),
        ('twenty steps are too few', 'pgd20', 'pgd100', 0.03),
        ('cross-entropy is a poor attack', 'apgd_ce', 'apgd_t', 0.08),
    )
    for text, weak, strong, threshold in pairs:
        if weak in correct and strong in correct:
            checks[text + ' (gap)'] = (rate(weak) - rate(strong), threshold)
    white = [v for k, v in correct.items() if k not in ('natural', 'square', 'worst')]
    if 'square' in correct and white:
        white = torch.stack(list(white)).all(0)
        checks['black box finds what white box misses'] = ((white & ~correct['square']).float().mean().item(), 0.01)
    return {k: (value, limit, value > limit) for k, (value, limit) in checks.items()}


EPS_MULTIPLES = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8)  # 0 to 64/255 at eps 8/255


def eps_curve(model, x, y, *, eps, norm='linf', loss='margin', generator=None):
    """Accuracy under PGD-20 at EPS_MULTIPLES of eps, a list of floats; it must reach 0."""
    accuracy = []
    for multiple in EPS_MULTIPLES:
        radius = min(multiple * eps, 1.0 if norm == 'linf' else math.inf)
        attack = partial(
            pgd, eps=radius, norm=norm, steps=20, step_size=radius / 8, loss=loss, drop_fooled=True, generator=generator
        )
        accuracy.append(correct_under(model, x, y, attack).float().mean().item())
    return accuracy


# ------------------------------------------------------------------------------ 7. Training

# Each method is a function (model, x, y, threat, generator) -> loss of one batch, where threat
# is dict(eps, step_size, steps, norm). The attack runs in eval mode, the update in train mode.


def standard_loss(model, x, y, threat, generator):
    """Empirical risk minimisation on natural images."""
    return F.cross_entropy(final_logits(model(x)), y)


def fgsm_loss(model, x, y, threat, generator):
    """FGSM with a random start and a step of 1.25 eps (Wong et al. 2020)."""
    one = dict(threat, steps=1, step_size=1.25 * threat['eps'])
    return F.cross_entropy(model(pgd(model, x, y, **one, generator=generator)), y)


def pgd_loss(model, x, y, threat, generator):
    """PGD adversarial training (Madry et al. 2018)."""
    return F.cross_entropy(model(pgd(model, x, y, **threat, generator=generator)), y)


def kl_divergence(logits, reference):
    """KL(softmax(reference) || softmax(logits)) of each image, in nats: (N,)."""
    log_p, log_q = F.log_softmax(reference.float(), 1), F.log_softmax(logits.float(), 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def trades_loss(model, x, y, threat, generator, beta=6.0):
    """TRADES (Zhang et al. 2019): CE(x) + beta KL(p(x) || p(x_adv)), x_adv maximising
    the KL from a start at N(0, 0.001^2); beta = 1 / lambda."""
    with frozen(model):
        natural = model(x).detach()
    start = x + 0.001 * torch.randn(x.shape, generator=generator, device=x.device)
    x_adv = pgd(
        model, x, y, **threat, start=start, generator=generator, loss=lambda logits, _: kl_divergence(logits, natural)
    )
    logits, logits_adv = model(torch.cat((x, x_adv))).chunk(2)
    return F.cross_entropy(logits, y) + beta * kl_divergence(logits_adv, logits).mean()


def mart_loss(model, x, y, threat, generator, weight=5.0):
    """MART (Wang et al. 2020): boosted CE(x_adv) + weight (1 - p_y(x)) KL."""
    x_adv = pgd(model, x, y, **threat, generator=generator)
    logits, logits_adv = model(torch.cat((x, x_adv))).chunk(2)
    p, q = F.softmax(logits.float(), 1), F.softmax(logits_adv.float(), 1)
    other = q.scatter(1, y[:, None], 0).amax(1)
    boosted = F.cross_entropy(logits_adv, y) - torch.log1p(-other + 1e-6).mean()
    true = p.gather(1, y[:, None])[:, 0]
    return boosted + weight * ((1 - true) * kl_divergence(logits_adv, logits)).mean()


METHODS = {'standard': standard_loss, 'fgsm': fgsm_loss, 'pgd': pgd_loss, 'trades': trades_loss, 'mart': mart_loss}
METHOD_NAMES = {'standard': 'standard', 'fgsm': 'FGSM-AT', 'pgd': 'PGD-AT', 'trades': 'TRADES', 'mart': 'MART'}
RECIPE_VERSION = 1  # raise it when a change of this file changes weights


def lr_factor(schedule, progress):
    """The share of the peak learning rate at progress in [0, 1) through the training.

    piecewise: x0.1 at 1/2 and 3/4 (Rice et al. 2020); drops:a,b: x0.1 at a, at b, ..., and
    drops:a,b:f: x f; cosine: to 0; onecycle: linear up over the first quarter, linear down to
    0; constant. ValueError otherwise.
    """
    if schedule == 'constant':
        return 1.0
    if schedule == 'piecewise':
        schedule = 'drops:0.5,0.75'
    if schedule.startswith('drops:'):
        drops, _, factor = schedule[6:].partition(':')
        return float(factor or 0.1) ** sum(progress >= float(d) for d in drops.split(','))
    if schedule == 'cosine':
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule != 'onecycle':
        raise ValueError(schedule)
    return max(progress, 1e-3) / 0.25 if progress < 0.25 else (1 - progress) / 0.75


def eps_factor(warmup, progress):
    """The share of eps: 0 for the first third of the warm-up, then linear up to 1."""
    return min(1.0, max(0.0, (progress / warmup - 1 / 3) * 1.5)) if warmup else 1.0


def model_recipe(args, method, seed, extra=None):
    """Everything that changes the weights; the name of the checkpoint is made of it."""
    keys = [
        'dataset',
        'arch',
        'epochs',
        'batch_size',
        'lr',
        'weight_decay',
        'schedule',
        'ema',
        'train_size',
        'image_size',
        'pad',
        'amp',
    ]
    if method != 'standard':
        keys += ['norm', 'eps', 'eps_warmup']
        keys += ['step_size', 'steps'] if method != 'fgsm' else []
    recipe = {k: getattr(args, k) for k in keys}
    recipe |= dict(method=method, seed=seed, version=RECIPE_VERSION) | (extra or {})
    if args.dataset == 'shapes':
        recipe['shapes_version'] = SHAPES_VERSION
    return recipe


def model_path(out, recipe):
    """runs/models/cifar10-resnet18-pgd-linf8-e200-s0-<hash>.pt"""
    r = recipe
    threat = f"-{r['norm']}{r['eps'] * (255 if r['norm'] == 'linf' else 1):.4g}" if 'eps' in r else ''
    data = r['dataset'].replace(':', '-').replace('/', '_')
    return Path(
        out, 'models', f"{data}-{r['arch']}-{r['method']}{threat}-e{r['epochs']}-s{r['seed']}-{short_hash(r)}.pt"
    )


def train_model(
    args,
    data,
    method,
    seed,
    device,
    *,
    build=make_model,
    loss_fn=None,
    extra=None,
    val_loss='ce',
    keep=(),
    labels=None,
    check_every=1,
):
    """Train, or take from runs/models, or continue after an interruption.

    method: a key of METHODS, or any name with a loss_fn of the same signature; build(arch,
    classes, shape, seed) -> model; extra: what else changes the weights, a JSON-able dict;
    val_loss: what the validation attack maximises, as in `pgd`; keep: epochs after which the
    weights are kept in a folder beside the checkpoint (0: the initial ones; 0.25: a quarter into
    the first epoch), for `restore`. A training that lacks some of them is done again, in that
    folder; labels: (N, ...), what
    loss_fn gets of each training image as its y, by default data.train[1]; check_every: epochs
    between evaluations, the last epoch has one in any case.
    Epochs are evaluated on the validation split; `best` is the one of highest robust
    (standard training: natural) validation accuracy. Every random draw of an epoch comes
    from (seed, epoch), so that a resumed training equals an uninterrupted one.
    Returns dict(best, last: state_dicts; best_epoch, history, collapsed, seconds, recipe,
    kept: {epoch: file}, path: of the rest).
    """
    name = METHOD_NAMES.get(method, method)
    recipe = model_recipe(args, method, seed, extra)
    path = model_path(args.out, recipe)
    folder = path.with_suffix('')  # of kept epochs
    beside = folder / 'training.pt'
    kept = {e: folder / (f'epoch{e:04d}.pt' if e == int(e) else f'epoch{e:012.7f}.pt') for e in keep}

    def lacks(saved):
        done = len(saved.get('history', ()))
        return not all(file.exists() for epoch, file in kept.items() if epoch <= done)

    def begin():
        """(where to save, what was saved so far)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if args.fresh:
            path.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        saved = read_training(path, recipe)
        if keep and saved and (lacks(saved) or beside.exists()):  # and leave that alone
            saved = read_training(beside, recipe)
            if lacks(saved) or not saved:
                log.info('%s: training again, to keep the weights of its epochs', name)
                saved = {}
            return beside, saved
        return path, saved

    path, saved = agreed(begin)
    if saved.get('finished'):
        log.info('%s: trained already (%s)', name, path)
        return warn_collapsed(saved | dict(kept=kept, path=path), name)

    dtype = pick_precision(device, args.amp)
    loss_fn = loss_fn or METHODS[method]
    model = build(args.arch, len(data.classes), data.shape, seed).to(device)
    average = copy.deepcopy(model) if args.ema else None
    judged = average or model
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    history, best, best_epoch, seconds = [], None, 0, 0.0
    if saved:
        with fitting(path):
            for part, state in ((model, 'model'), (optimizer, 'optimizer'), (scaler, 'scaler')):
                if saved[state] or part is not scaler:  # begun in another precision: none
                    part.load_state_dict(saved[state])
            if average:
                average.load_state_dict(saved['average'])
        history, best, best_epoch, seconds = (saved[k] for k in ('history', 'best', 'best_epoch', 'seconds'))
        log.info('%s: continuing after epoch %d', name, len(history))
    if 0 in kept and not saved:
        write_weights(kept[0], judged.state_dict())
    if args.compile and processes() > 1:  # splitting a batch breaks its graph
        log.warning('--compile does nothing with several processes')
    elif args.compile:
        model.compile()

    n = len(data.train[1])
    source = data if labels is None else replace(data, train=(data.train[0], labels))
    per_epoch = n // min(args.batch_size, n)
    within = {round(e * per_epoch): file for e, file in kept.items() if e != int(e)}
    threat = dict(eps=args.eps, step_size=args.step_size, steps=args.steps, norm=args.norm)
    started = time.perf_counter() - seconds
    bar = tqdm(
        total=args.epochs * per_epoch,
        initial=len(history) * per_epoch,
        leave=False,
        desc=name,
        disable=not (first() and sys.stderr.isatty()),
    )
    for epoch in range(len(history), args.epochs):
        generator = make_generator('train', seed, epoch, device=device)
        # for dropout, which takes torch's own generator
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator, device=device)))
        total = torch.zeros((), device=device)
        model.train()
        batches = train_batches(source, args.batch_size, generator, device)
        for step, (x, y) in enumerate(batches, epoch * per_epoch):
            progress = step / (per_epoch * args.epochs)
            lr = args.lr * lr_factor(args.schedule, progress)
            share = eps_factor(args.eps_warmup, progress)
            for group in optimizer.param_groups:
                group['lr'] = lr
            now = dict(threat, eps=share * args.eps, step_size=share * args.step_size)
            with spread(model), torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = loss_fn(model, x, y, now, generator)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            average_gradients(model.parameters())
            scaler.step(optimizer)
            scaler.update()
            if average:
                update_average(average, model, min(args.ema, (step + 1) / (step + 10)))
            if step + 1 in within:
                write_weights(within[step + 1], judged.state_dict())
            total += loss.detach()
            bar.update()
            if not bar.disable and step % 10 == 0:
                shown = {
                    k[4:]: f'{v:.3f}' for k, v in (history or [{}])[-1].items() if k in ('val_natural', 'val_robust')
                }
                bar.set_postfix(loss=f'{loss.item():.3f}', **shown)
        row = dict(method=method, seed=seed, epoch=epoch + 1, lr=lr, eps=now['eps'], loss=total.item() / per_epoch)
        checked = (epoch + 1) % check_every == 0 or epoch + 1 == args.epochs
        row |= epoch_accuracy(judged, data, args, val_loss) if checked else dict.fromkeys(EPOCH_ACCURACY, math.nan)
        row['seconds'] = seconds = round(time.perf_counter() - started, 2)
        if not math.isfinite(row['loss']):
            raise UserError(f'{name}: the loss is {row["loss"]} in epoch {epoch + 1}; try a smaller --lr')
        # robust accuracy selects, but not in the easier epochs of the warm-up
        row['score'] = (
            -1.0
            if not checked or (method != 'standard' and share < 1)
            else row['val_natural' if method == 'standard' else 'val_robust']
        )
        if row['score'] >= max((h['score'] for h in history), default=-1.0):
            best, best_epoch = copy.deepcopy(judged.state_dict()), epoch + 1
        history.append(row)
        if checked:
            bar.clear()
            log.info(
                '%-9s s%d epoch %3d/%d  loss %.3f  train %.3f / %.3f  val %.3f / %.3f  %4.0f s',
                name,
                seed,
                epoch + 1,
                args.epochs,
                row['loss'],
                row['train_natural'],
                row['train_robust'],
                row['val_natural'],
                row['val_robust'],
                seconds,
            )
        result = dict(recipe=recipe, history=history, best=best, best_epoch=best_epoch, seconds=seconds)
        if epoch + 1 < args.epochs:
            result |= dict(
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(),
                average=average.state_dict() if average else {},
            )
        else:
            collapsed = row['val_top_share'] > 0.9 and len(data.classes) > 2
            result |= dict(
                finished=True,
                last=judged.state_dict(),
                collapsed=collapsed,
                device=device.type,
                precision=str(dtype or torch.float32),
            )
        if epoch + 1 in kept:
            write_weights(kept[epoch + 1], judged.state_dict())
        write_weights(path, result)
    bar.close()
    return warn_collapsed(result | dict(kept=kept, path=path), name)


def read_training(path, recipe):
    """What `train_model` saved at path; empty where there is nothing."""
    if not path.exists():
        return {}
    saved = read_checkpoint(path)
    if not (
        isinstance(saved, dict)
        and saved.get('recipe') == recipe
        and {'history', 'best', 'last' if saved.get('finished') else 'model'} <= saved.keys()
    ):
        raise UserError(f'{path} holds another model than its name says; delete it')
    return saved


@contextlib.contextmanager
def fitting(path):
    """Inside, weights from `path` are put in their place; UserError where they do not fit."""
    try:
        yield
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f'{path} does not fit the network, whose code may have changed ({_short(error)}); delete it')


def write_weights(path, obj):
    """torch.save, atomically. A full disk is an OSError, which torch.save makes a riddle."""
    if not first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def warn_collapsed(result, name):
    """Say that a trained model predicts one class for nearly every image, if it does."""
    if result['collapsed']:
        log.warning(
            '%s: COLLAPSED, it predicts one class for nearly every image (natural '
            'accuracy %.3f); try --eps-warmup 0.5 or a smaller --lr',
            name,
            result['history'][-1]['val_natural'],
        )
    return result


@torch.no_grad()
def update_average(average, model, decay):
    """Exponential moving average of parameters and batch-norm statistics."""
    for a, b in zip(average.state_dict().values(), model.state_dict().values()):
        if a.dtype.is_floating_point:
            a.lerp_(b, 1 - decay)
        else:
            a.copy_(b)


EPOCH_ACCURACY = ('val_natural', 'val_robust', 'train_natural', 'train_robust', 'val_fgsm', 'val_top_share')


def epoch_accuracy(model, data, args, loss='ce'):
    """Natural and PGD-10 accuracy on the validation split and on as many training images,
    FGSM accuracy and the share of the most frequent prediction on the validation split."""
    result = {}
    x_val, y_val = data.val
    splits = {'val': (x_val, y_val)}
    if not data.stream:
        splits['train'] = tuple(t[: len(y_val)] for t in data.train)
    for name, (x, y) in splits.items():
        attack = partial(
            pgd,
            eps=args.eps,
            step_size=args.eps / 4,
            steps=10,
            norm=args.norm,
            loss=loss,
            drop_fooled=True,
            generator=make_generator('epoch', device=x.device),
        )
        result[f'{name}_natural'] = correct_under(model, x, y).float().mean().item()
        result[f'{name}_robust'] = correct_under(model, x, y, attack).float().mean().item()
    if data.stream:
        result |= dict(train_natural=math.nan, train_robust=math.nan)
    one_step = partial(fgsm, eps=args.eps, norm=args.norm, loss=loss)
    result['val_fgsm'] = correct_under(model, x_val, y_val, one_step).float().mean().item()
    with frozen(model), spread(model):
        guesses = torch.cat([predict(model, to_float(x)) for x in x_val.split(250)])
    result['val_top_share'] = guesses.bincount().max().item() / len(guesses)
    return result


def restore(result, which, args, data, device, build=make_model):
    """The trained model of `train_model`'s result in eval mode; which: 'best', 'last' or an
    epoch that was kept."""
    model = build(args.arch, len(data.classes), data.shape, 0).to(device)
    path = result.get('path', 'the result') if isinstance(which, str) else result['kept'][which]
    state = result[which] if isinstance(which, str) else agreed(lambda: read_checkpoint(path))
    with fitting(path):
        model.load_state_dict(state)
    return model.eval()


# ------------------------------------------------------------------------------- 8. Results

COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
METHOD_COLOURS = dict(zip(METHODS, COLOURS))
STYLE = {
    'font.size': 9,
    'axes.titlesize': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.alpha': 0.25,
    'lines.linewidth': 1.5,
    'image.cmap': 'viridis',
    'axes.prop_cycle': matplotlib.cycler(color=COLOURS),
    'pdf.fonttype': 42,
    'savefig.dpi': 150,
    'figure.dpi': 150,
}


def load_results(folder, config, script, fresh=False):
    """What an earlier, same run measured; empty if the configuration or the code differ."""
    return agreed(lambda: _load_results(folder, config, script, fresh))


def _load_results(folder, config, script, fresh):
    path = Path(folder, 'results.json')
    code = short_hash([Path(f).read_text() for f in (script, __file__)])
    empty = dict(config=config, code=code)
    if fresh:
        path.unlink(missing_ok=True)  # for `measure`, too
    if not path.exists():
        return empty
    try:
        results = json.loads(path.read_text())
    except ValueError:
        log.warning('%s is not readable: measuring again', path)
        return empty
    if not isinstance(results, dict) or results.get('config') != json.loads(json.dumps(config)):
        return empty
    if results.get('code') != code:
        log.info('the code has changed since %s was written: measuring again', path)
        return empty
    return results


def measured(args, study, name):
    """(folder, results) of study(args) or, with --plot-only, of a finished run's folder."""
    if not args.plot_only:
        return study(args)
    folder = Path(args.plot_only)
    try:
        results = json.loads((folder / 'results.json').read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'{folder} holds no readable results.json ({_short(error)})')
    if not isinstance(results, dict) or results.get('finished') != name:
        raise UserError(f'{folder} holds no finished run of {name}')
    start_log()
    return folder, results


def measure(results, key, function, folder):
    """results[key], computed by function() once and saved at once, together with what another
    run of the same command has saved meanwhile."""

    def others():
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        same = isinstance(found, dict) and all(
            found.get(k) == json.loads(to_json(results.get(k))) for k in ('config', 'code')
        )
        return found if same else {}

    path = Path(folder, 'results.json')
    if key not in results:
        results[key] = function()
        for k, v in agreed(others).items():
            results.setdefault(k, v)
        write_json(path, results)
        results[key] = agreed(lambda: json.loads(to_json(results[key])))
    return results[key]


def finish(folder, results):
    """Mark a study as finished; returns its results as the file has them. Only the first
    process returns: tables, figures and claims are for one."""
    if not first():
        sys.exit()
    path = Path(folder, 'results.json')
    results = results | dict(finished=path.parent.parent.name)
    if not path.exists() or path.read_text() != to_json(results):
        write_json(path, results)
    return json.loads(to_json(results))  # not the file, which a run beside this one may write


def rank_correlation(a, b):
    """Spearman's rho of two sequences; nan where one is constant."""
    a, b = rankdata(a), rankdata(b)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else math.nan


def pack(array):
    """An array for results.json: small, exact, readable with base64, zlib and numpy."""
    a = np.ascontiguousarray(array.detach().cpu().numpy() if torch.is_tensor(array) else array)
    data = base64.b64encode(zlib.compress(a.tobytes())).decode()
    return dict(zlib64=data, dtype=str(a.dtype), shape=a.shape)


def unpack(packed):
    """The inverse of `pack`."""
    data = zlib.decompress(base64.b64decode(packed['zlib64']))
    return np.frombuffer(data, packed['dtype']).reshape(packed['shape']).copy()


def seeds_of(results):
    """The seeds of a study."""
    return results['config']['seeds']


def stack_correct(runs, name, which='correct'):
    """(seeds, images) array of 0.0 and 1.0: runs[i][which][name] of every seed, unpacked."""
    return np.stack([unpack(run[which][name]) for run in runs]).astype(float)


def class_rates(correct, y):
    """Mean of (seeds, images) measures in each class: (classes present,). y: of their shape,
    or (images,)."""
    y = np.broadcast_to(y, correct.shape)
    return np.array([correct[y == k].mean() for k in np.unique(y)])


def eps_text(config):
    """'eps 8/255' of a run's configuration."""
    if config['norm'] == 'l2':
        return f"l2 eps {config['eps']:.3g}"
    return f"eps {config['eps'] * 255:.3g}/255" if config['eps'] < 0.1 else f"eps {config['eps']:.3g}"


def write_metrics(path, rows):
    """metrics.csv: one row per epoch of every model."""
    if not first():
        return
    with atomic(path) as temporary, open(temporary, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), extrasaction='ignore')
        writer.writeheader()
        writer.writerows(rows)


def bootstrap(statistic, *arrays, draws=1000, seed=0, level=0.95):
    """(value, low, high): a statistic of per-image measures and its interval.

    arrays: (S, N) for S seeds and N images, resampled together, images and, where there are
    two or more, seeds; statistic(*arrays) -> float. Percentile bootstrap (Efron 1979).
    """
    arrays = [np.atleast_2d(np.asarray(a)) for a in arrays]
    seeds, images = arrays[0].shape
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        s = rng.integers(seeds, size=seeds) if seeds > 1 else np.arange(seeds)
        i = rng.integers(images, size=images)
        values.append(statistic(*(a[np.ix_(s, i)] for a in arrays)))
    values = np.asarray(values, float)
    low, high = (
        np.percentile(values[np.isfinite(values)], (50 - 50 * level, 50 + 50 * level))
        if np.isfinite(values).any()
        else (math.nan, math.nan)
    )
    return float(statistic(*arrays)), float(low), float(high)


def effect_verdict(low, high, threshold=0.0):
    """Whether a 95 % interval lies above the claim's threshold."""
    if low > threshold:
        return 'supported'
    return 'contradicted' if high < threshold else 'inconclusive'


def claim(text, source, measured, verdict, reference='-'):
    """One row of the claims table. verdict: supported, contradicted, inconclusive or
    uninformative, the latter with why, as in 'uninformative: collapsed'."""
    assert verdict.split(':')[0] in ('supported', 'contradicted', 'inconclusive', 'uninformative'), verdict
    return dict(claim=text, source=source, measured=measured, reference=reference, verdict=verdict)


def untrained(runs, y):
    """Why nothing can be learnt from these networks, or ''. Near chance: natural accuracy below
    one and a half times the share of the largest class."""
    if any(run['collapsed'] for run in runs):
        return 'collapsed model'
    natural = min(stack_correct([run], 'natural').mean() for run in runs)
    return 'accuracy near chance' if natural < 1.5 * np.bincount(y).max() / len(y) else ''


def masking_claim(name, runs, y):
    """Control: no masking check of any seed's runs[i]['masking'] was raised. y: test labels."""
    raised = sorted(
        {
            f'{symptom} {value:.2f} > {limit:.2f}'
            for run in runs
            for symptom, (value, limit, flag) in run['masking'].items()
            if flag
        }
    )
    why = untrained(runs, y)
    return claim(
        f'No sign of masked gradients in {name}',
        'control',
        '; '.join(raised) or f'{len(runs[0]["masking"])} checks, none raised',
        f'uninformative: {why}' if why else 'contradicted' if raised else 'supported',
    )


def write_claims(claims, folder):
    """Print the claims and where they are, and write claims.md."""
    if not first():
        return
    head = ('claim', 'source', 'measured', 'reference', 'verdict')
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    for row in claims:
        lines.append('| ' + ' | '.join(str(row[h]).replace('|', '/') for h in head) + ' |')
    with atomic(Path(folder, 'claims.md')) as temporary:
        temporary.write_text('\n'.join(lines) + '\n')
    log.info('\nClaims (95 % intervals in brackets)')
    for row in claims:
        log.info(
            '%s\n    %s  %s  [%s]%s',
            row['verdict'].upper(),
            row['claim'],
            row['measured'],
            row['source'],
            '' if row['reference'] == '-' else f"  reference: {row['reference']}",
        )
    log.info('\nfigures and results in %s', folder)


def new_figure(rows=1, columns=1, width=7.0, height=3.0, **options):
    """(figure, axes as a (rows, columns) array) in the house style; no global state."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), layout='constrained')
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


FIGURE_FORMATS = ('.png', '.pdf')


def save_figure(figure, folder, name):
    """<folder>/<name>.png and .pdf."""
    if not first():
        return
    with matplotlib.rc_context(STYLE):
        for suffix in FIGURE_FORMATS:
            with atomic(Path(folder, name + suffix)) as temporary:
                figure.savefig(temporary, metadata={'CreationDate': None} if suffix == '.pdf' else None)
            figure.set_layout_engine('none')  # laid out once is enough


def draw_eps_curves(curves, config, classes, loss, folder, name):
    """The figure of `eps_curve`s. curves: {label: (colour, accuracies)}; loss: what the attack
    maximised, in words; config: with norm and the eps of the training."""
    small = config['norm'] == 'linf' and config['eps'] < 0.1
    eps = np.minimum(np.array(EPS_MULTIPLES) * config['eps'], 1 if config['norm'] == 'linf' else np.inf) * (
        255 if small else 1
    )
    fig, axes = new_figure(1, 1, 5.0, 3.2)
    axis = axes[0, 0]
    for label, (colour, accuracies) in curves.items():
        axis.plot(eps, 100 * np.array(accuracies), marker='o', ms=3.5, color=colour, label=label)
    axis.axvline(eps[EPS_MULTIPLES.index(1)], color='0.6', ls=':', lw=1, label='eps of the training')
    axis.axhline(100 / classes, color='0.6', ls='--', lw=1, label='chance')
    axis.set(
        xlabel=f"eps of the attack ({'1/255' if small else config['norm']})",
        ylabel=f'accuracy under PGD-20,\n{loss} (%)',
        ylim=(-3, 103),
        title='Robust accuracy falls with eps; it must reach 0',
    )
    axis.legend()
    save_figure(fig, folder, name)


def show_image(axis, image, title='', **options):
    """An image (C, H, W) in [0, 1], without axes."""
    image = np.asarray(image, np.float32).transpose(1, 2, 0)
    axis.imshow(
        image[..., 0] if image.shape[-1] == 1 else image,
        vmin=0,
        vmax=1,
        cmap='gray' if image.shape[-1] == 1 else None,
        interpolation='nearest',
        **options,
    )
    axis.set_title(title)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
