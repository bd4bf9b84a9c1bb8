import shlex

import pytest
import timm

from tests.train.recipes import ALL, PLANS, load_any
from vit_efficient import convert
from vit_efficient.models.plans import Plan
from vit_efficient.train import load_recipe
from vit_efficient.train.config import describe_keys
from vit_efficient.train.recipe import to_yaml
from vit_efficient.train.rules import validate, without_effect

pytestmark = pytest.mark.once


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / 'base.yaml').write_text('model: {name: vit_full_tiny, args: {depth: 2}}\noptim: {lr: 1e-4}\nseed: 3\n')
    path = tmp_path / 'dct.yaml'
    path.write_text('extends: base.yaml\nmodel: {name: vit_dct_tiny, args: {img_size: 32}}\n')
    return path


def test_recipes_extend_and_are_overridden(recipe):
    config = load_recipe(recipe, ['optim.lr=2e-3', 'model.args.depth=3', 'data.mean=[0.1]', 'amp=none'])
    assert config.model.name == 'vit_dct_tiny'
    assert config.model.args == {'depth': 3, 'img_size': 32}
    assert (config.optim.lr, config.seed, config.data.mean) == (2e-3, 3, [0.1])
    assert config.recipe == recipe.as_posix()
    assert config.output == f'runs/{recipe.parent.name}/dct'


def test_an_empty_mapping_empties_one_of_any_keys(recipe):
    assert load_recipe(recipe, ['model.args={}']).model.args == {}
    (recipe.parent / 'emptied.yaml').write_text('extends: dct.yaml\nmodel: {args: {}}\n')
    config = load_recipe(recipe.parent / 'emptied.yaml', ['data.augment={}', 'stages=[]'])
    assert config.model.args == {} and config.model.name == 'vit_dct_tiny'
    assert config.data.augment == load_recipe(recipe).data.augment


@pytest.mark.parametrize(
    ('overrides', 'attention', 'options'),
    [
        ([], 'dct', {'keep_ratio': 0.25}),
        (['model.attention_kwargs.place=kv'], 'dct', {'keep_ratio': 0.25, 'place': 'kv'}),
        (['model.attention=dct'], 'dct', {'keep_ratio': 0.25}),
        (['model.attention=full'], 'full', {}),
        (['model.attention=""'], '', {}),
        (['model.attention_kwargs.num_tokens=16', 'model.attention=linformer'], 'linformer', {'num_tokens': 16}),
    ],
)
def test_another_attention_drops_the_options_of_the_one_before(recipe, overrides, attention, options):
    model = '{name: vit_tiny_patch16_224, attention: dct, attention_kwargs: {keep_ratio: 1/4}, layers: [1]}'
    recipe.write_text(f'model: {model}\n')
    config = load_recipe(recipe, overrides)
    assert (config.model.attention, config.model.attention_kwargs) == (attention, options)
    assert config.model.layers == ([1] if attention else None)
    above = recipe.with_name('above.yaml')
    above.write_text('extends: dct.yaml\nmodel: {attention: window, attention_kwargs: {window_size: 4}}\n')
    assert load_recipe(above).model.attention_kwargs == {'window_size': 4}


@pytest.mark.parametrize(
    ('recipe_has', 'overrides', 'init_from', 'args'),
    [
        ('args: {pretrained: true, depth: 2}', ['model.init_from=plain'], 'plain', {'depth': 2}),
        ('args: {checkpoint_path: x}', ['model.args.depth=3', 'model.init_from=plain'], 'plain', {'depth': 3}),
        ('init_from: plain', ['model.args.pretrained=true'], '', {'pretrained': True}),
        ('init_from: plain', ['model.args.pretrained=false'], 'plain', {'pretrained': False}),
        ('init_from: plain', ['model.args.checkpoint_path=x'], '', {'checkpoint_path': 'x'}),
        # Given at once, both stay: `model_from_weights` says so.
        ('args: {}', ['model.args.pretrained=true', 'model.init_from=x'], 'x', {'pretrained': True}),
    ],
)
def test_weights_to_start_from_replace_those_of_the_recipe(recipe, recipe_has, overrides, init_from, args):
    recipe.write_text(f'model: {{name: vit_tiny_patch16_224, {recipe_has}}}\n')
    model = load_recipe(recipe, overrides).model
    assert (model.init_from, model.args) == (init_from, args)


@pytest.mark.parametrize(
    ('recipe_has', 'override', 'keys'),
    [
        ('distill: {teacher: any, kind: hard}', 'distill.teacher=""', '\'distill.kind="soft"\''),
        ('distill: {teacher: any, weight: 0.3}', 'distill.teacher=""', 'distill.weight=0.5'),
        ('truncation: {penalty: 1, budget: 0.3}', 'truncation.penalty=0', 'truncation.budget=0'),
    ],
)
def test_what_an_override_leaves_without_effect_comes_with_the_keys_that_remove_it(recipe, recipe_has, override, keys):
    recipe.write_text(f'model: {{name: any}}\n{recipe_has}\n')
    with pytest.raises(ValueError, match=f', or {keys}$'):
        load_recipe(recipe, [override])
    load_recipe(recipe, [override, *shlex.split(keys)])


def test_keys_whose_product_counts_say_so():
    rows = {row['key']: row['resume'] for row in describe_keys()}
    assert rows['data.batch_size'] == rows['grad_accum'] == 'while data.batch_size × grad_accum × processes stays'
    assert (rows['seed'], rows['log_every']) == (False, True)


def test_the_resolved_recipe_reads_back(recipe, tmp_path):
    config = load_recipe(recipe)
    (tmp_path / 'resolved.yaml').write_text(to_yaml(config))
    again = load_recipe(tmp_path / 'resolved.yaml')
    again.recipe = config.recipe
    assert again == config


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('optim: {lrr: 1}', r'dct\.yaml: unknown key optim\.lrr; did you mean optim\.lr\?'),
        ('epochs: 3', r'dct\.yaml: unknown key epochs; did you mean sched\.epochs\?'),
        ('data: {augment: {affin: {}}}', r'unknown key data\.augment\.affin; did you mean data\.augment\.affine'),
        ('zzz: 3', r'dct\.yaml: unknown key zzz$'),
        ('optim: {lr: fast}', r"dct\.yaml: optim\.lr: Value 'fast' .* could not be converted to Float"),
        ('sched: {epochs: 1.5}', r'dct\.yaml: sched\.epochs: .*Integer'),
        ('optim: 18446744073709551616', r'dct\.yaml: optim must be a section of keys'),
        ('stages: [{epoch: 3}]', r'unknown key stages\[0\]\.epoch; did you mean stages\[0\]\.epochs\?'),
        ('stages: [{epochs: 1}, 3]', r'dct\.yaml: stages\[1\] must be a section of keys, got 3'),
        ('stages: 3', r'dct\.yaml: stages must be a list of sections, got 3'),
        ('stages: [{lr: fast}]', r"dct\.yaml: stages\[0\]\.lr: Value 'fast'"),
        ('data: {schedule: [{img_size: [a]}]}', r"dct\.yaml: data\.schedule\[0\]\.img_size\[0\]: Value 'a'"),
        ('optim: {lr: 1' + 400 * '0' + '}', r'dct\.yaml: optim\.lr must be at most 1e\+300 in size'),
        ('seed: ${nothing}', r"dct\.yaml: seed: Interpolation key 'nothing' not found"),
        ('extends: ${nothing}', r'\$\{nothing\}: cannot read the recipe'),
        ('3', r'dct\.yaml: cannot read the recipe: Invalid loaded object type: int'),
        ('a: !!timestamp b', r'dct\.yaml: not valid YAML'),
        ('optim: 3', r'dct\.yaml: optim must be a section of keys, got 3'),
        ('data: {augment: {affine: }}', r'dct\.yaml: data\.augment\.affine must be a section of keys, got None'),
        ('data: {mean: [a]}', r'dct\.yaml: data\.mean'),
        ('extends: nothing.yaml', r'nothing\.yaml: cannot read the recipe: No such file'),
        ('extends: dct.yaml', r'dct\.yaml: extends itself'),
        ('extends: [a]', r'dct\.yaml: extends must name a recipe'),
        ('a: [', r'dct\.yaml: not valid YAML'),
        ('- a', r'dct\.yaml: a recipe is a mapping'),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(recipe, text, message):
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(recipe)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('optim.lr', "command line: expected key=value, got 'optim.lr'"),
        ('optim.lrr=3', r'command line: unknown key optim\.lrr; did you mean optim\.lr\?'),
        ('seed=x', 'command line: seed: '),
        ('seed=-1', r'seed must be at least 0 and below 2\*\*32, got -1'),
        ('seed=9223372036854775808', r'seed must be at least 0 and below 2\*\*32'),
        ('data.mean=[', 'command line: '),
        ('optim.lr=0', r'optim\.lr must be above 0, got 0\.0'),
        ('optim.lr=nan', r'optim\.lr must be above 0, got nan'),
        ('sched.epochs=0', r'sched\.epochs must be at least 1, got 0'),
        ('sched.warmup_epochs=101', r'sched\.warmup_epochs must be at most sched\.epochs=100'),
        ('data.batch_size=0', r'data\.batch_size must be at least 1'),
        ('data.augment.crop_scale=[0.5]', r'data\.augment\.crop_scale must be two shares'),
        ('data.augment.dct_truncate=2', r'data\.augment\.dct_truncate must be between 0 and 1, got 2\.0'),
        ('data.augment.dct_truncate_ratio=[0,0.5]', r'data\.augment\.dct_truncate_ratio must be two shares'),
        ('loss.smoothing=1', r'loss\.smoothing must be at least 0 and below 1'),
        ('model.name=""', r'model\.name must be set'),
        ('amp=fp8', "amp must be none or bf16, got 'fp8'"),
        ('parallel=fsdp2', "parallel must be ddp or fsdp, got 'fsdp2'"),
        ('resume=yes', 'resume must be never, auto or restart'),
    ],
)
def test_overrides_are_checked(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe, [override])


def test_mixing_needs_even_batches(recipe):
    config = load_recipe(recipe, ['loss.mixup=0.8'])
    config.data.batch_size = 5
    with pytest.raises(ValueError, match=r'data\.batch_size must be even for mixup and cutmix, got 5'):
        validate(config)


@pytest.mark.parametrize('path', ALL, ids=lambda p: p.stem)
def test_the_recipes_of_this_repository_are_valid(path):
    load_any(path)


@pytest.mark.parametrize('path', PLANS, ids=lambda p: p.stem)
def test_the_plans_of_this_repository_are_valid(path):
    plan = Plan.load(path)
    convert(timm.create_model(plan.model, img_size=plan.img_size), plan)


@pytest.mark.parametrize(
    ('path', 'folder'),
    [
        ('recipes/mnist5k/dct.yaml', 'runs/mnist5k/dct'),
        ('a/recipes/megapixel_mnist/128px/full-51.yaml', 'runs/megapixel_mnist/128px/full-51'),
        ('a/b/mine.yaml', 'runs/b/mine'),
        ('recipes/mine.yaml', 'runs/mine'),
    ],
)
def test_the_folder_of_a_run_is_that_of_its_recipe(path, folder, tmp_path):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text('model: {name: any}')
    assert load_recipe(tmp_path / path).output == folder


def test_keys_without_effect_are_named(recipe):
    assert without_effect(load_recipe(recipe)) == ''
    cases = {
        'sched.min_lr=1e-4': 'sched.sched=none',
        'sched.warmup_lr=1e-4': 'sched.sched=none',
        'sched.warmup_epochs=1': 'sched.sched=none',
        'loss.patch_weight=2.0': 'task=classification',
        'ema.warmup=True': 'ema.decay=0',
        'distill.temperature=2.0': 'distill.kind=hard',
        'data.root=x': 'no data.dataset',
        'heal.ridge=2.0': 'heal.solve=0',
        'heal.blocks_weight=2.0': 'heal.blocks=[]',
        'data.augment.crop_ratio=[0.5, 2.0]': 'data.augment.crop_scale=null',
        'data.augment.rand_magnitude=3.0': 'data.augment.rand_ops=0',
        'data.augment.dct_truncate_ratio=[0.5, 1.0]': 'data.augment.dct_truncate=0',
    }
    idle = ['data.augment.crop_scale=null', 'data.augment.rand_ops=0', 'distill.kind=hard', 'distill.teacher=any']
    for key, reason in cases.items():
        beside = [*idle, 'sched.sched=none'] if 'sched' in key else idle
        if 'heal' in key:
            beside = ['task=features', 'heal.blocks=[]']
        config = load_recipe(recipe, [*beside, key])
        text = f'{key} ({reason})'.replace('1e-4', '0.0001').replace('warmup_epochs=1 ', 'warmup_epochs=1.0 ')
        assert without_effect(config) == text
    config = load_recipe(recipe, ['distill.teacher=any', 'distill.weight=0'])
    assert without_effect(config) == 'distill.teacher=any (distill.weight=0, distill.outputs=0)'
    with pytest.raises(ValueError, match=r"distill.weights must be empty for distill.teacher=\S+, a folder, .*got 'x'"):
        load_recipe(recipe, [f'distill.teacher={recipe.parent}', 'distill.weights=x'])


# What YAML 1.1 takes for a number, a switch or a comment.
ODD_TEXTS = ('007', '2024_01_02', 'no', 'Off', '1:30', '0x1F', '1e5', '1/2', '.inf', 'a: b', 'set #1', '[x]', '1.0')


@pytest.mark.parametrize('text', ODD_TEXTS)
def test_texts_stay_as_they_are_spelt(recipe, text, tmp_path):
    config = load_recipe(recipe, [f'output={text}', f'data.train={text}', 'data.interpolation=bilinear'])
    assert (config.output, config.data.train) == (text, text)
    (tmp_path / 'again.yaml').write_text(to_yaml(config), encoding='utf-8')
    assert load_recipe(tmp_path / 'again.yaml').output == text
    assert load_recipe(recipe, [f'output="{text}"']).output == text


def test_texts_in_files_and_lists_stay_as_they_are_spelt(tmp_path):
    (tmp_path / '007').write_text('output: 2024_01_02\nmodel: {name: any}\nplugins: [json]\n', encoding='utf-8')
    names = '[no, 01, 1e5, 1/2, 1:30, ~x, "07", été]'
    text = f'extends: 007\ndata: {{train: 1:30, val: on, args: {{classes: {names}, size: 1e3, revision: 123e4}}}}\n'
    (tmp_path / 'a.yaml').write_text(text + 'distill: {teacher: 0b1}\nstages: []\n', encoding='utf-8')
    config = load_recipe(tmp_path / 'a.yaml')
    classes = ['no', '01', '1e5', '1/2', '1:30', '~x', '07', 'été']
    assert (config.output, config.data.train, config.data.val) == ('2024_01_02', '1:30', 'on')
    assert config.distill.teacher == '0b1'
    assert config.data.args == {'classes': classes, 'size': 1000, 'revision': '123e4'}
    (tmp_path / 'again.yaml').write_text(to_yaml(config), encoding='utf-8')
    assert load_recipe(tmp_path / 'again.yaml').data == config.data
    for override in ('data.val_args.classes=[off, 1_0]', 'data.val_args={classes: [off, 1_0]}'):
        assert load_recipe(tmp_path / 'a.yaml', [override]).data.val_args == {'classes': ['off', '1_0']}
    assert load_recipe(tmp_path / 'a.yaml', ['data.args.classes=007']).data.args['classes'] == '007'


def test_none_is_no_text(recipe):
    config = load_recipe(recipe, ['data.interpolation=null', 'data.crop_mode=', 'model.init_from=', 'output="null"'])
    assert (config.data.interpolation, config.data.crop_mode, config.model.init_from) == (None, None, '')
    assert config.output == 'null'
    with pytest.raises(ValueError, match='output'):
        load_recipe(recipe, ['output=null'])
    with pytest.raises(ValueError, match=r'plugins must be a list, got False'):
        load_recipe(recipe, ['plugins=no'])
