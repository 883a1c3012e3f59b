"""What every study shares; copy it beside any one of the scripts and both run. In this order:
set-up, processes, data, networks, attacks, training, results, shapes (the embedded data set).

Images are float (N, C, H, W) in [0, 1], stored as uint8; labels int64 (N,). A network maps images
to logits (N, K), or to a tuple whose first entry they are, and normalises its input itself. eps
and step sizes are in units of the pixel range: 8/255 is 0.03137.
"""
import argparse
import gc
import hashlib
import io
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, STL10, SVHN, FashionMNIST
from tqdm import tqdm

log = logging.getLogger('advcnn')

# ------------------------------------------------------------------------------------- Set-up

# Rice et al. 2020 (CIFAR; SVHN at lr 0.01 and step 1/255), Madry et al. 2018 (MNIST); the others
# are ours. Without eps_warmup, the share of the training over which eps grows, SVHN, MNIST at 0.3
# and shapes collapse to one class. The attacks that judge are as long as AutoAttack's (Croce &
# Hein 2020), but on shapes, where a study is to take minutes.
SETTINGS = {  # what differs from the defaults of make_parser, which are CIFAR's
    'shapes': dict(arch='small-cnn', epochs=6, batch_size=64, schedule='onecycle', steps=2,
                   step_size='6/255', eps_warmup=0.6, pad=0, image_size=32, train_size=3200,
                   test_size=250, apgd_steps=25, targets=3, square_queries=100),
    'mnist': dict(arch='small-cnn', epochs=20, lr=0.05, schedule='onecycle', eps='0.3', steps=40,
                  step_size='0.01', eps_warmup=0.4, pad=0),
    'fashion-mnist': dict(arch='small-cnn', epochs=30, lr=0.05, schedule='onecycle', eps='0.1',
                          step_size='0.02', eps_warmup=0.4, pad=2),
    'cifar10': {},
    'cifar100': {},
    'svhn': dict(lr=0.01, step_size='1/255', eps_warmup=0.05),
    'stl10': dict(epochs=100, eps='4/255', step_size='1/255'),
    'folder': dict(arch='resnet50', epochs=90, batch_size=256, weight_decay=1e-4, eps='4/255',
                   step_size='1/255', image_size=224, pad=None)}  # pad: an eighth
L2 = dict(eps='128/255', step_size='15/255')  # Rice et al. 2020
ARCHS = ('small-cnn', 'small-cnn-64', 'lenet5', 'resnet18', 'wrn-10-1', 'wrn-28-10', 'wrn-34-10',
         'alexnet', 'googlenet', 'resnet50', 'resnet18-imagenet')
WHERE = ('out', 'data_root', 'trust_data', 'device', 'fresh', 'plot_only')  # not what

class UserError(Exception):
    """A mistake of the user's: one line on stderr, exit code 2."""

def complain(message):
    """One line on stderr and exit code 2."""
    if RANK:
        time.sleep(3)  # where all fail alike, the first one tells and torchrun ends the others
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)

def entry(main):
    """Run main(); a mistake, a full disk or full memory is one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        complain(error)
    except KeyboardInterrupt:
        complain('interrupted; the same command continues from the last saved epoch')
    except RuntimeError as error:
        if 'allocate' not in str(error):  # memory, of a GPU or not
            raise
        complain('out of memory: a smaller --batch-size, --train-size or --test-size needs less')

def number(text):
    """'8/255' or '0.031' -> float >= 0; ValueError for what is none."""
    top, _, bottom = text.partition('/')
    value = float(top) / (float(bottom or 1) or math.nan)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is, and every flag with its default."""

def make_parser(doc, defaults=None, argv=None):
    """The flags that mean the same in every script. Their defaults, also in --help, are those of
    the data set that argv names: SETTINGS, then the script's {data set or '*': {flag: value}}."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False,
                                     add_help=False)
    parser.error, add = complain, parser.add_argument
    parser.set_defaults(apgd_steps=100, targets=9, square_queries=5000)  # flags of some scripts
    add('--dataset', default='shapes', metavar='NAME',
        help='shapes (embedded), mnist, fashion-mnist, cifar10, cifar100, svhn, stl10, folder:PATH')
    add('--data-root', default='data', metavar='DIR', help="torchvision's folder")
    add('--trust-data', action='store_true', help='take data files whose checksums differ')
    add('--image-size', type=int, default=0, metavar='PX', help='of shapes and folder:PATH')
    add('--train-size', type=int, default=0, metavar='N', help='balanced subset; 0: all')
    add('--test-size', type=int, default=0, metavar='N', help='balanced subset; 0: all')
    add('--pad', type=int, default=4, metavar='PX', help='zeros around images before random crops')
    add('--arch', default='resnet18', choices=ARCHS, help='network')
    add('--epochs', type=int, default=200, metavar='N', help='of each training')
    add('--batch-size', type=int, default=128, metavar='N', help='of all processes together')
    add('--lr', type=number, default=0.1, metavar='X', help='highest; SGD with momentum 0.9')
    add('--weight-decay', type=number, default=5e-4, metavar='X', help='of all weights')
    add('--schedule', default='piecewise', metavar='NAME',
        help='piecewise, cosine, onecycle, constant, drops:0.5,0.9')
    add('--eps', type=number, default='8/255', metavar='X', help='radius of attacks')
    add('--step-size', type=number, default='2/255', metavar='X', help='of training attacks')
    add('--steps', type=int, default=10, metavar='N', help='of training attacks')
    add('--eps-warmup', type=number, default=0.0, metavar='X',
        help='share of the training while eps grows')
    add('--norm', default='linf', choices=('linf', 'l2'), help='of attacks')
    add('--seeds', type=int, nargs='+', default=[0], metavar='N', help='one training each')
    add('--device', choices=('auto', 'cpu', 'cuda'), default='auto', help='where to compute')
    add('--amp', choices=('auto', 'bf16', 'fp16', 'fp32'), default='auto',
        help='precision of training; verdicts are of float32')
    add('--out', default='runs', metavar='DIR', help='for networks and results')
    add('--fresh', action='store_true', help='train and measure again')
    add('--plot-only', metavar='RUN', help='redraw the finished run in this folder')
    known, own = parser.parse_known_args(argv)[0], defaults or {}
    base = known.dataset.partition(':')[0]
    if base not in SETTINGS or (base == 'folder') != (':' in known.dataset):
        complain(f'unknown data set {known.dataset!r}; known: {", ".join(SETTINGS)}:PATH')
    parser.set_defaults(**own.get('*', {}) | SETTINGS[base] | own.get(base, {})
                        | (L2 if known.norm == 'l2' else {}))
    add('-h', '--help', action='help', help='show this and exit')  # after --dataset is known
    return parser

def parse(parser, argv=None):
    """The flags, checked; a wrong one is one line and exit code 2."""
    args = parser.parse_args(argv)
    usual = parser.parse_args(['--dataset', args.dataset])
    eps, step, most = args.eps, args.step_size, 1 if args.norm == 'linf' else 10
    values = {f'--{k.replace("_", "-")}': v for k, v in vars(args).items()}
    below = [k for k, v in values.items() if isinstance(v, int) and v < 0]
    twice = [k for k, v in values.items() if isinstance(v, list) and len(set(v)) < len(v)]
    for wrong, message in (
            (0 in (args.epochs, args.batch_size, args.steps, args.targets, args.lr, eps, step),
             '--epochs, --batch-size, --steps, --targets, --lr, --eps, --step-size: above 0'),
            (below, f'{" ".join(below)} must not be less than 0'),
            (twice, f'{" ".join(twice)} holds a value twice'),
            (eps > most, f'--eps {eps:g} is more than pixels can change; {eps:g}/255 is meant?'),
            (step > 2 * eps, f'--step-size {step:g} is larger than the ball of --eps {eps:g}'),
            (args.eps_warmup >= 1, '--eps-warmup is a share of the training, below 1'),
            (args.image_size and not usual.image_size, '--image-size is for shapes and folders'),
            (args.batch_size % WORLD, f'--batch-size does not divide among {WORLD} processes'),
            (lr_factor(args.schedule, 0) is None, f'--schedule {args.schedule} is not known')):
        if wrong:
            complain(message)
    args.changed = any(v != getattr(usual, k) for k, v in vars(args).items() if k not in WHERE)
    return args

def pick_device(name='auto'):
    """'auto', 'cpu' or 'cuda' -> torch.device; under torchrun meets the other processes."""
    cuda = name != 'cpu' and torch.cuda.is_available()
    if name == 'cuda' and not cuda:
        raise UserError('--device cuda: there is no CUDA device; --device auto takes the CPU')
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device('cuda', LOCAL_RANK) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if cuda else 'gloo')
    return device

def pick_precision(device, amp='auto'):
    """dtype of training. auto: bfloat16 on GPUs of capability 8 or more and on CPUs with AMX or
    AMD's units (Intel's AVX512 is slow at it), float16 on older GPUs, else float32."""
    if device.type == 'cuda' and amp == 'auto':
        amp = 'bf16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'fp16'
    elif amp == 'auto':
        cpu = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
        fast = 'amx_bf16' in cpu or ('AuthenticAMD' in cpu and 'avx512_bf16' in cpu)
        amp = 'bf16' if fast else 'fp32'
    if amp == 'fp16' and device.type == 'cpu':
        raise UserError('--amp fp16 needs a CUDA device')
    return {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}[amp]

def make_generator(*key, device='cpu'):
    """A generator seeded by what it is for: make_generator('train', seed, epoch)."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], 'big')
    return torch.Generator(device).manual_seed(seed)

def digest(*parts):
    """A short hash of tensors and of what JSON takes."""
    text = [part.cpu().numpy().tobytes() if torch.is_tensor(part) else json.dumps(part).encode()
            for part in parts]
    return hashlib.sha256(b''.join(text)).hexdigest()[:10]

def save(path, content):
    """Write text, bytes or what content(file) writes, from the first process. A killed process or a
    full disk (OSError) leaves the old file whole."""
    if RANK:
        return
    buffer = io.BytesIO()  # torch.save itself would not say that the disk is full
    if callable(content):
        content(buffer)
    else:
        buffer.write(content.encode() if isinstance(content, str) else content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    try:
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

def start(study, args, load=None):
    """(folder, device, data, results): the log begins (stdout, log.txt), the Data are loaded (by
    load_data or `load`) and what an earlier run of the same command on the same data measured is
    there already. With --plot-only data is None and the results are those of a finished run."""
    device = pick_device(args.device)
    logging.raiseExceptions = False  # a full disk ends the run at the next save, in one line
    sys.stdout.reconfigure(errors='backslashreplace')  # names that an ASCII terminal lacks
    # nan means that there is no such value; the others are torch's and do no harm
    warnings.filterwarnings(
        'ignore', '(mean of empty|all-nan|invalid value|.broadcast_buffers|The AccumulateGrad)')
    shown = logging.NullHandler() if RANK else logging.StreamHandler(sys.stdout)
    logging.basicConfig(format='%(message)s', handlers=[shown], force=True)
    log.setLevel(logging.INFO)
    if args.plot_only:
        folder = Path(args.plot_only)
        results = load_results(folder)
        if results.get('finished') != study:
            raise UserError(f'{folder} holds no finished run of {study}')
        return folder, device, None, results
    config = {k: v for k, v in vars(args).items() if k not in (*WHERE, 'changed')}
    name = re.sub(r'[^\w.-]+', '_', f'{args.dataset}-{args.arch}')
    folder = Path(args.out, study, name + f'-{digest(config)}' * args.changed)
    save(folder / 'config.json', json.dumps(config, indent=1))
    if RANK == 0:
        logging.root.addHandler(logging.FileHandler(folder / 'log.txt', encoding='utf-8'))
    log.info('%s: %s, %s, training in %s -> %s', study, eps_text(config), device,
             pick_precision(device, args.amp), folder)
    data = (load or load_data)(args, device)
    results = dict(config=json.loads(json.dumps(config)), data=[data.digest, data.test_digest],
                   classes=data.classes, labels=data.test[1].cpu().numpy())  # of the test images
    found = {} if args.fresh else load_results(folder)
    if found and any(found.get(k) != results[k] for k in ('config', 'data')):
        log.info('images, labels or flags are not those of the last run: measuring afresh')
        found = {}
    return folder, device, data, results | found

def eps_text(config):
    """'eps 8/255', 'eps 0.3' or 'l2 eps 0.5' of a run's settings."""
    eps, l2 = config['eps'], config['norm'] == 'l2'
    return 'l2 ' * l2 + (f'eps {eps:.3g}' if l2 or eps >= 0.1 else f'eps {255 * eps:.3g}/255')

# ---------------------------------------------------------------------------------- Processes

# Under torchrun every process runs the same program on its part of each batch (training) or on
# every WORLD-th batch (evaluation) and has the whole result.
RANK, WORLD, LOCAL_RANK = (
    int(os.environ.get(k, v)) for k, v in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items())

def replay_attacks(model):
    """Let attacks in training replay a CUDA graph of the network, to the same bits: one launch in
    place of hundreds, which take a fast GPU longer than a small batch does. Not where its forward
    waits for the GPU, as .item() does; all other calls stay as they are."""
    gc.collect()  # cycles keep the graph of an earlier training, and its memory, alive
    forward, graphs = model.forward, {}

    def replayed(x):
        attacked = not model.training and x.requires_grad and torch.is_autocast_enabled('cuda')
        if not attacked or x.numel() > 1e6:
            return forward(x)
        if not graphs:  # of whole batches; FAT's become smaller
            graphs[x.shape], sample = forward, x.detach().clone().requires_grad_()
            with suppress(RuntimeError), torch.autocast('cuda', cache_enabled=False):
                graphs[x.shape] = torch.cuda.make_graphed_callables(forward, (sample,))
        return graphs.get(x.shape, forward)(x)
    model.forward = replayed

def spread(model, device):
    """What losses are computed with: the network, or DistributedDataParallel around it."""
    if WORLD == 1 and device.type == 'cuda':
        replay_attacks(model)
    if WORLD == 1:
        return model
    if device.type == 'cuda':  # on CPUs each process normalises its own part of a batch
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

# --------------------------------------------------------------------------------------- Data

@dataclass
class Data:
    """A data set in memory: pairs of images, uint8 (N, C, H, W), and labels, int64 (N,)."""
    name: str
    classes: list  # names
    train: tuple
    val: tuple  # held out of the training images; chooses checkpoints
    test: tuple  # chooses nothing
    pad: int = 0  # zeros around an image before a random crop
    flip: bool = False  # left and right are alike

    def __post_init__(self):
        self.digest = digest(self.classes, *self.train, *self.val)
        self.test_digest = digest(self.classes, *self.test)
        self.shape = tuple(self.train[0].shape[1:])  # (C, H, W)

def load_data(args, device):
    """The data set of the flags; at most 1000 training images are held out for validation. Subsets
    are balanced and the same for every seed. UserError for files that are absent, altered (unless
    trusted) or unreadable and for classes that cannot be learnt."""
    kind = args.dataset.partition(':')[0]
    load = dict(shapes=load_shapes, folder=load_folder).get(kind, load_torchvision)
    (x, y), (x_test, y_test), classes = load(args)
    train, val = split_off(y, classes, min(1000, len(y) // 21))
    for flag, n, there in (('train', args.train_size, train), ('test', args.test_size, y_test)):
        if n > len(there):
            raise UserError(f'--{flag}-size {n} is more than the {len(there)} images there are')
    train = train[balanced_order(y[train])[: args.train_size or None]].sort()[0]
    test = balanced_order(y_test)[: args.test_size or None].sort()[0]
    pairs = (x[train], y[train]), (x[val], y[val]), (x_test[test], y_test[test])
    pad = args.image_size // 8 if args.pad is None else args.pad
    return Data(args.dataset, classes, *((a.to(device), b.to(device)) for a, b in pairs), pad,
                flip=kind not in ('shapes', 'mnist', 'svhn'))

def load_shapes(args):
    """(training pair, test pair, class names) of the data set that is drawn at the end."""
    n = args.train_size or SETTINGS['shapes']['train_size']
    return (make_shapes(n + max(n // 20, 20), 'train', args.image_size)[:2],
            make_shapes(args.test_size or 250, 'test', args.image_size)[:2], list(OUTLINES))

def rank_in_class(y):
    """0 for the first of its class, 1 for the second, ...: (N,)."""
    member = F.one_hot(y)
    return ((member.cumsum(0) - 1) * member).sum(1)

def balanced_order(y):
    """A random order (N,) of which every prefix holds the classes as equally as can be."""
    order = torch.randperm(len(y), generator=make_generator('subset'))
    return order[rank_in_class(y[order]).argsort(stable=True)]

def split_off(y, classes, n):
    """(training, validation) indices: about n validation images, as many of every class and two or
    more, but at most half of a class."""
    held = (y.bincount(minlength=len(classes)) // 2).clamp(max=max(2, n // len(classes)))
    if held.max() == 0:
        raise UserError('no class has two training images, one to validate with')
    if held.min() < 2:
        log.warning('fewer than two validation images of %s: the best epoch is a guess',
                    [name for name, k in zip(classes, held) if k < 2])
    order = torch.randperm(len(y), generator=make_generator('split'))
    out = rank_in_class(y[order]) < held[y[order]]
    return order[~out].sort()[0], order[out].sort()[0]

TORCHVISION = {  # class and what is there when the data are
    'mnist': (MNIST, 'MNIST/raw'),
    'fashion-mnist': (FashionMNIST, 'FashionMNIST/raw'),
    'cifar10': (CIFAR10, 'cifar-10-batches-py'),
    'cifar100': (CIFAR100, 'cifar-100-python'),
    'svhn': (SVHN, 'test_32x32.mat'),
    'stl10': (STL10, 'stl10_binary')}

def load_torchvision(args):
    """The same of a data set of torchvision, downloaded if absent."""
    name, root, (cls, marker) = args.dataset, args.data_root, TORCHVISION[args.dataset]
    present, pairs = Path(root, marker).exists(), []
    if WORLD > 1 and not present:
        raise UserError(f'no {name} in {root}; let one process download it first')
    if args.trust_data:
        sys.modules[cls.__module__].check_integrity = lambda path, md5=None: os.path.isfile(path)
    for split in ('train', 'test'):
        which = dict(split=split) if name in ('svhn', 'stl10') else dict(train=split == 'train')
        try:
            data = cls(root, download=not present, **which)
        except Exception as error:
            why = f'{type(error).__name__}: {error}'.splitlines()[0][:100]
            hint = '--trust-data takes altered files as they are, deleting them fetches them afresh'
            raise UserError(f'no usable {name} in {root} ({why}); ' + (
                hint if present else '--data-root names the folder that holds it')) from None
        x = torch.as_tensor(np.asarray(data.data))
        y = torch.as_tensor(np.asarray(getattr(data, 'targets', getattr(data, 'labels', None))))
        x = x[:, None] if x.dim() == 3 else x
        x = x.permute(0, 3, 1, 2).contiguous() if x.shape[-1] == 3 else x
        pairs.append((x, y.long()))
    classes = [str(c).split(' - ')[-1] for c in getattr(data, 'classes', range(10))]
    return *pairs, classes

def load_folder(args):
    """(training pair, test pair, class names) of class folders in train/ and in the first of test/,
    val/, valid/ that has the same classes. Images become squares of --image-size."""
    root, size = Path(args.dataset[7:]), args.image_size
    train, *tests = [list_images(root / name) for name in ('train', 'test', 'val', 'valid')]
    test = next((found for found in tests if found.keys() == train.keys()), {})
    empty = [name for name in test if not (train[name] and test[name])]
    odd = sorted(train.keys() ^ next(filter(None, tests), train).keys())
    for wrong, message in (
            (not train or not any(tests), 'needs train/ and test/ (or val/) with class folders'),
            (not test, f'has other classes to train on than to test with: {odd[:5]}'),
            (len(train) == 1, 'has one class; a classifier needs two or more'),
            (empty, f'has classes without training or test images: {empty[:5]}')):
        if wrong:
            raise UserError(f'{root} {message}')
    chosen = []
    for found, n in ((train, args.train_size and args.train_size + 1000), (test, args.test_size)):
        files = [path for paths in found.values() for path in paths]
        y = torch.tensor([k for k, paths in enumerate(found.values()) for _ in paths])
        keep = balanced_order(y)[: n or None]  # no class first: some measures take a few images
        chosen.append(([files[i] for i in keep], y[keep]))
    need = sum(len(y) for _, y in chosen) * 6 * size**2  # with a copy while subsets are made
    log.info('reading %s at %d pixels: %.2f GB', root, size, need / 1e9)
    memory = Path('/proc/meminfo').read_text() if Path('/proc/meminfo').exists() else ''  # Linux
    told = re.search(r'MemAvailable: *(\d+) kB', memory)
    free = 1024 * int(told[1]) if told else math.inf
    if need > free:
        raise UserError(f'{need / 1e9:.1f} GB of images, {free / 1e9:.1f} GB of free memory: a '
                        'smaller --train-size, --test-size or --image-size needs less')
    with ThreadPoolExecutor() as pool:
        x, x_test = (torch.stack(list(pool.map(partial(read_image, size=size), files)))
                     for files, _ in chosen)
    return (x, chosen[0][1]), (x_test, chosen[1][1]), list(train)

def list_images(folder):
    """{class name: image files}, without hidden ones; {} where there are none."""
    hidden, found = ('.', '__MACOSX'), {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and not path.name.startswith(hidden):
            name = os.fsencode(path.name).decode(errors='replace')  # in any locale
            found[name] = [p for p in sorted(path.rglob('*'))
                           if torchvision.datasets.folder.is_image_file(p.name)
                           and not any(k.startswith(hidden) for k in p.relative_to(path).parts)]
    return found if any(found.values()) else {}

def read_image(path, size):
    """uint8 (3, size, size): the shorter side resized, the centre cropped; 16-bit grey scaled,
    transparency put on white. UserError for what cannot be read rightly."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode[0] in 'IF':  # integers of 16 or 32 bits, floating-point numbers
            levels = np.asarray(image) / 257
            if image.mode == 'F' or levels.min() < 0 or levels.max() > 255:
                raise ValueError('the range of its pixels is not known')
            image = Image.fromarray(levels.round().astype(np.uint8))
        if 'A' in image.mode or 'transparency' in image.info:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        image = ImageOps.fit(image.convert('RGB'), (size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:
        raise UserError(f'{os.fsencode(path).decode(errors="replace")}: {error}') from None

def to_float(x):
    """uint8 -> float in [0, 1], channels_last; float as it is."""
    if x.dtype != torch.uint8:
        return x
    return x.to(torch.float32, memory_format=torch.channels_last).div_(255)

def augment(x, pad, flip, generator):
    """Random crops after zero padding, and random flips, each image its own."""
    (n, _, h, w), device = x.shape, x.device
    top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=generator, device=device)
    rows, columns = top + torch.arange(h, device=device), left + torch.arange(w, device=device)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    image, x = torch.arange(n, device=device)[:, None, None], F.pad(x, (pad,) * 4)
    return x[image, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)  # channels_last

def train_batches(data, batch_size, seed, epoch, generator):
    """This process's part of each batch of an epoch, (x in [0, 1], y); a short last batch is left
    out. All processes have the same order; the generator, for crops, is each one's own."""
    (x, y), n = data.train, len(data.train[1])
    size = min(batch_size, n)
    order = torch.randperm(n, generator=make_generator('order', seed, epoch)).to(x.device)
    for batch in order[: n - n % size].split(size):
        own = batch[RANK::WORLD]
        yield to_float(augment(x[own], data.pad, data.flip, generator)), y[own]

def saturate(x, level):
    """Each pixel pushed away from 1/2: 1/2 + sign(u) |u|^(2/level) / 2 with u = 2x - 1. Level 2
    changes nothing, a large one leaves 0 and 1 (Zhang & Zhu 2019)."""
    u = 2 * x - 1
    return (0.5 + 0.5 * u.sign() * u.abs() ** (2 / level)).clamp(0, 1)

def permute_patches(x, order):
    """Each image (N, C, H, W) cut into k x k patches; place i then shows patch order[i]. order:
    (k*k,) for all images or (N, k*k); k divides H and W."""
    (n, c, h, w), k = x.shape, math.isqrt(order.shape[-1])
    patches = x.reshape(n, c, k, h // k, k, w // k).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    image = torch.arange(n, device=x.device)[:, None]
    patches = patches[image, order.to(x.device).expand(n, -1)].unflatten(1, (k, k))
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)

# ----------------------------------------------------------------------------------- Networks

class Normalize(nn.Module):
    """(x - mean) / std per channel: the first layer of every network."""
    def __init__(self, mean, std):
        super().__init__()
        mean, std = torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)
        self.register_buffer('scale', 1 / std, persistent=False)
        self.register_buffer('shift', -mean / std, persistent=False)

    def forward(self, x):
        return torch.addcmul(self.shift, x, self.scale)

def conv_block(in_channels, channels, stride=1):
    """3x3 convolution, batch norm, ReLU."""
    conv = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

def small_cnn(classes, channels, w):
    """Six 3x3 convolutions from w channels on; ours, for CPUs. The first sees 2x2 pixels as 4
    channels each, for a cheaper gradient; CIFS's masks lie behind the blocks of stage3."""
    return nn.Sequential(OrderedDict(
        stem=nn.Sequential(nn.PixelUnshuffle(2), conv_block(4 * channels, w)),
        stage1=conv_block(w, w),
        stage2=nn.Sequential(conv_block(w, 2 * w, 2), conv_block(2 * w, 2 * w)),
        stage3=nn.Sequential(conv_block(2 * w, 4 * w, 2), conv_block(4 * w, 4 * w)),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(4 * w, classes)))

def lenet5(classes, channels, height, width):
    """LeNet-5 with ReLU and max pooling, 44.4 k parameters on 28x28 (LeCun et al. 1998)."""
    left = 16 * math.prod(max(1, ((side - 4) // 2 - 4) // 2) for side in (height, width))
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(channels, 6, 5), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 16, 5), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2), flatten=nn.Flatten(),
        fc1=nn.Linear(left, 120), relu3=nn.ReLU(), fc2=nn.Linear(120, 84), relu4=nn.ReLU(),
        fc3=nn.Linear(84, classes)))

class PreActBlock(nn.Module):
    """Block of a wide residual network: twice batch norm, ReLU, convolution (He et al. 2016b)."""
    def __init__(self, in_channels, channels, stride, slope):
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(in_channels), nn.LeakyReLU(slope)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(channels), nn.LeakyReLU(slope)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        alike = stride == 1 and in_channels == channels
        self.shortcut = None if alike else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x):
        out = self.relu1(self.bn1(x))
        shortcut = self.shortcut(out) if self.shortcut else x
        return self.conv2(self.relu2(self.bn2(self.conv1(out)))) + shortcut

def wide_resnet(classes, channels, depth, width, slope):
    """WRN-depth-width (Zagoruyko & Komodakis 2016); slope: of its ReLUs below 0."""
    layers, last = OrderedDict(conv1=nn.Conv2d(channels, 16, 3, 1, 1, bias=False)), 16
    for name, now, stride in (('block1', 16, 1), ('block2', 32, 2), ('block3', 64, 2)):
        sizes = [(last, stride)] + [(now * width, 1)] * ((depth - 10) // 6)
        last = now * width
        layers[name] = nn.Sequential(*(PreActBlock(c, last, s, slope) for c, s in sizes))
    return nn.Sequential(layers | OrderedDict(
        bn=nn.BatchNorm2d(last), relu=nn.LeakyReLU(slope), pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(), fc=nn.Linear(last, classes)))

def make_model(arch, classes=10, shape=(3, 32, 32), seed=0):
    """Sequential(normalize, net) for images of shape (C, H, W), its weights a function of the
    arguments. UserError for images that the network cannot take."""
    c, mean, std = shape[0], [0.0] * shape[0], [1.0] * shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch.startswith('small-cnn'):
            net = small_cnn(classes, c, 64 if arch.endswith('64') else 32)
            mean, std = [0.5] * c, [0.25] * c
        elif arch == 'lenet5':
            net = lenet5(classes, *shape)
        elif arch.startswith('wrn-'):  # WRN-10-1 as Zhang et al. 2022 have it
            depth, width = map(int, arch.split('-')[1:])
            net = wide_resnet(classes, c, depth, width, 0.1 if arch == 'wrn-10-1' else 0.0)
        elif arch == 'resnet18':  # a 3x3 stem and no pooling behind it, as usual for CIFAR
            net = torchvision.models.resnet18(num_classes=classes)
            net.conv1, net.maxpool = nn.Conv2d(c, 64, 3, 1, 1, bias=False), nn.Identity()
        else:
            extra = dict(aux_logits=False, init_weights=True) if arch == 'googlenet' else {}
            name = arch.removesuffix('-imagenet')
            net = torchvision.models.get_model(name, num_classes=classes, **extra)
            mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    model = nn.Sequential(OrderedDict(normalize=Normalize(mean, std), net=net))
    try:
        logits_of(model, torch.zeros(1, *shape))
    except RuntimeError:
        raise UserError(f'{arch} cannot take images of (C, H, W) = {tuple(shape)}') from None
    return model.to(memory_format=torch.channels_last)

def first_of(output):
    """The logits of a network that returns them alone or first."""
    return output[0] if isinstance(output, tuple) else output

# ------------------------------------------------------------------------------------ Attacks

# A loss is a function (output, y) -> (N,), to be maximised; output: logits (N, K), or a tuple with
# these first. dlr_targeted takes a class more, kl_divergence another output in place of y.

def cross_entropy(output, y):
    """Cross-entropy of each image, nats."""
    return F.cross_entropy(first_of(output).float(), y, reduction='none')

def margin(output, y):
    """Largest other logit minus the true one: >= 0 where the network errs."""
    logits = first_of(output).float()
    return logits.scatter(1, y[:, None], -math.inf).amax(1) - logits.gather(1, y[:, None])[:, 0]

def dlr_targeted(output, y, target):
    """Difference of logits, from four classes on as a ratio, to a target (Croce & Hein 2020)."""
    logits = first_of(output).float()
    gap = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]
    if logits.shape[1] < 4:
        return gap
    top = logits.sort(1, descending=True)[0]
    return gap / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)

def kl_divergence(output, reference):
    """KL(softmax(reference) || softmax(output)) of each image, nats."""
    log_p, log_q = (first_of(v).float().log_softmax(1) for v in (reference, output))
    return (log_p.exp() * (log_p - log_q)).sum(1)

@contextmanager
def frozen(model):
    """The network itself (out of DistributedDataParallel), in eval mode and without gradients for
    its parameters; afterwards it is as it was."""
    model = getattr(model, 'module', model)
    training = [m for m in model.modules() if m.training]
    needs = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield model
    finally:
        for m in training:
            m.training = True
        for p in needs:
            p.requires_grad_(True)

def input_gradient(model, x, y, loss):
    """(logits, loss (N,), its gradient for each image of x: float), all detached."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        output = model(x)
        value = loss(output, y)
        scale = 1024.0 if first_of(output).dtype == torch.float16 else 1.0  # else they vanish
        gradient = torch.autograd.grad(value.sum() * scale, x)[0] / scale
    return first_of(output).detach(), value.detach(), gradient.nan_to_num(0.0, 0.0, 0.0)

def input_gradients(model, x, y, loss=cross_entropy):
    """The gradient for each image in eval mode, in batches: (N, C, H, W) float."""
    with frozen(model) as net:
        return torch.cat([input_gradient(net, a, b, loss)[2]
                          for a, b in zip(x.split(100), y.split(100))])

def project(x_adv, x, eps, norm):
    """Back into the ball of radius eps around x (l2: along the ray), then into [0, 1]."""
    if norm == 'linf':
        return torch.clamp(x_adv, x - eps, x + eps).clamp(0, 1)
    move = x_adv - x
    length = torch.linalg.vector_norm(move, dim=(1, 2, 3), keepdim=True).clamp(min=1e-20)
    return (x + move * (eps / length).clamp(max=1)).clamp(0, 1)

def steepest(gradient, norm):
    """The step of size 1 that increases a linear loss most."""
    return gradient.sign() if norm == 'linf' else F.normalize(gradient, dim=(1, 2, 3), eps=1e-20)

def random_start(x, eps, norm, generator=None):
    """Uniform in the ball around x, then clipped to [0, 1]."""
    noise = torch.rand(x.shape, generator=generator, device=x.device) * 2 - 1
    if norm == 'l2':
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        radius = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
        noise = F.normalize(noise, dim=(1, 2, 3)) * radius ** (1 / x[0].numel())
    return (x + eps * noise).clamp(0, 1)

def pgd(model, x, y, *, eps, step_size, steps, norm='linf', loss=cross_entropy, start=None,
        stop=False, generator=None):
    """Projected gradient ascent (Madry et al. 2018) on x: float from a random start, or from
    `start`: the last iterate (N, C, H, W). With stop an image is done at its first misclassified
    iterate and leaves the batch, so that the loss must not hold tensors of the batch."""
    start = random_start(x, eps, norm, generator) if start is None else start
    x_adv, todo = project(start, x, eps, norm), torch.arange(len(x), device=x.device)
    with frozen(model) as model:
        for _ in range(steps):
            logits, _, gradient = input_gradient(model, x_adv[todo], y[todo], loss)
            if stop:
                right = (logits.argmax(1) == y[todo]).nonzero()[:, 0]  # the one wait for a GPU
                todo, gradient = todo[right], gradient[right]
            if len(todo) == 0:
                break
            ahead = x_adv[todo] + step_size * steepest(gradient, norm)
            x_adv[todo] = project(ahead, x[todo], eps, norm)
    return x_adv

def fgsm(model, x, y, *, eps, norm='linf', loss=cross_entropy, generator=None):
    """One full step uphill from the image (Goodfellow et al. 2015); the generator is not used."""
    return pgd(model, x, y, eps=eps, step_size=eps, steps=1, norm=norm, loss=loss, start=x)

def apgd(model, x, y, *, eps, steps=100, norm='linf', loss=cross_entropy, targets=0,
         generator=None):
    """Auto-PGD (Croce & Hein 2020, algorithm 1): no step size to choose. targets > 0: a run towards
    each of that many likeliest wrong classes, with a loss (output, y, target). Returns for each
    image a point that fools, with which it is done, or else the best one of the last run."""
    best = x.clone()
    aimed = loss if targets else lambda output, y, goal: loss(output, y)
    with frozen(model) as model:
        logits = logits_of(model, x)
        todo = (logits.argmax(1) == y).nonzero()[:, 0]
        likely = logits.scatter(1, y[:, None], -math.inf).argsort(1, descending=True)
        for run in range(min(targets, logits.shape[1] - 1) or 1):
            start = random_start(x, eps, norm, generator)  # of all, whoever is left
            if len(todo):
                best[todo], left = apgd_run(model, x[todo], y[todo], start[todo],
                                            likely[todo, run], aimed, eps, steps, norm)
                todo = todo[left]
    return best

def apgd_run(model, x, y, start, goal, loss, eps, steps, norm):
    """One run: (points, indices of the images that theirs do not fool). A fooled image is asked
    about no more: its loss stays, and so does its best point, the one that fools."""
    looks = [math.ceil(k * steps / 100) for k in (0, 22, 41, 57, 70, 80, 87, 93, 99)]
    look, todo, zero = 0, torch.arange(len(x), device=x.device), x.new_zeros(len(x), 1, 1, 1)
    now = last = best = best_way = start
    way, value, best_value = torch.zeros_like(start), zero - math.inf, zero - math.inf
    step, old_step, old_best, rises = zero + 2 * eps, zero, zero, zero
    for k in range(steps + 1):
        before = value.clone()
        logits, found, gradient = input_gradient(
            model, now[todo], y[todo], lambda output, y: loss(output, y, goal[todo]))
        value[todo], way[todo] = found[:, None, None, None], steepest(gradient, norm)
        better, rises = value > best_value, rises + (value > before)
        best = torch.where(better, now, best)
        best_way = torch.where(better, way, best_way)
        best_value = torch.where(better, value, best_value)
        hit = logits.argmax(1) != y[todo]
        best[todo] = torch.where(hit[:, None, None, None], now[todo], best[todo])
        todo = todo[~hit]  # the one wait for a GPU
        if k == steps or len(todo) == 0:
            return best, todo
        if k in looks:  # at 0 nothing is halved
            stuck = (old_step == step) & (old_best == best_value)
            halve = (rises < 0.75 * (k - look)) | stuck
            old_best, old_step, rises, look = best_value, step, zero, k
            step = torch.where(halve, step / 2, step)
            now = torch.where(halve, best, now)
            way = torch.where(halve, best_way, way)
        move = project(now + step * way, x, eps, norm) - now
        move = 0.75 * move + 0.25 * (now - last) if k else move
        last, now = now, project(now + move, x, eps, norm)

@torch.no_grad()
def square(model, x, y, *, eps, queries=5000, p_init=0.8, generator=None):
    """Square attack in linf (Andriushchenko et al. 2020): random search with square patches of
    +-eps on the margin, without gradients. Misclassified images stay as they are."""
    (n, c, h, w), cuts = x.shape, (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000
    integers = partial(torch.randint, generator=generator, device=x.device)
    rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    with frozen(model) as model:
        best, worst = x.clone(), margin(model(x), y)
        for query in range(queries):
            share = p_init / 2 ** sum(query / queries > cut / 10000 for cut in cuts)
            side = max(1, min(round((share * h * w) ** 0.5), h - 1, w - 1))
            top, left = integers(h - side + 1, (n, 1)), integers(w - side + 1, (n, 1))
            noise = eps * (2.0 * integers(2, (n, c, 1, 1 if query else w)) - 1)  # stripes at first
            todo = (worst <= 0).nonzero()[:, 0]
            if len(todo) == 0:
                break
            row = (rows >= top[todo]) & (rows < top[todo] + side)
            col = (columns >= left[todo]) & (columns < left[todo] + side)
            patch = (row[:, None, :, None] & col[:, None, None, :]) | (query == 0)
            tried = torch.where(patch, (x[todo] + noise[todo]).clamp(0, 1), best[todo])
            value = margin(model(tried), y[todo])
            better = (value > worst[todo]) | (query == 0)
            best[todo[better]], worst[todo[better]] = tried[better], value[better]
    return best

def logits_of(model, x, batch_size=250):
    """Logits (N, K) in eval mode, without gradients. x: uint8 or float."""
    with frozen(model) as model, torch.no_grad():
        return torch.cat([first_of(model(to_float(b))) for b in x.split(batch_size)])

def correct_under(model, x, y, attack=None):
    """Whether each image (uint8 or float) is classified correctly, and still is after attack(model,
    x, y, generator=...) of those that are: (N,) bool, the same for any number of processes. The
    attack may compute in TF32, five times as fast on GPUs that have it; float32 decides."""
    size = 1000 if x.is_cuda else 250
    correct = torch.zeros(len(y), dtype=torch.uint8, device=y.device)  # gloo adds up no bool
    for batch in range(RANK, math.ceil(len(y) / size), WORLD):
        here = slice(batch * size, (batch + 1) * size)
        a, b = to_float(x[here]), y[here]
        right = logits_of(model, a, size).argmax(1) == b
        left = right.nonzero()[:, 0]
        if attack and len(left):
            generator = make_generator('evaluate', batch, device=x.device)
            with torch.backends.cudnn.flags(True, deterministic=True, allow_tf32=True):
                x_adv = attack(model, a[left], b[left], generator=generator)
            right[left] = logits_of(model, x_adv, size).argmax(1) == b[left]
        correct[here] = right
    if WORLD > 1:
        dist.all_reduce(correct)
    return correct.bool()

ATTACK_NAMES = {'natural': 'natural', 'fgsm': 'FGSM', 'pgd': 'PGD', 'apgd_ce': 'APGD-CE',
                'apgd_t': 'APGD-T', 'square': 'Square', 'worst': 'worst case'}

def evaluation_attacks(args):
    """{name: attack} that every network faces, weakest first. args: the flags, with apgd_steps,
    targets and square_queries. PGD has 20 steps, on MNIST the usual 40."""
    ball = dict(eps=args.eps, norm=args.norm)
    attacks = {
        'fgsm': partial(fgsm, **ball),
        'pgd': partial(pgd, **ball, step_size=args.eps / 4, stop=True,
                       steps=40 if args.dataset.endswith('mnist') else 20),
        'apgd_ce': partial(apgd, **ball, steps=args.apgd_steps),
        'apgd_t': partial(apgd, **ball, steps=args.apgd_steps, loss=dlr_targeted,
                          targets=args.targets),
        'square': partial(square, eps=args.eps, queries=args.square_queries)}
    return {k: v for k, v in attacks.items() if args.norm == 'linf' or k != 'square'}

def evaluate(model, data, attacks, correct, keep):
    """Fill correct[name], (N,) bool, for natural test images and each attack, and correct['worst'],
    with keep() after each. APGD-CE, APGD-T and Square face only what is left: their columns are
    cumulative, as AutoAttack prints them. All others face all images and belong before these."""
    x, y = data.test
    if 'apgd_t' in attacks and len(data.classes) < 4:
        log.info('  fewer than four classes: APGD-T takes the difference of logits, not the ratio')
    left = torch.ones_like(y, dtype=torch.bool)
    for name, attack in {'natural': None, **attacks}.items():
        if name not in correct:
            rows = left if name in ('apgd_ce', 'apgd_t', 'square') else torch.ones_like(left)
            now = rows.masked_scatter(rows, correct_under(model, x[rows], y[rows], attack))
            correct.pop('worst', None)  # to be the last one again
            correct |= {name: now.cpu().numpy(), 'worst': (left & now).cpu().numpy()}
            keep()
            log.info('  %-8s %5.1f %%', ATTACK_NAMES.get(name, name), 100 * correct[name].mean())
        left = left & torch.from_numpy(correct[name]).to(left.device)

MASKING = {  # symptom (Athalye et al. 2018, Carlini et al. 2019): what is still harmless
    'zero gradients': 0.05, 'random outputs': 0.0, 'unbounded attack fails': 1.5,
    'one step beats many': 0.01, 'cross-entropy far weaker': 0.08, 'black box beats white': 0.01}

def masking_check(model, data, correct, *, norm='linf', loss=margin):
    """{symptom: value}. On 100 test images: the share with a zero gradient, the share with other
    logits the second time, and the accuracy under PGD without a bound on `loss`, in units of
    chance. Then what a rival finds beyond an attack, from `correct` as `evaluate` fills it."""
    x, y = to_float(data.test[0][:100]), data.test[1][:100]
    size = 1.0 if norm == 'linf' else x[0].numel() ** 0.5
    far = pgd(model, x, y, eps=size, step_size=size / 10, steps=30, norm=norm, loss=loss, start=x,
              stop=True)  # a random start in so large a ball would fool by itself
    signs = {'zero gradients': (input_gradients(model, x, y) == 0).flatten(1).all(1),
             'random outputs': (logits_of(model, x) != logits_of(model, x)).any(1),
             'unbounded attack fails': logits_of(model, far).argmax(1) == y}
    found = {symptom: sign.float().mean().item() for symptom, sign in signs.items()}
    found['unbounded attack fails'] *= len(data.classes)
    for symptom, attack, rival in (('one step beats many', 'pgd', 'fgsm'),
                                   ('cross-entropy far weaker', 'apgd_ce', 'apgd_t'),
                                   ('black box beats white', 'apgd_t', 'square')):
        if {attack, rival} <= correct.keys():
            found[symptom] = float(correct[attack].mean() - correct[rival].mean())
    return found

# ----------------------------------------------------------------------------------- Training

# A method is a function (net, x, y, threat, generator) -> loss of a batch, with threat =
# dict(eps, step_size, steps, norm). Attacks run in eval mode, the update in train mode. ce and kl
# are losses of each image: a network with several heads puts its joint ones in their place.

def standard_loss(net, x, y, threat, generator, ce=cross_entropy):
    """Natural images."""
    return ce(net(x), y).mean()

def fgsm_loss(net, x, y, threat, generator, ce=cross_entropy):
    """FGSM with a random start and a step of 1.25 eps (Wong et al. 2020)."""
    one = dict(threat, steps=1, step_size=1.25 * threat['eps'])
    return pgd_loss(net, x, y, one, generator, ce)

def pgd_loss(net, x, y, threat, generator, ce=cross_entropy, stop=False):
    """PGD adversarial training (Madry et al. 2018)."""
    return ce(net(pgd(net, x, y, **threat, loss=ce, stop=stop, generator=generator)), y).mean()

def halves(output):
    """The outputs of the first and of the second half of a batch."""
    if isinstance(output, tuple):
        return tuple(zip(*(o.chunk(2) for o in output)))
    return output.chunk(2)

def trades_loss(net, x, y, threat, generator, ce=cross_entropy, kl=kl_divergence, beta=6.0):
    """TRADES (Zhang et al. 2019): CE(x) + beta KL(p(x) || p(x_adv)), x_adv maximising the KL. In
    bfloat16 its start would round to the image, where the KL has no gradient: the first step is
    one of float32. Both halves of the update share their batch norm."""
    x_adv = x + 0.001 * torch.randn(x.shape, generator=generator, device=x.device)
    with torch.autocast(x.device.type, enabled=False), frozen(net) as model, torch.no_grad():
        natural = model(x)
        threat = dict(threat, loss=lambda output, y: kl(output, natural))
        x_adv = pgd(net, x, y, **threat | dict(steps=1), start=x_adv)
    x_adv = pgd(net, x, y, **threat | dict(steps=threat['steps'] - 1), start=x_adv)
    output, attacked = halves(net(torch.cat((x, x_adv))))
    return ce(output, y).mean() + beta * kl(attacked, output).mean()

def boosted_cross_entropy(output, y):
    """Cross-entropy, and -log(1 - p) of the likeliest other class (Wang et al. 2020)."""
    p = first_of(output).float().softmax(1)
    return cross_entropy(output, y) - torch.log1p(1e-6 - p.scatter(1, y[:, None], 0).amax(1))

def mart_loss(net, x, y, threat, generator, ce=cross_entropy, kl=kl_divergence,
              boosted=boosted_cross_entropy, weight=5.0):
    """MART (Wang et al. 2020): boosted CE(x_adv) + weight (1 - p_y(x)) KL(p(x) || p(x_adv))."""
    x_adv = pgd(net, x, y, **threat, loss=ce, generator=generator)
    output, attacked = halves(net(torch.cat((x, x_adv))))
    wrong = 1 - first_of(output).float().softmax(1).gather(1, y[:, None])[:, 0]
    return (boosted(attacked, y) + weight * wrong * kl(attacked, output)).mean()

METHODS = {'standard': standard_loss, 'fgsm': fgsm_loss, 'pgd': pgd_loss, 'trades': trades_loss,
           'mart': mart_loss, 'fat': partial(pgd_loss, stop=True)}  # Zhang et al. 2020, tau = 0
METHOD_NAMES = {'standard': 'standard', 'fgsm': 'FGSM-AT', 'pgd': 'PGD-AT', 'trades': 'TRADES',
                'mart': 'MART', 'fat': 'FAT'}

def lr_factor(schedule, progress):
    """Share of the highest learning rate at progress, a share of the training. drops:0.5,0.9: x 0.1
    at each; piecewise: drops:0.5,0.75 (Rice et al. 2020); onecycle: up over a quarter, then down
    to 0. None: there is no such schedule."""
    if schedule == 'cosine':
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == 'onecycle':
        return max(progress, 1e-3) / 0.25 if progress < 0.25 else (1 - progress) / 0.75
    drops = dict(constant=[], piecewise=['0.5', '0.75']).get(schedule)
    if re.fullmatch(r'drops:0?\.\d+(,0?\.\d+)*', schedule):
        drops = schedule[6:].split(',')
    return None if drops is None else 0.1 ** sum(progress >= float(at) for at in drops)

def eps_factor(warmup, progress):
    """Share of eps: 0 for a third of the warm-up (a share of the training), then linear up to 1."""
    return min(1.0, max(0.0, (progress / warmup - 1 / 3) * 1.5)) if warmup else 1.0

def checkpoint_path(args, data, method, seed, extra, keep):
    """(name, file) of a training. Its options and data are in the hash, code is not: after a change
    of a loss or a network, --fresh or another `extra`."""
    keys = ['arch', 'epochs', 'batch_size', 'lr', 'weight_decay', 'schedule', 'amp', 'pad',
            'norm', 'eps']
    if method != 'standard':  # whose history is of that norm and eps, too
        keys += ['eps_warmup', 'step_size', 'steps']
    recipe = {k: getattr(args, k) for k in keys} | dict(
        pad=data.pad, flip=data.flip, method=method, seed=seed, data=data.digest, keep=list(keep))
    recipe |= extra or {}
    name = re.sub(r'[^\w.-]+', '_', f'{args.dataset}-{args.arch}-{method}-s{seed}')
    return name, Path(args.out, 'models', f'{name}-{digest(recipe)}.pt')

def train(args, data, method, seed, device, *, build=make_model, loss_fn=None, extra=None,
          keep=(), labels=None, val_loss=cross_entropy):
    """Train, or continue after an interruption, or take the finished network.

    method: a key of METHODS, or any name with a loss_fn of the same signature; build(arch,
    classes, shape, seed) -> model; extra: what else changes the result, loss_fn, build and val_loss
    included, for JSON; keep: epochs whose weights are kept (0: the initial ones); labels: (N, ...),
    what loss_fn gets as y. An epoch's draws come from (seed, epoch): continued equals unbroken.
    Returns dict(best, last, kept: state_dicts; best_epoch: of the highest validation accuracy under
    PGD-10 on val_loss (standard: natural), the later of equals; history: a row an epoch; seconds).
    """
    source = data if labels is None else replace(data, train=(data.train[0], labels))
    name, path = checkpoint_path(args, source, method, seed, extra, keep)
    state = {} if args.fresh or not path.exists() else read_checkpoint(path, 'history', 'last')
    if state.get('finished'):
        log.info('%s: trained already; --fresh trains again', path)
        return state
    model = build(args.arch, len(data.classes), data.shape, seed).to(device)
    dtype = pick_precision(device, args.amp)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, fused=device.type == 'cuda')
    scaler = torch.amp.GradScaler(device.type, 2.0**16 if dtype == torch.float16 else 1.0)
    if state:
        model.load_state_dict(state['last'])
        optimizer.load_state_dict(state['optimizer'])
        scaler.load_state_dict(state['scaler'])
        log.info('%s: continuing after epoch %d', name, len(state['history']))
    else:
        state = dict(history=[], seconds=0.0, best=None, best_epoch=0,
                     kept={0: deepcopy(model.state_dict())} if 0 in keep else {})
    net, saved = spread(model, device), time.monotonic()
    for epoch in range(len(state['history']), args.epochs):
        began = time.monotonic()
        row = dict(method=method, seed=seed, epoch=epoch + 1, precision=str(dtype))
        row |= train_epoch(net, optimizer, scaler, dtype, source, args, seed, epoch,
                           loss_fn or METHODS[method]) | validate(model, data, args, val_loss)
        # epochs before eps is whole are too easy to be the best
        whole = eps_factor(args.eps_warmup, (epoch + 1) / args.epochs) == 1
        row['score'] = row['val_natural'] if method == 'standard' else row['val_robust'] * whole
        if row['score'] >= max((old['score'] for old in state['history']), default=0):
            state['best'], state['best_epoch'] = deepcopy(model.state_dict()), epoch + 1
        if epoch + 1 in keep:
            state['kept'][epoch + 1] = deepcopy(model.state_dict())
        state['seconds'] += time.monotonic() - began
        state['history'].append(row | dict(seconds=round(state['seconds'], 1)))
        log.info('%s %d/%d  loss %.3f  natural %.3f  PGD-10 %.3f (training %.3f)  %.0f s', name,
                 epoch + 1, args.epochs, row['loss'], row['val_natural'], row['val_robust'],
                 row['train_robust'], state['seconds'])
        state |= dict(last=model.state_dict(), optimizer=optimizer.state_dict(),
                      scaler=scaler.state_dict(), finished=epoch + 1 == args.epochs)
        if state['finished']:
            del state['optimizer'], state['scaler']
        if state['finished'] or device.type == 'cpu' or time.monotonic() - saved > 600:
            save(path, partial(torch.save, state))
            saved = time.monotonic()
    if row['val_natural'] < 1.2 / len(data.classes):
        log.warning('%s COLLAPSED to one class; a smaller --lr or --eps-warmup 0.5 may help', name)
    return state

def train_epoch(net, optimizer, scaler, dtype, data, args, seed, epoch, loss_fn):
    """dict(loss: mean, skipped: batches whose loss was not finite); ten of these in a row are a
    UserError. Nothing here waits for a GPU before the epoch's end."""
    device, n = data.train[1].device, max(1, len(data.train[1]) // args.batch_size)
    generator = make_generator('train', seed, epoch, RANK, device=device)
    torch.manual_seed(generator.initial_seed())  # for dropout
    total, streak, longest, good = torch.zeros(4, device=device)
    net.train()
    batches = train_batches(data, args.batch_size, seed, epoch, generator)
    for i, (x, y) in enumerate(tqdm(batches, total=n, disable=RANK > 0 or None, leave=False)):
        progress = (epoch + i / n) / args.epochs
        optimizer.param_groups[0]['lr'] = args.lr * lr_factor(args.schedule, progress)
        grown = eps_factor(args.eps_warmup, progress)
        threat = dict(eps=grown * args.eps, step_size=grown * args.step_size, steps=args.steps,
                      norm=args.norm)
        before = [b.clone() for b in net.buffers()]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_fn(net, x, y, threat, generator)
        fine = loss.detach().isfinite()
        optimizer.zero_grad()
        scaler.scale(loss * torch.where(fine, 1.0, math.nan)).backward()  # nan: no process steps
        scaler.step(optimizer)  # unless a gradient is not finite
        scaler.update(None if dtype == torch.float16 else 1.0)
        for b, old in zip(net.buffers(), before):  # batch norm forgets what overflowed
            b.copy_(torch.where(fine, b, old))
        total, good = total + torch.where(fine, loss.detach(), 0), good + fine
        streak = torch.where(fine, 0, streak + 1)
        longest = torch.maximum(longest, streak)
    if WORLD > 1:  # all processes go on with the first one's batch norm
        for b in net.buffers():
            dist.broadcast(b, 0)
    if longest >= min(10, n):
        raise UserError(f'epoch {epoch + 1}: no finite loss in {int(longest)} batches in a row; '
                        'a smaller --lr may help')
    return dict(loss=(total / good).item(), skipped=n - int(good))

def validate(model, data, args, loss=cross_entropy):
    """Accuracy, natural and under PGD-10, on the validation images and as many training images."""
    attack = partial(pgd, eps=args.eps, step_size=args.eps / 4, steps=10, norm=args.norm, loss=loss,
                     stop=True)
    row = {}
    for split, (x, y) in dict(train=data.train, val=data.val).items():
        x, y = x[: len(data.val[1])], y[: len(data.val[1])]
        row[f'{split}_natural'] = correct_under(model, x, y).float().mean().item()
        row[f'{split}_robust'] = correct_under(model, x, y, attack).float().mean().item()
    return row

def read_checkpoint(path, *keys):
    """torch.load of a dict with these keys that runs no code; UserError for anything else."""
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(state, dict) or not set(keys) <= state.keys():
            raise ValueError('it holds something else')
        return state
    except Exception as error:
        why = str(error).partition('. ')[0].partition('\n')[0]
        raise UserError(f'{path} cannot be read ({why}); if it is one of runs/models, --fresh '
                        'trains it again') from None

def restore(state, which, args, data, device, build=make_model):
    """The network of a training in eval mode; which: 'best', 'last' or a kept epoch."""
    model = build(args.arch, len(data.classes), data.shape, 0)
    model.load_state_dict(state[which] if isinstance(which, str) else state['kept'][which])
    return model.to(device).eval()

# ------------------------------------------------------------------------------------ Results

# A nested dict of numpy arrays and what JSON takes: results['runs'][arm]['s0'][name], and config,
# classes, labels (of the test images), finished, accuracy, claims. Keys are strings. The file
# results.json holds it readably, results.npz the arrays.

def save_results(results, folder):
    """results.npz and results.json, both whole whenever the process is killed."""
    arrays = {}

    def split(value, path):
        if isinstance(value, dict):
            return {k: split(v, f'{path}/{k}') for k, v in value.items()}
        if isinstance(value, np.ndarray):
            arrays[path] = value
        return {'npz': path} if isinstance(value, np.ndarray) else value

    text = json.dumps(split(results, ''), indent=1, default=float)
    save(folder / 'results.npz', partial(np.savez_compressed, **arrays))
    save(folder / 'results.json', text)

def load_results(folder):
    """What save_results wrote; {} where there is nothing that can be read."""
    try:
        with np.load(folder / 'results.npz') as file:
            arrays = dict(file)
        return json.loads((folder / 'results.json').read_text('utf-8'),
                          object_hook=lambda d: arrays[d['npz']] if d.keys() == {'npz'} else d)
    except Exception as error:
        if not isinstance(error, FileNotFoundError):
            log.warning('the results in %s cannot be read (%s): measuring again', folder, error)
        return {}

def measure(results, keys, function, folder):
    """results[keys[0]][keys[1]]...; if it is not there yet, function() is called and saved."""
    place = results
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    if keys[-1] not in place:
        place[keys[-1]] = function()
        save_results(results, folder)
    return place[keys[-1]]

def finish(study, results, folder):
    """Mark a study as finished; metrics.csv has a row for each epoch of its trainings."""
    rows = [row for arm in results.get('runs', {}).values() for run in arm.values()
            for row in run.get('history', ())]
    table = [*rows[:1], *(row.values() for row in rows)]  # the first: its keys
    save(folder / 'metrics.csv', ''.join(','.join(map(str, line)) + '\n' for line in table))
    results['finished'] = study
    save_results(results, folder)

def stack(runs):
    """{seed: {name: value}} -> {name: array, seeds in front}, dicts inside too; no lists, texts."""
    out, runs = {}, list(runs.values())
    for name, value in runs[0].items():
        if isinstance(value, dict):
            out[name] = stack({i: run[name] for i, run in enumerate(runs)})
        elif isinstance(value, (int, float, np.ndarray)):
            out[name] = np.stack([run[name] for run in runs])
    return out

@dataclass
class Claim:
    """A row of claims.md. It holds if the 95 % interval of the effect lies above `above`."""
    text: str
    source: str
    effect: object  # (N,) of images or (S, N) of seeds and images, whose mean is the effect
    above: float = 0.0
    reference: str = '-'  # a published number and where it stands
    unless: str = ''  # why nothing can be learnt here
    interval: tuple = None  # (low, high) of an effect that is no such mean

def resample(statistic, *arrays, draws=1000):
    """(value, low, high): 95 % percentile interval of statistic(*arrays) over seeds and images of
    (S, N, ...), which are drawn alike for all arrays (images: for all of the same N)."""
    rng, s, found = np.random.default_rng(0), len(arrays[0]), []
    for _ in range(draws):
        seeds = rng.integers(s, size=(s, 1))
        images = {n: rng.integers(n, size=n) for n in sorted({a.shape[1] for a in arrays})}
        found.append(statistic(*(a[seeds, images[a.shape[1]]] for a in arrays)))
    return statistic(*arrays), *np.nanpercentile(found, (2.5, 97.5))

def bootstrap(effect, draws=1000):
    """(mean, low, high) of (N,) or (S, N)."""
    return resample(np.mean, np.atleast_2d(np.asarray(effect, float)), draws=draws)

def summary(right):
    """dict(mean, low, high, seeds, n) of an accuracy (S, N), for results.json."""
    mean, low, high = map(float, bootstrap(right))
    return dict(mean=mean, low=low, high=high, seeds=len(right), n=right.shape[1])

def judge(claims, results, folder):
    """Verdicts: supported (interval above the threshold), contradicted (below), inconclusive or
    uninformative; printed, in claims.md and in results.json."""
    rows = []
    for c in claims:
        value, low, high = (np.mean(c.effect), *c.interval) if c.interval else bootstrap(c.effect)
        verdict = 'supported' if low > c.above else 'inconclusive'
        verdict = 'contradicted' if high < c.above else verdict
        verdict = f'uninformative: {c.unless}' if c.unless else verdict
        measured = f'{value:+.3f} [{low:+.3f}, {high:+.3f}]'
        rows.append(dict(claim=c.text, source=c.source, measured=measured, needed=f'> {c.above:g}',
                         reference=c.reference, verdict=verdict))
        log.info('%s\n    %s: %s, needed > %g  [%s]', verdict.upper(), c.text, measured, c.above,
                 c.source)
    table = [*rows[:1], ['---'] * 6, *(row.values() for row in rows)]  # the first: its keys
    text = ''.join('| ' + ' | '.join(v.replace('|', '/') for v in row) + ' |\n' for row in table)
    if len(results['config']['seeds']) == 1:
        text += '\nOne seed: intervals are over images and tell nothing of another training.\n'
    save(folder / 'claims.md', text)
    results['claims'] = rows
    save_results(results, folder)
    seeds = text.partition('\n\n')[2]  # the note on one seed
    log.info('%sfigures, claims, numbers: %s; --fresh trains and measures again', seeds, folder)

def near_chance(natural, y):
    """Why the accuracy of the worst seed says nothing, or ''. natural: (S, N) of right; y: (N,)."""
    usual, worst = np.bincount(y).max() / len(y), np.min(natural.mean(-1))
    return 'accuracy near chance' * bool(worst < min(1.5 * usual, 0.9 * usual + 0.1))

def masking_claim(name, masking, unless=''):
    """Control: no symptom of any seed is above its threshold. masking: {symptom: (S,)}."""
    slack = {symptom: MASKING[symptom] - np.max(value) for symptom, value in masking.items()}
    text = f'{name} shows no sign of masked gradients'
    text += ''.join(f', but: {symptom}' for symptom, v in slack.items() if v < 0)
    least = min(slack.values()) + 1e-9  # at the threshold is harmless
    return Claim(text, 'control', least, unless=unless, interval=(least, least))

COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
METHOD_COLOURS = dict(zip(METHODS, COLOURS * 2))
STYLE = {'font.size': 9, 'axes.titlesize': 9, 'axes.spines.top': False, 'axes.grid': True,
         'axes.spines.right': False, 'grid.alpha': 0.25, 'savefig.dpi': 150,
         'axes.prop_cycle': matplotlib.cycler(color=COLOURS)}

def new_figure(rows=1, columns=1, width=7.0, height=3.0, **options):
    """(figure, axes as a (rows, columns) array) in the house style; inches."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), layout='constrained')
        return figure, figure.subplots(rows, columns, squeeze=False, **options)

def save_figure(figure, folder, name):
    """<folder>/<name>.png."""
    with matplotlib.rc_context(STYLE):
        save(folder / f'{name}.png', partial(figure.savefig, format='png'))

def show_image(axis, image, title=''):
    """An image (C, H, W) in [0, 1], without axes."""
    image = np.clip(np.asarray(image, np.float32).transpose(1, 2, 0), 0, 1)
    axis.imshow(image.repeat(3, 2) if image.shape[2] == 1 else image, interpolation='nearest')
    axis.set_title(title)
    axis.axis('off')

# ------------------------------------------------------------------------------------- Shapes

# Class k is outline k filled with texture k, so that both cues predict the class and a network may
# choose. Frozen: what varies, and how the numbers were chosen, is in docs/shapes.md.

def radius_of(u, v):
    return (u.square() + v.square() + 1e-12).sqrt()  # differentiable at the centre

def box(u, v, a, b):
    """Signed distance to the box |u| < a, |v| < b (negative inside)."""
    du, dv = u.abs() - a, v.abs() - b
    return radius_of(du.clamp(min=0), dv.clamp(min=0)) + torch.maximum(du, dv).clamp(max=0)

def star(u, v, corners, inner):
    """Signed distance to a star with tips at radius 1, the first upwards, and notches at inner."""
    half = math.pi / corners
    phi = torch.remainder(torch.atan2(u, -v) + half, 2 * half) - half  # fold into one sector
    x, y = radius_of(u, v) * phi.cos(), radius_of(u, v) * phi.sin().abs()
    edge_x, edge_y = inner * math.cos(half) - 1, inner * math.sin(half)
    return ((x - 1) * edge_y - y * edge_x) / math.hypot(edge_x, edge_y)

OUTLINES = {  # (u, v) in units of the radius, v downwards -> signed distance in the same units
    'disc': lambda u, v: radius_of(u, v) - 0.9,
    'square': lambda u, v: box(u, v, 0.78, 0.78),
    'triangle': lambda u, v: star(u, v - 0.15, 3, 0.5),
    'ring': lambda u, v: (radius_of(u, v) - 0.68).abs() - 0.24,
    'cross': lambda u, v: torch.minimum(box(u, v, 0.95, 0.3), box(u, v, 0.3, 0.95)),
    'star': lambda u, v: star(u, v, 5, 0.42),
    'crescent': lambda u, v: torch.maximum(radius_of(u, v) - 0.95, 0.8 - radius_of(u - 0.55, v)),
    'bar': lambda u, v: box(u, v, 0.36, 1.0),
    'ell': lambda u, v: torch.minimum(box(u + 0.45, v, 0.36, 0.9), box(u, v - 0.55, 0.85, 0.35)),
    'two discs': lambda u, v: torch.minimum(
        radius_of(u - 0.5, v - 0.42), radius_of(u + 0.5, v + 0.42)) - 0.5}

def wave(t):
    """A square wave with soft edges, period 1, in [-1, 1]."""
    return torch.tanh(2.5 * torch.sin(2 * math.pi * t)) / math.tanh(2.5)

def cosines(u, v):
    return torch.cos(2 * math.pi * u), torch.cos(2 * math.pi * v)

def blotches(u, v, blobs):
    """A random field, smooth between the nodes of blobs (N, 1, 9, 9)."""
    at = torch.stack((u, v), -1) / 4
    field = F.grid_sample(blobs, at, padding_mode='reflection', align_corners=True)
    return torch.tanh(2 * field[:, 0])

TEXTURES = {  # (u, v) in periods and the blobs -> texture in [-1, 1]
    'bars across': lambda u, v, _: wave(v),
    'diagonal up': lambda u, v, _: wave((u + v) * 0.5**0.5),
    'bars upright': lambda u, v, _: wave(u),
    'diagonal down': lambda u, v, _: wave((u - v) * 0.5**0.5),
    'checks': lambda u, v, _: wave(0.75 * u) * wave(0.75 * v),
    'dots': lambda u, v, _: torch.tanh(4 * (sum(cosines(u, v)) - 0.7)),
    'grid': lambda u, v, _: torch.tanh(4 * (torch.maximum(*cosines(u, v)) - 0.55)),
    'rings': lambda u, v, _: wave(radius_of(u, v)),
    'zigzag': lambda u, v, _: wave(v + 1.2 * (torch.remainder(0.7 * u, 1) - 0.5).abs()),
    'blotches': blotches}

def shape_parameters(n, generator, texture=None):
    """What varies between n images of outlines 0, 1, ..., 9, 0, ...: a dict of tensors (n, ...).
    texture: int64 (n,), by default that of the outline."""
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    outline = torch.arange(n) % 10
    radius = uniform(0.60, 0.90)  # the frame is [-1, 1] x [-1, 1]
    background = uniform(0.20, 0.80, 3)
    way = torch.randn(n, 3, generator=generator)
    way = way / way.abs().amax(1, keepdim=True) * uniform(0.20, 0.50, 1)
    colour = background + way
    colour = torch.where((colour < 0.1) | (colour > 0.9), background - way, colour)
    return dict(
        outline=outline, texture=outline if texture is None else texture, radius=radius,
        center=0.9 * (1 - radius[:, None]) * uniform(-1, 1, 2),
        angle=uniform(-0.26, 0.26),  # radians; more would turn one stripe texture into another
        period=uniform(4, 8),  # pixels of a 32-pixel frame
        phase=uniform(0, 1, 2), contrast=uniform(0.08, 0.25), colour=colour.clamp(0.05, 0.95),
        texture_colour=torch.randint(2, (n, 3), generator=generator) * 2.0 - 1,
        blobs=torch.randn(n, 1, 9, 9, generator=generator), background=background,
        gradient=0.1 * uniform(-1, 1, 3, 2), clutter_center=uniform(-1, 1, 2, 2),
        clutter_radius=uniform(0.1, 0.3, 2), clutter_colour=0.15 * uniform(-1, 1, 2, 3))

def render_shapes(p, size=32):
    """Draw parameters, without noise, differentiably: a dict of images (N, 3, S, S) in [0, 1], as
    image, filled (the texture everywhere) and flat (no texture), mask and edge (N, 1, S, S)."""
    q = {name: v[..., None, None] for name, v in p.items()}  # to go with (S, S)
    axis = (torch.arange(size, device=p['radius'].device) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing='ij')
    dx, dy = x - q['center'][:, 0], y - q['center'][:, 1]
    cos, sin = q['angle'].cos(), q['angle'].sin()
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    distance, texture = torch.zeros_like(u), torch.zeros_like(u)
    for k, outline in enumerate(OUTLINES.values()):
        i = (p['outline'] == k).nonzero()[:, 0]
        r = q['radius'][i]
        distance = distance.index_put((i,), outline(u[i] / r, v[i] / r) * r)
    for k, (name, pattern) in enumerate(TEXTURES.items()):
        i = (p['texture'] == k).nonzero()[:, 0]
        scale, shift = 16 / q['period'][i], q['phase'][i] * (name != 'rings')
        texture = texture.index_put((i,), pattern(
            u[i] * scale + shift[:, 0], v[i] * scale + shift[:, 1], p['blobs'][i]))
    pixels = distance[:, None] * size / 2
    mask, edge = (0.5 - pixels).clamp(0, 1), (1.5 - pixels.abs()).clamp(0, 1)
    ground = q['background'] + q['gradient'][:, :, 0] * x + q['gradient'][:, :, 1] * y
    for j in range(2):
        cx, cy = q['clutter_center'][:, j].unbind(1)
        far = ((x - cx) ** 2 + (y - cy) ** 2) / (2 * q['clutter_radius'][:, j] ** 2)
        ground = ground + q['clutter_colour'][:, j] * torch.exp(-far)[:, None]
    filled = q['colour'] + q['contrast'][:, None] * q['texture_colour'] * texture[:, None]
    return dict(image=(mask * filled + (1 - mask) * ground).clamp(0, 1), filled=filled.clamp(0, 1),
                flat=(mask * q['colour'] + (1 - mask) * ground).clamp(0, 1), mask=mask, edge=edge)

def make_shapes(n, key, size=32, texture=None, kind='image'):
    """n images of a kind that render_shapes draws, with noise, the same for the same key on every
    device: (uint8 (n, 3, S, S), outlines (n,), parameters)."""
    generator = make_generator('shapes', 1, key)
    params, images = shape_parameters(n, generator, texture), []
    for at in torch.arange(n).split(1000):  # bounds the memory
        drawn = render_shapes({name: v[at] for name, v in params.items()}, size)[kind]
        noisy = drawn + 0.02 * torch.randn(drawn.shape, generator=generator)
        images.append((noisy.clamp(0, 1) * 255).round().byte())
    return torch.cat(images), params['outline'], params
