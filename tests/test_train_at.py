"""The verdicts of train_at.py on made-up accuracies."""
import numpy as np
import pytest

import common
import train_at

N = 300
LABELS = np.arange(N) % 3

def share(accuracy):
    """(N,) of which a share is right, the same in every class."""
    return np.arange(N) // 3 < round(accuracy * N / 3)

def run(natural, worst, last=0.0, fgsm=0.0, alignment=0.1, best=3):
    """What a method left: accuracies, after the last epoch `last` and `fgsm` under attack."""
    correct = dict(natural=share(natural), pgd=share(worst), worst=share(worst))
    return dict(s0=dict(
        history=[], best_epoch=best, correct=correct, alignment=np.full(N, alignment),
        correct_last=correct | dict(pgd=share(last), fgsm=share(fgsm)),
        masking={symptom: 0.0 for symptom in common.MASKING}))

def verdicts(tmp_path, **runs):
    results = dict(config=dict(seeds=[0], epochs=5), classes=list('abc'), labels=LABELS, runs=runs)
    common.judge(train_at.claims(results), results, tmp_path)
    return [row['verdict'].partition(':')[0] for row in results['claims']
            if 'masked' not in row['claim']]

def test_verdicts(tmp_path):
    wide = run(0.8, 0.5, last=0.4, fgsm=0.8, alignment=0.3)
    wide['s0']['correct']['worst'] = share(0.5) | (LABELS == 1)  # the easiest class
    found = verdicts(tmp_path, standard=run(0.9, 0.0), pgd=wide, fgsm=wide,
                     trades=run(0.7, 0.95))
    assert found == 9 * ['supported']
    found = verdicts(tmp_path, standard=run(0.7, 0.6, alignment=0.4), pgd=run(0.9, 0.5, last=0.6),
                     fgsm=run(0.8, 0.5), trades=run(0.95, 0.4))
    assert found == 9 * ['contradicted']

def test_verdicts_that_say_nothing(tmp_path):
    chance = run(0.35, 0.3)
    found = verdicts(tmp_path, standard=chance, pgd=chance, fgsm=chance, trades=chance)
    assert found == 9 * ['uninformative']
    full = run(1.0, 0.5, best=5)  # the last epoch
    found = verdicts(tmp_path, standard=run(1.0, 0.0), pgd=full, trades=full)
    assert [i for i, verdict in enumerate(found) if verdict == 'uninformative'] == [1, 4, 6]

@pytest.mark.parametrize('y', (np.zeros(9, int), np.arange(9)))
def test_classes_without_two_images_say_nothing(y):
    claim = train_at.class_claim(np.ones((1, 9)), y, list('abcdefghi'), '')
    assert claim.unless.startswith('fewer than two classes')
