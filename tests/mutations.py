"""Do the tests notice? Each row breaks a copy of the repository and runs one test file on it.

    python tests/mutations.py            all rows; prints which were caught, exit 1 below 95 %
    python tests/mutations.py apgd mask  the rows whose description holds one of the words
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = (  # what, file, what stands there once, what then stands there, tests/test_<this>.py
    ('PGD walks downhill', 'common.py', 'x_adv[todo] + step_size',
     'x_adv[todo] - step_size', 'attacks'),
    ('attacks leave the model in eval mode', 'common.py', 'm.training = True',
     'm.training = False', 'attacks'),
    ('the l2 ball is a cube', 'common.py', "if norm == 'linf':\n        return torch.clamp(x_adv",
     'if True:\n        return torch.clamp(x_adv', 'attacks'),
    ('APGD never halves its step', 'common.py', 'torch.where(halve, step / 2',
     'torch.where(halve, step / 1', 'attacks'),
    ('later attacks are not cumulative', 'common.py', "rows = left if name in", "rows = ~left | "
     "left if name in", 'attacks'),
    ('TRADES maximises nothing', 'common.py', 'loss=lambda output, y: kl(output, natural)',
     'loss=lambda output, y: -kl(output, natural)', 'training'),
    ('continuing forgets the momentum', 'common.py',
     "optimizer.load_state_dict(state['optimizer'])", 'pass', 'training'),
    ('eps is whole from the start', 'common.py', '(progress / warmup - 1 / 3) * 1.5', '1.0',
     'training'),
    ('a class may lose its last image to validation', 'common.py', '(y.bincount(minlength='
     'len(classes)) // 2)', '(y.bincount(minlength=len(classes)))', 'data'),
    ('flips mirror nothing', 'common.py', 'columns.flip(1), columns)', 'columns, columns)', 'data'),
    ('hidden colours of transparent images show', 'common.py', "if 'A' in image.mode or",
     'if', 'data'),
    ('seeds are not resampled', 'common.py', 'rng.integers(s, size=(s, 1))',
     'np.arange(s)[:, None]', 'results'),
    ('masks never use the labels', 'cifs.py', 'if self.training and self.labels is not None:',
     'if False:', 'cifs'),
    ('relevance of a linear probe alone', 'cifs.py', 'SHARPNESS * self.hidden(pooled))) @',
     '0 * self.hidden(pooled))) @', 'cifs'),
    ('the kernel bounds change places', 'mi_analysis.py', 'for c in (8, 2)]', 'for c in (2, 8)]',
     'mi_analysis'),
    ('bins forget the label', 'mi_analysis.py', 'surprise(cell * classes + y)', 'surprise(cell)',
     'mi_analysis'),
    ('decisions by the sum over classes', 'shape_bias.py', 'p[:, group].mean(1)',
     'p[:, group].sum(1)', 'shape_bias'),
    ('images whose cues agree count', 'shape_bias.py', 'conflict = shape != texture',
     'conflict = shape == shape', 'shape_bias'),
    ('levelled by the mean logit', 'logit_distill.py', 'tail.logsumexp(1, keepdim=True) - '
     'math.log(max(tail.shape[1], 1))', 'tail.mean(1, keepdim=True)', 'logit_distill'),
    ('log-odds of all classes', 'logit_distill.py', '(odds - log_odds(t, m))[:, None]',
     'odds[:, None]', 'logit_distill'),
    ('a board without colours', 'dimpled_manifold.py', 'at.sum(1) % 2 * 2 - 1',
     'at.sum(1) * 0 + 1', 'dimpled_manifold'),
    ('the plane through the origin', 'dimpled_manifold.py', '+ OFFSET * frames[:, None, :, 2]',
     '+ 0 * frames[:, None, :, 2]', 'dimpled_manifold'),
)

def caught(what, name, old, new, tests):
    """Whether the tests fail on the broken copy."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(
            '.git', 'runs', 'data', 'docs', '__pycache__'))
        path = Path(folder, name)
        text = path.read_text('utf-8')
        if text.count(old) != 1:
            sys.exit(f'error: {what}: {old!r} stands {text.count(old)} times in {name}')
        path.write_text(text.replace(old, new), 'utf-8')
        run = subprocess.run(
            [sys.executable, '-m', 'pytest', '-qx', '-p', 'no:cacheprovider',
             f'tests/test_{tests}.py'], cwd=folder, capture_output=True,
            env=dict(os.environ, ADVCNN_DATA=os.devnull))
    return run.returncode == 1

if __name__ == '__main__':
    words = sys.argv[1:]
    rows = [row for row in MUTATIONS if not words or any(word in row[0] for word in words)]
    found = []
    for row in rows:
        found.append(caught(*row))
        print('caught ' if found[-1] else 'MISSED ', row[1], row[0], flush=True)
    print(f'{sum(found)} of {len(found)} caught')
    sys.exit(sum(found) < 0.95 * len(found))
