"""The shapes against geometry, the loaders against their promises."""

import math

import numpy as np
import pytest
import torch

import common


def draw(outline, n=64, size=64, **fixed):
    """Shapes of one outline, upright and centred unless told otherwise."""
    g = torch.Generator().manual_seed(0)
    k = torch.full((n,), common.OUTLINES.index(outline))
    params = common.shape_parameters(n, g, k, k)
    params |= dict(center=torch.zeros(n, 2), angle=torch.zeros(n)) | fixed
    return params, common.render_shapes(params, size)


@pytest.mark.parametrize(
    'outline,area',
    (
        ('disc', math.pi * 0.9**2),
        ('square', 1.56**2),
        ('triangle', 3 * math.sqrt(3) / 4),
        ('ring', math.pi * (0.92**2 - 0.44**2)),
        ('cross', 2 * 1.9 * 0.6 - 0.6**2),
        ('star', 5 * 0.42 * math.sin(math.pi / 5)),
        ('bar', 0.72 * 2.0),
        ('two discs', 2 * math.pi * 0.5**2),
    ),
)
def test_outlines_have_the_area_of_their_figure(outline, area):
    radius = torch.full((1,), 0.7)
    _, drawn = draw(outline, 1, 256, radius=radius)
    measured = drawn['mask'].sum().item() * (2 / 256) ** 2
    assert measured == pytest.approx(area * 0.7**2, rel=0.02)


def test_outlines_turn_and_move_with_their_parameters():
    quarter = torch.full((1,), math.pi / 2)
    _, upright = draw('bar', 1, 64)
    _, turned = draw('bar', 1, 64, angle=quarter)
    assert torch.allclose(upright['mask'], turned['mask'].transpose(2, 3), atol=0.02)
    _, moved = draw('bar', 1, 64, center=torch.tensor([[0.25, 0.0]]))  # 8 of 64 pixels
    assert torch.allclose(moved['mask'][..., 8:], upright['mask'][..., :-8], atol=1e-4)


@pytest.mark.parametrize('texture,axis', (('bars upright', 3), ('bars across', 2)))
def test_stripes_have_their_period_and_direction(texture, axis):
    k = torch.tensor([common.TEXTURES.index(texture)])
    params, _ = draw('disc', 1, 32)
    drawn = common.render_shapes(params | dict(texture=k, period=torch.tensor([4.0])), 32)
    spectrum = torch.fft.rfft(drawn['texture'].mean(5 - axis).flatten()).abs()
    assert spectrum[1:].argmax() + 1 == 8  # 32 pixels / period 4
    assert drawn['texture'].std(5 - axis).max() < 1e-5


def test_class_k_is_outline_k_with_texture_k_and_conflicts_never_agree():
    _, info = common.make_shapes(50, 'a')
    assert torch.equal(info['outline'], info['texture'])
    _, info = common.make_shapes(900, 'a', variant='cue_conflict')
    pairs = info['outline'] * 10 + info['texture']
    assert (info['outline'] != info['texture']).all()
    assert pairs.bincount(minlength=100).unique().tolist() == [0, 10]  # 90 pairs, 10 each


def test_variants_show_what_they_say():
    inside = {}
    for variant in common.SHAPE_VARIANTS:
        x, info = common.make_shapes(40, 'v', 32, variant)
        assert x.dtype == torch.uint8 and x.shape == (40, 3, 32, 32)
        x = x.float() / 255
        mask = info['mask'] == 1
        inside[variant] = torch.stack([v[:, m[0]].std(1).mean() for v, m in zip(x, mask)])
        if variant == 'silhouette':
            assert x[mask.expand_as(x)].max() == 0
            assert x[(info['mask'] == 0).expand_as(x)].min() == 1
        if variant == 'silhouette_inverted':
            assert x[mask.expand_as(x)].min() == 1
        if variant == 'edges':
            deep = (info['mask'] == 1) & (info['edge'] == 0)
            assert x[deep.expand_as(x)].min() == 1
    noise = common.SHAPES['noise']
    assert inside['outline_only'].median() == pytest.approx(noise, rel=0.2)
    assert (inside['standard'] > 2 * noise).float().mean() > 0.8
    with pytest.raises(common.UserError):
        common.make_shapes(1, 'v', variant='sketch')


def test_shapes_are_the_same_for_the_same_key_and_only_then():
    a, b, c = (common.make_shapes(20, key)[0] for key in ('a', 'a', 'b'))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(common.make_shapes(30, 'a')[1]['outline'][:20], torch.arange(20) % 10)


def test_the_renderer_is_differentiable():
    params, _ = draw('star', 10)
    params = {k: v.double() if v.is_floating_point() else v for k, v in params.items()}
    params['texture'] = torch.arange(10)

    def mean_square(center):
        return (common.render_shapes(params | dict(center=center), 16)['image'] ** 2).sum()

    center = params['center'].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_square(center), center)
    assert torch.isfinite(gradient).all()
    step = torch.zeros_like(center)
    step[0, 0] = 1e-5
    numeric = (mean_square(center + step) - mean_square(center - step)) / 2e-5
    assert gradient[0, 0].item() == pytest.approx(numeric.item(), rel=1e-3, abs=1e-3)


def test_texture_contrast_and_colour_distance_are_within_their_ranges():
    _, drawn = draw('square', 200, 32)
    g = torch.Generator().manual_seed(1)
    p = common.shape_parameters(2000, g)
    low, high = common.SHAPES['distance']
    distance = (p['colour'] - p['background']).abs().amax(1)
    assert distance.max() <= high + 1e-6 and distance.min() >= low - 0.06  # clamped to the box
    assert (distance >= low - 1e-6).float().mean() > 0.95
    assert drawn['image'].min() >= 0 and drawn['image'].max() <= 1


# --------------------------------------------------------------------------------- loading


def test_splits_are_balanced_disjoint_and_independent_of_the_seed():
    data = common.load_data('shapes', train_size=200, test_size=50)
    again = common.load_data('shapes', train_size=200, test_size=50)
    for split in ('train', 'val', 'test'):
        x, y = getattr(data, split)
        assert torch.equal(x, getattr(again, split)[0])
        assert y.bincount(minlength=10).max() - y.bincount(minlength=10).min() <= 1
    flat = torch.cat([getattr(data, s)[0].flatten(1) for s in ('train', 'val', 'test')])
    assert len(flat.unique(dim=0)) == len(flat)
    assert len(data.train[1]) == 200 and len(data.test[1]) == 50


def test_balanced_order_keeps_every_prefix_balanced():
    y = torch.tensor([0] * 50 + [1] * 50 + [2] * 20)
    order = common._balanced_order(y, 3, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort()[0], torch.arange(120))
    for n in (1, 5, 30, 60):
        counts = y[order[:n]].bincount(minlength=3)
        assert counts.max() - counts.min() <= 1


def test_augment_gives_each_image_its_own_crop_and_flip():
    n, side = 200, 8
    x = torch.arange(1, side * side + 1).view(1, 1, side, side).expand(n, 3, -1, -1).contiguous()
    out = common.augment(x, 2, True, torch.Generator().manual_seed(0))
    assert out.shape == x.shape
    padded = torch.nn.functional.pad(x[0, 0], (2, 2, 2, 2))
    candidates = {}
    for top in range(5):
        for left in range(5):
            crop = padded[top : top + side, left : left + side]
            candidates[tuple(crop.flatten().tolist())] = (top, left, False)
            candidates[tuple(crop.flip(1).flatten().tolist())] = (top, left, True)
    found = [candidates[tuple(image[0].flatten().tolist())] for image in out]
    assert len({f[:2] for f in found}) == 25 and {f[2] for f in found} == {True, False}
    assert 60 < sum(f[2] for f in found) < 140
    assert torch.equal(out[:, 0], out[:, 2])  # channels move together


def test_digits_are_not_flipped():
    for name in ('mnist', 'svhn'):
        assert common.TORCHVISION[name][3] is False
    assert common.TORCHVISION['cifar10'][3] is True


def test_train_batches_cover_the_epoch_once_and_repeat_with_the_seed():
    data = common.load_data('shapes', train_size=100, test_size=10)
    cpu = torch.device('cpu')
    epochs = [
        [(x, y) for x, y in common.train_batches(data, 30, common.make_generator('e', k), cpu)] for k in (0, 0, 1)
    ]
    assert [len(y) for _, y in epochs[0]] == [30, 30, 30]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(epochs[0], epochs[1]))
    assert not torch.equal(epochs[0][0][0], epochs[2][0][0])
    x = epochs[0][0][0]
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    seen = torch.cat([x for x, _ in epochs[0]]).flatten(1)
    assert len(seen.unique(dim=0)) == 90


def test_an_image_folder_is_streamed(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, n in (('train', 12), ('test', 4)):
        for c in ('cat', 'dog'):
            (tmp_path / split / c).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / c / f'{i}.png')
    data = common.load_data(f'folder:{tmp_path}', image_size=32, test_size=6)
    assert data.classes == ('cat', 'dog') and data.shape == (3, 32, 32)
    assert len(data.test[1]) == 6 and data.test[1].bincount().tolist() == [3, 3]
    batches = list(common.train_batches(data, 8, common.make_generator('f'), torch.device('cpu')))
    assert batches and all(x.shape == (8, 3, 32, 32) for x, _ in batches)
    with pytest.raises(common.UserError, match='train/ and test/'):
        common.load_data(f'folder:{tmp_path}/train', image_size=32)


def test_real_cifar10(real_data):
    data = common.load_data('cifar10', real_data, trust=True)
    assert data.train[0].shape == (49000, 3, 32, 32) and len(data.val[1]) == 1000
    assert data.test[1].bincount().tolist() == [1000] * 10
    assert data.classes[3] == 'cat'
    mean = to_unit(data.train[0]).mean((0, 2, 3))
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]).double(), atol=2e-3)  # well known


def test_real_mnist_and_svhn(real_data):
    data = common.load_data('mnist', real_data)
    assert data.train[0].shape == (59000, 1, 28, 28) and data.classes[0] == 'zero'
    assert to_unit(data.train[0]).mean().item() == pytest.approx(0.1307, abs=1e-3)  # well known
    data = common.load_data('svhn', real_data / 'svhn-train-prefix', trust=True)
    assert data.shape == (3, 32, 32) and set(data.test[1].tolist()) <= set(range(10))


def to_unit(x):
    return x.double() / 255
