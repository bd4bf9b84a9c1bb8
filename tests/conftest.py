import logging
import os

# albumentations would ask the network for a newer version of itself.
os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _said(caplog):
    """What the package has to say is in `caplog.text`."""
    caplog.set_level(logging.INFO, 'vit_efficient')


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker('cuda') and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='needs a GPU'))
