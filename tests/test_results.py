"""Intervals, verdicts and the files that a run leaves."""
import json
from pathlib import Path

import numpy as np
import pytest

import common
from common import Claim

RUN = dict(config=dict(seeds=[0]), runs={'pgd': {'s0': dict(
    correct=dict(worst=np.array([True, False]), none=np.zeros((0, 3))), labels=np.array([3, 1]),
    gap=np.array([0.1, np.nan], np.float32), epoch=np.int64(7), text='é', history=[dict(a=1)]),
    's1': dict(gap=np.array([5.0]))}})

@pytest.mark.parametrize('seeds, of_seeds, of_images', ((0, 0, 0.5), (20, 1, 0.1), (20, 0.1, 1)))
def test_bootstrap_intervals_cover_the_truth(seeds, of_seeds, of_images, n=60):
    """Images are the same for all seeds: neither seeds nor images alone tell how sure we are."""
    rng, inside = np.random.default_rng(1), []
    for _ in range(200):
        effect = 0.3 + of_images * rng.normal(size=n)
        if seeds:
            effect = effect + of_seeds * rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, n))
        mean, low, high = common.bootstrap(effect, draws=200)
        inside.append(low < 0.3 < high and mean == pytest.approx(effect.mean()))
    assert 0.9 < np.mean(inside) < 0.99

@pytest.mark.parametrize('verdict, claim', (
    ('supported', Claim('a|b', 'x', np.full(9, 0.3), above=0.2)),
    ('contradicted', Claim('a', 'x', np.full((2, 9), 0.1), above=0.2)),
    ('inconclusive', Claim('a', 'x', np.array([-1.0, 1, 0, -0.5]))),
    ('uninformative: near', Claim('a', 'x', np.ones(9), unless='near')),
    ('supported', Claim('a', 'x', 2.0, above=1, interval=(1.1, 3))),
    ('contradicted', Claim('a', 'x', 0.5, above=1, interval=(0.1, 0.9))),
    ('inconclusive', Claim('a', 'x', 2.0, above=1, interval=(1, 3)))))
def test_judge_writes_its_verdict(verdict, claim, tmp_path):
    for seeds in ([0], [0, 1]):
        common.judge([claim], dict(config=dict(seeds=seeds)), tmp_path)
        row, = json.loads((tmp_path / 'results.json').read_text('utf-8'))['claims']
        head, _, line, *rest = (tmp_path / 'claims.md').read_text('utf-8').splitlines()
        assert row['verdict'] == verdict and f'{np.mean(claim.effect):+.3f}' in row['measured']
        assert head.count('|') == line.count('|') and line.endswith(f'| {verdict} |')
        assert any(text.startswith('One seed') for text in rest) == (len(seeds) == 1)

def test_results_come_back_as_they_were(tmp_path):
    common.save_results(RUN, tmp_path)
    found = common.load_results(tmp_path)
    np.testing.assert_equal(found, RUN)
    run = found['runs']['pgd']['s0']
    kinds = [v.dtype for v in (run['gap'], run['correct']['worst'], run['labels'])]
    assert kinds == [np.float32, bool, int] and run['correct']['none'].shape == (0, 3)
    assert json.loads((tmp_path / 'results.json').read_text('utf-8'))['config'] == RUN['config']

@pytest.mark.parametrize('name', ('results.npz', 'results.json'))
def test_damaged_results_are_measured_again(name, tmp_path, caplog):
    assert common.load_results(tmp_path) == {} and not caplog.text  # nothing there: no complaint
    common.save_results(RUN, tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    assert common.load_results(tmp_path) == {} and 'measuring again' in caplog.text

def test_measure_saves_at_once_and_calls_once(tmp_path):
    results, keys = {}, ('runs', 'pgd', 's0')
    assert common.measure(results, keys, lambda: 0.5, tmp_path) == 0.5
    assert common.load_results(tmp_path) == results == dict(runs=dict(pgd=dict(s0=0.5)))
    assert common.measure(results, keys, lambda: 1 / 0, tmp_path) == 0.5

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write, path = Path.write_bytes, tmp_path / 'new' / 'a.json'
    common.save(path, 'é')
    monkeypatch.setattr(Path, 'write_bytes', lambda self, data: write(self, data[:1]) and 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a disk that is full after one byte
        common.save(path, 'new')
    assert path.read_bytes() == 'é'.encode()

def test_stack_puts_seeds_in_front_and_knows_chance():
    run = dict(correct=dict(natural=np.array([1, 0, 1])), seconds=2.5, history=[1], name='a')
    found = common.stack(dict(s0=run, s1=run | dict(seconds=3)))
    assert found.keys() == {'correct', 'seconds'} and found['seconds'].tolist() == [2.5, 3]
    assert found['correct']['natural'].tolist() == [[1, 0, 1], [1, 0, 1]]
    y = np.array([0, 0, 0, 0, 1, 1, 2, 3, 4, 5])  # the commonest class alone gives 0.4
    natural = np.arange(10) < np.array([[9], [4]])
    assert common.near_chance(natural[:1], y) == '' != common.near_chance(natural, y)
    assert common.near_chance(natural[:1], y // 3) == ''  # two classes, 0.7 and 0.3

def test_masking_claim_names_symptoms_above_their_thresholds(tmp_path):
    limits = {name: np.array([0.0, limit]) for name, limit in common.MASKING.items()}
    claims = [common.masking_claim('PGD-AT', limits | worse)
              for worse in ({}, {'zero gradients': np.array([0, 0.06])})]
    common.judge(claims, results := dict(config=dict(seeds=[0, 1])), tmp_path)
    assert [row['verdict'] for row in results['claims']] == ['supported', 'contradicted']
    assert 'but' not in claims[0].text and claims[1].text.endswith('gradients, but: zero gradients')
