"""What the attacks and the training cost, beside plain reference implementations.

    python tests/bench.py            ResNet-18, batch 128: about ten minutes on two CPU cores
    python tests/bench.py --quick    batch 16, two steps

Every row runs in a process of its own, so that its peak memory is its own; the variants of a
job take turns, so that a drifting machine speed hits them alike. Prints a table, writes
bench.json. The references:

    plain     float32, NCHW, batch norm in train mode, loss.backward() with gradients for the
              weights as well: what most training repositories do in their attack
    library   float32, NCHW, eval mode, autograd.grad with respect to the images, weights not
              frozen: what attack libraries do

`train cifs` is the training step of cifs.py's masked network, in the precision of the last
`train` row before it.

`mi` estimates I(T;X) and I(T;Y), both bounds and binning, of N outputs of D units that lie far
apart, as in the layers of real networks, and `mi-near` of outputs so near that every pair counts:

    plain     a whole distance matrix for each bound and each class, float32, and a sort of the
              rows of cells: the usual code
    library   the same in float64
    ours      mi_analysis.layer_information, which adds permuted labels, the bracket, bootstrap
              replicates and geometry

The peak memory of these rows is that beyond the outputs themselves.
"""
import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cifs  # noqa: E402
import common  # noqa: E402
import mi_analysis  # noqa: E402

EPS, STEP = 8 / 255, 2 / 255


def plain_pgd(model, x, y, steps, library=False):
    """The reference attack: textbook PGD without any of common.py's care for speed."""
    delta = torch.empty_like(x).uniform_(-EPS, EPS).requires_grad_()
    for _ in range(steps):
        loss = F.cross_entropy(model((x + delta).clamp(0, 1)), y)
        if library:
            gradient, = torch.autograd.grad(loss, delta)
        else:
            delta.grad = None
            loss.backward()
            gradient = delta.grad
        delta.data = (delta.data + STEP * gradient.sign()).clamp(-EPS, EPS)
    return (x + delta).clamp(0, 1).detach()


class Unfolded(torch.nn.Module):
    """A copy of a model that computes convolution and batch norm one after the other."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        common.conv_bn = lambda x, conv, bn: bn(conv(x))

    def forward(self, x):
        return self.model(x)


def plain_information(t, y):
    """[I(T;X) upper, lower, binned, I(T;Y) the same] in bits, as their formulas stand."""
    def bound(rows, c):
        norm = rows.square().sum(1)
        s = norm[:, None] + norm - 2 * rows @ rows.T
        return (math.log(len(rows)) - torch.logsumexp(-s / (c * mi_analysis.VARIANCE), 1)
                .mean().item()) / math.log(2)

    def cells(rows):
        bins = np.ascontiguousarray((rows / mi_analysis.BIN_WIDTH).floor().int().cpu().numpy())
        return mi_analysis.entropy(np.unique(bins.view(f'V{4 * bins.shape[1]}'),
                                             return_counts=True)[1])

    x, given = [], []
    for estimate in (lambda r: bound(r, 2), lambda r: bound(r, 8), cells):
        x.append(estimate(t))
        given.append(sum((y == k).double().mean().item() * estimate(t[y == k])
                         for k in y.unique()))
    return x + [a - b for a, b in zip(x, given)]


def information(what, variant, n, d, device):
    """A function that estimates the information once and returns its six values."""
    y = torch.arange(n, device=device) % 10
    generator = torch.Generator(device).manual_seed(0)
    t = torch.randn(n, d, generator=generator, device=device)
    for k in range(10):  # class means; in place, for the memory that is measured
        t[k::10].add_(torch.randn(d, generator=generator, device=device))
    t.relu_()
    if what == 'mi-near':
        t.mul_(0.3 / d ** 0.5)
    if variant != 'ours':
        return lambda: plain_information(t.double() if variant == 'library' else t, y)
    labels = torch.stack([y] + [y[torch.randperm(n, generator=generator, device=device)]
                                for _ in range(mi_analysis.PERMUTATIONS)])
    weights = mi_analysis.replicate_weights(n)
    return lambda: mi_analysis.layer_information(t, labels, 10, weights)['values'][:, 0].tolist()


def job(name, arch, batch, steps, device):
    """A function that does the job once. name: '<what> <variant>'."""
    what, variant = name.split()
    torch.manual_seed(0)
    args = common.parse(cifs.make_parser(), ['--dataset', 'cifar10', '--arch', arch])
    build = cifs.builder(args, 'cifs' if variant == 'cifs' else 'vanilla')
    model = build(arch, 10, (3, 32, 32), 0).to(device)
    x, y = torch.rand(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 10
    reference = variant in ('plain', 'library')
    if reference:
        model = Unfolded(model.to(memory_format=torch.contiguous_format))
    else:
        x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(variant)
    if variant == 'cifs':
        dtype = common.pick_precision(device)
    threat = dict(eps=EPS, step_size=STEP, steps=steps, norm='linf')
    model.train(variant == 'plain')

    def attack():
        if reference:
            return plain_pgd(model, x, y, steps, variant == 'library')
        return common.pgd(model, x, y, **threat)

    def train():
        if reference:
            x_adv = attack()
            model.train()
            loss = F.cross_entropy(model(x_adv), y)
            model.train(variant == 'plain')
        else:
            model.train()
            loss = cifs.training_loss('pgd', args.beta)(model, x, y, threat, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def shapes():
        common.make_shapes(batch * 8, 'bench')

    run = {'pgd': attack, 'train': train, 'shapes': shapes}[what]

    def once():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            run()
        if device.type == 'cuda':
            torch.cuda.synchronize()
    return once


def worker(options):
    """One row: time the job on demand, one line of JSON per line read."""
    device = common.pick_device('auto')
    def peak():
        return torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == 'cuda' else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before, what = 0, options.worker.split()[0]
    if what.startswith('mi'):
        information(*options.worker.split(), 200, 64, device)()  # warm up
        once = information(*options.worker.split(), options.samples, options.units, device)
        before = peak()
    else:
        once = job(options.worker, options.arch, options.batch, options.steps, device)
        job(options.worker, options.arch, min(options.batch, 8), 1, device)()
    for _ in sys.stdin:
        start = time.perf_counter()
        found = once()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(json.dumps((seconds, peak() - before, found)), flush=True)


def measure(names, options):
    """{name: (median seconds, peak MiB, what the job returned)}, the variants taking turns."""
    workers = {}
    for name in names:
        workers[name] = subprocess.Popen(
            [sys.executable, __file__, '--worker', name, '--arch', options.arch, '--batch',
             str(options.batch), '--steps', str(options.steps), '--samples',
             str(options.samples), '--units', str(options.units)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    results = {name: [] for name in names}
    for _ in range(options.repeats):
        for name, process in workers.items():
            process.stdin.write('go\n')
            process.stdin.flush()
            results[name].append(json.loads(process.stdout.readline()))
    for process in workers.values():
        process.stdin.close()
        process.wait()
    return {name: (sorted(r[0] for r in rows)[len(rows) // 2], max(r[1] for r in rows),
                   rows[0][2])
            for name, rows in results.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='resnet18')
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--samples', type=int, default=5000, help='N of mi')
    parser.add_argument('--units', type=int, default=16384, help='D of mi')
    parser.add_argument('--only', nargs='+', help='of pgd train shapes mi mi-near')
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--out', default='bench.json')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.batch, options.steps, options.samples, options.units = 16, 2, 1000, 4096
    if options.worker:
        return worker(options)
    device = common.pick_device('auto')
    low = {torch.bfloat16: 'bf16', torch.float16: 'fp16'}.get(common.pick_precision(device))
    ours = ['fp32'] + ([low] if low else [])
    table, rows = {}, []
    both = ['plain', 'library']
    for what, variants in (('pgd', both + ours), ('train', both + ours + ['cifs']),
                           ('shapes', ['fp32']), ('mi', both + ['ours']),
                           ('mi-near', both + ['ours'])):
        if not options.only or what in options.only:
            table |= measure([f'{what} {v}' for v in variants], options)
    images = {'pgd': options.batch, 'train': options.batch, 'shapes': 8 * options.batch,
              'mi': options.samples, 'mi-near': options.samples}
    print(f'\n{options.arch}, batch {options.batch}, {options.steps} steps, {device.type}, '
          f'{torch.get_num_threads()} threads, torch {torch.__version__}, '
          f'median of {options.repeats}')
    print(f"{'job':<16}{'seconds':>9}{'images/s':>10}{'MiB':>8}{'x plain':>9}{'x library':>11}")
    for name, (seconds, memory, found) in table.items():
        what = name.split()[0]
        gains = [table[f'{what} {r}'][0] / seconds if f'{what} {r}' in table else float('nan')
                 for r in ('plain', 'library')]
        exact = table.get(f'{what} library', (0, 0, None))[2]
        error = max(abs(a - b) for a, b in zip(found, exact)) if found and exact else None
        rows.append(dict(job=name, seconds=seconds, memory_mib=memory, error_bits=error,
                         images_per_second=images[what] / seconds, times_plain=gains[0],
                         times_library=gains[1]))
        print(f'{name:<16}{seconds:>9.3f}{images[what] / seconds:>10.1f}{memory:>8.0f}'
              f'{gains[0]:>9.2f}{gains[1]:>11.2f}'
              + (f'   differs from float64 by {error:.1g} bits' if error is not None else ''))
    common.write_json(options.out, dict(options=vars(options), device=device.type,
                                        threads=torch.get_num_threads(),
                                        torch=torch.__version__, rows=rows))


if __name__ == '__main__':
    main()
