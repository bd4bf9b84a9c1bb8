from pathlib import Path

import pytest

from vit_efficient.report.parts import explanation
from vit_efficient.report.runs import Entry
from vit_efficient.train import Config
from vit_efficient.utils.files import write_json

pytestmark = pytest.mark.once


def test_how_many_images_were_skipped(tmp_path):
    result = {'val_images': 9, 'environment': {}}
    configs = [Config(output=str(tmp_path / str(seed))) for seed in (0, 1)]
    for config, skipped in zip(configs, ({}, {'train_skipped': 3, 'val_skipped': 4}), strict=True):
        write_json(Path(config.output) / 'result.json', skipped | result)
    text = explanation([Entry(tmp_path, configs)])
    assert 'A run skipped up to 3 training and 4 validation images that cannot be read. ' in text
    assert 'skipped' not in explanation([Entry(tmp_path, configs[:1])])
