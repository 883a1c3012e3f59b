"""Dimples: does a decision boundary cling to the data's manifold and bend only a little around it?

Question   The model says: training first brings the boundary close to the data's low-dimensional
           manifold M (clinging), then pushes shallow dimples into it around the training points;
           so perturbations are short and perpendicular to M. Is it so, beyond counting dimensions?
Paper      Shamir, Melamed, BenShmuel. The dimpled manifold model of adversarial examples in
           machine learning. arXiv 2106.10151, 2021 (v2 2022)
Usage      python dimpled_manifold.py                  shapes, minutes on a laptop
           python dimpled_manifold.py --dataset mnist  (cifar10: ResNet-18, one GPU)

Expect     shapes, three seeds, ten networks on points: 220 s of CPU for one seed.
           Points, n = 30: the boundary comes within .26 half-gaps of them before the fit, where it
           is a whole sheet, .49 deep (both in six of ten networks). n = 3: .7, torn, 1.5. R^30 is
           ours (the official film is not reproduced): some 45 settings of optimiser, gain, depth,
           width and points at n = 3 gave no dimples, then n = 5 to 100 were tried. Gradients: .94
           across the plane, chance .97. Adversarial training at .01 half-gaps doubles the depth,
           from .025 on it tears the sheet.
           Images: staying off T costs nothing, but T is dearer than a random subspace only for the
           autoencoder's T and the standard network (5.1 times); .94 for the renderer's true T, .94
           and .39 for PGD-AT. The part off T of wrong-label images teaches as much as the whole.
           MNIST (--train-size 10000 --test-size 1000 --epochs 5 --steps 7 --step-size 0.1 --images
           100 --ae-epochs 20 --attack-steps 25 --wrong-steps 10: 9.4 minutes of CPU), standard: off
           T 1.04 x free, in T 3.10 x (Karner 1.08, 3.15), .40 x a random subspace.
"""
import io
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
from common import METHOD_NAMES, Claim

# latent: MNIST's and CIFAR-10's after Karner. wrong_eps: 0.5 is usual on CIFAR-10; elsewhere an l2
# radius at which the first network takes nearly all images for their wrong labels.
DEFAULTS = {
    '*': dict(latent=128, ae_epochs=100, images=1000, attack_steps=40, replicas=10,
              point_steps=1500, wrong_eps=0.5, wrong_steps=40),
    'shapes': dict(latent=16, ae_epochs=20, images=100, attack_steps=25, wrong_eps=2.0,
                   wrong_steps=10),
    'mnist': dict(latent=16, ae_epochs=30, images=200, wrong_eps=2.0),
    'folder': dict(image_size=64)}  # Jacobians of larger images would not fit into memory
REPRODUCED = {  # github.com/LukasKarner/dimpled-manifolds; ours are medians
    'mnist': 'Karner, means of ten images: in T / free 3.15, off T / free 1.08',
    'cifar10': 'Karner, means of ten images: in T / free 5.79, off T / free 1.09'}

# Points; a half-gap is half the distance of neighbours.
DIMENSIONS, CHOSEN, CONTROL = (3, 5, 10, 30, 100), 30, 3
SIDE, OFFSET, WIDTH, POINT_LR = 5, 4.0, 100, 3e-4
AT_DIMENSION, AT_EPS = 100, (0.01, 0.025, 0.05, 0.1)  # half-gaps
HALF_GAP, REACH = 0.5, 2.0  # boundaries are looked for within +-REACH of the plane
MARKS, SHOWN = 30, (0, 100, 200, 400, 1500)  # probes of a training; steps of figure 1

# Thresholds of the claims, chosen before n = 30 was.
CLING, SHEET, SHALLOW, ACROSS = 0.4, 0.95, 0.5, 0.9  # half-gaps, share, half-gaps, share
DEEPER, AT_SHEET = 1.5, 0.9  # ratio of depths, share of normals that the boundary crosses once
ANGLE, OFF_FREE, DIP, TEACHES = 75.0, 1.25, 0.2, 0.8  # degrees, ratio, share, share
BEATEN, PAPER = 0.05, 'Shamir et al. 2021'  # share of images whose free attack is not the shortest

# ------------------------------------------------------------------------ Networks on points

def chessboard(n, seeds):
    """Points (S, 25, n), labels +-1 (25,) and orthonormal frames (S, n, 3): a chessboard,
    neighbours 1 apart, on a random plane along the first two, moved OFFSET along the third."""
    frames = torch.stack([torch.linalg.qr(torch.randn(
        n, 3, generator=common.make_generator('plane', n, seed)))[0] for seed in seeds])
    at = square_grid(SIDE)
    return on_plane(frames, at), at.sum(1) % 2 * 2 - 1, frames

def square_grid(places):
    """Places (places^2, 2) on the square that the points fill, neighbouring points 1 apart."""
    axis = torch.linspace(-(SIDE // 2), SIDE // 2, places)
    return torch.cartesian_prod(axis, axis)

def on_plane(frames, at):
    """Places (N, 2) -> points of each plane (S, N, n)."""
    return at @ frames[..., :2].mT + OFFSET * frames[:, None, :, 2]

def make_nets(n, seeds):
    """Perceptrons n-100-100-1 at PyTorch's initialisation, stacked so that a batched product runs
    all: [weights (S, in, out), biases (S, 1, out), ...]."""
    generators, nets = [common.make_generator('net', n, seed) for seed in seeds], []
    for a, b in zip((n, WIDTH, WIDTH), (WIDTH, WIDTH, 1)):
        for rows in (a, 1):
            draws = [2 * torch.rand(rows, b, generator=g) - 1 for g in generators]
            nets.append((torch.stack(draws) / a**0.5).requires_grad_())
    return nets

def scores(nets, x):
    """Scores (S, N) of networks at points (S, N, n); the boundary is where one is 0."""
    for i in (0, 2):
        x = torch.baddbmm(nets[i + 1], x, nets[i]).relu()
    return torch.baddbmm(nets[5], x, nets[4])[..., 0]

def score_gradients(nets, x):
    """(scores (S, N), their gradients (S, N, n)), detached."""
    x = x.detach().requires_grad_()
    value = scores(nets, x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]

@torch.no_grad()
def heights(nets, frames, normals, at, places=41):
    """(height (S, N) of the boundary nearest to the plane at the places (N, 2), half-gaps, REACH
    where there is none; how often (S, N) it crosses the normal there)."""
    height = torch.linspace(-REACH, REACH, places)
    line = on_plane(frames, at)[:, :, None] + height[:, None] * normals[:, None, None]
    value = scores(nets, line.flatten(1, 2)).unflatten(1, (len(at), places))
    left, right = value[..., :-1], value[..., 1:]
    crosses = (left > 0) != (right > 0)
    zero = torch.where(crosses, height[:-1] + height.diff() * left / (left - right), REACH)
    nearest = zero.gather(-1, zero.abs().argmin(-1, keepdim=True))[..., 0]
    return nearest / HALF_GAP, crosses.sum(-1)

def probe(nets, x, y, frames):
    """Measures of each network (S, ...): right, points; distance, median over the points of
    |score| / |gradient|, half-gaps; share, mean of |gradient across the plane| / |gradient|;
    height (S, 9, 9) of the boundary, at every second place a point, and crossings; and slice, the
    first network's scores around the middle row of points."""
    (value, gradient), plane = score_gradients(nets, x), frames[..., :2]
    size, across = gradient.norm(dim=-1), gradient - gradient @ plane @ plane.mT
    normal = F.normalize(across.mean(1), dim=-1)
    height, crossings = (v.unflatten(1, (2 * SIDE - 1,) * 2) for v in heights(
        nets, frames, normal, square_grid(2 * SIDE - 1)))
    along, up = torch.linspace(-2.6, 2.6, 79), torch.linspace(-REACH, REACH, 61)
    row = on_plane(frames[:1], torch.stack((along, 0 * along), 1))
    cut = (row[:, :, None] + up[:, None] * normal[:1, None, None]).flatten(1, 2)
    return dict(right=(value * y > 0).sum(1), share=(across.norm(dim=-1) / size).mean(1),
                distance=(value.abs() / size).median(1)[0] / HALF_GAP, height=height,
                crossings=crossings, slice=scores([p[:1] for p in nets], cut).view(79, 61))

def train_points(n, eps, args):
    """Adam, full batch, logistic loss; eps > 0 (half-gaps): on a single-step l2 attack, from the
    same initial weights. {'step': (M,), and each measure of `probe` with M in front}."""
    x, y, frames = chessboard(n, range(args.replicas))
    nets, found = make_nets(n, range(args.replicas)), {}
    optimizer = torch.optim.Adam(nets, POINT_LR)
    for step in range(args.point_steps + 1):
        if step % max(1, args.point_steps // MARKS) == 0:
            for name, value in (probe(nets, x, y, frames) | dict(step=torch.tensor(step))).items():
                found.setdefault(name, []).append(value.detach().numpy())
        points = x
        if eps:
            gradient = score_gradients(nets, x)[1]
            points = x - eps * HALF_GAP * y[:, None] * F.normalize(gradient, dim=-1)
        loss = F.softplus(-y * scores(nets, points)).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: np.stack(values) for name, values in found.items()}

# ---------------------------------------------------------------------------------- Tangents

class Autoencoder(nn.Module):
    """Three strided convolutions to `latent` numbers and back; its range is our M. Smooth, so that
    the decoder has a Jacobian everywhere. Images (N, C, S, S), any S from 8 on."""
    def __init__(self, shape, latent, width=16):
        super().__init__()
        (channels, self.size, _), (a, b, c) = shape, (width, 2 * width, 4 * width)
        low, high = self.size // 8, -(-self.size // 8)
        self.encode = nn.Sequential(
            nn.Conv2d(channels, a, 4, 2, 1), nn.SiLU(), nn.Conv2d(a, b, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(b, c, 4, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(c * low**2, latent))
        self.up = nn.Sequential(
            nn.Linear(latent, c * high**2), nn.Unflatten(1, (c, high, high)), nn.SiLU(),
            nn.ConvTranspose2d(c, b, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(b, a, 4, 2, 1),
            nn.SiLU(), nn.ConvTranspose2d(a, channels, 4, 2, 1), nn.Sigmoid())

    def decode(self, z):
        return self.up(z)[..., : self.size, : self.size]

    def forward(self, x):
        return self.decode(self.encode(x - 0.5))

def train_autoencoder(args, data, seed, device):
    """Adam on the mean square error, or what is trained already. In eval mode."""
    recipe = [args.latent, args.ae_epochs, args.batch_size, seed, data.digest]
    path = Path(args.out, 'models', f'autoencoder-{common.digest(recipe)}.pt')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Autoencoder(data.shape, args.latent).to(device)
    if path.exists() and not args.fresh:
        model.load_state_dict(common.read_checkpoint(path))
        return model.eval().requires_grad_(False)
    optimizer, net = torch.optim.Adam(model.parameters(), 4e-3), common.spread(model, device)
    plain, n = replace(data, pad=0, flip=False), max(1, len(data.train[1]) // args.batch_size)
    for epoch in range(args.ae_epochs):
        batches = common.train_batches(plain, args.batch_size, seed, epoch,
                                       common.make_generator(device=device))
        for i, (x, _) in enumerate(batches):
            progress = (epoch + i / n) / args.ae_epochs
            optimizer.param_groups[0]['lr'] = 4e-3 * common.lr_factor('onecycle', progress)
            loss = F.mse_loss(net(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    common.save(path, partial(torch.save, model.state_dict()))
    x = common.to_float(data.val[0])
    error = F.mse_loss(model.requires_grad_(False)(x), x).item()
    common.log.info('autoencoder of %d dimensions: square error %.4f', args.latent, error)
    return model.eval()

def decoder_jacobian(decode, z):
    """(N, D, k): derivatives of the decoded images by each latent of z (N, k)."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # torch's own, at the first jvp
        return torch.stack([torch.func.jvp(decode, (z,), (way.expand_as(z),))[1].flatten(1)
                            for way in torch.eye(z.shape[1]).to(z)], 2)

def renderer_jacobian(params, size, step=1e-5):
    """(N, D, k): derivatives of shapes' images, without noise, by every continuous parameter (0 by
    those that an image does not show). Central differences in float64: error about 1e-9."""
    params = {k: v.double() if v.is_floating_point() else v for k, v in params.items()}
    columns, discrete = [], ('outline', 'texture', 'texture_colour')  # the last: +-1
    for name, value in params.items():
        for place in range(value[0].numel() * (name not in discrete)):
            change = torch.zeros_like(value)
            change.view(len(value), -1)[:, place] = step
            above, below = (common.render_shapes(params | {name: moved}, size)['image']
                            for moved in (value + change, value - change))
            columns.append(((above - below) / (2 * step)).flatten(1).float())
    return torch.stack(columns, 2)

def orthonormal(columns, cut=1e-3):
    """Orthonormal bases (N, D, k) of the ranges of (N, D, k); directions whose singular value is
    below cut x the largest are columns of zeros."""
    q, r = torch.linalg.qr(columns.double())
    u, sigma, _ = torch.linalg.svd(r)
    return (q @ u * (sigma > cut * sigma[:, :1])[:, None]).float()

def random_like(basis, generator):
    """A random subspace (N, D, k) for each image, of the same dimension as its tangent space."""
    noise = torch.randn(basis.shape, generator=generator, device=basis.device)
    return orthonormal(noise) * basis.square().sum(1, keepdim=True)

def onto(v, basis):
    """U U' v for v (N, D) and U (N, D, k)."""
    return (basis @ (basis.mT @ v[..., None]))[..., 0]

ARMS = {  # the part of v (N, D) that may be used; T: tangent bases (N, D, k), R: random ones
    'free': lambda v, T, R: v, 'on': lambda v, T, R: onto(v, T),
    'off': lambda v, T, R: v - onto(v, T), 'random': lambda v, T, R: onto(v, R)}

# ------------------------------------------------------------------------------ Perturbations

@torch.no_grad()
def shortest(score, x, project, steps, halvings=12):
    """The shortest l2 perturbation found within a subspace that leaves the predicted class:
    (delta (N, D), norm (N,), inf where none was found). score: (N, D) -> logits; project: (N, D)
    -> its part in the subspace.
    Steps to where the linearised margin vanishes (as DeepFool, to the likeliest class), each at
    most 1 % of the diagonal of [0, 1]^D, then bisection. Exact on a linear boundary. Not kept in
    [0, 1]: a small subspace would lose its directions."""
    own, delta, cap = score(x).argmax(1), torch.zeros_like(x), 0.01 * x.shape[1] ** 0.5
    fooled = torch.zeros_like(own, dtype=torch.bool)
    for _ in range(steps):
        _, value, whole = common.input_gradient(score, x + delta, own, common.margin)
        gradient = project(whole)
        length = gradient.norm(dim=1, keepdim=True)
        move = (1e-5 - 1.02 * value[:, None] / length.clamp(min=1e-12)).clamp(max=cap)
        blind = length < 1e-5 * whole.norm(dim=1, keepdim=True)  # rounding, no direction
        move = torch.where(blind | fooled[:, None], 0.0, move)
        delta = delta + move * F.normalize(gradient, dim=1)
        fooled = score(x + delta).argmax(1) != own
        if fooled.all():
            break
    low, high = torch.zeros_like(x[:, :1]), torch.ones_like(x[:, :1])
    for _ in range(halvings):
        middle = (low + high) / 2
        fools = (score(x + middle * delta).argmax(1) != own)[:, None]
        low, high = torch.where(fools, low, middle), torch.where(fools, middle, high)
    return high * delta, torch.where(fooled, (high * delta).norm(dim=1), torch.inf)

# -------------------------------------------------------------------------------- Experiment

def study(args, folder, device, data, results):
    """Networks on points, then on images; everything is saved as soon as it is there."""
    measure, threads = partial(common.measure, results, folder=folder), torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
    for n in DIMENSIONS:
        measure(('points', f'n{n}'), function=lambda: train_points(n, 0.0, args))
    for eps in AT_EPS:
        measure(('robust', f'eps{eps}'), function=lambda: train_points(AT_DIMENSION, eps, args))
    torch.set_num_threads(threads)
    kept = sorted({0} | {round(epoch) for epoch in np.geomspace(1, args.epochs, 8)})
    for seed in args.seeds:
        encoder = train_autoencoder(args, data, seed, device)
        for method, keep in dict(standard=kept, pgd=()).items():
            run = ('runs', method, f's{seed}')
            trained = common.train(args, data, method, seed, device, keep=keep)
            model = common.restore(trained, 'best', args, data, device).requires_grad_(False)
            measure((*run, 'history'), function=lambda: trained['history'])
            measure((*run, 'spaces'),
                    function=lambda: measure_images(args, data, model, encoder, seed))
            if method == 'standard':
                measure((*run, 'training'), function=lambda: watch_training(
                    args, data, trained, encoder, device))
                measure((*run, 'labels'), function=lambda: wrong_labels(
                    args, data, model, encoder, seed, device))

@torch.no_grad()
def encoded_space(x, encoder):
    """(images (N, D), orthonormal bases (N, D, k) of T at their reconstructions)."""
    x = common.to_float(x).contiguous()
    return x.flatten(1), orthonormal(decoder_jacobian(encoder.decode, encoder.encode(x - 0.5)))

@torch.no_grad()
def measure_images(args, data, model, encoder, seed, block=50):
    """{space: {measure: (N,)}} of test images: for each of ARMS the norm of the shortest
    perturbation; the free one's angle to T and (chance) to a random subspace, degrees; right, or
    misread. Shapes also without noise, exactly on their M, with the renderer's T."""
    (images, labels), size, found = data.test, data.shape[1], {}
    score = lambda v: model(v.view(-1, *data.shape))
    for rows in torch.arange(min(args.images, len(labels))).split(block):
        here = slice(rows[0], rows[-1] + 1)
        spaces = {'autoencoder': encoded_space(images[here], encoder)}
        if data.name == 'shapes':
            params = common.make_shapes(len(labels), 'test', size)[2]
            params = {name: value[here].to(images.device) for name, value in params.items()}
            spaces['renderer'] = (common.render_shapes(params, size)['image'].flatten(1),
                                  orthonormal(renderer_jacobian(params, size)))
        for space, (x, T) in spaces.items():
            R = random_like(T, common.make_generator(space, seed, int(rows[0]), device=x.device))
            deltas = {arm: shortest(score, x, partial(project, T=T, R=R), args.attack_steps)
                      for arm, project in ARMS.items()}
            out = {arm: norm for arm, (_, norm) in deltas.items()}
            for name, basis in (('angle', T), ('chance', R)):
                cosine = onto(F.normalize(deltas['free'][0], dim=1), basis).norm(dim=1)
                out[name] = torch.rad2deg(torch.arccos(cosine.clamp(max=1)))
            out['right'] = score(x).argmax(1) == labels[here]
            for name, value in out.items():
                found.setdefault(space, {}).setdefault(name, []).append(value.cpu().numpy())
    return {space: {name: np.concatenate(parts) for name, parts in measures.items()}
            for space, measures in found.items()}

def watch_training(args, data, trained, encoder, device):
    """Distance of 50 test images to the boundary at the kept epochs: {'epoch', 'accuracy': (M,),
    arm: (M, N)}. Misread images count too: the class to leave is the predicted one."""
    found = {name: [] for name in ('epoch', 'accuracy', 'free', 'on', 'off')}
    x, T = encoded_space(data.test[0][: min(50, args.images)], encoder)
    for epoch in sorted(trained['kept']):
        model = common.restore(trained, epoch, args, data, device).requires_grad_(False)
        score = lambda v: model(v.view(-1, *data.shape))
        right = common.correct_under(model, *data.test).float().mean().item()
        norms = [shortest(score, x, partial(ARMS[arm], T=T, R=None), args.attack_steps)[1]
                 for arm in ('free', 'on', 'off')]
        for values, value in zip(found.values(), (epoch, right, *norms)):
            values.append(torch.as_tensor(value).cpu().numpy())
    return {name: np.array(values) for name, values in found.items()}

def wrong_labels(args, data, model, encoder, seed, device):
    """{arm: (N,)}: whether each clean test image is read rightly by a network that saw only
    perturbed training images, with the random labels that they were perturbed to."""
    out, (target, images) = {}, wrong_images(args, data, model, encoder, seed)
    for arm, x in images.items():
        trained = common.train(args, replace(data, train=(x, target)), f'wrong-{arm}', seed, device,
                               loss_fn=common.standard_loss)
        student = common.restore(trained, 'last', args, data, device)
        out[arm] = common.correct_under(student, *data.test).cpu().numpy()
    return out

def wrong_images(args, data, model, encoder, seed, block=250):
    """(random labels (N,), {arm: training images uint8}): l2 PGD towards the label, the part of
    the perturbation that the arm may use, stretched to the norm of the whole."""
    (images, labels), found = data.train, {arm: [] for arm in ARMS}
    generator = common.make_generator('wrong', seed, device=images.device)
    target = torch.randint(len(data.classes), labels.shape, generator=generator,
                           device=images.device)
    for x, goal in zip(images.split(block), target.split(block)):
        x, T = encoded_space(x, encoder)
        pixels, R = x.view(-1, *data.shape), random_like(T, generator)
        delta = common.pgd(
            model, pixels, goal, eps=args.wrong_eps, steps=args.wrong_steps, norm='l2',
            step_size=2.5 * args.wrong_eps / args.wrong_steps, start=pixels,
            loss=lambda output, y: -common.cross_entropy(output, y)).flatten(1) - x
        for arm, project in ARMS.items():
            v = F.normalize(project(delta, T, R), dim=1) * delta.norm(dim=1, keepdim=True)
            found[arm].append(((x + v).clamp(0, 1) * 255).round().byte().view_as(pixels))
    return target, {arm: torch.cat(parts) for arm, parts in found.items()}

# ------------------------------------------------------------------------------------ Figures

SIDES, LABELS = ('#CFE2F3', '#F9D9C0'), ('#0072B2', '#D55E00')
ARM_STYLES = {'free': ('#000000', 'free'), 'on': ('#D55E00', 'in T'), 'off': ('#0072B2', 'off T'),
              'random': ('#999999', 'in a random subspace')}

def depth(found, first=0):
    """Median |height| of the boundary, half-gaps, over points or, first=1, amid four: (M, S)."""
    return np.median(abs(found['height'][:, :, first::2, first::2]), (2, 3))

def sheet(found):
    """Share of the normals that the boundary crosses exactly once: (M, S)."""
    return (found['crossings'] == 1).mean((2, 3))

def beaten(found):
    """Share of images on which the free attack fails or a restricted one finds less."""
    least = np.minimum(np.minimum(found['on'], found['off']), found['random'])
    return (np.isinf(found['free']) | (least < 0.99 * found['free']))[found['right']].mean()

def arrays(results):
    """({n: measures}, {eps: measures}, {method: measures, seeds in front})."""
    points = {n: results['points'][f'n{n}'] for n in DIMENSIONS}
    robust = {0: points[AT_DIMENSION]} | {eps: results['robust'][f'eps{eps}'] for eps in AT_EPS}
    return points, robust, {m: common.stack(arm) for m, arm in results['runs'].items()}

def draw(results, folder):
    points, robust, runs = arrays(results)
    figure_evolution(points, folder)
    figure_phases(points, folder)
    figure_robust(robust, folder)
    figure_norms(runs, folder)
    figure_training(runs['standard'], 100 / len(results['classes']), folder)

def draw_slice(axis, found, mark, title):
    z = found['slice'][mark].T
    ends = np.linspace(-2.6, 2.6, z.shape[1]), np.linspace(-REACH, REACH, z.shape[0])
    axis.clear()
    axis.contourf(*ends, z, levels=[-1e9, 0, 1e9], colors=SIDES)
    if (z > 0).any() and (z < 0).any():
        axis.contour(*ends, z, levels=[0], colors='k', linewidths=1.8)
    for first, colour in enumerate(LABELS):
        at = np.arange(first, SIDE, 2) - SIDE // 2
        axis.plot(at, 0 * at, 'o', color=colour, mec='w', ms=8, zorder=3)
    axis.set_title(f'{title}{found["right"][mark, 0]} of {SIDE**2} right', fontsize=9)
    axis.set_xlabel('along a row of points')
    axis.grid(False)

def slice_legend(fig, columns=5):
    plot = fig.axes[0].plot
    handles = [plot([], [], 'k')[0], *(plot([], [], 's', color=colour)[0] for colour in SIDES),
               *(plot([], [], 'o', color=colour)[0] for colour in LABELS)]
    fig.legend(handles, ['decision boundary', 'network says blue', 'network says orange', 'blue '
               'point', 'orange point'], loc='outside lower center', ncols=columns)

def figure_evolution(points, folder):
    fig, axes = common.new_figure(2, len(SHOWN), 12, 5.6, sharex=True, sharey=True)
    for row, n in zip(axes, (CHOSEN, CONTROL)):
        for axis, step in zip(row, SHOWN):
            mark = abs(points[n]['step'] - step).argmin()
            draw_slice(axis, points[n], mark, f'step {points[n]["step"][mark]}: ')
        row[0].set_ylabel(f'n = {n}\nheight above the plane')
    slice_legend(fig)
    fig.suptitle('Training on 25 points of a plane in n dimensions; a slice through five. Clinging:'
                 ' the boundary comes to lie along the points,\nwith accuracy at chance; dimples: '
                 'then it waves around them. n = 3 is a control')
    common.save_figure(fig, folder, 'fig1_evolution')
    fig, axes = common.new_figure(1, 2, 8, 4, sharey=True)
    frames = []
    slice_legend(fig, columns=3)
    for mark, step in enumerate(points[CHOSEN]['step'][: 2 * MARKS // 3 + 1]):
        for axis, n in zip(axes[0], (CHOSEN, CONTROL)):
            draw_slice(axis, points[n], mark, f'{n} dimensions, step {step}: ')
        axes[0, 0].set_ylabel('height above the plane')
        picture = io.BytesIO()
        fig.savefig(picture, dpi=80)
        frames.append(Image.open(picture).convert('RGB').quantize(64))
    write = partial(frames[0].save, format='GIF', save_all=True, append_images=frames[1:], loop=0,
                    duration=300)
    common.save(folder / 'fig1_evolution.gif', write)

def draw_band(axis, x, values, **style):
    """Mean of values (M, S) over the networks and its 95 % interval."""
    draws = np.random.default_rng(0).integers(values.shape[1], size=(500, values.shape[1]))
    band = np.percentile(values[:, draws].mean(-1), (2.5, 97.5), axis=1)
    axis.fill_between(x, *band, alpha=0.15, lw=0, color=style['color'])
    axis.plot(x, values.mean(1), **style)

def figure_phases(points, folder):
    fig, axes = common.new_figure(2, 2, 9.5, 6, sharex=True)
    (right, distance), (height, share) = axes
    for colour, (n, found) in zip(common.COLOURS[1:] * 2, points.items()):
        x, style = found['step'], dict(color=colour)
        draw_band(right, x, 100 * found['right'] / SIDE**2, label=f'n = {n}', **style)
        draw_band(distance, x, found['distance'], **style)
        draw_band(height, x, depth(found), **style)
        height.plot(x, depth(found, 1).mean(1), '--', lw=1, **style)
        draw_band(share, x, found['share'], **style)
        share.axhline((1 - 2 / n) ** 0.5, ls=':', lw=1, **style)
    right.axhline(50, color='0.4', ls=':', label='chance')
    distance.axhline(1, color='0.4', ls=':')
    right.set(ylabel='points (%)', title='Points on their right side')
    distance.set(ylabel='half-gaps', ylim=(0, 2.2), title='Distance (dotted: half-way between)')
    height.set(ylabel='half-gaps', xlabel='step', ylim=(0, 4.1),
               title='Height of the boundary at points (dashed: between)')
    share.set(ylabel='share', xlabel='step', ylim=(0, 1.02),
              title='Gradient across the plane (dotted: chance)')
    fig.legend(*right.get_legend_handles_labels(), loc='outside lower center', ncols=6)
    fig.suptitle('Points of a plane in n dimensions. Clinging: the distance falls before they are '
                 'right.\nDimples: then the boundary is higher over the points than between them')
    common.save_figure(fig, folder, 'fig2_phases')

def figure_robust(arms, folder):
    fig, axes = common.new_figure(1, 5, 14, 3.5)
    for axis, eps in zip(axes[0], (0.0, AT_EPS[0], AT_EPS[-1])):
        draw_slice(axis, arms[eps], -1, f'eps {eps:g} half-gaps: ')
    axes[0, 0].set_ylabel('height above the plane')
    slice_legend(fig)
    for axis, measure in zip(axes[0, 3:], (depth, sheet)):
        values = np.stack([measure(found)[-1] for found in arms.values()])
        draw_band(axis, np.arange(len(arms)), values, marker='o', color='#0072B2')
        axis.set(xticks=range(len(arms)), xlabel='eps of training (half-gaps)',
                 xticklabels=[f'{eps:g}' for eps in arms])
    axes[0, 3].set(title='Depth of dimples (half-gaps)', ylim=(0, None))
    axes[0, 4].set(title='Share of sheet left', ylim=(0, 1.03))
    axes[0, 4].axhline(AT_SHEET, color='0.4', ls='--')
    fig.suptitle(f'Adversarial training: depth of the dimples, and the sheet; n = {AT_DIMENSION}')
    common.save_figure(fig, folder, 'fig3_adversarial_training')

def figure_norms(runs, folder):
    spaces = dict(zip(runs['standard']['spaces'], common.COLOURS[3:]))
    fig, axes = common.new_figure(2, len(spaces) + 1, 3.5 * len(spaces) + 3.8, 6.2)
    for line, (method, run) in zip(axes, runs.items()):
        for axis, (space, colour) in zip(line, spaces.items()):
            found = run['spaces'][space]
            for arm, (shade, name) in ARM_STYLES.items():
                norms = np.sort(found[arm][found['right']])
                share = 100 * np.arange(1, len(norms) + 1) / max(1, len(norms))
                axis.step(norms, share, where='post', color=shade, label=name,
                          lw=4 if arm == 'free' else 1.5)
            axis.set(xscale='log', xlabel='l2 norm', ylabel='images fooled (%)', ylim=(0, 103))
            axis.set_title(f'{METHOD_NAMES[method]}, T of the {space}\n(free attack beaten: '
                           f'{beaten(found):.0%})')
            line[-1].hist(found['angle'][found['right']], np.arange(40, 91, 1.25), color=colour,
                          alpha=0.6, label=f'T of the {space}')
            line[-1].axvline(np.median(found['chance']), color=colour, ls='--', label='chance')
        line[-1].set(xlabel='angle of the free perturbation to T (degrees)', ylabel='images',
                     title=f'{METHOD_NAMES[method]}: angles')
    axes[0, -1].legend(loc='upper left')
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=4)
    fig.suptitle('How long a perturbation must be, and its angle to the tangent space T')
    common.save_figure(fig, folder, 'fig4_norms')

def figure_training(run, chance, folder):
    watched, taught = run['training'], run['labels']
    fig, axes = common.new_figure(1, 2, 12, 3.8)
    epoch, accuracy = watched['epoch'][0], 100 * watched['accuracy'].mean(0)
    for arm in ('free', 'off', 'on'):
        axes[0, 0].plot(range(len(epoch)), np.median(watched[arm], (0, 2)), '.-',
                        color=ARM_STYLES[arm][0], label=ARM_STYLES[arm][1],
                        lw=4 if arm == 'free' else 1.5)
    axes[0, 0].set(yscale='log', xticks=range(len(epoch)), ylabel='median l2 norm',
                   xticklabels=[f'{e}\n{a:.0f} %' for e, a in zip(epoch, accuracy)],
                   xlabel='epochs of standard training, and test accuracy then',
                   title='Distance of test images to the boundary: clinging is\na dip (not '
                   'drawn: more than half not fooled)')
    mean, low, high = 100 * np.array([common.bootstrap(taught[arm]) for arm in ARMS]).T
    axes[0, 1].bar(range(len(ARMS)), mean, 0.6, color=[ARM_STYLES[arm][0] for arm in ARMS],
                   yerr=[mean - low, high - mean], error_kw=dict(ecolor='#56B4E9', lw=3))
    axes[0, 1].axhline(chance, color='0.4', ls='--', label='chance')
    axes[0, 1].set(xticks=range(len(ARMS)), ylabel='clean test images right (%)', ylim=(0, 103),
                   xticklabels=['whole', 'in T only', 'off T only', 'random subspace'],
                   title='Training on images perturbed towards a random class and\nlabelled so: '
                   'which part of a perturbation teaches?')
    for axis in axes[0]:
        axis.legend()
    common.save_figure(fig, folder, 'fig5_training_and_wrong_labels')

# ------------------------------------------------------------------------------------- Claims

def point_claims(points, robust):
    fit = {n: (v['right'] == SIDE**2).argmax(0) for n, v in points.items()}  # 0: none
    why = 'not all networks fit the points' * any((mark == 0).any() for mark in fit.values())
    at_fit = lambda values, n=CHOSEN: values[fit[n], np.arange(values.shape[1])]
    found, where = points[CHOSEN], f'n = {CHOSEN}'
    lowest = [row[: max(1, mark)].min() for row, mark in zip(found['distance'].T, fit[CHOSEN])]
    deep, whole = at_fit(depth(found)), at_fit(sheet(found))
    near = [at_fit(points[n]['distance'], n) for n in (3, 100)]
    rows = [
        Claim(f'clinging: the boundary is within {CLING} half-gaps before the fit, {where} '
              f'({CLING} minus the least distance)', PAPER, CLING - np.array(lowest), unless=why),
        Claim(f'dimples: at the fit most networks have a sheet ({whole.mean():.2f}), shallow '
              f'({deep.mean():.2f} half-gaps), {where}', PAPER,
              ((whole >= SHEET) & (deep <= SHALLOW)).astype(float), 0.5, unless=why),
        Claim(f'gradients run across the plane at the fit (share), {where}', PAPER,
              at_fit(found['share']), ACROSS, f'chance {(1 - 2 / CHOSEN) ** 0.5:.3f}', why),
        Claim('codimension brings the boundary near: distance at the fit, n = 3 minus n = 100',
              'control', near[0] - near[1], unless=why)]
    for eps in AT_EPS:
        whole = sheet(robust[eps])[-1].mean()
        torn = f'torn or too deep: {whole:.0%} of normals are crossed once' * bool(whole < AT_SHEET)
        torn = torn or 'not all fit' * bool((robust[eps]['right'][-1] < SIDE**2).any())
        rows.append(Claim(
            f'adversarial training deepens the dimples, eps {eps:g} half-gaps (ratio; sheet '
            f'{whole:.2f})', PAPER, depth(robust[eps])[-1] / depth(robust[0])[-1], DEEPER,
            unless=why or torn))
    return rows

def image_claims(where, found, labels, known):
    right, masked = found['right'], f'masked or weak: free attack beaten on {beaten(found):.0%}'
    why = common.near_chance(right.astype(float), labels[: right.shape[1]])
    why = why or masked * bool(beaten(found) > BEATEN)
    norm = {arm: np.where(right, found[arm].clip(max=1e3), np.nan) for arm in ARMS}  # not found
    ratio = partial(common.resample, lambda a, b: np.nanmedian(a / b))
    off, on = ratio(norm['off'], norm['free']), np.nanmedian(norm['on'] / norm['free'])
    table = (
        ('perturbations are perpendicular to T (degrees)', PAPER, ANGLE,
         common.resample(np.nanmedian, np.where(right, found['angle'], np.nan)),
         f'chance {np.median(found["chance"]):.1f}'),
        (f'staying off T costs little: {OFF_FREE} minus off T / free ({off[0]:.2f})', PAPER, 0,
         tuple(OFF_FREE - off[i] for i in (0, 2, 1)), known),
        (f'T is dear beyond counting: in T / in a random subspace (in T / free {on:.2f})',
         'control', 1, ratio(norm['on'], norm['random']), known))
    return [Claim(f'{text}, {where}', source, value[0], above, reference, why, value[1:])
            for text, source, above, value, reference in table]

def training_claims(run, results):
    def dip(values):  # (S, N, M): how far the lowest median in between lies below the lower end
        middle = np.median(values, (0, 1))
        return 1 - middle[1:-1].min() / min(middle[0], middle[-1])

    found = np.moveaxis(run['training']['off'], 1, 2)
    value, *interval = common.resample(dip, found) if found.shape[2] > 2 else (np.nan,) * 3
    last, y = run['training']['accuracy'][:, -1:], results['labels']
    few = 'fewer than three epochs watched' * (found.shape[2] < 3)
    off, whole = (run['labels'][arm] - 1 / len(results['classes']) for arm in ('off', 'free'))
    return [
        Claim('clinging on images: the distance off T dips in training, below both ends (share)',
              PAPER, value, DIP, unless=few or common.near_chance(last, y), interval=interval),
        Claim(f'wrong labels: the part off T teaches more than {TEACHES:g} of what the whole does '
              '(difference, above chance)', PAPER, off - TEACHES * whole,
              unless=common.near_chance(run['labels']['free'], y))]

def claims(results):
    points, robust, runs = arrays(results)
    rows, known = point_claims(points, robust), REPRODUCED.get(results['config']['dataset'], '-')
    for method, run in runs.items():
        for space, found in run['spaces'].items():
            where = f'{METHOD_NAMES[method]}, T of the {space}'
            same = known if where == 'standard, T of the autoencoder' else '-'
            rows += image_claims(where, found, results['labels'], same)
    return rows + training_claims(runs['standard'], results)

def main(argv=None):
    parser = common.make_parser(__doc__, DEFAULTS, argv)
    add = parser.add_argument
    add('--latent', type=int, metavar='K', help="dimensions of the autoencoder's range")
    add('--ae-epochs', type=int, metavar='N', help='of the autoencoder')
    add('--images', type=int, metavar='N', help='test images that are attacked')
    add('--attack-steps', type=int, metavar='N', help='of the shortest perturbation')
    add('--replicas', type=int, metavar='N', help='networks on points, of each setting')
    add('--point-steps', type=int, metavar='N', help='of networks on points')
    add('--wrong-eps', type=common.number, metavar='X', help='l2 radius of wrongly labelled images')
    add('--wrong-steps', type=int, metavar='N', help='of the attack that makes them')
    args = common.parse(parser, argv)
    if min(args.latent, args.images, args.replicas - 1, args.wrong_steps) < 1:
        parser.error('--latent, --images, --wrong-steps must be above 0, --replicas above 1')
    folder, device, data, results = common.start('dimpled_manifold', args)
    if 'finished' not in results:
        study(args, folder, device, data, results)
        common.finish('dimpled_manifold', results, folder)
    draw(results, folder)
    common.judge(claims(results), results, folder)

if __name__ == '__main__':
    common.entry(main)
