"""What pruning leaves of the accuracy on 5,000 MNIST digits: methods, densities and seeds; a table and a plot.

    python recipes/mnist5k/pruning/measure.py [full dct] [--seeds 0 1 2] [--out recipes/mnist5k/pruning]

Trains what is not trained yet, below --runs: the dense models, then each of them pruned once and trained on, as the
recipes beside this file say.
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean, stdev

import torch

from vit_efficient.prune import METHODS
from vit_efficient.report.comparison import compare
from vit_efficient.report.plot import line_style, log_axis, tidy
from vit_efficient.report.table import Column, Table
from vit_efficient.train import load_recipe, train
from vit_efficient.train.run_folder import RunFolder
from vit_efficient.utils.environment import describe_environment, one_line
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import save_figure, write_text
from vit_efficient.utils.packages import needing

HERE = Path(__file__).parent
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)
RIVAL = 'uniform'
FIRST = 'patch embedding'


def trained(recipe: Path, folder: Path, *overrides: str) -> RunFolder:
    """A run of a recipe, trained now unless it is there."""
    run = RunFolder(folder)
    if not run.is_finished:
        train(load_recipe(recipe, [f'output={folder}', 'resume=auto', *overrides]))
    return run


def right(run: RunFolder) -> list[bool]:
    return [row['label'] == row['predicted'] for row in run.predictions()]


def measure(model: str, seeds: list[int], runs: Path) -> list[dict]:
    """Rows of a model: answers by method, the dense model first."""
    dense = {s: trained(HERE.parent / f'{model}.yaml', runs / f'{model}-s{s}', f'seed={s}') for s in seeds}
    rows = [{'model': model, 'density': 1.0, 'dense': [right(dense[seed]) for seed in seeds]}]
    for density in DENSITIES:
        answers: dict[str, list[list[bool]]] = {}
        first: dict[str, list[float]] = {}
        for method in METHODS:
            for seed in seeds:
                stages = f'[{{epochs: 6, prune: {1 - density:.2f}, prune_method: {method}}}]'
                folder = runs / 'pruning' / f'{model}-{method}-{density}-s{seed}'
                given = f'seed={seed}', f'model.init_from={dense[seed].path}', f'stages={stages}'
                run = trained(HERE / f'{model}.yaml', folder, *given)
                answers.setdefault(method, []).append(right(run))
                first.setdefault(method, []).append(100 * run.result['pruning'][0]['roles'][FIRST])
        rows.append({'model': model, 'density': density, FIRST: first, **answers})
    return rows


def shown(answers: list[list[bool]]) -> dict[str, float]:
    accuracies = [100 * fmean(each) for each in answers]
    return {'mean': fmean(accuracies), 'spread': stdev(accuracies) if len(accuracies) > 1 else None}


def table(rows: list[dict]) -> Table:
    columns = [Column('model'), Column('density')]
    for name in ('dense', *METHODS):
        columns += [Column(name, digits=2, spread=f'{name}±'), Column(f'{name}±')]
    columns += [Column('difference', f'lamp − {RIVAL} (points)', 2), Column('interval', '95 % interval')]
    lines = []
    for row in rows:
        line = {'model': row['model'], 'density': row['density']}
        for name in ('dense', *METHODS):
            if name in row:
                found = shown(row[name])
                line |= {name: found['mean'], f'{name}±': found['spread']}
        if RIVAL in row:
            pair = compare(row[RIVAL], row['lamp'])
            line |= {'difference': pair.difference, 'interval': f'{pair.low:+.2f} … {pair.high:+.2f}'}
        lines.append(line)
    return Table(columns, lines)


def table_of_first(rows: list[dict]) -> Table:
    """What is left of the patch embedding, in percent, mean over seeds."""
    columns = [Column('model'), Column('density'), *(Column(name, digits=1) for name in METHODS)]
    lines = [
        {'model': row['model'], 'density': row['density'], **{name: fmean(row[FIRST][name]) for name in METHODS}}
        for row in rows
        if FIRST in row
    ]
    return Table(columns, lines)


def draw(rows: list[dict], path: Path) -> None:
    with needing('train', 'plots are drawn with'):
        from matplotlib.figure import Figure

    models = list(dict.fromkeys(row['model'] for row in rows))
    figure = Figure(figsize=(4.2 * len(models), 3.4), dpi=150, layout='constrained')
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        of_model = [row for row in rows if row['model'] == model]
        axes.axhline(shown(of_model[0]['dense'])['mean'], color='0.6', linestyle=':', label='dense')
        for number, method in enumerate(METHODS):
            points = [(row['density'], shown(row[method])) for row in of_model if method in row]
            x, found = [100 * density for density, _ in points], [each for _, each in points]
            spread = [each['spread'] or 0 for each in found]
            axes.errorbar(x, [each['mean'] for each in found], spread, label=method, **line_style(number))
        axes.set(title=model, ylabel='top-1 (%)', xscale='log')
        tidy(axes, 'weights left (%)')
        log_axis(axes.xaxis, [100 * density for density in DENSITIES])
    figure.get_axes()[0].legend(fontsize='small')
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', default=['full', 'dct'], choices=('full', 'dct'), metavar='MODEL')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--runs', type=Path, default=Path('runs/mnist5k'), metavar='FOLDER')
    parser.add_argument('--out', type=Path, metavar='FOLDER')
    args = parser.parse_args(argv)
    try:
        rows = [row for model in args.models for row in measure(model, args.seeds, args.runs)]
        about = (
            f'Top-1 accuracy (%), mean ± standard deviation of {len(args.seeds)} seeds; pruned once, then 6 epochs. '
            'Differences are paired by image and seed; intervals: bootstrap over images. '
            f'{one_line(describe_environment(torch.device("cpu")))}.'
        )
        text = (
            f'{table(rows).render()}\n{about}\n\nOf the {FIRST}, weights left (%):\n\n{table_of_first(rows).render()}'
        )
        if args.out:
            write_text(args.out / 'results.md', text)
            draw(rows, args.out / 'results.png')
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(text, end='')
    return 0


if __name__ == '__main__':
    sys.exit(main())
