"""Speed beside the usual way: python docs/bench.py [attack] [evaluation] [information]

attack       PGD-10 on a training batch of CIFAR's ResNet-18 against the form of most libraries:
             float32 (on GPUs TF32), channels first, eval mode, gradient by autograd.
evaluation   PGD-20 that drops fooled images against PGD-20 on all, when half are lost early.
information  mi_analysis's quantities of a layer of D = 16,384 outputs, N = 5000, with the true and
             three permuted labellings, against one distance matrix; seconds and added memory.
"""
import resource
import subprocess
import sys
import time
from copy import deepcopy
from itertools import product
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import mi_analysis

N, D, CLASSES = 5000, 16384, 10
DEVICE = common.pick_device()

def seconds(function, calls=3):
    """Mean of some calls after two to warm up."""
    threads = torch.get_num_threads()
    return Timer('f()', globals=dict(f=function), num_threads=threads).timeit(calls).mean

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

def network():
    """(ResNet-18, images with channels last, labels) on a GPU if there is one."""
    n = 128 if DEVICE.type == 'cuda' else 32
    x = torch.rand(n, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    return common.make_model('resnet18').to(DEVICE).eval(), x, torch.arange(n, device=DEVICE) % 10

def bench_attack():
    (model, x, y), threat = network(), dict(eps=0.03, step_size=0.01, steps=10)
    plain, first = deepcopy(model).to(memory_format=torch.contiguous_format), x.contiguous()
    net = common.spread(model, DEVICE)  # as train does
    torch.backends.cudnn.allow_tf32 = True
    usual = seconds(lambda: usual_pgd(plain, first, y, **threat))
    torch.backends.cudnn.allow_tf32 = False
    print(f'attack       usual form     {usual:8.3f} s')
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype != torch.float32):
            ours = seconds(lambda: common.pgd(net, x, y, **threat))
        print(f'attack       {str(dtype):14} {ours:8.3f} s  {usual / ours:.2f} times as fast')

def bench_evaluation():
    model, x, y = network()
    y = common.logits_of(model, x).argmax(1)
    y[::2] = (y[::2] + 1) % 10  # half are wrong at the first look, the others hold out
    threat = dict(eps=1e-6, step_size=1e-7, steps=20)
    full = seconds(lambda: common.pgd(model, x, y, **threat))
    ours = seconds(lambda: common.pgd(model, x, y, **threat, stop=True))
    print(f'evaluation   all {full:.3f} s, survivors {ours:.3f} s  {full / ours:.2f} times as fast')

def layer(kind):
    """(outputs (N, D), labels (4, N)): far from each other (saturated) or near."""
    torch.manual_seed(0)
    t = torch.randn(N, D).mul_(dict(saturated=1.0, near=0.002)[kind])
    labels = torch.arange(N) % CLASSES
    return t, torch.stack([labels] + [labels[torch.randperm(N)] for _ in range(3)])

def direct(t, labels, classes):
    """The same quantities from one matrix of all squared distances in float64."""
    s = torch.cdist(t.double(), t.double()).square_()
    variances = mi_analysis.SHARE * s[:300, :300].median().item(), mi_analysis.VARIANCE
    for scale in [c * v for v in variances for c in (8, 2)]:
        kernel = torch.exp(s / -scale)
        kernel.mean(1).log2()
        for y in labels:
            member = torch.nn.functional.one_hot(y, classes).double()
            (kernel @ member / member.sum(0)).gather(1, y[:, None]).log2()
    (t / 0.5).floor().unique(dim=0, return_inverse=True)

def measure_layer(kind, way):
    """Run in a process of its own, whose peak memory is that of the way."""
    t, labels = layer(kind)
    function = dict(ours=mi_analysis.information, direct=direct)[way]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function(t, labels, CLASSES)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f'information  {kind:9} {way:6} {time.perf_counter() - start:6.1f} s {more:6.0f} MB more')

def bench_information():
    for kind, way in product(('saturated', 'near'), ('direct', 'ours')):
        subprocess.run([sys.executable, __file__, 'layer', kind, way], check=True)

if __name__ == '__main__':
    if sys.argv[1:2] == ['layer']:
        measure_layer(*sys.argv[2:])
    else:
        print(f'torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads', flush=True)
        for name in sys.argv[1:] or ['attack', 'evaluation', 'information']:
            dict(attack=bench_attack, evaluation=bench_evaluation,
                 information=bench_information)[name]()
