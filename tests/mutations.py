"""Does the test suite notice when the code is wrong? Break one fact at a time and see.

Usage    python tests/mutations.py            all of them, about twenty minutes
         python tests/mutations.py 3 7        those two
Each mutation changes a line of a copy of the repository and runs the tests of that part; it is
caught when they fail. The table below is what docs/testing.md reports.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# what is broken, file, before, after, tests
MUTATIONS = (
    ('PGD steps downhill', 'common.py', 'x_adv + step_size * _steepest', 'x_adv - step_size * _steepest', 'attacks'),
    (
        'no clamp to [0, 1] after projection',
        'common.py',
        'torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)',
        'torch.maximum(x_adv, x - eps), x + eps)',
        'attacks',
    ),
    ('attacks run in train mode', 'common.py', 'm.training = False', 'm.training = m.training', 'attacks'),
    (
        'the random start leaves the ball',
        'common.py',
        'return (x + eps * noise).clamp(0, 1)',
        'return (x + 2 * eps * noise).clamp(0, 1)',
        'attacks',
    ),
    (
        'the margin counts the true class among the others',
        'common.py',
        'other = logits.scatter(1, y[:, None], -math.inf)',
        'other = logits',
        'attacks',
    ),
    ('APGD starts with half of its step', 'common.py', '2.0 * eps, device', '1.0 * eps, device', 'attacks'),
    (
        'Square accepts what is worse',
        'common.py',
        'better = value < worst[todo]',
        'better = value > worst[todo]',
        'attacks',
    ),
    ('l2 noise is uniform in the radius', 'common.py', 'radius ** (1 / x[0].numel())', 'radius', 'attacks'),
    (
        'TRADES: KL the wrong way round',
        'common.py',
        'beta * kl_divergence(logits_adv, logits)',
        'beta * kl_divergence(logits, logits_adv)',
        'training',
    ),
    (
        'MART weighs by p_y instead of 1 - p_y',
        'common.py',
        '((1 - true) * kl_divergence',
        '(true * kl_divergence',
        'training',
    ),
    ('resume forgets the momentum', 'common.py', "(optimizer, 'optimizer'), ", '', 'hardening'),
    (
        'validation images are trained on',
        'common.py',
        'order[val_size : val_size + train_size]',
        'order[:train_size]',
        'data',
    ),
    ('flips mirror nothing', 'common.py', 'columns.flip(1), columns)', 'columns, columns)', 'data'),
    (
        'images and seeds are not resampled together',
        'common.py',
        '*(a[np.ix_(s, i)] for a in arrays)',
        '*(a[np.ix_(s, rng.integers(images, size=images))] for a in arrays)',
        'training',
    ),
    (
        'cue conflicts hold images without a conflict',
        'common.py',
        'return (i + 1 + i // 10 % 9) % 10',
        'return (i + i // 10 % 9) % 10',
        'data',
    ),
    ('one process counts its gradients twice', 'common.py', 'flat /= processes()', 'flat /= 1', 'distributed'),
    ('CIFS: top k off by one', 'cifs.py', 'ranked = p.topk(k, 1).indices', 'ranked = p.topk(k + 1, 1).indices', 'cifs'),
    ('CIFS: the label is ranked twice', 'cifs.py', 'ranked[:, 1:]), 1)', 'ranked[:, :-1]), 1)', 'cifs'),
    ('nats for bits', 'mi_analysis.py', "'': -(total / n).log2()", "'': -(total / n).log()", 'mi_analysis'),
    ('the lower bound with the kernel of the upper', 'mi_analysis.py', "'lower': 8", "'lower': 4", 'mi_analysis'),
    ('information given the label, divided by N', 'mi_analysis.py', '/ size[p, y]', '/ n', 'mi_analysis'),
    (
        'shape bias over all conflicts',
        'shape_bias.py',
        'return by_shape / (by_shape + by_texture) if',
        'return by_shape / (1 + by_texture) if',
        'shape_bias',
    ),
    (
        'distillation without T squared',
        'logit_distill.py',
        'return temperature**2 * ',
        'return temperature * ',
        'logit_distill',
    ),
    (
        'M4 keeps the arithmetic mean',
        'logit_distill.py',
        'tail.logsumexp(1, keepdim=True) - math.log(tail.shape[1])',
        'tail.mean(1, keepdim=True)',
        'logit_distill',
    ),
    (
        'the manifold is attacked off itself',
        'dimpled_manifold.py',
        'lambda v: (v[:, None] @ basis @ basis.mT)[:, 0]',
        'lambda v: v - (v[:, None] @ basis @ basis.mT)[:, 0]',
        'dimpled_manifold',
    ),
)


def run(mutation, folder):
    """'caught', 'MISSED' or 'no such line', and the first test that failed."""
    _, name, before, after, tests = mutation
    path = folder / name
    text = path.read_text()
    if before not in text:
        return 'no such line', ''
    path.write_text(text.replace(before, after))
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', f'tests/test_{tests}.py']
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    path.write_text(text)
    failed = [
        line.split(' - ')[0].split('::')[-1]
        for line in done.stdout.splitlines()
        if line.startswith(('FAILED', 'ERROR'))
    ]
    return ('caught' if done.returncode == 1 else 'MISSED'), ', '.join(failed)


def main():
    chosen = [int(a) for a in sys.argv[1:]] or range(1, len(MUTATIONS) + 1)
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, 'repository')
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns('.git', 'runs', 'data', '__pycache__'))
        os.environ['OMP_NUM_THREADS'] = '1'
        print('| | what is broken | file | verdict | by |\n|---|---|---|---|---|', flush=True)
        for number in chosen:
            verdict, by = run(MUTATIONS[number - 1], folder)
            missed += verdict != 'caught'
            print(
                f'| {number} | {MUTATIONS[number - 1][0]} | {MUTATIONS[number - 1][1]} | {verdict} | {by} |', flush=True
            )
    print(f'\n{len(chosen) - missed} of {len(chosen)} caught')


if __name__ == '__main__':
    main()
