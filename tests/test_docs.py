"""README and docs: what they show runs, where they point exists, and every page opens with what it is for."""

import ast
import importlib.util
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

from tests.data.shards import write_saved, write_shards
from tests.data.trees import write_masks, write_tree
from vit_efficient.attention import registry
from vit_efficient.compress import base as compressors
from vit_efficient.data import EvalTransform, read_image, to_array
from vit_efficient.models import save_model
from vit_efficient.report import accuracy
from vit_efficient.report.evaluation import SavedModel
from vit_efficient.train import hooks, load_recipe
from vit_efficient_cli import main

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
FILES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md')), *sorted(ROOT.glob('docs/api/*.md'))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8') for path in FILES}
FENCE = re.compile(r'^```(\S*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)

# Commands run with their own words, and then with these: a later one counts. Each is small, and on the CPU.
SMALL_MODEL = dict(embed_dim=24, num_heads=2)  # of every ViT that a block of Python creates
SMALLER_STILL = {'docs/export.md': dict(depth=2)}
TRAIN = """
    model.args.pretrained=false model.args.img_size=32 model.args.patch_size=16
    model.args.embed_dim=16 model.args.num_heads=2 model.args.depth=2
    data.batch_size=4 grad_accum=1 data.workers=0 data.eval_batch_size=null
    sched.epochs=1 sched.warmup_epochs=0 stages=[] device=cpu amp=none compile=false threads=1
"""
HEAL = """
    model.args.img_size=32 data.img_size=[32,32] data.schedule=[] heal.solve=8 stages=[] sched.epochs=1
    sched.warmup_epochs=0 data.batch_size=4 data.workers=0 device=cpu threads=1
"""
BENCHMARK = '--rounds 1 --no-memory --device cpu --dtype float32'
PRETRAINED = 'vit_small_patch14_dinov2', 'vit_base_patch16_224'
SMALLER = {
    'train': TRAIN,
    'evaluate': '--device cpu',
    'predict': '--device cpu',
    'heal': HEAL,
    'features': '--img-size 224',
    'table accuracy': f'{TRAIN} --seeds 0',
    'benchmark layer': f'--tokens 64 --dim 32 --heads 2 {BENCHMARK}',
    'benchmark model': f'--models vit_full_tiny vit_dct_tiny --img-sizes 32 --batch-size 2 {BENCHMARK}',
    'table families': '--models vit_tiny_patch16_224 vit_tiny_patch16_dinov3_qkvb',
    'table fidelity': '--img-size 32 --enlarge --device cpu',
    'table flops': '--img-sizes 224',
    'table tiles': '--device cpu',
    'plan': '--img-size 224 --enlarge --limit 2 --refine 1 --no-memory --device cpu',
    'plot': '',
    'prune': '',
    'leaves': '',
    'attention-map': '',
    'truncate': '',
    'export': '',
    'recipe list': '',
    'recipe show': '',
    'recipe copy': '',
    'recipe keys': '',
}


def blocks(page: str, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(PAGES[page]) if kind == language]


def commands(page: str) -> Iterator[list[str]]:
    for line in '\n'.join(blocks(page, 'sh')).replace('\\\n', ' ').splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.fixture(scope='module')
def prepared(tmp_path_factory) -> Path:
    """What the pages take for granted: photographs, shards, runs; three classes, eight images of each to train on."""
    folder = tmp_path_factory.mktemp('prepared')
    tree = write_tree(folder / 'images')
    for split in ('train', 'val'):
        write_shards(tree / split, folder / 'shards', split, size=3)
        write_saved(tree / split, folder / 'my_set' / {'train': 'train', 'val': 'validation'}[split])
        with tarfile.open(tree / f'{split}.tar', 'w') as archive:
            archive.add(tree / split, split)
    (folder / 'classes.txt').write_text('c0\nc1\nc2\n')
    write_tree(folder / 'five', channels=5)
    for split, count in (('train', 8), ('val', 3)):
        write_masks(folder / 'scans' / split, count, (40, 50), odd=True, classes=2)
    for link, target in (('photos', 'images'), ('data/mnist5k', '../images')):
        (folder / link).parent.mkdir(exist_ok=True)
        (folder / link).symlink_to(target)
    Image.open(tree / 'train/c0/0.png').resize((320, 240)).save(folder / 'photo.jpg')
    ignored = shutil.ignore_patterns('*.csv', '*.png', '*.md', '*.py')
    shutil.copytree(ROOT / 'recipes', folder / 'recipes', ignore=ignored)
    plain = timm.create_model('vit_small_patch16_224', embed_dim=16, num_heads=2, depth=2)
    for name in ('plain', 'my_vit'):
        save_model(plain, folder / name)
    data = [f'data.{split}={folder}/images/{split}' for split in ('train', 'val')]
    for run, name in (('mine', 'vit_dct_tiny'), ('trees', 'vit_treeformer_tc_tiny')):
        arguments = [f'output={folder}/runs/{run}', f'model.name={name}', *data, *TRAIN.split()]
        assert main(['train', str(folder / 'recipes/images.yaml'), *arguments]) == 0
    return folder


@pytest.fixture
def here(prepared, tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of what is prepared, as the working directory; names that a page registers are forgotten afterwards."""
    folder = tmp_path / 'here'
    shutil.copytree(prepared, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    registers = (registry.ATTENTIONS, compressors.COMPRESSORS, hooks.HOOKS)
    known = [set(register) for register in registers]
    yield folder
    for register, names in zip(registers, known, strict=True):
        for name in set(register) - names:
            del register[name]
    sys.modules.pop('my_package', None)


@pytest.mark.filterwarnings('ignore:Overwriting vit_:UserWarning')  # README.md and a page may add the same attention
@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'python')])
def test_python(page, here, monkeypatch, capsys):
    """All blocks of a page in order, in one namespace, without a download."""
    create = timm.create_model

    def offline_and_small(name, pretrained=False, **arguments):
        local = name.startswith('local-dir:') or 'pretrained_cfg_overlay' in arguments
        size = SMALL_MODEL | SMALLER_STILL.get(page, {}) if name.startswith('vit_') else {}
        return create(name, pretrained=pretrained and local, **size, **arguments)

    monkeypatch.setattr(timm, 'create_model', offline_and_small)
    names: dict = {'__name__': '__main__'}
    for block in blocks(page, 'python'):
        exec(compile(block, page, 'exec'), names)
    AFTERWARDS.get(page, lambda names, said: None)(names, capsys.readouterr().out)


def readme_has_counted_and_added(names: dict, said: str) -> None:
    assert 'GMACs' in said
    assert names['model'](torch.zeros(1, 3, 224, 224)).shape == (1, 1000)  # of the mechanism that it adds


def convert_has_saved(names: dict, said: str) -> None:
    saved = timm.create_model('local-dir:my_vit', pretrained=True)
    assert [name for name, _ in saved.attention_spec()] == ['full'] * 6 + ['dct'] * 6


def features_are_maps(names: dict, said: str) -> None:
    assert [tuple(x.shape[2:]) for x in names['maps']] == [(74, 74)] * 3
    torch.testing.assert_close(names['mean'], names['patches'].mean(1))
    assert all(names[crop].shape == (1, 3, 1036, 1036) for crop in ('middle', 'whole', 'framed'))
    assert 'graphs are of CUDA' in said


def start_has_predicted(names: dict, said: str) -> None:
    """What `vit-efficient evaluate` would, of the class that is most likely first."""
    saved = SavedModel('runs/mine')
    x = EvalTransform(saved.preprocessing)(to_array(read_image('photo.jpg'), 3))[None]
    expected = saved.model(x).softmax(dim=1)[0]
    torch.testing.assert_close(names['shares'], expected)
    assert f'c{expected.argmax()}: {expected.max():.1%}\n' in said and said.count('%') == 3


def exported_crops_as_evaluation(names: dict, said: str) -> None:
    about = {name: value for name, value in names['metadata'].items() if name != 'labels'}
    transform = timm.data.create_transform(is_training=False, **about)
    with Image.open('photo.jpg') as photo:
        expected = transform(photo.convert('RGB'))
    assert abs(names['x'][0] - expected.numpy()).mean() < 0.02


AFTERWARDS = {
    'README.md': readme_has_counted_and_added,
    'docs/convert.md': convert_has_saved,
    'docs/export.md': exported_crops_as_evaluation,
    'docs/features.md': features_are_maps,
    'docs/start.md': start_has_predicted,
}


@pytest.mark.filterwarnings('ignore:Overwriting vit_:UserWarning')
@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'sh')])
@pytest.mark.usefixtures('short_clocks')
def test_commands(page, here, capsys, monkeypatch):
    """All commands of a page in order; one that is of no known kind fails."""
    monkeypatch.setattr(accuracy, 'take_turns', partial(accuracy.take_turns, seconds=0.01))
    first = (blocks(page, 'python') or [''])[0]
    Path('my_package.py').write_text(first)  # where a page calls what it shows a package
    for words in commands(page):
        if words[0] == 'vit-efficient':
            # Writing ONNX takes seconds; docs/export.md does it in Python.
            words = [re.sub(r'\.onnx$', '.pt2', word) for word in words]
            if 'flops' not in words:  # nothing is downloaded
                words = ['plain' if word in PRETRAINED else word for word in words]
            run(words[1:], capsys)
        elif words[0] in CHECKS:
            CHECKS[words[0]](words[1:])
        else:
            pytest.fail(f'{page}: a command of no known kind: {shlex.join(words)}')


def run(words: list[str], capsys) -> None:
    """Runs a command of the package, made smaller; what it says of itself is parsed as it stands."""
    plugin = words[:2] if words[0] == '--plugin' else []
    words = words[len(plugin) :]
    if words[0].startswith('--'):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        return
    kind = next((kind for kind in (' '.join(words[:2]), words[0]) if kind in SMALLER), None)
    assert kind, f'a command of no known kind: {shlex.join(words)}'
    more = SMALLER[kind].split()
    if kind == 'train':
        load_recipe(words[1], words[2:])  # as it stands
        more += [] if 'resume=auto' in words else ['resume=restart']
    status = main([*plugin, *words, *more])
    said = capsys.readouterr()
    assert status == 0, f'{shlex.join(words)}: {said.err}'
    if kind == 'table flops' and '--out' not in words:
        models = words[words.index('--models') + 1 :]
        models = models[: next((i for i, word in enumerate(models) if word.startswith('--')), None)]
        assert all(f'| {model} ' in said.out for model in models)


def check_torchrun(words: list[str]) -> None:
    """The module can be run, and the recipe is valid with its overrides."""
    module, command, recipe, *overrides = words[words.index('-m') + 1 :]
    assert importlib.util.find_spec(f'{module}.__main__') and command == 'train'
    load_recipe(recipe, overrides)
    options = words[: words.index('-m')]
    known = ('--nproc-per-node', '--nnodes', '--rdzv-backend', '--rdzv-endpoint')
    assert all(option in known for option in options[::2]) and len(options) % 2 == 0


def check_pip(words: list[str]) -> None:
    """What is installed is the package, with extras that it has."""
    extras = re.findall(r"^ {8}'(\w+)': ", (ROOT / 'setup.py').read_text(), re.MULTILINE)
    assert words[0] == 'install'
    for word in words[1:]:
        name = re.fullmatch(r'-e|(?:vit-efficient|\.)(?:\[([\w,]+)\])?', word)
        assert name and set((name[1] or 'docs').split(',')) <= set(extras), word


def check_make(words: list[str]) -> None:
    makefile = (ROOT / 'Makefile').read_text()
    assert all(re.search(rf'^{target}:', makefile, re.MULTILINE) for target in words)


def check_sbatch(words: list[str]) -> None:
    """The options are some that the script gives itself, and the recipe is valid with its overrides."""
    at = words.index('recipes/slurm.sh')
    script = Path(words[at]).read_text()
    assert script.startswith('#!')
    assert at % 2 == 0 and all(f'#SBATCH {option}=' in script for option in words[:at:2])
    load_recipe(words[at + 1], words[at + 2 :])


def check_python(words: list[str]) -> None:
    ast.parse((ROOT / words[0]).read_text())


CHECKS = {
    'torchrun': check_torchrun,
    'pip': check_pip,
    'make': check_make,
    'sbatch': check_sbatch,
    'python': check_python,
}


@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'yaml')])
def test_recipes(page, here):
    """Each block of YAML is a part of a recipe: its keys are known, and their values in range."""
    Path('my_package.py').touch()
    for block in blocks(page, 'yaml'):
        recipe = yaml.safe_load(block)
        recipe.setdefault('model', {}).setdefault('name', 'vit_full_small')
        recipe['data'] = {'train': 'images/train', 'val': 'images/val'} | recipe.get('data', {})
        Path('recipe.yaml').write_text(yaml.safe_dump(recipe))
        load_recipe('recipe.yaml')


@pytest.mark.parametrize('page', PAGES)
def test_pages_are_short_and_open_with_what_they_are_for(page):
    lines = PAGES[page].splitlines()
    assert len(lines) <= 150
    assert lines[0].startswith('# ') and not lines[1]
    opening = '\n'.join(lines[2:]).partition('\n\n')[0]
    assert opening[0].isalnum() or opening[0] == '`'
    assert opening.rstrip().endswith(('.', ':'))
    assert any(re.match(r'```(sh|python|yaml)$', line) for line in lines[:30]), 'no example in the first 30 lines'
    assert max(map(len, lines)) <= 700  # of a row of a table


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    text = FENCE.sub('', PAGES[page])
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        if link.startswith('https://'):
            continue
        target, _, anchor = link.partition('#')
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if anchor:
            path = path / 'README.md' if path.is_dir() else path
            headings = re.findall(r'^#+ (.*)$', FENCE.sub('', path.read_text(encoding='utf-8')), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_every_page_is_in_the_contents():
    listed = re.findall(
        r'^([\w/]+)$', '\n'.join(re.findall(r'```{toctree}\n(.*?)```', PAGES['docs/index.md'], re.DOTALL)), re.M
    )
    pages = {page.removeprefix('docs/').removesuffix('.md') for page in PAGES if page.startswith('docs/')}
    assert pages - {'index'} <= set(listed)
