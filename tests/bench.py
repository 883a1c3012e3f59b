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
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cifs  # noqa: E402
import common  # noqa: E402

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
    once = job(options.worker, options.arch, options.batch, options.steps, device)
    small = job(options.worker, options.arch, min(options.batch, 8), 1, device)
    small()  # warm up without the cost of a whole run
    for _ in sys.stdin:
        start = time.perf_counter()
        once()
        seconds = time.perf_counter() - start
        memory = torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == 'cuda' else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps((seconds, memory)), flush=True)


def measure(names, options):
    """{name: (median seconds, peak MiB)}, the variants taking turns."""
    workers = {}
    for name in names:
        workers[name] = subprocess.Popen(
            [sys.executable, __file__, '--worker', name, '--arch', options.arch, '--batch',
             str(options.batch), '--steps', str(options.steps)],
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
    return {name: (sorted(r[0] for r in rows)[len(rows) // 2], max(r[1] for r in rows))
            for name, rows in results.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='resnet18')
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--out', default='bench.json')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.batch, options.steps = 16, 2
    if options.worker:
        return worker(options)
    device = common.pick_device('auto')
    low = {torch.bfloat16: 'bf16', torch.float16: 'fp16'}.get(common.pick_precision(device))
    ours = ['fp32'] + ([low] if low else [])
    table, rows = {}, []
    for what, references in (('pgd', ['plain', 'library']), ('train', ['plain', 'library']),
                             ('shapes', [])):
        variants = [f'{what} {v}' for v in references + (ours if references else ['fp32'])]
        variants += ['train cifs'] * (what == 'train')
        table |= measure(variants, options)
    images = {'pgd': options.batch, 'train': options.batch, 'shapes': 8 * options.batch}
    print(f'\n{options.arch}, batch {options.batch}, {options.steps} steps, {device.type}, '
          f'{torch.get_num_threads()} threads, torch {torch.__version__}, '
          f'median of {options.repeats}')
    print(f"{'job':<16}{'seconds':>9}{'images/s':>10}{'MiB':>8}{'x plain':>9}{'x library':>11}")
    for name, (seconds, memory) in table.items():
        what = name.split()[0]
        gains = [table[f'{what} {r}'][0] / seconds if f'{what} {r}' in table else float('nan')
                 for r in ('plain', 'library')]
        rows.append(dict(job=name, seconds=seconds, memory_mib=memory,
                         images_per_second=images[what] / seconds, times_plain=gains[0],
                         times_library=gains[1]))
        print(f'{name:<16}{seconds:>9.3f}{images[what] / seconds:>10.1f}{memory:>8.0f}'
              f'{gains[0]:>9.2f}{gains[1]:>11.2f}')
    common.write_json(options.out, dict(options=vars(options), device=device.type,
                                        threads=torch.get_num_threads(),
                                        torch=torch.__version__, rows=rows))


if __name__ == '__main__':
    main()
