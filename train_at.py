"""What adversarial training buys and costs: standard, FGSM, PGD and TRADES training compared.

Question   How much worst-case accuracy does adversarial training buy a CNN, what does it cost
           in natural accuracy, and what else changes: overfitting, input gradients, classes?
Papers     Madry et al. 2018 (PGD-AT), Zhang et al. 2019 (TRADES), Wong et al. 2020 (FGSM-AT),
           Rice et al. 2020 (robust overfitting), Tsipras et al. 2019 (trade-off, gradients),
           Andriushchenko & Flammarion 2020 (catastrophic overfitting)
Usage      python train_at.py                                  shapes, minutes on a laptop
           python train_at.py --dataset cifar10 --seeds 0 1 2  ResNet-18, one GPU
           python train_at.py --methods standard pgd --eps 4/255
Outputs    runs/train_at/<dataset>-<arch>/: results.json, metrics.csv, claims.md and
           fig1_training  fig2_attacks  fig3_eps  fig4_perturbations  fig5_loss_surface
           fig6_gradients  fig7_classes   (each .png and .pdf)
"""

import numpy as np
import torch

import common
from common import METHOD_COLOURS, METHOD_NAMES, bootstrap, claim, effect_verdict, stack_correct

# How hard the evaluation attacks; AutoAttack's own numbers are 100 steps, 9 targets and 5000
# queries (Croce & Hein 2020). shapes is small to keep the study within minutes.
DEFAULTS = {
    '*': dict(methods=['standard', 'fgsm', 'pgd', 'trades'], apgd_steps=100, targets=9, square_queries=5000),
    'shapes': dict(apgd_steps=25, targets=3, square_queries=100),
}
ATTACK_NAMES = {
    'natural': 'natural',
    'fgsm': 'FGSM',
    'pgd20': 'PGD-20',
    'pgd40': 'PGD-40',
    'pgd100': 'PGD-100',
    'apgd_ce': 'APGD-CE',
    'apgd_t': 'APGD-T',
    'square': 'Square',
    'worst': 'worst case',
}
EPS_IMAGES, SURFACE_IMAGES, SHOWN_IMAGES = 50, 8, 4
MASKING_IMAGES = 100

# Thresholds of the claims, fixed before any run.
CATASTROPHIC_GAP = 0.30  # FGSM minus PGD-20 accuracy
CLASS_SPREAD = 0.20  # best minus worst class
SATURATED = 0.99  # natural accuracy that leaves no room for a difference


# ---------------------------------------------------------------------------- the experiment


def evaluate_model(args, data, result, seed, device):
    """Everything measured on one trained model. Arrays are packed for results.json."""
    model = common.restore(result, 'best', args, data, device)
    x, y = data.test
    steps = 40 if args.dataset.endswith('mnist') else 20  # as usual in the literature
    correct = {'natural': common.correct_under(model, x, y)}
    for name, attack in common.evaluation_attacks(args, seed, device, pgd_steps=steps).items():
        correct[name] = common.correct_under(model, x, y, attack)
        common.log.info(
            '  %-8s robust accuracy %.3f', ATTACK_NAMES[name], (correct[name] & correct['natural']).float().mean()
        )
    correct['worst'] = torch.stack(list(correct.values())).all(0)
    few = ('natural', 'fgsm', f'pgd{steps}')
    correct_last = {name: correct[name] for name in few}
    if result['best_epoch'] < len(result['history']):
        last = common.restore(result, 'last', args, data, device)
        # made anew: the same random starts
        attacks = common.evaluation_attacks(args, seed, device, pgd_steps=steps)
        correct_last = {name: common.correct_under(last, x, y, attacks.get(name)) for name in few}
    masking = common.masking_check(
        model,
        common.to_float(x[:MASKING_IMAGES]),
        y[:MASKING_IMAGES],
        correct,
        eps=args.eps,
        norm=args.norm,
        generator=common.make_generator('masking', seed, device=device),
    )
    return dict(
        correct={k: common.pack(v.to(torch.uint8)) for k, v in correct.items()},
        correct_last={k: common.pack(v.to(torch.uint8)) for k, v in correct_last.items()},
        collapsed=result['collapsed'],
        best_epoch=result['best_epoch'],
        masking=masking,
        seconds=result['seconds'],
        precision=result['precision'],
        history=result['history'],
        eps_curve=common.eps_curve(
            model,
            x[:EPS_IMAGES],
            y[:EPS_IMAGES],
            eps=args.eps,
            norm=args.norm,
            generator=common.make_generator('curve', seed, device=device),
        ),
        alignment=common.pack(gradient_alignment(model, data)),
    )


def input_gradient(model, x, y):
    """Gradient of the cross-entropy with respect to the image, (N, C, H, W), in float32."""
    with common.frozen(model):
        return common.loss_and_gradient(model, x, y, common.cross_entropy)[2]


def gradient_alignment(model, data, n=200):
    """|cos| between the image, centred per channel, and its gradient: (n,) in [0, 1].

    The alignment of Etmann et al. 2019, with the mean colour taken out of image and gradient,
    so that brightness alone cannot align.
    """
    x, y = common.to_float(data.test[0][:n]), data.test[1][:n]
    gradient = torch.cat([input_gradient(model, a, b) for a, b in zip(x.split(100), y.split(100))])
    centred = [(v - v.mean((2, 3), keepdim=True)).flatten(1) for v in (x, gradient)]
    return torch.nn.functional.cosine_similarity(*centred).abs()


def gallery(args, data, models, device):
    """Images, perturbations, gradients and loss surfaces for the figures.

    models: {method: model}. The images are the first of each class that a figure has room for.
    """
    y = data.test[1]
    rows = [(y == k).nonzero()[0, 0].item() for k in y.unique().tolist()]
    rows = torch.tensor(rows[:: max(1, len(rows) // SHOWN_IMAGES)][:SHOWN_IMAGES])
    x, y = common.to_float(data.test[0][rows]), y[rows]
    out = dict(image=common.pack(x), label=y.tolist(), perturbation={}, prediction={}, gradient={}, surface={})
    for method, model in models.items():
        # no dropping: the picture shows the whole perturbation, not the first that suffices
        x_adv = common.pgd(
            model,
            x,
            y,
            eps=args.eps,
            step_size=args.eps / 8,
            steps=20,
            norm=args.norm,
            generator=common.make_generator('gallery', device=device),
        )
        out['perturbation'][method] = common.pack(x_adv - x)
        out['prediction'][method] = common.predict(model, x_adv).tolist()
        out['gradient'][method] = common.pack(input_gradient(model, x, y).half())
        out['surface'][method] = loss_surface(args, model, data, device)
    return out


def loss_surface(args, model, data, device, points=15):
    """Mean cross-entropy over some test images at x + a g + b r: (points, points) nested list,
    rows b and columns a in [-2 eps, 2 eps]; g the sign of the gradient, r random signs."""
    x, y = common.to_float(data.test[0][:SURFACE_IMAGES]), data.test[1][:SURFACE_IMAGES]
    generator = common.make_generator('surface', device=device)
    along = input_gradient(model, x, y).sign()
    random = torch.randint(2, x.shape, generator=generator, device=device) * 2.0 - 1
    if args.norm == 'l2':
        along, random = (v / v[0].numel() ** 0.5 for v in (along, random))
    grid = torch.linspace(-2 * args.eps, 2 * args.eps, points, device=device)
    with torch.no_grad():
        return [
            [
                common.cross_entropy(common.final_logits(model((x + a * along + b * random).clamp(0, 1))), y)
                .mean()
                .item()
                for a in grid
            ]
            for b in grid
        ]


# ------------------------------------------------------------------------------- the figures


def draw(results, folder):
    """All figures, from results.json alone."""
    methods, seeds = results['config']['methods'], results['config']['seeds']
    runs = {m: [results[f'{m}-s{s}'] for s in seeds] for m in methods}
    figure_training(runs, folder)
    figure_attacks(runs, folder)
    figure_eps(results, runs, folder)
    figure_perturbations(results, folder)
    figure_loss_surface(results, folder)
    figure_gradients(results, folder)
    figure_classes(results, runs, folder)


def figure_training(runs, folder):
    fig, axes = common.new_figure(1, len(runs), 2.2 * len(runs) + 1, 2.8, sharey=True)
    for axis, (method, results) in zip(axes[0], runs.items()):
        for i, run in enumerate(results):
            history = run['history']
            epochs = [row['epoch'] for row in history]
            for key, colour, style, label in (
                ('train_natural', '#56B4E9', '--', 'natural, training images'),
                ('val_natural', '#0072B2', '-', 'natural, validation'),
                ('train_robust', '#E69F00', '--', 'PGD-10, training images'),
                ('val_robust', '#D55E00', '-', 'PGD-10, validation'),
            ):
                axis.plot(
                    epochs,
                    [100 * row[key] for row in history],
                    style,
                    color=colour,
                    label=label if i == 0 else None,
                    marker='.',
                )
            axis.axvline(run['best_epoch'], color='0.6', lw=1, ls=':', label='best checkpoint' if i == 0 else None)
        axis.set(title=METHOD_NAMES[method], xlabel='epoch', ylim=(-3, 103))
    axes[0, 0].set_ylabel('accuracy (%)')
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    fig.suptitle('Accuracy through training: robust overfitting is a falling validation curve')
    common.save_figure(fig, folder, 'fig1_training')


def figure_attacks(runs, folder):
    names = list(next(iter(runs.values()))[0]['correct'])
    fig, axes = common.new_figure(1, 1, 7.5, 3.2)
    width = 0.8 / len(runs)
    for i, method in enumerate(runs):
        values = [bootstrap(np.mean, stack_correct(runs[method], name), draws=300) for name in names]
        mean, low, high = 100 * np.array(values).T
        at = np.arange(len(names)) + (i - (len(runs) - 1) / 2) * width
        axes[0, 0].bar(
            at,
            mean,
            width * 0.92,
            color=METHOD_COLOURS[method],
            yerr=[mean - low, high - mean],
            error_kw=dict(lw=0.8, ecolor='0.4'),
            label=METHOD_NAMES[method],
        )
        for a, m, top in zip(at, mean, high):
            axes[0, 0].text(a, top + 1.5, f'{m:.0f}', ha='center', fontsize=6)
    axes[0, 0].set(
        xticks=range(len(names)),
        ylabel='test accuracy (%)',
        ylim=(0, 112),
        xticklabels=[ATTACK_NAMES[n] for n in names],
        title='Accuracy under each attack, and under the worst of them for each image',
    )
    axes[0, 0].grid(axis='x', visible=False)
    fig.legend(loc='outside lower center', ncols=len(runs))
    common.save_figure(fig, folder, 'fig2_attacks')


def figure_eps(results, runs, folder):
    curves = {
        METHOD_NAMES[m]: (METHOD_COLOURS[m], np.mean([r['eps_curve'] for r in models], 0)) for m, models in runs.items()
    }
    common.draw_eps_curves(curves, results['config'], results['classes_count'], 'margin loss', folder, 'fig3_eps')


def figure_perturbations(results, folder):
    g, names = results['gallery'], results['classes']
    image = common.unpack(g['image'])
    methods = list(g['perturbation'])
    fig, axes = common.new_figure(len(image), 1 + 2 * len(methods), 1.25 * (1 + 2 * len(methods)), 1.5 * len(image))
    for i, row in enumerate(axes):
        common.show_image(row[0], image[i], names[g['label'][i]])
        for j, method in enumerate(methods):
            delta = common.unpack(g['perturbation'][method])[i]
            size = max(abs(delta).max(), 1e-12)
            common.show_image(
                row[1 + 2 * j], 0.5 + delta / (2 * size), METHOD_NAMES[method] + '\nperturbation' if i == 0 else ''
            )
            guess = g['prediction'][method][i]
            common.show_image(row[2 + 2 * j], image[i] + delta, 'read as\n' + names[guess])
            row[2 + 2 * j].title.set_color('#D55E00' if guess != g['label'][i] else '#009E73')
    fig.suptitle(
        f'PGD-20 perturbations at {common.eps_text(results["config"])},\n'
        'stretched to the full range, and the perturbed images'
    )
    common.save_figure(fig, folder, 'fig4_perturbations')


def figure_loss_surface(results, folder):
    surfaces = results['gallery']['surface']
    fig, axes = common.new_figure(1, len(surfaces), 2.3 * len(surfaces) + 0.8, 2.9)
    for axis, (method, surface) in zip(axes[0], surfaces.items()):
        surface = np.array(surface)
        ticks = np.linspace(-2, 2, len(surface))
        shown = axis.contourf(ticks, ticks, surface, 20)
        fig.colorbar(shown, ax=axis, shrink=0.75, format='%.2g')
        axis.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], color='w', lw=1, ls=':')
        axis.set(title=METHOD_NAMES[method], xlabel='along the gradient sign (eps)', aspect=1)
        axis.grid(False)
    axes[0, 0].set_ylabel('random signs (eps)')
    fig.suptitle(
        f'Cross-entropy around {SURFACE_IMAGES} test images (mean; each panel its own scale); dotted: the eps box'
    )
    common.save_figure(fig, folder, 'fig5_loss_surface')


def figure_gradients(results, folder):
    g, names = results['gallery'], results['classes']
    image, methods = common.unpack(g['image']), list(g['gradient'])
    fig, axes = common.new_figure(len(image), 1 + len(methods), 1.5 * (1 + len(methods)), 1.55 * len(image))
    for i, row in enumerate(axes):
        common.show_image(row[0], image[i], names[g['label'][i]])
        for axis, method in zip(row[1:], methods):
            gradient = common.unpack(g['gradient'][method])[i].astype(np.float32)
            limit = 3 * max(gradient.std(), 1e-12)
            common.show_image(axis, np.clip(0.5 + gradient / (2 * limit), 0, 1), METHOD_NAMES[method] if i == 0 else '')
    fig.suptitle(
        'Input gradients of the loss, +-3 standard deviations\n(grey: no influence; after Tsipras et al. 2019)'
    )
    common.save_figure(fig, folder, 'fig6_gradients')


def figure_classes(results, runs, folder):
    y, names = np.array(results['test_labels']), results['classes']
    shown = [k for k in range(len(names)) if (y == k).any()][:20]  # 100 classes do not fit
    fig, axes = common.new_figure(1, 1, 7.5, 3.3)
    for i, method in enumerate(runs):
        if method == 'standard' and len(runs) > 1:
            continue  # zero everywhere
        worst = stack_correct(runs[method], 'worst').mean(0)
        natural = stack_correct(runs[method], 'natural').mean(0)
        at = np.arange(len(shown)) + 0.18 * (i - len(runs) / 2)
        robust = [100 * worst[y == k].mean() for k in shown]
        axes[0, 0].vlines(
            at, robust, [100 * natural[y == k].mean() for k in shown], color=METHOD_COLOURS[method], alpha=0.35, lw=1
        )
        axes[0, 0].plot(
            at,
            [100 * natural[y == k].mean() for k in shown],
            'o',
            ms=4,
            color=METHOD_COLOURS[method],
            mfc='none',
            label=METHOD_NAMES[method] + ', natural',
        )
        axes[0, 0].plot(
            at, robust, 'o', ms=4, color=METHOD_COLOURS[method], label=METHOD_NAMES[method] + ', worst case'
        )
    axes[0, 0].set(
        xticks=range(len(shown)),
        ylabel='test accuracy (%)',
        ylim=(-3, 103),
        title='Natural and worst-case accuracy of each class',
    )
    axes[0, 0].set_xticklabels([names[k] for k in shown], rotation=30, ha='right')
    fig.legend(loc='outside lower center', ncols=3)
    common.save_figure(fig, folder, 'fig7_classes')


# -------------------------------------------------------------------------------- the claims


def judge(results, folder):
    """The claims table, from results.json alone."""
    config = results['config']
    runs = {m: [results[f'{m}-s{s}'] for s in config['seeds']] for m in config['methods']}
    long = next(n for n in ('pgd20', 'pgd40') if n in next(iter(runs.values()))[0]['correct'])
    collapsed = {m for m in runs if any(r['collapsed'] for r in runs[m])}
    y = np.array(results['test_labels'])
    claims = []

    def row(text, source, statistic, arrays, involved, threshold=0.0, reference='-', uninformative=None):
        """One claim: supported if the statistic's interval lies above the threshold."""
        value, low, high = bootstrap(statistic, *arrays)
        verdict = effect_verdict(low, high, threshold)
        if collapsed & set(involved):
            verdict = 'uninformative: collapsed model'
        elif uninformative:
            verdict = 'uninformative: ' + uninformative
        measured = f'{100 * value:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]'
        claims.append(claim(text, source, measured, verdict, reference))

    def difference(a, b):
        return a.mean() - b.mean()

    both = {'standard', 'pgd'} <= set(runs)
    cifar18 = config['dataset'] == 'cifar10' and config['arch'] == 'resnet18'
    if both:
        nat = [stack_correct(runs[m], 'natural') for m in ('standard', 'pgd')]
        worst = [stack_correct(runs[m], 'worst') for m in ('standard', 'pgd')]
        row(
            'Adversarial training buys worst-case accuracy: PGD-AT minus standard',
            'Madry et al. 2018',
            difference,
            worst[::-1],
            ('pgd',),
        )
        full = min(v.mean() for v in nat) >= SATURATED
        row(
            'It costs natural accuracy: standard minus PGD-AT',
            'Tsipras et al. 2019',
            difference,
            nat,
            ('pgd',),
            uninformative=f'both above {100 * SATURATED:.0f} %' if full else None,
        )
        value = worst[0].mean()
        claims.append(
            claim(
                'A standard network has no worst-case accuracy (below 2 %)',
                'Madry et al. 2018',
                f'{100 * value:.1f} %',
                'supported' if value < 0.02 else 'contradicted',
            )
        )
    for method in ('pgd', 'trades', 'fgsm'):
        if method in runs:
            row(
                f'Robust overfitting of {METHOD_NAMES[method]}: {ATTACK_NAMES[long]} accuracy, best minus last epoch',
                'Rice et al. 2020',
                difference,
                [stack_correct(runs[method], long), stack_correct(runs[method], long, 'correct_last')],
                (method,),
                reference='+6 to +8 points after 200 epochs, PGD-10, PreAct ResNet-18 (authors\' logs)'
                if method == 'pgd' and cifar18
                else '-',
            )
    if 'fgsm' in runs:
        row(
            'Catastrophic overfitting of FGSM-AT: FGSM minus PGD accuracy at the last epoch '
            f'exceeds {100 * CATASTROPHIC_GAP:.0f} points',
            'Wong et al. 2020; Andriushchenko & Flammarion 2020',
            difference,
            [stack_correct(runs['fgsm'], n, 'correct_last') for n in ('fgsm', long)],
            ('fgsm',),
            threshold=CATASTROPHIC_GAP,
        )
        claims.append(catastrophe_in_training(runs['fgsm']))
    if both:
        alignment = [np.stack([common.unpack(r['alignment']) for r in runs[m]]) for m in ('pgd', 'standard')]
        value, low, high = bootstrap(difference, *alignment)
        claims.append(
            claim(
                'Input gradients of robust models align with the image: mean |cos|, PGD-AT minus standard',
                'Tsipras et al. 2019; Etmann et al. 2019',
                f'{value:+.3f} [{low:+.3f}, {high:+.3f}]',
                'uninformative: collapsed model' if 'pgd' in collapsed else effect_verdict(low, high),
            )
        )
    if 'pgd' in runs and len(np.unique(y)) > 1:
        correct = stack_correct(runs['pgd'], 'worst')
        half = np.random.default_rng(0).random(len(y)) < 0.5  # chooses; the rest measures
        rates = common.class_rates(correct[:, half], y[half])
        ends = [np.unique(y[half])[i] for i in (rates.argmax(), rates.argmin())]
        held = correct[:, ~half]
        row(
            'Classes differ in robustness: best minus worst class of PGD-AT '
            f'({results["classes"][ends[0]]}, {results["classes"][ends[1]]}; chosen on half of '
            f'the test images, measured on the other), worst case, exceeds '
            f'{100 * CLASS_SPREAD:.0f} points',
            'Tian et al. 2021',
            lambda a, b: a[b == ends[0]].mean() - a[b == ends[1]].mean(),
            [held, np.broadcast_to(y[~half], held.shape)],
            ('pgd',),
            threshold=CLASS_SPREAD,
        )
    if {'pgd', 'trades'} <= set(runs):
        claims.append(trades_claim(runs, collapsed))
    for method in runs:
        claims.append(common.masking_claim(METHOD_NAMES[method], runs[method], y))
    common.write_claims(claims, folder)
    return claims


def catastrophe_in_training(models):
    """Control: did the PGD accuracy of FGSM-AT collapse at any epoch of the training?"""
    drops = []
    for run in models:
        robust = [r['val_robust'] for r in run['history'] if r['score'] >= 0]
        drops.append(max((max(robust[: i + 1]) - v for i, v in enumerate(robust)), default=0.0))
    return claim(
        'Catastrophic overfitting of FGSM-AT during training: largest fall of the '
        f'validation PGD-10 accuracy exceeds {100 * CATASTROPHIC_GAP:.0f} points',
        'control',
        f'{100 * max(drops):.1f} points',
        'supported' if max(drops) > CATASTROPHIC_GAP else 'contradicted',
    )


def trades_claim(runs, collapsed):
    """TRADES and PGD-AT lie on one trade-off: what one gains in natural accuracy it loses in
    worst-case accuracy."""
    gaps = [
        bootstrap(
            lambda a, b: a.mean() - b.mean(), stack_correct(runs['trades'], name), stack_correct(runs['pgd'], name)
        )
        for name in ('natural', 'worst')
    ]
    signs = [1 if low > 0 else -1 if high < 0 else 0 for _, low, high in gaps]
    if collapsed & {'pgd', 'trades'}:
        verdict = 'uninformative: collapsed model'
    elif min(stack_correct(runs[m], 'natural').mean() for m in ('pgd', 'trades')) >= SATURATED:
        verdict = f'uninformative: natural accuracies above {100 * SATURATED:.0f} %'
    else:
        verdict = {-1: 'supported', 1: 'contradicted', 0: 'inconclusive'}[signs[0] * signs[1]]
    measured = ', '.join(
        f'{name} {100 * v:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]'
        for name, (v, low, high) in zip(('natural', 'worst case'), gaps)
    )
    return claim(
        'TRADES (beta 6) moves along the trade-off: against PGD-AT it loses in one accuracy what it gains in the other',
        'Zhang et al. 2019',
        measured,
        verdict,
    )


# --------------------------------------------------------------------------------------------


def study(args):
    """Train and measure; returns (folder, results)."""
    device = common.pick_device(args.device)
    folder, config = common.start_run('train_at', args)
    data = common.study_data(args, device)
    results = common.load_results(folder, config, __file__, args.fresh)
    results |= dict(classes=data.classes, classes_count=len(data.classes), test_labels=data.test[1].tolist())
    rows, models = [], {}
    for seed in args.seeds:
        for method in args.methods:
            trained = common.train_model(args, data, method, seed, device)
            rows += trained['history']
            common.write_metrics(folder / 'metrics.csv', rows)
            common.measure(
                results, f'{method}-s{seed}', lambda: evaluate_model(args, data, trained, seed, device), folder
            )
            if seed == args.seeds[0]:
                models[method] = common.restore(trained, 'best', args, data, device)
    common.measure(results, 'gallery', lambda: gallery(args, data, models, device), folder)
    return folder, common.finish(folder, results)


def print_table(results):
    """Natural and robust accuracy of every model."""
    config = results['config']
    runs = {m: [results[f'{m}-s{s}'] for s in config['seeds']] for m in config['methods']}
    names = list(next(iter(runs.values()))[0]['correct'])
    common.log.info('\n%-10s' + '%11s' * len(names) + '%9s', 'best epoch', *(ATTACK_NAMES[n] for n in names), 'minutes')
    for method, models in runs.items():
        rates = [100 * stack_correct(runs[method], n).mean() for n in names]
        common.log.info(
            '%-10s' + '%10.1f%%' * len(names) + '%9.1f',
            METHOD_NAMES[method],
            *rates,
            sum(r['seconds'] for r in models) / 60,
        )


def make_parser():
    parser = common.make_parser(__doc__, DEFAULTS)
    parser.add_argument(
        '--methods', nargs='+', choices=common.METHODS, metavar='M', help='of ' + ', '.join(common.METHODS)
    )
    common.add_attack_flags(parser)
    return parser


def main(argv=None):
    args = common.parse(make_parser(), argv)
    folder, results = common.measured(args, study, 'train_at')
    print_table(results)
    draw(results, folder)
    judge(results, folder)


if __name__ == '__main__':
    common.entry(main)
