"""What stands below the table: what was measured, on what, and how the models were trained."""

from collections.abc import Sequence
from typing import Any

import torch

from vit_efficient.report.runs import Entry
from vit_efficient.utils.environment import describe_environment, one_line


def explanation(entries: Sequence[Entry]) -> str:
    """What the columns of the table mean, save for the speed."""
    results = [result for entry in entries for result in entry.results]
    what = {'classification': 'Top-1', 'segmentation': 'mIoU', 'both': 'Top-1 and mIoU'}[entries[0].task]
    images = ' or '.join(sorted({str(result['val_images']) for result in results}))
    spread = ', mean ± standard deviation over seeds' if len(entries[0].results) > 1 else ''
    parts = [f'{what} on {images} validation images{spread}.']
    skipped = [max(result.get(name, 0) for result in results) for name in ('train_skipped', 'val_skipped')]
    if any(skipped):
        parts.append(
            f'A run skipped up to {skipped[0]} training and {skipped[1]} validation images that cannot be read.'
        )
    parts.append(_updates(entries))
    if entries[0].task != 'classification':
        parts.append(
            'mIoU: intersection over union of the patches of each class, all images together, averaged over the '
            'classes; foreground mIoU: without the class none.'
        )
    parts.append(
        'GMACs per image; in attention: projections, products and transforms. Kept tokens: what a query attends to.'
    )
    return ' '.join(parts)


def _updates(entries: Sequence[Entry]) -> str:
    """What an update took in training, of each model where they differ."""
    updates = {entry.label: ' or '.join(dict.fromkeys(map(_update, entry.results))) for entry in entries}
    if len(set(updates.values())) == 1:
        return f'Trained with {next(iter(updates.values()))}.'
    return f'Trained with: {"; ".join(f"{label}, {update}" for label, update in updates.items())}.'


def _update(result: dict[str, Any]) -> str:
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
