"""Plans as tables and pictures: what each attention costs in each layer, and what a budget buys."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vit_efficient.attention import trained_options
from vit_efficient.benchmark.models import ModelCandidate, ModelSetting, benchmark_models
from vit_efficient.data import Preprocessing
from vit_efficient.data.squares import find_photographs, large_enough
from vit_efficient.models.plans import Plan
from vit_efficient.planning import Planner
from vit_efficient.report.plot import COLOURS
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.files import save_figure
from vit_efficient.utils.packages import needing

logger = logging.getLogger(__name__)


def open_images(
    folders: Sequence[str | Path], preprocessing: Preprocessing, limit: int, enlarge: bool = False
) -> list[Tensor]:
    """The middle of photographs, as a model takes them, (C, side, side) each; a line is logged that counts them.

    Args:
        folders: As `find_photographs` takes them.
        preprocessing: Of the model, for square images.
        limit: The most images; of more they are taken evenly from all.
        enlarge: Whether smaller ones are enlarged, and not left out.

    Raises:
        UserError: If there is no photograph, or none is large enough.
    """
    found = find_photographs(folders)
    *_, side = preprocessing.input_size
    large = large_enough(found, side, enlarge)
    count, few = min(limit, len(large)), len(found) - len(large)
    left_out = f'; left out {few} of {len(found)}, which are smaller' * bool(few)
    logger.info('%d images of %d × %d pixels%s', count, side, side, left_out)
    return [large[i * len(large) // count].square(preprocessing) for i in range(count)]


def sensitivity_table(planner: Planner, plan: Plan) -> Table:
    """What each option costs in each layer alone; those of the plan are bold."""
    rows = []
    for block, losses, chosen in zip(planner.layers, planner.sensitivities(), planner.numbers(plan), strict=True):
        cells = {label: f'{loss:.2g}' for label, loss in zip(planner.labels, losses, strict=True)}
        cells[planner.labels[chosen]] = f'**{cells[planner.labels[chosen]]}**'
        rows.append({'block': block, **cells})
    return Table(['block', *planner.labels], rows)


def front_table(planner: Planner, plans: Sequence[Plan], rounds: int = 5, memory: bool = True) -> Table:
    """What the budgets of plans buy, beside the model as it is: loss, cosines, GMACs, and the time and the memory of an
    image, for which the models are built again with random weights."""
    probe, prefix = planner.probe, planner.probe.model.num_prefix_tokens
    exact, _ = planner.measure((0,) * len(planner.layers))
    same = dict(patch=1.0, centred=1.0, prefix=1.0 if prefix else None)
    rows: list[dict[str, Any]] = [dict(plan='as it is', loss=exact, predicted=exact, **same)]
    for plan in plans:
        kept = {key: plan.fidelity.get(key) for key in same}
        rows.append(dict(plan=f'{plan.budget:g}', loss=plan.measured, predicted=plan.predicted, **kept))
    arguments = {key: value for key, value in probe.arguments.items() if key != 'img_size'}
    # A model that is built begins with other options than one that is converted.
    converted = [[(name, trained_options(name, options)) for name, options in plan.layers] for plan in plans]
    specs = [arguments['attention'], *converted]
    entry = probe.model.pretrained_cfg['architecture']
    candidates = [
        ModelCandidate(entry, {**arguments, 'attention': spec}, row['plan'])
        for spec, row in zip(specs, rows, strict=True)
    ]
    setting = ModelSetting(device=probe.device)
    [measured] = benchmark_models(candidates, [probe.input_size[1]], setting=setting, rounds=rounds, memory=memory)
    for row, found in zip(rows, measured, strict=True):
        row |= {key: found[key] for key in ('gmacs', 'milliseconds', 'peak_mib', 'error')}
    columns = [Column('plan', f'budget ({planner.unit})'), Column('loss', f'loss ({planner.loss_name})', 4)]
    columns += [Column('predicted', digits=4), *(Column(key, f'{key} cosine', 4) for key in same)]
    columns += [Column('gmacs', 'GMACs', 2), Column('milliseconds', 'ms', 1), Column('peak_mib', 'peak MiB', 1)]
    columns += [Column('error')] if any(row['error'] for row in rows) else []
    return Table(columns, [{key: value for key, value in row.items() if value is not None} for row in rows])


def plot_plan(planner: Planner, plan: Plan, path: str | Path) -> None:
    """Saves a picture: by layers and options, the loss of each alone in colour, the plan's framed."""
    with needing('train', 'plots are drawn with'):
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

    losses = planner.sensitivities().T
    options, layers = losses.shape
    figure = Figure(figsize=(3.6 + 0.4 * layers, 1.6 + 0.35 * options), dpi=150, layout='constrained')
    axes = figure.subplots()
    worst = losses.max() if losses.max() > 0 else 1.0
    scale = LogNorm(worst / 1e4, worst)  # what costs less costs nothing
    shown = axes.imshow(losses.clip(worst / 1e4), cmap='YlOrRd', norm=scale, aspect='auto')
    for layer, option in enumerate(planner.numbers(plan)):
        axes.add_patch(Rectangle((layer - 0.5, option - 0.5), 1, 1, fill=False, edgecolor=COLOURS[0], linewidth=2))
    axes.set_xticks(range(layers), planner.layers)
    axes.set_yticks(range(options), planner.labels, fontsize='small')
    axes.set_xlabel('block')
    sides = ' × '.join(map(str, plan.img_size))
    figure.suptitle(
        f'{plan.model}, {sides} px\n{plan.share:.1%} of the {plan.unit}: loss {plan.measured:.3g}', fontsize='medium'
    )
    figure.colorbar(shown, label=f'loss ({planner.loss_name}) of one layer alone')
    save_figure(figure, path)
