import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from vit_efficient.report.comparison import compare, compare_with_first, mcnemar
from vit_efficient.report.runs import Entry
from vit_efficient.train import Config
from vit_efficient.train.evaluation import Evaluation
from vit_efficient.train.run_folder import predictions_table
from vit_efficient.utils.files import write_text

pytestmark = pytest.mark.once


@pytest.mark.parametrize(('b', 'c'), [(0, 0), (1, 0), (5, 5), (3, 14), (30, 61), (900, 1100), (20, 3000)])
def test_mcnemar_against_scipy(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(c, b) == mcnemar(b, c)


def test_paired_comparison():
    draw = np.random.default_rng(1)
    first = draw.random((3, 2000)) < 0.9
    other = first ^ (draw.random((3, 2000)) < 0.04)
    found = compare(first, other)
    gains = (other.astype(float) - first).mean(axis=0)
    assert found.difference == pytest.approx(100 * gains.mean())
    assert found.pairs == 6000
    assert found.only_other - found.only_first == round(found.difference / 100 * 6000)
    assert found.p == pytest.approx(binomtest(found.only_first, found.only_first + found.only_other).pvalue)
    normal = 100 * 1.96 * gains.std() / 2000**0.5
    assert found.low == pytest.approx(found.difference - normal, abs=0.1)
    assert found.high == pytest.approx(found.difference + normal, abs=0.1)
    assert found == compare(first, other)


def test_paired_comparison_of_equals_and_of_bad_shapes():
    found = compare([[True, False]], [[True, False]])
    assert (found.p, found.difference, found.low, found.high) == (1, 0, 0, 0)
    for other in ([[True]], [True, False], []):
        with pytest.raises(ValueError, match='seeds, images'):
            compare([[True, False]], other)


def entry(folder, label, answers, columns=('label', 'predicted', 'probability', 'label_probability')):
    """Runs of which seed s answers answers[s], all of four images of class 1."""
    configs = [Config(seed=seed, output=str(folder / f'{label}-{seed}')) for seed in range(len(answers))]
    for config, predicted in zip(configs, answers, strict=True):
        rows = [(i, 1, answer, 0.75, 0.25)[: 1 + len(columns)] for i, answer in enumerate(predicted)]
        table = predictions_table(Evaluation(0.0, 4, 1.0, ('index', *columns), rows), '{}.png'.format, ['a', 'b'])
        write_text(Path(config.output) / 'predictions.csv', table)
    return Entry(folder / f'{label}.yaml', configs, label)


def test_predictions_say_names_and_probabilities(tmp_path):
    path = entry(tmp_path, 'one', [[0, 1, 1, 1]]).runs[0].path / 'predictions.csv'
    assert next(csv.DictReader(path.open())) == {
        **{'index': '0', 'file': '0.png', 'label': '1', 'label_name': 'b', 'predicted': '0', 'predicted_name': 'a'},
        **{'probability': '0.75', 'label_probability': '0.25'},
    }
    nameless = predictions_table(Evaluation(0.0, 1, 1.0, ('index', 'label', 'predicted'), [(0, 1, 0)]), str)
    assert nameless == 'index,file,label,predicted\n0,0,1,0\n'


def test_runs_from_before_predictions_had_names_are_compared(tmp_path):
    first = entry(tmp_path, 'first', [[1, 1, 1, 1]], ('label', 'predicted'))
    old = '\n'.join(f'{i},{i}.png,1,1' for i in range(4))  # as it was written then
    write_text(first.runs[0].path / 'predictions.csv', f'index,file,label,predicted\n{old}\n')
    text = compare_with_first([first, entry(tmp_path, 'other', [[0, 1, 1, 1]])])
    assert [cell.strip() for cell in text.splitlines()[2].split('|')[1:6]] == ['other', '4', '1', '0', '-25.00']


def test_a_single_seed_says_that_it_is_over_images_only(tmp_path):
    first = entry(tmp_path, 'first', [[1, 1, 1, 1], [1, 1, 0, 1]])
    two, one = entry(tmp_path, 'two', [[0, 1, 1, 1]] * 2), entry(tmp_path, 'one', [[0, 1, 1, 1]])
    assert 'single seed' not in compare_with_first([first, two])
    assert ' A single seed: p and interval are over images only' in compare_with_first([first, one])
    assert ' A single seed of one: p and interval are over images only' in compare_with_first([first, two, one])
