"""shape_bias.py: decisions against Geirhos' counts, closed forms of every measure, the study."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import common
import shape_bias as sb

X = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 10


def trained_looking(arch, classes=10, size=32, channels=3):
    """A network whose batch norms have statistics of their own, in eval mode."""
    model = common.make_model(arch, classes, (channels, size, size))
    generator = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean += 0.1 * torch.randn(m.running_mean.shape, generator=generator)
            m.running_var *= 0.5 + torch.rand(m.running_var.shape, generator=generator)
            m.bias.data += 0.1 * torch.randn(m.bias.shape, generator=generator)
    return model.eval()


# --------------------------------------------------------------------------- the decisions


@pytest.mark.parametrize(
    'network,shape,texture,other,bias,congruent',
    (
        ('AlexNet (caffe)', 283, 376, 541, 42.94, 66),
        ('GoogLeNet (caffe)', 228, 503, 469, 31.19, 69),
        ('VGG-16 (caffe)', 130, 625, 445, 17.22, 63),
        ('AlexNet', 182, 537, 481, 25.31, 65),
        ('VGG-16', 84, 828, 288, 9.21, 68),
        ('ResNet-50', 162, 572, 466, 22.07, 62),
        ('ResNet-50 SIN', 586, 141, 473, 80.61, 63),
        ('AlexNet SIN', 488, 161, 551, 75.19, 60),
    ),
)
def test_shape_bias_of_the_published_decisions(network, shape, texture, other, bias, congruent):
    """Decision counts of Geirhos et al. 2019: 1200 conflicts and 80 images whose cues agree."""
    assert shape + texture + other == 1200
    s, t = np.zeros(1280, int), np.r_[np.ones(1200, int), np.zeros(80, int)]
    d = np.r_[
        np.zeros(shape, int),
        np.ones(texture, int),
        np.full(other, 2),
        np.zeros(congruent, int),
        np.full(80 - congruent, 3),
    ]
    by_shape, by_texture = sb.by_cue(d, s, t)
    assert (by_shape.sum(), by_texture.sum()) == (shape, texture)
    assert 100 * sb.shape_bias(by_shape, by_texture) == pytest.approx(bias, abs=0.005)
    assert sb.coverage(by_shape[:1200], by_texture[:1200]) == pytest.approx((shape + texture) / 1200)


def test_groups_are_geirhos():
    groups = sb.imagenet_groups()
    sizes = dict(
        airplane=1,
        bear=4,
        bicycle=2,
        bird=49,
        boat=5,
        bottle=7,
        car=3,
        cat=6,
        chair=4,
        clock=3,
        dog=109,
        elephant=2,
        keyboard=2,
        knife=1,
        oven=1,
        truck=8,
    )
    assert {c: len(g) for c, g in groups.items()} == sizes
    every = [i for g in groups.values() for i in g]
    assert len(set(every)) == len(every) == 207
    # spot checks with ImageNet's order: no lesser panda, dhole, wild dogs or big cats
    assert {8, 145} <= set(groups['bird']) and not {9, 17, 21, 97, 134} & set(groups['bird'])
    assert {151, 192, 204, 227, 242, 251, 258, 260, 264, 269} & set(groups['dog']) == set()


def test_the_decision_takes_the_mean_not_the_sum():
    groups = sb.imagenet_groups()
    p = torch.full((1, 1000), 1e-6)
    p[0, groups['bird']] = 0.8 / 49
    p[0, groups['knife']] = 0.1
    assert list(groups)[sb.decide(p.log(), list(groups.values())).item()] == 'knife'
    p[0, groups['bird']] = 5.5 / 49
    assert list(groups)[sb.decide(p.log(), list(groups.values())).item()] == 'bird'


def test_cifar_decides_among_seven():
    classes = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
    groups = sb.category_groups(classes)
    assert groups == dict(airplane=[0], bird=[2], boat=[8], car=[1], cat=[3], dog=[5], truck=[9])
    logits = torch.zeros(1, 10)
    logits[0, 4], logits[0, 8] = 9, 1  # deer is no category
    assert list(groups)[sb.decide(logits, list(groups.values())).item()] == 'boat'


def test_conflicts_hold_every_pair_equally_often():
    _, outline, texture = sb.draw_images(900, 'test', 16, common.conflict_textures(900))
    pairs = torch.bincount(outline * 10 + texture, minlength=100).view(10, 10)
    assert (pairs.diagonal() == 0).all() and (pairs + 10 * torch.eye(10).long() == 10).all()


# ------------------------------------------------------------------------- networks in pieces


@pytest.mark.parametrize(
    'arch,size,classes,channels',
    (
        ('small-cnn', 32, 10, 3),
        ('small-cnn', 32, 10, 1),
        ('lenet5', 28, 10, 1),
        ('resnet18', 32, 10, 3),
        ('preact-resnet18', 32, 10, 3),
        ('wrn-10-1', 32, 10, 3),
        ('alexnet', 64, 1000, 3),
        ('googlenet', 64, 1000, 3),
        ('resnet50', 64, 1000, 3),
    ),
)
def test_the_pieces_make_the_network(arch, size, classes, channels):
    model = trained_looking(arch, classes, size, channels)
    x = torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(2))
    a = x.clone()
    with torch.no_grad():
        for name, piece in sb.pieces(model):
            before = a.clone()
            out = piece(a)
            assert torch.equal(a, before), f'{name} changes its input'
            assert name == 'head' or out.dim() == 4
            a = out
        assert torch.allclose(a, model(x), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        maps = dict(sb.stage_maps(model, x, 2))
    assert list(maps) == [name for name, _ in sb.pieces(model)[:-1]]


def test_authors_layers_have_1152_and_3904_channels():
    x = torch.rand(1, 3, 64, 64)
    for arch, count in (('alexnet', 1152), ('resnet50', 3904)):
        model = common.make_model(arch, 1000, (3, 64, 64)).eval()
        assert sum(a.shape[1] for _, a in sb.stage_maps(model, x)) == count


# ---------------------------------------------------------------------------------- the views


def test_scrambling_moves_every_patch_and_is_the_same_for_all():
    assert sb.derangement(2).tolist() == [2, 3, 1, 0]  # the authors'
    for k in (2, 4, 8):
        order = sb.derangement(k)
        assert sorted(order.tolist()) == list(range(k * k))
        assert (order != torch.arange(k * k)).all() and torch.equal(order, sb.derangement(k))
    x = torch.arange(4.0).view(1, 1, 2, 2).expand(3, 1, 2, 2)
    assert common.permute_patches(x, sb.derangement(2)).flatten(1).tolist() == [[2, 3, 1, 0]] * 3


def test_low_and_high_pass_add_up():
    x = 0.5 + 0.1 * (X - 0.5)  # far from the clamps
    for band in (0.21, 0.45):  # between the frequencies of a 32-pixel image
        low, high = sb.low_pass(x, band), sb.high_pass(x, band)
        assert torch.allclose(low + high - x.mean((2, 3), keepdim=True), x, atol=1e-5)
    t = torch.arange(32) / 32
    for cycles, kept in ((2, True), (12, False)):
        wave = 0.5 + 0.3 * torch.cos(2 * math.pi * cycles * t).expand(1, 1, 32, 32)
        out = sb.low_pass(wave, 0.5)  # 8 cycles of 16
        assert torch.allclose(out, wave if kept else torch.full_like(wave, 0.5), atol=1e-5)


def test_hybrids_of_an_image_with_itself_are_the_image():
    assert torch.allclose(sb.hybrid(X, X), X, atol=1e-5)
    assert torch.allclose(sb.phase_of(X, X), X, atol=1e-5)
    t = torch.arange(32) / 32
    slow, fast = (0.5 + 0.2 * torch.cos(2 * math.pi * c * t).expand(1, 1, 32, 32) for c in (2, 9))
    assert torch.allclose(sb.hybrid(slow, fast), slow + fast - 0.5, atol=1e-5)
    assert torch.allclose(sb.phase_of(slow, 0.5 + 0.5 * (slow - 0.5)), 0.5 + 0.5 * (slow - 0.5), atol=1e-5)


def test_partners_are_of_other_classes():
    y = torch.arange(2000) % 10
    other = sb.partners(y)
    pairs = torch.bincount(y * 10 + y[other], minlength=100).view(10, 10)
    with pytest.raises(common.UserError, match='one class'):
        sb.partners(torch.zeros(5, dtype=torch.long))
    assert (pairs.diagonal() == 0).all() and (pairs + 99 * torch.eye(10).long()).min() > 5


@pytest.mark.parametrize('name', sb.CORRUPTIONS)
def test_corruptions_grow_and_stay_in_range(name):
    x, _ = common.make_shapes(40, 'test')
    x = common.to_float(x)
    distance = []
    for severity in range(5):
        out = sb.corrupt(x, name, severity)
        assert out.shape == x.shape and 0 <= out.min() and out.max() <= 1
        assert torch.equal(out, sb.corrupt(x, name, severity))
        distance.append((out - x).square().mean().item())
    assert all(b > a for a, b in zip(distance, distance[1:])), distance
    assert sb.corrupt(x[:, :1], name, 0).shape == x[:, :1].shape  # grey images, too


def test_corruptions_by_hand():
    assert torch.allclose(sb.corrupt(X, 'contrast', 1).std((2, 3)), 0.5 * X.std((2, 3)), atol=1e-6)
    assert sb.corrupt(X, 'noise', 0).sub(X).abs().max() < 0.3
    assert torch.allclose(sb.blur(torch.full((1, 2, 9, 9), 0.3), 1.5), torch.tensor(0.3))
    spike = torch.zeros(1, 1, 33, 33)
    spike[0, 0, 16, 16] = 1
    row = sb.blur(spike, 2.0)[0, 0].sum(0)
    at = torch.arange(33) - 16
    assert row.sum() == pytest.approx(1, abs=1e-5)
    assert (row * at * at).sum() == pytest.approx(4, rel=0.03)  # the variance


def test_views_of_shapes_are_of_the_same_objects():
    data = common.load_data('shapes', test_size=20)
    x = common.to_float(data.test[0])
    found = {name: image for _, name, image in sb.views(data, x)}
    assert len(found) < len(list(sb.views(data, x)))  # severities share their names
    mask = common.make_shapes(20, 'test')[1]['mask']
    assert ((1 - found['silhouette'][:, :1]) - mask).abs().max() < 0.01
    outside = (mask == 0).expand_as(x)
    assert torch.equal(found['flat fill'][outside], x[outside])
    assert all(image.shape == x.shape for image in found.values())
    assert set(found['black and white'].unique().tolist()) <= {0, 1}
    assert torch.equal(found['edges inverted'], 1 - found['edges'])


def test_outlines_of_a_square_are_its_border():
    x = torch.zeros(1, 3, 32, 32)
    x[:, :, 8:24, 8:24] = 1
    lines = sb.outlines(x)[0, 0]
    assert lines[16, 8] == 0 and lines[16, 16] == 1 and lines[2, 2] == 1


# ---------------------------------------------------------------------------- smoother filters


def test_total_variation_by_hand():
    assert sb.total_variation(torch.ones(2, 5, 5)).tolist() == [0, 0]
    ramp = torch.arange(4.0).expand(1, 3, 4)  # three rows, each 0 1 2 3
    assert sb.total_variation(ramp).tolist() == [9]
    assert sb.total_variation(torch.tensor([[0.0, 1], [1, 0]])) == 4


def test_smoothness_is_free_of_scale_and_ordered():
    t = torch.arange(7)
    smooth = torch.exp(-(t - 3.0).square() / 8)
    filters = torch.stack([smooth[:, None] * smooth, (-1.0) ** (t[:, None] + t)])[:, None]
    tv, high = sb.filter_smoothness(filters)
    assert tv[0] < 0.7 < 1.5 < tv[1] and high[0] < 0.05 and high[1] > 0.95
    for a, b in zip((tv, high), sb.filter_smoothness(-3 * filters)):
        assert torch.allclose(a, b)
    assert not torch.isfinite(sb.filter_smoothness(torch.zeros(1, 1, 3, 3))[0]).any()


def test_first_filters_of_the_small_network_are_over_pixels():
    """The response to a delta image spells out the filter."""
    model = common.make_model('small-cnn')
    weight = sb.first_filters(model)
    assert weight.shape == (32, 3, 6, 6)
    conv, x = model.stem[1].conv, torch.rand(1, 3, 32, 32)
    seen = conv(model.stem[0](x))[0, :, 5, 7]
    patch = x[:, :, 2 * 5 - 2 : 2 * 5 + 4, 2 * 7 - 2 : 2 * 7 + 4]
    assert torch.allclose(seen, (weight * patch).sum((1, 2, 3)), atol=1e-5)


# -------------------------------------------------------------------------------- dissection


def test_a_unit_that_is_the_concept_has_iou_one_and_a_blind_one_little():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(50, 2, 16, 16, dtype=torch.bool)
    masks[:25, 0, 4:8, 4:8] = True  # a twentieth of the pixels of half of the images
    masks[25:, 1, 8:12, 8:12] = True
    blind = torch.rand(50, 1, 16, 16, generator=generator)
    exact = masks[:, :1].float() + 1e-3 * torch.rand(50, 1, 16, 16, generator=generator)
    tau = masks[:, 0].float().mean().item()
    other = masks.roll(20, 0)
    iou = sb.dissect(torch.cat((exact, blind), 1), masks, other, [0, 0], (tau,))[0]
    assert iou[0, 0, 0] == 1 and iou[0, 0, 1] == 0
    assert iou[0, 1].max() < 0.06
    assert iou[1, 0, 0] < 0.6  # with masks of other images
    found = sb.detectors(iou)
    assert found.tolist() == [[True, False], [False, False]]
    assert sb.unit_labels(iou).tolist() == [0, -1]


def test_iou_by_hand_counts_a_unit_only_where_it_touches_the_category():
    """Two images, four pixels each; the unit fires on two pixels of each."""
    maps = torch.tensor([[[[1.0, 1], [0, 0]]], [[[1.0, 1], [0, 0]]]])
    masks = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    masks[0, 0, 0] = masks[0, 0, 1] = True  # category 0: all of the first image
    masks[0, 1, 0, 0] = True  # category 1: one pixel of the first image
    masks[1, 2, 1, 1] = True  # category 2: a pixel where the unit is off
    iou = sb.dissect(maps, masks, masks, [0, 1, 2], (0.5,))[0, 0, 0]
    assert iou.tolist() == [2 / 4, 1 / 2, 0]
    # in one category with the first, the second concept pays for the same pixels and no more
    assert sb.dissect(maps, masks, masks, [0, 0, 1], (0.5,))[0, 0, 0].tolist() == [2 / 4, 1 / 2, 0]


def test_thresholds_are_exceeded_by_the_share_of_positions():
    maps = torch.randn(30, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(30, 1, 8, 8, dtype=torch.bool)
    iou = sb.dissect(maps, everything, everything, [0], sb.TAUS)[:, 0, :, 0]  # = share on
    assert torch.allclose(iou, torch.tensor(sb.TAUS)[:, None].expand(-1, 2), atol=1e-3)


def test_many_units_are_dissected_in_blocks_of_images_like_one():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(7, 1, 8, 8, generator=generator)
    masks = torch.rand(7, 3, 32, 32, generator=generator) < 0.3
    one = sb.dissect(maps, masks, masks.roll(1, 0), [0, 0, 1])
    many = sb.dissect(maps.expand(-1, 400, -1, -1), masks, masks.roll(1, 0), [0, 0, 1])
    assert torch.equal(many, one.expand(-1, -1, 400, -1)) and one.max() > 0


def test_the_probe_knows_its_pixels():
    probe = sb.make_probe(200, 32, 'cpu')
    category = np.array([c for c, _ in probe['concepts']])
    masks = probe['masks']
    assert masks.shape == (200, len(category), 32, 32)
    for c in ('colour', 'layout'):  # partitions of the image
        assert (masks[:, category == c].sum(1) == 1).all()
    both = [masks[:, category == c].sum(1) for c in ('texture', 'outline')]
    assert torch.equal(*both) and both[0].max() == 1  # both: the object's pixels
    pairs = probe['labels']['outline'] * 10 + probe['labels']['texture']
    assert (pairs.bincount(minlength=100) == 2).all()
    null = probe['null']
    assert torch.equal(null[:, category == 'texture'].sum(1), both[0])  # of the same object
    assert not torch.equal(null[:, category == 'texture'], masks[:, category == 'texture'])
    i = (category == 'texture').nonzero()[0][0]
    has = masks[:, i : i + 10].flatten(2).any(2)
    assert torch.equal(has.float().argmax(1), probe['labels']['texture'])


def test_names_of_colours():
    primaries = dict(
        red=(1, 0, 0), yellow=(1, 1, 0), green=(0, 1, 0), cyan=(0, 1, 1), blue=(0, 0, 1), magenta=(1, 0, 1)
    )
    primaries |= {'dark grey': (0.2, 0.2, 0.2), 'light grey': (0.9, 0.9, 0.85)}
    for name, rgb in primaries.items():
        x = torch.tensor(rgb, dtype=torch.float).view(3, 1, 1)
        assert sb.COLOURS[sb.colour_names(x).item()] == name
    assert sb.COLOURS[sb.colour_names(torch.tensor([0.8, 0.3, 0.2]).view(3, 1, 1)).item()] == 'red'


def test_a_probe_from_files(tmp_path):
    (tmp_path / 'images').mkdir()
    for i in range(3):
        Image.new('RGB', (8, 8), (40 * i,) * 3).save(tmp_path / 'images' / f'{i}.png')
    for concept, rows in (('texture/dots', slice(0, 4)), ('colour/red', slice(4, 8))):
        (tmp_path / 'masks' / concept).mkdir(parents=True)
        mask = np.zeros((8, 8), np.uint8)
        mask[rows] = 255
        Image.fromarray(mask).save(tmp_path / 'masks' / concept / '1.png')
    probe = sb.read_probe(tmp_path, 8, 3, 'cpu')
    assert probe['concepts'] == [('colour', 'red'), ('texture', 'dots')]
    assert probe['masks'].sum((2, 3)).tolist() == [[0, 0], [32, 32], [0, 0]]
    assert probe['masks'][1, 1, :4].all() and probe['x'][2].mean() == pytest.approx(80 / 255)
    with pytest.raises(common.UserError, match='needs images'):
        sb.read_probe(tmp_path / 'masks', 8, 3, 'cpu')


def test_finding_the_object_is_no_detector_of_what_it_is():
    """A unit that fires on every object, whatever its outline and texture, is one of layout."""
    probe = sb.make_probe(400, 32, 'cpu')
    names = [c for c, _ in probe['concepts']]
    ids = [sorted(set(names)).index(c) for c in names]
    inside = probe['masks'][:, [c == 'outline' for c in names]].any(1, keepdim=True)
    unit = inside + 0.1 * torch.rand(inside.shape, generator=torch.Generator().manual_seed(0))
    for iou in sb.dissect(unit, probe['masks'], probe['null'], ids, (0.05, 0.2)):
        assert not any(found for found, c in zip(sb.detectors(iou)[0], names) if c == 'texture')
        assert probe['concepts'][sb.unit_labels(iou).item()] == ('layout', 'object')
    # one that fires on rings alone is
    ring = names.index('outline') + common.OUTLINES.index('ring')
    unit = probe['masks'][:, ring : ring + 1].float()
    unit = unit + 0.1 * torch.rand(unit.shape, generator=torch.Generator().manual_seed(0))
    iou = sb.dissect(unit, probe['masks'], probe['null'], ids, (0.02,))[0]
    assert probe['concepts'][sb.unit_labels(iou).item()] == ('outline', 'ring')


# ------------------------------------------------------------------------- types of inputs


def test_effective_numbers():
    rows = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 1]])
    assert torch.allclose(sb.effective_number(rows), torch.tensor([1.0, 4.0, 2.0]))


def test_patches_and_their_distance():
    x = torch.arange(32.0).view(1, 1, 1, 32).expand(2, 1, 32, 32)
    found = sb.patches_at(x, torch.tensor([10, 0]), torch.tensor([20, 0]))
    assert found.shape == (2, sb.PATCH, sb.PATCH, 1)
    assert found[0, 0, :, 0].tolist() == list(range(15, 26))
    assert found[1, 0, 5:, 0].tolist() == list(range(6))  # reflected at the border
    points = torch.tensor([[0.0, 0], [3, 4], [0, 0]])
    assert sb.mean_distance(points) == pytest.approx(10 / 3)


# ----------------------------------------------------------------------------------- ablation


def test_zeroing_the_last_stage_takes_its_term_off_the_logits():
    model = trained_looking('small-cnn')
    groups = [[k] for k in range(10)]
    *_, (name, maps) = sb.stage_maps(model, X)
    pooled, logits = maps.mean((2, 3)), common.logits_of(model, X)
    before = logits.argmax(1)
    shape, texture = before.clone(), (before + 1) % 10
    shape[10:], texture[10:] = texture[10:].clone(), before[10:]
    found = sb.ablate_channels(model, X, groups, shape, texture, 128)
    assert found['decided'] == [10, 10]
    stage = found['stages'][-1]
    assert stage['name'] == name == 'stage3' and stage['channels'] == list(range(128))
    for c in range(0, 128, 9):
        now = (logits - pooled[:, c, None] * model.fc.weight[:, c]).argmax(1)
        moved = now != before
        assert stage['lost'][:, c].tolist() == [moved[:10].sum(), moved[10:].sum()]
    few = sb.ablate_channels(model, X, groups, shape, texture, 4)['stages'][0]
    assert few['channels'] == [0, 10, 21, 31]


def test_accuracy_without_channels():
    model = trained_looking('small-cnn')
    right = (common.logits_of(model, X).argmax(1) == Y).float().mean().item()
    assert sb.accuracy_without(model, X, Y, {}) == pytest.approx(right)
    everything = {'stage3': torch.arange(128)}
    constant = (Y == model.fc.bias.argmax()).float().mean().item()
    assert sb.accuracy_without(model, X, Y, everything) == pytest.approx(constant)


def test_concept_ablation_matches_numbers():
    models = {a: trained_looking('small-cnn') for a in ('S', 'R')}
    concepts = [('colour', 'red'), ('texture', 'dots'), ('layout', 'edge')]
    found = {a: {'stem': torch.zeros(2, 32, 3)} for a in models}
    found['S']['stem'][0, :5, 0] = 0.3  # five units of red in S, two in R
    found['R']['stem'][0, 7:9, 0] = 0.2
    found['S']['stem'][0, 9, 1] = 0.3  # dots only in S
    found['R']['stem'][0, 20:, 2] = 0.9
    out = sb.ablate_concepts(models, found, concepts, dict(natural=X), Y)
    assert out['colour']['concepts'] == 1 and out['colour']['channels'] == 2
    assert out['texture']['channels'] == 0 and out['texture']['S']['natural'] is None
    assert list(out) == ['colour', 'texture', 'layout']
    expected = sb.accuracy_without(models['R'], X, Y, {'stem': torch.tensor([7, 8])})
    assert out['colour']['R']['natural'][1] == pytest.approx(expected)


# ------------------------------------------------------------------------------ dimensionality


def test_rho_is_one_for_equal_and_zero_for_unrelated_features():
    z, w = torch.randn(2, 4000, 8, generator=torch.Generator().manual_seed(0)).double()
    for other, expected in ((z, 1), (w, 0), (-z, -1), ((z + w) / 2**0.5, 0.5**0.5)):
        terms = torch.stack(sb.covariance_terms(z, other)).numpy()
        assert sb.rho(terms) == pytest.approx(expected, abs=0.03)
    assert sb.dimension_shares(0, 0).sum() == pytest.approx(1)
    assert sb.dimension_shares(0, 0)[0] == pytest.approx(1 / (2 + math.e))
    assert sb.dimension_shares(1, 1)[1] == pytest.approx(1 / 3)


def test_pairs_share_one_cue_alone():
    """A network that reads the textures: here the renderer's own masks stand in for it."""
    for factor in ('outline', 'texture'):
        a, b = sb.factor_pairs(100, 32, factor, 'cpu')
        assert a.shape == b.shape == (100, 3, 32, 32) and not torch.equal(a, b)
    i = torch.arange(100)
    first, second = (i // 10) % 10, (i // 10 + 1 + i // 100 % 9) % 10
    assert (first != second).all()


# ------------------------------------------------------------------------------- the trainings


def test_the_other_trainings_label_the_outline():
    data = common.load_data('shapes', train_size=400)
    for reverse, share in ((False, 0.1), (True, 0.73)):
        other = sb.retextured(data, reverse)
        assert len(other.train[1]) == 400 and torch.equal(other.train[1][:10], torch.arange(10))
        texture = sb.training_textures(3000, reverse)
        assert (texture == torch.arange(3000) % 10).float().mean() == pytest.approx(share, abs=0.03)
        assert torch.equal(other.test[0], data.test[0])


def test_reversed_images_have_faint_outlines_and_strong_textures():
    x, _, _ = sb.draw_images(200, 'reversed test', 32, None, True)
    info = common.make_shapes(200, 'any')[1]
    assert x.shape == (200, 3, 32, 32)
    generator = common.make_generator('shape-bias', common.SHAPES_VERSION, 'reversed test')
    drawn = common.render_shapes(common.shape_parameters(200, generator))
    inside, outside = ((drawn['mask'] > 0.99).expand(-1, 3, -1, -1), (drawn['mask'] < 0.01).expand(-1, 3, -1, -1))
    x = common.to_float(x)
    spread = torch.stack([x[i][inside[i]].std() for i in range(200)])
    usual = torch.stack([drawn['image'][i][inside[i]].std() for i in range(200)])
    assert info['mask'].shape == (200, 1, 32, 32) and spread.shape == usual.shape
    step = (
        torch.stack(
            [
                (x[i] * inside[i]).sum((1, 2)) / inside[i].sum((1, 2))
                - (x[i] * outside[i]).sum((1, 2)) / outside[i].sum((1, 2))
                for i in range(200)
            ]
        )
        .abs()
        .amax(1)
    )
    assert step.median() < 0.15  # the colours differ by 0.06 to 0.12 and the background varies


def test_a_larger_stem(tmp_path):
    model = sb.build('resnet18', 10, (3, 32, 32), 0, 7)
    assert model.conv1.weight.shape == (64, 3, 7, 7)
    plain = sb.build('resnet18', 10, (3, 32, 32), 0)
    assert torch.equal(model.linear.weight, plain.linear.weight)
    assert model(X[:2]).shape == (2, 10)


def test_networks_of_the_ladder_are_those_of_train_at():
    """Its main robust network has the recipe, and so the checkpoint, of the shared base."""
    import train_at

    ours = common.parse(sb.make_parser(), [])
    base = common.parse(common.make_parser(train_at.__doc__, train_at.DEFAULTS), [])
    ours.ladder = [4 / 255, 8 / 255]
    arms, main = sb.arm_names(ours)
    assert list(arms) == ['untrained', 'standard', 'eps 4/255', 'eps 8/255', 'random textures']
    assert main == 'eps 8/255'
    for name in ('standard', main):
        method, eps = arms[name]
        setting = sb.at_eps(ours, eps) if eps else ours
        assert common.model_recipe(setting, method, 0) == common.model_recipe(base, method, 0)
    assert sb.at_eps(ours, 4 / 255).step_size == pytest.approx(3 / 255)


# --------------------------------------------------------------------------------- the stimuli


def stimuli_folder(path, names, size=40):
    for name in names:
        file = path / 'conflict' / re.match('[a-z]+', name)[0] / f'{name}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(256, size=(size, size, 3), dtype=np.uint8)).save(file)
    return path / 'conflict'


def test_stimuli_are_read_by_name(tmp_path):
    folder = stimuli_folder(tmp_path, ('cat1-dog2', 'dog10-knife1', 'bird3-bird1', 'truck2-cat1'))
    groups = sb.category_groups(['cat', 'dog', 'automobile', 'bird', 'truck'])
    x, shape, texture = sb.read_stimuli(folder, groups, 20, 'cpu')
    names = list(groups)
    assert [(names[s], names[t]) for s, t in zip(shape, texture)] == [
        ('bird', 'bird'),
        ('cat', 'dog'),
        ('truck', 'cat'),
    ]
    assert x.shape == (3, 3, 20, 20)
    by_shape, by_texture = sb.by_cue(shape.numpy(), shape.numpy(), texture.numpy())
    assert (by_shape.sum(), by_texture.sum()) == (2, 0)  # the agreeing one counts for neither
    stimuli_folder(tmp_path, ('cat1',))
    with pytest.raises(common.UserError, match='is not named'):
        sb.read_stimuli(folder, groups, 20, 'cpu')


def test_the_real_stimuli(real_data):
    folder = real_data / 'cue-conflict'
    every = sb.load_stimuli(folder, range(1000), (3, 224, 224), 'cpu')
    x, shape, texture, groups = every['conflict']
    assert len(x) == 160 and (shape != texture).all() and (shape.bincount() == 10).all()
    assert all(len(every[name][0]) == 160 for name in ('edges', 'silhouettes'))
    seven = sb.load_stimuli(
        folder,
        ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'],
        (3, 32, 32),
        'cpu',
    )
    assert len(seven['conflict'][0]) == 26 and len(seven['edges'][0]) == 70


# ----------------------------------------------------------------------------------- the study

TINY = ('--train-size', '200', '--epochs', '1', '--batch-size', '50', '--test-size', '40', '--amp', 'fp32')


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A tiny study: its folder, results, claims and output folder."""
    out = tmp_path_factory.mktemp('shape_bias')
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(CONFLICTS=90, PROBES=100, PAIRS=100, TOP=10, TAUS=(0.02, 0.05)).items():
            patch.setattr(sb, name, value)
        args = common.parse(sb.make_parser(), [*TINY, '--out', str(out)])
        folder, results = sb.study(args)
        sb.print_table(results)
        sb.draw(results, folder)
        claims = sb.judge(results, folder)
        yield folder, results, claims, out


def test_a_tiny_study_leaves_everything(finished, capsys):
    folder, results, claims, out = finished
    figures = {p.stem for p in folder.glob('*.png')}
    assert figures >= {
        f'fig{i}_{n}'
        for i, n in enumerate(
            (
                'views',
                'shape_bias',
                'missing_cues',
                'corruptions',
                'frequency',
                'filters',
                'smoothness',
                'noise',
                'dissection',
                'inputs',
                'ablation',
            ),
            1,
        )
    }
    assert {'fig13_dimensions', 'fig14_reversed'} <= figures
    text = ' '.join(c['claim'] for c in claims)
    for number in range(15):
        assert f'V{number} ' in text, number
    assert len(list((out / 'models').glob('*.pt'))) == 6
    saved = json.loads((folder / 'results.json').read_text())
    assert saved['arms'] == ['untrained', 'standard', 'eps 4/255', 'eps 8/255', 'random textures']
    again = sb.judge(saved, folder)  # from the file alone
    assert again == claims


def test_nothing_is_measured_twice(finished, monkeypatch):
    folder, results, _, out = finished
    monkeypatch.setattr(sb, 'measure_views', None)
    monkeypatch.setattr(sb, 'ablate_channels', None)
    _, again = sb.study(common.parse(sb.make_parser(), [*TINY, '--out', str(out)]))
    assert again['views-s0'] == results['views-s0']


def changed(results, **arms):
    """The results with other decisions: arm=(share for the shape, share for the texture)."""
    out = json.loads(json.dumps(results))
    shape, texture = (common.unpack(out['cues']['shapes'][c]) for c in ('shape', 'texture'))
    n = len(shape)
    for seed, (arm, (s, t)) in enumerate(arms.items()):
        at = np.random.default_rng(seed).permutation(n)
        d = np.full(n, -1, np.int16)
        for lo, hi, cue in ((0, s, shape), (s, s + t, texture)):
            pick = at[round(lo * n) : round(hi * n)]
            d[pick] = cue[pick]
        out['conflict-s0'][arm]['shapes'] = common.pack(d)
    for arm, right in (('standard', 0.0), ('eps 8/255', 1.0)):  # gates that pass
        y = common.unpack(out['views-s0'][arm]['natural/natural'])
        out['views-s0'][arm]['natural/natural'] = common.pack(np.ones_like(y))
        out['views-s0'][arm]['attack/PGD-20'] = common.pack(np.full_like(y, right))
    for key in out:
        if key.startswith('collapsed'):
            out[key] = False
    return out


def verdict(claims, start):
    found = [c['verdict'] for c in claims if c['claim'].startswith(start)]
    assert found, start
    return found[0]


@pytest.mark.parametrize(
    'standard,weak,robust,expected',
    (
        ((0.2, 0.7), (0.4, 0.5), (0.7, 0.2), ('supported', 'supported', 'supported')),
        ((0.7, 0.2), (0.4, 0.5), (0.2, 0.7), ('contradicted', 'contradicted', 'contradicted')),
        ((0.45, 0.45), (0.44, 0.45), (0.45, 0.44), ('inconclusive', 'inconclusive', 'inconclusive')),
        ((0.2, 0.7), (0.4, 0.5), (0.3, 0.1), ('supported', 'uninformative', 'uninformative')),
    ),
)
def test_verdicts_on_shape_bias(finished, tmp_path, standard, weak, robust, expected):
    arms = {'standard': standard, 'eps 4/255': weak, 'eps 8/255': robust}
    claims = sb.judge(changed(finished[1], **arms), tmp_path)
    for start, wanted in zip(('V0', 'V1 ', 'V2'), expected):
        assert verdict(claims, start).startswith(wanted), start


def test_a_robust_network_that_is_not_robust_fails_its_gate(finished, tmp_path):
    results = changed(finished[1], **{'standard': (0.2, 0.7), 'eps 8/255': (0.7, 0.2)})
    views = results['views-s0']['eps 8/255']
    views['attack/PGD-20'] = results['views-s0']['standard']['attack/PGD-20']
    claims = sb.judge(results, tmp_path)
    assert verdict(claims, 'Gate: R is robust') == 'contradicted'
    assert 'gate' in verdict(claims, 'V1 ') and verdict(claims, 'V0') == 'supported'
    results['collapsed-standard-s0'] = True
    assert 'collapsed' in verdict(sb.judge(results, tmp_path), 'V0')


def test_verdicts_on_views(finished, tmp_path):
    """Accuracies put in by hand move the rows as they should."""
    results = changed(finished[1], **{'standard': (0.2, 0.7), 'eps 8/255': (0.7, 0.2)})
    n = results['config']['test_size']

    def put(arm, view, share):
        results['views-s0'][arm][view] = common.pack(np.arange(n) < round(share * n))

    for view in results['views-s0']['standard']:
        if not view.startswith(('natural', 'attack')):
            put('standard', view, 0.5)
            put('eps 8/255', view, 0.5)
    claims = sb.judge(results, tmp_path)
    assert verdict(claims, 'V3') == 'inconclusive'
    for view, standard, robust in (
        ('texture-less/flat fill', 0.3, 0.9),
        ('shape-less/scrambled 2x2', 0.9, 0.2),
        ('low-pass/0.2', 0.2, 0.9),
        ('high-pass/0.2', 0.95, 0.1),
        *((f'veil/{i}', 0.95, 0.1) for i in range(1, 6)),
    ):
        put('standard', view, standard)
        put('eps 8/255', view, robust)
    claims = sb.judge(results, tmp_path)
    for start in (
        'V3 R is better without texture: flat',
        'V4',
        'V5 R is worse off',
        'V5 R is worse under',
        'V8 R tolerates',
        'V8 R keeps less',
    ):
        assert verdict(claims, start) == 'supported', start
    assert verdict(claims, 'V5 R is better') == 'inconclusive'


def test_measuring_leaves_gradients_and_modes_alone():
    """Two generators of maps side by side must not undo each other's contexts."""
    model = common.make_model('small-cnn').train()
    sb.map_variation(model, X)
    sb.dimensions(model, {'outline': (X[:10], X[10:]), 'texture': (X[:10], X[10:])})
    assert torch.is_grad_enabled() and model.training
    assert all(p.requires_grad for p in model.parameters())


def test_other_contents_are_other_runs(tmp_path):
    for name, text in (('a', 'x'), ('b', 'y'), ('c', 'x')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'w.pt').write_text(text)
    of = {n: sb.identity(tmp_path / n / 'w.pt') for n in 'abc'}
    assert of['a'] == of['c'] != of['b']
    assert sb.identity(tmp_path / 'a')[2:] == sb.identity(tmp_path / 'c')[2:]
    assert sb.identity(tmp_path / 'a')[2:] != sb.identity(tmp_path / 'b')[2:]
    assert sb.identity('random') == 'random'
    assert sb.identity(tmp_path / 'gone' / 'w.pt') == 'w.pt'  # no path of this machine
    (tmp_path / 'a' / 'w.pt').rename(tmp_path / 'a' / 'v.pt')
    assert sb.identity(tmp_path / 'a')[2:] != sb.identity(tmp_path / 'c')[2:]


def test_small_effects_of_one_seed_are_inconclusive(finished, tmp_path):
    results = changed(finished[1], **{'standard': (0.45, 0.45), 'eps 8/255': (0.48, 0.42)})
    d = common.unpack(results['conflict-s0']['standard']['shapes'])
    results['conflict-s0']['eps 8/255']['shapes'] = common.pack(d)
    shape = common.unpack(results['cues']['shapes']['shape'])
    texture = common.unpack(results['cues']['shapes']['texture'])
    d = d.copy()
    some = np.flatnonzero(d == texture)[:3]  # 3 of 81 decisions move to the shape
    d[some] = shape[some]
    results['conflict-s0']['eps 8/255']['shapes'] = common.pack(d)
    row = next(c for c in sb.judge(results, tmp_path) if c['claim'].startswith('V1 '))
    assert row['verdict'] == 'inconclusive' and '+3.7 points' in row['measured']


@pytest.mark.slow
def test_two_seeds_in_one_go(tmp_path, monkeypatch):
    """The second training starts after the first was measured."""
    for name, value in dict(
        CONFLICTS=90,
        PROBES=100,
        PAIRS=100,
        TOP=10,
        TAUS=(0.05,),
        views=lambda data, x: iter([('natural', 'natural', x)]),
    ).items():
        monkeypatch.setattr(sb, name, value)
    monkeypatch.setattr(sb, 'gallery', lambda *_: {})
    args = common.parse(sb.make_parser(), [*TINY, '--seeds', '0', '1', '--out', str(tmp_path)])
    _, results = sb.study(args)
    assert 'reversed-s0' in results and 'reversed-s1' in results


def test_shares_kept_are_above_chance():
    """At chance nothing is kept, however low the natural accuracy."""
    ones = np.ones(100)
    assert sb.kept(0.1 * ones, 0.6 * ones, 10) == pytest.approx(0)
    assert sb.kept(0.6 * ones, 0.6 * ones, 10) == pytest.approx(1)
    assert sb.kept(0.35 * ones, 0.6 * ones, 10) == pytest.approx(0.5)
    assert math.isnan(sb.kept(0.5 * ones, 0.1 * ones, 10))


def test_given_networks_on_stimuli(tmp_path):
    """torchvision's architecture with random weights: the whole way without training."""
    folder = stimuli_folder(tmp_path, ('cat1-dog2', 'dog10-knife1', 'knife3-clock1', 'oven2-cat1'))
    sb.main(
        [
            '--arch',
            'alexnet',
            '--weights',
            'random',
            '--robust-weights',
            'random',
            '--cue-conflict-dir',
            str(folder),
            '--channels',
            '2',
            '--out',
            str(tmp_path),
        ]
    )
    (run,) = (tmp_path / 'shape_bias').iterdir()
    results = json.loads((run / 'results.json').read_text())
    assert results['arms'] == ['standard', 'robust'] and len(results['groups']) == 16
    assert str(tmp_path) not in (run / 'config.json').read_text()
    assert (run / 'fig15_stimuli.png').exists()
    assert 'V1' in (run / 'claims.md').read_text()


@pytest.mark.slow
def test_given_weights_are_judged_on_shapes(tmp_path):
    for name, seed in (('a', 0), ('b', 1)):
        model = common.make_model('lenet5', 10, (3, 32, 32), seed)
        torch.save(model.state_dict(), tmp_path / f'{name}.pt')
    sb.main(
        [
            '--arch',
            'lenet5',
            '--weights',
            str(tmp_path / 'a.pt'),
            '--robust-weights',
            str(tmp_path / 'b.pt'),
            '--test-size',
            '40',
            '--out',
            str(tmp_path),
        ]
    )
    (run,) = (tmp_path / 'shape_bias').iterdir()
    assert (run / 'fig9_dissection.png').exists() and not (run / 'fig14_reversed.png').exists()
