"""train_at.py end to end at a tiny size, and what the command line refuses."""
import json
import os
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

import common
import train_at

TINY = ['--train-size', '60', '--test-size', '20', '--epochs', '1', '--apgd-steps', '2',
        '--targets', '1', '--square-queries', '2', '--batch-size', '20']
FIGURES = ['fig1_training', 'fig2_attacks', 'fig3_eps', 'fig4_perturbations',
           'fig5_loss_surface', 'fig6_gradients', 'fig7_classes']


def test_a_tiny_study_leaves_everything_and_is_not_repeated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, 'FIGURE_FORMATS', ('.png', '.pdf'))
    command = TINY + ['--out', str(tmp_path)]
    train_at.main(command)
    printed = capsys.readouterr().out
    [folder] = (tmp_path / 'train_at').iterdir()
    for figure in FIGURES:
        assert (folder / f'{figure}.png').stat().st_size > 1000
        assert (folder / f'{figure}.pdf').read_bytes().startswith(b'%PDF')
    results = json.loads((folder / 'results.json').read_text())
    for method in ('standard', 'fgsm', 'pgd', 'trades'):
        run = results[f'{method}-s0']
        correct = {k: common.unpack(v) for k, v in run['correct'].items()}
        assert list(correct) == ['natural', 'fgsm', 'pgd20', 'pgd100', 'apgd_ce', 'apgd_t',
                                 'square', 'worst']
        assert all(len(v) == 20 for v in correct.values())
        for name in correct:  # the worst case is the worst for every image
            assert (correct['worst'] <= correct[name]).all()
        assert len(run['history']) == 1
    table = (folder / 'claims.md').read_text().splitlines()
    assert table[0] == '| claim | source | measured | reference | verdict |'
    assert len(table) >= 2 + 12
    rows = (folder / 'metrics.csv').read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith('method,seed,epoch,lr,eps,loss,')
    assert 'worst case' in printed and 'Madry' in printed
    assert json.loads((folder / 'config.json').read_text())['epochs'] == 1
    assert (folder / 'log.txt').stat().st_size > 1000

    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / 'models').iterdir()}
    results_stamp = (folder / 'results.json').stat().st_mtime_ns
    (folder / 'fig3_eps.png').unlink()
    train_at.main(command)
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / 'models').iterdir()}
    assert results_stamp == (folder / 'results.json').stat().st_mtime_ns
    assert (folder / 'fig3_eps.png').exists()
    claims = (folder / 'claims.md').read_text()
    assert claims.splitlines() == table

    moved = tmp_path / 'elsewhere'  # figures and claims from results.json alone
    moved.mkdir()
    (moved / 'results.json').write_text((folder / 'results.json').read_text())
    train_at.main(['--plot-only', str(moved)])
    assert (moved / 'fig7_classes.png').exists()
    assert (moved / 'claims.md').read_text() == claims


def test_l2_and_a_choice_of_methods(tmp_path):
    train_at.main(TINY + ['--out', str(tmp_path), '--norm', 'l2', '--eps', '0.5',
                          '--step-size', '0.2', '--methods', 'mart', '--seeds', '0', '1'])
    [folder] = (tmp_path / 'train_at').iterdir()
    results = json.loads((folder / 'results.json').read_text())
    assert 'mart-s0' in results and 'mart-s1' in results and 'pgd-s0' not in results
    assert 'square' not in results['mart-s0']['correct']  # linf only


@pytest.mark.parametrize('flags,message', (
    (['--eps', '8'], 'did you mean 8/255'),
    (['--eps=-1/255'], 'finite number'),
    (['--eps', '0'], '0 is not allowed'),
    (['--eps', 'nan'], 'finite number'),
    (['--eps', '8/0'], 'not a number'),
    (['--eps', 'eight'], 'not a number'),
    (['--step-size', '2'], 'did you mean 2/255'),
    (['--epochs', '0'], 'whole number'),
    (['--epochs', '1.5'], 'whole number'),
    (['--batch-size', '-4'], 'whole number'),
    (['--lr', '0'], '0 is not allowed'),
    (['--seeds', '0', '0'], 'differ'),
    (['--ema', '1'], '[0, 1)'),
    (['--dataset', 'cifar'], "unknown data set 'cifar'"),
    (['--dataset', 'folder:/nowhere'], 'train/ and test/'),
    (['--dataset', 'mnist', '--image-size', '64'], '--image-size'),
    (['--arch', 'vgg'], 'invalid choice'),
    (['--arch', 'wrn-28-10', '--image-size', '16'], '32 pixels'),
    (['--methods', 'free'], 'invalid choice'),
    (['--epoch', '3'], 'unrecognized'),
    (['--device', 'cuda'], 'no CUDA device'),
    (['--amp', 'fp16', '--device', 'cpu'], 'needs a CUDA device'),
    (['--plot-only', '/nowhere'], 'no readable results.json'),
    (['--train-size', '9', '--test-size', '0', '--batch-size', '4', '--out', '/dev/null/x'],
     'Not a directory')))
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    if '--out' not in flags:
        flags = flags + ['--out', str(tmp_path / 'runs')]
    with pytest.raises(SystemExit) as exit_:
        common.entry(lambda: train_at.main(flags))
    stderr = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in stderr and stderr.startswith('error: ') and stderr.count('\n') == 1


def test_eps_is_read_as_a_fraction_or_a_number():
    assert common.number('8/255') == 8 / 255 and common.number('0.031') == 0.031


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """A limit on the size of files stands in for the full disk."""
    limit = 200_000

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, str(ROOT / 'train_at.py'), *TINY, '--methods', 'standard',
               '--out', str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files,
                         env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith('error: ') and run.stderr.count('\n') == 1
    assert list((tmp_path / 'models').iterdir()) == []  # no half-written checkpoint


def test_help_fits_and_shows_the_defaults(capsys):
    with pytest.raises(SystemExit) as exit_:
        train_at.main(['--help'])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert 'resnet18' in text and '8/255' in text and 'svhn' in text
    assert max(map(len, text.splitlines())) <= 115
