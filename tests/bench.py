"""What the attacks, the training and the measurements cost, beside plain reference code.

    python tests/bench.py            ResNet-18, batch 128: about half an hour on two CPU cores
    python tests/bench.py --quick    batch 16, two steps

Every row runs in a process of its own, so that its peak memory is its own; the variants of a
job take turns, so that a drifting machine speed hits them alike. Prints two tables, writes
bench.json. The references:

    plain     float32, NCHW, batch norm in train mode, loss.backward() with gradients for the
              weights as well: what most training repositories do in their attack
    library   float32, NCHW, eval mode, autograd.grad with respect to the images, weights not
              frozen: what attack libraries do

    matmul    a product of two large square matrices: what the hardware gives at best. The last
              column is the share of it that the attack and the training reach, by the operations
              they need: two forward passes' for a step of the attack, three for an update
    pgd       the attack of the training; `unfolded`, `nchw`, `compiled` change one thing in the
              last row before them: batch norm not folded into the convolutions, no
              channels_last, torch.compile (which first compiles, untimed)
    train     one training step of PGD-AT; `train cifs` is that of cifs.py's masked network, in
              the precision of the last `train` row before it
    evaluate  PGD and the verdicts. Half of the images are misclassified from the start, as with
              a robust network, the others never; `keep` does not drop the former
    apgd      plain: the algorithm without dropping, in the library's form
    square    plain: a patch at a time, no dropping, NCHW
    shapes    plain: an image at a time
    tangent   orthonormal tangent bases of a decoder to 3072 pixels with `--latent` inputs; plain:
              a backward pass for each pixel, then Gram-Schmidt. Needs dimpled_manifold.py
    mi        I(T;X) and I(T;Y), both bounds and binning, of N outputs of D units that lie far
              apart, as in the layers of real networks; `mi-near`: so near that every pair counts.
              plain: a whole distance matrix for each bound and each class, float32, and a sort
              of the rows of cells: the usual code; library: the same in float64; ours:
              mi_analysis.layer_information, which adds permuted labels, the bracket, bootstrap
              replicates and geometry. Memory beyond the outputs themselves

The second table says what doubling does to our own code, at small sizes.
"""

import argparse
import importlib.util
import json
import math
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cifs
import common
import mi_analysis

EPS, STEP = 8 / 255, 2 / 255
SIDE = 4096  # of the matrices of `matmul`
SMALL = dict(batch=16, steps=2, classes=10, samples=1000, units=4096, latent=8)


def plain_pgd(model, x, y, steps, library=False):
    """The reference attack: textbook PGD without any of common.py's care for speed."""
    delta = torch.empty_like(x).uniform_(-EPS, EPS).requires_grad_()
    for _ in range(steps):
        loss = F.cross_entropy(model((x + delta).clamp(0, 1)), y)
        if library:
            (gradient,) = torch.autograd.grad(loss, delta)
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


def plain_apgd(model, x, y, steps):
    """Auto-PGD on all images to the end (Croce & Hein 2020, algorithm 1)."""

    def value(v):
        v = v.detach().requires_grad_()
        loss = F.cross_entropy(model(v), y, reduction='none')
        return loss.detach(), torch.autograd.grad(loss.sum(), v)[0]

    def project(v):
        return torch.min(torch.max(v, x - EPS), x + EPS).clamp(0, 1)

    size = torch.full((len(x), 1, 1, 1), 2 * EPS, device=x.device)
    now = before = best = project(x + torch.empty_like(x).uniform_(-EPS, EPS))
    loss, gradient = value(now)
    best_loss, last_best, last_size, rises = loss, loss, size, torch.zeros_like(loss)
    checkpoints = common.apgd_checkpoints(steps)
    for k in range(steps):
        step = project(now + size * gradient.sign())
        share = 0.75 if k else 1.0
        new = project(now + share * (step - now) + (1 - share) * (now - before))
        before, now = now, new
        new_loss, gradient = value(now)
        rises = rises + (new_loss > loss)
        loss, better = new_loss, new_loss > best_loss
        best = torch.where(better[:, None, None, None], now, best)
        best_loss = torch.maximum(best_loss, loss)
        if k + 1 in checkpoints:
            period = k + 1 - checkpoints[checkpoints.index(k + 1) - 1]
            stuck = (last_size == size).flatten() & (last_best == best_loss)
            halve = ((rises < 0.75 * period) | stuck)[:, None, None, None]
            last_size, last_best, rises = size, best_loss, torch.zeros_like(rises)
            size, now = torch.where(halve, size / 2, size), torch.where(halve, best, now)
    return best


def plain_square(model, x, y, queries):
    """Square attack on all images to the end, one patch at a time."""
    _, c, h, w = x.shape

    def worth(v):
        with torch.no_grad():
            return -common.margin(model(v), y)

    best = (x + EPS * (torch.randint(2, (len(x), c, 1, w), device=x.device) * 2.0 - 1)).clamp(0, 1)
    lowest = worth(best)
    for query in range(1, queries):
        halvings = sum(query / queries > q / 10000 for q in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        side = max(1, round(math.sqrt(0.8 / 2**halvings * h * w)))
        side, new = min(side, h - 1), best.clone()
        for i in range(len(x)):
            top, left = np.random.randint(h - side + 1), np.random.randint(w - side + 1)
            at = (i, slice(None), slice(top, top + side), slice(left, left + side))
            sign = torch.randint(2, (c, 1, 1), device=x.device) * 2.0 - 1
            new[at] = (x[at] + EPS * sign).clamp(0, 1)
        found = worth(new)
        better = found < lowest
        best = torch.where(better[:, None, None, None], new, best)
        lowest = torch.minimum(found, lowest)
    return best


def plain_tangent(decode, z):
    """Bases (N, D, k): the Jacobian by a backward pass for each pixel, then Gram-Schmidt."""
    z = z.clone().requires_grad_()
    out = decode(z).flatten(1)
    jacobian = torch.stack(
        [torch.autograd.grad(out[:, i].sum(), z, retain_graph=True)[0] for i in range(out.shape[1])], 1
    )
    basis = []
    for column in jacobian.unbind(2):
        for _ in range(2):  # once is not orthogonal in float32
            for u in basis:
                column = column - (u * column).sum(1, keepdim=True) * u
        basis.append(column / column.norm(dim=1, keepdim=True))
    return torch.stack(basis, 2)


def tangent(variant, options, device):
    """A function that finds the tangent bases once and returns the trace of two projectors'
    product, which does not depend on the choice of the basis."""
    torch.manual_seed(0)
    decode = torch.nn.Sequential(
        torch.nn.Linear(options.latent, 256),
        torch.nn.SiLU(),
        torch.nn.Linear(256, 3072),
        torch.nn.Sigmoid(),
        torch.nn.Unflatten(1, (3, 32, 32)),
    ).to(device)
    z = torch.randn(options.batch, options.latent, device=device)
    find = plain_tangent
    if variant == 'ours':
        find = importlib.import_module('dimpled_manifold').tangent_basis

    def once():
        basis = find(decode, z)
        return [(basis[0].T @ basis[1]).square().sum().item()]

    return once


def plain_information(t, y):
    """[I(T;X) upper, lower, binned, I(T;Y) the same] in bits, as their formulas stand."""

    def bound(rows, c):
        norm = rows.square().sum(1)
        s = norm[:, None] + norm - 2 * rows @ rows.T
        return (math.log(len(rows)) - torch.logsumexp(-s / (c * mi_analysis.VARIANCE), 1).mean().item()) / math.log(2)

    def cells(rows):
        bins = np.ascontiguousarray((rows / mi_analysis.BIN_WIDTH).floor().int().cpu().numpy())
        return mi_analysis.entropy(np.unique(bins.view(f'V{4 * bins.shape[1]}'), return_counts=True)[1])

    x, given = [], []
    for estimate in (lambda r: bound(r, 2), lambda r: bound(r, 8), cells):
        x.append(estimate(t))
        given.append(sum((y == k).double().mean().item() * estimate(t[y == k]) for k in y.unique()))
    return x + [a - b for a, b in zip(x, given)]


def information(what, variant, n, d, classes, device):
    """A function that estimates the information once and returns its six values."""
    y = torch.arange(n, device=device) % classes
    generator = torch.Generator(device).manual_seed(0)
    t = torch.randn(n, d, generator=generator, device=device)
    for k in range(classes):  # class means; in place, for the memory that is measured
        t[k::classes].add_(torch.randn(d, generator=generator, device=device))
    t.relu_()
    if what == 'mi-near':
        t.mul_(0.3 / d**0.5)
    if variant != 'ours':
        return lambda: plain_information(t.double() if variant == 'library' else t, y)
    labels = torch.stack(
        [y] + [y[torch.randperm(n, generator=generator, device=device)] for _ in range(mi_analysis.PERMUTATIONS)]
    )
    weights = mi_analysis.replicate_weights(n)
    return lambda: mi_analysis.layer_information(t, labels, classes, weights)['values'][:, 0].tolist()


def job(name, options, device):
    """A function that does the job once. name: '<what> <variant>'."""
    what, variant = name.split()
    torch.manual_seed(0)
    batch, steps, classes = options.batch, options.steps, options.classes
    args = common.parse(cifs.make_parser(), ['--dataset', 'cifar10', '--arch', options.arch])
    build = cifs.builder(args, 'cifs' if variant == 'cifs' else 'vanilla')
    model = build(options.arch, classes, (3, 32, 32), 0).to(device)
    x = torch.rand(batch, 3, 32, 32, device=device)
    y = torch.arange(batch, device=device) % classes
    if what in ('evaluate', 'apgd', 'square'):  # with a tiny eps right images stay right
        y = common.predict(model.eval(), x)
    if what == 'evaluate':
        y[::2] = (y[::2] + 1) % classes
    reference = variant in ('plain', 'library')
    if reference:
        model = Unfolded(model.to(memory_format=torch.contiguous_format))
    else:
        x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(variant)
    if variant in ('cifs', 'unfolded', 'nchw', 'compiled'):
        dtype = common.pick_precision(device)
    if variant == 'unfolded':
        model = Unfolded(model)
    elif variant == 'nchw':
        model, x = model.to(memory_format=torch.contiguous_format), x.contiguous()
    elif variant == 'compiled':
        model.compile()
    threat = dict(eps=EPS, step_size=STEP, steps=steps, norm='linf')
    plain_training = variant == 'plain' and what in ('pgd', 'train')
    model.train(plain_training)

    def attack():
        if reference:
            return plain_pgd(model, x, y, steps, not plain_training)
        return common.pgd(model, x, y, **threat)

    def train():
        if reference:
            x_adv = attack()
            model.train()
            loss = F.cross_entropy(model(x_adv), y)
            model.train(plain_training)
        else:
            model.train()
            loss = cifs.training_loss('pgd', args.beta)(model, x, y, threat, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def evaluate():
        if reference:
            with torch.no_grad():
                model(x)
            model(attack()).argmax(1)
        else:
            common.correct_under(
                model,
                x,
                y,
                partial(common.pgd, **threat | dict(eps=1e-6, step_size=1e-6), drop_fooled=variant != 'keep'),
                batch,
            )

    def apgd():
        (plain_apgd(model, x, y, steps) if reference else common.apgd(model, x, y, eps=1e-6, steps=steps))

    def square():
        (
            plain_square(model, x, y, 10 * steps)
            if reference
            else common.square(model, x, y, eps=1e-6, queries=10 * steps)
        )

    def shapes():
        if not reference:
            return common.make_shapes(batch * 8, 'bench')
        params = common.shape_parameters(batch * 8, torch.Generator().manual_seed(0))
        for i in range(batch * 8):
            drawn = common.render_shapes({k: v[i : i + 1] for k, v in params.items()})
            noise = common.SHAPES['noise'] * torch.randn(drawn['image'].shape)
            ((drawn['image'] + noise).clamp(0, 1) * 255).round().byte()

    run = dict(pgd=attack, train=train, evaluate=evaluate, apgd=apgd, square=square, shapes=shapes)[what]

    def once():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            run()

    return once


def matmul(variant, device):
    """A function that multiplies two matrices, on a GPU many times, so that it takes a while."""
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(variant, torch.float32)
    a, b = (torch.rand(SIDE, SIDE, device=device).to(dtype) for _ in range(2))

    def once():
        for _ in range(100 if device.type == 'cuda' else 1):
            a @ b

    return once


def prepare(name, options, device):
    """(the job, which has run once at a small size; memory in MiB that does not count)."""
    what, variant = name.split()
    small = argparse.Namespace(
        **vars(options) | dict(batch=min(options.batch, 8), steps=2, samples=200, units=64, latent=2)
    )

    def make(o):
        if what == 'matmul':
            return matmul(variant, device)
        if what.startswith('mi'):
            return information(what, variant, o.samples, o.units, o.classes, device)
        return tangent(variant, o, device) if what == 'tangent' else job(name, o, device)

    if variant == 'compiled':  # which it does for the size that is timed
        once = make(options)
        once()
        return once, 0
    make(small)()
    once = make(options)
    return once, peak(device) if what.startswith('mi') else 0


def peak(device):
    """MiB so far."""
    return (
        torch.cuda.max_memory_allocated() / 2**20
        if device.type == 'cuda'
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )


def worker(options):
    """One row: time the job on demand, one line of JSON per line read."""
    device = common.pick_device('auto')
    once, before = prepare(options.worker, options, device)
    print('ready', flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        found = once()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(json.dumps((seconds, peak(device) - before, found)), flush=True)


def measure(jobs, repeats, arch):
    """{key: (median seconds, peak MiB, what the job returned)}, the jobs taking turns.

    jobs: {key: (name, {size: value})}.
    """
    workers, results = {}, {key: [] for key in jobs}
    for key, (name, sizes) in jobs.items():
        flags = [str(v) for size, value in sizes.items() for v in ('--' + size, value)]
        workers[key] = subprocess.Popen(
            [sys.executable, __file__, '--worker', name, '--arch', arch, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    for process in workers.values():
        process.stdout.readline()  # ready
    for _ in range(repeats):
        for key, process in workers.items():
            process.stdin.write('go\n')
            process.stdin.flush()
            results[key].append(json.loads(process.stdout.readline()))
    for process in workers.values():
        process.stdin.close()
        process.wait()
    return {
        key: (sorted(r[0] for r in rows)[len(rows) // 2], max(r[1] for r in rows), rows[0][2])
        for key, rows in results.items()
    }


def needed(name, options):
    """Floating-point operations that a job needs, whatever it does; 0 where nobody counts."""
    what = name.split()[0]
    if what == 'matmul':
        return 2 * SIDE**3 * (100 if torch.cuda.is_available() else 1)
    if what not in ('pgd', 'train'):
        return 0
    model = common.make_model(options.arch, options.classes)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, 32, 32))
    return counter.get_total_flops() * options.batch * (2 * options.steps + 3 * (what == 'train'))


def costs(jobs, options):
    """The first table: every variant of every job, as rows for bench.json."""
    sizes = {size: getattr(options, size) for size in SMALL}
    table, rows = {}, []
    for what, variants in jobs.items():
        names = [f'{what} {v}' for v in variants]
        table |= measure({n: (n, sizes) for n in names}, options.repeats, options.arch)
    print(f"{'job':<18}{'seconds':>9}{'items/s':>10}{'MiB':>8}{'x plain':>9}{'x library':>11}{'of peak':>9}")
    rate = {n: needed(n, options) / seconds for n, (seconds, *_) in table.items()}
    precision = 'fp32'
    for name, (seconds, memory, found) in table.items():
        what, variant = name.split()
        precision = variant if variant in ('fp32', 'bf16', 'fp16') else precision
        reference = 'fp32' if variant in ('plain', 'library') else precision
        share = rate[name] / rate[f'matmul {reference}'] if rate[name] and 'matmul fp32' in rate else None
        items = {'matmul': 1, 'shapes': 8 * options.batch, 'mi': options.samples, 'mi-near': options.samples}.get(
            what, options.batch
        )
        gains = [table[f'{what} {r}'][0] / seconds if f'{what} {r}' in table else None for r in ('plain', 'library')]
        exact = table.get(f'{what} library', table.get(f'{what} plain', (None,) * 3))[2]
        error = max(abs(a - b) for a, b in zip(found, exact)) if found and exact else None
        rows.append(
            dict(
                job=name,
                seconds=seconds,
                memory_mib=memory,
                error=error,
                items_per_second=items / seconds,
                times_plain=gains[0],
                times_library=gains[1],
                operations_per_second=rate[name],
                share_of_matmul=share,
            )
        )
        text = ''.join(f'{g:>{w}.2f}' if g else ' ' * w for g, w in zip(gains, (9, 11)))
        print(
            f'{name:<18}{seconds:>9.3f}{items / seconds:>10.1f}{memory:>8.0f}{text}'
            + (f'{share:>9.0%}' if share else '')
            + (f'   differs from the reference by {error:.1g}' if error is not None else '')
        )
    return rows


def growth(jobs, options):
    """The second table: what doubling one size does to our code."""
    rows = []
    print(f"\n{'doubled':<24}{'from':>7}{'seconds':>9}{'x time':>8}{'MiB':>8}{'x memory':>10}")
    for what, (variant, doubled) in jobs.items():
        sizes = {'': SMALL} | {size: SMALL | {size: 2 * SMALL[size]} for size in doubled}
        found = measure({k: (f'{what} {variant}', v) for k, v in sizes.items()}, max(options.repeats, 3), options.arch)
        seconds, memory, *_ = found.pop('')
        for size, (more, larger, *_) in found.items():
            rows.append(
                dict(
                    job=f'{what} {variant}',
                    doubled=size,
                    size=SMALL[size],
                    seconds=seconds,
                    times=more / seconds,
                    memory_mib=memory,
                    times_memory=larger / memory if memory >= 1 else None,  # less hides in earlier peaks
                )
            )
            print(
                f'{what + " " + variant + ", " + size:<24}{SMALL[size]:>7}{seconds:>9.3f}'
                f'{more / seconds:>8.2f}{memory:>8.0f}' + (f'{rows[-1]["times_memory"]:>10.2f}' if memory >= 1 else '')
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='resnet18')
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--steps', type=int, default=10, help='square has ten times as many queries')
    parser.add_argument('--classes', type=int, default=10)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--samples', type=int, default=5000, help='N of mi')
    parser.add_argument('--units', type=int, default=16384, help='D of mi')
    parser.add_argument('--latent', type=int, default=16, help='inputs of the decoder of tangent')
    parser.add_argument('--only', nargs='+', help='of matmul pgd train evaluate apgd square shapes tangent mi mi-near')
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--no-growth', action='store_true', help='the first table alone')
    parser.add_argument('--out', default='bench.json')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    if options.quick:
        vars(options).update(SMALL)
    device = common.pick_device('auto')
    low = {torch.bfloat16: 'bf16', torch.float16: 'fp16'}.get(common.pick_precision(device))
    ours, both = ['fp32'] + ([low] if low else []), ['plain', 'library']
    network, images = ['batch', 'steps', 'classes'], ['batch', 'steps']
    jobs = dict(
        matmul=ours,
        pgd=both + ours + ['unfolded', 'nchw', 'compiled'],
        train=both + ours + ['cifs'],
        evaluate=['library', 'keep', 'fp32'],
        apgd=['plain', 'fp32'],
        square=['plain', 'fp32'],
        shapes=['plain', 'fp32'],
        tangent=['plain', 'ours'],
        mi=both + ['ours'],
    )
    jobs['mi-near'] = both + ['ours']
    doubled = dict(
        pgd=(ours[-1], network),
        train=(ours[-1], images),
        evaluate=('fp32', images),
        apgd=('fp32', network),
        square=('fp32', network),
        shapes=('fp32', ['batch']),
        tangent=('ours', ['batch', 'latent']),
        mi=('ours', ['samples', 'units', 'classes']),
    )
    doubled['mi-near'] = doubled['mi']
    chosen = set(options.only or jobs)
    if 'tangent' in chosen and not importlib.util.find_spec('dimpled_manifold'):
        print('tangent: skipped, there is no dimpled_manifold.py here')
        chosen.remove('tangent')
    print(
        f'\n{options.arch}, batch {options.batch}, {options.steps} steps, {device.type}, '
        f'{torch.get_num_threads()} threads, torch {torch.__version__}, '
        f'median of {options.repeats}'
    )
    rows = costs({k: v for k, v in jobs.items() if k in chosen}, options)
    more = [] if options.no_growth else growth({k: v for k, v in doubled.items() if k in chosen}, options)
    common.write_json(
        options.out,
        dict(
            options=vars(options),
            device=device.type,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            rows=rows,
            growth=more,
        ),
    )


if __name__ == '__main__':
    main()
