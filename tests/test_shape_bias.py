"""shape_bias.py: published decision counts, closed forms, foreign files, verdicts, a whole run."""
import argparse

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import common
import shape_bias as sb

X = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('shape, texture, other, bias', (  # Geirhos et al. 2019, 1,200 conflicts
    (283, 376, 541, 42.94), (228, 503, 469, 31.19), (130, 625, 445, 17.22), (182, 537, 481, 25.31),
    (84, 828, 288, 9.21), (162, 572, 466, 22.07), (586, 141, 473, 80.61), (488, 161, 551, 75.19)))
def test_shape_bias_of_the_published_decisions(shape, texture, other, bias):
    decisions = np.r_[np.zeros(shape), np.ones(texture), np.full(other, 2), np.zeros(80)]
    cues = np.zeros(1280), np.r_[np.ones(1200), np.zeros(80)]  # in the last 80 they agree
    by_cue = sb.by_cue(decisions, *cues)
    assert [v.sum() for v in by_cue] == [shape, texture]
    assert 100 * sb.shape_bias(*by_cue) == pytest.approx(bias, abs=0.005)

def test_categories_and_decisions_are_geirhos():
    sizes = [1, 4, 2, 49, 5, 7, 3, 6, 4, 3, 109, 2, 2, 1, 1, 8]
    assert [len(group) for group in sb.SIXTEEN.values()] == sizes
    assert len({i for group in sb.SIXTEEN.values() for i in group}) == 207
    p = torch.full((1, 1000), 1e-6)
    p[0, sb.SIXTEEN['bird']], p[0, sb.SIXTEEN['knife']] = 0.8 / 49, 0.1
    groups = list(sb.SIXTEEN.values())  # the sum would say bird, category 3
    assert sb.decide(p.log(), groups).item() == 13

def test_stimuli_in_any_case_are_read_and_strays_skipped(tmp_path, caplog):
    for name in ('cat1-dog2.png', 'CAT2-Air_Plane1.PNG', 'cat3-knife1.jpg', 'cat.png'):
        Image.new('RGB', (40, 40), 'red').save(tmp_path / name)
    (tmp_path / 'cat4-dog1.png').write_text('no image')
    caplog.set_level('INFO', 'advcnn')
    x, y = sb.read_stimuli(tmp_path, dict(airplane=[0], cat=[1], dog=[2]), 32, 2)
    assert x.shape == (2, 3, 32, 32) and y.tolist() == [[1, 0], [1, 2]]
    assert '2 images, 3 other files skipped' in caplog.text
    with pytest.raises(common.UserError, match='no images like'):
        sb.read_stimuli(tmp_path, dict(truck=[0]), 32, 2)

def test_view_algebra():
    views = {name: function for name, (function, _, _) in sb.VIEWS.items()}
    mean = X.mean((2, 3), keepdim=True).expand_as(X)
    wave = 0.5 + 0.2 * torch.cos(torch.arange(32) * 2 * torch.pi * 4 / 32).expand(1, 3, 32, 32)
    for name, level, x, expected in (  # the wave lies at 0.25
            ('contrast', 0.0, X, mean), ('low-pass', 2, X, X), ('high-pass', 2, X, mean),
            ('low-pass', 0.3, wave, wave), ('low-pass', 0.2, wave, 0.5 + 0 * wave)):
        assert torch.allclose(views[name](x, level), expected, atol=1e-5), (name, level)
    for k, order in sb.SCRAMBLED.items():
        assert set(order) == set(range(k * k)) and all(i != j for i, j in enumerate(order))
    assert torch.equal(sb.scramble(X, 2)[:, :, :16, :16], X[:, :, 16:, :16])  # patch 2 comes first
    assert views['noise'](X * 0 + 0.5, 0.08).std() == pytest.approx(0.08, rel=0.02)
    assert sb.total_variation(torch.eye(4)).item() == 12  # two diagonals of six steps, both ways
    assert sb.colour_of(torch.eye(3)[:, :, None, None]).flatten().tolist() == [2, 4, 6]

def test_iou_closed_form():
    masks = torch.zeros(20, 2, 10, 10, dtype=torch.bool)
    masks[:10, 0, :4, :5] = True  # a fifth of half of the images: 0.1 of all positions
    maps = torch.zeros(20, 3, 10, 10)
    maps[:10, 0, :4, :5] = maps[:, 1, :2, :5] = 1  # the mask; half of it, and other images
    iou = sb.dissect(maps + torch.rand(maps.shape) * 1e-3, masks, torch.tensor([0, 0]))
    assert torch.allclose(iou[3, :2, 0], torch.tensor([1.0, 0.5]))
    assert iou[:, :, 1].max() == 0
    pair = np.array([[0.5, 0.1, 0.1, 0.1], [0.5, 0.1, 0.4, 0.1], [0.03, 0.02, 0, 0]])
    assert sb.unit_labels(pair).tolist() == [0, -1, -1]  # detects, no lift, below the cut

def test_effective_number_of_input_types():
    label, peak = torch.arange(1000) % 10, torch.zeros(1000, 3)
    peak[:, 0] = (label == 3).float()  # one kind
    peak[:, 1] = torch.arange(1000.0)  # the last 50 images hold ten kinds five times
    expected = pytest.approx([1, 10, np.nan], nan_ok=True)  # the last is dead
    assert sb.input_types(peak, label).tolist() == expected

def test_zeroed_channels_and_hooks_go():
    model = common.make_model('small-cnn').eval()
    stages = sb.STAGES['small-cnn'].split()
    maps = sb.at_stages(model, stages, X, lambda a: a)
    assert torch.allclose(maps['stem'], model.net.stem(model.normalize(X)))
    plain = common.logits_of(model, X)
    with sb.without(model, 'stage3', [5]):
        expected = maps['stage3'].mean((2, 3))[:, [5]] * model.net.fc.weight[:, 5]
        assert torch.allclose(plain - common.logits_of(model, X), expected, atol=1e-5)
    assert torch.equal(common.logits_of(model, X), plain)

@pytest.mark.parametrize('arch, total', (  # channels, as the authors have them
    ('wrn-10-1', 128), ('alexnet', 1152), ('googlenet', 5808), ('resnet50', 3904)))
def test_every_stage_is_a_module(arch, total):
    model = common.make_model(arch, 10, (3, 64, 64))
    stages = next(v.split() for k, v in sb.STAGES.items() if arch.startswith(k))
    found = sb.at_stages(model, stages, torch.rand(1, 3, 64, 64), lambda a: a.amax((2, 3)))
    assert sum(v.shape[1] for v in found.values()) == total

def keys_of(arch, **options):
    options |= dict(init_weights=False) if arch == 'googlenet' else {}
    with torch.device('meta'):
        model = torchvision.models.get_model(arch.removesuffix('-imagenet'), **options)
    return list(model.state_dict())

def skeleton(keys):
    model = nn.Module()
    for *path, name in (f'net.{key}'.split('.') for key in keys):  # tensors of two numbers
        at = model
        for part in path:
            at.add_module(part, at._modules.get(part) or nn.Module())
            at = at._modules[part]
        at.register_buffer(name, torch.zeros(2))
    return model

def robustness(state, prefix='module.', inner='model.'):  # as MadryLab's library saves
    keys = {f'{prefix}{inner}{k}': v for k, v in state.items()}
    keys |= {f'{prefix}attacker.model.{k}': v + 1 for k, v in state.items()}
    return {'model': keys | {f'{prefix}normalizer.new_mean': torch.zeros(3, 1, 1)}, 'epoch': 3}

def weights(arch, **options):
    return {key: torch.full((2,), float(i)) for i, key in enumerate(keys_of(arch, **options))}

def renamed(state, old, new):
    return {k.replace(old, new): v for k, v in state.items()}

A, R, G = weights('alexnet'), weights('resnet50'), weights('googlenet', aux_logits=True)
FILES = {
    'torchvision': ('alexnet', A), 'auxiliary heads': ('googlenet', G),
    'DataParallel': ('resnet50', {'state_dict': {f'module.{k}': v for k, v in R.items()}}),
    'resnet18': ('resnet18-imagenet', robustness(weights('resnet18'))),
    'robustness': ('alexnet', robustness(A)), 'one process': ('alexnet', robustness(A, '')),
    'nested': ('resnet50', robustness(R, '_orig_mod.module.', 'model.model.')),
    'last_layer': ('alexnet', robustness(renamed(A, 'classifier.6', 'last_layer'))),
    'branch4_conv': ('googlenet', robustness(renamed(G, 'branch4.1', 'branch4_conv'))),
    'features.module': ('alexnet', {'state_dict': renamed(A, 'features.', 'features.module.')}),
    'numpy scalars': ('alexnet', robustness(A) | dict(best=np.float64(0.3), n=np.int64(2),
                                                      history=np.ones(3, np.float32))),
    'Namespace': ('alexnet', {'state_dict': A, 'args': argparse.Namespace(lr=0.1, arch='x')})}

def load_file(content, arch, tmp_path, monkeypatch):
    keys = [key for key in keys_of(arch) if not key.startswith('aux')]
    monkeypatch.setattr(common, 'make_model', lambda *_: skeleton(keys))
    torch.save(content, tmp_path / 'x.pt')
    return sb.load_network(str(tmp_path / 'x.pt'), arch)

@pytest.mark.parametrize('name', FILES)
def test_foreign_files_load(name, tmp_path, monkeypatch):
    arch, content = FILES[name]
    net = load_file(content, arch, tmp_path, monkeypatch).net
    loaded, source = net.state_dict(), G if arch == 'googlenet' else weights(arch)
    assert loaded.keys() == {k for k in source if not k.startswith('aux')}
    assert all(torch.equal(v, source[k]) for k, v in loaded.items())
    if arch == 'googlenet':  # torchvision's own weights want other means
        assert net.transform_input == (name == 'auxiliary heads')

@pytest.mark.parametrize('content, message', (
    ({'state_dict': {k: v for k, v in A.items() if k != 'features.0.bias'}},
     'features.0.bias .2,., in the file missing'),
    (A | {'head.bias': torch.zeros(2)}, 'head.bias is not known'), ([1, 2], '16 keys do not fit'),
    (A | {'classifier.6.bias': torch.zeros(10)}, r'classifier.6.bias .2,., in the file .10,.'),
    (dict(A, code=pytest.approx), 'cannot be read safely')))
def test_files_that_do_not_fit_say_why(content, message, tmp_path, monkeypatch):
    with pytest.raises(common.UserError, match=message) as error:
        load_file(content, 'alexnet', tmp_path, monkeypatch)
    assert 'fresh' not in str(error.value) and 'delet' not in str(error.value)

def made_up(s=0.2, r=0.8, decided=1.0, n=400):  # measures of S and R, share decided, images
    rng, y = np.random.default_rng(0), np.arange(n) % 10
    results = dict(config=dict(seeds=[0]), robust='eps', classes=list(range(10)), labels=y, runs={},
                   concepts=[['colour', 'red'], ['outline', 'disc']],
                   cues=dict(shape=y, texture=(y + 1) % 10))
    for arm, q in (('standard', s), ('eps', r)):
        colour = (np.arange(100) < 100 * q).astype(float)
        iou = np.stack([colour, 1 - colour, 0 * colour, 0 * colour], 1)
        right = rng.random((5, n)) < [[0.1 + 0.8 * q], [0.9 - 0.8 * q], [q], [0.95], [decided]]
        views = dict.fromkeys(('flat fill', 'silhouettes', 'low-pass'), right[:1])
        views |= dict.fromkeys(('scrambled', 'contrast'), right[1:2])
        results['runs'][arm] = {'s0': dict(
            natural=right[3], attacked=rng.random(n) < 0.6 * (arm == 'eps'), views=views,
            conflict=np.where(right[4], np.where(right[2], y, (y + 1) % 10), (y + 2) % 10),
            tv=1.0 - q + 0 * colour, map_tv={'a': np.stack((0 * colour + 1, 2 - colour))},
            iou={'a': np.repeat(iou[None], 5, 0)}, lost={'a': np.stack((colour, 1 - colour))},
            types={'joint': {'a': 1.0 - q * 0.9 + 0 * colour}})}
    return results

def verdicts(results, tmp_path):
    common.judge(sb.claims(results), results, tmp_path)
    return [row['verdict'] for row in results['claims']]

def test_verdicts_true_and_false(tmp_path):
    results = made_up(0.1, 0.9)
    assert verdicts(results, tmp_path) == 12 * ['supported']
    s, r = (run['s0'] for run in results['runs'].values())
    for name in s.keys() - {'natural', 'attacked'}:
        s[name], r[name] = r[name], s[name]
    assert verdicts(results, tmp_path) == ['supported'] + 11 * ['contradicted']

def test_verdicts_that_say_nothing(tmp_path):
    assert all('coverage' in v for v in verdicts(made_up(decided=0.3), tmp_path))
    weak = made_up()
    weak['runs']['eps']['s0']['attacked'][:] = False
    found = verdicts(weak, tmp_path)
    assert found[0] == 'contradicted' and set(found[2:]) == {'uninformative: R fails the gate'}
    assert verdicts(made_up(s=0.45, r=0.51), tmp_path)[2] == 'inconclusive'  # another seed may, too
    assert '40 conflicts decided' in verdicts(made_up(n=40), tmp_path)[2]

@pytest.fixture
def small(monkeypatch):
    for name, value in dict(PROBES=100, DISSECTED=20, ABLATED=(20, 1)).items():
        monkeypatch.setattr(sb, name, value)

def test_the_whole_study(small, tmp_path):
    sb.main(f'--arch lenet5 --train-size 100 --test-size 20 --epochs 1 --out {tmp_path} --ladder'
            .split())
    folder = next((tmp_path / 'shape_bias').iterdir())
    assert len(list(folder.glob('fig*.png'))) == 4
    cues = common.load_results(folder)['cues']  # all 90 pairs, equally often
    pairs = np.bincount(10 * cues['shape'] + cues['texture'], minlength=100).reshape(10, 10)
    assert (pairs == 10 - 10 * np.eye(10)).all()
    sb.main(['--plot-only', str(folder)])

def test_an_imagenet_pair_names_itself(small, tmp_path):
    for name in ('S', 'R'):
        net = torchvision.models.resnet18(num_classes=1000)
        torch.save(robustness(net.state_dict()), tmp_path / f'{name}.pt')
    for name in ('cue/cat1-dog1.PNG', 'cue/dog2-oven1.png', 'edges/cat1.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.effect_noise((224, 224), 90).convert('RGB').save(tmp_path / name)
    sb.main(f'--arch resnet18-imagenet --weights {tmp_path}/S.pt --robust-weights {tmp_path}/R.pt '
            f'--cue-conflict-dir {tmp_path}/cue --out {tmp_path}/out'.split())
    assert list(tmp_path.glob('out/shape_bias/S-R-resnet18-imagenet*/claims.md'))
