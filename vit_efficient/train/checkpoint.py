"""The state of a run on disk."""

from pathlib import Path
from typing import Any

import torch

from vit_efficient.files import replacing


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Saves the state of a run, atomically: a failure leaves the previous checkpoint as it was."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, device: torch.device | str = 'cpu') -> dict[str, Any]:
    """Loads what save_checkpoint saved. Nothing in the file is executed.

    Raises:
        ValueError: If the file is not such a checkpoint.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    # A damaged file raises whatever the archive reader or the unpickler stumbles over.
    except Exception as error:
        raise ValueError(f'{path}: not a readable checkpoint ({type(error).__name__})') from error
    if not isinstance(state, dict) or 'identity' not in state:
        raise ValueError(f'{path}: not a checkpoint of a training run')
    return state
