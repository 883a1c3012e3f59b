"""What adversarial training buys and costs: standard, FGSM, PGD and TRADES training compared.

Question   How much worst-case accuracy does adversarial training buy a CNN, what does it cost in
           natural accuracy, and what else changes: overfitting, input gradients, classes?
Papers     Madry et al. 2018 (PGD-AT), Zhang et al. 2019 (TRADES), Wong et al. 2020 (FGSM-AT),
           Rice et al. 2020 (robust overfitting), Tsipras et al. 2019 (trade-off, gradients),
           Andriushchenko & Flammarion 2020 (catastrophic overfitting), Tian et al. 2021 (classes)
Usage      python train_at.py                                  shapes, minutes on a laptop
           python train_at.py --dataset cifar10 --seeds 0 1 2  ResNet-18, one GPU
           python train_at.py --methods standard pgd --eps 4/255

Expect     shapes, three seeds, two minutes each on two CPU cores: natural accuracy 98 % or more;
           worst case at 8/255 0 % (standard), 41 (FGSM-AT), 48 (PGD-AT), 49 (TRADES). The last
           epoch is the best: no robust overfitting shows, nor a loss of natural accuracy.
           CIFAR-10, small-cnn-64, 8 epochs, an hour of one core: PGD-AT 70 % natural, 39 under
           PGD-20, 35 in the worst case; standard 85, 0, 0. Not run: ResNet-18, 200 epochs; the
           authors of Rice et al. log 82.9 % natural and 53.5 under PGD-10 at the best epoch.
"""
from functools import partial

import numpy as np
import torch

import common
from common import ATTACK_NAMES, METHOD_COLOURS, METHOD_NAMES, Claim, bootstrap

DEFAULTS = {'*': dict(methods=['standard', 'fgsm', 'pgd', 'trades'])}
EPS_MULTIPLES = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8)  # times eps
EPS_IMAGES, ALIGNMENT_IMAGES, GALLERY_IMAGES = 50, 200, 4

# Thresholds of the claims, chosen before the runs.
BROKEN = 0.98  # share of its images that a standard network loses in the worst case
CATASTROPHIC_GAP = 0.30  # FGSM minus PGD accuracy
CLASS_SPREAD = 0.20  # best minus worst class
SATURATED = 0.99  # natural accuracy that leaves no room for a difference

# --------------------------------------------------------------------------------- Experiment

def study(args, folder, device, data, results):
    """Train each network and measure it; a continued run repeats only the quick measurements."""
    keep = partial(common.save_results, results, folder)
    attacks = common.evaluation_attacks(args)
    for seed in args.seeds:
        for method in args.methods:
            trained = common.train(args, data, method, seed, device)
            run = common.measure(results, ('runs', method, f's{seed}'), lambda: dict(
                history=trained['history'], best_epoch=trained['best_epoch'],
                seconds=trained['seconds'], correct={}, correct_last={}), folder)
            model = common.restore(trained, 'best', args, data, device)
            common.evaluate(model, data, attacks, run['correct'], keep)
            few = {name: attacks[name] for name in ('fgsm', 'pgd')}
            last = common.restore(trained, 'last', args, data, device)
            common.evaluate(last, data, few, run['correct_last'], keep)
            run['masking'] = common.masking_check(model, data, run['correct'], norm=args.norm)
            run['eps_curve'] = eps_curve(model, data, args)
            run['alignment'] = gradient_alignment(model, data)
            common.measure(results, ('gallery', method), lambda: gallery(model, data, args), folder)

def eps_curve(model, data, args):
    """Accuracy under PGD-20 on the margin at EPS_MULTIPLES of eps; it has to reach 0."""
    x, y = data.test[0][:EPS_IMAGES], data.test[1][:EPS_IMAGES]
    accuracy = []
    for multiple in EPS_MULTIPLES:
        eps = min(multiple * args.eps, 1.0 if args.norm == 'linf' else np.inf)
        attack = partial(common.pgd, eps=eps, step_size=eps / 8, steps=20, norm=args.norm,
                         loss=common.margin, stop=True)
        accuracy.append(common.correct_under(model, x, y, attack).float().mean().item())
    return np.array(accuracy)

def gradient_alignment(model, data):
    """|cos| of each image with its input gradient: (N,). Unlike Etmann et al. 2019, each channel
    of both loses its mean first, or brightness alone would align."""
    x, y = common.to_float(data.test[0][:ALIGNMENT_IMAGES]), data.test[1][:ALIGNMENT_IMAGES]
    pair = x, common.input_gradients(model, x, y)
    image, gradient = ((v - v.mean((2, 3), keepdim=True)).flatten(1) for v in pair)
    return torch.nn.functional.cosine_similarity(image, gradient).abs().cpu().numpy()

def gallery(model, data, args):
    """Test images of up to four classes, their gradients, PGD-20 perturbations and the class that
    is predicted then; of the first seed alone."""
    y = data.test[1]
    first = torch.stack([(y == k).nonzero()[0, 0] for k in y.unique()])
    rows = first[:: max(1, len(first) // GALLERY_IMAGES)][:GALLERY_IMAGES]
    x, y = common.to_float(data.test[0][rows]), y[rows]
    x_adv = common.pgd(model, x, y, eps=args.eps, step_size=args.eps / 8, steps=20, norm=args.norm,
                       generator=common.make_generator('gallery', device=x.device))
    out = dict(image=x, label=y, gradient=common.input_gradients(model, x, y),
               perturbation=x_adv - x, guess=common.logits_of(model, x_adv).argmax(1))
    return {name: v.cpu().numpy() for name, v in out.items()}

# ------------------------------------------------------------------------------------ Figures

def draw(results, folder):
    runs = {method: common.stack(arm) for method, arm in results['runs'].items()}
    figure_training(results, folder)
    figure_attacks(runs, results, folder)
    figure_eps(runs, results, folder)
    figure_gallery(results, folder)
    figure_classes(runs, results, folder)

def figure_training(results, folder):
    arms = results['runs']
    fig, axes = common.new_figure(1, len(arms), max(6.6, 2.2 * len(arms) + 1), 2.8, sharey=True)
    lines = (('val_natural', '#0072B2', '-', 'natural, validation images'),
             ('val_robust', '#D55E00', '-', 'PGD-10, validation images'),
             ('train_robust', '#E69F00', '--', 'PGD-10, training images'))
    for axis, (method, arm) in zip(axes[0], arms.items()):
        for run in arm.values():
            epochs = [row['epoch'] for row in run['history']]
            for key, colour, style, _ in lines:
                values = [100 * row[key] for row in run['history']]
                axis.plot(epochs, values, style, color=colour)
            axis.axvline(run['best_epoch'], color='0.5', lw=1, ls=':')
        axis.set(title=METHOD_NAMES.get(method, method), xlabel='epoch', ylim=(-3, 103))
    axes[0, 0].set_ylabel('accuracy (%)')
    for _, colour, style, label in (*lines, (0, '0.5', ':', 'checkpoint that is evaluated')):
        axes[0, 0].plot([], [], style, color=colour, label=label)
    fig.legend(loc='outside lower center', ncols=2)
    fig.suptitle('Accuracy through training: robust overfitting is a falling validation curve')
    common.save_figure(fig, folder, 'fig1_training')

def figure_attacks(runs, results, folder):
    names = [name for name in next(iter(runs.values()))['correct'] if name != 'worst']
    fig, axes = common.new_figure(1, 1, 7.5, 3.2)
    axis, width = axes[0, 0], 0.8 / len(runs)
    for i, (method, run) in enumerate(runs.items()):
        mean, low, high = 100 * np.array([bootstrap(run['correct'][name]) for name in names]).T
        at = np.arange(len(names)) + (i - (len(runs) - 1) / 2) * width
        axis.bar(at, mean, 0.92 * width, color=METHOD_COLOURS.get(method),
                 label=METHOD_NAMES.get(method, method), yerr=[mean - low, high - mean],
                 error_kw=dict(lw=0.8, ecolor='0.4'))
        for a, value, top in zip(at, mean, high):
            axis.text(a, top + 1.5, f'{value:.0f}', ha='center', fontsize=6)
    axis.set(xticks=range(len(names)), xticklabels=[ATTACK_NAMES.get(k, k) for k in names],
             ylim=(0, 112), ylabel='test accuracy (%)', title='Accuracy under each attack. From '
             'APGD-CE on: after all attacks so far,\nso that the last column is the worst case')
    axis.grid(axis='x', visible=False)
    fig.legend(loc='outside lower center', ncols=len(runs))
    common.save_figure(fig, folder, 'fig2_attacks')

def figure_eps(runs, results, folder):
    config = results['config']
    unit = 255 if config['norm'] == 'linf' and config['eps'] < 0.1 else 1
    eps = np.array(EPS_MULTIPLES) * config['eps']
    eps = eps.clip(max=1) if config['norm'] == 'linf' else eps
    fig, axes = common.new_figure(1, 1, 5.0, 3.2)
    axis = axes[0, 0]
    for method, run in runs.items():
        axis.plot(unit * eps, 100 * run['eps_curve'].mean(0), marker='o', ms=3.5,
                  color=METHOD_COLOURS.get(method), label=METHOD_NAMES.get(method, method))
    axis.axvline(unit * config['eps'], color='0.6', ls=':', lw=1, label='eps of the training')
    axis.axhline(100 / len(results['classes']), color='0.6', ls='--', lw=1, label='chance')
    axis.set(xlabel=f'eps of the attack ({"1/255" if unit == 255 else config["norm"]})',
             ylabel='accuracy under PGD-20 on the margin (%)', ylim=(-3, 103),
             title=f'Robust accuracy falls with eps; it must reach 0 ({EPS_IMAGES} images)')
    axis.legend()
    common.save_figure(fig, folder, 'fig3_eps')

def figure_gallery(results, folder):
    galleries, names = results['gallery'], results['classes']
    n = len(next(iter(galleries.values()))['image'])
    fig, axes = common.new_figure(n, 1 + 2 * len(galleries), 1.3 + 2.1 * len(galleries), 1.35 * n)
    for j, (method, g) in enumerate(galleries.items()):
        for i, row in enumerate(axes):
            common.show_image(row[0], g['image'][i], names[g['label'][i]])
            gradient, delta = g['gradient'][i], g['perturbation'][i]
            common.show_image(row[1 + 2 * j], 0.5 + gradient / (6 * gradient.std() + 1e-12),
                              f'{METHOD_NAMES.get(method, method)}\ngradient' * (i == 0))
            common.show_image(row[2 + 2 * j], 0.5 + delta / (2 * abs(delta).max() + 1e-12))
            wrong = g['guess'][i] != g['label'][i]
            row[2 + 2 * j].set_title('perturbation\n' * (i == 0) + f'-> {names[g["guess"][i]]}',
                                     color='#D55E00' if wrong else '#009E73')
    eps = common.eps_text(results['config'])
    fig.suptitle(f'Gradient of the loss, PGD-20 perturbation at\n{eps} (grey: none; stretched),'
                 ' and what\nthe perturbed image is read as (->)', fontsize=8)
    common.save_figure(fig, folder, 'fig4_gradients')

def figure_classes(runs, results, folder):
    y, names = results['labels'], results['classes']
    shown = np.unique(y)[:20]  # a hundred do not fit
    robust = [method for method in runs if method != 'standard'] or list(runs)
    fig, axes = common.new_figure(1, 1, 7.5, 3.3)
    for i, method in enumerate(robust):
        at = np.arange(len(shown)) + 0.18 * (i - (len(robust) - 1) / 2)
        natural, worst = (
            100 * np.array([runs[method]['correct'][name][:, y == k].mean() for k in shown])
            for name in ('natural', 'worst'))
        colour = METHOD_COLOURS.get(method)
        axes[0, 0].vlines(at, worst, natural, color=colour, alpha=0.35, lw=1)
        axes[0, 0].plot(at, natural, 'o', ms=4, mfc='none', color=colour)
        axes[0, 0].plot(at, worst, 'o', ms=4, color=colour, label=METHOD_NAMES.get(method, method))
    axes[0, 0].set(xticks=range(len(shown)), ylabel='test accuracy (%)', ylim=(-3, 103),
                   title='Classes: natural (open circles) and worst-case accuracy (full)')
    axes[0, 0].set_xticklabels([names[k] for k in shown], rotation=30, ha='right')
    fig.legend(loc='outside lower center', ncols=len(robust))
    common.save_figure(fig, folder, 'fig5_classes')

# ------------------------------------------------------------------------------------- Claims

def claims(results):
    """The rows of claims.md, for the methods that were trained."""
    runs = {method: common.stack(arm) for method, arm in results['runs'].items()}
    y = results['labels']
    right = {m: {k: 1.0 * v for k, v in run['correct'].items()} for m, run in runs.items()}
    why = {m: common.near_chance(right[m]['natural'], y) for m in runs}
    full = {m: 'both above 99 %' * bool(right[m]['natural'].mean() >= SATURATED) for m in runs}
    rows = []
    if {'standard', 'pgd'} <= runs.keys():
        either = why['standard'] or why['pgd']
        rows += [
            Claim('adversarial training buys worst-case accuracy: PGD-AT minus standard',
                  'Madry et al. 2018', right['pgd']['worst'] - right['standard']['worst'],
                  unless=either),
            Claim('adversarial training costs natural accuracy: standard minus PGD-AT',
                  'Tsipras et al. 2019', right['standard']['natural'] - right['pgd']['natural'],
                  unless=either or (full['standard'] and full['pgd'])),
            Claim('a standard network loses nearly all images in the worst case',
                  'Madry et al. 2018', 1 - right['standard']['worst'], above=BROKEN,
                  unless=why['standard']),
            Claim('input gradients align with the image: mean |cos|, PGD-AT minus standard',
                  'Tsipras et al. 2019; Etmann et al. 2019',
                  runs['pgd']['alignment'] - runs['standard']['alignment'], unless=either)]
    if 'pgd' in runs:
        last_is_best = (runs['pgd']['best_epoch'] == results['config']['epochs']).all()
        rows += [
            Claim('robust overfitting of PGD-AT: PGD accuracy, best minus last epoch',
                  'Rice et al. 2020', right['pgd']['pgd'] - runs['pgd']['correct_last']['pgd'],
                  reference="+.06 to +.08 after 200 epochs, PreAct ResNet-18 (authors' logs)",
                  unless=why['pgd'] or 'the last epoch is the best one' * bool(last_is_best)),
            class_claim(right['pgd']['worst'], y, results['classes'], why['pgd'])]
    if 'fgsm' in runs:
        last = runs['fgsm']['correct_last']
        rows.append(Claim(
            'catastrophic overfitting of FGSM-AT: FGSM minus PGD accuracy, last epoch',
            'Wong et al. 2020; Andriushchenko & Flammarion 2020',
            1.0 * last['fgsm'] - last['pgd'], above=CATASTROPHIC_GAP,
            unless=common.near_chance(last['natural'], y)))
    if {'pgd', 'trades'} <= runs.keys():
        gap = {name: right['trades'][name] - right['pgd'][name] for name in ('natural', 'worst')}
        unless = why['pgd'] or why['trades']
        rows += [Claim('TRADES (beta 6) has less natural accuracy: PGD-AT minus TRADES',
                       'Zhang et al. 2019', -gap['natural'],
                       unless=unless or (full['pgd'] and full['trades'])),
                 Claim('TRADES (beta 6) has more worst-case accuracy: TRADES minus PGD-AT',
                       'Zhang et al. 2019', gap['worst'], unless=unless)]
    return rows + [common.masking_claim(METHOD_NAMES.get(m, m), run['masking'], why[m])
                   for m, run in runs.items() if m != 'standard']  # 0 % hides nothing

def class_claim(worst, y, classes, why):
    """Classes differ in robustness: one random half of the images chooses the best and the worst
    class, the other measures; otherwise chance alone would make a difference."""
    half = np.random.default_rng(0).random(len(y)) < 0.5
    present = np.intersect1d(y[half], y[~half])
    if len(present) < 2:
        return Claim('classes differ in robustness', 'Tian et al. 2021', 0, interval=(0, 0),
                     unless='fewer than two classes have images in both halves')
    rates = np.array([worst[:, half & (y == k)].mean() for k in present])
    best, poor = present[rates.argmax()], present[rates.argmin()]
    rest = [worst[:, ~half & (y == k)] for k in (best, poor)]
    rng, seeds = np.random.default_rng(1), len(worst)
    gaps = []
    for _ in range(1000):
        drawn = rng.integers(seeds, size=(seeds, 1))  # the same seeds for both
        means = [w[drawn, rng.integers(w.shape[1], size=w.shape[1])].mean() for w in rest]
        gaps.append(means[0] - means[1])
    effect = rest[0].mean() - rest[1].mean()
    return Claim(f'classes differ in robustness: {classes[best]} minus {classes[poor]}, worst case',
                 'Tian et al. 2021', effect, above=CLASS_SPREAD, unless=why,
                 interval=tuple(np.percentile(gaps, (2.5, 97.5))))

def table(results):
    """Accuracy of every method under every attack, for the log and results.json (judge saves)."""
    results['accuracy'] = {}
    for method, arm in results['runs'].items():
        correct, name = common.stack(arm)['correct'], METHOD_NAMES.get(method, method)
        results['accuracy'][method] = {k: common.summary(right) for k, right in correct.items()}
        text = ''.join(f'  {ATTACK_NAMES.get(k, k)} {100 * right.mean():.1f}'
                       for k, right in correct.items())
        minutes = sum(run['seconds'] for run in arm.values()) / 60
        common.log.info('%-9s%s  (%.1f min)', name, text, minutes)

def main(argv=None):
    parser = common.make_parser(__doc__, DEFAULTS, argv)
    parser.add_argument('--methods', nargs='+', choices=common.METHODS, metavar='METHOD',
                        help=', '.join(common.METHODS))
    parser.add_argument('--apgd-steps', type=int, metavar='N', help='of APGD')
    parser.add_argument('--targets', type=int, metavar='N', help='of APGD-T')
    parser.add_argument('--square-queries', type=int, metavar='N', help='of Square')
    args = common.parse(parser, argv)
    folder, device, data, results = common.start('train_at', args)
    if 'finished' not in results:
        study(args, folder, device, data, results)
        common.finish('train_at', results, folder)
    table(results)
    draw(results, folder)
    common.judge(claims(results), results, folder)

if __name__ == '__main__':
    common.entry(main)
