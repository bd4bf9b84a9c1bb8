import gc
import logging
import os
from functools import partial

# albumentations would ask the network for a newer version of itself.
os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
# Open image sizes are long formulas, which sympy forgets after a thousand.
os.environ.setdefault('SYMPY_CACHE_SIZE', '100000')

import pytest
import torch

from vit_efficient.benchmark import timing

# Tracing makes objects by the million, few of them garbage.
gc.set_threshold(50_000)


@pytest.fixture(autouse=True, scope='module')
def _frozen():
    """What is imported, and cached by tests before, is passed over when garbage is collected, as runs in stages do."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _said(caplog):
    """What the package has to say is in `caplog.text`."""
    caplog.set_level(logging.INFO, 'vit_efficient')


@pytest.fixture
def short_clocks(monkeypatch):
    """Benchmarks measure all that they do, but not for long: a second of products before and after each block."""
    turns, rate = timing.take_turns, timing.matmul_rate
    monkeypatch.setattr(timing, 'take_turns', partial(turns, seconds=0.01))
    monkeypatch.setattr(timing, 'matmul_rate', lambda dtype, device, **_: rate(dtype, device, side=256, seconds=0.01))


def pytest_collection_modifyitems(items):
    # What takes long comes first, so that all processes end at about the same time.
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ('compiled', 'subprocess', 'distributed'))))
    for item in items:
        if item.get_closest_marker('cuda') and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='needs a GPU'))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    # Processes of pytest-xdist send what was logged as UTF-8, which lacks the surrogates of odd file names.
    report.sections = [(title, text.encode(errors='backslashreplace').decode()) for title, text in report.sections]
    return report
