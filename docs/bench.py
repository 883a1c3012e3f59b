"""Speed beside the usual way: python docs/bench.py [attack] [evaluation] [information]

attack       PGD-10 on a training batch of CIFAR's ResNet-18 against the form of most libraries:
             float32, channels first, eval mode, gradient of the input by autograd. In float32 and
             in bfloat16, which is slower where a processor only half supports it.
evaluation   PGD-20 that drops fooled images against PGD-20 on all, when half are lost early.
information  mi_analysis's quantities of a layer of D = 16,384 outputs, N = 5000, with the true and
             three permuted labellings, against one distance matrix; seconds and added memory.
"""
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import mi_analysis

N, D, CLASSES = 5000, 16384, 10

def seconds(function, repeats=2):
    """The fastest of some calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])

def usual_pgd(model, x, y, eps, step_size, steps):
    """PGD as most libraries write it."""
    x_adv = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(x_adv), y)
        gradient, = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv

def bench_attack(batch=32):
    model = common.make_model('resnet18').eval()
    plain = common.make_model('resnet18').to(memory_format=torch.contiguous_format).eval()
    x, y = torch.rand(batch, 3, 32, 32), torch.arange(batch) % 10
    last, threat = x.to(memory_format=torch.channels_last), dict(eps=0.03, step_size=0.01, steps=10)
    usual = seconds(lambda: usual_pgd(plain, x, y, **threat))
    print(f'attack       usual form {usual:7.2f} s')
    for name, context in (('float32', nullcontext()),
                          ('bfloat16', torch.autocast('cpu', torch.bfloat16))):
        with context:
            ours = seconds(lambda: common.pgd(model, last, y, **threat))
        print(f'attack       {name:10} {ours:7.2f} s  {usual / ours:.2f} times as fast')

def bench_evaluation(batch=32):
    model = common.make_model('resnet18').eval()
    x = torch.rand(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    y = common.logits_of(model, x).argmax(1)
    y[::2] = (y[::2] + 1) % 10  # half are wrong at the first look, the others hold out
    threat = dict(eps=1e-6, step_size=1e-7, steps=20)
    full = seconds(lambda: common.pgd(model, x, y, **threat), 1)
    ours = seconds(lambda: common.pgd(model, x, y, **threat, stop=True), 1)
    print(f'evaluation   on all {full:6.2f} s, on survivors {ours:6.2f} s  '
          f'{full / ours:.2f} times as fast')

def layer(kind):
    """(outputs (N, D), labels (4, N)): far from each other (saturated) or near."""
    torch.manual_seed(0)
    t = torch.randn(N, D).mul_(dict(saturated=1.0, near=0.002)[kind])
    labels = torch.arange(N) % CLASSES
    return t, torch.stack([labels] + [labels[torch.randperm(N)] for _ in range(3)])

def direct(t, labels):
    """The same quantities from one matrix of all squared distances in float64."""
    s = torch.cdist(t.double(), t.double()).square_()
    variances = mi_analysis.SHARE * s[:300, :300].median().item(), mi_analysis.VARIANCE
    for scale in [c * v for v in variances for c in (8, 2)]:
        kernel = torch.exp(s / -scale)
        kernel.mean(1).log2()
        for y in labels:
            member = torch.nn.functional.one_hot(y, CLASSES).double()
            (kernel @ member / member.sum(0)).gather(1, y[:, None]).log2()
    (t / 0.5).floor().unique(dim=0, return_inverse=True)

def measure_layer(kind, way):
    """Run in a process of its own, whose peak memory is that of the way."""
    t, labels = layer(kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    direct(t, labels) if way == 'direct' else mi_analysis.information(t, labels, CLASSES)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f'information  {kind:9} {way:6} {time.perf_counter() - start:6.1f} s '
          f'{(after - before) / 1024:6.0f} MB more', flush=True)

def bench_information():
    for kind in ('saturated', 'near'):
        for way in ('direct', 'ours'):
            subprocess.run([sys.executable, __file__, 'layer', kind, way], check=True)

if __name__ == '__main__':
    if sys.argv[1:2] == ['layer']:
        measure_layer(*sys.argv[2:])
    else:
        print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
        for name in sys.argv[1:] or ['attack', 'evaluation', 'information']:
            dict(attack=bench_attack, evaluation=bench_evaluation,
                 information=bench_information)[name]()
