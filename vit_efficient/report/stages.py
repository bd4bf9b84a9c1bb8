"""What happened within runs: costs and accuracies stage by stage, and the truncations that were learned."""

from collections.abc import Sequence
from typing import Any

import timm
import torch

from vit_efficient.data import input_shape
from vit_efficient.flops import count_flops
from vit_efficient.report.columns import ACCURACIES, COSTS, accuracy_columns, mean_and_spread
from vit_efficient.report.runs import Entry
from vit_efficient.report.table import Column, Table
from vit_efficient.train.stages import list_stages, model_at_stages


def stage_table(entries: Sequence[Entry], accuracies: Sequence[str]) -> str:
    """What the models of recipes with stages cost, and how good they were, at the end of each; '' without such."""
    rows = [row for entry in entries if entry.configs[0].stages for row in _stage_rows(entry, accuracies)]
    columns = [
        Column('model', 'stage by stage'),
        Column('stage', 'begins with'),
        Column('epochs'),
        *COSTS,
        *accuracy_columns(accuracies),
    ]
    return Table(columns, rows).render() if rows else ''


def _stage_rows(entry: Entry, accuracies: Sequence[str]) -> list[dict[str, Any]]:
    config, rows = entry.configs[0], []
    with torch.device('meta'):
        model = timm.create_model(
            config.model.name, **{**config.model.args, 'num_classes': entry.saved.model.num_classes}
        )
        sizes = entry.results[0].get('truncation', {}).get('kept')  # of the first seed
        for number, (stage, staged) in enumerate(model_at_stages(model, list_stages(config), sizes)):
            count = count_flops(staged, input_shape(staged, entry.saved.preprocessing))
            rows.append(
                {
                    'model': entry.label if not number else '',
                    'stage': str(stage),
                    'epochs': stage.end - stage.start,
                    'gmacs': count.total / 1e9,
                    'attention_gmacs': count.attention / 1e9,
                    **mean_and_spread([result['stages'][number] for result in entry.results], accuracies),
                }
            )
    return rows


def truncation_table(entries: Sequence[Entry], accuracies: Sequence[str]) -> str:
    """What each seed has learned to keep, what making that a hard truncation cost, and what training mended."""
    rows = []
    for entry in (entry for entry in entries if entry.learns_truncation):
        for config, result in zip(entry.configs, entry.results, strict=True):
            learned = result['truncation']
            rows.append(
                {
                    'model': entry.label if config is entry.configs[0] else '',
                    'seed': config.seed,
                    'kept': _sizes(learned['kept']),
                    'cost': learned['cost'],
                    **{f'{name}_before': learned['learned'][name] for name in accuracies},
                    **{f'{name}_frozen': learned['frozen'][name] for name in accuracies},
                    **{name: result[name] for name in accuracies},
                }
            )
    columns = [Column('model', 'learned truncation'), Column('seed'), Column('kept', 'coefficients kept')]
    columns.append(Column('cost', 'share of MACs', 3))
    for name in accuracies:
        columns += [
            Column(f'{name}_before', f'{ACCURACIES[name][0]}, as learned', 2),
            Column(f'{name}_frozen', 'made hard', 2),
            Column(name, 'at the end', 2),
        ]
    return Table(columns, rows).render() if rows else ''


def _sizes(learned: dict[str, Any]) -> str:
    """Sizes as text, such as '4×4', of a patch, or '3×4, 2×2', of the grid in each layer."""
    texts = []
    for size in learned.values():
        channels = size if isinstance(size[0], list) else [size]
        texts.append('/'.join(dict.fromkeys(f'{h}×{w}' for h, w in channels)))
    return ', '.join(texts)
