"""Models against the literature's sizes, folding against the plain layers, checkpoints."""

import pytest
import torch

import common


@pytest.mark.parametrize(
    'arch,shape,parameters',
    (
        ('resnet18', (3, 32, 32), 11.17e6),  # the usual CIFAR ResNet-18: 11,173,962
        ('preact-resnet18', (3, 32, 32), 11.17e6),
        ('wrn-28-10', (3, 32, 32), 36.5e6),  # Zagoruyko & Komodakis 2016
        ('wrn-34-10', (3, 32, 32), 46.2e6),  # Madry et al. 2018, Zhang et al. 2019
        ('wrn-10-1', (3, 32, 32), 77.9e3),  # Zhang et al. 2022: about 78 k
        ('lenet5', (1, 28, 28), 44426),
        ('small-cnn', (3, 32, 32), 143.6e3),
        ('small-cnn-64', (3, 32, 32), 563.8e3),  # ours
        ('resnet50', (3, 224, 224), 25.56e6),
        ('alexnet', (3, 224, 224), 61.1e6),
    ),
)
def test_parameter_counts(arch, shape, parameters):
    classes = 1000 if shape[1] == 224 else 10
    model = common.make_model(arch, classes, shape)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(parameters, rel=2e-3)


def shaken(arch, shape):
    """A model whose batch norms have seen data, as after training."""
    model = common.make_model(arch, 10, shape)
    g = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2, generator=g)
            m.running_var.uniform_(0.5, 2, generator=g)
            m.weight.data.uniform_(0.5, 1.5, generator=g)
            m.bias.data.normal_(0, 0.2, generator=g)
    return model.double().eval()


@pytest.mark.parametrize('arch', ('small-cnn', 'resnet18', 'preact-resnet18', 'wrn-10-1'))
def test_folded_batch_norm_equals_the_plain_layers(arch, monkeypatch):
    model = shaken(arch, (3, 32, 32))
    x = torch.rand(4, 3, 32, 32, dtype=torch.double, requires_grad=True)

    def logits_and_gradient():
        logits = model(x)
        return logits, torch.autograd.grad(logits.square().sum(), x)[0]

    folded = logits_and_gradient()
    monkeypatch.setattr(common, 'conv_bn', lambda x, conv, bn: bn(conv(x)))
    for a, b in zip(folded, logits_and_gradient()):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    'arch,shape',
    (
        ('small-cnn', (1, 28, 28)),
        ('small-cnn', (3, 96, 96)),
        ('lenet5', (3, 32, 32)),
        ('wrn-10-1', (3, 96, 96)),
        ('resnet18', (1, 28, 28)),
        ('googlenet', (3, 64, 64)),
    ),
)
def test_models_take_the_sizes_of_the_data_sets(arch, shape):
    model = common.make_model(arch, 7, shape).eval()
    assert model(torch.rand(2, *shape)).shape == (2, 7)
    if arch == 'lenet5':
        with pytest.raises(common.UserError, match='pixels'):
            common.make_model(arch, 7, (3, 20, 20))


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    a = common.make_model('small-cnn', seed=3).state_dict()
    state = torch.random.get_rng_state()
    b = common.make_model('small-cnn', seed=3).state_dict()
    c = common.make_model('small-cnn', seed=4).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a['fc.weight'], c['fc.weight'])


def test_normalisation_is_the_first_layer():
    layer = common.Normalize([0.2, 0.4, 0.6], [0.1, 0.2, 0.5])
    x = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.1, 0.2, 0.5])
    expected = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert 'normalize.scale' not in common.make_model('resnet18').state_dict()


@pytest.mark.parametrize(
    'wrap',
    (
        lambda s: s,
        lambda s: {'state_dict': s},
        lambda s: {'model': s, 'epoch': 3},
        lambda s: {'state_dict': {'module.' + k: v for k, v in s.items()}},
        lambda s: {'model': {'_orig_mod.' + k: v for k, v in s.items()}},
        lambda s: {
            'model': {'module.model.' + k: v for k, v in s.items()}
            | {'module.attacker.model.' + k: v + 1 for k, v in s.items()}
        },
    ),
)
def test_foreign_checkpoints_load(wrap, tmp_path):
    source = common.make_model('lenet5', 10, (1, 28, 28), seed=1)
    torch.save(wrap(source.state_dict()), tmp_path / 'm.pt')
    model = common.make_model('lenet5', 10, (1, 28, 28), seed=2, weights=tmp_path / 'm.pt')
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(model(x), source(x))
