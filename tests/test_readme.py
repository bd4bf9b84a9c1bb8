"""The README does what it says."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch

import vit_efficient
from vit_efficient.train import load_recipe
from vit_efficient_cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')


def blocks(language):
    return re.findall(rf'```{language}\n(.*?)```', README, re.DOTALL)


def commands():
    text = '\n'.join(blocks('sh')).replace('\\\n', ' ')
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith('vit-efficient')]


def test_python(tmp_path, monkeypatch, capsys):
    """All blocks in order, without the download."""
    create = timm.create_model

    def offline(name, pretrained=False, **arguments):
        return create(name, pretrained=pretrained and name.startswith('local-dir:'), **arguments)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, 'create_model', offline)
    monkeypatch.setattr('vit_efficient.attention.registry.ATTENTIONS', dict(_registered()))
    names: dict = {}
    for block in blocks('python'):
        exec(compile(block, 'README.md', 'exec'), names)
    assert 'GMACs' in capsys.readouterr().out
    assert timm.create_model('local-dir:my_vit', pretrained=True).attention_spec()[6][0] == 'dct'
    assert names['model'](torch.zeros(1, 3, 224, 224)).shape == (1, 1000)  # of the mechanism that it adds


def _registered():
    from vit_efficient.attention import registry

    return registry.ATTENTIONS


def test_flops_command(capsys):
    command = next(c for c in commands() if c[1] == 'table')
    assert main(command[1:]) == 0
    assert 'vit_dct_base:keep_ratio=1/16' in capsys.readouterr().out


def test_training_commands_are_valid():
    command = next(c for c in commands() if c[1] == 'train')
    config = load_recipe(ROOT / command[2], command[3:])
    assert config.output == 'runs/mine'
    model = timm.create_model(config.model.name, num_classes=7, **config.model.args)
    assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 7)


def test_make_targets_exist():
    makefile = (ROOT / 'Makefile').read_text()
    for target in re.findall(r'make ([\w-]+)', README):
        assert re.search(rf'^{target}:', makefile, re.MULTILINE)


@pytest.mark.parametrize('path', sorted(ROOT.glob('recipes/**/results.md')), ids=lambda path: path.parent.name)
def test_tables_are_those_that_the_tools_printed(path):
    readmes = [ROOT / 'README.md', *ROOT.glob('recipes/**/README.md')]
    shown = {line for readme in readmes for line in readme.read_text(encoding='utf-8').splitlines()}
    printed = [line for line in path.read_text(encoding='utf-8').splitlines() if line.startswith('|')]
    assert printed and set(printed) <= shown


def test_public_names():
    assert all(hasattr(vit_efficient, name) for name in vit_efficient.__all__)
