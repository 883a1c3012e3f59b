"""dimpled_manifold.py against closed forms, its verdicts on made-up arrays, and a tiny run."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import dimpled_manifold as dm

TINY = ['--train-size', '100', '--test-size', '20', '--epochs', '2', '--ae-epochs', '1',
        '--latent', '3', '--images', '4', '--attack-steps', '2', '--replicas', '2',
        '--point-steps', '4', '--wrong-steps', '1', '--steps', '1']

# ------------------------------------------------------------------------------------- Points

def test_chessboard_lies_on_a_plane_with_neighbours_one_apart():
    x, y, frames = dm.chessboard(7, range(3))
    assert x.shape == (3, 25, 7) and torch.equal(y.unique(), torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(frames.mT @ frames, torch.eye(3).expand(3, 3, 3))
    torch.testing.assert_close((x @ frames[..., 2:])[..., 0], torch.full((3, 25), dm.OFFSET))
    gaps = torch.cdist(x, x)
    near = (gaps - 1).abs() < 1e-4
    assert near.sum().item() == 3 * 80  # 40 pairs of neighbours, of opposite labels
    assert ((y[:, None] * y == -1) | ~near).all()
    assert gaps[gaps > 1e-2].min() > 0.999

def test_nets_start_as_pytorch_does_and_compute_what_their_layers_say():
    nets = dm.make_nets(6, (0, 4))
    x = torch.randn(2, 5, 6)
    hidden = x[1]
    for i in (0, 2, 4):
        hidden = F.linear(hidden.relu() if i else hidden, nets[i][1].T, nets[i + 1][1, 0])
    torch.testing.assert_close(dm.scores(nets, x)[1], hidden[:, 0])
    for weight, bias in zip(nets[::2], nets[1::2]):  # uniform within +-1 / sqrt(inputs)
        bound = weight.shape[1] ** -0.5
        assert 0.9 * bound < weight.abs().max() <= bound and bias.abs().max() <= bound
    assert torch.equal(dm.make_nets(6, (4,))[0][0], nets[0][1])

def flat_boundary(frames, height):
    """Networks whose score is the height above the plane minus `height`: relu(a) - relu(-a) = a."""
    s, n, _ = frames.shape
    nets = [torch.zeros(s, *shape) for shape in ((n, 2), (1, 2), (2, 2), (1, 2), (2, 1), (1, 1))]
    nets[0][:, :, 0], nets[0][:, :, 1] = frames[..., 2], -frames[..., 2]
    nets[1][..., 0], nets[1][..., 1] = -(dm.OFFSET + height), dm.OFFSET + height
    nets[2][:] = torch.eye(2)
    nets[4][:, 0], nets[4][:, 1] = 1, -1
    return nets

@pytest.mark.parametrize('height, crossed', [(0.3, 1), (-1.2, 1), (5.0, 0)])
def test_probe_measures_a_boundary_parallel_to_the_plane(height, crossed):
    x, y, frames = dm.chessboard(5, range(2))
    found = dm.probe(flat_boundary(frames, height), x, y, frames)
    np.testing.assert_allclose(found['distance'], abs(height) / 0.5, rtol=1e-4)
    np.testing.assert_allclose(found['share'], 1, rtol=1e-5)
    assert (found['crossings'] == crossed).all() and found['height'].shape == (2, 9, 9)
    np.testing.assert_allclose(found['height'], min(height, dm.REACH) / 0.5, rtol=1e-3)

def test_adversarial_training_starts_from_the_same_network():
    args = common.parse(common.make_parser('', dm.DEFAULTS, []), [])
    args.replicas, args.point_steps = 2, 3
    clean, robust = (dm.train_points(10, eps, args) for eps in (0.0, 0.1))
    np.testing.assert_array_equal(clean['height'][0], robust['height'][0])
    assert (clean['height'][-1] != robust['height'][-1]).any()
    assert clean['step'].tolist() == [0, 1, 2, 3] and clean['right'].shape == (4, 2)

# ----------------------------------------------------------------------------------- Tangents

def projector(basis):
    return basis @ basis.mT

def test_tangents_of_a_linear_decoder_are_its_columns():
    matrix = torch.randn(12, 3)
    matrix = torch.cat((matrix, matrix[:, :1]), 1)  # a latent that adds nothing
    basis = dm.orthonormal(dm.decoder_jacobian(lambda z: z @ matrix.T, torch.randn(2, 4)))
    exact = matrix.double() @ torch.linalg.pinv(matrix.double())
    torch.testing.assert_close(projector(basis)[1].double(), exact, atol=1e-5, rtol=0)
    assert basis.square().sum(1).round().sum(1).tolist() == [3, 3]

def test_tangents_of_a_torus_are_its_meridian_and_parallel():
    def torus(z):
        a, b = z.unbind(1)
        return torch.stack(((2 + b.cos()) * a.cos(), (2 + b.cos()) * a.sin(), b.sin()), 1)

    z = torch.tensor([[0.3, 1.1], [2.0, -0.7]])
    a, b = z.unbind(1)
    around = torch.stack((-a.sin(), a.cos(), 0 * a), 1)
    up = torch.stack((-b.sin() * a.cos(), -b.sin() * a.sin(), b.cos()), 1)
    exact = projector(torch.stack((around, up), 2))
    found = projector(dm.orthonormal(dm.decoder_jacobian(torus, z)))
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)

@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 28, 28)])
def test_jacobian_of_the_autoencoder_is_that_of_finite_differences(shape):
    model = dm.Autoencoder(shape, 3).double().requires_grad_(False)
    z, way = torch.randn(2, 3).double(), torch.tensor([0.0, 1e-5, 0.0]).double()
    assert model(torch.rand(2, *shape).double()).shape == (2, *shape)
    exact = (model.decode(z + way) - model.decode(z - way)).flatten(1) / 2e-5
    torch.testing.assert_close(dm.decoder_jacobian(model.decode, z)[..., 1], exact)

def test_renderer_jacobian_has_the_derivatives_that_are_known():
    params = common.make_shapes(10, 'test', 16)[2]
    found = dm.renderer_jacobian(params, 16).view(10, 3, 16, 16, -1)
    drawn, places, at = common.render_shapes(params, 16), {}, 0
    for name, value in params.items():
        if name not in ('outline', 'texture', 'texture_colour'):  # which are discrete
            places[name] = at
            at += value[0].numel()
    inside = (drawn['image'] > 0.02) & (drawn['image'] < 0.98)  # elsewhere pixels are clipped
    for name, share in (('background', 1 - drawn['mask']), ('colour', drawn['mask'])):
        for channel in range(3):
            slope = found[..., places[name] + channel]
            error = (slope[:, channel] - share[:, 0]).abs() * inside[:, channel]
            assert error.max() < 1e-4
            assert slope[:, [c for c in range(3) if c != channel]].abs().max() == 0
    blobs = found[..., places['blobs'] : places['blobs'] + 81].abs().amax((1, 2, 3, 4))
    assert (blobs[:9] == 0).all() and blobs[9] > 0  # only blotches are drawn from them

def test_arms_are_projections_and_random_subspaces_have_the_same_dimension():
    T = dm.orthonormal(torch.randn(4, 30, 5))
    T[:, :, 4] = 0
    R = dm.random_like(T, common.make_generator('test'))
    v = torch.randn(4, 30)
    parts = {arm: project(v, T, R) for arm, project in dm.ARMS.items()}
    torch.testing.assert_close(parts['on'] + parts['off'], parts['free'])
    assert (parts['on'] * parts['off']).sum(1).abs().max() < 1e-4
    for basis, part in ((T, 'on'), (R, 'random')):
        torch.testing.assert_close(dm.onto(parts[part], basis), parts[part])
        same = torch.diag(torch.tensor([1.0, 1, 1, 1, 0])).expand(4, 5, 5)
        torch.testing.assert_close(basis.mT @ basis, same, atol=1e-5, rtol=0)

# ------------------------------------------------------------------------------ Perturbations

@pytest.mark.parametrize('arm', dm.ARMS)
def test_shortest_perturbation_of_a_linear_classifier_is_margin_over_projected_gradient(arm):
    x, weight, bias = torch.randn(6, 40), torch.randn(2, 40), torch.tensor([0.3, -0.3])
    T = dm.orthonormal(torch.randn(6, 40, 5))
    R = dm.random_like(T, common.make_generator('test'))
    score, gap = (lambda v: v @ weight.T + bias), weight[0] - weight[1]
    project = lambda v: dm.ARMS[arm](v, T, R)
    delta, norm = dm.shortest(score, x, project, 400)
    exact = (x @ gap + 0.6).abs() / project(gap.expand(6, -1)).norm(dim=1)
    torch.testing.assert_close(norm, exact, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(project(delta), delta, atol=1e-4, rtol=1e-3)
    assert (score(x + 1.01 * delta).argmax(1) != score(x).argmax(1)).all()

def test_no_perturbation_is_found_where_the_subspace_does_not_matter():
    score = lambda v: torch.stack((v[:, 0], -v[:, 0]), 1)
    blind = lambda v: v * torch.tensor([0.0, 1.0, 1.0])
    delta, norm = dm.shortest(score, torch.ones(2, 3), blind, 5)
    assert norm.isinf().all() and (delta == 0).all()

# ------------------------------------------------------------------------------------- Claims

def verdict(claim, folder):
    results = dict(config=dict(seeds=[0, 1]))
    common.judge([claim], results, folder)
    return results['claims'][0]['verdict']

def made_points(distance, height, fits=True):
    """Three networks that fit at the second of three marks, distances and heights there."""
    right = np.array([[12] * 3, [25 if fits else 20] * 3, [25 if fits else 20] * 3])
    marks = np.ones((3, 3))
    return dict(right=right, distance=distance * marks, share=0.95 * marks,
                height=np.full((3, 3, 9, 9), height), crossings=np.ones((3, 3, 9, 9), int))

def test_verdicts_on_points(tmp_path):
    points = {n: made_points(1.0 if n == 3 else 0.2, 0.4) for n in dm.DIMENSIONS}
    robust = {eps: made_points(1.0, 1.0) for eps in dm.AT_EPS} | {0: points[dm.AT_DIMENSION]}
    robust[0.1]['crossings'][:] = 2
    found = [verdict(c, tmp_path) for c in dm.point_claims(points, robust)]
    assert found[:7] == ['supported'] * 7 and found[7].startswith('uninformative: torn')
    points[dm.CHOSEN] = made_points(0.6, 0.7)
    found = [verdict(c, tmp_path) for c in dm.point_claims(points, robust)]
    assert found[:2] == ['contradicted'] * 2
    points[dm.CHOSEN] = made_points(0.2, 0.4, fits=False)
    rows = dm.point_claims(points, robust)
    assert all(verdict(c, tmp_path).startswith('uninformative: not all') for c in rows)

def made_norms(on, off, angle):
    free = np.linspace(0.5, 1.5, 40).reshape(2, 20)
    return dict(free=free, on=on * free, off=off * free, random=5 * free,
                angle=np.full((2, 20), angle), chance=np.full((2, 20), 85.0),
                right=np.ones((2, 20), bool))

def test_verdicts_on_images(tmp_path):
    def found(norms):
        rows = dm.image_claims('here', norms, np.arange(20) % 10, '-')
        return [verdict(c, tmp_path) for c in rows]

    assert found(made_norms(7, 1.01, 88)) == ['supported'] * 3
    assert found(made_norms(math.inf, 1.01, 88))[2] == 'supported'
    assert found(made_norms(3, 1.5, 60)) == ['contradicted'] * 3
    assert all(v.startswith('uninformative: masked') for v in found(made_norms(0.5, 1, 88)))
    never = made_norms(7, 1, 88) | {arm: np.full((2, 20), np.inf) for arm in ('on', 'random')}
    assert found(never)[2] == 'inconclusive'  # neither is found: no difference

def test_verdicts_on_training_and_wrong_labels(tmp_path):
    made = dict(labels=np.arange(200) % 10, classes=range(10))

    def found(middle, off, whole):
        distance = np.array([2.0, middle, 2.0])[None, :, None] * np.ones((2, 3, 50))
        taught = {arm: np.arange(200)[None] % 10 < share * np.ones((2, 1))
                  for arm, share in (('off', off), ('free', whole))}
        run = dict(training=dict(off=distance, accuracy=np.ones((2, 3))), labels=taught)
        return [verdict(c, tmp_path) for c in dm.training_claims(run, made)]

    assert found(0.5, 6, 6) == ['supported'] * 2
    assert found(1.9, 2, 6) == ['contradicted'] * 2
    assert found(0.5, 1, 1)[1] == 'uninformative: accuracy near chance'

# ---------------------------------------------------------------------------------- Whole run

def test_tiny_run_ends_with_figures_and_claims_and_is_not_repeated(tmp_path, monkeypatch):
    dm.main([*TINY, '--out', str(tmp_path)])
    (folder,) = (tmp_path / 'dimpled_manifold').iterdir()
    assert len(list(folder.glob('fig*.png'))) == 5 and (folder / 'fig1_evolution.gif').exists()
    results = json.loads((folder / 'results.json').read_text())
    assert len(results['claims']) == 22 and results['finished'] == 'dimpled_manifold'
    space = common.load_results(folder)['runs']['pgd']['s0']['spaces']['renderer']
    assert space['free'].shape == (4,) and (space['angle'] <= 90).all()
    monkeypatch.setattr(dm, 'study', None)  # a second run measures nothing
    dm.main(['--plot-only', str(folder)])

def test_bad_flags_are_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        dm.main(['--latent', '0'])
    assert stop.value.code == 2 and capsys.readouterr().err.count('\n') == 1
