from PIL import Image

from tests.data.trees import write_tree
from tests.train.recipes import tiny_recipe
from vit_efficient.train import train
from vit_efficient_cli import main


def run(folder, data, **model_args):
    config = tiny_recipe(data, folder)
    config.model.args = {**config.model.args, **model_args}
    config.sched.epochs = 1
    train(config)
    return str(folder)


def test_from_the_command_line(tmp_path, capsys):
    data, out = write_tree(tmp_path / 'data'), tmp_path / 'one.png'
    image = str(next((data / 'val').rglob('*.png')))
    one = run(tmp_path / 'one', data, global_pool='aggregate', pool_heads=2)
    assert main(['attention-map', one, image, '--out', str(out)]) == 0
    said = capsys.readouterr().out
    assert 'aggregation, head 0: ' in said and 'aggregation, head 1: ' in said
    assert '% to tokens that are no patches' in said and f'saved {out}' in said
    with Image.open(out) as picture:
        wide = picture.width
    assert main(['attention-map', one, '0', '--data', str(data / 'val'), '--mean', '--out', str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.width < wide
    assert main(['attention-map', one, image, '--classes', '1', '--out', str(out)]) == 2
    assert '--classes 1: the model has one query for all classes' in capsys.readouterr().err

    each = run(tmp_path / 'each', data, global_pool='aggregate', pool_tokens='class')
    assert main(['attention-map', each, image, '--classes', '1', '0', '--out', str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    names = sorted(path.name for path in (data / 'val').iterdir())
    assert said[0].startswith(f'{names[1]}, head 0: 0.0 %') and said[1].startswith(f'{names[0]}, head 0')
    assert main(['attention-map', each, image, '--out', str(out)]) == 0
    assert main(['attention-map', each, image, '--classes', '9', '--out', str(out)]) == 2
    assert '--classes: the model has classes 0 … ' in capsys.readouterr().err
    assert main(['attention-map', each, image, '--block', '0']) == 2
    assert 'whose keys are not the patches' in capsys.readouterr().err
