from PIL import Image

from tests.data.trees import write_tree
from tests.train.recipes import tiny_recipe
from tests.train.test_stages import STAGES, staged_recipe
from vit_efficient.train import train
from vit_efficient_cli import main


def test_from_the_command_line(tmp_path, capsys):
    data = write_tree(tmp_path / 'data')
    train(staged_recipe(data, tmp_path / 'run', STAGES[:2]))
    image, out = next((data / 'val').rglob('*.png')), tmp_path / 'one.png'
    assert main(['leaves', str(tmp_path / 'run'), str(image), '--out', str(out)]) == 0
    said = capsys.readouterr().out
    assert 'block 1: entropy ' in said and 'bits of 2' in said and 'block 0' not in said
    # The same image by its number in the data.
    assert (
        main(['leaves', str(tmp_path / 'run'), '0', '--data', str(data / 'val'), '--out', str(out), '--queries']) == 0
    )
    assert Image.open(out).width > 0
    assert main(['leaves', str(tmp_path / 'run'), '6', '--data', str(data / 'val')]) == 2
    assert 'IMAGE must be a number from 0 to 5 with --data' in capsys.readouterr().err
    config = tiny_recipe(data, tmp_path / 'dct')
    config.sched.epochs = 1
    train(config)
    assert main(['leaves', str(tmp_path / 'dct'), str(image)]) == 2
    assert 'no layer of the model has trees' in capsys.readouterr().err
