"""The parts of the table of accuracy: columns, what happened within runs, and the text below."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import timm
import torch
from torch import nn

from vit_efficient.data import input_shape
from vit_efficient.flops import count_flops
from vit_efficient.models.blocks import grid_blocks
from vit_efficient.models.create import attention_of
from vit_efficient.models.forward import GridForward, backbone_of
from vit_efficient.report.runs import Entry
from vit_efficient.report.table import Column, Table
from vit_efficient.train.stages import list_stages, model_at_stages
from vit_efficient.utils.compat import model_args
from vit_efficient.utils.environment import describe_environment, one_line

# The accuracies of a table: what a column is called, and an axis of the plot.
ACCURACIES = {
    'top1': ('top-1 (%)', 'top-1 accuracy (%)'),
    'foreground_miou': ('foreground mIoU (%)', 'mIoU without the class none (%)'),
    'miou': ('mIoU (%)', 'mIoU (%)'),
    'boundary_f': ('boundary F (%)', 'boundary F (%)'),
}
CONVERTED = 'vit_converted'  # any model of timm, converted
COSTS = [Column('gmacs', 'GMACs', 4), Column('attention_gmacs', 'in attention', 4)]


def model_title(name: str, model: nn.Module) -> str:
    """What a table calls a trained model: 'vit_tiny_patch16_224 → dct in 6-11' where attentions are not the name's.

    Args:
        name: That of the recipe. Of a model folder, and of what stands for any converted model, the title has the name
            of the architecture.
        model: As it was saved, at the end of all stages.
    """
    if name.startswith('local-dir:') or name == CONVERTED:
        architecture = model.pretrained_cfg['architecture']
        name = model_args(model)['base'] if architecture == CONVERTED else architecture
    model = backbone_of(model)
    if not isinstance(model, GridForward):
        return name
    own, layers = attention_of(name, {}) or 'full', {}
    for i, (attention, _) in zip(grid_blocks(model), model.attention_spec(), strict=True):
        layers.setdefault(attention, []).append(i)
    became = [
        attention + (f' in {_ranges(indices)}' if len(indices) < len(grid_blocks(model)) else '')
        for attention, indices in layers.items()
        if attention != own
    ]
    return f'{name} → {", ".join(became)}' if became else name


def _ranges(indices: Sequence[int]) -> str:
    """Ascending numbers as text: '0, 6-11'."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ', '.join(f'{run[0]}-{run[-1]}' if len(run) > 1 else str(run[0]) for run in runs)


def accuracy_columns(accuracies: Sequence[str]) -> list[Column]:
    """The columns of what `mean_and_spread` gives."""
    columns = []
    for name in accuracies:
        columns.append(Column(name, ACCURACIES[name][0], 2, spread=f'{name}_std'))
        columns.append(Column(f'{name}_std', digits=2))
    return columns


def mean_and_spread(results: Sequence[dict[str, Any]], accuracies: Sequence[str]) -> dict[str, float | None]:
    """The mean of each accuracy over seeds, and its standard deviation, None for one seed."""
    found: dict[str, float | None] = {}
    for name in accuracies:
        values = [result[name] for result in results]
        found |= {name: fmean(values), f'{name}_std': stdev(values) if len(values) > 1 else None}
    return found


def stage_table(entries: Sequence[Entry], accuracies: Sequence[str]) -> str:
    """What the models of recipes with stages cost, and how good they were, at the end of each; '' without such."""
    rows = []
    for entry in entries:
        config = entry.configs[0]
        if not config.stages:
            continue
        with torch.device('meta'):
            arguments = {**config.model.args, 'num_classes': entry.saved.model.num_classes}
            model = timm.create_model(config.model.name, **arguments)
            sizes = entry.results[0].get('truncation', {}).get('kept')  # of the first seed
            for number, (stage, staged) in enumerate(model_at_stages(model, list_stages(config), sizes)):
                count = count_flops(staged, input_shape(staged, entry.saved.preprocessing))
                row = dict(model='' if number else entry.label, stage=str(stage), epochs=stage.end - stage.start)
                row |= dict(gmacs=count.total / 1e9, attention_gmacs=count.attention / 1e9)
                rows.append(row | mean_and_spread([result['stages'][number] for result in entry.results], accuracies))
    columns = [Column('model', 'stage by stage'), Column('stage', 'begins with'), Column('epochs')]
    return Table([*columns, *COSTS, *accuracy_columns(accuracies)], rows).render() if rows else ''


def truncation_table(entries: Sequence[Entry], accuracies: Sequence[str]) -> str:
    """What each seed has learned to keep, what making that a hard truncation cost, and what training mended."""
    rows = []
    for entry in (entry for entry in entries if entry.learns_truncation):
        for config, result in zip(entry.configs, entry.results, strict=True):
            learned = result['truncation']
            row = dict(model=entry.label if config is entry.configs[0] else '', seed=config.seed)
            row |= dict(kept=_sizes(learned['kept']), cost=learned['cost'])
            for name in accuracies:
                row[f'{name}_before'] = learned['learned'][name]
                row[f'{name}_frozen'] = learned['frozen'][name]
                row[name] = result[name]
            rows.append(row)
    columns = [Column('model', 'learned truncation'), Column('seed'), Column('kept', 'coefficients kept')]
    columns.append(Column('cost', 'share of MACs', 3))
    for name in accuracies:
        columns.append(Column(f'{name}_before', f'{ACCURACIES[name][0]}, as learned', 2))
        columns += [Column(f'{name}_frozen', 'made hard', 2), Column(name, 'at the end', 2)]
    return Table(columns, rows).render() if rows else ''


def _sizes(learned: dict[str, Any]) -> str:
    """Sizes as text, such as '4×4', of a patch, or '3×4, 2×2', of the grid in each layer."""
    texts = []
    for size in learned.values():
        channels = size if isinstance(size[0], list) else [size]
        texts.append('/'.join(dict.fromkeys(f'{h}×{w}' for h, w in channels)))
    return ', '.join(texts)


def explanation(entries: Sequence[Entry]) -> str:
    """What the columns of the table mean, save for the speed."""
    task, results = entries[0].configs[0].task, [result for entry in entries for result in entry.results]
    what = {'classification': 'Top-1', 'segmentation': 'mIoU', 'both': 'Top-1 and mIoU'}[task]
    images = ' or '.join(sorted({str(result['val_images']) for result in results}))
    spread = ', mean ± standard deviation over seeds' if len(entries[0].results) > 1 else ''
    parts = [f'{what} on {images} validation images{spread}.']
    skipped = [max(result.get(name, 0) for result in results) for name in ('train_skipped', 'val_skipped')]
    if any(skipped):
        parts.append('A run skipped up to {} training and {} validation images that cannot be read.'.format(*skipped))
    updates = {entry.label: ' or '.join(dict.fromkeys(map(_update, entry.results))) for entry in entries}
    if len(set(updates.values())) == 1:
        parts.append(f'Trained with {next(iter(updates.values()))}.')
    else:
        parts.append(f'Trained with: {"; ".join(f"{label}, {update}" for label, update in updates.items())}.')
    if task != 'classification':
        parts.append(
            'mIoU: intersection over union of the patches or pixels of each class, all images together, averaged over '
            'the classes; foreground mIoU: without the class none or background.'
        )
    parts.append(
        'GMACs per image; in attention: projections, products and transforms. Kept tokens: what a query attends to.'
    )
    return ' '.join(parts)


def _update(result: dict[str, Any]) -> str:
    """What an update took in training."""
    scale = result['environment'].get('scale')
    if not scale:
        return 'updates of a number of images that the run does not tell'
    return '{images_per_update} images per update ({batch_size} × {grad_accum} accumulated × {processes} {of})'.format(
        of='process' if scale['processes'] == 1 else 'processes', **scale
    )


def environments(entries: Sequence[Entry], device: torch.device) -> str:
    """What the table was measured on, and what the runs were trained on where that is another."""
    here = one_line(describe_environment(device))
    trained = {one_line(result['environment']) for entry in entries for result in entry.results}
    lines = [f'Measured on {here}.', *(f'Trained on {there}.' for there in sorted(trained - {here}))]
    return ' '.join(lines) + '\n'
