"""train_at.py end to end at a tiny size."""

import json

import pytest

import common
import train_at

TINY = (
    '--arch lenet5 --train-size 60 --test-size 20 --epochs 1 --apgd-steps 2 --targets 1 --square-queries 2 '
    '--batch-size 20'
).split()
FIGURES = [
    'fig1_training',
    'fig2_attacks',
    'fig3_eps',
    'fig4_perturbations',
    'fig5_loss_surface',
    'fig6_gradients',
    'fig7_classes',
]


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
        assert list(correct) == ['natural', 'fgsm', 'pgd20', 'pgd100', 'apgd_ce', 'apgd_t', 'square', 'worst']
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
    train_at.main(
        TINY
        + [
            '--out',
            str(tmp_path),
            '--norm',
            'l2',
            '--eps',
            '0.5',
            '--step-size',
            '0.2',
            '--methods',
            'mart',
            '--seeds',
            '0',
            '1',
        ]
    )
    [folder] = (tmp_path / 'train_at').iterdir()
    results = json.loads((folder / 'results.json').read_text())
    assert 'mart-s0' in results and 'mart-s1' in results and 'pgd-s0' not in results
    assert 'square' not in results['mart-s0']['correct']  # linf only


def test_eps_is_read_as_a_fraction_or_a_number():
    assert common.number('8/255') == 8 / 255 and common.number('0.031') == 0.031


def test_help_fits_and_shows_the_defaults(capsys):
    with pytest.raises(SystemExit) as exit_:
        train_at.main(['--help'])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert 'resnet18' in text and '8/255' in text and 'svhn' in text
    assert max(map(len, text.splitlines())) <= 115
