"""Splits, crops, class folders, real files; and `shapes`, which is frozen, against geometry."""
import hashlib
import math
import os
import platform

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import utils

import common

BAR, RAMP = np.arange(90) * np.ones((60, 1)), np.linspace(0, 65535, 3600).reshape(60, 60)

def load(name, *flags):
    argv = ['--dataset', name, *map(str, flags)]
    args = common.parse(common.make_parser('', None, argv), argv)
    return common.load_data(args, torch.device('cpu'))

def class_folders(root, **splits):
    """Flags for root/split/class/*.png of {class: number of images}; red is the class."""
    for split, classes in splits.items():
        for red, (name, n) in enumerate(classes.items()):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new('RGB', (8, 8), (red, i, 0)).save(root / split / name / f'{i}.png')
    return f'folder:{root}', '--image-size', 8

def test_no_image_is_in_two_splits_and_a_small_class_keeps_its_own(caplog):
    data = load('shapes', '--train-size', 100, '--test-size', 120)
    x = torch.cat([pair[0] for pair in (data.train, data.val, data.test)])
    assert len(x.flatten(1).unique(dim=0)) == len(x) == 100 + 20 + 120
    y = torch.tensor([0] * 203 + [1] * 3)
    train, val = common.split_off(y, ['many', 'scarce'], 9)
    assert torch.equal(torch.cat((train, val)).sort()[0], torch.arange(206))
    assert 2 <= y[val].bincount()[0] <= 101 and y[val].bincount()[1] == 1
    assert 'scarce' in caplog.text and 'many' not in caplog.text

def test_subsets_are_balanced_and_the_same_for_every_seed(tmp_path):
    y = torch.tensor([0] * 50 + [1] * 50 + [2] * 20)
    order = common.balanced_order(y)
    assert len(order.unique()) == 120
    for n in range(1, 121):  # every prefix; class 2 runs out after 60
        counts = y[order[:n]].bincount(minlength=3)
        assert counts.max() - counts[:2].min() <= 1 and counts[2] >= min(20, n // 3)
    some = class_folders(tmp_path, train=dict(a=30, b=10, c=20), test=dict(a=9, b=9, c=9))
    one, two = (load(*some, '--train-size', 15, '--test-size', 6, '--seeds', n) for n in (0, 7))
    assert (one.digest, one.test_digest) == (two.digest, two.test_digest)
    assert [pair[1].bincount().tolist() for pair in (one.train, one.test)] == [[5] * 3, [2] * 3]

def test_digests_are_those_of_pixels_labels_and_class_names():
    def made(split='', index=0, name='b'):
        pairs = {k: (torch.zeros(4, 1, 2, 2).byte(), torch.tensor([0, 1, 0, 1]))
                 for k in ('train', 'val', 'test')}
        if split:
            pairs[split][index][3] += 1
        return common.Data('any', ['a', name], **pairs)
    changed = [made(split, index) for split in ('train', 'val') for index in (0, 1)]
    assert len({data.digest for data in (made(), made(name='c'), *changed)}) == 6
    for data in made('test', 0), made('test', 1):
        assert data.digest == made().digest and data.test_digest != made().test_digest

@pytest.mark.parametrize('flip', (False, True))
def test_crops_and_flips_of_one_image_after_the_other(flip):
    x = torch.randint(1, 256, (40, 3, 5, 7), dtype=torch.uint8)
    out = common.augment(x, 2, flip, torch.Generator().manual_seed(3))
    draw = torch.Generator().manual_seed(3)
    top, left = torch.randint(5, (2, 40), generator=draw)
    mirrored = torch.rand(40, generator=draw) < 0.5
    for i, canvas in enumerate(torch.nn.functional.pad(x, (2, 2, 2, 2))):
        image = canvas[:, top[i]:top[i] + 5, left[i]:left[i] + 7]
        assert torch.equal(out[i], image.flip(2) if flip and mirrored[i] else image)

def test_saturate_and_permute_patches():
    x, order = torch.rand(4, 3, 6, 6), torch.rand(4, 9).argsort(1)
    assert torch.allclose(common.saturate(x, 2), x, atol=1e-6)
    assert torch.allclose(common.saturate(x, 1e9), (x > 0.5).float(), atol=1e-4)
    assert common.saturate(torch.tensor(0.25), 1).item() == 0.375  # 1/2 - (1/2)^2 / 2
    assert torch.equal(common.permute_patches(x, torch.arange(9)), x)
    shuffled = common.permute_patches(x, order)
    assert torch.equal(common.permute_patches(shuffled, order.argsort(1)), x)
    image, order = torch.tensor([[[[1, 1, 2, 2], [3, 3, 4, 4]]]]), torch.tensor([1, 2, 3, 0])
    assert common.permute_patches(image, order).tolist() == [[[[2, 2, 3, 3], [4, 4, 1, 1]]]]

def plain(mode, value):
    return Image.new(mode, (6, 6), value)

CYAN, TURNED = plain('RGB', 'cyan').quantize(), Image.Exif()
TURNED[0x0112] = 6  # what is stored on the left is shown on top

@pytest.mark.parametrize('name,image,options,mean,upper', (  # upper half; of the red
    ('a.png', plain('RGB', (200, 9, 9)), {}, 200, 200), ('a.jpg', plain('L', 90), {}, 90, 90),
    ('hidden.png', plain('RGBA', (0, 9, 9, 0)), {}, 255, 255),
    ('half.PNG', plain('LA', (0, 128)), {}, 127, 127),
    ('palette.png', CYAN, dict(transparency=0), 255, 255),
    ('ramp.png', Image.fromarray(RAMP.astype(np.uint16)), {}, 127.5, 63.7),
    ('wide.png', Image.fromarray((BAR // 15 % 5 > 0) * np.uint8(255)), {}, 255, 255),
    ('turned.jpg', Image.fromarray((BAR < 45) * np.uint8(255)), dict(exif=TURNED), 127.5, 255),
    ('float.tiff', plain('F', 0.5), {}, None, 0), ('int32.tiff', plain('I', 70000), {}, None, 0),
    ('cut.png', plain('L', 9), {}, None, 0)))
def test_pictures_as_they_look_or_refused_by_name(name, image, options, mean, upper, tmp_path):
    image.save(tmp_path / name, **options)
    if name == 'cut.png':
        os.truncate(tmp_path / name, 40)
    if mean is None:
        with pytest.raises(common.UserError, match=name):
            common.read_image(tmp_path / name, 60)
    else:
        red = common.read_image(tmp_path / name, 60)[0].float()
        assert (red.mean(), red[:30].mean()) == pytest.approx((mean, upper), abs=2)

def test_hidden_files_unlabelled_tests_and_names_beyond_ascii(tmp_path):
    folder = class_folders(tmp_path, train=dict(a=4, é=4), val=dict(a=2, é=2), test={'': 1, 'x': 2})
    for hidden in '.DS_Store', '.ipynb/a.png', '__MACOSX/a.png', 'a/._0.png', 'a/.ipynb/a.png':
        (tmp_path / 'train' / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'train' / hidden).write_bytes(b'no image')
    data = load(*folder)
    assert data.classes == ['a', 'é'] and len(data.train[1]) == len(data.test[1]) == 4
    assert (data.train[0][:, 0] == data.train[1][:, None, None]).all()

@pytest.mark.parametrize('name,trust,n,labels,mean', (  # first labels and means: well known
    ('mnist', [], 60000, [5, 0, 4, 1, 9], [.1307]),
    ('cifar10', ['--trust-data'], 50000, [6, 9, 9, 4, 1], [.4914, .4822, .4465]),
    ('svhn', ['--trust-data'], 783, [1, 9, 2, 3, 2], [.4377, .4438, .4728])))  # a part
def test_real_files(name, trust, n, labels, mean, real_data, monkeypatch):
    module = f'torchvision.datasets.{name.rstrip("10")}.'  # what is replaced comes back
    monkeypatch.setattr(module + 'check_integrity', utils.check_integrity)
    flags = name, '--data-root', real_data / ('svhn-train-prefix' * (name == 'svhn'))
    if trust:
        with pytest.raises(common.UserError, match='--trust-data'):
            load(*flags)
    data = load(*flags, *trust, '--test-size', 100)
    (x, y), held = data.train, data.val[1].bincount(minlength=10)
    assert len(y) + held.sum() == n and held.min() == held.max() > 1
    assert y[:5].tolist() == labels and data.test[1].bincount().tolist() == [10] * 10
    assert (x.double().mean((0, 2, 3)) / 255).tolist() == pytest.approx(mean, abs=0.02)

@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='may round otherwise')
def test_shapes_are_frozen():
    images = [common.make_shapes(20, 'test', size)[0].numpy() for size in (32, 48)]
    found = [hashlib.sha256(x).hexdigest()[:16] for x in images]
    assert found == ['56809edb7a2cf5ff', '139ab50ad57f8c49']

AREAS = {'disc': math.pi * 0.9**2, 'ring': math.pi * (0.92**2 - 0.44**2), 'bar': 0.72 * 2,
         'triangle': 3 * 3**0.5 / 4, 'star': 5 * 0.42 * math.sin(math.pi / 5)}

def test_shapes_are_textured_figures_of_known_area_drawn_differentiably():
    drawn = common.render_shapes(p := common.shape_parameters(10, torch.Generator()), 128)
    areas = drawn['mask'].sum((1, 2, 3)) * (2 / 128 / p['radius'])**2
    for name, area in zip(common.OUTLINES, areas.tolist()):
        assert area == pytest.approx(AREAS.get(name, area), rel=0.02), name
    for value, same in ((1, 'filled'), (0, 'flat')):
        where = (drawn['mask'] == value).expand_as(drawn['image'])
        assert torch.equal(drawn['image'][where], drawn[same][where])
    assert (drawn['edge'] > 0)[(drawn['mask'] > 0) & (drawn['mask'] < 1)].all()
    p = {k: v.double() if v.is_floating_point() else v for k, v in p.items()}
    render = lambda at: common.render_shapes(p | dict(center=at), 6)['image'].sum((1, 2, 3))
    assert torch.autograd.gradcheck(render, p['center'].requires_grad_(), atol=1e-4)
