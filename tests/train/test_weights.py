"""What weights bring along: their normalisation, size and classes; and which model may have them."""

import json
import re
import shlex
from dataclasses import replace

import pytest
import timm
import torch
from timm.models import save_for_hf

from tests.data.trees import write_tree
from tests.train.recipes import TINY, tiny_recipe
from vit_efficient import convert, save_model
from vit_efficient.data import Preprocessing
from vit_efficient.report.evaluation import SavedModel
from vit_efficient.train import load_model, load_recipe, train
from vit_efficient.train.build import create_model
from vit_efficient.train.config import ModelConfig, StageConfig
from vit_efficient.train.recipe import to_yaml

CLASSES = ['c0', 'c1', 'c2']
# What none of the defaults is.
TOLD = {
    'mean': (0.1, 0.2, 0.3),
    'std': (0.4, 0.5, 0.6),
    'crop_pct': 0.77,
    'interpolation': 'bilinear',
    'crop_mode': 'squash',
}
PLAIN = 'vit_tiny_patch16_224'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp('data'))


def told_model(name=PLAIN, **args):
    model = timm.create_model(name, **{**TINY, 'num_classes': 5, **args})
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **TOLD, 'num_classes': model.num_classes}
    return model.eval()


def saved(folder, how, name=PLAIN, **args):
    """A model in a folder: by timm, by us, its file in that folder, or beside nothing."""
    model = told_model(name, **args)
    if how == 'timm':
        save_for_hf(model, folder, model_args={**TINY, **args}, safe_serialization=True)
    else:
        save_model(model, folder)
    return model, folder / 'model.safetensors' if how == 'file' else folder


def create(source, name, **model):
    config = tiny_recipe('unused', 'unused')
    config.model = ModelConfig(name, {**TINY, **model.pop('args', {})}, str(source), **model)
    return create_model(config, CLASSES)


def assert_same_features(model, expected, images=None):
    images = torch.randn(2, 3, 16, 16) if images is None else images
    torch.testing.assert_close(model.eval().forward_features(images), expected.eval().forward_features(images))


@pytest.mark.parametrize('how', ['timm', 'ours', 'file'])
@pytest.mark.parametrize(
    ('name', 'model'),
    [
        (PLAIN, {}),
        (PLAIN, {'attention': 'dct', 'attention_kwargs': {'keep_ratio': 0.5}}),
        ('vit_full_tiny', {}),
        ('vit_dct_tiny', {}),
        ('vit_linformer_tiny', {}),
        ('vit_window_tiny', {}),
    ],
)
def test_a_plain_vit_goes_into_every_mechanism_with_its_images(tmp_path, how, name, model):
    plain, source = saved(tmp_path / 'plain', how)
    model = create(source, name, **model)
    found = Preprocessing.of(model).as_dict()
    assert {key: found[key] for key in TOLD} == TOLD
    assert found['input_size'] == (3, 16, 16)
    assert model.num_classes == 3
    state = model.state_dict()
    kept = {key: value for key, value in plain.state_dict().items() if not key.startswith('head.')}
    assert all(torch.equal(state[key], value) for key, value in kept.items())
    if name in (PLAIN, 'vit_full_tiny') and not hasattr(model, 'attention_spec'):
        assert_same_features(model, plain)


def test_what_the_recipe_says_goes_first(tmp_path):
    _, source = saved(tmp_path / 'plain', 'timm')
    config = tiny_recipe('unused', 'unused')
    config.model = ModelConfig('vit_dct_tiny', dict(TINY), str(source))
    config.data.mean, config.data.crop_pct = [0.5, 0.5, 0.5], 1.0
    found = Preprocessing.of(create_model(config, CLASSES), config.data)
    assert (found.mean, found.std, found.crop_pct) == ((0.5, 0.5, 0.5), TOLD['std'], 1.0)


def test_the_size_is_that_of_the_weights_unless_the_recipe_has_another(tmp_path, caplog):
    _, source = saved(tmp_path / 'plain', 'ours', img_size=24)
    config = tiny_recipe('unused', 'unused')
    args = {key: value for key, value in TINY.items() if key != 'img_size'}
    config.model = ModelConfig('vit_linformer_tiny', args, str(source))
    model = create_model(config, CLASSES)
    assert Preprocessing.of(model).input_size == (3, 24, 24)
    assert re.search(
        r'not in the weights, so as the attention begins: blocks\.0\.attn\.\S+, \S+ and \d+ more', caplog.text
    )
    # Position and patch embeddings follow size and patches as timm has it.
    larger = create(source, 'vit_dct_tiny', args={'img_size': 64, 'patch_size': 8})
    assert larger.patch_embed.grid_size == (8, 8)
    timm_has = timm.create_model(f'local-dir:{source}', pretrained=True, img_size=64, patch_size=8)
    for key in ('pos_embed', 'patch_embed.proj.weight'):
        assert torch.equal(larger.state_dict()[key], timm_has.state_dict()[key])


def test_a_file_that_says_nothing_is_told_of_once(tmp_path, caplog):
    plain = told_model(num_classes=0)
    torch.save(plain.state_dict(), tmp_path / 'weights.pt')
    model = create(tmp_path / 'weights.pt', 'vit_dct_tiny')
    assert caplog.text.count('does not say how its images were normalised') == 1
    assert 'by mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5], as those of vit_dct_tiny, is assumed' in caplog.text
    assert Preprocessing.of(model).mean == (0.5, 0.5, 0.5) and model.num_classes == 3
    assert torch.equal(model.pos_embed, plain.pos_embed)
    caplog.clear()
    for args in (
        {'checkpoint_path': str(tmp_path / 'full.pt')},
        {'pretrained': True, 'pretrained_cfg_overlay': {'file': str(tmp_path / 'full.pt'), 'num_classes': 3}},
    ):
        torch.save(told_model('vit_full_tiny', num_classes=3).state_dict(), tmp_path / 'full.pt')
        create('', 'vit_full_tiny', args=args)
        assert caplog.text.count('does not say how its images were normalised') == 1
        caplog.clear()
    args['pretrained_cfg_overlay'] |= TOLD
    assert Preprocessing.of(create('', 'vit_full_tiny', args=args)).mean == TOLD['mean']
    assert 'assumed' not in caplog.text


def test_runs_hand_their_images_on(data, tmp_path):
    """From the weights through a run's checkpoint, its model and a second run, to whoever reads the last model."""
    _, source = saved(tmp_path / 'plain', 'timm')
    config = tiny_recipe(data, tmp_path / 'first')
    config.model = ModelConfig(PLAIN, dict(TINY), str(source), 'dct', {'keep_ratio': 0.5}, [1])
    config.sched.epochs, config.data.mean = 1, [0.3, 0.3, 0.3]
    train(config)
    expected = {**TOLD, 'mean': (0.3, 0.3, 0.3)}
    for start in ('first', 'first/model', 'first/model/model.safetensors', 'first/checkpoint.pt'):
        second = tiny_recipe(data, tmp_path / 'second', resume='restart')
        second.model = ModelConfig(PLAIN, dict(TINY), str(tmp_path / start), 'dct', {'keep_ratio': 0.5}, [1])
        second.sched.epochs, second.sched.warmup_epochs, second.optim.lr, second.sched.min_lr = 1, 0, 1e-12, 0.0
        second.ema.decay, second.loss.mixup, second.loss.cutmix, second.optim.weight_decay = 0.0, 0.0, 0.0, 0.0
        train(second)
        found = SavedModel(tmp_path / 'second')
        assert {key: getattr(found.preprocessing, key) for key in TOLD} == expected
        assert [name for name, _ in found.model.attention_spec()] == ['full', 'dct']
        assert_same_features(found.model, load_model(tmp_path / 'first'))


def test_a_converted_model_is_for_the_images_of_its_base():
    for base in (PLAIN, 'vit_base_patch16_clip_384', 'vit_small_patch14_dinov2'):
        small = dict(embed_dim=12, depth=1, num_heads=2)
        ours, theirs = (
            timm.create_model(name, **given, **small) for name, given in (('vit_converted', {'base': base}), (base, {}))
        )
        assert Preprocessing.of(ours) == Preprocessing.of(theirs)
        assert ours.num_classes == theirs.num_classes
    with pytest.raises(RuntimeError, match='No pretrained weights exist for vit_converted'):
        timm.create_model('vit_converted', base=PLAIN, pretrained=True)


def keys_in(message, start):
    """The keys that a message tells to set, as a command line would read them."""
    text = message[message.index(start) :]
    return [word.rstrip(',') for word in shlex.split(text) if word.startswith(('model.', 'stages='))]


@pytest.mark.parametrize(
    'model',
    [
        lambda: told_model('vit_dct_tiny', attention_kwargs={'keep_ratio': 0.5}),
        lambda: convert(told_model(), 'pool', keep_ratio=0.5),
        lambda: convert(told_model(), 'dct', layers=[1]),
    ],
)
@pytest.mark.parametrize('how', ['folder', 'file'])
def test_the_keys_that_an_error_names_are_the_way_out(data, tmp_path, model, how):
    save_model(model(), tmp_path / 'model')
    source = tmp_path / 'model' / ('model.safetensors' if how == 'file' else '')
    config = tiny_recipe(data, tmp_path / 'run')
    config.model = ModelConfig('vit_linformer_tiny', dict(TINY), str(source))
    (tmp_path / 'recipe.yaml').write_text(to_yaml(config))
    with pytest.raises(ValueError, match='was saved with architecture=') as error:
        create_model(config, CLASSES)
    keys = keys_in(str(error.value), 'go on with that')
    assert any(key.startswith('stages=[{epochs: 2, attention: linformer') for key in keys)
    moved = load_recipe(tmp_path / 'recipe.yaml', keys)
    assert create_model(moved, CLASSES).attention_spec() == model().attention_spec()
    train(moved)
    assert [name for name, _ in load_model(tmp_path / 'run').attention_spec()] == ['linformer'] * 2


def test_weights_that_do_not_fit_name_the_command_that_does(tmp_path):
    """A model of other parts, such as registers and layer scale."""
    args = {**TINY, 'reg_tokens': 2, 'init_values': 0.1}
    plain, source = saved(tmp_path / 'plain', 'timm', reg_tokens=2, init_values=0.1)
    with pytest.raises(ValueError, match='does not fit vit_dct_tiny') as error:
        create(source, 'vit_dct_tiny', args={'attention_kwargs': {'keep_ratio': 0.5}})
    config = tiny_recipe('unused', 'unused')
    (tmp_path / 'recipe.yaml').write_text(to_yaml(config))
    keys = keys_in(str(error.value), 'they are of')
    assert keys == [
        f'model.name={PLAIN}',
        'model.attention=dct',
        'model.attention_kwargs={keep_ratio: 0.5}',
        'model.args.attention_kwargs=null',
    ]
    moved = load_recipe(tmp_path / 'recipe.yaml', [*keys, f'model.init_from={source}'])
    moved.model.args = args
    model = create_model(moved, CLASSES)
    assert [name for name, _ in model.attention_spec()] == ['dct', 'dct']
    assert torch.equal(model.reg_token, plain.reg_token)


@pytest.mark.parametrize(('name', 'args'), [('vit_dct_tiny', {'depth': 3}), (PLAIN, {'depth': 1, 'num_heads': 3})])
@pytest.mark.parametrize('how', ['ours', 'alone'])
def test_sizes_that_do_not_fit_are_named(tmp_path, how, name, args):
    _, source = saved(tmp_path / 'plain', 'ours')
    if how == 'alone':  # of heads, weights tell nothing
        source = (source / 'model.safetensors').rename(tmp_path / 'alone.safetensors')
        args = {'depth': args['depth']}
    with pytest.raises(ValueError, match='was saved with ') as error:
        create(source, name, args=args)
    keys = keys_in(str(error.value), 'make them equal')
    assert keys == [f'model.args.{key}=2' for key in args]
    assert create(source, name, args=dict.fromkeys(args, 2)).blocks[0].attn.num_heads == 2


def test_an_attention_that_a_stage_has_left_is_named(data, tmp_path):
    """The attention of a model is another one than that of its name."""
    config = tiny_recipe(data, tmp_path / 'run')
    config.model, config.sched.warmup_epochs = ModelConfig('vit_full_tiny', dict(TINY)), 0
    config.stages = [StageConfig(1), StageConfig(1, 'pool', {'keep_ratio': 0.5})]
    train(config)
    with pytest.raises(ValueError, match='was saved with attention=') as error:
        create(tmp_path / 'run', 'vit_full_tiny')
    (tmp_path / 'recipe.yaml').write_text(to_yaml(tiny_recipe(data, tmp_path / 'run')))
    keys = keys_in(str(error.value), 'go on with that')
    assert keys[:2] == ['model.name=vit_full_tiny', 'model.attention=pool']
    moved = load_recipe(tmp_path / 'recipe.yaml', [*keys[:3], f'model.init_from={tmp_path}/run'])
    assert create_model(moved, CLASSES).attention_spec() == load_model(tmp_path / 'run').attention_spec()


def test_layers_that_were_others_are_named(data, tmp_path):
    save_model(convert(told_model(), 'pool', layers=[1]), tmp_path / 'model')
    config = tiny_recipe(data, tmp_path / 'run')
    config.model = ModelConfig(PLAIN, dict(TINY), str(tmp_path / 'model'), 'pool', layers=[0])
    (tmp_path / 'recipe.yaml').write_text(to_yaml(config))
    with pytest.raises(ValueError, match='was saved with attention=') as error:
        create_model(config, CLASSES)
    keys = keys_in(str(error.value), 'go on with that')
    assert keys[-1] == 'stages=[{epochs: 2, attention: pool, layers: [0]}]'
    train(load_recipe(tmp_path / 'recipe.yaml', keys))
    assert [name for name, _ in load_model(tmp_path / 'run').attention_spec()] == ['pool', 'pool']


@pytest.mark.parametrize('options', [{}, dict(summary='mean')])
@pytest.mark.parametrize('how', ['folder', 'file'])
def test_weights_of_a_converted_model_go_into_what_it_was(tmp_path, how, options):
    """Also by options that have another default in a conversion."""
    expected = convert(told_model(), 'pool', **options)
    save_model(expected, tmp_path)
    source = tmp_path / ('model.safetensors' if how == 'file' else '')
    model = create(source, PLAIN, attention='pool', attention_kwargs=options)
    assert model.attention_spec() == expected.attention_spec()
    assert_same_features(model, expected)


def test_what_an_attention_adds_is_told_of_once(data, tmp_path, caplog):
    _, source = saved(tmp_path / 'plain', 'ours')
    config = tiny_recipe(data, tmp_path / 'run')
    config.model = ModelConfig(PLAIN, dict(TINY), str(source), 'linformer')
    config.sched.epochs = 1
    train(config)
    assert caplog.text.count('no checkpoint has them') == 1
    caplog.clear()
    for name, start in ((PLAIN, 'run'), (PLAIN, 'run/model/model.safetensors'), ('vit_full_tiny', 'run/checkpoint.pt')):
        model = create(tmp_path / start, name, attention='linformer')
        assert_same_features(model, load_model(tmp_path / 'run'))
    assert 'no checkpoint has them' not in caplog.text
    config.stages, config.model.attention = [StageConfig(1, 'linformer')], ''
    train(replace(config, output=str(tmp_path / 'staged')))
    assert caplog.text.count('no checkpoint has them') == 1


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        ([1], 'it holds a list, not a dict of tensors'),
        (b'e' * 99, 'it is no file of PyTorch'),
        (b'a.b', 'it is no file of PyTorch'),
        (b'', 'it is no file of PyTorch'),
        ({'epoch': 1}, 'holds no weights'),
    ],
)
def test_files_of_something_else_say_what_they_are(tmp_path, content, reason):
    if isinstance(content, bytes):
        (tmp_path / 'other.pth').write_bytes(content)
    else:
        torch.save(content, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=f'other.pth: .*{reason}'):
        create(tmp_path / 'other.pth', PLAIN)


def test_weights_are_not_named_twice(tmp_path, caplog):
    _, source = saved(tmp_path / 'plain', 'timm')
    create(source, PLAIN, args={'pretrained': True})
    assert 'model.args.pretrained: no effect beside model.init_from' in caplog.text
    with pytest.raises(ValueError, match=r'no pretrained weights of vit_dct_tiny.*model\.attention=dct'):
        create('', 'vit_dct_tiny', args={'pretrained': True})


def test_a_converted_model_is_saved_as_any(data, tmp_path):
    config = tiny_recipe(data, tmp_path / 'run')
    config.model = ModelConfig('vit_full_tiny', dict(TINY), '', 'treeformer_tc', {'tree_height': 2}, [-1])
    train(config)
    saved = json.loads((tmp_path / 'run/model/config.json').read_text())
    assert [name for name, _ in saved['model_args']['attention']] == ['full', 'treeformer_tc']
    assert [name for name, _ in load_model(tmp_path / 'run').attention_spec()] == ['full', 'treeformer_tc']
    config.model.attention, config.model.attention_kwargs, config.resume = 'nothing', {}, 'restart'
    with pytest.raises(ValueError, match="model.attention=nothing: .*'nothing'"):
        train(config)
    config.model.attention = ''
    with pytest.raises(ValueError, match=r'model.attention_kwargs or model.layers are set, and no model.attention'):
        train(config)


@pytest.mark.parametrize('name', ['vit_dct_tiny', PLAIN])
def test_a_model_is_saved_with_the_head_that_it_has(tmp_path, name):
    model = timm.create_model(name, **TINY, num_classes=5)
    model.reset_classifier(3, 'avg')
    save_model(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert again.num_classes == 3 and torch.equal(again.head.weight, model.head.weight)
    assert again.global_pool == 'avg'


def test_that_spare_classes_have_no_names_is_said(tmp_path, caplog):
    config = tiny_recipe('unused', 'unused')
    config.model.args['num_classes'] = 4
    create_model(config, CLASSES)
    assert 'num_classes=4 is above the 3 classes of the data: the model is saved without' in caplog.text


def test_a_plain_model_learns_other_classes_than_its_weights_have(data, tmp_path):
    _, source = saved(tmp_path / 'source', 'ours')
    config = tiny_recipe(data, tmp_path / 'run')
    config.model = ModelConfig(PLAIN, dict(TINY), str(source))
    train(config)
    assert load_model(tmp_path / 'run').num_classes == 3


@pytest.mark.parametrize('name', [PLAIN, 'vit_dct_tiny', 'resnet10t', 'resnet18'])
@pytest.mark.parametrize('prefix', ['backbone.', 'module.', 'encoder.', 'module.model.visual.'])
def test_weights_below_a_prefix(tmp_path, name, prefix, caplog):
    caplog.set_level('INFO', 'vit_efficient')
    args = TINY if 'vit' in name else {}
    model = timm.create_model(name, num_classes=3, **args)
    whole, bare = model.state_dict(), timm.create_model(name, num_classes=0, **args).state_dict()
    head = {key: value for key, value in whole.items() if key not in bare}
    path, below = tmp_path / 'a.pth', {f'{prefix}{key}': value for key, value in whole.items()}

    def create():
        config = tiny_recipe('unused', 'unused')
        config.model = ModelConfig(name, dict(args), str(path))
        return create_model(config, CLASSES).state_dict()

    without = {key: value for key, value in below.items() if key.removeprefix(prefix) in bare}
    for state, expected in ((below, whole), ({**without, **head}, whole), (without, {k: whole[k] for k in bare})):
        torch.save({'state_dict': state}, path)
        found = create()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert found.keys() == whole.keys()
    if prefix != 'module.':  # which timm takes off by itself
        torch.save({'model': {**without, 'projector.0.weight': torch.ones(2), 'head.mlp.0.bias': torch.ones(2)}}, path)
        create()
        below = prefix.removeprefix('module.')
        assert f'the weights below {below} are taken, without 2 others, such as projector.0.weight' in caplog.text
        torch.save({**without, **{f'teacher.{key}': value for key, value in without.items()}}, path)
        with pytest.raises(ValueError, match=r'holds weights of several models, below .* and teacher\.'):
            create()


def test_weights_within_parts_are_named(tmp_path):
    torch.save({'epoch': 3, 'student': told_model().state_dict(), 'teacher': {'a': torch.ones(1)}}, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='holds no weights but those within student and teacher; save one of these'):
        create(tmp_path / 'a.pth', PLAIN)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('local-dir:/a/b', r'name of the model .*; its weights come by model\.init_from=/a/b$'),
        ('hf-hub:timm/x', r'pretrained=true and model\.args\.pretrained_cfg_overlay=\{hf_hub_id: timm/x\}$'),
        ('HF_hub:timm/x', r'pretrained_cfg_overlay=\{hf_hub_id: timm/x\}$'),
        ('s3:bucket', 'of a place, timm knows local-dir and hf-hub'),
        ('timm/vit_tiny_patch16_224', r"timm knows no model 'timm/vit_tiny_.*; did you mean vit_tiny_patch16_224\?"),
        ('./vit_full_tiny', r'did you mean vit_full_tiny\?'),
    ],
)
def test_names_that_are_places_of_weights(name, message):
    with pytest.raises(ValueError, match=message):
        create('', name)
