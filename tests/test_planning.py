"""Plans: what is measured, what is chosen, that a model stays as it was, and that nothing is measured twice."""

import itertools
import json
import os
import signal
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vit_efficient
from tests.processes import SERVER, taking
from vit_efficient import Plan, convert, count_flops, kept_tokens, plan
from vit_efficient.fidelity import fidelity, final_tokens, mean_fidelity
from vit_efficient.models.blocks import GridBlock
from vit_efficient.planning import LOSSES, Planner, knapsack
from vit_efficient.planning.knapsack import choose
from vit_efficient.report.plans import front_table
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.measurements import Measurements

OPTIONS = [
    ('subsample', dict(keep_ratio=1 / 4)),
    ('dct', dict(keep_ratio=1 / 4, place='block')),
    ('window', dict(window_size=2)),
]
DEPTH = 3


def build(name='vit_tiny_patch16_224', **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**dict(embed_dim=32, depth=DEPTH, num_heads=2, img_size=64), **arguments})
    for parameter in model.parameters():  # with timm's, attention is a mean
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def draw(count=2, size=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, size, size, generator=generator) for _ in range(count)]


def loss_of(attention, images, layers=None, model=None):
    """The loss of a model that is converted for it, and what it keeps of features."""
    reference, converted = model or build(), model or build()
    exact = list(final_tokens(reference, images))
    tokens = final_tokens(convert(converted, attention, layers), images)
    kept = mean_fidelity([fidelity(a, b, 1) for a, b in zip(exact, tokens, strict=True)])
    return 1 - kept.centred, kept


@pytest.fixture(scope='module')
def planner():
    return Planner(build(), draw(), OPTIONS)


class TestChoose:
    @pytest.mark.parametrize('seed', range(30))
    def test_is_the_best_of_all(self, seed):
        random = np.random.default_rng(seed)
        layers, options = random.integers(1, 6), random.integers(1, 5)
        costs, losses = random.integers(1, 20, (layers, options)).astype(float), random.random((layers, options))
        if seed % 3 == 0:
            losses = losses.round(1)  # ties
        budget = random.integers(layers, 12 * layers)
        every = np.arange(layers)
        fitting = [
            each for each in itertools.product(range(options), repeat=layers) if costs[every, each].sum() <= budget
        ]
        chosen = choose(costs, losses, budget)
        if not fitting:
            assert chosen is None
            return
        assert costs[every, chosen].sum() <= budget
        best = min(losses[every, each].sum() for each in fitting)
        assert losses[every, chosen].sum() == pytest.approx(best)
        ties = [each for each in fitting if losses[every, each].sum() <= best + 1e-12]
        if seed % 3:
            assert costs[every, chosen].sum() == min(costs[every, each].sum() for each in ties)

    def test_many_layers_are_nearly_exact(self, monkeypatch):
        random = np.random.default_rng(0)
        costs, losses = random.random((48, 20)), random.random((48, 20))
        exact = losses[np.arange(48), choose(costs, losses, 15)].sum()
        monkeypatch.setattr(knapsack, 'MOST', 200)
        thinned = choose(costs, losses, 15)
        assert costs[np.arange(48), thinned].sum() <= 15
        assert exact <= losses[np.arange(48), thinned].sum() <= 1.05 * exact
        assert choose(costs, losses, costs.min(axis=1).sum() * (1 + 1e-12)) == tuple(costs.argmin(axis=1))


class TestMeasured:
    def test_each_layer_alone_is_what_convert_makes_of_it(self, planner):
        losses = planner.sensitivities()
        assert losses.shape == (DEPTH, 4) and not losses[:, 0].any()
        for layer, (option, spec) in itertools.product(range(DEPTH), enumerate(OPTIONS, 1)):
            assert losses[layer, option] == pytest.approx(loss_of([spec], draw(), [layer])[0], rel=1e-5)

    def test_costs_are_those_of_the_model(self, planner):
        costs, rest = planner.costs()
        for option, spec in enumerate(OPTIONS, 1):
            macs = count_flops(convert(build(), *spec[:1], **spec[1]), (3, 64, 64)).total
            assert costs[:, option].sum() + rest == macs
        assert costs[:, 0].sum() + rest == count_flops(build(), (3, 64, 64)).total

    @pytest.mark.parametrize('budget', [0.6, 0.8, 0.95])
    def test_a_plan_is_what_convert_makes_of_it_and_no_uniform_one_is_better(self, planner, budget):
        found = planner.plan(budget)
        loss, kept = loss_of(found, draw())
        assert found.measured == 1 - found.fidelity['centred'] == pytest.approx(loss, rel=1e-5)
        assert found.fidelity['patch'] == pytest.approx(kept.patch)
        before, after = count_flops(build(), (3, 64, 64)).total, count_flops(convert(build(), found), (3, 64, 64)).total
        assert found.gmacs == (before / 1e9, after / 1e9) and found.share == pytest.approx(after / before)
        assert found.share <= budget
        losses = planner.sensitivities()
        assert found.predicted == pytest.approx(losses[range(DEPTH), planner.numbers(found)].sum())
        for name, options in OPTIONS:
            uniform = convert(build(), name, **options)
            if count_flops(uniform, (3, 64, 64)).total <= budget * before:
                assert found.measured <= loss_of([(name, options)] * DEPTH, draw())[0] * (1 + 1e-6)

    def test_with_all_neighbours_tried_none_is_better(self, planner):
        found = planner.plan(0.7, refine=1000)
        costs, rest = planner.costs()
        room = 0.7 * (rest + costs[:, 0].sum()) - rest
        assignments = [
            each for each in itertools.product(range(4), repeat=DEPTH) if costs[range(DEPTH), each].sum() <= room
        ]
        assert found.measured == min(planner.measure(each)[0] for each in assignments)  # two of three layers at a time
        first = planner.plan(0.7, refine=0).measured
        assert first >= found.measured
        for loss in LOSSES.values():
            assert first <= planner.measure(choose(costs, planner.sensitivities(loss), room))[0]

    def test_with_all_of_the_budget_nothing_changes(self, planner):
        found = planner.plan(1)
        assert found.layers == [('full', {})] * DEPTH and found.measured == found.predicted == pytest.approx(
            0, abs=1e-12
        )
        assert found.share == 1 and found.gmacs[0] == found.gmacs[1]

    def test_below_the_cheapest_it_names_the_least(self, planner):
        with pytest.raises(UserError, match='budget=0.1 cannot be had') as error:
            planner.plan(0.1)
        least = float(str(error.value).split('costs ')[1].split()[0])
        found = planner.plan(least)
        assert [name for name, _ in found.layers] == ['dct'] * DEPTH
        with pytest.raises(UserError, match='cannot be had'):
            planner.plan(least - 2e-4)

    def test_of_keys(self):
        found = plan(build(), draw(1), 0.5, OPTIONS, unit='keys')
        kept = kept_tokens(convert(build(), found), 64)
        assert sum(kept) <= 0.5 * DEPTH * 17 and found.share == sum(kept) / (DEPTH * 17)

    @pytest.mark.usefixtures('short_clocks')
    def test_of_milliseconds(self, tmp_path, monkeypatch):
        measured = tmp_path / 'measured.json'
        found = Planner(build(), draw(1), OPTIONS, unit='ms', measured=measured)
        costs, rest = found.costs()
        assert costs.shape == (DEPTH, 4) and (costs > 0).all() and rest >= 0
        assert found.plan(1).layers == [('full', {})] * DEPTH
        monkeypatch.setattr('vit_efficient.benchmark.timing.take_turns', None)
        again = Planner(build(), draw(1), OPTIONS, unit='ms', measured=measured)
        assert np.array_equal(again.costs()[0], costs) and again.costs()[1] == rest

    @pytest.mark.usefixtures('short_clocks')
    def test_the_front_is_of_models_that_are_converted(self):
        """In which pooled keys have other values than in one that is built so."""
        planner = Planner(build(), draw(1), ['pool'])
        found = planner.plan(0.99, refine=0)
        exact, row = front_table(planner, [found], rounds=1, memory=False).rows
        assert ('pool', {}) in found.layers and (exact['gmacs'], row['gmacs']) == found.gmacs

    def test_other_losses(self, tmp_path):
        images = draw()
        for loss in ('patch', 'error', 'prefix'):
            found = plan(build(), images, 0.8, OPTIONS[1:2], loss=loss, measured=tmp_path / 'measured.json')
            assert found.loss == loss and found.measured == pytest.approx(abs((loss != 'error') - found.fidelity[loss]))

        def of_class(reference, tokens):
            return 5 + (reference[0] - tokens[0]).norm()

        def best_far_away(reference, tokens):
            return float((reference - tokens).norm() < 1e-6)

        found = plan(build(), images, 1, OPTIONS[:1], loss=best_far_away, progress=False)
        assert found.measured == 0 and all(layer == OPTIONS[0] for layer in found.layers)
        found = Planner(build(), images, OPTIONS[:1], loss=of_class)
        assert found.plan(1).predicted == found.plan(1).measured == 5
        losses = found.sensitivities()
        exact = list(final_tokens(build(), images))
        tokens = final_tokens(convert(build(), *OPTIONS[0][:1], layers=[1], **OPTIONS[0][1]), images)
        norms = [(a[0] - b[0]).norm() for a, b in zip(exact, tokens, strict=True)]
        assert losses[1, 1] == pytest.approx(float(sum(norms)) / 2, rel=1e-4)
        assert found.loss_name.endswith('of_class')


class TestModels:
    @pytest.mark.parametrize(
        'name, arguments',
        [
            ('deit_tiny_distilled_patch16_224', {}),
            ('vit_small_patch16_dinov3', dict(img_size=None, num_heads=2)),
            ('vit_base_patch16_siglip_224', {}),
            ('beit_base_patch16_224', {}),
        ],
    )
    def test_families(self, name, arguments):
        """What the model refuses is not among the options."""
        model = build(name, **arguments)
        found = plan(model, draw(1), 0.97, refine=0)
        assert 0 < found.measured < 1 and found.share <= 0.97
        reference = next(final_tokens(model, draw(1)))
        tokens = next(final_tokens(convert(model, found), draw(1)))
        kept = fidelity(reference, tokens, model.num_prefix_tokens)
        assert found.measured == pytest.approx(1 - kept.centred, rel=1e-3, abs=1e-9)

    def test_global_layers_of_sam(self):
        torch.manual_seed(0)
        model = timm.create_model(
            'samvit_base_patch16', embed_dim=32, depth=3, num_heads=2, img_size=64, global_attn_indexes=[0, 2]
        )
        found = plan(model, draw(1), 0.996, [('subsample', dict(keep_ratio=1 / 4))])
        assert len(found.layers) == 2 and found.measured > 0
        convert(model, found)
        assert [name for name, _ in model.attention_spec()] == [name for name, _ in found.layers]

    def test_of_a_converted_model_a_layer_keeps_what_it_has(self):
        model = convert(build(), 'pool', layers=[1], keep_ratio=1 / 4)
        spec = model.attention_spec()
        found = plan(model, draw(1), 1, OPTIONS)
        assert found.layers == spec and found.measured < 1e-12
        before = next(final_tokens(model, draw(1)))
        assert torch.equal(next(final_tokens(convert(model, found), draw(1))), before)

    @pytest.mark.parametrize('failing', [None, RuntimeError, KeyboardInterrupt])
    def test_the_model_stays_as_it_was(self, failing):
        model, calls = build(), []
        model.train()
        model.blocks[1].eval()
        modules = {name: (type(module), module, module.training) for name, module in model.named_modules()}
        state, arguments = {k: v.clone() for k, v in model.state_dict().items()}, dict(model._model_args)

        def loss(reference, tokens):
            calls.append(1)
            if failing and len(calls) == 5:
                raise failing
            return (reference - tokens).square().mean()

        if failing:
            with pytest.raises(failing):
                plan(model, draw(1), 0.8, OPTIONS, loss=loss)
        else:
            plan(model, draw(1), 0.8, OPTIONS, loss=loss)
        assert modules == {name: (type(module), module, module.training) for name, module in model.named_modules()}
        assert all(map(torch.equal, state.values(), model.state_dict().values()))
        assert model._model_args == arguments and model.pretrained_cfg['architecture'] == 'vit_tiny_patch16_224'
        assert not any(p.grad is not None for p in model.parameters())

    def test_what_is_refused_is_left_out_and_said_or_an_error(self, caplog):
        model = build('vit_small_patch16_dinov3', img_size=None)
        mixture = ('dct', dict(domain='frequency', keep_ratio=1 / 4))
        with pytest.raises(UserError, match=r'options: dct:domain=frequency,keep_ratio=1/4: .*rotary'):
            plan(model, draw(1), 0.8, [mixture])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('vit_efficient.planning.planner.OPTIONS', (mixture, OPTIONS[0], ('no_such', {})))
            labels = Planner(model, draw(1)).labels
        assert labels == ['as it is', 'subsample:keep_ratio=1/4']
        assert 'left out dct:domain=frequency,keep_ratio=1/4: ' in caplog.text and 'left out no_such: ' in caplog.text


class TestFiles:
    def test_yaml(self, planner, tmp_path):
        found = planner.plan(0.6)
        found.save(tmp_path / 'plan.yaml')
        text = (tmp_path / 'plan.yaml').read_text()
        about = f'# A plan of vit-efficient plan: {found.share:.3f} of the gmacs of vit_tiny_patch16_224 at 64 × 64 px.'
        assert text.startswith(f'{about}\nmodel: vit_tiny_patch16_224\nimg_size: [64, 64]\nunit: gmacs\nbudget: 0.6\n')
        again = Plan.load(tmp_path / 'plan.yaml')
        assert again.layers == found.layers and again.measured == pytest.approx(found.measured, rel=1e-5)
        models = [convert(build(), found), convert(build(), tmp_path / 'plan.yaml')]
        models.append(convert(build(), str(tmp_path / 'plan.yaml')))
        assert models[0].attention_spec() == models[1].attention_spec() == models[2].attention_spec()

    def test_a_converted_model_is_saved_with_it(self, planner, tmp_path):
        model = convert(build(), planner.plan(0.6))
        vit_efficient.save_model(model, tmp_path)
        again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        assert again.attention_spec() == model.attention_spec()
        assert torch.equal(again(torch.ones(1, 3, 64, 64)), model(torch.ones(1, 3, 64, 64)))

    @pytest.mark.parametrize(
        'text, message',
        [
            (None, 'no such plan'),
            ('a: [', 'not a readable plan'),
            ('[full, full]', r'not a plan .*without layers, model'),
            ('model: x\nlayers: [full]\nsize: 3', 'with size'),
            ('layers: full', 'layers must be a list'),
            ('layers: [{dct: {1: 2}}, full, full]', 'got .*{1: 2}'),
            ('layers: [{dct: 3}]', "a layer is an attention or .*got {'dct': 3}"),
            ('gmacs: 3', 'gmacs must be a list of two numbers'),
        ],
    )
    def test_bad_files(self, planner, text, message, tmp_path):
        path = tmp_path / 'plan.yaml'
        if text is not None:
            planner.plan(1).save(path)
            changed = text.partition(':')[0]
            if changed in ('layers', 'gmacs'):  # of a plan that is right but for that
                lines = [line for line in path.read_text().splitlines() if not line.startswith((changed, '- '))]
                text = '\n'.join([*lines, text])
            path.write_text(text)
        with pytest.raises(UserError, match=message):
            convert(build(), path)

    def test_fractions_written_by_hand(self, planner, tmp_path):
        path = tmp_path / 'plan.yaml'
        planner.plan(1).save(path)
        path.write_text(path.read_text().replace('[full,', '[{subsample: {keep_ratio: 1/4}},'))
        assert convert(build(), path).attention_spec()[0][1]['keep_ratio'] == 0.25

    def test_numbers_of_any_kind(self, tmp_path):
        options = ('subsample', dict(num_tokens=np.int64(4)))
        found = plan(build(), draw(1), np.float64(0.95), options, refine=np.int64(0))
        assert options in found.layers
        found = replace(found, layers=[*found.layers, ('subsample', dict(keep_ratio=Fraction(1, 4)))])
        found.save(tmp_path / 'plan.yaml')
        assert Plan.load(tmp_path / 'plan.yaml').layers == found.layers

    def test_a_plan_of_another_depth(self, planner):
        with pytest.raises(UserError, match='attention lists 3 layers, there are 2'):
            convert(build(depth=2), planner.plan(1))


@pytest.fixture
def ran(monkeypatch):
    """A list that grows with each block that computes."""
    calls, forward = [], GridBlock.forward

    def counted(self, x, *args, **kwargs):
        if not x.is_meta:
            calls.append(1)
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(GridBlock, 'forward', counted)
    return calls


CALLS, KILLED_AT = [], [0]


def counted_loss(reference, tokens):
    CALLS.append(1)
    if len(CALLS) == KILLED_AT[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return (reference - tokens).square().mean()


def be_killed(path, call):
    torch.set_num_threads(1)
    KILLED_AT[0] = call
    plan(build(), draw(), 0.7, OPTIONS, loss=counted_loss, measured=path, progress=False)


def entries(path):
    """How many losses of an image a file has."""
    known = json.loads(path.read_text())
    of_layers = [images for options in known.get('layers', {}).values() for images in options.values()]
    return sum(map(len, [*of_layers, *known['plans'].values()]))


class TestMeasurements:
    def test_an_option_runs_the_blocks_from_its_layer_on_and_nothing_twice(self, ran, tmp_path):
        planner = Planner(build(), draw(), OPTIONS, measured=tmp_path / 'measured.json')
        assert not ran
        planner.sensitivities()
        assert len(ran) == 2 * (DEPTH + 3 * (3 + 2 + 1))
        first = planner.plan(0.7)
        ran.clear()
        assert planner.plan(0.7) == first
        assert Planner(build(), draw(), OPTIONS, measured=tmp_path / 'measured.json').plan(0.7) == first
        assert plan(build(), draw(), 1, OPTIONS[:1], measured=tmp_path / 'measured.json', loss='patch').measured < 1e-12
        assert not ran
        Planner(build(), draw(), [*OPTIONS, 'pool'], measured=tmp_path / 'measured.json').sensitivities()
        assert len(ran) == 2 * (DEPTH + 3 + 2 + 1)

    @pytest.mark.subprocess
    @pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
    def test_killed_it_goes_on(self, tmp_path):
        path, known = tmp_path / 'measured.json', 0
        for call in (4, 9, 15):  # in the first image, in the second, and among whole plans
            process = SERVER.Process(target=be_killed, args=(path, call))
            process.start()
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
            known += call - 1
            assert entries(path) == known
        whole = plan(build(), draw(), 0.7, OPTIONS, loss=counted_loss)
        CALLS.clear()
        assert plan(build(), draw(), 0.7, OPTIONS, loss=counted_loss, measured=path) == whole
        assert len(CALLS) == entries(path) - known and known > 2 * (3 * DEPTH + 1)

    @pytest.mark.parametrize(
        'changed, message',
        [
            (dict(model=build(num_heads=4)), r'another arguments \(was'),
            (dict(model=nn.Module()), 'cannot convert'),
            (dict(images=draw(seed=2)), r'another images \(was 2 of 3×64×64'),
            (dict(images=draw(1)), r'is 1 of 3×64×64'),
            (dict(loss=counted_loss), r'another loss \(was fidelity, is tests.test_planning.counted_loss\)'),
        ],
    )
    def test_of_something_else(self, changed, message, tmp_path):
        given = dict(model=build(), images=draw(), options=OPTIONS[:1], measured=tmp_path / 'measured.json')
        planner = Planner(**given)
        planner.measure((0,) * DEPTH)
        with pytest.raises(UserError, match=message):
            Planner(**given | changed)

    def test_of_other_weights(self, tmp_path):
        model, path = build(), tmp_path / 'measured.json'
        Planner(model, draw(), OPTIONS[:1], measured=path).measure((0,) * DEPTH)
        nn.init.ones_(model.norm.bias)
        with pytest.raises(UserError, match=r'measured.json is of another weights \(was'):
            Planner(model, draw(), OPTIONS[:1], measured=path)

    def test_of_another_kind(self, tmp_path):
        Measurements(tmp_path / 'measured.json', 'fidelity').add({('a', 'b'): 1})
        with pytest.raises(UserError, match=r'measured.json is of another kind \(was fidelity, is plan\), model'):
            Planner(build(), draw(), OPTIONS[:1], measured=tmp_path / 'measured.json')

    @pytest.mark.parametrize('spoilt', [5, [1.0], {'a': 1}, ['1', '1', '1', '1'], 'layer'])
    def test_a_damaged_entry(self, spoilt, tmp_path):
        path = tmp_path / 'measured.json'
        Planner(build(), draw(), OPTIONS, measured=path).sensitivities()
        entries = json.loads(path.read_text())
        if spoilt == 'layer':
            entries['layers']['1'] = 5
        else:
            first = next(iter(entries['layers']['1'].values()))
            first['0'] = spoilt
        path.write_text(json.dumps(entries))
        with pytest.raises(
            UserError, match=r'measured\.json: what it has at layers / 1 / .* is no measurement; remove'
        ):
            Planner(build(), draw(), OPTIONS, measured=path).plan(0.7)

    @pytest.mark.parametrize('spoilt', [5, {'full': 'x'}])
    def test_damaged_times(self, spoilt, tmp_path):
        path = tmp_path / 'measured.json'
        Planner(build(), draw(1), OPTIONS, unit='ms', measured=path).costs()
        entries = json.loads(path.read_text())
        next(iter(entries['milliseconds'].values()))['1'] = spoilt
        path.write_text(json.dumps(entries))
        with pytest.raises(UserError, match='what it has at milliseconds / cpu, .* is no measurement'):
            Planner(build(), draw(1), OPTIONS, unit='ms', measured=path).costs()

    def test_a_file_that_another_process_writes(self, tmp_path):
        named = 'measured.json: another process measures for it; wait for its end'
        with taking(tmp_path / '.measured.json.lock'), pytest.raises(UserError, match=named):
            Planner(build(), draw(), OPTIONS[:1], measured=tmp_path / 'measured.json')

    def test_what_a_kill_has_left_is_removed(self, tmp_path):
        left, of_another = tmp_path / '.measured.json.77.tmp', tmp_path / '.other.json.77.tmp'
        left.touch()
        of_another.touch()
        Planner(build(), draw(), OPTIONS[:1], measured=tmp_path / 'measured.json')
        assert not left.exists() and of_another.exists()

    @pytest.mark.parametrize('text', ['', '{}', '[1]', '{"about": 3}', '{"about": {}, "layers": null}'])
    def test_another_file(self, text, tmp_path):
        (tmp_path / 'measured.json').write_text(text)
        with pytest.raises(UserError, match='measured.json is not a file of measurements'):
            Planner(build(), draw(), measured=tmp_path / 'measured.json')


@pytest.mark.parametrize(
    'changed, message',
    [
        (dict(images=[]), 'images must hold at least one'),
        (dict(images=[torch.zeros(64, 64)]), 'images must be tensors'),
        (dict(images=[*draw(1), *draw(1, 32)]), 'of one size'),
        (dict(images=['photo.jpg']), 'got str'),
        (dict(images=None), 'must be a list of tensors .*got NoneType'),
        (dict(images=draw(1)[0]), r'tensors \(C, H, W\) .*got torch.float32, \(64, 64\)'),
        (dict(images=[torch.zeros(3, 64, 64, dtype=torch.uint8)]), 'floating-point numbers.*got torch.uint8'),
        (dict(model=build().to('meta')), 'the model is on the meta device'),
        (dict(images=draw(1, 60)), '60'),
        (dict(images=draw(1, 32)), 'the model was built for 64'),
        (dict(images=[torch.zeros(1, 64, 64)]), r'input_size=\(1, 64, 64\)'),
        (dict(budget=0), '0 < budget ≤ 1'),
        (dict(budget=1.5), '0 < budget ≤ 1'),
        (dict(unit='flops'), 'unit must be one of gmacs, ms, keys'),
        (dict(loss='mse'), 'loss must be one of centred, patch'),
        (dict(loss=lambda a, b: float('nan')), 'is not finite'),
        (dict(loss=lambda a, b: a - b), r'must return one number, got Tensor of shape \(17, 32\)'),
        (dict(loss=lambda a, b: None), 'must return one number, got None'),
        (dict(loss=lambda a, b: 0.0, measured='t.json'), 't.json knows a loss by its name, and .*<lambda> may be any'),
        (dict(refine=-1), 'refine must be'),
        (dict(options=['dctt']), "options: dctt: unknown attention 'dctt'; did you mean dct"),
        (dict(options=[('dct', dict(keep=3))]), 'keep'),
        (dict(options=['dct', 'dct']), 'options has dct twice'),
        (dict(options=[3]), 'got 3'),
        (dict(options=3), 'got 3'),
        (dict(options={'dct': dict(keep_ratio=1 / 2)}), 'got {'),
        (dict(options=[('dct', {1: 2})]), r"got \('dct', {1: 2}\)"),
    ],
)
def test_errors(changed, message):
    given = dict(model=build(), images=draw(1), budget=0.9, options=OPTIONS[:1])
    with pytest.raises(UserError, match=message):
        plan(**given | changed)


def test_without_prefix_tokens_their_cosine_is_no_loss():
    model = build(class_token=False, global_pool='avg')
    with pytest.raises(UserError, match="loss='prefix' is of prefix tokens, and the model has none"):
        plan(model, draw(1), 0.9, loss='prefix')
    assert 'prefix' not in plan(model, draw(1), 0.9, OPTIONS).fidelity
